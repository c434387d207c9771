"""Pickles beside which numpy values lie: read as numpy writes them, and refused in every other form."""

from __future__ import annotations

import ast
import copyreg
import os
import random
import threading
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch

import sne_fast
from helpers.hostile_pickles import (
    ADDRESS,
    BAD_DTYPE,
    CORES,
    EMPTY,
    F8,
    HOSTILE,
    SCALAR,
    WEIGHTS,
    array,
    call,
    raw,
    value,
    with_pickle,
    with_value,
)  # fmt: skip
from sne_fast.data.checkpoints import CheckpointError, load_state_dict
from sne_fast.data.pickles import as_array, load_plain
from sne_fast.training.progress import Progress
from sne_fast.zoo import load_dwsnets, load_nfn


@pytest.fixture
def folders(tmp_path):
    """Return a file that NFN's layout names, and that a JSON of DWSNets names as a sine wave."""
    file = tmp_path / "randinit_smaller_3s" / "net7.pth"
    file.parent.mkdir()
    (tmp_path / "splits.json").write_text('{"train": ["randinit_smaller_3s/net7.pth"]}')
    return file


def refused(file: Path, message: str) -> None:
    """Check that readers of arrays refuse the file in one sentence, and that others take no more than tensors of it."""
    readers = (
        lambda: load_nfn(file.parent.parent).state_dict(0),
        lambda: load_dwsnets(file.parent.parent / "splits.json", root=file.parent),
        lambda: load_plain(file, arrays=True),
    )
    for reader in readers:
        with pytest.raises(CheckpointError) as raised:
            reader()
        assert message in one_sentence(raised.value, file)
    try:
        read = load_state_dict(file)
    except CheckpointError as error:
        one_sentence(error, file)
    else:
        assert all(any(torch.equal(tensor, own) for own in WEIGHTS.values()) for tensor in read.values())


def one_sentence(error: CheckpointError, file: Path) -> str:
    told = str(error)
    assert told.startswith(f"{file}: ") and "\n" not in told and len(told) < 400 + len(str(file))
    assert "weights_only" not in told and "add_safe_globals" not in told
    return told


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_numpy_values_in_a_pickle_are_refused(folders, case) -> None:
    opcodes, message = HOSTILE[case]
    copyreg.add_extension("numpy", "ndarray", 0x7B)  # so that EXT1 would find it
    try:
        with_value(folders, opcodes)
        refused(folders, message)
    finally:
        copyreg.remove_extension("numpy", "ndarray", 0x7B)


@pytest.mark.parametrize("case", ["object array over bytes", "float array by ndarray", "object scalar"])
def test_hostile_numpy_values_deep_in_a_pickle_or_never_used_are_refused(folders, case) -> None:
    opcodes, message = HOSTILE[case]
    for nested in (
        b"]" + b"}" + value("deep") + opcodes + b"sa",
        value((("a", opcodes), 1)),
        opcodes + b"q\x63" + b"0" + value(1),  # POP is no opcode that torch reads
    ):
        with_value(folders, nested)
        refused(folders, message)
    with_pickle(folders, lambda content: b"\x80\x02" + opcodes + b".")
    refused(folders, message)


def test_arrays_that_the_pickle_never_fills_are_refused_when_they_are_used(folders) -> None:
    with_value(folders, EMPTY)
    with pytest.raises(
        CheckpointError, match=r"net7.pth: its coef must be a few numbers.*another way than numpy's own"
    ):
        load_dwsnets(folders.parent.parent / "splits.json", root=folders.parent)


def test_old_files_without_a_zip_are_held_to_the_same(folders) -> None:
    class Objects:
        def __reduce__(self):
            return np.ndarray, ((1,), np.dtype("O"), ADDRESS)

    for zipped in (True, False):
        torch.save({**WEIGHTS, "coef": Objects()}, folders, _use_new_zipfile_serialization=zipped)
        refused(folders, BAD_DTYPE)
        torch.save({**WEIGHTS, "coef": np.array([{}])}, folders, _use_new_zipfile_serialization=zipped)
        refused(folders, BAD_DTYPE)


# ------------------------------------------------------------------------------------------ what numpy's users write

