"""Images and captions: folders of pictures, COCO-format captions, collation, cached encoder features."""

import hashlib
import json
import os
import re
import shutil
import sys
import threading
import warnings
import zlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass
from fcntl import LOCK_EX, flock
from pathlib import Path, PurePath

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, features
from tqdm import tqdm

from cli import UserError, is_file, printable, read_json, write_json
from tokenizer import END_OF_TEXT

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".avif", ".heic", ".heif"}
PHONES = {".heic", ".heif"}  # which a package of its own reads
# Pictures too, but not read here: a folder's are named when they are passed over.
OTHER_SUFFIXES = {".svg", ".jp2", ".jxl", ".psd", ".ico", ".tga", ".ppm", ".pgm", ".eps", ".pdf", ".raw", ".dng", ".cr2", ".cr3", ".nef", ".arw"}
# What is read, whatever a file's name says. Some of Pillow's other formats start programs.
FORMATS = ["JPEG", "PNG", "BMP", "DIB", "WEBP", "GIF", "TIFF"] + ["AVIF"] * features.check("avif")
Image.MAX_IMAGE_PIXELS = None  # PIL's own bound knows one number for all formats
MOST_PIXELS = {"JPEG": 2**28, "other": 2**27}  # a phone's 200 megapixels are JPEGs, which decode at a fraction of their size
NODATA = 42113  # GDAL's TIFF tag
MOST_SCANS = 200  # of a progressive JPEG, which has ten or so; each is decoded over all of the picture
LARGE = 30_000_000  # pixels of a picture beside which no other such is decoded
LARGE_ONE = threading.Lock()
IGNORE = -100  # the target that cross_entropy leaves out

# PIL warns of large pictures and of odd EXIF blocks. Once for all: catch_warnings is not for threads.
warnings.filterwarnings("ignore", module=r"PIL\.")


# ---- images ----------------------------------------------------------------------------------------------------


def image_files(folder):
    """Paths of the folder's own image files, sorted by name. Raises UserError where there are none."""
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
    """Whether a file is there, or something that cannot be asked about: a name of a picture is then a picture's, to be named."""
    try:
        return path.is_file()
    except OSError:
        return True


def list_images(folder):
    """`image_files` as {stem: path}; stems are the keys of predictions, so no two may be the same."""
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
    """Read a picture as a person would see it: upright, first frame, on white where transparent.

    Args:
        side: length in pixels that is needed; a larger JPEG, or a huge picture of another format, is decoded or shrunk to a
            fraction of its size, three times `side` or more, which is visually the same, much faster, and takes less memory.
    Returns an RGB PIL image. Raises ImageError.
    """
    try:
        with open_image(path) as image:
            pixels = image.width * image.height
            with LARGE_ONE if pixels > LARGE else nullcontext():
                if side:
                    image.draft(None, (3 * side, 3 * side))
                image.load()
                turn, tags = orientation(image), getattr(image, "tag_v2", {})  # which a shrunk copy would lack
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
    """Open a picture, its pixels not decoded yet. Raises ImageError for one that would take minutes or gigabytes."""
    if Path(path).suffix.lower() in PHONES and "HEIF" not in FORMATS:
        try:
            from pillow_heif import register_heif_opener  # not before it is needed
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
        # Within a scan a byte FF is followed by 00, so these two bytes are nothing but a scan's beginning.
        scans = Path(path).read_bytes().count(b"\xff\xda")
        if scans > MOST_SCANS:
            reason = f"decoding its {scans:,} scans would take too long"
    if reason:
        image.close()
        raise ImageError(reason)
    return image


