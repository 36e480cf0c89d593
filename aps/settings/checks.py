"""What one block alone can't know: names that other rooms register, other experiments, and what components say."""

from __future__ import annotations

from aps.errors import UserError
from aps.registry import CHECKS, DATASETS, DETECTION_DATASETS, METHODS, nearest, resolve
from aps.settings.study import Study
from aps.stages import STAGES


def check(study: Study, where: str) -> None:
    """Raises UserError where the study names what is not there, or a component can't be built of its settings."""
    known = {*DATASETS.names(), *DETECTION_DATASETS.names()}
    if unknown := sorted(set(study.sources) - known):
        raise UserError(f"{where}: sources names dataset '{unknown[0]}'; {nearest(unknown[0], known)}")
    for name, e in study.experiments.items():
        prefix = f"{where}: experiment '{name}':"
        if not all(STAGES[stage].detects for stage in e.stages) and e.dataset.name not in DATASETS:
            raise UserError(f"{prefix} dataset '{e.dataset.name}' is unknown; {DATASETS.unknown(e.dataset.name)}")
        components = [resolve(path) for path in (*CHECKS, *(STAGES[stage].check for stage in e.stages)) if path]
        if "pretrain" in e.stages:
            components.append(METHODS.load(e.pretrain.method).check)
        for component in components:
            try:
                component(e)
            except ValueError as error:
                raise UserError(f"{prefix} {error}") from None
        source = study.pretrain_source(name)
        if source is None:
            continue
        if source not in study.experiments:
            raise UserError(
                f"{prefix} encoder.weights names experiment '{source}', which does not exist; {nearest(source, study.experiments)}"
            )
        other = study.experiments[source]
        if "pretrain" not in other.stages:
            raise UserError(
                f"{prefix} takes its encoder from '{source}', whose stages lack pretrain; add it, or set encoder.weights: random"
            )
        if missing := sorted(set(e.seeds) - set(other.seeds)):
            raise UserError(
                f"{prefix} seeds {missing} are not among the seeds {list(other.seeds)} of '{source}', whose encoder it takes"
            )
        shape = ("arch", "dim", "depth", "heads", "patch_size", "qkv_bias", "mlp_ratio")
        if different := [key for key in shape if getattr(e.encoder, key) != getattr(other.encoder, key)]:
            raise UserError(
                f"{prefix} encoder.{different[0]} differs from that of '{source}', whose weights it takes; set them alike"
            )
