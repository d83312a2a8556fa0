"""Layers against torch's, in values, gradients and running statistics."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec as P

from arcface_jax.models import layers, registry
from arcface_jax.models.layers import BatchNorm, Conv, Linear, PReLU, RandomInitializer
from arcface_jax.runtime import devices as meshes


def images(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def channels_first(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array.transpose(0, 3, 1, 2).copy())


def channels_last(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().numpy().transpose(0, 2, 3, 1)


def conv(*, dtype: str = "float32", kernel: int = 3, stride: int = 1):
    options = {"dtype": jnp.dtype(dtype), "init": RandomInitializer(0)}
    return Conv(3, 5, kernel=kernel, stride=stride, **options)


# Batches that four, three, two or one image at a time divide; even and odd sizes; both kernels.
@pytest.mark.parametrize("batch", [8, 9, 2, 5])
@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (1, 1), (1, 2)])
@pytest.mark.parametrize("size", [8, 7])
def test_convolution_and_both_gradients_equal_torch(batch, kernel, stride, size):
    assert_equal_to_torch(batch, kernel, stride, size)


@pytest.mark.parametrize(("kernel", "stride"), [(2, 1), (4, 1), (2, 2)])
def test_even_kernels_have_the_gradients_of_torch(kernel, stride):
    assert_equal_to_torch(2, kernel, stride, 7)


def assert_equal_to_torch(batch: int, kernel: int, stride: int, size: int) -> None:
    module = conv(kernel=kernel, stride=stride)
    x = images(batch, size, size, 3)
    weights = np.asarray(module.kernel[...])
    twin = torch.nn.Conv2d(3, 5, kernel, stride, padding=kernel // 2, bias=False)
    twin.weight.data = torch.from_numpy(weights.transpose(3, 2, 0, 1).copy())
    torch_x = channels_first(x).requires_grad_()
    torch_y = twin(torch_x)
    d_y = images(*channels_last(torch_y).shape, seed=1)
    torch_y.backward(channels_first(d_y))

    graph, state = nnx.split(module)
    y, pull = jax.vjp(lambda state, x: nnx.merge(graph, state)(x), state, jnp.asarray(x))
    d_state, d_x = pull(jnp.asarray(d_y))
    np.testing.assert_allclose(y, channels_last(torch_y), atol=1e-5)
    np.testing.assert_allclose(d_x, channels_last(torch_x.grad), atol=1e-5)
    expected = twin.weight.grad.numpy().transpose(2, 3, 1, 0)
    np.testing.assert_allclose(d_state["kernel"][...], expected, atol=1e-4)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 1e-2)])
def test_gradients_in_a_loop_are_those_of_the_plain_convolution(dtype, tolerance):
    """Three convolutions in a scan, whose gradients a CPU computes in its own form."""
    x = jnp.asarray(images(6, 5, 7, 4)).astype(dtype)
    kernels = jnp.asarray(0.3 * images(3, 3, 3, 4, 4, seed=1)).astype(dtype)

    def plain(x, kernel):
        return lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    def scanned(x, kernels):
        def one(x, kernel):
            return layers._conv(1, x, kernel), None

        return lax.scan(one, x, kernels)[0]

    def unrolled(x, kernels):
        for kernel in kernels:
            x = plain(x, kernel)
        return x

    y, pull = jax.vjp(scanned, x, kernels)
    exact = [array.astype(jnp.float32) for array in (x, kernels)]
    expected, pull_exact = jax.vjp(unrolled, *exact)
    assert y.dtype == dtype
    d_y = jnp.asarray(images(*y.shape, seed=2)).astype(dtype)
    gradients = (y, *pull(d_y)), (expected, *pull_exact(d_y.astype(jnp.float32)))
    for ours, theirs in zip(*gradients, strict=True):
        assert ours.dtype == dtype
        error = jnp.linalg.norm(ours.astype(jnp.float32) - theirs) / jnp.linalg.norm(theirs)
        assert float(error) < tolerance


def test_convolution_computes_in_its_type_and_keeps_float32_parameters():
    module = conv(dtype="bfloat16")
    x = jnp.asarray(images(4, 8, 8, 3))
    graph, state = nnx.split(module)
    gradient = jax.grad(lambda s: nnx.merge(graph, s)(x).astype(jnp.float32).sum())(state)
    assert module(x).dtype == jnp.bfloat16
    assert module.kernel[...].dtype == np.float32
    assert gradient["kernel"][...].dtype == jnp.float32


@pytest.mark.parametrize("shape", [(6, 4, 5, 3), (6, 3)], ids=["images", "vectors"])
def test_batch_norm_equals_torch_in_training_and_evaluation(shape):
    module = BatchNorm(3)
    twin = torch.nn.BatchNorm1d(3) if len(shape) == 2 else torch.nn.BatchNorm2d(3)
    scale, bias = images(3, seed=5), images(3, seed=6)
    module.scale[...], module.bias[...] = jnp.asarray(scale), jnp.asarray(bias)
    twin.weight.data, twin.bias.data = torch.from_numpy(scale), torch.from_numpy(bias)
    to_torch = torch.from_numpy if len(shape) == 2 else channels_first
    from_torch = (lambda t: t.detach().numpy()) if len(shape) == 2 else channels_last
    for seed in range(3):
        x = 4 + 3 * images(*shape, seed=seed)
        y = module(jnp.asarray(x), train=True)
        np.testing.assert_allclose(y, from_torch(twin(to_torch(x))), atol=2e-6)
    np.testing.assert_allclose(module.mean[...], twin.running_mean, rtol=1e-6)
    np.testing.assert_allclose(module.var[...], twin.running_var, rtol=1e-6)  # unbiased
    y = module(jnp.asarray(x), train=False)
    np.testing.assert_allclose(y, from_torch(twin.eval()(to_torch(x))), atol=2e-5)


def test_groups_are_normalized_as_separate_batches():
    x = images(8, 4, 4, 3) * np.arange(1, 9)[:, None, None, None].astype(np.float32)
    grouped = BatchNorm(3, groups=2)
    y = grouped(jnp.asarray(x), train=True)
    halves = [BatchNorm(3), BatchNorm(3)]
    expected = [
        m(jnp.asarray(part), train=True) for m, part in zip(halves, (x[:4], x[4:]), strict=True)
    ]
    np.testing.assert_allclose(y, np.concatenate(expected), atol=1e-5)
    for name in ("mean", "var"):
        running = np.mean([getattr(m, name)[...] for m in halves], axis=0)
        np.testing.assert_allclose(getattr(grouped, name)[...], running, rtol=1e-5)


def test_statistics_stay_float32_where_activations_are_bfloat16():
    """A spread of 1 around 256 would be lost in the statistics, were they bfloat16."""
    module = BatchNorm(2)
    x = jnp.asarray(256 + images(64, 8, 8, 2)).astype(jnp.bfloat16)
    y = module(x, train=True)
    exact = np.asarray(x.astype(jnp.float32)).var((0, 1, 2), ddof=1)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(module.var[...], 0.9 + 0.1 * exact, rtol=1e-4)


def test_one_pass_keeps_the_variance_at_the_first_step(monkeypatch):
    """At 30 standard deviations from zero; running statistics as the shift would lose 2e-4 of it.

    Measured: 4e-7.
    """
    monkeypatch.setattr(BatchNorm, "momentum", 1.0)
    module = BatchNorm(8)
    x = jnp.asarray(30 + images(64, 14, 14, 8)).astype(jnp.bfloat16)
    module(x, train=True)
    exact = np.asarray(x, np.float64)
    np.testing.assert_allclose(module.var[...], exact.var((0, 1, 2), ddof=1), rtol=1e-6)
    np.testing.assert_allclose(module.mean[...], exact.mean((0, 1, 2)), rtol=1e-7)


def torch_norm(x, scale, bias, slope, d_y, *, groups: int):
    """Output and gradients of BatchNorm and PReLU by torch in float64, and mean and variance."""
    given = [torch.from_numpy(np.asarray(a, np.float64)) for a in (x, scale, bias, slope)]
    tensors = [tensor.requires_grad_() for tensor in given]
    parts, means, variances = [], [], []
    for part in tensors[0].chunk(groups):
        part = part.permute(0, 3, 1, 2)
        y = torch.nn.functional.batch_norm(part, None, None, *tensors[1:3], training=True)
        parts.append(torch.nn.functional.prelu(y, tensors[3]).permute(0, 2, 3, 1))
        means.append(part.detach().mean((0, 2, 3)))
        variances.append(part.detach().var((0, 2, 3)))  # unbiased
    y = torch.cat(parts)
    y.backward(torch.from_numpy(np.asarray(d_y, np.float64)))
    results = (y.detach(), *(tensor.grad for tensor in tensors))
    running = (torch.stack(part).mean(0) for part in (means, variances))
    return [tensor.numpy() for tensor in (*results, *running)]


def our_norm(x, scale, bias, slope, d_y, **options):
    """The same by the layers; the statistics as if the running ones had no past."""
    norm, prelu = BatchNorm(x.shape[-1], **options), PReLU(x.shape[-1])
    norm.momentum = 1.0
    graph, state = nnx.split((norm, prelu))

    def run(x, scale, bias, slope):
        norm, prelu = nnx.merge(graph, jax.tree.map(jnp.asarray, state))
        norm.scale[...], norm.bias[...], prelu.slope[...] = scale, bias, slope
        y = norm(x, train=True, activation=prelu)
        return y, (norm.mean[...], norm.var[...])

    @jax.jit
    def run_with_gradients(d_y, *given):
        y, vjp, moved = jax.vjp(run, *given, has_aux=True)
        return [y, *vjp(d_y), *moved]

    return run_with_gradients(d_y, x, scale, bias, slope)


def norm_example(dtype: str):
    """Input, scale, bias, slope and the output's gradient; the images differ in mean and spread."""
    spread = np.linspace(0.5, 2, 8, dtype=np.float32)[:, None, None, None]
    x = jnp.asarray(3 + spread * (images(8, 5, 6, 4) + spread)).astype(dtype)
    scale, bias, slope = (jnp.asarray(images(4, seed=seed)) for seed in (1, 2, 3))
    return x, scale, bias, slope, jnp.asarray(images(*x.shape, seed=4)).astype(dtype)


