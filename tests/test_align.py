"""p4_align.py: trained and frozen parameters, the tokens in the loss, resuming, and an output folder that p1 loads."""

import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
import yaml
from conftest import CNN, ROOT, finish, start, stopping
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import encoder
import llava_data
import llava_training
import training
import word_targets
from attention import llava_attention
from cli import UserError
from dataset import IGNORE, CaptionedImage
from llava import Llava, LlavaSettings
from llava_training import answer_loss, assemble, build, image_tokens, query_form, sampled_cross_entropy, trained_parameters
from p4_align import AlignmentTrainer, Settings
from questions import Sample, by_picture, sample_epoch
from word_targets import WordTargets

COLOURS = {"red": (220, 20, 20), "green": (20, 180, 40), "blue": (30, 40, 220), "yellow": (230, 220, 30),
           "black": (5, 5, 5), "white": (250, 250, 250), "pink": (250, 130, 190), "brown": (120, 70, 20)}
CAPTIONS = {name: f"A {name} dog on the {place}." for name, place in zip(
    COLOURS, ["beach", "grass", "street", "table", "snow", "sand", "rock", "wall"])}


@pytest.fixture(scope="session")
def towers(tmp_path_factory):
    """A tiny random Dinov2 with its processor, and a tiny Llama that has learned to say the captions."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("towers")
    torch.manual_seed(0)
    Dinov2Model(Dinov2Config(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=28, patch_size=14,
                             initializer_range=0.2)).save_pretrained(folder / "vision")
    BitImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}).save_pretrained(folder / "vision")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    bpe.train_from_iterator([*CAPTIONS.values(), "[INST] [/INST]"] * 9, trainers.BpeTrainer(
        vocab_size=360, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")
    tokenizer.save_pretrained(folder / "language")
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                                         num_attention_heads=2, bos_token_id=0, eos_token_id=1, initializer_range=0.1))
    rows = [tokenizer(f"[INST]  [/INST]{text}")["input_ids"] + [1] for text in CAPTIONS.values()]
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(60):
        loss = sum(model(torch.tensor([row]), labels=torch.tensor([row])).loss for row in rows)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(folder / "language")
    return folder


@pytest.fixture
def data(tmp_path, monkeypatch):
    """Eight coloured pictures with a caption each."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "data" / "images" / "train"
    folder.mkdir(parents=True)
    images, annotations = [], []
    for i, (name, colour) in enumerate(COLOURS.items()):
        Image.fromarray(np.full((40, 60, 3), colour, np.uint8)).save(folder / f"{name}.png")
        images.append({"id": i, "file_name": f"{name}.png"})
        annotations.append({"id": i, "image_id": i, "caption": CAPTIONS[name]})
    (tmp_path / "data" / "train.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    questions = [{"image": f"{name}.png", "kind": "colour", "query": "What colour is the dog?", "answer": f"{name.capitalize()}."}
                 for name in COLOURS]
    (tmp_path / "questions.json").write_text(json.dumps(questions))
    return tmp_path


def settings(**changes):
    return Settings(**{"batch_size": 4, "stage1_epochs": 2, "stage2_epochs": 2, "instructions": "questions.json",
                       "mix": ("qa=0.5", "caption=0.5")} | changes)


def trainer(towers, output="llava", **changes):
    return AlignmentTrainer(towers / "vision", towers / "language", output, settings(**changes))


# ---- the model -------------------------------------------------------------------------------------------------


def test_stage_1_overfits_eight_pairs_and_p1_reads_the_folder(towers, data):
    run = trainer(towers, stage1_epochs=120, stage2_epochs=0, batch_size=8, learning_rate=1e-2, warmup_epochs=5)
    assert run.fit() and run.run.means["loss"] < 0.1
    llava = Llava(data / "llava")
    pictures = [Image.open(data / "data" / "images" / "train" / f"{name}.png").convert("RGB") for name in COLOURS]
    answers = llava.answer(pictures, [""] * 8, LlavaSettings(max_new_tokens=20))
    assert answers == [*CAPTIONS.values()]
    trained = load_file(data / "llava" / "trained.safetensors")
    assert trained.keys() == run.trained.keys()
    assert llava.processor.image_processor.size["height"] == 28 and not llava.processor.image_processor.do_center_crop
    assert len({file.stat().st_mode for file in (data / "llava").iterdir()}) == 1  # weights can be read by whom configs can


