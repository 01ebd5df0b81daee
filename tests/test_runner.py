"""The runner and the verifier: what they report, and that they notice."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from graphs import Build
from torch import fx

from autopar.errors import PassError
from autopar.mesh import Mesh
from autopar.passes import collectives as c
from autopar.passes.bind import WAIT, bind, functional
from autopar.passes.bucket import bucket
from autopar.passes.cancel import cancel
from autopar.passes.overlap import overlap
from autopar.passes.runner import describe, pass_name, run
from autopar.passes.verify import verify

aten = torch.ops.aten


def small():
    """y = x @ gather(p); the gradient of p."""
    b = Build()
    p, x, t = b.put("p0", 2, 6), b.put("x0", 3, 4), b.put("t0", 3, 6)
    y = b(aten.mm.default, x, b(c.all_gather, p, "dp", 0))
    grad = b(aten.mm.default, b(aten.permute.default, x, [1, 0]), t)
    return b, b.done([y], [b(c.local_chunk, b(c.all_reduce, grad, "dp", "sum"), "dp", 0)])


def find(gm, target):
    return next(n for n in gm.graph.nodes if n.target is target)


def nothing(gm):
    return gm


# ---- runner --------------------------------------------------------------------------------------------------------


def test_report_and_dump(tmp_path, monkeypatch):
    b, gm = small()
    before = describe(gm)
    monkeypatch.setenv("AUTOPAR_DUMP", str(tmp_path))
    passes = [cancel, partial(bucket, bucket_bytes=100), nothing]
    out, report = run(gm, passes, mesh=b.mesh, title="rank0")
    assert describe(gm) == before, "the runner works on a copy"
    assert [s.name for s in report.stages] == ["cancel", "bucket", "nothing"]
    assert report.stages[0].changes == {"all_reduce": -1, "local_chunk": -1, "reduce_scatter": 1}
    assert report.stages[2].changes == {} and report.stages[2].nodes == len(out.graph.nodes)
    assert report.seconds == sum(s.seconds for s in report.stages)
    lines = str(report).splitlines()
    assert lines[0].startswith("rank0: 3 passes, ")
    assert lines[1].endswith("all_reduce -1, local_chunk -1, reduce_scatter +1") and lines[3].endswith(
        "no change of ops"
    )
    files = sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*.txt"))
    assert files == ["rank0/00-input.txt", "rank0/01-cancel.txt", "rank0/02-bucket.txt", "rank0/03-nothing.txt"]
    assert (tmp_path / "rank0/00-input.txt").read_text() == before


def test_no_dump_unless_asked(tmp_path, monkeypatch):
    monkeypatch.delenv("AUTOPAR_DUMP", raising=False)
    monkeypatch.chdir(tmp_path)
    run(small()[1], [nothing])
    assert list(tmp_path.iterdir()) == []


def test_describe_reads_well():
    _, gm = small()
    assert describe(gm) == (
        "p0: f64[2, 6] = placeholder  # fwd\n"
        "x0: f64[3, 4] = placeholder  # fwd\n"
        "t0: f64[3, 6] = placeholder  # bwd\n"
        "all_gather: f64[4, 6] = all_gather(p0, dp, 2, 0)  # fwd\n"
        "mm_default: f64[3, 6] = mm(x0, all_gather)  # fwd\n"
        "permute_default: f64[4, 3] = permute(x0, [1, 0])  # fwd\n"
        "mm_default_1: f64[4, 6] = mm(permute_default, t0)  # bwd\n"
        "all_reduce: f64[4, 6] = all_reduce(mm_default_1, dp, 2, sum)  # bwd\n"
        "local_chunk: f64[2, 6] = local_chunk(all_reduce, dp, 2, 0)  # bwd\n"
        "return mm_default, local_chunk\n"
    )


def test_a_whole_pipeline():
    b, gm = small()
    steps = [cancel, bucket, partial(bind, mesh=b.mesh, coordinates=(1,), group_names={"dp": "g"}), overlap]
    out, report = run(gm, steps, mesh=b.mesh, deep=True)
    assert [s.name for s in report.stages] == ["cancel", "bucket", "bind", "overlap"]
    assert find(out, functional.reduce_scatter_tensor.default).args[1:] == ("sum", 2, "g")


def test_pass_name_sees_through_partials():
    assert pass_name(partial(partial(bucket, bucket_bytes=1), bucket_bytes=2)) == "bucket"


def break_dim(gm):
    node = find(gm, c.all_gather)
    node.args = (*node.args[:3], 2)
    return gm


def drop_output(gm):
    out = next(n for n in gm.graph.nodes if n.op == "output")
    out.args = (out.args[0][:1],)
    return gm


def swap_output(gm):
    out = next(n for n in gm.graph.nodes if n.op == "output")
    out.args = ((out.args[0][1], out.args[0][0]),)
    return gm


def drop_placeholder(gm):
    gm.graph.erase_node(gm.graph.find_nodes(op="placeholder", target="unused")[0])
    return gm


def disorder(gm):
    find(gm, aten.mm.default).append(find(gm, c.all_gather))
    return gm


def crash(gm):
    return gm.graph.no_such_thing


def refuse(gm):
    raise PassError("node x is odd")


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (break_dim, r"after pass break_dim: all_gather \(all_gather\) works on dim 2; its operand has shape \(2, 6\)"),
        (drop_output, "after pass drop_output: the graph had 2 outputs, it has 1"),
        (swap_output, r"after pass swap_output: output 0 was \(\(3, 6\), torch.float64\), it is \(\(2, 6\)"),
        (disorder, "after pass disorder: .*all_gather"),
        (crash, "pass crash: AttributeError: .*no_such_thing"),
        (refuse, "pass refuse: node x is odd"),
    ],
)
def test_runner_names_the_pass_and_the_node(step, message):
    b, gm = small()
    with pytest.raises(PassError, match=message):
        run(gm, [cancel, step, nothing], mesh=b.mesh)


def test_runner_checks_what_it_is_given():
    with pytest.raises(PassError, match="before the first pass: all_gather"):
        run(break_dim(small()[1]), [])


def test_runner_notices_a_lost_placeholder():
    b = Build()
    x, _ = b.put("x0", 2), b.graph.placeholder("unused")
    _.meta.update(x.meta)
    with pytest.raises(PassError, match="after pass drop_placeholder: the graph had 2 placeholders, it has 1"):
        run(b.done([x]), [drop_placeholder])


# ---- verifier, symbolic level --------------------------------------------------------------------------------------


def _set(target, **meta):
    def change(gm):
        find(gm, target).meta.update(meta)

    return change


def _args(target, *args):
    def change(gm):
        node = find(gm, target)
        node.args = (node.args[0], *args)

    return change


def _forget(gm):
    del find(gm, c.all_gather).meta["val"]


def _method(gm):
    node = find(gm, aten.mm.default)
    with gm.graph.inserting_before(node):
        node.replace_input_with(node.args[0], gm.graph.call_method("relu", (node.args[0],)))


def _too_few(gm):
    node = find(gm, c.all_reduce)
    node.args = node.args[:3]


def _nested(gm):
    out = next(n for n in gm.graph.nodes if n.op == "output")
    out.args = ((out.args[0],),)


def _wait_unbound(gm):
    node = find(gm, aten.mm.default)
    with gm.graph.inserting_before(node):
        wait = gm.graph.call_function(WAIT, (node.args[0],))
        wait.meta.update(node.args[0].meta)
    node.replace_input_with(node.args[0], wait)


META = torch.empty(3, 6, dtype=torch.float64, device="meta")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_forget, r"all_gather \(all_gather\) has no meta\['val'\]"),
        (_set(c.all_gather, val=META), r"all_gather \(all_gather\) says .*\(3, 6\); its operand gives .*\(4, 6\)"),
        (_set(c.all_gather, phase="later"), "has phase 'later'; write 'fwd' or 'bwd'"),
        (_set(c.all_gather, phase="bwd"), "forward node mm_default reads backward node all_gather"),
        (_args(c.all_gather, "pp", 2, 0), "names axis 'pp'; mesh dp=2 has dp"),
        (_args(c.all_gather, "dp", 4, 0), "says axis dp has 4 parts; mesh dp=2 has 2"),
        (_args(c.all_gather, "dp", 2, -1), r"works on dim -1; its operand has shape \(2, 6\)"),
        (_args(c.all_reduce, "dp", 2, "avg"), "reduces by 'avg'; write one of sum, max, min"),
        (_args(c.local_chunk, "dp", 2, 7), r"works on dim 7; its operand has shape \(4, 6\)"),
        (_too_few, r"all_reduce takes \(x, axis, parts, reduce\)"),
        (_method, "is a call_method; a local graph has placeholders, constants and calls only"),
        (_nested, "output 0 of the local graph is a tuple"),
        (_wait_unbound, "but the graph is not bound"),
    ],
)
def test_verify_notices(change, message):
    b, gm = small()
    verify(gm, mesh=b.mesh, deep=True)
    change(gm)
    with pytest.raises(PassError, match=message):
        verify(gm, mesh=b.mesh)


def test_verify_notices_what_cannot_be_cut():
    b = Build("dp=4")
    x = b.put("x0", 4, 6)
    gm = b.done([b(c.reduce_scatter, x, "dp", 0, "sum")])
    find(gm, c.reduce_scatter).args = (x, "dp", 4, 1, "sum")
    with pytest.raises(PassError, match=r"cuts dim 1 of shape \(4, 6\) into 4 equal parts"):
        verify(gm)


def test_deep_verify_runs_every_op():
    b, gm = small()
    find(gm, aten.permute.default).args = (find(gm, aten.permute.default).args[0], [0, 1])
    verify(gm, mesh=b.mesh)
    with pytest.raises(PassError, match=r"permute_default \(aten.permute\) says .*\(4, 3\); it computes .*\(3, 4\)"):
        verify(gm, mesh=b.mesh, deep=True)


def test_no_output():
    with pytest.raises(PassError, match="ends in one output node"):
        verify(fx.GraphModule({}, fx.Graph()))


# ---- verifier, bound level -----------------------------------------------------------------------------------------


def _unwaited(gm):
    wait = find(gm, WAIT)
    wait.replace_all_uses_with(wait.args[0])
    gm.graph.erase_node(wait)


def _dropped(gm):
    wait = find(gm, WAIT)
    wait.replace_all_uses_with(gm.graph.find_nodes(op="placeholder", target="x0")[0])
    gm.graph.erase_node(wait)


def _waited_twice(gm):
    wait = find(gm, WAIT)
    with gm.graph.inserting_after(wait):
        more = gm.graph.call_function(WAIT, wait.args)
        more.meta.update(wait.meta)


def _waits_for_nothing(gm):
    wait = find(gm, WAIT)
    with gm.graph.inserting_after(wait):
        more = gm.graph.call_function(WAIT, (wait,))
        more.meta.update(wait.meta)


def _symbolic_left(gm):
    x = gm.graph.find_nodes(op="placeholder", target="x0")[0]
    with gm.graph.inserting_after(gm.graph.find_nodes(op="placeholder", target="t0")[0]):
        c.emit(gm.graph, c.all_reduce, x, "dp", 2, "sum")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_unwaited, "reads all_gather_into_tensor_default .* without wait_tensor"),
        (_dropped, "is never waited for"),
        (_waited_twice, "is waited for 2 times"),
        (_waits_for_nothing, "waits for wait_tensor_default, which is no collective"),
        (_symbolic_left, r"all_reduce \(all_reduce\) is symbolic, but the graph is bound"),
    ],
)
def test_verify_notices_on_the_bound_level(change, message):
    b, gm = small()
    bound = bind(gm, b.mesh, (0,), {"dp": "g"})
    verify(bound, mesh=Mesh.parse("dp=2"), deep=True)
    change(bound)
    with pytest.raises(PassError, match=message):
        verify(bound)
