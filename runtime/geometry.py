"""Where tokens lie: pictures as grids of tokens."""

from __future__ import annotations

# (height, width) of a picture in tokens.
TokenGrid = tuple[int, int]
# (frames, height, width), as Qwen's positions count.
Grid = tuple[int, int, int]
