"""r50 on MS1MV3 (93,431 identities, 5,179,510 images), ArcFace 0.5, as in insightface.

    python scripts/train.py configs/ms1mv3_r50_polynomial.py \\
        --data.path data/ms1m-retinaface-t1 --workdir runs/ms1mv3_r50_polynomial

Published, on 8 GPUs with 128 images each, in fp16: IJB-C TAR at FAR 1e-5 / 1e-4 94.47 / 96.37,
MFR-ALL 79.14. Not yet reproduced with this project.

ms1mv3_r50 has the settings of 2021.
"""

from arcface_jax.config import Config
from arcface_jax.config.recipes import MS1MV3, ms1m


def get_config() -> Config:
    return ms1m("r50", path=MS1MV3)
