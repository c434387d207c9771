"""pack: cutting against a loop over elements, scales, NaN, gradients, levels, devices and every refusal."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.masked import masked_tensor

import sne_fast
from helpers.networks import FACTORIES, make
from sne_fast import WeightBatch, pack

CHUNKINGS = ("flat", "neuron", "kernel")
F64 = torch.float64
NAMES = ("mlp", "cnn", "resnet_block", "transformer", "transformer_tied", "recurrent", "one_scalar", "oddities")


def cut(tensor: Tensor, chunk_size: int, chunking: str, kernels: bool = True) -> list[list[float]]:
    """Cut one element after another."""
    if tensor.ndim == 0:
        return [[tensor.item()]]
    if tensor.ndim == 1:
        rows = [tensor.tolist()]
    elif tensor.ndim > 2 and not kernels:
        rows = [tensor.flatten().tolist()] if chunking == "flat" else tensor.reshape(-1, tensor.shape[-1]).tolist()
    else:
        out, width = tensor.shape[:2]
        positions = list(itertools.product(*(range(k) for k in tensor.shape[2:])))
        if chunking == "kernel" and tensor.ndim > 2:
            rows = [[tensor[(o, i, *p)].item() for p in positions] for o in range(out) for i in range(width)]
        elif chunking == "flat":
            rows = [[tensor[(o, i, *p)].item() for o in range(out) for i in range(width)] for p in positions]
        else:
            rows = [[tensor[(o, i, *p)].item() for i in range(width)] for p in positions for o in range(out)]
    return [row[a : a + chunk_size] for row in rows for a in range(0, len(row), chunk_size)]


def own_tensors(module: nn.Module) -> list[tuple[str, list[tuple[str, Tensor]]]]:
    """Return a module's layers: parameters at their first place, running statistics of normalisations."""
    seen: set[int] = set()
    layers = []
    for layer, owner in module.named_modules():
        held = [(n, p) for n, p in owner.named_parameters(recurse=False)]
        if isinstance(owner, nn.modules.batchnorm._NormBase):
            held += [(n, b) for n, b in owner.named_buffers(recurse=False) if n in ("running_mean", "running_var")]
        held = [(f"{layer}.{n}".strip("."), t) for n, t in held if id(t) not in seen]
        seen |= {id(t) for _, t in held}
        held = [(n, torch.view_as_real(t).flatten(-2) if t.is_complex() else t) for n, t in held]
        if held:
            layers.append((layer, held))
    return layers


# ---------------------------------------------------------------------------------------------------------------------
# Cutting


@pytest.mark.parametrize("chunking", CHUNKINGS)
@pytest.mark.parametrize("name", NAMES)
def test_networks_are_cut_element_by_element(name: str, chunking: str) -> None:
    network = make(name, seed=3)
    b = pack([network], 5, chunking, scale="none", order="definition", dtype=F64)
    layers = own_tensors(network)
    tensors = [t for _, held in layers for _, t in held]
    kernels = [tensor_type in (8, 16) for tensor_type in b.tensor_type.tolist()]
    cuts = [cut(t.double(), 5, chunking, kernel) for t, kernel in zip(tensors, kernels, strict=True)]
    chunks = [chunk for found in cuts for chunk in found]
    assert [v.tolist() for v in b.values.split(b.chunk_ptr.diff().tolist())] == chunks
    assert b.tensor_ptr.diff().tolist() == list(map(len, cuts))
    assert b.layer_ptr.diff().tolist() == [len(held) for _, held in layers]
    assert b.network_ptr.tolist() == [0, len(layers)] and b.layer_level.tolist() == list(range(len(layers)))
    assert b.names == ((type(network).__name__, tuple(n for _, held in layers for n, _ in held)),)
    assert b.shapes == (tuple(tuple(t.shape) for t in tensors),)
    assert b.chunk_size == 5 and b.chunking == chunking and b.tensor_scale.tolist() == [1.0] * len(tensors)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    st.lists(st.lists(st.integers(1, 7), max_size=5), min_size=1, max_size=4),
    st.integers(1, 40),
    st.sampled_from(CHUNKINGS),
    st.booleans(),
)
def test_pointers_of_any_shapes(shapes: list, chunk_size: int, chunking: str, strided: bool) -> None:
    state = {}
    for i, shape in enumerate(shapes):
        t = torch.randn(shape, dtype=F64)
        state[f"{i}.weight"] = t.flip(0).transpose(0, -1).contiguous().transpose(0, -1) if strided and shape else t
    b = pack([state], chunk_size, chunking, scale="none", dtype=F64)
    assert b.chunk_ptr[0] == 0 and (b.chunk_ptr.diff() >= 1).all() and (b.chunk_ptr.diff() <= chunk_size).all()
    assert b.chunk_ptr[-1] == sum(t.numel() for t in state.values()) == b.num_weights
    chunks = [chunk for t in state.values() for chunk in cut(t, chunk_size, chunking)]
    assert [v.tolist() for v in b.values.split(b.chunk_ptr.diff().tolist())] == chunks
    one = pack([{"weight": t} for t in state.values()], chunk_size, chunking, scale="none", dtype=F64)
    assert torch.equal(one.values, b.values) and torch.equal(one.chunk_ptr, b.chunk_ptr)
    assert len(one) == len(shapes) and torch.equal(WeightBatch.cat(list(one)).chunk_ptr, b.chunk_ptr)


