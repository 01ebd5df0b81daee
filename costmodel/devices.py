"""Device presets: peak rates, memory, and the two link tiers of a mesh axis (inside a node, between nodes).

Rates are dense (no sparsity), per device, in FLOP/s and bytes/s per direction; memory in bytes. A preset has peaks and
two efficiencies; a Device that `autopar calibrate` measured has curves by size besides, and prices come from those.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch

from autopar.costmodel.curve import Curve
from autopar.errors import MeshError
from autopar.mesh import Mesh


@dataclass(frozen=True)
class Link:
    """What one device can send over an axis: bytes/s, and seconds per message."""

    bandwidth: float
    latency: float


@dataclass(frozen=True)
class Host:
    """The host as one of its devices has it.

    Attributes:
        link: to it, each way and in both at once.
        bandwidth: bytes/s of its memory, read and written together: this device's share, if all are busy.
        memory: bytes of it that may be filled for this device: its share, if all do.
    """

    link: Link
    bandwidth: float
    memory: float = math.inf


@dataclass(frozen=True)
class Crowd:
    """What becomes of one rank's speed when `ranks` of them share this machine: factors on seconds, 1 when alone.

    beside: as `Device.beside`.
    """

    ranks: int
    matmul: float
    memory: float
    launch: float
    update: float = 1.0  # of the optimizer, all of whose memory is cold
    beside: float = 0.0


@dataclass(frozen=True)
class Measured:
    """What `autopar calibrate` measured on one machine, one rank busy and the others idle.

    Attributes:
        matmul: dtype name -> FLOP/s by FLOPs of one matmul; "convolution": of one convolution.
        attention: FLOP/s by FLOPs of one attention; empty: as a matmul.
        memory: class of op (`costmodel.ops.traffic_class`) -> bytes/s by bytes read and written.
        collectives: "KIND/GROUP/WORLD" (ranks of one group, ranks on the machine, all groups busy) -> seconds by bytes
            of the larger side on one rank.
        crowds: factors by number of ranks that share the machine.
        view: seconds of an op that only makes a view.
        linear_from: FLOPs of a float32 product from which oneDNN is quicker than the BLAS; None: at no size.
        weights_from: likewise where both operands lie column by column, as of the gradient of a weight.
    """

    matmul: Mapping[str, Curve] = field(default_factory=dict)
    attention: Curve | None = None
    memory: Mapping[str, Curve] = field(default_factory=dict)
    collectives: Mapping[str, Curve] = field(default_factory=dict)
    crowds: tuple[Crowd, ...] = ()
    view: float = 0.0
    linear_from: float | None = None
    weights_from: float | None = None


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
    slack: float = 0.0  # part of the peak that the allocator loses to rounding and fragments
    gloo: bool = False  # collectives are gloo's: a reduce_scatter receives all that it sums (`passes/exchange.py`)
    measured: Measured | None = None
    inside: Mapping[str, Link] = field(default_factory=dict)  # links of axes, if they are known (`part`)
    beside: float = 0.0  # seconds that computation loses for each in which communication runs beside it
    host: Host | None = None  # None: the device is the host, whose memory and processors it shares

    @property
    def weights_from(self) -> float | None:
        """As of `Measured`; None where nothing was measured."""
        return self.measured.weights_from if self.measured is not None else None

    def rate(self, dtype: torch.dtype, flops: float = math.inf, kind: str = "matmul") -> float:
        """FLOP/s of a kernel of so many FLOPs, by default a large one; kind: "matmul", "convolution", "attention"."""
        name = str(dtype).removeprefix("torch.")
        if self.measured is not None:
            own = self.measured.attention if kind == "attention" else self.measured.matmul.get(kind)
            found = own or self.measured.matmul.get(name)
            if found is not None:
                return found(flops)
        return self.flops.get(name, self.flops["float32"]) * self.matmul_efficiency

    def traffic(self, kind: str = "elementwise", size: float = math.inf) -> float:
        """Bytes/s that a memory-bound kernel reaches: of a class of op, at `size` bytes read and written."""
        curve = self.measured and self.measured.memory.get(kind)
        return curve(size) if curve else self.bandwidth * self.memory_efficiency

    def update_seconds(self, size: float) -> float:
        """Seconds of an optimizer's update of one parameter that reads and writes `size` bytes."""
        return size / self.traffic("update", size)

    def collective(self, kind: str, group: int, world: int, size: float) -> float | None:
        """Measured seconds of a collective of `size` bytes (larger side, one rank); None: not measured."""
        if self.measured is None:
            return None
        curve = self.measured.collectives.get(f"{kind}/{group}/{world}")
        return curve(size) if curve else None

    def shared_by(self, ranks: int) -> Device:
        """This device as one of `ranks` ranks sees it, if they share one measured machine; else itself."""
        crowds = self.measured.crowds if self.measured else ()
        if self.measured is None or not crowds:
            return self
        # Between and beyond what was measured, slowness follows the number of ranks per core.
        near = min(crowds, key=lambda c: abs(math.log(c.ranks / ranks)))
        more = ranks / near.ranks if ranks > near.ranks else 1.0
        matmul, memory, launch, update = (n * more for n in (near.matmul, near.memory, near.launch, near.update))
        own = self.measured
        return replace(
            self,
            flops={k: v / matmul for k, v in self.flops.items()},
            bandwidth=self.bandwidth / memory,
            launch=self.launch * launch,
            beside=near.beside,
            measured=replace(
                own,
                matmul={k: c.scaled(1 / matmul) for k, c in own.matmul.items()},
                attention=own.attention and own.attention.scaled(1 / matmul),
                memory={k: c.scaled(1 / (update if k == "update" else memory)) for k, c in own.memory.items()},
                crowds=(),
                view=own.view * launch,
            ),
        )


