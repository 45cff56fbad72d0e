"""Every error memopt raises on purpose; each message says what was seen and what to do."""

from typing import Any


def shown(value: object) -> str:
    """A value as an error shows it: its ``repr``, as far as it has one that can be read."""
    try:
        text = repr(value)
    except Exception as error:  # of the user's own class, or a number of thousands of digits
        return f"<a {type(value).__name__}, whose repr raises {type(error).__name__}>"
    return text if len(text) <= 1000 else f"{text[:1000]}..."


class MemoptError(Exception):
    """Base class: catch this to catch anything memopt raises on purpose."""


class ConfigError(MemoptError, ValueError):
    """An option is unknown, of the wrong type, or out of range."""


class BudgetInfeasibleError(MemoptError, ValueError):
    """No plan keeps the step under the budget.

    Attributes:
        budget_bytes: what was asked for.
        floor_bytes: the lowest peak that any plan found reaches, with what earlier graphs of the
            step hold at this budget.
        advised: a ``memory_budget`` under which this graph fits, whatever earlier ones hold then:
            bytes, or where a fraction was asked for, a larger one, or ``"min"`` if none is enough.
    """

    def __init__(
        self, message: str, *, budget_bytes: int, floor_bytes: int, advised: int | float | str
    ) -> None:
        super().__init__(message)
        self.budget_bytes = budget_bytes
        self.floor_bytes = floor_bytes
        self.advised = advised


class PipelineError(MemoptError, ValueError):
    """The order of passes breaks a declared contract."""


class PlanError(MemoptError, ValueError):
    """A plan file is malformed, or belongs to another graph."""


class LossGuardError(PlanError):
    """A plan of spans raises the loss of held-out data by more than its guard allows.

    Attributes:
        plan: the plan that was refused, to look at.
    """

    def __init__(self, message: str, *, plan: Any) -> None:
        super().__init__(message)
        self.plan = plan


class PartitionError(MemoptError, RuntimeError):
    """A partition does not type-check against its joint graph: a bug in memopt."""


class HostMemoryError(MemoptError, RuntimeError):
    """The host has no memory for the copies that a plan keeps there."""


class StaleLogitsError(MemoptError, RuntimeError):
    """Logits that were not kept were asked for after what they are computed from had changed."""


class UnsupportedVersionError(MemoptError, ImportError):
    """The installed torch or Triton is outside the range that memopt supports."""


class MissingExtraError(MemoptError, ImportError):
    """An optional dependency is not installed; the message names the extra that brings it."""


class DoubleBackwardError(MemoptError, RuntimeError):
    """The derivative of a gradient was asked of an operator that has none."""
