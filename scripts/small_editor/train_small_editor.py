"""Train the small editor that ditrim ships, from scratch, on drawn scenes.

Everything random is a function of the seed and the step (the edits, the noise, the noise levels,
the dropped captions), so a run that was interrupted and resumed draws what an uninterrupted one
draws. The loss is plain flow matching (Lipman et al. 2023): with x_s = (1 - s) x + s e, the model
predicts the velocity e - x of the noisy tokens, s uniform and stratified over the batch.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler, QwenImageTransformer2DModel
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors.torch import load_file
from torch import nn

from ditrim.runtime.small_editor.evaluation import (
    draw_contact_sheet,
    evaluate,
    write_json,
    write_samples,
)
from ditrim.runtime.small_editor.modules import PixelVAE, WordEmbedder, build_transformer
from ditrim.runtime.small_editor.pipeline import SmallEditPipeline
from ditrim.runtime.small_editor.scenes import (
    CATEGORIES,
    PICTURE_SIZE,
    EditExample,
    sample_edit,
    training_generator,
)
from ditrim.runtime.small_editor.vocabulary import WordTokenizer

NUM_NOISY = (PICTURE_SIZE // 4) ** 2
# Padding every batch to one length keeps the shapes few, which `--compile` needs.
LONGEST_PROMPT = "add the object of the second picture in the bottom right corner"
# One batch has one layout: (probability, size of the first reference, categories with weights).
Buckets = tuple[tuple[float, str, tuple[tuple[str, float], ...]], ...]
BUCKETS: Buckets = (
    (0.48, "same", (("local", 0.65), ("global", 0.25), ("camera", 0.10))),
    (0.28, "large", (("local", 0.48), ("global", 0.20), ("camera", 0.32))),
    (0.17, "same", (("transfer", 1.0),)),
    (0.07, "large", (("transfer", 1.0),)),
)
# The same from the second phase on, when global edits are nearly learnt.
SECOND_BUCKETS: Buckets = (
    (0.54, "same", (("local", 0.75), ("global", 0.17), ("camera", 0.08))),
    (0.25, "large", (("local", 0.52), ("global", 0.14), ("camera", 0.34))),
    (0.15, "same", (("transfer", 1.0),)),
    (0.06, "large", (("transfer", 1.0),)),
)
# And from the third: naming one shape among several of its colour is what is learnt last.
THIRD_BUCKETS: Buckets = (
    (0.64, "same", (("local", 0.86), ("global", 0.09), ("camera", 0.05))),
    (0.18, "large", (("local", 0.70), ("global", 0.08), ("camera", 0.22))),
    (0.14, "same", (("transfer", 1.0),)),
    (0.04, "large", (("transfer", 1.0),)),
)

# Learning rate from the level part on: (share of the steps, share of the rate), linear between.
# The third phase warms up once more, and so does the fourth, which is the third for longer.
DECAY: tuple[tuple[float, float], ...] = (
    (2800 / 14000, 1.0),
    (3500 / 14000, 5 / 12),
    (4700 / 14000, 0.0),
    (4740 / 14000, 0.6),
    (5500 / 14000, 0.0),
    (5600 / 14000, 0.8),
    (1.0, 0.0),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingConfig:
    """What decides a run's weights, next to the library versions."""

    steps: int = 14000
    seed: int = 0
    batch_size: int = 16
    learning_rate: float = 1e-3
    warm_up: int = 150
    weight_decay: float = 0.01
    ema_decay: float = 0.998
    caption_dropout: float = 0.08
    # The first phase learns to copy. The second attends to what the instruction changes: it draws
    # more of the high noise levels, at which that is decided, and weighs edited pixels more. The
    # third draws more local edits, and more pictures in which shapes share a colour.
    second_phase: int = 2000  # its first step
    third_phase: int = 4700  # its first step
    sigma_shift: float = 2.5
    edit_weight: float = 3.0  # added to 1 inside the edit mask of local edits and transfers
    num_layers: int = 6
    optimizer: str = "adamw"

    def rate(self, step: int) -> float:
        """The learning rate of `step`: linear warm-up, level, then down as `DECAY` says.

        Until the decay begins the number of steps does not matter, so that a run may be resumed
        with another one and still be the run that had it from the start.
        """
        rise = (step + 1) / self.warm_up
        ends, shares = zip(*DECAY, strict=True)
        fall = float(np.interp(step, [end * self.steps for end in ends], shares))
        return self.learning_rate * min(1.0, rise, fall)


