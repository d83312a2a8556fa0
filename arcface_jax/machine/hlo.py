"""Read a program compiled by XLA:GPU: its kernels, their memory traffic and FLOPs, collectives.

The input is the text of the scheduled module, `compiled.as_text()`; nothing here imports JAX. Bytes
are HBM traffic under the assumption that no cache retains data between kernels: a kernel reads its
operands and writes its results once, a slice counts as the slice, an update in place as the update.
Kernels in a loop count once per iteration.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

Kind = Literal["convolution", "gemm", "attention", "fusion", "copy", "collective", "other"]
Part = Literal["convolutions", "batch_norm_elementwise", "head", "optimizer", "other"]
PARTS: tuple[Part, ...] = (
    "convolutions",
    "batch_norm_elementwise",
    "head",
    "optimizer",
    "other",
)
COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "reduce-scatter",
)
_BITS = {"pred": 8, "s4": 4, "u4": 4, "token": 0, "opaque": 0}
_SHAPE = re.compile(r"\b([a-z]+[0-9]*(?:e[0-9]m[0-9]\w*)?)\[([0-9,]*)\](\{[^}]*\})?")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_OPERAND = re.compile(r"%([\w.\-]+)")
# Instructions without a kernel.
_FREE = {
    "after-all",
    "bitcast",
    "constant",
    "get-tuple-element",
    "opt-barrier",
    "parameter",
    "partition-id",
    "replica-id",
    "tuple",
}
_VIEWS = ("bitcast", "reshape")
_SLICES = ("dynamic-slice", "gather", "slice")
_UPDATES = ("dynamic-update-slice", "scatter")
_PURE_COPIES = {"bitcast", "copy", "parameter", "reshape", "transpose", "tuple", "constant"}


class Shape(NamedTuple):
    """One array of an instruction's result."""

    dtype: str
    dims: tuple[int, ...]
    layout: str = ""
    """Layout as HLO prints it, `{3,2,1,0}`: the minor dimension first."""

    @property
    def bytes(self) -> int:
        """Size without padding."""
        return math.prod(self.dims) * bits(self.dtype) // 8

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"


class Instruction(NamedTuple):
    """One line of a computation."""

    name: str
    op: str
    shapes: tuple[Shape, ...]
    """Shapes of the result: one, or a tuple's leaves."""
    operands: tuple[str, ...]
    attributes: str
    """The text after the operands."""
    is_root: bool
    arguments: str
    """Operands as text: a parameter's number."""

    @property
    def bytes(self) -> int:
        """Bytes of the result."""
        return sum(shape.bytes for shape in self.shapes)

    def attribute(self, pattern: str) -> str | None:
        """Returns the first group of a pattern in the attributes."""
        found = re.search(pattern, self.attributes)
        return found[1] if found else None

    @property
    def called(self) -> str | None:
        """Name of the computation of a fusion, call or asynchronous start."""
        return self.attribute(r"(?:calls|to_apply)=%?([\w.\-]+)")


class Frame(NamedTuple):
    """One level of the Python stack where an instruction was traced."""

    file: str
    function: str


class Kernel(NamedTuple):
    """An instruction that the GPU executes, or a copy or collective."""

    name: str
    kind: Kind
    part: Part
    runs: int
    """Runs per call of the program."""
    read: int
    """Bytes read per run."""
    written: int
    """Bytes written per run."""
    flops: int
    """FLOPs of its products per run: 2 for each multiply-accumulate."""
    dtype: str
    """Type of the products' operands; without products, of the result."""
    detail: str
    """Target of a custom call, or kind of a fusion; for convolutions with types and layout."""
    op_name: str
    loops: tuple[str, ...]
    """Names of the enclosing while loops, the outermost first."""

    @property
    def bytes(self) -> int:
        """HBM traffic per run."""
        return self.read + self.written


class Loop(NamedTuple):
    """A while loop."""

    name: str
    trip_count: int | None
    """Number of iterations; None if unknown to the compiler: the host then reads the condition each
    time."""
    runs: int
    """How often the loop is entered per call of the program."""
    carry: tuple[Shape, ...]
    part: Part
    op_name: str


