"""r50 on WebFace42M (2,059,906 identities, 42,474,557 images), CosFace 0.4, as in insightface.

    python scripts/train.py configs/wf42m_pfc02_16gpus_r50_bs8k.py \\
        --data.path data/WebFace42M --workdir runs/wf42m_pfc02_16gpus_r50_bs8k

Published, on 16 GPUs with 512 images each, in fp16: IJB-C TAR at FAR 1e-5 / 1e-4 96.12 / 97.46,
MFR-ALL 93.96. Not yet reproduced with this project.
"""

from arcface_jax.config import Config
from arcface_jax.config.recipes import WEBFACE42M, cosface


def get_config() -> Config:
    return cosface(
        "r50", path=WEBFACE42M, gpus=16, per_gpu=512, rate=0.6, warmup_epochs=4, sample_rate=0.2
    )
