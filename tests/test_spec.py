"""Placements: text form, what a rank holds, shard and unshard as inverses, and what is refused."""

from __future__ import annotations

import random

import pytest
import torch

from autopar.errors import SpecError
from autopar.spec import (
    P,
    Placement,
    R,
    S,
    Spec,
    format_placements,
    format_spec,
    is_valid,
    layout,
    local_shape,
    parse_spec,
    same,
    shard,
    unshard,
)

pytestmark = pytest.mark.tiny
NAMES = ("dp", "tp", "cp")


def random_spec(rng: random.Random, ndim: int) -> Spec:
    def one() -> Placement:
        kind = rng.choice("RSSP") if ndim else rng.choice("RP")
        if kind == "S":
            return S(rng.randrange(ndim), rng.choice([1, 1, 2, 3, 6]))
        return R if kind == "R" else P(rng.choice(["sum", "max", "min"]))

    return tuple(one() for _ in NAMES)


def test_parse_is_the_inverse_of_format():
    rng = random.Random(0)
    for _ in range(500):
        ndim = rng.randint(0, 4)
        spec = random_spec(rng, ndim)
        assert parse_spec(format_spec(spec, ndim, NAMES), NAMES) == (spec, ndim)


@pytest.mark.parametrize(
    ("spec", "ndim", "text"),
    [
        ((R, R, R), 2, "[-, -]"),
        ((S(0), S(2), P()), 3, "[dp, -, tp] +cp"),
        ((S(0), S(2, 3), P("max")), 3, "[dp, -, tp@3] max:cp"),
        ((S(1), S(1), R), 2, "[-, dp tp]"),
        ((S(0, 4), S(0), R), 1, "[tp dp@4]"),
        ((P(), R, P()), 0, "[] +dp +cp"),
    ],
)
def test_text_form(spec, ndim, text):
    assert format_spec(spec, ndim, NAMES) == text
    assert parse_spec(text, NAMES) == (spec, ndim)


def test_axis_order_form():
    assert format_placements((R, S(0), S(1, 3), P())) == "R S(0) S(1@3) P(sum)"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dp, -", "cannot read placement 'dp, -'; write e.g. [dp, -, tp] +cp"),
        ("[dp, xx]", "placement '[dp, xx]' names axis 'xx'; the mesh has dp, tp, cp"),
        ("[dp, dp]", "placement '[dp, dp]' uses axis 'dp' twice"),
        ("[tp] +tp", "placement '[tp] +tp' uses axis 'tp' twice"),
        ("[tp@0]", "placement '[tp@0]': the stride in 'tp@0' must be a whole number above zero"),
        ("[tp@x]", "placement '[tp@x]': the stride in 'tp@x' must be a whole number above zero"),
        ("[dp,,tp]", "placement '[dp,,tp]' leaves a dim empty; write - for a whole one"),
        ("[-] avg:tp", "placement '[-] avg:tp': cannot read 'avg:tp'; write +AXIS, max:AXIS or min:AXIS"),
        ("[-] +xx", "placement '[-] +xx' names axis 'xx'; the mesh has dp, tp, cp"),
    ],
)
def test_bad_text(text, message):
    with pytest.raises(SpecError) as error:
        parse_spec(text, NAMES)
    assert str(error.value) == message


def test_strided_shard_holds_every_third():
    # 12 elements as 3 blocks of 4 (fused q, k, v): each rank holds its half of every block.
    x = torch.arange(12)
    assert shard(x, (S(0, 3),), (2,), (0,)).tolist() == [0, 1, 4, 5, 8, 9]
    assert shard(x, (S(0, 3),), (2,), (1,)).tolist() == [2, 3, 6, 7, 10, 11]


def test_two_axes_on_one_dim_nest_with_the_lower_axis_outermost():
    x = torch.arange(8)
    pieces = [shard(x, (S(0), S(0)), (2, 2), c).tolist() for c in ((0, 0), (0, 1), (1, 0), (1, 1))]
    assert pieces == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_partial_sum_is_held_by_the_first_coordinate():
    x = torch.ones(2)
    assert shard(x, (P(),), (2,), (0,)).tolist() == [1, 1]
    assert shard(x, (P(),), (2,), (1,)).tolist() == [0, 0]
    assert shard(x, (P("max"),), (2,), (1,)).tolist() == [1, 1]


def test_unshard_is_the_inverse_of_shard():
    rng = random.Random(0)
    sizes, shape, tried = (2, 3, 2), (12, 36, 4), 0
    x = torch.randn(shape, dtype=torch.float64)
    for _ in range(300):
        spec = random_spec(rng, 3)
        if not is_valid(shape, spec, sizes):
            continue
        tried += 1
        coords = [(a, b, c) for a in range(2) for b in range(3) for c in range(2)]
        pieces = [shard(x, spec, sizes, c) for c in coords]
        assert all(p.shape == local_shape(shape, spec, sizes) and p.is_contiguous() for p in pieces)
        assert torch.equal(unshard(pieces, shape, spec, sizes), x)
    assert tried > 100


def test_size_one_axes_cut_nothing():
    assert same((6,), (S(0),), (R,), (1,))
    assert same((6,), (P(),), (R,), (1,))
    assert not same((6,), (S(0),), (R,), (2,))
    assert same((6, 2), (S(0, 1), R), (S(0, 6), R), (1, 2))
    assert is_valid((5,), (S(0),), (1,))


@pytest.mark.parametrize(
    ("shape", "spec", "sizes", "message"),
    [
        ((7,), (S(0),), (2,), "a dim of 7 cannot be split into 2 equal pieces"),
        ((0,), (S(0),), (2,), "a dim of 0 cannot be split into 2 equal pieces"),
        ((8,), (S(1),), (2,), "placement S(1) names dim 1 of a tensor with 1 dims"),
        ((24,), (S(0, 2), S(0, 6)), (2, 2), "cuts cross: outer 6 is not a multiple of 4 already cut"),
        ((12,), (S(0, 2), S(0, 3)), (2, 2), "cuts cross: outer 3 lies inside 4 already cut"),
    ],
)
def test_impossible_layouts(shape, spec, sizes, message):
    assert not is_valid(shape, spec, sizes)
    with pytest.raises(SpecError) as error:
        layout(shape, spec, sizes)
    assert str(error.value) == message
