"""Benchmarks: one table of cases, every peer in the same run, exact bytes.

Run ``python -m bench list`` to see the cases and ``python -m bench run`` to measure them.
"""

import os
import sys

# Started from the checkout, the folder `kernels` lies on the import path, and transformers takes
# it for the Hugging Face package of that name. None here is Python's way to say "not installed".
sys.modules.setdefault("kernels", None)  # type: ignore[arg-type]

# The profiler behind `Meter` announces each start and stop on stderr; read when torch is imported.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")
