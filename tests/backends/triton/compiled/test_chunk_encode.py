"""The chunk kernels compiled for GPUs that are not there: registers, spills, shared memory, matrix instructions."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import triton.language as tl

from helpers.triton_compiled import ALL_ARCHITECTURES, ARCHITECTURES, SHARED_LIMIT, Compiled, compile_kernel
from sne_fast.backends.gpu_plans.chunks import SlotClass
from sne_fast.backends.triton import chunk_encode_staged_kernels, staged_rows_kernels
from sne_fast.backends.triton.chunk_launches import FUSED_CLASSES, class_constants, length_class, padded_heads
from sne_fast.backends.triton.launches import launch, trial
from sne_fast.benchmark.instructions.triton_kernels import functions, signature

pytestmark = pytest.mark.build

MULTI, MASKED, FULL, LONG = FUSED_CLASSES
TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
KERNELS = functions()


@dataclass(frozen=True)
class Variant:
    op: str
    arch: int
    dtype: torch.dtype = torch.bfloat16
    slots: SlotClass = FULL
    h: int = 64
    heads: int = 4
    layer_norm: bool = True
    precision: str = "tf32"
    save: bool = False

    def __str__(self) -> str:
        name = self.op.removeprefix("chunk_encode_") + ("_save" if self.save else "")
        precision = self.precision if self.dtype == torch.float32 else TYPES[self.dtype]
        return f"{name}-sm{self.arch}-{precision}-{length_class(self.slots)}-h{self.h}x{self.heads}" + (
            "" if self.layer_norm else "-plain"
        )

    @property
    def on_matrix_units(self) -> bool:
        return self.dtype != torch.float32 or self.precision == "tf32"

    def compile(self) -> Compiled:
        fn, names = KERNELS[self.op], set(KERNELS[self.op].arg_names)
        length = length_class(self.slots, self.precision if self.dtype == torch.float32 else "")
        sizes = launch(self.op, h=self.h, heads=self.heads, length=length, dtype=self.dtype, arch=self.arch)
        constants = {
            "WIDTH": self.h, "HEADS": self.heads, "PADDED_HEADS": padded_heads(self.heads),
            "LAYER_NORM": self.layer_norm, "SAVE": self.save, "ACC": tl.float32,
            "PRECISION": self.precision if self.dtype == torch.float32 else "ieee",
            **class_constants(self.slots), **sizes.blocks,
        }  # fmt: skip
        constants = {name: value for name, value in constants.items() if name in names}
        return compile_kernel(fn, signature(fn, TYPES[self.dtype], constants), constants, self.arch,
                              num_warps=sizes.num_warps, num_stages=sizes.num_stages,
                              maxnreg=sizes.maxnreg)  # fmt: skip


# Local memory per thread, in bytes, that a kernel may spill: none in the forward kernel at h = 64 for the classes of
# full chunks; the backward keeps four products' factors at once, and what it spills stays in the first-level cache.
FORWARD_SPILL = {MULTI: 128, MASKED: 0, FULL: 0, LONG: 256}
BACKWARD_SPILL = 1024


def allowed_spill(variant: Variant) -> int:
    if not variant.on_matrix_units:
        return 2048  # products of float32 in full precision run on ordinary registers
    if variant.op != "chunk_encode":
        return BACKWARD_SPILL
    if variant.h == 128:
        return 1024
    if variant in REPRESENTATIVE or (variant.arch in ARCHITECTURES and variant.heads == 4):
        return 0 if variant.dtype != TF32 else FORWARD_SPILL[variant.slots]
    return 256


def check(variant: Variant) -> None:
    compiled = variant.compile()
    print(f"{variant}: {compiled.registers} registers, {compiled.local_bytes} local bytes, "
          f"{compiled.shared_bytes} shared bytes, HGMMA {compiled.count('HGMMA')}, HMMA {compiled.count('HMMA')}, "
          f"UTCHMMA {compiled.count('UTCHMMA')}")  # fmt: skip
    assert compiled.registers <= 255
    assert compiled.shared_bytes <= SHARED_LIMIT[variant.arch]
    assert compiled.local_bytes <= allowed_spill(variant)
    if variant.on_matrix_units and "codes" not in variant.op:
        assert compiled.matrix_instruction
        if variant in REPRESENTATIVE and variant.arch == 90 and "pool" not in variant.op:
            assert compiled.count("HGMMA") >= 1


TF32 = torch.float32
PARTS = ("pool_backward", "codes_backward", "scalar_backward", "weight_grad")
REPRESENTATIVE = [
    *(Variant("chunk_encode", arch, dtype) for arch in ARCHITECTURES for dtype in (torch.bfloat16, TF32)),
    Variant("chunk_encode", 90, slots=MULTI),
    Variant("chunk_encode", 90, slots=LONG),
    Variant("chunk_encode", 90, heads=8, save=True),
    Variant("chunk_encode", 90, TF32, precision="ieee"),
    *(Variant("chunk_encode_block_backward", arch) for arch in ARCHITECTURES),
    Variant("chunk_encode_block_backward", 90, TF32),
    *(Variant(f"chunk_encode_{part}", 90) for part in PARTS),
]


def every_variant() -> list[Variant]:
    """Return some 350 variants (half an hour): one axis at a time around the common shapes, on every architecture."""
    kinds = ((torch.bfloat16, ""), (torch.float16, ""), (TF32, "tf32"), (TF32, "ieee"))
    found = []
    for arch in ALL_ARCHITECTURES:
        for dtype, precision in kinds:
            for slots in FUSED_CLASSES:
                found += [Variant("chunk_encode", arch, dtype, slots, h, 4, True, precision) for h in (32, 64)]
                found.append(Variant("chunk_encode_block_backward", arch, dtype, slots, precision=precision))
        for h, heads in ((32, 1), (32, 2), (64, 1), (64, 2), (64, 8)):
            found += [Variant("chunk_encode", arch, h=h, heads=heads, layer_norm=plain) for plain in (True, False)]
            found.append(Variant("chunk_encode_block_backward", arch, h=h, heads=heads))
        found += [Variant("chunk_encode", arch, slots=slots, h=128, heads=8) for slots in FUSED_CLASSES]
        for dtype in (torch.bfloat16, TF32):
            found.append(Variant("chunk_encode", arch, dtype, save=True))
            found += [Variant(f"chunk_encode_{part}", arch, dtype, slots) for part in PARTS for slots in FUSED_CLASSES]
    return list(dict.fromkeys([*REPRESENTATIVE, *found]))


@pytest.mark.variants("variant", REPRESENTATIVE, every_variant)
def test_every_variant(variant: Variant) -> None:
    check(variant)


@pytest.mark.parametrize("arch", [90])
def test_rows_of_the_staged_form(arch: int) -> None:
    for fn, constants in (
        (chunk_encode_staged_kernels.scalar_means_kernel, {"HEADS": 4, "SLOTS": 256, "QUERIES": 32}),
        (chunk_encode_staged_kernels.scalar_means_backward_kernel, {"HEADS": 4, "SLOTS": 256, "QUERIES": 32}),
        (staged_rows_kernels.add_normed_kernel, {"RELU": True, "LAYER_NORM": True, "ROWS": 8, "WIDTH": 256}),
        (
            staged_rows_kernels.add_normed_backward_kernel,
            {"RELU": True, "LAYER_NORM": True, "ROWS": 8, "WIDTH": 256},
        ),
        (chunk_encode_staged_kernels.element_sum_kernel, {"TILE": 16, "WIDTH": 256}),
    ):
        types = signature(fn, "bf16", constants | {"ACC": tl.float32})
        types |= {name: "i32" for name in types if name in ("rows", "chunks", "codes", "tiles")}
        types |= {name: "*fp32" for name in types if name in ("grad", "values_grad")}
        compiled = compile_kernel(fn, types, constants | {"ACC": tl.float32}, arch, num_warps=4)
        assert compiled.local_bytes <= 64 and compiled.shared_bytes <= SHARED_LIMIT[arch]


def test_a_rule_may_limit_the_registers() -> None:
    """At the cost of some spills, for more warps on a multiprocessor."""
    rule = {"when": {}, "num_warps": 4, "num_stages": 1, "maxnreg": 128, "blocks": {"BINS": 2}}
    usual = Variant("chunk_encode", 90).compile()
    with trial("chunk_encode", rule):
        limited = Variant("chunk_encode", 90).compile()
    assert usual.registers > 128 >= limited.registers and limited.local_bytes <= 512