#: What collectives and kernels commonly reach of the peaks, where nothing is measured.
#: Links: NCCL's own model takes 80 to 92 % of the wire (nccl/src/graph/tuning.cc, busBw corrections).
#: Latency a message: NCCL's table has 3.4 us a hop and 8.4 us a call for NVLink (ring, Simple), 14 us a hop for the
#: network (nccl/src/include/tuning.h, hwLat and baseLat); ours lie between hop and call.
#: Matmul: 0.65 of the dense peak is what large bf16 GEMMs reach on H100 (Llama 3 report, arXiv 2407.21783, table 4: 38
#: to 43 % of whole steps, GEMMs alone well above). Memory: 0.8 of the peak, as BabelStream's triad at kernel size.
#: Launch: 4 us from the host to a running kernel.
_LINK, _FAST_S, _SLOW_S = 0.8, 5e-6, 12e-6


#: Hosts. Links: what copies of pinned memory reach each way of a PCIe x16 slot (`bandwidthTest` of the CUDA samples and
#: `nvbandwidth` show 24 to 26 GB/s of generation 4's 31.5, and 52 to 57 of generation 5's 63), 10 us a copy. Memory: of
#: all channels of the node's two sockets, an eighth for each GPU, of which a stream reaches 0.8. Likewise an eighth of
#: the bytes, but for a tenth that the system, data loaders and the programs themselves take.
_COPY_S, _STREAM, _FREE = 10e-6, 0.8, 0.9


def _host(link: float, sockets: float, memory: float) -> Host:
    return Host(Link(link, _COPY_S), sockets / 8 * _STREAM, memory / 8 * _FREE)


#: DGX A100 (80 GB): two EPYC 7742, each 8 channels of DDR4-3200 (AMD data sheet: 204.8 GB/s), 2 TB.
_A100 = _host(25e9, 2 * 204.8e9, 2e12)
#: DGX H100 and H200: two Xeon 8480C, each 8 channels of DDR5-4800 (Intel: 307.2 GB/s), 2 TB.
_H100 = _host(55e9, 2 * 307.2e9, 2e12)
#: DGX B200: two Xeon 8570, each 8 channels of DDR5-5600 (Intel: 358.4 GB/s), 2 TB unless extended.
_B200 = _host(55e9, 2 * 358.4e9, 2e12)
#: AMD's nodes for MI300X: two EPYC 9004, each 12 channels of DDR5-4800 (AMD data sheet: 460.8 GB/s) of 96 GB.
_MI300X = _host(55e9, 2 * 460.8e9, 24 * 96e9)


def _gpu(
    name: str,
    half: float,
    single: float,
    double: float,
    bandwidth: float,
    gb: float,
    fast: float,
    slow: float,
    host: Host,
    node: int = 8,
) -> Device:
    flops = {"bfloat16": half, "float16": half, "float32": single, "float64": double}
    links = Link(fast * _LINK, _FAST_S), Link(slow * _LINK, _SLOW_S)
    # PyTorch's caching allocator rounds to 512 bytes, and to 2 MiB blocks: a few percent of a training step.
    return Device(name, flops, bandwidth, gb * 1e9, *links, node, slack=0.02, host=host)


#: PCI Express 4.0 x16: 16 GT/s, 16 lanes, 128b/130b coding (PCI-SIG base specification 4.0): 31.5 GB/s each way.
_PCIE4 = 31.5e9

