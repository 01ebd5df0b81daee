"""Every rule of the table against the truth machine, and the machine against rules that are wrong."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import fx

from autopar.capture import capture
from autopar.costmodel import rules
from autopar.costmodel.rules_call import Call
from autopar.errors import PassError, RuleError
from autopar.graph import is_op
from autopar.mesh import Mesh
from autopar.passes.localise import LocalCall, emit
from autopar.rule import Choice, Rule, bind
from tests import zoo
from tests.truth import LINE, Case, Prepared, check, choices, shy
from tests.truth_cases import HAND, automatic, num
from tests.truth_cases_nn import HAND as HAND_NN
from tests.truth_cases_nn import gpu_only
from tests.truth_synth import case_of

aten = torch.ops.aten

#: Kernels that only GPUs have. Only shapes are checked here; their rules are those of CPU kernels of the same maths.
GPU_ONLY = {
    getattr(aten, name).default
    for stem in ("flash", "efficient", "cudnn")
    for name in (f"_scaled_dot_product_{stem}_attention", f"_scaled_dot_product_{stem}_attention_backward")
} | {aten._fused_rms_norm_backward.default}

#: What the machine would allow and the table does not: (op, finding, why).
SHY_ON_PURPOSE = (
    (r"new_zeros|new_empty|empty_like|zeros_like", r"linear 0", "zeros add up whatever the operand is"),
    (r"aten\.(copy|fill)", r"linear 0 1", "the first operand lends its shape only"),
    (r"aten\.(any|all)\.", r".*", "partial booleans save nothing and travel badly"),
    (r"bucketize", r"z\+", "a partial integer for a handful of boundaries"),
    (r"bincount", r".*", "the size of the result depends on the data"),
    (r"grouped_mm", r"[uqw]\+?", "kernels want rows of whole 16-byte blocks"),
    (r"aten\.index\.Tensor", r"linear 0", "a mask gives a result whose size depends on the data"),
    (r"aten\.index_put", r"linear 0 2", "an index given twice: which value wins is undefined"),
    (r"nll_loss.*backward|pool.*backward|pad.*_backward", r"linear 0 1.*", "only the gradient lends values"),
    (r"nan_to_num", r"linear 0", "only where every value is finite"),
)

_written = {case.target for case in [*HAND, *HAND_NN]}
_CASES = [*HAND, *HAND_NN, *(automatic(op) for op in rules.RULES if op not in _written | GPU_ONLY)]
every_case = pytest.mark.parametrize("case", _CASES, ids=[f"{i}-{c.target}" for i, c in enumerate(_CASES)])


def test_every_entry_is_covered() -> None:
    tested = {case.target for case in _CASES}
    assert not [str(op) for op in rules.RULES if op not in tested | GPU_ONLY]
    assert {rules.qualified_name(t) for t in tested} >= set(rules.NAMED)


@every_case
def test_the_rule_is_true(case: Case) -> None:
    verdict = check(case, pairs=10 if case.target in _written else 4)
    assert not verdict.wrong, "\n".join(verdict.wrong[:3])
    assert not verdict.untested, "\n".join(verdict.untested)


@every_case
def test_the_rule_is_not_shy(case: Case) -> None:
    excused = [f for op, f, _ in SHY_ON_PURPOSE if re.search(op, str(case.target))]
    found = [f for f in shy(case) if not any(re.fullmatch(e, f) for e in excused)]
    assert not found, f"{case}: rule '{rules.rule_for(Prepared(case).node).rule}' forbids what would be right: {found}"


_GPU_CASES = gpu_only()


def test_kernels_that_only_gpus_have_are_all_listed() -> None:
    assert {case.target for case in _GPU_CASES} == GPU_ONLY


@pytest.mark.parametrize("case", _GPU_CASES, ids=[f"{i}-{c.target}" for i, c in enumerate(_GPU_CASES)])
def test_shapes_of_kernels_that_only_gpus_have(case: Case) -> None:
    prepared = Prepared(case)
    bound = rules.rule_for(prepared.node)
    offered = [c for c in choices(bound) if prepared.specs(bound, LINE, [c]) is not None]
    factors = {c.factor for c in offered}
    if case.target is not aten._fused_rms_norm_backward.default:
        assert {"b", "h"} <= factors
        assert not (Call(prepared.node).arg("is_causal") and {"s", "t"} & factors)
    for choice in offered:
        assert prepared.shapes_agree(bound, LINE, [choice]), f"{case}: {choice}"


# ---- planted faults --------------------------------------------------------------------------------------------

_library = torch.library.Library("truthtest", "DEF")
_library.define("biased(Tensor x, Tensor w, Tensor b) -> Tensor")
_library.impl("biased", lambda x, w, b: x @ w + b, "CompositeExplicitAutograd")
_library.define("by_pointer(Tensor x) -> Tensor")
_library.impl(
    "by_pointer", lambda x: x.as_strided(x.shape, torch.empty(x.shape).stride()) * 1, "CompositeExplicitAutograd"
)
biased, by_pointer = torch.ops.truthtest.biased.default, torch.ops.truthtest.by_pointer.default

_labels = torch.tensor([0, 1, -100, 3, 4, 5, -100, -100])
_logp = torch.log_softmax(num(8, 6) / 4, 1)
PLANTED = {
    "bias added by every shard": (Case(biased, (num(4, 8), num(8, 6), num(6))), "i k+, k+ j, j -> i j", "k"),
    "mean over a split dim": (Case(aten.mean.dim, (num(4, 8), [1])), "a b+ -> a", "b"),
    "mean loss": (Case(aten.nll_loss_forward.default, (_logp, _labels, None, 1, -100)), "n+ c^, n+ -> ,", "n"),
    "cumsum along a split dim": (Case(aten.cumsum.default, (num(4, 8), 1)), "a b -> a b", "b"),
    "arange without an offset": (Case(aten.arange.default, (8,)), "-> n", "n"),
    "partial sum plus a scalar": (Case(aten.add.Tensor, (num(4, 8), 1.0)), "a b -> a b ; linear 0", "+0"),
    "partial sum plus a whole": (Case(aten.add.Tensor, (num(4, 8), num(4, 8))), "a b, a b -> a b ; linear 0", "+0"),
    "partial through a non-linear op": (Case(aten.relu.default, (num(4, 8),)), "a b -> a b ; linear 0", "+0"),
    "partial product of partials": (
        Case(aten.mul.Tensor, (num(4, 8), num(4, 8))),
        "a b, a b -> a b ; linear 0 1",
        "+0",
    ),
    "sum where a maximum is due": (Case(aten.amax.default, (num(4, 8), [1])), "a b+ -> a", "b"),
    "sum taken for complete": (Case(aten.sum.dim_IntList, (num(4, 8), [1])), "a b -> a", "b"),
    "normalised over a shard": (
        Case(aten.native_layer_norm.default, (num(4, 8), [8], None, None, 1e-5)),
        "a b -> a b, a 1, a 1",
        "b",
    ),
    "slice of every shard": (Case(aten.slice.Tensor, (num(4, 8), 1, 0, 4)), "a b -> a (b2) ; sizes b2=4", "b"),
    "halves of unequal pieces": (
        Case(aten.cat.default, ([num(4, 4), num(4, 8)], 1)),
        "a (u x), a (u y) -> a (u z) ; sizes u=2",
        "u",
    ),
    "view in the wrong order": (Case(aten.view.default, (num(4, 8), [32])), "a b -> (b a)", "a"),
    "rows of a transposed product": (Case(aten.mm.default, (num(8, 8), num(8, 8))), "i k, k j -> j i", "i"),
    "ordered within shards": (Case(aten.sort.default, (num(4, 8), 1)), "a b -> a b, a b", "b"),
}


def planted(name: str) -> tuple[Case, Any, str]:
    case, rule, choice = PLANTED[name]
    prepared = Prepared(case)
    shapes = [tuple(x.shape) for x in prepared.operands], [tuple(x.shape) for x in prepared.results]
    return case, bind(Rule.parse(rule), *shapes), choice


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_fault_is_caught(name: str) -> None:
    case, bound, choice = planted(name)
    verdict = check(case, bound=bound)
    assert any(f"choice {choice} of" in w for w in verdict.wrong), verdict


def test_a_kernel_that_ignores_strides_is_caught_on_strided_pieces_only() -> None:
    case = Case(by_pointer, (num(4, 8),))
    verdict = check(case, bound=bind(Rule.parse("a b -> a b"), [(4, 8)], [(4, 8)]), pairs=0)
    assert verdict.wrong and all("on strided pieces" in w for w in verdict.wrong)


def test_what_does_not_divide_is_not_a_pass() -> None:
    verdict = check(Case(aten.neg.default, (num(3, 4),)))
    assert verdict.untested == [
        "aten.neg.default(float64[3, 4]): a of rule 'a b -> a b ; linear 0' does not divide by 2"
    ]


def test_a_shy_rule_is_noticed() -> None:
    case = Case(aten.mm.default, (num(4, 8), num(8, 6)))
    timid = bind(Rule.parse("i k^, k^ j^ -> i j^ ; linear 0"), [(4, 8), (8, 6)], [(4, 6)])
    assert shy(case, bound=timid) == ["k+", "j", "linear 1"]


# ---- the table's interface -------------------------------------------------------------------------------------


@pytest.fixture
def scale() -> Iterator[Any]:
    library = torch.library.Library("rulestest", "FRAGMENT")
    library.define("scale(Tensor x, Tensor s) -> Tensor")
    library.impl("scale", lambda x, s: x * s, "CompositeExplicitAutograd")
    yield torch.ops.rulestest.scale.default
    rules.unregister("rulestest::scale")


def test_a_user_registers_a_rule_in_one_line(scale: Any) -> None:
    node = Prepared(Case(scale, (num(4, 8), num(8)))).node
    assert rules.rule_source(node) == "discovered"
    rules.register("rulestest::scale", "... d, d -> ... d ; linear 0 | 1")
    assert rules.rule_source(node) == "user"
    assert str(rules.rule_for(node).rule) == "lead1 d, d -> lead1 d ; linear 0 | 1"
    rules.register(scale, lambda n: "a b, b -> a b")
    assert str(rules.rule_for(node).rule) == "a b, b -> a b"
    rules.unregister(scale)
    assert rules.rule_source(node) == "discovered"


def test_registering_nonsense_says_why(scale: Any) -> None:
    with pytest.raises(RuleError, match=r"^no op is called 'rulestest::scael'; write the name it was defined with"):
        rules.register("rulestest::scael", "a -> a")
    with pytest.raises(RuleError, match=r"is no op; pass torch.ops.mylib.scale, or the name 'mylib::scale'$"):
        rules.register(torch.relu, "a -> a")  # it would be taken, and never found
    with pytest.raises(RuleError, match=r"^a rule is a text such as 'i k\+, k\+ j -> i j', or a function .*, not 5$"):
        rules.register(scale, 5)  # type: ignore[arg-type]
    with pytest.raises(RuleError, match=r"^rule 'a b' must have exactly one '->'$"):
        rules.register(scale, "a b")
    rules.register(scale, "a b c, c -> a b c")
    with pytest.raises(RuleError) as caught:
        rules.rule_for(Prepared(Case(scale, (num(4, 8), num(8)))).node)
    assert str(caught.value) == (
        "the user rule of rulestest.scale does not fit its call ([4 8], [8] -> [4 8]): rule 'a b c, c -> a b c': "
        '3 dims in the rule, 2 in the tensor (4, 8); give another with autopar.register_rule("rulestest::scale", ...)'
    )


def test_signature_tells_calls_apart() -> None:
    def key(*args: Any) -> Any:
        return rules.signature(Prepared(Case(aten.add.Tensor, args)).node)

    assert key(num(4, 8), 1) == key(num(4, 8) + 1, 1)
    assert len({key(num(4, 8), 1), key(num(4, 8), 1.0), key(num(4, 8), True), key(num(8, 4), 1)}) == 4


def test_twenty_thousand_nodes_take_less_than_a_second() -> None:
    node = Prepared(Case(aten.cat.default, ([num(4, 8, 12), num(4, 8, 12)], 2))).node
    start = time.process_time()
    for _ in range(20_000):
        rules.rule_for(node)
    assert time.process_time() - start < 1.0


def test_more_shards_than_groups_is_refused() -> None:
    """Channels are (group, channel): eight channels divide by 4, two groups do not."""
    prepared = Prepared(
        Case(
            aten.convolution.default, (num(2, 8, 3, 3), num(8, 4, 1, 1), None, [1, 1], [0, 0], [1, 1], False, [0, 0], 2)
        )
    )
    bound, mesh = rules.rule_for(prepared.node), Mesh(("x",), (4,))
    assert not bound.fits([Choice("g")], mesh.sizes) and bound.fits([Choice("g")], (2,))
    graph = fx.Graph()
    ins, outs = bound.placements(Choice("g"))
    local = []
    for i, shape in enumerate([(2, 2, 3, 3), (2, 4, 1, 1)]):
        local.append(graph.placeholder(f"x{i}"))
        local[-1].meta["val"] = torch.empty(shape, device="meta")
    call = LocalCall(bound, (Choice("g"),), tuple((p,) for p in ins), tuple((p,) for p in outs), mesh)
    with pytest.raises(PassError, match=r"^aten.convolution cannot run with choices g on mesh x=4: they cut "):
        emit(graph, prepared.node, local, call)


def test_results_carry_what_later_passes_read() -> None:
    prepared = Prepared(Case(aten.native_layer_norm.default, (num(4, 8), [8], None, None, 1e-5)))
    prepared.node.meta.update(phase="bwd", module="model.norm", address="bwd:model.norm/native_layer_norm#0")
    bound, graph = rules.rule_for(prepared.node), fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.empty((2, 8), dtype=torch.float64, device="meta")
    ins, outs = bound.placements(Choice("a"))
    call = LocalCall(bound, (Choice("a"),), tuple((p,) for p in ins), tuple((p,) for p in outs), LINE)
    found = emit(graph, prepared.node, [x], call)
    assert [tuple(n.meta["val"].shape) for n in found if n is not None] == [(2, 8), (2, 1), (2, 1)]
    for n in graph.nodes:
        if n.op == "call_function":
            assert n.meta["phase"] == "bwd" and n.meta["module"] == "model.norm"
            assert n.meta["address"] == "bwd:model.norm/native_layer_norm#0" and "val" in n.meta


def test_every_choice_prints_and_parses() -> None:
    for case in _CASES:
        bound = rules.rule_for(Prepared(case).node)
        for choice in choices(bound):
            assert Choice.parse(str(choice)) == choice


@pytest.mark.slow
@pytest.mark.parametrize("name", list(zoo.ZOO))
def test_every_call_of_the_zoo(name: str) -> None:
    """All ops of the model have a rule in the table, and it is true at the model's own shapes and arguments."""
    model, batch = zoo.ZOO[name](0)
    calls = {rules.signature(n): n for n in capture(model, (), batch).gm.graph.nodes if is_op(n)}
    assert {rules.rule_source(n) for n in calls.values()} == {"table"}
    wrong = [w for node in calls.values() for w in check(case_of(node), pairs=4).wrong]
    assert not wrong, "\n".join(wrong[:5])
