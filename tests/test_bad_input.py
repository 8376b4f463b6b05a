# SPDX-License-Identifier: MIT
"""Bad input: an error that names the argument, what was got and what is wanted, before any kernel runs."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

import kpfused
from kpfused import ops

MAP = torch.zeros(2, 3, 4, 5)


@pytest.fixture(autouse=True)
def _no_kernel_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a kernel ran on bad input")

    monkeypatch.setattr(ops, "call", refuse)


FUNCTIONS = (kpfused.soft_argmax2d, kpfused.spatial_moments2d)


def fails(error: type[Exception], words: str, *args: Any, **kwargs: Any) -> None:
    for function in FUNCTIONS:
        with pytest.raises(error, match=re.escape(words)):
            function(*args, **kwargs)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.complex64], ids=str)
def test_heatmap_dtype(dtype: torch.dtype) -> None:
    fails(TypeError, f"heatmap must be float32, float64, float16 or bfloat16; got {dtype}", MAP.to(dtype))


def test_heatmap_is_no_tensor() -> None:
    fails(TypeError, "heatmap must be a torch.Tensor; got list", [[1.0]])


def test_heatmap_is_sparse() -> None:
    fails(TypeError, "heatmap must be a strided tensor; got layout torch.sparse_coo", torch.eye(3).to_sparse())


def test_too_few_dimensions() -> None:
    fails(ValueError, "heatmap must have at least two dimensions (..., H, W); got shape (5,)", torch.zeros(5))


@pytest.mark.parametrize("shape", [(2, 0, 5), (2, 5, 0)], ids=str)
def test_no_pixels(shape: tuple[int, ...]) -> None:
    fails(ValueError, f"heatmap must have H >= 1 and W >= 1; got shape {shape}", torch.zeros(shape))


def test_both_beta_and_temperature() -> None:
    fails(ValueError, "give beta or temperature, not both; got beta=2.0 and temperature=0.5", MAP, 2.0, temperature=0.5)
    with pytest.raises(ValueError, match="not both"):
        kpfused.SoftArgmax2d(torch.ones(()), temperature=1.0)


def test_temperature_of_zero() -> None:
    fails(ValueError, "temperature must not be zero", MAP, temperature=0.0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_number_is_not_finite(value: float) -> None:
    fails(ValueError, f"beta must be finite; got {value}", MAP, value)
    fails(ValueError, f"temperature must be finite; got {value}", MAP, temperature=value)


@pytest.mark.parametrize("value", [1.1e30, -3e38, 1e39])
def test_beta_beyond_the_kernels(value: float) -> None:
    fails(ValueError, f"beta must be from -1e+30 to 1e+30; got {value}", MAP, value)


@pytest.mark.parametrize("value", [1e-39, -1e-39, 0])
def test_temperature_beyond_the_kernels(value: float) -> None:
    words = "temperature must not be zero, nor within 1e-30 of it: a map's softmax divides by it"
    fails(ValueError, f"{words}; got {value}", MAP, temperature=value)


def test_integers_of_any_size() -> None:
    fails(ValueError, "beta must be from -1e+30 to 1e+30; got 1000", MAP, 10**400)


@pytest.mark.parametrize("value", ["1", True, [1.0], None])
def test_beta_is_no_number(value: Any) -> None:
    words = f"beta must be a number or a torch.Tensor; got {type(value).__name__}"
    fails(TypeError, words, MAP, value)
    fails(TypeError, words, MAP, value, temperature=0.5)


def test_beta_dtype() -> None:
    fails(TypeError, "beta must be a floating-point tensor; got torch.int64", MAP, torch.ones(3, dtype=torch.int64))


@pytest.mark.parametrize("shape", [(2,), (4,), (3, 2), (1, 2, 3), (2, 3, 1, 1)], ids=str)
@pytest.mark.parametrize("name", ["beta", "temperature"])
def test_beta_does_not_broadcast(name: str, shape: tuple[int, ...]) -> None:
    words = f"{name} must broadcast against the leading dimensions (2, 3) of heatmap; got shape {shape}"
    fails(ValueError, words, MAP, **{name: torch.ones(shape)})


@pytest.mark.parametrize("coordinates", ["pixels", "", None, 0, ["pixel"]])
def test_unknown_coordinates(coordinates: Any) -> None:
    words = "coordinates must be one of 'pixel', 'corners', 'centers', 'unit', 'unit_centered'"
    fails(ValueError, f"{words}; got {coordinates!r}", MAP, coordinates=coordinates)
    with pytest.raises(ValueError, match=re.escape(words)):
        kpfused.SoftArgmax2d(coordinates=coordinates)


@pytest.mark.parametrize("name", ["beta", "temperature"])
def test_different_devices(name: str) -> None:
    words = f"{name} must be on the device of heatmap, cpu; got meta"
    fails(ValueError, words, MAP, **{name: torch.ones(3, device="meta")})


def test_layer_arguments() -> None:
    with pytest.raises(TypeError, match="learnable=True starts from a number"):
        kpfused.SoftArgmax2d(torch.ones(3), learnable=True)
    with pytest.raises(ValueError, match="learnable=True keeps beta positive; got a start of -1"):
        kpfused.SoftArgmax2d(-1.0, learnable=True)
    with pytest.raises(ValueError, match="num_keypoints is for learnable=True"):
        kpfused.SoftArgmax2d(num_keypoints=3)
    with pytest.raises(ValueError, match="num_keypoints must be at least 1; got 0"):
        kpfused.SoftArgmax2d(learnable=True, num_keypoints=0)
    with pytest.raises(TypeError, match="num_keypoints must be an int; got float"):
        kpfused.SoftArgmax2d(learnable=True, num_keypoints=3.0)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", ["a", True, [1.0], 1j], ids=repr)
def test_empty_value(value: Any) -> None:
    fails(TypeError, f"empty_value must be a number or None; got {type(value).__name__}", MAP, empty_value=value)
    with pytest.raises(TypeError, match="empty_value must be a number or None"):
        kpfused.soft_argmax3d(MAP, empty_value=value)
