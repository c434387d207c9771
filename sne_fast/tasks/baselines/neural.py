"""Training of the neural baselines, and the raw weights that they read."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...data.batch import WeightBatch
from ...nn.predictor import LOGIT_MARGIN
from ...training.optimiser import adamw, draws_of, set_learning_rate, warm_cosine
from .problem import Problem, check, problems


def tensor_sizes(batch: WeightBatch) -> Tensor:
    """Return the number of weights of each tensor, `(T,)` int64 on the CPU."""
    return batch.chunk_ptr_host[batch.tensor_ptr_host].diff()


def raw_weights(batch: WeightBatch) -> Tensor:
    """Return the weights as they were before `pack` divided them by their scale, `(V,)`."""
    return batch.values * batch.tensor_scale.repeat_interleave(tensor_sizes(batch).to(batch.device))


class Neural:
    """A baseline that trains a module from B networks to `(B, outputs)`, on normalised targets or on classes.

    It minimises the squared error, or the cross entropy, by AdamW in batches of a fixed number of networks, with a
    warm-up, a cosine and gradients clipped to norm 1, and keeps the epoch with the lowest validation loss. Weight
    decay, warm-up and clipping are those of :class:`sne_fast.training.FitSettings`. On a CPU the same seed gives the
    same bits; torch's global generators are left alone.

    :func:`sne_fast.training.fit` is another loop: its batches hold a budget of weights, it trains a predictor by the
    predictor's own loss, on several processes and under autocast, and it resumes.

    Args:
        epochs: passes over the training networks; the last one is kept if there are no validation networks.
        lr: peak learning rate.
        batch_size: networks per step.
    """

    name = ""
    module: type[nn.Module]
    """Class of the module; it takes the training networks, by which it normalises its inputs, and how many outputs."""
    warmup, weight_decay, clip = 0.1, 1e-2, 1.0

    def __init__(self, epochs: int = 100, lr: float = 1e-3, batch_size: int = 16) -> None:
        self.epochs, self.lr, self.batch_size = epochs, lr, batch_size

    def why_not(self, problem: Problem) -> list[str]:
        """Return the reasons against this problem, see :class:`Baseline`."""
        return problems(problem)

    def fit_predict(self, problem: Problem) -> np.ndarray:
        """Train, and return predictions for all networks, see :class:`Baseline`."""
        check(self, problem)
        batch = problem.batch.detach().to(torch.float32)
        train, validation = list(problem.train), list(problem.validation)
        known = batch[train]
        targets = torch.from_numpy(np.asarray(problem.targets, np.float64)[train + validation])
        if problem.logit:
            targets = targets.clamp(LOGIT_MARGIN, 1 - LOGIT_MARGIN).logit()
        mean, std = targets[: len(train)].mean(), targets[: len(train)].std(correction=0)
        std = std if std > 0 else torch.ones_like(std)
        goals = targets.long() if problem.classes else ((targets - mean) / std).float()
        goals = goals.to(batch.device)
        with torch.random.fork_rng(devices=[]):
            # torch.manual_seed would seed the accelerators too.
            torch.default_generator.manual_seed(problem.seed)
            model = self._module(known, problem).to(batch.device, torch.float32)
        self._fit(model, known, goals[: len(train)], batch[validation], goals[len(train) :], problem)
        outputs = self._outputs(model, batch).double().cpu()
        if problem.classes:
            return outputs.softmax(1).numpy()
        values = outputs.squeeze(1) * std + mean
        return (values.sigmoid() if problem.logit else values).numpy()

    def _module(self, known: WeightBatch, problem: Problem) -> nn.Module:
        """Make the module, with random numbers of torch's generator."""
        return self.module(known, problem.outputs)

    def _fit(
        self,
        model: nn.Module,
        known: WeightBatch,
        goals: Tensor,
        watched: WeightBatch,
        watched_goals: Tensor,
        problem: Problem,
    ) -> None:
        optimiser = adamw(model, self.lr, self.weight_decay)
        order = torch.Generator().manual_seed(problem.seed)
        steps = self.epochs * math.ceil(len(known) / self.batch_size)
        step, lowest, best = 0, math.inf, None
        for epoch in range(self.epochs):
            model.train()
            for places in torch.randperm(len(known), generator=order).split(self.batch_size):
                set_learning_rate(optimiser, self.lr * warm_cosine(step, steps, self.warmup))
                rows = places.tolist()
                part = known[rows]
                if problem.augment is not None:
                    part = problem.augment(part, rows, draws_of(problem.seed, step))
                loss = _loss(model(part), goals[places.to(goals.device)])
                optimiser.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), self.clip)
                optimiser.step()
                step += 1
            if len(watched):
                error = _loss(self._outputs(model, watched), watched_goals).item()
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
        return torch.cat([model(batch[i : i + self.batch_size]) for i in starts])


def _loss(outputs: Tensor, goals: Tensor) -> Tensor:
    """Return the mean squared error, or the cross entropy for goals that are whole numbers."""
    return F.mse_loss(outputs.squeeze(1), goals) if goals.is_floating_point() else F.cross_entropy(outputs, goals)
