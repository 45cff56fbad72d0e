"""Runs passes in order, and does for every pass what no pass does for itself."""

import hashlib
import logging
import operator
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, TypeVar, get_args, get_type_hints

from torch import fx

from memopt._torch import OpOverload, copy_graph, trace_structured
from memopt.config import Config
from memopt.errors import ConfigError, PipelineError, PlanError, shown
from memopt.graph import is_mutating, tensors
from memopt.remarks import Remark, RemarkKind

log = logging.getLogger(__name__)

Compiled = Callable[..., Any]
_IN_PLACE = {operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.setitem}
_TRACED = {"val", "example_value"}  # what AOTAutograd keeps, and what Dynamo keeps


@dataclass(frozen=True)
class PassContext:
    """What a pass may read besides the graph, and where it speaks.

    Attributes:
        config: the user's options.
        remarks: what has been said so far, by passes and planner.
        rewrites: number of rewrites so far, by pass name.
        wrappers: what is to be done to the compiled callable, in order.
    """

    config: Config
    remarks: list[Remark] = field(default_factory=list)
    rewrites: dict[str, int] = field(default_factory=dict)
    wrappers: list[Callable[[Compiled], Compiled]] = field(default_factory=list)

    def remark(
        self, pass_name: str, kind: RemarkKind, text: str, node: str = "", source: str = ""
    ) -> None:
        """Say something about a node, or about the graph."""
        self.remarks.append(
            Remark(pass_name=pass_name, kind=kind, text=text, node=node, source=source)
        )


class Pass(Protocol):
    """A named rewrite of one graph.

    A pass edits ``graph`` in place and returns how many rewrites it made; 0 promises that the
    graph is untouched. Its options are the fields of a frozen dataclass, so ``repr(pass)`` is
    its identity: in logs, in dumps and in the compile cache.
    """

    name: ClassVar[str]
    requires: ClassVar[frozenset[str]]
    establishes: ClassVar[frozenset[str]]

    def __call__(self, graph: fx.Graph, ctx: PassContext) -> int: ...


@dataclass(frozen=True)
class Pipeline:
    """An ordered, checked list of passes over one kind of graph.

    Raises:
        PipelineError: a pass requires what no earlier pass establishes, or two share a name.
    """

    stage: str
    passes: Sequence[Pass]

    def __post_init__(self) -> None:
        established: frozenset[str] = frozenset()
        names: set[str] = set()
        for pass_ in self.passes:
            if missing := pass_.requires - established:
                raise PipelineError(
                    f"pass {pass_.name!r} of stage {self.stage!r} requires {sorted(missing)}, "
                    f"which no earlier pass establishes: move it behind one that does"
                )
            if pass_.name in names:
                raise PipelineError(f"stage {self.stage!r} has two passes named {pass_.name!r}")
            names.add(pass_.name)
            established |= pass_.establishes

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> None:
        """Run every enabled pass; check, recompile, time and dump after each that rewrote.

        A pass that raises, or leaves a broken graph, is undone with a remark and a warning; with
        ``strict`` it raises.

        Raises:
            PlanError: a plan that the options name is not for this model.
        """
        before: fx.Graph | None = None  # a copy; good for as long as nothing is rewritten
        for pass_ in self.passes:
            if not ctx.config.enabled(pass_.name):
                ctx.remark(pass_.name, RemarkKind.ANALYSIS, "switched off by options['passes']")
                continue
            configured = configure(pass_, ctx.config)
            before = before or copy_graph(gm.graph)
            said, wrapped = len(ctx.remarks), len(ctx.wrappers)
            start = time.perf_counter()
            try:
                rewrites = configured(gm.graph, ctx)
                if rewrites:
                    self._settle(gm, before)
            except PlanError:
                raise  # what was asked for by name is for another model
            except Exception as error:
                if ctx.config.strict:
                    raise
                gm.graph, before = before, None
                del ctx.remarks[said:], ctx.wrappers[wrapped:]
                self._report_undone(pass_, error, ctx)
                continue
            if rewrites:
                before = None
            ctx.rewrites[pass_.name] = ctx.rewrites.get(pass_.name, 0) + rewrites
            self._dump(pass_, gm, rewrites, time.perf_counter() - start)

    def uuid(self, config: Config) -> str:
        """Identity for the compile cache: the enabled passes and their options, in order."""
        enabled = [repr(configure(p, config)) for p in self.passes if config.enabled(p.name)]
        return hashlib.sha256(repr((self.stage, enabled)).encode()).hexdigest()

    def _settle(self, gm: fx.GraphModule, before: fx.Graph) -> None:
        """Tidy and check a graph that was rewritten; ``before`` is how it was."""
        known = {node.name: bool(node.users) for node in before.nodes}
        _remove_dead_code(gm.graph, known)
        gm.graph.lint()
        missing = [
            n.name
            for n in gm.graph.nodes
            if n.op.startswith("call") and n.name not in known and not _TRACED & n.meta.keys()
        ]
        if missing:
            raise PipelineError(f"nodes without a traced value: {missing[:5]}")
        gm.recompile()

    def _report_undone(self, pass_: Pass, error: Exception, ctx: PassContext) -> None:
        text = f"undone: it raised {type(error).__name__}: {error}"
        ctx.remark(pass_.name, RemarkKind.MISSED, text)
        log.debug("pass %s failed", pass_.name, exc_info=error)
        warnings.warn(
            f"memopt pass {pass_.name!r} was {text}. The graph is as before it. "
            f"options={{'passes': {{{pass_.name!r}: False}}}} switches it off; 'strict' raises",
            stacklevel=2,
        )

    def _dump(self, pass_: Pass, gm: fx.GraphModule, rewrites: int, seconds: float) -> None:
        log.debug("%s.%s: %d rewrites, %.1f ms", self.stage, pass_.name, rewrites, 1e3 * seconds)
        if rewrites:
            trace_structured(
                "artifact",
                metadata_fn=lambda: {
                    "name": f"memopt_{self.stage}_after_{pass_.name}",
                    "encoding": "string",
                },
                payload_fn=lambda: gm.print_readable(print_output=False),
            )


