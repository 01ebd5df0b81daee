"""Plans: JSON round trip, folding, editing by hand, and the exact words for damaged and foreign files."""

from __future__ import annotations

import json
import random

import pytest

from autopar.errors import PlanError
from autopar.mesh import Mesh
from autopar.plan import GATHER, REDUCE, Plan, Storage, fold, storage_shards
from autopar.rule import WHOLE, Choice
from autopar.spec import P, R, S

pytestmark = pytest.mark.tiny
MESH = Mesh.parse("dp=2,tp=4")


def small_plan() -> Plan:
    return Plan(
        mesh=MESH,
        fingerprint="abc123",
        choices={
            "fwd:model.layers.*.mlp.up_proj/mm#0": (Choice("i"), Choice("j")),
            "fwd:model.layers.3.mlp.up_proj/mm#0": (Choice("i"), Choice("j", 2)),
            "bwd:model.layers.*.mlp.up_proj/mm#0": (Choice("k"), Choice(through=0)),
        },
        storage={
            "model.layers.0.mlp.up_proj.weight": Storage((S(0), S(0)), "twice"),
            "model.norm.weight": Storage((R, R), "once", "all_reduce"),
        },
        inputs={"input_ids": (S(0), R)},
        outputs={"loss": (R, R)},
        predicted={"step_s": 0.5, "memory": {"parameters": 12}},
        solver={"status": "optimal", "gap": 0.0},
        target={"target": "hf:llama"},
        notes=("a note",),
    )


def random_plan(rng: random.Random) -> Plan:
    sizes = tuple(rng.choice([1, 2, 4]) for _ in range(rng.randint(1, 3)))
    mesh = Mesh(("a", "b", "c")[: len(sizes)], sizes)

    def choice() -> Choice:
        return rng.choice([WHOLE, Choice("k"), Choice("j", 3), Choice(through=1)])

    def spec():
        return tuple(rng.choice([R, S(0), S(1), S(2, 3), P(), P("max")]) for _ in sizes)

    return Plan(
        mesh=mesh,
        fingerprint=f"{rng.getrandbits(64):x}",
        choices={f"fwd:m.{i}/mm#{i}": tuple(choice() for _ in sizes) for i in range(rng.randint(0, 6))},
        storage={f"p{i}": Storage(spec(), rng.choice(GATHER), rng.choice(REDUCE)) for i in range(4)},
        inputs={"x": spec()},
        outputs={"loss": spec()},
        notes=tuple("note" for _ in range(rng.randint(0, 2))),
    )


def test_json_round_trip():
    rng = random.Random(0)
    for plan in [small_plan(), *(random_plan(rng) for _ in range(200))]:
        assert Plan.from_json(plan.to_json()) == plan


def test_file_round_trip(tmp_path):
    path = tmp_path / "plan.json"
    small_plan().save(path)
    assert Plan.load(path) == small_plan()


def test_file_is_made_to_be_edited():
    text = small_plan().to_json()
    assert '    "model.layers.0.mlp.up_proj.weight": ["[dp tp]", "twice", "reduce_scatter"],' in text.splitlines()
    assert '    "fwd:model.layers.*.mlp.up_proj/mm#0": "i j",' in text.splitlines()
    edited = Plan.from_json(text.replace('"[dp tp]", "twice"', '"[tp]", "once"'))
    assert edited.stored("model.layers.0.mlp.up_proj.weight") == Storage((R, S(0)), "once")


def test_the_exact_address_wins_over_the_starred_one():
    plan = small_plan()
    assert plan.choice("fwd:model.layers.0.mlp.up_proj/mm#0") == (Choice("i"), Choice("j"))
    assert plan.choice("fwd:model.layers.3.mlp.up_proj/mm#0") == (Choice("i"), Choice("j", 2))
    assert plan.choice("fwd:model.layers.0.mlp.up_proj/mm#1") == (WHOLE, WHOLE)


def test_what_the_plan_does_not_name_is_replicated():
    assert small_plan().stored("unknown") == Storage((R, R))


def test_fold_loses_nothing():
    rng = random.Random(0)
    options = [(WHOLE, WHOLE), (Choice("i"), WHOLE), (Choice("i"), Choice("j"))]
    for _ in range(50):
        full = {f"fwd:l.{i}.mlp/mm#{k}": rng.choice(options) for i in range(5) for k in range(2)}
        folded = Plan(MESH, "", fold(full), {})
        assert all(folded.choice(a) == c for a, c in full.items())


