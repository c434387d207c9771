"""Pickles put together opcode by opcode, and hostile ones that call numpy: each value with the words that refuse it."""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

WEIGHTS = OrderedDict([("seq.0.weight", torch.arange(6.0).view(2, 3)), ("seq.0.bias", torch.ones(2))])
CORES = ("numpy.core.multiarray", "numpy._core.multiarray")


def name(path: str) -> bytes:
    module, _, own = path.rpartition(".")
    return f"c{module}\n{own}\n".encode()


def value(of: object) -> bytes:
    """Return the opcodes of a plain value, of those that torch reads; bytes are taken for opcodes."""
    if isinstance(of, bytes):
        return of
    if of is None or isinstance(of, bool):
        return {None: b"N", True: b"\x88", False: b"\x89"}[of]
    if isinstance(of, int):
        data = pickle.encode_long(of)
        return b"\x8a" + bytes([len(data)]) + data
    if isinstance(of, str):
        data = of.encode("utf-8", "surrogatepass")
        return b"X" + struct.pack("<I", len(data)) + data
    assert isinstance(of, tuple)
    return b"(" + b"".join(map(value, of)) + b"t"


def call(function: bytes, *arguments: object) -> bytes:
    return function + value(arguments) + b"R"


def new(kind: bytes, *arguments: object) -> bytes:
    return kind + value(arguments) + b"\x81"


def build(made: bytes, state: object) -> bytes:
    return made + value(state) + b"b"


def raw(data: bytes) -> bytes:
    return call(name("_codecs.encode"), data.decode("latin1"), "latin1")


NDARRAY, DTYPE = name("numpy.ndarray"), name("numpy.dtype")
RECONSTRUCT, SCALAR = name(f"{CORES[1]}._reconstruct"), name(f"{CORES[1]}.scalar")
PLAIN = (3, "<", None, None, None, -1, -1, 0)
EMPTY = call(RECONSTRUCT, NDARRAY, (0,), raw(b"b"))
F8, OBJECT = (build(call(DTYPE, kind, False, True), PLAIN) for kind in ("f8", "O8"))
ADDRESS = struct.pack("<Q", 0x4142434445464748)


def array(shape: object = (1,), dtype: bytes = F8, data: object = None, column_major: object = False) -> bytes:
    return build(EMPTY, (1, shape, dtype, column_major, raw(ADDRESS) if data is None else data))


def with_pickle(file: Path, change: Callable[[bytes], bytes]) -> None:
    """Write the checkpoint of the weights with its pickle changed."""
    buffer = io.BytesIO()
    torch.save(dict(WEIGHTS), buffer)
    with zipfile.ZipFile(buffer) as source, zipfile.ZipFile(file, "w") as out:
        for entry in source.namelist():
            content = source.read(entry)
            out.writestr(entry, change(content) if entry.endswith("/data.pkl") else content)


def with_value(file: Path, opcodes: bytes) -> None:
    """Write the weights with `coef` beside them, whose value is what the opcodes leave."""
    with_pickle(
        file, lambda content: b"\x80\x02}" + value("w") + body(content) + b"s" + value("coef") + opcodes + b"s."
    )


def body(content: bytes) -> bytes:
    """Return the opcodes of the first weight: the call of torch that rebuilds it."""
    start = content.index(b"ctorch._utils\n_rebuild_tensor_v2")
    return content[start : content.index(b"X\x0a\x00\x00\x00seq.0.bias")]


