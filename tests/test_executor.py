"""One rank's row of a table: what is called when, what travels, and that all of it comes to the plain computation."""

from __future__ import annotations

import pytest
import torch
from executor_toys import (
    ASYNCHRONOUS,
    ONE,
    ROWS,
    SYNCHRONOUS,
    WIDTH,
    Noted,
    Steps,
    made,
    plain,
    same,
    state,
    toys,
    walk,
)

from autopar.errors import PipelineError, RankMismatchError, RuntimeUseError, ScheduleError
from autopar.pipeline.clock import Timeline
from autopar.pipeline.comms import forwards, with_comms
from autopar.pipeline.schedules import one_f_one_b, paci
from autopar.pipeline.table import COMPUTE, KINDS, from_csv, homes
from autopar.runtime.executor import HANDLERS, Executor
from autopar.runtime.loopback import Loopback
from autopar.runtime.replay import replay
from autopar.runtime.work import Form, Message

# ---- one process -----------------------------------------------------------------------------------------------------


def test_every_kind_of_action_has_a_handler():
    assert set(HANDLERS) == set(KINDS)


@pytest.mark.parametrize("pair", [False, True])
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("name", SYNCHRONOUS)
def test_a_flushed_schedule_gives_the_gradients_of_the_plain_loop(name, ranks, pair):
    table = made(name, ranks, 8)
    stages = len(homes(table))
    works = toys(stages, pair)
    replay(table, works)
    assert same(state(works), state(plain(stages, [range(8)], pair)))
    assert all(work.grad.abs().sum() > 0 for work in works.values())


@pytest.mark.parametrize("name", ASYNCHRONOUS)
def test_an_asynchronous_schedule_gives_the_same_bits_in_every_order_and_is_not_the_plain_loop(name):
    results = []
    for turns in ([0, 1, 2], [2, 1, 0], [1, 2, 0]):
        works = toys(3)
        replay(made(name, 3, 4), works, turns)
        results.append(state(works))
    assert same(results[1], results[0]) and same(results[2], results[0])
    batches = [range(u * 4, u * 4 + 4) for u in range(3)]
    assert not same(results[0], state(plain(3, batches)))


def test_drained_after_every_window_paci_is_the_plain_loop():
    works = toys(3)
    for update in range(3):
        segment = tuple(
            tuple(a._replace(index=a.index + update * (1 if a.kind == "U" else 4)) for a in row)
            for row in with_comms(paci(3, 4, 1))
        )
        replay(segment, works)
    assert same(state(works), state(plain(3, [range(u * 4, u * 4 + 4) for u in range(3)])))


def test_forwards_only():
    works = toys(4)
    replay(with_comms(forwards(2, 3, (0, 1, 1, 0))), works)
    want = plain(4, [range(3)])
    assert all(not w.grad.any() for w in works.values()) and sorted(works[3].saved) == [0, 1, 2]
    x = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(101), dtype=torch.float64)
    for stage in range(4):
        x = torch.tanh(x @ want[stage].w)
    assert torch.equal(works[3].saved[1][1], x)


def test_messages_pack_and_unpack():
    tensors = [
        torch.randn(3), torch.rand(5) > 0.5, torch.randn(2, 2, dtype=torch.complex64), torch.tensor(2.0).double(),
        torch.empty(0, 3, dtype=torch.int64), torch.randn(4, 6).t().bfloat16(),
    ]  # fmt: skip
    message = Message([Form.of(t) for t in tensors])
    buffer = message.pack(tensors)
    assert buffer.dtype is torch.uint8 and len(buffer) == message.size and message.form == Form.of(buffer)
    assert message.empty(torch.device("cpu")).shape == buffer.shape
    for got, want in zip(message.unpack(buffer), tensors):
        assert got.dtype is want.dtype and torch.equal(got, want)


def test_one_contiguous_tensor_travels_as_it_is():
    one = torch.randn(2, 3, requires_grad=True)
    message = Message([Form.of(one)])
    packed = message.pack([one])
    assert packed.data_ptr() == one.data_ptr() and not packed.requires_grad
    assert message.unpack(packed)[0] is packed
    turned = Message([Form.of(one.t())]).pack([one.t()])
    assert turned.is_contiguous() and turned.data_ptr() != one.data_ptr() and torch.equal(turned, one.t())


def test_receives_begin_where_they_stand_and_are_waited_for_where_they_are_needed():
    log = walk("0F0,0F1\n1RF0,1RF1,1F0,1W9,1F1,1U0", 1, {1: ((ONE,), ())}).log
    assert log == [
        "meet", "receive from 0", "receive from 0", "came from 0", "F0", "W9", "came from 0", "F1", "U0", "settle",
    ]  # fmt: skip


def test_sends_are_waited_for_oldest_first_when_they_are_many_and_at_the_end():
    table = f"{','.join(f'0F{k},0SF{k}' for k in range(6))}\n1F0"
    transport = walk(table, 0, {0: ((), (ONE,), ())}, in_flight=2)
    assert transport.most == 3
    assert transport.log[1:] == [
        "F0", "F1", "F2", "sent 0", "F3", "sent 1", "F4", "sent 2", "F5", "sent 3", "sent 4", "sent 5", "settle",
    ]  # fmt: skip


