"""Open any network: a run, a hub folder, torch weights, or an ONNX file.

Commands parse `ModelChoice` before they open anything, so the functions here import what opens a
network only when needed.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from tyro.conf import OmitArgPrefixes

from arcface_jax.config import Config
from arcface_jax.config.choices import OnnxOptions, Which
from arcface_jax.errors import UserError, require

if TYPE_CHECKING:
    from arcface_jax.evaluation.embed import Model
    from arcface_jax.training.network import Network


@dataclass(frozen=True)
class ModelChoice:
    """The network; name one of --workdir, --weight, --onnx."""

    workdir: Annotated[Path | None, tyro.conf.arg(aliases=["--checkpoint"])] = None
    """Folder of a training run."""
    step: Which = "latest"
    """Which of the run's checkpoints: a step, the newest, or the best by checkpoint.best_metric."""
    weight: Path | None = None
    """Or PyTorch weights, of this project or another (docs/modelzoo.md): a file or a hub folder."""
    network: str | None = None
    """The network that --weight is of; by default found by its names and shapes."""
    onnx: Path | None = None
    """Or an ONNX file."""
    onnx_options: OmitArgPrefixes[OnnxOptions] = field(default_factory=OnnxOptions)


Kind = Literal["workdir", "hub", "weight", "onnx"]
"""A training run, a hub folder, a file of torch weights or safetensors, or an ONNX file."""

# What belongs to which option of `ModelChoice`.
_OPTIONS = {"workdir": "--workdir", "hub": "--weight", "weight": "--weight", "onnx": "--onnx"}
_ARE = {
    "workdir": "the workdir of a run",
    "hub": "a hub folder",
    "weight": "a file of weights",
    "onnx": "an ONNX file",
}
# Options that apply to some kinds only, with what the others are told.
_FOR = {
    "--network": ({"weight"}, "a file of weights"),
    "--step": ({"workdir"}, "the workdir of a run"),
    "--color-order": ({"hub", "weight", "onnx"}, "weights or an ONNX file"),
    "--mean": ({"onnx"}, "an ONNX file"),
    "--scale": ({"onnx"}, "an ONNX file"),
    "--output-name": ({"onnx"}, "an ONNX file"),
}
_LISTED = 8


def open_model(choice: ModelChoice, *, batch_size: int = 64, devices: int | None = None) -> "Model":
    """Opens the network that the command line names.

    Args:
      choice: the parsed options.
      batch_size: images per forward pass, over all devices.
      devices: as in `arcface_jax.training.network.Network`; an ONNX file chooses for itself.

    Raises:
      UserError: none or several networks are named, one cannot be read, or an option does not apply
        to its kind.
    """
    named = [name for name in ("workdir", "weight", "onnx") if getattr(choice, name) is not None]
    if len(named) != 1:
        raise UserError(
            f"{len(named)} networks are named ({', '.join(f'--{n}' for n in named) or 'none'}); "
            "name exactly one: --workdir FOLDER, --weight FILE.pth or a hub folder, or "
            "--onnx FILE.onnx"
        )
    (option,) = named
    path = getattr(choice, option)
    options: dict[str, Any] = {"batch_size": batch_size, "devices": devices}
    found = kind_of(path) if path.exists() else None
    if found is None or _OPTIONS[found] == f"--{option}":
        kind = "hub" if found == "hub" else option
        options |= {"step": choice.step, "onnx_options": choice.onnx_options}
        return _open(path, kind, network=choice.network, **options)
    raise UserError(f"--{option} {path} is {_ARE[found]}: name it with {_OPTIONS[found]}")


