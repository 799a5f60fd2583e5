"""The `edit-image` command on the small editor's engine set, and on a Kontext pipeline."""

from __future__ import annotations

import json
import shutil
import signal
import string
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_pipelines import tiny_pipeline

from ditrim.commands.edit_image import main
from ditrim.engines.sets.engine_set import load_engine_set
from ditrim.plugins.errors import DitrimError, UsageError
from ditrim.runtime.editing.pipelines import EditRequest, load_pipeline, prepare_request
from ditrim.runtime.metrics import psnr_db

PROGRAM = "import sys; from ditrim.commands.edit_image import main; sys.exit(main())"
Run = Callable[..., tuple[int, dict[str, Any], str]]


def drawn_source(size: int = 48) -> Image.Image:
    from ditrim.runtime.small_editor import held_out_edits

    edits = [edit for edit in held_out_edits(22) if edit.references[0].shape[0] == size]
    return Image.fromarray(edits[0].references[0])


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "in.png"
    drawn_source().save(path)
    return path


@pytest.fixture
def edit(
    tmp_path: Path, source: Path, small_engine_set: Path, capfd: pytest.CaptureFixture[str]
) -> Run:
    """Run the command with `--json`; returns its exit code, its JSON and its stderr."""

    def run(*arguments: object, **replaced: object) -> tuple[int, dict[str, Any], str]:
        usual: dict[str, object] = {
            "engine": small_engine_set,
            "image": source,
            "prompt": "make the picture grey",
            "output": tmp_path / "out.png",
            "steps": 4,
            "interval": 2,
        }
        options = [
            text
            for key, value in (usual | replaced).items()
            if value is not None
            for text in ("--" + key.replace("_", "-"), str(value))
        ]
        code = main([*options, *map(str, arguments), "--json"])
        captured = capfd.readouterr()
        assert "Traceback" not in captured.err
        return code, json.loads(captured.out.splitlines()[-1]), captured.err

    return run


NO_ENGINE = {"engine": "no-engine-is-looked-for"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tau": 1.5}, "tau must be a number in [0, 1], got 1.5"),
        ({"tau": -0.1}, "tau must be a number in [0, 1], got -0.1"),
        ({"tau": "nan"}, "tau must be a number in [0, 1], got nan"),
        ({"tau": "much"}, "--tau: invalid float value: 'much'"),
        ({"interval": 0}, "interval must be an integer of at least 1, got 0"),
        ({"interval": 2.5}, "--interval: invalid int value: '2.5'"),
        ({"warmup": -1}, "warmup must be an integer of at least 0, got -1"),
        ({"score_every": 0}, "score_every must be an integer of at least 1, got 0"),
        ({"min_kept": 9, "max_kept": 8}, "max_kept (8) is less than min_kept (9)"),
        ({"policy": "best"}, "policy 'best' is unknown; allowed: full, topi, coverage, random"),
        ({"policy": "topi speed=9"}, "policy topi has no option 'speed'"),
        ({"policy": "coverage ratio=2"}, "ratio must be a number in [0, 1], got 2"),
        ({"policy": "tokendrop", "tau": 0.5}, "policy tokendrop has no option 'tau'"),
        ({"policy": " "}, "--policy is empty; name one, as --policy topi"),
        ({"verify": "all"}, "--verify: invalid choice: 'all'"),
        ({"steps": 0}, "--steps must lie in [1, 1000], got 0"),
        ({"seed": -1}, "--seed must lie in [0, 4294967295], got -1"),
        ({"threads": -1}, "--threads must lie in [0, 1024], got -1"),
        ({"guidance": "inf"}, "--guidance must lie in [0, 1000], got inf"),
        ({"true_cfg_scale": "nan"}, "--true-cfg-scale must lie in [0, 1000], got nan"),
        ({"prompt": ""}, "the prompt is empty: an edit needs an instruction"),
        ({"prompt": " \n"}, "the prompt is empty: an edit needs an instruction"),
        ({"prompt": "\udcff"}, "--prompt is not valid UTF-8"),
        ({"output": "no/out.png"}, "--output no/out.png: the folder no does not exist"),
        ({"output": "out.bmp"}, "--output out.bmp: the ending '.bmp' names no picture format"),
        ({"report": "no/r.json"}, "--report no/r.json: the folder no does not exist"),
        ({"mask_output": "m"}, "--mask-output m: the ending '' names no picture format"),
        ({"strip": "s.png"}, "--strip shows the full-context picture too: add --compare-full"),
        ({"policy": "full", "mask_output": "m.png"}, "--mask-output needs a policy that drops"),
        ({"image": "nowhere.png"}, "picture nowhere.png does not exist"),
        ({"colour": "red"}, "unrecognized arguments: --colour red"),
        ({"image": None}, "the following arguments are required: --image"),
    ],
)
def test_bad_option_is_named_before_anything_is_loaded(
    options: dict[str, object], message: str, edit: Run
) -> None:
    code, content, shown = edit(**(NO_ENGINE | options))
    assert code == content["exit_code"] == 2
    assert message in content["error"]
    assert content["ok"] is False
    assert "loading" not in shown