WRITTEN = {
    **{f"{kind} array": np.arange(6).astype(kind) for kind in ("f4", "f8", "i4", "i8")},
    "column-major": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "transposed": np.arange(24.0).reshape(2, 3, 4).transpose(2, 0, 1),
    "part": np.arange(12.0)[::3],
    "without dimensions": np.array(3.5),
    "not a number": np.array([np.nan, -np.inf, -0.0]),
}


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("written", WRITTEN)
def test_arrays_as_numpy_writes_them_are_read_to_the_bit(tmp_path, written, zipped, core) -> None:
    file = tmp_path / "net0.pth"
    torch.save({**WEIGHTS, "x": WRITTEN[written], "again": WRITTEN[written]}, file,
               _use_new_zipfile_serialization=zipped)  # fmt: skip
    if zipped:
        with zipfile.ZipFile(file) as source:
            entries = {entry: source.read(entry) for entry in source.namelist()}
        with zipfile.ZipFile(file, "w") as out:
            for entry, content in entries.items():
                out.writestr(entry, content.replace(CORES[1].encode(), core.encode()))
    else:
        file.write_bytes(file.read_bytes().replace(CORES[1].encode(), core.encode()))
    content = load_plain(file, arrays=True)
    for key in ("x", "again"):
        read = as_array(content[key])
        assert read.dtype == WRITTEN[written].dtype and read.shape == WRITTEN[written].shape and read.flags.writeable
        assert read.tobytes() == WRITTEN[written].tobytes()
    assert all(torch.equal(content[key], tensor) for key, tensor in WEIGHTS.items())
    with pytest.raises(CheckpointError, match="refused, it holds code or objects"):
        load_plain(file)
    if WRITTEN[written].dtype.kind == "f" and WRITTEN[written].ndim:
        with pytest.raises(CheckpointError, match=r"holds an array of numpy, '(x|again)', among tensors"):
            load_state_dict(file)
    else:
        same = load_state_dict(file)
        assert list(same) == list(WEIGHTS) and all(torch.equal(same[key], tensor) for key, tensor in WEIGHTS.items())


@pytest.mark.parametrize("form", [
    lambda a: a, np.ndarray.tolist, list, torch.from_numpy, lambda a: list(torch.from_numpy(a)), tuple,
    lambda a: [np.float32(c) for c in a], lambda a: [np.int64(2 * c) for c in a],
])  # fmt: skip
def test_coefficients_of_sine_waves_in_every_form_they_are_saved_in(folders, form) -> None:
    coef = form(np.array([0.5, 7.0]))
    points = np.arange(-np.pi, np.pi, 0.1)
    torch.save(OrderedDict(WEIGHTS, coef=coef, x=points, y=np.sin(points)), folders)
    zoo = load_dwsnets(folders.parent.parent / "splits.json", root=folders.parent)
    assert [zoo.column("coef_0")[0], zoo.column("coef_1")[0]] == [float(c) for c in coef]
    assert {key: tensor.tolist() for key, tensor in zoo.state_dict(0).items()} == {
        key: tensor.tolist() for key, tensor in WEIGHTS.items()
    }


def test_coefficients_that_are_no_numbers_are_refused(folders) -> None:
    wrong = ("12", b"12", {"a": 1}, [], ["1", "2"], [None], [[1.0]], 1.0, torch.ones(()), torch.ones(2, 2),
             [1j], [10**400], np.ones((2, 2)), np.array(1.0))  # fmt: skip
    for coef in wrong:
        torch.save({**WEIGHTS, "coef": coef}, folders)
        with pytest.raises(CheckpointError, match=r"net7.pth: its coef must be a few numbers"):
            load_dwsnets(folders.parent.parent / "splits.json", root=folders.parent)
    other = folders.with_name("net8.pth")
    torch.save({**WEIGHTS, "coef": [1.0]}, folders)
    torch.save({**WEIGHTS, "coef": [1.0, 2.0]}, other)
    (folders.parent / "splits.json").write_text('{"train": ["x/net7.pth", "x/net8.pth"]}')
    with pytest.raises(CheckpointError, match=r"net8.pth: its coef has 2 numbers, that of others 1"):
        load_dwsnets(folders.parent / "splits.json")


# ------------------------------------------------------------------------------------------------------ damaged files


@pytest.mark.parametrize("zipped", [True, False])
def test_truncated_pickles_with_arrays_are_refused(folders, zipped) -> None:
    content = {**WEIGHTS, "coef": np.array([1.0, 2.0]), "n": np.float32(1)}
    torch.save(content, folders, _use_new_zipfile_serialization=zipped)
    whole = folders.read_bytes()
    for keep in range(0, len(whole), 11):
        folders.write_bytes(whole[:keep])
        with pytest.raises(CheckpointError, match=r"net7.pth: (is damaged|refused|holds)"):
            load_plain(folders, arrays=True)
    if zipped:
        with_value(folders, array((1,)))
        with zipfile.ZipFile(folders) as source:
            pickled = next(source.read(entry) for entry in source.namelist() if entry.endswith("/data.pkl"))
        for keep in range(0, len(pickled) - 1, 5):
            with_pickle(folders, lambda _, keep=keep: pickled[:keep])
            with pytest.raises(CheckpointError, match=r"net7.pth: (is damaged|refused)"):
                load_plain(folders, arrays=True)


def test_pickles_with_changed_bytes_are_read_or_refused(folders) -> None:
    with_value(folders, b"]" + array((2,), data=raw(ADDRESS * 2)) + b"a" + call(SCALAR, F8, raw(ADDRESS)) + b"a")
    with zipfile.ZipFile(folders) as source:
        pickled = next(source.read(entry) for entry in source.namelist() if entry.endswith("/data.pkl"))
    start, chance, outcomes = pickled.index(value("coef")), random.Random(0), set()
    for _ in range(600):
        changed = bytearray(pickled)
        for _ in range(chance.choice([1, 1, 2, 4])):
            changed[chance.randrange(start, len(changed))] = chance.randrange(256)
        with_pickle(folders, lambda _, changed=changed: bytes(changed))
        try:
            load_plain(folders, arrays=True)
            outcomes.add("read")
        except CheckpointError:
            outcomes.add("refused")
    assert outcomes == {"read", "refused"}


