"""Saving and loading in the Hub's layout, and what happens when a file does not fit."""

import json
import resource
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.nn.utils.prune
from safetensors.torch import load_file, save_file

import sne_fast
from sne_fast import SNE, Predictor
from sne_fast.data.checkpoints import CheckpointError


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
    with pytest.raises(ValueError, match=r"encoder must be an object"):
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


# What is saved


def encoded(module):
    with torch.no_grad():
        return module.eval()(networks())


def wrap_encoder(predictor, wrap):
    predictor.encoder = wrap(predictor.encoder)
    return predictor


def compiled(module):
    return torch.compile(module, backend="eager")


@pytest.mark.parametrize("wrap", [compiled, torch.nn.DataParallel, lambda m: torch.nn.DataParallel(compiled(m))])
def test_a_wrapped_encoder_is_saved_without_its_wrapper(tmp_path, wrap):
    wrap_encoder(make_predictor(), wrap).save_pretrained(tmp_path / "m")
    loaded = Predictor.from_pretrained(tmp_path / "m")
    assert type(loaded.encoder) is SNE and torch.equal(encoded(loaded), encoded(make_predictor()))


def test_a_predictor_takes_a_wrapped_encoder(tmp_path):
    torch.manual_seed(1)
    encoder = SNE(hidden_dim=32, scale="none")
    predictor = Predictor(compiled(encoder), hidden_features=(8,), normalise_inputs="fan_in")
    predictor.save_pretrained(tmp_path / "m")
    loaded = Predictor.from_pretrained(tmp_path / "m")
    plain = Predictor(encoder, hidden_features=(8,), normalise_inputs="fan_in")
    plain.head = predictor.head
    assert torch.equal(encoded(loaded), encoded(plain))
    with pytest.raises(TypeError, match=r"encoder must be an sne_fast\.SNE, got Linear"):
        Predictor(torch.nn.Linear(3, 3))


def test_a_compiled_model_and_compiled_parts_are_saved_plain(tmp_path):
    compiled(make_predictor()).save_pretrained(tmp_path / "whole")
    predictor = make_predictor()
    predictor.encoder.tensor_encoder = compiled(predictor.encoder.tensor_encoder)
    predictor.head[0] = compiled(predictor.head[0])
    predictor.save_pretrained(tmp_path / "parts")
    for name in ("whole", "parts"):
        assert torch.equal(encoded(Predictor.from_pretrained(tmp_path / name)), encoded(make_predictor()))


def test_parametrised_tensors_are_saved_as_they_are_used(tmp_path):
    predictor = make_predictor()
    torch.nn.utils.parametrizations.weight_norm(predictor.head[0])
    torch.nn.utils.parametrizations.spectral_norm(predictor.head[2])
    predictor.save_pretrained(tmp_path / "m")
    loaded = Predictor.from_pretrained(tmp_path / "m")
    assert set(loaded.state_dict()) == set(make_predictor().state_dict())
    assert torch.equal(encoded(loaded), encoded(predictor))


class Adapter(torch.nn.Module):
    """A linear layer beside a low-rank change, as adapters replace one."""

    def __init__(self, base):
        super().__init__()
        self.base_layer, self.lora_A = base, torch.nn.Linear(base.in_features, 2, bias=False)

    def forward(self, x):
        return self.base_layer(x)