@pytest.mark.parametrize("changes, expected", [
    ({}, {"linear_1.weight", "linear_1.bias", "linear_2.weight", "linear_2.bias"}),
    ({"projection": "linear"}, {"linear_1.weight", "linear_1.bias"}),
    ({"train_vision_layers": 1}, {"linear_1.weight", "linear_2.bias", "encoder.layer.2.mlp.fc1.weight"}),
])
def test_only_what_is_to_be_trained_changes(towers, data, changes, expected):
    run = trainer(towers, stage1_epochs=1, stage2_epochs=1, **changes)
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    run.save = lambda: None  # which would go over to half precision
    run.fit()
    changed = {name for name, value in run.model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and changed <= run.trained.keys()
    short = {name.split("multi_modal_projector.")[-1].split("vision_tower.")[-1] for name in changed}
    assert expected <= short
    assert all(name.startswith(("linear", "encoder.layer.2.")) for name in short)


def test_a_linear_projection_is_linear(towers):
    model, _ = build(towers / "vision", towers / "language", settings(projection="linear"))
    projector = model.model.multi_modal_projector
    a, b = torch.randn(2, 5, 32)
    zero = projector(torch.zeros(5, 32))
    torch.testing.assert_close(projector(a + b) - zero, projector(a) - zero + projector(b) - zero, rtol=0, atol=1e-5)
    mlp = build(towers / "vision", towers / "language", settings())[0].model.multi_modal_projector
    assert not torch.allclose(mlp(a + b) + mlp(torch.zeros(5, 32)), mlp(a) + mlp(b), atol=1e-4)


@pytest.mark.parametrize("projection", ["mlp", "linear"])
def test_a_fresh_projection_fits_what_it_stands_between(towers, data, projection):
    model, processor = build(towers / "vision", towers / "language", settings(projection=projection))
    with torch.no_grad():  # as DINOv2's channels: some far from 0, some much larger than others
        last = model.model.vision_tower.encoder.layer[-1].mlp.fc2
        last.bias += torch.linspace(-9, 9, 32)
        last.weight[3] *= 50
    run = trainer(towers)
    pixels = run.rows.collate(run.batches[0])["pixel_values"]
    seen = []
    projector = model.model.multi_modal_projector
    projector.linear_1.register_forward_hook(lambda layer, inputs, output: seen.append(output))
    llava_training.fit_projection(model, pixels)
    tokens = torch.cat(model.get_image_features(pixel_values=pixels).pooler_output)
    assert (tokens.std() / model.get_input_embeddings().weight.std()).item() == pytest.approx(1, abs=0.3)
    if projection == "mlp":  # of what is standardised, the first layer makes values of middling size
        assert seen[-1].std() < 1.5 and seen[-1].mean((0, 1)).abs().max() < 0.5


# ---- the loss --------------------------------------------------------------------------------------------------


ROWS = [[Sample(0, "", CAPTIONS["red"])],
        [Sample(2, "What colour is the dog?", "Blue."), Sample(2, "", CAPTIONS["blue"]), Sample(2, "Where is it?", "On the street.")]]


def loss_one_by_one(run, rows):
    """The same loss from whole texts, each alone, through the model's own forward pass."""
    tokenizer, total = run.processor.tokenizer, 0.0
    for sample in (sample for row in rows for sample in row):
        picture = Image.open(run.images[sample.image].path).convert("RGB")
        asked = run.processor(images=[picture], text=[run.rows.text(sample)], return_tensors="pt")
        answer = tokenizer(sample.answer + "</s>", add_special_tokens=False, return_tensors="pt")["input_ids"]
        ids = torch.cat([asked["input_ids"], answer], 1)
        logits = run.model(input_ids=ids, pixel_values=asked["pixel_values"]).logits[0, -answer.shape[1] - 1:-1]
        total += torch.nn.functional.cross_entropy(logits, answer[0], reduction="sum").item()
    return total


def test_answers_alone_count_in_the_loss(towers, data):
    run = trainer(towers)
    inputs = run.rows.collate(ROWS)
    for ids, labels, branches, row in zip(inputs["input_ids"], inputs["labels"], inputs["branches"], ROWS):
        for number, sample in enumerate(row, 1):
            learned = labels[branches == number]
            learned = learned[learned != IGNORE]
            assert run.processor.tokenizer.decode(learned) == sample.answer + "</s>"
        assert torch.equal(ids[labels != IGNORE], labels[labels != IGNORE]) and (labels[branches < 1] == IGNORE).all()
        assert (ids == run.model.config.image_token_id).sum() == 4  # 28² pixels, patches of 14²
        assert ids[0] == 0 and (ids == 0).sum() == 1  # one beginning
    assert answer_loss(run.model, inputs).item() == pytest.approx(loss_one_by_one(run, ROWS), abs=1e-3)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_branches_see_their_picture_and_no_other_branch(towers, data, attention):
    """With a language model of both full and sliding attention, too."""
    from transformers import AutoTokenizer, Gemma3ForCausalLM, Gemma3TextConfig

    AutoTokenizer.from_pretrained(towers / "language").save_pretrained(data / "gemma")
    config = Gemma3TextConfig(vocab_size=400, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                              num_key_value_heads=1, head_dim=16, sliding_window=8, bos_token_id=0, eos_token_id=1,
                              layer_types=["sliding_attention", "full_attention"], initializer_range=0.3,
                              query_pre_attn_scalar=16)
    torch.manual_seed(0)
    Gemma3ForCausalLM(config).save_pretrained(data / "gemma")
    run = AlignmentTrainer(towers / "vision", data / "gemma", "out", settings())
    run.model.set_attn_implementation(attention)
    found = answer_loss(run.model, run.rows.collate(ROWS)).item()
    assert found == pytest.approx(loss_one_by_one(run, ROWS), rel=1e-5)
    other = [ROWS[0], [ROWS[1][0], Sample(2, "Is it?", "A pink dog."), ROWS[1][2]]]  # changes that branch's loss alone
    expected = found - loss_one_by_one(run, [[ROWS[1][1]]]) + loss_one_by_one(run, [[other[1][1]]])
    assert answer_loss(run.model, run.rows.collate(other)).item() == pytest.approx(expected, rel=1e-5)


def test_a_sampled_head_gives_the_softmax_over_all():
    torch.manual_seed(0)
    head, hidden = torch.randn(4000, 16) / 4, torch.randn(5, 16)
    likely, targets = torch.arange(0, 4000, 40), torch.tensor([0, 40, 3960, 80, 80])
    others = torch.tensor([i for i in range(4000) if i % 40])
    exact = torch.nn.functional.cross_entropy(hidden @ head.t(), targets, reduction="sum").item()
    assert sampled_cross_entropy(hidden, targets, head, likely, others).sum().item() == pytest.approx(exact, abs=1e-4)
    estimates = [sampled_cross_entropy(hidden, targets, head, likely, others[torch.randperm(3900)[:400]]).sum().item()
                 for _ in range(200)]
    assert sum(estimates) / 200 == pytest.approx(exact, abs=0.03) and max(estimates) - min(estimates) < 1.5
    # A softmax over the likely ones alone leaves out some log(40) a target.
    assert exact - sampled_cross_entropy(hidden, targets, head, likely, others[:0]).sum().item() > 5 * math.log(20)


def test_the_vocabularys_likely_part_holds_every_answer(towers, data, monkeypatch):
    monkeypatch.setattr(llava_data, "COMMON_TOKENS", 50)
    run = trainer(towers, head_sample=20)
    likely, others = set(run.likely.tolist()), set(run.others.tolist())
    assert not likely & others and len(likely | others) == run.model.lm_head.weight.shape[0]
    assert {*range(50)} <= likely and others
    for batch in run.batches:
        labels = run.rows.collate(batch)["labels"]
        assert set(labels[labels != IGNORE].tolist()) <= likely
    assert run.fit()


def test_p1_asks_in_the_words_of_the_training(towers, data):
    run = trainer(towers, stage1_epochs=1, stage2_epochs=0)
    run.fit()
    llava, query = Llava(data / "llava"), "What colour is the dog?"
    picture = Image.open(data / "data" / "images" / "train" / "red.png").convert("RGB")
    ids = run.rows.collate([[Sample(0, query, "Red.")]])
    asked = llava.inputs([picture], [query])
    length = asked["input_ids"].shape[1]
    assert asked["input_ids"][0].tolist() == ids["input_ids"][0, :length].tolist()
    assert (ids["labels"][0, :length] == IGNORE).all() and ids["labels"][0, length] != IGNORE
    torch.testing.assert_close(asked["pixel_values"], ids["pixel_values"])


def test_forms_of_a_query(towers):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(towers / "language")
    assert query_form(tokenizer, "llama") == ("[INST] ", " [/INST]")
    assert query_form(tokenizer, "gemma3_text") == ("", "\n")
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}<user>{{ m['content'] }}</user>{% endfor %}<model>"
    assert query_form(tokenizer, "llama") == ("<user>", "</user><model>")


