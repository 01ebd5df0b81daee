"""Meshes: text form, coordinates, groups, and what is refused."""

from __future__ import annotations

import random

import pytest

from autopar.errors import MeshError
from autopar.mesh import Mesh

pytestmark = pytest.mark.tiny


def random_mesh(rng: random.Random) -> Mesh:
    names = rng.sample(["dp", "tp", "sp", "x_1", "Data", "_m"], rng.randint(1, 3))
    return Mesh(tuple(names), tuple(rng.randint(1, 64) for _ in names))


def test_parse_is_the_inverse_of_str():
    rng = random.Random(0)
    for _ in range(200):
        mesh = random_mesh(rng)
        assert Mesh.parse(str(mesh)) == mesh


def test_forms():
    assert Mesh.parse("dp=2, tp=4") == Mesh(("dp", "tp"), (2, 4))
    assert Mesh.parse(8) == Mesh(("dp",), (8,))
    mesh = Mesh(("a",), (3,))
    assert Mesh.parse(mesh) is mesh


def test_ranks_are_row_major():
    mesh = Mesh.parse("dp=2,tp=3")
    assert mesh.num_devices == 6
    assert [mesh.coordinates(r) for r in range(6)] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    assert mesh.groups(mesh.axis("dp")) == [[0, 3], [1, 4], [2, 5]]
    assert mesh.groups(mesh.axis("tp")) == [[0, 1, 2], [3, 4, 5]]


def test_groups_of_every_axis_partition_the_ranks():
    rng = random.Random(1)
    for _ in range(30):
        mesh = Mesh(("a", "b", "c"), tuple(rng.randint(1, 4) for _ in range(3)))
        for axis in range(3):
            groups = mesh.groups(axis)
            assert sorted(r for g in groups for r in g) == list(range(mesh.num_devices))
            for group in groups:
                assert [mesh.coordinates(r)[axis] for r in group] == list(range(mesh.sizes[axis]))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dp2", "cannot read mesh 'dp2': 'dp2' is not NAME=SIZE; write e.g. dp=2,tp=4"),
        ("dp=2,tp", "cannot read mesh 'dp=2,tp': 'tp' is not NAME=SIZE; write e.g. dp=2,tp=4"),
        ("dp=-2", "cannot read mesh 'dp=-2': 'dp=-2' is not NAME=SIZE; write e.g. dp=2,tp=4"),
        ("", "cannot read mesh '': '' is not NAME=SIZE; write e.g. dp=2,tp=4"),
        ("dp=0", "mesh axis dp has size 0; sizes start at 1"),
        ("dp=2,dp=2", "mesh axis names must differ, got dp, dp"),
        ("a=1,b=1,c=1,d=1", "mesh has 4 axes; 1 to 3 are supported"),
    ],
)
def test_bad_text(text, message):
    with pytest.raises(MeshError) as error:
        Mesh.parse(text)
    assert str(error.value) == message


def test_bad_parts():
    with pytest.raises(MeshError, match="mesh has 2 names but 1 sizes"):
        Mesh(("a", "b"), (1,))
    with pytest.raises(MeshError, match="mesh dp=2 has no axis 'tp'; its axes are dp"):
        Mesh.parse("dp=2").axis("tp")
