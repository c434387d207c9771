"""Modules made on the meta device and filled from a state_dict: nothing that counts may live outside of it."""

import copy

import pytest
import torch

import sne_fast
from sne_fast import SNE, Predictor

ENCODERS = {
    "default": {},
    "isab": {"set_attention": "isab", "num_inducing": 4},
    "no layer norm": {"layer_norm": False},
    "no order": {"element_order": False, "chunk_order": False},
    "unscaled kernels": {"scale": "none", "chunking": "kernel", "chunk_size": 5},
    "neurons": {"chunking": "neuron", "num_heads": 1, "hidden_dim": 16},
}
PREDICTORS = {
    "plain": ({}, {}),
    "logit": ({}, {"target_transform": "logit", "out_features": 2}),
    "cross-entropy": ({}, {"loss": "cross_entropy", "out_features": 3, "hidden_features": ()}),
    "bce": ({}, {"loss": "bce"}),
    "zoo": ({"scale": "none"}, {"normalise_inputs": "zoo"}),
    "fan-in": ({"scale": "none"}, {"normalise_inputs": "fan_in"}),
}


def networks():
    torch.manual_seed(0)
    return [
        torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.LayerNorm(6), torch.nn.Linear(6, 3)),
        torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3), torch.nn.BatchNorm2d(3), torch.nn.ReLU()),
        torch.nn.Embedding(7, 5),
    ]


def make_encoder(options):
    return SNE(**{"hidden_dim": 32, "chunk_size": 8, **options})


def make_predictor(encoder, options):
    return Predictor(make_encoder(encoder), **{"hidden_features": (16,), **options})


def varied(module):
    """Give every parameter and buffer a value that no constructor would give it."""
    torch.manual_seed(3)
    with torch.no_grad():
        for tensor in module.state_dict().values():
            tensor.copy_(torch.rand(tensor.shape) * 0.04 + 0.01)
    return module.eval()


def check(make, assign):
    with torch.no_grad():
        module = varied(make())
        wanted = module(networks())
        assert wanted.isfinite().all()
        with torch.device("meta"):
            other = make()
        if not assign:
            other.to_empty(device="cpu")
            garbage = [*other.parameters(), *other.buffers()]
            for tensor in garbage:
                tensor.fill_(float("nan") if tensor.is_floating_point() else 77)
        other.load_state_dict(copy.deepcopy(module.state_dict()), assign=assign)
        assert torch.equal(other.eval()(networks()), wanted)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("name", ENCODERS)
def test_encoders_are_whole_after_loading(name, assign):
    check(lambda: make_encoder(ENCODERS[name]), assign)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("name", PREDICTORS)
def test_predictors_are_whole_after_loading(name, assign):
    encoder, options = PREDICTORS[name]
    check(lambda: make_predictor(encoder, options), assign)


@pytest.mark.parametrize("name", PREDICTORS)
def test_no_tensor_is_kept_outside_the_state_dict(name):
    """Recomputed constants are Python's numbers: a tensor that is no parameter or buffer stays on the old device."""
    predictor = make_predictor(*PREDICTORS[name])
    saved = predictor.state_dict()
    for path, module in predictor.named_modules():
        assert not module._non_persistent_buffers_set, path
        kept = [key for key, value in vars(module).items() if isinstance(value, torch.Tensor)]
        assert not kept, (path, kept)
    assert len(saved) == len([*predictor.parameters(), *predictor.buffers()])


def test_blocks_are_whole_after_loading():
    for make in (
        lambda: sne_fast.MAB(8, 8, 16, 2),
        lambda: sne_fast.PMA(16, 2, 1),
        lambda: sne_fast.SAB(8, 16, 2),
        lambda: sne_fast.ISAB(8, 16, 2, 3),
    ):
        module = varied(make())
        with torch.device("meta"):
            other = make()
        other.to_empty(device="cpu")
        other.load_state_dict(module.state_dict())
        x, ptr = torch.rand(4, 16 if isinstance(module, sne_fast.PMA) else 8), torch.tensor([0, 3, 4])
        inputs = (x, x, ptr, ptr) if isinstance(module, sne_fast.MAB) else (x, ptr)
        assert torch.equal(other(*inputs), module(*inputs))
