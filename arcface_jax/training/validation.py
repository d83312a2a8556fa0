"""Check values that depend on several fields or on the devices; the schema has each field's
range.
"""

import math
from typing import Literal

import numpy as np

from arcface_jax.config import Config, HeadConfig, ScheduleConfig, batch_norm_groups, loading
from arcface_jax.data.images import IMAGE_SIZE
from arcface_jax.data.source import Source
from arcface_jax.errors import ConfigError, DataError, ImageError
from arcface_jax.heads import automatic, margin_softmax, margins
from arcface_jax.training import name_rules, optim, step
from arcface_jax.training.distill import CENTERS

# float32 overflows in exp() above this; the head sums exp(logit) without a shift
# (heads/block_passes.py).
_MAX_EXPONENT = 88.0
# Below this scale all logits are nearly equal, and the loss stays near the log of the classes.
_SMALLEST_SCALE = 1.0
_MOST_STEPS = int(np.iinfo(np.int32).max)  # the state's step is int32
# Sections whose numbers are used by the step in float32.
_COMPUTED = ("head.", "optimizer.", "schedule.", "finetune.rates", "distill.")


def validate(config: Config, *, num_devices: int) -> None:
    """Checks that the values are consistent, before anything is read or written.

    Args:
      config: the configuration.
      num_devices: devices in the mesh.

    Raises:
      ConfigError: naming the value, the expectation and the fix.
    """
    if not config.workdir:
        raise ConfigError("workdir is empty: name an output folder with --workdir FOLDER")
    if not config.data.path:
        raise ConfigError(
            "data.path is empty: name a training set (docs/data.md), for instance a folder that "
            "holds train.rec and train.idx, with --data.path FOLDER, or train on synthetic faces "
            "with --data.path synthetic"
        )
    batch = config.data.global_batch_size
    if batch % num_devices:
        below = batch - batch % num_devices
        fits = [str(n) for n in (below, below + num_devices) if n]
        raise ConfigError(
            f"data.global_batch_size {batch} cannot be divided by {num_devices} devices: "
            f"use a multiple of {num_devices} ({' or '.join(fits)}), or choose another number of "
            f"--devices: {_device_counts(config)} fit"
        )
    if config.evaluation.batch_size % num_devices:
        raise ConfigError(
            f"evaluation.batch_size {config.evaluation.batch_size} cannot be divided by "
            f"{num_devices} "
            f"devices: use a multiple of {num_devices}"
        )
    _check_batch_norm_groups(config, num_devices=num_devices)
    _check_micro_batches(config, num_devices=num_devices)
    _check_schedule(config.schedule)
    optim.make_optimizer(config.optimizer)  # checks what a plug-in returns
    _check_drawn_pairs(config)
    _check_float32(config)
    _check_head(config.head)
    _check_finetune(config)
    _check_distill(config)


def validate_learning(config: Config, *, steps_per_epoch: int) -> None:
    """Refuses what can run, and be timed and planned, but trains nothing.

    Args:
      config: the configuration.
      steps_per_epoch: optimizer steps in an epoch.

    Raises:
      ConfigError: the run has too many steps to count, `schedule.warmup_steps` are as many as
        its steps or more, no step would be profiled, or BatchNorm would normalize single images.
    """
    schedule = config.schedule
    total = schedule.epochs * steps_per_epoch
    if total > _MOST_STEPS:
        raise ConfigError(
            f"schedule.epochs {schedule.epochs} of {steps_per_epoch} steps are more steps than "
            f"int32 counts: use at most {_MOST_STEPS // steps_per_epoch} epochs, or a larger "
            "data.global_batch_size"
        )
    if schedule.warmup_steps >= total:
        raise ConfigError(
            f"schedule.warmup_steps {schedule.warmup_steps} must be below the {total} steps of "
            f"this run ({schedule.epochs} epochs of {steps_per_epoch}): use a shorter warm-up or "
            "more --schedule.epochs"
        )
    if config.logging.profile_steps[0] > total:
        raise ConfigError(
            f"logging.profile_steps {config.logging.profile_steps} are after the last of the "
            f"{total} steps of this run: name earlier steps"
        )
    _check_single_images(config)


