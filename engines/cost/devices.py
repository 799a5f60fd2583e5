"""NVIDIA GPUs by name: what they can compute at most, how fast their memory is, how much fits.

Rates are dense (without structured sparsity) matrix products with float32 accumulation, which is
what the engines use. A figure that no public document was found for is none: not established.
`docs/guide/profile-latency.md` shows the table; a test holds the two together.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass

from ditrim.plugins.errors import UsageError

_GIB = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """A GPU.

    Attributes:
        name: what `--device` takes.
        title: in full.
        compute_capability: (major, minor).
        memory_bytes: what CUDA reports as the device's whole memory, less than what is printed on
            the box; the smallest that was seen.
        bandwidth_gb_s: peak of the device's memory, in 10^9 bytes a second; none where not
            established, as the three rates below.
        bf16_tflops, fp16_tflops, fp8_tflops: peak dense 10^12 operations a second with float32
            accumulation. FP8 is 0 where the device has no such units.
        sources: where each figure is from, by field.
    """

    name: str
    title: str
    compute_capability: tuple[int, int]
    memory_bytes: int
    bandwidth_gb_s: float | None
    bf16_tflops: float | None
    fp16_tflops: float | None
    fp8_tflops: float | None
    sources: Mapping[str, str]

    def peak_tflops(self, precision: str) -> float | None:
        """Peak dense rate in "bf16", "fp16" or "fp8"; none where not established, or 0 if absent.

        Raises:
            UsageError: of another precision there is no figure.
        """
        rates = {"bf16": self.bf16_tflops, "fp16": self.fp16_tflops, "fp8": self.fp8_tflops}
        if precision not in rates:
            raise UsageError(
                f"there is no peak rate for precision {precision!r}; known: {', '.join(rates)}"
            )
        return rates[precision]

    def peak_source(self, precision: str) -> str:
        """Sources of the bandwidth and of the rate in a precision."""
        rate, bandwidth = self.sources[f"{precision}_tflops"], self.sources["bandwidth_gb_s"]
        return f"{self.title}: {rate}" + ("" if rate == bandwidth else f"; bandwidth: {bandwidth}")


_HOPPER = "NVIDIA H100 Tensor Core GPU Architecture whitepaper, table of H100 SXM5"
_HOPPER_CHECK = "132 SMs x 4096 operations a clock x 1.83 GHz"
_AMPERE = "NVIDIA A100 Tensor Core GPU data sheet; 108 SMs x 2048 operations a clock x 1.41 GHz"
_ADA = "NVIDIA Ada GPU Architecture whitepaper (v2.02), appendix A, RTX 4090"
_BLACKWELL = "NVIDIA RTX Blackwell GPU Architecture whitepaper, appendix, RTX 5090"
_CAPABILITY = "developer.nvidia.com/cuda-gpus"
# The products for China have no public data sheet. This table of theirs is the press's.
_PRESS = "no public data sheet; Tom's Hardware's table of H20, L20 and L2"
_H20_CHECK = "142 measured in bf16 (zzc0721/torch-performance-test-data#77)"
_H20_3E = "no public data sheet; tile-ai/TileOPs#1658"


def _reported(gib: str, board: str) -> str:
    return (
        f"{gib} GiB is the smallest seen in CUDA's out-of-memory messages; "
        f"nvidia-smi shows {board} MiB"
    )


def _sources(rates: str, fp8: str, bandwidth: str, memory: str) -> dict[str, str]:
    return {
        "compute_capability": _CAPABILITY,
        "memory_bytes": memory,
        "bandwidth_gb_s": bandwidth,
        "bf16_tflops": rates,
        "fp16_tflops": rates,
        "fp8_tflops": fp8,
    }


_NO_FP8 = "Ampere's tensor cores have no FP8"

DEVICES: dict[str, Device] = {
    device.name: device
    for device in (
        Device(
            name="h20",
            title="NVIDIA H20 96 GB",
            compute_capability=(9, 0),
            memory_bytes=int(95.00 * _GIB),
            bandwidth_gb_s=4000.0,
            bf16_tflops=148.0,
            fp16_tflops=148.0,
            fp8_tflops=296.0,
            sources=_sources(
                f"{_PRESS}; {_H20_CHECK}",
                _PRESS,
                f"{_PRESS}; 6144 bit of HBM3 at 5.2 Gb/s",
                _reported("95.00", "97871"),
            ),
        ),
        Device(
            name="h20-141",
            title="NVIDIA H20-3e 141 GB",
            compute_capability=(9, 0),
            memory_bytes=int(139.72 * _GIB),
            bandwidth_gb_s=4800.0,
            bf16_tflops=148.0,
            fp16_tflops=148.0,
            fp8_tflops=296.0,
            sources=_sources(
                f"{_H20_3E}; the rate of the H20 96 GB, whose chip it has",
                f"{_H20_3E}; the rate of the H20 96 GB, whose chip it has",
                f"{_H20_3E} and NVIDIA/nvbandwidth#48 (4.8 TB/s, as the H200)",
                "nvidia-smi shows 143771 MiB, as for the H200, whose figure this is",
            ),
        ),
        Device(
            name="h100",
            title="NVIDIA H100 SXM5 80 GB",
            compute_capability=(9, 0),
            memory_bytes=int(79.14 * _GIB),
            bandwidth_gb_s=3350.0,
            bf16_tflops=989.4,
            fp16_tflops=989.4,
            fp8_tflops=1978.9,
            sources=_sources(
                f"{_HOPPER}; {_HOPPER_CHECK}",
                f"{_HOPPER}; twice the BF16 rate",
                "NVIDIA H100 data sheet (H100 SXM, 3.35 TB/s); 5120 bit of HBM3 at 5.2 Gb/s",
                _reported("79.14", "81559"),
            ),
        ),
        Device(
            name="h200",
            title="NVIDIA H200 SXM 141 GB",
            compute_capability=(9, 0),
            memory_bytes=int(139.72 * _GIB),
            bandwidth_gb_s=4800.0,
            bf16_tflops=989.4,
            fp16_tflops=989.4,
            fp8_tflops=1978.9,
            sources=_sources(
                f"NVIDIA H200 data sheet (1,979 with sparsity); {_HOPPER_CHECK}",
                "NVIDIA H200 data sheet (3,958 with sparsity)",
                "NVIDIA H200 data sheet (4.8 TB/s); 6144 bit of HBM3e",
                _reported("139.72", "143771"),
            ),
        ),
        Device(
            name="a100-40",
            title="NVIDIA A100 SXM4 40 GB",
            compute_capability=(8, 0),
            memory_bytes=int(39.38 * _GIB),
            bandwidth_gb_s=1555.0,
            bf16_tflops=312.0,
            fp16_tflops=312.0,
            fp8_tflops=0.0,
            sources=_sources(
                _AMPERE,
                _NO_FP8,
                "NVIDIA A100 data sheet (40 GB); 5120 bit of HBM2 at 2.43 Gb/s",
                _reported("39.38", "40960"),
            ),
        ),
        Device(
            name="a100-80",
            title="NVIDIA A100 SXM4 80 GB",
            compute_capability=(8, 0),
            memory_bytes=int(79.14 * _GIB),
            bandwidth_gb_s=2039.0,
            bf16_tflops=312.0,
            fp16_tflops=312.0,
            fp8_tflops=0.0,
            sources=_sources(
                _AMPERE,
                _NO_FP8,
                "NVIDIA A100 data sheet (80 GB SXM); 5120 bit of HBM2e at 3.186 Gb/s",
                _reported("79.14", "81920"),
            ),
        ),
        Device(
            name="l20",
            title="NVIDIA L20 48 GB",
            compute_capability=(8, 9),
            memory_bytes=int(44.34 * _GIB),
            bandwidth_gb_s=864.0,
            bf16_tflops=119.5,
            fp16_tflops=119.5,
            fp8_tflops=239.0,
            sources=_sources(
                f"{_PRESS}; 92 SMs x 512 operations a clock x 2.52 GHz is 118.7",
                _PRESS,
                f"{_PRESS}; 384 bit of GDDR6 at 18 Gb/s",
                _reported("44.34", "46068"),
            ),
        ),
        Device(
            name="rtx4090",
            title="NVIDIA GeForce RTX 4090 24 GB",
            compute_capability=(8, 9),
            memory_bytes=int(23.52 * _GIB),
            bandwidth_gb_s=1008.0,
            bf16_tflops=165.2,
            fp16_tflops=165.2,
            fp8_tflops=330.3,
            sources=_sources(
                f"{_ADA}; 128 SMs x 512 operations a clock x 2.52 GHz; 330.3 for FP16 with FP16 "
                "accumulation",
                f"{_ADA}; 660.6 with FP16 accumulation",
                f"{_ADA}; 384 bit of GDDR6X at 21 Gb/s",
                _reported("23.52", "24564"),
            ),
        ),
        Device(
            name="rtx5090",
            title="NVIDIA GeForce RTX 5090 32 GB",
            compute_capability=(12, 0),
            memory_bytes=int(31.36 * _GIB),
            bandwidth_gb_s=1792.0,
            bf16_tflops=209.5,
            fp16_tflops=209.5,
            fp8_tflops=419.0,
            sources=_sources(
                f"{_BLACKWELL}; 170 SMs x 512 operations a clock x 2.407 GHz, above which cards "
                "boost; 419 for FP16 with FP16 accumulation",
                f"{_BLACKWELL}; 838 with FP16 accumulation",
                f"{_BLACKWELL}; 512 bit of GDDR7 at 28 Gb/s",
                _reported("31.36", "32607"),
            ),
        ),
    )
}
# What people also call them.
_ALIASES = {"h20-96": "h20", "h20-3e": "h20-141"}
# CUDA's names of the devices above; a longer name is another product
# ("RTX 4090 D", "RTX 4090 Laptop GPU", "H200 NVL", "H100 PCIe", "L20X", "GH200 480GB").
_CUDA_NAMES = {
    "H20-3e": "h20-141",
    "H20": "h20",
    "H100 80GB HBM3": "h100",
    "H200": "h200",
    "A100-SXM4-40GB": "a100-40",
    "A100-SXM4-80GB": "a100-80",
    "L20": "l20",
    "GeForce RTX 4090": "rtx4090",
    "GeForce RTX 5090": "rtx5090",
}


def device_named(name: str) -> Device:
    """The device that `--device` names.

    Raises:
        UsageError: there is none; names the nearest one and all that exist.
    """
    key = name.strip().lower().replace(" ", "").replace("_", "-").removesuffix("gb")
    key = _ALIASES.get(key, key)
    if key in DEVICES:
        return DEVICES[key]
    near = difflib.get_close_matches(key, DEVICES, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise UsageError(f"--device: unknown device {name!r}.{hint} Known: {', '.join(DEVICES)}.")


def known_device(cuda_name: str) -> Device | None:
    """The device of the table that CUDA calls by this name; none where it is another product."""
    name = _CUDA_NAMES.get(cuda_name.removeprefix("NVIDIA ").strip())
    return None if name is None else DEVICES[name]


def device_from_cuda(
    cuda_name: str, compute_capability: tuple[int, int], memory_bytes: int
) -> Device:
    """A device that is present: memory as CUDA reports it, rates from the table if it has them."""
    known = known_device(cuda_name)
    rate = known if known is not None and known.compute_capability == compute_capability else None
    sources = dict(rate.sources) if rate else {}
    sources |= dict.fromkeys(("compute_capability", "memory_bytes"), "CUDA, of this device")
    for key in ("bandwidth_gb_s", "bf16_tflops", "fp16_tflops", "fp8_tflops"):
        sources.setdefault(key, "not established")
    return Device(
        name=rate.name if rate else cuda_name,
        title=cuda_name,
        compute_capability=compute_capability,
        memory_bytes=memory_bytes,
        bandwidth_gb_s=rate.bandwidth_gb_s if rate else None,
        bf16_tflops=rate.bf16_tflops if rate else None,
        fp16_tflops=rate.fp16_tflops if rate else None,
        fp8_tflops=rate.fp8_tflops if rate else None,
        sources=sources,
    )


def present_device(index: int = 0) -> Device:
    """The GPU of this machine, through `torch.cuda`.

    Raises:
        UsageError: there is none; says to name one.
    """
    import torch

    if not torch.cuda.is_available() or torch.cuda.device_count() <= index:
        raise UsageError(
            "this machine has no CUDA device to plan for; name one with --device: "
            f"{', '.join(DEVICES)}"
        )
    properties = torch.cuda.get_device_properties(index)
    return device_from_cuda(
        properties.name, (properties.major, properties.minor), properties.total_memory
    )
