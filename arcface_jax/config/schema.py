"""The configuration: frozen dataclasses, one for each concern, with ranges next to the fields.

Every hyper-parameter default of the project is here. A recipe (`configs/*.py`) states only what
differs; `loading.py` reads it. The text below a field is its help: lines of up to 73 columns fit
into the frame of `--help`.
"""

import dataclasses
import functools
import math
from typing import Annotated, Any, Literal, TypeVar, dataclass_transform

import pydantic
import pydantic.dataclasses
from pydantic import (
    AfterValidator,
    AliasChoices,
    Field,
    NonNegativeFloat,
    PositiveFloat,
)

from arcface_jax import plugins
from arcface_jax.config.explain import Hint, explain
from arcface_jax.errors import ConfigError


def _part(field: str) -> pydantic.AfterValidator:
    """Accepts the name of a built-in part, or `package.module:name`; nothing is imported."""

    def check(name: str) -> str:
        if expected := plugins.expectation(name, field=field):
            raise ValueError(expected)
        return name

    return pydantic.AfterValidator(check)


Network = Annotated[str, _part("model.network")]
Loss = Annotated[str, _part("head.loss")]
OptimizerKind = Annotated[str, _part("optimizer.kind")]
Dtype = Literal["float32", "bfloat16", "float16"]

_STRICT = pydantic.ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
_Class = TypeVar("_Class", bound=type)


@dataclass_transform(kw_only_default=True, frozen_default=True)
def section(cls: _Class) -> _Class:
    """Makes a frozen dataclass that raises ConfigError for a wrong type or a value out of range."""
    made: Any = pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=_STRICT)(cls)
    construct = made.__init__

    @functools.wraps(construct)
    def checked(self: Any, **values: Any) -> None:
        try:
            construct(self, **values)
        except pydantic.ValidationError as error:
            raise ConfigError(explain(error, root=Config, given=values)) from error

    made.__init__ = checked
    return made


def _increasing(values: tuple[float, ...]) -> tuple[float, ...]:
    if any(low >= high for low, high in zip((0, *values), values, strict=False)):
        raise ValueError("must increase strictly, starting above 0")
    return values


def _increasing_angles(values: tuple[float, float]) -> tuple[float, float]:
    _increasing(values)
    if values[1] > math.pi:
        raise ValueError("must be at most pi: these are angles in radians")
    return values


def _margins(values: tuple[float, float, float]) -> tuple[float, float, float]:
    factor, angle, cosine = values
    if abs(factor) > _LARGEST_FACTOR or abs(angle) > math.pi or abs(cosine) > _LARGEST_COSINES:
        raise ValueError(
            f"must be within (+-{_LARGEST_FACTOR:g}, +-pi, +-{_LARGEST_COSINES:g}): a factor on "
            "the angle, radians, a difference of cosines"
        )
    return values


def _all_different(values: tuple[str, ...]) -> tuple[str, ...]:
    if not values or len(set(values)) < len(values):
        raise ValueError("must name at least one, each once")
    return values


def _first_and_last(steps: tuple[int, int]) -> tuple[int, int]:
    if steps != (0, 0) and not 1 <= steps[0] <= steps[1]:
        raise ValueError("must be the first and the last step to trace, counted from 1")
    return steps


def _columns(value: str) -> str:
    pairs = [part.partition("=") for part in value.split(",")] if value else []
    names = [name.strip() for name, _, _ in pairs]
    good = all(column.strip() for _, _, column in pairs)
    if not good or not {"path", "label"} >= set(names) or len(set(names)) < len(names):
        raise ValueError("must be path=COLUMN,label=COLUMN, or one of the two")
    return value


# Limits of head.margins: SphereFace uses factors up to 4, and two cosines differ by at most 2.
_LARGEST_FACTOR, _LARGEST_COSINES = 10.0, 2.0

# Steps, images, labels and rows are int32.
_LARGEST_INT = 2**31 - 1
PositiveInt = Annotated[int, Field(gt=0, le=_LARGEST_INT)]
NonNegativeInt = Annotated[int, Field(ge=0, le=_LARGEST_INT)]
# threading and faulthandler refuse waits of more than 292 years.
Seconds = Annotated[float, Field(ge=0, le=1e9)]
Share = Annotated[float, Field(ge=0, le=1), Hint("a share, 0 to 1")]
Increasing = Annotated[tuple[float, float], AfterValidator(_increasing)]


