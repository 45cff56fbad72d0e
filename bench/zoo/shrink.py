"""Small configurations of `transformers` models: the same architecture, some 100,000 weights."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from transformers import PreTrainedConfig

HEADS, HEAD_DIM = 4, 16

# Special tokens are folded below this number; inputs draw theirs from above it.
FIRST_WORD = 16

# The vocabulary is set, and not only limited: inputs may use all of it.
VOCABULARIES = frozenset(
    "vocab_size vocab_size_per_layer_input decoder_vocab_size audio_vocab_size"
    " unpadded_vocab_size".split()
)

LAYER_COUNTS = frozenset(
    "num_hidden_layers n_layer n_layers num_layers num_decoder_layers num_encoder_layers"
    " decoder_layers encoder_layers num_blocks depth".split()
)

# Lists of layer numbers, where other lists have one entry per layer.
LAYER_NUMBERS = frozenset("full_attn_idxs moe_layers mlp_only_layers hybrid_layer_ids".split())

# A default below the limit stays as it is, and so does None.
_LIMITS: tuple[tuple[int, str], ...] = (
    (1, "first_k_dense_replace num_dense_layers moe_layer_start_index topk_group"),
    (2, "num_key_value_heads num_kv_heads num_query_groups swa_num_key_value_heads kv_n_heads"
        " linear_num_key_heads n_group n_groups mamba_n_groups mamba_ngroups num_expert_group"
        " num_experts_per_tok num_experts_per_token moe_k moe_topk moe_top_k top_k_experts"),
    (HEADS, "num_attention_heads n_head n_heads num_heads attention_heads index_n_heads"
        " num_decoder_attention_heads num_encoder_attention_heads decoder_attention_heads"
        " encoder_attention_heads swa_num_attention_heads linear_num_heads"
        " linear_num_value_heads"),
    (4, "num_experts num_local_experts n_routed_experts moe_num_experts zero_expert_num"
        " mamba_dt_rank time_step_rank"),
    (8, "qk_rope_head_dim rotary_dim mamba_d_state state_size ssm_state_size mamba_n_heads"
        " mamba_num_heads index_topk chunk_size mamba_chunk_size attention_chunk_size"
        " sliding_window sliding_window_size window_size attention_window_size keep_window_size"
        " local_attention local_attention_window_len local_attn_chunk_length"
        " lsh_attn_chunk_length"),
    (HEAD_DIM, "head_dim d_kv d_head dim_head attention_head_dim attention_head_size kv_channels"
        " qk_nope_head_dim v_head_dim index_head_dim linear_head_dim linear_key_head_dim"
        " linear_value_head_dim swa_head_dim mamba_d_head mamba_head_dim mamba_headdim"
        " kv_lora_rank o_lora_rank hc_lowrank adapter_rank loop_gate_rank"),
    (24, "q_lora_rank qk_head_dim"),
    (32, "moe_intermediate_size expert_ffn_hidden_size shared_intermediate_size"
        " shared_expert_intermediate_size shared_experts_intermediate_size"
        " moe_shared_expert_intermediate_size hidden_size_per_layer_input router_hidden_size"
        " shape_embed_dim pronunciation_embed_dim block_multiple_of prompt_mid_dim"
        " image_size output_channels nemo_conv_channels"),
    (64, "hidden_size n_embd d_model emb_dim embedding_dim embedding_size word_embed_proj_dim"
        " input_embedding_size output_embedding_size attention_hidden_size lru_width mamba_d_ssm"
        " hidden_size_global backbone_hidden_size dim_model_base num_centroids"
        " max_position_embeddings n_positions n_ctx max_seq_len context_length"
        " max_target_positions max_source_positions rel_extent ext_pw_out_channel"
        " depthwise_separable_out_channel"),
    (96, "intermediate_size n_inner ffn_dim d_ff dff dim_ff d_inner ffn_hidden_size"
        " encoder_ffn_dim decoder_ffn_dim feed_forward_size intermediate_size_mlp"
        " dense_intermediate_size prefix_dense_intermediate_size mlp_dim"),
    (512, "encoder_hash_byte_group_vocab pronunciation_vocab_size shape_vocab_size"),
)  # fmt: skip
LIMITS: Mapping[str, int] = {name: limit for limit, names in _LIMITS for name in names.split()}


def shrink(config_class: Any, vocab: int, overrides: Mapping[str, Any]) -> Any:
    """A small configuration of a class, its sub-configurations included.

    Sizes are cut to `LIMITS`, dropout and router noise are off, nothing is cached for decoding.
    One layer of each kind is kept (a window and full attention, dense and sparse), at least two.

    Args:
        config_class: a subclass of `PreTrainedConfig`.
        vocab: the number of tokens.
        overrides: fields for which the rules do not do; under the name of a sub-configuration, a
            mapping of its fields.
    """
    # Some classes refuse the defaults of their own parts.
    nested = {name: value for name, value in overrides.items() if isinstance(value, Mapping)}
    default = config_class(**nested)
    # Fields that some layers override cannot be read otherwise.
    default.allow_global_per_layer_attribute_access = True
    parts = {
        name: shrink(type(part), vocab, overrides.get(name, {}))
        for name, part in _values(default).items()
        if isinstance(part, PreTrainedConfig)
    }
    small = _Shrinker(default, vocab, _layers_of_each_kind(default)).options()
    return config_class(**{**small, **overrides, **parts})


@dataclass(frozen=True, slots=True)
class _Shrinker:
    """The rules for one configuration, without its sub-configurations.

    Attributes:
        default: the configuration that its class makes.
        vocab: the number of tokens.
        kept: the numbers of the layers to keep.
    """

    default: Any
    vocab: int
    kept: tuple[int, ...]

    def options(self) -> dict[str, Any]:
        """The fields whose small value is not the default."""
        options = {
            name: small
            for name, value in _values(self.default).items()
            if not isinstance(value, PreTrainedConfig)
            and (small := self._value(name, value)) != value
        }
        if exceptions := self.default.to_dict().get("per_layer_config"):
            options["per_layer_config"] = self._exceptions(exceptions)
        return options

    def _value(self, name: str, value: Any) -> Any:
        if name in LAYER_NUMBERS and value is not None:
            return [new for new, old in enumerate(self.kept) if old in value]
        if isinstance(value, list | tuple):
            cut = len(value) == _layer_count(self.default)
            return [self._value(name, value[i]) for i in self.kept] if cut else value
        if name.endswith(("token_id", "token_index")) and isinstance(value, int):
            return value % FIRST_WORD
        if isinstance(value, bool):
            return {"use_cache": False, "is_decoder": True}.get(name, value)
        if isinstance(value, int | float) and ("drop" in name or name.endswith("jitter_noise")):
            return 0.0
        return self._size(name, value)

    def _size(self, name: str, value: Any) -> Any:
        heads = getattr(self.default, "num_attention_heads", None)
        if name == "num_key_value_heads" and value in (None, heads):
            return HEADS
        if name == "head_dim" and value is None:
            return HEAD_DIM
        if not isinstance(value, int):
            return value
        if name in VOCABULARIES:
            return self.vocab
        if name in LAYER_COUNTS:
            return min(value, len(self.kept))
        return min(value, LIMITS.get(name, value))

    def _exceptions(self, exceptions: Mapping[str, Mapping[str, Any]]) -> dict[int, Any]:
        """What single layers override, in the same proportion to the other layers."""
        by_layer = {int(number): fields for number, fields in exceptions.items()}
        return {
            new: {name: self._scaled(name, value) for name, value in by_layer[old].items()}
            for new, old in enumerate(self.kept)
            if old in by_layer
        }

    def _scaled(self, name: str, value: Any) -> Any:
        usual = getattr(self.default, name)
        small = self._value(name, usual)
        return value if small == usual else value * small // usual


def _values(config: Any) -> dict[str, Any]:
    return {field.name: getattr(config, field.name) for field in fields(config)}


def _layer_count(config: Any) -> int:
    count = getattr(config, "num_hidden_layers", None)
    return count if isinstance(count, int) else 0


def _layers_of_each_kind(config: Any) -> tuple[int, ...]:
    """The layers that show a value, in some list with one entry per layer, for the first time."""
    count = _layer_count(config)
    firsts = {
        value.index(kind)
        for name, value in _values(config).items()
        if isinstance(value, list | tuple) and len(value) == count and name not in LAYER_NUMBERS
        for kind in value
    }
    return tuple(sorted(firsts)) if len(firsts) > 1 else (0, 1)
