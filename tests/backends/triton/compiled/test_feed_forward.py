"""feed_forward compiled for GPUs that are not here, with the sizes that the launch table gives there."""

from __future__ import annotations

import itertools

import pytest
import torch

from helpers.op_cases import products
from helpers.triton_compiled import (
    ALL_ARCHITECTURES,
    ARCHITECTURES,
    KINDS,
    TYPES,
    Compiled,
    check_resources,
    compile_kernel,
)
from sne_fast.backends.triton import feed_forward_kernels as kernels
from sne_fast.backends.triton.feed_forward import Plan

pytestmark = pytest.mark.build

KERNELS = {
    "forward": (kernels.forward_kernel, "q attended w_o b_o norm out", ""),
    "backward": (kernels.backward_kernel, "grad q attended w_o b_o norm sum_grad", "w_part b_part norm_part"),
}
SINGLE, BRAIN = torch.float32, torch.bfloat16


def compiled(
    kernel: str, arch: int, h: int = 64, dtype: torch.dtype = BRAIN, precision: str = "highest",
    layer_norm: bool = True, one_query: bool = False,
) -> Compiled | None:  # fmt: skip
    """Compile a kernel; return None where the table takes the staged form."""
    fn, operands, sums = KERNELS[kernel]
    with products(precision):
        plan = Plan.make(kernel, torch.empty(1, h, dtype=dtype, device="meta"), layer_norm, one_query, arch)
    if plan.is_staged:
        return None
    signature = dict.fromkeys(operands.split(), TYPES[dtype]) | dict.fromkeys(sums.split(), "*fp32")
    signature |= {"rows": "i32", "tiles": "i32"}
    return compile_kernel(fn, signature, plan.constants, arch, plan.sizes.num_warps, plan.sizes.num_stages)


def check(result: Compiled | None, arch: int, spill: int = 0, matrix: bool = True) -> Compiled:
    assert result is not None
    check_resources(result, arch, spill, matrix)
    return result


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("kernel", list(KERNELS))
@pytest.mark.parametrize("kind", [(BRAIN, "highest"), (SINGLE, "high")], ids=str)
def test_at_width_64_everything_stays_in_registers_and_on_matrix_units(kernel: str, kind, arch: int) -> None:
    result = check(compiled(kernel, arch, 64, *kind), arch)
    assert result.matrix_instruction == {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}[arch]


@pytest.mark.parametrize("kernel", list(KERNELS))
@pytest.mark.parametrize("change", [{"layer_norm": False}, {"one_query": True}], ids=str)
def test_without_layer_norm_and_with_one_query(kernel: str, change: dict[str, bool]) -> None:
    check(compiled(kernel, 90, **change), 90)


@pytest.mark.parametrize("kernel", list(KERNELS))
def test_float32_in_full_precision(kernel: str) -> None:
    check(compiled(kernel, 90, 64, SINGLE), 90, matrix=False)


@pytest.mark.parametrize("kernel", list(KERNELS))
def test_rows_are_read_16_bytes_at_a_time(kernel: str) -> None:
    result = check(compiled(kernel, 90), 90)
    loads = [line for line in result.sass.splitlines() if "LDG" in line]
    assert sum(".128" in line for line in loads) >= 2, loads


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("h", [32, 128, 256])
def test_other_widths(h: int, arch: int) -> None:
    check(compiled("forward", arch, h), arch)
    backward = compiled("backward", arch, h)
    assert (backward is None) == (h == 256), "a matrix of 256 columns leaves no room for the sum of its gradient"
    if backward is not None:
        check(backward, arch, 256)


EVERY = list(itertools.product(KERNELS, (32, 64, 128, 256), KINDS, ALL_ARCHITECTURES))


@pytest.mark.variants("kernel, h, kind, arch", [("forward", 32, (BRAIN, "highest"), 90)], EVERY)
def test_all_variants_fit(kernel: str, h: int, kind, arch: int) -> None:
    on_matrix_units = kind != (SINGLE, "highest")
    for layer_norm in (True, False):
        result = compiled(kernel, arch, h, *kind, layer_norm=layer_norm)
        if result is not None:
            allowed = 512 if kernel == "backward" else 64 if layer_norm else 192
            check(result, arch, allowed, on_matrix_units)
