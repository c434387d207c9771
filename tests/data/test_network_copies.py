"""pack: moving averages beside a network are left out, and two copies of a network are refused."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from sne_fast import WeightBatch, pack


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def under(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor + 1 for name, tensor in state.items()}


def packed(state: object) -> WeightBatch:
    return pack([state], scale="none")


@pytest.mark.parametrize("plain", ["", "model.", "module.", "net.encoder."])
@pytest.mark.parametrize("average", ["model_ema.", "ema.", "ema.module.", "ema_model.", "module_ema.", "shadow."])
def test_moving_averages_of_the_same_weights_are_left_out(plain: str, average: str) -> None:
    state = {plain + name: tensor for name, tensor in net().state_dict().items()}
    inner = state if plain == "net.encoder." else net().state_dict()
    averages = under(average, inner) | {f"{average}decay": torch.tensor(0.9), f"{average}num_updates": torch.tensor(3)}
    batch, want = packed(state | averages), packed(state)
    assert batch.num_weights == want.num_weights and torch.equal(batch.values, want.values)
    assert batch.names[0][1] == want.names[0][1]
    left_out = dict(batch.skipped[0])
    assert averages.keys() <= left_out.keys()
    reason = left_out[next(iter(averages))]
    assert reason.startswith("EMA copy") and "--key" in reason
    assert packed(averages).num_weights == want.num_weights


def test_averages_by_a_word_of_a_part_or_of_the_tensors_own_name() -> None:
    state = under("generator.", net().state_dict())
    for averages in (under("generator_ema.", net().state_dict()), under("ema_generator.", net().state_dict())):
        assert packed(state | averages).num_weights == packed(state).num_weights
    own = {f"{name}_ema": tensor for name, tensor in state.items() if tensor.is_floating_point()}
    assert packed(state | own).names[0][1] == packed(state).names[0][1]


def test_averages_whose_names_lost_their_dots() -> None:
    """Latent diffusion stores them so."""
    state = under("model.diffusion_model.", net().state_dict())
    averages = {f"model_ema.{name.removeprefix('model.').replace('.', '')}": t for name, t in state.items()}
    assert packed(state | averages).num_weights == packed(state).num_weights


def test_averages_as_a_list_in_the_order_of_the_parameters() -> None:
    network = net()
    shadow = {"shadow_params": [p.detach() + 1 for p in network.parameters()]}
    batch = packed(dict(network.state_dict()) | shadow)
    assert batch.num_weights == packed(network).num_weights
    assert sum(name.startswith("shadow_params.") for name, _ in batch.skipped[0]) == 6
    shadow["shadow_params"].reverse()
    with pytest.raises(ValueError, match=r"moving averages under 'shadow_params' .* no copy of its other tensors"):
        pack([dict(network.state_dict()) | shadow])


def test_averages_that_are_no_copy_are_refused() -> None:
    state = net().state_dict()
    averages = under("model_ema.", state)
    averages["model_ema.2.weight"] = torch.ones(5, 5)
    with pytest.raises(
        ValueError, match=r"network 0 \('state_dict'\) holds moving averages under 'model_ema' .*'model_ema.2.weight'"
    ):
        pack([state | averages])


def test_modules_that_are_called_ema_and_average_nothing_are_weights() -> None:
    state = net().state_dict() | {"3.ema.conv.weight": torch.ones(2, 2), "3.ema.gain": torch.ones(2)}
    assert packed(state).num_weights == packed(net()).num_weights + 6


class Averaged(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = net()
        self.model_ema = copy.deepcopy(self.model).requires_grad_(False)


def test_modules_and_their_state_dicts_leave_out_the_same_averages() -> None:
    network = Averaged()
    module, state = packed(network), packed(network.state_dict())
    assert module.names[0][1] == state.names[0][1] and torch.equal(module.values, state.values)
    assert module.num_weights == packed(net()).num_weights
    alone = torch.optim.swa_utils.AveragedModel(net())
    assert packed(alone).num_weights == packed(alone.state_dict()).num_weights == packed(net()).num_weights


PAIRS = [
    ("student", "teacher"), ("online", "target"), ("online_encoder", "target_encoder"), ("encoder_q", "encoder_k"),
    ("backbone", "backbone_momentum"), ("base_encoder", "momentum_encoder"), ("q_net", "q_net_target"),
    ("actor", "actor_target"), ("visual_encoder", "visual_encoder_m"),
]  # fmt: skip


@pytest.mark.parametrize(("first", "second"), PAIRS)
@pytest.mark.parametrize("wrapper", ["", "module."])
def test_two_copies_of_a_network_are_refused(first: str, second: str, wrapper: str) -> None:
    state = under(f"{wrapper}{first}.", net().state_dict()) | under(f"{wrapper}{second}.", net().state_dict())
    with pytest.raises(ValueError, match=rf"holds two copies of a network, '{first}' and '{second}'; .*--key"):
        pack([state])
    network = nn.ModuleDict({first: net(), second: net()})
    with pytest.raises(ValueError, match=rf"network 0 \('ModuleDict'\) holds two copies of a network, '{first}'"):
        pack([network])


def test_networks_that_only_look_alike_are_no_copies() -> None:
    two = nn.ModuleDict({"left": net(), "right": net()})  # siamese
    pair = nn.ModuleDict({"student": net(), "teacher": nn.Linear(3, 4)})  # of another architecture
    shared = nn.ModuleDict({"student": net()})
    shared["teacher"] = shared["student"]
    for network in (two, pair, shared):
        assert packed(network).num_weights == packed(network.state_dict()).num_weights
    assert packed(two).num_weights == 2 * packed(net()).num_weights
