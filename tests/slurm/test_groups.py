"""An encoder's small stages are one Slurm job, which asks for the sum of their times and the most of everything else."""

from __future__ import annotations

import pytest
from cluster import Cluster, job_fields, run
from test_cluster import Study, checkout, command, conduct

pytestmark = [pytest.mark.slurm, pytest.mark.soak, pytest.mark.slow, pytest.mark.xdist_group("slurm")]


@pytest.fixture(scope="module")
def jobs(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """Every job of a study that ran whole: what Slurm says of it, by its comment."""
    study = conduct(Study(checkout(tmp_path_factory.mktemp("groups"))), command("groups.yaml", "all"))
    assert study.status == 0, study.output[-6000:]
    assert (study.folder / "results/groups/report/report.html").exists()
    found = {}
    for line in run("squeue", "-h", "-a", "-t", "all", "-o", "%i|%k").splitlines():
        job, comment = line.split("|")
        found[comment] = job_fields(job)
    return {comment: fields for comment, fields in found.items() if str(study.folder) in str(fields)}


def test_the_small_stages_of_an_encoder_are_one_job(jobs: dict[str, dict[str, str]]) -> None:
    assert len(jobs) == 2 and sum("pretrain" in comment for comment in jobs) == 1, list(jobs)


def test_it_asks_for_their_time_together_and_the_most_of_their_memory(jobs: dict[str, dict[str, str]]) -> None:
    (fields,) = [fields for comment, fields in jobs.items() if "pretrain" not in comment]
    assert fields["TimeLimit"] == "00:37:00"  # 7 + 15 + 15 minutes
    assert "mem=3500M" in fields["TRES"] and fields["NumCPUs"] == "1"
