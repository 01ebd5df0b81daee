"""From a traced joint graph to a `Program`: sources and sinks by name, the graph cleaned up.

The last step of capture. What torch calls the parts of its joint graph stays in `autopar/capture.py`, which puts a
`Role` on every placeholder and every result; this file knows roles only.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from autopar.call import Returned
from autopar.canonical import canonicalise
from autopar.errors import CaptureError
from autopar.graph import Program, Sink, Source, is_op, op_name, resolve, results, set_addresses
from autopar.param_views import separate_parameter_views

#: Where a placeholder of a traced graph carries its Role, and the output node a list of them (None: no value).
ROLE = "role"


@dataclass(frozen=True)
class Role:
    """What a placeholder or a result of a joint graph stands for.

    kind: of a placeholder: state (a parameter or buffer, `name`), input (`index` in the call), tangent (of the output
    at `index`); of a result: output (`index`), buffer (the new value of `name`), grad (of parameter `name`).
    """

    kind: str
    name: str = ""
    index: int = -1


@dataclass
class Traced:
    """A traced call of a model.

    Attributes:
        gm: the joint graph, roles on placeholders and output.
        inputs: names of the tensors of the call, in order.
        flatten, batch_dims: as in `Program`.
        returned: what the forward returned.
        tied: every parameter and buffer name -> the first name of the same memory.
        params, buffers: fake tensors by name, each memory once.
        training: with the backward.
        module: makes a graph module, as `fx.GraphModule` does, of constants (or a module that has them) and a graph.
    """

    gm: fx.GraphModule
    inputs: list[str]
    flatten: Callable[[tuple[Any, ...], dict[str, Any]], list[torch.Tensor]]
    batch_dims: dict[str, int]
    returned: Returned
    tied: dict[str, str]
    params: dict[str, torch.Tensor]
    buffers: dict[str, torch.Tensor]
    training: bool
    module: Callable[[Any, fx.Graph], fx.GraphModule]


def assemble(traced: Traced) -> Program:
    """The program of a traced call; its graph is consumed.

    Raises:
        CaptureError: nothing to train, a parameter without a gradient, or what `canonicalise` refuses.
    """
    gm, graph, tied = traced.gm, traced.gm.graph, traced.tied
    attributes = {n.target: getattr(gm, str(n.target)) for n in graph.nodes if n.op == "get_attr"}
    places = _Places(graph, tied)
    aliases = {name: tuple(n for n, first in tied.items() if first == name and n != name) for name in tied}

    outputs, mutated, grads = _results(graph, tied)
    if traced.training:
        _check_gradients(traced.returned.reached, tied, places, grads)
    sources: list[tuple[Source, fx.Node]] = []
    for kind, names in (("param", traced.params), ("buffer", traced.buffers)):
        for name, tensor in names.items():
            node = places.tensors.get(name) or places.add(graph, tensor)
            trainable = kind == "param" and traced.training and tensor.requires_grad
            sources.append((Source(kind, name, "", trainable, aliases[name]), node))
    sources += [(Source("input", n, ""), places.inputs[i]) for i, n in enumerate(traced.inputs)]

    returned = traced.returned
    paths = [_output_name(leaf.path) for leaf, is_tensor in zip(returned.leaves, returned.is_tensor) if is_tensor]
    sources += [(Source("tangent", paths[i], ""), node) for i, node in places.tangents.items()]
    sinks: list[tuple[Sink, fx.Node | None]] = []
    remaining = iter(outputs)
    for leaf, is_tensor, cut in zip(returned.leaves, returned.is_tensor, returned.cut):
        sink = Sink("output", _output_name(leaf.path), None, 0, leaf.value, cut)
        sinks.append((sink, next(remaining) if is_tensor else None))
    sinks += [(Sink("buffer", name, None), node) for name, node in mutated.items()]
    num_forward = len(sinks)
    sinks += [(Sink("grad", s.name, None), grads.get(s.name)) for s, _ in sources if s.trainable]

    clean = canonicalise(
        graph,
        [(node, f"{source.kind}_{source.name}") for source, node in sources],
        [node for _, node in sinks],
        num_forward,
    )
    parameters = {n for (s, _), n in zip(sources, clean.placeholders) if s.kind == "param"}
    if separate_parameter_views(clean.graph, parameters):
        set_addresses(clean.graph)
    final_sources = [replace(s, node=n.name) for (s, _), n in zip(sources, clean.placeholders)]
    if clean.seed is not None:
        final_sources.append(Source("seed", "seed", clean.seed.name))
    final_sinks = [
        sink if node is None else replace(sink, node=resolve(node).node.name, index=resolve(node).index)
        for (sink, _), node in zip(sinks, clean.results)
    ]
    used = {n.target for n in clean.graph.nodes if n.op == "get_attr"}
    program = Program(
        gm=traced.module({str(k): v for k, v in attributes.items() if k in used}, clean.graph),
        sources=tuple(final_sources),
        sinks=tuple(final_sinks),
        training=traced.training,
        fingerprint="",
        pack=returned.pack,
        flatten=traced.flatten,
        batch_dims=dict(traced.batch_dims),
        notes=list(returned.notes),
    )
    program.fingerprint = _fingerprint(program)
    return program


def _output_name(path: str) -> str:
    """ "loss", "logits[0]"; of an output without names: "output", "output[0]"."""
    return path if path and not path.startswith("[") else f"output{path}"


class _Places:
    """The placeholders of the joint graph by what they stand for.

    Attributes:
        tensors: parameter or buffer name -> its placeholder; those of tied names have been merged.
        inputs: position in the call -> placeholder.
        tangents: position in the outputs -> placeholder.
    """

    def __init__(self, graph: fx.Graph, tied: dict[str, str]) -> None:
        self.tensors: dict[str, fx.Node] = {}
        self.inputs: dict[int, fx.Node] = {}
        self.tangents: dict[int, fx.Node] = {}
        for node in [n for n in graph.nodes if n.op == "placeholder"]:
            role: Role = node.meta[ROLE]
            if role.kind == "input":
                self.inputs[role.index] = node
            elif role.kind == "tangent":
                self.tangents[role.index] = node
            elif tied[role.name] in self.tensors:
                node.replace_all_uses_with(self.tensors[tied[role.name]])
            else:
                self.tensors[tied[role.name]] = node

    @staticmethod
    def add(graph: fx.Graph, tensor: torch.Tensor) -> fx.Node:
        """A placeholder for a tensor the graph does not use."""
        with graph.inserting_before(next(iter(graph.nodes))):
            node = graph.placeholder("unused")
        node.meta["val"] = tensor.detach()
        return node


def _results(graph: fx.Graph, tied: dict[str, str]) -> tuple[list[fx.Node], dict[str, fx.Node], dict[str, fx.Node]]:
    """Nodes of the outputs, of new buffer values by buffer, of gradients by parameter (those of tied names added)."""
    output = graph.output_node()
    outputs: dict[int, fx.Node] = {}
    mutated: dict[str, fx.Node] = {}
    grads: dict[str, fx.Node] = {}
    values: Any = output.args[0]
    for node, role in zip(values, output.meta[ROLE]):
        if node is None or role is None:  # the gradient of something that has none
            continue
        if role.kind == "output":
            outputs[role.index] = node
        elif role.kind == "buffer":
            mutated[tied[role.name]] = node
        elif tied[role.name] in grads:
            before = grads[tied[role.name]]
            with graph.inserting_before(output):
                total = graph.call_function(torch.ops.aten.add.Tensor, (before, node))
            total.meta["val"] = node.meta["val"]
            grads[tied[role.name]] = total
        else:
            grads[tied[role.name]] = node
    return [outputs[i] for i in sorted(outputs)], mutated, grads


def _check_gradients(reached: set[str], tied: dict[str, str], places: _Places, grads: dict[str, fx.Node]) -> None:
    """Torch drops a backward without a word in some situations (the meta device): refuse rather than not train.

    `reached`: the parameters that autograd reaches from the outputs.
    """
    if not places.tangents:
        raise CaptureError(
            "no output depends on a trainable parameter in a differentiable way, so there is nothing to train; return "
            "a loss computed from the parameters, or capture under torch.no_grad()"
        )
    lost = sorted({tied[name] for name in reached} - set(grads))
    if lost:
        raise CaptureError(
            f"{len(lost)} of {len(reached)} parameters that the loss depends on get no gradient, the first is "
            f"{lost[0]!r}; if that is meant, set requires_grad=False on them"
        )


def _fingerprint(program: Program) -> str:
    """Names, shapes and dtypes of what goes in, and the ops in order; neither weights nor device."""
    digest = hashlib.sha256()
    vals = {n.name: n.meta["val"] for n in program.gm.graph.nodes if n.op == "placeholder"}
    for source in program.sources:
        val = vals[source.node]
        digest.update(f"{source.kind} {source.name} {tuple(val.shape)} {val.dtype} {source.trainable}\n".encode())
    for node in program.gm.graph.nodes:
        if is_op(node):
            digest.update(f"{op_name(node)} {[tuple(r.shape) for r in results(node) if r is not None]}\n".encode())
    return digest.hexdigest()
