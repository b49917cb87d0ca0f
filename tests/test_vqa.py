"""p4_evaluate.py: the official rule on cases computed by hand, files as published, boxes in every format, baselines with other
pictures, and resuming."""

import csv
import json
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import p4_evaluate
from cli import UserError
from grounding import overlaps, parse_box, read_references
from p4_evaluate import by_kind, commonest_answers, difference, hub_rows, other_pictures
from vqa import Asked, accuracy, normalize, picture_files, read_relations, read_vqa

COLOURS = {"red": (220, 20, 20), "green": (20, 180, 40), "blue": (30, 40, 220)}


# ---- the official rule -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("equal, expected", [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_accuracy_by_hand(equal, expected):
    people = ["frisbee"] * equal + [f"thing {i}" for i in range(10 - equal)]
    assert accuracy("frisbee", people) == pytest.approx(expected)


@pytest.mark.parametrize("text, expected", [
    ("None", "0"), ("Two dogs.", "2 dogs"), ("ten", "10"), ("eleven", "eleven"), ("The  dog", "dog"), ("a", ""), ("An", ""), ("dont", "don't"),
    ("couldnt've", "couldn't've"), ("couldn'tve", "couldn't've"), ("it's", "it's"), ("1,000", "1000"), ("black/white", "black white"),
    ("black, white", "black white"),
    ("3.5", "3.5"), ("u.s.", "us"), ("ski-slope", "ski slope"), ("what?!", "what"), ("", ""), ("yes\nsir", "yes sir"),
])
def test_answers_are_compared_as_the_official_rule_has_it(text, expected):
    assert normalize(text) == expected


def test_both_sides_are_normalised_only_where_people_differ():
    assert accuracy("Two", ["two"] * 10) == 0 and accuracy("Two", ["two"] * 10, always=True) == 1
    assert accuracy("Two.", ["2"] * 4 + ["two"] * 5 + ["3"]) == 1
    assert accuracy("the cat", ["cat"] * 9 + ["dog"]) == 1
    assert accuracy("a", ["a"] * 9 + ["b"]) == 1  # both become nothing, and are equal


# ---- files -----------------------------------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Twelve questions about three coloured pictures, in VQA v2's two files and as a list."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "pictures"
    folder.mkdir()
    questions, annotations, listed = [], [], []
    for number, (name, colour) in enumerate(COLOURS.items(), 1):
        Image.new("RGB", (60, 40), colour).save(folder / f"COCO_val2014_{number:012}.jpg")
        for k in range(4):
            query, answer = (("What colour is it?", name), ("Is it red?", "yes" if name == "red" else "no"))[k % 2]
            questions.append({"image_id": number, "question": query, "question_id": 10 * number + k})
            annotations.append({"image_id": number, "question_id": 10 * number + k, "question_type": query[:5], "answer_type": "other",
                                "answers": [{"answer": answer, "raw_answer": f"{answer}ish", "answer_id": i} for i in range(9)]
                                + [{"answer": "who knows", "raw_answer": "", "answer_id": 9}]})
            listed.append({"image": f"COCO_val2014_{number:012}.jpg", "folder": ".", "question": query, "answer": answer, "agree": 9})
    (tmp_path / "questions.json").write_text(json.dumps({"questions": questions}))
    (tmp_path / "annotations.json").write_text(json.dumps({"annotations": annotations}))
    (tmp_path / "list.json").write_text(json.dumps(listed))
    return tmp_path


def test_two_files_and_a_list_give_the_same_questions(place):
    two, one = read_vqa("questions.json", "annotations.json", "pictures"), read_vqa("list.json", images="pictures")
    assert len(two) == len(one) == 12 and two[1].name == "11" and two[1].people == ["yes"] * 9 + ["who knows"]
    assert [(item.query, item.commonest) for item in two] == [(item.query, item.commonest) for item in one]
    assert [item.picture.resolve() for item in two] == [item.picture.resolve() for item in one]
    assert one[0].kind == "what colour" and {item.answer_kind for item in one} == {"other", "yes/no"}
    for said in "red", "yes", "who knows", "blue":  # what the tenth said is not known, so that nothing equals it
        assert accuracy(said, one[0].people) == (said == "red")


@pytest.mark.parametrize("content, message", [({"questions": [{"question_id": 1}]}, "not as VQA v2"), ([{"image": "x"}], "not as VQA v2"),
                                              ({"questions": 3}, "not as VQA v2")])
