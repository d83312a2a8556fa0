"""r100 on MS1MV3 (93,431 identities), ArcFace 0.5, as in insightface's model zoo of 2021.

    python scripts/train.py configs/ms1mv3_r100.py \\
        --data.path data/ms1m-retinaface-t1 --workdir runs/ms1mv3_r100

Published, on 8 GPUs with 128 images each, in fp16: IJB-C TAR at FAR 1e-5 / 1e-4 95.31 / 96.81,
AgeDB-30 98.48, CFP-FP 99.06, LFW 99.85. Not yet reproduced with this project.
"""

from arcface_jax.config import Config
from arcface_jax.config.recipes import ms1mv3_2021


def get_config() -> Config:
    return ms1mv3_2021("r100")
