"""A pipeline that fails ends on every rank, with the reason, and without a hang: raised, died, hung, lost, mismatched.

Where a time-out is `NEVER`, a rank that only its own time-out could end would run into the limit of the test.
"""

from __future__ import annotations

import os
import re
import signal
import time

import pytest
import torch
from executor_toys import STATE, made, toys
from harness import Failure, Ranks

from autopar.errors import PipelineError
from autopar.runtime.executor import Executor
from autopar.runtime.transport import connect
from autopar.runtime.work import Form

NEVER = 600.0
SHORT = 2.0
LIMIT = 60.0  # seconds of a case, start of the ranks apart


@pytest.fixture(scope="module")
def ranks():
    with Ranks(3) as group:
        yield group


class Broken:
    """A work that calls `failure` in place of one action."""

    def __init__(self, work, method, micro, failure):
        self._work, self._micro = work, micro
        setattr(self, method, lambda index, *args: self._instead(getattr(work, method), failure, index, *args))

    def __getattr__(self, name):
        return getattr(self._work, name)

    def _instead(self, method, failure, index, *args):
        return failure() if index == self._micro else method(index, *args)


def raises():
    raise ValueError("loss is NaN\nin layer 7")


def interrupted():
    raise KeyboardInterrupt


def exits():
    os._exit(9)


def killed():
    os.kill(os.getpid(), signal.SIGKILL)


def hangs():
    time.sleep(2.5 * SHORT)
    return [torch.zeros(STATE.shape, dtype=STATE.dtype)]


def gives_another_form():
    return [torch.zeros(2)]


def piped(where, method, micro, failure, timeout=NEVER, table=None, change=None):
    """Run 1F1B of 3 ranks and 4 micro-batches, in which the rank `where` fails at one action."""
    transport = connect([range(3)], timeout=NEVER)
    rank = transport.alarm.rank
    work = toys(3)[rank]
    if rank == where:
        work = Broken(work, method, micro, failure)
    if change is not None:
        change(transport)
    walker = Executor(table or made("1f1b", 3, 4), rank, {rank: work}, transport, timeout=timeout)
    walker.run()
    return "ended"


def texts(outcomes, skip=()):
    """The PipelineErrors of the ranks."""
    for rank, outcome in enumerate(outcomes):
        assert rank in skip or (isinstance(outcome, Failure) and outcome.kind == "PipelineError"), str(outcome)
    return [o.message if isinstance(o, Failure) else "" for o in outcomes]


FIRST = "rank 1, stage 1, 1F2, step 10 of 24: "
STOPPED = "in vain\n  the first to fail: "


def test_what_one_rank_raises_every_rank_says(ranks):
    found = texts(ranks.outcomes(piped, 1, "forward", 2, raises, timeout=LIMIT))
    first = FIRST + "ValueError: loss is NaN in layer 7"
    assert found[1].startswith(f"{first}\n  step") and ">>1F2<<" in found[1]
    for rank, waits in (
        (0, r"stage 0, 0B[01], step \d+ of 16: waits for 1SB[01] from rank 1, "),
        (2, r"stage 2, .* 1SF\d"),
    ):
        assert re.match(f"rank {rank}, {waits}", found[rank]), found[rank]
        assert f"{STOPPED}{first}\n  step  rank 0" in found[rank]
        assert ">>1F2<<" in found[rank] and f">>{rank}" in found[rank]


def test_a_far_rank_hears_of_it_before_its_own_time_is_up(ranks):
    found = texts(ranks.outcomes(piped, 2, "backward", 1, raises, timeout=LIMIT))
    for text in found[:2]:
        assert f"{STOPPED}rank 2, stage 2, 2B1, step 6 of 16: ValueError: loss is NaN in layer 7\n" in text
    assert re.match(r"rank 0, stage 0, 0B\d, step \d+ of 16: waits for 1SB\d from rank 1", found[0])


def deaf(transport):
    """The store is gone."""

    class Gone:
        def __getattr__(self, name):
            raise RuntimeError("Broken pipe")

    transport.meet = lambda links: setattr(transport.alarm, "_store", Gone())


def test_without_a_store_closed_connections_end_it(ranks):
    outcomes = ranks.outcomes(piped, 2, "backward", 1, raises, NEVER, None, deaf, timeout=LIMIT)
    found = texts(outcomes)
    assert found[2].startswith("rank 2, stage 2, 2B1, step 6 of 16: ValueError: loss is NaN in layer 7\n")
    for rank, other in ((0, 1), (1, 2)):
        assert re.match(f"rank {rank}, .*: waits for .* the connection was closed", found[rank]), found[rank]
        assert f"rank {other}" in found[rank]


