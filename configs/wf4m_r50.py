"""r50 on WebFace4M (205,990 identities, 4,235,242 images), CosFace 0.4, as in insightface.

    python scripts/train.py configs/wf4m_r50.py \\
        --data.path data/WebFace4M --workdir runs/wf4m_r50

For 8 GPUs with 128 images each. No published figures in insightface's README.
"""

from arcface_jax.config import Config
from arcface_jax.config.recipes import WEBFACE4M, cosface


def get_config() -> Config:
    return cosface("r50", path=WEBFACE4M)
