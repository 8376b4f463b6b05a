# SPDX-License-Identifier: MIT
"""Expected coordinates of maps that are probabilities already, against the reference."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import kpfused
from kpfused import reference
from tests import cases
from tests.cases import PIXELS, on
from tests.expectations import accumulator, check


@pytest.mark.parametrize("coordinates", reference.COORDINATES)
@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_probability_maps(device: str, dtype: torch.dtype, layout: str, coordinates: str) -> None:
    for shape in [(2, 3, 1, 9), (2, 17, 24, 41), (1, 2, 300, 310), (7, 9)]:
        p = cases.LAYOUTS[layout](reference.spatial_softmax2d(cases.random(shape)).to(dtype).to(device))
        result = check(kpfused.expectation2d, reference.expectation2d, (p,), coordinates=coordinates)
        assert result.dtype == accumulator(dtype)


def test_probability_maps_are_taken_as_they_are(device: str) -> None:
    """No normalisation, no softmax: DSNT after a sigmoid, of zeros, of NaN."""
    p = torch.rand(2, 3, 9, 11, device=device)
    p[0, 0] = 0
    p[1, 2, 3, 4] = torch.nan
    torch.testing.assert_close(
        kpfused.expectation2d(p).double(), reference.expectation2d(p.double()), rtol=1e-5, atol=0, equal_nan=True
    )


# One row, narrow maps, rows that are no whole vectors, pixels abreast on channels_last, rows in several blocks; maps
# and rows in several parts.
SHAPES = [
    (2, 3, 1, 9),
    (2, 5, 3, 3),
    (2, 9, 12, 17),
    (2, 9, 16, 32),
    (2, 3, 20, 61),
    (1, 3, 4, 4500),
    (1, 2, 300, 310),
    (1, 2, 4, 40000),
    (1, 1, 2, 70001),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("pixels", PIXELS)
def test_probabilities_that_count(device: str, pixels: str, layout: str, shape: tuple[int, int, int, int]) -> None:
    for dtype in (torch.float64, torch.bfloat16):
        keywords = on(device, PIXELS[pixels](shape))
        p = cases.LAYOUTS[layout](torch.rand(shape, device=device).to(dtype))
        counts = reference.counting(p, keywords.get("mask"), keywords.get("valid_size"))
        p[counts.expand(shape).logical_not()] = torch.nan
        check(kpfused.expectation2d, reference.expectation2d, (p,), **keywords)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("pixels", ["whole", *PIXELS])
def test_a_probability_map_gives_the_same_bits_alone(
    device: str, pixels: str, layout: str, shape: tuple[int, int, int, int]
) -> None:
    keywords = {} if pixels == "whole" else on(device, PIXELS[pixels](shape))
    p = cases.LAYOUTS[layout](torch.rand(shape, device=device))
    mask, size = keywords.get("mask"), keywords.get("valid_size")
    alone = dict(keywords)
    if mask is not None and mask.dim() == 4:
        alone["mask"] = mask[-1:]
    if size is not None and pixels != "numbers":
        alone["valid_size"] = tuple(n[-1:] if isinstance(n, torch.Tensor) and n.dim() == 2 else n for n in size)

    def results(p: torch.Tensor, **keywords: object) -> tuple[torch.Tensor, torch.Tensor]:
        leaf = p.detach().requires_grad_()
        result = kpfused.expectation2d(leaf, **keywords)
        (result * torch.tensor([1.5, -0.7], device=device)).sum().backward()
        return result.detach(), leaf.grad

    for one, of_all in zip(results(p[-1:], **alone), results(p, **keywords), strict=True):
        assert torch.equal(one, of_all[-1:])


def test_gradcheck_of_probability_maps(device: str) -> None:
    p = torch.rand(2, 3, 4, 5, dtype=torch.float64, device=device).requires_grad_()
    assert gradcheck(kpfused.expectation2d, p)
    assert gradgradcheck(kpfused.expectation2d, p)
