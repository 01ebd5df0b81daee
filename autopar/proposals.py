"""What stages of a pipeline may be made of: for every size of micro-batch plans of a stage's ranks, in priced pieces.

The ranks of a stage run a plan that the planner finds for the program of a micro-batch on the mesh of a stage: the
quickest, or, where memory decides, one that holds less; stages need not run the same.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from autopar.costmodel import planner, stages
from autopar.costmodel.copies import starred
from autopar.costmodel.pieces import Pieces
from autopar.costmodel.remat_levels import BETWEEN, PARTS
from autopar.costmodel.stage_fit import Means, Measurable, fitted, measured
from autopar.costmodel.stages_chain import Additive, Alternatives
from autopar.costmodel.stages_measured import Measured
from autopar.errors import CaptureError, InfeasibleError
from autopar.graph import FORWARD, Program, is_op
from autopar.mesh import Mesh
from autopar.pipeline.cut import cut
from autopar.pipeline.plans import AXIS, outer
from autopar.plan import Pipeline, Plan
from autopar.rule import Choice
from autopar.units import UNLIMITED

#: Plans that hold less are made for so much of a rank's memory, if every stage held as much.
SHARES = (1.0, 0.5)
#: Numbers of micro-batches for which it is looked into what may be computed again: those that are quickest without a
#: limit; and the most.
QUICK = 2
#: What part of a step must be to be had for levels between those of the first look.
LEAST_GAIN = 1e-3

#: (program of a micro-batch, plan, micro-batches, addresses at which pieces begin if that is settled) -> the pieces.
PiecesOf = Callable[[Program, Plan, int, Sequence[str]], Pieces]

#: Options of a plan that keeps all that the backward reads.
KEPT = {"recompute": False, "offload": False, "host_state": False}


@dataclass(frozen=True)
class Proposal:
    """What stages may be made of, for one size of micro-batch.

    Attributes:
        program: of a micro-batch. plans: of it, on the mesh of a stage; a stage runs what one of them says.
        pieces: of each plan, all with the same beginnings.
        again: makes another plan, for a limit of bytes, and its pieces. priced: the pieces of a plan.
        taken: the first plan is that of another size of micro-batch. tightened: plans that hold less were looked for.
    """

    program: Program
    plans: tuple[Plan, ...]
    pieces: tuple[Pieces, ...]
    again: Callable[[float, Sequence[str]], tuple[Plan, Pieces]]
    priced: Callable[[Plan, Sequence[str]], Pieces]
    taken: bool = False
    tightened: bool = False

    @classmethod
    def first(
        cls, program: Program, micro: int, mesh: Mesh, pieces: PiecesOf, options: Mapping[str, Any], like: Plan | None
    ) -> Proposal:
        """With the plan that is quickest if memory is no matter; or with `like`, of another size, if it is legal."""

        def again(limit: float, starts: Sequence[str]) -> tuple[Plan, Pieces]:
            # What a stage keeps, it keeps for all that are in flight: a limit for one micro-batch would not tell what.
            plan = planner.plan(program, mesh, **{**options, "memory_limit": limit, **KEPT})
            return plan, priced(plan, starts)

        def priced(plan: Plan, starts: Sequence[str]) -> Pieces:
            return pieces(program, plan, micro, starts)

        known = None
        if like is not None:
            known = planner.transfer(program, like, device=options["device"], memory_limit=UNLIMITED)
        if known is not None:
            return cls(program, (known,), (priced(known, ()),), again, priced, True)
        plan, found = again(UNLIMITED, ())
        return cls(program, (plan,), (found,), again, priced)

    def own(self) -> Proposal:
        """With a plan of its own in place of one that is taken from another size."""
        plan, pieces = self.again(UNLIMITED, self.starts)
        return Proposal(self.program, (plan,), (pieces,), self.again, self.priced)

    def with_smaller(self, limits: Sequence[float]) -> Proposal:
        """With plans for less memory, as far as there are any; of one that has been asked before, itself."""
        if self.tightened:
            return self
        plans, pieces = list(self.plans), list(self.pieces)
        for limit in limits:
            try:
                plan, found = self.again(limit, self.starts)
            except InfeasibleError:
                break
            if (plan.choices, plan.storage) != (plans[-1].choices, plans[-1].storage):
                plans.append(plan)
                pieces.append(found)
        return replace(self, plans=tuple(plans), pieces=tuple(pieces), tightened=True)

    def with_levels(self, means: Means, parts: Sequence[float], bases: Collection[int] | None = None) -> Proposal:
        """With plans that keep less of a micro-batch.

        parts: how much less, as `remat_levels.levels`. bases: of which of the plans, those that compute nothing again;
        None: of the quickest, and of the one that holds least.
        """
        if means.levels is None:
            return self
        plans, found = list(self.plans), list(self.pieces)
        plain = [k for k, plan in enumerate(plans) if not plan.saved]
        for base in sorted({plain[0], plain[-1]} if bases is None else bases):
            for saved in means.levels(self.program, self.plans[base], parts):
                plan = replace(self.plans[base], saved=dict(saved))
                if all((p.choices is not plan.choices) or p.saved != plan.saved for p in plans):
                    plans.append(plan)
                    found.append(self.priced(plan, self.starts))
        return replace(self, plans=tuple(plans), pieces=tuple(found))

    def bases(self, found: stages.Candidate) -> set[int]:
        """The plans that those of a candidate's stages would be if they computed nothing again."""
        used = [self.plans[k].choices for k in found.choices]
        return {k for k, p in enumerate(self.plans) if not p.saved and any(p.choices is c for c in used)}

    @property
    def starts(self) -> tuple[str, ...]:
        """Addresses at which pieces begin, but for the first."""
        return self.pieces[0].starts

    @property
    def chain(self) -> Additive | Alternatives:
        """The pieces as what stages are cut from."""
        return self.pieces[0].chain if len(self.pieces) == 1 else Alternatives([p.chain for p in self.pieces])

    def repeated(self, found: stages.Candidate) -> list[dict[str, Any]]:
        """What every stage of a candidate computes again, and the seconds that takes of a micro-batch; for reports."""
        if not any(self.plans[k].saved for k in found.choices):
            return []
        out: list[dict[str, Any]] = []
        made = cut(self.program, [self.starts[c - 1] for c in found.cuts[1:-1]])
        for stage, (first, last), k in zip(made, pairwise(found.cuts), found.choices):
            plan = self.plans[k]
            nodes = (n for n in stage.program.gm.graph.nodes if is_op(n) and n.meta["phase"] == FORWARD)
            saved = starred({n.meta["address"]: plan.how_saved(n.meta["address"]) for n in nodes})
            out.append({"seconds": sum(self.pieces[k].again[first:last]), "saved": saved})
        return out

    def plan(self, found: stages.Candidate, mesh: Mesh) -> Plan:
        """The plan of a candidate: every stage as the plan says that it chose."""
        cuts = tuple(self.starts[c - 1] for c in found.cuts[1:-1])
        chosen = [self.plans[k] for k in found.choices]
        made = Pipeline(AXIS, cuts, found.micro, found.schedule)
        return outer(merged(self.program, chosen, cuts), mesh, made)