# ---- samples ---------------------------------------------------------------------------------------------------


def test_an_epoch_holds_each_kind_by_its_part():
    groups = {kind: [Sample(i, kind, str(i)) for i in range(count)] for kind, count in (("qa", 30), ("relation", 3), ("detail", 99))}
    parts = Settings().parts()
    assert parts == pytest.approx({"qa": 0.6, "relation": 0.2, "detail": 0.2})
    drawn = sample_epoch(groups, parts, 50, torch.Generator().manual_seed(0))
    kinds = [sample.query for sample in drawn]
    assert (kinds.count("qa"), kinds.count("relation"), kinds.count("detail")) == (30, 10, 10)
    assert len({sample.answer for sample in drawn if sample.query == "qa"}) == 30  # each once before any again
    assert {sum(sample.answer == str(i) for sample in drawn if sample.query == "relation") for i in range(3)} == {3, 4}
    assert kinds[:30] != ["qa"] * 30


def test_stages_ask_nothing_then_something(towers, data):
    run = trainer(towers)
    assert run.stages == [4, 4] and len(run.batches) == 8
    first, second = ([sample for batch in part for row in batch for sample in row] for part in (run.batches[:4], run.batches[4:]))
    assert sorted(sample.image for sample in first) == sorted([*range(8)] * 2)
    assert {sample.query for sample in first} == {""}
    # Two epochs of 8 images, 4 samples for each, half of them of each kind.
    assert sum(sample.query == "What colour is the dog?" for sample in second) == 32 and all(sample.query for sample in second)
    assert len(second) == 64


def test_a_batch_holds_so_many_rows_of_one_picture_each(towers, data):
    """Questions here are derived from the captions, of which each picture has two."""
    captions = json.loads((data / "data" / "train.json").read_text())
    captions["annotations"] += [{"id": 100 + i, "image_id": i, "caption": f"The {name} dog."} for i, name in enumerate(COLOURS)]
    (data / "data" / "train.json").write_text(json.dumps(captions))
    run = trainer(towers, instructions="", mix=("qa=0.5", "detail=0.25", "caption=0.25"), per_picture=3, stage1_epochs=1.5,
                  stage2_epochs=1, batch_size=3)
    assert run.stages[0] == 3 + 2 and [len(batch) for batch in run.batches[:5]] == [3, 3, 2, 3, 3]
    assert all(len(row) == 2 and row[0].answer != row[1].answer for batch in run.batches[:5] for row in batch)
    rows = [row for batch in run.batches[5:] for row in batch]
    assert all(len(batch) == 3 for batch in run.batches[5:-1]) and len(rows) >= 8
    assert all(1 <= len(row) <= 3 and len({sample.image for sample in row}) == 1 for row in rows)
    samples = [sample for row in rows for sample in row]
    assert len(samples) == 24 and sum(sample.answer == f"{[*COLOURS][sample.image].capitalize()}." for sample in samples) > 3
    assert run.fit()


def test_rows_hold_one_picture_each():
    samples = [Sample(image, "", str(i)) for i, image in enumerate([3, 1, 3, 3, 1, 2, 3])]
    rows = by_picture(samples, 3)
    assert [[sample.answer for sample in row] for row in rows] == [["0", "2", "3"], ["1", "4"], ["5"], ["6"]]


def test_what_was_trained_alone_makes_the_same_model_again(towers, data):
    run = trainer(towers, train_vision_layers=1, image_size=42, vision_layer=-2)
    assert run.fit() and {name.split("layer.")[1][0] for name in run.trained if "vision" in name} == {"1"}
    before, trained = (load_file(file) for file in (towers / "vision" / "model.safetensors", data / "llava" / "trained.safetensors"))
    name = "encoder.layer.1.mlp.fc1.weight"
    assert not torch.allclose(trained[f"model.vision_tower.{name}"].float(), before[name], atol=1e-4)
    assemble(towers / "vision", towers / "language", data / "llava" / "trained.safetensors", data / "again")
    whole, again = (load_file(data / name / "model.safetensors") for name in ("llava", "again"))
    assert whole.keys() == again.keys() and all(torch.equal(whole[name], again[name]) for name in whole)
    for file in "config.json", "processor_config.json", "chat_template.jinja":
        assert (data / "llava" / file).read_text() == (data / "again" / file).read_text()
    changed = {name: value + 1 if "layer.0.mlp.fc1" in name else value for name, value in before.items()}
    other = shutil.copytree(towers / "vision", data / "other")
    save_file(changed, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="other weights"):
        assemble(other, towers / "language", data / "llava" / "trained.safetensors", data / "third")
    with pytest.raises(UserError, match="there already"):
        assemble(towers / "vision", towers / "language", data / "llava" / "trained.safetensors", data / "again")
    with pytest.raises(UserError, match="not the trained part"):
        assemble(towers / "vision", towers / "language", data / "llava" / "model.safetensors", data / "third")


