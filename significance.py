"""Test whether one set of captions is better than another: the paired bootstrap over images.

    difference = paired_bootstrap(scores_a - scores_b)      # for a metric that is a mean over images
    difference.value, difference.low, difference.high, difference.p

Koehn 2004, "Statistical significance tests for machine translation evaluation". Images are sampled with replacement, together
with both systems' captions. CIDEr's document frequencies remain those of all images.
"""

from collections import Counter
from dataclasses import dataclass

import numpy as np

DRAWS = 10_000
BLEU = "BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4"


@dataclass
class Difference:
    """A difference of two scores, its 95% interval, and the two-sided p-value for no difference."""

    value: float
    low: float
    high: float
    p: float

    @classmethod
    def of_draws(cls, value, draws):
        low, high = np.quantile(draws, [0.025, 0.975])
        # p: the fraction of draws, centred at 0, that are at least as far from 0 as the difference.
        extreme = (np.abs(draws - draws.mean()) >= abs(value) - 1e-12).sum()
        return cls(float(value), float(low), float(high), float((extreme + 1) / (len(draws) + 1)))


def resampled_sums(columns, draws=DRAWS, seed=0):
    """Sums of each column over bootstrap samples of the images: (images, m) -> (draws, m)"""
    random = np.random.default_rng(seed)
    images = len(columns)
    counts = np.empty((max(1, min(draws, 2**22 // images)), images))  # at most 32 MiB, or a single draw
    sums = np.empty((draws, columns.shape[1]))
    for start in range(0, draws, len(counts)):
        part = counts[:draws - start]
        for row in part:
            row[:] = np.bincount(random.integers(0, images, images), minlength=images)
        sums[start:start + len(part)] = part @ columns
    return sums


def paired_bootstrap(differences, draws=DRAWS, seed=0):
    """The Difference of a metric that is a mean over images, from the differences of each image (n,)."""
    differences = np.asarray(differences, np.float64)
    return Difference.of_draws(differences.mean(), resampled_sums(differences[:, None], draws, seed)[:, 0] / len(differences))


def bleu_statistics(references, candidates, longest=4):
    """Each image's sufficient statistics for corpus BLEU: (n, 10)

    Numbers of matched and of all n-grams of the candidate for n = 1 … 4, its length, and the closest reference's length.
    Takes tokenized captions {key: [captions]}, {key: [caption]}.
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
    """Sums of bleu_statistics (…, 10) -> BLEU-1 … BLEU-4 (…, 4), as pycocoevalcap computes them."""
    totals = np.asarray(totals, np.float64)
    precisions = (totals[..., 0:8:2] + 1e-15) / (totals[..., 1:8:2] + 1e-9)
    bleu = np.cumprod(precisions, -1) ** (1 / np.arange(1, 5))
    ratio = (totals[..., 8] + 1e-15) / (totals[..., 9] + 1e-9)
    return bleu * np.exp(np.minimum(0, 1 - 1 / ratio))[..., None]


def compare(ours, other, bleu_ours=None, bleu_other=None, draws=DRAWS, seed=0):
    """Differences of two systems: {metric: scores of the images} of each -> {metric: Difference}, in the order of `ours`.

    BLEU is that of the corpus if its statistics (bleu_statistics) are given; all other metrics are means over images.
    """
    means = [name for name in ours if name in other and not (bleu_ours is not None and name in BLEU)]
    columns = [np.asarray(ours[name], np.float64) - other[name] for name in means]
    if bleu_ours is not None:
        columns += [*bleu_ours.T, *bleu_other.T]
    if not columns:
        return {}
    sums, images = resampled_sums(np.stack(columns, 1), draws, seed), len(columns[0])
    found = {name: Difference.of_draws(columns[i].mean(), sums[:, i] / images) for i, name in enumerate(means)}
    if bleu_ours is not None:
        value = corpus_bleu(bleu_ours.sum(0)) - corpus_bleu(bleu_other.sum(0))
        values = corpus_bleu(sums[:, -20:-10]) - corpus_bleu(sums[:, -10:])
        found |= {name: Difference.of_draws(value[n], values[:, n]) for n, name in enumerate(BLEU)}
    return {name: found[name] for name in ours if name in other}