# ---------------------------------------------------------------------------------------------- torch's list of names


@pytest.fixture
def allowed_by_the_program():
    """Names of numpy that a program has put on torch's list, as the advice in torch's error messages says."""
    theirs = [np.ndarray, np.dtype, type(np.dtype("O")), type(np.dtype("f8")), np.float64, Fraction,
              *((np.zeros(1).__reduce__()[0], f"{core}._reconstruct") for core in CORES),
              *((np.float64(0).__reduce__()[0], f"{core}.scalar") for core in CORES)]  # fmt: skip
    with torch.serialization.safe_globals(theirs):
        yield theirs


class Fraction:
    """A class that a program allows and that has nothing to do with numpy."""


def test_no_reader_asks_torch_to_load_or_looks_at_its_list(folders, allowed_by_the_program, monkeypatch) -> None:
    def asked(*_, **__):
        raise AssertionError("torch was asked")

    torch.save({**WEIGHTS, "coef": np.ones(2)}, folders)
    for name in ("load", "serialization.get_safe_globals", "serialization.add_safe_globals"):
        monkeypatch.setattr(f"torch.{name}", asked)
    load_nfn(folders.parent.parent).state_dict(0)
    load_dwsnets(folders.parent.parent / "splits.json", root=folders.parent)
    torch.save(WEIGHTS, folders)
    load_state_dict(folders)
    with pytest.raises(ValueError, match="is not one of fit's"):
        Progress.load(folders, {}, 1, torch.device("cpu"))


def test_what_the_program_allows_opens_no_way_around(folders, allowed_by_the_program) -> None:
    for case in HOSTILE:
        opcodes, message = HOSTILE[case]
        with_value(folders, opcodes)
        refused(folders, message)
        assert set(allowed_by_the_program) <= set(torch.serialization.get_safe_globals())
    torch.save({**WEIGHTS, "other": Fraction()}, folders)
    assert list(load_state_dict(folders)) == list(WEIGHTS)
    with pytest.raises(CheckpointError, match="Fraction"):
        load_plain(folders)  # no class of the program is made


def test_files_with_and_without_arrays_are_read_in_threads(tmp_path) -> None:
    torch.save({**WEIGHTS, "x": np.ones(3)}, tmp_path / "arrays.pth")
    torch.save(WEIGHTS, tmp_path / "plain.pth")
    failures = []

    def work(k: int) -> None:
        for _ in range(40):
            try:
                if k % 2:
                    assert as_array(load_plain(tmp_path / "arrays.pth", arrays=True)["x"]).tolist() == [1, 1, 1]
                else:
                    assert list(load_state_dict(tmp_path / "plain.pth")) == list(WEIGHTS)
                    with pytest.raises(CheckpointError, match="refused, it holds code or objects"):
                        load_plain(tmp_path / "arrays.pth")
            except BaseException as error:
                failures.append(error)

    before = set(torch.serialization.get_safe_globals())
    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and set(torch.serialization.get_safe_globals()) == before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_child_forked_while_another_thread_reads_can_read_too(tmp_path) -> None:
    torch.save({**WEIGHTS, "x": np.ones(3)}, tmp_path / "arrays.pth")
    over = threading.Event()

    def work() -> None:
        while not over.is_set():
            load_plain(tmp_path / "arrays.pth", arrays=True)

    before = set(torch.serialization.get_safe_globals())
    thread = threading.Thread(target=work)
    thread.start()
    try:
        for _ in range(10):
            child = os.fork()
            if child == 0:
                right = False
                try:
                    right = set(torch.serialization.get_safe_globals()) == before
                    right &= "x" in load_plain(tmp_path / "arrays.pth", arrays=True)
                finally:
                    os._exit(0 if right else 1)
            assert os.waitpid(child, 0)[1] == 0
    finally:
        over.set()
        thread.join()


def test_nothing_is_unpickled() -> None:
    """No module uses `torch.load` or its list of names, none unpickles, and `np.load` refuses pickles."""
    root = Path(sne_fast.__file__).parent
    modules = sorted(root.rglob("*.py"))
    assert len(modules) > 100
    for module in modules:
        for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute | ast.Name):
                used = ast.unparse(node)
                assert used != "torch.load" and "safe_globals" not in used, (module, used)
                assert used not in ("pickle.load", "pickle.loads", "pickle.Unpickler", "pickle._Unpickler")
                assert used not in ("torch.jit.load", "marshal.loads", "marshal.load", "shelve.open")
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("np.load", "numpy.load"):
                allowed = {k.arg: ast.unparse(k.value) for k in node.keywords}
                assert allowed.get("allow_pickle", "False") == "False", module
            if isinstance(node, ast.Call):
                keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
                assert keywords.get("weights_only", "True") == "True", module
