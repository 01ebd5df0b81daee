"""Presets, curves, and the JSON form of a device."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

from autopar.costmodel import profile
from autopar.costmodel.curve import Curve, curve
from autopar.costmodel.devices import DEVICES, Crowd, Device, Host, Link, Measured, machine
from autopar.errors import ProfileError
from autopar.mesh import Mesh
from autopar.options import ask, detect_device

MEASURED = Device(
    "here", {"float32": 1e10}, 5e9, None, Link(1e9, 1e-4), Link(1e9, 1e-4), launch=1e-5,
    measured=Measured(
        matmul={"float32": Curve(((1e4, 1e9), (1e6, 1e10)))},
        memory={"elementwise": Curve(((1e3, 1e9), (1e7, 4e9)))},
        collectives={"all_reduce/2/4": Curve(((1e3, 1e-4), (1e6, 1e-3)), grows=True)},
        crowds=(Crowd(1, 1.0, 1.0, 1.0), Crowd(4, 2.0, 3.0, 1.5, 4.0)),
    ),
)  # fmt: skip


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A profile path of our own."""
    where = tmp_path / "cache" / "profile.json"
    monkeypatch.setenv(profile.PROFILE, str(where))
    return where


def test_presets():
    assert set(DEVICES) == {"a100", "h100", "h200", "h800", "b200", "mi300x", "rtx4090", "l4", "cpu"}
    h100, h800 = DEVICES["h100"], DEVICES["h800"]
    assert h800.fast.bandwidth < h100.fast.bandwidth and h800.slow == h100.slow
    assert h800.flops["bfloat16"] == h100.flops["bfloat16"] and h800.flops["float64"] == 1e12
    for device in DEVICES.values():
        assert device.fast.bandwidth >= device.slow.bandwidth and device.fast.latency <= device.slow.latency


def test_curve_interpolates_in_logarithms():
    c = Curve(((1e2, 1.0), (1e4, 100.0)))
    assert c(1e3) == pytest.approx(10.0) and c(1e2) == 1.0 and c(1) == 1.0 and c(1e9) == 100.0
    assert c(math.inf) == 100.0
    assert Curve(c.points, grows=True)(1e6) == pytest.approx(1e4)
    assert c.scaled(2)(1e3) == pytest.approx(20.0)
    assert curve([(4, 2.0), (2, 1.0), (4, 1.5)]).points == ((2, 1.0), (4, 1.5))


@pytest.mark.parametrize("points", [(), ((1, 0),), ((0, 1),), ((2, 1), (1, 1)), ((1, math.inf),)])
def test_bad_curves(points):
    with pytest.raises(ProfileError, match="a curve needs points"):
        Curve(points)


ROOMY = replace(MEASURED, name="roomy host", host=Host(Link(1e9, 1e-5), 1e10))


@pytest.mark.parametrize("device", [*DEVICES.values(), MEASURED, ROOMY], ids=lambda d: d.name)
def test_json_round_trip(device):
    again, made = profile.from_json(profile.to_json(device, {"cores": 2}))
    assert again == device and made == {"cores": 2}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("autopar_device"), "no 'autopar_device' key"),
        (lambda d: d.update(autopar_device=7), "has schema 7"),
        (lambda d: d.pop("launch"), "has no 'launch'"),
        (lambda d: d.update(bandwidth="fast"), "damaged at bandwidth: 'fast' is no number"),
        (lambda d: d.update(launch=-1.0), "damaged at launch: -1.0 is not above zero"),
        (lambda d: d.update(node=True), "damaged at node"),
        (lambda d: d["fast"].pop("latency"), "has no 'latency'"),
        (lambda d: d.update(flops={"float64": 1.0}), "no 'float32'"),
        (lambda d: d["measured"]["matmul"]["float32"].update(points=[[1, 2], [1, 3]]), "rising sizes"),
        (lambda d: d["measured"]["matmul"].update(float32=3), "damaged at measured"),
    ],
)
def test_damaged_json(change, message):
    data = json.loads(profile.to_json(MEASURED))
    change(data)
    with pytest.raises(ProfileError, match=message):
        profile.from_json(json.dumps(data))
    with pytest.raises(ProfileError, match="is not JSON"):
        profile.from_json("{")


def test_profile_is_picked_up(place):
    assert not profile.available() and detect_device() in DEVICES
    with pytest.raises(ProfileError, match="run `autopar calibrate`"):
        profile.load()
    profile.save(MEASURED, place)
    assert profile.load() == MEASURED == detect_device()
    mesh = Mesh.parse("dp=2")
    assert ask(mesh, "calibrated", None, None, "auto", "global", None, ()).device == MEASURED
    assert ask(mesh, None, None, None, "auto", "global", None, ()).device == MEASURED
    assert ask(mesh, "cpu", None, None, "auto", "global", None, ()).device == "cpu"


def test_profile_of_another_machine(place):
    profile.save(MEASURED, place)
    data = json.loads(place.read_text())
    data["machine"]["cores"] = 1000
    place.write_text(json.dumps(data))
    assert not profile.available()
    with pytest.raises(ProfileError, match=r"of another machine .cores 1000 then"):
        profile.load()


def test_switched_off_and_unwritable(monkeypatch, tmp_path):
    monkeypatch.setenv(profile.PROFILE, "")
    assert profile.path() is None and not profile.available()
    (tmp_path / "file").write_text("")
    with pytest.raises(ProfileError, match="cannot write"):
        profile.save(MEASURED, tmp_path / "file" / "profile.json")


def test_ranks_that_share_a_machine_are_slower():
    alone, four, eight = (machine(MEASURED, Mesh.parse(f"dp={n}")).device for n in (1, 4, 8))
    assert alone.rate(torch.float32) == 1e10 and four.rate(torch.float32) == 5e9 and eight.rate(torch.float32) == 2.5e9
    assert four.traffic("elementwise", 1e9) == pytest.approx(4e9 / 3) and four.launch == pytest.approx(1.5e-5)
    assert DEVICES["h100"].shared_by(64) is DEVICES["h100"]


def test_measured_rates_and_collectives():
    assert MEASURED.rate(torch.float32, 1e5) == pytest.approx(10**9.5)
    assert MEASURED.rate(torch.float64, 1e5) == 1e10 * MEASURED.matmul_efficiency
    assert MEASURED.traffic("norm", 1e4) == 5e9 * MEASURED.memory_efficiency
    assert MEASURED.collective("all_reduce", 2, 4, 1e6) == 1e-3
    assert MEASURED.collective("all_reduce", 4, 4, 1e6) is None
    assert replace(MEASURED, measured=None).collective("all_reduce", 2, 4, 1e6) is None
    links = {"dp": Link(1.0, 1.0)}
    assert machine(MEASURED, Mesh.parse("dp=2"), links).device.collective("all_reduce", 2, 4, 1e6) is None
