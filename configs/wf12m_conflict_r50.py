"""r50 on WebFace12M with split identities, CosFace 0.4, as in insightface.

    python scripts/train.py configs/wf12m_conflict_r50.py \\
        --data.path data/WebFace12M_Conflict --workdir runs/wf12m_conflict_r50

WebFace12M with split identities (1,017,970 identities). Published, on 8 GPUs with 128 images
each, in fp16: IJB-C TAR at FAR 1e-5 / 1e-4 91.56 / 95.30, MFR-ALL 79.93. Not yet reproduced with
this project.
"""

from arcface_jax.config import Config
from arcface_jax.config.recipes import WEBFACE12M_CONFLICT, cosface


def get_config() -> Config:
    return cosface("r50", path=WEBFACE12M_CONFLICT, warmup_epochs=2)
