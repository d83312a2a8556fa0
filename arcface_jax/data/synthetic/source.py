"""Training sets without files: synthetic faces, and noise for dry runs of large heads."""

from collections.abc import Mapping

import numpy as np

from arcface_jax.data.images import IMAGE_SIZE, encode
from arcface_jax.data.source import Sample, Source
from arcface_jax.data.synthetic import faces


class SyntheticSource(Source):
    """Synthetic faces: `images_per_identity` of each of the identities 0 .. identities - 1."""

    generated = True

    def __init__(self, *, seed: int, identities: int, images_per_identity: int):
        self.num_classes = identities
        self._seed = seed
        self._each = images_per_identity

    def __len__(self) -> int:
        return self.num_classes * self._each

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        """Returns an image, (112, 112, 3) uint8 RGB, and its label."""
        identity, image = divmod(index, self._each)
        return faces.draw_face(seed=self._seed, identity=identity, index=image), identity

    def read(self, index: int) -> Sample:
        """Returns the face as a PNG, and its label."""
        image, label = self[index]
        return Sample(encode(image), label)

    def labels(self) -> np.ndarray:
        """Returns (len,) int32."""
        return np.repeat(np.arange(self.num_classes, dtype=np.int32), self._each)

    def where(self, index: int) -> str:
        """Returns the identity and the number of its image."""
        return "drawn identity {}, image {}".format(*divmod(index, self._each))

    def facts(self) -> Mapping[str, int | str]:
        """Returns the parameters."""
        return {"form": "synthetic", "seed": self._seed, "images per identity": self._each}


class NoiseSource(Source):
    """Random pixels; image i has the label i modulo the number of classes."""

    generated = True

    def __init__(self, *, seed: int, classes: int, images: int):
        self.num_classes = classes
        self._seed = seed
        self._images = images

    def __len__(self) -> int:
        return self._images

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        """Returns an image, (112, 112, 3) uint8, and its label."""
        shape = (IMAGE_SIZE, IMAGE_SIZE, 3)
        pixels = np.random.default_rng([self._seed, index]).bytes(IMAGE_SIZE * IMAGE_SIZE * 3)
        return np.frombuffer(pixels, np.uint8).reshape(shape), index % self.num_classes

    def read(self, index: int) -> Sample:
        """Returns the pixels as a PNG, and the label."""
        image, label = self[index]
        return Sample(encode(image), label)

    def labels(self) -> np.ndarray:
        """Returns (len,) int32."""
        return (np.arange(self._images) % self.num_classes).astype(np.int32)

    def where(self, index: int) -> str:
        """Returns the number of the image."""
        return f"noise, image {index}"

    def facts(self) -> Mapping[str, int | str]:
        """Returns the parameters."""
        return {"form": "noise", "seed": self._seed}
