"""Reads the objects of a pickle. Nothing that the pickle names is imported or called."""

import abc
import dataclasses
import pickletools
from collections.abc import Callable, Mapping
from typing import IO, Any, Protocol, cast

# A full optimizer state of a network with ten thousand tensors has about a million opcodes. What
# one opcode makes has a hundred bytes or so, apart from text, which the pickle's length bounds.
MAX_OPCODES = 5_000_000
# What all calls together may be given, in characters and list entries: an object that was stored
# once can be given to any number of calls, which may each copy it.
MAX_CALL_WORK = 2**30
_MAX_GLOBAL_NAME = 1000


@dataclasses.dataclass(frozen=True, slots=True)
class Global:
    """A class or function that a pickle names: the name alone.

    Attributes:
      name: with its module, such as "torch.FloatStorage".
    """

    name: str


@dataclasses.dataclass(frozen=True, slots=True)
class Inert:
    """Stands for what calling an unknown class or function would give; holds nothing of it.

    Attributes:
      name: of the class or function.
    """

    name: str


class Stateful(abc.ABC):
    """What a pickle may give a state after making it (its BUILD opcode)."""

    __slots__ = ()

    @abc.abstractmethod
    def set_state(self, state: Any) -> None:
        """Takes over the state.

        Raises:
          ValueError: if it is none for this object.
        """


class Stream(Protocol):
    """Bytes to read: a BytesIO or an mmap. Of both, `read(n)` allocates no more than is there."""

    def read(self, n: int, /) -> bytes: ...
    def readline(self) -> bytes: ...
    def tell(self) -> int: ...


# A builder takes a call's arguments and raises ValueError if they are none for it. Whatever it
# returns must be harmless, and it must not do work that the length of its arguments doesn't bound.
Builder = Callable[[tuple[Any, ...]], Any]


def load(
    stream: Stream,
    builders: Mapping[str, Builder],
    persistent: Callable[[Any], Any],
) -> Any:
    """The object of one pickle, which ends where the stream then stands.

    Sets become lists, dictionaries keep the entries whose key is a string, and calls give what
    `builders` makes of them, or an `Inert`. Time and memory are bounded by the pickle's length.

    Args:
      stream: stands at the pickle's beginning.
      builders: by name of the class or function that the pickle calls.
      persistent: gives the object of a persistent id.

    Raises:
      ValueError: if the pickle is damaged, too long, or uses what `torch.save` never writes.

    Example:
      >>> import io, os, pickle
      >>> data = pickle.dumps({"epoch": 3, "run": os.system}, protocol=2)
      >>> load(io.BytesIO(data), {}, persistent=lambda identity: None)["epoch"]
      3
    """
    machine = _Machine(builders, persistent)
    for _ in range(MAX_OPCODES):
        position = stream.tell()
        try:
            name, argument = _next(stream)
            if name == "STOP":
                return machine.pop()
            machine.execute(name, argument)
        except ValueError as error:
            raise ValueError(f"has a damaged pickle (byte {position}): {error}") from error
    raise ValueError(f"has a pickle of more than {MAX_OPCODES} opcodes")


def _next(stream: Stream) -> tuple[str, Any]:
    code = stream.read(1)
    if not code:
        raise ValueError("it ends before its last opcode")
    opcode = _OPCODES.get(code)
    if opcode is None:
        raise ValueError(f"it has the opcode {code!r}, which torch.save never writes")
    if opcode.name == "GLOBAL":  # whose reader would undo escapes, which pickle doesn't write
        return opcode.name, (_line(stream), _line(stream))
    return opcode.name, None if opcode.arg is None else opcode.arg.reader(cast(IO[bytes], stream))


def _line(stream: Stream) -> str:
    line = stream.readline()
    if not line.endswith(b"\n"):
        raise ValueError("it ends within a line")
    return line[:-1].decode()


