"""One call of a model: its arguments as named tensors, its outputs as a flat tuple, and both back again."""

from __future__ import annotations

import inspect
import re
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from autopar import tree
from autopar.errors import BatchError, CaptureError

#: Keyword under which the target of `loss=` is passed.
TARGET = "target"

#: Numbers that depend on a batch size which is a symbol; `autopar/symbolic.py` makes numbers of them.
SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)

_PLAIN = (bool, int, float, complex, str, bytes, torch.dtype, torch.device, type(None), tuple, list, dict, *SYMBOLIC)


def input_key(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, loss: Any = None
) -> tuple[tuple[str, Any], ...]:
    """What a captured program depends on in its arguments: (path, (shape, dtype)) of tensors, (path, value) of others.

    Equal keys can share a program; where keys differ, the first differing path names the argument.
    """
    leaves = Call(model, args, kwargs, loss).leaves
    return tuple(
        (path, (tuple(value.shape), str(value.dtype)) if isinstance(value, torch.Tensor) else repr(value))
        for path, value in leaves
    )


class Call:
    """The arguments of a call, bound to the parameters of `forward`.

    Attributes:
        leaves: every argument, nested ones flattened, with its path.
        names, tensors: those that are tensors.
    """

    def __init__(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], loss: Callable[..., Any] | None
    ) -> None:
        self.signature = inspect.signature(model.forward)
        self.model_name = type(model).__name__
        self.with_target = loss is not None
        self.leaves, self._rebuild = self._flatten(args, kwargs)
        for leaf in self.leaves:
            _check_argument(leaf)
        tensors = [leaf for leaf in self.leaves if isinstance(leaf.value, torch.Tensor)]
        self.names = [leaf.path for leaf in tensors]
        self.tensors: list[torch.Tensor] = [leaf.value for leaf in tensors]
        kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        keywords = {name for name, p in self.signature.parameters.items() if p.kind in kinds}
        # Nothing but tensors, each an argument that may be given by its name.
        self._simple = all(path in keywords or (path == TARGET and loss is not None) for path, _ in self.leaves)
        self._simple &= len(tensors) == len(self.leaves)

    def _flatten(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[tree.Leaf], tree.Rebuild]:
        kwargs = dict(kwargs)
        target = {}
        if self.with_target:
            if TARGET not in kwargs:
                raise BatchError(f"argument {TARGET!r} is missing: with loss=, call model(..., {TARGET}=...)")
            target = {TARGET: kwargs.pop(TARGET)}
        try:
            bound = self.signature.bind(*args, **kwargs)
        except TypeError as error:
            raise BatchError(f"the call does not fit {self.model_name}.forward: {error}") from None
        named: dict[str, Any] = {}
        for name, value in bound.arguments.items():
            if self.signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
                named.update(value)
            else:
                named[name] = value
        leaves: list[tree.Leaf] = []
        parts: list[tuple[bool, str, int, tree.Rebuild]] = []
        for is_target, holder in enumerate((named, target)):
            for name, value in holder.items():
                found, rebuild = tree.flatten(value, name)
                parts.append((bool(is_target), name, len(found), rebuild))
                leaves += found

        def rebuild_all(values: list[Any]) -> tuple[dict[str, Any], dict[str, Any]]:
            out: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
            start = 0
            for is_target, name, length, rebuild in parts:
                out[is_target][name] = rebuild(values[start : start + length])
                start += length
            return out

        return leaves, rebuild_all

    def arguments(self, tensors: list[Any]) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
        """(args, kwargs, target) of the call, with `tensors` in the place of its own."""
        fresh = iter(tensors)
        values = [next(fresh) if isinstance(v, torch.Tensor) else v for _, v in self.leaves]
        named, target = self._rebuild(values)
        arguments: OrderedDict[str, Any] = OrderedDict()
        for name, parameter in self.signature.parameters.items():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                arguments[name] = named  # what no other parameter took
            elif name in named:
                arguments[name] = named.pop(name)
        bound = inspect.BoundArguments(self.signature, arguments)
        return bound.args, bound.kwargs, target.get(TARGET)

    def flatten(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
        """The tensors of another call of the same form, in the same order.

        Raises:
            BatchError: names the argument that is missing, new, of another kind, or has another non-tensor value.
        """
        if self._simple and not args and (same := self._as_before(kwargs)) is not None:
            return same
        given = dict(self._flatten(args, kwargs)[0])
        expected = dict(self.leaves)
        for path in expected:
            if path not in given:
                raise BatchError(f"argument {path!r} is missing; the model was captured with it")
        for path, value in given.items():
            if path not in expected:
                raise BatchError(f"argument {path!r} is new; the model was captured without it")
            known = expected[path]
            is_tensor, was_tensor = isinstance(value, torch.Tensor), isinstance(known, torch.Tensor)
            if is_tensor != was_tensor:
                raise BatchError(f"argument {path!r} is a {_kind(value)}; the model was captured with a {_kind(known)}")
            if was_tensor and known.dtype != value.dtype:
                raise BatchError(f"argument {path!r} has {value.dtype}; the model was captured with {known.dtype}")
            if not was_tensor and not _equal(known, value):
                raise BatchError(
                    f"argument {path!r} is {value!r}; the model was captured with {known!r}, now fixed in the graph"
                )
        return [given[name] for name in self.names]

    def _as_before(self, kwargs: dict[str, Any]) -> list[torch.Tensor] | None:
        """The tensors of a call by keywords that has nothing but the same tensors: the usual one, at every step."""
        if len(kwargs) != len(self.names):
            return None
        tensors: list[Any] = [kwargs.get(name) for name in self.names]
        if any(not isinstance(t, torch.Tensor) or t.dtype != known.dtype for t, known in zip(tensors, self.tensors)):
            return None
        return tensors


def _kind(value: Any) -> str:
    return "tensor" if isinstance(value, torch.Tensor) else type(value).__name__


def _equal(a: Any, b: Any) -> bool:
    return a is b or (type(a) is type(b) and bool(a == b))


def _is_cache(value: Any) -> bool:
    """A Hugging Face key/value or state cache."""
    return any(c.__name__.endswith("Cache") for c in type(value).__mro__)


def _check_argument(leaf: tree.Leaf) -> None:
    path, value = leaf
    if _is_cache(value):
        raise CaptureError(
            f"argument {path!r} is a {type(value).__name__}: caches serve generation, which is not supported; leave it "
            f"out, and pass use_cache=False"
        )
    if type(value).__module__ == "numpy" and hasattr(value, "__array__"):
        raise CaptureError(f"argument {path!r} is a numpy array; pass torch.from_numpy(...) of it")
    if isinstance(value, torch.Tensor) and value.requires_grad:
        raise CaptureError(
            f"argument {path!r} requires a gradient, but only parameters get one: pass it detached, or make it an "
            f"nn.Parameter of the model"
        )


class Returned:
    """What a forward of `Wrapper` returned.

    Attributes:
        leaves: every output with its path; the value is None for tensors.
        is_tensor: which of them are tensors.
        cut: which of them would have a gradient, were there no loss beside them.
        pack: list of values of `leaves` -> what the model returns.
        notes: what was dropped.
        reached: names of the parameters that autograd reaches from the tensors returned.
    """

    def __init__(self) -> None:
        self.leaves: list[tree.Leaf] = []
        self.is_tensor: list[bool] = []
        self.cut: list[bool] = []
        self.pack: tree.Rebuild = list
        self.notes: list[str] = []
        self.reached: set[str] = set()


class Wrapper(nn.Module):
    """Calls the model with flat tensors and returns flat tensors, so that a trace sees no container types."""

    def __init__(self, model: nn.Module, call: Call, loss: Callable[[Any, Any], Any] | None, training: bool) -> None:
        super().__init__()
        self.model = model
        self.training = model.training
        self.call, self.loss, self.with_grad = call, loss, training
        self.returned = Returned()

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        args, kwargs, target = self.call.arguments(list(tensors))
        returned = self.returned
        returned.notes.clear()
        before = _State(self.model)
        out = self.model(*args, **kwargs)
        returned.notes += before.settle()
        if self.loss is not None:
            out = self.loss(out, target)
        leaves, returned.pack = tree.flatten(out)
        leaves = [self._keep(leaf) for leaf in leaves]
        loss_path = find_loss(out, leaves)
        returned.is_tensor = [isinstance(value, torch.Tensor) for _, value in leaves]
        returned.leaves = [tree.Leaf(p, None if t else v) for (p, v), t in zip(leaves, returned.is_tensor)]
        kept = []
        returned.cut = []
        for path, value in leaves:
            cut = self.with_grad and loss_path is not None and path != loss_path
            returned.cut.append(cut and isinstance(value, torch.Tensor) and value.requires_grad)
            if isinstance(value, torch.Tensor):
                # a copy of its own, so that no output is a view of another, of an input or of a parameter
                kept.append((value.detach() if cut else value).clone())
        returned.reached = _reached(kept, self.model)
        return tuple(kept)

    def _keep(self, leaf: tree.Leaf) -> tree.Leaf:
        path, value = leaf
        if _is_cache(value):
            self.returned.notes.append(f"output {path!r} ({type(value).__name__}) is None: it serves generation only")
            return tree.Leaf(path, None)
        if not isinstance(value, torch.Tensor) and not isinstance(value, _PLAIN):
            raise CaptureError(
                f"output {path!r} is a {type(value).__module__}.{type(value).__name__}, which a graph cannot return; "
                f"return tensors in tuples, lists, dicts, dataclasses or ModelOutputs"
            )
        return leaf


def _reached(outputs: list[torch.Tensor], model: nn.Module) -> set[str]:
    """Names of the parameters that a backward from `outputs` would reach."""
    names = {id(p): n for n, p in model.named_parameters()}
    found: set[str] = set()
    seen: set[Any] = set()
    stack = [t.grad_fn for t in outputs if t.grad_fn is not None]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)  # only on the node that accumulates into a leaf
        if variable is not None and id(variable) in names:
            found.add(names[id(variable)])
        stack.extend(parent for parent, _ in node.next_functions if parent is not None)
    return found


