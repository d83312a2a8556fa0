"""The configuration: frozen dataclasses, one for each concern.

Every hyper-parameter default of the project stands here. A recipe (`configs/*.py`) states only what
differs; `config_files.py` reads it.
"""

import dataclasses
from typing import Annotated, Any, Literal

import pydantic
from pydantic.dataclasses import dataclass

from arcface_jax import plugins


def _part(field: str) -> pydantic.AfterValidator:
    """Accept the name of a built-in part, or `package.module:name`; nothing is imported."""

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


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class SyntheticConfig:
    """The drawn faces that `data.path = "synthetic"` trains on."""

    identities: int = 400
    """Identities to train on; evaluation pairs show others."""
    images_per_identity: int = 30
    """Images drawn of each."""
    pairs: int = 600
    """Verification pairs of unseen identities, a multiple of 20."""
    pair_identities: int = 120
    """Unseen identities that the pairs show."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class NoiseConfig:
    """The random pixels that `data.path = "noise"` trains on: a dry run of a large head."""

    classes: int = 1_000_000
    images: int = 1_000_000


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class AugmentConfig:
    """What is done to training images on the host (docs/input_pipeline.md), in this order."""

    sets: tuple[Literal["dali", "adaface", "erasing"], ...] = ()
    """Which of arcface_torch's dali_aug, AdaFace's and random erasing; the rest is theirs."""
    dali_low_resolution: float = 0.1
    """dali: probability of a resize to 0.5 .. 0.8 of the size and back."""
    dali_blur: float = 0.2
    """dali: probability of a Gaussian blur over 3 or 5 pixels."""
    dali_colour: float = 0.2
    """dali: probability of a hue turned by 0 .. 20 degrees and a saturation times 1 .. 1.2."""
    dali_gray: float = 0.1
    """dali: probability of no colour at all."""
    adaface_crop: float = 0.2
    """adaface: probability that a rectangle of 0.2 .. 1 of the area is kept, the rest black."""
    adaface_low_resolution: float = 0.2
    """adaface: probability of a resize to 0.2 .. 1 of the size and back."""
    adaface_photometric: float = 0.2
    """adaface: probability of other brightness, contrast and saturation, each times 0.5 .. 1.5."""
    erasing: float = 0.5
    """erasing: probability of noise in a rectangle of 0.02 .. 0.4 of the area."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class DataConfig:
    """What to train on and how it reaches the devices."""

    path: str = ""
    """The training set, or several with commas between them: a folder with train.rec, a folder of
    identities' folders, a list of files, Parquet, TFDS, "synthetic" or "noise" (docs/data.md), or
    package.module:name[:ARGUMENT] of your own (docs/extending.md)."""
    order: Literal["shuffled", "shards"] = "shuffled"
    """All images at random, or in long runs for slow disks: a few shards shuffled together."""
    shard_images: int = 8192
    """order shards: neighbouring images that are read in one run."""
    shard_window: int = 16
    """order shards: shards that are shuffled together, and have to fit into the host's memory."""
    global_batch_size: int = 128
    """Images per step, over all devices and hosts."""
    flip: bool = True
    """Mirror each training image with probability one half."""
    augment: AugmentConfig = AugmentConfig()
    last_batch: Literal["drop", "pad"] = "drop"
    """What becomes of the images at an epoch's end that fill no batch: left out of this epoch, or
    trained on with images of the epoch's beginning, which it then shows twice."""
    max_bad_share: float = 0.001
    """Share of the images that may be damaged: they are replaced; more stop the run."""
    workers: int = 0
    """Processes that read and decode on each host; 0 leaves it to threads of this process."""
    threads: int = 0
    """Threads that read and decode, in each worker process or in this one; 0 takes as many as
    there are cores, eight at most."""
    prefetch_batches: int = 4
    """Batches decoded ahead of the step."""
    synthetic: SyntheticConfig = SyntheticConfig()
    noise: NoiseConfig = NoiseConfig()


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class ModelConfig:
    """The backbone."""

    network: Network = "r50"
    """Which backbone: r18 .. r2060, mbf, vit_t .. (docs/backbones.md), or package.module:name of
    your own (docs/extending.md)."""
    options: tuple[tuple[str, float], ...] = ()
    """Settings of a network of your own: NAME VALUE NAME VALUE."""
    embedding_size: int = 512
    """Length of the embedding."""
    dtype: Dtype = "bfloat16"
    """Compute type of the convolutions; parameters, statistics and the last layers are float32.
    float16 scales the gradient (optimizer.loss_scale); bfloat16 needs no scaling."""
    bn_batch_size: int = 128
    """Images that share BatchNorm statistics; insightface's per-GPU batch."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class HeadConfig:
    """The margin softmax over the class centers (docs/head.md)."""

    loss: Loss = "arcface"
    """Which margin: arcface, cosface, combined, adaface, magface or curricularface (their formulas
    are in docs/head.md), or package.module:name of your own (docs/extending.md)."""
    options: tuple[tuple[str, float], ...] = ()
    """Settings of a loss of your own: NAME VALUE NAME VALUE."""
    margin: float = 0.5
    """m: radians for arcface and curricularface, cosine for cosface, both for adaface."""
    margins: tuple[float, float, float] = (1.0, 0.5, 0.0)
    """combined: (m1, m2, m3) of cos(m1 theta + m2) - m3."""
    scale: float = 64.0
    """Factor on all cosines."""
    gradient: Literal["exact", "straight_through"] = "straight_through"
    """arcface, combined: the formula's derivative, or 1 (arcface_torch since December 2022)."""
    beyond_pi: Literal["none", "linear"] = "none"
    """arcface, combined where the angle exceeds pi: the formula, or c - m sin(m) as in 2022."""
    interclass_filtering_threshold: float = 0.0
    """A non-target cosine above it counts as 0, for classes that are one person; 0 is off."""
    subcenters: int = 1
    """Centers of each class, the nearest of which counts."""
    ema: float = 0.01
    """adaface, curricularface: a batch's share in the running means."""
    adaface_h: float = 0.333
    """adaface: how much of the norms' spread changes the margin."""
    magface_norms: tuple[float, float] = (10.0, 110.0)
    """magface: the norms between which the margin rises."""
    magface_margins: tuple[float, float] = (0.45, 0.8)
    """magface: the margins at these norms, radians."""
    magface_weight: float = 35.0
    """magface: factor of the loss that pulls norms upwards."""
    sample_rate: float = 1.0
    """Partial FC: the share of the classes that take part in a step; 0 is the batch's own alone."""
    unsampled: Literal["untouched", "decayed"] = "untouched"
    """Partial FC: the other centers rest, or momentum and decay move them too (arcface_torch)."""
    dtype: Dtype = "bfloat16"
    """Type of the matrix products' operands; sums, exponents and the log-sum-exp stay float32."""
    block_size: int = 2048
    """Classes a device looks at together; bounds the head's memory, changes no result."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class OptimizerConfig:
    """How the backbone and the class centers follow their gradients."""

    kind: OptimizerKind = "sgd"
    """sgd and adamw as torch defines them; lars and lamb give each of the backbone's arrays a rate
    of its own, and the class centers follow sgd (lars) or adamw (lamb). Or package.module:name of
    your own (docs/extending.md)."""
    options: tuple[tuple[str, float], ...] = ()
    """Settings of an optimizer of your own: NAME VALUE NAME VALUE."""
    learning_rate: float = 0.1
    """Base rate for the whole global batch."""
    momentum: float = 0.9
    """sgd, lars."""
    betas: tuple[float, float] = (0.9, 0.999)
    """adamw, lamb: of the running means of the gradient and of its square."""
    epsilon: float = 1e-8
    """adamw, lamb."""
    trust: float = 0.001
    """lars: the rate of an array is this times its norm over its gradient's."""
    weight_decay: float = 5e-4
    """On every trained array, BatchNorm included; lars and lamb leave vectors out."""
    clip_norm: float = 5.0
    """Largest global norm of the backbone's gradient."""
    micro_batches: int = 1
    """Slices of the global batch that pass the backbone one behind the other, to save memory: the
    result is that of the whole batch at once."""
    reduce_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type in which the devices add up the backbone's gradient."""
    ema: float = 0.0
    """Evaluate and export a running mean of the weights that keeps this share in each step, for
    instance 0.9999; 0 is off."""
    loss_scale: float = 65536.0
    """float16: the first factor on the embeddings' gradient; halved where it overflows."""
    loss_scale_steps: int = 100
    """float16: steps without an overflow after which the factor doubles."""
    stop_after_skipped: int = 20
    """Steps in a row without a finite gradient, which change nothing, that end the run."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class ScheduleConfig:
    """The learning rate over the run."""

    kind: Literal["polynomial", "cosine", "step"] = "polynomial"
    """Polynomial decay to zero, half a cosine to zero, or a constant factor at given epochs."""
    epochs: int = 20
    warmup_epochs: float = 0.0
    """Linear warm-up from zero."""
    warmup_steps: int = 0
    """The same in optimizer steps; state one of the two."""
    power: float = 1.0
    """polynomial: the exponent."""
    decay_epochs: tuple[int, ...] = ()
    """step: epochs at whose beginning the rate falls."""
    decay_factor: float = 0.1
    """step: what the rate is multiplied by."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class FineTuneConfig:
    """How a run treats weights that it does not begin with at random (docs/finetuning.md).

    A pattern is a dotted name with `*` and `?`, and has to fit one array at least.
    """

    centers: Literal["random", "class_means", "kept"] = "random"
    """The first class centers: random, the mean embeddings of the new classes, or, of the same
    classes, those of the run that init_from names."""
    frozen: tuple[str, ...] = ()
    """Patterns of the parameters that stay as they are, for instance layer1.*"""
    frozen_statistics: tuple[str, ...] = ()
    """Patterns of the BatchNorm statistics (X.mean, X.var) that are used as they are; * is all."""
    rates: tuple[tuple[str, float], ...] = ()
    """Pattern and factor on the learning rate; of several patterns that fit, the last counts."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class EvaluationConfig:
    """Verification during and after training."""

    targets: tuple[str, ...] = ()
    """Verification sets: .bin files or lists of pairs (docs/evaluation.md), absolute or relative to
    data.path, or the word "synthetic"; and evaluators of your own, package.module:name[:ARGUMENT]
    (docs/extending.md)."""
    every_epochs: float = 1.0
    """How often; 0 evaluates at the end alone."""
    batch_size: int = 256
    """Images per forward pass, over all devices."""
    baselines: bool = False
    """Score the first set before training too: by raw pixels, and by the untrained network."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class CheckpointConfig:
    """What is kept in WORKDIR/checkpoints."""

    every_epochs: float = 1.0
    """How often; 0 saves at the end (and on SIGTERM or Ctrl-C) alone."""
    keep: int = 2
    """How many of the newest stay on disk."""
    best_metric: str = ""
    """Keep the best too, by a number of an evaluation: eval/lfw/accuracy, eval/lfw/tar@far=1e-3,
    eval/lfw/eer. Then every evaluation is saved."""
    keep_best: int = 1
    """How many of the best stay on disk, besides the newest."""
    requeue_exit_code: int = 0
    """Exit code of a run that SIGTERM stopped and that can be started again; 0 is the usual 143."""
    deadline_seconds: float = 0.0
    """Seconds after SIGTERM or Ctrl-C when a run gives up its step or save and ends; 0 waits."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class LoggingConfig:
    """What is written while training."""

    every_steps: int = 20
    """Steps between two lines of metrics.jsonl."""
    stuck_steps: int = 2000
    """A loss that does not move in so many steps is reported."""
    tensorboard: bool = True
    csv: bool = False
    """Write metrics.csv beside metrics.jsonl."""
    wandb: str = ""
    """Project of Weights & Biases to log to; empty is none."""
    profile_steps: tuple[int, int] = (0, 0)
    """First and last step of a profiler trace in WORKDIR/profile; 0 0 is none."""
    watchdog_seconds: float = 0.0
    """Where a step, compilation included, takes longer, the stacks of all threads are written to
    stderr; 0 is off."""
    watchdog_abort: bool = False
    """And the process ends with code 1, to be started anew."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class DistributedConfig:
    """The processes of a run (docs/multi_host.md); SLURM, Open MPI and Kubernetes name them."""

    coordinator: str = ""
    """HOST:PORT: an address of process 0, and a free port there."""
    num_processes: int | None = None
    process_id: int | None = None
    """0 to num_processes - 1."""
    local_devices: tuple[int, ...] = ()
    """Which devices of its host this process takes; all of them when not given, or one each where
    SLURM or Open MPI starts several processes on a host."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Config:
    """One training run."""

    workdir: str = ""
    """Where everything is written; a run that stopped there is resumed by the same command."""
    seed: int = 0
    deterministic: bool = False
    """Make GPUs add up in one order, which costs time; CPUs always do."""
    compilation_cache: str = "~/.cache/arcface_jax"
    """Folder of compiled programs, which make restarts fast; JAX_COMPILATION_CACHE_DIR goes
    first, "" is off."""
    devices: int | None = None
    """How many devices to use; all of them when not given."""
    init_from: str = ""
    """Weights to begin with: the workdir of a run, a .pth or a .safetensors; random if empty."""
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    head: HeadConfig = HeadConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    finetune: FineTuneConfig = FineTuneConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()
    distributed: DistributedConfig = DistributedConfig()


# Fields that a resumed run may change: where it runs and what it writes, never what it computes.
MAY_DIFFER_ON_RESUME = (
    "workdir",
    "devices",
    "deterministic",
    "compilation_cache",
    "distributed.",
    "data.path",
    "data.max_bad_share",
    "data.workers",
    "data.threads",
    "data.prefetch_batches",
    "head.block_size",
    "optimizer.micro_batches",
    "optimizer.stop_after_skipped",
    "evaluation.",
    "checkpoint.",
    "logging.",
)


def batch_norm_groups(config: Config) -> int:
    """Into how many slices of equal size BatchNorm divides the global batch."""
    return max(1, config.data.global_batch_size // config.model.bn_batch_size)


def replace(config: Config, **changes: Any) -> Config:
    """A copy with fields changed, named by section and field joined with two underscores.

    `replace(config, data__path="faces", seed=1)` sets `data.path` and `seed`.
    """
    for name, value in changes.items():
        head, _, rest = name.partition("__")
        if rest:
            value = replace(getattr(config, head), **{rest: value})
        config = dataclasses.replace(config, **{head: value})
    return config
