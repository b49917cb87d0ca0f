"""How well images and texts find each other: ranks, Recall@k and median rank, as retrieval models are reported."""

from dataclasses import dataclass

import numpy as np
import torch

WAYS = "text to image", "image to text"


@dataclass
class Ranks:
    """Of each query the place of the right answer, from 0; ties are counted as lost.

    Attributes: `texts` (m,), of each text's image among the images; `images` (n,), of an image's best text among the
    others' texts.
    """

    texts: torch.Tensor
    images: torch.Tensor

    @classmethod
    def of(cls, similarity, owners):
        """Args: similarity of every text with every image (m, n); owners (m,), the number of each text's image."""
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
        """Recall@k, {way: {k: part of the queries}}."""
        return {way: {k: (ranks < k).float().mean().item() for k in at} for way, ranks in self.ways().items()}

    def medians(self):
        """Median rank, from 1: {way: rank}."""
        return {way: float(np.median(ranks.numpy()) + 1) for way, ranks in self.ways().items()}


def recalls(images, texts, owners, ranks=(1, 5, 10)):
    """Recall@k of retrieval, {"image to text": {k: part}, "text to image": {k: part}}.

    Args:
        images, texts: unit vectors (n, C) and (m, C). owners: (m), the number of each text's image.
    A text is to find its image, an image any one of its texts.
    """
    return Ranks.of(texts @ images.t(), owners).recalls(ranks)


def auroc(present, absent):
    """Area under the ROC curve: how often a score of `present` is above one of `absent`; ties count half."""
    absent = np.sort(absent)
    below, up_to = (np.searchsorted(absent, present, side) for side in ("left", "right"))
    return float((below + up_to).mean() / (2 * len(absent)))