def shrink(image, side):
    """A copy with sides a whole number of times smaller, of at least `side` pixels, as a mean over pixels; or the image itself."""
    factor = min(image.size) // side
    if factor < 2:
        return image
    if image.mode == "1":
        image = image.convert("L")
    if image.mode in ("L", "RGB", "RGBA", "LA", "CMYK", "YCbCr", "I", "F"):
        return image.reduce(factor)
    return image.resize([length // factor for length in image.size], Image.Resampling.NEAREST)  # palettes, 16 bits


# EXIF's orientations, as what turns such a picture upright.
UPRIGHT = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
           5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90}


def orientation(image):
    """How its EXIF data says that it lies, of which nothing else has to be in order; None where it says nothing."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # whatever damaged EXIF data makes of PIL: the picture is there all the same
        return None


def load_picture(path, size):
    """`load_image` for those who cannot do without the picture. Raises UserError, which names it."""
    try:
        return load_image(path, size)
    except ImageError as error:
        raise UserError(f"{path} cannot be read: {error}") from None


def to_rgb(image, tags=None):
    """Any PIL mode -> RGB. `tags`: of the TIFF that it was, by number."""
    if image.mode.startswith(("I", "F")):  # 16 and 32 bits, which PIL's own conversion clips at 255
        tags = tags or {}
        grey = Image.fromarray(tones(np.asarray(image, dtype=np.float32), str(tags.get(NODATA, "")).strip("\0 ")))
        if image.mode.startswith("I;16") and tags.get(ExifTags.Base.PhotometricInterpretation) == 0:
            grey = ImageOps.invert(grey)  # "min is white": PIL turns those of 8 bits itself
        return grey.convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def tones(values, nodata=""):
    """Grey values of any range (rows, columns) -> uint8, as a viewer shows them.

    The range is that of the fewest bits that hold all values, or from 0 to 1; else, since there is none agreed on, from the
    least to the greatest. What is not finite, or stands for "no data", is black.
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


def squeeze(image, size):
    """RGB PIL image of any size -> uint8 tensor (3, size, size): the whole picture, aspect ignored, bicubic."""
    if image.size != (size, size):
        # reducing_gap: box-shrink big photographs to 3 times the target first, visually the same, much faster
        image = image.resize((size, size), Image.Resampling.BICUBIC, reducing_gap=3.0)
    return torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1)


def load_ahead(paths, preprocess, side, batch_size, workers=4):
    """Decode images in threads while the caller computes.

    Yields (paths, images uint8 (B, 3, S, S) or None, [(path, reason), …] of those that could not be read).
    At most three batches wait in memory.
    """

    def read(path):
        try:
            return preprocess(load_image(path, side))
        except ImageError as error:
            return str(error)

    paths = list(paths)
    with ThreadPoolExecutor(workers) as pool:
        waiting = deque()
        starts = iter(range(0, len(paths), batch_size))
        while True:
            while len(waiting) < 3 and (start := next(starts, None)) is not None:
                batch = paths[start:start + batch_size]
                waiting.append((batch, [pool.submit(read, path) for path in batch]))
            if not waiting:
                return
            batch, futures = waiting.popleft()
            results = [future.result() for future in futures]
            good = [(path, x) for path, x in zip(batch, results) if not isinstance(x, str)]
            bad = [(path, x) for path, x in zip(batch, results) if isinstance(x, str)]
            yield [path for path, _ in good], torch.stack([x for _, x in good]) if good else None, bad


# ---- captions --------------------------------------------------------------------------------------------------


@dataclass
class CaptionedImage:
    path: Path
    captions: list


def clean_caption(text):
    """One style for training text: single spaces, none before punctuation, a capital first, a full stop last.

    Metrics are blind to all of it, and a language model that need not guess the style spends no
    probability, and no beam, on saying the same thing twice.
    """
    text = re.sub(r"\s+([.,;:!?]+(?!\S)|['’](?:s|re|ve|ll|d|m|t)\b|['’](?!\S))", r"\1", " ".join(text.split())).rstrip(" .,;:")
    return text[:1].upper() + text[1:] + ("" if text.endswith(("!", "?")) else ".") if text else ""


def clean_captions(image):
    """The captions of a CaptionedImage in that style, without those that say nothing."""
    return [text for text in map(clean_caption, image.captions) if text]