def test_a_run_starts_from_what_an_earlier_one_trained(towers, data):
    first = trainer(towers, "first", train_vision_layers=1, stage1_epochs=40, stage2_epochs=0, batch_size=8, learning_rate=1e-2)
    assert first.fit()
    file = data / "first" / "trained.safetensors"
    known, fresh = (trainer(towers, "second", train_vision_layers=1, stage1_epochs=0, stage2_epochs=1, init=init)
                    for init in (str(file), ""))
    trained = load_file(file)
    assert all(torch.equal(value.detach(), trained[name].float()) for name, value in known.trained.items())
    captions = [[Sample(number, "", CAPTIONS[name])] for number, name in enumerate(COLOURS)]
    losses = [answer_loss(run.model, run.rows.collate(captions)).item() for run in (first, known, fresh)]
    assert losses[1] == pytest.approx(losses[0], rel=0.02) and losses[1] < losses[2] / 2
    assert known.fit()
    further = load_file(data / "second" / "trained.safetensors")
    assert not any(torch.equal(value, trained[name]) for name, value in further.items() if "projector" in name)
    assemble(towers / "vision", towers / "language", data / "second" / "trained.safetensors", data / "again")
    whole, again = (load_file(data / name / "model.safetensors") for name in ("second", "again"))
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_what_does_not_belong_to_a_run_is_no_start(towers, data):
    trainer(towers, "first", stage1_epochs=1, stage2_epochs=0).fit()
    file = str(data / "first" / "trained.safetensors")
    for changes in {"train_vision_layers": 1}, {"projection": "linear"}:
        with pytest.raises(UserError, match="does not fit"):
            trainer(towers, init=file, **changes)
    with pytest.raises(UserError, match="not the trained part"):
        trainer(towers, init=str(data / "first" / "model.safetensors"))
    with pytest.raises(UserError, match="does not exist"):
        trainer(towers, init="nothing.safetensors")
    with safe_open(file, "pt") as content:
        training = json.loads(content.metadata()["training"]) | {"frozen weights": "others"}
    save_file(load_file(file), "other.safetensors", {"training": json.dumps(training)})
    with pytest.raises(UserError, match="other weights"):
        trainer(towers, init="other.safetensors")


def test_a_vit_of_this_repository_is_a_vision_tower(towers, data):
    from vit_student import Student

    torch.manual_seed(0)
    student = Student()
    student.save(data / "vit.safetensors", {})
    model, processor = build(str(data / "vit.safetensors"), towers / "language", settings(image_size=112))
    pixels = torch.rand(1, 3, 112, 112)
    tower = model.model.vision_tower.eval()
    with torch.no_grad():
        tokens = tower(pixels).last_hidden_state
        expected = Student.load(data / "vit.safetensors").vit.eval().forward_features(pixels)
    torch.testing.assert_close(tokens, expected, rtol=0, atol=1e-4)
    assert processor.image_processor.size["height"] == 112


@pytest.fixture
def cnn(data, monkeypatch):
    """A small random CNN among the weights, by its name: 32 channels of 8 x 8 patches at 64 pixels, and earlier maps."""
    monkeypatch.setattr(encoder, "WEIGHTS_FOLDER", data)
    torch.manual_seed(4)
    save_file(timm.create_model(CNN).state_dict(), data / f"{CNN}.safetensors")
    return CNN


def test_a_frozen_encoder_is_a_vision_tower(towers, data, cnn):
    model, processor = build(cnn, towers / "language", settings(side=3, image_size=160))
    pictures = [Image.effect_noise((70, 50), 90).convert("RGB") for _ in range(2)]
    inputs = processor(images=pictures, text=[f"{processor.image_token} What?"] * 2, return_tensors="pt")
    plain = encoder.load_encoder(cnn, 160)
    assert plain.grid == (5, 5) and (inputs["input_ids"] == processor.image_token_id).sum(1).tolist() == [9, 9]
    pixels = torch.stack([plain.preprocess(picture) for picture in pictures])
    assert torch.equal(inputs["pixel_values"], pixels.float())
    tokens = model.model.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states[-1]
    cells = plain(pixels).unflatten(1, (5, 5))
    assert tokens.shape == (2, 9, plain.dim)
    torch.testing.assert_close(tokens[:, 0], cells[:, :2, :2].mean((1, 2)))
    torch.testing.assert_close(tokens[:, 5], cells[:, 1:4, 3:].mean((1, 2)))
    assert not any(parameter.requires_grad for parameter in model.model.vision_tower.encoder.parameters())


