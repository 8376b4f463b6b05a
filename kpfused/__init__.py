# SPDX-License-Identifier: MIT
"""Fused soft-argmax for keypoint networks: heatmaps to coordinates in one pass, on CPU and CUDA."""

import importlib.util

if importlib.util.find_spec("kpfused._C") is None:
    raise ImportError(
        f"kpfused._C is not built in {__path__[0]}: run `make build` in that checkout, or leave it to use the kpfused "
        "that is installed"
    )

from kpfused.dimensions import soft_argmax1d, soft_argmax3d, spatial_moments1d, spatial_moments3d
from kpfused.functional import (
    expectation2d,
    soft_argmax2d,
    spatial_expectation2d,
    spatial_moments2d,
    spatial_softmax2d,
    window_mass,
)
from kpfused.modules import SoftArgmax1d, SoftArgmax2d, SoftArgmax3d, SpatialMoments2d
from kpfused.results import SpatialMoments
from kpfused.version import __version__

__all__ = [
    "SoftArgmax1d",
    "SoftArgmax2d",
    "SoftArgmax3d",
    "SpatialMoments",
    "SpatialMoments2d",
    "__version__",
    "expectation2d",
    "soft_argmax1d",
    "soft_argmax2d",
    "soft_argmax3d",
    "spatial_expectation2d",
    "spatial_moments1d",
    "spatial_moments2d",
    "spatial_moments3d",
    "spatial_softmax2d",
    "window_mass",
]
