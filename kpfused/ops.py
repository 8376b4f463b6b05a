# SPDX-License-Identifier: MIT
"""The compiled ops: fake kernels, autograd, vmap, and the way from a checked call to a kernel.

The only module that touches ``torch.ops.kpfused``. Functions here trust their arguments: ``kpfused.functional`` has
checked them. Every op comes as a :class:`_Kernel`, which says how its outputs and its backward go together; what
autograd and function transforms need is written once, for any of them.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import operator
import sys
import types
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from kpfused import _C, checks, reference
from kpfused.results import SpatialMoments
from kpfused.volume import merge_slices

# By names of their own: each dot of the way to them is a look into a dictionary, at every call.
is_compiling, transforms_active = torch.compiler.is_compiling, torch._C._are_functorch_transforms_active
_HAS_CUDA = bool(_C.build_info()["cuda"])
_PEAK, _FIELDS = SpatialMoments._fields.index("peak"), len(SpatialMoments._fields)
_STATS, _MOMENT_STATS = 4, 8  # kStats and kMomentStats of csrc/params.h


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of coordinates, stats and beta for maps of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def has_kernel(device_type: str) -> bool:
    """Whether this build has kernels for a device type such as ``"cuda"``."""
    return device_type == "cpu" or (device_type == "cuda" and _HAS_CUDA)


def _items(indices: tuple[int, ...]) -> Any:
    """Takes a tuple's items at ``indices``, as a tuple, and faster than a comprehension does."""
    return operator.itemgetter(*indices if len(indices) > 1 else (slice(indices[0], indices[0] + 1),))


@dataclasses.dataclass(eq=False)
class _Kernel:
    """A forward op and its backward op.

    ``forward(heatmap, beta, beta_value, setting, mask, valid_size, empty_value)`` returns its results and, behind them,
    what else backward keeps, such as the stats. ``setting`` is a number of the op's own: which coordinates, for most.
    ``backward(*grads, heatmap, *kept, beta, beta_value, setting, needs_grad_beta, mask, valid_size, empty_value)``
    takes a gradient for every differentiable result and returns those of heatmap and beta, one beta for every map.
    Arguments from mask on may be left out.

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
    pixel: int | None = None
    """The output that is a pixel, in integers."""
    accepts: Callable[[int], bool] = lambda coordinates: coordinates in range(len(reference.COORDINATES))
    """Whether the op's own setting can be."""

    def __post_init__(self) -> None:
        ops = torch.ops.kpfused
        # Once, since every call pays for it: looking an overload up costs as much as a small kernel.
        self.differentiable = tuple(i for i in range(len(self.sizes)) if i not in self.constant)
        self.has_one_result = self.differentiable == (0,)
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
    differentiable: tuple[int, ...] = dataclasses.field(init=False)
    """Outputs with a gradient."""
    has_one_result: bool = dataclasses.field(init=False)
    """Of which a caller wants nothing else."""
    keep: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]] = dataclasses.field(init=False)
    """Of the outputs, those that backward reads."""

    @property
    def grads(self) -> int:
        return len(self.sizes) - len(self.constant)

    def dtype_of(self, output: int, heatmap: Tensor) -> torch.dtype:
        if self.sizes[output] is None:
            return heatmap.dtype
        return torch.int64 if output == self.pixel else accumulator_dtype(heatmap.dtype)

    def shape_of(self, output: int, heatmap: Tensor) -> tuple[int, ...]:
        size = self.sizes[output]
        return tuple(heatmap.shape) if size is None else (*heatmap.shape[:-2], *size)


def _compose_soft_argmax2d(heatmap: Tensor, *settings: Any) -> tuple[Tensor, ...]:
    beta, keywords = settings_of_reference(*settings)
    return (reference.soft_argmax2d(heatmap, beta, **keywords),)


def _compose_spatial_moments2d(heatmap: Tensor, *settings: Any) -> tuple[Tensor, ...]:
    beta, keywords = settings_of_reference(*settings)
    return reference.spatial_moments2d(heatmap, beta, **keywords)


