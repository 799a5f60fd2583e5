from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from ditrim.engines.sets.manifest import Manifest, canonical_json
from ditrim.plugins.errors import EngineSetError


@pytest.fixture
def text(engine_folder: Path) -> str:
    return (engine_folder / "manifest.json").read_text()


def sealed(content: dict[str, Any]) -> str:
    """The text of a manifest whose own hash is right, as a forger would make it."""
    content.pop("manifest_sha256", None)
    digest = hashlib.sha256(canonical_json(content).encode()).hexdigest()
    return json.dumps(content | {"manifest_sha256": digest})


def test_json_round_trip_keeps_every_field(text: str) -> None:
    manifest = Manifest.from_json(text)
    assert Manifest.from_json(manifest.to_json()) == manifest
    assert manifest.to_json() == text
    assert manifest.graphs["front"].inputs[0].shape[0] == "noisy"


def test_edited_manifest_is_recognised(text: str) -> None:
    with pytest.raises(EngineSetError, match="was edited after the build"):
        Manifest.from_json(text.replace('"front_depth": 10', '"front_depth": 11'))


def test_missing_seal_is_recognised(text: str) -> None:
    content = json.loads(text)
    del content["manifest_sha256"]
    with pytest.raises(EngineSetError, match="was edited after the build"):
        Manifest.from_json(json.dumps(content))


def test_other_format_version_names_both(text: str) -> None:
    content = json.loads(text) | {"format_version": 7, "new_key": 1}
    with pytest.raises(EngineSetError, match=r"is of format version 7; .* reads format version 2"):
        Manifest.from_json(sealed(content))


