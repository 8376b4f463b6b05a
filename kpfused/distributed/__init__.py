# SPDX-License-Identifier: MIT
"""Sharding rules: the ops on ``DTensor``.

Heatmaps sharded over leading dimensions are computed where they are, without communication. A map sharded over H or W
is never gathered: each rank reduces its own pixels to a state, these are all-gathered, four numbers a map and rank or
with moments ten, and every rank merges them in the same order, to the same bits. The merged stats, and the peak's
pixel, are all that backward needs. Volumes sharded over depth gather what their slices leave.

``kpfused.dtensor`` imports this package when it first meets a ``DTensor``: ``torch.distributed.tensor`` is slow to
import.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from kpfused.distributed import maps, moments
from kpfused.distributed.share import MOMENT_STATS, STATS, prepare, prepare_values, together
from kpfused.distributed.volumes import spatial_moments3d

__all__ = ["prepare", "prepare_values", "spatial_moments3d", "together"]


def _register(name: str, rule: Callable[..., Any]) -> None:
    def dispatch(_: type, op: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch.no_grad():  # autograd is above: DTensors come apart here without a trace
            # Redistributed, one with a gradient is detached in place, for which torch 2.11 has no rule.
            args = [a.detach() if isinstance(a, DTensor) and a.requires_grad else a for a in args]
            return rule(op, *args, **(kwargs or {}))

    torch.library.register_torch_dispatch(name, DTensor, dispatch)


for _prefix in ("kpfused::", "kpfused::_"):
    _register(f"{_prefix}soft_argmax2d", functools.partial(moments.forward, values=STATS))
    _register(f"{_prefix}soft_argmax2d_backward", moments.backward)
    _register(f"{_prefix}spatial_moments2d", functools.partial(moments.forward, values=MOMENT_STATS))
    _register(f"{_prefix}spatial_moments2d_backward", moments.moments_backward)
    for _name, _kept, _spread, _spread_backward in (
        ("spatial_softmax2d", 1, maps.spread_softmax, maps.spread_softmax_backward),
        ("expectation2d", 1, maps.spread_coordinates, maps.spread_coordinates_backward),
        ("window_mass2d", 3, maps.spread_window, maps.spread_window_backward),
    ):
        _register(f"{_prefix}{_name}", functools.partial(maps.map_forward, spread=_spread))
        _backward = functools.partial(maps.map_backward, kept=_kept, spread=_spread_backward)
        _register(f"{_prefix}{_name}_backward", _backward)
    _register(f"{_prefix}spatial_expectation2d", maps.expectation_forward)
    _register(f"{_prefix}spatial_expectation2d_backward", maps.expectation_backward)
