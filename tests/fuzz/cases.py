"""What becomes of a random model: its inputs, its numbers, and memopt's options, by seed."""

import tempfile
from collections.abc import Collection
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from tests.fuzz.attentions import ATTENTIONS
from tests.fuzz.drawing import Draw, Maker, Size
from tests.fuzz.layers import LAYERS, image, mixer
from tests.fuzz.models import MAKERS, RandomModel, drawn_kind

SMOOTH: tuple[Maker, ...] = (*(make for make in LAYERS if make is not image), *ATTENTIONS)
OF_KIND: dict[str, tuple[Maker, ...]] = {
    "autocast": SMOOTH,
    "bfloat16": tuple(make for make in SMOOTH if make is not mixer),  # which has no transform
}

Kind = Literal["float64", "autocast", "bfloat16", "compressed"]
KINDS: tuple[Kind, ...] = get_args(Kind)
COMPRESSED_ERROR = 0.25


@dataclass
class Case:
    """One random model, its inputs, and how it is to be compiled and run.

    Args:
        seed: decides all the rest.
        without: as for `Body`.
        kind: what is computed in: float64; in low precision, smooth steps without draws; or
            float64 with values that the backward finds rounded.
        exact: in float64, from the same numbers that the kind starts from.
    """

    seed: int
    without: Collection[int] = ()
    kind: Kind = "float64"
    exact: bool = False
    options: dict[str, Any] = field(init=False)
    dynamic: bool | None = field(init=False)
    mode: str = field(init=False)

    def __post_init__(self) -> None:
        draw = Draw(f"{self.seed} case")
        self.mode = draw.one(("train",) * 7 + ("eval", "infer", "infer_in_train"))
        self.dynamic = draw.one((False,) * 7 + (True, True, None))
        self.batches = [2, 2 if self.dynamic is False else 3]
        self.by_loss_alone = draw.chance("by_loss_alone", 0.3)
        self.optimises = draw.chance("optimises")
        self.options = drawn_options(Draw(f"{self.seed} options"))
        if Draw(f"{self.seed} files").chance("files", 0.1):
            away = {"directory": tempfile.gettempdir(), "least": 1024, "bandwidth": 1e9}
            self.options["passes"]["offload_to_files"] = away
        if self.is_low:
            self.mode = "eval" if self.trains else "infer"
        if self.kind == "compressed":
            self.mode, self.optimises = "train", False
            self.options |= compressed_options(Draw(f"{self.seed} compressed"))

    @property
    def is_low(self) -> bool:
        """Whether the kind's numbers have fewer bits than float64's."""
        return self.kind in ("autocast", "bfloat16")

    @property
    def dtype(self) -> torch.dtype:
        """Of parameters and inputs."""
        if not self.is_low:
            return torch.float64
        return torch.float32 if self.kind == "autocast" else torch.bfloat16

    def autocast(self) -> AbstractContextManager[Any]:
        """What a step is to run in."""
        if self.kind != "autocast" or self.exact:
            return nullcontext()
        return torch.autocast("cpu", torch.bfloat16)

    @property
    def trains(self) -> bool:
        """Whether there is a backward."""
        return self.mode in ("train", "eval")

    def model(self) -> RandomModel:
        """The model; equal numbers every time."""
        torch.manual_seed(self.seed)
        makers = OF_KIND.get(self.kind, MAKERS)
        model = RandomModel(self.seed, self.without, makers).to(self.dtype)
        model = model.double() if self.exact else model
        return model.train(self.mode in ("train", "infer_in_train"))

    def inputs(self, number: int) -> list[Tensor]:
        """New inputs of a step."""
        size = Size(self.batches[number])
        generator = torch.Generator().manual_seed(1000 * self.seed + number)
        draw = Draw(f"{self.seed} model")
        dtypes = self.dtype, torch.float64 if self.exact else self.dtype
        return [
            x.detach().to(dtypes[0]).to(dtypes[1]).requires_grad_(x.requires_grad)
            if x.is_floating_point()
            else x
            for x in model_inputs(draw, size, generator, self.trains)
        ]


def model_inputs(draw: Draw, size: Size, g: torch.Generator, trains: bool) -> list[Tensor]:
    """Tokens or numbers, and targets of the same kind as `RandomModel` draws them."""
    kind, classes = drawn_kind(draw)
    shape = size.batch, size.tokens
    numbers = torch.randn(*shape, size.width, generator=g, dtype=torch.float64)
    tokens = torch.randint(0, classes, shape, generator=g)
    labels = torch.randint(0, classes, shape, generator=g)
    labels[:, -3] = -100
    wanted = torch.randn(*shape, size.width, generator=g, dtype=torch.float64)
    trained = draw.chance("input_trained", 0.3)
    first = tokens if kind.startswith("tokens") else numbers.requires_grad_(trained and trains)
    return [first, labels if kind.endswith("classes") else wanted]


PASSES: dict[str, Any] = {
    "pack_masks": {"cpu": True, "least": 64},
    "offload": {"simulate": True, "least": 1024, "bandwidth": 1e9},
    "narrow_integers": {"least": 64},
    "fuse_norms": {"cpu": True},
    "fuse_gates": {"cpu": True},
    "fuse_rotary": {"cpu": True},
    "fuse_rows": {"cpu": True},
    "early_backward": True,
    "tune_norms": True,
    "chunk_losses": False,
    "cut_rows": False,
    "weigh_rows": False,
    "fuse_attention": False,
    "prove_causal": False,
    "early_masks": False,
    "remake_in_backward": False,
    "early_gradients": False,
    "embedding_gradients": False,
    "overwrite_hidden_states": False,
    "forget_inputs": False,
    "narrow_products": False,
}


def drawn_options(draw: Draw) -> dict[str, Any]:
    """Options of memopt under which numbers are eager's."""
    passes = {name: PASSES[name] for name in draw.some(list(PASSES), 6) if draw.chance("set")}
    if "chunk_losses" not in passes and draw.chance("chunks"):
        passes["chunk_losses"] = {
            "chunk_rows": draw.one((0, 7, 16)),
            "logits": draw.one(("lazy", "lazy", "full")),
        }
    budgets = (None, None, 0.95, 0.8, 0.6, 0.5, "min", "min", "1MiB", "200KiB")
    return {
        "lowering": "eager",
        "strict": True,
        "memory_budget": draw.one(budgets),
        "solver": draw.one(("auto", "auto", "auto", "greedy", "exact")),
        "passes": passes,
    }


def compressed_options(draw: Draw) -> dict[str, Any]:
    """Options under which gradients are off by what values are rounded by."""
    form = {"bits": draw.one((8, 8, 4)), "group": draw.one((16, 32)), "least": 64}
    if form["bits"] == 8:
        form["floats"] = draw.chance("floats", 0.3)
    return {
        "memory_budget": "min",
        "passes": {"compress": form | {"error": COMPRESSED_ERROR}},
    }
