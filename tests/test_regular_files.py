"""Reading of files from outside: regular files only, bounded, and one kind of error that names the file."""

from __future__ import annotations

import gzip
import json
import os
import socket
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sne_fast.regular_files import FileError, open_regular, parse_json, read_bytes, read_gzip, read_json, read_text


def test_a_regular_file_is_read_also_through_a_link(tmp_path):
    file = tmp_path / "a.txt"
    file.write_bytes(b"first\nsecond")
    link = tmp_path / "link"
    link.symlink_to(file)
    with open_regular(link) as stream:
        assert stream.read() == b"first\nsecond"
    with open_regular(os.fsencode(file), "r") as stream:
        assert stream.readlines() == ["first\n", "second"]


def test_a_pipe_is_refused_without_waiting_for_a_writer(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for read in (open_regular, read_text, read_json, read_gzip):
        with pytest.raises(FileError, match="pipe: must be a regular file, is a named pipe"):
            read(tmp_path / "pipe")


def test_what_takes_the_place_of_a_file_while_it_is_opened_is_refused_too(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    file = tmp_path / "file"
    file.write_text("text")
    found = os.stat(file)
    monkeypatch.setattr(os, "stat", lambda *a, **k: found)
    with pytest.raises(FileError, match="is a named pipe"):
        open_regular(tmp_path / "pipe")


def test_folders_devices_and_sockets_are_refused(tmp_path, monkeypatch):
    with pytest.raises(FileError, match="must be a regular file, is a folder"):
        read_bytes(tmp_path)
    with pytest.raises(FileError, match="/dev/zero: must be a regular file, is a device"):
        read_bytes("/dev/zero")
    monkeypatch.chdir(tmp_path)  # a socket's path is short
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind("s")
        with pytest.raises(FileError, match="s: must be a regular file, is a socket"):
            read_bytes("s")


def test_a_path_that_no_file_can_have_and_a_missing_file():
    with pytest.raises(FileError, match=r"'a\\x00b': cannot be the path of a file"):
        read_bytes("a\0b")
    with pytest.raises(FileError, match="cannot be the path of a file"):
        read_bytes("\ud800")
    with pytest.raises(FileNotFoundError, match="there-is-none"):
        read_bytes("there-is-none")


def test_only_reading_is_offered(tmp_path):
    with pytest.raises(ValueError, match="mode must be 'rb' or 'r', got 'w'"):
        open_regular(tmp_path / "a", "w")


def test_sizes_are_limited(tmp_path):
    file = tmp_path / "a.json"
    file.write_text("[1, 2]")
    assert read_json(file, max_bytes=6) == [1, 2]
    with pytest.raises(FileError, match=r"a\.json: is larger than the limit of 5 bytes"):
        read_json(file, max_bytes=5)


def test_a_gzip_bomb_ends_at_the_limit_and_damage_is_named(tmp_path):
    file = tmp_path / "a.gz"
    file.write_bytes(gzip.compress(bytes(10_000_000)))
    with pytest.raises(FileError, match=r"a\.gz: decompresses to more than the limit of 100000 bytes"):
        read_gzip(file, max_bytes=100_000)
    assert read_gzip(file, max_bytes=10_000_000) == bytes(10_000_000)
    whole = gzip.compress(bytes(range(256)) * 4)
    for damaged in (whole[:-3], whole[:30], b"text", whole[:20] + b"\xff\xff\xff" + whole[23:]):
        file.write_bytes(damaged)
        with pytest.raises(FileError, match=r"a\.gz: is damaged or no gzip file"):
            read_gzip(file)


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path):
    file = tmp_path / "a.json"
    file.write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json(file) == {"a": 1}
    assert read_text(file) == '{"a": 1}'


@pytest.mark.parametrize("content", [b"caf\xe9", '{"a": 1}'.encode("utf-16"), b"\xff\xfe"])
def test_other_encodings_than_utf_8_are_refused(tmp_path, content):
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(FileError, match=r"a: is not text in UTF-8, byte [0-9] "):
        read_text(tmp_path / "a")


@pytest.mark.parametrize("opening", ["[", '{"a":', '[{"a":'])
@pytest.mark.parametrize("depth", [65, 5_000, 200_000])
def test_deep_nesting_is_refused_however_deep(tmp_path, opening, depth):
    closing = {"[": "]", '{"a":': "}", '[{"a":': "}]"}[opening]
    (tmp_path / "deep.json").write_text(opening * depth + "1" + closing * depth)
    with pytest.raises(FileError, match=r"deep\.json: is nested too deeply, more than 64 levels"):
        read_json(tmp_path / "deep.json")


def test_nesting_to_the_limit_is_read():
    assert parse_json("[" * 64 + "]" * 64, "here") == json.loads("[" * 64 + "]" * 64)
    assert parse_json("[[[1]]]", "here", max_depth=3) == [[[1]]]
    with pytest.raises(FileError, match="more than 2 levels"):
        parse_json("[[[1]]]", "here", max_depth=2)


def test_little_stack_left_is_no_recursion_error():
    def down(levels):
        return down(levels - 1) if levels else parse_json("[" * 60 + "]" * 60, "here")

    frames = len(__import__("inspect").stack())
    for left in (30, 40, 60, 100):
        try:
            down(sys.getrecursionlimit() - frames - left)
        except FileError as error:
            assert "nested too deeply" in str(error)
        except RecursionError:  # not even the function could be called
            assert left < 60


@pytest.mark.parametrize("text", ["NaN", "[Infinity]", '{"a": -Infinity}', "1e999", "[-1e400]"])
def test_numbers_that_are_not_finite_are_refused_unless_wanted(text):
    with pytest.raises(FileError, match=r"here: is not valid JSON: .* is no finite number"):
        parse_json(text, "here")
    assert repr(parse_json(text, "here", nonfinite=True)) == repr(json.loads(text))


def test_an_integer_beyond_every_float_is_refused():
    assert parse_json("1" * 300, "here") == int("1" * 300)
    for digits in (301, 4_400, 1_000_000):
        with pytest.raises(FileError, match=f"a number has {digits} digits"):
            parse_json("1" * digits, "here", nonfinite=True)


def test_a_name_twice_and_half_a_surrogate_pair_are_refused():
    with pytest.raises(FileError, match="an object has the name 'a' twice"):
        parse_json('{"b": {"a": 1, "c": 2, "a": 3}}', "here")
    with pytest.raises(FileError, match="half of a surrogate pair"):
        parse_json(r'["\ud83d"]', "here")
    assert parse_json(r'["\ud83d\ude00"]', "here") == ["\U0001f600"]


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        ("[]", dict, "must hold a JSON object, holds a JSON list"),
        ("null", (dict, list), "must hold a JSON object or a JSON list, holds null"),
        ("true", list, "must hold a JSON list, holds true"),
        ("3", dict, "must hold a JSON object, holds a number"),
        ('"x"', dict, "must hold a JSON object, holds a JSON string"),
    ],
)
def test_another_kind_of_content_is_refused(tmp_path, text, kind, message):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(FileError, match=rf"a\.json: {message}"):
        read_json(tmp_path / "a.json", kind)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)


