"""Device presets: peak rates, memory, and the two link tiers of a mesh axis (inside a node, between nodes).

Rates are dense (no sparsity), per device, in FLOP/s and bytes/s per direction; memory in bytes. Efficiencies are what
large kernels commonly reach, not peaks; `autopar.costmodel` predicts with them and nothing is calibrated yet.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from autopar.errors import MeshError
from autopar.mesh import Mesh


@dataclass(frozen=True)
class Link:
    """What one device can send over an axis: bytes/s, and seconds per message."""

    bandwidth: float
    latency: float


@dataclass(frozen=True)
class Device:
    """One device of a mesh. `flops` by dtype name; a dtype that is not listed runs at the rate of float32."""

    name: str
    flops: Mapping[str, float]
    bandwidth: float
    memory: float | None  # None: not limited by the planner
    fast: Link
    slow: Link
    node: int = 8  # devices joined by the fast link
    launch: float = 4e-6
    matmul_efficiency: float = 0.65
    memory_efficiency: float = 0.8

    def rate(self, dtype: torch.dtype) -> float:
        """FLOP/s of large matmuls."""
        return self.flops.get(str(dtype).removeprefix("torch."), self.flops["float32"]) * self.matmul_efficiency

    def traffic(self) -> float:
        """Bytes/s that a memory-bound kernel reaches."""
        return self.bandwidth * self.memory_efficiency


def _gpu(
    name: str,
    half: float,
    single: float,
    double: float,
    bandwidth: float,
    gb: float,
    fast: float,
    slow: float,
    node: int = 8,
) -> Device:
    flops = {"bfloat16": half, "float16": half, "float32": single, "float64": double}
    return Device(name, flops, bandwidth, gb * 1e9, Link(fast * 0.8, 5e-6), Link(slow * 0.8, 12e-6), node)


#: float32 is the plain (not TF32) rate: torch's default.
DEVICES: dict[str, Device] = {
    d.name: d
    for d in (
        # NVIDIA A100 80GB SXM data sheet (2021): 312 TFLOPS bf16, 19.5 fp32 and fp64 tensor, 2039 GB/s, NVLink 600 GB/s
        # both ways; DGX A100 guide: one 200 Gb/s HDR port per GPU.
        _gpu("a100", 312e12, 19.5e12, 19.5e12, 2.039e12, 80, 300e9, 25e9),
        # NVIDIA H100 SXM data sheet (2023): 989 bf16, 67 fp32 and fp64 tensor, 3.35 TB/s, NVLink 900 GB/s; DGX H100
        # guide: one 400 Gb/s NDR port per GPU.
        _gpu("h100", 989e12, 67e12, 67e12, 3.35e12, 80, 450e9, 50e9),
        # NVIDIA H200 data sheet (2024): H100's rates, 141 GB at 4.8 TB/s.
        _gpu("h200", 989e12, 67e12, 67e12, 4.8e12, 141, 450e9, 50e9),
        # NVIDIA DGX B200 data sheet (2024), per GPU: 2.25 PFLOPS bf16 dense, 75 fp32, 37 fp64, 180 GB at 8 TB/s,
        # NVLink 1.8 TB/s, 400 Gb/s per GPU.
        _gpu("b200", 2250e12, 75e12, 37e12, 8.0e12, 180, 900e9, 50e9),
        # AMD Instinct MI300X data sheet (2023): 1307 bf16, 163.4 fp32 and fp64 matrix, 192 GB at 5.3 TB/s, Infinity
        # Fabric 896 GB/s both ways over seven links.
        _gpu("mi300x", 1307e12, 163.4e12, 163.4e12, 5.3e12, 192, 448e9, 50e9),
        # NVIDIA Ada architecture whitepaper (2022): 165 bf16 with fp32 accumulation, 82.6 fp32, 1.3 fp64, 1008 GB/s;
        # PCIe 4.0 x16, no NVLink; 100 Gb/s Ethernet assumed between nodes.
        _gpu("rtx4090", 165e12, 82.6e12, 1.3e12, 1.008e12, 24, 25e9, 12.5e9),
        # NVIDIA L4 data sheet (2023): 121 bf16 dense, 30.3 fp32, 0.47 fp64, 300 GB/s; PCIe 4.0 x16.
        _gpu("l4", 121e12, 30.3e12, 0.47e12, 0.3e12, 24, 25e9, 12.5e9),
        # One process of a small machine over gloo: assumed orders of magnitude; the demo measures its own machine.
        Device(
            "cpu",
            {"float32": 40e9, "float64": 20e9, "bfloat16": 20e9, "float16": 10e9},
            8e9,
            None,
            Link(1e9, 150e-6),
            Link(1e9, 150e-6),
            launch=8e-6,
        ),
    )
}


@dataclass(frozen=True)
class Machine:
    """A device kind and the link of every mesh axis."""

    device: Device
    mesh: Mesh
    links: tuple[Link, ...] = field(default=())


def machine(device: str | Device, mesh: Mesh, links: Mapping[str, Link] | None = None) -> Machine:
    """Choose the link of every axis: fast if the axis stays inside a node (ranks are row-major), else slow.

    links: axis name -> Link, overriding the choice.

    Raises:
        MeshError: the device has no preset, or `links` names an axis that the mesh does not have.
    """
    if isinstance(device, str):
        if device not in DEVICES:
            raise MeshError(f"no device preset {device!r}; presets are {', '.join(DEVICES)}")
        device = DEVICES[device]
    for name in links or {}:
        mesh.axis(name)
    chosen = []
    for axis, (name, size) in enumerate(zip(mesh.names, mesh.sizes)):
        reach = size * math.prod(mesh.sizes[axis + 1 :])
        chosen.append((links or {}).get(name) or (device.fast if reach <= device.node else device.slow))
    return Machine(device, mesh, tuple(chosen))
