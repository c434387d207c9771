"""Before torch is loaded: OpenMP's waiting threads sleep, so that tests are not slowed by whatever else runs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from sne_fast.ops.backend import Backend

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Bodies of tests that two files share: a failure shows both sides of what it compared, as in a test's own file.
pytest.register_assert_rewrite("helpers")


def pytest_addoption(parser: pytest.Parser) -> None:
    # Here, as pytest knows options of the folders named on its command line and of those above only.
    parser.addoption("--all-variants", action="store_true", help="compile every variant, also for sm_120")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrise by ``@pytest.mark.variants(names, few, every)``: ``every`` with --all-variants, else ``few``."""
    for marker in metafunc.definition.iter_markers("variants"):
        names, few, every = marker.args
        if metafunc.config.getoption("--all-variants"):
            few = every() if callable(every) else every
        metafunc.parametrize(names, few, ids=str)


@pytest.fixture(params=["triton", "cuda"])
def gpu_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each backend for a GPU in turn, skipped, visibly, where it does not run."""
    import torch

    import sne_fast
    from sne_fast.ops.schema import REQUIRED_OPS

    said = (r for r in sne_fast.explain(torch.device("cuda")) if r.backend == request.param and r.op in REQUIRED_OPS)
    reports = [r for r in said if r.reasons]
    if reports:
        pytest.skip(f"{request.param}: {reports[0].reasons[0]}")
    with sne_fast.use_backend(request.param):
        yield request.param


@pytest.fixture
def poisoned_outputs() -> Iterator[None]:
    """Whatever a kernel leaves unwritten is NaN: torch fills new memory so in its deterministic mode."""
    import torch

    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[[Backend], None]:
    """Put a made-up backend beside those of the package, for one test."""
    from sne_fast.ops import dispatch, found_backends

    def put(backend: Backend) -> None:
        monkeypatch.setitem(found_backends.BACKENDS, backend.name, backend)

    monkeypatch.delenv(dispatch.ENVIRONMENT_VARIABLE, raising=False)
    return put
