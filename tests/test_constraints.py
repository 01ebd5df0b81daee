"""User constraints: what each strategy makes, and what cannot be met."""

import functools

import pytest

from autopar.capture import capture
from autopar.costmodel.items import items_of
from autopar.costmodel.planner import check_plan, plan
from autopar.costmodel.taint import BATCH, SEQUENCE, marks_of
from autopar.errors import ConstraintError
from autopar.mesh import Mesh
from autopar.rule import WHOLE, Choice
from autopar.spec import R, S
from tests.zoo import ZOO


@functools.cache
def program(rows=8):
    model, batch = ZOO["llama"](seed=0, dropout=0.0)
    return capture(model, (), {k: v[:rows] for k, v in batch.items()})


def made(mesh="dp=2", rows=8, **constraints):
    found = plan(program(rows), Mesh.parse(mesh), constraints=constraints)
    check_plan(program(rows), found)
    return found


def kinds(found, axis=0):
    return {s.spec[axis].kind for s in found.storage.values()}


def test_the_batch_is_followed_to_every_matmul():
    items = items_of(program())
    marks = marks_of(items)
    for item in items.ops():
        if "/mm" in item.name and "layers" in item.name:
            found = {m.what for m in marks[item.index]}
            assert found == {BATCH, SEQUENCE}, item.name


@pytest.mark.parametrize(
    ("strategy", "stored", "gather", "reduce"),
    [
        ("ddp", {"R"}, "once", "all_reduce"),
        ("zero1", {"S"}, "once", "all_reduce"),
        ("zero2", {"S"}, "once", "reduce_scatter"),
        ("zero3", {"S"}, "twice", "reduce_scatter"),
    ],
)
def test_data_parallel(strategy, stored, gather, reduce):
    found = made(dp=strategy)
    assert kinds(found) == stored
    assert {(s.gather, s.reduce) for s in found.storage.values()} == {(gather, reduce)}
    items = items_of(program())
    marks = marks_of(items)
    for item in items.ops():
        if any(m.what == BATCH for m in marks[item.index]) and "/mm" in item.name:
            assert found.choice(item.name)[0].factor in {m.at for m in marks[item.index]}


def test_zero3_needs_less_memory_than_ddp_and_no_more_time_than_zero1():
    assert made(dp="zero3").predicted["peak_bytes"] < made(dp="ddp").predicted["peak_bytes"]


@pytest.mark.parametrize("strategy", ["tp", "tp_sp"])
def test_tensor_parallel_never_splits_the_batch(strategy):
    found = made("tp=2", tp=strategy)
    items = items_of(program())
    marks = marks_of(items)
    banned = {BATCH, SEQUENCE} if strategy == "tp" else {BATCH}
    split = 0
    for item in items.ops():
        choice = found.choice(item.name)[0]
        split += choice != WHOLE
        for m in marks[item.index]:
            assert not (m.what in banned and m.at == choice.factor and m.touches(choice.outer)), item.name
        if item.name.startswith("fwd:") and "_proj/mm" in item.name:
            assert choice.factor, item.name
    assert split > 20


def test_axes_mix():
    found = made("dp=2,tp=2", dp="zero3", tp="tp")
    assert kinds(found, 0) == {"S"}
    mms = [c for a, c in found.choices.items() if a.startswith("fwd:") and "_proj/mm" in a]
    assert mms and all(row[0].factor and row[1].factor for row in mms)


def test_replicate():
    found = made(dp="replicate")
    assert kinds(found) == {"R"} and all(row == (WHOLE,) for row in found.choices.values())


def test_an_axis_of_one_is_left_alone():
    found = made("dp=1", rows=3, dp="zero3")
    assert kinds(found) == {"R"}


def test_storage_by_name():
    found = made("dp=2,tp=2", **{"*.mlp.down_proj.weight": "shard(1, tp)", "*.norm.weight": "replicate"})
    down = [s for n, s in found.storage.items() if n.endswith("mlp.down_proj.weight")]
    assert down and all(s.spec[1] == S(1) for s in down)
    assert found.storage["model.norm.weight"].spec == (R, R)
    kept = made(dp="zero3", **{"*norm.weight": "replicate(dp)"})
    assert kept.storage["model.norm.weight"].spec == (R,) and "S" in kinds(kept)


