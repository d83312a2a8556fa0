"""Fills one cache of a teacher from two processes.

python teacher_in_processes.py COORDINATOR PROCESS FOLDER
"""

import sys
from pathlib import Path

import jax
import numpy as np
import test_teacher

from arcface_jax.training import teacher

if __name__ == "__main__":
    coordinator, process, folder = sys.argv[1:]
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(coordinator, num_processes=2, process_id=int(process))
    teacher.SHARD, teacher._PIECE = 8, 4
    model = test_teacher.Model()
    cache = test_teacher.opened(Path(folder), model)
    found = cache(np.arange(test_teacher.IMAGES))
    np.savez(f"{folder}-{process}.npz", found=found, seen=model.seen)
