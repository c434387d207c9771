"""pool_block compiled for GPUs that are not here, with the sizes that the launch table gives there."""

from __future__ import annotations

import itertools

import pytest
import torch

from helpers.op_cases import products
from helpers.triton_compiled import ALL_ARCHITECTURES, ARCHITECTURES, SHARED_LIMIT, Compiled, compile_kernel
from sne_fast.backends.gpu_plans.lengths import Lengths
from sne_fast.backends.triton import pool_block_kernels as kernels
from sne_fast.backends.triton.pool_block import Plan

pytestmark = pytest.mark.build

TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
KERNELS = {name: getattr(kernels, f"{name}_kernel") for name in ("forward", "backward")}
INDICES, COUNTS = ("ptr", "owner"), ("sets", "tiles")
SINGLE, BRAIN, HALF = torch.float32, torch.bfloat16, torch.float16
# float32 has the products of full precision ("highest") or tf32 ("high"), by torch's setting.
KINDS = [(BRAIN, "highest"), (HALF, "highest"), (SINGLE, "high"), (SINGLE, "highest")]


def compiled(
    kernel: str, arch: int, h: int = 64, heads: int = 4, dtype: torch.dtype = BRAIN, precision: str = "highest",
    layer_norm: bool = True, typical: int = 20,
) -> Compiled:  # fmt: skip
    """Compile a kernel."""
    with products(precision):
        rows = torch.empty(1, h, dtype=dtype, device="meta")
        plan = Plan.make(kernel, rows, heads, layer_norm, Lengths(100, typical, typical), arch)
    fn, sizes = KERNELS[kernel], plan.sizes
    signature = {name: TYPES[dtype] for name in fn.arg_names if name not in plan.constants}
    signature |= {name: "*fp32" for name in signature if name.endswith("_part")}
    signature |= {name: "*i64" if name in INDICES else "i32" for name in (*INDICES, *COUNTS) if name in signature}
    return compile_kernel(fn, signature, plan.constants, arch, sizes.num_warps, sizes.num_stages, maxnreg=sizes.maxnreg)


def check(result: Compiled, arch: int, spill: int = 0, matrix: bool = True) -> None:
    print(f"sm_{arch}: {result.registers} registers, {result.local_bytes} local bytes, {result.shared_bytes} shared "
          f"bytes, {result.matrix_instruction}")  # fmt: skip
    assert result.registers <= 255 and result.local_bytes <= spill
    assert result.shared_bytes <= SHARED_LIMIT[arch]
    assert bool(result.matrix_instruction) == matrix


@pytest.mark.parametrize(("typical", "arch"), [(2, 90), *((20, arch) for arch in ARCHITECTURES)])
def test_the_forward_stays_in_registers_and_on_matrix_units(typical: int, arch: int) -> None:
    check(compiled("forward", arch, typical=typical), arch)


@pytest.mark.parametrize("h", [32, 64])
def test_tf32_and_float32_in_full_precision(h: int) -> None:
    check(compiled("forward", 90, h, dtype=SINGLE, precision="high"), 90)
    check(compiled("forward", 90, h, dtype=SINGLE), 90, matrix=False)


def test_the_backward() -> None:
    check(compiled("backward", 90), 90, 256)


EVERY = list(itertools.product(KERNELS, ((32, 4), (64, 4), (64, 8), (64, 1)), KINDS, ALL_ARCHITECTURES))


@pytest.mark.variants("kernel, sizes, kind, arch", [("forward", (32, 4), (BRAIN, "highest"), 90)], EVERY)
def test_all_variants_fit(kernel: str, sizes: tuple[int, int], kind, arch: int) -> None:
    on_matrix_units = kind != (SINGLE, "highest")
    for layer_norm in (True, False):
        result = compiled(kernel, arch, *sizes, *kind, layer_norm=layer_norm)
        check(
            result,
            arch,
            (64 if sizes[1] == 8 else 0) if kernel == "forward" else 512 if on_matrix_units else 2048,
            on_matrix_units,
        )