def test_results_may_not_replace_a_source_or_each_other(
    edit: Run, source: Path, tmp_path: Path
) -> None:
    before = source.read_bytes()
    code, content, _ = edit(**NO_ENGINE, output=source)
    assert (code, source.read_bytes()) == (2, before)
    assert f"--output {source} is the file of --image too" in content["error"]
    same = tmp_path / "out.png"
    code, content, _ = edit(**NO_ENGINE, output=same, mask_output=same)
    assert code == 2
    assert f"--mask-output {same} is the file of --output too" in content["error"]


def test_picture_that_cannot_be_used_is_named(edit: Run, tmp_path: Path) -> None:
    tiny = tmp_path / "dot.png"
    Image.new("RGB", (1, 1)).save(tiny)
    code, content, _ = edit(**NO_ENGINE, image=tiny)
    assert code == 2
    assert f"picture {tiny} is 1x1" in content["error"]


def test_missing_engine_set_says_how_to_build_one(edit: Run) -> None:
    code, content, _ = edit(engine="engines-out/none")
    assert code == 1
    assert "engine set engines-out/none does not exist" in content["error"]
    assert "build-engine --preset small --output engines-out/none" in content["error"]


def test_truncated_engine_set_is_refused_and_nothing_is_lost(
    edit: Run, small_engine_set: Path, tmp_path: Path
) -> None:
    (tmp_path / "out.png").write_bytes(b"old")
    copy = tmp_path / "engine"
    shutil.copytree(small_engine_set, copy)
    weights = max(copy.iterdir(), key=lambda path: path.stat().st_size)
    with open(weights, "r+b") as file:
        file.truncate(weights.stat().st_size // 2)
    code, content, _ = edit(engine=copy)
    assert code == 1
    assert f"the file {weights.name} has" in content["error"]
    assert "it is truncated or was changed. Build it again with: build-engine" in content["error"]
    assert (tmp_path / "out.png").read_bytes() == b"old"


def test_edited_engine_set_is_found_by_its_hashes(
    edit: Run, small_engine_set: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "engine"
    shutil.copytree(small_engine_set, copy)
    weights = max(copy.iterdir(), key=lambda path: path.stat().st_size)
    with open(weights, "r+b") as file:
        file.seek(-8, 2)
        file.write(b"\1\2\3\4\5\6\7\0")
    code, content, _ = edit(engine=copy, verify="hashes")
    assert code == 1
    assert f"the file {weights.name} was changed: its SHA-256 is not" in content["error"]


def test_one_edit_leaves_picture_mask_report_and_json(edit: Run, tmp_path: Path) -> None:
    code, content, _ = edit(mask_output=tmp_path / "mask.png", report=tmp_path / "report.json")
    assert code == 0
    assert content["ok"] is True
    assert content["output"] == str(tmp_path / "out.png")
    assert content["policy"] | {"tau": 0.85, "interval": 2, "name": "topi"} == content["policy"]
    assert 0 < content["kept_ratio"] < 1
    assert content["reference_tokens"] == 144
    with Image.open(tmp_path / "out.png") as picture:
        assert (picture.mode, picture.size) == ("RGB", (48, 48))
        texts: dict[str, str] = picture.text  # type: ignore[attr-defined]
    assert texts["prompt"] == "make the picture grey"
    assert texts["seed"] == "0"
    assert json.loads(texts["policy"])["name"] == "topi"
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["engine"]["identity"] in texts["engine"]
    assert [step["role"] for step in report["run"]["steps"]] == ["anchor", "reduced"] * 2
    assert report["prompt"] == "make the picture grey"
    assert {"python", "torch", "diffusers", "ditrim"} <= set(report["versions"])
    assert Image.open(tmp_path / "mask.png").size == (192, 192)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "in.png",
        "mask.png",
        "out.png",
        "report.json",
    ]


def test_full_context_gives_the_picture_of_the_pipeline_itself(edit: Run, tmp_path: Path) -> None:
    from ditrim.runtime.small_editor import load_small_pipeline

    assert edit(policy="full", interval=None, seed=3)[0] == 0
    pipe = load_small_pipeline()
    pipe.set_progress_bar_config(disable=True)
    expected = pipe(
        image=drawn_source(),
        prompt="make the picture grey",
        num_inference_steps=4,
        generator=torch.Generator().manual_seed(3),
    ).images[0]
    found = np.asarray(Image.open(tmp_path / "out.png"))
    assert psnr_db(found, np.asarray(expected)) > 50


def test_same_seed_same_picture_and_another_seed_another(edit: Run, tmp_path: Path) -> None:
    pictures = []
    for seed in (1, 1, 2):
        assert edit(seed=seed, policy="random")[0] == 0
        pictures.append((tmp_path / "out.png").read_bytes())
    assert pictures[0] == pictures[1] != pictures[2]


def test_comparison_with_everything_kept_finds_no_difference(edit: Run) -> None:
    code, content, _ = edit("--compare-full", tau=1)
    assert code == 0
    assert content["kept_ratio"] == 1
    assert content["comparison"]["psnr_db"] == 100
    assert content["comparison"]["speedup"] > 0


def test_comparison_leaves_a_strip_in_the_references_own_geometry(
    edit: Run, tmp_path: Path, source: Path
) -> None:
    drawn_source(72).save(source)
    strip, second = tmp_path / "strip.png", tmp_path / "second.png"
    drawn_source().save(second)
    code, content, _ = edit("--compare-full", "--image", second, tau=0.5, strip=strip)
    assert code == 0
    assert content["reference_tokens"] == 324 + 144
    assert content["comparison"]["psnr_db"] < 100
    # Four panels 288 high; two of them hold 288 of the large reference and 192 of the other.
    assert Image.open(strip).width == 2 * 20 + 3 * 16 + 2 * (288 + 16 + 192) + 2 * 288


def test_true_guidance_without_a_negative_prompt_runs_a_second_branch(
    edit: Run, tmp_path: Path
) -> None:
    code, _, _ = edit(true_cfg_scale=2, report=tmp_path / "report.json")
    assert code == 0
    steps = json.loads((tmp_path / "report.json").read_text())["run"]["steps"]
    assert [step["branch"] for step in steps] == ["cond", "uncond"] * 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"negative_prompt": "blur"}, "--negative-prompt has no effect at a true-cfg-scale of 1"),
        ({"guidance": 3.5}, "--guidance 3.5: this model has no guidance embeddings"),
        ({"size": "50x48"}, "--size 50x48: 50 is not a multiple of 4; the nearest size is 48x48"),
        ({"size": "large"}, "--size 'large' is neither WxH in pixels, as 1024x768, nor auto"),
        ({"device": "tpu"}, "device 'tpu' is not one of auto, cpu, cuda, cuda:N"),
        ({"pipeline": "nowhere/at/all"}, "is neither a folder that exists nor a hub id"),
        (
            {"size": "96x96"},
            "--size 96x96 makes 576 tokens, and the engine set was built for 144; choose a smaller",
        ),
    ],
)
def test_what_model_and_engine_set_cannot_do_is_named(
    options: dict[str, object], message: str, edit: Run, tmp_path: Path
) -> None:
    code, content, _ = edit(**options)
    assert code == 2
    assert message in content["error"]
    assert not (tmp_path / "out.png").exists()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "is neither lightning, nor a scheduler_config.json"),
        ("{", "is no scheduler's configuration"),
        ('{"_class_name": "DDPM"}', "diffusers has no scheduler 'DDPM'"),
        (
            '{"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": "abc"}',
            "does not take this configuration",
        ),
        ('{"_class_name": "DPMSolverSDEScheduler"}', "does not take this configuration"),
    ],
)
def test_schedulers_that_are_none_are_named(
    config: str | None, message: str, edit: Run, tmp_path: Path
) -> None:
    if config is not None:
        (tmp_path / "scheduler_config.json").write_text(config)
    code, content, _ = edit(scheduler=str(tmp_path))
    assert code == 2
    assert message in content["error"]


