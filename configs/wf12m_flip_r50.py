"""r50 on WebFace12M with 40 % of the labels wrong, CosFace 0.4, as in insightface.

    python scripts/train.py configs/wf12m_flip_r50.py \\
        --data.path data/WebFace12M_FLIP40 --workdir runs/wf12m_flip_r50

WebFace12M with 40 % of the labels wrong (617,970 identities). Published, on 8 GPUs with 128 images
each, in fp16: IJB-C TAR at FAR 1e-5 / 1e-4 80.78 / 88.35, MFR-ALL 43.87. Not yet reproduced with
this project.
"""

from arcface_jax.config import Config
from arcface_jax.config.recipes import WEBFACE12M_FLIP, cosface


def get_config() -> Config:
    return cosface("r50", path=WEBFACE12M_FLIP, warmup_epochs=2)
