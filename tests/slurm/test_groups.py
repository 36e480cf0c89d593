"""The small stages that start from one encoder are one Slurm job, which asks for the sum of their times and the most of
everything else."""

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


def of(jobs: dict[str, dict[str, str]], *words: str) -> dict[str, str]:
    """The one job whose comment has all words."""
    (fields,) = [fields for comment, fields in jobs.items() if all(word in comment for word in words)]
    return fields


def test_the_small_stages_of_an_encoder_are_one_job(jobs: dict[str, dict[str, str]]) -> None:
    assert len(jobs) == 5 and sum("pretrain" in comment for comment in jobs) == 2, list(jobs)
    assert of(jobs, "one_seed0_evaluation", "embed", "knn", "linear_probe")


def test_it_asks_for_their_time_together_and_the_most_of_their_memory(jobs: dict[str, dict[str, str]]) -> None:
    fields = of(jobs, "one_seed0_evaluation")
    assert fields["TimeLimit"] == "00:37:00"  # 7 + 15 + 15 minutes
    assert "mem=3500M" in fields["TRES"] and fields["NumCPUs"] == "1"


def test_a_sweep_over_one_encoder_is_one_job_but_for_what_is_in_another_partition(
    jobs: dict[str, dict[str, str]],
) -> None:
    together, apart = of(jobs, "k5_seed1_evaluation"), of(jobs, "k9")
    assert (together["TimeLimit"], together["Partition"]) == ("00:27:00", "normal")  # 15 + 12 minutes
    assert (apart["TimeLimit"], apart["Partition"]) == ("00:15:00", "urgent")


def test_one_that_fails_leaves_the_others_of_its_job_their_results(
    cluster: Cluster, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = checkout(tmp_path_factory.mktemp("fails"))
    study = conduct(Study(folder), command("fails.yaml", "--retries", "1", "linear_probe"))
    assert study.status == 1 and "Group job wrong_seed0_evaluation" in study.output, study.output[-6000:]
    made = {file.parts[-4] for file in folder.glob("results/fails/*/seed0/linear_probe/metrics.json")}
    assert made == {"right", "other"}, study.output[-6000:]
    again = conduct(Study(folder), command("fails.yaml", "linear_probe", "-n"))
    assert "experiment=wrong" in again.output and "experiment=right" not in again.output
