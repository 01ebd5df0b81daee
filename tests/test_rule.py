"""Rules in factor notation: text form, binding to shapes, what a choice places, and what is refused."""

from __future__ import annotations

import random

import pytest

from autopar.errors import RuleError
from autopar.rule import WHOLE, Choice, Rule, bind
from autopar.spec import P, R, S

pytestmark = pytest.mark.tiny


def random_rule(rng: random.Random) -> str:
    marks = {f: rng.choice(["", "", "+", "^", "*"]) for f in "abcdef"}
    names = [f + marks[f] for f in "abcdef"]

    def operand() -> str:
        if rng.random() < 0.1:
            return "~"
        dims = []
        for _ in range(rng.randint(0, 3)):
            kind = rng.random()
            dims.append(
                "1" if kind < 0.1 else f"({' '.join(rng.sample(names, 2))})" if kind < 0.3 else rng.choice(names)
            )
        return " ".join(dims)

    ins = [operand() for _ in range(rng.randint(2, 3))]  # (the text of one scalar operand is that of none)
    text = f"{', '.join(ins)} -> {', '.join(operand() for _ in range(rng.randint(1, 2)))}"
    if rng.random() < 0.5:
        text += " ; linear " + " | ".join(str(i) for i in range(len(ins)))
    if rng.random() < 0.3:
        text += " ; reduce max"
    if rng.random() < 0.3:
        text += " ; sizes a=3 b=2"
    return text


def test_parse_is_the_inverse_of_str():
    rng = random.Random(0)
    for _ in range(500):
        rule = Rule.parse(random_rule(rng))
        assert Rule.parse(str(rule)) == rule


@pytest.mark.parametrize(
    "text",
    [
        "i k+, k+ j -> i j ; linear 0 | 1",
        "..., ... -> ... ; linear 0 1",
        "b (h d) -> b h d ; linear 0 ; sizes d=64",
        "v* e, b s -> b s e",
        "b n^ -> b n^",
        "a n+ -> a ; reduce max",
        "i j, ~ -> i j, ~",
        "i 1, i j -> i j",
    ],
)
def test_text_is_kept(text):
    assert str(Rule.parse(text)) == text


def test_choice_text():
    for choice, text in [(WHOLE, "-"), (Choice("k"), "k"), (Choice("k", 3), "k@3"), (Choice(through=1), "+1")]:
        assert str(choice) == text
        assert Choice.parse(text) == choice
    with pytest.raises(RuleError, match=r"cannot read choice 'k@'; write -, FACTOR, FACTOR@OUTER or \+GROUP"):
        Choice.parse("k@")


def test_matmul():
    rule = bind(Rule.parse("i k+, k+ j -> i j ; linear 0 | 1"), [(4, 6), (6, 8)], [(4, 8)])
    assert rule.sizes == {"i": 4, "k": 6, "j": 8}
    assert rule.splittable() == ("i", "k", "j")
    assert rule.placements(WHOLE) == ((R, R), (R,))
    assert rule.placements(Choice("i")) == ((S(0), R), (S(0),))
    assert rule.placements(Choice("j")) == ((R, S(1)), (S(1),))
    assert rule.placements(Choice("k")) == ((S(1), S(0)), (P(),))
    assert rule.placements(Choice("j", 2)) == ((R, S(1, 2)), (S(1, 2),))
    assert rule.placements(Choice(through=0)) == ((P(), R), (P(),))
    assert rule.placements(Choice(through=1)) == ((R, P()), (P(),))


def test_compound_dim_gives_a_strided_split():
    rule = bind(Rule.parse("b (t h) -> b t h ; linear 0"), [(2, 12)], [(2, 3, 4)])
    assert rule.placements(Choice("h")) == ((S(1, 3),), (S(2),))
    assert rule.placements(Choice("t")) == ((S(1),), (S(1),))
    assert rule.factor_at(rule.ins[0], 1, 3) == Choice("h")
    assert rule.factor_at(rule.ins[0], 1, 6) == Choice("h", 2)
    assert rule.factor_at(rule.ins[0], 1, 1) == Choice("t")
    assert rule.factor_at(rule.ins[0], 2, 1) is None


