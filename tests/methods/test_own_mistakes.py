"""Mistakes in a method of one's own: one sentence that names the method, its file and what is asked, before training."""

from __future__ import annotations

import json
import re
import traceback
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small
import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from safetensors.torch import load_file
from torch import Tensor, nn

from aps import registry
from aps.errors import UserError
from aps.methods import Method
from aps.models.encoder import Encoder, build_encoder
from aps.preflight import problems
from aps.results import StageJob, saved_run
from aps.runtime.processes import Distributed
from aps.settings.base import Positive
from aps.settings.blocks import PretrainSettings
from aps.settings.reading import load_study
from aps.training.contract import RESERVED
from aps.training.cost import step_flops
from aps.training.pretrain import Trainer


class Plain(Method):
    """What every method here does but for its mistake."""

    least_images = 2

    def networks(self, encoder: Encoder) -> nn.ModuleDict:
        return nn.ModuleDict({"encoder": encoder, "head": nn.Linear(encoder.embed_dim, 8)})

    def forward(self, networks: nn.ModuleDict, views: tuple[Tensor, ...], sampled: Any) -> Any:
        return networks["head"](networks["encoder"](torch.cat(views)))

    def loss(self, outputs: Tensor, progress: float) -> Any:
        one, other = F.normalize(outputs, dim=-1).chunk(2)
        loss = F.cross_entropy(one @ other.T / 0.2, torch.arange(len(one)))
        return loss, {"sharpness": loss.detach()}


class Reads(Plain):
    """Reads a block that it does not name."""

    def sample(self, geometries: Any, noise: Any) -> Any:
        return [(noise(16).argsort(1)[:, : int(16 * self.experiment.sampling.ratio)],)]

    def forward(self, networks: nn.ModuleDict, views: tuple[Tensor, ...], sampled: Any) -> Any:
        return networks["head"](networks["encoder"](torch.cat(views), torch.cat(sampled * 2)))


class Named(Reads):
    blocks = ("sampling",)


def use(monkeypatch: pytest.MonkeyPatch, **methods: type[Method]) -> None:
    """Make classes of this file methods that a study can name, whichever name they have here."""
    for name, method in methods.items():
        monkeypatch.setitem(globals(), f"_{name}", method)
    rows = {name: f"{__name__}:_{name}" for name in methods}
    monkeypatch.setattr(registry.METHODS, "_rows", registry.METHODS._rows | rows)


def experiment(method: str, blocks: dict[str, Any] | None = None, **pretrain: Any) -> dict[str, Any]:
    own = {"method": method, "epochs": 2, "batch_size": 32, "warmup_epochs": 1, **pretrain}
    return {
        "dataset": {"name": "digits", "train_limit": 100},
        "encoder": small.ENCODER.model_dump(),
        "pretrain": own,
        "stages": ["pretrain"],
        **(blocks or {}),
    }


def job(digits: Path, folder: Path, method: str, blocks: dict[str, Any] | None = None, **pretrain: Any) -> StageJob:
    study = load_study([], {"experiments": {"mine": experiment(method, blocks, **pretrain)}})
    settings, out = study.stage_settings("mine", 0, "pretrain"), folder / "out"
    return StageJob(settings=settings, manifest=digits, out=out, checkpoints=saved_run(folder, settings, digits, None))


def refusal(make: Callable[[], StageJob], folder: Path) -> str:
    """The sentence with which a study or its run ends, before it has trained a batch."""
    with pytest.raises(UserError) as found:
        small.run(make())
    sentence = str(found.value)
    assert re.search(rf"method '\w+' \({__file__}\)", sentence) and "\n" not in sentence
    assert not [*folder.rglob("history.jsonl")]
    return sentence


def test_a_block_that_a_method_reads_has_to_be_among_its_blocks(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, reads=Reads, named=Named)
    half = {"sampling": {"ratio": 0.5}}
    assert "add 'sampling' to `blocks`" in refusal(lambda: job(digits, tmp_path, "reads", half), tmp_path)
    assert job(digits, tmp_path, "named", half).settings.sampling.ratio == 0.5
    assert job(digits, tmp_path, "named", half).checkpoints != job(digits, tmp_path, "named").checkpoints