def test_together_or_alone_is_the_same() -> None:
    networks = [make(name) for name in NAMES]
    together, alone = pack(networks), WeightBatch.cat([pack([network]) for network in networks])
    for field in ("values", "chunk_ptr", "tensor_ptr", "layer_ptr", "network_ptr", "tensor_type", "layer_level"):
        assert torch.equal(getattr(together, field), getattr(alone, field)), field
    assert torch.equal(together.tensor_scale, alone.tensor_scale)
    assert together.names == alone.names and together.shapes == alone.shapes


def test_one_network_alone_is_a_sequence_of_one(tmp_path) -> None:
    network = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    torch.save(network.state_dict(), tmp_path / "n.pt")
    forms = [network, network.state_dict(), tmp_path / "n.pt", str(tmp_path / "n.pt"), (n for n in [network])]
    for form in forms:
        b = pack(form)
        assert len(b) == 1 and torch.equal(b.values, pack([network]).values)
    assert pack(tmp_path / "n.pt").names[0][0] == str(tmp_path / "n.pt")


# ---------------------------------------------------------------------------------------------------------------------
# Scale, dtype, NaN


@pytest.mark.parametrize("source", [torch.float16, torch.bfloat16, torch.float32, F64])
def test_scale_is_the_root_mean_square_in_float64(source: torch.dtype) -> None:
    tensors = {f"{i}.w": (3.0**i * torch.randn(n)).to(source) for i, n in enumerate((1, 7, 20_000, 40_000, 5, 16_384))}
    b = pack([tensors], dtype=F64)
    rms = torch.stack([t.double().square().mean().sqrt() for t in tensors.values()])
    torch.testing.assert_close(b.tensor_scale, rms, rtol=1e-14, atol=0)
    whole = torch.cat([t.double() / r for t, r in zip(tensors.values(), rms, strict=True)])
    torch.testing.assert_close(b.values, whole, rtol=1e-14, atol=0)


@pytest.mark.parametrize("source", [torch.bfloat16, torch.float32, F64])
def test_the_source_is_not_touched(source: torch.dtype) -> None:
    tensors = {"a": torch.randn(3, 2).to(source), "b": torch.randn(20_000).to(source)}
    copies = {name: t.clone() for name, t in tensors.items()}
    for nonfinite in ("raise", "zero"):
        b = pack([tensors], nonfinite=nonfinite, dtype=source)
        b.values.zero_()
        assert all(torch.equal(tensors[name], copies[name]) for name in tensors)


@pytest.mark.parametrize(
    ("dtype", "scale_dtype"),
    [(torch.float16, torch.float32), (torch.bfloat16, torch.float32), (torch.float32, torch.float32), (F64, F64)],
)
def test_scale_follows_the_values_but_not_below_float32(dtype: torch.dtype, scale_dtype: torch.dtype) -> None:
    for scale in ("tensor", "none"):
        b = pack([nn.Linear(3, 3)], dtype=dtype, scale=scale)
        assert b.values.dtype == dtype and b.tensor_scale.dtype == scale_dtype


def test_zeros_are_divided_by_one() -> None:
    b = pack([{"a": torch.zeros(3), "b": torch.zeros(40_000, dtype=F64), "c": torch.full((2,), 2.0)}])
    assert b.tensor_scale.tolist() == [1, 1, 2] and not b.values[:-2].any() and b.values[-2:].tolist() == [1, 1]


