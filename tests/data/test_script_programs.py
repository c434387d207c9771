"""TorchScript programs are read without being run: the weights of their modules, or the constants of frozen ones."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sne_fast import CheckpointError, pack
from sne_fast.data.checkpoints import load_state_dict, read_checkpoint
from sne_fast.data.layer_stream import LayerStream

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv1d(1, 2, 3), nn.BatchNorm1d(2))
        self.rnn, self.head = nn.LSTM(2, 3, batch_first=True), nn.Linear(3, 2)
        self.again = self.head
        self.register_buffer("window", torch.randn(4))
        self.attribute = torch.ones(2, 2)
        self.several = [torch.ones(3)]

    def forward(self, x: Tensor) -> Tensor:
        y = self.rnn(self.stem(x * self.window).mT)[0]
        return self.head(y) @ self.attribute + self.again(y) + self.several[0].sum()


def network() -> nn.Module:
    torch.manual_seed(0)
    return Network().eval()


def saved(file: Path, program: torch.jit.ScriptModule) -> Path:
    torch.jit.save(program, str(file))
    return file


@pytest.mark.parametrize("how", ["script", "trace"])
def test_a_program_is_packed_as_the_module_it_was_made_of(tmp_path: Path, how: str) -> None:
    made = network()
    program = torch.jit.script(made) if how == "script" else torch.jit.trace(made, torch.randn(2, 1, 4))
    file = saved(tmp_path / "n.pt", program)
    found = read_checkpoint(file)
    state = made.state_dict()
    assert list(found.tensors) == [name for name in state if name != "window" and "num_batches" not in name]
    assert all(torch.equal(tensor, state[name]) for name, tensor in found.tensors.items()) and found.keeps_order
    wanted, batch = pack([made], kinds="names"), pack([file])
    assert batch.names[0][1] == wanted.names[0][1] and torch.equal(batch.values, wanted.values)
    assert torch.equal(batch.tensor_type, wanted.tensor_type) and torch.equal(batch.layer_ptr, wanted.layer_ptr)
    streamed = list(LayerStream(file).batches())
    assert torch.equal(torch.cat([layer.values for layer in streamed]), batch.values)
    left_out = dict(batch.skipped[0])
    assert left_out["window"] == "attribute of the program"
    assert left_out["head.weight"] == "tied tensor: of 'again.weight'"
    assert ("attribute" if how == "script" else "constants.0.value") in left_out
    assert how == "script" or left_out["constants.0.value"] == "constant of the program"


def test_a_module_of_a_program_is_chosen_by_its_name(tmp_path: Path) -> None:
    file = saved(tmp_path / "n.pt", torch.jit.script(network()))
    assert list(load_state_dict(file, "stem.0")) == ["weight", "bias"]
    assert "rnn.weight_ih_l0" in read_checkpoint(file, "stem.0").left_out
    with pytest.raises(CheckpointError, match=r"n.pt: holds a TorchScript program without tensors in a module 'none'"):
        load_state_dict(file, "none")


def test_a_frozen_program_has_its_weights_among_its_constants(tmp_path: Path) -> None:
    made = network()
    file = saved(tmp_path / "n.pt", torch.jit.freeze(torch.jit.script(made)))
    found, state = load_state_dict(file), made.state_dict()
    number = {name.split(".", 1)[1]: name for name in found}
    for name, wanted in (("linear.weight", "head.weight"), ("linear.bias", "head.bias"),
                         ("rnn.weight_ih_l0", "rnn.weight_ih_l0"), ("rnn.bias_hh_l0", "rnn.bias_hh_l0")):  # fmt: skip
        assert torch.equal(found[number[name]], state[wanted])
    assert number["conv1d.weight"].startswith("1.")  # the first is the window
    batch = pack([file])
    kinds = dict(zip(batch.names[0][1], (batch.tensor_type // 8).tolist(), strict=True))
    assert (kinds[number["conv1d.bias"]], kinds[number["linear.weight"]], kinds[number["rnn.bias_hh_l0"]]) == (1, 0, 5)


class Frozen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb, self.norm, self.scale = nn.Embedding(10, 4), nn.LayerNorm(4), nn.Parameter(torch.randn(4))
        self.conv, self.group, self.act = nn.Conv2d(1, 2, 3, padding=1), nn.GroupNorm(1, 2), nn.PReLU()
        self.up = nn.ConvTranspose2d(2, 1, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.emb(x)) * self.scale
        return self.up(self.act(self.group(self.conv(y[:, None]))))


@pytest.mark.parametrize("how", ["script", "trace"])
def test_the_source_of_a_frozen_program_names_its_constants(tmp_path: Path, how: str) -> None:
    torch.manual_seed(0)
    made = Frozen().eval()
    program = torch.jit.script(made) if how == "script" else torch.jit.trace(made, torch.zeros(2, 5, dtype=torch.long))
    found = load_state_dict(saved(tmp_path / "n.pt", torch.jit.freeze(program)))
    conv, up = ("conv2d", "conv_transpose2d") if how == "script" else ("conv", "conv")
    wanted = {
        "0.embedding.weight": "emb.weight", "1.layer_norm.weight": "norm.weight", "1.layer_norm.bias": "norm.bias",
        "3.value": "scale", f"4.{conv}.weight": "conv.weight", f"4.{conv}.bias": "conv.bias",
        "6.group_norm.weight": "group.weight", "6.group_norm.bias": "group.bias", "8.prelu.weight": "act.weight",
        f"9.{up}.weight": "up.weight",
    }  # fmt: skip
    assert list(found) == list(wanted)
    assert all(torch.equal(tensor, made.state_dict()[wanted[name]]) for name, tensor in found.items())


def test_quantised_linear_layers_of_a_program(tmp_path: Path) -> None:
    from torch.ao.quantization import quantize_dynamic

    small = quantize_dynamic(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3, bias=False)), {nn.Linear})
    batch = pack([saved(tmp_path / "n.pt", torch.jit.script(small))], scale="none")
    wanted = pack([small], scale="none")
    assert batch.names[0][1] == wanted.names[0][1] and torch.equal(batch.values, wanted.values)


def test_other_objects_that_hold_weights_are_refused(tmp_path: Path) -> None:
    import torch.ao.quantization as tq

    if "fbgemm" not in torch.backends.quantized.supported_engines:
        pytest.skip("needs quantised kernels")
    wrapped = nn.Sequential(tq.QuantStub(), nn.Conv2d(1, 2, 3), tq.DeQuantStub()).eval()
    wrapped.qconfig = tq.get_default_qconfig("fbgemm")
    prepared = tq.prepare(wrapped)
    prepared(torch.randn(1, 1, 4, 4))
    file = saved(tmp_path / "n.pt", torch.jit.script(tq.convert(prepared)))
    with pytest.raises(CheckpointError, match=r"n.pt: refused, it keeps tensors of '1' in an object of .*Conv2d"):
        load_state_dict(file)


def test_programs_without_parameters_or_source(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds a TorchScript program without parameters"):
        load_state_dict(saved(tmp_path / "n.pt", torch.jit.script(nn.ReLU())))
    program = torch.jit.script(network())
    program._save_for_lite_interpreter(str(tmp_path / "n.ptl"))
    assert load_state_dict(tmp_path / "n.ptl").keys() >= {name for name, _ in network().named_parameters()}
    buffer = io.BytesIO()
    torch.jit.save(program, buffer)
    with zipfile.ZipFile(buffer) as source, zipfile.ZipFile(tmp_path / "bomb.pt", "w") as out:
        for entry in source.namelist():
            out.writestr(entry, source.read(entry))
        name = f"{source.namelist()[0].partition('/')[0]}/code/bomb.py"
        out.writestr(name, bytes(2**26 + 1), compress_type=zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match="refused, the source of its TorchScript program is larger than any"):
        load_state_dict(tmp_path / "bomb.pt")
