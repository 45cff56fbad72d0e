"""The peak that is read off emitted code, against hand computation and the allocator."""

import textwrap
from collections.abc import Callable

import pytest
import torch
from torch import nn

from bench.meter import Meter
from memopt.config import Config
from memopt.lowering import lower_with_inductor
from memopt.memory.certify import Certificate, certify
from memopt.pipeline import PassContext
from memopt.splitting import Splitter

SLACK_BYTES = 64 * 2**10
HEADER = """
    import torch
    from torch._inductor.async_compile import AsyncCompile
    async_compile = AsyncCompile()
    empty_strided_cpu = torch._C._dynamo.guards._empty_strided_cpu
    extern_kernels = torch._inductor.select_algorithm.extern_kernels

    kernel = async_compile.cpp_pybinding(["float*"], "this is never compiled")
    async_compile.wait(globals())
    del async_compile
"""


def emitted(call: str, arguments: dict[str, int]) -> str:
    """A module as Inductor emits it; ``arguments`` gives the floats in each."""
    unpack = f"{', '.join(arguments)}, = args"
    made = "\n".join(f"    {n} = torch.empty({size})" for n, size in arguments.items())
    return (
        textwrap.dedent(HEADER)
        + f"def call(args):\n    {unpack}\n    args.clear()\n"
        + textwrap.indent(textwrap.dedent(call), "    ")
        + f"\ndef get_args():\n{made}\n    return [{', '.join(arguments)}]\n"
    )


FORWARD = emitted(
    """
    buf0 = empty_strided_cpu((100, ), (1, ), torch.float32)
    kernel(primals_1, buf0)
    buf1 = empty_strided_cpu((300, ), (1, ), torch.float32)
    kernel(buf0, buf1)
    buf2 = buf0; del buf0  # reuse
    kernel(buf1, buf2)
    buf3 = empty_strided_cpu((50, ), (1, ), torch.float32)
    kernel(buf2, buf3)
    del buf1
    return (buf3, primals_1, buf2)
    """,
    {"primals_1": 1000},
)
BACKWARD = emitted(
    """
    buf4 = empty_strided_cpu((500, ), (1, ), torch.float32)
    kernel(buf2, tangents_1, buf4)
    del buf2
    del tangents_1
    buf5 = empty_strided_cpu((1000, ), (1, ), torch.float32)
    kernel(buf4, primals_1, buf5)
    del buf4
    return (buf5, )
    """,
    {"primals_1": 1000, "buf2": 100, "tangents_1": 50},
)


def proven(*codes: str, granularity: int = 1) -> Certificate:
    certificate = certify(codes, granularity=granularity)
    assert isinstance(certificate, Certificate), certificate
    return certificate


def test_the_peak_of_a_forward_is_what_a_hand_count_gives() -> None:
    # buf0 and buf1, then buf3 on top of buf2 (which is buf0's memory): 100 + 300 + 50 floats.
    assert proven(FORWARD).peak_bytes == 4 * 450


def test_the_peak_of_a_step_is_what_a_hand_count_gives() -> None:
    # The caller holds buf3; at the last kernel buf4 and the gradient buf5 are alive.
    certificate = proven(FORWARD, BACKWARD)
    assert certificate.peak_bytes == 4 * (50 + 500 + 1000)
    assert certificate.saved_bytes == 4 * 100


def test_the_backward_gets_what_is_no_tensor_where_it_takes_it() -> None:
    """Sizes are before the tensors, and the meshes of distributed tensors behind them."""
    forward = FORWARD.replace("(buf3, primals_1, buf2)", "(buf3, 7, None, primals_1, buf2)")
    backward = BACKWARD.replace(
        "primals_1, buf2, tangents_1", "s0, primals_1, buf2, mesh, tangents_1, tangents_2"
    )
    backward = backward.replace(
        "    buf4 =",
        "    assert (s0, mesh) == (7, None) and primals_1.numel() == 1000\n    buf4 =",
    )
    made = "def get_args():\n    s0, mesh, tangents_2 = 7, None, None"
    backward = backward.replace("def get_args():", made)
    assert proven(forward, backward) == proven(FORWARD, BACKWARD)


def test_a_buffer_that_is_not_deleted_counts_to_the_end() -> None:
    kept = BACKWARD.replace("    del buf2\n", "")
    assert kept != BACKWARD
    assert proven(FORWARD, kept).peak_bytes == 4 * (50 + 100 + 500 + 1000)


def test_the_allocators_granularity_rounds_every_storage_up() -> None:
    assert proven(FORWARD, granularity=512).peak_bytes == 512 * (1 + 3 + 1)


def test_the_timeline_of_a_certificate_has_its_peak() -> None:
    certificate = proven(FORWARD, BACKWARD)
    timeline = certificate.timeline
    assert timeline.peak_bytes == certificate.peak_bytes
    assert [s.name for s in timeline.steps] == ["kernel"] * 6
    assert [s.backward for s in timeline.steps] == [False] * 4 + [True] * 2
    assert {r.name for r in timeline.holders(5)} == {"buf3", "buf4", "buf5"}


@pytest.mark.parametrize("codes", [(), (FORWARD, BACKWARD, BACKWARD)])
def test_another_number_of_modules_is_answered_with_a_reason(codes: tuple[str, ...]) -> None:
    assert certify(codes) == f"{len(codes)} emitted modules where 1 or 2 are expected"


def test_code_that_reads_a_value_is_answered_with_a_reason() -> None:
    reads = FORWARD.replace("    del buf1\n", "    if primals_1[0].item() > 0: del buf1\n")
    reason = certify([reads])
    assert isinstance(reason, str)
    assert "cannot be replayed" in reason


class Attention(nn.Module):
    """One causal self-attention layer."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(64, 192), nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (h.unflatten(-1, (4, 16)).transpose(1, 2) for h in self.qkv(x).chunk(3, -1))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        loss: torch.Tensor = self.out(mixed.transpose(1, 2).flatten(2)).square().mean()
        return loss


class Perceptron(nn.Module):
    """Two layers and a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = self.layers(x).square().mean()
        return loss


@pytest.mark.parametrize("make", [Perceptron, Attention])
def test_the_certificate_is_what_the_allocator_says_from_a_cold_and_a_warm_cache(
    make: Callable[[], nn.Module],
) -> None:
    model, x = make(), torch.randn(2, 256, 64)

    def compile_and_step() -> tuple[Certificate, Callable[[], None]]:
        codes: list[str] = []

        def backend(gm: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., object]:
            config = Config()
            split = Splitter(config, PassContext(config))
            return lower_with_inductor(
                gm, inputs, split, key="certify", patches={}, sink=codes.append
            )

        torch._dynamo.reset()
        compiled = torch.compile(model, backend=backend)

        def step() -> None:
            loss = compiled(x)
            loss.backward()

        step()
        return proven(*codes), step

    cold, step = compile_and_step()
    model.zero_grad()
    with Meter() as meter:
        step()
    assert abs(cold.peak_bytes - meter.peak_bytes) <= SLACK_BYTES
    assert meter.peak_bytes > 4 * SLACK_BYTES
    warm, _ = compile_and_step()
    assert (warm.peak_bytes, warm.saved_bytes) == (cold.peak_bytes, cold.saved_bytes)
    assert warm.timeline == cold.timeline
