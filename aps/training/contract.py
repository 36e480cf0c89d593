"""Checks that a method keeps to the contract of `aps.methods`, so that a mistake in one is a sentence and not a traceback.

Design: everything is checked before training or at its first step, and nothing in the steps after it. The checks ask for
types, shapes and names. Only for a tensor that a method keeps and does not save do they ask for values, once.
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from aps.errors import BrokenContract, UserError
from aps.methods import Method, Sampled
from aps.models.encoder import Encoder
from aps.registry import METHODS, frame_in
from aps.settings.blocks import ViewSettings
from aps.text import shorten
from aps.views import View

# What the stage itself writes into the journal and metrics.json.
RESERVED = frozenset(
    [
        "step",
        "time",
        "epoch",
        "epochs",
        "steps",
        "lr",
        "loss",
        "step_ms",
        "input_share",
        "flops",
        "seconds",
        "reading_seconds",
        "images_per_second",
        "knn_train_top1",
        "effective_rank",
        "dead_dimensions",
    ]
)
Memory = dict[str, tuple[Tensor, Tensor]]  # tensors by name, each with a copy


def ask(method: Method, kept: bool, sentence: str) -> None:
    """Raises BrokenContract, with the method's name and file before the sentence, if the contract is not kept."""
    if not kept:
        raise BrokenContract(f"{METHODS.described(method.settings.method)}: {sentence}")


@contextmanager
def blaming(name: str) -> Iterator[None]:
    """A context in which an exception that passes through a method's file ends in a line with file and line number."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        ancestors = [c for c in METHODS.load(name).__mro__ if issubclass(c, Method) and c is not Method]
        files = {getattr(sys.modules.get(c.__module__), "__file__", None) for c in ancestors}
        if (frame := frame_in(error, files)) is not None:
            said = shorten(" ".join(str(error).split()), 200, "...")
            error.add_note(f"{METHODS.described(name)} failed in line {frame.lineno}: {type(error).__name__}: {said}")
        raise


# ----------------------------------------------------------------------------------------------------------------------
# Before training


def views(method: Method) -> tuple[View, ...]:
    """The method's views."""
    found, patch = method.views(), method.experiment.encoder.patch_size
    good = isinstance(found, Sequence) and len(found) > 0 and all(isinstance(view, View) for view in found)
    ask(method, good, f"`views` returned {_shown(found)}; return a `View` or more in a tuple")
    for i, view in enumerate(found, 1):
        size, about = view.size, f"view {i} of `views` has "
        fits = type(size) is int and size > 0 and size % patch == 0
        ask(method, fits, f"{about}size {size!r}; give a positive multiple of encoder.patch_size {patch}")
        ask(method, view.chances in (1, 2), f"{about}chances {view.chances!r}; give 1 or 2")
        good = isinstance(view.augmentation, ViewSettings)
        ask(method, good, f"{about}augmentation {_shown(view.augmentation)}; give the block `views` or a copy of it")
    return tuple(found)


def networks(method: Method, encoder: Encoder) -> nn.ModuleDict:
    """The method's networks with an encoder."""
    found, name = method.networks(encoder), method.evaluated
    ask(method, isinstance(found, nn.ModuleDict), f"`networks` returned {_shown(found)}; return an nn.ModuleDict")
    known = ", ".join(found)
    ask(method, name in found, f"`networks` has no '{name}', which `evaluated` names; it has {known}; make them agree")
    network = found[name]
    right = isinstance(network, Encoder)
    ask(method, right, f"`evaluated` names '{name}' of `networks`, a {type(network).__name__}; name an Encoder")
    own = {id(x) for x in (*found.parameters(), *found.buffers())}
    for key, value in vars(method).items():
        tensors = (*value.parameters(), *value.buffers()) if isinstance(value, nn.Module) else ()
        inside = all(id(x) in own for x in tensors)
        ask(
            method,
            inside,
            f"`self.{key}` is a network that no checkpoint would hold; return it by `networks`, trained or not",
        )
    return found


def groups(method: Method, networks: nn.ModuleDict) -> list[dict[str, Any]]:
    """The groups of parameters that the method has optimized."""
    found = method.parameters(networks)
    entries = [] if found is None else list(found)
    split = [dict(e) if isinstance(e, dict) else {"params": [e]} for e in entries]
    ask(method, all("params" in group for group in split), "a group of `parameters` has no 'params'; add them")
    for group in split:
        given = group["params"]
        group["params"] = [given] if isinstance(given, Tensor) else list(given)
        ask(method, "lr" not in group, "a group of `parameters` sets lr, which follows the schedule; set lr_scale")
    if entries and not any(isinstance(e, dict) for e in entries):
        split = [{"params": [p for group in split for p in group["params"]]}]
    names = {id(p): name for name, p in networks.named_parameters()}
    every: list[Any] = [p for group in split for p in group["params"]]
    ask(method, len(every) > 0, "`parameters` is empty; return what is to be trained")
    strangers = [type(p).__name__ for p in every if id(p) not in names]
    ask(method, not strangers, f"`parameters` has a {(strangers or [''])[0]} that is no parameter of `networks`")
    twice = [names[known] for known, times in Counter(map(id, every)).items() if times > 1]
    ask(method, not twice, f"`parameters` has {(twice or [''])[0]} twice; list each parameter once")
    ask(method, any(p.requires_grad for p in every), "no parameter of `parameters` takes a gradient (requires_grad)")
    return split


