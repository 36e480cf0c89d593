"""A file of one's own that is not what its name stands for is one sentence, which names it; not a traceback of ours."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from made_up import STUDY

import aps.methods
from aps import stages
from aps.cli import main
from aps.errors import UserError
from aps.registry import ARCHS, DATASETS, ENGINES, METHODS, REGISTRIES, STRATEGIES
from aps.settings.reading import load_study
from aps.settings.study import experiment_model, stage_model

Write = Callable[[str], None]
HEAD = "from aps.methods import Method\nfrom aps.settings.blocks import PretrainSettings\n\n\n"


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Write]:
    """Writes the file that is the method `own`, and whose `thing` is `own` of every other kind."""
    monkeypatch.setattr(aps.methods, "__path__", [str(tmp_path), *aps.methods.__path__])
    for known in REGISTRIES:
        monkeypatch.setattr(
            known, "_rows", known._rows | {"own": "aps.methods.own:" + "thing" * (known is not METHODS)}
        )
        monkeypatch.setattr(known, "_checked", {})

    def write(text: str) -> None:
        (tmp_path / "own.py").write_text(text)

    def forget() -> None:
        sys.modules.pop("aps.methods.own", None)
        stage_model.cache_clear()
        experiment_model.cache_clear()

    forget()
    yield write
    forget()


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("class Other:\n    pass\n", "has no class own, in upper or lower case"),
        ("own = 3\n", "has no class own"),
        ("import nothere\n", r"can't be imported: ModuleNotFoundError: No module named 'nothere' \(line 1\)"),
        ("from aps.files import nothere\n", r"can't be imported: ImportError: cannot import name 'nothere' .* \(line 1\)"),
        ("x = 1\ny = z\n", r"can't be imported: NameError: name 'z' is not defined \(line 2\)"),
        ("from pathlib import Path\nPath('x').parents[9]\n", r"can't be imported: IndexError: 9 \(line 2\)"),
        ("x = 1\nclass Own(:\n", "own.py, line 2: invalid syntax"),
        ("class Own:\n    pass\n", "class Own is no method; make it a class that inherits from aps.methods.Method"),
        (f"{HEAD}class Own(Method):\n    class Settings:\n        x = 1\n", "its Settings does not inherit from aps.set"),
        (f"{HEAD}class Own(Method):\n    Settings = None\n", "its Settings does not inherit from aps.settings.blocks.Pre"),
        (f"{HEAD}class Own(Method):\n    Views = PretrainSettings\n", "its Views does not inherit from aps.settings.blo"),
        (f"{HEAD}class Own(Method):\n    class Settings(PretrainSettings):\n        must: int\n", "'must' of its Settings has"),
        (
            f"{HEAD}class Own(Method):\n    class Settings(PretrainSettings):\n        epochs: int = 'x'\n        "
            "def model_post_init(self, _):\n            raise KeyError('boom')\n",
            "the defaults of its Settings are refused",
        ),
        (
            f"{HEAD}class Own(Method):\n    @classmethod\n    def check(cls, e):\n        raise KeyError('boom')\n",
            r"check of method 'own' \(.*own.py\) failed: KeyError: 'boom' \(line 8\)",
        ),
    ],
)  # fmt: skip
def test_a_method_that_is_none_is_one_sentence_where_its_study_is_read(write: Write, text: str, sentence: str) -> None:
    write(text)
    with pytest.raises(UserError, match=r"method 'own' \(.*own\.py\)") as caught:
        load_study(
            [], {"experiments": {"e": {"dataset": "digits", "pretrain": {"method": "own"}, "stages": ["pretrain"]}}}
        )
    assert caught.match(sentence) and "\n" not in str(caught.value)


def test_a_file_of_several_words_holds_the_class_of_these_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`barlow_twins.py` and `class BarlowTwins`, as both are usually written; another class is refused."""
    monkeypatch.setattr(aps.methods, "__path__", [str(tmp_path), *aps.methods.__path__])
    monkeypatch.setattr(METHODS, "_checked", {})
    for name, written in (("own_twins", "OwnTwins"), ("own_pair", "own_pair"), ("own_other", "OwnTwin")):
        (tmp_path / f"{name}.py").write_text(f"{HEAD}class {written}(Method):\n    pass\n")
        monkeypatch.setattr(METHODS, "_rows", METHODS._rows | {name: f"aps.methods.{name}:"})
        monkeypatch.setitem(sys.modules, f"aps.methods.{name}", None)  # taken out again after the test
        del sys.modules[f"aps.methods.{name}"]
    assert METHODS.load("own_twins").__name__ == "OwnTwins" and METHODS.load("own_pair").__name__ == "own_pair"
    with pytest.raises(UserError, match="has no class own_other, in upper or lower case, with or without underscores;"):
        METHODS.load("own_other")


