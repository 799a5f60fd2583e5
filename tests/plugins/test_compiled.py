"""The scoring kernel compiled ahead of time: resources, parameters, what ends up in the PTX."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest

from ditrim.plugins import compiled
from ditrim.plugins.compiled import (
    MAX_SHARED_BYTES,
    PARAMETERS,
    TARGETS,
    KernelImage,
    compile_kernel,
    target_for_capability,
    with_parameters,
)
from ditrim.plugins.errors import BackendError, UsageError
from ditrim.plugins.kernel import MAX_WIDTH, WIDTH_STEP, tile_for_width

DOCUMENT = Path(__file__).parents[2] / "docs" / "internals" / "scoring-plugin.md"
# The release whose registers and shared memory the document's table states.
TABLE_VERSION = "3.9.0"
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs Triton: pip install triton"
)


def documented() -> dict[tuple[int, int], tuple[str, int, int, int]]:
    """The document's table: (width, target) -> instruction, registers, spills, shared memory."""
    rows = re.findall(
        r"^\| (\d+) \| sm_(\d+) \| `([\w.]+)` \| (\d+) \| (\d+) \| (\d+) \|$",
        DOCUMENT.read_text(),
        flags=re.MULTILINE,
    )
    return {
        (int(width), int(target)): (instruction, int(registers), int(spills), int(shared))
        for width, target, instruction, registers, spills, shared in rows
    }


def check_image(image: KernelImage, width: int) -> None:
    """What has to hold for every width and target, with every release of Triton."""
    tile = tile_for_width(width)
    assert image.parameters == PARAMETERS
    assert image.block_rows == tile.block_rows
    assert image.num_threads == 32 * tile.num_warps
    # Nothing else is asked of a launch: no clusters, for one.
    directives = image.ptx.partition(".entry")[2].partition(")")[2].partition("{")[0]
    assert directives.split() == [".reqntid", str(image.num_threads)]
    version = TARGETS[image.target]
    assert f".version {version // 10}.{version % 10}\n" in image.ptx
    assert re.search(rf"\.target sm_{image.target}a?\b", image.ptx)
    assert image.matrix_instruction != "none"
    assert image.spill_bytes == 0
    assert image.registers <= 255
    assert image.shared_bytes < MAX_SHARED_BYTES
    for trace in (".file", ".loc", ".debug", ".py", "/"):
        assert trace not in re.sub(r"//.*", "", image.ptx), trace


def check_table(width: int, target: int) -> None:
    import triton

    image = compile_kernel("bfloat16", width, width**-0.5, target)
    check_image(image, width)
    if triton.__version__ != TABLE_VERSION:
        pytest.skip(f"the table is that of Triton {TABLE_VERSION}; found {triton.__version__}")
    found = (image.matrix_instruction, image.registers, image.spill_bytes, image.shared_bytes)
    assert documented()[width, target] == found


def test_the_table_covers_every_tile_and_target() -> None:
    assert set(documented()) == {(w, target) for w in (64, 128, 256) for target in TARGETS}


