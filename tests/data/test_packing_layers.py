"""pack: layers, their levels and kinds, given or inferred; what is left out; names of wrapped networks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from helpers.networks import make
from sne_fast import pack
from sne_fast.data.tensor_types import KINDS, infer_kind, kind_id, role_of

LINEAR, CONVOLUTION, TRANSPOSED, NORM, EMBEDDING, RECURRENT, ATTENTION, OTHER = range(8)

# ---------------------------------------------------------------------------------------------------------------------
# Levels


def levels(layer_level, networks=None) -> list[int]:
    return pack(networks or [make("mlp"), make("cnn")], layer_level=layer_level).layer_level.tolist()


def test_layer_levels() -> None:
    assert levels(None) == [0, 1, 2, 0, 1, 2, 3]
    assert levels([None, None]) == [0, 1, 2, 0, 1, 2, 3]
    assert levels([[5, 5, 7], None]) == [5, 5, 7, 0, 1, 2, 3]
    assert levels([None, {"3": 9, "0": 0}]) == [0, 1, 2, 0, 1, 9, 3]
    assert levels([torch.tensor([1, 2, 3]), (0, 0, 0, 1)]) == [1, 2, 3, 0, 0, 0, 1]
    assert levels(torch.arange(7)) == levels(list(range(7))) == list(range(7))
    assert levels({"0": 4}) == [4, 1, 2, 4, 1, 2, 3]
    assert levels({"*": 0, "4": 6}) == [0, 0, 6, 0, 0, 0, 0]  # a name wins over a pattern
    assert levels([[3, 2, 1]], [make("mlp")]) == levels([3, 2, 1], [make("mlp")]) == [3, 2, 1]


@pytest.mark.parametrize(
    ("layer_level", "error", "message"),
    [
        ([None], ValueError, "one entry per network, got 1 for 2"),
        ([[1, 2], None], ValueError, r"one entry per layer, got 2 for the 3 layers of network 0 \('Sequential'\)"),
        ([1, 2, 3], ValueError, r"one entry per layer \(7\) or be nested with one entry per network \(2\), got 3"),
        (
            [None, {"9": 1}],
            ValueError,
            "layer_level has '9', which fits no layer; network 0 .* has the layers '0', '2'",
        ),
        ([[0, 1, -1], None], ValueError, "at least 0, got -1 for network 0 .*, layer '4'"),
        ([[0, 1, 1.5], None], ValueError, "integers of at least 0, got 1.5"),
        ([[0, 1, True], None], ValueError, "integers of at least 0, got True"),
        (3, TypeError, "must be a sequence or a mapping, got int"),
        ("0", TypeError, "must be a sequence or a mapping, got str"),
        ([{3: 1}, None], TypeError, "must map layer names or patterns, got the key 3"),
    ],
    ids=str,
)
def test_layer_levels_that_do_not_fit(layer_level, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        levels(layer_level)


# ---------------------------------------------------------------------------------------------------------------------
# Kinds


class RMSNorm(nn.Module):
    """Not torch's: named and shaped alike, as in many language models."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))


