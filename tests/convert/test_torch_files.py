"""Files of weights are told apart by content, and no file can run anything or cost more than it is.

The pickles are written by hand, opcode by opcode, as an attacker would.
"""

import argparse
import collections
import io
import json
import pathlib
import pickle
import random
import struct
import tarfile
import zipfile

import numpy as np
import pytest
import torch

from arcface_jax.convert import safe_pickle, torch_files, weight_files
from arcface_jax.errors import UserError

TENSORS = {
    "a.weight": torch.arange(6.0).reshape(2, 3),
    "turned": torch.arange(6.0).reshape(2, 3).t(),
    "part": torch.arange(10.0)[3:7],
    "half": torch.tensor([1.5, -2.0]).half(),
    "brain": torch.tensor([1.5, -2.0]).bfloat16(),
    "double": torch.tensor([1 / 3], dtype=torch.float64),
    "count": torch.tensor(3),
    "none": torch.zeros(0, 4),
}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_both_formats_give_what_torch_gives(tmp_path, zipped):
    parameters = {
        f"p.{n}": torch.nn.Parameter(t, t.is_floating_point()) for n, t in TENSORS.items()
    }
    parameters = {n: p for n, p in parameters.items() if p.is_floating_point()}
    wanted = {**TENSORS, **parameters}
    path = tmp_path / "weights.whatever"
    torch.save(wanted, path, _use_new_zipfile_serialization=zipped)
    found = weight_files.read(path)
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        assert type(tensor) is torch.Tensor and not tensor.requires_grad and tensor.is_contiguous()
        assert tensor.dtype == wanted[name].dtype
        assert torch.equal(tensor, wanted[name].detach()), name


def test_a_module_that_was_saved_whole_is_its_state_dict(tmp_path):
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    torch.save({"model": module}, tmp_path / "whole.pth")
    found = weight_files.read(tmp_path / "whole.pth")
    assert found.keys() == module.state_dict().keys()
    assert torch.equal(found["0.weight"], module.state_dict()["0.weight"])


class Ordered(collections.OrderedDict):
    """As a training program has one."""


def test_what_is_no_tensor_is_skipped_and_counted(tmp_path):
    others = {
        "args": argparse.Namespace(lr=0.1),
        "best": np.float64(1),
        "history": [np.float64(0.5), np.zeros(3)],
        "path": pathlib.PurePosixPath("a"),
        "hyper_parameters": Ordered(batch=1),
        "epoch": 3,
    }
    torch.save({"net": {"state_dict": TENSORS}, **others}, tmp_path / "x.pth")
    held = weight_files.contents(tmp_path / "x.pth")
    assert [stored.key for stored in held.dicts] == ["net.state_dict"]
    assert "numpy scalar (2)" in held.skipped and "numpy array" in held.skipped
    assert "argparse.Namespace" in held.skipped and len(held.skipped) == 5


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (torch.zeros(1).expand(4), "stride of 0"),
        (torch.eye(2).to_sparse(), "sparse"),
        (torch.zeros(2, device="meta"), "without values"),
    ],
)
def test_tensors_that_are_no_weights_are_named(tmp_path, tensor, words):
    torch.save({"good": torch.zeros(2), "bad.weight": tensor}, tmp_path / "x.pth")
    with pytest.raises(UserError, match=rf"x\.pth: bad\.weight is a tensor .*{words}"):
        weight_files.read(tmp_path / "x.pth")


def test_keys_that_are_numbers_are_named(tmp_path):
    torch.save({0: torch.zeros(2), 1: torch.zeros(2)}, tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"tensors under keys of type int \(2\)"):
        weight_files.read(tmp_path / "x.pth")


# ---- what else a file can be ------------------------------------------------------------------


def zipped(**members: bytes) -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        for name, content in members.items():
            archive.writestr(name.replace("__", "/"), content)
    return target.getvalue()


def tarred() -> bytes:
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("weights.pth"))
    return target.getvalue()


