"""The table of sharding rules: one line per op, through generators that live with their family in `rules_*.py`.

`rule_for(node)` gives the rule of any op node, bound to its shapes. It looks at the user's registrations, then the
table, then asks `discover` to find a rule by running the op, and else replicates the op and notes the line the user
could add.

Marks in this table: `*` is used only where the shards talk inside the op (softmax over a split dim). A factor that
needs another local op but no talk, such as a split vocabulary (mask foreign indices, results partial: `v+`),
carries no extra mark; `autopar.passes.localise` knows these ops. Linear groups hold floating operands only:
integers are never partial that way."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from autopar.costmodel import discover, rules_index, rules_math, rules_nn, rules_shape
from autopar.costmodel.rules_call import LETTERS, Call, Maker, replicated
from autopar.errors import RuleError
from autopar.graph import op_name, resolve
from autopar.precision import ADDED
from autopar.rule import BoundRule, Operand, Rule, bind

#: OpOverload -> rule text, or function of the call.
RULES: dict[Any, Maker | str] = {**rules_shape.TABLE, **rules_math.TABLE, **rules_index.TABLE, **rules_nn.TABLE}
#: The same for ops that are defined outside ATen, by qualified name.
NAMED: dict[str, Maker | str] = {
    **rules_nn.NAMED,
    "autopar::offload": rules_math.pointwise((0,)),  # autopar/offload.py: what lies anywhere may wait on the host
    "autopar::fetch": rules_math.pointwise((0,)),
}

UserRule = str | Rule | Callable[[fx.Node], "str | Rule"]


@dataclass(frozen=True)
class Found:
    """A rule and where it came from: "table", "user", "discovered" or "replicated"."""

    bound: BoundRule
    source: str
    op: str


_user: dict[str, UserRule] = {}
_cache: dict[tuple[Any, ...], Found] = {}


def signature(node: fx.Node) -> tuple[Any, ...]:
    """All that a rule may depend on: op, shapes and dtypes of the tensors, other arguments. Hashable."""
    found = (node.target, _key(node.args), _key(node.kwargs) if node.kwargs else ())
    return (*found, node.meta[ADDED]) if ADDED in node.meta else found


def rule_for(node: fx.Node) -> BoundRule:
    """The rule of an op node, with the sizes of its factors. Cached by signature.

    Raises:
        RuleError: a user's rule, or one of the table, does not fit the call; names the op and its shapes.
    """
    return _found(node).bound


def rule_source(node: fx.Node) -> str:
    """Where the node's rule came from: "table", "user", "discovered" or "replicated"."""
    return _found(node).source


def register(op: Any, rule: UserRule) -> None:
    """Give a rule to a custom op, or another one to a known op.

    Args:
        op: as in torch.ops (torch.ops.mylib.scale), or its name: "mylib::scale", "mylib::scale.overload".
        rule: its text, e.g. "i k+, k+ j -> i j ; linear 0 | 1", or a function of the fx node that returns text or Rule.

    Raises:
        RuleError: the text cannot be read, or `op` is no op.

    Example:
        register("mylib::swiglu", "... d, ... d -> ... d")
    """
    if isinstance(rule, str):
        Rule.parse(rule)
    elif not callable(rule) and not isinstance(rule, Rule):
        raise RuleError(f"a rule is a text such as 'i k+, k+ j -> i j', or a function that returns one, not {rule!r}")
    _user[_qualified(op)] = rule
    _cache.clear()


def unregister(op: Any) -> None:
    """Take back what `register` did."""
    _user.pop(_qualified(op), None)
    _cache.clear()


def report(nodes: Iterable[fx.Node] | None = None) -> list[str]:
    """One line per op whose rule was not in the table: how it was found, or the line to add.

    nodes: the ops asked about, those of one program; None: all met so far in this process.
    """
    lines: dict[str, str] = {}
    for found in _cache.values() if nodes is None else map(_found, nodes):
        if found.source == "discovered":
            lines.setdefault(
                f"{found.op} {found.bound.rule}",
                f"{found.op}: no rule in the table; found by running it: "
                f'autopar.register_rule("{found.op}", "{found.bound.rule}")',
            )
        elif found.source == "replicated":
            lines.setdefault(
                found.op,
                f"{found.op}: no rule, so every device computes all of it; to split it add e.g. "
                f'autopar.register_rule("{found.op}", "{_suggest(found.bound)}")  # without ^ where a dim may be split',
            )
    return sorted(lines.values())


