"""What SNE is compared with: methods that predict one number of each network from its weights, on the same split.

problem = Problem(batch, targets, train=range(800), validation=range(800, 900))
for baseline in BASELINES.values():
    if not baseline.why_not(problem):
        predicted = baseline.fit_predict(problem)  # (n,), of all networks
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..batch import WeightBatch
from ..input_normaliser import FanInScale
from ..predictor import LOGIT_MARGIN, PredictorHead
from ..tensor_types import KINDS, ROLES
from ..training.batching import network_sizes
from ..training.loop import Augment, decay_groups, warm_cosine
from ..training.settings import SEED_STRIDE

if TYPE_CHECKING:
    import numpy as np

INSTALL = 'pip install "sne_fast[tasks]"'


@dataclass(frozen=True)
class Problem:
    """One regression problem: networks, their label, who trains and who chooses the epoch.

    Args:
        batch: n networks, packed with `scale="tensor"`.
        targets: `(n,)` float64 in their own units; only those of `train` and `validation` are looked at.
        train: positions of the networks to fit.
        validation: positions of the networks to choose the epoch by. Baselines without epochs fit these too.
        seed: of everything random.
        logit: targets lie in [0, 1] and are modelled as logits; predictions are again in [0, 1].
        augment: changes each training batch of the neural baselines, as in `sne_fast.training.fit`; `rows` are
            positions in `train`.
    """

    batch: WeightBatch
    targets: np.ndarray
    train: Sequence[int]
    validation: Sequence[int]
    seed: int = 0
    logit: bool = False
    augment: Augment | None = None


class Baseline(Protocol):
    """A method of the tables."""

    name: str

    def why_not(self, problem: Problem) -> list[str]:
        """Sentences saying why it cannot do this problem; empty if it can."""
        ...

    def fit_predict(self, problem: Problem) -> np.ndarray:
        """Predictions `(n,)` float64 for all networks of the batch, in the targets' units.

        Raises:
            ValueError: what `why_not` says, or a loss that is not finite.
        """
        ...


def _problems(problem: Problem) -> list[str]:
    """What no baseline can do."""
    import numpy as np

    if len(problem.targets) != len(problem.batch):
        return [f"{len(problem.targets)} targets for {len(problem.batch)} networks"]
    if not len(problem.train):
        return ["no networks to train on"]
    known = np.asarray(problem.targets, np.float64)[[*problem.train, *problem.validation]]
    if not np.isfinite(known).all():
        return ["targets that are not finite among the training and validation networks"]
    if problem.logit and (known.min() < 0 or known.max() > 1):
        return [f"targets outside [0, 1] cannot be modelled as logits: {known.min():g} to {known.max():g}"]
    return []


def _differing_shapes(batch: WeightBatch) -> list[str]:
    if not batch.shapes:
        return ["a batch without the shapes of its tensors, which pack keeps"]
    for b, shapes in enumerate(batch.shapes):
        if shapes != batch.shapes[0]:
            return [f"networks of different shapes: {batch.network_name(0)} and {batch.network_name(b)}"]
    return []


def _missing(module: str, name: str) -> list[str]:
    try:
        importlib.import_module(module)
    except ImportError:
        return [f"{name} is not installed: {INSTALL}"]
    return []


def _check(baseline: Baseline, problem: Problem) -> None:
    if reasons := baseline.why_not(problem):
        raise ValueError(f"{baseline.name}: {'; '.join(reasons)}")


class Mean:
    """The mean target of the training and validation networks, whatever the weights."""

    name = "mean of the training networks"

    def why_not(self, problem: Problem) -> list[str]:
        return _problems(problem)

    def fit_predict(self, problem: Problem) -> np.ndarray:
        import numpy as np

        _check(self, problem)
        known = np.asarray(problem.targets, np.float64)[[*problem.train, *problem.validation]]
        return np.full(len(problem.batch), known.mean())


class Statistics:
    """Gradient boosting on layer statistics (Unterthiner et al. 2020, arXiv 2002.11448)."""

    name = "layer statistics, boosted trees"

    def why_not(self, problem: Problem) -> list[str]:
        return _problems(problem) + _missing("sklearn", "scikit-learn")

    def fit_predict(self, problem: Problem) -> np.ndarray:
        from ..reporting import statistics_regression

        _check(self, problem)
        known = [*problem.train, *problem.validation]
        return statistics_regression(problem.batch, problem.targets, known, problem.seed, problem.logit)


class StatisticsByFanIn(Statistics):
    """Layer statistics of weights times the root of their layer's fan-in, as SNE sees them across architectures."""

    name = "layer statistics by fan-in, boosted trees"

    def fit_predict(self, problem: Problem) -> np.ndarray:
        _check(self, problem)
        return Statistics().fit_predict(replace(problem, batch=FanInScale()(problem.batch)))


