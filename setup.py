"""Builds the engines: sne_fast/_cpu_engine.so with g++ alone, and sne_fast/_cuda_engine.so where nvcc is wanted.

The libraries have a plain C interface and are loaded with ctypes: no Python headers, no torch, and a wheel tagged
py3-none-<platform>. Where a compiler is missing or fails, the installation goes through without that library, prints
why, and leaves the reason in sne_fast/_cpu_engine_build_error.txt (_cuda_...) for ``sne_fast.explain()``.

Environment: SNE_FAST_BUILD=cuda asks for the CUDA engine, which is otherwise built where there is a GPU's driver,
SNE_FAST_BUILD=cpu leaves it out (csrc/cuda_build.py reads more); CXX names the compiler, SNE_FAST_SKIP_NATIVE=1 builds
without engines, SNE_FAST_WERROR=1 (developers) turns warnings into errors, MAX_JOBS limits how many compilers run.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "csrc"))
import cuda_build  # noqa: E402

CPU, CUDA = "sne_fast._cpu_engine", "sne_fast._cuda_engine"
SERVES_INSTEAD = {
    CPU: "ops run on the slower reference engine",
    CUDA: "on a GPU the Triton engine serves, where Triton is installed",
}

# One source per op, compiled once per instruction set; the rest is compiled once.
FLAVOURED = ["flavour", "chunk_encode_forward", "chunk_encode_backward", "set_attention_forward",
             "set_attention_backward", "segment_pool"]  # fmt: skip
PLAIN = ["abi", "tile_plan", "gather_chunks"]
ISA_FLAGS = {
    "portable": [],
    "avx2": ["-mavx2", "-mfma"],
    "avx512": ["-mavx2", "-mfma", "-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl",
               "-mprefer-vector-width=512", "-Wno-uninitialized", "-Wno-maybe-uninitialized"],  # gcc 12: PR105593
}  # fmt: skip
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math",
         "-ffp-contract=fast", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Wno-psabi"]  # fmt: skip


def flavours() -> list[str]:
    return list(ISA_FLAGS) if platform.machine() in ("x86_64", "AMD64") else ["portable"]


def units() -> list[tuple[str, list[str]]]:
    """Every translation unit: source name and its own flags."""
    flavoured = [(name, [f"-DSNE_ISA_{isa}", *ISA_FLAGS[isa]]) for isa in flavours() for name in FLAVOURED]
    # The longest compilations first, so that they do not run alone at the end.
    return sorted(flavoured, key=lambda unit: "chunk_encode" not in unit[0]) + [(name, []) for name in PLAIN]


def compile_library(target: Path, objects: Path, extra: Sequence[str] = (), sources: Sequence[str] = ()) -> None:
    """Compiles csrc into ``target``; ``extra`` flags and ``sources`` (of a program) are for csrc/tests."""
    cxx = shlex.split(os.environ.get("CXX", "g++"))
    if shutil.which(cxx[0]) is None:
        raise RuntimeError(f"there is no C++ compiler: {cxx[0]} was not found (install g++, or set CXX)")
    common = [*FLAGS, f"-I{ROOT / 'csrc' / 'include'}", f"-I{ROOT / 'csrc'}", *extra]
    if os.environ.get("SNE_FAST_WERROR"):
        common.append("-Werror")
    objects.mkdir(parents=True, exist_ok=True)
    commands = []
    for i, (name, flags) in enumerate(units()):
        source = ROOT / "csrc" / "cpu" / f"{name}.cpp"
        commands.append([*cxx, *common, *flags, "-c", str(source), "-o", str(objects / f"{i}_{name}.o")])
    for i, source_name in enumerate(sources):
        commands.append([*cxx, *common, "-c", source_name, "-o", str(objects / f"extra_{i}.o")])

    def run(command: list[str]) -> None:
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            lines = (result.stderr or result.stdout).strip().splitlines()
            raise RuntimeError(f"{shlex.join(command)} failed: " + "\n".join(lines[:20]))

    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", available))) as pool:
        list(pool.map(run, commands))
    kind = [] if sources else ["-shared"]
    link_only = [flag for flag in extra if flag.startswith("-fsanitize")]
    target.parent.mkdir(parents=True, exist_ok=True)
    run([*cxx, *kind, "-fopenmp", *link_only, *(command[-1] for command in commands), "-o", str(target)])


def cuda_wanted() -> bool:
    """By SNE_FAST_BUILD, else by whether there is a GPU's driver."""
    asked = os.environ.get("SNE_FAST_BUILD", "").replace(",", " ").split()
    if unknown := set(asked) - {"cpu", "cuda"}:
        print(f"sne_fast: SNE_FAST_BUILD: {', '.join(sorted(unknown))} is not cpu or cuda", file=sys.stderr)
    if os.environ.get("SNE_FAST_SKIP_NATIVE"):
        return False
    return "cuda" in asked if asked else cuda_build.gpu_driver()


class BuildEngine(build_ext):
    """build_ext for the two "extensions" there are; a failure is a message, not the end of the installation."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.into_source = bool(self.inplace)  # which run() sets to false while it builds

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join("sne_fast", f"{fullname.rpartition('.')[2]}.so")

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        error_file = target.with_name(f"{target.stem}_build_error.txt")
        error_file.unlink(missing_ok=True)
        objects = Path(self.build_temp) / target.stem.strip("_")
        try:
            if ext.name == CUDA:
                if cuda_wanted():
                    names = cuda_build.build(target, objects)
                    print(f"sne_fast: the CUDA engine was built for {' '.join(names)}", file=sys.stderr)
                else:
                    target.unlink(missing_ok=True)  # an older one would not fit
            elif os.environ.get("SNE_FAST_SKIP_NATIVE"):
                raise RuntimeError("SNE_FAST_SKIP_NATIVE was set")
            else:
                compile_library(target, objects)
        except (RuntimeError, OSError, subprocess.SubprocessError) as error:
            target.unlink(missing_ok=True)
            target.parent.mkdir(parents=True, exist_ok=True)
            error_file.write_text(f"{error}\n", encoding="utf-8")
            name = "CUDA" if ext.name == CUDA else "CPU"
            print(f"sne_fast: the {name} engine was not built: {error}", file=sys.stderr)
            print(f"sne_fast: installing without it; {SERVES_INSTEAD[ext.name]}.", file=sys.stderr)

    def copy_extensions_to_source(self) -> None:
        # A build in place or an editable one wrote straight into the package already, see get_ext_fullpath.
        pass

    def get_ext_fullpath(self, ext_name: str) -> str:
        base = ROOT if self.into_source or getattr(self, "editable_mode", False) else Path(self.build_lib)
        return str(base / self.get_ext_filename(ext_name))

    def get_outputs(self) -> list[str]:
        return [path for path in super().get_outputs() if os.path.exists(path)]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class PlatformWheel(bdist_wheel):
    """The library needs a platform but no particular Python."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.root_is_pure = False

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


if __name__ == "__main__":
    setup(
        ext_modules=[Extension(CPU, sources=[]), Extension(CUDA, sources=[])],
        cmdclass={"build_ext": BuildEngine, "bdist_wheel": PlatformWheel},
    )
