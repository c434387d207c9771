"""NFN: neural functional networks (Zhou et al. 2023, arXiv 2302.14040), on chains of layers."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ...data.batch import WeightBatch
from ...nn.predictor import PredictorHead
from .neural import Neural, raw_weights
from .problem import Problem, differing_shapes, missing, problems

_WEIGHTS = torch.tensor([0, 8])
"""Types of the weights of linear layers and convolutions; those of their biases are greater by 1."""


class NeuralFunctional(nn.Module):
    """Three equivariant layers, invariant pooling and an MLP, from a `WeightBatch` of chains to `(B, outputs)`.

    A chain is of linear layers and two-dimensional convolutions with biases, each with the outputs of the one before as
    its inputs. HNP layers tell inputs and outputs apart, and grow with the square of their number. Networks with many
    inputs and outputs get NP layers instead, with sinusoids of the positions of inputs and outputs, as in the paper.

    Args:
        known: the training networks, by which inputs are normalised.
        outputs: number of outputs.
        channels: width of the equivariant layers.
        max_ends: largest number of inputs and outputs together for which HNP layers are used.
    """

    scale: Tensor

    def __init__(self, known: WeightBatch, outputs: int = 1, channels: int = 32, max_ends: int = 16) -> None:
        from nfn import layers
        from nfn.common import network_spec_from_wsfeat

        super().__init__()
        self.shapes = known.shapes[0]
        self.sizes = [math.prod(shape) for shape in self.shapes]
        tensors = raw_weights(known).view(len(known), -1).split(self.sizes, 1)
        std = torch.stack([x.std(correction=0) for x in tensors])
        std = std.where(std > 0, torch.ones_like(std))
        self.register_buffer("scale", std.repeat_interleave(torch.tensor(self.sizes, device=std.device)))
        spec = network_spec_from_wsfeat(self.features(known[:1]))
        few = sum(spec.get_io()) <= max_ends
        linear = layers.HNPLinear if few else layers.NPLinear
        width, blocks = 1, []  # type: int, list[Any]
        if not few:
            blocks.append(layers.IOSinusoidalEncoding(spec))
            width = blocks[0].num_out_chan(width)
        for _ in range(3):
            blocks += [linear(spec, width, channels), layers.TupleOp(nn.ReLU())]
            width = channels
        self.body = nn.Sequential(*blocks, layers.HNPPool(spec), nn.Flatten())
        self.head = PredictorHead(channels * layers.HNPPool.get_num_outs(spec), outputs)

    def features(self, batch: WeightBatch) -> Any:
        """Return nfn's `WeightSpaceFeatures`: weights `(B, 1, out, in, ...)` and biases `(B, 1, out)`."""
        from nfn.common import WeightSpaceFeatures

        rows = raw_weights(batch).view(len(batch), -1) / self.scale
        tensors = []
        for t, (x, shape) in enumerate(zip(rows.split(self.sizes, 1), self.shapes, strict=True)):
            # The chunks of a matrix are its rows in order. Those of a convolution's kernels are by position, save in
            # the chunking "kernel".
            if batch.kernels[t] and batch.chunking != "kernel":
                x = x.view(len(batch), -1, *shape[:2]).permute(0, 2, 3, 1)
            tensors.append(x.reshape(len(batch), 1, *shape))
        return WeightSpaceFeatures(tensors[::2], tensors[1::2])

    def forward(self, batch: WeightBatch) -> Tensor:
        """Return the outputs of each network, `(B, outputs)`."""
        return self.head(self.body(self.features(batch)))


class NFN(Neural):
    """Neural functional networks, by the package `nfn` of their authors."""

    name = "NFN"
    module = NeuralFunctional

    def why_not(self, problem: Problem) -> list[str]:
        """Return the reasons against this problem, see :class:`Baseline`."""
        batch = problem.batch
        reasons = problems(problem) + differing_shapes(batch)
        if not reasons and len(batch):
            reasons += self._not_a_chain(batch)
        return reasons + missing("nfn.layers", "nfn")

    @staticmethod
    def _not_a_chain(batch: WeightBatch) -> list[str]:
        shapes = batch.shapes[0]
        types = batch.tensor_type.view(len(batch), -1)
        weights, biases = shapes[::2], shapes[1::2]
        chain = (
            len(weights) == len(biases)
            and all(len(w) in {2, 4} and b == w[:1] for w, b in zip(weights, biases, strict=True))
            and all(after[1] == before[0] for before, after in pairwise(weights))
            and bool(torch.isin(types[:, ::2], _WEIGHTS.to(types.device)).all())
            and bool((types[:, 1::2] == types[:, ::2] + 1).all())
        )
        if not chain:
            name = batch.network_name(0)
            return [f"networks that are no chain of Linear and Conv2d layers with biases: {name} has {shapes}"]
        return [] if len(weights) > 1 else ["networks without a hidden layer"]
