"""`Zoo`: many networks, read one by one when they are asked for, and a table of what is known about each."""

from __future__ import annotations

from collections.abc import Callable, ItemsView, Iterator, Mapping, Sequence, ValuesView
from os import PathLike
from pathlib import Path
from typing import Any, Protocol, overload

import numpy as np
import torch
from torch import Tensor, nn

from ..data.checkpoints import load_state_dict, save_state_dict
from .architectures import ARCHITECTURES
from .index import ABOUT, INDEX, PLACE, check_columns, read_about, read_index
from .shards import SHARD_BYTES, ShardSource, ZooWriter, network_weights


class Source(Protocol):
    """Reader of the networks of a zoo; it is pickled to the worker processes of a `DataLoader`."""

    def read(self, i: int) -> dict[str, Tensor]:
        """Return the state_dict of network `i` in its module's order, with tensors of its own."""


class FileSource:
    """Source with one checkpoint per network, all read by the same function."""

    def __init__(self, files: Sequence[Path], reader: Callable[[Path], dict[str, Tensor]] | None = None) -> None:
        self.files = list(files)
        self.reader = reader

    def read(self, i: int) -> dict[str, Tensor]:
        """Return the tensors of a checkpoint by name."""
        if self.reader is not None:
            return self.reader(self.files[i])
        return load_state_dict(self.files[i])


class Zoo:
    """Networks and a table of what is known about each; `sne_fast.pack` and encoders take it as a sequence of networks.

    `zoo[i]` is a network, a mapping of tensor names to tensors that is read on first use; `zoo[a:b]`, `zoo[[2, 0]]` and
    `zoo[mask]` are zoos. `zoo.rows[i]` is the dict of what is known about network i, `zoo.column(name)` is one column.
    Makers (`make_digits_zoo`, ...) and loaders (`load_unterthiner`, ...) return a zoo, `save` writes it in this
    package's own form, and `Zoo.open` reads that.

    Args:
        columns: lists of plain values of equal length by name; one is called `name`.
        source: the reader of the networks, see `Source`.
        about: description of the zoo; `source` decides how `verify` checks it, `targets` lists columns to predict.
        folder: the folder of the zoo, for messages.
        places: positions of the networks in the source; those of the rows by default.

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
        """Open a zoo in this package's own form; its networks are read when they are asked for, from mapped files.

        Raises:
            FileNotFoundError: `folder` holds no zoo, or an unfinished one.
            ValueError: the index is damaged or lacks a column.
            ModuleNotFoundError: pyarrow is missing.
        """
        folder = Path(folder)
        if not (folder / INDEX).is_file():
            raise FileNotFoundError(f"Zoo.open: {folder} holds no {INDEX}")
        columns = read_index(folder / INDEX)
        check_columns(folder / INDEX, columns)
        shards, positions = (columns.pop(key) for key in PLACE)
        return cls(columns, ShardSource(folder, shards, positions), read_about(folder / ABOUT), folder)

    def __len__(self) -> int:
        """Return the number of networks."""
        return len(self._places)

    def __repr__(self) -> str:
        where = str(self.folder) if self.folder is not None else str(self.about.get("source", ""))
        return f"Zoo({where!r}, {len(self)} networks)"

    def __iter__(self) -> Iterator[ZooNetwork]:
        """Iterate over the networks."""
        return (ZooNetwork(self, i) for i in range(len(self)))

    @overload
    def __getitem__(self, index: int) -> ZooNetwork: ...
    @overload
    def __getitem__(self, index: slice | Sequence[Any] | np.ndarray | Tensor) -> Zoo: ...

    def __getitem__(self, index: Any) -> ZooNetwork | Zoo:
        """Return a network; for a slice, indices, or a mask of one boolean per network, the zoo of those networks."""
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
        """The names of the columns."""
        return list(self._columns)

    @property
    def rows(self) -> Rows:
        """A dict of what is known about each network, as a sequence."""
        return Rows(self._columns)

    @property
    def targets(self) -> list[str]:
        """The columns to predict, as the maker or loader lists them."""
        return [name for name in self.about.get("targets", []) if name in self._columns]

    @property
    def constructors(self) -> Mapping[str, Callable[[], nn.Module]]:
        """Constructors of a fresh module, by the names that the column `architecture` may hold."""
        return ARCHITECTURES

    @property
    def sizes(self) -> Tensor:
        """The number of weights of each network as `sne_fast.pack` counts them, `(len(zoo),)` int64.

        They are those of the column `weights`; a zoo without it reads every network once.
        """
        if "weights" not in self._columns:
            self._columns["weights"] = [network_weights(self.state_dict(i)) for i in range(len(self))]
        return torch.tensor(self._columns["weights"], dtype=torch.int64)

    @property
    def shards(self) -> list[str]:
        """The shard that holds each network; a name of its own for each network of another source than shards."""
        if isinstance(self.source, ShardSource):
            return [self.source.shards[place] for place in self._places]
        return [str(place) for place in self._places]

    def state_dict(self, i: int) -> dict[str, Tensor]:
        """Return the weights of network `i` in their module's order, copied out of the file."""
        return self.source.read(self._places[self._at(i)])

    def find(self, name: str) -> int:
        """Return the position of the network of a name.

        Raises:
            KeyError: no such network.
        """
        try:
            return self._columns["name"].index(name)
        except ValueError:
            raise KeyError(f"{self.folder or 'the zoo'} has no network {name!r}") from None

    def column(self, name: str) -> np.ndarray:
        """Return a column, as float64 if it holds only numbers (NaN where one is not known), else as objects.

        Raises:
            KeyError: no such column.
        """
        if name not in self._columns:
            raise KeyError(f"{self.folder or 'the zoo'} has no column {name!r}; it has {', '.join(self._columns)}")
        values = self._columns[name]
        numeric = all(v is None or isinstance(v, (int, float)) for v in values) and any(v is not None for v in values)
        return np.array(values, dtype=np.float64 if numeric else object)

    def with_column(self, name: str, values: Sequence[Any]) -> Zoo:
        """Return this zoo with a column, such as a `split`, added or replaced; `save` keeps it.

        Args:
            name: of the column.
            values: one plain value per network, in the order of the rows; arrays and tensors are converted.

        Raises:
            ValueError: the number of values is not that of the networks.

        Example:
            >>> from sne_fast.training import stratified_split
            >>> parts = stratified_split(zoo.column("architecture"), (0.8, 0.1, 0.1))
            >>> split = {i: name for name, rows in zip(("train", "validation", "test"), parts) for i in rows}
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
        """Write this zoo in the package's own form, whatever it was read from, and return it, opened from there.

        Args:
            folder: the folder to write, made if missing; a zoo there is refused.
            shard_bytes: approximate size of a shard.
            on_progress: called with the share done, in [0, 1].

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
        """Write network `i` as a safetensors checkpoint, which `load_state_dict` and `pack` read."""
        save_state_dict(self.state_dict(i), path)


