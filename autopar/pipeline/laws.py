"""What is known of the schedules in closed form: how long they take, and which weights asynchronous ones see.

Seconds are those of a *rank*: `forward` is what a rank needs for a whole micro-batch, all its chunks together, so that
schedules compare. Stages are equal, and messages cost nothing. For anything else there is `autopar.pipeline.clock`, by
which a schedule is chosen: real costs are never equal, and a message is never free.

Stages are counted from 0 here, and from 1 in the papers.
"""

from __future__ import annotations

from autopar.errors import ScheduleError

#: Those without a flush, by name: a micro-batch costs what it computes, once the pipeline is full.
_FREE = ("async-1f1b", "2bw", "paci")


def makespan(
    name: str,
    ranks: int,
    micro: int,
    *,
    forward: float = 1.0,
    input_grad: float = 1.0,
    weight_grad: float = 1.0,
    chunks: int = 2,
) -> float:
    """Seconds of one table of N ranks and m micro-batches, from its first action to its last, optimizers apart.

    With F, I, W the seconds of a rank and B = I + W:

        gpipe, 1f1b               (m + N - 1) (F + B)                       Huang et al. 2019; Narayanan et al. 2021
        interleaved               (m + (N - 1) / chunks) (F + B)            Narayanan et al. 2021
        zb-h1                     m (F + B) + (N - 1) max(F, F + I - W)     Qi et al. 2024, for m >= N
        zb-h2                     m (F + B) + (N - 1) max(F, F + I - 2 W)   the same, for m >= 2 N - 1
        both, where m < N         and (N - m) W                             for F = I = W
        zb-v                      m (F + B) + (N - 1) F / 2                 a lower bound; see `schedules.zb_v`
        dualpipe-v                m (F + B) + (N - 1) max(F, F + I - W) / 2 for I <= F
        async-1f1b, 2bw, paci     (m + N - 1) (F + B)                       m of the whole segment

    The last rank begins (N - 1) F late and cannot make that up: hence the maxima, which the papers leave out because
    they count from every rank's own beginning. DeepSeek's term for dualpipe-v, (N - 1) (F + 2 B - 3 W) / 2, is larger.

    Raises:
        ScheduleError: no such schedule.
    """
    backward = input_grad + weight_grad
    work, fill = micro * (forward + backward), ranks - 1
    if name in ("gpipe", "1f1b", *_FREE):
        return work + fill * (forward + backward)
    if name == "interleaved":
        return work + fill * (forward + backward) / chunks
    if name in ("zb-h1", "zb-h2"):
        filled = weight_grad if name == "zb-h1" else 2 * weight_grad
        late = max(0, ranks - micro) * weight_grad
        return work + fill * max(forward, forward + input_grad - filled) + late
    if name == "zb-v":
        return work + fill * forward / 2
    if name == "dualpipe-v":
        return work + fill * max(forward, forward + input_grad - weight_grad) / 2
    raise ScheduleError(f"no closed form for a schedule called {name!r}")


def bubble(
    name: str,
    ranks: int,
    micro: int,
    *,
    forward: float = 1.0,
    input_grad: float = 1.0,
    weight_grad: float = 1.0,
    chunks: int = 2,
) -> float:
    """Share of its time that a rank waits: of `makespan`, but 0 of a schedule without a flush, in the long run.

    >>> bubble("1f1b", 4, 8), bubble("paci", 4, 8)
    (0.2727272727272727, 0.0)
    """
    times = {"forward": forward, "input_grad": input_grad, "weight_grad": weight_grad}
    whole = makespan(name, ranks, micro, **times, chunks=chunks)
    return 0.0 if name in _FREE else 1.0 - micro * sum(times.values()) / whole


def expected_gain(ranks: int, micro: int, slowest: float = 1.0) -> float:
    """How many times faster a schedule without a flush is than 1F1B with one, of as many micro-batches an update.

    (N / r + m - 1) / m, where r (`slowest`) is the slowest stage's time over the mean: exactly so if the last stage is
    the slowest, and less if it is another, whose delay the flush hides in part. To be fair, compare with flush at the
    micro-batches that suit it best, and count what staleness costs in loss.

    >>> expected_gain(8, 8), expected_gain(8, 64)
    (1.875, 1.109375)
    """
    return (ranks / slowest + micro - 1) / micro


# ---- versions of the weights ---------------------------------------------------------------------------------------


def in_flight(stage: int, stages: int, ahead: int = 0) -> int:
    """Micro-batches that a stage of `paci` has in flight: N - i + ahead (N - 1 - i) / (N - 1), rounded down.

    Without `ahead` as many as 1F1B. What is ahead tapers off towards the last stage, because as many for all stages
    would gain nothing: every stage would do the same things at the same times, with later micro-batches.
    """
    behind = stages - 1 - stage
    return behind + 1 + ahead * behind // max(1, stages - 1)


def admitted_version(micro_index: int, flight: int, window: int) -> int:
    """Updates that the weights have seen which a stage with `flight` micro-batches in flight uses in a forward.

    floor(max(0, m - flight + 1) / a): the stage has done m - flight + 1 backwards before the forward of micro-batch m.
    """
    return max(0, micro_index - flight + 1) // window


def forward_version(micro_index: int, stage: int, stages: int, window: int, ahead: int = 0) -> int:
    """Updates that the weights have seen which `paci` uses in the forward of a micro-batch.

    floor(max(0, m - (N - 1 - i)) / a), for micro-batch m and stage i of N, with a window of a; later by what is ahead.
    Source: 2606.07881; `ahead` is ours.
    """
    return admitted_version(micro_index, in_flight(stage, stages, ahead), window)


def backward_version(micro_index: int, window: int) -> int:
    """The same of the backward, at every stage: floor(m / a). So update u is made of exactly its own micro-batches."""
    return micro_index // window


def drift_bound(stage: int, stages: int, window: int, ahead: int = 0) -> int:
    """Most updates between forward and backward of a micro-batch at this stage: ceil((in flight - 1) / a)."""
    return -(-(in_flight(stage, stages, ahead) - 1) // window)


def mean_drift(stage: int, stages: int, window: int, ahead: int = 0) -> float:
    """Their mean in the long run, exactly: (in flight - 1) / a."""
    return (in_flight(stage, stages, ahead) - 1) / window


def expected_drift(stages: int, window: int, ahead: int = 0) -> float:
    """The mean of `mean_drift` over the stages; without `ahead` (N - 1) / 2a."""
    return sum(mean_drift(stage, stages, window, ahead) for stage in range(stages)) / stages


def delayed_version(micro_index: int, window: int) -> int:
    """Updates that the weights have seen which `two_bw` uses, forward and backward and at every stage alike.

    max(0, floor(m / a) - 1): one update late, but for the first two windows, which share the weights of the start.
    Source: 2006.09503, section 3.1.
    """
    return max(0, micro_index // window - 1)


__all__ = [
    "admitted_version",
    "backward_version",
    "bubble",
    "delayed_version",
    "drift_bound",
    "expected_drift",
    "expected_gain",
    "forward_version",
    "in_flight",
    "makespan",
    "mean_drift",
]
