from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest

from ditrim.commands.build_engine import _parser, options_from
from ditrim.engines.build.options import BuildOptions
from ditrim.engines.sets.specs import Limits
from ditrim.plugins.errors import UsageError

RTX: dict[str, Any] = {"backend": "tensorrt-rtx"}


def test_defaults_serve_every_shape_of_one_reference() -> None:
    options = BuildOptions()
    assert options.limits == Limits(batch=4, noisy=4272, text=2459)
    assert options.reference_ladder.rungs == tuple(range(534, 4273, 534))
    assert options.target == Path("engines-out/qwen-edit")


@pytest.mark.parametrize(
    ("given", "noisy", "longest", "text"),
    [
        ({"model": "qwen-edit-plus"}, 4272, 12816, 1716),
        ({"model": "flux-kontext"}, 4100, 4150, 512),
        ({"resolution": (512, 256)}, 512, 4272, 2459),
        ({"resolution": ((512, 256), (768, 768))}, 2304, 4272, 2459),
        ({"reference_resolution": (512, 256)}, 4272, 512, 2459),
        ({"reference_resolution": ((512, 256), (768, 768))}, 4272, 2304, 2459),
        ({"resolution": (512, 256), "reference_resolution": (512, 512)}, 512, 1024, 2459),
        ({"model": "qwen-edit-2511", "num_references": 2}, 4272, 8544, 1487),
        ({"max_reference_tokens": 100}, 4272, 100, 2459),
        ({"ladder": (8, 64)}, 4272, 64, 2459),
        ({"preset": "small"}, 144, 468, 64),
        ({"preset": "small", "max_reference_tokens": 288}, 144, 288, 64),
    ],
)
def test_geometry_follows_from_model_and_options(
    given: dict[str, Any], noisy: int, longest: int, text: int
) -> None:
    options = BuildOptions(**given)
    assert (options.limits.noisy, options.limits.text) == (noisy, text)
    assert options.reference_ladder.longest == longest


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ({"preset": "small"}, "small"),
        ({"weights": "random"}, "qwen-edit-random"),
        ({"preset": "small", "score_details": True}, "small-details"),
        ({"model": "flux-kontext", "precision": "fp16"}, "flux-kontext-fp16"),
        ({"backend": "tensorrt"}, "qwen-edit-tensorrt"),
        ({"backend": "tensorrt-rtx", "precision": "fp16"}, "qwen-edit-tensorrt-rtx-fp16"),
        ({"backend": "tensorrt", "graph_only": True}, "qwen-edit-tensorrt-graphs"),
    ],
)
def test_default_target_names_what_is_built(given: dict[str, Any], name: str) -> None:
    assert BuildOptions(**given).target == Path("engines-out") / name


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"model": "qwen"}, r"unknown model 'qwen'\. .*Known models: qwen-edit"),
        ({"preset": "big"}, r"--preset is 'big'; allowed: small"),
        ({"backend": "abacus"}, r"--backend is 'abacus'; allowed: onnxruntime, tensorrt, tensorr"),
        (
            {"backend": "tensorrt", "precision": "fp32"},
            r"--precision fp32 is not available with --backend tensorrt: the scoring kernel takes",
        ),
        ({"separate_anchor": True}, r"--separate-anchor is for backends that build plans \(tensor"),
        ({"workspace": 1 << 30}, r"--workspace is for backends that build plans .* onnxruntime"),
        ({"opt_batch": 2}, r"--opt-batch is for backends that build plans"),
        (RTX | {"workspace": 8}, r"--workspace is 8 bytes; give 1048576 or more, with a unit as"),
        (RTX | {"optimization_level": 6}, r"--optimization-level is 6; it must be at most 5"),
        (
            RTX | {"timing_cache": "x"},
            r"--timing-cache is for --backend tensorrt only: TensorRT",
        ),
        (
            {"backend": "tensorrt", "compute_capability": ("8.9",)},
            r"--compute-capability is for --backend tensorrt-rtx only: a plan of tensorrt is for",
        ),
        (RTX | {"compute_capability": ()}, r"--compute-capability is empty; give one or more"),
        (RTX | {"compute_capability": ("sm89",)}, r"--compute-capability 'sm89' is not valid; giv"),
        (RTX | {"compute_capability": ("8.9", "8.9")}, r"--compute-capability 8\.9,8\.9 repeats"),
        (
            RTX | {"compute_capability": ("7.5",)},
            r"--compute-capability 7\.5 has no bf16; use --",
        ),
        (RTX | {"graph_only": True, "separate_anchor": True}, r"--separate-anchor says how plans"),
        (RTX | {"graph_only": True, "weights_stripped": True}, r"--weights-stripped says how plan"),
        (
            RTX | {"min_batch": 5},
            r"--min-batch 5, --opt-batch 5 and --max-batch 4 contradict each other: they must not",
        ),
        (
            RTX | {"min_text_tokens": 64, "opt_text_tokens": 32},
            r"--min-text-tokens 64, --opt-text-tokens 32 and --max-text-tokens 2459 contradict",
        ),
        (RTX | {"opt_noisy_tokens": 5000}, r"--opt-noisy-tokens 5000 and --max-noisy-tokens 4272"),
        (RTX | {"min_noisy_tokens": 0}, r"--min-noisy-tokens is 0; it must be a whole number, 1"),
        ({"precision": "bf16"}, r"CPU provider has no bf16 matrix product; use --precision fp32"),
        ({"precision": "int8"}, r"--precision is 'int8'; allowed: fp32, fp16, bf16"),
        ({"verify": "luck"}, r"--verify is 'luck'; allowed: sizes, hashes"),
        ({"max_batch": 0}, r"--max-batch is 0; it must be a whole number, 1 or more"),
        ({"front_depth": -1}, r"--front-depth is -1; it must be a whole number, 0 or more"),
        ({"layers": ()}, r"--layers is empty; name at least one"),
        ({"output": " "}, r"--output is empty"),
        ({"preset": "small", "model": "flux-kontext"}, r"cannot be combined with --model flux"),
        ({"preset": "small", "weights": "random"}, r"--weights cannot be combined with --preset"),
        ({"preset": "small", "resolution": (48, 48)}, r"use --max-reference-tokens and --max-no"),
        ({"num_layers": 3}, r"--num-layers needs --weights random: real weights have their own"),
        ({"config": {"a": 1}}, r"--config needs --weights random"),
        ({"seed": 1, "weights": "folder"}, r"--seed needs --weights random"),
        ({"revision": "x", "weights": "random"}, r"--revision needs weights from the hub"),
        (
            {"weights": "random", "num_layers": 3, "config": {"num_layers": 2}},
            r"--num-layers and --config num_layers=\.\.\. both set the depth; leave one out",
        ),
        (
            {"model": "flux-kontext", "weights": "random", "num_layers": 1},
            r"--num-layers is 1; it must be a whole number, 2 or more",
        ),
        ({"resolution": (1000, 512)}, r"the width 1000 is not a multiple of 16 .* nearest is 992"),
        ({"resolution": (0, 512)}, r"--resolution: the width is 0"),
        ({"resolution": ((512, 512), (512, 500))}, r"512x500: the height 500 is not a multiple of"),
        ({"resolution": ()}, r"--resolution is empty; give WIDTHxHEIGHT"),
        ({"reference_resolution": ()}, r"--reference-resolution is empty; give WIDTHxHEIGHT"),
        ({"reference_resolution": (8, 16)}, r"--reference-resolution 8x16: the width 8 is not a m"),
        ({"num_references": 2}, r"--num-references is 2; qwen-edit takes at most 1"),
        ({"ladder": (8, 16), "rungs": 2}, r"--ladder and --rungs both set the ladder"),
        ({"ladder": (8, 16), "max_reference_tokens": 32}, r"--ladder ends at 16, but --max-ref"),
        ({"ladder": (16, 8)}, r"--ladder: ladder rungs 16, 8 must increase"),
        ({"ladder": ()}, r"--ladder is empty"),
        ({"granularity": 9999}, r"--granularity is 9999; it must be at most 4272"),
    ],
)
def test_impossible_values_name_option_value_and_remedy(
    given: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        BuildOptions(**given)


@pytest.mark.parametrize(
    "options",
    [
        BuildOptions(),
        BuildOptions(preset="small", output="a b"),
        BuildOptions(model="flux-kontext", precision="fp16", layers=(13, 18), front_depth=4),
        BuildOptions(
            weights="random",
            seed=3,
            config={"axes_dims_rope": [4, 6, 6], "guidance_embeds": False},
            ladder=(8, 16),
            granularity=4,
            max_batch=1,
        ),
        BuildOptions(resolution=(512, 768), rungs=3, revision="abc"),
        BuildOptions(reference_resolution=((512, 768), (1024, 1024))),
        BuildOptions(preset="small", score_details=True),
        BuildOptions(
            backend="tensorrt-rtx",
            precision="fp32",
            allow_unfused=True,
            separate_anchor=True,
            weights_stripped=True,
            workspace=8 << 30,
            optimization_level=5,
            compute_capability=("8.9", "12.0"),
            resolution=((512, 768), (1024, 1024)),
            min_batch=1,
            opt_batch=2,
            min_noisy_tokens=64,
            opt_text_tokens=128,
        ),
        BuildOptions(backend="tensorrt", timing_cache="a b.cache", graph_only=True),
    ],
)
def test_command_line_gives_the_same_options_back(options: BuildOptions) -> None:
    arguments = shlex.split(options.command())
    assert arguments[0] == "build-engine"
    again = options_from(_parser().parse_args(arguments[1:]))
    assert again.shaping() == options.shaping()
    assert again.target == options.target
    assert (again.weights, again.seed, again.config) == (
        options.weights,
        options.seed,
        options.config,
    )
    assert again.command() == options.command()


def test_sizes_of_zero_in_the_configuration_are_named() -> None:
    with pytest.raises(UsageError, match="--config num_attention_heads is 0; it must be a whole"):
        BuildOptions(weights="random", config={"num_attention_heads": 0})


def test_every_resolution_and_number_of_references_has_its_rung() -> None:
    options = BuildOptions(
        model="qwen-edit-plus", reference_resolution=((512, 512), (768, 512)), rungs=2
    )
    small, large = 32 * 32, 48 * 32
    whole = {number * tokens for number in (1, 2, 3) for tokens in (small, large)}
    assert set(options.reference_ladder.rungs) == whole | {3 * large // 2, 3 * large}
    coarse = BuildOptions(reference_resolution=((512, 512), (720, 512)), rungs=1, granularity=100)
    assert coarse.reference_ladder.rungs == (1100, 1440)


@pytest.mark.parametrize(
    ("backend", "precision"),
    [("onnxruntime", "fp32"), ("tensorrt", "bf16"), ("tensorrt-rtx", "bf16")],
)
def test_default_precision_is_the_backends(backend: str, precision: str) -> None:
    options = BuildOptions(backend=backend)
    assert options.precision == precision
    assert "--precision" not in options.command()


def test_ranges_tune_plans_for_one_usual_edit() -> None:
    ranges = BuildOptions(backend="tensorrt", max_batch=8).ranges
    sizes = [
        (axis.least, axis.best, axis.most) for axis in (ranges.batch, ranges.noisy, ranges.text)
    ]
    assert sizes == [(1, 1, 8), (1, 4096, 4272), (1, 1408, 2459)]
    given = BuildOptions(backend="tensorrt", max_noisy_tokens=5000, max_text_tokens=300).ranges
    assert (given.noisy.best, given.text.best) == (5000, 300)
    narrow = BuildOptions(backend="tensorrt", min_batch=2, max_batch=2, opt_text_tokens=77).ranges
    assert (narrow.batch.best, narrow.text.best) == (2, 77)


def test_profiles_are_those_of_every_plan() -> None:
    one = BuildOptions(backend="tensorrt", rungs=4).profiles()
    assert {role: len(profiles) for role, profiles in one.items()} == {"front": 4, "back": 4}
    two = BuildOptions(backend="tensorrt", rungs=4, separate_anchor=True).profiles()
    assert list(two) == ["front", "back", "anchor"]
    assert two["back"][0].rows is None


def test_profiles_are_tuned_for_square_references_where_shapes_vary() -> None:
    plus = BuildOptions(backend="tensorrt", model="qwen-edit-plus").profiles()["front"]
    best = [profile.reference.best for profile in plus]
    assert {4096, 8192, 12288} <= set(best)
    assert all(profile.reference.holds(n) for profile, n in zip(plus, best, strict=True))
    assert [profile.reference.most for profile in plus][-1] == 12816
    given = BuildOptions(backend="tensorrt", reference_resolution=(1024, 1024)).profiles()["front"]
    assert all(profile.reference.best == profile.reference.most for profile in given)


@pytest.mark.parametrize(
    "change",
    [
        {"separate_anchor": True},
        {"allow_unfused": True},
        {"workspace": 8 << 30},
        {"optimization_level": 4},
        {"weights_stripped": True},
        {"opt_batch": 2},
        {"min_text_tokens": 8},
        {"graph_only": True},
    ],
)
def test_what_shapes_a_plan_shapes_its_identity(change: dict[str, Any]) -> None:
    plain = BuildOptions(backend="tensorrt-rtx")
    assert BuildOptions(backend="tensorrt-rtx", **change).shaping() != plain.shaping()


def test_timing_cache_shapes_nothing() -> None:
    plain = BuildOptions(backend="tensorrt")
    assert BuildOptions(backend="tensorrt", timing_cache="x").shaping() == plain.shaping()
