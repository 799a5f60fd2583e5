"""The `calibrate-auto` command, on a comparison's files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ditrim.commands.calibrate_auto import main
from ditrim.runtime.policies.auto import Auto
from ditrim.runtime.policies.quality import Outlook, load_quality


def write_comparison(folder: Path, num_rows: int = 60) -> Path:
    """Runs whose PSNR is 12 + 15 x for coverage, x the logarithm of what is given up."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    for index in range(num_rows):
        ratio = float(rng.uniform(0.1, 0.9))
        influence = 1 - (1 - ratio) ** 1.5
        seen = {"kept_ratio": ratio, "kept_influence": influence}
        method = "tokendrop" if index % 3 == 0 else "coverage"
        psnr = 12 + 15 * -np.log10(1 - influence) - (4 if method == "tokendrop" else 0)
        candidates = [{"policy": method, **seen, "residual_spread": 0.05}]
        candidates.append({"policy": "tokendrop", "ruled_out": "no source"})
        notes = {"chosen": method, "candidates": candidates}
        rows.append({"policy": "a", "psnr_db": psnr + rng.normal(0, 0.3), "policy_notes": notes})
    rows.append({"policy": "full context", "psnr_db": 100.0})
    full = {"chosen": "full", "candidates": []}
    rows.append({"policy": "a", "psnr_db": 100.0, "policy_notes": full})
    rows = [{"edit": f"e{index}", "seed": 0, **row} for index, row in enumerate(rows)]
    (folder / "runs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"cut')
    settings: dict[str, Any] = {"fixed": {"model": "qwen-edit", "engine": "f" * 64}}
    settings |= {"format_version": 1, "edits": [], "seeds": [0], "policies": [], "sessions": []}
    (folder / "comparison.json").write_text(json.dumps(settings))
    return folder


def run(capfd: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, dict[str, Any]]:
    code = main([*map(str, arguments), "--json"])
    captured = capfd.readouterr()
    assert "Traceback" not in captured.err
    return code, json.loads(captured.out.splitlines()[-1])


def test_what_is_fitted_predicts_and_serves_auto(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder, output = write_comparison(tmp_path / "runs"), tmp_path / "auto.json"
    code, content = run(capfd, "--comparison", folder, "--output", output)
    assert code == 0
    assert content["methods"]["coverage"]["num_runs"] == 40
    assert content["methods"]["tokendrop"]["num_runs"] == 20
    assert 0.7 < content["no_worse_than_predicted"]["coverage"] < 1
    found = load_quality(output)
    assert (found.model, found.identity) == ("qwen-edit", "f" * 64)
    outlook = Outlook(ratio=0.5, influence=1 - 0.5**1.5)
    expected = 12 + 15 * -np.log10(0.5**1.5)
    assert found.predict("coverage", outlook) == pytest.approx(expected - 0.3, abs=0.4)
    assert Auto(min_psnr=20.0, predictor=str(output)).quality == found


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        ("missing", "cannot be read: No such file or directory; make one with evaluate-policies"),
        ("settings", "it is of format version None"),
        ("rows", "runs.jsonl, line 1 is damaged (JSONDecodeError"),
        ("none", "has no runs that auto served with coverage; calibrate-auto --help shows"),
        ("few", "4 runs of coverage do not tell how quality depends on what is kept"),
        ("output", "the folder"),
    ],
)
def test_what_cannot_be_fitted_is_refused(
    harm: str, message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder, output = tmp_path / "runs", tmp_path / "auto.json"
    if harm != "missing":
        write_comparison(folder, 6 if harm == "few" else 60)
    if harm == "settings":
        (folder / "comparison.json").write_text("{}")
    if harm == "rows":
        (folder / "runs.jsonl").write_text("not json\n{}\n")
    if harm == "none":
        (folder / "runs.jsonl").write_text(
            '{"edit": "e", "seed": 0, "policy": "topi", "psnr_db": 30.0}\n'
        )
    if harm == "output":
        output = tmp_path / "no" / "auto.json"
    code, content = run(capfd, "--comparison", folder, "--output", output)
    assert code == 2
    assert message in content["error"]
    assert not output.exists()
