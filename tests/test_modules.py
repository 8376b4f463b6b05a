# SPDX-License-Identifier: MIT
from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import kpfused


def heatmap() -> torch.Tensor:
    return torch.randn(2, 3, 8, 10)


@pytest.mark.parametrize(
    "module",
    [
        kpfused.SoftArgmax2d(),
        kpfused.SoftArgmax2d(3.0, coordinates="corners"),
        kpfused.SoftArgmax2d(temperature=0.5),
        kpfused.SoftArgmax2d(torch.tensor([1.0, 2.0, 3.0])),
        kpfused.SoftArgmax2d(temperature=nn.Parameter(torch.tensor(2.0))),
        kpfused.SoftArgmax2d(4.0, learnable=True),
        kpfused.SoftArgmax2d(temperature=2.0, learnable=True, num_keypoints=3),
        kpfused.SoftArgmax1d(3.0, empty_value=0.0),
        kpfused.SoftArgmax3d(3.0, depth=1),
        kpfused.SpatialMoments2d(3.0),
    ],
    ids=repr,
)
def test_copies_agree(module: nn.Module) -> None:
    h = heatmap()
    expected = module(h)
    saved = io.BytesIO()
    torch.save(module, saved)
    saved.seek(0)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), torch.load(saved, weights_only=False)):
        torch.testing.assert_close(twin(h), expected, rtol=0, atol=0)
        twin.load_state_dict(module.state_dict())


def test_settings_reach_the_function() -> None:
    h = heatmap()
    torch.testing.assert_close(
        kpfused.SoftArgmax2d(3.0, coordinates="unit")(h), kpfused.soft_argmax2d(h, 3.0, coordinates="unit")
    )
    torch.testing.assert_close(kpfused.SoftArgmax2d(temperature=0.25)(h), kpfused.soft_argmax2d(h, 4.0))
    start = kpfused.SoftArgmax2d(5.0, learnable=True, num_keypoints=3)
    torch.testing.assert_close(start(h), kpfused.soft_argmax2d(h, 5.0))


def test_rows_and_volumes() -> None:
    bins, mask = torch.randn(2, 3, 40), torch.rand(2, 1, 40) < 0.7
    row = kpfused.SoftArgmax1d(3.0, coordinates="centers", empty_value=0.0)
    torch.testing.assert_close(
        row(bins, mask), kpfused.soft_argmax1d(bins, 3.0, coordinates="centers", mask=mask), rtol=0, atol=0
    )
    volume = torch.randn(2, 3, 4, 5, 6)
    learnt = kpfused.SoftArgmax3d(temperature=0.5, learnable=True, num_keypoints=3)
    expected = kpfused.soft_argmax3d(volume, 2.0)
    torch.testing.assert_close(learnt(volume), expected)
    joint = kpfused.SoftArgmax3d(2.0, depth=4)
    torch.testing.assert_close(joint(volume.flatten(1, 2)), expected, rtol=0, atol=0)
    assert repr(joint) == "SoftArgmax3d(beta=2.0, coordinates='pixel', depth=4)"
    nothing = torch.zeros(6, dtype=torch.bool)
    assert (kpfused.SoftArgmax3d(depth=4, empty_value=-1.0)(volume.flatten(1, 2), nothing) == -1).all()


def test_state_is_small_and_moves() -> None:
    assert not kpfused.SoftArgmax2d(2.0).state_dict()
    learnable = kpfused.SoftArgmax2d(learnable=True, num_keypoints=3)
    assert {name: tuple(v.shape) for name, v in learnable.state_dict().items()} == {"log_beta": (3,)}
    tensor = kpfused.SoftArgmax2d(torch.ones(3)).to(torch.float64)
    assert tensor.state_dict()["beta"].dtype == torch.float64


def test_learnable_beta_learns() -> None:
    """Sharpening is the way to the peak, so beta must grow."""
    torch.manual_seed(0)
    h = torch.randn(4, 3, 8, 10)
    h[:, :, 2, 7] += 4
    module = kpfused.SoftArgmax2d(0.5, learnable=True, num_keypoints=3)
    optimizer = torch.optim.Adam(module.parameters(), 0.1)
    target = torch.tensor([7.0, 2.0])
    losses = []
    for _ in range(100):
        loss = (module(h) - target).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    assert (module.log_beta.exp() > 0.5).all()


def test_learnable_beta_in_half_precision() -> None:
    """Beta itself is no half: of 65504 and more there would be none."""
    heatmap = torch.tensor([[0.0, 1e-5], [0.0, 0.0]])
    point = kpfused.SoftArgmax2d(1e5, learnable=True).half()(heatmap)
    torch.testing.assert_close(point, kpfused.soft_argmax2d(heatmap, 1e5), rtol=0, atol=1e-2)


def test_learnable_beta_starts_anew() -> None:
    """As after a layer made on the meta device was given memory."""
    with torch.device("meta"):
        module = kpfused.SoftArgmax2d(3.0, learnable=True, num_keypoints=2)
    module.to_empty(device="cpu").reset_parameters()
    torch.testing.assert_close(module.log_beta.exp(), torch.tensor([3.0, 3.0]))


def test_settings_are_checked_where_they_are_given() -> None:
    with pytest.raises(TypeError, match="empty_value must be a number or None; got str"):
        kpfused.SoftArgmax2d(empty_value="a")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="depth must be an int; got float"):
        kpfused.SoftArgmax3d(depth=2.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="depth must be at least 1; got 0"):
        kpfused.SoftArgmax3d(depth=0)