class EditBatches(torch.utils.data.Dataset[dict[str, Any]]):
    """Item `step` is the whole batch of that step, a function of the seed and the step."""

    def __init__(self, config: TrainingConfig) -> None:
        self.config = config
        self.tokenizer = WordTokenizer()

    def __len__(self) -> int:
        return self.config.steps

    def __getitem__(self, step: int) -> dict[str, Any]:
        config = self.config
        rng = training_generator(config.seed, step)
        is_second = step >= config.second_phase
        is_third = step >= config.third_phase
        buckets = THIRD_BUCKETS if is_third else SECOND_BUCKETS if is_second else BUCKETS
        _, size, categories = buckets[rng.choice(len(buckets), p=[b[0] for b in buckets])]
        names, weights = zip(*categories, strict=True)
        edits = []
        for _ in range(config.batch_size):
            category = str(rng.choice(names, p=weights))
            edit = sample_edit(rng, category, "train", size)  # type: ignore[arg-type]
            if is_third and category == "local" and not has_shared_colour(edit):
                edit = sample_edit(rng, category, "train", size)  # type: ignore[arg-type]
            edits.append(edit)
        dropped = rng.random(config.batch_size) < config.caption_dropout
        prompts = ["" if drop else e.prompt for e, drop in zip(edits, dropped, strict=True)]
        tokens, mask = self.tokenizer([*prompts, LONGEST_PROMPT])
        strata = (np.arange(config.batch_size) + rng.random(config.batch_size)) / config.batch_size
        sigma = rng.permutation(strata).astype(np.float32)
        masks = np.stack([edit.edit_mask for edit in edits]).astype(np.float32)
        masks *= np.array([edit.category in ("local", "transfer") for edit in edits])[:, None, None]
        if is_second:
            sigma = config.sigma_shift * sigma / (1 + (config.sigma_shift - 1) * sigma)
        return {
            "tokens": torch.tensor(tokens[:-1]),
            "mask": torch.tensor(mask[:-1], dtype=torch.bool),
            "sigma": torch.from_numpy(sigma),
            "weight": torch.from_numpy(1 + masks * (config.edit_weight if is_second else 0.0)),
            "noise": torch.from_numpy(
                rng.standard_normal((config.batch_size, NUM_NOISY, 48), dtype=np.float32)
            ),
            "target": as_tensor([edit.target for edit in edits]),
            "references": [
                as_tensor([edit.references[number] for edit in edits])
                for number in range(len(edits[0].references))
            ],
        }


def has_shared_colour(edit: EditExample) -> bool:
    """Whether two of the shapes that are drawn have one colour."""
    colours = [colour for colour, _ in edit.pairs]
    return len(set(colours)) < len(colours)


def as_tensor(pictures: list[np.ndarray]) -> torch.Tensor:
    """uint8 pictures (H, W, 3) as one tensor (B, 3, H, W) in [-1, 1]."""
    stacked = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
    return stacked.float() / 127.5 - 1


