"""Programs speak of the CPU, and run on other devices: capture, the device's graph, its attention, staged collectives.

What needs no GPU. A Target that is the CPU by another name runs all of it in float64; the meta device checks schemas
and shapes of the GPU's kernels.
"""

from __future__ import annotations

import copy
import operator
from dataclasses import replace

import pytest
import torch
from parity import feeds, max_error, run_global, run_local
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

import autopar
from autopar import driver, passes
from autopar.capture import capture
from autopar.costmodel import planner
from autopar.costmodel.rules import rule_for
from autopar.errors import CaptureError, RuntimeUseError
from autopar.mesh import Mesh
from autopar.modes import host_of
from autopar.passes import attention, edit
from autopar.passes import device as device_pass
from autopar.passes.device import to_device
from autopar.passes.runner import describe
from autopar.passes.verify import verify
from autopar.runtime import groups
from autopar.runtime.storage import whole
from tests.harness import Ranks
from tests.widen import double, widen_to_float64
from tests.zoo import ZOO

aten = torch.ops.aten
META = passes.Target(torch.device("meta"))
#: Not equal to the host, so that everything is rewritten for it, and yet the CPU.
ELSEWHERE = passes.Target(torch.device("cpu", 0))
INF = float("inf")


# ---- attention -----------------------------------------------------------------------------------------------------


def attend(q, k, v, grad, mask=None, causal_=False, scale=None):
    """A local graph of the CPU's attention and its backward: output, statistics, three gradients."""
    graph = fx.Graph()
    tensors = {"q": q, "k": k, "v": v, "grad": grad} | ({} if mask is None else {"mask": mask})
    at = {}
    for name, tensor in tensors.items():
        at[name] = graph.placeholder(name)
        at[name].meta.update(val=tensor.to("meta"), phase="fwd")
    named = {"attn_mask": at.get("mask"), "scale": scale}

    def picks(target, args, count, phase):
        node = graph.call_function(target, args, named)
        values, options = fx.map_arg((args, named), lambda n: n.meta["val"])
        node.meta.update(val=target(*values, **options), phase=phase)
        found = [graph.call_function(operator.getitem, (node, i)) for i in range(count)]
        for i, pick in enumerate(found):
            pick.meta.update(val=node.meta["val"][i], phase=phase)
        return found

    three = (at["q"], at["k"], at["v"])
    out, sums = picks(attention.FORWARD, (*three, 0.0, causal_), 2, "fwd")
    grads = picks(attention.BACKWARD, (at["grad"], *three, out, sums, 0.0, causal_), 3, "bwd")
    graph.output((out, sums, *grads))
    return fx.GraphModule({}, graph), list(tensors.values())


def numbers(*shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=dtype)


def some(rows, columns, groups_=4, width=8, dtype=torch.float64):
    query, key = numbers(2, 4, rows, width, dtype=dtype), numbers(2, groups_, columns, width, dtype=dtype)
    return query, key, key.flip(2) * 0.5, query.flip(1) + 1


def holes():
    """A mask with rows and a column that are masked out altogether."""
    mask = numbers(2, 1, 5, 7)
    mask[0, 0, 2], mask[1, 0, :, 3], mask[1, 0, 4] = -INF, -INF, -INF
    return mask


CASES = {
    "plain": (some(5, 7), {}),
    "scale": (some(5, 7), {"scale": 0.3}),
    "causal": (some(6, 6), {"causal_": True}),
    "causal, more keys": (some(5, 7), {"causal_": True}),
    "causal, more queries": (some(7, 5), {"causal_": True}),
    "causal and mask": (some(5, 7), {"causal_": True, "mask": numbers(2, 4, 5, 7)}),
    "mask of two dims": (some(5, 7), {"mask": numbers(5, 7)}),
    "mask by key": (some(5, 7), {"mask": numbers(2, 1, 1, 7)}),
    "mask by query": (some(5, 7), {"mask": numbers(1, 4, 5, 1)}),
    "rows masked out": (some(5, 7), {"mask": holes()}),
    "rows masked by a finite number": (some(5, 7), {"mask": holes().clamp(min=-1e30)}),
    "groups of heads": (some(5, 7, 2), {"mask": numbers(2, 4, 5, 7)}),
    "one group": (some(6, 6, 1), {"causal_": True}),
}


