"""Image files: which files of a folder are images, whether they can be read, and their pixels.

All of varfast reads images here, so that every file is treated alike:

- 16 bits a channel are scaled to 8; floats must be in [0, 1]; integers of 32 bits are refused.
- The camera's rotation (EXIF) is applied.
- Transparent pixels become white: pictures with alpha are mostly made for white pages, and the colour stored in
  invisible pixels is arbitrary.
- CMYK, palettes, grey and 1 bit become RGB; of an animation, the first frame is used.
- Colour profiles (ICC) and gamma are ignored, as in the usual ImageNet pipelines: values are taken as sRGB.

Only the formats listed here are opened, whatever a file is called: Pillow would start Ghostscript for PostScript.

Axes: H, W pixels.
"""

from __future__ import annotations

import io
import os
import re
import stat
import struct
import threading
import warnings
import zlib
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field

import numpy as np
from PIL import Image
from tqdm import tqdm

from varfast.printable import printable
from varfast.types import InputError

SUFFIXES = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm")
WHITE = (255, 255, 255, 255)  # the background of transparent images

_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
_MOST_PIXELS = 178_956_970  # half a GB of RGB; Pillow refuses more too
# What operating systems, NAS boxes and notebooks leave beside images, apart from names that begin with a dot.
_NO_DATA = {"__macosx", "@eadir", "#recycle", "$recycle.bin", "system volume information", "lost+found", "__pycache__",
            "thumbs.db", "desktop.ini"}  # fmt: skip
# Up to this size, every file is decoded before training: 1 GB of photographs takes one core half a minute.
_DECODED_BYTES = 2**30
_TAIL_BYTES = 64
_ENDS = {"JPEG": b"\xff\xd9", "PNG": b"IEND"}
_SHOWN = 20
# A small damaged file may claim 179 million pixels, which take 2 GB while they are converted. So images with more
# pixels than this are read one at a time.
_LARGE_PIXELS = 2**24
_one_large = threading.Lock()
_THREADS = 8
_BATCH_FILES = 1024
_MOST_PATH = 4096  # letters; the file's name is at the end of its path
_BAR_FROM = 5000
# What Pillow raises for damaged files (tests/fuzz/test_images.py).
_DAMAGE = (OSError, SyntaxError, ValueError, TypeError, LookupError, AttributeError, EOFError, ArithmeticError,
           AssertionError, NotImplementedError, struct.error, zlib.error, MemoryError, Image.DecompressionBombError,
           Image.DecompressionBombWarning)  # fmt: skip
_ORIENTATION = 0x0112
_PHOTOMETRIC = 262
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# _MOST_PIXELS is the limit here, not Pillow's; and Pillow warns about metadata of a few of ImageNet's photographs.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", module=r"PIL\.(Tiff|Jpeg|Png)ImagePlugin")


# ---------------------------------------------------------------------------------------------------------------------
# Which files are images


@dataclass(frozen=True, slots=True)
class ImageFile:
    """A file with the name of an image; size and time tell whether it has changed."""

    path: str
    bytes: int
    modified_ns: int


@dataclass
class Listing:
    """What a folder holds at any depth.

    Attributes:
        files: images, folder by folder in natural order.
        troubles: a line for each entry with the name of an image that is none: dangling link, folder, pipe, empty file.
        passed_over: how many other files were skipped, by suffix; hidden ones as "hidden".
    """

    files: list[ImageFile] = field(default_factory=list)
    troubles: list[str] = field(default_factory=list)
    passed_over: Counter[str] = field(default_factory=Counter)


def natural_key(name: str) -> tuple[tuple[str | int, ...], str]:
    """Sorts names with numbers as people do, 2 before 10, and other text by code points, as ImageFolder does."""
    parts = re.split(r"([0-9]+)", name)
    return tuple(int(part) if i % 2 else part for i, part in enumerate(parts)), name


def is_hidden(name: str) -> bool:
    """Whether a name is hidden, or of something that a system left behind (__MACOSX, @eaDir, Thumbs.db)."""
    return name.startswith(".") or name.lower() in _NO_DATA


def list_images(folder: str) -> Listing:
    """The images of a folder at any depth. Links are followed, each folder is read once, hidden names are skipped."""
    found = Listing()
    _walk(folder, found, set())
    return found


def sorted_entries(folder: str) -> list[os.DirEntry[str]]:
    """The entries of a folder in natural order. Raises: OSError if it cannot be read."""
    with os.scandir(folder) as entries:
        return sorted(entries, key=lambda entry: natural_key(entry.name))


