"""Training as it is run: resumed, logged, on several processes, with other losses and types, with augmentation."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from helpers.paths import ROOT
from helpers.training_worker import CASES, LARGE, jitter, train
from helpers.training_worker import SETTINGS as WORKERS
from sne_fast import SNE, Predictor
from sne_fast.training import CsvLog, FitSettings, History, TensorBoardLog, fit, predict, shards_by_weights

# gloo looks the machine's own name up, which a closed-off one may not know.
LOOPBACK = "lo" if sys.platform.startswith("linux") else "lo0"


class Killed(Exception):
    pass


def task(count: int = 24) -> tuple[list[dict[str, torch.Tensor]], torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    spread = 10 ** (2 * torch.rand(count, generator=generator) - 1)
    networks = [
        {"0.weight": s * torch.randn(6, 5, generator=generator), "2.weight": torch.randn(2, 6, generator=generator)}
        for s in spread
    ]
    return networks, spread.log()[:, None]


def make(**options: object) -> Predictor:
    torch.manual_seed(0)
    return Predictor(SNE(hidden_dim=32, chunk_size=16), hidden_features=(32,), **options)  # type: ignore[arg-type]


def same(one: Predictor, other: Predictor) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


# ------------------------------------------------------------------------------------------------- checkpoint and log

SETTINGS = FitSettings(epochs=6, lr=1e-3, batch_weights=200, invariance=0.1, ranking=0.3)


@pytest.mark.slow
@pytest.mark.parametrize("killed_after", [1, 4])
def test_a_killed_training_resumes_to_the_same_bits(killed_after: int, tmp_path: Path) -> None:
    networks, targets = task()
    whole, resumed = make(), make()
    batch = whole.encoder.pack(networks)
    options = {"validation": (batch[:6], targets[:6]), "augment": jitter}
    expected = fit(whole, batch, targets, SETTINGS, **options)

    def die(epoch: int, history: History) -> None:
        if epoch == killed_after:
            raise Killed

    files = {"checkpoint": tmp_path / "new" / "fit.pt", "log": CsvLog(tmp_path / "log.csv")}
    with pytest.raises(Killed):
        fit(resumed, batch, targets, SETTINGS, on_epoch=die, **files, **options)
    fresh, epochs = make(), []
    torch.manual_seed(77)
    found = fit(fresh, batch, targets, SETTINGS, on_epoch=lambda e, h: epochs.append(e), **files, **options)
    assert epochs == list(range(killed_after + 1, 6))
    assert same(fresh, whole)
    assert found.train_loss == expected.train_loss and found.validation_loss == expected.validation_loss
    assert found.kept == expected.kept and not list(tmp_path.rglob("*.tmp"))
    with open(tmp_path / "log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["epoch"]) for row in rows] == list(range(6))
    assert [float(row["train_loss"]) for row in rows] == expected.train_loss
    # A finished training is read back, not done again.
    again = make()
    assert fit(again, batch, targets, SETTINGS, **files, **options).train_loss == expected.train_loss
    assert same(again, whole)


def test_rows_after_the_checkpoint_are_dropped_from_the_log(tmp_path: Path) -> None:
    log = CsvLog(tmp_path / "log.csv")
    log.resume(0)
    for epoch in range(4):
        log(epoch, {"train_loss": float(epoch)})
    log.resume(2)
    log(2, {"train_loss": 7.5})
    assert (tmp_path / "log.csv").read_text().split() == ["epoch,train_loss", "0,0.0", "1,1.0", "2,7.5"]
    log.resume(0)
    assert (tmp_path / "log.csv").read_text() == ""


def test_a_checkpoint_of_another_training_is_refused(tmp_path: Path) -> None:
    networks, targets = task(4)
    predictor, path = make(), tmp_path / "fit.pt"
    batch = predictor.encoder.pack(networks)
    fit(predictor, batch, targets, FitSettings(epochs=1), checkpoint=path)
    with pytest.raises(ValueError, match=r"of another training: other settings \(lr 0.002 then, 0.1 now\); train with"):
        fit(predictor, batch, targets, FitSettings(epochs=2, lr=0.1), checkpoint=path)
    other = Predictor(SNE(hidden_dim=64, chunk_size=16), 1, (32,))
    with pytest.raises(ValueError, match=r"encoder.hidden_dim 32 then, 64 now"):
        fit(other, batch, targets, FitSettings(epochs=1), checkpoint=path)
    torch.save({"weights": torch.ones(2)}, path)
    with pytest.raises(ValueError, match="is not one of fit's"):
        fit(predictor, batch, targets, FitSettings(epochs=1), checkpoint=path)


def test_tensorboard_log(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    networks, targets = task(6)
    predictor = make()
    history = fit(
        predictor, predictor.encoder.pack(networks), targets, FitSettings(epochs=3), log=TensorBoardLog(tmp_path)
    )
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [e.value for e in events.Scalars("train_loss")] == pytest.approx(history.train_loss)


# ---------------------------------------------------------------------------------------------------- several processes


def test_shards_are_balanced_and_complete() -> None:
    sizes = torch.tensor([900, 10, 500, 400, 30, 20])
    shards = shards_by_weights(sizes, [5, 4, 3, 2, 0], 2)
    assert sorted(p for shard in shards for p in shard) == [0, 1, 2, 3, 4]
    held = [sum(int(sizes[[5, 4, 3, 2, 0][p]]) for p in shard) for shard in shards]
    assert sorted(held) == [920, 930]
    assert shards_by_weights(sizes, [1], 3) == [[0], [], []]


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
def test_several_processes_train_as_one(count: int, tmp_path: Path) -> None:
    out = tmp_path / "worker.pt"
    worker = ROOT / "tests" / "helpers" / "training_worker.py"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": LOOPBACK}
    done = subprocess.run(
        [*launch, str(worker), str(out)], capture_output=True, text=True, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    every = [torch.load(f"{out}.{rank}", weights_only=True) for rank in range(count)]
    for case in CASES:
        one = train(case, accumulate=count)
        for rank, each in enumerate(every):
            found = each[case]
            assert each["size"] == count
            torch.testing.assert_close(torch.tensor(found["losses"]), torch.tensor(one["losses"]), rtol=1e-5, atol=0)
            for name, expected in one["state"].items():
                # Some biases have a gradient of zero and stay at rounding errors.
                assert (found["state"][name] - expected).norm() <= 1e-5 * expected.norm() + 1e-9, (case, rank, name)
    reads = torch.stack([each["stream"]["read"] for each in every])
    others = [row for row in range(1, 20) if row != LARGE]  # the first one also where no other is left to read
    assert (reads.sum(0)[others] == WORKERS.epochs + 1).all(), "for the statistics and in every epoch, by one process"
    assert int(reads[:, LARGE].sum()) == WORKERS.epochs * count + 1, "all processes encode layers of the large one"


def test_accumulated_parts_train_as_one_large_batch() -> None:
    networks, targets = task(24)
    results = []
    for settings in ({"batch_weights": 10**6}, {"batch_weights": 100, "accumulate": 100}):
        predictor = make().double()
        batch = predictor.encoder.pack(networks)
        history = fit(predictor, batch, targets, FitSettings(epochs=5, lr=1e-3, **settings))  # type: ignore[arg-type]
        results.append((history.train_loss, predictor.state_dict()))
    (expected, one), (found, other) = results
    assert found == pytest.approx(expected, rel=1e-5)
    for name, value in one.items():
        assert (other[name] - value).norm() <= 1e-5 * value.norm() + 1e-9, name


# ----------------------------------------------------------------------------------------------------- losses and types


@pytest.mark.slow
def test_binary_cross_entropy_learns_probabilities() -> None:
    networks, spread = task(60)
    predictor = make(loss="bce")
    targets = torch.sigmoid(2 * spread)
    batch = predictor.encoder.pack(networks)
    history = fit(predictor, batch, targets, FitSettings(epochs=30, lr=1e-3, batch_weights=400))
    values, z = predict(predictor, batch)
    assert values.min() >= 0 and values.max() <= 1
    entropy = -(targets * targets.log() + (1 - targets) * (1 - targets).log()).mean().item()
    assert entropy <= history.train_loss[-1] < entropy + 0.05 < history.train_loss[0]
    torch.testing.assert_close(values, predictor.head(z).sigmoid())


@pytest.mark.slow
def test_classes_are_learnt() -> None:
    networks, spread = task(60)
    predictor = make(out_features=3, loss="cross_entropy", target_names=["small", "middle", "large"])
    classes = torch.bucketize(spread[:, 0], torch.tensor([-0.8, 0.8]))
    batch = predictor.encoder.pack(networks)
    fit(predictor, batch, classes, FitSettings(epochs=30, lr=1e-3, batch_weights=400), validation=(batch, classes))
    probabilities, _ = predict(predictor, batch)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(60))
    assert (probabilities.argmax(1) == classes).float().mean() > 0.9


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (torch.zeros(4, 1), r"must be integers of shape \(n,\), got torch.float32 \(4, 1\)"),
        (torch.tensor([0, 1, 3, 0]), r"classes must lie in 0..2, got 0 to 3"),
        (torch.tensor([0, -1, 0, 0]), r"classes must lie in 0..2, got -1 to 0"),
    ],
)
def test_classes_must_fit(targets: torch.Tensor, message: str) -> None:
    predictor = make(out_features=3, loss="cross_entropy")
    with pytest.raises(ValueError, match=message):
        fit(predictor, predictor.encoder.pack(task(4)[0]), targets)


@pytest.mark.parametrize("loss", ["bce", "cross_entropy"])
def test_the_loss_is_saved(loss: str, tmp_path: Path) -> None:
    predictor = make(loss=loss, out_features=2)
    predictor.save_pretrained(tmp_path)
    again = Predictor.from_pretrained(tmp_path)
    batch = again.encoder.pack(task(3)[0])
    assert again.loss == loss
    torch.testing.assert_close(again(batch), predictor(batch))


@pytest.mark.slow
def test_half_types_train() -> None:
    networks, targets = task(40)
    losses = {}
    for amp in (None, "bfloat16"):
        predictor = make()
        batch = predictor.encoder.pack(networks)
        losses[amp] = fit(
            predictor, batch, targets, FitSettings(epochs=15, lr=1e-3, batch_weights=300, amp=amp)
        ).train_loss
        assert all(p.dtype == torch.float32 for p in predictor.parameters())
    assert losses[None] != losses["bfloat16"]
    assert losses["bfloat16"][-1] < 0.5 * losses["bfloat16"][0]


@pytest.mark.slow
def test_invariance_needs_augmentation_and_lowers_the_difference() -> None:
    networks, targets = task(40)
    predictor = make()
    batch = predictor.encoder.pack(networks)
    with pytest.raises(ValueError, match="give augment"):
        fit(predictor, batch, targets, FitSettings(epochs=1, invariance=1.0))
    differences = []
    for weight in (0.0, 30.0):
        predictor = make()
        settings = FitSettings(epochs=12, lr=1e-3, batch_weights=300, invariance=weight)
        fit(predictor, batch, targets, settings, augment=jitter)
        moved = jitter(batch, range(40), torch.Generator().manual_seed(1))
        outputs = [predictor.normalise(predict(predictor, b)[0]) for b in (batch, moved)]
        differences.append((outputs[0] - outputs[1]).square().mean().item())
    assert differences[1] < 0.7 * differences[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"amp": "float64"}, "amp must be None or one of bfloat16"),
        ({"invariance": -1.0}, "invariance must be"),
        ({"ranking": float("inf")}, "ranking must be"),
    ],
)
def test_bad_settings(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FitSettings(**changes)  # type: ignore[arg-type]