@pytest.mark.parametrize("name", CASES)
def test_math_form_equals_the_kernel_of_the_cpu(name):
    tensors, options = CASES[name]
    gm, inputs = attend(*tensors, **options)
    out = to_device(edit.copy(gm), ELSEWHERE)
    verify(out, deep=True)
    assert not any("attention" in str(n.target) for n in out.graph.nodes)
    for got, want in zip(out(*inputs), gm(*inputs)):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_math_form_in_half_precision_adds_up_in_float32():
    gm, inputs = attend(*some(5, 7, width=6, dtype=torch.bfloat16))
    out = to_device(edit.copy(gm), ELSEWHERE)
    for got, want in zip(out(*inputs), gm(*inputs)):
        assert got.dtype is want.dtype
        torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)


BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64
FORMS = [
    (BF16, 40, 40, 64, None, True, "flash"),
    (BF16, 40, 24, 64, None, False, "flash"),
    (torch.float16, 40, 40, 256, None, False, "flash"),
    (BF16, 40, 24, 64, None, True, "efficient"),
    (BF16, 40, 40, 264, None, False, "efficient"),
    (BF16, 40, 40, 64, (2, 1, 40, 40), False, "efficient"),
    (F32, 40, 37, 4, (1, 37), False, "efficient"),
    (F32, 64, 32, 8, (2, 4, 64, 1), False, "efficient"),
    (F32, 33, 33, 8, None, True, "efficient"),
    (F32, 40, 40, 6, None, False, "math"),
    (BF16, 40, 40, 12, None, False, "math"),
    (BF16, 40, 40, 64, (2, 1, 40, 40), True, "math"),
    (F64, 40, 40, 64, None, True, "math"),
    (BF16, 40, 0, 64, None, False, "math"),
]


@pytest.mark.parametrize("heads", [4, 2])
@pytest.mark.parametrize("dtype, rows, columns, width, mask, causal_, want", FORMS)
def test_forms_and_their_shapes(dtype, rows, columns, width, mask, causal_, want, heads):
    meta = {"dtype": dtype, "device": "meta"}
    q, k = torch.empty(2, 4, rows, width, **meta), torch.empty(2, heads, columns, width, **meta)
    bias = None if mask is None else torch.empty(mask, **meta)
    assert attention.form(q, k, bias, causal_) == want
    gm, inputs = attend(q, k, k, q, bias, causal_)
    out = to_device(edit.copy(gm), META)
    verify(out, deep=True)
    names = {str(n.target) for n in out.graph.nodes if "attention" in str(n.target)}
    assert len(names) == (0 if want == "math" else 2) and all(want in name for name in names)
    for got, node in zip(out(*inputs), edit.output_node(gm).args[0]):
        assert got.shape == node.meta["val"].shape and got.dtype == node.meta["val"].dtype
    for node in out.graph.nodes:
        if node.target is attention.EFFICIENT_BACKWARD:  # the output lies in memory as the forward made it
            turned = node.args[5]
            assert turned.args[1] == [0, 2, 1, 3] and turned.args[0].target is aten.contiguous.default
    if want == "flash":
        assert attention.form(q, k, bias, causal_, frozenset()) == "efficient"


@pytest.mark.parametrize("heads", [4, 2])
def test_form_of_cudnn(heads):
    q, k = (torch.empty(2, h, n, 64, dtype=BF16, device="meta") for h, n in ((4, 128), (heads, 256)))
    both = frozenset({"flash", "cudnn"})
    assert attention.form(q, k, None, False, both) == attention.form(q, q, None, True, both) == "cudnn"
    assert attention.form(q, k, None, True, both) == "efficient", "queries and keys differ in number"
    assert attention.form(q, k[:, :, :120], None, False, both) == attention.form(q, k, None, False) == "flash"
    gm, inputs = attend(q, k, k, q)
    out = to_device(edit.copy(gm), passes.Target(torch.device("meta"), both))
    verify(out, deep=True)
    assert sum("cudnn" in str(n.target) for n in out.graph.nodes) == 2
    for got, node in zip(out(*inputs), edit.output_node(gm).args[0]):
        assert got.shape == node.meta["val"].shape and got.dtype == node.meta["val"].dtype


