"""Base of HTML pages: self-contained, in light and dark, for screens of any width.

page.html has the head, the style and the blocks `title`, `style`, `header` and `main`; the template
of a page starts with `{% extends "page.html" %}` and is anywhere below this folder.
"""

import base64
from functools import partial
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from arcface_jax.data.images import encode_jpeg
from arcface_jax.errors import UserError
from arcface_jax.runtime.files import write_atomic
from arcface_jax.runtime.tables import share
from arcface_jax.runtime.text import shown

COLORS = 6
"""Number of colors of lines and areas, as classes `line-0` to `line-5`; a seventh repeats the
first."""


def write(path: Path, template: str, **values: Any) -> None:
    """Renders a page into a file, and creates its folder if missing.

    Args:
      path: path of the page.
      template: its path from this file's folder, with forward slashes.
      values: for the template; the filter `share` formats a number between 0 and 1.

    Raises:
      UserError: the file cannot be written.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("arcface_jax.evaluation", ""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["share"] = partial(share, missing="–")  # noqa: RUF001  # a dash to read
    page = environment.get_template(template).render(colors=COLORS, **values)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, shown(page))
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error


def picture(image: np.ndarray) -> str:
    """Returns (H, W, 3) uint8 RGB as a JPEG data URL for `<img src>`."""
    return "data:image/jpeg;base64," + base64.b64encode(encode_jpeg(image, quality=88)).decode()
