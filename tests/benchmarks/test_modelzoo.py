"""The table of docs/modelzoo.md: a row is measured, and put into the page beside the others."""

import json

import pytest

from arcface_jax.convert import parity
from arcface_jax.errors import UserError
from benchmarks import modelzoo, pages, weight_forms


@pytest.mark.slow
def test_a_network_is_measured_and_its_row_put_into_the_page(tmp_path):
    row = modelzoo.measure("r_tiny", parity.drawn_faces()) | {"faces": "drawn"}
    assert max(row["torch_difference"], row["onnx_difference"]) < 1e-5
    assert row["parameters"] == 5_510_760 and row["onnx_bytes"] > 4 * row["parameters"]
    assert row["compile_seconds"] > 0
    page, data = tmp_path / "page.md", tmp_path / "page.json"
    page.write_text("before\n<!-- begin: scripts/modelzoo.py -->\nold\n<!-- end -->\nafter\n")
    data.write_text(json.dumps([row | {"network": "r50"}]))
    pages.replace(page, modelzoo.table(modelzoo.merge(data, [row])), begin=modelzoo.BEGIN)
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert text.index("| `r_tiny` | 5.51 |") < text.index("| `r50` |")
    assert [kept["network"] for kept in json.loads(data.read_text())] == ["r_tiny", "r50"]
    page.write_text("no marks")
    with pytest.raises(UserError, match=r"begin: scripts/modelzoo\.py"):
        pages.replace(page, modelzoo.table([row]), begin=modelzoo.BEGIN)


@pytest.mark.slow
def test_a_network_goes_through_every_form_of_weights():
    row = weight_forms.measure("r_tiny", parity.drawn_faces())
    assert row["pth"] == row["safetensors"] == row["hub"] == 0
    assert max(row["onnx"], row["folded"], row["not_folded"]) < 1e-5
    line = weight_forms.table([row]).splitlines()[2]
    assert line.startswith("| `r_tiny` | 0 | 0 | 0 | ")
