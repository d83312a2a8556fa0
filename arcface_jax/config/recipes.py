"""Building blocks of the recipes in `configs/`: insightface's data sets and settings.

Source: insightface, recognition/arcface_torch, its configurations and README, of 2021 (`zoo_2021`)
and of today.
"""

from arcface_jax.config import (
    Config,
    DataConfig,
    EvaluationConfig,
    HeadConfig,
    ModelConfig,
    Network,
    NoiseConfig,
    OptimizerConfig,
    ScheduleConfig,
    replace,
)

MS1MV2 = "data/faces_emore"
MS1MV3 = "data/ms1m-retinaface-t1"
GLINT360K = "data/glint360k"
WEBFACE4M = "data/WebFace4M"
WEBFACE12M = "data/WebFace12M"
WEBFACE12M_FLIP = "data/WebFace12M_FLIP40"
WEBFACE12M_CONFLICT = "data/WebFace12M_Conflict"
WEBFACE42M = "data/WebFace42M"

# Verification sets that come with insightface's training data, next to train.rec.
TARGETS = ("lfw.bin", "cfp_fp.bin", "agedb_30.bin")


def zoo_2021(
    network: Network,
    *,
    path: str,
    head: HeadConfig,
    epochs: int,
    decay_epochs: tuple[int, ...],
    per_gpu: int = 128,
) -> Config:
    """Makes a recipe of 2021: eight GPUs, rate 0.1 per 512 images, falling in steps, no warm-up."""
    batch = 8 * per_gpu
    return _config(
        network,
        path=path,
        head=head,
        gpus=8,
        per_gpu=per_gpu,
        optimizer=OptimizerConfig(learning_rate=0.1 * batch / 512, weight_decay=5e-4),
        schedule=ScheduleConfig(kind="step", epochs=epochs, decay_epochs=decay_epochs),
    )


def ms1mv3_2021(network: Network, *, per_gpu: int = 128) -> Config:
    """Makes a recipe for MS1MV3 (93,431 identities, 5,179,510 images), ArcFace 0.5, 25 epochs."""
    return zoo_2021(
        network,
        path=MS1MV3,
        head=HeadConfig(loss="arcface", margin=0.5, gradient="exact"),
        epochs=25,
        decay_epochs=(10, 16, 22),
        per_gpu=per_gpu,
    )


def glint360k_2021(network: Network) -> Config:
    """Makes a recipe for Glint360K (360,232 identities, 17,091,657 images), CosFace 0.4, sampling
    0.1.
    """
    return zoo_2021(
        network,
        path=GLINT360K,
        head=HeadConfig(loss="cosface", margin=0.4, sample_rate=0.1),
        epochs=20,
        decay_epochs=(8, 12, 15, 18),
    )


def ms1m(
    network: Network,
    *,
    path: str,
    gpus: int = 8,
    rate: float = 0.1,
    weight_decay: float = 5e-4,
    epochs: int = 20,
) -> Config:
    """Makes a recipe for MS1MV2 (85,742 identities, 5,822,653 images) or MS1MV3, ArcFace 0.5."""
    return _config(
        network,
        path=path,
        head=HeadConfig(loss="arcface", margin=0.5),
        gpus=gpus,
        per_gpu=128,
        optimizer=OptimizerConfig(learning_rate=rate, weight_decay=weight_decay),
        schedule=ScheduleConfig(epochs=epochs),
    )


def cosface(
    network: Network,
    *,
    path: str,
    gpus: int = 8,
    per_gpu: int = 128,
    rate: float = 0.1,
    weight_decay: float = 5e-4,
    warmup_epochs: float = 0,
    sample_rate: float = 1,
    filter_above: float = 0,
) -> Config:
    """Makes a recipe for Glint360K or the WebFace sets, CosFace 0.4, SGD, 20 epochs."""
    return _config(
        network,
        path=path,
        head=_cosface(sample_rate, filter_above),
        gpus=gpus,
        per_gpu=per_gpu,
        optimizer=OptimizerConfig(learning_rate=rate, weight_decay=weight_decay),
        schedule=ScheduleConfig(epochs=20, warmup_epochs=warmup_epochs),
    )


def webface42m_vit(
    network: Network,
    *,
    gpus: int = 64,
    per_gpu: int = 384,
    updates_every: int = 1,
    epochs: int = 40,
    warmup_epochs: float = 4,
    sample_rate: float = 0.3,
) -> Config:
    """Makes a recipe for WebFace42M (2,059,906 identities, 42,474,557 images), CosFace 0.4, AdamW.

    With several batches per update (`updates_every`), the global batch is their sum, which each GPU
    processes in as many slices.
    """
    return _config(
        network,
        path=WEBFACE42M,
        head=_cosface(sample_rate, 0),
        gpus=gpus * updates_every,
        per_gpu=per_gpu,
        optimizer=OptimizerConfig(
            kind="adamw", learning_rate=1e-3, weight_decay=0.1, micro_batches=updates_every
        ),
        schedule=ScheduleConfig(epochs=epochs, warmup_epochs=warmup_epochs),
    )


def speed_test() -> Config:
    """Makes arcface_torch's speed test: 300,000 classes, 100,000 images of noise; nothing to
    learn.
    """
    config = cosface("mbf", path="noise", per_gpu=512, sample_rate=0.1)
    noise = NoiseConfig(classes=300_000, images=100_000)
    return replace(config, data__noise=noise, evaluation__targets=(), schedule__epochs=30)


def _cosface(sample_rate: float, filter_above: float) -> HeadConfig:
    """Makes the head as in arcface_torch today: momentum and decay also move unsampled centers."""
    return HeadConfig(
        loss="cosface",
        margin=0.4,
        sample_rate=float(sample_rate),
        unsampled="untouched" if sample_rate == 1 else "decayed",
        interclass_filtering_threshold=float(filter_above),
    )


def _config(
    network: Network,
    *,
    path: str,
    head: HeadConfig,
    gpus: int,
    per_gpu: int,
    optimizer: OptimizerConfig,
    schedule: ScheduleConfig,
) -> Config:
    return Config(
        data=DataConfig(path=path, global_batch_size=gpus * per_gpu),
        model=ModelConfig(network=network, bn_batch_size=per_gpu),
        head=head,
        optimizer=optimizer,
        schedule=schedule,
        evaluation=EvaluationConfig(targets=TARGETS, batch_size=1024),
    )
