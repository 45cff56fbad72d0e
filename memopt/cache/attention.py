"""Attention for transformers' models whose cache holds keys and values in a form of its own.

`prepare` registers a function for attention and one for masks under one name, through
transformers' public tables, and sets it for one model. No code and no weight is changed. The mask
function passes on which columns are padding and no more: causality is the cache's to know.
"""

from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from memopt._transformers import AttentionInterface, AttentionMaskInterface
from memopt.cache.layer import Pending
from memopt.cache.rows import grouped_queries, over_columns
from memopt.cache.shape import Shape
from memopt.errors import ConfigError

NAME = "memopt"
Model = TypeVar("Model", bound=torch.nn.Module)


def prepare(model: Model) -> Model:
    """Have a model's attention read what the caches of `memopt.cache` hold.

    It computes what ``sdpa`` does, also without a cache; a cache of transformers' own needs
    ``model.set_attn_implementation("sdpa")`` again.

    Args:
        model: a decoder of transformers, such as ``LlamaForCausalLM``.

    Returns:
        The same model.

    Raises:
        ConfigError: its layers are of a kind that these caches do not hold, or its attention is
            not one that can be set.
    """
    config: Any = model.config
    Shape.of(config)
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, padding_of)
    model.set_attn_implementation(NAME)  # type: ignore[operator]
    if config._attn_implementation != NAME:
        raise ConfigError(
            f"{type(model).__name__} does not look its attention up in transformers' table: "
            "memopt.cache serves models that do, such as LlamaForCausalLM"
        )
    return model


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Any,
    value: Any,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """As ``sdpa_attention_forward`` is called by models, with a `Pending` for the keys."""
    _refuse(dropout, getattr(module, "is_causal", True), others)
    padding = _columns_of(attention_mask)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if isinstance(key, Pending):
        result = key.layer.attend(query, key, padding, scale)
        if result.requires_grad and torch.compiler.is_compiling():
            raise ConfigError("a compiled step with gradients: call it under torch.no_grad()")
        if result.requires_grad:
            result.register_hook(_no_backward)  # type: ignore[no-untyped-call]
    else:
        result = _without_cache(query, key, value, padding, sliding_window, scale)
    return result.transpose(1, 2).contiguous(), None


def _refuse(dropout: float, is_causal: bool, others: dict[str, Any]) -> None:
    asked = others.get("is_causal")
    if not (is_causal if asked is None else asked):
        raise ConfigError("attention that is not causal: memopt.cache serves decoders alone")
    if dropout:
        raise ConfigError(f"attention with dropout={dropout}: call model.eval() first")
    for name in ("softcap", "s_aux", "position_bias"):
        if others.get(name) is not None:
            raise ConfigError(
                f"attention with a {name!r}: memopt.cache computes plain softmax attention only; "
                "use a cache of transformers for this model"
            )


def _no_backward(_: Tensor) -> None:
    raise ConfigError(
        "a backward through a cache of memopt.cache, which holds keys and values without their "
        "gradients: train with use_cache=False"
    )


def _columns_of(mask: Tensor | None) -> Tensor | None:
    if mask is None:
        return None
    if mask.dtype != torch.bool or mask.dim() != 4 or mask.shape[1] * mask.shape[2] != 1:
        raise ConfigError(
            f"an attention mask {tuple(mask.shape)} of {mask.dtype}: give one of two dimensions, "
            "(batch, tokens), with zeros for padding"
        )
    return mask[:, 0, 0]


def _without_cache(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    padding: Tensor | None,
    window: int | None,
    scale: float,
) -> Tensor:
    n = query.shape[2]
    if key.shape[2] != n:
        raise ConfigError(
            "this model was prepared for the caches of memopt.cache, and got another one: pass "
            "one of them, or call model.set_attn_implementation('sdpa')"
        )
    columns = torch.arange(n, device=query.device)
    grouped = grouped_queries(query, key.shape[1])
    return over_columns(grouped, key, value, columns, padding, scale, window).flatten(1, 2)


def padding_of(
    q_length: int,
    kv_length: int,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    **_: Any,
) -> Tensor | None:
    """Which columns are padding, `(B, 1, 1, kv_length)`, True elsewhere; None where none are.

    Args:
        q_length: new columns.
        kv_length: what the cache has room for.
        attention_mask: `(B, columns so far)`, or None.
        allow_is_causal_skip: False where the model wants more than a causal mask.

    Raises:
        ConfigError: it wants more, or there are more columns than there is room for.
    """
    if q_length > 1 and not allow_is_causal_skip:
        raise ConfigError(
            "this model's mask is more than a causal one (packed sequences, images, a mask "
            "function of its own): memopt.cache has no form for it"
        )
    if attention_mask is None:
        return None
    room = kv_length - attention_mask.shape[-1]
    if room < 0:
        raise ConfigError(
            f"{attention_mask.shape[-1]} tokens: the cache has room for {kv_length}; make it with "
            "a max_length for the prompt and all that is generated"
        )
    if not torch.compiler.is_compiling() and bool(attention_mask.all()):
        return None
    # Not padded as bool: of a mask that was int64, Inductor's C++ does not compile (torch 2.13).
    return F.pad(attention_mask.to(torch.uint8), (0, room)).bool()[:, None, None]
