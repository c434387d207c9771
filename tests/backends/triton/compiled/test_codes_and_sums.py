"""add_codes and the sums of partial sums compiled for GPUs that are not here."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton.language as tl

from helpers.triton_compiled import ARCHITECTURES, Compiled, compile_kernel
from sne_fast.backends.triton import add_codes_kernels, partial_sums, partial_sums_kernels
from sne_fast.backends.triton.launches import Launch, launch

pytestmark = pytest.mark.build


def compiled(kernel: Any, types: dict[str, str], constants: dict[str, Any], arch: int, sizes: Launch) -> Compiled:
    return compile_kernel(kernel, types, constants, arch, sizes.num_warps, sizes.num_stages)


def check(found: Compiled) -> None:
    assert found.registers <= 128 and found.local_bytes <= 8


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_sums_of_partial_sums(arch: int) -> None:
    kernel = partial_sums_kernels.sum_parts_kernel
    outs = {name: "*bf16" for name in kernel.arg_names if name.startswith("out")}
    assert len(outs) == partial_sums.RESULTS
    sizes = launch("partial_sums", dtype=torch.bfloat16, arch=arch)
    types = {"parts": "*fp32", "table": "*i64", **outs}
    check(compiled(kernel, types, {**sizes.blocks, "ACC": tl.float32}, arch, sizes))


@pytest.mark.parametrize("with_codes", [True, False])
@pytest.mark.parametrize("name", ["forward", "backward"])
def test_codes(name: str, with_codes: bool) -> None:
    kernel = getattr(add_codes_kernels, f"{name}_kernel")
    sizes = launch("add_codes", kernel=name, h=64, dtype=torch.bfloat16, arch=90)
    constants = {
        "BY_SET": with_codes, "WITH_TABLE": with_codes, "WITH_SCALE": with_codes, "ROWS": sizes["ROWS"], "WIDTH": 64,
        "ACC": tl.float32,
    }  # fmt: skip
    types = {name: "*fp32" for name in kernel.arg_names if name not in constants}
    types |= {"x": "*bf16", "out": "*bf16", "grad": "*bf16", "owner": "*i64", "place": "*i64"}
    types |= {"rows": "i32", "tiles": "i32"}
    types = {name: types[name] for name in kernel.arg_names if name not in constants}
    check(compiled(kernel, types, constants, 90, sizes))
