"""What imports what, and what an import costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("commands", "engines", "export", "plugins", "runtime")
FOLDERS = {"commands": "scripts/commands"}
ALLOWED: dict[str, set[str]] = {
    "plugins": set(),
    "export": {"plugins"},
    "engines": {"plugins", "export"},
    "runtime": {"plugins", "engines"},
    "commands": {"plugins", "export", "engines", "runtime"},
}
# Of engines: what builds sets. The others are what an application embeds.
EXPORTING = "engines/build/"
# Rooms of a package, from the ground up: none imports from one above it, not even its types.
FLOORS = {
    "engines": (
        ("files", "forking", "presets", "json_file"),
        ("sets", "cost"),
        ("backend",),
        ("backends",),
        ("load", "build"),
        ("estimate", "live"),
    ),
    "runtime": (
        ("metrics", "page", "refusals", "report"),
        ("tokens",),
        ("policy",),
        ("policies",),
        ("caches", "policy_text"),
        ("denoising",),
        ("fit", "guidance_split", "transformer", "watched_scheduler"),
        ("attachment", "session"),
        ("small_editor", "photo_editor"),
        ("editing",),
        ("evaluation", "profiling"),
        ("service",),
        ("serving",),
    ),
}
MODULES = sorted(
    path.relative_to(ROOT)
    for package in PACKAGES
    for path in (ROOT / FOLDERS.get(package, package)).rglob("*.py")
)


def module_name(path: Path) -> str:
    parts = path.with_suffix("").parts
    if parts[0] == "scripts":
        parts = parts[1:]
    return ".".join(("ditrim", *(parts[:-1] if parts[-1] == "__init__" else parts)))


def imports_of(path: Path) -> set[str]:
    """Modules of ditrim that a file imports, wherever in it, for types too."""
    imported = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            imported.add(node.module)
            imported |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
    known = {module_name(module) for module in MODULES}
    return {name for name in imported if name in known}


def test_every_module_imports_without_gpu_packages() -> None:
    names = [module_name(path) for path in MODULES]
    blocked = ["tensorrt", "tensorrt_rtx", "triton", "cupy", "pycuda", "cuda", "polygraphy"]
    program = (
        "import importlib, sys\n"
        f"for name in {blocked}: sys.modules[name] = None\n"
        f"for name in {names}: importlib.import_module(name)\n"
        "print('imported')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "imported", done.stderr


@pytest.mark.parametrize("package", PACKAGES)
def test_importing_a_package_loads_nothing_heavy(package: str) -> None:
    program = (
        f"import sys, ditrim.{package}, ditrim.engines.json_file\n"
        "heavy = {'torch', 'diffusers', 'onnx', 'onnx_ir', 'onnxruntime', 'numpy', 'PIL'}\n"
        "heavy |= {'pydantic'}  # loaded with the first file that is read\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_the_runtime_runs_without_the_exporter() -> None:
    program = (
        "import sys\n"
        "import ditrim.runtime as d\n"
        "for name in d.__all__: getattr(d, name)\n"
        "print([m for m in sys.modules if m.startswith(('ditrim.export', 'onnx.', 'onnxscript'))])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_dependencies_point_one_way(path: Path) -> None:
    package = module_name(path).split(".")[1]
    used = {name.split(".")[1] for name in imports_of(path) if name.count(".")}
    if package == "engines" and not str(path).startswith(EXPORTING):
        assert "export" not in used
    assert used <= ALLOWED[package] | {package}


@pytest.mark.parametrize("path", [p for p in MODULES if p.parts[0] in FLOORS], ids=str)
def test_no_room_imports_from_a_floor_above_it(path: Path) -> None:
    package = path.parts[0]
    floor_of = {room: index for index, rooms in enumerate(FLOORS[package]) for room in rooms}

    def room_of(name: str) -> str:
        return [*name.split("."), "", ""][2]

    own = room_of(module_name(path))
    if own in ("", "_top"):
        return
    used = {room_of(n) for n in imports_of(path) if n.startswith(f"ditrim.{package}.")} - {own}
    above = {room for room in used if floor_of[room] > floor_of[own]}
    assert not above, f"{own} imports from {above}"


def test_nothing_imports_in_a_circle() -> None:
    edges = {module_name(path): imports_of(path) - {module_name(path)} for path in MODULES}
    edges = {
        name: {other for other in used if not name.startswith(f"{other}.")}  # its own package
        for name, used in edges.items()
    }
    left = dict(edges)
    while left:
        free = [name for name, used in left.items() if not used & left.keys()]
        assert free, f"in circles: {sorted(left)}"
        for name in free:
            del left[name]


def test_public_names_of_the_runtime_exist() -> None:
    import ditrim
    import ditrim.runtime

    for name in ditrim.runtime.__all__:
        assert getattr(ditrim, name).__name__ == name
        assert getattr(ditrim.runtime, name) is getattr(ditrim, name)
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = ditrim.Nothing
