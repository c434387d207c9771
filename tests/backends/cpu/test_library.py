"""Loading the native library, choosing its instruction set, and what is said where it cannot be used."""

from __future__ import annotations

import ctypes

import pytest
import torch

import sne_fast
from helpers.cpu_cases import NEEDS_BACKEND, chunk_encode_case
from helpers.paths import ROOT
from sne_fast.backends.cpu import backend as cpu
from sne_fast.backends.cpu import library

needs_backend = pytest.mark.skipif(bool(library.reasons()), reason=NEEDS_BACKEND)


@pytest.fixture
def fresh_load():
    library.NATIVE.forget()
    yield
    library.NATIVE.forget()


def test_a_missing_library_is_explained(monkeypatch, tmp_path, fresh_load):
    monkeypatch.setattr(library, "LIBRARY_FILE", tmp_path / "libsne_fast_cpu.so")
    monkeypatch.setattr(library, "ERROR_FILE", tmp_path / "error.txt")
    (tmp_path / "error.txt").write_text("there is no C++ compiler\n")
    (reason,) = cpu.BACKEND.unavailable()
    assert reason == "the native library was not built: there is no C++ compiler; reinstall with g++"
    with sne_fast.use_backend("cpu"), pytest.raises(sne_fast.BackendError, match="reinstall with g\\+\\+"):
        sne_fast.SNE()([torch.nn.Linear(2, 2)])
    assert sne_fast.SNE()([torch.nn.Linear(2, 2)]).shape == (1, 64)  # auto takes the reference


def test_a_foreign_library_is_refused(monkeypatch, tmp_path, fresh_load):
    monkeypatch.setattr(library, "LIBRARY_FILE", tmp_path / "libsne_fast_cpu.so")
    (tmp_path / "libsne_fast_cpu.so").write_bytes(b"not a library")
    assert "does not load" in cpu.BACKEND.unavailable()[0]


@needs_backend
def test_another_abi_is_refused(monkeypatch, fresh_load):
    monkeypatch.setattr(library, "ABI", 999)
    assert "needs 999: reinstall" in cpu.BACKEND.unavailable()[0]


@needs_backend
def test_a_missing_symbol_is_refused(monkeypatch, fresh_load):
    monkeypatch.setitem(library.SYMBOLS, "sne_fast_cpu_of_tomorrow", (ctypes.c_int, []))
    assert "lacks sne_fast_cpu_of_tomorrow" in cpu.BACKEND.unavailable()[0]


@needs_backend
def test_the_environment_variable_chooses_the_instruction_set(monkeypatch, fresh_load):
    def chosen(name: str) -> str:
        monkeypatch.setenv(library.ISA_ENVIRONMENT_VARIABLE, name)
        library.NATIVE.forget()
        return library.isa()

    isas = library.supported_isas()
    for name in isas:
        assert chosen(name) == name
    assert chosen("") == [isa for isa in isas if isa != "amx_bf16"][-1]


@needs_backend
@pytest.mark.parametrize("name", ["typo", "AVX2", "mmx", " "])
def test_an_unknown_instruction_set_is_an_error_that_lists_the_choices(monkeypatch, fresh_load, name):
    choices = ", ".join(library.supported_isas())
    monkeypatch.setenv(library.ISA_ENVIRONMENT_VARIABLE, name)
    library.NATIVE.forget()
    message = f"SNE_FAST_CPU_ISA: instruction set must be one that this machine runs, {choices}, or empty for the best "
    with pytest.raises(ValueError, match=message):  # also where no backend was asked for
        sne_fast.SNE()([torch.nn.Linear(2, 2)])
    with pytest.raises(ValueError, match=message), sne_fast.use_backend("cpu"):
        sne_fast.SNE()([torch.nn.Linear(2, 2)])


@needs_backend
def test_a_wrong_instruction_set_is_an_error():
    with pytest.raises(RuntimeError, match="instruction set unknown"), library.use_isa("mmx"):
        pass


@needs_backend
def test_structs_have_the_size_of_the_header(tmp_path):
    """Count the fields in the header, which ctypes mirrors by hand."""
    header = (ROOT / "csrc" / "include" / "sne_fast" / "cpu_abi.h").read_text()
    assert f"#define SNE_FAST_CPU_ABI {library.ABI}\n" in header
    for name, struct in {
        "chunk_encode_args": library.ChunkEncodeArgs, "chunk_encode_grads": library.ChunkEncodeGrads,
        "set_attention_args": library.SetAttentionArgs, "set_attention_grads": library.SetAttentionGrads,
        "segment_pool_args": library.SegmentPoolArgs, "segment_pool_grads": library.SegmentPoolGrads,
        "gather_chunks_args": library.GatherChunksArgs,
    }.items():  # fmt: skip
        body = header[: header.index("} sne_fast_" + name + ";")].rpartition("typedef struct {")[2]
        fields: list[str] = []
        for line in body.splitlines():
            code = line.split("/*")[0].strip()
            for piece in code.split(";"):
                words = piece.replace("*", " ").replace(",", " ").split()
                fields += [w for w in words if w not in ("const", "void", "double", "int64_t", "int32_t")]
        assert fields == [field for field, _ in struct._fields_], name


def test_why_not_names_what_does_not_fit():
    args = chunk_encode_case(64, 4, [5, 6])
    assert cpu.why_not("chunk_encode", args) == []
    assert cpu.why_not("chunk_encode_backward", (torch.zeros(2, 4, 64), *args)) == []
    wide = (*args[:14], torch.zeros(4, 48))
    assert "width must be one of 32, 64, 128, 256, got 48" in cpu.why_not("chunk_encode", wide)[0]
    assert "got 3" in cpu.why_not("chunk_encode", (*args[:14], torch.zeros(3, 64)))[0]
    assert "got 16" in cpu.why_not("chunk_encode", (*args[:14], torch.zeros(16, 64)))[0]  # d = 4
    long = chunk_encode_case(64, 4, [300])
    assert "at most 256 long, got 300" in cpu.why_not("chunk_encode", long)[0]
    whole, ptr = torch.zeros(2, 64, dtype=torch.int64), torch.tensor([0, 2])
    attention = (whole, whole, whole, ptr, ptr, ptr, ptr, 4)
    assert "got torch.int64" in cpu.why_not("set_attention", attention)[0]
    assert "multiple of 16, got 20" in cpu.why_not("segment_pool", (torch.zeros(2, 20), whole[:, :1], ptr, ptr))[0]
