"""`evaluate-policies`: its metrics, its statistics, and a real comparison on the small editor."""

from __future__ import annotations

import csv
import fcntl
import itertools
import json
import re
import shutil
import signal
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ditrim.commands.evaluate_policies import main
from ditrim.plugins.errors import DitrimError, UsageError
from ditrim.runtime.editing.edit_set import load_edit_set
from ditrim.runtime.evaluation.comparison import REFERENCE, evenly, noise_seed, plain, shown_edits
from ditrim.runtime.evaluation.edits import choose_edits
from ditrim.runtime.evaluation.folder import ComparisonFolder, merged_settings, open_folder
from ditrim.runtime.evaluation.page import data_uri, draw_plots
from ditrim.runtime.evaluation.summary import (
    by_edit,
    complete_rows,
    paired_differences,
    ranks_of,
    rows_as_csv,
    summarise_rows,
)
from ditrim.runtime.metrics import (
    RESAMPLES,
    compare_pictures,
    mean_interval,
    pareto_front,
    psnr_db,
    region_mean,
    ssim_and_map,
)

Run = Callable[..., tuple[int, dict[str, Any], str]]
POLICIES = ("topi tau=0.7 interval=2", 'Half <b>&": random ratio=0.5 interval=2', "full cache=0.5")
LABELS = (REFERENCE, "topi tau=0.7 interval=2", 'Half <b>&"', "full cache=0.5")


def pictures(seed: int, shape: tuple[int, ...] = (20, 31, 3)) -> Any:
    rng = np.random.default_rng(seed)
    first = rng.integers(0, 256, shape, dtype=np.uint8)
    return first, np.clip(first + rng.normal(0, 20, shape), 0, 255).astype(np.uint8)


# Metrics


@pytest.mark.parametrize("seed", range(3))
def test_metrics_agree_with_scikit_image(seed: int) -> None:
    from skimage import metrics

    first, second = pictures(seed)
    found = compare_pictures(first, second, target=second)
    expected = metrics.peak_signal_noise_ratio(first, second, data_range=255)
    assert found["psnr_db"] == pytest.approx(expected, abs=1e-9)
    similar = metrics.structural_similarity(first, second, channel_axis=-1, data_range=255)
    assert found["ssim"] == pytest.approx(similar, abs=1e-9)
    assert found["psnr_target_db"] == found["psnr_db"]
    assert found["ssim_target"] == found["ssim"]
    assert set(found) == {"psnr_db", "ssim", "psnr_target_db", "ssim_target"}


def test_regions_split_the_picture_into_edited_and_unedited() -> None:
    first, second = pictures(0)
    region = np.zeros(first.shape[:2], dtype=bool)
    region[3:9, 5:20] = True
    found = compare_pictures(first, second, region=region)
    errors = (first.astype(float) - second.astype(float)) ** 2
    similarities = ssim_and_map(first, second)[1]
    for name, part in (("edited", region), ("unedited", ~region)):
        rows, columns = np.nonzero(part)
        expected = [errors[row, column] for row, column in zip(rows, columns, strict=True)]
        assert found[f"psnr_{name}_db"] == pytest.approx(
            10 * np.log10(255**2 / np.mean(expected)), abs=1e-9
        )
        picked = [similarities[row, column] for row, column in zip(rows, columns, strict=True)]
        assert found[f"ssim_{name}"] == pytest.approx(np.mean(picked), abs=1e-12)
    # A whole picture's error is that of its parts, weighted by their pixels.
    share = region.mean()
    mean = share * errors[region].mean() + (1 - share) * errors[~region].mean()
    assert found["psnr_db"] == pytest.approx(10 * np.log10(255**2 / mean), abs=1e-9)


