"""Is one set of captions really better than another? The paired bootstrap over images.

    difference = paired_bootstrap(scores_a - scores_b)      # of a metric that is a mean over images
    difference.value, difference.low, difference.high, difference.p

Koehn 2004, "Statistical significance tests for machine translation evaluation". Images are drawn with replacement; the
captions of both systems go with them. CIDEr's word weights stay those of all images.
"""

from collections import Counter
from dataclasses import dataclass

import numpy as np

DRAWS = 10_000


@dataclass
class Difference:
    """A difference of two scores, its 95% interval, and the two-sided p-value of there being none."""

    value: float
    low: float
    high: float
    p: float

    @classmethod
    def of_draws(cls, value, draws):
        low, high = np.quantile(draws, [0.025, 0.975])
        # How often the draws, moved to where there is no difference, lie as far out as the difference itself.
        extreme = (np.abs(draws - draws.mean()) >= abs(value) - 1e-12).sum()
        return cls(float(value), float(low), float(high), float((extreme + 1) / (len(draws) + 1)))


def resampled_counts(images, draws=DRAWS, seed=0):
    """How often each draw holds each image: (draws, images) float32"""
    random = np.random.default_rng(seed)
    counts = np.empty((draws, images), np.float32)
    for row in counts:
        row[:] = np.bincount(random.integers(0, images, images), minlength=images)
    return counts


def paired_bootstrap(differences, counts=None):
    """Difference of a metric that is a mean over images, from the images' differences (n,)."""
    differences = np.asarray(differences, np.float64)
    counts = resampled_counts(len(differences)) if counts is None else counts
    return Difference.of_draws(differences.mean(), counts @ differences / len(differences))


def bleu_statistics(references, candidates, longest=4):
    """What corpus BLEU is computed from, for each image: (n, 10)

    Matched and all n-grams of the candidate for n = 1 … 4, its length, and the closest length of a reference.
    Tokenized captions {key: [captions]}, {key: [caption]}.
    """
    rows = []
    for key, group in references.items():
        words, others = candidates[key][0].split(), [caption.split() for caption in group]
        row = []
        for n in range(1, longest + 1):
            count, *most = (Counter(zip(*(tokens[i:] for i in range(n)))) for tokens in (words, *others))
            row += [sum(min(number, max(other[gram] for other in most)) for gram, number in count.items()),
                    max(0, len(words) - n + 1)]
        closest = min((abs(len(tokens) - len(words)), len(tokens)) for tokens in others)[1]
        rows.append([*row, len(words), closest])
    return np.array(rows, np.float64)


def corpus_bleu(totals):
    """Sums of bleu_statistics (…, 10) -> BLEU-1 … BLEU-4 (…, 4), as pycocoevalcap has them."""
    totals = np.asarray(totals, np.float64)
    precisions = (totals[..., 0:8:2] + 1e-15) / (totals[..., 1:8:2] + 1e-9)
    bleu = np.cumprod(precisions, -1) ** (1 / np.arange(1, 5))
    ratio = (totals[..., 8] + 1e-15) / (totals[..., 9] + 1e-9)
    return bleu * np.exp(np.minimum(0, 1 - 1 / ratio))[..., None]


def compare(ours, other, bleu_ours=None, bleu_other=None, seed=0):
    """Differences of all metrics: {name: scores of the images} of two systems -> {name: Difference}, in the order of `ours`.

    BLEU's come from the n-gram counts (bleu_statistics) where they are given, all others are means over images.
    """
    counts = resampled_counts(len(next(iter(ours.values()))), seed=seed)
    found = {}
    if bleu_ours is not None:
        value = corpus_bleu(bleu_ours.sum(0)) - corpus_bleu(bleu_other.sum(0))
        draws = corpus_bleu(counts @ bleu_ours) - corpus_bleu(counts @ bleu_other)
        found = {f"BLEU-{n}": Difference.of_draws(value[n - 1], draws[:, n - 1]) for n in range(1, 5)}
    return {name: found[name] if name in found else paired_bootstrap(ours[name] - other[name], counts)
            for name in ours if name in other}
