"""What a cache needs to know of a model: its layers, their heads, and windows of its own."""

from dataclasses import dataclass
from typing import Any

from memopt.errors import ConfigError

KINDS = ("full_attention", "sliding_attention")


@dataclass(frozen=True)
class Shape:
    """Heads of keys, and how far each layer of the model looks back.

    Attributes:
        heads: of keys, in every layer.
        windows: for each layer, the tokens that it sees, its own included; None for all of them.
    """

    heads: int
    windows: tuple[int | None, ...]

    @classmethod
    def of(cls, config: Any) -> "Shape":
        """Read a config of transformers.

        Raises:
            ConfigError: its layers hold something else than keys and values of their own, or not
                the same heads.
        """
        if config.is_encoder_decoder or config.get_text_config(decoder=True) is not config:
            raise ConfigError(
                f"{config.model_type}: memopt.cache serves decoders of text; of a model with "
                "other parts, take the language model"
            )
        if getattr(config, "num_kv_shared_layers", 0):
            raise ConfigError(f"{config.model_type}: layers that share keys are not supported")
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        if not isinstance(heads, int):
            raise ConfigError(
                f"num_key_value_heads={heads!r}: one number for all layers is needed"
            )
        kinds = _kinds(config)
        if set(kinds) - set(KINDS):
            raise ConfigError(
                f"layers of kind {sorted(set(kinds) - set(KINDS))}: memopt.cache holds {KINDS}"
            )
        window = getattr(config, "sliding_window", None)
        return cls(heads, tuple(window if kind == KINDS[1] else None for kind in kinds))


def _kinds(config: Any) -> list[str]:
    if getattr(config, "layer_types", None):
        return list(config.layer_types)
    if getattr(config, "attention_chunk_size", None):
        return ["chunked_attention"]
    is_sliding = getattr(config, "sliding_window", None) is not None
    return [KINDS[is_sliding]] * int(config.num_hidden_layers)


def checked_length(max_length: int) -> int:
    """``max_length``, which is a positive integer or a ``ConfigError``."""
    if not isinstance(max_length, int) or max_length < 1:
        raise ConfigError(
            f"max_length={max_length!r}: a number of tokens, for the prompt and all that is "
            "generated"
        )
    return max_length