def test_a_mask_of_another_dtype_is_not_rounded():
    q = torch.empty(2, 4, 8, 8, dtype=BF16, device="meta")
    assert attention.form(q, q, torch.empty(8, 8, device="meta"), False) == "math"


def test_operands_keep_aligned_strides():
    x = torch.empty(2, 16, 3, 8).transpose(1, 2)
    assert attention.rows_aligned(x) is x
    for bad in (torch.empty(2, 16, 8, 3).mT, torch.empty(2, 16, 25)[..., 1:].unflatten(2, (3, 8)).transpose(1, 2)):
        assert attention.rows_aligned(bad).is_contiguous() and not bad.is_contiguous()
    q = torch.empty(2, 4, 8, 8, dtype=BF16, device="meta")
    gm, inputs = attend(q, q, q, q)
    for node in list(gm.graph.nodes):
        if node.target in (attention.FORWARD, attention.BACKWARD):
            for x in node.all_input_nodes:
                with gm.graph.inserting_before(node):
                    node.replace_input_with(x, edit.call(gm.graph, aten.contiguous.default, x, like=node))
    out = attention.keep_strides(to_device(edit.copy(gm), META))
    targets = [n.target for n in out.graph.nodes]
    assert targets.count(attention.rows_aligned) == 3 + 5 and targets.count(aten.contiguous.default) == 1  # statistics
    assert [t.shape for t in out(*inputs)] == [t.shape for t in gm(*inputs)]


# ---- whole graphs --------------------------------------------------------------------------------------------------


def planned(model, batch, mesh, strategies):
    program = capture(model, (), batch)
    return program, planner.plan(program, Mesh.parse(mesh), device="h200", constraints=strategies)


def test_graphs_for_another_device_compute_the_same():
    model, batch = ZOO["llama"](0)
    with widen_to_float64():
        program, plan = planned(model.double(), batch, "dp=2,tp=2", {"dp": "zero3", "tp": "tp_sp"})
        local, _ = passes.lower(program, plan, rule_for, ELSEWHERE)
        assert not any(n.target in (attention.FORWARD, attention.BACKWARD) for n in local.gm.graph.nodes)
        values = feeds(program, model, (), batch)
        error, where = max_error(run_local(local, values), run_global(program, values))
    assert error < 1e-10, where


def test_nothing_of_the_cpu_is_left():
    model, batch = ZOO["llama"](0)
    program, plan = planned(model.to(BF16), batch, "dp=2,tp=2", {"dp": "zero3", "tp": "tp"})
    for device, eager in (("cuda:0", True), ("cuda:0", False), ("meta", True)):
        target = passes.Target(torch.device(device))
        parts = passes.cut(passes.lower(program, plan, rule_for, target)[0])
        for part in (parts.forward, parts.backward):
            gm, _ = passes.finish(part, plan.mesh, (1, 0), {"dp": "dp", "tp": "tp"}, "part", eager, target)
            text = describe(gm)
            assert "_scaled_dot_product_flash_attention" in text and "for_cpu" not in text
            assert "device=cpu" not in text and "attn_mask" not in text, "the mask is causal, and made by nobody"
            assert "device=" + device in text or part is parts.backward


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("eager", [True, False])
def test_graphs_run_on_imagined_gpus(name, dtype, eager, monkeypatch):
    """Every op takes what it is given, all of it on the GPU, and gives what its node says."""
    model, batch = ZOO[name](0)
    program, plan = planned(model.to(dtype), batch, "dp=1", {})
    imagined = FakeTensorMode()

    def move(gm, name, there):
        """A constant is imagined there, where none can be moved."""
        with imagined:
            setattr(gm, name, torch.empty(getattr(gm, name).shape, dtype=getattr(gm, name).dtype, device=there))

    monkeypatch.setattr(device_pass, "_move", move)
    monkeypatch.setattr(passes, "direct", lambda gm: gm)  # torch's own functions look for the GPU
    target = passes.Target(torch.device("cuda", 0))
    parts = passes.cut(passes.lower(program, plan, rule_for, target, fuses=not eager)[0], fuses=not eager)
    saved = None
    for part in (parts.forward, parts.backward):
        gm, _ = passes.finish(part, plan.mesh, (0,), {}, "part", eager, target)
        with imagined:
            vals = [n.meta["val"] for n in edit.placeholders(gm)]
            inputs = [torch.empty(v.shape, dtype=v.dtype, device="cuda:0") for v in vals]
            if saved is not None:  # with the strides they have
                inputs[: len(saved)] = saved
            results = gm(*inputs)
        for got, node in zip(results, edit.output_node(gm).args[0]):
            if got is not None:
                want = node.meta["val"]
                assert (got.device, got.shape, got.dtype) == (target.device, want.shape, want.dtype), node.name
        saved = [*(inputs[i] for i in parts.saved_inputs), *results[parts.num_outputs :]]


