"""vit_b_dp005_mask_005 on WebFace42M, CosFace 0.4, as in insightface.

    python scripts/train.py configs/wf42m_pfc03_40epoch_8gpu_vit_b.py \\
        --data.path data/WebFace42M --workdir runs/wf42m_pfc03_40epoch_8gpu_vit_b

WebFace42M (2,059,906 identities, 42,474,557 images). Published, on 8 GPUs with 256 images each, in
fp16: IJB-C TAR at FAR 1e-5 / 1e-4 97.05 / 97.91, MFR-ALL 97.16. Not yet reproduced with this
project.

insightface accumulates twelve such batches before each update, which then sees 24,576 images.
"""

from arcface_jax.config import Config
from arcface_jax.config.recipes import webface42m_vit


def get_config() -> Config:
    return webface42m_vit("vit_b_dp005_mask_005", gpus=8, per_gpu=256, updates_every=12)