def test_truncated_manifest_says_so(text: str) -> None:
    with pytest.raises(EngineSetError, match=r"is truncated or not JSON"):
        Manifest.from_json(text[: len(text) // 2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"surprise": 1}, "key 'surprise' is unknown"),
        ({"num_layers": "60"}, "key 'num_layers' is '60'; it must be a valid integer"),
        ({"num_layers": True}, "key 'num_layers' is True; it must be a valid integer"),
        ({"front_depth": -1}, "key 'front_depth' is -1; it must be greater than or equal"),
        ({"precision": "int8"}, "key 'precision' is 'int8'; allowed: fp32, fp16, bf16"),
        ({"architecture": "unet"}, "key 'architecture' is 'unet'; allowed: qwen, flux"),
        ({"graphs": {}}, r"key 'graphs\.(front|back)' is missing"),
        ({"files": [{"path": "x"}]}, r"key 'files\[0\].num_bytes' is missing"),
        ({"files": [3]}, r"key 'files\[0\]' is 3; it must be an object"),
        ({"ladder": {"rungs": [4, 2], "granularity": 1}}, "key 'ladder': .* must increase"),
        ({"ladder": {"granularity": 4}}, "key 'ladder.rungs' is missing"),
        ({"limits": {"batch": 0, "noisy": 1, "text": 1}}, "key 'limits.batch' is 0"),
        (
            {"representative_layers": ["a"]},
            r"key 'representative_layers\[0\]' is 'a'; it must be a valid",
        ),
        (
            {"transformer_config": {"num_attention_heads": -1}},
            "key 'transformer_config': num_attention_heads is -1; it must be a whole number, 1 or",
        ),
        ({"transformer_config": {"num_layers": "60"}}, "'transformer_config': num_layers is '60'"),
        ({"options": None}, "key 'options' is None; it must be an object"),
        ({"options": {"layers": "35"}}, "key 'options.layers' is '35'; it must be a valid array"),
        ({"command": "build-engine"}, "key 'command' is unknown"),
        ({"plans": []}, r"key 'plans' is \[\]; it must be an object"),
        ({"plans": {"middle": 3}}, r"key 'plans\.middle' is 3; it must be an object"),
        ({"target": {"gpu": None}}, r"key 'target\.compute_capabilities' is missing"),
    ],
)
def test_wrong_keys_are_named_even_if_the_seal_is_forged(
    text: str, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(EngineSetError, match=message):
        Manifest.from_json(sealed(json.loads(text) | change))


@pytest.mark.parametrize("key", ["identity", "ladder", "files", "backend_version"])
def test_missing_keys_are_named(text: str, key: str) -> None:
    content = json.loads(text)
    del content[key]
    with pytest.raises(EngineSetError, match=f"key '{key}' is missing"):
        Manifest.from_json(sealed(content))


@pytest.mark.parametrize("text", ["", "[]", "3", "[" * 100_000, '{"format_version": true}'])
def test_what_is_no_manifest_is_a_clear_error(text: str) -> None:
    with pytest.raises(EngineSetError, match=r"manifest\.json"):
        Manifest.from_json(text)


def test_manifest_older_than_options_is_read_with_its_command_line(text: str) -> None:
    content = json.loads(text)
    del content["options"]
    content["command"] = (
        "build-engine --model qwen-edit --ladder 8,16 --config 'a=[1, 2]' --config b=1 "
        "--separate-anchor --output 'old folder'"
    )
    manifest = Manifest.from_json(sealed(content))
    assert manifest.command == content["command"]
    assert manifest.options["config"] == ("a=[1, 2]", "b=1")
    again = Manifest.from_json(manifest.to_json())
    assert again == manifest
    with pytest.raises(EngineSetError, match="was edited after the build"):
        Manifest.from_json(sealed(content).replace("old folder", "my folder"))


@pytest.mark.parametrize("command", [None, 3, "", "rm -rf /", "build-engine --output 'x"])
def test_what_is_no_command_line_of_an_older_manifest_is_named(text: str, command: object) -> None:
    content = json.loads(text)
    del content["options"]
    with pytest.raises(EngineSetError, match=r"manifest\.json: key 'command'"):
        Manifest.from_json(sealed(content | {"command": command}))


def with_layer_scores(content: dict[str, Any], shape: list[Any]) -> dict[str, Any]:
    """A manifest's content whose BACK tells the scores of its layers."""
    output = {"name": "layer_scores", "dtype": "float32", "shape": shape}
    back = content["graphs"]["back"]
    graphs = content["graphs"] | {"back": back | {"outputs": [*back["outputs"], output]}}
    return content | {"graphs": graphs}


def test_manifest_older_than_detailed_layers_is_read(text: str) -> None:
    content = json.loads(text)
    assert content.pop("detailed_layers") == []
    assert Manifest.from_json(sealed(content)) == Manifest.from_json(text)


def test_detailed_layers_survive_a_round_trip(text: str) -> None:
    content = with_layer_scores(json.loads(text), ["batch", 2, 3, "reference"])
    manifest = Manifest.from_json(sealed(content | {"detailed_layers": [10, 11]}))
    assert manifest.detailed_layers == (10, 11)
    assert Manifest.from_json(manifest.to_json()) == manifest


@pytest.mark.parametrize(
    ("layers", "shape", "message"),
    [
        ([10], None, "'detailed_layers' names 1 layers, which does not fit the outputs of"),
        ([10], ["batch", 2, 3, "reference"], "'detailed_layers' names 1 layers"),
        ([], ["batch", 2, 3, "reference"], "'detailed_layers' names 0 layers"),
        (
            [True],
            ["batch", 1, 3, "reference"],
            r"'detailed_layers\[0\]' is True; it must be a valid",
        ),
    ],
)
def test_detailed_layers_that_do_not_fit_the_graph_are_named(
    text: str, layers: list[Any], shape: list[Any] | None, message: str
) -> None:
    content = json.loads(text) | {"detailed_layers": layers}
    if shape is not None:
        content = with_layer_scores(content, shape)
    with pytest.raises(EngineSetError, match=message):
        Manifest.from_json(sealed(content))


def plan_content() -> dict[str, Any]:
    """A plan as a manifest holds it."""
    size = {"least": 1, "best": 2, "most": 4}
    return {
        "file": "back.plan",
        "profiles": [dict.fromkeys(("batch", "noisy", "reference", "text", "rows"), size)],
        "device_memory_bytes": [1024],
        "inputs": [{"name": "score_rows", "dtype": "int64", "shape": ["rows"]}],
        "outputs": [{"name": "influence", "dtype": "float32", "shape": ["batch", "reference"]}],
    }


TARGET = {
    "compute_capabilities": ["8.9", "12.0"],
    "gpu": None,
    "driver": None,
    "weights": "included",
    "separate_anchor": False,
}


def test_plans_and_target_survive_a_round_trip(text: str) -> None:
    front = plan_content() | {"file": "front.plan", "inputs": [], "device_memory_bytes": None}
    front["profiles"] = [front["profiles"][0] | {"rows": None}]
    content = json.loads(text) | {
        "plans": {"front": front, "back": plan_content()},
        "target": TARGET,
    }
    manifest = Manifest.from_json(sealed(content))
    assert Manifest.from_json(manifest.to_json()) == manifest
    assert manifest.target == TARGET
    assert manifest.plans["back"].profiles[0].reference.most == 4
    assert manifest.plans["back"].device_memory_bytes == (1024,)
    assert manifest.plans["front"].profiles[0].rows is None
    assert manifest.plans["front"].device_memory_bytes is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"profiles": []}, r"key 'plans\.back\.profiles' is \[\]; .* at least 1 item"),
        (
            {"device_memory_bytes": [1, 2]},
            r"key 'plans.back': device_memory_bytes has 2 entries for 1 profiles",
        ),
        ({"inputs": []}, r"key 'plans\.back': the rows of its profiles do not fit its inputs"),
        (
            {"outputs": [{"name": "x", "dtype": "float32", "shape": ["depth"]}]},
            r"key 'plans\.back': it has the axis 'depth'; allowed: batch, noisy, reference",
        ),
        ({"surprise": 1}, r"key 'plans\.back\.surprise' is unknown"),
    ],
)
def test_wrong_plans_are_named(text: str, change: dict[str, Any], message: str) -> None:
    plans = {
        "front": plan_content() | {"file": "front.plan"},
        "back": plan_content() | change,
    }
    content = json.loads(text) | {"plans": plans, "target": TARGET}
    with pytest.raises(EngineSetError, match=message):
        Manifest.from_json(sealed(content))


def test_profile_range_that_contradicts_itself_is_named(text: str) -> None:
    plan = plan_content()
    plan["profiles"] = [plan["profiles"][0] | {"text": {"least": 3, "best": 2, "most": 4}}]
    content = json.loads(text) | {"plans": {"front": plan, "back": plan}, "target": TARGET}
    with pytest.raises(EngineSetError, match=r"'plans\.front\.profiles\[0\]\.text': the range 3"):
        Manifest.from_json(sealed(content))


def test_plans_of_other_roles_or_one_alone_are_no_set(text: str) -> None:
    content = json.loads(text) | {"plans": {"back": plan_content()}, "target": TARGET}
    with pytest.raises(EngineSetError, match=r"key 'plans\.front' is missing"):
        Manifest.from_json(sealed(content))
    content["plans"] |= {"front": plan_content(), "middle": plan_content()}
    with pytest.raises(EngineSetError, match=r"key 'plans\.middle' is unknown"):
        Manifest.from_json(sealed(content))
