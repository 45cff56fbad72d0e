"""How many of the norms, gates and rotary embeddings of a model the passes put into operators.

What there is to find is counted without the passes: one step in eager, in which every module that
is a norm or a gated layer, and every call of a function that turns heads, counts once. What the
passes say of the same step's graphs is set against it.
"""

import contextlib
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor, fx, nn
from torch._dynamo.eval_frame import skip_code

from bench.zoo.families import Family
from bench.zoo.model import Inputs
from memopt.backend import read_options
from memopt.passes import PRE_GRAD
from memopt.pipeline import PassContext, Pipeline
from memopt.remarks import RemarkKind

OPERATORS = ("norm", "gate", "rotary")
_PASSES = {"fuse_norms": "norm", "fuse_gates": "gate", "fuse_rotary": "rotary"}
# Group and batch norms reduce over other dimensions than the last: they are other operators.
_NORM = re.compile(r"(RMS|Layer|L2|Scale)?Norm(?!al)")
_OTHER_NORM = re.compile(r"Batch|Group|Instance|Weight|Cumulative|Local")
_ROTARY = re.compile(r"^_?(apply_\w*(rotary|rope)\w*)$")
_IN_EAGER = "called outside of any graph, in code that Dynamo does not trace"
_GATED = (("gate_proj", "up_proj"), ("wi_0", "wi_1"), ("w1", "w3"), ("gate_up_proj",))


@dataclass
class Coverage:
    """One operator in one family.

    Attributes:
        instances: how often eager code runs it.
        matched: how many of these the pass replaced.
        declined: for how many of the others it gave which reason.
    """

    instances: int = 0
    matched: int = 0
    declined: Counter[str] = field(default_factory=Counter)

    @property
    def told(self) -> int:
        """Instances that were replaced, or have a reason."""
        return min(self.instances, self.matched + self.declined.total())

    def to_dict(self) -> dict[str, Any]:
        """For a results file."""
        return {**vars(self), "declined": dict(self.declined)}


def measure(family: Family) -> dict[str, Coverage]:
    """Every operator of a family, as one forward in training mode runs it.

    Raises:
        Exception: what building or running the model raises.
    """
    module, inputs = family.make()
    counted = count(module, inputs)
    found = {name: Coverage(counted[name]) for name in OPERATORS}
    left = Counter[str]()
    with _counted(module, left):
        said = _said(module, inputs)
    for operator, number in left.items():
        found[operator].declined[_IN_EAGER] += number
    for operator, kind, reason in said:
        own = found[operator]
        if kind is RemarkKind.APPLIED:
            own.matched += 1
        else:
            own.declined[reason] += 1
    return found


def row(family: Family) -> dict[str, Any]:
    """One row of a results file: the operators, and ``"ok"`` or why there are none."""
    # It warns about the defaults of its own configurations.
    transformers.logging.set_verbosity_error()
    own: dict[str, Any] = {"kind": "coverage", "family": family.name, "status": "ok"}
    try:
        return own | {name: found.to_dict() for name, found in measure(family).items()}
    except Exception as error:  # a missing package, a download, a bug of the library
        return own | {"status": f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"}


def count(module: nn.Module, inputs: Inputs) -> Counter[str]:
    """How often one forward in eager runs each operator.

    A norm is a module whose class is called one and that has no module inside; a gate a module
    with the two layers of one, or both in one; a rotary embedding a tensor that a function of
    that name returns.
    """
    seen = Counter[str]()
    with _counted(module, seen):
        module(**inputs)
    return seen


@contextlib.contextmanager
def _counted(module: nn.Module, seen: Counter[str]) -> Iterator[None]:
    """Count what runs in eager, and nothing that runs in a graph."""

    def hook_of(operator: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            if not torch.compiler.is_compiling():
                seen[operator] += 1

        skip_code(hook.__code__)  # as a frame of its own it would be compiled, and say that it is
        return hook

    tests = {"norm": is_norm, "gate": is_gate}
    hooks = [
        part.register_forward_hook(hook_of(operator))
        for part in module.modules()
        for operator, is_one in tests.items()
        if is_one(part)
    ]
    try:
        with _counted_calls(module, seen):
            yield
    finally:
        for hook in hooks:
            hook.remove()


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a layer norm or an RMS norm, by its name."""
    name = type(module).__name__
    return bool(_NORM.search(name)) and not _OTHER_NORM.search(name) and not [*module.children()]


def is_gate(module: nn.Module) -> bool:
    """Whether a module has the layers of a gated activation."""
    return any(all(hasattr(module, name) for name in names) for names in _GATED)


@contextlib.contextmanager
def _counted_calls(module: nn.Module, seen: Counter[str]) -> Iterator[None]:
    """Count the tensors that functions called after rotary embeddings return."""
    files = {sys.modules[type(part).__module__] for part in module.modules()}
    known = [
        (file, name, function)
        for file in files
        for name, function in vars(file).items()
        if _ROTARY.match(name) and callable(function)
    ]
    depth = 0

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal depth
            if torch.compiler.is_compiling():
                return function(*args, **kwargs)
            depth += 1
            result = function(*args, **kwargs)
            depth -= 1
            if not depth:  # such a function may call another
                seen["rotary"] += 1 if isinstance(result, Tensor) else len(result)
            return result

        skip_code(call.__code__)
        return call

    for file, name, function in known:
        setattr(file, name, counted(function))
    try:
        yield
    finally:
        for file, name, function in known:
            setattr(file, name, function)


Said = tuple[str, RemarkKind, str]


def _said(module: nn.Module, inputs: Inputs) -> list[Said]:
    """What the passes say of the graphs that one forward runs, as often as it runs them."""
    classes = {
        "norm": {type(part) for part in module.modules() if is_norm(part)},
        "gate": {type(part) for part in module.modules() if is_gate(part)},
    }
    passes: dict[str, object] = {name: {"cpu": True} for name in _PASSES}
    config = read_options({"strict": True, "passes": passes})
    said: list[Said] = []

    def backend(gm: fx.GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
        stacks = {node.name: _classes(node) for node in gm.graph.nodes}
        ctx = PassContext(config)
        Pipeline("pre_grad", [p for p in PRE_GRAD if p.name in _PASSES]).run(gm, ctx)
        own: list[Said] = []
        for remark in ctx.remarks:
            operator = _PASSES[remark.pass_name]
            if operator == "rotary" or classes[operator] & stacks[remark.node]:
                own.append((operator, remark.kind, _without_numbers(remark.text)))

        def run(*args: Any) -> Any:
            said.extend(own)
            return gm.forward(*args)

        return run

    torch._dynamo.reset()
    torch.compile(module, backend=backend)(**inputs)
    return said


def _classes(node: fx.Node) -> set[type]:
    """The classes of the modules whose code a node comes from."""
    return {kind for _, kind in node.meta.get("nn_module_stack", {}).values()}


def _without_numbers(text: str) -> str:
    """A remark whose nodes have no numbers, so that equal reasons are counted together."""
    return re.sub(r"\b([a-z]\w*?)_\d+\b", r"\1", text)
