"""Read a pickle without running it.

Python's unpickler calls whatever a file names. This interpreter of the pickle format builds plain
values, lists, tuples and dicts; any other object is passed by name to `make`, which may build it,
and is otherwise kept as a `Skipped`. Nothing that a file names is imported.
"""

import mmap
import pickletools
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import IO, Any, cast

# More than ten times as many as the largest network with its optimizer needs.
_MOST_OPERATIONS = 10_000_000


class DamagedPickleError(ValueError):
    """Raised for bytes that are not a pickle, or a truncated or malformed one."""


@dataclass(frozen=True)
class Global:
    """A function or class that a pickle names."""

    name: str


@dataclass(eq=False)
class Skipped:
    """An object that was not built: its class, and its plain parts."""

    name: str
    state: object = None
    items: dict[Any, Any] = field(default_factory=dict)


Make = Callable[[str, tuple[Any, ...]], object]
"""(name of a function or class, its arguments) -> an object; NotImplemented to skip it."""


def skip_all(name: str, arguments: tuple[Any, ...]) -> object:
    """Returns a `Make` that builds nothing."""
    del name, arguments
    return NotImplemented


def load(
    file: IO[bytes] | mmap.mmap,
    *,
    make: Make = skip_all,
    persistent: Callable[[object], object] | None = None,
) -> Any:
    """Reads one pickle, from the file's position to just after it.

    Args:
      file: open for reading in binary.
      make: builds an object that the pickle would build by a call.
      persistent: turns a persistent id, which torch uses for storages, into an object.

    Raises:
      DamagedPickleError: it is not a complete pickle.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # pickletools, on damaged text
            return _run(_Machine(make, persistent), file)
    except DamagedPickleError:
        raise
    except (ValueError, TypeError, LookupError, OverflowError, AttributeError) as error:
        reason = str(error).splitlines()[0] if str(error) else "cut short"
        raise DamagedPickleError(reason) from error


def _run(machine: "_Machine", file: IO[bytes] | mmap.mmap) -> Any:
    for count, (operation, argument, _) in enumerate(pickletools.genops(cast("IO[bytes]", file))):
        if count > _MOST_OPERATIONS:
            raise DamagedPickleError(f"a pickle of more than {_MOST_OPERATIONS:,} operations")
        if operation.name == "STOP":
            return machine.pop()
        machine.run(operation.name, argument)
    raise DamagedPickleError("no end")


_MARK = object()
_CONSTANTS = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
    *("BYTEARRAY8", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
}
_VALUES: dict[str, Callable[[], object]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "EMPTY_DICT": dict,
    "EMPTY_SET": list,
    "MARK": lambda: _MARK,
}
_NOTHING = frozenset(("PROTO", "FRAME"))
# Types whose hash is cheap, to be keys of a dict; hashing nested tuples may take hours.
_KEYS = (str, int, float, bytes, type(None))


class _Machine:
    """Stack and memo, and the effect of each operation on them."""

    def __init__(self, make: Make, persistent: Callable[[object], object] | None):
        self._make, self._persistent = make, persistent
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def pop(self) -> Any:
        """Returns the top object; a mark does not count."""
        top = self._stack.pop()
        if top is _MARK:
            raise DamagedPickleError("a mark where an object is expected")
        return top

    def run(self, name: str, argument: Any) -> None:
        """Executes one operation."""
        if name in _CONSTANTS:
            self._stack.append(argument)
        elif name in _VALUES:
            self._stack.append(_VALUES[name]())
        elif name not in _NOTHING:
            operation = getattr(self, f"_{name.lower()}", None)
            if operation is None:
                raise DamagedPickleError(f"the operation {name} has no place in a file of weights")
            operation(argument)

    def _to_mark(self) -> list[Any]:
        for start in range(len(self._stack) - 1, -1, -1):
            if self._stack[start] is _MARK:
                found = self._stack[start + 1 :]
                del self._stack[start:]
                return found
        raise DamagedPickleError("an end without a beginning")

    def _top(self) -> Any:
        top = self._stack[-1]
        if top is _MARK:
            raise DamagedPickleError("a mark where an object is expected")
        return top

    def _pop(self, _: object) -> None:
        self._stack.pop()

    def _pop_mark(self, _: object) -> None:
        self._to_mark()

    def _dup(self, _: object) -> None:
        self._stack.append(self._top())

    def _put(self, index: int) -> None:
        self._memo[index] = self._top()

    _binput = _long_binput = _put

    def _memoize(self, _: object) -> None:
        self._memo[len(self._memo)] = self._top()

    def _get(self, index: int) -> None:
        self._stack.append(self._memo[index])

    _binget = _long_binget = _get

    def _tuple(self, _: object) -> None:
        self._stack.append(tuple(self._to_mark()))

    _frozenset = _tuple

    def _tuple1(self, _: object) -> None:
        self._stack.append((self.pop(),))

    def _tuple2(self, _: object) -> None:
        second, first = self.pop(), self.pop()
        self._stack.append((first, second))

    def _tuple3(self, _: object) -> None:
        third, second, first = self.pop(), self.pop(), self.pop()
        self._stack.append((first, second, third))

    def _list(self, _: object) -> None:
        self._stack.append(self._to_mark())

    def _append(self, _: object) -> None:
        self._extend([self.pop()])

    def _appends(self, _: object) -> None:
        self._extend(self._to_mark())

    _additems = _appends

    def _extend(self, more: list[Any]) -> None:
        top = self._top()
        if isinstance(top, list):
            top.extend(more)
        elif not isinstance(top, Skipped):
            raise DamagedPickleError("items for something that is not a list")

    def _dict(self, _: object) -> None:
        items = self._to_mark()
        self._stack.append({})
        self._set(items)

    def _setitem(self, _: object) -> None:
        value, key = self.pop(), self.pop()
        self._set([key, value])

    def _setitems(self, _: object) -> None:
        self._set(self._to_mark())

    def _set(self, items: list[Any]) -> None:
        top = self._top()
        target = top.items if isinstance(top, Skipped) else top
        if not isinstance(target, dict) or len(items) % 2:
            raise DamagedPickleError("keys and values for something that is not a dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if isinstance(key, _KEYS):
                target[key] = value

    def _global(self, both: str) -> None:
        module, _, name = both.partition(" ")
        self._stack.append(Global(f"{module}.{name}"))

    def _stack_global(self, _: object) -> None:
        name, module = self.pop(), self.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise DamagedPickleError("a class name that is not text")
        self._stack.append(Global(f"{module}.{name}"))

    def _call(self, function: object, arguments: object) -> None:
        if not isinstance(arguments, tuple):
            raise DamagedPickleError("arguments that are not a tuple")
        name = getattr(function, "name", type(function).__name__)
        made = self._make(name, arguments) if isinstance(function, Global) else NotImplemented
        self._stack.append(Skipped(str(name)) if made is NotImplemented else made)

    def _reduce(self, _: object) -> None:
        arguments, function = self.pop(), self.pop()
        self._call(function, arguments)

    _newobj = _reduce

    def _newobj_ex(self, _: object) -> None:
        self.pop()
        self._reduce(None)

    def _obj(self, _: object) -> None:
        function, *arguments = self._to_mark()
        self._call(function, tuple(arguments))

    def _inst(self, both: str) -> None:
        arguments = tuple(self._to_mark())
        self._global(both)
        self._call(self.pop(), arguments)

    def _build(self, _: object) -> None:
        state, top = self.pop(), self._top()
        if isinstance(top, Skipped):
            top.state = state

    def _persid(self, identity: object) -> None:
        if self._persistent is None:
            raise DamagedPickleError("a reference to data outside the pickle")
        self._stack.append(self._persistent(identity))

    def _binpersid(self, _: object) -> None:
        self._persid(self.pop())
