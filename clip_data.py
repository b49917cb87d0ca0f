"""Training data of our small CLIP: sentences and pictures as inputs of its heads, and virtual pictures."""

import hashlib
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from clip_small import Summary, mean_of_tokens, run_layers

SAMPLE = 2000  # number of pictures for computing principal components and statistics


class Sentences:
    """Sentences as inputs of the trained layers: hidden states, cached in a file in fp16, and the frozen encoder's own vectors.

    `starts` (n + 1,): index of each sentence's first token among all tokens.
    """

    def __init__(self, texts, encoder, layers, text_hash, folder, batch_size=256):
        key = hashlib.sha256(json.dumps([text_hash, layers, encoder.max_tokens, texts]).encode()).hexdigest()[:16]
        file = Path(folder) / f"texts-{key}.npz"
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            hidden, lengths, vectors = self.encode(texts, encoder, layers, batch_size)
            temporary = file.with_suffix(".tmp.npz")
            np.savez(temporary, hidden=hidden, starts=np.concatenate([[0], np.cumsum(lengths)]), vectors=vectors)
            temporary.replace(file)
        with np.load(file) as found:
            self.hidden, self.starts = torch.from_numpy(found["hidden"]), torch.from_numpy(found["starts"])
            self.vectors = torch.from_numpy(found["vectors"])

    @staticmethod
    @torch.inference_mode()
    def encode(texts, encoder, layers, batch_size):
        """Hidden states below the last `layers` of all tokens (sum of lengths, C), the lengths, and unit vectors (n, C)."""
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        rows, vectors = [None] * len(texts), np.empty((len(texts), encoder.dim), np.float32)
        above = encoder.model.encoder.layer[len(encoder.model.encoder.layer) - layers:] if layers else []
        for start in tqdm(range(0, len(order), batch_size), desc="embedding sentences", unit="batch"):
            some = order[start:start + batch_size]
            hidden, mask = encoder.lower([texts[i] for i in some], layers)
            vectors[some] = F.normalize(mean_of_tokens(run_layers(hidden, mask, above), mask), dim=-1).cpu().numpy()
            for i, row, length in zip(some, hidden.half().cpu().numpy(), mask.sum(1).tolist()):
                rows[i] = row[:length]
        return np.concatenate(rows), [*map(len, rows)], vectors

    def __len__(self):
        return len(self.vectors)

    def batch(self, numbers):
        """Sentence indices (B,) -> hidden states (B, T, C), fp32, and mask (B, T)"""
        starts, ends = self.starts[numbers], self.starts[numbers + 1]
        place = torch.arange(int((ends - starts).max())) + starts[:, None]
        mask = (place < ends[:, None]).long()
        return self.hidden[place.clamp(max=len(self.hidden) - 1)].float() * mask[:, :, None], mask


class Pictures:
    """Summaries of all views of all pictures of several feature caches, in memory in fp16: 50 kB each."""

    def __init__(self, caches, head, encoder, batch_size=64):
        rows = []
        for cache in caches:
            for view in range(len(cache.data)):
                parts = [head.summarize(part.to(head.stats_mean.device), encoder)
                         for part in batches_of(cache, view, batch_size, "summarizing")]
                rows.append(Summary(*(torch.cat([getattr(part, name).half().cpu() for part in parts])
                                      for name in Summary._fields)))
        views = len(caches[0].data)
        self.parts = Summary(*(torch.stack([torch.cat([getattr(row, name) for row in rows[view::views]])
                                            for view in range(views)], 1) for name in Summary._fields))

    def __len__(self):
        return len(self.parts.stats)

    def batch(self, numbers, views):
        """Picture and view indices (B,) -> Summary, fp32, on the CPU"""
        return Summary(*(part[numbers, views].float() for part in self.parts))


def batches_of(cache, view, batch_size, what):
    """A cache's features of a view, in order: (B, N, D) each, fp16."""
    for start in tqdm(range(0, len(cache), batch_size), desc=what, unit="batch", leave=False):
        yield cache[range(start, min(start + batch_size, len(cache))), view]


class VirtualPictures:
    """Summaries of pictures that do not exist, which the encoder's classifier would confidently assign to a given class.

    If the logit of a class is t standard deviations above its mean, what is the expected summary? For normal distributions it is
    linear in t: t times the correlation with the logit. Shifting a random training picture's summary by that gives a picture of
    the class, even if no training picture shows it.
    """

    def __init__(self, pictures, sample=6000):  # on the CPU, as the pictures are
        some = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(0))[:sample]
        summary = pictures.batch(some, torch.zeros_like(some))
        logits = summary.classes.clamp(min=1e-8).log()
        logits = (logits - logits.mean(0)) / logits.std(0)
        self.stats = logits.t() @ summary.stats / len(some)  # (K, 2 D)
        self.cells = logits.t() @ summary.cells.mean(1) / len(some) if summary.cells.shape[-1] else None  # (K, R)

    def shift(self, summary, classes, generator):
        """A Summary of B random pictures, shifted to these classes (B,)."""
        random = torch.rand(3, len(classes), generator=generator)
        strength = 2 + 6 * random[0, :, None]  # in standard deviations; real pictures of a class are 3 to 8 above the mean
        keep = random[1, :, None]  # fraction of the random picture
        sure = 0.2 + 0.7 * random[2, :, None]
        cells = keep[:, :, None] * summary.cells
        if self.cells is not None:
            cells = cells + (strength * self.cells[classes])[:, None]
        named = F.one_hot(classes, summary.classes.shape[1])
        return Summary(keep * summary.stats + strength * self.stats[classes], cells, sure * named + (1 - sure) * summary.classes)


def partial_sentences(text, config, cache):
    """A function from a list of texts to their Sentences."""
    frozen = text.frozen_hash(config.text_layers)
    return lambda texts: Sentences(texts, text, config.text_layers, frozen, cache)


def joined(parts):
    """Several Sentences as one."""
    whole = Sentences.__new__(Sentences)
    ends = np.cumsum([0] + [len(part.hidden) for part in parts])
    whole.hidden = torch.cat([part.hidden for part in parts])
    whole.vectors = torch.cat([part.vectors for part in parts])
    whole.starts = torch.cat([torch.zeros(1, dtype=torch.long), *(part.starts[1:] + end for part, end in zip(parts, ends))])
    return whole


def sample_of(cache, batch_size=50):
    """Batches of the first view of SAMPLE pictures, spread over the cache."""
    numbers = np.linspace(0, len(cache) - 1, min(SAMPLE, len(cache))).round().astype(int)
    for start in range(0, len(numbers), batch_size):
        some = numbers[start:start + batch_size]
        yield cache[some, np.zeros_like(some)]
