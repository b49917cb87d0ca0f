"""report/measure_clip.py: recalls with their intervals, choice between right and wrong captions, zero-shot accuracy."""

import json
import random
import sys

import measure_clip
import numpy as np
import pytest
import torch
from conftest import COLOURS
from measure_clip import CIFAR10, MAPPED, exchanged, mapped_kinds, retrieval, wrong_captions
from PIL import Image

import cli
from clip_model import DualEncoder
from dataset import CaptionedImage
from retrieval import Ranks


class Colourful(DualEncoder):
    """Knows colours: an image's vector is how it looks, a text's the colours that it names."""

    limit = 77

    def __init__(self):
        super().__init__("colourful", "cpu", 4)
        self.preprocess = lambda image: torch.from_numpy(np.asarray(image, np.float32)).mean((0, 1))

    def embed_images(self, images):
        return images

    def embed_texts(self, texts):
        known = torch.tensor([*COLOURS.values()], dtype=torch.float32)
        return torch.stack([known[[i for i, name in enumerate(COLOURS) if name in text.lower()]].sum(0) + 1 for text in texts])

    def count_tokens(self, text):
        return len(text.split())


def test_recalls_and_their_intervals():
    ranks = Ranks(torch.tensor([0, 0, 3, 7]), torch.tensor([0, 4]))
    found = retrieval(ranks, torch.tensor([0, 0, 1, 1]), 2)
    value, low, high = found["text to image"]["R@1"]
    assert value == 0.5 and (low, high) == (0, 1) and found["text to image"]["R@5"][0] == 0.75
    assert found["image to text"]["R@5"][0] == 1 and found["image to text"]["median rank"] == 3


def test_one_noun_is_exchanged_for_one_that_no_caption_names():
    draw = random.Random(0)
    captions = ["A dog runs on the beach.", "a cat and a sheep"]
    found = {exchanged(captions[0], captions, draw) for _ in range(200)}
    assert all(sum(a != b for a, b in zip(text.split(), captions[0].split())) == 1 for text in found)
    assert not any("cat" in text or "sheep" in text for text in found) and any("street" in text for text in found)
    assert not any("elephant" in text for text in found)  # "a elephant" would tell
    assert exchanged("something else", captions, draw) is None
    images = [CaptionedImage(None, [f"a {name}", f"two {name}s"]) for name in ("dog", "bus", "pizza", "thing")]
    pairs = wrong_captions({"set": images}, 6)
    assert [*map(len, pairs.values())] == [6, 3]
    assert all(wrong not in images[number].captions for _, number, _, wrong in pairs["another picture's"])


def test_classes_of_the_encoder_are_mapped_by_name():
    names = ["tabby, tabby cat", "boxer", "liner, ocean liner", "tench"]
    found = mapped_kinds(names, torch.tensor([[0.5, 0.2, 0.2, 0.1]]))
    assert dict(zip(CIFAR10, found[0].tolist())) == pytest.approx(dict.fromkeys(CIFAR10, 0) | {"cat": 0.5, "dog": 0.2, "ship": 0.2})
    assert set(MAPPED) == set(CIFAR10)


def test_the_whole_report(workplace, monkeypatch, capsys):
    folder = workplace / "data"
    (folder / "images" / "val").symlink_to(folder / "images" / "train")
    (folder / "val.json").write_bytes((folder / "train.json").read_bytes())
    cifar = workplace / "cifar"
    cifar.mkdir()
    colours = [(200, 30, 30), (30, 160, 40)]
    Image.fromarray(np.repeat(np.array(colours, np.uint8)[:, None], 1024, 1)).save(cifar / "test_batch.png")
    (cifar / "test_lables.json").write_text("[1, 6]")
    monkeypatch.setattr(measure_clip, "CIFAR10", ["blue"] + ["red"] * 5 + ["green"])
    monkeypatch.setattr(measure_clip, "load_clip", lambda *arguments, **options: Colourful())
    monkeypatch.setattr(sys, "argv", ["measure_clip.py", "--data", "data", "--models", "one", "two", "--cifar10", "cifar", "--results", "clip.json"])
    with pytest.raises(SystemExit) as exit:
        cli.run(measure_clip.main)
    assert exit.value.code == 0, capsys.readouterr().err
    found = json.loads((workplace / "clip.json").read_text())
    assert [*found] == ["one", "two"] and found["two"]["data"]["against the first"]["text to image"]["R@1"] == [0, 0, 0]
    assert found["one"]["pairs"]["another picture's"]["pairs"] == 48 and found["one"]["CIFAR-10"]["average"] == 1
    assert found["one"]["CIFAR-10"]["chance"] == 1 / 7 and found["one"]["speed"]["images per second"] > 0
    assert "| data | text to image |" in capsys.readouterr().out