class RealRopeAttention:
    """diffusers' Qwen joint attention with real-valued RoPE and, on a CPU, explicit products.

    The same function as `QwenDoubleStreamAttnProcessor2_0`; used in training only, where the
    backward pass of the CPU's fused attention takes three times as long as that of two products.
    `image_rotary_emb` is (cos, sin), each (T + L, D / 2), text first; the mask is additive.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,  # (B, L, d)
        encoder_hidden_states: torch.Tensor,  # (B, T, d)
        encoder_hidden_states_mask: torch.Tensor,  # (B, 1, 1, T + L)
        attention_mask: None = None,  # always passed by diffusers, never used
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert image_rotary_emb is not None
        num_text = encoder_hidden_states.shape[1]
        cos, sin = image_rotary_emb

        def split(states: torch.Tensor) -> torch.Tensor:
            return states.unflatten(-1, (attn.heads, -1)).transpose(1, 2)  # (B, H, L, D)

        def rotate(states: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
            real, imaginary = states.float().unflatten(-1, (-1, 2)).unbind(-1)
            turned = (real * cos - imaginary * sin, real * sin + imaginary * cos)
            return torch.stack(turned, dim=-1).flatten(-2).to(dtype)

        text, image = encoder_hidden_states, hidden_states
        query_text = attn.norm_added_q(split(attn.add_q_proj(text)))
        key_text = attn.norm_added_k(split(attn.add_k_proj(text)))
        query = torch.cat([query_text, attn.norm_q(split(attn.to_q(image)))], dim=2)
        key = torch.cat([key_text, attn.norm_k(split(attn.to_k(image)))], dim=2)
        value = torch.cat([split(attn.add_v_proj(text)), split(attn.to_v(image))], dim=2)
        query, key = rotate(query, value.dtype), rotate(key, value.dtype)
        if value.device.type == "cpu":
            query = query * query.shape[-1] ** -0.5
            scores = torch.matmul(query, key.transpose(-1, -2)) + encoder_hidden_states_mask
            joint = torch.matmul(torch.softmax(scores, dim=-1), value)
        else:
            joint = F.scaled_dot_product_attention(
                query, key, value, attn_mask=encoder_hidden_states_mask
            )
        joint = joint.transpose(1, 2).flatten(2)
        return attn.to_out[0](joint[:, num_text:]), attn.to_add_out(joint[:, :num_text])


class Trainee(nn.Module):
    """The two trained modules together: the transformer and the word embedding."""

    def __init__(self, config: TrainingConfig) -> None:
        super().__init__()
        self.text_encoder = WordEmbedder(len(WordTokenizer()))
        self.transformer = build_transformer(num_layers=config.num_layers)
        nn.init.normal_(self.text_encoder.embedding.weight)

    def forward(
        self,
        latents: torch.Tensor,  # (B, G + C, 48)
        sigma: torch.Tensor,  # (B)
        tokens: torch.Tensor,
        mask: torch.Tensor,
        shapes: list[tuple[int, int, int]],
    ) -> torch.Tensor:
        """Velocity of the noisy tokens, (B, G, 48).

        What `QwenImageTransformer2DModel.forward` computes, but for precision under autocast: the
        residual streams, the timestep and its embedding stay float32, since a timestep rounded to
        bfloat16 would be off by up to two of its thousand units.
        """
        model: QwenImageTransformer2DModel = self.transformer
        states = model.img_in(latents).float()
        with torch.autocast(latents.device.type, enabled=False):
            temb = model.time_text_embed(sigma, states)
        text = model.txt_in(model.txt_norm(self.text_encoder(tokens))).float()
        image_freqs, text_freqs = model.pos_embed(
            [shapes], max_txt_seq_len=text.shape[1], device=latents.device
        )
        freqs = torch.cat([text_freqs, image_freqs])
        rope = (freqs.real.contiguous(), freqs.imag.contiguous())
        keep = torch.cat([mask, mask.new_ones(mask.shape[0], states.shape[1])], dim=1)
        dtype = torch.bfloat16 if torch.is_autocast_enabled(latents.device.type) else text.dtype
        bias = torch.zeros(keep.shape, dtype=dtype, device=keep.device)
        bias = bias.masked_fill(~keep, -1e4)[:, None, None]
        for block in model.transformer_blocks:
            text, states = block(
                hidden_states=states,
                encoder_hidden_states=text,
                encoder_hidden_states_mask=bias,
                temb=temb,
                image_rotary_emb=rope,
            )
        velocity: torch.Tensor = model.proj_out(model.norm_out(states[:, :NUM_NOISY], temb))
        return velocity


class Optimizers:
    """AdamW over everything, or Muon over the blocks' matrices and AdamW over the rest."""

    def __init__(self, trainee: Trainee, config: TrainingConfig) -> None:
        matrices, others = [], []
        for name, weight in trainee.named_parameters():
            is_inner = "transformer_blocks" in name and weight.ndim == 2 and "_mod." not in name
            (matrices if is_inner and config.optimizer == "muon" else others).append(weight)
        self.parts: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(
                others,
                lr=config.learning_rate,
                weight_decay=config.weight_decay,
                betas=(0.9, 0.98),
                fused=True,
            )
        ]
        if matrices:
            self.parts.append(
                torch.optim.Muon(
                    matrices,
                    lr=config.learning_rate,
                    weight_decay=config.weight_decay,
                    adjust_lr_fn="match_rms_adamw",
                )
            )

    def step(self, rate: float) -> None:
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = rate
            part.step()
            part.zero_grad(set_to_none=True)

    def state_dict(self) -> list[dict[str, Any]]:
        return [part.state_dict() for part in self.parts]

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        for part, state in zip(self.parts, states, strict=True):
            part.load_state_dict(state)