@pytest.mark.parametrize("dies", [exits, killed])
def test_when_a_rank_dies_the_others_say_what_they_waited_for(ranks, dies):
    outcomes = ranks.outcomes(piped, 1, "forward", 2, dies, timeout=LIMIT)
    assert outcomes[1].kind == "ProcessDied", outcomes[1]
    found = texts(outcomes, skip={1})
    waits = {
        0: r"rank 0, stage 0, 0B[01], step \d+ of 16: waits for 1SB[01] from rank 1",
        2: r"rank 2, stage 2, 2\w+, step \d+ of 16: waits for (1SF\d from rank 1|rank 1 to take 2SB\d)",
    }
    for rank, other in ((0, 2), (2, 0)):
        lost = r": the connection was closed \(.*\); see the output of that rank, which hangs, is slow or has died\n"
        told = f", {STOPPED}{waits[other]}: the connection was closed"
        assert re.match(f"{waits[rank]}({lost}|{told})", found[rank]), found[rank]
        assert f">>{rank}" in found[rank]


@pytest.mark.parametrize(("rank", "method", "micro"), [(0, "forward", 3), (2, "backward", 1)])
def test_when_a_rank_at_an_end_dies_the_other_end_hears_of_it(ranks, rank, method, micro):
    outcomes = ranks.outcomes(piped, rank, method, micro, exits, timeout=LIMIT)
    far = texts(outcomes, skip={rank})[2 - rank]
    assert f"{STOPPED}rank 1, stage 1, " in far
    assert re.search(rf"first to fail: .* waits for .*{rank}.*: the connection was closed", far), far


def test_a_rank_that_hangs_is_waited_for_no_longer_than_the_time_out(ranks):
    found = texts(ranks.outcomes(piped, 1, "forward", 2, hangs, SHORT, timeout=LIMIT))
    assert sum("within 2 s" in text.split("\n")[0] for text in found) >= 1
    for rank, message in ((0, "1SB1"), (2, "1SF2")):
        at = rf"rank {rank}, stage {rank}, {rank}\w\d, step \d+ of 16: waits for {message} from rank 1"
        assert re.match(at, found[rank]), found[rank]
    late = re.match(FIRST.replace("1F2, step 10", r"1\w+\d, step \d+"), found[1])
    assert late and "the first to fail: rank " in found[1] and ": not within 2 s\n" in found[1]


def swallows(transport):
    """The last message of rank 1 does not leave it."""
    send, sent = transport.send, []

    def some(buffer, peer, way):
        sent.append(peer)
        return Taken() if transport.alarm.rank == 1 and len(sent) == 8 else send(buffer, peer, way)

    transport.send = some


class Taken:
    def done(self):
        return False

    def wait(self, seconds):
        pass


def test_a_message_that_never_comes_is_named(ranks):
    outcomes = ranks.outcomes(piped, -1, "", 0, raises, SHORT, None, swallows, timeout=LIMIT)
    (text, *_) = texts(outcomes, skip={1, 2})
    assert outcomes[1:] == ["ended", "ended"]
    missing = "rank 0, stage 0, 0B3, step 15 of 16: waits for 1SB3 from rank 1: not within 2 s; see the output of that "
    assert text.startswith(missing) and ">>0B3<<" in text


def test_a_stage_that_breaks_its_word_aborts_nobody(ranks):
    """gloo would end the receiver's process if it came to that."""
    found = texts(ranks.outcomes(piped, 1, "forward", 2, gives_another_form, timeout=LIMIT))
    first = FIRST + "stage 1 forward gives float32[2], but was announced to give float64[3, 5]"
    assert found[1].startswith(first) and all(first in text for text in found)


def test_an_interrupt_is_told_to_the_others(ranks):
    outcomes = ranks.outcomes(piped, 1, "forward", 2, interrupted, timeout=LIMIT)
    assert outcomes[1].kind == "KeyboardInterrupt"
    for text in texts(outcomes, skip={1})[::2]:
        assert f"{STOPPED}{FIRST}KeyboardInterrupt: \n" in text


