"""The layers that the backbones are made of. Images are (B, H, W, channels), parameters float32."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple, Protocol, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

FLOAT32 = jnp.dtype("float32")
_NHWC = ("NHWC", "HWIO", "NHWC")


class Initializer(Protocol):
    """Source of a layer's initial weights."""

    def normal(self, shape: tuple[int, ...], *, std: float) -> np.ndarray:
        """Returns float32 values of a normal distribution with mean 0."""
        ...

    def uniform(self, shape: tuple[int, ...], *, bound: float) -> np.ndarray:
        """Returns float32 values uniform in [-bound, bound)."""
        ...

    def rngs(self) -> nnx.Rngs:
        """Returns random streams for Flax's own layers: `nnx.Conv(..., rngs=init.rngs())`."""
        ...


class RandomInitializer:
    """Draws initial weights with NumPy: the same on every backend, and nothing to compile."""

    _rngs: nnx.Rngs | None

    def __init__(self, seed: int):
        self._rng = np.random.default_rng(seed)
        self._seed, self._rngs = seed, None

    def normal(self, shape: tuple[int, ...], *, std: float) -> np.ndarray:
        drawn = self._rng.standard_normal(shape, np.float32)
        drawn *= np.float32(std)  # in place: r2060 draws 4 GiB for one stack
        return drawn

    def uniform(self, shape: tuple[int, ...], *, bound: float) -> np.ndarray:
        return (self._rng.random(shape, np.float32) * 2 - 1) * np.float32(bound)

    def rngs(self) -> nnx.Rngs:
        """Returns one set of random streams for Flax's own layers, which every call continues."""
        if self._rngs is None:  # not before: making keys starts JAX's backend
            self._rngs = nnx.Rngs(self._seed)
        return self._rngs


class ShapeInitializer:
    """Draws nothing: for building a network whose weights are loaded afterwards."""

    def normal(self, shape: tuple[int, ...], *, std: float) -> np.ndarray:
        """Returns a view of one zero in that shape, float32."""
        return np.broadcast_to(np.float32(0), shape)

    def uniform(self, shape: tuple[int, ...], *, bound: float) -> np.ndarray:
        """Returns a view of one zero in that shape, float32."""
        return np.broadcast_to(np.float32(0), shape)

    def rngs(self) -> nnx.Rngs:
        """Returns streams for Flax's layers, whose values are not used."""
        return nnx.Rngs(0)


