"""Train SNE in PyTorch Lightning: a LightningModule, and a DataLoader of packed networks.

pip install lightning
python examples/lightning_module.py
"""

from __future__ import annotations

from typing import Any

import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import sne_fast
from sne_fast import WeightBatch

Item = tuple[WeightBatch, Tensor]


class SneModule(lightning.LightningModule):
    """A predictor of one number per network, trained by the mean squared error of normalised targets."""

    def __init__(self, targets: Tensor, hidden_dim: int = 32, lr: float = 1e-3) -> None:
        super().__init__()
        encoder = sne_fast.SNE(hidden_dim=hidden_dim)
        encoder.fill_code_gains(1.0)  # the label depends on which layer a weight belongs to
        self.predictor = sne_fast.Predictor(encoder, hidden_features=(64,))
        self.predictor.set_targets(targets)  # mean and spread of the training targets
        self.lr = lr

    def forward(self, networks: WeightBatch) -> Tensor:
        return self.predictor(networks)

    def training_step(self, item: Item, index: int) -> Tensor:
        batch, targets = item
        outputs = self.predictor.head(self.predictor.encode(batch))
        loss = self.predictor.losses(outputs, self.predictor.normalise(targets)).mean()
        self.log("train_loss", loss, batch_size=len(batch), on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self) -> dict[str, Any]:
        optimiser = torch.optim.AdamW(self.parameters(), lr=self.lr)
        # A warm-up and a falling rate, as `sne_fast.training.fit` has them.
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimiser, self.lr, total_steps=int(self.trainer.estimated_stepping_batches), pct_start=0.1
        )
        return {"optimizer": optimiser, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def transfer_batch_to_device(self, batch: Item, device: torch.device, dataloader_idx: int) -> Item:
        networks, targets = batch
        return networks.to(device), targets.to(device)


class EpochLosses(lightning.Callback):
    """Keeps the mean training loss of every epoch in `seen`."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self.seen.append(float(trainer.callback_metrics["train_loss"]))


def collate(items: list[Item]) -> Item:
    """Join packed networks, and their targets."""
    return WeightBatch.collate([networks for networks, _ in items]), torch.stack([target for _, target in items])


def run(epochs: int = 20, networks: int = 60, **trainer: Any) -> tuple[SneModule, list[float]]:
    """Train on networks of two architectures; return the module and the loss of every epoch."""
    lightning.seed_everything(0)
    made = []
    for i in range(networks):
        width = 8 if i % 2 else 16
        made.append(nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 3)))
        made[-1][0].weight.data *= 0.2 + 4 * i / networks
    targets = torch.tensor([[network[0].weight.norm().item()] for network in made])
    module = SneModule(targets)
    packed = module.predictor.encoder.pack(made).detach()
    data = DataLoader(list(zip(packed, targets, strict=True)), batch_size=4, shuffle=True, collate_fn=collate)

    losses = EpochLosses()
    options = {
        "accelerator": "auto", "gradient_clip_val": 1.0, "logger": False, "enable_checkpointing": False, **trainer,
    }  # fmt: skip
    lightning.Trainer(max_epochs=epochs, callbacks=[losses], **options).fit(module, data)
    return module, losses.seen


if __name__ == "__main__":
    _, losses = run()
    print(f"loss {losses[0]:.3f} in the first epoch, {losses[-1]:.3f} in the last")