class Collective(NamedTuple):
    """An exchange between devices."""

    name: str
    kind: str
    """One of `COLLECTIVES`."""
    bytes: int
    """Bytes that a device contributes to an all-reduce or reduce-scatter, or has after an
    all-gather."""
    runs: int
    part: Part
    position: float
    """Share of the program's kernels that are scheduled before it starts, 0 to 1."""
    finished: float
    """Share of the kernels that are scheduled before it ends, 0 to 1."""
    dtype: str
    loops: tuple[str, ...]


class Done(NamedTuple):
    """Point where asynchronous work has to be complete."""

    start: str
    """Name of the kernel that started it."""


class Totals(NamedTuple):
    """Sums over kernels, weighted by their number of runs."""

    kernels: int
    bytes: int
    flops: int


def bits(dtype: str) -> int:
    """Returns the size in bits of one number of an HLO type.

    Raises:
      ValueError: the type is unknown.
    """
    if dtype in _BITS:
        return _BITS[dtype]
    found = re.match(r"[a-z]+?(\d+)", dtype)
    if found is None:
        raise ValueError(f"unknown HLO type {dtype}")
    return int(found[1])


def total(kernels: Iterable[Kernel]) -> Totals:
    """Sums kernel runs, HBM bytes and FLOPs of one call."""
    sums = [(k.runs, k.runs * k.bytes, k.runs * k.flops) for k in kernels]
    return Totals(*map(sum, zip(*sums, strict=True))) if sums else Totals(0, 0, 0)


def by_part(kernels: Sequence[Kernel]) -> dict[Part, Totals]:
    """Returns `total` for each of `PARTS`."""
    return {part: total(k for k in kernels if k.part == part) for part in PARTS}


@dataclass(frozen=True)
class Module:
    """A compiled program."""

    computations: dict[str, dict[str, Instruction]]
    """Instructions by name, in the order of their schedule, by computation."""
    entry: str
    frames: dict[int, tuple[Frame, ...]]
    """Python stacks by `stack_frame_id`, the innermost frame first."""

    @cached_property
    def kernels(self) -> list[Kernel]:
        """All kernels, in the order of their schedule."""
        return [item for item in self.schedule if isinstance(item, Kernel)]

    @cached_property
    def loops(self) -> list[Loop]:
        """All while loops, outer ones first."""
        return [item for item in self.schedule if isinstance(item, Loop)]

    @cached_property
    def collectives(self) -> list[Collective]:
        """All collectives, in the order of their schedule."""
        starts, ends, before = {}, {}, 0
        for item in self.schedule:
            if isinstance(item, Kernel):
                starts[item.name] = before
                before += item.runs
                ends[item.name] = before
            elif isinstance(item, Done):
                ends[item.start] = before
        return [
            _collective(kernel, starts[kernel.name] / before, ends[kernel.name] / before)
            for kernel in self.kernels
            if kernel.kind == "collective"
        ]

    @property
    def copies(self) -> list[Kernel]:
        """Kernels that only move data: copies, transposes, layout changes."""
        return [kernel for kernel in self.kernels if kernel.kind == "copy"]

    @cached_property
    def total(self) -> Totals:
        """Totals over all kernels."""
        return total(self.kernels)

    @cached_property
    def schedule(self) -> "list[Kernel | Loop | Done]":
        """Kernels, loops before their contents, and the ends of asynchronous work, in order."""
        return list(_walk(self, self.entry, runs=1, loops=()))

    def stack(self, instruction: Instruction) -> tuple[Frame, ...]:
        """Returns the Python stack of an instruction; a fusion may use its root's or another's."""
        number = instruction.attribute(r"stack_frame_id=(\d+)")
        if number:
            return self.frames.get(int(number), ())
        file = instruction.attribute(r'source_file="([^"]*)"')
        if file:
            return (Frame(file, ""),)
        inner = self.computations.get(instruction.called or "", {}) if instruction.called else {}
        ordered = sorted(inner.values(), key=lambda found: not found.is_root)
        for found in ordered:
            if found.op not in ("parameter", "constant") and (stack := self.stack(found)):
                return stack
        return ()


