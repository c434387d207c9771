"""What names of torch stand for in a pickle: tensors that have not been read yet, dtypes, and dicts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from .pickled_values import BadPickle, Name, Placeholder
from .stored import BadTensor, Bytes, Quantised, Storage, StoredTensor

__all__ = ["known_names", "storage_maker"]

_DTYPES = {f"torch.{name}": value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
_STORAGES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
    "ComplexDoubleStorage": torch.complex128, "ComplexFloatStorage": torch.complex64, "QInt8Storage": torch.qint8,
    "QUInt8Storage": torch.quint8, "QInt32Storage": torch.qint32, "UntypedStorage": torch.uint8,
}  # fmt: skip
_SCHEMES = ("per_tensor_affine", "per_tensor_symmetric", "per_channel_affine", "per_channel_symmetric",
            "per_channel_affine_float_qparams")  # fmt: skip
_MAX_ATTRIBUTES = 1000  # values among which the attributes of a tensor are searched
_PACKED = ["bits", "quint4x2", "quint2x4"]  # dtypes whose elements are parts of bytes


class Storages:
    """The name of a storage's class, by its dtype; `untyped` where elements are counted in bytes."""

    __slots__ = ("dtype",)

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype


def storage_maker(source: Bytes) -> Callable[[Any], Any]:
    """Return what makes a storage of a persistent id, `("storage", class, key, place, elements, ...)`.

    Raises of what it returns:
        BadPickle: another persistent id.
    """
    storages: dict[tuple[str, torch.dtype], Storage] = {}

    def make(identifier: Any) -> Any:
        kind = identifier[0] if isinstance(identifier, tuple) and identifier else None
        if kind == "module" and len(identifier) == 4:
            return identifier[1]  # the class of a whole module, with its source code, which old files have
        if kind != "storage" or len(identifier) not in (5, 6):
            raise BadPickle("it refers to data outside itself that is no storage of a tensor")
        _, made, key, _, count, *view = identifier
        if not isinstance(made, Storages) or not isinstance(key, str | int) or not _is_size(count):
            raise BadPickle("it refers to a storage of a tensor in another way than torch's own")
        key = str(key)
        start = 0
        if view and view[0] is not None:  # a part of another storage, in very old files
            part = view[0]
            if not isinstance(part, tuple) or len(part) != 3 or not _is_size(part[1]) or not _is_size(part[2]):
                raise BadPickle("it refers to a part of a storage in another way than torch's own")
            start, total, count = part[1], count, part[2]
            if start + count > total:
                raise BadTensor("it holds a part of a storage that is not in it")
            made_part = Storage(source, key, made.dtype, count, start, total)
            source.declare(made_part)
            return made_part
        if (key, made.dtype) not in storages:
            storages[key, made.dtype] = Storage(source, key, made.dtype, count)
            source.declare(storages[key, made.dtype])
        if storages[key, made.dtype].count != count:
            raise BadTensor(f"it gives storage {key!r:.40} two sizes")
        return storages[key, made.dtype]

    return make


def known_names(nested: Callable[[bytes], Any]) -> Mapping[str, Any]:
    """Return what names stand for in a checkpoint of torch, for `read_pickle`.

    Args:
        nested: what reads a storage that was saved into bytes, as pickles have them that were not written by torch.
    """
    encoded: dict[int, tuple[str, bytes]] = {}
    loaded: dict[int, tuple[bytes, Any]] = {}

    def encode(text: Any, encoding: Any = "latin1") -> bytes:
        # Once per text: a pickle can ask for it again and again in three bytes.
        if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
            raise BadPickle("it encodes text in another way than bytes are pickled")
        if id(text) not in encoded:
            encoded[id(text)] = text, text.encode("latin1")
        return encoded[id(text)][1]

    def load(data: Any) -> Any:
        if not isinstance(data, bytes):
            raise BadPickle("it loads a storage from something that is not bytes")
        if id(data) not in loaded:
            loaded[id(data)] = data, nested(data)
        return loaded[id(data)][1]

    return {**_KNOWN, "_codecs.encode": encode, "torch.storage._load_from_bytes": load}


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**62


def _sizes(value: Any) -> tuple[int, ...]:
    if not isinstance(value, tuple | list):
        raise BadTensor("it holds a tensor whose shape or strides are no sizes")
    return tuple(value)


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, stride: Any) -> StoredTensor:
    return _tensor(storage, offset, shape, stride)


