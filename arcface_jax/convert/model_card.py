"""The model card of a hub folder: README.md with the hub's YAML front matter."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from arcface_jax.config import loading
from arcface_jax.config.choices import Which
from arcface_jax.evaluation.calibration import Calibration
from arcface_jax.evaluation.model_input import ModelInput
from arcface_jax.runtime import metrics
from arcface_jax.training import saved_runs

_INTENDED_USE = (
    "Comparing aligned faces of people who agreed to it, and research. Not for identifying people "
    "without their consent or for decisions without human review; measure error rates on your own "
    "population first."
)
# Also in the order of the table; other metrics are not in the card.
_INTERVALS = {"accuracy": ("accuracy_low", "accuracy_high")}
_SHOWN = ("accuracy", "auc", "eer")


@dataclass(frozen=True)
class Run:
    """What the card states about the training run."""

    recipe_digest: str
    """SHA-256 of the configuration without its workdir."""
    step: int
    data: str
    """Name of the training set, without its folder."""
    classes: int | None
    images: int | None
    evaluated: Mapping[str, float] = field(default_factory=dict)
    """Metrics of the evaluation at this step, by name: eval/lfw/accuracy and so on."""


@dataclass(frozen=True, kw_only=True)
class Card:
    """What the publisher of a model states about it."""

    name: str
    license: str = "other"
    """License identifier of the hub, such as apache-2.0."""
    license_name: str = ""
    license_link: str = ""
    training_data: str = ""
    """A sentence about the training data; by default what the run has recorded."""
    intended_use: str = _INTENDED_USE
    run: Run | None = None
    calibration: Calibration | None = None


def of_run(workdir: Path, which: Which = "latest") -> Run:
    """Reads what a run has recorded about itself.

    Args:
      workdir: workdir of the run.
      which: the checkpoint.

    Raises:
      CheckpointError: the checkpoint does not exist.
    """
    config, step, dataset = saved_runs.restore_dataset(workdir, which)
    recipe = json.loads(loading.to_json(config))
    recipe.pop("workdir", None)
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()
    path = workdir / "metrics.jsonl"
    lines = metrics.read(path) if path.is_file() else []
    evaluated: dict[str, float] = {}
    for line in lines:
        if line.get("step") == step:
            evaluated |= {k: v for k, v in line.items() if k.startswith("eval/")}
    return Run(
        recipe_digest=digest,
        step=step,
        data=Path(config.data.path).name,
        classes=dataset.get("num_classes"),
        images=dataset.get("num_images"),
        evaluated=evaluated,
    )


def render(card: Card, *, network: str, described: ModelInput, parameters: int) -> str:
    """Returns the text of README.md.

    Args:
      card: card of the model.
      network: its name.
      described: description of its input.
      parameters: number of parameters.
    """
    sections = {
        "Model": _model(card, network, described, parameters),
        "Use": _use(network),
        "Training data": _data(card),
        "Evaluation": _evaluation(card.run),
        "Calibration": _calibration(card.calibration),
        "Intended use": card.intended_use,
        "License": _license(card),
    }
    body = "\n\n".join(f"## {title}\n\n{text}" for title, text in sections.items() if text)
    return f"{_front_matter(card)}\n# {_line(card.name)}\n\n{body}\n"


def _front_matter(card: Card) -> str:
    entries: dict[str, object] = {"license": card.license}
    if card.license == "other":
        entries["license_name"] = card.license_name or "unspecified"
    if card.license_link:
        entries["license_link"] = card.license_link
    entries |= {
        "library_name": "arcface_jax",
        "pipeline_tag": "image-feature-extraction",
        "tags": ["face-recognition", "face-verification", "arcface", "jax", "safetensors"],
    }
    if results := _results(card):
        entries["model-index"] = [{"name": card.name, "results": results}]
    # JSON is valid YAML, whatever the strings contain.
    lines = [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in entries.items()]
    return "\n".join(["---", *lines, "---", ""])


def _results(card: Card) -> list[dict]:
    return [
        {
            "task": {"type": "image-feature-extraction", "name": "Face verification"},
            "dataset": {"type": name, "name": name},
            "metrics": [{"type": "accuracy", "value": values["accuracy"]}],
        }
        for name, values in _by_set(card.run).items()
        if "accuracy" in values
    ]


def _model(card: Card, network: str, described: ModelInput, parameters: int) -> str:
    rows = {
        "Network": network,
        "Parameters": f"{parameters:,}",
        "Embedding": f"{described.embedding_size} numbers, float32, not normalized",
        "Input": f"aligned faces, {described.height} x {described.width}, {described.color_order}, "
        f"(x - {described.mean:g}) / {described.scale:g}",
        "Weights": f"SHA-256 {described.digest}",
    }
    if card.run is not None:
        rows["Recipe"] = f"SHA-256 {card.run.recipe_digest}, step {card.run.step:,}"
    return _table(("", ""), [*rows.items()])


def _use(network: str) -> str:
    return f"""```python
from arcface_jax import Embedder

embedder = Embedder("FOLDER")  # this folder, offline; {network} runs without any code from it
cosines = embedder.similarity(["a.png"], ["b.png"])
```

