"""Tests that compile kernels for GPUs that are not there: registers, spills, shared memory, matrix instructions.

``pytest tests/backends/triton/compiled`` compiles a representative set, with ``--all-variants`` all, sm_120 too.
"""

import importlib.util
import os

import pytest

# Under the interpreter's switch a kernel is no compilable function.
COMPILING = os.environ.get("TRITON_INTERPRET") != "1" and importlib.util.find_spec("triton") is not None
collect_ignore_glob = [] if COMPILING else ["test_*.py"]


@pytest.fixture(scope="session")
def all_variants(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--all-variants"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--all-variants"):
        return
    for item in items:
        if item.get_closest_marker("all_variants"):
            item.add_marker(pytest.mark.skip(reason="one of many variants: --all-variants compiles them"))
