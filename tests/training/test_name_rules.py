"""Patterns against plain lists of names, and what is said of one that fits nothing."""

import pytest

from arcface_jax.errors import ConfigError
from arcface_jax.models import registry
from arcface_jax.training import name_rules

NAMES = ["conv1.kernel", "layer1.0.bn1.scale", "layer1.0.conv1.kernel", "layer10.fc.bias"]


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        ((), []),
        (("*",), NAMES),
        (("layer1.*",), NAMES[1:3]),
        (("*.kernel",), [NAMES[0], NAMES[2]]),
        (("layer1.?.bn?.*", "conv1.kernel"), [NAMES[0], NAMES[1]]),
    ],
)
def test_patterns_choose_names(patterns, expected):
    assert name_rules.select(patterns, NAMES, field="f") == set(expected)


def test_a_stack_is_chosen_by_its_own_name():
    names = list(registry.build("vit_t").shapes[0])
    chosen = name_rules.select(["blocks.0-11.attn.*"], names, field="f")
    assert chosen == {name for name in names if name.startswith("blocks.0-11.attn.")}
    assert name_rules.select(["blocks.*"], names, field="f") > chosen


def test_every_pattern_that_fits_nothing_is_named_with_names_near_it():
    with pytest.raises(ConfigError) as error:
        name_rules.select(["layer1.*", "layer2.conv", "conv1.kernl"], NAMES, field="finetune.x")
    message = str(error.value)
    assert "finetune.x" in message and "'layer1.*'" not in message
    assert "'layer2.conv'" in message and "'conv1.kernl' (close matches: conv1.kernel" in message


def test_one_layer_of_a_stack_is_refused_with_the_name_of_the_stack():
    names = list(registry.build("vit_t").shapes[0])
    with pytest.raises(ConfigError, match=r"blocks\.3\..*part of a stack.*blocks\.0-11\."):
        name_rules.select(["blocks.3.*"], names, field="f")


def test_the_last_rate_that_fits_counts():
    rates = (("*", 0.1), ("layer1*", 0.5), ("layer10.*", 2.0))
    assert name_rules.factors(rates, NAMES, field="f") == dict(
        zip(NAMES, (0.1, 0.5, 0.5, 2.0), strict=True)
    )
    assert set(name_rules.factors((), NAMES, field="f").values()) == {1.0}