def _walk(folder: str, found: Listing, seen: set[tuple[int, int]]) -> None:
    try:
        here = os.stat(folder)
        if (here.st_dev, here.st_ino) in seen:  # a link to a folder that was read already
            return
        seen.add((here.st_dev, here.st_ino))
        entries = sorted_entries(folder)
    except OSError as error:
        found.troubles.append(f"{printable(folder, _MOST_PATH)} is a folder that cannot be read ({error.strerror})")
        return
    for entry in entries:
        named_image = entry.name.lower().endswith(SUFFIXES)
        if is_hidden(entry.name):
            found.passed_over["hidden"] += 1
            continue
        try:
            status = entry.stat()
        except OSError as error:
            what = "is a link to nothing" if entry.is_symlink() else f"cannot be read ({error.strerror})"
            found.troubles.append(f"{printable(entry.path, _MOST_PATH)} {what}")
            continue
        if stat.S_ISDIR(status.st_mode):
            if named_image:
                found.troubles.append(f"{printable(entry.path, _MOST_PATH)} is a folder with the name of an image")
            else:
                _walk(entry.path, found, seen)
        elif not named_image:
            found.passed_over[os.path.splitext(entry.name)[1].lower() or "no suffix"] += 1
        elif not stat.S_ISREG(status.st_mode):
            found.troubles.append(f"{printable(entry.path, _MOST_PATH)} is {_kind(status.st_mode)}")
        else:
            found.files.append(ImageFile(entry.path, status.st_size, status.st_mtime_ns))


