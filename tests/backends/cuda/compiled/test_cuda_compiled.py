"""csrc/cuda compiled by nvcc for sm_80, sm_90a, sm_100: no warning, no spill where it matters, tensor cores used."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import cuda_build
import pytest

from helpers.cuda_compiled import (
    ARCHITECTURES,
    SHARED_LIMIT,
    Kernel,
    Object,
    _resources,
    all_compiled,
    compile_file,
    compiled,
    cuobjdump,
    needs_nvcc,
)
from helpers.paths import ROOT

FILES = sorted(cuda_build.name_of(source) for source in cuda_build.sources())
pytestmark = [pytest.mark.build, needs_nvcc]
needs_cuobjdump = pytest.mark.skipif(cuobjdump() is None, reason="needs cuobjdump, which comes with Triton")


def is_forward(kernel: Kernel) -> bool:
    return not re.search("backward|grad", kernel.name.partition("(")[0])


def is_wide(kernel: Kernel) -> bool:
    """Return True if a template argument is a width above 64; a number behind a shape is one of threads."""
    shape = re.search(r"ChunkShape<[^,]+, (\d+)", kernel.name)
    numbers = [shape[1]] if shape else re.findall(r"\b\d+\b", kernel.name.partition("<")[2])
    return any(int(number) > 64 for number in numbers)


@pytest.mark.parametrize("file", FILES)
def test_compiles_without_a_warning(file: str) -> None:
    found = compiled(file)
    print(f"{file}: {found.seconds:.0f} s", *found.kernels, sep="\n")  # pytest -rP shows it
    for kernel in found.kernels:
        assert kernel.arch in ARCHITECTURES and 0 < kernel.registers <= 255, kernel
        assert kernel.shared_bytes <= SHARED_LIMIT[kernel.arch], kernel


@pytest.mark.parametrize("file", FILES)
def test_forward_kernels_of_narrow_widths_spill_nothing(file: str) -> None:
    narrow = [kernel for kernel in compiled(file).kernels if is_forward(kernel) and not is_wide(kernel)]
    assert [str(kernel) for kernel in narrow if kernel.spilled_bytes] == []


@pytest.mark.parametrize("file", [file for file in FILES if file.startswith("set_block/operands")])
def test_the_backward_of_whole_blocks_spills_little(file: str) -> None:
    backward = [kernel for kernel in compiled(file).kernels if not is_forward(kernel)]
    assert len(backward) >= 4 * len(ARCHITECTURES), "queries and keys of two widths"
    assert [str(kernel) for kernel in backward if kernel.spilled_bytes > 512] == []


@needs_cuobjdump
@pytest.mark.parametrize("file", FILES)
def test_kernels_for_a_kind_of_operand_use_tensor_cores(file: str) -> None:
    """Find matrix instructions in kernels with an ``Op`` among their template arguments.

    One of them only puts weights in order, and those named after Hopper's instruction are empty elsewhere.
    """
    for kernel in compiled(file).kernels:
        elsewhere = "wgmma" in kernel.name and kernel.arch != "90a"
        if re.search(r"<.*\bsne::Op[A-Z]", kernel.name) and "::prepare<" not in kernel.name and not elsewhere:
            assert kernel.matrix_instruction, kernel


@needs_cuobjdump
@pytest.mark.parametrize("file", FILES)
def test_wgmma_is_in_the_kernels_that_are_named_so(file: str) -> None:
    for kernel in compiled(file).kernels:
        if "wgmma" in kernel.name and kernel.arch == "90a":
            assert kernel.matrix_instruction == "HGMMA", kernel


def test_the_library_links_and_loads_without_a_gpu(tmp_path: Path) -> None:
    """With every function that sne_fast calls, and no other one in sight."""
    nvcc = cuda_build.find_nvcc()
    assert nvcc is not None
    out = tmp_path / "libsne_fast_cuda.so"
    objects = [str(made.path) for made in all_compiled().values()]
    subprocess.run([*cuda_build.linker(nvcc, ARCHITECTURES), *objects, "-o", str(out)], check=True)
    code = (
        "import sys; from pathlib import Path; from sne_fast.backends.cuda import library\n"
        "lib = library.open_library(Path(sys.argv[1]))\n"
        "print(lib.sne_fast_cuda_architectures().decode(), *library.SYMBOLS, sep='\\n')\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(out)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    architectures, *symbols = done.stdout.splitlines()
    assert architectures == " ".join(ARCHITECTURES)
    exported = subprocess.run(
        ["nm", "-D", "--defined-only", str(out)], capture_output=True, text=True, check=True
    ).stdout
    assert set(re.findall(r"\bT (\w+)", exported)) == set(symbols)


# ------------------------------------------------------------------------------------------------- the helper itself


@pytest.fixture(scope="module")
def example() -> Object:
    return compile_file(ROOT / "tests" / "backends" / "cuda" / "emulated" / "emulator_kernels.cu")


def test_resources_are_read(example: Object) -> None:
    names = {"multiply", "pass_on", "load_four", "diverge", "exchange"}
    for arch in ARCHITECTURES:
        here = [kernel for kernel in example.kernels if kernel.arch == arch]
        assert all(any(name in kernel.name for kernel in here) for name in names)
        assert all(8 <= kernel.registers <= 255 and not kernel.spilled_bytes for kernel in here)


@needs_cuobjdump
def test_matrix_instructions_are_counted(example: Object) -> None:
    for kernel in example.kernels:
        assert kernel.matrix_instruction == ("HMMA" if "multiply" in kernel.name else ""), kernel
        if "load_four" in kernel.name:
            assert kernel.count("LDSM") == 2 and kernel.count("MOVM") == 4


def test_what_ptxas_prints_is_read() -> None:
    log = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z7forwardv' for 'sm_90a'
ptxas info    : Function properties for _Z7forwardv
    48 bytes stack frame, 24 bytes spill stores, 36 bytes spill loads
ptxas info    : Used 168 registers, used 1 barriers, 48 bytes cumulative stack size, 1024 bytes smem
ptxas info    : Compiling entry function '_Z8backwardv' for 'sm_80'
ptxas info    : Function properties for _Z8backwardv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 0 barriers
"""
    forward = {"registers": 168, "stack_bytes": 48, "spilled_bytes": 60, "shared_bytes": 1024}
    backward = {"registers": 40, "stack_bytes": 0, "spilled_bytes": 0, "shared_bytes": 0}
    assert _resources(log) == {("_Z7forwardv", "90a"): forward, ("_Z8backwardv", "80"): backward}


def test_forward_and_wide_kernels_are_known_by_their_names() -> None:
    def kernel(name: str) -> Kernel:
        return Kernel(name, "80", 1, 0, 0, 0, {})

    assert is_forward(kernel("void sne::forward<sne::OpBfloat, 64, 16>(sne::Grads)"))
    assert not is_forward(kernel("void sne::query_grads<sne::OpBfloat, 64>(long)"))
    assert is_wide(kernel("void sne::forward<sne::OpTf32, 128>(long)"))
    assert not is_wide(kernel("void sne::forward<sne::OpTf32, 64>(long)")) and not is_wide(kernel("gather(long)"))
