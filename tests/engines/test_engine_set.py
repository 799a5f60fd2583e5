from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

from ditrim.engines.sets import engine_set as module
from ditrim.engines.sets.command import options_in, rebuild_command
from ditrim.engines.sets.engine_set import load_engine_set
from ditrim.engines.sets.manifest import Manifest
from ditrim.plugins.errors import EngineSetError


def forge(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a manifest and make its own hash right again, as an attacker would."""
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    change(content)
    content.pop("manifest_sha256")
    digest = module.hashlib.sha256(
        json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    ).hexdigest()
    path.write_text(json.dumps(content | {"manifest_sha256": digest}))


def test_whole_set_loads_with_and_without_hashes(engine_folder: Path) -> None:
    engine_set = load_engine_set(engine_folder)
    assert engine_set == load_engine_set(str(engine_folder), verify="hashes")
    assert engine_set.path_of("back") == engine_folder / "back.onnx"
    assert isinstance(engine_set.manifest, Manifest)


def test_set_can_be_moved(engine_folder: Path, tmp_path: Path) -> None:
    engine_folder.rename(tmp_path / "elsewhere")
    engine_set = load_engine_set(tmp_path / "elsewhere", verify="hashes")
    assert f"--output {tmp_path / 'elsewhere'}" in engine_set.rebuild_command()


def test_missing_folder_says_how_to_build_one(tmp_path: Path) -> None:
    with pytest.raises(EngineSetError, match=r"nowhere does not exist; build one with: build-eng"):
        load_engine_set(tmp_path / "nowhere")


def test_file_in_place_of_a_folder_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(EngineSetError, match="file is not a folder"):
        load_engine_set(tmp_path / "file")


def test_folder_without_manifest_is_no_engine_set(tmp_path: Path) -> None:
    with pytest.raises(EngineSetError, match=r"is not an engine set: it has no manifest\.json"):
        load_engine_set(tmp_path)


def test_truncated_file_names_it_and_both_sizes(engine_folder: Path) -> None:
    os.truncate(engine_folder / "back.safetensors", 100)
    with pytest.raises(
        EngineSetError,
        match=r"back\.safetensors has 100 bytes, expected 4096: .* with: build-engine --model",
    ):
        load_engine_set(engine_folder)


def test_missing_file_is_named(engine_folder: Path) -> None:
    (engine_folder / "front.safetensors").unlink()
    with pytest.raises(EngineSetError, match=r"the file front\.safetensors is missing"):
        load_engine_set(engine_folder)


def test_changed_weights_of_equal_size_are_found_by_hashes(engine_folder: Path) -> None:
    path = engine_folder / "front.safetensors"
    path.write_bytes(b"\1" + path.read_bytes()[1:])
    load_engine_set(engine_folder)
    with pytest.raises(EngineSetError, match=r"front\.safetensors was changed: its SHA-256"):
        load_engine_set(engine_folder, verify="hashes")


def test_damaged_manifest_still_gives_the_rebuild_command(engine_folder: Path) -> None:
    forge(engine_folder, lambda content: content.update(format_version=99))
    with pytest.raises(
        EngineSetError, match=r"version 99; .* version 2\. Build it again with: build-engine .*set"
    ):
        load_engine_set(engine_folder)


@pytest.mark.parametrize(
    "path", ["../secret", "/etc/passwd", "a/../../secret", "./front.onnx", "", ".", "a\\b", "a//b"]
)
def test_manifest_paths_outside_the_folder_are_refused(engine_folder: Path, path: str) -> None:
    forge(engine_folder, lambda content: content["files"][0].update(path=path))
    with pytest.raises(EngineSetError, match=r"only plain paths inside|is not among the listed"):
        load_engine_set(engine_folder)


def test_link_out_of_the_folder_is_refused(engine_folder: Path, tmp_path: Path) -> None:
    (engine_folder / "back.safetensors").rename(tmp_path / "outside")
    (engine_folder / "back.safetensors").symlink_to(tmp_path / "outside")
    with pytest.raises(EngineSetError, match=r"back\.safetensors is a link to a place outside"):
        load_engine_set(engine_folder)


def in_hub_cache(folder: Path, cache: Path) -> Path:
    """The set as the hub's library keeps it: links into the repository's `blobs`."""
    snapshot, blobs = cache / "models--me--set/snapshots/abc", cache / "models--me--set/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(folder.iterdir())):
        path.rename(blobs / f"{number:064x}")
        (snapshot / path.name).symlink_to(f"../../blobs/{number:064x}")
    return snapshot


def test_a_set_in_the_snapshot_folder_of_a_hub_cache_loads(
    engine_folder: Path, tmp_path: Path
) -> None:
    snapshot = in_hub_cache(engine_folder, tmp_path / "hub")
    assert load_engine_set(snapshot, verify="hashes").manifest.model
    linked = tmp_path / "linked"
    linked.symlink_to(snapshot)
    assert load_engine_set(linked).folder == linked


@pytest.mark.parametrize(
    "place", ["elsewhere", "models--me--other/blobs/0", "models--me--set/refs"]
)
def test_links_out_of_the_repository_of_a_hub_cache_are_refused(
    engine_folder: Path, tmp_path: Path, place: str
) -> None:
    snapshot = in_hub_cache(engine_folder, tmp_path / "hub")
    outside = tmp_path / "hub" / place
    outside.parent.mkdir(parents=True, exist_ok=True)
    (snapshot / "back.safetensors").resolve().rename(outside)
    (snapshot / "back.safetensors").unlink()
    (snapshot / "back.safetensors").symlink_to(outside)
    with pytest.raises(EngineSetError, match=r"back\.safetensors is a link to a place outside"):
        load_engine_set(snapshot)


def test_a_linked_folder_of_blobs_opens_nothing(engine_folder: Path, tmp_path: Path) -> None:
    snapshot = in_hub_cache(engine_folder, tmp_path / "hub")
    blobs = tmp_path / "hub/models--me--set/blobs"
    blobs.rename(tmp_path / "elsewhere")
    blobs.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(EngineSetError, match="is a link to a place outside"):
        load_engine_set(snapshot)


def test_fifo_in_place_of_a_file_is_refused(engine_folder: Path) -> None:
    (engine_folder / "back.safetensors").unlink()
    os.mkfifo(engine_folder / "back.safetensors")
    with pytest.raises(EngineSetError, match=r"back\.safetensors is not a file"):
        load_engine_set(engine_folder)


@pytest.mark.parametrize("where", ["initializer", "subgraph", "function"])
@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("location", "../../secret", "only plain paths inside the folder"),
        ("location", "/etc/passwd", "only plain paths inside the folder"),
        ("location", "other.bin", r"in 'other\.bin', which is not a file of the set"),
        ("offset", "4000000", r"points past the end of back\.safetensors"),
        ("offset", "-8", r"points past the end of back\.safetensors"),
        ("length", "lots", r"points past the end of back\.safetensors"),
    ],
)
def test_graph_that_reads_elsewhere_is_refused(
    engine_folder: Path, where: str, key: str, value: str, message: str
) -> None:
    path = engine_folder / "back.onnx"
    model = onnx.load(str(path), load_external_data=False)
    weight = model.graph.initializer[0]
    if where != "initializer":
        constant = onnx.helper.make_node("Constant", [], ["hidden"])
        constant.attribute.add(name="value", type=onnx.AttributeProto.TENSOR).t.CopyFrom(weight)
        weight = constant.attribute[0].t
    next(item for item in weight.external_data if item.key == key).value = value
    if where == "subgraph":
        body = onnx.helper.make_graph([constant], "body", [], [])
        model.graph.node.append(onnx.helper.make_node("If", ["x"], ["y"], then_branch=body))
    elif where == "function":
        model.functions.append(onnx.helper.make_function("d", "f", [], ["hidden"], [constant], []))
    path.write_bytes(model.SerializeToString())
    refresh(engine_folder, path.name)
    with pytest.raises(EngineSetError, match=message):
        load_engine_set(engine_folder)


def refresh(folder: Path, name: str) -> None:
    """Let the manifest agree with a file that was changed."""
    data = (folder / name).read_bytes()
    fields = {"num_bytes": len(data), "sha256": module.hashlib.sha256(data).hexdigest()}
    forge(
        folder,
        lambda content: [
            entry.update(fields) for entry in content["files"] if entry["path"] == name
        ],
    )


def test_changed_graph_of_equal_size_is_found_without_asking(engine_folder: Path) -> None:
    path = engine_folder / "front.onnx"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(EngineSetError, match=r"front\.onnx was changed: its SHA-256"):
        load_engine_set(engine_folder)


@pytest.mark.parametrize("data", [b"\x80\x04" * 100, b"not ONNX at all", b""])
def test_graph_that_is_not_onnx_is_a_clear_error(engine_folder: Path, data: bytes) -> None:
    (engine_folder / "front.onnx").write_bytes(data)
    refresh(engine_folder, "front.onnx")
    with pytest.raises(EngineSetError, match=r"front\.onnx is not ONNX\. Build it again with"):
        load_engine_set(engine_folder)


def test_other_backend_version_is_refused_unless_allowed(
    engine_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "backend_version", lambda backend: "99.0")
    with pytest.raises(
        EngineSetError, match=r"built for onnxruntime [\d.]+, and 99\.0 is installed: .* build-eng"
    ):
        load_engine_set(engine_folder)
    assert load_engine_set(engine_folder, allow_other_version=True)


def test_unknown_backend_is_refused(engine_folder: Path) -> None:
    forge(engine_folder, lambda content: content.update(backend="abacus"))
    with pytest.raises(EngineSetError, match=r"backend 'abacus', which .* known: onnxruntime"):
        load_engine_set(engine_folder)


def test_rebuild_command_replaces_options_and_what_contradicts_them() -> None:
    options = options_in(
        "build-engine --model qwen-edit --ladder 8,16 --config 'a=[1, 2]' --output old"
    )
    assert rebuild_command(options, Path("new dir"), max_reference_tokens=512) == (
        "build-engine --model qwen-edit --config 'a=[1, 2]' --max-reference-tokens 512 "
        "--output 'new dir'"
    )
    assert rebuild_command(options, Path("x"), ladder=(4, 8), model=None) == (
        "build-engine --config 'a=[1, 2]' --ladder 4,8 --output x"
    )


@pytest.fixture
def plan_folder(engine_folder: Path) -> Path:
    """A set of plans, as far as its files and its manifest show."""
    size = {"least": 1, "best": 2, "most": 4}
    profile = dict.fromkeys(("batch", "noisy", "reference", "text"), size) | {"rows": None}
    plans = {}
    for role in ("front", "back"):
        for ending in ("onnx", "safetensors"):
            (engine_folder / f"{role}.{ending}").unlink()
        (engine_folder / f"{role}.plan").write_bytes(role.encode() * 100)
        plans[role] = {
            "file": f"{role}.plan",
            "profiles": [profile],
            "device_memory_bytes": None,
            "inputs": [],
            "outputs": [],
        }

    def change(content: dict[str, Any]) -> None:
        content["plans"] = plans
        content["target"] = {
            "compute_capabilities": ["8.9"],
            "gpu": None,
            "driver": None,
            "weights": "included",
            "separate_anchor": False,
        }
        content["files"] = []
        for role in plans:
            data = (engine_folder / f"{role}.plan").read_bytes()
            content["graphs"][role]["file"] = f"{role}.plan"
            content["files"].append(
                {
                    "path": f"{role}.plan",
                    "num_bytes": len(data),
                    "sha256": module.hashlib.sha256(data).hexdigest(),
                }
            )

    forge(engine_folder, change)
    return engine_folder


def test_set_of_plans_loads_and_its_damage_is_found(plan_folder: Path) -> None:
    engine_set = load_engine_set(plan_folder, verify="hashes")
    assert engine_set.path_of("back") == plan_folder / "back.plan"
    path = plan_folder / "front.plan"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    load_engine_set(plan_folder)  # plans are as large as weights, and hashed when asked
    with pytest.raises(EngineSetError, match=r"front\.plan was changed: its SHA-256"):
        load_engine_set(plan_folder, verify="hashes")
    os.truncate(path, 7)
    with pytest.raises(EngineSetError, match=r"front\.plan has 7 bytes, expected 500"):
        load_engine_set(plan_folder)
    path.unlink()
    with pytest.raises(EngineSetError, match=r"front\.plan is missing"):
        load_engine_set(plan_folder)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("../back.plan", "is not among the listed"),
        ("other.plan", "is not among the listed"),
        ("graph.onnx", r"'graph\.onnx' is not a plan by its name"),
    ],
)
def test_plan_that_is_no_file_of_the_set_is_refused(
    plan_folder: Path, file: str, message: str
) -> None:
    (plan_folder / "graph.onnx").write_bytes(b"x")

    def change(content: dict[str, Any]) -> None:
        content["plans"]["back"]["file"] = file
        content["files"].append({"path": "graph.onnx", "num_bytes": 1, "sha256": "0"})

    forge(plan_folder, change)
    with pytest.raises(EngineSetError, match=message):
        load_engine_set(plan_folder)


def test_rebuild_command_knows_options_without_a_value() -> None:
    options = options_in("build-engine --separate-anchor --model qwen-edit --graph-only --output x")
    assert options["separate_anchor"] == ()
    assert rebuild_command(options, Path("x"), graph_only=None) == (
        "build-engine --separate-anchor --model qwen-edit --output x"
    )
