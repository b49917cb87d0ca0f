"""Metrics of image-text retrieval: ranks, Recall@k, median rank, and AUROC."""

from dataclasses import dataclass

import numpy as np
import torch

WAYS = "text to image", "image to text"


@dataclass
class Ranks:
    """For each query, the rank of the correct answer, from 0; ties count against it.

    Attributes: `texts` (m,), the rank of each text's image among all images; `images` (n,), the rank of each image's best
    own text among the other images' texts.
    """

    texts: torch.Tensor
    images: torch.Tensor

    @classmethod
    def of(cls, similarity, owners):
        """Args: similarity (m, n) of every text with every image; owners (m,), the index of each text's image."""
        own = similarity.gather(1, owners[:, None])
        texts = (similarity >= own).sum(1) - 1
        count = similarity.shape[1]
        best = torch.full((count,), -torch.inf, dtype=own.dtype).scatter_reduce(0, owners, own.squeeze(1), "amax")
        foreign = owners[:, None] != torch.arange(count)
        return cls(texts, ((similarity >= best) & foreign).sum(0))

    def ways(self):
        """{way: ranks}"""
        return dict(zip(WAYS, (self.texts, self.images)))

    def recalls(self, at=(1, 5, 10)):
        """Recall@k: {way: {k: fraction of the queries}}"""
        return {way: {k: (ranks < k).float().mean().item() for k in at} for way, ranks in self.ways().items()}

    def medians(self):
        """Median rank, from 1: {way: rank}"""
        return {way: float(np.median(ranks.numpy()) + 1) for way, ranks in self.ways().items()}


def recalls(images, texts, owners, ranks=(1, 5, 10)):
    """Recall@k: {"image to text": {k: fraction}, "text to image": {k: fraction}}

    Args:
        images, texts: unit vectors (n, C) and (m, C). owners: (m,), the index of each text's image.
    A text must find its image, and an image any one of its texts.
    """
    return Ranks.of(texts @ images.t(), owners).recalls(ranks)


def auroc(present, absent):
    """Area under the ROC curve: the probability that a score of `present` is above one of `absent`; ties count half."""
    absent = np.sort(absent)
    below, up_to = (np.searchsorted(absent, present, side) for side in ("left", "right"))
    return float((below + up_to).mean() / (2 * len(absent)))
