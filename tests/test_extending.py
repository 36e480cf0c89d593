"""The examples of docs/extending.md, run as they are printed."""

import re
from pathlib import Path

import pytest
import torch

from aps import registry, sampling
from aps.models import archs
from aps.models.encoder import build_encoder
from aps.sampling import coverage, sample
from aps.settings.blocks import EncoderSettings, SamplingSettings, ViewSettings
from aps.views import draw_parameters

PAGE = (Path(__file__).parents[1] / "docs" / "extending.md").read_text()
STRATEGY, ARCH, _ = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def test_examples_are_at_most_ten_lines() -> None:
    for code in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        assert len([line for line in code.splitlines() if line]) <= 10


def test_the_documented_function_adds_a_strategy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="strategy 'least' is unknown"):
        SamplingSettings(strategy="least")
    monkeypatch.setattr(sampling, "least_covered", None, raising=False)  # taken out again after the test
    exec(STRATEGY, vars(sampling))
    row = {"least": "aps.sampling:least_covered"}
    monkeypatch.setattr(registry.STRATEGIES, "_rows", registry.STRATEGIES._rows | row)
    settings, grid = SamplingSettings(strategy="least"), 8
    generator = torch.Generator().manual_seed(0)
    one, two = (draw_parameters(v, 16, 40, 30, ViewSettings(), generator).geometry() for v in (1, 2))
    kept = sample(settings, grid, one, two, generator)
    assert kept.view1.shape == kept.view2.shape == (4, 16, 16)
    mask = torch.zeros(16, 4, 64).scatter_(2, kept.view1.transpose(0, 1), 1)
    covered = coverage(one, mask, two, grid)
    own = covered.gather(2, kept.view2.transpose(0, 1))
    assert torch.equal(own.sort(2).values, covered.sort(2).values[:, :, :16])


def test_the_documented_row_adds_an_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="arch 'mini' is unknown"):
        EncoderSettings(arch="mini")
    monkeypatch.setattr(archs, "MINI", None, raising=False)  # taken out again after the test
    exec(ARCH, vars(archs))
    monkeypatch.setattr(registry.ARCHS, "_rows", registry.ARCHS._rows | {"mini": "aps.models.archs:MINI"})
    encoder = build_encoder(EncoderSettings(arch="mini", image_size=16, patch_size=4))
    assert (encoder.embed_dim, len(encoder.blocks), encoder.blocks[0].attn.num_heads) == (128, 6, 2)
    assert encoder(torch.zeros(2, 3, 16, 16), torch.arange(4).expand(2, -1)).shape == (2, 128)