def tensor_sizes(batch: WeightBatch) -> Tensor:
    """Weights of each tensor: `(T,)` int64 on the CPU."""
    return batch.chunk_ptr_host[batch.tensor_ptr_host].diff()


def raw_weights(batch: WeightBatch) -> Tensor:
    """The weights as they were before `pack` divided them: `(V,)`."""
    return batch.values * batch.tensor_scale.repeat_interleave(tensor_sizes(batch).to(batch.device))


class Neural:
    """A module from `(B networks)` to `(B, 1)`, trained on normalised targets; the epoch is chosen by validation.

    AdamW on the squared error in batches of networks, warm cosine, gradients clipped to norm 1. Weight decay, warm-up
    and clipping are those of `sne_fast.training.FitSettings`. The same seed gives the same bits (on the CPU), and
    torch's global generators are left alone.

    Args:
        epochs: passes over the training networks; the last one is kept if there are no validation networks.
        lr: the highest learning rate.
        batch_size: networks per step.
    """

    name = ""
    module: type[nn.Module]  # made from the training networks, by which it normalises its inputs
    warmup, weight_decay, clip = 0.1, 1e-2, 1.0

    def __init__(self, epochs: int = 100, lr: float = 1e-3, batch_size: int = 16) -> None:
        self.epochs, self.lr, self.batch_size = epochs, lr, batch_size

    def why_not(self, problem: Problem) -> list[str]:
        return _problems(problem)

    def fit_predict(self, problem: Problem) -> np.ndarray:
        import numpy as np

        _check(self, problem)
        batch = problem.batch.detach().to(torch.float32)
        train, validation = list(problem.train), list(problem.validation)
        known = batch[train]
        targets = torch.from_numpy(np.asarray(problem.targets, np.float64)[train + validation])
        if problem.logit:
            targets = targets.clamp(LOGIT_MARGIN, 1 - LOGIT_MARGIN).logit()
        mean, std = targets[: len(train)].mean(), targets[: len(train)].std(correction=0)
        std = std if std > 0 else torch.ones_like(std)
        goals = ((targets - mean) / std).float().to(batch.device)
        with torch.random.fork_rng(devices=[]):
            # Not torch.manual_seed, which would seed the accelerators too.
            torch.default_generator.manual_seed(problem.seed)
            model = self.module(known).to(batch.device, torch.float32)
        self._fit(model, known, goals[: len(train)], batch[validation], goals[len(train) :], problem)
        values = self._outputs(model, batch).double().cpu() * std + mean
        return (values.sigmoid() if problem.logit else values).numpy()

    def _fit(
        self,
        model: nn.Module,
        known: WeightBatch,
        goals: Tensor,
        watched: WeightBatch,
        watched_goals: Tensor,
        problem: Problem,
    ) -> None:
        optimiser = torch.optim.AdamW(decay_groups(model, self.weight_decay), lr=self.lr, fused=True)
        order = torch.Generator().manual_seed(problem.seed)
        steps = self.epochs * math.ceil(len(known) / self.batch_size)
        step, lowest, best = 0, math.inf, None
        for epoch in range(self.epochs):
            model.train()
            for places in torch.randperm(len(known), generator=order).split(self.batch_size):
                for group in optimiser.param_groups:
                    group["lr"] = self.lr * warm_cosine(step, steps, self.warmup)
                rows = places.tolist()
                part = known[rows]
                if problem.augment is not None:
                    draws = torch.Generator().manual_seed((problem.seed * SEED_STRIDE + step) % 2**63)
                    part = problem.augment(part, rows, draws)
                loss = F.mse_loss(model(part).squeeze(1), goals[places.to(goals.device)])
                optimiser.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), self.clip)
                optimiser.step()
                step += 1
            if len(watched):
                error = F.mse_loss(self._outputs(model, watched), watched_goals).item()
                if not math.isfinite(error):
                    raise ValueError(f"{self.name}: the loss became {error} in epoch {epoch}; lower lr ({self.lr})")
                if error < lowest:
                    lowest, best = error, {name: t.clone() for name, t in model.state_dict().items()}
        if best is not None:
            model.load_state_dict(best)

    @torch.no_grad()
    def _outputs(self, model: nn.Module, batch: WeightBatch) -> Tensor:
        model.eval()
        starts = range(0, len(batch), self.batch_size)
        return torch.cat([model(batch[i : i + self.batch_size]) for i in starts]).squeeze(1)


