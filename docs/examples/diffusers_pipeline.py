"""diffusers: the parts of a pipeline, compiled in place under a budget of bytes.

``python docs/examples/diffusers_pipeline.py``.
"""

from typing import Any

import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from torch import Tensor

import memopt


def pipeline(options: dict[str, Any] | None = None) -> DDIMPipeline:
    """A pipeline with random weights, the same at every call.

    Args:
        options: memopt's, for the denoiser; None to leave it as it is.
    """
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=32,
        block_out_channels=(32, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        add_attention=False,
    ).eval()
    if options is not None:
        memopt.optimize(unet, **options)
    made = DDIMPipeline(unet, DDIMScheduler())
    made.set_progress_bar_config(disable=True)
    return made


def sample(made: DDIMPipeline, images: int = 4, steps: int = 3) -> Tensor:
    """Images `(B, 32, 32, 3)` in [0, 1], the same noise at every call."""
    noise = torch.Generator().manual_seed(1)
    result = made(images, generator=noise, num_inference_steps=steps, output_type="np")
    return torch.from_numpy(result.images)


if __name__ == "__main__":
    plain, bounded = (sample(pipeline(o)) for o in (None, {"memory_budget": "5MiB"}))
    print("largest difference:", float((plain - bounded).abs().max()))
