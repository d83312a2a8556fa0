"""Face recognition training in JAX: class-sharded ArcFace, insightface's backbones, exports.

The public API is `Config`, `train` and `Embedder`. They are loaded at first use, so importing this
package is cheap.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from arcface_jax.config import Config
    from arcface_jax.inference.embedder import Embedder
    from arcface_jax.train import train

__all__ = ["Config", "Embedder", "__version__", "train"]
__version__ = "0.2.0"


def __getattr__(name: str) -> object:
    """Loads a part of the public API."""
    import importlib

    if name == "Config":
        return importlib.import_module("arcface_jax.config").Config
    if name == "Embedder":
        return importlib.import_module("arcface_jax.inference.embedder").Embedder
    if name == "train":
        # The module, which is callable as its function (see its last lines): code that imports it
        # another way first gets the same object here.
        return importlib.import_module("arcface_jax.train")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