class Conv1D(nn.Module):
    """A linear layer stored transposed, as in GPT-2."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, 4))
        self.bias = nn.Parameter(torch.ones(4))


class OwnBatchNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(2))
        self.register_buffer("running_mean", torch.ones(2))
        self.register_buffer("running_var", torch.ones(2))
        self.register_buffer("mask", torch.ones(2))
        self.register_buffer("num_batches_tracked", torch.tensor(3))


class OwnLinear(nn.Linear):
    pass


class Bag(nn.Module):
    def __init__(self, **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)


def kinds(network, **options) -> dict[str, set[int]]:
    """Return kinds by layer name."""
    b = pack([network], **options)
    found: dict[str, set[int]] = {}
    for name, kind in zip(b.names[0][1], (b.tensor_type // 8).tolist(), strict=True):
        found.setdefault(name.rpartition(".")[0], set()).add(kind)
    return found


def test_kinds_by_class() -> None:
    network = Bag(
        fc=nn.Linear(2, 2), own=OwnLinear(2, 2), c1=nn.Conv1d(1, 1, 2), c3=nn.Conv3d(1, 1, 2),
        up=nn.ConvTranspose1d(1, 1, 2), bn=nn.BatchNorm2d(2), sync=nn.SyncBatchNorm(2), ln=nn.LayerNorm(2),
        gn=nn.GroupNorm(1, 2), inorm=nn.InstanceNorm2d(2, affine=True), rms=nn.RMSNorm(2), e=nn.Embedding(2, 2),
        bag=nn.EmbeddingBag(2, 2), rnn=nn.RNN(2, 2), lstm=nn.LSTM(2, 2, proj_size=1), cell=nn.GRUCell(2, 2),
        att=nn.MultiheadAttention(2, 1, add_bias_kv=True), cross=nn.MultiheadAttention(2, 1, kdim=3, vdim=3),
        prelu=nn.PReLU(), bilinear=nn.Bilinear(2, 2, 2), listed=nn.ParameterList([torch.ones(2)]),
    )  # fmt: skip
    want = {key: {LINEAR} for key in ("fc", "own", "att.out_proj", "cross.out_proj")}
    want |= {key: {CONVOLUTION} for key in ("c1", "c3")} | {"up": {TRANSPOSED}}
    want |= {key: {NORM} for key in ("bn", "sync", "ln", "gn", "inorm", "rms")}
    want |= {key: {EMBEDDING} for key in ("e", "bag")} | {key: {RECURRENT} for key in ("rnn", "lstm", "cell")}
    want |= {key: {ATTENTION} for key in ("att", "cross")} | {key: {OTHER} for key in ("prelu", "bilinear", "listed")}
    assert kinds(network) == want


def test_classes_from_elsewhere_are_typed_like_their_state_dict() -> None:
    network = Bag(norm=RMSNorm(), proj=Conv1D(), bn=OwnBatchNorm(), fc=nn.Linear(2, 2))
    b = pack([network])
    assert b.tensor_type.tolist() == [0, 1, 28, 26, 27, 24, 0, 1]  # the mask and the counter are no weights
    state = network.state_dict()
    del state["bn.mask"]
    assert torch.equal(pack([state]).tensor_type, b.tensor_type)
    assert torch.equal(pack([state]).values, b.values)


INFERRED = [
    ("fc", {"weight": 2, "bias": 1}, LINEAR),
    ("fc", {"weight": 2}, LINEAR),
    ("conv", {"weight": 4}, CONVOLUTION),
    ("conv", {"weight": 3, "bias": 1}, CONVOLUTION),
    ("conv", {"weight": 5}, CONVOLUTION),
    ("conv", {"weight_g": 4, "weight_v": 4, "bias": 1}, CONVOLUTION),
    ("fc", {"bias": 1, "weight_orig": 2}, LINEAR),
    ("bn", {"weight": 1, "bias": 1, "running_mean": 1, "running_var": 1}, NORM),
    ("bn", {"running_mean": 1, "running_var": 1}, NORM),
    ("ln_1", {"weight": 1, "bias": 1}, NORM),
    ("norm", {"weight": 1}, NORM),
    ("wte", {"weight": 2}, EMBEDDING),
    ("transformer.wpe", {"weight": 2}, EMBEDDING),
    ("model.embed_tokens", {"weight": 2}, EMBEDDING),
    ("bert.embeddings.word_embeddings", {"weight": 2}, EMBEDDING),
    ("token_emb", {"weight": 2}, EMBEDDING),
    ("emb", {"weight": 2}, EMBEDDING),
    ("embedding.head", {"weight": 2}, LINEAR),
    ("embed_out", {"weight": 2}, LINEAR),
    ("time_emb_proj", {"weight": 2, "bias": 1}, LINEAR),
    ("embedding", {"weight": 2, "bias": 1}, LINEAR),
    ("remember", {"weight": 2}, LINEAR),
    ("lstm", {"weight_ih_l0": 2, "weight_hh_l0": 2, "bias_ih_l0": 1, "bias_hh_l0": 1}, RECURRENT),
    ("rnn", {"weight_ih_l1_reverse": 2}, RECURRENT),
    ("cell", {"weight_ih": 2, "weight_hh": 2}, RECURRENT),
    ("attn", {"in_proj_weight": 2, "in_proj_bias": 1}, ATTENTION),
    ("attn", {"q_proj_weight": 2, "k_proj_weight": 2, "v_proj_weight": 2, "bias_k": 3}, ATTENTION),
    ("", {"cls_token": 3}, OTHER),
    ("", {"weight": 0}, OTHER),
    ("x", {"weight": 6}, OTHER),
    ("x", {"bias": 1}, OTHER),
    ("lm_head", {"bias": 1}, LINEAR),
    ("lm_loss", {"bias": 1}, LINEAR),
    ("cls.predictions.decoder", {"bias": 1}, LINEAR),
    ("conv", {"bias": 1}, CONVOLUTION),
    ("shared", {"weight": 2}, EMBEDDING),
    ("mask_tokens", {"weight": 2}, EMBEDDING),
    ("patch_embedding", {"weight": 2}, LINEAR),
    ("tok", {"weight": 2}, EMBEDDING),
    ("src_embed.0", {"weight": 2}, EMBEDDING),
    ("time_embed.0", {"weight": 2, "bias": 1}, LINEAR),
    ("0", {"weight": 2}, LINEAR),
    ("pos", {"weight": 2}, EMBEDDING),
    ("prelu1", {"weight": 1}, OTHER),
    ("block.act", {"weight": 1}, OTHER),
    ("compact", {"weight": 1}, NORM),
    ("experts", {"weight": 3}, OTHER),
    ("bilinear", {"weight": 3, "bias": 1}, OTHER),
    ("patch_embed.proj", {"weight": 4, "bias": 1}, CONVOLUTION),
]


@pytest.mark.parametrize(("layer", "tensors", "kind"), INFERRED, ids=lambda v: v if isinstance(v, str) else None)
def test_inference(layer: str, tensors: dict[str, int], kind: int) -> None:
    assert infer_kind(layer, {name: (2,) * ndim for name, ndim in tensors.items()}) == kind
    state = {f"{layer}.{name}".lstrip("."): torch.ones([2] * ndim) for name, ndim in tensors.items()}
    assert set((pack([state]).tensor_type // 8).tolist()) == {kind}


def test_roles() -> None:
    roles = {"weight": 0, "weight_ih_l0": 0, "in_proj_weight": 0, "bias": 1, "bias_hh": 1, "in_proj_bias": 1}
    roles |= {"running_mean": 2, "running_var": 3, "cls_token": 4, "scale": 4, "original0": 4}
    assert {name: role_of(name) for name in roles} == roles


@pytest.mark.parametrize("name", ["mlp", "cnn", "resnet_block", "recurrent", "one_scalar"])
def test_state_dict_and_module_agree(name: str) -> None:
    module, state = pack([make(name)]), pack([make(name).state_dict()])
    for field in ("values", "chunk_ptr", "tensor_ptr", "layer_ptr", "tensor_type", "layer_level", "tensor_scale"):
        assert torch.equal(getattr(module, field), getattr(state, field)), field
    assert module.names[0][1] == state.names[0][1] and module.shapes == state.shapes


def test_a_layer_whose_tensors_stand_apart_is_one_layer() -> None:
    state = {"a.weight": torch.ones(2, 2), "b.weight": torch.ones(1), "a.bias": torch.ones(2), "n": torch.tensor(3)}
    b = pack([state])
    assert b.names[0][1] == ("a.weight", "a.bias", "b.weight") and b.layer_ptr.tolist() == [0, 2, 3]


def test_kinds_given_by_name_pattern_or_id() -> None:
    network = nn.Sequential(nn.ConvTranspose2d(1, 1, 2), nn.Conv2d(1, 1, 2), nn.Linear(2, 2)).state_dict()
    assert kinds(network) == {"0": {CONVOLUTION}, "1": {CONVOLUTION}, "2": {LINEAR}}
    assert kinds(network, kinds={"0": "transposed convolution"})["0"] == {TRANSPOSED}
    assert kinds(network, kinds={"0": "transposed_convolution"})["0"] == {TRANSPOSED}
    assert kinds(network, kinds={"0": 2})["0"] == {TRANSPOSED}
    assert kinds(network, kinds=[{"[01]": 2, "2": "Other"}]) == {"0": {2}, "1": {2}, "2": {7}}
    assert kinds(network, kinds={"*": 7, "1": 3, "?": 5}) == {"0": {7}, "1": {3}, "2": {7}}
    b = pack([network, network, nn.Linear(1, 1)], kinds=[None, {"0": 2}, {"": "other"}])
    assert b.tensor_type.tolist() == [8, 9, 8, 9, 0, 1, 16, 17, 8, 9, 0, 1, 56, 57]
    assert pack([network, nn.Linear(1, 1)], kinds={"0": 2}).tensor_type[0] == 16  # one network that has it is enough
    statistics = pack([nn.Sequential(nn.BatchNorm1d(2))], kinds={"0": "other"})
    assert statistics.tensor_type.tolist() == [56, 57, 58, 59]
    assert [kind_id(kind) for kind in KINDS] == list(range(8))


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"0": "dense"}, ValueError, r"one of 0 'linear', 1 'convolution', .*7 'other', got 'dense'"),
        ({"0": 8}, ValueError, "got 8"),
        ({"0": True}, ValueError, "got True"),
        ({"0": None}, ValueError, "got None"),
        ({"fc": 0}, ValueError, r"kinds has 'fc', which fits no layer; network 0 \('Sequential'\) has the layers '0'"),
        ([{"9*": 0}], ValueError, r"kinds has '9\*', which fits no layer"),
        ([None, None], ValueError, "kinds must have one entry per network, got 2 for 1"),
        (["linear"], TypeError, "kinds must be 'names', a mapping, or one mapping or None per network"),
        ("linear", TypeError, "kinds must be 'names', a mapping, or one mapping or None per network, got 'linear'"),
        (3, TypeError, "kinds must be 'names', a mapping, or one mapping or None per network, got int"),
        ({0: 0}, TypeError, "kinds must map layer names or patterns, got the key 0"),
    ],
    ids=str,
)
def test_kinds_that_fit_nothing(given, error: type, message: str) -> None:
    with pytest.raises(error, match="pack: .*" + message):
        pack([nn.Sequential(nn.Linear(2, 2))], kinds=given)


# ---------------------------------------------------------------------------------------------------------------------
# Tensors left out, tied or wrapped


def test_only_floating_and_complex_parameters_and_running_statistics() -> None:
    network = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2, affine=False), nn.BatchNorm1d(2, eps=1.0))
    network[2].running_mean = None
    network.register_buffer("mask", torch.ones(3))
    network.register_parameter("phase", nn.Parameter(torch.ones(2, dtype=torch.complex64)))
    network.register_parameter("count", nn.Parameter(torch.ones(2, dtype=torch.int64), requires_grad=False))
    network.register_parameter("none", None)
    b = pack([network])
    assert b.names[0][1] == (
        "phase", "0.weight", "0.bias", "0.running_mean", "0.running_var", "1.running_mean", "1.running_var",
        "2.weight", "2.bias", "2.running_var",
    )  # fmt: skip


def test_a_tie_does_not_depend_on_strides_of_dimensions_of_one() -> None:
    row = torch.randn(1, 4)
    assert pack([{"a.weight": row, "b.weight": row.as_strided((1, 4), (9, 1))}]).num_weights == 4
    square = torch.randn(3, 3)
    assert pack([{"a.weight": square, "b.weight": square.t()}]).num_weights == 18


def test_tied_tensors_stand_once_at_their_first_place(tmp_path: Path) -> None:
    network = Bag(embedding=nn.Embedding(3, 2), mid=nn.Linear(2, 2), head=nn.Linear(2, 3), twice=nn.Linear(1, 1))
    network.head.weight = network.embedding.weight
    network.again = network.twice
    torch.save(network.state_dict(), tmp_path / "tied.pt")
    names = ("embedding.weight", "mid.weight", "mid.bias", "head.bias", "twice.weight", "twice.bias")
    for source in (network, network.state_dict(), tmp_path / "tied.pt"):
        b = pack([source], order="definition")
        assert b.names[0][1] == names and b.layer_ptr.tolist() == [0, 1, 3, 4, 6]
    by_names = ("embedding.weight", "again.weight", "again.bias", "mid.weight", "mid.bias", "head.bias")
    for source in (network, network.state_dict(), tmp_path / "tied.pt"):
        b = pack([source])
        assert b.names[0][1] == by_names and b.tensor_type.tolist() == [32, 0, 1, 0, 1, 1]
    pack([network]).values.sum().backward()
    assert network.head.weight.grad is network.embedding.weight.grad


class Nested(nn.Module):
    """Owns a tensor itself, before its children."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)
        self.token = nn.Parameter(torch.ones(1, 2))


