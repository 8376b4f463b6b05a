# SPDX-License-Identifier: MIT
"""A peer in Triton: fused soft-argmax, forward and backward, contiguous and channels_last.

What a good engineer writes in a day: maps up to 16384 pixels are held in registers and read once (several tiny ones a
program); larger ones are walked four tiles at a time with an online softmax a lane, which rescales its sums once for
the four, split over programs where there are few, and merged by a second kernel; backward is one read and one write.
Maps are addressed as ``outer x inner`` with any strides of the inner and the pixel dimension, so both layouts take the
same kernels.

Runs on CPU tensors under TRITON_INTERPRET=1, to be checked without a GPU.
"""

# ruff: noqa: N803 - constants of Triton kernels are written in capitals
# mypy: ignore-errors
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-1.0e38)  # a start that stays finite times LOG2E: infinity less infinity is not a number
REGISTERS = 16384  # pixels of a map that one program holds
WALK = 2048  # elements of a tile of the walk, which takes four at a time
TILE = 4096  # elements of a program of backward
PROGRAMS = 1056  # as many as keep a large GPU busy


@triton.jit
def _tile(pid, blocks, inner, stride_outer, stride_inner, BLOCK_C: tl.constexpr):
    """Where a program's maps start: the outer index, inner indices, and offsets (1, BLOCK_C)."""
    outer = pid // blocks
    c = (pid % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    offsets = outer.to(tl.int64) * stride_outer + c.to(tl.int64) * stride_inner
    return outer.to(tl.int64) * inner + c, c < inner, offsets[None, :]


@triton.jit
def _float(i):
    """Of 0 <= i < 2^23, by its bits: conversions run at a quarter of the rate, as exp2 does."""
    return (i | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0


@triton.jit
def _load(at, valid):
    return tl.load(at, valid, -float("inf")).to(tl.float32)


@triton.jit
def _terms(z, peak, p, W: tl.constexpr):
    """exp2 of a tile's logits beyond the peak, and that times x and times y."""
    e = tl.exp2(z * LOG2E - peak * LOG2E)
    y = p // W
    return e, e * _float(p - y * W), e * _float(y)


@triton.jit
def _forward(
    heatmap, result, stats, partial, inner, blocks, pixels, per_split, splits,
    stride_outer, stride_inner, stride_pixel,
    W: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, ONE: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    maps, valid, offsets = _tile(tl.program_id(0), blocks, inner, stride_outer, stride_inner, BLOCK_C)
    split = tl.program_id(1)
    lanes = tl.arange(0, BLOCK_P)[:, None]
    if ONE:
        z = _load(heatmap + offsets + lanes * stride_pixel, (lanes < pixels) & valid[None, :])
        peak = tl.maximum(tl.max(z, 0), LOWEST)
        e, ex, ey = _terms(z, peak[None, :], lanes, W)
        total, x_sum, y_sum = tl.sum(e, 0), tl.sum(ex, 0), tl.sum(ey, 0)
    else:
        m = tl.full((BLOCK_P, BLOCK_C), LOWEST, tl.float32)
        s = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
        sx = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
        sy = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
        end = tl.minimum((split + 1) * per_split, pixels)
        for start in range(split * per_split, end, 4 * BLOCK_P):
            p0 = start + lanes
            p1, p2, p3 = p0 + BLOCK_P, p0 + 2 * BLOCK_P, p0 + 3 * BLOCK_P
            z0 = _load(heatmap + offsets + p0 * stride_pixel, (p0 < end) & valid[None, :])
            z1 = _load(heatmap + offsets + p1 * stride_pixel, (p1 < end) & valid[None, :])
            z2 = _load(heatmap + offsets + p2 * stride_pixel, (p2 < end) & valid[None, :])
            z3 = _load(heatmap + offsets + p3 * stride_pixel, (p3 < end) & valid[None, :])
            larger = tl.maximum(m, tl.maximum(tl.maximum(z0, z1), tl.maximum(z2, z3)))
            scale = tl.exp2((m - larger) * LOG2E)
            m = larger
            e0, x0, y0 = _terms(z0, m, p0, W)
            e1, x1, y1 = _terms(z1, m, p1, W)
            e2, x2, y2 = _terms(z2, m, p2, W)
            e3, x3, y3 = _terms(z3, m, p3, W)
            s = s * scale + ((e0 + e1) + (e2 + e3))
            sx = sx * scale + ((x0 + x1) + (x2 + x3))
            sy = sy * scale + ((y0 + y1) + (y2 + y3))
        peak = tl.max(m, 0)
        scale = tl.exp2((m - peak[None, :]) * LOG2E)
        total, x_sum, y_sum = tl.sum(s * scale, 0), tl.sum(sx * scale, 0), tl.sum(sy * scale, 0)
    peak = peak * LOG2E
    if SPLIT:
        to = partial + (maps * splits + split) * 4
        tl.store(to, peak, valid)
        tl.store(to + 1, total, valid)
        tl.store(to + 2, x_sum, valid)
        tl.store(to + 3, y_sum, valid)
    else:
        tl.store(result + maps * 2, x_sum / total, valid)
        tl.store(result + maps * 2 + 1, y_sum / total, valid)
        tl.store(stats + maps, peak + tl.log2(total), valid)


@triton.jit
def _merge(partial, result, stats, splits, BLOCK: tl.constexpr):
    number = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    source, valid = partial + (number * splits + lanes) * 4, lanes < splits
    m = tl.load(source, valid, LOWEST * LOG2E)
    peak = tl.max(m, 0)
    scale = tl.exp2(m - peak)
    total = tl.sum(tl.load(source + 1, valid, 0.0) * scale, 0)
    tl.store(result + number * 2, tl.sum(tl.load(source + 2, valid, 0.0) * scale, 0) / total)
    tl.store(result + number * 2 + 1, tl.sum(tl.load(source + 3, valid, 0.0) * scale, 0) / total)
    tl.store(stats + number, peak + tl.log2(total))


@triton.jit
def _backward(
    heatmap, gradient, upstream, result, stats, inner, blocks, pixels,
    stride_outer, stride_inner, stride_pixel,
    W: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    maps, valid, offsets = _tile(tl.program_id(0), blocks, inner, stride_outer, stride_inner, BLOCK_C)
    p = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)[:, None]
    mask = (p < pixels) & valid[None, :]
    at = offsets + p * stride_pixel
    z = tl.load(heatmap + at, mask, 0.0).to(tl.float32)
    gx, gy = tl.load(upstream + maps * 2, valid, 0.0), tl.load(upstream + maps * 2 + 1, valid, 0.0)
    mx, my = tl.load(result + maps * 2, valid, 0.0), tl.load(result + maps * 2 + 1, valid, 0.0)
    probability = tl.exp2(z * LOG2E - tl.load(stats + maps, valid, 0.0)[None, :])
    y = p // W
    slope = (_float(p - y * W) - mx[None, :]) * gx[None, :] + (_float(y) - my[None, :]) * gy[None, :]
    tl.store(gradient + at, (probability * slope).to(gradient.dtype.element_ty), mask)


@triton.jit
def _read(source, partial, elements, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(partial + tl.program_id(0), tl.sum(tl.load(source + at, at < elements, 0.0), 0))


@triton.jit
def _copy(source, target, elements, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target + at, tl.load(source + at, at < elements), at < elements)


def read(source: Tensor) -> Tensor:
    """Sums of runs of a flat float32 tensor: reads every byte once, writes next to nothing. A ceiling, not a peer."""
    block = 8192
    partial = torch.empty(triton.cdiv(source.numel(), block), device=source.device)
    _read[(partial.numel(),)](source, partial, source.numel(), BLOCK=block, num_warps=8)
    return partial


def copy(source: Tensor, target: Tensor) -> Tensor:
    """A flat tensor to another: a ceiling, not a peer."""
    block = 8192
    _copy[(triton.cdiv(source.numel(), block),)](source, target, source.numel(), BLOCK=block, num_warps=8)
    return target


def _warps(elements: int) -> int:
    return 4 if elements <= 2048 else 8 if elements <= 8192 else 16


def _view(heatmap: Tensor) -> tuple[int, int, tuple[int, int, int]]:
    """Outer and inner extent, and strides of outer, inner and pixel."""
    batch, channels, height, width = heatmap.shape
    pixels = height * width
    if channels > 1 and pixels > 1 and heatmap.is_contiguous(memory_format=torch.channels_last):
        return batch, channels, (channels * pixels, 1, channels)
    if not heatmap.is_contiguous():
        raise ValueError("contiguous or channels_last maps only")
    return 1, batch * channels, (0, pixels, 1)


def _blocks(inner: int, pixels: int, adjacent: bool, elements: int) -> tuple[int, int]:
    """BLOCK_P and BLOCK_C of a tile of about ``elements``."""
    if adjacent:
        channels = min(triton.next_power_of_2(inner), 64)
        return min(triton.next_power_of_2(pixels), max(elements // channels, 1)), channels
    block = min(triton.next_power_of_2(pixels), elements)
    return block, max(1, min(1024 // block, triton.next_power_of_2(inner)))


class _SoftArgmax2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, heatmap: Tensor) -> Tensor:
        height, width = heatmap.shape[-2:]
        outer, inner, strides = _view(heatmap)
        pixels, adjacent = height * width, strides[1] == 1
        one = pixels <= REGISTERS and not adjacent
        block_p, block_c = _blocks(
            inner, pixels if one else triton.cdiv(pixels, 4), adjacent, REGISTERS if one else WALK
        )
        blocks, step = triton.cdiv(inner, block_c), 4 * block_p
        splits = 1 if one else max(1, min(PROGRAMS // (outer * blocks), triton.cdiv(pixels, step)))
        per_split = triton.cdiv(triton.cdiv(pixels, splits), step) * step
        splits = triton.cdiv(pixels, per_split)
        result = torch.empty(*heatmap.shape[:2], 2, dtype=torch.float32, device=heatmap.device)
        stats = torch.empty(outer * inner, dtype=torch.float32, device=heatmap.device)
        partial = stats if splits == 1 else torch.empty(outer * inner * splits * 4, device=heatmap.device)
        _forward[(outer * blocks, splits)](
            heatmap, result, stats, partial, inner, blocks, pixels, per_split, splits, *strides,
            W=width, BLOCK_P=block_p, BLOCK_C=block_c, ONE=one, SPLIT=splits > 1,
            num_warps=_warps(block_p * block_c if one else 4 * block_p * block_c),
        )  # fmt: skip
        if splits > 1:
            _merge[(outer * inner,)](partial, result, stats, splits, BLOCK=triton.next_power_of_2(splits))
        ctx.save_for_backward(heatmap, result, stats)
        return result

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Tensor:
        heatmap, result, stats = ctx.saved_tensors
        height, width = heatmap.shape[-2:]
        outer, inner, strides = _view(heatmap)
        block_p, block_c = _blocks(inner, height * width, strides[1] == 1, TILE)
        blocks = triton.cdiv(inner, block_c)
        gradient = torch.empty_like(heatmap)
        _backward[(outer * blocks, triton.cdiv(height * width, block_p))](
            heatmap, gradient, upstream.contiguous(), result, stats, inner, blocks, height * width, *strides,
            W=width, BLOCK_P=block_p, BLOCK_C=block_c, num_warps=_warps(block_p * block_c),
        )  # fmt: skip
        return gradient


def soft_argmax2d(heatmap: Tensor) -> Tensor:
    """Coordinates (B, K, 2) in pixels, float32, of contiguous or channels_last maps (B, K, H, W)."""
    result: Tensor = _SoftArgmax2d.apply(heatmap)  # type: ignore[no-untyped-call]
    return result
