"""``memopt.bisect``: which pass makes the difference."""

from collections.abc import Callable, Mapping
from typing import Any

from memopt.backend import PASSES, read_options
from memopt.errors import ConfigError
from memopt.passes.clone_mutated_inputs import CloneMutatedInputs


def bisect(
    is_right: Callable[[dict[str, Any]], bool], options: Mapping[str, object] | None = None
) -> str | None:
    """Find a pass whose switching off makes a step right.

    Passes are switched off by name from the last one on, by halves: about six tries. The pass
    that is found makes the difference where those before it run and those behind it do not.

    Args:
        is_right: compiles with the options that it is given, runs, and says whether all is well:
            numbers, a peak, or that nothing is raised.
        options: with which all is not well, as for ``torch.compile(backend="memopt")``.

    Returns:
        The name of the pass; None where all is not well without any of them: then it is the
        planner, the partition or the lowering.

    Raises:
        ConfigError: an option is unknown, or all is well with these options.
    """
    config = read_options(options)
    given = dict(options or {})
    own: dict[str, Any] = {**config.passes.to_dict()}
    default = {p.name: getattr(p, "default", True) for p in PASSES}
    del default[CloneMutatedInputs.name]  # without which a backward may read what has changed
    names = [name for name, on in default.items() if config.enabled(name, default=on)]

    def is_right_with(first: int) -> bool:
        off = dict.fromkeys(names[first:], False)
        return is_right({**given, "passes": {**own, **off}})

    if is_right_with(len(names)):
        raise ConfigError("is_right says so with every pass on: there is nothing to look for")
    if not is_right_with(0):
        return None
    good, bad = 0, len(names)
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if is_right_with(middle) else (good, middle)
    return names[bad - 1]
