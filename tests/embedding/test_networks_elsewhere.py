"""Networks of stores elsewhere: manifests, units, and `sne-fast encode`."""

from __future__ import annotations

import io
import json
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save

from helpers.command_line import call, fails
from helpers.many_networks import encoder_of, network
from helpers.web_servers import COMMIT, Hub, WebServer
from sne_fast.data.remote.paths import forget, place
from sne_fast.data.remote.ranges import RANGES
from sne_fast.embedding import EmbeddingDataset, collect, embed_unit, embed_units, manifest, plan

pytest.importorskip("pyarrow")
pytest.importorskip("aiohttp")
pytest.importorskip("huggingface_hub")


def zoo(prefix: str = "") -> dict[str, bytes]:
    """Files of a folder of several networks, of one with its configuration, of a damaged one, and one of torch."""
    buffer = io.BytesIO()
    torch.save(network(8), buffer)
    files = {f"several/net{i}.safetensors": save(network(i)) for i in range(3)}
    files |= {"one/model.safetensors": save(network(7)), "one/config.json": b"{}", "README.md": b"# A zoo"}
    files |= {"net.pt": buffer.getvalue(), "bad/cut.safetensors": save(network(9))[:-7]}
    return {prefix + name: content for name, content in files.items()}


FOUND = ["bad/cut.safetensors", "net.pt", "one", "several/net0.safetensors", "several/net1.safetensors"]


def test_a_tree_elsewhere_is_read_by_the_rules_of_local_ones(
    memory: Any, hub: Hub, web: WebServer, tmp_path: Path
) -> None:
    local = tmp_path / "zoo"
    for name, content in zoo().items():
        (local / name).parent.mkdir(parents=True, exist_ok=True)
        (local / name).write_bytes(content)
        memory.pipe(f"/zoo/{name}", content)
        hub.files[name] = web.files[f"zoo/{name}"] = content
    want = {row["uri"].removeprefix(f"{local}/"): row["weights"] for row in manifest([local]).to_pylist()}
    assert sorted(want)[:5] == FOUND
    for source, root in (
        ("memory://zoo", "memory://zoo"), ("hf://user/zoo", f"hf://user/zoo@{COMMIT}"),
        (f"{web.url}/zoo/", f"{web.url}/zoo"),
    ):  # fmt: skip
        rows = manifest([source]).to_pylist()
        found = {row["uri"].removeprefix(f"{root}/").rstrip("/"): row["weights"] for row in rows}
        assert list(found.items()) == list(want.items())
        errors = [row["error"] for row in rows if row["error"] is not None]
        assert len(errors) == 1 and errors[0].startswith(f"{root}/bad/cut.safetensors: is damaged")
    (unit,) = plan(manifest(["hf://user/zoo@v1/several", "memory://zoo/net.pt", local / "one"]))
    vectors = {row["uri"].rpartition("/")[2]: row["vector"] for row in embed_unit(encoder_of(), unit).to_pylist()}
    for name, seed in (("net1.safetensors", 1), ("net.pt", 8), ("one", 7)):
        assert vectors[name] == pytest.approx(encoder_of()([network(seed)])[0].tolist(), abs=1e-6)


def test_what_cannot_be_reached_is_a_row_and_networks_are_listed_once(hub: Hub, memory: Any, tmp_path: Path) -> None:
    hub.files["n.safetensors"] = save(network(0))
    memory.pipe("/a/n.safetensors", save(network(0)))
    listing = tmp_path / "list.txt"
    listing.write_text("hf://user/none\nhf://user/zoo/n.safetensors\nmemory://a\nmemory://empty/x.pt\n")
    secret = "https://me:password@host/n.pt"
    rows = manifest([f"@{listing}", "hf://user/zoo@main", "hf://user/gated", secret]).to_pylist()
    errors = {row["uri"]: row["error"] for row in rows}
    assert list(errors) == [
        "hf://user/none", f"hf://user/zoo@{COMMIT}/n.safetensors", "memory://a/n.safetensors", "memory://empty/x.pt",
        f"hf://user/gated@{COMMIT}/n.safetensors", "https://host/n.pt",
    ]  # fmt: skip
    assert errors["memory://a/n.safetensors"] is None and "no such repository" in errors["hf://user/none"]
    assert "is gated" in errors[f"hf://user/gated@{COMMIT}/n.safetensors"] and "password" not in str(rows)[:-200]
    assert "me:" not in str(rows) and "no such file" in errors["memory://empty/x.pt"]


