"""Concept words of a picture: recognised by the encoder's own classifier, by our CLIP, or found in captions of similar pictures.

`concepts.json`, which get_concepts.py makes from WordNet, has the names of every ImageNet class, level by level:
its own names, then those of its hypernyms ("tabby", "tabby cat"; "domestic cat"; "cat"; "feline").

A concept is a class, or one of the nouns in that table; concepts are numbered, classes first. There are three
sources of a picture's concepts: `ClassifierWords`, `ClipWords` and `RetrievedWords`.

Shapes: B images or captions, K concepts of each, C classes, L nouns, N patches, D the encoder's width, n_embd the decoder's.
"""

import hashlib
import io
import json
import re
import sys
from contextlib import suppress
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from cli import UserError
from files import first_line, read_json, write_whole

TABLE = Path(__file__).resolve().parent / "concepts.json"
KINDS = 4  # hypernyms that describe a class, the most specific ones
LONGEST = 3  # maximum number of words in a noun phrase
# WordNet's rules for plurals of nouns (morphy(7WN)): suffix, and its replacement.
PLURALS = ("s", ""), ("ses", "s"), ("ves", "f"), ("xes", "x"), ("zes", "z"), ("ches", "ch"), ("shes", "sh"), ("men", "man"), ("ies", "y")
# Probabilities of a classifier's errors, for captions without pictures: an object is missed; a class is mistaken for a sister; another class of
# the same object follows.
MISSING, SISTER, MORE = 0.2, 0.2, 0.4
NEIGHBOURS = 20  # captions retrieved per picture


class Concepts(NamedTuple):
    """The concepts recognised in each of B pictures."""

    numbers: torch.Tensor  # (B, K), likeliest first
    probabilities: torch.Tensor  # (B, K)
    meaning: torch.Tensor = None  # (B, width): the picture as a whole, in our CLIP's space

    def each(self, function):
        """Apply a function to each tensor."""
        return Concepts(*(part if part is None else function(part) for part in self))

    @classmethod
    def likeliest(cls, probabilities, count):
        """(B, C) -> Concepts, the `count` likeliest of each row"""
        top = probabilities.topk(count)
        return cls(top.indices, top.values)


class ClassWords:
    """The names of some classes, given by their WordNet ids, and all nouns for them.

    Attributes: `names`, the display name of each concept; `levels`, for each class its names and those of its hypernyms, from
    specific to general; `classes`, the classes that a noun or noun phrase may mean: {"cat": [281, …], …}; `nouns`, the number of each
    noun as a concept: {"cat": 1123, …}.
    """

    def __init__(self, wordnet_ids):
        """Raises KeyError for a class that is not one of ImageNet-1k."""
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
        """The classes of an encoder's classifier. Raises UserError if it has none, or unknown ones."""
        try:
            if encoder.class_ids:
                return cls(encoder.class_ids)
        except KeyError:
            pass
        raise UserError(f"{encoder.name} brings no classifier of ImageNet's thousand classes, which concept words come from: "
                        "say --concepts 0, or --concept_source clip where our CLIP was made for it")

    @classmethod
    def of_imagenet(cls):
        from timm.data import ImageNetInfo  # takes two seconds, so not imported at the top

        return cls(ImageNetInfo("imagenet-1k").label_names())

    def words(self, number):
        """The words of a concept: a noun itself; for a class its own names, and the first name of each of its most specific hypernyms."""
        if number >= len(self.levels):
            return [self.names[number]]
        own, *kinds = self.levels[number]
        return own + [kind[0] for kind in kinds[:KINDS]]

    @cached_property
    def sisters(self):
        """For each class, the others with the same most specific hypernym."""
        of_kind = {}
        for number, levels in enumerate(self.levels):
            if len(levels) > 1:
                of_kind.setdefault(tuple(levels[1]), []).append(number)
        return [[other for other in of_kind[tuple(levels[1])] if other != number] if len(levels) > 1 else []
                for number, levels in enumerate(self.levels)]

    def find(self, caption):
        """The nouns of the table in a caption, in order, plurals as singulars. The longest phrases are matched first."""
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
        """The noun of the table that a phrase is, or of which it is the plural; None if there is none."""
        singular = (phrase.removesuffix(ending) + instead for ending, instead in PLURALS if phrase.endswith(ending))
        return next((form for form in (phrase, *singular) if form in self.classes), None)

    def vectors(self, embeddings, encode, nouns=False):
        """A vector for each concept: the mean of its words' vectors, which are the means of their tokens' embeddings.

        Args:
            embeddings: (V, n_embd); rows of zeros, of tokens that the decoder was not trained on, are ignored.
            encode: text -> token ids.
            nouns: include the nouns.
        Returns (C, n_embd), or (C + L, n_embd), scaled so that the classes' root mean square is one.
        """
        embeddings = embeddings.detach()
        names = [self.words(number) for number in range(len(self.names if nouns else self.levels))]
        words = {word: number for number, word in enumerate(dict.fromkeys(chain.from_iterable(names)))}
        of_words = means(embeddings, [encode(f" {word}") for word in words])
        vectors = means(of_words, [[words[word] for word in row] for row in names])
        return vectors / vectors[:len(self.levels)].square().mean().sqrt().clamp(min=1e-12)

    def imagine(self, found, seen, random):
        """Simulate what would be recognised in pictures of captions, including errors.

        Starts from a real picture's concepts, and puts the caption's objects at ranks sampled by the probabilities there. Some
        objects are missing; some classes are replaced by sisters, and some objects get two or three classes.

        Args:
            found: for each of B captions, for each of its objects, the concepts that it may be recognised as.
            seen: Concepts of real pictures, one for each caption.
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
            weights = probabilities + 0.02  # so that every rank can be sampled
            ranks = random.choice(len(row), len(shown), replace=False, p=weights / weights.sum())
            for rank, number in zip(np.sort(ranks), shown):
                row[rank] = number
        return seen._replace(numbers=numbers)


def means(vectors, groups):
    """The mean of each group of rows of `vectors` (n, C), without rows of zeros; groups are lists of row numbers: (groups, C)"""
    rows = torch.tensor([*chain.from_iterable(groups)], device=vectors.device)
    owners = torch.repeat_interleave(torch.tensor([*map(len, groups)])).to(vectors.device)
    found = vectors[rows]
    counts = vectors.new_zeros(len(groups)).index_add_(0, owners, found.any(1).to(vectors.dtype))
    return vectors.new_zeros(len(groups), vectors.shape[1]).index_add_(0, owners, found) / counts.clamp(min=1)[:, None]


class ClassifierWords:
    """The classes that the encoder's own classifier, from its pretraining, recognises."""

    def __init__(self, words, encoder):
        self.words, self.encoder = words, encoder

    def recognise(self, features, count):
        """Features (B, N, D) -> Concepts, `count` of each"""
        return Concepts.likeliest(self.encoder.class_probabilities(features), count)

    def meanings(self, noun):
        """The concepts that an object of this name would be recognised as."""
        return self.words.classes[noun]