def parse(text: str) -> Module:
    """Parses the text of a scheduled HLO module.

    Raises:
      ValueError: it has no entry computation.
    """
    computations: dict[str, dict[str, Instruction]] = {}
    entry, current = None, None
    lines = text.splitlines()
    for line in lines:
        if current is None:
            if (header := _COMPUTATION.match(line)) and not line.startswith(" "):
                current = computations.setdefault(header[2], {})
                entry = header[2] if header[1] else entry
        elif line.startswith("}"):
            current = None
        elif found := _INSTRUCTION.match(line):
            instruction = _instruction(found[2], found[3], is_root=bool(found[1]))
            current[instruction.name] = instruction
    if entry is None:
        raise ValueError("not an HLO module: it has no ENTRY computation")
    return Module(computations, entry, _frames(lines))


def _instruction(name: str, rest: str, *, is_root: bool) -> Instruction:
    """Parses `TYPE op(operands), attributes`."""
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    kind, rest = rest[:end], rest[end:].lstrip()
    opening = rest.index("(")
    closing = _closing(rest, opening)
    arguments = rest[opening + 1 : closing]
    operands = tuple(_OPERAND.findall(arguments))
    attributes = rest[closing + 1 :]
    op, results = rest[:opening], shapes(kind)
    if op == "fusion-start":  # a kernel like other fusions; its type is (operands, result, u32[])
        op, results = "fusion", results[len(operands) : -1]
    return Instruction(name, op, results, operands, attributes, is_root, arguments)


def _closing(text: str, begin: int) -> int:
    """Returns the index of the parenthesis that closes the one at `begin`."""
    depth = 0
    for found in re.finditer(r"[()]", text[begin:]):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return begin + found.start()
    raise ValueError(f"unbalanced parentheses: {text[:100]}")


def shapes(text: str) -> tuple[Shape, ...]:
    """Returns all arrays in a type as HLO prints it."""
    return tuple(
        Shape(dtype, tuple(int(n) for n in dims.split(",") if n), layout)
        for dtype, dims, layout in _SHAPE.findall(text)
    )


def _frames(lines: Sequence[str]) -> dict[int, tuple[Frame, ...]]:
    """Parses the tables at the top of a module: files, functions, locations, and frames."""
    tables: dict[str, dict[int, str]] = defaultdict(dict)
    section = ""
    for line in lines:
        if line.startswith(("%", "ENTRY")):
            break
        if line in ("FileNames", "FunctionNames", "FileLocations", "StackFrames"):
            section = line
        elif section and (found := re.match(r"^(\d+) (.*)$", line)):
            tables[section][int(found[1])] = found[2].strip('"')

    def numbers(text: str) -> dict[str, int]:
        return {name: int(value) for name, value in re.findall(r"(\w+)=(\d+)", text)}

    places = {i: numbers(text) for i, text in tables["FileLocations"].items()}
    stacks = {i: numbers(text) for i, text in tables["StackFrames"].items()}
    parents = {i: stack.get("parent_frame_id", 0) for i, stack in stacks.items()}
    # XLA prints the parent's number plus one, so even the outermost frame seems to have one.
    shift = 0 if 0 in parents.values() else 1

    def frame(number: int) -> Frame:
        place = places.get(stacks[number].get("file_location_id", 0), {})
        file = tables["FileNames"].get(place.get("file_name_id", 0), "")
        return Frame(file, tables["FunctionNames"].get(place.get("function_name_id", 0), ""))

    def chain(number: int) -> tuple[Frame, ...]:
        found: dict[int, Frame] = {}
        while number in stacks and number not in found:
            found[number] = frame(number)
            number = parents[number] - shift
        return tuple(found.values())

    return {number: chain(number) for number in stacks}