def resolve_device(name: str) -> torch.device:
    """`auto` is CUDA where torch has it, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def flow_matching_loss(
    trainee: Trainee, batch: dict[str, Any], vae: PixelVAE, device: torch.device, precision: str
) -> torch.Tensor:
    """Mean squared error of the predicted velocity over one batch, each pixel by its weight."""
    target = vae.encode(batch["target"].to(device))  # (B, G, 48)
    references = [vae.encode(reference.to(device)) for reference in batch["references"]]
    noise, sigma = batch["noise"].to(device), batch["sigma"].to(device)
    noisy = (1 - sigma[:, None, None]) * target + sigma[:, None, None] * noise
    grids = [(1, r.shape[2] // 4, r.shape[3] // 4) for r in (batch["target"], *batch["references"])]
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
    with autocast:
        velocity = trainee(
            torch.cat([noisy, *references], dim=1),
            sigma,
            batch["tokens"].to(device),
            batch["mask"].to(device),
            grids,
        )
    weight = vae.encode(batch["weight"].to(device)[:, None].expand(-1, 3, -1, -1))  # (B, G, 48)
    return (weight * (velocity.float() - (noise - target)).square()).mean()


def update_average(average: nn.Module, trainee: nn.Module, step: int, decay: float) -> None:
    """Move the averaged weights toward the trained ones; faster in the first steps."""
    share = 1 - min(decay, (1 + step) / (10 + step))
    with torch.no_grad():
        torch._foreach_lerp_(
            list(average.parameters()), [w.detach() for w in trainee.parameters()], share
        )


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write beside the target, then replace it, so that a kill leaves a whole checkpoint."""
    beside = path.with_suffix(".partial")
    torch.save(state, beside)
    os.replace(beside, path)


def load_model(folder: Path, trainee: Trainee) -> tuple[int, float, list[str]]:
    """Read an exported `model` folder's weights into `trainee`; its steps, seconds and log."""
    if not (folder / "metrics.json").is_file():
        raise SystemExit(f"--continue-from: {folder} holds no exported model (no metrics.json)")
    about = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    for name in ("transformer", "text_encoder"):
        [weights] = (folder / name).glob("*.safetensors")
        getattr(trainee, name).load_state_dict(load_file(weights))
    log = (folder / "training-log.jsonl").read_text(encoding="utf-8").splitlines()
    return int(about["trained_steps"]), float(about["training_seconds"]), log


def load_checkpoint(path: Path, config: TrainingConfig) -> dict[str, Any]:
    """Read a checkpoint; all but the number of steps must be as it was."""
    if not path.is_file():
        raise SystemExit(f"--resume: there is no checkpoint at {path}; start without --resume")
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    changed = {
        key: (value, asdict(config)[key])
        for key, value in state["config"].items()
        if key != "steps" and value != asdict(config).get(key, value)
    }
    if changed:
        raise SystemExit(f"--resume: options differ from the checkpoint's (old, new): {changed}")
    return state


def thin_log(lines: list[str], most: int = 400) -> list[str]:
    """Every n-th line, with the last, so that at most `most` remain."""
    stride = max(1, math.ceil(len(lines) / most))
    return [line for n, line in enumerate(lines, 1) if n % stride == 0 or n == len(lines)]


