"""Networks cut into chunks: `pack`."""

from __future__ import annotations

import operator
import os
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from ..ops.functional import gather_chunks
from ..ops.transforms import follows_nothing, is_transformed
from .batch import WeightBatch, scale_dtype
from .batch_checks import CHUNKINGS, ORDERS, SCALES
from .checkpoints import Checkpoint
from .choices import Chunking, NonFinite, Order, Scale
from .cutting import cut_of, has_kernel
from .layer_overrides import resolve_kinds, resolve_levels
from .layers import Network, collect
from .networks import Networks
from .pointers import chunk_pointers, pointer_of
from .readers.small_files import SmallFiles
from .stored_networks import StoredNetwork, pack_stored, stored_network
from .tensor_scales import tensor_scales

__all__ = ["check_options", "pack", "pack_collected"]

NONFINITE = get_args(NonFinite)
LARGEST = torch.iinfo(torch.int64).max
VALUE_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def pack(
    networks: Networks,
    chunk_size: int = 32,
    chunking: Chunking = "flat",
    *,
    scale: Scale = "tensor",
    order: Order = "names",
    nonfinite: NonFinite = "raise",
    layer_level: Any = None,
    kinds: Literal["names"] | Mapping[str, Any] | Sequence[Mapping[str, Any] | None] | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | int | None = None,
) -> WeightBatch:
    """Cut the weights of networks into chunks, as one ragged `WeightBatch` (section 3.2 of the paper).

    A layer is a module that owns tensors itself. All floating parameters are taken, tied ones once at their first
    place, and the running mean and variance of normalisation layers; complex ones as real and imaginary parts side by
    side along the last dimension, quantised ones as the numbers they stand for. Adapters (LoRA, DoRA, IA3) are layers
    of their own in a canonical form, which depends on their update alone. What is left out (other buffers, counters,
    masks, empty tensors, states of optimisers, moving averages beside the weights) is in `batch.skipped` by
    name with the reason; `len(batch.skipped[b])` counts it. The prefix `module.` of all names, and parts of names that
    `torch.compile`, FSDP and activation checkpointing add, are dropped. Tensors are cut as they are stored: fused
    projections and gates are not split, nothing is transposed.

    Args:
        networks: a sequence of modules, state_dicts (also inside another mapping) or paths: files of safetensors or of
            `torch.save`, indices of shards, folders; see `sne_fast.data.checkpoints.load_state_dict`; or what
            `read_checkpoint` beside it returned. One network alone is taken as a sequence of one.
        chunk_size: c, the longest a chunk may be; the last piece of a row may be shorter.
        chunking: how `W[out, in, *k]` is cut. "flat": for every kernel position the row-major `out x in` vector, every
            c elements; "neuron": as flat, but cut also at every output neuron; "kernel": one row per kernel,
            `(out, in)` outermost, and as "neuron" without kernel dimensions. Only weights of convolutions have kernel
            dimensions; any other tensor of three and more dimensions (`cls_token`, stacked experts, position tables)
            is cut as the matrix of its last dimension by all others. A 1-D tensor is one vector, a 0-d one a chunk of
            one.
        scale: "tensor" divides each tensor by its root mean square (computed in float64; by 1 where that is 0 or
            not finite) and keeps it in `tensor_scale`; "none" divides by nothing, as the paper.
        order: of the layers, and of tensors inside them. "names": a function of the names alone, the same for a module,
            its state_dict and every file of it: names are compared part by part and numbers by value; inside one
            parent known entries (embeddings, stems) come first and known exits (final norms, heads) last, a
            normalisation stands behind the convolution of its number, blocks of known families are in the order of
            their data flow, and all else is in natural order. "definition": the paper's order, of modules,
            state_dicts and files that keep it.
        nonfinite: what NaN and infinities do: "raise" a ValueError, "zero" replaces them by 0 before scaling, "keep"
            leaves them.
        layer_level: depth of each layer instead of its place in the network: a sequence with, per network, None, one
            int per layer in their `order`, or a mapping of layer names or patterns to ints; or a mapping for all
            networks; or (L,) ints.
        kinds: kind of layers instead of what module or names say: "names" types modules by the names and shapes of
            their tensors, as their files are; a mapping of layer (module) names or `fnmatch` patterns to
            "linear", "convolution", "transposed convolution", "normalisation", "embedding", "recurrent",
            "attention projection", "other" or their ids 0..7; or a sequence with one mapping or None per network. The
            exact name wins, then the first pattern that fits.
        dtype: of the values: float16, bfloat16, float32 or float64; None is `torch.get_default_dtype()`. Sources may
            have any floating dtype, fp8 included.
        device: of the batch; None is the one that the tensors are on.

    Returns:
        A `WeightBatch`; `values (V,)` and `tensor_scale (T,)` carry gradients to the tensors that require them, if grad
        mode is on.

    A state_dict knows no modules: kinds are inferred by names and shapes. What may differ from packing the module:

    - a transposed convolution is taken for a convolution, and so is any other weight of 3 to 5 dimensions for which
      neither name (`experts`, `bilinear`, `pos_embed`) nor shape (of its bias, of kernels) says otherwise;
    - a matrix is an embedding only if it is alone in a layer named so (`embed_tokens`, `wte`), else linear; a 1-D
      weight always belongs to a normalisation (`PReLU`); a parametrised weight has no kind but "other";
    - buffers (attention masks, position tables) are left out where their names are known, and else count as weights.

    `kinds=` overrides the first two. Modules of classes from outside torch.nn are typed by the same inference.

    Raises:
        ValueError: no networks, a network without floating parameters, a sparse, uninitialised or meta tensor, a
            quantised one of an unknown format, two copies of a network, NaN or infinity (names network and tensor),
            values too large for `dtype`, tensors on different devices without `device=`, an unknown option, `kinds` or
            `layer_level` that fit nothing.
        TypeError: a network or a state_dict entry of a type that cannot be packed.
        CheckpointError: a file that cannot be read (a ValueError).

    Example:
        >>> batch = sne_fast.pack([torch.nn.Conv2d(3, 8, 3), torch.nn.Linear(4, 3)], chunk_size=16)
        >>> batch.tensor_type.tolist(), batch.chunk_ptr_host.diff()[:3].tolist()
        ([8, 9, 0, 1], [16, 8, 16])
    """
    chunk_size = check_options(chunk_size, chunking, scale, order, nonfinite)
    dtype = torch.get_default_dtype() if dtype is None else dtype
    if dtype not in VALUE_DTYPES:
        raise ValueError(f"pack: dtype must be one of {', '.join(map(str, VALUE_DTYPES))}, got {dtype}")
    device = _device(device)
    if isinstance(networks, (nn.Module, Mapping, str, os.PathLike, Checkpoint)):
        networks = [networks]
    elif isinstance(networks, Tensor) or not hasattr(networks, "__iter__"):
        raise TypeError(
            f"pack: networks must be a sequence of modules, state_dicts or paths, got {type(networks).__name__}"
        )
    networks = list(networks)
    if not networks:
        raise ValueError("pack: networks must hold at least one network, got an empty sequence")
    by_names = isinstance(kinds, str) and kinds == "names"
    cut: dict[str, Any] = {
        "chunk_size": chunk_size, "chunking": chunking, "scale": scale, "order": order, "nonfinite": nonfinite,
        "dtype": dtype, "device": device,
    }  # fmt: skip
    if layer_level is None and (kinds is None or by_names) and follows_nothing():
        batch = _pack_by_runs(networks, by_names, cut)
        if batch is not None:
            return batch
    found = [collect(i, network, order, kinds_by_names=by_names) for i, network in enumerate(networks)]
    types = resolve_kinds(found, None if by_names else kinds)
    levels = resolve_levels(found, layer_level)
    return pack_collected(found, types, levels, **cut)


