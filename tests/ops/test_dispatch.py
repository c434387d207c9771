"""Choice of the backend: explicit choices never fall back, reasons are joined, a new backend is one file."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import sne_fast
from helpers.choices import slow_but_every
from helpers.paths import ELSEWHERE
from helpers.toy_backend import backend, pooled
from sne_fast import functional
from sne_fast.ops import dispatch, found_backends
from sne_fast.ops.schema import FORWARD_OPS


def test_auto_takes_the_highest_priority_and_falls_back(install) -> None:
    install(backend())
    assert pooled() == 7
    install(backend(priority=-1))
    assert pooled() != 7
    install(backend(why_not=lambda op, args: ["not this width"]))
    assert pooled() != 7
    install(backend(unavailable=lambda: ["no driver"]))
    assert pooled() != 7
    install(backend(devices=("cuda",)))
    assert pooled() != 7


def test_an_explicit_choice_never_falls_back(install) -> None:
    install(backend(unavailable=lambda: ["no driver"], devices=("cuda",)))
    with (
        sne_fast.use_backend("triton"),
        pytest.raises(sne_fast.BackendError, match="segment_pool: backend 'triton' cannot run it: no driver; runs"),
    ):
        pooled()
    install(backend(why_not=lambda op, args: ["width 8 is not one of 32, 64"]))
    with sne_fast.use_backend("triton"), pytest.raises(sne_fast.BackendError, match="width 8 is not one of"):
        pooled()
    x = torch.randn(2, 8)
    ptr = torch.tensor([0, 2])
    with sne_fast.use_backend("triton"), pytest.raises(sne_fast.BackendError, match="does not implement set_attention"):
        functional.set_attention(x, x, x, ptr, ptr, 2)


def test_the_environment_chooses_where_no_block_does(install, monkeypatch: pytest.MonkeyPatch) -> None:
    install(backend())
    monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, "reference")
    assert pooled() != 7
    with sne_fast.use_backend("triton"):
        assert pooled() == 7
    with sne_fast.use_backend("auto"):
        assert pooled() == 7
    monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, "fastest")
    with pytest.raises(ValueError, match="SNE_FAST_BACKEND: backend must be one of auto, reference"):
        pooled()


def test_blocks_nest_and_restore(install) -> None:
    with sne_fast.use_backend("reference"):
        with sne_fast.use_backend("auto"):
            assert dispatch.current_backend() == "auto"
        assert dispatch.current_backend() == "reference"
        with pytest.raises(ZeroDivisionError), sne_fast.use_backend("cpu"):
            raise ZeroDivisionError
        assert dispatch.current_backend() == "reference"
    with pytest.raises(ValueError, match="use_backend: backend must be one of"), sne_fast.use_backend("numpy"):
        pass


def test_backward_in_another_thread_sees_the_choice(install) -> None:
    """Autograd may run backward in its own thread; the choice of the block holds there too."""
    seen = []
    with sne_fast.use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(dispatch.current_backend()))
        thread.start()
        thread.join()
    assert seen == ["reference"]


def left_alone() -> bool:
    return dispatch.current_backend() == "auto" and not dispatch._all_blocks and not dispatch._latest


def test_blocks_may_be_left_in_any_order() -> None:
    first, second, third = (sne_fast.use_backend(name) for name in ("reference", "cpu", "reference"))
    first.__enter__(), second.__enter__(), third.__enter__()
    second.__exit__(None, None, None)
    assert dispatch.current_backend() == "reference"
    first.__exit__(None, None, None)
    assert dispatch.current_backend() == "reference"
    third.__exit__(None, None, None)
    assert left_alone()


def test_generators_and_tasks_take_only_their_own_block_away() -> None:
    def inside(name: str) -> Iterator[str]:
        with sne_fast.use_backend(name):
            yield dispatch.current_backend()

    one, other = inside("reference"), inside("cpu")
    assert (next(one), next(other)) == ("reference", "cpu")
    one.close()
    assert dispatch.current_backend() == "cpu"
    other.close()
    assert left_alone()

    async def task(name: str, turns: int) -> set[str]:
        with sne_fast.use_backend(name):
            seen = set()
            for _ in range(turns):
                await asyncio.sleep(0)
                seen.add(dispatch.current_backend())
            return seen

    async def both() -> list[set[str]]:
        return await asyncio.gather(task("reference", 2), task("cpu", 5), task("auto", 9))

    assert asyncio.run(both()) == [{"reference"}, {"cpu"}, {"auto"}]
    assert left_alone()


def test_a_generator_closed_by_another_thread_takes_its_block_away() -> None:
    def inside() -> Iterator[None]:
        with sne_fast.use_backend("reference"):
            yield

    generator = inside()
    next(generator)
    assert dispatch.current_backend() == "reference"
    thread = threading.Thread(target=generator.close)
    thread.start()
    thread.join()
    assert left_alone()


def test_threads_with_blocks_of_their_own_do_not_disturb_each_other() -> None:
    barrier = threading.Barrier(4)

    def work(name: str | None) -> set[str]:
        with sne_fast.use_backend(name) if name else contextlib.nullcontext():
            barrier.wait()
            seen = {dispatch.current_backend() for _ in range(1000)}
            barrier.wait()
        return seen

    with ThreadPoolExecutor(4) as pool:
        *seen, without = pool.map(work, ("reference", "cpu", "auto", None))
    assert seen == [{"reference"}, {"cpu"}, {"auto"}] and len(without) == 1
    assert left_alone()


def test_an_empty_environment_variable_chooses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, "")
    assert dispatch.current_backend() == "auto"


def test_a_missing_native_library_is_told_once_at_the_first_forward_pass(install, monkeypatch, recwarn) -> None:
    monkeypatch.setattr(dispatch, "_warned_of", set())
    missing = dataclasses.replace(
        found_backends.BACKENDS["cpu"], unavailable=lambda: ["the native library was not built; reinstall with g++"]
    )
    monkeypatch.setitem(found_backends.BACKENDS, "cpu", missing)
    encoder = sne_fast.SNE(hidden_dim=32)
    batch = encoder.pack([torch.nn.Linear(3, 2)])
    with sne_fast.use_backend("reference"):
        encoder(batch)
    assert not recwarn.list
    with pytest.warns(RuntimeWarning, match=r"reference computes on cpu, many times slower .* reinstall with g\+\+"):
        encoder(batch)
    encoder(batch).sum().backward()
    assert not recwarn.list


def test_explain_names_every_op_backend_and_reason(install) -> None:
    install(backend(unavailable=lambda: ["no driver here"]))
    report = sne_fast.explain()
    assert {r.op for r in report} == set(FORWARD_OPS)
    assert {r.backend for r in report} == {"reference", "cpu", "triton", "cuda"}
    assert all(r.reasons == () for r in report if r.backend == "reference")
    text = str(report)
    assert "no driver here" in text and "ready" in text
    on_gpu = {r.backend: r.reasons for r in sne_fast.explain("cuda") if r.op == "segment_pool"}
    assert any("the inputs are on cuda" in reason for reason in on_gpu["triton"])


def test_a_backend_that_cannot_be_imported_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(found_backends.BACKENDS, "cuda")
    monkeypatch.setitem(found_backends.FAILED, "cuda", "import failed: no libcuda")
    assert any("no libcuda" in str(r.reasons) for r in sne_fast.explain() if r.backend == "cuda")


def test_import_prints_nothing_probes_nothing_and_stays_light(tmp_path) -> None:
    code = (
        "import torch, sys\n"
        "before = set(sys.modules)\n"
        "import sne_fast\n"
        "new = set(sys.modules) - before\n"
        "heavy = {'triton', 'sklearn', 'matplotlib', 'scipy', 'huggingface_hub', 'typer', 'rich', 'torch._dynamo'}\n"
        "assert not heavy & new, heavy & new\n"
        "assert not torch.cuda.is_initialized()\n"
        "assert not [m for m in new if m.startswith('sne_fast.backends.')], 'backends are loaded on first use'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "" and done.stderr == ""


def test_auto_leaves_devices_that_a_backend_serves_by_name_only(install) -> None:
    install(backend(auto_devices=("cuda",)))
    assert pooled() != 7
    with sne_fast.use_backend("triton"):
        assert pooled() == 7


def test_the_triton_backend_explains_itself_and_imports_triton_late(tmp_path) -> None:
    code = (
        "import sys, torch, sne_fast\n"
        "x, ptr = torch.randn(4, 16), torch.tensor([0, 4])\n"
        "sne_fast.functional.segment_pool(x, x, ptr)\n"
        "report = sne_fast.explain('cuda')\n"
        "assert 'sne_fast.backends.triton.backend' in sys.modules\n"
        "print([r.reasons for r in report if r.backend == 'triton'])\n"
        "assert torch.cuda.is_available() or 'triton' not in sys.modules\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    if not torch.cuda.is_available():
        assert "torch finds no NVIDIA GPU here" in done.stdout


TOY = """
from sne_fast.ops.backend import Backend

