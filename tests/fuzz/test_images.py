"""Files of all formats, damaged at random, through the one reader of images and through fid_reference's archives.

Whatever is damaged is read or refused by an InputError that names the file; nothing else is raised, and nothing hangs.
Bounded by time; the counts are printed (pytest -s).
"""

import io
import time
import warnings
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from varfast import InputError
from varfast.data.images import read_rgb
from varfast.evaluation.features import load_real_images

_SECONDS = 9.0


def originals():
    rng = np.random.RandomState(0)
    colours = Image.fromarray(rng.randint(0, 256, (24, 24, 3)).astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    clear = colours.convert("RGBA")
    clear.putalpha(100)
    grey = Image.fromarray(rng.randint(0, 65536, (24, 24)).astype(np.uint16))
    floats = Image.fromarray(rng.rand(24, 24).astype(np.float32))
    palette = colours.quantize(16)
    for name, image, settings in [
        ("rgb.jpg", colours, {"exif": exif}),
        ("progressive.jpg", colours, {"progressive": True}),
        ("cmyk.jpg", colours.convert("CMYK"), {}),
        ("rgb.png", colours, {"exif": exif}),
        ("rgba.png", clear, {}),
        ("grey16.png", grey, {}),
        ("palette.png", palette, {"transparency": 3}),
        ("animated.png", colours, {"save_all": True, "append_images": [colours.rotate(90)]}),
        ("bit.png", colours.convert("1"), {}),
        ("rgb.webp", colours, {"exif": exif}),
        ("rgba.webp", clear, {"lossless": True}),
        ("palette.gif", palette, {"save_all": True, "append_images": [palette.rotate(90)]}),
        ("rgb.bmp", colours, {}),
        ("palette.bmp", palette, {}),
        ("grey16.tif", grey, {}),
        ("float.tif", floats, {}),
        ("lzw.tif", colours, {"compression": "tiff_lzw"}),
        ("deflate.tif", colours, {"compression": "tiff_adobe_deflate"}),
        ("packbits.tif", colours, {"compression": "packbits"}),
        ("jpeg.tif", colours, {"compression": "jpeg"}),
        ("rgb.ppm", colours, {}),
        ("grey16.pgm", grey, {}),
    ]:
        file = io.BytesIO()
        kind = {"jpg": "JPEG", "tif": "TIFF", "ppm": "PPM", "pgm": "PPM"}.get(
            name[-3:], name.rpartition(".")[2].upper()
        )
        image.save(file, kind, **settings)
        yield name, file.getvalue()


def damaged(content, rng):
    content = bytearray(content)
    way = rng.randint(5)
    if way == 0:
        return bytes(content[: rng.randint(len(content))])
    if way == 1:  # the first bytes decide most
        for _ in range(rng.randint(1, 4)):
            content[rng.randint(min(64, len(content)))] = rng.randint(256)
    elif way == 2:
        for _ in range(rng.randint(1, 20)):
            content[rng.randint(len(content))] ^= 1 << rng.randint(8)
    elif way == 3:
        first, last = sorted(rng.randint(len(content), size=2))
        content[first:last] = rng.randint(0, 256, last - first).astype(np.uint8).tobytes()
    else:  # a length or an offset
        at = rng.randint(max(1, len(content) - 4))
        content[at : at + 4] = [b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\0\0", b"\xff\xff\xff\x7f"][
            rng.randint(4)
        ]
    return bytes(content)


def said(read, path):
    """The message of the InputError that reading a file raises; None if it is read."""
    try:
        read(path)
    except InputError as error:
        return str(error)
    return None


def attack(originals, read, tmp_path):
    """Damage one file after another for as long as there is time; (counts, the longest in seconds)."""
    rng, counts, longest = np.random.RandomState(1), Counter(), 0.0
    end = time.monotonic() + _SECONDS
    while time.monotonic() < end:
        for name, content in originals:
            path = tmp_path / name
            path.write_bytes(damaged(content, rng))
            begin = time.monotonic()
            message = said(read, path)
            counts[f"{path.suffix} {'refused' if message else 'read'}"] += 1
            assert message is None or (name in message and len(message) < 1000 and message.isprintable())
            longest = max(longest, time.monotonic() - begin)
    return counts, longest


def test_damaged_images_are_read_or_refused(tmp_path, capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        counts, longest = attack(list(originals()), lambda path: read_rgb(str(path), "pretrain.dataset=x"), tmp_path)
    capfd.readouterr()  # libtiff writes to the terminal by itself
    print(f"\n{sum(counts.values())} damaged images, longest {longest:.2f} s: {dict(sorted(counts.items()))}")
    assert sum(counts.values()) > 500
    assert {suffix for suffix, _, what in (key.partition(" ") for key in counts) if what == "refused"} >= {
        ".jpg",
        ".png",
    }


class Grey:
    """As features.DigitsPixels, of the first pixels alone."""

    name, width = "grey", 4

    def __call__(self, levels):
        return levels.flatten(1)[:, :4].double().numpy(), np.zeros((len(levels), 10))


def archives():
    rng = np.random.RandomState(0)
    for name, arrays in {
        "images.npz": {"arr_0": rng.randint(0, 256, (4, 8, 8, 3)).astype(np.uint8)},
        "statistics.npz": {"mu": np.zeros(4), "sigma": np.eye(4)},
    }.items():
        for save in (np.savez, np.savez_compressed):
            file = io.BytesIO()
            save(file, **arrays)
            yield name, file.getvalue()


@pytest.mark.filterwarnings("ignore")
def test_damaged_archives_are_read_or_refused(tmp_path):
    counts, longest = attack(list(archives()), lambda path: load_real_images(str(path), Grey(), 8), tmp_path)
    print(f"\n{sum(counts.values())} damaged archives, longest {longest:.2f} s: {dict(sorted(counts.items()))}")
    assert counts[".npz refused"] > 100