def _pack_by_runs(networks: list[Any], by_names: bool, cut: dict[str, Any]) -> WeightBatch | None:
    """Pack runs of networks in memory by their architectures, and others one by one.

    Returns:
        None where there is no network in memory, values that are not finite, or tensors on several devices.
    """
    files = SmallFiles()
    found: list[StoredNetwork | Network] = [
        stored_network(network, cut["order"], files) or collect(i, network, cut["order"], kinds_by_names=by_names)
        for i, network in enumerate(networks)
    ]
    others = [tensor for network in found if isinstance(network, Network) for tensor in _tensors_of(network)]
    if all(isinstance(network, Network) for network in found) or any(t.device.type != "cpu" for t in others):
        return None
    batches = []
    for stored, run in groupby(found, lambda network: isinstance(network, StoredNetwork)):
        batch: WeightBatch | None
        if stored:
            batch = pack_stored([network for network in run if isinstance(network, StoredNetwork)], **cut)
        else:
            rest = [network for network in run if isinstance(network, Network)]
            batch = pack_collected(rest, resolve_kinds(rest, None), resolve_levels(rest, None), **cut)
        if batch is None:
            return None
        batches.append(batch)
    return WeightBatch.cat(batches)


def _tensors_of(network: Network) -> list[Tensor]:
    return [tensor for layer in network.layers for _, tensor in layer.tensors]