def test_a_llava_on_a_frozen_encoder_is_read_after_one_import_alone(towers, data, cnn):
    run = AlignmentTrainer(cnn, towers / "language", "llava", settings(side=2, own_layers=2, own_width=64))
    assert run.fit()
    assert any("vision_tower.layers.1." in name for name in run.trained)
    assert not any(".encoder." in name for name in run.trained)
    picture = data / "data" / "images" / "train" / "red.png"
    script = """
from transformers import AutoProcessor, LlavaForConditionalGeneration
import sys, torch
from PIL import Image
try:
    LlavaForConditionalGeneration.from_pretrained("llava")
    sys.exit("it is read without vision_tower.py")
except (KeyError, ValueError) as error:
    assert "frozen_image_encoder" in str(error), error
import vision_tower
model, processor = LlavaForConditionalGeneration.from_pretrained("llava"), AutoProcessor.from_pretrained("llava")
inputs = processor(images=[Image.open(sys.argv[1])], text=[processor.image_token + " What?"], return_tensors="pt")
torch.save(model(**inputs).logits, "logits.pt")
"""
    options = {"capture_output": True, "text": True, "env": os.environ | {"PYTHONPATH": str(ROOT)}}
    done = subprocess.run([sys.executable, "-c", script, str(picture)], **options)
    assert not done.returncode, done.stderr
    llava = Llava(data / "llava")
    inputs = llava.processor(images=[Image.open(picture)], text=[f"{llava.processor.image_token} What?"], return_tensors="pt")
    with torch.no_grad():
        found, plain = llava.model(**inputs).logits, torch.load("logits.pt").detach()
    plain[..., llava.model.config.image_token_id] = torch.finfo(plain.dtype).min  # which a Llava never says
    assert torch.equal(found, plain)
    for name, value in run.trained.items():  # and it is what was trained, in half precision
        torch.testing.assert_close(dict(llava.model.named_parameters())[name], value.half().float(), rtol=0, atol=0)
    assert "import vision_tower" in (data / "llava" / "README.md").read_text()
    if importlib.util.find_spec("openvino"):
        sooner = Llava(data / "llava", runtime="openvino")
        assert sooner.model.model.vision_tower.encoder.runtime == "openvino"
        with torch.no_grad():
            torch.testing.assert_close(sooner.model(**inputs).logits, found, rtol=0, atol=1e-3)
    assemble(cnn, str(towers / "language"), data / "llava" / "trained.safetensors", data / "again")
    assert (data / "again" / "model.safetensors").read_bytes() == (data / "llava" / "model.safetensors").read_bytes()


def test_a_blip2_is_a_vision_tower_of_its_query_tokens(towers, data):
    from transformers import Blip2Config, Blip2Model, BlipImageProcessor, OPTConfig

    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    blip2 = Blip2Model(Blip2Config(vision_config=sizes | {"image_size": 28, "patch_size": 14}, num_query_tokens=5,
                                   qformer_config=sizes | {"encoder_hidden_size": 24, "vocab_size": 30},
                                   text_config=OPTConfig(vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, ffn_dim=16,
                                                         word_embed_proj_dim=16).to_dict())).eval()
    blip2.query_tokens.data.normal_()
    blip2.save_pretrained(data / "blip2")
    BlipImageProcessor(size={"height": 28, "width": 28}).save_pretrained(data / "blip2")
    assert AlignmentTrainer(data / "blip2", towers / "language", "llava", settings()).fit()
    llava = Llava(data / "llava")
    picture = Image.open(data / "data" / "images" / "train" / "red.png").convert("RGB")
    inputs = llava.inputs([picture], ["What?"])
    assert (inputs["input_ids"] == llava.model.config.image_token_id).sum() == 5
    with torch.no_grad():
        tokens = llava.model.model.vision_tower(inputs["pixel_values"]).last_hidden_state
        expected = blip2.get_qformer_features(pixel_values=inputs["pixel_values"])
    torch.testing.assert_close(tokens, getattr(expected, "last_hidden_state", expected), rtol=0, atol=5e-3)  # kept in half precision
    assert len(llava.answer([picture], ["What?"], LlavaSettings(max_new_tokens=3))) == 1
    with pytest.raises(UserError, match="no patches"):
        llava_attention(Llava(data / "llava", attention="eager"), picture, LlavaSettings(max_new_tokens=3))


def test_a_config_gives_the_seeds_schedule(towers, data, monkeypatch):
    changes = yaml.safe_load((ROOT / "configs" / "p4" / "blip2_llama2.yaml").read_text())
    assert Settings(**changes).stage2_batch_size == 12
    run = trainer(towers, **changes | {"fsdp": False, "batch_size": 4, "stage2_batch_size": 2, "stage1_epochs": 3, "stage2_epochs": 3})
    rates = []
    update = run.run.update
    run.run.update = lambda rate, **values: (rates.append(rate), update(rate, **values))
    run.save = lambda: None
    assert run.fit()
    first, second = rates[:run.stages[0]], rates[run.stages[0]:]
    steps = len(first) // 3
    assert first[steps - 1] == pytest.approx(1e-4) == max(first) and first[0] == pytest.approx(1e-6 + (1e-4 - 1e-6) / steps)
    assert 8e-5 < first[-1] < 8.6e-5 and max(second) == pytest.approx(3e-5) and 1e-5 < second[-1] < 1.2e-5
    assert {len(rows) for rows in run.batches[run.stages[0]:]} <= {1, 2}


@pytest.mark.parametrize("name, changes, message", [
    (CNN, {"side": 4, "image_size": 64}, "has 2 x 2 patches, of which 4 x 4 tokens cannot be made"),
    (CNN, {"train_vision_layers": 1}, "comes after 0 layers"),
    ("./no_such_net", {}, "cannot be loaded as a vision"),
])
def test_encoders_that_do_not_fit_are_refused(towers, data, cnn, name, changes, message):
    with pytest.raises(UserError, match=message):
        build(name, towers / "language", settings(**changes))
    with pytest.raises(UserError, match="--side is for encoders"):
        build(towers / "vision", towers / "language", settings(side=2))


def test_answers_weigh_alike(towers, data):
    run = trainer(towers, weigh="answers")
    one, two = ([[sample]] for sample in (Sample(0, "Is it?", "Yes."), Sample(0, "", CAPTIONS["red"])))
    inputs = run.rows.collate([one[0] + two[0]])
    assert inputs["weights"].sum().item() == pytest.approx(2)
    means = [loss_one_by_one(run, rows) / (run.rows.collate(rows)["labels"] != IGNORE).sum().item() for rows in (one, two)]
    assert answer_loss(run.model, inputs).item() == pytest.approx(sum(means), rel=1e-5)


