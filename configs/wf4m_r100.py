"""r100 on WebFace4M (205,990 identities, 4,235,242 images), CosFace 0.4, as in insightface.

    python scripts/train.py configs/wf4m_r100.py \\
        --data.path data/WebFace4M --workdir runs/wf4m_r100

Published, on 8 GPUs with 128 images each, in fp16: IJB-C TAR at FAR 1e-5 / 1e-4 95.48 / 97.19,
MFR-ALL 89.87. Not yet reproduced with this project.
"""

from arcface_jax.config import Config
from arcface_jax.config.recipes import WEBFACE4M, cosface


def get_config() -> Config:
    return cosface("r100", path=WEBFACE4M)