def _compose_spatial_softmax2d(heatmap: Tensor, *settings: Any) -> tuple[Tensor, ...]:
    beta, keywords = settings_of_reference(*settings)
    del keywords["coordinates"]
    return (reference.spatial_softmax2d(heatmap, beta, **keywords).to(heatmap.dtype),)


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


_SOFT_ARGMAX2D = _Kernel("soft_argmax2d", _compose_soft_argmax2d, sizes=((2,), (_STATS,)), constant=(1,), kept=(1,))
_MOMENTS2D = _Kernel(
    "spatial_moments2d",
    _compose_spatial_moments2d,
    sizes=((2,), (2, 2), (), (), (2,), (), (_MOMENT_STATS,)),
    constant=(_PEAK, 6),
    kept=(6, _PEAK),
    pixel=_PEAK,
)
_SOFTMAX2D = _Kernel("spatial_softmax2d", _compose_spatial_softmax2d, sizes=(None, (_STATS,)), constant=(1,), kept=(1,))
# beta means nothing to it, and there are no stats to keep.
_EXPECTATION2D = _Kernel("expectation2d", _compose_expectation2d, sizes=((2,), (0,)), constant=(1,), kept=(1,))
# Its setting: pixels along a side of the window, an odd number, around the mean; negative, around the peak.
_WINDOW_MASS2D = _Kernel(
    "window_mass2d",
    _compose_window_mass2d,
    sizes=((), (_MOMENT_STATS,), (2,)),
    constant=(1, 2),
    kept=(0, 1, 2),
    pixel=2,
    accepts=lambda window: window % 2 == 1,
)
_KERNELS = (_SOFT_ARGMAX2D, _MOMENTS2D, _SOFTMAX2D, _EXPECTATION2D, _WINDOW_MASS2D)


def soft_argmax2d(heatmap: Tensor, beta: Tensor | None, beta_value: float, coordinates: int, *pixels: Any) -> Tensor:
    """Soft-argmax of checked arguments.

    Args:
        heatmap: ``(..., H, W)``, floating point.
        beta: None, or a contiguous tensor in the accumulator dtype that broadcasts against the leading dimensions.
        beta_value: beta where ``beta`` is None.
        coordinates: index into ``reference.COORDINATES``.
        pixels: nothing where all pixels count; otherwise mask or None (bool, of the heatmap's shape), valid size or
            None (contiguous int64 ``(..., 2)``, height and width, leading dimensions as those of beta), and empty
            value or None.
    """
    return _call(_SOFT_ARGMAX2D, heatmap, beta, beta_value, coordinates, *pixels)[0]


def spatial_moments2d(
    heatmap: Tensor, beta: Tensor | None, beta_value: float, coordinates: int, *pixels: Any
) -> SpatialMoments:
    """Moments of checked arguments, which are those of :func:`soft_argmax2d`."""
    return SpatialMoments(*_call(_MOMENTS2D, heatmap, beta, beta_value, coordinates, *pixels)[:_FIELDS])


def spatial_softmax2d(heatmap: Tensor, beta: Tensor | None, beta_value: float, *pixels: Any) -> Tensor:
    """The softmax map of checked arguments, which are those of :func:`soft_argmax2d`."""
    return _call(_SOFTMAX2D, heatmap, beta, beta_value, 0, *pixels)[0]


def expectation2d(probabilities: Tensor, coordinates: int, *pixels: Any) -> Tensor:
    """Expected coordinates under probability maps, of checked arguments."""
    return _call(_EXPECTATION2D, probabilities, None, 1.0, coordinates, *pixels)[0]


def window_mass(
    heatmap: Tensor, size: int, around: str, beta: Tensor | None, beta_value: float, *pixels: Any
) -> Tensor:
    """Probability within a window, of checked arguments, which else are those of :func:`soft_argmax2d`."""
    return _call(_WINDOW_MASS2D, heatmap, beta, beta_value, -size if around == "peak" else size, *pixels)[0]


