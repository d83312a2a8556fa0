"""Start a run's processes: find each other, configure JAX, decide who writes.

Under SLURM, Open MPI and Kubernetes the launcher's own variables hold all that JAX needs; elsewhere
`--distributed.coordinator`, `--distributed.num-processes` and `--distributed.process-id` do
(docs/multi_host.md).
"""

import importlib.util
import os
import re
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import jax
from jax.experimental import multihost_utils

from arcface_jax.config import Config, DistributedConfig
from arcface_jax.errors import ConfigError
from arcface_jax.runtime.signals import Stop

Cluster = Literal["slurm", "ompi", "k8s"]
_SECONDS_TO_MEET = 300


def join_processes(config: DistributedConfig) -> None:
    """Joins the processes of the run, before anything asks JAX for its devices.

    One process, without a launcher and without options, does nothing.

    Raises:
      ConfigError: the options are incomplete, or the other processes were not found.
    """
    cluster = None if config.coordinator or config.num_processes else find_cluster(os.environ)
    if cluster is None and not _by_options(config):
        return
    if cluster == "k8s" and importlib.util.find_spec("kubernetes") is None:
        raise ConfigError(
            "an indexed job of Kubernetes finds its processes with a package that is missing: "
            "pip install 'jax[k8s]', or name them with --distributed.coordinator HOST:PORT "
            "--distributed.num-processes N --distributed.process-id I"
        )
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(
            config.coordinator or None,
            config.num_processes,
            config.process_id,
            local_device_ids=local_devices(config, cluster, os.environ),
            # JAX has a name for the others, not for Kubernetes.
            cluster_detection_method=(None if cluster == "k8s" else cluster or "deactivate"),
            initialization_timeout=_SECONDS_TO_MEET,
        )
    except (RuntimeError, ValueError) as error:
        where = config.coordinator or f"what {cluster} says"
        raise ConfigError(
            f"the processes of this run did not meet at {where}: {error}. All of them have to be "
            f"started within {_SECONDS_TO_MEET} s, with one coordinator (an address of process 0 "
            "and a free port), and with process ids 0 to N - 1"
        ) from error


def _by_options(config: DistributedConfig) -> bool:
    """Whether the options name several processes."""
    count = config.num_processes
    if count == 1 or (count is None and not config.coordinator and config.process_id is None):
        return False
    if count is None or not config.coordinator or config.process_id is None:
        raise ConfigError(
            "distributed.coordinator, distributed.num_processes and distributed.process_id belong "
            f"together, and are {config.coordinator!r}, {count} and {config.process_id}: give all "
            "three, or none under SLURM, Open MPI or Kubernetes"
        )
    if count < 1 or not 0 <= config.process_id < count or ":" not in config.coordinator:
        raise ConfigError(
            f"distributed.process_id {config.process_id} must be 0 to num_processes - 1 "
            f"({count - 1}), and distributed.coordinator {config.coordinator!r} HOST:PORT"
        )
    return True


def find_cluster(environment: Mapping[str, str]) -> Cluster | None:
    """The launcher that started this process as one of several, by JAX's name for it.

    The variables are those that JAX's own detection reads; a job of one task is one process.
    """
    slurm = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID")
    if all(name in environment for name in slurm):
        return "slurm" if int(environment.get("SLURM_NTASKS", 1)) > 1 else None
    if "OMPI_MCA_orte_hnp_uri" in environment:
        return "ompi" if int(environment.get("OMPI_COMM_WORLD_SIZE", 1)) > 1 else None
    # Every pod has the first; an indexed job's alone the second.
    if {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= environment.keys():
        return "k8s"
    return None


def local_devices(
    config: DistributedConfig, cluster: Cluster | None, environment: Mapping[str, str]
) -> list[int] | None:
    """The devices of its host that this process takes; an empty list is all, None leaves it to JAX.

    JAX gives each process of SLURM and Open MPI one device, even where it is alone on its host.
    """
    if config.local_devices:
        return list(config.local_devices)
    if cluster == "slurm":
        counts = environment.get("SLURM_STEP_TASKS_PER_NODE", "1")  # for instance 8(x2),4
        alone = all(int(n) == 1 for n in re.findall(r"(?:^|,)(\d+)", counts))
        return [] if alone else None
    if cluster == "ompi":
        return [] if environment.get("OMPI_COMM_WORLD_LOCAL_SIZE", "1") == "1" else None
    return []


def is_first() -> bool:
    """Whether this process writes what a run writes once: all but its part of the checkpoints."""
    return jax.process_index() == 0


@contextmanager
def first_alone() -> Iterator[None]:
    """The first process does it, then all others."""
    if not is_first():
        multihost_utils.sync_global_devices("first")
    yield
    if is_first():
        multihost_utils.sync_global_devices("first")


def to_stop(stop: Stop, step: int) -> bool:
    """Whether the run ends here: a signal came, to whichever process, and all are at this step.

    Args:
      stop: has the signals that came here; of several processes JAX watches for SIGTERM.
      step: about to be done.
    """
    if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
        stop.signals.append(signal.SIGTERM)
        stop.count_down(signal.SIGTERM)
    return bool(stop)


def own_name(name: str) -> str:
    """A file's name for each process: that of the first as given, the others' with a number."""
    stem, dot, ending = name.rpartition(".")
    return name if is_first() else f"{stem}_{jax.process_index()}{dot}{ending}"


_DETERMINISTIC = "--xla_gpu_deterministic_ops=true"


def start(config: Config) -> None:
    """Makes this process ready for a run; the first thing that a command does with its recipe.

    Raises:
      ConfigError: the processes of the run do not find each other.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if config.deterministic and _DETERMINISTIC not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {_DETERMINISTIC}".strip()
    if config.compilation_cache and "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        folder = Path(config.compilation_cache).expanduser()
        jax.config.update("jax_compilation_cache_dir", str(folder))
    join_processes(config.distributed)