class ClipWords:
    """The nouns that are nearest to a picture in our CLIP's space.

    Args:
        words: ClassWords.
        judge: a ClipSmall on the same encoder.
    """

    def __init__(self, words, judge):
        self.words, self.judge = words, judge
        self.vectors = embed_texts(judge, [f"a photo of a {noun}" for noun in words.nouns])  # (L, width)

    def recognise(self, features, count):
        images = F.normalize(self.judge.embed_images(features), dim=-1)
        similar = images @ self.vectors.to(images.device).t()
        found = Concepts.likeliest((self.judge.log_scale.exp() * similar).softmax(-1), count)
        return Concepts(found.numbers + len(self.words.levels), found.probabilities)

    def meanings(self, noun):
        return [self.words.nouns[noun]]


class RetrievedWords:
    """The nouns of the captions that are nearest to a picture in our CLIP's space (SmallCap: Ramos et al. 2023, arXiv:2209.15323),
    combined with those of another source.

    Args:
        source: ClassifierWords or ClipWords.
        judge: a ClipSmall on the same encoder.
        captions: list of strings.
        cache: folder for their embeddings; None: always compute them.
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
    """Unit vectors of texts in our CLIP's space (n, width), cached in the folder `cache` if there is one."""
    digest = hashlib.sha256(json.dumps([texts, judge.text_digest]).encode()).hexdigest()[:16]
    file = Path(cache) / f"vectors-{digest}.npy" if cache else None
    with suppress(OSError, ValueError, EOFError):  # not there, or damaged
        if file:
            return torch.from_numpy(np.load(file)).float()
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # little padding
    vectors = None
    for start in tqdm(range(0, len(order), batch_size), desc="embedding texts", unit="batch", disable=len(texts) < 500):
        some = order[start:start + batch_size]
        rows = F.normalize(judge.embed_texts([texts[i] for i in some]), dim=-1).cpu()
        vectors = rows.new_empty(len(texts), rows.shape[1]) if vectors is None else vectors
        vectors[some] = rows
    if file:
        content = io.BytesIO()
        np.save(content, vectors.half().numpy())
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_whole(file, content.getvalue())
        except (OSError, UserError) as error:
            print(f"the embeddings of the texts cannot be kept in {cache}: {first_line(error)}", file=sys.stderr)
        return vectors.half().float()  # the same as will be read from the cache
    return vectors