def twice(timeout):
    """A run that fails on rank 1, and what the same executor and another one say to a second run."""
    transport = connect([range(3)], timeout=NEVER)
    rank = transport.alarm.rank
    work = toys(3)[rank]
    broken = Broken(work, "forward", 2, raises) if rank == 1 else work
    said = []
    first = Executor(made("1f1b", 3, 4), rank, {rank: broken}, transport, timeout=timeout)
    for walker in (first, first, Executor(made("gpipe", 3, 2), rank, {rank: work}, transport, timeout=timeout)):
        try:
            walker.run()
        except PipelineError as error:
            said.append(str(error))
    return said


def test_what_has_failed_does_not_run_again(ranks):
    for rank, said in enumerate(ranks.run(twice, NEVER, timeout=LIMIT)):
        assert len(said) == 3
        for text in said[1:]:
            again = (
                f"rank {rank}: the pipeline has failed before and cannot go on; start its processes again (the first"
            )
            assert text == f"{again} to fail: {FIRST}ValueError: loss is NaN in layer 7)"


# ---- before the first action -----------------------------------------------------------------------------------------


def mismatched(what, timeout):
    transport = connect([range(3)], timeout=NEVER)
    rank = transport.alarm.rank
    work, table = toys(3)[rank], made("1f1b", 3, 4)
    if what == "absent" and rank == 2:
        return "absent"
    if rank == 1 and what == "rows":
        table = made("1f1b", 3, 5)
    if rank == 1 and what == "order":
        table = made("gpipe", 3, 4)
    if rank == 1 and what == "ranks":
        table = made("1f1b", 4, 4)
    if rank == 1 and what == "dtype":
        work.sends_forward = (Form(torch.bfloat16, STATE.shape),)
    if rank == 1 and what == "shape":
        work.sends_backward = (Form(torch.float64, (1, 5)),)
    if rank == 1 and what == "end":
        table = made("1f1b", 2, 4)
    if rank == 2 and what == "nothing":
        work.receives_forward = ()
    Executor(table, rank, {rank: work}, transport, timeout=timeout).run()
    return "ended"


@pytest.mark.parametrize(
    ("what", "text"),
    [
        (
            "rows",
            "run different tables: rank 1 differs from rank 0 (whose row of rank 0 has 16 actions, not 20); make",
        ),
        ("order", "rank 1 differs from rank 0 (in the row of rank 0, of 16 actions); make the table from the same "),
        ("ranks", "rank 1 differs from rank 0 (which has 3 rows, not 4); make the table from the same schedule"),
        ("dtype", "stage 1 (rank 1) sends forward bfloat16[3, 5], stage 2 (rank 2) expects float64[3, 5]; make both"),
        ("shape", "stage 1 (rank 1) sends backward float64[1, 5], stage 0 (rank 0) expects float64[3, 5]; make both"),
        ("nothing", "stage 1 (rank 1) sends forward float64[3, 5], stage 2 (rank 2) expects nothing; make both from "),
    ],
)
def test_ranks_that_do_not_fit_say_so_before_they_begin(ranks, what, text):
    for said in ranks.failures(mismatched, what, NEVER, timeout=LIMIT):
        assert said.startswith("RankMismatchError: ") and text in said


def test_a_rank_that_does_not_get_as_far_as_that(ranks):
    outcomes = ranks.outcomes(mismatched, "end", NEVER, timeout=LIMIT)
    first = "stage 1 is to receive float64[3, 5] backward, but the table has no stage 2"
    assert outcomes[1].kind == "RuntimeUseError" and outcomes[1].message.startswith(first)
    for rank, said in enumerate(texts(outcomes, skip={1})):
        stopped = f"rank {rank}: stopped before its first action; rank 1, before its first action: {first}"
        assert rank == 1 or said.startswith(stopped), said


def test_a_rank_that_does_not_come(ranks):
    outcomes = ranks.outcomes(mismatched, "absent", SHORT, timeout=LIMIT)
    assert outcomes[2] == "absent"
    for rank, said in enumerate(texts(outcomes, skip={2})[:2]):
        assert said.startswith(f"rank {rank}: rank 2 of 3 did not come to the start of the pipeline within 2 s; every")


def no_store():
    """A store that is gone before the first exchange."""
    transport = connect([range(3)], timeout=NEVER)
    deaf(transport)
    transport.meet([])
    rank = transport.alarm.rank
    Executor(made("1f1b", 3, 4), rank, {rank: toys(3)[rank]}, transport).run()


def test_a_store_that_does_not_answer(ranks):
    for rank, said in enumerate(ranks.failures(no_store, timeout=LIMIT)):
        assert said.startswith(f"PipelineError: rank {rank}: the store of the process group does not answer; ")
