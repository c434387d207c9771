"""Choice of the backend: explicit choices never fall back, reasons are joined, a new backend is one file."""

from __future__ import annotations

import os
import subprocess
import sys
import types

import pytest
import torch
from op_cases import pool_case

import sne_fast
from sne_fast import functional
from sne_fast.ops import dispatch


def backend(name: str = "triton", **changes: object) -> types.ModuleType:
    """A backend module that pools by returning sevens."""
    module = types.ModuleType(name)

    def segment_pool(x, logits, ptr, ptr_host):
        segments, queries = ptr.shape[0] - 1, logits.shape[1]
        return x.new_full((segments, queries, x.shape[1]), 7), x.new_zeros((segments, queries))

    module.NAME, module.DEVICES, module.PRIORITY = name, ("cpu",), 1000  # type: ignore[attr-defined]
    module.KERNELS = {"segment_pool": segment_pool}  # type: ignore[attr-defined]
    module.unavailable = lambda: []  # type: ignore[attr-defined]
    module.why_not = lambda op, args: []  # type: ignore[attr-defined]
    for key, value in changes.items():
        setattr(module, key, value)
    return module


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch):
    def put(module: types.ModuleType) -> None:
        loaded, failed = dispatch._load()
        monkeypatch.setattr(dispatch, "_load", lambda: ({**loaded, module.NAME: module}, failed))

    monkeypatch.delenv(dispatch.ENVIRONMENT_VARIABLE, raising=False)
    return put


def pooled() -> float:
    x, logits, ptr = pool_case([2, 3], 8, 3, torch.float32)
    return float(functional.segment_pool(x, logits, ptr).flatten()[0])


def test_auto_takes_the_highest_priority_and_falls_back(install) -> None:
    install(backend())
    assert pooled() == 7
    install(backend(PRIORITY=-1))
    assert pooled() != 7
    install(backend(why_not=lambda op, args: ["not this width"]))
    assert pooled() != 7
    install(backend(unavailable=lambda: ["no driver"]))
    assert pooled() != 7
    install(backend(DEVICES=("cuda",)))
    assert pooled() != 7


def test_an_explicit_choice_never_falls_back(install) -> None:
    install(backend(unavailable=lambda: ["no driver"], DEVICES=("cuda",)))
    with sne_fast.use_backend("triton"):
        with pytest.raises(
            sne_fast.BackendError, match="segment_pool: backend 'triton' cannot run it: no driver; runs"
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
    with pytest.raises(ValueError, match="use_backend: backend must be one of"):
        with sne_fast.use_backend("numpy"):
            pass


def test_backward_in_another_thread_sees_the_choice(install) -> None:
    """Autograd may run backward in its own thread; the choice of the block holds there too."""
    import threading

    seen = []
    with sne_fast.use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(dispatch.current_backend()))
        thread.start()
        thread.join()
    assert seen == ["reference"]


def test_explain_names_every_op_backend_and_reason(install) -> None:
    install(backend(unavailable=lambda: ["no driver here"]))
    report = sne_fast.explain()
    assert {r.op for r in report} == {"gather_chunks", "chunk_encode", "set_attention", "segment_pool", "feed_forward"}
    assert {r.backend for r in report} == {"reference", "cpu", "triton", "cuda"}
    assert all(r.reasons == () for r in report if r.backend == "reference")
    text = str(report)
    assert "no driver here" in text and "ready" in text
    on_gpu = {r.backend: r.reasons for r in sne_fast.explain("cuda") if r.op == "segment_pool"}
    assert any("the inputs are on cuda" in reason for reason in on_gpu["triton"])


def test_a_backend_that_cannot_be_imported_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, _ = dispatch._load()
    monkeypatch.setattr(dispatch, "_load", lambda: (loaded, {"cuda": "import failed: no libcuda"}))
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
    install(backend(AUTO_DEVICES=("cuda",)))
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
