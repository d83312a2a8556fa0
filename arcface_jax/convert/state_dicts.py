"""Find the backbone in a file of weights: its network, its key and its prefix.

A network is a table of names and shapes. Every name in a file votes for the prefixes that turn it
into one of the table's names; the prefix with the votes of the whole table wins.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch

from arcface_jax.convert import torch_files, torch_names, twins, weight_files
from arcface_jax.convert.torch_files import Entry, Unusable
from arcface_jax.convert.weight_files import Contents, StateDict, Stored
from arcface_jax.errors import UserError
from arcface_jax.evaluation.model_input import ColorOrder
from arcface_jax.models import iresnet, registry

_SHOWN = 5
# Number of prefixes to try; a teacher and a student both fit.
_TRIED = 4
# Fewer names than any block of an IResNet has.
_ARRAYS_OF_A_BLOCK = 10
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class Where:
    """Known properties of a file of weights; the others are detected."""

    network: str | None = None
    """A name in `registry.NETWORKS`, or a plug-in; by default the one that matches."""
    key: str | None = None
    """Keys that lead to the state dict, joined with dots."""
    prefix: str | None = None
    """Prefix of the names of the backbone's arrays."""
    color_order: ColorOrder | None = None
    """Color order that the weights expect; by default their project's."""


class Found(NamedTuple):
    """A backbone in a file."""

    network: str
    state: StateDict
    """State dict by insightface's names; the first convolution expects RGB."""
    notes: tuple[str, ...]
    """How it was found and what was ignored, one sentence each."""


@dataclass(kw_only=True)
class _Fit:
    """A network compared with the arrays under one prefix."""

    stored: Stored
    prefix: str
    network: str
    renamed: bool
    names: set[str] = field(default_factory=set)
    """The network's names, including batch counters."""
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    """Names that a larger network of the family would have."""
    ignored: list[str] = field(default_factory=list)
    misshapen: list[str] = field(default_factory=list)

    @property
    def wrong(self) -> int:
        """Number of arrays that do not match."""
        return len(self.missing) + len(self.unexpected) + len(self.misshapen)

    @property
    def place(self) -> str:
        """Description for messages and options."""
        words = [f"--key {self.stored.key}"] if self.stored.key else []
        return " ".join([*words, *([f"--prefix {self.prefix}"] if self.prefix else [])]) or "no key"


def find(held: Contents, where: Where, *, source: str) -> Found:
    """Finds a backbone among the arrays of a file and reads it.

    If several match, averaged weights (`state_dict_ema`) come first, then the usual keys in their
    order, then the shorter prefix. Networks that differ in training only, as `vit_t` and
    `vit_t_dp005_mask0`, have the same arrays: the first of the registry is taken.

    Args:
      held: contents of the file.
      where: what the caller knows about it.
      source: where the weights come from, for messages.

    Raises:
      UserError: nothing matches; with the differing names and the nearest network.
    """
    if where.network is not None:
        twins.require(where.network)
    dicts = _chosen_dicts(held, where.key, source)
    names = registry.NETWORKS if where.network is None else (where.network,)
    attempts = [fit for stored in dicts for fit in _attempts(stored, names, where.prefix)]
    fits = [fit for fit in attempts if not fit.wrong]
    if not fits:
        raise UserError(_mismatch(attempts, dicts, where, source))
    fits.sort(key=_preference)
    best = fits[0]
    entries = _bare(best)
    order = where.color_order or _color_order(best, held.folder)
    state = weight_files.tensors(entries, held, source=source)
    if order == "BGR":
        state = _turned_to_rgb(state)
    notes = [*_notes(best, fits, where), *_color_notes(best, order)]
    if held.skipped:
        notes.append(f"skipped objects that are not tensors: {_some(held.skipped)}")
    return Found(best.network, state, tuple(notes))


