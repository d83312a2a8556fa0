"""Record a run's teacher in WORKDIR/teacher.json, which is read when it resumes or is exported."""

from pathlib import Path
from typing import NamedTuple

from arcface_jax.errors import CheckpointError
from arcface_jax.runtime import launch, sealed
from arcface_jax.runtime.files import write_atomic

FILE = "teacher.json"


class Record(NamedTuple):
    """The teacher of a run."""

    model: str
    """`digest` of its `Model.input`: equal for a run and its exports."""
    embedding_size: int
    views: str
    projection: str
    """SHA-256 of the projection of its embeddings; empty if the sizes are equal."""
    compatible: bool
    """Whether the run's embeddings are comparable with the teacher's."""


def agree(workdir: Path, found: Record) -> None:
    """Records the teacher in a new run's workdir; refuses another one in a run that resumes.

    Raises:
      CheckpointError: the stored run has another teacher.
    """
    with launch.first_process_first():
        stored = read(workdir)
        if stored is None:
            if launch.is_first():
                write_atomic(workdir / FILE, sealed.seal(found._asdict(), indent=2))
            return
    if stored != found:
        fields = zip(found._fields, stored, found, strict=True)
        different = ", ".join(name for name, old, new in fields if old != new)
        raise CheckpointError(
            f"{workdir} was trained with another teacher (other {different}): name that one with "
            "--distill.teacher, or use a new --workdir"
        )


def read(workdir: Path) -> Record | None:
    """Reads the teacher of a run; None without one.

    Raises:
      CheckpointError: the file is damaged.
    """
    try:
        return Record(**sealed.read(workdir / FILE))
    except FileNotFoundError:
        return None
    except (sealed.DamagedError, TypeError) as error:
        raise CheckpointError(
            f"{error}: restore {workdir / FILE} from backup, or use another --workdir"
        ) from error
