"""Takes features and attention from a network, and converts it to a timm model or an ONNX file.

Design: the name of a timm model cannot set LayerNorm's eps, which is 1e-5 here and 1e-6 in most of timm, so there is one
family for each. It does not know images, classes or addresses.

Letters: B images, S image side, D width, G cells along a side.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models.vision_transformer import Attention
from torch import Tensor, nn

from aps.errors import UserError
from aps.files import atomic_path
from aps.models.archs import dimensions
from aps.models.encoder import Encoder
from aps.settings.blocks import EncoderSettings

FAMILY = "vit_base_patch16_224"  # a family of timm; all sizes are passed as arguments
# eps of the LayerNorms -> a family with it, and arguments that switch off extras (the norm before a CLIP tower's blocks).
EPS_FAMILIES: dict[float, tuple[str, dict[str, Any]]] = {
    1e-6: (FAMILY, {}),
    1e-5: ("vit_base_patch16_clip_224", {"pre_norm": False}),
}


def features(network: nn.Module, x: Tensor) -> Tensor:
    """x: (B, 3, S, S), normalized -> (B, D), before any classifier."""
    tokens = network.tokens(x) if isinstance(network, Encoder) else network.forward_features(x)  # type: ignore[operator]
    return network.forward_head(tokens, pre_logits=True)  # type: ignore[operator]


def class_attention(layer: Attention, x: Tensor, prefix: int) -> Tensor:
    """Attention of token 0 to the patches, from the input of an attention layer.

    x: (B, prefix + G*G, D) -> (B, heads, G, G); prefix: number of tokens before the patches, such as the class token.
    """
    B, N, _ = x.shape
    q, k, _ = layer.qkv(x).view(B, N, 3, layer.num_heads, layer.head_dim).permute(2, 0, 3, 1, 4)
    q, k = layer.q_norm(q[:, :, :1]), layer.k_norm(k)
    weights = (layer.scale * q @ k.transpose(-2, -1)).float().softmax(-1)[:, :, 0, prefix:]
    side = round((N - prefix) ** 0.5)
    return weights.view(B, layer.num_heads, side, side)


def timm_arguments(settings: EncoderSettings, classes: int) -> dict[str, Any]:
    """Arguments of `timm.create_model` for an encoder of this project, without the norm."""
    dim, depth, heads = dimensions(settings)
    return {
        "img_size": settings.image_size,
        "patch_size": settings.patch_size,
        "embed_dim": dim,
        "depth": depth,
        "num_heads": heads,
        "mlp_ratio": settings.mlp_ratio,
        "qkv_bias": settings.qkv_bias,
        "no_embed_class": True,
        "num_classes": classes,
    }


def timm_twin(state: Mapping[str, Tensor], settings: EncoderSettings, classes: int) -> nn.Module:
    """A plain timm model with the weights of an encoder of this project, on the CPU, in evaluation mode."""
    norm = partial(nn.LayerNorm, eps=settings.layer_norm_eps)
    network = timm.create_model(FAMILY, **timm_arguments(settings, classes), norm_layer=norm)
    network.load_state_dict(dict(state), strict=True)
    return network.eval()


class _Outputs(nn.Module):
    """The module that is exported as an ONNX file."""

    def __init__(self, network: nn.Module, classifies: bool) -> None:
        super().__init__()
        self.network, self.classifies = network, classifies

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """(B, 3, S, S) normalized -> probabilities (B, C) and features (B, D), or features alone."""
        found = features(self.network, images)
        return (self.network(images).softmax(1), found) if self.classifies else found


def write_onnx(network: nn.Module, classifies: bool, size: int, about: dict[str, Any], out: Path) -> None:
    """Write an ONNX file for any batch size, with the inputs and outputs of `aps.inference.model.Model.to_onnx`.

    Args:
        classifies: whether the network has a classifier.
        size: S.
        about: plain data for the file's metadata.

    Raises:
        UserError: the packages for it are not installed, or the file can't be written.
    """
    if missing := [name for name in ("onnx", "onnxscript") if find_spec(name) is None]:
        raise UserError(f"ONNX needs {' and '.join(missing)}; install them by `pip install 'aps-vit[onnx]'`")
    import onnx

    outputs = _Outputs(copy.deepcopy(network).cpu().float(), classifies).eval()
    names = ["probabilities", "features"] if classifies else ["features"]
    with atomic_path(out) as temporary:
        with _quiet():
            torch.onnx.export(
                outputs,
                (torch.zeros(2, 3, size, size),),
                str(temporary),
                input_names=["images"],
                output_names=names,
                dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
                dynamo=True,
                external_data=False,
                verbose=False,
            )
        written = onnx.load(str(temporary))
        onnx.helper.set_model_props(written, {key: json.dumps(value) for key, value in about.items()})
        onnx.save(written, str(temporary))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter, which prints warnings about its future versions."""
    old = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(old)
