"""pack: quantised weights are decoded by their format's formula, or refused by name.

Every format is written here by a quantiser of its own, which follows the published layout one value at a time.
"""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from torch import Tensor, nn

from sne_fast import WeightBatch, pack

F32 = torch.float32
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")


def packed(entries, **options) -> WeightBatch:
    return pack([entries], scale="none", order="definition", **options)


def values(entries, name: str) -> Tensor:
    """Return a tensor of the packed network, in its shape."""
    b = packed(entries)
    s = b.names[0][1].index(name)
    a, z = (int(b.chunk_ptr_host[b.tensor_ptr_host[i]]) for i in (s, s + 1))
    shape = b.shapes[0][s]
    assert len(shape) < 3, "kernel positions stand elsewhere"
    return b.values[a:z].reshape(shape)


def skipped(entries) -> dict[str, str]:
    found = packed(entries).skipped[0]
    assert len(dict(found)) == len(found)
    return dict(found)


def quantised(network: nn.Module, *kinds: type, **options) -> nn.Module:
    from torch.ao.quantization import quantize_dynamic

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return quantize_dynamic(network, set(kinds), **options)


# ---------------------------------------------------------------------------------------------------------------------
# Quantised modules of torch


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3, bias=False))


@pytest.mark.parametrize("dtype", [torch.qint8, torch.float16])
def test_dynamically_quantised_linear_layers_have_the_weights_of_the_float_network(dtype: torch.dtype) -> None:
    network = mlp()
    small = quantised(network, nn.Linear, dtype=dtype)
    want = packed(network)
    state = small.state_dict()
    named = {f"{name}.{i}": t for name, pair in state.items() if isinstance(pair, tuple) for i, t in enumerate(pair)}
    flat = {name: tensor for name, tensor in named.items() if tensor is not None}  # as a reader of files names them
    for source in (small, state, flat):
        b = packed(source)
        assert b.num_weights == want.num_weights == 64 and b.names[0][1] == ("0.weight", "0.bias", "2.weight")
        assert torch.equal(b.tensor_type, want.tensor_type) and b.layer_ptr.tolist() == [0, 2, 3]
        torch.testing.assert_close(b.values, want.values, atol=0.005, rtol=0.01)
    assert torch.equal(packed(small).values, packed(small.state_dict()).values)
    left_out = skipped(small.state_dict())
    assert {"0.scale", "0.zero_point", "0._packed_params.dtype", "0._packed_params._packed_params"} <= left_out.keys()


def test_quantised_recurrent_layers_of_a_module() -> None:
    network = nn.Sequential(nn.LSTM(3, 4, 2, bidirectional=True), nn.GRUCell(3, 4), nn.Linear(2, 2))
    b, want = packed(quantised(network, nn.LSTM, nn.GRUCell)), packed(network)
    assert b.num_weights == want.num_weights and set(b.names[0][1]) == set(want.names[0][1])
    assert set(b.tensor_type.tolist()) == set(want.tensor_type.tolist())


def test_packed_cells_of_a_state_dict_are_unpacked_and_layers_refused() -> None:
    network = nn.Sequential(nn.GRUCell(3, 4), nn.Linear(2, 2))
    b = packed(quantised(network, nn.GRUCell).state_dict())
    assert b.num_weights == packed(network).num_weights and "0.weight_hh" in b.names[0][1]
    lstm = quantised(nn.Sequential(nn.LSTM(3, 4), nn.Linear(2, 2)), nn.LSTM)
    with pytest.raises(TypeError, match=r"'0._all_weight_values.0.param' must be a tensor, .* pass the module itself"):
        pack([lstm.state_dict()])


class Static(nn.Module):
    def __init__(self) -> None:
        import torch.ao.quantization as tq

        super().__init__()
        self.quant, self.dequant = tq.QuantStub(), tq.DeQuantStub()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.up, self.fc = nn.ConvTranspose2d(4, 2, 3), nn.Linear(2, 2)
        self.add = torch.ao.nn.quantized.FloatFunctional()

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(self.quant(x)))
        return self.dequant(self.fc(self.up(self.add.add(x, x)).mean((2, 3))))


