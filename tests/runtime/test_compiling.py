"""`compile` of pretrain and finetune: the same step, up to rounding, and the same checkpoint.

Whole runs are not compared with plain ones: the encoder's last bias has no gradient but rounding (BatchNorm follows), of
which AdamW makes steps of full size, so that any other rounding gives another run.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import small
import torch

from aps.errors import UserError
from aps.training.augment import Mix, soft_targets
from aps.training.examples import Examples
from aps.training.finetune import Finetuner
from aps.training.pretrain import Trainer

MISSING = shutil.which(os.environ.get("CXX", "g++")) is None


def compiles(test: Callable[..., None]) -> Callable[..., None]:
    """Marks a test that compiles, which takes up to a minute."""
    return pytest.mark.slow(pytest.mark.skipif(MISSING, reason="no C++ compiler")(test))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Several threads add up the compiled gradient of the position embedding in no fixed order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def step(digits: Path, folder: Path, compiled: bool) -> tuple[float, float, dict[str, torch.Tensor]]:
    """Loss, positive cosine and what AdamW has seen of the gradient (its first moment) after one step."""
    job = small.job("pretrain", digits, folder, compile=compiled)
    trainer = Trainer(job, small.ONE)
    generator = torch.Generator().manual_seed(0)
    views = [torch.randn(32, 3, 16, 16, generator=generator) for _ in range(2)]
    kept = [torch.rand(32, 16, generator=generator).argsort(1)[:, :4] for _ in range(2)]
    found = trainer.step(tuple(views), tuple(kept), lr=1e-3)
    names = [name for name, _ in trainer.networks.named_parameters()]
    moments = trainer.optimizer.state_dict()["state"]
    return (
        float(found["loss"]),
        float(found["positive_cosine"]),
        {name: moments[i]["exp_avg"] for i, name in enumerate(names)},
    )


@compiles
def test_a_compiled_step_is_the_plain_step(digits: Path, tmp_path: Path) -> None:
    plain, compiled = (step(digits, tmp_path / str(on), on) for on in (False, True))
    assert compiled[:2] == pytest.approx(plain[:2], rel=1e-5, abs=1e-6)
    for name, gradient in plain[2].items():  # the encoder's last bias has none but rounding
        assert (compiled[2][name] - gradient).norm() <= 1e-3 * gradient.norm() + 1e-5, name


@compiles
def test_a_compiled_run_resumes_where_it_stopped_and_its_state_loads_into_a_plain_one(
    digits: Path, tmp_path: Path, one_thread: None
) -> None:
    whole = small.job("pretrain", digits, tmp_path / "whole", compile=True)
    stopped = small.job("pretrain", digits, tmp_path / "stopped", compile=True)
    expected = small.run(whole)
    small.run(stopped, stop_after=2)
    plain = small.job("pretrain", digits, tmp_path / "plain")
    plain.checkpoints.mkdir(parents=True)
    (state,) = stopped.checkpoints.glob("state-*.pt")
    (plain.checkpoints / state.name).write_bytes(state.read_bytes())
    assert small.run(stopped) == expected
    assert small.run(plain)["epochs"] == 2


@compiles
def test_a_compiled_finetuning_step_is_the_plain_step(digits: Path, tmp_path: Path) -> None:
    generator, labels = torch.Generator().manual_seed(0), torch.arange(32) % 10
    batch = Examples(
        torch.randn(32, 3, 16, 16, generator=generator), soft_targets(labels, 10, 0.1, Mix(0.7, None)), labels
    )
    results = []
    for compiled in (False, True):
        # no drop path: compiled, it is drawn otherwise
        job = small.job("finetune", digits, tmp_path / str(compiled), compile=compiled, drop_path=0.0)
        tuner = Finetuner(job, 10, ((0.5,) * 3, (0.25,) * 3), small.ONE)
        loss, _ = tuner.step(batch, lr=1e-3)
        results.append((loss, tuner.model.head.weight.detach()))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)


@compiles
def test_a_compiled_finetuning_resumes_where_it_stopped(digits: Path, tmp_path: Path) -> None:
    expected = small.run(small.job("finetune", digits, tmp_path / "whole", compile=True))
    stopped = small.job("finetune", digits, tmp_path / "stopped", compile=True)
    small.run(stopped, stop_after=4)  # within the second epoch
    assert small.run(stopped) == expected


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_without_a_compiler_the_setting_is_refused(
    stage: str, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match=f"^{stage}.compile: true needs a compiler, and there is no no-such-compiler"):
        small.run(small.job(stage, digits, tmp_path, compile=True))
