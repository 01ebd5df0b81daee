"""The batch as a symbol: its program at a size is, op for op, the one that a trace at that size gives."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

import autopar
from autopar.capture import capture, capture_batches
from autopar.errors import CaptureError
from autopar.programs import KNOWN, TRACED, TRACED_BATCHES, Programs
from tests import zoo
from tests.harness import Ranks
from tests.widen import widen_to_float64


def _grown(batch: dict[str, torch.Tensor], size: int) -> dict[str, torch.Tensor]:
    return {name: torch.cat([t] * 3)[:size] for name, t in batch.items()}


@pytest.mark.parametrize("name", list(zoo.ZOO))
def test_a_program_at_a_size_is_the_one_traced_at_that_size(name):
    model, batch = zoo.ZOO[name](seed=0, dropout=0.1)
    batches = capture_batches(model, (), _grown(batch, 6))
    for size in (6, 2, 14):
        program = batches.at(size)
        assert program is not None
        assert program.digest() == capture(model, (), _grown(batch, size)).digest(), size
    assert batches.at(1) is None and batches.at(0) is None  # one row broadcasts: other programs


def test_forward_only_and_eval():
    model, batch = zoo.ZOO["resnet"](seed=0, dropout=0.0)
    model.eval()
    batches = capture_batches(model, (), _grown(batch, 6), training=False)
    program = batches.at(4)
    assert program is not None
    assert program.digest() == capture(model, (), _grown(batch, 4), training=False).digest()


class Branches(nn.Module):
    """Another path for big batches; the size itself is an output."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> Any:
        y = self.a(x) if x.shape[0] > 10 else self.b(x)
        return {"loss": y.square().mean() / x.shape[0], "rows": x.shape[0], "half": x.shape[0] / 2}


def test_a_size_that_takes_another_path_has_no_program():
    model = Branches()
    batches = capture_batches(model, (torch.randn(6, 4),))
    assert batches.at(11) is None
    program = batches.at(8)
    assert program is not None
    constants = {s.name: s.constant for s in program.sinks if s.kind == "output" and s.node is None}
    assert constants == {"rows": 8, "half": 4.0}
    assert program.digest() == capture(model, (torch.randn(8, 4),)).digest()


