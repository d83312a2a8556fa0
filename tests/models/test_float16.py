"""Networks that compute in float16: near float32, and float32 where the range is needed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arcface_jax import config as configs
from arcface_jax.config import Config
from arcface_jax.data.synthetic.faces import draw_face
from arcface_jax.models import preprocess, registry
from arcface_jax.models.layers import BatchNorm
from arcface_jax.training import step, validation

KEYS = jax.random.split(jax.random.key(0), 8)


def faces(count: int) -> np.ndarray:
    return np.stack([draw_face(seed=5, identity=i, index=0) for i in range(count)])


def relative(ours: np.ndarray, exact: np.ndarray) -> float:
    assert np.isfinite(ours).all()
    return float(np.linalg.norm(ours - exact) / np.linalg.norm(exact))


@pytest.mark.parametrize(
    "network",
    [
        "r_tiny",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("vit_t", "mbf", "edgeface_xs")),
    ],
)
def test_embeddings_in_training_are_near_those_of_float32(network):
    images = preprocess.normalize(jnp.asarray(faces(8)))
    found = []
    for dtype in ("float16", "float32"):
        backbone = registry.build(network, embedding_size=32, dtype=dtype)

        @jax.jit
        def run(params, batch_stats, backbone=backbone):
            return backbone.apply(params, batch_stats, images, train=True, keys=KEYS)

        embeddings, moved = run(*backbone.init(0))
        for array in (embeddings, *moved.values()):
            assert array.dtype == jnp.float32
        found.append(np.asarray(embeddings))
    error = relative(*found)
    print(network, error)
    assert error < 1e-2


@pytest.mark.slow  # quick are the embeddings above, and steps in float16 in test_skipping.py
@pytest.mark.parametrize("network", ["r_tiny", "mbf", "vit_t", "edgeface_xs"])
def test_gradients_are_nearer_to_those_of_float32_than_those_of_bfloat16(network):
    target = np.random.default_rng(0).normal(size=(8, 32)).astype(np.float32)
    images = preprocess.normalize(jnp.asarray(faces(8)))
    found = {}
    for dtype in ("float32", "float16", "bfloat16"):
        backbone = registry.build(network, embedding_size=32, dtype=dtype)

        @jax.jit
        @jax.grad
        def gradient(params, batch_stats, backbone=backbone):
            embeddings, _ = backbone.apply(params, batch_stats, images, train=True, keys=KEYS)
            return jnp.mean(embeddings * target)

        gradients = gradient(*backbone.init(0))
        assert all(array.dtype == jnp.float32 for array in gradients.values())
        found[dtype] = np.concatenate([np.ravel(gradients[name]) for name in sorted(gradients)])
    exact = found["float32"]
    errors = {dtype: relative(found[dtype], exact) for dtype in ("float16", "bfloat16")}
    print(network, errors)
    assert errors["float16"] < 0.5 * errors["bfloat16"]


def dtypes(network: str, primitive: str) -> list[str]:
    """The types that a primitive's operands have in the program of a network's inference."""
    backbone = registry.build(network, embedding_size=32, dtype="float16")
    images = jax.ShapeDtypeStruct((2, 112, 112, 3), jnp.float32)
    program = jax.make_jaxpr(lambda *given: backbone.apply(*given, train=False)[0])(
        *backbone.shapes, images
    )

    def visit(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name == primitive:
                yield str(equation.invars[0].aval.dtype)
            for value in equation.params.values():
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns"):
                    yield from visit(inner)

    return list(visit(program.jaxpr))


def test_what_stays_float32():
    # IResNet: fc. MobileFaceNet: conv_sep, the 7x7 convolution and the last linear layer.
    assert set(dtypes("r_tiny", "conv_general_dilated")) == {"float16"}
    assert dtypes("r_tiny", "dot_general") == ["float32"]
    convolutions = dtypes("mbf", "conv_general_dilated")
    assert convolutions[-2:] == ["float32"] * 2
    assert set(convolutions[:-2]) == {"float16"}
    assert dtypes("mbf", "dot_general") == ["float32"]
    # The patches, a block (qkv, both products of the attention, proj, fc1, fc2), the two features.
    half = ["float16"]
    expected = ["float32", *half, *["float32"] * 2, *half * 3, *["float32"] * 2]
    assert dtypes("vit_t", "dot_general") == expected
    assert dtypes("vit_t", "exp") == ["float32"]
    # EdgeFace: what the positions go through, and the last linear layer, which is two of low rank.
    assert sorted(dtypes("edgeface_xs", "conv_general_dilated")) == ["float16"] * 25 + ["float32"]
    products = dtypes("edgeface_xs", "dot_general")
    assert products[-2:] == ["float32"] * 2 and set(products[:-2]) == {"float16"}
    assert dtypes("edgeface_xs", "exp") == ["float32"] * 3


def test_statistics_of_large_values_do_not_overflow():
    """Squares of 300 do not fit into float16, nor does their sum."""
    x = jnp.asarray(300 + np.random.default_rng(0).normal(size=(64, 4, 4, 2))).astype(jnp.float16)
    module = BatchNorm(2)
    y = module(x, train=True)
    exact = np.asarray(x, np.float64)
    assert y.dtype == jnp.float16
    np.testing.assert_allclose(module.mean[...], 0.1 * exact.mean((0, 1, 2)), rtol=1e-5)
    expected = 0.9 + 0.1 * exact.var((0, 1, 2), ddof=1)
    np.testing.assert_allclose(module.var[...], expected, rtol=1e-4)


def test_a_configuration_may_ask_for_it():
    config = configs.replace(
        Config(),
        workdir="x",
        data__path="synthetic",
        model__network="r_tiny",
        model__dtype="float16",
    )
    validation.validate(config, num_devices=1)
    assert step.backbone(config).shapes[0]["conv1.kernel"].dtype == np.float32
