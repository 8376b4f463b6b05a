# SPDX-License-Identifier: MIT
r"""Volumes, sharded or not, as stacks of slices: what the slices' maps leave is merged along the depth, in torch.

As csrc/volumes.h has it for whole volumes, which see. All tensors here hold a few numbers a slice; of slices that are
sharded over depth, they are gathered.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kpfused import ops, reference
from kpfused.distributed.share import together, with_whole_depth
from kpfused.kernels import MOMENTS2D, beta_of_volumes
from kpfused.results import SpatialMoments


def spatial_moments3d(
    heatmap: Tensor,
    beta: Tensor | None,
    beta_value: float,
    setting: int,
    mask: Tensor | None = None,
    valid_size: None = None,
    empty_value: float | None = None,
) -> SpatialMoments:
    """As the op of ``kernels.MOMENTS3D``, where one of the tensors is a ``DTensor``."""
    coordinates = max(setting, ~setting)
    # Slices in which nothing weighs are finite, whatever becomes of their volume.
    *fields, stats = ops.call(MOMENTS2D, heatmap, beta, (beta_value, coordinates, mask, None, 0.0))
    if setting < 0:
        depth = heatmap.dim() - 4
        *fields, stats = (f.transpose(depth, depth + 1) for f in (*fields, stats))
    slices, stats = with_whole_depth(SpatialMoments(*fields), stats)
    units = reference.COORDINATES[coordinates]
    z = reference.coordinate_axis(stats.shape[-2], units, dtype=stats.dtype, device=stats.device)
    stats, z = together(stats, z)
    number: Tensor | float = beta_value
    if beta is not None:
        stats, number = together(stats, beta_of_volumes(beta, setting).unsqueeze(-1))
    if mask is not None and empty_value is None:
        empty_value = math.nan
    return _merge_slices(slices, stats, number, z, empty_value)


def _merge_slices(
    slices: SpatialMoments, stats: Tensor, beta: Tensor | float, z: Tensor, empty_value: float | None
) -> SpatialMoments:
    """Moments of volumes from those of their slices ``(..., D)``.

    Args:
        slices: moments of every slice; empty slices have finite values.
        stats: of every slice, ``(..., D, 8)``: the key of the peak, the sum of weights relative to it, and more.
        beta: a number, or a tensor that broadcasts against ``(..., D)``.
        z: coordinates of the slices, ``(D,)``.
        empty_value: of volumes all of whose slices are empty; None for what comes of them, NaN but for the log-sum-exp.
    """
    relative, top = _relative_logsumexp(slices.logsumexp, stats.detach(), beta)
    log_weight = torch.log_softmax(relative, -1)
    weight = log_weight.exp()
    means = torch.cat((slices.mean, z[:, None].expand(*weight.shape, 1)), -1)  # (..., D, 3)
    mean = (weight[..., None] * means).sum(-2)
    offset = means - mean[..., None, :]
    within = torch.nn.functional.pad(slices.covariance, (0, 1, 0, 1))
    between = offset[..., :, None] * offset[..., None, :]
    covariance = (weight[..., None, None] * (within + between)).sum(-3)
    surprise = slices.entropy - log_weight.masked_fill(weight == 0, 0)
    index = stats[..., 0].argmax(-1, keepdim=True)
    # Not gathered: on a mesh of two dimensions, DTensor loses its way where a rank has a single volume.
    index, depths = together(index, torch.arange(stats.shape[-2], device=stats.device))
    elsewhere = index != depths
    peak = slices.peak.masked_fill(elsewhere[..., None], 0).sum(-2)
    real: tuple[Tensor, ...] = (
        mean,
        covariance,
        (weight * surprise).sum(-1),
        torch.logsumexp(relative, -1) + top,
        (weight * slices.peak_probability).masked_fill(elsewhere, 0).sum(-1),
    )
    if empty_value is not None:
        empty = (stats[..., 1] == 0).all(-1)
        real = tuple(reference.filled(field, empty, empty_value) for field in real)
    mean, covariance, entropy, logsumexp, chance = real
    return SpatialMoments(mean, covariance, entropy, logsumexp, torch.cat((peak, index), -1), chance)


def _relative_logsumexp(logsumexp: Tensor, stats: Tensor, beta: Tensor | float) -> tuple[Tensor, Tensor]:
    """The log-sum-exp of every slice less the greatest logit of its volume, and that logit.

    Its gradient is that of the log-sum-exp; its value comes from the stats, because at large logits the difference of
    two rounded log-sum-exps has lost what matters.
    """
    sharpness = beta.detach().abs() if isinstance(beta, Tensor) else abs(beta)
    key, total = stats[..., 0], stats[..., 1]
    exact = sharpness * (key - key.amax(-1, keepdim=True)) + total.log()
    carrier = logsumexp.masked_fill(total == 0, 0)
    top = key.amax(-1) * (sharpness[..., 0] if isinstance(sharpness, Tensor) else sharpness)
    return exact + (carrier - carrier.detach()), top
