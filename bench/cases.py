"""What is measured: a model of the zoo, a size, how its outputs are treated, and the peers."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from bench.peers import ALL, CHECKPOINTS, CORE, HEADS, NORMS, OFFLOADS, QUICK
from bench.zoo import MODELS

Outputs = Literal["held", "dropped", "loss"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One row of the table.

    Attributes:
        name: how the command line and the results refer to it.
        model: the entry of the zoo.
        size: which of its sizes.
        outputs: ``"held"`` keeps what the model returned until the backward has ended,
            ``"dropped"`` frees all but the loss first, ``"loss"`` compiles a model that returns
            nothing but the loss.
        peers: names of the peers that take part.
        dtype: name of the floating-point type.
        trains: False measures the forward alone, without gradients.
    """

    name: str
    model: str
    size: str = "bench"
    outputs: Outputs = "held"
    peers: tuple[str, ...] = CORE
    dtype: str = "float32"
    trains: bool = True

    @property
    def has_dropout(self) -> bool:
        """Whether compiled and eager runs draw different random numbers."""
        return "dropout" in MODELS[self.model].tags


_DECODERS = ("eager", "eager+tiles", "inductor", "memopt", "memopt min")

_ATTENTION = ("eager", "inductor", "memopt")

_HEADLINE = (
    Case(name="lm8", model="lm8", peers=ALL),
    Case(name="llama_a", model="llama_a", peers=ALL),
    Case(name="llama_a_loss", model="llama_a", outputs="loss", peers=ALL),
    Case(name="llama_b", model="llama_b", peers=ALL),
    Case(name="llama_b_dropped", model="llama_b", outputs="dropped", peers=ALL),
    Case(name="llama_b_checkpoints", model="llama_b", peers=CHECKPOINTS),
    Case(name="llama_b_offload", model="llama_b", peers=OFFLOADS),
    Case(name="llama_head", model="llama_head", peers=HEADS),
    Case(name="llama_head_bf16", model="llama_head", peers=HEADS, dtype="bfloat16"),
    Case(name="llama_head_small", model="llama_head", size="small", peers=HEADS),
    Case(name="clip_head", model="clip_head", peers=QUICK),
    Case(name="vae_decoder_forward", model="vae_decoder", peers=_DECODERS, trains=False),
    Case(name="chunk_encoder_forward", model="chunk_encoder", peers=QUICK, trains=False),
    Case(name="resnet50_frozen_norm", model="resnet50_frozen_norm", peers=NORMS),
)
_TABLE = (
    *_HEADLINE,
    *(
        Case(name=model.name, model=model.name)
        for model in MODELS.values()
        if "bench" in model.sizes
        and model.name not in {case.model for case in _HEADLINE if case.trains}
    ),
    Case(
        name="decode_static_cache",
        model="static_cache",
        size="long",
        peers=_ATTENTION,
        trains=False,
    ),
    Case(name="llama_training_mask", model="llama_grouped", size="long", peers=_ATTENTION),
    Case(name="llama_written_out", model="llama_written_out", size="long", peers=_ATTENTION),
    Case(name="mixtral_grouped_long", model="mixtral_grouped", size="long"),
    *(
        Case(name=f"{model.name}_tiny", model=model.name, size="tiny", peers=QUICK)
        for model in MODELS.values()
        if "tiny" in model.sizes
    ),
)

CASES: Mapping[str, Case] = {case.name: case for case in _TABLE}
DEFAULT = tuple(case.name for case in _TABLE if case.size in ("bench", "long"))
QUICK_CASES = ("lm8_tiny", "llama_tiny", "resnet50_tiny")
