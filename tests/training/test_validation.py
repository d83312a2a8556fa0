"""Every rule of `validate`: the value, the expectation and the fix are in the message.

Ranges of single fields are in tests/config/test_ranges.py.
"""

import contextlib
import json

import optax
import pytest

from arcface_jax import config as configs
from arcface_jax.config import Config, ScheduleConfig
from arcface_jax.errors import ConfigError
from arcface_jax.runtime import devices as meshes
from arcface_jax.training import optim, step, validation

RUNNABLE = configs.replace(Config(workdir="w"), data__path="faces")


def test_the_defaults_can_be_run_on_the_device_counts_that_divide_the_batch():
    fits = []
    for num_devices in range(1, 130):
        with contextlib.suppress(ConfigError):
            validation.validate(RUNNABLE, num_devices=num_devices)
            fits.append(num_devices)
    assert fits == [1, 2, 4, 8, 16, 32, 64, 128]


def bare_transformation(optimizer):
    return optax.sgd(1.0)


def backbone_without_a_tuple(optimizer):
    return optim.sgd(optimizer)._replace(backbone=optax.identity())


def centers_without_a_rule(optimizer):
    return optim.sgd(optimizer)._replace(centers=optax.identity())


SYNTHETIC = {"evaluation__targets": ("synthetic",)}


@pytest.mark.parametrize(
    ("change", "num_devices", "expected"),
    [
        ({"workdir": ""}, 1, ["workdir is empty", "--workdir FOLDER"]),
        ({"data__path": ""}, 1, ["data.path is empty", "--data.path FOLDER", "synthetic"]),
        (
            {"data__global_batch_size": 100},
            8,
            ["data.global_batch_size 100", "8 devices", "(96 or 104)", "--devices"],
        ),
        ({"data__global_batch_size": 6}, 8, ["data.global_batch_size 6", "(8)", "--devices"]),
        (
            {"evaluation__batch_size": 250},
            8,
            ["evaluation.batch_size 250", "8 devices", "multiple of 8"],
        ),
        (
            {"model__bn_batch_size": 48},
            1,
            ["model.bn_batch_size 48", "data.global_batch_size 128", "[2, 4, 8, 16, 32, 64,"],
        ),
        (
            # 4 groups on 8 devices: too few for each device to have one, too many for SyncBN.
            {"model__bn_batch_size": 32},
            8,
            ["model.bn_batch_size 32", "4 BatchNorm groups", "8 devices", "[2, 4, 8, 16, 128]"],
        ),
        (
            {"schedule__epochs": 4, "schedule__warmup_epochs": 4.0},
            1,
            ["schedule.warmup_epochs 4.0", "below schedule.epochs 4"],
        ),
        (
            {"schedule__decay_epochs": (10,)},
            1,
            ["schedule.decay_epochs", "schedule.kind step", "--schedule.kind step"],
        ),
        ({"head__scale": 1e-30}, 1, ["head.scale 1e-30", "at least 1", "usual value is 64"]),
        ({"optimizer__epsilon": 1e-60}, 1, ["optimizer.epsilon 1e-60 is 0 in float32"]),
        ({"optimizer__learning_rate": 1e39}, 1, ["learning_rate 1e+39 is infinite in float32"]),
        (
            {"finetune__rates": (("fc.*", 1e-50),)},
            1,
            ["finetune.rates", "1e-50", "is 0 in float32"],
        ),
        ({"head__scale": 80.0}, 1, ["head.scale 80.0", "at most 69", "usual value is 64"]),
        (
            {"head__loss": "combined", "head__margins": (0.0, 0.5, 0.0)},
            1,
            ["head.margins (0.0, 0.5, 0.0)", "greater than 0", "arcface is (1, m, 0)"],
        ),
        (
            {"head__loss": "combined", "head__margins": (0.9, 0.4, 0.15)}
            | {"head__beyond_pi": "linear"},
            1,
            ["head.beyond_pi linear", "(0.9, 0.4, 0.15)", "--head.beyond-pi none"],
        ),
        (
            {"head__block_form": "scaled", "head__dtype": "float16"},
            1,
            ["head.block_form scaled", "got float16", "use automatic"],
        ),
        (
            {"optimizer__kind": f"{__name__}:bare_transformation"},
            1,
            ["optimizer.kind", "GradientTransformation", "optim.Optimizer"],
        ),
        (
            {"optimizer__kind": f"{__name__}:backbone_without_a_tuple"},
            1,
            ["optimizer.kind", "backbone", "tuple of optax.GradientTransformation"],
        ),
        (
            {"optimizer__kind": f"{__name__}:centers_without_a_rule"},
            1,
            ["optimizer.kind", "GradientTransformation", "heads.centers.Rule"],
        ),
        (
            SYNTHETIC | {"data__synthetic__pairs": 601},
            1,
            ["data.synthetic.pairs 601", "multiple of 20", "use 600"],
        ),
        (
            SYNTHETIC | {"data__synthetic__pair_identities": 1},
            1,
            ["data.synthetic.pair_identities 1", "2 to 600"],
        ),
        (
            SYNTHETIC | {"data__synthetic__pair_identities": 601},
            1,
            ["data.synthetic.pair_identities 601", "2 to 600"],
        ),
    ],
)
def test_a_combination_that_cannot_run_names_value_expectation_and_fix(
    change: dict, num_devices: int, expected: list[str]
):
    config = configs.replace(RUNNABLE, **change)
    with pytest.raises(ConfigError) as error:
        validation.validate(config, num_devices=num_devices)
    assert [words for words in expected if words not in str(error.value)] == []


