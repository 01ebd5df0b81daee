"""Which of the buffers that a step replaces must be kept as they were, for a backward that runs the forward again."""

from __future__ import annotations

from autopar.graph import MOVES, Program


def read_besides(program: Program) -> list[str]:
    """The replaced buffers on whose old values anything but their own new ones depends, in the order of the sources.

    With them those whose new value is an old one, moved: it may be a view of what it is to be written to. Running
    statistics of batch norm are none of these. Asked is the captured graph, which says what depends on what: in graphs
    that run, values are written into the memory of others.
    """
    ends = {s.name: s.node for s in program.sinks if s.kind == "buffer" and s.node is not None}
    buffers = (s for s in program.of_kind("buffer") if s.name in ends)
    return [s.name for s in buffers if _read(program, s.node, s.name, ends[s.name])]


def _read(program: Program, place: str, name: str, end: str) -> bool:
    reached = {program.node(place)}
    todo = list(reached)
    while todo:
        new = [n for n in todo.pop().users if n not in reached]
        reached.update(new)
        todo += new
    value = program.node(end)
    while value.op == "call_function" and value.target in MOVES:
        value = value.all_input_nodes[0]
    others = {s.node for s in program.sinks if s.kind != "buffer" or s.name != name}
    return value.op == "placeholder" or not others.isdisjoint(n.name for n in reached)


__all__ = ["read_besides"]
