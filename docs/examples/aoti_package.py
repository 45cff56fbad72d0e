"""torch.export and AOTInductor: a package for inference, under a budget of bytes.

``python docs/examples/aoti_package.py``.
"""

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import memopt


def network() -> tuple[nn.Module, Tensor]:
    """A feed-forward layer, eight times as wide inside, and an input `(B, S, H)`."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 512), nn.GELU(), nn.Linear(512, 64))
    return model.eval(), torch.randn(4, 512, 64)


def packaged(path: Path, **options: Any) -> Any:
    """The network as a package at a path, loaded: it runs without memopt, and without Python."""
    model, x = network()
    program = torch.export.export(model, (x,))
    return torch._inductor.aoti_load_package(memopt.package(program, path, **options))


if __name__ == "__main__":
    model, x = network()
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        run = packaged(Path(folder) / "network.pt2", memory_budget="3MiB")
        print("largest difference:", float((run(x) - model(x)).abs().max()))
