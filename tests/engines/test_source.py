from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from ditrim.engines import presets
from ditrim.engines.build import source as module
from ditrim.engines.build.options import BuildOptions
from ditrim.engines.build.source import (
    check_unchanged,
    choose_split,
    find_source,
    fingerprint,
    planned_config,
)
from ditrim.plugins.errors import CheckpointError, UsageError


def split_of(**given: Any) -> module.SplitChoice:
    options = BuildOptions(weights="random", **given)
    return choose_split(options, find_source(options))


def test_released_depth_keeps_the_published_layers() -> None:
    split = split_of()
    assert (split.num_layers, split.front_depth) == (60, 10)
    assert split.representative_layers == (35, 37, 42)
    assert split.layers_source == "ToPi App. C.3"


def test_cut_depth_scales_the_layers_and_says_so() -> None:
    split = split_of(num_layers=12)
    assert (split.num_layers, split.front_depth) == (12, 2)
    assert split.representative_layers == (7, 8)
    assert split.layers_source.startswith("scaled from 60 layers to 12, not measured")


@pytest.mark.parametrize("count", range(2, 60, 7))
@pytest.mark.parametrize("model", ["qwen-edit", "flux-kontext"])
def test_every_depth_has_a_front_and_a_scored_back(model: str, count: int) -> None:
    split = split_of(model=model, num_layers=count)
    assert split.num_layers == count
    assert 1 <= split.front_depth < count
    assert split.representative_layers
    assert all(split.front_depth <= layer < count for layer in split.representative_layers)


def test_one_layer_is_all_back() -> None:
    split = split_of(num_layers=1)
    assert (split.front_depth, split.representative_layers) == (0, (0,))