def test_other_files_are_refused(place, content, message):
    Path("wrong.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        read_vqa("wrong.json", "annotations.json", "pictures")
    with pytest.raises(UserError, match="name --annotations"):
        read_vqa("questions.json")


def test_relations_are_asked_for(place):
    Path("relationships.json").write_text(json.dumps([
        {"image_id": 1, "relationships": [{"relationship_id": 7, "predicate": "ON ", "subject": {"name": "Man"}, "object": {"names": ["horse"]}}]},
        {"image_id": 99, "relationships": [{"relationship_id": 8, "predicate": "near", "subject": {"name": "a"}, "object": {"name": "b"}}]}]))
    Path("qa.json").write_text(json.dumps([{"id": 2, "qas": [
        {"qa_id": 5, "image_id": 2, "question": "Who rides?", "answer": "A man."}]}]))
    pictures = picture_files("pictures")
    (found,) = read_relations("relationships.json", pictures)
    assert (found.query, found.people) == ("What is the relationship between the man and the horse?", ["on"])
    (found,) = read_relations("qa.json", pictures)
    assert (found.query, found.people, found.picture) == ("Who rides?", ["a man"], pictures[2])
    Path("qa.json").write_text("[]")
    with pytest.raises(UserError, match="none of the pictures"):
        read_relations("qa.json", pictures)


def test_the_hubs_rows_are_read(tmp_path):
    picture = Image.new("RGB", (20, 10))
    asked = hub_rows("vqa", [{"question_id": 3, "image": picture, "question": "Is it?", "answers": [{"answer": "yes"}, {"answer": "no"}]},
                             {"question_id": 4, "image": picture, "question": "Why?", "answers": ["so", "so"]}], tmp_path / "hub")
    assert [(item.name, item.people, item.picture.exists()) for item in asked] == [("3", ["yes", "no"], True), ("4", ["so", "so"], True)]
    asked = hub_rows("boxes", [{"question_id": "5", "image": picture, "bbox": [1, 2, 3, 4], "answer": ["left", "dark"]}], tmp_path / "hub")
    assert [(item.name, item.query) for item in asked] == [("5-0", "left"), ("5-1", "dark")] and [item.box for item in asked] == [(1, 2, 4, 6)] * 2


# ---- boxes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form, answer, expected", [
    ("hundredths", "Here {<10><20><30><40>}.", (20, 20, 80, 60)),
    ("llava", "[0.25, 0.5, 0.75, 0.75]", (50, 50, 150, 100)),
    ("paligemma", "<loc0512><loc0256><loc1024><loc0768> dog", (50, 50, 150, 100)),
    ("qwen", "(100,200),(300,400)", (20, 20, 60, 40)),
    ("qwen2.5", '[{"bbox_2d": [10, 20, 30, 40], "label": "dog"}]', (10, 20, 30, 40)),
])
def test_boxes_in_every_form(form, answer, expected):
    """In a picture of 200 x 100 pixels; LLaVA's square has 50 pixels of nothing above and below."""
    assert parse_box(answer, form, 200, 100) == pytest.approx(expected)
    assert parse_box("I cannot see it.", form, 200, 100) is None
    others = {"hundredths", "llava", "paligemma", "qwen"} - {form}
    assert all(parse_box(answer, other, 200, 100) is None for other in others if form != "qwen2.5" or other != "llava")


def test_boxes_without_area_are_none():
    assert parse_box("[0.5, 0.5, 0.5, 0.9]", "llava", 10, 10) is None and parse_box("[0.5, 0.5, 0.4, 0.9]", "llava", 10, 10) is None


def test_overlaps_by_hand():
    found = overlaps([(0, 0, 10, 10), None, (0, 0, 10, 5), (20, 20, 30, 30)], [(0, 0, 10, 10)] * 4)
    assert found == pytest.approx([1, 0, 0.5, 0])


