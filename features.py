"""Features of the frozen encoder for several views of each picture: computed on the fly, or cached on disk."""

import hashlib
import json
import os
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from fcntl import LOCK_EX, LOCK_NB, LOCK_UN, lockf
from itertools import chain, groupby
from pathlib import Path

import numpy as np
import torch
from PIL import ImageOps
from tqdm import tqdm

from cli import Stopped, UserError
from devices import Processes, at_once
from files import fingerprints, is_file, read_json, write_json
from images import ImageError, load_image, read_batches

BLOCK = 8  # batches that a process claims at a time, and after which it writes down what it has done


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
            raise UserError(f"{error}: repair or remove the picture") from None
        images = images.to(self.encoder.device)  # not "cuda", which is GPU 0 in any other thread than the main one
        with torch.autocast("cuda", torch.float16, enabled=self.device == "cuda"):
            parts = images.split(at_once(64 * self.encoder.num_tokens * self.encoder.dim, len(images)))  # a block's activations, roughly
            return torch.cat([self.encoder(part).half() for part in parts])

    def read(self, number, view):
        try:
            return read_views(self.paths[number], self.encoder, [view], int(number))
        except ImageError as error:
            raise ImageError(f"{self.paths[number]} cannot be read: {error}") from None


class FeatureCache:
    """Features of images, computed once and read by memory map: fp16, for each view (images, N, D).

    A view's file is named by a digest of the encoder's weights and levels, the images and the view, so that a change of any
    of them makes a new file, and more views of the same images add only their own. An interrupted build resumes. The processes
    of a run, and other runs that need the same features, share the work.

    Args:
        stop: asked after each batch; once it is true, in this process of the run or in another, what is encoded is kept and all raise Stopped.
    Attributes: `files`, `data`, a file and its array (images, N, D) for each view.
    """

    def __init__(self, encoder, paths, folder, views=1, batch_size=32, device="cpu", stop=False):
        folder, processes = Path(folder), Processes(device)
        images = fingerprints(paths)
        of_all = [encoder.name, encoder.weights_hash, encoder.image_size, *([encoder.dim] if encoder.levels > 1 else []),
                  device, images]
        self.files = [folder / f"{hashlib.sha256(json.dumps([view, *of_all]).encode()).hexdigest()[:16]}.npy"
                      for view in range(views)]
        self.shape = (len(paths), encoder.num_tokens, encoder.dim)
        stopped = False
        if not all(self._is_whole(file) for file in self.files):  # a complete cache may be read-only
            try:
                stopped = self._fill(folder, encoder, paths, batch_size, device, processes, stop)
            except OSError as error:
                raise UserError(f"cannot keep features in the cache {folder}: {error.strerror or error}") from None
        if processes.add(bool(stopped)):
            done = sum(map(self._done, self.files)) == views
            raise Stopped(f"stopped in encoding after {done.sum()} of {len(paths)} images: the same command goes on from there"
                          if processes.main else "")
        self.data = [np.load(file, mmap_mode="r") for file in self.files]

    def __len__(self):
        return len(self.data[0])

    def _fill(self, folder, encoder, paths, batch_size, device, processes, stop):
        """Compute the features that are missing, or as many as there is time for. Returns whether it was time to stop."""
        folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as opened:
            locks = [opened.enter_context(open(file.with_suffix(".lock"), "a")) for file in self.files]
            with ExitStack() as alone:
                for lock in locks:  # always in the same order, so that two processes cannot deadlock
                    alone.enter_context(self._alone(lock))
                done = {view: self._done(file) for view, file in enumerate(self.files)}
                done = {view: images for view, images in done.items() if not images.all()}
                if not done:  # another process has computed them in the meantime
                    return False
                data = self._open(done, folder, processes.main)
            encoder = encoder.to(device)
            with tqdm(total=len(paths), desc="encoding", unit="image", disable=not processes.main) as bar:
                build = Build(self, data, {view: locks[view] for view in data}, max(1, batch_size // len(data)), bar)
                while not build.done().all():
                    if build.run(encoder, paths, device, lambda: processes.told(stop), os.cpu_count() // processes.count + 4):
                        return True
                    if not build.claimed:  # other processes are encoding what is left
                        time.sleep(0.1)
                    if processes.told(stop):
                        return True
        return False

    def _open(self, views, folder, main):
        """{view: its array, to write to}; files that are missing or damaged are made. Called while no other process does."""
        size = 2 * int(np.prod(self.shape))
        new = [view for view in views if not self._fits(self.files[view])]
        if size * len(new) > shutil.disk_usage(folder).free:
            raise UserError(f"the features need {size * len(new) / 1e9:.1f} GB in {folder}, more than is free there: name "
                            "another --cache or fewer --views")
        if main:
            print(f"encoding {self.shape[0]} images in {len(views)} views: {size * len(views) / 1e9:.1f} GB in {folder}", file=sys.stderr)
        data = {}
        for view in views:
            if view in new:
                self.files[view].with_suffix(".json").unlink(missing_ok=True)
            data[view] = np.lib.format.open_memmap(self.files[view], "w+" if view in new else "r+", np.float16, self.shape)
            with open(self.files[view], "r+b") as file:  # if the disk filled up later, the process would be killed
                if hasattr(os, "posix_fallocate"):  # not on macOS
                    os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
        return data

    @contextmanager
    def _alone(self, lock):
        """A context that one process at a time enters for the view with this lock file: a lock on the byte after those of the images."""
        lockf(lock, LOCK_EX, 1, self.shape[0])
        try:
            yield
        finally:
            lockf(lock, LOCK_UN, 1, self.shape[0])

    def _is_whole(self, file):
        try:
            return self._done(file).all()
        except OSError:
            return False

    def _fits(self, file):
        """Whether this file is there and has the right shape."""
        try:
            return is_file(file) and np.load(file, mmap_mode="r").shape == self.shape  # raises ValueError for a truncated file
        except (ValueError, EOFError):
            return False

    def _done(self, file):
        """Which images of this file are done (images,); none for a damaged file."""
        progress, done = file.with_suffix(".json"), np.zeros(self.shape[0], bool)
        if not is_file(progress) or not self._fits(file):
            return done
        try:
            ranges = read_json(progress, "cache")["done"]
            ranges = [[0, ranges]] if isinstance(ranges, int) else ranges  # of before several processes encoded
            if any(not 0 <= start < end <= len(done) for start, end in ranges):
                return done
            for start, end in ranges:
                done[start:end] = True
        except (UserError, LookupError, TypeError, ValueError):
            return np.zeros_like(done)
        return done

    def note(self, view, lock, ranges):
        """Write down that these ranges of a view's images are done, beside what other processes wrote down."""
        with self._alone(lock):
            done = self._done(self.files[view])
            for start, end in ranges:
                done[start:end] = True
            edges = np.flatnonzero(np.diff(np.pad(done, 1).astype(np.int8)))  # starts and ends in turn
            write_json(self.files[view].with_suffix(".json"), {"done": edges.reshape(-1, 2).tolist()})

    def __getitem__(self, index_and_view):
        """(image numbers, view numbers) -> features (B, N, D), fp16 tensor on the CPU"""
        index, view = np.broadcast_arrays(*map(np.asarray, index_and_view))
        features = np.empty((len(index), *self.data[0].shape[1:]), np.float16)
        for number in np.unique(view):
            features[view == number] = self.data[number][index[view == number]]
        return torch.from_numpy(features)


class Build:
    """One process's part in filling a FeatureCache: it claims a block of images after the other that no process has claimed yet.

    A claim is a lock on as many bytes of each view's lock file as the block has images; the system releases it if the process dies.

    Args:
        data, locks: {view: array or lock file} of the views to encode.
        batch_size: images encoded at once, in all these views; a block is BLOCK batches.
    Attributes: `claimed`, how many blocks the last `run` has claimed.
    """

    def __init__(self, cache, data, locks, batch_size, bar):
        self.cache, self.data, self.locks, self.batch_size, self.bar, self.claimed = cache, data, locks, batch_size, bar, 0

    def done(self):
        """Which images are done in all views, now."""
        done = np.all([self.cache._done(self.cache.files[view]) for view in self.data], 0)
        self.bar.n = max(self.bar.n, int(done.sum()))  # others' too
        self.bar.refresh()
        return done

    def batches(self):
        """Claim blocks, one when the first of its images is asked for, and yield their batches that are not done: ranges of images."""
        self.claimed, images, done = 0, self.cache.shape[0], self.done()
        for start in range(0, images, BLOCK * self.batch_size):
            end = min(start + BLOCK * self.batch_size, images)
            if done[start:end].all() or not self.claim(start, end):
                continue
            self.claimed += 1
            left = ~self.done()[start:end]  # since another process may just have finished them
            for first in range(start, end, self.batch_size):
                last = min(first + self.batch_size, end)
                if left[first - start:last - start].any():
                    yield range(first, last)

    def claim(self, start, end):
        """Whether this process now has these images for itself."""
        for number, lock in enumerate(self.locks.values()):
            try:
                lockf(lock, LOCK_EX | LOCK_NB, end - start, start)
            except (BlockingIOError, PermissionError):  # it depends on the system
                for taken in list(self.locks.values())[:number]:
                    lockf(taken, LOCK_UN, end - start, start)
                return False
        return True

    def finish(self, ranges, block):
        """Write down what is done of a block, and give up the claim."""
        for view, lock in self.locks.items():
            self.data[view].flush()
            self.cache.note(view, lock, ranges)
        length = BLOCK * self.batch_size
        for lock in self.locks.values():
            lockf(lock, LOCK_UN, min(length, self.cache.shape[0] - block * length), block * length)

    @torch.inference_mode()
    def run(self, encoder, paths, device, told, threads):
        """Encode what no other process has claimed, until `told` to stop. Returns whether it was."""
        waiting = 2 + -(-threads // self.batch_size)  # batches, enough for all threads while one more batch is encoded
        reading = read_batches(self.batches(), lambda number: read_views(paths[number], encoder, self.data, number), threads, waiting)
        for block, batches in groupby(reading, lambda batch: batch[0][0] // (BLOCK * self.batch_size)):
            ranges, stop = [], False
            try:
                for batch in batches:
                    if any(isinstance(image, ImageError) for _, image in batch):  # name all of them, not one per run
                        bad = [f"{paths[number].name}: {error}" for number, error in chain(batch, chain.from_iterable(reading))
                               if isinstance(error, ImageError)]
                        raise UserError(f"{len(bad)} images cannot be read, mend or drop them: {'; '.join(bad[:10])}"
                                        + ("; …" if len(bad) > 10 else ""))
                    images = torch.stack([image for _, image in batch])  # (B, views, 3, S, S)
                    with torch.autocast("cuda", torch.float16, enabled=device == "cuda"):
                        features = encoder(images.flatten(0, 1).to(device))
                    start, end = batch[0][0], batch[-1][0] + 1
                    features = features.unflatten(0, images.shape[:2]).half().cpu().numpy()
                    for number, rows in enumerate(self.data.values()):
                        rows[start:end] = features[:, number]
                    ranges.append((start, end))
                    self.bar.update(len(images))
                    if stop := told():
                        break
            finally:
                self.finish(ranges, block)
            if stop:
                return True
        return False


def features_of(paths, encoder, cache, views, device="cpu", stop=False):
    """Features of these images: a FeatureCache in the folder `cache`, or LiveFeatures if that is ""."""
    if not cache:
        return LiveFeatures(encoder, paths, views, device)
    return FeatureCache(encoder, paths, cache, views, device=device, stop=stop)
