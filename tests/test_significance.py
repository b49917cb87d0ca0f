"""The paired bootstrap: BLEU from its counts, calibration without a difference, power with one."""

import random
import time

import numpy as np
import pytest
from pycocoevalcap.bleu.bleu import Bleu
from scipy.stats import kstest, norm

from cider import CiderScorer
from significance import bleu_statistics, compare, corpus_bleu, paired_bootstrap, resampled_sums


def world(images=300, seed=0):
    """References {key: three captions} and two systems' captions, of which neither is better."""
    draw = random.Random(seed)
    words = "a the dog cat runs sits on in grass snow red big".split()

    def caption():
        return " ".join(draw.choice(words) for _ in range(draw.choice([5, 8, 11])))

    def retold(caption):
        return " ".join(draw.choice([word, word, word, draw.choice(words), ""]) for word in caption.split())

    references = {i: [caption() for _ in range(3)] for i in range(images)}
    return references, *({key: [retold(group[0])] for key, group in references.items()} for _ in range(2))


def test_corpus_bleu_from_its_counts_is_the_reference_implementations():
    references, candidates, _ = world()
    statistics = bleu_statistics(references, candidates)
    corpus, images = Bleu(4).compute_score(references, candidates, verbose=0)
    np.testing.assert_allclose(corpus_bleu(statistics.sum(0)), corpus, rtol=1e-12)
    np.testing.assert_allclose(corpus_bleu(statistics).T, images, rtol=1e-12)


def test_p_values_are_uniform_where_captions_are_exchanged_at_random():
    """300 pairs of systems without a difference: the p-values of CIDEr and of BLEU must be uniform."""
    references, one, two = world()
    scorer = CiderScorer(list(references.values()))
    cider = np.stack([scorer.score(range(len(references)), [caption for caption, in system.values()]) for system in (one, two)])
    statistics = np.stack([bleu_statistics(references, one), bleu_statistics(references, two)])
    random_state = np.random.default_rng(1)
    p_values = {"CIDEr": [], "BLEU-1": [], "BLEU-4": []}
    for seed in range(300):
        first = random_state.integers(0, 2, len(references))
        both = np.arange(len(references))
        ours, other = ({"CIDEr": cider[which, both], "BLEU-1": None, "BLEU-4": None} for which in (first, 1 - first))
        found = compare(ours, other, statistics[first, both], statistics[1 - first, both], draws=500, seed=seed)
        for name, values in p_values.items():
            values.append(found[name].p)
    for name, values in p_values.items():
        assert kstest(values, "uniform").pvalue > 0.01, name


def test_sums_of_drawn_images_do_not_depend_on_how_many_fit_into_memory(monkeypatch):
    columns = np.random.default_rng(0).random((7, 3))
    whole = resampled_sums(columns, 50, seed=5)
    random_state = np.random.default_rng(5)
    by_hand = [columns[random_state.integers(0, 7, 7)].sum(0) for _ in range(50)]
    np.testing.assert_allclose(whole, by_hand)
    many = np.ones((2**22 // 3 + 1, 1))  # three draws fit, or two
    assert resampled_sums(many, 5).tolist() == [[len(many)]] * 5


def test_interval_and_p_value_are_those_of_the_normal_approximation():
    differences = np.random.default_rng(0).normal(0.08, 1, 1000)
    found = paired_bootstrap(differences)
    error = differences.std() / 1000**0.5
    assert found.value == pytest.approx(differences.mean())
    assert (found.low, found.high) == pytest.approx((found.value - 1.96 * error, found.value + 1.96 * error), abs=0.1 * error)
    assert found.p == pytest.approx(2 * norm.sf(abs(found.value) / error), abs=0.01)


def test_a_real_difference_is_far_from_zero_and_its_sign_is_right():
    references, one, _ = world()
    good = {key: [group[0]] for key, group in references.items()}
    mean = np.random.default_rng(0).random(len(references))
    found = compare({"M": mean + 0.3, "BLEU-1": None}, {"M": mean[::-1], "BLEU-1": None},
                    bleu_statistics(references, good), bleu_statistics(references, one))
    assert list(found) == ["M", "BLEU-1"]
    assert all(0 < difference.low < difference.value < difference.high and difference.p < 0.001 for difference in found.values())
    back = compare({"M": mean[::-1]}, {"M": mean + 0.3})["M"]
    assert (back.value, back.low, back.high) == pytest.approx((-found["M"].value, -found["M"].high, -found["M"].low))


def test_equal_systems_do_not_differ():
    found = paired_bootstrap(np.zeros(50))
    assert (found.value, found.low, found.high, found.p) == (0, 0, 0, 1)


def test_ten_thousand_draws_of_a_thousand_images_take_seconds():
    start = time.process_time()
    paired_bootstrap(np.random.default_rng(0).random(1000))
    assert time.process_time() - start < 10
