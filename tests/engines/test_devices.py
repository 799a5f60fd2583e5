"""The table of GPUs: every figure sourced, names found, products not confused."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from ditrim.engines.cost.devices import (
    DEVICES,
    Device,
    device_from_cuda,
    device_named,
    known_device,
    present_device,
)
from ditrim.plugins.errors import UsageError

DOCUMENT = Path(__file__).parents[2] / "docs" / "guide" / "profile-latency.md"
FIGURES = (
    "compute_capability",
    "memory_bytes",
    "bandwidth_gb_s",
    "bf16_tflops",
    "fp16_tflops",
    "fp8_tflops",
)
# What is printed on the box, in 10^9 or 2^30 bytes.
BOARD_GB = {
    "h20": 96,
    "h20-141": 141,
    "h100": 80,
    "h200": 141,
    "a100-40": 40,
    "a100-80": 80,
    "l20": 48,
    "rtx4090": 24,
    "rtx5090": 32,
}


@pytest.mark.parametrize("device", DEVICES.values(), ids=list(DEVICES))
def test_every_figure_has_a_source_and_a_missing_one_says_so(device: Device) -> None:
    assert set(device.sources) == set(FIGURES)
    for name in FIGURES:
        source = device.sources[name]
        assert source
        assert (getattr(device, name) is None) == (source == "not established")


def test_the_devices_of_the_issue_are_there() -> None:
    assert set(BOARD_GB) == set(DEVICES)
    unknown = [d.name for d in DEVICES.values() if None in (getattr(d, name) for name in FIGURES)]
    assert unknown == []


@pytest.mark.parametrize("device", DEVICES.values(), ids=list(DEVICES))
def test_figures_are_consistent(device: Device) -> None:
    """No figure is of another unit, with sparsity, or of a box rather than of CUDA."""
    assert 0.9 * BOARD_GB[device.name] < device.memory_bytes / 2**30 < BOARD_GB[device.name]
    assert device.bf16_tflops == device.fp16_tflops
    assert device.bf16_tflops is not None
    assert 100 < device.bf16_tflops < 1000
    if device.compute_capability >= (8, 9):
        assert device.fp8_tflops == pytest.approx(2 * device.bf16_tflops, rel=1e-3)
    else:
        assert device.fp8_tflops == 0
    assert device.bandwidth_gb_s is None or 800 < device.bandwidth_gb_s < 5000


def test_peak_rates_are_what_the_chip_can_issue() -> None:
    """Multiprocessors x operations a clock x boost clock, for the chips whose clocks are public."""
    chips = {
        "h100": (132, 4096, 1.83),
        "h200": (132, 4096, 1.83),
        "a100-40": (108, 2048, 1.41),
        "a100-80": (108, 2048, 1.41),
        "rtx4090": (128, 512, 2.52),
        "rtx5090": (170, 512, 2.407),
    }
    for name, (processors, operations, clock) in chips.items():
        tflops = processors * operations * clock / 1e3
        assert DEVICES[name].bf16_tflops == pytest.approx(tflops, rel=1e-3), name
    # The published rate and clock agree no better than this.
    assert DEVICES["l20"].bf16_tflops == pytest.approx(92 * 512 * 2.52 / 1e3, rel=0.01)
    # 78 multiprocessors, capped: no public clock and width give its rate.
    assert DEVICES["h20"].bf16_tflops is not None
    assert DEVICES["h20"].bf16_tflops < 0.25 * 78 * 4096 * 1.98 / 1e3


def test_bandwidths_are_what_the_bus_can_carry() -> None:
    """Bits x data rate, for the memories whose rates are public."""
    buses = {
        "h20": (6144, 5.2376, 6e-3),  # printed as 4.0 TB/s
        "h20-141": (6144, 6.4, 0.03),  # HBM3e of 6.4 Gb/s, printed as 4.8 TB/s
        "h100": (5120, 5.2376, 1e-3),
        "h200": (6144, 6.4, 0.03),
        "a100-40": (5120, 2.43, 1e-3),
        "a100-80": (5120, 3.186, 1e-3),
        "l20": (384, 18, 1e-9),
        "rtx4090": (384, 21, 1e-9),
        "rtx5090": (512, 28, 1e-9),
    }
    assert set(buses) == set(DEVICES)
    for name, (bits, rate, tolerance) in buses.items():
        assert DEVICES[name].bandwidth_gb_s == pytest.approx(bits * rate / 8, rel=tolerance), name


def _table() -> str:
    """The table of `docs/guide/profile-latency.md`, from the devices."""
    lines = [
        "| `--project` | device | memory | bandwidth | bf16 | fp16 | fp8 |",
        "|---|---|---|---|---|---|---|",
    ]
    for device in DEVICES.values():
        rates = (device.bf16_tflops, device.fp16_tflops, device.fp8_tflops)
        shown = " | ".join(f"{rate:g}" if rate else "none" for rate in rates)
        lines.append(
            f"| `{device.name}` | {device.title} | {device.memory_bytes / 2**30:.2f} GiB | "
            f"{device.bandwidth_gb_s:,.0f} GB/s | {shown} |"
        )
    lines += ["", "Sources:", ""]
    for device in DEVICES.values():
        sources: dict[str, list[str]] = {}
        for field in FIGURES[1:]:
            label = field.removesuffix("_tflops").removesuffix("_bytes").removesuffix("_gb_s")
            sources.setdefault(device.sources[field], []).append(label)
        said = ". ".join(f"{', '.join(names)}: {source}" for source, names in sources.items())
        lines.append(f"- **{device.title}**: {said}.")
    return "\n".join(lines) + "\n"


def test_documentation_shows_the_table_as_it_is() -> None:
    assert _table() in DOCUMENT.read_text("utf-8")


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("h20", "h20"),
        ("H20", "h20"),
        ("H20-96GB", "h20"),
        ("H20-3e", "h20-141"),
        ("h20-141 GB", "h20-141"),
        (" rtx 4090 ", "rtx4090"),
        ("RTX5090", "rtx5090"),
        ("A100-80", "a100-80"),
        ("a100_80GB", "a100-80"),
    ],
)
def test_names_are_forgiving(given: str, name: str) -> None:
    assert device_named(given).name == name


def test_source_of_a_peak_names_rate_and_bandwidth() -> None:
    source = DEVICES["h20-141"].peak_source("bf16")
    assert source.startswith("NVIDIA H20-3e 141 GB: ")
    assert "TileOPs" in source
    assert "nvbandwidth" in source
    assert "data sheet (H100 SXM, 3.35 TB/s)" in DEVICES["h100"].peak_source("fp16")


def test_unknown_name_lists_all_and_the_nearest() -> None:
    with pytest.raises(UsageError) as caught:
        device_named("h201")
    message = str(caught.value)
    assert message.startswith("--device: unknown device 'h201'. Did you mean 'h20")
    assert message.endswith(f"Known: {', '.join(DEVICES)}.")
    with pytest.raises(UsageError, match=r"unknown device ''\. Known: h20,"):
        device_named("")


@pytest.mark.parametrize(
    ("cuda_name", "name"),
    [
        ("NVIDIA H20", "h20"),
        ("NVIDIA H20-3e", "h20-141"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-40GB", "a100-40"),
        ("NVIDIA A100-SXM4-80GB", "a100-80"),
        ("NVIDIA L20", "l20"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA GeForce RTX 5090", "rtx5090"),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H200 NVL", None),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA L20X", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
    ],
)
def test_cudas_names_are_told_apart(cuda_name: str, name: str | None) -> None:
    found = known_device(cuda_name)
    assert (found and found.name) == name


def test_present_device_has_its_own_memory_and_the_tables_rates() -> None:
    device = device_from_cuda("NVIDIA H200", (9, 0), 150_000_000_000)
    assert device.memory_bytes == 150_000_000_000
    assert device.sources["memory_bytes"] == "CUDA, of this device"
    assert device.bf16_tflops == DEVICES["h200"].bf16_tflops
    assert device.name == "h200"


def test_present_device_that_is_not_in_the_table_has_no_rates() -> None:
    device = device_from_cuda("NVIDIA T4", (7, 5), 16_000_000_000)
    rates = [getattr(device, name) for name in FIGURES[2:]]
    assert rates == [None] * 4
    assert {device.sources[name] for name in FIGURES[2:]} == {"not established"}
    assert device.peak_tflops("bf16") is None


def test_unknown_precision_is_refused() -> None:
    with pytest.raises(UsageError, match="no peak rate for precision 'int8'; known: bf16, fp16"):
        DEVICES["h20"].peak_tflops("int8")
    assert DEVICES["h20"].peak_tflops("fp8") == 296


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_a_device_must_be_named() -> None:
    with pytest.raises(UsageError) as caught:
        present_device()
    assert str(caught.value) == (
        "this machine has no CUDA device to plan for; name one with --device: " + ", ".join(DEVICES)
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_gpu_that_is_there_is_described() -> None:
    device = present_device()
    assert device.title == torch.cuda.get_device_name(0)
    assert device.memory_bytes == torch.cuda.get_device_properties(0).total_memory


def test_devices_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        DEVICES["h20"].memory_bytes = 1  # type: ignore[misc]
