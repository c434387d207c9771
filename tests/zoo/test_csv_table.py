"""Columns of CSV files: one type each, read as they are written, and damage named."""

from __future__ import annotations

import csv
import gzip
import os

import pytest

from sne_fast.regular_files import FileError
from sne_fast.zoo import csv_table, load_checkpoints
from sne_fast.zoo.csv_table import column_of, one_type, read_csv


@pytest.fixture
def table(tmp_path):
    """Return a function that reads a CSV file of some content."""

    def read(content, **options):
        file = tmp_path / "a.csv"
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        return read_csv(file, **options)

    return read


def test_columns_are_numbers_or_text_as_a_whole(table):
    assert table(",name,x,y,z\n0,1,1,2.5,a\n1,2,,nan,3\n", text=["name"]) == {
        "name": ["1", "2"], "x": [1, None], "y": [2.5, None], "z": ["a", "3"],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("cells", "values"),
    [
        (["12e4567", "1"], ["12e4567", "1"]),  # above float64
        (["0012345", "0012346"], ["0012345", "0012346"]),
        (["-007", "1.5"], ["-007", "1.5"]),
        (["none", "NA", "flip"], ["none", "NA", "flip"]),
        (["none", "none"], ["none", "none"]),
        (["NA", "NA"], ["NA", "NA"]),
        (["none", "1"], ["none", "1"]),
        (["inf", "nan", "x"], ["inf", "nan", "x"]),
        (["1", "2", "three"], ["1", "2", "three"]),
        (["1_000", "2"], ["1_000", "2"]),
        (["0x10"], ["0x10"]),
        (["\u0661"], ["\u0661"]),  # a digit, but not of ASCII
        (["12345678901234567890123"], ["12345678901234567890123"]),
        (["9007199254740993", "0.5"], ["9007199254740993", "0.5"]),  # no float64
        ([" a", "b "], [" a", "b "]),
        (["x", ""], ["x", None]),
        (["True", "False"], ["True", "False"]),
        (["2024-01-01"], ["2024-01-01"]),
        (["9" * 5000], ["9" * 5000]),
        (["1", "2"], [1, 2]),
        (["9223372036854775807", "-9223372036854775808"], [2**63 - 1, -(2**63)]),
        (["9223372036854775808"], [float(2**63)]),
        (["1", ""], [1, None]),
        (["1", "NA"], [1, None]),
        (["0", "-0"], [0.0, -0.0]),
        ([" 1", "2\t"], [1, 2]),
        (["1", "2.5", "-1e-3", ".5", "1.", "+2"], [1.0, 2.5, -1e-3, 0.5, 1.0, 2.0]),
        (["0.5", "NaN", "-inf", "N/A", "null"], [0.5, None, None, None, None]),
        (["nan", "inf"], [None, None]),
        (["", ""], [None, None]),
        ([], []),
    ],
)
def test_the_type_of_a_column(cells, values):
    found = column_of(cells)
    assert found == values and [type(a) for a in found] == [type(b) for b in values]


def test_a_column_of_text_keeps_what_looks_like_numbers(table):
    assert table("id\n007\n8\n", text=["id"]) == {"id": ["007", "8"]}
    assert table("id\n7\n8\n", text=["id"]) == {"id": ["7", "8"]}


def test_a_byte_order_mark_quoted_commas_and_line_breaks(table):
    content = b'\xef\xbb\xbffile,note\r\na.pt,"first\nsecond, ""third"""\r\n\r\nb.pt,\xc3\xa9\r\n'
    assert table(content) == {"file": ["a.pt", "b.pt"], "note": ['first\nsecond, "third"', "\u00e9"]}
    assert table(b'\xef\xbb\xbf"a b",c\n1,2') == {"a b": [1], "c": [2]}