class OneSize(nn.Module):
    """Works for one batch size only."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(6, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x + self.table).sum()


def test_a_model_with_one_batch_size_keeps_it():
    batches = capture_batches(OneSize(), (torch.randn(6, 4),))
    assert batches.at(6) is not None
    assert batches.at(5) is None and batches.at(7) is None


class Reads(nn.Module):
    """Takes a path by what Python says of the batch size: as text, or by its type."""

    def __init__(self, how) -> None:
        super().__init__()
        self.how, self.a, self.b = how, nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> Any:
        return (self.a if self.how(x) else self.b)(x).square().sum()


READINGS = {
    "str": lambda x: str(x.shape[0]) == "3",
    "shape": lambda x: "3" in str(tuple(x.shape)),
    "format": lambda x: f"{x.shape[0]}" in {"3", "6"},
    "percent": lambda x: f"{x.shape[0]:d}" == "3",
    "isinstance": lambda x: isinstance(x.shape[0], int),
    "type": lambda x: type(x.shape[0]) is int,
    "even": lambda x: x.shape[0] % 2 == 0,
    "in": lambda x: x.shape[0] in (3, 5),
}


@pytest.mark.parametrize("how", list(READINGS))
def test_a_path_chosen_in_python_is_the_right_one_at_every_size(how):
    model, programs = Reads(READINGS[how]), Programs()
    for size in (6, 4, 3, 5, 12, 3):
        example = (torch.randn(size, 4),)
        assert programs.capture(model, example, {}).program.digest() == capture(model, example).digest(), size


def test_text_of_a_size_is_of_its_value():
    class Tells(Reads):
        def forward(self, x: torch.Tensor) -> Any:
            return {"loss": self.a(x).square().sum(), "text": f"n={x.shape[0]}"}

    programs = Programs()
    for size in (6, 4, 3):
        program = programs.capture(Tells(None), (torch.randn(size, 4),), {}).program
        assert next(s.constant for s in program.sinks if s.name == "text") == f"n={size}"


def test_a_first_batch_of_one_row_is_no_obstacle():
    model, programs = Reads(lambda x: True), Programs()
    how = [programs.capture(model, (torch.randn(n, 4),), {}).how for n in (1, 4, 5)]
    assert how == [TRACED, TRACED_BATCHES, KNOWN]


def test_a_batch_of_one_cannot_be_a_symbol():
    with pytest.raises(CaptureError, match="batch of 1 cannot stand for others"):
        capture_batches(OneSize(), (torch.randn(1, 4),))


def test_no_batch_at_all():
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(3))

        def forward(self, scale: torch.Tensor) -> torch.Tensor:
            return (self.w * scale).sum()

    with pytest.raises(CaptureError, match="could be the batch"):
        capture_batches(Fixed(), (torch.tensor(2.0),))


def test_two_traces_serve_every_batch_size():
    model, programs = Branches(), Programs()
    how = [programs.capture(model, (torch.randn(n, 4),), {}).how for n in (6, 4, 5, 6, 12, 1, 2)]
    assert how == [TRACED, TRACED_BATCHES, KNOWN, KNOWN, TRACED, TRACED, KNOWN]
    forms = {programs.capture(model, (torch.randn(n, 4),), {}).form for n in (6, 4)}
    assert len(forms) == 1
    assert programs.capture(model.eval(), (torch.randn(4, 4),), {}).form not in forms
    model.a.weight.requires_grad_(False)
    assert programs.capture(model.train(), (torch.randn(4, 4),), {}).form not in forms


def _train(sizes: list[int], constraints: dict[str, str]) -> tuple[list[float], list[float], list[str]]:
    """Losses of steps with batches of these sizes, compiled and plain, and the warnings."""
    model, batch = zoo.ZOO["llama"](seed=0, dropout=0.0)
    model = model.double()
    with widen_to_float64(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        example = _grown(batch, sizes[0])
        pm = autopar.compile(model, "dp=2,tp=2", example=example, constraints=constraints, device="cpu")
        found = []
        for module in (pm, model):
            optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
            losses = []
            for step, size in enumerate(sizes):
                rows = {k: v.roll(step, 0) for k, v in _grown(batch, size).items()}
                loss = module(**rows).loss
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(float(loss.detach()))
            found.append(losses)
    return found[0], found[1], [str(w.message) for w in caught if "captured" in str(w.message)]


@pytest.mark.slow
def test_training_with_changing_batches_equals_one_process_and_is_told_once():
    with Ranks(4, timeout=300) as ranks:
        for got, want, notes in ranks.run(_train, [8, 4, 12, 8, 6, 2], {"dp": "zero3", "tp": "tp"}):
            assert got == pytest.approx(want, rel=1e-9, abs=0)
            assert len(notes) == 1 and "every batch size" in notes[0] and "input_ids" in notes[0], notes


def _local(sizes: list[int]) -> tuple[list[float], list[float]]:
    """Local pieces of changing size, with an evaluation after each step: values of the compiled and the plain model."""
    model, batch = zoo.ZOO["llama"](seed=0, dropout=0.0)
    model = model.double()
    rank = torch.distributed.get_rank()

    def rows(step: int, size: int) -> dict[str, torch.Tensor]:
        return {k: v.roll(step, 0) for k, v in _grown(batch, 2 * size).items()}

    def piece(whole: dict[str, torch.Tensor], size: int) -> dict[str, torch.Tensor]:
        return {k: v[rank * size : (rank + 1) * size] for k, v in whole.items()}

    with widen_to_float64(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pm = autopar.compile(model, "dp=2", example=piece(rows(0, sizes[0]), sizes[0]), batch="local", device="cpu")
        found = []
        for module in (pm, model):
            optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
            values = []
            for step, size in enumerate(sizes):
                whole = rows(step, size)
                args = piece(whole, size) if module is pm else whole
                loss = module(**args).loss
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                module.eval()
                with torch.no_grad():
                    values += [float(loss.detach()), float(module(**args).loss)]
                module.train()
            found.append(values)
    return found[0], found[1]


@pytest.mark.slow
def test_local_batches_of_changing_size_with_evaluations_between():
    with Ranks(2, timeout=300) as ranks:
        for got, want in ranks.run(_local, [4, 2, 3, 1, 4]):
            assert got == pytest.approx(want, rel=1e-9, abs=0)
