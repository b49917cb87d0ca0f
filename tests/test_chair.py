"""CHAIR: the COCO categories that a caption names, and those of them that no reference names."""

import pytest

from chair import NAMES, Chair, kinds_named, singular


def test_all_kinds_of_coco_have_names():
    assert len(set(NAMES.values())) == 80 and NAMES["puppy"] == "dog" and NAMES["cell phone"] == "cell phone"


@pytest.mark.parametrize("caption, kinds", [
    ("Two men ride bicycles past a parked fire truck.", ["person", "bicycle", "truck"]),
    ("A baby elephant eats hot dogs at a dining-table", ["elephant", "hot dog", "dining table"]),
    ("a baby holds a teddy bear", ["person", "teddy bear"]),
    ("An orange cat beside oranges and two knives", ["cat", "orange", "knife"]),
    ("A baseball player swings his bat at a ball", ["person", "baseball bat", "sports ball"]),
    ("a roll of toilet paper at the bus stop", []),
    ("Buses, mice and glasses of wine", ["bus", "mouse"]),
    ("THE CHILD'S kitties in a man’s lap", ["person", "cat", "person"]),
    ("Two men watch a motor bike and a dirt-bike", ["person", "motorcycle", "motorcycle"]),
    ("a jet ski beside a toilet seat and a catcher's mitt", ["toilet", "person", "baseball glove"]),
    ("", []),
])
def test_kinds_that_a_caption_names(caption, kinds):
    assert kinds_named(caption) == kinds


def test_singulars():
    assert [singular(word) for word in "dogs benches boxes ponies glass bus tennis women this".split()] == [
        "dog", "bench", "box", "pony", "glass", "bus", "tennis", "woman", "this"]


def test_scores_by_hand():
    captions = ["a cat and a dog and another dog", "a man on a horse", "something"]
    references = [["a kitten asleep", "a cat on a bed"], ["a woman rides a horse", "a pony"], ["a bowl"]]
    found = Chair(captions, references)
    assert found.made_up == [["dog", "dog"], [], []]
    assert found.scores() == pytest.approx({"CHAIRs": 1 / 3, "CHAIRi": 2 / 5, "object recall": 3 / 5})
    assert found.images.tolist() == [1, 0, 0]
    assert Chair(["x"], [["y"]]).scores() == {"CHAIRs": 0, "CHAIRi": 0, "object recall": 0}