NORM_RESULTS = ("y", "d_x", "d_scale", "d_bias", "d_slope", "mean", "var")
# Of the largest value. What is rounded to the input's type in the end is as good as that type.
NORM_BOUNDS = {"float32": 2e-6, "float16": 5e-4, "bfloat16": 4e-3}


def assert_norm_equals(found, expected, dtype: str) -> None:
    for name, ours, exact in zip(NORM_RESULTS, found, expected, strict=True):
        in_type = name in ("y", "d_x")
        assert ours.dtype == (dtype if in_type else "float32"), name
        error = np.abs(np.asarray(ours, np.float64) - exact).max() / np.abs(exact).max()
        print(dtype, name, error)
        assert error < (NORM_BOUNDS[dtype] if in_type else 2e-6), name


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dtype", NORM_BOUNDS)
def test_batch_norm_with_prelu_has_torchs_gradients_in_float64(dtype, groups):
    example = norm_example(dtype)
    expected = torch_norm(*example, groups=groups)
    assert_norm_equals(our_norm(*example, groups=groups), expected, dtype)


@pytest.mark.parametrize("devices", [2, 8])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_batch_norm_over_devices_is_that_of_the_whole_batch(dtype, devices):
    """The devices' means differ, which is part of the variance over all of them."""
    example = norm_example(dtype)
    one, every = meshes.make(devices), P(meshes.AXIS)

    def run(*given):
        y, d_x, *gradients, mean, var = our_norm(*given, groups=meshes.AXIS)
        return y, d_x, *lax.psum(gradients, meshes.AXIS), mean, var

    specs = {
        "in_specs": (every, P(), P(), P(), every),
        "out_specs": (every, every, *([P()] * 5)),
    }
    found = jax.jit(jax.shard_map(run, mesh=one, check_vma=False, **specs))(*example)
    assert_norm_equals(found, torch_norm(*example, groups=1), dtype)


