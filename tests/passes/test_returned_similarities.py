"""Models that return the similarities of their contrastive loss."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.meter import Meter
from memopt.errors import StaleLogitsError
from memopt.lazy.logits import LazyLogits
from tests.passes.compiling import converted, options, run_compiled
from tests.passes.pairs import PAIRS, SIZE, Inputs, both
from tests.references import assert_draws_within_reference_error


def clip(i: Inputs) -> tuple[Tensor, ...]:
    x, y = F.normalize(i.x, dim=-1), F.normalize(i.y, dim=-1)
    z = torch.matmul(y, x.t()) * i.scale.exp()
    return both(z), z.t(), z, x, y


def two_pairs(i: Inputs) -> tuple[Tensor, ...]:
    first, second = i.x @ i.y.T, (2.0 * i.x).tanh() @ i.y.sin().T / 0.5
    return both(first) + both(second), second, first


def unscaled(i: Inputs) -> tuple[Tensor, ...]:
    """What is returned is not yet scaled."""
    z = i.x @ i.y.T
    return both(z * i.scale), z.float()


FORMS: dict[str, Callable[[Inputs], tuple[Tensor, ...]]] = {
    "clip": clip,
    "two pairs": two_pairs,
    "unscaled": unscaled,
}


def gradients(value: Tensor, inputs: Inputs) -> list[Tensor]:
    return list(torch.autograd.grad(value, inputs.trained, materialize_grads=True))


@pytest.mark.parametrize("form", FORMS)
def test_returned_similarities_are_lazy_with_eagers_values_and_gradients(form: str) -> None:
    inputs = Inputs()
    loss, *plain = FORMS[form](inputs)
    expected = gradients(loss + sum(z.square().mean() for z in plain), inputs)
    (mine, *results), (record,) = run_compiled(FORMS[form], inputs)
    assert len(results) == len(plain)
    names = [str(r.text) for r in record.remarks]
    assert any("in both directions by chunks" in text for text in names), names
    for a, e in zip(results, plain, strict=True):
        assert isinstance(a, LazyLogits) == (e.shape == (PAIRS, PAIRS))
        assert (a.shape, a.dtype, a.requires_grad) == (e.shape, e.dtype, True)
    torch.testing.assert_close(mine, loss)
    actual = gradients(mine + sum(z.square().mean() for z in results), inputs)
    for a, e in zip((*results, *actual), (*plain, *expected), strict=True):
        torch.testing.assert_close(a + 0, e)


@pytest.mark.parametrize("mode", ["none", "keep", "full"])
def test_they_can_be_dropped_kept_or_left_whole(mode: str) -> None:
    inputs = Inputs()
    loss, *plain = clip(inputs)
    expected = gradients(loss, inputs)
    (mine, *results), _ = run_compiled(clip, inputs, logits=mode)
    for a, e in zip(gradients(mine, inputs), expected, strict=True):
        torch.testing.assert_close(a, e)
    for a, e in zip(results[:2], plain[:2], strict=True):
        assert type(a) is (type(None) if mode == "none" else Tensor)
        if a is not None:
            torch.testing.assert_close(a, e)
            assert a.requires_grad == (mode == "full")


def test_embeddings_changed_in_place_make_them_stale() -> None:
    (loss, per_x, *_), _ = run_compiled(clip, Inputs())
    loss.backward()
    assert per_x[:3].argmax(-1).shape == (3,)
    held = per_x._rows.head.weight
    with torch.no_grad():
        held.zero_()
    with pytest.raises(StaleLogitsError):
        per_x.argmax(-1)


def test_similarities_without_gradient_are_returned_without() -> None:
    def function(i: Inputs) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return clip(i)

    inputs = Inputs()
    (loss, per_x, *_), _ = run_compiled(function, inputs)
    assert isinstance(per_x, LazyLogits)
    assert not loss.requires_grad
    assert not per_x.requires_grad
    torch.testing.assert_close(per_x + 0, clip(inputs)[1].detach())


def test_the_matrix_is_never_whole_unless_it_is_read() -> None:
    count = 2048
    x, y = (torch.randn(count, 16, requires_grad=True) for _ in range(2))

    def function(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        z = x @ y.T
        return both(z), z

    compiled = torch.compile(function, backend="memopt", options=options())
    torch.autograd.backward(compiled(x, y)[0])
    with Meter("cpu") as meter:
        loss, z = compiled(x, y)
        torch.autograd.backward(loss)
        assert z.argmax(-1).shape == (count,)
    plain = 4 * count * count
    assert meter.peak_bytes < 2.5 * plain
    with Meter("cpu") as meter:
        loss, z = compiled(x, y)
        torch.autograd.backward(loss)
    assert meter.peak_bytes < plain


@pytest.mark.filterwarnings("ignore:the logits were computed whole")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_low_precision_is_as_near_to_float64_as_eager_is(dtype: torch.dtype) -> None:
    def results(function: Any, inputs: Inputs) -> list[Tensor]:
        loss, per_x, per_y, *_ = function(inputs)
        total = per_x.float().square().mean() + per_y.float().tanh().mean() + loss
        return [(per_x + 0).detach(), (per_y + 0).detach(), *gradients(total, inputs)]

    def draw() -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        inputs = Inputs(dtype)
        wide = converted(inputs, torch.float64)
        return results(mine, inputs), results(clip, wide), results(clip, inputs)

    mine = torch.compile(clip, backend="memopt", options=options())
    assert_draws_within_reference_error(draw, 10)


def test_a_sigmoid_loss_of_every_pair_is_left_alone_with_a_remark() -> None:
    def siglip(i: Inputs) -> tuple[Tensor, ...]:
        z = i.x @ i.y.t() * i.scale.exp() - 1.0
        signs = -torch.ones_like(z) + 2 * torch.eye(PAIRS, dtype=z.dtype)
        return -F.logsigmoid(signs * z).sum(-1).mean(), z

    inputs = Inputs()
    (loss, z), (record,) = run_compiled(siglip, inputs)
    torch.testing.assert_close((loss, z), siglip(inputs))
    assert record.rewrites["chunk_losses"] == 0
    assert any("a sigmoid loss of every pair" in r.text and r.source for r in record.remarks)


def models() -> tuple[nn.Module, dict[str, Tensor]]:
    from transformers import CLIPConfig, CLIPModel

    own: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    text = {**own, "vocab_size": 60, "max_position_embeddings": 8, "eos_token_id": 59}
    image = {**own, "image_size": 8, "patch_size": 4}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=image, projection_dim=SIZE))
    tokens = torch.randint(0, 58, (PAIRS, 6))
    tokens[:, -1] = 59
    return model, {"input_ids": tokens, "pixel_values": torch.randn(PAIRS, 3, 8, 8)}


def test_clip_of_transformers_returns_lazy_similarities_in_both_directions() -> None:
    model, inputs = models()
    expected = model(**inputs, return_loss=True)
    expected.loss.backward()
    wanted = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    compiled = torch.compile(model, backend="memopt", options=options())
    actual = compiled(**inputs, return_loss=True)
    assert isinstance(actual.logits_per_image, LazyLogits)
    assert isinstance(actual.logits_per_text, LazyLogits)
    actual.loss.backward()
    torch.testing.assert_close(actual.loss, expected.loss)
    for name, parameter in model.named_parameters():
        if name in wanted:
            torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-4, atol=1e-6)
    for name in ("logits_per_image", "logits_per_text", "text_embeds", "image_embeds"):
        torch.testing.assert_close(actual[name] + 0, expected[name])
