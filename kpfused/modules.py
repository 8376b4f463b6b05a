# SPDX-License-Identifier: MIT
"""Layers: the functions of ``kpfused.functional`` and ``kpfused.dimensions`` with their settings."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from kpfused import checks
from kpfused.dimensions import soft_argmax1d, soft_argmax3d
from kpfused.functional import soft_argmax2d, spatial_moments2d
from kpfused.results import SpatialMoments


class _Layer(nn.Module):
    """What layers share: beta or temperature, fixed or learned, and the units."""

    def __init__(
        self,
        beta: Tensor | float = 1.0,
        *,
        temperature: Tensor | float | None = None,
        learnable: bool = False,
        num_keypoints: int | None = None,
        coordinates: str = "pixel",
        empty_value: float | None = None,
    ) -> None:
        super().__init__()
        checks.check_beta_or_temperature(beta, temperature)
        checks.coordinates_index(coordinates)
        self.coordinates = coordinates
        checks.check_empty_value(empty_value)
        self.empty_value = empty_value
        self.learnable = learnable
        self.beta: Tensor | float
        self.temperature: Tensor | float | None
        if learnable:
            self._start = _start_of(beta, temperature)
            if num_keypoints is not None:
                checks.check_positive("num_keypoints", num_keypoints)
            self.log_beta = nn.Parameter(torch.empty(() if num_keypoints is None else (num_keypoints,)))
            self.reset_parameters()
            return
        if num_keypoints is not None:
            raise ValueError("num_keypoints is for learnable=True; give a tensor beta for one per keypoint")
        self._keep("beta", beta)
        self._keep("temperature", temperature)

    def reset_parameters(self) -> None:
        """A learnt beta starts anew from the number that the layer was made with."""
        if self.learnable:
            nn.init.constant_(self.log_beta, math.log(self._start))

    def _keep(self, name: str, value: Tensor | float | None) -> None:
        if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
            self.register_buffer(name, value)
        else:
            setattr(self, name, value)

    def _settings(self) -> dict[str, Any]:
        """The keywords of the layer's function."""
        settings: dict[str, Any] = {"coordinates": self.coordinates, "empty_value": self.empty_value}
        if self.learnable:
            # In float32 at least: a layer in half precision would be half a percent off, and overflow at 65504.
            wide = torch.promote_types(self.log_beta.dtype, torch.float32)
            return {"beta": self.log_beta.to(wide).exp(), **settings}
        return {"beta": self.beta, "temperature": self.temperature, **settings}

    def extra_repr(self) -> str:
        shown = [f"coordinates={self.coordinates!r}"]
        if self.empty_value is not None:
            shown.append(f"empty_value={self.empty_value}")
        if self.learnable:
            count = self.log_beta.numel() if self.log_beta.dim() else None
            return ", ".join([f"learnable=True, num_keypoints={count}", *shown])
        name = "beta" if self.temperature is None else "temperature"
        value = getattr(self, name)
        text = f"Tensor{tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
        return ", ".join([f"{name}={text}", *shown])


class SoftArgmax2d(_Layer):
    """Soft-argmax as a layer: ``(..., H, W)`` logits to ``(..., 2)`` coordinates, (x, y). See :func:`soft_argmax2d`.

    Args:
        beta: inverse temperature, a number or a tensor that broadcasts against the leading dimensions. A tensor is
            kept as a buffer, an ``nn.Parameter`` as the parameter it is.
        temperature: divides the logits, in place of ``beta``.
        learnable: learn beta, starting from the number given. The parameter is ``log_beta``, so that beta stays
            positive whatever the optimiser does.
        num_keypoints: with ``learnable``, one beta for each of the K maps of ``(..., K, H, W)``; otherwise one for all.
        coordinates: units of the result, as in :func:`soft_argmax2d`.
        empty_value: what a map without weight gives, as in :func:`soft_argmax2d`.
        debias: take away the pull of the background, as in :func:`soft_argmax2d`.

    The state holds no grid and nothing of map size, so a checkpoint works at any resolution.
    """

    def __init__(self, beta: Tensor | float = 1.0, *, debias: bool = False, **settings: Any) -> None:
        super().__init__(beta, **settings)
        self.debias = debias

    def forward(
        self,
        heatmap: Tensor,
        mask: Tensor | None = None,
        valid_size: tuple[Tensor | int, Tensor | int] | None = None,
    ) -> Tensor:
        """Coordinates ``(..., 2)``, (x, y), of ``heatmap`` ``(..., H, W)``."""
        return soft_argmax2d(heatmap, mask=mask, valid_size=valid_size, debias=self.debias, **self._settings())


class SoftArgmax1d(_Layer):
    """Soft-argmax of rows, as of SimCC's bins: ``(..., W)`` to ``(..., 1)``. See :func:`soft_argmax1d`.

    Arguments and state are those of :class:`SoftArgmax2d`, but for ``debias``.
    """

    def forward(self, heatmap: Tensor, mask: Tensor | None = None) -> Tensor:
        """Coordinates ``(..., 1)`` of ``heatmap`` ``(..., W)``."""
        return soft_argmax1d(heatmap, mask=mask, **self._settings())


class SoftArgmax3d(_Layer):
    """Soft-argmax of volumes: ``(..., D, H, W)`` to ``(..., 3)`` coordinates, (x, y, z). See :func:`soft_argmax3d`.

    Args:
        beta: as in :class:`SoftArgmax2d`, and so are all other arguments and the state, but for ``debias``.
        depth: D, for volumes ``(..., K * D, H, W)`` as networks of integral human pose regression emit them.
    """

    def __init__(self, beta: Tensor | float = 1.0, *, depth: int | None = None, **settings: Any) -> None:
        super().__init__(beta, **settings)
        if depth is not None:
            checks.check_positive("depth", depth)
        self.depth = depth

    def extra_repr(self) -> str:
        return super().extra_repr() if self.depth is None else f"{super().extra_repr()}, depth={self.depth}"

    def forward(self, heatmap: Tensor, mask: Tensor | None = None) -> Tensor:
        """Coordinates ``(..., 3)``, (x, y, z), of ``heatmap`` ``(..., D, H, W)``."""
        return soft_argmax3d(heatmap, depth=self.depth, mask=mask, **self._settings())


class SpatialMoments2d(_Layer):
    """Moments as a layer: ``(..., H, W)`` logits to :class:`kpfused.SpatialMoments`. See :func:`spatial_moments2d`.

    Arguments and state are those of :class:`SoftArgmax2d`.
    """

    def forward(
        self,
        heatmap: Tensor,
        mask: Tensor | None = None,
        valid_size: tuple[Tensor | int, Tensor | int] | None = None,
    ) -> SpatialMoments:
        """Moments of every map of ``heatmap`` ``(..., H, W)``."""
        return spatial_moments2d(heatmap, mask=mask, valid_size=valid_size, **self._settings())


def _start_of(beta: Tensor | float, temperature: Tensor | float | None) -> float:
    """What a learnt beta starts from."""
    if isinstance(beta, Tensor) or isinstance(temperature, Tensor):
        raise TypeError("learnable=True starts from a number; pass an nn.Parameter as beta to train your own tensor")
    start = beta if temperature is None else 1.0 / temperature
    if start <= 0:
        raise ValueError(f"learnable=True keeps beta positive; got a start of {start}")
    return start
