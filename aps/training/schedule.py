"""Learning rates as pure functions of the step, so that a resumed run has the same ones without saved state."""

from __future__ import annotations

import math
from collections.abc import Iterator

from aps.errors import UserError
from aps.settings.blocks import DetectionSettings, FinetuneSettings, PretrainSettings
from aps.settings.study import ExperimentSettings

LOW = 0.1  # of the peak: with a learning rate that is nowhere higher, a run has hardly trained


def scaled_lr(lr: float, batch_size: int, per: int) -> float:
    """Linear scaling (arXiv 1706.02677) of `lr`, the learning rate of a batch of `per`; batch_size counts all processes."""
    return lr * batch_size / per


def cosine(progress: float) -> float:
    """Half a period of the cosine, from 1 at progress 0 to 0 at progress 1."""
    return (1 + math.cos(math.pi * progress)) / 2


def pretraining_lr(settings: PretrainSettings, step: float, steps_per_epoch: int) -> float:
    """Learning rate of optimizer step `step`, counted from 0 over the whole run.

    `release`: constant through epoch e, `min((e+1)/warmup, (1+cos(pi*e/E))/2)` (method.md, Pretraining recipe).
    `cosine`: by step, linear from 0 through the warmup epochs, then half a cosine to 0 (MoCo v3, MAE).
    """
    peak = scaled_lr(settings.lr, settings.batch_size, 256)
    warmup, epochs = settings.warmup_epochs, settings.epochs
    if settings.schedule == "release":
        epoch = step // steps_per_epoch
        return peak * min((epoch + 1) / warmup if warmup else 1.0, cosine(epoch / epochs))
    progress = step / steps_per_epoch
    if progress < warmup:
        return peak * progress / warmup
    return peak * cosine((progress - warmup) / (epochs - warmup))


def check_finetuning(experiment: ExperimentSettings) -> None:
    """Raises ValueError where the learning rate of every epoch of finetuning is 0."""
    s = experiment.finetune
    if not any(finetuning_lr(s, epoch) for epoch in range(s.epochs)):
        raise ValueError(
            f"finetune.warmup_epochs {s.warmup_epochs} starts from finetune.warmup_lr 0 and finetune.epochs is {s.epochs}, so the "
            "learning rate of every step is 0; raise finetune.epochs or finetune.warmup_lr"
        )


def single_step(settings: PretrainSettings) -> str | None:
    """A clause on a pretraining that ends where its schedule starts, after one optimizer step, if the learning rate is low there.

    Of two steps the second is half the schedule later, so where that is low too, `endless_warmup` says so.

    Raises:
        UserError: the learning rate is 0 there, so that the encoder would stay as it was drawn.
    """
    rate, peak = pretraining_lr(settings, 0, 1), scaled_lr(settings.lr, settings.batch_size, 256)
    if rate >= LOW * peak:
        return None
    length = "pretrain.epochs" if settings.budget is None else "pretrain.budget"
    clause = (
        f"{length} leaves only the start of pretrain.warmup_epochs {settings.warmup_epochs}, where the learning rate is "
        f"{rate:.3g} instead of {peak:.3g}; raise {length} or set pretrain.warmup_epochs: 0"
    )
    if not rate:
        raise UserError(clause)
    return clause


def oddities(stage: str, settings: PretrainSettings | FinetuneSettings | DetectionSettings) -> Iterator[str]:
    """Clauses on a learning rate that does other than rise to its peak and fall from it."""
    if (clause := endless_warmup(stage, settings)) is not None:
        yield clause
    if isinstance(settings, FinetuneSettings):
        peak = scaled_lr(settings.lr, settings.batch_size, 512)
        for key, effect in above_peak(settings).items():
            yield (
                f"{stage}.{key} {getattr(settings, key):g} is above the peak {stage}.lr {settings.lr:g} x "
                f"{settings.batch_size}/512 = {peak:.3g}, so {effect}; lower {stage}.{key} or raise {stage}.lr"
            )


def endless_warmup(stage: str, settings: PretrainSettings | FinetuneSettings | DetectionSettings) -> str | None:
    """A clause on a warmup that takes all of a training, and what it does to the learning rate, else None."""
    unit = "iterations" if isinstance(settings, DetectionSettings) else "epochs"
    warmup, length = getattr(settings, f"warmup_{unit}"), getattr(settings, unit)
    schedule = getattr(settings, "schedule", None)  # None: finetuning's and detection's
    if warmup < length or (schedule == "release" and warmup == 1):  # whose first epoch is at the peak
        return None
    side = "above" if isinstance(settings, FinetuneSettings) and above_peak(settings) else "below"
    effect = "never falls" if schedule == "cosine" else f"stays {side} {stage}.lr"
    return (
        f"{stage}.warmup_{unit} {warmup} takes all of {stage}.{unit} {length}, so the learning rate {effect}; lower "
        f"{stage}.warmup_{unit} or raise {stage}.{unit}"
    )


def above_peak(settings: FinetuneSettings) -> dict[str, str]:
    """The ends of finetuning's schedule, which no batch scales, that are above its peak, which one does: key -> effect.

    The last one has the highest learning rate of the run.
    """
    peak = scaled_lr(settings.lr, settings.batch_size, 512)
    ends = {
        "warmup_lr": (settings.warmup_epochs > 0, "the warmup lowers the learning rate"),
        "min_lr": (settings.epochs > max(1, settings.warmup_epochs), "the learning rate rises"),
    }
    found = {key: effect for key, (used, effect) in ends.items() if used and getattr(settings, key) > peak}
    return dict(sorted(found.items(), key=lambda item: getattr(settings, item[0])))


def finetuning_lr(settings: FinetuneSettings, epoch: int) -> float:
    """Learning rate of an epoch counted from 0: timm's CosineLRScheduler with `t_initial` epochs and no warmup prefix.

    Linear from `warmup_lr` during warmup; then the cosine to `min_lr` as if it had run from epoch 0.
    """
    peak = scaled_lr(settings.lr, settings.batch_size, 512)
    if epoch < settings.warmup_epochs:
        return settings.warmup_lr + epoch * (peak - settings.warmup_lr) / settings.warmup_epochs
    return settings.min_lr + (peak - settings.min_lr) * cosine(epoch / settings.epochs)
