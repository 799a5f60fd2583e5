"""The scoring kernel compiled ahead of time, for a GPU that need not be there.

Replaces: compiling at first launch, which needs Python and Triton where the plan runs. What comes
out is PTX with exactly the parameters that TensorRT passes to an ahead-of-time plugin: the inputs,
the scalars, the output, in this order.

Why Triton and not CUDA C++ with an exact signature: this source is the one that the tests interpret
against the float64 reference and that torch launches; it gets wgmma on sm_90 and tcgen05 on sm_100
from one description; and Triton comes with torch on Linux, a CUDA compiler does not. Its price is
the signature. Triton 3.4 and later append two scratch pointers to the parameters
(triton-lang/triton#8903); a launcher that does not know of them would have the driver read past its
argument list. They are dropped here, and only when nothing in the code reads them; otherwise
compiling fails. The rewritten PTX is then assembled, and the parameters that the machine code
states are compared once more.

Limits: a `target` with an architecture-specific instruction set (sm_90a, sm_100a, sm_120a) serves
its own compute capability only. Trade-off: the PTX version is pinned to the oldest that knows the
target, so that the driver on the machine that runs a plan need not be as new as Triton.
"""

from __future__ import annotations

import functools
import re
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ditrim.plugins.errors import BackendError, UsageError
from ditrim.plugins.kernel import import_triton, tile_for_width, triton_kernel

# Compute capability times ten -> PTX version times ten: the oldest that knows the target.
TARGETS = {80: 80, 89: 80, 90: 80, 100: 86, 120: 87}
# What TensorRT passes: queries, keys, bias, num_groups, num_rows, num_keys, result.
PARAMETERS = ("u64", "u64", "u64", "u32", "u32", "u32", "u64")
# Dynamic shared memory that a launch gets without opting in.
MAX_SHARED_BYTES = 48 * 1024
_POINTERS = {"bfloat16": "*bf16", "float16": "*fp16"}
_MATRIX_INSTRUCTIONS = ("wgmma.mma_async", "tcgen05.mma", "mma.sync")


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelImage:
    """The compiled kernel and what a launcher and a reader need to know of it.

    Attributes:
        name: the entry's name.
        ptx: the code; its entry takes `parameters`.
        target: compute capability times ten.
        parameters: PTX types of the entry's parameters, in order.
        num_threads: threads a block.
        block_rows: rows a block scores.
        shared_bytes: dynamic shared memory a block.
        registers: registers a thread.
        spill_bytes: bytes of registers that a thread keeps in memory, stores and loads together.
        matrix_instruction: the tensor-core instruction in the code.
    """

    name: str
    ptx: str
    target: int
    parameters: tuple[str, ...]
    num_threads: int
    block_rows: int
    shared_bytes: int
    registers: int
    spill_bytes: int
    matrix_instruction: str


