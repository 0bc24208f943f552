"""Read torch pickles without executing them.

A pickle is a program for a stack machine that may call any function by name. This module interprets
its opcodes (`pickletools`), and implements the few names that occur in state dicts without copying
data, so that a small file cannot expand to gigabytes or nest deeply. The caller,
`minllama.checkpoints.torch_file`, provides the storages' bytes.
"""

import math
import pickletools
from collections.abc import Callable
from io import BytesIO
from typing import Any, NamedTuple

import torch
from torch import Tensor

MAX_BYTES = 2**24  # a state dict's pickle has names and shapes only: 200 bytes a tensor
MAX_OPCODES = 2**20  # some 30 a tensor

# Type of a storage by its name: `torch.FloatStorage`, `torch.cuda.FloatStorage`.
_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
    "UntypedStorage": torch.uint8,
    # Types of quantized tensors, which are refused by name.
    "QInt8Storage": torch.int8,
    "QUInt8Storage": torch.uint8,
    "QInt32Storage": torch.int32,
    "QUInt4x2Storage": torch.uint8,
    "QUInt2x4Storage": torch.uint8,
}
_OTHER_TENSORS = (
    "torch._utils._rebuild_sparse_tensor",
    "torch._utils._rebuild_qtensor",
    "torch._utils._rebuild_nested_tensor",
    "torch._utils._rebuild_meta_tensor_no_storage",
)
_CALLED = (
    "collections.OrderedDict",
    "collections.Counter",
    "builtins.set",
    "torch.Size",
    "torch.device",
    "torch.serialization._get_layout",
    "torch._utils._rebuild_tensor",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_tensor_v3",
    "torch._utils._rebuild_parameter",
    "torch._utils._rebuild_parameter_with_state",
    "torch._tensor._rebuild_from_type_v2",
    *_OTHER_TENSORS,
)
_TYPES = ("torch.Tensor", "torch.nn.parameter.Parameter")  # named beside a tensor, never called
# NumPy's scalars and arrays, which trainers store with the weights (a best loss, the state of a
# generator): they are skipped, and never constructed.
_NUMPY = {
    "numpy.dtype",
    "numpy.ndarray",
    *(
        f"numpy.{core}.{function}"
        for core in ("core", "_core")
        for function in ("multiarray.scalar", "multiarray._reconstruct", "numeric._frombuffer")
    ),
}
_ENCODE = "_codecs.encode"  # how protocol 2 encodes bytes


class RefusedPickle(Exception):
    """A pickle calls something else; the message is its name."""


class DamagedPickle(ValueError):
    """A pickle that `torch.save` cannot have written."""


class OtherTensor(NamedTuple):
    """A tensor that is not dense: sparse or quantized."""

    kind: str


class OtherValue(NamedTuple):
    """A value that is not part of a checkpoint: a NumPy number or array, bytes."""

    kind: str


class _Name(NamedTuple):
    """A function or type that a pickle names."""

    name: str


# Takes a storage's key, dtype and number of values; returns the values, (count,).
Storages = Callable[[Any, torch.dtype, int], Tensor]
_MARK = object()


def read_pickle(file: BytesIO, storages: Storages) -> Any:
    """The content of the pickle at the file's position: plain values, and tensors over storages.

    An OrderedDict or Counter becomes a dict, a set a list, a parameter a tensor; attributes are
    dropped, and NumPy's numbers and arrays only named. Keys other than strings and small integers
    are converted to strings.

    Raises:
        RefusedPickle: it names something that is not part of a state dict.
        ValueError: it is damaged, or too large for a state dict.
    """
    return _Machine(storages).run(file)


