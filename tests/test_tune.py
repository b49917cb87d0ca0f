"""The search settings that p2_tune.py evaluates, selects and writes into a checkpoint."""

import json
import sys

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from test_concepts import FakeJudge, NamingEncoder, make_captioner

import p2_average
import p2_tune
from captioner import Captioner, read_metadata
from cli import UserError
from generation import GenerationConfig
from tokenizer import END_OF_TEXT


class Features:
    def __init__(self, features):
        self.features = features

    def __len__(self):
        return len(self.features)

    def __getitem__(self, index_and_view):
        return self.features[index_and_view[0]].half()


def make_model(tmp_path):
    model = make_captioner(tmp_path, torch.tensor([50, 64, 262, 290, END_OF_TEXT]))
    model.judge = FakeJudge(lambda text: (len(text) % 5 - 2.0, 1.0))
    return model


def test_what_is_chosen_is_what_the_captioner_would_say(tmp_path):
    model, features = make_model(tmp_path), torch.randn(7, 4, 12).half().float()
    for beam_size in 1, 4:
        found = p2_tune.find_hypotheses(model, Features(features), None, beam_size, batch_size=3)
        for length_penalty, clip_weight in ((0.0, 0.0), (1.0, 0.0), (0.0, 3.0), (0.7, 30.0)):
            generation = GenerationConfig(beam_size, length_penalty, clip_weight)
            assert p2_tune.choose(found, length_penalty, clip_weight) == model.generate(features, generation)
    # By embeddings that are known, those count instead of what our CLIP says.
    known = torch.randn(7, 2, generator=torch.Generator().manual_seed(1))
    found = p2_tune.find_hypotheses(model, Features(features), known, 4, batch_size=3)
    generation = GenerationConfig(4, clip_weight=30.0)
    captions = model.generate(features, generation, embeddings=known)
    assert p2_tune.choose(found, 0.0, 30.0) == captions != model.generate(features, generation)


def test_a_checkpoint_is_tuned_and_says_so(tmp_path, monkeypatch, capsys):
    model = make_model(tmp_path)
    for parameter in model.trained_parameters().values():
        parameter.data = parameter.data.half().float()
    model.save(tmp_path / "one.safetensors", {"seed": 7})
    before = load_file(tmp_path / "one.safetensors")
    features = torch.randn(6, 4, 12).half().float()
    # People's captions are what three beams with a length penalty of 1 say.
    wanted = model.generate(features, GenerationConfig(3, 1.0))
    (tmp_path / "images").mkdir()
    for i in [*range(6), 5.5]:
        Image.new("RGB", (8, 8)).save(tmp_path / f"images/{i}.png")
    (tmp_path / "val.json").write_text(json.dumps({  # the last image has no caption
        "images": [{"id": i, "file_name": f"{i}.png"} for i in [*range(6), 5.5]],
        "annotations": [{"id": i, "image_id": i, "caption": f"{wanted[i]} {'abcdef'[i]}"} for i in range(6)]}))
    monkeypatch.setattr(p2_tune.Captioner, "load", lambda *arguments, **options: model)
    monkeypatch.setattr(p2_tune, "FeatureCache", lambda *arguments, **options: Features(features))
    monkeypatch.setattr(sys, "argv", ["p2_tune.py", str(tmp_path / "one.safetensors"), "--annotation_file", str(tmp_path / "val.json"),
                                      "--images_root", str(tmp_path / "images"), "--beam_size", "1", "3", "--length_penalty", "0", "1",
                                      "--clip_weight", "0", "5", "--write"])
    p2_tune.main()
    printed = capsys.readouterr().out
    assert printed.count("\n") == 2 * 2 * 2 + 2
    monkeypatch.undo()
    metadata = read_metadata(tmp_path / "one.safetensors")
    after = load_file(tmp_path / "one.safetensors")
    assert metadata["training"] == {"seed": 7} and all(torch.equal(after[name], value) for name, value in before.items())
    loaded = Captioner.load(tmp_path / "one.safetensors", tmp_path / "decoder.bin", NamingEncoder())
    best = max((line for line in printed.splitlines()[1:-1]), key=lambda line: float(line.split()[0])).split()
    assert [loaded.generation.beam_size, loaded.generation.length_penalty, loaded.generation.clip_weight] == [float(part) for part in best[1:]]
    loaded.judge = model.judge
    assert loaded.generate(features) == model.generate(features, loaded.generation)


def test_without_weights_our_clip_is_not_needed(tmp_path):
    model, features = make_model(tmp_path), torch.randn(4, 4, 12).half().float()
    model.judge = None
    assert not p2_tune.needs_clip(model, [0.0, 0.0]) and p2_tune.needs_clip(model, [0.0, 1.0])
    found = p2_tune.find_hypotheses(model, Features(features), None, 3, judged=False)
    assert p2_tune.choose(found, 1.0, 0.0) == model.generate(features, GenerationConfig(3, 1.0))


