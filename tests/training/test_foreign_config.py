"""A run's config.json may name the user's own parts; what others have is not imported."""

import json
import sys
from pathlib import Path

import pytest

from arcface_jax import plugins
from arcface_jax.config import Config, loading, replace
from arcface_jax.errors import ConfigError
from arcface_jax.training import checkpoint


def run_naming(folder: Path, **fields) -> Path:
    config = replace(Config(), **fields)
    (folder / "config.json").write_text(loading.to_json(config))
    return folder


NAMED = {
    "model__network": "this:Foo",
    "head__loss": "os:system",
    "optimizer__kind": "subprocess:run",
    "data__path": "lfw,json.tool:main:x",
    "evaluation__targets": ("numpy.testing:run_module_suite",),
}


@pytest.mark.parametrize("field", NAMED)
def test_parts_of_others_are_refused_before_they_are_imported(tmp_path: Path, field: str):
    run_naming(tmp_path, **{field: NAMED[field]})
    with pytest.raises(ConfigError, match="is not imported: if you trust it, set ARCFACE_JAX_PLUG"):
        checkpoint.read_config(tmp_path)
    assert "this" not in sys.modules


def test_code_in_the_workdir_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "part_of_a_download.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    run_naming(tmp_path, model__network="part_of_a_download:make")
    with pytest.raises(ConfigError, match="code in the folder of the run"):
        checkpoint.read_config(tmp_path)


def test_own_parts_and_trusted_ones_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "my_parts_of_runs.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path / "mine"))
    (tmp_path / "run").mkdir()
    own = run_naming(tmp_path / "run", model__network="my_parts_of_runs:make")
    assert checkpoint.read_config(own).model.network == "my_parts_of_runs:make"
    other = run_naming(tmp_path / "run", evaluation__targets=("numpy.testing:suite",))
    monkeypatch.setenv(plugins.TRUSTED, "other, numpy")
    assert checkpoint.read_config(other).evaluation.targets == ("numpy.testing:suite",)


def test_numbers_of_others_are_bounded(tmp_path: Path):
    for section, field, value in (
        ("model", "embedding_size", 2_000_000_000),
        ("data", "synthetic", {"pairs": 2_000_000}),
    ):
        content = json.loads(loading.to_json(Config()))
        content[section][field] = value
        (tmp_path / "config.json").write_text(json.dumps(content))
        with pytest.raises(ConfigError) as error:
            checkpoint.read_config(tmp_path)
        assert "\n" not in str(error.value)