def test_policy_options_that_have_no_effect_are_noted(edit: Run) -> None:
    code, _, shown = edit(policy="full", tau=0.5)
    assert code == 0
    assert "--policy full runs every token in every step; --tau, --interval has no effect" in shown


@pytest.mark.parametrize(
    ("policy", "roles"),
    [
        ("coverage ratio=0.4", ["anchor", "reduced"] * 2),
        ("auto min_influence=0.5 look=1", ["anchor", "reduced", "anchor", "reduced"]),
        ("tokendrop full_steps=1 dense_if_non_local=false", ["full"] + ["reduced"] * 3),
        ("ibtm ratio=0.5 prune_steps=1", ["anchor", "reduced"] * 2),
        ("tomesd ratio=0.5 interval=none", ["reduced"] * 4),
        ("full", ["full"] * 4),
    ],
)
def test_every_policy_edits_and_reports(
    policy: str, roles: list[str], edit: Run, tmp_path: Path
) -> None:
    takes_interval = not policy.startswith(("full", "tokendrop", "tomesd"))
    report = tmp_path / "report.json"
    code, content, _ = edit(policy=policy, interval=2 if takes_interval else None, report=report)
    assert code == 0, content
    run = json.loads(report.read_text())["run"]
    assert [step["role"] for step in run["steps"]] == roles
    assert content["policy"]["name"] == policy.split()[0]
    if policy.startswith("auto"):
        assert run["policy_notes"]["chosen"] == "coverage"
        assert "kept influence 0.5" in run["policy_notes"]["why"]


