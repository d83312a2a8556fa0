"""vit_s_dp005_mask_0 on WebFace42M, CosFace 0.4, as in insightface.

    python scripts/train.py configs/wf42m_pfc03_40epoch_64gpu_vit_s.py \\
        --data.path data/WebFace42M --workdir runs/wf42m_pfc03_40epoch_64gpu_vit_s

WebFace42M (2,059,906 identities, 42,474,557 images). Published, on 64 GPUs with 384 images each,
in fp16: IJB-C TAR at FAR 1e-5 / 1e-4 96.57 / 97.73, MFR-ALL 95.87. Not yet reproduced with this
project.
"""

from arcface_jax.config import Config
from arcface_jax.config.recipes import webface42m_vit


def get_config() -> Config:
    return webface42m_vit("vit_s_dp005_mask_0")
