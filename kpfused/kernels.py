# SPDX-License-Identifier: MIT
"""The compiled ops as a table: what each of them returns, what its backward reads, and the composition it stands for.

Every op comes as a :class:`Kernel`, which says how its outputs and its backward go together; what autograd and function
transforms need is written once, for any of them.
"""

from __future__ import annotations

import dataclasses
import itertools
import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from kpfused import _C, reference
from kpfused.results import SpatialMoments

HAS_CUDA = bool(_C.build_info()["cuda"])
_PEAK = SpatialMoments._fields.index("peak")
OF_RESULT = 1
_STATS, _MOMENT_STATS, _VOLUME_STATS = 4, 8, 13  # kStats, kMomentStats and kVolumeStats of csrc/params.h

Settings = tuple[Any, ...]
"""What an op takes behind heatmap and beta: beta where it is a number, a number of the op's own, such as the index of
the coordinates, and, unless all pixels count, mask or None (bool, of the heatmap's shape), valid size or None
(contiguous int64 ``(..., 2)``, height and width, broadcast against the leading dimensions), and empty value or None.
One tuple, passed on as it is: each of its items would cost at every function on the way."""


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of coordinates, stats and beta for maps of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def has_kernel(device_type: str) -> bool:
    """Whether this build has kernels for a device type such as ``"cuda"``."""
    return device_type == "cpu" or (device_type == "cuda" and HAS_CUDA)


def _items(indices: tuple[int, ...]) -> Any:
    """Takes a tuple's items at ``indices``, as a tuple, and faster than a comprehension does."""
    return operator.itemgetter(*indices if len(indices) > 1 else (slice(indices[0], indices[0] + 1),))


@dataclasses.dataclass(eq=False)
class Kernel:
    """A forward op and its backward op.

    ``forward(heatmap, beta, beta_value, setting, mask, valid_size, empty_value)`` returns its results and, behind them,
    what else backward keeps, such as the stats. ``setting`` is a number of the op's own: which coordinates, for most.
    ``backward(*grads, heatmap, *kept, beta, beta_value, setting, needs_grad_beta, mask, valid_size, empty_value)``
    takes a gradient for every differentiable result and returns those of heatmap and, if needed, beta, one for every
    map. Arguments from mask on may be left out.

    Each goes by two names. The one that users and compilers see has an autograd formula; the one with an underscore has
    none, so that the eager path, which brings its own, passes no Python between the dispatcher and the kernel.
    """

    name: str
    composition: Callable[..., tuple[Tensor, ...]]
    """What forward computes but for the stats, in differentiable PyTorch, of the same arguments."""
    sizes: tuple[tuple[int, ...] | None, ...]
    """Of every output, the dimensions behind the leading ones; None for a map like heatmap."""
    constant: tuple[int, ...]
    """Outputs without a gradient."""
    kept: tuple[int, ...]
    """Outputs that backward reads, in its order."""
    pixels: tuple[int, ...] = ()
    """Outputs that are pixels, in integers."""
    accepts: Callable[[int], bool] = lambda coordinates: coordinates in range(len(reference.COORDINATES))
    """Whether the op's own setting can be."""
    of_slices: tuple[int, ...] | None = None
    """Of an op on volumes, outputs that every slice has, where all others lack the dimension of depth; None of an op on
    maps."""
    composition_of_result: Callable[..., tuple[Tensor, ...]] | None = None
    """Of an op whose backward can take the result in place of the heatmap, with ``OF_RESULT`` for its setting, or any
    other than zero that it accepts, for the gradient of the heatmap alone: that, in differentiable PyTorch, of ``(grad,
    result, *kept, beta, beta_value, setting, mask, valid_size, empty_value)``."""

    def __post_init__(self) -> None:
        ops = torch.ops.kpfused
        # Once, since every call pays for it: looking an overload up costs as much as a small kernel.
        self.differentiable = tuple(i for i in range(len(self.sizes)) if i not in self.constant)
        self.has_one_result = self.differentiable == (0,)
        self.takes_result = self.composition_of_result is not None
        self.keep = _items(self.kept)
        self.forward, self.backward = getattr(ops, self.name).default, getattr(ops, f"{self.name}_backward").default
        self.eager_forward = getattr(ops, f"_{self.name}").default
        self.eager_backward = getattr(ops, f"_{self.name}_backward").default
        self.launch_forward, self.launch_backward = self.eager_forward._op, self.eager_backward._op

    forward: Any = dataclasses.field(init=False)
    backward: Any = dataclasses.field(init=False)
    eager_forward: Any = dataclasses.field(init=False)
    eager_backward: Any = dataclasses.field(init=False)
    launch_forward: Any = dataclasses.field(init=False)
    """What ``eager_forward`` calls, which is all that it does: a frame of Python for nothing."""
    launch_backward: Any = dataclasses.field(init=False)
    eager: Callable[..., Any] = dataclasses.field(init=False)
    transformable: Callable[..., tuple[Tensor, ...]] = dataclasses.field(init=False)
    """As ``eager``, from ``kpfused.autograd``."""
    differentiable: tuple[int, ...] = dataclasses.field(init=False)
    """Outputs with a gradient."""
    has_one_result: bool = dataclasses.field(init=False)
    """Of which a caller wants nothing else."""
    takes_result: bool = dataclasses.field(init=False)
    """Whether backward can take the result in place of the heatmap."""
    keep: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]] = dataclasses.field(init=False)
    """Of the outputs, those that backward reads."""

    @property
    def grads(self) -> int:
        return len(self.sizes) - len(self.constant)

    def dtype_of(self, output: int, heatmap: Tensor) -> torch.dtype:
        if self.sizes[output] is None:
            return heatmap.dtype
        return torch.int64 if output in self.pixels else accumulator_dtype(heatmap.dtype)

    def shape_of(self, output: int, heatmap: Tensor, setting: int) -> tuple[int, ...]:
        size, leading = self.sizes[output], list(heatmap.shape[:-2])
        if size is None:
            return tuple(heatmap.shape)
        if self.of_slices is not None and output not in self.of_slices:
            del leading[depth_dim(setting)]
        return (*leading, *size)


