"""The contrastive loss of a pair of views, over all processes (method.md, Loss).

No momentum encoder and no queue: the keys are the other view's projections without gradient. Computed in float32
whatever autocast says: at tau = 0.1 a bfloat16 logit is off by several hundredths.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


def contrastive_loss(p1: Tensor, z1: Tensor, p2: Tensor, z2: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Cross-entropy of `p_a @ sg(z_b)^T / tau` against the own pair, summed over both directions.

    Args:
        p1, z1, p2, z2: (B, d) predictions and projections of this process's rows, not normalized.
        temperature: tau.

    Returns:
        loss: scalar, the mean over this process's rows; the mean over processes is the whole batch's.
        positive_cosine: scalar without gradient, the mean cosine of the positive pairs of this process.
    """
    with torch.autocast(p1.device.type, enabled=False):
        at_least_float32 = torch.promote_types(p1.dtype, torch.float32)
        p1, z1, p2, z2 = (F.normalize(x.to(at_least_float32), dim=-1) for x in (p1, z1, p2, z2))
        z1, z2 = z1.detach(), z2.detach()
        keys1, keys2, shift = gather_keys(z1, z2)
        targets = shift + torch.arange(len(p1), device=p1.device)
        loss = F.cross_entropy(p1 @ keys2.T / temperature, targets) + F.cross_entropy(
            p2 @ keys1.T / temperature, targets
        )
        with torch.no_grad():
            positive_cosine = ((p1 * z2).sum(-1) + (p2 * z1).sum(-1)).mean() / 2
    return loss, positive_cosine


def gather_keys(z1: Tensor, z2: Tensor) -> tuple[Tensor, Tensor, int]:
    """z1, z2: (B, d) -> keys (B*world, d) of both views in order of rank, and the index of this process's first row.

    Every process must bring the same B. Gradients do not pass.
    """
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return z1, z2, 0
    own = torch.stack([z1, z2])
    everyone = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, own)
    keys1, keys2 = torch.stack(everyone, dim=1).flatten(1, 2)
    return keys1, keys2, dist.get_rank() * len(z1)
