"""What a caller can get wrong: every mistake ends in one line that says what to do instead.

Limits of lengths are in `test_lengths.py`, other options in `test_options.py`, plans that do not
belong to a machine in `test_tensorrt_library.py`, failures of the builder in
`test_tensorrt_builder.py`, and what happens while plans run in `test_tensorrt_runtime.py`.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from ditrim.commands.build_engine import main
from ditrim.engines.backends.tensorrt.builder import ask_library
from ditrim.engines.backends.tensorrt.library import Gpu
from ditrim.engines.backends.tensorrt.request import Target
from ditrim.engines.build import build
from ditrim.engines.build import graphs as graph_files
from ditrim.engines.build.build import run_build
from ditrim.engines.build.options import BuildOptions
from ditrim.plugins.errors import BackendError, DitrimError

Capture = pytest.CaptureFixture[str]
T4 = Gpu(name="Tesla T4", capability=(7, 5), num_bytes=16 << 30, driver="570.1")
NINES = "9" * 400
needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx is not installed"
)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--ladder nan", "--ladder: 'nan' is not valid; give whole numbers with commas between"),
        ("--ladder 512,,1024", "--ladder: '' is not valid; give whole numbers"),
        ("--ladder 1e3", "--ladder: '1e3' is not valid"),
        ("--ladder=-5,6", "--ladder: ladder rung -5 must be a whole number above 0"),
        ("--ladder 512,512", "--ladder: ladder rungs 512, 512 must increase and not repeat"),
        ("--ladder 1024,512", "--ladder: ladder rungs 1024, 512 must increase and not repeat"),
        (
            f"--ladder 1,{NINES}",
            "the rung is a number of 1329 bits tokens; qwen-edit takes at most",
        ),
        ("--ladder 512,99999999999", "takes at most 262144, 1 reference of 8192x8192 pixels"),
        ("--max-reference-tokens 1000000", "--max-reference-tokens is 1000000 tokens; qwen-edit"),
        ("--max-noisy-tokens -1", "--max-noisy-tokens is -1; it must be a whole number, 1 or more"),
        ("--max-text-tokens 4080", "lower --resolution or --max-text-tokens"),
        ("--granularity 0", "--granularity is 0; it must be a whole number, 1 or more"),
        ("--granularity nan", "--granularity: invalid int value: 'nan'"),
        ("--granularity 8192", "--granularity is 8192; it must be at most 4272, the longest"),
        ("--resolution 1000x512", "is not a multiple of 16 pixels, the side of a token; the nea"),
        ("--resolution nanxnan", "--resolution: 'nan' is not valid; give WIDTHxHEIGHT"),
        ("--resolution 1024×1024", "--resolution: '1024×1024' is not valid; give WIDTHxHEIGHT"),
        (f"--resolution {NINES}x16", "the width is a number of 1329 bits; it must be at most"),
        ("--layers 35,35", "--layers 35,35 must increase and not repeat"),
        ("--layers -1", "--layers is -1; it must be a whole number, 0 or more"),
        ("--front-depth 60", "--front-depth is 60; allowed: 0 to 59, since the model has 60"),
        ("--front-depth 50", "layer 35, from the model's own (ToPi App. C.3), is not a layer of"),
        ("--seed 99999999999999999999 --weights random", "--seed is 99999999999999999999; it must"),
        ("--weights=", "--weights is empty; give a folder, a hub id or random"),
        ("--precision=", "--precision is empty; give a name, or leave it out"),
        ("--revision=", "--revision is empty; give a name, or leave it out"),
        ("--weights random --config num_layers=NaN", "--config num_layers is nan; it must be a w"),
        ("--weights random --config num_layers=null", "--config num_layers is 'null'; it must be"),
        ("--weights random --config num_layers=1001", "is 1001; it must be at most 1000"),
        (
            "--weights random --config attention_head_dim=null",
            "--config attention_head_dim is 'null'; it must be a whole number, 1 or more",
        ),
        (
            "--weights random --config attention_head_dim=99999999999999",
            "--config attention_head_dim is 99999999999999; it must be at most 4096",
        ),
        (f"--weights random --config x={'[' * 100_000}", "is not JSON; give a number, true, false"),
        (
            "--weights random --config axes_dims_rope=[16,0,56]",
            "is [16, 0, 56]; it must be a list of 3 even numbers above 0 that add up to attention",
        ),
        ("--weights random --config axes_dims_rope=[64,64]", "must be a list of 3 even numbers"),
        ("--weights random --config axes_dims_rope=[15,56,57]", "must be a list of 3 even numbe"),
        ("--weights random --config axes_dims_rope=16", "must be a list of 3 even numbers above 0"),
        (
            f"--backend tensorrt --workspace {NINES}GiB",
            "--workspace: 99999999999999999999... is more than any memory; give a size, as 8GiB",
        ),
        (
            "--backend tensorrt --workspace 99999999999GiB",
            "it must be at most 1125899906842624",
        ),
        ("--backend tensorrt --workspace -1", "--workspace: '-1' is not valid; give a size"),
        ("--backend tensorrt --min-batch 5", "contradict each other: they must not fall in this"),
        (
            f"--backend tensorrt --opt-noisy-tokens {NINES}",
            "--min-noisy-tokens 1, --opt-noisy-tokens a number of 1329 bits and --max-noisy-tokens",
        ),
        ("--backend tensorrt-rtx --compute-capability 8.9,,12.0", "'' is not valid; give it as 8"),
        ("--backend tensorrt-rtx --compute-capability 7.5", "has no bf16; use --precision fp16"),
        ("--backend tensorrt --device nan", "--device: unknown device 'nan'. Known: h20"),
    ],
)
def test_every_mistake_in_an_option_is_one_line_and_2(
    capsys: Capture, arguments: str, message: str
) -> None:
    device = "" if "--device" in arguments else "--device h100"
    assert main(f"{arguments} --dry-run --json {device}".split()) == 2
    printed = capsys.readouterr()
    error = json.loads(printed.out)["error"]
    assert message in error
    assert "\n" not in error
    assert "Traceback" not in printed.err


@pytest.mark.parametrize(
    "arguments",
    [
        "--backend tensorrt --min-noisy-tokens 4096",
        "--backend tensorrt --opt-noisy-tokens 4096",
    ],
)
def test_advice_of_an_estimate_never_contradicts_the_options(
    capsys: Capture, arguments: str
) -> None:
    assert main(f"{arguments} --dry-run --device rtx4090".split()) == 0
    printed = capsys.readouterr().out
    assert "it does not fit" in printed
    assert "--resolution 512x512" not in printed
    assert "move the text encoder off the device" in printed


def test_a_backend_that_is_not_installed_says_how_to_install_it(
    capsys: Capture, tmp_path: Path
) -> None:
    if importlib.util.find_spec("tensorrt") is not None:
        pytest.skip("tensorrt is installed")
    arguments = ["--preset", "small", "--backend", "tensorrt", "--output", str(tmp_path / "set")]
    assert main([*arguments, "--json"]) == 1
    error = json.loads(capsys.readouterr().out)["error"]
    assert "the backend 'tensorrt' is not installed; install it with: pip install" in error
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def shadow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Put a module of this text before the installed ones, for processes that are started."""
    folder = tmp_path / "shadow"
    folder.mkdir()
    monkeypatch.setenv("PYTHONPATH", str(folder))
    return lambda name, text: (folder / f"{name}.py").write_text(text) and None