def test_a_policys_text_gives_the_same_picture_again(edit: Run, tmp_path: Path) -> None:
    code, content, _ = edit(policy="coverage ratio=0.4 exponent=1", seed=5)
    assert code == 0
    first = (tmp_path / "out.png").read_bytes()
    code, again, _ = edit(policy=content["policy"]["text"], interval=None, seed=5)
    assert code == 0
    assert again["policy"] == content["policy"]
    assert (tmp_path / "out.png").read_bytes() == first


def test_a_cache_spares_back_and_is_reported(edit: Run) -> None:
    code, content, _ = edit("--compare-full", policy="full", interval=None, cache=9.0)
    assert code == 0
    assert content["cache"] == {
        "threshold": 9.0,
        "max_reuses": None,
        "tokens": "noisy",
        "reused_calls": 3,
    }
    assert content["comparison"]["psnr_db"] < 100
    code, content, _ = edit(cache="much")
    assert code == 2
    assert "a step cache is a threshold, as 0.08, or a file of calibrate-cache" in content["error"]


def test_tokens_of_a_region_are_kept(edit: Run, tmp_path: Path) -> None:
    region, report = tmp_path / "region.png", tmp_path / "mask.png"
    mask = Image.new("L", (48, 48))
    mask.paste(255, (4, 8, 20, 16))  # 4 x 2 tokens of 4 pixels
    mask.save(region)
    plain = edit(tau=0.01)[1]["kept_ratio"] * 144
    code, content, _ = edit(tau=0.01, keep_region=region, mask_output=report)
    assert code == 0
    assert content["keep_region"] == str(region)
    assert 7.9 < content["kept_ratio"] * 144 < 8.1 + plain
    shown = np.asarray(Image.open(report).convert("RGB")).astype(int)  # 16 pixels a token
    kept, dropped = shown[38:58, 22:74].sum(), shown[38:58, 118:170].sum()
    seen = np.asarray(drawn_source()).astype(int)
    assert kept / seen[10:14, 6:18].sum() > 2 * dropped / seen[10:14, 30:42].sum()


