"""set_attention compiled for GPUs that are not here, with the sizes that the launch table gives there."""

from __future__ import annotations

import itertools

import pytest
import torch
import triton.language as tl

from helpers.op_cases import products
from helpers.triton_compiled import ALL_ARCHITECTURES, ARCHITECTURES, SHARED_LIMIT, Compiled, compile_kernel
from sne_fast.backends.triton import set_attention_kernels as kernels
from sne_fast.backends.triton.set_attention import Lengths, Plan

pytestmark = pytest.mark.build

TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
KERNELS = {
    "forward": (kernels.forward_kernel, "q k v out", "lse"),
    "query_grad": (kernels.query_grad_kernel, "grad q k v out grad_q", "lse mean"),
    "key_grad": (kernels.key_grad_kernel, "grad q k v grad_k grad_v", "lse mean"),
    "mean": (kernels.mean_kernel, "grad q k v", "lse mean"),
}
LONG, FEW = Lengths(8, 4096, 4096), Lengths(8, 32, 32)


def compiled(
    kernel: str, dtype: torch.dtype, h: int, heads: int, arch: int, own: Lengths = LONG, inner: Lengths = LONG
) -> Compiled:
    fn, of_dtype, sums = KERNELS[kernel]
    q = torch.empty(1, h, dtype=dtype, device="meta")
    sized = "query_grad" if kernel == "mean" else kernel
    plan = Plan.make(sized, q, own, inner, 8 * own.longest, 8 * inner.longest, heads, arch=arch)
    signature = dict.fromkeys(of_dtype.split(), TYPES[dtype]) | dict.fromkeys(sums.split(), "*fp32")
    if plan.split:  # partial results
        signature |= dict.fromkeys(("out" if kernel == "forward" else "", "grad_q", "grad_k", "grad_v"), "*fp32")
    signature |= {"q_ptr": "*i64", "k_ptr": "*i64", "sets": "i32", "max_own_rows": "i32"}
    mode = "read" if plan.split else "keys" if dtype != torch.float32 else "out"
    constants = plan.constants | ({"MEAN": mode} if kernel == "query_grad" else {})
    names = set(fn.arg_names)
    signature = {name: kind for name, kind in signature.items() if name in names}
    return compile_kernel(fn, signature, constants, arch, plan.sizes.num_warps, plan.sizes.num_stages)


def check(result: Compiled, arch: int, matrix: tuple[str, ...], registers: int) -> None:
    assert result.local_bytes == 0
    assert result.shared_bytes <= SHARED_LIMIT[arch]
    assert result.registers <= registers
    if matrix:
        assert result.matrix_instruction in matrix


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("kernel", ["forward", "query_grad", "key_grad"])
def test_long_sets_of_half_types_use_matrix_units(kernel: str, arch: int) -> None:
    matrix = {80: ("HMMA",), 90: ("HGMMA",), 100: ("UTCHMMA",)}[arch]
    check(compiled(kernel, torch.bfloat16, 64, 4, arch), arch, matrix, 255)


@pytest.mark.parametrize("kernel", ["forward", "query_grad", "key_grad", "mean"])
def test_few_rows_split_the_others(kernel: str) -> None:
    check(compiled(kernel, torch.bfloat16, 64, 4, 90, FEW, LONG), 90, ("HMMA",), 128)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("kernel", ["forward", "query_grad", "key_grad"])
def test_short_sets_of_one_tile(kernel: str, dtype: torch.dtype) -> None:
    short = Lengths(1000, 12, 9)
    check(compiled(kernel, dtype, 64, 4, 90, short, short), 90, ("HMMA",) if dtype == torch.bfloat16 else (), 255)


@pytest.mark.parametrize("kernel", ["forward", "query_grad", "key_grad"])
def test_float32_keeps_to_registers(kernel: str) -> None:
    check(compiled(kernel, torch.float32, 64, 4, 90), 90, (), 255)


SIZES = [(32, 4), (64, 1), (64, 8), (128, 4), (256, 4), (256, 32)]
EVERY = list(itertools.product(KERNELS, SIZES, TYPES, ALL_ARCHITECTURES))


@pytest.mark.variants("kernel, sizes, dtype, arch", [("mean", (32, 4), torch.bfloat16, 90)], EVERY)
def test_all_variants_fit(kernel: str, sizes: tuple[int, int], dtype: torch.dtype, arch: int) -> None:
    short, middle = Lengths(8, 12, 12), Lengths(8, 40, 40)
    for own, inner in itertools.product((short, middle, LONG), (short, LONG)):
        if kernel != "mean" or inner is LONG:
            result = compiled(kernel, dtype, *sizes, arch, own, inner)
            assert result.local_bytes <= 64 and result.shared_bytes <= SHARED_LIMIT[arch]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_combining_splits(arch: int) -> None:
    signature = {"partial": "*fp32", "partial_lse": "*fp32", "out": "*bf16", "lse": "*fp32", "max_own_rows": "i32"}
    constants = {"WIDTH": 64, "HEADS": 4, "D": 16, "COLUMNS": 64, "ROWS": 4, "SPLIT": 1024, "ACC": tl.float32}
    pointers = {"q_ptr": "*i64", "k_ptr": "*i64"}
    result = compile_kernel(kernels.combine_kernel, signature | pointers, constants, arch)
    assert result.local_bytes == 0 and result.registers <= 128


@pytest.mark.parametrize("kernel", ["forward", "query_grad", "key_grad"])
def test_tf32_where_torch_allows_it(kernel: str) -> None:
    with products("high"):
        check(compiled(kernel, torch.float32, 64, 4, 90), 90, ("HGMMA",), 255)