def test_what_people_asked_is_learned_beside_several_folders(towers, data):
    shutil.copytree(data / "data", data / "more")
    for file in (data / "more" / "images" / "train").iterdir():
        file.rename(file.with_name(f"more_{file.name}"))
    text = (data / "more" / "train.json").read_text().replace('"file_name": "', '"file_name": "more_')
    (data / "more" / "train.json").write_text(text)
    (data / "more" / "images" / "vqa").mkdir()
    shutil.copy(data / "data" / "images" / "train" / "red.png", data / "more" / "images" / "vqa" / "new.png")
    asked = [{"image": name, "folder": folder, "question": "What colour?", "answer": answer, "agree": 9}
             for name, folder, answer in (("more_blue.png", "train", "blue"), ("new.png", "vqa", "red"))]
    (data / "more" / "asked.json").write_text(json.dumps(asked))
    run = trainer(towers, data=("data", "more"), instructions=("questions.json", "more/asked.json"), mix=("vqa=1",))
    assert run.captioned == 16 and len(run.images) == 17
    samples = {(run.images[sample.image].path.name, sample.query, sample.answer) for row in run.batches[-1] for sample in row}
    assert samples <= {("more_blue.png", "What colour?", "Blue."), ("new.png", "What colour?", "Red.")} and samples
    assert all(sample.image < 16 for rows in run.batches[:run.stages[0]] for row in rows for sample in row)
    shutil.copy(data / "data" / "images" / "train" / "red.png", data / "more" / "images" / "train" / "red.png")
    (data / "more" / "train.json").write_text(text.replace("more_red.png", "red.png"))
    with pytest.raises(UserError, match="asks about red.png, which several folders have"):
        trainer(towers, data=("data", "more"))


# ---- words before sentences --------------------------------------------------------------------------------------


def test_word_targets_by_hand(towers, data, monkeypatch):
    monkeypatch.setattr(word_targets, "LEAST", 2)
    from transformers import AutoTokenizer

    tokenizer, embedding = AutoTokenizer.from_pretrained(towers / "language"), torch.nn.Embedding(400, 8)
    dog = tokenizer(" dog", add_special_tokens=False)["input_ids"]
    images = [CaptionedImage("one", ["A dog on a dog."]), CaptionedImage("two", ["The dog.", "dogs!"]), CaptionedImage("three", ["On the."])]
    targets = WordTargets(images, tokenizer, embedding)
    shares = targets.shares([0, 1, 2])
    at = [targets.places[token] for token in dog]
    assert torch.allclose(shares[0, at], torch.full((len(at),), 1 / len(at))) and not shares[2].any()
    assert shares[1].sum().item() == pytest.approx(1) and targets.norm == pytest.approx(embedding(targets.tokens).norm(dim=-1).mean().item())
    tokens = torch.randn(3, 4, 8)
    words = torch.nn.functional.normalize(embedding(targets.tokens), dim=-1)
    each = (torch.nn.functional.normalize(tokens, dim=-1) @ words.t() * word_targets.SCALE + targets.bias).softmax(-1)
    expected = -(each.mean(1).log() * shares).sum()
    assert targets.loss(tokens, shares).item() == pytest.approx(expected.item(), rel=1e-5)