def test_equal_pictures_count_100_db_and_empty_regions_count_nothing() -> None:
    first, _ = pictures(0)
    nearly = first.copy()
    nearly[0, 0, 0] ^= 1
    assert psnr_db(first, first) == 100.0
    assert psnr_db(first, nearly) == pytest.approx(10 * np.log10(255**2 * first.size))
    large = np.zeros((2048, 2048, 3), dtype=np.uint8)
    nearly_large = large.copy()
    nearly_large[0, 0, 0] = 1
    assert psnr_db(large, nearly_large) == 100.0
    nowhere = np.zeros(first.shape[:2], dtype=bool)
    found = compare_pictures(first, first, region=nowhere)
    assert found["psnr_edited_db"] is None
    assert found["ssim_edited"] is None
    assert found["psnr_unedited_db"] == 100.0
    assert region_mean(np.ones(nowhere.shape), nowhere) is None
    floats = first / 255.0
    assert psnr_db(floats, nearly / 255.0, peak=1.0) == pytest.approx(psnr_db(first, nearly))


def test_interval_of_a_mean_is_about_that_of_normal_errors() -> None:
    values = np.random.default_rng(64).normal(30, 5, 64)
    low, high = mean_interval(values)
    assert low < values.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 8, rel=0.1)
    assert mean_interval(values[:1]) == (values[0], values[0])


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=12))
def test_pareto_front_holds_what_nothing_beats(points: list[tuple[int, int]]) -> None:
    def beats(other: tuple[int, int], one: tuple[int, int]) -> bool:
        return other[0] <= one[0] and other[1] >= one[1] and other != one

    front = pareto_front([cost for cost, _ in points], [quality for _, quality in points])
    found = [points[index] for index in front]
    expected = {one for one in points if not any(beats(other, one) for other in points)}
    assert found == sorted(expected)


# Statistics


def row(edit: str, seed: int, policy: str, psnr: float | None, category: str = "local") -> Any:
    cost = {"speedup": 1.5, "wall_speedup": 1.2, "transformer_ms": 10.0, "seconds": 0.1}
    shares = {"kept_ratio": 0.5, "noisy_kept_ratio": 1.0, "token_share": 0.7, "back_calls": 4}
    return {
        "edit": edit,
        "seed": seed,
        "policy": policy,
        "category": category,
        "psnr_db": psnr,
        "ssim": 0.9,
        "is_equal": psnr == 100.0,
        "calls_by_role": {"full": 4},
        **cost,
        **shares,
    }


def test_seeds_are_averaged_within_an_edit_before_edits_are_resampled() -> None:
    rng = np.random.default_rng(0)
    values = {
        (edit, seed, policy): float(rng.normal(30, 5))
        for edit, seed, policy in itertools.product("abcde", (0, 1), ("one", "two"))
    }
    rows = [
        row(edit, seed, policy, value, "local" if edit in "ab" else "global")
        for (edit, seed, policy), value in values.items()
    ]
    found = summarise_rows(rows, ["one", "two"], REFERENCE)
    assert found["groups"] == ["all", "local", "global"]
    for group, edits in (("all", "abcde"), ("local", "ab"), ("global", "cde")):
        one = [(values[e, 0, "one"] + values[e, 1, "one"]) / 2 for e in edits]
        two = [(values[e, 0, "two"] + values[e, 1, "two"]) / 2 for e in edits]
        entry = found["summary"][group]["one"]
        assert (entry["edits"], entry["runs"]) == (len(edits), 2 * len(edits))
        assert entry["psnr_db"]["mean"] == pytest.approx(np.mean(one), abs=1e-5)
        assert entry["psnr_db"]["median"] == pytest.approx(np.median(one), abs=1e-5)
        assert [entry["psnr_db"][k] for k in ("low", "high")] == pytest.approx(
            mean_interval(one), abs=1e-5
        )
        (pair,) = found["differences"][group]["psnr_db"]
        gaps = np.subtract(one, two)
        picks = np.random.default_rng(0).integers(0, len(gaps), (RESAMPLES, len(gaps)))
        low, high = np.percentile([gaps[p].mean() for p in picks], [2.5, 97.5])
        assert (pair["first"], pair["second"], pair["edits"]) == ("one", "two", len(edits))
        assert pair["mean"] == pytest.approx(gaps.mean(), abs=1e-5)
        assert (pair["low"], pair["high"]) == pytest.approx((low, high), abs=1e-5)
        assert pair["is_separated"] == (low > 0 or high < 0)
        assert (pair["wins"], pair["losses"]) == ((gaps > 0).sum(), (gaps < 0).sum())
        best = "one" if np.mean(one) > np.mean(two) else "two"
        assert found["summary"][group][best]["rank"] == 1