@section
class SyntheticConfig:
    """Synthetic faces for `data.path = "synthetic"`."""

    identities: PositiveInt = 400
    """Identities to train on; the evaluation pairs show others."""
    images_per_identity: PositiveInt = 30
    """Training images of each identity."""
    pairs: Annotated[int, Field(gt=0, le=20_000), Hint("1 to 20,000")] = 600
    """Verification pairs of unseen identities, a multiple of 20."""
    pair_identities: PositiveInt = 120
    """Unseen identities in those pairs."""


@section
class NoiseConfig:
    """Random pixels for `data.path = "noise"`: a dry run of a large head."""

    classes: PositiveInt = 1_000_000
    """Number of classes."""
    images: PositiveInt = 1_000_000
    """Number of images."""


@section
class AugmentConfig:
    """Augmentations of training images on the host (docs/input_pipeline.md), in this order."""

    sets: tuple[Literal["dali", "adaface", "erasing"], ...] = ()
    """Sets to apply: arcface_torch's dali_aug, AdaFace's, random erasing;
    the options below are their parameters."""
    dali_low_resolution: Share = 0.1
    """dali: probability of a resize to 0.5 .. 0.8 of the size and back."""
    dali_blur: Share = 0.2
    """dali: probability of a Gaussian blur over 3 or 5 pixels."""
    dali_color: Annotated[
        Share, Field(validation_alias=AliasChoices("dali_color", "dali_colour"))
    ] = 0.2
    """dali: probability of a hue shift by 0 .. 20 degrees and a saturation factor of 1 .. 1.2."""
    dali_gray: Share = 0.1
    """dali: probability of a conversion to gray."""
    adaface_crop: Share = 0.2
    """adaface: probability of a crop to 0.2 .. 1 of the area, the rest black."""
    adaface_low_resolution: Share = 0.2
    """adaface: probability of a resize to 0.2 .. 1 of the size and back."""
    adaface_photometric: Share = 0.2
    """adaface: probability of a change of brightness, contrast and
    saturation, each by a factor of 0.5 .. 1.5."""
    erasing: Share = 0.5
    """erasing: probability of noise in a rectangle of 0.02 .. 0.4 of the area."""


@section
class DataConfig:
    """What to train on and how it reaches the devices."""

    path: str = ""
    """The training set, or several separated by commas: a folder with
    train.rec, a folder with one folder per identity, a file list,
    Parquet, Arrow, WebDataset, LMDB, TFDS, "synthetic" or "noise"
    (docs/data.md), or a source of your own,
    package.module:name[:ARGUMENT] (docs/extending.md)."""
    columns: Annotated[str, AfterValidator(_columns)] = ""
    """Lists and tables: path=COLUMN,label=COLUMN, each a header's name or a
    number from 1; others are found by content."""
    label_index: NonNegativeInt = 0
    """Records with several labels: which of them is the identity, from 0."""
    identity_level: NonNegativeInt = 0
    """Image folders: depth of the identities' folders, from 1; 0 detects it,
    and stops if it is ambiguous."""
    unlabeled: bool = False
    """Image folders: use every image at any depth, without identities, for --distill.head off."""
    order: Literal["shuffled", "shards"] = "shuffled"
    """Shuffle all images, or, for slow disks, read long runs of images and
    shuffle a few of these shards together."""
    shard_images: PositiveInt = 8192
    """order shards: consecutive images in a shard."""
    shard_window: PositiveInt = 16
    """order shards: shards shuffled together; they have to fit into host memory."""
    global_batch_size: PositiveInt = 128
    """Images per step, over all devices and hosts."""
    flip: bool = True
    """Mirror each training image with probability one half."""
    augment: AugmentConfig = AugmentConfig()
    last_batch: Literal["drop", "pad"] = "drop"
    """Images left over at the end of an epoch: skip them in this epoch, or
    pad the batch with images from the start of the epoch, which are then
    seen twice."""
    changed: Literal["refuse", "accept"] = "refuse"
    """If a run resumes and its training set has changed: stop and report the
    differences, or continue with the new data."""
    max_bad_share: Share = 0.001
    """Largest share of unreadable images. They are replaced by others; above it the run stops."""
    workers: NonNegativeInt = 0
    """Processes that read and decode on each host; 0 uses threads of the main process."""
    threads: NonNegativeInt = 0
    """Threads that read and decode, in each worker process or in the main
    process; 0 uses one per core, at most eight."""
    prefetch_batches: PositiveInt = 4
    """Batches to decode ahead of the step."""
    synthetic: SyntheticConfig = SyntheticConfig()
    noise: NoiseConfig = NoiseConfig()