def _walk(
    module: Module, computation: str, *, runs: int, loops: tuple[str, ...]
) -> "Iterator[Kernel | Loop | Done]":
    """Walks through a computation and what it calls."""
    known = module.computations[computation]
    for found in known.values():
        if found.op in _FREE:
            continue
        if found.op.endswith("-done"):
            yield Done(found.operands[0])
        elif found.op == "while":
            trips = found.attribute(r'known_trip_count":\{"n":"(\d+)"')
            count = int(trips) if trips else None
            part = _part(module, found, "other")
            op_name = found.attribute(r'op_name="([^"]*)"') or ""
            yield Loop(found.name, count, runs, found.shapes, part, op_name)
            body = found.attribute(r"body=%?([\w.\-]+)") or ""
            inside = {"runs": runs * (count or 1), "loops": (*loops, found.name)}
            yield from _walk(module, body, **inside)
        elif found.op == "conditional":
            yield from _largest_branch(module, found, runs=runs, loops=loops)
        elif found.called and (found.op == "call" or _is_asynchronous_call(module, found)):
            yield from _walk(module, found.called, runs=runs, loops=loops)
        else:
            yield _kernel(module, known, found, runs=runs, loops=loops)


def _is_asynchronous_call(module: Module, found: Instruction) -> bool:
    """Returns whether an instruction starts kernels on another stream and is not a collective."""
    return found.op == "async-start" and _kind(module, found)[0] != "collective"


def _largest_branch(
    module: Module, instruction: Instruction, *, runs: int, loops: tuple[str, ...]
) -> "list[Kernel | Loop | Done]":
    """Returns the contents of the most expensive branch of a conditional."""
    listed = instruction.attribute(r"branch_computations=\{([^}]*)\}")
    pair = re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", instruction.attributes)
    names = re.findall(r"[\w.\-]+", listed) if listed else pair
    branches = [list(_walk(module, name, runs=runs, loops=loops)) for name in names]
    return max(branches, key=lambda b: total(k for k in b if isinstance(k, Kernel)).bytes)


def _kernel(
    module: Module,
    known: dict[str, Instruction],
    found: Instruction,
    *,
    runs: int,
    loops: tuple[str, ...],
) -> Kernel:
    kind, detail = _kind(module, found)
    read, written = _traffic(module, known, found, kind)
    flops, dtype = _flops(module, known, found)
    return Kernel(
        name=found.name,
        kind=kind,
        part=_part(module, found, kind, known),
        runs=runs,
        read=read,
        written=written,
        flops=flops,
        dtype=dtype or max(found.shapes, key=lambda shape: shape.bytes).dtype,
        detail=detail,
        op_name=found.attribute(r'op_name="([^"]*)"') or "",
        loops=loops,
    )


def _kind(module: Module, found: Instruction) -> tuple[Kind, str]:
    """Returns a kernel's kind, and the compiler's own name for it."""
    base = found.op.removesuffix("-start")
    inner = list(_inside(module, found.called)) if found.called else []
    if base == "async":
        base = next((x.op for x in inner if x.op in COLLECTIVES), base)
    if base in COLLECTIVES:
        return "collective", base
    if base in ("copy", "transpose"):
        return "copy", base
    if found.op == "custom-call":
        return _custom_kind(found)
    if found.op == "fusion":
        label = found.attribute(r'"kind":"(__\w+)"') or re.sub(r"[.\d]+$", "", found.name)
        if any(x.op == "dot" for x in inner):
            return "gemm", label
        calls = [x for x in inner if x.op == "custom-call"]
        if calls:
            return _custom_kind(calls[0])
        return ("copy" if {x.op for x in inner} <= _PURE_COPIES else "fusion"), label
    return ("gemm" if found.op == "dot" else "other"), found.op


def _custom_kind(call: Instruction) -> tuple[Kind, str]:
    target = call.attribute(r'custom_call_target="([^"]*)"') or ""
    if "__cudnn$conv" in target:
        labels = call.attribute(r"dim_labels=([\w?>\-]+)") or ""
        return "convolution", f"{target} {call.shapes[0].dtype} {labels} {call.shapes[0].layout}"
    if "fmha" in target:
        return "attention", target
    if "cublas" in target or "gemm" in target.lower():
        return "gemm", target
    return "other", target


def _inside(module: Module, computation: str | None) -> Iterator[Instruction]:
    """Yields all instructions of a fused computation, including nested ones."""
    for found in module.computations.get(computation or "", {}).values():
        yield found
        if found.op == "fusion":
            yield from _inside(module, found.called)