def _rebuild_tensor_v2(
    storage: Any, offset: Any, shape: Any, stride: Any, _grad: Any, _hooks: Any, metadata: Any = None
) -> StoredTensor:
    return _tensor(storage, offset, shape, stride, metadata)


def _rebuild_tensor_v3(
    storage: Any, offset: Any, shape: Any, stride: Any, _grad: Any, _hooks: Any, dtype: Any, metadata: Any = None
) -> StoredTensor:
    if not isinstance(dtype, torch.dtype) or not isinstance(storage, Storage):
        raise BadTensor("it holds a tensor without a storage or a dtype")
    size = storage.dtype.itemsize
    count = storage.count * size // dtype.itemsize
    if storage.start:
        raise BadTensor("it holds a tensor of a dtype over a part of a storage of another")
    return _tensor(Storage(storage.source, storage.key, dtype, count), offset, shape, stride, metadata)


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any, metadata: Any = None) -> StoredTensor:
    if not isinstance(storage, Storage):
        raise BadTensor("it holds a tensor without a storage")
    if any(part in str(storage.dtype) for part in _PACKED):
        raise BadTensor(f"it holds a tensor of dtype {storage.dtype}, which is not read")
    marks = metadata if isinstance(metadata, dict) else {}
    return StoredTensor(
        storage, storage.dtype, offset, _sizes(shape), _sizes(stride),
        conjugated=marks.get("conj") is True, negated=marks.get("neg") is True,
    )  # fmt: skip


def _rebuild_qtensor(
    storage: Any, offset: Any, shape: Any, stride: Any, parameters: Any, _grad: Any, _hooks: Any
) -> StoredTensor:
    plain = _tensor(storage, offset, shape, stride)
    scheme = parameters[0] if isinstance(parameters, tuple) and parameters else None
    numbers: tuple[Any, ...] = parameters[1:] if isinstance(scheme, Scheme) else ()
    if isinstance(scheme, Scheme) and scheme.name == "per_tensor_affine" and len(numbers) == 2:
        scale, zero_point = numbers
        if not isinstance(scale, float) or type(zero_point) is not int or abs(zero_point) >= 2**31:
            raise BadTensor("it holds a quantised tensor whose scale or zero point is no number")
        how = Quantised(plain.dtype, scale, zero_point, None)
    elif isinstance(scheme, Scheme) and scheme.name.startswith("per_channel_affine") and len(numbers) == 3:
        scale, zero_point, axis = numbers
        if not isinstance(scale, StoredTensor) or not isinstance(zero_point, StoredTensor) or not _is_size(axis):
            raise BadTensor("it holds a quantised tensor whose scales or zero points are no tensors")
        how = Quantised(plain.dtype, scale, zero_point, axis)
    else:
        raise BadTensor("it holds a quantised tensor of a scheme that is not read")
    return StoredTensor(plain.storage, plain.dtype, plain.offset, plain.shape, plain.stride, how)


def _rebuild_parameter(data: Any, _grad: Any = True, _hooks: Any = None) -> Any:
    return data


def _rebuild_parameter_with_state(data: Any, _grad: Any, _hooks: Any, state: Any) -> Any:
    return _with_attributes(data, state, "torch.nn.parameter.Parameter")


def _rebuild_from_type_v2(function: Any, kind: Any, arguments: Any, state: Any) -> Any:
    path = kind.path if isinstance(kind, Name) else "a tensor's subclass"
    if not isinstance(function, Name) or function.function is None or not isinstance(arguments, tuple):
        return Placeholder(path, (function, arguments, state))
    return _with_attributes(function.function(*arguments), state, path)


def _with_attributes(data: Any, state: Any, path: str) -> Any:
    """Return the tensor without its attributes, unless these hold tensors, which could say what its numbers mean."""
    waiting, looked_at = [state], 0
    while waiting:
        value = waiting.pop()
        looked_at += 1
        if isinstance(value, StoredTensor | Storage) or looked_at > _MAX_ATTRIBUTES:
            return Placeholder(path, (data, state))
        if isinstance(value, dict):
            waiting += value.values()
        elif isinstance(value, list | tuple):
            waiting += value
        elif isinstance(value, Placeholder):
            waiting += [value.arguments, value.state, value.items, value.entries]
    return data