def read_captions(annotation_file, images_root):
    """Read COCO-format captions: a list of CaptionedImage in the file's order, captions as they are.

    `images_root` None: the captions alone matter, and no image is looked for.
    Raises UserError for a file of another form, ids that are there twice, a caption of an unlisted image, or a
    missing image file.
    """
    data = read_json(annotation_file, "captions file")
    root = Path(images_root or ".")
    if not root.is_dir():
        raise UserError(f"the image folder {root} does not exist")
    try:
        items, names = {}, set()
        for image in data["images"]:
            name = image["file_name"]
            if PurePath(name).is_absolute() or ".." in PurePath(name).parts:
                raise UserError(f"{annotation_file} names {name!r}, which leads out of the folder of images")
            if image["id"] in items:
                raise UserError(f"{annotation_file} has two images with the id {image['id']!r}: captions could mean either")
            if name in names:
                raise UserError(f"{annotation_file} has two images with the file name {name!r}: captions could mean either")
            names.add(name)
            items[image["id"]] = CaptionedImage(root / image["file_name"], [])
        ids = set()
        for annotation in data["annotations"]:
            if "id" in annotation and annotation["id"] in ids:
                raise UserError(f"{annotation_file} has two captions with the id {annotation['id']!r}: were files joined?")
            ids.add(annotation.get("id"))
            if not isinstance(annotation["caption"], str):
                raise TypeError(f"caption {annotation['caption']!r} is not a string")
            items[annotation["image_id"]].captions.append(annotation["caption"])
    except (LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{annotation_file} is not in COCO's caption form (images: id, file_name; "
                        f"annotations: image_id, caption): {type(error).__name__} {error}") from None
    missing = [item.path for item in items.values() if images_root and not is_file(item.path)]
    if missing:
        raise UserError(f"{len(missing)} images of {annotation_file} are not in {root}, the first is {missing[0].name}")
    return list(items.values())


class Folder:
    """A folder in the course's layout: its pictures that have captions, and which of them are kept aside.

    Attributes: `path`; `images`, CaptionedImages in the file's order; `train`, how many of them, the first, are to train on;
    `without_captions`, how many others there are.
    """

    def __init__(self, path, selection=0):
        """Raises UserError unless pictures are left once the last `selection` are kept aside."""
        self.path = Path(path)
        images = read_captions(self.path / "train.json", self.path / "images" / "train")
        self.images = [image for image in images if clean_captions(image)]
        self.without_captions = len(images) - len(self.images)
        self.train = len(self.images) - selection
        if not 0 < self.train <= len(self.images):
            raise UserError(f"{len(self.images)} images of {path} cannot be split into training and {selection} for selection")

    def paths(self):
        return [image.path for image in self.images]


def write_subset(data, folder, count):
    """Write a folder in the course's layout with the first images of another's train.json alone."""
    data, folder = Path(data), Path(folder)
    images = folder / "images" / "train"
    images.parent.mkdir(parents=True, exist_ok=True)
    if images.resolve() != (data / "images" / "train").resolve():
        images.unlink(missing_ok=True)
        images.symlink_to((data / "images" / "train").resolve(), target_is_directory=True)
    coco = read_json(data / "train.json", "captions file")
    kept = coco["images"][:count]
    ids = {image["id"] for image in kept}
    write_json(folder / "train.json", {
        "images": kept, "annotations": [item for item in coco["annotations"] if item["image_id"] in ids]})


def collate(captions):
    """Token lists -> input and target (R, T), laid out for next-token prediction.

    [g1 … gN] becomes input [50256, g1 … gN, 50256 …] and target [g1 … gN, 50256, -100 …]. An empty list
    stands for no caption: its targets are all -100.
    """
    length = max(len(tokens) for tokens in captions) + 1
    inputs = torch.full((len(captions), length), END_OF_TEXT)
    targets = torch.full((len(captions), length), IGNORE)
    for row, tokens in enumerate(captions):
        if tokens:
            inputs[row, 1:len(tokens) + 1] = torch.tensor(tokens)
            targets[row, :len(tokens) + 1] = torch.tensor([*tokens, END_OF_TEXT])
    return inputs, targets


def bucketed_batches(lengths, batch_size, generator):
    """Shuffled batches of indices whose lengths are alike, so that little is padding.

    Sorting by length within random pools of 20 batches keeps batches random enough.
    """
    order = torch.randperm(len(lengths), generator=generator).tolist()
    batches = []
    for start in range(0, len(order), 20 * batch_size):
        pool = sorted(order[start:start + 20 * batch_size], key=lambda i: lengths[i])
        batches += [pool[i:i + batch_size] for i in range(0, len(pool), batch_size)]
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


# ---- cached features -------------------------------------------------------------------------------------------


def make_view(image, view, seed):
    """View 0 is the picture, later ones are random crops of at least 60%, every other, from the first on, mirrored.

    Returns an RGB PIL image; the same for the same (view, seed).
    """
    if view:
        random = np.random.default_rng((seed, view))
        width, height = image.size
        w, h = (max(1, round(length * random.uniform(0.775, 1))) for length in (width, height))
        x, y = random.integers(0, width - w + 1), random.integers(0, height - h + 1)
        image = image.crop((x, y, x + w, y + h))
    return ImageOps.mirror(image) if view % 2 else image


