"""Checkpoints in stores elsewhere: a web server, a Hub, and stores of fsspec, read by ranges."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save, save_file

from helpers.many_networks import encoder_of, network
from helpers.web_servers import COMMIT, Hub, WebServer
from sne_fast.data.checkpoints import CheckpointError, load_state_dict, open_checkpoint
from sne_fast.data.layer_stream import LayerStream
from sne_fast.data.remote import failures
from sne_fast.data.remote.paths import forget, is_remote, place

pytest.importorskip("aiohttp")
pytest.importorskip("huggingface_hub")


def checkpoints(folder: Path) -> dict[str, bytes]:
    """Checkpoints of several formats, small ones and some that need many ranges, as files by path."""
    large = {f"layers.{i}.weight": torch.randn(300, 300 + i) for i in range(8)} | {"big.weight": torch.randn(1500, 800)}
    for name in ("one", "sharded"):
        (folder / name).mkdir(parents=True)
    save_file(network(0), folder / "small.safetensors")
    save_file(large, folder / "large.safetensors")
    torch.save(large, folder / "large.pt")
    torch.save(network(1), folder / "old.pth", _use_new_zipfile_serialization=False)
    save_file(network(2), folder / "one" / "model.safetensors")
    (folder / "one" / "config.json").write_text("{}")
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    parts = [{"a.weight": torch.ones(3, 4)}, {"b.weight": torch.zeros(5)}]
    for name, part in zip(names, parts, strict=True):
        save_file(part, folder / "sharded" / name)
    weight_map = {"a.weight": names[0], "b.weight": names[1]}
    (folder / "sharded" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


SOURCES = ("small.safetensors", "large.safetensors", "large.pt", "old.pth", "one", "sharded")


def same(url: str, file: Path) -> bool:
    got, want = load_state_dict(url), load_state_dict(file)
    return list(got) == list(want) and all(torch.equal(got[name], want[name]) for name in want)


def test_every_store_gives_what_the_same_file_on_this_machine_gives(
    web: WebServer, hub: Hub, memory: Any, tmp_path: Path
) -> None:
    files = checkpoints(tmp_path)
    web.files |= files
    hub.files |= files
    for name, content in files.items():
        memory.pipe(f"/zoo/{name}", content)
    for name in SOURCES:
        folder = (tmp_path / name).is_dir()
        assert same(f"memory://zoo/{name}", tmp_path / name)
        assert same(f"hf://user/zoo@main/{name}", tmp_path / name)
        assert same(f"{web.url}/{name}{'/' if folder else ''}", tmp_path / name)
        assert same((tmp_path / name).as_uri(), tmp_path / name)
    assert same(f"{web.url}/small.safetensors?download=true", tmp_path / "small.safetensors")
    assert same(f"{web.url}/sharded/model.safetensors.index.json", tmp_path / "sharded")
    encoder = encoder_of()
    for name in ("small.safetensors", "old.pth"):
        assert torch.equal(encoder.encode(f"{web.url}/{name}"), encoder.encode(tmp_path / name))


@pytest.mark.parametrize(
    ("name", "package"),
    [
        ("onnx_float.onnx", "onnx"), ("tf_keras.keras", "h5py"), ("tf_keras.h5", "h5py"),
        ("flax_model.msgpack", "msgpack"), ("model.tflite", "tflite"), ("large.npz", "numpy"), ("large.h5", "h5py"),
    ],
)  # fmt: skip
def test_formats_from_outside_torch_are_read_by_ranges(web: WebServer, tmp_path: Path, name: str, package: str) -> None:
    pytest.importorskip(package)
    file = Path(__file__).parent / "formats" / name
    if name.startswith("large"):
        file = tmp_path / name
        arrays = {f"layer{i}": np.random.default_rng(i).standard_normal((300, 500), np.float32) for i in range(3)}
        if name.endswith(".npz"):
            np.savez_compressed(file, **arrays)
        else:
            import h5py

            with h5py.File(file, "w") as written:
                for key, array in arrays.items():
                    written.create_dataset(key, data=array)
    web.files[name] = file.read_bytes()
    assert same(f"{web.url}/{name}", file)


def test_the_header_of_a_large_file_takes_one_request(web: WebServer) -> None:
    web.files["n.safetensors"] = save({f"l{i}.weight": torch.zeros(400, 400) for i in range(10)})
    stream = LayerStream(f"{web.url}/n.safetensors")
    assert stream.num_weights == 1_600_000 and web.requests["n.safetensors"] == 1
    web.latency, web.most = 0.02, 0
    assert len(list(stream.batches())) == 10
    assert web.most >= 4


def test_names_beside_files_of_one_folder_are_asked_for_once(web: WebServer) -> None:
    for i in range(4):
        web.files[f"f/n{i}.safetensors"] = save(network(i))
        open_checkpoint(f"{web.url}/f/n{i}.safetensors")
    assert web.requests["f/config.json"] == 1 and web.requests["f/n3.safetensors"] == 1


# ---------------------------------------------------------------------------------------------------------------------
# Stores that fail or lie


def test_errors_that_may_pass_are_tried_again_and_others_are_one_sentence(web: WebServer, memory: Any) -> None:
    web.files["n.safetensors"] = save(network(0))
    url = f"{web.url}/n.safetensors"
    web.failures = [503, 429, 502]
    assert len(load_state_dict(url)) == 4
    for statuses, said in (
        ([503] * 4, "answered with status 503"),
        ([403], "may not be read .status 403.; check your"),
    ):
        forget()
        web.failures = statuses
        with pytest.raises(CheckpointError, match=f"^{url}: .*{said}"):
            load_state_dict(url)
    with pytest.raises(CheckpointError, match=r"absent.safetensors: there is no such file$"):
        load_state_dict(f"{web.url}/absent.safetensors")
    with pytest.raises(CheckpointError, match=r"^memory://absent/n.pt: there is no such file$"):
        load_state_dict("memory://absent/n.pt")
    web.close()
    forget()
    with pytest.raises(CheckpointError, match=f"^{web.url}/.*: cannot be reached or read"):
        load_state_dict(url)
    web.close = lambda: None  # type: ignore[method-assign]


def test_answers_that_do_not_fit_the_file_are_refused(web: WebServer, monkeypatch: pytest.MonkeyPatch) -> None:
    content = save({"a.weight": torch.zeros(400, 400)})
    assert len(content) > 2**18  # more than a first answer
    url = f"{web.url}/n.safetensors"
    web.files["n.safetensors"] = content
    web.ranges = False
    with pytest.raises(CheckpointError, match=f"^{url}: the server ignores ranges; download the file"):
        load_state_dict(url)
    web.files["small.safetensors"] = save(network(0))
    assert len(load_state_dict(f"{web.url}/small.safetensors")) == 4  # which one answer holds
    web.ranges = True
    forget()
    web.spoil = lambda body: body[:-9]
    with pytest.raises(CheckpointError, match=f"^{url}: cannot be reached or read .*Payload"):
        load_state_dict(url)
    web.spoil = lambda body: body
    forget()
    opened = open_checkpoint(url)
    web.files["n.safetensors"] = save({"a.weight": torch.ones(400, 400)})
    with pytest.raises(CheckpointError, match=f"^{url}: has changed while it was read"):
        opened.read()
    web.files["n.safetensors"] = (2**40).to_bytes(8, "little") + content[8:]
    forget()
    with pytest.raises(CheckpointError, match=f"^{url}: is damaged.* its header does not fit into it"):
        load_state_dict(url)
    web.files["n.safetensors"] = content[:-4]
    forget()
    with pytest.raises(CheckpointError, match=f"^{url}: is damaged.* its tensors take 640000 bytes, it holds 639996"):
        load_state_dict(url)
    web.files["n.safetensors"] = content
    forget()
    with monkeypatch.context() as smaller:
        smaller.setattr("sne_fast.data.remote.paths._LARGEST", 1000)
        with pytest.raises(CheckpointError, match=f"^{url}: refused, the store says that it holds more than 1,000 b"):
            load_state_dict(url)
    web.files["page"] = b"<!DOCTYPE html><html></html>"
    with pytest.raises(CheckpointError, match=r"page: is a web page, perhaps the answer"):
        load_state_dict(f"{web.url}/page")


def test_names_beside_a_file_that_are_forbidden_are_not_there_and_those_that_fail_are_an_error(web: WebServer) -> None:
    web.files["n.safetensors"] = save(network(0))
    url, original, status = f"{web.url}/n.safetensors", web.answer, 403

    def answer(handler: Any) -> None:
        if handler.path.endswith(".json"):
            handler._answer(status, b"")
        else:
            original(handler)

    web.answer = answer  # type: ignore[method-assign]
    assert len(load_state_dict(url)) == 4  # as public buckets answer
    asked = web.requests["config.json"]
    assert len(load_state_dict(url)) == 4 and web.requests["config.json"] == asked == 1
    forget()
    status = 500
    with pytest.raises(CheckpointError, match=r"json: the store answered with status 500"):
        load_state_dict(url)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("https://me:secret@host/n.pt", r"^https://host/n.pt: refused, it holds a name or password"),
        ("https://token@host/n.pt", r"^https://host/n.pt: refused, it holds a name or password"),
        ("https://host/n.pt?x=1&X-Amz-Signature=secret", r"^https://host/n.pt: refused, its parameter 'X-Amz-Sig"),
        ("https://host/n.pt?sig=secret", r"^https://host/n.pt: refused, its parameter 'sig' looks like a credential"),
        ("nothing://host/n.pt", r"^nothing://host: cannot be opened: Protocol not known: nothing"),
        ("simplecache::https://host/n.pt", r"chains of stores are not read"),
        ("zip://n.pt::https://host/n.zip", r"chains of stores are not read"),
        ("hf://bert", r"^hf://bert: must be hf://user/name"),
        ("file://folder/n.pt", r"^file://folder/n.pt: must be a path on this machine from its root, as file:///"),
    ],
)
def test_urls_that_are_refused(fresh_stores: None, url: str, said: str) -> None:
    with pytest.raises(CheckpointError, match=said) as raised:
        load_state_dict(url)
    assert "secret" not in str(raised.value) and "token" not in str(raised.value)


def test_messages_of_libraries_lose_what_urls_hold() -> None:
    text = "403, url='https://u:p@cdn/x?X-Amz-Signature=abc&y' of s3://k:s@b/x"
    assert failures.scrubbed(text) == "403, url='https://cdn/x' of s3://b/x"


def test_a_store_whose_package_is_missing_says_which(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(root: str) -> None:
        raise ImportError("Install s3fs to access S3")

    forget()
    monkeypatch.setattr("fsspec.core.url_to_fs", missing)
    with pytest.raises(ModuleNotFoundError, match=r"^s3:// needs a package of its own: Install s3fs"):
        load_state_dict("s3://bucket/n.pt")
    monkeypatch.setattr("sne_fast.extras.installed", lambda module: module != "fsspec")
    with pytest.raises(
        ModuleNotFoundError, match=r'reading from elsewhere needs fsspec: pip install "sne_fast\[remote'
    ):
        load_state_dict("gs://bucket/n.pt")


# ---------------------------------------------------------------------------------------------------------------------
# The Hub


def test_a_revision_is_the_commit_that_it_means(hub: Hub) -> None:
    hub.files |= {"n.safetensors": save(network(0)), "deep/er/n.pt": b"x"}
    for revision in ("", "@main", "@v1", f"@{COMMIT}"):
        path = place(f"hf://user/zoo{revision}/n.safetensors")
        assert str(path) == f"hf://user/zoo@{COMMIT}/n.safetensors" and path.is_file()
    assert sorted(entry.name for entry in place("hf://user/zoo").iterdir()) == ["deep", "n.safetensors"]
    assert place("hf://user/zoo/deep/er").is_dir() and not place("hf://user/zoo/none").exists()
    before = place("hf://user/zoo/n.safetensors").etag()  # type: ignore[attr-defined]
    assert before != place("hf://user/zoo/deep/er/n.pt").etag()  # type: ignore[attr-defined]
    assert is_remote("hf://user/zoo") and not is_remote("file:///x") and not is_remote("hf:/user")
    assert not is_remote("model::v1.pt") and place("model::v1.pt") == Path("model::v1.pt")


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("hf://user/none", r"^hf://user/none: there is no such repository, or it is private"),
        ("hf://user/zoo@v2", r"^hf://user/zoo@v2: there is no such revision"),
        ("hf://user/zoo/none.pt", rf"^hf://user/zoo@{COMMIT}/none.pt: there is no such file"),
        (
            "hf://user/gated/n.safetensors",
            r"n.safetensors: is gated; accept its conditions on the Hub's page of user/g",
        ),
    ],
)
def test_what_the_hub_refuses_is_said(hub: Hub, url: str, said: str) -> None:
    hub.files["n.safetensors"] = save(network(0))
    with pytest.raises(CheckpointError, match=said):
        load_state_dict(url)