def test_a_stage_too_reads_only_the_blocks_that_it_names(digits: Path, tmp_path: Path) -> None:
    settings = small.job("knn", digits, tmp_path).settings
    assert settings.knn.k and settings.encoder.arch == "micro"
    with pytest.raises(UserError, match=r"stage knn reads the block 'views', .* add it to `uses`"):
        _ = settings.views


class Tied(Plain):
    """Its networks share modules, and single tensors."""

    def networks(self, encoder: Encoder) -> nn.ModuleDict:
        networks = super().networks(encoder)
        networks["online"] = nn.Sequential(encoder, networks["head"])
        networks["decoder"] = nn.Linear(encoder.embed_dim, 8, bias=False)
        networks["decoder"].weight = networks["head"].weight
        return networks


def test_networks_that_share_tensors_are_saved_whole_and_resume(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, tied=Tied, plain=Plain)
    whole, stopped, alone = (
        job(digits, tmp_path / name, name if name == "plain" else "tied") for name in ("whole", "stopped", "plain")
    )
    small.run(whole)
    small.run(stopped, stop_after=2)
    small.run(stopped)
    small.run(alone)
    found = {
        run: [load_file(run.out / f"{part}.safetensors") for part in ("encoder", "heads")] for run in (whole, alone)
    }
    assert small.same(load_file(stopped.out / "heads.safetensors"), found[whole][1])
    assert small.same(found[whole][0], found[alone][0])  # a tensor with two names is stepped once
    heads = found[whole][1]
    for name in ("online.1.weight", "decoder.weight"):
        assert torch.equal(heads[name], heads["head.weight"])
    assert small.same({f"online.0.{name}": x for name, x in found[whole][0].items()}, {
        name: x for name, x in heads.items() if name.startswith("online.0.")
    })  # fmt: skip
    Tied(whole.settings).networks(build_encoder(small.ENCODER)).load_state_dict(
        heads | {f"encoder.{name}": x for name, x in found[whole][0].items()}
    )


# ----------------------------------------------------------------------------------------------------------------------
# One thing wrong


def returning(name: str, value: Any) -> dict[str, Any]:
    """A method whose function `name` returns a value, or what a function makes of the method and what is right."""
    right = getattr(Plain, name)

    def function(self: Any, *arguments: Any) -> Any:
        return value(self, right(self, *arguments)) if callable(value) else value

    return {name: function}


def figures(**found: Any) -> dict[str, Any]:
    return returning("loss", lambda self, right: (right[0], found))


def view(**changes: Any) -> dict[str, Any]:
    return returning("views", lambda self, right: (right[0], right[1]._replace(**changes)))


def with_network(name: str, make: Any) -> dict[str, Any]:
    return returning("networks", lambda self, right: nn.ModuleDict({**right, name: make(right)}))


def keeping_a_network(self: Any, right: nn.ModuleDict) -> nn.ModuleDict:
    self.teacher = nn.Linear(3, 3)
    return right


def with_a_centre(self: Any, right: Any) -> Any:
    self.centre = 0.5 * self.centre + right[0].detach()
    return right


class Needy(PretrainSettings):
    must: int


