#!/usr/bin/env python3
"""Train the photograph editor's transformer over the latents of its autoencoder.

Plain flow matching (Lipman et al. 2023): with x_s = (1 - s) x + s e the model predicts e - x of the
noisy tokens. The first steps see pictures of 128 pixels, a quarter of the tokens, since copying and
the words are learnt there as well; the others see 256. Everything random is a function of the seed
and the step, so that a resumed run draws what an uninterrupted one draws.

Example:
    python scripts/photo_editor/train_photo_editor.py --photographs photographs.npz \\
        --vae vae-out/vae --output photo-out
    python scripts/photo_editor/train_photo_editor.py ... --resume
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
import torch
from diffusers import AutoencoderDC, QwenImageTransformer2DModel
from latent_edits import LatentEdit, LatentEdits
from photographs import load_photographs
from torch import nn

sys.path.append(str(Path(__file__).resolve().parents[1] / "small_editor"))
from checkpoint import save_checkpoint, update_average
from trainee import RealRopeAttention

from ditrim.runtime.photo_editor.vocabulary import WORDS
from ditrim.runtime.small_editor.modules import WordEmbedder, build_transformer
from ditrim.runtime.small_editor.vocabulary import WordTokenizer

TRANSFORMER: dict[str, Any] = {"patch_size": 2, "in_channels": 128, "out_channels": 32}
SIGMA_SHIFT = 2.5  # more of the high noise levels, at which the edit is decided
EDIT_WEIGHT = 2.0  # added to 1 for a token that the edit changes whole
WARM_UP = 60
EMA_DECAY = 0.995


class Trainee(nn.Module):
    """The transformer and the word embedding together."""

    def __init__(self) -> None:
        super().__init__()
        self.text_encoder = WordEmbedder(len(WordTokenizer(WORDS)))
        self.transformer: QwenImageTransformer2DModel = build_transformer(**TRANSFORMER)
        nn.init.normal_(self.text_encoder.embedding.weight)
        self._start_looking_across()

    @torch.no_grad()
    def _start_looking_across(self) -> None:
        """Let two heads of the first blocks look from a noisy token to the first reference's.

        Queries and keys of these heads start nearly constant, so that the rotary embedding alone
        decides, and the keys are turned by one frame: the same place in the next frame scores
        highest. Their gates start open.
        """
        width, head = self.transformer.inner_dim, 64
        for block in self.transformer.transformer_blocks[:2]:
            attention = block.attn
            block.img_mod[1].bias[2 * width : 3 * width] = 0.5  # the attention's gate
            for norm in (attention.norm_q, attention.norm_k):
                norm.weight.fill_(1.7)
            for number in (0, 1):
                rows = slice(number * head, (number + 1) * head)
                for layer, turn in ((attention.to_q, 0.0), (attention.to_k, -1.0)):
                    layer.weight[rows] *= 0.15
                    start = number * head
                    layer.bias[rows] = 0
                    for offset, is_frame in ((0, True), (16, False), (40, False)):
                        length = 16 if is_frame else 24
                        for pair in range(2):  # the two fastest frequencies of the axis
                            angle = turn * 10000 ** (-2 * pair / length) if is_frame else 0.0
                            place = start + offset + 2 * pair
                            layer.bias[place] = math.cos(angle) * (1.0 if pair == 0 else 0.8)
                            layer.bias[place + 1] = math.sin(angle) * (1.0 if pair == 0 else 0.8)

    def forward(
        self,
        latents: torch.Tensor,  # (B, G + C, 128)
        sigma: torch.Tensor,  # (B)
        tokens: torch.Tensor,  # (B, T)
        mask: torch.Tensor,  # (B, T)
        shapes: list[tuple[int, int, int]],
    ) -> torch.Tensor:
        """Velocity of the noisy tokens, (B, G, 128)."""
        model = self.transformer
        states = model.img_in(latents)
        temb = model.time_text_embed(sigma, states)
        text = model.txt_in(model.txt_norm(self.text_encoder(tokens)))
        image, words = model.pos_embed(
            [shapes], max_txt_seq_len=text.shape[1], device=latents.device
        )
        freqs = torch.cat([words, image])
        rope = (freqs.real.contiguous(), freqs.imag.contiguous())
        keep = torch.cat([mask, mask.new_ones(mask.shape[0], states.shape[1])], dim=1)
        bias = torch.zeros(keep.shape).masked_fill(~keep, -1e4)[:, None, None]
        for block in model.transformer_blocks:
            text, states = block(
                hidden_states=states,
                encoder_hidden_states=text,
                encoder_hidden_states_mask=bias,
                temb=temb,
                image_rotary_emb=rope,
            )
        noisy = shapes[0][1] * shapes[0][2]
        velocity: torch.Tensor = model.proj_out(model.norm_out(states[:, :noisy], temb))
        return velocity


def loss_of(
    trainee: Trainee,
    edits: list[LatentEdit],
    channel_weight: torch.Tensor,
    rng: np.random.Generator,
    caption_dropout: float = 0.06,
) -> torch.Tensor:
    """Weighted mean squared error of the velocity over one batch."""
    count = len(edits)
    target = torch.stack([edit.target for edit in edits]).float()
    columns = zip(*(edit.references for edit in edits), strict=True)
    references = [torch.stack(column).float() for column in columns]
    rows = [edit.tokens if rng.random() >= caption_dropout else [2] for edit in edits]
    longest = max(len(row) for row in rows)
    tokens = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[True] * len(row) + [False] * (longest - len(row)) for row in rows])
    strata = (rng.permutation(count) + rng.random(count)) / count
    sigma = torch.from_numpy(SIGMA_SHIFT * strata / (1 + (SIGMA_SHIFT - 1) * strata)).float()
    noise = torch.from_numpy(rng.standard_normal(target.shape, dtype=np.float32))
    level = sigma[:, None, None]
    noisy = (1 - level) * target + level * noise
    shapes = [
        (1, math.isqrt(part.shape[1]), math.isqrt(part.shape[1])) for part in (target, *references)
    ]
    velocity = trainee(torch.cat([noisy, *references], dim=1), sigma, tokens, mask, shapes)
    weight = 1 + EDIT_WEIGHT * torch.stack([edit.edited for edit in edits])[..., None]
    return (weight * channel_weight * (velocity - (noise - target)).square()).mean()


@torch.no_grad()
def channel_weights(vae: AutoencoderDC, pictures: list[Any]) -> torch.Tensor:
    """What an error of each packed channel means for the picture, (128), of mean 1.

    The square root of the mean squared change of the decoded picture for a small change of the
    channel, so that the coarse channels count more and the fine ones are learnt as well.
    """
    side = 96
    crops = np.stack([picture[:side, :side] for picture in pictures[::10]])
    latents = vae.encode(torch.from_numpy(crops).permute(0, 3, 1, 2).float() / 127.5 - 1).latent
    plain, changes = vae.decode(latents).sample, []
    for channel in range(latents.shape[1]):
        moved = latents.clone()
        moved[:, channel] += 0.1 / vae.config.scaling_factor
        changes.append((vae.decode(moved).sample - plain).square().mean().sqrt())
    weight = torch.stack(changes).repeat_interleave(4)
    return weight / weight.mean()


def optimizers_of(trainee: Trainee, rate: float) -> list[torch.optim.Optimizer]:
    """Muon over the blocks' matrices, AdamW over the rest."""
    matrices, others = [], []
    for name, weight in trainee.named_parameters():
        is_inner = "transformer_blocks" in name and weight.ndim == 2 and "_mod." not in name
        (matrices if is_inner else others).append(weight)
    return [
        torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.98), weight_decay=0.0),
        torch.optim.Muon(matrices, lr=rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
    ]


