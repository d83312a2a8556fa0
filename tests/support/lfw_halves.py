"""Labeled Faces in the Wild in two halves that share no person, as two record files."""

from pathlib import Path

import numpy as np

from arcface_jax.data.recordio.reader import RecordReader, RecordWriter


def write(lfw: Path, folder: Path) -> tuple[Path, Path]:
    """Every other identity of `train.rec` goes to the folder `a`, the rest to `b`.

    Each half numbers its identities from 0, has insightface's identity header, and finds the
    verification set beside it.
    """
    reader = RecordReader(lfw / "train.rec")
    first, end = (int(x) for x in np.asarray(reader.read(0).label))
    halves = folder / "a", folder / "b"
    for parity, half in enumerate(halves):
        half.mkdir(parents=True)
        (half / "lfw_dev.bin").symlink_to(lfw / "lfw_dev.bin")
        records = [reader.read(key) for key in range(1, first)]
        mine = [record for record in records if int(np.ravel(record.label)[0]) % 2 == parity]
        identities = len(range(parity, end - first, 2))
        with RecordWriter(half / "train.rec") as writer:
            writer.write(0, b"", label=[len(mine) + 1, len(mine) + 1 + identities])
            for key, record in enumerate(mine, start=1):
                writer.write(key, record.data, label=int(np.ravel(record.label)[0]) // 2)
            labels = np.array([int(np.ravel(r.label)[0]) // 2 for r in mine])
            for identity in range(identities):
                keys = 1 + np.flatnonzero(labels == identity)
                writer.write(len(mine) + 1 + identity, b"", label=[keys.min(), keys.max() + 1])
    return halves
