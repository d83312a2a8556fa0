"""Compare the head with what it replaces: time and memory of one step of the class centers.

Methods: `data parallel` keeps all centers on every device and reduces their gradient; `model
parallel` splits them and stores its part of the logits; `blocked` is this project's head over all
classes, `partial fc R` over a share R of them. The first two are dense softmax in its fastest form:
one jit, donated arrays, the target's cosine by index, no maximum before exp().
"""

from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from arcface_jax.config import Dtype, HeadConfig, OptimizerConfig
from arcface_jax.errors import ConfigError
from arcface_jax.heads import margin_softmax, partial_fc
from arcface_jax.heads.block_forms import normalize
from arcface_jax.heads.centers import Rule, make_rule, padded_classes
from arcface_jax.heads.margin_softmax import Centers
from arcface_jax.machine import timing
from arcface_jax.runtime import devices as meshes

METHODS = ("data parallel", "model parallel", "blocked", "partial fc 0.3", "partial fc 0.1")
DENSE = ("data parallel", "model parallel")
"""Ratios of time and memory are relative to the better of these."""

_SCALE, _MARGIN, _RATE = 64.0, 0.4, 0.1


class Case(NamedTuple):
    """One size of the problem."""

    classes: int
    batch: int
    """Batch size over all devices."""
    devices: int
    size: int = 512
    """Length of the embedding."""
    dtype: Dtype = "float32"
    block_size: int = 0
    block_form: Literal["automatic", "unit", "scaled", "powers"] = "automatic"
    optimizer: Literal["sgd", "adamw"] = "sgd"


class Measurement(NamedTuple):
    """One method on one case."""

    method: str
    classes: int
    batch: int
    devices: int
    temporary_bytes: int
    """Temporary bytes on each device, besides the arguments; from the compiled program."""
    argument_bytes: int
    """Argument bytes on each device: centers, moments, embeddings, labels."""
    seconds: float | None
    """Median time of a step; None if the case does not fit into this machine's memory."""
    flops_per_second: float | None
    """FLOP/s for the three matrix products of a dense step on all devices, whatever the method."""
    time_ratio: float | None = None
    memory_ratio: float | None = None


class Compiled(NamedTuple):
    """A compiled method."""

    run: Callable
    """(embeddings, labels, rows, moments, step) -> (loss, d_embeddings, rows, moments)."""
    temporary_bytes: int
    argument_bytes: int


def measure(case: Case, *, methods: tuple[str, ...], repeats: int) -> list[Measurement]:
    """Compiles every method, and times those that fit, in turn.

    Args:
      case: the size.
      methods: some of METHODS.
      repeats: timed steps of each.
    """
    compiled = {name: compile_method(name, case) for name in methods}
    kept = max(method.argument_bytes + method.temporary_bytes for method in compiled.values())
    # When data parallel is timed, both the shards and full copies on every device are in memory.
    copies = 2 if "data parallel" in methods else 1
    seconds: dict[str, float] = {}
    if copies * kept * case.devices < 0.9 * timing.free_memory():
        seconds = timing.in_turn(_steppers(compiled, case), repeats=repeats)
    rows = [
        Measurement(
            name,
            case.classes,
            case.batch,
            case.devices,
            method.temporary_bytes,
            method.argument_bytes,
            seconds.get(name),
            dense_flops(case) / seconds[name] if seconds else None,
        )
        for name, method in compiled.items()
    ]
    return rows


def dense_flops(case: Case) -> int:
    """Returns the operations of a dense step's three matrix products: logits and two gradients."""
    return 6 * case.batch * case.size * case.classes


def beside_dense(rows: list[Measurement]) -> list[Measurement]:
    """Returns the measurements of one case, with ratios to the best dense one among them."""
    dense = [row for row in rows if row.method in DENSE]
    if not dense:
        return rows
    memory = min(row.temporary_bytes for row in dense)
    seconds = min((row.seconds for row in dense if row.seconds), default=None)
    return [
        row._replace(
            time_ratio=row.seconds / seconds if row.seconds and seconds else None,
            memory_ratio=row.temporary_bytes / memory,
        )
        for row in rows
    ]


def check(methods: tuple[str, ...], batches: tuple[int, ...], devices: tuple[int, ...]) -> None:
    """Raises ConfigError for an unknown method, or a batch that the devices cannot share."""
    for name in methods:
        if name not in METHODS:
            raise ConfigError(f"unknown method {name!r}: use some of {', '.join(METHODS)}")
    for batch in batches:
        for count in devices:
            if count < 1 or batch < 1 or batch % count:
                raise ConfigError(
                    f"batch {batch} cannot be divided by {count} devices: use multiples of it"
                )


def stepper(name: str, compiled: Compiled, case: Case) -> Callable[[], object]:
    """Returns a function that does one step of a method, on random embeddings and centers."""
    return _steppers({name: compiled}, case)[name]


