"""r50 on MS1MV3 (93,431 identities, 5,179,510 images), ArcFace 0.5, as in insightface.

    python scripts/train.py configs/ms1mv3_r50_onegpu.py \\
        --data.path data/ms1m-retinaface-t1 --workdir runs/ms1mv3_r50_onegpu

For one GPU with 128 images. No published figures in insightface's README.
"""

from arcface_jax.config import Config
from arcface_jax.config.recipes import MS1MV3, ms1m


def get_config() -> Config:
    return ms1m("r50", path=MS1MV3, gpus=1, rate=0.02)
