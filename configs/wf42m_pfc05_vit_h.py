"""vit_h on WebFace42M (2,059,906 identities, 42,474,557 images), CosFace 0.4, as in insightface.

    python scripts/train.py configs/wf42m_pfc05_vit_h.py \\
        --data.path data/WebFace42M --workdir runs/wf42m_pfc05_vit_h

For 8 GPUs with 768 images each. No published figures in insightface's README.

insightface states 768 images per GPU and no number of GPUs; eight are this recipe's choice. The
images are augmented as its dali_aug does.
"""

from arcface_jax.config import Config, replace
from arcface_jax.config.recipes import webface42m_vit


def get_config() -> Config:
    config = webface42m_vit(
        "vit_h", gpus=8, per_gpu=768, epochs=16, warmup_epochs=2, sample_rate=0.5
    )
    return replace(config, data__augment__sets=("dali",))
