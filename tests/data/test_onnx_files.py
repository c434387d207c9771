"""Weights of ONNX files: those that torch exported, the same as the module's, and quantised ones built node by node."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from sne_fast import CheckpointError, pack
from sne_fast.data.checkpoints import load_state_dict, read_checkpoint

onnx = pytest.importorskip("onnx")
from onnx import helper, numpy_helper  # noqa: E402

WRITTEN = Path(__file__).parent / "formats"
FLOAT = 1


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.lstm = nn.LSTM(8, 6, num_layers=2, bidirectional=True, batch_first=True)
        self.gru = nn.GRU(12, 5, batch_first=True)
        self.blocks = nn.ModuleList(
            [nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 5, bias=False)) for _ in range(2)]
        )
        self.head = nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, _ = self.lstm(self.encoder(self.embed(x)))
        x, _ = self.gru(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


class Images(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3)
        self.bn1 = nn.BatchNorm2d(4)
        self.depthwise = nn.Conv2d(4, 4, 3, groups=4, bias=False)
        self.act = nn.PReLU(4)
        self.up = nn.ConvTranspose2d(4, 6, 2)
        self.norm = nn.GroupNorm(2, 6)
        self.fc = nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act(self.depthwise(self.bn1(self.conv1(x))))
        return self.fc(self.norm(self.up(x)).mean((2, 3)))


def random_values(module: nn.Module) -> nn.Module:
    """Return the module with other numbers in each of its tensors: the exporter writes equal ones once."""
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand_like(tensor) + 0.1 if name.endswith("var") else torch.randn_like(tensor))
    return module.eval()


def export(module: nn.Module, x: torch.Tensor, file: Path, **options: Any) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(module, (x,), file, dynamo=False, **options)
    return file


NETWORKS = [(Words, torch.zeros(2, 4, dtype=torch.long)), (Images, torch.zeros(2, 3, 8, 8))]
KEPT = {"training": torch.onnx.TrainingMode.PRESERVE}  # a normalisation beside its convolution


@pytest.mark.parametrize("values", [random_values, lambda module: module.eval()])
@pytest.mark.parametrize("network, x", NETWORKS)
def test_a_module_and_its_export_are_packed_alike(tmp_path: Path, network: Any, x: torch.Tensor, values: Any) -> None:
    module = values(network())
    file = export(module, x, tmp_path / "n.onnx", **(KEPT if network is Images else {}))
    read = load_state_dict(file)
    wanted = {name: tensor for name, tensor in module.state_dict().items() if not name.endswith("tracked")}
    assert read.keys() == wanted.keys()
    assert all(torch.equal(read[name], wanted[name]) for name in wanted)
    ours, theirs = pack([module], kinds="names"), pack([file])
    assert ours.names[0][1] == theirs.names[0][1] and torch.equal(ours.values, theirs.values)
    assert torch.equal(ours.tensor_type, theirs.tensor_type)


def test_the_exporter_with_dynamo() -> None:
    wanted = load_state_dict(WRITTEN / "onnx_dynamo_state.npz")
    read = load_state_dict(WRITTEN / "onnx_dynamo.onnx")
    assert read.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(read[name], tensor)


def test_a_folded_normalisation_leaves_one_convolution(tmp_path: Path) -> None:
    read = load_state_dict(export(random_values(Images()), NETWORKS[1][1], tmp_path / "n.onnx"))
    assert {"conv1.weight", "conv1.bias", "norm.weight"} < read.keys() and "bn1.weight" not in read
    assert read["act.weight"].shape == (4,) and read["up.weight"].shape == (4, 6, 2, 2)


def test_shared_weights_and_external_data(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.body, self.head = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 9, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.body(self.embed(x))
            return self.head(self.body(x))

    module = Tied()
    file = export(module, torch.zeros(2, 3, dtype=torch.long), tmp_path / "n.onnx")
    assert torch.equal(pack([module]).values, pack([file]).values)
    model = onnx.load(file)
    onnx.save_model(model, tmp_path / "e.onnx", save_as_external_data=True, location="e.data", size_threshold=0)
    for name, tensor in load_state_dict(file).items():
        assert torch.equal(load_state_dict(tmp_path / "e.onnx")[name], tensor)
    data = (tmp_path / "e.data").read_bytes()
    (tmp_path / "e.data").write_bytes(data[:-8])
    with pytest.raises(CheckpointError, match=r"e.onnx: .* does not fit into 'e.data' beside it"):
        load_state_dict(tmp_path / "e.onnx")
    (tmp_path / "e.data").unlink()
    with pytest.raises(CheckpointError, match=r"in the file 'e.data' beside it, which is missing; fetch it"):
        load_state_dict(tmp_path / "e.onnx")
    for tensor in (outside := onnx.load(file)).graph.initializer:
        onnx.external_data_helper.set_external_data(tensor, "../e.data")
        tensor.ClearField("raw_data")
    (tmp_path / "o.onnx").write_bytes(outside.SerializeToString())
    with pytest.raises(CheckpointError, match=r"'\.\./e.data' is not a file inside its folder"):
        load_state_dict(tmp_path / "o.onnx")


# ---------------------------------------------------------------------------------------------------------------------
# Graphs of other exporters


def saved(file: Path, nodes: list[Any], tensors: dict[str, Any], inputs: tuple[str, ...] = ("x",)) -> Path:
    held = [numpy_helper.from_array(np.asarray(value), name) for name, value in tensors.items()]
    values = [helper.make_tensor_value_info(name, FLOAT, None) for name in inputs]
    graph = helper.make_graph(nodes, "g", values, [helper.make_tensor_value_info("y", FLOAT, None)], held)
    file.write_bytes(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)]).SerializeToString())
    return file


W = torch.randn(3, 4).numpy()
B = torch.randn(3).numpy()


def test_matrices_are_named_after_their_bias_their_node_or_themselves(tmp_path: Path) -> None:
    def read(node: str, weight: str, bias: str) -> dict[str, torch.Tensor]:
        nodes = [
            helper.make_node("MatMul", ["x", weight], ["h"], name=node),
            helper.make_node("Add", [bias, "h"], ["y"]),
        ]
        return load_state_dict(saved(tmp_path / "n.onnx", nodes, {weight: W.T, bias: B}))

    for node, weight, bias, layer in [
        ("", "onnx::MatMul_7", "encoder.layer.0.attention.self.query.bias", "encoder.layer.0.attention.self.query"),
        ("/encoder/layer.0/query/MatMul", "onnx::MatMul_7", "onnx::Add_8", "encoder.layer.0.query"),
        ("/layer/layer.0/layer.0.fc/MatMul", "7", "8", "layer.0.fc"),
        ("model/dense/MatMul", "model/dense/MatMul/ReadVariableOp:0", "model/dense/BiasAdd/ReadVariableOp:0",
         "model.dense"),
        ("", "W1", "b1", "W1"),
    ]:  # fmt: skip
        found = read(node, weight, bias)
        assert found.keys() == {f"{layer}.weight", f"{layer}.bias"}
        assert torch.equal(found[f"{layer}.weight"], torch.tensor(W))


def test_gemm_honours_transb_and_constants_are_told_from_weights(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Constant", [], ["/a/Constant_output_0"], value=numpy_helper.from_array(W.T)),
        helper.make_node("Gemm", ["x", "/a/Constant_output_0", "b"], ["h"], name="/a/Gemm"),
        helper.make_node("Gemm", ["h", "c.weight"], ["i"], transB=1),
        helper.make_node("Mul", ["i", "onnx::Mul_3"], ["j"]),
        helper.make_node("Reshape", ["j", "shape"], ["k"]),
        helper.make_node("Clip", ["k", "low"], ["y"]),
    ]
    tensors = {"b": B, "c.weight": W, "onnx::Mul_3": np.float32(2), "shape": np.array([1, -1]), "low": np.float32(0)}
    found = read_checkpoint(saved(tmp_path / "n.onnx", nodes, tensors))
    assert found.tensors.keys() == {"a.weight", "a.bias", "c.weight"} and not found.keeps_order
    assert torch.equal(found.tensors["a.weight"], torch.tensor(W))
    assert found.left_out == {
        "onnx::Mul_3": "a number of the graph",
        "shape": "integers: a shape, an index or a table",
        "low": "a setting of Clip",
    }


def test_constants_that_an_exporter_computed_are_left_out(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Add", ["x", "where"], ["h"]),
        helper.make_node("Add", ["h", "expand"], ["i"]),
        helper.make_node("Add", ["i", "embedding_1"], ["j"]),
        helper.make_node("Conv", ["j", "conv.weight", "conv.weight_bias"], ["y"]),
    ]
    mask = np.triu(np.full((1, 1, 3, 3), -np.inf, np.float32), 1)
    held = {"where": mask, "expand": np.ones((1, 3), np.float32), "embedding_1": B, "conv.weight": W[..., None],
            "conv.weight_bias": B}  # fmt: skip
    found = read_checkpoint(saved(tmp_path / "n.onnx", nodes, held))
    assert found.tensors.keys() == {"embedding_1", "conv.weight", "conv.bias"}
    assert found.left_out == {"where": "mask", "expand": "one number over and over"}


def test_subgraphs_have_weights_too(tmp_path: Path) -> None:
    def branch(value: Any) -> Any:
        nodes = [helper.make_node("MatMul", ["x", "w"], ["out"], name="/fc/MatMul")]
        outputs = [helper.make_tensor_value_info("out", FLOAT, None)]
        return helper.make_graph(nodes, "b", [], outputs, [numpy_helper.from_array(value, "w")])

    node = helper.make_node("If", ["c"], ["y"], name="/If", then_branch=branch(W.T), else_branch=branch(-W.T))
    found = load_state_dict(saved(tmp_path / "n.onnx", [node], {}, ("x", "c")))
    assert torch.equal(found["If.then_branch.fc.weight"], -found["If.else_branch.fc.weight"])


SCALES = np.abs(B) / 10
INTEGERS = np.clip(np.round(W / SCALES[:, None]) + 3, -128, 127).astype(np.int8)
UNSIGNED = np.arange(12, dtype=np.uint8).reshape(3, 4)
ZEROS = np.full(3, 3, np.int8)
MEANT = torch.tensor((INTEGERS.astype(np.float32) - 3) * SCALES[:, None])


def quantised_nodes() -> dict[str, list[Any]]:
    make = helper.make_node
    return {
        "rows": [
            make("Gather", ["g", "x"], ["p"], name="/fc/Gather_quant"),
            make("DequantizeLinear", ["p", "one", "zero"], ["y"]),
        ],
        "weights": [
            make("DequantizeLinear", ["q", "s", "z"], ["fc.weight_DequantizeLinear_Output"], axis=0),
            make("Gemm", ["x", "fc.weight_DequantizeLinear_Output"], ["y"], transB=1, name="/fc/Gemm"),
        ],
        "integer products": [
            make("DynamicQuantizeLinear", ["x"], ["a", "as", "az"]),
            make("MatMulInteger", ["a", "t", "az", "z"], ["p"], name="/fc/MatMul_quant"),
            make("Cast", ["p"], ["f"], to=FLOAT),
            make("Mul", ["as", "s"], ["scales"]),
            make("Mul", ["f", "scales"], ["y"]),
        ],
        "products": [
            make("QuantizeLinear", ["x", "one", "zero"], ["a"]),
            make("QLinearMatMul", ["a", "one", "zero", "t", "s", "z", "one", "zero"], ["p"], name="/fc/MatMul_quant"),
            make("DequantizeLinear", ["p", "one", "zero"], ["y"]),
        ],
        "runtime": [
            make("DynamicQuantizeMatMul", ["x", "t", "s", "z"], ["y"], name="/fc/MatMul", domain="com.microsoft")
        ],
    }


@pytest.mark.parametrize("form", quantised_nodes())
def test_quantised_weights_are_the_numbers_they_stand_for(tmp_path: Path, form: str) -> None:
    nodes = quantised_nodes()[form]
    held = {
        "g": UNSIGNED,
        "q": INTEGERS,
        "t": INTEGERS.T,
        "s": SCALES,
        "z": ZEROS,
        "one": np.float32(0.1),
        "zero": np.uint8(0),
    }
    taken = {name for node in nodes for name in node.input}
    found = load_state_dict(
        saved(tmp_path / "n.onnx", nodes, {name: value for name, value in held.items() if name in taken})
    )
    assert found.keys() == {"fc.weight"}
    torch.testing.assert_close(
        found["fc.weight"], torch.tensor(UNSIGNED * np.float32(0.1)) if form == "rows" else MEANT
    )


NEARLY = {"dynamic": 0.005, "qdq": 0.005, "qoperator": 0.005, "nbits": 0.08}


@pytest.mark.parametrize("form", NEARLY)
def test_files_that_onnx_runtime_quantised(form: str) -> None:
    read = load_state_dict(WRITTEN / f"onnx_{form}.onnx")
    wanted = load_state_dict(WRITTEN / ("onnx_nbits_float.onnx" if form == "nbits" else "onnx_float.onnx"))
    assert read.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert read[name].shape == tensor.shape
        torch.testing.assert_close(read[name], tensor, rtol=0, atol=NEARLY[form] * float(tensor.abs().max()))


def test_weights_of_four_bits(tmp_path: Path) -> None:
    codes = np.random.default_rng(0).integers(0, 16, (3, 2, 16), dtype=np.uint8)
    packed = codes[..., ::2] | (codes[..., 1::2] << 4)
    scale = np.random.default_rng(1).random((3, 2), np.float32)
    node = helper.make_node("MatMulNBits", ["x", "w_Q4", "s"], ["y"], name="/fc/MatMul_Q4", domain="com.microsoft",
                            K=32, N=3, bits=4, block_size=16)  # fmt: skip
    found = load_state_dict(saved(tmp_path / "n.onnx", [node], {"w_Q4": packed, "s": scale.reshape(-1)}))
    wanted = ((codes.astype(np.float32) - 8) * scale[..., None]).reshape(3, 32)
    torch.testing.assert_close(found["fc.weight"], torch.tensor(wanted))


def test_a_quantised_weight_without_its_scale_is_refused(tmp_path: Path) -> None:
    for operation in ("MatMulInteger", "Unknown"):
        node = helper.make_node(operation, ["x", "q"], ["y"])
        with pytest.raises(CheckpointError, match="has the quantised weight 'q' without a constant scale; give the"):
            load_state_dict(saved(tmp_path / "n.onnx", [node], {"q": INTEGERS}))


@pytest.mark.parametrize("keep", [3, 20, 60, -1, -30])
def test_damaged_files_are_refused(tmp_path: Path, keep: int) -> None:
    file = saved(tmp_path / "n.onnx", [helper.make_node("MatMul", ["x", "w"], ["y"])], {"w": W.T})
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"n.onnx: (is damaged or no ONNX file|holds no weights)"):
        load_state_dict(file)


def test_a_tensor_larger_than_its_bytes_is_refused(tmp_path: Path) -> None:
    file = saved(tmp_path / "n.onnx", [helper.make_node("MatMul", ["x", "w"], ["y"])], {"w": W.T})
    model = onnx.load(file)
    model.graph.initializer[0].dims[0] = 1 << 40
    file.write_bytes(model.SerializeToString())
    with pytest.raises(CheckpointError, match=r"n\.onnx: is damaged or no ONNX file"):
        load_state_dict(file)
