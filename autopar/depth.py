"""Deep models from shallow traces: of a stack of equal layers a few are traced, and their part of the graph repeated.

Tracing takes a time that grows with the layers, and the layers of a stack do the same. So a model whose longest
`ModuleList` or `Sequential` holds N equal layers is traced with `KEPT` of them, and the joint graph of N layers is made
from that: two at each end as they were traced, for they see what is around, and the one in the middle as often as is
needed, reading what its neighbours make; everything outside the stack once.

Two things are proved first; without them the model is traced as it is. That the layers do the same: a forward of the
whole model is recorded (`Recorder`), call by call, with everything that is not a tensor and with where every tensor
comes from. It must be equal in all layers, and outside the stack equal to that of the few. And that the graph is
periodic (`unroll`): what was traced of neighbours in the middle must be equal up to a shift by one layer, forward and
backward.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import fx, nn
from torch.autograd import Function
from torch.autograd.function import BackwardCFunction
from torch.overrides import TorchFunctionMode

from autopar.assemble import ROLE, Role
from autopar.call import SYMBOLIC

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


# ---- the graph of more layers --------------------------------------------------------------------------------------


class _Unlike(Exception):
    """The graph is not periodic, as `unroll` reads it."""


def unroll(graph: fx.Graph, stack: Stack, text: Callable[[Any], str | None]) -> fx.Graph | None:
    """The joint graph of the whole stack from that of its first `KEPT` layers, `graph`; None if it is not periodic.

    Both with a `Role` on every placeholder and result, and `meta["module"]` where known. `graph` is not changed.
    `text`: of a symbolic size.
    """
    try:
        return _Unrolled(_Parts(graph, stack, text)).graph
    except _Unlike:
        return None


class _Parts:
    """A graph of `KEPT` layers in the segments of its layers, forward and backward, and the nodes around them.

    Attributes:
        order: nodes outside, and (layer, pass) where a segment stands.
        segments: (layer, pass) -> its nodes; pass 0 goes up through the layers, pass 1 down.
        home: node in a segment -> (layer, pass, position).
    """

    def __init__(self, graph: fx.Graph, stack: Stack, text: Callable[[Any], str | None]) -> None:
        self.old, self.stack, self.text = graph, stack, text
        self.order: list[fx.Node | tuple[int, int]] = []
        self.segments: dict[tuple[int, int], list[fx.Node]] = {}
        self.home: dict[fx.Node, tuple[int, int, int]] = {}
        sizes: dict[fx.Node, None] = {}  # of the batch alone: not a part of the layer that asks first
        for node in graph.nodes:
            given = all(n.op == "placeholder" or n in sizes for n in node.all_input_nodes)
            if node.op == "call_function" and isinstance(node.meta.get("val"), SYMBOLIC) and given:
                sizes[node] = None
        self.order += sizes
        self.sizes = sizes
        nodes = [n for n in graph.nodes if n.op in ("call_function", "get_attr") and n not in sizes]
        layers = self._layers(nodes)
        begun = -1
        for at, (node, layer) in enumerate(zip(nodes, layers)):
            if layer is None:
                self.order.append(node)
                continue
            if node.op == "get_attr" and not self._vanishes(node):
                raise _Unlike  # of all layers, others might hold other values
            if at == 0 or layers[at - 1] != layer:
                begun += 1
                expected = (begun, 0) if begun < KEPT else (2 * KEPT - 1 - begun, 1)
                if begun >= 2 * KEPT or layer != expected[0]:
                    raise _Unlike
                self.order.append(expected)
                self.segments[expected] = []
            segment = self.segments[expected]
            self.home[node] = (*expected, len(segment))
            segment.append(node)
        if begun + 1 != 2 * KEPT:
            raise _Unlike
        self._compare()

    def _layers(self, nodes: Sequence[fx.Node]) -> list[int | None]:
        """The layer of every node. What says nothing, between two ops of the stack, belongs to the first of them.

        But where the backward begins: that is the widest gap between two ops of the last layer.
        """
        found: list[int | None] = []
        for node in nodes:
            where = self.stack.split(node.meta.get("module", ""))
            found.append(None if where is None else where[0])
        known = [at for at, layer in enumerate(found) if layer is not None]
        gaps = [(a, b) for a, b in itertools.pairwise(known) if b - a > 1]
        turns = [gap for gap in gaps if found[gap[0]] == found[gap[1]] == KEPT - 1]
        if not turns:
            raise _Unlike
        gaps.remove(max(turns, key=lambda gap: gap[1] - gap[0]))
        for a, b in gaps:
            found[a + 1 : b] = [found[a]] * (b - a - 1)
        return found

    def _compare(self) -> None:
        """Neighbours in the middle must be equal, one layer apart.

        The lowest of them reads what the first layer has made, and in the backward the highest what the last has, which
        may be others: there only the ops are compared.
        """
        for which in (0, 1):
            for layer in range(1, KEPT - 2):
                a, b = self.segments[layer, which], self.segments[layer + 1, which]
                if list(map(self._what, a)) != list(map(self._what, b)):
                    raise _Unlike
                inner = layer == KEPT - 3 if which == 0 else layer == 1
                if inner and any(self._told(x, layer) != self._told(y, layer + 1) for x, y in zip(a, b)):
                    raise _Unlike

    def _vanishes(self, constant: fx.Node) -> bool:
        """Whether it is empty and nothing but a `cat` reads it, which is left without it."""
        copies = set(constant.users)
        readers = {user for copy in copies for user in copy.users}
        return (
            self._constant(constant).numel() == 0
            and {n.target for n in copies} <= {torch.ops.aten.lift_fresh_copy.default}
            and {n.target for n in readers} <= {torch.ops.aten.cat.default}
        )

    def _constant(self, node: fx.Node) -> torch.Tensor:
        return getattr(self.old.owning_module, str(node.target))  # type: ignore[no-any-return]

    def _what(self, node: fx.Node) -> Any:
        """What a node does; of a constant, which has a name of its own in every layer, what it is."""
        if node.op != "get_attr":
            return node.target
        constant = self._constant(node)
        return constant.dtype, tuple(constant.shape)

    def _told(self, node: fx.Node, layer: int) -> Any:
        def tell(arg: fx.Node) -> Any:
            if arg in self.home:
                other, which, at = self.home[arg]
                return ("node", other - layer, which, at)
            if arg in self.sizes:  # every layer asks anew
                return ("size", self.text(arg.meta["val"]))
            where = self.owner(arg)
            return ("outside", arg.name) if where is None else ("state", where[0] - layer, where[1])

        module = self.stack.split(node.meta.get("module", ""))
        return fx.map_arg((node.args, node.kwargs), tell), module and module[1]

    def owner(self, node: fx.Node) -> tuple[int, str] | None:
        """Layer and name there of the parameter or buffer that a placeholder is; None for all else."""
        role: Role | None = node.meta.get(ROLE) if node.op == "placeholder" else None
        return self.stack.split(role.name) if role is not None and role.kind == "state" else None


class _Unrolled:
    """The graph of all layers. Layers are numbered as in the whole stack, templates as in the trace."""

    def __init__(self, parts: _Parts) -> None:
        self.parts, self.stack, self.graph = parts, parts.stack, fx.Graph()
        self.outside: dict[fx.Node, fx.Node] = {}
        self.inside: dict[tuple[int, int, int], fx.Node] = {}
        self.state: dict[tuple[int, str], fx.Node] = {}
        for node in parts.old.nodes:
            if node.op == "placeholder":
                self._placeholder(node)
        for item in parts.order:
            if isinstance(item, fx.Node):
                self.outside[item] = self._copy(item, self._of_outside, item.meta)
            else:
                self._segment(*item)
        self._output()

    def _placeholder(self, node: fx.Node) -> None:
        where = self.parts.owner(node)
        if where is None:
            self.outside[node] = self._copy(node, self._of_outside, node.meta)
            return
        for layer in self.stack.like(where[0]):
            role = replace(node.meta[ROLE], name=self.stack.join(layer, where[1]))
            self.state[layer, where[1]] = self._copy(node, self._of_outside, {**node.meta, ROLE: role})

    def _segment(self, template: int, which: int) -> None:
        layers = self.stack.like(template)
        for layer in layers if which == 0 else reversed(layers):
            find = self._finder(template, layer)
            for at, node in enumerate(self.parts.segments[template, which]):
                meta = dict(node.meta)
                if "module" in meta:
                    meta["module"] = self._renamed(meta["module"], layer)
                self.inside[layer, which, at] = self._copy(node, find, meta)

    def _finder(self, template: int, layer: int) -> Callable[[fx.Node], fx.Node]:
        """What a layer reads in the place of what its template reads."""

        def find(arg: fx.Node) -> fx.Node:
            owner = self.parts.owner(arg)
            if owner is not None:
                return self._known(self.state, (layer + owner[0] - template, owner[1]))
            if arg not in self.parts.home:
                return self.outside[arg]
            other, which, at = self.parts.home[arg]
            if abs(other - template) > 1:
                raise _Unlike
            return self._known(self.inside, (layer + other - template, which, at))

        return find

    def _of_outside(self, arg: fx.Node) -> fx.Node:
        if arg in self.outside:
            return self.outside[arg]
        owner = self.parts.owner(arg)
        if owner is not None:
            return self._known(self.state, (self._end(owner[0]), owner[1]))
        other, which, at = self.parts.home[arg]
        return self._known(self.inside, (self._end(other), which, at))

    def _end(self, template: int) -> int:
        if template not in (0, KEPT - 1):
            raise _Unlike
        return self.stack.like(template)[0]

    @staticmethod
    def _known(table: dict[Any, fx.Node], key: Any) -> fx.Node:
        if key not in table:
            raise _Unlike
        return table[key]

    def _copy(self, node: fx.Node, find: Callable[[fx.Node], fx.Node], meta: dict[str, Any]) -> fx.Node:
        made = self.graph.node_copy(node, find)
        made.meta = dict(meta)
        if made.op == "placeholder":
            made.target = made.name  # in code that is written for the graph, the name of the argument
        return made

    def _output(self) -> None:
        old = self.parts.old.output_node()
        values: list[Any] = []
        roles: list[Role | None] = []
        results: Any = old.args[0]
        pairs = zip(results, old.meta[ROLE])
        for template, group in itertools.groupby(pairs, lambda pair: self._template(pair[1])):
            found = list(group)
            if template is None:
                values += [self._of_outside(v) if isinstance(v, fx.Node) else v for v, _ in found]
                roles += [role for _, role in found]
                continue
            for layer in self.stack.like(template):
                find = self._finder(template, layer)
                values += [find(v) if isinstance(v, fx.Node) else v for v, _ in found]
                roles += [replace(role, name=self._renamed(role.name, layer)) for _, role in found]
        made = self.graph.output(tuple(values))
        made.meta = {**old.meta, ROLE: roles}

    def _template(self, role: Role | None) -> int | None:
        """The layer whose gradient or new buffer a result is."""
        where = self.stack.split(role.name) if role is not None and role.kind in ("grad", "buffer") else None
        return None if where is None else where[0]

    def _renamed(self, name: str, layer: int) -> str:
        where = self.stack.split(name)
        return name if where is None else self.stack.join(layer, where[1])
