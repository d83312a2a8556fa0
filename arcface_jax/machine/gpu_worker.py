"""The process that compiles for a GPU that need not be present, started by `machine.gpu`.

`python -m arcface_jax.machine.gpu_worker GPU DEVICES` reads one JSON request a line from stdin and
answers with one line of JSON on stdout. JAX only sees the CPU here, so nothing runs on a GPU, even
if there is one.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import IO, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax._src.cudnn import fused_attention_stablehlo
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from arcface_jax import config as configs
from arcface_jax.config import Config, loading
from arcface_jax.errors import UserError
from arcface_jax.heads import margin_softmax
from arcface_jax.heads.margin_softmax import Centers
from arcface_jax.machine import gpu, plan
from arcface_jax.runtime import devices as meshes
from arcface_jax.runtime.devices import AXIS
from arcface_jax.training import manifest, optim, step, validation


def main(name: str, devices: int, requests: IO[str], answers: IO[str]) -> None:
    """Answers each request until stdin ends."""
    # JAX asks cuDNN for its version while it traces attention. None is installed here, but the
    # program is for a machine that has it: XLA's target description names version 9.10.
    fused_attention_stablehlo.check_cudnn_version = lambda: 91002
    found = topologies.get_topology_desc(
        platform="cuda", topology=gpu.topology(devices), target_config=gpu.description(name)
    )
    mesh = Mesh(np.array(found.devices), (AXIS,), axis_types=(AxisType.Auto,))
    for line in requests:
        try:
            answer = _answer(json.loads(line), mesh)
        except UserError as error:
            answer = {"user_error": str(error)}
        except Exception as error:
            # Any error of the compiler: the requesting process reports it in one line.
            answer = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _answer(request: dict[str, Any], mesh: Mesh) -> dict[str, Any]:
    config = loading.from_json(json.dumps(request["config"]), source="request")
    config = configs.replace(
        config,
        devices=mesh.size,
        workdir=config.workdir or "-",
        data__path=config.data.path or "-",
    )
    num_classes = request["num_classes"]
    begin = time.perf_counter()
    if request["part"] == "head":
        lowered, state = _lower_head(config, num_classes=num_classes, mesh=mesh), {}
    else:
        validation.validate(config, num_devices=mesh.size)
        lowered, state = _lower_step(config, num_classes=num_classes, mesh=mesh)
    compiled = lowered.compile()
    seconds = time.perf_counter() - begin
    Path(request["text"]).write_text(compiled.as_text())
    memory = compiled.memory_analysis()
    return {
        "temporary_bytes": memory.temp_size_in_bytes,
        "argument_bytes": memory.argument_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
        "alias_bytes": memory.alias_size_in_bytes,
        "state": state,
        "seconds": seconds,
    }


def _lower_step(config: Config, *, num_classes: int, mesh: Mesh) -> tuple[Any, dict[str, int]]:
    """Lowers the train step as training calls it, and returns the bytes of its arguments."""
    batch = plan.batch_of(config, mesh)
    state = step.abstract_state(config, num_classes=num_classes, mesh=mesh)
    # The number of steps in an epoch only changes constants of the program.
    schedule = optim.make_schedule(config.schedule, base_rate=0.1, steps_per_epoch=10**6)
    run: Any = step.make_train_step(config, num_classes=num_classes, schedule=schedule, mesh=mesh)
    sizes = {**manifest.state_bytes(state), "batch": manifest.device_bytes(batch)}
    return run.lower(state, batch), sizes


def _lower_head(config: Config, *, num_classes: int, mesh: Mesh) -> Any:
    """Lowers the head's loss, gradient and update, for given embeddings."""
    split, whole = meshes.split(mesh), meshes.replicated(mesh)
    state = step.abstract_state(config, num_classes=num_classes, mesh=mesh)
    batch, size = config.data.global_batch_size, config.model.embedding_size
    key = jax.random.key(config.seed)

    def head(embeddings, labels, rows, moments, margin, steps):
        out = margin_softmax.apply(
            embeddings,
            labels,
            Centers(rows, moments, margin),
            learning_rate=jnp.float32(0.1),
            step=steps,
            key=jax.random.fold_in(key, steps),
            num_classes=num_classes,
            head=config.head,
            optimizer=config.optimizer,
            mesh=mesh,
        )
        return out.loss, out.d_embeddings, out.centers.rows, out.centers.moments, out.centers.state

    places = (whole, split, split, split, whole)
    return jax.jit(head, donate_argnums=(2, 3), out_shardings=places).lower(
        jax.ShapeDtypeStruct((batch, size), jnp.float32, sharding=split),
        jax.ShapeDtypeStruct((batch,), jnp.int32, sharding=split),
        state.centers,
        state.centers_opt,
        state.head_state,
        jax.ShapeDtypeStruct((), jnp.int32, sharding=whole),
    )


if __name__ == "__main__":
    # stdout is reserved for answers; output of libraries goes to stderr.
    stdout = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    main(sys.argv[1], int(sys.argv[2]), sys.stdin, stdout)
