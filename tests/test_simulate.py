"""The simulator: its bounds, the serial price, and the order of the overlap pass, on planned and on random plans."""

import dataclasses
import functools
import inspect
import itertools

import pytest
import torch
from torch import nn

from autopar.capture import capture
from autopar.costmodel import simulate as simulator
from autopar.costmodel.devices import DEVICES, Link
from autopar.costmodel.items import items_of
from autopar.costmodel.planner import plan
from autopar.costmodel.price import price
from autopar.costmodel.shuffle import random_plan
from autopar.costmodel.simulate import COMPUTE, simulate
from autopar.mesh import Mesh
from autopar.passes.bucket import BUCKET_BYTES
from autopar.passes.overlap import overlap
from tests.zoo import ZOO

SLOW = dataclasses.replace(
    DEVICES["cpu"], name="slow", flops={"float32": 1e7}, bandwidth=1e7, launch=1e-6, fast=Link(1e7, 1e-5),
    slow=Link(5e6, 2e-5), node=2,
)  # fmt: skip
FREE = {"dp": Link(float("inf"), 0.0), "tp": Link(float("inf"), 0.0)}


@functools.cache
def zoo(name):
    model, batch = ZOO[name](seed=0, dropout=0.0)
    return items_of(capture(model, (), batch))


@functools.cache
def plans(name):
    mesh = Mesh.parse("dp=2,tp=2")
    program = zoo(name).program
    strategies = ({"dp": "zero3", "tp": "tp"}, {"dp": "zero1", "tp": "zero2"})
    pinned = [plan(program, mesh, device=SLOW, constraints=s) for s in strategies]
    return [*pinned, *(random_plan(program, mesh, seed) for seed in range(2))]


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_bounds_and_the_serial_price(name):
    for made in plans(name):
        cost = price(zoo(name), made, SLOW)
        serial = cost.compute_s + cost.comm_s + cost.update_s
        alone = simulate(zoo(name), made, SLOW, overlap=False)
        assert alone.step_s == pytest.approx(serial, rel=1e-9)
        found = simulate(zoo(name), made, SLOW)
        assert found.step_s - found.copies_s <= serial * (1 + 1e-9)  # buckets take copies
        assert found.step_s >= max(found.compute_s, *found.streams.values()) + found.update_s
        assert found.step_s == pytest.approx(found.compute_s + found.exposed_s + found.update_s)
        assert found.comm_s == pytest.approx(sum(found.streams.values()))
        assert set(found.streams) == {"dp", "tp"}


def test_computation_loses_time_beside_communication():
    for made in plans("llama"):
        found = simulate(zoo("llama"), made, SLOW)
        half, all_ = (simulate(zoo("llama"), made, dataclasses.replace(SLOW, beside=b)) for b in (0.5, 1.0))
        beside = min(found.comm_s - found.exposed_s, found.compute_s)
        assert half.exposed_s - found.exposed_s == pytest.approx(0.5 * beside)
        assert found.step_s < half.step_s < all_.step_s
        assert half.step_s == pytest.approx(half.compute_s + half.exposed_s + half.update_s)
        assert (half.compute_s, half.comm_s, half.update_s) == (found.compute_s, found.comm_s, found.update_s)


def test_free_links_leave_computation():
    device = dataclasses.replace(SLOW, launch=0.0)
    for made in plans("llama"):
        found = simulate(zoo("llama"), made, device, FREE)
        assert found.comm_s == 0.0 and found.exposed_s == pytest.approx(0.0, abs=1e-12)
        assert set(found.streams) == {"dp+tp"}  # one link, one stream
        assert found.step_s == pytest.approx(found.compute_s + found.update_s)


def test_a_faster_link_is_never_slower():
    for made in plans("gpt2"):
        times = [
            simulate(zoo("gpt2"), made, SLOW, {"dp": Link(b, 1e-5), "tp": Link(2 * b, 1e-6)}).step_s
            for b in (1e5, 1e6, 1e7, 1e9)
        ]
        assert times == sorted(times, reverse=True)


def test_spans_keep_to_their_streams():
    made = plans("llama")[0]
    found = simulate(zoo("llama"), made, SLOW, spans=True)
    rows = {}
    for span in found.spans:
        rows.setdefault(span.stream, []).append(span)
    assert set(rows) == {COMPUTE, "dp", "tp"}
    for spans in rows.values():
        assert all(a.end <= b.start + 1e-12 for a, b in itertools.pairwise(spans))
    assert max(s.end for s in found.spans) == pytest.approx(found.step_s)
    assert sum(s.end - s.start for s in rows["dp"]) == pytest.approx(found.streams["dp"])
    assert not simulate(zoo("llama"), made, SLOW).spans