def test_fold_writes_repeated_layers_once():
    full = {f"fwd:model.layers.{i}.mlp/mm#0": (Choice("i"), WHOLE) for i in range(80)}
    full["fwd:model.layers.79.mlp/mm#0"] = (WHOLE, WHOLE)
    full["fwd:lm_head/mm#0"] = (Choice("j"), WHOLE)
    assert fold(full) == {
        "fwd:model.layers.*.mlp/mm#0": (Choice("i"), WHOLE),
        "fwd:model.layers.79.mlp/mm#0": (WHOLE, WHOLE),
        "fwd:lm_head/mm#0": (Choice("j"), WHOLE),
    }


def test_storage_that_a_dtensor_can_say():
    assert storage_shards((R, S(0)))
    assert not storage_shards((R, S(0, 3)))
    assert not storage_shards((P(), R))


# ---- damaged and foreign files -------------------------------------------------------------------------------------


def damaged(**changes) -> str:
    data = json.loads(small_plan().to_json())
    for key, value in changes.items():
        if value is None:
            del data[key]
        else:
            data[key] = value
    return json.dumps(data)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "{",
            "plan is not JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1); "
            "write it again with `autopar plan ... -o`",
        ),
        ("[]", "plan is not an autopar plan (no 'autopar_plan' key)"),
        ('{"layers": 3}', "plan is not an autopar plan (no 'autopar_plan' key)"),
        (damaged(autopar_plan=99), "plan has plan schema 99, this autopar reads 1; make the plan again"),
        (damaged(mesh=None), "plan is damaged: it has no 'mesh'"),
        (damaged(storage=None), "plan is damaged: it has no 'storage'"),
        (damaged(fingerprint=None), "plan is damaged: it has no 'fingerprint'"),
        (damaged(notes=None), "plan is damaged: it has no 'notes'"),
        (
            damaged(mesh="dp=2;tp=4"),
            "plan is damaged at mesh: cannot read mesh 'dp=2;tp=4': 'dp=2;tp=4' is not NAME=SIZE; write e.g. dp=2,tp=4",
        ),
        (damaged(choices=[1]), "plan is damaged at choices: it must be an object"),
        (
            damaged(choices={"fwd:/mm#0": "i"}),
            "plan is damaged at choice of fwd:/mm#0: 1 choices for 2 mesh axes",
        ),
        (
            damaged(choices={"fwd:/mm#0": "i k@"}),
            "plan is damaged at choice of fwd:/mm#0: cannot read choice 'k@'; write -, FACTOR, FACTOR@OUTER or +GROUP",
        ),
        (
            damaged(storage={"w": ["[xp]", "once", "reduce_scatter"]}),
            "plan is damaged at storage of w: placement '[xp]' names axis 'xp'; the mesh has dp, tp",
        ),
        (
            damaged(storage={"w": ["[dp]", "thrice", "reduce_scatter"]}),
            "plan is damaged at storage of w: 'thrice', 'reduce_scatter' are not one of "
            "('once', 'twice') and ('reduce_scatter', 'all_reduce')",
        ),
    ],
)
def test_refused_with_the_reason(text, message):
    with pytest.raises(PlanError) as error:
        Plan.from_json(text)
    assert str(error.value) == message


def test_every_truncation_is_refused():
    text = small_plan().to_json().rstrip()
    for end in range(0, len(text), 17):
        with pytest.raises(PlanError):
            Plan.from_json(text[:end])


def test_every_mistyped_section_is_refused():
    for key in json.loads(small_plan().to_json()):
        for value in (3, "x", [1], {"a": 1}, {"a": [1]}):
            try:
                plan = Plan.from_json(damaged(**{key: value}))
            except PlanError as error:
                assert str(error).startswith("plan ")
            else:
                assert isinstance(plan, Plan)


def test_true_is_no_number():
    with pytest.raises(PlanError, match="has plan schema True, this autopar reads 1"):
        Plan.from_json(damaged(autopar_plan=True))
    with pytest.raises(PlanError, match="damaged at predicted step_s: cannot read True"):
        Plan.from_json(damaged(predicted={"step_s": True}))


def test_the_file_is_named(tmp_path):
    path = tmp_path / "p.json"
    path.write_text("[]")
    with pytest.raises(PlanError, match=r"p\.json is not an autopar plan"):
        Plan.load(path)
    with pytest.raises(PlanError, match=r"cannot read plan .*missing\.json: .*No such file"):
        Plan.load(tmp_path / "missing.json")
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PlanError, match=r"cannot read plan .*p\.json: "):
        Plan.load(path)
