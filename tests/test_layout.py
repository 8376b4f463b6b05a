# SPDX-License-Identifier: MIT
"""What is read in place: no copy of the heatmap, counted in bytes that torch allocates."""

from __future__ import annotations

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import kpfused
from tests import cases


def allocated(heatmap: torch.Tensor) -> int:
    """Bytes allocated by forward and backward, freed or not, beyond the gradient."""
    leaf = heatmap.detach().requires_grad_()
    upstream = torch.ones(*heatmap.shape[:-2], 2)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        (grad,) = torch.autograd.grad(kpfused.soft_argmax2d(leaf), leaf, upstream)
    events = prof.profiler.kineto_results.events()  # type: ignore[union-attr]
    total = sum(max(0, e.nbytes()) for e in events if e.name() == "[memory]")
    return total - grad.untyped_storage().nbytes()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced", "sliced_channels_last"])
@pytest.mark.parametrize("shape", [(4, 17, 64, 48), (2, 3, 256, 256)], ids=str)
def test_read_in_place(layout: str, shape: tuple[int, ...]) -> None:
    """Under 1% of the input beyond input and gradient."""
    heatmap = cases.LAYOUTS[layout](cases.random(shape).float())
    assert allocated(heatmap) < 0.01 * heatmap.numel() * heatmap.element_size()


def test_the_measurement_sees_a_copy() -> None:
    heatmap = cases.every_other(cases.random((2, 3, 64, 64)).float())
    assert allocated(heatmap) > heatmap.numel() * heatmap.element_size()
