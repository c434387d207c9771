"""The fuzz target of the C interface: its corpus of inputs that once failed, and random ones for a moment."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from pathlib import Path

import native_build
import pytest
import sanitize

from helpers import artefacts
from helpers.paths import ROOT

FUZZ = ROOT / "csrc" / "fuzz"


def load_run():
    spec = importlib.util.spec_from_file_location("fuzz_run", FUZZ / "run.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.build
@pytest.mark.slow
@pytest.mark.skipif(shutil.which(native_build.host_compiler()[0]) is None, reason="needs a C++ compiler")
def test_the_corpus_and_random_inputs_keep_the_promises_of_the_interface(tmp_path):
    run = load_run()

    def make(folder: Path) -> None:
        run.build(folder / "abi_fuzz", native_build.BUILD_FOLDER / "sanitized", None)

    parts = [*sanitize.SANITIZE, artefacts.version(native_build.host_compiler()[0])]
    key = artefacts.digest(parts, artefacts.native_sources("cpu", "include", "fuzz"))
    program = artefacts.kept("fuzz", key, make) / "abi_fuzz"
    result = subprocess.run(
        [program, run.CORPUS, "3"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=sanitize.environment(),
        timeout=900,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.endswith("random inputs: all good\n")
    assert all(file.name in result.stderr for file in run.CORPUS.iterdir())


def test_without_clang_the_command_says_what_to_install(monkeypatch, capsys):
    run = load_run()
    monkeypatch.setattr(run, "clang", lambda: None)
    monkeypatch.setattr("sys.argv", ["run.py"])
    assert run.main() == 2
    assert "apt-get install clang libclang-rt-14-dev" in capsys.readouterr().err