def test_factor_at_is_the_inverse_of_placements():
    rule = bind(Rule.parse("(a b) c, c (a b) -> a b c"), [(6, 8), (8, 6)], [(2, 3, 8)])
    for name in ("a", "b", "c"):
        choice = Choice(name)
        ins, outs = rule.placements(choice)
        for operand, place in zip(rule.ins + rule.outs, ins + outs):
            assert rule.factor_at(operand, place.dim, place.outer) == choice


def test_reduction_kind_and_missing_factor():
    rule = bind(Rule.parse("a n+ -> a ; reduce max"), [(2, 4)], [(2,)])
    assert rule.placements(Choice("n")) == ((S(1),), (P("max"),))
    # A factor without mark that the result lacks leaves it equal everywhere.
    rule = bind(Rule.parse("a n -> a"), [(2, 4)], [(2,)])
    assert rule.placements(Choice("n")) == ((S(1),), (R,))


def test_leading_dims_broadcast_from_the_right():
    rule = bind(Rule.parse("... n, ... n -> ... n"), [(5, 4, 3), (4, 3)], [(5, 4, 3)])
    outer, inner = rule.ins[0][0][0], rule.ins[0][1][0]
    assert rule.ins[1][0][0] == inner
    assert rule.placements(Choice(outer)) == ((S(0), R), (S(0),))
    assert rule.placements(Choice(inner)) == ((S(1), S(0)), (S(1),))


def test_never_factors_and_size_one_are_not_splittable():
    rule = bind(Rule.parse("b n^ -> b n^"), [(1, 4)], [(1, 4)])
    assert rule.splittable() == ()
    with pytest.raises(RuleError, match=r"cannot split 'n'"):
        rule.placements(Choice("n"))
    with pytest.raises(RuleError, match=r"cannot split 'z'"):
        rule.placements(Choice("z"))
    with pytest.raises(RuleError, match=r"has no linear group 0"):
        rule.placements(Choice(through=0))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("i j", "rule 'i j' must have exactly one '->'"),
        ("i %, j -> i", "rule 'i %, j -> i': cannot read '%'"),
        ("i -> i ; linear 1", "rule 'i -> i ; linear 1': linear group (1,) names an operand that is not there"),
        ("i -> i ; colour red", "rule 'i -> i ; colour red': unknown clause 'colour red'; use linear, reduce or sizes"),
        (
            "i -> i ; linear x",
            "rule 'i -> i ; linear x': cannot read 'linear x'; write numbers of operands, e.g. linear 0 1 | 2",
        ),
        ("i -> i ; sizes z", "rule 'i -> i ; sizes z': cannot read 'sizes z'; write FACTOR=SIZE, e.g. sizes z=3"),
        ("(i 2) -> i", "rule '(i 2) -> i': '2' is not a factor"),
    ],
)
def test_bad_text(text, message):
    with pytest.raises(RuleError) as error:
        Rule.parse(text)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("text", "ins", "outs", "message"),
    [
        ("i -> i", [(2,), (2,)], [(2,)], "rule 'i -> i' is for 1 operands and 1 results; the op has 2 and 1"),
        ("i j -> i j", [(2,)], [(2, 3)], "rule 'i j -> i j': 2 dims in the rule, 1 in the tensor (2,)"),
        ("i, i -> i", [(2,), (3,)], [(2,)], "rule 'i, i -> i': dim (i) is 2 here and 3 there"),
        ("(a b) -> (a b)", [(6,)], [(6,)], "rule '(a b) -> (a b)': the sizes of ['a', 'b'] are not known"),
        ("(a b) -> a b", [(6,)], [(4, 2)], "rule '(a b) -> a b': dim (a b) is 8 here and 6 there"),
        ("i, ~ -> i", [(2,), (2,)], [(2,)], "rule 'i, ~ -> i': an operand or result is absent in one of rule and op"),
    ],
)
def test_rule_that_does_not_fit_the_call(text, ins, outs, message):
    with pytest.raises(RuleError) as error:
        bind(Rule.parse(text), ins, outs)
    assert str(error.value) == message