@pytest.mark.skipif("fbgemm" not in torch.backends.quantized.supported_engines, reason="needs quantised kernels")
def test_statically_quantised_networks_and_their_observers() -> None:
    import torch.ao.quantization as tq

    torch.manual_seed(0)
    network = Static().eval()
    want = packed(network)
    network.qconfig = tq.get_default_qconfig("fbgemm")  # per channel
    network.up.qconfig = tq.get_default_qconfig("qnnpack")
    prepared = tq.prepare(network)
    prepared(torch.randn(2, 3, 8, 8))
    observed = [packed(prepared), packed(prepared.state_dict())]
    converted = tq.convert(prepared)
    for b in (*observed, packed(converted), packed(converted.state_dict())):
        assert b.num_weights == want.num_weights
        assert set(b.names[0][1]) == set(want.names[0][1])
    module = packed(converted)
    assert set(module.tensor_type.tolist()) == set(want.tensor_type.tolist())
    assert torch.equal(values(converted, "fc.weight"), converted.fc.weight().dequantize())


def test_quantised_embeddings_count_as_embeddings() -> None:
    from torch.ao.quantization import convert, float_qparams_weight_only_qconfig, prepare

    network = nn.Sequential(nn.Embedding(10, 8), nn.EmbeddingBag(6, 8))
    want = packed(network)
    for module in (network, *network):
        module.qconfig = float_qparams_weight_only_qconfig
    small = convert(prepare(network))
    assert torch.equal(packed(small).tensor_type, want.tensor_type)
    assert packed(small).names[0][1] == packed(small.state_dict()).names[0][1] == ("0.weight", "1.weight")
    torch.testing.assert_close(packed(small).values, want.values, atol=0.02, rtol=0)


def test_scripts_that_hide_quantised_weights_are_refused() -> None:
    network = nn.Sequential(nn.Linear(2, 3), quantised(nn.Sequential(nn.Linear(3, 2)), nn.Linear))
    with pytest.raises(ValueError, match=r"module '1.0(\._packed_params)?' is a script that hides quantised weights"):
        pack([torch.jit.script(network)])


def test_quantised_tensors_alone_and_per_channel() -> None:
    w = torch.randn(3, 5)
    each = torch.quantize_per_channel(w, torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0, 1, -1]), 0, torch.qint8)
    whole = torch.quantize_per_tensor(w, 0.05, 3, torch.quint8)
    state = {"a.weight": each, "b.weight": whole}
    assert torch.equal(values(state, "a.weight"), each.dequantize())
    assert torch.equal(values(state, "b.weight"), whole.dequantize())


# ---------------------------------------------------------------------------------------------------------------------
# Eight bits with scales


def int8_rows(w: Tensor) -> tuple[Tensor, Tensor]:
    scale = w.abs().amax(1) / 127
    return (w / scale[:, None]).round().to(torch.int8), scale


@pytest.mark.parametrize("name", ["fc.weight_scale", "fc.scale", "fc.scales", "fc.scale_weight"])
@pytest.mark.parametrize("column", [False, True])
def test_int8_with_a_scale_per_row(name: str, column: bool) -> None:
    w = torch.randn(6, 4)
    q, scale = int8_rows(w)
    state = {"fc.weight": q, name: scale[:, None] if column else scale, "fc.bias": torch.ones(6)}
    assert torch.equal(values(state, "fc.weight"), q * scale[:, None])
    assert packed(state).names[0][1] == ("fc.weight", "fc.bias") and packed(state).num_weights == 30
    assert skipped(state).keys() == {name}


