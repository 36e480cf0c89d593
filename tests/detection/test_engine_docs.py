"""The engine of docs/extending.md, run as it is printed."""

import dataclasses
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from aps.detection import load_engine
from aps.detection.engine import Task
from aps.settings import engine_names
from aps.settings import study as config

PAGE = (Path(__file__).parents[2] / "docs" / "extending.md").read_text()


def test_the_documented_file_adds_an_engine(task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)[-1]
    module = ModuleType("aps.detection.engines.frozen")
    exec(code, module.__dict__)
    monkeypatch.setitem(sys.modules, "aps.detection.engines.frozen", module)
    (tmp_path / "detection" / "engines").mkdir(parents=True)
    (tmp_path / "detection" / "engines" / "frozen.py").write_text(code)
    with monkeypatch.context() as patch:
        patch.setattr(config, "PACKAGE", tmp_path)
        assert engine_names() == ["frozen"]

    engine = load_engine("frozen")(
        dataclasses.replace(task, settings=task.settings.model_copy(update={"iterations": 2}))
    )
    before = {name: value.clone() for name, value in engine.model.state_dict().items()}
    engine.train(0, lambda done, losses: None)
    after = engine.model.state_dict()
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert changed and not any(name.startswith("backbone.net.") for name in changed)
