"""Formats of files, told by their first bytes and not by their names."""

from __future__ import annotations

import io
import re
import zipfile
from pathlib import Path
from typing import IO, Literal

from ...regular_files import open_regular
from .errors import CheckpointError, reading

__all__ = ["READABLE", "SAVED_MODEL", "Format", "format_of"]

Format = Literal["safetensors", "index", "torch", "onnx", "npz", "npy", "gguf", "hdf5", "keras", "flax", "tflite"]
READABLE = (
    "safetensors, an index of shards, files of torch.save, ONNX, GGUF, Keras, Flax, TFLite and numpy, or a folder of "
    "these"
)

SAVED_MODEL = "is a SavedModel of TensorFlow; save its weights with model.save_weights('name.weights.h5')"

_PICKLE_PROTOCOLS = range(2, 6)
_TAR_PLACE = 257
# Formats that are told from each other only to say which one a file has.
_OTHERS = (
    (b"\x1f\x8b", "compressed by gzip; decompress it first"),
    (b"BZh", "compressed by bzip2; decompress it first"),
    (b"\xfd7zXZ", "compressed by xz; decompress it first"),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd; decompress it first"),
    (b"7z\xbc\xaf", "a 7z archive; unpack it first"),
    (b"Rar!", "a RAR archive; unpack it first"),
    (b"version https://git-lfs", "a pointer of Git LFS and not the file; fetch it with git lfs pull"),
    (b"<!DOCTYPE", "a web page, perhaps the answer to a download that failed"),
    (b"<html", "a web page, perhaps the answer to a download that failed"),
    (b"\xed\xab\xee\xdb", "an RPM package; unpack it first"),
    (b"PAR1", "a table of Parquet and no checkpoint"),
    (b"7767517\n", "a network of ncnn; give the file that it was converted from"),
    (b"lmst", "weights of MNN; give the file that it was converted from"),
)
# Formats told by an identifier behind the first four bytes, as files of flatbuffers have it.
_IDENTIFIED = (
    (b"ORTM", "a model of ONNX Runtime (.ort); give the .onnx file that it was made from"),
    (b"ET12", "a program of ExecuTorch; give the checkpoint that it was made from"),
)
_WHOLE: tuple[tuple[bytes, Format], ...] = (
    (b"GGUF", "gguf"), (b"\x89HDF\r\n\x1a\n", "hdf5"), (b"\x93NUMPY", "npy"),
)  # fmt: skip
# What a name says of a file whose first bytes tell nothing.
_BY_NAME = (
    (r"\.data-\d+-of-\d+$|\.ckpt\.(meta|index)$|^(variables|checkpoint)\.index$",
     "a part of a checkpoint of TensorFlow; load it there and save model.save_weights('n.weights.h5')"),
    (r"\.pb$", "a graph of TensorFlow; convert it to ONNX, or save the weights of its model"),
    (r"\.caffemodel$", "a network of Caffe; convert it to ONNX"),
    (r"\.(engine|plan|trt)$", "compiled by TensorRT; give the file that it was built from"),
    (r"\.params$", "a file of MXNet; convert it to ONNX"),
    (r"\.(dlc|rknn|om|hef|blob)$", "compiled for one device; give the file that it was built from"),
)  # fmt: skip
_MAP_KEYS = (*range(0xA0, 0xC0), 0xD9)  # of msgpack: the marks of short texts
_ONNX_FIELDS = (0x12, 0x1A, 0x22, 0x28, 0x32, 0x3A, 0x42)  # that follow the version in what onnx writes


