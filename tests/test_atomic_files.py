"""Files are written whole or not at all."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest

from sne_fast.atomic_files import filling, replacing, write_bytes, write_json, write_text


def test_the_file_appears_at_the_end_with_all_its_content(tmp_path: Path) -> None:
    file = tmp_path / "result.npz"
    file.write_text("old")
    with replacing(file) as temporary:
        assert temporary.parent == tmp_path and temporary.name.startswith(".") and temporary.suffix == ".tmp"
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
    assert calls == ["fsync", "replace"]


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