SCALAR = torch.tensor(1.0)
MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "no views": (returning("views", ()), "`views` returned a tuple of 0"),
    "a number of views": (returning("views", 2), "`views` returned 2"),
    "a view beside the patches": (view(size=6), "size 6; give a positive multiple of encoder.patch_size 4"),
    "a view without pixels": (view(size=0), "size 0"),
    "a view with two sides": (view(size=(16, 8)), r"size \(16, 8\)"),
    "a third chance": (view(chances=3), "chances 3; give 1 or 2"),
    "a view's augmentation": (view(augmentation=None), "augmentation None"),
    "a plain dictionary": (returning("networks", lambda self, right: dict(right)), "return an nn.ModuleDict"),
    "evaluated misspelt": ({"evaluated": "techer"}, "no 'techer', which `evaluated` names; it has encoder, head"),
    "evaluated no encoder": ({"evaluated": "head"}, "'head' of `networks`, a Linear; name an Encoder"),
    "a network aside": (returning("networks", keeping_a_network), "`self.teacher` is a network"),
    "no parameters": (returning("parameters", []), "`parameters` is empty"),
    "parameters twice": (
        returning("parameters", lambda self, right: [{"params": right}, {"params": right[-1:]}]),
        "`parameters` has head.bias twice",
    ),
    "foreign parameters": (returning("parameters", [nn.Parameter(torch.ones(3))]), "no parameter of `networks`"),
    "a learning rate": (
        returning("parameters", lambda self, right: [{"params": right, "lr": 1.0}]),
        "sets lr, which follows the schedule; set lr_scale",
    ),
    "no weight decay": (returning("weight_decay", None), "`weight_decay` returned None"),
    "half a step": ({"steps": 0.5}, "`steps` is 0.5"),
    "an array": (returning("state_dict", {"queue": np.zeros(3)}), "a ndarray under 'queue'"),
    "a deque": (returning("state_dict", {"queue": deque([SCALAR])}), "a deque under 'queue'"),
    "a path": (returning("state_dict", {"file": [Path("x")]}), "a list of 1 under 'file'"),
    "a function": (returning("state_dict", {"f": lambda x: x}), "a function under 'f'"),
    "no state": (returning("state_dict", None), "`state_dict` returned None"),
    "no draws": (returning("sample", None), "`sample` returned None; return 1 draws"),
    "too few draws": ({"steps": 3, "sample": lambda *_: [()]}, "a list of 1; return 3 draws"),
    "a draw that is a tensor": (returning("sample", [torch.zeros(32, 4)]), "each a tuple of tensors"),
    "a draw of other rows": (returning("sample", [(torch.zeros(3, 4),)]), r"a tensor of shape \(3, 4\), float32"),
    "a loss without figures": (returning("loss", lambda self, right: right[0]), "return the loss and a dictionary"),
    "a loss of each image": (returning("loss", lambda self, right: (right[0].expand(3), {})), r"shape \(3,\)"),
    "a loss without gradient": (returning("loss", lambda self, right: (right[0].detach(), {})), "has no gradient"),
    "a figure that is a number": (figures(share=0.5), "the figure 'share' of `loss` is 0.5"),
    "a figure of each image": (figures(share=torch.ones(3)), "return a scalar tensor"),
    "a figure's name": (figures(loss=SCALAR), "named 'loss', as one of the stage's"),
    "a parameter in vain": (
        with_network("extra", lambda right: nn.Linear(4, 4)),
        r"extra.weight \(and 1 more\) of `networks` got no gradient",
    ),
    "a state that is not saved": (
        {"centre": SCALAR, **returning("loss", with_a_centre), "__init__": lambda self, e: centred(self, e)},
        "`self.centre` changes in a step and a resumed run would not have it",
    ),
    "a buffer that is not saved": (
        {
            **returning("networks", lambda self, right: with_a_passing_buffer(self, right)),
            "after_step": lambda self, networks, progress: networks["head"].mean.add_(1),
        },
        "`head.mean` changes in a step",
    ),
    "no block": (
        {"Settings": type("Settings", (), {})},
        "its Settings does not inherit from aps.settings.blocks.PretrainSettings",
    ),
    "a key without a default": ({"Settings": Needy}, "'must' of its Settings has no default"),
    "stochastic depth": ({"drop_path": 1.5}, "`drop_path` is 1.5"),
}


def with_a_passing_buffer(self: Any, right: nn.ModuleDict) -> nn.ModuleDict:
    right["head"].register_buffer("mean", torch.zeros(()), persistent=False)
    return right


