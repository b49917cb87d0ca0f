"""Words for what is recognised in a picture: by the encoder's own classifier, by our CLIP, or in captions of pictures like it.

`concepts.json`, which get_concepts.py makes from WordNet, says of every class of ImageNet what it is called, level by level:
its own names, then those of the kinds that it belongs to ("tabby", "tabby cat"; "domestic cat"; "cat"; "feline").

A concept is a class, or one of the nouns that the table holds; concepts are numbered, classes first. Pictures come from three
sources of them: `ClassifierWords`, `ClipWords` and `RetrievedWords`.

Shapes: B images or captions, K concepts of each, C classes, L nouns, N patches, D the encoder's width, n_embd the decoder's.
"""

import hashlib
import json
import re
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from cli import UserError
from files import read_json

TABLE = Path(__file__).resolve().parent / "concepts.json"
KINDS = 4  # of those that a class belongs to, the narrowest that describe it
LONGEST = 3  # words of a noun phrase that is looked up
# WordNet's own rules for the plurals of nouns (morphy(7WN)): what is detached, and what is put in its place.
PLURALS = ("s", ""), ("ses", "s"), ("ves", "f"), ("xes", "x"), ("zes", "z"), ("ches", "ch"), ("shes", "sh"), ("men", "man"), ("ies", "y")
MISSING = 0.2  # of a caption's things, those that a classifier does not name
SISTER = 0.2  # of those that it names, those that it takes for another of their kind
MORE = 0.4  # it goes on to one more class of that kind
NEIGHBOURS = 20  # captions that are retrieved for a picture


class Concepts(NamedTuple):
    """What was recognised in each of B pictures."""

    numbers: torch.Tensor  # (B, K), likeliest first
    probabilities: torch.Tensor  # (B, K)
    meaning: torch.Tensor = None  # (B, width): each as a whole, in our CLIP's space

    def each(self, function):
        """With a function of each tensor in its place."""
        return Concepts(*(part if part is None else function(part) for part in self))

    @classmethod
    def likeliest(cls, probabilities, count):
        """(B, C) -> the `count` likeliest of each"""
        top = probabilities.topk(count)
        return cls(top.indices, top.values)


