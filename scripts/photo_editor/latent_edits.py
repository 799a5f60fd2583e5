"""Edits of photographs as latents: drawn, encoded once, and drawn again from what was encoded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderDC

from ditrim.runtime.photo_editor.scenes import KINDS, sample_edit, training_generator
from ditrim.runtime.photo_editor.vocabulary import WORDS
from ditrim.runtime.small_editor.scenes import EditExample
from ditrim.runtime.small_editor.vocabulary import WordTokenizer

Picture = Any
# One batch has one layout: (probability, first reference, kinds with their weights).
LAYOUTS: tuple[tuple[float, str, dict[str, float]], ...] = (
    (
        0.72,
        "same",
        dict.fromkeys(KINDS["local"], 1.0)
        | {"tone": 0.7, "season": 0.35, "background": 0.7, "zoom": 0.25},
    ),
    (0.16, "same", {"insert": 1.0, "swap": 1.0}),
    (0.12, "large", {"shift": 1.0, "zoom": 0.8, "recolour": 0.4, "remove": 0.4, "add": 0.4}),
)


MEMORY = 3000  # steps from which edits are drawn again


def pack(latents: torch.Tensor) -> torch.Tensor:
    """Latents (B, c, h, w) as tokens of 2 x 2, (B, h w / 4, 4 c), as Qwen-Image packs them."""
    return torch.nn.functional.pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2)


@dataclass(frozen=True, slots=True)
class LatentEdit:
    """One edit: its words, and packed latents (L, 4 c) in half precision."""

    tokens: list[int]
    target: torch.Tensor
    references: tuple[torch.Tensor, ...]
    edited: torch.Tensor  # (G): share of a token's pixels that the edit changes; 0 for global ones


class LatentEdits:
    """Batches of encoded edits, a function of the seed and the step.

    Every step encodes `fresh` new edits of its layout and takes the rest of its batch from those
    of earlier steps, since encoding costs as much as training. What a resumed run needs again is
    encoded again.
    """

    def __init__(
        self,
        vae: AutoencoderDC,
        photographs: list[Picture],
        *,
        seed: int,
        picture_size: int,
        fresh: int,
        batch_size: int,
    ) -> None:
        self.vae, self.photographs, self.seed = vae, photographs, seed
        self.picture_size, self.fresh, self.batch_size = picture_size, fresh, batch_size
        self.tokenizer = WordTokenizer(WORDS)
        self._edits: dict[int, LatentEdit] = {}
        self._layouts: dict[int, int] = {}

    def layout(self, step: int) -> int:
        """The layout of a step."""
        if step not in self._layouts:
            rng = np.random.default_rng([self.seed, 11, self.picture_size, step])
            shares = [share for share, _, _ in LAYOUTS]
            self._layouts[step] = int(rng.choice(len(LAYOUTS), p=shares))
        return self._layouts[step]

    def batch(self, step: int) -> list[LatentEdit]:
        """The edits of one step."""
        layout = self.layout(step)
        rng = np.random.default_rng([self.seed, 12, self.picture_size, step])
        steps = range(max(0, step - MEMORY), step + 1)
        earlier = [before for before in steps if self.layout(before) == layout]
        numbers = [step * self.fresh + turn for turn in range(self.fresh)]
        while len(numbers) < self.batch_size:
            before = earlier[int(rng.integers(len(earlier)))]
            numbers.append(before * self.fresh + int(rng.integers(self.fresh)))
        return [self._edit(number, layout) for number in numbers]

    def _edit(self, number: int, layout: int) -> LatentEdit:
        if number not in self._edits:
            self._edits[number] = self._encode(self._draw(number, layout))
        return self._edits[number]

    def _draw(self, number: int, layout: int) -> EditExample:
        _, reference, kinds = LAYOUTS[layout]
        rng = training_generator(self.seed, self.picture_size * 10_000_000 + number)
        weights = np.array(list(kinds.values()))
        kind = str(rng.choice(list(kinds), p=weights / weights.sum()))
        return sample_edit(
            rng,
            kind,
            self.photographs,
            reference=reference,  # type: ignore[arg-type]
            picture_size=self.picture_size,
        )

    @torch.no_grad()
    def _encode(self, edit: EditExample) -> LatentEdit:
        def tokens_of(picture: Picture) -> torch.Tensor:
            tensor = torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 127.5 - 1
            latents = self.vae.encode(tensor).latent * self.vae.config.scaling_factor
            return pack(latents)[0].half()

        is_local = edit.category in ("local", "transfer")
        side = edit.target.shape[0] // 16
        share = edit.edit_mask.reshape(side, 16, side, 16).mean((1, 3)).flatten() * is_local
        return LatentEdit(
            self.tokenizer.encode(edit.prompt),
            tokens_of(edit.target),
            tuple(tokens_of(reference) for reference in edit.references),
            torch.from_numpy(share.astype(np.float32)),
        )
