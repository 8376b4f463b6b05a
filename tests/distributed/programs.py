# SPDX-License-Identifier: MIT
"""Where users take the ops: layers, training, compiled programs; and what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import kpfused
from kpfused import SoftArgmax2d
from kpfused.kernels import OF_RESULT
from tests.distributed.outcomes import everything
from tests.distributed.world import ALL, BATCH, KEYPOINT, Case, H, W, World, betas, maps, shard, shard_bool, whole


def layers(world: World) -> None:
    """A layer's plain parameter is the same on all ranks, and so is its gradient; temperatures; a sharded beta."""
    heatmap, target = maps(world, 4, 5, 9, 8), maps(world, 4, 5, 2)
    alone = SoftArgmax2d(2.0, learnable=True, num_keypoints=5).to(world.device)
    (alone(heatmap) - target).square().sum().backward()
    for placement in (BATCH, KEYPOINT, H, W, ALL):
        layer = SoftArgmax2d(2.0, learnable=True, num_keypoints=5).to(world.device)
        points = layer(shard(heatmap, world.mesh(), [placement]))
        (points - shard(target, world.mesh(), points.placements)).square().sum().backward()
        torch.testing.assert_close(layer.log_beta.grad, alone.log_beta.grad)
        temperature = shard(betas(world, 5), world.mesh(), [BATCH])
        torch.testing.assert_close(
            whole(kpfused.soft_argmax2d(shard(heatmap, world.mesh(), [placement]), temperature=temperature)),
            kpfused.soft_argmax2d(heatmap, temperature=whole(temperature)),
        )


class Net(nn.Module):
    """Images to points. ``num_keypoints=1`` is one beta as FSDP takes it: it shards no parameter without dimensions."""

    def __init__(self, num_keypoints: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.head = SoftArgmax2d(2.0, learnable=True, num_keypoints=num_keypoints)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.conv(images))


def fully_sharded(net: Net) -> nn.Module:
    fully_shard(net.head)
    return fully_shard(net)


def train(net: nn.Module, images: Tensor, targets: Tensor) -> list[Tensor]:
    """Two steps, so that the second one starts from what the first one learnt."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    for _ in range(2):
        optimizer.zero_grad()
        (net(images) - targets).square().mean().backward()
        optimizer.step()
    return [whole(p.detach()) for p in net.parameters()]


def data_parallel(world: World) -> None:
    for wrap in (DistributedDataParallel, fully_sharded):
        for num_keypoints in (6, 1):
            net = Net(num_keypoints).to(world.device)
            images, targets = maps(world, 2 * world.size, 3, 10, 12), 10 * betas(world, 2 * world.size, 6, 2)
            start = [p.detach().clone() for p in net.parameters()]
            expected = train(copy.deepcopy(net), images, targets)
            share = slice(2 * world.rank, 2 * world.rank + 2)
            actual = train(wrap(net), images[share], targets[share])
            for a, e, s in zip(actual, expected, start, strict=True):
                assert not torch.equal(e, s)
                torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)


def ops_themselves(world: World) -> None:
    """The stats are those of the whole map, too; arguments by name."""
    heatmap = maps(world, 2, 3, 9, 8)
    expected = torch.ops.kpfused.soft_argmax2d(heatmap, None, -2.0, 1)
    for op in (torch.ops.kpfused.soft_argmax2d, torch.ops.kpfused._soft_argmax2d):
        for placement in (KEYPOINT, H):
            own = shard(heatmap, world.mesh(), [placement]).detach()
            for a, e in zip(op(own, beta=None, beta_value=-2.0, coordinates=1), expected, strict=True):
                torch.testing.assert_close(whole(a), e)


def bad_input(world: World) -> None:
    heatmap, beta = maps(world, 2, 3, 7, 9), betas(world, 3)
    with pytest.raises(TypeError, match="heatmap must be a DTensor"):
        kpfused.soft_argmax2d(heatmap, shard(beta, world.mesh(), [ALL]))
    with pytest.raises(TypeError, match="heatmap must be a DTensor"):
        kpfused.spatial_moments2d(heatmap, mask=shard_bool(heatmap > 0, world.mesh(), [ALL]))
    mask = shard_bool(heatmap > 0, world.mesh(2), [ALL, ALL])
    with pytest.raises(ValueError, match="mask must be on the mesh of heatmap"):
        kpfused.spatial_moments2d(shard(heatmap, world.mesh(), [H]), mask=mask)
    leaf = shard(heatmap, world.mesh(), [BATCH])
    for function in (kpfused.soft_argmax2d, lambda h: kpfused.spatial_expectation2d(h, h.detach().unsqueeze(2))):
        (gradient,) = torch.autograd.grad(function(leaf).sum(), leaf, create_graph=True)
        with pytest.raises(NotImplementedError, match="second derivatives"):
            gradient.square().sum().backward()
    with pytest.raises(TypeError, match="heatmap must be a DTensor"):
        kpfused.spatial_expectation2d(heatmap, shard(heatmap.unsqueeze(2), world.mesh(), [ALL]))
    with pytest.raises(ValueError, match="beta must be on the mesh of heatmap"):
        kpfused.soft_argmax2d(shard(heatmap, world.mesh(), [H]), shard(beta, world.mesh(2), [ALL, ALL]))
    # The result in place of the heatmap, for which autograd never asks here.
    softmax, stats = torch.ops.kpfused.spatial_softmax2d(shard(heatmap, world.mesh(), [H]).detach(), None, 1.0, 0)
    with pytest.raises(NotImplementedError, match="spread over ranks"):
        torch.ops.kpfused.spatial_softmax2d_backward(softmax, softmax, stats, None, 1.0, OF_RESULT, False)


def compiled(world: World) -> None:
    """One graph, merging included, forward and backward."""
    for placement in (H, KEYPOINT):
        leaves = shard(maps(world, 2, 3, 7, 9), world.mesh(), [placement]), shard(betas(world, 3), world.mesh(), [ALL])
        results = []
        for function in (
            torch.compile(kpfused.soft_argmax2d, backend="aot_eager", fullgraph=True),
            kpfused.soft_argmax2d,
        ):
            points = function(*leaves, coordinates="unit")
            results.append([points.detach(), *torch.autograd.grad(points.square().sum(), leaves)])
        for a, e in zip(*results, strict=True):
            assert a.placements == e.placements
            torch.testing.assert_close(whole(a), whole(e), rtol=0, atol=0)
    heatmap, mask = shard(maps(world, 2, 3, 7, 9), world.mesh(), [H]), maps(world, 2, 1, 7, 9) > -2
    beta, settings = betas(world, 3).requires_grad_(), {"mask": mask, "valid_size": (5, 9)}
    for eager in (
        kpfused.spatial_moments2d,
        kpfused.spatial_softmax2d,
        lambda *args, **pixels: kpfused.window_mass(args[0], 3, args[1], **pixels),
        lambda *args, **pixels: kpfused.spatial_expectation2d(args[0], mask.float().unsqueeze(2), args[1], **pixels),
    ):
        function = torch.compile(eager, backend="aot_eager", fullgraph=True)
        pairs = (everything(f, heatmap, beta, **settings) for f in (function, eager))
        for a, e in zip(*pairs, strict=True):
            torch.testing.assert_close(whole(a), whole(e), rtol=0, atol=0)


CASES: list[Case] = [
    layers,
    data_parallel,
    ops_themselves,
    bad_input,
    compiled,
]