def test_nothing_to_send_is_not_sent():
    """Neither no tensors, nor tensors without elements, which the receiver makes itself."""
    empty = Form(torch.float32, (0, 4))
    for forms in ((), (empty,), (empty, empty)):
        table = "0F0,0SF0,0RB0,0B0\n1RF0,1F0,1B0,1SB0"
        assert walk(table, 0, {0: ((), forms)}).log == ["meet", "F0", "B0", "settle"]
        transport, seen = Noted(), []
        work = Steps(transport.log, forms, ())
        work.forward = lambda micro, received, seen=seen: seen.append(received) or []
        Executor(from_csv(table), 1, {1: work}, transport).run()
        assert transport.log == ["meet", "B0", "settle"]
        assert [Form.of(t) for t in seen[0]] == list(forms)


def test_neighbours_on_a_rank_hand_over_the_tensor_itself():
    tensor = torch.randn(2, requires_grad=True)
    transport = Noted()
    first, second = Steps(transport.log, (), (ONE,), ()), Steps(transport.log, (ONE,), (), ())
    first.forward = lambda micro, received: [tensor]
    second.forward = lambda micro, received: transport.log.append(received) or []
    Executor(from_csv("0F0,1F0"), 0, {0: first, 1: second}, transport).run()
    ((handed,),) = (entry for entry in transport.log if isinstance(entry, list))
    assert handed.data_ptr() == tensor.data_ptr() and not handed.requires_grad


def test_what_is_recorded_is_what_was_computed_in_order():
    table = made("zb-h1", 3, 4)
    loop = Loopback()
    executors = [Executor(table, r, {r: w}, loop.of(r), record=True) for r, w in toys(3).items()]
    for executor in executors:
        executor.begin()
    while any(e.step < len(e.row) for e in executors):
        for executor in executors:
            while executor.step < len(executor.row) and executor.ready():
                executor.advance()
    for executor in executors:
        executor.end()
        assert [s.action for s in executor.spans] == [a for a in executor.row if a.kind in COMPUTE]
        ends = [0.0, *(t for s in executor.spans for t in (s.start, s.end))]
        assert ends == sorted(ends)
    measured = Timeline(tuple(tuple(e.spans) for e in executors))
    assert measured.makespan >= sum(measured.busy)  # one process does one thing at a time


def test_a_row_runs_again():
    table = with_comms(one_f_one_b(1, 3))
    works = toys(1)
    executor = Executor(table, 0, works, record=True)
    for _ in range(2):
        executor.run()
        assert len(executor.spans) == 6
    assert torch.allclose(works[0].grad, 2 * plain(1, [range(3)])[0].grad)


# ---- one process, what is wrong --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("table", "rank", "text"),
    [
        ("0F0,0F0,0SF0\n1F0", 0, "rank 0, stage 0, 0F0, step 1 of 3: makes 0SF0 again, and the one before is not yet"),
        ("0SF0\n1F0", 0, "rank 0, stage 0, 0SF0, step 0 of 1: has nothing to send: 0SF0 is not made before it"),
        ("0F0\n1F0", 1, "rank 1, stage 1, 1F0, step 0 of 1: needs 0SF0, which is not received before it"),
        ("0F0\n1RF0,1RF0", 1, "rank 1, stage 1, 1RF0, step 1 of 2: receives 0SF0 again, and the one before is not"),
        (
            "0F0\n1RF0",
            1,
            "rank 1, at the end of its row of 1: there is left over: 0SF0, which was received and",
        ),
        ("0F0\n1F0", 0, "rank 0, at the end of its row of 1: there is left over: 0SF0, which was not sent"),
        ("0F0,1F1", 0, "rank 0, stage 1, 1F1, step 1 of 2: needs 0SF1, which is not made before it"),
        (
            "0F0,1B0",
            0,
            "rank 0, at the end of its row of 2: there is left over: 1SB0, which nobody used; 0SF0",
        ),
        ("0F0,0F0,1F0", 0, "rank 0, stage 0, 0F0, step 1 of 3: makes 0SF0 again"),
        ("0F0,0SF0,1F0", 0, "rank 0, stage 0, 0SF0, step 1 of 3: sends to nobody"),
        ("0F0,1RF0,1F0", 0, "rank 0, stage 1, 1RF0, step 1 of 3: receives from nobody"),
    ],
)
def test_rows_that_make_no_sense(table, rank, text):
    forms = {0: ((), (ONE,)), 1: ((ONE,), ())}
    with pytest.raises(PipelineError) as error:
        walk(table, rank, {s: forms[s] for s, r in homes(from_csv(table)).items() if r == rank})
    assert str(error.value).startswith(text)
    step = int(text.split("step ")[1].split()[0]) if "step" in text else 0
    if "step" in text:
        assert f">>{from_csv(table)[rank][step]}<<" in str(error.value)


