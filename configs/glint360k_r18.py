"""r18 on Glint360K (360,232 identities), CosFace 0.4, as in insightface's model zoo of 2021.

    python scripts/train.py configs/glint360k_r18.py \\
        --data.path data/glint360k --workdir runs/glint360k_r18

Published, on 8 GPUs with 128 images each, in fp16: IJB-C TAR at FAR 1e-5 / 1e-4 93.16 / 95.33,
AgeDB-30 97.72, CFP-FP 97.73, LFW 99.77. Not yet reproduced with this project.

Each step uses a tenth of the class centers (Partial FC); --head.sample-rate 1 uses all.
"""

from arcface_jax.config import Config
from arcface_jax.config.recipes import glint360k_2021


def get_config() -> Config:
    return glint360k_2021("r18")