@section
class ModelConfig:
    """The backbone."""

    network: Network = "r50"
    """Backbone architecture: r18 .. r2060, mbf, edgeface_xs, vit_t ..
    (docs/backbones.md), or your own, package.module:name
    (docs/extending.md)."""
    options: tuple[tuple[str, float], ...] = ()
    """Settings of a network of your own: NAME VALUE NAME VALUE."""
    embedding_size: Annotated[int, Field(gt=0, le=65_536), Hint("1 to 65,536")] = 512
    """Length of the embedding."""
    dtype: Dtype = "bfloat16"
    """Compute type of the convolutions; parameters, statistics and the last
    layers are float32. float16 scales the gradient
    (optimizer.loss_scale); bfloat16 needs no scaling."""
    bn_batch_size: PositiveInt = 128
    """Images that share BatchNorm statistics; insightface's per-GPU batch."""


@section
class HeadConfig:
    """The margin softmax over the class centers (docs/head.md)."""

    loss: Loss = "arcface"
    """Margin: arcface, cosface, combined, adaface, magface or
    curricularface (formulas in docs/head.md), or your own,
    package.module:name (docs/extending.md)."""
    options: tuple[tuple[str, float], ...] = ()
    """Settings of a loss of your own: NAME VALUE NAME VALUE."""
    margin: Annotated[
        float,
        Field(ge=0, le=math.pi),
        Hint("radians or a cosine, depending on the loss; 0.2 to 0.5 is usual"),
    ] = 0.5
    """m: radians for arcface and curricularface, cosine for cosface, both for adaface."""
    margins: Annotated[
        tuple[float, float, float],
        AfterValidator(_margins),
        Hint("arcface is (1, m, 0), cosface (1, 0, m)"),
    ] = (1.0, 0.5, 0.0)
    """combined: (m1, m2, m3) of cos(m1 theta + m2) - m3."""
    scale: PositiveFloat = 64.0
    """Factor on all cosines."""
    gradient: Literal["exact", "straight_through"] = "straight_through"
    """arcface, combined: the formula's derivative, or 1 (arcface_torch since December 2022)."""
    beyond_pi: Literal["none", "linear"] = "none"
    """arcface, combined if the angle exceeds pi: the formula, or c - m sin(m) as in 2022."""
    interclass_filtering_threshold: Annotated[
        float,
        Field(ge=0, lt=1),
        Hint("1 is the largest cosine, 0 turns the filter off, the usual value is 0.4"),
    ] = 0.0
    """Treat a non-target cosine above it as 0, for classes that are the same person; 0 is off."""
    subcenters: PositiveInt = 1
    """Centers per class; the nearest one counts."""
    ema: Annotated[float, Field(gt=0, le=1), Hint("a batch's share in the running means")] = 0.01
    """adaface, curricularface: a batch's share in the running means."""
    adaface_h: PositiveFloat = 0.333
    """adaface: how strongly the embedding norm changes the margin."""
    magface_norms: Increasing = (10.0, 110.0)
    """magface: the norms between which the margin rises."""
    magface_margins: Annotated[tuple[float, float], AfterValidator(_increasing_angles)] = (
        0.45,
        0.8,
    )
    """magface: the margins at these norms, radians."""
    magface_weight: NonNegativeFloat = 35.0
    """magface: weight of the loss term that increases the norms."""
    sample_rate: Annotated[
        Share, Hint("the share of the classes that take part in a step, 0 to 1, where 1 is all")
    ] = 1.0
    """Partial FC: the share of the classes that take part in a step; 0 uses
    only those in the batch."""
    unsampled: Literal["untouched", "decayed"] = "untouched"
    """Partial FC: leave the other centers unchanged, or apply momentum and
    decay to them too (arcface_torch)."""
    dtype: Dtype = "bfloat16"
    """Type of the matrix products' operands; sums, exponents and the log-sum-exp stay float32."""
    block_size: NonNegativeInt = 0
    """Classes that a device processes at a time; limits the head's memory
    and does not affect the result. 0 is automatic (docs/head.md): 8192 on
    GPUs, 16384 from Hopper on in bfloat16 for batches up to 384, 2048 on
    CPUs."""
    block_form: Literal["automatic", "unit", "scaled", "powers"] = "automatic"
    """How a block is multiplied with the batch (docs/head.md): the same
    result with different rounding and memory traffic. automatic chooses by
    platform, batch and dtype."""
    reduce_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type in which the embeddings' gradient is summed over the devices."""


