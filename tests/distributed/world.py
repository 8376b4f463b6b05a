# SPDX-License-Identifier: MIT
"""What cases share: processes, tensors sharded over them, and how much they send."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

BATCH, KEYPOINT, H, W = map(Shard, range(4))
ALL = Replicate()


@dataclass(frozen=True)
class World:
    rank: int
    size: int
    device: str

    @functools.cache  # noqa: B019  a mesh makes process groups
    def mesh(self, dims: int = 1) -> DeviceMesh:
        return init_device_mesh(self.device, (self.size,) if dims == 1 else (2, self.size // 2))


Case: TypeAlias = Callable[[World], None]


class LocalCalls(TorchDispatchMode):
    """Shows ``see`` what is called with this rank's own tensors: what a DTensor does with those is what counts."""

    def see(self, func: Any, args: Any) -> None:
        raise NotImplementedError

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented
        self.see(func, args)
        return func(*args, **(kwargs or {}))


class Sent(LocalCalls):
    """Bytes that this rank hands to collectives, one entry a call."""

    def __enter__(self) -> Any:
        self.bytes: list[int] = []
        return super().__enter__()

    def see(self, func: Any, args: Any) -> None:
        if "c10d" in func.namespace and func._opname not in ("wait_tensor", "_wrap_tensor_autograd"):
            first = args[0][0] if isinstance(args[0], (list, tuple)) else args[0]
            self.bytes.append(first.nbytes)


def shard(tensor: Tensor, mesh: DeviceMesh, placements: Sequence[Placement]) -> DTensor:
    """This rank's share of a tensor that all ranks hold, as a leaf."""
    return distribute_tensor(tensor.detach(), mesh, placements, src_data_rank=None).requires_grad_()


def shard_bool(tensor: Tensor, mesh: DeviceMesh, placements: Sequence[Placement]) -> DTensor:
    return distribute_tensor(tensor, mesh, placements, src_data_rank=None)


def whole(tensor: Tensor | None) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def maps(world: World, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (3 * torch.randn(shape)).to(world.device, dtype)


def betas(world: World, *shape: int) -> Tensor:
    return (torch.rand(shape) + 0.5).to(world.device)


def layouts(world: World) -> list[tuple[DeviceMesh, list[Placement]]]:
    one, two = world.mesh(), world.mesh(2)
    return [(one, [H]), (one, [W]), (two, [BATCH, H]), (two, [W, KEYPOINT]), (two, [W, H]), (two, [H, H])]
