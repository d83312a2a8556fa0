"""WebDataset: tar files of samples, `KEY.jpg` with `KEY.cls` or `KEY.json`.

Images are read by offset with the operating system's `pread`, from any thread and in any order;
their positions are cached next to the tars (`sidecar`). Plain tars of an image folder work too.
"""

import os
import re
import tarfile
import threading
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from arcface_jax.data import lists, names, sidecar, splits
from arcface_jax.data.files import LOOSE
from arcface_jax.data.images import HIDDEN, SPECIAL, is_hidden, is_image
from arcface_jax.data.indexed import IndexedSource, described, files_of, of_paths
from arcface_jax.data.source import Sample
from arcface_jax.data.splits import Chosen
from arcface_jax.errors import DataError, ImageError
from arcface_jax.runtime import foreign, sealed

_LAYOUT = 2  # version of the cached arrays
_BLOCK = 512
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_SUFFIXES = (".tar", ".tar.gz", ".tgz")
_LABELS = ("cls", "json")  # in order of preference
_OPEN = 128  # shards whose files stay open in a process


def find_shards(place: Path, *, split: str = "") -> Chosen:
    """Finds the tar files that a path names: one, all in a folder, or `shard-{0000..0042}.tar`.

    Args:
      place: the path.
      split: the split to read in a folder with several; "train" by default.

    Returns:
      The files in order; none if the path names something else.

    Raises:
      DataError: shards of a range are missing, they are compressed, or the split does not exist.
    """
    if place.is_dir():
        found = files_of(place, _SUFFIXES)
        chosen = splits.by_name(place, found, split) if found else splits.NOTHING
    else:
        chosen = Chosen([] if split else _named(place), {})
    if packed := next((shard for shard in chosen.files if shard.suffix.lower() != ".tar"), None):
        raise DataError(
            f"{packed} is compressed and has no random access: unpack it to a .tar (gunzip "
            f"{packed.name}); images in it are compressed already"
        )
    return chosen


def _named(place: Path) -> list[Path]:
    """Returns the tar file at a path, or those of a range."""
    if not place.name.lower().endswith(_SUFFIXES):
        return []
    if found := _RANGE.search(place.name):
        if not place.parent.is_dir():
            return []
        first, last = found[1], found[2]
        numbers = (f"{n:0{len(first)}d}" for n in range(int(first), int(last) + 1))
        shards = [place.with_name(_RANGE.sub(number, place.name, count=1)) for number in numbers]
        missing = [shard.name for shard in shards if not shard.is_file()]
        if missing or not shards:
            raise DataError(
                f"{place} names {len(shards)} shards, of which {len(missing)} do not exist "
                f"({', '.join(missing[:3]) or 'an empty range'}): correct the range, or copy them"
            )
        return shards
    return [place] if place.is_file() else []