def test_pairs_that_miss_edits_are_told_of_those_that_both_have() -> None:
    rng = np.random.default_rng(1)
    values = {name: rng.normal(0.1, 0.02, 9) for name in "abcd"}
    values["b"][[2, 5]] = np.nan
    values["d"][:] = np.nan
    found = paired_differences(values, "lpips")
    assert [(pair["first"], pair["second"]) for pair in found] == [
        ("a", "b"),
        ("a", "c"),
        ("b", "c"),
    ]
    for pair in found:
        gaps = values[pair["first"]] - values[pair["second"]]
        gaps = gaps[~np.isnan(gaps)]
        assert pair["edits"] == len(gaps)
        assert pair["mean"] == pytest.approx(gaps.mean(), abs=1e-6)
        assert (pair["low"], pair["high"]) == pytest.approx(mean_interval(gaps), abs=1e-6)
        assert pair["wins"] == (gaps < 0).sum()  # a smaller distance is better


def test_equal_values_share_a_rank() -> None:
    values = {
        "a": np.array([3.0, 1.0]),
        "b": np.array([3.0, 1.0]),
        "c": np.array([1.0, 2.0]),
        "d": np.array([1.0, 0.0]),
    }
    ranks, within = ranks_of(values)
    assert ranks == {"a": 1, "b": 1, "c": 3, "d": 4}
    assert within == {"a": 2.0, "b": 2.0, "c": 2.25, "d": 3.75}
    assert ranks_of({}) == ({}, {})


def test_reference_has_no_rank_and_unfinished_edits_are_left_out() -> None:
    rows = [row("a", 0, REFERENCE, 100.0), row("a", 0, "one", 30.0), row("b", 0, REFERENCE, 100.0)]
    assert [r["edit"] for r in complete_rows(rows, [REFERENCE, "one"])] == ["a", "a"]
    found = summarise_rows(rows, [REFERENCE, "one"], REFERENCE)["summary"]["all"]
    assert found[REFERENCE]["rank"] is None
    assert found["one"]["rank"] == 1
    assert found[REFERENCE]["equal_pictures"] == 1
    missing = by_edit([row("a", 0, "one", None)], ["one"], ["psnr_db"])
    assert np.isnan(missing["one"]["psnr_db"]).all()


def test_small_helpers() -> None:
    assert evenly([0, 1, 2, 3, 4, 5, 6], 4) == [0, 2, 4, 6]
    assert evenly([0, 1], 4) == [0, 1]
    assert noise_seed(1, 3) == 100_006
    assert noise_seed(2**32 - 1, 10**6) < 2**32
    assert plain({"a": (np.float32(0.5), np.array([1, 2])), 3: float("nan")}) == {
        "a": [0.5, [1, 2]],
        "3": None,
    }
    picture = Image.new("RGB", (640, 320), "red")
    assert data_uri(picture, 128).startswith("data:image/jpeg;base64,")
    assert data_uri(picture.resize((48, 48))).startswith("data:image/png;base64,")


# Edits


def test_more_edits_begin_with_the_same_ones() -> None:
    for source in ("held-out", "train"):
        few, many = choose_edits(source, 3), choose_edits(source, 12)
        assert [(e.name, e.fingerprint) for e in few] == [(e.name, e.fingerprint) for e in many[:3]]
        assert {e.category for e in many} == {"local", "global", "camera", "transfer"}
        assert len({e.fingerprint for e in many}) == 12
    shown = shown_edits(many, 1)
    assert [many[i].category for i in shown] == ["local", "global", "camera", "transfer"]