@pytest.mark.parametrize("depth", [1, 2])
def test_wrappers_leave_no_trace_in_names(depth: int) -> None:
    plain = Nested()
    names = ("token", "inner.weight", "inner.bias")
    assert pack([plain]).names == (("Nested", names),)
    wrapped: nn.Module = plain
    for _ in range(depth):
        wrapped = nn.DataParallel(wrapped)
    compiled = torch.compile(Nested())
    part = Nested()
    part.inner = torch.compile(part.inner)  # type: ignore[assignment]
    for network in (wrapped, compiled, part, nn.DataParallel(compiled), torch.compile(wrapped)):
        module, state = pack([network]), pack([network.state_dict()])
        assert module.names[0][1] == state.names[0][1] == names
        assert module.layer_ptr.tolist() == state.layer_ptr.tolist() == [0, 1, 3]
        assert module.tensor_type.tolist() == state.tensor_type.tolist() == [60, 0, 1]


@pytest.mark.parametrize("part", ["_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"])
def test_parts_of_wrappers_inside_names_are_dropped(part: str) -> None:
    plain = nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.Linear(3, 2)))
    wrapped = {name.replace("1.0.", f"1.{part}.0.{part}."): tensor for name, tensor in plain.state_dict().items()}
    assert pack([wrapped]).names[0][1] == pack([plain]).names[0][1]


