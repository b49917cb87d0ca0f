"""A search index of pictures: their embeddings in Milvus, either in a local folder *.db (Milvus Lite) or on a server.

    index = PictureIndex("cache/search.db", clip)               # or "http://host:19530"
    index.update("photos")                                      # add new and changed pictures, remove deleted ones
    index.search(index.query("two dogs in the snow"), top=15)   # [Hit, …], best first

An entry's vector is the picture's embedding, concatenated with its caption's, each of length one; zeros if it has no caption. A
query's vector is its text's embedding twice, the second time multiplied by the captions' weight, so one inner product gives the
combined score. An index can be rebuilt from the pictures at any time. Only one process at a time can open a local one.
"""

import hashlib
import logging
import os
import shutil
import sys
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from fcntl import LOCK_EX, LOCK_NB, LOCK_UN, flock
from pathlib import Path
from urllib.parse import quote, unquote_to_bytes

import numpy as np
import torch
from PIL import ExifTags
from tqdm import tqdm

from cli import UserError, printable
from files import digest_of, first_line
from images import IMAGE_SUFFIXES, load_ahead, open_image

DEFAULT_INDEX = "cache/search.db"
CAPTION_WEIGHT = 0.25  # of the caption's similarity to the query, added to the picture's: report/README.md
MOST = 16_000  # maximum number of hits of one search
SAMPLE = 2_000  # entries that a query's mean score and standard deviation are estimated from
FEWEST = 5  # minimum number of them
FITS = 3.5  # threshold for a match, in standard deviations above the query's mean score, unless the model has its own
AVOIDED = 2.0  # the same for pictures to leave out
BATCH = 64
FOLDER_DIGITS = 16
MARK = "index of p4_search"  # file that marks a folder as an index


@dataclass
class Hit:
    path: str
    score: float
    caption: str
    time: int  # when it was taken, in seconds since 1970


def short_hash(text, digits=40):
    return hashlib.sha256(os.fsencode(text)).hexdigest()[:digits]


def pictures_below(folder):
    """Paths of all pictures of a folder and its subfolders, in order. Raises UserError if it is not a folder."""
    folder = Path(folder).resolve()
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder")
    found = []
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [os.path.join(place, name) for name in sorted(names)
                  if not name.startswith(".") and os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES]
    return found


def content_of(path):
    """Digest of a file; "" if it cannot be read, which is reported when it is encoded."""
    try:
        return digest_of(path, "sha256")
    except OSError:
        return ""


def taken(path):
    """When a picture was taken, in seconds since 1970: from its EXIF data, else the file's date."""
    try:
        with open_image(path) as image:
            text = image.getexif().get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.DateTimeOriginal)
        return int(datetime.strptime(text.strip(), "%Y:%m:%d %H:%M:%S").timestamp())
    except Exception:  # there is no date, or PIL raises any kind of error for damaged EXIF data
        return int(os.stat(path).st_mtime)


class DamagedIndex(UserError):
    """An error that rebuilding the index would fix."""


@contextmanager
def milvus_errors(where):
    """Turn Milvus' errors into DamagedIndex with one line."""
    from pymilvus.exceptions import MilvusException

    try:
        yield
    except MilvusException as error:
        raise DamagedIndex(f"the index {where} cannot be read ({first_line(error.message or error)}); `p4_search.py index` makes a damaged "
                           "one anew") from None


def stored(path):
    """A path, which may be any bytes, as UTF-8 for Milvus."""
    return quote(os.fsencode(path), safe="/ ")


def path_of(text):
    return os.fsdecode(unquote_to_bytes(text))


