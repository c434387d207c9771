"""Loading the CUDA backend's library and what is said where it cannot be used, with builds and devices made up here."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import sne_fast
from helpers.paths import ROOT
from sne_fast.backends.cuda import backend as cuda
from sne_fast.backends.cuda import compatibility, library
from sne_fast.ops import selftest

HEADER = (ROOT / "csrc" / "include" / "sne_fast" / "cuda_abi.h").read_text()
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Where the library is looked for; nothing remembered from before, nothing left behind."""

    def forget() -> None:
        library.NATIVE.forget()
        cuda.unavailable.cache_clear()
        cuda.device_reasons.cache_clear()

    monkeypatch.setattr(library, "LIBRARY_FILE", tmp_path / "_cuda_engine.so")
    monkeypatch.setattr(library, "ERROR_FILE", tmp_path / "error.txt")
    monkeypatch.setattr(library, "EMULATED", False)
    forget()
    yield tmp_path
    forget()


def put_library(folder: Path, leave_out: str = "", **results: int | str) -> None:
    """Make a library with every symbol, whose functions return what is given."""
    values: dict[str, int | str] = {"abi": library.ABI, "architectures": "80+ptx 90a", "runtime_version": 13000,
                                    "driver_version": 13000, **results}  # fmt: skip
    code = ""
    for name in sorted(library.SYMBOLS.keys() - {leave_out}):
        value = values.get(name.removeprefix("sne_fast_cuda_"), 0)
        returned = (
            f'const char *{name}() {{ return "{value}"; }}'
            if isinstance(value, str)
            else (f"int {name}() {{ return {value}; }}")
        )
        code += f'extern "C" {returned}\n'
    (folder / "stub.cpp").write_text(code)
    out = folder / "_cuda_engine.so"
    subprocess.run(["g++", "-shared", "-fPIC", str(folder / "stub.cpp"), "-o", str(out)], check=True)


def put_gpus(monkeypatch: pytest.MonkeyPatch, *capabilities: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=0: capabilities[index])


# ----------------------------------------------------------------------------------------------------------- loading


def test_a_missing_library_is_explained(place: Path) -> None:
    assert "reinstall with SNE_FAST_BUILD=cuda (needs nvcc)" in cuda.unavailable()[0]
    (place / "error.txt").write_text("nvcc refuses the host compiler\n")
    library.NATIVE.forget()
    assert library.reasons() == ["nvcc refuses the host compiler"]
    with sne_fast.use_backend("cuda"), pytest.raises(sne_fast.BackendError, match="'cuda' cannot run it: "):
        sne_fast.SNE()([torch.nn.Linear(2, 2)])
    with pytest.raises(RuntimeError, match="nvcc refuses"):
        library.library()


def test_a_foreign_library_is_refused(place: Path) -> None:
    (place / "_cuda_engine.so").write_bytes(b"not a library")
    assert "the CUDA library does not load" in library.reasons()[0]


@needs_compiler
def test_another_abi_is_refused(place: Path) -> None:
    put_library(place, abi=999)
    assert f"has ABI 999, this sne_fast needs {library.ABI}: reinstall" in library.reasons()[0]


@needs_compiler
def test_a_missing_symbol_is_refused(place: Path) -> None:
    put_library(place, leave_out="sne_fast_cuda_status")
    assert "lacks sne_fast_cuda_status: it is from another version" in library.reasons()[0]