@pytest.mark.parametrize("frozen", [False, True], ids=["evaluation", "frozen"])
def test_running_statistics_normalize_before_prelu(frozen):
    x, scale, bias, slope, d_y = norm_example("float32")
    module, prelu = BatchNorm(4), PReLU(4)
    module.frozen = frozen
    mean, var, slope = 3 + images(4, seed=5), 1 + images(4, seed=6) ** 2, np.asarray(slope)
    for array, value in (
        *((module.scale, scale), (module.bias, bias), (prelu.slope, slope)),
        *((module.mean, mean), (module.var, var)),
    ):
        array[...] = jnp.asarray(value)
    y, vjp = jax.vjp(lambda x: module(x, train=frozen, activation=prelu), x)
    factor = np.asarray(scale, np.float64) / np.sqrt(var.astype(np.float64) + 1e-5)
    exact = (np.asarray(x, np.float64) - mean) * factor + np.asarray(bias)
    d_exact = factor * np.where(exact >= 0, 1, slope) * np.asarray(d_y)
    np.testing.assert_allclose(y, np.where(exact >= 0, exact, slope * exact), atol=1e-5)
    np.testing.assert_allclose(vjp(d_y)[0], d_exact, atol=1e-5)
    np.testing.assert_array_equal(module.mean[...], mean)


