"""What MLflow is told of a run."""

from __future__ import annotations

from typing import Any

import pytest

from aps.settings.reading import load_study
from aps.settings.study import Study
from aps.stages import ROWS
from aps.tracking.addresses import page
from aps.tracking.describing import PARENT, describe, finals, note, parameters
from aps.tracking.views import headlines, study_parameters, tags, varying, views_of


def record(settings: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Of a metrics.json."""
    return {
        "stage": settings["stage"], "experiment": settings["experiment"], "seed": settings["seed"], "settings": settings,
        "settings_digest": "0" * 16, "started": "2026-11-25T12:00:00+00:00",
    } | more  # fmt: skip


@pytest.fixture
def study() -> Study:
    base: dict[str, Any] = {"dataset": "digits", "seeds": [0, 1, 2]}
    return load_study(
        [],
        {
            "study": "gammas",
            "experiments": {
                "base": base,
                "none": {"inherits": "base", "sampling": {"gamma": 0.0}},
                "random": {"inherits": "base", "sampling": {"strategy": "random"}},
                "floor": {"inherits": "base", "encoder": {"weights": "random"}, "stages": ["knn"]},
                "more": {
                    "inherits": "base",
                    "encoder": {"weights": "experiment:none"},
                    "stages": ["knn"],
                    "knn": {"k": [5]},
                },
            },
        },
    )


def told(study: Study, experiment: str, stage: str) -> dict[str, str]:
    return study_parameters(study, stage)[experiment]


def test_an_evaluation_has_the_settings_of_the_pretraining_that_made_its_encoder(study: Study) -> None:
    own = told(study, "base", "knn")
    assert own["sampling.gamma"] == "3.0" and own["pretrain.method"] == own["method"] == "aps"
    assert {
        "knn.k",
        "encoder.arch",
        "views.flip",
        "pretrain.epochs",
        "dataset.name",
        "experiment",
        "seed",
    } <= own.keys()
    assert told(study, "more", "knn")["sampling.gamma"] == "0.0" and told(study, "more", "knn")["knn.k"] == "[5]"


def test_only_what_a_stage_uses_is_a_parameter(study: Study) -> None:
    knn, floor = told(study, "base", "knn"), told(study, "floor", "knn")
    assert not [key for key in knn if key.startswith(("finetune", "detection", "linear_probe"))]
    assert not {"stage", "upstream"} & knn.keys()
    assert not [key for key in floor if key.startswith(("pretrain", "sampling", "views"))] and floor["method"] == "none"
    assert "sampling.gamma" not in told(study, "random", "pretrain") and "sampling.ratio" in told(
        study, "random", "knn"
    )


def test_a_pretraining_on_other_images_says_so() -> None:
    own = {"stage": "knn", "experiment": "e", "seed": 0, "dataset": {"name": "cifar10"}, "knn": {"k": [1]}}
    made = {"stage": "pretrain", "dataset": {"name": "imagenet1k"}, "pretrain": {"method": "mae"}}
    assert parameters(own, made)["pretrain.dataset"] == "imagenet1k" and parameters(own, made)["method"] == "mae"
    assert "pretrain.dataset" not in parameters(own, made | {"dataset": {"name": "cifar10"}})


def test_a_run_has_the_settings_of_all_that_made_its_encoder() -> None:
    own = {"stage": "knn", "experiment": "e", "seed": 0, "dataset": {"name": "cifar10"}, "knn": {"k": [1]}}
    tuned = {"stage": "finetune", "dataset": {"name": "cifar10", "train_limit": 500}, "finetune": {"epochs": 9}}
    made = {"stage": "pretrain", "dataset": {"name": "pool"}, "pretrain": {"method": "mae"}, "finetune": {"epochs": 1}}
    found = parameters(own, tuned, made)
    assert {key: found[key] for key in found if "epochs" in key or "pretrain" in key or "dataset" in key} == {
        "dataset.name": "cifar10",
        "finetune.epochs": "9",
        "finetune.dataset": "cifar10",
        "finetune.dataset.train_limit": "500",
        "pretrain.method": "mae",
        "pretrain.dataset": "pool",
    }


def test_links_lead_from_an_evaluation_to_its_pretraining_and_back() -> None:
    pretrain = record({"stage": "pretrain", "experiment": "e", "seed": 0, "pretrain": {}}, mlflow_run_id="abc")
    knn = describe(record({"stage": "knn", "experiment": "e", "seed": 0, "knn": {}}), "s", pretrain, "What it is.")
    assert knn.tags[PARENT] == "abc" and knn.tags["pretraining"] == "e/seed0/pretrain"
    assert note(knn, "7", "def") == (
        "What it is.\n\nIts encoder: [e/seed0/pretrain](#/experiments/7/runs/abc?workflowType=machine_learning)"
    )
    back = note(describe(pretrain, "s"), "7", "abc")
    assert back.startswith("[What was made of its encoder](#/experiments/7/runs?") and "abc" in back


def test_final_figures_have_the_names_of_curves_and_no_setting_is_among_them() -> None:
    settings = {"stage": "finetune", "experiment": "e", "seed": 0, "finetune": {"epochs": 3}}
    metrics = {"test_top1": 90.0, "loss": 0.5, "epochs": 3, "per_class": {"a": 1.0}, "flag": True, "nan": float("nan")}
    found = finals(record(settings, metrics=metrics, cost={"seconds": 3.0}))
    assert found == {"finetune/test_top1": 90.0, "finetune/loss": 0.5, "cost/seconds": 3.0}


def test_the_same_job_has_the_same_key_and_another_one_another() -> None:
    settings = {"stage": "knn", "experiment": "e", "seed": 0, "knn": {}}
    one = describe(record(settings), "s")
    assert describe(record(settings), "s").key == one.key
    others = [describe(record(settings), "t"), describe(record(settings | {"seed": 1}), "s"),
              describe(record(settings, started="2026-11-25T12:00:01+00:00"), "s")]  # fmt: skip
    assert len({one.key, *(other.key for other in others)}) == 4


def test_commit_user_command_and_slurm_job_are_mlflows_own_tags() -> None:
    settings = {"stage": "knn", "experiment": "e", "seed": 0, "knn": {}}
    more = {
        "commit": "0123abc-dirty",
        "command": "python -m aps knn",
        "hardware": {"slurm_job": "17", "cpu": "x", "host": "n1"},
    }
    found = describe(record(settings, **more), "s").tags
    assert found["mlflow.source.git.commit"] == "0123abc" and found["mlflow.source.name"] == "python -m aps knn"
    assert (found["mlflow.source.type"], found["slurm_job"]) == ("JOB", "17") and found["mlflow.user"]
    clean = describe(record(settings, commit="0123abc"), "s").tags
    assert clean["mlflow.source.type"] == "LOCAL" and "mlflow.source.git.dirty" not in clean


def test_the_views_show_what_differs_the_scores_and_the_cost(study: Study) -> None:
    views = {view.stage: view for view in views_of(study)}
    assert list(views) == ["finetune", "linear_probe", "knn", "pretrain"]
    knn = views["knn"]
    assert knn.scores[0] == "knn/top1_k20" and knn.varied[:3] == ("method", "sampling.strategy", "sampling.gamma")
    state = knn.state()
    assert state["searchFilter"] == "tags.stage = 'knn'" and state["orderByKey"] == "metrics.`knn/top1_k20`"
    assert {"params.`sampling.gamma`", "metrics.`knn/top1_k20`", "metrics.`cost/gpu_hours`"} <= set(
        state["selectedColumns"]
    )
    assert state["groupBy"]["groupByKeys"] == [{"mode": "param", "groupByData": "experiment"}]
    assert [chart["metricKey"] for chart in state["compareRunCharts"] if chart["deleted"]] == ["epoch"]
    assert views["pretrain"].state()["orderByKey"] == "metrics.`pretrain/loss`"
    found = tags(list(views.values()), "7")
    assert all(page("7", view.name) in found["mlflow.note.content"] for view in views.values())
    assert all(len(value) < 5000 for value in found.values())


def test_nothing_varies_in_a_study_of_one_experiment() -> None:
    assert varying({"a": {"experiment": "a", "seed": "0", "x": "1"}}) == ()
    study = load_study([], {"experiments": {"e": {"dataset": "digits", "knn": {"k": [7, 3]}}}})
    (row,) = [row for row in ROWS if row.name == "knn"]
    assert headlines(row, study.experiments["e"]) == ["knn_top1_k7", "knn_top1_k3"]
    assert all(view.state()["groupBy"] for view in views_of(study))


def test_a_view_has_the_scores_of_every_experiment_whatever_its_k() -> None:
    experiments = {name: {"dataset": "digits", "knn": {"k": k}} for name, k in (("a", [5, 7]), ("b", [20, 5]))}
    knn = next(view for view in views_of(load_study([], {"experiments": experiments})) if view.stage == "knn")
    assert knn.scores == ("knn/top1_k20", "knn/top1_k5", "knn/top1_k7")
