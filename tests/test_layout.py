# SPDX-License-Identifier: MIT
"""What is read in place: no copy of the heatmap, counted in bytes that torch allocates. Offsets beyond 32 bits."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import kpfused
from kpfused import kernels, reference
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


def coordinates_and_gradient(heatmap: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    leaf = heatmap.detach().requires_grad_()
    points = kpfused.soft_argmax2d(leaf)
    (gradient,) = torch.autograd.grad(points, leaf, torch.ones_like(points))
    return points.detach(), gradient


def last_maps_alone(heatmap: torch.Tensor) -> None:
    """The last image comes to the same bits alone."""
    points, gradient = coordinates_and_gradient(heatmap)
    alone = coordinates_and_gradient(heatmap[-1:].clone())
    assert torch.equal(points[-1:], alone[0])
    assert torch.equal(gradient[-1:], alone[1])
    cases.assert_coordinates(points[-1:], reference.soft_argmax2d(heatmap[-1:].double()), max(heatmap.shape[-2:]))


def first_and_last_pixel(heatmap: torch.Tensor) -> None:
    """Of one map, they share the softmax: the mean is the centre, and each pulls it its way."""
    heatmap[..., 0, 0] = heatmap[..., -1, -1] = 1e4
    points, gradient = coordinates_and_gradient(heatmap)
    last = torch.tensor([heatmap.shape[-1] - 1, heatmap.shape[-2] - 1], dtype=torch.float32)
    torch.testing.assert_close(points[0, 0].cpu(), last / 2, rtol=0, atol=0.01)
    pull = last.sum().item() / 4
    assert gradient[0, 0, -1, -1].item() == pytest.approx(pull, rel=0.01)
    assert gradient[0, 0, 0, 0].item() == pytest.approx(-pull, rel=0.01)


@pytest.mark.parametrize(
    ("shape", "layout", "check"),
    [
        ((33000, 1, 256, 256), torch.contiguous_format, last_maps_alone),
        ((260, 128, 256, 256), torch.channels_last, last_maps_alone),
        ((1, 1, 33000, 65536), torch.contiguous_format, first_and_last_pixel),
    ],
    ids=["maps", "channels_last", "one map"],
)
def test_beyond_32_bits_on_cuda(
    shape: tuple[int, ...], layout: torch.memory_format, check: Callable[[torch.Tensor], None]
) -> None:
    """More than 2^31 elements in bfloat16: real memory, where the emulated kernels' tests have but offsets."""
    if not (torch.cuda.is_available() and kernels.has_kernel("cuda")):
        pytest.skip("needs a CUDA device")
    if torch.cuda.mem_get_info()[0] < 40 << 30:
        pytest.skip("needs 40 GB of free memory on the device")
    assert torch.Size(shape).numel() > 1 << 31
    check(torch.empty(shape, dtype=torch.bfloat16, device="cuda", memory_format=layout).normal_())
    torch.cuda.empty_cache()


def test_out_of_memory_is_told_in_the_words_that_training_loops_look_for(device: str) -> None:
    """Results of more bytes than there are addresses, of maps that share one pixel."""
    heatmap = torch.zeros(1, 1, device=device).expand(1 << 23, 1 << 22, 1, 1)
    words = "DefaultCPUAllocator: can't allocate memory" if device == "cpu" else r"CUDA out of memory\."
    with pytest.raises(RuntimeError, match=words):
        kpfused.soft_argmax2d(heatmap)
