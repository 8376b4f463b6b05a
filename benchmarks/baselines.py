# SPDX-License-Identifier: MIT
"""The peers: what people run today, each as ``heatmap (B, K, H, W) -> coordinates (B, K, 2)`` in pixels, (x, y).

A peer is built anew for every case, so that a compiled one is compiled for one shape, and is checked against the
float64 reference before it is timed. One that cannot run here keeps its name and says why.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kpfused import soft_argmax2d

Function = Callable[[Tensor], Tensor]
OURS = "kpfused"


@dataclass(frozen=True)
class Peer:
    """One way to compute soft-argmax. ``build`` is None where it cannot run, and ``note`` then says why."""

    name: str
    note: str
    build: Callable[[], Function] | None
    compiles: bool = False  # the first call with a new shape takes seconds
    layouts: tuple[str, ...] = ("contiguous", "channels_last")


def axes(probability: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Pixel coordinates along x and along y, of the dtype and device of ``probability``."""
    dtype, device = probability.dtype, probability.device
    return torch.arange(width, dtype=dtype, device=device), torch.arange(height, dtype=dtype, device=device)


def eager(heatmap: Tensor) -> Tensor:
    """The reference composition: softmax over the flattened map in float32, times a grid of coordinates."""
    height, width = heatmap.shape[-2:]
    probability = torch.softmax(heatmap.flatten(-2), -1, dtype=torch.promote_types(heatmap.dtype, torch.float32))
    x, y = axes(probability, height, width)
    return probability @ torch.stack((x.repeat(height), y.repeat_interleave(width)), -1)


def marginals(heatmap: Tensor) -> Tensor:
    """Softmax in the map's dtype, its two marginals, and their dot products with one-dimensional coordinates."""
    probability = torch.softmax(heatmap.flatten(-2), -1).view(heatmap.shape)
    x, y = axes(probability, *heatmap.shape[-2:])
    return torch.stack(((probability.sum(-2) * x).sum(-1), (probability.sum(-1) * y).sum(-1)), -1)


def dsntnn_composition(heatmap: Tensor) -> Tensor:
    """As dsntnn 0.5 computes it: each axis summed on its own, y before x, then reversed."""
    flat = torch.softmax(heatmap.reshape(-1, heatmap.shape[-2] * heatmap.shape[-1]), -1)
    probability = flat.view(heatmap.shape)
    x, y = axes(probability, *heatmap.shape[-2:])
    each = [(probability.sum(3) * y).sum(-1), (probability.sum(2) * x).sum(-1)]
    y_and_x = torch.stack(each, -1)
    return torch.cat((y_and_x[..., 1:], y_and_x[..., :1]), -1)


def kornia_composition(heatmap: Tensor) -> Tensor:
    """As kornia 0.9 computes it: softmax of the map divided by a temperature, then products with a mesh grid."""
    height, width = heatmap.shape[-2:]
    flat = torch.softmax(heatmap.reshape(*heatmap.shape[:2], -1) / 1.0, -1)
    dtype, device = torch.promote_types(heatmap.dtype, torch.float32), heatmap.device
    x = torch.linspace(0, width - 1, width, dtype=dtype, device=device)
    y = torch.linspace(0, height - 1, height, dtype=dtype, device=device)
    grid_y, grid_x = torch.meshgrid(y, x, indexing="ij")
    each = [(grid.reshape(-1).to(flat.dtype) * flat).sum(-1, keepdim=True) for grid in (grid_x, grid_y)]
    return torch.cat(each, -1)


def flat_sums(heatmap: Tensor) -> Tensor:
    """The form that torch.compile fuses best of those tried: softmax and two sums over the flattened map.

    Coordinates come from the index, so that the compiler needs to read no grid.
    """
    height, width = heatmap.shape[-2:]
    probability = torch.softmax(heatmap.flatten(-2), -1, dtype=torch.promote_types(heatmap.dtype, torch.float32))
    index = torch.arange(height * width, device=heatmap.device)
    x, y = (index % width).to(probability.dtype), (index // width).to(probability.dtype)
    return torch.stack(((probability * x).sum(-1), (probability * y).sum(-1)), -1)


def _version(package: str) -> str | None:
    try:
        importlib.import_module(package)
        return importlib.metadata.version(package)
    except (ImportError, importlib.metadata.PackageNotFoundError):
        return None


def _dsntnn_peer() -> Peer:
    version = _version("dsntnn")
    if version is None:
        return Peer("dsntnn", "its composition; the package is not installed", lambda: dsntnn_composition)

    def build() -> Function:
        import dsntnn  # type: ignore[import-untyped]

        # The package views maps as flat rows, so its users make channels_last maps contiguous first.
        return lambda heatmap: dsntnn.dsnt(dsntnn.flat_softmax(heatmap.contiguous()), normalized_coordinates=False)

    return Peer("dsntnn", f"dsntnn {version}", build)


def _kornia_peer() -> Peer:
    version = _version("kornia")
    if version is None:
        return Peer("kornia", "its composition; the package is not installed", lambda: kornia_composition)

    def build() -> Function:
        from kornia.geometry.subpix import spatial_soft_argmax2d

        return lambda heatmap: spatial_soft_argmax2d(heatmap, None, False)

    return Peer("kornia", f"kornia {version}", build)


def _compiled_peer(name: str, mode: str | None) -> Peer:
    def build() -> Function:
        # One graph a case: without this, torch gives up compiling after a handful of shapes.
        torch._dynamo.reset()
        compiled: Function = torch.compile(flat_sums, dynamic=False, mode=mode)
        return compiled

    note = "torch.compile of the softmax-and-sums form it fuses best" + (f", mode {mode}" if mode else "")
    return Peer(name, note, build, compiles=True)


def _triton_peer(device: str) -> Peer:
    note = "hand-written Triton kernels, benchmarks/triton_kernels.py"
    if device != "cuda":
        return Peer("triton", "needs a CUDA device", None)
    try:
        from benchmarks import triton_kernels
    except ImportError as error:
        return Peer("triton", f"not importable: {error}", None)
    return Peer("triton", note, lambda: triton_kernels.soft_argmax2d, compiles=True)


def peers(device: str) -> list[Peer]:
    """kpfused first, then every peer of a device type, present or not."""
    found = [
        Peer(OURS, "this package", lambda: soft_argmax2d),
        Peer("eager", "softmax times a grid of coordinates, float32", lambda: eager),
        Peer("marginals", "softmax, marginals, dot products", lambda: marginals),
        _dsntnn_peer(),
        _kornia_peer(),
        _compiled_peer("compiled", None),
    ]
    if device == "cuda":
        # CUDA graphs of its own would be timed twice: replay is timed for every peer alike.
        found += [_compiled_peer("max-autotune", "max-autotune-no-cudagraphs"), _triton_peer(device)]
    return found


def available(device: str) -> list[Peer]:
    return [peer for peer in peers(device) if peer.build is not None]