def _traffic(
    module: Module, known: dict[str, Instruction], found: Instruction, kind: Kind
) -> tuple[int, int]:
    """Returns the bytes read and written per run."""
    if found.op == "fusion" and found.called:
        inner = module.computations[found.called]
        given = [x for x in inner.values() if x.op == "parameter"]
        read = sum(_read(module, found.called, x) for x in given)
        return read, sum(_written(inner, x) for x in _roots(inner))
    operands = [known[name].bytes for name in found.operands if name in known]
    if kind == "collective":
        # Some kinds of asynchronous starts list their operands among their results.
        result = found.bytes - sum(operands) if _lists_operands(found, operands) else found.bytes
        return sum(operands), result
    if found.op in _SLICES:
        return found.bytes, found.bytes
    if found.op in _UPDATES:
        update = operands[-1] if found.op == "scatter" else operands[1]
        return update, update
    if found.op == "copy-start":
        return operands[0], operands[0]
    return sum(operands), found.bytes - _workspace(found)


def _workspace(found: Instruction) -> int:
    """Returns the size of the scratch memory that a library call lists as its last result."""
    if found.op != "custom-call" or len(found.shapes) < 2:
        return 0
    last = found.shapes[-1]
    return last.bytes if last.dtype in ("s8", "u8") and len(last.dims) == 1 else 0


def _lists_operands(found: Instruction, operands: list[int]) -> bool:
    several = len(found.shapes) >= 2 * len(operands)
    return found.op.endswith("-start") and several and found.op != "all-reduce-start"


def _roots(inner: dict[str, Instruction]) -> list[Instruction]:
    root = next(x for x in inner.values() if x.is_root)
    return [inner[name] for name in root.operands] if root.op == "tuple" else [root]


def _written(inner: dict[str, Instruction], root: Instruction) -> int:
    """Returns the bytes that a result of a fusion writes: for an update in place, the update's."""
    found = root
    while found.op in (*_VIEWS, "convert") and found.operands:
        found = inner[found.operands[0]]
    if found.op in _UPDATES:
        place = -1 if found.op == "scatter" else 1
        return inner[found.operands[place]].bytes
    return root.bytes


def _read(module: Module, computation: str, parameter: Instruction) -> int:
    """Returns the bytes that a fusion reads of an operand: all, or only slices."""
    taken: dict[tuple[object, ...], int] = {}
    for user, name in _uses(module, computation, parameter.name):
        if user.op in _SLICES and user.operands[0] == name:
            which = user.attribute(r"slice=(\{[^}]*\})")
            taken[user.op, user.operands[1:], user.shapes, which] = user.bytes
        elif not (user.op in _UPDATES and user.operands[0] == name):
            return parameter.bytes
    return min(parameter.bytes, sum(taken.values()))


def _uses(module: Module, computation: str, name: str) -> Iterator[tuple[Instruction, str]]:
    """Yields the users of a value, and its name there; looks through views and nested fusions."""
    for user in module.computations[computation].values():
        for place, operand in enumerate(user.operands):
            if operand != name:
                continue
            if user.op in _VIEWS and not user.is_root:
                yield from _uses(module, computation, user.name)
            elif user.op == "fusion" and user.called:
                inner = module.computations[user.called].values()
                numbered = (x for x in inner if x.op == "parameter" and x.arguments == str(place))
                for parameter in numbered:
                    yield from _uses(module, user.called, parameter.name)
            else:
                yield user, name


def _flops(
    module: Module, known: dict[str, Instruction], found: Instruction
) -> tuple[int, str | None]:
    """Returns the FLOPs of a kernel's products, and the type of their operands."""
    if found.op == "custom-call":
        return _custom_flops(known, found)
    if found.op == "dot":
        return _dot_flops(known, found)
    if found.op != "fusion" or not found.called:
        return 0, None
    flops, dtype = 0, None
    inner = module.computations[found.called]
    for x in inner.values():
        more, of_more = _flops(module, inner, x)
        flops, dtype = flops + more, dtype or of_more
    return flops, dtype