def test_flux_depth_is_cut_in_the_models_ratio() -> None:
    config = find_source(BuildOptions(model="flux-kontext", weights="random", num_layers=6)).config
    assert (config["num_layers"], config["num_single_layers"]) == (2, 4)
    assert config["guidance_embeds"] is True


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"front_depth": 60}, r"--front-depth is 60; allowed: 0 to 59, since the model has 60"),
        (
            {"front_depth": 36},
            r"layer 35, from the model's own \(ToPi App\. C\.3\), is not a layer of BACK, which "
            r"are 36 to 59; choose others with --layers, or another --front-depth",
        ),
        ({"layers": (35, 60)}, r"layer 60, given with --layers, is not a layer of BACK, which are"),
        ({"layers": (37, 35)}, r"--layers 37,35 must increase and not repeat"),
        ({"config": {"num_layers": "many"}}, r"num_layers is 'many'; it must be a whole number"),
        ({"config": {"num_layers": 0}}, r"has no layers; it needs at least one"),
    ],
)
def test_impossible_splits_name_option_and_range(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        split_of(**given)


def test_pipeline_folder_and_transformer_folder_are_the_same_source(pipeline_folder: Path) -> None:
    whole = find_source(BuildOptions(weights=str(pipeline_folder)))
    part = find_source(BuildOptions(weights=str(pipeline_folder / "transformer")))
    assert whole.kind == part.kind == "folder"
    assert whole.checkpoint == part.checkpoint
    assert fingerprint(whole, {}) == fingerprint(part, {})


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ("nowhere", r"--weights 'nowhere' is neither a folder or file that exists, nor a hub id"),
        ("./nowhere", r"checkpoint nowhere does not exist; pass a folder"),
        ("/no/where/at/all", r"checkpoint /no/where/at/all does not exist"),
    ],
)
def test_weights_that_do_not_exist_are_a_clear_error(weights: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        find_source(BuildOptions(weights=weights))


def test_revision_of_a_folder_is_refused(pipeline_folder: Path) -> None:
    with pytest.raises(UsageError, match=r"--revision needs weights from the hub, and .* a folder"):
        find_source(BuildOptions(weights=str(pipeline_folder), revision="main"))


def test_preset_takes_its_own_calibration(
    pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(pipeline_folder / "transformer", tmp_path / "transformer")
    monkeypatch.setattr(module, "small_editor_folder", lambda: tmp_path)
    options = BuildOptions(preset="small")
    assert choose_split(options, find_source(options)).layers_source.startswith("scaled")
    calibration = tmp_path / "calibration.json"
    calibration.write_text(json.dumps({"front_depth": 2, "representative_layers": [2]}))
    found = find_source(options)
    split = choose_split(options, found)
    assert found.kind == "small"
    assert (split.front_depth, split.representative_layers) == (2, (2,))
    assert split.layers_source == "measured by calibrate-layers on these weights"
    calibration.write_text("{}")
    with pytest.raises(CheckpointError, match=r"calibration\.json: key 'front_depth' is missing"):
        find_source(options)


@pytest.mark.parametrize(
    ("calibration", "given", "message"),
    [
        (
            {"front_depth": 1, "representative_layers": [2, 5]},
            {},
            r"layer 5, from the calibration shipped with the 'small' model, is not a layer of "
            r"BACK, which are 1 to 2; choose others with --layers, or another --front-depth",
        ),
        (
            {"front_depth": 1, "representative_layers": [1]},
            {"front_depth": 2},
            r"layer 1, from the calibration .* which are 2 to 2",
        ),
        (
            {"front_depth": 3, "representative_layers": [4]},
            {},
            r"the calibration's front depth is 3; allowed: 0 to 2, .* another with --front-depth",
        ),
        (
            {"front_depth": 1, "representative_layers": [5]},
            {"layers": (7,)},
            r"layer 7, given with --layers, is not a layer of BACK",
        ),
    ],
)
def test_layers_that_do_not_fit_say_where_they_came_from(
    pipeline_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    calibration: dict[str, Any],
    given: dict[str, Any],
    message: str,
) -> None:
    shutil.copytree(pipeline_folder / "transformer", tmp_path / "transformer")
    monkeypatch.setattr(module, "small_editor_folder", lambda: tmp_path)
    (tmp_path / "calibration.json").write_text(json.dumps(calibration))
    options = BuildOptions(preset="small", **given)
    with pytest.raises(UsageError, match=message):
        choose_split(options, find_source(options))


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        "[]",
        "3",
        "not json",
        "[" * 100_000,
        '{"front_depth": 1, "representative_layers": []}',
        '{"front_depth": 1, "representative_layers": 2}',
        '{"front_depth": 1.5, "representative_layers": [2]}',
        '{"front_depth": true, "representative_layers": [2]}',
        '{"front_depth": -1, "representative_layers": [2]}',
        '{"front_depth": 1, "representative_layers": [2, 2]}',
        '{"front_depth": 2, "representative_layers": [1]}',
    ],
)
def test_damaged_calibration_of_the_preset_names_the_file(
    pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    shutil.copytree(pipeline_folder / "transformer", tmp_path / "transformer")
    monkeypatch.setattr(module, "small_editor_folder", lambda: tmp_path)
    (tmp_path / "calibration.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"calibration\.json: .*; install the"):
        find_source(BuildOptions(preset="small"))


def test_status_that_a_link_stamps_is_refreshed_and_content_still_guarded(
    pipeline_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(pipeline_folder, tmp_path / "pipeline")
    source = find_source(BuildOptions(weights=str(tmp_path / "pipeline")))
    prints = fingerprint(source, {})
    name = next(iter(prints))
    path = tmp_path / "pipeline" / "transformer" / name
    os.link(path, tmp_path / "link")
    (tmp_path / "link").unlink()
    with pytest.raises(CheckpointError, match="changed while the engine set was built"):
        check_unchanged(source, prints)
    now = check_unchanged(source, prints, were_linked=True)
    assert now[name]["sha256"] == prints[name]["sha256"]
    assert now[name]["ctime_ns"] > prints[name]["ctime_ns"]
    assert fingerprint(source, now) == now
    os.utime(path)
    with pytest.raises(CheckpointError, match=f"{name} changed while the engine set was built"):
        check_unchanged(source, prints, were_linked=True)


def test_planned_configuration_fetches_nothing(
    pipeline_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "fetch_checkpoint", lambda *arguments: pytest.fail("fetched"))
    assert planned_config(BuildOptions(model="qwen-edit-2511")) == {
        "zero_cond_t": True,
        "_class_name": "QwenImageTransformer2DModel",
    }
    folder = planned_config(BuildOptions(weights=str(pipeline_folder)))
    assert folder["num_layers"] == 3
    assert planned_config(BuildOptions(weights="random", num_layers=7))["num_layers"] == 7
    with pytest.raises(CheckpointError, match="neither a folder or file that exists"):
        planned_config(BuildOptions(weights="nowhere"))


def test_installation_without_the_small_editor_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(presets, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(CheckpointError, match=r"lacks the small editor's weights .* install the"):
        presets.small_editor_folder()