def _chosen_dicts(held: Contents, key: str | None, source: str) -> list[Stored]:
    if not held.dicts:
        raise UserError(weight_files.no_tensors(held, source))
    if key is None:
        return held.dicts
    chosen = [stored for stored in held.dicts if stored.key == key]
    if not chosen:
        known = _some([ascii(stored.key)[1:-1] or "(none)" for stored in held.dicts])
        raise UserError(f"{source} has no tensors under --key {key}; it has some under {known}")
    return chosen


def _preference(fit: _Fit) -> tuple[object, ...]:
    averaged = weight_files.is_averaged(fit.prefix)
    return (not averaged, *fit.stored.likeliness, len(fit.prefix))


# ---- a network against a dict of arrays ------------------------------------------------------


def _attempts(stored: Stored, networks: Iterable[str], prefix: str | None) -> list[_Fit]:
    """Compares each network at each prefix that matches names; empty if no name matches."""
    renamed = torch_names.from_adaface(stored.entries)
    if renamed is not None:
        entries = _with_fixed_scale(renamed.entries, renamed.prefix)
        stored = Stored(stored.key, entries)
    endings = _endings(stored.entries)
    attempts = []
    for network in networks:
        if not _may_hold(stored.entries, endings, network):
            continue
        shapes = _shapes(network, 512)
        votes: Counter[str] = Counter()
        for name in shapes:
            votes.update(endings.get(name, ()))
        if prefix is not None:
            wanted = f"{prefix.rstrip('.')}." if prefix else ""
            votes = Counter({wanted: votes[wanted]}) if votes[wanted] else Counter()
        for found, _ in votes.most_common(_TRIED):
            attempts.append(_compare(stored, network, shapes, found))
            attempts[-1].renamed = renamed is not None
    return attempts


def _endings(names: Iterable[str]) -> dict[str, list[str]]:
    """Returns every ending of a dotted name, cut at a dot, with what comes before it."""
    endings: defaultdict[str, list[str]] = defaultdict(list)
    for name in names:
        at = 0
        for _ in range(16):
            endings[name[at:]].append(name[:at])
            at = name.find(".", at) + 1
            if not at:
                break
    return endings


def _shapes(network: str, size: int) -> Shapes:
    """Returns the shapes of the network's torch twin, which is faster to build than the JAX
    network.
    """
    with torch.device("meta"):
        twin = twins.build(network, embedding_size=size)
    state = twin.state_dict()
    return {name: tuple(t.shape) for name, t in state.items() if not _is_counter(name)}


def _may_hold(entries: Mapping[str, object], endings: Mapping[str, object], network: str) -> bool:
    """Returns whether a network is worth building: its family's array is there, with enough
    names.
    """
    sign = twins.sign(network)
    if sign is not None and sign not in endings:
        return False
    architecture = iresnet.ARCHITECTURES.get(network)
    blocks = sum(architecture.blocks) if architecture else 0
    return len(entries) >= _ARRAYS_OF_A_BLOCK * blocks


def _compare(stored: Stored, network: str, shapes: Shapes, prefix: str) -> _Fit:
    """Compares a network with the arrays whose names start with a prefix."""
    inner = {
        name.removeprefix(prefix): entry
        for name, entry in stored.entries.items()
        if name.startswith(prefix)
    }
    size = _embedding_size(inner)
    if size and size != 512:
        shapes = _shapes(network, size)
    names = {*shapes, *(torch_names.counters(shapes) & inner.keys())}
    modules = {name.partition(".")[0] for name in shapes}
    fit = _Fit(stored=stored, prefix=prefix, network=network, renamed=False, names=names)
    for name, shape in shapes.items():
        entry = inner.get(name)
        if entry is None:
            fit.missing.append(name)
        elif isinstance(entry, Entry) and entry.shape != shape:
            fit.misshapen.append(f"{name} {entry.shape} instead of {shape}")
    more = [name for name in inner if name not in names]
    fit.unexpected = [n for n in more if n.partition(".")[0] in modules and not _is_counter(n)]
    inside = {f"{prefix}{name}" for name in (*names, *fit.unexpected)}
    fit.ignored = [n for n in stored.entries if n not in inside and not _is_counter(n)]
    return fit