def _found(node: fx.Node) -> Found:
    key = signature(node)
    found = _cache.get(key)
    if found is None:
        found = _cache[key] = _look_up(node)
    return found


def _look_up(node: fx.Node) -> Found:
    call = Call(node)
    name = qualified_name(node.target)
    maker: Any = _user.get(name, _user.get(name.removesuffix(".default")))
    source = "user"
    if maker is None:
        source = "table"
        maker = RULES.get(node.target) or NAMED.get(name)
    elif callable(maker):
        made = maker(node)
        maker = made if isinstance(made, Rule) else str(made)
    if maker is None:
        rule = discover.discover(node)
        source = "discovered" if rule is not None else "replicated"
        maker = rule if rule is not None else replicated
    rule = maker(call) if callable(maker) else maker
    if isinstance(rule, str):
        rule = Rule.parse(rule)
    try:
        bound = bind(rule, call.ins, call.outs)
    except RuleError as error:
        raise RuleError(
            f"the {source} rule of {op_name(node)} does not fit its call ({_shapes(call)}): {error}; "
            f'give another with autopar.register_rule("{name}", ...)'
        ) from None
    return Found(bound, source, name)


def qualified_name(target: Any) -> str:
    """ "aten::add.Tensor"; "mylib::scale" for a default overload."""
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name + (f".{target._overloadname}" if target._overloadname != "default" else "")
    return getattr(target, "__name__", str(target))


def _qualified(op: Any) -> str:
    if not isinstance(op, str):
        if isinstance(op, torch._ops.OpOverloadPacket):
            return op._qualified_op_name
        if not isinstance(op, torch._ops.OpOverload):  # what torch.library.custom_op returns, or a Python function
            raise RuleError(f"{op!r} is no op; pass torch.ops.mylib.scale, or the name 'mylib::scale'")
        return qualified_name(op)
    name = op if "::" in op else op.replace(".", "::", 1)
    packet, _, overload = name.partition(".")
    space, _, base = packet.partition("::")
    known = getattr(getattr(torch.ops, space), base, None) if base else None
    if known is None or (overload and overload not in known.overloads()):
        raise RuleError(f"no op is called {op!r}; write the name it was defined with, e.g. mylib::scale")
    return packet if overload == "default" else name


def _key(value: Any) -> Any:
    if isinstance(value, fx.Node):
        val = value.meta["val"] if value.op != "call_function" else resolve(value).val
        if isinstance(val, torch.Tensor):
            return (tuple(val.shape), val.dtype)
        return val
    if isinstance(value, (list, tuple)):
        return tuple([_key(v) for v in value])
    if isinstance(value, dict):
        return tuple([(k, _key(v)) for k, v in value.items()])
    # 1, 1.0 and True are equal keys but different arguments.
    return (type(value), value) if isinstance(value, (bool, int, float)) else value


def _shapes(call: Call) -> str:
    def side(shapes: list[Any]) -> str:
        return ", ".join("none" if s is None else "[" + " ".join(map(str, s)) + "]" for s in shapes)

    return f"{side(call.ins)} -> {side(call.outs)}"


def _suggest(bound: BoundRule) -> str:
    """A line to start from: dims of equal size share a letter, and none is split."""
    letters: dict[int, str] = {}

    def dim(names: tuple[str, ...]) -> str:
        size = math.prod(bound.sizes[n] for n in names)
        return "1" if size == 1 else letters.setdefault(size, LETTERS[len(letters) % len(LETTERS)]) + "^"

    def side(operands: tuple[Operand, ...]) -> str:
        return ", ".join("~" if o is None else " ".join(map(dim, o)) for o in operands)

    return f"{side(bound.ins)} -> {side(bound.outs)}".strip()


__all__ = ["NAMED", "RULES", "Found", "register", "report", "rule_for", "rule_source", "signature", "unregister"]