def read_views(path, encoder, views, seed):
    """These views of a picture, preprocessed: uint8 (views, 3, S, S). Raises ImageError."""
    image = load_image(path, encoder.image_size)
    return torch.stack([encoder.preprocess(make_view(image, view, seed)) for view in views])


def ahead(function, items, count=2):
    """`function` of each item, in order, worked out by a thread while the caller is busy with earlier ones."""
    with ThreadPoolExecutor(1) as pool:
        waiting = deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > count:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


class SomeFeatures:
    """Features of some images of several caches, numbered anew.

    Args:
        parts: FeatureCaches, or LiveFeatures, with as many views.
        numbers: (part, its number there) of each image.
    """

    def __init__(self, parts, numbers):
        self.parts, self.numbers = parts, np.array(numbers, int).reshape(-1, 2)

    def __len__(self):
        return len(self.numbers)

    def __getitem__(self, index_and_view):
        """(image numbers, view numbers) -> features (B, N, D), fp16 tensor"""
        index, view = np.broadcast_arrays(*map(np.asarray, index_and_view))
        part, number = self.numbers[index].T
        places = [(one, np.flatnonzero(part == one)) for one in np.unique(part)]
        rows = [(place, self.parts[one][number[place], view[place]]) for one, place in places]
        if len(rows) == 1:
            return rows[0][1]
        features = rows[0][1].new_empty(len(index), *rows[0][1].shape[1:])
        for place, some in rows:
            features[place] = some
        return features


class LiveFeatures:
    """The same features as FeatureCache's, encoded anew each time they are asked for: no disk, but far slower."""

    def __init__(self, encoder, paths, views=1, device="cpu"):
        self.encoder, self.paths, self.views, self.device = encoder.to(device), paths, views, device
        self.pool = ThreadPoolExecutor(4)

    def __len__(self):
        return len(self.paths)

    @torch.inference_mode()
    def __getitem__(self, index_and_view):
        """(image numbers, view numbers) -> features (B, N, D), fp16 tensor. Raises UserError for a broken image."""
        try:
            images = torch.cat(list(self.pool.map(self.read, *index_and_view)))
        except ImageError as error:
            raise UserError(f"{error}: mend the picture or drop it") from None
        images = images.to(self.encoder.mean.device)  # not "cuda", which in another thread than the first is GPU 0
        with torch.autocast("cuda", torch.float16, enabled=self.device == "cuda"):
            return self.encoder(images).half()

    def read(self, number, view):
        try:
            return read_views(self.paths[number], self.encoder, [view], int(number))
        except ImageError as error:
            raise ImageError(f"{self.paths[number]} cannot be read: {error}") from None


def fingerprint(path):
    """Size in bytes and a checksum of the file: not its date, so that a copy of a dataset is the same."""
    size, checksum = 0, 0
    with suppress(OSError), open(path, "rb") as file:  # one that cannot be read is named when it is encoded
        while part := file.read(2**20):
            size, checksum = size + len(part), zlib.crc32(part, checksum)
    return size, checksum


def fingerprints(paths):
    """(name, size, checksum) of each file, read by several threads."""
    with ThreadPoolExecutor() as pool:
        return [(path.name, *found) for path, found in zip(paths, pool.map(fingerprint, paths))]


def data_digest(images):
    """sha256 over CaptionedImages: names, captions and fingerprints of the pictures, in their order."""
    found = [[*of_file, image.captions] for of_file, image in zip(fingerprints([image.path for image in images]), images)]
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()


