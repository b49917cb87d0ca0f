"""The picture that hw3_demo.py draws."""

import json
import sys

import numpy as np
import pytest
from PIL import Image

import cli
import hw3_demo


def demo(monkeypatch, *arguments):
    """Run hw3_demo.py with these arguments; its exit status."""
    monkeypatch.setattr(sys, "argv", ["hw3_demo.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit:
        cli.run(hw3_demo.main)
    return exit.value.code


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for name, size in ("a.jpg", (60, 40)), ("b c.png", (20, 90)):
        Image.new("RGB", size, "red").save(folder / name)
    return folder


def test_files_are_printed_and_drawn_with_their_captions(folder, tmp_path, monkeypatch, capsys):
    captions = {"a": "It costs $5, not $6, " + "and so on " * 30, "b c": "A tall thing."}
    (tmp_path / "captions.json").write_text(json.dumps(captions))
    assert demo(monkeypatch, folder, tmp_path / "captions.json", tmp_path / "demo.png") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [f"a.jpg    {captions['a']}", "b c.png  A tall thing."]
    pixels = np.asarray(Image.open(tmp_path / "demo.png").convert("RGB")).astype(int)
    red = (pixels[..., 0] > 240) & (pixels[..., 1] < 20)
    assert red[:, :pixels.shape[1] // 3].any() and red[:, pixels.shape[1] // 2:].any()
    lowest = red.any(1).nonzero()[0].max()
    assert (pixels[lowest + 5:].sum(-1) < 200).any()  # text, and below the pictures


@pytest.mark.parametrize("text, says", [("[]", "not the JSON of hw3_2.sh"), ("{}", "no caption of an image"), ("", "not JSON")])
def test_captions_of_another_form_are_refused(folder, tmp_path, monkeypatch, capsys, text, says):
    (tmp_path / "captions.json").write_text(text)
    assert demo(monkeypatch, folder, tmp_path / "captions.json", tmp_path / "demo.png") == 2
    assert says in capsys.readouterr().err and not (tmp_path / "demo.png").exists()
