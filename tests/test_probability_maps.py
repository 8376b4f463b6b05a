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
from tests.expectations import DTYPES, accumulator, check


@pytest.mark.parametrize("coordinates", reference.COORDINATES)
@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
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


@pytest.mark.parametrize("pixels", PIXELS)
def test_probabilities_that_count(device: str, pixels: str) -> None:
    for layout in ("contiguous", "channels_last"):
        shape = (2, 9, 12, 17)
        keywords = on(device, PIXELS[pixels](shape))
        p = cases.LAYOUTS[layout](torch.rand(shape, dtype=torch.float64, device=device))
        check(kpfused.expectation2d, reference.expectation2d, (p,), **keywords)


def test_gradcheck_of_probability_maps(device: str) -> None:
    p = torch.rand(2, 3, 4, 5, dtype=torch.float64, device=device).requires_grad_()
    assert gradcheck(kpfused.expectation2d, p)
    assert gradgradcheck(kpfused.expectation2d, p)
