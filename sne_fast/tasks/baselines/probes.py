"""Learnt probes: the networks are run on inputs that are learnt, and an MLP reads their outputs.

The idea is that of Herrmann et al. 2024 ("Learning Useful Representations of Recurrent Neural Network Weight Matrices",
arXiv 2403.11998) and Kahana et al. 2024 ("Deep Linear Probe Generators", arXiv 2410.10811). All other methods see the
weights alone, so the row of this one says what they leave undone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from ...data.batch import WeightBatch
from ...data.cutting import packed_strides
from ...nn.predictor import PredictorHead
from ...zoo.runnable import Runnable
from .neural import Neural, raw_weights
from .problem import Problem, differing_shapes, problems

LARGEST = 1e4
"""Bound of outputs; those of networks whose training diverged may be infinite or no number."""


class Probing(nn.Module):
    """Outputs of networks at learnt inputs, standardised and read by an MLP; from a `WeightBatch` to `(B, outputs)`.

    Outputs that are logits of classes are taken as probabilities.

    Args:
        known: the training networks, by whose outputs at the first probes outputs are standardised.
        outputs: number of outputs.
        runnable: how the networks are run.
        probes: number K of inputs that are learnt.
        widths: of the hidden layers of the MLP.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        known: WeightBatch,
        outputs: int,
        *,
        runnable: Runnable,
        probes: int = 64,
        widths: Sequence[int] = (256, 256),
    ) -> None:
        super().__init__()
        self.runnable = runnable
        # In a partial, so that the template is no submodule: it has no values and stays where it is.
        self.run = partial(functional_call, runnable.template())
        first = runnable.bound * (2 * torch.rand(probes, *runnable.input_shape) - 1)
        self.probes = nn.Parameter(first.to(known.device))
        with torch.no_grad():
            found = torch.cat([self.answers(known[i : i + 100]) for i in range(0, len(known), 100)])
        std = found.std(0, correction=0)
        self.register_buffer("mean", found.mean(0))
        self.register_buffer("std", std.where(std > 1e-6, torch.ones_like(std)))
        self.head = PredictorHead(found.shape[1], outputs, widths)

    def answers(self, batch: WeightBatch) -> Tensor:
        """Return the outputs of all networks at all probes, `(B, K * out)`."""
        y = vmap(lambda tensors: self.run(tensors, (self.probes,)))(stacked_tensors(batch))  # [B, K, out]
        y = y.nan_to_num(0.0).clamp(-LARGEST, LARGEST)
        return (y.softmax(-1) if self.runnable.classes else y).flatten(1)

    def forward(self, batch: WeightBatch) -> Tensor:
        """Return the outputs of each network, `(B, outputs)`."""
        return self.head((self.answers(batch) - self.mean) / self.std)


def stacked_tensors(batch: WeightBatch) -> dict[str, Tensor]:
    """Return the tensors of networks of one shape by name, `(B, *shape)` each, with their weights before scaling.

    Tensors of more than two dimensions are those of convolutions, as in all architectures of the zoos.
    """
    rows = raw_weights(batch).view(len(batch), -1)
    found, start = {}, 0
    for name, shape in zip(batch.names[0][1], batch.shapes[0], strict=True):
        size = math.prod(shape)
        strides = packed_strides(shape, len(shape) > 2, batch.chunking)
        part = rows[:, start : start + size].contiguous()
        found[name] = part.as_strided((len(batch), *shape), (size, *strides))
        start += size
    return found


class Probes(Neural):
    """Learnt probes, on networks of one architecture that can be run.

    Args:
        epochs: as of `Neural`, like `lr` and `batch_size`.
        probes: number of inputs that are learnt.
    """

    name = "learnt probes, which run the networks"

    def __init__(self, epochs: int = 100, lr: float = 1e-3, batch_size: int = 16, probes: int = 64) -> None:
        super().__init__(epochs, lr, batch_size)
        self.probes = probes

    def why_not(self, problem: Problem) -> list[str]:
        """Return the reasons against this problem, see :class:`Baseline`."""
        reasons = problems(problem) + differing_shapes(problem.batch)
        if problem.runnable is None:
            return [*reasons, "no module is known that runs all of the networks"]
        if not reasons and len(problem.batch):
            state = problem.runnable.template().state_dict()
            own = {name: tuple(t.shape) for name, t in state.items() if t.is_floating_point()}
            found = dict(zip(problem.batch.names[0][1], map(tuple, problem.batch.shapes[0]), strict=True))
            if own != found:
                reasons.append(f"networks that do not fit their module: {found} for {own}")
        return reasons

    def _module(self, known: WeightBatch, problem: Problem) -> nn.Module:
        assert problem.runnable is not None  # `why_not` was asked
        return Probing(known, problem.outputs, runnable=problem.runnable, probes=self.probes)