def test_checkpoints_of_before_are_searched_with_three_beams(tmp_path):
    model = make_model(tmp_path)
    model.generation = GenerationConfig(5)
    model.save(tmp_path / "one.safetensors")
    assert read_metadata(tmp_path / "one.safetensors")["generation"]["beam_size"] == 5
    metadata = read_metadata(tmp_path / "one.safetensors")
    del metadata["generation"]
    save_file(load_file(tmp_path / "one.safetensors"), tmp_path / "one.safetensors", {"captioner": json.dumps(metadata)})
    loaded = Captioner.load(tmp_path / "one.safetensors", tmp_path / "decoder.bin", NamingEncoder())
    assert loaded.generation == GenerationConfig()


def test_the_ablation_swaps_concepts_and_takes_them_away_in_any_batches(tmp_path):
    import captioner_steps

    model, features = make_captioner(tmp_path), torch.randn(8, 4, 12).half().float()
    own = model.concepts(features)
    swapped = own.each(lambda part: part.roll(4, 0))
    none = own._replace(probabilities=torch.zeros_like(own.probabilities))
    for whose, concepts in (("", own), (captioner_steps.OTHERS, swapped), (captioner_steps.NONE, none)):
        expected = model.generate(features, GenerationConfig(3), concepts=concepts)
        assert captioner_steps.caption(model, Features(features), whose, batch_size=3) == expected


# ---- p2_average.py ---------------------------------------------------------------------------------------------------


def call_average(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["p2_average.py", *map(str, arguments)])
    p2_average.main()


def test_the_mean_of_checkpoints_is_one(tmp_path, monkeypatch):
    model, paths = make_model(tmp_path), [tmp_path / "one.safetensors", tmp_path / "other.safetensors"]
    model.generation = GenerationConfig(3, 0.5)
    model.save(paths[0], {"seed": 1})
    model.generation, model.token_ids = GenerationConfig(1), torch.tensor([50, 64, 262, 300, END_OF_TEXT])
    for parameter in model.trained_parameters().values():
        parameter.data += torch.randn_like(parameter)
    model.save(paths[1], {"seed": 2}, {"CIDEr": 0.9})
    one, other = map(load_file, paths)

    call_average(monkeypatch, tmp_path / "mean.safetensors", *paths, "--weights", "3", "1")
    mean, metadata = load_file(tmp_path / "mean.safetensors"), read_metadata(tmp_path / "mean.safetensors")
    for name in one.keys() - {"token_ids"}:
        torch.testing.assert_close(mean[name].float(), 0.75 * one[name].float() + 0.25 * other[name].float(), rtol=1e-3, atol=1e-3)
    assert mean["token_ids"].tolist() == [50, 64, 262, 290, 300, END_OF_TEXT]  # what either says
    assert metadata["training"] == {"mean of": [{"weight": 0.75, "training": {"seed": 1}}, {"weight": 0.25, "training": {"seed": 2}}]}
    assert metadata["generation"]["beam_size"] == 3 and metadata["scores"] == {}
    loaded = Captioner.load(tmp_path / "mean.safetensors", tmp_path / "decoder.bin", NamingEncoder())
    assert loaded.generation == GenerationConfig(3, 0.5)

    # The same, twice: itself.
    call_average(monkeypatch, tmp_path / "same.safetensors", paths[0], paths[0])
    assert all(torch.equal(value, one[name]) for name, value in load_file(tmp_path / "same.safetensors").items())


def test_what_cannot_be_averaged_is_refused(tmp_path, monkeypatch):
    model, paths = make_model(tmp_path), [tmp_path / "one.safetensors", tmp_path / "other.safetensors"]
    for path in paths:
        model.save(path)
    for arguments, complaint in ((paths[:1], "at least two"), ([*paths, "--weights", "1"], "a number of at least 0 for each"),
                                 ([*paths, "--weights", "0", "0"], "one above"), ([*paths, "--weights", "2", "-1"], "at least 0")):
        with pytest.raises(UserError, match=complaint):
            call_average(monkeypatch, tmp_path / "mean.safetensors", *arguments)
    with pytest.raises(UserError, match="would overwrite"):
        call_average(monkeypatch, paths[1], *paths)
    metadata, tensors = read_metadata(paths[1]), load_file(paths[1])
    save_file(tensors, paths[1], {"captioner": json.dumps(metadata | {"encoder_hash": "another"})})
    with pytest.raises(UserError, match="are of different captioners: their encoder weights differ"):
        call_average(monkeypatch, tmp_path / "mean.safetensors", *paths)
    tensors["token_ids"] = tensors["token_ids"].flip(0)
    save_file(tensors, paths[1], {"captioner": json.dumps(metadata)})
    with pytest.raises(UserError, match="damaged"):
        call_average(monkeypatch, tmp_path / "mean.safetensors", *paths)
    assert not (tmp_path / "mean.safetensors").exists()


def test_only_a_checkpoint_is_written_over(tmp_path, monkeypatch):
    make_model(tmp_path).save(tmp_path / "one.safetensors")
    (tmp_path / "two.safetensors").write_bytes((tmp_path / "one.safetensors").read_bytes())
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is not a safetensors file"):
        call_average(monkeypatch, tmp_path / "notes.txt", tmp_path / "one.safetensors", tmp_path / "two.safetensors")
    call_average(monkeypatch, tmp_path / "mean.safetensors", tmp_path / "one.safetensors", tmp_path / "two.safetensors")
    call_average(monkeypatch, tmp_path / "mean.safetensors", tmp_path / "one.safetensors", tmp_path / "two.safetensors")