def test_referring_expressions_are_read_without_running_code(place):
    rows = [{"ref_id": 4, "ann_id": 9, "image_id": 1, "split": "val", "sentences": [{"sent": "left one"}, {"sent": "dark"}]},
            {"ref_id": 5, "ann_id": 9, "image_id": 1, "split": "testA", "sentences": [{"sent": "it"}]}]
    Path("refs(unc).p").write_bytes(pickle.dumps(rows, protocol=2))
    Path("instances.json").write_text(json.dumps({"annotations": [{"id": 9, "bbox": [1, 2, 30, 40]}],
                                                  "images": [{"id": 1, "file_name": "COCO_val2014_000000000001.jpg"}]}))
    found = read_references("refs(unc).p", "instances.json", "pictures", "val")
    assert [(item.name, item.query, item.box) for item in found] == [("4-0", "left one", (1, 2, 31, 42)), ("4-1", "dark", (1, 2, 31, 42))]
    assert len(read_references("refs(unc).p", "instances.json", "pictures")) == 3
    with pytest.raises(UserError, match="no expressions of the split train"):
        read_references("refs(unc).p", "instances.json", "pictures", "train")

    class Evil:
        def __reduce__(self):
            return Path.touch, (Path("ran"),)

    Path("evil.p").write_bytes(pickle.dumps([Evil()]))
    with pytest.raises(UserError, match="not a plain file"):
        read_references("evil.p", "instances.json", "pictures")
    assert not Path("ran").exists()
    Path("half.p").write_bytes(pickle.dumps(rows)[:20])
    with pytest.raises(UserError, match="not a plain file"):
        read_references("half.p", "instances.json", "pictures")


# ---- baselines and scores ----------------------------------------------------------------------------------------


def test_another_picture_is_never_ones_own():
    for counts in [1] * 7, [3, 3], [4, 1, 1, 2], [5, 1, 2, 2]:
        asked = [Asked(f"{p}-{i}", Path(str(p)), "") for p, count in enumerate(counts) for i in range(count)]
        shown = other_pictures(asked)
        assert all(path != item.picture for path, item in zip(shown, asked))
    with pytest.raises(UserError, match="no other"):
        other_pictures([Asked("1", Path("a"), ""), Asked("2", Path("a"), ""), Asked("3", Path("b"), "")])


def test_the_commonest_answer_is_that_of_other_questions():
    asked = [Asked(str(i), Path("x"), "", [answer] * 10, kind) for i, (answer, kind) in enumerate(
        [("yes", "is"), ("yes", "is"), ("no", "is"), ("red", "what"), ("2", "how"), ("yes", "is")])]
    assert commonest_answers(asked) == ["yes", "yes", "yes", "yes", "yes", "yes"]
    asked[1].people = ["no"] * 10
    assert commonest_answers(asked)[:2] == ["no", "yes"]  # its own does not count