def test_a_table_without_rows_and_a_last_line_without_an_end(table):
    assert table("a,b\n") == table("a,b") == {"a": [], "b": []}
    assert table('a\n1\n""\n2') == {"a": [1, None, 2]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no header line"),
        ("x,y\n1\n", "line 2 does not have one cell per column"),
        ("x,y\n1,2\n1,2,3\n", "line 3 does not have one cell per column"),
        ("x,x\n1,2\n", "two columns are called 'x'"),
        ("x,,y\n1,2,3\n", "column 2 has no name in the header line"),
        ("x, \n1,2\n", "column 2 has no name"),
        (" ,x\n1,2\n", "column 1 has no name"),
        ('x,y\n1,"2\n', "line 2 is damaged or no CSV: unexpected end of data"),
        ('x,y\n1,"2"3\n', "line 2 is damaged or no CSV"),
        ("x\n" + "a" * 200_000, "field larger than field limit"),
        (b"x,y\n1,caf\xe9\n", "is not text in UTF-8, byte 9 is"),
        ("x,y\n".encode("utf-16"), "is not text in UTF-8, byte 0 is"),
    ],
)
def test_a_damaged_table_is_refused_by_name(table, content, message):
    with pytest.raises(FileError, match=rf"a\.csv: .*{message}"):
        table(content)


def test_compressed_tables_and_their_limits(tmp_path, monkeypatch):
    file = tmp_path / "a.csv.gz"
    file.write_bytes(gzip.compress(b"x\n" + b"1\n" * 1000))
    assert read_csv(file) == {"x": [1] * 1000}
    with pytest.raises(FileError, match=r"a\.csv\.gz: decompresses to more than the limit of 2001 bytes"):
        read_csv(file, max_bytes=2001)
    monkeypatch.setattr(csv_table, "MAX_CELLS", 999)
    with pytest.raises(FileError, match=r"a\.csv\.gz: holds more than the limit of 999 cells"):
        read_csv(file)
    for damaged in (b"not gzip", file.read_bytes()[:-20]):
        file.write_bytes(damaged)
        with pytest.raises(FileError, match=r"a\.csv\.gz: is damaged or no gzip file"):
            read_csv(file)


def test_what_is_no_regular_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.csv")
    for path, message in ((tmp_path / "pipe.csv", "is a named pipe"), (tmp_path, "is a folder")):
        with pytest.raises(FileError, match=message):
            read_csv(path)
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        read_csv(tmp_path / "none.csv")


def test_values_of_other_sources_get_one_type():
    assert one_type([1, None, 2.5, float("inf")]) == [1.0, None, 2.5, None]
    assert one_type([1, "a", None]) == ["1", "a", None]
    assert one_type([True, None]) == [True, None] and one_type([True, 2]) == [1, 2]


def test_a_table_of_checkpoints_without_rows_is_refused(tmp_path):
    (tmp_path / "index.csv").write_text("file,accuracy\n")
    with pytest.raises(ValueError, match=r"index\.csv: holds no rows"):
        load_checkpoints(tmp_path)
    (tmp_path / "index.csv").write_text("file,accuracy\n ,0.5\n")
    with pytest.raises(ValueError, match=r"index\.csv: the column 'file' must name a file in every row"):
        load_checkpoints(tmp_path)


def test_names_and_labels_of_checkpoints_stay_as_the_table_has_them(tmp_path):
    rows = [["file", "id", "augmentation", "split"], ["a.pt", "0012345", "none", "train"]]
    rows += [["b.pt", "12e4567", "NA", "test"]]
    with open(tmp_path / "index.csv", "w", newline="", encoding="utf-8-sig") as stream:
        csv.writer(stream).writerows(rows)
    for row in rows[1:]:
        (tmp_path / row[0]).touch()
    zoo = load_checkpoints(tmp_path)
    assert zoo.rows[0] == {"name": "a.pt", "id": "0012345", "augmentation": "none", "split": "train"}
    assert zoo.rows[1] == {"name": "b.pt", "id": "12e4567", "augmentation": "NA", "split": "test"}
