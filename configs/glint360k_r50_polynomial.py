"""r50 on Glint360K (360,232 identities, 17,091,657 images), CosFace 0.4, as in insightface.

    python scripts/train.py configs/glint360k_r50_polynomial.py \\
        --data.path data/glint360k --workdir runs/glint360k_r50_polynomial

Published, on 8 GPUs with 128 images each, in fp16: IJB-C TAR at FAR 1e-5 / 1e-4 95.81 / 97.16,
MFR-ALL 86.34. Not yet reproduced with this project.

Every step uses all classes; glint360k_r50 has the settings of 2021 and samples a tenth.
"""

from arcface_jax.config import Config
from arcface_jax.config.recipes import GLINT360K, cosface


def get_config() -> Config:
    return cosface("r50", path=GLINT360K, weight_decay=1e-4)
