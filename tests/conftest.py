"""Before torch is loaded: OpenMP's waiting threads sleep, so that tests are not slowed by whatever else runs."""

import os
from collections.abc import Iterator

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Bodies of tests that two files share: a failure shows both sides of what it compared, as in a test's own file.
pytest.register_assert_rewrite("chunk_checks", "gather_checks", "segment_pool_checks", "set_attention_checks")


def pytest_addoption(parser: pytest.Parser) -> None:
    # Here, as pytest knows options of the folders named on its command line and of those above only.
    parser.addoption("--all-variants", action="store_true", help="tests/aot: compile every variant, also for sm_120")


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
