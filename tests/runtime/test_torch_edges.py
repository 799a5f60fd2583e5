"""The torch backend where something is in its way: refusals leave nothing behind."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from lora_files import layers_of, random_lora, write_lora
from tiny import QWEN_CONFIG, make_call, tiny_transformer
from tiny_pipelines import request, small_pictures, tiny_pipeline

import ditrim
from ditrim.plugins.errors import UsageError

SPLIT: dict[str, Any] = {"front_depth": 1, "layers": (2, 3)}


def run(pipe: Any, arguments: dict[str, Any]) -> torch.Tensor:
    with small_pictures(64), torch.no_grad():
        return pipe(**copy.deepcopy(arguments)).images  # type: ignore[no-any-return]


def attach(pipe: Any, policy: Any = None) -> Any:
    return ditrim.attach(pipe, ditrim.torch_engines(pipe, **SPLIT), policy)


def processors_of(pipe: Any) -> list[Any]:
    return [block.attn.processor for block in pipe.transformer.transformer_blocks]


def denoise(transformer: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    session = ditrim.EditSession(ditrim.torch_engines(transformer, **SPLIT))
    return session.denoise(
        noisy=torch.randn(1, 20, 16, generator=generator),
        noisy_grid=(4, 5),
        references=[torch.randn(1, 20, 16, generator=generator)],
        reference_grids=[(5, 4)],
        text_embeds=make_call("qwen-edit").kwargs["encoder_hidden_states"],
        sigmas=[1.0, 0.5],
    )


def replace_forward(transformer: Any) -> None:
    plain = transformer.forward
    transformer.forward = lambda *args, **kwargs: plain(*args, **kwargs)


class Foreign:
    """A processor of another library."""

    def __call__(self, *args: Any, **kwargs: Any) -> None: ...


def test_a_refused_attachment_leaves_pipeline_and_processors_as_they_were() -> None:
    pipe = tiny_pipeline("qwen-edit")
    pipe.transformer.transformer_blocks[2].attn.processor = Foreign()
    before = type(pipe), sorted(vars(pipe)), processors_of(pipe)
    with pytest.raises(UsageError, match="block 2 has the attention processor Foreign"):
        attach(pipe)
    assert before == (type(pipe), sorted(vars(pipe)), processors_of(pipe))


def test_a_processor_without_positions_is_refused() -> None:
    from diffusers.models.attention_processor import AttnProcessor2_0

    pipe = tiny_pipeline("flux-kontext")
    pipe.transformer.set_attn_processor(AttnProcessor2_0())
    with pytest.raises(UsageError, match="put the default ones back"):
        attach(pipe)


OFFLOADS: dict[str, Callable[[Any], None]] = {
    "model": lambda pipe: pipe.enable_model_cpu_offload(device="cpu"),
    "group": lambda pipe: pipe.transformer.enable_group_offload(
        torch.device("cpu"), offload_type="leaf_level"
    ),
}


@pytest.mark.parametrize("order", ["replaced first", "offloaded first"])
@pytest.mark.parametrize("kind", OFFLOADS)
def test_a_replaced_forward_is_refused_though_offloading_wraps_it(kind: str, order: str) -> None:
    pipe = tiny_pipeline("qwen-edit")
    if order == "replaced first":
        replace_forward(pipe.transformer)
    OFFLOADS[kind](pipe)
    if order != "replaced first":
        replace_forward(pipe.transformer)
    with pytest.raises(UsageError, match="forward of the transformer was replaced"):
        attach(pipe)


def test_a_hook_that_was_removed_is_no_replaced_forward() -> None:
    pipe = tiny_pipeline("qwen-edit")
    pipe.enable_model_cpu_offload(device="cpu")
    pipe.remove_all_hooks()
    assert "forward" in vars(pipe.transformer)  # accelerate puts the own one there
    with attach(pipe):
        run(pipe, request("qwen-edit"))


@pytest.mark.parametrize("key", ["use_layer3d_rope", "use_additional_t_cond"])
def test_a_transformer_of_layers_is_refused(key: str) -> None:
    transformer = QwenImageTransformer2DModel(**(QWEN_CONFIG | {key: True}))
    with pytest.raises(UsageError, match=f"cannot run reduced: key '{key}' is true"):
        ditrim.torch_engines(transformer)


def test_a_session_and_an_open_request_look_at_the_transformer_too() -> None:
    from diffusers.hooks import FirstBlockCacheConfig

    transformer = tiny_transformer("qwen-edit")
    assert len(list(denoise(transformer))) == 2
    replace_forward(transformer)
    with pytest.raises(UsageError, match="forward of the transformer was replaced"):
        denoise(transformer)
    pipe = tiny_pipeline("qwen-edit")
    with attach(pipe) as attachment:
        pipe.transformer.enable_cache(FirstBlockCacheConfig())
        with pytest.raises(UsageError, match="disable_cache"):
            attachment.request()


def test_a_lora_is_loaded_and_switched_inside_a_call(tmp_path: Path) -> None:
    lora = random_lora(layers_of(tiny_transformer("qwen-edit")), seed=0)
    file = write_lora(tmp_path / "style.safetensors", lora, "diffusers")

    def change(pipe: Any, step: int, t: Any, values: dict[str, Any]) -> dict[str, Any]:
        if step == 0:
            pipe.load_lora_weights(str(tmp_path), weight_name=file.name, adapter_name="style")
        if step == 1:
            pipe.set_adapters(["style"], [0.4])
            assert len(pipe.transformer.transformer_blocks) == 4
        return values

    pipe = tiny_pipeline("qwen-edit")
    plain = run(pipe, request("qwen-edit"))
    arguments = request("qwen-edit") | {"callback_on_step_end": change}
    expected = run(pipe, arguments)
    pipe.unload_lora_weights()
    with attach(pipe, ditrim.FullContext()):
        found = run(pipe, arguments)
    largest = float(expected.abs().max())
    assert float((found - expected).abs().max()) < 1e-5 * largest
    assert float((found - plain).abs().max()) > 1e-2 * largest


@pytest.mark.parametrize("family", ["qwen-edit", "flux-kontext"])
def test_a_forward_that_a_library_gave_a_class_of_blocks_acts(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, arguments = tiny_pipeline(family), request(family)
    plain = run(pipe, arguments)
    own = pipe.transformer
    kind: Any = type([*own.transformer_blocks, *getattr(own, "single_transformer_blocks", [])][-1])
    forward = kind.forward

    def shifted(self: Any, *args: Any, **kwargs: Any) -> Any:
        text, hidden = forward(self, *args, **kwargs)
        return text, hidden + hidden.roll(1, dims=-1)

    monkeypatch.setattr(kind, "forward", shifted)
    expected = run(pipe, arguments)
    with attach(pipe, ditrim.FullContext()):
        found = run(pipe, arguments)
    largest = float(expected.abs().max())
    assert float((found - expected).abs().max()) < 1e-5 * largest
    assert float((found - plain).abs().max()) > 1e-2 * largest
