"""The kernel behind a GPU's measured rate of exponentials, compiled for GPUs that are not here."""

from __future__ import annotations

import os

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("under the interpreter's switch a kernel is no compilable function", allow_module_level=True)

from helpers.triton_compiled import ARCHITECTURES, compile_kernel
from sne_fast.benchmark.exponential_kernels import exponential_chain_kernel
from sne_fast.benchmark.gpu_limits import EXPONENTIAL_BLOCK, EXPONENTIALS_PER_ELEMENT

pytestmark = pytest.mark.build


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_chain_of_exponentials_compiles_and_stays_in_registers(arch: int) -> None:
    sizes = {"STEPS": EXPONENTIALS_PER_ELEMENT, "BLOCK": EXPONENTIAL_BLOCK}
    result = compile_kernel(exponential_chain_kernel, {"x_ptr": "*fp32", "out_ptr": "*fp32"}, sizes, arch)
    assert result.local_bytes == 0 and result.shared_bytes == 0
    # A thread of four warps holds eight elements, loaded and stored four at a time.
    assert result.count("MUFU.EX2") >= EXPONENTIAL_BLOCK // (4 * 32)
    assert result.count("LDG.E.128") == 2 and result.count("STG.E.128") == 2


def test_a_launch_compiles_for_its_sizes() -> None:
    assert [p.name for p in exponential_chain_kernel.params if p.is_constexpr] == ["STEPS", "BLOCK"]