def _rebuild_sparse_tensor(layout: Any, data: Any) -> Any:
    parts = data[:3] if isinstance(data, tuple) else ()
    if layout != "torch.sparse_coo" or len(parts) != 3 or not all(isinstance(p, StoredTensor) for p in parts[:2]):
        raise BadTensor("it holds a sparse tensor of a layout that is not read; save its .to_dense()")
    shape = _sizes(parts[2])
    return StoredTensor(None, parts[1].dtype, 0, shape, (), sparse=(parts[0], parts[1]))


def _rebuild_meta_tensor_no_storage(dtype: Any, shape: Any, stride: Any, _grad: Any) -> StoredTensor:
    if not isinstance(dtype, torch.dtype):
        raise BadTensor("it holds a tensor of no dtype")
    return StoredTensor(None, dtype, 0, _sizes(shape), _sizes(stride))


def _rebuild_device_tensor_from_cpu_tensor(data: Any, _dtype: Any, _device: Any, _grad: Any) -> Any:
    return data


def _get_layout(name: Any) -> Any:
    return name


def _size(value: Any = ()) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else tuple(_sizes(value))


def _device(*arguments: Any) -> Placeholder:
    return Placeholder("torch.device", arguments)


def _dict(entries: Any = None) -> dict[Any, Any]:
    if entries is None or entries == ():
        return {}
    if isinstance(entries, dict):
        return entries  # not copied: a pickle can ask for it again and again in three bytes
    if isinstance(entries, list) and all(isinstance(e, list | tuple) and len(e) == 2 for e in entries):
        made = {key: value for key, value in map(tuple, entries) if isinstance(key, str | int)}
        if len(made) == len(entries):
            entries.clear()  # so that each list is copied once
            return made
    raise BadPickle("it makes a dict in another way than a dict is pickled")


def _default_dict(_factory: Any = None, entries: Any = None) -> dict[Any, Any]:
    return _dict(entries)


def _complex(real: Any, imaginary: Any) -> complex:
    if not isinstance(real, float) or not isinstance(imaginary, float):
        raise BadPickle("it has a complex number that is none")
    return complex(real, imaginary)


def _bytes(*arguments: Any) -> Any:
    return Placeholder("builtins.bytes", arguments) if arguments else b""  # so old protocols have empty bytes


def _bytearray(*arguments: Any) -> Placeholder:
    return Placeholder("builtins.bytearray", arguments)


def _set(*arguments: Any) -> Placeholder:
    return Placeholder("builtins.set", arguments)


def _made_tensor(*_: Any) -> Any:
    raise BadTensor("it makes a tensor in another way than torch's own")


class Scheme:
    """The name of a scheme of quantisation."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name


_FUNCTIONS: list[Callable[..., Any]] = [
    _rebuild_tensor, _rebuild_tensor_v2, _rebuild_tensor_v3, _rebuild_qtensor, _rebuild_parameter,
    _rebuild_parameter_with_state, _rebuild_sparse_tensor, _rebuild_meta_tensor_no_storage,
    _rebuild_device_tensor_from_cpu_tensor,
]  # fmt: skip
_KNOWN: dict[str, Any] = {
    **_DTYPES,
    **{f"torch.{name}": Storages(dtype) for name, dtype in _STORAGES.items()},
    **{f"torch.cuda.{name}": Storages(dtype) for name, dtype in _STORAGES.items()},
    "torch.storage.UntypedStorage": Storages(torch.uint8),
    **{f"torch.{name}": Scheme(name) for name in _SCHEMES},
    **{f"torch._utils.{function.__name__}": function for function in _FUNCTIONS},
    "torch._tensor._rebuild_from_type_v2": _rebuild_from_type_v2,
    "torch.nn.parameter.Parameter": _rebuild_parameter,
    "torch.nn.parameter.Buffer": _rebuild_parameter,
    "torch.serialization._get_layout": _get_layout,
    "torch.Size": _size,
    "torch.device": _device,
    "collections.OrderedDict": _dict,
    "collections.Counter": _dict,
    "collections.defaultdict": _default_dict,
    "builtins.dict": _dict,
    "builtins.complex": _complex,
    "builtins.bytes": _bytes,
    "builtins.bytearray": _bytearray,
    "builtins.set": _set,
    "torch.Tensor": _made_tensor,
}
