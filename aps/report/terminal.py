"""Makes the table of results for the terminal: `python -m aps results`."""

from __future__ import annotations

from aps.findings import Findings
from aps.layout import report_folder, study_folder
from aps.report.table import Table
from aps.settings.study import Study
from aps.text import table_lines
from aps.tracking.browsing import how_to_browse

MOST_REASONS = 12


def terminal(study: Study, address: str) -> str:
    """The table, which experiment is best, where the files are, and how to browse the runs in MLflow.

    address: of MLflow's server or store.
    """
    findings = Findings(study, sources=True, gone=True)
    table = Table(study, findings)
    header = ["experiment", *(score.label for score in table.scores)]
    body = [[name, *(table.text(name, score) for score in table.scores)] for name in table.evaluated()]
    seeds = max((len(e.seeds) for e in study.experiments.values()), default=1)
    report = report_folder(study)
    return "\n".join(
        [
            "",
            f"Study '{study.study}': {len(findings.runs())} of {len(study.jobs())} runs finished. "
            f"In percent{', mean ± standard deviation over seeds' if seeds > 1 else ''}.",
            *([study.question] if study.question else []),
            "",
            *table_lines(header, body),
            *_verdicts(table),
            *_copies(table),
            *_reasons(table),
            *_other_code(findings),
            *_without_files(findings),
            "",
            f"Report   {report / 'report.html'}" + ("" if (report / "report.html").exists() else " (not yet made)"),
            f"Table    {report / 'results.csv'}",
            f"Results  {study_folder(study)}/EXPERIMENT/seedN/STAGE/",
            f"MLflow   {how_to_browse(study, address)}",
        ]
    )


def _verdicts(table: Table) -> list[str]:
    """Which experiment is best, for each score that several experiments have."""
    verdicts = table.verdicts()
    several = len({verdict.dataset for verdict in verdicts}) > 1
    lines = [f"  {v.score.label}{f' on {v.dataset}' if several else ''}: {v.reason}" for v in verdicts]
    return ["", *lines] if lines else []


def _copies(table: Table) -> list[str]:
    """Which scores are of images that are in train too."""
    phrases = table.copies()
    return ["", *(f"  {phrase}" for phrase in phrases)] if phrases else []


def _other_code(findings: Findings) -> list[str]:
    """Which results that are shown were made by code that has changed since."""
    lines = findings.other_code()
    return ["", *(f"  {line}" for line in lines)] if lines else []


def _without_files(findings: Findings) -> list[str]:
    """Which results are shown although files of theirs are gone."""
    sentence = findings.without_files()
    return ["", f"  {sentence}"] if sentence else []


def _reasons(table: Table) -> list[str]:
    """Why some results are not shown."""
    stale = table.stale()
    if not stale:
        return []
    lines = [f"  {finding.label}: {finding.problem}" for finding in stale[:MOST_REASONS]]
    more = [f"  and {len(stale) - MOST_REASONS} more"] if len(stale) > MOST_REASONS else []
    return ["", "Not this study's figures, so not shown (`snakemake all` makes them again):", *lines, *more]
