"""How the neural baselines are trained, and the weights as they see them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...data.batch import WeightBatch
from ...nn.predictor import LOGIT_MARGIN
from ...training.loop import decay_groups, warm_cosine
from ...training.settings import SEED_STRIDE
from .problem import Problem, check, problems

if TYPE_CHECKING:
    import numpy as np


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
        return problems(problem)

    def fit_predict(self, problem: Problem) -> np.ndarray:
        import numpy as np

        check(self, problem)
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
