"""mbf on MS1MV3 (93,431 identities, 5,179,510 images), ArcFace 0.5, as in insightface.

    python scripts/train.py configs/ms1mv3_mbf.py \\
        --data.path data/ms1m-retinaface-t1 --workdir runs/ms1mv3_mbf

Published, on 8 GPUs with 128 images each, in fp16: IJB-C TAR at FAR 1e-5 / 1e-4 91.33 / 94.23,
MFR-ALL 63.78. Not yet reproduced with this project.
"""

from arcface_jax.config import Config
from arcface_jax.config.recipes import MS1MV3, ms1m


def get_config() -> Config:
    return ms1m("mbf", path=MS1MV3, epochs=40, weight_decay=1e-4)