def test_an_etag_changes_with_what_is_stored_and_nothing_else(web: WebServer, memory: Any) -> None:
    web.files |= {"n.safetensors": save(network(0)), "config.json": b"{}"}
    memory.pipe("/z/n.safetensors", save(network(0)))
    sources = [f"{web.url}/n.safetensors", "memory://z/n.safetensors"]
    first = manifest(sources)["etag"].to_pylist()
    assert first == manifest(sources)["etag"].to_pylist() and len(set(first)) == 2
    web.files["config.json"] = b'{"tie_word_embeddings": true}'
    memory.pipe("/z/n.safetensors", save(network(1)))
    second = manifest(sources)["etag"].to_pylist()
    assert first[0] != second[0] and first[1] != second[1]


def test_a_network_that_changed_since_its_manifest_is_an_error(web: WebServer) -> None:
    web.files["n.safetensors"] = save(network(0))
    (unit,) = plan(manifest([f"{web.url}/n.safetensors"]))
    web.files["n.safetensors"] = save(network(1))
    manifest([])  # looks at stores anew
    (row,) = embed_unit(encoder_of(), unit).to_pylist()
    assert row["error"] == f"{web.url}/n.safetensors: has changed since its manifest was made; make it again"


def test_encoding_again_lists_and_reads_nothing(hub: Hub, tmp_path: Path) -> None:
    hub.files |= zoo()
    out, encoder = tmp_path / "vectors", encoder_of()
    dataset = EmbeddingDataset(out, encoder)
    first = manifest(["hf://user/zoo"])
    assert len(list(embed_units(dataset, plan(first)))) == 1
    hub.requests.clear()
    RANGES.forget()
    again = manifest(["hf://user/zoo@main"], before=first)
    assert [path for path in hub.requests if "/resolve/" in path] == [f"user/zoo/resolve/{COMMIT}/bad/cut.safetensors"]
    assert again.equals(first) and dataset.missing(plan(again)) == []
    del hub.files["README.md"]
    hub.files["several/net0.safetensors"] = save(network(40))
    assert sum(len(unit.networks) for unit in dataset.missing(plan(manifest(["hf://user/zoo"])))) == 1
    vectors = collect(out, table=first)
    assert vectors.num_rows == 6 and vectors["error"].null_count == 5


def test_many_small_files_are_asked_for_at_once(web: WebServer) -> None:
    web.files |= {f"z/n{i:02d}.safetensors": save(network(i)) for i in range(24)}
    web.latency = 0.03
    table = manifest([f"{web.url}/z/"])
    assert table["error"].null_count == 24 and web.most >= 8
    assert sum(web.requests[f"z/n{i:02d}.safetensors"] for i in range(24)) == 24
    manifest([])
    web.most = 0
    (unit,) = plan(table)
    assert embed_unit(encoder_of(), unit)["error"].null_count == 24 and web.most >= 8


def test_the_page_of_a_folder_gives_links_into_it_alone(web: WebServer, monkeypatch: pytest.MonkeyPatch) -> None:
    page = '<a href="../up/">a</a> <A HREF="n.pt?x=1">b</A> <a href="https://other/n.pt">c</a> <a href="/z/sub/">d</a>'
    web.files |= {"z/n.pt": b"x", "z/sub/m.pt": b"y"}
    monkeypatch.setattr(web, "page", lambda folder: page)
    assert [str(entry) for entry in place(f"{web.url}/z/").iterdir()] == [f"{web.url}/z/n.pt", f"{web.url}/z/sub/"]
    monkeypatch.setattr("sne_fast.data.remote.http_store._MOST_PAGE", 20)
    forget()
    with pytest.raises(ValueError, match="the page of this folder is larger than the limit of 20 bytes"):
        list(place(f"{web.url}/z/").iterdir())


