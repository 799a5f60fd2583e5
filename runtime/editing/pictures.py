"""Pictures in and out: any file that a person may hand over becomes RGB, or is refused by name.

What is done to a picture, in this order: the first frame is taken, EXIF orientation is applied,
16 bits a sample are scaled to 8, colours with an embedded ICC profile (CMYK ones too) are brought
to sRGB, and transparent parts are laid on white.
"""

from __future__ import annotations

import io
import logging
import os
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageCms, ImageOps, PngImagePlugin, UnidentifiedImageError

from ditrim.engines.files import write_file
from ditrim.plugins.errors import UsageError

logger = logging.getLogger(__name__)

MAX_PIXELS = 100_000_000
MIN_SIDE = 16
MAX_ASPECT = 32
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}


def open_picture(path: str | os.PathLike[str]) -> Image.Image:
    """Read a picture as RGB, 8 bits a sample.

    Raises:
        UsageError: the file is missing, no picture, damaged, or of a size that cannot be edited:
            a side below 16 pixels, more than 100 megapixels, or sides more than 32 : 1.
    """
    path = Path(path)
    if not path.exists():
        raise UsageError(f"picture {path} does not exist")
    if not path.is_file():
        raise UsageError(f"picture {path} is {'a folder' if path.is_dir() else 'not a file'}")
    try:
        if path.stat().st_size == 0:
            raise UsageError(f"picture {path} is an empty file")
        return _read(path, path, MAX_PIXELS, _decoded)
    except PermissionError as error:
        raise UsageError(f"picture {path} cannot be read: {error.strerror}") from error


def picture_from_bytes(
    content: bytes, name: str, max_pixels: int = MAX_PIXELS, *, is_mask: bool = False
) -> Image.Image:
    """Read a picture that lies in memory as `open_picture` does.

    Args:
        content: of a file.
        name: what errors call it.
        max_pixels: more are refused by the header, before anything is decoded.
        is_mask: give the alpha channel (L, 0 where transparent) in place of colours.

    Raises:
        UsageError: see `open_picture`; of a mask also that it has no alpha channel.
    """
    if not content:
        raise UsageError(f"picture {name} is empty")
    decode = _alpha if is_mask else _decoded
    return _read(name, io.BytesIO(content), max_pixels, decode, _SENT)


def _alpha(name: Any, image: Image.Image) -> Image.Image:
    if not _is_transparent(image):
        raise UsageError(
            f"picture {name} has no alpha channel: a mask is a PNG whose transparent pixels may "
            "change"
        )
    return image.convert("RGBA").getchannel("A")


# Formats that are taken from a stranger; others call further programs or parsers.
_SENT = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF")


