"""How each lowering turned out, remembered beside Inductor's own caches.

A second process that finds its code in the compile cache neither plans nor partitions, so it
knows neither the bound nor how the code compares with the plan; and replaying the code again
would give the same bytes. What the first process found is kept under a key of the code and of
everything that the plan depended on.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from memopt._torch import cache_dir, inductor_config
from memopt.memory.certify import Certificate
from memopt.memory.liveness import Liveness
from memopt.memory.timeline import Timeline
from memopt.splitting import Splitter
from memopt.stored import keep, kept


@dataclass(frozen=True)
class Proof:
    """What one lowering allocates, as planned and as emitted.

    Attributes:
        certificate: what the emitted code allocates; the reason where that cannot be told; None
            where no code was asked for.
        limit_bytes: the bound, less what earlier graphs of the step hold; None without one.
        others: how many repeats of the graph hold what they saved while it runs.
        fits: whether the planner found a plan under it.
        planned_peak_bytes: the peak by the planner's model, with what the others hold; None
            where nothing was planned.
        output_bytes: forward outputs, which the caller may hold.
        gradient_bytes: what the backward returns.
        saved_bytes: what the backward alone keeps alive between the halves.
        most_saved_bytes: the same, if everything were kept.
        backward_peak_bytes: the peak of the backward half, or of the step where that is all
            that is known.
    """

    certificate: Certificate | str | None
    limit_bytes: int | None = None
    others: int = 0
    fits: bool = True
    planned_peak_bytes: int | None = None
    output_bytes: int = 0
    gradient_bytes: int = 0
    saved_bytes: int = 0
    most_saved_bytes: int = 0
    backward_peak_bytes: int = 0

    @classmethod
    def of(cls, split: Splitter, certificate: Certificate | str | None) -> "Proof":
        """The proof of what ``split`` planned last, or of a graph that needed no plan."""
        if not split.outcomes:
            budget = split.config.memory_budget
            bounded = budget.kind == "bytes"
            limit = int(budget.value) - split.held_bytes if bounded else None
            return cls(certificate, limit, fits=split.forward is None or split.forward.fits)
        outcome = split.outcomes[-1]
        liveness: Liveness = outcome.chosen.liveness
        emitted = certificate if isinstance(certificate, Certificate) else None
        return cls(
            certificate,
            outcome.limit_bytes,
            outcome.problem.others,
            outcome.fits,
            outcome.chosen.peak_bytes,
            liveness.output_bytes,
            liveness.gradient_bytes,
            emitted.saved_bytes if emitted else liveness.saved_bytes,
            outcome.search.everything_kept.liveness.saved_bytes,
            emitted.peak_bytes if emitted else liveness.backward_peak_bytes,
        )

    @property
    def emitted(self) -> Certificate | None:
        """The certificate, where there is one."""
        return self.certificate if isinstance(self.certificate, Certificate) else None

    @property
    def held_bytes(self) -> int:
        """What one graph leaves for its backward, and for its caller."""
        return self.saved_bytes + self.output_bytes

    @property
    def most_held_bytes(self) -> int:
        """The same under a budget that lets it keep everything."""
        return max(self.saved_bytes, self.most_saved_bytes) + self.output_bytes

    @property
    def emitted_peak_bytes(self) -> int | None:
        """The peak of what was emitted, with what the others hold; None if it is not known."""
        emitted = self.emitted
        return None if emitted is None else emitted.peak_bytes + self.others * self.held_bytes

    @property
    def overshoot_bytes(self) -> int:
        """How far the emitted code is over the budget; 0 or less where it is not, or unknown."""
        if self.limit_bytes is None or self.emitted_peak_bytes is None:
            return 0
        return self.emitted_peak_bytes - self.limit_bytes

    def next_margin_bytes(self, margin_bytes: int) -> int:
        """How far below the budget to aim next, after the emitted code overshot.

        The gap between the code and the model is what the model does not see; the next plan may
        use the budget less that gap. Where the gap was allowed for already, aim visibly lower.
        """
        if self.planned_peak_bytes is not None and self.emitted_peak_bytes is not None:
            gap = self.emitted_peak_bytes - self.planned_peak_bytes
            if gap > margin_bytes:
                return gap + gap // 64
        return margin_bytes + self.overshoot_bytes + (self.limit_bytes or 0) // 64


def recall(key: str, codes: Sequence[str]) -> Proof | None:
    """The proof that ``remember`` kept, if it did and the file can be read."""
    body = kept(_path(key, codes))
    if body is None:
        return None
    try:
        certificate = body.pop("certificate")
        if isinstance(certificate, dict):
            timeline = Timeline.from_dict(certificate.pop("timeline"))
            certificate = Certificate(**certificate, timeline=timeline)
        return Proof(certificate, **body)
    except (ValueError, TypeError, AttributeError, LookupError):  # another version's
        return None


def remember(key: str, codes: Sequence[str], proof: Proof) -> None:
    """Keep a proof for later processes, unless it says that nothing fits: that needs the plan."""
    if not proof.fits or inductor_config.force_disable_caches:
        return
    body = asdict(proof)
    if proof.emitted is not None:
        body["certificate"]["timeline"] = proof.emitted.timeline.to_dict()
    keep(_path(key, codes), body)


def _path(key: str, codes: Sequence[str]) -> Path:
    digest = hashlib.sha256("\0".join((key, *codes)).encode()).hexdigest()
    return Path(cache_dir()) / "memopt" / f"{digest}.json"
