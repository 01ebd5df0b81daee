"""Mixed precision: the program, against torch.autocast, and its plans."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import autopar
from autopar import casting, cli, decide, fixes
from autopar.capture import capture
from autopar.costmodel.price import price
from autopar.costmodel.shuffle import random_plan
from autopar.errors import ConstraintError, InfeasibleError, PlanError
from autopar.given import check_plan
from autopar.graph import Program, is_op, op_name, pattern
from autopar.mesh import Mesh
from autopar.passes import collectives
from autopar.plan import Plan
from autopar.precision import ADDED, Precision
from autopar.rule import WHOLE
from tests import parity
from tests.pipeline_runs import example
from tests.test_infeasible import Net
from tests.trained import full

BF16, FP16 = torch.bfloat16, torch.float16
#: A unit in the last place, from 1 on.
ROUNDING = {"bf16": 2.0**-8, "fp16": 2.0**-11}
DTYPES = {"bf16": BF16, "fp16": FP16}


def loss_of(out: Any) -> torch.Tensor:
    return out if isinstance(out, torch.Tensor) else out[0]


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """By name, those that are not zero up to rounding (of a key's bias, say)."""
    found = {n: full(p.grad).detach() for n, p in model.named_parameters() if p.grad is not None}
    most = max(float(g.norm()) for g in found.values())
    return {n: g for n, g in found.items() if float(g.norm()) > 1e-4 * most}


def off(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> dict[str, float]:
    """Relative error of every gradient of `want`."""
    return {n: float((got[n] - g).norm() / g.norm()) for n, g in want.items()}


def program_of(name: str, precision: Precision, **options: Any) -> tuple[nn.Module, dict[str, Any], Program]:
    model, batch = example(name, double=False, **options)
    return model, batch, capture(model, (), batch, precision=precision)


def ops(program: Program, *names: str) -> list[torch.fx.Node]:
    return [n for n in program.gm.graph.nodes if is_op(n) and op_name(n) in names]


# ---- the program ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compute", ["bf16", "fp16"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "resnet", "mlp_dropout"])
def test_equals_the_plain_model_under_autocast(name, compute):
    """As near to fp32 as autocast is, loss and gradients; embeddings and what is added to them are of low precision
    here, so that it may be three times as far off. Gradients are fp32."""
    model, batch = example(name, double=False)
    plain, cast = copy.deepcopy(model), copy.deepcopy(model)
    pm = autopar.compile(model, 1, example=batch, precision=compute, device="cpu")
    out = pm(**batch)
    loss_of(out).backward()
    exact = loss_of(plain(**batch))
    exact.backward()
    with torch.autocast("cpu", dtype=DTYPES[compute]):
        torchs = loss_of(cast(**batch))
    (torchs * 2.0**10).backward()
    loss = float(loss_of(out).detach())
    assert loss_of(out).dtype is torch.float32
    assert loss != float(exact), "nothing was rounded"
    assert abs(loss - float(exact)) < 2 * ROUNDING[compute] * float(exact)
    assert abs(loss - float(torchs)) < 2 * ROUNDING[compute] * float(exact)
    assert all(p.grad.dtype is p.dtype is torch.float32 for p in pm.parameters())
    want = gradients(plain)
    ours, theirs = off(gradients(pm), want), off({n: g / 2.0**10 for n, g in gradients(cast).items()}, want)
    for n, error in ours.items():
        assert error < 3 * max(theirs[n], 4 * ROUNDING[compute]), (n, error, theirs[n])


def test_what_computes_in_what():
    """Products and attention low, islands in fp32, found by rule; a router's softmax and top-k too."""
    _, _, program = program_of("llama", Precision("bf16"))
    low = ops(program, "aten.mm", "aten.bmm", "aten.embedding", "aten.silu")
    low += [n for n in program.gm.graph.nodes if is_op(n) and "attention" in op_name(n)]
    assert len(low) > 40
    for node in low:
        val = node.meta["val"]
        assert (val[0] if isinstance(val, tuple) else val).dtype is BF16, node.meta["address"]
    wide = ops(program, "aten.rsqrt", "aten._log_softmax", "aten.nll_loss_forward", "aten.pow.Tensor_Scalar",
               "aten.embedding_dense_backward")  # fmt: skip
    wide += [n for n in ops(program, "aten.sum.dim_IntList") if "norm" in n.meta["module"]]
    assert len(wide) > 20
    for node in wide:
        val = node.meta["val"]
        assert (val[0] if isinstance(val, (tuple, list)) else val).dtype is torch.float32, node.meta["address"]
    _, _, experts = program_of("mixtral", Precision("bf16"))
    for name, count in (("aten.mm", 3), ("aten._softmax", 1), ("aten.topk", 1)):
        routing = [n for n in ops(experts, name) if n.meta["module"].endswith("mlp.gate")]
        assert len(routing) == count, name
        for node in routing:
            val = node.meta["val"]
            assert (val[0] if isinstance(val, (tuple, list)) else val).dtype is torch.float32, node.meta["address"]
    assert {n.meta["val"].dtype for n in ops(experts, "aten.mm") if "attn" in n.meta["module"]} == {BF16}
    _, _, grouped = program_of("mixtral", Precision("bf16"), experts="grouped_mm")
    assert {n.meta["val"].dtype for n in ops(grouped, "transformers.grouped_mm_fallback", "aten._grouped_mm")} == {BF16}


class Counted(nn.Module):
    """How often the label is among the best two, beside the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(16, 8)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = self.head(x)
        best = logits.topk(2).indices
        return nn.functional.cross_entropy(logits, y), (best == y.unsqueeze(-1)).float().mean()


def test_a_top_k_that_only_counts_is_no_router():
    program = capture(Counted(), (torch.randn(8, 16), torch.zeros(8, dtype=torch.long)), precision=Precision("bf16"))
    assert ops(program, "aten.topk")
    assert {n.meta["val"].dtype for n in ops(program, "aten.mm", "aten.addmm")} == {BF16}


class Handmade(nn.Module):
    """A norm written out, without any cast, a router, and a loss beside the model."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.gate, self.down = nn.Linear(16, 16), nn.Linear(16, 4), nn.Linear(16, 16)
        self.scale = nn.Parameter(torch.ones(16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.up(x)
        h = h * torch.rsqrt((h * h).mean(-1, keepdim=True) + 1e-6) * self.scale
        weights, chosen = torch.topk(torch.softmax(self.gate(h), -1), 2)
        return self.down((h.unsqueeze(-2) * weights.unsqueeze(-1)).sum(-2) + chosen.sum(-1, keepdim=True))


def test_islands_that_a_model_writes_itself():
    torch.manual_seed(0)
    x = torch.randn(8, 16)
    program = capture(Handmade(), (x,), precision=Precision("bf16"))
    for name in ("aten.rsqrt", "aten._softmax", "aten.topk"):
        (node,) = ops(program, name)
        val = node.meta["val"]
        assert (val[0] if isinstance(val, (tuple, list)) else val).dtype is torch.float32
    found = {(n.meta["module"], n.meta["val"].dtype) for n in ops(program, "aten.mm", "aten.addmm")}
    assert found == {("up", BF16), ("gate", torch.float32), ("down", BF16)}
    (out,) = [s for s in program.sinks if s.kind == "output"]
    assert program.node(out.node).meta["val"].dtype is torch.float32, "a loss outside must not be of low precision"


def test_casts_are_made_once_and_looks_are_the_backwards_own():
    _, _, program = program_of("llama", Precision("bf16"))
    params = {s.node for s in program.of_kind("param")}
    seen: set[Any] = set()
    for node in ops(program, "aten._to_copy"):
        key = (node.args[0], node.meta["val"].dtype, node.meta["phase"])
        assert key not in seen, node.meta["address"]
        seen.add(key)
        if node.args[0].name in params:
            phases = {u.meta["phase"] for u in node.users}
            assert phases == {node.meta["phase"]}, "the backward keeps what the forward has cast"
    assert any(k[0].name in params and k[2] == "bwd" for k in seen)
    for node in ops(program, "aten._to_copy"):  # fp32 -> low -> fp32, and nobody reads what is between
        (source,) = node.all_input_nodes
        if source.target is node.target and len(source.users) == 1 and source.meta["phase"] == node.meta["phase"]:
            assert source.all_input_nodes[0].meta["val"].dtype is not node.meta["val"].dtype


def test_autocast_is_as_it_was():
    x = torch.randn(4, 4, dtype=BF16)
    program_of("mlp_dropout", Precision("bf16"))
    with torch.autocast("cpu", dtype=BF16):
        assert torch.softmax(x, -1).dtype is BF16
        assert nn.functional.embedding(torch.zeros(1, dtype=torch.long), x.float()).dtype is torch.float32


def test_every_island_is_an_op_or_of_another_torch():
    missing = [name for name in (*casting.ISLANDS, *casting.PROMOTED, "_grouped_mm") if casting._found(name) is None]
    assert len(missing) <= 1, missing


@pytest.mark.parametrize("size", [2, 6])
def test_other_batch_sizes_come_of_one_trace(size):
    model, batch = example("gpt2", double=False)
    pm = autopar.compile(model, 1, example=batch, precision="bf16", device="cpu")
    with pytest.warns(UserWarning, match="every batch size"):
        pm(**{k: v[:size] for k, v in batch.items()})
    plain = float(loss_of(model(**{k: v[:size] for k, v in batch.items()})))
    assert abs(float(loss_of(pm(**{k: v[:size] for k, v in batch.items()}))) - plain) < 2 * ROUNDING["bf16"] * plain


# ---- the plan ------------------------------------------------------------------------------------------------------


def big() -> tuple[nn.Module, dict[str, Any]]:
    """So wide that bytes, and not the number of messages, decide; without weights."""
    with torch.device("meta"):
        config = LlamaConfig(
            vocab_size=1024, hidden_size=2048, intermediate_size=4096, num_hidden_layers=1, num_attention_heads=16
        )
        model = LlamaForCausalLM(config)
    ids = torch.zeros(16, 512, dtype=torch.long)
    return model, {"input_ids": ids, "labels": ids}


def sent(program: Program, plan: Plan, kind: Any) -> dict[torch.dtype, int]:
    """Collectives of a kind by dtype, of matrices."""
    found: dict[torch.dtype, int] = {}
    for node in parity.lower(program, plan).gm.graph.nodes:
        if node.op == "call_function" and node.target is kind and node.meta["val"].dim() == 2:
            found[node.meta["val"].dtype] = found.get(node.meta["val"].dtype, 0) + 1
    return found


@pytest.fixture(scope="module")
def plans() -> dict[str, tuple[Program, Plan]]:
    model, batch = big()
    found = {}
    for key, options in {
        "fp32": {}, "wide": {"precision": "bf16"}, "low": {"precision": "bf16", "reduce_dtype": "bf16"},
    }.items():  # fmt: skip
        plan = autopar.plan(model, "dp=4", example=batch, device="h100", constraints={"dp": "zero3"}, **options)
        found[key] = (capture(model, (), batch, precision=plan.computes), plan)
    return found


def test_zero3_gathers_in_low_precision_and_prices_follow(plans):
    (program, plan), (_, fp32) = plans["wide"], plans["fp32"]
    assert plan.precision == {"compute": "bf16", "reduce": "fp32"} and not fp32.precision
    assert all(s.spec[0].kind == "S" for s in plan.storage.values())
    assert set(sent(program, plan, collectives.all_gather)) == {BF16}
    assert set(sent(program, plan, collectives.reduce_scatter)) == {torch.float32}
    mine, before = plan.predicted, fp32.predicted
    assert mine["memory"]["parameters"] == before["memory"]["parameters"], "the masters are fp32"
    assert mine["memory"]["optimizer"] == before["memory"]["optimizer"]
    assert mine["memory"]["activations"] < 0.7 * before["memory"]["activations"]
    assert mine["compute_s"] < 0.2 * before["compute_s"], "an h100 is 15 times as fast in bf16"
    assert mine["comm_s"] < 0.8 * before["comm_s"]


def test_gradients_are_added_up_in_either(plans):
    (program, plan), (_, wide) = plans["low"], plans["wide"]
    assert plan.precision == {"compute": "bf16", "reduce": "bf16"}
    found = sent(program, plan, collectives.reduce_scatter)
    assert found.pop(torch.float32) == 1, "the embedding's is made in fp32"
    assert set(found) == {BF16}
    assert plan.predicted["comm_s"] < 0.9 * wide.predicted["comm_s"]
    marks = {n.meta[ADDED] for n in program.gm.graph.nodes if ADDED in n.meta}
    assert marks == {"bf16"}
    with pytest.raises(PlanError, match="another model"):
        price_checked(plans["wide"][0], plan)


def price_checked(program: Program, plan: Plan) -> Any:
    check_plan(program, plan)
    return price(program, plan)


def test_an_edited_plan_may_not_add_up_before_the_cast(plans):
    program, plan = plans["wide"]
    (cast, *_) = [n.meta["address"] for n in program.gm.graph.nodes if n.meta.get(ADDED)]
    choices = {a: row for a, row in plan.choices.items() if a != pattern(cast)}
    whole = (WHOLE,)
    edited = Plan(**{**vars(plan), "choices": {**choices, cast: whole}})
    with pytest.raises(PlanError, match=r"low precision is added up before its cast.*reduce_dtype="):
        price(program, edited)


@pytest.mark.parametrize("reduce", ["fp32", "bf16"])
def test_random_plans_are_legal_and_equal(reduce):
    """On every rank in one process, as far as bf16 is equal to itself when it is added up in another order."""
    model, batch, program = program_of("llama", Precision("bf16", reduce))
    values = parity.feeds(program, model, (), batch)
    want = parity.run_global(program, values)
    for seed in range(2):
        plan = random_plan(program, Mesh(("a", "b"), (2, 2)), seed)
        assert Plan.from_json(plan.to_json()).precision == program.precision
        got = parity.run_local(parity.lower(program, plan), values)
        error, where = parity.max_error(got, want)
        assert error < 40 * ROUNDING["bf16"], where


def test_files_of_plans():
    model, batch = example("mlp_dropout", double=False)
    plain = autopar.plan(model, "dp=2", example=batch)
    assert '"precision"' not in plain.to_json(), "as files have been"
    plan = autopar.plan(model, "dp=2", example=batch, precision="bf16")
    again = Plan.from_json(plan.to_json())
    assert again.computes == Precision("bf16") and again.fingerprint != plain.fingerprint
    assert plan.fingerprint != autopar.plan(model, "dp=2", example=batch, precision="fp16").fingerprint
    with pytest.raises(PlanError, match="damaged at precision: precision='fp8' does not exist"):
        Plan.from_json(plan.to_json().replace('"compute": "bf16"', '"compute": "fp8"'))
    with pytest.raises(PlanError, match="damaged at precision: precision='auto' is none that a program computes in"):
        Plan.from_json(json.dumps({**json.loads(plan.to_json()), "precision": {"compute": "auto"}}))
    with pytest.raises(PlanError, match="precision=fp32 is asked for, and the plan was made for bf16"):
        autopar.compile(model, 1, example=batch, plan=autopar.plan(model, 1, example=batch, precision="bf16"),
                        precision="fp32")  # fmt: skip
    given = autopar.compile(model, 1, example=batch, plan=autopar.plan(model, 1, example=batch, precision="bf16"))
    assert given.plan.computes.compute == "bf16"


def test_auto_takes_the_quicker_and_tells_both():
    model, batch = big()
    plan = autopar.plan(model, "dp=4", example=batch, device="h100", precision="auto")
    seconds = plan.solver["precisions"]
    assert plan.computes.compute == "bf16" and seconds["bf16"] < seconds["fp32"]
    assert plan.predicted["step_s"] == seconds["bf16"]
    assert any("bf16" in note and "fp32" in note for note in plan.notes)
    small, batch = example("mlp_dropout", double=False)
    plan = autopar.plan(small, "dp=2", example=batch, device="cpu", precision="auto")
    assert not plan.precision, "casts cost more than they bring where nothing is large"
    pm = autopar.compile(small, 1, example=batch, precision="auto", device="cpu")
    assert pm.plan.solver["precisions"].keys() == {"bf16", "fp32"}


def test_auto_on_a_searched_mesh_may_end_in_fp32():
    """What is said of sums of low precision says nothing of fp32; of a low precision it does."""
    small, batch = example("mlp_dropout", double=False)
    pm = autopar.compile(small, "auto", example=batch, precision="auto", reduce_dtype="bf16", device="cpu")
    assert not pm.plan.precision and pm.plan.solver["precisions"].keys() == {"bf16", "fp32"}
    low = autopar.plan(small, 1, example=batch, device="cpu", precision="bf16")
    with pytest.raises(PlanError, match="reduce_dtype=bf16 is asked for, and the plan was made for fp32"):
        autopar.compile(small, 1, example=batch, plan=low, precision="auto", reduce_dtype="bf16")


@pytest.mark.slow
def test_what_fits_in_no_precision_is_explained_once(monkeypatch):
    told = []
    monkeypatch.setattr(decide, "explained", lambda question: told.append(question) or fixes.explained(question))
    monkeypatch.setattr(fixes, "KINDS", {"a smaller batch": fixes.smaller_batches})
    model = Net()
    asked = {"example": {"x": torch.randn(64, 16)}, "device": "cpu", "precision": "auto", "memory_limit": 20_000}
    with pytest.raises(InfeasibleError, match="Nearest that fit") as caught:
        autopar.plan(model, "dp=1", **asked)
    (question,) = told
    assert question.given["precision"] == "auto"
    batch = next(fix for fix in caught.value.fixes if "example" in fix.changes)
    again = autopar.plan(model, "dp=1", **{**asked, **batch.changes})
    assert again.predicted["peak_bytes"] <= asked["memory_limit"] and len(told) == 1
    with pytest.raises(InfeasibleError, match="Nearest that fit"):
        autopar.compile(model, "dp=1", **asked)


def test_options_that_do_not_go_together():
    model, batch = example("mlp_dropout", double=False)
    with pytest.raises(ConstraintError, match="precision='int8' does not exist; choose one of fp32, bf16, fp16, auto"):
        autopar.plan(model, 1, example=batch, precision="int8")
    with pytest.raises(ConstraintError, match=r"reduce_dtype='fp16' with precision='bf16'.*fp32 or bf16"):
        autopar.plan(model, 1, example=batch, precision="bf16", reduce_dtype="fp16")
    with pytest.raises(ConstraintError, match=r"reduce_dtype='fp16' with precision='auto'.*fp32 or bf16"):
        autopar.plan(model, 1, example=batch, precision="auto", reduce_dtype="fp16")
    with pytest.raises(ConstraintError, match=r"precision='fp16' with schedule 'paci'.*bf16"):
        autopar.plan(model, "pp=2", example=batch, precision="fp16", schedule="paci", micro_batches=2)
    with pytest.raises(PlanError, match="precision='auto' compares plans, which needs example="):
        autopar.compile(model, 1, precision="auto")


# ---- commands ------------------------------------------------------------------------------------------------------

TARGET = ("plan", "hf:gpt2", "--set", "n_layer=1", "--set", "n_embd=32", "--set", "n_head=4", "--set", "vocab_size=64",
          "--mesh", "dp=2", "--batch", "4", "--seq", "16")  # fmt: skip


def test_commands_take_and_tell_it(tmp_path, capsys):
    low, plain = str(tmp_path / "low.json"), str(tmp_path / "plain.json")
    assert cli.main([*TARGET, "--precision", "bf16", "--reduce-dtype", "bf16", "-o", low]) == 0
    assert cli.main([*TARGET, "-o", plain]) == 0
    assert capsys.readouterr().out.count("precision:") == 1
    assert cli.main(["show", low]) == 0
    assert "precision: bf16, gradients added up in bf16" in capsys.readouterr().out
    assert cli.main(["show", low, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["precision"] == {"compute": "bf16", "reduce": "bf16"}
    assert cli.main(["diff", plain, low]) == 0
    out = capsys.readouterr().out
    assert "; precision bf16, gradients added up in bf16" in out and out.count("; precision") == 1
    assert cli.main(["price", low]) == 0, "a plan's own program is built again in its precision"


@pytest.mark.slow
def test_verify_is_with_precision_off_and_says_so(tmp_path, capsys):
    file = str(tmp_path / "plan.json")
    assert cli.main([*TARGET, "--precision", "bf16", "--constraint", "dp=zero3", "-o", file]) == 0
    assert cli.main(["verify", file, "--procs", "2"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert ", both with the plan's precision (bf16) off" in out and "equal to one device" in out