def train(
    config: TrainingConfig,
    output: Path,
    *,
    device: torch.device,
    precision: str = "bf16",
    resume: bool = False,
    continue_from: Path | None = None,
    compile_blocks: bool = False,
    checkpoint_every: int = 250,
    log_every: int = 20,
    stop_after: int | None = None,
    num_workers: int = 1,
) -> Trainee:
    """Train, or go on training, and return the averaged model.

    Writes `checkpoint.pt` and `training-log.jsonl` into `output`. `stop_after` ends early at that
    step, as an interruption would, with a checkpoint. `continue_from` is an exported `model`
    folder: its averaged weights, at the step that they were trained to, with new optimizer states.
    """
    output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(config.seed)
    trainee, average = Trainee(config).to(device), Trainee(config).to(device)
    first, elapsed = 0, 0.0
    lines: list[str] = []
    if continue_from is not None:
        first, elapsed, lines = load_model(continue_from, trainee)
    average.load_state_dict(trainee.state_dict())
    average.requires_grad_(False)
    trainee.transformer.set_attn_processor(RealRopeAttention())
    optimizers = Optimizers(trainee, config)
    checkpoint, log_path = output / "checkpoint.pt", output / "training-log.jsonl"
    if resume:
        state = load_checkpoint(checkpoint, config)
        trainee.load_state_dict(state["trainee"])
        average.load_state_dict(state["average"])
        optimizers.load_state_dict(state["optimizers"])
        first, elapsed = int(state["step"]), float(state["seconds"])
        if log_path.is_file():
            lines = log_path.read_text(encoding="utf-8").splitlines()
            lines = [line for line in lines if json.loads(line)["step"] <= first]
    log_path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    if compile_blocks:
        for block in trainee.transformer.transformer_blocks:
            block.compile(dynamic=False)
    last = config.steps if stop_after is None else min(config.steps, stop_after)
    batches: Iterator[dict[str, Any]] = iter(
        torch.utils.data.DataLoader(
            EditBatches(config),
            batch_size=None,
            sampler=range(first, last),
            num_workers=num_workers,
            prefetch_factor=8 if num_workers else None,
        )
    )
    vae = PixelVAE().to(device)
    began, recent, norms = time.monotonic() - elapsed, [], []
    columns = (
        TextColumn("training"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total} loss {task.fields[loss]:.4f}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as progress, log_path.open("a", encoding="utf-8") as log:
        task = progress.add_task("training", total=config.steps, completed=first, loss=math.nan)
        for step, batch in enumerate(batches, first):
            loss = flow_matching_loss(trainee, batch, vae, device, precision)
            loss.backward()
            norm = nn.utils.clip_grad_norm_(trainee.parameters(), 1.0)
            optimizers.step(config.rate(step))
            update_average(average, trainee, step, config.ema_decay)
            recent.append(loss.detach())
            norms.append(norm.detach())
            done = step + 1
            if done % log_every == 0 or done == last:
                entry = {
                    "step": done,
                    "loss": round(float(torch.stack(recent).mean()), 6),
                    "gradient_norm": round(float(torch.stack(norms).mean()), 5),
                    "learning_rate": round(config.rate(step), 8),
                    "seconds": round(time.monotonic() - began, 1),
                }
                if not math.isfinite(entry["loss"]):
                    raise SystemExit(f"the loss is {entry['loss']} at step {done}; nothing saved")
                log.write(json.dumps(entry) + "\n")
                log.flush()
                progress.update(task, completed=done, loss=entry["loss"])
                recent, norms = [], []
            if done % checkpoint_every == 0 or done == last:
                save_checkpoint(
                    checkpoint,
                    {
                        "step": done,
                        "seconds": time.monotonic() - began,
                        "config": asdict(config),
                        "trainee": trainee.state_dict(),
                        "average": average.state_dict(),
                        "optimizers": optimizers.state_dict(),
                    },
                )
    return average


def export_model(average: Trainee, output: Path) -> SmallEditPipeline:
    """Write the averaged weights as a diffusers pipeline folder `model` and return the pipeline."""
    pipeline = SmallEditPipeline(
        transformer=average.transformer.to("cpu").eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=1.0),
        vae=PixelVAE(),
        text_encoder=average.text_encoder.to("cpu").eval(),
        tokenizer=WordTokenizer(),
    )
    pipeline.save_pretrained(output / "model")
    return pipeline


