"""The program in which matmuls compute in low precision: casts as torch.autocast makes them, and their clean-up.

A model is captured under `torch.autocast`, so that its rules hold: matmuls, convolutions and attention take what they
are given in low precision, and autograd differentiates the casts. Programs are captured on the CPU, whose autocast
knows few fp32 islands; for the time of a capture it is given those of CUDA's list, so that a program is the same
everywhere, and some more:

* fp32: exponentials, logarithms, powers, norms, softmax, losses, sums and means (`ISLANDS`), and modules that route
  (`routers`);
* low: embeddings too (`_Embedding`), so that what runs through the residual stream is half as large. The gradient of
  the table is added up in fp32;
* everything else follows its operands, promoted as torch does; ops that ask for operands of one dtype get the widest.

The model's floating-point outputs are cast to fp32, so that a loss outside the model, and the gradient that comes back
from it, are not of low precision.

What is left to be done in the graph: `settled` moves the casts of gradients to where the gradients are made, and marks
them with the dtype in which partial sums of them are to be added up. A parameter's cast is a look at it
(`autopar.graph.LOOKS`): the backward casts anew, and what is sharded is cast before it is gathered.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn
from torch.autograd.function import once_differentiable

from autopar import tree
from autopar.assemble import ROLE
from autopar.graph import BACKWARD, LOOKS, VIEWS, Program, op_name, set_addresses
from autopar.precision import ADDED, Precision

aten = torch.ops.aten
_KEY = "AutocastCPU"
_HALF, _SINGLE = frozenset({torch.bfloat16, torch.float16}), frozenset({torch.float32})

#: Ops of CUDA's autocast that compute in fp32 and that the CPU's leaves as they are (aten/src/ATen/autocast_mode.h,
#: AT_FORALL_FP32 and AT_FORALL_FP32_SET_OPT_DTYPE), and means and variances, which CUDA's leaves to its kernels: here a
#: mean may be made of partial sums.
ISLANDS = (
    "acos", "asin", "cosh", "erfinv", "exp", "expm1", "log", "log10", "log2", "log1p", "reciprocal", "rsqrt", "sinh",
    "tan", "pow.Tensor_Scalar", "pow.Tensor_Tensor", "pow.Scalar", "softplus", "layer_norm", "native_layer_norm",
    "group_norm", "rms_norm", "frobenius_norm.dim", "nuclear_norm", "nuclear_norm.dim", "cosine_similarity",
    "poisson_nll_loss", "cosine_embedding_loss", "nll_loss", "nll_loss2d", "hinge_embedding_loss", "kl_div", "l1_loss",
    "smooth_l1_loss", "huber_loss", "mse_loss", "margin_ranking_loss", "multilabel_margin_loss", "soft_margin_loss",
    "triplet_margin_loss", "multi_margin_loss", "binary_cross_entropy_with_logits", "dist", "pdist", "cdist", "renorm",
    "logsumexp", "prod", "prod.dim_int", "softmax.int", "log_softmax.int", "cumprod", "cumsum",
    "linalg_vector_norm", "linalg_matrix_norm", "sum", "sum.dim_IntList", "norm.Scalar", "norm.ScalarOpt_dim",
    "mean", "mean.dim", "var", "var.dim", "var.correction", "std", "std.dim", "std.correction",
    "var_mean.correction", "std_mean.correction", "cross_entropy_loss",
)  # fmt: skip
#: Ops whose floating-point operands must be of one dtype: the widest of them (CUDA's list of what it promotes).
PROMOTED = ("addcdiv", "addcmul", "atan2", "dot", "index_put", "scatter_add", "scatter.src", "index_add")
#: Products that the CPU's autocast does not know, by namespace.
LOWERED = (("aten", "_grouped_mm"), ("transformers", "grouped_mm_fallback"))
#: What counts as a product of matrices, by parts of the names of ops.
_PRODUCTS = ("mm", "matmul", "linear")


@contextmanager
def casting(precision: Precision, model: nn.Module) -> Iterator[None]:
    """Within, calls of `model` compute in `precision`; nothing where that is as the model is."""
    dtype = precision.dtype
    if dtype is None:
        yield
        return
    with ExitStack() as stack:
        stack.enter_context(_kernels(dtype))
        hook = model.register_forward_hook(lambda module, args, out: _outputs(out))
        stack.callback(hook.remove)
        stack.enter_context(torch.autocast("cpu", dtype=dtype, cache_enabled=False))
        yield


def settled(program: Program, precision: Precision) -> Program:
    """`program`, captured within `casting`, made ready to be planned; done once, in place. Returns it."""
    record = precision.record()
    if not record or program.precision == record:
        return program
    assert not program.precision, f"captured as {program.precision}, asked for {record}"
    _without_detours(program)
    for node in _hoisted(program):
        node.meta[ADDED] = precision.reduce
    program._by_name.clear()
    set_addresses(program.gm.graph)
    program.gm.graph.lint()
    program.precision = record
    digest = hashlib.sha256(f"{program.fingerprint} {precision}".encode())
    program.fingerprint = digest.hexdigest()
    return program


# ---- kernels for the CPU's autocast --------------------------------------------------------------------------------


@contextmanager
def _kernels(dtype: torch.dtype) -> Iterator[None]:
    """Within, the CPU's autocast knows our islands too."""
    libraries = {space: torch.library.Library(space, "IMPL") for space in dict(LOWERED)}
    casts = [("aten", name, _widened) for name in ISLANDS] + [("aten", name, _promoted) for name in PROMOTED]
    try:
        for space, name, cast in (*casts, *((space, name, _lowered(dtype)) for space, name in LOWERED)):
            if (op := _found(name, space)) is not None:
                libraries[space].impl(name, _kernel(op, cast), _KEY)
        libraries["aten"].impl("embedding", _embedding(dtype), _KEY)
        yield
    finally:
        libraries.clear()  # their kernels go with them: nothing else holds them


