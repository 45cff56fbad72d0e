from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.meter import Meter
from bench.zoo import MODELS, LossOnly, checkpoint_blocks, loss_of, step
from bench.zoo.decoders import LatentDecoder, decode_by_tiles
from bench.zoo.decoding import StaticCacheAttention, static_cache

TINY = [name for name, model in MODELS.items() if "tiny" in model.sizes]


@pytest.mark.parametrize("name", TINY)
def test_a_step_gives_a_finite_loss_and_every_gradient(name: str) -> None:
    module, inputs = MODELS[name].make()
    assert step(module, inputs).isfinite()
    without = {key for key, p in module.named_parameters() if p.grad is None}
    assert without == {key for key, p in module.named_parameters() if not p.requires_grad}


@pytest.mark.parametrize("name", TINY)
def test_equal_seeds_give_equal_losses(name: str) -> None:
    def loss() -> torch.Tensor:
        module, inputs = MODELS[name].make(seed=3)
        torch.manual_seed(0)
        return step(module, inputs)

    assert loss() == loss()


@pytest.mark.parametrize("name", [n for n in TINY if "float32_only" not in MODELS[n].tags])
def test_float64_starts_from_the_same_model(name: str) -> None:
    losses = []
    for dtype in (torch.float32, torch.float64):
        torch.manual_seed(0)
        module, inputs = MODELS[name].make(dtype=dtype)
        module.eval()
        with torch.no_grad():
            losses.append(loss_of(module(**inputs)).double())
    torch.testing.assert_close(*losses, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", [n for n in TINY if "checkpoint" in MODELS[n].tags])
def test_checkpoints_change_no_gradient(name: str) -> None:
    gradients = []
    ways: tuple[dict[str, bool] | None, ...] = None, {}, {"selective": True}
    for options in ways:
        module, inputs = MODELS[name].make()
        if options is not None:
            checkpoint_blocks(module, **options)
        torch.manual_seed(0)
        step(module, inputs)
        gradients.append([p.grad for p in module.parameters()])
    expected, *actual = gradients
    for own in actual:
        torch.testing.assert_close(own, expected)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_selective_checkpoints_hold_more_than_others_and_less_than_none(compiled: bool) -> None:
    peaks = []
    ways: tuple[dict[str, bool] | None, ...] = None, {"selective": True}, {}
    for options in ways:
        module, inputs = MODELS["llama"].make()
        if options is not None:
            checkpoint_blocks(module, **options)
        model: Any = torch.compile(module, backend="aot_eager") if compiled else module
        for _ in range(2):
            module.zero_grad()
            with Meter("cpu") as meter:
                step(model, inputs)
        peaks.append(meter.peak_bytes)
    assert peaks == sorted(peaks, reverse=True)
    assert len(set(peaks)) == 3


def test_a_model_without_blocks_says_so() -> None:
    module, _ = MODELS["in_place"].make()
    with pytest.raises(ValueError, match="InPlace has no blocks"):
        checkpoint_blocks(module)


def test_loss_only_returns_the_loss() -> None:
    module, inputs = MODELS["llama"].make()
    assert LossOnly(module)(**inputs) == module(**inputs).loss


def test_table_a_and_b_have_the_parameters_of_their_tables() -> None:
    mib = {
        name: sum(p.numel() * 4 for p in MODELS[name].sizes["bench"].build().parameters()) / 2**20
        for name in ("llama_a", "llama_b")
    }
    assert round(mib["llama_a"]) == 173
    assert round(mib["llama_b"]) == 28


@pytest.mark.parametrize("height", [3, 16, 24, 29, 40])
def test_tiles_of_what_needs_no_neighbours_are_the_whole(height: int) -> None:
    latents = torch.randn(2, 3, height, 21)

    def enlarged(x: Tensor) -> Tensor:
        return x.repeat_interleave(2, 2).repeat_interleave(2, 3)

    tiled = decode_by_tiles(enlarged, latents, 16)
    torch.testing.assert_close(tiled, enlarged(latents))


def test_a_decoder_by_tiles_gives_other_numbers() -> None:
    decoder, inputs = MODELS["vae_decoder"].make()
    assert isinstance(decoder, LatentDecoder)
    with torch.no_grad():
        whole = decoder(**inputs)[1]
        decoder.tile = 4
        tiled = decoder(**inputs)[1]
    assert tiled.shape == whole.shape
    assert not torch.allclose(tiled, whole)


def test_a_static_cache_is_read_as_far_as_it_is_filled() -> None:
    recipe = static_cache(4, 2, length=20, width=8)
    module, inputs = recipe.build(), recipe.inputs(1)
    assert isinstance(module, StaticCacheAttention)
    _, mixed = module(**inputs)
    position = int(inputs["position"])
    assert torch.equal(module.keys[:, :, position : position + 1], inputs["key"])
    keys, values = (x[:, :, : position + 1] for x in (module.keys, module.values))
    expected = F.scaled_dot_product_attention(inputs["query"], keys, values, enable_gqa=True)
    torch.testing.assert_close(mixed, expected)