def validate_data(source: Source, path: str, *, head: Literal["on", "off"] = "on") -> None:
    """Checks that a training set can be learned from.

    Args:
      source: the training set.
      path: `data.path`, for the message.
      head: `distill.head`; if off, a single class is enough.

    Raises:
      DataError: it has one class, so that the loss is 0 for any weights, or its images are not
        aligned.
    """
    if source.num_classes < 2 and head == "on":
        raise DataError(
            f"data.path {path} has {source.num_classes} class(es), and a softmax needs at least 2: "
            "its loss would be 0 at every step. Use a training set with several identities"
        )
    _check_aligned(source, path)


_SAMPLE = 16  # images to check before a run starts


def _check_aligned(source: Source, path: str) -> None:
    """Refuses photographs that were not aligned; single images of another size are skipped later.

    Raises:
      DataError: most of a sample are not 112 x 112.
    """
    if source.generated:
        return
    numbers = np.unique(np.linspace(0, len(source) - 1, _SAMPLE).astype(int)).tolist()
    wrong = []
    for number in numbers:
        try:
            source[number]
        except ImageError as error:
            wrong += [error] if error.kind == "other size" else []
    if 2 * len(wrong) > len(numbers):
        raise DataError(
            f"data.path {path} holds images that are not aligned faces: of {len(numbers)} sampled "
            f"images {len(wrong)} are not {IMAGE_SIZE} x {IMAGE_SIZE}, the first is {wrong[0]}"
        )


def _check_float32(config: Config) -> None:
    """Refuses numbers that become 0 or infinite in the arithmetic of the step."""
    smallest, largest = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
    for name, value in loading.flatten(config).items():
        if not name.startswith(_COMPUTED) or name.endswith(".options"):
            continue
        for number in np.ravel(np.array(value, object)):
            if isinstance(number, float) and number and not smallest <= abs(number) <= largest:
                became = "0" if abs(number) < smallest else "infinite"
                raise ConfigError(
                    f"{name} {value} is {became} in float32, in which the step computes: use a "
                    f"value between {smallest:.2g} and {largest:.2g}"
                )


def _check_finetune(config: Config) -> None:
    finetune = config.finetune
    if finetune.centers != "random" and not config.init_from:
        raise ConfigError(
            f"finetune.centers {finetune.centers} needs weights to begin with: name them with "
            "--init-from, or use --finetune.centers random"
        )
    if finetune.centers == "class_means" and config.head.subcenters > 1:
        raise ConfigError(
            f"finetune.centers class_means gives each class one center, and head.subcenters is "
            f"{config.head.subcenters}: use --head.subcenters 1 or --finetune.centers random"
        )
    if finetune.frozen or finetune.frozen_statistics or finetune.rates:
        step.trained(finetune, step.backbone(config).shapes[0])


