"""The base class of every block of settings, the types of their numbers, and checks that several blocks need."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, ClassVar, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

MOST = 10**9  # of whatever is counted; more is a slip of the keyboard
HIGHEST = 1e6  # of whatever is measured and has no end of its own; products of larger ones reach float32's, 3e38
WIDEST = 10**6  # of a transformer: its matrices have a multiple of the square, whose bytes have to fit into 64 bits
Positive = Annotated[int, Field(gt=0, le=MOST)]
Plural = Annotated[
    int, Field(ge=2, le=MOST)
]  # widths of what is normalized and told apart: one number alone says nothing
Natural = Annotated[int, Field(ge=0, le=MOST)]
Depth = Annotated[int, Field(gt=0, le=10_000)]  # blocks, each of which is built one by one, to count operations too
Width = Annotated[int, Field(gt=0, le=WIDEST)]
PositiveFloat = Annotated[float, Field(gt=0, le=HIGHEST)]
NonNegative = Annotated[float, Field(ge=0, le=HIGHEST)]
Rate = Annotated[float, Field(gt=0, le=1e30)]  # of learning: training with one far too high says so itself
WeightDecay = Annotated[float, Field(ge=0, le=10)]  # above, it diverges at learning rates that are not to blame
Jitter = Annotated[float, Field(ge=0, le=10)]  # of colours, as factors from 1 - it to 1 + it
Probability = Annotated[float, Field(ge=0, le=1)]
Share = Annotated[float, Field(ge=0, lt=1)]
Temperature = Annotated[float, Field(ge=1e-3, le=100)]  # beyond, a softmax in float32 is one-hot or uniform
Seed = Annotated[int, Field(ge=0, lt=2**64)]  # the range that torch accepts
Side = Annotated[int, Field(gt=0, le=8192)]  # of an image, pixels
Precision = Literal["auto", "fp32", "bf16", "fp16"]

NAME_LETTERS = 100  # a file name may have 255 bytes, and names of temporary files are longer than the final ones
NAME = rf"[A-Za-z0-9][\w.-]{{0,{NAME_LETTERS - 1}}}"  # a name that becomes a folder


class Section(BaseModel):
    """Base of every block of settings: unknown keys are errors, values are not silently converted."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
    alternatives: ClassVar[tuple[str, ...]] = ()  # keys of which a block has one

    @model_validator(mode="before")
    @classmethod
    def _from_yaml(cls, value: Any) -> Any:
        """Turn lists of YAML into tuples, and drop blocks that are null because all their keys are commented out."""
        if not isinstance(value, dict):
            return value
        return {
            key: tuple(inner) if isinstance(inner, list) else inner
            for key, inner in value.items()
            if inner is not None or key not in _blocks(cls)
        }

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """As in pydantic, but values that `cached_property` computed from the old settings are not copied."""
        copy = super().model_copy(update=update, deep=deep)
        for computed in copy.__dict__.keys() - type(self).model_fields.keys():
            del copy.__dict__[computed]
        return copy


@cache
def _blocks(section: type[BaseModel]) -> frozenset[str]:
    """Names of the fields that are blocks of settings."""
    return frozenset(k for k, field in section.model_fields.items() if isinstance(field.default, dict | BaseModel))


@cache
def optional_blocks(section: type[BaseModel]) -> frozenset[str]:
    """Names of the fields that are a block of settings or null, which means something else than an empty block."""
    kinds = {k: get_args(field.annotation) for k, field in section.model_fields.items()}
    return frozenset(
        k for k, args in kinds.items() if type(None) in args and any(_is_section(argument) for argument in args)
    )


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Section)


def without_null(data: dict[str, Any], key: str) -> dict[str, Any]:
    """The dump of a block without a key that is null, so that runs from before there was this key are those of today."""
    return {k: v for k, v in data.items() if k != key or v is not None}


def check_distinct(key: str, values: tuple[Any, ...]) -> None:
    """Raises ValueError where a value occurs twice."""
    if twice := [value for value in values if values.count(value) > 1]:
        raise ValueError(f"{key} lists {twice[0]} twice; remove one")


def check_range(key: str, pair: tuple[float, float]) -> None:
    """Raises ValueError where [low, high] is the wrong way round."""
    if pair[0] > pair[1]:
        raise ValueError(f"{key} must be [low, high] with low <= high, not {list(pair)}")


def check_crop(pair: tuple[float, float]) -> None:
    """Raises ValueError where a range of crop areas is not [low, high], or exceeds the image."""
    check_range("crop_scale", pair)
    if pair[1] > 1:
        raise ValueError(f"crop_scale is a share of the image's area: {pair[1]} is above 1")
