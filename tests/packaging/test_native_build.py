"""Builds by csrc/native_build.py, with a real compiler on two small files: what is compiled again, and when."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import cpu_build
import native_build
import pytest
from native_build import Unit

from helpers.paths import ROOT

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


class Project:
    """Two files, one of which includes a header, and a compiler that notes what it is called for."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.log, self.version = folder, folder / "log", "1.0"
        folder.mkdir()
        self.target = folder / "out" / "library.so"
        self.write("one.h", "int one();")
        self.write("one.cpp", '#include "one.h"\nint one() { return 1; }')
        self.write("two.cpp", "int two() { return 2; }")
        self.compiler = folder / "c++"
        self.compiler.write_text(
            f'#!/bin/sh\ncase "$1" in --version) cat "{folder}/version"; exit;; esac\n'
            f'before=\nfor word; do [ "$before" = -o ] && basename "$word" >> "{self.log}"; before=$word; done\n'
            'exec g++ "$@"\n'
        )
        self.compiler.chmod(0o755)
        self.write("version", "1.0")
        monkeypatch.delenv("CXX", raising=False)

    def write(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text + "\n")

    def build(self, *flags: str) -> list[str]:
        """Build, and return what the compiler was called for."""
        self.log.write_text("")
        command = [str(self.compiler), "-fPIC", *flags]
        units = [Unit(self.folder / f"{name}.cpp", f"{name}.o", command) for name in ("one", "two")]
        native_build.build(self.target, self.folder / "build", units, [str(self.compiler), "-shared"])
        return sorted(self.log.read_text().split())


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    if native_build.find_ninja() is None:
        pytest.skip("needs ninja")
    return Project(tmp_path / "with space", monkeypatch)


def test_only_what_has_changed_is_compiled(project: Project) -> None:
    assert project.build() == ["library.so", "one.o", "two.o"]
    assert project.build() == []
    project.write("two.cpp", "int two() { return 3; }")
    assert project.build() == ["library.so", "two.o"]
    project.write("one.h", "int one(); int three();")
    assert project.build() == ["library.so", "one.o"], "a header"
    assert project.build("-DX='a b$c'") == ["library.so", "one.o", "two.o"], "flags"
    project.write("version", "2.0")
    assert project.build("-DX='a b$c'") == ["library.so", "one.o", "two.o"], "another compiler by the same name"
    assert project.build("-DX='a b$c'") == []


def test_a_library_that_is_gone_is_there_again(project: Project) -> None:
    project.build()
    project.target.unlink()
    assert project.build() == [] and project.target.exists()


def test_an_old_library_stays_until_the_new_one_is_whole(project: Project) -> None:
    project.build()
    before, inode = project.target.read_bytes(), os.stat(project.target).st_ino
    project.write("two.cpp", "int two() { return; }")
    with pytest.raises(RuntimeError, match=r"two.cpp:1:13: error"):
        project.build()
    assert project.target.read_bytes() == before
    project.write("two.cpp", "int two() { return 4; }")
    project.build()
    assert os.stat(project.target).st_ino != inode and os.listdir(project.target.parent) == ["library.so"]


def test_one_cpu_source_is_compiled_once_per_instruction_set() -> None:
    isas = cpu_build.instruction_sets()
    for source, compiled_for in (
        ("tensor_statistics", [isa for isa in isas if isa in cpu_build.ISA_FLAGS]),
        ("segment_pool", [isa for isa in isas if isa != "amx_bf16"]),
        ("chunk_encode_forward", isas),
    ):
        objects = [unit.object for unit in cpu_build.units() if unit.source.stem == source]
        assert objects == [f"{source}_{isa}.o" for isa in compiled_for]
    names = [unit.object for unit in cpu_build.units()]
    assert len(set(names)) == len(names)
    assert {unit.source for unit in cpu_build.units()} == set((ROOT / "csrc" / "cpu").rglob("*.cpp"))


def test_without_a_compiler_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(RuntimeError, match=r"no-such-compiler was not found \(install g\+\+, or set CXX\)"):
        cpu_build.build(tmp_path / "library.so", tmp_path / "build")
