"""The epochs of a training: steps, validation, the best parameters, the checkpoint and the log."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

from .checkpoint import Checkpoint
from .progress import Log, Progress, not_finite
from .settings import FitSettings, History
from .steps import Trainer


def run_epochs(
    trainer: Trainer,
    state: Progress,
    checkpoint: Checkpoint,
    *,
    validate: Callable[[], float] | None = None,
    log: Log | None = None,
    on_epoch: Callable[[int, History], None] | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> History:
    """Train until all epochs are done or patience ends, and leave the module with the parameters that are kept.

    Args:
        trainer: takes the steps.
        state: where the training stands, as `checkpoint.open` returned it.
        checkpoint: of the training; what it holds is restored.
        validate: returns the loss on networks that are not trained on; called after every epoch.
        log: takes the numbers of every epoch.
        on_epoch: called after each epoch with its number and the history so far.
        on_batch: called after each step with the number of weights trained on in this epoch.

    Raises:
        ValueError: a loss, a gradient or a parameter that is not finite.
        OSError: the checkpoint cannot be written.
    """
    module, settings, world = trainer.module, trainer.settings, trainer.world
    world.share_parameters(module)
    checkpoint.restore(trainer)
    spoilt = not_finite(module.state_dict())
    if spoilt is not None:
        raise ValueError(f"fit: predictor must have finite parameters, {spoilt} has others before any step")
    if log is not None and world.first:
        log.resume(state.epoch)
    history, start = state.history, time.perf_counter() - state.history.seconds

    def on_step() -> None:
        history.seconds = time.perf_counter() - start
        checkpoint.save_in_time(state, trainer)

    while state.epoch < settings.epochs and not _finished(state, settings, validate is not None):
        epoch = state.epoch
        loss = trainer.epoch(state, on_batch, on_step)
        history.train_loss.append(loss)
        row = {"train_loss": loss}
        if validate is not None:
            history.validation_loss.append(validate())
            row["validation_loss"] = history.validation_loss[-1]
            if _is_lowest(history.validation_loss):
                state.lowest = epoch
                if settings.keep_best:
                    state.best = {name: t.detach().clone() for name, t in module.state_dict().items()}
        state.epoch += 1
        history.kept = epoch if state.best is None else state.lowest
        history.seconds = time.perf_counter() - start
        history.weights_per_second = state.epoch * sum(trainer.plan.weights) / history.seconds
        if log is not None and world.first:
            log(epoch, {**row, "lr": trainer.lr, "seconds": history.seconds})
        checkpoint.save(state, trainer)
        if on_epoch is not None:
            on_epoch(epoch, history)
    world.wait()
    if state.best is not None:
        module.load_state_dict(state.best)
    module.eval()
    return history


def _is_lowest(losses: Sequence[float]) -> bool:
    """Return True if the last loss is the lowest one, where losses that are not finite are never."""
    return math.isfinite(losses[-1]) and losses[-1] <= min(loss for loss in losses if math.isfinite(loss))


def _finished(state: Progress, settings: FitSettings, watched: bool) -> bool:
    patient = settings.patience is None or not watched or not state.epoch
    return not patient and state.epoch - 1 - state.lowest >= (settings.patience or 0)
