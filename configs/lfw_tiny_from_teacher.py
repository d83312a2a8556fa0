"""r_tiny on Labeled Faces in the Wild with a teacher: lfw_tiny, and the cosine to its embeddings.

    python scripts/train.py configs/lfw_tiny_from_teacher.py --data.path FOLDER \\
        --distill.teacher TEACHER --workdir runs/lfw_tiny_from_teacher

TEACHER is the workdir of a run, a .pth or an ONNX file.
"""

import dataclasses

from arcface_jax import config as c
from arcface_jax.config import loading


def get_config() -> c.Config:
    return dataclasses.replace(
        loading.read_recipe("lfw_tiny"),
        distill=c.DistillConfig(views="both", weight=32.0),
    )
