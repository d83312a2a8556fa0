"""r18 on WebFace42M (2,059,906 identities, 42,474,557 images), CosFace 0.4, as in insightface.

    python scripts/train.py configs/wf42m_pfc03_32gpu_r18.py \\
        --data.path data/WebFace42M --workdir runs/wf42m_pfc03_32gpu_r18

Published, on 32 GPUs with 128 images each, in fp16: IJB-C TAR at FAR 1e-5 / 1e-4 93.36 / 95.77,
MFR-ALL 79.13. Not yet reproduced with this project.
"""

from arcface_jax.config import Config
from arcface_jax.config.recipes import WEBFACE42M, cosface


def get_config() -> Config:
    return cosface("r18", path=WEBFACE42M, gpus=32, rate=0.4, warmup_epochs=2, sample_rate=0.3)