@section
class OptimizerConfig:
    """Updates of the backbone and the class centers by their gradients."""

    kind: OptimizerKind = "sgd"
    """sgd and adamw as torch defines them; lars and lamb scale the rate of
    each backbone array, and the class centers use sgd (lars) or adamw
    (lamb). Or your own, package.module:name (docs/extending.md)."""
    options: tuple[tuple[str, float], ...] = ()
    """Settings of an optimizer of your own: NAME VALUE NAME VALUE."""
    learning_rate: PositiveFloat = 0.1
    """Base rate for the whole global batch."""
    momentum: Annotated[float, Field(ge=0, lt=1), Hint("at 1 updates grow without bound")] = 0.9
    """sgd, lars."""
    betas: tuple[
        Annotated[float, Field(ge=0, lt=1)],
        Annotated[float, Field(ge=0, lt=1)],
    ] = (0.9, 0.999)
    """adamw, lamb: decay rates of the running means of the gradient and its square."""
    epsilon: PositiveFloat = 1e-8
    """adamw, lamb."""
    trust: PositiveFloat = 0.001
    """lars: an array's rate is this times its norm divided by its gradient's."""
    weight_decay: NonNegativeFloat = 5e-4
    """Applied to every trained array, BatchNorm included; lars and lamb exclude vectors."""
    clip_norm: PositiveFloat = 5.0
    """Largest global norm of the backbone's gradient."""
    micro_batches: PositiveInt = 1
    """Slices of the global batch that the backbone processes in turn, to
    save memory; the result is the same."""
    reduce_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type in which the backbone's gradient is summed over the devices."""
    ema: Annotated[
        float,
        Field(ge=0, lt=1),
        Hint("the share of the mean that a step keeps; 0.9999 is usual, 0 is off"),
    ] = 0.0
    """Decay of a running mean of the weights, for instance 0.9999, which is
    then evaluated and exported; 0 is off."""
    loss_scale: Annotated[
        float, Field(ge=1, le=2**24), Hint("65536 is usual; overflows halve it, down to 1")
    ] = 65536.0
    """float16: initial factor on the embeddings' gradient; halved when it overflows."""
    loss_scale_steps: PositiveInt = 100
    """float16: steps without an overflow after which the factor doubles."""
    stop_after_skipped: PositiveInt = 20
    """Stop the run after this many consecutive steps with a non-finite
    gradient; such steps are skipped."""


@section
class ScheduleConfig:
    """The learning rate over the run."""

    kind: Literal["polynomial", "cosine", "step"] = "polynomial"
    """Polynomial decay to zero, half a cosine to zero, or a constant factor at given epochs."""
    epochs: PositiveInt = 20
    """Length of the run."""
    warmup_epochs: NonNegativeFloat = 0.0
    """Linear warm-up from zero."""
    warmup_steps: NonNegativeInt = 0
    """The same in optimizer steps; set only one of the two."""
    power: PositiveFloat = 1.0
    """polynomial: the exponent."""
    decay_epochs: Annotated[
        tuple[int, ...], AfterValidator(_increasing), Hint("for instance (10, 16, 22)")
    ] = ()
    """step: epochs at whose start the rate drops."""
    decay_factor: Annotated[float, Field(gt=0, le=1), Hint("0.1 divides the rate by ten")] = 0.1
    """step: factor on the rate."""
    extend: bool = False
    """Resume a run under the epochs and decay_epochs given here, which may
    differ from the stored ones after the last saved step: prints the old
    and the new schedule and records the new one (docs/training.md)."""


