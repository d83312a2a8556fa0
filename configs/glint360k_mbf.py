"""mbf on Glint360K (360,232 identities, 17,091,657 images), CosFace 0.4, as in insightface.

    python scripts/train.py configs/glint360k_mbf.py \\
        --data.path data/glint360k --workdir runs/glint360k_mbf

Published, on 8 GPUs with 128 images each, in fp16: IJB-C TAR at FAR 1e-5 / 1e-4 92.62 / 95.04,
MFR-ALL 70.18. Not yet reproduced with this project.
"""

from arcface_jax.config import Config
from arcface_jax.config.recipes import GLINT360K, cosface


def get_config() -> Config:
    return cosface("mbf", path=GLINT360K, weight_decay=1e-4)
