"""The checkers of `arcface_jax.testing`: built-in parts pass, and each kind of mistake is found."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from arcface_jax import plugins, testing
from arcface_jax.config import HeadConfig, ModelConfig, OptimizerConfig
from arcface_jax.data.source import Source
from arcface_jax.data.synthetic.source import SyntheticSource
from arcface_jax.errors import ConfigError, UserError
from arcface_jax.heads import centers
from arcface_jax.heads.margins import Margin
from arcface_jax.models.layers import BatchNorm
from arcface_jax.training import optim

HERE = __name__


def named(part) -> str:
    return f"{HERE}:{part.__name__}"


# ---- Losses --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "head",
    [
        pytest.param(
            HeadConfig(loss="curricularface", subcenters=2, scale=16.0), marks=pytest.mark.slow
        ),
        HeadConfig(loss="adaface", interclass_filtering_threshold=0.4),
    ],
    ids=lambda head: head.loss,
)
def test_built_in_losses_pass(head):
    testing.check_loss(head.loss, head)


def arccos_loss(head):
    return Margin(lambda z, norm, state: jnp.cos(jnp.arccos(z) + head.margin))


def loss_of_lengths(head):
    return Margin(lambda z, norm, state: z - 0.01 * norm)


def loss_across_the_batch(head):
    return Margin(lambda z, norm, state: z - 0.1 * z.mean())


def loss_beyond_its_bound(head):
    return Margin(lambda z, norm, state: z - head.margin, negatives=lambda z, own, state: 1.5 * z)


def loss_with_a_secret_need(head):
    return Margin(
        lambda z, norm, state: z, negatives=lambda z, own, state: jnp.where(z > own, 0.9 * z, z)
    )


def loss_that_loses_its_state(head):
    return Margin(lambda z, norm, state: z, initial_state={"t": 0.0}, update=lambda state, *_: {})


def loss_in_half_precision(head):
    return Margin(lambda z, norm, state: z.astype(jnp.bfloat16))


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (arccos_loss, "gradient of target: .* not finite"),
        (loss_of_lengths, "uses_norms=True"),
        (loss_across_the_batch, "depends on the others"),
        (loss_beyond_its_bound, r"1\.5000, above negatives_bound 1\.0"),
        (loss_with_a_secret_need, "negatives_need_target=True"),
        (loss_that_loses_its_state, r"returned the state \[\]; expected \['t'\]"),
        (loss_in_half_precision, "bfloat16; expected .* float32"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_mistakes_of_a_loss_are_found(make, problem):
    with pytest.raises(AssertionError, match=problem):
        testing.check_loss(named(make))


# ---- Networks ------------------------------------------------------------------------------------


class Net(nnx.Module):
    """One linear layer over the mean color of 7 x 7 fields."""

    def __init__(self, model, *, bn_groups, init):
        self.fc = nnx.Linear(3 * 16**2, model.embedding_size, rngs=init.rngs())
        self.features = BatchNorm(model.embedding_size, groups=bn_groups)

    def __call__(self, x, *, train, keys=None):
        x = x.reshape(len(x), 16, 7, 16, 7, 3).mean(axis=(2, 4)).reshape(len(x), -1)
        return self.features(self.fc(x), train=train)


class NetWithoutGroups(Net):
    """Takes the statistics of the whole batch."""

    def __init__(self, model, *, bn_groups, init):
        super().__init__(model, bn_groups=1, init=init)


class NetOfTheBatch(Net):
    """Normalizes by the batch in evaluation too."""

    def __call__(self, x, *, train, keys=None):
        return super().__call__(x - x.mean(axis=0, keepdims=True), train=train)


class NetWithoutSeed(Net):
    """The same weights for every seed."""

    def __init__(self, model, *, bn_groups, init):
        super().__init__(model, bn_groups=bn_groups, init=init)
        self.fc = nnx.Linear(3 * 16**2, model.embedding_size, rngs=nnx.Rngs(0))


class NetInHalfPrecision(Net):
    """Embeddings in bfloat16."""

    def __call__(self, x, *, train, keys=None):
        return super().__call__(x, train=train).astype(jnp.bfloat16)


class NetWithDropout(Net):
    """Keeps random streams of its own."""

    def __init__(self, model, *, bn_groups, init):
        super().__init__(model, bn_groups=bn_groups, init=init)
        self.dropout = nnx.Dropout(0.1, rngs=nnx.Rngs(0))


SMALL = ModelConfig(embedding_size=8)


def test_a_sound_network_passes():
    testing.check_network(named(Net), SMALL)


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (NetWithoutGroups, "pass bn_groups"),
        (NetOfTheBatch, "depends on the other images"),
        (NetWithoutSeed, "the seed changes no parameter"),
        (NetInHalfPrecision, r"\(4, 8\) bfloat16; expected \(4, 8\) float32"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_mistakes_of_a_network_are_found(make, problem):
    with pytest.raises(AssertionError, match=problem):
        testing.check_network(named(make), SMALL)


def test_state_that_cannot_be_trained_is_named():
    with pytest.raises(ConfigError, match=r"dropout\.rngs.*Draw what training draws"):
        testing.check_network(named(NetWithDropout), SMALL)


# ---- Optimizers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sgd", "lamb"])
def test_built_in_optimizers_pass(kind):
    testing.check_optimizer(kind)


def uphill(optimizer):
    return optim.sgd(optimizer)._replace(backbone=(optax.scale(-1.0),))


def restless(optimizer):
    return optim.sgd(optimizer)._replace(backbone=(optax.add_noise(1.0, 0.5, 0),))


def centers_by_norm(optimizer):
    """Divides by the norm of the whole block."""
    rule = centers.sgd_rule(optimizer)

    def apply(rows, moments, rate, steps):
        return rows - rate * moments["momentum"] / jnp.linalg.norm(moments["momentum"])

    return optim.sgd(optimizer)._replace(centers=rule._replace(apply=apply))


def centers_uphill(optimizer):
    rule = centers.sgd_rule(optimizer)

    def apply(rows, moments, rate, steps):
        return rows + rate * moments["momentum"]

    return optim.sgd(optimizer)._replace(centers=rule._replace(apply=apply))


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (uphill, "do not negate"),
        (restless, "a gradient of zero moves"),
        (centers_by_norm, "element by element|a gradient of zero moves the centers"),
        (centers_uphill, "along the gradient"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_mistakes_of_an_optimizer_are_found(make, problem):
    with pytest.raises(AssertionError, match=problem):
        testing.check_optimizer(named(make), OptimizerConfig(weight_decay=0.0))


# ---- Training sets -------------------------------------------------------------------------------


def test_a_built_in_source_passes():
    testing.check_source("synthetic", images=4)


class Shifted(SyntheticSource):
    """Labels from 1."""

    def labels(self):
        return super().labels() + np.int32(1)


class Contrary(SyntheticSource):
    """`labels` in another order than the images."""

    def labels(self):
        return super().labels()[::-1].copy()


class Unpicklable(SyntheticSource):
    """Another process gets another set."""

    def __reduce__(self):
        return drawn, (SyntheticSource, 1)


def drawn(kind, seed=0) -> Source:
    return kind(seed=seed, identities=3, images_per_identity=2)


def shifted(argument, data, *, seed):
    return drawn(Shifted)


def contrary(argument, data, *, seed):
    return drawn(Contrary)


def unpicklable(argument, data, *, seed):
    return drawn(Unpicklable)


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (shifted, "values from 1 to 3; expected 0 to 2"),
        (contrary, r"label 0, but labels\(\) returns 2"),
        (unpicklable, r"another process \(pickle\)"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_mistakes_of_a_source_are_found(make, problem):
    with pytest.raises(AssertionError, match=problem):
        testing.check_source(named(make))


# ---- Evaluators ----------------------------------------------------------------------------------

FACES = np.random.default_rng(0).integers(0, 256, (4, 112, 112, 3), np.uint8)


def sound(embed, argument):
    return {"spread": float(embed(FACES).std())}


def of_floats(embed, argument):
    return {"spread": float(embed(FACES / 255.0).std())}


def of_nothing(embed, argument):
    embed(FACES)
    return {}


def undefined(embed, argument):
    embed(FACES)
    return {"accuracy": float("nan")}


def unstoppable(embed, argument):
    try:
        return {"spread": float(embed(FACES).std())}
    except BaseException:
        return {"spread": 0.0}


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (of_floats, "embed was given float64; expected uint8"),
        (of_nothing, r"returned \{\}; expected numbers by name"),
        (undefined, "accuracy = nan"),
        (unstoppable, "could not be stopped"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_mistakes_of_an_evaluator_are_found(make, problem):
    testing.check_evaluator(named(sound))
    with pytest.raises(AssertionError, match=problem):
        testing.check_evaluator(named(make))


# ---- Detectors -----------------------------------------------------------------------------------


def outside(image):
    return np.full((1, 5, 2), 500.0)


def painting(image):
    image[:] = 0
    return np.zeros((0, 5, 2))


def shapeless(image):
    return np.zeros((2, 5))


@pytest.mark.parametrize(
    ("detect", "error", "problem"),
    [
        (outside, AssertionError, "outside the image of 160 x 180"),
        (painting, AssertionError, "changes the image"),
        (shapeless, UserError, r"shape \(2, 5\); expected \(n, 5, 2\)"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_mistakes_of_a_detector_are_found(detect, error, problem):
    with pytest.raises(error, match=problem):
        testing.check_detector(named(detect))


# ---- Names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "field", "words"),
    [
        ("arcfac", "head.loss", ["'arcfac'", "did you mean 'arcface'", "package.module:name"]),
        ("nowhere.losses:x", "head.loss", ["cannot import nowhere.losses", "PYTHONPATH"]),
        (f"{HERE}:arcos_loss", "head.loss", ["'arcos_loss'", "did you mean arccos_loss"]),
        (f"{HERE}:HERE", "head.loss", ["expected a function or class, found str"]),
        ("a b:c", "data.path", ["expected package.module:name"]),
    ],
)
def test_a_name_that_leads_nowhere(name, field, words):
    with pytest.raises(ConfigError) as error:
        plugins.load(name, field=field)
    assert [word for word in words if word not in str(error.value)] == []


def test_every_built_in_name_leads_to_its_part():
    for field, parts in plugins.BUILT_IN.items():
        for name in parts:
            assert callable(plugins.load(name, field=field)), name


def test_options_are_for_parts_of_ones_own():
    with pytest.raises(ConfigError, match=r"head\.options t 0\.2: the built-in arcface takes no"):
        plugins.load("arcface", field="head.loss", options=(("t", 0.2),))
    assert plugins.settings((("t", 0.2),), t=0.1, k=3.0) == {"t": 0.2, "k": 3.0}
    with pytest.raises(ConfigError, match=r"unknown options 'tt' in .*this part takes t, k.*'t'"):
        plugins.settings((("tt", 0.2),), t=0.1, k=3.0)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.b:c", ("a.b:c", "")),
        ("a:c:/data/x:y", ("a:c", "/data/x:y")),
        *((f"{name}:images", None) for name in ("pairs.txt", "p.tsv", "p.lst", "PAIRS.CSV")),
        (f"a:c:{'x' * 300}", ("a:c", "x" * 300)),
        ("lfw.bin", None),
        ("/data/train", None),
        ("synthetic", None),
    ],
)
def test_what_is_a_reference_to_a_part(text, expected):
    assert plugins.parse(text) == expected


def test_a_file_of_that_name_is_not_a_part(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a:b").mkdir()
    assert plugins.parse("a:b") is None