class _Machine:
    """Executes opcodes as pickle does; `pickletools` says what each means."""

    def __init__(self, builders: Mapping[str, Builder], persistent: Callable[[Any], Any]) -> None:
        self._builders = builders
        self._persistent = persistent
        self._stack: list[Any] = []  # what came since the last mark
        self._below: list[list[Any]] = []  # what is under each mark
        self._memo: dict[int, Any] = {}
        self._call_work = 0

    def execute(self, name: str, argument: Any) -> None:
        match name:
            case "BINPUT" | "LONG_BINPUT":
                self._put(argument)
            case "MEMOIZE":
                self._put(len(self._memo))
            case "BINGET" | "LONG_BINGET":
                self._push(self._get(argument))
            case "MARK":
                self._below.append(self._stack)
                self._stack = []
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                items = [self.pop() for _ in range(int(name[-1]))]
                self._push(tuple(reversed(items)))
            case "TUPLE":
                self._push(tuple(self._pop_to_mark()))
            case "REDUCE" | "NEWOBJ":
                arguments = self.pop()
                self._push(self._call(self.pop(), arguments))
            case "BINPERSID":
                self._push(self._persistent(self.pop()))
            case "GLOBAL":
                self._push(_global(*argument))
            case "STACK_GLOBAL":
                qualified = self.pop()
                self._push(_global(self.pop(), qualified))
            case "APPEND":
                item = self.pop()
                _extend(self._top(), [item])
            case "APPENDS" | "ADDITEMS":
                items = self._pop_to_mark()
                _extend(self._top(), items)
            case "SETITEM":
                value = self.pop()
                key = self.pop()
                _set_items(self._top(), [key, value])
            case "SETITEMS":
                items = self._pop_to_mark()
                _set_items(self._top(), items)
            case "DICT":
                items = self._pop_to_mark()
                self._push({})
                _set_items(self._top(), items)
            case "LIST" | "FROZENSET":
                self._push(self._pop_to_mark())
            case "BUILD":
                state = self.pop()
                target = self._top()
                if isinstance(target, Stateful):
                    target.set_state(state)
            case "NEWOBJ_EX":
                del argument  # keywords: no builder has any
                self.pop()
                self.execute("NEWOBJ", None)
            case "OBJ":
                function, *arguments = self._pop_to_mark() or [None]
                self._push(self._call(function, tuple(arguments)))
            case "POP":
                if self._stack:
                    self.pop()
                else:
                    self._pop_to_mark()
            case "POP_MARK":
                self._pop_to_mark()
            case "DUP":
                self._push(self._top())
            case "PROTO" | "FRAME":
                pass
            case _ if name in _NEW:
                self._push(_NEW[name]())
            case _:  # numbers, text and bytes
                self._push(argument)

    def pop(self) -> Any:
        self._top()
        return self._stack.pop()

    def _top(self) -> Any:
        if not self._stack:
            raise ValueError("it takes an object where there is none")
        return self._stack[-1]

    def _push(self, item: Any) -> None:
        self._stack.append(item)

    def _pop_to_mark(self) -> list[Any]:
        if not self._below:
            raise ValueError("it goes back to a mark where there is none")
        items, self._stack = self._stack, self._below.pop()
        return items

    def _put(self, index: int) -> None:
        self._memo[index] = self._top()

    def _get(self, index: int) -> Any:
        if index not in self._memo:
            raise ValueError(f"it fetches object {index}, which it never stored")
        return self._memo[index]

    def _call(self, function: Any, arguments: Any) -> Any:
        if not isinstance(function, Global | Inert) or not isinstance(arguments, tuple):
            raise ValueError(f"it calls an object of type {type(function).__name__}")
        self._call_work += sum(len(x) for x in arguments if isinstance(x, str | bytes | list))
        if self._call_work > MAX_CALL_WORK:
            raise ValueError("it hands more to its calls than any checkpoint needs")
        build = self._builders.get(function.name) if isinstance(function, Global) else None
        return Inert(function.name) if build is None else build(arguments)


def _global(module: Any, name: Any) -> Global:
    if not (isinstance(module, str) and isinstance(name, str)):
        raise ValueError("it names a class or function by what is no text")
    if len(module) + len(name) > _MAX_GLOBAL_NAME:
        raise ValueError("it names a class or function by a text too long for that")
    return Global(f"{module}.{name}")


def _extend(target: Any, items: list[Any]) -> None:
    if isinstance(target, list):
        target.extend(items)
    elif not isinstance(target, Inert):
        raise ValueError(f"it appends to an object of type {type(target).__name__}")


def _set_items(target: Any, items: list[Any]) -> None:
    if len(items) % 2:
        raise ValueError("it has a key without a value")
    if isinstance(target, dict):
        # Only strings name tensors. Other keys could be slow to hash or to find: a tuple of tuples
        # that are shared, integers that collide.
        pairs = zip(items[::2], items[1::2], strict=True)
        target.update((key, value) for key, value in pairs if isinstance(key, str))
    elif not isinstance(target, Inert):
        raise ValueError(f"it sets an entry of an object of type {type(target).__name__}")


_NEW: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_SET": list,
}

_UNUSED = {
    # The text of protocol 0,
    *("INT", "LONG", "FLOAT", "STRING", "UNICODE", "GET", "PUT", "PERSID", "INST"),
    # the registry of extensions, and buffers outside the pickle.
    *("EXT1", "EXT2", "EXT4", "NEXT_BUFFER", "READONLY_BUFFER"),
}
_OPCODES = {
    opcode.code.encode("latin-1"): opcode
    for opcode in pickletools.opcodes
    if opcode.name not in _UNUSED
}
