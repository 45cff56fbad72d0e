"""``torch.compile(backend="memopt")``: the whole flow, on one page."""

import functools
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import fx

from memopt import diagnosis
from memopt._torch import get_hash_for_files, list_mode_options
from memopt._versions import __version__
from memopt.config import Config
from memopt.device import device_spec
from memopt.lowering import Caches, check_patches, lower_eagerly, lower_with_inductor
from memopt.memory.certify import certify
from memopt.memory.ledger import LEDGER, Crowded
from memopt.passes import CUT_MAPS, CUT_ROWS, FORMS, JOINT, POST_GRAD, PRE_GRAD
from memopt.pipeline import Compiled, Named, PassContext, Pipeline, configure
from memopt.proofs import Proof, recall, remember
from memopt.record import GraphRecord
from memopt.remarks import RemarkKind
from memopt.splitting import Splitter
from memopt.units import format_bytes

log = logging.getLogger(__name__)

Observer = Callable[[GraphRecord], None]
PASSES: tuple[Named, ...] = (*PRE_GRAD, *JOINT, *FORMS, CUT_ROWS, CUT_MAPS, *POST_GRAD)
_MAX_ATTEMPTS = 5


def memopt(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, object] | None = None,
    mode: str | None = None,
) -> Compiled:
    """Compile one Dynamo graph under a memory budget; this is the backend's entry point.

    Args:
        gm: the graph.
        example_inputs: its inputs, real or fake.
        options: see ``Config``.
        mode: a mode of ``torch.compile``, handed on to Inductor.

    Raises:
        ConfigError: an option is unknown or impossible.
        BudgetInfeasibleError: no plan keeps the step under the budget.
    """
    return compile_graph(gm, example_inputs, read_options(options, mode=mode))


def read_options(options: Mapping[str, object] | None, *, mode: str | None = None) -> Config:
    """Validate options against the passes that exist.

    Raises:
        ConfigError: an option is unknown or impossible.
    """
    known = {p.name: tuple(vars(p)) for p in PASSES}
    config = Config.from_options(options, mode=mode, known_passes=known)
    for pass_ in PASSES:
        configure(pass_, config)
    if config.device is not None:
        device_spec(config.device)
    check_patches(config.inductor)
    return config


def compile_graph(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    config: Config,
    observe: Observer | None = None,
) -> Compiled:
    """Passes, plan, partition, lowering; then the proof, and again with a margin if it fails."""
    ctx = PassContext(config)
    Pipeline("pre_grad", PRE_GRAD).run(gm, ctx)
    held = LEDGER.held_bytes() if config.memory_budget.kind == "bytes" else 0
    if config.lowering == "eager":
        split = Splitter(config, ctx, held)
        compiled = lower_eagerly(gm, inputs, split)
        proof = Proof.of(split, None)
    else:
        margin: int | None = None
        for _ in range(_MAX_ATTEMPTS):
            split = Splitter(
                config, PassContext(config, [*ctx.remarks], {**ctx.rewrites}), held, margin
            )
            compiled, proof = _lower(gm, inputs, split, observe)
            if proof.overshoot_bytes <= 0 or not proof.fits:
                break
            margin = proof.next_margin_bytes(margin or 0)
            log.info("the code is %d bytes over the budget: again", proof.overshoot_bytes)
    diagnosis.require_fit(split, proof, LEDGER.most_held_bytes() if held else 0)
    if config.memory_budget.kind != "none" and isinstance(proof.certificate, str):
        log.warning("the budget is met by the estimate only: %s", proof.certificate)
    if split.outcomes or proof.planned_peak_bytes is not None:
        log.info("%s", diagnosis.one_line(split, proof))
    if observe is not None:
        observe(diagnosis.make_record(split, proof))
    if config.memory_budget.kind == "bytes" and proof.planned_peak_bytes is not None:
        _warn_of_earlier_graphs(split, proof.gradient_bytes)
        highest = proof.backward_peak_bytes + proof.others * proof.held_bytes
        crowded = _crowded(config, proof)
        compiled = LEDGER.tracked(
            compiled, proof.held_bytes, proof.most_held_bytes, highest, crowded
        )
    for wrap in ctx.wrappers:
        compiled = wrap(compiled)
    return compiled


