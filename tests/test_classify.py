"""p1_clip_classify.py: CLIP's labels, templates averaged as in the paper, no input overwritten."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import clip
import numpy as np
import pytest
import torch
from PIL import Image

import cli
import p1_clip_classify
from clip_model import ASSIGNMENT_TEMPLATES, Clip, average, embed_classes
from p1_clip_classify import plot_bars, read_classes, true_label, write_labels

ROOT = Path(__file__).resolve().parent.parent
CLASSES = {"0": "apple", "1": "aquarium_fish", "2": "baby", "3": "can", "10": "pickup_truck", "11": "sweet__pepper_",
           "12": "sea", "n_4": "willow_tree"}
SPOKEN = ["apple", "aquarium fish", "baby", "can", "pickup truck", "sweet pepper", "sea", "willow tree"]
NAMES = [f"{label}_{i}.png" for label in CLASSES for i in range(3)]


@pytest.fixture(scope="module")
def weights(clip_weights, tmp_path_factory):
    """The small random CLIP, with matrices so random that different pictures get different labels."""
    state = torch.load(clip_weights)
    torch.manual_seed(1)
    for value in state.values():
        if value.ndim > 1:
            value.normal_(std=0.3)
    path = tmp_path_factory.mktemp("classify") / "clip.pt"
    torch.save({name: value.half().float() for name, value in state.items()}, path)
    return path


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """Each test runs in a folder of its own, with 24 pictures in images/ and an id2label.json."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(p1_clip_classify, "default_clip", lambda: None)
    make_images("images", *NAMES)
    Path("id2label.json").write_text(json.dumps(CLASSES))
    return tmp_path


def make_images(folder, *names):
    Path(folder).mkdir(exist_ok=True)
    random = np.random.default_rng(0)
    for name in names:
        Image.fromarray(random.integers(0, 256, (3, 4, 3), dtype=np.uint8)).resize((50, 40)).save(Path(folder, name))


@pytest.fixture
def classify(weights, monkeypatch, capfd):
    """Run p1_clip_classify.py with these arguments: its exit status, stdout and stderr."""

    def classify(*arguments, weights=weights):
        options = ["--clip_weights", weights] if weights else []
        monkeypatch.setattr(sys, "argv", ["p1_clip_classify.py", *map(str, [*arguments, *options])])
        with pytest.raises(SystemExit) as exit:
            cli.run(p1_clip_classify.main)
        return exit.value.code, *capfd.readouterr()

    return classify


def read(path):
    """The CSV as {file name: label}, in its order."""
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["filename", "label"] and len({name for name, _ in rows[1:]}) == len(rows) - 1
    return dict(rows[1:])


def contents(folder):
    return {path: (path.lstat().st_mtime_ns, path.read_bytes() if path.is_file() else None)
            for path in Path(folder).rglob("*")}


@torch.inference_mode()
def direct(weights, names, template="A photo of a {}."):
    """CLIP's probabilities (n, C) of the images, by its own forward pass, one image at a time."""
    model, preprocess = clip.load(str(weights), "cpu")
    prompts = clip.tokenize([template.format(name) for name in SPOKEN])
    return torch.cat([model(preprocess(Image.open(Path("images", name)))[None], prompts)[0].softmax(-1) for name in names])


# ---- labels ----------------------------------------------------------------------------------------------------


def test_labels_are_those_of_a_direct_computation(classify, weights):
    names = sorted(NAMES)
    for options, template in [([], "A photo of a {}."), (["--template", "No {object}, no score."], "No {}, no score."),
                              (["--template", "{}: a {object}"], "{0}: a {0}")]:
        status, out, err = classify("images", "id2label.json", "labels.csv", *options)
        assert status == 0 and "24 labels in labels.csv" in err
        expected = [list(CLASSES)[i] for i in direct(weights, names, template).argmax(-1)]
        found = read("labels.csv")
        assert list(found) == names and list(found.values()) == expected
        assert len(set(expected)) > 2
        right = sum(name.rpartition("_")[0] == label for name, label in found.items())
        assert out == f"accuracy {right / 24:.4f}: {right} of the 24 images whose names begin with a label\n"


