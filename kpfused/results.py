# SPDX-License-Identifier: MIT
"""What functions return that is more than one tensor."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor
from torch.utils import _pytree


class SpatialMoments(NamedTuple):
    """What :func:`kpfused.spatial_moments2d` finds in every map. All but ``peak`` are differentiable."""

    mean: Tensor
    """``(..., 2)``, (x, y): expected coordinates, in the units asked for."""
    covariance: Tensor
    """``(..., 2, 2)``: covariance of (x, y) in the same units."""
    entropy: Tensor
    """``(...)``: entropy of the softmax in nats, from 0 (certain) to log(H W) (flat)."""
    logsumexp: Tensor
    """``(...)``: log of the sum of exp(beta * heatmap), the evidence before normalisation."""
    peak: Tensor
    """``(..., 2)``, int64, (x, y): pixel of the maximum, the first in row order where several are equal."""
    peak_probability: Tensor
    """``(...)``: probability of that pixel."""


# By a name, so that exported programs that return it can be saved.
_pytree._register_namedtuple(SpatialMoments, serialized_type_name="kpfused.SpatialMoments")
