"""Find the threshold for a false accept rate on your pairs, and save it for inference.

arcface-jax calibrate --workdir WORKDIR --pairs pairs.bin --far 1e-2 --output c.json
arcface-jax calibrate --weight backbone.pth --pairs pairs.bin --output c.json
arcface-jax calibrate --onnx model.onnx --pairs pairs.bin --output c.json
arcface-jax calibrate --workdir WORKDIR --against TEACHER --pairs pairs.bin --output c.json
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tyro.conf import OmitArgPrefixes

from arcface_jax.commands import Result, command, own_options
from arcface_jax.config import command_line
from arcface_jax.config.choices import AlignOptions
from arcface_jax.inference.open_model import ModelChoice, config_of, open_model, open_path


@dataclass(frozen=True)
class Arguments:
    """Options of `calibrate`."""

    model: OmitArgPrefixes[ModelChoice]
    pairs: str
    """The pairs: a verification set, as for `evaluate`: a.bin, or LIST:FOLDER."""
    output: Path
    """The JSON file to write."""
    far: float = 1e-3
    """Target: the share of pairs of different people that may be accepted."""
    far_check: float | None = None
    """A higher FAR for a second threshold: pairs between the two get the verdict "check"."""
    align: OmitArgPrefixes[AlignOptions] = field(default_factory=AlignOptions)
    flip: bool = False
    """Add the embeddings of the flipped faces; inference with the calibration then does so too.
    Without --flip and --no-flip the description stored with the model decides."""
    batch_size: int = 256
    """Images per forward pass."""
    against: Path | None = None
    """The model of an existing gallery (a workdir, hub folder, .pth, .safetensors or .onnx): the
    threshold is then for a face of the network against an embedding of that model."""


@command
def main(words: Sequence[str], *, prog: str = "arcface-jax calibrate") -> Result:
    """Writes the calibration and prints it."""
    arguments = command_line.parse(
        Arguments, words, prog=prog, description=__doc__ or "", options_only=True
    )
    from arcface_jax.data import aligner
    from arcface_jax.data.pairs.opening import open_for_runs
    from arcface_jax.evaluation import calibration, verification
    from arcface_jax.evaluation.embed import Embed
    from arcface_jax.inference.embedder import Embedder
    from arcface_jax.runtime.files import require_place

    require_place(arguments.output)
    config = config_of(arguments.model)
    how = arguments.align
    if how.detector is not None:
        print(aligner.in_words(how.choose))
    with own_options({"evaluation.targets": "--pairs"}):
        (pair_set,) = open_for_runs([config], [arguments.pairs], aligner=aligner.of_options(how))
    verification.check(pair_set)
    calibration.check_targets(pair_set, far=arguments.far, far_check=arguments.far_check)
    model = open_model(arguments.model, batch_size=arguments.batch_size)
    # tyro cannot distinguish an omitted option from its default.
    given = any(word.partition("=")[0] in ("--flip", "--no-flip") for word in words)
    flip = arguments.flip if given else model.input.flip
    embed: Embed = Embedder(model, flip=flip, batch_size=arguments.batch_size)
    against = None
    if arguments.against is not None:
        enrolled = open_path(arguments.against, batch_size=arguments.batch_size)
        against = enrolled.input.digest
        other = Embedder(enrolled, flip=flip, batch_size=arguments.batch_size)
        embed = verification.across(embed, enrolled=other)
    found = calibration.calibrate(
        embed(pair_set.images),
        pair_set,
        far=arguments.far,
        far_check=arguments.far_check,
        flip=flip,
        model=model.input.digest,
        against=against,
    )
    calibration.write(found, arguments.output)
    print(calibration.in_words(found))
    return Result(dataclasses.asdict(found), [arguments.output])
