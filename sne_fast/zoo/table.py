"""`Zoo`: many networks with a table of what is known about each, read one by one when they are asked for."""

from __future__ import annotations

import json
from collections.abc import Callable, ItemsView, Iterator, Mapping, Sequence, ValuesView
from os import PathLike
from pathlib import Path
from typing import Any, Protocol, overload

import numpy as np
import torch
from torch import Tensor, nn

from ..data.checkpoints import load_state_dict, save_state_dict
from .architectures import ARCHITECTURES
from .shards import ABOUT, INDEX, PLACE, SHARD_BYTES, ShardSource, ZooWriter, check_places, network_weights, read_index


class Source(Protocol):
    """Where a zoo's networks come from. Sources are pickled to the worker processes of a `DataLoader`."""

    def read(self, i: int) -> dict[str, Tensor]:
        """The state_dict of network `i` in its module's order, tensors of its own."""


class FileSource:
    """One checkpoint per network, each read by the same function."""

    def __init__(self, files: Sequence[Path], reader: Callable[[Path], dict[str, Tensor]] | None = None) -> None:
        self.files = list(files)
        self.reader = reader

    def read(self, i: int) -> dict[str, Tensor]:
        """The checkpoint's tensors by name."""
        if self.reader is not None:
            return self.reader(self.files[i])
        return {name: tensor.clone() for name, tensor in load_state_dict(self.files[i]).items()}


