"""`python -m aps VERB`: one verb a stage, and a few tools.

Every verb of a stage works in two ways. Rules give all of it (`--settings`, `--manifest`, `--out` ...); people give a
study, an experiment and a seed, and the same paths follow from those. Heavy imports happen inside the verb that needs
them, so that `--help` and planning stay quick.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import importlib
import json
import math
import os
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from aps import __version__
from aps.errors import Preempted, UserError
from aps.files import DISK_ERRORS, check_weights
from aps.inference import verbs as inference
from aps.runtime.memory import lost_worker, out_of_memory
from aps.runtime.ranks import ranks, started_by_torchrun
from aps.stages import STAGES, Stage

if TYPE_CHECKING:  # settings take half of the time that `--help` does
    from aps.settings.study import Study

DEFAULT_STUDY = "config/config.yaml"
ANY_STUDY = " --configfile STUDY.yaml"  # in hints of those who don't know the study
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
MISTAKE = 2  # of the user's: the same command fails again
PREEMPTED = 75  # EX_TEMPFAIL: the work is saved, start the same command again


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status: 0 done, 2 a mistake the user can fix, 75 preempted (run it again to go on).

    docs/reliability.md has all of them.
    """
    args = _parsed(sys.argv[1:] if arguments is None else list(arguments))
    if (met := _met_before(args)) is not None:
        print(f"error: {met}\nnot tried again, since another attempt changes nothing of it", file=sys.stderr)
        return MISTAKE
    try:
        args.run(args)
    except UserError as error:
        return _refused(_runnable(str(error), args), args)
    except Preempted as error:
        if ranks().rank == 0:
            print(f"stopped: {error}", file=sys.stderr)
        return 0 if started_by_torchrun() else PREEMPTED  # torchrun would take another status for a failure
    except KeyboardInterrupt:
        print("stopped by the keyboard; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 1
    except (OSError, MemoryError, RuntimeError, ImportError) as error:
        if (sentence := out_of_memory(error, args.verb)) is not None:
            print(f"error: {sentence}", file=sys.stderr)
            return MISTAKE  # not noted: a further attempt asks for more memory
        if (sentence := lost_worker(error, args.verb)) is not None:
            print(f"error: {sentence}", file=sys.stderr)
            return 1
        if (sentence := _disk_sentence(error)) is None:
            raise
        return _refused(sentence, args)
    return 0


def _refused(sentence: str, args: argparse.Namespace) -> int:
    """Says what the user can mend, and notes it for another attempt of the same job."""
    if ranks().rank == 0:
        print(f"error: {sentence}", file=sys.stderr)
        if (note := getattr(args, "mistake", None)) is not None:
            with contextlib.suppress(OSError):  # the disk may be what is wrong
                note.write_text(sentence)
    return MISTAKE


def _met_before(args: argparse.Namespace) -> str | None:
    """What an earlier attempt of this job was refused for.

    Snakemake's retries ask for a failed job again whatever its exit status was; it goes on telling attempts from 1.
    """
    note = getattr(args, "mistake", None)
    if note is None or started_by_torchrun():
        return None
    with contextlib.suppress(OSError, ValueError):
        if args.attempt > 1:
            return str(note.read_text())
        note.unlink(missing_ok=True)
    return None


def _disk_sentence(error: Exception) -> str | None:
    """For what the user's disk does to us; None for any other error."""
    if isinstance(error, RuntimeError) and "home directory" in str(error):
        return "a path begins with ~, and HOME is not set; set HOME, or write the path in full"
    if not isinstance(error, OSError) or error.errno not in {*DISK_ERRORS, errno.EEXIST}:
        return None
    if error.errno == errno.ENAMETOOLONG:
        return f"{str(error.filename)[:60]}...: {error.strerror}; choose a shorter name or folder"
    if error.filename is None:
        return f"a file: {error.strerror}; free space or choose another folder" if error.errno in FULL else None
    return f"{error.filename2 or error.filename}: {error.strerror}; free space or choose another folder"


def _parsed(given: list[str]) -> argparse.Namespace:
    top = parser()
    if given[:1] == ["run"] and given[1:2] not in (["-h"], ["--help"]):  # whatever follows is Snakemake's
        args = top.parse_args(["run"])
        args.arguments = given[1:]
        return args
    args, rest = top.parse_known_args(given)
    if isinstance(getattr(args, "images", None), list) and not any(text.startswith("-") for text in rest):
        args.images += rest  # argparse does not take up optional positionals again behind an option
    elif rest:
        top.parse_args(given)  # refuses them
    return args


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="aps" if Path(sys.argv[0]).name == "aps" else "python -m aps",
        description="Asymmetric Patch Sampling: every stage of the pipeline, and its tools.",
        epilog="The whole DAG: snakemake all. One verb's options: python -m aps VERB --help.",
    )
    top.add_argument("--version", action="version", version=f"aps {__version__}")
    verbs = top.add_subparsers(metavar="VERB", required=True, title="verbs")

    def verb(name: str, run: Callable[[argparse.Namespace], None], text: str) -> argparse.ArgumentParser:
        p = verbs.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        p.set_defaults(run=run, verb=name)
        return p

    p = verb(
        "init", _init, "lay out a folder: a study, a Snakefile that includes the packaged workflow, profiles, a README"
    )
    p.add_argument("folder", type=Path, help="the folder to make")
    p.add_argument("--study", default="demo", help="demo, cifar or own-images (default: demo)")

    p = verb(
        "run", _run, "run the study in this folder, or one named by --configfile: Snakemake with the right arguments"
    )
    p.add_argument(
        "arguments", nargs="*", metavar="...", help="targets and options of Snakemake: -n, --cores, --profile"
    )

    p = verb("data", _data, "prepare a dataset: fetch or find it, verify it, write its manifest")
    p.add_argument("name", help="a dataset's name; an unknown one lists them")
    p.add_argument("--out", type=Path, help="folder of the prepared dataset (default: its own under results/data)")
    p.add_argument(
        "--source", help="folder with the dataset's archives or unpacked files (default: the study's, or download)"
    )
    p.add_argument("--no-download", action="store_true", help="fail rather than download")
    p.add_argument(
        "--entry", metavar="JSON", help="its entry in a study's `datasets`, instead of a study (rules give it)"
    )
    p.add_argument("--again", action="store_true", help="prepare it again, whatever was prepared before")
    _study_options(p)
    _attempt_options(p)

    for stage in STAGES.values():
        p = verb(stage.name, _run_stage(stage), stage.help)
        _stage_options(p)
        if stage.name == "embed":
            inference.add_embed(p)

    p = verb(
        "import-weights", _import_weights, "turn a checkpoint of the authors' release into weights of this project"
    )
    p.add_argument("checkpoint", type=Path, help="a state dict (.pt, .pth)")
    p.add_argument(
        "--out",
        type=Path,
        required=True,
        help="folder for encoder.safetensors and heads.safetensors, or model.safetensors",
    )
    p.add_argument("--attention-heads", type=_number(1, 10_000), help="heads of its encoder (default: of width 64)")

    inference.add(verb)

    p = verb("show-views", _show_views, "draw images of a dataset with their views, kept cells and coverage")
    p.add_argument("--out", type=Path, required=True, help="the .png file to write")
    p.add_argument("--images", type=_number(1, 10_000), default=5, help="how many (default: 5)")
    p.add_argument("--experiment", help="the experiment whose settings to show (default: the study's first)")
    p.add_argument("--manifest", type=Path, help="manifest.json of another dataset than the experiment's")
    p.add_argument(
        "--seed",
        type=_number(0, 2**64 - 1),
        default=0,
        help="of the choice of images and of everything drawn (default: 0)",
    )
    _study_options(p)

    p = verb("report", _report, "tables and figures over the finished runs of a study")
    p.add_argument("--out", type=Path, help="folder of the report (default: results/STUDY/report)")
    _study_options(p)
    _attempt_options(p)

    p = verb("results", _results, "print the table of a study's finished runs, where they lie and how to browse them")
    _study_options(p)

    p = verb("status", _status, "what is done, running, queued, failed or outdated of a study, while it runs too")
    p.add_argument("--picture", type=Path, metavar="FILE", help="draw it: experiments by stages (.svg or .png)")
    _study_options(p)

    p = verb("compare", _compare, "print what finished runs differ in: settings, data, what made them, cost and scores")
    p.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders results/STUDY/EXPERIMENT/seedN/STAGE")

    p = verb(
        "ui", _ui, "show a study's runs in MLflow: start its server where there is none, and print the page's address"
    )
    p.add_argument("--port", type=_number(1, 65_535), default=5000, help="of the server that it starts (default: 5000)")
    _study_options(p)

    p = verb("check", _check, "validate a study and list what it would run")
    _study_options(p)

    p = verb("estimate", _estimate, "operations, GPU hours, memory and disk of every stage of a study, before it runs")
    p.add_argument(
        "--gpu",
        default="a100",
        help="kind of GPU, or cpu: cores of this machine; an unknown one lists them (default: a100)",
    )
    p.add_argument(
        "--utilization", type=float, help="share of the GPU's peak that is reached (default: assumed by width)"
    )
    _study_options(p)

    p = verb(
        "gc", _gc, "list saved runs and results that no study of the given files needs, and delete them when told to"
    )
    p.add_argument("studies", nargs="+", type=Path, metavar="YAML", help="every study that is still needed")
    p.add_argument("--delete", action="store_true", help="delete what is listed")

    p = verb("sync", _sync, "send MLflow what it missed of finished runs")
    _study_options(p)
    return top


