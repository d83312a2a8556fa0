"""Class centers: arcface_torch's files of three generations, for any number of GPUs."""

import collections
from pathlib import Path

import numpy as np
import pytest
import torch

from arcface_jax import config as configs
from arcface_jax.commands import imports
from arcface_jax.convert import centers
from arcface_jax.convert.centers import Centers
from arcface_jax.errors import UserError
from arcface_jax.runtime import devices
from arcface_jax.training import checkpoint, step

ROWS = np.random.default_rng(0).normal(size=(11, 6)).astype(np.float32)
MOMENTUM = np.random.default_rng(1).normal(size=(11, 6)).astype(np.float32)


def as_reference_does(folder, layout, ranks, rows=ROWS, momentum=MOMENTUM):
    """Each rank's share as PartialFC computes it in its constructor, in the files of its time."""
    for rank in range(ranks):
        num_local = len(rows) // ranks + int(rank < len(rows) % ranks)
        start = len(rows) // ranks * rank + min(rank, len(rows) % ranks)
        weight = torch.from_numpy(rows[start : start + num_local].copy())
        moved = torch.from_numpy(momentum[start : start + num_local].copy())
        if layout == "2021":
            torch.save(weight, folder / f"rank_{rank}_softmax_weight.pt")
            torch.save(moved, folder / f"rank_{rank}_softmax_weight_mom.pt")
        elif layout == "2022":
            state = collections.OrderedDict(weight=weight)
            torch.save(state, folder / f"softmax_fc_gpu_{rank}.pt")
        else:
            backbone, head = torch.nn.Linear(2, 2), torch.nn.Parameter(weight)
            optimizer = torch.optim.SGD([{"params": [*backbone.parameters()]}, {"params": [head]}])
            state = {
                "epoch": 1,
                "global_step": 10,
                "state_dict_backbone": backbone.state_dict(),
                "state_dict_softmax_fc": collections.OrderedDict(weight=head.detach()),
                "state_optimizer": optimizer.state_dict(),
                "state_lr_scheduler": {"last_epoch": 10, "base_lrs": [0.1, 0.1]},
            }
            torch.save(state, folder / f"checkpoint_gpu_{rank}.pt")


@pytest.mark.parametrize("layout", ["2021", "2022", "head"])
@pytest.mark.parametrize("ranks", [1, 4, 11])
def test_files_are_joined_in_the_order_of_the_ranks(tmp_path, layout, ranks):
    as_reference_does(tmp_path, layout, ranks)
    rows, momentum = centers.read(tmp_path, num_classes=11)
    np.testing.assert_array_equal(rows, ROWS)
    if layout == "2021":
        np.testing.assert_array_equal(momentum, MOMENTUM)
    else:
        assert momentum is None


@pytest.mark.parametrize("layout", ["2021", "2022", "head"])
def test_files_are_written_as_the_reference_has_them(tmp_path, layout):
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    theirs.mkdir()
    as_reference_does(theirs, layout, 3)
    files = centers.write(ours, Centers(ROWS, MOMENTUM), ranks=3, layout=layout)
    assert {f.name for f in files} == {f.name for f in theirs.iterdir()}
    for file in files:
        mine, other = (torch.load(f, weights_only=True) for f in (file, theirs / file.name))
        if layout == "head":
            mine, other = mine["state_dict_softmax_fc"], other["state_dict_softmax_fc"]
        if layout != "2021":
            assert set(mine) == set(other) == {"weight"}
            mine, other = mine["weight"], other["weight"]
        assert mine.is_contiguous() and torch.equal(mine, other)
        assert mine.untyped_storage().nbytes() == 4 * mine.numel()  # not the rows of all ranks
    with pytest.raises(UserError, match="there already"):
        centers.write(ours, Centers(ROWS), ranks=3, layout=layout)


def test_unknown_momentum_is_zero(tmp_path):
    centers.write(tmp_path, Centers(ROWS), ranks=2, layout="2021")
    assert not centers.read(tmp_path).momentum.any()


def test_the_command_goes_there_and_back(tmp_path, capsys):
    as_reference_does(tmp_path, "2021", 8)
    imports.centers(["read", str(tmp_path), "--output", str(tmp_path / "c.npy")])
    written = ["--output", str(tmp_path / "new"), "--ranks", "3", "--layout", "2022"]
    imports.centers(["write", str(tmp_path / "c.npy"), *written])
    assert '"classes": 11, "embedding_size": 6' in capsys.readouterr().out.splitlines()[-1]
    np.testing.assert_array_equal(centers.read(tmp_path / "new").rows, ROWS)


