"""Ranks agree before they act: one small exchange a step, and none of them left waiting when one fails.

A rank that raises alone would leave the others in a collective until it times out. So every piece of work that may
raise and is followed by communication runs inside `Control.together`; and before each step all ranks exchange one row
of integers (`Control.agree`): did anything raise, do the arguments have the same structure, do they hold the same
values where they should, and which seed. Only if a row differs is a second, larger exchange made, to say what differs.
The answers are not needed before the first collective of the step: `Control.ask` lets them travel meanwhile.
"""

from __future__ import annotations

import hashlib
import re
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import zip_longest
from typing import Any

import torch
import torch.distributed as dist

from autopar import errors
from autopar.errors import AutoparError, BatchError, RankMismatchError
from autopar.runtime.board import CAPACITY
from autopar.runtime.groups import Grid

WORDS = 1024  # columns of the matrix whose weighted row and column sums are the checksum
SHORT = 1 << 16  # words of a tensor that is summed in one go, with a weight for every one
_MOST = 8  # calls that an error names


def hash64(*parts: object) -> int:
    """A hash of the printed parts that is the same in every process, as a signed 64-bit integer."""
    digest = hashlib.blake2b("\x00".join(str(p) for p in parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)


def checksum(tensor: torch.Tensor) -> int:
    """64-bit checksum of the bytes of a tensor, on its own device: sees changed, moved and swapped elements."""
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    if flat.storage_offset() % 4:
        flat = flat.clone()  # words are aligned, and the sum must not depend on where the tensor lies
    if flat.numel() % 4 == 0:
        flat = flat.view(torch.int32)
    if len(flat) <= SHORT:
        return int((flat * _weights(len(flat), 3, flat.device)).sum().item())
    whole = flat.numel() // WORDS * WORDS
    grid, tail = flat[:whole].reshape(-1, WORDS), flat[whole:].to(torch.int64)
    columns = grid.sum(dim=0, dtype=torch.int64)
    rows = grid.sum(dim=1, dtype=torch.int64)
    total = (columns * _weights(WORDS, 1, flat.device)).sum() + (rows * _weights(len(rows), 2, flat.device)).sum()
    total = total + (tail * _weights(len(tail), 3, flat.device)).sum()
    return int(total.item())


@lru_cache(maxsize=32)
def _weights(count: int, salt: int, device: torch.device) -> torch.Tensor:
    """Odd pseudo-random multipliers (splitmix64's, without its last shift)."""
    x = torch.arange(count, dtype=torch.int64, device=device) * 2 + (2 * salt + 1) * 0x9E3779B1
    x = (x ^ (x >> 15)) * 0x1CE4E5B9BF58476D
    return (x ^ (x >> 27)) | 1


@dataclass(frozen=True)
class Argument:
    """One tensor or value of a call, as compared between ranks: `form` is dtype and shape, or the value itself.

    `piece`: of a local batch, so that ranks with other parts of it hold other values.
    """

    name: str
    form: str
    content: int = 0
    piece: bool = False


@lru_cache(maxsize=1024)
def tensor_form(dtype: torch.dtype, shape: torch.Size) -> str:
    """The form of a tensor argument.

    >>> tensor_form(torch.int64, torch.Size((8, 64)))
    'int64 (8, 64)'
    """
    return f"{str(dtype).removeprefix('torch.')} {tuple(shape)}"


@dataclass(frozen=True)
class Call:
    """What one rank is about to run.

    Attributes:
        arguments: the flattened call.
        mode: what else must agree, printed ("training with gradients").
        part: which piece of the batch this rank was given; ranks with the same part must hold the same values.
        seed: this rank's proposal; rank 0's is used by all.
        parts: the part of every rank.
    """

    arguments: tuple[Argument, ...]
    mode: str
    seed: int = 0
    part: int = 0
    parts: tuple[int, ...] = field(default=())


@contextmanager
def answered(grid: Grid) -> Iterator[None]:
    """Turn what the transport raises when a rank is gone or late into a RankMismatchError; other errors pass."""
    try:
        yield
    except RuntimeError as error:
        lost = isinstance(error, dist.DistError) or re.search("gloo|nccl|[Cc]onnection|[Tt]imed out", str(error))
        if grid.control is None or isinstance(error, AutoparError) or not lost:
            raise
        raise RankMismatchError(
            f"rank {grid.rank}: not every rank of mesh {grid.mesh} answered within {grid.timeout:g} s: one has "
            f"stopped, or does not call the module (or backward) as often as the others; see its own output "
            f"({str(error).splitlines()[0]})"
        ) from error


def _answered(grid: Grid, read: Callable[[], list[list[int]]]) -> list[list[int]]:
    with answered(grid):
        return read()


class Answer:
    """What the others say, read once: calling it waits, raises what `Control.agree` raises, and gives the seed."""

    def __init__(self, read: Callable[[], int]) -> None:
        self._read: Callable[[], int] | None = read
        self._seed = 0

    def __call__(self) -> int:
        if self._read is not None:
            read, self._read = self._read, None
            self._seed = read()
        return self._seed


class Control:
    """The conversation between the ranks of one grid; with one process, it answers at once."""

    def __init__(self, grid: Grid) -> None:
        self.grid = grid

    def rows(self, row: Sequence[int]) -> list[list[int]]:
        """Everybody's row of integers, by rank (all of the same length).

        Raises:
            RankMismatchError: a rank has died or did not come within the timeout.
        """
        return self._begin(row)()

    def _begin(self, row: Sequence[int]) -> Callable[[], list[list[int]]]:
        """Send what `rows` sends; the function waits for the others."""
        if self.grid.control is None or self.grid.size == 1:
            return lambda: [list(row)]
        board = self.grid.board
        if board is not None and len(row) <= CAPACITY:
            with answered(self.grid):
                read = board.post(row)
            return lambda: _answered(self.grid, read)
        # To everybody at once: gloo's all_gather goes round the ranks, one hop behind the other.
        mine = torch.tensor(list(row) * self.grid.size, dtype=torch.int64, device="cpu")
        out = torch.empty_like(mine)
        with answered(self.grid):
            work = dist.all_to_all_single(out, mine, group=self.grid.control, async_op=True)

        def finish() -> list[list[int]]:
            with answered(self.grid):
                work.wait()
            return out.view(self.grid.size, -1).tolist()

        return finish

    def objects(self, value: Any) -> list[Any]:
        """Everybody's picklable object, by rank. Raises as `rows`."""
        if self.grid.control is None or self.grid.size == 1:
            return [value]
        out: list[Any] = [None] * self.grid.size
        with answered(self.grid):
            dist.all_gather_object(out, value, group=self.grid.control)
        return out

    @contextmanager
    def together(self, what: str) -> Iterator[None]:
        """Run the body on every rank, then compare notes: if it raised on any rank, every rank raises.

        The body must not communicate. A rank whose body raised re-raises its own error; the others raise
        RankMismatchError naming rank and message.
        """
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            failure = error
        self.status(what, failure)

    def status(self, what: str, failure: Exception | None) -> None:
        """Exchange whether `what` went well; see `together`."""
        if any(row[0] for row in self.rows([int(failure is not None)])):
            self._report(what, failure)

    def _report(self, what: str, failure: Exception | None) -> None:
        texts = self.objects(None if failure is None else _one_line(failure))
        if failure is not None:
            raise failure
        failed = [f"rank {rank}: {text}" for rank, text in enumerate(texts) if text is not None]
        raise RankMismatchError(f"{what} failed on {len(failed)} of {len(texts)} ranks: {'; '.join(failed)}")

    def same(self, what: str, value: Any, remedy: str, describe: Callable[[Any, Any], str] | None = None) -> None:
        """Require that `value` (printable, picklable) is equal on every rank.

        Raises:
            RankMismatchError: on every rank, naming the ranks that differ from rank 0.
        """
        if len({row[0] for row in self.rows([hash64(repr(value))])}) == 1:
            return
        values = self.objects(value)
        other = [rank for rank, v in enumerate(values) if repr(v) != repr(values[0])]
        detail = describe(values[0], values[other[0]]) if describe else f"{values[0]} and {values[other[0]]}"
        raise RankMismatchError(
            f"the ranks disagree on {what}: {ranks_text(other)} differ{'s' * (len(other) == 1)} from rank 0 "
            f"({detail}); {remedy}"
        )

    def share(self, what: str, make: Callable[[], Any]) -> Any:
        """Let rank 0 make a picklable object, and give it to every rank.

        What rank 0 raises, every rank raises: an error of ours with its message, else RankMismatchError.
        """
        if self.grid.control is None or self.grid.size == 1:
            return make()
        failure: Exception | None = None
        box: list[Any] = [None, None]
        if self.grid.rank == 0:
            try:
                box[0] = make()
            except Exception as error:
                failure = error
                box[1] = (type(error).__name__, str(error))
        with answered(self.grid):
            dist.broadcast_object_list(box, group_src=0, group=self.grid.control)
        if failure is not None:
            raise failure
        if box[1] is not None:
            kind, text = box[1]
            ours = getattr(errors, kind, None)
            raise ours(text) if ours else RankMismatchError(f"{what} failed on rank 0: {kind}: {text}")
        return box[0]

    def agree(self, call: Call | None, failure: Exception | None = None, *, check: bool = True) -> int:
        """The exchange before a step; gives the seed of the step.

        Raises:
            BatchError: on every rank, naming the argument and the ranks that differ.
            RankMismatchError: another rank's `failure` (its own is re-raised), or another mode.
        """
        return self.ask(call, failure, check=check)()

    def ask(self, call: Call | None, failure: Exception | None = None, *, check: bool = True) -> Answer:
        """Begin `agree`; the answer is to be called for in any case, before anything else is exchanged."""
        if call is None:
            assert failure is not None
            row = [1, 0, 0, 0, 0, 0]
        else:
            structure = hash64(*((a.name, a.form) for a in call.arguments)) if check else 0
            shared = hash64(structure, *(a.content for a in call.arguments if not a.piece)) if check else 0
            content = hash64(*(a.content for a in call.arguments)) if check else 0
            row = [int(failure is not None), hash64(call.mode), shared, content, call.seed, structure]
        answer = self._begin(row)
        return Answer(lambda: self._judge(answer(), call, failure))

    def _judge(self, rows: list[list[int]], call: Call | None, failure: Exception | None) -> int:
        """The seed, or what `agree` raises, from everybody's row."""
        if any(r[0] for r in rows):
            self._report("the step", failure)
        assert call is not None
        parts = call.parts or (0,) * len(rows)
        first = {part: parts.index(part) for part in parts}
        alike = all(r[1:3] == rows[0][1:3] for r in rows) and all(
            r[3] == rows[first[part]][3] for r, part in zip(rows, parts)
        )
        if not alike:
            raise _difference(self.objects(call), parts)
        return rows[0][4]

    def unvaried(self, call: Call) -> list[str]:
        """Names of the pieces of a local batch that hold the same values on every rank; a collective call.

        Every rank must bring the same arguments, as after `agree`.
        """
        if len(set(call.parts)) < 2:
            return []
        pieces = [a for a in call.arguments if a.piece]
        rows = self.rows([a.content for a in pieces])
        return [a.name for a, contents in zip(pieces, zip(*rows)) if len(set(contents)) == 1]


class Journal:
    """Calls that were made without an exchange, for it would be a barrier; compared when the ranks meet anyway."""

    def __init__(self, control: Control) -> None:
        self.control, self._made = control, array("q")  # a checksum of every call since the ranks were compared

    def note(self, call: Call) -> None:
        """Write a call down; all of its arguments must be equal on every rank."""
        self._made.append(hash64(call.mode, *((a.name, a.form, a.content) for a in call.arguments)))

    def compare(self) -> None:
        """Require that all ranks made the same calls; begin anew. A collective call.

        Raises:
            BatchError: they did not; on every rank, saying which of the calls differ.
        """
        made, self._made = self._made, array("q")
        if len({row[0] for row in self.control.rows([hash64(*made)])}) == 1:
            return
        calls = list(zip_longest(*self.control.objects(made.tolist())))
        wrong = [number for number, found in enumerate(calls, 1) if len(set(found)) > 1]
        others = [r for r in range(self.control.grid.size) if any(calls[n - 1][r] != calls[n - 1][0] for n in wrong)]
        more = f" and {len(wrong) - _MOST} more" if len(wrong) > _MOST else ""
        raise BatchError(
            f"the ranks were given different batches in {'calls' if len(wrong) > 1 else 'call'} "
            f"{', '.join(map(str, wrong[:_MOST]))}{more} of the {len(calls)} since they were last compared: "
            f"{ranks_text(others)} differ{'s' * (len(others) == 1)} from rank 0; pass the same global batch on every "
            "rank (seed shuffling alike), and go on from a checkpoint that is older than these updates"
        )


_SHAPES_GLOBAL = 'pass the same global batch on every rank, or compile with batch="local" and give each rank its own'
_SHAPES_LOCAL = "local batches must have one shape on every rank (DistributedSampler with drop_last=True)"
_VALUES_GLOBAL = (
    'pass the same global batch on every rank (seed shuffling alike), or compile with batch="local" and give each rank '
    "its own"
)
_VALUES_WHOLE = (
    "it is no piece of the batch (its dim 0 is not the batch's, or shared= names it), so it must be the same on every "
    "rank"
)
_VALUES_LOCAL = (
    "ranks that share a data coordinate must get the same local batch: use DistributedSampler(..., **pm.sampler_args)"
)


def _difference(calls: list[Call], parts: Sequence[int]) -> AutoparError:
    """The error for calls that do not fit together; the same on every rank."""
    modes = [c.mode for c in calls]
    if len(set(modes)) > 1:
        return RankMismatchError(
            f"the ranks run different steps: {_by_value(modes)}; call train(), eval() and no_grad() alike on every rank"
        )
    local = len(set(parts)) > 1
    names = [[a.name for a in c.arguments] for c in calls]
    if any(n != names[0] for n in names):
        return BatchError(
            f"the ranks pass different arguments: {_by_value([', '.join(n) for n in names])}; "
            "pass the same ones everywhere"
        )
    for i, name in enumerate(names[0]):
        forms = [c.arguments[i].form for c in calls]
        if len(set(forms)) > 1:
            remedy = _SHAPES_LOCAL if local else _SHAPES_GLOBAL
            return BatchError(f"argument {name!r} differs between ranks: {_by_value(forms)}; {remedy}")
    for i, name in enumerate(names[0]):
        for part in dict.fromkeys(parts):
            same = [rank for rank, p in enumerate(parts) if p == part or not calls[0].arguments[i].piece]
            other = [r for r in same if calls[r].arguments[i].content != calls[same[0]].arguments[i].content]
            if other:
                remedy = _VALUES_GLOBAL
                if local:
                    remedy = _VALUES_LOCAL if calls[0].arguments[i].piece else _VALUES_WHOLE
                return BatchError(
                    f"argument {name!r} ({calls[0].arguments[i].form}) holds other values on {ranks_text(other)} than "
                    f"on rank {same[0]}; {remedy}"
                )
    return RankMismatchError("the ranks announced different steps, yet describe them alike; please report this")


def ranks_text(ranks: Sequence[int]) -> str:
    """`rank 3`, `ranks 1, 3`."""
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"


def _by_value(values: Sequence[str]) -> str:
    where: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        where.setdefault(value, []).append(rank)
    return "; ".join(f"{value} on {ranks_text(ranks)}" for value, ranks in where.items())


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:600]}"
