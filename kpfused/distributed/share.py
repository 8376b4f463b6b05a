# SPDX-License-Identifier: MIT
"""What a rank has of a heatmap, and what lies beside it: where ``DTensor`` come apart and are made."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from kpfused import reference
from kpfused.results import SpatialMoments

STATS, MOMENT_STATS = 4, 8  # kStats and kMomentStats of csrc/params.h
PIXEL = reference.COORDINATES.index("pixel")
_BESIDE = ("beta", "mask", "valid_size")  # arguments that may be plain where the heatmap is a DTensor


def prepare(heatmap: Tensor, beta: Tensor | None, *pixels: Any) -> tuple[Any, ...]:
    """The arguments as the rules want them, with a gradient: plain ones are the same on all ranks.

    ``pixels``: mask, valid size and empty value, or nothing.
    """
    if not isinstance(heatmap, DTensor):
        raise TypeError("heatmap must be a DTensor where beta, temperature, mask or valid_size is one")
    mesh = heatmap.device_mesh
    beside = [None if tensor is None else _replicated(tensor, mesh) for tensor in (beta, *pixels[:2])]
    for name, tensor in zip(_BESIDE, beside, strict=False):
        if tensor is not None and tensor.device_mesh != mesh:
            raise ValueError(f"{name} must be on the mesh of heatmap, {mesh}; got {tensor.device_mesh}")
    return (_readable(heatmap), *beside, *pixels[2:])


def with_whole_depth(slices: SpatialMoments, stats: Tensor) -> tuple[SpatialMoments, Tensor]:
    """Moments and stats of slices ``(..., D)``, of which all ranks get those of a whole volume: one all-gather."""
    if not isinstance(stats, DTensor):
        return slices, stats
    depth = stats.dim() - 2
    placements = [Replicate() if p.is_shard(depth) else p for p in stats.placements]
    if placements == list(stats.placements):
        return slices, stats
    flat: list[Any] = [slices.mean, slices.covariance.flatten(-2), *(field[..., None] for field in slices[2:4])]
    flat += [slices.peak.to(stats.dtype), slices.peak_probability[..., None], stats]  # a pixel's index is exact
    packed: Any = torch.cat(flat, -1)
    gathered = packed.redistribute(placements=placements)
    # Not by split, in whose backward a field that no loss uses is a plain tensor.
    ends = list(itertools.accumulate(tensor.shape[-1] for tensor in flat))
    mean, covariance, entropy, logsumexp, peak, chance, stats = (
        gathered[..., begin:end] for begin, end in itertools.pairwise([0, *ends])
    )
    return SpatialMoments(
        mean,
        covariance.reshape(*covariance.shape[:-1], 2, 2),
        entropy.squeeze(-1),
        logsumexp.squeeze(-1),
        peak.to(torch.int64),
        chance.squeeze(-1),
    ), stats.detach()


def prepare_values(heatmap: Tensor, values: Tensor) -> DTensor:
    """Values beside a heatmap that :func:`prepare` returned, placed as the rules can take them apart."""
    if not isinstance(heatmap, DTensor):
        raise TypeError("heatmap must be a DTensor where values are one")
    values = _replicated(values, heatmap.device_mesh)
    if values.device_mesh != heatmap.device_mesh:
        raise ValueError(f"values must be on the mesh of heatmap, {heatmap.device_mesh}; got {values.device_mesh}")
    share = Share(heatmap)
    placements = share.beside_broadcast(values, trailing=3)
    for i in share.spread:
        placements[i] = Shard(values.dim() - heatmap.dim() + share.dim(i))
    return values.redistribute(placements=placements)


def together(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors of which one is a ``DTensor``, as such: torch mixes no others."""
    mesh = next(tensor.device_mesh for tensor in tensors if isinstance(tensor, DTensor))
    return tuple(_replicated(tensor, mesh) for tensor in tensors)


def _replicated(tensor: Tensor, mesh: DeviceMesh) -> DTensor:
    """A plain tensor, the same on all ranks, as a ``DTensor``; others as they are."""
    if isinstance(tensor, DTensor):
        return tensor
    return DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)


def _readable(heatmap: DTensor) -> DTensor:
    """Makes whole what is a sum yet to be carried out, or sharded otherwise than in runs of indices."""
    placements = tuple(p if type(p) is Shard else Replicate() for p in heatmap.placements)
    return heatmap if placements == heatmap.placements else heatmap.redistribute(placements=placements)


