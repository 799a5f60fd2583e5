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
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from batches import EditBatches, TrainingConfig
from checkpoint import save_checkpoint, update_average
from diffusers import FlowMatchEulerDiscreteScheduler
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors.torch import load_file
from torch import nn
from trainee import RealRopeAttention, Trainee, flow_matching_loss

from ditrim.runtime.small_editor.evaluation import (
    draw_contact_sheet,
    evaluate,
    write_json,
    write_samples,
)
from ditrim.runtime.small_editor.modules import PixelVAE
from ditrim.runtime.small_editor.pipeline import SmallEditPipeline
from ditrim.runtime.small_editor.scenes import CATEGORIES
from ditrim.runtime.small_editor.vocabulary import WordTokenizer


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
  python scripts/small_editor/train_small_editor.py --output training-out --compile
  python scripts/small_editor/train_small_editor.py --output training-out --compile --resume
  python scripts/small_editor/train_small_editor.py --output training-out --evaluate-only""",
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
