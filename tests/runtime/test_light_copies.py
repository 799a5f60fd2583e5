"""Light copies of an attached pipeline share weights and nothing that a call writes to."""

from __future__ import annotations

import copy
import threading
from typing import Any

import torch
from tiny_pipelines import tiny_pipeline

import ditrim.runtime as ditrim


def is_exact_side_by_side(first: Any, second: Any) -> bool:
    """Whether two pipelines decode side by side what each decodes alone.

    The first is held between emptying its cache and entering its decoder, and the second inside its
    decoder, which is the order in which one VAE in two threads mixes their pictures.
    """
    begun, entered, ended = threading.Event(), threading.Event(), threading.Event()
    latents, others = torch.randn(2, 1, 4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    made: dict[str, torch.Tensor] = {}

    def decode(name: str, vae: Any, given: torch.Tensor) -> None:
        with torch.no_grad():
            made[name] = vae.decode(given).sample

    def hold_first(*_: Any) -> None:
        if threading.current_thread() is threads[0]:
            begun.set()
            assert entered.wait(60)

    def hold_second(*_: Any) -> None:
        if threading.current_thread() is threads[1]:
            entered.set()
            assert ended.wait(60)

    vae = first.vae
    hooks = [
        vae.post_quant_conv.register_forward_hook(hold_first),
        vae.decoder.conv_in.register_forward_hook(hold_second),
    ]
    threads = [
        threading.Thread(target=decode, args=("first", first.vae, latents)),
        threading.Thread(target=decode, args=("second", second.vae, others)),
    ]
    threads[0].start()
    assert begun.wait(60)
    threads[1].start()
    threads[0].join(60)
    ended.set()
    threads[1].join(60)
    for hook in hooks:
        hook.remove()
    decode("first alone", vae, latents)
    decode("second alone", vae, others)
    return all(torch.equal(made[name], made[f"{name} alone"]) for name in ("first", "second"))


def test_the_vae_of_qwen_image_mixes_pictures_of_two_threads() -> None:
    pipe = tiny_pipeline("qwen-edit")
    assert not is_exact_side_by_side(pipe, pipe)


def test_light_copies_decode_their_own_pictures() -> None:
    pipe = tiny_pipeline("qwen-edit")
    with ditrim.attach(pipe):
        light = copy.copy(pipe)
        assert is_exact_side_by_side(pipe, light)
        assert light.vae is not pipe.vae
        for mine, theirs in zip(light.vae.parameters(), pipe.vae.parameters(), strict=True):
            assert mine is theirs


def test_a_light_copy_of_an_offloaded_pipeline_keeps_the_vae_that_its_hooks_know() -> None:
    pipe = tiny_pipeline("qwen-edit")
    with ditrim.attach(pipe):
        pipe.enable_model_cpu_offload(device="cpu")
        assert copy.copy(pipe).vae is pipe.vae