def proposals_of(
    counts: Sequence[int],
    mesh: Mesh,
    pieces: PiecesOf,
    program_of: Callable[[int], Program],
    options: Callable[[Program], Mapping[str, Any]],
    like: Plan | None = None,
) -> dict[int, Proposal]:
    """Proposals for all numbers of micro-batches. One is solved, the others take its plan over.

    Args:
        mesh: of a stage. program_of: number of micro-batches -> the program of one of them.
        options: of the planner, for a program. like: a plan of another size, if there is one.

    Raises:
        CaptureError: no number gives micro-batches that the model takes: some take no single row in training.
    """
    found: dict[int, Proposal] = {}
    failure: CaptureError | None = None
    for micro in sorted(counts, key=lambda m: (abs(counts.index(m) - len(counts) // 2), m)):
        try:
            program = program_of(micro)
        except CaptureError as error:
            failure = error
            continue
        found[micro] = Proposal.first(program, micro, mesh, pieces, options(program), like)
        like = like or found[micro].plans[0]
    if failure is not None and not found:
        raise failure
    return {micro: found[micro] for micro in counts if micro in found}


def best_choice(
    proposals: dict[int, Proposal], limit: float | None, judged: Mapping[str, Any], means: Means
) -> stages.Choice:
    """Stages, micro-batches and schedule. What is chosen gets a plan of its own, if it has that of another size.

    judged: of `stages.choose`: ranks, link, schedules. means: by which a limit may be met.

    Raises:
        As `stages.choose`.
    """
    while True:
        choice = _choice(proposals, limit, judged, means)
        chosen = proposals[choice.best.micro]
        if not chosen.taken:
            return choice
        proposals[choice.best.micro] = chosen.own()


def _choice(
    proposals: dict[int, Proposal], limit: float | None, judged: Mapping[str, Any], means: Means
) -> stages.Choice:
    """The best of what is proposed; where memory decides, `proposals` get plans that hold less."""
    free = stages.choose(chains_of(proposals), limit=None, **judged)
    if limit is None or max(free.best.peak_bytes) <= limit:
        return free
    free = measured(free, _measurable(proposals), means, judged["ranks"])
    if max(free.best.peak_bytes) <= limit:
        return free
    near = sorted(free.runners, key=lambda c: c.seconds)
    quick = [*dict.fromkeys(c.micro for c in (free.best, *near))][:QUICK]
    for micro, proposal in proposals.items():
        found = proposal.with_smaller([limit * judged["ranks"] * share for share in SHARES])
        proposals[micro] = found.with_levels(means, PARTS) if micro in (*quick, max(proposals)) else found
    among = _measurable(proposals)
    choice = fitted(among, limit, judged, means)
    micro = choice.best.micro
    if means.levels is None or free.best.seconds > choice.best.seconds * (1 - LEAST_GAIN):
        return choice
    proposals[micro] = proposals[micro].with_levels(means, BETWEEN, proposals[micro].bases(choice.best))
    finer = _measurable({micro: proposals[micro]})
    finer[micro].chain.known.update(among[micro].chain.known)
    better = fitted(finer, limit, judged, means)
    return replace(choice, best=better.best) if better.best.seconds < choice.best.seconds else choice


def _measurable(proposals: Mapping[int, Proposal]) -> dict[int, Measurable]:
    return {m: Measurable(p.program, p.plans, p.starts, Measured(p.chain)) for m, p in proposals.items()}


def merged(program: Program, plans: Sequence[Plan], starts: Sequence[str]) -> Plan:
    """One plan of the whole program that is in every stage what the stage's plan is."""
    if all(plan is plans[0] for plan in plans):
        return plans[0]
    choices: dict[str, tuple[Choice, ...]] = {}
    storage: dict[str, Any] = {}
    inputs: dict[str, Any] = {}
    outputs: dict[str, Any] = {}
    forward = [n.meta["address"] for n in program.gm.graph.nodes if is_op(n) and n.meta["phase"] == FORWARD]
    saved: dict[str, str | None] = {}
    for stage, plan in zip(cut(program, starts), plans):
        names = {s.name for s in stage.program.sources} | {s.name for s in stage.program.sinks}
        addresses = [n.meta["address"] for n in stage.program.gm.graph.nodes if "address" in n.meta]
        # What several stages have, masks and shared parameters, is as in the first of them.
        choices.update({a: plan.choice(a) for a in addresses if a not in choices})
        saved.update({a: plan.how_saved(a) for a in addresses if a not in saved})
        for found, given in ((storage, plan.storage), (inputs, plan.inputs), (outputs, plan.outputs)):
            found.update({k: v for k, v in given.items() if k in names and k not in found})
    first = plans[0]
    merged = replace(
        first,
        choices={**first.choices, **choices},
        storage={**first.storage, **storage},
        inputs={**first.inputs, **inputs},
        outputs={**first.outputs, **outputs},
        saved=starred({a: saved.get(a) for a in forward}),
    )
    planner.check_plan(program, merged)
    return merged


def chains_of(proposals: Mapping[int, Proposal]) -> dict[int, stages.Chain]:
    """Number of micro-batches -> what stages are cut from."""
    return {micro: proposal.chain for micro, proposal in proposals.items()}


__all__ = ["Proposal", "best_choice", "merged", "proposals_of"]
