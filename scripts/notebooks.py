"""Run the notebooks from top to bottom and store their outputs in them.

python scripts/notebooks.py [notebooks/explore_embeddings.ipynb ...]

Needs `pip install -e '.[notebook,onnx]'`, and a run: runs/demo, or the one in ARCFACE_JAX_WORKDIR.
"""

import sys
from pathlib import Path

import nbclient
import nbformat
import tyro

from arcface_jax.commands import Result, command

FOLDER = Path(__file__).parent.parent / "notebooks"


def execute(path: Path) -> nbformat.NotebookNode:
    """Returns the notebook with the outputs of a run in its own folder."""
    notebook = nbformat.read(path, as_version=4)
    where = {"metadata": {"path": str(path.parent)}}
    # Without the cells' times, which would change with every run.
    client = nbclient.NotebookClient(notebook, timeout=300, record_timing=False, resources=where)
    return client.execute()


@command
def main(paths: tyro.conf.Positional[tuple[Path, ...]] = ()) -> Result:
    """Executes the notebooks in place.

    Args:
      paths: Notebooks; by default all.
    """
    chosen = [path.resolve() for path in paths] or sorted(FOLDER.glob("*.ipynb"))
    for path in chosen:
        nbformat.write(execute(path), path)
        print(f"{path.name}: {path.stat().st_size / 1024:.0f} KiB")
    return Result(files=chosen)


if __name__ == "__main__":
    sys.exit(tyro.cli(main, prog="notebooks.py", description=__doc__))
