"""The small editor's words: one token a word, from a fixed list."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path

from ditrim.engines.files import write_file

logger = logging.getLogger(__name__)

PAD, UNKNOWN, EMPTY = "<pad>", "<unk>", "<empty>"
MAX_TOKENS = 32
_WORDS = re.compile(r"[^\W_]+")
_SPELLINGS = {"color": "colour", "gray": "grey", "centre": "middle", "center": "middle"}

# The order is the numbering: append, never insert.
_LIST = """
a an at away for from in into it of on the to with
red green blue yellow purple orange white black grey
circle square triangle diamond ring cross
top bottom left right up down middle corner
make change colour remove take add draw replace turn put swap
tint give whole picture background stripes checks dots
move shift camera view zoom out show more scene second object
"""
WORDS: tuple[str, ...] = tuple(_LIST.split())


class WordTokenizer:
    """Words to numbers: lower case, punctuation dropped, unknown words named in a warning.

    An empty prompt becomes the one token `<empty>`, which training uses for dropped captions.
    American spellings of the vocabulary's words are accepted.
    """

    def __init__(self, words: Sequence[str] = WORDS, model_max_length: int = MAX_TOKENS) -> None:
        self.tokens: tuple[str, ...] = (PAD, UNKNOWN, EMPTY, *words)
        self.model_max_length = model_max_length
        self._index = {token: index for index, token in enumerate(self.tokens)}
        if len(self._index) != len(self.tokens):
            raise ValueError("the vocabulary names a word twice")

    def __len__(self) -> int:
        return len(self.tokens)

    def encode(self, prompt: str, max_length: int | None = None) -> list[int]:
        """Token numbers of one prompt, at least one and at most `max_length`."""
        limit = self.model_max_length if max_length is None else max_length
        if limit < 1:
            raise ValueError(f"max_length is {limit}; at least one token is needed")
        words = [_SPELLINGS.get(word, word) for word in _WORDS.findall(prompt.lower())]
        if len(words) > limit:
            logger.warning(
                "The prompt has %d words and the small editor reads %d; dropped from: %r",
                len(words),
                limit,
                " ".join(words[limit : limit + 8])[:80],
            )
            words = words[:limit]
        unknown = sorted({word for word in words if word not in self._index})
        if unknown:
            named = ", ".join(word[:40] for word in unknown[:20])
            logger.warning("The small editor does not know these words: %s", named)
        if not words:
            return [self._index[EMPTY]]
        return [self._index.get(word, self._index[UNKNOWN]) for word in words]

    def __call__(
        self, prompts: Sequence[str], max_length: int | None = None
    ) -> tuple[list[list[int]], list[list[int]]]:
        """Token numbers and mask (1 valid, 0 padding) of a batch, padded to its longest."""
        rows = [self.encode(prompt, max_length) for prompt in prompts]
        longest = max(len(row) for row in rows)
        mask = [[1] * len(row) + [0] * (longest - len(row)) for row in rows]
        return [row + [0] * (longest - len(row)) for row in rows], mask

    def save_pretrained(self, save_directory: str | os.PathLike[str], **_: object) -> None:
        """Write `vocab.json` into the folder, which is made where it is missing."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        content = {"model_max_length": self.model_max_length, "tokens": list(self.tokens)}
        write_file(folder / "vocab.json", (json.dumps(content, indent=1) + "\n").encode())

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **_: object
    ) -> WordTokenizer:
        """Read `vocab.json` from a folder. Raises `ValueError` for a file of another layout."""
        path = Path(pretrained_model_name_or_path) / "vocab.json"
        content = json.loads(path.read_text(encoding="utf-8"))
        tokens = content.get("tokens") if isinstance(content, dict) else None
        if not isinstance(tokens, list) or tokens[:3] != [PAD, UNKNOWN, EMPTY]:
            raise ValueError(
                f"{path} is no vocabulary of the small editor: it needs a list 'tokens' that "
                f"begins with {PAD}, {UNKNOWN}, {EMPTY}"
            )
        return cls([str(token) for token in tokens[3:]], int(content["model_max_length"]))
