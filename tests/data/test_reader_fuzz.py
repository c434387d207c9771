"""Readers of checkpoints under random damage: the right tensors, some tensors of the right form, or one sentence.

`SNE_FAST_FUZZ=10000` tries that many of each. `corpus/` has small files that ended or could end a reader otherwise.
"""

from __future__ import annotations

import io
import json
import math
import pickle
import shutil
import warnings
import zipfile
from argparse import Namespace
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn

from sne_fast import CheckpointError
from sne_fast.data.checkpoints import load_state_dict, read_checkpoint

CORPUS = Path(__file__).parent / "corpus"
STATE = OrderedDict([("a.weight", torch.arange(6.0).view(2, 3)), ("a.bias", torch.ones(2)), ("n", torch.tensor(3))])
MOST_NUMBERS = 10**6


def saved(content: Any, zipped: bool = True) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


def program() -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))), buffer)
    return buffer.getvalue()


RICH = {
    "model": STATE,
    "args": Namespace(lr=0.1, names=["a", ("b", 2)]),
    "optimizer": {"state": {0: {"m": torch.ones(2)}}},
}
FILES = {
    "zip": saved(STATE),
    "rich zip": saved(RICH),
    "old": saved(STATE, zipped=False),
    "rich old": saved(RICH, zipped=False),
    "module": saved(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))),
    "old module": saved(nn.Sequential(nn.Linear(2, 2)), zipped=False),
    **{f"pickle {protocol}": pickle.dumps(RICH, protocol=protocol) for protocol in (0, 2, 4, 5)},
    "program": program(),
    "safetensors": safetensors_bytes(dict(STATE)),
}


def outcome(path: Path) -> dict[str, Tensor] | None:
    """Return the tensors read, None after a refusal in one sentence that names the path."""
    try:
        read = load_state_dict(path)
    except CheckpointError as error:
        told = str(error)
        assert str(path.parent) in told and "\n" not in told and len(told) < 600 + 2 * len(str(path)), told
        assert "weights_only" not in told and "Traceback" not in told
        return None
    assert read and all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in read.items())
    assert sum(tensor.numel() for tensor in read.values()) < MOST_NUMBERS
    return read


@pytest.mark.parametrize("kind", FILES)
@given(data=st.data())
def test_files_that_are_cut_short_are_refused(tmp_path: Path, kind: str, data: st.DataObject) -> None:
    whole = FILES[kind]
    keep = data.draw(st.integers(0, len(whole) - 1))
    (tmp_path / "x").write_bytes(whole[:keep])
    # A zip ends with comments; other formats end with their last byte.
    assert outcome(tmp_path / "x") is None


@pytest.mark.parametrize("kind", FILES)
@given(data=st.data())
def test_files_with_changed_bytes_are_read_or_refused(tmp_path: Path, kind: str, data: st.DataObject) -> None:
    changed = bytearray(FILES[kind])
    for place, value in data.draw(
        st.lists(st.tuples(st.integers(0, len(changed) - 1), st.integers(0, 255)), min_size=1, max_size=4)
    ):
        changed[place] = value
    (tmp_path / "x").write_bytes(changed)
    outcome(tmp_path / "x")


def rezipped(data: bytes, change: dict[str, bytes], drop: str = "") -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(buffer, "w") as out:
        for entry in source.namelist():
            own = entry.partition("/")[2]
            if own != drop:
                out.writestr(entry, change.get(own, source.read(entry)))
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["zip", "rich zip", "module", "program"])
@given(data=st.data())
def test_zips_whose_pickle_is_changed_are_read_or_refused(tmp_path: Path, kind: str, data: st.DataObject) -> None:
    """As above, with right checksums, so that the changes reach the reader of pickles."""
    with zipfile.ZipFile(io.BytesIO(FILES[kind])) as source:
        changed = bytearray(next(source.read(n) for n in source.namelist() if n.endswith("/data.pkl")))
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(changed)))
        stop = data.draw(st.integers(start, min(len(changed), start + 4)))
        changed[start:stop] = data.draw(st.binary(max_size=6))
    drop = data.draw(st.sampled_from(["", "data/0", "version", "byteorder"]))
    (tmp_path / "x").write_bytes(rezipped(FILES[kind], {"data.pkl": bytes(changed)}, drop))
    outcome(tmp_path / "x")


OPCODES = [bytes([code]) for code in range(256)]
PIECES = st.one_of(
    st.sampled_from(OPCODES),
    st.sampled_from(
        [b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch\nFloatStorage\n", b"cos\nsystem\n", b"cbuiltins\neval\n",
         b"ccollections\nOrderedDict\n", b"ctorch._tensor\n_rebuild_from_type_v2\n", b"K\x01", b"K\x02", b"\x85R", b"N",
         b"X\x01\x00\x00\x00a", b"X\x07\x00\x00\x00storage", b"X\x03\x00\x00\x00cpu", b"X\x01\x00\x00\x000", b"Q",
         b"h\x00",
         b"q\x00", b"}", b"]", b"(", b"t", b")", b"R", b"b", b"\x81", b"s", b"a", b"2", b"\x82\x01", b"\x93"]
    ),
    st.binary(max_size=3),
)  # fmt: skip


@given(pieces=st.lists(PIECES, max_size=40), plain=st.booleans())
def test_pickles_of_random_opcodes_are_read_or_refused(tmp_path: Path, pieces: list[bytes], plain: bool) -> None:
    made = b"\x80\x02" + b"".join(pieces) + b"."
    (tmp_path / "x").write_bytes(made if plain else rezipped(FILES["zip"], {"data.pkl": made}))
    outcome(tmp_path / "x")


