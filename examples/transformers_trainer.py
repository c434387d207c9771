"""Train SNE with the Trainer of Hugging Face's transformers: a model that returns its loss, and a collator.

pip install transformers accelerate
python examples/transformers_trainer.py
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments, set_seed

import sne_fast
from sne_fast import WeightBatch


class PredictorWithLoss(nn.Module):
    """A predictor whose output is what the Trainer expects: a mapping with "loss" and "logits"."""

    def __init__(self, targets: Tensor, hidden_dim: int = 32) -> None:
        super().__init__()
        encoder = sne_fast.SNE(hidden_dim=hidden_dim)
        encoder.fill_code_gains(1.0)  # the label depends on which layer a weight belongs to
        self.predictor = sne_fast.Predictor(encoder, hidden_features=(64,))
        self.predictor.set_targets(targets)  # mean and spread of the training targets

    def forward(self, networks: WeightBatch, labels: Tensor | None = None) -> dict[str, Tensor]:
        outputs = self.predictor.head(self.predictor.encode(networks))
        found = {"logits": self.predictor.denormalise(outputs)}
        if labels is not None:
            found["loss"] = self.predictor.losses(outputs, self.predictor.normalise(labels)).mean()
        return found


def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Join packed networks, and their labels."""
    return {
        "networks": WeightBatch.collate([item["networks"] for item in items]),
        "labels": torch.stack([item["labels"] for item in items]),
    }


def run(epochs: int = 20, networks: int = 60, **arguments: Any) -> tuple[Trainer, list[float]]:
    """Train on networks of two architectures; return the trainer and the mean loss of every epoch."""
    set_seed(0)
    made = []
    for i in range(networks):
        width = 8 if i % 2 else 16
        made.append(nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 3)))
        made[-1][0].weight.data *= 0.2 + 4 * i / networks
    targets = torch.tensor([[network[0].weight.norm().item()] for network in made])
    model = PredictorWithLoss(targets)
    packed = model.predictor.encoder.pack(made).detach()
    data = [{"networks": one, "labels": target} for one, target in zip(packed, targets, strict=True)]

    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            folder, num_train_epochs=epochs, per_device_train_batch_size=4, learning_rate=1e-3, warmup_steps=10,
            logging_strategy="epoch", save_strategy="no", report_to=[], **arguments,
        )  # fmt: skip
        trainer = Trainer(model, settings, data_collator=collate, train_dataset=data)
        trainer.train()
    return trainer, [row["loss"] for row in trainer.state.log_history if "loss" in row]


if __name__ == "__main__":
    _, losses = run()
    print(f"loss {losses[0]:.3f} in the first epoch, {losses[-1]:.3f} in the last")