def test_two_sums_as_one_of_complex_numbers():
    """The form for GPUs."""
    a, b = images(2, 50, 7, 3), images(2, 50, 7, 3, seed=1)
    found = layers._complex_sums(jnp.asarray(a), jnp.asarray(b), axes=(1, 2))
    for ours, array in zip(found, (a, b), strict=True):
        exact = array.sum((1, 2), dtype=np.float64, keepdims=True)
        np.testing.assert_allclose(ours, exact, atol=1e-4)


def test_prelu_equals_torch():
    module, twin = PReLU(3), torch.nn.PReLU(3)
    slope = images(3, seed=2)
    module.slope[...] = jnp.asarray(slope)
    twin.weight.data = torch.from_numpy(slope)
    x = images(2, 4, 4, 3)
    np.testing.assert_allclose(module(jnp.asarray(x)), channels_last(twin(channels_first(x))))


def test_linear_is_initialized_within_torchs_bound():
    module = Linear(400, 300, init=RandomInitializer(0))
    for array in (module.kernel[...], module.bias[...]):
        assert np.abs(array).max() <= 0.05
        assert np.std(array) == pytest.approx(0.05 / np.sqrt(3), rel=0.1)


def test_convolutions_are_initialized_as_insightface_does():
    params, _ = registry.build("r18").init(0)
    kernel = params["layer4.1.conv1.kernel"]
    assert np.std(kernel) == pytest.approx(0.1, rel=0.01)
    assert abs(np.mean(kernel)) < 1e-3


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_the_gradient_of_a_bias_is_summed_in_float32(kind, dtype):
    """Summed in the layer's type, as JAX transposes an addition, it would be off by 4e-3."""
    init, compute = RandomInitializer(0), jnp.dtype(dtype)
    if kind == "linear":
        module, shape = Linear(4, 8, dtype=compute, init=init), (16_000,)
    else:
        module = Conv(4, 8, kernel=1, bias=True, dtype=compute, init=init)
        shape = (16, 25, 40)
    d = jnp.asarray(0.003 + 0.01 * images(*shape, 8), compute)
    graph, params = nnx.split(module)
    x = jnp.zeros((*shape, 4), compute)
    gradient = jax.vjp(lambda params: nnx.merge(graph, params)(x), params)[1](d)[0]
    exact = np.asarray(d, np.float64).reshape(-1, 8).sum(0)
    assert gradient["bias"][...].dtype == jnp.float32
    np.testing.assert_allclose(gradient["bias"][...], exact, rtol=1e-5)
