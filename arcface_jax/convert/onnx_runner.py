"""Run an ONNX face recognition model from any exporter on images.

`arcface_jax.convert.onnx_input` finds how to prepare the input. One run determines the output:
which of several it is, and whether the batch axis is as free as declared.
"""

import copy
import dataclasses
from pathlib import Path
from typing import Any, cast

import numpy as np

from arcface_jax.config.choices import ColorOrder, OnnxOptions
from arcface_jax.convert import onnx_bounds, onnx_digest, onnx_input
from arcface_jax.data.images import IMAGE_SIZE
from arcface_jax.errors import UserError, install
from arcface_jax.evaluation import embed, model_input
from arcface_jax.evaluation.model_input import Layout, ModelInput

_INSTALL = install("onnx")
_NUMBERS = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(uint8)": np.uint8,
}
_LARGEST_BATCH = 64
_LEAST_WIDTH = 32
"""Smallest width of an embedding among several outputs; others are lengths, ages, qualities."""
_SAME = 1e-2
"""Largest relative difference between an image's embeddings in two batches."""
_QUIET = 4  # ONNX Runtime's log severity; fatal problems are raised as errors anyway


class OnnxModel:
    """An open model; calling it returns the embeddings. Made by `onnx_embedder`."""

    def __init__(self, path: Path, *, batch_size: int, options: OnnxOptions):
        embed.check_batch_size(batch_size)
        self._path = path
        self._session = _session(path)
        self._file_digest = onnx_digest.of_file(path)
        self._entry = self._only_input()
        self.guessed = ""
        """Describes guesses about undocumented properties of the file; empty if there are none."""
        first = self._entry.shape[0]
        self._fixed = isinstance(first, int) and first > 0
        if self._fixed and first > onnx_bounds.LARGEST_FIXED_BATCH:
            raise UserError(
                f"{path} takes batches of {first:,} images only; at most "
                f"{onnx_bounds.LARGEST_FIXED_BATCH:,} are filled up: export it with a free batch "
                "axis"
            )
        self._batch_size: int = first if self._fixed else batch_size
        metadata = self._session.get_modelmeta().custom_metadata_map
        self._own: ModelInput
        self.input: ModelInput
        if model_input.METADATA_KEY in metadata:
            self._read_description(metadata[model_input.METADATA_KEY], options)
        else:
            self._explore(metadata, options)

    def __call__(self, images: np.ndarray, /) -> np.ndarray:
        """Embeds (n, 112, 112, 3) uint8 RGB as (n, D) float32, not normalized."""
        size = self._batch_size
        return np.concatenate(
            [self._run(images[start : start + size]) for start in range(0, len(images), size)]
        )

    @property
    def batch_size(self) -> int:
        """Images per call of the runtime."""
        return self._batch_size

    def digest(self) -> str:
        """Returns `model_input.identity`: the file's SHA-256 unless options override it."""
        return model_input.identity(self._file_digest, own=self._own, used=self.input)

    def taking(self, *, color_order: ColorOrder, mean: float, scale: float) -> "OnnxModel":
        """Returns the same open model with another preparation of its input."""
        other = copy.copy(self)
        changed = {"color_order": color_order, "mean": mean, "scale": scale}
        other.input = self._changed(**changed, output=self.input.output)
        return other

    def _changed(self, **changed: Any) -> ModelInput:
        """Returns the file's own description with the caller's overrides, and their digest.

        Raises:
          UserError: they normalize the input of a model that takes uint8.
        """
        own = self._own
        used = dataclasses.replace(own, **changed)
        if own.dtype == "uint8" and (used.mean, used.scale) != (own.mean, own.scale):
            raise UserError(
                f"{self._path} takes uint8, so --mean and --scale do not apply: leave them out"
            )
        digest = model_input.identity(self._file_digest, own=own, used=used)
        if digest == self._file_digest:
            return used
        return dataclasses.replace(used, digest=digest, compatible_with="")

    def _read_description(self, text: str, options: OnnxOptions) -> None:
        """Reads the description in this project's exports, with the caller's overrides."""
        found = model_input.from_json(text, source=str(self._path))
        if options.output_name not in (None, found.output):
            raise self._no_output(options.output_name)
        self._own = dataclasses.replace(found, digest=found.digest or self._file_digest)
        self.input = self._changed(**_overrides(options))

    def _explore(self, metadata: dict[str, str], options: OnnxOptions) -> None:
        """Infers the description of any other model from its graph and two runs."""
        dtype = np.dtype(_NUMBERS[self._entry.type]).name
        layout = self._layout()
        found = onnx_input.from_metadata(self._path, metadata)
        if found is None:
            found = onnx_input.from_graph(onnx_input.load_graph(self._path))
            if dtype == "uint8":
                why = ("it takes 0 .. 255, as its input is uint8", found.guesses[-1])
                found = onnx_input.Preparation(0, 1, found.color_order, why)
        self._own = ModelInput(
            color_order=found.color_order,
            mean=found.mean,
            scale=found.scale,
            layout=layout,
            dtype=cast("Any", dtype),
            embedding_size=0,  # unknown before it runs
            digest=self._file_digest,
        )
        overrides = _overrides(options)
        self.input = self._changed(**overrides)
        usual, output, width, why_output = self._find_output(options.output_name)
        self._own = dataclasses.replace(self._own, output=usual, embedding_size=width)
        self.input = self._changed(**overrides, output=output)
        asked = (
            *([] if overrides.keys() & {"mean", "scale"} else found.guesses[:1]),
            *([] if options.color_order else found.guesses[1:]),
        )
        if asked or why_output:
            self.guessed = (
                f"{'; '.join((*asked, *why_output))} (--mean, --scale, --color-order and "
                "--output-name override; `evaluate --check-input` tries them)"
            )

    def _only_input(self) -> Any:
        entries = self._session.get_inputs()
        if len(entries) != 1 or entries[0].type not in _NUMBERS or len(entries[0].shape) != 4:
            raise self._unlike("name a model that embeds aligned faces")
        return entries[0]

    def _layout(self) -> Layout:
        """Infers the position of the channels from the shape, or else from the graph."""
        shape = [dim if isinstance(dim, int) and dim > 0 else None for dim in self._entry.shape]
        first, last = shape[1], shape[3]
        if (first == 3) != (last == 3):
            layout: Layout = "NCHW" if first == 3 else "NHWC"
        else:
            layout = onnx_input.layout(onnx_input.load_graph(self._path))
        channels, sides = (first, shape[2:]) if layout == "NCHW" else (last, shape[1:3])
        if channels not in (None, 3):
            raise self._unlike("name a model that takes color images")
        if any(side not in (None, IMAGE_SIZE) for side in sides):
            height, width = (side or "any" for side in sides)
            raise UserError(
                f"{self._path} takes images of {height} x {width} pixels; expected {IMAGE_SIZE} x "
                f"{IMAGE_SIZE} or free ones: export it for {IMAGE_SIZE} x {IMAGE_SIZE} faces"
            )
        return layout

    def _find_output(self, wanted: str | None) -> tuple[str, str, int, list[str]]:
        """Finds the outputs taken by default and now, with the width of the latter and notes on
        guesses; sets a batch size that works.
        """
        rng = np.random.default_rng(0)
        images = rng.integers(0, 256, (2, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
        names = [output.name for output in self._session.get_outputs()]
        try:
            arrays = dict(zip(names, self._outputs(names, images[:1]), strict=True))
        except Exception as error:  # the runtime's exceptions have no base class of their own
            reason = str(error).partition("\n")[0][:200]
            raise UserError(
                f"{self._path} does not run on a face of {IMAGE_SIZE} x {IMAGE_SIZE}: {reason}; "
                "export it again for such faces"
            ) from error
        usual, name, why = self._choose(arrays, wanted)
        first = _rows(arrays[name])
        if not self._fixed and not self._runs_two(name, images, first):
            self._batch_size = 1
            why.append("images run one by one, as it declares a free batch and fails at two")
        return usual, name, first.shape[1], why

    def _choose(
        self, arrays: dict[str, np.ndarray], wanted: str | None
    ) -> tuple[str, str, list[str]]:
        """Returns the output taken by default (empty for none), the one to take, and notes."""
        rows = {name: _rows(array) for name, array in arrays.items()}
        if wanted is not None and (wanted not in rows or rows[wanted].ndim != 2):
            raise self._no_output(wanted)
        widths = {name: row.shape[1] for name, row in rows.items() if row.ndim == 2}
        if len(rows) > 1:
            widths = {name: width for name, width in widths.items() if width >= _LEAST_WIDTH}
        best = max(widths, key=lambda name: widths[name], default="")
        if wanted is not None:
            return best, wanted, []
        if not best:
            raise self._unlike("name the output that is the embedding with --output-name")
        if len(rows) == 1:
            return best, best, []
        others = ", ".join(name for name in rows if name != best)
        return (
            best,
            best,
            [f"the embedding is its output {best} of {widths[best]} numbers (others: {others})"],
        )

    def _runs_two(self, name: str, images: np.ndarray, first: np.ndarray) -> bool:
        """Returns whether two images in a batch have the same embeddings as separately."""
        try:
            both = _rows(self._outputs([name], images)[0])
            expected = np.concatenate([first, _rows(self._outputs([name], images[1:])[0])])
        except Exception:  # the runtime's exceptions have no base class of their own
            return False
        if both.shape != expected.shape:
            return False
        bound = _SAME * np.linalg.norm(expected, axis=1)
        return bool((np.linalg.norm(both - expected, axis=1) <= bound).all())

    def _run(self, part: np.ndarray) -> np.ndarray:
        try:
            (out,) = self._outputs([self.input.output], part)
        except Exception as error:  # the runtime's exceptions have no base class of their own
            reason = str(error).partition("\n")[0][:200]
            raise UserError(
                f"{self._path} does not run on {len(part)} faces: {reason}; export it again"
            ) from error
        rows = _rows(out)
        if rows.ndim != 2 or len(rows) < len(part):
            raise UserError(
                f"{self._path} returns {out.shape} for {len(part)} faces; expected (N, D): "
                f"export it "
                "again"
            )
        return rows[: len(part)].astype(np.float32)

    def _outputs(self, names: list[str], part: np.ndarray) -> list[np.ndarray]:
        missing = self._batch_size - len(part) if self._fixed else 0
        x = self.prepare(np.pad(part, [(0, missing), (0, 0), (0, 0), (0, 0)]))
        return self._session.run(names, {self._entry.name: x}, _run_options())

    def prepare(self, images: np.ndarray) -> np.ndarray:
        """Prepares (n, 112, 112, 3) uint8 RGB as the graph's input."""
        x, wants = images, self.input
        if wants.color_order == "BGR":
            x = x[..., ::-1]
        if wants.dtype != "uint8":
            x = (x.astype(np.float32) - wants.mean) / wants.scale
        if wants.layout == "NCHW":
            x = x.transpose(0, 3, 1, 2)
        return np.ascontiguousarray(x, _NUMBERS[self._entry.type])

    def _no_output(self, wanted: str | None) -> UserError:
        outputs = {output.name: output.shape for output in self._session.get_outputs()}
        return UserError(
            f"{self._path} has no output {wanted!r} of (N, D): its outputs are {outputs}; name one "
            "of them with --output-name"
        )

    def _unlike(self, fix: str) -> UserError:
        kinds = (self._session.get_inputs(), self._session.get_outputs())
        shapes = [[(x.name, x.type, x.shape) for x in kind] for kind in kinds]
        return UserError(
            f"{self._path} takes {shapes[0]} and returns {shapes[1]}; expected one float input "
            f"of "
            f"(N, 3, {IMAGE_SIZE}, {IMAGE_SIZE}) or uint8, also with channels last, and one output "
            f"(N, D): {fix}"
        )


def onnx_embedder(
    path: str | Path, *, batch_size: int = _LARGEST_BATCH, options: OnnxOptions | None = None
) -> OnnxModel:
    """Opens a model with ONNX Runtime, on a GPU if the installed runtime supports one.

    Args:
      path: the .onnx file: one input of faces, of float or uint8, channels first or last, fixed
        or free height and width of 112, and an output (N, D) or (N, D, 1, 1).
      batch_size: images per call, at least 1; models with a fixed batch use theirs.
      options: known properties of input and output; the others are detected.

    Returns:
      A function from (n, 112, 112, 3) uint8 RGB to (n, D) float32, not normalized.

    Raises:
      UserError: ONNX Runtime is not installed, the file does not exist, or it is not such a model.
    """
    return OnnxModel(Path(path), batch_size=batch_size, options=options or OnnxOptions())


def _overrides(options: OnnxOptions) -> dict[str, Any]:
    """Returns the fields of `ModelInput` that the caller gives, except for the output."""
    given = {name: getattr(options, name) for name in ("color_order", "mean", "scale")}
    return {name: value for name, value in given.items() if value is not None}


def _rows(out: np.ndarray) -> np.ndarray:
    """Reshapes (N, D, 1, 1) to (N, D); returns other arrays as they are."""
    return out.reshape(out.shape[:2]) if out.ndim > 2 and set(out.shape[2:]) == {1} else out


def _run_options() -> Any:
    import onnxruntime

    options = onnxruntime.RunOptions()
    options.log_severity_level = _QUIET
    return options


def _session(path: Path) -> Any:
    """Opens an onnxruntime.InferenceSession for a file."""
    if not path.is_file():
        raise UserError(f"no model at {path}: name an existing .onnx file with --onnx")
    onnx_bounds.check(path)
    try:
        import onnxruntime
    except ImportError as error:
        raise UserError(f"running {path} needs ONNX Runtime: {_INSTALL}") from error
    known = onnxruntime.get_available_providers()
    wanted = [p for p in ("CUDAExecutionProvider", "CPUExecutionProvider") if p in known]
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _QUIET
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=wanted)
    except Exception as error:
        # The runtime's exceptions have no base class of their own.
        reason = str(error).partition("\n")[0][:200]
        raise UserError(f"{path} is not a model that ONNX Runtime opens: {reason}") from error
