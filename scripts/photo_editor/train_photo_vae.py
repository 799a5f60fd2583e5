#!/usr/bin/env python3
"""Train the photograph editor's autoencoder: diffusers' `AutoencoderDC` at factor 8, 32 channels.

It starts as the best linear code of 8 x 8 squares (principal components, computed from the training
photographs; the residual blocks add nothing at first) and is trained from there. The loss is the
mean absolute and squared error of the reconstruction from latents with a little noise on them.
Everything random is a function of the seed and the step.

Example:
    python scripts/photo_editor/train_photo_vae.py --photographs photographs.npz --output vae-out
    python scripts/photo_editor/train_photo_vae.py ... --resume
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from diffusers import AutoencoderDC
from photographs import Picture, load_photographs
from PIL import Image, ImageDraw

sys.path.append(str(Path(__file__).resolve().parents[1] / "small_editor"))
from batches import as_tensor
from checkpoint import save_checkpoint, update_average

CONFIG: dict[str, Any] = {
    "in_channels": 3,
    "latent_channels": 32,
    "encoder_block_out_channels": (48, 48, 96, 192),
    "decoder_block_out_channels": (48, 48, 96, 192),
    "encoder_layers_per_block": (0, 1, 1, 2),
    "decoder_layers_per_block": (0, 2, 2, 3),
    "encoder_qkv_multiscales": ((), (), (), ()),
    "decoder_qkv_multiscales": ((), (), (), ()),
    "downsample_block_type": "Conv",
    "upsample_block_type": "pixel_shuffle",
}
CROP = 96
EMA_DECAY = 0.995
NOISE = 0.02  # on the latents, whose power is held near one
POWER_WEIGHT = 1e-4
WHITENING = 0.6  # exponent: 0 leaves the components' spreads as they are, 1 makes them equal
CARRIER = 4.0  # of idle channels before the decoder's last norm, which hold its divisor constant


def draw_crop(rng: np.random.Generator, pictures: list[Picture], size: int = CROP) -> Picture:
    """Cut a random square out of a random photograph at a random scale, with drawn things on it."""
    picture = pictures[rng.integers(len(pictures))]
    longest = min(picture.shape[:2])
    side = round(math.exp(rng.uniform(math.log(size), math.log(longest))))
    top = int(rng.integers(picture.shape[0] - side + 1))
    left = int(rng.integers(picture.shape[1] - side + 1))
    image = Image.fromarray(picture[top : top + side, left : left + side])
    image = image.resize((size, size), Image.Resampling.LANCZOS)
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if rng.random() < 0.4:
        image = _with_drawing(rng, image)
    array = np.asarray(image).astype(np.float32)
    if rng.random() < 0.5:  # another white balance and exposure
        array = array * rng.uniform(0.6, 1.25, 3) + rng.uniform(-20, 20)
    return np.clip(array, 0, 255).astype(np.uint8)


def _with_drawing(rng: np.random.Generator, image: Image.Image) -> Image.Image:
    size = image.width
    layer, mask = Image.new("RGB", (2 * size, 2 * size)), Image.new("L", (2 * size, 2 * size))
    for _ in range(rng.integers(1, 4)):
        colour = tuple(int(value) for value in rng.integers(0, 256, 3))
        x, y, wide, high = rng.uniform(-0.2, 0.9, 4) * 2 * size
        box = (x, y, x + abs(wide) + 8, y + abs(high) + 8)
        if rng.random() < 0.5:
            ImageDraw.Draw(layer).ellipse(box, fill=colour)
            ImageDraw.Draw(mask).ellipse(box, fill=255)
        else:
            corners = [tuple(corner) for corner in rng.uniform(0, 2 * size, (4, 2))]
            ImageDraw.Draw(layer).polygon(corners, fill=colour)
            ImageDraw.Draw(mask).polygon(corners, fill=255)
    layer, mask = (
        part.resize((size, size), Image.Resampling.LANCZOS)  # anti-aliased edges
        for part in (layer, mask)
    )
    return Image.composite(layer, image, mask)


def principal_components(
    pictures: list[Picture], seed: int, count: int = 4000
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean (192), components (32, 192) and their spreads (32) of 8 x 8 squares, channel first."""
    rng = np.random.default_rng([seed, 3])
    crops = as_tensor([draw_crop(rng, pictures, 64) for _ in range(count // 16)])
    squares = torch.nn.functional.pixel_unshuffle(crops, 8).permute(0, 2, 3, 1).reshape(-1, 192)
    mean = squares.double().mean(0)
    values, vectors = torch.linalg.eigh(torch.cov((squares.double() - mean).T))
    order = torch.argsort(values, descending=True)[: CONFIG["latent_channels"]]
    return mean.float(), vectors[:, order].T.float(), values[order].sqrt().float()


def _unshuffle(conv: torch.nn.Conv2d, channels: int, average: int) -> None:
    """Make a stride-2 convolution a pixel unshuffle of its first channels.

    `average` is the group size of the shortcut's mean beside it, which is taken off; 0: there is
    none. Output channel 4 c + 2 i + j holds pixel (2 y + i, 2 x + j) of channel c.
    """
    conv.bias.zero_()
    for out in range(conv.out_channels):
        for number in range(average):
            source, place = divmod(out * average + number, 4)
            conv.weight[out, source, 1 + place // 2, 1 + place % 2] -= 1 / average
    for out in range(4 * channels):
        source, place = divmod(out, 4)
        conv.weight[out, source, 1 + place // 2, 1 + place % 2] += 1.0


@torch.no_grad()
def _start_upsampling(decoder: torch.nn.Module) -> None:
    """Make the decoder's upsampling blocks pixel shuffles; idle channels carry a constant."""
    ups = [decoder.up_blocks[2][0].conv, decoder.up_blocks[1][0].conv]
    for conv, kept in zip(ups, (48, 12), strict=True):
        repeats = conv.out_channels // conv.in_channels
        conv.weight *= 0.1
        conv.bias.zero_()
        conv.weight[: 4 * kept] = 0
        for out in range(conv.out_channels):
            conv.weight[out, out // repeats, 1, 1] -= 1  # the shortcut
        for out in range(4 * kept):
            conv.weight[out, out, 1, 1] += 1
    ups[1].bias[4 * 12 :] = CARRIER


@torch.no_grad()
def start_linear(
    vae: AutoencoderDC, mean: torch.Tensor, basis: torch.Tensor, spread: torch.Tensor
) -> None:
    """Set the weights so that encoder and decoder are the linear code of 8 x 8 squares.

    What the code does not use keeps a tenth of its random start, so that it can be learnt.
    """
    encoder, decoder = vae.encoder, vae.decoder
    for module in vae.modules():
        if type(module).__name__ == "ResBlock":
            module.norm.weight.zero_()
    stages = [
        encoder.conv_in.conv,
        encoder.down_blocks[1][-1].conv,
        encoder.down_blocks[2][-1].conv,
    ]
    for conv, channels in zip(stages, (3, 12, 48), strict=True):
        used = 4 * channels
        conv.weight[:used] = 0
        conv.weight[used:] *= 0.1
        average = 0 if conv is stages[0] else conv.in_channels * 4 // conv.out_channels
        _unshuffle(conv, channels, average)
    # Three unshuffles order the channels of a square in their own way.
    probe = torch.arange(192.0).reshape(1, 192, 1, 1)
    planes = torch.nn.functional.pixel_shuffle(probe, 8)
    for _ in range(3):
        planes = torch.nn.functional.pixel_unshuffle(planes, 2)
    order = planes.flatten().long()
    gain = spread**-WHITENING
    analysis = gain[:, None] * basis
    size = CONFIG["latent_channels"]
    encoder.conv_out.weight.zero_()
    encoder.conv_out.weight[:, :, 1, 1] = analysis[:, order]
    encoder.conv_out.bias.copy_(-(analysis @ mean))
    for out in range(size):  # the shortcut's mean beside it
        group = 192 // size
        encoder.conv_out.weight[out, out * group : (out + 1) * group, 1, 1] -= 1 / group
    decoder.conv_in.weight.zero_()
    decoder.conv_in.weight[:, :, 1, 1] = (basis / gain[:, None]).T[order]
    decoder.conv_in.bias.copy_(mean[order])
    for out in range(192):
        decoder.conv_in.weight[out, out // (192 // size), 1, 1] -= 1
    _start_upsampling(decoder)
    divisor = (CARRIER**2 * (48 - 12) / 48) ** 0.5
    decoder.norm_out.weight.fill_(1.0)
    decoder.norm_out.bias[:12] = 2.0  # the activation clips nothing
    decoder.conv_out.conv.weight.zero_()
    for out in range(12):
        decoder.conv_out.conv.weight[out, out, 1, 1] = divisor
    decoder.conv_out.conv.bias.fill_(-2.0 * divisor)


def held_out_crops(pictures: list[Picture], count: int = 4) -> list[Picture]:
    """`count` squares of 256 pixels from each photograph, the same in every run."""
    rng = np.random.default_rng(2026)
    crops = []
    for picture in pictures:
        for _ in range(count):
            side = int(rng.integers(256, min(picture.shape[:2]) + 1))
            top = int(rng.integers(picture.shape[0] - side + 1))
            left = int(rng.integers(picture.shape[1] - side + 1))
            image = Image.fromarray(picture[top : top + side, left : left + side])
            crops.append(np.asarray(image.resize((256, 256), Image.Resampling.LANCZOS)))
    return crops


@torch.no_grad()
def reconstruction_db(vae: AutoencoderDC, crops: list[Picture]) -> npt.NDArray[np.float64]:
    """PSNR in dB of every crop's reconstruction, rounded to 8 bits."""
    found = []
    for crop in crops:
        decoded = vae.decode(vae.encode(as_tensor([crop])).latent).sample[0]
        picture = ((decoded.clamp(-1, 1) + 1) * 127.5).round().permute(1, 2, 0).numpy()
        error = float(np.mean((picture - crop.astype(np.float32)) ** 2))
        found.append(10 * math.log10(255**2 / max(error, 1e-6)))
    return np.array(found)


def learning_rate(step: int, steps: int, highest: float) -> float:
    """Linear warm-up over 100 steps, level, then linear to zero over the last half."""
    return highest * min(1.0, (step + 1) / 100, 2 * (1 - step / steps))


def train(arguments: argparse.Namespace) -> AutoencoderDC:
    """Train up to `--steps`, with a checkpoint every 100 steps, and return the averaged model."""
    pictures = load_photographs(arguments.photographs, "train")
    torch.manual_seed(arguments.seed)
    vae, average = AutoencoderDC(**CONFIG), AutoencoderDC(**CONFIG)
    start_linear(vae, *principal_components(pictures, arguments.seed))
    average.load_state_dict(vae.state_dict())
    optimizer = torch.optim.AdamW(vae.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.0)
    path, first, seconds = arguments.output / "checkpoint.pt", 0, 0.0
    if arguments.resume:
        state = torch.load(path, weights_only=True)
        vae.load_state_dict(state["vae"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        first, seconds = state["step"], state["seconds"]
    began, losses = time.monotonic() - seconds, []
    last = min(arguments.steps, arguments.stop_after or arguments.steps)
    for step in range(first, last):
        rng = np.random.default_rng([arguments.seed, 7, step])
        batch = as_tensor([draw_crop(rng, pictures) for _ in range(arguments.batch_size)])
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, arguments.steps, arguments.learning_rate)
        latents = vae.encode(batch).latent
        noise = torch.from_numpy(rng.standard_normal(latents.shape, dtype=np.float32))
        decoded = vae.decode(latents + NOISE * noise).sample
        error = decoded - batch
        loss = error.abs().mean() + error.square().mean() + POWER_WEIGHT * latents.square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        update_average(average, vae, step, EMA_DECAY)
        losses.append(float(error.detach().square().mean()))
        done = step + 1
        if done % 100 == 0 or done == last:
            entry = {
                "step": done,
                "psnr_db": round(10 * math.log10(4 / float(np.mean(losses))), 2),
                "power": round(float(latents.detach().square().mean()), 3),
                "seconds": round(time.monotonic() - began),
            }
            losses = []
            with (arguments.output / "training-log.jsonl").open("a", encoding="utf-8") as log:
                log.write(json.dumps(entry) + "\n")
            state = {
                "step": done,
                "seconds": time.monotonic() - began,
                "vae": vae.state_dict(),
                "average": average.state_dict(),
                "optimizer": optimizer.state_dict(),
            }
            save_checkpoint(path, state)
    return average


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--photographs", type=Path, required=True, help="of photographs.py")
    parser.add_argument("--output", type=Path, default=Path("vae-out"))
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=2.5e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint")
    parser.add_argument("--stop-after", type=int, metavar="N", help="end there, to resume later")
    return parser.parse_args(argv)


def main() -> int:
    arguments = parse_arguments()
    arguments.output.mkdir(parents=True, exist_ok=True)
    vae = train(arguments).eval()
    crops = held_out_crops(load_photographs(arguments.photographs, "held-out"))
    quality = reconstruction_db(vae, crops)
    with torch.no_grad():
        latents = torch.cat([vae.encode(as_tensor([crop])).latent for crop in crops])
    vae.register_to_config(scaling_factor=round(1 / float(latents.square().mean().sqrt()), 4))
    vae.save_pretrained(arguments.output / "vae")
    result = {"held_out_db": round(float(quality.mean()), 2), "worst_db": round(quality.min(), 2)}
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
