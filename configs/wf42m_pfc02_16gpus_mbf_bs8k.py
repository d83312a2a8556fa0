"""mbf on WebFace42M (2,059,906 identities, 42,474,557 images), CosFace 0.4, as in insightface.

    python scripts/train.py configs/wf42m_pfc02_16gpus_mbf_bs8k.py \\
        --data.path data/WebFace42M --workdir runs/wf42m_pfc02_16gpus_mbf_bs8k

For 16 GPUs with 512 images each. No published figures in insightface's README.
"""

from arcface_jax.config import Config
from arcface_jax.config.recipes import WEBFACE42M, cosface


def get_config() -> Config:
    return cosface(
        "mbf",
        path=WEBFACE42M,
        gpus=16,
        per_gpu=512,
        rate=0.4,
        warmup_epochs=2,
        sample_rate=0.2,
        weight_decay=1e-4,
    )
