"""add_codes and the sums of partial sums compiled for GPUs that are not here."""

from __future__ import annotations

import pytest
import triton.language as tl

from helpers.triton_compiled import ARCHITECTURES, Compiled, compile_kernel
from sne_fast.backends.triton import add_codes_kernels, partial_sums, partial_sums_kernels

pytestmark = pytest.mark.build


def check(compiled: Compiled) -> None:
    assert compiled.registers <= 128 and compiled.local_bytes <= 8


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_sums_of_partial_sums(arch: int) -> None:
    kernel = partial_sums_kernels.sum_parts_kernel
    outs = {name: "*bf16" for name in kernel.arg_names if name.startswith("out")}
    assert len(outs) == partial_sums.RESULTS
    constants = {"COLUMNS": partial_sums.COLUMNS, "ROWS": partial_sums.ROWS, "ACC": tl.float32}
    check(compile_kernel(kernel, {"parts": "*fp32", "table": "*i64", **outs}, constants, arch))


@pytest.mark.parametrize("with_codes", [True, False])
@pytest.mark.parametrize("name", ["forward", "backward"])
def test_codes(name: str, with_codes: bool) -> None:
    kernel = getattr(add_codes_kernels, f"{name}_kernel")
    constants = {
        "BY_SET": with_codes, "WITH_TABLE": with_codes, "WITH_SCALE": with_codes, "ROWS": 32, "WIDTH": 64,
        "ACC": tl.float32,
    }  # fmt: skip
    types = {name: "*fp32" for name in kernel.arg_names if name not in constants}
    types |= {"x": "*bf16", "out": "*bf16", "grad": "*bf16", "owner": "*i64", "place": "*i64"}
    types |= {"rows": "i32", "tiles": "i32"}
    check(
        compile_kernel(kernel, {name: types[name] for name in kernel.arg_names if name not in constants}, constants, 90)
    )
