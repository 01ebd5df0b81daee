"""What only a GPU can tell: its attention kernels, its random numbers, and that a module computes there what it should.

Skipped where there is none. `benchmarks/gpu.py` is the long form.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

import autopar
from autopar import driver
from autopar.capture import capture
from autopar.mesh import Mesh
from autopar.passes import Target, attention, edit
from autopar.passes.device import to_device
from autopar.runtime import groups
from tests.harness import Ranks
from tests.test_device_pass import CASES, INF, attend, full, numbers, some, train
from tests.widen import double, widen_to_float64
from tests.zoo import ZOO

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
aten = torch.ops.aten
CUDA = Target(torch.device("cuda", 0))
#: Largest absolute error that rounding explains, of operands near one.
ROUNDING = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 6e-2, torch.float16: 1e-2}


def on(device, batch):
    return {k: v.to(device) for k, v in batch.items()}


def test_this_is_made_for_the_gpu():
    assert torch.cuda.get_device_capability() >= (8, 0), "flash attention is chosen here as for these"


@pytest.mark.parametrize("name", CASES)
def test_math_form_there_equals_the_kernel_here(name):
    tensors, options = CASES[name]
    gm, inputs = attend(*tensors, **options)
    out = to_device(edit.copy(gm), CUDA)
    for got, want in zip(out(*(t.cuda() for t in inputs)), gm(*inputs)):
        torch.testing.assert_close(got.cpu(), want, rtol=1e-11, atol=1e-12)


def masked_out(rows, columns, dtype):
    mask = numbers(2, 1, rows, columns).to(dtype)
    mask[0, 0, 2], mask[1, 0, :, 3] = -INF, -INF
    return mask


@pytest.mark.parametrize(
    "dtype, rows, columns, width, mask, causal_, want",
    [
        (torch.bfloat16, 40, 40, 64, None, True, "flash"),
        (torch.float16, 40, 24, 128, None, False, "flash"),
        (torch.bfloat16, 64, 64, 256, None, True, "flash"),
        (torch.bfloat16, 256, 256, 64, None, True, "cudnn"),
        (torch.float16, 128, 256, 128, None, False, "cudnn"),
        (torch.bfloat16, 40, 24, 64, None, True, "efficient"),
        (torch.bfloat16, 40, 37, 64, "rows", False, "efficient"),
        (torch.float32, 40, 40, 64, None, True, "efficient"),
        (torch.float32, 24, 40, 4, None, True, "efficient"),
        (torch.float32, 40, 37, 8, "rows", False, "efficient"),
        (torch.float32, 64, 32, 16, "keys", False, "efficient"),
        (torch.float32, 33, 48, 16, "queries", False, "efficient"),
    ],
)
@pytest.mark.parametrize("strided", [True, False])
def test_kernels_equal_the_kernel_of_the_cpu(strided, dtype, rows, columns, width, mask, causal_, want):
    tensors = [t.to(dtype) for t in some(rows, columns, 2, width)]
    shapes = {"keys": (1, 1, 1, columns), "queries": (2, 1, rows, 1)}
    bias = None if mask is None else masked_out(rows, columns, dtype) if mask == "rows" else None
    if mask in shapes:
        bias = numbers(*shapes[mask]).to(dtype)
    gm, inputs = attend(*tensors, bias, causal_)
    kernels = driver.target_of(groups.Grid(Mesh.parse(1), 0, torch.device("cuda", 0))).kernels
    if want == "cudnn" and "cudnn" not in kernels:
        pytest.skip("torch does not prefer cudnn here")
    assert attention.form(tensors[0], tensors[1], bias, causal_, kernels) == want
    exact, _ = attend(*(t.double() for t in tensors), bias if bias is None else bias.double(), causal_)
    for node in list(gm.graph.nodes):  # as in a step, where operands are contiguous
        if node.target in (attention.FORWARD, attention.BACKWARD):
            for x in node.all_input_nodes:
                with gm.graph.inserting_before(node):
                    node.replace_input_with(x, edit.call(gm.graph, aten.contiguous.default, x, like=node))
    out = to_device(edit.copy(gm), replace(CUDA, kernels=kernels))
    out = attention.keep_strides(out) if strided else out
    results = out(*(t.cuda() for t in inputs))
    wanted = exact(*(t.double() for t in inputs))
    for index, (got, value) in enumerate(zip(results, wanted)):
        if index == 1 and mask == "rows":  # what rows without keys sum up to is the kernel's own business
            got, value = got.cpu()[1], value[1]
        near = ROUNDING[dtype] * max(1.0, float(value.abs().max()))
        torch.testing.assert_close(got.double().cpu(), value, rtol=0, atol=near, msg=f"result {index}")


def test_random_numbers_are_those_of_the_cpu():
    for seed in (0, 123456789012345678):
        here, there = torch.tensor(seed), torch.full((), seed, dtype=torch.int64, device="cuda")
        for stream in (0, 7):
            shape = [33, 65]
            one, two = (torch.ops.autopar.uniform(s, stream, shape).cpu() for s in (here, there))
            assert torch.equal(one, two)
            one, two = (torch.ops.autopar.normal(s, stream, shape).cpu() for s in (here, there))
            torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-7)
            rows, columns = torch.arange(3, 20), torch.arange(40)
            one = torch.ops.autopar.uniform_at(here, stream, [rows, columns], shape)
            two = torch.ops.autopar.uniform_at(there, stream, [rows.cuda(), columns.cuda()], shape)
            assert torch.equal(one, two.cpu())


def close(got, want, rtol=1e-9, floor=1e-6):
    """Errors over the largest magnitude of each tensor; of one that is next to nothing, over `floor` of the largest."""
    assert got.keys() == want.keys()
    largest = max(float(v.abs().max()) for v in want.values())
    for name, value in want.items():
        scale = max(float(value.abs().max()), floor * largest)
        error = float((got[name].cpu() - value.cpu()).abs().max()) / scale
        assert error < rtol, f"{name} is off by {error:.1e}"


def told(found, *losses):
    """The gradients, and the losses of these steps."""
    names = [f"loss {step}" for step in losses]
    return {k: v for k, v in found.items() if k in names or k.startswith("gradient")}


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bert"])
def test_a_step_equals_the_plain_model(name):
    with widen_to_float64():
        model, batch = double(*ZOO[name](0))
        model, batch = model.cuda(), on("cuda", batch)
        pm = autopar.compile(copy.deepcopy(model), 1, example=batch)
        assert all(p.device.type == "cuda" for p in (*pm.parameters(), *pm.buffers()))
        got, want = train(pm, batch), train(model, batch)
    close(told(got, 0, 1, 2), told(want, 0, 1, 2))


@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
def test_a_step_in_float32_is_near_the_plain_model(name):
    model, batch = ZOO[name](0)
    model, batch = model.cuda(), on("cuda", batch)
    if name != "t5":  # so that the mask is one of the arguments
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        batch["attention_mask"][0, -3:] = 0
    pm = autopar.compile(copy.deepcopy(model), 1, example=batch)
    close(told(train(pm, batch), 0), told(train(model, batch), 0), 1e-3, 1e-2)


def test_dropout_masks_are_those_of_the_cpu():
    model, batch = double(*ZOO["mlp_dropout"](0, dropout=0.5))
    found = []
    for device in ("cpu", "cuda"):
        pm = autopar.compile(copy.deepcopy(model).to(device), 1, example=on(device, batch), device="h200")
        torch.manual_seed(3)
        out = pm(**on(device, batch))
        loss = out if isinstance(out, torch.Tensor) else out[0]
        loss.backward()
        found.append({n: p.grad.cpu() for n, p in pm.named_parameters()} | {"loss 0": loss.detach().cpu()})
    close(found[1], found[0], 1e-10)


def test_arguments_come_from_either_side_and_outputs_are_there():
    model = nn.Linear(4, 4).cuda()
    pm = autopar.compile(model, 1, example=(torch.ones(2, 4),))
    x = torch.randn(2, 4)
    for given in (x, x.cuda(), x.pin_memory()):
        out = pm(given)
        assert out.device.type == "cuda"
        torch.testing.assert_close(out, model(x.cuda()))


def test_a_program_and_its_plan_are_those_of_the_cpu():
    model, batch = ZOO["llama"](0)
    here = capture(model, (), batch)
    plan = autopar.plan(model, 1, example=batch, device="h200")
    there = model.cuda()
    assert capture(there, (), on("cuda", batch)).digest() == here.digest()
    pm = autopar.compile(there, 1, example=on("cuda", batch), plan=plan)
    assert pm.plan.fingerprint == plan.fingerprint


class Held(nn.Module):
    """Holds a plain tensor, and names its device."""

    def __init__(self):
        super().__init__()
        self.linear, self.table = nn.Linear(4, 4), torch.arange(4.0)

    def forward(self, x):
        """A loss."""
        y = self.linear(x) * self.table + torch.ones(4, device=x.device)
        return (y + torch.zeros(4, device="cuda").cuda()).square().mean()


def test_constants_and_names_of_devices():
    model = Held().cuda()
    model.table = model.table.cuda()
    pm = autopar.compile(model, 1, example=(torch.ones(2, 4, device="cuda"),))
    x = torch.randn(2, 4, device="cuda")
    torch.testing.assert_close(pm(x), model(x))
    assert model.table.device.type == "cuda"


def test_autocast_is_refused():
    model = nn.Linear(4, 4).cuda()
    pm = autopar.compile(model, 1, example=(torch.ones(2, 4),))
    with pytest.raises(autopar.RuntimeUseError, match=r"autocast for cuda is on.*model.to\(torch.bfloat16\)"):
        with torch.autocast("cuda", dtype=torch.bfloat16):
            pm(torch.ones(2, 4))


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_half_precision_is_near_the_plain_model(backend):
    model, batch = ZOO["llama"](0)
    model, batch = model.to(torch.bfloat16).cuda(), on("cuda", batch)
    pm = autopar.compile(copy.deepcopy(model), 1, example=batch, backend=backend)
    ours, plain = pm(**batch), model(**batch)
    ours.loss.backward()
    plain.loss.backward()
    torch.testing.assert_close(ours.loss, plain.loss, rtol=2e-2, atol=2e-2)
    for (name, p), q in zip(model.named_parameters(), pm.parameters()):
        scale = float(p.grad.abs().max())
        assert float((p.grad - q.grad).abs().max()) <= 0.1 * scale, name


def shared_case(mesh, strategies):
    """On ranks that share the GPU."""
    with widen_to_float64():
        model, batch = double(*ZOO["llama"](0))
        model, batch = model.cuda(), on("cuda", batch)
        pm = autopar.compile(copy.deepcopy(model), mesh, example=batch, constraints=strategies)
        assert pm._state.grid.staged
        for module in (pm, model):
            module(**batch).loss.backward()
        norm = nn.utils.clip_grad_norm_(pm.parameters(), 1.0)
        want = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        torch.testing.assert_close(full(norm), want, rtol=1e-9, atol=1e-12)
        for module in (pm, model):
            torch.optim.AdamW(module.parameters(), eps=1e-3).step()
        state = pm.full_state_dict()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(state[name], value.cpu(), rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize(
    "mesh, strategies", [("dp=2", {"dp": "ddp"}), ("dp=2", {"dp": "zero3"}), ("tp=2", {"tp": "tp_sp"})]
)
def test_ranks_that_share_the_gpu(mesh, strategies):
    with Ranks(2) as ranks:
        ranks.run(shared_case, mesh, strategies)
