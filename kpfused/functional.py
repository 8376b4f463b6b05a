# SPDX-License-Identifier: MIT
"""Functions on heatmaps: checks, then the op."""

from __future__ import annotations

from torch import Tensor

from kpfused import checks, ops


def soft_argmax2d(
    heatmap: Tensor,
    beta: Tensor | float = 1.0,
    *,
    temperature: Tensor | float | None = None,
    coordinates: str = "pixel",
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

    Returns:
        ``(..., 2)``, (x, y) in this order; float64 for float64 heatmaps and float32 for all others. A map that holds
        NaN, +inf or nothing but -inf gives NaN, and no other map is touched by it.

    Gradients reach ``heatmap``, and ``beta`` or ``temperature`` where it is a tensor. Backward reads the heatmap once
    and writes the gradient once, in the heatmap's memory format; nothing else of its size is kept or allocated.

    Raises:
        TypeError: heatmap, beta or temperature is of a type or dtype that is not listed above.
        ValueError: fewer than two dimensions, no pixels, both beta and temperature, a temperature of zero, a tensor
            that does not broadcast or lies on another device, or unknown coordinates.
    """
    checks.check_heatmap(heatmap)
    checks.check_beta_or_temperature(beta, temperature)
    index = checks.coordinates_index(coordinates)
    if temperature is None and not isinstance(beta, Tensor):
        return ops.soft_argmax2d(heatmap, None, float(beta), index)
    if temperature is not None and not isinstance(temperature, Tensor):
        return ops.soft_argmax2d(heatmap, None, 1.0 / temperature, index)
    return ops.soft_argmax2d(heatmap, _beta_tensor(heatmap, beta, temperature), 0.0, index)


def _beta_tensor(heatmap: Tensor, beta: Tensor | float, temperature: Tensor | float | None) -> Tensor:
    """beta as the kernels read it: the accumulator dtype, contiguous, broadcast along one run of dimensions."""
    name, tensor = ("beta", beta) if temperature is None else ("temperature", temperature)
    assert isinstance(tensor, Tensor)
    checks.check_broadcast(name, tensor, heatmap)
    tensor = tensor.to(ops.accumulator_dtype(heatmap.dtype))
    if temperature is not None:
        tensor = tensor.reciprocal()
    return ops.foldable(tensor, heatmap.shape[:-2]).contiguous()
