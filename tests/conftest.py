"""Tiny models of every family, and what tests share."""

from __future__ import annotations

import sys
from pathlib import Path

# `--import-mode=importlib` leaves sys.path alone; helpers stand beside this file.
sys.path.insert(0, str(Path(__file__).parent))