def _is_counter(name: str) -> bool:
    return name.rpartition(".")[2] == torch_names.COUNTER


def _embedding_size(entries: Mapping[str, Entry | Unusable]) -> int | None:
    """Returns D, if there is a last layer to read it from."""
    one_axis = {
        name: range(entry.shape[0])
        for name, entry in entries.items()
        if isinstance(entry, Entry) and len(entry.shape) == 1
    }
    return registry.embedding_size(one_axis)


def _bare(fit: _Fit) -> dict[str, Entry | Unusable]:
    """Returns the matching arrays, by the network's names.

    Raises:
      UserError: one is not floating-point, such as quantized weights.
    """
    bare = {name: fit.stored.entries[f"{fit.prefix}{name}"] for name in sorted(fit.names)}
    for name, entry in bare.items():
        if isinstance(entry, Entry) and not (_is_counter(name) or entry.dtype.is_floating_point):
            raise UserError(
                f"{name} is {str(entry.dtype).removeprefix('torch.')}, expected floating-point "
                "weights: take those from before they were quantized"
            )
    return bare


# ---- AdaFace's and CVLface's networks --------------------------------------------------------

_COLOR_SPACE = re.compile(r"color_space[\"']?\s*[:=]\s*[\"']?(RGB|BGR)\b")
_DESCRIPTIONS = ("model.yaml", "config.json")


def _with_fixed_scale(
    entries: dict[str, Entry | Unusable], prefix: str
) -> dict[str, Entry | Unusable]:
    """Adds the last BatchNorm's constant scale 1 and bias 0, which these networks leave out."""
    bias = entries.get(f"{prefix}fc.bias")
    if not isinstance(bias, Entry) or len(bias.shape) != 1 or bias.shape[0] > 65536:
        return entries
    fixed = {"weight": torch.ones(bias.shape), "bias": torch.zeros(bias.shape)}
    made = {f"{prefix}features.{n}": torch_files.entry_of(t) for n, t in fixed.items()}
    return {**made, **entries}


def _color_order(fit: _Fit, folder: Path | None) -> ColorOrder:
    """Returns BGR for AdaFace's own files; for CVLface's, what the file next to them states, or
    RGB.
    """
    if not fit.renamed:
        return "RGB"
    files = [folder / name for name in _DESCRIPTIONS] if folder else []
    for path in files:
        try:
            with path.open(encoding="utf-8", errors="replace") as file:
                found = _COLOR_SPACE.search(file.read(65536))
        except OSError:
            continue
        if found:
            return "BGR" if found[1] == "BGR" else "RGB"
    return "RGB" if fit.prefix.endswith("net.") else "BGR"


def _turned_to_rgb(state: StateDict) -> StateDict:
    """Reverses the input channels of the first convolution.

    Raises:
      UserError: there is not exactly one convolution of three channels.
    """
    first = [name for name, t in state.items() if t.ndim == 4 and t.shape[1] == 3]
    if len(first) != 1:
        raise UserError(
            f"--color-order BGR needs one convolution of 3 channels to turn, found {len(first)}"
        )
    name = first[0]
    return {**state, name: state[name][:, [2, 1, 0]].contiguous()}


# ---- messages --------------------------------------------------------------------------------


