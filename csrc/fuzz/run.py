"""Fuzz the C interface of the CPU library under AddressSanitizer and UBSan.

python csrc/fuzz/run.py                     # libFuzzer for 60 seconds, from csrc/fuzz/corpus; needs clang
python csrc/fuzz/run.py --seconds 3600      # longer
python csrc/fuzz/run.py --gcc --seconds 10  # without clang: the corpus, and its files with bytes changed at random

The exit status is 0 when nothing was found. An input that fails is left in build/native/fuzz/found; put it into
csrc/fuzz/corpus, under a name that says what it does, together with the mend. Clang's run has one thread, as its
OpenMP is often missing; gcc's has several.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import cpu_build
import native_build
import sanitize
from native_build import CSRC, Unit

FUZZ = CSRC / "fuzz"
CORPUS = FUZZ / "corpus"
FOLDER = native_build.BUILD_FOLDER / "fuzz"
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer", "-g1"]
# Without OpenMP for clang: its header is ours, and its pragmas are ignored.
CLANG = ["-O1", "-fsanitize=fuzzer-no-link", "-fno-openmp", f"-I{FUZZ / 'one_thread'}", "-Wno-everything", *SANITIZE]
GCC = sanitize.SANITIZE  # the flags of the C++ tests, whose objects then serve here too
MISSING = (
    "fuzz/run.py: needs clang++ with libFuzzer, which was not found (Debian: apt-get install clang libclang-rt-14-dev; "
    "or set CLANGXX); --gcc runs a short form with g++"
)


def clang() -> str | None:
    """Return a clang++ that has libFuzzer; None without one."""
    found = shutil.which(os.environ.get("CLANGXX", "clang++"))
    if found is None:
        return None
    runtime = subprocess.run(
        [found, "-print-file-name=libclang_rt.fuzzer-x86_64.a"], capture_output=True, text=True
    ).stdout.strip()
    directory = subprocess.run([found, "-print-runtime-dir"], capture_output=True, text=True).stdout.strip()
    has = os.path.isabs(runtime) or any(Path(directory).parent.glob("**/libclang_rt.fuzzer*.a"))
    return found if has else None


def build(program: Path, folder: Path, compiler: str | None) -> None:
    """Compile the library and the fuzz target into ``program``: with libFuzzer by clang, else with a driver by g++."""
    if compiler is not None:
        os.environ["CXX"] = compiler
        extra, link, sources = CLANG, [compiler, "-fsanitize=fuzzer"], ["abi_fuzz.cpp"]
    else:
        extra, link, sources = GCC, [*native_build.host_compiler(), "-fopenmp"], ["abi_fuzz.cpp", "driver.cpp"]
    units = [Unit(FUZZ / name, name.replace(".cpp", ".o"), cpu_build.compiler(extra)) for name in sources]
    native_build.build(program, folder, [*cpu_build.units(extra), *units], [*link, SANITIZE[0]])


def run(program: Path, seconds: float, libfuzzer: bool, corpus: Path = CORPUS) -> int:
    """Run the target; return the exit status of the first failure."""
    found = FOLDER / "found"
    found.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=1:allocator_may_return_null=1", "OMP_NUM_THREADS": "2"}
    if not libfuzzer:
        command = [str(program), str(corpus), str(seconds)]
    else:
        grown = FOLDER / "grown"  # what libFuzzer finds interesting stays out of the committed corpus
        grown.mkdir(exist_ok=True)
        command = [
            str(program), f"-max_total_time={max(1, round(seconds))}", "-max_len=1024", "-timeout=60",
            f"-artifact_prefix={found}/", str(grown), str(corpus),
        ]  # fmt: skip
    return subprocess.run(command, env=environment, cwd=found).returncode


def main() -> int:
    """Parse the command line, build and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--gcc", action="store_true", help="the short form, with g++ and no libFuzzer")
    options = parser.parse_args()
    compiler = None if options.gcc else clang()
    if compiler is None and not options.gcc:
        print(MISSING, file=sys.stderr)
        return 2
    folder = native_build.BUILD_FOLDER / "sanitized" if options.gcc else FOLDER / "clang"
    program = folder / "bin" / "abi_fuzz"
    build(program, folder, compiler)
    return run(program, options.seconds, libfuzzer=not options.gcc)


if __name__ == "__main__":
    sys.exit(main())