PLAIN = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.binary(max_size=8)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.tuples(inner, inner), st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=12,
)


@given(beside=st.dictionaries(st.text(max_size=8), PLAIN, max_size=4), key=st.text(max_size=12), zipped=st.booleans())
def test_weights_under_any_key_beside_any_plain_values_are_found(
    tmp_path: Path, beside: dict[str, Any], key: str, zipped: bool
) -> None:
    (tmp_path / "x").write_bytes(saved({**beside, key: STATE}, zipped))
    read = outcome(tmp_path / "x")
    if read is not None:  # bookkeeping of a training by its key
        assert list(read) == list(STATE) and all(torch.equal(read[name], tensor) for name, tensor in STATE.items())
        left_out = read_checkpoint(tmp_path / "x").left_out
        assert set(left_out) == {name for name in beside if name != key and not is_prefix(name, key)}


def is_prefix(name: str, key: str) -> bool:
    return key.startswith(f"{name}.")


NAMES = st.text(max_size=10)
DTYPES = st.sampled_from(
    [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int64,
     torch.int8, torch.uint8, torch.bool, torch.complex64]
)  # fmt: skip
SHAPES = st.lists(st.integers(0, 4), max_size=5)


@given(entries=st.dictionaries(NAMES, st.tuples(DTYPES, SHAPES), min_size=1, max_size=5))
def test_every_reader_gives_back_what_was_written(tmp_path: Path, entries: dict[str, Any]) -> None:
    state = {name: torch.ones(shape).to(dtype) for name, (dtype, shape) in entries.items()}
    (tmp_path / "x").write_bytes(saved(state))
    (tmp_path / "y").write_bytes(saved(state, zipped=False))
    (tmp_path / "z").write_bytes(safetensors_bytes(state))
    (tmp_path / "p").write_bytes(pickle.dumps(state, protocol=4))
    for file in "xyzp":
        read = outcome(tmp_path / file)
        assert read is not None and set(read) == set(state)
        for name, tensor in state.items():
            assert read[name].dtype == tensor.dtype and read[name].shape == tensor.shape
            assert torch.equal(read[name].float(), tensor.float()) or tensor.is_complex()


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-10, 2**70), st.text(max_size=5)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=6,
)
HEADER = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.one_of(st.sampled_from(["F32", "F64", "BOOL", "F4", "", "f32"]), JSON),
        "shape": st.one_of(st.lists(st.integers(-1, 2**63), max_size=3), JSON),
        "data_offsets": st.one_of(st.lists(st.integers(-1, 2**63), max_size=3), JSON),
        "more": JSON,
    },
)


@given(
    header=st.one_of(st.dictionaries(st.one_of(NAMES, st.just("__metadata__")), st.one_of(HEADER, JSON)), JSON),
    data=st.binary(max_size=24),
    length=st.one_of(st.none(), st.integers(0, 2**64 - 1)),
)
def test_hostile_headers_are_read_or_refused(tmp_path: Path, header: Any, data: bytes, length: int | None) -> None:
    text = json.dumps(header).encode()
    content = (len(text) if length is None else length).to_bytes(8, "little") + text + data
    for name in ("x", "x.safetensors"):
        (tmp_path / name).write_bytes(content)
        outcome(tmp_path / name)


SHARD_NAMES = st.one_of(
    st.sampled_from(
        ["one.safetensors", "two.bin", "missing.bin", "../one.safetensors", "/etc/passwd", ".", "", "a\0b"]
    ),
    JSON,
)


@given(
    weight_map=st.one_of(st.dictionaries(st.sampled_from([*STATE, "other"]), SHARD_NAMES), JSON),
    metadata=st.one_of(JSON, st.fixed_dictionaries({"sne_fast.order": st.one_of(JSON, st.just(list(STATE)))})),
)
def test_hostile_indices_are_read_or_refused(tmp_path: Path, weight_map: Any, metadata: Any) -> None:
    (tmp_path / "one.safetensors").write_bytes(safetensors_bytes({"n": STATE["n"]}))
    (tmp_path / "two.bin").write_bytes(saved({name: STATE[name] for name in ("a.weight", "a.bias")}))
    file = tmp_path / "model.safetensors.index.json"
    file.write_text(json.dumps({"weight_map": weight_map, "metadata": metadata}))
    read = outcome(file)
    if read is not None:
        assert all(torch.equal(tensor, STATE[name]) for name, tensor in read.items())
        assert set(read) == set(weight_map)


FILE_NAMES = st.sampled_from(
    ["model.safetensors", "pytorch_model.bin", "model.safetensors.index.json", "training_args.bin", "optimizer.pt",
     "config.json", "modules.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "other.pt",
     "adapter_model.safetensors", "consolidated.00.pth", "consolidated.01.pth", "readme.md", "2_Dense"]
)  # fmt: skip


@given(files=st.dictionaries(FILE_NAMES, st.sampled_from([*FILES, "junk", "json"]), max_size=5), list_=JSON)
def test_folders_of_anything_are_read_or_refused(tmp_path: Path, files: dict[str, str], list_: Any) -> None:
    folder = tmp_path / "folder"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    junk = {"junk": b"\x00\x01", "json": json.dumps(list_).encode()}
    for name, kind in files.items():
        (folder / name).write_bytes(FILES[kind] if kind in FILES else junk[kind])
    read = outcome(folder)
    assert read is None or sum(math.prod(t.shape) for t in read.values()) > 0


@pytest.mark.parametrize("file", sorted(CORPUS.iterdir()), ids=lambda file: file.name)
def test_hostile_files_of_the_corpus_are_refused(file: Path) -> None:
    assert outcome(file) is None
