"""Options of the whole suite, how it is shared out to processes, and fixtures that several folders use.

``pytest`` on a folder is run by one process for each processor, ``-n 0`` by this one, as a chosen file always is.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from helpers.web_servers import Hub, WebServer
    from sne_fast.ops.backend import Backend

# Before torch is loaded: OpenMP's waiting threads sleep, so that tests are not slowed by whatever else runs, and the
# processes share the processors.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
PROCESSORS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, PROCESSORS // int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))))
# A shell's job in the background ignores SIGINT, and so do its children; tests send it.
if threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)
# A failure in a helper shows both sides of what it compared, as in a test's own file.
pytest.register_assert_rewrite("helpers")

# Suites of random inputs are short by default; SNE_FAST_FUZZ=10000 tries that many for each test that names no number.
# There are no deadlines, since the processors are shared, and function-scoped fixtures are folders, which each example
# writes anew.
settings.register_profile(
    "sne_fast",
    max_examples=int(os.environ.get("SNE_FAST_FUZZ", "25")),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    print_blob=True,
)
settings.load_profile("sne_fast")


# ----------------------------------------------------------------------------------------------- processes and variants


def pytest_addoption(parser: pytest.Parser) -> None:
    # Here, as pytest knows options of the folders named on its command line and of those above only.
    parser.addoption("--all-variants", action="store_true", help="compile every variant, also for sm_120")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Share whole folders out to processes, file by file, unless ``-n`` says how; tests of a GPU share one process."""
    option = config.option
    if "PYTEST_XDIST_WORKER" in os.environ:
        return  # a worker of a session that is shared out already
    if not hasattr(option, "numprocesses") or option.numprocesses is not None or option.usepdb or option.collectonly:
        return
    on_gpu = option.markexpr == "gpu"
    if PROCESSORS > 1 and not on_gpu and all(Path(path).is_dir() for path in config.args):
        option.numprocesses, option.dist, option.loadscopereorder = min(PROCESSORS, 8), "loadfile", False


@pytest.hookimpl(tryfirst=True)  # before -m looks at the markers
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests of random inputs; run files that compile first, then slow ones, so that no process ends alone."""
    for item in items:
        if getattr(getattr(item, "function", None), "is_hypothesis_test", False):
            item.add_marker("fuzz")
    if "PYTEST_XDIST_WORKER" in os.environ:
        slow = {item.path for item in items if item.get_closest_marker("slow")}
        items.sort(key=lambda item: (item.get_closest_marker("build") is None, item.path not in slow))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrise by ``@pytest.mark.variants(names, few, every)``: ``every`` with --all-variants, else ``few``."""
    for marker in metafunc.definition.iter_markers("variants"):
        names, few, every = marker.args
        if metafunc.config.getoption("--all-variants"):
            few = every() if callable(every) else every
        metafunc.parametrize(names, few, ids=str)


# ------------------------------------------------------------------------------------------------------------- fixtures


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
    """Fill memory that a kernel leaves unwritten with NaN, as torch does in its deterministic mode."""
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


@pytest.fixture
def fresh_stores(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Forget what is known of stores elsewhere; attempts follow each other without waits."""
    from sne_fast.data.remote import failures
    from sne_fast.data.remote.paths import forget
    from sne_fast.data.remote.ranges import RANGES

    pytest.importorskip("aiohttp")
    monkeypatch.setattr(failures, "WAITS", (0.0, 0.0, 0.0))
    forget()
    RANGES.forget()
    yield
    forget()


@pytest.fixture
def web(fresh_stores: None) -> Iterator[WebServer]:
    """Run a web server on this machine."""
    from helpers.web_servers import WebServer

    server = WebServer()
    yield server
    server.close()


@pytest.fixture
def hub(fresh_stores: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Run a Hub on this machine."""
    from helpers.web_servers import Hub

    pytest.importorskip("huggingface_hub")
    server = Hub()
    template = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    yield server
    server.close()


@pytest.fixture
def memory(fresh_stores: None) -> Iterator[Any]:
    """Yield the store of fsspec in memory, empty; the whole process has one, which docs and other tests fill too."""
    fs = pytest.importorskip("fsspec").filesystem("memory")
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]
    yield fs
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]