class WebDatasetSource(IndexedSource):
    """Samples of tar files: an image, and its label in `.cls` or `.json`.

    A sample is a run of files with one name up to its first dot. In JSON the label's field is the
    one that `columns` names, or one with a usual name. If no sample has a label file, folders are
    the identities. Labels are numbers or names by the rule of `names`. A hard link is the file that
    it repeats.

    Args:
      shards: the tar files, in their order.
      columns: as `data.columns`; label is a field of the JSON.
      level: as `data.identity_level`.
      ignored: files of the folder that are not used, by kind.

    Raises (the constructor): DataError if a file is not a tar or is truncated, or it is ambiguous
    which folders are the identities.
    """

    unit = "samples"

    def __init__(
        self,
        shards: Sequence[Path],
        *,
        columns: str = "",
        level: int = 0,
        ignored: Mapping[str, int] = MappingProxyType({}),
    ):
        self._shards = [shard.absolute() for shard in shards]
        self._level = level
        self._field = lists.parse_columns(columns).get("label", "")
        self._part = _part_of_folder(self._shards)
        super().__init__(self._shards[0].parent)
        self.ignored = {**self.ignored, **ignored}

    def _open_arrays(self, *, check: bool) -> sidecar.Arrays:
        first = self._shards[0]
        return sidecar.open_arrays(
            first if len(self._shards) == 1 else first.parent,
            self._shards,
            lambda: _index(self._shards, self._field, level=self._level, declared=self._declared),
            options=f"webdataset {_LAYOUT} {self._level} {self._declared} {self._field}",
            check=check,
            part=self._part,
        )

    def _prepare(self) -> None:
        self._files: OrderedDict[int, _File] = OrderedDict()
        self._lock = threading.Lock()

    def __getstate__(self) -> dict:
        own = ("_files", "_lock")
        return {name: x for name, x in super().__getstate__().items() if name not in own}

    def read(self, index: int) -> Sample:
        """Returns the image's bytes and its label.

        Raises:
          ImageError: the image cannot be read, or has no valid label.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        label = int(self._labels[index])
        if label < 0:
            raise ImageError(
                self.where(index), "has no label: give it a .cls file, or drop it", kind="no label"
            )
        shard, offset, size = self._place(index)
        try:
            data = self._file(shard).read(size, offset)
        except OSError as error:
            raise ImageError(self.where(index), f"cannot be read: {error.strerror}") from error
        if len(data) < size:
            raise ImageError(self.where(index), f"ends after {len(data)} of {size} bytes")
        return Sample(data, label)

    def where(self, index: int) -> str:
        """Returns the tar, and the name or the place of the file in it that has the image."""
        shard, offset, _ = self._place(index)
        try:
            header = self._file(shard).read(_BLOCK, offset - _BLOCK)
            name = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape").name
        except (OSError, tarfile.HeaderError):
            name = f"byte {offset}"
        return f"{self._shards[shard]}, {name}"

    def facts(self) -> Mapping[str, int | str]:
        """Returns the sizes of the tars, and digests of the images' positions and labels."""
        found = self._arrays
        return {
            "form": "WebDataset",
            "bytes": sum(shard.stat().st_size for shard in self._shards),
            "shards": len(self._shards),
            "image places": found.digest("offsets") + found.digest("sizes"),
            "labels": found.digest("labels"),
        }

    def _place(self, index: int) -> tuple[int, int, int]:
        shard = int(np.searchsorted(self._arrays["ends"], index, side="right"))
        return shard, int(self._arrays["offsets"][index]), int(self._arrays["sizes"][index])

    def _file(self, shard: int) -> "_File":
        with self._lock:
            file = self._files.get(shard)
            if file is None:
                file = self._files[shard] = _File(self._shards[shard])
                if len(self._files) > _OPEN:  # a file in use is closed when its reader is done
                    self._files.popitem(last=False)
            else:
                self._files.move_to_end(shard)
            return file


class _File:
    """An open file, read by offset from any thread, closed with the last reference to it."""

    def __init__(self, path: Path):
        self._number = -1
        self._number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def read(self, size: int, offset: int) -> bytes:
        return os.pread(self._number, size, offset)

    def __del__(self):
        if self._number >= 0:
            os.close(self._number)


def _part_of_folder(shards: Sequence[Path]) -> str:
    """Returns a name for a part of a folder's shards, whose index is cached separately."""
    if len(shards) == 1 or list(shards) == files_of(shards[0].parent, _SUFFIXES):
        return ""
    return f".{sealed.digest(os.fsencode('/'.join(x.name for x in shards)))[:12]}"


# ---- The index --------------------------------------------------------------------------------


class _Image(NamedTuple):
    """An image of a shard."""

    name: str
    shard: int
    offset: int
    size: int
    label: str | None
    """The label; None if no file of the sample has one."""