def open_path(
    path: str | Path,
    *,
    network: str | None = None,
    step: Which = "latest",
    onnx_options: OnnxOptions | None = None,
    batch_size: int = 64,
    devices: int | Literal["own"] | None = None,
) -> "Model":
    """Opens any kind of model; the kind is detected by content.

    Args:
      path: a workdir, a hub folder (`arcface_jax.convert.hub`), a file of torch weights or
        safetensors, or an ONNX file.
      network: network of a file of weights; by default detected from the arrays.
      step: which checkpoint of a workdir.
      onnx_options: properties that an ONNX file does not state; of weights, the color order.
      batch_size: images per forward pass, over all devices.
      devices: as in `arcface_jax.training.network.Network`; an ONNX file chooses for itself.

    Raises:
      UserError: the path has no model, it cannot be read, or an argument does not apply to its
        kind.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(
            f"no model at {path}: name a run's workdir, a hub folder, a .pth, .safetensors or "
            ".onnx file"
        )
    kind = kind_of(path)
    if kind is None:
        raise UserError(
            f"{path} holds no model ({_contents(path)}); expected a run (config.json, "
            "checkpoints), or a hub folder (config.json with model.safetensors, or CVLface's "
            "pretrained_model)"
        )
    options: dict[str, Any] = {"batch_size": batch_size, "devices": devices}
    options |= {"step": step, "onnx_options": onnx_options}
    return _open(path, kind, network=network, **options)


def kind_of(path: Path) -> Kind | None:
    """Detects what an existing path contains; None for a folder of something else."""
    if not path.is_dir():
        from arcface_jax.convert import file_kinds

        return "onnx" if file_kinds.is_onnx(path) else "weight"
    if (path / "checkpoints").is_dir():
        return "workdir"
    if (path / "model.safetensors").is_file() or (path / "pretrained_model").is_dir():
        return "hub"
    return "workdir" if (path / "config.json").exists() else None


def refuse_unused(
    path: Path,
    kind: str,
    *,
    network: str | None,
    step: Which,
    onnx_options: OnnxOptions | None,
) -> None:
    """Refuses options that have no effect on this kind of model; arguments as `open_path`.

    Raises:
      UserError: there is one.
    """
    properties = onnx_options or OnnxOptions()
    given = {
        "--network": network,
        "--step": None if step == "latest" else step,
        "--color-order": properties.color_order,
        "--mean": properties.mean,
        "--scale": properties.scale,
        "--output-name": properties.output_name,
    }
    for option, value in given.items():
        kinds, name = _FOR[option]
        if value is not None and kind not in kinds:
            raise UserError(
                f"{option} {value} is for {name}, and {path} is {_ARE[kind]}: leave it out"
            )


def _contents(folder: Path) -> str:
    names = sorted(entry.name for entry in folder.iterdir())
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return f"it has {', '.join(names[:_LISTED])}{more}" if names else "it is empty"


def _open(
    path: Path,
    kind: str,
    *,
    network: str | None,
    step: Which,
    onnx_options: OnnxOptions | None,
    batch_size: int,
    devices: int | Literal["own"] | None,
) -> "Model":
    refuse_unused(path, kind, network=network, step=step, onnx_options=onnx_options)
    if kind == "onnx":
        from arcface_jax.convert.onnx_runner import onnx_embedder

        model = onnx_embedder(path, batch_size=batch_size, options=onnx_options)
        if model.guessed:
            print(f"{path}: {model.guessed}", file=sys.stderr)
        return model
    from arcface_jax.training.network import Network

    if kind == "workdir":
        return Network.from_workdir(path, which=step, batch_size=batch_size, devices=devices)
    require("torch", "torch")
    color_order = onnx_options.color_order if onnx_options else None
    if kind == "hub":
        from arcface_jax.convert import hub  # only these files need torch

        found = hub.read(path, color_order=color_order)
    else:
        from arcface_jax.convert import weights

        found = weights.load(path, network, color_order=color_order)
    for note in found.notes:
        print(f"{path}: {note}", file=sys.stderr)
    arrays = (found.params, found.batch_stats)
    return Network(
        found.network,
        *arrays,
        batch_size=batch_size,
        devices=devices,
        compatible_with=found.compatible_with,
    )


def config_of(choice: ModelChoice) -> Config:
    """Returns the recipe of the named run; the default one for networks that are not from a run."""
    if choice.workdir is None:
        return Config()
    from arcface_jax.training import checkpoint

    return checkpoint.read_config(choice.workdir)


def open_network(choice: ModelChoice, *, batch_size: int = 16) -> "Network":
    """Opens a run or torch weights to export them, on one device.

    Raises:
      UserError: none or several networks are named, it cannot be read, or it is an ONNX file.
    """
    from arcface_jax.training.network import Network

    model = open_model(choice, batch_size=batch_size, devices=1)
    if not isinstance(model, Network):
        raise UserError(
            f"--onnx {choice.onnx} has been exported already: name its --workdir or --weight"
        )
    return model


@dataclass(frozen=True)
class ModelChoices:
    """The networks, of any kinds."""

    workdir: Annotated[tuple[Path, ...], tyro.conf.arg(aliases=["--checkpoint"])] = ()
    """Folders of training runs."""
    step: Which = "latest"
    """Which of their checkpoints: a step, the newest, or the best by checkpoint.best_metric."""
    weight: tuple[Path, ...] = ()
    """backbone.pth files, of this project or of insightface."""
    network: tuple[str, ...] = ()
    """The network of all --weight, or one for each; by default found by names and shapes."""
    onnx: tuple[Path, ...] = ()
    """ONNX files."""
    onnx_options: OmitArgPrefixes[OnnxOptions] = field(default_factory=OnnxOptions)

    def each(self) -> list[ModelChoice]:
        """The choices one by one, in the order of the options.

        --step goes to the runs, --network to the weights, and the properties of files to the ONNX
        files or, without any, to the weights. Where there is nothing that an option applies to, all
        get it, and `open_model` refuses it.

        Raises:
          UserError: the numbers of --network and --weight differ.
        """
        networks: tuple[str | None, ...] = self.network or (None,)
        count = len(self.weight)
        if len(networks) not in (1, count):
            raise UserError(
                f"{count} --weight and {len(networks)} --network: name one network, or one for each"
            )
        step: Which = "latest" if self.workdir else self.step
        network = None if self.weight else networks[0]
        of_weights = OnnxOptions() if self.onnx else self.onnx_options
        of_runs = OnnxOptions() if self.weight else of_weights
        networks = networks * count if len(networks) == 1 else networks
        return [
            *(
                ModelChoice(workdir=path, step=self.step, network=network, onnx_options=of_runs)
                for path in self.workdir
            ),
            *(
                ModelChoice(weight=path, step=step, network=name, onnx_options=of_weights)
                for path, name in zip(self.weight, networks, strict=True)
            ),
            *(
                ModelChoice(onnx=path, step=step, network=network, onnx_options=self.onnx_options)
                for path in self.onnx
            ),
        ]


def open_models(choices: ModelChoices, *, batch_size: int = 64) -> dict[str, "Model"]:
    """Opens several networks, named after their folders or files; duplicates become NAME-2.

    Raises:
      UserError: no network is named, or one cannot be read.
    """
    each = choices.each()
    if not each:
        raise UserError(
            "no network is named: name one or several with --workdir FOLDER, --weight FILE.pth or "
            "a hub folder, or --onnx FILE.onnx"
        )
    models: dict[str, Model] = {}
    for choice in each:
        path = choice.workdir or choice.weight or choice.onnx or Path()
        stem = path.resolve().name if choice.workdir else path.stem
        names = [stem, *(f"{stem}-{number}" for number in range(2, len(each) + 1))]
        name = next(name for name in names if name not in models)
        models[name] = open_model(choice, batch_size=batch_size)
    return models