def test_a_stage_that_breaks_its_word():
    for forms, text in (
        (
            (ONE, ONE),
            "stage 0 forward gives float32[2], float32[2], but was announced to give float32[2]; what",
        ),
        ((Form(torch.float32, (3,)),), "stage 0 forward gives float32[3], but was announced to give float32[2]"),
        (
            (Form(torch.bfloat16, (2,)),),
            "stage 0 forward gives bfloat16[2], but was announced to give float32[2]",
        ),
        ((), "stage 0 forward gives nothing, but was announced to give float32[2]; what"),
    ):
        transport = Noted()
        work = Steps(transport.log, (), (ONE,))
        work.forward = lambda micro, received, forms=forms: [torch.zeros(shape).to(dtype) for dtype, shape in forms]
        executor = Executor(from_csv("0F0,0SF0\n1F0"), 0, {0: work}, transport)
        with pytest.raises(PipelineError) as error:
            executor.run()
        assert f"rank 0, stage 0, 0F0, step 0 of 2: {text}" in str(error.value)
        assert transport.log == ["meet", "close"]


def test_works_that_do_not_fit_the_table():
    table = from_csv("0F0\n1F0")
    with pytest.raises(RuntimeUseError, match=r"rank 1 has actions of stages \[1\], but there is no work for \[1\]"):
        Executor(table, 1, {0: Steps([])}, Noted())
    with pytest.raises(RuntimeUseError, match="a table of 2 ranks is to run without a transport"):
        Executor(table, 0, {0: Steps([], (), (ONE,))})
    ends = {
        (0, (ONE,), (ONE,)): r"stage 0 is to receive float32\[2\] forward, but the table has no stage -1",
        (1, (ONE,), (ONE,)): r"stage 1 is to receive float32\[2\] backward, but the table has no stage 2",
        (1, (ONE,), (ONE,), ()): r"stage 1 is to send float32\[2\] forward, but the table has no stage 2",
    }
    for (rank, *forms), text in ends.items():
        with pytest.raises(RuntimeUseError, match=text):
            Executor(table, rank, {rank: Steps([], *forms)}, Noted())


def test_what_a_stage_raises_is_the_cause():
    table = made("1f1b", 2, 3)
    works = toys(2)

    def fails(micro, received):
        raise ValueError("loss is NaN\nin layer 7")

    works[1].backward = fails
    with pytest.raises(PipelineError) as error:
        replay(table, works)
    assert str(error.value).startswith("rank 1, stage 1, 1B0, step 3 of 12: ValueError: loss is NaN in layer 7\n")
    assert isinstance(error.value.__cause__, ValueError)


def test_a_failed_pipeline_stays_so():
    transport = Noted()
    work = Steps(transport.log, (), ())
    work.update = lambda number: 1 / 0
    executor = Executor(from_csv("0F0,0B0,0U0"), 0, {0: work}, transport)
    with pytest.raises(PipelineError, match="0U0, step 2 of 3: ZeroDivisionError"):
        executor.run()
    with pytest.raises(PipelineError, match=r"failed before and cannot go on.*\(the first to fail: rank 0, stage 0"):
        executor.run()


def test_who_is_told_to_end_ends():
    transport = Noted()
    work = Steps(transport.log, (), ())

    def interrupted(number):
        raise KeyboardInterrupt

    work.update = interrupted
    with pytest.raises(KeyboardInterrupt):
        Executor(from_csv("0U0"), 0, {0: work}, transport).run()
    assert transport.log[-1] == "close"


def test_a_replay_that_cannot_go_on():
    with pytest.raises(ScheduleError, match="rank 0 step 3: 0B0 waits for the gradients of 1B0 or 1I0"):
        replay(from_csv("0F0,0SF0,0RB0,0B0\n1RF0,1F0"), toys(2))
    with pytest.raises(ScheduleError, match="1 messages from rank 0 to rank 1 were never received"):
        replay(from_csv("0F0,0SF0\n1W0"), {0: Steps([], (), (ONE,)), 1: Steps([], (ONE,), ())})


def test_a_replay_sees_what_was_there_when_it_was_sent():
    """A stage that writes over what it has sent is wrong on gloo, where the receiver may see either."""
    buffer = torch.zeros(2)
    seen = []
    works = {0: Steps([], (), (ONE,), ()), 1: Steps([], (ONE,), (), ())}
    works[0].forward = lambda micro, received: [buffer.fill_(micro + 1)]
    works[1].forward = lambda micro, received: seen.append(float(received[0][0])) or []
    replay(from_csv("0F0,0SF0,0F1,0SF1\n1RF0,1RF1,1F0,1F1"), works)
    assert seen == [1, 2]


def test_a_replay_compares_forms():
    works = {0: Steps([], (), (ONE,), ()), 1: Steps([], (Form(torch.float64, (2,)),), (), ())}
    with pytest.raises(PipelineError, match=r"receives float32\[2\] in place of float64\[2\]") as error:
        replay(from_csv("0F0,0SF0\n1RF0,1F0"), works)
    assert isinstance(error.value.__cause__, RankMismatchError)
