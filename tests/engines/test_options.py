from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest

from ditrim.engines.cli import _parser, options_from
from ditrim.engines.manifest import Limits
from ditrim.engines.options import BuildOptions
from ditrim.plugins.errors import UsageError


def test_defaults_are_one_reference_of_1024_squared() -> None:
    options = BuildOptions()
    assert options.limits == Limits(batch=4, noisy=4096, text=1024)
    assert options.reference_ladder.rungs == tuple(range(512, 4097, 512))
    assert options.target == Path("engines-out/qwen-edit")


@pytest.mark.parametrize(
    ("given", "noisy", "longest", "text"),
    [
        ({"model": "qwen-edit-plus"}, 4096, 8192, 1024),
        ({"model": "flux-kontext"}, 4096, 4096, 512),
        ({"resolution": (512, 256)}, 512, 512, 1024),
        ({"model": "qwen-edit-2511", "num_references": 3}, 4096, 12288, 1024),
        ({"max_reference_tokens": 100}, 4096, 100, 1024),
        ({"ladder": (8, 64)}, 4096, 64, 1024),
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
        ({"model": "flux-kontext", "precision": "fp16"}, "flux-kontext-fp16"),
    ],
)
def test_default_target_names_what_is_built(given: dict[str, Any], name: str) -> None:
    assert BuildOptions(**given).target == Path("engines-out") / name


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"model": "qwen"}, r"unknown model 'qwen'\. .*Known models: qwen-edit"),
        ({"preset": "big"}, r"--preset is 'big'; allowed: small"),
        ({"backend": "tensorrt"}, r"--backend tensorrt is not available in this version; use"),
        ({"backend": "tensorrt-rtx"}, r"--backend tensorrt-rtx is not available in this version"),
        ({"backend": "abacus"}, r"--backend is 'abacus'; allowed: onnxruntime"),
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
        ({"num_references": 2}, r"--num-references is 2; qwen-edit takes at most 1"),
        ({"ladder": (8, 16), "rungs": 2}, r"--ladder and --rungs both set the ladder"),
        ({"ladder": (8, 16), "max_reference_tokens": 32}, r"--ladder ends at 16, but --max-ref"),
        ({"ladder": (16, 8)}, r"--ladder: ladder rungs 16, 8 must increase"),
        ({"ladder": ()}, r"--ladder is empty"),
        ({"granularity": 9999}, r"--granularity is 9999; it must be at most 4096"),
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
