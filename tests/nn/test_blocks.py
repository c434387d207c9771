"""The blocks against a dense Set Transformer with the public implementation's names, loaded by state_dict."""

from __future__ import annotations

import math
import re

import pytest
import torch
from torch import Tensor, nn

import sne_fast
from helpers import brute_force
from helpers.networks import randomise_
from helpers.op_cases import pointer

# ---------------------------------------------------------------------------------------------------------------------
# The dense blocks: (batch, n, dim) tensors, every set of the batch of one size, by the formulas of the blocks


class DenseMAB(nn.Module):
    def __init__(self, dim_q: int, dim_k: int, dim_v: int, num_heads: int, ln: bool = False) -> None:
        super().__init__()
        self.dim_v, self.num_heads = dim_v, num_heads
        self.fc_q = nn.Linear(dim_q, dim_v)
        self.fc_k = nn.Linear(dim_k, dim_v)
        self.fc_v = nn.Linear(dim_k, dim_v)
        if ln:
            self.ln0 = nn.LayerNorm(dim_v)
            self.ln1 = nn.LayerNorm(dim_v)
        self.fc_o = nn.Linear(dim_v, dim_v)

    def forward(self, q_in: Tensor, k_in: Tensor) -> Tensor:
        q, k, v = self.fc_q(q_in), self.fc_k(k_in), self.fc_v(k_in)
        # heads stacked along the batch, the way the public code does it
        q_, k_, v_ = (torch.cat(x.split(self.dim_v // self.num_heads, 2), 0) for x in (q, k, v))
        attention = torch.softmax(q_.bmm(k_.transpose(1, 2)) / math.sqrt(self.dim_v), 2)
        o = torch.cat((q_ + attention.bmm(v_)).split(q.size(0), 0), 2)
        o = self.ln0(o) if hasattr(self, "ln0") else o
        o = o + torch.relu(self.fc_o(o))
        return self.ln1(o) if hasattr(self, "ln1") else o


class DenseSAB(nn.Module):
    def __init__(self, dim_in: int, dim_out: int, num_heads: int, ln: bool = False) -> None:
        super().__init__()
        self.mab = DenseMAB(dim_in, dim_in, dim_out, num_heads, ln)

    def forward(self, x: Tensor) -> Tensor:
        return self.mab(x, x)


class DenseISAB(nn.Module):
    def __init__(self, dim_in: int, dim_out: int, num_heads: int, num_inds: int, ln: bool = False) -> None:
        super().__init__()
        self.I = nn.Parameter(torch.empty(1, num_inds, dim_out))
        self.mab0 = DenseMAB(dim_out, dim_in, dim_out, num_heads, ln)
        self.mab1 = DenseMAB(dim_in, dim_out, dim_out, num_heads, ln)

    def forward(self, x: Tensor) -> Tensor:
        return self.mab1(x, self.mab0(self.I.repeat(x.size(0), 1, 1), x))


class DensePMA(nn.Module):
    def __init__(self, dim: int, num_heads: int, num_seeds: int, ln: bool = False) -> None:
        super().__init__()
        self.S = nn.Parameter(torch.empty(1, num_seeds, dim))
        self.mab = DenseMAB(dim, dim, dim, num_heads, ln)

    def forward(self, x: Tensor) -> Tensor:
        return self.mab(self.S.repeat(x.size(0), 1, 1), x)


@pytest.fixture(autouse=True)
def reference():
    with sne_fast.use_backend("reference"):
        yield


SIZES = {"equal": [5, 5, 5], "unequal": [1, 7, 2, 33, 4, 1], "one": [6], "single elements": [1, 1]}
CASES = [
    pytest.param(sizes, ln, heads, id=f"{name}-{'ln' if ln else 'plain'}-{heads}")
    for name, sizes in SIZES.items()
    for ln in (False, True)
    for heads in (1, 4)
]


def loaded(dense: nn.Module, packed: nn.Module, seed: int = 0) -> tuple[nn.Module, nn.Module]:
    """Set random parameters in `dense`, none of them zero, and the same in `packed` through a strict load."""
    randomise_(dense.double(), seed)
    packed = packed.double()
    packed.load_state_dict(dense.state_dict(), strict=True)
    return dense, packed


def dense_sets(dense: nn.Module, sizes: list[int], *rows: Tensor) -> Tensor:
    """Run the dense block, one set at a time (`rows` of one size list), outputs stacked as packed rows."""
    parts = [x.split(sizes) for x in rows]
    return torch.cat([dense(*(x[None] for x in sets))[0] for sets in zip(*parts, strict=True)])


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    assert actual.shape == expected.shape
    error = (actual - expected).abs().max() / expected.abs().max()
    assert error <= tolerance, f"relative error {error:.2e}"


def gradients_close(
    dense: nn.Module, packed: nn.Module, inputs: list[Tensor], expected: Tensor, actual: Tensor
) -> None:
    direction = torch.randn(expected.shape, generator=torch.Generator().manual_seed(3), dtype=expected.dtype)
    names = [name for name, _ in dense.named_parameters()]
    want = torch.autograd.grad((expected * direction).sum(), [*inputs, *dense.parameters()])
    parameters = dict(packed.named_parameters())
    got = torch.autograd.grad((actual * direction).sum(), [*inputs, *(parameters[name] for name in names)])
    largest = max(g.abs().max() for g in want)
    for name, g, w in zip([*("input" for _ in inputs), *names], got, want, strict=True):
        # a gradient that is zero in exact arithmetic (fc_k.bias) is judged by the size of the others
        error = (g - w).abs().max()
        assert error <= 1e-12 * max(w.abs().max(), 1e-2 * largest), f"{name}: {error:.2e} of {w.abs().max():.2e}"


def rows(count: int, dim: int, seed: int) -> Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()


# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim_in", [1, 16, 24])
@pytest.mark.parametrize(("sizes", "ln", "heads"), CASES)
def test_sab(sizes: list[int], ln: bool, heads: int, dim_in: int) -> None:
    dense, packed = loaded(DenseSAB(dim_in, 16, heads, ln), sne_fast.SAB(dim_in, 16, heads, layer_norm=ln))
    x = rows(sum(sizes), dim_in, 1)
    expected = dense_sets(dense, sizes, x)
    actual = packed(x, pointer(sizes))
    close(actual, expected)
    gradients_close(dense, packed, [x], expected, actual)


@pytest.mark.parametrize("inducing", [1, 5])
@pytest.mark.parametrize(("sizes", "ln", "heads"), CASES)
def test_isab(sizes: list[int], ln: bool, heads: int, inducing: int) -> None:
    dense, packed = loaded(DenseISAB(8, 16, heads, inducing, ln), sne_fast.ISAB(8, 16, heads, inducing, layer_norm=ln))
    x = rows(sum(sizes), 8, 1)
    expected = dense_sets(dense, sizes, x)
    actual = packed(x, pointer(sizes))
    close(actual, expected)
    gradients_close(dense, packed, [x], expected, actual)


@pytest.mark.parametrize("seeds", [1, 3])
@pytest.mark.parametrize(("sizes", "ln", "heads"), CASES)
def test_pma(sizes: list[int], ln: bool, heads: int, seeds: int) -> None:
    dense, packed = loaded(DensePMA(16, heads, seeds, ln), sne_fast.PMA(16, heads, seeds, layer_norm=ln))
    x = rows(sum(sizes), 16, 1)
    expected = torch.stack([dense(one[None])[0] for one in x.split(sizes)])
    actual = packed(x, pointer(sizes))
    assert actual.shape == (len(sizes), seeds, 16)
    close(actual, expected)
    gradients_close(dense, packed, [x], expected, actual)


@pytest.mark.parametrize("ln", [False, True])
@pytest.mark.parametrize(
    ("q_sizes", "k_sizes"), [([3, 3], [5, 5]), ([1, 4, 2], [6, 1, 3])], ids=["equal sizes", "unequal sizes"]
)
def test_mab_between_two_different_sets(q_sizes: list[int], k_sizes: list[int], ln: bool) -> None:
    dense, packed = loaded(DenseMAB(6, 10, 16, 2, ln), sne_fast.MAB(6, 10, 16, 2, layer_norm=ln))
    q, k = rows(sum(q_sizes), 6, 1), rows(sum(k_sizes), 10, 2)
    expected = torch.cat([dense(a[None], b[None])[0] for a, b in zip(q.split(q_sizes), k.split(k_sizes), strict=True)])
    actual = packed(q, k, pointer(q_sizes), pointer(k_sizes))
    close(actual, expected)
    gradients_close(dense, packed, [q, k], expected, actual)


@pytest.mark.parametrize("ln", [False, True])
def test_equal_sizes_equal_one_dense_batch(ln: bool) -> None:
    """With sets of one size the dense code runs on the whole batch at once: nothing leaks between sets."""
    for dense, packed in (
        loaded(DenseSAB(8, 32, 4, ln), sne_fast.SAB(8, 32, 4, layer_norm=ln)),
        loaded(DenseISAB(8, 32, 4, 3, ln), sne_fast.ISAB(8, 32, 4, 3, layer_norm=ln)),
        loaded(DensePMA(8, 1, 2, ln), sne_fast.PMA(8, 1, 2, layer_norm=ln)),
    ):
        x = rows(4 * 6, 8, 1)
        expected = dense(x.reshape(4, 6, 8)).reshape(-1)
        close(packed(x, pointer([6] * 4)).reshape(-1), expected)


@pytest.mark.parametrize(
    "block",
    [
        lambda ln: (DenseSAB(16, 16, 2, ln), sne_fast.SAB(16, 16, 2, layer_norm=ln)),
        lambda ln: (DenseISAB(16, 16, 2, 4, ln), sne_fast.ISAB(16, 16, 2, 4, layer_norm=ln)),
        lambda ln: (DensePMA(16, 2, 2, ln), sne_fast.PMA(16, 2, 2, layer_norm=ln)),
        lambda ln: (DenseMAB(3, 5, 16, 2, ln), sne_fast.MAB(3, 5, 16, 2, layer_norm=ln)),
    ],
    ids=["SAB", "ISAB", "PMA", "MAB"],
)
def test_state_dicts_are_exchangeable_and_norms_default_to_off(block) -> None:
    for ln in (False, True):
        dense, packed = block(ln)
        ours = packed.state_dict()
        assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in dense.state_dict().items()}
        dense.load_state_dict(ours, strict=True)
        norms = [m for m in packed.modules() if isinstance(m, nn.LayerNorm)]
        assert all(m.eps == 1e-5 for m in norms)
    assert not any("ln" in key for key in sne_fast.SAB(4, 8, 1).state_dict())


def test_module_defaults_are_linear_and_xavier() -> None:
    """Modules start as nn.Linear does, S and I by xavier_uniform_: inside their bounds and filling them."""
    torch.manual_seed(0)
    sab = sne_fast.SAB(25, 64, 4)
    for m in (sab.mab.fc_q, sab.mab.fc_k, sab.mab.fc_v, sab.mab.fc_o):
        bound = 1 / math.sqrt(m.in_features)
        assert 0.9 * bound < m.weight.abs().max() <= bound
        assert 0.8 * bound < m.bias.abs().max() <= bound
    for p in (sne_fast.PMA(64, 4, 8).S, sne_fast.ISAB(16, 64, 4, 8).I):
        probe = nn.init.xavier_uniform_(torch.empty_like(p))
        reach = math.sqrt(6 / (8 * 64 + 64))  # fans of a (1, 8, 64) tensor: 1 * 64 and 8 * 64
        assert probe.abs().max() <= reach
        assert 0.9 * reach < p.detach().abs().max() <= reach


# ---------------------------------------------------------------------------------------------------------------------
# The names of parameters


def expected_names(h: int, ln: bool, attention: str, m: int) -> dict[str, tuple[int, ...]]:
    def mab(prefix: str, q: int, k: int) -> dict[str, tuple[int, ...]]:
        shapes = {}
        for name, n_in in (("fc_q", q), ("fc_k", k), ("fc_v", k), ("fc_o", h)):
            shapes |= {f"{prefix}.{name}.weight": (h, n_in), f"{prefix}.{name}.bias": (h,)}
        for name in ("ln0", "ln1") if ln else ():
            shapes |= {f"{prefix}.{name}.weight": (h,), f"{prefix}.{name}.bias": (h,)}
        return shapes

    shapes: dict[str, tuple[int, ...]] = {"type_embedding.weight": (64, h)}
    for b in range(4):
        n_in = 1 if b == 0 else h
        shapes |= mab(f"chunk_encoder.blocks.{b}.mab", n_in, n_in)
    for stage in ("tensor_encoder", "layer_encoder", "network_encoder"):
        for b in range(2):
            prefix = f"{stage}.blocks.{b}"
            if attention == "sab":
                shapes |= mab(prefix + ".mab", h, h)
            else:
                shapes |= {prefix + ".I": (1, m, h), **mab(prefix + ".mab0", h, h), **mab(prefix + ".mab1", h, h)}
    for stage in ("chunk_encoder", "tensor_encoder", "layer_encoder", "network_encoder"):
        shapes |= {f"{stage}.pool.S": (1, 1, h), **mab(f"{stage}.pool.mab", h, h)}
    for stage in ("chunk_encoder", "tensor_encoder", "network_encoder"):
        shapes[f"{stage}.code_gain"] = ()
    shapes["tensor_encoder.magnitude_code"] = (h,)
    return shapes


@pytest.mark.parametrize("attention", ["sab", "isab"])
@pytest.mark.parametrize("ln", [True, False])
def test_names_and_shapes_of_sne(ln: bool, attention: str) -> None:
    encoder = sne_fast.SNE(hidden_dim=32, num_heads=4, layer_norm=ln, set_attention=attention, num_inducing=5)
    want = expected_names(32, ln, attention, 5)
    assert {k: tuple(v.shape) for k, v in encoder.named_parameters()} == want
    assert {k: tuple(v.shape) for k, v in encoder.state_dict().items()} == want  # no saved buffers


@pytest.mark.parametrize("switch", [{"scale": "none"}, {"element_order": False}, {"chunk_order": False}])
def test_switches_do_not_change_the_names(switch: dict) -> None:
    """A checkpoint's names depend on layer_norm and set_attention only."""
    encoder = sne_fast.SNE(hidden_dim=32, num_heads=2, **switch)
    assert {k: tuple(v.shape) for k, v in encoder.state_dict().items()} == expected_names(32, True, "sab", 32)


def test_sne_defaults_are_those_of_the_contract() -> None:
    encoder = sne_fast.SNE()
    assert {k: tuple(v.shape) for k, v in encoder.state_dict().items()} == expected_names(64, True, "sab", 32)
    isab = sne_fast.SNE(set_attention="isab")
    assert isab.state_dict()["tensor_encoder.blocks.1.I"].shape == (1, 32, 64)


@pytest.mark.parametrize("attention", ["sab", "isab"])
def test_start_of_sne(attention: str) -> None:
    """Biases and seeds start at zero, E and u normal(0, 1), gains 0.1, inducing points xavier, weights random."""
    torch.manual_seed(0)
    encoder = sne_fast.SNE(hidden_dim=64, num_heads=4, set_attention=attention)
    for name, p in encoder.named_parameters():
        p = p.detach()
        if name.endswith(("bias", "pool.S")):
            assert p.count_nonzero() == 0, name
        elif name.endswith("code_gain"):
            assert p.item() == pytest.approx(0.1)
        elif name in ("type_embedding.weight", "tensor_encoder.magnitude_code"):
            assert 0.7 < p.std() < 1.3 and p.mean().abs() < 0.5, name
        elif re.search(r"ln[01]\.weight$", name):
            assert (p == 1).all(), name
        elif name.endswith(".I"):
            reach = math.sqrt(6 / (32 * 64 + 64))
            assert 0.9 * reach < p.abs().max() <= reach, name
        else:
            assert re.search(r"fc_[qkvo]\.weight$", name), name
            bound = 1 / math.sqrt(p.shape[1])
            assert 0.8 * bound < p.abs().max() <= bound, name


# ---------------------------------------------------------------------------------------------------------------------
# The oracle's own block, once more, in nothing but Python numbers

Rows = list[list[float]]


def scalar_mab(
    state: dict, q_in: list[list[float]], k_in: list[list[float]], heads: int, norm: bool
) -> list[list[float]]:
    def lin(name: str, x: list[float]) -> list[float]:
        w, b = state[name + ".weight"].tolist(), state[name + ".bias"].tolist()
        return [sum(wi * xi for wi, xi in zip(row, x, strict=True)) + bi for row, bi in zip(w, b, strict=True)]

    def ln(name: str, x: list[float]) -> list[float]:
        if not norm:
            return x
        mean = sum(x) / len(x)
        root = math.sqrt(sum((xi - mean) ** 2 for xi in x) / len(x) + 1e-5)
        w, b = state[name + ".weight"].tolist(), state[name + ".bias"].tolist()
        return [(xi - mean) / root * wi + bi for xi, wi, bi in zip(x, w, b, strict=True)]

    q, k, v = ([lin(f"fc_{n}", x) for x in xs] for n, xs in (("q", q_in), ("k", k_in), ("v", k_in)))
    h = len(q[0])
    d = h // heads
    out = []
    for qi in q:
        o = list(qi)
        for a in range(heads):
            own = range(a * d, (a + 1) * d)
            e = [math.exp(sum(qi[c] * kj[c] for c in own) / math.sqrt(h)) for kj in k]
            for c in own:
                o[c] += sum(ej * vj[c] for ej, vj in zip(e, v, strict=True)) / sum(e)
        o = ln("ln0", o)
        f = lin("fc_o", o)
        out.append(ln("ln1", [oi + max(0.0, fi) for oi, fi in zip(o, f, strict=True)]))
    return out


@pytest.mark.parametrize("ln", [False, True])
def test_oracle_block_in_plain_python(ln: bool) -> None:
    dense = randomise_(DenseMAB(3, 2, 8, 2, ln).double(), 5)
    q, k = rows(4, 3, 1).detach(), rows(5, 2, 2).detach()
    state = dense.state_dict()
    expected = torch.tensor(scalar_mab(state, q.tolist(), k.tolist(), 2, ln), dtype=torch.float64)
    close(brute_force.mab(state, "", q, k, 2, ln), expected)
    close(dense(q[None], k[None])[0], expected)