def centred(self: Any, experiment: Any) -> None:
    Method.__init__(self, experiment)
    self.centre = torch.zeros(())


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_a_method_is_a_sentence_before_it_is_trained(
    mistake: str, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attributes, expected = MISTAKES[mistake]
    name = f"own{list(MISTAKES).index(mistake)}"
    use(monkeypatch, **{name: type("Own", (Plain,), {**attributes, "__module__": __name__})})
    assert re.search(expected, refusal(lambda: job(digits, tmp_path, name), tmp_path))


def test_the_names_that_a_figure_may_not_have_are_those_of_the_stage(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, plain=Plain)
    done = job(digits, tmp_path, "plain", knn_every=1)
    small.run(done)
    lines = [json.loads(line) for line in (done.out / "history.jsonl").read_text().splitlines()]
    written = {
        *json.loads((done.out / "metrics.json").read_text())["metrics"],
        *(key for line in lines for key in line),
    }
    assert written - {"sharpness"} == RESERVED


class Moody(Plain):
    """Its figures change from step to step."""

    def loss(self, outputs: Tensor, progress: float) -> Any:
        loss, found = super().loss(outputs, progress)
        return loss, found | ({"late": loss.detach()} if progress else {})


class Late(Plain):
    """A figure that has a gradient, and is a number from the second epoch on only."""

    def loss(self, outputs: Tensor, progress: float) -> Any:
        loss, _ = super().loss(outputs, progress)
        return loss, {"twice": 2 * loss * (1.0 if progress < 0.5 else float("nan"))}


def test_figures_have_the_same_names_at_every_step_and_are_finite(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, moody=Moody, late=Late)
    with pytest.raises(
        UserError, match=r"moody' .*: a step has the figures loss, sharpness, late and one before it had"
    ):
        small.run(job(digits, tmp_path / "moody", "moody"))
    with pytest.raises(UserError, match=r"late' .*: its figure 'twice' became nan; return finite numbers"):
        small.run(job(digits, tmp_path / "late", "late"))
    lines = [json.loads(line) for line in next(tmp_path.glob("late/**/history.jsonl")).read_text().splitlines()]
    assert lines[0]["twice"] == pytest.approx(2 * lines[0]["loss"])


class Fails(Plain):
    def forward(self, networks: nn.ModuleDict, views: tuple[Tensor, ...], sampled: Any) -> Any:
        return networks["haed"](views)


def test_an_exception_in_a_methods_own_code_ends_in_a_line_that_names_its_file(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, fails=Fails)
    with pytest.raises(KeyError) as found:
        small.run(job(digits, tmp_path, "fails"))
    last = traceback.format_exception(found.value)[-1]
    assert re.match(rf"method 'fails' \({__file__}\) failed in line \d+: KeyError: 'haed'\n", last)


class Aside(Plain):
    """Tensors of its own that are none of a run's state: one that is made once, one that is gone after each step."""

    kept: Tensor | None = None

    def loss(self, outputs: Tensor, progress: float) -> Any:
        if self.kept is None:
            self.kept = torch.arange(4)
        self.kept = self.kept.to(outputs.device, torch.float32)
        self.scratch = outputs.detach()
        return super().loss(outputs, progress)

    def after_step(self, networks: nn.ModuleDict, progress: float) -> None:
        del self.scratch


def test_a_method_may_keep_constants_and_what_a_step_leaves_to_itself(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, aside=Aside)
    small.run(job(digits, tmp_path, "aside"))


class InVain(Plain):
    def networks(self, encoder: Encoder) -> nn.ModuleDict:
        return nn.ModuleDict({**super().networks(encoder), "extra": nn.Linear(4, 4)})


def one_of_two(rank: int, folder: Path, digits: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    with pytest.MonkeyPatch.context() as patch:
        use(patch, invain=InVain)
        trainer = Trainer(job(digits, folder, "invain"), Distributed(rank, 2, torch.device("cpu")))
        with pytest.raises(UserError, match="got no gradient"):
            trainer.step((torch.rand(4, 3, 16, 16), torch.rand(4, 3, 16, 16)), (), lr=0.1)
    (folder / f"said{rank}").touch()
    torch.distributed.destroy_process_group()


def test_two_processes_say_it_as_one_does(digits: Path, tmp_path: Path) -> None:
    torch.multiprocessing.spawn(one_of_two, (tmp_path, digits), nprocs=2)
    assert len(list(tmp_path.glob("said*"))) == 2


class Best(Plain):
    """Keeps the least loss in a buffer, which is infinite at first, or is no number."""

    first = float("inf")

    def networks(self, encoder: Encoder) -> nn.ModuleDict:
        networks = super().networks(encoder)
        networks["head"].register_buffer("best", torch.tensor(self.first))
        return networks


class Lost(Best):
    first = float("nan")


class LateFigure(Plain):
    def loss(self, outputs: Tensor, progress: float) -> Any:
        loss, _ = super().loss(outputs, progress)
        return loss, {"share": loss.detach() * float("inf")}


def test_what_is_not_finite_in_a_checkpoint_is_named_and_a_buffer_may_be_infinite(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, best=Best, lost=Lost, latefigure=LateFigure)
    done = job(digits, tmp_path / "best", "best")
    small.run(done, stop_after=2)
    small.run(done)
    assert load_file(done.out / "heads.safetensors")["head.best"].isinf()
    with pytest.raises(UserError, match=rf"the buffer 'head.best' of method 'lost' \({__file__}\) is nan; .* is kept"):
        small.run(job(digits, tmp_path / "lost", "lost"))
    often = job(digits, tmp_path / "figure", "latefigure")
    object.__setattr__(often, "checkpoint_minutes", 0.0)
    with pytest.raises(UserError, match=r"after 1 batches the figure 'share' of method 'latefigure'"):
        small.run(often)


class Frozen(Plain):
    """Its settings are checked against one another, and what a step computes depends on them."""

    class Settings(PretrainSettings):
        freeze: Positive = Field(2, description="epochs")

        @model_validator(mode="after")
        def _check(self) -> Any:
            if self.freeze >= self.epochs:
                raise ValueError(f"freeze {self.freeze} must be below epochs {self.epochs}")
            return self

    def forward(self, networks: nn.ModuleDict, views: tuple[Tensor, ...], sampled: Any) -> Any:
        return super().forward(networks, views * (2 if self.settings.weight_decay == 0.5 else 1), sampled)


def test_operations_are_counted_with_the_values_of_the_study(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, frozen=Frozen, frozentoo=Frozen)
    default = Frozen.Settings.model_fields["epochs"].default
    long = {"freeze": default + 5, "epochs": default + 10}
    once = step_flops(job(digits, tmp_path, "frozen", **long).settings)
    twice = step_flops(job(digits, tmp_path, "frozentoo", weight_decay=0.5, **long).settings)
    assert once > 0 and 1.8 < twice / once < 2.2


class Misspelt(Plain):
    blocks = ("samplng",)


class Text(Plain):
    blocks = "sampling"  # type: ignore[assignment]


class SmallView(Plain):
    views = view(size=6)["views"]


def test_what_a_study_needs_of_a_method_is_looked_at_where_the_study_is_checked(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, misspelt=Misspelt, text=Text, smallview=SmallView, plain=Plain)
    with pytest.raises(
        UserError, match=rf"'misspelt' \({__file__}\): `blocks` names 'samplng'; did you mean 'sampling'"
    ):
        job(digits, tmp_path, "misspelt")
    with pytest.raises(UserError, match=r"`blocks` is 'sampling'; write a tuple"):
        job(digits, tmp_path, "text")
    experiments = {name: experiment(name) for name in ("smallview", "plain")}
    found = [said for said in problems(load_study([], {"experiments": experiments})) if "`views`" in said]
    assert len(found) == 1 and re.match(r"experiment 'smallview': method 'smallview' .* has size 6; give", found[0])
