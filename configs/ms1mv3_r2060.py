"""r2060 on MS1MV3 (93,431 identities), ArcFace 0.5, as in insightface's model zoo of 2021.

    python scripts/train.py configs/ms1mv3_r2060.py \\
        --data.path data/ms1m-retinaface-t1 --workdir runs/ms1mv3_r2060

Published, on 8 GPUs with 64 images each, in fp16: IJB-C TAR at FAR 1e-5 / 1e-4 95.34 / 97.11,
AgeDB-30 98.67, CFP-FP 99.24, LFW 99.87. Not yet reproduced with this project.
"""

from arcface_jax.config import Config
from arcface_jax.config.recipes import ms1mv3_2021


def get_config() -> Config:
    return ms1mv3_2021("r2060", per_gpu=64)