@needs_triton
@pytest.mark.parametrize("target", TARGETS)
def test_registers_spills_and_shared_memory_are_those_of_the_table(target: int) -> None:
    check_table(128, target)


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("width", [64, 256])
def test_the_table_at_other_widths(width: int, target: int) -> None:
    check_table(width, target)


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("width", range(WIDTH_STEP, MAX_WIDTH + 1, WIDTH_STEP))
def test_every_width_compiles_without_spills_in_float16(width: int) -> None:
    target = tuple(TARGETS)[width // WIDTH_STEP % len(TARGETS)]
    check_image(compile_kernel("float16", width, width**-0.5, target), width)


@needs_triton
def test_scale_and_dtype_reach_the_code() -> None:
    images = [
        compile_kernel(dtype, 128, scale, 80)
        for dtype, scale in (("bfloat16", 0.125), ("bfloat16", 0.25), ("float16", 0.125))
    ]
    assert len({image.ptx for image in images}) == 3
    assert ".f32.bf16.bf16.f32" in images[0].ptx  # float32 accumulation
    assert ".f32.f16.f16.f32" in images[2].ptx
    assert compile_kernel("bfloat16", 128, 0.125, 80) is images[0]


@needs_triton
def test_the_machine_code_states_the_parameters_that_tensorrt_passes() -> None:
    import triton

    image = compile_kernel("bfloat16", 128, 128**-0.5, 80)
    ptxas = triton.knobs.nvidia.ptxas.path
    cubin, _, _ = compiled._assemble(image.ptx, "sm_80", ptxas)
    assert compiled._parameters_of_cubin(cubin) == (8, 8, 8, 4, 4, 4, 8)
    # A parameter more would be seen.
    last = image.ptx.index("\n)")
    longer = f"{image.ptx[:last]},\n\t.param .u64 extra{image.ptx[last:]}"
    cubin, _, _ = compiled._assemble(longer, "sm_80", ptxas)
    assert compiled._parameters_of_cubin(cubin) == (8, 8, 8, 4, 4, 4, 8, 8)
    with pytest.raises(BackendError, match="ptxas refuses the scoring kernel for sm_80"):
        compiled._assemble(image.ptx.replace("ret;", "return;"), "sm_80", ptxas)


PTX = """
.version 8.0
.target sm_80
.visible .entry k(
\t.param .u64 .ptr .global .align 1 k_param_0,
\t.param .u32 k_param_1,
\t.param .u64 .ptr .global .align 1 k_param_2,
\t.param .u64 .ptr .global .align 1 k_param_3
)
.reqntid 128
{
\tld.param.b64 %rd1, [k_param_0];
\tret;
}
"""


def test_unread_trailing_parameters_are_dropped() -> None:
    name, ptx = with_parameters(PTX, ("u64", "u32"))
    assert name == "k"
    assert "k_param_1\n)" in ptx
    assert "k_param_2" not in ptx
    assert "ld.param.b64 %rd1, [k_param_0];" in ptx
    assert with_parameters(ptx, ("u64", "u32")) == (name, ptx)


def test_a_trailing_parameter_that_is_read_is_an_error() -> None:
    reading = PTX.replace("\tret;", "\tld.param.b64 %rd2, [k_param_3];\n\tret;")
    with pytest.raises(BackendError, match=r"reads parameter k_param_3 \(u64\), which TensorRT"):
        with_parameters(reading, ("u64", "u32"))


@pytest.mark.parametrize("expected", [("u64", "u64"), ("u32",), ("u64", "u32", *["u64"] * 3)])
def test_other_parameters_than_expected_are_an_error(expected: tuple[str, ...]) -> None:
    with pytest.raises(BackendError, match=r"takes \(u64, u32, u64, u64\), where TensorRT passes"):
        with_parameters(PTX, expected)


def test_two_entries_are_an_error() -> None:
    with pytest.raises(BackendError, match="has 2 entries"):
        with_parameters(PTX + PTX, ("u64", "u32"))


@pytest.mark.parametrize(
    ("capability", "target"),
    [((8, 0), 80), ((8, 6), 80), ((8, 9), 89), ((9, 0), 90), ((10, 0), 100), ((12, 0), 120)],
)
def test_a_capability_gets_code_that_runs_on_it(capability: tuple[int, int], target: int) -> None:
    assert target_for_capability(capability) == target


@pytest.mark.parametrize("capability", [(7, 5), (10, 3), (11, 0), (12, 1)])
def test_capabilities_without_code_are_refused(capability: tuple[int, int]) -> None:
    with pytest.raises(UsageError, match=r"not compiled for compute capability .*8\.0, 8\.9, 9\.0"):
        target_for_capability(capability)


def test_what_cannot_be_compiled_is_named() -> None:
    with pytest.raises(UsageError, match="takes bfloat16 or float16; got float32"):
        compile_kernel("float32", 128, 1.0, 80)
    with pytest.raises(UsageError, match="target is 75; allowed: 80, 89, 90, 100, 120"):
        compile_kernel("float16", 128, 1.0, 75)
    with pytest.raises(UsageError, match="multiples of 16"):
        compile_kernel("float16", 100, 1.0, 80)


def test_without_triton_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(BackendError, match=r"needs Triton 3\.4 or later: pip install triton"):
        compile_kernel("float16", 16, 0.3, 80)


@needs_triton
def test_an_interpreting_triton_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(UsageError, match="TRITON_INTERPRET is set"):
        compile_kernel("float16", 16, 0.3, 80)
