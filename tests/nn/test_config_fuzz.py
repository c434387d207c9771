"""Any JSON value at any key of `config.json`: the model that it describes, or one sentence that says what is wrong."""

import json
import tracemalloc

import pytest
import torch

import sne_fast
from sne_fast import SNE, Predictor
from sne_fast.nn import Preparation
from sne_fast.symmetry import trace
from sne_fast.zoo.architectures import ARCHITECTURES

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, example, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

ABOUT = {"architectures", "library_name", "sne_fast_version", "weights_sha256"}
DECIDES_NOTHING = {"library_name", "sne_fast_version"}
NEAR = [
    True, False, None, 0, 1, 2, 4, 8, 31, 32, 33, 64, -1, 2**16, 2**24, 10**9, 2**31, 2**62, 2**63, 10**30, 10**250,
    0.5, 32.0, 1e9, 1e300, "", "no", "32", "flat", "none", "tensor", "zoo", "fan_in", "isab", "mse", "logit", "given",
    "canonical", [], {}, [1], [16], [16] * 3, [10**9], [0], [True], ["a"], ["a", "a"], [["a"]], {"a": 1}, [None],
    [16] * 2000, ["SNE"], ["Predictor"], "x" * 500,
]  # fmt: skip
KEYS = st.text(max_size=8)
VALUES = st.one_of(
    st.sampled_from(NEAR),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | KEYS,
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4),
        max_leaves=8,
    ),
)
KINDS = {
    "plain": ({}, {}),
    "isab": ({"set_attention": "isab", "num_inducing": 4}, {"target_transform": "logit"}),
    "zoo": ({"scale": "none"}, {"normalise_inputs": "zoo"}),
    "canonical": ({}, {"preparation": "vit"}),
}


def networks():
    torch.manual_seed(0)
    return [torch.nn.Linear(4, 3), torch.nn.Linear(5, 2)]