@section
class FineTuneConfig:
    """What to train and what to keep in a run that starts from weights (docs/finetuning.md).

    A pattern is a dotted name with `*` and `?`, and has to match at least one array.
    """

    centers: Literal["random", "class_means", "kept"] = "random"
    """Initial class centers: random, the mean embeddings of the new classes,
    or, for the same classes, the centers of the run that init_from names."""
    frozen: tuple[str, ...] = ()
    """Patterns of parameters that are not trained, for instance layer1.*"""
    frozen_statistics: tuple[str, ...] = ()
    """Patterns of BatchNorm statistics (X.mean, X.var) that are used but not updated; * is all."""
    rates: Annotated[
        tuple[tuple[str, PositiveFloat], ...],
        Hint("to keep arrays as they are, name the pattern in --finetune.frozen"),
    ] = ()
    """Patterns, each with a factor on the learning rate; the last pattern that matches counts."""


@section
class DistillConfig:
    """A teacher whose embeddings the network learns to reproduce (docs/distillation.md)."""

    teacher: str = ""
    """The teacher: the workdir of a run, a hub folder, a .pth, .safetensors
    or .onnx file; empty trains without one."""
    cache: str = ""
    """Folder of the teacher's embeddings of the training set, which are
    computed once; by default WORKDIR/teacher."""
    online: bool = False
    """Run the teacher at every step instead, on the augmented images; it has
    to be a network of this project."""
    views: Literal["mean", "both"] = "mean"
    """The teacher's embedding of an image: the mean over the image and its
    mirror image, or of the one shown to the network."""
    loss: Annotated[
        tuple[Literal["cosine", "relational", "centers"], ...], AfterValidator(_all_different)
    ] = ("cosine",)
    """cosine: 1 - the cosine to the teacher's embedding; relational: squared
    differences of the batch's pairwise cosines; centers: the head's class
    centers are the teacher's class means, and fixed. Several losses are
    added."""
    weight: NonNegativeFloat = 32.0
    """Factor on the gradient of cosine and relational. The head's gradient
    is about head.scale times as large as cosine's; the sum is clipped to
    optimizer.clip_norm, so a weight far beyond it changes only the
    direction."""
    warmup_epochs: NonNegativeFloat = 0.0
    """Epochs in which the weight rises linearly from zero."""
    decay: Literal["constant", "linear", "cosine"] = "constant"
    """Weight after warm-up: constant, or falling to zero at the end of the run."""
    head: Literal["on", "off"] = "on"
    """off trains on the teacher only, without labels, margin and class centers."""
    compatible: bool = False
    """Keep the teacher's embedding space, to compare embeddings with a
    gallery made by the teacher: requires the teacher's embedding size and
    the cosine loss, and starts the class centers from the teacher's class
    means."""


@section
class EvaluationConfig:
    """Verification during and after training."""

    targets: tuple[str, ...] = ()
    """Verification sets: .bin files or lists of pairs (docs/evaluation.md),
    absolute or relative to data.path, or "synthetic"; and evaluators of
    your own, package.module:name[:ARGUMENT] (docs/extending.md)."""
    every_epochs: NonNegativeFloat = 1.0
    """How often to evaluate; 0 evaluates only at the end."""
    batch_size: PositiveInt = 256
    """Images per forward pass, over all devices."""
    baselines: bool = False
    """Also score the first set before training, with raw pixels and with the untrained network."""


@section
class CheckpointConfig:
    """Checkpoints kept in WORKDIR/checkpoints."""

    every_epochs: NonNegativeFloat = 1.0
    """How often to save; 0 saves only at the end, and on SIGTERM or Ctrl-C."""
    keep: PositiveInt = 2
    """Newest checkpoints to keep."""
    best_metric: str = ""
    """Also keep the best, by an evaluation metric: eval/lfw/accuracy,
    eval/lfw/tar@far=1e-3, eval/lfw/eer. Saves at every evaluation."""
    keep_best: PositiveInt = 1
    """Best checkpoints to keep, besides the newest."""
    requeue_exit_code: Annotated[int, Field(ge=0, le=255), Hint("85 is usual")] = 0
    """Exit code of a resumable run that SIGTERM stopped; 0 is the usual 143."""
    deadline_seconds: Seconds = 0.0
    """Seconds after SIGTERM or Ctrl-C before a run abandons its step or save and exits; 0 waits."""