@needs_rtx
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("raise ImportError('gone')", r"needs Polygraphy, which is not installed; .* 'polygraphy>"),
        ("__version__ = '0.49.9'", r"Polygraphy is of version 0\.49\.9; .* 0\.53\.6 or newer: pip"),
    ],
)
def test_missing_or_old_polygraphy_is_named(
    shadow: Callable[[str, str], None], text: str, message: str
) -> None:
    shadow("polygraphy", text)
    with pytest.raises(BackendError, match=message):
        ask_library(Target(backend="tensorrt-rtx", capabilities=None, gpu=None))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, r"Tesla T4 has compute capability 7\.5 and no bf16; use --precision fp16"),
        (
            {"precision": "fp16"},
            r"Tesla T4 has compute capability 7\.5, for which the scoring kernel of --backend "
            r"tensorrt does not exist; use --backend tensorrt-rtx or onnxruntime",
        ),
    ],
)
def test_gpu_that_is_too_old_is_named_before_anything_is_read(
    tmp_path: Path,
    fake_graphs: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    given: dict[str, Any],
    message: str,
) -> None:
    monkeypatch.setattr(build, "backend_version", lambda backend: "10.16.1.11")
    monkeypatch.setattr(build, "present_gpu", lambda: T4)
    options = BuildOptions(
        backend="tensorrt", output=str(tmp_path / "set"), **fake_graphs.OPTIONS, **given
    )
    with pytest.raises(BackendError, match=message):
        run_build(options)
    assert list(tmp_path.iterdir()) == []


def test_random_weights_that_do_not_fit_memory_say_how_much_and_what_to_do(
    tmp_path: Path, tiny_config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graph_files, "_available_memory", lambda: 1000)
    options = BuildOptions(weights="random", config=tiny_config, output=str(tmp_path / "set"))
    with pytest.raises(DitrimError) as raised:
        run_build(options)
    text = str(raised.value)
    assert "need about 507.8 kB of memory and 1.0 kB are available" in text, text
    assert "make a shallower trial with --num-layers, for example --num-layers 3" in text
    assert list(tmp_path.iterdir()) == []