def test_encode_takes_urls_for_files_of_results_and_folders(memory: Any, web: WebServer, tmp_path: Path) -> None:
    for name, content in zoo().items():
        memory.pipe(f"/zoo/{name}", content)
    web.files["large.safetensors"] = save(network(3, width=40))
    out = tmp_path / "z.npz"
    result = call("encode", "memory://zoo/several", f"{web.url}/large.safetensors", "memory://zoo/none", "-o", out)
    said = " ".join(result.stderr.split())
    assert result.exit_code == 1 and "memory://zoo/none: there is no such file" in said
    names = np.load(out)["name"].tolist()
    assert names[0] == "memory://zoo/several/net0.safetensors" and names[3] == f"{web.url}/large.safetensors"
    folder = tmp_path / "vectors"
    result = call("encode", "memory://zoo", "-o", folder)
    said = " ".join(result.stderr.split())
    assert result.exit_code == 1 and "memory://zoo/bad/cut.safetensors: is damaged" in said
    assert "1 of 6 networks failed" in said and collect(folder)["error"].null_count == 5
    again = call("encode", "memory://zoo", "-o", folder)
    assert "0 of them by this call" in " ".join(again.stdout.split())
    assert "missing.pt" in fails("encode", "missing.pt", "-o", folder)
    rebuilt = call("encode", "memory://zoo/one", "--rebuild", "-o", out)
    assert "cannot be rebuilt from elsewhere; download its folder" in " ".join(rebuilt.stderr.split())


def test_a_sharded_checkpoint_of_a_server_without_listings_has_an_etag(web: WebServer) -> None:
    parts = {f"model-0000{i}-of-00002.safetensors": save({f"l{i}.weight": torch.ones(3, 4)}) for i in (1, 2)}
    index = {"weight_map": {"l1.weight": "model-00001-of-00002.safetensors", "l2.weight": [*parts][1]}}
    web.files |= {**parts, "model.safetensors.index.json": json.dumps(index).encode()}
    uri = f"{web.url}/model.safetensors.index.json"
    (row,) = manifest([uri]).to_pylist()
    assert row["weights"] == 24 and row["error"] is None
    web.files["model-00002-of-00002.safetensors"] = save({"l2.weight": torch.zeros(3, 4)})
    assert manifest([uri]).to_pylist()[0]["etag"] != row["etag"]


def test_ctrl_c_gives_up_what_a_slow_server_is_asked_for(web: WebServer) -> None:
    web.files |= {f"net{i}.safetensors": save(network(i)) for i in range(3)}
    urls = [f"{web.url}/{name}" for name in web.files]
    web.latency = 20.0

    def press() -> None:
        while not web.requests:
            time.sleep(0.01)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)  # type: ignore[arg-type]

    threading.Thread(target=press, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        manifest(urls)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("sne_fast-ahead")]
    web.latency = 0.0
    assert manifest(urls)["error"].null_count == 3  # what comes after is not given up


def test_links_that_lead_back_end(web: WebServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web, "page", lambda folder: '<a href="again/">x</a>')
    (row,) = manifest([f"{web.url}/zoo/"]).to_pylist()
    assert row["error"].endswith("again/: refused, is more than 32 folders deep; does a link lead back?")
    monkeypatch.setattr("sne_fast.data.remote.http_store._MOST_PAGES", 5)
    (row,) = manifest([f"{web.url}/zoo/"]).to_pylist()
    assert row["error"].endswith("refused, the server has more than 5 folders; do links lead back?")
