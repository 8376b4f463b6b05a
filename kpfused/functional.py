# SPDX-License-Identifier: MIT
"""Functions on heatmaps: checks, then the op."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kpfused import checks, expectation, ops, reference
from kpfused.arguments import checked, counting
from kpfused.kernels import EXPECTATION2D, SOFT_ARGMAX2D, SOFTMAX2D, WINDOW_MASS2D
from kpfused.results import SpatialMoments


def soft_argmax2d(
    heatmap: Tensor,
    beta: Tensor | float = 1.0,
    *,
    temperature: Tensor | float | None = None,
    coordinates: str = "pixel",
    mask: Tensor | None = None,
    valid_size: tuple[Tensor | int, Tensor | int] | None = None,
    empty_value: float | None = None,
    debias: bool = False,
) -> Tensor:
    r"""Expected (x, y) coordinates under the spatial softmax of a heatmap, in one pass over it.

    .. math:: P = \operatorname{softmax}(\beta h), \qquad (x, y) = \sum_{ij} P_{ij} \, (x_j, y_i)

    Also known as soft-argmax, integral regression (Sun et al., 2018) and DSNT (Nibali et al., 2018). The softmax is
    shifted by the maximum, so no finite logit overflows, and the probability map is never stored.

    Args:
        heatmap: logits ``(..., H, W)`` in float32, float64, float16 or bfloat16, any number of leading dimensions.
            Contiguous and channels_last tensors, and windows and ranges of samples or keypoints of them, are read in
            place; other strides are copied. A logit of -inf is probability zero, with a beta that is not negative.
        beta: inverse temperature, multiplies the logits. A number, or a floating-point tensor that broadcasts against
            the leading dimensions: ``(K,)`` for one per keypoint of ``(B, K, H, W)``. Under ``torch.compile`` every
            new number is compiled anew, so make one that changes from step to step a tensor.
        temperature: divides the logits, in place of ``beta``. A number other than zero, or a tensor likewise.
        coordinates: units of the result along an axis of ``n`` pixels, for pixel ``i``:
            ``"pixel"`` i; ``"corners"`` 2i/(n-1) - 1, and 0 where n is 1; ``"centers"`` (2i+1)/n - 1;
            ``"unit"`` i/n; ``"unit_centered"`` i/n - 1/2.
        mask: bool, True where a pixel counts, broadcastable to ``heatmap``: ``(B, 1, H, W)`` for one per image,
            ``(B, K, 1, 1)`` for a flag per keypoint. Not expanded in memory; on CPU one that lies in another order than
            the maps is copied, beside contiguous maps a bit for each pixel. Other pixels may hold anything, NaN too;
            their gradient is exactly zero.
        valid_size: (height, width) of the part of the map that counts, from its first pixel on, for batches padded to
            one size. Each is a number or an integer tensor that broadcasts against the leading dimensions, ``(B, 1)``
            for one per image of ``(B, K, H, W)``; tensors are clamped to the map. The rest may hold anything and costs
            next to nothing. Units stay those of the whole map.
        empty_value: what a map gives in which no pixel counts, or none that does has a logit above -inf; its gradient
            is then zero. By default it gives NaN, with a gradient of zero under a mask or a valid size, and of NaN
            without, as ``torch.softmax`` has it.
        debias: take away the pull of the background towards the centre of the map, after Gu et al., "Removing the Bias
            of Integral Pose Regression" (ICCV 2021): pixels whose logit is zero still weigh one each. With
            :math:`\rho = H W / \sum e^{\beta h}`, the share of such a background in the whole, and the map's centre
            :math:`c` the result is :math:`(\mu - \rho c) / (1 - \rho)`. For heatmaps that are zero away from their
            peak, as behind a ReLU; :math:`\rho` is held at 0.9 at most, beyond which there is no peak to speak of. Not
            together with a mask or a valid size.

    Returns:
        ``(..., 2)``, (x, y) in this order; float64 for float64 heatmaps and float32 for all others. A map that holds
        NaN, +inf or nothing but -inf gives NaN, and no other map is touched by it.

    Gradients reach ``heatmap``, and ``beta`` or ``temperature`` where it is a tensor. Backward reads the heatmap once
    and writes the gradient once, in the heatmap's memory format; nothing else of its size is kept or allocated.

    Raises:
        TypeError: an argument is of a type or dtype that is not listed above.
        ValueError: fewer than two dimensions, no pixels, both beta and temperature, a number beyond 1e30 as beta or
            within 1e-30 of zero as temperature, a tensor that does not broadcast or lies on another device, a valid
            size beyond the map, debias with a mask or a valid size, or unknown coordinates.
    """
    index = checks.coordinates_index(coordinates)
    sharpness, settings = checked(heatmap, beta, temperature, index, mask, valid_size, empty_value)
    if not debias:
        return ops.call(SOFT_ARGMAX2D, heatmap, sharpness, settings)[0]
    if mask is not None or valid_size is not None:
        raise ValueError("debias=True takes all pixels of the map for background; give no mask and no valid_size")
    if empty_value is not None:  # empty maps are finite while their background is taken away
        settings = (*settings[:4], 0.0)
    moments = ops.spatial_moments2d(heatmap, sharpness, settings)
    result = _debiased(moments.mean, moments.logsumexp, heatmap.shape[-2:], coordinates)
    if empty_value is not None:
        result = result.masked_fill((moments.peak_probability == 0)[..., None], empty_value)
    return result


def _debiased(mean: Tensor, logsumexp: Tensor, size: torch.Size, coordinates: str) -> Tensor:
    height, width = size
    pixels = logsumexp.new_full((), height * width)  # a tensor: the logarithm of a symbolic size would fix it
    share = (pixels.log() - logsumexp).clamp(max=math.log(_MOST_BACKGROUND)).exp()
    centre = (reference.coordinate_units(n, coordinates)[1] for n in (width, height))
    return torch.stack([(mean[..., i] - share * c) / (1 - share) for i, c in enumerate(centre)], -1)


_MOST_BACKGROUND = 0.9


def spatial_moments2d(
    heatmap: Tensor,
    beta: Tensor | float = 1.0,
    *,
    temperature: Tensor | float | None = None,
    coordinates: str = "pixel",
    mask: Tensor | None = None,
    valid_size: tuple[Tensor | int, Tensor | int] | None = None,
    empty_value: float | None = None,
) -> SpatialMoments:
    r"""Mean, covariance, entropy, log-sum-exp and peak of the spatial softmax of a heatmap, from one read of it.

    With :math:`z = \beta h`, :math:`P = \operatorname{softmax}(z)` and pixels :math:`r = (x, y)`:

    ================  =================================================  ========================================
    field             definition                                         gradient with respect to :math:`z_i`
    ================  =================================================  ========================================
    mean              :math:`\mu = \sum P r`                             :math:`P_i (r_i - \mu)`
    covariance        :math:`C = \sum P (r - \mu)(r - \mu)^T`            :math:`P_i ((r_i - \mu)(r_i - \mu)^T - C)`
    entropy           :math:`S = -\sum P \log P`                         :math:`-P_i (\log P_i + S)`
    logsumexp         :math:`\log \sum e^z`                              :math:`P_i`
    peak              the pixel of the maximum, integers                 none
    peak_probability  :math:`P_p` at that pixel                          :math:`P_p ([i = p] - P_i)`
    ================  =================================================  ========================================

    Covariance and entropy tell how sure the point is; they cost a fraction of a second pass. Sums are taken about the
    peak's pixel, so the covariance of a sharp peak keeps its digits anywhere in the map, and a variance is never
    negative.

    Args:
        heatmap: as in :func:`soft_argmax2d`.
        beta: as in :func:`soft_argmax2d`.
        temperature: as in :func:`soft_argmax2d`.
        coordinates: units of mean and covariance, as in :func:`soft_argmax2d`. The peak is always in pixels.
        mask: as in :func:`soft_argmax2d`.
        valid_size: as in :func:`soft_argmax2d`.
        empty_value: as in :func:`soft_argmax2d`, of all fields but the peak, which is then the first pixel.

    Returns:
        :class:`SpatialMoments`. Where a map holds NaN or +inf or nothing but -inf, its real fields are NaN (the
        log-sum-exp of nothing is -inf) and its peak is some pixel of the map. On CUDA, the peak is found as if logits
        and beta below 1.2e-38 in size were zero, but in float64; along an axis of more than 2^24 pixels, it is as near
        as a float32 comes.

    Gradients reach ``heatmap``, and ``beta`` or ``temperature`` where it is a tensor, from any mixture of the fields in
    one read of the heatmap and one write.

    Raises:
        TypeError: as in :func:`soft_argmax2d`.
        ValueError: as in :func:`soft_argmax2d`.
    """
    index = checks.coordinates_index(coordinates)
    sharpness, settings = checked(heatmap, beta, temperature, index, mask, valid_size, empty_value)
    return ops.spatial_moments2d(heatmap, sharpness, settings)


def spatial_softmax2d(
    heatmap: Tensor,
    beta: Tensor | float = 1.0,
    *,
    temperature: Tensor | float | None = None,
    mask: Tensor | None = None,
    valid_size: tuple[Tensor | int, Tensor | int] | None = None,
    empty_value: float | None = None,
) -> Tensor:
    r"""The spatial softmax itself, for those who want the map: ``softmax(beta * heatmap)`` over H and W together.

    What the map is wanted for is often an expectation, for which :func:`spatial_expectation2d`, :func:`soft_argmax2d`
    and :func:`spatial_moments2d` need no map.

    Args:
        heatmap: as in :func:`soft_argmax2d`.
        beta: as in :func:`soft_argmax2d`.
        temperature: as in :func:`soft_argmax2d`.
        mask: as in :func:`soft_argmax2d`. The probability of pixels that do not count is exactly zero.
        valid_size: as in :func:`soft_argmax2d`.
        empty_value: as in :func:`soft_argmax2d`: what all pixels of an empty map are then.

    Returns:
        Probabilities of the shape, dtype and memory format of ``heatmap``, computed in float32 (float64 for float64)
        and rounded once.

    Gradients reach ``heatmap``, and ``beta`` or ``temperature`` where it is a tensor. Backward keeps four numbers a map
    and the probabilities, as ``torch.softmax`` does: they are not to be changed in place before it. In half precision,
    and where ``beta`` or ``temperature`` requires a gradient, it keeps the heatmap instead.

    Raises:
        TypeError: as in :func:`soft_argmax2d`.
        ValueError: as in :func:`soft_argmax2d`.
    """
    sharpness, settings = checked(heatmap, beta, temperature, 0, mask, valid_size, empty_value)
    return ops.call(SOFTMAX2D, heatmap, sharpness, settings)[0]


def spatial_expectation2d(
    heatmap: Tensor,
    values: Tensor,
    beta: Tensor | float = 1.0,
    *,
    temperature: Tensor | float | None = None,
    mask: Tensor | None = None,
    valid_size: tuple[Tensor | int, Tensor | int] | None = None,
    empty_value: float | None = None,
) -> Tensor:
    r"""Expectation of values under the spatial softmax of a heatmap: depth, offsets, features, Jacobians at a keypoint.

    .. math:: P = \operatorname{softmax}(\beta h), \qquad E_c = \sum_{ij} P_{ij} \, V_{cij}

    The softmax map is not stored, forward or backward, but by function transforms (``torch.func``), which take the
    composition.

    Args:
        heatmap: as in :func:`soft_argmax2d`.
        values: ``(..., C, H, W)`` of the heatmap's dtype, in any memory format; leading dimensions broadcast against
            those of the heatmap and are not expanded: for heatmaps ``(B, K, H, W)``, ``(B, K, C, H, W)`` for values of
            each keypoint, ``(B, 1, C, H, W)`` for features that the keypoints of an image share, ``(C, H, W)`` for the
            same everywhere.
        beta: as in :func:`soft_argmax2d`.
        temperature: as in :func:`soft_argmax2d`.
        mask: as in :func:`soft_argmax2d`. Values at pixels that do not count may be anything.
        valid_size: as in :func:`soft_argmax2d`.
        empty_value: as in :func:`soft_argmax2d`.

    Returns:
        ``(..., C)``; float64 for float64 heatmaps and float32 for all others.

    Gradients reach ``heatmap``, ``values``, and ``beta`` or ``temperature`` where it is a tensor. That of shared values
    is summed where they are shared.

    Raises:
        TypeError: as in :func:`soft_argmax2d`, or values of another dtype than the heatmap.
        ValueError: as in :func:`soft_argmax2d`, or values of a shape that does not fit.
    """
    sharpness, settings = checked(heatmap, beta, temperature, 0, mask, valid_size, empty_value)
    checks.check_values(values, heatmap)
    return expectation.spatial_expectation2d(heatmap, values, sharpness, settings)


def expectation2d(
    probabilities: Tensor,
    *,
    coordinates: str = "pixel",
    mask: Tensor | None = None,
    valid_size: tuple[Tensor | int, Tensor | int] | None = None,
) -> Tensor:
    r"""Expected (x, y) under maps that are probabilities already, in one pass over them: DSNT after any normalisation.

    .. math:: (x, y) = \sum_{ij} p_{ij} \, (x_j, y_i)

    The sum is taken as it is: of a map that does not sum to one, so does its result.

    Args:
        probabilities: ``(..., H, W)``, dtypes and memory formats as for the heatmap of :func:`soft_argmax2d`.
        coordinates: as in :func:`soft_argmax2d`.
        mask: as in :func:`soft_argmax2d`. Other pixels add nothing.
        valid_size: as in :func:`soft_argmax2d`.

    Returns:
        ``(..., 2)``, (x, y) in this order; float64 for float64 maps and float32 for all others.

    Gradients reach ``probabilities``: each pixel's is its coordinates times the upstream gradient, written in one pass
    without a read.

    Raises:
        TypeError: as in :func:`soft_argmax2d`.
        ValueError: as in :func:`soft_argmax2d`.
    """
    checks.check_heatmap(probabilities, name="probabilities")
    settings = (1.0, checks.coordinates_index(coordinates), *counting(probabilities, mask, valid_size, None))
    return ops.call(EXPECTATION2D, probabilities, None, settings)[0]


def window_mass(
    heatmap: Tensor,
    size: int,
    beta: Tensor | float = 1.0,
    *,
    temperature: Tensor | float | None = None,
    around: str = "mean",
    mask: Tensor | None = None,
    valid_size: tuple[Tensor | int, Tensor | int] | None = None,
    empty_value: float | None = None,
) -> Tensor:
    """Probability within a window of ``size`` by ``size`` pixels around the mean or the peak: how sure the point is.

    1 where all of the softmax lies in the window, ``size**2 / (H W)`` where the map is flat; lightning-pose calls it
    confidence. One read of the map, and of the window's pixels once more; nothing is gathered or padded.

    Args:
        heatmap: as in :func:`soft_argmax2d`.
        size: odd; pixels along each side. What of the window lies outside of the map adds nothing.
        beta: as in :func:`soft_argmax2d`.
        temperature: as in :func:`soft_argmax2d`.
        around: ``"mean"``, the pixel nearest to the expected coordinates, or ``"peak"``.
        mask: as in :func:`soft_argmax2d`; pixels that do not count add nothing.
        valid_size: as in :func:`soft_argmax2d`.
        empty_value: as in :func:`soft_argmax2d`.

    Returns:
        ``(...)``, one for every map, of the dtype of coordinates.

    Gradients reach ``heatmap``, and ``beta`` or ``temperature`` where it is a tensor, with the window where it is: it
    moves by whole pixels.

    Raises:
        TypeError: as in :func:`soft_argmax2d`, or the size is no int.
        ValueError: as in :func:`soft_argmax2d`, a size that is not odd and positive, or an unknown ``around``.
    """
    checks.check_window(size, around)
    window = -size if around == "peak" else size
    sharpness, settings = checked(heatmap, beta, temperature, window, mask, valid_size, empty_value)
    return ops.call(WINDOW_MASS2D, heatmap, sharpness, settings)[0]