class Doubled(torch.nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def replace_by_adapter(predictor):
    mab = predictor.encoder.tensor_encoder.blocks[1].mab
    mab.fc_o = Adapter(mab.fc_o)
    return "encoder.tensor_encoder.blocks.1.mab.fc_o is a Adapter, must be a Linear"


def replace_by_a_class_with_the_same_tensors(predictor):
    predictor.head[0] = Doubled(32, 16)
    return "head.0 is a Doubled, must be a Linear"


def add_a_parameter(predictor):
    predictor.encoder.extra = torch.nn.Parameter(torch.zeros(1))
    return "encoder.extra is unknown"


def add_a_module(predictor):
    predictor.head.more = torch.nn.Linear(1, 1)
    return "head.more is unknown"


def replace_by_another_width(predictor):
    predictor.head[0] = torch.nn.Linear(32, 17)
    return r"head.0.weight must be \(16, 32\), is \(17, 32\); head.0.bias must be \(16,\), is \(17,\)"


def remove_a_bias(predictor):
    predictor.head[0] = torch.nn.Linear(32, 16, bias=False)
    return "head.0.bias is missing"


def prune(predictor):
    torch.nn.utils.prune.l1_unstructured(predictor.head[0], "weight", 0.5)
    return "head.0.weight is missing; head.0.weight_orig is unknown; head.0.weight_mask is unknown"


def move_to_meta(predictor):
    predictor.encoder.type_embedding.to("meta")
    return "encoder.type_embedding.weight is on the meta device and has no values"


def change_the_config(predictor):
    predictor.out_features = "two"
    return "save_pretrained: the config of Predictor does not fit Predictor: Predictor: out_features must be an integer"


def put_a_subclass(predictor):
    class Own(SNE):
        pass

    predictor.encoder = Own(**predictor.encoder.config)
    return "encoder is a Own, must be a SNE"


@pytest.mark.parametrize(
    "change",
    [
        replace_by_adapter, replace_by_a_class_with_the_same_tensors, add_a_parameter, add_a_module,
        replace_by_another_width, remove_a_bias, prune, move_to_meta, change_the_config, put_a_subclass,
    ],
)  # fmt: skip
def test_what_could_not_be_read_back_is_refused_at_saving(tmp_path, change):
    predictor = make_predictor()
    message = change(predictor)
    with pytest.raises(ValueError, match=message):
        predictor.save_pretrained(tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_a_subclass_is_saved_and_read_by_its_own_name(tmp_path):
    make = make_predictor()

    class Named(Predictor):
        pass

    predictor = Named(make.encoder, 2, (16,))
    predictor.save_pretrained(tmp_path / "m")
    assert isinstance(Named.from_pretrained(tmp_path / "m"), Named)
    with pytest.raises(ValueError, match="holds a Named, expected Predictor"):
        Predictor.from_pretrained(tmp_path / "m")


def test_every_tensor_keeps_its_own_dtype(tmp_path):
    predictor = make_predictor()
    predictor.head.double()
    predictor.save_pretrained(tmp_path / "m")
    loaded = Predictor.from_pretrained(tmp_path / "m")
    before, after = predictor.state_dict(), loaded.state_dict()
    assert {k: t.dtype for k, t in after.items()} == {k: t.dtype for k, t in before.items()}
    assert all(torch.equal(after[key], before[key]) for key in before)


def test_loading_draws_nothing_and_trains_on(saved):
    torch.manual_seed(5)
    drawn = torch.rand(1)
    torch.manual_seed(5)
    loaded = Predictor.from_pretrained(saved)
    assert torch.equal(torch.rand(1), drawn)
    assert all(p.requires_grad for p in loaded.parameters()) and not loaded.target_mean.requires_grad
    loaded(networks()).sum().backward()


def test_loaded_weights_do_not_change_with_their_file(saved):
    loaded = Predictor.from_pretrained(saved)
    before = {key: tensor.clone() for key, tensor in loaded.state_dict().items()}
    path = saved / "model.safetensors"
    with open(path, "r+b") as file:
        size = path.stat().st_size
        file.seek(size // 2)
        file.write(b"\xff" * (size - size // 2))
    assert all(torch.equal(tensor, before[key]) for key, tensor in loaded.state_dict().items())


# Two files that belong together


def test_the_same_model_gives_the_same_bytes(tmp_path):
    predictor = make_predictor()
    for i in range(8):
        predictor.save_pretrained(tmp_path / str(i))
    for name in ("config.json", "model.safetensors"):
        assert len({(tmp_path / str(i) / name).read_bytes() for i in range(8)}) == 1


@pytest.mark.parametrize("moved", ["config.json", "model.safetensors"])
def test_files_of_two_saves_are_not_loaded_together(saved, tmp_path, moved):
    """A program killed between the two renames leaves one new file beside an old one."""
    other = make_predictor()
    with torch.no_grad():
        other.head[0].weight.zero_()
    other.save_pretrained(tmp_path / "other")
    (saved / moved).write_bytes((tmp_path / "other" / moved).read_bytes())
    with pytest.raises(ValueError, match=r"is not the file that config\.json was written with.*SHA-256"):
        Predictor.from_pretrained(saved)
    other.save_pretrained(saved)
    assert torch.equal(encoded(Predictor.from_pretrained(saved)), encoded(other))


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[3])
from test_pretrained import make_predictor
predictor = make_predictor()
predictor.head[0].weight.data.zero_()
left, move = int(sys.argv[2]), os.replace

def replace(*args):
    global left
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    left -= 1
    move(*args)

os.replace = replace
predictor.save_pretrained(sys.argv[1])
"""


@pytest.mark.parametrize("renames", [1, 2, 3])
def test_a_save_killed_on_its_way_leaves_the_old_model_or_one_that_is_refused(saved, renames):
    arguments = [str(saved), str(renames), str(Path(__file__).parent)]
    killed = subprocess.run([sys.executable, "-c", KILLED, *arguments], capture_output=True, text=True, timeout=120)
    assert killed.returncode in (-9, 0), killed.stderr
    new = make_predictor()
    with torch.no_grad():
        new.head[0].weight.zero_()
    try:
        found = encoded(Predictor.from_pretrained(saved))
    except ValueError as error:
        assert "is not the file that config.json was written with" in str(error)
    else:
        assert torch.equal(found, encoded(new if killed.returncode == 0 else make_predictor()))
    new.save_pretrained(saved)
    assert sorted(p.name for p in saved.iterdir()) == ["config.json", "model.safetensors"]
    assert torch.equal(encoded(Predictor.from_pretrained(saved)), encoded(new))


def test_a_config_without_a_digest_is_taken_as_it_is(saved):
    edit_config(saved, weights_sha256=None)
    tensors = load_file(saved / "model.safetensors")
    save_file({key: tensor + 0 for key, tensor in tensors.items()}, saved / "model.safetensors")
    assert torch.equal(encoded(Predictor.from_pretrained(saved)), encoded(make_predictor()))
    edit_config(saved, weights_sha256="abc")
    with pytest.raises(ValueError, match="weights_sha256 must be 64 hexadecimal digits, got 'abc'"):
        Predictor.from_pretrained(saved)


def test_weights_that_are_not_floating_are_refused(saved):
    edit_config(saved, weights_sha256=None)
    tensors = load_file(saved / "model.safetensors")
    tensors["head.0.bias"] = tensors["head.0.bias"].to(torch.int8)
    save_file(tensors, saved / "model.safetensors")
    with pytest.raises(ValueError, match=r"head\.0\.bias must be floating, is torch\.int8"):
        Predictor.from_pretrained(saved)


def test_a_full_disk_is_an_error_that_names_the_model_and_leaves_no_part(tmp_path):
    model = SNE(hidden_dim=32)
    model.save_pretrained(tmp_path / "model")
    before = {file: file.read_bytes() for file in (tmp_path / "model").iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        for name in ("model", "other"):
            with pytest.raises(CheckpointError, match=rf"/{name}/model.safetensors: cannot be written") as raised:
                model.save_pretrained(tmp_path / name)
            assert ".tmp" not in str(raised.value)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert {file: file.read_bytes() for file in (tmp_path / "model").iterdir()} == before


def test_modules_that_share_their_tensors_are_saved_with_one_copy_each(tmp_path: Path) -> None:
    torch.manual_seed(0)
    predictor = sne_fast.Predictor(sne_fast.SNE(hidden_dim=32), hidden_features=(8, 8)).eval()
    blocks = predictor.encoder.chunk_encoder.blocks
    blocks[1] = blocks[2]
    predictor.head[2].bias = predictor.head[0].bias
    network = torch.nn.Linear(4, 3)
    predictor.save_pretrained(tmp_path)
    loaded = sne_fast.Predictor.from_pretrained(tmp_path)
    assert torch.equal(loaded([network]), predictor([network]))


def test_a_module_with_another_setting_than_its_configuration_gives_is_refused(tmp_path: Path) -> None:
    encoder = sne_fast.SNE(hidden_dim=32)
    encoder.chunk_encoder.blocks[0].mab.ln0.eps = 0.1
    with pytest.raises(ValueError, match=r"blocks.0.mab.ln0 is set to \(32,\), eps=0.1.* must be set to .*eps=1e-05"):
        encoder.save_pretrained(tmp_path / "encoder")
    assert not (tmp_path / "encoder").exists()
