"""pack: every entry of a network is taken, left out with a reason, or refused by name."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sne_fast import WeightBatch, pack
from sne_fast.data.batch_summary import skipped_summary


def packed(entries: Any, **options: Any) -> WeightBatch:
    return pack([entries], scale="none", order="definition", **options)


def skipped(batch: WeightBatch) -> dict[str, str]:
    found = batch.skipped[0]
    assert len(dict(found)) == len(found)
    return dict(found)


# ---------------------------------------------------------------------------------------------------------------------
# Values that are no tensors


def test_lists_and_tuples_of_tensors_are_taken_by_their_places() -> None:
    a, b, c = torch.ones(2, 2), torch.zeros(3), torch.full((2,), 2.0)
    batch = packed({"layers": [a, (b, None)], "head.weight": a + 1, "head.bias": c})
    assert batch.names[0][1] == ("layers.0", "layers.1.0", "head.weight", "head.bias")
    assert skipped(batch) == {"layers.1.1": "plain value"}
    assert batch.num_weights == 4 + 3 + 4 + 2
    with pytest.raises(ValueError, match=r"pack: network 0 \('state_dict'\) holds tensors in 2 places"):
        pack([{"blocks": [{"weight": c}], "head.weight": a}])


def test_lists_that_hold_themselves_or_share_parts_without_end_are_refused() -> None:
    around: list[Any] = [torch.ones(2)]
    around.append(around)
    with pytest.raises(ValueError, match=r"network 0 .* refused, it holds tensors without names in a list"):
        pack([{"w": around}])
    deep: Any = torch.ones(2)
    for _ in range(60):
        deep = [deep]
    with pytest.raises(ValueError, match="nests containers in themselves or too deep"):
        pack([{"w": deep}])


def test_two_entries_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match=r"network 0 \('state_dict'\) .*has two entries that are called 'w.0'"):
        pack([{"w": [torch.ones(2)], "w.0": torch.ones(2)}])


@pytest.mark.parametrize(
    "value",
    [np.ones((2, 2)), nn.Linear(1, 1), [np.ones(3)], torch.ones(2).untyped_storage(), {torch.ones(2)}],
    ids=["array", "module", "arrays", "storage", "set"],
)
def test_values_that_could_hold_weights_are_refused_by_name(value: Any) -> None:
    with pytest.raises(TypeError, match=r"pack: network 0 \('state_dict'\), 'more' must be a tensor, got"):
        pack([{"weight": torch.ones(2, 2), "more": value}])


@pytest.mark.parametrize("value", [[[1.0, 2.0], [3.0, 4.0]], object()], ids=["numbers", "object"])
def test_what_is_called_a_weight_and_is_no_tensor_is_refused(value: Any) -> None:
    with pytest.raises(TypeError, match=r"'fc\.weight' must be a tensor"):
        pack([{"head.weight": torch.ones(2, 2), "fc.weight": value}])


def test_plain_values_are_left_out_and_recorded() -> None:
    plain = {
        "epoch": 3, "best": np.float64(0.5), "note": "x", "_extra_state": b"x", "nothing": None, "dtype": torch.float16,
        "kernel_size": [3, 3], "config": {"width": 4, "nested": [1, {"a": 2}]}, "class_weights": [0.5, 0.5],
        "empty": [], "odd": object(), 7: "seven",
    }  # fmt: skip
    batch = packed({"weight": torch.ones(2, 2), **plain})
    assert batch.names[0][1] == ("weight",) and skipped(batch).keys() == {str(key) for key in plain}


def test_what_lies_beside_a_nested_state_dict_is_recorded() -> None:
    state = nn.Linear(2, 2).state_dict()
    batch = packed({"epoch": 3, "model": {"state_dict": state, "arch": "mlp"}})
    assert batch.num_weights == 6 and skipped(batch).keys() == {"epoch", "model.arch"}


# ---------------------------------------------------------------------------------------------------------------------
# Tensors that are no weights


def test_empty_tensors_are_left_out() -> None:
    state = {"weight": torch.ones(2, 2), "nothing": torch.zeros(0, 3)}
    assert skipped(packed(state)) == {"nothing": "empty tensor"}
    with pytest.raises(ValueError, match="has no floating-point parameters"):
        pack([{"nothing": torch.zeros(0, 3)}])
    with pytest.warns(UserWarning):
        network = nn.Sequential(nn.Linear(0, 3), nn.Linear(3, 1))
    assert skipped(packed(network)) == {"0.weight": "empty tensor"}


@pytest.mark.parametrize("low", [-torch.inf, -1e9, -100.0, 0.0])
def test_masks_are_left_out_by_name_and_values(low: float) -> None:
    mask = torch.full((4, 4), low).triu(1)
    state = {"fc.weight": torch.ones(4, 4), "attn.mask": mask, "attn_mask": mask, "h.attn.bias": mask[None, None]}
    assert skipped(packed(state)) == dict.fromkeys(("attn.mask", "attn_mask", "h.attn.bias"), "mask")
    learned = {"fc.weight": torch.ones(4, 4), "attn.mask": torch.randn(4, 4)}
    assert packed(learned).num_weights == 32
    with pytest.raises(ValueError, match="tensor 'other' has 0 NaN and 6 inf"):
        pack([{"fc.weight": torch.ones(4, 4), "other": torch.full((4, 4), -torch.inf).triu(1)}])


class WithBuffers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        position, rate = torch.arange(6.0)[:, None], 10.0 ** torch.arange(0.0, -2.0, -1.0)
        self.register_buffer("pe", torch.stack([(position * rate).sin(), (position * rate).cos()], -1).flatten(1)[None])
        self.register_buffer("inv_freq", rate)
        self.register_buffer("freqs_cis", torch.polar(torch.ones(3), torch.ones(3)))
        self.register_buffer("mask", torch.full((3, 3), -torch.inf).triu(1))
        self.register_buffer("position_ids", torch.arange(6)[None])
        self.fc = nn.utils.spectral_norm(nn.Linear(3, 3))
        self.turned = nn.utils.parametrizations.orthogonal(nn.Linear(3, 3, bias=False))
        self.norm = nn.BatchNorm1d(3)
        nn.utils.prune.random_unstructured(self.norm, "weight", 1)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_buffers_are_left_out_of_modules_and_of_their_state_dicts_alike() -> None:
    import torch.nn.utils.prune  # noqa: F401

    network = WithBuffers()
    module, state = packed(network), packed(network.state_dict())
    assert set(module.names[0][1]) == set(state.names[0][1]) == {
        "fc.weight_orig", "fc.bias", "norm.weight_orig", "norm.bias", "norm.running_mean", "norm.running_var",
        "turned.parametrizations.weight.original",
    }  # fmt: skip
    assert skipped(state).keys() == network.state_dict().keys() - set(state.names[0][1])
    assert skipped(state).keys() <= skipped(module).keys()


class Router(nn.Module):
    def __init__(self, parameter: bool) -> None:
        super().__init__()
        self.gate = nn.Linear(3, 2)
        self.shared_embedding = nn.Module()
        for module, name in ((self.gate, "e_score_correction_bias"), (self.shared_embedding, "positional_embedding")):
            if parameter:
                module.register_parameter(name, nn.Parameter(torch.randn(2, 2)))
            else:
                module.register_buffer(name, torch.randn(2, 2))


@pytest.mark.parametrize("parameter", [False, True])
def test_what_classes_hold_as_parameter_or_as_buffer_is_left_out_of_both(parameter: bool) -> None:
    network = Router(parameter)
    for source in (network, network.state_dict()):
        found = packed(source)
        assert found.names[0][1] == ("gate.weight", "gate.bias")
        assert skipped(found).keys() == {"gate.e_score_correction_bias", "shared_embedding.positional_embedding"}


def test_buffers_are_told_from_weights_by_what_stands_beside_them() -> None:
    angles = torch.randn(4, 2)
    buffers = {
        "rope.cos": angles.cos(), "rope.sin": angles.sin(), "betas": torch.rand(4), "alphas": torch.rand(4),
        "alphas_cumprod": torch.rand(4), "queue": torch.randn(3, 8), "queue_ptr": torch.zeros(1, dtype=torch.int64),
        "act_fn.beta": torch.rand(1), "act_fn.eps": torch.rand(1), "layer_scalar": torch.ones(1),
        "alibi_slopes": torch.rand(4), "vq.embed": torch.randn(3, 2), "vq.embed_avg": torch.randn(3, 2),
        "attn.attention_bias_idxs": torch.arange(4).view(2, 2), "bias_table": torch.arange(4).view(2, 2),
    }  # fmt: skip
    found = packed({"fc.weight": torch.ones(2, 2), **buffers})
    assert found.names[0][1] == ("fc.weight",) and skipped(found).keys() == buffers.keys()
    weights = {name: torch.randn(4, 2) for name in ("rope.cos", "rope.sin", "betas", "alphas", "queue", "act.beta")}
    assert set(packed(weights).names[0][1]) == weights.keys()


@pytest.mark.parametrize(
    ("name", "shape"),
    [("pos_encoding", (1, 6, 4)), ("layer.pe", (6, 4)), ("position_table", (6, 4)), ("bias", (1, 1, 1, 1))],
)
def test_weights_before_training_are_not_taken_for_buffers(name: str, shape: tuple[int, ...]) -> None:
    state = {"fc.weight": torch.ones(2, 2), name: torch.zeros(shape)}
    assert set(packed(state).names[0][1]) == state.keys()


def test_weight_norm_keeps_its_directions() -> None:
    state = {"fc.weight_g": torch.ones(3, 1), "fc.weight_v": torch.ones(3, 2), "fc.bias": torch.ones(3)}
    assert packed(state).num_weights == 12


def test_states_of_optimisers_are_left_out() -> None:
    w = torch.ones(2, 2)
    state = {
        "fc.weight": w, "fc.weight.exp_avg": w, "state.0.exp_avg_sq": w, "optimizer.state.fc.weight.step": w,
        "fc.weight.momentum_buffer": w,
    }  # fmt: skip
    assert packed(state).names[0][1] == ("fc.weight",)
    assert set(skipped(packed(state)).values()) == {"optimiser state"}


def test_other_names_of_tied_tensors_are_recorded() -> None:
    network = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2))
    network[1].weight = network[0].weight
    for source in (network, network.state_dict(), nn.DataParallel(network).state_dict()):
        batch = packed(source)
        name = "module.1.weight" if "module.1.weight" in source else "1.weight"
        assert skipped(batch) == {name: "tied tensor: of '0.weight'"}
        assert batch.names[0][1] == ("0.weight", "1.bias")


# ---------------------------------------------------------------------------------------------------------------------
# Complex numbers


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex_parameters_are_two_real_parts(dtype: torch.dtype) -> None:
    network = nn.Linear(3, 2, dtype=dtype)
    module = packed(network, dtype=torch.float64)
    state = packed(dict(network.state_dict()), dtype=torch.float64)
    want = torch.cat([torch.view_as_real(p.detach()).flatten().double() for p in network.parameters()])
    for batch in (module, state):
        assert batch.num_weights == 2 * (6 + 2) and torch.equal(batch.values.detach(), want)
    assert torch.equal(module.tensor_type, state.tensor_type) and module.tensor_type.tolist() == [0, 1]
    module.values.square().sum().backward()
    torch.testing.assert_close(network.weight.grad, 2 * network.weight.detach())
    conjugated = packed({"weight": network.weight.detach().conj()}, dtype=torch.float64)
    assert torch.equal(conjugated.values[1::2], -want[1:12:2])
    assert packed({"gain": torch.tensor(1 + 2j)}).values.tolist() == [1, 2]


def test_complex_numbers_that_are_not_finite_are_named() -> None:
    with pytest.raises(ValueError, match=r"network 0 \('state_dict'\), tensor 'weight' has 1 NaN"):
        pack([{"weight": torch.complex(torch.tensor([[1.0, torch.nan]]), torch.ones(1, 2))}])


# ---------------------------------------------------------------------------------------------------------------------
# Any mapping

DTYPES = [
    torch.float32, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.complex64, torch.bool, torch.uint8,
    torch.int8, torch.int32, torch.int64,
]  # fmt: skip
PARTS = [
    "weight", "bias", "running_mean", "num_batches_tracked", "mask", "inv_freq", "scale", "zero_point", "weight_scale",
    "qweight", "qzeros", "scales", "g_idx", "SCB", "ema", "exp_avg", "weight_packed", "weight_shape", "_packed_params",
    "index", "pe", "w", "0", "weight_scale_inv", "input_scale", "absmax", "weight_v", "weight_u", "weight_orig",
]  # fmt: skip
LAYERS = ["", "fc.", "model.fc.", "model_ema.fc.", "student.", "teacher.", "fc._packed_params.", "module.a.", "weight."]
NAMES = st.builds("{}{}".format, st.sampled_from(LAYERS), st.sampled_from(PARTS))


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    shape = draw(st.lists(st.sampled_from([0, 1, 2, 3, 8]), max_size=4))
    dtype = draw(st.sampled_from(DTYPES))
    return torch.arange(int(np.prod(shape, dtype=int))).reshape(shape).remainder(3).to(dtype)


VALUES = st.recursive(
    st.one_of(
        tensors(),
        st.none() | st.integers() | st.text(max_size=3) | st.floats() | st.booleans() | st.binary(max_size=3),
        st.builds(object),
        st.builds(lambda: np.ones(2)),
        st.builds(lambda: nn.Linear(1, 1)),
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(PARTS), inner, max_size=2),
    max_leaves=4,
)


def accounted(name: str, value: Any) -> set[str]:
    """Return the names that stand for an entry: its own, or those of what is in a container with tensors."""
    items = enumerate(value) if isinstance(value, list) else value.items() if isinstance(value, dict) else None
    if items is None or not _any_tensor(value):
        return {name}
    return set().union(*(accounted(f"{name}.{key}", inner) for key, inner in items))


def _any_tensor(value: Any) -> bool:
    inner = value if isinstance(value, list) else value.values() if isinstance(value, dict) else []
    return isinstance(value, Tensor) or any(_any_tensor(one) for one in inner)


@settings(deadline=None)
@given(st.dictionaries(NAMES | st.text(max_size=6), VALUES, max_size=6))
@example({"a": torch.ones(2), "3": None, "b": [torch.ones(1), None]})
@example({"": [torch.zeros(())], "weight": {"weight": torch.zeros(1)}})
@example({"weight": [], "": {"weight": torch.zeros(())}})
def test_every_entry_of_any_mapping_is_accounted_for_once_or_refused(entries: dict[str, Any]) -> None:
    try:
        batch = pack([entries], scale="none", nonfinite="keep")
    except (ValueError, TypeError) as error:
        assert str(error).startswith("pack: network 0")
        return
    left_out = [name for name, _ in batch.skipped[0]]
    assert len(left_out) == len(set(left_out))
    # Where the state_dict is a mapping inside, the entries beside it are left out as wholes, and its names are its own.
    beside = {name for name, reason in batch.skipped[0] if reason.startswith("entry beside")}
    wanted = set().union(*(accounted(name, value) for name, value in entries.items() if name not in beside))
    taken = set(batch.names[0][1])
    if any(name.startswith("module.") for name in entries):
        taken |= {f"module.{name}" for name in taken} - set(left_out)
    for name in wanted - taken - set(left_out):  # the state_dict was in a mapping, which its names leave out
        assert any(name.endswith(f".{other}") for other in (*taken, *left_out)), name
    assert not wanted & taken & (set(left_out) - beside)


# ---------------------------------------------------------------------------------------------------------------------
# The summary


def test_what_was_left_out_is_counted_in_one_line() -> None:
    norms = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2)).state_dict()
    states = [norms | {"mask": torch.zeros(2, 2).triu()}, norms | {"epoch": 3}, nn.Linear(1, 1)]
    batch = pack(states)
    assert skipped_summary(batch) == "left out: 4 num_batches_tracked counters, 1 mask, 1 plain value"
    assert skipped_summary(batch[2]) == ""
    assert skipped_summary(batch.to(dtype=torch.float16)) == skipped_summary(batch)
    assert sum(len(entries) for entries in batch.skipped) == 6


def test_the_summary_has_words_for_what_readers_leave_out(tmp_path: Path) -> None:
    network, path = nn.Linear(2, 2), tmp_path / "last.pt"
    entries = {"model": network.state_dict(), "epoch": 3, "arch": "x", "config": Namespace(width=3)}
    torch.save(entries | {"optimizer": torch.optim.Adam(network.parameters()).state_dict()}, path)
    summary = skipped_summary(pack([path, path]))
    assert summary == "left out: 4 plain values, 2 objects of an unknown class, 2 optimiser states"


@pytest.mark.parametrize("wrapped", [False, True])
def test_placeholders_of_partitioned_weights_are_refused(wrapped: bool) -> None:
    state = {"0.weight": torch.empty(0), "0.bias": torch.ones(3), "1.weight": torch.empty(0), "2.weight": torch.ones(3)}
    with pytest.raises(ValueError, match=r"tensor '0.weight' and others are empty in place of weights, .*zero_to_fp32"):
        pack([{"module": state, "param_shapes": [{}]} if wrapped else state])


def test_quantised_weights_that_are_empty_are_left_out() -> None:
    state = {"a": torch.ones(2), "w.weight": torch.ones(0, 2, dtype=torch.int8), "w.weight_scale": torch.ones(0)}
    assert packed(state).names[0][1] == ("a",) and skipped(packed(state))["w.weight"] == "empty tensor"
