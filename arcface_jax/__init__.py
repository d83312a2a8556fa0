"""Face recognition training in JAX: class-sharded ArcFace, insightface's backbones, exports."""

__version__ = "0.1.0"