@given(content=JSON, bom=st.booleans(), ascii_only=st.booleans())
def test_any_json_is_read_as_it_was_written(tmp_path_factory, content, bom, ascii_only):
    file = tmp_path_factory.getbasetemp() / "any.json"
    file.write_text(json.dumps(content, ensure_ascii=ascii_only), encoding="utf-8-sig" if bom else "utf-8")
    assert read_json(file) == content


@given(content=JSON, data=st.data())
def test_damaged_json_is_read_or_refused_by_the_name_of_its_file(tmp_path_factory, content, data):
    raw = bytearray(json.dumps(content).encode())
    for _ in range(data.draw(st.integers(1, 3), label="changes")):
        at = data.draw(st.integers(0, len(raw)), label="at")
        change = data.draw(st.sampled_from(["cut", "flip", "insert"]), label="change")
        if change == "cut":
            del raw[at:]
        elif change == "flip" and at < len(raw):
            raw[at] ^= 1 << data.draw(st.integers(0, 7), label="bit")
        else:
            raw[at:at] = data.draw(st.binary(max_size=6) | st.sampled_from([b"[" * 3000, b"9" * 5000, b"\0", b"1e999"]))
    file = tmp_path_factory.getbasetemp() / "damaged.json"
    file.write_bytes(raw)
    try:
        json.dumps(read_json(file), allow_nan=False).encode()
    except FileError as error:
        assert str(error).startswith(str(file))


@given(content=st.binary(max_size=2000), data=st.data())
def test_damaged_gzip_is_read_or_refused_by_the_name_of_its_file(tmp_path_factory, content, data):
    raw = bytearray(gzip.compress(content, mtime=0))
    at = data.draw(st.integers(0, len(raw) - 1), label="at")
    if data.draw(st.booleans(), label="cut"):
        del raw[at:]
    else:
        raw[at] ^= 1 << data.draw(st.integers(0, 7), label="bit")
    file = tmp_path_factory.getbasetemp() / "damaged.gz"
    file.write_bytes(raw)
    try:
        assert read_gzip(file) in (content, b"")
    except FileError as error:
        assert str(error).startswith(str(file))