def write_results(
    average: Trainee,
    config: TrainingConfig,
    output: Path,
    *,
    device: torch.device,
    count: int,
    num_inference_steps: int,
    seed: int = 0,
    trained: dict[str, Any],
) -> dict[str, Any]:
    """Write weights, log, held-out metrics, contact sheet and samples; return the metrics."""
    pipeline = export_model(average, output)
    log = output / "training-log.jsonl"
    if log.is_file():
        thinned = thin_log(log.read_text(encoding="utf-8").splitlines())
        text = "".join(line + "\n" for line in thinned)
        (output / "model" / "training-log.jsonl").write_text(text, encoding="utf-8")
    pipeline.to(device)
    pipeline.set_progress_bar_config(desc="evaluating", leave=False)
    metrics, edits, answers = evaluate(
        pipeline, count=count, num_inference_steps=num_inference_steps, seed=seed
    )
    weights = (*average.transformer.parameters(), *average.text_encoder.parameters())
    about = {"parameters": sum(w.numel() for w in weights), **trained, "config": asdict(config)}
    write_json(output / "model" / "metrics.json", about | metrics)
    # A few of each category, so that the sheet is small enough to look at.
    shown = [c * count + i for c in range(len(CATEGORIES)) for i in range(min(count, 16))]
    sheet = draw_contact_sheet([edits[i] for i in shown], [answers[i] for i in shown])
    sheet.save(output / "contact-sheet.png")
    write_samples(output / "samples")
    return metrics


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    defaults = TrainingConfig()
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n", maxsplit=1)[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""example:
  python scripts/train_small_editor.py --output training-out --compile
  python scripts/train_small_editor.py --output training-out --compile --resume
  python scripts/train_small_editor.py --output training-out --evaluate-only""",
    )
    parser.add_argument("--output", type=Path, default=Path("training-out"), help="folder")
    parser.add_argument("--steps", type=int, default=defaults.steps)
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--batch-size", type=int, default=defaults.batch_size)
    parser.add_argument("--learning-rate", type=float, default=defaults.learning_rate)
    parser.add_argument("--optimizer", choices=("adamw", "muon"), default=defaults.optimizer)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--precision", choices=("bf16", "float32"), default="bf16")
    parser.add_argument("--threads", type=int, default=None, help="torch threads on a CPU")
    parser.add_argument("--compile", action="store_true", help="torch.compile the blocks")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint")
    parser.add_argument(
        "--continue-from",
        type=Path,
        metavar="MODEL",
        help="go on from an exported model folder, with new optimizer states",
    )
    parser.add_argument("--checkpoint-every", type=int, default=250)
    parser.add_argument(
        "--evaluate-only", action="store_true", help="measure the model of the checkpoint"
    )
    parser.add_argument("--evaluate-count", type=int, default=64, help="edits a category")
    parser.add_argument("--evaluate-seed", type=int, default=0, help="of the held-out edits")
    parser.add_argument("--evaluate-steps", type=int, default=40, help="sampling steps")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    config = TrainingConfig(
        steps=arguments.steps,
        seed=arguments.seed,
        batch_size=arguments.batch_size,
        learning_rate=arguments.learning_rate,
        optimizer=arguments.optimizer,
    )
    device = resolve_device(arguments.device)
    checkpoint = arguments.output / "checkpoint.pt"
    if arguments.evaluate_only:
        if not checkpoint.is_file():
            raise SystemExit(f"--evaluate-only: there is no checkpoint at {checkpoint}")
    else:
        train(
            config,
            arguments.output,
            device=device,
            precision=arguments.precision,
            resume=arguments.resume,
            continue_from=arguments.continue_from,
            compile_blocks=arguments.compile,
            checkpoint_every=arguments.checkpoint_every,
        )
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    config = TrainingConfig(**state["config"])
    average = Trainee(config)
    average.load_state_dict(state["average"])
    metrics = write_results(
        average,
        config,
        arguments.output,
        device=device,
        count=arguments.evaluate_count,
        seed=arguments.evaluate_seed,
        num_inference_steps=arguments.evaluate_steps,
        trained={"trained_steps": state["step"], "training_seconds": round(state["seconds"])},
    )
    print(json.dumps(metrics["by_category"]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