def _kind(mode: int) -> str:
    kinds = ((stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a pipe (FIFO)"), (stat.S_ISSOCK, "a socket"))
    return next((name for test, name in kinds if test(mode)), "a device") + ", no image"


# ---------------------------------------------------------------------------------------------------------------------
# Whether they can be read


def check_images(what: str, listing: Listing) -> None:
    """Read every file once, in 8 threads, so that training does not end at the first broken one.

    Up to 1 GB, all files are decoded. With more (ImageNet has 138 GB: its 1.28 million files would take one core 40
    minutes, at 1.75 ms each), only the two ends of JPEG and PNG files are read. That finds files that are cut off,
    empty, a web page or a git-lfs pointer, and takes 0.12 ms a file, 3 minutes for ImageNet (measured on a CPU, on 1000
    JPEGs of 71 kB from the page cache). Damage in the middle is reported when training reads the file.

    Args:
        what: the setting that names the folder, for errors.
    Raises: InputError that names the first 20 files that cannot be read, and how many there are.
    """
    quick = sum(file.bytes for file in listing.files) > _DECODED_BYTES
    check = _why_not_quickly if quick else _why_not
    bar = tqdm(total=len(listing.files), desc="reading images once", unit="file", leave=False,
               disable=None if len(listing.files) >= _BAR_FROM else True)  # fmt: skip
    troubles = list(listing.troubles)
    with bar, ThreadPoolExecutor(_THREADS) as pool:
        for first in range(0, len(listing.files), _BATCH_FILES):
            files = listing.files[first : first + _BATCH_FILES]
            reasons = pool.map(check, files)
            troubles += [f"{printable(f.path, _MOST_PATH)} {r}" for f, r in zip(files, reasons, strict=True) if r]
            bar.update(len(files))
    if not troubles:
        return
    count = "one of its files" if len(troubles) == 1 else f"{len(troubles)} of its files"
    rest = [f"... and {len(troubles) - _SHOWN} more"] if len(troubles) > _SHOWN else []
    advice = "Each of them: delete it or replace it, and run the command again"
    raise InputError("\n  ".join([f"{what}: {count} cannot be used", *troubles[:_SHOWN], *rest, advice]))


def _why_not(file: ImageFile) -> str | None:
    """Why a file cannot be read, by decoding it."""
    try:
        _read(file.path)
    except InputError as error:
        return str(error)
    return None


def _why_not_quickly(file: ImageFile) -> str | None:
    """Why a file cannot be read. Its first and last bytes are looked at; if they are unusual, it is decoded."""
    try:
        with _opened(file.path) as source, Image.open(source, formats=_FORMATS) as image:
            end = _ENDS.get(image.format or "")
            source.seek(-min(_TAIL_BYTES, file.bytes), os.SEEK_END)
            if end is not None and image.width * image.height <= _MOST_PIXELS and end in source.read():
                return None
    except _DAMAGE:
        pass  # decoding it below will say what is wrong
    return _why_not(file)


# ---------------------------------------------------------------------------------------------------------------------
# Their pixels


def read_rgb(path: str, what: str) -> Image.Image:
    """The picture in a file, RGB of 8 bits, upright.

    Args:
        what: the setting that names its folder, for errors.
    Raises: InputError that names the file, if it is broken, no image, or no longer there.
    """
    try:
        return _read(path)
    except InputError as error:
        raise InputError(
            f"{what}: {printable(path, _MOST_PATH)} {error}; delete it or replace it, and run the command again"
        ) from error


def _read(path: str) -> Image.Image:
    """Raises: InputError with what is wrong with the file."""
    try:
        with _opened(path) as source, Image.open(source, formats=_FORMATS) as image:
            if image.width * image.height > _MOST_PIXELS:
                raise InputError(f"is too large: {image.width} x {image.height} pixels, the most are {_MOST_PIXELS:,}")
            with _one_large if image.width * image.height > _LARGE_PIXELS else nullcontext():
                return _rgb(image)
    except InputError:
        raise
    except Image.DecompressionBombError as error:
        raise InputError(f"is too large: {first_line(error)}") from error
    except _DAMAGE as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise InputError(f"cannot be read ({error.strerror})") from error
        raise InputError(f"is broken or no image ({_looks_like(path) or first_line(error)})") from error


def _opened(path: str) -> io.BufferedReader:
    """A regular file, opened without waiting for a pipe or device in its place. Raises: OSError, InputError."""
    number = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    mode = os.fstat(number).st_mode
    if not stat.S_ISREG(mode):
        os.close(number)
        raise InputError(f"is {_kind(mode)}")
    return os.fdopen(number, "rb")


def _looks_like(path: str) -> str:
    """What a file is that is not an image, if its first bytes tell; else empty."""
    try:
        with _opened(path) as source:
            start = source.read(512).lstrip()
    except (OSError, InputError):
        return ""
    if not start:
        return "it is empty"
    if start.startswith(b"version https://git-lfs"):
        return "a git-lfs pointer; fetch the images with git lfs pull"
    if start[:15].lower().startswith((b"<!doctype html", b"<html")):
        return "a web page"
    if start.startswith(b"\x00\x05\x16\x07"):
        return "macOS metadata (AppleDouble)"
    if start[4:12] in (b"ftypheic", b"ftypheix", b"ftypmif1", b"ftypavif"):
        return "HEIC or AVIF, which is not read; convert it to JPEG or PNG"
    return "not one of " + ", ".join(_FORMATS) if not start.startswith(_MAGIC) else ""


_MAGIC = (b"\x89PNG", b"\xff\xd8", b"RIFF", b"BM", b"GIF8", b"II*", b"MM\x00*", b"II+", b"MM\x00+", b"P")


def first_line(error: BaseException) -> str:
    """The first line of an error, printable and of at most 200 letters."""
    lines = str(error).splitlines() or [type(error).__name__]
    text = printable(lines[0])
    # Pillow names the open file: <_io.BufferedReader name=7>
    return "cannot identify image file" if text.startswith("cannot identify") else text


def _rgb(image: Image.Image) -> Image.Image:
    image.load()
    turn = _TURNS.get(_orientation(image))
    clear = image.info.get("transparency")
    if image.mode.startswith("I") or image.mode == "F":
        picture = Image.fromarray(_levels(image, clear)).convert("RGB")
    elif image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or clear is not None:
        with_alpha = image.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", with_alpha.size, WHITE), with_alpha).convert("RGB")
    else:
        picture = image.convert("RGB")
    return picture if turn is None else picture.transpose(turn)


def _orientation(image: Image.Image) -> int:
    """The camera's orientation, from EXIF; upright if the metadata cannot be read."""
    try:
        found = image.getexif().get(_ORIENTATION)
    except _DAMAGE:
        return 1
    return found if isinstance(found, int) else 1


def _levels(image: Image.Image, clear: object) -> np.ndarray:
    """Grey with more than 8 bits as (H, W) uint8, white where transparent. (Pillow's own conversion clips it.)"""
    numbers_HW = np.asarray(image)
    if image.mode == "F":
        if not (np.isfinite(numbers_HW).all() and numbers_HW.min() >= 0.0 and numbers_HW.max() <= 1.0):
            raise InputError(
                "holds floats outside [0, 1], of which nobody says what is white; save it with 8 or 16 bits"
            )
        return np.rint(numbers_HW * np.float32(255.0)).astype(np.uint8)
    if image.mode == "I" and image.format == "TIFF":
        raise InputError("holds numbers of 32 bits, of which nobody says what is white; save it with 8 or 16 bits")
    levels = np.rint(np.arange(65536) / 257.0).astype(np.uint8)
    if getattr(image, "tag_v2", {}).get(_PHOTOMETRIC) == 0:  # 0 is white: Pillow inverts 8 bits, but not 16
        levels = levels[::-1].copy()
    if isinstance(clear, int) and 0 <= clear < 65536:
        levels[clear] = 255
    if image.mode == "I":  # as older Pillows read PNG, and all of them PGM of 16 bits
        numbers_HW = numbers_HW.clip(0, 65535)
    return levels[numbers_HW]


def passed_over(listings: Iterable[Listing]) -> str:
    """The five most frequent kinds of skipped files, as "12 .heic, 3 hidden"; empty if there are none."""
    counts: Counter[str] = Counter()
    for listing in listings:
        counts.update(listing.passed_over)
    return ", ".join(f"{count} {printable(name)}" for name, count in counts.most_common(5))
