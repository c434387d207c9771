"""Layer statistics against those of the weights themselves, in all choices and places."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import sne_fast
from sne_fast.data.tensor_statistics import COLUMNS
from sne_fast.nn.input_scales import FanInScale
from sne_fast.zoo.statistics import QUANTILES, layer_statistics


def networks() -> list[torch.nn.Module]:
    torch.manual_seed(0)
    deep = torch.nn.Sequential(
        torch.nn.Conv2d(2, 4, 3),
        torch.nn.BatchNorm2d(4),
        torch.nn.Flatten(),
        torch.nn.Linear(16, 5),
        torch.nn.Linear(5, 3),
    )
    lstm = torch.nn.Sequential(torch.nn.Embedding(7, 6), torch.nn.LSTM(6, 4))
    return [deep, torch.nn.Linear(3, 2), lstm]


def plain(batch: sne_fast.WeightBatch, layers: int) -> np.ndarray:
    """Compute the plain statistics tensor by tensor."""
    rows = []
    values = (batch.values * batch.tensor_scale.repeat_interleave(sizes(batch))).double().split(sizes(batch).tolist())
    for b in range(len(batch)):
        table, weights = np.full((layers + 2, 5, 7), np.nan), []
        first, last = batch.network_ptr_host[b : b + 2].tolist()
        for layer in range(first, last):
            for s in range(*batch.layer_ptr_host[layer : layer + 2].tolist()):
                x, role = values[s].numpy(), int(batch.tensor_type[s]) % 8
                numbers = [x.mean(), x.var(), *np.quantile(x, QUANTILES)]
                if role in (0, 4):
                    weights.append(numbers)
                if layer - first < layers:
                    table[layer - first, role] = numbers
                if last - layer <= 2:
                    table[layers + last - layer - 1, role] = numbers
        rows.append([*table.ravel(), *np.mean(weights, 0), *np.min(weights, 0), *np.max(weights, 0)])
    return np.array(rows)


def sizes(batch: sne_fast.WeightBatch) -> torch.Tensor:
    return batch.chunk_ptr_host[batch.tensor_ptr_host].diff()


@pytest.mark.parametrize("scale", ["tensor", "none"])
@pytest.mark.parametrize("layers", [0, 1, 4])
def test_plain_statistics_are_those_of_the_weights(scale, layers):
    batch = sne_fast.pack(networks(), scale=scale).detach()
    found = layer_statistics(batch, layers)
    np.testing.assert_allclose(found, plain(batch, layers), rtol=2e-6, atol=2e-6)
    assert found.shape == (3, 35 * (layers + 2) + 21)
    assert layer_statistics(batch).shape[1] == 35 * (4 + 2) + 21


def test_statistics_by_fan_in_are_those_of_scaled_weights():
    batch = sne_fast.pack(networks(), scale="none").detach()
    found = layer_statistics(batch, 4, "fan_in")
    np.testing.assert_allclose(found, plain(FanInScale()(batch), 4), rtol=2e-6, atol=5e-6)


def test_quantiles_that_the_tensor_statistics_clamp_are_exact():
    outlier = torch.zeros(30, 30)
    outlier[3, 4], outlier[5, 6] = 2.0, -0.1
    batch = sne_fast.pack([{"w": outlier}, {"w": torch.zeros(2, 2)}], scale="tensor")
    assert sne_fast.tensor_statistics(batch)[0, 12] == 12
    np.testing.assert_allclose(layer_statistics(batch), plain(batch, 1), rtol=2e-6, atol=1e-9)


def test_all_statistics_stand_in_the_same_places():
    batch = sne_fast.pack(networks()).detach()
    every = sne_fast.tensor_statistics(batch).double().numpy()
    found = layer_statistics(batch, 2, "all")
    assert found.shape == (3, 5 * 23 * 4 + 3 * 23)
    table = found[:, : 5 * 23 * 4].reshape(3, 4, 5, 23)
    np.testing.assert_array_equal(table[0, 0, 0], every[0])
    relative = layer_statistics(batch, 2, "relative")[:, : 5 * 19 * 4].reshape(3, 4, 5, 19)
    np.testing.assert_array_equal(relative, table[..., COLUMNS["relative"]])


def test_of_several_tensors_of_a_place_the_last_counts():
    batch = sne_fast.pack([torch.nn.LSTM(6, 4, bias=False)]).detach()
    every = sne_fast.tensor_statistics(batch).double().numpy()
    assert batch.num_layers == 1 and len(every) == 2
    found = layer_statistics(batch, 1, "all")[0]
    np.testing.assert_array_equal(found[:23], every[1])
    np.testing.assert_array_equal(found[-69:].reshape(3, 23), [every.mean(0), every.min(0), every.max(0)])


def test_an_unknown_choice_is_refused():
    with pytest.raises(ValueError, match="statistics must be one of 'plain', 'fan_in', 'all', 'relative', got 'rich'"):
        layer_statistics(sne_fast.pack(networks()), statistics="rich")