def start(method: Method) -> None:
    """Check the rest of what can be asked of a method before its first step."""
    steps, decay = method.steps, method.weight_decay(0.0)
    ask(method, type(steps) is int and steps > 0, f"`steps` is {steps!r}; give a positive whole number")
    right = isinstance(decay, int | float) and math.isfinite(decay) and decay >= 0
    ask(method, right, f"`weight_decay` returned {_shown(decay)}; return a number, 0 or more")
    rate = method.drop_path
    ask(method, isinstance(rate, int | float) and 0 <= rate < 1, f"`drop_path` is {rate!r}; give a share below 1")
    state(method)


def state(method: Method) -> None:
    """Check that a checkpoint that holds the method's state can be read again: a dry save and load, without values."""
    found = method.state_dict()
    ask(method, isinstance(found, dict), f"`state_dict` returned {_shown(found)}; return a dictionary")
    for key, value in found.items():
        file, kept = BytesIO(), True
        try:
            torch.save(tree_map_only(Tensor, lambda x: torch.empty(0, dtype=x.dtype), value), file)
            file.seek(0)
            torch.load(file, weights_only=True)
        except Exception:  # pickle and torch raise many types
            kept = False
        ask(
            method,
            kept,
            f"`state_dict` has {_shown(value)} under {key!r}, with which a checkpoint could not be read again; make it of "
            "tensors, numbers, text, lists, tuples and dictionaries",
        )


# ----------------------------------------------------------------------------------------------------------------------
# At the first step


def sampled(method: Method, drawn: Any, rows: int) -> Sequence[Sampled]:
    """What the method sampled for a batch of `rows` images of this process."""
    steps, every = method.steps, isinstance(drawn, Sequence)
    good = every and len(drawn) == steps and all(isinstance(draw, tuple | list) for draw in drawn)
    ask(method, good, f"`sample` returned {_shown(drawn)}; return {steps} draws (`steps`), each a tuple of tensors")
    for x in (x for draw in drawn for x in draw):
        good = isinstance(x, Tensor) and x.dim() > 0 and len(x) == rows
        ask(method, good, f"a draw of `sample` has {_shown(x)}; give tensors with a row for each of the {rows} images")
    found: Sequence[Sampled] = drawn
    return found


def loss(method: Method, result: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and the figures that the method returned."""
    good = isinstance(result, tuple | list) and len(result) == 2
    ask(
        method,
        good,
        f"`loss` returned {_shown(result)}; return the loss and a dictionary of figures, which may be empty",
    )
    value, figures = result
    scalar = isinstance(value, Tensor) and value.dim() == 0 and value.is_floating_point()
    ask(
        method,
        scalar,
        f"the loss that `loss` returned is {_shown(value)}; return a scalar tensor, a mean over the images",
    )
    ask(method, value.requires_grad, "the loss that `loss` returned has no gradient; do not detach it")
    ask(method, isinstance(figures, dict), f"the figures of `loss` are {_shown(figures)}; return a dictionary")
    for name, figure in figures.items():
        ask(method, isinstance(name, str), f"a figure of `loss` is named {name!r}; give text")
        ask(
            method,
            name not in RESERVED,
            f"a figure of `loss` is named '{name}', as one of the stage's; choose another name",
        )
        good = isinstance(figure, Tensor) and figure.dim() == 0 and figure.device == value.device
        ask(
            method,
            good,
            f"the figure '{name}' of `loss` is {_shown(figure)}; return a scalar tensor on the loss's device",
        )
    return value, figures


def gradients(method: Method, networks: nn.ModuleDict) -> None:
    """Check that each parameter that takes a gradient has got one: several processes wait for all of them."""
    missing = [name for name, p in networks.named_parameters() if p.requires_grad and p.grad is None]
    more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
    ask(
        method,
        not missing,
        f"{(missing or [''])[0]}{more} of `networks` got no gradient; use it in `forward`, or call requires_grad_(False) on it",
    )


def memory(method: Method, networks: nn.ModuleDict) -> Memory:
    """The tensors of a method that no checkpoint holds unless `state_dict` has them, and a copy of each."""
    saved = networks.state_dict(keep_vars=True)
    own = {id(x) for x in saved.values()}
    found = {f"self.{name}": x for name, x in vars(method).items() if isinstance(x, Tensor) and id(x) not in own}
    found |= {name: x for name, x in networks.named_buffers() if name not in saved}
    return {name: (x, x.detach().clone()) for name, x in found.items()}


def remembered(method: Method, networks: nn.ModuleDict, before: Memory) -> None:
    """Check, after a step, that a checkpoint holds each tensor that the step has changed."""
    state(method)
    saved = {x.shape for x in tree_leaves(method.state_dict()) if isinstance(x, Tensor)}
    for name, (x, _) in memory(method, networks).items():
        changed = x.shape not in saved and name in before and not torch.equal(x, before[name][1].to(x))
        ask(
            method,
            not changed,
            f"`{name}` changes in a step and a resumed run would not have it; return it by `state_dict`, or make it a buffer "
            "of `networks` that is persistent; what only one step needs, delete in `after_step`",
        )


def _shown(value: Any) -> str:
    """A value in a few words."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}, {str(value.dtype).removeprefix('torch.')}"
    if value is None or isinstance(value, bool | int | float | str):
        return shorten(repr(value), 60, "...")
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a {type(value).__name__}"