def _lower(
    gm: fx.GraphModule, inputs: Sequence[Any], split: Splitter, observe: Observer | None
) -> tuple[Compiled, Proof]:
    """Lower with Inductor, and prove what the code allocates or recall the proof."""
    config = split.config
    key = cache_key(config, split.held_bytes, split.margin_bytes)
    looked_at = observe is not None or config.memory_budget.kind != "none"
    attempts: tuple[Caches, ...] = ("all", "graphs", "none")
    for caches in attempts[observe is not None :]:
        codes: list[str] = []
        compiled = lower_with_inductor(
            gm,
            inputs,
            split,
            key=key,
            patches=inductor_patches(config),
            sink=codes.append if looked_at else None,
            caches=caches,
        )
        if split.outcomes or split.forward is not None or not codes:
            break
        if caches == "all" and (proof := recall(key, codes)):
            return compiled, proof
        if len(codes) == 1 and not (observe is not None and split.cuts_forwards):
            break  # nothing to plan, or no one to tell
    certificate = certify(codes, granularity=_granularity(split)) if codes else None
    proof = Proof.of(split, certificate)
    if codes:
        remember(key, codes, proof)
    return compiled, proof


def _warn_of_earlier_graphs(split: Splitter, gradient_bytes: int) -> None:
    """An earlier graph was planned before it was known that this one's gradients come first."""
    over = LEDGER.earlier_peak_bytes(gradient_bytes) - int(split.config.memory_budget.value)
    if over > 0:
        text = (
            f"the step has several graphs, and the backward of an earlier one may pass the "
            f"budget by {format_bytes(over)}, the gradients that this graph leaves behind: lower "
            f"memory_budget by that, or remove the graph break"
        )
        split.ctx.remark("backend", RemarkKind.ANALYSIS, text)
        warnings.warn(text, stacklevel=2)


def _crowded(config: Config, proof: Proof) -> Crowded | None:
    """Warns when runs of a graph, such as of blocks that share it, pass the budget together."""
    budget, held = int(config.memory_budget.value), proof.held_bytes
    if not held:
        return None

    def warn(runs: int) -> None:
        peak = proof.backward_peak_bytes + (runs - 1) * held
        warnings.warn(
            f"{runs} runs of one graph wait for their backward, each of which holds "
            f"{format_bytes(held)}, and pass the memory_budget of {format_bytes(budget)} by "
            f"{format_bytes(peak - budget)}: set the option repeats (now {config.repeats}) to how "
            f"many there are in a step, such as the number of blocks that share the graph",
            stacklevel=2,
        )

    room = 1 + max(0, budget - proof.backward_peak_bytes) // held
    return Crowded(max(room, config.repeats), warn)


def cache_key(config: Config, held_bytes: int, margin_bytes: int | None) -> str:
    """Identity of everything that a graph's rewriting and planning depend on."""
    pipelines = [
        Pipeline(stage, passes).uuid(config)
        for stage, passes in (("pre_grad", PRE_GRAD), ("joint", JOINT), ("post_grad", POST_GRAD))
    ]
    cutters = configure(CUT_ROWS, config), configure(CUT_MAPS, config)
    forms = repr([*(configure(form, config) for form in FORMS), *cutters])
    facts = __version__, _source_hash(), config.key(), str(held_bytes), str(margin_bytes), forms
    return "|".join([*facts, *pipelines])


def inductor_patches(config: Config) -> dict[str, Any]:
    """The options that are Inductor's own, those of the mode among them."""
    from_mode = list_mode_options(config.mode, None) if config.mode else {}
    return {**from_mode, **config.inductor.to_dict()}


def _granularity(split: Splitter) -> int:
    return split.outcomes[-1].problem.cost.device.allocation_granularity if split.outcomes else 1


@functools.cache
def _source_hash() -> str:
    """A hash of every source file that decides what is emitted."""
    folder = Path(__file__).parent
    roots = folder, folder / "passes", folder / "kernels"  # the last two may be links
    files = sorted({str(p.resolve()) for root in roots for p in root.rglob("*.py")})
    return str(get_hash_for_files(tuple(files)).hex())
