"""The counter-based random ops: known values, statistics, and independence of how a tensor is cut."""

from __future__ import annotations

import pytest
import torch

from autopar import ops

rand = torch.ops.autopar
UNIFORM_7_3 = [0.37270045280456543, 0.4495074152946472, 0.06712996959686279, 0.0238344669342041]
NORMAL_7_3 = [1.3455044031143188, 0.3765493631362915, 1.3450297117233276, 2.733149766921997]
SEED = torch.tensor(1234)


def test_mixer_is_splitmix64():
    """The first outputs of SplitMix64 for seed 0, from its reference implementation (Vigna, prng.di.unimi.it)."""
    got = ops._mix((torch.arange(3) + 1) * ops._GOLDEN)
    want = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert [int(x) % (1 << 64) for x in got] == want


def test_values_never_change():
    """A mask must be the same on every machine and in every release: plans and checkpoints outlive both."""
    uniform = rand.uniform(torch.tensor(7), 3, [4])
    torch.testing.assert_close(uniform, torch.tensor(UNIFORM_7_3), rtol=0, atol=0)
    normal = rand.normal(torch.tensor(7), 3, [4])
    torch.testing.assert_close(normal, torch.tensor(NORMAL_7_3), rtol=1e-6, atol=0)


def test_uniform_is_uniform():
    x = rand.uniform(SEED, 0, [256, 1024]).double()
    assert x.min() >= 0 and x.max() < 1
    assert abs(x.mean() - 0.5) < 3e-3 and abs(x.var() * 12 - 1) < 1e-2
    counts = torch.histc(x, 64, 0, 1)
    expected = x.numel() / 64
    chi2 = float(((counts - expected) ** 2 / expected).sum())
    assert 25 < chi2 < 115  # 63 degrees of freedom, far beyond 1e-4 on both sides


def test_normal_is_normal():
    x = rand.normal(SEED, 0, [256, 1024]).double()
    assert abs(x.mean()) < 8e-3 and abs(x.std() - 1) < 8e-3
    assert abs((x**3).mean()) < 3e-2 and abs((x**4).mean() - 3) < 8e-2


@pytest.mark.parametrize("op", [rand.uniform, rand.normal])
def test_streams_seeds_and_neighbours_are_unrelated(op):
    rows = [op(SEED, s, [50_000]) for s in range(3)] + [op(SEED + d, 0, [50_000]) for d in (1, 2, 1 << 40)]
    rows.append(rows[0].roll(1))
    rows.append(rows[0].roll(64))
    correlation = torch.corrcoef(torch.stack(rows)) - torch.eye(len(rows))
    assert correlation.abs().max() < 0.025


@pytest.mark.parametrize("op, at", [(rand.uniform, rand.uniform_at), (rand.normal, rand.normal_at)])
@pytest.mark.parametrize("shape", [[8, 6, 4], [5], [3, 1, 7]])
def test_piece_equals_the_cut_of_the_whole(op, at, shape):
    whole = op(SEED, 5, shape)
    index = [torch.arange(n)[torch.arange(n) % 2 == n % 2] for n in shape]
    want = whole
    for dim, held in enumerate(index):
        want = want.index_select(dim, held)
    assert torch.equal(at(SEED, 5, index, shape), want)


def test_scalar_and_empty_shapes():
    assert rand.uniform(SEED, 0, []).shape == ()
    assert torch.equal(rand.uniform_at(SEED, 0, [], []), rand.uniform(SEED, 0, []))
    assert rand.uniform(SEED, 0, [0, 3]).shape == (0, 3)


@pytest.mark.parametrize("name", ["uniform", "normal"])
def test_ops_obey_the_custom_op_contract(name):
    torch.library.opcheck(getattr(rand, name).default, (SEED, 2, [3, 4]))
    index = [torch.tensor([0, 2]), torch.tensor([1, 3])]
    torch.library.opcheck(getattr(rand, f"{name}_at").default, (SEED, 2, index, [3, 4]))
