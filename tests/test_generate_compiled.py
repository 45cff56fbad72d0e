"""``generate()`` with a static cache and compiled steps gives the tokens of eager."""

from typing import Any

import pytest
import torch
import transformers as hf

from memopt.backend import compile_graph, read_options
from memopt.record import GraphRecord
from tests.cache_models import LAYERS, generated, prompts, tiny

OPTIONS: dict[str, Any] = {"lowering": "eager", "strict": True}


@pytest.mark.parametrize(
    ("family", "written"),
    [
        *((family, "sdpa") for family in ("llama", "qwen3", "mistral", "gemma3")),
        *((family, "eager") for family in ("llama", "gemma3")),
    ],
)
def test_compiled_steps_generate_the_same_tokens(family: str, written: str) -> None:
    model, inputs = tiny(family), prompts(12, padding=(0, 0))
    model.set_attn_implementation(written)

    def ids() -> torch.Tensor:
        cache = hf.StaticCache(config=model.config, max_cache_len=32)
        return generated(model, inputs, cache=cache, disable_compile=True)

    expected = ids()
    records = list[GraphRecord]()

    def backend(gm: Any, given: Any) -> Any:
        return compile_graph(gm, given, read_options(OPTIONS), records.append)

    torch._dynamo.reset()
    model.forward = torch.compile(model.forward, backend=backend, dynamic=False)
    assert torch.equal(ids(), expected)
    step = records[-1]
    assert step.rewrites["pack_query_groups"] == LAYERS, step.remarks
    assert step.rewrites["fuse_attention"] == (LAYERS if written == "eager" else 0)