def _read(
    path: Any, file: Any, max_pixels: int, decode: Any, formats: tuple[str, ...] | None = None
) -> Image.Image:
    """Check a picture by its header, then decode it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit is below
            with Image.open(file, formats=formats) as image:
                _check_size(path, *image.size, max_pixels)
                decoded: Image.Image = decode(path, image)
                return decoded
    except UsageError:
        raise
    except UnidentifiedImageError as error:
        raise UsageError(
            f"picture {path} is not a picture in a format known here; use PNG, JPEG, WebP or TIFF"
        ) from error
    except Image.DecompressionBombError as error:
        raise UsageError(f"picture {path} is too large: {error}. {_DOWNSCALE}") from error
    except (MemoryError, PermissionError):
        raise
    except Exception as error:  # Pillow's decoders raise whatever a damaged file leads them to
        raise UsageError(f"picture {path} is damaged or truncated: {error}") from error


_DOWNSCALE = (
    f"At most {MAX_PIXELS // 1_000_000} megapixels are read; make it smaller first, for example "
    "with: mogrify -resize 4096x4096 FILE"
)


def _check_size(path: Any, width: int, height: int, max_pixels: int) -> None:
    """Refuse by the header, before anything is decoded."""
    if width * height > max_pixels:
        most = f"At most {max_pixels / 1e6:g} megapixels are read; make it smaller first"
        raise UsageError(
            f"picture {path} is {width}x{height}, {width * height / 1e6:.0f} megapixels. "
            f"{_DOWNSCALE if max_pixels == MAX_PIXELS else most}"
        )
    if min(width, height) < MIN_SIDE:
        raise UsageError(
            f"picture {path} is {width}x{height}: its shorter side must have at least "
            f"{MIN_SIDE} pixels, there is nothing to edit in fewer"
        )
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise UsageError(
            f"picture {path} is {width}x{height}: one side may be at most {MAX_ASPECT} times the "
            "other; crop it"
        )


def _decoded(path: Any, image: Image.Image) -> Image.Image:
    profile = image.info.get("icc_profile")
    num_frames = getattr(image, "n_frames", 1)
    if num_frames > 1 and image.format != "MPO":  # phones store a second view as MPO
        logger.warning("%s has %d frames; the first is used", path, num_frames)
    image.load()
    try:
        image = ImageOps.exif_transpose(image)
    except Exception as error:  # EXIF is written by anything and checked by nothing
        logger.warning("%s: its EXIF orientation cannot be read and is ignored (%s)", path, error)
    image = _eight_bits(path, image)
    if _is_transparent(image):
        layer = _srgb(path, image.convert("RGBA"), profile)
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    if image.mode not in ("L", "RGB", "CMYK"):
        image = image.convert("RGB")
    return _srgb(path, image, profile).convert("RGB")


def _is_transparent(image: Image.Image) -> bool:
    return image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info


def _eight_bits(path: Any, image: Image.Image) -> Image.Image:
    """Scale 16-bit grey to 8 bits; Pillow alone would clip it at 255."""
    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        return image
    samples: npt.NDArray[Any] = np.asarray(image)
    if image.mode == "F" or (image.mode == "I" and (samples.min() < 0 or samples.max() > 0xFFFF)):
        raise UsageError(
            f"picture {path} has 32 bits a sample, whose white is not defined; save it with 8 or 16"
        )
    return Image.fromarray(np.rint(samples.astype(np.float64) / 257).astype(np.uint8))


def _srgb(path: Any, image: Image.Image, profile: bytes | None) -> Image.Image:
    """Follow an embedded ICC profile; the picture as it is where there is none."""
    if not profile:
        return image
    target = "RGBA" if image.mode == "RGBA" else "RGB"
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        converted = ImageCms.profileToProfile(
            image, source, ImageCms.createProfile("sRGB"), outputMode=target
        )
    except (ImageCms.PyCMSError, OSError) as error:
        logger.warning("%s: its colour profile cannot be used and is ignored (%s)", path, error)
        return image
    assert converted is not None
    return converted


def check_picture_output(path: str | os.PathLike[str], option: str) -> Path:
    """Check that a picture can be written to `path`, before hours go into making it.

    Raises:
        UsageError: names `option`: an unknown ending, a folder that is not there, or no right.
    """
    path = Path(path)
    if path.suffix.lower() not in FORMATS:
        raise UsageError(
            f"{option} {path}: the ending {path.suffix!r} names no picture format; allowed: "
            f"{', '.join(FORMATS)}"
        )
    return check_output(path, option)


def check_output(path: str | os.PathLike[str], option: str) -> Path:
    """Check that a file can be written to `path`, as `check_picture_output` does."""
    path = Path(path)
    folder = path.parent
    if path.is_dir():
        raise UsageError(f"{option} {path} is a folder; give a file name in it")
    if path.exists() and not path.is_file():
        raise UsageError(f"{option} {path} is a device or a pipe; give a plain file")
    if not folder.exists():
        raise UsageError(
            f"{option} {path}: the folder {folder} does not exist; make it first: mkdir -p {folder}"
        )
    if not folder.is_dir():
        raise UsageError(f"{option} {path}: {folder} is not a folder")
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=f".{path.name[:32]}."):
            pass
    except OSError as error:
        raise UsageError(
            f"{option} {path}: the folder {folder} cannot be written to: {error.strerror}"
        ) from error
    return path


def save_picture(
    image: Image.Image, path: str | os.PathLike[str], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a picture beside its target, then move it there: never half a picture.

    Args:
        image: RGB.
        path: its ending decides the format.
        metadata: PNG text chunks; other formats keep none.

    Raises:
        DitrimError: the disk is full or the like; what stood at `path` stays.
    """
    path = Path(path)
    form = FORMATS[path.suffix.lower()]
    options: dict[str, Any] = {}
    if form == "JPEG":
        options = {"quality": 95}
    elif form == "WEBP":
        options = {"lossless": True}
    elif metadata:
        chunks = PngImagePlugin.PngInfo()
        for key, text in metadata.items():
            chunks.add_itxt(key, text)
        options = {"pnginfo": chunks}
    buffer = io.BytesIO()
    image.save(buffer, format=form, **options)
    write_file(path, buffer.getvalue())
