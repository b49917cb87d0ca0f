"""Training: the schedule, resuming, the exact softmax of pretraining, and both scripts end to end on tiny data."""

import json
import math
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import COLOURS, VIT
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

import dataset
import p2_infer
import p2_pretrain_decoder
import p2_train
import training
from captioner import Captioner, CaptionerConfig, read_metadata
from cli import ArgumentParser, UserError, add_options, take_options
from dataset import collate
from decoder import Decoder, DecoderConfig
from p2_pretrain_decoder import SeenTokens
from tokenizer import END_OF_TEXT
from training import MovingAverage, adamw, cosine, step_optimizer

CONFIG = CaptionerConfig(encoder=VIT, image_size=32, projection_layers=1, projection_dim=64, lora_rank=2, dropout=0.1)


def settings(**changes):
    return p2_train.Settings(**{"decoder": "decoder.safetensors", "epochs": 4, "batch_size": 5, "selection": 4,
                                "learning_rate": 3e-3, "views": 2, "scst_epochs": 0} | changes)


class Interrupted(Exception):
    pass


def interrupt_after(monkeypatch, steps):
    """Make the `steps`-th optimizer step the last one."""
    original, count = training.step_optimizer, iter(range(steps))

    def step(*arguments):
        if next(count, None) is None:
            raise Interrupted
        return original(*arguments)

    monkeypatch.setattr(training, "step_optimizer", step)
    return original


@pytest.mark.parametrize("steps, save_minutes, fusion_epochs, scst_epochs", [
    (11, 1e9, 0, 0), (10, 0.0, 0, 0),  # on from an epoch's end, and from its middle
    (2, 0.0, 1, 0), (7, 0.0, 1, 0),  # from the middle of the fusion's own training, and from after it
    (13, 0.0, 0, 2)])  # and from the middle of self-critical training
def test_resumed_training_equals_training_without_interruption(workplace, monkeypatch, steps, save_minutes, fusion_epochs,
                                                               scst_epochs):
    stages = dict(fusion_epochs=fusion_epochs, epochs=4 - fusion_epochs - scst_epochs, scst_epochs=scst_epochs,
                  fusion_learning_rate=1e-3)
    history = p2_train.train(CONFIG, settings(output="checkpoints/whole.safetensors", **stages), "cpu")
    stopped = settings(output="checkpoints/stopped.safetensors", **stages)
    monkeypatch.setattr(training, "SAVE_MINUTES", save_minutes)
    original = interrupt_after(monkeypatch, steps)
    with pytest.raises(Interrupted):
        p2_train.train(CONFIG, stopped, "cpu")
    monkeypatch.setattr(training, "step_optimizer", original)
    torch.manual_seed(999)  # the state brings its own
    resumed = p2_train.train(CONFIG, stopped, "cpu")
    for entry in resumed + history:
        assert entry.pop("seconds") > 0 and entry.pop("memory") > 0
    assert resumed == history and ["reward" in entry for entry in history] == [False] * (4 - scst_epochs) + [True] * scst_epochs
    whole, stopped = load_file("checkpoints/whole.safetensors"), load_file("checkpoints/stopped.safetensors")
    assert whole.keys() == stopped.keys() and all(torch.equal(whole[name], stopped[name]) for name in whole)
    assert history[1]["loss"] < history[0]["loss"]


