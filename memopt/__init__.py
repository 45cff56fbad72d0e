"""memopt: keep a training or inference step under a memory budget, with ``torch.compile``.

Importing this package does not import torch: each public name loads its module on first use. Where
torch or Triton are of another version than is supported, importing it warns, and first use raises
``UnsupportedVersionError``.
"""

import importlib
import warnings
from typing import TYPE_CHECKING

from memopt import _versions
from memopt._versions import __version__
from memopt.errors import (
    BudgetInfeasibleError,
    ConfigError,
    HostMemoryError,
    MemoptError,
    PartitionError,
    PipelineError,
    PlanError,
    UnsupportedVersionError,
)

try:
    _versions.check()
except UnsupportedVersionError as error:
    warnings.warn(str(error), stacklevel=2)

_LAZY = {
    "Config": "memopt.config",
    "Report": "memopt.report",
    "advise": "memopt.planning",
    "bisect": "memopt.bisecting",
    "explain": "memopt.explaining",
    "optimize": "memopt.api",
    "package": "memopt.packaging",
    "plan_for": "memopt.planning",
}

if TYPE_CHECKING:
    from memopt.api import optimize
    from memopt.bisecting import bisect
    from memopt.config import Config
    from memopt.explaining import explain
    from memopt.packaging import package
    from memopt.planning import advise, plan_for
    from memopt.report import Report
else:  # hidden from type checkers, for which it would make every name exist

    def __getattr__(name: str) -> object:
        if name not in _LAZY:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        _versions.check()
        return getattr(importlib.import_module(_LAZY[name]), name)


__all__ = [
    "BudgetInfeasibleError",
    "Config",
    "ConfigError",
    "HostMemoryError",
    "MemoptError",
    "PartitionError",
    "PipelineError",
    "PlanError",
    "Report",
    "UnsupportedVersionError",
    "__version__",
    "advise",
    "bisect",
    "explain",
    "optimize",
    "package",
    "plan_for",
]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