# --------------------------------------------------------------------------------------------------
# Options that several verbs have.


def _number(least: int, most: int) -> Callable[[str], int]:
    """The type of an option that is a whole number in a range."""

    def read(text: str) -> int:
        try:
            if least <= (value := int(text)) <= most:
                return value
        except ValueError:
            pass
        from aps.settings.sentences import shown

        raise argparse.ArgumentTypeError(f"{shown(text)} is not a whole number from {least} to {most}; give one")

    return read


def _minutes(text: str) -> float:
    try:
        if 0 <= (value := float(text)) < math.inf:
            return value
    except ValueError:
        pass
    from aps.settings.sentences import shown

    raise argparse.ArgumentTypeError(f"{shown(text)} is no number of minutes from 0; give one, for example 10")


def _study_options(p: argparse._ActionsContainer) -> None:
    p.add_argument(
        "--configfile", nargs="*", default=[DEFAULT_STUDY], metavar="YAML", help=f"study (default: {DEFAULT_STUDY})"
    )
    p.add_argument(
        "--set", nargs="+", default=[], metavar="KEY=VALUE", dest="overrides", help="lay settings over the study"
    )


def _attempt_options(p: argparse._ActionsContainer) -> None:
    p.add_argument(
        "--attempt",
        type=_number(1, 1_000_000),
        default=1,
        help="of this job, as Snakemake counts; rules give it (default: 1)",
    )
    p.add_argument(
        "--mistake", type=Path, metavar="FILE",
        help="where exit status 2 is noted, so that a further attempt fails at once with the same sentence (rules give it)",
    )  # fmt: skip


