"""Folders of torch.distributed.checkpoint: pieces of tensors are put together, and no object of the pickle is made."""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from sne_fast import CheckpointError, pack
from sne_fast.data.checkpoints import load_state_dict, read_checkpoint
from sne_fast.data.layer_stream import LayerStream

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Embedding(3, 2, dtype=torch.bfloat16))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return what a training on one process saves."""
    made, path = network(), tmp_path_factory.mktemp("saved") / "step"
    optimiser = torch.optim.Adam(made.parameters())
    made[:2](torch.randn(5, 4)).sum().backward()
    optimiser.step()
    dcp.save({"model": network().state_dict(), "optimizer": optimiser.state_dict(), "epoch": 3}, checkpoint_id=path)
    return path


def test_weights_are_found_beside_the_state_of_an_optimiser(folder: Path) -> None:
    wanted = network().state_dict()
    for path in (folder, folder / ".metadata", folder / "__0_0.distcp"):
        found = read_checkpoint(path)
        assert found.tensors.keys() == wanted.keys() and (found.key, found.keeps_order) == ("model", False)
        assert all(torch.equal(found.tensors[name], wanted[name]) for name in wanted)
        assert found.left_out == {"optimizer": "an optimiser's state", "epoch": "no tensor (bytes)"}
    batch, module = pack([folder]), pack([network()])
    assert batch.names[0][1] == module.names[0][1] and torch.equal(batch.values, module.values)
    streamed = list(LayerStream(folder).batches())
    assert torch.equal(torch.cat([layer.values for layer in streamed]), batch.values)
    assert load_state_dict(folder, "model").keys() == wanted.keys()
    with pytest.raises(CheckpointError, match=r"has no key 'student'; there are 'model', 'optimizer', 'epoch'"):
        load_state_dict(folder, "student")


def test_a_state_dict_that_was_saved_alone(tmp_path: Path) -> None:
    wanted = network().state_dict()
    dcp.save(wanted, checkpoint_id=tmp_path / "flat")
    assert load_state_dict(tmp_path / "flat").keys() == wanted.keys()


WORKER = """
import sys, torch, warnings
warnings.simplefilter("ignore")
import torch.distributed as dist, torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=int(sys.argv[1]), world_size=2)
mesh = init_device_mesh("cpu", (2,))
state = {f"layers.{i}.weight": torch.arange(35.0).view(5, 7) + i for i in range(3)}
places = [Shard(0), Shard(1), Replicate()]
shared = {name: distribute_tensor(t, mesh, [place]) for (name, t), place in zip(state.items(), places)}
dcp.save({"model": shared}, checkpoint_id=sys.argv[3])
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_tensors_in_pieces_of_two_processes(tmp_path: Path) -> None:
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    places = [str(tmp_path / "rendezvous"), str(tmp_path / "saved")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen([sys.executable, str(script), str(rank), *places], env=environment, stderr=subprocess.PIPE)
        for rank in range(2)
    ]
    for worker in workers:
        assert worker.communicate(timeout=120)[1] is not None and worker.returncode == 0
    assert len(list((tmp_path / "saved").glob("*.distcp"))) == 2
    found = load_state_dict(tmp_path / "saved")
    assert list(found) == [f"layers.{i}.weight" for i in range(3)]
    assert all(torch.equal(tensor, torch.arange(35.0).view(5, 7) + i) for i, tensor in enumerate(found.values()))


# ---------------------------------------------------------------------------------------------------------------------
# Damage


def changed(folder: Path, to: Path, change: Callable[[Any], object]) -> Path:
    """Return a copy of a folder whose metadata was changed."""
    shutil.copytree(folder, to)
    metadata = pickle.loads((to / ".metadata").read_bytes())
    change(metadata)
    (to / ".metadata").write_bytes(pickle.dumps(metadata))
    return to


def info(metadata: Any, name: str = "model.0.weight") -> Any:
    return next(found for index, found in metadata.storage_data.items() if index.fqn == name)


def entry(metadata: Any) -> Any:
    return metadata.state_dict_metadata["model.0.weight"]


def chunk(metadata: Any) -> Any:
    return entry(metadata).chunks[0]