#: float32 is the plain (not TF32) rate: torch's default. Links are one way: half of what data sheets add up.
DEVICES: dict[str, Device] = {
    d.name: d
    for d in (
        # NVIDIA A100 80GB SXM data sheet (2021): 312 TFLOPS bf16, 19.5 fp32 and fp64 tensor, 2039 GB/s, NVLink 600 GB/s
        # both ways; DGX A100 guide: one 200 Gb/s HDR port per GPU.
        _gpu("a100", 312e12, 19.5e12, 19.5e12, 2.039e12, 80, 300e9, 25e9, _A100),
        # NVIDIA H100 SXM data sheet (2023): 989 bf16, 67 fp32 and fp64 tensor, 3.35 TB/s, NVLink 900 GB/s; DGX H100
        # guide: one 400 Gb/s NDR port per GPU.
        _gpu("h100", 989e12, 67e12, 67e12, 3.35e12, 80, 450e9, 50e9, _H100),
        # NVIDIA H200 data sheet (2024): H100's rates, 141 GB at 4.8 TB/s.
        _gpu("h200", 989e12, 67e12, 67e12, 4.8e12, 141, 450e9, 50e9, _H100),
        # NVIDIA H800 SXM: the H100 with NVLink cut to 400 GB/s and fp64 to 1 TFLOPS; one 400 Gb/s port per GPU
        # (DeepSeek-AI, "Insights into DeepSeek-V3", arXiv 2505.09343, section 2: "reduced FP64 computational
        # performance and NVLink bandwidth", 900 to 400 GB/s, eight 400G CX7 per node).
        _gpu("h800", 989e12, 67e12, 1e12, 3.35e12, 80, 200e9, 50e9, _H100),
        # NVIDIA HGX B200 data sheet (2024), an eighth of the board: 2.25 PFLOPS bf16 dense, 75 fp32, 37 fp64; DGX B200
        # data sheet: 180 GB at 8 TB/s, NVLink 1.8 TB/s, 400 Gb/s per GPU.
        _gpu("b200", 2250e12, 75e12, 37e12, 8.0e12, 180, 900e9, 50e9, _B200),
        # AMD Instinct MI300X data sheet (2023): 1307 bf16, 163.4 fp32 and fp64 matrix, 192 GB at 5.3 TB/s, Infinity
        # Fabric 896 GB/s both ways over seven links; AMD's eight-GPU reference nodes: 400 Gb/s per GPU.
        _gpu("mi300x", 1307e12, 163.4e12, 163.4e12, 5.3e12, 192, 448e9, 50e9, _MI300X),
        # NVIDIA Ada architecture whitepaper (2022): 165 bf16 with fp32 accumulation, 82.6 fp32, 1.3 fp64, 1008 GB/s;
        # PCIe 4.0 x16, no NVLink; 100 Gb/s Ethernet assumed between nodes.
        _gpu("rtx4090", 165e12, 82.6e12, 1.3e12, 1.008e12, 24, _PCIE4, 12.5e9, _A100),
        # NVIDIA L4 data sheet (2023): 121 bf16 dense, 30.3 fp32, 300 GB/s; fp64 a 64th of fp32 (Ada whitepaper);
        # PCIe 4.0 x16; 100 Gb/s Ethernet assumed between nodes.
        _gpu("l4", 121e12, 30.3e12, 0.47e12, 0.3e12, 24, _PCIE4, 12.5e9, _A100),
        # One process of a small machine over gloo: assumed orders of magnitude, there is no data sheet for "a CPU";
        # `autopar calibrate` measures this machine.
        Device(
            "cpu",
            {"float32": 40e9, "float64": 20e9, "bfloat16": 20e9, "float16": 10e9},
            8e9,
            None,
            Link(1e9, 150e-6),
            Link(1e9, 150e-6),
            launch=8e-6,
            gloo=True,
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

    A measured device is slowed down by the ranks of the mesh that share it. links: axis name -> Link, overriding the
    choice (and what was measured of collectives).

    Raises:
        MeshError: the device has no preset, or `links` names an axis that the mesh does not have.
    """
    if isinstance(device, str):
        if device not in DEVICES:
            raise MeshError(f"no device preset {device!r}; presets are {', '.join(DEVICES)}")
        device = DEVICES[device]
    for name in links or {}:
        mesh.axis(name)
    device = device.shared_by(mesh.num_devices)
    if links and device.measured is not None:
        device = replace(device, measured=replace(device.measured, collectives={}))
    chosen = []
    for axis, (name, size) in enumerate(zip(mesh.names, mesh.sizes)):
        reach = size * math.prod(mesh.sizes[axis + 1 :])
        near = device.fast if reach <= device.node else device.slow
        chosen.append((links or {}).get(name) or device.inside.get(name) or near)
    return Machine(device, mesh, tuple(chosen))


def part(device: str | Device, whole: Mesh, inner: Mesh) -> Device:
    """The device as the ranks of `inner` see it, which is some axes of `whole`: the others share machine and links.

    Raises:
        MeshError: as `machine`.
    """
    where = machine(device, whole)
    found, outer = where.device, dict(zip(whole.names, where.links))
    if found.measured is None:
        return replace(found, inside={name: outer[name] for name in inner.names if name in outer})
    # Collectives of groups were measured while all ranks of so many worked.
    ours = {}
    for key, curve in found.measured.collectives.items():
        kind, group, world = key.split("/")
        if int(world) == whole.num_devices:
            ours[f"{kind}/{group}/{inner.num_devices}"] = curve
    return replace(found, measured=replace(found.measured, collectives=ours))
