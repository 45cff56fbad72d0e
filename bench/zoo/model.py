"""What an entry of the zoo is, and what one training step of it means."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

Inputs = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Recipe:
    """How to make one size of a model.

    Attributes:
        build: makes the module in the mode (train, or partly eval) it is to be run in.
        inputs: makes the keyword arguments of one call; they depend on the seed alone.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[int], Inputs]


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """One entry of the zoo.

    Attributes:
        name: the key in ``MODELS``.
        sizes: recipes by size; ``"tiny"`` is for tests (a step takes well under two seconds),
            ``"bench"`` has activations worth saving (50 to 600 MB), ``"small"`` is between,
            ``"long"`` has the longer sequences that make activations outweigh the gradients.
        tags: what the entry exercises: ``transformer``, ``conv``, ``dropout``, ``functorch``,
            ``hugging_face``, ``graph_break``, ``custom_op``, ``mutation``, ``float32_only`` (an
            operator of it has no float64), ``inductor_fails`` (stock Inductor of torch 2.13
            compiles it to a backward that raises), ``checkpoint`` (per-block checkpoints can be
            switched on), ``inference`` (a forward under ``no_grad`` makes sense),
            ``float32_loss`` (the library computes the loss in float32 whatever the dtype).
    """

    name: str
    sizes: Mapping[str, Recipe]
    tags: frozenset[str]

    def make(
        self,
        size: str = "tiny",
        *,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        seed: int = 0,
    ) -> tuple[nn.Module, Inputs]:
        """The module and its inputs; equal arguments give equal numbers.

        Weights are drawn in float32 and then converted, so every dtype starts from the same
        model; floating-point inputs are converted too.
        """
        recipe = self.sizes[size]
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            module = recipe.build().to(device=device, dtype=dtype)
        inputs = {
            name: value.to(device, dtype if value.is_floating_point() else value.dtype)
            for name, value in recipe.inputs(seed + 1).items()
        }
        return module, inputs


class BlockModel(nn.Module):
    """A module made of blocks, each of which can run under a checkpoint."""

    checkpointing: dict[str, Any] | None = None  # the options of `torch.utils.checkpoint`

    def run_block(self, block: nn.Module, *args: Tensor) -> Any:
        """Run one block, under `torch.utils.checkpoint` where that is switched on."""
        if self.checkpointing is not None:
            return checkpoint(block, *args, **self.checkpointing)
        return block(*args)


class LossOnly(nn.Module):
    """A model whose compiled graph returns the loss and nothing else."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Tensor) -> Tensor:
        return loss_of(self.model(**inputs))


class FusedHead(nn.Module):
    """A causal language model of `transformers` whose head and loss are one function.

    Args:
        model: the language model.
        loss: of hidden states, the head's weight and the next tokens.
    """

    def __init__(self, model: Any, loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.model = model
        self.loss = loss

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        model: Any = self.model
        hidden = model.model(input_ids=input_ids).last_hidden_state
        rows, targets = hidden[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        return self.loss(rows, model.lm_head.weight, targets)


def save_some_products() -> Any:
    """The contexts of a checkpoint that holds attention's results and every second product.

    Source: the option "op" of torchtitan's selective checkpoints.
    """
    products = {"forward": count(1), "backward": count(1)}

    def policy(context: Any, operator: Any, *args: Any, **options: Any) -> CheckpointPolicy:
        name = getattr(operator, "__name__", str(operator))
        if name.startswith("mm."):
            number = next(products["backward" if context.is_recompute else "forward"])
            saves = number % 2 == 1
        else:
            saves = "scaled_dot_product" in name
        return CheckpointPolicy.MUST_SAVE if saves else CheckpointPolicy.PREFER_RECOMPUTE

    contexts: Any = create_selective_checkpoint_contexts
    return contexts(policy)


def checkpoint_blocks(module: nn.Module, *, selective: bool = False) -> None:
    """Switch on one checkpoint per block, in place.

    Args:
        module: of blocks.
        selective: whether some results are held all the same; see `save_some_products`.

    Raises:
        ValueError: the module has no blocks to put under checkpoints.
    """
    # transformers renamed the method in 5.23 and warns about the old name.
    new, old = "activation_checkpointing_enable", "gradient_checkpointing_enable"
    enable = getattr(module, new, None) or getattr(module, old, None)
    options: dict[str, Any] = {"use_reentrant": False}
    if selective:
        options["context_fn"] = save_some_products
    if enable is not None:
        enable(options)
    elif isinstance(module, BlockModel):
        module.checkpointing = options
    else:
        raise ValueError(f"{type(module).__name__} has no blocks to put under checkpoints")


def loss_of(outputs: Any) -> Tensor:
    """The scalar loss in what a model of the zoo returned.

    A lone tensor is the loss; of a tuple it is the first entry; of a Hugging Face output it is
    the attribute ``loss``.
    """
    if isinstance(outputs, Tensor):
        return outputs
    loss = outputs[0] if isinstance(outputs, tuple) else outputs.loss
    assert isinstance(loss, Tensor)
    return loss


def step(
    model: Callable[..., Any],
    inputs: Inputs,
    *,
    hold_outputs: bool = True,
    loss: Callable[[Any], Tensor] = loss_of,
) -> Tensor:
    """One forward and one backward; gradients end up in the parameters.

    Everything the model returned stays alive until the backward has ended, as in a training
    loop that logs its outputs. That is part of what is measured: the logits of a language model
    can be a large share of the peak.

    Args:
        model: the module, compiled or not.
        inputs: its keyword arguments.
        hold_outputs: False drops all outputs but the loss before the backward starts.
        loss: finds the loss in the outputs.

    Returns:
        The loss, detached.
    """
    outputs = model(**inputs)
    value = loss(outputs)
    if not hold_outputs:
        del outputs
    value.backward()  # type: ignore[no-untyped-call]
    return value.detach()
