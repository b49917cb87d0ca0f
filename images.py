"""Read pictures as tensors: find the image files of a folder, and decode each as a viewer would show it."""

import sys
import threading
import warnings
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, features

from cli import UserError, printable

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".avif", ".heic", ".heif"}
PHONES = {".heic", ".heif"}  # read by a separate package
# Images in formats that are not supported: they are skipped with a message.
OTHER_SUFFIXES = {".svg", ".jp2", ".jxl", ".psd", ".ico", ".tga", ".ppm", ".pgm", ".eps", ".pdf", ".raw", ".dng", ".cr2", ".cr3", ".nef", ".arw"}
# The formats that are read, whatever a file's suffix. Some of Pillow's others start programs.
FORMATS = ["JPEG", "PNG", "BMP", "DIB", "WEBP", "GIF", "TIFF"] + ["AVIF"] * features.check("avif")
Image.MAX_IMAGE_PIXELS = None  # PIL's own limit is the same for all formats
MOST_PIXELS = {"JPEG": 2**28, "other": 2**27}  # phones write JPEGs of 200 megapixels, which can be decoded at reduced size
NODATA = 42113  # GDAL's TIFF tag
MOST_SCANS = 200  # of a progressive JPEG, which usually has ten or so; decoding each costs a pass over the whole picture
LARGE = 30_000_000  # pixels; of larger pictures, only one is decoded at a time
LARGE_ONE = threading.Lock()

# PIL warns of large pictures and of odd EXIF blocks. Filtered globally, since catch_warnings is not thread-safe.
warnings.filterwarnings("ignore", module=r"PIL\.")


def image_files(folder):
    """Paths of the image files in the folder itself, sorted by name. Raises UserError if there are none."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"the image folder {folder} does not exist" if not folder.exists()
                        else f"{folder} is a file: name the folder that holds the images")
    try:
        paths = sorted(folder.iterdir())
    except OSError as error:
        raise UserError(f"cannot read the folder {folder}: {error.strerror}") from None
    others = [path.name for path in paths if path.suffix.lower() in OTHER_SUFFIXES]
    paths = [path for path in paths if path.suffix.lower() in IMAGE_SUFFIXES
             and (not_a_folder(path) or path.is_symlink())]
    if others:
        print(f"passed over, since pictures of their kind are not read: {printable(', '.join(others[:5]))}"
              + (f" and {len(others) - 5} more" if len(others) > 5 else ""), file=sys.stderr)
    if not paths:
        raise UserError(f"the folder {folder} holds no images ({' '.join(sorted(IMAGE_SUFFIXES))})")
    return paths


def not_a_folder(path):
    """Whether a path is a file, or cannot be checked: such a path counts as a picture, so that it is reported as unreadable."""
    try:
        return path.is_file()
    except OSError:
        return True


def list_images(folder):
    """`image_files` as {stem: path}. Stems are the keys of predictions: raises UserError if two are the same."""
    images = {}
    for path in image_files(folder):
        if path.stem in images:
            raise UserError(f"{images[path.stem].name} and {path.name} would both be called {path.stem!r} in the "
                            "output: rename one")
        images[path.stem] = path
    return images


class ImageError(Exception):
    """A file that cannot be read as an image; the message is the reason."""


def load_image(path, side=None):
    """Read a picture as a viewer shows it: upright, first frame, transparency on white.

    Args:
        side: needed side length in pixels; larger JPEGs, and huge pictures of other formats, are decoded or shrunk to a
            fraction of their size, at least three times `side`, which looks the same, is much faster, and takes less memory.
    Returns an RGB PIL image. Raises ImageError.
    """
    try:
        with open_image(path) as image:
            pixels = image.width * image.height
            with LARGE_ONE if pixels > LARGE else nullcontext():
                if side:
                    image.draft(None, (3 * side, 3 * side))
                image.load()
                turn, tags = orientation(image), getattr(image, "tag_v2", {})  # a shrunk copy has none
                image = to_rgb(shrink(image, 3 * side) if side and pixels > LARGE else image, tags)
                return image.transpose(UPRIGHT[turn]) if turn in UPRIGHT else image
    except ImageError:
        raise
    except Image.UnidentifiedImageError:
        raise ImageError("not an image" if Path(path).stat().st_size else "the file is empty") from None
    except MemoryError:
        raise ImageError("there is no memory for it") from None
    except Exception as error:  # PIL's decoders raise OSError, SyntaxError, ValueError, struct.error, …
        raise ImageError(str(error).strip().split("\n")[0] or type(error).__name__) from None


def open_image(path):
    """Open a picture without decoding its pixels. Raises ImageError if decoding would take minutes or gigabytes."""
    if Path(path).suffix.lower() in PHONES and "HEIF" not in FORMATS:
        try:
            from pillow_heif import register_heif_opener  # optional package
        except ImportError:
            raise ImageError("pictures of its kind need a package: pip install pillow-heif") from None
        register_heif_opener()
        FORMATS.append("HEIF")
    image = Image.open(path, formats=FORMATS)
    pixels, most = image.width * image.height, MOST_PIXELS["JPEG" if image.format in ("JPEG", "MPO") else "other"]
    reason = None
    if pixels > most:
        reason = f"its size in pixels is absurd: {pixels / 1e6:.0f} million, more than {most / 1e6:.0f}"
    elif image.info.get("progressive"):
        # Within a scan, a byte FF is followed by 00, so these two bytes always start a scan.
        scans = Path(path).read_bytes().count(b"\xff\xda")
        if scans > MOST_SCANS:
            reason = f"decoding its {scans:,} scans would take too long"
    if reason:
        image.close()
        raise ImageError(reason)
    return image


def shrink(image, side):
    """A copy reduced by an integer factor, with sides of at least `side` pixels, as a mean over pixels; or the image itself."""
    factor = min(image.size) // side
    if factor < 2:
        return image
    if image.mode == "1":
        image = image.convert("L")
    if image.mode in ("L", "RGB", "RGBA", "LA", "CMYK", "YCbCr", "I", "F"):
        return image.reduce(factor)
    return image.resize([length // factor for length in image.size], Image.Resampling.NEAREST)  # palettes, 16 bits
def thumbnail(picture, pixels):
    """A copy whose longer side has at most so many pixels."""
    picture = picture.copy()
    picture.thumbnail((pixels, pixels), Image.Resampling.LANCZOS, reducing_gap=3.0)
    return picture


# EXIF orientation -> the transposition that turns such a picture upright.
UPRIGHT = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
           5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90}


def orientation(image):
    """The EXIF orientation, even if other EXIF data is damaged; None if there is none."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # PIL raises many kinds for damaged EXIF data; the picture may still be readable
        return None