class Zoo:
    """Networks with a table of what is known about each; a sequence that `sne_fast.pack` and an encoder take as it is.

    `zoo[i]` is a network, a mapping of tensor names to tensors that is read on first use; `zoo[a:b]`, `zoo[[2, 0]]` and
    `zoo[mask]` are zoos. `zoo.rows[i]` is the dict of what is known about network i, `zoo.column(name)` one column.
    Makers (`make_digits_zoo`, ...) and loaders (`load_unterthiner`, ...) return one, `save` writes one in this
    package's own form, `Zoo.open` reads that.

    Args:
        columns: equally long lists of plain values by name, with `name` among them.
        source: what reads the networks, see `Source`.
        about: what the whole is; `source` decides how `verify` checks it, `targets` lists columns worth predicting.
        folder: where it lies, for messages.

    Raises:
        ValueError: columns of different lengths, or none called `name`.

    Example:
        >>> zoo = Zoo.open("zoo")
        >>> batch = encoder.pack(zoo)                          # all of them
        >>> batch = encoder.pack(zoo[zoo.column("architecture") == "mlp-10"])
        >>> accuracy = zoo.column("test_accuracy")
    """

    def __init__(
        self,
        columns: Mapping[str, Sequence[Any]],
        source: Source,
        about: Mapping[str, Any] | None = None,
        folder: str | PathLike[str] | None = None,
        *,
        places: Sequence[int] | None = None,
    ) -> None:
        lengths = {name: len(values) for name, values in columns.items()}
        if "name" not in lengths or len(set(lengths.values())) != 1:
            raise ValueError(f"Zoo: columns must be equally long and one called 'name', got {lengths}")
        self._columns = {name: list(values) for name, values in columns.items()}
        self.source = source
        self.about = dict(about or {})
        self.folder = Path(folder) if folder is not None else None
        self._places = list(range(lengths["name"])) if places is None else list(places)

    @classmethod
    def open(cls, folder: str | PathLike[str]) -> Zoo:
        """Read the index of a zoo in this package's form; networks are read when asked for, from mapped files.

        Raises:
            FileNotFoundError: no zoo in `folder`, or an unfinished one.
            ValueError: the index is damaged or lacks a column.
            ModuleNotFoundError: pyarrow is missing.
        """
        folder = Path(folder)
        if not (folder / INDEX).is_file():
            raise FileNotFoundError(f"Zoo.open: {folder} holds no {INDEX}")
        columns = read_index(folder / INDEX)
        missing = {"name", "weights", *PLACE} - set(columns)
        if missing:
            raise ValueError(f"Zoo.open: {folder / INDEX} lacks the column(s) {', '.join(sorted(missing))}")
        shards, positions = (columns.pop(key) for key in PLACE)
        check_places(folder / INDEX, shards, positions)
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8")) if (folder / ABOUT).is_file() else {}
        return cls(columns, ShardSource(folder, shards, positions), about, folder)

    def __len__(self) -> int:
        return len(self._places)

    def __repr__(self) -> str:
        where = str(self.folder) if self.folder is not None else str(self.about.get("source", ""))
        return f"Zoo({where!r}, {len(self)} networks)"

    def __iter__(self) -> Iterator[ZooNetwork]:
        return (ZooNetwork(self, i) for i in range(len(self)))

    @overload
    def __getitem__(self, index: int) -> ZooNetwork: ...
    @overload
    def __getitem__(self, index: slice | Sequence[Any] | np.ndarray | Tensor) -> Zoo: ...

    def __getitem__(self, index: Any) -> ZooNetwork | Zoo:
        """A network, or for a slice, indices or a mask of one boolean per network the zoo of those."""
        if isinstance(index, slice):
            return self._select(list(range(*index.indices(len(self)))))
        array = index.detach().cpu().numpy() if isinstance(index, Tensor) else np.asarray(index)
        if array.dtype.kind not in "iub" and array.size:
            raise TypeError(f"Zoo: index must be ints, booleans or a slice, got {array.dtype}")
        if array.ndim == 0 and array.dtype.kind != "b":
            return ZooNetwork(self, self._at(int(array)))
        if array.dtype.kind == "b":
            if array.shape != (len(self),):
                raise IndexError(f"Zoo: a mask must have one entry per network ({len(self)}), got shape {array.shape}")
            array = np.flatnonzero(array)
        return self._select([self._at(int(i)) for i in array])

    def _at(self, i: int) -> int:
        if not -len(self) <= i < len(self):
            raise IndexError(f"Zoo: index {i} is outside a zoo of {len(self)} networks")
        return i % len(self)

    def _select(self, chosen: list[int]) -> Zoo:
        columns = {name: [values[i] for i in chosen] for name, values in self._columns.items()}
        return Zoo(columns, self.source, self.about, self.folder, places=[self._places[i] for i in chosen])

    @property
    def columns(self) -> list[str]:
        """Names of the columns."""
        return list(self._columns)

    @property
    def rows(self) -> Rows:
        """What is known about each network: a sequence of dicts."""
        return Rows(self._columns)

    @property
    def targets(self) -> list[str]:
        """Columns worth predicting, as the maker or loader said."""
        return [name for name in self.about.get("targets", []) if name in self._columns]

    @property
    def constructors(self) -> Mapping[str, Callable[[], nn.Module]]:
        """Constructors of a fresh module, by the names that the column `architecture` may hold."""
        return ARCHITECTURES

    @property
    def sizes(self) -> Tensor:
        """Weights of each network as `sne_fast.pack` counts them, `(len(zoo),)` int64.

        From the column `weights`; a zoo without it reads every network once.
        """
        if "weights" not in self._columns:
            self._columns["weights"] = [network_weights(self.state_dict(i)) for i in range(len(self))]
        return torch.tensor(self._columns["weights"], dtype=torch.int64)

    def state_dict(self, i: int) -> dict[str, Tensor]:
        """The weights of network `i` in their module's order; tensors of their own, not the mapped file's."""
        return self.source.read(self._places[self._at(i)])

    def find(self, name: str) -> int:
        """The position of the network of that name.

        Raises:
            KeyError: there is none.
        """
        try:
            return self._columns["name"].index(name)
        except ValueError:
            raise KeyError(f"{self.folder or 'the zoo'} has no network {name!r}") from None

    def column(self, name: str) -> np.ndarray:
        """One column, float64 where it holds numbers only (NaN where one is not known), else objects.

        Raises:
            KeyError: no such column.
        """
        if name not in self._columns:
            raise KeyError(f"{self.folder or 'the zoo'} has no column {name!r}; it has {', '.join(self._columns)}")
        values = self._columns[name]
        numeric = all(v is None or isinstance(v, (int, float)) for v in values) and any(v is not None for v in values)
        return np.array(values, dtype=np.float64 if numeric else object)

    def with_column(self, name: str, values: Sequence[Any]) -> Zoo:
        """This zoo with one more column, or another one of that name, such as a `split`; `save` keeps it.

        Args:
            values: one plain value per network, in the order of the rows; arrays and tensors are converted.

        Raises:
            ValueError: another number of values.

        Example:
            >>> from sne_fast.training import stratified_split
            >>> parts = stratified_split(zoo.column("architecture"), (0.8, 0.1, 0.1))
            >>> split = {i: name for name, rows in zip(("train", "val", "test"), parts) for i in rows}
            >>> zoo = zoo.with_column("split", [split[i] for i in range(len(zoo))])
        """
        listed = values.tolist() if hasattr(values, "tolist") else list(values)
        if len(listed) != len(self):
            raise ValueError(
                f"Zoo: the column {name!r} must have one value per network ({len(self)}), got {len(listed)}"
            )
        return Zoo({**self._columns, name: listed}, self.source, self.about, self.folder, places=self._places)

    def save(
        self,
        folder: str | PathLike[str],
        *,
        shard_bytes: int = SHARD_BYTES,
        on_progress: Callable[[float], None] | None = None,
    ) -> Zoo:
        """Write this zoo in the package's own form, whatever it was read from, and return it opened from there.

        Args:
            folder: made if missing; a zoo already there is refused.
            shard_bytes: about how large a shard becomes.
            on_progress: called with the fraction done, in [0, 1].

        Example:
            >>> load_unterthiner("svhn_cropped").save("svhn")
            Zoo('svhn', 20 networks)
        """
        with ZooWriter(folder, shard_bytes=shard_bytes, **{k: v for k, v in self.about.items() if k != "torch"}) as out:
            for i, row in enumerate(self.rows):
                out.add(row.pop("name"), self.state_dict(i), {k: v for k, v in row.items() if k != "weights"})
                if on_progress is not None:
                    on_progress((i + 1) / len(self))
        return Zoo.open(folder)

    def export(self, i: int, path: str | PathLike[str]) -> None:
        """Write network `i` alone, as a safetensors checkpoint that `load_state_dict` and `pack` read."""
        save_state_dict(self.state_dict(i), path)


