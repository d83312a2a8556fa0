"""Options that have another name today are accepted under both."""

from pathlib import Path

import pytest
import tyro
from tyro.conf import OmitArgPrefixes

from arcface_jax.commands import protocol
from arcface_jax.inference.open_model import ModelChoice, ModelChoices


@pytest.mark.parametrize("option", ["--workdir", "--checkpoint"])
def test_a_runs_folder(option: str):
    assert tyro.cli(ModelChoice, args=[option, "runs/demo"]).workdir == Path("runs/demo")
    found = tyro.cli(OmitArgPrefixes[ModelChoices], args=[option, "a", "b"])
    assert found.workdir == (Path("a"), Path("b"))


@pytest.mark.parametrize(
    ("option", "flip"),
    [("--flip", True), ("--no-flip", False), ("--mirrored", True), ("--no-mirrored", False)],
)
def test_flipped_images(option: str, flip: bool):
    assert tyro.cli(OmitArgPrefixes[protocol.Options], args=[option]).flip is flip