@torch.inference_mode()
def test_templates_are_averaged_as_in_clips_paper(classify, weights):
    """The computation of its notebook Prompt_Engineering_for_ImageNet.ipynb."""
    model, preprocess = clip.load(str(weights), "cpu")
    columns = []
    for name in SPOKEN:
        prompts = [template.replace("{object}", name) for template in ASSIGNMENT_TEMPLATES]
        embeddings = model.encode_text(clip.tokenize(prompts))
        embeddings /= embeddings.norm(dim=-1, keepdim=True)
        embedding = embeddings.mean(dim=0)
        columns.append(embedding / embedding.norm())
    expected = torch.stack(columns, dim=1)
    found = average(embed_classes(Clip(weights), list(CLASSES.values()), ASSIGNMENT_TEMPLATES))
    torch.testing.assert_close(found.T, expected, atol=1e-5, rtol=0)
    assert classify("images", "id2label.json", "labels.csv", "--template", *ASSIGNMENT_TEMPLATES)[0] == 0
    for name, label in read("labels.csv").items():
        image = model.encode_image(preprocess(Image.open(Path("images", name)))[None])
        assert label == list(CLASSES)[(image / image.norm() @ expected).argmax()]


def test_no_order_changes_a_label(classify, weights, monkeypatch):
    assert classify("images", "id2label.json", "one.csv", "--template", *ASSIGNMENT_TEMPLATES)[0] == 0
    Path("other.json").write_text(json.dumps(dict(reversed(CLASSES.items()))))
    listing = Path.iterdir
    monkeypatch.setattr(Path, "iterdir", lambda self: sorted(listing(self), reverse=True))
    assert classify("images", "other.json", "other.csv", "--template", *ASSIGNMENT_TEMPLATES[::-1])[0] == 0
    assert Path("one.csv").read_bytes() == Path("other.csv").read_bytes()
    paths = [Path("images", name) for name in NAMES]
    (_, one, _), (_, many, _) = (Clip(weights, batch_size=size).encode_images(paths) for size in (1, 64))
    torch.testing.assert_close(one, many, atol=1e-5, rtol=0)


def test_true_label_is_what_the_name_begins_with():
    for name, label in {"0_1.png": "0", "10_1.png": "10", "1_0_7.png": "1", "n_4_7.jpg": "n_4", "n_5_7.jpg": None,
                        "0.png": None, "7_1.png": None, "_1.png": None, "00_1.png": None}.items():
        assert true_label(name, CLASSES) == label


def test_accuracy_is_of_the_images_whose_label_is_known(classify):
    make_images("some", "0_1.png", "holiday.png", "99_1.png", "n_4_2.png")
    Path("some/1_2.png").touch()
    status, out, _ = classify("some", "id2label.json", "labels.csv")
    found = read("labels.csv")
    right = (found["0_1.png"] == "0") + (found["n_4_2.png"] == "n_4")
    assert status == 3 and out == f"accuracy {right / 2:.4f}: {right} of the 2 images whose names begin with a label\n"
    make_images("others", "holiday.png")
    assert classify("others", "id2label.json", "labels.csv")[:2] == (0, "")


@pytest.mark.parametrize("templates", [ASSIGNMENT_TEMPLATES, ["{}", "An old {object}"]], ids=["the assignment's", "others"])
def test_comparison_holds_the_accuracy_of_each_template_and_of_all(classify, templates):
    named = ["--template", *templates] if templates != ASSIGNMENT_TEMPLATES else []
    status, out, _ = classify("images", "id2label.json", "compared.csv", "--compare", *named)
    rows = [line.split("  ", 1) for line in out.splitlines()[2:]]
    assert status == 0 and rows[0] == ["accuracy", "template"]
    assert [row[1].strip() for row in rows[1:]] == [*templates, "all of them, averaged"]
    for row, one in zip(rows[1:], [*([template] for template in templates), templates]):
        _, out, _ = classify("images", "id2label.json", "labels.csv", "--template", *one)
        assert out.startswith(f"accuracy {row[0].strip()}: ")
    assert classify("images", "id2label.json", "labels.csv", *named)[0] == 0
    assert Path("compared.csv").read_bytes() == Path("labels.csv").read_bytes()  # comparing changes no label


# ---- the CSV ---------------------------------------------------------------------------------------------------


def test_odd_file_names(classify):
    names = ["a,b.png", 'say "x".png', "two\nlines.png", "one\rreturn.png", " space .PNG", "Übung 狗 🐕.png", "'q'.gif",
             "=1+1.png", "same.png", "same.jpg", "v1.2.webp", "-dash.tiff", ".hidden.bmp"]
    make_images("odd ones", *names)
    Path("odd ones/inside").mkdir()
    Path("odd ones/notes.txt").touch()
    assert classify("odd ones", "id2label.json", "odd, out.csv")[0] == 0
    assert list(read("odd, out.csv")) == sorted(names)
    text = Path("odd, out.csv").read_bytes().decode("utf-8")
    assert text.startswith("filename,label\n") and text.endswith("\n")
    for quoted in '"a,b.png",', '"say ""x"".png",', '"one\rreturn.png",', '"two\nlines.png",', "\nÜbung 狗 🐕.png,":
        assert quoted in text


