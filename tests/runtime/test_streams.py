"""A process that prints goes on without a reader."""

import subprocess
import sys

import pytest
from commands import ROOT

PRINTS = """
import sys
from pathlib import Path
from arcface_jax.runtime import streams
streams.outlive_readers()
print("first", flush=True)
print("first", file=sys.stderr)
sys.stdin.readline()
for number in range(100):
    print("more" * 1000)
    print("more", file=sys.stderr, flush=True)
with open(sys.argv[1], "w") as file:
    file.write(f"done {file.fileno() > 2}")
"""


@pytest.mark.parametrize("closed", ["by the reader", "from the start"])
def test_output_without_a_reader_is_dropped(tmp_path, closed):
    done = tmp_path / "done"
    command = [sys.executable, "-W", "error", "-c", PRINTS, str(done)]
    if closed == "from the start":
        command = ["sh", "-c", 'exec "$@" >&- 2>&-', "sh", *command]
    pipes = {name: subprocess.PIPE for name in ("stdin", "stdout", "stderr")}
    with subprocess.Popen(command, cwd=ROOT, **pipes) as process:
        assert process.stdin and process.stdout and process.stderr
        if closed == "by the reader":
            assert process.stdout.readline() == process.stderr.readline() == b"first\n"
        process.stdout.close()
        process.stderr.close()
        process.stdin.write(b"\n")
        process.stdin.close()
        assert process.wait() == 0
    assert done.read_text() == "done True"
