"""Programs cut into stages at random gaps, run one after the other in one process, against the uncut program.

In float64, over the zoo and models made to be hard to cut; the backward whole (B) and in halves (I, then W).
"""

from __future__ import annotations

import functools
import itertools
import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from autopar.capture import capture
from autopar.costmodel import planner
from autopar.costmodel.pieces import pieces_of
from autopar.errors import PlanError
from autopar.graph import BACKWARD, FORWARD
from autopar.passes.halves import halves
from autopar.passes.partition import partition
from autopar.pipeline.cut import cut
from autopar.pipeline.plans import ALONE
from autopar.pipeline.regions import nbytes, regions_of
from tests import parity, zoo
from tests.widen import double, widen_to_float64

H = 16
LABELS = torch.tensor([-100, -100, 3, -100, 1, 0, 4, 2])


def rows(seed=1, dtype=torch.float64):
    return torch.randn(8, H, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# ---- models --------------------------------------------------------------------------------------------------------


class Skips(nn.Module):
    """Values that cross several stages, forwards and backwards, and outputs of early stages."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(H, H) for _ in range(6))

    def forward(self, x, y):
        h = [x]
        for i, layer in enumerate(self.layers):
            h.append(torch.tanh(layer(h[-1])) + (h[i - 2] if i > 2 else 0) + (h[1] if i == 5 else 0))
        return F.mse_loss(h[-1] + h[2] * h[3], y), h[-1], h[2]


class Tied(nn.Module):
    """One parameter in three layers, also transposed."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(H, H), nn.Linear(H, H, bias=False), nn.Linear(H, H)
        self.c.weight = self.a.weight
        self.gain = nn.Parameter(torch.rand(H))

    def forward(self, x, y):
        h = torch.tanh(self.a(x)) * self.gain
        h = torch.tanh(self.b(h)) @ self.a.weight.t() * self.gain
        return F.mse_loss(self.b(torch.tanh(self.c(h))) * self.gain.exp(), y)


class Frozen(nn.Module):
    """Frozen layers, one that is not used, and one without gradient."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(H, H) for _ in range(5))
        for i in (0, 1, 3):
            self.layers[i].requires_grad_(False)
        self.unused, self.constant = nn.Linear(3, 3), nn.Linear(H, H)

    def forward(self, x, y):
        for layer in self.layers:
            x = torch.relu(layer(x))
        with torch.no_grad():
            z = self.constant(x)
        return F.mse_loss(x + z, y), x


class Checkpointed(nn.Module):
    """The backward computes the forward again, with masks of dropout, from parameters of all stages."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.norm = nn.Linear(H, H), nn.Linear(H, H), nn.LayerNorm(H)

    def part(self, x):
        return F.dropout(torch.sin(self.a(torch.cos(self.b(self.norm(torch.sin(self.a(x))))))), 0.3)

    def forward(self, x, y):
        return F.mse_loss(checkpoint(self.part, checkpoint(self.part, x, use_reentrant=False), use_reentrant=False), y)


class Statistics(nn.Module):
    """Buffers that change in every stage, and one that does not, which all of them read."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(H, H) for _ in range(3))
        self.norms = nn.ModuleList(nn.BatchNorm1d(H, affine=i != 1) for i in range(3))
        self.register_buffer("scale", torch.rand(H))

    def forward(self, x, y):
        for layer, norm in zip(self.layers, self.norms):
            x = torch.relu(norm(layer(x))) * self.scale
        return F.mse_loss(x, y), x


class Several(nn.Module):
    """Ops with several results, in place, and outputs in containers."""

    def __init__(self):
        super().__init__()
        self.q, self.o, self.g = nn.Linear(H, 3 * H), nn.Linear(H, H), nn.Linear(H, 4 * H)

    def forward(self, x, y):
        a, b, c = self.q(x).chunk(3, -1)
        i, f, g, o = self.g(torch.sigmoid(a) * b).split(H, -1)
        z = torch.tanh(i) * f + g * torch.sigmoid(o) + c
        z[:, :2] = 0
        values, order = z.sort(-1)
        top, _ = z.topk(4, -1)
        var, mean = torch.var_mean(z, -1, keepdim=True)
        h = self.o(values) + top.sum(-1, keepdim=True) + (z - mean) / (var + 1).sqrt() + torch.gather(z, 1, order)
        return {"loss": F.mse_loss(h, y), "h": h, "deep": [a, {"b": b}]}


class OfParameters(nn.Module):
    """Ops on parameters alone, and terms of the loss that no input has a part in."""

    def __init__(self):
        super().__init__()
        self.v, self.g = nn.Parameter(torch.randn(H, H)), nn.Parameter(torch.rand(H, 1))
        self.a, self.b = nn.Parameter(torch.randn(H, 2)), nn.Parameter(torch.randn(2, H))
        self.register_buffer("place", torch.arange(H).double())

    def forward(self, x, y):
        w, d, table = self.g * self.v / self.v.norm(dim=1, keepdim=True), self.a @ self.b, torch.sin(self.place / 3)
        h = torch.tanh(torch.tanh(x @ w.t() + table) @ (w + d).t())
        return F.mse_loss(h @ d + torch.cos(table), y) + 0.01 * w.square().sum() + 0.1 * self.g.sum()


class Images(nn.Module):
    """Convolutions: their backward gives both gradients at once."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.up, self.head = nn.ConvTranspose2d(8, 4, 2, 2), nn.Linear(4, 5)

    def forward(self, x, labels):
        h = F.max_pool2d(F.silu(self.a(x)), 2)
        return F.cross_entropy(self.head(self.up(h + self.b(h)).mean((2, 3))), labels)


def pair():
    return {"x": rows(), "y": rows(2)}


HARD = {
    "skips": lambda: (Skips(), pair()),
    "tied": lambda: (Tied(), pair()),
    "frozen": lambda: (Frozen(), pair()),
    "checkpointed": lambda: (Checkpointed(), pair()),
    "statistics": lambda: (Statistics(), pair()),
    "evaluated statistics": lambda: (Statistics().eval(), pair()),
    "several": lambda: (Several(), pair()),
    "of parameters": lambda: (OfParameters(), pair()),
    "images": lambda: (Images(), {"x": torch.randn(8, 3, 8, 8), "labels": LABELS.clamp(min=0)}),
}


@functools.cache
def program_of(name):
    torch.manual_seed(0)
    model, batch = HARD[name]() if name in HARD else zoo.ZOO[name](0, dropout=0.2 if name == "mlp_dropout" else 0.0)
    model, batch = double(model, batch)
    with widen_to_float64():
        return model, batch, capture(model, (), batch)


# ---- running -------------------------------------------------------------------------------------------------------


def run_stages(program, stages, values, split):
    """What the stages give, forwards from the first to the last, then backwards; keys as of `parity.run_global`."""
    known = {(s.kind, s.name): v for s, v in zip(program.sources, values)}
    parts = [partition(s.program.gm, s.program.sources, s.program.sinks) for s in stages]
    sent, back, out, boxes = {}, {}, {}, []
    for stage, part in zip(stages, parts):
        early = [s for s in stage.program.sources if s.phase == FORWARD]
        given = [sent[s.name] if s.name in stage.receives else known[s.kind, s.name] for s in early]
        results = run(part.forward, given)
        sinks = [s for s in stage.program.sinks if s.phase == FORWARD]
        for sink, value in zip(sinks, results):
            if sink.name in stage.sends:
                sent[sink.name] = value
            else:
                out[sink.kind, sink.name] = value
        boxes.append([given[i] for i in part.saved_inputs] + results[len(sinks) :])
    for stage, part, box in reversed(list(zip(stages, parts, boxes))):
        late = [s for s in stage.program.sources if s.phase == BACKWARD]
        box += [back[s.name] if s.late else known[s.kind, s.name] for s in late]
        ends = [s for s in stage.program.sinks if s.phase == BACKWARD]
        if split:
            half = halves(part.backward, [s.kind != "grad" for s in ends])
            first = run(half.inputs, [box[i] for i in half.input_reads])
            count = len(stage.sends_back)
            second = iter(run(half.weights, [box[i] for i in half.weight_reads] + first[count:]))
            returned = iter(first[:count])
            results = [next(second if s.kind == "grad" else returned) for s in ends]
        else:
            results = run(part.backward, box)
        for sink, value in zip(ends, results):
            key = ("grad", sink.name)
            if sink.late:
                back[sink.name] = value
            elif out.get(key) is None:
                out[key] = value
            elif value is not None:
                out[key] = out[key] + value
    return out


def run(gm, values):
    return list(parity._Global(gm).run(*[v.clone() for v in values]))


def cuts(program, regions, seed, tries):
    """Stages at random gaps; gaps at which a buffer's old and new value would part are none."""
    rng = random.Random(seed)
    for count in tries:
        while True:
            places = sorted(rng.sample(range(1, len(regions.sequence)), count - 1))
            try:
                yield cut(program, [regions.sequence[i].meta["address"] for i in places], regions)
            except PlanError as error:
                assert "buffer" in str(error) and "is changed in stage" in str(error)
                continue
            break


#: As others are, for a cut: in the slow sweep only.
ALIKE = ("bert", "mixtral", "encoder", "vit")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in ALIKE else n for n in [*zoo.ZOO, *HARD]]
)
def test_stages_are_together_the_program(name):
    model, batch, program = program_of(name)
    regions = regions_of(program)
    values = parity.feeds(program, model, (), batch)
    want = parity.run_global(program, values)
    want = {k: v for k, v in want.items() if isinstance(v, torch.Tensor) or k[0] == "grad"}
    assert any(k == "grad" for k, _ in want)
    for stages in cuts(program, regions, name, (2, 3) if name in zoo.ZOO else (2, 3, 5)):
        for before, after in itertools.pairwise(stages):
            assert before.sends == after.receives and before.receives_back == after.sends_back
        for split in (False, True):
            got = run_stages(program, stages, values, split)
            label = f"{name} cut at {[s.program.sources[0].node for s in stages]}, {'halves' if split else 'whole'}"
            assert {k for k in want if got.get(k) is None} == {k for k, v in want.items() if v is None}, label
            error, where = parity.max_error(got, want)
            assert error < 1e-12, f"{label}: {where} is off by {error:.1e}"