def edit_set(folder: Path, **first: Any) -> Path:
    """Two edits, the first with a mask and a true edit."""
    from ditrim.runtime.small_editor import held_out_edits

    folder.mkdir(exist_ok=True)
    lines = []
    for index, example in enumerate(held_out_edits(2)):
        Image.fromarray(example.references[0]).save(folder / f"{index}.png")
        lines.append({"image": f"{index}.png", "prompt": example.prompt, "category": "drawn"})
    Image.fromarray(example.edit_mask).resize((96, 96)).save(folder / "mask.png")
    Image.fromarray(example.target).save(folder / "target.png")
    lines[0] |= {"mask": "mask.png", "target": "target.png", **first}
    (folder / "edits.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    return folder


def test_folder_of_edits_may_have_masks_and_targets(tmp_path: Path) -> None:
    folder = edit_set(tmp_path / "set")
    first, second = choose_edits(str(folder), None)
    assert (first.category, second.category) == ("drawn", "drawn")
    opened = first.open()
    region = opened.region((48, 48))
    assert region is not None
    assert region.shape == (48, 48)
    assert 0 < region.mean() < 1
    target = opened.target_pixels((48, 48))
    assert target is not None
    assert target.shape == (48, 48, 3)
    assert second.open().region((48, 48)) is None
    assert second.open().target_pixels((48, 48)) is None
    before = first.fingerprint
    Image.new("L", (9, 9)).resize((48, 48)).save(folder / "mask.png")
    changed = choose_edits(str(folder), None)
    assert changed[0].fingerprint != before
    assert changed[1].fingerprint == second.fingerprint


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"mask": "no.png"}, "edits.jsonl, line 1: there is no picture .*no.png"),
        ({"target": 3}, 'edits.jsonl, line 1: "target" must be a file name, got 3'),
        ({"image": "gone.png"}, "edits.jsonl, line 1: there is no picture .*gone.png"),
        ({"prompt": None}, 'edits.jsonl, line 1 has no "prompt"'),
    ],
)
def test_malformed_edit_names_its_line(entry: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = edit_set(tmp_path / "set", **entry)
    with pytest.raises(UsageError, match=message):
        load_edit_set(folder)


# The folder


def settings(**changed: Any) -> dict[str, Any]:
    usual: dict[str, Any] = {
        "fixed": {"engine": "abc", "steps": 4},
        "edits": [{"name": f"e{i}", "prompt": "p", "fingerprint": str(i)} for i in range(2)],
        "seeds": [0],
        "policies": [{"label": "full", "text": "full"}, {"label": "t", "text": "topi"}],
        "sessions": [{"started": "now"}],
    }
    return usual | changed


def test_edits_seeds_and_policies_can_be_added(tmp_path: Path) -> None:
    before = merged_settings(tmp_path, None, settings())
    more = settings(
        edits=[*settings()["edits"], {"name": "e2", "prompt": "q", "fingerprint": "2"}],
        seeds=[3, 0],
        policies=[{"label": "full", "text": "full"}, {"label": "new", "text": "random"}],
    )
    merged = merged_settings(tmp_path, before, more)
    assert merged["seeds"] == [0, 3]
    assert [policy["label"] for policy in merged["policies"]] == ["full", "t", "new"]
    assert len(merged["edits"]) == 3
    assert len(merged["sessions"]) == 2


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"fixed": {"engine": "xyz", "steps": 4}}, "engine = 'abc', and now it is 'xyz'"),
        ({"fixed": {"engine": "abc", "steps": 9}}, "steps = 4, and now it is 9: results would be"),
        ({"edits": settings()["edits"][:1]}, "of 2 edits, and now there are 1: give --count 2"),
        (
            {"edits": [{"name": "e0", "prompt": "p", "fingerprint": "other"}]},
            r"whose edit e0 is another one \('p'\)",
        ),
        ({"seeds": [1]}, "with the seeds 0, and now it is 1: seeds can be added, none left out"),
        (
            {"policies": [{"label": "t", "text": "topi tau=0.5"}]},
            "'t' is the policy 'topi', and now it is 'topi tau=0.5'; give it another label",
        ),
    ],
)
def test_changed_comparison_is_refused_and_says_what_changed(
    changed: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with open_folder(tmp_path, settings()):
        pass
    before = (tmp_path / "comparison.json").read_bytes()
    with pytest.raises(UsageError, match=message), open_folder(tmp_path, settings(**changed)):
        pass
    assert (tmp_path / "comparison.json").read_bytes() == before


def test_line_that_was_cut_off_is_made_again_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    first, second = row("e0", 0, "full", 100.0), row("e1", 0, "t\u00e9", 3.0)
    with open_folder(tmp_path, settings()) as opened:
        opened.append(first)
        opened.append(second)
    log = tmp_path / "runs.jsonl"
    whole = log.read_bytes()
    log.write_bytes(whole[:-7])
    with open_folder(tmp_path, settings()) as opened:
        assert list(opened.rows.values()) == [first]
        opened.append(second)
        assert len(opened.rows) == 2
    assert log.read_bytes() == whole
    log.write_bytes(b"{}\n" + whole)
    with (
        pytest.raises(DitrimError, match=r"runs.jsonl, line 1 is damaged .*; delete the line"),
        open_folder(tmp_path, settings()),
    ):
        pass


def test_folder_of_another_kind_or_in_use_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with (
        pytest.raises(UsageError, match=r"holds other files \(thesis.txt, ...\) and no comparison"),
        open_folder(tmp_path, settings()),
    ):
        pass
    used = tmp_path / "used"
    with open_folder(used, settings()):
        pass
    with open(used / "runs.jsonl", "a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with (
            pytest.raises(DitrimError, match="another process is at work in"),
            open_folder(used, settings()),
        ):
            pass
    (used / "comparison.json").write_text("{")
    with pytest.raises(DitrimError, match="it is truncated or not"), open_folder(used, settings()):
        pass
    (used / "comparison.json").write_text('{"format_version": 0}')
    with (
        pytest.raises(UsageError, match="it is of format version 0; this version"),
        open_folder(used, settings()),
    ):
        pass


# The command


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the comparison of this module is."""
    return tmp_path_factory.mktemp("comparison") / "out"


@pytest.fixture
def evaluate(small_engine_set: Path, output: Path, capfd: pytest.CaptureFixture[str]) -> Run:
    """Run the command with `--json`; returns its exit code, its JSON and its stderr."""

    def run(**replaced: Any) -> tuple[int, dict[str, Any], str]:
        usual: dict[str, Any] = {
            "engine": small_engine_set,
            "edits": "train",
            "count": 2,
            "steps": 4,
            "device": "cpu",
            "strips": 1,
            "output": output,
            "policy": POLICIES,
        }
        options = []
        for key, value in (usual | replaced).items():
            for item in value if isinstance(value, tuple) else (value,):
                options += ["--" + key.replace("_", "-"), str(item)] if item is not None else []
        code = main([*options, "--no-lpips", "--json"])
        captured = capfd.readouterr()
        assert "Traceback" not in captured.err
        return code, json.loads(captured.out.splitlines()[-1]), captured.err

    return run


@pytest.fixture
def finished(evaluate: Run, output: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The comparison of this module: interrupted after three runs, then finished."""
    if (output / "report.html").exists():
        return output
    append = ComparisonFolder.append

    def append_and_interrupt(self: ComparisonFolder, new: dict[str, Any]) -> None:
        append(self, new)
        if len(self.rows) == 3:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(ComparisonFolder, "append", append_and_interrupt)
        code, content, shown = evaluate()
    assert (code, content["exit_code"]) == (130, 130)
    assert "3 runs are kept; the same command again goes on from there" in shown
    kept = (output / "runs.jsonl").read_text().splitlines()
    assert len(kept) == 3
    assert not (output / "results.csv").exists()

    code, content, shown = evaluate()
    assert code == 0, content
    assert "holds 3 finished runs; 5 to make" in shown
    lines = (output / "runs.jsonl").read_text().splitlines()
    assert lines[:3] == kept
    assert len(lines) == 8
    assert (content["runs"], content["edits"]) == (8, 2)
    assert list(content["policies"]) == list(LABELS)
    return output


def results_of(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return content


def test_runs_say_what_the_pipeline_itself_gives(finished: Path, small_engine_set: Path) -> None:
    import torch

    import ditrim.runtime as ditrim
    from ditrim.runtime.small_editor import load_small_pipeline

    rows = {(r["edit"], r["policy"]): r for r in results_of(finished)["runs"]}
    pipe = load_small_pipeline()
    pipe.set_progress_bar_config(disable=True)
    edit = choose_edits("train", 2)[1]
    opened = edit.open()
    made, reports = {}, {}
    for label, policy in (
        (REFERENCE, ditrim.FullContext()),
        (LABELS[1], ditrim.ToPi(tau=0.7, interval=2)),
    ):
        with ditrim.attach(pipe, small_engine_set, policy, device="cpu") as attachment:
            made[label] = pipe(
                image=list(opened.images),
                prompt=edit.prompt,
                num_inference_steps=4,
                generator=torch.Generator().manual_seed(noise_seed(0, 1)),
            ).images[0]
        reports[label] = attachment.report
    found = rows[edit.name, LABELS[1]]
    pixels = {label: np.asarray(image) for label, image in made.items()}
    expected = compare_pictures(
        pixels[LABELS[1]],
        pixels[REFERENCE],
        region=opened.region((48, 48)),
        target=opened.target_pixels((48, 48)),
    )
    assert {key: found[key] for key in expected} == pytest.approx(expected, abs=1e-6)
    assert found["kept_ratio"] == pytest.approx(reports[LABELS[1]].kept_ratio, abs=1e-6)
    assert found["calls_by_role"] == {"full": 0, "anchor": 2, "reduced": 2, "reuse": 0}
    assert 0.5 < found["token_share"] < 1
    saved = Image.open(finished / "pictures" / rows[edit.name, REFERENCE]["picture"])
    assert np.array_equal(np.asarray(saved), pixels[REFERENCE])


def test_rows_of_reference_cache_and_pruning_are_what_they_must_be(finished: Path) -> None:
    results = results_of(finished)
    for entry in results["runs"]:
        if entry["policy"] == REFERENCE:
            assert (entry["psnr_db"], entry["ssim"], entry["is_equal"]) == (100.0, 1.0, True)
            assert (entry["speedup"], entry["token_share"], entry["back_calls"]) == (1.0, 1.0, 4)
        if entry["policy"] == "full cache=0.5":
            assert entry["kept_ratio"] == 1.0
            assert entry["back_calls"] < 4
            assert entry["back_calls"] == 4 - entry["calls_by_role"]["reuse"]
        if entry["policy"].startswith("Half"):
            assert entry["kept_ratio"] == pytest.approx(0.5, abs=0.01)
        full = next(
            r for r in results["runs"] if (r["edit"], r["policy"]) == (entry["edit"], REFERENCE)
        )
        ratio = full["transformer_ms"] / entry["transformer_ms"]
        assert entry["speedup"] == pytest.approx(ratio, abs=1e-5)
    assert {r["noise_seed"] for r in results["runs"]} == {0, 1}
    ranks = sorted(results["summary"]["all"][label]["rank"] for label in LABELS[1:])
    assert ranks == [1, 2, 3]
    assert len(results["differences"]["all"]["psnr_db"]) == 6
    assert results["groups"] == ["all", "local", "global"]


def test_csv_has_a_line_a_run_and_only_columns_that_were_measured(finished: Path) -> None:
    text = (finished / "results.csv").read_text()
    lines = list(csv.DictReader(text.splitlines()))
    assert len(lines) == 8
    columns = set(lines[0])
    assert {"edit", "category", "seed", "policy", "psnr_db", "ssim", "psnr_edited_db"} <= columns
    assert {"kept_ratio", "back_calls", "transformer_ms", "seconds", "speedup"} <= columns
    assert {"psnr_target_db", "anchor_calls", "reuse_calls"} <= columns
    assert not any(name.startswith("lpips") for name in columns)
    results = results_of(finished)
    assert "--no-lpips" in results["lpips"]
    for line, entry in zip(lines, results["runs"], strict=True):
        assert line["policy"] == entry["policy"]
        assert float(line["psnr_db"]) == entry["psnr_db"]
    assert rows_as_csv(results["runs"]) == text


class Page(HTMLParser):
    """Gathers text, addresses and open elements."""

    VOID = frozenset({"meta", "img", "br", "link", "input"})

    def __init__(self) -> None:
        super().__init__()
        self.text: list[str] = []
        self.addresses: list[str] = []
        self.open: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        self.addresses += [
            value or "" for name, value in attrs if name in ("src", "href", "xlink:href")
        ]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_page_is_whole_names_every_policy_and_fetches_nothing(finished: Path) -> None:
    content = (finished / "report.html").read_text()
    page = Page()
    page.feed(content)
    assert page.open == []
    text = "".join(page.text)
    for label in LABELS:
        assert label in text
    assert '<b>&"' not in content.replace("&lt;b&gt;", "")  # escaped wherever it stands
    assert all(address.startswith(("data:image/", "#")) for address in page.addresses)
    assert not re.search(r"@import|url\(\s*['\"]?https?:", content)
    assert page.tags.count("svg") == 6  # two plots for all edits and for both categories
    assert page.tags.count("table") == 4
    assert sum(address.startswith("data:") for address in page.addresses) >= 2 * (2 + 4 + 2)
    embedded = re.search(r'<script type="application/json" id="data">(.*?)</script>', content)
    assert embedded
    data = json.loads(embedded.group(1))
    assert [policy["label"] for policy in data["policies"]] == list(LABELS)
    assert len(data["differences"]["all"]["psnr_db"]) == 3
    assert len(data["differences"]["all"]["psnr_target_db"]) == 6


def test_plots_bear_the_policies_numbers() -> None:
    def entry(value: float, ratio: float) -> dict[str, Any]:
        names = ("psnr_db", "psnr_target_db", "speedup", "kept_ratio", "token_share")
        values = (value, value, 1 / ratio, ratio, ratio)
        return {
            name: {"mean": v, "median": v, "low": v - 1, "high": v + 1}
            for name, v in zip(names, values, strict=True)
        }

    labels = {f"p$_{i}": entry(20 + i % 7, 0.1 + 0.04 * i) for i in range(1, 21)}
    summary = {REFERENCE: entry(100, 1.0)} | labels
    svg = draw_plots(summary, "psnr_db", "PSNR", salt="a")
    titles = re.findall(r"<title>(\d+) ([^:]*): ", svg)
    assert len(titles) == 3 * 20
    assert {(int(number), label) for number, label in titles} == {
        (i, f"p$_{i}") for i in range(1, 21)
    }
    with_reference = draw_plots(summary, "psnr_target_db", "PSNR", salt="a")
    assert with_reference.count("<title>") == 3 * 21


def test_new_policies_and_seeds_are_added_to_what_is_there(
    finished: Path, evaluate: Run, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    kept = (copy / "runs.jsonl").read_text()
    code, content, _ = evaluate(
        output=copy, count=2, seeds="0,7", policy=("again: topi tau=0.7 interval=2",), strips=0
    )
    assert code == 0
    assert list(content["policies"]) == [*LABELS, "again"]
    lines = (copy / "runs.jsonl").read_text()
    assert lines.startswith(kept)
    rows = [json.loads(line) for line in lines.splitlines()]
    assert len(rows) == content["runs"] == 2 * 2 * 5
    by_key = {(r["edit"], r["seed"], r["policy"]): r for r in rows}
    for edit in ("train-0000", "train-0001"):
        first, second = (by_key[edit, 0, label] for label in (LABELS[1], "again"))
        assert first["psnr_db"] == second["psnr_db"]
        assert first["session"] < second["session"]
    page = (copy / "report.html").read_text()
    late = re.search(r"<b>Made in a later session .*\s+([^<]*)</b>", page)
    assert late
    assert late.group(1).endswith("again.")


@pytest.mark.parametrize(
    ("replaced", "message"),
    [
        ({"steps": 5}, "holds a comparison with steps = 4, and now it is 5"),
        ({"edits": "held-out"}, "edits = 'train', and now it is 'held-out'"),
        ({"count": 1}, "of 2 edits, and now there are 1"),
        ({"seeds": "1"}, "with the seeds 0, and now it is 1"),
        ({"threads": 1}, "threads = 0, and now it is 1"),
        (
            {"policy": (f"{LABELS[1]}: topi tau=0.8",)},
            "is the policy 'topi tau=0.7 interval=2', and now it is 'topi tau=0.8'",
        ),
    ],
)
def test_other_configuration_is_not_mixed_into_a_comparison(
    replaced: dict[str, Any], message: str, finished: Path, evaluate: Run
) -> None:
    before = (finished / "runs.jsonl").read_bytes()
    code, content, _ = evaluate(**replaced)
    assert (code, content["exit_code"]) == (2, 2)
    assert message in content["error"]
    assert (finished / "runs.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("replaced", "message"),
    [
        ({"policy": "toppi"}, "policy 'toppi' is unknown; allowed: full, topi"),
        ({"policy": "topi tua=1"}, "policy topi has no option 'tua'"),
        ({"policy": ("topi", "topi")}, "--policy 'topi': 'topi' is there already; give one"),
        ({"policy": f"{REFERENCE}: topi"}, "is there already (the full context is always run)"),
        ({"policy": None}, "the following arguments are required: --policy"),
        ({"count": 0}, "--count must lie in [1, 1000000], got 0"),
        ({"steps": 0}, "--steps must lie in [1, 1000], got 0"),
        ({"seeds": "0,0"}, "--seeds must be different"),
        ({"seeds": "a"}, "--seeds must be whole numbers with commas between, got 'a'"),
        ({"seeds": "-1"}, "--seeds must lie in [0, 4294967295], got '-1'"),
        ({"edits": "nowhere"}, "--edits nowhere is not there; give a folder with pictures"),
        ({"edits": __file__}, "is a file; give a folder with pictures and edits.jsonl"),
        ({"edits": str(Path(__file__).parent)}, "has no edits.jsonl"),
        ({"engine": "no-such-set"}, "engine set no-such-set does not exist"),
    ],
)
def test_bad_option_is_named_before_anything_runs(
    replaced: dict[str, Any], message: str, evaluate: Run, tmp_path: Path
) -> None:
    code, content, shown = evaluate(output=tmp_path / "out", **replaced)
    assert code == content["exit_code"] == (1 if "engine" in replaced else 2)
    assert message in content["error"]
    assert not (tmp_path / "out").exists()
    assert "run 1" not in shown


def test_empty_edit_set_and_lost_picture_are_named(evaluate: Run, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "edits.jsonl").write_text("\n")
    code, content, _ = evaluate(edits=empty, output=tmp_path / "out")
    assert code == 2
    assert "edits.jsonl is empty; it needs at least one edit" in content["error"]
    broken = edit_set(tmp_path / "broken")
    (broken / "1.png").write_bytes(b"no picture")
    code, content, _ = evaluate(edits=broken, output=tmp_path / "out")
    assert code == 2
    assert "1.png is not a picture in a format known here" in content["error"]
    code, content, _ = evaluate(edits=broken, count=3, output=tmp_path / "out")
    assert "--count 3:" in content["error"]
    assert "has 2 edits" in content["error"]


def test_folder_of_edits_is_compared_with_masks_where_there_are_some(
    evaluate: Run, tmp_path: Path
) -> None:
    folder = edit_set(tmp_path / "set")
    out = tmp_path / "out"
    code, content, _ = evaluate(edits=folder, count=None, output=out, policy="topi", steps=2)
    assert code == 0, content
    rows = {(r["edit"], r["policy"]): r for r in results_of(out)["runs"]}
    assert "psnr_edited_db" in rows["edit-0000", "topi"]
    assert "psnr_edited_db" not in rows["edit-0001", "topi"]
    entry = results_of(out)["summary"]["all"]["topi"]
    assert entry["psnr_target_db"]["edits"] == 1
    assert entry["psnr_db"]["edits"] == 2


def test_failing_run_names_its_edit_and_policy_and_keeps_the_others(
    evaluate: Run, tmp_path: Path
) -> None:
    policies = ("topi", "topi score=attention")
    code, content, _ = evaluate(policy=policies, count=1, output=tmp_path / "out", steps=2)
    assert code == 2
    assert "edit train-0000, policy 'topi score=attention': score 'attention'" in content["error"]


def test_policies_and_their_options_can_be_listed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--list-policies"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert "coverage\n  tau=  a number\n" in shown
    assert "  cache=  a number\n" in shown