def _found(name: str, space: str = "aten") -> Any:
    """An op by name and overload; None where this torch, or this process, has none."""
    packet, _, overload = name.partition(".")
    found = getattr(getattr(torch.ops, space), packet, None)
    return getattr(found, overload or "default", None) if found is not None else None


def _kernel(op: Any, cast: Callable[[list[torch.Tensor]], torch.dtype | None]) -> Callable[..., Any]:
    """`op` on operands of the dtype that `cast` gives for the low and fp32 ones among them (None: as they are)."""

    def kernel(*args: Any, **kwargs: Any) -> Any:
        seen: list[torch.Tensor] = []
        _mapped((args, kwargs), lambda x: seen.append(x) if _castable(x) else None)
        dtype = cast(seen)
        if dtype is not None:
            args, kwargs = _mapped((args, kwargs), lambda x: x.to(dtype) if _castable(x) else x)
        with torch.autocast("cpu", enabled=False):
            return op(*args, **kwargs)

    return kernel


def _mapped(value: Any, change: Callable[[torch.Tensor], Any]) -> Any:
    """Arguments with every tensor changed, lists and dicts of them kept."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, dict):
        return {k: _mapped(v, change) for k, v in value.items()}
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        return type(value)(_mapped(v, change) for v in value)
    return value


def _castable(x: torch.Tensor) -> bool:
    """Whether autocast casts it: float64 stays."""
    return x.dtype in _HALF or x.dtype in _SINGLE


def _widened(seen: list[torch.Tensor]) -> torch.dtype | None:
    return torch.float32 if any(t.dtype in _HALF for t in seen) else None


def _promoted(seen: list[torch.Tensor]) -> torch.dtype | None:
    return torch.float32 if len({t.dtype for t in seen}) > 1 else None


def _lowered(dtype: torch.dtype) -> Callable[[list[torch.Tensor]], torch.dtype | None]:
    return lambda seen: dtype


class _Embedding(torch.autograd.Function):
    """Rows of a table in low precision; the gradient, of many rows at one place, is added up in fp32."""

    @staticmethod
    def forward(
        ctx: Any, table: torch.Tensor, indices: torch.Tensor, padding: int, by_freq: bool, dtype: torch.dtype
    ) -> torch.Tensor:
        ctx.save_for_backward(indices)
        ctx.rest = table.shape[0], padding, by_freq
        return aten.embedding(table.to(dtype), indices, padding, by_freq, False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        (indices,) = ctx.saved_tensors
        return aten.embedding_dense_backward(grad.float(), indices, *ctx.rest), None, None, None, None


def _embedding(dtype: torch.dtype) -> Callable[..., torch.Tensor]:
    def kernel(
        weight: torch.Tensor, indices: torch.Tensor, padding_idx: int = -1, by_freq: bool = False, sparse: bool = False
    ) -> torch.Tensor:
        with torch.autocast("cpu", enabled=False):
            if sparse or weight.dtype is not torch.float32:
                return aten.embedding(weight, indices, padding_idx, by_freq, sparse)
            return _Embedding.apply(weight, indices, padding_idx, by_freq, dtype)

    return kernel


def _outputs(out: Any) -> Any:
    """What a model returns, tensors of low precision in fp32."""
    leaves, rebuild = tree.flatten(out)
    if not any(isinstance(v, torch.Tensor) and v.dtype in _HALF for _, v in leaves):
        return out
    return rebuild([v.float() if isinstance(v, torch.Tensor) and v.dtype in _HALF else v for _, v in leaves])


# ---- routers -------------------------------------------------------------------------------------------------------


def routers(graph: fx.Graph) -> list[str]:
    """Paths of the modules that route: whose products with parameters decide, by a top-k, what others compute.

    graph: as traced, forward first, `meta["module"]` on its ops. A module that also computes products of another kind
    is none: they would be in fp32 too. Nor is one whose top-k is only returned, or counted.
    """
    products = [n for n in graph.nodes if _is_product(n)]
    found: set[str] = set()
    for chosen in graph.nodes:
        if chosen.target is aten.topk.default and any(_is_product(n) for n in _reached(chosen, lambda n: n.users)):
            before = _reached(chosen, lambda n: () if _is_product(n) else n.all_input_nodes)
            found.update(n.meta.get("module", "") for n in before if _is_product(n) and _with_parameter(n))
    forward = {p: [n for n in products if (n.meta.get("module", "") + ".").startswith(p + ".")] for p in found if p}
    return sorted(p for p, inside in forward.items() if all(n.meta.get("module", "") == p for n in inside))


def _is_product(node: fx.Node) -> bool:
    return node.op == "call_function" and any(part in op_name(node) for part in _PRODUCTS)


def _reached(start: fx.Node, steps: Callable[[fx.Node], Iterable[fx.Node]]) -> set[fx.Node]:
    seen, stack = {start}, [start]
    while stack:
        new = [n for n in steps(stack.pop()) if n not in seen]
        seen.update(new)
        stack += new
    return seen


def _with_parameter(node: fx.Node) -> bool:
    """Whether an operand is a parameter or buffer, or a look at one."""
    for source in node.all_input_nodes:
        while source.target in LOOKS and source.all_input_nodes:
            source = source.all_input_nodes[0]
        if source.op == "placeholder" and source.meta[ROLE].kind == "state":
            return True
    return False


@contextmanager
def in_fp32(model: nn.Module, paths: Iterable[str]) -> Iterator[None]:
    """Within, the modules of `model` at `paths` compute in fp32 whatever autocast says."""
    before: list[bool] = []

    def enter(module: nn.Module, args: Any, kwargs: Any) -> Any:
        before.append(torch.is_autocast_enabled("cpu"))
        torch.set_autocast_enabled("cpu", False)
        return _mapped((args, kwargs), lambda x: x.float() if x.dtype in _HALF else x)

    def leave(module: nn.Module, args: Any, out: Any) -> None:
        if before:
            torch.set_autocast_enabled("cpu", before.pop())

    with ExitStack() as stack:
        for path in paths:
            module = model.get_submodule(path)
            stack.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(leave, always_call=True).remove)
        yield


# ---- clean-up of the graph -----------------------------------------------------------------------------------------


def _without_detours(program: Program) -> None:
    """Take out casts from fp32 to low precision and back to fp32, where nobody reads what is between them.

    The model's own casts and those of autocast meet so, in the backward of a norm as Hugging Face writes it; the value
    is then not rounded.
    """
    graph = program.gm.graph

    def casts(node: fx.Node, before: frozenset[torch.dtype], behind: frozenset[torch.dtype]) -> bool:
        if node.target is not aten._to_copy.default:
            return False
        (source,) = node.all_input_nodes
        return source.meta["val"].dtype in before and node.meta["val"].dtype in behind

    ends = {sink.node for sink in program.sinks}
    for node in [n for n in graph.nodes if casts(n, _SINGLE, _HALF)]:  # none of them leads back to fp32
        back = list(node.users)
        if any(u.name in ends or u.meta.get("phase") != node.meta["phase"] for u in back):
            continue
        if back and all(casts(u, _HALF, _SINGLE) for u in back):
            (source,) = node.all_input_nodes
            for user in back:
                user.replace_all_uses_with(source)
                graph.erase_node(user)
            graph.erase_node(node)


def _hoisted(program: Program) -> list[fx.Node]:
    """The casts of parameters' gradients to the parameters' precision, moved to before the views that lead to them."""
    graph = program.gm.graph
    found = _gradient_casts(program)
    casts = []
    for node in found:
        chain = list(node.all_input_nodes)
        while chain[-1].target in VIEWS and len(chain[-1].users) == 1 and chain[-1].meta["phase"] == BACKWARD:
            (source,) = chain[-1].all_input_nodes
            chain.append(source)
        source, views = chain[-1], chain[-2::-1]
        if not views or not isinstance(source.meta["val"], torch.Tensor):
            casts.append(node)
            continue
        with graph.inserting_before(views[0]):
            made = graph.call_function(aten._to_copy.default, (source,), dict(node.kwargs))
        made.meta = {**node.meta, "val": _as(source.meta["val"], node.meta["val"].dtype)}
        views[0].replace_input_with(source, made)
        for view in views:
            view.meta = {**view.meta, "val": _as(view.meta["val"], node.meta["val"].dtype)}
        program.sinks = tuple(
            replace(sink, node=views[-1].name) if sink.node == node.name else sink for sink in program.sinks
        )
        node.replace_all_uses_with(views[-1])
        graph.erase_node(node)
        casts.append(made)
    return casts


def _as(val: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The fake tensor in another dtype, strides kept."""
    with val.fake_mode:  # type: ignore[attr-defined]  # every value of a program is fake
        return torch.empty_strided(val.shape, val.stride(), dtype=dtype, device=val.device)


def _gradient_casts(program: Program) -> list[fx.Node]:
    """Casts from low precision that lead to gradients of parameters through moves and sums alone."""
    ends = [program.node(str(s.node)) for s in program.sinks if s.kind == "grad" and s.node is not None]
    seen: dict[fx.Node, None] = dict.fromkeys(ends)
    stack, found = list(ends), []
    while stack:
        node = stack.pop()
        if node.op != "call_function":
            continue
        if node.target is aten._to_copy.default and node.args[0].meta["val"].dtype in _HALF:  # type: ignore[union-attr]
            found.append(node)
        elif node.target in LOOKS or node.target is aten.add.Tensor:
            for source in node.all_input_nodes:
                if source not in seen:
                    seen[source] = None
                    stack.append(source)
    order = {n: i for i, n in enumerate(program.gm.graph.nodes)}
    return sorted((n for n in found if n.meta["phase"] == BACKWARD), key=order.__getitem__)


__all__ = ["ISLANDS", "casting", "in_fp32", "routers", "settled"]
