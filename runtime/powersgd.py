"""Gradients reduced as products of two thin matrices, what that leaves out added to the next ones (PowerSGD).

Vogels, Karimireddy and Jaggi, "PowerSGD: Practical Low-Rank Gradient Compression for Distributed Optimization" (2019),
algorithms 1 and 2, with Q kept from step to step. Of a gradient that is the sum of pieces M over W ranks:

    M += error;  P = sum(M Q);  P = orthogonal(P);  Q = sum(M^T P);  the gradient is P Q^T;  error = M - P Q^T / W

The sums of all gradients travel together, in two all_reduces on every axis. It runs behind the backward. torch's
`powerSGD_hook` takes means over ranks where this takes sums of what is divided already; the rest is the same.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from autopar.compression import POWERSGD, Compression
from autopar.plan import Plan
from autopar.runtime.groups import Grid
from autopar.spec import Spec


@dataclass(frozen=True)
class Kept:
    """Of one gradient from step to step: what was left out, [rows, columns], and Q, [columns, rank]."""

    error: torch.Tensor
    q: torch.Tensor


@dataclass
class PowerSgd:
    """What a module keeps of all its gradients, by name of the parameter."""

    kept: dict[str, Kept] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of it."""
        return sum(k.error.nbytes + k.q.nbytes for k in self.kept.values())

    @torch.no_grad()
    def reduce(
        self, grads: Mapping[str, torch.Tensor], left: Mapping[str, tuple[str, ...]], rank: int, grid: Grid
    ) -> None:
        """Reduce those of `grads`, in place, that are in `left`: name -> the axes over which they are still sums.

        A collective call. What is not finite is not kept for the next step.
        """
        groups: dict[tuple[tuple[str, ...], torch.dtype], list[_Matrix]] = {}
        for name, grad in grads.items():
            if name in left:
                wide = grad.dtype if grad.dtype.itemsize >= 4 else torch.float32
                groups.setdefault((left[name], wide), []).append(self._matrix(name, grad, wide, rank))
        for (axes, _), found in groups.items():
            share = 1 / math.prod(grid.mesh.sizes[grid.mesh.axis(axis)] for axis in axes)
            for x in found:
                x.kept.error.add_(x.grad)
            sums = _summed([x.kept.error @ x.kept.q for x in found], axes, grid)
            bases = [torch.linalg.qr(p).Q for p in sums]
            ends = _summed([x.kept.error.mT @ p for x, p in zip(found, bases)], axes, grid)
            for x, p, q in zip(found, bases, ends):
                x.settle(p, q, share)

    def _matrix(self, name: str, grad: torch.Tensor, dtype: torch.dtype, rank: int) -> _Matrix:
        matrix = grad.view(grad.shape[0], -1)
        kept = self.kept.get(name)
        if kept is None or kept.error.shape != matrix.shape:
            rank = min(rank, *matrix.shape)
            kept = Kept(torch.zeros_like(matrix, dtype=dtype), first_q(name, matrix.shape[1], rank, dtype, grad.device))
            self.kept[name] = kept
        return _Matrix(matrix, kept)


@dataclass(frozen=True)
class _Matrix:
    grad: torch.Tensor
    kept: Kept

    def settle(self, p: torch.Tensor, q: torch.Tensor, share: float) -> None:
        """Put the reduced gradient in place, and keep the rest."""
        error = self.kept.error
        whole = torch.mm(p, q.mT, out=self.grad) if self.grad.dtype == p.dtype else p @ q.mT
        if whole is not self.grad:
            self.grad.copy_(whole)
        error.sub_(whole, alpha=share)
        # Where a loss overflows, as scaled ones do now and then, the step is thrown away: its error must be too.
        fine = torch.isfinite(whole.sum())
        error.masked_fill_(~fine, 0.0)
        self.kept.q.copy_(torch.where(fine, q, self.kept.q))


def first_q(name: str, columns: int, rank: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The same random matrix on every rank, from the parameter's name; drawn on the host."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randn(columns, rank, generator=generator, dtype=torch.float64).to(dtype).to(device)


def _summed(parts: Sequence[torch.Tensor], axes: Iterable[str], grid: Grid) -> list[torch.Tensor]:
    """Sums over the axes, all parts in one message."""
    flat = torch.cat([part.reshape(-1) for part in parts])
    home = flat.device
    flat = flat.cpu() if grid.staged else flat
    for axis in axes:
        flat = torch.ops._c10d_functional.all_reduce_(flat, "sum", grid.group_names[axis])
        flat = torch.ops._c10d_functional.wait_tensor(flat)
    flat = flat.to(home)
    return [piece.view(part.shape) for piece, part in zip(flat.split([p.numel() for p in parts]), parts)]


def left_of(plan: Plan, homes: Mapping[str, Spec]) -> dict[str, tuple[str, ...]]:
    """Axes over which gradients are still sums, of those that the graph leaves so: name -> spec in `homes`."""
    out = {}
    for name, spec in homes.items():
        axes = tuple(a for a, p, n in zip(plan.mesh.names, spec, plan.mesh.sizes) if p.kind == "P" and n > 1)
        if axes:
            out[name] = axes
    return out


def rank_of(plan: Plan) -> int:
    """The rank of the products, of a plan that leaves gradients as sums."""
    compression = Compression.parse(plan.compression)
    assert compression is not None and compression.kind == POWERSGD, plan.compression
    return compression.rank


__all__ = ["Kept", "PowerSgd", "first_q", "left_of", "rank_of"]
