"""Words for what an image encoder's own classifier recognises, and how nouns of a caption lead back to its classes.

`concepts.json`, which get_concepts.py makes from WordNet, says of every class of ImageNet what it is called, level by level:
its own names, then those of the kinds that it belongs to ("tabby", "tabby cat"; "domestic cat"; "cat"; "feline").

Shapes: B images or captions, K concepts of each, C classes, n_embd the decoder's width.
"""

import re
from functools import cached_property, lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from cli import UserError, read_json

TABLE = Path(__file__).resolve().parent / "concepts.json"
KINDS = 4  # of those that a class belongs to, the narrowest that describe it
LONGEST = 3  # words of a noun phrase that is looked up
# WordNet's own rules for the plurals of nouns (morphy(7WN)): what is detached, and what is put in its place.
PLURALS = ("s", ""), ("ses", "s"), ("ves", "f"), ("xes", "x"), ("zes", "z"), ("ches", "ch"), ("shes", "sh"), ("men", "man"), ("ies", "y")
MISSING = 0.2  # of a caption's things, those that a classifier does not name
SISTER = 0.2  # of those that it names, those that it takes for another of their kind
MORE = 0.4  # it goes on to one more class of that kind


class Concepts(NamedTuple):
    """What was recognised in each of B pictures."""

    numbers: torch.Tensor  # (B, K) classes, likeliest first
    probabilities: torch.Tensor  # (B, K)

    @classmethod
    def likeliest(cls, probabilities, count):
        """(B, C) -> the `count` likeliest of each"""
        top = probabilities.topk(count)
        return cls(top.indices, top.values)


class ClassWords:
    """The words of some classes, by their WordNet ids.

    Attributes: `names`, for each class the name to show; `levels`, for each its names and those of its kinds, from the
    narrowest to the widest; `classes`, which of them a noun or noun phrase may mean: {"cat": [281, …], …}.
    """

    def __init__(self, wordnet_ids):
        """Raises KeyError for a class that is not one of ImageNet's thousand."""
        table = read_json(TABLE, "table of concepts")
        self.levels = [table[name] for name in wordnet_ids]
        self.names = [levels[0][0] for levels in self.levels]
        self.classes = {}
        for number, levels in enumerate(self.levels):
            for noun in {name.lower() for level in levels for name in level}:
                self.classes.setdefault(noun, []).append(number)

    @classmethod
    def of_encoder(cls, encoder):
        """Those of the classes that an encoder's classifier tells apart. Raises UserError where it has none that are known."""
        try:
            if encoder.class_ids:
                return cls(encoder.class_ids)
        except KeyError:
            pass
        raise UserError(f"{encoder.name} brings no classifier of ImageNet's thousand classes, which concept words come from: "
                        "say --concepts 0")

    def words(self, number):
        """What a class is called: its own names, and the first name of each of the narrowest kinds that it belongs to."""
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
        """The things that a caption names, in order: for each, the classes that it may be of. Longest phrases first."""
        words, found, at = re.findall(r"[a-z]+(?:['-][a-z]+)*", caption.lower()), [], 0
        while at < len(words):
            for length in range(min(LONGEST, len(words) - at), 0, -1):
                if classes := self.meanings(" ".join(words[at:at + length])):
                    found.append(classes)
                    at += length
                    break
            else:
                at += 1
        return found

    def meanings(self, phrase):
        """The classes that a noun phrase may mean, as it stands or as a plural."""
        singular = (phrase.removesuffix(ending) + instead for ending, instead in PLURALS if phrase.endswith(ending))
        return next((self.classes[form] for form in (phrase, *singular) if form in self.classes), [])

    def vectors(self, embeddings, encode):
        """A vector for each class: the mean of its words' vectors, theirs the mean of their tokens' embeddings.

        Args:
            embeddings: (V, n_embd); a row of zeros is a token that the decoder never met, and does not count.
            encode: text -> token ids.
        Returns (C, n_embd), of the embeddings' scale: the root mean square is one.
        """
        embeddings = embeddings.detach()
        known = embeddings.any(1)

        @lru_cache(None)
        def of_word(word):
            tokens = torch.tensor(encode(f" {word}"))
            tokens = tokens[known[tokens]]
            return embeddings[tokens].mean(0) if len(tokens) else None

        rows = [[vector for word in self.words(number) if (vector := of_word(word)) is not None]
                for number in range(len(self.levels))]
        vectors = torch.stack([torch.stack(row).mean(0) if row else embeddings.new_zeros(embeddings.shape[1]) for row in rows])
        return vectors / vectors.square().mean().sqrt().clamp(min=1e-12)

    def imagine(self, found, seen, random):
        """What the classifier would say of pictures that show these things, errors included.

        A real picture's answer is taken, and the caption's things put into it, each at a rank drawn by the probabilities
        there; some are missing, taken for another of their kind, or named as two or three of it.

        Args:
            found: for each of B captions, what `find` returned.
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
                    if random.random() < SISTER and self.sisters[number]:
                        number = self.sisters[number][random.integers(len(self.sisters[number]))]
                    shown.append(number)
                    if random.random() >= MORE:
                        break
            shown = list(dict.fromkeys(shown))[:len(row)]
            weights = probabilities + 0.02  # so that every rank can be drawn
            ranks = random.choice(len(row), len(shown), replace=False, p=weights / weights.sum())
            for rank, number in zip(np.sort(ranks), shown):
                row[rank] = number
        return Concepts(numbers, seen.probabilities)
