"""What each tool's verb does. A function takes the parsed options of the verb that has its name."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from aps.cli.study import is_missing, load, runnable, study_options, tracking_address
from aps.errors import UserError
from aps.text import number_of


def init(args: argparse.Namespace) -> None:
    from aps.workflow.folder import lay_out

    lay_out(args.folder, args.study)
    print(f"{args.folder}: read its README.md, then: cd {args.folder} && aps run")


def run(args: argparse.Namespace) -> None:
    """Becomes Snakemake, so that signals reach it."""
    from aps.workflow.start import command

    arguments = command(args.arguments)
    sys.stdout.flush()
    os.execv(arguments[0], arguments)


def data(args: argparse.Namespace) -> None:
    """Prepares a dataset. If it is a study's, what the study can't do with so few images is said before anything trains."""
    from aps.data.prepare import prepare
    from aps.layout import manifest_of, manifest_path
    from aps.settings.blocks import SourceSettings, UserDataset

    has_study = args.overrides or any(Path(file).exists() for file in args.configfile)
    study = load(args) if not is_missing(args) and (args.out is None or has_study) else None
    source: SourceSettings | UserDataset = study.source(args.name) if study else SourceSettings()
    if args.entry is not None:
        source = UserDataset.from_json(args.entry)
    if isinstance(source, SourceSettings):
        if args.source is not None:
            source = source.model_copy(update={"path": args.source})
        if args.no_download:
            source = source.model_copy(update={"download": False})
    elif args.source is not None:
        raise UserError(f"--source is for published datasets; datasets.{args.name} of the study says where yours lies")
    folder = args.out or manifest_path(study.results if study else "results", args.name, source).parent
    prepare(args.name, folder, source, args.again)
    if study is not None and folder.resolve() == manifest_of(study, args.name).parent.resolve():
        from aps.findings import Findings
        from aps.shortages import check_shortages

        check_shortages(Findings(study), {args.name})


def report(args: argparse.Namespace) -> None:
    """Brings MLflow up to date and writes the report."""
    study = load(args)
    from aps.files import make_folder
    from aps.findings import Findings
    from aps.inference.serving import sync_models
    from aps.layout import report_folder
    from aps.report.page import write_report
    from aps.tracking.syncing import log_report, sync

    folder = args.out or report_folder(study)
    make_folder(folder)
    address = tracking_address(study)
    mlflow_answers = not sync(study, address).away
    if mlflow_answers:
        sync_models(study, address)
    findings = Findings(study, sources=True, gone=True)
    files, runs = write_report(study, folder, address, study_options(args), findings)
    findings.stamp_report(folder)
    if mlflow_answers:
        log_report(study, address, files)
    print(f"report on {len(runs)} of {len(study.jobs())} runs: {files[0]}, {files[1]}")


def results(args: argparse.Namespace) -> None:
    study = load(args)
    from aps.report.terminal import terminal

    print(runnable(terminal(study, tracking_address(study)), args))


def status(args: argparse.Namespace) -> None:
    study = load(args)
    from aps.findings import Findings
    from aps.status import status_of, text

    findings = Findings(study, sources=True)
    statuses = status_of(study, findings=findings)
    lines = findings.other_code()
    print("\n".join([text(study, statuses), *([""] if lines else []), *(runnable(line, args) for line in lines)]))
    if args.picture is not None:
        from aps.report.states import draw_status

        draw_status(study, statuses, args.picture)
        print(f"\n{args.picture}")


def compare(args: argparse.Namespace) -> None:
    from aps.compare import compare as compare_runs

    print(compare_runs(args.runs))


def ui(args: argparse.Namespace) -> None:
    study = load(args)
    from aps.tracking.browsing import show

    show(study, tracking_address(study), args.port)


def import_weights(args: argparse.Namespace) -> None:
    from aps.models.transfer import import_weights as import_checkpoint

    for file in import_checkpoint(args.checkpoint, args.out, args.attention_heads):
        print(file)


def show_views(args: argparse.Namespace) -> None:
    from aps.layout import manifest_of
    from aps.settings.study import experiment_model, method_of
    from aps.show_views import show_views as draw_views

    if args.manifest is not None and args.experiment is None and is_missing(args):
        plain = {"dataset": args.manifest.parent.name}
        settings, manifest = experiment_model(method_of(plain)).model_validate(plain), args.manifest
    else:
        study = load(args)
        settings = study.experiment(args.experiment or next(iter(study.experiments)))
        manifest = args.manifest or manifest_of(study, settings.dataset.name)
    print(draw_views(manifest, settings, args.out, args.images, args.seed))
    print(args.out)


def check(args: argparse.Namespace) -> None:
    study = load(args)
    from aps.findings import Findings
    from aps.preflight import hints, problems

    print(
        f"study '{study.study}': {number_of(len(study.experiments), 'experiment')}, {number_of(len(study.jobs()), 'run')}, "
        f"results in {study.results}/"
    )
    for name, e in study.experiments.items():
        others = {f"{stage}: {e.dataset_of(stage)}" for stage in e.stages if e.dataset_of(stage) != e.dataset.name}
        other_datasets = f" ({', '.join(sorted(others))})" if others else ""
        print(f"  {name:<28} {e.dataset.name:<14} seeds {list(e.seeds)}  {', '.join(e.stages)}{other_datasets}")
    findings = Findings(study)
    for hint in hints(study, findings):
        print(runnable(hint, args))
    # Each once, whatever the number of stages that would meet it
    sentences = list(dict.fromkeys(problems(study, findings)))
    for problem in sentences[:-1]:
        print(f"error: {runnable(problem, args)}", file=sys.stderr)
    if sentences:
        raise UserError(sentences[-1])
    print(runnable("nothing speaks against it: `snakemake all`", args))


def estimate(args: argparse.Namespace) -> None:
    from aps.estimate import estimate as estimate_study

    print(estimate_study(load(args), args.gpu, args.utilization))


def sync(args: argparse.Namespace) -> None:
    study = load(args)
    from aps.inference.serving import sync_models
    from aps.tracking.syncing import sync as sync_runs

    address = tracking_address(study)
    runs = sync_runs(study, address)
    models, missing_models = sync_models(study, address) if not runs.missing and not runs.unasked else (0, 0)
    print(
        f"MLflow: {number_of(runs.sent, 'run')} brought up to date, {number_of(models, 'model')} logged, "
        f"{runs.missing + missing_models} could not be sent"
    )
    if runs.missing:
        raise UserError(
            f"MLflow at {address} did not take {number_of(runs.missing, 'run')} ({runs.reason}); mend that and run "
            "`python -m aps sync` again"
        )
    if runs.unasked:
        raise UserError(
            f"MLflow at {address} does not say which runs it has ({runs.reason}); mend that and run `python -m aps sync` again"
        )
    if missing_models:
        raise UserError(
            f"MLflow at {address} did not take {number_of(missing_models, 'model')}; mend that and run `python -m aps sync` again"
        )


def gc(args: argparse.Namespace) -> None:
    from aps.gc import delete, survey
    from aps.settings.reading import load_study

    folders, kept = survey([load_study([file]) for file in args.studies])
    if kept is not None:
        print(kept)
    for entry in folders:
        print(f"{entry.bytes / 1e6:10,.1f} MB  {entry.folder}  ({entry.why})")
    total = sum(entry.bytes for entry in folders)
    print(f"{total / 1e6:10,.1f} MB in {number_of(len(folders), 'folder')} that no study of these files needs")
    if args.delete:
        print(f"{delete(folders) / 1e6:10,.1f} MB deleted")
    elif folders:
        print("nothing was deleted; the same command with --delete deletes them")
