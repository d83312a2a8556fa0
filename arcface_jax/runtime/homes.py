"""Find folders for caches and temporary files.

A container that runs under an arbitrary user id may have no home, no cache and no /tmp. Each
command calls `find_temporary` first; caches are skipped, with a note, if there is no place for
them.
"""

import os
import sys
import tempfile
from pathlib import Path

from arcface_jax.errors import UserError

# Tried if none of Python's own (TMPDIR, /tmp, /var/tmp, the current folder) is writable.
_OTHER_TEMPORARY = ("XDG_RUNTIME_DIR", "/dev/shm")


def find_temporary() -> None:
    """Makes sure that there is a folder for temporary files, for this process and its children.

    Raises:
      UserError: no folder can be written.
    """
    try:
        tempfile.gettempdir()
        return
    except FileNotFoundError:
        pass
    for place in _OTHER_TEMPORARY:
        folder = place if place.startswith("/") else os.environ.get(place, "")
        if folder and os.access(folder, os.W_OK | os.X_OK):
            os.environ["TMPDIR"] = tempfile.tempdir = folder
            print(
                f"note: neither TMPDIR nor /tmp can be written: temporary files go to {folder}",
                file=sys.stderr,
            )
            return
    raise UserError(
        "no folder for temporary files can be written (TMPDIR, /tmp, /var/tmp, /dev/shm, the "
        "current folder): set TMPDIR to one"
    )


def user_cache() -> Path | None:
    """Returns the folder of the user's caches; None for a user without a home."""
    if named := os.environ.get("XDG_CACHE_HOME"):
        return Path(named)
    home = expanded("~")
    return home and home / ".cache"


def expanded(folder: str) -> Path | None:
    """Returns the folder with `~` replaced by the home; None for a user without one."""
    try:
        return Path(folder).expanduser()
    except RuntimeError:
        return None


def writable(folder: str, *, what: str, fix: str) -> Path | None:
    """Returns the folder, created if missing; None, with a note, if it is not writable.

    Args:
      folder: may start with `~`.
      what: what would be stored there.
      fix: how to choose another folder.
    """
    path = expanded(folder)
    try:
        if path is not None:
            path.mkdir(parents=True, exist_ok=True)
            if os.access(path, os.W_OK | os.X_OK):
                return path
    except OSError:
        pass
    reason = "there is no home folder" if path is None else f"{path} cannot be written"
    print(f"note: {what} are not kept, because {reason}; {fix}", file=sys.stderr)
    return None