def _stage_options(p: argparse.ArgumentParser) -> None:
    people = p.add_argument_group("which run (people)")
    _study_options(people)
    people.add_argument("--experiment", help="an experiment of the study (default: its first)")
    people.add_argument("--seed", type=_number(0, 2**64 - 1), help="one of the experiment's seeds (default: its first)")
    rules = p.add_argument_group("which run (rules give all of it)")
    rules.add_argument("--settings", metavar="JSON", help="resolved settings of the stage, instead of a study")
    rules.add_argument("--study", default="study", help="name under which MLflow groups the runs (default: study)")
    rules.add_argument("--results", type=Path, default=Path("results"), help="folder of all results (default: results)")
    rules.add_argument("--tracking", metavar="ADDRESS", help="MLflow's server or store, or none (default: the study's)")
    rules.add_argument("--manifest", type=Path, help="manifest.json of the dataset")
    rules.add_argument("--encoder", type=Path, help="weights to start from (.safetensors)")
    rules.add_argument("--out", type=Path, help="folder for the results")
    _attempt_options(rules)
    how = p.add_argument_group("how to run it (changes no result)")
    how.add_argument("--again", action="store_true", help="start afresh, whatever is saved or finished")
    how.add_argument(
        "--processes", type=_number(1, 100_000), default=1, help="over all nodes, one a GPU, by torchrun (default: 1)"
    )
    how.add_argument("--nodes", type=_number(1, 10_000), default=1, help="of this Slurm job, by srun (default: 1)")
    how.add_argument(
        "--workers",
        type=_number(0, 10_000),
        help="image-decoding workers of each process, for image files (default: its cores)",
    )
    how.add_argument("--checkpoint-minutes", type=_minutes, default=10.0, help="between checkpoints (default: 10)")
    traced = ", ".join(row.name for row in STAGES.values() if row.traced)
    how.add_argument(
        "--profile",
        type=Path,
        metavar="JSON",
        help=f"save a profiler trace of two batches, for ui.perfetto.dev ({traced})",
    )


