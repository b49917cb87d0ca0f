"""CIDEr-D without Java, against pycocoevalcap and its Java tokenizer."""

import json
import random

import numpy as np
import pytest

import metrics
from cider import CiderScorer, ptb_tokens
from dataset import load_references

CAPTIONS = [  # and their tokens
    ("A dog can't run; it's wet, isn't it?", "a dog ca n't run it 's wet is n't it"),
    ("The girls' dolls aren't here, they've gone.", "the girls dolls are n't here they 've gone"),
    ("\"Cannot\" stands on a T-shirt (a red one).", "can not stands on a t-shirt -lrb- a red one -rrb-"),
    ("Mr. Smith walks down 5th Ave. in the U.S. Navy's coat.", "mr. smith walks down 5th ave. in the u.s. navy 's coat"),
    ("A man pays $ 95,000 or 3.5% at 12:45.", "a man pays $ 95,000 or 3.5 % at 12:45"),
    ("At five o'clock, hors d'oeuvres and/or Dunkin' Donuts", "at five o'clock hors d'oeuvres and/or dunkin' donuts"),
    ("Two men -- one in an AT&amp;T cap -- wait ... there&nbsp;!", "two men one in an at&t cap wait there"),
    ("An école, 日本, a 🐕", "an école 日本 a"),
    ("What ?! No!", "what ?! no"),
    ("", ""), ("...", ""),
]


def test_tokens_are_those_of_the_java_tokenizer():
    assert [" ".join(ptb_tokens(caption)) for caption, _ in CAPTIONS] == [tokens for _, tokens in CAPTIONS]
    assert metrics.tokenize({0: [caption for caption, _ in CAPTIONS]})[0] == [tokens for _, tokens in CAPTIONS]


def test_tokens_of_all_captions_at_hand(flickr8k):
    """All but one in ten thousand, where the Java tokenizer looks at the next line to judge a full stop."""
    captions = [entry["caption"] for name in ("train", "val")
                for entry in json.loads((flickr8k / f"{name}.json").read_text(encoding="utf-8"))["annotations"]]
    for file in sorted((flickr8k.resolve().parent / "caption_text").glob("*.txt")):
        captions += file.read_text(encoding="utf-8").splitlines()
    java = metrics.tokenize({0: captions})[0]
    different = [(caption, tokens) for caption, tokens in zip(captions, java) if " ".join(ptb_tokens(caption)) != tokens]
    print(f"{len(different)} of {len(captions)} captions differ:", *different, sep="\n")
    assert len(different) <= len(captions) / 10_000


def world(images, seed=0):
    """References and candidates of a small world of words; some candidates are odd."""
    draw = random.Random(seed)

    def caption():
        length = draw.choice([1, 2, 3, 4, 9, 14])
        return " ".join(draw.choice(["a", "the", "dog", "boy's", "runs", "on", "in", "grass", "red", "."]) for _ in range(length))

    references = [[caption() for _ in range(draw.choice([1, 3, 5]))] for _ in range(images)]
    return references, [*(caption() for _ in range(images - 3)), "", ".", "zebra zebra zebra"]


def reference_scores(references, candidates):
    keys = range(len(references))
    return metrics.cider(metrics.tokenize(dict(zip(keys, references))),
                             metrics.tokenize({key: [candidates[key]] for key in keys}))


@pytest.mark.parametrize("images", [10, 60])
def test_scores_are_those_of_the_reference_implementation(images):
    references, candidates = world(images)
    corpus, scores = reference_scores(references, candidates)
    found = CiderScorer(references).score(range(images), candidates)
    np.testing.assert_allclose(found, scores, rtol=1e-9, atol=1e-12)
    assert found.mean() == pytest.approx(corpus) and found.max() > 0.5


def test_scores_on_validation_captions(flickr8k):
    references = [image.captions for image in load_references(flickr8k / "val.json").values()]
    candidates = [captions[0] for captions in references]
    references = [captions[1:] for captions in references]
    for shift in 0, 7:  # people's captions, and those of other pictures
        moved = candidates[shift:] + candidates[:shift]
        scores = CiderScorer(references).score(range(len(moved)), moved)
        np.testing.assert_allclose(scores, reference_scores(references, moved)[1], atol=1e-6)


def test_a_caption_in_any_order_scores_against_the_image_that_is_named():
    references, candidates = world(20)
    scorer = CiderScorer(references)
    scores = scorer.score(range(20), candidates)
    order = np.random.default_rng(0).permutation(20)
    assert np.array_equal(scorer.score(order, [candidates[i] for i in order]), scores[order])
    assert np.array_equal(scorer.score([5, 5], [candidates[5]] * 2), scores[[5, 5]])


def test_a_caption_that_was_cut_gets_no_end():
    scorer = CiderScorer([["a man in a red boat"] * 3, ["two dogs play"] * 3], "<end>")
    whole, cut = scorer.score([0, 0], ["a man in a red boat"] * 2, ended=[True, False])
    assert whole == pytest.approx(10) and cut < 9.5


def test_with_an_end_a_caption_that_breaks_off_scores_less():
    references = [["a man in a red boat"] * 3, ["two dogs play"] * 3]
    for end, better in (None, False), ("<end>", True):
        whole, broken = CiderScorer(references, end).score([0, 0], ["the man in a red boat", "a man in a red"])
        assert (whole > broken) == better