class Rows(Sequence[dict[str, Any]]):
    """Sequence of the rows of a table that is kept by columns."""

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
    """Network of a zoo: a mapping of its tensors by name in module order, read on first use.

    `str(network)` is its path, `FOLDER/NAME`. With `keep=False` the tensors are read anew at every use, so that a list
    of many networks holds no tensors.
    """

    def __init__(self, zoo: Zoo, i: int, *, keep: bool = True) -> None:
        self._zoo = zoo
        self._i = i
        self._keep = keep
        self._read: dict[str, Tensor] | None = None
        self._names: list[str] | None = None

    @property
    def name(self) -> str:
        """The name of the network in the zoo."""
        return self._zoo._columns["name"][self._i]

    @property
    def row(self) -> dict[str, Any]:
        """A dict of what is known about the network."""
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
        """Return names and tensors, read once."""
        return self._tensors().items()

    def values(self) -> ValuesView[Tensor]:
        """Return the tensors, read once."""
        return self._tensors().values()

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys())

    def __len__(self) -> int:
        return len(self._keys())

    __eq__ = object.__eq__  # a mapping compares its values, which tensors do not support
    __hash__ = object.__hash__

    def __str__(self) -> str:
        return str(self._zoo.folder / self.name) if self._zoo.folder is not None else self.name

    def __repr__(self) -> str:
        return f"ZooNetwork({str(self)!r})"


def networks_at(path: str | PathLike[str]) -> list[ZooNetwork] | None:
    """Return the networks at a path: all of them for the folder of a zoo, one for `FOLDER/NAME`, None for other paths.

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
