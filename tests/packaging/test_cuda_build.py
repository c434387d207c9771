"""Builds of the CUDA library, with an nvcc and an nvidia-smi that only pretend."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import cuda_build
import native_build
import pytest

from helpers.paths import ROOT

NVCC = r"""#!/bin/sh
case "$*" in
  *--list-gpu-arch*) for n in {known}; do echo compute_$n; done; exit;;
  *--version*) echo {version}; exit;;
esac
echo "$*" >> "{log}"
{fail}
while [ $# -gt 0 ]; do
  case "$1" in -o) echo built > "$2"; shift;; -MF) echo "${{2%.d}}:" | sed 's/ /\\ /g' > "$2"; shift;; esac
  shift
done
"""


class Toolkit:
    """A folder of programs that is all of the PATH, but for the shell's own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.log = folder, folder / "log"
        folder.mkdir(parents=True)

    def program(self, name: str, text: str) -> None:
        path = self.folder / name
        path.write_text(text)
        path.chmod(0o755)

    def nvcc(self, known: str = "75 80 86 89 90 100 103 110 120 121", fail: str = "", version: int = 13) -> None:
        self.program("nvcc", NVCC.format(known=known, log=self.log, fail=fail, version=version))

    def gpus(self, *capabilities: str) -> None:
        lines = "\n".join(f"echo '{c}'" for c in capabilities)
        self.program("nvidia-smi", f"#!/bin/sh\n{lines}\n")

    def commands(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []


@pytest.fixture
def toolkit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Toolkit:
    made = Toolkit(tmp_path / "cuda" / "bin")
    monkeypatch.setenv("PATH", f"{made.folder}{os.pathsep}/bin")
    monkeypatch.setenv("CUDA_HOME", str(made.folder.parent))
    for name in ("CXX", "MAX_JOBS", "SNE_FAST_BUILD", "SNE_FAST_CUDA_ARCHS",
                 "SNE_FAST_SKIP_NATIVE", "SNE_FAST_WERROR"):  # fmt: skip
        monkeypatch.delenv(name, raising=False)
    cuda_build.known_architectures.cache_clear()
    return made


def chosen(toolkit: Toolkit) -> str:
    return " ".join(cuda_build.architectures(str(toolkit.folder / "nvcc")))


def test_architectures_without_a_gpu(toolkit: Toolkit) -> None:
    toolkit.nvcc()
    assert chosen(toolkit) == "80+ptx 90a 100"
    cuda_build.known_architectures.cache_clear()
    toolkit.nvcc("70 75 80 86 89 90")
    assert chosen(toolkit) == "80+ptx 90a", "an older toolkit"


@pytest.mark.parametrize(
    ("here", "expected"),
    [
        (["9.0"], "90a"),
        (["8.6", "8.0", "8.6"], "80 86"),
        (["12.0"], "120"),
        (["10.0"], "100"),
        (["10.3"], "100"),
        (["13.0"], "compute_121"),
        (["7.5"], "80+ptx 90a 100"),
        (["[N/A]"], "80+ptx 90a 100"),
    ],
)
def test_architectures_of_the_gpus_here(toolkit: Toolkit, here: list[str], expected: str) -> None:
    toolkit.nvcc()
    toolkit.gpus(*here)
    assert chosen(toolkit) == expected


def test_architectures_by_name(toolkit: Toolkit, monkeypatch: pytest.MonkeyPatch) -> None:
    toolkit.nvcc()
    monkeypatch.setenv("SNE_FAST_CUDA_ARCHS", "80;90a,120+ptx compute_121")
    assert chosen(toolkit) == "80 90a 120+ptx compute_121"
    names = chosen(toolkit).split()
    assert cuda_build.code_flags(names) == [
        "-gencode=arch=compute_80,code=[sm_80,sm_90a,sm_120]",
        "-gencode=arch=compute_120,code=[compute_120]",
        "-gencode=arch=compute_121,code=[compute_121]",
    ]
    assert cuda_build.code_flags(["100", "80+ptx"]) == ["-gencode=arch=compute_80,code=[sm_100,sm_80,compute_80]"]
    assert cuda_build.code_flags(["90a+ptx"]) == [
        "-gencode=arch=compute_90,code=[sm_90a]", "-gencode=arch=compute_90a,code=[compute_90a]"
    ]  # fmt: skip
    assert cuda_build.code_flags(names, "90a") == ["-gencode=arch=compute_90a,code=[sm_90a]"]
    assert cuda_build.code_flags(["80+ptx", "90a"], apart=True) == [
        "-gencode=arch=compute_80,code=[sm_80,compute_80]",
        "-gencode=arch=compute_90a,code=[sm_90a]",
    ]
    assert cuda_build.code_flags(["80"], "90a") == cuda_build.code_flags(["80"]), "a kernel that is not launched"
    for wrong in ("sm_80", "9.0", "compute_80+ptx", "all"):
        with pytest.raises(RuntimeError, match="is not like 80, 90a"):
            cuda_build.code_flags([wrong])
    with pytest.raises(RuntimeError, match=r"75: the kernels need compute capability 8.0"):
        cuda_build.code_flags(["75"])


def choose_ninja(monkeypatch: pytest.MonkeyPatch, ninja: bool) -> None:
    found = native_build.find_ninja()
    if ninja and found is None:
        pytest.skip("needs ninja")
    monkeypatch.setattr(native_build, "find_ninja", lambda: found if ninja else None)


@pytest.mark.parametrize("ninja", [True, False])
def test_every_source_is_compiled_and_linked(toolkit: Toolkit, tmp_path: Path, monkeypatch, ninja: bool) -> None:
    toolkit.nvcc()
    choose_ninja(monkeypatch, ninja)
    monkeypatch.setenv("SNE_FAST_WERROR", "1")
    monkeypatch.setenv("CXX", "g++-11 -march=native")
    target = tmp_path / "out" / "backend.so"
    assert cuda_build.build(target, tmp_path / "with space", ["80", "90a"]) == ["80", "90a"]
    assert target.read_text() == "built\n" and list(target.parent.iterdir()) == [target]
    *compiled, linked = toolkit.commands()
    assert len(compiled) == len(cuda_build.sources()) > 0
    own = [command for command in compiled if "compute_90a" in command]
    assert sum("compute_80" not in command for command in own) == 1, "one file is for sm_90 alone"
    assert sum("compute_80" in command for command in own) == 2, "some have a pass for each architecture"
    for command in compiled:
        assert "-std=c++17 -O3 -lineinfo" in command and "-Werror all-warnings" in command
        assert "-ccbin g++-11 " in command and "-DSNE_CUDA_ARCHS=80 90a" in command
        assert "fast" not in command.replace("sne_fast", "") and "torch" not in command.replace(str(ROOT), "")
    assert "-shared -cudart=static" in linked
    before = len(toolkit.commands())
    cuda_build.build(target, tmp_path / "with space", ["80", "90a"])
    assert len(toolkit.commands()) == before + (0 if ninja else len(compiled) + 1), "ninja compiles what has changed"


def test_some_files_can_be_built_alone(toolkit: Toolkit, tmp_path: Path) -> None:
    toolkit.nvcc()
    files = ["chunk_encode/weights", "chunk_encode/entry"]
    cuda_build.build(tmp_path / "some.so", tmp_path / "objects", ["80"], files)
    compiled = [command for command in toolkit.commands() if " -c " in command]
    assert len(compiled) == 2 and all(any(f"{file}.cu " in command for command in compiled) for file in files)
    with pytest.raises(RuntimeError, match="csrc/cuda has no file chunk_encode/nothing"):
        cuda_build.build(tmp_path / "some.so", tmp_path / "objects", ["80"], ["chunk_encode/nothing"])


@pytest.mark.parametrize("ninja", [True, False])
def test_what_the_compiler_says_is_in_the_message(toolkit: Toolkit, tmp_path: Path, monkeypatch, ninja: bool) -> None:
    choose_ninja(monkeypatch, ninja)
    toolkit.nvcc(fail="echo 'abi.cu(3): error: no such thing' >&2; exit 2")
    with pytest.raises(RuntimeError, match="no such thing"):
        cuda_build.build(tmp_path / "backend.so", tmp_path / "objects", ["80"])
    toolkit.nvcc(fail="echo '#error -- unsupported GNU version! gcc versions later than 15 are not supported!'; exit 1")
    with pytest.raises(RuntimeError, match=r"nvcc refuses the host compiler: set CXX to an older one.*later than 15"):
        cuda_build.build(tmp_path / "backend.so", tmp_path / "objects", ["80"])
    assert not (tmp_path / "backend.so").exists()


# ------------------------------------------------------------------------------------------------------------ setup.py


def install(toolkit: Toolkit, tmp_path: Path, **environment: str) -> tuple[subprocess.CompletedProcess[str], Path]:
    """Run ``setup.py build_ext`` with a CPU compiler that does nothing; return what it says, and the build's folder."""
    toolkit.program("g++", NVCC.format(known="", log=toolkit.folder / "g++.log", fail="", version=12))
    program = f"""
import sys; sys.argv[1:] = ["-q", "build_ext", "-b", {str(tmp_path / "lib")!r}, "-t", {str(tmp_path / "temp")!r}]
exec(compile(open({str(ROOT / "setup.py")!r}).read(), {str(ROOT / "setup.py")!r}, "exec"))
"""
    program = f"__file__ = {str(ROOT / 'setup.py')!r}\n" + program
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT,
        env={**os.environ, "SNE_FAST_CUDA_ARCHS": "80", **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done, tmp_path / "lib"


def error_file(folder: Path) -> Path:
    library = folder / native_build.CUDA_LIBRARY
    return library.with_name(f"{library.stem}_build_error.txt")


def test_a_plain_installation_without_a_gpu_says_nothing_of_cuda(toolkit: Toolkit, tmp_path: Path) -> None:
    if os.path.exists("/proc/driver/nvidia/version"):
        pytest.skip("there is a GPU here")
    toolkit.nvcc()
    done, folder = install(toolkit, tmp_path)
    assert [path for path in folder.rglob("*") if path.is_file()] == [folder / native_build.CPU_LIBRARY]
    assert "CUDA" not in done.stdout + done.stderr and toolkit.commands() == []


def test_it_is_built_when_asked_for_or_where_there_is_a_gpu(toolkit: Toolkit, tmp_path: Path) -> None:
    toolkit.nvcc()
    done, folder = install(toolkit, tmp_path, SNE_FAST_BUILD="cuda")
    assert (folder / native_build.CUDA_LIBRARY).exists() and "CUDA library was built for 80" in done.stderr
    done, folder = install(toolkit, tmp_path, SNE_FAST_BUILD="cpu")
    assert not (folder / native_build.CUDA_LIBRARY).exists()
    toolkit.gpus("9.0")
    assert (install(toolkit, tmp_path)[1] / native_build.CUDA_LIBRARY).exists()
    done, folder = install(toolkit, tmp_path, SNE_FAST_BUILD="cuda", SNE_FAST_SKIP_NATIVE="1")
    assert not (folder / native_build.CUDA_LIBRARY).exists()


def test_a_failure_is_a_message(toolkit: Toolkit, tmp_path: Path) -> None:
    done, folder = install(toolkit, tmp_path, SNE_FAST_BUILD="cuda")
    assert "sne_fast: the CUDA library was not built: there is no nvcc" in done.stderr
    assert "there is no nvcc" in error_file(folder).read_text()
    toolkit.nvcc(fail="echo broken; exit 1")
    done, folder = install(toolkit, tmp_path, SNE_FAST_BUILD="cuda")
    assert "broken" in error_file(folder).read_text()
    assert (folder / native_build.CPU_LIBRARY).exists() and not (folder / native_build.CUDA_LIBRARY).exists()
    toolkit.nvcc()
    done, folder = install(toolkit, tmp_path, SNE_FAST_BUILD="cuda")
    assert not error_file(folder).exists()