def test_what_cannot_be_written_is_one_line(tmp_path, capsys):
    np.save(tmp_path / "c.npy", ROWS)
    (tmp_path / "folder.npy").mkdir()
    for output, expected in (
        (tmp_path / "none" / "c.npy", "there is no folder"),
        (tmp_path / "folder.npy", "it is a folder"),
        ("/proc/c.npy", "cannot write /proc/c.npy: "),
    ):
        with pytest.raises(SystemExit):
            imports.centers(["read", str(tmp_path / "c.npy"), "--output", str(output)])
        assert expected in capsys.readouterr().err
    for folder, expected in (
        (tmp_path / "c.npy", "is a file: name a folder"),
        (tmp_path / "c.npy" / "below", "cannot write .*below: Not a directory"),
        (Path("/proc"), "cannot write /proc/checkpoint_gpu_0.pt: "),
    ):
        with pytest.raises(UserError, match=expected) as error:
            centers.write(folder, Centers(ROWS), ranks=2, layout="head")
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("layout", ["2021", "2022", "head"])
def test_momentum_that_is_not_written_is_announced(tmp_path, capsys, layout):
    as_reference_does(tmp_path, "2021", 2)
    out = ["--output", str(tmp_path / "new"), "--ranks", "3", "--layout", layout]
    imports.centers(["write", str(tmp_path), *out])
    assert ("momentum" in capsys.readouterr().err) == (layout != "2021")


def test_missing_and_strange_files_are_named(tmp_path):
    with pytest.raises(UserError, match=r"holds no rank_R_softmax_weight\.pt or"):
        centers.read(tmp_path)
    as_reference_does(tmp_path, "2021", 4)
    (tmp_path / "rank_2_softmax_weight.pt").unlink()
    with pytest.raises(UserError, match=r"lacks rank_2_softmax_weight\.pt"):
        centers.read(tmp_path)
    as_reference_does(tmp_path, "2021", 4)
    torch.save(torch.zeros(2, 5), tmp_path / "rank_3_softmax_weight.pt")
    with pytest.raises(UserError, match=r"rank_3_softmax_weight\.pt \(2, 5\)"):
        centers.read(tmp_path)
    torch.save(torch.zeros(4, 6), tmp_path / "rank_3_softmax_weight.pt")
    with pytest.raises(UserError, match="inconsistent head files"):
        centers.read(tmp_path)
    torch.save({"bias": torch.zeros(3)}, tmp_path / "rank_3_softmax_weight.pt")
    with pytest.raises(UserError, match=r"rank_3_softmax_weight\.pt holds no class centers"):
        centers.read(tmp_path)


def test_the_files_of_the_last_ranks_are_missed_by_number(tmp_path):
    as_reference_does(tmp_path, "2022", 4)
    (tmp_path / "softmax_fc_gpu_3.pt").unlink()
    with pytest.raises(UserError, match="of 9 classes, not of 11"):
        centers.read(tmp_path, num_classes=11)


def test_two_generations_in_a_folder_are_not_mixed(tmp_path):
    as_reference_does(tmp_path, "2022", 2)
    as_reference_does(tmp_path, "head", 2)
    with pytest.raises(UserError, match="several generations"):
        centers.read(tmp_path)


def test_more_ranks_than_classes_are_refused(tmp_path):
    with pytest.raises(UserError, match="--ranks 12 must be 1 to 11"):
        centers.write(tmp_path, Centers(ROWS), ranks=12, layout="head")


def test_the_centers_of_a_run_are_those_of_its_state(tmp_path):
    """On two devices, with a row of padding, which no file holds."""
    config = configs.replace(
        configs.Config(),
        workdir=str(tmp_path / "W"),
        model__network="r_tiny",
        model__embedding_size=6,
    )
    state = step.init_state(config, num_classes=11, mesh=devices.make(2))
    assert state.centers.shape == (12, 6)
    with checkpoint.open_workdir(config) as manager:
        checkpoint.save(manager, state, {"num_classes": 11, "num_images": 20})
    rows, momentum = centers.read(tmp_path / "W")
    np.testing.assert_array_equal(rows, state.centers[:11])
    assert momentum is not None and momentum.shape == (11, 6)
