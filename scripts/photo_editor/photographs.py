#!/usr/bin/env python3
"""Collect the photographs that the photograph editor is trained and measured on, with licences.

They come from packages that anybody can fetch by name: scikit-image and matplotlib are installed,
the others are unpacked into one folder beforehand (`pip download --no-deps scikit-learn
scipy==1.9.3`, unzipped; `apt-get download` and `dpkg-deb -x` for the two wallpaper packages). A
photograph is either trained on or held out, whole. Every file is checked by its SHA-256.

Example:
    python scripts/photo_editor/photographs.py --unpacked unpacked --output photographs.npz
"""

from __future__ import annotations

import argparse
import bz2
import hashlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

Picture = npt.NDArray[np.uint8]  # (H, W, 3)
SHORTER_SIDE = 640  # larger photographs are scaled down to this
LISTING = Path(__file__).with_name("photographs.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class Photograph:
    """One photograph: where it lies, whose it is, and whether it is held out."""

    name: str
    package: str
    path: str  # inside the package
    author: str
    licence: str
    is_held_out: bool
    sha256: str = ""


def listed_photographs() -> list[Photograph]:
    """Read the list of photographs that stands beside this file."""
    return [Photograph(**entry) for entry in json.loads(LISTING.read_text(encoding="utf-8"))]


def find_file(photograph: Photograph, unpacked: Path) -> Path:
    """Find the file of a photograph in the installed or unpacked packages.

    Raises `FileNotFoundError` with the package's name.
    """
    folders = [Path(entry) for entry in sys.path if entry] + [unpacked]
    for folder in folders:
        if (folder / photograph.path).is_file():
            return folder / photograph.path
    raise FileNotFoundError(
        f"{photograph.name}: there is no {photograph.path}; unpack {photograph.package} into "
        f"{unpacked}"
    )


def read_picture(path: Path) -> Picture:
    """Read a photograph as RGB, scaled down to a shorter side of 640 pixels."""
    if path.suffix == ".dat":  # SciPy's raccoon: compressed rows of RGB
        raw = np.frombuffer(bz2.decompress(path.read_bytes()), np.uint8)
        image = Image.fromarray(raw.reshape(768, 1024, 3))
    else:
        image = Image.open(path).convert("RGB")
    scale = SHORTER_SIDE / min(image.size)
    if scale < 1:
        size = (round(image.width * scale), round(image.height * scale))
        image = image.resize(size, Image.Resampling.LANCZOS)
    return np.asarray(image)


def collect(unpacked: Path, output: Path) -> None:
    """Write all photographs into one `.npz`, keyed `train/NAME` and `held-out/NAME`.

    Raises `ValueError` where a file is not the one that was listed.
    """
    pictures: dict[str, Picture] = {}
    for photograph in listed_photographs():
        path = find_file(photograph, unpacked)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if digest != photograph.sha256:
            raise ValueError(
                f"{path} has the SHA-256 {digest}, listed is {photograph.sha256}; fetch the "
                "version that photographs.json was made from"
            )
        split = "held-out" if photograph.is_held_out else "train"
        pictures[f"{split}/{photograph.name}"] = read_picture(path)
    np.savez(output, **pictures)  # type: ignore[arg-type]


def load_photographs(path: Path, split: str) -> list[Picture]:
    """Load the photographs of one split, "train" or "held-out", in the order of their names."""
    with np.load(path) as archive:
        names = sorted(name for name in archive.files if name.startswith(f"{split}/"))
        return [archive[name] for name in names]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--unpacked", type=Path, required=True, help="folder of unpacked packages")
    parser.add_argument("--output", type=Path, default=Path("photographs.npz"))
    arguments = parser.parse_args()
    collect(arguments.unpacked, arguments.output)
    print(f"wrote {arguments.output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
