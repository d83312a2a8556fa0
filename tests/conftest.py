"""Every test sees eight CPU devices, and no silent broadcasting."""

import os
from pathlib import Path

# Most of a test's time is LLVM's, for programs that run for a second. The processes that tests
# start inherit this, so that they find each other's programs in the cache.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=1")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")

import jax
import pytest
from commands import TINY_RECIPE

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


@pytest.fixture(scope="session")
def tiny_recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of `commands.TINY_RECIPE`."""
    path = tmp_path_factory.mktemp("recipe") / "tiny.py"
    path.write_text(TINY_RECIPE)
    return path


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite the golden texts")
