"""Stages for tests of the executor: some that compute, and a transport that notes what is asked of it."""

from __future__ import annotations

import torch

from autopar.pipeline.comms import with_comms
from autopar.pipeline.schedules import SCHEDULES
from autopar.pipeline.table import from_csv
from autopar.runtime.executor import Executor
from autopar.runtime.work import Form

WIDTH, ROWS, RATE = 5, 3, 0.05
STATE = Form(torch.float64, (ROWS, WIDTH))
SIDE = Form(torch.float32, (ROWS,))
NOTHING = ()


class Toy:
    """tanh(x w), where x are the activations and, if `pair`, a second tensor added to them that has no gradient.

    The loss of a micro-batch is half the sum of squares of the last stage's result.
    """

    def __init__(self, stage, last, pair=False):
        made = torch.Generator().manual_seed(stage)
        self.w = torch.randn(WIDTH, WIDTH, generator=made, dtype=torch.float64) / 2
        self.grad = torch.zeros_like(self.w)
        self.first, self.last, self.pair = stage == 0, stage == last, pair
        forms = (STATE, SIDE) if pair else (STATE,)
        self.receives_forward = NOTHING if self.first else forms
        self.sends_forward = NOTHING if self.last else forms
        self.receives_backward = NOTHING if self.last else (STATE,)
        self.sends_backward = NOTHING if self.first else (STATE,)
        self.saved, self.mid = {}, {}

    def forward(self, micro, received):
        if self.first:
            x = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(100 + micro), dtype=torch.float64)
        else:
            x = received[0] + received[1][:, None] if self.pair else received[0]
        y = torch.tanh(x @ self.w)
        self.saved[micro] = x, y
        if self.last:
            return []
        return [y, y.sum(1).float()] if self.pair else [y]

    def _slopes(self, micro, received):
        x, y = self.saved.pop(micro)
        return x, (y if self.last else received[0]) * (1 - y * y)

    def backward(self, micro, received):
        sent = self.input_grads(micro, received)
        self.weight_grads(micro)
        return sent

    def input_grads(self, micro, received):
        x, slopes = self._slopes(micro, received)
        self.mid[micro] = x, slopes
        return [] if self.first else [slopes @ self.w.T]

    def weight_grads(self, micro):
        x, slopes = self.mid.pop(micro)
        self.grad += x.T @ slopes

    def update(self, number):
        self.w -= RATE * self.grad
        self.grad.zero_()


def toys(stages, pair=False):
    return {s: Toy(s, stages - 1, pair) for s in range(stages)}


def plain(stages, batches, pair=False):
    """The same without a pipeline: for every batch of micro-batches all of them through all stages, then a step."""
    works = toys(stages, pair)
    for number, micros in enumerate(batches):
        for micro in micros:
            sent = []
            for stage in range(stages):
                sent = works[stage].forward(micro, sent)
            for stage in reversed(range(stages)):
                sent = works[stage].backward(micro, sent)
        if len(batches) > 1:
            for work in works.values():
                work.update(number)
    return works


def made(name, ranks, micro):
    known = SCHEDULES[name]
    return with_comms(known.make(ranks, micro, 3) if known.asynchronous else known.make(ranks, micro))


def state(works):
    return {stage: (work.w, work.grad) for stage, work in works.items()}


def same(got, want):
    assert got.keys() == want.keys()
    return all(torch.equal(a, b) for stage in want for a, b in zip(got[stage], want[stage]))


SYNCHRONOUS = sorted(name for name, s in SCHEDULES.items() if not s.asynchronous)
ASYNCHRONOUS = sorted(name for name, s in SCHEDULES.items() if s.asynchronous)


class Noted:
    """A transport that writes down what is asked of it; sends are done when they are waited for, as on gloo."""

    alarm = None
    device = torch.device("cpu")

    def __init__(self):
        self.log = []
        self.going = self.most = 0

    def meet(self, links):
        self.log.append("meet")

    def send(self, buffer, peer, way):
        self.going += 1
        self.most = max(self.most, self.going)
        return NotedMessage(self, f"sent {float(buffer.flatten()[0]):g}", None)

    def receive(self, message, peer, way):
        self.log.append(f"receive from {peer}")
        return NotedMessage(self, f"came from {peer}", message.empty(self.device).fill_(1))

    def settle(self, seconds):
        self.log.append("settle")

    def close(self):
        self.log.append("close")


class NotedMessage:
    def __init__(self, home, text, buffer):
        self.home, self.text, self.buffer, self.waited = home, text, buffer, False

    def done(self):
        return self.waited

    def ready(self):
        return False

    def wait(self, seconds):
        assert not self.waited
        self.waited = True
        self.home.log.append(self.text)
        self.home.going -= self.buffer is None
        return self.buffer


ONE = Form(torch.float32, (2,))


class Steps:
    """Writes down what is computed; sends the number of the micro-batch."""

    def __init__(self, log, front=(ONE,), behind=(ONE,), back=None):
        self.log = log
        self.receives_forward, self.sends_forward = front, behind
        self.receives_backward = behind if back is None else back
        self.sends_backward = front if back is None else back

    def _does(self, what, micro, forms):
        self.log.append(f"{what}{micro}")
        return [torch.full(shape, float(micro)).to(dtype) for dtype, shape in forms]

    def forward(self, micro, received):
        return self._does("F", micro, self.sends_forward)

    def backward(self, micro, received):
        return self._does("B", micro, self.sends_backward)

    def input_grads(self, micro, received):
        return self._does("I", micro, self.sends_backward)

    def weight_grads(self, micro):
        self._does("W", micro, ())

    def update(self, number):
        self._does("U", number, ())


def walk(text, rank, stages, **options):
    transport = Noted()
    works = {s: Steps(transport.log, *forms) for s, forms in stages.items()}
    Executor(from_csv(text), rank, works, transport, **options).run()
    return transport