@pytest.mark.parametrize("num_devices", [1, 2, 3, 6, 8])
def test_every_batch_norm_size_that_is_offered_is_accepted(num_devices: int):
    batch = 8 * 3 * num_devices
    config = configs.replace(RUNNABLE, data__global_batch_size=batch)
    config = configs.replace(config, evaluation__batch_size=num_devices)
    accepted = []
    for size in range(1, batch + 1):
        try:
            validation.validate(
                configs.replace(config, model__bn_batch_size=size), num_devices=num_devices
            )
        except ConfigError as error:
            offered = json.loads(str(error).split("use one of ")[1].split("]")[0] + "]")
            assert size not in offered
            assert batch in offered
        else:
            accepted.append(size)
    groups = [batch // size for size in accepted]
    divisors = [n for n in range(batch, 0, -1) if batch % n == 0]
    assert groups == [n for n in divisors if n == 1 or n % num_devices == 0]


def test_the_largest_scale_that_is_offered_is_accepted():
    validation.validate(configs.replace(RUNNABLE, head__scale=69.0), num_devices=1)
    with pytest.raises(ConfigError, match="at most 69"):
        validation.validate(configs.replace(RUNNABLE, head__scale=69.1), num_devices=1)


def test_curricularface_takes_any_scale_for_it_subtracts_a_maximum():
    config = configs.replace(RUNNABLE, head__scale=100.0, head__loss="curricularface")
    validation.validate(config, num_devices=1)
    with pytest.raises(ConfigError, match=r"head\.scale 100"):
        validation.validate(configs.replace(config, head__loss="adaface"), num_devices=1)


def test_a_batch_norm_size_above_the_batch_is_one_group():
    config = configs.replace(RUNNABLE, data__global_batch_size=64, model__bn_batch_size=128)
    validation.validate(config, num_devices=8)
    assert configs.batch_norm_groups(config) == 1


@pytest.mark.parametrize("field", ["model__bn_batch_size", "data__global_batch_size"])
def test_batch_norm_of_single_images_is_refused_unless_frozen(field):
    config = configs.replace(RUNNABLE, model__network="r_tiny", **{field: 1})
    with pytest.raises(ConfigError, match=rf"{field.replace('__', '.')} 1 .* at least 2"):
        validation.validate_learning(config, steps_per_epoch=10)
    config = configs.replace(config, finetune__frozen_statistics=("*",))
    validation.validate_learning(config, steps_per_epoch=10)


def test_a_warm_up_ends_before_the_run():
    config = configs.replace(RUNNABLE, schedule=ScheduleConfig(epochs=2, warmup_steps=19))
    validation.validate_learning(config, steps_per_epoch=10)
    with pytest.raises(ConfigError, match=r"warmup_steps 19 must be below the 18 steps"):
        validation.validate_learning(config, steps_per_epoch=9)


def test_profiled_steps_are_steps_of_the_run():
    config = configs.replace(
        RUNNABLE, schedule=ScheduleConfig(epochs=1), logging__profile_steps=(50, 60)
    )
    validation.validate_learning(config, steps_per_epoch=50)
    with pytest.raises(ConfigError, match=r"profile_steps \(50, 60\) are after the last of the 49"):
        validation.validate_learning(config, steps_per_epoch=49)


def test_the_steps_of_a_run_are_counted_in_int32():
    config = configs.replace(RUNNABLE, schedule=ScheduleConfig(epochs=2**31 - 1))
    validation.validate_learning(config, steps_per_epoch=1)
    with pytest.raises(ConfigError, match=r"use at most 214748364 epochs"):
        validation.validate_learning(config, steps_per_epoch=10)


@pytest.mark.parametrize(
    ("slices", "fix"),
    [
        (4, r"use a model\.bn_batch_size of \[2\]"),
        (8, "each has at least 2 of the 8 images"),
        (3, "the batch is not a multiple of 3"),
        (2**31 - 1, "the batch is not a multiple of 2147483647"),
    ],
)
def test_micro_batches_that_do_not_fit_name_what_does(slices: int, fix: str):
    config = configs.replace(
        RUNNABLE,
        data__global_batch_size=8,
        model__bn_batch_size=8,
        optimizer__micro_batches=slices,
    )
    with pytest.raises(ConfigError, match=fix):
        validation.validate(config, num_devices=1)


def test_a_plug_in_optimizer_is_checked_where_nothing_was_validated():
    config = configs.replace(
        RUNNABLE, model__network="r_tiny", optimizer__kind=f"{__name__}:bare_transformation"
    )
    with pytest.raises(ConfigError, match=r"expected arcface_jax\.training\.optim\.Optimizer"):
        step.abstract_state(config, num_classes=7, mesh=meshes.make(1))


def test_the_published_recipes_sections_are_accepted():
    config = configs.replace(
        RUNNABLE,
        data__global_batch_size=1024,
        schedule=ScheduleConfig(kind="step", epochs=25, decay_epochs=(10, 16, 22)),
    )
    validation.validate(config, num_devices=8)
    assert configs.batch_norm_groups(config) == 8