class Deep(nn.Module):
    """Large weights: every gather is its own bucket, and computation takes as long."""

    def __init__(self, depth=6, width=2048):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(depth))

    def forward(self, x):
        for layer in self.layers:
            x = torch.relu(layer(x))
        return x.sum()


@functools.cache
def deep():
    with torch.device("meta"):
        model = Deep()
    return items_of(capture(model, (torch.zeros(4096, 2048, device="meta"),)))


def test_gathers_run_ahead_and_reductions_behind():
    """Of ZeRO-3 on a link that keeps up, only the first gather of each phase and the last reduction are seen."""
    link = {"dp": Link(400e9, 1e-6)}
    made = plan(deep().program, Mesh.parse("dp=8"), device="h100", constraints={"dp": "zero3"})
    found = simulate(deep(), made, "h100", link, spans=True)
    sent = [s for s in found.spans if s.stream == "dp"]
    assert found.exposed_s < 0.35 * found.comm_s
    gathers = [s for s in sent if s.name.startswith("all_gather")]
    computed = [s for s in found.spans if s.stream == COMPUTE and "/mm" in s.name]
    assert gathers[1].start < computed[0].start + 1e-12  # the second travels while the first is used


def test_windows_hold():
    made = plan(deep().program, Mesh.parse("dp=8"), device="h100", constraints={"dp": "zero3"})
    slow = simulate(deep(), made, "h100", {"dp": Link(1e9, 1e-6)})
    assert slow.step_s >= slow.comm_s  # bound by the link
    assert slow.exposed_s > 0.9 * (slow.comm_s - slow.compute_s)


def test_small_collectives_share_a_latency():
    mesh, late = Mesh.parse("dp=2"), {"dp": Link(1e12, 1.0)}
    made = plan(zoo("gpt2").program, mesh, device=SLOW, constraints={"dp": "ddp"})
    serial, merged = (simulate(zoo("gpt2"), made, SLOW, late, overlap=o).comm_s for o in (False, True))
    assert merged < 0.2 * serial


def test_buckets_take_copies_unless_products_are_written_into_them():
    copies = {}
    for stage in ("ddp", "zero2", "zero3"):
        made = plan(zoo("llama").program, Mesh.parse("dp=2"), device=SLOW, constraints={"dp": stage})
        copies[stage] = simulate(zoo("llama"), made, SLOW).copies_s
        assert simulate(zoo("llama"), made, SLOW, overlap=False).copies_s == 0  # nothing shares a bucket
    assert 0 < copies["ddp"] < copies["zero2"] < copies["zero3"]


def test_numbers_of_the_passes():
    assert simulator.BUCKET_BYTES == BUCKET_BYTES
    parameters = inspect.signature(overlap).parameters
    assert parameters["ahead_bytes"].default == simulator.AHEAD_BYTES
    assert parameters["pending_bytes"].default == simulator.PENDING_BYTES


def test_copies_to_the_host_are_no_communication():
    """They have streams of their own, take no time from computation, and count with what the optimizer copies."""
    program = zoo("llama").program
    made = plan(program, Mesh.parse("dp=2,tp=2"), device="h100", constraints={"dp": "ddp", "tp": "tp"})
    here = simulate(program, made, "h100")
    ops = [i.name for i in zoo("llama").items if i.kind == "op" and i.name.startswith("fwd:")]
    away = dataclasses.replace(made, saved=dict.fromkeys(ops, "offload"))
    found = simulate(program, away, "h100")
    ways = found.streams["to host"] + found.streams["from host"]
    assert here.host_s == 0 < ways == pytest.approx(found.host_s)
    assert 0 < found.comm_s == pytest.approx(sum(found.streams.values()) - ways)
    serial = simulate(program, away, "h100", overlap=False)
    assert serial.step_s == pytest.approx(price(program, away, "h100").step_s)
    there = {n: dataclasses.replace(s, state="host") for n, s in away.storage.items()}
    assert simulate(program, dataclasses.replace(away, storage=there), "h100").host_s > found.host_s
    alone = dataclasses.replace(plan(program, Mesh.parse("dp=1"), device="h100"), saved=away.saved)
    quiet, loud = (simulate(program, alone, dataclasses.replace(DEVICES["h100"], beside=b)) for b in (0.0, 1.0))
    assert quiet == loud and quiet.comm_s == 0 < quiet.host_s
    # On a mesh it is lost beside collectives, and beside them alone.
    quiet, loud = (simulate(program, away, dataclasses.replace(DEVICES["h100"], beside=b)) for b in (0.0, 1.0))
    assert 0 <= loud.exposed_s - quiet.exposed_s <= found.comm_s
