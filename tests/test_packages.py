"""What imports what, and what an import costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("engines", "export", "plugins", "runtime")
# Commands are the edge: they put the packages together.
COMMANDS = {"engines/cli.py", "export/cli.py", "runtime/cli.py", "runtime/cache_cli.py"}
ALLOWED = {
    "plugins": set(),
    "export": {"plugins"},
    "engines": {"plugins", "export"},
    "runtime": {"plugins", "engines"},
}
# Of engines: what builds sets. The others are what an application embeds.
EXPORTING = {"build.py", "graph_files.py", "options.py", "source.py"}
MODULES = sorted(
    path.relative_to(ROOT) for package in PACKAGES for path in (ROOT / package).rglob("*.py")
)


def module_name(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(("ditrim", *(parts[:-1] if parts[-1] == "__init__" else parts)))


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
        f"import sys, ditrim.{package}\n"
        "heavy = {'torch', 'diffusers', 'onnx', 'onnx_ir', 'onnxruntime', 'numpy', 'PIL'}\n"
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
    if str(path) in COMMANDS:
        return
    package = path.parts[0]
    imported = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            imported.add(node.module)
        elif isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
    used = {name.split(".")[1] for name in imported if name.startswith("ditrim.")}
    if package == "engines" and path.name not in EXPORTING:
        assert "export" not in used
    assert used <= ALLOWED[package] | {package}


def test_public_names_of_the_runtime_exist() -> None:
    import ditrim.runtime as ditrim

    for name in ditrim.__all__:
        assert getattr(ditrim, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = ditrim.Nothing
