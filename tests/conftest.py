"""What tests share: one Inductor cache per session, one seed, nothing compiled left over."""

import os
import sys
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile(
    "repeatable",
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
settings.register_profile("explore", settings.get_profile("repeatable"), derandomize=False)
settings.load_profile("repeatable")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """A test marked ``gpu`` is skipped where there is none."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a GPU")


@pytest.fixture(scope="session", autouse=True)
def inductor_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Every process of this session compiles a kernel once; no earlier session is trusted."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(shared / "inductor"))
        yield


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """A fixed seed and thread count, and a compiler that has seen nothing yet."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    _forget()
    yield
    _forget()


def _forget() -> None:
    if "torch._dynamo" in sys.modules:  # importing it takes seconds, and many tests need it not
        torch._dynamo.reset()