@pytest.mark.parametrize("prefix", ["weight_", ""])
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
def test_eight_bits_with_zero_points(prefix: str, dtype: torch.dtype) -> None:
    low, high = (-128, 127) if dtype == torch.int8 else (0, 255)
    w = torch.randn(6, 4) + 1
    scale = (w.amax(1) - w.amin(1)) / 255
    zero = (low - w.amin(1) / scale).round()
    q = (w / scale[:, None] + zero[:, None]).round().clamp(low, high).to(dtype)
    state = {"fc.weight": q, f"fc.{prefix}scale": scale, f"fc.{prefix}zero_point": zero.to(torch.int32)}
    torch.testing.assert_close(values(state, "fc.weight"), w, atol=float(scale.max()), rtol=0)
    assert packed(state).num_weights == 24


def test_int8_in_groups_of_columns_and_of_convolutions() -> None:
    q = torch.randint(-127, 128, (4, 12), dtype=torch.int8)
    scale = torch.rand(4, 3)
    assert torch.equal(values({"weight": q, "weight_scale": scale}, "weight"), q * scale.repeat_interleave(4, 1))
    groups = torch.randint(0, 3, (12,))
    state = {"weight": q, "weight_scale": scale, "weight_g_idx": groups.int()}
    assert torch.equal(values(state, "weight"), q * scale[:, groups])
    kernel = torch.randint(-127, 128, (4, 2, 3, 3), dtype=torch.int8)
    b = packed({"conv.weight": kernel, "conv.weight_scale": scale[:, 0]})
    want = packed({"conv.weight": kernel * scale[:, 0].reshape(4, 1, 1, 1)})
    assert torch.equal(b.values, want.values) and torch.equal(b.tensor_type, want.tensor_type)


@pytest.mark.parametrize("shape", [(256, 384), (200, 300), (64, 130), (1, 128)])
def test_float8_in_blocks_of_128(shape: tuple[int, int]) -> None:
    w = torch.randn(shape)
    blocks = [-(-n // 128) for n in shape]
    inverse = torch.empty(blocks)
    want, q = torch.empty(shape), torch.empty(shape).to(torch.float8_e4m3fn)
    for i in range(blocks[0]):
        for j in range(blocks[1]):
            part = (slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128))
            inverse[i, j] = w[part].abs().max() / 448
            q[part] = (w[part] / inverse[i, j]).to(torch.float8_e4m3fn)
            want[part] = q[part].float() * inverse[i, j]
    state = {"fc.weight": q, "fc.weight_scale_inv": inverse}
    assert torch.equal(values(state, "fc.weight"), want)
    experts = {"gate_up_proj": q[None].expand(2, *shape).clone(), "gate_up_proj_scale_inv": torch.stack([inverse] * 2)}
    assert packed(experts).num_weights == 2 * w.numel()


def test_float8_with_one_scale_whose_scales_of_inputs_are_no_weights() -> None:
    q = torch.randn(6, 4).to(torch.float8_e4m3fn)
    state = {
        "fc.weight": q, "fc.weight_scale": torch.tensor([0.25]), "fc.input_scale": torch.tensor([0.5]),
        "attn.k_scale": torch.tensor(1.0), "fc.bias": torch.ones(6, dtype=torch.bfloat16),
    }  # fmt: skip
    assert torch.equal(values(state, "fc.weight"), q.float() * 0.25)
    assert packed(state).num_weights == 30 and skipped(state).keys() == {
        "fc.weight_scale", "fc.input_scale", "attn.k_scale",
    }  # fmt: skip


def test_float8_alone_counts_as_it_is() -> None:
    q = torch.randn(6, 4).to(torch.float8_e5m2)
    assert torch.equal(values({"fc.weight": q, "logit_scale": torch.tensor(2.0)}, "fc.weight"), q.float())


@pytest.mark.parametrize(
    "entries",
    [
        {"a.weight": torch.float8_e4m3fn, "a.strange_scale": F32},
        {"a.weight": torch.float8_e4m3fn, "a.weight_scale_2": F32},
        {"a.weight": torch.float8_e4m3fn, "a.weight_scale": F32, "a.weight_scale_2": F32},
        {"a.weight": torch.float8_e4m3fn, "a.input_scale": F32},
        {"b.weight": torch.float8_e4m3fn, "b.weight_scale": F32, "a.weight": torch.float8_e4m3fn},
    ],
    ids=["unknown", "second alone", "second", "input alone", "missing"],
)
def test_float8_whose_scale_is_unknown_or_missing_is_refused(entries: dict) -> None:
    state = {name: torch.ones((4, 4) if dtype != F32 else ()).to(dtype) for name, dtype in entries.items()}
    with pytest.raises(ValueError, match=r"pack: network 0 \('state_dict'\), tensor 'a.weight' is torch.float8_e4m3fn"):
        pack([state])


def test_bitsandbytes_int8() -> None:
    w = torch.randn(6, 4)
    maxima = w.abs().amax(1)
    q = (w * 127 / maxima[:, None]).round().to(torch.int8)
    state = {"fc.weight": q, "fc.SCB": maxima, "fc.weight_format": torch.tensor(0, dtype=torch.uint8)}
    for held in (maxima, maxima[None], maxima[:, None]):
        torch.testing.assert_close(values(state | {"fc.SCB": held}, "fc.weight"), q * maxima[:, None] / 127)
    with pytest.raises(ValueError, match=r"tensor 'fc.weight' looks like a quantised weight, but its weight_format"):
        pack([state | {"fc.weight_format": torch.tensor(2, dtype=torch.uint8)}])


class Int8Params(nn.Parameter):
    """A parameter of integers, as bitsandbytes keeps them."""


class Linear8bit(nn.Module):
    """Saves the maxima of rows beside its weight, and holds them in no buffer."""

    def __init__(self, w: Tensor) -> None:
        super().__init__()
        self.maxima = w.abs().amax(1)
        self.weight = Int8Params((w * 127 / self.maxima[:, None]).round().to(torch.int8), requires_grad=False)
        self.bias = nn.Parameter(torch.ones(len(w)))

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "SCB"] = self.maxima