def rate_of(step: int, arguments: argparse.Namespace) -> float:
    """Warm-up, level, and linear to zero over the last 40 % of the steps."""
    fall = (arguments.steps - step) / (0.4 * arguments.steps)
    return float(arguments.learning_rate * min(1.0, (step + 1) / WARM_UP, fall))


def train(arguments: argparse.Namespace) -> Trainee:
    """Train up to `--steps`, with a checkpoint every 100 steps, and return the averaged model."""
    pictures = load_photographs(arguments.photographs, "train")
    vae = AutoencoderDC.from_pretrained(arguments.vae).eval()
    torch.manual_seed(arguments.seed)
    trainee, average = Trainee(), Trainee()
    average.load_state_dict(trainee.state_dict())
    for part in (trainee, average):
        for block in part.transformer.transformer_blocks:
            block.attn.set_processor(RealRopeAttention())
    optimizers = optimizers_of(trainee, arguments.learning_rate)
    path, first, seconds = arguments.output / "checkpoint.pt", 0, 0.0
    if arguments.resume:
        state = torch.load(path, weights_only=True)
        trainee.load_state_dict(state["trainee"])
        average.load_state_dict(state["average"])
        for optimizer, content in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(content)
        first, seconds = state["step"], state["seconds"]
    weight = channel_weights(vae, pictures)
    sources = {
        size: LatentEdits(
            vae, pictures, seed=arguments.seed, picture_size=size, fresh=fresh, batch_size=batch
        )
        for size, fresh, batch in (
            (128, max(1, arguments.batch_size // 2), 2 * arguments.batch_size),
            (256, max(1, arguments.batch_size // 3), arguments.batch_size),
        )
    }
    began, losses = time.monotonic() - seconds, []
    last = min(arguments.steps, arguments.stop_after or arguments.steps)
    for step in range(first, last):
        size = 128 if step < arguments.small_steps else 256
        edits = sources[size].batch(step if size == 128 else step - arguments.small_steps)
        rng = np.random.default_rng([arguments.seed, 13, step])
        loss = loss_of(trainee, edits, weight, rng)
        loss.backward()
        nn.utils.clip_grad_norm_(trainee.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate_of(step, arguments)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        update_average(average, trainee, step, EMA_DECAY)
        losses.append(float(loss.detach()))
        done = step + 1
        if done % 20 == 0 or done == last:
            entry = {
                "step": done,
                "loss": round(float(np.mean(losses)), 5),
                "seconds": round(time.monotonic() - began),
            }
            losses = []
            with (arguments.output / "training-log.jsonl").open("a", encoding="utf-8") as log:
                log.write(json.dumps(entry) + "\n")
        if done % 100 == 0 or done == last:
            state = {
                "step": done,
                "seconds": time.monotonic() - began,
                "trainee": trainee.state_dict(),
                "average": average.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
            }
            save_checkpoint(path, state)
    return average


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--photographs", type=Path, required=True, help="of photographs.py")
    parser.add_argument("--vae", type=Path, required=True, help="of train_photo_vae.py")
    parser.add_argument("--output", type=Path, default=Path("photo-out"))
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--small-steps", type=int, default=3000, help="at 128 pixels")
    parser.add_argument("--batch-size", type=int, default=12, help="at 256 pixels; twice at 128")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint")
    parser.add_argument("--stop-after", type=int, metavar="N", help="end there, to resume later")
    return parser.parse_args(argv)


def main() -> int:
    arguments = parse_arguments()
    arguments.output.mkdir(parents=True, exist_ok=True)
    average = train(arguments)
    average.transformer.half().save_pretrained(arguments.output / "transformer")
    average.text_encoder.save_pretrained(arguments.output / "text_encoder")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
