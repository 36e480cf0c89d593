"""Times planning a large study and its table of results, against Snakemake alone: python -m benchmarks.planning

The study has 1000 experiments (`--experiments`) of three seeds and four stages, which differ in their learning rate.
Times are CPU times of the commands, so that other work on the machine matters less; the JSON file also has wall times.
Snakemake alone has the same DAG as four rules without functions, resources, logs and benchmarks: no workflow can be
faster.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from aps.data.manifest import Manifest
from aps.data.prepare import prepare
from aps.layout import manifest_path, stage_folder, study_folder
from aps.ranges import whole_number
from aps.seals import contents, seal
from aps.settings.blocks import SourceSettings
from aps.settings.reading import load_study
from aps.settings.study import Study
from aps.stages import STAGES
from benchmarks.common import MOST, ROOT, arguments, plot, row, run, spread, timed, write

SEEDS, STAGES_RUN = 3, ("pretrain", "finetune", "linear_probe", "knn")

BARE = """
FILES = {files}
RUNS = [f"{{e}}/seed{{s}}" for e in {names} for s in range({seeds})]
rule all:
    input: [f"results/{{run}}/{{stage}}/metrics.json" for run in RUNS for stage in FILES]
rule data:
    output: "results/data/digits/manifest.json"
    shell: "prepare"
rule pretrain:
    input: "results/data/digits/manifest.json"
    output: [f"results/{{{{experiment}}}}/seed{{{{seed}}}}/pretrain/{{file}}" for file in FILES["pretrain"]]
    shell: "pretrain {{wildcards.experiment}} {{wildcards.seed}}"
for STAGE in ("finetune", "linear_probe", "knn"):
    rule:
        name: STAGE
        input: "results/data/digits/manifest.json", "results/{{experiment}}/seed{{seed}}/pretrain/encoder.safetensors"
        output: [f"results/{{{{experiment}}}}/seed{{{{seed}}}}/{{STAGE}}/{{file}}" for file in FILES[STAGE]]
        shell: "evaluate {{wildcards.experiment}} {{wildcards.seed}}"
"""


def lay_out(folder: Path, experiments: int) -> Study:
    """Write links to the repository, the study, and the same DAG for Snakemake alone; change to the folder."""
    for name in ("Snakefile", "workflow", "profiles", "config", "aps"):
        (folder / name).symlink_to(ROOT / name)
    content = {
        "study": "many",
        "defaults": {"dataset": "digits", "seeds": list(range(SEEDS)), "stages": list(STAGES_RUN)},
        "experiments": {f"e{i:04d}": {"pretrain": {"lr": 1e-4 * (1 + i / 100)}} for i in range(experiments)},
    }
    (folder / "many.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    (folder / "bare").mkdir()
    files = {stage: list(STAGES[stage].files) for stage in STAGES_RUN}
    bare = BARE.format(files=files, names=list(content["experiments"]), seeds=SEEDS)  # type: ignore[call-overload]
    (folder / "bare" / "Snakefile").write_text(bare)
    os.chdir(folder)
    return load_study(["many.yaml"])


def finish(study: Study) -> None:
    """Write made-up results of every run, sealed like real ones."""
    manifest = manifest_path(study.results, "digits")
    prepare("digits", manifest.parent, SourceSettings())
    digest = Manifest.read(manifest).digest
    encoders: dict[tuple[str, int], str] = {}
    for name, seed, stage in study.jobs():
        settings = study.stage_settings(name, seed, stage)
        folder = stage_folder(study_folder(study), name, seed, stage)
        folder.mkdir(parents=True)
        for file in STAGES[stage].files[:-1]:
            (folder / file).write_text(f"{name} {seed} {stage}")
        files = contents(folder)
        if stage == "pretrain":
            encoders[name, seed] = files["encoder.safetensors"]["sha256"]
        scores = {score.metric.format(k=20): 50.0 + seed for score in STAGES[stage].scores}
        metrics: dict[str, Any] = {
            "experiment": name, "seed": seed, "stage": stage, "settings": settings.relevant(), "metrics": scores,
            "dataset": {"name": "digits", "digest": digest}, "encoder": {"sha256": encoders[name, seed]}, "files": files,
            "padding": "x" * 3000,  # as large as hardware, packages and cost
        }  # fmt: skip
        (folder / "metrics.json").write_text(json.dumps(seal(metrics), indent=2))


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument(
        "--experiments", type=whole_number(1, MOST), default=1000, help="of three seeds and four stages each"
    )
    parser.add_argument("--repeats", type=whole_number(1, MOST), default=1)
    args = parser.parse_args()
    experiments = 2 if args.quick else args.experiments
    out = args.out.resolve()
    plan = (sys.executable, "-m", "snakemake", "-n", "--quiet", "all")
    study = ("--configfile", "many.yaml")
    measured: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        many, home = lay_out(Path(folder), experiments), ROOT
        for _ in range(args.repeats):
            measured.setdefault("bare", []).append(timed(*plan, folder="bare"))
            measured.setdefault("plan", []).append(timed(*plan, *study, "--", "all"))
        finish(many)
        for _ in range(args.repeats):
            measured.setdefault("plan again", []).append(timed(*plan, *study, "--", "all"))
            measured.setdefault("results", []).append(timed(sys.executable, "-m", "aps", "results", *study))
        os.chdir(home)
    for _ in range(1 if args.quick else max(3, args.repeats)):
        measured.setdefault("help", []).append(timed(sys.executable, "-m", "aps", "--help"))
        measured.setdefault("demo", []).append(timed(*plan, "--", "all"))
    cpu = {name: spread([time["cpu"] for time in times]) for name, times in measured.items()}
    jobs = experiments * SEEDS * len(STAGES_RUN)
    rows = [
        row(f"planning {jobs:,} jobs, CPU time", cpu["plan"], "s", 20),
        row("Snakemake alone on such a DAG", cpu["bare"], "s"),
        row("planning when all is finished", cpu["plan again"], "s"),
        row("aps results, all finished", cpu["results"], "s", 5),
        row("snakemake -n on the demo", cpu["demo"], "s", 2),
        row("aps --help", cpu["help"], "s", 0.3),
    ]
    load = os.getloadavg()
    write(
        "planning", {"rows": rows, "times": measured, "load": load}, {"experiments": experiments, "seeds": SEEDS}, out
    )
    bars = {line["what"]: line["ratio"] for line in rows}
    plot(
        "planning", bars, "CPU time, s", f"A study of {jobs:,} jobs", set(bars) - {"Snakemake alone on such a DAG"}, out
    )


if __name__ == "__main__":
    run(main)