def _check_distill(config: Config) -> None:
    distill, head_is_off = config.distill, config.distill.head == "off"
    if config.data.unlabeled and not head_is_off:
        raise ConfigError(
            "data.unlabeled gives no identities, and the head needs them: set --distill.head off "
            "with a --distill.teacher"
        )
    if not distill.teacher:
        asked = {
            "--distill.head off": head_is_off,
            "--distill.compatible": distill.compatible,
            "--distill.online": distill.online,
            "--distill.loss centers": CENTERS in distill.loss,
        }
        if options := [option for option, given in asked.items() if given]:
            raise ConfigError(
                f"{options[0]} needs a teacher: name a run, weights or an ONNX file with "
                "--distill.teacher"
            )
        return
    if head_is_off and distill.weight == 0:
        raise ConfigError(
            "distill.weight 0 with --distill.head off leaves no loss: use a weight greater than 0"
        )
    if config.data.augment.sets and not distill.online:
        raise ConfigError(
            f"data.augment.sets {' '.join(config.data.augment.sets)} changes the images, and the "
            "teacher's cache has embeddings of the images as stored: train without augmentation "
            "(--data.augment.sets), or run the teacher at every step with --distill.online"
        )
    if distill.warmup_epochs >= config.schedule.epochs:
        raise ConfigError(
            f"distill.warmup_epochs {distill.warmup_epochs} must be below schedule.epochs "
            f"{config.schedule.epochs}"
        )
    if distill.compatible and "cosine" not in distill.loss:
        raise ConfigError(
            f"distill.compatible needs the cosine loss, and distill.loss is "
            f"{' '.join(distill.loss)}: add cosine to --distill.loss"
        )
    if head_is_off and set(distill.loss) == {CENTERS}:
        raise ConfigError(
            "distill.loss centers is the head's loss, and distill.head is off: use --distill.loss "
            "cosine"
        )
    _check_teacher_centers(config)


def _check_teacher_centers(config: Config) -> None:
    """Checks that no other option sets the class centers if they are the teacher's class means."""
    distill = config.distill
    if distill.head == "off" or not (distill.compatible or CENTERS in distill.loss):
        return
    reason = "distill.compatible" if distill.compatible else "distill.loss centers"
    if distill.online:
        raise ConfigError(
            f"{reason} starts from the teacher's class means, for which every image is embedded: "
            "use the cache (--distill.no-online)"
        )
    if config.head.subcenters > 1:
        raise ConfigError(
            f"{reason} gives each class one center, and head.subcenters is "
            f"{config.head.subcenters}: use --head.subcenters 1"
        )
    if config.finetune.centers != "random":
        raise ConfigError(
            f"{reason} sets the class centers, and finetune.centers is {config.finetune.centers}: "
            "use --finetune.centers random"
        )


def _check_head(head: HeadConfig) -> None:
    automatic.resolve(head, platform="cpu", batch=1)  # checks block_form, on every platform alike
    if head.scale < _SMALLEST_SCALE:
        raise ConfigError(
            f"head.scale {head.scale} is too small: all logits would be nearly equal, and the loss "
            f"would stay at chance level; use at least {_SMALLEST_SCALE:g} (the usual value is 64)"
        )
    largest = math.floor(_MAX_EXPONENT - math.log(1e8))
    if head.scale > largest and not margin_softmax.needs_shift(margins.make(head)):
        raise ConfigError(
            f"head.scale {head.scale} is too large: exp(scale) times the number of classes "
            f"must fit into float32; use at most {largest} (the usual value is 64)"
        )
    if head.loss == "combined" and head.margins[0] <= 0:
        raise ConfigError(
            f"head.margins {head.margins}: m1, the factor on the angle, must be greater than 0; "
            "arcface is (1, m, 0), cosface (1, 0, m)"
        )
    if head.loss == "combined" and head.beyond_pi == "linear" and head.margins[0] != 1:
        raise ConfigError(
            f"head.beyond_pi linear is for m1 = 1, and head.margins is {head.margins}: use "
            "--head.beyond-pi none"
        )