def test_an_interval_draws_pictures_with_all_their_questions():
    asked = [Asked(str(i), Path(str(i // 50)), "") for i in range(100)]
    ours = [1.0] * 50 + [0.0] * 50
    found = difference(asked, ours, [0.0] * 100)
    assert found.value == 0.5 and (found.low, found.high) == (0, 1)  # of two pictures, both may be the same one
    apart = difference([Asked(str(i), Path(str(i)), "") for i in range(100)], ours, [0.0] * 100)
    assert 0.38 < apart.low < 0.45 < 0.55 < apart.high < 0.62
    assert by_kind([Asked("", Path(), "", kind="a")] * 10 + [Asked("", Path(), "", kind="b")], np.arange(11), "kind") == {"a": (10, 4.5)}


# ---- the command -----------------------------------------------------------------------------------------------


class Colours:
    """Stands for a LLaVA: it sees the colour of a picture's middle, and what is asked."""

    calls, fails_at = 0, None

    def __init__(self, name):
        pass

    def answer(self, pictures, instructions, settings, seed=0):
        type(self).calls += 1
        if self.calls == self.fails_at:
            raise KeyboardInterrupt
        return [self.say(np.asarray(picture)[20, 30].astype(int), asked) for picture, asked in zip(pictures, instructions)]

    @staticmethod
    def say(pixel, asked):
        name = min(COLOURS | {"grey": (127, 127, 127)}, key=lambda name: abs(np.array((COLOURS | {"grey": (127, 127, 127)})[name]) - pixel).sum())
        if asked.startswith("Please provide"):
            return "[0.0, 0.2, 0.5, 0.8]" if name == "red" else "Nowhere."
        return f"{name.capitalize()}." if asked.startswith("What") else "Yes." if name == "red" else "No."


@pytest.fixture
def colours(monkeypatch):
    monkeypatch.setattr(p4_evaluate, "Llava", Colours)
    monkeypatch.setattr(p4_evaluate, "default_model", lambda: "colours")
    monkeypatch.setattr(Colours, "calls", 0)
    monkeypatch.setattr(Colours, "fails_at", None)
    return Colours


def evaluate(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["p4_evaluate.py", *arguments])
    return p4_evaluate.main()


def test_questions_are_answered_scored_and_kept(place, monkeypatch, capsys, colours):
    arguments = "vqa", "questions.json", "--annotations", "annotations.json", "--images", "pictures", "--out", "found.csv", "--batch_size", "5"
    assert evaluate(monkeypatch, *arguments) == 0
    out, table = capsys.readouterr().out, json.loads(Path("found.json").read_text())
    assert table["questions"] == 12 and table["scores"]["own picture"] == 1
    # Another's picture has another colour; whether it is red is the same for two of three.
    assert table["scores"]["another's picture"] == pytest.approx((0 + 2) / 12, abs=0.17) and table["scores"]["grey picture"] == pytest.approx(4 / 12)
    assert table["exact matches with the commonest answer"]["own picture"] == 1
    assert table["differences"]["grey picture"]["value"] == pytest.approx(8 / 12) and "own picture over it +0.667" in out
    with open("found.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 12 and rows[0]["own picture"] == "red" == rows[0]["people"] and rows[0]["grey picture"] == "grey"
    assert Path("found.png").read_bytes().startswith(b"\x89PNG") and not list(place.glob("*.part"))


def test_an_interrupted_run_goes_on(place, monkeypatch, capsys, colours):
    arguments = "vqa", "list.json", "--images", "pictures", "--out", "found.csv", "--batch_size", "4"
    colours.fails_at = 5  # the second batch with another's picture
    with pytest.raises(KeyboardInterrupt):
        evaluate(monkeypatch, *arguments)
    assert not Path("found.csv").exists() and len(list(place.glob("*.part"))) == 2
    colours.fails_at = None
    assert evaluate(monkeypatch, *arguments) == 0
    assert colours.calls == 5 + 5  # 9 batches in all, 4 of them before
    assert json.loads(Path("found.json").read_text())["scores"]["own picture"] == 1


def test_relations_and_boxes_are_measured(place, monkeypatch, capsys, colours):
    Path("qa.json").write_text(json.dumps([{"id": number, "qas": [{"qa_id": number, "image_id": number, "question": "What colour?",
                                                                   "answer": f"{name.capitalize()}."}]}
                                           for number, name in enumerate(COLOURS, 1)]))
    assert evaluate(monkeypatch, "relations", "qa.json", "--images", "pictures", "--out", "relations.csv") == 0
    assert json.loads(Path("relations.json").read_text())["scores"] == {
        "own picture": 1, "another's picture": 0, "grey picture": 0, "commonest answer": 0}
    rows = [{"ref_id": number, "ann_id": 9, "image_id": number, "split": "val", "sentences": [{"sent": "it"}]} for number in (1, 2)]
    Path("refs.p").write_bytes(pickle.dumps(rows))
    Path("instances.json").write_text(json.dumps({"annotations": [{"id": 9, "bbox": [0, 2, 30, 36]}], "images": [
        {"id": number, "file_name": f"COCO_val2014_{number:012}.jpg"} for number in (1, 2)]}))
    assert evaluate(monkeypatch, "boxes", "refs.p", "--annotations", "instances.json", "--images", "pictures", "--out", "boxes.csv") == 0
    table = json.loads(Path("boxes.json").read_text())
    assert table["scores"] == {"own picture": 0.5, "another's picture": 0.5, "grey picture": 0, "the whole picture": 0}
    assert table["answers without a box"]["own picture"] == 1 and "1 of 2" in capsys.readouterr().out


def test_a_picture_that_cannot_be_read_is_named(place, monkeypatch, capsys, colours):
    Path("pictures/COCO_val2014_000000000002.jpg").write_bytes(b"no picture")
    assert evaluate(monkeypatch, "vqa", "list.json", "--images", "pictures", "--out", "found.csv") == 3
    assert capsys.readouterr().err.count("skipped pictures/COCO_val2014_000000000002.jpg") == 1
    assert json.loads(Path("found.json").read_text())["scores"]["own picture"] == pytest.approx(8 / 12)  # its questions count as wrong


@pytest.mark.parametrize("arguments, message", [
    (["vqa", "list.json", "--images", "pictures", "--out", "found.txt"], "ends in .csv"),
    (["vqa", "list.json", "--images", "pictures", "--prompt", "What?"], "must hold {}"),
    (["boxes", "list.json"], "needs --annotations"), (["relations", "list.json"], "needs --images"),
    (["boxes", "list.json", "--form", "mine"], "choose from hundredths"), (["vqa", "nowhere.json"], "does not exist"),
])
def test_mistakes_are_one_line(place, monkeypatch, colours, arguments, message):
    with pytest.raises(UserError, match=message):
        evaluate(monkeypatch, *arguments)