def target_for_capability(capability: tuple[int, int]) -> int:
    """The target whose code runs on a GPU of this compute capability.

    Code for 8.x runs on every later 8.x; code for 9.0, 10.0 and 12.0 nowhere else.

    Raises:
        UsageError: there is none.
    """
    major, minor = capability
    asked = major * 10 + minor
    if asked in TARGETS:
        return asked
    older = [target for target in TARGETS if target // 10 == major == 8 and target < asked]
    if older:
        return max(older)
    known = ", ".join(f"{target // 10}.{target % 10}" for target in TARGETS)
    raise UsageError(
        f"the scoring kernel is not compiled for compute capability {major}.{minor}; there is "
        f"code for {known} and the other 8.x. Build with the portable ONNX function"
    )


def _without_debug_sections(ptx: str) -> str:
    """Drop line tables: they hold paths of the building machine and would end up in the plan."""
    ptx = re.sub(r"^\s*\.(?:loc|file)\b.*\n", "", ptx, flags=re.MULTILINE)
    return re.sub(r"^\s*\.section\s+\.debug\w*\s*\{[^}]*\}\s*?\n?", "", ptx, flags=re.MULTILINE)


def with_parameters(ptx: str, expected: tuple[str, ...]) -> tuple[str, str]:
    """Cut the entry's parameter list to what a launcher passes.

    Args:
        ptx: PTX with one entry.
        expected: PTX types of the parameters to keep, in order.

    Returns:
        The entry's name and the PTX.

    Raises:
        BackendError: the leading parameters are others, or the code reads one that would go.
    """
    entries = list(re.finditer(r"\.entry\s+(\w+)\s*\((.*?)\)", ptx, flags=re.DOTALL))
    if len(entries) != 1:
        raise BackendError(f"the compiled kernel has {len(entries)} entries in place of one")
    name, declared = entries[0][1], entries[0][2]
    parameters = re.findall(r"\.param\s+\.(\w+)[^,]*?\s(\w+)\s*(?:,|$)", declared.strip())
    types = tuple(kind for kind, _ in parameters)
    if declared.count(".param") != len(parameters) or types[: len(expected)] != expected:
        raise BackendError(
            f"the compiled kernel takes ({', '.join(types)}), where TensorRT passes "
            f"({', '.join(expected)}). This Triton release changed the order of the parameters"
        )
    for kind, parameter in parameters[len(expected) :]:
        if len(re.findall(rf"\b{parameter}\b", ptx)) != 1:
            raise BackendError(
                f"the compiled kernel reads parameter {parameter} ({kind}), which TensorRT does "
                "not pass. Use a Triton release that ditrim was tested with"
            )
    kept = ",\n".join(declared.split(",")[: len(expected)]).strip()
    kept = re.sub(r"\n+", "\n", kept)
    start, end = entries[0].span(2)
    return name, f"{ptx[:start]}\n\t{kept}\n{ptx[end:]}"


def _parameters_of_cubin(cubin: bytes) -> tuple[int, ...]:
    """Sizes in bytes of the kernel's parameters, in order, as the machine code states them.

    Reads the `.nv.info` section of the kernel: attribute 0x17 (KPARAM_INFO) holds the ordinal and,
    in the upper bits of its last word, the size.
    """
    sizes: dict[int, int] = {}
    for name, section in _elf_sections(cubin):
        if not name.startswith(".nv.info."):
            continue
        position = 0
        while position + 4 <= len(section):
            form, attribute, length = struct.unpack_from("<BBH", section, position)
            position += 4
            if form != 4:  # the other forms hold their value in the length's place
                continue
            if attribute == 0x17:
                _, ordinal, _, flags = struct.unpack_from("<IHHI", section, position)
                sizes[ordinal] = flags >> 18
            position += length
    return tuple(sizes[ordinal] for ordinal in sorted(sizes))


def _elf_sections(elf: bytes) -> Iterator[tuple[str, bytes]]:
    """Names and contents of the sections of a 64-bit ELF file."""
    (table,) = struct.unpack_from("<Q", elf, 40)
    entry_size, count, names = struct.unpack_from("<HHH", elf, 58)
    headers = [struct.unpack_from("<IIQQQQ", elf, table + i * entry_size) for i in range(count)]
    text = headers[names][4]
    for name, kind, _, _, offset, size in headers:
        start = text + name
        if kind != 8:  # 8: no contents in the file
            yield elf[start : elf.index(b"\0", start)].decode(), elf[offset : offset + size]


def _assemble(ptx: str, target: str, assembler: str) -> tuple[bytes, int, int]:
    """Machine code, registers a thread and spilled bytes of a PTX module."""
    with tempfile.TemporaryDirectory() as folder:
        source, output = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(ptx)
        done = subprocess.run(
            [assembler, "-v", f"-arch={target}", str(source), "-o", str(output)],
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise BackendError(f"ptxas refuses the scoring kernel for {target}: {done.stderr}")
        report = done.stdout + done.stderr
        registers = re.search(r"Used (\d+) registers", report)
        spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
        if registers is None or spills is None:
            raise BackendError(f"ptxas reports no registers or spills: {report}")
        return output.read_bytes(), int(registers[1]), int(spills[1]) + int(spills[2])


def _compiling_triton() -> Any:
    triton = import_triton()
    if triton.knobs.runtime.interpret:
        raise UsageError("TRITON_INTERPRET is set: Triton interprets and cannot compile. Unset it")
    return triton


@functools.cache
def compile_kernel(dtype: str, width: int, scale: float, target: int) -> KernelImage:
    """Compile the scoring kernel for one head width, scale and target. No GPU is needed.

    The scale becomes a constant of the code, because TensorRT passes an ahead-of-time plugin
    integers only and does not serialise its attributes.

    Args:
        dtype: of queries and keys, "bfloat16" or "float16".
        width: head width, a multiple of 16 up to 256.
        scale: factor of the dot products.
        target: one of `TARGETS`; see `target_for_capability`.

    Raises:
        UsageError: dtype, width or target is none of these.
        BackendError: Triton is missing, or what it made cannot be launched by TensorRT.
    """
    if dtype not in _POINTERS:
        raise UsageError(f"the scoring kernel takes {' or '.join(_POINTERS)}; got {dtype}")
    if target not in TARGETS:
        raise UsageError(f"target is {target}; allowed: {', '.join(map(str, TARGETS))}")
    tile = tile_for_width(width)
    triton = _compiling_triton()
    from triton.backends.compiler import GPUTarget

    constants = {
        "WIDTH": width,
        "PADDED_WIDTH": tile.padded_width,
        "BLOCK_ROWS": tile.block_rows,
        "BLOCK_KEYS": tile.block_keys,
        "SCALE": scale,
        "WIDEN": False,
    }
    tensors = {"queries": _POINTERS[dtype], "keys": _POINTERS[dtype], "bias": "*fp32"}
    scalars = {"num_groups": "i32", "num_rows": "i32", "num_keys": "i32"}
    # Rows of queries and keys are multiples of 32 bytes; TensorRT aligns tensors to 256.
    aligned = {(index,): [["tt.divisibility", 16]] for index in range(2)}
    built = triton.compile(
        triton.compiler.ASTSource(
            triton_kernel(),
            {**tensors, **scalars, "result": "*fp32"} | dict.fromkeys(constants, "constexpr"),
            constants,
            aligned,
        ),
        target=GPUTarget("cuda", target, 32),
        options={
            "num_warps": tile.num_warps,
            "num_stages": tile.num_stages,
            "ptx_version": TARGETS[target],
            "enable_fp_fusion": True,
        },
    )
    name, ptx = with_parameters(_without_debug_sections(built.asm["ptx"]), PARAMETERS)
    architecture = re.search(r"^\s*\.target\s+(\w+)", ptx, flags=re.MULTILINE)
    assert architecture is not None
    cubin, registers, spill_bytes = _assemble(ptx, architecture[1], triton.knobs.nvidia.ptxas.path)
    sizes = tuple(int(kind[1:]) // 8 for kind in PARAMETERS)
    if (found := _parameters_of_cubin(cubin)) != sizes:
        raise BackendError(
            f"the machine code takes parameters of {found} bytes, TensorRT passes {sizes}"
        )
    shared_bytes = int(built.metadata.shared)
    if shared_bytes > MAX_SHARED_BYTES:
        raise BackendError(
            f"the scoring kernel takes {shared_bytes} bytes of shared memory for width {width} on "
            f"sm_{target}; a launch gets {MAX_SHARED_BYTES} without opting in"
        )
    return KernelImage(
        name=name,
        ptx=ptx,
        target=target,
        parameters=PARAMETERS,
        num_threads=32 * tile.num_warps,
        block_rows=tile.block_rows,
        shared_bytes=shared_bytes,
        registers=registers,
        spill_bytes=spill_bytes,
        matrix_instruction=next((i for i in _MATRIX_INSTRUCTIONS if i in ptx), "none"),
    )