def _index(
    shards: Sequence[Path], field: str, *, level: int, declared: int
) -> dict[str, np.ndarray]:
    """Reads the headers and the labels of all shards."""
    ignored: Counter[str] = Counter()
    notes: list[str] = []
    images: list[_Image] = []
    for number, shard in enumerate(shards):
        images += _images_of(shard, number, field, ignored, notes)
    if images and all(image.label is None for image in images):
        images = _labeled_by_folder(images, shards, level, ignored)
    if not images:
        raise DataError(
            f"{shards[0]}: no image in {len(shards)} tar files: WebDataset has NAME.jpg (.png, "
            f".webp) with NAME.cls or NAME.json"
        )
    return {
        "offsets": np.array([image.offset for image in images], np.int64),
        "sizes": np.array([image.size for image in images], np.int64),
        "ends": np.searchsorted(
            [image.shard for image in images], np.arange(len(shards)), side="right"
        ),
        **described(_numbered(images, shards, declared), ignored=ignored, notes=notes),
    }


def _labeled_by_folder(
    images: Sequence[_Image], shards: Sequence[Path], level: int, ignored: Counter[str]
) -> list[_Image]:
    """Labels images by their folders, and drops those above the identities' folders."""
    bare = next((x for x in images if not os.path.dirname(x.name.removeprefix("./"))), None)
    if bare is not None:
        raise DataError(
            f"{_where(bare, shards)} has neither a label (NAME.cls, NAME.json) nor a folder: add "
            "one of them"
        )
    found = of_paths([image.name for image in images], level=level, where=str(shards[0]))
    if loose := found.count(None):
        ignored[LOOSE] += loose
    return [
        image._replace(label=label)
        for image, label in zip(images, found, strict=True)
        if label is not None
    ]


def _where(image: _Image, shards: Sequence[Path]) -> str:
    return f"{shards[image.shard]}, {image.name}".replace("\n", "\\n")


def _numbered(images: Sequence[_Image], shards: Sequence[Path], declared: int) -> names.Numbered:
    """Numbers the labels as identities; -1 for an image without one."""
    known = [place for place, image in enumerate(images) if image.label is not None]
    found = names.number(
        [images[place].label or "" for place in known],
        where=lambda i: _where(images[known[i]], shards),
        count=declared,
    )
    numbers = np.full(len(images), -1, np.int32)
    numbers[known] = found.labels
    return found._replace(labels=numbers)


def _images_of(
    shard: Path, number: int, field: str, ignored: Counter[str], notes: list[str]
) -> Iterator[_Image]:
    """Yields the images of a tar in order; counts its other contents."""
    order = tuple(reversed(_LABELS)) if field else _LABELS
    descriptor = os.open(shard, os.O_RDONLY | os.O_CLOEXEC)
    try:
        for sample in _samples(_files(shard, _members(shard, notes), ignored)):
            found = {suffix: x for suffix, x in sample.items() if is_image(f"x.{suffix}")}
            beside = next((suffix for suffix in order if found and suffix in sample), None)
            label = None
            if beside is not None:
                file = sample[beside]
                content = os.pread(descriptor, file.size, file.offset_data)
                label = _label(content, beside, field, where=f"{shard}, {file.name}")
            for member in found.values():
                yield _Image(member.name, number, member.offset_data, member.size, label)
            others = sample.keys() - found.keys() - {beside}
            ignored.update(f".{suffix}" if suffix else "no suffix" for suffix in others)
    finally:
        os.close(descriptor)


def _files(
    shard: Path, members: Iterator[tarfile.TarInfo], ignored: Counter[str]
) -> Iterator[tarfile.TarInfo]:
    """Yields the visible files, and hard links with the place of their target; counts the rest."""
    targets: dict[int, tuple[int, int]] | None = None
    for member in members:
        if member.isdir():
            continue
        if is_hidden(member.name):
            ignored[HIDDEN] += 1
        elif member.isreg():
            yield member
        elif not member.islnk():
            ignored["symbolic links" if member.issym() else SPECIAL] += 1
        else:
            targets = _link_targets(shard) if targets is None else targets
            if member.offset in targets:
                member.offset_data, member.size = targets[member.offset]
                yield member
            else:
                ignored["broken links"] += 1


