"""Which module of a model a node of a Dynamo graph comes from."""

import re

from torch import fx

# Levels that wrappers put between a module and its name.
_WRAPPERS = frozenset(
    {"_modules", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}
)
_PART = re.compile(r"\w+")
_ROOT = re.compile(r"(\w+\['\w+'\](\[\d+\])?)?")  # a variable or an argument


def module_paths(node: fx.Node) -> list[tuple[str, ...]]:
    """The names that the innermost module around a node may have in a model, the longest first.

    They are the ends of the path by which Dynamo saw it; where it is the root, one has no parts.
    """
    stack = node.meta.get("nn_module_stack") or {}
    name = list(stack.values())[-1][0] if stack else ""
    path = path_of(name)
    ends = [path[start:] for start in range(len(path))]
    return [*ends, ()] if _ROOT.fullmatch(name) else ends


def path_of(name: str) -> tuple[str, ...]:
    """The parts of a module's name, as ``named_modules`` or Dynamo write it."""
    return tuple(part for part in _PART.findall(name) if part not in _WRAPPERS)
