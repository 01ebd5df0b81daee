"""Which parameters and buffers lie in the same bytes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from autopar.shared_memory import overlaps

pytestmark = pytest.mark.tiny


def test_pieces_of_a_flat_buffer_do_not_overlap():
    flat = torch.zeros(20_000 * 2)
    assert overlaps((f"w{i}", nn.Parameter(flat[2 * i : 2 * i + 2])) for i in range(20_000)) == []


def test_pairs_in_order_of_memory():
    flat = torch.zeros(16)
    named = {"end": flat[12:], "all": flat, "front": flat[:4], "middle": flat[2:6], "other": torch.zeros(16)}
    assert overlaps(named.items()) == [("front", "all"), ("front", "middle"), ("all", "middle"), ("all", "end")]


def test_one_tensor_of_two_names_is_one_tensor():
    weight = nn.Parameter(torch.zeros(4))
    assert overlaps([("a", weight), ("b", weight)]) == []
    assert overlaps([("a", weight.data), ("b", weight.detach())]) == [("a", "b")]
