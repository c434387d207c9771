"""Hostile pickles beside weights: nothing runs, nothing is looked up, and no small file costs much."""

from __future__ import annotations

import copyreg
import os
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from helpers.hostile_pickles import build, call, name, new, value, with_pickle, with_value
from sne_fast import CheckpointError
from sne_fast.data.checkpoints import load_state_dict


class Fatal:
    """A class whose every use would be noticed."""

    used = False

    def __new__(cls, *_: Any) -> Fatal:
        Fatal.used = True
        return super().__new__(cls)

    def __init__(self, *_: Any) -> None:
        Fatal.used = True

    def __setstate__(self, _: Any) -> None:
        Fatal.used = True

    def __call__(self, *_: Any) -> None:
        Fatal.used = True


FATAL = name(f"{Fatal.__module__}.Fatal")
COMMAND = "touch PROOF"
ENTRIES = b"}" + value("__class__") + FATAL + b"s"
LAUGHS = (
    b"]"
    + b"q\x00"
    + b"".join(b"](" + b"h" + bytes([i]) * 1 + (b"h" + bytes([i])) * 9 + b"eq" + bytes([i + 1]) for i in range(200))
)
PAIRS = b")q\x00" + b"".join(b"h" + bytes([i]) + b"h" + bytes([i]) + b"\x86q" + bytes([i + 1]) for i in range(200))
HOSTILE = {
    "os.system": call(name("os.system"), COMMAND),
    "posix.system": call(name("posix.system"), COMMAND),
    "builtins.eval": call(name("builtins.eval"), "open('PROOF', 'w')"),
    "builtins.exec of Python 2": call(name("__builtin__.exec"), "open('PROOF', 'w')"),
    "builtins.getattr": call(call(name("builtins.getattr"), name("os"), "system"), COMMAND),
    "subprocess.Popen": call(name("subprocess.Popen"), COMMAND),
    "torch.ops": call(name("torch.ops.aten.ones"), 3),
    "torch.load": call(name("torch.load"), "/etc/passwd"),
    "torch.hub.load": call(name("torch.hub.load"), "a/b", "c"),
    "torch.Tensor with a size": call(name("torch.Tensor"), 2**40),
    "torch.FloatTensor with a size": call(name("torch.FloatTensor"), 2**40),
    "torch.storage.UntypedStorage with a size": call(name("torch.storage.UntypedStorage"), 2**40),
    "builtins.bytearray of a size": call(name("builtins.bytearray"), 2**40),
    "builtins.range": call(name("builtins.list"), call(name("builtins.range"), 2**40)),
    "a class of the program": call(FATAL, 1),
    "a class of the program made new": new(FATAL, 1),
    "a class of the program built": build(new(FATAL, 1), ENTRIES),
    "INST": b"(" + value(COMMAND) + b"ios\nsystem\n",
    "OBJ": b"(" + name("os.system") + value(COMMAND) + b"o",
    "NEWOBJ_EX": name("os.system") + value((COMMAND,)) + b"}\x92",
    "STACK_GLOBAL": value("os") + value("system") + b"\x93" + value((COMMAND,)) + b"R",
    "a dotted name": value("os") + value("path.os.system") + b"\x93" + value((COMMAND,)) + b"R",
    "a chain of calls": call(call(call(name("functools.partial"), name("os.system")), COMMAND)),
    "a call of what a call returned": call(call(name("operator.attrgetter"), "system"), name("os")),
    "BUILD with __class__": build(call(name("a.B")), ENTRIES),
    "BUILD with __dict__": build(call(name("a.B")), b"}" + value("__dict__") + ENTRIES + b"s"),
    "BUILD with slots": build(call(name("a.B")), b"N" + ENTRIES + b"\x86"),
    "BUILD of a class": build(FATAL, ENTRIES),
    "BUILD of a function": build(name("torch._utils._rebuild_tensor_v2"), b"}" + value("__code__") + b"Ns"),
    "SETITEM of a class": FATAL + value("a") + value(1) + b"s",
    "EXT1": b"\x82\x7b" + value((COMMAND,)) + b"R",
    "EXT4": b"\x84\x7b\x00\x00\x00" + value((COMMAND,)) + b"R",
    "a persistent id that is text": value("os.system") + b"Q",
    "PERSID": b"Pos.system\n",
    "a storage of no class": value(("storage", name("os.system"), "0", "cpu", 1)) + b"Q",
    "a storage of a negative size": value(("storage", name("torch.FloatStorage"), "0", "cpu", -1)) + b"Q",
    "a storage that is not there": value(("storage", name("torch.FloatStorage"), "9", "cpu", 1)) + b"Q",
    "a storage that is too large": value(("storage", name("torch.FloatStorage"), "0", "cpu", 2**40)) + b"Q",
    "a storage of another folder": value(("storage", name("torch.FloatStorage"), "../data.pkl", "cpu", 1)) + b"Q",
    "lists in lists of shared parts": LAUGHS,
    "a key of shared parts": b"}" + PAIRS + b"Ns",
    "a set of shared parts": b"\x8f(" + PAIRS + b"\x90",
    "a place of the memo without an end": b"Nr\xff\xff\xff\xff",
    "BINBYTES8 without an end": b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7f",
    "LONG4 without an end": b"\x8b\xff\xff\xff\x7f",
    "a number of many digits": b"I" + b"9" * 100_000 + b"\n",
    "tuples nested deeply": b")" + b"\x85" * 200_000,
    "lists nested deeply": b"]" * 100_000 + b"a" * 99_999,
    "calls nested deeply": name("a.B") + b")R" * 50_000,
    "tensors from types nested deeply": name("torch._tensor._rebuild_from_type_v2") + b"q\x00(" + b"h\x00(" * 2000
    + b"N" + b"tNN" * 2000 + b"tR",
    "texts encoded again and again": value("x" * 100_000) + b"q\x00" + b"".join(
        b"0" + name("_codecs.encode") + b"h\x00\x85R" for _ in range(2000)
    ),
    "a dict of a list again and again": b"]q\x00(" + value(("a", 1)) * 5000 + b"e" + b"".join(
        b"0" + name("collections.OrderedDict") + b"h\x00\x85R" for _ in range(2000)
    ),
    "an object in itself": b"]q\x00h\x00a",
    "a file in a file in a file": call(
        name("torch.storage._load_from_bytes"),
        call(name("_codecs.encode"), "\x80\x02ctorch.storage\n_load_from_bytes\nN\x85R.", "latin1"),
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_objects_run_nothing_and_cost_little(tmp_path: Path, case: str, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x").mkdir()
    file = tmp_path / "x" / "n.pth"
    copyreg.add_extension("os", "system", 0x7B)
    Fatal.used = False
    try:
        with_value(file, HOSTILE[case])
        start = time.process_time()
        try:
            read = load_state_dict(file)
        except CheckpointError as error:
            told = str(error)
            assert told.startswith(f"{file}: ") and "\n" not in told and len(told) < 400 + len(str(file))
            assert "weights_only" not in told and "add_safe_globals" not in told
        else:
            assert list(read) == ["w"] and torch.equal(read["w"], torch.arange(6.0).view(2, 3))
        assert time.process_time() - start < 20  # one that grows without bounds would not end
        with_pickle(file, lambda _: b"\x80\x02" + HOSTILE[case] + b".")
        with pytest.raises(CheckpointError):
            load_state_dict(file)
    finally:
        copyreg.remove_extension("os", "system", 0x7B)
    assert not Fatal.used and not (tmp_path / "PROOF").exists()


def test_what_the_program_allows_is_not_made_either(tmp_path: Path) -> None:
    Fatal.used = False
    with torch.serialization.safe_globals([Fatal, (os.system, "os.system"), (eval, "builtins.eval")]):
        for case in ("os.system", "builtins.eval", "a class of the program", "a class of the program built"):
            with_value(tmp_path / "n.pt", HOSTILE[case])
            assert list(load_state_dict(tmp_path / "n.pt")) == ["w"]
    assert not Fatal.used


def write(file: Path, content: Any) -> Path:
    torch.save(content, file)
    return file


def test_modules_that_share_parts_again_and_again_are_refused(tmp_path: Path) -> None:
    module = nn.Linear(1, 1)
    for _ in range(40):
        module = nn.Sequential(module, module)
    with pytest.raises(CheckpointError, match="its modules are nested too deeply or are too many"):
        load_state_dict(write(tmp_path / "x", module))


def test_compressed_and_overlapping_zips_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "x", {"w": torch.zeros(1_000_000)})
    with zipfile.ZipFile(tmp_path / "x") as source, zipfile.ZipFile(tmp_path / "y", "w", zipfile.ZIP_DEFLATED) as out:
        for entry in source.namelist():
            out.writestr(entry, source.read(entry))
    assert (tmp_path / "y").stat().st_size < 20_000
    with pytest.raises(CheckpointError, match="refused, it is a compressed or encrypted zip"):
        load_state_dict(tmp_path / "y")


@pytest.mark.skipif(sys.platform == "win32", reason="named pipes")
def test_what_is_no_regular_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors.index.json").symlink_to("/dev/zero")
    for path in (tmp_path / "model.safetensors", tmp_path, "/dev/zero", tmp_path / "model.safetensors.index.json"):
        with pytest.raises(CheckpointError, match=r"must be a regular file, is a (named pipe|device)"):
            load_state_dict(path)
    with pytest.raises(CheckpointError, match="cannot be"):
        load_state_dict("a\0b")


def test_a_name_of_several_lines_stays_in_one_sentence(tmp_path):
    parts = (b"\x8c" + bytes([len(text)]) + text for text in (b"t\norch", b"C\r"))
    file = tmp_path / "x.pt"
    file.write_bytes(b"\x80\x04" + b"".join(parts) + b"\x93)R.")
    with pytest.raises(CheckpointError) as refused:
        load_state_dict(file)
    assert r"an object of 't\norch.C\r'" in str(refused.value) and "\n" not in str(refused.value)
