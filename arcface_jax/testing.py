"""Checkers for the authors of plug-ins: one for each kind of part (docs/extending.md).

Each takes the part's name in a recipe, and raises an AssertionError that names the problem, or the
UserError that a run would end with. They need no GPU and take seconds:

    from arcface_jax.testing import check_loss

    def test_my_loss():
        check_loss("mypkg.losses:uniface")
"""

import math
import pickle
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from arcface_jax import plugins
from arcface_jax.config import DataConfig, HeadConfig, ModelConfig, OptimizerConfig
from arcface_jax.data import detectors, fingerprint, opening
from arcface_jax.data.detectors import Faces
from arcface_jax.data.images import IMAGE_SIZE, decode
from arcface_jax.data.synthetic.faces import draw_face
from arcface_jax.heads import centers as class_centers
from arcface_jax.heads import margin_softmax, margins
from arcface_jax.heads.margins import Margin, State
from arcface_jax.models import registry
from arcface_jax.models.registry import Arrays, Backbone
from arcface_jax.runtime import devices as meshes
from arcface_jax.training import optim

_IMAGE = (IMAGE_SIZE, IMAGE_SIZE, 3)
_THREADS = 8


def check_loss(name: str, head: HeadConfig | None = None) -> None:
    """Checks a loss: its functions in isolation, then in the real head against dense autodiff.

    Args:
      name: as `head.loss`.
      head: its other fields; by default the defaults.

    Raises:
      AssertionError: a value or gradient is not finite or has a wrong shape, `negatives_bound` or
        another flag is untrue, or the head's loss and gradient differ from the dense softmax's, on
        one device or on all.
      ConfigError: the loss does not exist, or refuses its options.
    """
    head = replace(head or HeadConfig(), loss=name)
    margin = margins.make(head)
    rng = np.random.default_rng(0)
    cosine = jnp.asarray(np.r_[-1, 1, 0, np.cos(rng.uniform(0, np.pi, 61))], jnp.float32)
    lengths = jnp.asarray(np.exp(rng.uniform(-3, 5, cosine.shape)), jnp.float32)
    state = _initial(margin)
    _check_margin(margin, cosine, lengths, state)
    if state:  # and the state during training
        _check_margin(margin, cosine, lengths, _check_update(margin, cosine, lengths, state))
    for count in sorted({1, _devices()}):
        _check_in_head(margin, replace(head, dtype="float32", block_size=16), devices=count)
    half = _run_head(replace(head, dtype="bfloat16", block_size=16), devices=1)
    _require_finite(half[0], "the loss with head.dtype bfloat16")


def _check_margin(margin: Margin, cosine: jax.Array, lengths: jax.Array, state: State) -> None:
    _check_elementwise(
        lambda z, norm: margin.target(z, norm, state), (cosine, lengths), what="target"
    )
    if margin.extra_loss is not None:
        _check_elementwise(margin.extra_loss, (lengths,), what="extra_loss")
    if not margin.uses_norms:
        target = jax.jit(lambda norm: margin.target(cosine, norm, state))
        _require_close(
            target(jnp.ones_like(lengths)),
            target(lengths),
            "target depends on the embeddings' lengths: set uses_norms=True",
        )
    if margin.negatives is not None:
        _check_negatives(margin, margin.negatives, cosine, state)


def _check_negatives(margin: Margin, negatives: Any, cosine: jax.Array, state: State) -> None:
    own = jnp.flip(cosine)[:, None]
    others = jnp.tile(cosine[None], (len(cosine), 1))

    @jax.jit
    def run(others: jax.Array, own: jax.Array) -> tuple[jax.Array, jax.Array]:
        value, vjp = jax.vjp(lambda z: negatives(z, own, state), others)
        return value, vjp(jnp.ones_like(value))[0]

    value, gradient = run(others, own)
    _require_like(value, others, "negatives")
    _require_finite(gradient, "the gradient of negatives")
    largest = float(value.max())
    _require(
        largest <= margin.negatives_bound + 1e-5,
        f"negatives returned {largest:.4f}, above negatives_bound {margin.negatives_bound}: exp() "
        "would overflow; state the largest value it can return",
    )
    if not margin.negatives_need_target:
        _require_close(
            run(others, jnp.zeros_like(own))[0],
            value,
            "negatives depends on the cosines with the own class: set negatives_need_target=True",
        )
    if not margin.negatives_need_state:
        moved = {name: value + 1 for name, value in state.items()}
        _require_close(
            jax.jit(negatives)(others, own, moved),
            value,
            "negatives depends on the state: set negatives_need_state=True",
        )


