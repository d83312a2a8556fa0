"""mbf on WebFace12M (617,970 identities, 12,720,066 images), CosFace 0.4, as in insightface.

    python scripts/train.py configs/wf12m_mbf.py \\
        --data.path data/WebFace12M --workdir runs/wf12m_mbf

For 8 GPUs with 128 images each. No published figures in insightface's README.
"""

from arcface_jax.config import Config
from arcface_jax.config.recipes import WEBFACE12M, cosface


def get_config() -> Config:
    return cosface("mbf", path=WEBFACE12M, weight_decay=1e-4)