def open_client(where):
    """A MilvusClient. Raises UserError."""
    try:
        import milvus_lite  # noqa: F401
        from pymilvus import MilvusClient
    except ImportError:
        raise UserError("searching needs packages: pip install -c constraints.txt pymilvus milvus-lite") from None
    for name in ["milvus_lite", *logging.root.manager.loggerDict]:  # their errors are reported here, the rest is of no use
        if name.startswith(("pymilvus", "milvus_lite")):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    if "://" in str(where):
        try:
            return MilvusClient(str(where), timeout=10)
        except Exception as error:  # grpc's and pymilvus' own
            raise UserError(f"no Milvus server answers at {where}: {first_line(error)}") from None
    where = Path(where)
    if where.suffix != ".db":
        raise UserError(f"--index is {where}, but must be a folder whose name ends in .db, or a server's address")
    if where.exists() and not (where.is_dir() and (is_index(where) or not any(where.iterdir()))):
        raise UserError(f"{where} is there already and is no index: name another place with --index")
    try:
        where.mkdir(parents=True, exist_ok=True)
        (where / MARK).touch()
        refuse_locked(where)
        return MilvusClient(str(where))
    except PermissionError as error:
        raise UserError(f"cannot keep an index in {where}: {error.strerror}") from None
    except UserError:
        raise
    except Exception as error:  # damaged ones raise all kinds of errors
        release(where)
        refuse_locked(where)  # by another process, just now
        raise DamagedIndex(f"the index {where} is damaged or cannot be opened ({first_line(error)})") from None


def refuse_locked(where):
    """Raise UserError if another process has opened the local index."""
    if not (Path(where) / "LOCK").exists():
        return
    with open(Path(where) / "LOCK", "rb") as file:
        try:
            flock(file, LOCK_EX | LOCK_NB)
            flock(file, LOCK_UN)
        except BlockingIOError:
            raise UserError(f"the index {where} is open in another process, a search page perhaps: one at a time; or use a Milvus "
                            "server") from None


def release(where):
    """Close a local index, which Milvus Lite would otherwise keep open until the process ends."""
    if "://" not in str(where):
        from milvus_lite.server_manager import server_manager_instance

        server_manager_instance.release_server(str(where))


def is_index(where):
    """Whether a folder contains an index, by its MARK file."""
    return (Path(where) / MARK).is_file()