@pytest.mark.parametrize("size", [3, 20_000])
@pytest.mark.parametrize("exponent", [-300, -170, 160, 300])
def test_squares_that_leave_float64_do_not_matter(exponent: int, size: int) -> None:
    tensor = torch.linspace(-1, 1, size, dtype=F64) * 10.0**exponent
    b = pack([{"w": tensor}], dtype=F64)
    want = 10.0**exponent * math.sqrt(float(torch.linspace(-1, 1, size, dtype=F64).square().mean()))
    assert b.tensor_scale.item() == pytest.approx(want, rel=1e-12)
    assert b.values.square().mean().item() == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize("size", [5, 40_000])
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16, F64, torch.float8_e5m2])
def test_nan_and_infinity(size: int, source: torch.dtype) -> None:
    tensor = torch.ones(size)
    tensor[1], tensor[2], tensor[4] = math.nan, math.inf, -math.inf
    networks = [nn.Linear(2, 2), {"fc.bias": torch.ones(2), "head.weight": tensor.to(source)}]
    message = (
        rf"network 1 \('state_dict'\), tensor 'head.weight' has 1 NaN and 2 inf among {size} values; use nonfinite"
    )
    for scale in ("tensor", "none"):
        with pytest.raises(ValueError, match=message):
            pack(networks, scale=scale)
    zeroed = pack(networks, nonfinite="zero")[1]
    rms = math.sqrt((size - 3) / size)
    assert zeroed.tensor_scale[1].item() == pytest.approx(rms)
    want = torch.where(tensor.isfinite(), tensor, 0) / rms
    torch.testing.assert_close(zeroed.values[2:], want)
    torch.testing.assert_close(pack(networks, nonfinite="zero", scale="none")[1].values[2:], want * rms)
    for scale in ("tensor", "none"):
        kept = pack(networks, nonfinite="keep", scale=scale)[1]
        assert kept.tensor_scale[1] == 1
        torch.testing.assert_close(kept.values[2:], tensor, equal_nan=True)


def test_values_beyond_the_dtype_are_refused_not_made_infinite() -> None:
    wide = [{"fc.weight": torch.tensor([1.0, -1e39], dtype=F64)}]
    with pytest.raises(ValueError, match=r"tensor 'fc.weight' has values up to 1e\+39, beyond torch.float32"):
        pack(wide)
    assert pack(wide, dtype=F64).values.isfinite().all()
    half = [{"fc.weight": torch.tensor([1.0, -1e6])}]
    with pytest.raises(ValueError, match=r"values up to 1e\+06, beyond torch.float16 \(at most 6.55e\+04\)"):
        pack(half, dtype=torch.float16, scale="none")
    assert pack(half, dtype=torch.float16).values.isfinite().all()  # divided in float32, then cast
    many = torch.full((100, 100), 1000.0)  # its norm is beyond float16, its values are not
    assert pack([{"w": many}], dtype=torch.float16, scale="none").values.max() == 1000


# ---------------------------------------------------------------------------------------------------------------------
# Gradients


@pytest.mark.parametrize("scale", ["tensor", "none"])
@pytest.mark.parametrize("chunking", CHUNKINGS)
def test_gradcheck(chunking: str, scale: str) -> None:
    torch.manual_seed(0)
    tensors = [torch.randn(s, dtype=F64, requires_grad=True) for s in ((2, 3), (2, 2, 2), (3,), ())]

    def packed(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        b = pack([dict(zip("abcd", tensors, strict=True))], 2, chunking, scale=scale, dtype=F64)
        return b.values * 1, b.tensor_scale * 1

    assert torch.autograd.gradcheck(packed if scale == "tensor" else lambda *t: packed(*t)[0], tensors)


def test_gradients_reach_parameters_and_skip_what_was_zeroed() -> None:
    network = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Linear(2, 1))
    network[0].requires_grad_(False)
    b = pack([network])
    assert b.values.requires_grad and b.tensor_scale.requires_grad
    (b.values.square() * torch.arange(b.num_weights)).sum().backward()
    assert network[0].weight.grad is None and network[2].weight.grad.abs().sum() > 0
    tensor = torch.tensor([1.0, math.nan, 2.0], requires_grad=True)
    b = pack([{"w": tensor}], nonfinite="zero")
    ((b.values * torch.tensor([1.0, 5.0, 2.0])).sum() + b.tensor_scale.sum()).backward()
    assert tensor.grad.isfinite().all() and tensor.grad[1] == 0 and tensor.grad[0] != 0
    zero = torch.zeros(3, requires_grad=True)
    pack([{"w": zero}]).values.sum().backward()
    assert zero.grad.tolist() == [1, 1, 1]  # divided by one


