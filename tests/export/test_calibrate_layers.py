"""The `calibrate-layers` command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ditrim.commands.calibrate_layers import main
from ditrim.plugins.errors import UsageError
from ditrim.runtime.editing.edit_set import load_edit_set


@pytest.mark.slow
def test_small_editor_is_calibrated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--preset", "small", "--num-samples", "4", "--steps", "2", "--json"]
    code = main([*arguments, "--num-representative", "2", "--output", str(tmp_path)])
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert code == 0
    assert line["ok"] is True
    saved = json.loads((tmp_path / "calibration.json").read_text())
    assert set(saved["mass_by_category"]) == {"local", "global", "camera", "transfer"}
    assert all(0 < share < 1 for share in saved["mass"])
    ranked = sorted(
        range(saved["front_depth"], len(saved["mass"])), key=lambda i: -saved["sensitivity"][i]
    )
    assert saved["representative_layers"] == sorted(ranked[:2])
    assert (tmp_path / "calibration.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "qwen-edti"], "unknown model 'qwen-edti'. Did you mean 'qwen-edit'?"),
        (["--preset", "tiny"], "--preset is 'tiny'; allowed: small"),
        (["--preset", "small", "--set", "x"], "leave --weights, --set out"),
        ([], "--set is missing: a folder with pictures and edits.jsonl"),
        (["--preset", "small", "--steps", "0"], "--steps must be at least 1, got 0"),
        (["--preset", "small", "--num-samples", "x"], "invalid int value: 'x'"),
        (["--preset", "small", "--dtype", "int8"], "--dtype is 'int8'; allowed: float32"),
        (["--preset", "small", "--front-depth", "6"], "BACK has 0 of the 6 layers"),
        (["--preset", "small", "--num-representative", "9"], "9 representative layers cannot"),
    ],
)
def test_mistakes_exit_2_with_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--json"]) == 2
    out, err = capsys.readouterr()
    line = json.loads(out.splitlines()[-1])
    assert message in line["error"]
    assert line["ok"] is False
    assert "Traceback" not in err


def test_weights_that_are_no_pipeline_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    (tmp_path / "edits.jsonl").write_text('{"image": "a.png", "prompt": "grey"}\n')
    code = main(["--set", str(tmp_path), "--weights", str(tmp_path), "--json"])
    error = json.loads(capsys.readouterr().out.splitlines()[-1])["error"]
    assert code == 2
    assert "cannot load the pipeline" in error
    assert "model_index.json" in error


def test_edit_set_lists_references_in_order(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(b"x")
    lines: list[dict[str, Any]] = [
        {"image": "a.png", "prompt": "grey", "category": "global"},
        {"image": ["b.png", "a.png"], "prompt": "put it here"},
    ]
    (tmp_path / "edits.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    first, second = load_edit_set(tmp_path)
    assert (first.prompt, first.category) == ("grey", "global")
    assert [path.name for path in second.images] == ["b.png", "a.png"]
    assert second.category == "all"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"has no edits\.jsonl"),
        ("", "is empty; it needs at least one edit"),
        ("{", "line 1 is not JSON"),
        ('{"image": "a.png"}', 'line 1 has no "prompt"'),
        ('\n{"prompt": "x"}', 'line 2 has no "image"'),
        ('{"prompt": "x", "image": "none.png"}', "there is no picture"),
    ],
)
def test_malformed_edit_set_names_the_line(
    tmp_path: Path, content: str | None, message: str
) -> None:
    if content is not None:
        (tmp_path / "edits.jsonl").write_text(content)
    with pytest.raises(UsageError, match=message):
        load_edit_set(tmp_path)
