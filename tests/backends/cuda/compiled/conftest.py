"""Tests that compile csrc/cuda with nvcc for GPUs that are not there: warnings, registers, spills, instructions."""

from pathlib import Path

import cuda_build
import pytest

from helpers import cuda_compiled


@pytest.fixture(scope="session", autouse=True)
def compiled_side_by_side(request: pytest.FixtureRequest) -> None:
    """Begin to compile what the chosen tests will ask for, several files at a time."""
    cuda_compiled.all_variants = bool(request.config.getoption("--all-variants"))
    items = request.session.items
    here = [item for item in items if item.path.parent == Path(__file__).parent and hasattr(item, "callspec")]
    if cuda_build.find_nvcc():
        cuda_compiled.start({item.callspec.params["file"] for item in here if "file" in item.callspec.params})
