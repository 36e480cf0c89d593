"""The verb of a stage: it runs the stage, or brings its finished results back.

A stage's verb works in two ways. Rules give all of it (`--settings`, `--manifest`, `--out` ...). People give a study,
an experiment and a seed, and the same paths follow from those.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from aps.cli.study import load, tracking_address
from aps.errors import Preempted, UserError
from aps.files import check_weights
from aps.registry import resolve
from aps.runtime.ranks import ranks, started_by_torchrun
from aps.stages import STAGES, Stage

if TYPE_CHECKING:  # settings take half of the time that `--help` does
    from aps.findings import Findings
    from aps.results import StageJob


def stage_verb(name: str) -> Callable[[argparse.Namespace], None]:
    """The function of a stage's verb."""

    def run(args: argparse.Namespace) -> None:
        from aps.inference.serving import track_model
        from aps.results import forget, restore_finished
        from aps.runtime import launch
        from aps.runtime.gpus import hold
        from aps.runtime.slurm import Claim

        stage = STAGES[name]
        job = stage_job(stage, args)
        if started_by_torchrun():
            _compute(stage, job)
            return
        with Claim(job.checkpoints, stage.name):
            if args.again:
                forget(job.checkpoints)
            if restore_finished(job):
                message = "finished before with these settings; its results are back in"
                print(f"{job.label}: {message} {job.out} (--again computes them again)", file=sys.stderr)
            elif args.processes > 1 or args.nodes > 1:
                with hold(args.processes) if args.nodes == 1 else nullcontext():
                    launch.run(args.processes, args.nodes)
                if not restore_finished(job):
                    raise Preempted(f"{job.label} on {args.processes} processes")
                track_model(job.out, job.tracking, job.label)
            else:
                with hold(1):
                    _compute(stage, job)
                track_model(job.out, job.tracking, job.label)

    return run


def _compute(stage: Stage, job: StageJob) -> None:
    """Run the stage. Raises UserError where it returns without a result."""
    resolve(f"{stage.module}:run", stage.described)(job)
    if ranks().rank == 0 and not (job.checkpoints / "finished" / "metrics.json").exists():
        raise UserError(
            f"{job.label} returned without a result; the function `run` of {stage.described} has to end with StageRun.finish"
        )


def stage_job(stage: Stage, args: argparse.Namespace) -> StageJob:
    """The job that a command describes.

    Raises:
        UserError: an option doesn't fit the stage, or an input is missing or not the study's.
    """
    from aps.layout import encoder_file, encoder_job, manifest_of, manifest_path, stage_folder, study_folder
    from aps.results import StageJob, saved_run
    from aps.settings.study import StageSettings
    from aps.tracking.addresses import OFF

    if args.profile is not None and not stage.traced:
        traced = ", ".join(row.name for row in STAGES.values() if row.traced)
        raise UserError(f"--profile traces {traced}, not {stage.name}; leave it out")
    if args.settings is not None:
        settings, study_name = StageSettings.from_json(args.settings), args.study or "study"
        results, description = args.results or Path("results"), ""
        folder, manifest = results / study_name, manifest_path(results, settings.dataset_name)
        encoder, tracking = args.encoder, args.tracking or os.environ.get("MLFLOW_TRACKING_URI", OFF)
        made_by_stage = True  # the encoder, by a stage of this study; else the file is the user's
        if settings.stage != stage.name:
            raise UserError(
                f"--settings are for stage {settings.stage}, but the verb is {stage.name}; use the same stage for both"
            )
    else:
        for option, given in (("study", args.study), ("results", args.results)):
            if given is not None:
                raise UserError(
                    f"--{option} says nothing beside a study, which has its own; give `--set {option}={given}` instead"
                )
        study = load(args)
        name = args.experiment or next(iter(study.experiments))
        seed = args.seed if args.seed is not None else study.experiment(name).seeds[0]
        settings, study_name, results = study.stage_settings(name, seed, stage.name), study.study, Path(study.results)
        address = tracking_address(study)  # also where --tracking is given: it keeps the study's credentials
        encoder, tracking = args.encoder, args.tracking or address
        made_by_stage = encoder is None and encoder_job(study, name, seed) is not None
        folder, description = study_folder(study), study.experiments[name].description
        manifest = manifest_of(study, settings.dataset_name)
        if encoder is None and stage.encoder:
            encoder = encoder_file(study, name, seed)
        if not started_by_torchrun():
            from aps.findings import Findings

            findings = Findings(study)
            if args.encoder is None and stage.encoder:
                _check_encoder(findings, name, seed, f"{stage.name} {name}/seed{seed}")
            if args.manifest is None:
                _check_images(findings, settings.dataset_name)
    manifest = args.manifest or manifest
    for path in (manifest, encoder if made_by_stage else None):
        if path is not None and not path.exists():
            raise UserError(f"{path} is missing; run the stage that makes it (`snakemake {path}`)")
    if encoder is not None:
        check_weights(encoder)
    return StageJob(
        settings=settings,
        study=study_name,
        description=description,
        tracking=tracking,
        manifest=manifest,
        encoder=encoder,
        out=args.out or stage_folder(folder, settings.experiment, settings.seed, stage.name),
        checkpoints=saved_run(results, settings, manifest, encoder),
        workers=args.workers,
        checkpoint_minutes=args.checkpoint_minutes,
        profile=args.profile,
    )


def _check_images(findings: Findings, dataset: str) -> None:
    """Raises UserError where a dataset's files have changed since it was prepared: its digest would name other images."""
    if (why := findings.why_outdated(dataset)) is not None:
        raise UserError(
            f"dataset '{dataset}' is not as it was prepared ({why}); run `python -m aps data {dataset}` first"
        )


def _check_encoder(findings: Findings, experiment: str, seed: int, label: str) -> None:
    """Raises UserError where the study's encoder is there but was not made as the study says."""
    from aps.layout import encoder_job

    maker = encoder_job(findings.study, experiment, seed)
    if maker is None:
        return
    finding, (source, number, stage) = findings.finding(*maker), maker
    if finding.stale:
        raise UserError(
            f"{label}: its encoder in {finding.folder} is not this study's ({finding.problem}); run {stage} first: "
            f"the same command with `{stage} --experiment {source} --seed {number}`"
        )