# --------------------------------------------------------------------------------------------------
# Verbs.


def _load(args: argparse.Namespace) -> Study:
    from aps.settings.reading import load_study, parse_overrides

    return load_study(args.configfile, parse_overrides(args.overrides))


def _runnable(text: str, args: argparse.Namespace) -> str:
    """`text` with its commands such that they work as printed: on the study and settings of this command."""
    if not getattr(args, "configfile", None) or getattr(args, "settings", None) is not None:
        return text  # no verb of a study, or a rule's command, which is told neither
    from aps.settings.reading import parse_overrides

    try:
        overrides = parse_overrides(args.overrides)
    except UserError:  # which is what the text says
        return text
    words = f" {_study_words(args)}".rstrip()
    study = f" --configfile {shlex.join(args.configfile)}" if args.configfile != [DEFAULT_STUDY] else ""
    pairs = [shlex.quote(f"{key}={json.dumps(value)}") for key, value in overrides.items()]
    for_snakemake = f" --config {' '.join(pairs)}" if pairs else ""

    def complete(found: re.Match[str]) -> str:
        command = found[1].removesuffix(ANY_STUDY)
        return f"`{command}{study + for_snakemake if command.startswith('snakemake') else words}`"

    verbs = "|".join([*STAGES, "data", "sync", "results", "report", "status", "check", "estimate"])
    return re.sub(rf"`((?:python -m aps (?:{verbs})|snakemake )\b[^`]*)`", complete, text)


def _study_words(args: argparse.Namespace) -> str:
    """Options by which another verb reads the same study; none where it is the default one."""
    file = f"--configfile {shlex.join(args.configfile)}" if args.configfile != [DEFAULT_STUDY] else ""
    return f"{file} --set {shlex.join(args.overrides)}".strip() if args.overrides else file


def _no_study(args: argparse.Namespace) -> bool:
    """Whether none is named and none is here: what can do without goes on."""
    return args.configfile in ([], [DEFAULT_STUDY]) and not args.overrides and not Path(DEFAULT_STUDY).exists()


def _address(study: Study) -> str:
    from aps.tracking.addresses import tracking_address

    return tracking_address(study.tracking_uri, study.results)


def _run_stage(stage: Stage) -> Callable[[argparse.Namespace], None]:
    def run(args: argparse.Namespace) -> None:
        from aps.inference.serving import track_model
        from aps.results import forget, restore_finished
        from aps.runtime import launch
        from aps.runtime.slurm import Claim

        job = _job(stage, args)
        if started_by_torchrun():
            importlib.import_module(stage.module).run(job)
            return
        with Claim(job.checkpoints, stage.name):
            if args.again:
                forget(job.checkpoints)
            if restore_finished(job):
                message = "finished before with these settings; its results are back in"
                print(f"{job.label}: {message} {job.out} (--again computes them again)", file=sys.stderr)
            elif args.processes > 1 or args.nodes > 1:
                launch.run(args.processes, args.nodes)
                if not restore_finished(job):
                    raise Preempted(f"{job.label} on {args.processes} processes")
                track_model(job.out, job.tracking, job.label)
            else:
                importlib.import_module(stage.module).run(job)
                track_model(job.out, job.tracking, job.label)

    return run


