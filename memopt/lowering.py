"""Two ways to run the planned halves: compiled by Inductor, or interpreted as they are."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, cast

import torch
from torch import fx
from torch.export import ExportedProgram

from memopt._torch import (
    CustomGraphPass,
    CustomPartitionerFn,
    aot_autograd,
    aoti_compile_and_package,
    capture_output_code,
    compile_fx,
    functorch_config,
    get_decompositions,
    inductor_config,
    inductor_handlers,
    select_decomp_table,
)
from memopt.config import unknown
from memopt.emit import shape_of
from memopt.errors import ConfigError, shown
from memopt.fusion import NearbyFusion
from memopt.graph import aten
from memopt.pipeline import Compiled
from memopt.splitting import Splitter

# Reusing a dead buffer for a later one of the same size keeps it allocated in between: across the
# layers of a backward that holds a layer's largest buffers while nothing needs them.
_HOLD_NOTHING_BACK = {"allow_buffer_reuse": False}
# Copies of weights and images in the layout that convolutions prefer live through the whole step.
# On the CPU they buy time for few models, and cost some where channels are convolved each for
# itself, with scratch of many times the weight; on a GPU they are left for the certificate to
# count. Where nothing is trained, maps in that layout are the only ones.
_COPY_NOTHING = {"layout_optimization": False}

_CONVOLUTIONS = {torch.conv1d, torch.conv2d, torch.conv3d}
_ARGUMENTS = "input", "weight", "bias", "stride", "padding", "dilation", "groups"

Caches = Literal["all", "graphs", "none"]


class Partitioner(CustomPartitionerFn):
    """The splitter as Inductor's partitioner hook.

    Torch pickles it into the key of its caches: its identity is ``key`` alone.
    """

    def __init__(self, key: str, split: Splitter | None = None) -> None:
        self.key = key
        self.split = split

    def __call__(
        self, gm: fx.GraphModule, joint_inputs: Sequence[object], **kwargs: Any
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        assert self.split is not None
        return self.split(gm, joint_inputs, **kwargs)

    def __getstate__(self) -> dict[str, str]:
        return {"key": self.key}

    def __setstate__(self, state: dict[str, str]) -> None:
        self.key, self.split = state["key"], None

    def uuid(self) -> str:
        """Identity in the compile caches."""
        return self.key


class ForwardCutter(CustomGraphPass):
    """The splitter as Inductor's hook on graphs that have no backward; its identity is ``key``."""

    def __init__(self, key: str, split: Splitter) -> None:
        self.key = key
        self.split = split

    def __call__(self, graph: fx.Graph) -> None:
        if not self.split.outcomes:  # no half of a step
            self.split.cut_forward(graph)

    def __getstate__(self) -> dict[str, str]:
        return {"key": self.key}

    def uuid(self) -> str:
        """Identity in the compile caches."""
        return self.key


def lower_with_inductor(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    split: Splitter,
    *,
    key: str,
    patches: Mapping[str, Any],
    sink: Callable[[str], None] | None,
    caches: Caches = "all",
) -> Compiled:
    """Compile with Inductor, both halves at once when ``sink`` wants to see their code.

    Args:
        gm: the Dynamo graph.
        inputs: its example inputs.
        split: plans and partitions the joint graph.
        key: identity of everything ``split`` depends on.
        patches: Inductor configuration.
        sink: receives the source of each emitted module, in the order forward, backward.
        caches: which of torch's may answer: all, so that a step is not planned again; those of
            Inductor's graphs, so that graphs without a backward are not; or none.
    """
    with contextlib.ExitStack() as stack:
        bounded = split.config.memory_budget.kind != "none"
        if not _on_gpu(inputs) and _trains(inputs) and (bounded or _is_depthwise(gm)):
            patches = {**_COPY_NOTHING, **patches}
        if bounded:
            stack.enter_context(inductor_handlers.set_choices_handler(NearbyFusion()))
            patches = {**_HOLD_NOTHING_BACK, **patches}
        if sink is not None:
            stack.enter_context(functorch_config.patch(force_non_lazy_backward_lowering=True))
            stack.enter_context(capture_output_code(sink))
        if caches != "all":
            stack.enter_context(functorch_config.patch(enable_autograd_cache=False))
        if caches == "none":
            patches = {**patches, "fx_graph_cache": False}
        hooks: dict[str, Any] = {"custom_partitioner_fn": Partitioner(key, split)}
        if split.cuts_forwards and inductor_config.post_grad_custom_pre_pass is None:
            hooks["post_grad_custom_pre_pass"] = ForwardCutter(key, split)
        compiled: Any = compile_fx(gm, inputs, config_patches={**patches, **hooks})
    return cast(Compiled, compiled)


