"""r100 on WebFace42M (2,059,906 identities, 42,474,557 images), CosFace 0.4, as in insightface.

    python scripts/train.py configs/wf42m_pfc0008_32gpu_r100.py \\
        --data.path data/WebFace42M --workdir runs/wf42m_pfc0008_32gpu_r100

Published, on 32 GPUs with 512 images each, in fp16: IJB-C TAR at FAR 1e-5 / 1e-4 95.88 / 97.51,
MFR-ALL 93.08. Not yet reproduced with this project.

Each step uses only the classes in the batch: at most 16,384 of 2,059,906, the 0.008 in the name.
"""

from arcface_jax.config import Config
from arcface_jax.config.recipes import WEBFACE42M, cosface


def get_config() -> Config:
    return cosface(
        "r100", path=WEBFACE42M, gpus=32, per_gpu=512, rate=0.4, warmup_epochs=2, sample_rate=0
    )