def _compose_soft_argmax2d(heatmap: Tensor, *settings: Any) -> tuple[Tensor, ...]:
    beta, keywords = settings_of_reference(*settings)
    return (reference.soft_argmax2d(heatmap, beta, **keywords),)


def _compose_spatial_moments2d(heatmap: Tensor, *settings: Any) -> tuple[Tensor, ...]:
    beta, keywords = settings_of_reference(*settings)
    return reference.spatial_moments2d(heatmap, beta, **keywords)


def depth_dim(setting: int) -> int:
    """Among leading dimensions, that of depth: the last, or before it where the setting of an op on volumes says so."""
    return -2 if setting < 0 else -1


def beta_of_volumes(beta: Tensor, setting: int) -> Tensor:
    """That of slices, which those of a volume share, without the dimension of depth."""
    depth = depth_dim(setting)
    return beta.select(depth, 0) if beta.dim() >= -depth else beta


def _compose_spatial_moments3d(
    heatmap: Tensor, beta: Tensor | None, beta_value: float, setting: int, *pixels: Any
) -> tuple[Tensor, ...]:
    mask, _, empty_value = (*pixels, None, None, None)[:3]
    if setting < 0:
        heatmap = heatmap.transpose(-3, -4)
        mask = None if mask is None else mask.transpose(-3, -4)
    each = beta_value if beta is None else beta_of_volumes(beta, setting)
    units = reference.COORDINATES[max(setting, ~setting)]
    return reference.spatial_moments3d(heatmap, each, coordinates=units, mask=mask, empty_value=empty_value)


def _compose_spatial_softmax2d(heatmap: Tensor, *settings: Any) -> tuple[Tensor, ...]:
    beta, keywords = settings_of_reference(*settings)
    del keywords["coordinates"]
    return (reference.spatial_softmax2d(heatmap, beta, **keywords).to(heatmap.dtype),)


def _compose_gradient_of_softmax(grad: Tensor, p: Tensor, stats: Tensor, *settings: Any) -> tuple[Tensor, ...]:
    """``beta P (g - sum of P g)``, and zero of pixels that do not count and of empty maps."""
    beta, keywords = settings_of_reference(*settings)
    counts = reference.counting(p, keywords["mask"], keywords["valid_size"])
    if counts is not None or keywords["empty_value"] is not None:
        left_out = (stats[..., 1] == 0)[..., None, None]  # the sum of weights
        left_out = left_out if counts is None else left_out | ~counts
        grad, p = grad.masked_fill(left_out, 0), p.masked_fill(left_out, 0)
    beta = beta[..., None, None] if isinstance(beta, Tensor) else beta
    return (beta * p * (grad - (p * grad).sum((-2, -1), keepdim=True)),)