def test_constants_and_factories_move():
    graph = fx.Graph()
    table = graph.get_attr("table")
    table.meta.update(val=torch.empty(3, device="meta"), phase="fwd")
    made = graph.call_function(aten.arange.default, (3,))
    made.meta.update(val=torch.empty(3, device="meta"), phase="fwd")
    cast = graph.call_function(aten._to_copy.default, (made,), {"dtype": F32, "device": torch.device("cpu")})
    cast.meta.update(val=torch.empty(3, device="meta"), phase="fwd")
    total = edit.call(graph, aten.add.Tensor, table, cast, like=table)
    graph.output((total,))
    gm = fx.GraphModule({"table": torch.ones(3)}, graph)
    out = to_device(edit.copy(gm), META)
    assert out()[0].is_meta and gm.table.device.type == "cpu" and gm()[0].device.type == "cpu"
    assert describe(out).count("device=meta") == 2


def test_random_numbers_are_those_of_the_cpu():
    """They come from the seed by integer ops, and no op of theirs is rewritten."""
    model, batch = double(*ZOO["mlp_dropout"](0, dropout=0.5))
    program, plan = planned(model, batch, "dp=2", {"dp": "ddp"})
    values = feeds(program, model, (), batch, seed=11)
    here, there = (run_local(passes.lower(program, plan, rule_for, t)[0], values) for t in (passes.HOST, ELSEWHERE))
    assert here.keys() == there.keys()
    for key, value in here.items():
        assert value is None or torch.equal(value, there[key]), key


# ---- capture -------------------------------------------------------------------------------------------------------


class Placed(nn.Module):
    """Names its device in every way there is."""

    def __init__(self, device):
        super().__init__()
        self.weight, self.device = nn.Parameter(torch.empty(4, 4, device=device)), torch.device(device)
        self.register_buffer("shift", torch.ones(4, device=device))
        name, number = (device, 0) if device == "cuda" else (device, device)
        self.names = (device, name, number)

    def forward(self, x):
        """A loss."""
        text, name, number = self.names
        x = x.to(self.device) + torch.zeros(4, device=text) + x.new_zeros(4, device=self.device)
        x = x + torch.arange(4, device=number) + torch.as_tensor(1.5, device=name)
        x = x.cuda() if text == "cuda" else x
        y = nn.functional.linear(x.to(number).to(name, torch.float32), self.weight) + self.shift
        with torch.device(self.device):
            y = y + torch.ones(4)
        return y.square().mean()


def test_a_model_on_cuda_is_captured_as_on_the_cpu():
    want = capture(Placed("cpu"), (torch.ones(2, 4),))
    with FakeTensorMode():
        model, x = Placed("cuda"), torch.ones(2, 4, device="cuda")
    assert model.weight.device.type == "cuda"
    program = capture(model, (x,))
    assert program.digest() == want.digest()
    assert all(n.meta["val"].device.type == "cpu" for n in program.gm.graph.nodes if n.op == "placeholder")
    assert model.weight.device.type == "cuda" and model.shift.device.type == "cuda"


def test_names_of_devices():
    assert [host_of(d) for d in ("cuda", "cuda:1", 0, torch.device("cuda", 3))] == [torch.device("cpu")] * 4
    assert [host_of(d) for d in ("cpu", "meta", None, True)] == ["cpu", "meta", None, True]


class Apart(nn.Linear):
    """Reaches a tensor on the GPU that no module knows."""

    def forward(self, x):
        """A loss."""
        return (super().forward(x) * self.held[0]).sum()


class Cast(nn.Linear):
    """Casts as autocast does on CUDA."""

    def forward(self, x):
        """A loss."""
        torch.set_autocast_enabled("cuda", True)
        try:
            return super().forward(x).sum()
        finally:
            torch.set_autocast_enabled("cuda", False)