def segment_pool(x, logits, ptr, ptr_host):
    segments, queries = ptr.shape[0] - 1, logits.shape[1]
    return x.new_full((segments, queries, x.shape[1]), 7), x.new_zeros((segments, queries))

def feed_forward(q, attended, w_o, b_o, norm):
    return attended.new_full(attended.shape, 5)

BACKEND = Backend(
    name="toy",
    kernels={"segment_pool": segment_pool, "feed_forward": feed_forward},
    devices=("cpu",),
    priority=150,
    why_not=lambda op, args: [] if args[0].shape[1] == 32 else [f"width must be 32, got {args[0].shape[1]}"],
    fusions=("feed_forward",),
    packages=("PACKAGE",),
    describe=lambda: "built for play",
)
"""

USE_TOY = """
import sys, pytest, torch
import sne_fast, sne_fast.backends
from sne_fast import functional
sne_fast.backends.__path__.append(sys.argv[1])

def pooled(width):
    ptr = torch.tensor([0, 2, 5])
    return functional.segment_pool(torch.ones(5, width), torch.ones(5, 1), ptr).flatten()[0].item()

assert pooled(32) == 7, "auto takes the highest priority"
assert pooled(48) == 1, "and passes on what the backend refuses"
x, ptr = torch.randn(5, 32), torch.tensor([0, 2, 5])
with sne_fast.use_backend("toy"):
    assert pooled(32) == 7
    with pytest.raises(sne_fast.BackendError, match="'toy' cannot run it: width must be 32, got 48"):
        pooled(48)
    with pytest.raises(sne_fast.BackendError, match="'toy' cannot run it: does not implement set_attention"):
        functional.set_attention(x, x, x, ptr, ptr, 4)
