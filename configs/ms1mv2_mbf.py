"""mbf on MS1MV2 (85,742 identities, 5,822,653 images), ArcFace 0.5, as in insightface.

    python scripts/train.py configs/ms1mv2_mbf.py \\
        --data.path data/faces_emore --workdir runs/ms1mv2_mbf

Published, on 8 GPUs with 128 images each, in fp16: IJB-C TAR at FAR 1e-5 / 1e-4 90.28 / 93.61,
MFR-ALL 62.07. Not yet reproduced with this project.
"""

from arcface_jax.config import Config
from arcface_jax.config.recipes import MS1MV2, ms1m


def get_config() -> Config:
    return ms1m("mbf", path=MS1MV2, epochs=40, weight_decay=1e-4)