def test_what_cannot_be_captured_on_the_cpu_names_its_line():
    model = Apart(4, 4)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.held = [torch.ones(4, device="cuda")]
    with pytest.raises(CaptureError, match=r"cannot capture Apart at .*test_device_pass.py:"):
        capture(model, (torch.ones(2, 4),))
    with pytest.raises(CaptureError, match=r"test_device_pass.py:\d+ .*autocast for CUDA .*model.to\(torch.bfloat16\)"):
        capture(Cast(4, 4), (torch.ones(2, 4),))


# ---- where it runs -------------------------------------------------------------------------------------------------


class On(nn.Module):
    """Says that its parameter is on a device that is not here."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def parameters(self, recurse=True):
        """One, on that device."""
        yield type("Parameter", (), {"device": torch.device(self.kind)})()


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without CUDA")
def test_devices_that_are_not_there_are_refused():
    with pytest.raises(RuntimeUseError, match=r"CUDA devices is asked for .* this torch .* keep the model on the CPU"):
        autopar.compile(On("cuda"), 1)


@pytest.mark.parametrize("kind", ["mps", "xpu"])
def test_other_devices_are_refused(kind):
    with pytest.raises(RuntimeUseError, match=f"{kind}.*runs on CPU and CUDA devices: use model.cpu"):
        autopar.compile(On(kind), 1)


def full(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def train(model, batch):
    """Losses of three steps, gradients of the first, parameters after the last."""
    optimizer, found = torch.optim.AdamW(model.parameters(), lr=1e-2), {}
    for step in range(3):
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        found[f"loss {step}"] = loss.detach()
        if step == 0:
            found |= {f"gradient of {n}": full(p.grad).clone() for n, p in model.named_parameters()}
        optimizer.step()
    return found | {n: full(p).detach() for n, p in model.named_parameters()}


def staged_case(mesh, strategies):
    """On every rank: as if it were on a GPU that it shares, in float64."""
    model, batch = ZOO["llama"](0)
    must, target = groups._must_stage, driver.target_of
    groups._must_stage = lambda device, control: True
    driver.target_of = lambda grid, onednn: replace(ELSEWHERE, staged=grid.staged)
    groups._grids.clear()
    try:
        with widen_to_float64():
            model = model.double()
            plain = copy.deepcopy(model)
            pm = autopar.compile(model, mesh, example=batch, constraints=strategies, device="cpu")
            got, want = train(pm, batch), train(plain, batch)
            state = pm.full_state_dict()
    finally:
        groups._must_stage, driver.target_of = must, target
        groups._grids.clear()
    assert pm._state.grid.staged
    graphs = [g for s in pm._state.steps.values() for g in (s.forward, s.backward)]
    copies = [n for g in graphs for n in g.graph.nodes if n.kwargs.get("device") == torch.device("cpu")]
    assert copies and all("_to_copy" in str(n.target) for n in copies)
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-8, atol=1e-11, msg=name)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(state[name], value, rtol=1e-8, atol=1e-11, msg=name)


def staged_cases():
    for mesh, strategies in (("dp=2", {"dp": "ddp"}), ("dp=2", {"dp": "zero3"}), ("tp=2", {"tp": "tp_sp"})):
        staged_case(mesh, strategies)


def test_ranks_that_share_a_gpu_talk_through_the_host():
    with Ranks(2) as ranks:
        ranks.run(staged_cases)


def whole_cases():
    """On every rank: gathered through the host, a tensor is what torch says it is."""
    grid = replace(groups.connect("dp=2", torch.device("cpu")), staged=True)
    rank = grid.rank
    for place in (Shard(0), Replicate(), Partial("sum"), Partial("max")):
        local = torch.tensor([1.0, 5.0]) if place == Replicate() else torch.tensor([rank + 1.0, 3.0 - rank])
        value = DTensor.from_local(local, grid.device_mesh, [place], run_check=False)
        torch.testing.assert_close(whole(value, grid), value.full_tensor())
    with pytest.raises(RuntimeUseError, match="cannot be gathered where ranks share a GPU"):
        whole(DTensor.from_local(local, grid.device_mesh, [Partial("avg")], run_check=False), grid)


def test_what_is_gathered_through_the_host():
    with Ranks(2) as ranks:
        ranks.run(whole_cases)
