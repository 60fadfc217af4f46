import errno
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from varfast import InputError
from varfast.data import images
from varfast.data.images import check_images, list_images, natural_key, read_rgb

RAMP = np.linspace(0, 65535, 576).reshape(24, 24).astype(np.uint16)
RAMP_LEVELS = np.rint(RAMP / 257.0).astype(np.uint8)
COLOURS = np.random.RandomState(0).randint(0, 256, (20, 30, 3)).astype(np.uint8)


def read(path):
    return np.asarray(read_rgb(str(path), "here"))


def test_grey_of_16_bits_is_scaled(tmp_path):
    Image.fromarray(RAMP).save(tmp_path / "a.png")
    Image.fromarray(RAMP).save(tmp_path / "a.tif")
    Image.fromarray(RAMP).save(tmp_path / "a.pgm")
    Image.fromarray(RAMP).save(tmp_path / "zero_is_white.tif", tiffinfo={262: 0})
    for name in ("a.png", "a.tif", "a.pgm"):
        np.testing.assert_array_equal(read(tmp_path / name), np.stack([RAMP_LEVELS] * 3, axis=2), err_msg=name)
    np.testing.assert_array_equal(read(tmp_path / "zero_is_white.tif")[..., 0], 255 - RAMP_LEVELS)


def png(width, height, colour_type, rows, *chunks):
    """A PNG of 16 bits a channel, which Pillow cannot write in colour."""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    body = b"".join(b"\0" + row.astype(">u2").tobytes() for row in rows)
    parts = [
        chunk(b"IHDR", header),
        *(chunk(*c) for c in chunks),
        chunk(b"IDAT", zlib.compress(body)),
        chunk(b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def test_colours_and_alpha_of_16_bits_are_scaled(tmp_path):
    colours = RAMP[:8, :24].reshape(8, 8, 3)
    (tmp_path / "rgb.png").write_bytes(png(8, 8, 2, colours))
    assert np.abs(read(tmp_path / "rgb.png").astype(int) - colours / 257.0).max() <= 1
    clear = np.concatenate([colours, np.zeros((8, 8, 1), np.uint16)], axis=2)
    (tmp_path / "rgba.png").write_bytes(png(8, 8, 6, clear))
    assert (read(tmp_path / "rgba.png") == 255).all()
    (tmp_path / "clear_grey.png").write_bytes(png(8, 1, 0, RAMP[:1, :8], (b"tRNS", struct.pack(">H", int(RAMP[0, 5])))))
    assert np.flatnonzero(read(tmp_path / "clear_grey.png")[0, :, 0] == 255).tolist() == [5]


def test_floats_are_taken_in_0_to_1_and_numbers_without_a_white_are_refused(tmp_path):
    Image.fromarray((RAMP / 65535.0).astype(np.float32)).save(tmp_path / "unit.tif")
    np.testing.assert_array_equal(
        read(tmp_path / "unit.tif")[..., 0], np.rint((RAMP / 65535.0).astype(np.float32) * 255)
    )
    Image.fromarray(RAMP.astype(np.float32)).save(tmp_path / "large.tif")
    Image.fromarray(np.full((4, 4), np.nan, np.float32)).save(tmp_path / "nan.tif")
    Image.fromarray(RAMP.astype(np.int32)).save(tmp_path / "whole.tif")
    for name, said in (("large", "floats outside"), ("nan", "floats outside"), ("whole", "numbers of 32 bits")):
        with pytest.raises(
            InputError, match=rf"here: .*{name}.tif holds {said}.*save it with 8 or 16 bits; delete it or"
        ):
            read(tmp_path / f"{name}.tif")


@pytest.mark.parametrize("kind", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_cameras_rotation_is_applied(tmp_path, kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{kind}"
    Image.fromarray(COLOURS).save(path, exif=exif)
    with Image.open(path) as stored:
        wanted = ImageOps.exif_transpose(stored).convert("RGB")
    assert (wanted.size == (20, 30)) == (orientation >= 5)
    np.testing.assert_array_equal(read(path), np.asarray(wanted))


def test_metadata_that_cannot_be_read_is_no_reason_to_refuse(tmp_path):
    Image.fromarray(COLOURS).save(tmp_path / "a.png", exif=b"Exif\0\0II*\0\xff\xff\xff\x7f junk")
    np.testing.assert_array_equal(read(tmp_path / "a.png"), COLOURS)


def test_what_is_transparent_is_white(tmp_path):
    red = Image.new("RGBA", (6, 6), (255, 0, 0, 0))
    half = Image.new("RGBA", (6, 6), (255, 0, 0, 128))
    red.save(tmp_path / "rgba.png")
    red.save(tmp_path / "rgba.webp", lossless=True, exact=True)
    Image.new("LA", (6, 6), (0, 0)).save(tmp_path / "la.png")
    index = Image.new("P", (6, 6), 3)
    index.putpalette([0, 0, 0, 1, 1, 1, 2, 2, 2, 255, 0, 0])
    index.save(tmp_path / "index.gif", transparency=3)
    index.save(tmp_path / "table.png", transparency=bytes([255, 255, 255, 0]))
    Image.new("RGB", (6, 6), (255, 0, 0)).save(tmp_path / "key.png", transparency=(255, 0, 0))
    Image.new("L", (6, 6), 7).save(tmp_path / "grey.png", transparency=7)
    for name in ("rgba.png", "rgba.webp", "la.png", "index.gif", "table.png", "key.png", "grey.png"):
        assert (read(tmp_path / name) == 255).all(), name
    half.save(tmp_path / "half.png")
    assert read(tmp_path / "half.png")[0, 0].tolist() == [255, 127, 127]


def test_other_kinds_become_rgb(tmp_path):
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "cmyk.jpg", quality=100)
    Image.new("1", (8, 8), 1).save(tmp_path / "bit.png")
    Image.fromarray(COLOURS).quantize(16).save(tmp_path / "palette.png")
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for name in ("animated.gif", "animated.webp", "animated.png"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], lossless=True)
    assert np.abs(read(tmp_path / "cmyk.jpg")[0, 0].astype(int) - [255, 0, 0]).max() < 3
    assert (read(tmp_path / "bit.png") == 255).all()
    with Image.open(tmp_path / "palette.png") as stored:
        np.testing.assert_array_equal(read(tmp_path / "palette.png"), np.asarray(stored.convert("RGB")))
    for name in ("animated.gif", "animated.webp", "animated.png"):
        assert np.abs(read(tmp_path / name)[0, 0].astype(int) - [255, 0, 0]).max() < 3, name


@pytest.fixture
def troubled(tmp_path):
    """A folder with two good images and one file of every kind that cannot be read, and what is said of each."""
    folder = tmp_path / "set"
    folder.mkdir()
    Image.fromarray(COLOURS).save(folder / "good.PNG")
    Image.fromarray(COLOURS).save(folder / "good.JPeG")
    jpeg, lossless = (folder / "good.JPeG").read_bytes(), (folder / "good.PNG").read_bytes()
    Image.new("1", (20_000, 20_000)).save(folder / "bomb.png")
    for name, content in {
        "text.jpg": b"not an image",
        "cut.jpg": jpeg[: len(jpeg) * 2 // 3],
        "cut.png": lossless[: len(lossless) // 2],
        "empty.png": b"",
        "pointer.png": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        "page.jpg": b"<!DOCTYPE html><html>not found</html>",
        "postscript.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        "phone.jpg": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(99),
    }.items():
        (folder / name).write_bytes(content)
    (folder / "gone.png").symlink_to(tmp_path / "nowhere")
    (folder / "loop.png").symlink_to(folder / "loop.png")
    (folder / "folder.jpg").mkdir()
    os.mkfifo(folder / "pipe.png")
    (folder / "device.png").symlink_to("/dev/zero")
    return folder, {
        "text.jpg": "is broken or no image (not one of PNG",
        "cut.jpg": "is broken or no image (image file is truncated",
        "cut.png": "is broken or no image (",
        "empty.png": "is broken or no image (it is empty)",
        "pointer.png": "is broken or no image (a git-lfs pointer; fetch the images with git lfs pull)",
        "page.jpg": "is broken or no image (a web page)",
        "postscript.jpg": "is broken or no image (not one of PNG",
        "phone.jpg": "is broken or no image (HEIC or AVIF, which is not read; convert it to JPEG or PNG)",
        "bomb.png": "is too large: Image size (400000000 pixels) exceeds limit of 178956970 pixels",
        "gone.png": "is a link to nothing",
        "loop.png": "is a link to nothing",
        "folder.jpg": "is a folder with the name of an image",
        "pipe.png": "is a pipe (FIFO), no image",
        "device.png": "is a device, no image",
    }


@pytest.mark.parametrize("decoded_bytes", [2**30, 0], ids=["decoded", "both ends"])
def test_every_file_that_cannot_be_read_is_named_at_once(troubled, monkeypatch, decoded_bytes):
    monkeypatch.setattr(images, "_DECODED_BYTES", decoded_bytes)
    folder, said = troubled
    with pytest.raises(InputError) as error:
        check_images("here", list_images(str(folder)))
    head, *lines, advice = str(error.value).split("\n  ")
    assert head == f"here: {len(said)} of its files cannot be used"
    assert "delete it or replace it" in advice
    for name, reason in said.items():
        (line,) = (line for line in lines if f"/{name} " in line)
        assert reason in line
    assert not any("good" in line for line in lines)


def test_of_many_broken_files_the_first_are_named(tmp_path):
    for number in range(30):
        (tmp_path / f"{number}.png").write_bytes(b"x")
    with pytest.raises(InputError, match="30 of its files") as error:
        check_images("here", list_images(str(tmp_path)))
    assert "/19.png is" in str(error.value)
    assert "/20.png" not in str(error.value)
    assert "... and 10 more" in str(error.value)


def test_a_picture_of_too_many_pixels_is_refused_without_pillows_limit(troubled, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(
        InputError, match=r"is too large: 20000 x 20000 pixels, the most are 178,956,970; delete it or replace it"
    ):
        read(troubled[0] / "bomb.png")


def test_a_file_that_has_changed_since_is_named_when_it_is_read(troubled):
    for name, reason in {"pipe.png": "is a pipe", "gone.png": "No such file", "folder.jpg": "is a folder"}.items():
        with pytest.raises(
            InputError, match=rf"here: .*{name} .*{reason}.*; delete it or replace it, and run the command"
        ):
            read(troubled[0] / name)


def test_what_the_system_refuses_is_not_called_broken(tmp_path, monkeypatch):
    Image.fromarray(COLOURS).save(tmp_path / "a.png")

    def refuse(*args):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(InputError, match=r"a.png cannot be read \(Too many open files\)"):
        read(tmp_path / "a.png")


def test_hidden_files_and_loops_are_passed_over_and_links_are_followed(tmp_path):
    folder = tmp_path / ".data" / "set"  # what is hidden above the folder does not count
    (folder / "deep" / "deeper").mkdir(parents=True)
    for hidden in (".ipynb_checkpoints", "__MACOSX", "@eaDir"):
        (folder / hidden).mkdir()
        Image.fromarray(COLOURS).save(folder / hidden / "0.png")
    for path in ("10.png", "9.JPEG", "deep/deeper/1.Tiff", "._10.png"):
        Image.fromarray(COLOURS).save(folder / path, format="PNG")
    for other in ("Thumbs.db", ".DS_Store", "notes.txt", "phone.HEIC"):
        (folder / other).write_bytes(b"x")
    (folder / "deep" / "back").symlink_to(folder)
    (tmp_path / "elsewhere").mkdir()
    Image.fromarray(COLOURS).save(tmp_path / "elsewhere" / "2.png")
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    found = list_images(str(folder))
    names = [os.path.relpath(file.path, folder) for file in found.files]
    assert names == ["9.JPEG", "10.png", "deep/deeper/1.Tiff", "linked/2.png"]
    assert found.troubles == []
    assert found.passed_over == {"hidden": 6, ".txt": 1, ".heic": 1}


def test_natural_key_orders_numbers_by_value_and_other_names_as_ever():
    assert sorted(map(str, range(120)), key=natural_key) == [str(n) for n in range(120)]
    wordnet = ["n01440764", "n01443537", "n02099601", "n15075141"]
    assert sorted(wordnet, key=natural_key) == wordnet
    plain = ["B", "a", "b", "é", "²"]
    assert sorted(plain, key=natural_key) == sorted(plain)
    assert sorted(["1", "01", "a1b", "a01b"], key=natural_key) == ["01", "1", "a01b", "a1b"]
    sorted(["a", "1", "", "1a", "a1"], key=natural_key)  # text and numbers are never compared