@pytest.mark.parametrize("name", ["_fsdp_wrapped_module._flat_param", "blocks.0.flat_param", "flat_param_0"])
def test_flattened_parameters_of_fsdp_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"tensor '{name}' joins the weights of several layers, .* full state_dict"):
        pack([{name: torch.ones(9), "head.weight": torch.ones(2, 2)}])


def test_two_tensors_that_wrappers_alone_tell_apart_are_refused() -> None:
    state = {"a.weight": torch.ones(2, 2), "_orig_mod.a.weight": torch.zeros(2, 2)}
    with pytest.raises(
        ValueError, match=r"network 0 \('state_dict'\) has two tensors called 'a.weight' once the prefix"
    ):
        pack([state])


def test_a_child_called_module_beside_others_keeps_its_name() -> None:
    network = Bag(module=nn.Linear(2, 2), other=nn.Linear(2, 2))
    assert pack([network]).names[0][1][0] == pack([network.state_dict()]).names[0][1][0] == "module.weight"


@pytest.mark.parametrize("key", ["state_dict", "model", "model_state_dict"])
def test_nested_state_dicts(key: str) -> None:
    state = nn.Linear(2, 2).state_dict()
    for nested in ({key: state, "epoch": 3}, {"steps": torch.tensor(1), key: {"state_dict": state}}):
        b = pack([nested])
        assert torch.equal(b.values, pack([state]).values) and b.names[0][1] == ("weight", "bias")


def test_numbers_and_extra_state_beside_tensors_are_no_weights() -> None:
    state = nn.Linear(2, 2).state_dict() | {"_extra_state": b"x", "epoch": 3, "note": "hello", "nothing": None}
    assert pack([state]).names[0][1] == ("weight", "bias")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripted_modules_are_typed_by_inference() -> None:
    network = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    scripted, plain = pack([torch.jit.script(network)]), pack([network])
    assert torch.equal(scripted.values, plain.values) and torch.equal(scripted.tensor_type, plain.tensor_type)
    assert scripted.names[0][1] == plain.names[0][1]


def test_parametrised_weights_are_cut_as_they_are_stored() -> None:
    network = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(2, 3)))
    b = pack([network])
    names = ("0.bias", "0.parametrizations.weight.original0", "0.parametrizations.weight.original1")
    assert b.names[0][1] == names and b.tensor_type.tolist() == [1, 60, 60] and b.layer_ptr.tolist() == [0, 1, 3]
    convolution = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv1d(2, 3, 4)))
    for one in (network, convolution):
        for options in ({}, {"kinds": "names"}):
            assert torch.equal(pack([one], **options).tensor_type, pack([one.state_dict()]).tensor_type)
