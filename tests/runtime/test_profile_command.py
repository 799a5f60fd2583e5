"""The `profile-latency` command: real runs on the small engine set, and what it refuses."""

from __future__ import annotations

import csv
import html
import json
import math
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from made_up_profile import GEOMETRY, made_up, row

from ditrim.commands.profile_latency import main
from ditrim.runtime.profiling.file import load_profile
from ditrim.runtime.profiling.profile import PARTS, PRODUCT, noise_complaint
from ditrim.runtime.profiling.run_cost import RunSchedule, StepTimes, estimate_schedule, load_report
from ditrim.runtime.profiling.text import COLUMNS, table_rows

Command = Callable[..., tuple[int, dict[str, Any], str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Command:
    """Run the command: exit code, what `--json` printed, and all other output."""

    def command(*arguments: object) -> tuple[int, dict[str, Any], str]:
        capsys.readouterr()
        code = main([*map(str, arguments), "--json"])
        captured = capsys.readouterr()
        *said, line = captured.out.strip().splitlines()
        return code, json.loads(line), "\n".join(said) + captured.err

    return command


@pytest.fixture(scope="module")
def measured(small_engine_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real, short profile; noise does not matter to what is tested with it."""
    folder = tmp_path_factory.mktemp("profile") / "new" / "out"
    sizes = "--batch 1 --batch 2 --reference 144 --rung 59 --rung 117 --text 8"
    asked = ["--schedule", "steps=8 interval=4 kept=0.5", "--project", "h20"]
    how = f"--repeats 3 --warmup 1 --max-noise 10 --engine {small_engine_set} --output {folder}"
    assert main([*sizes.split(), *asked, *how.split()]) == 0
    return folder


def test_every_part_is_measured_at_every_size(measured: Path, small_engine_set: Path) -> None:
    profile = load_profile(measured / "profile.json")
    assert profile.geometries == [(1, 144, 8, 144), (2, 144, 8, 144)]
    for geometry in profile.geometries:
        rows = [r for r in profile.rows if r.geometry == geometry]
        assert {r.part for r in rows} == set(PARTS)
        assert [r.num_kept for r in profile.backs(geometry)] == [59, 117, 144]
        assert all(len(r.samples_ms) == 3 for r in rows)
        assert all(len(r.warmup_ms) == 1 for r in rows)
        memory = [r.memory_bytes for r in profile.backs(geometry)]
        assert all(held is not None and held > 50 << 20 for held in memory)
    pulse = [r for r in profile.rows if r.part == PRODUCT]
    assert len(pulse) == 2  # torch and ONNX Runtime
    assert profile.peak.tflops is not None
    assert profile.peak.gb_s is not None
    assert profile.machine["threads"] >= 1
    assert {"before", "after"} <= set(profile.machine["clocks"])
    one, two = profile.geometries
    both = [profile.find("back", geometry, 59) for geometry in (one, two)]
    assert both[0] is not None
    assert both[1] is not None
    assert both[1].flops == 2 * both[0].flops
    manifest = json.loads((small_engine_set / "manifest.json").read_text())
    assert profile.engine["identity"] == manifest["identity"]


def test_a_step_takes_about_what_its_parts_do(measured: Path) -> None:
    """The same work by two routes; loose, as the machine may be busy."""
    profile = load_profile(measured / "profile.json")
    for geometry in profile.geometries:
        times, step = StepTimes(profile, geometry, "median"), profile.find("step", geometry)
        assert step is not None
        assert 0.2 < times.call("full", 144) / step.statistics.median < 5


def test_results_are_a_csv_and_a_page_that_fetches_nothing(measured: Path) -> None:
    with (measured / "profile.csv").open() as file:
        lines = list(csv.DictReader(file))
    profile = load_profile(measured / "profile.json")
    assert len(lines) == len(profile.rows)
    line = next(entry for entry in lines if entry["part"] == "back" and entry["kept"] == "59")
    back = profile.find("back", profile.geometries[0], 59)
    assert back is not None
    assert float(line["median_ms"]) == pytest.approx(back.statistics.median, rel=1e-5)
    assert float(line["warmup_ms"]) == pytest.approx(back.warmup_ms[0], rel=1e-5)
    assert line["tokens"] == str(144 + 8 + 59)
    page = (measured / "profile.html").read_text()
    table = re.search(r"<h2>All rows</h2>.*?<tbody>(.*?)</tbody>", page, re.DOTALL)
    assert table is not None
    cells = [
        [html.unescape(cell) for cell in re.findall(r"<td>(.*?)</td>", text)]
        for text in re.findall(r"<tr>(.*?)</tr>", table[1])
    ]
    assert [cell.replace("±", "+-") for entry in cells for cell in entry] == [
        cell for entry in table_rows(profile) for cell in entry
    ]
    columns = re.findall(r"<th>([^<]*)</th>", page[: table.start(1)].rpartition("<thead>")[2])
    assert [column.replace("±", "+-") for column in columns] == list(COLUMNS)
    assert page.count("<svg") == 6  # three plots a size
    assert "not checked: no second device was measured" in page
    outside = set(re.findall(r"(?:src|href)=[\"']([^\"'#][^\"']*)", page))
    assert not outside
    assert "@import" not in page
    assert "{{" not in page


def test_a_recorded_profile_answers_without_measuring(measured: Path, run: Command) -> None:
    code, content, _ = run(
        "--profile", measured / "profile.json", "--schedule", "steps=40 kept=0.5",
        "--compare", measured / "profile.json", "--project", measured / "profile.json",
    )  # fmt: skip
    assert code == 0
    assert [entry["geometry"][0] for entry in content["schedule"]] == [1, 2]
    assert all(math.isfinite(entry["speedup"][1]) for entry in content["schedule"])
    assert content["comparison"]["drift"] == pytest.approx(1)
    assert not any(entry["exceeds_noise"] for entry in content["comparison"]["rows"])
    assert content["projection"]["is_checked"] is True
    assert content["projection"]["worst_error"] == pytest.approx(0, abs=1e-9)


def test_what_is_said_fits_100_columns_unless_it_is_asked_to_be_wide(
    measured: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = str(measured / "profile.json")
    arguments = ["--profile", file, "--schedule", "steps=40 kept=0.5"]
    arguments += ["--compare", file, "--project", file]
    assert main([*arguments, "--max-noise", "10"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    assert {"anchor", "4 anchor,"} <= {line.strip()[:9].rstrip() for line in lines}
    assert main([*arguments, "--max-noise", "10", "--wide"]) == 0
    assert " ".join(COLUMNS) in " ".join(capsys.readouterr().out.split())


def test_profiles_of_other_engine_sets_machines_and_sizes_are_compared(
    tmp_path: Path, run: Command
) -> None:
    mine, theirs = made_up(0.05), made_up(0.05, 1.2)
    machine = {**theirs.machine, "name": "another", "versions": {"torch": "2.0"}}
    engine = {**theirs.engine, "identity": "other", "backend_version": "2"}
    kept = tuple(r for r in theirs.rows if r.num_kept != 16)
    theirs = replace(theirs, machine=machine, engine=engine, rows=kept)
    for name, profile in (("mine", mine), ("theirs", theirs)):
        (tmp_path / f"{name}.json").write_text(profile.to_json())
    arguments = ("--profile", tmp_path / "mine.json", "--compare", tmp_path / "theirs.json")
    code, content, _ = run(*arguments, "--output", tmp_path / "out")
    found = content["comparison"]
    assert code == 0
    assert found["drift"] is None  # of another machine no product tells
    assert all(entry["exceeds_noise"] for entry in found["rows"])
    assert [entry["kept"] for entry in found["only_here"]] == [16, 16]
    notes = " ".join(found["notes"])
    for text in ("name: a machine here, another there", "torch: none here, 2.0 there", "identity"):
        assert text in notes
    assert "faster" in (tmp_path / "out" / "profile.html").read_text()


def test_a_report_of_edit_image_gives_the_kept_share(
    measured: Path, small_engine_set: Path, tmp_path: Path, run: Command
) -> None:
    from ditrim.commands.edit_image import main as edit_image
    from ditrim.runtime.small_editor import samples_folder

    picture = sorted(samples_folder().glob("*.png"))[0]
    report = tmp_path / "report.json"
    arguments = ["--engine", small_engine_set, "--image", picture, "--prompt", "make it grey"]
    arguments += ["--output", tmp_path / "out.png", "--steps", 4, "--interval", 2]
    assert edit_image([*map(str, [*arguments, "--report", report, "--max-kept", 60])]) == 0
    recorded = load_report(report)
    assert [role for role, _, _ in recorded.calls] == ["anchor", "reduced", "anchor", "reduced"]
    code, content, _ = run(
        "--profile", measured / "profile.json", "--report", report, "--schedule", "steps=4"
    )
    assert code == 0
    assert content["schedule"][0]["schedule"]["kept"] == pytest.approx(recorded.kept)
    assert content["report"][0]["recorded_ms"] == pytest.approx(recorded.total_ms)
    code, content, _ = run("--profile", measured / "profile.json", "--report", report)
    assert code == 0
    told = content["schedule"][0]
    assert told["schedule"]["interval"] == 2
    assert told["roles"] == {"full": 0, "anchor": 2, "reduced": 2}
    assert {"break_even_kept", "best_interval", "speedup"} <= set(told)
    report.write_text("{}")
    code, content, _ = run("--profile", measured / "profile.json", "--report", report)
    assert code == 2
    assert "key 'run' is missing; give a file that edit-image --report wrote" in content["error"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--rung 100", "--rung 100 is not a rung of .* build a set that has it with: build-engine"),
        ("--batch 5", "a batch of 5 is more than .* build it for more with: .*--max-batch 5"),
        ("--noisy 400", "noisy tokens: 400 .*--max-noisy-tokens 400"),
        ("--text 65", "text tokens: 65 .*--max-text-tokens 65"),
        ("--reference 500", "reference tokens: 500 .*--max-reference-tokens 500"),
        ("--resolution 1024", "'1024' is no WxH"),
        ("--resolution 47x48", "multiples of 4 pixels"),
        ("--resolution 48x48 --noisy 144", "--noisy and --resolution both say"),
        ("--rung 468 --reference 144", "longer than the references that are measured"),
        ("--repeats 2", r"--repeats must lie in \[3, 10000\], got 2"),
        ("--tau 1.5", r"--tau must lie in \[0.0, 1.0\]"),
        ("--batch 0", "--batch must be at least 1"),
        ("--max-noise 0", "--max-noise must lie in"),
        ("--schedule steps=x", "steps must be a whole number"),
        ("--project h21", "unknown device 'h21'"),
        ("--precision bf16", "--precision goes with --project"),
        ("--profile x.json", "give either --engine FOLDER to measure, or --profile FILE"),
        ("--output /dev/null/x", "cannot be made"),
        ("--output pyproject.toml", "--output pyproject.toml cannot be made: File exists"),
        ("--resolution 0x0", "both sides must be multiples of 4 pixels"),
        ("--resolution 1024×1024", "'1024×1024' is no WxH"),
        ("--resolution 4096x4096", "noisy tokens: 1048576 .*--max-noisy-tokens 1048576"),
        (f"--noisy {10**18}", f"noisy tokens: {10**18} is more than"),
        (f"--reference {10**18}", f"reference tokens: {10**18} is more than"),
        ("--repeats 1", r"--repeats must lie in \[3, 10000\], got 1"),
        ("--warmup 0", r"--warmup must lie in \[1, 10000\], got 0"),
        ("--threads -1", r"--threads must lie in \[0, 1024\]"),
        ("--max-noise nan", "--max-noise must lie in"),
        ("--tau nan", "--tau must lie in"),
        ("--schedule steps=40", "which share of the reference tokens is kept"),
        ("--compare no.json", "--compare no.json cannot be read: No such file"),
        ("--report no.json", "--report no.json cannot be read: No such file"),
        ("--project h20 --precision fp8", "invalid choice: 'fp8'"),
        ("--device tpu", "tpu"),
    ],
)
def test_mistakes_are_refused_before_anything_is_measured(
    small_engine_set: Path, run: Command, arguments: str, message: str
) -> None:
    code, content, _ = run("--engine", small_engine_set, *arguments.split())
    assert code == 2
    assert re.search(message, content["error"])


@pytest.fixture
def made_up_file(tmp_path: Path) -> Path:
    file = tmp_path / "made-up.json"
    file.write_text(made_up().to_json())
    return file


def test_files_that_do_not_fit_are_refused_before_anything_is_measured(
    small_engine_set: Path, made_up_file: Path, run: Command
) -> None:
    """Of other sizes, of another model; no round was run, which would have said so."""
    for arguments, message in (
        (("--compare", made_up_file), "the other has batch 1, 64 noisy, 16 text and 64 reference"),
        (("--project", made_up_file), "measured with another model"),
        (("--report", _report(made_up_file, model="flux-kontext")), "--report is of flux-kontext"),
    ):
        code, content, said = run("--engine", small_engine_set, *arguments)
        assert code == 2
        assert message in content["error"]
        assert "measuring" not in said


def _report(
    beside: Path, *, model: str = "qwen-edit", roles: tuple[str, ...] = ("anchor",)
) -> Path:
    sizes = {"batch": 1, "num_noisy": 64, "num_text": 16, "num_reference": 64, "num_kept": 32}
    steps = [{"role": role, "branch": "cond", **sizes} for role in roles]
    content = {
        "engine": {"identity": "made up", "model": model},
        "run": {"total_ms": 100.0, "steps": steps},
    }
    file = beside.with_name(f"report-{model}.json")
    file.write_text(json.dumps(content))
    return file


def test_a_report_alone_tells_its_schedule(made_up_file: Path, run: Command) -> None:
    roles = ("full", "anchor", "reduced", "reduced", "anchor", "reduced")
    file = _report(made_up_file, roles=roles)
    expected = RunSchedule(steps=6, interval=3, warmup=1, kept=0.5)
    assert load_report(file).schedule == expected
    code, content, _ = run("--profile", made_up_file, "--report", file)
    estimate = estimate_schedule(made_up(), GEOMETRY, expected)
    assert code == 0
    assert content["schedule"][0]["run_ms"] == pytest.approx(estimate.run_ms)
    assert content["schedule"][0]["break_even_kept"] == pytest.approx(estimate.break_even_kept)


@pytest.mark.parametrize(
    "roles", [("full",) * 4, ("anchor", "reduced", "anchor", "anchor"), ("anchor", "reuse")]
)
def test_a_report_without_a_schedule_says_so(
    made_up_file: Path, run: Command, roles: tuple[str, ...]
) -> None:
    file = _report(made_up_file, roles=roles)
    assert load_report(file).schedule is None
    code, content, said = run("--profile", made_up_file, "--report", file)
    assert code == 0
    assert "schedule" not in content
    assert len(content["report"]) == 1
    assert "follow no schedule of anchors" in said


def test_nothing_is_written_where_a_file_cannot_be(made_up_file: Path, run: Command) -> None:
    folder = made_up_file.parent / "out"
    (folder / "profile.html").mkdir(parents=True)
    code, content, _ = run("--profile", made_up_file, "--output", folder)
    assert code == 2
    assert "profile.html is a folder" in content["error"]
    assert [path.name for path in folder.iterdir()] == ["profile.html"]


def test_an_existing_folder_gets_new_files(made_up_file: Path, run: Command) -> None:
    folder = made_up_file.parent / "out"
    folder.mkdir()
    (folder / "profile.csv").write_text("old")
    (folder / "notes.txt").write_text("mine")
    assert run("--profile", made_up_file, "--output", folder)[0] == 0
    assert sorted(path.name for path in folder.iterdir()) == [
        "notes.txt",
        "profile.csv",
        "profile.html",
        "profile.json",
    ]
    assert load_profile(folder / "profile.json") == made_up()


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")
def test_an_interrupted_run_leaves_nothing(small_engine_set: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    program = "from ditrim.commands.profile_latency import main; raise SystemExit(main())"
    command = [sys.executable, "-c", program, "--engine", small_engine_set]
    command += ["--repeats", "10000", "--output", folder]
    process = subprocess.Popen(
        [*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stderr is not None
        for line in process.stderr:
            if "measuring" in line:
                break
        process.send_signal(signal.SIGINT)
        out, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "interrupted; nothing is left half done" in error
    assert "Traceback" not in out + error
    assert list(folder.iterdir()) == []


def test_pictures_of_as_many_tokens_are_measured_once(
    small_engine_set: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from ditrim.commands.profile_latency import _parser, geometries_of
    from ditrim.engines.sets.engine_set import load_engine_set

    wanted = ["--engine", "x", "--resolution", "48x24", "--resolution", "24x48", "--text", "4"]
    args = _parser().parse_args(wanted)
    found = geometries_of(args, load_engine_set(small_engine_set))
    assert [geometry.key for geometry in found] == [(1, 72, 4, 72)]


def test_a_resolution_is_counted_in_the_models_tokens(small_engine_set: Path, run: Command) -> None:
    code, content, _ = run(
        "--engine", small_engine_set, "--resolution", "48x24", "--rung", "59", "--text", "4",
        "--repeats", "3", "--warmup", "1", "--max-noise", "10",
    )  # fmt: skip
    assert code == 0
    assert content["settings"]["resolutions"] == {"72": "48x24"}
    back = [entry for entry in content["rows"] if entry["part"] == "back"]
    # 12 x 6 tokens of 4 x 4 pixels, and a reference as large.
    assert [(e["noisy"], e["reference"], e["kept"]) for e in back] == [(72, 72, 59), (72, 72, 72)]


def test_flux_is_measured_too(tiny_engine_sets: Callable[[str], Path], run: Command) -> None:
    folder = tiny_engine_sets("flux-kontext")
    code, content, _ = run(
        "--engine", folder, "--noisy", "16", "--reference", "20", "--text", "4", "--batch", "2",
        "--repeats", "3", "--warmup", "1", "--max-noise", "10", "--schedule", "steps=4 kept=0.5",
    )  # fmt: skip
    assert code == 0
    assert {entry["part"] for entry in content["rows"]} == set(PARTS)
    assert content["schedule"][0]["roles"] == {"full": 0, "anchor": 2, "reduced": 2}


def test_a_noisy_machine_says_so_and_shows_no_digits(tmp_path: Path, run: Command) -> None:
    assert noise_complaint(made_up(0.1)) is None
    complaint = noise_complaint(made_up(0.9))
    assert complaint is not None
    assert "too noisy to say anything" in complaint
    assert "the load was 3.5 on 2 cores" in complaint
    file = tmp_path / "noisy.json"
    file.write_text(made_up(0.9).to_json())
    code, content, said = run("--profile", file, "--output", tmp_path / "out")
    assert code == 1
    assert "too noisy to say anything" in content["error"]
    assert "TFLOP/s" not in said
    assert list((tmp_path / "out").iterdir()) == []
    assert run("--profile", file, "--max-noise", 2)[0] == 0


def test_one_noisy_row_shows_no_digits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    profile = made_up(0.05)
    rows = [r for r in profile.rows if r.part != "scheduler"]
    rows.append(row("scheduler", 64, *(0.001 * 777 ** (step / 10) for step in range(11))))
    file = tmp_path / "profile.json"
    file.write_text(replace(profile, rows=tuple(rows)).to_json())
    assert main(["--profile", str(file)]) == 0
    said = capsys.readouterr().out
    line = next(line for line in said.splitlines() if line.startswith("scheduler"))
    assert "noisy" in line
    assert re.search(r"1 of \d+ rows are known no better than \+-10 %", said)