def test_modules_with_parameters_of_integers_are_decoded_by_what_they_save() -> None:
    network = nn.Sequential(Linear8bit(torch.randn(6, 4)), nn.Linear(6, 2))
    module, state = packed(network), packed(network.state_dict())
    assert module.num_weights == state.num_weights == 24 + 6 + 14
    assert torch.equal(module.values, state.values) and module.names[0][1] == state.names[0][1]


@pytest.mark.parametrize("shape", [(6, 16), (5, 7)])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_bitsandbytes_with_four_bits(shape: tuple[int, int], nested: bool, storage: torch.dtype) -> None:
    codes = torch.linspace(-1, 1, 16) ** 3
    n, block = shape[0] * shape[1], 8
    flat = torch.randint(0, 16, (n,)).tolist()
    maxima = (torch.rand(-(-n // block)) + 0.5).tolist()
    state: dict = {"blocksize": block, "shape": list(shape), "quant_type": "nf4", "dtype": "float16"}
    entries: dict[str, Tensor] = {}
    if nested:
        inner, outer, offset = torch.linspace(-1, 1, 256), torch.rand(-(-len(maxima) // 2)), 0.75
        index = torch.randint(0, 256, (len(maxima),), dtype=torch.uint8)
        maxima = [float(inner[int(index[i])] * outer[i // 2] + offset) for i in range(len(maxima))]
        state |= {"nested_blocksize": 2, "nested_dtype": "float32", "nested_offset": offset}
        entries |= {"fc.weight.nested_absmax": outer, "fc.weight.nested_quant_map": inner, "fc.weight.absmax": index}
    else:
        entries["fc.weight.absmax"] = torch.tensor(maxima)
    pairs = flat + [0] * (n % 2)
    stored = torch.tensor([a << 4 | b for a, b in zip(pairs[::2], pairs[1::2], strict=True)], dtype=torch.uint8)
    if storage == torch.bfloat16:
        if len(stored) % 2:
            pytest.skip("an odd number of bytes is no bfloat16")
        stored = stored.view(storage)
    entries |= {
        "fc.weight": stored[:, None], "fc.weight.quant_map": codes,
        "fc.weight.quant_state.bitsandbytes__nf4": torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
        "fc.bias": torch.ones(shape[0]),
    }  # fmt: skip
    want = torch.tensor([float(codes[q]) * maxima[i // block] for i, q in enumerate(flat)]).reshape(shape)
    torch.testing.assert_close(values(entries, "fc.weight"), want)
    assert packed(entries).num_weights == n + shape[0]
    entries["fc.weight.quant_state.bitsandbytes__nf4"] = torch.zeros(3, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"tensor 'fc.weight' looks like a quantised weight, but its quant_state"):
        pack([entries])


# ---------------------------------------------------------------------------------------------------------------------
# Words of 32 bits


def as_int32(bits: list[int]) -> list[int]:
    """Return words of 32 bits, lowest first, as signed numbers."""
    words = [sum(bit << i for i, bit in enumerate(bits[a : a + 32])) for a in range(0, len(bits), 32)]
    return [word - (1 << 32) if word >= 1 << 31 else word for word in words]


def stream(numbers: list[int], bits: int) -> list[int]:
    return as_int32([number >> i & 1 for number in numbers for i in range(bits)])


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("ordered", [None, False, True])
def test_gptq(bits: int, ordered: bool | None) -> None:
    rows, out, groups = 64, 32, 4
    q, zero = torch.randint(0, 1 << bits, (rows, out)), torch.randint(1, (1 << bits) - 1, (groups, out))
    scales = torch.rand(groups, out).half()
    of_row = torch.arange(rows) // 16 if ordered is not False else torch.randint(0, groups, (rows,))
    state = {
        "fc.qweight": torch.tensor([stream(column, bits) for column in q.t().tolist()], dtype=torch.int32).t(),
        "fc.qzeros": torch.tensor([stream(row, bits) for row in (zero - 1).tolist()], dtype=torch.int32),
        "fc.scales": scales, "fc.bias": torch.ones(out),
    }  # fmt: skip
    if ordered is not None:
        state["fc.g_idx"] = of_row.int()
    want = ((q - zero[of_row]) * scales.float()[of_row]).t()
    torch.testing.assert_close(values(state, "fc.weight"), want)
    b = packed(state)
    assert b.names[0][1] == ("fc.weight", "fc.bias") and b.tensor_type.tolist() == [0, 1]
    assert skipped(state).keys() == state.keys() - {"fc.bias"}


@pytest.mark.parametrize("stored", [7, 8])
def test_symmetric_weights_of_both_formats_of_gptq(stored: int) -> None:
    """The first format stores the zero point 8 less 1, the second as it is."""
    q = torch.randint(0, 16, (8, 8))
    state = {
        "qweight": torch.tensor([stream(column, 4) for column in q.t().tolist()], dtype=torch.int32).t(),
        "qzeros": torch.tensor([stream([stored] * 8, 4)], dtype=torch.int32),
        "scales": torch.ones(1, 8),
    }
    assert torch.equal(values(state, "weight"), (q - 8).t().float())


def test_awq() -> None:
    rows, out, groups = 32, 16, 2
    q, zero = torch.randint(0, 16, (rows, out)), torch.randint(0, 16, (groups, out))
    scales = torch.rand(groups, out).half()
    order = [0, 2, 4, 6, 1, 3, 5, 7]

    def words(matrix: Tensor) -> Tensor:
        packed_rows = [
            as_int32([row[a + order[i]] >> bit & 1 for a in range(0, out, 8) for i in range(8) for bit in range(4)])
            for row in matrix.tolist()
        ]
        return torch.tensor(packed_rows, dtype=torch.int32)

    state = {"fc.qweight": words(q), "fc.qzeros": words(zero), "fc.scales": scales}
    of_row = torch.arange(rows) // 16
    torch.testing.assert_close(values(state, "fc.weight"), ((q - zero[of_row]) * scales.float()[of_row]).t())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("asymmetric", [False, True])
def test_packed_integers_of_compressed_tensors(bits: int, asymmetric: bool) -> None:
    rows, columns, groups, half = 9, 20, 5, 1 << (bits - 1)
    q, scale = torch.randint(-half, half, (rows, columns)), torch.rand(rows, groups)
    zero = torch.randint(-half, half, (rows, groups)) if asymmetric else torch.zeros(rows, groups, dtype=torch.int64)
    state = {
        "fc.weight_packed": torch.tensor([stream(row, bits) for row in (q + half).tolist()], dtype=torch.int32),
        "fc.weight_scale": scale, "fc.weight_shape": torch.tensor([rows, columns]),
    }  # fmt: skip
    if asymmetric:
        down = [stream(column, bits) for column in (zero + half).t().tolist()]
        state["fc.weight_zero_point"] = torch.tensor(down, dtype=torch.int32).t()
    want = (q - zero.repeat_interleave(4, 1)) * scale.repeat_interleave(4, 1)
    torch.testing.assert_close(values(state, "fc.weight"), want)


def test_mxfp4_of_experts() -> None:
    table = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    blocks = torch.randint(0, 256, (2, 6, 3, 4), dtype=torch.uint8)
    exponents = torch.randint(120, 135, (2, 6, 3), dtype=torch.uint8)
    want = torch.empty(2, 24, 6)
    for e, o, g, k in torch.cartesian_prod(*(torch.arange(n) for n in blocks.shape)).tolist():
        for half, code in enumerate((int(blocks[e, o, g, k]) & 15, int(blocks[e, o, g, k]) >> 4)):
            sign = -1 if code & 8 else 1
            value = sign * table[code & 7] * 2.0 ** (int(exponents[e, o, g]) - 127)
            want[e, g * 8 + 2 * k + half, o] = value
    state = {"experts.down_proj_blocks": blocks, "experts.down_proj_scales": exponents}
    b = packed(state)
    assert b.names[0][1] == ("experts.down_proj",) and b.shapes == (((2, 24, 6),),)
    assert torch.equal(b.values, packed({"experts.down_proj": want}).values)


def test_quanto() -> None:
    q, scale = int8_rows(torch.randn(6, 4))
    state = {
        "fc.weight._data": q, "fc.weight._scale": scale[:, None], "fc.input_scale": torch.ones(()),
        "fc.output_scale": torch.ones(()), "fc.bias": torch.ones(6),
    }  # fmt: skip
    assert torch.equal(values(state, "fc.weight"), q * scale[:, None])
    assert packed(state).names[0][1] == ("fc.weight", "fc.bias")


class Coded(torch.Tensor):
    """A tensor class that decodes itself, as those of torchao do."""

    def dequantize(self) -> Tensor:
        return self.as_subclass(Tensor).float() * 0.5


def test_tensor_classes_that_decode_themselves() -> None:
    q = torch.randint(-9, 9, (3, 4), dtype=torch.int8)
    assert torch.equal(values({"fc.weight": q.as_subclass(Coded)}, "fc.weight"), q * 0.5)
    network = nn.Linear(4, 3)
    network.weight = nn.Parameter(q.as_subclass(Coded), requires_grad=False)
    assert torch.equal(values(network, "weight"), q * 0.5)


# ---------------------------------------------------------------------------------------------------------------------
# What is not known


@pytest.mark.parametrize(
    ("entries", "tensor"),
    [
        ({"fc.weight": torch.ones(4, 4, dtype=torch.int8)}, "fc.weight"),
        ({"fc.weight": torch.ones(4, 4, dtype=torch.uint8), "fc.weight_scale": torch.ones(4)}, "fc.weight"),
        ({"fc.weight": torch.ones(4, 4, dtype=torch.int8), "fc.weight_scale": torch.ones(3)}, "fc.weight"),
        ({"fc.weight": torch.ones(4, 4, dtype=torch.int8), "fc.SCB": torch.ones(3)}, "fc.weight"),
        ({"fc.weight": torch.ones(4, 4, dtype=torch.bool)}, "fc.weight"),
        ({"fc.bias": torch.ones(4, dtype=torch.int32)}, "fc.bias"),
        ({"fc.qweight": torch.ones(4, 4, dtype=torch.int32)}, "fc.qweight"),
        ({"fc.qweight": torch.ones(4, 5, dtype=torch.int32), "fc.scales": torch.ones(2, 8)}, "fc.qweight"),
        ({"fc.B": torch.ones(4, 4, dtype=torch.int32), "fc.scales": torch.ones(4)}, "fc.B"),
        ({"fc.W_q": torch.ones(4, 4, dtype=torch.uint8)}, "fc.W_q"),
        ({"layer.0": torch.ones(4, 4, dtype=torch.int8)}, "layer.0"),
        ({"fc.weight_packed": torch.ones(4, 4, dtype=torch.int32), "fc.scale": torch.ones(4)}, "fc.weight_packed"),
        ({"emb.weight": torch.ones(4, 4, dtype=torch.int64)}, "emb.weight"),
    ],
    ids=lambda v: v if isinstance(v, str) else ", ".join(v),
)
def test_quantised_weights_of_unknown_formats_are_refused_by_name(entries: dict, tensor: str) -> None:
    network = {"head.weight": torch.ones(2, 2), **entries}
    with pytest.raises(ValueError, match=rf"network 0 \('state_dict'\), tensor '{tensor}' looks like a quantised"):
        pack([network])


def test_buffers_of_packed_integers_in_modules_are_decoded_or_refused() -> None:
    q = torch.randint(0, 16, (8, 8))

    class QuantLinear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            words = torch.tensor([stream(column, 4) for column in q.t().tolist()], dtype=torch.int32).t()
            self.register_buffer("qweight", words)
            self.register_buffer("qzeros", torch.tensor([stream([7] * 8, 4)], dtype=torch.int32))
            self.register_buffer("scales", torch.ones(1, 8))
            self.bias = nn.Parameter(torch.ones(8))

    network = nn.Sequential(QuantLinear(), nn.Linear(8, 2))
    assert torch.equal(values(network, "0.weight"), (q - 8).t().float())
    assert torch.equal(packed(network).tensor_type, packed(network.state_dict()).tensor_type)
    del network[0].scales
    with pytest.raises(ValueError, match=r"network 0 \('Sequential'\), tensor '0.qweight' looks like a quantised"):
        pack([network])


def test_quantised_and_plain_forms_of_one_weight_are_refused() -> None:
    q, scale = int8_rows(torch.randn(6, 4))
    state = {"fc.weight": torch.ones(6, 4), "fc.weight._data": q, "fc.weight._scale": scale}
    with pytest.raises(ValueError, match=r"has 'fc.weight' beside its quantised form 'fc.weight._data'"):
        pack([state])


def test_integer_buffers_are_left_out_and_counted() -> None:
    state = {
        "fc.weight": torch.ones(2, 2), "bn.num_batches_tracked": torch.tensor(3),
        "position_ids": torch.arange(8)[None], "attn.relative_position_index": torch.zeros(4, 4, dtype=torch.int64),
        "causal": torch.ones(4, 4, dtype=torch.bool), "h.attn.bias": torch.ones(1, 1, 4, 4, dtype=torch.uint8),
        "torch_rng_state": torch.zeros(16, dtype=torch.uint8), "edge_index": torch.zeros(2, 9, dtype=torch.int64),
        "attention_mask": torch.ones(3, 3, dtype=torch.uint8), "queue_ptr": torch.zeros(1, dtype=torch.int64),
    }  # fmt: skip
    assert packed(state).names[0][1] == ("fc.weight",) and skipped(state).keys() == state.keys() - {"fc.weight"}


def test_gradients_reach_float_weights_beside_quantised_ones() -> None:
    q, scale = int8_rows(torch.randn(6, 4))
    bias = torch.ones(6, requires_grad=True)
    packed({"fc.weight": q, "fc.weight_scale": scale, "fc.bias": bias}).values.sum().backward()
    assert bias.grad is not None and bias.grad.tolist() == [1.0] * 6