def _check_elementwise(function: Any, given: tuple[jax.Array, ...], *, what: str) -> None:
    """Checks a map from (B,) arrays to (B,): finite gradients, independent samples.

    A sample may depend on its place in the batch, as a margin drawn for each sample does.
    """

    @jax.jit
    def run(*given: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        value, vjp = jax.vjp(function, *given)
        return value, vjp(jnp.ones_like(value))

    value, gradients = run(*given)
    _require_like(value, given[0], what)
    for gradient in gradients:
        _require_finite(gradient, f"the gradient of {what}")
    for kept in (0, 1):
        others = (jnp.where(jnp.arange(len(x)) % 2 == kept, x, jnp.flip(x)) for x in given)
        changed, _ = run(*others)
        _require_close(
            changed[kept::2], value[kept::2], f"{what} of one sample depends on the others"
        )


def _check_update(margin: Margin, cosine: jax.Array, lengths: jax.Array, state: State) -> State:
    counts = jnp.arange(len(cosine)) % 4 > 0
    update = jax.jit(margin.update)
    moved = update(state, cosine, lengths, counts)
    _require(
        set(moved) == set(margin.initial_state),
        f"update returned the state {sorted(moved)}; expected {sorted(margin.initial_state)}",
    )
    for name, value in moved.items():
        _require_like(value, state[name], f"update's {name}")
    other = jnp.where(counts, cosine, 0.5)
    for name, value in update(state, other, lengths, counts).items():
        _require_close(value, moved[name], f"{name} depends on samples that do not count")
    for _ in range(100):
        moved = update(moved, jnp.abs(cosine), lengths, counts)
    return moved


_CLASSES, _BATCH, _SIZE = 43, 16, 8


def _check_in_head(margin: Margin, head: HeadConfig, *, devices: int) -> None:
    loss, gradient = _run_head(head, devices=devices)
    embeddings, labels, rows = _drawn(head)
    dense = partial(_dense_loss, margin=margin, head=head, labels=labels, rows=rows)
    expected, expected_gradient = jax.jit(jax.value_and_grad(dense))(embeddings)
    on = f"on {devices} device(s)"
    _require(
        math.isclose(loss, float(expected), rel_tol=1e-4, abs_tol=1e-4),
        f"{on} the head's loss is {float(loss):.6g}, dense softmax's {float(expected):.6g}",
    )
    largest = float(jnp.abs(expected_gradient).max())
    error = float(jnp.abs(gradient - expected_gradient).max())
    _require(
        error <= 1e-3 * max(largest, 1e-3),
        f"{on} the head's gradient of the embeddings differs from dense autodiff by {error:.2g} "
        f"(the largest entry is {largest:.2g})",
    )


def _run_head(head: HeadConfig, *, devices: int) -> tuple[jax.Array, jax.Array]:
    """Computes () loss and (B, D) gradient of the embeddings with the real head."""
    mesh = meshes.make(devices)
    embeddings, labels, rows = _drawn(head)
    padding = class_centers.padded_classes(_CLASSES, devices) * head.subcenters - len(rows)
    rows = jnp.pad(rows, ((0, padding), (0, 0)))
    optimizer = OptimizerConfig()
    moments = {name: jnp.zeros_like(rows) for name in class_centers.make_rule(optimizer).names}
    state = _initial(margins.make(head))
    out = jax.jit(
        partial(
            margin_softmax.apply,
            num_classes=_CLASSES,
            head=head,
            optimizer=optimizer,
            mesh=mesh,
        )
    )(
        embeddings,
        labels,
        margin_softmax.Centers(rows, moments, state),
        learning_rate=jnp.float32(0.1),
        step=jnp.int32(0),
        key=jax.random.key(0),
    )
    return out.loss, jax.device_get(out.d_embeddings)


def _drawn(head: HeadConfig) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Draws (B, D) embeddings, (B,) labels and (C * K, D) centers; most samples are near their
    class.
    """
    rng = np.random.default_rng(1)
    rows = rng.normal(size=(_CLASSES * head.subcenters, _SIZE))
    labels = rng.integers(0, _CLASSES, _BATCH)
    embeddings = 5 * (rows[labels * head.subcenters] + 0.7 * rng.normal(size=(_BATCH, _SIZE)))
    return (
        jnp.asarray(embeddings, jnp.float32),
        jnp.asarray(labels, jnp.int32),
        jnp.asarray(rows, jnp.float32),
    )


def _dense_loss(
    embeddings: jax.Array, *, margin: Margin, head: HeadConfig, labels: jax.Array, rows: jax.Array
) -> jax.Array:
    """Computes the definition: the mean of -log softmax over all classes at once."""
    norms = jnp.linalg.norm(embeddings, axis=1)
    unit = rows / jnp.linalg.norm(rows, axis=1, keepdims=True)
    product = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    by_center = product(embeddings / norms[:, None], unit.T)
    cosine = jnp.clip(by_center.reshape(_BATCH, _CLASSES, -1).max(axis=2), -1, 1)
    own = jnp.take_along_axis(cosine, labels[:, None], axis=1)[:, 0]
    known = jax.lax.stop_gradient(own)  # state and negatives receive a constant
    everyone = jnp.ones(_BATCH, bool)
    lengths = norms if margin.uses_norms else jnp.ones_like(norms)
    state = margin.update(_initial(margin), known, jax.lax.stop_gradient(lengths), everyone)
    target = margin.target(own, lengths, state)
    others = cosine if margin.negatives is None else margin.negatives(cosine, known[:, None], state)
    is_own = jnp.arange(_CLASSES)[None] == labels[:, None]
    logits = head.scale * jnp.where(is_own, target[:, None], others)
    loss = jax.nn.logsumexp(logits, axis=1) - head.scale * target
    if margin.extra_loss is not None:
        loss += margin.extra_loss(lengths)
    return loss.mean()


def _initial(margin: Margin) -> State:
    return {name: jnp.float32(value) for name, value in margin.initial_state.items()}


def check_network(name: str, model: ModelConfig | None = None) -> None:
    """Checks a network: its arrays, both modes, and its gradient, on four images.

    Args:
      name: as `model.network`.
      model: its other fields; by default the defaults.

    Raises:
      AssertionError: names, shapes or weights change from call to call; an embedding or gradient
        is not finite or not float32; an image's embedding depends on the others in evaluation, or
        in training on images of another BatchNorm group.
      ConfigError: the network does not exist, or has state that cannot be trained.
    """
    model = replace(model or ModelConfig(), network=name)
    build = partial(
        registry.build, name, embedding_size=model.embedding_size, options=model.options
    )
    network = build()
    params, batch_stats = _check_arrays(network, build())
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.uniform(-1, 1, (4, *_IMAGE)), jnp.float32)
    keys = jax.random.split(jax.random.key(0), len(images))
    size = (len(images), model.embedding_size)
    half = partial(build(dtype="bfloat16").apply, train=False)
    out, _ = jax.eval_shape(half, params, batch_stats, images)
    _require_form(out, size, "the embeddings with model.dtype bfloat16")
    with jax.default_matmul_precision("highest"):  # TF32 would differ from batch to batch
        _check_evaluation(network, params, batch_stats, images, size)
        _check_training(network, params, batch_stats, images, keys, size)
        _check_groups(build, params, batch_stats, images, keys)


def _check_arrays(network: Backbone, again: Backbone) -> tuple[Arrays, Arrays]:
    first, second, other = network.init(0), network.init(0), network.init(1)
    for kind, part, shapes, rebuilt in zip(
        ("parameters", "statistics"), first, network.shapes, again.shapes, strict=True
    ):
        _require(list(shapes) == list(rebuilt), f"the {kind}' names change from build to build")
        _require(set(part) == set(shapes), f"the {kind}' names depend on `init`")
        for name, array in part.items():
            _require(
                array.shape == shapes[name].shape and array.dtype == np.float32,
                f"{name} is {array.shape} {array.dtype}; expected {shapes[name].shape} float32",
            )
            _require_finite(array, name)
    _require(bool(first[0]), "the network has no parameters")
    same = all(np.array_equal(first[0][name], second[0][name]) for name in first[0])
    _require(same, "two initializations with one seed differ: draw from `init` only")
    differs = any(not np.array_equal(first[0][name], other[0][name]) for name in first[0])
    _require(differs, "the seed changes no parameter: draw the first weights from `init`")
    return first


def _check_evaluation(
    network: Backbone, params: Arrays, batch_stats: Arrays, images: jax.Array, size: tuple[int, int]
) -> None:
    evaluate = jax.jit(partial(network.apply, train=False))
    out, _ = evaluate(params, batch_stats, images)
    _require_array(out, size, "the embeddings in evaluation")
    black = images.at[1:].set(-1.0)
    _require_close(
        evaluate(params, batch_stats, black)[0][:1],
        out[:1],
        "in evaluation an image's embedding depends on the other images: pass train= to BatchNorm",
    )


def _check_training(
    network: Backbone,
    params: Arrays,
    batch_stats: Arrays,
    images: jax.Array,
    keys: jax.Array,
    size: tuple[int, int],
) -> None:
    def loss(params: Arrays) -> tuple[jax.Array, tuple[jax.Array, Arrays]]:
        out, moved = network.apply(params, batch_stats, images, train=True, keys=keys)
        weights = jnp.linspace(-1, 1, out.size).reshape(out.shape)
        return jnp.sum(out * weights), (out, moved)

    gradient, (out, moved) = jax.jit(jax.grad(loss, has_aux=True))(params)
    _require_array(out, size, "the embeddings in training")
    for name, array in gradient.items():
        _require_finite(array, f"the gradient of {name}")
    _require(
        any(bool(jnp.any(array != 0)) for array in gradient.values()),
        "the gradient is zero: the embeddings do not depend on the parameters",
    )
    _require(set(moved) == set(batch_stats), "training changes the names of the statistics")
    for name, array in moved.items():
        _require_like(array, jnp.asarray(batch_stats[name]), f"{name} after training")


def _check_groups(
    build: Any, params: Arrays, batch_stats: Arrays, images: jax.Array, keys: jax.Array
) -> None:
    one, two = (jax.jit(partial(build(bn_groups=n).apply, train=True)) for n in (1, 2))
    half = len(images) // 2
    apart = [
        one(params, batch_stats, images[part], keys=keys[part])[0]
        for part in (slice(half), slice(half, None))
    ]
    _require_close(
        two(params, batch_stats, images, keys=keys)[0],
        np.concatenate(apart),
        "with two BatchNorm groups the embeddings differ from two separate batches': pass "
        "bn_groups to every arcface_jax.models.layers.BatchNorm",
        tolerance=1e-3,
    )


def check_optimizer(name: str, optimizer: OptimizerConfig | None = None) -> None:
    """Checks an optimizer: the backbone's part and the centers'.

    Args:
      name: as `optimizer.kind`.
      optimizer: its other fields; by default the defaults.

    Raises:
      AssertionError: a gradient of zero without decay causes an update, an update is not finite or
        points uphill, the state changes its structure, or the centers' rule differs between
        block-wise and whole application.
      ConfigError: the optimizer does not exist, or it is not an `optim.Optimizer`.
    """
    optimizer = replace(optimizer or OptimizerConfig(), kind=name)
    still = replace(optimizer, weight_decay=0.0)
    _check_backbone_rule(optimizer, still)
    _check_centers_rule(optimizer, still)


def _check_backbone_rule(optimizer: OptimizerConfig, still: OptimizerConfig) -> None:
    rng = np.random.default_rng(0)
    shapes = {"fc.kernel": (6, 4), "fc.bias": (4,), "layer1.1-3.conv1.kernel": (3, 2, 2, 4, 4)}
    params, gradient = (
        {name: jnp.asarray(rng.normal(size=s), jnp.float32) for name, s in shapes.items()}
        for _ in range(2)
    )
    zero = jax.tree.map(jnp.zeros_like, gradient)
    without_decay: Any = optim.make_optimizer(still)
    first_update = jax.jit(without_decay.update)
    updates, _ = first_update(zero, without_decay.init(params), params)
    moved = [name for name, update in updates.items() if bool(jnp.any(update != 0))]
    _require(not moved, f"a gradient of zero moves {', '.join(moved)}, weight_decay being 0")
    downhill, _ = first_update(gradient, without_decay.init(params), params)
    rule: Any = optim.make_optimizer(optimizer)
    state = rule.init(params)
    form = jax.tree.map(lambda x: (jnp.shape(x), jnp.result_type(x)), state)
    update = jax.jit(rule.update)
    for _ in range(3):
        updates, state = update(gradient, state, params)
    _require(
        jax.tree.map(lambda x: (jnp.shape(x), jnp.result_type(x)), state) == form,
        "the state of the backbone's optimizer changes its shapes or types in a step",
    )
    for name, array in updates.items():
        _require_like(array, params[name], f"the update of {name}")
        _require(
            float(jnp.sum(downhill[name] * gradient[name])) > 0,
            f"the update of {name} is subtracted and points uphill: do not negate it, the "
            "learning rate comes later",
        )


def _check_centers_rule(optimizer: OptimizerConfig, still: OptimizerConfig) -> None:
    rng = np.random.default_rng(1)
    rows, gradient = jnp.asarray(rng.normal(size=(2, 12, 5)), jnp.float32)
    rate = jnp.float32(0.1)

    @partial(jax.jit, static_argnames="config")
    def follow(rows, moments, gradient, step, *, config: OptimizerConfig):
        rule = class_centers.make_rule(config)
        moments = rule.accumulate(rule.decay(moments, rows), gradient)
        return rule.apply(rows, moments, rate, step), moments

    def start(rows, config: OptimizerConfig):
        names = class_centers.make_rule(config).names
        return rows, {name: jnp.zeros_like(rows) for name in names}

    def run(rows, gradient, config: OptimizerConfig, steps: int = 3):
        rows, moments = start(rows, config)
        for step in range(steps):
            rows, moments = follow(rows, moments, gradient, jnp.int32(step), config=config)
        return rows, moments

    unmoved, _ = run(rows, jnp.zeros_like(gradient), still)
    _require_close(unmoved, rows, "a gradient of zero moves the centers, weight_decay being 0")
    whole, moments = run(rows, gradient, optimizer)
    expected = set(class_centers.make_rule(optimizer).names)
    _require(
        set(moments) == expected,
        f"decay and accumulate return {sorted(moments)}; the rule's names are {sorted(expected)}",
    )
    _require_like(whole, rows, "the centers after three steps")
    for name, moment in moments.items():
        _require_like(moment, rows, f"the moment {name}")
    for part in (slice(5), slice(5, None)):
        in_block, _ = run(rows[part], gradient[part], optimizer)
        _require_close(
            in_block,
            whole[part],
            "a block of centers moves differently than the whole: each part "
            "of the rule has to be element by element",
        )
    downhill, _ = run(rows, gradient, still, steps=1)
    _require(
        float(jnp.sum((rows - downhill) * gradient)) > 0,
        "the centers' rule moves them along the gradient instead of against it",
    )


def check_source(path: str, data: DataConfig | None = None, *, images: int = 32) -> None:
    """Checks a training set by reading images spread over it.

    Args:
      path: as `data.path`.
      data: its other fields; by default the defaults.
      images: largest number of images to read.

    Raises:
      AssertionError: a label is out of range; `labels`, `read`, `load` and indexing disagree; or
        another process or several threads read other images.
      UserError: the training set cannot be opened or read.
    """
    source = opening.open_source(replace(data or DataConfig(), path=path), seed=0)
    count, classes = len(source), source.num_classes
    _require(count > 0 and classes > 0, f"there are {count} images of {classes} identities")
    labels = source.labels()
    _require(
        labels.shape == (count,) and labels.dtype == np.int32,
        f"labels() is {labels.shape} {labels.dtype}; expected ({count},) int32",
    )
    _require(
        bool(np.all((labels >= -1) & (labels < classes))),
        f"labels() has values from {labels.min()} to {labels.max()}; expected 0 to {classes - 1} "
        "(-1 for an image that cannot be read)",
    )
    numbers = np.unique(np.linspace(0, count - 1, min(images, count)).astype(np.int64))
    read = [source[int(number)] for number in numbers]
    for number, (image, label) in zip(numbers.tolist(), read, strict=True):
        _check_sample(source, number, image, label, listed=int(labels[number]))
    _check_loading(source, numbers, read)
    copy = pickle.loads(pickle.dumps(source))
    _require_same(read, [copy[int(n)] for n in numbers], "a copy in another process (pickle)")
    different = fingerprint.differences(*map(fingerprint.of_source, (source, copy)))
    _require(not different, f"read() or facts() change from call to call: {', '.join(different)}")
    with ThreadPoolExecutor(_THREADS) as pool:
        together = list(pool.map(lambda n: source[int(n)], np.tile(numbers, 3)))
    for start in range(0, len(together), len(numbers)):
        part = together[start : start + len(numbers)]
        _require_same(read, part, "reading from several threads")


def _check_sample(source: Any, number: int, image: Any, label: int, *, listed: int) -> None:
    where = source.where(number)
    _require(isinstance(where, str) and bool(where), f"where({number}) is {where!r}, not a text")
    _require(
        isinstance(image, np.ndarray) and image.shape == _IMAGE and image.dtype == np.uint8,
        f"image {number} is {getattr(image, 'shape', type(image).__name__)} "
        f"{getattr(image, 'dtype', '')}; expected (112, 112, 3) uint8",
    )
    _require(
        0 <= label < source.num_classes,
        f"image {number} has the label {label}; expected 0 to {source.num_classes - 1}",
    )
    _require(
        listed == label, f"image {number} has the label {label}, but labels() returns {listed}"
    )
    sample = source.read(number)
    _require(
        sample.label == label,
        f"read({number}) has the label {sample.label}, but indexing returns {label}",
    )
    _require(
        np.array_equal(decode(sample.data, where=partial(source.where, number)), image),
        f"read({number}) returns another image than indexing",
    )


def _check_loading(source: Any, numbers: np.ndarray, read: list[tuple[np.ndarray, int]]) -> None:
    count = len(numbers)
    images = np.zeros((count, *_IMAGE), np.uint8)
    labels = np.full(count, -1, np.int32)
    rows = np.arange(count)[::-1].copy()  # differs from the order of the numbers
    failed = source.load(numbers, rows, images, labels)
    _require(not failed, f"load() cannot read {[str(error) for _, error in failed]}")
    loaded = [(images[row], int(labels[row])) for row in rows]
    _require_same(read, loaded, "load()")


def _require_same(
    expected: list[tuple[np.ndarray, int]], found: list[tuple[np.ndarray, int]], what: str
) -> None:
    for (image, label), (other, its_label) in zip(expected, found, strict=True):
        _require(
            label == its_label and np.array_equal(image, other),
            f"{what} returns another image or label than indexing",
        )


class _Stop(BaseException):
    """Raised between two batches by a run that is asked to stop."""


def check_evaluator(target: str, *, embedding_size: int = 32) -> None:
    """Checks an evaluator on a fixed random projection of the pixels.

    Args:
      target: as in `evaluation.targets`.
      embedding_size: D of the embeddings.

    Raises:
      AssertionError: it embeds something other than faces, returns anything but finite numbers by
        name, is not deterministic, or keeps a run from stopping.
      ConfigError: the evaluator does not exist.
    """
    reference = plugins.parse(target)
    _require(reference is not None, f"{target!r} is not package.module:name[:ARGUMENT]")
    assert reference is not None  # for the type checker
    evaluator = plugins.load(reference.name, field="evaluation.targets")
    weights = np.random.default_rng(0).normal(size=(math.prod(_IMAGE), embedding_size))

    def embed(images: np.ndarray) -> np.ndarray:
        _require(
            isinstance(images, np.ndarray) and images.shape[1:] == _IMAGE,
            f"embed was given {getattr(images, 'shape', type(images).__name__)}; expected "
            "(n, 112, 112, 3)",
        )
        _require(images.dtype == np.uint8, f"embed was given {images.dtype}; expected uint8")
        return ((images.reshape(len(images), -1) / 127.5 - 1) @ weights).astype(np.float32)

    def stopped(images: np.ndarray) -> np.ndarray:
        raise _Stop

    first, second = (evaluator(embed, reference.argument) for _ in range(2))
    _require(
        isinstance(first, Mapping) and bool(first),
        f"{target} returned {first!r}; expected numbers by name",
    )
    for name, value in first.items():
        _require(isinstance(name, str), f"{target} returned the name {name!r}; expected a text")
        _require(math.isfinite(float(value)), f"{target} returned {name} = {value}")
    _require(first == second, f"{target} returns {first} and then {second} for one network")
    try:
        evaluator(stopped, reference.argument)
    except _Stop:
        return
    raise AssertionError(
        f"{target} catches what embed raises, or does not embed: a run could not be stopped in it"
    )


def check_detector(name: str, image: np.ndarray | None = None) -> None:
    """Checks a face detector on one image and on a black one.

    Args:
      name: as `--detector`: `package.module:name`, or an ONNX file.
      image: (H, W, 3) uint8 RGB; by default a synthetic face, 180 pixels high and 160 wide.

    Raises:
      AssertionError: points are not finite or outside the image, the image is modified, or
        several threads find other points.
      UserError: the detector does not exist, or it returns another shape than (n, 5, 2).
    """
    detect = detectors.load(name)
    if image is None:
        image = np.zeros((180, 160, 3), np.uint8)
        image[30:142, 20:132] = draw_face(seed=0, identity=0, index=0)
    height, width = image.shape[:2]
    before = image.copy()
    faces: Faces = detect(image)
    _require(np.array_equal(image, before), f"{name} changes the image that it is given")
    _require_finite(faces.points, f"{name}'s points")
    points, size = faces.points.reshape(-1, 2), np.array([width, height])
    _require(
        bool(np.all((points >= 0) & (points < size))),
        f"{name} returned points outside the image of {width} x {height}; expected (x, y) pixels",
    )
    detect(np.zeros_like(image))
    with ThreadPoolExecutor(_THREADS) as pool:
        for other in pool.map(detect, [image] * _THREADS):
            same = np.array_equal(other.points, faces.points)
            _require(same, f"{name} finds other points when several threads call it")


def _devices() -> int:
    """Returns the largest power of two of the available devices, at most 8."""
    return 1 << (min(8, jax.device_count()).bit_length() - 1)


def _require(holds: bool, problem: str) -> None:
    if not holds:
        raise AssertionError(problem)


def _require_finite(array: Any, what: str) -> None:
    values = np.asarray(array, np.float32)
    bad = int(np.sum(~np.isfinite(values)))
    _require(bad == 0, f"{what}: {bad} of {values.size} values are not finite")


def _require_array(array: jax.Array, shape: tuple[int, ...], what: str) -> None:
    _require_form(array, shape, what)
    _require_finite(array, what)


def _require_form(array: Any, shape: tuple[int, ...], what: str) -> None:
    _require(
        array.shape == shape and array.dtype == jnp.float32,
        f"{what}: found {array.shape} {array.dtype}; expected {shape} float32",
    )


def _require_like(array: Any, like: jax.Array, what: str) -> None:
    _require_array(jnp.asarray(array), like.shape, what)


def _require_close(found: Any, expected: Any, problem: str, *, tolerance: float = 1e-4) -> None:
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    error = float(np.max(np.abs(found - expected), initial=0.0))
    largest = float(np.max(np.abs(expected), initial=1e-3))
    _require(
        error <= tolerance * largest, f"{problem} (by {error:.2g}, values up to {largest:.2g})"
    )