def test_the_numbers_do_not_depend_on_gradients() -> None:
    network = make("cnn")
    wanted = pack([network], dtype=F64)
    with torch.no_grad():
        plain = pack([network], dtype=F64)
    assert not plain.values.requires_grad and not plain.tensor_scale.requires_grad
    assert torch.equal(wanted.values, plain.values) and torch.equal(wanted.tensor_scale, plain.tensor_scale)
    frozen = pack([make("cnn").requires_grad_(False)])
    assert not frozen.values.requires_grad and not frozen.tensor_scale.requires_grad


@pytest.mark.parametrize("source", [torch.float16, torch.bfloat16])
def test_gradients_reach_halves(source: torch.dtype) -> None:
    w = torch.randn(4, 4).to(source).requires_grad_()
    x = w.detach().double().requires_grad_()
    weights = torch.arange(16.0)
    (pack([{"w": w}]).values * weights).sum().backward()
    ((x / x.square().mean().sqrt()).flatten() * weights.double()).sum().backward()
    assert w.grad.dtype == source
    torch.testing.assert_close(w.grad.double(), x.grad, rtol=2e-2, atol=2e-2 * float(x.grad.abs().max()))


# ---------------------------------------------------------------------------------------------------------------------
# Refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chunk_size": 0}, "chunk_size must be an integer of at least 1, got 0"),
        ({"chunk_size": 2.0}, "chunk_size must be an integer of at least 1, got 2.0"),
        ({"chunk_size": True}, "chunk_size must be an integer"),
        ({"chunk_size": 2**70}, "chunk_size must be an integer"),
        ({"device": "nowhere"}, "device must be one that torch has, got 'nowhere'"),
        ({"device": 1.5}, "device must be one that torch has, got 1.5"),
        ({"layer_level": [2**70]}, "layer_level must be integers of at least 0"),
        ({"chunking": "row"}, "chunking must be one of 'flat', 'neuron', 'kernel', got 'row'"),
        ({"scale": "zoo"}, "scale must be one of 'tensor', 'none', got 'zoo'"),
        ({"nonfinite": None}, "nonfinite must be one of 'raise', 'zero', 'keep', got None"),
        ({"dtype": torch.int32}, "dtype must be one of torch.float16, .* got torch.int32"),
        ({"dtype": torch.float8_e5m2}, "dtype must be one of .* got torch.float8_e5m2"),
    ],
    ids=str,
)
def test_unknown_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match="pack: " + message):
        pack([nn.Linear(2, 2)], **options)


def test_networks_that_are_none() -> None:
    with pytest.raises(ValueError, match="at least one network, got an empty sequence"):
        pack([])
    for wrong in (None, 3, torch.zeros(3)):
        with pytest.raises(TypeError, match="networks must be a sequence of modules, state_dicts or paths, got"):
            pack(wrong)  # type: ignore[arg-type]
    with pytest.raises(
        TypeError, match=r"network 1 must be an nn.Module, a state_dict or a path to a checkpoint, got int"
    ):
        pack([nn.Linear(2, 2), 3])  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"network 1 \('Sequential'\) has no floating-point parameters"):
        pack([nn.Linear(2, 2), nn.Sequential(nn.ReLU())])
    with pytest.raises(ValueError, match=r"network 0 \('state_dict'\) has no floating-point parameters"):
        pack([{"steps": torch.tensor(3)}])


def fake() -> Tensor:
    with FakeTensorMode():
        return torch.zeros(3)


