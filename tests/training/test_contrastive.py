"""The contrastive objective: its loss by a loop, gradients in pieces, relatives, labels, and that it learns."""

import copy
import math
from itertools import groupby

import pytest
import torch
import torch.nn.functional as F

import sne_fast
from sne_fast.training import FitSettings
from sne_fast.training.contrastive import (
    Contrastive,
    ContrastiveModel,
    encode_in_pieces,
    info_nce,
    linear_probe,
)
from sne_fast.training.contrastive_fit import ClusteredNetworks, fit_contrastive
from sne_fast.training.views import Views


def networks(count, seed=0):
    torch.manual_seed(seed)
    return [
        torch.nn.Sequential(torch.nn.Linear(6, 5 + i % 3), torch.nn.ReLU(), torch.nn.Linear(5 + i % 3, 3))
        for i in range(count)
    ]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def unit(n, d, seed):
    return F.normalize(torch.randn(n, d, generator=generator(seed), dtype=torch.float64), dim=1)


def test_info_nce_by_a_loop():
    a, b, t = unit(5, 7, 0), unit(5, 7, 1), 0.2
    group = torch.tensor([0, 1, 0, 2, 1])
    alike = group[:, None] == group
    for weight in (0.0, 0.5):
        wanted = []
        for i in range(5):
            loss = 0
            for one, other in ((a, b), (b, a)):
                logits = {j: one[i] @ other[j] / t for j in range(5) if weight or j == i or not alike[i, j]}
                total = torch.logsumexp(torch.stack(list(logits.values())), 0)
                positives = {j: 1.0 if j == i else weight for j in range(5) if alike[i, j]}
                loss += sum(w * (total - logits[j]) for j, w in positives.items() if w) / sum(positives.values()) / 2
            wanted.append(loss)
        torch.testing.assert_close(info_nce(a, b, t, alike, weight), torch.stack(wanted))
    plain = info_nce(a, b, t)
    torch.testing.assert_close(plain, info_nce(a, b, t, torch.eye(5, dtype=torch.bool)))


@pytest.mark.parametrize("max_chunks", [None, 2])
def test_gradients_in_pieces_are_those_of_the_whole_batch(max_chunks):
    torch.manual_seed(0)
    batch = sne_fast.pack(networks(9), chunk_size=8).detach().to(dtype=torch.float64)
    model = ContrastiveModel(sne_fast.SNE(hidden_dim=32, chunk_size=8, statistics="relative")).double()
    found = []
    for at_once in (None, 150, 1):
        objective = Contrastive(model, Views(), weights_at_once=at_once, max_chunks=max_chunks)
        model.zero_grad()
        total, shown = objective(batch, range(9), generator(), model.encoder)
        total.backward()
        found.append((shown.detach(), [p.grad.clone() for p in model.parameters()]))
    for shown, gradients in found[1:]:
        torch.testing.assert_close(shown, found[0][0])
        for one, other in zip(gradients, found[0][1], strict=True):
            torch.testing.assert_close(one, other, atol=1e-10, rtol=1e-7)
    with torch.no_grad():
        torch.testing.assert_close(encode_in_pieces(model.encoder, batch, 100), model.encoder(batch))


def test_each_piece_is_encoded_once_without_and_once_with_what_its_gradient_needs():
    batch = sne_fast.pack(networks(6)).detach()
    weight = torch.nn.Parameter(torch.ones(()))
    saved = []

    def encode(piece):
        x = torch.ones(len(piece), 2) * weight
        saved.append(x)
        return x.exp()

    z = encode_in_pieces(encode, batch, 1)
    assert len(saved) == 6
    z.sum().backward()
    assert len(saved) == 12
    torch.testing.assert_close(weight.grad, 12 * torch.ones(()).exp())


def test_labels_train_heads_and_unknown_ones_do_nothing():
    torch.manual_seed(0)
    batch = sne_fast.pack(networks(6)).detach()
    model = ContrastiveModel(sne_fast.SNE(hidden_dim=32), labels={"kind": 3, "number": 1})
    labels = {"kind": torch.tensor([0, 1, 2, -1, -1, -1]), "number": torch.tensor([torch.nan] * 5 + [0.3])}
    objective = Contrastive(model, Views(), labels=labels)
    total, shown = objective(batch, range(6), generator(), model.encoder)
    total.backward()
    assert total > shown.sum() and model.heads["number"].weight.grad.abs().sum() > 0
    model.zero_grad()
    total, shown = objective(batch[[3, 4]], [3, 4], generator(), model.encoder)
    assert torch.equal(total, shown.sum())
    with pytest.raises(ValueError, match=r"labels must be \['kind', 'number'\] as the heads, got \['kind'\]"):
        Contrastive(model, Views(), labels={"kind": labels["kind"]})


