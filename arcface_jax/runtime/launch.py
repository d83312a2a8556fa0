"""Start a run's processes: configure JAX, connect them, and coordinate their work.

Under SLURM, Open MPI and Kubernetes the launcher's variables have all that JAX needs; elsewhere
`--distributed.coordinator`, `--distributed.num-processes` and `--distributed.process-id` do
(docs/multi_host.md).
"""

import importlib.util
import os
import platform
import re
import signal
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Literal

import jax
import numpy as np
from jax.experimental import multihost_utils

from arcface_jax.config import DistributedConfig
from arcface_jax.errors import CheckpointError, ConfigError, DataError, UserError
from arcface_jax.runtime import homes, locks, signals
from arcface_jax.runtime.signals import Stop

Cluster = Literal["slurm", "ompi", "k8s"]
_CONNECT_SECONDS = 300
# Kinds of errors that a process reports to the others.
_ERRORS = {kind.__name__: kind for kind in (ConfigError, DataError, CheckpointError, UserError)}
_DETERMINISTIC = "--xla_gpu_deterministic_ops=true"


def join_processes(config: DistributedConfig) -> None:
    """Connects the processes of the run; call it before anything asks JAX for its devices.

    Does nothing for a single process without a launcher and without options.

    Raises:
      ConfigError: the options are incomplete, or the coordinator cannot be reached.
    """
    cluster = None if config.coordinator or config.num_processes else find_cluster(os.environ)
    if cluster is None and not _by_options(config):
        return
    if cluster == "k8s" and importlib.util.find_spec("kubernetes") is None:
        raise ConfigError(
            "an indexed Kubernetes job needs the package kubernetes to find its processes: pip "
            "install 'jax[k8s]', or name them with --distributed.coordinator HOST:PORT "
            "--distributed.num-processes N --distributed.process-id I"
        )
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(
            config.coordinator or None,
            config.num_processes,
            config.process_id,
            local_device_ids=local_devices(config, cluster, os.environ),
            # JAX detects Kubernetes only when no method is named.
            cluster_detection_method=(None if cluster == "k8s" else cluster or "deactivate"),
            initialization_timeout=_CONNECT_SECONDS,
        )
    except (RuntimeError, ValueError) as error:
        where = config.coordinator or f"the address given by {cluster}"
        raise ConfigError(
            f"could not connect to the coordinator at {where}: {error}. Start all processes within "
            f"{_CONNECT_SECONDS} s, with the same coordinator (an address of process 0 and a free "
            "port) and with process ids 0 to N - 1"
        ) from error


def _by_options(config: DistributedConfig) -> bool:
    """Returns whether the options name several processes."""
    count = config.num_processes
    if count == 1 or (count is None and not config.coordinator and config.process_id is None):
        if config.local_devices:
            raise ConfigError(
                f"distributed.local_devices {config.local_devices} is for one of several processes "
                "of a host: use --devices N, or choose GPUs by CUDA_VISIBLE_DEVICES"
            )
        return False
    if count is None or not config.coordinator or config.process_id is None:
        raise ConfigError(
            "distributed.coordinator, distributed.num_processes and distributed.process_id must be "
            f"set together, got {config.coordinator!r}, {count} and {config.process_id}: set all "
            "three, or none under SLURM, Open MPI or Kubernetes"
        )
    if count < 1:
        raise ConfigError(f"distributed.num_processes {count} must be greater than 0")
    if not 0 <= config.process_id < count:
        raise ConfigError(
            f"distributed.process_id {config.process_id} must be 0 to num_processes - 1 "
            f"({count - 1})"
        )
    host, _, port = config.coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ConfigError(
            f"distributed.coordinator {config.coordinator!r} must be HOST:PORT, with a port from 1 "
            "to 65535"
        )
    return True


