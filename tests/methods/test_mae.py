"""MAE's decoder and its whole painting against lightly's modules, its target against its definition, its mask."""

from __future__ import annotations

from typing import Any

import pytest
import rivals
import torch
from lightly.models import utils
from lightly.models.modules import MaskedVisionTransformerDecoderTIMM
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn

from aps.methods.mae import MAE
from aps.models.encoder import patchify
from aps.sampling import Geometry, global_noise

SMALL = {"decoder_dim": 16, "decoder_depth": 2, "decoder_heads": 2}


def drawn(method: MAE, rows: int = 5) -> Tensor:
    noise = global_noise(rows, torch.device("cpu"), torch.Generator().manual_seed(1))
    geometry = Geometry(torch.zeros(rows, 4), torch.zeros(rows, dtype=torch.bool))
    ((order,),) = method.sample([geometry], noise)
    return order


def lightlys(networks: Any) -> MaskedVisionTransformerDecoderTIMM:
    """lightly's decoder with our weights; its positions are checked to be ours but for the order of their columns."""
    decoder = MaskedVisionTransformerDecoderTIMM(16, 16, 2, 2)
    theirs, ours = decoder.pos_embed[0, 1:], networks["tokens"]["positions"]
    assert torch.equal(decoder.pos_embed[0, 0], torch.zeros(16))  # none for the class token
    torch.testing.assert_close(theirs.T.sort(0).values, ours.T.sort(0).values, rtol=0, atol=1e-6)
    with torch.no_grad():
        decoder.mask_token.copy_(networks["tokens"]["mask"])
        decoder.pos_embed[0, 1:] = ours
    decoder.blocks.load_state_dict(networks["decoder"][:2].state_dict())
    decoder.norm.load_state_dict(networks["decoder"][2].state_dict())
    return decoder


def test_painted_patches_are_those_of_lightlys_decoder() -> None:
    method, networks = rivals.build(MAE, **SMALL), rivals.networks(MAE, **SMALL)
    images, order = torch.randn(5, 3, 16, 16), drawn(method)
    painted, _ = method.forward(networks, (images,), (order,))
    kept, masked = order[:, :4] + 1, order[:, 4:] + 1  # lightly counts the class token

    decoder = lightlys(networks)
    everything = torch.cat([torch.zeros(5, 1, dtype=torch.int64), kept], 1)
    encoded = networks["embed"](networks["encoder"].tokens(images, order[:, :4]))
    tokens = utils.repeat_token(decoder.mask_token, (5, 17))
    tokens = utils.set_at_index(tokens, everything, encoded)
    decoded = decoder(tokens)
    expected = networks["decoder"][3](utils.get_at_index(decoded, masked))
    torch.testing.assert_close(painted, expected, rtol=1e-5, atol=1e-6)


def test_target_and_loss_are_those_of_the_paper() -> None:
    """The mean squared error on masked patches alone, each standardized by its own pixels (lightly's patches agree)."""
    method, networks = rivals.build(MAE, **SMALL), rivals.networks(MAE, **SMALL)
    images, order = torch.randn(5, 3, 16, 16), drawn(method)
    painted, target = method.forward(networks, (images,), (order,))
    theirs = utils.get_at_index(utils.patchify(images, 4), order[:, 4:])  # each patch row, column, channel
    ours = target.unflatten(2, (3, 4, 4)).permute(0, 1, 3, 4, 2).flatten(2)
    assert torch.equal(ours, theirs)
    error = 0.0
    for image, cells in enumerate(order[:, 4:].tolist()):
        for place, cell in enumerate(cells):
            pixels = patchify(images, 4)[image, cell].double()
            pixels = (pixels - pixels.mean()) / (pixels.var() + 1e-6).sqrt()
            error += (painted[image, place].double() - pixels).square().mean().item() / (5 * 12)
    loss, _ = method.loss((painted, target), 0.0)
    assert loss.item() == pytest.approx(error, rel=1e-5)
    plain, _ = rivals.build(MAE, normalized_target=False, **SMALL).loss((painted, target), 0.0)
    assert plain.item() == pytest.approx((painted - target).square().mean().item(), rel=1e-6)


def test_every_image_has_its_own_mask_of_the_asked_share() -> None:
    method = rivals.build(MAE, **SMALL)
    order = drawn(method, 2000)
    assert torch.equal(order.sort(1).values, torch.arange(16).expand(2000, -1))
    kept = torch.zeros(2000, 16).scatter_(1, order[:, :4], 1)
    assert (kept.mean(0) - 0.25).abs().max() < 0.05  # each cell as often as any other
    assert len(kept.unique(dim=0)) > 1000


def test_the_encoder_sees_kept_patches_only() -> None:
    method, networks = rivals.build(MAE, **SMALL), rivals.networks(MAE, **SMALL)
    images, order = torch.randn(5, 3, 16, 16), drawn(method)
    painted, _ = method.forward(networks, (images,), (order,))
    patches = patchify(images, 4).scatter(1, order[:, 4:, None].expand(-1, -1, 48), 7.0)
    changed = patches.view(5, 4, 4, 3, 4, 4).permute(0, 3, 1, 4, 2, 5).reshape(5, 3, 16, 16)
    assert torch.equal(method.forward(networks, (changed,), (order,))[0], painted)


def test_the_decoder_is_the_papers() -> None:
    networks = rivals.networks(MAE)
    blocks = networks["decoder"][:8]
    assert len(networks["decoder"]) == 10 and {block.attn.num_heads for block in blocks} == {16}
    assert [p.shape for p in networks["embed"].parameters()] == [(512, rivals.DIM), (512,)]
    assert networks["decoder"][9].weight.shape == (48, 512)
    assert not networks["tokens"]["positions"].requires_grad
    bound = (6 / (512 + 512)) ** 0.5  # Xavier's uniform
    assert networks["decoder"][0].attn.proj.weight.abs().max().item() == pytest.approx(bound, rel=1e-3)
    assert all(not m.bias.any() for m in networks["decoder"].modules() if isinstance(m, nn.Linear))


def test_weight_decay_spares_what_the_releases_does() -> None:
    """By timm's function for it, which the release calls, on our networks: biases and norms, not the tokens."""
    networks = rivals.networks(MAE, **SMALL)
    ours = list(rivals.build(MAE, **SMALL).parameters(networks))
    theirs = param_groups_weight_decay(networks, 0.05)
    decayed = [{id(p) for p in group["params"]} for group in ours if group.get("weight_decay") != 0]
    assert decayed == [{id(p) for p in group["params"]} for group in theirs if group["weight_decay"]]
    assert id(networks["tokens"]["mask"]) in decayed[0]
    assert sum(len(group["params"]) for group in ours) == sum(len(group["params"]) for group in theirs)


def test_one_view_without_colours() -> None:
    (view,) = rivals.build(MAE, **SMALL).views()
    assert view.augmentation.crop_scale == (0.2, 1.0)
    assert view.augmentation.color_jitter_prob == view.augmentation.grayscale == 0


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"mask_ratio": 0.99}, "pretrain.mask_ratio 0.99 leaves none of 16 cells; lower it"),
        ({"mask_ratio": 1e-17}, "pretrain.mask_ratio 1e-17 masks none of 16 cells; raise it"),
        ({"decoder_dim": 18, "decoder_heads": 2}, "pretrain.decoder_dim 18 is not a multiple of 4"),
        ({"decoder_dim": 20, "decoder_heads": 3}, "20 is not a multiple of pretrain.decoder_heads 3"),
    ],
)
def test_settings_that_do_not_fit_are_refused(own: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MAE.check(rivals.experiment(MAE, **own))