def test_several_folders_are_trained_on_each_as_often_as_its_weight_says(workplace, monkeypatch):
    shutil.copytree("data", "other")
    for path in Path("other/images/train").iterdir():
        Image.fromarray(255 - np.asarray(Image.open(path))).save(path)
    both = settings(data=("data", "other"), selection=(4, 2), data_weights=(1, 0.5), epochs=2, output="checkpoints/both.safetensors")
    trainer = p2_train.CaptionerTrainer(CONFIG, both, "cpu")
    assert len(trainer.images) == 20 + 22 and len(trainer.selection) == 6 and trainer.steps == -(-(20 + 11) // 5)
    drawn = [trainer.mixture.sample_epoch(torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    for numbers in drawn:
        assert numbers[:20] == [*range(20)] and len(set(numbers[20:])) == 11 and set(numbers[20:]) <= {*range(20, 42)}
    assert drawn[0] != drawn[1]
    # Number 21 is the second picture of the other folder; the selection's fifth is the other folder's 23rd.
    for features, number, path in ((trainer.data.features, 21, "other/images/train/1.png"), (trainer.data.features, 3, "data/images/train/3.png"),
                                   (trainer.selection_features, 4, "other/images/train/22.png")):
        assert (trainer.images + trainer.selection)[number if features is trainer.data.features else 42 + number].path == Path(path)
        image = trainer.model.encoder.preprocess(Image.open(path).convert("RGB"))
        torch.testing.assert_close(features[[number], [0]].float(), trainer.model.encoder(image[None]), atol=4e-3, rtol=2e-3)
    mixed = trainer.data.features[[21, 3, 40], [0, 1, 1]]
    assert torch.equal(mixed, torch.cat([trainer.data.features[[i], [view]] for i, view in ((21, 0), (3, 1), (40, 1))]))
    assert trainer.fit() and len(trainer.progress["history"]) == 2
    twice = p2_train.CaptionerTrainer(CONFIG, replace(both, data_weights=(2, 1), output="checkpoints/twice.safetensors"), "cpu")
    assert sorted(twice.mixture.sample_epoch(torch.Generator()))[:4] == [0, 0, 1, 1] and twice.steps == -(-(40 + 22) // 5)
    for changes in {"data_weights": (1,)}, {"data_weights": (1, 0)}, {"data": ()}:
        with pytest.raises(UserError):
            replace(both, **changes)


def test_the_fusion_trains_alone_before_peft(workplace):
    """What PEFT adds stands still for its first epoch, and is saved all the same."""
    config = replace(CONFIG, adapter_dim=4, prefix_length=2)
    p2_train.train(config, settings(fusion_epochs=1, epochs=0, output="checkpoints/fusion.safetensors"), "cpu")
    state = load_file("checkpoints/fusion.safetensors")
    model = Captioner.load("checkpoints/fusion.safetensors", "decoder.safetensors")
    assert state.keys() - {"token_ids"} == model.trained_parameters().keys()
    assert {name for name in state if "lora" in name} and {name for name in state if "adapter" in name}
    assert all(not value.any() for name, value in state.items() if "lora_B" in name or ".up." in name)
    assert any(value.any() for name, value in state.items() if "cross.c_proj" in name)


def test_training_starts_from_a_checkpoint_of_the_same_model(workplace, monkeypatch):
    p2_train.train(CONFIG, settings(epochs=2, output="checkpoints/first.safetensors"), "cpu")
    interrupt_after(monkeypatch, 0)
    with pytest.raises(Interrupted):
        p2_train.train(CONFIG, settings(init="checkpoints/first.safetensors", output="checkpoints/second.safetensors"), "cpu")
    start = torch.load("checkpoints/second.state.pt")["parameters"]
    first = load_file("checkpoints/first.safetensors")
    assert all(torch.equal(value.half(), first[name]) for name, value in start.items()
               if not name.startswith("average."))
    for config, words in ((replace(CONFIG, lora_rank=4), "other model options"), (replace(CONFIG, image_size=48), "encoder")):
        with pytest.raises(UserError, match=words):
            p2_train.train(config, settings(init="checkpoints/first.safetensors", output="checkpoints/third.safetensors"), "cpu")


def test_training_starts_from_a_checkpoint_with_a_smaller_encoder(workplace, monkeypatch):
    """What earlier feature maps and a second CNN add changes nothing to begin with, and is learnt."""
    torch.manual_seed(0)
    for name in "test_efficientnet", "test_resnet":
        save_file(timm.create_model(name, num_classes=0).state_dict(), workplace / f"{name}.safetensors")
    small = replace(CONFIG, encoder="test_efficientnet", image_size=32, encoder_levels=1)
    p2_train.train(small, settings(epochs=1, output="checkpoints/small.safetensors"), "cpu")
    before = Captioner.load("checkpoints/small.safetensors", "decoder.safetensors")
    first = load_file("checkpoints/small.safetensors")["projection.input.weight"]
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    grown = [replace(small, encoder_levels=2), replace(small, encoder="test_efficientnet+test_resnet", encoder_levels=2)]
    for number, config in enumerate(grown):
        output = f"checkpoints/{number}.safetensors"
        start = settings(epochs=1, learning_rate=1e-3, average=0, init="checkpoints/small.safetensors", output=output)
        p2_train.train(config, replace(start, learning_rate=1e-30), "cpu")
        after = Captioner.load(output, "decoder.safetensors")
        tokens = [model.projection(model.encoder(images)) for model in (after, before)]
        torch.testing.assert_close(*tokens)
        assert after.encoder.dim > before.encoder.dim and tokens[0].std() > 0.1
        weight = load_file(output)["projection.input.weight"]
        assert torch.equal(weight[:, :first.shape[1]], first) and not weight[:, first.shape[1]:].any()
        Path(output).unlink()
        p2_train.train(config, start, "cpu")
        assert load_file(output)["projection.input.weight"][:, first.shape[1]:].any(0).float().mean() > 0.9
    for config, words in ((replace(small, encoder="test_resnet+test_efficientnet"), "other encoder weights"),
                          (replace(grown[1], encoder_levels=1), "other model options")):
        with pytest.raises(UserError, match=words):
            p2_train.train(config, settings(init="checkpoints/0.safetensors", output="checkpoints/third.safetensors"), "cpu")


def test_trained_captioner_names_the_colours_of_new_pictures(workplace, monkeypatch):
    p2_train.train(CONFIG, settings(epochs=20), "cpu")
    metadata = read_metadata("checkpoints/captioner.safetensors")
    assert metadata["model"]["encoder"] == VIT and metadata["training"]["epochs"] == 20
    assert 0 < metadata["trained_parameters"] < 35e6 and metadata["scores"]["selection"]["cider"] > 1
    new = workplace / "new"
    new.mkdir()
    for name, colour in COLOURS.items():
        Image.fromarray(np.full((64, 30, 3), colour, np.uint8)).save(new / f"{name}.png")
    monkeypatch.setattr(sys, "argv", ["p2_infer.py", "new", "out.json", "decoder.safetensors"])
    assert p2_infer.main() == 0
    captions = json.loads((workplace / "out.json").read_text())
    assert all(name in captions[name] for name in COLOURS), captions


def test_unfinished_run_is_not_continued_with_other_settings(workplace, monkeypatch):
    original = interrupt_after(monkeypatch, 6)
    with pytest.raises(Interrupted):
        p2_train.train(CONFIG, settings(), "cpu")
    monkeypatch.setattr(training, "step_optimizer", original)
    with pytest.raises(UserError, match="learning_rate"):
        p2_train.train(CONFIG, settings(learning_rate=1e-4), "cpu")


def test_finished_checkpoint_is_not_overwritten(workplace):
    (workplace / "checkpoints").mkdir()
    (workplace / "checkpoints" / "captioner.safetensors").write_bytes(b"precious")
    with pytest.raises(UserError, match="is there already"):
        p2_train.train(CONFIG, settings(), "cpu")


@pytest.mark.parametrize("selection", [-1, 24])
def test_a_split_that_leaves_nothing_is_refused(workplace, selection):
    with pytest.raises(UserError, match="cannot be split"):
        p2_train.train(CONFIG, settings(selection=selection), "cpu")


def test_batches_hold_every_caption_of_each_image_beside_its_features():
    class Tokenizer:
        def encode_batch(self, texts):
            return [[len(text)] * 2 for text in texts]

    images = [type("Image", (), {"captions": ["one", "three words here"]}), type("Image", (), {"captions": ["four"]})]
    features = np.arange(2 * 3 * 4).reshape(2, 3, 4)  # images, views, a number for the tokens
    data = dataset.CaptionData(images, Tokenizer(), 10, features)
    inputs, embeddings, tokens, targets = data.batch([1, 0], [2, 0])
    assert embeddings is None
    assert inputs.tolist() == [features[1, 2].tolist(), features[0, 0].tolist()]
    assert tokens.tolist() == [[END_OF_TEXT, 5, 5], [END_OF_TEXT] * 3, [END_OF_TEXT, 4, 4], [END_OF_TEXT, 17, 17]]
    assert targets.tolist() == [[5, 5, END_OF_TEXT], [-100] * 3, [4, 4, END_OF_TEXT], [17, 17, END_OF_TEXT]]


def test_learning_rate_warms_up_and_decays_to_zero():
    factors = [cosine(step, 100, 10) for step in range(101)]
    assert factors[0] == 0.1 and factors[9] == factors[10] == 1 and factors[55] == pytest.approx(0.5) and factors[100] == 0
    assert np.all(np.diff(factors[10:]) < 0)


def test_optimizer_clips_and_decays_matrices_only():
    matrix, vector = (torch.nn.Parameter(torch.ones(shape)) for shape in ((2, 2), (2,)))
    frozen, slow = torch.nn.Parameter(torch.ones(1), requires_grad=False), torch.nn.Parameter(torch.ones(1, 1))
    optimizer = adamw([([matrix, vector, frozen], 1.0), ([slow], 0.1)], 1.0, 0.1)
    matrix.grad, vector.grad, slow.grad = torch.zeros(2, 2), torch.zeros(2), torch.zeros(1, 1)
    step_optimizer(optimizer, 0.5, 1.0)
    assert matrix.tolist() == [[pytest.approx(0.95)] * 2] * 2 and vector.tolist() == [1, 1]
    assert slow.item() == pytest.approx(0.995)
    vector.grad = torch.tensor([30.0, 40.0])
    assert step_optimizer(optimizer, 0.0, 1.0).item() == pytest.approx(50)


def test_moving_average_weighs_steps_by_age_and_steps_aside():
    parameter = torch.nn.Parameter(torch.zeros(2))
    average = MovingAverage({"p": parameter}, decay=0.5)
    values = [torch.tensor([float(i), -float(i)]) for i in (1, 2, 3, 4)]
    expected, decays = torch.zeros(2), [0.1, 2 / 11, 0.25, 4 / 13]  # below 0.5, since it has only begun
    for value, decay in zip(values, decays):
        parameter.data.copy_(value)
        average.update()
        expected = decay * expected + (1 - decay) * value
    with average.in_place():
        assert torch.allclose(parameter, expected)
    assert torch.equal(parameter, values[-1]) and torch.allclose(average.values["p"], expected)
    for _ in range(1000):
        average.update()
    parameter.data.zero_()
    average.update()
    assert torch.allclose(average.values["p"], values[-1] / 2)  # the decay's limit
    off = MovingAverage({"p": parameter}, decay=0)
    off.update()
    with off.in_place():
        assert torch.equal(parameter, torch.zeros(2)) and not off.values


def test_options_and_dataclasses_are_the_same():
    parser = ArgumentParser()
    add_options(parser, CaptionerConfig)
    assert take_options(parser.parse_args([]), CaptionerConfig) == CaptionerConfig()
    changed = take_options(parser.parse_args(["--lora_targets", "k", "mlp", "--dropout", "0.3"]), CaptionerConfig)
    assert changed.lora_targets == ("k", "mlp") and changed.dropout == 0.3


# ---- the decoder's pretraining ----


def test_softmax_over_seen_tokens_is_the_softmax_over_all(tmp_path):
    rows = [[5, 9, 11], [400, 5], [11]]
    seen = SeenTokens(rows)
    torch.manual_seed(0)
    small = Decoder(DecoderConfig(vocab_size=len(seen.ids), n_positions=16, n_embd=64, n_layer=1)).eval()
    tokens, targets = collate(rows)
    loss = seen.loss(small, tokens, targets)

    whole = GPT2LMHeadModel(GPT2Config(n_positions=16, n_embd=64, n_layer=1, n_head=1)).eval()
    state = small.pretrained_state()
    state["wte.weight"] = seen.whole_table(state["wte.weight"])
    whole.transformer.load_state_dict(state, strict=False)
    whole.tie_weights()
    logits = whole(tokens).logits
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()))


def test_a_decoder_goes_on_from_another_and_keeps_what_it_knew(tmp_path):
    (tmp_path / "first.txt").write_text("A red picture.\nA green picture .\na blue picture\n" * 30)
    (tmp_path / "second.txt").write_text("A red zebra.\n" * 4)
    (tmp_path / "captions.json").write_text(json.dumps({"images": [{"id": i, "file_name": f"{i}.png"} for i in range(2)], "annotations": [
        {"id": i, "image_id": i, "caption": caption} for i, caption in enumerate(["A red picture.", "A picture."])]}))

    def run(text, name, **options):
        settings = p2_pretrain_decoder.Settings(output=str(tmp_path / name), **{
            "n_layer": 1, "n_embd": 64, "n_positions": 32, "batch_size": 4, "min_count": 1, "held_out": 1, "warmup": 0.0} | options)
        return p2_pretrain_decoder.train(settings, [tmp_path / text], [tmp_path / "captions.json"], "cpu")

    run("first.txt", "first.safetensors", epochs=40, learning_rate=1e-2)
    first = str(tmp_path / "first.safetensors")
    cold = run("second.txt", "cold.safetensors", learning_rate=1e-9)[-1]
    warm = run("second.txt", "second.safetensors", learning_rate=1e-9, init=first)[-1]
    assert warm < 0.1 * cold
    before, after = (load_file(tmp_path / f"{name}.safetensors") for name in ("first", "second"))
    tokens = p2_pretrain_decoder.BPETokenizer().encode
    red, zebra = tokens(" red")[0], tokens(" zebra")[0]
    torch.testing.assert_close(before["wte.weight"][red], after["wte.weight"][red], atol=1e-3, rtol=0)
    assert not before["wte.weight"][zebra].any() and after["wte.weight"][zebra].any()
    with pytest.raises(UserError, match="is of another size"):
        run("second.txt", "third.safetensors", init=first, n_layer=2)
    with pytest.raises(UserError, match="lower --min_count"):
        run("second.txt", "fourth.safetensors", min_count=9)
    assert not (tmp_path / "fourth.safetensors").exists()


def test_pretrained_decoder_learns_resumes_and_loads_in_hugging_face(tmp_path, monkeypatch):
    (tmp_path / "captions.txt").write_text("A red picture.\nA green picture .\na blue picture\n" * 30 + "A zebra.\n")
    options = dict(n_layer=1, n_embd=64, n_positions=32, epochs=150, batch_size=2, learning_rate=1e-2, dropout=0.1,
                   min_count=1)

    def run(name):
        return p2_pretrain_decoder.train(p2_pretrain_decoder.Settings(output=str(tmp_path / name), **options),
                                         [tmp_path / "captions.txt"], [], "cpu")

    run("whole.safetensors")
    original = interrupt_after(monkeypatch, 131)
    with pytest.raises(Interrupted):
        run("stopped.safetensors")
    monkeypatch.setattr(training, "step_optimizer", original)
    run("stopped.safetensors")
    state = load_file(tmp_path / "whole.safetensors")
    assert all(torch.equal(tensor, state[name]) for name, tensor in load_file(tmp_path / "stopped.safetensors").items())

    model = GPT2LMHeadModel(GPT2Config(n_positions=32, n_embd=64, n_layer=1, n_head=1)).eval()
    missing, unexpected = model.transformer.load_state_dict({k: v.float() for k, v in state.items()}, strict=False)
    assert not missing and not unexpected
    model.tie_weights()
    ours = Decoder.from_pretrained(tmp_path / "whole.safetensors").eval()
    tokens, targets = collate([p2_pretrain_decoder.BPETokenizer().encode("A blue picture.")])
    with torch.inference_mode():
        torch.testing.assert_close(model(tokens).logits, ours(tokens), atol=1e-4, rtol=1e-4)
        loss = torch.nn.functional.cross_entropy(ours(tokens)[0], targets[0])
    assert math.exp(loss) < 2  # four captions, of which three share all but a word


def test_held_out_captions_are_not_trained_on(tmp_path):
    data = {"images": [{"id": i, "file_name": f"{i}.jpg"} for i in range(3)],
            "annotations": [{"id": i, "image_id": i, "caption": f"caption {i}"} for i in range(3)]}
    (tmp_path / "captions.json").write_text(json.dumps(data))
    (tmp_path / "text.txt").write_text("Caption 2.\nanother\n\nanother .\n")
    texts, held_out = p2_pretrain_decoder.read_texts([tmp_path / "text.txt"], [tmp_path / "captions.json"], 1)
    assert texts == ["Caption 0.", "Caption 1.", "Another."] and held_out == ["Caption 2."]


def test_captions_with_rare_tokens_are_left_out():
    assert p2_pretrain_decoder.drop_rare([[1, 2], [1, 3], [2, 1]], 2) == [[1, 2], [2, 1]]
