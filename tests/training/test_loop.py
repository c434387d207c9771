"""The training loop: batches by weights, splits, and that it learns what can be learnt."""

from collections import Counter

import pytest
import torch

import sne_fast
from sne_fast import SNE, Predictor
from sne_fast.training import (
    FitSettings,
    batches_by_weights,
    fit,
    network_sizes,
    predict,
    stratified_split,
)


def spread_task(count, seed):
    """Make networks whose label is the log of the spread of their first layer."""
    generator = torch.Generator().manual_seed(seed)
    networks, labels = [], []
    for _ in range(count):
        spread = 10 ** (2 * torch.rand((), generator=generator) - 1)
        networks.append(
            {
                "0.weight": spread * torch.randn(6, 5, generator=generator),
                "0.bias": torch.randn(6, generator=generator),
                "2.weight": torch.randn(2, 6, generator=generator),
            }
        )
        labels.append([spread.log().item()])
    return networks, torch.tensor(labels)


def make(seed=0, **options):
    torch.manual_seed(seed)
    return Predictor(SNE(hidden_dim=32, chunk_size=16), 1, (32,), **options)


def test_network_sizes():
    networks = [torch.nn.Linear(4, 3), torch.nn.Linear(40, 3, bias=False)]
    assert network_sizes(sne_fast.pack(networks)).tolist() == [15, 120]
    assert network_sizes(sne_fast.pack(networks)[0:0]).tolist() == []


def test_batches_hold_every_network_once_and_keep_the_budget():
    sizes = torch.randint(1, 100, (200,), generator=torch.Generator().manual_seed(0))
    sizes[7] = 1000
    batches = list(batches_by_weights(sizes, 300, torch.Generator().manual_seed(1)))
    assert sorted(i for rows in batches for i in rows) == list(range(200))
    assert all(int(sizes[rows].sum()) <= 300 or rows == [7] for rows in batches)
    assert [7] in batches
    assert len(batches) < 1.3 * int(sizes.sum()) / 300
    assert batches != list(batches_by_weights(sizes, 300, torch.Generator().manual_seed(2)))
    in_order = [i for rows in batches_by_weights(sizes, 300) for i in rows]
    assert in_order == list(range(200))
    assert list(batches_by_weights(sizes[:0], 300)) == []


def test_split_shares_out_every_group():
    groups = ["a"] * 40 + ["b"] * 40 + ["c"] * 41
    parts = stratified_split(groups, (0.65, 0.1, 0.25), seed=3)
    assert sorted(i for part in parts for i in part) == list(range(121))
    for group in "abc":
        counts = [sum(groups[i] == group for i in part) for part in parts]
        assert abs(counts[0] - 26) <= 1 and abs(counts[1] - 4) <= 1 and abs(counts[2] - 10) <= 1
    assert parts == stratified_split(groups, (0.65, 0.1, 0.25), seed=3)
    assert parts != stratified_split(groups, (0.65, 0.1, 0.25), seed=4)