def package_with_inductor(
    program: ExportedProgram,
    split: Splitter,
    *,
    key: str,
    patches: Mapping[str, Any],
    path: str | None,
) -> str:
    """Compile an exported program into a package, and cut it where ``split`` says so.

    Args:
        program: the program.
        split: plans the graph and cuts it.
        key: identity of everything ``split`` depends on.
        patches: Inductor configuration.
        path: of the package, ending in ``.pt2``; None for one beside Inductor's caches.
    """
    with contextlib.ExitStack() as stack:
        if split.config.memory_budget.kind != "none":
            stack.enter_context(inductor_handlers.set_choices_handler(NearbyFusion()))
            patches = {**_HOLD_NOTHING_BACK, **patches}
        if split.cuts_forwards:
            # Not among the patches, of which torch makes copies: the copy would not plan.
            hook = ForwardCutter(key, split)
            stack.enter_context(inductor_config.patch(post_grad_custom_pre_pass=hook))
        stack.enter_context(torch.no_grad())
        written = aoti_compile_and_package(
            program, package_path=path, inductor_configs=dict(patches)
        )
    return str(written)


def _is_depthwise(gm: fx.GraphModule) -> bool:
    """Whether a convolution of a Dynamo graph has filters of one channel each, out of several."""
    for node in gm.graph.nodes:
        if node.target in _CONVOLUTIONS:
            given = dict(zip(_ARGUMENTS, node.args, strict=False)) | dict(node.kwargs)
            groups = given.get("groups", 1)  # a node, where it is the size of a changing batch
            if groups != 1 and shape_of(given["weight"])[1] == 1:
                return True
    return False


def check_patches(patches: Mapping[str, object]) -> None:
    """Check patches to Inductor's configuration as ``torch.compile`` checks its own options.

    Raises:
        ConfigError: Inductor has no such setting, or the value is of another type.
    """
    settings: Any = inductor_config
    known = settings.get_config_copy()
    for name, value in patches.items():
        if name not in known:
            raise unknown("option of Inductor", name, known)
        kind = settings.get_type(name)
        if isinstance(kind, type) and not isinstance(value, kind):
            raise ConfigError(
                f"option 'inductor' sets {name!r} to {shown(value)}: allowed is a "
                f"{kind.__name__}, such as {shown(known[name])}"
            )


def _on_gpu(inputs: Sequence[Any]) -> bool:
    return any(isinstance(x, torch.Tensor) and x.device.type != "cpu" for x in inputs)


def _trains(inputs: Sequence[Any]) -> bool:
    return torch.is_grad_enabled() and any(
        isinstance(x, torch.Tensor) and x.requires_grad for x in inputs
    )


def lower_eagerly(gm: fx.GraphModule, inputs: Sequence[Any], split: Splitter) -> Compiled:
    """Interpret both halves node by node, each value freed after its last use.

    Eager's kernels are kept, but for ``mse_loss``, whose scalar result on the CPU keeps a buffer
    of the inputs' size alive, ``softplus_backward``, whose strides are not the traced ones, and
    zeros that take no memory, for which what reads them takes more.
    """

    def cut_and_interpret(gm: fx.GraphModule, inputs: Sequence[Any]) -> Compiled:
        if split.cuts_forwards:
            split.cut_forward(gm.graph)
            gm.recompile()
        return _interpret(gm, inputs)

    compiler = aot_autograd(
        fw_compiler=_interpret,
        bw_compiler=_interpret,
        inference_compiler=cut_and_interpret,
        partition_fn=split,
        decompositions={
            **get_decompositions([aten.mse_loss, aten.softplus_backward]),
            aten._efficientzerotensor.default: aten.zeros.default,
        },
    )
    compiled: Compiled = compiler(gm, inputs)
    return compiled


def interpret_planned(gm: fx.GraphModule, inputs: Sequence[Any], split: Splitter) -> Compiled:
    """Plan what Inductor would be given, and interpret it: on fake tensors that costs nothing."""
    compiler = aot_autograd(
        fw_compiler=_interpret,
        bw_compiler=_interpret,
        partition_fn=split,
        decompositions=select_decomp_table(),
    )
    compiled: Compiled = compiler(gm, inputs)
    return compiled


class _Interpreter(fx.Interpreter):
    """Holds no value that nothing reads, and leaves the tracer's notes alone.

    torch's own keeps unread values to the end, and writes each node's notes to
    a variable of the process, from which another thread may be tracing.
    """

    @contextlib.contextmanager
    def _set_current_node(self, node: fx.Node) -> Iterator[None]:
        yield

    def run_node(self, n: fx.Node) -> Any:
        """The value of a node, or None where nothing reads it."""
        value = super().run_node(n)
        return value if n.users or n.op == "output" else None


def _interpret(gm: fx.GraphModule, inputs: Sequence[Any]) -> Compiled:
    placeholders = gm.graph.find_nodes(op="placeholder")
    unused = [i for i, node in enumerate(placeholders) if not node.users]

    def run(args: list[Any]) -> Any:
        for i in unused:
            args[i] = None  # the interpreter would hold it to the end
        return _Interpreter(gm).boxed_run(args)

    run._boxed_call = True  # type: ignore[attr-defined]
    return run
