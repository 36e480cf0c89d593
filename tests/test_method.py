"""docs/method.md: what it refers to exists, who refers to it finds it, and its tables are the code's."""

import re
from pathlib import Path

import yaml

from aps.registry import ARCHS

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "method.md").read_text()
HEADINGS = set(re.findall(r"^## (.+)$", PAGE, re.MULTILINE))
TESTS = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("*.py"))
READERS = [p for folder in ("aps", "config", "tests", "benchmarks") for p in (ROOT / folder).rglob("*.*") if p.suffix in (".py", ".yaml")]  # fmt: skip


def test_every_test_and_file_it_names_exists() -> None:
    names = re.findall(r"`(test_[a-z0-9_]+)`", PAGE)
    assert len(names) > 40
    missing = [n for n in names if n != "test_top1_ema" and f"def {n}(" not in TESTS]
    missing += [f for f in re.findall(r"`((?:aps|config)/[\w/.]+)`", PAGE) if not (ROOT / f).is_file()]
    assert missing == []


def test_every_section_ends_with_its_place_and_tests() -> None:
    sections = dict(
        zip(
            re.findall(r"^## (.+)$", PAGE, re.MULTILINE),
            re.split(r"^## .+$", PAGE, flags=re.MULTILINE)[1:],
            strict=True,
        )
    )
    for name in HEADINGS - {"The idea", "Symbols", "Traps", "What differs from the release"}:
        assert re.search(r"^Here: `", sections[name], re.MULTILINE) and "Tests:" in sections[name], name


def test_a_section_that_code_or_config_names_is_there() -> None:
    found = []
    for path in READERS:
        for named in re.findall(
            r"""method\.md(?:'s)?,? \(?"?([A-Z][\w' ]+?)(?=[.,;:)"\n]|$| and )""", path.read_text()
        ):
            assert any(heading.startswith(named.strip()) for heading in HEADINGS), f"{path}: {named}"
            found.append(named)
    assert len(found) > 15


def test_its_numbers_are_those_of_the_code() -> None:
    published = yaml.safe_load((ROOT / "config" / "published.yaml").read_text())
    rows = re.findall(r"^\| (CIFAR-10+) \| (\d+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", PAGE, re.MULTILINE)
    assert len(rows) == 4
    for dataset, epochs, *values in rows:
        for arch, value in zip(("tiny", "small", "base"), values, strict=True):
            entry = published[f"{dataset.lower().replace('-', '')}-{arch}-{epochs}"]
            assert entry["metrics"]["finetune.test_top1"] == float(value)
    for row, (size, patch) in (("S = 32, P = 2", (32, 2)), ("S = 224, P = 16", (224, 16))):
        counts = [
            int(x.replace(",", "")) for x in re.search(rf"^\| {row} \| (.+) \|$", PAGE, re.MULTILINE)[1].split(" | ")
        ]  # type: ignore[index]
        for arch, count in zip(("tiny", "small", "base"), counts, strict=True):
            d, depth, _ = ARCHS.load(arch)
            block = 12 * d * d + 10 * d  # weights of qkv, proj, fc1, fc2; norms and biases but qkv's
            assert count == d * (2 + (size // patch) ** 2) + 3 * patch * patch * d + depth * block + 2 * d
