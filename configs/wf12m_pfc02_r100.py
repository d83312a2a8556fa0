"""r100 on WebFace12M (617,970 identities, 12,720,066 images), CosFace 0.4, as in insightface.

    python scripts/train.py configs/wf12m_pfc02_r100.py \\
        --data.path data/WebFace12M --workdir runs/wf12m_pfc02_r100

Published, on 8 GPUs with 128 images each, in fp16: IJB-C TAR at FAR 1e-5 / 1e-4 95.90 / 97.60,
MFR-ALL 94.75. Not yet reproduced with this project.
"""

from arcface_jax.config import Config
from arcface_jax.config.recipes import WEBFACE12M, cosface


def get_config() -> Config:
    return cosface("r100", path=WEBFACE12M, sample_rate=0.2)
