"""Encoders and batches inside the libraries that people train with: accelerate, transformers, Lightning, peft."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import sne_fast
from sne_fast import WeightBatch

Item = tuple[WeightBatch, Tensor]


def made(count: int = 8) -> tuple[list[nn.Module], Tensor]:
    torch.manual_seed(0)
    networks = [
        nn.Sequential(nn.Linear(4, 6 + 2 * (i % 2)), nn.ReLU(), nn.Linear(6 + 2 * (i % 2), 2)) for i in range(count)
    ]
    for i, network in enumerate(networks):
        network[0].weight.data *= 0.2 + 4 * i / count
    return networks, torch.tensor([[network[0].weight.std().item()] for network in networks])


def predictor_for(targets: Tensor) -> sne_fast.Predictor:
    torch.manual_seed(1)
    predictor = sne_fast.Predictor(sne_fast.SNE(hidden_dim=32, num_heads=2), hidden_features=(16,))
    predictor.set_targets(targets)
    return predictor


def items_for(predictor: sne_fast.Predictor) -> tuple[list[Item], Tensor]:
    networks, targets = made()
    packed = predictor.encoder.pack(networks).detach()
    return list(zip(packed, targets, strict=True)), targets


def loss_of(predictor: sne_fast.Predictor, batch: WeightBatch, targets: Tensor) -> Tensor:
    outputs = predictor.head(predictor.encode(batch))
    return predictor.losses(outputs, predictor.normalise(targets)).mean()


def plain_steps(predictor: sne_fast.Predictor, batches: list[Item]) -> dict[str, Tensor]:
    """Return the parameters after one step of SGD per batch in a plain loop."""
    optimiser = torch.optim.SGD(predictor.parameters(), lr=0.1)
    for batch, targets in batches:
        optimiser.zero_grad()
        loss_of(predictor, batch, targets).backward()
        optimiser.step()
    return {name: value.detach().clone() for name, value in predictor.state_dict().items()}


def batches_of(items: list[Item], size: int = 4) -> list[Item]:
    return [
        (WeightBatch.cat([b for b, _ in items[i : i + size]]), torch.stack([t for _, t in items[i : i + size]]))
        for i in range(0, len(items), size)
    ]


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_data_loader_with_its_default_collation_gives_batches(workers: int) -> None:
    items, _ = items_for(predictor_for(made()[1]))
    loader: Any = DataLoader(items, batch_size=4, num_workers=workers)
    for (batch, targets), (wanted, goals) in zip(loader, batches_of(items), strict=True):
        assert isinstance(batch, WeightBatch) and torch.equal(batch.values, wanted.values)
        assert torch.equal(batch.network_ptr, wanted.network_ptr) and torch.equal(targets, goals)
    as_dicts: Any = DataLoader([{"x": b, "y": t} for b, t in items], batch_size=8)
    (joint,) = as_dicts
    assert len(joint["x"]) == 8 and joint["y"].shape == (8, 1)


def test_accelerate_trains_as_a_plain_loop_does() -> None:
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    targets = made()[1]
    predictor = predictor_for(targets)
    items, _ = items_for(predictor)
    expected = plain_steps(copy.deepcopy(predictor), batches_of(items))

    accelerator = accelerate.Accelerator(cpu=True)
    loader: Any = DataLoader(items, batch_size=4)
    optimiser = torch.optim.SGD(predictor.parameters(), lr=0.1)
    model, optimiser, loader = accelerator.prepare(predictor, optimiser, loader)
    seen = 0
    for batch, goals in loader:
        optimiser.zero_grad()
        accelerator.backward(loss_of(accelerator.unwrap_model(model), batch, goals))
        optimiser.step()
        seen += len(batch)
    assert seen == len(items)
    assert_same(expected, accelerator.unwrap_model(model).state_dict())


def test_lightning_moves_and_trains_batches_without_any_hook_of_its_own() -> None:
    lightning = pytest.importorskip("lightning", reason="lightning is not installed")
    targets = made()[1]
    start = predictor_for(targets)
    items, _ = items_for(start)
    expected = plain_steps(copy.deepcopy(start), batches_of(items))

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.predictor = start

        def training_step(self, item: Item, index: int) -> Tensor:
            return loss_of(self.predictor, *item)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = lightning.Trainer(max_epochs=1, accelerator="cpu", devices=1, **quiet)
    trainer.fit(Module(), DataLoader(items, batch_size=4))
    assert_same(expected, start.state_dict())


def test_lightnings_walk_through_a_batch_of_one_network_ends() -> None:
    utilities = pytest.importorskip("lightning.pytorch.utilities.data", reason="lightning is not installed")
    batch = items_for(predictor_for(made()[1]))[0][0][0]
    assert len(batch) == 1
    assert utilities.extract_batch_size({"labels": torch.zeros(1, 1), "networks": batch}) == 1


def test_the_trainer_of_transformers_trains_evaluates_and_saves(tmp_path: Any) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    networks, targets = made()

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.predictor = predictor_for(targets)

        def forward(self, networks: WeightBatch, labels: Tensor | None = None) -> dict[str, Tensor]:
            found = {"logits": self.predictor(networks)}
            if labels is not None:
                found["loss"] = loss_of(self.predictor, networks, labels)
            return found

    model = Model()
    packed = model.predictor.encoder.pack(networks).detach()
    data = [{"networks": one, "labels": target} for one, target in zip(packed, targets, strict=True)]
    settings = transformers.TrainingArguments(
        str(tmp_path), num_train_epochs=1, per_device_train_batch_size=4, per_device_eval_batch_size=3, report_to=[],
        use_cpu=True, save_strategy="epoch", disable_tqdm=True,
    )  # fmt: skip
    trainer = transformers.Trainer(
        model, settings, data_collator=torch.utils.data.default_collate, train_dataset=data, eval_dataset=data
    )
    trainer.train()
    with torch.no_grad():
        expected = model.predictor(packed)
    found = trainer.predict(data)
    torch.testing.assert_close(torch.from_numpy(found.predictions), expected, rtol=1e-5, atol=1e-6)
    assert trainer.evaluate()["eval_loss"] >= 0
    again = Model()
    resumed = transformers.Trainer(again, settings, data_collator=torch.utils.data.default_collate, train_dataset=data)
    resumed.train(resume_from_checkpoint=True)
    assert_same(model.state_dict(), again.state_dict())


def linear_names() -> list[str]:
    encoder = sne_fast.SNE(hidden_dim=32, num_heads=2)
    return [name for name, module in encoder.named_modules() if isinstance(module, nn.Linear)]


@pytest.mark.parametrize("name", linear_names()[::5])
def test_lora_of_peft_on_a_linear_layer_moves_z_and_trains(name: str) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    networks, _ = made(4)
    torch.manual_seed(0)
    encoder = sne_fast.SNE(hidden_dim=32, num_heads=2, chunk_size=8)
    with torch.no_grad():
        for parameter in encoder.parameters():  # seeds and biases of zero would hide what multiplies them
            parameter.add_(0.1 * torch.randn_like(parameter))
    batch = encoder.pack(networks).detach()
    with torch.no_grad():
        before = encoder(batch)
    adapted = peft.inject_adapter_in_model(
        peft.LoraConfig(r=2, target_modules=[name], init_lora_weights=False), encoder
    )
    after = adapted(batch)
    assert not torch.allclose(before, after, rtol=1e-4), f"the adapter of {name} changes nothing"
    after.square().sum().backward()
    trained = {n: p.grad for n, p in adapted.named_parameters() if "lora_" in n}
    assert trained and all(grad is not None and bool(grad.abs().sum() > 0) for grad in trained.values())