def test_later_names_win_axis_by_axis():
    name = "model.layers.0.mlp.down_proj.weight"
    general, special = {"*down_proj.weight": "shard(0, dp)"}, {"*.0.mlp.*.weight": "shard(1, dp)"}
    assert made(**general, **special).storage[name].spec == (S(1),)
    assert made(**special, **general).storage[name].spec == (S(0),)
    other = {name: "shard(1, tp)"}
    for constraints in ({**general, **other}, {**other, **general}):  # of other axes: both hold
        assert made("dp=2,tp=2", **constraints).storage[name].spec == (S(0), S(1))
    assert made("dp=2,tp=2", **other, **general, **{"*": "replicate"}).storage[name].spec == (R, R)
    assert made("dp=2,tp=2", **{"*": "replicate"}, **other).storage[name].spec == (R, S(1))


def test_later_addresses_win():
    address = next(i.name for i in items_of(program()).ops() if "down_proj/mm" in i.name)
    assert made(**{"fwd:*down_proj/mm*": "dp:j"}, **{address: "dp:k"}).choice(address) == (Choice("k"),)
    assert made(**{address: "dp:k"}, **{"fwd:*down_proj/mm*": "dp:j"}).choice(address) == (Choice("j"),)


def test_choice_by_address():
    address = next(i.name for i in items_of(program()).ops() if "down_proj/mm" in i.name)
    assert made(**{address: "dp:k"}).choice(address) == (Choice("k"),)


@pytest.mark.parametrize(
    ("constraints", "message"),
    [
        ({"dp": "fsdp"}, r"constraint 'dp': 'fsdp' is no strategy; use ddp, zero1"),
        ({"*.nothing": "replicate"}, r"constraint '\*\.nothing' matches no parameter; they are named like"),
        ({"pp": "dp:k"}, r"constraint 'pp': 'dp:k' matches no op; keys are a mesh axis \(dp\)"),
        ({"*.down_proj.weight": "split 1"}, r"it names parameters: write shard\(DIM, AXIS\)"),
        ({"*.down_proj.weight": "shard 1"}, r"cannot read 'shard 1'; write shard\(DIM, AXIS\), replicate"),
        ({"*.down_proj.weight": "shard(1, tp)"}, r"mesh dp=2 has no axis 'tp'"),
        ({"*.down_proj.weight": "shard(2, dp)"}, r"has 2 dims, so no dim 2"),
        ({"fwd:*down_proj/mm*": "tp:k"}, r"cannot read 'tp:k'; write AXIS:CHOICE with an axis of mesh dp=2"),
        ({"fwd:*down_proj/mm*": "dp:q"}, r"cannot split 'q'; its factors are: i, k, j"),
        (
            {"fwd:*down_proj/mm*": "dp:k@64"},
            r"factor k of .* has \d+ elements, which axis dp of size 2 does not divide",
        ),
        ({"fwd:*down_proj/mm*": "dp:+7"}, r"has 2 linear groups"),
    ],
)
def test_what_cannot_be_met_is_named(constraints, message):
    with pytest.raises(ConstraintError, match=message):
        made(**constraints)


def test_a_partial_sum_that_nobody_makes_is_named():
    items = items_of(program())
    made_by = next(i for i in items.ops() if "down_proj/mm" in i.name)
    reader = next(
        items.items[user]
        for user, operand in items.users[(made_by.index, 0)]
        if (operand,) in items.rule(items.items[user]).rule.linear
    )
    with pytest.raises(
        ConstraintError, match=r"constraint .* cannot be met at .*a partial sum must be made by a producer"
    ):
        made(**{made_by.name: "dp:i", reader.name: "dp:+0"})


def test_indivisible_sizes_give_both_numbers():
    with pytest.raises(ConstraintError, match=r"dp=ddp splits the batch into 2, but input \w+ has a batch of 3; use"):
        made(rows=3, dp="ddp")
    with pytest.raises(ConstraintError, match=r"dim 0 of .* has \d+ elements, which axis dp of size 5 does not divide"):
        made("dp=5", **{"*.down_proj.weight": "shard(0, dp)"})


def test_the_planner_itself_just_does_not_split_an_odd_batch():
    check_plan(program(3), plan(program(3), Mesh.parse(2)))
