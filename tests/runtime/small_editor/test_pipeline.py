import logging
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from ditrim.runtime.small_editor.modules import PixelVAE, build_transformer
from ditrim.runtime.small_editor.pipeline import SmallEditPipeline, fit_reference, picture_of


def picture(size=48, seed=0):
    width, height = (size, size) if isinstance(size, int) else size
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


class Recorder:
    """Stands in for a transformer with the least that the pipeline may use, and notes its calls."""

    def __init__(self, inner):
        self.inner, self.calls, self.context = inner, [], None
        self.config, self.dtype, self.device = inner.config, inner.dtype, inner.device

    @contextmanager
    def cache_context(self, name):
        self.context = name
        yield
        self.context = None

    def __call__(self, **call):
        self.calls.append(SimpleNamespace(context=self.context, **call))
        return self.inner(**call)


def test_two_references_batch_of_two_and_guidance(tiny_pipeline):
    result = tiny_pipeline(
        image=[picture(72), picture(48, seed=1)],
        prompt=["make the red circle blue", "zoom in"],
        negative_prompt="",
        true_cfg_scale=3.0,
        num_inference_steps=3,
        generator=seeded(),
    )
    assert [image.size for image in result.images] == [(48, 48)] * 2
    assert [image.mode for image in result.images] == ["RGB"] * 2


def test_transformer_is_called_as_diffusers_calls_it(tiny_pipeline):
    recorder = Recorder(tiny_pipeline.transformer)
    tiny_pipeline.transformer = recorder
    tiny_pipeline(
        image=[picture(72), picture(48)],
        prompt="zoom in",
        negative_prompt="",
        true_cfg_scale=2.0,
        num_inference_steps=2,
        generator=seeded(),
    )
    assert [call.context for call in recorder.calls] == ["cond", "uncond"] * 2
    first = recorder.calls[0]
    assert first.hidden_states.shape == (1, 144 + 324 + 144, 48)
    assert first.img_shapes == [[(1, 12, 12), (1, 18, 18), (1, 12, 12)]]
    assert first.encoder_hidden_states.shape == (1, 2, 128)
    assert first.encoder_hidden_states_mask is None
    assert first.guidance is None
    assert first.attention_kwargs == {}
    assert first.return_dict is False
    assert [float(call.timestep[0]) for call in recorder.calls] == [1.0, 1.0, 0.5, 0.5]
    assert set(vars(first)) == {
        "context",
        "hidden_states",
        "timestep",
        "guidance",
        "encoder_hidden_states_mask",
        "encoder_hidden_states",
        "img_shapes",
        "attention_kwargs",
        "return_dict",
    }


def test_prompts_of_one_batch_are_masked_where_one_is_shorter(tiny_pipeline):
    recorder = Recorder(tiny_pipeline.transformer)
    tiny_pipeline.transformer = recorder
    tiny_pipeline(image=picture(), prompt=["zoom in", "grey"], num_inference_steps=1)
    assert recorder.calls[0].encoder_hidden_states_mask.tolist() == [[1, 1], [1, 0]]
    assert recorder.calls[0].img_shapes == [[(1, 12, 12), (1, 12, 12)]] * 2


def test_item_of_a_batch_equals_the_item_alone(tiny_pipeline):
    edits = [("make the red circle blue", picture(seed=1)), ("zoom in", picture(seed=2))]
    together = tiny_pipeline(
        image=[[image] for _, image in edits],
        prompt=[prompt for prompt, _ in edits],
        generator=[seeded(1), seeded(2)],
        num_inference_steps=3,
        output_type="np",
    ).images
    for index, (prompt, image) in enumerate(edits):
        alone = tiny_pipeline(
            image=image,
            prompt=prompt,
            generator=seeded(index + 1),
            num_inference_steps=3,
            output_type="np",
        ).images
        assert np.abs(alone[0] - together[index]).max() < 1e-4


def test_pictures_per_prompt_lie_next_to_each_other(tiny_pipeline):
    call = {"image": picture(), "num_inference_steps": 2, "output_type": "pt"}
    generators = [seeded(n) for n in range(4)]
    many = tiny_pipeline(
        prompt=["zoom in", "grey"], num_images_per_prompt=2, generator=generators, **call
    ).images
    last = tiny_pipeline(prompt="grey", generator=seeded(3), **call).images
    assert many.shape == (4, 3, 48, 48)
    assert (many[3] - last[0]).abs().max() < 1e-4


def test_same_generator_gives_the_same_picture(tiny_pipeline):
    call = {"image": picture(), "prompt": "grey", "num_inference_steps": 2, "output_type": "np"}
    first, again, other = (
        tiny_pipeline(generator=seeded(seed), **call).images for seed in (5, 5, 6)
    )
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_guidance_needs_a_negative_prompt_and_a_scale(tiny_pipeline, caplog):
    recorder = Recorder(tiny_pipeline.transformer)
    tiny_pipeline.transformer = recorder
    call = {"image": picture(), "prompt": "grey", "num_inference_steps": 1}
    with caplog.at_level(logging.WARNING):
        tiny_pipeline(true_cfg_scale=4.0, **call)
        tiny_pipeline(negative_prompt="", **call)
    assert [call.context for call in recorder.calls] == ["cond", "cond"]
    assert "no negative_prompt" in caplog.text
    assert "not above 1" in caplog.text


