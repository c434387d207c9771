"""Units of equal work, and the encoding of one."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import chain
from typing import Any, NamedTuple

import torch

from ..data.batch import WeightBatch
from ..data.checkpoints import read_checkpoint
from ..data.layer_stream import LayerStream
from ..data.remote.ahead import fetched_ahead
from ..data.remote.paths import is_remote
from ..data.weight_budgets import batches_by_weights
from ..extras import require
from ..failures import any_sentence
from ..nn.encoder import SNE
from ..nn.many_networks import PACKED_WEIGHTS, packed_ahead
from ..nn.predictor import Predictor
from .manifests import etag_of, network_at

__all__ = ["Unit", "cut_for", "embed_unit", "plan"]

BUDGET = 200_000_000
"""Weights of a unit: a few minutes of one core, less than a second of a GPU."""
LEAST = 1_000_000
"""Weights below which units are not cut smaller: about a second of one core."""
EACH = 16
"""Units for each process, at least: what progress is told by, and what evens out their times."""
MOST = 4096
"""Networks of a unit."""


@dataclass(frozen=True)
class Network:
    """A network of a unit: its row of the manifest; `weights` is 0 where `error` says why it cannot be read."""

    uri: str
    name: str
    etag: str
    weights: int
    error: str | None = None


Pack = tuple[Network, ...]
"""Networks that are encoded in one call, since the last bits of their vectors may depend on each other."""


@dataclass(frozen=True)
class Unit:
    """Work that is done and written at once: whole networks, or a run of layers of one.

    Attributes:
        packs: networks of the unit, those that are encoded in one call together; one network where `layers` is given.
            Units are cut between packs, so that a vector has the same bits whatever the units are.
        layers: first layer, the one after the last, and the number of all layers of the network; None for whole
            networks.
        layer_weights: weights of the run of layers.
    """

    packs: tuple[Pack, ...]
    layers: tuple[int, int, int] | None = None
    layer_weights: int | None = None

    @cached_property
    def networks(self) -> tuple[Network, ...]:
        """The networks of all packs."""
        return tuple(chain.from_iterable(self.packs))

    @cached_property
    def id(self) -> str:
        """Sixteen hexadecimal digits that depend on what is to be encoded, and on nothing else."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]

    @cached_property
    def weights(self) -> int:
        """Weights that are encoded."""
        return sum(network.weights for network in self.networks) if self.layer_weights is None else self.layer_weights


def plan(table: Any, budget: int = BUDGET, *, split: bool = True) -> list[Unit]:
    """Cut the networks of a manifest into units of about equal work, the largest first.

    Args:
        table: of `manifest`; rows with an error become rows of results with that error.
        budget: weights of a unit. A larger network becomes several units, each a run of its layers.
        split: whether a network may be split; a predictor's preparation may need it whole.

    Returns:
        Units, the same for the same table and budget. What is encoded in one call depends on the table alone, unless
        the budget is smaller than that.
    """
    rows = sorted(table.to_pylist(), key=lambda row: (row["error"] is not None, -(row["weights"] or 0), row["uri"]))
    units: list[Unit] = []
    together: list[Network] = []
    failed: list[Pack] = []
    for row in rows:
        network = Network(row["uri"], row["name"], row["etag"], row["weights"] or 0, row["error"])
        sizes = row["layer_weights"]
        if network.error is not None:
            failed.append((network,))
        elif split and network.weights > budget and len(sizes) > 1:
            runs = batches_by_weights(torch.tensor(sizes), budget)
            for run in runs:
                held = (run[0], run[-1] + 1, len(sizes))
                units.append(Unit(((network,),), held, sum(sizes[run[0] : run[-1] + 1])))
        else:
            together.append(network)
    return units + list(_units([*_packs(together, min(budget, PACKED_WEIGHTS)), *failed], budget))


