"""The choice between chunks and tiles, with a timer that says what it is told."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import memopt
from memopt.kernels import choice
from memopt.kernels.blocks import default_chunk_rows
from memopt.kernels.choice import Size, fastest_chunk_rows
from memopt.passes import row_operators

GPU = torch.device("cuda", 0)
SIZE = Size(16_384, 4096, 128_256, torch.bfloat16, GPU)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A compile cache of the test's own, on a machine with a GPU."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    return tmp_path / "memopt"


class Timer:
    """Takes so many seconds without logits in memory and so many by chunks."""

    def __init__(self, cut: float, chunked: float) -> None:
        self.cut, self.chunked = cut, chunked
        self.asked: list[tuple[Size, int]] = []

    def __call__(self, size: Size, chunk_rows: int) -> float:
        self.asked.append((size, chunk_rows))
        return self.chunked if chunk_rows else self.cut


@pytest.mark.parametrize(("cut", "chunked"), [(1.0, 2.0), (2.0, 1.0), (1.0, 1.0)])
def test_what_is_faster_is_taken_and_chunks_where_neither_is(
    cache: Path, cut: float, chunked: float
) -> None:
    usual = default_chunk_rows(SIZE.rows, SIZE.classes, GPU)
    assert fastest_chunk_rows(SIZE, Timer(cut, chunked)) == (0 if cut < chunked else usual)


def test_each_size_is_timed_once_on_each_product(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timer = Timer(1.0, 2.0)
    for _ in range(2):
        assert fastest_chunk_rows(SIZE, timer) == 0
    assert len(timer.asked) == 2
    sizes = [
        Size(16_384, 4096, 128_256, torch.float32, GPU),
        Size(8192, 4096, 128_256, torch.bfloat16, GPU),
        Size(16_384, 2048, 128_256, torch.bfloat16, GPU),
        Size(16_384, 4096, 32_000, torch.bfloat16, GPU),
    ]
    for count, size in enumerate(sizes, 2):
        fastest_chunk_rows(size, timer)
        assert len(timer.asked) == 2 * count
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    fastest_chunk_rows(SIZE, timer)
    assert len(timer.asked) == 2 * len(sizes) + 4


@pytest.mark.parametrize("content", [b"", b"junk", b"[]", b"{}", b"[1.0, 2.0]"])
def test_a_broken_file_is_no_answer(cache: Path, content: bytes) -> None:
    fastest_chunk_rows(SIZE, Timer(1.0, 2.0))
    (file,) = cache.iterdir()
    file.write_bytes(content)
    assert fastest_chunk_rows(SIZE, Timer(2.0, 1.0)) > 0
    assert fastest_chunk_rows(SIZE, Timer(1.0, 2.0)) > 0  # and was written again


def test_a_disabled_cache_keeps_nothing(cache: Path) -> None:
    with torch._inductor.config.patch(force_disable_caches=True):
        fastest_chunk_rows(SIZE, Timer(1.0, 2.0))
    assert not cache.exists()


def test_without_memory_to_find_out_there_are_chunks_and_nothing_is_kept(cache: Path) -> None:
    def timer(size: Size, chunk_rows: int) -> float:
        raise torch.OutOfMemoryError("CUDA out of memory")

    assert fastest_chunk_rows(SIZE, timer) > 0
    assert not cache.exists()


def remark_of(loss: Callable[[Tensor, Tensor], Tensor], **options: object) -> str:
    """What the pass says that it did to a head and this loss."""
    weight = torch.randn(300, 16, requires_grad=True)

    def step(x: Tensor, y: Tensor) -> Tensor:
        return loss(F.linear(x, weight), y)

    x, y = torch.randn(64, 16), torch.randint(300, (64,))
    passes = {"chunk_losses": dict(options)} if options else {}
    report = memopt.explain(step, x, y, options={"lowering": "eager", "passes": passes})
    (graph,) = report.graphs
    return next(r.text for r in graph.remarks if r.pass_name == "chunk_losses")


@pytest.fixture
def slow_chunks(monkeypatch: pytest.MonkeyPatch) -> list[Size]:
    """A machine where tiles are faster; the sizes that it was asked about."""
    asked: list[Size] = []

    def fastest(size: Size) -> int:
        asked.append(size)
        return 24  # as rows, so that what was chosen runs on the CPU too

    monkeypatch.setattr(row_operators, "has_row_kernel", lambda loss, x: True)
    monkeypatch.setattr(row_operators, "fastest_chunk_rows", fastest)
    return asked


def test_the_pass_asks_where_the_operator_can_do_without_logits(slow_chunks: list[Size]) -> None:
    assert "chunks of 24 rows" in remark_of(F.cross_entropy)
    assert slow_chunks == [Size(64, 16, 300, torch.float32, torch.device("cpu"))]


def test_the_pass_does_not_ask_about_distributions_nor_where_rows_are_given(
    slow_chunks: list[Size],
) -> None:
    assert "chunks of 7 rows" in remark_of(F.cross_entropy, chunk_rows=7)
    soft = remark_of(lambda z, y: F.cross_entropy(z, F.one_hot(y, 300).float()))
    assert f"chunks of {default_chunk_rows(64, 300, torch.device('cpu'))} rows" in soft
    assert slow_chunks == []


@pytest.mark.gpu
def test_timing_leaves_the_generator_alone_and_gives_seconds(cache: Path) -> None:
    before = torch.cuda.get_rng_state()
    size = Size(4096, 1024, 32_000, torch.bfloat16, GPU)
    assert 0 < choice.seconds(size, 0) < 10
    assert 0 < choice.seconds(size, 1024) < 10
    assert torch.equal(torch.cuda.get_rng_state(), before)