class Share:
    """This rank's share of a heatmap: where it lies, and how what belongs to the maps is placed beside it."""

    def __init__(self, heatmap: DTensor) -> None:
        heatmap = _readable(heatmap)
        self.heatmap, self.local = heatmap, heatmap.to_local()
        self.mesh, self.placements = heatmap.device_mesh, heatmap.placements
        self.leading = heatmap.shape[:-2]
        self.has_pixels = 0 not in self.local.shape[-2:]
        self.dtype = torch.promote_types(self.local.dtype, torch.float32)  # of results
        # Mesh dimensions over which the pixels of one map are spread.
        self.spread = [i for i, p in enumerate(self.placements) if isinstance(p, Shard) and p.dim >= len(self.leading)]

    def dim(self, index: int) -> int:
        """The heatmap's dimension that is sharded over a mesh dimension."""
        placement = self.placements[index]
        assert isinstance(placement, Shard)
        return placement.dim

    def beside(self, over_pixels: Placement | None = None) -> list[Placement]:
        """Placements of a tensor ``(..., n)``: as the maps, and ``over_pixels`` where those are spread."""
        return [(over_pixels or Replicate()) if i in self.spread else p for i, p in enumerate(self.placements)]

    def take(self, tensor: DTensor, placements: Sequence[Placement] | None = None) -> Tensor:
        """This rank's part of what belongs to its maps, such as results and gradients of results."""
        return tensor.redistribute(placements=placements or self.beside()).to_local().contiguous()

    def take_broadcast(self, tensor: DTensor | None, trailing: int = 0) -> Tensor | None:
        """Likewise of what broadcasts against the leading dimensions; ``trailing``: dimensions it has behind those."""
        return None if tensor is None else self.take(tensor, self.beside_broadcast(tensor, trailing))

    def beside_broadcast(self, tensor: DTensor, trailing: int) -> list[Placement]:
        """Placements of such a tensor: sharded as the maps are, and whole where it is the same for several of them."""
        missing = len(self.leading) - (tensor.dim() - trailing)
        placements: list[Placement] = []
        for placement in self.beside():
            dim = placement.dim - missing if isinstance(placement, Shard) else -1
            is_split = dim >= 0 and tensor.shape[dim] == self.leading[dim + missing]
            placements.append(Shard(dim) if is_split else Replicate())
        return placements

    def take_pixels(
        self, mask: DTensor | None = None, valid_size: DTensor | None = None, empty_value: float | None = None
    ) -> tuple[Any, ...]:
        """Which of this rank's pixels count, as an op takes it."""
        if mask is None and valid_size is None and empty_value is None:
            return ()
        size = self.take_broadcast(valid_size, trailing=1)
        if size is not None and self.spread:
            # What is left of it from this rank's first pixel on. Kernels take less than nothing for nothing.
            size = torch.stack([n - self.first(dim) for n, dim in zip(size.unbind(-1), (-2, -1), strict=True)], -1)
        return None if mask is None else self._take_mask(mask), size, empty_value

    def take_settings(
        self, beta: DTensor | None, beta_value: float, setting: int, needs_grad_beta: bool, *pixels: Any, **named: Any
    ) -> tuple[Any, ...]:
        """What a backward op is told behind the maps, of this rank's."""
        return self.take_broadcast(beta), beta_value, setting, needs_grad_beta, *self.take_pixels(*pixels, **named)

    def _take_mask(self, mask: DTensor) -> Tensor:
        """This rank's part of a mask of the heatmap's shape, as a view where it can be: a mask that was expanded is
        the size of the heatmap, but not in memory."""
        if not self._holds_part(mask):
            mask = _gathered(mask)
        own = mask.to_local()
        for dim, size in enumerate(self.local.shape):
            if own.shape[dim] != size:
                own = own.narrow(dim, self.first(dim), size)
        return own

    def _holds_part(self, tensor: DTensor) -> bool:
        """Whether this rank has its part of a tensor of the heatmap's shape: every dimension is whole, or sharded as
        that of the heatmap is."""
        if not all(type(p) in (Shard, Replicate) for p in tensor.placements):
            return False

        def mesh_dims(placements: Sequence[Placement], dim: int) -> list[int]:
            return [i for i, p in enumerate(placements) if p.is_shard(dim)]

        return all(
            mesh_dims(tensor.placements, dim) in ([], mesh_dims(self.placements, dim)) for dim in range(tensor.dim())
        )

    def wrap(self, local: Tensor, placements: Sequence[Placement], shape: Sequence[int]) -> DTensor:
        """A contiguous tensor of a global shape."""
        strides = tuple(itertools.accumulate(reversed(shape), operator.mul, initial=1))[-2::-1]
        return from_local(local, self, placements, shape, strides)

    def wrap_grad_beta(self, local: Tensor | None) -> DTensor | None:
        """Of every map, of which ranks that have pixels of it each have a part."""
        return None if local is None else self.wrap(local, self.beside(Partial()), self.leading)

    def wrap_result(self, local: Tensor) -> DTensor:
        """What belongs to the maps."""
        return self.wrap(local, self.beside(), (*self.leading, *local.shape[len(self.leading) :]))

    def wrap_heatmap(self, local: Tensor) -> DTensor:
        return from_local(local, self, self.placements, self.heatmap.shape, self.heatmap.stride())

    def of_maps(self, *size: int, value: float = 0.0) -> Tensor:
        """One number, or ``size`` of them, for every map of this rank."""
        return self.local.new_full((*self.local.shape[:-2], *size), value, dtype=self.dtype)

    def sum_of_ranks(self, own: Tensor) -> Tensor:
        """Of all that have pixels of the same maps, in one order, to the same bits on each."""
        for index in self.spread:
            own = self.gather(own.to(self.dtype), index).double().sum(0)
        return own.to(self.dtype)

    def gather(self, own: Tensor, index: int) -> Tensor:
        """``own`` of all ranks along one mesh dimension, in a new first dimension: one all-gather."""
        placements = [Shard(0) if i == index else Replicate() for i in range(self.mesh.ndim)]
        return DTensor.from_local(own.unsqueeze(0), self.mesh, placements, run_check=False).full_tensor()

    def units(self, coordinates: int) -> list[tuple[float, float]]:
        """(scale, offset) along x and y for pixels from the centre of the whole map."""
        preset = reference.COORDINATES[coordinates]
        return [reference.coordinate_units(self.heatmap.shape[dim], preset) for dim in (-1, -2)]

    def shift(self) -> list[float]:
        """(x, y) from the centre of the whole map to the centre of this rank's pixels."""
        return [self.first(d) + (self.local.shape[d] - 1) / 2 - (self.heatmap.shape[d] - 1) / 2 for d in (-1, -2)]

    def first(self, dim: int) -> int:
        """Global index of this rank's first pixel along a dimension; shards are what ``torch.chunk`` makes."""
        first, size, dim = 0, self.heatmap.shape[dim], dim % self.heatmap.dim()
        for index, placement in enumerate(self.placements):
            if placement.is_shard(dim):
                chunk = -(-size // self.mesh.size(index))
                start = min(size, chunk * self.mesh.get_local_rank(index))
                first, size = first + start, min(chunk, size - start)
        return first


def from_local(
    local: Tensor, share: Share, placements: Sequence[Placement], shape: Sequence[int], stride: tuple[int, ...]
) -> DTensor:
    return DTensor.from_local(local, share.mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride)


def _gathered(mask: DTensor) -> DTensor:
    """The whole mask on every rank. What was expanded is sent once, and expanded again."""
    repeats = [mask.stride(d) == 0 and not any(p.is_shard(d) for p in mask.placements) for d in range(mask.dim())]
    own, shape = mask.to_local(), list(mask.shape)
    for dim, repeated in enumerate(repeats):
        if repeated:
            own, shape[dim] = own.narrow(dim, 0, 1), 1
    strides = tuple(itertools.accumulate(reversed(shape), operator.mul, initial=1))[-2::-1]
    # As bytes: not every backend sends bool.
    sent = DTensor.from_local(
        own.contiguous().view(torch.uint8),
        mask.device_mesh,
        mask.placements,
        run_check=False,
        shape=torch.Size(shape),
        stride=strides,
    )
    return _replicated(sent.full_tensor().view(torch.bool).expand(mask.shape), mask.device_mesh)
