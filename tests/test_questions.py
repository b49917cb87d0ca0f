"""p4_questions.py: answers follow from captions that agree, and yes and no are balanced."""

import json
import os
import random
import re
import subprocess
import sys
from collections import Counter

import ask_llava
import pytest
from conftest import ROOT
from PIL import Image

import p4_questions
from cli import UserError
from dataset import CaptionedImage, read_captions
from questions import WORDINGS, best_constants, derive, derive_all, thing_of


def asked(*captions, seed=0):
    """{kind: [(query, answer), …]}"""
    found = {}
    for question in derive(list(captions), random.Random(seed)):
        found.setdefault(question.kind, []).append((question.query, question.answer))
    return found


def answers(kind, *captions):
    return [answer for _, answer in asked(*captions).get(kind, [])]


@pytest.mark.parametrize("kind, captions, expected", [
    ("animal", ["A dog runs.", "Two dogs."], ["A dog."]),
    ("animal", ["A dog runs.", "An animal."], []),  # one caption is not enough
    ("animal", ["A dog and a cat.", "A dog."], []),  # another animal
    ("count", ["Two dogs run.", "Two brown dogs play.", "Dogs."], ["Two."]),
    ("count", ["Two dogs run.", "Three dogs play.", "Two dogs."], []),
    ("colour", ["A brown dog.", "The brown dog runs.", "A dog."], ["Brown."]),
    ("colour", ["A brown dog.", "The black dog runs.", "A brown dog."], []),
    ("colour", ["A brown and white dog.", "A white dog.", "A white dog."], []),  # two colours
    ("colour", ["A grey dog.", "A gray dog."], ["Gray."]),
    ("action", ["A dog is running.", "A dog running fast.", "It is a dog."], ["Running."]),
    ("action", ["A dog is running.", "A dog jumping.", "A dog running."], []),
    ("where", ["A man sits on a bench.", "The man on the bench."], ["On the bench."]),
    ("where", ["A man on the beach.", "A man in the water."], []),
    ("where", ["Snow on the street.", "A dog on the street."], []),  # one caption of the dog
    ("detail", ["A dog.", "A dog runs on grass.", "Brown fur."], ["A dog runs on grass. Brown fur."]),
    ("detail", ["A dog."], []),
])
def test_an_answer_is_what_captions_agree_on(kind, captions, expected):
    assert answers(kind, *captions) == expected


def test_what_is_absent_is_named_in_no_other_word():
    for seed in range(60):
        for query, answer in asked("A man surfs a wave.", "A surfer on the ocean.", seed=seed)["presence"]:
            thing = thing_of(query)
            assert answer == ("Yes." if thing == "wave" else "No.")
            assert thing not in ("water", "surfboard", "man", "woman", "child", "beach")


@pytest.mark.parametrize("thing, captions", [
    ("stick", ["He sticks out his tongue.", "A boy sticks out his tongue."]), ("wave", ["A man waves.", "The man waves."]),
    ("rock", ["A man on a rock.", "A climber."])])  # once is not enough
def test_what_may_be_there_is_not_asked_about(thing, captions):
    queries = [question.query for question in derive(captions, random.Random(0), all_things=True) if question.kind == "presence"]
    assert queries and thing not in map(thing_of, queries)


def test_questions_read_well():
    for seed in range(40):
        for query, _ in asked("Two dogs in the snow.", "Two brown dogs in snow.", seed=seed)["presence"]:
            assert not re.search(r"\ba (snow|water|grass|sand)\b", query)
    queries = [question.query for question in derive(["A man.", "A man."], random.Random(0), all_things=True)]
    assert any("an umbrella" in query for query in queries) and not any(re.search(r"\ba [aeiou]", query) for query in queries)


