"""mbf on 100,000 images of noise in 300,000 classes, CosFace 0.4: insightface's speed test.

    python scripts/train.py configs/synthetic_mbf.py --workdir runs/synthetic_mbf

For 8 GPUs with 512 images each. There is nothing to learn: watch perf/images_per_sec.
No published figures in insightface's README. `--data.noise.classes 10000000` tries a larger head.
"""

from arcface_jax.config import Config
from arcface_jax.config.recipes import speed_test


def get_config() -> Config:
    return speed_test()
