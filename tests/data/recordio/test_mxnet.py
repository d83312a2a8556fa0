"""Real MXNet writes what the project reads, and reads what `data.py pack` writes.

MXNet 1.9.1 wants NumPy 1.23 and Python 3.11 at most, so it lives in an environment of its own:
made here, or named by ARCFACE_JAX_MXNET_PYTHON.
"""

import hashlib
import json
import os
import struct
import subprocess
import sys
import venv
from pathlib import Path

import numpy as np
import pytest
from witness import MAGIC

from arcface_jax.config import DataConfig
from arcface_jax.data.opening import open_source
from arcface_jax.data.recordio.reader import RecordReader
from arcface_jax.data.tools import packing

pytestmark = pytest.mark.slow

LFW = os.environ.get("ARCFACE_JAX_LFW", "")
PACKAGES = ("mxnet==1.9.1", "numpy==1.23.5")

WRITE = """
import json, sys
import mxnet as mx
folder, records = sys.argv[1], json.load(open(sys.argv[2]))
writer = mx.recordio.MXIndexedRecordIO(folder + "/train.idx", folder + "/train.rec", "w")
for key, label, data in records:
    header = mx.recordio.IRHeader(0, label, key, 0)
    writer.write_idx(key, mx.recordio.pack(header, bytes.fromhex(data)))
writer.close()
"""
READ = """
import hashlib, json, sys
import numpy as np
import mxnet as mx
rec = mx.recordio.MXIndexedRecordIO(sys.argv[1] + "/train.idx", sys.argv[1] + "/train.rec", "r")
found = []
for key in rec.keys:
    header, data = mx.recordio.unpack(rec.read_idx(key))
    label = np.ravel(header.label).tolist()
    found.append([key, header.flag, label, header.id, hashlib.md5(data).hexdigest()])
image = mx.image.imdecode(mx.recordio.unpack(rec.read_idx(1))[1]).asnumpy()
print(json.dumps([found, image.shape, float(image.mean())]))
"""


@pytest.fixture(scope="module")
def mxnet(tmp_path_factory: pytest.TempPathFactory):
    """Runs a program under MXNet's Python."""
    python = os.environ.get("ARCFACE_JAX_MXNET_PYTHON", "")
    if not python:
        if sys.version_info[:2] != (3, 11):
            pytest.skip("MXNet 1.9.1 with NumPy 1.23.5 installs on Python 3.11")
        folder = tmp_path_factory.mktemp("mxnet")
        venv.create(folder, with_pip=True)
        python = str(folder / "bin" / "python")
        subprocess.run([python, "-m", "pip", "install", "-q", *PACKAGES], check=True)

    def run(program: str, *words) -> str:
        # Without PYTHONPATH: nothing of this environment.
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        command = [python, "-c", program, *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_records_of_mxnet_are_read_split_ones_too(mxnet, tmp_path: Path):
    magic, rng = struct.pack("<I", MAGIC), np.random.default_rng(0)
    pieces = [magic, magic[:2], b"wxyz", b"ab", bytes(7)]
    records: list = [[0, [401.0, 406.0], ""]]
    for key in range(1, 401):
        data = b"".join(pieces[i] for i in rng.integers(5, size=rng.integers(1, 30)))
        label = float(key % 5) if key % 3 else [float(key % 5), 0.5, -2.0]
        records.append([key, label, data.hex()])
    records += [[401 + i, [1.0, 2.0], ""] for i in range(5)]
    (tmp_path / "in.json").write_text(json.dumps(records))
    mxnet(WRITE, tmp_path, tmp_path / "in.json")
    reader = RecordReader(tmp_path / "train.rec")
    split = (tmp_path / "train.rec").read_bytes().count(magic) - len(records)
    assert split > 300  # parts of records, or the word off its boundary
    assert list(reader.keys) == list(range(406))
    for key, label, data in records:
        record = reader.read(key)
        assert record.data.hex() == data and record.id == key
        np.testing.assert_array_equal(record.label, label)
    expected = [int(np.ravel(label)[0]) for _, label, _ in records]
    assert reader.labels().tolist() == expected
    source = open_source(DataConfig(path=str(tmp_path)), seed=0)
    assert (len(source), source.num_classes) == (400, 5)


@pytest.mark.skipif(not LFW, reason="set ARCFACE_JAX_LFW to the folder of LFW's train.rec")
def test_mxnet_reads_what_pack_writes(mxnet, tmp_path: Path):
    source = open_source(DataConfig(path=LFW), seed=0)
    selection = packing.select(source, identities=np.arange(0, source.num_classes, 10))
    done = packing.pack(source, selection, tmp_path / "out")
    found, shape, mean = json.loads(mxnet(READ, tmp_path / "out"))
    assert len(found) == 1 + done.images + done.identities
    first = done.images + 1
    assert found[0][:4] == [0, 2, [first, first + done.identities], 0]
    for place, number in enumerate(selection.numbers.tolist()):
        data = source.read(number).data
        label = float(selection.labels[place])
        digest = hashlib.md5(data).hexdigest()
        assert found[place + 1] == [place + 1, 0, [label], place + 1, digest]
    begin = 1
    for identity in range(done.identities):
        end = begin + int(np.sum(selection.labels == identity))
        assert found[first + identity][1:3] == [2, [begin, end]]
        begin = end
    image, _ = source[int(selection.numbers[0])]
    assert shape == list(image.shape) and mean == pytest.approx(image.mean(), abs=0.5)
