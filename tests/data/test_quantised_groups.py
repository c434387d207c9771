"""pack: weights whose groups share a scale (NVFP4, MXFP4, MXFP8, MLX, HQQ, the second GPTQ, blocks of float8).

Random codes are packed here one at a time by each format's published layout, and their values computed in float64.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from sne_fast import WeightBatch, pack
from sne_fast.data.layer_stream import LayerStream

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]


def packed(entries, **options) -> WeightBatch:
    return pack([entries], scale="none", order="definition", dtype=torch.float64, **options)


def values(entries, name: str = "l.weight") -> Tensor:
    """Return a tensor of the packed network, in its shape."""
    b = packed(entries, kinds={"l": "linear"})
    s = b.names[0][1].index(name)
    a, z = (int(b.chunk_ptr_host[b.tensor_ptr_host[i]]) for i in (s, s + 1))
    return b.values[a:z].reshape(b.shapes[0][s])


def codes(*shape: int, bits: int = 4, seed: int = 0) -> Tensor:
    return torch.randint(0, 2**bits, shape, generator=torch.Generator().manual_seed(seed))


def stream(numbers: Iterable[int], bits: int, word: int) -> list[int]:
    """Return a stream of bits, lowest first, in words of so many bits."""
    joined = sum(int(n) << (i * bits) for i, n in enumerate(numbers))
    count = -(-len(list(numbers)) * bits // word)
    return [joined >> (word * i) & (2**word - 1) for i in range(count)]


def rows_packed(numbers: Tensor, bits: int, word: int) -> Tensor:
    """Return the last dimension of a tensor as streams of bits, int64."""
    flat = [stream(row.tolist(), bits, word) for row in numbers.reshape(-1, numbers.shape[-1])]
    return torch.tensor(flat).reshape(*numbers.shape[:-1], -1)


def floats(shape: tuple[int, ...], seed: int = 1) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) + 0.5


# ---------------------------------------------------------------------------------------------------------------------
# Floats of four and eight bits


def wanted_float4(numbers: Tensor, scales: Tensor, group: int) -> Tensor:
    want = torch.empty(numbers.shape, dtype=torch.float64)
    for place in torch.cartesian_prod(*(torch.arange(n) for n in numbers.shape)).tolist():
        scale = scales[(*place[:-1], place[-1] // group)]
        want[tuple(place)] = E2M1[int(numbers[tuple(place)])] * float(scale)
    return want


@pytest.mark.parametrize("lead", [(), (2,)])
def test_nvfp4_of_modelopt(lead: tuple[int, ...]) -> None:
    numbers, scales = codes(*lead, 6, 48), floats((*lead, 6, 3)).to(torch.float8_e4m3fn)
    second = torch.tensor(0.25) if not lead else torch.tensor([0.25, 0.5])
    state = {
        "l.weight": rows_packed(numbers, 4, 8).to(torch.uint8), "l.weight_scale": scales, "l.weight_scale_2": second,
        "l.input_scale": torch.tensor(0.1), "l.bias": torch.ones(6),
    }  # fmt: skip
    want = wanted_float4(numbers, scales.double(), 16) * second.double().reshape(*lead, *([1] * 2))
    torch.testing.assert_close(values(state), want, atol=0, rtol=1e-6)
    batch = packed(state)
    assert batch.names[0][1] == ("l.weight", "l.bias")
    assert {reason.partition(":")[0] for _, reason in batch.skipped[0]} == {"quantisation parameter"}


@pytest.mark.parametrize("form", ["NVFP4", "MXFP4", "MXFP4 of exponents"])
def test_float4_of_compressed_tensors(form: str) -> None:
    numbers = codes(5, 64)
    state = {"l.weight_packed": rows_packed(numbers, 4, 8).to(torch.uint8)}
    if form == "NVFP4":
        scales, group = floats((5, 4)).to(torch.float8_e4m3fn), 16
        state |= {"l.weight_scale": scales, "l.weight_global_scale": torch.tensor([4.0])}
        scale = scales.double() / 4
    else:
        exponents, group = codes(5, 2, bits=4).to(torch.uint8) + 120, 32
        state |= {"l.weight_scale": exponents if form == "MXFP4" else exponents.view(torch.float8_e8m0fnu)}
        scale = torch.tensor([[2.0 ** (int(e) - 127) for e in row] for row in exponents], dtype=torch.float64)
    torch.testing.assert_close(values(state), wanted_float4(numbers, scale, group), atol=0, rtol=1e-6)
    assert packed(state).num_weights == 5 * 64


def test_mxfp8_has_exponents_as_scales() -> None:
    stored, exponents = floats((4, 96)).to(torch.float8_e4m3fn), codes(4, 3).to(torch.uint8) + 120
    scale = (2.0 ** (exponents.double() - 127)).repeat_interleave(32, 1)
    state = {"l.weight": stored, "l.weight_scale": exponents}
    torch.testing.assert_close(values(state), stored.double() * scale, atol=0, rtol=1e-6)


@pytest.mark.parametrize("shape", [(128, 128), (300, 200), (129, 127), (1, 257), (2, 130, 256)])
def test_float8_in_blocks_of_128_whose_last_are_shorter(shape: tuple[int, ...]) -> None:
    stored = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(torch.float8_e4m3fn)
    blocks = floats((*shape[:-2], *(-(-n // 128) for n in shape[-2:])))
    want = stored.double()
    for place in torch.cartesian_prod(*(torch.arange(n) for n in blocks.shape)).reshape(-1, len(shape)).tolist():
        *lead, i, j = place
        want[(*lead, slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128))] *= float(blocks[tuple(place)])
    for end in ("_scale_inv", "_scale"):
        torch.testing.assert_close(values({"l.weight": stored, f"l.weight{end}": blocks}), want, atol=0, rtol=1e-6)


@pytest.mark.parametrize(
    "state",
    [
        {"l.weight": torch.zeros(4, 16, dtype=torch.uint8), "l.weight_scale": torch.ones(4, 3).to(torch.float8_e4m3fn)},
        {"l.weight": torch.zeros(4, 16, dtype=torch.uint8), "l.weight_scale": torch.ones(5, 2).to(torch.float8_e4m3fn)},
        {"l.weight_packed": torch.zeros(4, 16, dtype=torch.uint8), "l.weight_scale": torch.ones(4)},
        {"l.weight_packed": torch.zeros(4, 16, dtype=torch.uint8), "l.weight_scale": torch.ones(4, 2),
         "l.weight_global_scale": torch.ones(3)},
        # whose scales stand in the order of a kernel
        {"l.weight": torch.zeros(4, 16, dtype=torch.uint8), "l.weight_scale": torch.ones(4, 2).to(torch.float8_e4m3fn),
         "l.comfy_quant": torch.zeros(9, dtype=torch.uint8)},
    ],
)  # fmt: skip
def test_scales_that_do_not_fit_are_refused(state: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match=r"tensor 'l.weight(_packed)?' looks like a quantised weight"):
        packed(state)


# ---------------------------------------------------------------------------------------------------------------------
# MLX


def mlx(bits: int, group: int, lead: tuple[int, ...] = (), seed: int = 0) -> tuple[dict[str, Tensor], Tensor]:
    """Return the tensors of a layer of MLX, and its values: codes of normal weights, from an end of their range on."""
    shape, groups = (*lead, 24, 256), 256 // group
    weights = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double().unflatten(-1, (groups, group))
    low, high = weights.amin(-1, True), weights.amax(-1, True)
    down = low.abs() > high
    step = torch.where(down, 1.0, -1.0) * (high - low) / (2**bits - 1)
    numbers = ((weights - torch.where(down, low, high)) / step).round().clamp(0, 2**bits - 1).long().flatten(-2)
    scales, biases = (floats((*lead, 24, groups), s).half() for s in (1, 2))
    words = rows_packed(numbers, bits, 32).to(torch.uint32)
    spread = [t.double().repeat_interleave(group, -1) for t in (scales, biases)]
    return {"l.weight": words, "l.scales": scales, "l.biases": biases}, numbers.double() * spread[0] + spread[1]


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_mlx(bits: int, group: int) -> None:
    for lead in ((), (2,)):
        state, want = mlx(bits, group, lead)
        torch.testing.assert_close(values(state), want, atol=1e-6, rtol=1e-6)
        batch = packed({**state, "l.bias": torch.ones(24)})
        assert batch.names[0][1] == ("l.weight", "l.bias") and len(batch.skipped[0]) == 2
        assert batch.shapes[0][0] == (*lead, 24, 256)


@pytest.mark.parametrize(("bits", "group"), [(4, 32), (8, 32), (4, 16)])
def test_floats_of_mlx(bits: int, group: int) -> None:
    numbers = codes(4, 128, bits=bits)
    numbers[numbers % 128 == 127] = 3  # no NaN of float8
    exponents = codes(4, 128 // group, seed=1).to(torch.uint8) + (50 if group == 16 else 120)
    scale = exponents.view(torch.float8_e4m3fn).double() if group == 16 else 2.0 ** (exponents.double() - 127)
    table = torch.tensor(E2M1).double() if bits == 4 else torch.arange(256).byte().view(torch.float8_e4m3fn).double()
    state = {"l.weight": rows_packed(numbers, bits, 32).to(torch.uint32), "l.scales": exponents}
    want = table[numbers] * scale.repeat_interleave(group, -1)
    torch.testing.assert_close(values(state), want, atol=0, rtol=1e-6)


def test_the_configuration_of_mlx_says_how_many_bits(tmp_path: Path) -> None:
    state, _ = mlx(4, 64)
    # As no quantiser writes it, but one that trains codes may: eight bits of which the groups have no code 0.
    words = state["l.weight"].view(torch.int32) | 0x01010101
    state["l.weight"] = words.view(torch.uint32)
    other, _ = mlx(2, 128, seed=3)
    state |= {name.replace("l.", "m."): tensor for name, tensor in other.items()}
    save_file(state, tmp_path / "model.safetensors")
    shapes = {}
    for config in ({"bits": 4, "group_size": 64, "m": {"bits": 8, "group_size": 32}}, {"bits": 2, "group_size": 128}):
        (tmp_path / "config.json").write_text(json.dumps({"quantization": config}))
        for path in (tmp_path, tmp_path / "model.safetensors"):
            shapes[config["bits"]] = pack([path]).shapes[0]
            streamed = list(LayerStream(path).batches())
            assert torch.equal(torch.cat([b.values for b in streamed]), pack([path]).values)
    assert shapes == {4: ((24, 256), (24, 64)), 2: ((24, 512), (24, 256))}
    for text in ("[", '{"quantization": 3}', '{"quantization": {"bits": "4"}}'):  # says nothing
        (tmp_path / "config.json").write_text(text)
        assert pack([tmp_path]).shapes[0][1] == (24, 256)
    (tmp_path / "config.json").write_text(json.dumps({"quantization": {"bits": 7, "group_size": 64}}))
    with pytest.raises(ValueError, match=r"'l.weight' looks like a quantised weight, but scales .* do not fit"):
        pack([tmp_path])


# ---------------------------------------------------------------------------------------------------------------------
# HQQ


def hqq(bits: int, axis: int, group: int, shape: tuple[int, int] = (12, 40)) -> tuple[dict[str, Tensor], Tensor]:
    """Return the tensors of a layer of HQQ, and its values."""
    size = shape[0] * shape[1]
    form = (group, size // group) if axis == 0 else (size // group, group)
    numbers, per_word = codes(*form, bits=bits), 10 if bits == 3 else 8 // bits
    rows = -(-form[0] // per_word)
    words = torch.zeros(rows, form[1], dtype=torch.int64)
    for i in range(rows):
        for place in range(per_word):  # the highest bits hold the first rows
            if place * rows + i < form[0]:
                words[i] |= numbers[place * rows + i] << bits * (per_word - 1 - place)
    spread = (1, form[1]) if axis == 0 else (form[0], 1)
    scale, zero = floats(spread, 1).half(), floats(spread, 2).half()
    state = {"W_q": words.to(torch.int32 if bits == 3 else torch.uint8), "scale": scale, "zero": zero}
    said = {"nbits": bits, "axis": axis, "group_size": group, "quant_zero": 0, "quant_scale": 0, "view_as_float": 0}
    state |= {name: torch.tensor(n, dtype=torch.int32) for name, n in said.items()}
    state |= {"shape": torch.tensor(shape), "packing": torch.tensor([ord(c) for c in "4bit_u8"], dtype=torch.uint8)}
    want = (numbers.double() - zero.double()) * scale.double()
    return {f"l.{name}": tensor for name, tensor in state.items()}, want.reshape(shape)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_hqq(bits: int, axis: int) -> None:
    state, want = hqq(bits, axis, 40 if axis else 8)
    if bits == 1 and axis:
        state, want = hqq(bits, axis, 60)
    torch.testing.assert_close(values(state), want, atol=1e-6, rtol=1e-6)
    batch = packed({**state, "l.bias": torch.ones(12)})
    assert batch.names[0][1] == ("l.weight", "l.bias") and batch.tensor_type.tolist() == [0, 1]
    viewed = {**state, "l.W_q": state["l.W_q"].view(torch.float16 if state["l.W_q"].shape[1] % 2 == 0 else torch.int8)}
    torch.testing.assert_close(values(viewed), want, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("quant_scale", torch.tensor(1), "its scales or zero points are quantised themselves"),
        ("shape", torch.tensor([12, 41]), "do not fit each other"), ("shape", torch.tensor(12), "as HQQ writes them"),
        ("group_size", torch.tensor(0), "do not fit each other"), ("nbits", torch.tensor(5), "do not fit each other"),
        ("nbits", torch.tensor(8), "does not fit"), ("scale", torch.ones(7, 1), "do not fit"),
    ],
)  # fmt: skip
def test_layers_of_hqq_that_do_not_fit_are_refused(name: str, value: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=f"tensor 'l.W_q' looks like a quantised weight, but .*{message}"):
        packed({**hqq(4, 1, 40)[0], f"l.{name}": value})


# ---------------------------------------------------------------------------------------------------------------------
# GPTQ


@pytest.mark.parametrize("config", ["config.json", "quantize_config.json", None])
def test_the_second_format_of_gptq_stores_zero_points_as_they_are(tmp_path: Path, config: str | None) -> None:
    numbers, zeros = codes(16, 8), codes(2, 8, seed=1)  # (in, out) and (groups, out)
    scales = floats((2, 8)).half()
    state = {
        "l.qweight": rows_packed(numbers.t(), 4, 32).t().to(torch.int64).contiguous(),
        "l.qzeros": rows_packed(zeros, 4, 32), "l.scales": scales,
    }  # fmt: skip
    wrapped = {n: (t - (t >> 31 << 32)).to(torch.int32) if t.dtype == torch.int64 else t for n, t in state.items()}
    save_file(wrapped, tmp_path / "model.safetensors")
    said = {"bits": 4, "checkpoint_format": "gptq_v2"}
    if config is not None:
        (tmp_path / config).write_text(json.dumps({"quantization_config": said} if config == "config.json" else said))
    true = zeros if config else (zeros + 1) % 16
    want = ((numbers - true.repeat_interleave(8, 0)).double() * scales.double().repeat_interleave(8, 0)).t()
    batch = pack([tmp_path], scale="none", dtype=torch.float64)
    torch.testing.assert_close(batch.values.reshape(8, 16), want, atol=0, rtol=1e-6)
    (streamed,) = LayerStream(tmp_path).batches(scale="none", dtype=torch.float64)
    assert torch.equal(streamed.values, batch.values)
    assert math.isfinite(float(batch.values.sum()))