OTHERS = {
    "empty.pth": (b"", "is empty"),
    "page.pth": (b"\n<!DOCTYPE html><html><body>Virus scan warning</body></html>", "a web page"),
    "pointer.pth": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 174000000\n",
        "a Git LFS pointer",
    ),
    "model.safetensors.index.json": (
        json.dumps({"metadata": {}, "weight_map": {"a": "b"}}).encode(),
        "index of a sharded checkpoint",
    ),
    "model-00001-of-00003.pth": (b"\x80\x02}.", "one of 3 shards"),
    "packed.pth": (b"\x1f\x8b\x08\x00rest", "a gzip archive"),
    "packed.tar": (tarred(), "a tar archive"),
    "script.pth": (
        zipped(m__data__pkl=b"", **{"m__constants.pkl": b"", "m__code____torch__.py": b""}),
        "a TorchScript program",
    ),
    "arrays.pth": (zipped(**{"a.npy": b"x"}), "torch.save did not write"),
    "cut.pth": (b"PK\x03\x04" + bytes(100), "truncated"),
    "plain.pth": (pickle.dumps({"a": 1}), "a pickle that torch.save did not write"),
    "keras.pth": (b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
    "config.pth": (b'{"a": 1}', "a JSON file"),
    "noise.pth": (b"\x00\x01\x02 nothing", "is not a file of weights"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_files_are_recognized_in_one_line(tmp_path, name):
    content, words = OTHERS[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=words) as error:
        weight_files.read(tmp_path / name)
    assert "\n" not in str(error.value) and "weights_only" not in str(error.value)
    assert name in str(error.value)


def test_safetensors_are_found_whatever_the_suffix(tmp_path):
    files = pytest.importorskip("safetensors.torch")
    files.save_file({"a": torch.ones(3)}, tmp_path / "x.pth")
    assert torch.equal(weight_files.read(tmp_path / "x.pth")["a"], torch.ones(3))


# ---- hostile pickles --------------------------------------------------------------------------


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def touch(path: pathlib.Path) -> bytes:
    return text(f"touch {path}")


def hostile(marker: pathlib.Path) -> dict[str, bytes]:
    """Pickles that make a file when they are run by Python's unpickler, or cost much."""
    run = touch(marker)
    evil = text(f"open({str(marker)!r}, 'w')")
    doubled = b"K\x00\x85" + b"2\x86" * 60  # a tuple of two of the same, sixty deep
    return {
        "reduce": b"cos\nsystem\n" + run + b"\x85R.",
        "eval": b"cbuiltins\neval\n" + evil + b"\x85R.",
        "stack global": text("os") + text("system") + b"\x93" + run + b"\x85R.",
        "inst": b"(" + run + b"ios\nsystem\n.",
        "obj": b"(cos\nsystem\n" + run + b"o.",
        "newobj": b"csubprocess\nPopen\n" + run + b"\x85\x81.",
        "newobj_ex": b"csubprocess\nPopen\n" + run + b"\x85}\x92.",
        "build": b"ctorch.nn\nModule\n)\x81}" + text("__setstate__") + b"cos\nsystem\nsb" + b".",
        "call of what was made": b"cos\nsystem\n" + run + b"\x85R" + run + b"\x85R.",
        "torch": b"ctorch\nload\n" + run + b"\x85R.",
        "torch's own": b"ctorch.storage\n_load_from_bytes\n" + run + b"\x85R.",
        "import": b"cantigravity\nfly\n.",
        "extension": b"\x82\x01.",
        "memo": b"Nr\xff\xff\xff\x7f.",
        "memo in text": b"Np99999999999\n.",
        "length": b"\x8e" + struct.pack("<Q", 2**62) + b"x.",
        "key": b"}" + doubled + b"Ns.",
        "no mark": b"t.",
        "no stack": b"R.",
        "own reference": b"]q\x00h\x00a.",
        "persistent": text("storage") + b"Q.",
        "end": b"}",
    }


@pytest.mark.parametrize("name", hostile(pathlib.Path("x")))
def test_hostile_pickles_run_nothing(tmp_path, name):
    marker = tmp_path / "marker"
    content = hostile(marker)[name]
    (tmp_path / "x.pth").write_bytes(zipped(**{"a__data.pkl": b"\x80\x02" + content}))
    with pytest.raises(UserError, match=r"x\.pth") as error:
        weight_files.read(tmp_path / "x.pth")
    assert "\n" not in str(error.value)
    assert not marker.exists()
    # The same beside weights: they are read, and what was asked for is named.
    if name in ("reduce", "eval", "newobj", "build", "torch"):
        made = safe_pickle.load(io.BytesIO(b"\x80\x02" + content))
        assert isinstance(made, safe_pickle.Skipped)
        assert not marker.exists()


def test_few_functions_of_torch_are_answered():
    allowed = set(torch_files._FUNCTIONS)
    assert all(
        n.startswith(("torch._utils._rebuild_", "torch._tensor."))
        for n in allowed - {"torch.Size", "collections.OrderedDict", "collections.defaultdict"}
    )
    for name in (
        "torch.load",
        "torch.hub.load",
        "torch.jit.load",
        "torch._utils._import_dotted_name",
    ):
        assert torch_files._make(name, ("x",)) is NotImplemented


def storage(count: int, *, key: str = "0", kind: str = "FloatStorage") -> bytes:
    return (
        b"(" + text("storage") + f"ctorch\n{kind}\n".encode() + text(key) + text("cpu")
        + b"J" + struct.pack("<i", count) + b"tQ"
    )  # fmt: skip


def tensor(storage: bytes, shape: tuple[int, ...], stride: tuple[int, ...]) -> bytes:
    def sizes(values: tuple[int, ...]) -> bytes:
        return b"(" + b"".join(b"J" + struct.pack("<i", v) for v in values) + b"t"

    rebuild = b"ctorch._utils\n_rebuild_tensor_v2\n("
    return rebuild + storage + b"K\x00" + sizes(shape) + sizes(stride) + b"\x89}tR"


@pytest.mark.parametrize(
    "claim",
    [
        tensor(storage(4), (1000, 1000), (1000, 1)),
        tensor(storage(10**9), (2,), (1,)),
        tensor(storage(4), (4, 4, 4), (1, 1, 1)),
        tensor(storage(4), (-4,), (1,)),
        tensor(storage(4, key="1"), (4,), (1,)),
        tensor(storage(4, kind="Evil"), (4,), (1,)),
        tensor(storage(4), (4,), ()),
    ],
    ids=["shape", "storage", "overlap", "negative", "missing", "type", "strides"],
)
def test_a_tensor_larger_than_its_storage_is_refused(tmp_path, claim):
    content = b"\x80\x02}" + text("a") + claim + b"s."
    members = {"a__data.pkl": content, "a__data__0": struct.pack("<4f", 1, 2, 3, 4)}
    (tmp_path / "x.pth").write_bytes(zipped(**members))
    with pytest.raises(UserError, match=r"x\.pth is damaged"):
        weight_files.read(tmp_path / "x.pth")


def test_many_views_of_one_storage_are_refused(tmp_path):
    items = b"".join(text(str(n)) + tensor(storage(64), (8, 8), (1, 8)) + b"s" for n in range(1))
    views = b"".join(
        text(f"v{n}") + tensor(storage(64), (63 - n, 1), (1, 1)) + b"s" for n in range(60)
    )
    members = {"a__data.pkl": b"\x80\x02}" + items + views + b".", "a__data__0": bytes(256)}
    packed = zipped(**members)
    (tmp_path / "x.pth").write_bytes(packed)
    held = weight_files.contents(tmp_path / "x.pth")
    small = held._replace(nbytes=1000)
    with pytest.raises(UserError, match="share storage"):
        weight_files.tensors(small.dicts[0].entries, small, source="x.pth")


def test_a_compressed_archive_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", b"\x80\x02}" + b"N0" * 100_000 + b".")
    with pytest.raises(UserError, match="is compressed"):
        weight_files.read(tmp_path / "x.pth")


# ---- damage -----------------------------------------------------------------------------------


def mutated(content: bytes, draw: random.Random) -> bytes:
    data = bytearray(content)
    kind = draw.randrange(4)
    if kind == 0:
        return bytes(data[: draw.randrange(len(data))])
    for _ in range(draw.choice((1, 4, 16))):
        data[draw.randrange(len(data))] = draw.randrange(256)
    if kind == 2:
        start = draw.randrange(len(data))
        del data[start : start + draw.randrange(1, 200)]
    if kind == 3:
        start = draw.randrange(len(data))
        data[start:start] = data[: draw.randrange(1, 200)]
    return bytes(data)


@pytest.mark.parametrize(
    "seeds", [range(40), pytest.param(range(40, 240), marks=pytest.mark.slow)], ids=["some", "all"]
)
@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
def test_damaged_files_load_or_give_one_error(tmp_path, seeds, new):
    torch.save(
        {"state_dict": TENSORS, "args": argparse.Namespace(lr=0.1)},
        tmp_path / "good.pth",
        _use_new_zipfile_serialization=new,
    )
    content = (tmp_path / "good.pth").read_bytes()
    path, refused = tmp_path / "x.pth", 0
    for seed in seeds:
        path.write_bytes(mutated(content, random.Random(seed)))
        try:
            assert isinstance(weight_files.read(path), dict), seed
        except UserError as error:
            assert "\n" not in str(error) and "x.pth" in str(error), seed
            refused += 1
    assert refused > len(seeds) // 4