def _compose_expectation2d(heatmap: Tensor, *settings: Any) -> tuple[Tensor, ...]:
    _, keywords = settings_of_reference(*settings)
    del keywords["empty_value"]
    return (reference.expectation2d(heatmap, **keywords),)


def _compose_window_mass2d(
    heatmap: Tensor, beta: Tensor | None, beta_value: float, window: int, *pixels: Any
) -> tuple[Tensor, ...]:
    beta_or_number, keywords = settings_of_reference(beta, beta_value, 0, *pixels)
    del keywords["coordinates"]
    around = "peak" if window < 0 else "mean"
    return (reference.window_mass(heatmap, abs(window), beta_or_number, around=around, **keywords),)


def settings_of_reference(
    beta: Tensor | None,
    beta_value: float,
    coordinates: int,
    mask: Tensor | None = None,
    valid_size: Tensor | None = None,
    empty_value: float | None = None,
) -> tuple[Tensor | float, dict[str, Any]]:
    return beta_value if beta is None else beta, {
        "coordinates": reference.COORDINATES[coordinates],
        "mask": mask,
        "valid_size": None if valid_size is None else (valid_size[..., 0], valid_size[..., 1]),
        "empty_value": empty_value,
    }


SOFT_ARGMAX2D = Kernel("soft_argmax2d", _compose_soft_argmax2d, sizes=((2,), (_STATS,)), constant=(1,), kept=(1,))
MOMENTS2D = Kernel(
    "spatial_moments2d",
    _compose_spatial_moments2d,
    sizes=((2,), (2, 2), (), (), (2,), (), (_MOMENT_STATS,)),
    constant=(_PEAK, 6),
    kept=(6, _PEAK),
    pixels=(_PEAK,),
)
# Of volumes (..., D, H, W); its setting: coordinates. Or of (..., D, K, H, W), as channels_last_3d has them in memory;
# its setting: ~coordinates, which is negative. Beta and mask are those of slices; there is no valid size. Behind the
# moments come the slices' stats, their peaks, and the volumes' stats.
MOMENTS3D = Kernel(
    "spatial_moments3d",
    _compose_spatial_moments3d,
    sizes=((3,), (3, 3), (), (), (3,), (), (_MOMENT_STATS,), (2,), (_VOLUME_STATS,)),
    constant=(_PEAK, 6, 7, 8),
    kept=(6, 7, 8),
    pixels=(_PEAK, 7),
    accepts=lambda setting: max(setting, ~setting) in range(len(reference.COORDINATES)),
    of_slices=(6, 7),
)
SOFTMAX2D = Kernel(
    "spatial_softmax2d",
    _compose_spatial_softmax2d,
    sizes=(None, (_STATS,)),
    constant=(1,),
    kept=(1,),
    composition_of_result=_compose_gradient_of_softmax,
)
# beta means nothing to it, and there are no stats to keep.
EXPECTATION2D = Kernel("expectation2d", _compose_expectation2d, sizes=((2,), (0,)), constant=(1,), kept=(1,))
# Its setting: pixels along a side of the window, an odd number, around the mean; negative, around the peak.
WINDOW_MASS2D = Kernel(
    "window_mass2d",
    _compose_window_mass2d,
    sizes=((), (_MOMENT_STATS,), (2,)),
    constant=(1, 2),
    kept=(0, 1, 2),
    pixels=(2,),
    accepts=lambda window: window % 2 == 1,
)
KERNELS = (SOFT_ARGMAX2D, MOMENTS2D, MOMENTS3D, SOFTMAX2D, EXPECTATION2D, WINDOW_MASS2D)


def foldable(tensor: Tensor, leading: torch.Size, trailing: int = 0) -> Tensor:
    """``tensor``, expanded where its own dimensions are not one run: ``(B, 1, K)`` against ``(B, T, K)``.

    ``trailing``: how many dimensions it has behind those that broadcast.
    """
    sizes = tensor.shape[: tensor.dim() - trailing]
    if _runs(size != 1 for size in sizes) <= 1:
        return tensor
    # A leading dimension of one interrupts nothing; asked for only where it matters, since it may be a symbol.
    whole = leading[len(leading) - len(sizes) :]
    if _runs(size != 1 for size, most in zip(sizes, whole, strict=True) if most != 1) <= 1:
        return tensor
    return tensor.expand(leading + tensor.shape[len(sizes) :])


def _runs(flags: Iterable[bool]) -> int:
    """How many stretches of true ones there are."""
    return sum(after and not before for before, after in itertools.pairwise((False, *flags)))
