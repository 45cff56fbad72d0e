"""Benchmarks: one table of cases, every peer in the same run, exact bytes.

Run ``python -m bench list`` to see the cases and ``python -m bench run`` to measure them.
"""

import os

# Read when torch is imported. The profiler behind `Meter` announces each start and stop on stderr,
# and the allocator warns of releases that `Meter` leaves out on purpose.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

# Read when a peer's process starts. By default glibc gives freed pages back to the system, and how
# many depends on the largest tensor freed so far; getting them anew took up to 3 % of a step.
os.environ.setdefault(
    "GLIBC_TUNABLES", "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=1099511627776"
)
