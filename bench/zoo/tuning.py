"""Ways to tune a part of a model: what is trained, and what is added to train it.

Each takes a `transformers` Llama, freezes what it does not train, and returns what is to be run
in its place.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.zoo.hugging_face import llama
from bench.zoo.model import Inputs


class LowRank(nn.Module):
    """A frozen linear layer and a trained product of two narrow ones; Hu et al. (2021), LoRA."""

    def __init__(self, frozen: nn.Linear, rank: int = 8) -> None:
        super().__init__()
        self.frozen = frozen.requires_grad_(False)
        like: Any = {"bias": False, "dtype": frozen.weight.dtype}
        self.down = nn.Linear(frozen.in_features, rank, **like)
        self.up = nn.Linear(rank, frozen.out_features, **like)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.frozen(x) + self.up(self.down(x))
        return y


class FrozenProjections(LowRank):
    """The same, of which a square matrix in the middle is trained; Azizi et al. (2024), LaMDA."""

    def __init__(self, frozen: nn.Linear, rank: int = 8) -> None:
        super().__init__(frozen, rank)
        self.down.requires_grad_(False)
        self.up.requires_grad_(False)
        self.middle = nn.Linear(rank, rank, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.frozen(x) + self.up(self.middle(self.down(x)))
        return y


class SubMatrix(nn.Module):
    """A linear layer of which one block of the weight is trained; He et al. (2024), SMT."""

    def __init__(self, frozen: nn.Linear, rows: slice, columns: slice) -> None:
        super().__init__()
        self.frozen = frozen.requires_grad_(False)
        self.rows, self.columns = rows, columns
        self.block = nn.Parameter(frozen.weight.detach()[rows, columns].clone())

    def forward(self, x: Tensor) -> Tensor:
        weight = self.frozen.weight.clone()
        weight[self.rows, self.columns] = self.block
        return F.linear(x, weight, self.frozen.bias)


class Rotation(nn.Module):
    """A frozen linear layer whose results are turned, pair by pair; Liao et al. (2024), RoAd."""

    def __init__(self, frozen: nn.Linear) -> None:
        super().__init__()
        self.frozen = frozen.requires_grad_(False)
        pairs = frozen.out_features // 2
        self.angle = nn.Parameter(torch.zeros(pairs))
        self.scale = nn.Parameter(torch.ones(pairs))

    def forward(self, x: Tensor) -> Tensor:
        even, odd = self.frozen(x).unflatten(-1, (-1, 2)).unbind(-1)
        cos, sin = self.scale * self.angle.cos(), self.scale * self.angle.sin()
        return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)


class Beside(nn.Module):
    """A frozen model, and a recurrent one beside it; Nguyen et al. (2023), READ."""

    def __init__(self, model: Any, width: int = 32) -> None:
        super().__init__()
        self.model = model.requires_grad_(False)
        hidden, layers = model.config.hidden_size, model.config.num_hidden_layers
        self.into = nn.ModuleList(nn.Linear(hidden, width) for _ in range(layers))
        self.step = nn.Linear(width, width)
        self.out = nn.Linear(width, hidden)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        inner = self.model.model
        x = inner.embed_tokens(input_ids)
        places = torch.arange(x.shape[1], device=x.device)[None]
        rotary = inner.rotary_emb(x, places)
        state = torch.zeros_like(self.into[0](x))
        for layer, into in zip(inner.layers, self.into, strict=True):
            x = layer(x, position_embeddings=rotary)
            state = torch.tanh(into(x) + self.step(state))
        logits = self.model.lm_head(inner.norm(x) + self.out(state))
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def adapt(model: nn.Module, make: Callable[[nn.Linear], nn.Module], *names: str) -> nn.Module:
    """Freeze a model, and put something in the place of its linear layers of these names."""
    model.requires_grad_(False)
    for module in list(model.modules()):
        for name in names:
            if isinstance(linear := getattr(module, name, None), nn.Linear):
                setattr(module, name, make(linear))
    return model


def _trained(model: nn.Module, *parts: str) -> nn.Module:
    """Freeze all parameters but those with one of these in their names."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(part in name for part in parts))
    return model


def low_rank(model: nn.Module) -> nn.Module:
    """LoRA at queries and values; Hu et al. (2021), arXiv:2106.09685."""
    return adapt(model, LowRank, "q_proj", "v_proj")


def peft_low_rank(model: nn.Module) -> nn.Module:
    """The same by the library PEFT."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=8, target_modules=["q_proj", "v_proj"], lora_dropout=0.0)
    tuned: nn.Module = get_peft_model(model, config)
    return tuned


def sub_matrices(model: nn.Module) -> nn.Module:
    """A quarter of the rows and of the columns of each query and value projection; He et al."""

    def make(linear: nn.Linear) -> nn.Module:
        rows, columns = linear.out_features // 4, linear.in_features // 4
        return SubMatrix(linear, slice(rows, 2 * rows), slice(0, columns))

    return adapt(model, make, "q_proj", "v_proj")


FORMS: dict[str, Callable[[Any], nn.Module]] = {
    "all": lambda model: model,
    "low rank": low_rank,
    "low rank by PEFT": peft_low_rank,
    "frozen projections": lambda model: adapt(model, FrozenProjections, "q_proj", "v_proj"),
    "sub-matrices": sub_matrices,
    "rotations": lambda model: adapt(model, Rotation, "q_proj", "v_proj"),
    "norms": lambda model: _trained(model, "norm"),
    "biases": lambda model: _trained(model, "bias"),
    "attention's output": lambda model: _trained(model, "o_proj"),
    "last block": lambda model: _trained(model, "layers.3.", "model.norm", "lm_head"),
    "head": lambda model: _trained(model, "lm_head"),
    "every second MLP": lambda model: _trained(model, "layers.1.mlp", "layers.3.mlp"),
    "side network": Beside,
}


def tuned(form: str, **shape: Any) -> tuple[nn.Module, Inputs]:
    """A Llama of four blocks with biases, tuned in one of the `FORMS`, and its inputs."""
    sizes = {"vocab": 256, "hidden": 128, "inter": 352, "batch": 2, "length": 128} | shape
    recipe = llama(
        4, sizes["vocab"], sizes["hidden"], sizes["inter"], 4, 2,
        batch=sizes["batch"], length=sizes["length"], attention_bias=True, mlp_bias=True,
    )  # fmt: skip
    torch.manual_seed(0)
    return FORMS[form](recipe.build()).train(), recipe.inputs(0)


def groups(model: nn.Module) -> Iterator[list[nn.Parameter]]:
    """Parameters by block: HiFT trains one group per step; Liu et al. (2024), arXiv:2401.15207."""
    found: dict[str, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        block = name.split("layers.")[1].split(".")[0] if "layers." in name else "rest"
        found.setdefault(block, []).append(parameter)
    yield from found.values()
