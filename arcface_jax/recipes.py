"""What several recipes in `configs/` share: the data sets and settings of insightface's zoo.

Source: insightface, recognition/arcface_torch, its configurations and README of 2021.
"""

from arcface_jax.config import (
    Config,
    DataConfig,
    EvaluationConfig,
    HeadConfig,
    ModelConfig,
    Network,
    OptimizerConfig,
    ScheduleConfig,
)

# The sets that come with insightface's training data, beside train.rec.
TARGETS = ("lfw.bin", "cfp_fp.bin", "agedb_30.bin")


def zoo_2021(
    network: Network,
    *,
    path: str,
    head: HeadConfig,
    epochs: int,
    decay_epochs: tuple[int, ...],
) -> Config:
    """Eight GPUs with 128 images each, rate 0.2 (0.1 for every 512 images) and no warm-up."""
    return Config(
        data=DataConfig(path=path, global_batch_size=1024),
        model=ModelConfig(network=network, bn_batch_size=128),
        head=head,
        optimizer=OptimizerConfig(learning_rate=0.2, weight_decay=5e-4),
        schedule=ScheduleConfig(kind="step", epochs=epochs, decay_epochs=decay_epochs),
        evaluation=EvaluationConfig(targets=TARGETS, batch_size=1024),
    )


def ms1mv3_2021(network: Network) -> Config:
    """MS1MV3 (93,431 identities, 5,179,510 images), ArcFace 0.5, 25 epochs."""
    return zoo_2021(
        network,
        path="data/ms1m-retinaface-t1",
        head=HeadConfig(loss="arcface", margin=0.5, gradient="exact"),
        epochs=25,
        decay_epochs=(10, 16, 22),
    )


def glint360k_2021(network: Network) -> Config:
    """Glint360K (360,232 identities, 17,091,657 images), CosFace 0.4 on a tenth of them."""
    return zoo_2021(
        network,
        path="data/glint360k",
        head=HeadConfig(loss="cosface", margin=0.4, sample_rate=0.1),
        epochs=20,
        decay_epochs=(8, 12, 15, 18),
    )