def test_a_broken_boundary_is_seen():
    """The comparison above can fail: a gradient that is not sent back is missing."""
    model, batch, program = program_of("skips")
    values = parity.feeds(program, model, (), batch)
    want = parity.run_global(program, values)
    stages = next(cuts(program, regions_of(program), 0, (3,)))
    name = stages[-1].sends_back[0]
    node = next(s.node for s in stages[-2].program.sources if s.name == name)
    gm = stages[-2].program.gm
    placeholder = next(n for n in gm.graph.nodes if n.name == node)
    user = next(iter(placeholder.users))
    with gm.graph.inserting_before(user):
        half = gm.graph.call_function(torch.ops.aten.mul.Tensor, (placeholder, 0.5))
        half.meta.update(phase=BACKWARD, module="", val=placeholder.meta["val"])
    user.replace_input_with(placeholder, half)
    assert parity.max_error(run_stages(program, stages, values, False), want)[0] > 1e-3


# ---- what crosses --------------------------------------------------------------------------------------------------


def test_between_layers_of_llama_one_tensor_crosses_each_way():
    _, _, program = program_of("llama")
    regions = regions_of(program)
    sizes = [(nbytes(v), len(v)) for v in regions.live()]
    middle = next(i for i, n in enumerate(regions.sequence) if n.meta["module"].startswith("model.layers.1"))
    gap = min(range(middle - 3, middle + 3), key=lambda i: sizes[i])
    first, second = cut(program, [regions.sequence[gap].meta["address"]], regions)
    assert len(first.sends) == len(first.receives_back) == 1
    (value,) = regions.live()[gap]
    hidden = 8 * 8 * 32 * 8
    assert sizes[gap] == (hidden, 1) and value.shape[-1] == 32
    assert not first.shared and not second.shared
    names = [{s.name for s in stage.program.of_kind("param")} for stage in (first, second)]
    assert not names[0] & names[1]