def _dot_flops(known: dict[str, Instruction], dot: Instruction) -> tuple[int, str]:
    left = known[dot.operands[0]].shapes[0]
    axes = dot.attribute(r"lhs_contracting_dims=\{([\d,]*)\}") or ""
    contracted = math.prod(left.dims[int(axis)] for axis in axes.split(",") if axis)
    return 2 * math.prod(dot.shapes[0].dims) * contracted, left.dtype


def _custom_flops(known: dict[str, Instruction], call: Instruction) -> tuple[int, str | None]:
    target = call.attribute(r'custom_call_target="([^"]*)"') or ""
    given = [known[name].shapes[0] for name in call.operands if known[name].shapes]
    if "__cudnn$conv" in target:
        return _convolution_flops(call, given, target), given[0].dtype
    if "fmha" in target:
        # (B, T, heads, width) queries and (B, S, heads, width) keys: two products forward, five
        # backward, which recompute the scores.
        products = 5 if "Backward" in target else 2
        return 2 * products * math.prod(given[0].dims) * given[1].dims[1], given[0].dtype
    if "cublas" in target:
        axes = call.attribute(r'"lhs_contracting_dimensions":\[([^\]]*)\]') or ""
        contracted = math.prod(given[0].dims[int(n)] for n in re.findall(r"\d+", axes))
        return 2 * math.prod(call.shapes[0].dims) * contracted, given[0].dtype
    return 0, None


def _convolution_flops(call: Instruction, given: list[Shape], target: str) -> int:
    """Returns 2 x output positions x window x channels of a group.

    dim_labels name the axes of (input, kernel -> output), whichever of them is the result.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", call.attributes)
    if labels is None:
        return 0
    result = call.shapes[0]
    if "BackwardInput" in target:
        output, kernel = given[0], given[1]
    elif "BackwardFilter" in target:
        output, kernel = given[1], result
    else:
        output, kernel = result, given[1]
    features = kernel.dims[labels[2].index("o")]
    return 2 * math.prod(output.dims) * math.prod(kernel.dims) // features


def _part(
    module: Module, found: Instruction, kind: Kind, known: dict[str, Instruction] | None = None
) -> Part:
    """Assigns an instruction to a part of the train step, by the files in its Python stack."""
    origin = _origin(module, found, known or {})
    files = [frame.file.replace("\\", "/") for frame in module.stack(origin)]
    scope = origin.attribute(r'op_name="([^"]*)"') or ""
    product = kind in ("convolution", "gemm", "attention")

    def traced_in(folder: str) -> bool:
        return any(f"arcface_jax/{folder}/" in file for file in files)

    if traced_in("heads") or scope.startswith(("state.centers", "centers")):
        return "head"
    if traced_in("models") or "jvp(" in scope or kind == "convolution":
        return "convolutions" if product else "batch_norm_elementwise"
    if traced_in("training") or scope.startswith(("jit(step)/", "state.")):
        return "optimizer"
    return "other"


def _origin(module: Module, found: Instruction, known: dict[str, Instruction]) -> Instruction:
    """Returns the instruction, or without a Python stack the origin of its first operand."""
    start = found
    for _ in range(8):  # compiler-made chains of copies and slices are short
        if module.stack(found) or "op_name=" in found.attributes:
            return found
        operand = next((known[name] for name in found.operands if name in known), None)
        if operand is None:
            break
        found = operand
    return start


def _collective(kernel: Kernel, position: float, finished: float) -> Collective:
    gathers = kernel.detail in ("all-gather", "collective-broadcast")
    return Collective(
        name=kernel.name,
        kind=kernel.detail,
        bytes=kernel.written if gathers else kernel.read,
        runs=kernel.runs,
        part=kernel.part,
        position=position,
        finished=finished,
        dtype=kernel.dtype,
        loops=kernel.loops,
    )


def count_collectives(collectives: Sequence[Collective]) -> dict[str, tuple[int, int]]:
    """Returns (number, bytes) in one call of the program, by kind."""
    number: Counter[str] = Counter()
    size: Counter[str] = Counter()
    for found in collectives:
        number[found.kind] += found.runs
        size[found.kind] += found.runs * found.bytes
    return {kind: (number[kind], size[kind]) for kind in number}
