"""r50 on WebFace12M (617,970 identities, 12,720,066 images), CosFace 0.4, as in insightface.

    python scripts/train.py configs/wf12m_r50.py \\
        --data.path data/WebFace12M --workdir runs/wf12m_r50

For 8 GPUs with 128 images each. No published figures in insightface's README.
"""

from arcface_jax.config import Config
from arcface_jax.config.recipes import WEBFACE12M, cosface


def get_config() -> Config:
    return cosface("r50", path=WEBFACE12M)