def _job(stage: Stage, args: argparse.Namespace):  # type: ignore[no-untyped-def]  # StageJob, imported late
    from aps.layout import encoder_file, manifest_of, manifest_path, stage_folder, study_folder
    from aps.results import StageJob, saved_run
    from aps.settings.study import StageSettings
    from aps.tracking.addresses import OFF

    if args.profile is not None and not stage.traced:
        traced = ", ".join(row.name for row in STAGES.values() if row.traced)
        raise UserError(f"--profile traces {traced}, not {stage.name}; leave it out")
    made = args.settings is not None  # whether a stage of this study makes the encoder; else the file is the user's own
    if args.settings is not None:
        settings, study_name, results = StageSettings.from_json(args.settings), args.study, args.results
        description = ""
        folder, manifest = results / study_name, manifest_path(results, settings.dataset_name)
        encoder, tracking = args.encoder, args.tracking or os.environ.get("MLFLOW_TRACKING_URI", OFF)
        if settings.stage != stage.name:
            raise UserError(
                f"--settings are for stage {settings.stage}, but the verb is {stage.name}; use the same stage for both"
            )
    else:
        study = _load(args)
        name = args.experiment or next(iter(study.experiments))
        seed = args.seed if args.seed is not None else study.experiment(name).seeds[0]
        settings, study_name, results = study.stage_settings(name, seed, stage.name), study.study, Path(study.results)
        address = _address(study)  # whatever is given, it may carry what the server wants to know
        encoder, tracking = args.encoder, args.tracking or address
        made = encoder is None and study.pretrain_source(name) is not None
        folder, description = study_folder(study), study.experiments[name].description
        manifest = manifest_of(study, settings.dataset_name)
        if encoder is None and stage.encoder:
            encoder = encoder_file(study, name, seed)
            if not started_by_torchrun():
                _check_encoder(study, name, seed, f"{stage.name} {name}/seed{seed}")
    manifest = args.manifest or manifest
    own = encoder is not None and not made
    for path in (manifest, None if own else encoder):
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


def _check_encoder(study: Study, experiment: str, seed: int, label: str) -> None:
    """Raises UserError where the encoder that is there was not made as the study says."""
    from aps.findings import Findings

    source = study.pretrain_source(experiment)
    if source is None:
        return
    found = Findings(study).of(source, seed, "pretrain")
    if found.stale:
        raise UserError(
            f"{label}: its encoder in {found.folder} is not this study's ({found.problem}); run pretrain first: "
            f"the same command with `pretrain --experiment {source} --seed {seed}`"
        )


def _init(args: argparse.Namespace) -> None:
    from aps.workflow.folder import lay_out

    lay_out(args.folder, args.study)
    print(f"{args.folder}: read its README.md, then: cd {args.folder} && aps run")


def _run(args: argparse.Namespace) -> None:
    """Becomes Snakemake, so that signals reach it."""
    from aps.workflow.start import command

    arguments = command(args.arguments)
    sys.stdout.flush()
    os.execv(arguments[0], arguments)


def _data(args: argparse.Namespace) -> None:
    from aps.data.prepare import prepare
    from aps.layout import manifest_path
    from aps.settings.blocks import SourceSettings, UserDataset

    given = args.source is not None or args.entry is not None
    study = (
        None
        if _no_study(args)
        or (args.out is not None and (given or not any(Path(file).exists() for file in args.configfile)))
        else _load(args)
    )
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


def _report(args: argparse.Namespace) -> None:
    """Brings MLflow up to date and writes the report."""
    study = _load(args)
    from aps.findings import Findings
    from aps.inference.serving import sync_models
    from aps.layout import report_folder
    from aps.report.page import write_report
    from aps.tracking.syncing import log_report, sync

    address = _address(study)
    away = sync(study, address).away
    if not away:
        sync_models(study, address)
    folder = args.out or report_folder(study)
    files, runs = write_report(study, folder, address, _study_words(args))
    Findings(study).stamp_report(folder)
    if not away:
        log_report(study, address, files)
    print(f"report on {len(runs)} of {len(study.jobs())} runs: {files[0]}, {files[1]}")


