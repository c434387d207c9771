"""Before torch is loaded: OpenMP's waiting threads sleep, so that tests are not slowed by whatever else runs."""

import os

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def pytest_addoption(parser: pytest.Parser) -> None:
    # Here, as pytest knows options of the folders named on its command line and of those above only.
    parser.addoption("--all-variants", action="store_true", help="tests/aot: compile every variant, also for sm_120")