@section
class LoggingConfig:
    """Output during training."""

    every_steps: PositiveInt = 20
    """Steps between two lines of metrics.jsonl."""
    stuck_steps: PositiveInt = 2000
    """Warn when the loss has not moved for this many steps."""
    tensorboard: bool = True
    """Write event files to WORKDIR/tensorboard."""
    csv: bool = False
    """Write metrics.csv next to metrics.jsonl."""
    wandb: str = ""
    """Weights & Biases project to log to; empty is off."""
    profile_steps: Annotated[
        tuple[int, int],
        AfterValidator(_first_and_last),
        Hint("for instance 10 20; 0 0 is off"),
    ] = (0, 0)
    """First and last step of a profiler trace in WORKDIR/profile; 0 0 is off."""
    watchdog_seconds: Seconds = 0.0
    """Print the stacks of all threads to stderr when a step, compilation
    included, takes longer; 0 is off."""
    watchdog_abort: bool = False
    """Then exit with code 1, so that the run can be restarted."""


@section
class DistributedConfig:
    """The processes of a run (docs/multi_host.md); SLURM, Open MPI and Kubernetes set them."""

    coordinator: str = ""
    """HOST:PORT: an address of process 0, and a free port there."""
    num_processes: int | None = None
    """Number of processes in the run."""
    process_id: int | None = None
    """0 to num_processes - 1."""
    local_devices: tuple[int, ...] = ()
    """Devices of its host that this process uses; if empty all, or one each
    if SLURM or Open MPI starts several processes per host."""


@section
class Config:
    """One training run."""

    workdir: str = ""
    """Output folder; the same command resumes a run that stopped there."""
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 0  # JAX's keys take 32 bits
    """Seed of initialization, data order, augmentation and sampling."""
    deterministic: bool = False
    """Make GPUs sum in a fixed order, which is slower; CPUs always do."""
    compilation_cache: str = "~/.cache/arcface_jax"
    """Folder of compiled programs, which make restarts fast; "" is off.
    JAX_COMPILATION_CACHE_DIR takes precedence."""
    devices: Annotated[
        PositiveInt | None, Hint("for instance --devices 8, or leave it out to use all")
    ] = None
    """How many devices to use; None uses all."""
    init_from: str = ""
    """Initial weights: the workdir of a run, a .pth, .safetensors or .onnx; random if empty."""
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    head: HeadConfig = HeadConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    finetune: FineTuneConfig = FineTuneConfig()
    distill: DistillConfig = DistillConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()
    distributed: DistributedConfig = DistributedConfig()


# Fields that a resumed run may change: its location and outputs, never its computation.
MAY_DIFFER_ON_RESUME = (
    "workdir",
    "devices",
    "deterministic",
    "compilation_cache",
    "distributed.",
    "data.path",
    "data.columns",
    "data.label_index",
    "data.identity_level",
    "data.changed",
    "data.max_bad_share",
    "data.workers",
    "data.threads",
    "data.prefetch_batches",
    "head.block_size",
    "head.block_form",
    "optimizer.micro_batches",
    "optimizer.stop_after_skipped",
    "schedule.extend",
    "distill.teacher",
    "distill.cache",
    "evaluation.",
    "checkpoint.",
    "logging.",
)


def batch_norm_groups(config: Config) -> int:
    """Returns the number of equal slices into which BatchNorm divides the global batch."""
    return max(1, config.data.global_batch_size // config.model.bn_batch_size)


def replace(config: Config, **changes: Any) -> Config:
    """Returns a copy with fields changed, named by section and field joined with two underscores.

    `replace(config, data__path="faces", seed=1)` sets `data.path` and `seed`.

    Raises:
      ConfigError: a field is unknown, or a value has the wrong type or is out of range.

    Examples:
      >>> config = replace(Config(), data__path="faces", seed=1)
      >>> config.data.path, config.seed
      ('faces', 1)
    """
    for name, value in changes.items():
        head, _, rest = name.partition("__")
        if rest:
            if not dataclasses.is_dataclass(getattr(config, head, None)):
                raise ConfigError(
                    f"{name.replace('__', '.')} is unknown: {head} is not a section of "
                    f"{type(config).__name__}"
                )
            value = replace(getattr(config, head), **{rest: value})
        config = dataclasses.replace(config, **{head: value})
    return config
