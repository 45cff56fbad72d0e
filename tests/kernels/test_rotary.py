"""Rotary embeddings against what models write, in every layout, form and direction."""

from collections.abc import Callable
from dataclasses import dataclass


import pytest
import torch
from torch import Tensor

from memopt.kernels.rotary import ROTARY
from tests.kernels.rotary_cases import (
    Pair,
    by_halves,
    by_neighbours,
    heads,
    tables,
    with_gradients,
)
from tests.references import (
    LOW_PRECISION,
    assert_equal_in_float64,
    assert_within_reference_error,
)

import bench  # noqa: F401 - before transformers, which would take our folder of kernels for its own

pytest.importorskip("transformers")

from transformers.models.cohere import modeling_cohere
from transformers.models.glm import modeling_glm
from transformers.models.gpt_neox import modeling_gpt_neox
from transformers.models.llama import modeling_llama
from transformers.models.qwen2_vl import configuration_qwen2_vl, modeling_qwen2_vl



@dataclass(frozen=True)
class Spelling:
    """How a model writes it.

    Attributes:
        model: of Hugging Face.
        function: of queries, keys and whole tables.
        interleaved: as the operator takes it.
        whole: makes the model's tables from one entry for each pair.
        read: makes the operator's whole tables from the same.
        rotated: which share of a head.
    """

    model: str
    function: Callable[..., Pair]
    interleaved: bool
    whole: Callable[[Tensor], Tensor]
    read: Callable[[Tensor], Tensor]
    rotated: float = 1.0


SPELLINGS = [
    Spelling("llama", modeling_llama.apply_rotary_pos_emb, False, by_halves, by_halves),
    Spelling("neox", modeling_gpt_neox.apply_rotary_pos_emb, False, by_halves, by_halves, 0.25),
    Spelling(
        "cohere", modeling_cohere.apply_rotary_pos_emb, True, by_neighbours, by_neighbours
    ),
    Spelling("glm", modeling_glm.apply_rotary_pos_emb, True, by_halves, by_neighbours, 0.5),
]
every_spelling = pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda s: s.model)


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Functions of models that go through float32 go through float64."""
    monkeypatch.setattr(Tensor, "float", Tensor.double)



@every_spelling
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("form", ["whole", "half", "view"])
@pytest.mark.usefixtures("wide")
def test_it_is_what_models_write(spelling: Spelling, batch: int, form: str) -> None:
    q, k = heads(size=16), heads(count=2, size=16)
    width = int(16 * spelling.rotated)
    pairs = tables(batch, width=width // 2)
    forms: dict[str, Callable[[Tensor], Tensor]] = {
        "whole": spelling.read,
        "half": lambda t: t,
        "view": lambda t: by_halves(t)[..., : width // 2],
    }
    mine = [forms[form](t) for t in pairs]
    theirs = [spelling.whole(t) for t in pairs]
    options = width, spelling.interleaved, False
    actual = with_gradients(lambda q, k: ROTARY(q, k, *mine, *options), q, k)
    expected = with_gradients(lambda q, k: spelling.function(q, k, *theirs), q, k)
    assert_equal_in_float64(actual, expected)


@every_spelling
@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
@pytest.mark.parametrize("table_dtype", LOW_PRECISION, ids=str)
def test_it_is_as_near_to_float64_as_what_models_write(
    spelling: Spelling, dtype: torch.dtype, table_dtype: torch.dtype
) -> None:
    q, k = heads(positions=32, size=64, dtype=dtype), heads(1, 2, 32, 64, dtype)[[0, 0]]
    width = int(64 * spelling.rotated)
    pairs = tables(positions=32, width=width // 2, dtype=table_dtype)

    def mine(q: Tensor, k: Tensor, pairs: Pair = pairs) -> Pair:
        result: Pair = ROTARY(q, k, *pairs, width, spelling.interleaved, False)
        return result

    def theirs(q: Tensor, k: Tensor) -> Pair:
        results = spelling.function(q, k, *(spelling.whole(t).to(dtype) for t in pairs))
        return results[0].to(dtype), results[1].to(dtype)

    doubles = pairs[0].double(), pairs[1].double()
    exact = with_gradients(lambda q, k: mine(q, k, doubles), q.double(), k.double())
    assert_within_reference_error(
        with_gradients(mine, q, k), exact, with_gradients(theirs, q, k)
    )


@pytest.mark.parametrize(
    ("interleaved", "function"),
    [
        (False, modeling_llama.apply_rotary_pos_emb),
        (True, modeling_cohere.apply_rotary_pos_emb),
    ],
)
@pytest.mark.usefixtures("wide")
def test_a_whole_table_needs_not_hold_each_angle_twice(
    interleaved: bool, function: Callable[..., Pair]
) -> None:
    q, k, mine = heads(), heads(), tables(width=8)
    actual = with_gradients(lambda q, k: ROTARY(q, k, *mine, 8, interleaved, False), q, k)

    expected = with_gradients(lambda q, k: function(q, k, *mine), q, k)
    assert_equal_in_float64(actual, expected)


def test_sections_of_three_dimensions_are_tables_that_differ_within_a_batch() -> None:
    config = configuration_qwen2_vl.Qwen2VLTextConfig(
        hidden_size=64,
        num_attention_heads=4,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0, "mrope_section": [2, 3, 3]},
    )
    places = torch.randint(0, 50, (3, 2, 7))  # time, row and column of each token
    cos, sin = modeling_qwen2_vl.Qwen2VLRotaryEmbedding(config)(torch.zeros(1), places)
    assert not torch.equal(cos[0], cos[1])
    q, k = heads(2, 4, 7, 16), heads(2, 2, 7, 16)
    actual = ROTARY(q, k, cos, sin, 16, False, False)
    expected = modeling_qwen2_vl.apply_rotary_pos_emb(q, k, cos, sin)
    assert_equal_in_float64(actual, expected)


@pytest.mark.usefixtures("wide")
def test_rows_and_columns_of_a_picture_are_one_axis_of_positions() -> None:
    rows, columns, size = 3, 4, 16
    places = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
    frequencies = 100.0 ** -(torch.arange(size // 4) / (size // 4))
    angles = by_halves((places[:, :, None] * frequencies).flatten(1))
    cos, sin = angles.cos().double(), angles.sin().double()
    q, k = (torch.randn(rows * columns, 2, size).double() for _ in range(2))  # (S, H, D): no batch
    expected = modeling_qwen2_vl.apply_rotary_pos_emb_vision(q, k, cos, sin)
    by_head = (t.transpose(0, 1)[None] for t in (q, k))
    actual = ROTARY(*by_head, cos[None], sin[None], size, False, False)
    assert_equal_in_float64([t[0].transpose(0, 1) for t in actual], expected)