@needs_compiler
def test_an_emulated_build_is_for_tests_alone(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_library(place, architectures="emulated")
    assert "is an emulated build" in library.reasons()[0]


# ----------------------------------------------------------------------------------------------------------- devices


@needs_compiler
def test_without_a_gpu_it_says_so(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_library(place)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cuda.unavailable() == ["torch finds no NVIDIA GPU here"]
    assert library.architectures() == ["80+ptx", "90a"]


@needs_compiler
@pytest.mark.parametrize(
    ("build", "gpu", "message"),
    [
        ({}, (7, 5), "needs a GPU of compute capability 8.0 or more, cuda:0 has 7.5"),
        (
            {"architectures": "80 90a"},
            (12, 0),
            "was compiled for 80 90a, cuda:0 has 12.0: reinstall with SNE_FAST_BUILD",
        ),
        (
            {"driver_version": 12080},
            (9, 0),
            "built with CUDA 13.0, the driver knows CUDA 12.8 at most: update the driver",
        ),
        ({"runtime_version": 13010}, (12, 0), "a driver of CUDA 13.0 does not compile what CUDA 13.1 made"),
    ],
)
def test_what_cannot_run_on_the_gpu_is_explained(place, monkeypatch, build, gpu, message: str) -> None:
    put_library(place, **build)
    put_gpus(monkeypatch, gpu)
    (reason,) = cuda.unavailable()
    assert message in reason


@needs_compiler
def test_one_gpu_of_two_is_enough_and_the_other_is_refused_by_name(place, monkeypatch) -> None:
    put_library(place, architectures="90a")
    put_gpus(monkeypatch, (9, 0), (12, 0))
    assert cuda.unavailable() == []
    assert cuda.device_reasons(0) == [] and "cuda:1 has 12.0" in cuda.device_reasons(1)[0]


@pytest.mark.parametrize(
    ("architecture", "machine_code", "ptx"),
    [
        ("80", [(8, 0), (8, 6), (8, 9)], []),
        ("86", [(8, 6), (8, 9)], []),
        ("90a", [(9, 0)], []),
        ("100", [(10, 0), (10, 3)], []),
        ("100a", [(10, 0)], []),
        ("100f", [(10, 0), (10, 3)], []),
        ("120+ptx", [(12, 0), (12, 1)], [(12, 0), (12, 1)]),
        ("compute_100", [], [(10, 0), (10, 3), (12, 0), (12, 1)]),
        ("compute_90a", [], [(9, 0)]),
    ],
)
def test_which_gpus_code_is_for(architecture: str, machine_code, ptx) -> None:
    every = [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0), (12, 1)]
    assert [c for c in every if compatibility.has_machine_code(architecture, c)] == machine_code
    assert [c for c in every if compatibility.has_ptx(architecture, c)] == ptx


def test_the_default_build_runs_on_every_gpu_from_ampere() -> None:
    built = ["80+ptx", "90a", "100"]
    for capability in [(8, 0), (8, 6), (8, 7), (8, 9), (9, 0), (10, 0), (10, 3), (11, 0), (12, 0), (12, 1), (13, 0)]:
        assert compatibility.device_reasons("cuda:0", capability, built, 13000, 13000) == []
    with pytest.raises(ValueError, match="'sm_80' is no architecture"):
        compatibility.has_ptx("sm_80", (8, 0))


# ------------------------------------------------------------------------------------------------- header and sources


def test_the_header_says_the_same() -> None:
    """Count functions, structs and their fields in the header, which ctypes mirrors by hand."""
    assert f"#define SNE_FAST_CUDA_ABI {library.ABI}\n" in HEADER
    assert set(re.findall(r"\b(sne_fast_cuda_\w+)\(", HEADER)) == set(library.SYMBOLS)
    text = re.sub(r"/\*.*?\*/", "", HEADER, flags=re.S)
    declared = set()
    for body in re.findall(r"struct \w*\s*\{(.*?)\}", text, re.S):
        words = re.findall(r"\w+", body)
        declared.add(tuple(w for w in words if w not in ("const", "void", "float", "double", "int64_t", "int32_t")))
    structs = [s for s in vars(library).values() if isinstance(s, type) and issubclass(s, ctypes.Structure)]
    assert declared == {tuple(field for field, _ in s._fields_) for s in structs}


def test_a_rebuilt_library_and_changed_sources_are_tested_again(tmp_path: Path) -> None:
    package = Path(library.__file__).parents[2]
    sources = tuple(tmp_path / source.relative_to(package) for source in cuda.BACKEND.sources)
    digests = []
    for file in (
        "backends/cuda/set_attention.py", "backends/cuda/winners.json", "backends/gpu_plans/chunks.py",
        library.LIBRARY_FILE.name, "backends/cuda/backend.py", "kernels.py",
    ):  # fmt: skip
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(f"changed {file}")
        selftest._source_digest.cache_clear()
        digests.append(selftest._source_digest(sources))
    assert len(set(digests)) == 5 and digests[-1] == digests[-2], "what is not the backend's does not matter"
    selftest._source_digest.cache_clear()