class FeatureCache:
    """Frozen features of images, encoded once and read by memory map: fp16, for each view (images, N, D).

    A view's file is named by a digest of the encoder's weights and levels, the images and the view, so a change of any
    makes a new one, and more views of the same images add only theirs. An interrupted build goes on where it stopped; of
    two runs that want the same features, one computes and the other waits.

    Attributes: `files`, `data`, a file and its array (images, N, D) for each view.
    """

    def __init__(self, encoder, paths, folder, views=1, batch_size=32, device="cpu"):
        folder = Path(folder)
        images = fingerprints(paths)
        of_all = [encoder.name, encoder.weights_hash, encoder.image_size, *([encoder.dim] if encoder.levels > 1 else []),
                  device, images]
        self.files = [folder / f"{hashlib.sha256(json.dumps([view, *of_all]).encode()).hexdigest()[:16]}.npy"
                      for view in range(views)]
        shape = (len(paths), encoder.num_tokens, encoder.dim)
        if not all(self._is_whole(file, shape) for file in self.files):  # a full cache may be one that can only be read
            try:
                self._fill(folder, shape, encoder, paths, batch_size, device)
            except OSError as error:
                raise UserError(f"cannot keep features in the cache {folder}: {error.strerror or error}") from None
        self.data = [np.load(file, mmap_mode="r") for file in self.files]

    def __len__(self):
        return len(self.data[0])

    def _fill(self, folder, shape, encoder, paths, batch_size, device):
        """Encode what is missing."""
        folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as locks:
            for file in self.files:  # in one order, so that no two runs wait for each other
                flock(locks.enter_context(open(file.with_suffix(".lock"), "w")), LOCK_EX)
            done = [self._done(file, shape) for file in self.files]
            missing = [view for view, count in enumerate(done) if count < len(paths)]
            size = 2 * int(np.prod(shape)) * sum(not done[view] for view in missing)
            if size > shutil.disk_usage(folder).free:
                raise UserError(f"the features need {size / 1e9:.1f} GB in {folder}, more than is free there: name "
                                "another --cache or fewer --views")
            if not missing:  # another run has encoded them meanwhile
                return
            print(f"encoding {len(paths)} images in {len(missing)} views: {2 * int(np.prod(shape)) * len(missing) / 1e9:.1f} GB in {folder}",
                  file=sys.stderr)
            data = {}
            for view in missing:
                data[view] = np.lib.format.open_memmap(self.files[view], "r+" if done[view] else "w+", np.float16, shape)
                with open(self.files[view], "r+b") as file:  # a disk that fills up later would kill the process
                    os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
            self._build(data, encoder.to(device), paths, min(done[view] for view in missing),
                        max(1, batch_size // len(missing)), device)

    @classmethod
    def _is_whole(cls, file, shape):
        try:
            return cls._done(file, shape) == shape[0]
        except OSError:
            return False

    @staticmethod
    def _done(file, shape):
        """How many images of this file are encoded; 0 for a file that is damaged."""
        progress = file.with_suffix(".json")
        if not is_file(progress) or not is_file(file):
            return 0
        try:
            done = read_json(progress, "cache")["done"]
            whole = np.load(file, mmap_mode="r").shape == shape  # raises ValueError for one that was cut
        except (UserError, LookupError, TypeError, ValueError, EOFError):
            return 0
        return done if whole and isinstance(done, int) and 0 < done <= shape[0] else 0

    @torch.inference_mode()
    def _build(self, data, encoder, paths, done, batch_size, device):
        """Encode the views that are the keys of `data`, from image number `done` on."""
        numbers = {path: number for number, path in enumerate(paths)}

        def read(path):
            try:
                return read_views(path, encoder, data, numbers[path])
            except ImageError as error:
                return f"{path.name}: {error}"

        with ThreadPoolExecutor() as pool, tqdm(total=len(paths), initial=done, desc="encoding", unit="image") as bar:
            for start in range(done, len(paths), batch_size):
                images = list(pool.map(read, paths[start:start + batch_size]))
                if any(isinstance(image, str) for image in images):  # name all there are, not one a run
                    bad = [image for image in pool.map(read, paths[start:]) if isinstance(image, str)]
                    raise UserError(f"{len(bad)} images cannot be read, mend or drop them: {'; '.join(bad[:10])}"
                                    + ("; …" if len(bad) > 10 else ""))
                images = torch.stack(images)  # (B, views, 3, S, S)
                with torch.autocast("cuda", torch.float16, enabled=device == "cuda"):
                    features = encoder(images.flatten(0, 1).to(device))
                end = start + len(images)
                features = features.unflatten(0, images.shape[:2]).half().cpu().numpy()
                for number, rows in enumerate(data.values()):
                    rows[start:end] = features[:, number]
                bar.update(len(images))
                if start // batch_size % 50 == 0 or end == len(paths):
                    for view, rows in data.items():
                        rows.flush()
                        write_json(self.files[view].with_suffix(".json"), {"done": end})

    def __getitem__(self, index_and_view):
        """(image numbers, view numbers) -> features (B, N, D), fp16 tensor on the CPU"""
        index, view = np.broadcast_arrays(*map(np.asarray, index_and_view))
        features = np.empty((len(index), *self.data[0].shape[1:]), np.float16)
        for number in np.unique(view):
            features[view == number] = self.data[number][index[view == number]]
        return torch.from_numpy(features)