class _State:
    """What the modules hold before a forward, to tell what it assigns: a trace sees changes in place only."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = [(n, m, dict(m._buffers), dict(m.__dict__)) for n, m in model.named_modules()]

    def settle(self) -> list[str]:
        """Turn assigned buffers into changes in place, which a graph can express; notes on other attributes.

        Raises:
            CaptureError: a tensor that is not a buffer was replaced, so a later call would see the old one.
        """
        notes = []
        for path, module, buffers, attributes in self.modules:
            for name, old in buffers.items():
                new = module._buffers.get(name)
                if new is not old and old is not None and new is not None:
                    old.copy_(new.detach())
                    module._buffers[name] = old
            for name, new in list(module.__dict__.items()):
                old, full = attributes.get(name), f"{path}.{name}".lstrip(".")
                if new is old or name.startswith("__"):
                    continue
                starred = re.sub(r"(?<=\.)\d+(?=\.)", "*", full)
                if isinstance(old, torch.Tensor):
                    raise CaptureError(
                        f"forward assigns the tensor attribute {full!r}, so that a later call depends on this one; "
                        f"make it a buffer: self.register_buffer({name!r}, ..., persistent=False)"
                    )
                if isinstance(new, torch.Tensor):
                    notes.append(f"forward sets attribute {starred!r}; the compiled module does not")
                elif isinstance(new, (bool, int, float, str)) and new != old and not name.startswith("_"):
                    notes.append(
                        f"forward changes attribute {starred!r}; its value while capturing is fixed in the graph"
                    )
                else:
                    continue
                if name in attributes:  # a trace calls forward more than once: each time from the same state
                    module.__dict__[name] = old
                else:
                    del module.__dict__[name]
        return list(dict.fromkeys(notes))


def find_loss(out: Any, leaves: list[tree.Leaf]) -> str | None:
    """Path of the scalar loss in an output: named `loss`, the first of a tuple, or the output itself; else None."""
    named = [leaf for leaf in leaves if leaf.path == "loss"]
    first = leaves[:1] if isinstance(out, (tuple, list, torch.Tensor)) else []
    for path, value in named + first:
        if isinstance(value, torch.Tensor) and value.dim() == 0 and value.is_floating_point():
            return path
    return None
