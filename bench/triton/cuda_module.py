"""One training step of a small model as memopt compiles it for CUDA, checked against float64.

``python -m bench.triton.cuda_module norm_head`` does so without a GPU: see `bench.triton.on_cpu`.
With ``--device cuda`` the step runs on one. The last line of the output is a report in JSON.
"""

import argparse
import json

from bench.triton import fake_cuda

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=("norm_head", "llama"))
    parser.add_argument("--dtype", default="bfloat16", help="default: %(default)s")
    parser.add_argument("--budget", help="memory_budget of memopt; default: none")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    arguments = parser.parse_args()
    if arguments.device == "cpu":
        fake_cuda.preload()
    from bench.triton.cuda_step import report  # here, because it imports torch

    model, dtype, budget = arguments.model, arguments.dtype, arguments.budget
    print(json.dumps(report(model, dtype, budget, arguments.device)))
