"""The search with very many pictures: indexing, recovery from a kill, queries, memory, disk.

    python3 report/search_scale.py --data coco [--pictures 100000] [--work /tmp/scale] [--out report/results/search_scale.json]

The pictures are synthetic: files of a few pixels that encode a number, which is mapped to the embeddings of a real validation picture and
its caption with some noise. So nothing is encoded, but all else is done: listing, digests, dates, writing, flushing. The program that
fills the index is killed with SIGKILL before it is done, and started again.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from cli import ArgumentParser, UserError, run
from clip_model import load_clip
from dataset import clean_captions, read_captions
from devices import memory_in_use, pick_device
from files import write_json
from picture_index import PictureIndex

NOISE = 0.5  # length of the noise added to an embedding of length one
SIDE = 4  # pixels of a synthetic picture


class MadeUp:
    """Replaces a CLIP: reads a picture's number from its pixels, and returns a real picture's embedding with noise seeded by the number.

    Args:
        images, texts: real embeddings (n, D).
    """

    pixels, vectors_per_image, fit, fingerprint = SIDE, 1, None, "made up"

    def __init__(self, images, texts):
        self.images, self.texts = images, texts

    @staticmethod
    def preprocess(image):
        return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)

    def near(self, vectors, number, kind):
        noise = torch.randn(vectors.shape[1], generator=torch.Generator().manual_seed(2 * number + kind))
        return torch.nn.functional.normalize(vectors[number % len(vectors)] + NOISE * torch.nn.functional.normalize(noise, dim=0), dim=0)

    def embed_pictures(self, pictures):
        return torch.stack([self.near(self.images, number_in(picture), 0) for picture in pictures])

    def encode_texts(self, texts):
        """Embeddings of synthetic captions, "number …"."""
        numbers = [int(text.split()[1]) if text.startswith("number ") else 0 for text in texts]
        return torch.stack([self.near(self.texts, number, 1) for number in numbers])


def number_in(pixels):
    """The number in a synthetic picture's first two pixels."""
    return int.from_bytes(bytes(pixels[:, 0, :2].t().flatten().tolist()), "big")


def draw_numbers(folder, count):
    """Write so many synthetic pictures, a thousand in each subfolder."""
    for number in range(count):
        place = folder / f"{number // 1000:03}"
        if number % 1000 == 0:
            place.mkdir(parents=True, exist_ok=True)
        pixels = np.zeros((SIDE, SIDE, 3), np.uint8)
        pixels[0, :2] = np.frombuffer(number.to_bytes(6, "big"), np.uint8).reshape(2, 3)
        Image.fromarray(pixels).save(place / f"{number:06}.png")


def real_embeddings(data, clip):
    images = [image for image in read_captions(Path(data) / "val.json", Path(data) / "images" / "val") if clean_captions(image)]
    _, vectors, unread = clip.encode_images([image.path for image in images])
    if unread:
        raise UserError(f"{next(iter(unread))} cannot be read")
    return vectors, clip.encode_texts([clean_captions(image)[0] for image in images])


def fill(work):
    """Fill the index: run by the process that is killed."""
    index = PictureIndex(work / "search.db", MadeUp(*torch.load(work / "real.pt")))
    counts, _ = index.update(work / "pictures", lambda paths: {path: f"number {int(Path(path).stem)}" for path in paths}, progress=False)
    print(counts["new"], counts["kept"], flush=True)
    index.close()


def start(work):
    return subprocess.Popen([sys.executable, __file__, "--work", str(work), "--fill"], stdout=subprocess.PIPE, text=True)


def size_of(folder):
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def measure(work, data, count):
    work.mkdir(parents=True, exist_ok=True)
    clip = load_clip("clip_small", pick_device())
    torch.save(real_embeddings(data, clip), work / "real.pt")
    if not (work / "pictures").exists():
        draw_numbers(work / "pictures", count)
    began = time.monotonic()
    process = start(work)
    while not (work / "search.db").exists() or size_of(work / "search.db") < count * 700:  # bytes: a fraction of the full index
        time.sleep(0.2)
        if process.poll() is not None:
            raise UserError("the index was full before it could be killed: take more pictures")
    process.send_signal(signal.SIGKILL)
    process.wait()
    first = time.monotonic() - began
    began = time.monotonic()
    process = start(work)
    new, kept = map(int, process.stdout.read().split())
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.monotonic() - began
    if status:
        raise UserError("the second run failed")
    before = memory_in_use("cpu")
    made_up = MadeUp(*torch.load(work / "real.pt"))
    opening = time.monotonic()
    index = PictureIndex(work / "search.db", made_up)
    opening = time.monotonic() - opening
    seen, wrong = set(), 0
    for entry in index.entries(("path", "vector", "caption")):
        number = int(Path(entry["path"]).stem)
        seen.add(number)
        expected = torch.cat([made_up.near(made_up.images, number, 0), made_up.near(made_up.texts, number, 1)]).numpy()
        wrong += entry["caption"] != f"number {number}" or not np.allclose(entry["vector"], expected, atol=1e-6)
    queries = [index.query(f"number {number}") for number in range(0, count, count // 100)]
    index.search(queries[0])
    taken = []
    for query in queries:
        at = time.monotonic()
        index.search(query)
        taken.append(time.monotonic() - at)
    found = {"pictures": count, "killed after, s": first, "kept by the kill": kept, "the second run, s": seconds,
             "pictures a second": new / seconds, "its most memory, GB": usage.ru_maxrss * 1024 / 1e9,
             "entries": len(index), "missing": count - len(seen), "wrong": int(wrong), "opening, s": opening,
             "query, median s": median(taken), "query, slowest s": max(taken), "memory with it open, GB": (memory_in_use("cpu") - before) / 1e9,
             "disk, GB": size_of(work / "search.db") / 1e9}
    index.close()
    return found


def main():
    parser = ArgumentParser(description="Measure the search with very many pictures.")
    parser.add_argument("--data", help="folder with val.json and images/val")
    parser.add_argument("--pictures", type=int, default=100_000)
    parser.add_argument("--work", type=Path, default=Path("output/search_scale"))
    parser.add_argument("--fill", action="store_true", help="fill the index of --work; this program starts itself so")
    parser.add_argument("--out", help="output JSON file")
    arguments = parser.parse_args()
    if arguments.fill:
        fill(arguments.work)
        return
    if not arguments.data or arguments.pictures < 200:
        raise UserError("--data must be named, and --pictures be at least 200")
    found = measure(arguments.work, arguments.data, arguments.pictures)
    for name, value in found.items():
        print(f"{name:26}{value:12.4g}")
    if arguments.out:
        write_json(arguments.out, found)


if __name__ == "__main__":
    run(main)
