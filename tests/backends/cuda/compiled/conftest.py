"""Tests that compile csrc/cuda with nvcc for GPUs that are not there: warnings, registers, spills, instructions."""

from pathlib import Path

import cuda_build
import pytest

from helpers import cuda_compiled


def pytest_collection_finish(session: pytest.Session) -> None:
    """What the chosen tests will ask for is compiled side by side from the start."""
    here = [item for item in session.items if item.path.parent == Path(__file__).parent and hasattr(item, "callspec")]
    if here and cuda_build.find_nvcc() and not session.config.option.collectonly:
        cuda_compiled.all_variants = bool(session.config.getoption("--all-variants"))
        cuda_compiled.start({item.callspec.params["file"] for item in here if "file" in item.callspec.params})
