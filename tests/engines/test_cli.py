from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest

from ditrim.commands.build_engine import _size, main

Capture = pytest.CaptureFixture[str]


def test_build_prints_what_was_built(
    fake_graphs: ModuleType, tmp_path: Path, capsys: Capture
) -> None:
    arguments = [*fake_graphs.ARGUMENTS, "--output", str(tmp_path / "set")]
    assert main(arguments) == 0
    printed = capsys.readouterr()
    assert f"s: {tmp_path / 'set'}" in printed.out
    assert "60 layers, front depth 10, scored layers 35, 37, 42 (ToPi App. C.3)" in printed.out
    assert "(3, 6, 9, 12, 15, 18, 21, 24), kept counts in steps of 1, noisy 16, text" in printed.out
    assert "Trace front" in printed.err
    assert main([*arguments, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["ok"] is True
    assert answer["is_reused"] is True
    assert answer["ladder"] == [3, 6, 9, 12, 15, 18, 21, 24]
    assert main(arguments) == 0
    assert capsys.readouterr().out.startswith("unchanged, reused in")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--model qwen-edt", "unknown model 'qwen-edt'. Did you mean 'qwen-edit'?"),
        ("--layers 1,x", "--layers: 'x' is not valid; give whole numbers with commas"),
        ("--ladder 512;1024", "--ladder: '512;1024' is not valid"),
        ("--resolution 1024", "--resolution: '1024' is not valid; give WIDTHxHEIGHT, as 1024x768"),
        ("--resolution 1024xtall", "--resolution: 'tall' is not valid; give WIDTHxHEIGHT"),
        ("--config num_layers", "--config: 'num_layers' is not valid; give KEY=VALUE"),
        ("--config a=[1", "--config a: '[1' is not JSON; give a number"),
        ("--config a=1 --config a=2", "--config: a is given twice"),
        ("--rungs many", "--rungs: invalid int value: 'many'"),
        ("--bogus", "unrecognized arguments: --bogus"),
        ("--precision bf16", "use --precision fp32, or fp16 for the CUDA provider"),
        (
            "--backend tensorrt-rtx --workspace lots",
            "--workspace: 'lots' is not valid; give a size",
        ),
        ("--backend tensorrt-rtx --workspace 8parsecs", "give a size, as 8GiB or 500MB"),
        ("--device h100", "--device names the GPU of an estimate and needs --dry-run"),
        ("--weights no/such/folder", "checkpoint no/such/folder does not exist"),
    ],
)
def test_mistakes_are_2_with_a_message_and_no_traceback(
    capsys: Capture, arguments: str, message: str
) -> None:
    assert main([*arguments.split(), "--json"]) == 2
    printed = capsys.readouterr()
    assert message in json.loads(printed.out)["error"]
    assert "Traceback" not in printed.err


def test_fp16_says_what_it_needs(fake_graphs: ModuleType, tmp_path: Path, capsys: Capture) -> None:
    output = ["--output", str(tmp_path / "set")]
    assert main([*fake_graphs.ARGUMENTS, *output, "--precision", "fp16"]) == 0
    assert "note: fp16 graphs need ONNX Runtime's CUDA provider" in capsys.readouterr().err


def test_help_has_examples(capsys: Capture) -> None:
    with pytest.raises(SystemExit) as raised:
        main(["--help"])
    assert raised.value.code == 0
    assert "build-engine --preset small" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [("8GiB", 8 << 30), ("500MB", 500_000_000), ("1.5 gib", 3 << 29), ("4194304", 1 << 22)],
)
def test_sizes_have_units(text: str, num_bytes: int) -> None:
    assert _size(text) == num_bytes


def test_long_or_impossible_output_names_are_mistakes_without_internal_paths(
    fake_graphs: ModuleType, tmp_path: Path, capsys: Capture
) -> None:
    long_name = tmp_path / ("x" * 240)
    for output, message in (
        (long_name, "has 240 bytes; names of up to"),
        (tmp_path / ("ü" * 200) / "set", "has 400 bytes; names of up to"),
        (tmp_path / "/".join(["deep" * 40] * 30), "is too long for this system; give a shorter"),
        (Path("/proc/set"), "is in a part of the system that holds no files; give a folder on"),
        (Path("/sys/kernel/set"), "is in a part of the system that holds no files"),
    ):
        assert main([*fake_graphs.ARGUMENTS, "--output", str(output), "--json"]) == 2, output
        printed = capsys.readouterr()
        assert message in json.loads(printed.out)["error"]
        assert "building-" not in printed.out
        assert "Traceback" not in printed.err
    assert list(tmp_path.iterdir()) == []
    longest = tmp_path / ("x" * 200)
    assert main([*fake_graphs.ARGUMENTS, "--output", str(longest)]) == 0
    assert (longest / "manifest.json").is_file()


def test_dry_run_builds_nothing_and_fetches_nothing(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ditrim.engines.estimate.estimate")
    monkeypatch.chdir(tmp_path)
    arguments = ["--backend", "tensorrt", "--dry-run", "--device", "h100"]
    assert main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["estimate"]
    assert main(arguments) == 0
    assert capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
