# SPDX-License-Identifier: MIT
"""Layers: the functions of ``kpfused.functional`` with their settings."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from kpfused import checks
from kpfused.functional import soft_argmax2d


class SoftArgmax2d(nn.Module):
    """Soft-argmax as a layer: ``(..., H, W)`` logits to ``(..., 2)`` coordinates, (x, y). See :func:`soft_argmax2d`.

    Args:
        beta: inverse temperature, a number or a tensor that broadcasts against the leading dimensions. A tensor is
            kept as a buffer, an ``nn.Parameter`` as the parameter it is.
        temperature: divides the logits, in place of ``beta``.
        learnable: learn beta, starting from the number given. The parameter is ``log_beta``, so that beta stays
            positive whatever the optimiser does.
        num_keypoints: with ``learnable``, one beta for each of the K maps of ``(..., K, H, W)``; otherwise one for all.
        coordinates: units of the result, as in :func:`soft_argmax2d`.

    The state holds no grid and nothing of map size, so a checkpoint works at any resolution.
    """

    def __init__(
        self,
        beta: Tensor | float = 1.0,
        *,
        temperature: Tensor | float | None = None,
        learnable: bool = False,
        num_keypoints: int | None = None,
        coordinates: str = "pixel",
    ) -> None:
        super().__init__()
        checks.check_beta_or_temperature(beta, temperature)
        checks.coordinates_index(coordinates)
        self.coordinates = coordinates
        self.learnable = learnable
        self.beta: Tensor | float
        self.temperature: Tensor | float | None
        if learnable:
            self.log_beta = nn.Parameter(_initial_log_beta(beta, temperature, num_keypoints))
            return
        if num_keypoints is not None:
            raise ValueError("num_keypoints is for learnable=True; give a tensor beta for one per keypoint")
        self._keep("beta", beta)
        self._keep("temperature", temperature)

    def _keep(self, name: str, value: Tensor | float | None) -> None:
        if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
            self.register_buffer(name, value)
        else:
            setattr(self, name, value)

    def forward(self, heatmap: Tensor) -> Tensor:
        """Coordinates ``(..., 2)``, (x, y), of ``heatmap`` ``(..., H, W)``."""
        if self.learnable:
            return soft_argmax2d(heatmap, self.log_beta.exp(), coordinates=self.coordinates)
        return soft_argmax2d(heatmap, self.beta, temperature=self.temperature, coordinates=self.coordinates)

    def extra_repr(self) -> str:
        if self.learnable:
            count = self.log_beta.numel() if self.log_beta.dim() else None
            return f"learnable=True, num_keypoints={count}, coordinates={self.coordinates!r}"
        name = "beta" if self.temperature is None else "temperature"
        value = getattr(self, name)
        shown = f"Tensor{tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
        return f"{name}={shown}, coordinates={self.coordinates!r}"


def _initial_log_beta(beta: Tensor | float, temperature: Tensor | float | None, num_keypoints: int | None) -> Tensor:
    if isinstance(beta, Tensor) or isinstance(temperature, Tensor):
        raise TypeError("learnable=True starts from a number; pass an nn.Parameter as beta to train your own tensor")
    start = beta if temperature is None else 1.0 / temperature
    if start <= 0:
        raise ValueError(f"learnable=True keeps beta positive; got a start of {start}")
    if num_keypoints is not None and num_keypoints < 1:
        raise ValueError(f"num_keypoints must be at least 1; got {num_keypoints}")
    return torch.full(() if num_keypoints is None else (num_keypoints,), math.log(start))