def test_image_tokens_become_words_and_the_run_goes_on(towers, data, cnn, monkeypatch):
    monkeypatch.setattr(word_targets, "LEAST", 1)

    def run(output):
        return AlignmentTrainer(cnn, towers / "language", output, settings(
            side=2, own_layers=1, own_width=64, views=2, word_epochs=20, stage1_epochs=1, stage2_epochs=1, cache="features",
            learning_rate=1e-2, vision_learning_rate=1e-3))

    whole = run("whole")
    assert whole.word_steps == 20 and len(whole.batches) == 24
    losses, sizes, step = [], [], whole.word_step

    def watched(number, pieces):
        losses.append(step(number, pieces))
        with torch.no_grad():
            sizes.append(image_tokens(whole.model, whole.rows.see([0, 1, 2])).norm(dim=-1).mean().item())
        return losses[-1]

    whole.word_step = watched
    assert whole.fit() and losses[-1] < losses[0] - 0.5
    assert sizes[-1] == pytest.approx(whole.words.norm, rel=0.2) and abs(sizes[-2] / whole.words.norm - 1) > 0.3
    monkeypatch.setattr(training, "Interruption", stopping(lambda: parts.progress["step"] in (7, 20, 22)))
    for finished in False, False, False, True:
        parts = run("parts")
        assert parts.fit() == finished
    one, two = (load_file(data / name / "trained.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert [json.loads(line)["stage"] for line in (data / "parts.jsonl").read_text().splitlines()][0] == 0


def test_own_layers_are_dropped_out_in_training_alone_and_begin_where_features_do(towers, data, cnn):
    run = AlignmentTrainer(cnn, towers / "language", "llava", settings(side=2, own_layers=2, own_width=64, own_dropout=0.5))
    tower, pixels = run.model.model.vision_tower, run.rows.see([*range(8)])
    with torch.no_grad():
        states = tower(pixels).hidden_states
        assert [state.shape for state in states] == [(8, 4, 64)] * 3
        entered = tower.entry[0](tower.encoder(pixels)[:, tower.encoder.num_prefix_tokens:])
        assert entered.mean((0, 1)).abs().max() < 0.5 and 0.5 < entered.std((0, 1)).median() < 2
        assert torch.equal(tower(pixels).last_hidden_state, states[-1])
        tower.layers.train()
        assert (tower(pixels).last_hidden_state - states[-1]).abs().max() > 0.1
    before = states[-1]
    assert run.fit()
    tower.eval()
    assert (tower(pixels).last_hidden_state - before).abs().max() > 1e-3  # they have learnt
    with pytest.raises(UserError, match="--own_layers is for encoders"):
        build(towers / "vision", towers / "language", settings(own_layers=1))


def test_cached_features_train_as_pictures_do(towers, data, cnn):
    Image.effect_noise((90, 70), 90).convert("RGB").save(data / "data" / "images" / "train" / f"{[*CAPTIONS][2]}.png")
    runs = [AlignmentTrainer(cnn, towers / "language", name, settings(side=2, cache=cache, views=2))
            for name, cache in (("live", ""), ("kept", "features"))]
    one, two = (run.rows.collate([[Sample(1, "", CAPTIONS["green"])], [Sample(2, "Is it?", "Yes.")]], [0, 1]) for run in runs)
    assert not torch.equal(two["pixel_values"][1], runs[1].rows.see([2], [0])[0])
    assert one["pixel_values"].shape == (2, 3, 288, 288) and two["pixel_values"].shape[1] == runs[1].model.model.vision_tower.encoder.num_tokens
    assert all(torch.equal(one[name], two[name]) for name in one if name != "pixel_values")
    losses = [answer_loss(run.model, inputs).item() for run, inputs in zip(runs, (one, two))]
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)  # features are kept in half precision
    with pytest.raises(UserError, match="--cache is for encoders"):
        trainer(towers, cache="features")


def test_gradient_checkpointing_keeps_every_gradient(towers, data, monkeypatch):
    plain = trainer(towers, "plain", train_vision_layers=1)
    monkeypatch.setattr(llava_training, "CHECKPOINTED", 0)
    run = trainer(towers, "checkpointed", train_vision_layers=1)
    gradients = []
    for one, passes in (plain, 1), (run, 2):  # forward and, with checkpointing, again before backward
        count, layers = [], one.model.model.language_model.layers
        for layer in layers:
            layer.mlp.register_forward_pre_hook(lambda *arguments: count.append(arguments))
        answer_loss(one.model, one.rows.collate([[Sample(1, "", CAPTIONS["green"])], [Sample(2, "Is it?", "Yes.")]])).backward()
        assert len(count) == passes * len(layers)
        assert not any(module.training for layer in layers for module in layer.children())
        gradients.append({name: value.grad for name, value in one.trained.items()})
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


# ---- going on --------------------------------------------------------------------------------------------------


def test_a_resumed_run_equals_one_that_was_not_stopped(towers, data, monkeypatch):
    assert trainer(towers, "whole", train_vision_layers=1).fit()

    monkeypatch.setattr(training, "Interruption", stopping(lambda: run.progress["step"] in (3, 5)))
    for finished in False, False, True:
        run = trainer(towers, "parts", train_vision_layers=1, accumulation=2 if finished else 1)
        assert run.fit() == finished
    whole, parts = (load_file(data / name / "trained.safetensors") for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert all(torch.allclose(whole[name].float(), parts[name].float(), atol=2e-4) for name in whole)
    assert not (data / "parts.state.pt").exists()


def test_stopping_changes_no_bit(towers, data, monkeypatch):
    trainer(towers, "whole").fit()
    run = trainer(towers, "parts", max_hours=1e-9)
    while not run.fit():  # after every single update
        run = trainer(towers, "parts", max_hours=1e-9)
    whole, parts = (load_file(data / name / "trained.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_a_run_does_not_go_on_with_other_samples(towers, data):
    assert not trainer(towers, max_hours=1e-9).fit()
    questions = json.loads((data / "questions.json").read_text())
    questions[0]["answer"] = "Another."
    (data / "questions.json").write_text(json.dumps(questions))
    with pytest.raises(UserError, match="unfinished run with another samples"):
        trainer(towers)


def test_two_processes_align_as_one_with_the_language_model_sharded_and_checkpointed(towers, data):
    options = ["--batch_size=4", "--stage1_epochs=1", "--stage2_epochs=1", "--instructions=questions.json",
               "--per_picture=2", "--head_sample=40", "--mix", "qa=0.5", "caption=0.5"]
    for processes, more in (1, []), (2, ["--fsdp"]):
        before = "import training; training.LOG_STEPS = 1"
        if more:
            before += "; import llava_training; llava_training.CHECKPOINTED = 0"
        finish(start(str(towers / "vision"), str(towers / "language"), f"out{processes}", *options, *more, processes=processes,
                     module="p4_align", before=before))
    one, two = ([json.loads(line)["loss"] for line in open(f"out{n}.jsonl")] for n in (1, 2))
    assert len(one) == 4 and two == pytest.approx(one, abs=1e-4)
    whole, sharded = (load_file(f"out{n}/model.safetensors") for n in (1, 2))
    assert whole.keys() == sharded.keys()
    assert all(torch.allclose(whole[name].float(), sharded[name].float(), atol=2e-4) for name in whole)


# ---- mistakes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes, message", [
    ({"projection": "cubic"}, "choose from linear, mlp"),
    ({"mix": ("qa",)}, "kind=part"),
    ({"mix": ("qa=-1",)}, "at least 0"),
    ({"stage1_epochs": 0, "stage2_epochs": 0}, "stage2_epochs must be above 0"),
    ({"head_sample": -1}, "at least 0"),
    ({"per_picture": 0}, "at least 1"),
    ({"mix": ("poems=1",)}, "of which there are no samples"),
    ({"image_size": 30}, "multiple of the patches' 14"),
    ({"train_vision_layers": 9}, "after 3 layers"),
    ({"train_vision_layers": 3, "vision_layer": -2}, "after 2 layers"),
    ({"vision_layer": 4}, "has 3 layers"),
    ({"precision": "fp16"}, "choose bf16 or fp32"),
    ({"instructions": "nothing.json"}, "does not exist"),
])
def test_mistakes_are_named(towers, data, changes, message):
    with pytest.raises(UserError, match=message):
        trainer(towers, **changes)


def test_what_is_no_pair_of_models_is_refused(towers, data):
    with pytest.raises(UserError, match="cannot be loaded"):
        build(data, towers / "language", settings())
    damaged = shutil.copytree(towers / "language", data / "damaged")
    (damaged / "model.safetensors").write_bytes(b"half")
    with pytest.raises(UserError, match="cannot be loaded"):
        build(towers / "vision", damaged, settings())
    (data / "taken").mkdir()
    (data / "taken" / "file").touch()
    with pytest.raises(UserError, match="there already"):
        trainer(towers, "taken")


def test_instructions_that_are_none_are_refused(towers, data):
    entry = {"image": "red.png", "kind": "qa", "query": "<image>\nWhat is\nthis?", "answer": "A dog."}
    (data / "questions.json").write_text(json.dumps([entry]))
    run = trainer(towers, mix=("qa=1",))
    assert run.batches[-1][0][0].query == "What is this?"
    for wrong, message in [({"answer": 3}, "not a list of"), ({"query": None}, "not a list of"),
                           ({"image": "no.png"}, "asks about no.png, which is not in train.json")]:
        (data / "questions.json").write_text(json.dumps([entry | wrong]))
        with pytest.raises(UserError, match=message):
            trainer(towers)


def test_vision_models_that_do_not_fit_are_refused(towers, data):
    from transformers import (
        BitImageProcessor,
        CLIPVisionConfig,
        CLIPVisionModel,
        Dinov2WithRegistersConfig,
        Dinov2WithRegistersModel,
        SiglipVisionConfig,
        SiglipVisionModel,
    )

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
             "intermediate_size": 64}
    for name, model in [("registers", Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**sizes))),
                        ("clip", CLIPVisionModel(CLIPVisionConfig(**sizes))),
                        ("siglip", SiglipVisionModel(SiglipVisionConfig(**sizes)))]:
        model.save_pretrained(data / name)
        BitImageProcessor().save_pretrained(data / name)
    with pytest.raises(UserError, match="5 tokens before those of its patches"):
        build(data / "registers", towers / "language", settings())
    for name in "clip", "siglip":
        with pytest.raises(UserError, match="does not take 42 pixels"):
            build(data / name, towers / "language", settings(image_size=42))
    for name in "clip", "siglip":  # with a class token, and without one
        assert AlignmentTrainer(data / name, towers / "language", f"{name}_llava", settings(stage1_epochs=1, stage2_epochs=0)).fit()
        answers = Llava(data / f"{name}_llava").answer([Image.new("RGB", (50, 40))], ["Well?"], LlavaSettings(max_new_tokens=3))
        assert len(answers) == 1


