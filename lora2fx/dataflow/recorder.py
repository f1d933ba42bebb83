"""A dispatch mode that writes down every aten call of a forward, following views and in-place writes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, is_traceable_wrapper_subclass
from torch.utils.weak import WeakTensorKeyDictionary

from lora2fx.dataflow.overlaps import overlap
from lora2fx.dataflow.readers import Readers
from lora2fx.dataflow.recording import ALIAS, INPUT, Op, Ref, Value


def _tensors(nested: Any) -> Iterable[Tensor]:
    if isinstance(nested, Tensor):
        yield nested
    elif isinstance(nested, (list, tuple)):
        for item in nested:
            yield from _tensors(item)


def _refs(nested: Any) -> Iterable[int]:
    if isinstance(nested, Ref):
        yield nested.value
    elif isinstance(nested, (list, tuple)):
        for item in nested:
            yield from _refs(item)


class Recorder(TorchDispatchMode):
    """Record what runs inside: `values`, `ops`, `constants`, and the weights read `outside` their owner's forward.

    Holds no activation alive: tensors are known by weak references, so that memory is that of a plain forward.
    """

    def __init__(self, model: nn.Module, inputs: Iterable[Tensor], readers: Readers) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.values, self.ops = list[Value](), list[Op]()
        self.parameters, self.constants = dict[int, str](), dict[int, Tensor]()
        self.outside = set[str]()
        self._readers = readers
        self._known: MutableMapping[Tensor, int] = WeakTensorKeyDictionary()
        self._storages = dict[int, StorageWeakRef]()  # held, so that no freed storage's address is used again
        self._writes = defaultdict[int, list[int]](list)
        self._since = dict[int, int]()  # the last value that may have been written before a view was taken
        self._homes = dict[int, int]()
        self._holders = defaultdict[int, list[tuple[str, nn.Module]]](list)
        for path, owner in model.named_modules():
            for name, parameter in owner.named_parameters(recurse=False):
                self._name_parameter(f"{path}.{name}".lstrip("."), owner, parameter)
        for tensor in inputs:
            self._append_op(INPUT, None, (), {}, (tensor,))

    def _name_parameter(self, name: str, owner: nn.Module, parameter: Tensor) -> None:
        if parameter not in self._known:
            value = self._new_value(parameter, None)
            self.parameters[value] = name
            self._homes.setdefault(self.values[value].storage, value)
        self._holders[self._known[parameter]].append((name, owner))

    def _storage(self, tensor: Tensor) -> int:
        if is_traceable_wrapper_subclass(tensor):  # its storage is nobody's
            return -len(self.values) - 1
        try:
            storage = tensor.untyped_storage()
        except (NotImplementedError, RuntimeError):  # a sparse tensor or a subclass without one
            return -len(self.values) - 1
        self._storages.setdefault(storage._cdata, StorageWeakRef(storage))
        return int(storage._cdata)

    def _new_value(self, tensor: Tensor, producer: int | None) -> int:
        strided = tensor.layout is torch.strided
        stride, offset = (tuple(tensor.stride()), int(tensor.storage_offset())) if strided else ((0,) * tensor.dim(), 0)
        shape = tuple(tensor.shape)
        self.values.append(Value(shape, stride, offset, tensor.dtype, self._storage(tensor), producer))
        self._known[tensor] = len(self.values) - 1
        return len(self.values) - 1

    def _append_op(
        self, name: str, func: OpOverload | None, args: tuple[Any, ...], kwargs: dict[str, Any], made: Iterable[Tensor]
    ) -> None:
        inputs = tuple(dict.fromkeys((*_refs(args), *_refs(tuple(kwargs.values())))))
        index = len(self.ops)
        outputs = tuple(self._new_value(tensor, index) for tensor in made)
        self.ops.append(Op(index, name, func, args, kwargs, inputs, outputs, self._holder(inputs)))

    def _value(self, tensor: Tensor, looked_at: bool) -> int:
        """The id of a tensor as it is now; a tensor never seen is a constant, or another view of a parameter.

        Where it is only `looked_at`, what was written into it is left for whoever reads the view: it may be
        of another part.
        """
        if tensor not in self._known:
            value = self._new_value(tensor, None)
            home = self._homes.get(self.values[value].storage)
            if home is not None:
                self._append_op(ALIAS, None, (Ref(home),), {}, (tensor,))
        if not looked_at:
            self._join_writes(tensor)
        value = int(self._known[tensor])
        if not tensor.is_floating_point() and not tensor.is_complex():
            self.constants[value] = tensor
        return value

    def _join_writes(self, tensor: Tensor) -> None:
        """Give a tensor a new value where another view of its storage has written into it."""
        value = self._known[tensor]
        since, at = self._since.get(value, value), self.values[value]
        later = [write for write in self._writes.get(at.storage, ()) if write > since]
        later = [write for write in later if write != value and overlap(at, self.values[write])]
        if later:
            self._append_op(ALIAS, None, tuple(Ref(source) for source in (value, *later)), {}, (tensor,))

    def _argument(self, nested: Any, looked_at: bool) -> Any:
        if isinstance(nested, Tensor):
            return Ref(self._value(nested, looked_at))
        if isinstance(nested, (list, tuple)):
            return tuple(self._argument(item, looked_at) for item in nested)
        return nested

    def _holder(self, inputs: tuple[int, ...]) -> str | None:
        for value in inputs:
            if value in self._holders and len(self.values[value].shape) >= 2:
                return self._holder_of(self._holders[value])
        return None

    def _holder_of(self, holders: list[tuple[str, nn.Module]]) -> str | None:
        running = self._readers.running([owner for _, owner in holders])
        if running is None:
            self.outside.update(name for name, _ in holders)
        return next((name for name, owner in holders if owner is running), None)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run `func` and record it; composite functions and gated linear units in their parts."""
        named = dict(kwargs or {})
        if func is torch.ops.aten.glu.default:
            with self:
                up, gate = args[0].chunk(2, args[1] if len(args) > 1 else -1)
                return up * gate.sigmoid()
        if isinstance(func, OpOverload):
            with self:
                parts = func.decompose(*args, **named)
            if parts is not NotImplemented:
                return parts
        looks = isinstance(func, OpOverload) and func.is_view
        refs = self._argument(args, looks)
        named_refs = {name: self._argument(value, looks) for name, value in named.items()}
        made = func(*args, **named)
        self._append_op(_name(func), func, refs, named_refs, _tensors(made))
        if looks:
            self._note_view(self.ops[-1])
        self._note_writes(func, args, named)
        return made

    def _note_view(self, op: Op) -> None:
        """A view knows of no write that the tensor it is of doesn't know of."""
        since = self._since.get(op.inputs[0], op.inputs[0])
        self._since.update(dict.fromkeys(op.outputs, since))

    def record_as(self, func: OpOverload, operands: tuple[Tensor, ...], call: Callable[[], Tensor]) -> Tensor:
        """What `call` returns, recorded as the one call `func(*operands)`; what it does inside is not."""
        refs = self._argument(operands, False)
        with _disable_current_modes():
            made = call()
        self._append_op(_name(func), func, refs, {}, (made,))
        return made

    def _note_writes(self, func: Any, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        schema = getattr(func, "_schema", None)
        if schema is None or not schema.is_mutable:
            return
        for position, argument in enumerate(schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            given = args[position] if position < len(args) else named.get(argument.name)
            for tensor in _tensors(given):
                value = self._written(tensor)
                self._writes[self.values[value].storage].append(value)

    def _written(self, tensor: Tensor) -> int:
        """The value of a tensor just changed; one that the call doesn't return (a list, a second one) gets its own."""
        value = int(self._known[tensor])
        op = self.ops[-1]
        if value in op.outputs:
            return value
        made = self._new_value(tensor, op.index)
        self.ops[-1] = Op(**{**vars(op), "outputs": (*op.outputs, made)})
        return made


def _name(func: Any) -> str:
    return str(func.overloadpacket) if isinstance(func, OpOverload) else str(func)