class Conv(nnx.Module):
    """A convolution, padded by half its kernel as torch's `padding=kernel//2`.

    Args:
      in_channels: channels of the input.
      out_channels: channels of the output.
      kernel: side of the square kernel.
      stride: step in both directions.
      groups: number of channel slices that are convolved separately.
      padded: whether to pad at all.
      std: standard deviation of the initial weights; IResNet uses 0.1.
      bias: whether to add a bias, initialized to 0.
      dtype: compute type.
      init: source of the initial weights.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        kernel: int,
        stride: int = 1,
        groups: int = 1,
        padded: bool = True,
        std: float = 0.1,
        bias: bool = False,
        dtype: jnp.dtype,
        init: Initializer,
    ):
        shape = (kernel, kernel, in_channels // groups, out_channels)
        self.kernel = nnx.Param(init.normal(shape, std=std))
        self.bias = nnx.Param(np.zeros((out_channels,), np.float32)) if bias else None
        self.dtype = dtype
        if groups > 1 or not padded:
            self.convolve = partial(
                _plain_conv, stride=stride, groups=groups, half=kernel // 2 if padded else 0
            )
        else:
            self.convolve = partial(_conv, stride)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.convolve(x.astype(self.dtype), self.kernel[...].astype(self.dtype))
        return y if self.bias is None else _add_bias(y, self.bias[...])


def _plain_conv(
    x: jax.Array, kernel: jax.Array, *, stride: int, half: int, groups: int = 1
) -> jax.Array:
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        [(half, half)] * 2,
        dimension_numbers=_NHWC,
        feature_group_count=groups,
    )


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _conv(stride: int, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Convolves, with custom gradients on CPUs, where the ones that JAX derives are slow."""
    return _plain_conv(x, kernel, stride=stride, half=len(kernel) // 2)


def _conv_forward(stride: int, x: jax.Array, kernel: jax.Array):
    return _plain_conv(x, kernel, stride=stride, half=len(kernel) // 2), (x, kernel)


def _conv_backward(stride: int, saved, d_out: jax.Array):
    return lax.platform_dependent(
        *saved,
        d_out,
        cpu=partial(_cpu_gradients, stride=stride),
        default=partial(_gradients_at_once, stride=stride),
    )


_conv.defvjp(_conv_forward, _conv_backward)


def _gradients(
    x: jax.Array, kernel: jax.Array, d_out: jax.Array, *, stride: int
) -> tuple[jax.Array, jax.Array]:
    """Returns the gradients of a convolution's input and kernel, as JAX derives them."""
    return jax.vjp(partial(_plain_conv, stride=stride, half=len(kernel) // 2), x, kernel)[1](d_out)


def _gradients_at_once(
    x: jax.Array, kernel: jax.Array, d_out: jax.Array, *, stride: int
) -> tuple[jax.Array, jax.Array]:
    """Returns the same gradients, tied together so that XLA computes both at the same time.

    Otherwise XLA:GPU computes the kernels' gradients at the end of the step: it keeps every `d_out`
    until then, and the devices cannot start to sum the gradients any earlier.
    """
    return lax.optimization_barrier(_gradients(x, kernel, d_out, stride=stride))


def _cpu_gradients(
    x: jax.Array, kernel: jax.Array, d_out: jax.Array, *, stride: int
) -> tuple[jax.Array, jax.Array]:
    """Returns the same gradients in forms that XLA's CPU backend runs fast.

    Inside a loop it runs convolutions fast only if channels come last in all operands; the derived
    ones are 70 times slower (github.com/jax-ml/jax/issues/12868). So at stride 1, the only stride
    in a stack, the input's gradient is a convolution with the rotated kernel; the kernel's gradient
    is not computed as a convolution.
    """
    if stride == 1:
        turned = jnp.flip(kernel, (0, 1)).swapaxes(2, 3)
        half = (len(kernel) - 1) // 2  # an even kernel's output is one pixel larger than its input
        d_x = _plain_conv(d_out, turned, stride=1, half=half)
    else:
        d_x, _ = _gradients(x, kernel, d_out, stride=stride)
    return d_x, _kernel_gradient_by_chunks(x, d_out, size=len(kernel), stride=stride)


def _kernel_gradient_by_chunks(
    x: jax.Array, d_out: jax.Array, *, size: int, stride: int
) -> jax.Array:
    """Computes the gradient of a convolution's kernel as a sum of small matrix products.

    On XLA's CPU backend its own form, a convolution whose window is the whole image, takes more
    than half of a training step. With a few images at a time the patches fit into the cache, and
    the product is 2 to 18 times faster (docs/benchmarks_appendix.md).

    Args:
      x: (B, H, W, channels in), the convolution's input.
      d_out: (B, h, w, channels out), the gradient of its output.
      size: side of the square kernel.
      stride: the convolution's stride.

    Returns:
      (size, size, channels in, channels out), in the type of x.
    """
    batch, height, width, channels = d_out.shape
    chunk = next(n for n in (4, 3, 2, 1) if batch % n == 0)
    x, d_out = (a.reshape(batch // chunk, chunk, *a.shape[1:]) for a in (x, d_out))
    padding = ((0, 0), *((size // 2, size // 2),) * 2, (0, 0))

    def add(i, total):
        image = jnp.pad(x[i], padding)
        taps = [
            image[:, row : row + stride * height : stride, col : col + stride * width : stride]
            for row in range(size)
            for col in range(size)
        ]
        patches = jnp.concatenate([tap[:, :height, :width] for tap in taps], axis=-1)
        gradient = d_out[i]
        return total + lax.dot_general(
            patches.reshape(-1, patches.shape[-1]),
            gradient.reshape(-1, channels),
            (((0,), (0,)), ((), ())),
            preferred_element_type=jnp.float32,
        )

    total = jnp.zeros((size * size * x.shape[-1], channels), jnp.float32)
    total = lax.fori_loop(0, batch // chunk, add, total)
    return total.reshape(size, size, x.shape[-1], channels).astype(x.dtype)


class _Kept(NamedTuple):
    """What the backward pass of `_normalize` needs besides the incoming gradient."""

    x: jax.Array
    """(slices, ..., channels) in the input's type; nothing of this size is kept in float32."""
    mean: jax.Array
    """(slices, 1, ..., channels) float32."""
    inverse: jax.Array
    """1 / sqrt(variance + epsilon), (slices, 1, ..., channels) float32."""
    factor: jax.Array
    """scale * inverse, (slices, 1, ..., channels) float32."""
    bias: jax.Array
    slope: jax.Array | None


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _normalize(
    epsilon: float,
    axis: str | None,
    x: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    slope: jax.Array | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Applies BatchNorm in training mode and, if a slope is given, PReLU, as one operation.

    The backward pass recomputes what it needs from x. The one that JAX derives would keep float32
    copies of the activations and read them several times.

    Args:
      epsilon: added to the variance.
      axis: mesh axis whose devices share a slice, if any.
      x: (slices, ..., channels).
      scale: (channels,) float32, like the following.
      bias: added after the scale.
      slope: of PReLU for negative values.

    Returns:
      The output, in the type of x, and the slices' mean and biased variance, (slices, 1, ...,
      channels) float32, through which no gradient flows.
    """
    return _normalize_forward(epsilon, axis, x, scale, bias, slope)[0]


def _normalize_forward(epsilon: float, axis: str | None, x, scale, bias, slope):
    mean, var = _statistics(x, axis)
    inverse = lax.rsqrt(var + epsilon)
    kept = _Kept(x, mean, inverse, _per_channel(scale, x) * inverse, bias, slope)
    y, _ = _affine(kept)
    if slope is not None:
        y = _prelu(y, slope)
    return (y.astype(x.dtype), mean, var), kept


def _normalize_backward(epsilon: float, axis: str | None, kept: _Kept, given):
    axes, count = _sliced(kept.x)
    # The barriers make each pass start from the stored arrays: otherwise XLA shares intermediate
    # results between passes, and stores them.
    x, d_y = lax.optimization_barrier((kept.x, given[0]))
    d_affine, centered, _ = _gradients_of_affine(kept._replace(x=x), d_y)
    total, along = _two_sums(d_affine, d_affine * centered, axes)
    d_bias, d_scale = (a.reshape(len(a), -1).sum(0) for a in (total, along * kept.inverse))
    total, along = total / count, along * jnp.square(kept.inverse) / count
    if axis:
        total, along = lax.pmean((total, along), axis)
    x, d_y, total, along = lax.optimization_barrier((x, d_y, total, along))
    d_affine, centered, d_slope = _gradients_of_affine(kept._replace(x=x), d_y)
    d_x = kept.factor * (d_affine - total - centered * along)
    if d_slope is not None:
        d_slope = d_slope.sum(axes).sum(0)
    return d_x.astype(x.dtype), d_scale, d_bias, d_slope


_normalize.defvjp(_normalize_forward, _normalize_backward)


def _statistics(x: jax.Array, axis: str | None) -> tuple[jax.Array, jax.Array]:
    """Returns mean and biased variance of each slice, (slices, 1, ..., channels) float32.

    float32 inputs are read twice, for the mean and for the distances to it. For other types one
    pass is enough: it sums the distances to the mean of a few of the channel's values, and their
    squares. Without that shift, or with a shift by the running statistics, which start at 0,
    rounding would destroy the variance of a channel whose mean is many standard deviations from 0.
    """
    axes, count = _sliced(x)
    if x.dtype == jnp.float32:
        mean = _over_devices(x.mean(axes, keepdims=True), axis)
        return mean, _over_devices(jnp.square(x - mean).mean(axes, keepdims=True), axis)
    middle = (slice(n // 2, n // 2 + 1) for n in x.shape[2:-1])
    few = x[(slice(None), slice(8), *middle)].astype(jnp.float32)
    # A single value might be far from the others. In the type of x, distances have few digits, and
    # the sums of their squares no bias from rounding.
    shift = few.mean(1, keepdims=True).astype(x.dtype).astype(jnp.float32)
    distance = x.astype(jnp.float32) - shift
    first, second = (a / count for a in _two_sums(distance, jnp.square(distance), axes))
    own, var = first + shift, jnp.maximum(second - jnp.square(first), 0)
    mean = _over_devices(own, axis)
    if axis:  # combine the devices' means and variances (Chan et al., 1979)
        var = _over_devices(var + jnp.square(own - mean), axis)
    return mean, var


def _two_sums(a: jax.Array, b: jax.Array, axes: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """Returns the sums of two float32 arrays of one shape; a GPU reads their common inputs once."""
    return lax.platform_dependent(
        a, b, cpu=partial(_separate_sums, axes=axes), default=partial(_complex_sums, axes=axes)
    )


def _separate_sums(a: jax.Array, b: jax.Array, *, axes: tuple[int, ...]):
    return a.sum(axes, keepdims=True), b.sum(axes, keepdims=True)


def _complex_sums(a: jax.Array, b: jax.Array, *, axes: tuple[int, ...]):
    # XLA:GPU splits two sums, and also a reduction with two operands: it writes their common inputs
    # and reads them again. A single complex sum cannot be split.
    total = lax.complex(a, b).sum(axes, keepdims=True)
    return total.real, total.imag


def _over_devices(statistics: jax.Array, axis: str | None) -> jax.Array:
    return lax.pmean(statistics, axis) if axis else statistics


def _sliced(x: jax.Array) -> tuple[tuple[int, ...], int]:
    """Returns the axes over which a slice's channel is reduced, and the number of its values."""
    return tuple(range(1, x.ndim - 1)), math.prod(x.shape[1:-1])


def _affine(kept: _Kept) -> tuple[jax.Array, jax.Array]:
    """Returns the normalized, scaled and shifted input, and the input minus its mean; float32."""
    centered = kept.x.astype(jnp.float32) - kept.mean
    return centered * kept.factor + _per_channel(kept.bias, kept.x), centered


def _gradients_of_affine(kept: _Kept, d_y: jax.Array):
    """Returns the gradient before PReLU, the input minus its mean, and the slope's summands."""
    d_y = d_y.astype(jnp.float32)
    y, centered = _affine(kept)
    if kept.slope is None:
        return d_y, centered, None
    slope = _per_channel(kept.slope, y)
    return jnp.where(y >= 0, d_y, slope * d_y), centered, jnp.minimum(y, 0) * d_y


def _per_channel(values: jax.Array, x: jax.Array) -> jax.Array:
    return values.reshape((1,) * (x.ndim - 1) + (-1,))


def _add_bias(y: jax.Array, bias: jax.Array) -> jax.Array:
    """Adds in float32, so that the bias's gradient is a float32 sum over the batch in every type of
    y.
    """
    return (y.astype(jnp.float32) + _per_channel(bias, y)).astype(y.dtype)


def _prelu(x: jax.Array, slope: jax.Array) -> jax.Array:
    return jnp.where(x >= 0, x, _per_channel(slope, x) * x)


class BatchNorm(nnx.Module):
    """Batch normalization as torch computes it, with float32 statistics over groups of images.

    In training the batch is cut into `groups` slices, each normalized by its own statistics; one
    slice per GPU equals insightface's BatchNorm. If `groups` is the name of a mesh axis, a single
    slice spans all its devices. The running statistics move by `momentum` towards the groups' mean,
    with the unbiased variance as in torch. If `frozen`, training also normalizes with the running
    statistics and does not update them. If `measured`, evaluation stores its batch's statistics in
    their place, without using them. The output has the input's type.
    """

    momentum = 0.1

    def __init__(
        self,
        channels: int,
        *,
        groups: int | str = 1,
        train_scale: bool = True,
        train_bias: bool = True,
        epsilon: float = 1e-5,
    ):
        scale, bias = np.ones((channels,), np.float32), np.zeros((channels,), np.float32)
        # insightface freezes the last layer's scale at 1, and AdaFace also its bias at 0: both are
        # then state, not parameters.
        self.scale = nnx.Param(scale) if train_scale else nnx.BatchStat(scale)
        self.bias = nnx.Param(bias) if train_bias else nnx.BatchStat(bias)
        self.mean: Any = nnx.BatchStat(np.zeros((channels,), np.float32))
        self.var: Any = nnx.BatchStat(np.ones((channels,), np.float32))
        self.groups, self.axis = (1, groups) if isinstance(groups, str) else (groups, None)
        self.epsilon = epsilon
        self.frozen = self.measured = False

    def __call__(
        self, x: jax.Array, *, train: bool, activation: "PReLU | None" = None
    ) -> jax.Array:
        """Normalizes x (B, ..., channels), and applies the activation, if given, in float32 too."""
        slope = activation.slope[...] if activation else None
        if self.frozen or not train:
            factor = self.scale[...] * lax.rsqrt(self.var[...] + self.epsilon)
            offset = self.bias[...] - self.mean[...] * factor
            y = x.astype(jnp.float32) * _per_channel(factor, x) + _per_channel(offset, x)
            if self.measured:
                self._measure(x.astype(jnp.float32))
            return (y if slope is None else _prelu(y, slope)).astype(x.dtype)
        grouped = x.reshape(self.groups, -1, *x.shape[1:])
        given = (grouped, self.scale[...], self.bias[...], slope)
        y, mean, var = cast("Any", _normalize(self.epsilon, self.axis, *given))
        devices = lax.axis_size(self.axis) if self.axis else 1
        count = devices * grouped.size // (self.groups * x.shape[-1])
        self._move(mean, var * (count / max(count - 1, 1)))
        return y.reshape(x.shape)

    def _measure(self, x: jax.Array) -> None:
        axes = tuple(range(x.ndim - 1))
        mean = x.mean(axes)
        self.var.set_value(jnp.square(x - _per_channel(mean, x)).mean(axes))
        self.mean.set_value(mean)

    def _move(self, mean: jax.Array, var: jax.Array) -> None:
        for running, batch in ((self.mean, mean), (self.var, var)):
            target = batch.reshape(self.groups, -1).mean(0)
            running.set_value(running[...] + self.momentum * (target - running[...]))


class PReLU(nnx.Module):
    """max(x, 0) + slope * min(x, 0), with one slope per channel, initialized to 0.25."""

    def __init__(self, channels: int):
        self.slope = nnx.Param(np.full((channels,), 0.25, np.float32))

    def __call__(self, x: jax.Array) -> jax.Array:
        return _prelu(x, self.slope[...].astype(x.dtype))


class Linear(nnx.Module):
    """x @ kernel + bias, over the last axis of x.

    Args:
      in_features: width of the input.
      out_features: width of the output.
      bias: "uniform" within 1 / sqrt(inputs) as in torch, "zero", or "none" for no bias.
      kernel: draws the initial weights; by default uniform within 1 / sqrt(inputs).
      dtype: compute type.
      init: source of the initial weights.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: Literal["uniform", "zero", "none"] = "uniform",
        kernel: Callable[[tuple[int, ...]], np.ndarray] | None = None,
        dtype: jnp.dtype = FLOAT32,
        init: Initializer,
    ):
        draw = partial(init.uniform, bound=1 / math.sqrt(in_features))
        self.kernel = nnx.Param((kernel or draw)((in_features, out_features)))
        zeros = partial(np.zeros, dtype=np.float32)
        self.bias = (
            None
            if bias == "none"
            else nnx.Param((draw if bias == "uniform" else zeros)((out_features,)))
        )
        self.dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(self.dtype) @ self.kernel[...].astype(self.dtype)
        return y if self.bias is None else _add_bias(y, self.bias[...])


class LayerNorm(nnx.Module):
    """Normalizes the last axis in float32, as torch does; the output has the input's type."""

    def __init__(self, features: int, *, epsilon: float = 1e-5):
        self.epsilon = epsilon
        self.scale = nnx.Param(np.ones((features,), np.float32))
        self.bias = nnx.Param(np.zeros((features,), np.float32))

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        y = y - y.mean(axis=-1, keepdims=True)
        y = y * lax.rsqrt(jnp.square(y).mean(axis=-1, keepdims=True) + self.epsilon)
        shape = (1,) * (x.ndim - 1) + (-1,)
        return (y * self.scale[...].reshape(shape) + self.bias[...].reshape(shape)).astype(x.dtype)
