"""Every test sees eight CPU devices, and no silent broadcasting."""

import os
from pathlib import Path

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session", autouse=True)
def _compile_once(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Programs that several tests compile, and the processes they start, are compiled once."""
    folder = os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_shared(tmp_path_factory)))
    jax.config.update("jax_compilation_cache_dir", folder)


def _shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all workers of pytest-xdist."""
    base = tmp_path_factory.getbasetemp()
    return (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "compiled"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite the golden texts")
