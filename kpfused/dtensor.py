# SPDX-License-Identifier: MIT
"""Whether a tensor is a ``DTensor``, and the way to the sharding rules where one is."""

from __future__ import annotations

import sys
import types
from typing import Any

from torch import Tensor


def prepare_distributed(*tensors: Any) -> Any:
    """heatmap, beta and pixels that are to meet in one op, all of them as ``DTensor`` where one is."""
    return sharding_rules().prepare(*tensors) if is_distributed(*tensors[:4]) else tensors


def prepare_distributed_values(heatmap: Tensor, values: Tensor) -> Tensor:
    """Values beside a heatmap of :func:`prepare_distributed`."""
    prepared: Tensor = sharding_rules().prepare_values(heatmap, values) if is_distributed(heatmap, values) else values
    return prepared


def is_distributed(*tensors: Tensor | None) -> bool:
    """Whether one of them is a ``DTensor``; none is where its module is not loaded."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and module.DTensor in map(type, tensors)


def refuse_distributed(heatmap: Tensor) -> None:
    """Of second derivatives: function transforms of PyTorch's own operations give wrong numbers on a ``DTensor``."""
    if is_distributed(heatmap):
        raise NotImplementedError("second derivatives of a heatmap that is a DTensor")


def sharding_rules() -> types.ModuleType:
    """The sharding rules, which it registers: slow to import."""
    from kpfused import distributed

    return distributed


def together(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors that are to meet in one operation: plain ones beside a ``DTensor`` are the same on all ranks."""
    result: tuple[Tensor, ...] = sharding_rules().together(*tensors) if is_distributed(*tensors) else tensors
    return result