def test_names_that_are_not_utf8_and_odd_labels_are_written():
    write_labels("out.csv", [(os.fsdecode(b"caf\xe9.png"), "a,b"), ("x.png", "1\r2")])
    assert list(read("out.csv").items()) == [(r"caf\udce9.png", "a,b"), ("x.png", "1\r2")]


def test_odd_class_names(classify):
    names = ["Übung 狗 🐕", "half \ud83d pair", r"\1 {} {object}", "long " * 90]
    Path("odd.json").write_text(json.dumps(dict(zip(["é", "", "2", "3"], names))))
    status, _, err = classify("images", "odd.json", "labels.csv")
    assert status == 0 and "1 prompts are longer than CLIP's 77 tokens" in err


def test_unreadable_images_are_named_and_the_others_classified(classify):
    assert classify("images", "id2label.json", "before.csv")[0] == 0
    Path("images/text.jpg").write_text("not a picture")
    Path("images/0_9.png").touch()
    Path("images/lost.png").symlink_to("nowhere.png")
    status, _, err = classify("images", "id2label.json", "labels.csv")
    assert status == 3 and "24 labels in labels.csv; 3 of 27 images could not be read" in err
    for name, reason in [("text.jpg", "not an image"), ("0_9.png", "the file is empty"), ("lost.png", "No such file")]:
        assert any(line.startswith(f"skipped images/{name}: ") and reason in line for line in err.splitlines()), err
    assert read("labels.csv") == read("before.csv")
    Path("bad").mkdir()
    Path("bad/0_1.png").touch()
    assert classify("bad", "id2label.json", "bad.csv", "--compare", "--bars", "0_1.png")[:2] == (3, "")
    assert Path("bad.csv").read_text() == "filename,label\n" and not Path("bars.png").exists()


# ---- mistakes --------------------------------------------------------------------------------------------------


@pytest.fixture
def refused(classify, place):
    """Run with a mistake: status 2, one line that holds these words, nothing written."""

    def refused(*arguments, says, **options):
        before = contents(place)
        status, out, err = classify(*arguments, **options)
        assert status == 2 and out == "" and err.startswith("p1_clip_classify.py: ") and err.count("\n") == 1, err
        assert says in err
        assert contents(place) == before

    return refused


def test_wrong_order_of_arguments(refused):
    Path("labels.csv").write_text("filename,label\n0_1.png,0\n")
    for arguments, says in [
        (("images", "labels.csv", "id2label.json"), "labels.csv is not JSON"),
        (("images", "id2label.json", "id2label.json"), "must end in .csv: the order is"),
        (("id2label.json", "images", "labels.csv"), "id2label.json is a file"),
        (("images", "images", "labels.csv"), "cannot read the labels file images"),
        (("images", "id2label.json"), "output"),
    ]:
        refused(*arguments, says=says)


def test_nothing_that_is_read_is_overwritten(refused):
    Path("link.csv").symlink_to("id2label.json")
    Path("same.csv").hardlink_to("id2label.json")
    Path("classes.csv").write_text(json.dumps(CLASSES))
    refused("images", "id2label.json", "link.csv", says="link.csv would overwrite id2label.json")
    refused("images", "id2label.json", "same.csv", says="same.csv would overwrite id2label.json")
    refused("images", "classes.csv", "classes.csv", says="classes.csv would overwrite classes.csv")
    refused("images", "id2label.json", "labels.csv", "--bars", "0_0.png", "--figure", "images/1_1.png",
            says="images/1_1.png would overwrite images/1_1.png")


