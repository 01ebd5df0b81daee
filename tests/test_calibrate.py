"""Calibration with a clock and processes that are not real: what is measured, and that it becomes a usable device."""

from __future__ import annotations

import pytest
import torch

from autopar import cli
from autopar.capture import capture
from autopar.costmodel import planner, profile
from autopar.costmodel.calibrate import BESIDE, KINDS, QUICK_SIZES, TRAFFIC, calibrate
from autopar.costmodel.devices import DEVICES
from autopar.costmodel.ops import traffic_class
from autopar.errors import ProfileError
from tests.zoo import ZOO


class Ticks:
    """A clock: every reading is a millisecond later than the one before."""

    def __init__(self, step: float = 1e-3):
        self.now, self.step = 0.0, step

    def __call__(self) -> float:
        self.now += self.step
        return self.now


class Alone:
    """Rank 0 of four that never come; collectives only cost readings of the clock."""

    rank, num = 0, 4

    def __init__(self):
        self.told, self.asked = [], set()

    def barrier(self):
        """Nobody to wait for."""

    def largest(self, value):
        return value or 1e-3  # the others measure something

    def collective(self, kind, group, world, size, beside=None):
        self.asked.add((kind, group, world, size))
        return beside or (lambda: None)

    def tell(self, text, done):
        self.told.append((text, done))


@pytest.fixture(scope="module")
def found():
    world = Alone()
    return calibrate(world, True, torch.device("cpu"), Ticks(), Ticks(5e-4)), world


def test_everything_is_measured(found):
    device, world = found
    own = device.measured
    assert set(own.memory) == {*TRAFFIC, "update"} and {"float32", "bfloat16", "convolution"} <= set(own.matmul)
    shapes = ((2, 2), (2, 4), (4, 4))
    alone = {(k, g, w, s) for k in KINDS for g, w in shapes for s in QUICK_SIZES}
    assert world.asked == alone | {(k, n, n, BESIDE) for k in ("all_gather", "all_reduce") for n in (2, 4)}
    assert set(own.collectives) == {f"{k}/{g}/{w}" for k in KINDS for g, w in shapes}
    assert [c.ranks for c in own.crowds] == [1, 2, 4]
    assert own.crowds[0].matmul == pytest.approx(2.0, rel=0.5)  # the time passes twice as fast as this thread is busy
    assert all(0 <= c.beside <= 1 for c in own.crowds) and own.crowds[0].beside == 0  # nobody to talk with
    assert all(0 <= done <= 1 for _, done in world.told) and len(world.told) > 10


def test_larger_messages_take_no_less(found):
    for c in found[0].measured.collectives.values():
        values = [seconds for _, seconds in c.points]
        assert values == sorted(values) and c.grows


def test_round_trip_and_planning(found, tmp_path, monkeypatch):
    monkeypatch.setenv(profile.PROFILE, str(tmp_path / "profile.json"))
    profile.save(found[0], tmp_path / "profile.json")
    device = profile.load()
    assert device == found[0]
    model, batch = ZOO["mlp_dropout"](seed=0)
    program = capture(model, (), batch)
    plan = planner.plan(getattr(program, "program", program), planner.Mesh.parse("dp=2"), device=device)
    assert plan.predicted["device"] == "this machine" and plan.predicted["step_s"] > 0


def test_only_rank_0_gets_the_device():
    world = Alone()
    world.rank = 5
    assert calibrate(world, True, torch.device("cpu"), Ticks(), Ticks()) is None and not world.told


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("aten.mul.Tensor", "elementwise"), ("aten.silu", "function"), ("aten._log_softmax", "softmax"),
        ("aten.native_layer_norm_backward", "norm"), ("aten.embedding", "lookup"), ("aten.clone", "copy"),
        ("aten.sum.dim_IntList", "reduction"), ("aten.max_pool2d_with_indices", "pool"),
        ("aten.max_pool2d_with_indices_backward", "copy"), ("aten._adaptive_avg_pool2d", "reduction"),
    ],
)  # fmt: skip
def test_class_of_traffic(name, kind):
    assert traffic_class(name) == kind and kind in TRAFFIC
    assert DEVICES["h100"].traffic(kind, 1e3) == DEVICES["h100"].traffic()


def test_words_for_bad_input(monkeypatch, capsys):
    monkeypatch.setenv(profile.PROFILE, "")
    assert cli.main(["calibrate", "--quick"]) == 2
    assert "there is no place for the profile; give one with -o" in capsys.readouterr().err
    assert cli.main(["calibrate", "--procs", "3", "-o", "x.json"]) == 2
    assert "cannot measure with 3 processes; choose 1, 2, 4 or 8" in capsys.readouterr().err
    with pytest.raises(ProfileError, match="not calibrated"):
        profile.load()