@pytest.fixture(scope="module", params=KINDS)
def saved(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "model"
    encoder, options = KINDS[request.param]
    torch.manual_seed(1)
    if options.get("preparation") == "vit":
        symmetry = trace(ARCHITECTURES["vit"](), torch.randn(2, 1, 8, 8))
        options = {"preparation": Preparation(units="canonical", jitter=0.5, symmetries=(symmetry,))}
    predictor = Predictor(
        SNE(**{"hidden_dim": 32, "chunk_size": 8, **encoder}), 2, (16,), target_names=["a", "b"], **options
    )
    predictor.save_pretrained(folder)
    return folder, json.loads((folder / "config.json").read_text())


def places(config):
    nested = [(group, key) for group in ("encoder", "preparation") for key in config[group]]
    return [(key,) for key in config] + nested


def changed(config, place, value):
    config = json.loads(json.dumps(config))
    inner = config
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    return config


def at(config, place):
    for key in place:
        config = config[key]
    return config


def check(folder, config, place, value):
    (folder / "config.json").write_text(json.dumps(changed(config, place, value)))
    key = place[-1]
    try:
        loaded = Predictor.from_pretrained(folder)
    except ValueError as error:
        text = str(error)
        assert "\n" not in text and len(text) < 1500, text
        assert text.startswith("from_pretrained: "), text
        named = key in text or "model.safetensors of" in text  # widths are told from the shapes of the file's tensors
        assert named or (key == "architectures" and ("expected Predictor" in text or "must be an SNE" in text)), text
        assert key not in DECIDES_NOTHING, text
    else:
        with torch.no_grad():
            assert loaded(networks()).isfinite().all()
        if key not in ABOUT:
            got, wanted = at(loaded.config, place), value
            if place == ("normalise_inputs",) and value is True:
                wanted = "zoo"
            if place[-1] == "symmetries":
                assert wanted == []
            if place[-1] == "jitter":
                wanted = float(wanted)
            if place == ("encoder",):  # a different release may have written it
                got, wanted = ({k: v for k, v in c.items() if k not in ABOUT} for c in (got, wanted))
                wanted = {**got, **wanted}
            assert got == wanted and type(got) is type(wanted)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_value_at_any_key(saved, data):
    folder, config = saved
    place = data.draw(st.sampled_from(places(config)))
    check(folder, config, place, data.draw(VALUES))


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(key=st.text(min_size=1, max_size=20), value=VALUES, inside=st.booleans())
@example(key="depth", value=3, inside=True)
@example(key="x" * 1000, value=3, inside=False)
@example(key="a\nb\x1b[31m", value=3, inside=False)
def test_any_unknown_key(saved, key, value, inside):
    folder, config = saved
    if key in config or key in config["encoder"]:
        return
    place = ("encoder", key) if inside else (key,)
    (folder / "config.json").write_text(json.dumps(changed(config, place, value)))
    with pytest.raises(ValueError, match=r"does not fit (SNE|Predictor): unknown ") as raised:
        Predictor.from_pretrained(folder)
    text = str(raised.value)
    assert (key if key.isprintable() else repr(key)[1:-1])[:50] in text and text.isprintable() and len(text) < 600


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_missing_key(saved, data):
    folder, config = saved
    place = data.draw(st.sampled_from(places(config)))
    less = json.loads(json.dumps(config))
    del at(less, place[:-1])[place[-1]]
    (folder / "config.json").write_text(json.dumps(less))
    if place[0] == "preparation" and len(place) > 1:
        with pytest.raises(ValueError, match=rf"preparation: missing {place[-1]}"):
            Predictor.from_pretrained(folder)
        return
    optional = ABOUT - {"architectures"} | set(Predictor.older_values) | set(SNE.older_values)
    if place[-1] in optional:
        with torch.no_grad():
            assert Predictor.from_pretrained(folder)(networks()).isfinite().all()
    else:
        with pytest.raises(ValueError, match=rf"missing .*{place[-1]}|names no class|must be an SNE"):
            Predictor.from_pretrained(folder)


def inner_places(content, place=()):
    yield place
    pairs = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, inner in pairs:
        yield from inner_places(inner, (*place, key))


@pytest.mark.parametrize("saved", ["canonical"], indirect=True)
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_value_anywhere_in_a_stored_symmetry(saved, data):
    """A symmetry that was tampered with is refused, or one that permutes no more than the tensors it names."""
    folder, config = saved
    start = ("preparation", "symmetries")
    found = list(inner_places(config["preparation"]["symmetries"], start))
    place = data.draw(st.sampled_from(found))
    (folder / "config.json").write_text(json.dumps(changed(config, place, data.draw(VALUES))))
    try:
        loaded = Predictor.from_pretrained(folder)
        with torch.no_grad():
            assert loaded([ARCHITECTURES["vit"]()]).isfinite().all()
    except ValueError as error:
        text = str(error)
        assert "\n" not in text and len(text) < 1500, text
        assert "symmetries" in text or "model.safetensors of" in text, text


def test_huge_sizes_cost_no_memory(saved):
    folder, config = saved
    for place, value, message in (
        (("encoder", "hidden_dim"), 10**9, "hidden_dim must be at most 16777216, got 1000000000"),
        (("encoder", "hidden_dim"), 2**24, r"type_embedding\.weight must be \(64, 16777216\), got \(64, 32\)"),
        (("encoder", "chunk_size"), 10**9, "chunk_size must be at most 65536, got 1000000000"),
        (("hidden_features",), [2**24, 2**24], r"head\.0\.weight must be \(16777216, 32\)|missing head"),
        (("hidden_features",), [16] * 10**5, "hidden_features must be a list of at most 1000 integers"),
        (("out_features",), 2**24, r"target_names must hold 16777216 name\(s\), one for each of out_features"),
    ):
        (folder / "config.json").write_text(json.dumps(changed(config, place, value)))
        tracemalloc.start()
        with pytest.raises(ValueError, match=message):
            Predictor.from_pretrained(folder)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 128 * 2**20


@pytest.mark.parametrize("key", ["layer_norm", "element_order", "chunk_order"])
@pytest.mark.parametrize("value", ["no", "false", 0, 1, None, []])
def test_switches_are_booleans(key, value):
    with pytest.raises(ValueError, match=rf"SNE: {key} must be True or False, got"):
        sne_fast.SNE(hidden_dim=32, **{key: value})