class SetOfWeights(nn.Module):
    """DeepSets of all weights of a network: `rho(mean_i phi(x_i), log n)`; `WeightBatch` to `(B, 1)`.

    The features x_i of a weight are its value, the value relative to its tensor, a signed logarithm, kind and role of
    its tensor (one-hot), and sinusoids of its layer's level. phi is two layers: a third, linear one would commute with
    the mean into rho.
    """

    rms: Tensor
    log_size: Tensor

    def __init__(self, known: WeightBatch, width: int = 64) -> None:
        super().__init__()
        self.register_buffer("rms", raw_weights(known).square().mean().sqrt().clamp_min(1e-12))
        self.register_buffer("log_size", network_sizes(known).float().log().mean())
        features = 3 + len(KINDS) + len(ROLES) + 8
        self.phi = nn.Sequential(nn.Linear(features, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
        self.rho = PredictorHead(width + 1, 1, (4 * width, 4 * width))

    def features(self, batch: WeightBatch) -> Tensor:
        """`(V, 24)`."""
        value = raw_weights(batch) / self.rms
        numbers = torch.stack([value, batch.values, (100 * value).asinh() / 5], 1)
        level = batch.layer_level.repeat_interleave(batch.layer_ptr.diff()).float()
        angle = level[:, None] / torch.tensor([1.0, 4.0, 16.0, 64.0], device=batch.device)
        kind, role = F.one_hot(batch.tensor_type // 8, len(KINDS)), F.one_hot(batch.tensor_type % 8, 8)[:, : len(ROLES)]
        place = torch.cat([kind, role, angle.sin(), angle.cos()], 1)
        return torch.cat([numbers, place.repeat_interleave(tensor_sizes(batch).to(batch.device), 0)], 1)

    def forward(self, batch: WeightBatch) -> Tensor:
        # One mean per network: index_add depends on the order of threads on a GPU.
        sizes = network_sizes(batch)
        pooled = torch.stack([x.mean(0) for x in self.phi(self.features(batch)).split(sizes.tolist())])
        count = sizes.to(pooled).log() - self.log_size
        return self.rho(torch.cat([pooled, count[:, None]], 1))


class DeepSets(Neural):
    """The weights of a network as one set, whatever its architecture (Zaheer et al. 2017, arXiv 1703.06114)."""

    name = "DeepSets"
    module = SetOfWeights


class FlatWeights(nn.Module):
    """All weights in a row, standardised, through an MLP; `WeightBatch` of P weights each to `(B, 1)`."""

    mean: Tensor
    std: Tensor

    def __init__(self, known: WeightBatch, widths: Sequence[int] = (512, 512)) -> None:
        super().__init__()
        rows = raw_weights(known).view(len(known), -1)
        std = rows.std(0, correction=0)
        self.register_buffer("mean", rows.mean(0))
        self.register_buffer("std", std.where(std > 0, torch.ones_like(std)))
        self.head = PredictorHead(rows.shape[1], 1, widths)

    def forward(self, batch: WeightBatch) -> Tensor:
        return self.head((raw_weights(batch).view(len(batch), -1) - self.mean) / self.std)


class MLP(Neural):
    """An MLP on the flattened weights of networks of one architecture; knows nothing of their symmetry."""

    name = "MLP on flat weights"
    module = FlatWeights

    def why_not(self, problem: Problem) -> list[str]:
        return _problems(problem) + _differing_shapes(problem.batch)


class NeuralFunctional(nn.Module):
    """Three equivariant layers, invariant pooling and an MLP; `WeightBatch` of Linear chains to `(B, 1)`.

    HNP layers, which do not mix up inputs or outputs, grow with the square of their number: networks with many have NP
    layers and sinusoids of the places of inputs and outputs, as in the paper.
    """

    scale: Tensor

    def __init__(self, known: WeightBatch, channels: int = 32, most_ends: int = 16) -> None:
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
        few = sum(spec.get_io()) <= most_ends
        linear = layers.HNPLinear if few else layers.NPLinear
        width, blocks = 1, []  # type: int, list[Any]
        if not few:
            blocks.append(layers.IOSinusoidalEncoding(spec))
            width = blocks[0].num_out_chan(width)
        for _ in range(3):
            blocks += [linear(spec, width, channels), layers.TupleOp(nn.ReLU())]
            width = channels
        self.body = nn.Sequential(*blocks, layers.HNPPool(spec), nn.Flatten())
        self.head = PredictorHead(channels * layers.HNPPool.get_num_outs(spec), 1)

    def features(self, batch: WeightBatch) -> Any:
        """nfn's `WeightSpaceFeatures`: matrices `(B, 1, out, in)` and biases `(B, 1, out)`."""
        from nfn.common import WeightSpaceFeatures

        rows = raw_weights(batch).view(len(batch), -1) / self.scale
        # The chunks of a matrix are its rows in order, in every chunking.
        tensors = [
            x.reshape(len(batch), 1, *shape) for x, shape in zip(rows.split(self.sizes, 1), self.shapes, strict=True)
        ]
        return WeightSpaceFeatures(tensors[::2], tensors[1::2])

    def forward(self, batch: WeightBatch) -> Tensor:
        return self.head(self.body(self.features(batch)))


class NFN(Neural):
    """Neural functional networks (Zhou et al. 2023, arXiv 2302.14040), by their authors' package `nfn`."""

    name = "NFN"
    module = NeuralFunctional

    def why_not(self, problem: Problem) -> list[str]:
        batch = problem.batch
        reasons = _problems(problem) + _differing_shapes(batch)
        if not reasons and len(batch):
            reasons += self._not_a_chain(batch)
        return reasons + _missing("nfn.layers", "nfn")

    @staticmethod
    def _not_a_chain(batch: WeightBatch) -> list[str]:
        shapes = batch.shapes[0]
        types = batch.tensor_type.view(len(batch), -1)
        weights, biases = shapes[::2], shapes[1::2]
        chain = (
            len(weights) == len(biases)
            and all(len(w) == 2 and b == w[:1] for w, b in zip(weights, biases, strict=True))
            and all(after[1] == before[0] for before, after in zip(weights, weights[1:], strict=False))
            and bool((types[:, ::2] == 0).all() and (types[:, 1::2] == 1).all())
        )
        if not chain:
            return [f"networks that are no chain of Linear layers with biases: {batch.network_name(0)} has {shapes}"]
        return [] if len(weights) > 1 else ["networks without a hidden layer"]


BASELINES: dict[str, Baseline] = {
    "mean": Mean(),
    "statistics": Statistics(),
    "statistics_fan_in": StatisticsByFanIn(),
    "deepsets": DeepSets(),
    "mlp": MLP(),
    "nfn": NFN(epochs=70),  # about as long as DeepSets; 100 epochs predict no better
}
