from __future__ import annotations

from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest

from ditrim.engines.sets import identity
from ditrim.engines.sets.identity import backend_version, identity_of
from ditrim.plugins.errors import BackendError

INPUTS: dict[str, Any] = {
    "options": {"a": 1},
    "config": {"b": [1, 2]},
    "weights": {"c": "0"},
    "backend": "onnxruntime",
}


def test_equal_inputs_have_equal_identities() -> None:
    assert identity_of(**INPUTS) == identity_of(**INPUTS | {"config": {"b": (1, 2)}})
    assert len(identity_of(**INPUTS)) == 64


@pytest.mark.parametrize(
    "change",
    [{"options": {}}, {"config": {}}, {"weights": {"c": "1"}}, {"device": {"gpu": "NVIDIA H100"}}],
)
def test_any_input_changes_the_identity(change: dict[str, Any]) -> None:
    assert identity_of(**INPUTS | change) != identity_of(**INPUTS)


def test_gpu_distribution_counts_as_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name == "onnxruntime-gpu":
            return "9.9"
        raise PackageNotFoundError(name)

    monkeypatch.setattr(identity, "version", version)
    assert backend_version("onnxruntime") == "9.9"


def test_missing_packages_are_named_with_how_to_install_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def version(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(identity, "version", version)
    with pytest.raises(
        BackendError, match=r"'onnxruntime' is not installed; .* pip install onnxru"
    ):
        backend_version("onnxruntime")
    with pytest.raises(BackendError, match=r"needs torch, which is not installed; .* pip install"):
        identity.library_versions()


@pytest.mark.parametrize(
    ("name", "backends"),
    [
        ("plugins/kernel.py", {"onnxruntime", "tensorrt", "tensorrt-rtx"}),
        ("engines/build/build.py", {"onnxruntime", "tensorrt", "tensorrt-rtx"}),
        ("engines/sets/profiles.py", {"onnxruntime", "tensorrt", "tensorrt-rtx"}),
        ("engines/backends/tensorrt/graph.py", {"tensorrt", "tensorrt-rtx"}),
        ("engines/backends/onnxruntime/graph.py", {"onnxruntime"}),
        ("engines/estimate/text.py", set()),
        ("runtime/policy.py", set()),
        ("scripts/commands/console.py", set()),
    ],
)
def test_an_edited_source_counts_for_the_backends_that_use_it(
    name: str, backends: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    every = ("onnxruntime", "tensorrt", "tensorrt-rtx")
    before = {backend: identity.source_digest(backend) for backend in every}
    original = Path.read_bytes

    def edited(path: Path) -> bytes:
        extra = b"#" if str(path).endswith(name) else b""
        return original(path) + extra

    monkeypatch.setattr(Path, "read_bytes", edited)
    changed = {backend for backend in every if identity.source_digest(backend) != before[backend]}
    assert changed == backends


@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt-rtx"])
def test_missing_plan_builder_is_named_with_its_extra(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(identity, "version", version)
    with pytest.raises(BackendError, match=rf"pip install 'ditrim\[{backend}\]'"):
        backend_version(backend)
