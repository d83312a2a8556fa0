"""r18 on MS1MV3 (93,431 identities), ArcFace 0.5, as in insightface's model zoo of 2021.

    python scripts/train.py configs/ms1mv3_r18.py \\
        --data.path data/ms1m-retinaface-t1 --workdir runs/ms1mv3_r18

Published, on 8 GPUs with 128 images each, in fp16: IJB-C TAR at FAR 1e-5 / 1e-4 92.07 / 94.66,
AgeDB-30 97.77, CFP-FP 97.73, LFW 99.77. Not yet reproduced with this project.
"""

from arcface_jax.config import Config
from arcface_jax.config.recipes import ms1mv3_2021


def get_config() -> Config:
    return ms1mv3_2021("r18")
