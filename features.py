"""Features of the frozen encoder for several views of each picture: computed on the fly, or cached on disk."""

import hashlib
import json
import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from fcntl import LOCK_EX, flock
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from PIL import ImageOps
from tqdm import tqdm

from cli import UserError
from files import fingerprints, is_file, read_json, write_json
from images import ImageError, load_image, read_batches


def make_view(image, view, seed):
    """View 0 is the picture itself; later views are random crops of at least 60%; odd ones are mirrored.

    Returns an RGB PIL image, always the same for the same (view, seed).
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


class SomeFeatures:
    """Features of some images of several caches, renumbered.

    Args:
        parts: FeatureCaches or LiveFeatures with equal numbers of views.
        numbers: (part, number within it) of each image.
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
    """The same features as FeatureCache's, computed each time they are asked for: no disk space, but much slower."""

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
        images = images.to(self.encoder.device)  # not "cuda", which is GPU 0 in any other thread than the main one
        with torch.autocast("cuda", torch.float16, enabled=self.device == "cuda"):
            return self.encoder(images).half()

    def read(self, number, view):
        try:
            return read_views(self.paths[number], self.encoder, [view], int(number))
        except ImageError as error:
            raise ImageError(f"{self.paths[number]} cannot be read: {error}") from None


class FeatureCache:
    """Features of images, computed once and read by memory map: fp16, for each view (images, N, D).

    A view's file is named by a digest of the encoder's weights and levels, the images and the view, so that a change of any
    of them makes a new file, and more views of the same images add only their own. An interrupted build resumes; if
    two runs need the same features, one computes them and the other waits.

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
        if not all(self._is_whole(file, shape) for file in self.files):  # a complete cache may be read-only
            try:
                self._fill(folder, shape, encoder, paths, batch_size, device)
            except OSError as error:
                raise UserError(f"cannot keep features in the cache {folder}: {error.strerror or error}") from None
        self.data = [np.load(file, mmap_mode="r") for file in self.files]

    def __len__(self):
        return len(self.data[0])

    def _fill(self, folder, shape, encoder, paths, batch_size, device):
        """Compute the features that are missing."""
        folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as locks:
            for file in self.files:  # always in the same order, so that two runs cannot deadlock
                flock(locks.enter_context(open(file.with_suffix(".lock"), "w")), LOCK_EX)
            done = [self._done(file, shape) for file in self.files]
            missing = [view for view, count in enumerate(done) if count < len(paths)]
            size = 2 * int(np.prod(shape)) * sum(not done[view] for view in missing)
            if size > shutil.disk_usage(folder).free:
                raise UserError(f"the features need {size / 1e9:.1f} GB in {folder}, more than is free there: name "
                                "another --cache or fewer --views")
            if not missing:  # another run has computed them in the meantime
                return
            print(f"encoding {len(paths)} images in {len(missing)} views: {2 * int(np.prod(shape)) * len(missing) / 1e9:.1f} GB in {folder}",
                  file=sys.stderr)
            data = {}
            for view in missing:
                data[view] = np.lib.format.open_memmap(self.files[view], "r+" if done[view] else "w+", np.float16, shape)
                with open(self.files[view], "r+b") as file:  # if the disk filled up later, the process would be killed
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
        """The number of images in this file that are done; 0 for a damaged file."""
        progress = file.with_suffix(".json")
        if not is_file(progress) or not is_file(file):
            return 0
        try:
            done = read_json(progress, "cache")["done"]
            whole = np.load(file, mmap_mode="r").shape == shape  # raises ValueError for a truncated file
        except (UserError, LookupError, TypeError, ValueError, EOFError):
            return 0
        return done if whole and isinstance(done, int) and 0 < done <= shape[0] else 0

    @torch.inference_mode()
    def _build(self, data, encoder, paths, done, batch_size, device):
        """Encode the views that are the keys of `data`, from image number `done` on."""
        batches = read_batches((range(start, min(start + batch_size, len(paths))) for start in range(done, len(paths), batch_size)),
                               lambda number: read_views(paths[number], encoder, data, number), os.cpu_count() + 4)
        with tqdm(total=len(paths), initial=done, desc="encoding", unit="image") as bar:
            for count, batch in enumerate(batches):
                if any(isinstance(image, ImageError) for _, image in batch):  # name all of them, not one per run
                    bad = [f"{paths[number].name}: {error}" for number, error in chain(batch, chain.from_iterable(batches))
                           if isinstance(error, ImageError)]
                    raise UserError(f"{len(bad)} images cannot be read, mend or drop them: {'; '.join(bad[:10])}"
                                    + ("; …" if len(bad) > 10 else ""))
                images = torch.stack([image for _, image in batch])  # (B, views, 3, S, S)
                with torch.autocast("cuda", torch.float16, enabled=device == "cuda"):
                    features = encoder(images.flatten(0, 1).to(device))
                start, end = batch[0][0], batch[-1][0] + 1
                features = features.unflatten(0, images.shape[:2]).half().cpu().numpy()
                for number, rows in enumerate(data.values()):
                    rows[start:end] = features[:, number]
                bar.update(len(images))
                if count % 50 == 0 or end == len(paths):
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


def features_of(paths, encoder, cache, views, device="cpu"):
    """Features of these images: a FeatureCache in the folder `cache`, or LiveFeatures if that is ""."""
    if not cache:
        return LiveFeatures(encoder, paths, views, device)
    return FeatureCache(encoder, paths, cache, views, device=device)
