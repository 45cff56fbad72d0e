"""``generate()`` with a static cache and compiled steps gives the tokens of eager."""

from typing import Any

import pytest
import torch
import transformers as hf

from memopt.backend import compile_graph, read_options
from memopt.record import GraphRecord
from tests.cache_models import prompts, tiny

OPTIONS: dict[str, Any] = {"lowering": "eager", "strict": True}


@pytest.mark.parametrize(
    ("family", "written"),
    [
        *((family, "sdpa") for family in ("llama", "qwen3", "mistral", "gemma3")),
        *((family, "eager") for family in ("llama", "gemma3")),
    ],
)
def test_compiled_steps_generate_the_same_tokens(family: str, written: str) -> None:
    layers = 2 if family == "gemma3" else 1  # of each kind one
    model, inputs = tiny(family, layers), prompts(12, padding=(0, 0))
    model.set_attn_implementation(written)

    def ids() -> torch.Tensor:
        cache = hf.StaticCache(config=model.config, max_cache_len=32)
        made: torch.Tensor = model.generate(
            **inputs, cache=cache, max_new_tokens=5, do_sample=False, disable_compile=True
        )
        return made

    expected = ids()
    records = list[GraphRecord]()

    def backend(gm: Any, given: Any) -> Any:
        return compile_graph(gm, given, read_options(OPTIONS), records.append)

    torch._dynamo.reset()
    model.forward = torch.compile(model.forward, backend=backend, dynamic=False)
    assert torch.equal(ids(), expected)
    step = records[-1]
    assert step.rewrites["pack_query_groups"] == layers, step.remarks
    assert step.rewrites["fuse_attention"] == (layers if written == "eager" else 0)
