"""Machines without a home, a cache, or a folder for temporary files."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from commands import ROOT, result

from arcface_jax.data import sidecar
from arcface_jax.errors import UserError
from arcface_jax.runtime import homes


@pytest.fixture
def homeless(monkeypatch) -> None:
    """A user number without a passwd entry and without HOME."""
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # what it does for such a user


def test_without_a_home_caches_are_left_out_with_a_note(homeless, tmp_path: Path, capsys):
    assert homes.expanded("~/cache") is None and homes.user_cache() is None
    assert homes.writable("~/cache", what="programs", fix="name one") is None
    expected = "note: programs are not kept, because there is no home folder; name one\n"
    assert capsys.readouterr().err == expected
    assert sidecar.folders(tmp_path / "set", tmp_path / "beside") == (tmp_path / "beside",)
    assert homes.writable(str(tmp_path / "c"), what="programs", fix="") == tmp_path / "c"


def test_a_cache_that_cannot_be_written_is_left_out(tmp_path: Path, capsys):
    (tmp_path / "file").write_text("")
    assert homes.writable(str(tmp_path / "file" / "c"), what="programs", fix="fix") is None
    assert "file/c cannot be written; fix" in capsys.readouterr().err


def test_other_folders_stand_in_for_a_missing_tmp(monkeypatch, tmp_path: Path, capsys):
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: [str(tmp_path / "none")])
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(homes, "_OTHER_TEMPORARY", ("XDG_RUNTIME_DIR", str(tmp_path / "none")))
    monkeypatch.delenv("TMPDIR", raising=False)
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    with pytest.raises(UserError, match="set TMPDIR"):
        homes.find_temporary()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    homes.find_temporary()
    assert tempfile.gettempdir() == os.environ["TMPDIR"] == str(tmp_path)
    assert f"temporary files go to {tmp_path}" in capsys.readouterr().err
    homes.find_temporary()  # once is enough
    assert capsys.readouterr().err == ""


# /tmp and /var/tmp cannot be written, and neither can the current folder.
STRIPPED = """
recipe=$(cat "$0")
for folder in /tmp /var/tmp; do mount -t tmpfs -o mode=755 tmpfs $folder; done
mkdir -m 777 /tmp/run
echo "$recipe" > /tmp/tiny.py
exec setpriv --reuid 54321 --regid 54321 --clear-groups --inh-caps=-all,+dac_read_search \
    --ambient-caps=-all,+dac_read_search "$@" /tmp/tiny.py --workdir /tmp/run/w
"""


@pytest.mark.slow
def test_a_user_without_name_home_and_tmp_trains(tiny_recipe: Path):
    namespace = ["unshare", "--mount"]
    if os.getuid() or subprocess.run([*namespace, "true"], check=False).returncode:
        pytest.skip("needs root and a mount namespace (unshare --mount)")
    kept = {k: v for k, v in os.environ.items() if k not in ("HOME", "XDG_CACHE_HOME", "TMPDIR")}
    kept.pop("JAX_COMPILATION_CACHE_DIR", None)
    done = subprocess.run(
        [*namespace, "sh", "-c", STRIPPED, str(tiny_recipe), sys.executable, "scripts/train.py"],
        cwd=ROOT,
        env=kept | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert result(done.stdout)["step"] == 9
    assert "temporary files go to /dev/shm" in done.stderr
    assert "compiled programs are not kept, because there is no home folder" in done.stderr