class _Machine:
    """The stack machine of pickles, as far as state dicts need it."""

    def __init__(self, storages: Storages) -> None:
        self.storages = storages
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.left = MAX_OPCODES

    def run(self, file: BytesIO) -> Any:
        try:
            for opcode, argument, _ in pickletools.genops(file):
                self.spend(1)
                if opcode.name == "STOP":
                    return self.pop()
                self.step(opcode.name, argument)
        except (IndexError, KeyError, TypeError, OverflowError, RuntimeError) as error:
            raise DamagedPickle(f"{type(error).__name__}: {error}") from error
        raise DamagedPickle("it does not end")

    def spend(self, count: int) -> None:
        self.left -= count
        if self.left < 0:
            raise DamagedPickle("it has more entries than a state dict")

    def pop(self) -> Any:
        value = self.stack.pop()
        if value is _MARK:
            raise DamagedPickle("a value is missing")
        return value

    def pop_mark(self) -> list[Any]:
        """Pop the items above the last mark, and the mark itself."""
        at = len(self.stack) - 1
        while self.stack[at] is not _MARK:
            at -= 1
            if at < 0:
                raise DamagedPickle("a mark is missing")
        items = self.stack[at + 1 :]
        del self.stack[at:]
        return items

    def step(self, name: str, argument: Any) -> None:
        stack = self.stack
        match name:
            case "PROTO" | "FRAME":
                pass
            case "MARK":
                stack.append(_MARK)
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[name])
            case "EMPTY_TUPLE":
                stack.append(())
            case "EMPTY_LIST" | "EMPTY_SET":
                stack.append([])
            case "EMPTY_DICT":
                stack.append({})
            case "PUT" | "BINPUT" | "LONG_BINPUT" | "MEMOIZE":
                self.memo[len(self.memo) if argument is None else _key(argument)] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(self.memo[argument])
            case "GLOBAL":
                stack.append(_named(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                attribute = _expect(self.pop(), str)
                stack.append(_named(_expect(self.pop(), str), attribute))
            case "REDUCE":
                arguments = _expect(self.pop(), tuple)
                stack.append(self.call(_expect(self.pop(), _Name).name, arguments))
            case "BUILD":  # attributes of a dict, such as `_metadata`
                self.pop()
                _expect(stack[-1], dict | OtherValue)
            case "BINPERSID":
                stack.append(self.storage(*_expect(self.pop(), tuple)))
            case "BYTEARRAY8":  # the data of a NumPy array
                stack.append(OtherValue("bytes"))
            case _ if argument is not None and _is_scalar(argument):
                stack.append(argument)
            case _:
                self.collect(name)

    def collect(self, name: str) -> None:
        """Opcodes that put values into tuples, lists and dicts."""
        stack = self.stack
        match name:
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                items = [self.pop() for _ in range(int(name[-1]))]
                stack.append(tuple(reversed(items)))
            case "TUPLE" | "LIST" | "FROZENSET":
                items = self.pop_mark()
                stack.append(tuple(items) if name == "TUPLE" else items)
            case "DICT":
                items = self.pop_mark()
                stack.append({})
                self.set_items(items)
            case "APPEND" | "APPENDS" | "ADDITEMS":
                items = [self.pop()] if name == "APPEND" else self.pop_mark()
                _expect(stack[-1], list).extend(items)
            case "SETITEM" | "SETITEMS":
                if name == "SETITEM":
                    value = self.pop()
                    self.set_items([self.pop(), value])
                else:
                    self.set_items(self.pop_mark())
            case _:
                raise DamagedPickle(f"its opcode {name} does not occur in a state dict")

    def set_items(self, items: list[Any]) -> None:
        target = _expect(self.stack[-1], dict)
        if len(items) % 2:
            raise DamagedPickle("a value is missing")
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[_key(key)] = value

    def call(self, name: str, arguments: tuple[Any, ...]) -> Any:
        """The value of a call in a pickle."""
        match name, arguments:
            case "collections.OrderedDict", ():
                return {}
            case "collections.OrderedDict", (list(pairs),):  # as Python 2 wrote it
                self.spend(len(pairs))
                return {_key(key): value for key, value in pairs}
            case "collections.Counter", (dict(counts),):
                return counts
            case "collections.Counter", ():
                return {}
            case "builtins.set", (list(items),):
                return items
            case "torch.Size", (tuple(sizes),):
                return sizes
            case (("torch.device" | "torch.serialization._get_layout"), (str(word), *_)):
                return word
            case "torch._utils._rebuild_parameter", (data, _, _):
                return data
            case "torch._utils._rebuild_parameter_with_state", (data, _, _, _):
                return data
            case "torch._tensor._rebuild_from_type_v2", (_Name(function), _Name(_), tuple(of), _):
                if not function.startswith("torch._utils._rebuild_"):
                    raise RefusedPickle(function)
                return self.call(function, of)
            case "torch._utils._rebuild_tensor_v3", (
                storage,
                offset,
                size,
                stride,
                _,
                _,
                dtype,
                *_,
            ):
                values = _expect(storage, Tensor).view(_expect(dtype, torch.dtype))
                return _tensor(values, offset, size, stride)
            case (
                ("torch._utils._rebuild_tensor" | "torch._utils._rebuild_tensor_v2"),
                (storage, offset, size, stride, *_),
            ):
                return _tensor(storage, offset, size, stride)
            case ("_codecs.encode", (str(), "latin1")):
                return OtherValue("bytes")
        if name == _ENCODE:
            raise RefusedPickle(name)
        if name in _NUMPY:
            return OtherValue(name)
        if name in _OTHER_TENSORS:
            return OtherTensor(name.rpartition("_rebuild_")[2])
        raise DamagedPickle(f"it calls {name} with other arguments than torch does")

    def storage(self, kind: Any, dtype: Any, key: Any, _: Any, count: Any, view: Any = None) -> Any:
        """The values of the storage with a persistent id."""
        if kind not in ("storage", b"storage") or type(count) is not int or not _is_scalar(key):
            raise DamagedPickle("a reference is not to a storage")
        values = self.storages(key, _expect(dtype, torch.dtype), count)
        if view is not None:
            _, start, length = view
            if not 0 <= _expect(start, int) <= start + _expect(length, int) <= count:
                raise DamagedPickle("a view is larger than its storage")
            values = values[start : start + length]
        return values


def _named(module: str, attribute: str) -> Any:
    """Names that a pickle may use, also with Python 2's module names."""
    module = {"__builtin__": "builtins"}.get(module, module)
    name = f"{module}.{attribute}"
    if module in ("torch", "torch.cuda", "torch.storage") and attribute in _STORAGES:
        return _STORAGES[attribute]
    if module == "torch" and isinstance(dtype := getattr(torch, attribute, None), torch.dtype):
        return dtype
    if name not in _CALLED and name not in _TYPES and name not in _NUMPY and name != _ENCODE:
        raise RefusedPickle(name)
    return _Name(name)


def _tensor(values: Any, offset: Any, size: Any, stride: Any) -> Tensor:
    """A view of a storage's values, (count,), within its bounds."""
    values = _expect(values, Tensor)
    if not all(type(n) is int and n >= 0 for n in (offset, *size, *stride)):
        raise DamagedPickle("a shape contains something other than integers")
    if len(size) != len(stride):
        raise DamagedPickle("a shape and its strides differ in length")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if math.prod(size) > values.numel() or (math.prod(size) > 0 and last >= values.numel()):
        raise DamagedPickle(
            f"a tensor of shape {tuple(size)[:8]} is larger than its data in the file"
        )
    # as_strided counts from the start of the underlying storage.
    begin = values.storage_offset() + min(offset, values.numel())
    view: Tensor = values.as_strided(size, stride, begin)
    return view


def _expect(value: Any, kind: Any) -> Any:
    if not isinstance(value, kind):
        raise DamagedPickle(f"a {getattr(kind, '__name__', kind)} is missing")
    return value


def _is_scalar(value: Any) -> bool:
    return value is None or isinstance(value, str | bytes | bool | int | float)


def _key(value: Any) -> Any:
    """A key of a dict.

    Hashing deeply nested tuples crashes the process, and numbers can be made to collide: anything
    but strings and small integers is converted to a string.
    """
    if isinstance(value, str | bytes | None) or (isinstance(value, int) and 0 <= value < 2**32):
        return value
    if _is_scalar(value) or (isinstance(value, tuple) and all(map(_is_scalar, value[:8]))):
        return _written(value)
    raise DamagedPickle(f"a key is of type {type(value).__name__}")


def _written(value: Any) -> str:
    """A number, or a short tuple of scalars, as Python writes it."""
    parts = value if isinstance(value, tuple) else (value,)
    if len(parts) > 8 or any(map(_is_long, parts)):
        raise DamagedPickle("a key is too long for a state dict")
    return repr(value)


def _is_long(value: Any) -> bool:
    """Whether a scalar is too long for a key."""
    if isinstance(value, str | bytes):
        return len(value) > 200
    return isinstance(value, int) and abs(value) >= 2**64