def _some(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _notes(best: _Fit, fits: list[_Fit], where: Where) -> list[str]:
    notes = []
    alike = [f.network for f in fits if f.place == best.place and f.network != best.network]
    if where.network is None:
        others = f"; {', '.join(alike)} have the same arrays, --network names one" if alike else ""
        notes.append(f"network {best.network}{others}")
    if best.place != "no key":
        notes.append(f"found at {best.place}")
    others = sorted({f.place for f in fits} - {best.place})
    if others:
        notes.append(f"other weights fit too: {_some(others)}")
    if best.ignored:
        notes.append(f"ignored what is not of the backbone: {_some(_grouped(best))}")
    if best.prefix.startswith(("features.module.", "module.features.")):
        notes.append(
            "MagFace's own networks take BGR and x / 255, not (x - 127.5) / 127.5: fine-tune "
            "before use if the file is one of them"
        )
    return notes


def _color_notes(fit: _Fit, order: ColorOrder) -> list[str]:
    if order == "BGR":
        return ["first convolution turned from BGR to RGB (--color-order RGB leaves it)"]
    return ["taken as RGB (--color-order BGR turns it)"] if fit.renamed else []


def _grouped(fit: _Fit) -> list[str]:
    """Lists what was ignored: single arrays with their shapes, modules with their sizes."""
    groups: defaultdict[str, list[str]] = defaultdict(list)
    for name in fit.ignored:
        groups[name.partition(".")[0]].append(name)
    return [
        f"{ascii(names[0])[1:-1]} {_shape(fit.stored.entries[names[0]])}"
        if len(names) == 1
        else f"{ascii(top)[1:-1]}.* ({len(names)} arrays)"
        for top, names in groups.items()
    ]


def _shape(entry: Entry | Unusable) -> str:
    return str(entry.shape) if isinstance(entry, Entry) else f"({entry.kind})"


def _mismatch(attempts: list[_Fit], dicts: list[Stored], where: Where, source: str) -> str:
    """Returns the message if nothing matches: the nearest network, or the named one's
    differences.
    """
    if where.network is not None:
        every = [fit for d in dicts for fit in _attempts(d, registry.NETWORKS, where.prefix)]
        nearest = min(every, key=_distance, default=None)
    else:
        nearest = min(attempts, key=_distance, default=None)
    if where.network is None:
        begin = f"{source} has no known backbone"
    else:
        begin = f"{source} does not hold weights of {where.network}"
    shown = min(attempts, key=_distance, default=nearest)
    if nearest is None or shown is None:
        if where.prefix:
            return f"{begin} under --prefix {where.prefix}; omit it to have the prefix found"
        largest = max(dicts, key=lambda stored: len(stored.entries))
        names = _some(ascii(name)[1:-1] for name in largest.entries)
        return f"{begin}: it has {names}; name the network with --network, arrays with --prefix"
    if nearest.network == where.network:
        hint = f"no other network is nearer (--network); {nearest.wrong} arrays differ"
    elif not nearest.wrong:
        hint = (
            f"they are weights of {nearest.network}: --network {nearest.network} (in training "
            f"--model.network {nearest.network})"
        )
    else:
        hint = (
            f"the nearest network is {nearest.network}, {nearest.wrong} arrays differ (--network)"
        )
    return "; ".join(filter(None, [begin, hint, _differences(shown)]))


def _distance(fit: _Fit) -> tuple[int, int]:
    return fit.wrong, -len(fit.names)


def _differences(fit: _Fit) -> str:
    """Lists at most five names, some for each kind of difference."""
    kinds = {
        "missing": fit.missing,
        "unexpected": [
            *fit.unexpected,
            *(n.removeprefix(fit.prefix) for n in fit.ignored if n.startswith(fit.prefix)),
        ],
        "of another shape": fit.misshapen,
    }
    kinds = {kind: names for kind, names in kinds.items() if names}
    share = dict.fromkeys(kinds, 0)
    for _ in range(_SHOWN):  # one name at a time, for the kind with the fewest so far
        open_kinds = [kind for kind, names in kinds.items() if share[kind] < len(names)]
        if open_kinds:
            share[min(open_kinds, key=lambda kind: share[kind])] += 1
    texts = []
    for kind, names in kinds.items():
        shown = ", ".join(ascii(name)[1:-1] for name in names[: share[kind]])
        more = len(names) - share[kind]
        texts.append(f"{kind}: {shown}" + (f" and {more} more" if more else ""))
    return "; ".join(texts)