class PictureIndex:
    """The pictures' embeddings by one model.

    Args:
        where: a folder whose name ends in .db, or the address of a Milvus server.
        clip: a DualEncoder. Each model has a separate collection, since embeddings of two models cannot be compared.
        rebuild: replace a damaged local index by an empty one, with a message on stderr.
    """

    def __init__(self, where, clip, rebuild=False):
        self.where, self.clip = where, clip
        self.dim = clip.encode_texts(["a picture"]).shape[1]
        self.name = f"pictures_{short_hash(f'{clip.fingerprint} {self.dim}', 16)}"
        try:
            self.client = open_client(where)
            self.prepare()
        except DamagedIndex as error:
            if "://" in str(where):
                raise
            release(where)
            if not rebuild:
                raise
            aside = Path(f"{where}.damaged")
            shutil.rmtree(aside, ignore_errors=True)
            Path(where).rename(aside)
            print(f"{error}: it is now {aside}, and is made anew from the pictures", file=sys.stderr)
            self.client = open_client(where)
            self.prepare()
        self.sample = None

    def prepare(self):
        """Load the collection, or create it."""
        from pymilvus import DataType

        with milvus_errors(self.where):
            if self.client.has_collection(self.name):
                self.client.load_collection(self.name)
                self.client.query(self.name, filter="", limit=1, output_fields=["vector"])  # raises now if damaged
                return
            schema = self.client.create_schema(auto_id=False)
            schema.add_field("id", DataType.VARCHAR, is_primary=True, max_length=64)  # hash of the path, and index of the vector
            schema.add_field("vector", DataType.FLOAT_VECTOR, dim=2 * self.dim)
            schema.add_field("path", DataType.VARCHAR, max_length=16384)
            schema.add_field("folders", DataType.ARRAY, element_type=DataType.VARCHAR, max_capacity=200, max_length=FOLDER_DIGITS)
            schema.add_field("stamp", DataType.VARCHAR, max_length=64)  # size and date of the file
            schema.add_field("content", DataType.VARCHAR, max_length=64)  # its digest
            schema.add_field("time", DataType.INT64)
            schema.add_field("caption", DataType.VARCHAR, max_length=2048)
            parameters = self.client.prepare_index_params()
            parameters.add_index("vector", index_type="FLAT", metric_type="IP")
            self.client.create_collection(self.name, schema=schema, index_params=parameters)

    def close(self):
        """Close the index, so that another process can open it."""
        self.client.close()
        release(self.where)

    def __len__(self):
        """The number of vectors."""
        with milvus_errors(self.where):
            return self.client.query(self.name, filter="", output_fields=["count(*)"])[0]["count(*)"]

    # ---- filling ----

    def entries(self, fields=("path", "stamp", "content", "caption")):
        """Yield all entries as dicts of these fields."""
        with milvus_errors(self.where):
            rows = self.client.query_iterator(self.name, batch_size=1000, filter="", output_fields=["id", *fields])
            while batch := rows.next():
                yield from ({**row, "path": path_of(row["path"])} for row in batch)
            rows.close()

    @staticmethod
    def within(folder=None, since=None):
        """A Milvus filter for pictures in a folder, or taken since a time."""
        parts = [f'array_contains(folders, "{short_hash(str(Path(folder).resolve()), FOLDER_DIGITS)}")'] if folder else []
        return " and ".join(parts + ([f"time >= {int(since)}"] if since is not None else []))

    def update(self, folder, caption=None, progress=True):
        """Add new and changed pictures below a folder, and remove deleted ones. Unchanged files are not read; renamed or copied ones are
        recognised by their content.

        Args:
            caption: function of a list of paths -> {path: caption} of the readable ones; None: new pictures get no captions.
        Returns counts, {"new": …, "moved": …, "gone": …, "kept": …}, and {path: reason} of unreadable files.
        """
        known = defaultdict(list)
        for entry in self.entries():
            known[entry["path"]].append(entry)
        root = Path(folder).resolve()
        below = {path for path in known if root in Path(path).parents}
        by_content = {entries[0]["content"]: entries for entries in known.values()}
        unread, stamps = {}, {}
        for path in pictures_below(folder):
            try:
                stamps[path] = "{0.st_size} {0.st_mtime_ns}".format(os.stat(path))
            except OSError as error:  # a broken link
                unread[path] = error.strerror
        todo = [path for path, stamp in stamps.items()
                if path not in known or known[path][0]["stamp"] != stamp or caption and not known[path][0]["caption"]]
        counts = {"new": 0, "moved": 0, "gone": 0, "kept": len(stamps) - len(todo)}
        with ThreadPoolExecutor() as pool:
            contents = dict(zip(todo, pool.map(content_of, todo)))
        moved = {path: same for path in contents if (same := by_content.get(contents[path])) and not (caption and not same[0]["caption"])}
        fresh = [path for path in contents if path not in moved]
        with milvus_errors(self.where):
            rows = {path: self.client.get(self.name, ids=[entry["id"] for entry in same], output_fields=["vector", "caption"])
                    for path, same in moved.items()}  # read all before overwriting any
            for path, of_path in rows.items():
                vectors = np.array([row["vector"] for row in of_path], np.float32)
                self.put([path], vectors[None], {path: of_path[0]["caption"]}, stamps, contents)
            counts["moved"] = len(moved)
            damaged = self.encode(fresh, stamps, contents, caption, progress)
            counts["new"], unread = len(fresh) - len(damaged), unread | damaged
            for path, reason in unread.items():
                print(f"skipped {printable(path)}: {printable(reason)}", file=sys.stderr)
            gone = sorted(below - stamps.keys()) + [path for path in unread if path in known and path in stamps]
            ids = [entry["id"] for path in gone for entry in known[path]]
            for start in range(0, len(ids), 1000):
                self.client.delete(self.name, ids=ids[start:start + 1000])
            counts["gone"] = len(gone)
            self.client.flush(self.name)
        self.sample = None
        return counts, unread

    def encode(self, paths, stamps, contents, caption, progress):
        """Embed and store these pictures batch by batch; an interruption loses only the current batch. Returns {path: reason} of
        unreadable ones."""
        clip, unread = self.clip, {}
        with tqdm(total=len(paths), unit="image", desc="indexing", disable=not progress) as bar:
            for good, images, bad in load_ahead(paths, clip.preprocess, clip.pixels, BATCH):
                unread.update((path, str(error)) for path, error in bad)
                if images is not None:
                    vectors = clip.embed_pictures(images)
                    vectors = vectors if vectors.ndim == 3 else vectors[:, None]  # (B, Q, D)
                    captions = caption(good) if caption else {}
                    said = torch.tensor([bool(captions.get(path)) for path in good])
                    texts = clip.encode_texts([captions.get(path, "") for path in good]) * said[:, None]
                    joined = torch.cat([vectors, texts[:, None].expand(-1, vectors.shape[1], -1)], -1)
                    self.put(good, joined.numpy(), captions, stamps, contents)
                bar.update(len(good) + len(bad))
        return unread

    def put(self, paths, vectors, captions, stamps, contents):
        """Store the vectors (n, Q, 2 D) of these pictures."""
        rows = []
        for path, of_path in zip(paths, vectors):
            folders = [short_hash(str(parent), FOLDER_DIGITS) for parent in Path(path).parents]
            about = {"path": stored(path), "folders": folders, "stamp": stamps[path], "content": contents[path], "time": taken(path),
                     "caption": captions.get(path, "")}
            rows += [{"id": f"{short_hash(path)}-{number}", "vector": vector, **about} for number, vector in enumerate(of_path)]
        self.client.upsert(self.name, rows)

    # ---- asking ----

    def query(self, text, caption_weight=CAPTION_WEIGHT):
        """The vector of a sentence (2 D,)."""
        vector = self.clip.encode_texts([text])[0].numpy()
        return np.concatenate([vector, caption_weight * vector])

    def query_like(self, path):
        """The vector of a picture (2 D,), which ignores captions. Raises UserError if it cannot be read."""
        read, vectors, unread = self.clip.encode_images([Path(path)])
        if not read:
            raise UserError(f"{path} cannot be read: {unread[Path(path)]}")
        vector = vectors[0].mean(0) if vectors.ndim == 3 else vectors[0]
        return np.concatenate([vector.numpy(), np.zeros(self.dim, np.float32)])

    def search(self, vector, top=15, folder=None, since=None):
        """The pictures most similar to a query: at most `top` Hits, best first."""
        return next(iter(self.search_many([vector], top, folder, since)))

    def search_many(self, vectors, top=15, folder=None, since=None):
        """`search` for several queries: yields a list of Hits for each."""
        limit = min(top * self.clip.vectors_per_image, MOST)
        for start in range(0, len(vectors), 100):
            with milvus_errors(self.where):
                found = self.client.search(self.name, [vector.tolist() for vector in vectors[start:start + 100]], limit=limit,
                                           filter=self.within(folder, since), output_fields=["path", "caption", "time"])
            for rows in found:
                hits = {}
                for row in rows:  # if a picture has several vectors, the best one counts
                    about = row["entity"]
                    path = path_of(about["path"])
                    hits.setdefault(path, Hit(path, row["distance"], about["caption"], about["time"]))
                yield list(hits.values())[:top]

    def fits(self, text, folder=None, since=None):
        """Whether the picture most similar to a sentence shows it, rather than being just the best of those in the index; True if there
        are too few to tell."""
        vector = self.query(text, 0.0)
        best = self.search(vector, 1, folder, since)
        return bool(best) and best[0].score >= self.bar(vector)

    def bar(self, vector):
        """The similarity above which a picture counts as a match, from the distribution of the query's scores over a sample of the entries."""
        mean, deviation = self.spread_of(vector)
        if not deviation:
            return -np.inf
        level, slope = self.clip.fit or (mean, FITS)
        return level + slope * deviation

    def spread_of(self, vector):
        """Mean and standard deviation of a query's scores over a sample of the entries."""
        sample = self.sample  # another thread may reset it
        if sample is None:
            with milvus_errors(self.where):
                rows = self.client.query(self.name, filter="", limit=SAMPLE, output_fields=["vector"])
            sample = self.sample = np.array([row["vector"] for row in rows], np.float32).reshape(-1, 2 * self.dim)
        if len(sample) < FEWEST:
            return -np.inf, 0.0
        scores = sample @ vector
        return float(scores.mean()), float(scores.std())

    def find(self, vector, top=15, without=None, folder=None, since=None):
        """Hits of a query. `without`: another query; pictures more similar to it than to the first, or above the threshold of AVOIDED, are
        left out."""
        if without is None:
            return self.search(vector, top, folder, since)
        mean, deviation = self.spread_of(without)
        bar = mean + AVOIDED * deviation if deviation else np.inf
        unwanted = {hit.path: hit.score for hit in self.search(without, MOST, folder, since)}
        for count in min(MOST, 10 * top + 100), MOST:
            found = self.search(vector, count, folder, since)
            hits = [hit for hit in found if unwanted.get(hit.path, -1) < min(hit.score, bar)][:top]
            if len(hits) == top or len(found) < count:
                break
        return hits