class Rows(Sequence[dict[str, Any]]):
    """The rows of a table that is kept by columns."""

    def __init__(self, columns: Mapping[str, list[Any]]) -> None:
        self._columns = columns

    def __len__(self) -> int:
        return len(self._columns["name"])

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        return {name: values[i] for name, values in self._columns.items()}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Rows) and self._columns == other._columns

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Rows({len(self)} of {', '.join(self._columns)})"


class ZooNetwork(Mapping[str, Tensor]):
    """One network of a zoo: its tensors by name in module order, read on first use. `str()` is where it lies.

    With `keep=False` they are read again at every use, so that a list of many networks holds no tensors.
    """

    def __init__(self, zoo: Zoo, i: int, *, keep: bool = True) -> None:
        self._zoo = zoo
        self._i = i
        self._keep = keep
        self._read: dict[str, Tensor] | None = None
        self._names: list[str] | None = None

    @property
    def name(self) -> str:
        """Its name in the zoo."""
        return self._zoo._columns["name"][self._i]

    @property
    def row(self) -> dict[str, Any]:
        """What is known about it."""
        return self._zoo.rows[self._i]

    def _tensors(self) -> dict[str, Tensor]:
        if self._read is not None:
            return self._read
        found = self._zoo.state_dict(self._i)
        self._names = list(found)
        if self._keep:
            self._read = found
        return found

    def _keys(self) -> list[str]:
        return self._names if self._names is not None else list(self._tensors())

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._keys():
            raise KeyError(name)
        return self._tensors()[name]

    def items(self) -> ItemsView[str, Tensor]:
        """Names and tensors, read once."""
        return self._tensors().items()

    def values(self) -> ValuesView[Tensor]:
        """The tensors, read once."""
        return self._tensors().values()

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys())

    def __len__(self) -> int:
        return len(self._keys())

    __eq__ = object.__eq__  # tensors do not compare as a mapping's values must
    __hash__ = object.__hash__

    def __str__(self) -> str:
        return str(self._zoo.folder / self.name) if self._zoo.folder is not None else self.name

    def __repr__(self) -> str:
        return f"ZooNetwork({str(self)!r})"


def networks_at(path: str | PathLike[str]) -> list[ZooNetwork] | None:
    """The networks that a path stands for: all of them for a zoo's folder, one for `FOLDER/NAME`, None for any other.

    Raises:
        KeyError: the folder is a zoo, but has neither such a file nor such a network.
    """
    path = Path(path)
    if (path / INDEX).is_file() and (path / ABOUT).is_file():
        zoo = Zoo.open(path)
        return [ZooNetwork(zoo, i, keep=False) for i in range(len(zoo))]
    if not path.exists() and (path.parent / INDEX).is_file() and (path.parent / ABOUT).is_file():
        zoo = Zoo.open(path.parent)
        return [zoo[zoo.find(path.name)]]
    return None