def cut_for(units: Sequence[Unit], processes: int) -> list[Unit]:
    """Cut units of several networks, so that there are about sixteen units for each process.

    Args:
        units: of `plan`.
        processes: that share the units.

    Returns:
        Units, the same for the same units and number of processes.
    """
    most = max(LEAST, sum(unit.weights for unit in units if unit.layers is None) // (EACH * processes))
    found: list[Unit] = []
    for unit in units:
        if unit.layers is None and unit.weights > most:
            found += _units(unit.packs, most)
        else:
            found.append(unit)
    return found


def halves(unit: Unit) -> list[Unit]:
    """Return a unit in two parts, cut between packs; one pack alone is cut between its networks."""
    packs = unit.packs if len(unit.packs) > 1 else tuple((network,) for network in unit.networks)
    middle = len(packs) // 2
    return [Unit(packs[:middle]), Unit(packs[middle:])]


def embed_unit(
    encoder: SNE | Predictor,
    unit: Unit,
    *,
    key: str | None = None,
    nonfinite: str | None = None,
    layers: bool = False,
    max_chunks: int | None = None,
    seed: int = 0,
    max_memory: float | None = None,
) -> Any:
    """Encode the networks of a unit, without gradients; one that fails does not take others with it.

    Args:
        encoder: the encoder, or a predictor, whose head's input is computed.
        unit: of `plan`.
        key: the place of the weights in pickled files that have several.
        nonfinite: as in :func:`sne_fast.pack`; None is what the encoder does by itself.
        layers: write the vectors of layers too; for an encoder.
        max_chunks: as in :meth:`sne_fast.SNE.encode`; for an encoder.
        seed: of the sample of chunks.
        max_memory: as in :meth:`sne_fast.SNE.encode`.

    Returns:
        A `pyarrow.Table` with a row per network and the columns of `schema`. A failure is a row with `error`.

    Raises:
        ValueError: `layers`, `max_chunks` or a run of layers for a predictor.
        ModuleNotFoundError: pyarrow is missing.
    """
    arrow = _arrow()
    by_layers = layers or max_chunks is not None or unit.layers is not None
    if by_layers and not isinstance(encoder, SNE):
        raise ValueError("embed_unit: layers, max_chunks and runs of layers are for encoders, got a Predictor")
    rows: list[dict[str, Any]] = []
    fetched = fetched_ahead(unit.packs, lambda pack: [network.uri for network in pack if network.error is None])

    def pack_group(group: Pack) -> _Packed | None:
        apart = isinstance(encoder, SNE) and (by_layers or group[0].weights > PACKED_WEIGHTS)
        return None if apart or group[0].error is not None else _packed(encoder, group, key, nonfinite)

    with torch.no_grad():
        for group, packed in packed_ahead(fetched, pack_group):
            if group[0].error is not None:
                rows += [_row(network, 0.0) for network in group]
            elif isinstance(packed, _Packed):
                rows += _together(encoder, group, packed, key, nonfinite)
            elif isinstance(encoder, SNE):
                given = {"key": key, "nonfinite": nonfinite, "max_memory": max_memory}
                for network in group:
                    rows.append(_layer_by_layer(encoder, network, unit.layers, layers, max_chunks, seed, given))
    return arrow.Table.from_pylist(rows, schema=schema(encoder))


def schema(encoder: SNE | Predictor) -> Any:
    """Return the pyarrow schema of results.

    `uri`, `name`, `etag`, `weights` are those of the manifest; `vector` is z, null where the network failed or is not
    complete; `spread` is its relative standard error where chunks were sampled; `seconds` is the time that it took;
    `error` says why it failed. `first_layer` is that of a run of layers, null in rows of whole networks. `num_layers`
    (of the whole network) and `layers`, a struct of name, level, tensors, vector, pooled and halves (see
    `LayerEncodings`), are there where layers were asked for, and in rows of a run of layers.
    """
    arrow = _arrow()
    width = encoder.out_features if isinstance(encoder, SNE) else encoder.in_features
    h = encoder.hidden_dim if isinstance(encoder, SNE) else width
    layer = arrow.struct(
        [
            ("name", arrow.string()), ("level", arrow.int64()), ("tensors", arrow.int64()),
            ("vector", arrow.list_(arrow.float32(), h)), ("pooled", arrow.list_(arrow.float32())),
            ("halves", arrow.list_(arrow.float32())),
        ]
    )  # fmt: skip
    return arrow.schema(
        [
            ("uri", arrow.string()), ("name", arrow.string()), ("etag", arrow.string()), ("weights", arrow.int64()),
            ("vector", arrow.list_(arrow.float32(), width)), ("spread", arrow.float32()), ("seconds", arrow.float64()),
            ("first_layer", arrow.int64()), ("num_layers", arrow.int64()), ("layers", arrow.list_(layer)),
            ("error", arrow.string()),
        ]
    )  # fmt: skip


def _packs(networks: Sequence[Network], most: int) -> Iterator[Pack]:
    """Yield runs of small networks that are encoded in one call, and each larger one alone."""
    sizes = torch.tensor([network.weights for network in networks], dtype=torch.int64)
    for rows in batches_by_weights(sizes, most, most=MOST):
        yield tuple(networks[i] for i in rows)


def _units(packs: Sequence[Pack], budget: int) -> Iterator[Unit]:
    """Yield units of consecutive packs, of at most so many weights and networks unless one pack has more."""
    held: list[Pack] = []
    weights = networks = 0
    for pack in packs:
        size = sum(network.weights for network in pack)
        if held and (weights + size > budget or networks + len(pack) > MOST):
            yield Unit(tuple(held))
            held, weights, networks = [], 0, 0
        held.append(pack)
        weights, networks = weights + size, networks + len(pack)
    if held:
        yield Unit(tuple(held))


def _row(network: Network, seconds: float, **values: Any) -> dict[str, Any]:
    return {**asdict(network), "seconds": seconds, **values}


def _layer_by_layer(
    encoder: SNE,
    network: Network,
    run: tuple[int, int, int] | None,
    keep: bool,
    max_chunks: int | None,
    seed: int,
    given: dict[str, Any],
) -> dict[str, Any]:
    start = time.perf_counter()
    try:
        stream = LayerStream(
            _source_of(network), key=given["key"], order=encoder.config["order"],
            nonfinite=given["nonfinite"] or "raise",
        )  # fmt: skip
        if run is not None and len(stream) != run[2]:
            raise ValueError(f"{network.uri}: has {len(stream)} layers, and the manifest says {run[2]}; make it again")
        chosen = stream if run is None else stream[run[0] : run[1]]
        encoder.check_stream(chosen, max_chunks=max_chunks, max_memory=given["max_memory"])
        encodings = encoder.encode_layers(chosen, max_chunks=max_chunks, seed=seed)
    except Exception as error:
        failed = {} if run is None else {"first_layer": run[0], "num_layers": run[2]}
        return _row(network, time.perf_counter() - start, error=any_sentence(error), **failed)
    found: dict[str, Any] = {}
    if run is None:
        found["vector"] = encoder.join(encodings)[0].float().tolist()
        found["spread"] = float(encoder.spread(encodings)) if encodings.estimated else None
    if keep or run is not None:
        halves = None if encodings.halves is None else encodings.halves.transpose(0, 1).flatten(1)
        optional = ([None] * len(encodings) if t is None else t.float().tolist() for t in (encodings.pooled, halves))
        columns = (
            encodings.names, encodings.levels.tolist(), encodings.tensors.tolist(), encodings.vectors.float().tolist(),
            *optional,
        )  # fmt: skip
        names = ("name", "level", "tensors", "vector", "pooled", "halves")
        found["layers"] = [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]
        found["num_layers"] = len(stream)
        found["first_layer"] = None if run is None else run[0]
    return _row(network, time.perf_counter() - start, **found)


class _Packed(NamedTuple):
    """Networks that were read and packed, or why not, and the seconds that it took."""

    batch: WeightBatch | Exception
    seconds: float


def _packed(encoder: SNE | Predictor, networks: Sequence[Network], key: str | None, nonfinite: str | None) -> _Packed:
    start = time.perf_counter()
    options = {} if nonfinite is None else {"nonfinite": nonfinite}
    found: WeightBatch | Exception
    try:
        found = encoder.pack([_read(network, key) for network in networks], **options)
    except Exception as error:
        found = error
    return _Packed(found, time.perf_counter() - start)


def _together(
    encoder: SNE | Predictor, networks: Sequence[Network], packed: _Packed, key: str | None, nonfinite: str | None
) -> list[dict[str, Any]]:
    """Encode small networks, which were packed together, in one call; where either failed, one by one."""
    start = time.perf_counter()
    try:
        if isinstance(packed.batch, Exception):
            raise packed.batch
        vectors = (encoder if isinstance(encoder, SNE) else encoder.encode)(packed.batch).float().tolist()
    except Exception as error:
        if len(networks) == 1:
            return [_row(networks[0], time.perf_counter() - start + packed.seconds, error=any_sentence(error))]
        rows = []
        for network in networks:
            rows += _together(encoder, [network], _packed(encoder, [network], key, nonfinite), key, nonfinite)
        return rows
    each = (time.perf_counter() - start + packed.seconds) / len(networks)
    return [_row(network, each, vector=vector) for network, vector in zip(networks, vectors, strict=True)]


def _read(network: Network, key: str | None) -> Any:
    source = _source_of(network)
    return source if key is None else read_checkpoint(network.uri, key)


def _source_of(network: Network) -> Any:
    """Return what `pack` takes for a network; one in a store elsewhere must be the one of the manifest."""
    if is_remote(network.uri) and etag_of(network.uri) != network.etag:
        raise ValueError(f"{network.uri}: has changed since its manifest was made; make it again")
    return network_at(network.uri)


def _arrow() -> Any:
    require("pyarrow.parquet", extra="parquet", why="encoding many networks")
    import pyarrow

    return pyarrow
