"""`WeightBatch`: the weights of many networks as one flat array and four levels of pointers."""

from __future__ import annotations

import dataclasses
import operator
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import batch_protocols
from .batch_checks import CHUNKINGS, POINTERS, TENSORS, check_contents, check_fields
from .batch_parts import joined, sliced, taken
from .choices import Chunking, Order, Scale
from .cutting import which_have_kernels
from .names import Names, Skipped, network_name, tensor_name
from .network_index import NetworkIndex, chosen_networks

__all__ = ["CHUNKINGS", "WeightBatch"]


def scale_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of `tensor_scale` beside values of `dtype`: the same for float32 and float64, else float32."""
    return dtype if dtype in (torch.float32, torch.float64) else torch.float32


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class WeightBatch:
    """The weights of B networks, ragged at every level and padded at none; `sne_fast.pack` makes one.

    Chunk t holds `values[chunk_ptr[t]:chunk_ptr[t+1]]`, tensor s the chunks `tensor_ptr[s]:tensor_ptr[s+1]`, layer l
    the tensors `layer_ptr[l]:layer_ptr[l+1]`, network b the layers `network_ptr[b]:network_ptr[b+1]`.

    Args:
        values: (V,) floating; all weights in chunk order, each divided by its tensor's `tensor_scale`.
        chunk_ptr: (N+1,) int64; chunks hold 1..chunk_size values.
        tensor_ptr: (T+1,) int64; tensors hold at least one chunk.
        layer_ptr: (L+1,) int64; layers hold at least one tensor.
        network_ptr: (B+1,) int64; networks hold at least one layer. B may be 0.
        tensor_type: (T,) int64 in 0..63, `8 * kind + role`.
        layer_level: (L,) int64, at least 0: depth of the layer in its network.
        tensor_scale: (T,) floating: what the values of the tensor were divided by, 1 if by nothing.
        chunk_size: the longest a chunk may be, at least 1.
        chunking: "flat", "neuron" or "kernel".
        scale: "tensor" if each tensor was divided by its root mean square, "none" if by nothing.
        order: of the layers: "names" or "definition".
        names: per network `(network name, (tensor names...))`, or () if unknown.
        shapes: per network the tuple of its tensors' shapes, or () if unknown.
        skipped: per network the tuple of `(name, reason)` of what was left out of it, or () if unknown.
        prepared: steps of a predictor's preparation that were done since packing, see `Predictor.prepare`.

    Attributes:
        chunk_ptr_host, tensor_ptr_host, layer_ptr_host, network_ptr_host: int64 copies of the pointers on the CPU
            (the same objects where the batch is there), so that a forward pass never waits for the device.
        chunk_positions: (longest,) int64, 0, 1, ...: as many as the tensor of most chunks has. A tensor, not an
            int, because torch.compile makes a new graph for every new int.
        kernels: (T,) bool on the CPU: which tensors were cut as weights of convolutions, with kernel dimensions. It
            stays what it was when `with_fields` replaces types.
        statistics: (T, 23) floating, or None before :func:`sne_fast.tensor_statistics` was asked for them. They are of
            the tensors as they were stored: permuted and scaled copies have the same.

    Raises:
        TypeError, ValueError: a field that does not fit; the message names it, and the network and tensor where it can.

    Indexing gives batches: `batch[i]` of one network, `batch[a:b]`, `batch[[2, 0]]`, `batch[mask]`. Contiguous slices
    share the memory of `values`, others copy; both keep the autograd graph. Pickling and `copy.deepcopy` drop it.

    Example:
        >>> batch = sne_fast.pack([torch.nn.Linear(4, 3), torch.nn.Linear(2, 2)])
        >>> len(batch), batch.num_weights, len(batch[1:])
        (2, 21, 1)
    """

    values: Tensor
    chunk_ptr: Tensor
    tensor_ptr: Tensor
    layer_ptr: Tensor
    network_ptr: Tensor
    tensor_type: Tensor
    layer_level: Tensor
    tensor_scale: Tensor
    chunk_size: int
    chunking: Chunking
    scale: Scale = "tensor"
    order: Order = "names"
    names: Names = ()
    shapes: tuple[tuple[tuple[int, ...], ...], ...] = ()
    skipped: Skipped = ()
    prepared: tuple[str, ...] = ()
    chunk_ptr_host: Tensor = dataclasses.field(init=False)
    tensor_ptr_host: Tensor = dataclasses.field(init=False)
    layer_ptr_host: Tensor = dataclasses.field(init=False)
    network_ptr_host: Tensor = dataclasses.field(init=False)
    chunk_positions: Tensor = dataclasses.field(init=False)
    kernels: Tensor = dataclasses.field(init=False)
    statistics: Tensor | None = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", tuple((str(name), tuple(tensors)) for name, tensors in self.names))
        object.__setattr__(self, "shapes", tuple(tuple(tuple(s) for s in network) for network in self.shapes))
        entries = tuple(tuple((str(name), str(why)) for name, why in network) for network in self.skipped)
        object.__setattr__(self, "skipped", entries)
        object.__setattr__(self, "prepared", tuple(str(step) for step in self.prepared))
        fields = self.fields()
        check_fields(fields)
        object.__setattr__(self, "chunk_size", operator.index(self.chunk_size))
        for field in POINTERS:
            object.__setattr__(self, f"{field}_host", getattr(self, field).detach().cpu())
        if self.device.type == "cpu":  # one object per pointer, so that a kernel can tell by identity that they agree
            for field in POINTERS:
                object.__setattr__(self, f"{field}_host", getattr(self, field))
        check_contents(fields, self.pointers_host)
        object.__setattr__(self, "kernels", which_have_kernels(self.tensor_type.tolist(), self.shapes))
        object.__setattr__(self, "statistics", None)
        self._derive()

    @classmethod
    def trusted(
        cls,
        hosts: dict[str, Tensor] | None = None,
        *,
        kernels: Tensor,
        statistics: Tensor | None = None,
        **fields: Any,
    ) -> WeightBatch:
        """Make a batch from fields known to be right, unchecked; for code that derives one batch from another.

        Args:
            hosts: CPU copies of the pointers by name, as in `{"chunk_ptr": ...}`; the pointers themselves by default.
            kernels: which tensors were cut as weights of convolutions, `(T,)` bool on the CPU.
            statistics: those of the tensors, if they are known.
            fields: all of the constructor's arguments that have no default.
        """
        batch = object.__new__(cls)
        object.__setattr__(batch, "kernels", kernels)
        object.__setattr__(batch, "statistics", statistics)
        for name, value in fields.items():
            object.__setattr__(batch, name, value)
        for field in POINTERS:
            object.__setattr__(batch, f"{field}_host", hosts[field] if hosts else fields[field])
        batch._derive()
        return batch

    def with_fields(self, **changes: Any) -> WeightBatch:
        """Replace fields other than pointers, tensors by such of the same shape, dtype and device, unchecked.

        The copy has no `statistics` where `values` or `tensor_scale` are others, unless they are given too.
        """
        known = None if {"values", "tensor_scale"} & set(changes) else self.statistics
        changes = {"statistics": known, **changes}
        return WeightBatch.trusted(self.pointers_host, kernels=self.kernels, **{**self.fields(), **changes})

    def keep_statistics(self, statistics: Tensor) -> None:
        """Keep the statistics of the tensors, which :func:`sne_fast.tensor_statistics` has computed."""
        object.__setattr__(self, "statistics", statistics)
        self._mark_dynamic()

    def _derive(self) -> None:
        lengths = self.tensor_ptr_host.diff()
        longest = int(lengths.max()) if lengths.numel() else 0
        object.__setattr__(self, "chunk_positions", torch.arange(longest, device=self.device))
        self._mark_dynamic()

    def _mark_dynamic(self) -> None:
        # Batches differ in every size: without the marks torch.compile specialises on the first and compiles twice.
        # Importing torch._dynamo costs a second, so only if somebody has; pickling drops the marks.
        dynamo = sys.modules.get("torch._dynamo")
        mark = getattr(dynamo, "maybe_mark_dynamic", None)
        if mark is None or torch.compiler.is_compiling():
            return
        for field in (*TENSORS, "chunk_positions", *(("statistics",) if self.statistics is not None else ())):
            mark(getattr(self, field), 0)
        if self.chunk_ptr_host is not self.chunk_ptr:
            for field in POINTERS:
                mark(getattr(self, f"{field}_host"), 0)

    # Sizes and names

    def __len__(self) -> int:
        """Return the number of networks B."""
        return self.network_ptr.shape[0] - 1

    @property
    def device(self) -> torch.device:
        """Device of all tensors but the host copies."""
        return self.values.device

    @property
    def dtype(self) -> torch.dtype:
        """Floating dtype of `values`."""
        return self.values.dtype

    @property
    def num_networks(self) -> int:
        """Number of networks B."""
        return self.network_ptr.shape[0] - 1

    @property
    def num_layers(self) -> int:
        """Number of layers L."""
        return self.layer_ptr.shape[0] - 1

    @property
    def num_tensors(self) -> int:
        """Number of tensors T."""
        return self.tensor_ptr.shape[0] - 1

    @property
    def num_chunks(self) -> int:
        """Number of chunks N."""
        return self.chunk_ptr.shape[0] - 1

    @property
    def num_weights(self) -> int:
        """Number of weights V."""
        return self.values.shape[0]

    @property
    def pointers_host(self) -> dict[str, Tensor]:
        """The four pointers on the CPU, by name: `{"chunk_ptr": ..., ...}`."""
        return {field: getattr(self, f"{field}_host") for field in POINTERS}

    @property
    def network_starts(self) -> Tensor:
        """Place in `values` of each network's first weight, and of the end: `(B+1,)` int64 on the CPU."""
        return self.chunk_ptr_host[self.tensor_ptr_host[self.layer_ptr_host[self.network_ptr_host]]]

    @property
    def network_sizes(self) -> Tensor:
        """Number of weights of each network: `(B,)` int64 on the CPU."""
        return self.network_starts.diff()

    def network_name(self, b: int) -> str:
        """Name network b as messages do, e.g. `network 3 ('resnet18')`."""
        return network_name(self.names, b)

    def tensor_name(self, s: int) -> str:
        """Name tensor s (counted over the batch) as messages do, e.g. `network 3 ('resnet18'), tensor 'fc.weight'`."""
        return tensor_name(self.names, self.pointers_host, s)

    def __repr__(self) -> str:
        return (
            f"WeightBatch({self.num_networks} networks, {self.num_layers} layers, {self.num_tensors} tensors, "
            f"{self.num_chunks} chunks, {self.num_weights} weights, chunk_size={self.chunk_size}, "
            f"chunking={self.chunking!r}, scale={self.scale!r}, order={self.order!r}, dtype={self.dtype}, "
            f"device={str(self.device)!r})"
        )

    # Moving

    def to(
        self,
        device: torch.device | str | int | torch.dtype | None = None,
        dtype: torch.dtype | None = None,
        non_blocking: bool = False,
    ) -> WeightBatch:
        """Move the batch to a device or convert its values to a floating dtype; return itself where nothing changes.

        `tensor_scale` follows the values, but is never smaller than float32. `to(dtype)` is accepted as for tensors.
        """
        if isinstance(device, torch.dtype):
            if dtype is not None:
                raise TypeError(f"WeightBatch.to: dtype given twice, {device} and {dtype}; use to(device, dtype)")
            device, dtype = None, device
        dtype = self.dtype if dtype is None else dtype
        if not dtype.is_floating_point:
            raise ValueError(f"WeightBatch.to: dtype must be floating, got {dtype}")
        target = self.device if device is None else torch.device(device)
        scale = self.tensor_scale.dtype if dtype == self.dtype else scale_dtype(dtype)
        fields = self.fields()
        hosts = self.pointers_host
        if target.type == "cpu":
            fields.update(hosts)
        for field in TENSORS:
            fields[field] = fields[field].to(target, non_blocking=non_blocking)
        fields["values"] = fields["values"].to(dtype)
        fields["tensor_scale"] = fields["tensor_scale"].to(scale)
        if all(fields[field] is getattr(self, field) for field in TENSORS):
            return self
        statistics = self.statistics
        if statistics is not None:
            statistics = statistics.to(target, fields["tensor_scale"].dtype, non_blocking=non_blocking)
        return WeightBatch.trusted(hosts, kernels=self.kernels, statistics=statistics, **fields)

    def detach(self) -> WeightBatch:
        """Detach the batch from the parameters it was packed from, for use in many training steps.

        `pack` is differentiable: a batch of modules whose parameters require gradients carries their graph, which one
        backward pass frees. (Under `torch.inference_mode` pack makes tensors that no training can use; use `no_grad`.)
        """
        if not (self.values.requires_grad or self.tensor_scale.requires_grad):
            return self
        values, scale = self.values.detach(), self.tensor_scale.detach()
        return self.with_fields(values=values, tensor_scale=scale, statistics=self.statistics)

    def pin_memory(self, device: Any = None) -> WeightBatch:
        """Copy the batch to page-locked memory, from which `.to("cuda", non_blocking=True)` does not wait.

        Without an accelerator torch cannot pin, and the batch itself is returned, as `DataLoader(pin_memory=True)`
        expects. `device` is accepted for old DataLoaders and ignored. torch refuses a batch that is not on the CPU.
        """
        if not torch.accelerator.is_available():
            return self
        fields = self.fields()
        for field in TENSORS:
            fields[field] = fields[field].pin_memory()
        statistics = None if self.statistics is None else self.statistics.pin_memory()
        return WeightBatch.trusted(kernels=self.kernels, statistics=statistics, **fields)

    def fields(self) -> dict[str, Any]:
        """Return the arguments of `WeightBatch`, by name."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.init}

    def __getstate__(self) -> dict[str, Any]:
        # Slices are views: without the copy a worker process would send the storage of the whole batch along.
        statistics = None if self.statistics is None else self.statistics.clone()
        state = {**self.fields(), "kernels": self.kernels.clone(), "statistics": statistics}
        for field in TENSORS:
            tensor = state[field]
            if not (tensor.requires_grad and tensor.is_leaf):  # a graph cannot leave the process
                tensor = tensor.detach()
                whole = tensor.untyped_storage().nbytes() == tensor.nbytes
                state[field] = tensor if whole else tensor.clone()
        return state

    def __copy__(self) -> WeightBatch:
        return self  # nothing in it changes, and the general way would take __getstate__ and lose the graph

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A batch that was pickled before batches knew their order has that of definition.
        known = {"order": "definition", "statistics": None, **state}
        known.setdefault("kernels", which_have_kernels(state["tensor_type"].tolist(), state["shapes"]))
        for name, value in known.items():
            object.__setattr__(self, name, value)
        for field in POINTERS:
            object.__setattr__(self, f"{field}_host", state[field].cpu())
        self._derive()

    # Choosing and joining networks

    # `for one in batch` goes through __getitem__. Walkers of nested containers ask for __iter__, and would find batches
    # inside batches for ever.
    if TYPE_CHECKING:

        def __iter__(self) -> Iterator[WeightBatch]: ...

    def __getitem__(self, index: NetworkIndex) -> WeightBatch:
        """Select networks: by an index (a batch of one), a slice, a sequence of indices, or a mask of B booleans.

        Raises:
            IndexError: an index outside -B..B-1, or a mask of another length than B.
            TypeError: anything else.
        """
        chosen = chosen_networks(index, len(self))
        found: WeightBatch
        found = sliced(self, chosen.start, chosen.stop) if isinstance(chosen, slice) else taken(self, chosen)
        return self.with_fields() if found is self and not isinstance(index, slice) else found

    @classmethod
    def cat(cls, batches: Sequence[WeightBatch]) -> WeightBatch:
        """Concatenate batches in order; names, shapes and what was skipped are kept where every batch has them.

        Raises:
            ValueError: no batches, or batches that differ in chunk size, chunking, scale, order, preparation, dtype or
                device.
        """
        batches = list(batches)
        if not batches:
            raise ValueError("WeightBatch.cat: batches must be at least one WeightBatch, got none")
        for i, batch in enumerate(batches):
            if not isinstance(batch, WeightBatch):
                raise TypeError(f"WeightBatch.cat: item {i} must be a WeightBatch, got {type(batch).__name__}")
        whole: WeightBatch = joined(batches)
        return whole

    @classmethod
    def collate(cls, batches: Sequence[WeightBatch]) -> WeightBatch:
        """Concatenate batches; `DataLoader` does so without being told, also inside tuples and dicts."""
        return cls.cat(batches)


batch_protocols.register(WeightBatch, WeightBatch.cat)
