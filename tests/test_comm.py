"""Prices of collectives, and which link an axis gets."""

import pytest
import torch

from autopar.costmodel.comm import Comm
from autopar.costmodel.devices import DEVICES, Link, machine
from autopar.errors import MeshError
from autopar.mesh import Mesh
from autopar.spec import P, R, S

SHAPE = (1024, 4096)


def comm(mesh="tp=4", **links):
    return Comm(machine("h100", Mesh.parse(mesh), links or {"tp": Link(100e9, 0.0)}))


def seconds(src, dst, c=None):
    return (c or comm()).seconds(SHAPE, 2, src, dst)


def copy(size):
    return 2 * size / DEVICES["h100"].traffic() + DEVICES["h100"].launch


def test_bytes_of_each_collective():
    n, bandwidth, launch = 1024 * 4096 * 2, 100e9, DEVICES["h100"].launch
    assert seconds((S(0),), (R,)) == pytest.approx(0.75 * n / bandwidth + launch)
    assert seconds((P(),), (S(0),)) == pytest.approx(0.75 * n / bandwidth + launch)
    assert seconds((P(),), (R,)) == pytest.approx(1.5 * n / bandwidth + 2 * launch)
    exchange = 0.75 * n / 4 / bandwidth + launch + copy(n / 4)  # columns are brought together before they are sent
    assert seconds((S(0),), (S(1),)) == pytest.approx(exchange)
    assert seconds((R,), (R,)) == 0.0


def test_a_reduce_scatter_and_a_gather_cost_an_all_reduce():
    assert seconds((P(),), (S(0),)) + seconds((S(0),), (R,)) == pytest.approx(seconds((P(),), (R,)))


def test_pieces_that_lie_apart_are_copied():
    """On a dim that is not the outermost: before a reduce-scatter what is sent, behind a gather what has arrived."""
    n = 1024 * 4096 * 2
    assert seconds((P(),), (S(1),)) == pytest.approx(seconds((P(),), (S(0),)) + copy(n))
    assert seconds((S(1),), (R,)) == pytest.approx(seconds((S(0),), (R,)) + copy(n))
    links = comm().links(SHAPE, 2, (S(1),), (R,))
    assert links == pytest.approx(comm().links(SHAPE, 2, (S(0),), (R,)))  # the link is not kept busy by that
    c = comm("dp=4,tp=4", dp=Link(100e9, 0.0), tp=Link(100e9, 0.0))
    rows = c.seconds((4, 1024), 2, (S(0), S(1)), (S(0), R))  # one row a rank: columns are the outermost of the rest
    assert rows == pytest.approx(c.seconds((4, 1024), 2, (S(1), S(0)), (S(1), R)))


def test_a_slice_is_nearly_free():
    assert seconds((R,), (S(0),)) < 0.2 * seconds((S(0),), (R,))


def test_a_faster_link_is_never_slower_and_an_axis_of_one_is_free():
    slow, fast = comm(tp=Link(10e9, 1e-5)), comm(tp=Link(100e9, 1e-6))
    for src, dst in [((S(0),), (R,)), ((P(),), (R,)), ((S(0),), (S(1),)), ((R,), (S(1),))]:
        assert seconds(src, dst, fast) <= seconds(src, dst, slow)
        assert seconds(src, dst, comm("tp=1")) == 0.0


def test_other_axes_divide_the_bytes():
    c = comm("dp=2,tp=4", dp=Link(100e9, 0.0), tp=Link(100e9, 0.0))
    launch = DEVICES["h100"].launch
    whole = seconds((R, S(0)), (R, R), c) - launch
    assert seconds((S(1), S(0)), (S(1), R), c) - launch == pytest.approx(whole / 2)


def test_counts():
    assert comm().counts(SHAPE, (P(),), (R,)) == {"all_reduce": 1}
    assert comm().counts(SHAPE, (R,), (S(0),)) == {}


def test_links_by_reach():
    h100 = DEVICES["h100"]
    assert machine("h100", Mesh.parse("dp=8,tp=8")).links == (h100.slow, h100.fast)
    assert machine("h100", Mesh.parse("dp=2,tp=4")).links == (h100.fast, h100.fast)
    assert machine("h100", Mesh.parse("tp=16")).links == (h100.slow,)
    assert machine("h100", Mesh.parse("dp=2"), {"dp": Link(1.0, 1.0)}).links == (Link(1.0, 1.0),)


def test_presets():
    with pytest.raises(MeshError, match="no device preset 'h900'; presets are a100, h100"):
        machine("h900", Mesh.parse(2))
    with pytest.raises(MeshError, match="no axis 'tp'"):
        machine("h100", Mesh.parse(2), {"tp": Link(1.0, 1.0)})
    for device in DEVICES.values():
        assert device.rate(torch.int64) == device.rate(torch.float32) > 0
        assert device.fast.bandwidth >= device.slow.bandwidth
