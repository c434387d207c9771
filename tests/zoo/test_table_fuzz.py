"""Tables and JSON, whole or damaged at random: read right, or refused with the name of the file."""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from sne_fast.regular_files import FileError
from sne_fast.zoo import Zoo, ZooWriter, load_dwsnets
from sne_fast.zoo.csv_table import read_csv
from sne_fast.zoo.index import read_index

NUMBERS = (
    st.integers().map(str) | st.floats().map(repr) | st.sampled_from(["", "NA", "nan", "007", "1e999", "+1", "-0"])
)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
ODD = st.sampled_from(
    [
        b'"',
        b'""',
        b",",
        b"\n",
        b"\r",
        b"\0",
        b"\xff",
        b"\xef\xbb\xbf",
        b"[" * 3000,
        b"9" * 5000,
        b"a" * 140_000,
        b"1e999",
    ]
)


@st.composite
def tables(draw):
    """Draw a table as a header and columns of cells, of numbers, text or both."""
    names = draw(st.lists(TEXT.filter(str.strip), min_size=1, max_size=4, unique=True))
    rows = draw(st.integers(0, 5))
    kind = st.sampled_from([NUMBERS, TEXT, NUMBERS | TEXT])
    return {name: [draw(cells) for _ in range(rows)] for name, cells in ((name, draw(kind)) for name in names)}


def written(table, terminator="\n", encoding="utf-8"):
    stream = io.StringIO(newline="")
    writer = csv.writer(stream, lineterminator=terminator, quoting=csv.QUOTE_ALL)
    writer.writerow(table)
    writer.writerows(zip(*table.values(), strict=True))
    return stream.getvalue().encode(encoding)


def damaged(draw, content):
    """Return the content with a few bits flipped, bytes put in, or its end cut off."""
    raw = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(raw)))
        change = draw(st.sampled_from(["cut", "flip", "insert"]))
        if change == "cut":
            del raw[at:]
        elif change == "insert":
            raw[at:at] = draw(st.binary(max_size=4) | ODD)
        elif at < len(raw):
            raw[at] ^= 1 << draw(st.integers(0, 7))
    return bytes(raw)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


def is_value_of(value, cell):
    """Return whether a cell of a column of numbers was read as it should be."""
    if value is None:
        return not cell.strip(" \t") or not math.isfinite(float(cell.replace("NA", "nan")))
    return float(cell) == value if isinstance(value, float) else str(value) == cell.strip(" \t")


@given(
    table=tables(), terminator=st.sampled_from(["\n", "\r\n"]), encoding=st.sampled_from(["utf-8", "utf-8-sig"]),
    zipped=st.booleans(),
)  # fmt: skip
@example(table={"large": ["9007199254740993"]}, terminator="\n", encoding="utf-8", zipped=False)
def test_every_cell_is_a_number_of_a_column_of_numbers_or_text_as_written(folder, table, terminator, encoding, zipped):
    content = written(table, terminator, encoding)
    file = folder / ("t.csv.gz" if zipped else "t.csv")
    file.write_bytes(gzip.compress(content) if zipped else content)
    found = read_csv(file)
    assert list(found) == list(table)
    for name, cells in table.items():
        values = found[name]
        assert len({type(value) for value in values if value is not None}) <= 1 and len(values) == len(cells)
        if any(isinstance(value, str) for value in values):
            assert [value or "" for value in values] == cells
        else:
            assert all(is_value_of(value, cell) for value, cell in zip(values, cells, strict=True))
    assert {name: [v or "" for v in column] for name, column in read_csv(file, text=list(table)).items()} == table


@given(table=tables(), zipped=st.booleans(), data=st.data())
def test_a_damaged_table_is_read_or_refused_by_name(folder, table, zipped, data):
    content = damaged(data.draw, written(table))
    content = gzip.compress(content, mtime=0) if zipped else content
    if zipped and data.draw(st.booleans()):
        content = damaged(data.draw, content)
    file = folder / ("d.csv.gz" if zipped else "d.csv")
    file.write_bytes(content)
    try:
        found = read_csv(file)
    except FileError as error:
        assert str(error).startswith(f"{file}: ") and len(str(error)) < 1000
    else:
        assert len({len(column) for column in found.values()}) <= 1


def a_zoo(folder: Path) -> bytes:
    if not (folder / "z").exists():
        with ZooWriter(folder / "z", targets=["a"]) as writer:
            for k in range(3):
                writer.add(f"n{k}", {"w": torch.ones(2)}, {"a": 0.5 * k, "note": None if k else "first"})
        (folder / "index").write_bytes((folder / "z" / "index.parquet").read_bytes())
    return (folder / "index").read_bytes()


@given(data=st.data())
def test_a_damaged_index_is_read_or_refused_by_name(folder, data):
    pytest.importorskip("pyarrow")
    file = folder / "z" / "index.parquet"
    content = damaged(data.draw, a_zoo(folder))
    file.write_bytes(content)
    try:
        read_index(file)
        Zoo.open(folder / "z")
    except FileError as error:
        assert str(file) in str(error)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["path", "label"]) | TEXT, inner),
    max_leaves=8,
)


@given(content=st.dictionaries(st.sampled_from(["train", "val", "test"]), JSON, max_size=3), data=st.data())
def test_any_json_of_splits_is_read_or_refused_by_name(folder, content, data):
    file = folder / "splits.json"
    raw = json.dumps(content).encode()
    file.write_bytes(damaged(data.draw, raw) if data.draw(st.booleans()) else raw)
    with pytest.raises((FileError, FileNotFoundError, ValueError)) as raised:
        load_dwsnets(file)
    assert str(file) in str(raised.value)