def _link_targets(shard: Path) -> dict[int, tuple[int, int]]:
    """Finds the files that hard links repeat: GNU tar stores a file's second name as such a link.

    Returns:
      The target's offset and size, by the offset of the link's header.
    """
    wanted = {os.path.normpath(x.linkname) for x in _members(shard, []) if x.islnk()}
    places: dict[str, tuple[int, int]] = {}
    targets = {}
    for member in _members(shard, []):
        place = (member.offset_data, member.size) if member.isreg() else None
        if member.islnk() and (place := places.get(os.path.normpath(member.linkname))):
            targets[member.offset] = place
        if place and (name := os.path.normpath(member.name)) in wanted:
            places[name] = place
    return targets


def _samples(members: Iterator[tarfile.TarInfo]) -> Iterator[dict[str, tarfile.TarInfo]]:
    """Yields runs of files with one key, by suffix; a repeated suffix starts another sample."""
    sample: dict[str, tarfile.TarInfo] = {}
    before = None
    for member in members:
        folder, _, name = member.name.rpartition("/")
        stem, _, suffix = name.partition(".")
        key, suffix = f"{folder}/{stem}", suffix.lower()
        if sample and (key != before or suffix in sample):
            yield sample
            sample = {}
        sample[suffix] = member
        before = key
    if sample:
        yield sample


def _members(shard: Path, notes: list[str]) -> Iterator[tarfile.TarInfo]:
    """Yields the entries of a tar.

    Raises:
      DataError: it is not a tar, or is truncated.
    """
    size = shard.stat().st_size
    end = 0
    try:
        with tarfile.open(shard, "r:") as tar:
            while member := tar.next():
                vars(tar)["members"] = []  # otherwise millions stay in memory
                stored = member.size if member.isreg() else 0
                end = member.offset_data + -(-stored // _BLOCK) * _BLOCK
                if member.offset_data + stored > size:
                    raise _cut_short(shard, f"{member.name} ends at byte {end:,} of {size:,}")
                yield member
    except (tarfile.TarError, EOFError, ValueError) as error:
        if end or size < _BLOCK or "truncated" in str(error) or "end of data" in str(error):
            raise _cut_short(shard, f"{error} after byte {end:,} of {size:,}") from error
        raise DataError(f"{shard} is not a tar file ({error}): fetch it again") from error
    with shard.open("rb") as file:
        file.seek(end)
        rest = file.read(_BLOCK)
    if rest.strip(b"\0"):
        raise _cut_short(shard, f"no file begins at byte {end:,} of {size:,}")
    if len(rest) < _BLOCK:
        notes.append(
            f"warning: {shard} has no end mark: it may have been truncated between two images"
        )


def _cut_short(shard: Path, found: str) -> DataError:
    return DataError(f"{shard} is truncated or damaged ({found}): copy it again")


def _label(content: bytes, suffix: str, field: str, *, where: str) -> str | None:
    """Returns the label in a sample's file; None if it is null in JSON.

    Raises:
      DataError: the JSON field is ambiguous, or the file is not text.
    """
    try:
        text = content.decode().strip()
        value: Any = foreign.parse_json(text) if suffix == "json" else text
    except ValueError as error:
        raise DataError(f"{where} is not {suffix.upper()} text: {error}") from error
    if isinstance(value, dict):
        value = value[_field(value, field, where)]
    if isinstance(value, dict | list | bool):
        raise DataError(f"{where}: {text[:60]!r} is not a label: a number or a name is expected")
    return None if value is None else str(value)


def _field(value: Mapping[str, Any], field: str, where: str) -> str:
    usual = [name for word in lists.STRONG for name in value if name.lower() == word]
    wanted = [name for name in value if name == field] if field else usual[:1]
    if not wanted and not field:
        wanted = [name for name, x in value.items() if isinstance(x, int | str)]
    if len(wanted) != 1:
        raise DataError(
            f"{where} has the fields {', '.join(value)}: which is the identity? Name it with "
            "--data.columns label=FIELD"
        )
    return wanted[0]