def test_fit_contrastive_resumes_bit_for_bit(tmp_path):
    torch.manual_seed(0)
    start = ContrastiveModel(sne_fast.SNE(hidden_dim=32, statistics="relative"))
    batch, held = (sne_fast.pack(networks(n, seed)).detach() for n, seed in ((20, 1), (8, 2)))
    settings = FitSettings(epochs=2, batch_weights=400, lr=2e-3)
    clusters = [i % 3 for i in range(20)]

    class Stop(Exception):
        pass

    def stop(epoch, history):
        raise Stop

    def run(model, **options):
        objective = Contrastive(model, Views(), weights_at_once=200, max_chunks=4)
        watched = held, Contrastive(model, Views())
        return fit_contrastive(
            model, batch, objective, settings, clusters=clusters, validation=watched, **options
        )  # fmt: skip

    whole = copy.deepcopy(start)
    history = run(whole)
    assert len(history.train_loss) == len(history.validation_loss) == 2
    assert not whole.training
    parts = copy.deepcopy(start)
    with pytest.raises(Stop):
        run(parts, checkpoint=tmp_path / "fit.pt", on_epoch=stop)
    resumed = copy.deepcopy(start)
    again = run(resumed, checkpoint=tmp_path / "fit.pt")
    assert all(torch.equal(one, other) for one, other in zip(resumed.parameters(), whole.parameters(), strict=True))
    assert again.train_loss == history.train_loss and again.validation_loss == history.validation_loss
    other = copy.deepcopy(start)
    with pytest.raises(ValueError, match="temperature"):
        fit_contrastive(
            other, batch, Contrastive(other, Views(), temperature=0.2), settings, clusters=clusters,
            checkpoint=tmp_path / "fit.pt",
        )  # fmt: skip
    with pytest.raises(ValueError, match="validation networks"):
        validated = held[:4], Contrastive(other, Views())
        fit_contrastive(
            other, batch, Contrastive(other, Views(), weights_at_once=200, max_chunks=4), settings, clusters=clusters,
            validation=validated, checkpoint=tmp_path / "fit.pt",
        )  # fmt: skip
    with pytest.raises(ValueError, match=r"clusters must be one per network \(20\), got 1"):
        fit_contrastive(other, batch, Contrastive(other, Views()), settings, clusters=[0])


def test_encoders_train_under_autocast_and_losses_are_of_full_precision():
    torch.manual_seed(0)
    start = ContrastiveModel(sne_fast.SNE(hidden_dim=32, statistics="relative"))
    batch = sne_fast.pack(networks(12)).detach()
    found = []
    for amp in (None, "bfloat16", "float16"):
        model, dtypes = copy.deepcopy(start), []
        model.projection.register_forward_hook(lambda _, inputs, output, seen=dtypes: seen.append(output.dtype))
        settings = FitSettings(epochs=1, lr=1e-3, batch_weights=400, amp=amp, accumulate=2)
        objective = Contrastive(model, Views(), weights_at_once=200)
        history = fit_contrastive(model, batch, objective, settings, validation=(batch, objective))
        assert set(dtypes) == {torch.float32}
        found.append((*history.train_loss, *history.validation_loss))
    assert len(set(found)) == 3
    for losses in found[1:]:
        assert losses == pytest.approx(found[0], rel=0.1)
    with pytest.raises(ValueError, match=r"invariance must be 0, got 0\.5"):
        fit_contrastive(start, batch, Contrastive(start, Views()), FitSettings(invariance=0.5))


def test_clusters_stand_together():
    batch = sne_fast.pack(networks(40)).detach()
    clusters = [i % 2 for i in range(40)]
    order = ClusteredNetworks(batch, clusters).order(generator())
    assert sorted(order) == list(range(40))
    runs = [(key, len(list(run))) for key, run in groupby(clusters[i] for i in order)]
    assert sum(length for _, length in runs) == 40 and max(length for _, length in runs) >= 16
    assert order != ClusteredNetworks(batch, clusters).order(generator(1))


def test_linear_probe_reads_what_is_linear():
    z = torch.randn(200, 5, generator=generator())
    train = torch.arange(200) < 150
    number = z @ torch.arange(5.0) + 3
    assert linear_probe(z, number, train) > 0.999
    number[0], number[-1] = torch.nan, torch.nan
    assert linear_probe(z, number, train) > 0.999
    assert linear_probe(z, torch.randn(200, generator=generator(1)), train) < 0.2
    assert math.isnan(linear_probe(z, torch.ones(200), train))
    kinds = (z[:, 0] > 0).long()
    assert linear_probe(z, kinds, train) > 0.9
    assert linear_probe(z, torch.full((200,), -1), train) != linear_probe(z, torch.full((200,), -1), train)  # NaN


def test_training_finds_noisy_copies_of_networks_never_seen():
    torch.manual_seed(0)
    model = ContrastiveModel(sne_fast.SNE(hidden_dim=32, statistics="relative"))
    batch, held = (sne_fast.pack(networks(n, seed)).detach() for n, seed in ((48, 1), (40, 2)))
    model.encoder.set_statistics(batch)
    views = Views(permute=0, noise=1, noise_size=0.4, prune=0, round=0, head=0)
    objective = Contrastive(model, views)
    optimiser = torch.optim.AdamW(model.parameters(), 2e-3)

    def loss():
        with torch.no_grad():
            return float(objective(held, range(40), generator(7), model.encoder)[1].mean())

    before = loss()
    for step in range(25):
        optimiser.zero_grad()
        total, _ = objective(batch, range(48), generator(step), model.encoder)
        (total / 48).backward()
        optimiser.step()
    assert loss() < 0.7 * before
