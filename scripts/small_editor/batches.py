"""What the small editor is trained on: edits, noise and noise levels of every step.

Everything random is a function of the seed and the step, so a run that was interrupted and resumed
draws what an uninterrupted one draws.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ditrim.runtime.small_editor.scenes import (
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
    """Holds what decides a run's weights, next to the library versions."""

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
