"""Where experts agree on a plan, the planner finds that plan by itself."""

from __future__ import annotations

import re

import pytest

from autopar.capture import capture
from autopar.costmodel.planner import plan
from autopar.graph import Program
from autopar.mesh import Mesh
from autopar.plan import Plan
from autopar.targets import Target, build

#: A Llama of 1.9 billion parameters: 30 GB with gradients and Adam's state.
LLAMA = {
    "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 8, "num_attention_heads": 32,
    "num_key_value_heads": 32, "vocab_size": 32000, "max_position_embeddings": 8192,
}  # fmt: skip
LIMIT, LOOSER = 2_600_000_000, 3_300_000_000
SLOW, FAST = 0, 1  # 8 GPUs share a node, so that tp=8 stays inside and dp goes over the network
COLUMN, ROW, EITHER = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), ("down_proj",), ("o_proj",)


@pytest.fixture(scope="module")
def llama() -> Program:
    built = build(Target("hf:llama", 4, 8192, "bf16", LLAMA))
    return capture(built.model, built.args, built.kwargs)


@pytest.fixture(scope="module")
def tight(llama) -> Plan:
    """Under a limit that copies along dp do not meet; one sequence a group, so that tp has no batch to split."""
    return _under(llama, LIMIT)


@pytest.fixture(scope="module")
def looser(llama) -> Plan:
    return _under(llama, LOOSER)


def _under(llama: Program, limit: int) -> Plan:
    mesh = Mesh.parse("dp=4,tp=8")  # with time enough on a busy machine, too
    options = {"memory_limit": limit, "output_specs": "free", "time_limit": 120.0, "recompute": False}
    return plan(llama, mesh, device="h100", offload=False, **options)


def _factors(found: Plan, axis: int) -> dict[str, str]:
    """Linear layer of a block -> the factor its forward matmul is split by on an axis."""
    out = {}
    for address, row in found.choices.items():
        layer = re.fullmatch(r"fwd:model\.layers\.\*\.\w+\.(\w+)/mm#0", address)
        if layer:
            out[layer[1]] = row[axis].factor
    assert set(out) == {*COLUMN, *ROW, *EITHER}
    return out


#: Under either limit; the second in the slow sweep.
BOTH = pytest.mark.parametrize("limit", ["tight", pytest.param("looser", marks=pytest.mark.slow)])


@BOTH
def test_a_llama_block_is_megatrons_on_the_fast_axis(limit, request):
    """Column, then row (Shoeybi et al., 2019, section 3): `mm` is [i, k] x [k, j], so j then k.

    Behind attention there is a choice: row, or heads are exchanged for tokens (Jacobs et al., 2023), which moves less.
    """
    found = _factors(request.getfixturevalue(limit), FAST)
    assert {found.pop(name) for name in EITHER} <= {"k", "i"}
    assert found == {**dict.fromkeys(COLUMN, "j"), **dict.fromkeys(ROW, "k")}


@BOTH
def test_it_is_zero_3_on_the_slow_axis(limit, request):
    """The batch is split; each rank stores its piece of every matrix, and the large ones are gathered anew in the
    backward (Rajbhandari et al., 2020): as many as it takes, where the limit leaves room for some."""
    found = request.getfixturevalue(limit)
    assert set(_factors(found, SLOW).values()) == {"i"}
    inside = {n: s for n, s in found.storage.items() if re.search(r"layers\.\d+\..*_proj", n)}
    assert len(inside) == 7 * LLAMA["num_hidden_layers"]
    assert all(s.spec[SLOW].kind == "S" and s.reduce == "reduce_scatter" for s in inside.values())
    large = [s.gather == "twice" for n, s in inside.items() if ".mlp." in n]
    assert all(large) if limit == "tight" else sum(large) > len(large) / 2


def test_the_limit_is_why(llama, tight):
    """The same Megatron with parameters copied along the slow axis would not fit."""
    copied = plan(llama, Mesh.parse("dp=4,tp=8"), device="h100", constraints={"dp": "ddp"}, output_specs="free")
    assert tight.predicted["peak_bytes"] <= LIMIT < LOOSER < copied.predicted["peak_bytes"]


def test_more_memory_costs_no_time(tight, looser):
    assert looser.predicted["peak_bytes"] <= LOOSER
    assert looser.predicted["step_s"] <= tight.predicted["step_s"]
