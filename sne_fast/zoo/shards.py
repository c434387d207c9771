"""A zoo on disk: safetensors shards of stacked networks, and a parquet index with one row per network.

    FOLDER/index.parquet             one row per network: name, what is known about it, shard, position, weights
    FOLDER/zoo.json                  description of the zoo: source, arguments, which columns are targets
    FOLDER/shards/NAME.safetensors   networks of the same tensor names and shapes: each tensor is (K, *shape)

Network k of a shard is row k of each of its tensors. The metadata `sne_fast.order` (a JSON list) keeps the module's
order of the tensors, which safetensors itself does not keep; a tied tensor is held once, and the metadata map its
other names to the first. Tensors are named `stack.NAME`, so that a shard that is
read as a checkpoint is refused and not taken for one large network.
"""

from __future__ import annotations

import json
import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..atomic_files import remove_leftovers, to_json, write_json, write_text
from ..data.checkpoints import ORDER_KEY, CheckpointError, save_state_dict
from ..data.layers import collect
from ..data.tied_names import identity_of, with_tied_names
from ..file_locks import holding
from ..regular_files import FileError, check_regular, parse_json, read_json
from .index import ABOUT, INDEX, PLACE, write_index

UNFINISHED = "unfinished.json"
LOCK = ".lock"
SHARDS = "shards"
SHARD_BYTES = 64 << 20
_STACK = "stack."
MAPPED_BYTES = 1 << 30
"""Bytes of shards that are mapped at once; pages that were read count as memory of the process until unmapped."""


class ShardSource:
    """Source that reads networks out of mapped shards, of which only the memory pages of those networks are loaded.

    Args:
        folder: of the zoo.
        shards: the shard of each network.
        positions: the position of each network in its shard.

    Attributes:
        mapped_bytes: the most bytes of shards that stay mapped, but for the last one; at first `MAPPED_BYTES`.
    """

    def __init__(self, folder: Path, shards: Sequence[str], positions: Sequence[int]) -> None:
        self.folder = folder
        self.shards = list(shards)
        self.positions = list(positions)
        self.mapped_bytes = MAPPED_BYTES
        self._open: OrderedDict[str, dict[str, Tensor]] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}  # a worker process maps the files itself

    def read(self, i: int) -> dict[str, Tensor]:
        """Return the state_dict of network `i`, copied out of its shard."""
        position = self.positions[i]
        stacked = self.stacked(self.shards[i])
        held = next(iter(stacked.values())).shape[0]
        if not 0 <= position < held:
            raise CheckpointError(f"{self._file(self.shards[i])}: holds {held} networks, the index wants {position}")
        copies: dict[int, Tensor] = {}  # tied tensors share a copy
        return {name: copies.setdefault(id(t), t[position].clone()) for name, t in stacked.items()}

    def stacked(self, shard: str) -> dict[str, Tensor]:
        """Return all networks of a shard as mapped tensors `(K, *shape)`, the form that `torch.func.vmap` takes."""
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        found = _map_shard(self._file(shard))
        self._open[shard] = found
        held = {name: sum(t.nbytes for t in tensors.values()) for name, tensors in self._open.items()}
        while len(self._open) > 1 and sum(held.values()) > self.mapped_bytes:
            del held[self._open.popitem(last=False)[0]]
        return found

    def _file(self, shard: str) -> Path:
        return self.folder / SHARDS / f"{shard}.safetensors"


def _map_shard(file: Path) -> dict[str, Tensor]:
    try:
        check_regular(file)
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            names = parse_json(metadata.get(ORDER_KEY, "null"), ORDER_KEY, list)
            held = with_tied_names({name: opened.get_tensor(name) for name in opened.keys()}, metadata)  # noqa: SIM118
            if not names or sorted(f"{_STACK}{name}" for name in names) != sorted(held):
                raise ValueError(f"{ORDER_KEY} does not name its tensors")
            found = {name: held[f"{_STACK}{name}"] for name in names}
    except FileNotFoundError as error:
        raise CheckpointError(f"{file}: the zoo's index names this shard, but it is missing") from error
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{file}: is damaged or no shard of a zoo: {error}") from error
    if len({tensor.shape[:1] for tensor in found.values()}) != 1 or any(tensor.ndim == 0 for tensor in found.values()):
        raise CheckpointError(f"{file}: is no shard of a zoo: its tensors are not of one shape (networks, ...)")
    return found


def network_weights(state_dict: Mapping[str, Tensor]) -> int:
    """Return the number of weights that `sne_fast.pack` takes from a state_dict."""
    return sum(tensor.numel() for layer in collect(0, state_dict).layers for _, tensor in layer.tensors)