class Named(Protocol):
    """What options configure by name: a dataclass."""

    name: ClassVar[str]


Configured = TypeVar("Configured", bound=Named)


def configure(pass_: Configured, config: Config) -> Configured:
    """The pass with the user's options as its fields.

    Raises:
        ConfigError: the pass does not take such a value.
    """
    options = config.pass_options(pass_.name)
    if not options:
        return pass_
    kinds = get_type_hints(type(pass_))
    for name, value in options.items():
        allowed = get_args(kinds[name]) or (kinds[name],)
        if Any not in allowed and not any(_is_a(value, kind) for kind in allowed):
            words = " or ".join(_KINDS[kind] for kind in allowed)
            raise ConfigError(
                f"option {name!r} of pass {pass_.name!r} = {shown(value)}: allowed is {words}"
            )
    return type(pass_)(**{**vars(pass_), **dict(options)})


_KINDS = {
    bool: "True or False",
    int: "a whole number from 0 on",
    float: "a number from 0 on",
    str: "a string",
    type(None): "None",
}


def _is_a(value: object, kind: Any) -> bool:
    """Whether an option that a pass declares as ``kind`` may have a value; none is negative."""
    if kind not in (int, float):
        return isinstance(value, kind)
    whole = isinstance(value, int) and not isinstance(value, bool)
    return (whole or (kind is float and isinstance(value, float))) and value >= 0  # type: ignore[operator]


def _remove_dead_code(graph: fx.Graph, known: Mapping[str, bool]) -> None:
    """Erase what a pass left without readers; what had none before is there for what it does.

    Not ``Graph.eliminate_dead_code``: that descends into the bodies of higher-order operators
    with a rule of its own, which drops the in-place methods of a Dynamo graph.

    Args:
        graph: the rewritten graph.
        known: the nodes that were there, by name, and whether anything read them.
    """
    for node in reversed(list(graph.nodes)):
        orphaned = not node.users and known.get(node.name, True)
        if orphaned and node.op not in ("placeholder", "output") and not _is_impure(node):
            graph.erase_node(node)


def _is_impure(node: fx.Node) -> bool:
    """Whether dead-code elimination must keep a node.

    On a Dynamo graph that is every in-place method, and every function that makes no tensor: it
    writes into one, or enters or leaves a mode or a level of ``vmap``.
    """
    if node.op == "call_method":
        method = str(node.target)
        return method.endswith("_") and not method.endswith("__")
    name = getattr(node.target, "__name__", "")
    in_place = name.endswith("_") or getattr(operator, name, None) in _IN_PLACE
    if in_place or is_mutating(node) or node.kwargs.get("inplace") or "out" in node.kwargs:
        return True
    if node.op == "call_function" and not isinstance(node.target, OpOverload):
        made = [value for kind in _TRACED for value in tensors(node.meta.get(kind))]
        return node.is_impure() or not made
    return node.is_impure()