class ClassWords:
    """The words of some classes, by their WordNet ids, and all nouns for them.

    Attributes: `names`, for each concept the name to show; `levels`, for each class its names and those of its kinds, from the
    narrowest to the widest; `classes`, which of them a noun or noun phrase may mean: {"cat": [281, …], …}; `nouns`, the number of
    each noun: {"cat": 1123, …}.
    """

    def __init__(self, wordnet_ids):
        """Raises KeyError for a class that is not one of ImageNet's thousand."""
        table = read_json(TABLE, "table of concepts")
        self.levels = [table[name] for name in wordnet_ids]
        self.classes = {}
        for number, levels in enumerate(self.levels):
            for noun in {name.lower() for level in levels for name in level}:
                self.classes.setdefault(noun, []).append(number)
        self.nouns = {noun: number for number, noun in enumerate(sorted(self.classes), len(self.levels))}
        self.names = [levels[0][0] for levels in self.levels] + list(self.nouns)

    @classmethod
    def of_encoder(cls, encoder):
        """Those of the classes that an encoder's classifier tells apart. Raises UserError where it has none that are known."""
        try:
            if encoder.class_ids:
                return cls(encoder.class_ids)
        except KeyError:
            pass
        raise UserError(f"{encoder.name} brings no classifier of ImageNet's thousand classes, which concept words come from: "
                        "say --concepts 0, or --concept_source clip where our CLIP was made for it")

    @classmethod
    def of_imagenet(cls):
        from timm.data import ImageNetInfo  # two seconds, which those who ask an encoder are spared

        return cls(ImageNetInfo("imagenet-1k").label_names())

    def words(self, number):
        """What a concept is called: a noun itself; a class by its own names, and the first of each of its narrowest kinds."""
        if number >= len(self.levels):
            return [self.names[number]]
        own, *kinds = self.levels[number]
        return own + [kind[0] for kind in kinds[:KINDS]]

    @cached_property
    def sisters(self):
        """For each class, those that share its narrowest kind with it, itself left out."""
        of_kind = {}
        for number, levels in enumerate(self.levels):
            if len(levels) > 1:
                of_kind.setdefault(tuple(levels[1]), []).append(number)
        return [[other for other in of_kind[tuple(levels[1])] if other != number] if len(levels) > 1 else []
                for number, levels in enumerate(self.levels)]

    def find(self, caption):
        """The nouns of the table that a caption holds, in order, plurals as singulars. Longest phrases first."""
        words, found, at = re.findall(r"[a-z]+(?:['-][a-z]+)*", caption.lower()), [], 0
        while at < len(words):
            for length in range(min(LONGEST, len(words) - at), 0, -1):
                if noun := self.singular(" ".join(words[at:at + length])):
                    found.append(noun)
                    at += length
                    break
            else:
                at += 1
        return found

    def singular(self, phrase):
        """The noun that a phrase is, as it stands or as a plural; None where it is none of the table."""
        singular = (phrase.removesuffix(ending) + instead for ending, instead in PLURALS if phrase.endswith(ending))
        return next((form for form in (phrase, *singular) if form in self.classes), None)

    def vectors(self, embeddings, encode, nouns=False):
        """A vector for each concept: the mean of its words' vectors, theirs the mean of their tokens' embeddings.

        Args:
            embeddings: (V, n_embd); a row of zeros is a token that the decoder never met, and does not count.
            encode: text -> token ids.
            nouns: those of the nouns too.
        Returns (C, n_embd), or (C + L, n_embd), where the classes' root mean square is one.
        """
        embeddings = embeddings.detach()
        names = [self.words(number) for number in range(len(self.names if nouns else self.levels))]
        words = {word: number for number, word in enumerate(dict.fromkeys(chain.from_iterable(names)))}
        of_words = means(embeddings, [encode(f" {word}") for word in words])
        vectors = means(of_words, [[words[word] for word in row] for row in names])
        return vectors / vectors[:len(self.levels)].square().mean().sqrt().clamp(min=1e-12)

    def imagine(self, found, seen, random):
        """What would be recognised in pictures of these captions, errors included.

        A real picture's concepts are taken, and the caption's things put among them, each at a rank drawn by the probabilities
        there; some are missing. What names classes takes some for others of their kind, or names two or three of it.

        Args:
            found: for each of B captions, of each of its things the concepts that it may be.
            seen: Concepts of real pictures, for each caption the one of a picture.
            random: numpy Generator.
        Returns Concepts of B rows.
        """
        numbers = seen.numbers.clone()
        for row, things, probabilities in zip(numbers, found, seen.probabilities.numpy()):
            shown = []
            for classes in things:
                if random.random() < MISSING:
                    continue
                while True:
                    number = classes[random.integers(len(classes))]
                    sisters = self.sisters[number] if number < len(self.levels) else []
                    if random.random() < SISTER and sisters:
                        number = sisters[random.integers(len(sisters))]
                    shown.append(number)
                    if random.random() >= MORE:
                        break
            shown = list(dict.fromkeys(shown))[:len(row)]
            weights = probabilities + 0.02  # so that every rank can be drawn
            ranks = random.choice(len(row), len(shown), replace=False, p=weights / weights.sum())
            for rank, number in zip(np.sort(ranks), shown):
                row[rank] = number
        return seen._replace(numbers=numbers)


def means(vectors, groups):
    """Of each group, a list of row numbers, the mean of those rows of `vectors` (n, C) that are not zero: (groups, C)"""
    rows = torch.tensor([*chain.from_iterable(groups)], device=vectors.device)
    owners = torch.repeat_interleave(torch.tensor([*map(len, groups)])).to(vectors.device)
    found = vectors[rows]
    counts = vectors.new_zeros(len(groups)).index_add_(0, owners, found.any(1).to(vectors.dtype))
    return vectors.new_zeros(len(groups), vectors.shape[1]).index_add_(0, owners, found) / counts.clamp(min=1)[:, None]


