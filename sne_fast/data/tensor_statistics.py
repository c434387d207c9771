"""Statistics of every tensor of a batch: what a few numbers say of its weights, whatever its shape."""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from ..ops import functional
from .batch import WeightBatch

NAMES = (
    "log_rms", "log_rms_by_fan_in", "mean", "std", "skewness", "log_kurtosis",
    "minimum", "quantile_0.1", "quantile_0.25", "median", "quantile_0.75", "quantile_0.9", "maximum",
    "log_numel", "log_fan_in", "log_fan_out",
    "output_norm_spread", "input_norm_spread", "output_mean_std", "input_mean_rms", "log_spectral_norm",
    "largest_output_norm", "kernel_position_spread",
)  # fmt: skip
"""Columns of :func:`tensor_statistics`, in order."""

OF_SIZE = ("log_rms", "log_numel", "log_fan_in", "log_fan_out")
"""Columns that name a size, which architectures never seen do not share."""

COLUMNS = {
    "tensor": tuple(range(len(NAMES))),
    "relative": tuple(i for i, name in enumerate(NAMES) if name not in OF_SIZE),
}
"""Choice of `SNE(statistics=...)` -> the columns it takes."""


@torch.compiler.disable  # type: ignore[untyped-decorator]
def tensor_statistics(batch: WeightBatch) -> Tensor:
    """Return 23 statistics of every tensor of a batch; they are computed once and kept in the batch.

    With W a tensor as it was stored, before any scaling, n its number of elements, r its root mean square, and
    u = W / r (0 if r = 0):

    ====== ========================================================================================================
    column statistic
    ====== ========================================================================================================
    0, 1   log r; log(r sqrt(fan_in))
    2-5    mean of u; std of u; skewness (within 20); log of the kurtosis (1 to 200)
    6-12   quantiles 0, 0.1, 0.25, 0.5, 0.75, 0.9 and 1 of u (within 12), linearly interpolated
    13-15  log n; log fan_in; log fan_out
    16, 17 std over mean of the norms of outputs; of the norms of inputs
    18, 19 std over outputs of the outputs' means; root mean square over inputs of the inputs' means
    20     log(sigma_max / |u|_F sqrt(min(out, in k))) of the matrix (out, in k)
    21     largest norm of an output
    22     std over mean of the norms of kernel positions
    ====== ========================================================================================================

    A norm is a root mean square over the other axes of u as (out, in, k): its first two dimensions, and all others
    together. Columns 16 to 22 are 0 for tensors of fewer than two dimensions. r is at least 1e-12, and spreads are
    those of a population. fan_in and fan_out are those of the layer's last tensor of two or more dimensions, the
    product of all its dimensions but the first, and the first; in a layer without one, 1 and n.

    No statistic changes when hidden units are permuted, and none has a gradient.

    Args:
        batch: networks with the shapes of their tensors, as `pack` gives them. The batch, and batches taken from it,
            keep the result, also when units are permuted.

    Returns:
        `(T, 23)` float32, float64 if the values are; columns as `sne_fast.data.tensor_statistics.NAMES`.

    Raises:
        ValueError: a batch without shapes.

    Example:
        >>> batch = sne_fast.pack([torch.nn.Linear(4, 3)])
        >>> sne_fast.tensor_statistics(batch).shape
        torch.Size([2, 23])
    """
    if batch.statistics is not None:
        return batch.statistics
    if len(batch) and not batch.shapes:
        raise ValueError(
            "tensor_statistics: the batch must have the shapes of its tensors, as those that pack makes have"
        )
    host = batch.chunk_ptr_host[batch.tensor_ptr_host]
    start = host if batch.device.type == "cpu" else host.to(batch.device)
    with torch.no_grad():
        found = functional.tensor_statistics(batch.values, start, batch.tensor_scale, _dims(batch), start_host=host)
    batch.keep_statistics(found)
    return found


def _dims(batch: WeightBatch) -> Tensor:
    """Return `(T, 6)` int64: out, in, k, fan_in, fan_out, and 1 where kernel positions are stored outermost."""
    layers, tensors = batch.layer_ptr_host.tolist(), batch.network_ptr_host.tolist()
    rows: list[tuple[int, ...]] = []
    for b, shapes in enumerate(batch.shapes):
        starts = layers[tensors[b] : tensors[b + 1] + 1]
        rows += _dims_of_network(shapes, tuple(after - before for before, after in pairwise(starts)))
    dims = torch.tensor(rows, dtype=torch.int64, device="cpu").view(-1, 5)
    first = batch.kernels if batch.chunking != "kernel" else torch.zeros_like(batch.kernels)
    return torch.cat([dims, first.long()[:, None]], 1)


@lru_cache(maxsize=1024)
def _dims_of_network(shapes: tuple[tuple[int, ...], ...], counts: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """Return out, in, k, fan_in and fan_out of the tensors of a network whose layers have `counts` tensors each.

    A tensor of fewer than two dimensions has in = 0 and k = 1, and all its elements are outputs.
    """
    found: list[tuple[int, ...]] = []
    for count in counts:
        layer = shapes[len(found) : len(found) + count]
        matrices = [shape for shape in layer if len(shape) > 1]
        for shape in layer:
            size = math.prod(shape)
            fans = (math.prod(matrices[-1][1:]), matrices[-1][0]) if matrices else (1, size)
            found.append((*((shape[0], shape[1], math.prod(shape[2:])) if len(shape) > 1 else (size, 0, 1)), *fans))
    return tuple(found)