def test_split_of_small_groups_fills_all_parts():
    parts = stratified_split([i // 2 for i in range(40)], (0.75, 0.25), seed=0)
    assert 6 <= len(parts[1]) <= 14
    assert Counter(len(p) for p in stratified_split(["x"] * 10, (1.0, 0.0))) == {10: 1, 0: 1}


def test_split_refuses_other_shares():
    with pytest.raises(ValueError, match="sum to 1"):
        stratified_split(["a"], (0.5, 0.4))


@pytest.mark.slow
def test_learns_and_keeps_the_best_epoch():
    networks, targets = spread_task(160, seed=0)
    unseen, true = spread_task(60, seed=1)
    predictor = make()
    batch, held_out = predictor.encoder.pack(networks), predictor.encoder.pack(unseen)
    epochs = []
    history = fit(
        predictor,
        batch[:130],
        targets[:130],
        FitSettings(epochs=25, lr=1e-3, batch_weights=800),
        validation=(batch[130:], targets[130:]),
        on_epoch=lambda epoch, h: epochs.append(epoch),
    )
    assert epochs == list(range(25)) and len(history.train_loss) == len(history.validation_loss) == 25
    assert history.kept == min(range(25), key=lambda e: (history.validation_loss[e], -e))
    values, z = predict(predictor, held_out)
    assert z.shape == (60, 32)
    explained = 1 - ((values - true) ** 2).mean() / true.var()
    assert explained > 0.8
    now = ((predictor.normalise(predict(predictor, batch[130:])[0]) - predictor.normalise(targets[130:])) ** 2).mean()
    assert now.item() == pytest.approx(min(history.validation_loss), rel=1e-3)
    assert not predictor.training
    assert history.weights_per_second > 0


def test_the_last_epoch_is_kept_if_asked():
    networks, targets = spread_task(40, seed=0)
    losses = {}
    for keep_best in (True, False):
        predictor = make()
        batch = predictor.encoder.pack(networks)
        settings = FitSettings(epochs=8, lr=1e-3, batch_weights=400, keep_best=keep_best)
        history = fit(predictor, batch, targets, settings, validation=(batch, -targets))
        now = predictor.normalise(predict(predictor, batch)[0]) - predictor.normalise(-targets)
        assert now.square().mean().item() == pytest.approx(history.validation_loss[history.kept], rel=1e-3)
        losses[keep_best] = history.kept
    assert losses[True] < losses[False] == 7


def test_same_seed_same_training():
    networks, targets = spread_task(20, seed=0)
    results = []
    for seed in (0, 0, 1):
        predictor = make()
        batch = predictor.encoder.pack(networks)
        results.append(fit(predictor, batch, targets, FitSettings(epochs=2, batch_weights=300, seed=seed)).train_loss)
    assert results[0] == results[1] != results[2]


def test_patience_ends_training():
    networks, targets = spread_task(40, seed=0)
    predictor = make()
    batch = predictor.encoder.pack(networks)
    # validation wants the opposite of what is learnt, so that it only gets worse
    settings = FitSettings(epochs=40, lr=1e-3, batch_weights=400, patience=3)
    history = fit(predictor, batch, targets, settings, validation=(batch, -targets))
    assert len(history.train_loss) == history.kept + 4 < 40


def test_batch_size_of_prediction_changes_nothing():
    networks, _ = spread_task(9, seed=0)
    predictor = make(target_transform="logit")
    batch = predictor.encoder.pack(networks)
    one, z_one = predict(predictor, batch, batch_weights=1)
    all_, z_all = predict(predictor, batch)
    torch.testing.assert_close(one, all_, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(z_one, z_all, rtol=1e-4, atol=1e-5)
    assert predict(predictor, batch[0:0])[0].shape == (0, 1)


def test_targets_must_fit():
    networks, targets = spread_task(4, seed=0)
    predictor = make()
    batch = predictor.encoder.pack(networks)
    with pytest.raises(ValueError, match=r"targets must have one row per network \(4\), got 3"):
        fit(predictor, batch, targets[:3])
    with pytest.raises(ValueError, match=r"validation targets must have one row per network \(4\), got 3"):
        fit(predictor, batch, targets, validation=(batch, targets[:3]))
    with pytest.raises(ValueError, match=r"targets must have one row per network \(0\), got 0"):
        fit(predictor, batch[0:0], targets[:0])


def test_a_loss_that_explodes_is_reported():
    networks, targets = spread_task(4, seed=0)
    predictor = make()
    with torch.no_grad():
        predictor.head[0].weight.fill_(3e38)
    with pytest.raises(ValueError, match=r"the loss became (inf|nan) in epoch 0; lower lr"):
        fit(predictor, predictor.encoder.pack(networks), targets, FitSettings(epochs=1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"batch_weights": 0}, "batch_weights must be at least 1, got 0"),
        ({"warmup": 1.0}, r"warmup must lie in \[0, 1\)"),
        ({"lr": 0.0}, "lr and clip must be above 0"),
        ({"clip": -1.0}, "lr and clip must be above 0"),
    ],
)
def test_bad_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        FitSettings(**changes)


def test_a_batch_of_modules_trains_though_it_carries_their_graph():
    predictor = make()
    modules = [torch.nn.Linear(4, 3) for _ in range(4)]
    batch = predictor.encoder.pack(modules)
    assert batch.values.requires_grad
    history = fit(predictor, batch, torch.rand(4, 1), FitSettings(epochs=2, batch_weights=40))
    assert len(history.train_loss) == 2 and all(m.weight.grad is None for m in modules)
