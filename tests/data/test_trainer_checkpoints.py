"""Checkpoints of trainers: the weights are told from all else, and a key chooses a part of them."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from torch import nn

from sne_fast import CheckpointError, pack
from sne_fast.data.checkpoints import load_state_dict, read_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore")


def test_a_checkpoint_of_lightning(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning")
    logging.getLogger("lightning").setLevel(logging.ERROR)

    class Module(lightning.LightningModule):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.net = nn.Linear(3, width)
            self.ema = torch.optim.swa_utils.AveragedModel(self.net)

        def training_step(self, batch, _):
            return self.net(batch[0]).sum()

        def configure_optimizers(self):
            return torch.optim.Adam(self.net.parameters())

    module, data = Module(2), torch.utils.data.TensorDataset(torch.randn(8, 3))
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    trainer = lightning.Trainer(max_steps=2, enable_model_summary=False, **quiet)
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=4))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    found = read_checkpoint(tmp_path / "last.ckpt")
    assert list(found.tensors) == list(module.state_dict()) and found.key == "state_dict"
    assert found.left_out["optimizer_states"] == "an optimiser's state" and "hyper_parameters" in found.left_out
    batch = pack([found])
    assert batch.names[0][1] == ("net.weight", "net.bias")
    average = read_checkpoint(tmp_path / "last.ckpt", "state_dict.ema.module")
    assert average.tensors.keys() == {"weight", "bias"} and average.key == "state_dict.ema.module"
    assert torch.equal(average.tensors["weight"], module.ema.module.weight)
    assert average.left_out["state_dict.net.weight"] == "a tensor beside the weights"


def test_a_part_of_a_state_dict_is_chosen_by_the_start_of_its_names(tmp_path: Path) -> None:
    state = {"module.encoder.0.w": torch.ones(2), "module.encoder.1.w": torch.ones(3), "module.head.w": torch.ones(4)}
    torch.save({"epoch": 3, "state_dict": state}, tmp_path / "best.pth.tar")
    for key, names in (
        ("state_dict.module.encoder", ["0.w", "1.w"]),
        ("state_dict.module", ["encoder.0.w", "encoder.1.w", "head.w"]),
        ("state_dict", list(state)),
    ):
        assert list(load_state_dict(tmp_path / "best.pth.tar", key)) == names
    for key in ("state_dict.module.enc", "state_dict.encoder", "module"):
        with pytest.raises(CheckpointError, match=f"has no key '{key}'; there are"):
            load_state_dict(tmp_path / "best.pth.tar", key)