def spatial_moments3d(
    heatmap: Tensor,
    beta: Tensor | None,
    beta_value: float,
    coordinates: int,
    mask: Tensor | None,
    empty_value: float | None,
) -> SpatialMoments:
    """Moments of volumes ``(..., D, H, W)``, slice by slice; beta broadcasts against ``(..., D)``."""
    names = reference.COORDINATES
    number = beta_value if beta is None else beta
    if takes_composition(heatmap):
        each = number[..., 0] if isinstance(number, Tensor) else number
        settings = {"coordinates": names[coordinates], "mask": mask, "empty_value": empty_value}
        return reference.spatial_moments3d(heatmap, each, **settings)  # type: ignore[arg-type]
    # The dimension before depth goes behind it where it lies so in memory, as in channels_last_3d.
    swap = heatmap.dim() > 3 and heatmap.stride(-4) < heatmap.stride(-3)
    if swap:
        heatmap = heatmap.transpose(-3, -4)
        mask = None if mask is None else mask.transpose(-3, -4)
        beta = None if beta is None else _swapped(beta, heatmap.shape[:-2])
    *fields, stats = _call(_MOMENTS2D, heatmap, beta, beta_value, coordinates, mask, None, 0.0)
    if swap:
        depth_dim = heatmap.dim() - 4
        *fields, stats = (f.transpose(depth_dim, depth_dim + 1) for f in (*fields, stats))
    slices = SpatialMoments(*fields)
    if _is_distributed(stats):
        slices, stats = _distributed().with_whole_depth(slices, stats)
    z = reference.coordinate_axis(stats.shape[-2], names[coordinates], dtype=stats.dtype, device=stats.device)
    stats, z = together(stats, z)
    if isinstance(number, Tensor):
        stats, number = together(stats, number)
    if mask is not None and empty_value is None:
        empty_value = math.nan
    return merge_slices(slices, stats, number, z, empty_value)


def _swapped(beta: Tensor, leading: torch.Size) -> Tensor:
    if beta.dim() < 2:
        return beta
    return foldable(beta.transpose(-1, -2), leading).contiguous()


def _call(
    kernel: _Kernel, heatmap: Tensor, beta: Tensor | None, beta_value: float, setting: int, *pixels: Any
) -> tuple[Tensor, ...]:
    """The outputs of a kernel: all of them, or the results alone."""
    if takes_composition(heatmap):
        return kernel.composition(heatmap, beta, beta_value, setting, *pixels)
    settings = (beta_value, setting, *pixels)
    result: tuple[Tensor, ...]
    if transforms_active():
        result = kernel.transformable(heatmap, beta, *settings)
    elif not is_plain(heatmap, beta, pixels):
        heatmap, beta, *pixels = prepare_distributed(heatmap, beta, *pixels)
        result = kernel.forward(heatmap, beta, beta_value, setting, *pixels)
    elif is_compiling():
        result = kernel.forward(heatmap, beta, *settings)
    elif torch.is_grad_enabled() and (heatmap.requires_grad or (beta is not None and beta.requires_grad)):
        beta = None if beta is None else _unwrap_if_dead(beta)
        output = kernel.eager(_unwrap_if_dead(heatmap), beta, settings)
        result = (output,) if kernel.has_one_result else output
    else:
        result = kernel.launch_forward(heatmap, beta, *settings)
    return result


_unwrap_if_dead = torch._C._functorch.unwrap_if_dead  # of a tensor that outlived the transform it was made in


def takes_composition(heatmap: Tensor) -> bool:
    """Devices without a kernel, forward-mode derivatives, transforms inside a compiled graph, and export to ONNX."""
    # Not by its device: to make a device object costs as much as all other checks together.
    if not (heatmap.is_cpu or (heatmap.is_cuda and _HAS_CUDA) or heatmap.is_meta):
        if not is_compiling():
            _warn_of_slow_path(heatmap.device.type)
        return True
    if forward_ad._current_level >= 0:
        return True
    return is_compiling() and (transforms_active() or torch.onnx.is_in_onnx_export())


def is_plain(heatmap: Tensor, beta: Tensor | None, pixels: Sequence[Any]) -> bool:
    """Whether no tensor subclass has to see the op."""
    return (
        type(heatmap) in _PLAIN
        and (beta is None or type(beta) in _PLAIN)
        and (len(pixels) == 0 or all(tensor is None or type(tensor) in _PLAIN for tensor in pixels[:2]))
    )