def load_picture(path, size):
    """`load_image`, but an unreadable picture raises UserError with its path."""
    try:
        return load_image(path, size)
    except ImageError as error:
        raise UserError(f"{path} cannot be read: {error}") from None


def to_rgb(image, tags=None):
    """Any PIL mode -> RGB. `tags`: {number: value}, if the file is a TIFF."""
    if image.mode.startswith(("I", "F")):  # 16 and 32 bits: PIL's own conversion clips at 255
        tags = tags or {}
        grey = Image.fromarray(tones(np.asarray(image, dtype=np.float32), str(tags.get(NODATA, "")).strip("\0 ")))
        if image.mode.startswith("I;16") and tags.get(ExifTags.Base.PhotometricInterpretation) == 0:
            grey = ImageOps.invert(grey)  # "min is white": PIL itself inverts only 8 bits
        return grey.convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def tones(values, nodata=""):
    """Grey values of any range (rows, columns) -> uint8, as a viewer shows them.

    The range is that of the fewest bits that hold all values, or 0 to 1; if neither applies, from minimum to maximum, since there
    is no convention. Values that are not finite, or mean "no data", become black.
    """
    values = np.asarray(values, np.float64)
    known = np.isfinite(values)
    with suppress(ValueError):
        known &= values != np.float32(nodata)
    if not known.any():
        return np.zeros(values.shape, np.uint8)
    low, high = values[known].min(), values[known].max()
    if low >= 0 and (values[known] != values[known].round()).any() and high <= 1:
        low, high = 0, 1
    elif low >= 0 and high <= 65535:
        low, high = 0, next(2**bits - 1 for bits in (8, 10, 12, 14, 16) if high <= 2**bits - 1)
    scaled = np.where(known, values - low, 0) / max(high - low, 1e-12)
    return (255 * scaled.clip(0, 1)).round().astype(np.uint8)


def resize_to_square(image, size):
    """RGB PIL image of any size -> uint8 tensor (3, size, size): the whole picture, aspect ratio ignored, bicubic."""
    if image.size != (size, size):
        # reducing_gap: first box-filter large pictures to 3 times the target size, which looks the same and is much faster
        image = image.resize((size, size), Image.Resampling.BICUBIC, reducing_gap=3.0)
    return torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1)


def read_batches(batches, read, workers=4, waiting=3):
    """Read pictures in threads while the caller computes.

    Args:
        batches: lists of paths, or of any other argument of `read`, which may raise ImageError.
        waiting: maximum number of batches to read in advance.
    Yields, for each batch, [(path, result of `read` or the ImageError), …].
    """

    def attempt(path):
        try:
            return path, read(path)
        except ImageError as error:
            return path, error

    batches, queue = iter(batches), deque()
    with ThreadPoolExecutor(workers) as pool:
        while True:
            while len(queue) < waiting and (batch := next(batches, None)) is not None:
                queue.append([pool.submit(attempt, path) for path in batch])
            if not queue:
                return
            yield [future.result() for future in queue.popleft()]


def load_ahead(paths, preprocess, side, batch_size, workers=4):
    """`read_batches` of pictures as tensors.

    Yields (paths, images uint8 (B, 3, S, S) or None, [(path, ImageError), …] of unreadable pictures).
    """
    paths = list(paths)
    batches = (paths[start:start + batch_size] for start in range(0, len(paths), batch_size))
    for batch in read_batches(batches, lambda path: preprocess(load_image(path, side)), workers):
        good = [(path, image) for path, image in batch if not isinstance(image, ImageError)]
        bad = [(path, error) for path, error in batch if isinstance(error, ImageError)]
        yield [path for path, _ in good], torch.stack([image for _, image in good]) if good else None, bad


def ahead(function, items, count=2):
    """Yield `function` of each item, in order, computed by a thread up to `count` items ahead of the caller."""
    with ThreadPoolExecutor(1) as pool:
        waiting = deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > count:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