def test_yes_and_no_are_balanced_for_each_thing(flickr8k):
    pairs = derive_all(read_captions(flickr8k / "val.json", None))
    both = Counter((thing_of(question.query), question.answer) for _, question in pairs if question.kind == "presence")
    things = {thing for thing, _ in both}
    assert len(things) > 10 and all(both[thing, "Yes."] == both[thing, "No."] > 0 for thing in things)
    assert {question.kind for _, question in pairs} == {*WORDINGS}


def test_every_picture_is_asked_about_each_thing(tmp_path):
    """Five pictures with a dog and a ball, three without either, one of which may show a dog: a cap and a balance."""
    captions = [["A dog has a ball.", "The dog, the ball."]] * 5 + [["A man.", "A man."]] * 2 + [["A hound.", "An animal."]]
    images = [CaptionedImage(tmp_path / f"{i}.jpg", texts) for i, texts in enumerate(captions)]
    for each_thing, dogs, balls in (1, 1, 1), (2, 2, 2), (100, 2, 3):
        pairs = [pair for pair in derive_all(images, each_thing=each_thing) if pair[1].kind == "presence"]
        asked = Counter((thing_of(question.query), question.answer) for _, question in pairs)
        assert asked["dog", "Yes."] == asked["dog", "No."] == dogs and asked["ball", "Yes."] == asked["ball", "No."] == balls
        assert asked["man", "Yes."] == asked["man", "No."] == min(2, each_thing)
        assert {thing for thing, _ in asked} == {"dog", "ball", "man"}  # each with a yes and a no
        assert {number for number, question in pairs if question.answer == "Yes." and thing_of(question.query) == "dog"} <= {*range(5)}
        assert all(number in (5, 6) for number, question in pairs if question.answer == "No." and thing_of(question.query) == "dog")


def test_the_same_seed_asks_the_same(tmp_path, monkeypatch):
    """In another process, too, where sets have another order."""
    captions = ["A brown dog chases a white cat and a black horse.", "A brown dog, a white cat, a black horse and a red car."]
    (tmp_path / "val.json").write_text(json.dumps({
        "images": [{"id": i, "file_name": f"{i}.jpg"} for i in range(5)],
        "annotations": [{"id": 2 * i + k, "image_id": i, "caption": text} for i in range(5) for k, text in enumerate(captions)]}))
    monkeypatch.chdir(tmp_path)
    written = []
    for seed in 0, 1:
        monkeypatch.setattr(sys, "argv", ["p4_questions.py", "val.json", "out.json", f"--seed={seed}"])
        p4_questions.main()
        written.append((tmp_path / "out.json").read_text())
    other = "1" if os.environ.get("PYTHONHASHSEED") == "2" else "2"
    subprocess.run([sys.executable, ROOT / "p4_questions.py", "val.json", "out.json", "--seed=0"], env={**os.environ, "PYTHONHASHSEED": other},
                   check=True, capture_output=True)
    assert (tmp_path / "out.json").read_text() == written[0] != written[1]
    assert {"Brown.", "White.", "Black."} <= {entry["answer"] for entry in json.loads(written[0]) if entry["kind"] == "colour"}


def test_a_blind_model_says_the_commonest_answer():
    questions = derive(["A brown dog runs.", "The brown dog."], random.Random(0)) * 2 + derive(
        ["A red car.", "The red car."], random.Random(0))
    assert best_constants(questions)["colour"] == "Brown."


def test_a_file_of_questions_is_written(workplace, monkeypatch, capsys):
    captions = workplace / "data" / "train.json"
    monkeypatch.setattr(sys, "argv", ["p4_questions.py", str(captions), "questions.json", "--kinds", "detail", "--number", "3"])
    p4_questions.main()
    found = json.loads((workplace / "questions.json").read_text())
    assert len(found) == 3 and all(entry.keys() == {"image", "kind", "query", "answer"} for entry in found)
    assert {entry["kind"] for entry in found} == {"detail"} and "detail 3" in capsys.readouterr().out
    for option, value, message in ("--number", "1000000", "can be derived"), ("--each_thing", "0", "at least 1"):
        monkeypatch.setattr(sys, "argv", ["p4_questions.py", str(captions), "questions.json", option, value])
        with pytest.raises(UserError, match=message):
            p4_questions.main()


