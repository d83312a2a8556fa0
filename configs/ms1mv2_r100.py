"""r100 on MS1MV2 (85,742 identities, 5,822,653 images), ArcFace 0.5, as in insightface.

    python scripts/train.py configs/ms1mv2_r100.py \\
        --data.path data/faces_emore --workdir runs/ms1mv2_r100

Published, on 8 GPUs with 128 images each, in fp16: IJB-C TAR at FAR 1e-5 / 1e-4 94.27 / 96.37,
MFR-ALL 78.12. Not yet reproduced with this project.
"""

from arcface_jax.config import Config
from arcface_jax.config.recipes import MS1MV2, ms1m


def get_config() -> Config:
    return ms1m("r100", path=MS1MV2)
