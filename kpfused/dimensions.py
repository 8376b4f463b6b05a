# SPDX-License-Identifier: MIT
"""Functions on rows, which are maps of height one, and on volumes, which are stacks of maps."""

from __future__ import annotations

from torch import Tensor

from kpfused import checks, kernels, ops
from kpfused.arguments import checked
from kpfused.functional import soft_argmax2d, spatial_moments2d
from kpfused.results import SpatialMoments


def soft_argmax1d(
    heatmap: Tensor,
    beta: Tensor | float = 1.0,
    *,
    temperature: Tensor | float | None = None,
    coordinates: str = "pixel",
    mask: Tensor | None = None,
    empty_value: float | None = None,
) -> Tensor:
    """Expected coordinate under the softmax of a row, as of SimCC's bins. ``(..., W)`` to ``(..., 1)``.

    A row is a map of height one: arguments, dtypes, gradients and errors are those of :func:`soft_argmax2d`.
    """
    checks.check_heatmap(heatmap, "W")
    return soft_argmax2d(
        heatmap.unsqueeze(-2),
        beta,
        temperature=temperature,
        coordinates=coordinates,
        mask=_mask_of_row(heatmap, mask),
        empty_value=empty_value,
    )[..., :1]


def spatial_moments1d(
    heatmap: Tensor,
    beta: Tensor | float = 1.0,
    *,
    temperature: Tensor | float | None = None,
    coordinates: str = "pixel",
    mask: Tensor | None = None,
    empty_value: float | None = None,
) -> SpatialMoments:
    """Moments of a row ``(..., W)``: mean and peak ``(..., 1)``, covariance ``(..., 1, 1)``.

    Otherwise as :func:`spatial_moments2d` of a map of height one.
    """
    checks.check_heatmap(heatmap, "W")
    m = spatial_moments2d(
        heatmap.unsqueeze(-2),
        beta,
        temperature=temperature,
        coordinates=coordinates,
        mask=_mask_of_row(heatmap, mask),
        empty_value=empty_value,
    )
    return m._replace(mean=m.mean[..., :1], covariance=m.covariance[..., :1, :1], peak=m.peak[..., :1])


def _mask_of_row(heatmap: Tensor, mask: Tensor | None) -> Tensor | None:
    if mask is None:
        return None
    checks.check_mask(mask, heatmap)
    return mask.unsqueeze(-2)


def soft_argmax3d(
    heatmap: Tensor,
    beta: Tensor | float = 1.0,
    *,
    depth: int | None = None,
    temperature: Tensor | float | None = None,
    coordinates: str = "pixel",
    mask: Tensor | None = None,
    empty_value: float | None = None,
) -> Tensor:
    """Expected (x, y, z) under the softmax of a volume. ``(..., D, H, W)`` to ``(..., 3)``.

    The kernels read the volume once, slice by slice and in place; backward reads it once and writes its gradient once.

    Args:
        heatmap: logits ``(..., D, H, W)``, or ``(..., K * D, H, W)`` with ``depth``.
        beta: as in :func:`soft_argmax2d`, against the leading dimensions of ``(..., D, H, W)``.
        depth: D, where keypoints and depth share a dimension in which depth runs faster, as networks of integral human
            pose regression emit it: ``(B, K * D, H, W)`` gives ``(B, K, 3)``.
        temperature: as in :func:`soft_argmax2d`.
        coordinates: units along each of the three axes, as in :func:`soft_argmax2d`.
        mask: bool, True where a voxel counts, broadcastable to ``(..., D, H, W)`` and not expanded in memory.
        empty_value: what a volume gives in which nothing weighs, in place of NaN.

    Returns:
        ``(..., 3)``, (x, y, z) in this order; dtypes as of :func:`soft_argmax2d`. A volume that holds NaN or +inf
        gives NaN. So does one in which nothing weighs, and its gradient is zero.

    Gradients and errors are those of :func:`soft_argmax2d`; a depth that does not divide the channels is a ValueError.
    """
    return spatial_moments3d(
        heatmap,
        beta,
        depth=depth,
        temperature=temperature,
        coordinates=coordinates,
        mask=mask,
        empty_value=empty_value,
    ).mean


def spatial_moments3d(
    heatmap: Tensor,
    beta: Tensor | float = 1.0,
    *,
    depth: int | None = None,
    temperature: Tensor | float | None = None,
    coordinates: str = "pixel",
    mask: Tensor | None = None,
    empty_value: float | None = None,
) -> SpatialMoments:
    """Moments of a volume: mean and peak ``(..., 3)``, (x, y, z), covariance ``(..., 3, 3)``.

    Arguments as of :func:`soft_argmax3d`, fields as of :func:`spatial_moments2d`.
    """
    if depth is not None:
        checks.check_depth(heatmap, depth)
        heatmap = heatmap.reshape(*heatmap.shape[:-3], -1, depth, *heatmap.shape[-2:])
    index = checks.coordinates_index(coordinates)
    sharpness, settings = checked(heatmap, beta, temperature, index, mask, None, empty_value, "DHW")
    if sharpness is not None:
        sharpness = kernels.foldable(sharpness.unsqueeze(-1), heatmap.shape[:-2]).contiguous()
    return ops.spatial_moments3d(heatmap, sharpness, settings)