def test_tied_embeddings_are_in_both_stages_and_skips_are_handed_on():
    _, _, program = program_of("gpt2")
    regions = regions_of(program)
    middle = regions.sequence[len(regions.sequence) // 2].meta["address"]
    first, second = cut(program, [middle], regions)
    assert first.shared == second.shared == {"transformer.wte.weight": (0, 1)}
    for stage in (first, second):  # its share of the gradient
        sink = next(s for s in stage.program.sinks if s.kind == "grad" and s.name == "transformer.wte.weight")
        assert sink.node is not None

    _, _, program = program_of("skips")
    regions = regions_of(program)
    starts = [n.meta["address"] for n in regions.sequence if n.meta["module"] in ("layers.2", "layers.3", "layers.5")]
    stages = cut(program, [next(a for a in starts if f"layers.{i}/" in a) for i in (2, 3, 5)], regions)
    relayed = set(stages[1].receives) & set(stages[1].sends)
    assert relayed, "a skip crosses the second stage"
    assert all(s.kind == "output" for s in stages[1].program.sinks if s.name in relayed)


def test_where_a_stage_cannot_begin():
    _, _, program = program_of("statistics")
    regions = regions_of(program)
    addresses = [n.meta["address"] for n in regions.sequence]
    for starts, text in ((["nowhere"], "cannot begin"), (addresses[:1], "order"), (addresses[5:3:-1], "order")):
        with pytest.raises(PlanError, match=text):
            cut(program, starts, regions)


def test_no_place_to_cut_at_parts_a_buffer_from_its_readers():
    """A norm that three layers share has one stage; those behind it may be cut."""

    class Shared(Statistics):
        def forward(self, x, y):
            for i in (0, 0, 0, 1, 2):
                x = torch.relu(self.norms[0 if i == 0 else i](self.layers[i](x)))
            return F.mse_loss(x, y)

    torch.manual_seed(0)
    program = capture(Shared().double(), (), pair())
    plan = planner.plan(program, ALONE, device="cpu")
    pieces = pieces_of(program, plan, "cpu", stages=4, micro=4)
    assert pieces.starts
    for start in pieces.starts:
        cut(program, [start])
