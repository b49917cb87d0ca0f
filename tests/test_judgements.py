"""report/judgements.py: Kendall's tau of metrics and human judgements, on a synthetic Flickr8k."""

import json
import sys

import judgements
import numpy as np
import pytest
from conftest import COLOURS
from judgements import judge, read_captions, read_judgements, taus
from PIL import Image

from cli import UserError

TRUTH = {"a.jpg": "red", "b.jpg": "green", "c.jpg": "blue", "d.jpg": "yellow"}


@pytest.fixture
def flickr(tmp_path):
    """Four images of one colour, five captions each; experts grade a caption of the true colour 4, another 1 or 2."""
    (tmp_path / "images").mkdir()
    lines, expert, crowd = [], [], []
    for image, colour in TRUTH.items():
        Image.new("RGB", (32, 32), COLOURS[colour]).save(tmp_path / "images" / image)
        lines += [f"{image}#{i}\ta {colour} {thing} on the wall" for i, thing in enumerate(("picture", "photo", "sheet", "sign", "card"))]
        lines += [f"more_{image}#{i}\tone {colour} {thing} hangs there" for i, thing in enumerate(("poster", "board", "plate", "tile", "flag"))]
    for image in TRUTH:
        expert.append(f"{image}\t{image}#0\t4\t4\t4")  # its own caption: left out
        for other in TRUTH:
            grades = (4, 4, 3) if other == image else (1, 1, 2)
            expert.append("\t".join([image, f"more_{other}#2", *map(str, grades)]))
            crowd.append("\t".join([image, f"more_{other}#2", *(("1.0", "3", "0") if other == image else ("0.0", "0", "3"))]))
    (tmp_path / "Flickr8k.token.txt").write_text("\n".join(lines))
    (tmp_path / "ExpertAnnotations.txt").write_text("\n".join(expert))
    (tmp_path / "CrowdFlowerAnnotations.txt").write_text("\n".join(crowd))
    return tmp_path


def test_every_grade_counts_and_own_captions_are_left_out(flickr):
    captions = read_captions(flickr / "Flickr8k.token.txt")
    pairs = read_judgements(flickr, "expert", captions)
    assert len(pairs) == 16 and pairs[0] == ("a.jpg", "one red plate hangs there", [4, 4, 3])
    assert read_judgements(flickr, "crowdflower", captions)[1] == ("a.jpg", "one green plate hangs there", [0])


def by_hand(scores, grades):
    """Tau-b and tau-c from their definitions."""
    scores, grades = np.array(scores), np.array(grades)
    i, j = np.triu_indices(len(scores), 1)
    x, y = np.sign(scores[i] - scores[j]), np.sign(grades[i] - grades[j])
    least = min(len(set(scores)), len(set(grades)))
    return (x * y).sum() / np.sqrt((x != 0).sum() * (y != 0).sum()), 2 * (x * y).sum() / (len(scores) ** 2 * (least - 1) / least)


def test_taus_are_those_of_the_definitions():
    random = np.random.default_rng(0)
    pairs = [("x", "y", [float(grade) for grade in random.integers(1, 5, 3)]) for _ in range(20)]
    scores = random.normal(size=20).round(1)
    found = taus(scores, pairs)
    flat = [grade for _, _, grades in pairs for grade in grades]
    assert [found["tau-b"], found["tau-c"]] == pytest.approx(by_hand(scores.repeat(3), flat))
    assert taus([1, 2, 3], [("", "", [1.0]), ("", "", [2.0]), ("", "", [4.0])]) == pytest.approx({"tau-b": 1, "tau-c": 1})


def test_a_metric_that_sees_what_people_see_agrees_with_them(flickr, without_meteor):
    captions = read_captions(flickr / "Flickr8k.token.txt")
    found = judge(read_judgements(flickr, "crowdflower", captions), captions)
    assert found["CIDEr"]["tau-b"] > 0.8 and found["BLEU-1"]["tau-b"] > 0.8


def test_the_script_writes_both_sets(flickr, monkeypatch, capsys, without_meteor):
    monkeypatch.setattr(sys, "argv", ["judgements.py", str(flickr), "--results", str(flickr / "out.json")])
    judgements.main()
    found = json.loads((flickr / "out.json").read_text())
    assert (found["expert"]["judgements"], found["crowdflower"]["judgements"]) == (48, 16)
    assert "tau-c" in capsys.readouterr().out and found["expert"]["metrics"]["CIDEr"]["tau-c"] > 0.5


def test_the_images_are_looked_at_once_each(flickr, without_meteor):
    class Clip:
        names = ["ImageTextScore"]

        def encode_images(self, paths):
            self.seen = paths
            return np.arange(len(paths))

        def score(self, images, texts):
            return np.array([float([*TRUTH.values()][image] in text) for image, text in zip(images, texts)])

    captions, clip = read_captions(flickr / "Flickr8k.token.txt"), Clip()
    found = judge(read_judgements(flickr, "crowdflower", captions), captions, flickr / "images", clip)
    assert clip.seen == [flickr / "images" / name for name in TRUTH] and found["ImageTextScore"]["tau-b"] == pytest.approx(1)


@pytest.mark.parametrize("file, text, said", [("ExpertAnnotations.txt", "a.jpg\tb", "columns"), ("Flickr8k.token.txt", "", "columns"),
                                              ("ExpertAnnotations.txt", "a.jpg\tz.jpg#0\t1\t2\t3", "has not"),
                                              ("ExpertAnnotations.txt", "a.jpg\tmore_b.jpg#0\t1\t2\tx", "no numbers"),
                                              ("ExpertAnnotations.txt", "a.jpg\ta.jpg#0\t1\t2\t3", "no pair")])
def test_files_of_another_kind_are_refused(flickr, file, text, said):
    (flickr / file).write_text(text)
    with pytest.raises(UserError, match=said):
        read_judgements(flickr, "expert", read_captions(flickr / "Flickr8k.token.txt"))
