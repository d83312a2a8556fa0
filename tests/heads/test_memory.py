"""What the head compiles to: memory that does not grow with the classes, few collectives."""

from functools import cache

import jax
import jax.numpy as jnp
import pytest

from arcface_jax.config import HeadConfig, OptimizerConfig
from arcface_jax.heads import centers as class_centers
from arcface_jax.heads import margin_softmax, margins
from arcface_jax.heads.margin_softmax import Centers
from arcface_jax.runtime import devices as meshes

B, D, DEVICES = 1024, 512, 8
MIB = 2**20


@cache
def compiled(num_classes: int, optimizer: str = "sgd", **changes):
    """The head alone, from shapes: nothing of its size is allocated."""
    head, rule = HeadConfig(**changes), OptimizerConfig(kind=optimizer)
    mesh = meshes.make(DEVICES)
    split, everywhere = meshes.split(mesh), meshes.replicated(mesh)

    def shape(*sizes, dtype=jnp.float32, to=split):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=to)

    rows = class_centers.padded_classes(num_classes, DEVICES) * head.subcenters
    centers = Centers(
        shape(rows, D),
        {name: shape(rows, D) for name in class_centers.make_rule(rule).names},
        {name: shape(to=everywhere) for name in margins.make(head).initial_state},
    )

    def apply(embeddings, labels, centers, rate, step):
        return margin_softmax.apply(
            embeddings,
            labels,
            centers,
            learning_rate=rate,
            step=step,
            key=jax.random.key(0),
            num_classes=num_classes,
            head=head,
            optimizer=rule,
            mesh=mesh,
        )

    lowered = jax.jit(apply, donate_argnums=2).lower(
        shape(B, D),
        shape(B, dtype=jnp.int32),
        centers,
        shape(to=everywhere),
        shape(dtype=jnp.int32, to=everywhere),
    )
    return lowered.compile()


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_memory_is_the_same_for_one_and_ten_million_classes(optimizer):
    sizes = (1_000_000, 10_000_000)
    memory = [compiled(size, optimizer).memory_analysis() for size in sizes]
    temporary = [m.temp_size_in_bytes for m in memory]
    assert max(temporary) <= 64 * MIB
    assert max(temporary) <= 1.05 * min(temporary)
    copies = 2 if optimizer == "sgd" else 3
    for size, m in zip(sizes, memory, strict=True):
        kept = copies * size // DEVICES * D * 4
        # Centers and moments come out where they came in, and nothing else is asked for but the
        # embeddings and labels.
        assert kept <= m.alias_size_in_bytes <= m.argument_size_in_bytes <= kept + MIB


@pytest.mark.parametrize(
    ("optimizer", "unsampled"),
    [
        ("sgd", "untouched"),
        ("adamw", "decayed"),
        pytest.param("sgd", "decayed", marks=pytest.mark.slow),
        pytest.param("adamw", "untouched", marks=pytest.mark.slow),
    ],
)
def test_a_sampled_head_needs_little_memory_too(optimizer, unsampled):
    memory = compiled(10_000_000, optimizer, sample_rate=0.1, unsampled=unsampled).memory_analysis()
    assert memory.temp_size_in_bytes <= 128 * MIB
    copies = 2 if optimizer == "sgd" else 3
    assert memory.alias_size_in_bytes >= copies * 10_000_000 // DEVICES * D * 4


@pytest.mark.parametrize(
    "changes",
    [{"loss": "curricularface"}, {"subcenters": 3}, {"loss": "magface"}, {"dtype": "float16"}],
    ids=lambda changes: str(next(iter(changes.values()))),
)
def test_every_kind_of_margin_stays_within_the_bound(changes):
    memory = compiled(1_000_000, **changes).memory_analysis()
    assert memory.temp_size_in_bytes <= 64 * MIB * changes.get("subcenters", 1)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_neither_logits_nor_the_gradient_of_the_centers_exist_as_a_whole(optimizer):
    text = compiled(1_000_000, optimizer).as_text()
    shard = 1_000_000 // DEVICES
    assert f"f32[{shard},{D}]" in text  # the centers do
    assert f"[{B},{shard}]" not in text and f"[{shard},{B}]" not in text
    assert f"[{B},1000000]" not in text


@pytest.mark.parametrize(
    ("changes", "reductions"),
    [({}, 2), ({"sample_rate": 0.1}, 2), ({"loss": "magface"}, 2), ({"loss": "curricularface"}, 3)],
    ids=["full", "sampled", "magface", "curricularface"],
)
def test_collectives_are_few(changes, reductions):
    """One sum of 2 B floats, one maximum of B; CurricularFace needs the targets first."""
    text = compiled(1_000_000, **changes).as_text()

    def count(name: str) -> int:
        return text.count(f" {name}(") + text.count(f" {name}-start(")

    assert count("all-reduce") <= reductions
    assert count("all-gather") <= 2 + (changes.get("loss") == "magface")
    assert count("reduce-scatter") <= 1
