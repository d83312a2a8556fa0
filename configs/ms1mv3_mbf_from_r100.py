"""mbf on MS1MV3 with r100 as teacher: ms1mv3_mbf plus the cosine to the teacher's embeddings.

    python scripts/train.py configs/ms1mv3_mbf_from_r100.py \\
        --data.path data/ms1m-retinaface-t1 --distill.teacher runs/ms1mv3_r100 \\
        --workdir runs/ms1mv3_mbf_from_r100

For 8 GPUs with 128 images each, as ms1mv3_mbf. The teacher is a workdir, a .pth or an ONNX file;
its embeddings take 5.3 GB of disk. No published figures, and not run yet.
"""

import dataclasses

from arcface_jax.config import Config, DistillConfig
from arcface_jax.config.recipes import MS1MV3, ms1m


def get_config() -> Config:
    return dataclasses.replace(
        ms1m("mbf", path=MS1MV3, epochs=40, weight_decay=1e-4),
        # As strong as the head's gradient, whose scale is 64.
        distill=DistillConfig(teacher="runs/ms1mv3_r100", weight=64.0),
    )