@pytest.mark.parametrize(
    ("size", "light", "policy", "message"),
    [
        ((48, 48), 0, "topi", "the region is empty: nothing in its mask is lighter than half"),
        ((48, 20), 255, "topi", "the region is 48 x 20 pixels and the picture 48 x 48: both need"),
        ((48, 48), 255, "toma", "ToMA takes no region; use a policy that keeps"),
    ],
)
def test_regions_that_cannot_be_kept_are_refused(
    size: tuple[int, int], light: int, policy: str, message: str, edit: Run, tmp_path: Path
) -> None:
    region = tmp_path / "region.png"
    Image.new("L", size, light).save(region)
    code, content, _ = edit(policy=policy, keep_region=region)
    assert code == 2
    assert message in content["error"]


def test_prompt_of_ten_thousand_words_is_cut_with_a_note(edit: Run, tmp_path: Path) -> None:
    prompt = "make the picture grey " * 2500
    code, _, shown = edit("--compare-full", prompt=prompt, steps=2)
    assert code == 0
    assert " ".join(shown.split()).count("10000 words") == 1
    with Image.open(tmp_path / "out.png") as picture:
        assert picture.text["prompt"] == prompt  # type: ignore[attr-defined]


def test_noise_that_is_not_finite_is_refused(
    edit: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from ditrim.runtime.small_editor.pipeline import SmallEditPipeline

    monkeypatch.setattr(
        SmallEditPipeline,
        "prepare_latents",
        lambda self, *_: torch.full((1, 144, 48), float("nan")),
    )
    (tmp_path / "out.png").write_bytes(b"old")
    code, content, _ = edit()
    assert code == 2
    assert "noisy_latents hold NaN or infinite values" in content["error"]
    assert (tmp_path / "out.png").read_bytes() == b"old"


def test_latents_that_become_infinite_stop_the_edit(
    edit: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    monkeypatch.setattr(
        FlowMatchEulerDiscreteScheduler,
        "step",
        lambda self, velocity, t, sample, **_: (sample / 0.0,),
    )
    code, content, _ = edit()
    assert code == 1
    assert "the latents hold NaN or infinite values after step 1" in content["error"]
    assert not (tmp_path / "out.png").exists()


def test_second_picture_for_a_pipeline_that_takes_one_is_refused(tiny_engine_sets: Any) -> None:
    request = EditRequest(images=(drawn_source(), drawn_source()), prompt="x")
    for family, is_taken in (("qwen-edit", False), ("qwen-edit-plus", True)):
        pipe, engine_set = tiny_pipeline(family), load_engine_set(tiny_engine_sets(family))
        if is_taken:
            assert prepare_request(pipe, engine_set, request).size is not None
            continue
        with pytest.raises(UsageError, match=r"2 pictures were given with --image.*takes one"):
            prepare_request(pipe, engine_set, request)


def test_random_weights_need_to_be_told_a_pipeline() -> None:
    manifest = SimpleNamespace(source={"kind": "random", "location": "random"})
    engine_set: Any = SimpleNamespace(manifest=manifest, folder="set")
    with pytest.raises(UsageError, match=r"set has random weights.*name them with --pipeline"):
        load_pipeline(engine_set)


def test_pipeline_folder_of_another_class_or_damaged_is_refused(tmp_path: Path) -> None:
    manifest = SimpleNamespace(
        source={"kind": "folder", "location": str(tmp_path)},
        pipeline_class="FluxKontextPipeline",
        architecture="flux",
    )
    engine_set: Any = SimpleNamespace(manifest=manifest, folder="set")
    with pytest.raises(UsageError, match=r"has no model_index\.json"):
        load_pipeline(engine_set)
    index = tmp_path / "model_index.json"
    index.write_text('{"_class_name": "QwenImageEditPipeline"}')
    with pytest.raises(UsageError, match="is a QwenImageEditPipeline, the engine set needs a Flux"):
        load_pipeline(engine_set)
    index.write_text("{")
    with pytest.raises(UsageError, match=r"model_index\.json is damaged"):
        load_pipeline(engine_set)
    index.write_text(
        '{"_class_name": "FluxKontextPipeline", "vae": ["diffusers", "AutoencoderKL"]}'
    )
    with pytest.raises(DitrimError, match=r"pipeline \S+ cannot be loaded"):
        load_pipeline(engine_set)


def test_hub_pipeline_that_cannot_be_had_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    manifest = SimpleNamespace(
        source={"kind": "hub", "location": "nobody/nothing-of-the-kind", "revision": "main"},
        pipeline_class="FluxKontextPipeline",
        architecture="flux",
    )
    engine_set: Any = SimpleNamespace(manifest=manifest, folder="set")
    with pytest.raises(DitrimError, match=r"nobody/nothing-of-the-kind is not in the local cache"):
        load_pipeline(engine_set)


def save_kontext_pipeline(folder: Path) -> None:
    """A whole Kontext pipeline with tiny random parts, text encoders and tokenizers included."""
    from tiny_pipelines import POOLED_WIDTH, TEXT_WIDTH
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        CLIPTextConfig,
        CLIPTextModel,
        CLIPTokenizer,
        T5Config,
        T5EncoderModel,
        T5TokenizerFast,
    )

    pipe = tiny_pipeline("flux-kontext")
    letters = list(string.ascii_lowercase)
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{x}</w>" for x in letters)]
    files = folder.parent / "clip"
    files.mkdir()
    (files / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (files / "merges.txt").write_text("#version: 0.2\n")
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -1.0)]
    unigram = Tokenizer(models.Unigram([*pieces, *((x, -2.0) for x in letters)], unk_id=2))
    unigram.pre_tokenizer = pre_tokenizers.Metaspace()
    sizes = {"vocab_size": 64, "d_model": TEXT_WIDTH, "d_kv": 8, "d_ff": 32, "num_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        clip = CLIPTextConfig(
            vocab_size=64,
            hidden_size=POOLED_WIDTH,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
        pipe.register_modules(
            text_encoder=CLIPTextModel(clip).eval(),
            tokenizer=CLIPTokenizer(
                str(files / "vocab.json"), str(files / "merges.txt"), model_max_length=77
            ),
            text_encoder_2=T5EncoderModel(T5Config(**sizes, num_layers=1)).eval(),
            tokenizer_2=T5TokenizerFast(
                tokenizer_object=unigram, extra_ids=0, model_max_length=512
            ),
        )
    pipe.save_pretrained(folder)


@pytest.mark.slow
def test_kontext_pipeline_is_found_beside_the_weights_and_agrees_with_torch(
    tmp_path: Path, source: Path, edit: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers import FluxKontextPipeline
    from diffusers.pipelines.flux import pipeline_flux_kontext as kontext

    from ditrim.engines.build.build import build_engine_set
    from ditrim.engines.build.options import BuildOptions

    monkeypatch.setattr(kontext, "PREFERRED_KONTEXT_RESOLUTIONS", [(96, 64), (64, 96)])
    folder, engine = tmp_path / "kontext", tmp_path / "engine"
    save_kontext_pipeline(folder)
    build_engine_set(
        BuildOptions(
            model="flux-kontext",
            weights=str(folder),
            front_depth=1,
            layers=(2, 3),
            max_reference_tokens=64,
            max_noisy_tokens=64,
            max_text_tokens=512,
            output=str(engine),
        )
    )
    picture = Image.fromarray(
        np.random.default_rng(0).integers(0, 256, (80, 120, 3), dtype=np.uint8)
    )
    picture.save(source)
    size = {"size": "64x64"}
    mask, report = tmp_path / "mask.png", tmp_path / "report.json"
    code, content, shown = edit(
        "--compare-full",
        engine=engine,
        tau=0.5,
        guidance=2.5,
        mask_output=mask,
        report=report,
        **size,
    )
    assert (code, content.get("error")) == (0, None), shown
    assert content["reference_tokens"] == 24
    assert Image.open(mask).size == (96, 64)  # four by six tokens
    assert json.loads(report.read_text())["guidance"] == 2.5

    code, content, _ = edit(engine=engine, policy="full", interval=None, guidance=2.5, **size)
    assert code == 0
    pipe = FluxKontextPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    expected = pipe(
        image=picture,
        prompt="make the picture grey",
        num_inference_steps=4,
        guidance_scale=2.5,
        generator=torch.Generator().manual_seed(0),
        max_area=64 * 64,
        width=64,
        height=64,
    ).images[0]
    found = np.asarray(Image.open(tmp_path / "out.png"))
    assert found.shape == np.asarray(expected).shape == (64, 64, 3)
    assert psnr_db(found, np.asarray(expected)) > 50

    code, content, _ = edit("--image", source, engine=engine)
    assert code == 2
    assert "FluxKontextPipeline takes one" in content["error"]
    shutil.move(folder, tmp_path / "moved")
    code, content, _ = edit(engine=engine)
    assert code == 2
    assert "is neither a folder that exists nor a hub id" in content["error"]
    code, content, _ = edit(engine=engine, pipeline=tmp_path / "moved", **size)
    assert code == 0


def test_help_shows_examples_and_loads_nothing_heavy() -> None:
    program = PROGRAM.replace("sys.exit(main())", "main(['--help'])")
    check = "import atexit, sys; atexit.register(lambda: print([m for m in ('torch', 'diffusers', "
    check += "'numpy', 'PIL', 'onnx') if m in sys.modules]));"
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", check + program], capture_output=True, text=True, check=True
    )
    assert time.perf_counter() - start < 5  # about 0.15 s; machines can be busy
    assert "edit-image --engine <set> --image in.png" in done.stdout
    assert done.stdout.rstrip().endswith("[]")


def test_person_reads_results_on_stdout_and_progress_on_stderr(
    small_engine_set: Path, source: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out.png")
    usual = ["--engine", str(small_engine_set), "--image", str(source), "--prompt", "zoom in"]
    assert main([*usual, "--output", out, "--steps", "2", "--interval", "2"]) == 0
    captured = capfd.readouterr()
    assert captured.out.startswith(f"{out}: 48x48, ")
    assert "144 reference tokens, " in captured.out
    assert "denoising, topi policy: 2 steps" in captured.err
    assert main([*usual, "--output", out, "--steps", "2", "--quiet"]) == 0
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")


@pytest.mark.slow
def test_interrupt_leaves_the_old_picture_and_exits_with_130(
    small_engine_set: Path, source: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.png"
    out.write_bytes(b"old")
    command = [sys.executable, "-c", PROGRAM, "--engine", str(small_engine_set)]
    command += ["--image", str(source), "--prompt", "zoom in", "--output", str(out)]
    process = subprocess.Popen(
        [*command, "--steps", "1000", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    for line in process.stderr:
        if "denoising" in line:
            break
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    shown, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert json.loads(shown.splitlines()[-1])["error"].startswith("interrupted; nothing ")
    assert "Traceback" not in errors
    assert out.read_bytes() == b"old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.png", "out.png"]