@pytest.mark.parametrize(
    ("make_tensor", "message"),
    [
        (lambda: torch.eye(3).to_sparse(), "is sparse .*to_dense"),
        (lambda: torch.zeros(3, device="meta"), "is on the meta device and has no values"),
        (lambda: nn.UninitializedParameter(), "is not initialised yet"),
        (fake, "is fake and has no values"),
        (lambda: masked_tensor(torch.ones(2), torch.tensor([True, False])), "is masked .*to_tensor"),
        (lambda: torch.zeros(2, dtype=torch.float4_e2m1fn_x2), "packs two numbers per element"),
    ],
    ids=["sparse", "meta", "lazy", "fake", "masked", "fp4"],
)
def test_tensors_that_cannot_be_cut(make_tensor: Callable[[], Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=r"network 1 \('state_dict'\), tensor 'fc.weight' " + message):
        pack([nn.Linear(2, 2), {"fc.bias": torch.zeros(2), "fc.weight": make_tensor()}])


def test_lazy_modules_are_refused_and_empty_parameters_left_out() -> None:
    with pytest.raises(ValueError, match=r"network 0 \('Sequential'\), tensor '0.weight' is not initialised yet"):
        pack([nn.Sequential(nn.LazyLinear(3))])
    with pytest.warns(UserWarning):
        assert pack([nn.Linear(0, 3)]).names[0][1] == ("bias",)


@pytest.mark.parametrize(
    ("state", "error", "message"),
    [
        ({}, ValueError, "must map names to tensors, .*; it holds nothing"),
        ({"encoder": {"w": 1.0}}, ValueError, "must map names to tensors, .*; it holds 'encoder'"),
        ({"w": torch.ones(1), "more": {"w": torch.ones(1)}}, ValueError, "holds tensors in 2 places, the top .*'more'"),
        ({"w": torch.ones(1), "m": torch.ones(1).numpy()}, TypeError, "'m' must be a tensor, got ndarray"),
        ({"w": torch.ones(1), "m": nn.ReLU()}, TypeError, "'m' must be a tensor, got ReLU"),
        ({3: torch.ones(1)}, TypeError, "must have strings as keys, got 3"),
    ],
    ids=["empty", "nested", "both", "numpy", "module", "key"],
)
def test_mappings_that_are_no_state_dict(state: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=r"pack: network 0 \('state_dict'\).*" + message):
        pack([state])


def test_devices() -> None:
    assert pack([nn.Linear(2, 2)], device="cpu").device.type == "cpu"
    away = pack([nn.Linear(2, 2)], device="meta")
    assert away.device.type == "meta" and away.chunk_ptr_host.tolist() == [0, 4, 6]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_packing_on_a_gpu() -> None:
    network = make("oddities")
    on_cpu = pack([network])
    mixed = [network, nn.Linear(2, 2).cuda()]
    with pytest.raises(
        ValueError, match=r"all tensors must be on one device, got network 0 .* on cpu; network 1 .* cuda:0"
    ):
        pack(mixed)
    assert pack(mixed, device="cuda").device.type == pack(mixed, device="cuda")[0].device.type == "cuda"
    for b in (pack([network], device="cuda"), pack([make("oddities").cuda()])):
        assert b.device.type == "cuda" and b.chunk_ptr_host.device.type == "cpu"
        torch.testing.assert_close(b.values.cpu(), on_cpu.values, rtol=1e-6, atol=0)
        torch.testing.assert_close(b.tensor_scale.cpu(), on_cpu.tensor_scale, rtol=1e-6, atol=0)
    with pytest.raises(ValueError, match="tensor 'w' has 1 NaN"):
        pack([{"w": torch.tensor([math.nan], device="cuda")}])


# ---------------------------------------------------------------------------------------------------------------------
# Cost


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_packing_takes_little_memory_besides_the_values(tmp_path: Path) -> None:
    code = """
        import torch, sne_fast
        from sne_fast.benchmark.networks import gpt2_state_dict

        def resident(field):  # bytes; the peak of this program alone: ru_maxrss starts at that of the test process
            lines = open("/proc/self/status").read().splitlines()
            return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field + ":"))

        sne_fast.pack([torch.nn.Linear(40, 30).state_dict()])
        state = gpt2_state_dict(layers=4)
        size = sum(t.nbytes for t in state.values())
        before = resident("VmRSS")
        batch = sne_fast.pack([state])
        assert batch.num_weights * 4 == size
        print((resident("VmHWM") - before) / size)
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=300, cwd=tmp_path
    )
    assert run.returncode == 0, run.stderr
    assert 1.0 < float(run.stdout) < 1.2, run.stdout


def test_public_names() -> None:
    assert sne_fast.pack is pack and set(NAMES) <= set(FACTORIES)


def test_a_default_device_does_not_move_what_stays_on_the_host():
    network = torch.nn.Linear(4, 3)
    expected = pack([network])
    with torch.device("meta"):
        batch = pack([network])
    assert batch.device.type == "cpu" and torch.equal(batch.values, expected.values)


@pytest.mark.parametrize("shape", [(3, 3), (2**20, 2**20)])
def test_a_tensor_with_more_elements_than_are_stored_is_refused(shape):
    expanded = torch.zeros(1).expand(shape)
    with pytest.raises(ValueError, match=r"'a.weight' has more elements than are stored of it"):
        sne_fast.pack([{"a.weight": expanded}])
    module = nn.Module()
    module.weight = nn.Parameter(expanded)
    with pytest.raises(ValueError, match=r"'weight' has more elements than are stored of it"):
        sne_fast.pack([module])
    sne_fast.pack([{"a.weight": torch.zeros(3, 3).t()}])