def pack_collected(
    found: list[Network],
    types: list[int],
    levels: list[int],
    chunk_size: int,
    chunking: Chunking,
    *,
    scale: Scale,
    order: Order,
    nonfinite: NonFinite,
    dtype: torch.dtype,
    device: torch.device | None,
) -> WeightBatch:
    """Cut the weights of networks whose layers were collected; arguments are those of `pack`, checked.

    Args:
        found: the networks.
        types: `8 * kind + role` of every tensor.
        levels: of every layer.
        chunk_size: as all that follow, see `pack`.
    """
    where = [(network, name) for network in found for layer in network.layers for name, _ in layer.tensors]
    tensors = [tensor for network in found for layer in network.layers for _, tensor in layer.tensors]
    tensors = _on_one_device(tensors, where, device)
    differentiable = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    if not differentiable and not is_transformed(tensors):
        tensors = [t.detach() for t in tensors]

    shapes = [tuple(t.shape) for t in tensors]
    kernels = [has_kernel(tensor_type, len(shape)) for tensor_type, shape in zip(types, shapes, strict=True)]
    plan, rows, lengths = _cuts(shapes, kernels, chunking)
    divisors, tensors = tensor_scales(tensors, where, scale, nonfinite, dtype, scale_dtype(dtype))
    values = gather_chunks(tensors, divisors, plan, dtype)
    chunk_ptr, tensor_ptr = chunk_pointers(rows, lengths, chunk_size)

    layers_of = [len(network.layers) for network in found]
    tensors_of = [len(layer.tensors) for network in found for layer in network.layers]
    hosts = {
        "chunk_ptr": torch.from_numpy(chunk_ptr),
        "tensor_ptr": torch.from_numpy(tensor_ptr),
        "layer_ptr": pointer_of(tensors_of),
        "network_ptr": pointer_of(layers_of),
    }
    target = values.device if device is None else device
    ends = np.cumsum([sum(len(layer.tensors) for layer in network.layers) for network in found])[:-1].tolist()
    starts = [0, *ends]
    pieces = list(zip(starts, [*ends, len(tensors)], strict=True))
    return WeightBatch.trusted(
        hosts if target.type != "cpu" else None,
        kernels=torch.tensor(kernels, device="cpu"),
        values=values.to(target),
        **{field: host.to(target) for field, host in hosts.items()},
        tensor_type=torch.tensor(types, device="cpu").to(target),
        layer_level=torch.tensor(levels, device="cpu").to(target),
        tensor_scale=divisors.to(target),
        chunk_size=chunk_size,
        chunking=chunking,
        scale=scale,
        order=order,
        names=tuple(
            (network.name, tuple(name for _, name in where[a:b])) for network, (a, b) in zip(found, pieces, strict=True)
        ),
        shapes=tuple(tuple(shapes[a:b]) for a, b in pieces),
        skipped=tuple(tuple(network.skipped) for network in found),
    )


def check_options(chunk_size: Any, chunking: str, scale: str, order: str, nonfinite: str) -> int:
    """Return the chunk size as an int; raises ValueError for an option that `pack` does not have."""
    try:
        if isinstance(chunk_size, bool) or not 1 <= operator.index(chunk_size) <= LARGEST:
            raise TypeError
    except TypeError:
        raise ValueError(f"pack: chunk_size must be an integer of at least 1, got {chunk_size!r}") from None
    for name, value, allowed in (
        ("chunking", chunking, CHUNKINGS),
        ("scale", scale, SCALES),
        ("order", order, ORDERS),
        ("nonfinite", nonfinite, NONFINITE),
    ):
        if value not in allowed:
            raise ValueError(f"pack: {name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
    return operator.index(chunk_size)


def _device(device: torch.device | str | int | None) -> torch.device | None:
    try:
        return None if device is None else torch.device(device)
    except (RuntimeError, TypeError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"pack: device must be one that torch has, got {device!r}: {reason}") from error


def _on_one_device(
    tensors: list[Tensor], where: list[tuple[Network, str]], device: torch.device | None
) -> list[Tensor]:
    devices = {tensor.device: i for i, tensor in reversed(list(enumerate(tensors)))}
    if len(devices) == 1:
        return tensors
    if device is None:
        found = "; ".join(f"{where[i][0].label}, tensor {where[i][1]!r} on {d}" for d, i in devices.items())
        raise ValueError(f"pack: all tensors must be on one device, got {found}; pass device= to gather them")
    return [tensor.to(device) for tensor in tensors]


def _cuts(shapes: list[tuple[int, ...]], kernels: list[bool], chunking: str) -> tuple[Tensor, list[int], list[int]]:
    """Return per tensor the matrix `(R, K)` whose transpose is written, and number and length of the rows to cut."""
    cuts = [cut_of(shape, kernel, chunking) for shape, kernel in zip(shapes, kernels, strict=True)]
    lengths = [cut.matrix[0] * cut.matrix[1] // cut.rows for cut in cuts]
    return torch.tensor([cut.matrix for cut in cuts], device="cpu"), [cut.rows for cut in cuts], lengths
