"""Files are written whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from sne_fast.atomic_files import (
    TEMPORARY,
    filling,
    remove_leftovers,
    replacing,
    to_json,
    write_bytes,
    write_json,
    write_text,
)


def test_the_file_appears_at_the_end_with_all_its_content(tmp_path: Path) -> None:
    file = tmp_path / "result.npz"
    file.write_text("old")
    with replacing(file) as temporary:
        stage = temporary.parent
        assert stage.parent == tmp_path and stage.name.startswith(".") and stage.suffix == ".tmp"
        assert not temporary.suffix, "no search for files by suffix takes a leftover for a result"
        temporary.write_text("new")
        assert file.read_text() == "old"
    assert file.read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["result.npz"]


def test_a_failure_leaves_what_was_there_and_nothing_else(tmp_path: Path) -> None:
    kept, absent = tmp_path / "kept.txt", tmp_path / "absent.txt"
    kept.write_text("old")
    for file in (kept, absent):
        with pytest.raises(ZeroDivisionError), replacing(file) as temporary:
            temporary.write_text("half")
            raise ZeroDivisionError
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_json(kept, {"a": object()})
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"kept.txt": "old"}


def test_content_is_on_the_disk_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: (calls.append("fsync"), fsync(descriptor)))
    monkeypatch.setattr(os, "replace", lambda source, target: (calls.append("replace"), replace(source, target)))
    write_text(tmp_path / "a", "text")
    assert calls == ["fsync", "replace", "fsync"]  # the content, the new name, the folder that holds the name


def test_permissions_are_those_of_an_ordinary_new_file(tmp_path: Path) -> None:
    (tmp_path / "ordinary").write_text("")
    with replacing(tmp_path / "private") as temporary:
        temporary.unlink()
        os.close(os.open(temporary, os.O_CREAT | os.O_WRONLY, 0o600))
    modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert len(modes) == 1


def test_text_bytes_and_json(tmp_path: Path) -> None:
    write_text(tmp_path / "text", "größer\r\n")
    assert (tmp_path / "text").read_bytes() == "größer\r\n".encode()
    write_bytes(tmp_path / "bytes", b"\0\1")
    assert (tmp_path / "bytes").read_bytes() == b"\0\1"
    write_json(tmp_path / "json", {"b": [1, None], "a": 0.5})
    text = (tmp_path / "json").read_text(encoding="utf-8")
    assert json.loads(text) == {"b": [1, None], "a": 0.5} and text.endswith("}\n") and "\n  " in text


def test_a_folder_that_is_missing_or_in_the_way_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_text(tmp_path / "missing" / "file", "")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError):
        write_text(tmp_path / "folder", "")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_new_folder_appears_whole_and_files_of_an_old_one_are_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    with filling(folder) as stage:
        (stage / "a").write_text("1")
        (stage / "b").write_text("1")
        assert not folder.exists()
    (folder / "notes").write_text("kept")
    with filling(folder) as stage:
        (stage / "a").write_text("2")
        assert (folder / "a").read_text() == "1"
    assert {path.name: path.read_text() for path in folder.iterdir()} == {"a": "2", "b": "1", "notes": "kept"}
    for target in (folder, tmp_path / "other"):
        with pytest.raises(ZeroDivisionError), filling(target) as stage:
            (stage / "a").write_text("half")
            raise ZeroDivisionError
    assert [path.name for path in tmp_path.iterdir()] == ["model"] and (folder / "a").read_text() == "2"
    assert len(list(folder.iterdir())) == 3


def test_no_regular_file_is_replaced_by_one(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="it is no regular file") as raised:
        write_text(tmp_path / "pipe", "")
    assert raised.value.filename == str(tmp_path / "pipe")
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


WRITER = """
import sys, time
from pathlib import Path
from sne_fast.atomic_files import filling, replacing
write = filling if sys.argv[2] == "filling" else replacing
with write(Path(sys.argv[1])) as temporary:
    (temporary / "a" if write is filling else temporary).write_text("half")
    print("writing", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("kind", ["replacing", "filling"])
def test_what_a_killed_writer_left_is_removed_by_the_next(kind: str, tmp_path: Path) -> None:
    writer = subprocess.Popen([sys.executable, "-c", WRITER, tmp_path / "new", kind], stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None and writer.stdout.readline() == "writing\n"
    write_text(tmp_path / "other", "1")
    assert len(list(tmp_path.iterdir())) == 2, "a writer that is alive keeps its file"
    writer.send_signal(signal.SIGKILL)
    writer.communicate()
    (left,) = set(tmp_path.iterdir()) - {tmp_path / "other"}
    assert TEMPORARY.fullmatch(left.name)
    write_text(tmp_path / "another", "2")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["another", "other"]


def test_a_leftover_that_was_not_even_locked_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".a.npz.0123abcd.tmp").mkdir()
    (tmp_path / ".notes.tmp").mkdir()
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".notes.tmp"]
    remove_leftovers(tmp_path / "missing")


def test_many_writers_of_one_file_leave_one_whole_file(tmp_path: Path) -> None:
    errors: list[BaseException] = []

    def write(letter: str) -> None:
        try:
            for _ in range(30):
                write_text(tmp_path / "file", letter * 5000)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(letter,)) for letter in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and [path.name for path in tmp_path.iterdir()] == ["file"]
    assert len(set((tmp_path / "file").read_text())) == 1


def test_a_long_name_leaves_room_for_the_temporary_one(tmp_path: Path) -> None:
    write_text(tmp_path / ("ö" * 127), "text")
    assert (tmp_path / ("ö" * 127)).read_text() == "text"


def test_a_full_disk_is_an_error_that_names_the_file_and_leaves_no_part(tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(OSError) as raised:
            write_bytes(tmp_path / "kept", bytes(20_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert raised.value.errno == errno.EFBIG and raised.value.filename == str(tmp_path / "kept")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"kept": "old"}


def test_json_has_no_nan_and_no_infinity(tmp_path: Path) -> None:
    content = {
        "r2": float("-inf"),
        "each": [1.5, float("nan"), (float("inf"), None)],
        "deep": {"a": {"b": float("nan")}},
    }
    write_json(tmp_path / "a.json", content)

    def refused(constant: str) -> None:
        raise AssertionError(constant)

    found = json.loads((tmp_path / "a.json").read_text(), parse_constant=refused)
    assert found == {"r2": None, "each": [1.5, None, [None, None]], "deep": {"a": {"b": None}}}


def test_content_that_json_cannot_hold_is_refused(tmp_path: Path) -> None:
    itself: list[object] = []
    itself.append(itself)
    with pytest.raises(ValueError, match="nested too deeply, or holds itself"):
        write_json(tmp_path / "a.json", itself)
    assert list(tmp_path.iterdir()) == []
    assert to_json({"path": Path("a")}, indent=None, default=str) == '{"path": "a"}'