class ClassifierWords:
    """What the encoder's own classifier, which it was pretrained with, says of a picture."""

    def __init__(self, words, encoder):
        self.words, self.encoder = words, encoder

    def recognise(self, features, count):
        """Features (B, N, D) -> Concepts, `count` of each"""
        return Concepts.likeliest(self.encoder.class_probabilities(features), count)

    def meanings(self, noun):
        """The concepts that a thing of this name would be recognised as."""
        return self.words.classes[noun]


class ClipWords:
    """The nouns that are nearest to a picture in our CLIP's space.

    Args:
        words: ClassWords.
        judge: a ClipSmall on the same encoder.
        cache: folder for the nouns' embeddings; None: worked out anew.
    """

    def __init__(self, words, judge, cache=None):
        self.words, self.judge = words, judge
        self.vectors = embed_texts(judge, [f"a photo of a {noun}" for noun in words.nouns], cache)  # (L, width)

    def recognise(self, features, count):
        images = F.normalize(self.judge.embed_images(features), dim=-1)
        similar = images @ self.vectors.to(images.device).t()
        found = Concepts.likeliest((self.judge.log_scale.exp() * similar).softmax(-1), count)
        return Concepts(found.numbers + len(self.words.levels), found.probabilities)

    def meanings(self, noun):
        return [self.words.nouns[noun]]


class RetrievedWords:
    """The nouns of the captions that are nearest to a picture in our CLIP's space (SmallCap: Ramos et al. 2023, arXiv:2209.15323),
    beside what another source recognises.

    Args:
        source: ClassifierWords or ClipWords.
        judge: a ClipSmall on the same encoder.
        captions: list of strings.
        cache: folder for their embeddings; None: worked out anew.
    """

    def __init__(self, source, judge, captions, cache=None):
        self.source, self.words, self.judge = source, source.words, judge
        self.vectors = embed_texts(judge, captions, cache)
        self.found = [sorted({self.words.nouns[noun] for noun in self.words.find(caption)}) for caption in captions]

    def recognise(self, features, count):
        images = F.normalize(self.judge.embed_images(features), dim=-1)
        nearest = (images @ self.vectors.to(images.device).t()).topk(min(NEIGHBOURS, len(self.found))).indices
        shares = images.new_zeros(len(images), len(self.words.names))
        for row, neighbours in zip(shares, nearest.tolist()):
            for caption in neighbours:
                row[self.found[caption]] += 1 / len(neighbours)
        other = self.source.recognise(features, count)
        return Concepts.likeliest(shares.scatter_reduce(1, other.numbers, other.probabilities, "amax"), count)

    def meanings(self, noun):
        return self.source.meanings(noun)


@torch.inference_mode()
def embed_texts(judge, texts, cache=None, batch_size=64):
    """Unit vectors of texts in our CLIP's space (n, width), kept in the folder `cache` for the next time."""
    digest = hashlib.sha256(json.dumps([texts, judge.text_digest]).encode()).hexdigest()[:16]
    file = Path(cache) / f"vectors-{digest}.npy" if cache else None
    if file and file.exists():
        return torch.from_numpy(np.load(file)).float()
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # little padding
    vectors = None
    for start in tqdm(range(0, len(order), batch_size), desc="embedding texts", unit="batch", disable=len(texts) < 500):
        some = order[start:start + batch_size]
        rows = F.normalize(judge.embed_texts([texts[i] for i in some]), dim=-1).cpu()
        vectors = rows.new_empty(len(texts), rows.shape[1]) if vectors is None else vectors
        vectors[some] = rows
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        np.save(file, vectors.half().numpy())
        return vectors.half().float()  # what the next time brings
    return vectors
