"""What the contract asks of a method, of every one there is: a new file in `aps/methods` is tested by being there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import rivals
import small
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from aps.registry import METHODS
from aps.runtime.processes import Distributed
from aps.sampling import Geometry, global_noise
from aps.training.pretrain import Trainer

NAMES = METHODS.names()


def batch(trainer: Trainer, rows: int, own: slice = slice(None), world: int = 1, rank: int = 0) -> Any:
    """Views and draws for some rows of a global batch: the same ones whatever the default dtype."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    generator = torch.Generator().manual_seed(3)
    views = [torch.randn(rows, 3, v.size, v.size, generator=generator)[own] for v in trainer.method.views()]
    geometry = Geometry(torch.tensor([[0.0, 0.0, 8.0, 8.0]]).expand(rows, 4)[own], torch.zeros(rows, dtype=bool)[own])
    noise = global_noise(len(views[0]), torch.device("cpu"), generator, rank, world)
    sampled = trainer.method.sample([geometry for _ in views], noise)
    assert len(sampled) == trainer.method.steps
    torch.set_default_dtype(dtype)
    return tuple(view.to(dtype) for view in views), sampled


@pytest.fixture(params=NAMES)
def trainer(request: pytest.FixtureRequest, digits: Path, tmp_path: Path) -> Trainer:
    return Trainer(small.job("pretrain", digits, tmp_path, method=request.param), small.ONE)


def test_every_parameter_that_is_optimized_gets_a_gradient(trainer: Trainer) -> None:
    """DistributedDataParallel waits for ever for a parameter that gets none."""
    views, sampled = batch(trainer, 8)
    outputs = trainer.method.forward(trainer.networks, views, sampled[0])
    loss, figures = trainer.method.loss(outputs, 0.0)
    loss.backward()
    missing = [name for name, p in trainer.networks.named_parameters() if p.requires_grad and p.grad is None]
    assert missing == [] and not any(value.requires_grad for value in figures.values())
    chosen = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert chosen == {id(p) for p in trainer.networks.parameters() if p.requires_grad}


def test_it_compiles_without_a_graph_break(trainer: Trainer) -> None:
    views, sampled = batch(trainer, 8)
    torch.manual_seed(0)  # of drop path
    expected = trainer.method.forward(trainer.networks, views, sampled[0])
    compiled = torch.compile(trainer._forward, backend="aot_eager", fullgraph=True)  # fullgraph: a break is an error
    torch.manual_seed(0)
    for ours, other in zip(compiled(views, sampled[0]), expected, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-3, atol=1e-3)
    torch._dynamo.reset()


def test_planning_a_study_of_every_method_imports_no_torch(tmp_path: Path) -> None:
    study = "\n".join(f"  {name}: {{dataset: digits, pretrain: {{method: {name}}}}}" for name in NAMES)
    (tmp_path / "study.yaml").write_text(f"experiments:\n{study}\n")
    code = f"""
import sys
from aps.settings.reading import load_study
study = load_study([{str(tmp_path / "study.yaml")!r}])
assert [study.stage_settings(*job).digest for job in study.jobs()]
assert "torch" not in sys.modules and "timm" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


# ----------------------------------------------------------------------------------------------------------------------
# Two processes against one: two whole steps, in float64, of gradient descent, which doesn't turn rounding into steps

WORLD, ROWS = 2, 10


def train(name: str, manifest: Path, distributed: Distributed, **changes: Any) -> dict[str, Any]:
    still = {"drop_path": 0.0} if name == "dino" else {}  # chance on every process
    job = small.job("pretrain", manifest, Path(), method=name, batch_size=ROWS, **still, **changes)
    trainer = Trainer(job, distributed)
    trainer.optimizer = torch.optim.SGD(trainer.optimizer.param_groups, lr=0.0)
    losses = []
    for progress in (0.5, 0.6):
        views, sampled = batch(trainer, ROWS, distributed.rows(ROWS), distributed.world, distributed.rank)
        figures = trainer.step(views, sampled[0], lr=0.3, progress=progress)
        losses.append(distributed.mean(torch.stack(list(figures.values()))))
    own = trainer.method.state_dict()
    return {"losses": torch.stack(losses), "networks": trainer.networks.state_dict(), "method": own}


def worker(rank: int, folder: Path, manifest: Path) -> None:
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD)
    for name in NAMES:
        torch.save(train(name, manifest, Distributed(rank, WORLD, torch.device("cpu"))), folder / f"{name}.{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("gloo")
    mp.spawn(worker, (folder, digits), nprocs=WORLD)
    results = {file.stem: torch.load(file, weights_only=True) for file in folder.glob("*.pt")}
    torch.set_default_dtype(torch.float64)
    try:
        return results | {name: train(name, digits, small.ONE) for name in NAMES}
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("rank", range(WORLD))
@pytest.mark.parametrize("name", NAMES)
def test_two_processes_take_the_steps_of_one(found: dict[str, Any], name: str, rank: int) -> None:
    ours, alone = found[f"{name}.{rank}"], found[name]
    torch.testing.assert_close(ours["losses"], alone["losses"], rtol=1e-8, atol=1e-10)
    assert (alone["losses"][0] - alone["losses"][1]).abs().max() > 1e-3  # the tolerance can tell steps apart
    for part in ("networks", "method"):
        assert ours[part].keys() == alone[part].keys()
        for key, value in alone[part].items():
            if isinstance(value, Tensor):
                torch.testing.assert_close(ours[part][key], value, rtol=1e-7, atol=1e-9, msg=key)


@pytest.mark.parametrize("name", [name for name in NAMES if METHODS.load(name).least_images == 1])
def test_without_negatives_and_batch_norm_a_step_is_the_same_however_its_batch_is_cut(name: str, digits: Path) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        whole, cut = (train(name, digits, small.ONE, accumulate=parts) for parts in (1, 5))
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(cut, whole, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_no_head_ends_in_a_single_number(name: str) -> None:
    """Normalized, one number is 1 or -1: the loss stays where it is and nothing is learned, without a word."""
    method = METHODS.load(name)
    for key, field in method.Settings.model_fields.items():
        value = field.default
        if key in ("prototypes", "projector", "predictor", "head"):
            one: Any = [*value[:-1], 1] if isinstance(value, tuple) else 1
            with pytest.raises(ValueError, match="greater than or equal to 2"):
                rivals.experiment(method, **{key: one})
