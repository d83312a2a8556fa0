"""r50 on WebFace42M (2,059,906 identities, 42,474,557 images), CosFace 0.4, as in insightface.

    python scripts/train.py configs/wf42m_pfc02_8gpus_r50_bs4k.py \\
        --data.path data/WebFace42M --workdir runs/wf42m_pfc02_8gpus_r50_bs4k

Published, on 8 GPUs with 512 images each, in fp16: IJB-C TAR at FAR 1e-5 / 1e-4 96.16 / 97.53,
MFR-ALL 93.83. Not yet reproduced with this project.
"""

from arcface_jax.config import Config
from arcface_jax.config.recipes import WEBFACE42M, cosface


def get_config() -> Config:
    return cosface("r50", path=WEBFACE42M, per_gpu=512, rate=0.4, warmup_epochs=2, sample_rate=0.2)