# ---- a model that is asked -------------------------------------------------------------------------------------


class Eyes:
    """Stands for a LLaVA that sees the colour of a picture, but cannot count."""

    def __init__(self, name):
        assert name == "eyes"

    def answer(self, pictures, queries, settings):
        colours = {(200, 0, 0): "red", (0, 0, 200): "blue"}
        return ["two" if "many" in query else f" {colours[picture.getpixel((5, 5))].upper()} "
                for picture, query in zip(pictures, queries)]


def test_a_model_is_scored_against_constants_and_other_pictures(tmp_path, monkeypatch, capsys):
    entries = []
    for i in range(12):
        Image.new("RGB", (20, 20), (200, 0, 0) if i % 3 else (0, 0, 200)).save(tmp_path / f"{i}.png")
        entries.append({"image": f"{i}.png", "kind": "colour", "query": "What colour is it?", "answer": "Red." if i % 3 else "Blue."})
        entries.append({"image": f"{i}.png", "kind": "count", "query": "How many dogs?", "answer": "Two." if i % 4 else "Three."})
    (tmp_path / "questions.json").write_text(json.dumps(entries))
    monkeypatch.setattr(ask_llava, "Llava", Eyes)
    monkeypatch.setattr(sys, "argv", ["ask_llava.py", f"{tmp_path / 'questions.json'}", str(tmp_path), "--model=eyes",
                                      "--batch_size=5", f"--results={tmp_path / 'found.json'}",
                                      f"--answers={tmp_path / 'answers.json'}"])
    ask_llava.main()
    found = json.loads((tmp_path / "found.json").read_text())
    colour, count = found["accuracy"]["colour"], found["accuracy"]["count"]
    assert colour["questions"] == 12 and colour["own picture"] == 1 and colour["constant"] == pytest.approx(8 / 12)
    assert colour["another's picture"] < 1
    assert count["own picture"] == count["another's picture"] == count["constant"] == pytest.approx(9 / 12)
    assert found["accuracy"]["all"]["own picture"] == pytest.approx(21 / 24)
    gain = found["gain of the own picture, 95%"]["over constant"]
    assert gain["value"] == pytest.approx(4 / 24) and 0 < gain["low"] <= gain["high"]
    answers = json.loads((tmp_path / "answers.json").read_text())
    assert len(answers) == 24 and answers[0]["own picture"] == " BLUE " and answers[0]["answer"] == "Blue."
    assert "| all | 24 | 0.875 |" in capsys.readouterr().out


@pytest.mark.parametrize("entries, options, message", [
    ([{"image": "a.png", "kind": "colour", "query": "?"}], [], "not a list of"),
    ({"a": 1}, [], "not a list of"),
    ([{"image": "a.png", "kind": "count", "query": "?", "answer": 1}] * 2, [], "each a text"),
    ([{"image": "a.png", "kind": "count", "query": "?", "answer": "One."}] * 2, [], "fewer than two pictures"),
    ([], ["--batch_size=0"], "at least 1"),
])
def test_mistakes_in_asking_are_named_before_a_model_is_loaded(tmp_path, monkeypatch, entries, options, message):
    (tmp_path / "questions.json").write_text(json.dumps(entries))
    monkeypatch.setattr(sys, "argv", ["ask_llava.py", str(tmp_path / "questions.json"), str(tmp_path), "--model=none", *options])
    with pytest.raises(UserError, match=message):
        ask_llava.main()


def test_shuffling_leaves_no_question_its_picture():
    names = [f"{i // 3}.png" for i in range(30)]
    for seed in range(20):
        dealt = ask_llava.others(names, seed)
        assert sorted(dealt) == sorted(names) and all(one != other for one, other in zip(dealt, names))