def _results(args: argparse.Namespace) -> None:
    study = _load(args)
    from aps.report.terminal import terminal

    print(terminal(study, _address(study)))


def _status(args: argparse.Namespace) -> None:
    study = _load(args)
    from aps.status import status_of, text

    found = status_of(study)
    print(text(study, found))
    if args.picture is not None:
        from aps.report.states import draw_status

        draw_status(study, found, args.picture)
        print(f"\n{args.picture}")


def _compare(args: argparse.Namespace) -> None:
    from aps.compare import compare

    print(compare(args.runs))


def _ui(args: argparse.Namespace) -> None:
    study = _load(args)
    from aps.tracking.browsing import show

    show(study, _address(study), args.port)


def _import_weights(args: argparse.Namespace) -> None:
    from aps.models.transfer import import_weights

    for file in import_weights(args.checkpoint, args.out, args.attention_heads):
        print(file)


def _show_views(args: argparse.Namespace) -> None:
    from aps.layout import manifest_of
    from aps.settings.study import experiment_model, method_of
    from aps.show_views import show_views

    if args.manifest is not None and args.experiment is None and _no_study(args):
        plain = {"dataset": args.manifest.parent.name}
        settings, manifest = experiment_model(method_of(plain)).model_validate(plain), args.manifest
    else:
        study = _load(args)
        settings = study.experiment(args.experiment or next(iter(study.experiments)))
        manifest = args.manifest or manifest_of(study, settings.dataset.name)
    print(show_views(manifest, settings, args.out, args.images, args.seed))
    print(args.out)


def _check(args: argparse.Namespace) -> None:
    study = _load(args)
    from aps.preflight import hints, problems

    print(
        f"study '{study.study}': {len(study.experiments)} experiments, {len(study.jobs())} runs, results in {study.results}/"
    )
    for name, e in study.experiments.items():
        others = {f"{stage}: {e.dataset_of(stage)}" for stage in e.stages if e.dataset_of(stage) != e.dataset.name}
        shown = f" ({', '.join(sorted(others))})" if others else ""
        print(f"  {name:<28} {e.dataset.name:<14} seeds {list(e.seeds)}  {', '.join(e.stages)}{shown}")
    for hint in hints(study):
        print(_runnable(hint, args))
    found = list(problems(study))
    for problem in found[:-1]:
        print(f"error: {_runnable(problem, args)}", file=sys.stderr)
    if found:
        raise UserError(found[-1])
    print(_runnable("nothing speaks against it: `snakemake all`", args))


def _estimate(args: argparse.Namespace) -> None:
    from aps.estimate import estimate

    print(estimate(_load(args), args.gpu, args.utilization))


def _sync(args: argparse.Namespace) -> None:
    study = _load(args)
    from aps.inference.serving import sync_models
    from aps.tracking.syncing import sync

    address = _address(study)
    found = sync(study, address)
    models, lacking = sync_models(study, address) if not found.missing else (0, 0)
    print(
        f"MLflow: {found.sent} runs brought up to date, {models} models logged, {found.missing + lacking} could not be sent"
    )
    if found.missing:
        raise UserError(
            f"MLflow at {address} did not take {found.missing} runs ({found.reason}); mend that and run "
            "`python -m aps sync` again"
        )
    if lacking:
        raise UserError(
            f"MLflow at {address} did not take {lacking} models; mend that and run `python -m aps sync` again"
        )


def _gc(args: argparse.Namespace) -> None:
    from aps.gc import delete, unneeded
    from aps.settings.reading import load_study

    found = unneeded([load_study([file]) for file in args.studies])
    for one in found:
        print(f"{one.bytes / 1e6:10,.1f} MB  {one.folder}  ({one.why})")
    print(
        f"{sum(one.bytes for one in found) / 1e6:10,.1f} MB in {len(found)} folders that no study of these files needs"
    )
    if args.delete:
        print(f"{delete(found) / 1e6:10,.1f} MB deleted")
    elif found:
        print("nothing was deleted; the same command with --delete deletes them")