def test_language_models_that_llava_would_change_are_refused(towers, data):
    from transformers import (
        AutoTokenizer,
        CohereConfig,
        CohereForCausalLM,
        Gemma2Config,
        Gemma2ForCausalLM,
        GPT2Config,
        GPT2LMHeadModel,
        PhiConfig,
        PhiForCausalLM,
    )

    sizes = {"vocab_size": 400, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    for model, message in [(GPT2LMHeadModel(GPT2Config(vocab_size=400, n_embd=32, n_layer=2, n_head=2)), "not built as LLaVA"),
                           (PhiForCausalLM(PhiConfig(**sizes)), "by a bias"),
                           (CohereForCausalLM(CohereConfig(**sizes)), "by logit_scale"),
                           (Gemma2ForCausalLM(Gemma2Config(**sizes, num_key_value_heads=1, head_dim=16)), "final_logit_softcapping")]:
        folder = data / type(model).__name__
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(towers / "language").save_pretrained(folder)
        with pytest.raises(UserError, match=message):
            build(towers / "vision", folder, settings())


def test_a_kept_unused_token_stands_for_patches_and_a_chat_template_is_followed(towers, data):
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(towers / "language")
    tokenizer.add_tokens(["<unused0>", "<|start|>"], special_tokens=True)
    tokenizer.bos_token = "<|start|>"  # which this tokenizer does not add: its text begins with <s>
    tokenizer.chat_template = "{% for m in messages %}<|start|>user {{ m['content'] }}</s>{% endfor %}<|start|>answer "
    torch.manual_seed(0)
    Qwen2ForCausalLM(Qwen2Config(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                                 num_attention_heads=2, num_key_value_heads=2)).save_pretrained(data / "qwen")
    tokenizer.save_pretrained(data / "qwen")
    run = AlignmentTrainer(towers / "vision", data / "qwen", "llava", settings(stage1_epochs=0, stage2_epochs=1))
    assert run.processor.image_token == "<unused0>" and "<image>" not in run.processor.tokenizer.get_vocab()
    assert run.fit()
    llava, picture = Llava(data / "llava"), Image.open(run.images[0].path).convert("RGB")
    taught = run.rows.collate([[Sample(0, "What colour is the dog?", "Red.")]])
    asked = llava.inputs([picture], ["What colour is the dog?"])["input_ids"][0].tolist()
    assert asked == taught["input_ids"][0, :len(asked)].tolist() and taught["labels"][0, len(asked)] != IGNORE
    text = tokenizer.decode(asked)
    assert text.count("<|start|>") == 2 and "<|start|>user" in text and text.endswith("answer ")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] | lower }}{% endfor %}"
    with pytest.raises(UserError, match="does not give a query as it is"):
        query_form(tokenizer, "qwen2")


def test_training_keeps_gradients_to_what_is_trained(towers):
    model, _ = build(towers / "vision", towers / "language", settings())
    names = trained_parameters(model, 2)
    assert {name.split("layer.")[1].split(".")[0] for name in names if "vision_tower" in name} == {"1", "2"}
    assert not any("language_model" in name or "lm_head" in name for name in names)