@pytest.mark.parametrize("known", [STRATEGIES, ARCHS, DATASETS, ENGINES], ids=lambda known: known.group)
@pytest.mark.parametrize("thing", ["3", "(32, 2, 4)", None])
def test_another_thing_than_the_name_stands_for_is_one_sentence(known: Any, thing: str | None, write: Write) -> None:
    write(f"thing = {thing}\n" if thing else "other = 1\n")
    with pytest.raises(UserError, match=rf"^{known.word} 'own' \(.*own\.py\): ") as caught:
        known.load("own")
    assert caught.match(
        "a value of type (int|tuple) is no" if thing else "has no 'thing', which its row or entry point"
    )


def test_an_architecture_of_numbers_that_are_none_is_one_sentence(write: Write) -> None:
    write("from aps.models.archs import Arch\nthing = Arch(32, 2, 0.5)\n")
    with pytest.raises(UserError, match=r"Arch\(dim=32, depth=2, heads=0.5\) is no architecture; its width"):
        ARCHS.load("own")


def test_a_row_that_names_no_module_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    for path, gone in (("nothere.deep:x", "nothere"), ("aps.nothere:x", r"aps\.nothere")):
        monkeypatch.setattr(STRATEGIES, "_rows", STRATEGIES._rows | {"own": path})
        with pytest.raises(UserError, match=f"^sampling strategy 'own': there is no module {gone}; correct its row"):
            STRATEGIES.load("own")


def test_every_name_of_ours_is_what_it_stands_for() -> None:
    for known in REGISTRIES:
        for name in set(known._rows) - {"detectron2"}:  # which needs a library
            assert known.load(name) is known.load(name)


def test_a_stages_check_that_fails_is_one_sentence(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    write("def check(e):\n    e.nothere\n")
    row = replace(stages.STAGES["knn"], module="aps.methods.own", check="aps.methods.own:check")
    monkeypatch.setitem(stages.STAGES, "knn", row)
    study = {"experiments": {"e": {"dataset": "digits", "stages": ["pretrain", "knn"]}}}
    with pytest.raises(
        UserError, match=r"the check of stage 'knn' \(.*own\.py\) failed: AttributeError: .* \(line 2\)"
    ):
        load_study([], study)
    write("def other(e):\n    pass\n")
    sys.modules.pop("aps.methods.own")
    with pytest.raises(UserError, match=r"stage 'knn' \(.*own\.py\): has no 'check'"):
        load_study([], study)


def test_a_crash_in_a_file_of_ones_own_ends_with_a_sentence_that_names_it(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write("def thing(folder, source, name):\n    return [1, 2][name]\n")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "study.yaml").write_text(STUDY.format(results="results"))
    with pytest.raises(TypeError) as caught:
        main(["data", "own", "--configfile", "study.yaml"])
    (note,) = caught.value.__notes__
    assert note.startswith(f"error: {tmp_path / 'own.py'}, line 2, thing: TypeError, as above; correct it there")
