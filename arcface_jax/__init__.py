"""Face recognition training in JAX: class-sharded ArcFace, insightface's backbones, exports."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from arcface_jax.inference.embedder import Embedder

__all__ = ["Embedder"]
__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """`arcface_jax.Embedder`, without importing JAX before it is asked for."""
    if name == "Embedder":
        from arcface_jax.inference.embedder import Embedder

        return Embedder
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
