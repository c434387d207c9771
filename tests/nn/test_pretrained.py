"""Saving and loading in the Hub's layout, and what happens when a file does not fit."""

import json
import sys
import types

import pytest
import torch
from safetensors.torch import load_file, save_file

import sne_fast
from sne_fast import SNE, Predictor


def networks():
    torch.manual_seed(0)
    return [torch.nn.Linear(4, 3), torch.nn.Linear(5, 2)]


def make_predictor():
    torch.manual_seed(1)
    predictor = Predictor(
        SNE(hidden_dim=32, num_heads=2, chunk_size=8), 2, (16,), target_names=["a", "b"], target_transform="logit"
    )
    predictor.set_targets(torch.tensor([[0.1, 0.4], [0.9, 0.5]]))
    return predictor.eval()


@pytest.fixture
def saved(tmp_path):
    predictor = make_predictor()
    predictor.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def edit_config(folder, **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for key, value in changes.items():
        config.pop(key, None) if value is None else config.update({key: value})
    path.write_text(json.dumps(config))


def test_round_trip_gives_the_same_numbers(saved):
    predictor = make_predictor()
    loaded = Predictor.from_pretrained(saved)
    assert not loaded.training
    assert torch.equal(loaded(networks()), predictor(networks()))
    assert loaded.config == predictor.config
    assert loaded.target_names == ("a", "b")


def test_layout_is_the_hubs(saved):
    assert sorted(p.name for p in saved.iterdir()) == ["config.json", "model.safetensors"]
    config = json.loads((saved / "config.json").read_text())
    assert config["architectures"] == ["Predictor"]
    assert config["library_name"] == "sne_fast"
    assert config["sne_fast_version"] == sne_fast.__version__
    assert config["hidden_features"] == [16]
    assert config["encoder"]["architectures"] == ["SNE"] and config["encoder"]["chunk_size"] == 8
    assert set(load_file(saved / "model.safetensors")) == set(make_predictor().state_dict())


def test_encoder_alone(tmp_path):
    torch.manual_seed(0)
    encoder = SNE(hidden_dim=32, set_attention="isab", num_inducing=4).double()
    encoder.save_pretrained(str(tmp_path / "deep" / "er"))
    loaded = SNE.from_pretrained(str(tmp_path / "deep" / "er"))
    assert loaded.type_embedding.weight.dtype == torch.float64
    assert torch.equal(loaded(networks()), encoder.eval()(networks()))


def test_saving_again_replaces_and_keeps_other_files(saved):
    (saved / "README.md").write_text("mine")
    predictor = make_predictor()
    with torch.no_grad():
        predictor.head[0].weight.zero_()
    predictor.save_pretrained(saved)
    assert sorted(p.name for p in saved.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert torch.equal(Predictor.from_pretrained(saved).head[0].weight, predictor.head[0].weight)


def test_a_failed_save_leaves_what_was_there(saved, monkeypatch):
    before = {p.name: p.read_bytes() for p in saved.iterdir()}

    def full(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr("pathlib.Path.write_text", full)
    other = make_predictor()
    with torch.no_grad():
        other.head[0].weight.zero_()
    with pytest.raises(OSError, match="No space left"):
        other.save_pretrained(saved)
    with pytest.raises(OSError, match="No space left"):
        other.save_pretrained(saved.parent / "new")
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before
    assert [p.name for p in saved.parent.iterdir()] == ["model"]


def test_save_refuses_a_file_and_what_json_cannot_hold(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="is a file; give a folder"):
        make_predictor().save_pretrained(tmp_path / "file")
    predictor = make_predictor()
    predictor.target_names = (object(), "b")
    with pytest.raises(ValueError, match="config of Predictor is not JSON"):
        predictor.save_pretrained(tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_missing_files(tmp_path, saved):
    with pytest.raises(FileNotFoundError, match=r"neither a folder nor a repository id"):
        SNE.from_pretrained(tmp_path / "nothing here")
    with pytest.raises(FileNotFoundError, match=r"neither a folder nor a repository id"):
        SNE.from_pretrained(saved / "config.json")
    (saved / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no model\.safetensors"):
        Predictor.from_pretrained(saved)
    (saved / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no config\.json"):
        Predictor.from_pretrained(saved)


def test_wrong_class(saved):
    with pytest.raises(ValueError, match="holds a Predictor, expected SNE"):
        SNE.from_pretrained(saved)
    edit_config(saved, architectures=None)
    with pytest.raises(ValueError, match="names no class, expected Predictor"):
        Predictor.from_pretrained(saved)


def test_unknown_and_missing_keys(saved):
    edit_config(saved, depth=3, out_features=None)
    with pytest.raises(ValueError, match=r"does not fit Predictor: unknown depth; missing out_features"):
        Predictor.from_pretrained(saved)


def test_keys_of_the_encoder_are_checked_too(saved):
    config = json.loads((saved / "config.json").read_text())
    del config["encoder"]["num_heads"]  # would load, silently, as another function
    edit_config(saved, encoder=config["encoder"])
    with pytest.raises(ValueError, match="does not fit SNE: missing num_heads"):
        Predictor.from_pretrained(saved)
    edit_config(saved, encoder="SNE")
    with pytest.raises(ValueError, match=r"encoder in config.json must be an object"):
        Predictor.from_pretrained(saved)


def test_a_configuration_from_before_orders_means_the_order_of_definition(saved):
    config = json.loads((saved / "config.json").read_text())
    assert config["encoder"].pop("order") == "names"
    edit_config(saved, encoder=config["encoder"])
    encoder = Predictor.from_pretrained(saved).encoder
    assert encoder.config["order"] == "definition"
    backwards = {"b.weight": torch.ones(2, 2), "a.weight": torch.zeros(2, 2)}
    assert encoder.pack([backwards]).names[0][1] == ("b.weight", "a.weight")


def test_values_of_the_wrong_type(saved):
    edit_config(saved, hidden_features=7)
    with pytest.raises(ValueError, match=r"config\.json of .* does not fit Predictor"):
        Predictor.from_pretrained(saved)


@pytest.mark.parametrize("text", ["{", "[1]", ""])
def test_broken_config(saved, text):
    (saved / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"not valid JSON|must hold a JSON object"):
        Predictor.from_pretrained(saved)


def test_tensors_that_do_not_fit(saved):
    tensors = load_file(saved / "model.safetensors")
    del tensors["head.0.bias"]
    tensors["head.9.bias"] = torch.zeros(3)
    tensors["head.0.weight"] = torch.zeros(16, 31)
    save_file(tensors, saved / "model.safetensors")
    message = r"missing head\.0\.bias; unknown head\.9\.bias; head\.0\.weight must be \(16, 32\), got \(16, 31\)"
    with pytest.raises(ValueError, match=message):
        Predictor.from_pretrained(saved)
    save_file({"x": torch.zeros(1)}, saved / "model.safetensors")
    with pytest.raises(ValueError, match=r"and \d+ more"):
        Predictor.from_pretrained(saved)


def test_truncated_weights(saved):
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        Predictor.from_pretrained(saved)


def fake_hub(monkeypatch, **functions):
    module = types.ModuleType("huggingface_hub")
    for name, function in functions.items():
        setattr(module, name, function)
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)


def test_repository_goes_through_the_hub_client(saved, monkeypatch):
    asked = []

    def hf_hub_download(repo_id, filename, **options):
        asked.append((repo_id, filename, options["revision"], options["token"], options["local_files_only"]))
        return str(saved / filename)

    fake_hub(monkeypatch, hf_hub_download=hf_hub_download)
    loaded = Predictor.from_pretrained("user/name", revision="v1", token="t", local_files_only=True)
    assert torch.equal(loaded(networks()), make_predictor()(networks()))
    assert asked == [("user/name", f, "v1", "t", True) for f in ("config.json", "model.safetensors")]


def test_options_are_those_of_the_real_client():
    import inspect

    huggingface_hub = pytest.importorskip("huggingface_hub")
    known = inspect.signature(huggingface_hub.hf_hub_download).parameters
    assert {"revision", "cache_dir", "force_download", "token", "local_files_only"} <= set(known)


def test_hub_missing_or_out_of_reach(monkeypatch, tmp_path):
    def down(*args, **kwargs):
        raise ConnectionError("no route to host\nsecond line")

    fake_hub(monkeypatch, hf_hub_download=down)
    with pytest.raises(OSError, match=r"config.json could not be read from the Hub: no route to host$"):
        SNE.from_pretrained("user/name")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ModuleNotFoundError, match=r'needs huggingface_hub: pip install "sne_fast\[hub\]"'):
        SNE.from_pretrained("user/name")
    with pytest.raises(ModuleNotFoundError, match="uploading to 'user/name' needs huggingface_hub"):
        make_predictor().push_to_hub("user/name")


def test_the_real_client_offline(monkeypatch, tmp_path):
    pytest.importorskip("huggingface_hub")
    with pytest.raises(OSError, match="could not be read from the Hub"):
        SNE.from_pretrained("user/name", local_files_only=True, cache_dir=tmp_path)


def test_local_folders_need_no_hub(saved, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    Predictor.from_pretrained(saved)


def test_push_uploads_the_folder(monkeypatch):
    pushed = {}

    class HfApi:
        def __init__(self, token=None):
            pushed["token"] = token

        def create_repo(self, repo_id, private, exist_ok):
            assert exist_ok
            return types.SimpleNamespace(repo_id=f"me/{repo_id}")

        def upload_folder(self, repo_id, folder_path, commit_message):
            import os

            pushed.update(repo=repo_id, files=sorted(os.listdir(folder_path)), message=commit_message)
            return "https://commit"

    fake_hub(monkeypatch, HfApi=HfApi)
    assert make_predictor().push_to_hub("name", token="t") == "https://commit"
    assert pushed == {
        "token": "t",
        "repo": "me/name",
        "files": ["config.json", "model.safetensors"],
        "message": "Push Predictor using sne_fast",
    }