BAD_DTYPE = "it holds a numpy value of dtype"
BAD_STATE = "it holds a numpy dtype that is not plain and little-endian"
BAD_ARRAY = "it makes an array of numpy in another way than numpy's own"
BAD_SHAPE = "it holds a numpy array of a shape that cannot be"
BAD_BYTES = "it holds a numpy value with "
OTHER_CODE = "refused, it holds "
DTYPES = (
    "O", "|O", "object", "V8", "f8,O", "M8", "U2", "S8", "c16", "f2", "u8", "b1", ">f8", "", "x" * 999, ("f8", "O"),
    ("O", (1,)), None, 8,
)  # fmt: skip
DTYPE_STATES: tuple[object, ...] = (
    (3, ">", None, None, None, -1, -1, 0),
    (3, "|", None, None, None, -1, -1, 63),  # the flags of an object dtype
    (3, "<", None, None, None, -1, -1, 1),
    (3, "<", None, None, None, 2**31, 1, 0),
    (3, "<", None, ("a",), b"}" + value("a") + value((F8, 2**40)) + b"s", 8, 1, 0),
    (3, "<", (F8, (2**40,)), None, None, 8, 1, 0),
    (4, "<", None, None, None, -1, -1, 0, (None, ("D", 1, 1, 1))),
    (2, "<", None, None, -1, -1, 0), (), None, 1, "<",
)  # fmt: skip
OTHER_CALLS: tuple[tuple[Any, ...], ...] = (
    ("numpy.frombuffer", raw(ADDRESS), "O"), ("numpy.load", "x.npy"), ("numpy.fromfile", "/etc/passwd"),
    ("numpy.dtypes.Float64DType",), ("numpy.float64", raw(ADDRESS)), ("numpy.matrix", "1"),
    ("numpy.core.multiarray.array", (1,)), ("numpy._core.numeric._frombuffer", raw(ADDRESS), F8, (1,), "C"),
    ("numpy.random._pickle.__randomstate_ctor",), ("numpy.ma.core._mareconstruct", NDARRAY, NDARRAY, (0,), "b"),
    ("numpy.ndarray.__setstate__", EMPTY, ()), ("numpy.core.multiarray._reconstruct.__call__",),
    ("sne_fast.data.readers.numpy_values._view", F8, 1, raw(ADDRESS)), ("sne_fast.data.readers.numpy_values.Array",),
)  # fmt: skip
# By name: the opcodes of a value, and words of the message that refuses it.
HOSTILE: dict[str, tuple[bytes, str]] = {
    "object array over bytes": (array(dtype=OBJECT), BAD_DTYPE),
    "object array by ndarray": (call(NDARRAY, (1,), OBJECT, raw(ADDRESS)), BAD_DTYPE),
    "object array by ndarray and an unfilled dtype": (
        call(NDARRAY, (1,), call(DTYPE, "O8"), raw(ADDRESS)),
        BAD_DTYPE,
    ),
    "object array over bytes of an unfilled dtype": (array(dtype=call(DTYPE, "O8", False, True)), BAD_DTYPE),
    "object scalar of an unfilled dtype": (call(SCALAR, call(DTYPE, "O8"), raw(ADDRESS)), BAD_DTYPE),
    "float array by ndarray": (call(NDARRAY, (1,), F8, raw(ADDRESS)), BAD_ARRAY),
    "ndarray made new": (new(NDARRAY, (1,), F8, raw(ADDRESS)), BAD_ARRAY),
    "ndarray with strides": (call(NDARRAY, (9,), F8, raw(ADDRESS), 0, (2**40,)), BAD_ARRAY),
    "dtype made new": (new(DTYPE, "O8", False, True), BAD_DTYPE),
    "object scalar": (call(SCALAR, OBJECT, raw(ADDRESS)), BAD_DTYPE),
    "scalar of a name": (call(SCALAR, "O8", raw(ADDRESS)), "it makes a scalar of numpy"),
    "scalar too short": (call(SCALAR, F8, raw(ADDRESS[:7])), BAD_BYTES + "7 bytes where its shape takes 8"),
    "scalar too long": (call(SCALAR, F8, raw(ADDRESS * 2)), BAD_BYTES + "16 bytes"),
    "scalar of text": (call(SCALAR, F8, "12345678"), BAD_BYTES + "an object of type str"),
    "scalar without bytes": (call(SCALAR, F8), "it makes a scalar of numpy"),
    **{f"dtype {kind!r}": (array(dtype=build(call(DTYPE, kind, False, True), PLAIN)), BAD_DTYPE) for kind in DTYPES},
    "dtype of a class": (call(DTYPE, NDARRAY, False, True), BAD_DTYPE),
    "dtype of dtype": (call(DTYPE, F8, False, True), BAD_DTYPE),
    "dtype of nothing": (call(DTYPE), BAD_DTYPE),
    "dtype aligned": (call(DTYPE, "f8", True, True), "it makes a dtype of numpy"),
    "dtype with metadata": (call(DTYPE, "f8", False, True, ()), "it makes a dtype of numpy"),
    "dtype of a dict": (call(DTYPE, b"}" + value("names") + value(("a",)) + b"s", False, True), BAD_DTYPE),
    **{
        f"dtype state {i}": (array(dtype=build(call(DTYPE, "f8", False, True), state)), BAD_STATE)
        for i, state in enumerate(DTYPE_STATES)
    },
    **{
        f"shape {shape!r:.30}": (array(shape), BAD_SHAPE)
        for shape in ((-1,), (-1, -1), (0,), (0, 2**62), (True,), ("1",), (None,), "1", 1, None, (1,) * 9, ((1,),))
    },
    **{
        f"shape {shape!r:.30} of 8 bytes": (array(shape), BAD_BYTES + "8 bytes")
        for shape in ((2,), (2**40,), (2**62, 4), (2**32, 2**32), (2**61,), (2**200, 2**200), (1, 2))
    },
    "array too long": (array((1,), data=raw(ADDRESS * 2)), BAD_BYTES + "16 bytes where its shape takes 8"),
    "array of no bytes": (array((1,), data=raw(b"")), BAD_BYTES + "0 bytes"),
    "array over text": (array(data="12345678"), BAD_BYTES + "an object of type str"),
    "array over a bytearray": (array(data=call(name("builtins.bytearray"), raw(ADDRESS))), BAD_BYTES),
    "array over a list of objects": (array(data=b"]" + NDARRAY + b"a"), BAD_BYTES),
    "array of a dtype's name": (array(dtype=value("f8")), BAD_ARRAY),
    "array of a class": (array(dtype=DTYPE), BAD_ARRAY),
    "array with a number for its order": (array(column_major=1), BAD_ARRAY),
    "array filled twice": (build(array(), (1, (1,), F8, False, raw(ADDRESS))), BAD_ARRAY),
    "array state of old": (build(EMPTY, ((1,), F8, False, raw(ADDRESS))), BAD_ARRAY),
    "array state of version 2": (build(EMPTY, (2, (1,), F8, False, raw(ADDRESS))), BAD_ARRAY),
    "array state no tuple": (build(EMPTY, None), BAD_ARRAY),
    "array state of names": (build(EMPTY, b"}" + value("_view") + value(1) + b"s"), BAD_ARRAY),
    "reconstruct of a dtype": (call(RECONSTRUCT, DTYPE, (0,), raw(b"b")), BAD_ARRAY),
    "reconstruct of objects": (call(RECONSTRUCT, NDARRAY, (1,), raw(b"O")), BAD_ARRAY),
    "reconstruct of a shape": (call(RECONSTRUCT, NDARRAY, (2**40,), raw(b"b")), BAD_ARRAY),
    "reconstruct of nothing": (call(RECONSTRUCT), BAD_ARRAY),
    "reconstruct of a tensor": (call(RECONSTRUCT, name("torch.Tensor"), (0,), raw(b"b")), BAD_ARRAY),
    "a tensor from an array": (
        call(name("torch._utils._rebuild_device_tensor_from_numpy"), array(), name("torch.float64"), "cpu", False),
        OTHER_CODE,
    ),
    **{path: (call(name(path), *arguments), OTHER_CODE) for path, *arguments in OTHER_CALLS},
    "STACK_GLOBAL": (value("numpy") + value("ndarray") + b"\x93", OTHER_CODE),
    "INST": (b"(" + value("O8") + b"inumpy\ndtype\n", OTHER_CODE),
    "OBJ": (b"(" + DTYPE + value("O8") + b"o", OTHER_CODE),
    "NEWOBJ_EX": (NDARRAY + value(((1,), F8)) + b"}\x92", OTHER_CODE),
    "EXT1": (b"\x82\x7b", OTHER_CODE),
    "EXT4": (b"\x84\x7b\x00\x00\x00", OTHER_CODE),
    "PERSID": (b"Pnumpy.ndarray\n", "is damaged or no checkpoint"),
    "BINPERSID of a name": (value("numpy.ndarray") + b"Q", "is damaged or no checkpoint"),
    "BINPERSID of an array": (EMPTY + b"Q", "is damaged or no checkpoint"),
    "BINPERSID of another kind": (value(("array", NDARRAY, "0", "cpu", 1)) + b"Q", "is damaged or no checkpoint"),
    "BINPERSID of numpy's class": (value(("storage", NDARRAY, "0", "cpu", 1)) + b"Q", "is damaged or no checkpoint"),
    "REDUCE of an array": (call(array(), 1), OTHER_CODE),
    "REDUCE of a dtype": (call(F8, 1), OTHER_CODE),
    "BUILD of a class": (build(NDARRAY, ()), OTHER_CODE),
    "BUILD of a function": (build(RECONSTRUCT, b"}" + value("__code__") + b"Ns"), OTHER_CODE),
    "SETITEM of an array": (array() + value(0) + value(1) + b"s", OTHER_CODE),
    "APPEND to an array": (array() + value(1) + b"a", OTHER_CODE),
}
