"""The executor on gloo processes against a replay in one; and what it does on streams, without a GPU."""

from __future__ import annotations

import gc
import threading
from collections import defaultdict

import pytest
import torch
import torch.distributed as dist
from executor_toys import (
    ONE,
    SYNCHRONOUS,
    made,
    same,
    state,
    toys,
)
from harness import Ranks

from autopar.pipeline.clock import Timeline
from autopar.pipeline.comms import needed
from autopar.pipeline.schedules import SCHEDULES
from autopar.pipeline.table import COMPUTE, homes
from autopar.runtime.executor import Executor
from autopar.runtime.replay import replay
from autopar.runtime.transport import GroupTransport, Lost, connect
from autopar.runtime.work import Message

# ---- processes -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ranks():
    with Ranks(4) as group:
        yield group


def lines(ranks):
    """Of 4 processes: one pipeline of 4, or two of 2."""
    return [range(4)] if ranks == 4 else [[0, 2], [1, 3]]


def trained(name, ranks, micro, pair=False, runs=1, **options):
    """What the stages of this rank hold after so many runs of one executor."""
    table = made(name, ranks, micro)
    transport = connect(lines(ranks), timeout=60.0)
    if options.pop("staged", False):
        transport._staged = True
    transport.lazy = options.pop("lazy", False)
    home = homes(table)
    rank = transport.alarm.rank
    works = {s: work for s, work in toys(len(home), pair).items() if home[s] == rank}
    executor = Executor(table, rank, works, transport, timeout=60.0, **options)
    for _ in range(runs):
        executor.run()
    assert all(not work.saved and not work.mid for work in works.values())
    return state(works), executor.spans


def replayed(name, ranks, micro, pair=False, runs=1):
    table = made(name, ranks, micro)
    works = toys(len(homes(table)), pair)
    for _ in range(runs):
        replay(table, works)
    return state(works)


def joined(results):
    return {stage: value for found, _ in results for stage, value in found.items()}


@pytest.mark.parametrize("ranks_of_a_pipeline", [2, 4])
@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_processes_come_to_the_same_bits_as_a_replay(ranks, name, ranks_of_a_pipeline):
    micro = 8 if name in SYNCHRONOUS else 3
    results = ranks.run(trained, name, ranks_of_a_pipeline, micro, name != "gpipe")
    assert same(joined(results), replayed(name, ranks_of_a_pipeline, micro, name != "gpipe"))


@pytest.mark.parametrize(
    "options", [{"in_flight": 1}, {"staged": True}, {"lazy": True}, {"runs": 3}, {"record": True}], ids=str
)
@pytest.mark.parametrize("name", ["zb-v", "paci"])
def test_however_messages_travel(ranks, name, options):
    results = ranks.run(_trained_with, name, options)
    assert same(joined(results), replayed(name, 4, 4, True, options.get("runs", 1)))
    if options.get("record"):
        timeline = Timeline(tuple(tuple(spans) for _, spans in results))
        assert [[s.action for s in row] for row in timeline.spans] == [
            [a for a in row if a.kind in COMPUTE] for row in made(name, 4, 4)
        ]
        ends = {s.action: s for row in timeline.spans for s in row}
        for action, span in ends.items():  # one clock for all: nothing begins before what it needs has ended
            need = needed(action, max(a.stage for a in ends))
            if need is not None:
                makers = [ends.get(need._replace(kind=kind)) for kind in ("F" if need.kind == "SF" else "BI")]
                assert all(m is None or m.end <= span.start for m in makers)


def _trained_with(name, options):
    return trained(name, 4, 4, True, **options)


def listeners():
    """Threads that listen for failures: while a pipeline lives, and when nobody has it any more."""
    gc.collect()
    kept = connect(lines(4), timeout=60.0)
    table, rank = made("1f1b", 4, 4), kept.alarm.rank
    Executor(table, rank, {rank: toys(4)[rank]}, kept, timeout=60.0, record=True).run()
    during = [t.name for t in threading.enumerate()].count("autopar-alarm")
    del kept
    gc.collect()
    return during, [t.name for t in threading.enumerate()].count("autopar-alarm")


def test_nobody_listens_for_a_pipeline_that_is_gone(ranks):
    for during, after in ranks.run(listeners):
        assert (during, after) == (1, 0)


# ---- NCCL, as far as it goes without a GPU ---------------------------------------------------------------------------


class Streamed:
    """A handle of NCCL's: `wait` returns at once; it is done after some looks."""

    def __init__(self, looks):
        self.looks = looks

    def is_completed(self):
        self.looks -= 1
        return self.looks < 0

    def wait(self):
        pass


def test_on_streams_the_host_waits_at_the_end_only(monkeypatch):
    """What there is of NCCL that needs no GPU: handles that complete later."""
    handles = defaultdict(list)
    for name in ("isend", "irecv"):

        def begin(tensor, name=name, **where):
            handles[name].append(Streamed(looks[name]))
            return handles[name][-1]

        monkeypatch.setattr(dist, name, begin)

    class Group:
        def rank(self):
            return 0

        def size(self):
            return 2

        def get_group_store(self):
            return dist.HashStore()

    monkeypatch.setattr(dist, "get_backend", lambda group: "nccl")
    transport = GroupTransport(Group(), device="cuda")
    assert transport.lazy
    transport.device = torch.device("cpu")
    looks = {"isend": 3, "irecv": 2}
    message = Message([ONE])
    arrival = transport.receive(message, 1, 0)
    assert arrival.wait(0.1).shape == (2,) and handles["irecv"][0].looks == 2
    transport.settle(5.0)
    assert handles["irecv"][0].looks == -1
    sent = transport.send(torch.zeros(2), 1, 0)
    assert not sent.done()
    sent.wait(5.0)
    assert handles["isend"][0].looks == -1
    looks = {"isend": 1 << 40, "irecv": 1 << 40}
    transport.receive(message, 1, 0)
    with pytest.raises(Lost, match=r"waits for what it has begun to receive: not within 0\.05 s"):
        transport.settle(0.05)
    with pytest.raises(Lost, match=r"not within 0\.05 s"):
        transport.send(torch.zeros(2), 1, 0).wait(0.05)