def format_of(file: Path) -> Format:
    """Return the format of a file.

    Raises:
        CheckpointError: a file that is missing, empty, or of no format that is read; the message names it.
    """
    with reading(file), open_regular(file) as opened:
        size = opened.seek(0, io.SEEK_END)
        opened.seek(0)
        beginning = opened.read(512)
    if not beginning:
        raise CheckpointError(f"{file}: is damaged or no {_claimed(file)}: it is empty")
    # First, for the length of a header can be the first bytes of any other format: 640 those of a pickle of protocol 2,
    # 35,615 those of gzip. No other format has the zeros that follow, and a brace.
    if beginning[8:9] == b"{" and 0 < int.from_bytes(beginning[:8], "little") <= size - 8:
        return "safetensors"
    if beginning[64:68] == b"\xef\xbe\xad\xde" or file.suffix == ".mlmodel":
        raise CheckpointError(f"{file}: is a part of a Core ML package; give the checkpoint that it was made from")
    if file.name == "saved_model.pb":
        raise CheckpointError(f"{file}: {SAVED_MODEL}")
    for first, known in _WHOLE:
        if beginning.startswith(first):
            return known
    if beginning[4:8] == b"TFL3":
        return "tflite"
    for mark, what in _IDENTIFIED:
        if beginning[4:8] == mark:
            raise CheckpointError(f"{file}: is {what}")
    for first, what in _OTHERS:
        if beginning.startswith(first):
            raise CheckpointError(f"{file}: is {what}; readable are {READABLE}")
    if beginning[_TAR_PLACE : _TAR_PLACE + 5] == b"ustar":
        raise CheckpointError(f"{file}: is a tar archive; unpack it and give the path of a file in it")
    if beginning.startswith(b"PK"):
        return _of_archive(file)
    if beginning[0] == 0x80 and beginning[1:2] and beginning[1] in _PICKLE_PROTOCOLS:
        return "torch"
    if file.suffix == ".safetensors":
        return "safetensors"
    if beginning.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"{":
        return "index"
    if beginning[:1] in (b"(", b"]", b"}", b"c", b"l", b"d"):  # pickles of protocols 0 and 1 have no mark
        return "torch"
    if _begins_onnx(beginning) or file.suffix.lower() == ".onnx":
        return "onnx"
    if _begins_map(beginning) or file.suffix.lower() == ".msgpack":
        return "flax"
    for ending, what in _BY_NAME:
        if re.search(ending, file.name.lower()):
            raise CheckpointError(f"{file}: is by its name {what}")
    raise CheckpointError(
        f"{file}: is damaged or no {_claimed(file)}: cannot tell what it is by its first bytes; readable are {READABLE}"
    )


def _begins_onnx(beginning: bytes) -> bool:
    """Return whether bytes are the beginning of a protobuf whose first field is a small version."""
    return beginning[0] == 0x08 and len(beginning) > 2 and 0 < beginning[1] < 64 and beginning[2] in _ONNX_FIELDS


def _begins_map(beginning: bytes) -> bool:
    """Return whether bytes are the beginning of a map of msgpack whose first key is a text."""
    head = 1 if 0x81 <= beginning[0] <= 0x8F else {0xDE: 3, 0xDF: 5}.get(beginning[0], 0)
    return head > 0 and len(beginning) > head and beginning[head] in _MAP_KEYS


def _of_archive(file: Path) -> Format:
    """Return the format of a zip by the names in it; one of torch where they tell nothing."""
    with reading(file), open_regular(file) as opened:
        names = _names_in(opened)
    if "model.weights.h5" in names:
        return "keras"
    if names and all(name.endswith(".npy") for name in names):
        return "npz"
    if "[Content_Types].xml" in names:
        raise CheckpointError(f"{file}: is an Office document and no checkpoint")
    if any(name.endswith(".mlmodel") for name in names):
        raise CheckpointError(f"{file}: is a Core ML package; give the checkpoint that it was made from")
    return "torch"


def _names_in(opened: IO[bytes]) -> list[str]:
    try:
        with zipfile.ZipFile(opened) as archive:
            return archive.namelist()
    except Exception:  # a damaged archive, of which the reader of torch's files says what is wrong
        return []


def _claimed(file: Path) -> str:
    """Return what a file should be by its name, for messages."""
    name = file.name.lower()
    if name.endswith(".safetensors"):
        return "safetensors file"
    claims = {".json": "index of shards", ".gguf": "GGUF file", ".h5": "HDF5 file", ".hdf5": "HDF5 file",
              ".keras": "file of Keras", ".npz": "archive of numpy", ".npy": "array of numpy",
              ".tflite": "file of TFLite", ".msgpack": "file of Flax", ".onnx": "ONNX file"}  # fmt: skip
    return next((what for ending, what in claims.items() if name.endswith(ending)), "checkpoint of torch")
