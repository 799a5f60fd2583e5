"""Training on photographs: its start, and that an interrupted run is the uninterrupted one."""

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from ditrim.runtime.photo_editor.scenes import held_out_photographs

SCRIPTS = Path(__file__).parents[3] / "scripts" / "photo_editor"


@pytest.fixture(scope="module")
def vae_script():
    sys.path.insert(0, str(SCRIPTS))
    return importlib.import_module("train_photo_vae")


@pytest.fixture(scope="module")
def editor_script(vae_script):
    return importlib.import_module("train_photo_editor")


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """The shipped photographs as an archive, each in both splits."""
    path = tmp_path_factory.mktemp("photographs") / "photographs.npz"
    pictures = enumerate(held_out_photographs())
    np.savez(path, **{f"{s}/{i}": p for i, p in pictures for s in ("train", "held-out")})
    return path


def weights_of(model):
    return {name: weight.clone() for name, weight in model.state_dict().items()}


def test_the_autoencoder_starts_as_the_best_linear_code(vae_script):
    pictures = list(held_out_photographs())
    torch.manual_seed(0)
    vae = vae_script.AutoencoderDC(**vae_script.CONFIG)
    mean, basis, spread = vae_script.principal_components(pictures, 0, count=1600)
    vae_script.start_linear(vae, mean, basis, spread)
    crops = vae_script.held_out_crops(pictures, 1)
    pixels = vae_script.as_tensor(crops)
    squares = torch.nn.functional.pixel_unshuffle(pixels, 8).permute(0, 2, 3, 1)
    code = (squares - mean) @ basis.T
    with torch.no_grad():
        latents = vae.encode(pixels).latent.permute(0, 2, 3, 1)
    expected = code * spread**-vae_script.WHITENING
    # The padding of the first convolution does not matter: it is read at no offset.
    assert torch.allclose(latents, expected, atol=1e-3)
    decoded = torch.nn.functional.pixel_shuffle((code @ basis + mean).permute(0, 3, 1, 2), 8)
    linear_db = 10 * torch.log10(4 / (decoded - pixels).square().mean((1, 2, 3)))
    found_db = vae_script.reconstruction_db(vae, crops)
    # The decoder's norm is linear but for 0.3 %.
    assert np.abs(found_db - linear_db.numpy()).max() < 1.5


def test_an_interrupted_autoencoder_is_the_uninterrupted_one(vae_script, photographs, tmp_path):
    def run(folder, *more):
        (tmp_path / folder).mkdir(exist_ok=True)
        given = ["--photographs", str(photographs), "--output", str(tmp_path / folder)]
        given += ["--steps", "3", "--batch-size", "1", *more]
        return weights_of(vae_script.train(vae_script.parse_arguments(given)))

    whole = run("whole")
    part = run("parts", "--stop-after", "1")
    parts = run("parts", "--resume")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert not all(torch.equal(part[name], parts[name]) for name in whole)


@pytest.mark.slow  # encodes and trains
def test_an_interrupted_editor_is_the_uninterrupted_one(
    vae_script, editor_script, photographs, tmp_path
):
    torch.manual_seed(0)
    vae_script.AutoencoderDC(**vae_script.CONFIG).save_pretrained(tmp_path / "vae")

    def run(folder, *more):
        (tmp_path / folder).mkdir(exist_ok=True)
        given = ["--photographs", str(photographs), "--output", str(tmp_path / folder)]
        given += ["--vae", str(tmp_path / "vae"), "--steps", "3", "--small-steps", "2"]
        given += ["--batch-size", "3", *more]
        return weights_of(editor_script.train(editor_script.parse_arguments(given)))

    whole = run("whole")
    part = run("parts", "--stop-after", "2")
    parts = run("parts", "--resume")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert not all(torch.equal(part[name], parts[name]) for name in whole)


def test_two_heads_start_by_looking_at_the_same_place_of_the_reference(editor_script):
    """The largest weight of a noisy token's row is the reference token at its place."""
    torch.manual_seed(0)
    trainee = editor_script.Trainee()
    model, side = trainee.transformer, 8
    shapes = [(1, side, side), (1, side, side)]
    latents = torch.randn(1, 2 * side * side, 128)
    image, _ = model.pos_embed([shapes], max_txt_seq_len=4, device=torch.device("cpu"))
    states, attention = model.img_in(latents), model.transformer_blocks[0].attn
    states = model.transformer_blocks[0].img_norm1(states)

    def heads(layer, norm):
        made = norm(layer(states).unflatten(-1, (3, 64)))[0]  # (L, 3, 64)
        pairs = torch.view_as_complex(made.unflatten(-1, (32, 2)).contiguous())
        return torch.view_as_real(pairs * image[:, None]).flatten(-2).transpose(0, 1)

    query = heads(attention.to_q, attention.norm_q)
    key = heads(attention.to_k, attention.norm_k)
    scores = query[:, : side * side] @ key.transpose(1, 2)
    hits = (scores.argmax(-1) == torch.arange(side * side) + side * side).float().mean(-1)
    assert hits[:2].min() > 0.8
    assert hits[2] < 0.2