In PyTorch, `arcface_jax.convert.hub.load_torch("FOLDER")` returns the module."""


def _data(card: Card) -> str:
    run = card.run
    recorded = ""
    if run is not None and run.data:
        counts = [(run.images, "images"), (run.classes, "identities")]
        known = ", ".join(f"{count:,} {what}" for count, what in counts if count)
        recorded = f"`{run.data}`" + (f": {known}." if known else ".")
    return " ".join(filter(None, [card.training_data, recorded])) or "Not recorded."


def _evaluation(run: Run | None) -> str:
    rows = []
    for name, values in _by_set(run).items():
        for metric in [m for m in values if m in _SHOWN or m.startswith("tar@far=")]:
            low, high = (values.get(bound) for bound in _INTERVALS.get(metric, ("", "")))
            interval = "" if low is None or high is None else f"{low:.4f} to {high:.4f}"
            rows.append((name, metric, f"{values[metric]:.4f}", interval))
    if not rows:
        return "Not evaluated at this step of the run."
    note = "Ten-fold verification as insightface measures it; Wilson's interval over the pairs."
    return f"{_table(('set', 'metric', 'value', '95 % interval'), rows)}\n\n{note}"


def _by_set(run: Run | None) -> dict[str, dict[str, float]]:
    """Groups metrics by verification set."""
    sets: dict[str, dict[str, float]] = {}
    for key, value in (run.evaluated if run else {}).items():
        match = re.fullmatch(r"eval/([^/]+)/([^/]+)", key)
        if match:
            sets.setdefault(match[1], {})[match[2]] = value
    return sets


def _calibration(found: Calibration | None) -> str:
    if found is None:
        return ""
    rows = [
        ("same", f"{found.threshold_cosine:.4f}", f"{found.far:.2e}", f"{found.tar:.4f}"),
    ]
    if found.threshold_check is not None:
        rows.append(
            (
                "check",
                f"{found.threshold_check:.4f}",
                f"{found.far_check:.2e}",
                f"{found.tar_check:.4f}",
            )
        )
    note = (
        f"On {_line(found.set_name)}: {found.different_pairs:,} pairs of different people, "
        f"{found.same_pairs:,} of one person. FAR {found.far_low:.2e} to {found.far_high:.2e}, TAR "
        f"{found.tar_low:.4f} to {found.tar_high:.4f} (95 % intervals of the first row)."
        + (" Mirrored faces' embeddings were added." if found.flip else "")
    )
    return f"{_table(('verdict', 'cosine from', 'FAR', 'TAR'), rows)}\n\n{note}"


def _license(card: Card) -> str:
    stated = card.license_name or (card.license if card.license != "other" else "")
    text = _line(stated) or "Not stated. Do not use the weights before their owner has given terms."
    link = f" ({card.license_link})" if card.license_link else ""
    return f"{text}{link}\n\nThe training data may restrict the use of the weights further."


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join(f"| {' | '.join(_line(cell) for cell in line)} |" for line in lines)


def _line(text: str) -> str:
    """Returns text that stays in its line and table cell."""
    return " ".join(text.replace("|", "\\|").split())