def test_mistakes_are_one_line(refused):
    Path("empty").mkdir()
    for arguments, says in [
        (("gone", "id2label.json", "out.csv"), "gone does not exist"),
        (("empty", "id2label.json", "out.csv"), "empty holds no images"),
        (("images", "gone.json", "out.csv"), "the labels file gone.json does not exist"),
        (("images", "id2label.json", "gone/out.csv"), "folder gone does not exist"),
        (("images", "id2label.json", "out.csv", "--template", "{}", "A photo"), "'A photo' has no {object}"),
        (("images", "id2label.json", "out.csv", "--template", "{label}"), "'{label}' has no {object}"),
        (("images", "id2label.json", "out.csv", "--bars", "0_0.png", "7.png"), "7.png is not among the images of images"),
        (("images", "id2label.json", "out.csv", "--bars", "0_0.png", "--figure", "bars.svg"), "must end in .png"),
        (("images", "id2label.json", "out.csv", "--bars", "0_0.png", "--figure", "gone/bars.png"), "folder gone"),
    ]:
        refused(*arguments, says=says)
    make_images("unnamed", "a_1.png")
    refused("unnamed", "id2label.json", "out.csv", "--compare", says="label of id2label.json, as 0_1.png does")
    refused("images", "id2label.json", "out.csv", weights=None, says="classifying needs CLIP's weights: `bash")
    refused("images", "id2label.json", "out.csv", weights="gone.pt", says="CLIP weights gone.pt does not exist")
    refused("images", "id2label.json", "out.csv", weights="id2label.json", says="CLIP weights id2label.json")


@pytest.mark.parametrize("content", ["[]", "{}", "1", "{", '["apple"]', '{"0": 1}', '{"0": ""}', '{"0": "_"}', '{"0": ["apple"]}'])
def test_labels_file_of_another_form(content):
    Path("wrong.json").write_text(content)
    with pytest.raises(cli.UserError, match="not of the form|not JSON"):
        read_classes("wrong.json")


# ---- the picture of bars ---------------------------------------------------------------------------------------


def test_bars_are_clips_probabilities_of_the_chosen_images(classify, weights, monkeypatch):
    drawn = []
    monkeypatch.setattr(p1_clip_classify, "plot_bars", lambda *arguments: drawn.append(arguments) or plot_bars(*arguments))
    make_images("images", "holiday.png")
    Path("images/empty.png").touch()
    chosen = ["n_4_1.png", "holiday.png", "images/1_2.png"]
    status, _, err = classify("images", "id2label.json", "labels.csv", "--bars", *chosen, "empty.png", "holiday.png",
                              "--figure", "five.png")
    (file, shown, names, truths), = drawn
    assert status == 3 and "drawn in five.png" in err and file == "five.png" and names == SPOKEN
    assert [path.name for path in shown] == ["n_4_1.png", "holiday.png", "1_2.png"]
    assert list(truths.values()) == ["willow tree", None, "aquarium fish"]
    expected = direct(weights, [path.name for path in shown])
    torch.testing.assert_close(torch.stack(list(shown.values())), expected, atol=1e-5, rtol=0)
    with Image.open("five.png") as picture:
        assert picture.format == "PNG" and picture.height > picture.width  # one above the other


def test_bars_of_odd_names(place):
    names = ["costs $5 or $6", "half \ud83d pair", "long " * 50]
    shown = {place / "images" / name: torch.tensor([0.2, 0.7, 0.1]) for name in NAMES[:5]}
    odd = place / f"$x$ {'long' * 40}.png"
    Path("images/0_0.png").rename(odd)
    shown[odd] = shown.pop(place / "images" / "0_0.png")
    plot_bars("bars.png", shown, names, {path: names[2] for path in shown})
    with Image.open("bars.png") as picture:
        assert picture.width > picture.height  # in two columns


# ---- hw3_1.sh --------------------------------------------------------------------------------------------------


def test_hw3_1_classifies_a_folder(place, weights):
    make_images("my images", *NAMES)
    Path("my images/no picture.jpg").touch()
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "VIRTUAL_ENV": sys.prefix}

    def hw3_1(*arguments):
        return subprocess.run(["bash", ROOT / "hw3_1.sh", *arguments], cwd=place, capture_output=True, text=True,
                              env=environment)

    result = hw3_1("my images", "id2label.json", "my labels.csv", "--clip_weights", weights)
    assert result.returncode == 3 and "skipped my images/no picture.jpg: the file is empty" in result.stderr, result.stderr
    assert "Warning" not in result.stderr and result.stdout.startswith("accuracy ")
    found = read("my labels.csv")
    assert list(found) == sorted(NAMES) and set(found.values()) <= set(CLASSES)
    before = contents(place)
    for arguments in ["my images", "my labels.csv", "id2label.json"], ["my images", "id2label.json"]:
        result = hw3_1(*arguments)
        assert result.returncode == 2 and result.stderr.count("\n") == 1 and contents(place) == before
