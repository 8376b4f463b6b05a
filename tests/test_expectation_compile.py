# SPDX-License-Identifier: MIT
"""Expectations and the softmax map under torch.compile and opcheck."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import kpfused
from tests import cases
from tests.expectations import VALUES, values_for


def program(heatmap: Tensor, values: Tensor, beta: Tensor) -> Tensor:
    mask = torch.arange(heatmap.shape[-1], device=heatmap.device) % 3 != 1
    p = kpfused.spatial_softmax2d(heatmap, beta, mask=mask)
    fields = [
        kpfused.spatial_expectation2d(heatmap, values, beta),
        kpfused.spatial_expectation2d(heatmap, values, beta, mask=mask, empty_value=0.0),
        kpfused.expectation2d(p, coordinates="unit"),
        kpfused.expectation2d(kpfused.spatial_softmax2d(heatmap)),
    ]
    return torch.cat(fields, -1)


@pytest.mark.parametrize(("layout", "backend"), [("contiguous", "aot_eager"), ("channels_last", "inductor")])
def test_compiled_once_for_any_size(device: str, layout: str, backend: str) -> None:
    torch.compiler.reset()
    compiled = torch.compile(program, fullgraph=True, dynamic=True, backend=backend)
    for step, (batch, size) in enumerate([(2, (16, 12)), (3, (16, 12)), (4, (9, 31))]):
        heatmap = cases.LAYOUTS[layout](cases.random((batch, 5, *size)).float().to(device)).requires_grad_()
        values = cases.random((batch, 1, 3, *size)).float().to(device).requires_grad_()
        beta = torch.linspace(0.5, 2, 5, device=device).requires_grad_()
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            got, want = compiled(heatmap, values, beta), program(heatmap, values, beta)
            assert torch.equal(got, want)
            pairs = [torch.autograd.grad(r, (heatmap, values, beta), torch.ones_like(r)) for r in (got, want)]
        for a, b in zip(*pairs, strict=True):
            torch.testing.assert_close(a, b)
    torch.compiler.reset()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_opcheck(device: str, layout: str) -> None:
    ops = torch.ops.kpfused
    heatmap = cases.LAYOUTS[layout](cases.random((2, 3, 4, 5)).float().to(device)).requires_grad_()
    beta = torch.rand(3, device=device).requires_grad_()
    mask = (torch.rand(2, 1, 4, 5, device=device) < 0.6).expand(2, 3, 4, 5)
    kinds = list(VALUES)  # of which each memory format takes every other, whole or masked
    for pixels in ((), (mask, None, 0.0)):
        for kind in kinds[(len(pixels) > 0) ^ (layout == "contiguous") :: 2]:
            values = values_for((2, 3, 4, 5), kind).float().to(device).requires_grad_()
            forward = (heatmap, values, beta, 0.0, *pixels)
            torch.library.opcheck(ops.spatial_expectation2d.default, forward)
            mean, stats = (t.detach() for t in ops.spatial_expectation2d(*forward))
            for needs in ((True, True, True), (False, True, False) if pixels else (True, False, False)):
                grad = torch.randn_like(mean).requires_grad_()
                backward = (grad, heatmap, values, mean, stats, beta, 0.0, *needs, *pixels)
                torch.library.opcheck(ops.spatial_expectation2d_backward.default, backward)
        for op, index, number in (
            (ops.spatial_softmax2d, 0, beta),
            (ops.expectation2d, 2, None),
            (ops.expectation2d, 2, beta),  # which means nothing there and has a gradient of zero
        ):
            forward = (heatmap, number, 1.0, index, *pixels)
            torch.library.opcheck(op.default, forward)
            result, stats = (t.detach() for t in op(*forward))
            grad = torch.randn_like(result).requires_grad_()
            backward = (grad, heatmap, stats, number, 1.0, index, number is not None)
            torch.library.opcheck(getattr(ops, f"{op.__name__}_backward").default, (*backward, *pixels))
        result, stats = (t.detach() for t in ops.spatial_softmax2d(heatmap, beta, 0.0, 0, *pixels))
        of_result = (torch.randn_like(result).requires_grad_(), result.requires_grad_(), stats, beta, 0.0, 1, False)
        torch.library.opcheck(ops.spatial_softmax2d_backward.default, (*of_result, *pixels))
