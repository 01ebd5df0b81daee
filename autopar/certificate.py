"""What `autopar verify` has found: how far a plan's numbers are from one device's, and where they are farthest."""

from __future__ import annotations

from dataclasses import dataclass

from rich import box
from rich.console import RenderableType
from rich.table import Table

#: Largest relative error that float64 rounding explains: of a tensor's largest element, or of a millionth of the
#: largest gradient where a gradient is zero but for rounding.
LIMIT = 1e-9


@dataclass(frozen=True)
class Row:
    """One line of the certificate: the worst tensor of a kind."""

    what: str
    error: float
    where: str

    @property
    def equal(self) -> bool:
        """Whether the error is what rounding explains."""
        return self.error <= LIMIT


@dataclass(frozen=True)
class Certificate:
    """What was compared, and how far it is off.

    Attributes:
        target: the model, as given to `autopar plan`.
        plan_mesh: mesh of the plan.
        mesh: mesh that was run.
        parameters: number of parameter elements of the small model.
        kept: decisions of the plan that were run as they are.
        total: all decisions of the plan that concern the small model.
        changed: where the small model does not allow the decision.
        reference: what the plan was compared with.
        seconds: of the whole comparison.
    """

    target: str
    plan_mesh: str
    mesh: str
    parameters: int
    kept: int
    total: int
    changed: tuple[str, ...]
    reference: str
    rows: tuple[Row, ...]
    seconds: float

    @property
    def equal(self) -> bool:
        """Whether everything agrees."""
        return all(row.equal for row in self.rows)


def table(certificate: Certificate) -> list[RenderableType]:
    """The certificate as text and a table."""
    c = certificate
    head = [
        f"{c.target}: the plan for {c.plan_mesh}, run on {c.mesh} "
        f"with a model of {c.parameters:,} parameters in float64",
        f"compared with {c.reference}; {c.kept} of {c.total} decisions run as planned, {c.seconds:.0f} s",
    ]
    rows = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    rows.add_column("what")
    rows.add_column("max relative error", justify="right")
    rows.add_column("worst at", overflow="fold")
    rows.add_column("verdict")
    for row in c.rows:
        rows.add_row(row.what, f"{row.error:.1e}", row.where, "equal" if row.equal else "DIFFERENT")
    verdict = "equal to one device" if c.equal else f"NOT equal to one device (limit {LIMIT:.0e})"
    return ["\n".join(head), rows, verdict]


__all__ = ["LIMIT", "Certificate", "Row", "table"]
