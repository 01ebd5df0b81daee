"""Deep models from shallow traces: of a stack of equal layers a few are traced, and their part of the graph repeated.

Tracing takes a time that grows with the layers, and the layers of a stack do the same. So a model whose longest
`ModuleList` or `Sequential` holds N equal layers is traced with `KEPT` of them, and the joint graph of N layers is made
from that: two at each end as they were traced, for they see what is around, and the one in the middle as often as is
needed, reading what its neighbours make; everything outside the stack once.

Two things are proved first; without them the model is traced as it is. That the layers do the same: a forward of the
whole model is recorded (`Recorder`), call by call, with everything that is not a tensor and with where every tensor
comes from. It must be equal in all layers, and outside the stack equal to that of the few. And that the graph is
periodic (`autopar/repeat.py`): what was traced of neighbours in the middle must be equal up to a shift by one layer,
forward and backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd import Function
from torch.autograd.function import BackwardCFunction
from torch.overrides import TorchFunctionMode

#: Layers that are traced: two at each end, and one to repeat.
KEPT = 5
#: Layers from which that pays.
LEAST = 8


@dataclass(frozen=True)
class Stack:
    """`count` layers, the children "0", "1", ... of the module at `path`."""

    path: str
    count: int

    def split(self, name: str) -> tuple[int, str] | None:
        """(layer, rest) of the name of a module, parameter or buffer in the stack; None elsewhere."""
        if not name.startswith(f"{self.path}."):
            return None
        number, _, rest = name[len(self.path) + 1 :].partition(".")
        return (int(number), rest) if number.isdigit() else None

    def join(self, layer: int, rest: str) -> str:
        """The name of `rest` in a layer."""
        return f"{self.path}.{layer}.{rest}".rstrip(".")

    def like(self, traced: int) -> range:
        """Layers of the whole stack that are made like a traced one: the one in the middle stands for many."""
        middle, behind = KEPT // 2, self.count - KEPT
        if traced == middle:
            return range(middle, middle + behind + 1)
        layer = traced if traced < middle else traced + behind
        return range(layer, layer + 1)

    def names(self, found: set[str]) -> set[str]:
        """Names of the whole stack, from those of its traced layers."""
        split = [(name, self.split(name)) for name in found]
        here = {name for name, where in split if where is None}
        return here | {self.join(layer, w[1]) for _, w in split if w is not None for layer in self.like(w[0])}

    @contextmanager
    def short(self, model: nn.Module) -> Iterator[None]:
        """Within, the stack holds its first `KEPT` layers only."""
        layers = model.get_submodule(self.path)
        whole = dict(layers._modules)
        try:
            for name in list(whole)[KEPT:]:
                del layers._modules[name]
            yield
        finally:
            layers._modules.clear()
            layers._modules.update(whole)


def stack_of(model: nn.Module) -> Stack | None:
    """The longest list of layers that look equal, and hold nothing that is held elsewhere too; None if it is short.

    Of a model that is called as a whole: a stack that is the model itself has no path, and is not found.
    """
    holders: dict[int, int] = {}
    for module in model.modules():
        for held in (*module._parameters.values(), *module._buffers.values(), *module._modules.values()):
            holders[id(held)] = holders.get(id(held), 0) + 1
    found = None
    for path, module in model.named_modules():
        layers = [layer for layer in module._modules.values() if layer is not None]
        stacked = isinstance(module, (nn.ModuleList, nn.Sequential))
        numbered = list(module._modules) == [str(number) for number in range(len(layers))]
        if path and stacked and numbered and len(layers) >= max(LEAST, found.count + 1 if found else 0):
            inside = [t for layer in layers for t in (*layer.modules(), *layer.parameters(), *layer.buffers())]
            if all(holders[id(t)] == 1 for t in inside) and all(_looks(m) == _looks(layers[0]) for m in layers):
                found = Stack(path, len(layers))
    return found


def _looks(layer: nn.Module) -> list[Any]:
    """What is seen of a layer from outside; of hooks in a backward, which no forward shows, that they are there."""
    modules = list(layer.named_modules())
    return [
        *((name, type(module), module.training) for name, module in modules),
        *((len(module._backward_hooks), len(module._backward_pre_hooks)) for _, module in modules),
        *((name, t.shape, t.dtype, t.requires_grad) for name, t in layer.named_parameters()),
        *((name, t.shape, t.dtype) for name, t in layer.named_buffers()),
    ]


# ---- what a forward does -------------------------------------------------------------------------------------------

#: Types whose text tells all there is to tell.
_PLAIN = frozenset(
    {
        type(None), bool, int, float, complex, str, bytes, type(...), torch.dtype, torch.device, torch.layout,
        torch.memory_format,
    }
)  # fmt: skip
_HOOKS = frozenset({torch.Tensor.register_hook, torch.Tensor.register_post_accumulate_grad_hook})
_GRAD_FN: Any = torch.Tensor.grad_fn
_NODES = frozenset({_GRAD_FN.__get__})


class Recorder(TorchFunctionMode):
    """Every call of a torch function in a forward, by layer of the stack.

    A tensor is told by where it comes from: a parameter or buffer by its name in the layer, the result of a call by how
    many layers before, and which call there. What does not depend on the number of the layer is so equal in all of
    them. Outside the stack, layers count from its two ends.

    Attributes:
        layers: what each has done, in order. outside: all else.
        closed: nothing comes into a layer, or out of the stack, from where the graph could not be repeated; the layers
            are called one after the other; and all that a call depends on is seen.
    """

    def __init__(
        self,
        model: nn.Module,
        stack: Stack,
        inputs: Sequence[torch.Tensor],
        state: Callable[[], Any],
        text: Callable[[Any], str | None],
    ) -> None:
        """`inputs`: tensors of the call. `state`: what a call depends on besides its arguments.

        `text`: of an argument that is no plain value; None if its text does not tell all of it.
        """
        super().__init__()
        self.state, self.text = state, text
        self.modules = list(model.get_submodule(stack.path).children())
        self.layers: list[list[Any]] = [[] for _ in self.modules]
        self.outside: list[Any] = []
        self.closed = True
        self._at: int | None = None
        self._last = -1  # layer that was called last
        self._begun = 0  # calls outside before the first
        self._functions: set[Any] = set()  # of autograd, whose arguments are noted
        self._from: dict[int, tuple[int | None, Any]] = {}  # id of a tensor -> layer, what of it
        self._kept: list[Any] = [*inputs]  # so that no other tensor gets its id
        for number, tensor in enumerate(inputs):
            self._from[id(tensor)] = (None, ("input", number))
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            self._from[id(tensor)] = stack.split(name) or (None, name)
        self._hooks: list[Any] = []

    def __enter__(self) -> Recorder:
        for number, layer in enumerate(self.modules):
            self._hooks.append(layer.register_forward_pre_hook(lambda *_, number=number: self._turn(number)))
            self._hooks.append(layer.register_forward_hook(lambda *_: self._turn(None), always_call=True))
        self._apply = before = Function.__dict__["apply"]

        def apply(function: Any, *args: Any, **kwargs: Any) -> Any:  # which no mode sees
            self._functions.add(function)
            return self._noted(function, before.__get__(None, function), args, kwargs)

        Function.apply = classmethod(apply)  # type: ignore[assignment, method-assign]
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        Function.apply = self._apply  # type: ignore[method-assign]
        for hook in self._hooks:
            hook.remove()

    def _turn(self, layer: int | None) -> None:
        self._at = layer
        if layer is not None:
            if self._last < 0:
                self._begun = len(self.outside)
            self.closed &= layer in (self._last, self._last + 1) and len(self.outside) == self._begun
            self._last = layer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """As the function itself; it is noted."""
        return self._noted(func, func, args, kwargs or {})

    def _noted(self, name: Any, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        at, record = self._at, self.outside if self._at is None else self.layers[self._at]
        self.closed &= name not in _HOOKS and (name not in _NODES or at is None)  # where others do what nobody sees
        record.append((name, self._told(args), self._told(kwargs), self.state()))
        place = len(record)
        out = func(*args, **kwargs)
        for number, result in enumerate(_tensors(out)):
            self._kept.append(result)
            self._from.setdefault(id(result), (at, (place, number)))
        return out

    def _told(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            shape = [self._told(n) for n in value.shape]
            return (self._origin(value), shape, value.dtype, self._own_backward(value))
        if isinstance(value, (tuple, list)):
            return (type(value), *(self._told(v) for v in value))
        if isinstance(value, dict):
            return {k: self._told(v) for k, v in value.items()}
        if isinstance(value, slice):
            return (slice, self._told(value.start), self._told(value.stop), self._told(value.step))
        if is_dataclass(value) and not isinstance(value, type):
            return (type(value), {f.name: self._told(getattr(value, f.name)) for f in fields(value)})
        if type(value) in _PLAIN:
            return repr(value)
        text = self.text(value)
        self.closed &= text is not None
        return text

    def _own_backward(self, tensor: torch.Tensor) -> Any:
        """Of the result of a custom autograd function: what its backward finds in its context."""
        node: Any = tensor.grad_fn
        if not isinstance(node, BackwardCFunction):
            return None
        self.closed &= type(node)._forward_cls in self._functions  # type: ignore[attr-defined]
        return type(node).__name__, self._told(vars(node))

    def _origin(self, tensor: torch.Tensor) -> Any:
        if id(tensor) not in self._from:  # a constant, or made where no torch function is called
            self.closed &= self._at is None
            self._kept.append(tensor)
            self._from[id(tensor)] = (None, ("given", id(tensor)))
        layer, what = self._from[id(tensor)]
        if layer is None:
            return ("outside", what)
        if self._at is not None:
            self.closed &= layer in (self._at, self._at - 1)
            return (self._at - layer, what)
        self.closed &= layer in (0, len(self.layers) - 1)
        return ("first" if layer == 0 else "last", what)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for v in value:
            yield from _tensors(v)


def equal(whole: Recorder, short: Recorder) -> bool:
    """Whether all layers of a model do the same, and the rest of it the same as with few of them.

    `whole` must have been alive while `short` was recorded, so that their tensors are not taken for each other.
    """
    inner = [*whole.layers[1:], *short.layers[1:]]
    return (
        whole.closed
        and short.closed
        and whole.outside == short.outside
        and whole.layers[0] == short.layers[0]
        and all(layer == inner[0] for layer in inner)
    )
