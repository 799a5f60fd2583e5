"""What comes of the pictures that people hand over."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from ditrim.engines.files import write_file
from ditrim.plugins.errors import DitrimError, UsageError
from ditrim.runtime.editing import pictures as images
from ditrim.runtime.editing.pictures import check_picture_output, open_picture, save_picture

RED = (200, 30, 40)


def saved(path: Path, image: Image.Image, **options: object) -> Path:
    image.save(path, **options)
    return path


def test_plain_picture_comes_back_as_it_is(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    picture = open_picture(saved(tmp_path / "in.png", Image.fromarray(pixels)))
    assert picture.mode == "RGB"
    assert np.array_equal(np.asarray(picture), pixels)


@pytest.mark.parametrize("ending", ["png", "tif"])
def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path: Path, ending: str) -> None:
    ramp = np.linspace(0, 65535, 32 * 32).astype(np.uint16).reshape(32, 32)
    picture = open_picture(saved(tmp_path / f"in.{ending}", Image.fromarray(ramp)))
    assert np.abs(np.asarray(picture, float) - (ramp / 257)[..., None]).max() <= 0.5


def test_integer_samples_of_sixteen_bits_are_scaled(tmp_path: Path) -> None:
    picture = open_picture(saved(tmp_path / "in.tif", Image.new("I", (32, 32), 40000)))
    assert picture.getpixel((5, 5)) == (156, 156, 156)


@pytest.mark.parametrize(("mode", "value"), [("F", 0.5), ("I", 70000)])
def test_samples_of_32_bits_are_refused(tmp_path: Path, mode: str, value: float) -> None:
    path = saved(tmp_path / "in.tif", Image.new(mode, (32, 32), value))
    with pytest.raises(UsageError, match=r"in\.tif has 32 bits a sample.*save it with 8 or 16"):
        open_picture(path)


@pytest.mark.parametrize("ending", ["jpg", "tif"])
def test_cmyk_becomes_rgb_and_is_not_inverted(tmp_path: Path, ending: str) -> None:
    image = Image.new("RGB", (32, 32), RED).convert("CMYK")
    picture = open_picture(saved(tmp_path / f"in.{ending}", image))
    assert picture.getpixel((5, 5)) == pytest.approx(RED, abs=3)


def test_transparent_parts_are_laid_on_white(tmp_path: Path) -> None:
    image = Image.new("RGBA", (32, 32), (*RED, 255))
    image.putpixel((0, 0), (0, 0, 0, 0))
    image.putpixel((1, 0), (0, 0, 0, 128))
    picture = open_picture(saved(tmp_path / "in.png", image))
    assert picture.getpixel((0, 0)) == (255, 255, 255)
    assert picture.getpixel((1, 0)) == pytest.approx((127, 127, 127), abs=1)
    assert picture.getpixel((2, 0)) == RED


def test_grey_with_alpha_is_laid_on_white(tmp_path: Path) -> None:
    picture = open_picture(saved(tmp_path / "in.png", Image.new("LA", (32, 32), (0, 0))))
    assert picture.getpixel((0, 0)) == (255, 255, 255)


def test_palette_with_a_transparent_entry_is_laid_on_white(tmp_path: Path) -> None:
    image = Image.new("P", (32, 32))
    image.putpalette([255, 0, 0, 0, 255, 0])
    image.putpixel((3, 3), 1)
    picture = open_picture(saved(tmp_path / "in.png", image, transparency=0))
    assert picture.getpixel((0, 0)) == (255, 255, 255)
    assert picture.getpixel((3, 3)) == (0, 255, 0)


def test_bilevel_picture_becomes_rgb(tmp_path: Path) -> None:
    picture = open_picture(saved(tmp_path / "in.png", Image.new("1", (32, 32), 1)))
    assert picture.getpixel((0, 0)) == (255, 255, 255)


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it rotated by 90 degrees clockwise
    image = Image.new("RGB", (40, 20), RED)
    image.paste((0, 0, 255), (0, 0, 20, 20))
    picture = open_picture(saved(tmp_path / "in.png", image, exif=exif))
    assert picture.size == (20, 40)
    assert picture.getpixel((10, 5)) == (0, 0, 255)


def test_colour_profile_is_followed(tmp_path: Path) -> None:
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB"))
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
    image = Image.new("RGB", (32, 32), RED)
    picture = open_picture(saved(tmp_path / "a.png", image, icc_profile=srgb.tobytes()))
    assert picture.getpixel((0, 0)) == pytest.approx(RED, abs=2)
    # A profile of another colour model cannot be the picture's: it is named and passed over.
    picture = open_picture(saved(tmp_path / "b.png", image, icc_profile=lab.tobytes()))
    assert picture.getpixel((0, 0)) == RED


def test_broken_colour_profile_is_named_and_ignored(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = saved(tmp_path / "in.png", Image.new("RGB", (32, 32), RED), icc_profile=b"nonsense")
    with caplog.at_level(logging.WARNING, "ditrim"):
        assert open_picture(path).getpixel((0, 0)) == RED
    assert "in.png: its colour profile cannot be used and is ignored" in caplog.text


def test_first_frame_of_an_animation_is_used_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "green", "blue")]
    path = saved(tmp_path / "in.gif", frames[0], save_all=True, append_images=frames[1:])
    with caplog.at_level(logging.WARNING, "ditrim"):
        assert open_picture(path).getpixel((0, 0)) == (255, 0, 0)
    assert "in.gif has 3 frames; the first is used" in caplog.text


def test_missing_folder_empty_and_foreign_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("not a picture")
    for name, cause in {
        "nowhere.png": "does not exist",
        ".": "is a folder",
        "empty.png": "is an empty file",
        "text.png": "is not a picture in a format known here; use PNG, JPEG, WebP or TIFF",
    }.items():
        with pytest.raises(UsageError) as caught:
            open_picture(tmp_path / name)
        assert str(caught.value) == f"picture {tmp_path / name} {cause}"


@pytest.mark.parametrize("ending", ["png", "jpg", "webp", "gif", "tif"])
@pytest.mark.parametrize("share", [0.3, 0.7])
def test_truncated_picture_is_named(tmp_path: Path, ending: str, share: float) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = saved(tmp_path / f"in.{ending}", Image.fromarray(pixels))
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(UsageError, match=rf"^picture \S*in\.{ending} is "):
        open_picture(path)


@pytest.mark.parametrize("size", [(1, 1), (300, 15)])
def test_picture_too_small_to_edit_names_its_size_and_the_least(
    tmp_path: Path, size: tuple[int, int]
) -> None:
    path = saved(tmp_path / "in.png", Image.new("RGB", size))
    with pytest.raises(
        UsageError, match=rf"is {size[0]}x{size[1]}: its shorter side must have at least 16 pixels"
    ):
        open_picture(path)


def test_picture_of_extreme_proportions_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "in.png", Image.new("RGB", (1700, 50)))
    with pytest.raises(UsageError, match=r"1700x50: one side may be at most 32 times the other"):
        open_picture(path)


@pytest.mark.parametrize("side", [11_000, 20_000])
def test_huge_picture_is_refused_before_it_is_decoded(
    tmp_path: Path, side: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(tmp_path / "in.png", Image.new("1", (side, side)))
    monkeypatch.setattr(images, "_decoded", lambda *_: pytest.fail("it was decoded"))
    with pytest.raises(UsageError, match=r"At most 100 megapixels are read; make it smaller"):
        open_picture(path)


def test_output_with_unknown_ending_names_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match=r"--output \S*out\.tga: the ending '\.tga'.*\.png, \.jpg, \.jpeg, \.webp"
    ):
        check_picture_output(tmp_path / "out.tga", "--output")


def test_output_folder_that_is_missing_or_a_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"the folder \S*/no does not exist.*mkdir -p"):
        check_picture_output(tmp_path / "no" / "out.png", "--output")
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"/file is not a folder"):
        check_picture_output(tmp_path / "file" / "out.png", "--output")
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(UsageError, match=r"folder\.png is a folder; give a file name in it"):
        check_picture_output(tmp_path / "folder.png", "--output")


def test_output_folder_without_the_right_to_write_is_named() -> None:
    with pytest.raises(UsageError, match=r"--output /proc/out\.png: the folder /proc cannot be"):
        check_picture_output("/proc/out.png", "--output")


@pytest.mark.parametrize("ending", ["png", "jpg", "jpeg", "webp"])
def test_every_ending_is_written_and_nothing_is_left_beside_it(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"out.{ending}"
    save_picture(Image.new("RGB", (32, 32), RED), path, {"prompt": "mach es größer 大"})
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    with Image.open(path) as image:
        assert image.convert("RGB").getpixel((9, 9)) == pytest.approx(RED, abs=3)
        if ending == "png":
            assert image.text["prompt"] == "mach es größer 大"  # type: ignore[attr-defined]


def test_failed_write_keeps_the_old_file_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "out.png"
    path.write_bytes(b"old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(images.os, "replace", full)
    with pytest.raises(DitrimError, match=r"out\.png could not be written: No space left"):
        write_file(path, b"new")
    assert path.read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 1
