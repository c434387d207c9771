"""Tests that compile csrc/cuda with nvcc for GPUs that are not there: warnings, registers, spills, instructions."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "csrc"), str(Path(__file__).parent)]  # cuda_build, cuda_compiled


def pytest_collection_finish(session: pytest.Session) -> None:
    """What the chosen tests will ask for is compiled side by side from the start."""
    import cuda_build
    import cuda_compiled

    here = [item for item in session.items if item.path.parent == Path(__file__).parent and hasattr(item, "callspec")]
    if here and cuda_build.find_nvcc() and not session.config.option.collectonly:
        cuda_compiled.all_variants = bool(session.config.getoption("--all-variants"))
        cuda_compiled.start({item.callspec.params["file"] for item in here if "file" in item.callspec.params})