def _check_batch_norm_groups(config: Config, *, num_devices: int) -> None:
    batch, bn_batch = config.data.global_batch_size, config.model.bn_batch_size
    if bn_batch < batch and batch % bn_batch:
        raise ConfigError(
            f"model.bn_batch_size {bn_batch} does not divide data.global_batch_size {batch}: "
            f"use one of {[n for n in _divisors(batch) if n > 1]}"
        )
    groups = batch_norm_groups(config)
    if groups != 1 and groups % num_devices:
        fits = [n for n in _divisors(batch) if n == batch or (batch // n) % num_devices == 0]
        raise ConfigError(
            f"model.bn_batch_size {bn_batch} makes {groups} BatchNorm groups, which {num_devices} "
            "devices "
            f"cannot share evenly: use one of {[n for n in fits if n > 1]} "
            f"({batch} is one group over the whole batch), or another number of --devices: "
            f"{_device_counts(config)} fit"
        )


def _check_single_images(config: Config) -> None:
    """Refuses BatchNorm over one image, which maps every embedding to zero."""
    batch, bn_batch = config.data.global_batch_size, config.model.bn_batch_size
    if min(batch, bn_batch) > 1:
        return
    statistics = step.backbone(config).shapes[1]
    frozen = name_rules.select(
        config.finetune.frozen_statistics, list(statistics), field="finetune.frozen_statistics"
    )
    if set(statistics) - set(frozen):
        name = "data.global_batch_size" if batch == 1 else "model.bn_batch_size"
        raise ConfigError(
            f"{name} 1 makes BatchNorm normalize each image by itself, and all embeddings are 0: "
            f"use a {name} of at least 2"
        )


def _device_counts(config: Config) -> str:
    """Returns the numbers of devices that can share this run."""
    batch, groups = config.data.global_batch_size, batch_norm_groups(config)
    slices = config.optimizer.micro_batches
    whole = math.gcd(batch, config.evaluation.batch_size)
    counts = [n for n in _divisors(whole) if groups == 1 or groups % (n * slices) == 0]
    return ", ".join(map(str, counts)) or "none"


def _check_micro_batches(config: Config, *, num_devices: int) -> None:
    slices, groups = config.optimizer.micro_batches, batch_norm_groups(config)
    if slices > 1 and groups % (slices * num_devices):
        batch, unit = config.data.global_batch_size, slices * num_devices
        fits = [n for n in _divisors(batch) if (batch // n) % unit == 0 and n > 1]
        fix = (
            f"use a model.bn_batch_size of {fits}"
            if fits
            else f"use fewer slices, so that each has at least 2 of the {batch} images"
            if batch % unit == 0
            else f"the batch is not a multiple of {unit}: use another number of slices"
        )
        raise ConfigError(
            f"optimizer.micro_batches {slices}: each of {num_devices} devices takes {slices} "
            "slices of whole BatchNorm groups, and model.bn_batch_size "
            f"{config.model.bn_batch_size} makes {groups} groups of the batch of {batch}: {fix}"
        )


def _check_schedule(schedule: ScheduleConfig) -> None:
    if schedule.warmup_epochs >= schedule.epochs:
        raise ConfigError(
            f"schedule.warmup_epochs {schedule.warmup_epochs} must be below schedule.epochs "
            f"{schedule.epochs}"
        )
    if schedule.warmup_steps and schedule.warmup_epochs:
        raise ConfigError(
            f"schedule.warmup_steps {schedule.warmup_steps} and schedule.warmup_epochs "
            f"{schedule.warmup_epochs} are both given: state one of them"
        )
    if schedule.kind != "step" and schedule.decay_epochs:
        raise ConfigError(
            "schedule.decay_epochs is for schedule.kind step: set --schedule.kind step"
        )


def _check_drawn_pairs(config: Config) -> None:
    """Checks the synthetic pairs, if `evaluation.targets` asks for them."""
    drawn = config.data.synthetic
    if "synthetic" not in config.evaluation.targets:
        return
    if drawn.pairs % 20:
        raise ConfigError(
            f"data.synthetic.pairs {drawn.pairs} must be a multiple of 20, for ten folds with as "
            f"many same as different pairs: use {max(1, round(drawn.pairs / 20)) * 20}"
        )
    if not 2 <= drawn.pair_identities <= drawn.pairs:
        raise ConfigError(
            f"data.synthetic.pair_identities {drawn.pair_identities} must be 2 to {drawn.pairs} "
            "(data.synthetic.pairs), so that every identity is in a pair"
        )


def _divisors(number: int) -> list[int]:
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})
