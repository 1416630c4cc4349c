"""A pickle reader that calls nothing: for checkpoints from strangers.

It runs pickle's stack machine over what `pickletools` parses, and knows a handful of classes by
name. Every other class becomes an `Inert` object, and classes and functions that could only be
there to do harm are refused by name. Nothing is imported, called or hashed on the file's behalf:
dicts keep str keys only and sets become lists, for hashing chosen keys can take for ever.
"""

import dataclasses
import io
import pickletools
import warnings
from collections.abc import Callable
from typing import Any

# A checkpoint's pickle holds names and sizes, not tensors: 100 kB for 455M parameters with
# optimizer state. Objects in memory take up to a hundred times the pickle's size.
MAX_BYTES = 4 * 2**20

HARMLESS_BUILTINS = {
    *("bool", "bytearray", "bytes", "complex", "dict", "float", "frozenset", "int", "list"),
    *("object", "range", "set", "slice", "str", "tuple", "type"),
}
HARMFUL_MODULES = {
    *("__builtin__", "_io", "_pickle", "_posixsubprocess", "_socket", "_thread", "_winapi"),
    *("aiohttp", "asyncio", "bdb", "builtins", "cProfile", "cffi", "cloudpickle", "code", "codeop"),
    *("commands", "ctypes", "dill", "distutils", "ftplib", "http", "importlib", "inspect", "io"),
    *("joblib", "linecache", "marshal", "mmap", "multiprocessing", "nt", "operator", "os", "pdb"),
    *(
        "pickle",
        "pip",
        "pkgutil",
        "popen2",
        "posix",
        "profile",
        "pty",
        "pydoc",
        "requests",
        "runpy",
    ),
    *("setuptools", "shelve", "shutil", "signal", "smtplib", "socket", "socketserver", "ssl"),
    *("subprocess", "sys", "threading", "timeit", "trace", "types", "urllib", "urllib2"),
    *("webbrowser", "xmlrpc", "zipimport"),
}


@dataclasses.dataclass(frozen=True)
class Global:
    """A class or function that a pickle names; never imported."""

    module: str
    name: str

    def __str__(self):
        return f"{self.module}.{self.name}"


class Inert:
    """Stands for an object of a class that we do not know; has no content."""


def read_pickle(
    data: bytes,
    *,
    constructors: dict[str, Callable[..., Any]],
    persistent_load: Callable[[Any], Any],
) -> Any:
    """The object in `data`, made of None, numbers, str, bytes, lists, tuples, dicts and Inert.

    `constructors` maps "module.name" to a function of ours that takes the pickled arguments;
    `persistent_load` gets the pickle's persistent ids (PyTorch: the storages).

    Raises:
      ValueError: a damaged or too large pickle, or one that names something harmful.
    """
    if len(data) > MAX_BYTES:
        raise ValueError(f"its pickle has {len(data)} bytes; a checkpoint needs far fewer")
    machine = _Machine(constructors, persistent_load)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd escapes in strings
            for opcode, arg, _ in pickletools.genops(io.BytesIO(data)):
                machine.step(opcode.name, arg)
        return machine.stack.pop()
    except (AssertionError, IndexError, KeyError, OverflowError, TypeError) as error:
        raise ValueError(f"its pickle is damaged ({type(error).__name__})") from None


def refuse_harmful(module: str, name: str) -> None:
    """Raises ValueError if a pickle that names this class or function is an attack."""
    if module in ("builtins", "__builtin__") and name in HARMLESS_BUILTINS:
        return
    if module.split(".")[0] in HARMFUL_MODULES:
        raise ValueError(f"refused: its pickle names {ascii(f'{module}.{name}')[1:100]:.98}")


_VALUES = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_LITERALS = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
    *("BYTEARRAY8", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
}


class _Machine:
    """Pickle's stack machine; the opcodes are described in `pickletools`."""

    def __init__(self, constructors, persistent_load):
        self.stack = []
        self.marked = []  # the stacks below each mark
        self.memo = {}
        self.constructors = constructors
        self.persistent_load = persistent_load

    def step(self, opcode: str, arg: Any) -> None:
        stack = self.stack
        match opcode:
            case "PROTO" | "FRAME" | "STOP":
                pass
            case _ if opcode in _LITERALS:
                stack.append(arg)
            case _ if opcode in _VALUES:
                stack.append(_VALUES[opcode])
            case "EMPTY_LIST" | "EMPTY_SET":
                stack.append([])
            case "EMPTY_DICT":
                stack.append({})
            case "MARK":
                self.marked.append(stack)
                self.stack = []
            case "POP":
                stack.pop()
            case "POP_MARK":
                self._pop_mark()
            case "DUP":
                stack.append(stack[-1])
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                self.memo[arg] = stack[-1]
            case "MEMOIZE":
                self.memo[len(self.memo)] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(self.memo[arg])
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                size = int(opcode[-1])
                stack[-size:] = [tuple(stack[-size:])]
            case "TUPLE":
                self._push(tuple(self._pop_mark()))
            case "LIST" | "FROZENSET":
                self._push(self._pop_mark())
            case "DICT":
                items = self._pop_mark()
                self._push({})
                self._set_items(items)
            case "APPEND":
                self._extend([stack.pop()])
            case "APPENDS" | "ADDITEMS":
                self._extend(self._pop_mark())
            case "SETITEM":
                items = stack[-2:]
                del stack[-2:]
                self._set_items(items)
            case "SETITEMS":
                self._set_items(self._pop_mark())
            case "GLOBAL":
                self._push_global(*arg.split(" ", 1))
            case "STACK_GLOBAL":
                name, module = stack.pop(), stack.pop()
                self._push_global(module, name)
            case "INST":
                args = self._pop_mark()
                self._push_global(*arg.split(" ", 1))
                self._construct(self.stack.pop(), args)
            case "OBJ":
                function, *args = self._pop_mark()
                self._construct(function, args)
            case "REDUCE" | "NEWOBJ":
                args = stack.pop()
                self._construct(stack.pop(), args)
            case "NEWOBJ_EX":
                stack.pop()  # keyword arguments: no constructor of ours takes any
                args = stack.pop()
                self._construct(stack.pop(), args)
            case "BUILD":
                stack.pop()  # attributes of the object below, of which we keep none
            case "PERSID":
                stack.append(self.persistent_load(arg))
            case "BINPERSID":
                stack.append(self.persistent_load(stack.pop()))
            case _:
                raise ValueError(f"its pickle uses {opcode}, which no checkpoint does")

    def _push(self, value):
        self.stack.append(value)

    def _pop_mark(self):
        items = self.stack
        self.stack = self.marked.pop()
        return items

    def _push_global(self, module, name):
        if not (isinstance(module, str) and isinstance(name, str)):
            raise TypeError("a global needs two names")
        refuse_harmful(module, name)
        self.stack.append(Global(module, name))

    def _construct(self, function, args):
        make = self.constructors.get(str(function)) if isinstance(function, Global) else None
        self.stack.append(Inert() if make is None else make(*args))

    def _extend(self, items):
        if isinstance(self.stack[-1], list):
            self.stack[-1].extend(items)

    def _set_items(self, items):
        if isinstance(self.stack[-1], dict):
            pairs = zip(items[0::2], items[1::2], strict=True)
            self.stack[-1].update((key, value) for key, value in pairs if type(key) is str)