CHANGES: dict[str, Callable[[Any], object]] = {
    "its part 'gone.distcp' is missing; fetch it into": lambda m: setattr(info(m), "relative_path", "gone.distcp"),
    "refused, its part '../x' is not a file inside its folder": lambda m: setattr(info(m), "relative_path", "../x"),
    "refused, its part '/etc/passwd' is not a file": lambda m: setattr(info(m), "relative_path", "/etc/passwd"),
    "refused, '__0_0.distcp' ends before a piece of its tensor": lambda m: setattr(info(m), "length", 10**9),
    "refused, it has shapes or places that are no sizes": lambda m: setattr(info(m), "offset", -1),
    "was written through an extension": lambda m: setattr(info(m), "transform_descriptors", ["stream.zstd"]),
    "is larger than what is stored of it": lambda m: (
        setattr(entry(m), "size", torch.Size([10**6, 10**6])), setattr(chunk(m), "sizes", torch.Size([10**6, 10**6]))
    ),
    "do not make up its shape": lambda m: setattr(entry(m), "chunks", []),
    r"of its tensor 'model.0.weight' do not": lambda m: setattr(entry(m), "chunks", entry(m).chunks * 2),
    "is not inside it": lambda m: setattr(chunk(m), "sizes", torch.Size([4, 3])),
    "does not say where a piece": lambda m: setattr(chunk(m), "offsets", torch.Size([1, 0])),
    "in another way than torch's own": lambda m: setattr(entry(m), "properties", 3),
    "no metadata of torch.distributed.checkpoint": lambda m: setattr(m, "storage_data", [1]),
    "a piece of its tensor 'model.0.weight' has another form": lambda m: (
        setattr(info(m), "offset", info(m, "model.0.bias").offset),
        setattr(info(m), "length", info(m, "model.0.bias").length),
    ),
    "inside a tensor": lambda m: m.planner_data.update({"model.1.bias": ("model", "0.weight", "x")}),
    "has two entries that are called": lambda m: m.planner_data.update({"model.1.bias": ("model", "0.weight")}),
}  # fmt: skip


@pytest.mark.parametrize("message", CHANGES)
def test_metadata_that_does_not_fit_is_refused(folder: Path, tmp_path: Path, message: str) -> None:
    path = changed(folder, tmp_path / "changed", CHANGES[message])
    with pytest.raises(CheckpointError, match=message) as raised:
        load_state_dict(path)
    assert str(path) in str(raised.value) and "\n" not in str(raised.value)


class Touch:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


def test_no_code_of_the_metadata_runs(folder: Path, tmp_path: Path) -> None:
    proof = tmp_path / "proof"
    path = changed(folder, tmp_path / "changed", lambda m: setattr(m, "planner_data", Touch(proof)))
    assert "model.0.weight" in load_state_dict(path)  # names as they are, for paths are not known
    assert not proof.exists()


@given(data=st.data())
def test_folders_with_changed_bytes_are_read_or_refused(folder: Path, tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "changed"
    if not path.exists():
        shutil.copytree(folder, path)
    for name in (".metadata", "__0_0.distcp"):
        changed = bytearray((folder / name).read_bytes())
        places = st.tuples(st.integers(0, len(changed) - 1), st.integers(0, 255))
        for place, value in data.draw(st.lists(places, max_size=3)):
            changed[place] = value
        (path / name).write_bytes(changed)
    try:
        read = load_state_dict(path)
    except CheckpointError as error:
        told = str(error)
        assert str(path) in told and "\n" not in told and len(told) < 700 + 2 * len(str(path)), told
    else:
        assert sum(tensor.numel() for tensor in read.values()) < 10**6


def test_parts_of_a_folder_that_is_not_whole(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "cut")
    part = tmp_path / "cut" / "__0_0.distcp"
    part.write_bytes(part.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"__0_0.distcp' ends before a piece of its tensor"):
        load_state_dict(tmp_path / "cut")
    shutil.copytree(folder, tmp_path / "damaged")
    part = tmp_path / "damaged" / "__0_0.distcp"
    part.write_bytes(bytes(len(part.read_bytes())))
    with pytest.raises(CheckpointError, match=r"__0_0.distcp: is damaged"):
        load_state_dict(tmp_path / "damaged")
    (tmp_path / "damaged" / ".metadata").unlink()
    with pytest.raises(CheckpointError, match=r"is a part of a checkpoint of torch.distributed without its .metadata"):
        load_state_dict(part)
    (tmp_path / "damaged" / ".metadata").write_bytes(b"\x80\x02N.")
    with pytest.raises(CheckpointError, match=r"no metadata of torch.distributed.checkpoint as torch writes it"):
        load_state_dict(part)
