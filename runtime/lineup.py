"""Before the first action: do all ranks of a pipeline run one table, and do neighbours agree on what passes?

A receive that is smaller than what comes ends a gloo process without an exception, and one of another dtype reads
nonsense. So every rank says once what its rows and its forms are, and all of them find the same differences.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from autopar.errors import RankMismatchError
from autopar.pipeline.table import Table, homes
from autopar.runtime.handshake import hash64, ranks_text
from autopar.runtime.work import Forms, Work

#: Of every link between two stages, in both directions: words, what the one sends, what the other receives.
_LINKS = (
    ("forward", "sends_forward", 0, "receives_forward", 1),
    ("backward", "sends_backward", 1, "receives_backward", 0),
)


def introduce(table: Table, stages: Mapping[int, Work]) -> str:
    """What a rank says: length and hash of every row, and the forms of its own stages. JSON."""
    forms = {
        stage: {name: _text(getattr(work, name)) for link in _LINKS for name in (link[1], link[3])}
        for stage, work in stages.items()
    }
    rows = [[len(row), hash64(*row)] for row in table]
    return json.dumps({"rows": rows, "forms": forms})


def compare(table: Table, said: Sequence[str]) -> None:
    """Require that what every rank said fits together.

    Raises:
        RankMismatchError: it does not; the same on every rank.
    """
    heard = [json.loads(text) for text in said]
    rows = [h["rows"] for h in heard]
    others = [rank for rank, r in enumerate(rows) if r != rows[0]]
    if others:
        raise RankMismatchError(
            f"the ranks of the pipeline run different tables: {ranks_text(others)} differ"
            f"{'s' * (len(others) == 1)} from rank 0{_where(rows[0], rows[others[0]])}; make the table from the same "
            "schedule, ranks and micro-batches everywhere"
        )
    home = homes(table)
    forms = {int(stage): f for h in heard for stage, f in h["forms"].items()}
    for stage in sorted(home):
        for way, sends, sender, receives, receiver in _LINKS:
            source, target = stage + sender, stage + receiver
            if source not in home or target not in home:
                continue
            sent, wanted = forms[source][sends], forms[target][receives]
            if sent != wanted:
                raise RankMismatchError(
                    f"stage {source} (rank {home[source]}) sends {way} {sent}, stage {target} (rank {home[target]}) "
                    f"expects {wanted}; make both from the same cut, with the same micro-batch size and dtypes"
                )


def _where(mine: list[list[int]], other: list[list[int]]) -> str:
    if len(mine) != len(other):
        return f" (which has {len(mine)} rows, not {len(other)})"
    row = next(i for i, (a, b) in enumerate(zip(mine, other)) if a != b)
    if mine[row][0] != other[row][0]:
        return f" (whose row of rank {row} has {mine[row][0]} actions, not {other[row][0]})"
    return f" (in the row of rank {row}, of {mine[row][0]} actions)"


def _text(forms: Forms) -> str:
    return ", ".join(map(str, forms)) or "nothing"


__all__ = ["compare", "introduce"]