def _steppers(compiled: dict[str, Compiled], case: Case) -> dict[str, Callable]:
    """Makes functions that do one step each; methods that split the centers share one set."""
    mesh = meshes.make(case.devices)
    split, everywhere = meshes.split(mesh), meshes.replicated(mesh)
    key = jax.random.key(0)
    shape = (padded_classes(case.classes, case.devices), case.size)
    embeddings = jax.jit(
        partial(jax.random.normal, shape=(case.batch, case.size)), out_shardings=split
    )(key)
    labels = jax.device_put(jax.random.randint(key, (case.batch,), 0, case.classes), split)
    draw = partial(jax.random.normal, key, shape)
    held = {}
    for sharding in {_placed(name, split, everywhere) for name in compiled}:
        rows = jax.jit(draw, out_shardings=sharding)()
        zeros = jax.jit(jnp.zeros_like, out_shardings=sharding)
        held[sharding] = [rows, {name: zeros(rows) for name in _rule(case).names}]
    count = iter(range(10**9))

    def step(name: str):
        state = held[_placed(name, split, everywhere)]
        loss, d_embeddings, *state[:] = compiled[name].run(
            embeddings, labels, *state, jax.device_put(jnp.int32(next(count)), everywhere)
        )
        return loss, d_embeddings, state

    return {name: partial(step, name) for name in compiled}


def _placed(name: str, split: NamedSharding, everywhere: NamedSharding) -> NamedSharding:
    return everywhere if name == "data parallel" else split


def compile_method(name: str, case: Case) -> Compiled:
    """Compiles one of METHODS from shapes only."""
    mesh = meshes.make(case.devices)
    split, everywhere = meshes.split(mesh), meshes.replicated(mesh)
    centers = _placed(name, split, everywhere)
    rows = padded_classes(case.classes, case.devices)
    stored = jax.ShapeDtypeStruct((rows, case.size), jnp.float32, sharding=centers)
    step = (_dense if name in DENSE else _sharded)(name, case, mesh)
    compiled = (
        jax.jit(step, donate_argnums=(2, 3), out_shardings=(everywhere, split, centers, centers))
        .lower(
            jax.ShapeDtypeStruct((case.batch, case.size), jnp.float32, sharding=split),
            jax.ShapeDtypeStruct((case.batch,), jnp.int32, sharding=split),
            stored,
            dict.fromkeys(_rule(case).names, stored),
            jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere),
        )
        .compile()
    )
    memory = compiled.memory_analysis()
    assert memory is not None  # all of JAX's backends report it
    return Compiled(compiled, memory.temp_size_in_bytes, memory.argument_size_in_bytes)


def _sharded(name: str, case: Case, mesh: Mesh) -> Callable:
    """Makes this project's head."""
    rate = 1.0 if name == "blocked" else float(name.removeprefix("partial fc "))
    head = HeadConfig(
        loss="cosface",
        margin=_MARGIN,
        scale=_SCALE,
        dtype=case.dtype,
        sample_rate=rate,
        block_size=case.block_size,
        block_form=case.block_form,
    )

    def step(embeddings, labels, rows, moments, step):
        out = margin_softmax.apply(
            embeddings,
            labels,
            Centers(rows, moments, {}),
            learning_rate=jnp.float32(_RATE),
            step=step,
            key=jax.random.fold_in(jax.random.key(0), step),
            num_classes=case.classes,
            head=head,
            optimizer=OptimizerConfig(kind=case.optimizer),
            mesh=mesh,
        )
        return out.loss, out.d_embeddings, out.centers.rows, out.centers.moments

    return step


def _dense(name: str, case: Case, mesh: Mesh) -> Callable:
    """Makes all logits of the batch (data parallel: a device's images; model parallel: its
    classes).
    """
    by_image, everywhere = meshes.split(mesh), meshes.replicated(mesh)
    product = partial(
        jnp.matmul,
        precision=timing.precision(case.dtype),
        preferred_element_type=jnp.float32,
    )

    def loss(embeddings, rows, labels):
        x, u = (normalize(a)[0] for a in (embeddings, rows))
        placed = by_image if name == "data parallel" else everywhere
        x = jax.lax.with_sharding_constraint(x, placed)
        target = jnp.sum(x * u[labels], axis=1)
        logits = _SCALE * product(x.astype(case.dtype), u.T.astype(case.dtype))
        number = jnp.arange(len(u))[None]
        others = (number != labels[:, None]) & (number < case.classes)
        log_others = jnp.log(jnp.sum(jnp.where(others, jnp.exp(logits), 0), axis=1))
        return jnp.mean(jax.nn.softplus(log_others - _SCALE * (target - _MARGIN)))

    rule = _rule(case)

    def step(embeddings, labels, rows, moments, step):
        value, (d_embeddings, d_rows) = jax.value_and_grad(loss, (0, 1))(embeddings, rows, labels)
        moments = rule.accumulate(rule.decay(moments, rows), d_rows)
        return value, d_embeddings, rule.apply(rows, moments, jnp.float32(_RATE), step), moments

    return step


def _rule(case: Case) -> Rule:
    return make_rule(OptimizerConfig(kind=case.optimizer))


def measure_drawing(*, classes: int, drawn: int, batch: int, repeats: int) -> dict[str, float]:
    """Measures median seconds to draw classes on one device: as the head does, and alternatives."""
    key, target = jax.random.key(0), jnp.arange(batch, dtype=jnp.int32)
    draw = jax.jit(partial(partial_fc.draw, stored=classes, slots=max(drawn, batch)))

    @jax.jit
    def largest_of_random(key):
        return jax.lax.top_k(jax.random.uniform(key, (classes,)), drawn)[1]

    @jax.jit
    def sorted_random(key):
        return jnp.argsort(jax.random.uniform(key, (classes,)))[:drawn]

    size, wanted = jnp.int32(classes), jnp.int32(drawn)
    return timing.in_turn(
        {
            "keyed permutation": lambda: draw(key, target, used=size, wanted=wanted),
            "top-k": lambda: largest_of_random(key),
            "argsort": lambda: sorted_random(key),
        },
        repeats=repeats,
    )
