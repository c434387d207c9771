"""segment_pool and gather_chunks compiled for GPUs that are not here."""

from __future__ import annotations

import itertools

import pytest
import torch
import triton.language as tl

from helpers.triton_compiled import ALL_ARCHITECTURES, ARCHITECTURES, SHARED_LIMIT, Compiled, compile_kernel
from sne_fast.backends.gpu_plans.lengths import Lengths
from sne_fast.backends.triton import gather_chunks_kernels, pieces_kernels, segment_pool_kernels
from sne_fast.backends.triton.launches import launch
from sne_fast.backends.triton.segment_pool import Plan

pytestmark = pytest.mark.build

TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
LENGTHS = {"short": [20] * 1000, "middle": [100] * 1000, "long": [1 << 20]}
POINTERS = {"ptr": "*i64", "sets": "i32"}


def pool(kernel: str, dtype: torch.dtype, h: int, queries: int, lengths: str, arch: int) -> Compiled:
    x, sizes = torch.empty(1, h, dtype=dtype, device="meta"), LENGTHS[lengths]
    plan = Plan.make(kernel, x, queries, Lengths(len(sizes), sizes[0], sizes[0]), arch=arch, rows=sum(sizes))
    kind, constants = TYPES[dtype], dict(plan.constants)
    if kernel == "forward":
        fn, sums = segment_pool_kernels.forward_kernel, ["lse", "part", "part_lse"]
        signature = {"x": kind, "logits": kind, "out": kind}
    else:
        fn, sums = segment_pool_kernels.backward_kernel, ["lse", "weights_grad", "mean"]
        signature = {"grad": kind, "x": kind, "logits": kind, "grad_x": kind, "first_query": "i32"}
        constants["ADD"] = False
    signature |= POINTERS | dict.fromkeys(sums, "*fp32")
    return compile_kernel(fn, signature, constants, arch, plan.sizes.num_warps, plan.sizes.num_stages)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("lengths", list(LENGTHS))
@pytest.mark.parametrize("kernel", ["forward", "backward"])
def test_pooling_keeps_to_registers_and_loads_16_bytes(kernel: str, lengths: str, arch: int) -> None:
    result = pool(kernel, torch.bfloat16, 64, 4, lengths, arch)
    assert result.local_bytes == 0 and result.registers <= 255 and result.shared_bytes <= SHARED_LIMIT[arch]
    wide = [line for line in result.sass.splitlines() if "LDG" in line or "LDGSTS" in line]
    assert any(".128" in line for line in wide), wide


@pytest.mark.parametrize("kernel", ["forward", "backward"])
def test_pooling_of_float32(kernel: str) -> None:
    result = pool(kernel, torch.float32, 64, 4, "long", 90)
    assert result.local_bytes == 0 and result.registers <= 255


SIZES = [(32, 4), (64, 1), (128, 8), (256, 4), (256, 32), (48, 3)]
EVERY_POOLING = list(itertools.product(("forward", "backward"), SIZES, TYPES, ALL_ARCHITECTURES))


@pytest.mark.variants("kernel, sizes, dtype, arch", [("forward", (48, 3), torch.float32, 80)], EVERY_POOLING)
def test_all_pooling_variants(kernel: str, sizes: tuple[int, int], dtype: torch.dtype, arch: int) -> None:
    for lengths in LENGTHS:
        result = pool(kernel, dtype, *sizes, lengths, arch)
        assert result.local_bytes <= 64 and result.shared_bytes <= SHARED_LIMIT[arch]


def gather(arch: int, values: str, acc: tl.dtype) -> list[Compiled]:
    sizes = launch("gather_chunks", dtype=torch.float32, arch=arch)
    constants = {"TILE": sizes["TILE"], "TILE_K": sizes["TILE_K"], "ACC": acc}
    scale = "*fp64" if acc == tl.float64 else "*fp32"
    common = {"table": "*i64", "scale": scale, "values": values, "tensors": "i32", "stride": "i32"}
    scatter, launched = common | {"grad": values, "part": scale}, (sizes.num_warps, sizes.num_stages)
    return [
        compile_kernel(gather_chunks_kernels.gather_kernel, common, constants, arch, *launched),
        compile_kernel(gather_chunks_kernels.scatter_kernel, scatter, constants, arch, *launched),
        compile_kernel(
            gather_chunks_kernels.scale_grad_kernel,
            {"table": "*i64", "part": scale, "grad_scale": scale, "tensors": "i32", "tiles": "i32", "stride": "i32"},
            {"BLOCK": 1024, "ACC": acc}, arch,
        ),
    ]  # fmt: skip


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_gathering(arch: int) -> None:
    for result in gather(arch, "*fp32", tl.float32):
        assert result.local_bytes == 0 and result.registers <= 128 and result.shared_bytes <= SHARED_LIMIT[arch]


EVERY_GATHERING = list(
    itertools.product(ALL_ARCHITECTURES, ("*fp32", "*fp64", "*fp16", "*bf16"), (tl.float32, tl.float64))
)


@pytest.mark.variants("arch, values, acc", [(90, "*fp64", tl.float64)], EVERY_GATHERING)
def test_all_gathering_variants(arch: int, values: str, acc: tl.dtype) -> None:
    for result in gather(arch, values, acc):
        assert result.local_bytes <= 64 and result.shared_bytes <= SHARED_LIMIT[arch]


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("one_row", [False, True])
def test_summing_pieces(arch: int, one_row: bool) -> None:
    signature = {"partial": "*fp32", "out": "*bf16", "ptr": "*i64", "row_ptr": "*i64", "stride": "i32", "width": "i32"}
    constants = {"ONE_ROW": one_row, "BLOCK": 1024, "COLUMNS": 1024, "ACC": tl.float32}
    result = compile_kernel(pieces_kernels.sum_pieces_kernel, signature, constants, arch)
    assert result.local_bytes == 0 and result.registers <= 128


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_combining_pieces(arch: int) -> None:
    signature = {"part": "*fp32", "part_lse": "*fp32", "out": "*bf16", "lse": "*fp32", "ptr": "*i64"}
    constants = {"WIDTH": 64, "A": 4, "COLUMNS": 256, "SPLIT": 1024, "ACC": tl.float32}
    result = compile_kernel(segment_pool_kernels.combine_kernel, signature, constants, arch)
    assert result.local_bytes == 0 and result.registers <= 128