def find_cluster(environment: Mapping[str, str]) -> Cluster | None:
    """Returns JAX's name of the launcher that started this process as one of several.

    Reads the same variables as JAX's own detection; a job with one task is a single process.
    """
    slurm = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID")
    if all(name in environment for name in slurm):
        return "slurm" if int(environment.get("SLURM_NTASKS", 1)) > 1 else None
    if "OMPI_MCA_orte_hnp_uri" in environment:
        return "ompi" if int(environment.get("OMPI_COMM_WORLD_SIZE", 1)) > 1 else None
    # Every pod has the first variable; only pods of an indexed job have the second.
    if {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= environment.keys():
        return "k8s"
    return None


def local_devices(
    config: DistributedConfig, cluster: Cluster | None, environment: Mapping[str, str]
) -> list[int] | None:
    """Returns this process's local devices: an empty list for all, None to leave it to JAX.

    JAX gives each process of SLURM and Open MPI one device, even if it is the host's only process.
    """
    if config.local_devices:
        return list(config.local_devices)
    if cluster == "slurm":
        counts = environment.get("SLURM_STEP_TASKS_PER_NODE", "1")  # for example 8(x2),4
        single_task = all(int(n) == 1 for n in re.findall(r"(?:^|,)(\d+)", counts))
        return [] if single_task else None
    if cluster == "ompi":
        return [] if environment.get("OMPI_COMM_WORLD_LOCAL_SIZE", "1") == "1" else None
    return []


def is_first() -> bool:
    """Returns whether this process writes the run's files; all processes write checkpoints."""
    return jax.process_index() == 0


@contextmanager
def first_process_first() -> Iterator[None]:
    """Runs the block in the first process, then in all others; an error in one fails all.

    A collective operation.

    Raises:
      UserError: the block has failed in another process.
    """
    if not is_first():
        _raise_any()  # the first process's error
    with failing_together():
        yield
    if is_first():
        _raise_any()  # the others' errors


@contextmanager
def failing_together() -> Iterator[None]:
    """Runs the block in every process; an error in one fails all, which would wait for it forever.

    A collective operation; the block must not contain another one.

    Raises:
      UserError: the block has failed in another process; of the same kind as there.
    """
    try:
        yield
    except Exception as error:
        gather_text(_described(error))
        raise
    _raise_any()


def _described(error: Exception) -> str:
    """Formats an error for the other processes: its kind and its message."""
    kind = next((name for name, kind in _ERRORS.items() if isinstance(error, kind)), None)
    return f"{kind}:{error}" if kind else f"{UserError.__name__}:{type(error).__name__}: {error}"


def _raise_any() -> None:
    """Raises the first error of another process, if one has failed; this one has not."""
    for number, text in enumerate(gather_text("")):
        if text:
            kind, _, message = text.partition(":")
            place = f" (in process {number})" if number else ""
            raise _ERRORS[kind](f"{message}{place}")


def gather_text(text: str) -> list[str]:
    """Returns a text from every process, in process order; a collective operation."""
    if jax.process_count() == 1:
        return [text]
    own = np.frombuffer(text.encode(errors="surrogateescape"), np.uint8)
    lengths = multihost_utils.process_allgather(np.array([len(own)], np.int32)).reshape(-1)
    if not lengths.any():
        return [""] * len(lengths)
    padded = np.zeros(int(lengths.max()), np.uint8)
    padded[: len(own)] = own
    everyone = multihost_utils.process_allgather(padded).reshape(len(lengths), -1)
    return [
        bytes(row[:n]).decode(errors="surrogateescape")
        for row, n in zip(everyone, lengths.tolist(), strict=True)
    ]


def host_name() -> str:
    """Returns the name of this machine, for messages."""
    return platform.node() or "an unnamed host"


def should_stop(stop: Stop, step: int) -> bool:
    """Returns whether the run stops before this step, in all processes, because of a signal.

    Args:
      stop: the signals of this process. With several processes JAX watches for SIGTERM, as which
        other signals are forwarded, and agrees on the step at which all of them stop.
      step: steps done so far.
    """
    if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
        stop.signals.append(stop.forwarded or signal.SIGTERM)
        stop.start_deadline(stop.signals[0])
    return bool(stop)


def raise_if_stopped_at_start() -> None:
    """Aborts the start of a run after a signal; call it where that is safe.

    Does nothing with several processes: the others would wait for this one.

    Raises:
      StoppedAtStart: a signal has come.
    """
    if jax.process_count() == 1:
        signals.raise_if_remembered()


@contextmanager
def holding(workdir: Path) -> Iterator[None]:
    """Locks WORKDIR for this run in its first process; if that fails, all processes fail.

    Raises:
      CheckpointError: another run holds it, or it cannot be written.
      StoppedAtStart: a signal came while waiting for another machine's lock.
    """
    if jax.process_count() == 1:
        with locks.held(workdir, between=raise_if_stopped_at_start):
            yield
        return
    with ExitStack() as stack:
        with failing_together():
            if is_first():
                stack.enter_context(locks.held(workdir))
        yield


def per_process_name(name: str) -> str:
    """Returns this process's file name: NAME.EXT in the first process, NAME_INDEX.EXT in others."""
    stem, dot, ending = name.rpartition(".")
    return name if is_first() else f"{stem}_{jax.process_index()}{dot}{ending}"


def set_deterministic(wanted: bool) -> None:
    """Makes GPUs sum in a fixed order if wanted; call it before JAX looks at its devices."""
    flags = os.environ.get("XLA_FLAGS", "")
    if wanted and _DETERMINISTIC not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {_DETERMINISTIC}".strip()


def start(distributed: DistributedConfig, *, deterministic: bool, compilation_cache: str) -> None:
    """Configures JAX and connects the processes; call it before JAX looks at its devices.

    Args:
      distributed: how to connect the processes of the run.
      deterministic: make GPUs sum in a fixed order.
      compilation_cache: folder of compiled programs, unless JAX_COMPILATION_CACHE_DIR names one;
        "" is off.

    Raises:
      ConfigError: the processes of the run cannot connect.
    """
    set_deterministic(deterministic)
    if compilation_cache and "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        folder = homes.writable(
            compilation_cache,
            what="compiled programs",
            fix="--compilation-cache FOLDER names another, and '' turns this off",
        )
        if folder is not None:
            jax.config.update("jax_compilation_cache_dir", str(folder))
    join_processes(distributed)
