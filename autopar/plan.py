"""A Plan: plain data that says where everything lies. JSON, small, editable, round-trips; no torch object inside.

The file is folded: a decision shared by all repeated layers is written once, with `*` for the layer number
("fwd:model.layers.*.mlp.down_proj/mm#0"); an entry with the exact address wins over a starred one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from autopar.compression import Compression
from autopar.errors import AutoparError, PlanError
from autopar.graph import pattern
from autopar.mesh import Mesh
from autopar.offload import COPIES
from autopar.precision import Precision
from autopar.recompute import SAVED, original
from autopar.rule import Choice
from autopar.spec import Placement, R, S, Spec, format_spec, parse_spec

SCHEMA = 1

#: How a stored parameter is used. "once": gathered (if its users need more than is stored) in the forward and kept for
#: the backward (ZeRO-1/2); "twice": gathered again for the backward (ZeRO-3).
GATHER = ("once", "twice")
#: How its gradient is brought to the stored placement. "reduce_scatter", or "all_reduce" then slice (ZeRO-1).
REDUCE = ("reduce_scatter", "all_reduce")
#: Where its gradient and its optimizer state lie. HOST: in the host's memory, with a copy of the parameter that the
#: optimizer steps there (Ren et al., ZeRO-Offload, 2021).
DEVICE, HOST = "device", "host"
STATE = (DEVICE, HOST)


#: Predicted figures that are numbers by kind; the others are single numbers.
_TABLES = ("memory", "collectives", "host")


@dataclass(frozen=True)
class Storage:
    """Where a parameter, its gradient and its optimizer state lie, and how it travels."""

    spec: Spec
    gather: str = "once"
    reduce: str = "reduce_scatter"
    state: str = DEVICE


@dataclass(frozen=True)
class Pipeline:
    """How a program is run in stages along one mesh axis, on which nothing is split.

    Attributes:
        axis: the mesh axis along which the stages stand.
        starts: addresses of the ops with which stages 1, 2, ... begin.
        micro: number of micro-batches of a batch.
        schedule: name of the schedule (`autopar.pipeline.schedules.SCHEDULES`), or "table".
        table: the user's own schedule as CSV text; empty for a named one.
    """

    axis: str
    starts: tuple[str, ...]
    micro: int
    schedule: str
    table: str = ""


@dataclass(frozen=True)
class Plan:
    """Everything that passes and runtime need to know, for one program on one mesh.

    Attributes:
        mesh: the device mesh.
        fingerprint: of the program it was made for.
        choices: op address (exact or starred) -> one Choice per mesh axis. An op without entry is whole on every axis.
        storage: parameter or buffer name -> Storage (buffers: replicated unless said).
        inputs: input name -> Spec in which the runtime hands it to the graph.
        outputs: output name -> Spec in which the graph hands it back.
        predicted: seconds and bytes by kind, for the report (`step_s`, `compute_s`, `comm_s`, `memory` by kind ...).
        solver: status, gap, seconds by phase.
        target: how the CLI rebuilds the model (`autopar verify`), free-form; empty for plans made in Python.
        notes: what the user should know (replicated ops, ignored settings).
        pipeline: stages and schedule, if it has any. The program is then that of one micro-batch.
        optimizer: the class of optimizer it was priced for (`autopar.costmodel.optimizers`: a name, or a law as text).
        compression: how gradients travel when they are reduced (`autopar.compression`); None: as they are.
        saved: op address of the forward (exact or starred) -> what becomes of its result where the backward reads it:
            "recompute" or "offload" (`autopar.recompute`). What is not named is kept.
        copies: how many tensors may be on their way to the host at once, and how many from there.
        precision: what the program computes in (`autopar.precision.Precision.record`); empty: as the model is.
    """

    mesh: Mesh
    fingerprint: str
    choices: Mapping[str, tuple[Choice, ...]]
    storage: Mapping[str, Storage]
    inputs: Mapping[str, Spec] = field(default_factory=dict)
    outputs: Mapping[str, Spec] = field(default_factory=dict)
    predicted: Mapping[str, Any] = field(default_factory=dict)
    solver: Mapping[str, Any] = field(default_factory=dict)
    target: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    pipeline: Pipeline | None = None
    optimizer: str = "adamw"
    saved: Mapping[str, str] = field(default_factory=dict)
    copies: int = COPIES
    compression: str | None = None
    precision: Mapping[str, str] = field(default_factory=dict)

    @property
    def computes(self) -> Precision:
        """`precision`, as an object."""
        return Precision.of(self.precision)

    def choice(self, address: str) -> tuple[Choice, ...]:
        """The choices of one op, by exact address, else by its starred pattern, else whole everywhere.

        What the backward computes again, and the plan does not name, is done as in the forward.
        """
        found = self.named(address)
        if found is None and (first := original(address)) is not None:
            return self.choice(first)
        return found if found is not None else (Choice(),) * len(self.mesh.sizes)

    def named(self, address: str) -> tuple[Choice, ...] | None:
        """The choices that the plan itself names for an op, by exact address, else by its starred pattern."""
        return self.choices.get(address, self.choices.get(pattern(address)))

    def how_saved(self, address: str) -> str | None:
        """What `saved` says of an op, by exact address, else by its starred pattern."""
        return self.saved.get(address, self.saved.get(pattern(address)))

    def stored(self, name: str) -> Storage:
        """Storage of a parameter or buffer; replicated if the plan does not say."""
        return self.storage.get(name) or Storage((R,) * len(self.mesh.sizes))

    @property
    def on_host(self) -> tuple[str, ...]:
        """Names of the parameters whose gradients and optimizer state lie on the host."""
        return tuple(name for name, storage in self.storage.items() if storage.state == HOST)

    # ---- JSON ------------------------------------------------------------------------------------------------

    def to_json(self) -> str:
        """The editable text form."""
        names = self.mesh.names

        def spec(s: Spec) -> str:
            ndim = 1 + max((p.dim for p in s if p.kind == "S"), default=-1)
            return format_spec(s, ndim, names)

        data = {
            "autopar_plan": SCHEMA,
            "mesh": str(self.mesh),
            "fingerprint": self.fingerprint,
            **({"pipeline": asdict(self.pipeline)} if self.pipeline is not None else {}),
            "storage": {
                k: [spec(v.spec), v.gather, v.reduce, *([v.state] if v.state != DEVICE else [])]
                for k, v in self.storage.items()
            },
            "inputs": {k: spec(v) for k, v in self.inputs.items()},
            "outputs": {k: spec(v) for k, v in self.outputs.items()},
            "choices": {k: " ".join(str(c) for c in v) for k, v in self.choices.items()},
            **({"saved": dict(self.saved)} if self.saved else {}),
            **({"copies": self.copies} if self.copies != COPIES else {}),
            **({"precision": dict(self.precision)} if self.precision else {}),
            "optimizer": self.optimizer,
            **({"compression": self.compression} if self.compression is not None else {}),
            "predicted": dict(self.predicted),
            "solver": dict(self.solver),
            "target": dict(self.target),
            "notes": list(self.notes),
        }
        lines = [f"  {json.dumps(k)}: {_block(v)}" for k, v in data.items()]
        return "{\n" + ",\n".join(lines) + "\n}\n"

    @classmethod
    def from_json(cls, text: str, where: str = "plan") -> Plan:
        """Inverse of `to_json`.

        Raises:
            PlanError: the text is not a plan, of another schema, or has an entry that cannot be read; says which.
        """
        try:
            data = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            raise PlanError(f"{where} is not JSON: {error}; write it again with `autopar plan ... -o`") from None
        if not isinstance(data, dict) or "autopar_plan" not in data:
            raise PlanError(f"{where} is not an autopar plan (no 'autopar_plan' key)")
        if data["autopar_plan"] != SCHEMA or isinstance(data["autopar_plan"], bool):
            raise PlanError(
                f"{where} has plan schema {data['autopar_plan']}, this autopar reads {SCHEMA}; make the plan again"
            )
        key = "mesh"
        try:
            mesh = Mesh.parse(data["mesh"])

            along: int | None = None

            def spec(s: str) -> Spec:
                found = parse_spec(s, mesh.names)[0]
                if along is not None and found[along] != R:
                    raise PlanError(f"{s!r} splits along {mesh.names[along]}, the axis of the pipeline's stages")
                return found

            def section(name: str) -> dict[str, Any]:
                nonlocal key
                key = name
                if not isinstance(data[name], dict):
                    raise PlanError("it must be an object")
                return data[name]

            pipeline = None
            if "pipeline" in data:
                pipeline = _pipeline(section("pipeline"), mesh)
                along = mesh.axis(pipeline.axis)
            storage = {}
            for k, (s, gather, reduce, *rest) in section("storage").items():
                key = f"storage of {k}"
                (state,) = rest or (DEVICE,)
                if state not in STATE:
                    raise PlanError(f"{state!r} is not one of {STATE}")
                if gather not in GATHER or reduce not in REDUCE:
                    raise PlanError(f"{gather!r}, {reduce!r} are not one of {GATHER} and {REDUCE}")
                storage[k] = Storage(spec(s), gather, reduce, state)
            choices = {}
            for k, v in section("choices").items():
                key = f"choice of {k}"
                row = tuple(Choice.parse(c) for c in v.split())
                if len(row) != len(mesh.sizes):
                    raise PlanError(f"{len(row)} choices for {len(mesh.sizes)} mesh axes")
                if along is not None and row[along] != Choice():
                    raise PlanError(f"{v!r} splits along {mesh.names[along]}, the axis of the pipeline's stages")
                choices[k] = row
            predicted = section("predicted")
            for k, v in predicted.items():
                key = f"predicted {k}"
                numbers = list(v.values()) if isinstance(v, dict) else [] if k == "device" else [v]
                if not all(type(n) in (int, float) for n in numbers) or (k in _TABLES) != isinstance(v, dict):
                    raise PlanError(f"cannot read {v!r}")
            saved = section("saved") if "saved" in data else {}
            for k, v in saved.items():
                key = f"saved of {k}"
                if v not in SAVED:
                    raise PlanError(f"{v!r} is not one of {', '.join(SAVED)}")
            key, copies = "copies", data.get("copies", COPIES)
            if type(copies) is not int or copies < 1:
                raise PlanError(f"it is {copies!r}; it must be a number of tensors, at least 1")
            precision = Precision.of(section("precision")).record() if "precision" in data else {}
            key, optimizer = "optimizer", data.get("optimizer", "adamw")
            if not isinstance(optimizer, str):
                raise PlanError(f"cannot read {optimizer!r}; it is the name of a class")
            key = "compression"
            Compression.parse(data.get("compression"))
            return cls(
                mesh=mesh,
                fingerprint=str(data["fingerprint"]),
                choices=choices,
                storage=storage,
                inputs={k: spec(v) for k, v in section("inputs").items()},
                outputs={k: spec(v) for k, v in section("outputs").items()},
                predicted=predicted,
                solver=section("solver"),
                target=section("target"),
                notes=tuple(data["notes"]),
                pipeline=pipeline,
                optimizer=optimizer,
                saved=saved,
                copies=copies,
                compression=data.get("compression"),
                precision=precision,
            )
        except KeyError as error:
            raise PlanError(f"{where} is damaged: it has no {error.args[0]!r}") from None
        except (AutoparError, ValueError, TypeError, AttributeError) as error:
            raise PlanError(f"{where} is damaged at {key}: {error}") from None

    def save(self, path: str | Path) -> None:
        """Write the JSON file.

        Raises:
            PlanError: it cannot be written.
        """
        try:
            Path(path).write_text(self.to_json(), encoding="utf-8")
        except OSError as error:
            raise PlanError(f"cannot write plan {path}: {error}") from None

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read the JSON file.

        Raises:
            PlanError: as `from_json`, or the file cannot be read.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise PlanError(f"cannot read plan {path}: {error}") from None
        return cls.from_json(text, str(path))


def fold(choices: Mapping[str, tuple[Choice, ...]]) -> dict[str, tuple[Choice, ...]]:
    """Write shared decisions once: starred where most layers agree, exact entries for those that differ."""
    groups: dict[str, list[str]] = {}
    for address in choices:
        groups.setdefault(pattern(address), []).append(address)
    out: dict[str, tuple[Choice, ...]] = {}
    for star, members in groups.items():
        counts: dict[tuple[Choice, ...], int] = {}
        for m in members:
            counts[choices[m]] = counts.get(choices[m], 0) + 1
        common = max(counts, key=lambda c: counts[c])
        out[star] = common
        out.update({m: choices[m] for m in members if choices[m] != common})
    return out


def storage_shards(spec: Spec) -> bool:
    """Whether a storage spec is one that a DTensor can say: replicated, or plain contiguous shards."""
    return all(p.kind == "R" or (p.kind == "S" and p.outer == 1) for p in spec)


def _pipeline(data: Mapping[str, Any], mesh: Mesh) -> Pipeline:
    starts, micro = data["starts"], data["micro"]
    if not isinstance(starts, list) or not all(isinstance(s, str) for s in starts):
        raise PlanError(f"starts is {starts!r}; it must be a list of addresses of ops")
    if type(micro) is not int or micro < 1:
        raise PlanError(f"micro is {micro!r}; it must be a number of micro-batches, at least 1")
    mesh.axis(data["axis"])
    return Pipeline(data["axis"], tuple(starts), micro, str(data["schedule"]), str(data.get("table", "")))


def _block(value: Any) -> str:
    if isinstance(value, dict) and value:
        return "{\n" + ",\n".join(f"    {json.dumps(k)}: {json.dumps(v)}" for k, v in value.items()) + "\n  }"
    return json.dumps(value)


__all__: Sequence[str] = [
    "DEVICE", "GATHER", "HOST", "REDUCE", "SCHEMA", "STATE", "Pipeline", "Placement", "Plan", "S", "Storage", "fold",
    "storage_shards",
]  # fmt: skip
