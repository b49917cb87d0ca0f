"""Damaged files, a few of each kind; tests/mutations.py tests more."""

import mutations
import pytest


@pytest.mark.parametrize("kind, count", [(mutations.pictures, 130), (mutations.weights, 30), (mutations.states, 30), (mutations.jsons, 60)])
def test_damaged_files_are_read_or_refused(kind, count):
    outcomes, wrong = mutations.try_all(kind, count, seed=1)
    assert not wrong, "\n".join(wrong)
    assert sum(outcomes.values()) == count and {outcome for _, outcome in outcomes} >= {"refused"}


def test_mutations_change_files():
    import numpy as np

    random = np.random.default_rng(0)
    data = bytes(range(256)) * 20
    changed = [mutations.mutate(data, random) for _ in range(200)]
    assert sum(mutated != data for mutated in changed) > 180 and len({len(mutated) for mutated in changed}) > 50


def test_a_killed_training_ends_as_one_that_was_left_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    killed, wrong = mutations.kills(2)
    assert killed >= 2 and not wrong, "\n".join(wrong)