_PLAIN = (Tensor, torch.nn.Parameter)


def prepare_distributed(*tensors: Any) -> Any:
    """heatmap, beta and pixels that are to meet in one op, all of them as ``DTensor`` where one is."""
    return _distributed().prepare(*tensors) if _is_distributed(*tensors[:4]) else tensors


def prepare_distributed_values(heatmap: Tensor, values: Tensor) -> Tensor:
    """Values beside a heatmap of :func:`prepare_distributed`."""
    prepared: Tensor = _distributed().prepare_values(heatmap, values) if _is_distributed(heatmap, values) else values
    return prepared


def _is_distributed(*tensors: Tensor | None) -> bool:
    """Whether one of them is a ``DTensor``; none is where its module is not loaded."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and module.DTensor in map(type, tensors)


def refuse_distributed(heatmap: Tensor) -> None:
    """Of second derivatives: function transforms of PyTorch's own operations give wrong numbers on a ``DTensor``."""
    if _is_distributed(heatmap):
        raise NotImplementedError("second derivatives of a heatmap that is a DTensor")


def _distributed() -> types.ModuleType:
    """The sharding rules, which it registers: slow to import."""
    from kpfused import distributed

    return distributed


def together(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors that are to meet in one operation: plain ones beside a ``DTensor`` are the same on all ranks."""
    result: tuple[Tensor, ...] = _distributed().together(*tensors) if _is_distributed(*tensors) else tensors
    return result


@functools.cache
def _warn_of_slow_path(device_type: str) -> None:
    if device_type == "cuda":
        warnings.warn(
            "kpfused was built without CUDA kernels; CUDA tensors take the slower PyTorch composition. "
            "Rebuild it with nvcc on PATH (see `python -m kpfused.info`).",
            stacklevel=6,
        )


# ---- Autograd -------------------------------------------------------------------------------------------------------


def _eager(kernel: _Kernel) -> Any:
    """The eager path. An autograd.Function in the classic form costs half of what ``register_autograd`` does.

    One for each kernel, and with all that is no tensor in one argument: every argument costs, and every attribute.
    """
    launch, keep, has_one_result = kernel.launch_forward, kernel.keep, kernel.has_one_result

    def forward(
        ctx: Any, heatmap: Tensor, beta: Tensor | None, settings: tuple[Any, ...]
    ) -> Tensor | tuple[Tensor, ...]:
        output: tuple[Tensor, ...] = launch(heatmap, beta, *settings)
        ctx.settings = settings if len(settings) == 2 else _without_tensors(settings)
        ctx.save_for_backward(heatmap, *keep(output), beta, *settings[2:4])
        if has_one_result:  # more of them cost twice: here, and where each is told of its gradient
            return output[0]
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*[output[i] for i in kernel.constant])
        return output

    methods = {"forward": staticmethod(forward), "backward": staticmethod(_backward_of(kernel, kernel.backward))}
    # What users read of a tensor's grad_fn, followed by Backward.
    name = "".join(map(str.capitalize, kernel.name.split("_")))
    function: Any = types.new_class(name, (torch.autograd.Function,), exec_body=lambda own: own.update(methods))
    # What the engine calls: it is torch's to look for backward, which compilers trace, and takes as long as a kernel.
    if hasattr(function, "_backward_cls"):
        function._backward_cls.apply = _backward_of(kernel, kernel.backward, kernel.launch_backward)
    # Without what Function.apply does first, which is to look for setup_context, and whether any argument at all
    # outlived a transform.
    return super(torch.autograd.Function, function).apply


def _keep(kernel: _Kernel, ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    heatmap, beta, *settings = inputs
    ctx.settings = _without_tensors(settings)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*[output[i] for i in kernel.constant])
    ctx.save_for_backward(heatmap, *kernel.keep(output), beta, *settings[2:4])


def _without_tensors(settings: Sequence[Any]) -> tuple[Any, ...]:
    """Mask and valid size are saved: what is kept beside them would be kept from hooks that send them elsewhere."""
    return *settings[:2], *[None] * len(settings[2:4]), *settings[4:]


def _backward_of(kernel: _Kernel, op: Any, launch: Any = None) -> Callable[..., tuple[Tensor | None, ...]]:
    """From gradients of the outputs to those of heatmap and beta, through a backward op.

    ``launch`` is the op where nothing is to be differentiated once more, and no compiler looks on.
    """
    differentiable, own = kernel.differentiable, 2 + len(kernel.kept)  # heatmap, what is kept, beta; then the pixels

    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if len(grads) > 1:
            grads = tuple([grads[i] for i in differentiable])
        settings = ctx.settings
        of_settings = [None] * len(settings)
        if grads[0] is None and all(grad is None for grad in grads):
            return None, None, *of_settings
        saved = ctx.saved_tensors
        of_beta = ctx.needs_input_grad[1]
        if forward_ad._current_level >= 0:  # forward over reverse: the kernels drop tangents
            sources = (saved[0], saved[own - 1])
            gradients = _composed_gradients(kernel, grads, *sources, *settings[:2], *saved[own:], *settings[4:])
        else:
            use = op if launch is None or torch.is_grad_enabled() else launch
            if len(saved) == own:  # all pixels count; slices that leave nothing out cost as much as those that do
                gradients = use(*grads, *saved, *settings, of_beta)
            else:
                gradients = use(*grads, *saved[:own], *settings[:2], of_beta, *saved[own:], *settings[4:])
        return gradients[0], _sum_to(gradients[1], saved[own - 1].shape) if of_beta else None, *of_settings

    return backward


def _sum_to(tensor: Tensor, shape: torch.Size) -> Tensor:
    """``sum_to_size``; surplus dimensions by a sum, as its view is more than a DTensor with a sharded 1 can do."""
    surplus = tuple(range(tensor.dim() - len(shape)))
    return (tensor.sum(surplus) if surplus else tensor).sum_to_size(shape)


def _composed_gradients(
    kernel: _Kernel, grads: tuple[Tensor | None, ...], heatmap: Tensor, beta: Tensor | None, *settings: Any
) -> tuple[Tensor, ...]:
    """What the backward op computes, in differentiable PyTorch; no second gradient where there is no beta tensor."""
    used = [i for i, grad in zip(kernel.differentiable, grads, strict=True) if grad is not None]

    def forward(heatmap: Tensor, beta: Tensor | None = None) -> tuple[Tensor, ...]:
        results = kernel.composition(heatmap, beta, *settings)
        return tuple(results[i] for i in used)

    sources = (heatmap,) if beta is None else (heatmap, beta.expand(heatmap.shape[:-2]))
    gradients: tuple[Tensor, ...] = torch.func.vjp(forward, *sources)[1](tuple(g for g in grads if g is not None))
    return gradients


def _keep_second(kernel: _Kernel, ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    grads, (heatmap, *rest) = inputs[: kernel.grads], inputs[kernel.grads :]
    beta, ctx.beta_value, ctx.setting, needs_grad_beta, *pixels = rest[len(kernel.kept) :]
    if not needs_grad_beta:
        ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(heatmap, beta, *grads, *pixels[:2])
    ctx.empty_value = pixels[2:]
    ctx.rest = (None,) * (3 + len(pixels))


def _second_gradients(
    kernel: _Kernel, ctx: Any, upstream_heatmap: Tensor | None, upstream_beta: Tensor | None
) -> tuple[Any, ...]:
    """Second derivatives, through the composition: rare enough not to need a kernel."""
    heatmap, beta, *saved = ctx.saved_tensors
    refuse_distributed(heatmap)
    grads, pixels = saved[: kernel.grads], (*saved[kernel.grads :], *ctx.empty_value)
    given = [i for i, grad in enumerate(grads) if grad is not None]
    inputs = (*(grads[i] for i in given), heatmap, *(() if beta is None else (beta,)))

    def first(*inputs: Tensor) -> tuple[Tensor, ...]:
        filled: list[Tensor | None] = [None] * len(grads)
        for i, grad in zip(given, inputs, strict=False):
            filled[i] = grad
        heatmap, *some_beta = inputs[len(given) :]
        settings = (ctx.beta_value, ctx.setting, *pixels)
        return _composed_gradients(kernel, tuple(filled), heatmap, some_beta[0] if some_beta else None, *settings)

    gradients, pull = torch.func.vjp(first, *inputs)  # type: ignore[misc]
    upstream = (upstream_heatmap, upstream_beta)[: len(gradients)]
    second = pull(tuple(torch.zeros_like(g) if u is None else u for g, u in zip(gradients, upstream, strict=True)))
    of_grads: list[Tensor | None] = [None] * len(grads)
    for i, grad in zip(given, second, strict=False):
        of_grads[i] = grad
    of_heatmap, *of_beta = second[len(given) :]
    return (*of_grads, of_heatmap, *(None,) * len(kernel.kept), of_beta[0] if of_beta else None, *ctx.rest)


def _transformable(kernel: _Kernel) -> Any:
    """The path of function transforms, in the form that they ask for. vmap runs each method once, on batched tensors:
    the rules of the ops below then fold the batch."""

    class Backward(torch.autograd.Function):
        generate_vmap_rule = True
        forward = staticmethod(kernel.eager_backward)
        setup_context = staticmethod(functools.partial(_keep_second, kernel))
        backward = staticmethod(functools.partial(_second_gradients, kernel))

    class Forward(torch.autograd.Function):
        generate_vmap_rule = True
        forward = staticmethod(kernel.eager_forward)
        setup_context = staticmethod(functools.partial(_keep, kernel))

        backward = staticmethod(_backward_of(kernel, Backward.apply))

    return Forward.apply


# ---- vmap -----------------------------------------------------------------------------------------------------------


def _batch_first(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    return tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def _align(tensor: Tensor, dim: int, leading: torch.Size, trailing: int) -> Tensor:
    """A batched tensor that broadcasts against the leading dimensions, its batch the first of them."""
    tensor = tensor.movedim(dim, 0)
    missing = len(leading) + trailing - tensor.dim()
    tensor = tensor.reshape(tensor.shape[0], *(1,) * missing, *tensor.shape[1:])
    return foldable(tensor, leading, trailing).contiguous()


def _fold_batch(size: int, dims: tuple[Any, ...], heatmap: Tensor, beta: Tensor | None, *pixels: Any) -> list[Any]:
    """heatmap, beta and pixels as the ops take them, with the dimension of vmap as the first leading one."""
    heatmap_dim, beta_dim, mask_dim, valid_size_dim, *_ = (*dims, None, None)
    heatmap = _batch_first(heatmap, heatmap_dim, size)
    leading = heatmap.shape[:-2]
    if beta is not None and beta_dim is not None:
        beta = _align(beta, beta_dim, leading, 0)
    mask, valid_size, empty_value = (*pixels, None, None, None)[:3]  # trailing defaults do not arrive
    if mask is not None:
        mask = _batch_first(mask, mask_dim, size)
    if valid_size is not None and valid_size_dim is not None:
        valid_size = _align(valid_size, valid_size_dim, leading, 1)
    return [heatmap, beta, mask, valid_size, empty_value]


def _vmap_forward(
    kernel: _Kernel, op: Any, info: Any, in_dims: tuple[Any, ...], heatmap: Tensor, beta: Any, *settings: Any
) -> Any:
    dims = (*in_dims[:2], *in_dims[4:])
    heatmap, beta, *pixels = _fold_batch(info.batch_size, dims, heatmap, beta, *settings[2:])
    return op(heatmap, beta, *settings[:2], *pixels), (0,) * len(kernel.sizes)


def _vmap_backward(kernel: _Kernel, op: Any, info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> Any:
    size, grads, kept = info.batch_size, kernel.grads, len(kernel.kept)
    beta_at = grads + 1 + kept
    dims = (in_dims[grads], in_dims[beta_at], *in_dims[beta_at + 4 :])
    heatmap, beta, *pixels = _fold_batch(size, dims, inputs[grads], inputs[beta_at], *inputs[beta_at + 4 :])

    def batched(begin: int, end: int) -> list[Any]:
        pairs = zip(inputs[begin:end], in_dims[begin:end], strict=True)
        return [None if tensor is None else _batch_first(tensor, dim, size).contiguous() for tensor, dim in pairs]

    settings = inputs[beta_at + 1 : beta_at + 4]
    result = op(*batched(0, grads), heatmap, *batched(grads + 1, beta_at), beta, *settings, *pixels)
    return result, (0, 0 if settings[-1] else None)


# ---- Fake kernels ---------------------------------------------------------------------------------------------------


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise RuntimeError(message)


def check_op(heatmap: Tensor, beta: Tensor | None) -> None:
    """What the kernels refuse, for graphs that call the ops without the checks of ``kpfused.functional``."""
    checks.check_heatmap(heatmap)
    if beta is not None:
        checks.check_broadcast("beta", beta, heatmap)
        fits = beta.dtype == accumulator_dtype(heatmap.dtype) and beta.is_contiguous()
        _require(fits, "beta must be contiguous and of the dtype of the coordinates")


def _check_call(kernel: _Kernel, heatmap: Tensor, beta: Tensor | None, setting: int) -> None:
    _require(kernel.accepts(setting), f"setting {setting} means nothing to {kernel.name}")
    check_op(heatmap, beta)


def _fake_forward(
    kernel: _Kernel, heatmap: Tensor, beta: Tensor | None, beta_value: float, setting: int, *pixels: Any
) -> tuple[Tensor, ...]:
    _check_call(kernel, heatmap, beta, setting)
    return tuple(
        torch.empty_like(heatmap)
        if size is None
        else heatmap.new_empty(kernel.shape_of(i, heatmap), dtype=kernel.dtype_of(i, heatmap))
        for i, size in enumerate(kernel.sizes)
    )


def _fake_backward(kernel: _Kernel, *inputs: Any) -> tuple[Tensor, Tensor]:
    grads, (heatmap, *rest) = inputs[: kernel.grads], inputs[kernel.grads :]
    beta, _, setting, needs_grad_beta, *_ = rest[len(kernel.kept) :]
    _check_call(kernel, heatmap, beta, setting)
    leading, dtype = heatmap.shape[:-2], accumulator_dtype(heatmap.dtype)
    for tensor, i in zip(rest, kernel.kept, strict=False):
        fits = tensor.is_contiguous() and tensor.shape == kernel.shape_of(i, heatmap)
        fits = fits and tensor.dtype == kernel.dtype_of(i, heatmap)
        _require(fits, f"{kernel.name}_backward must be given what {kernel.name} returned for this heatmap")
    for grad, i in zip(grads, kernel.differentiable, strict=True):
        fits = grad is None
        fits = fits or (grad.dtype == kernel.dtype_of(i, heatmap) and grad.shape == kernel.shape_of(i, heatmap))
        _require(fits, "gradients must have the shapes and dtype of the results")
    return torch.empty_like(heatmap), heatmap.new_empty(leading if needs_grad_beta else (0,), dtype=dtype)


# ---- Registration ---------------------------------------------------------------------------------------------------


def _register(kernel: _Kernel) -> None:
    kernel.eager, kernel.transformable = _eager(kernel), _transformable(kernel)

    bind = functools.partial
    library = torch.library
    setup = bind(_keep, kernel)
    library.register_autograd(kernel.forward, _backward_of(kernel, kernel.backward), setup_context=setup)
    library.register_autograd(
        kernel.backward, bind(_second_gradients, kernel), setup_context=bind(_keep_second, kernel)
    )
    for op in (kernel.forward, kernel.eager_forward):
        library.register_fake(op, bind(_fake_forward, kernel))
        library.register_vmap(op, bind(_vmap_forward, kernel, op))
    for op in (kernel.backward, kernel.eager_backward):
        library.register_fake(op, bind(_fake_backward, kernel))
        library.register_vmap(op, bind(_vmap_backward, kernel, op))


for _kernel in _KERNELS:
    _register(_kernel)


def _fake_window_mass_at(heatmap: Tensor, stats: Tensor, *_: Any) -> Tensor:
    return stats.new_empty(heatmap.shape[:-2])


# What is left to do of window_mass2d where the stats and the pixel are known: for parts of a map.
torch.library.register_fake("kpfused::_window_mass2d_at", _fake_window_mass_at)


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