with sne_fast.use_backend("reference"):
    assert pooled(32) == 1
with pytest.raises(ValueError, match="must be one of auto, reference, cpu, cuda, toy, triton, got 'numpy'"):
    sne_fast.use_backend("numpy").__enter__()
said = {report.op: report.reasons for report in sne_fast.explain("cpu") if report.backend == "toy"}
assert said["segment_pool"] == ("does not implement segment_pool_backward",), said
assert said["set_attention"] == ("does not implement set_attention",)
assert "toy" in str(sne_fast.explain())

from sne_fast.cli import installation
assert ("backend toy", "built for play") in installation.backends()

mab = sne_fast.MAB(8, 8, 32, num_heads=4).requires_grad_(False)  # rows too narrow for the cpu backend's own fusion
x = x[:, :8].contiguous()
run = torch.compile(mab, fullgraph=True, backend="eager") if sys.argv[2] == "compiled" else mab
fused = (run(x, x, ptr, ptr, ptr, ptr) == 5).all().item()
assert fused == (sys.argv[3] == "torch"), "auto calls a fusion where its packages are installed"
"""


HOW_AND_PACKAGE = [("eager", "torch"), ("compiled", "torch"), ("eager", "no_such_package")]


@pytest.mark.parametrize(("how", "package"), slow_but_every(3, HOW_AND_PACKAGE))
def test_a_backend_is_added_by_files_alone(tmp_path: Path, how: str, package: str) -> None:
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "backend.py").write_text(TOY.replace("PACKAGE", package))
    done = run_python(USE_TOY, str(tmp_path), how, package)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_first_call_that_loads_backends_may_be_compiled() -> None:
    """`fuses` finds the backends while torch.compile traces it."""
    code = (
        "import sys, torch, sne_fast\n"
        "mab, x, ptr = sne_fast.MAB(32, 32, 32, num_heads=4), torch.randn(5, 32), torch.tensor([0, 2, 5])\n"
        "assert 'sne_fast.ops.found_backends' not in sys.modules\n"
        "with sne_fast.use_backend('auto'):\n"
        "    got = torch.compile(mab, fullgraph=True, backend='eager')(x, x, ptr, ptr, ptr, ptr)\n"
        "torch.testing.assert_close(got, mab(x, x, ptr, ptr))\n"
    )
    done = run_python(code)
    assert done.returncode == 0, done.stderr


CONTENTS = ["", "BACKEND = 3", TOY.replace('"toy"', '"other"')]


@pytest.mark.parametrize("content", slow_but_every(3, CONTENTS), ids=["none", "int", "name"])
def test_a_folder_that_declares_no_backend_is_explained(tmp_path: Path, content: str) -> None:
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "backend.py").write_text(content)
    code = (
        "import sys, sne_fast, sne_fast.backends\n"
        "sne_fast.backends.__path__.append(sys.argv[1])\n"
        "print({r.reasons for r in sne_fast.explain() if r.backend == 'toy'})\n"
    )
    done = run_python(code, str(tmp_path))
    assert "must declare BACKEND, a sne_fast.ops.backend.Backend named 'toy'" in done.stdout, done.stderr


def run_python(code: str, *arguments: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != dispatch.ENVIRONMENT_VARIABLE}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=timeout, cwd=ELSEWHERE)


FORK = """
import os, sys, threading, torch, sne_fast
torch.set_num_threads(2)
encoder = sne_fast.SNE(hidden_dim=64)
batch = encoder.pack([torch.nn.Linear(300, 300) for _ in range(3)]).detach()
with sne_fast.use_backend(sys.argv[1]):
    z = encoder(batch)
    z.sum().backward()
    child = os.fork()
    if child == 0:
        ok = torch.get_num_threads() == 1 and torch.allclose(encoder(batch), z, rtol=1e-4, atol=1e-5)
        encoder(batch).sum().backward()
        os._exit(0 if ok else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert torch.get_num_threads() == 2
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_a_forked_child_encodes_with_one_thread(name: str) -> None:
    done = run_python(FORK, name, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_fork_leaves_threads_alone_where_nothing_was_computed() -> None:
    code = (
        "import os, torch, sne_fast.ops.dispatch\n"
        "torch.set_num_threads(2)\n"
        "child = os.fork()\n"
        "if child == 0: os._exit(torch.get_num_threads())\n"
        "assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 2\n"
    )
    done = run_python(code)
    assert done.returncode == 0, done.stderr