class ZooWriter:
    """Writer of a zoo, network by network or group by group; it writes the index last, so only a whole zoo has one.

    It is a context manager. If the block raises, no index is written: the files are removed, or with `resume` kept, and
    a writer with the same arguments resumes.

    Args:
        folder: the folder of the zoo, made if missing.
        resume: keep the finished groups when the block raises, and start from those that are there.
        shard_bytes: approximate size of a shard that `add` fills.
        about: description of the zoo, kept in `zoo.json`. `source` names the maker or loader, which tells `verify` how
            to check the zoo; `targets` and `hyperparameters` list columns.

    Raises:
        BlockingIOError: another writer holds the folder; the message names its process.
        FileExistsError: the folder holds a zoo, or without `resume` an unfinished one.
        ValueError: with `resume`, the folder holds an unfinished zoo of other arguments.

    Example:
        >>> with ZooWriter("mine", source="mine") as writer:
        ...     writer.add("first", torch.nn.Linear(4, 3).state_dict(), {"accuracy": 0.9})
        >>> Zoo.open("mine")
        Zoo('mine', 1 networks)
    """

    def __init__(
        self, folder: str | PathLike[str], *, resume: bool = False, shard_bytes: int = SHARD_BYTES, **about: Any
    ) -> None:
        self.folder = Path(folder)
        # With torch's version, since another version may compute other bits, and no zoo is made by two versions.
        self.about = json.loads(to_json({**about, "torch": torch.__version__}))
        self._resume = resume
        self._shard_bytes = shard_bytes
        self._columns: list[str] | None = None
        self._next = 0
        self._names: set[str] = set()
        self._held: dict[tuple, list[tuple[int, dict[str, Tensor], dict[str, Any]]]] = {}
        self._held_bytes: dict[tuple, int] = {}
        self._parts: dict[str, list[dict[str, Any]]] = {}
        with ExitStack() as stack:
            stack.enter_context(holding(self.folder / LOCK, f"zoo: the folder {str(folder)!r}", "choose another"))
            self._take_up()
            self._lock = stack.pop_all()

    def _take_up(self) -> None:
        unfinished = self.folder / UNFINISHED
        # A run that was killed after it wrote the index may have left files that only an unfinished zoo needs.
        if (self.folder / INDEX).exists() and not (self._resume and unfinished.exists()):
            self._remove_unfinished()
            raise FileExistsError(f"{self.folder} holds a zoo already; choose another folder or remove it")
        (self.folder / SHARDS).mkdir(exist_ok=True)
        if not unfinished.exists():
            write_json(unfinished, self.about)
            return
        if not self._resume:
            raise FileExistsError(f"{self.folder} holds an unfinished zoo; choose another folder or remove it")
        there = read_json(unfinished, dict)
        if there != self.about:
            differ = [
                f"{key} {there.get(key)!r} there, {self.about.get(key)!r} here"
                for key in sorted({*there, *self.about})
                if there.get(key) != self.about.get(key)
            ]
            raise ValueError(
                f"{self.folder} holds an unfinished zoo made with other arguments ({'; '.join(differ)}); "
                "give the same ones to go on, or choose another folder"
            )
        for file in sorted((self.folder / SHARDS).glob("*.rows.json")):
            rows = _read_rows(file)
            self._parts[file.name.removesuffix(".rows.json")] = rows
            self._names.update(row["name"] for row in rows)
            self._columns = self._columns or _own_columns(rows[0])

    def has(self, group: str) -> bool:
        """Return True if `add_group` has written a group, in this run or in an interrupted one."""
        return group in self._parts

    def add(self, name: str, state_dict: Mapping[str, Tensor], row: Mapping[str, Any]) -> None:
        """Add one network, which is written together with others of the same tensors.

        Args:
            name: of the network, unique in the zoo.
            state_dict: its tensors.
            row: what is known about it: numbers, strings, booleans, and None for what is not known.

        Raises:
            ValueError: a number that is not finite, other columns than those of the first network, or a name used
                twice.
            TypeError: a value that is not a plain one.
        """
        entry = self._entry(name, row)
        copies: dict[object, tuple[str, Tensor]] = {}
        for key, tensor in state_dict.items():
            if (identity := identity_of(tensor)) not in copies:
                copies[identity] = key, tensor.detach().cpu().clone()
        held = {key: copies[identity_of(tensor)] for key, tensor in state_dict.items()}
        tensors = {key: tensor for key, (_, tensor) in held.items()}
        if not tensors:
            raise ValueError(f"zoo: {name} must hold at least one tensor, got none")
        signature = tuple((key, tuple(t.shape), t.dtype, first) for key, (first, t) in held.items())
        self._held.setdefault(signature, []).append((self._next, tensors, entry))
        size = sum(tensor.nbytes for _, tensor in copies.values())
        self._held_bytes[signature] = self._held_bytes.get(signature, 0) + size
        self._next += 1
        if self._held_bytes[signature] >= self._shard_bytes:
            self._flush(signature)
        elif sum(self._held_bytes.values()) >= 4 * self._shard_bytes:  # networks of many shapes, few of each
            for each in list(self._held):
                self._flush(each)

    def add_group(
        self, group: str, first: int, stacked: Mapping[str, Tensor], rows: Sequence[tuple[str, Mapping[str, Any]]]
    ) -> None:
        """Write K networks of the same tensors as one shard, whole or not at all.

        Args:
            group: name of the shard.
            first: position of its first network in the index.
            stacked: tensors `(K, *shape)` in module order.
            rows: K pairs of name and row, as in `add`.

        Raises:
            ValueError: tensors that are not of that shape, a group written already, or what `add` refuses.
            TypeError: a value that is not a plain one.
        """
        shapes = {key: tuple(t.shape) for key, t in stacked.items()}
        if not shapes or any(not shape or shape[0] != len(rows) for shape in shapes.values()):
            raise ValueError(f"zoo: the tensors of group {group!r} must be of shape ({len(rows)}, ...), got {shapes}")
        entries = [self._entry(name, row) for name, row in rows]
        self._write(group, dict(stacked), [(first + k, entry) for k, entry in enumerate(entries)])
        self._next = max(self._next, first + len(rows))

    def _entry(self, name: str, row: Mapping[str, Any]) -> dict[str, Any]:
        entry = {"name": name, **row}
        for key, value in entry.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"zoo: {key} of {name} must be finite, got {value}; None says that it is not known")
            if value is not None and not isinstance(value, (bool, int, float, str)):
                raise TypeError(f"zoo: {key} of {name} must be a number or a string, got {type(value).__name__}")
            if key in (*PLACE, "weights", "order"):
                raise ValueError(f"zoo: a column cannot be called {key!r}, the index has one of its own")
        if self._columns is None:
            self._columns = list(entry)
        if list(entry) != self._columns:
            raise ValueError(f"zoo: {name} must have the columns {self._columns}, got {list(entry)}")
        if not name or any(c in name for c in "/\\\0") or name in self._names:
            raise ValueError(f"zoo: names must be unique and without slashes, got {name!r}")
        self._names.add(name)
        return entry

    def _flush(self, signature: tuple) -> None:
        held = self._held.pop(signature)
        self._held_bytes.pop(signature)
        firsts = {first: torch.stack([tensors[first] for _, tensors, _ in held]) for *_, first in signature}
        stacked = {key: firsts[first] for key, _, _, first in signature}
        self._write(f"{len(self._parts):05d}", stacked, [(order, entry) for order, _, entry in held])

    def _write(self, part: str, stacked: dict[str, Tensor], entries: Sequence[tuple[int, dict[str, Any]]]) -> None:
        if part in self._parts:
            raise ValueError(f"zoo: the group {part!r} has been written already")
        firsts: dict[int, Tensor] = {}
        weights = network_weights({key: firsts.setdefault(id(t), t[0]) for key, t in stacked.items()})
        rows = [
            {**entry, "weights": weights, "shard": part, "position": k, "order": order}
            for k, (order, entry) in enumerate(entries)
        ]
        base = self.folder / SHARDS / part
        save_state_dict(
            {_STACK + key: t for key, t in stacked.items()},
            base.with_name(f"{part}.safetensors"),
            metadata={ORDER_KEY: json.dumps(list(stacked))},
        )
        # Written last, so that its shard is whole.
        write_text(base.with_name(f"{part}.rows.json"), to_json(rows, indent=None))
        self._parts[part] = rows

    def __enter__(self) -> ZooWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._end(kind)

    def _end(self, kind: type[BaseException] | None) -> None:
        finished = False
        try:
            if kind is None:
                self._finish()
                finished = True
        finally:
            if not finished and not self._resume:
                for part in self._parts:
                    (self.folder / SHARDS / f"{part}.safetensors").unlink(missing_ok=True)
            if finished or not self._resume:
                self._remove_unfinished()

    def _finish(self) -> None:
        for signature in list(self._held):
            self._flush(signature)
        rows = sorted((row for part in self._parts.values() for row in part), key=lambda row: row["order"])
        if rows:
            write_json(self.folder / ABOUT, self.about)
            columns = [key for key in rows[0] if key != "order"]
            write_index({key: [row[key] for row in rows] for key in columns}, self.folder / INDEX)

    def _remove_unfinished(self) -> None:
        remove_leftovers(self.folder)
        remove_leftovers(self.folder / SHARDS)
        (self.folder / UNFINISHED).unlink(missing_ok=True)  # first: with it all rows are there
        for rows in (self.folder / SHARDS).glob("*.rows.json"):
            rows.unlink(missing_ok=True)


def _read_rows(file: Path) -> list[dict[str, Any]]:
    """Read the rows of a finished group.

    Raises:
        FileError: the file is damaged.
    """
    rows = read_json(file, list)
    if not rows or not all(
        isinstance(row, dict) and isinstance(row.get("name"), str) and "order" in row for row in rows
    ):
        raise FileError(f"{file}: is damaged, it must hold a row for each network of its shard")
    return rows


def _own_columns(row: Mapping[str, Any]) -> list[str]:
    return [key for key in row if key not in (*PLACE, "weights", "order")]