def test_callback_sees_every_step_and_may_change_latents(tiny_pipeline):
    seen = []

    def callback(pipeline, step, timestep, tensors):
        seen.append((step, float(timestep), sorted(tensors)))
        return {"latents": torch.zeros_like(tensors["latents"])}

    latents = tiny_pipeline(
        image=picture(),
        prompt="grey",
        num_inference_steps=2,
        output_type="latent",
        callback_on_step_end=callback,
        callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"],
    ).images
    assert seen == [
        (0, 1000.0, ["latents", "prompt_embeds"]),
        (1, 500.0, ["latents", "prompt_embeds"]),
    ]
    assert latents.shape == (1, 144, 48)
    assert not latents.any()


def test_interrupt_skips_the_steps_that_are_left(tiny_pipeline):
    recorder = Recorder(tiny_pipeline.transformer)
    tiny_pipeline.transformer = recorder

    def callback(pipeline, step, timestep, tensors):
        pipeline._interrupt = step == 1
        return tensors

    call = {"image": picture(), "prompt": "grey", "num_inference_steps": 5}
    tiny_pipeline(callback_on_step_end=callback, **call)
    assert len(recorder.calls) == 2
    tiny_pipeline(**call)
    assert len(recorder.calls) == 2 + 5


def test_saved_folder_has_diffusers_layout_and_gives_the_same_picture(tiny_pipeline, tmp_path):
    tiny_pipeline.save_pretrained(tmp_path)
    files = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.*"))
    assert files == [
        "model_index.json",
        "scheduler/scheduler_config.json",
        "text_encoder/config.json",
        "text_encoder/diffusion_pytorch_model.safetensors",
        "tokenizer/vocab.json",
        "transformer/config.json",
        "transformer/diffusion_pytorch_model.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    ]
    loaded = SmallEditPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    call = {"image": picture(), "prompt": "grey", "num_inference_steps": 2, "output_type": "np"}
    first, again = (pipe(generator=seeded(), **call).images for pipe in (tiny_pipeline, loaded))
    assert np.array_equal(first, again)
    assert loaded.scheduler.config.shift == 1.0


def test_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no small editor.*train_small_editor"):
        SmallEditPipeline.from_pretrained(tmp_path)


def test_pixel_vae_is_exact():
    vae = PixelVAE()
    pictures = torch.rand(2, 3, 48, 72) * 2 - 1
    latents = vae.encode(pictures)
    assert latents.shape == (2, 12 * 18, 48)
    assert torch.equal(vae.decode(latents, 48, 72), pictures)
    corner = pictures[:, :, 4:8, 8:12].flatten(1)
    assert torch.equal(latents[:, 18 + 2], corner)  # second row, third column
    with pytest.raises(ValueError, match="50x48"):
        vae.encode(torch.zeros(1, 3, 48, 50))


@pytest.mark.parametrize(
    ("given", "fitted"),
    [
        ((48, 48), 48),
        ((20, 30), 48),
        ((71, 200), 48),
        ((72, 72), 72),
        ((4000, 90), 72),
        ((1, 1), 48),
    ],
)
def test_reference_sizes(given, fitted):
    assert fit_reference(picture(given)).size == (fitted, fitted)
    assert fit_reference(picture(given), is_first=False).size == (48, 48)
    assert picture_of(picture(given)).size == (48, 48)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "CMYK", "I;16", "1", "F"])
def test_every_mode_becomes_rgb(mode):
    image = Image.new(mode, (48, 48))
    assert fit_reference(image).mode == "RGB"


def test_transparent_parts_become_white():
    assert fit_reference(Image.new("RGBA", (48, 48), (9, 9, 9, 0))).getpixel((5, 5)) == (255,) * 3


def test_exact_sizes_are_not_resampled():
    image = picture(72)
    assert np.array_equal(np.asarray(fit_reference(image)), np.asarray(image))
    assert np.array_equal(np.asarray(picture_of(image)), np.asarray(image)[12:60, 12:60])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": None}, "`prompt` is a NoneType"),
        ({"prompt": []}, "`prompt` is a list"),
        ({"prompt": ["a", 3]}, "`prompt` is a list"),
        ({"negative_prompt": 3}, "`negative_prompt` is a int"),
        ({"negative_prompt": ["", ""], "true_cfg_scale": 2.0}, "has 2 entries and `prompt` 1"),
        ({"height": 50}, "50 and 48; both must be positive multiples of 4"),
        ({"output_type": "jpg"}, "'jpg'; allowed: 'pil'"),
        ({"num_inference_steps": 0}, "`num_inference_steps` is 0"),
        ({"image": []}, "`image` holds no picture"),
        ({"image": [[], []], "prompt": "a"}, "2 lists of references and there are 1 prompts"),
        ({"latents": torch.zeros(1, 5, 48)}, r"shape \(1, 5, 48\); needed: \(1, 144, 48\)"),
        ({"generator": [torch.Generator()] * 2}, "2 generators were given for 1 pictures"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, r"names \['noise'\]; allowed"),
    ],
)
def test_wrong_arguments_are_named(tiny_pipeline, changes, message):
    call = {"image": picture(), "prompt": "grey", "num_inference_steps": 1} | changes
    with pytest.raises(ValueError, match=message):
        tiny_pipeline(**call)


def test_array_in_place_of_a_picture_is_named(tiny_pipeline):
    with pytest.raises(TypeError, match=r"a reference is a ndarray; pass PIL\.Image"):
        tiny_pipeline(image=[np.zeros((48, 48, 3))], prompt="grey")


def test_references_of_different_sizes_in_one_batch_are_refused(tiny_pipeline):
    with pytest.raises(ValueError, match="references of different sizes"):
        tiny_pipeline(image=[[picture(48)], [picture(72)]], prompt=["grey", "grey"])


def test_unknown_configuration_key_is_refused():
    with pytest.raises(ValueError, match=r"unknown keys \['depth'\]; allowed"):
        build_transformer(depth=3)
