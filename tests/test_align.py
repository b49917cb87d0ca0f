"""p4_align.py keeps its promises: what is trained and what is not, what the loss counts, resuming, and a folder that p1 reads."""

import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, stopping
from PIL import Image
from safetensors.torch import load_file

import p4_align
from cli import UserError
from dataset import IGNORE
from p1_llava_infer import Llava, LlavaSettings
from p4_align import Sample, Settings, Trainer, answer_loss, build, draw_epoch, query_form, trained_parameters

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
                       "mix": ("qa=0.5", "caption=0.5"), "save_minutes": 1e9} | changes)


def trainer(towers, output="llava", **changes):
    return Trainer(towers / "vision", towers / "language", output, settings(**changes))


# ---- the model -------------------------------------------------------------------------------------------------


def test_stage_1_overfits_eight_pairs_and_p1_reads_the_folder(towers, data):
    run = trainer(towers, stage1_epochs=120, stage2_epochs=0, batch_size=8, learning_rate=1e-2, warmup_epochs=5)
    assert run.fit() and run.progress["losses"][-1] < 0.1
    llava = Llava(data / "llava")
    pictures = [Image.open(data / "data" / "images" / "train" / f"{name}.png").convert("RGB") for name in COLOURS]
    answers = llava.answer(pictures, [""] * 8, LlavaSettings(max_new_tokens=20))
    assert answers == [*CAPTIONS.values()]
    trained = load_file(data / "llava" / "trained.safetensors")
    assert trained.keys() == run.trained.keys()
    assert llava.processor.image_processor.size["height"] == 28 and not llava.processor.image_processor.do_center_crop


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


def test_image_tokens_begin_as_large_as_words(towers):
    model, _ = build(towers / "vision", towers / "language", settings())
    words = model.get_input_embeddings().weight.std()
    features = torch.nn.functional.layer_norm(torch.randn(99, 32), (32,))
    assert 0.7 < model.model.multi_modal_projector(features).std() / words < 1.4


# ---- the loss --------------------------------------------------------------------------------------------------


def test_answers_alone_count_in_the_loss(towers, data):
    run = trainer(towers)
    samples = [Sample(0, "", CAPTIONS["red"]), Sample(2, "What colour is the dog?", "Blue.")]
    inputs = run.collate(samples)
    tokenizer = run.processor.tokenizer
    for row, labels, sample in zip(inputs["input_ids"], inputs["labels"], samples):
        learned = labels[labels != IGNORE]
        assert tokenizer.decode(learned) == sample.answer + "</s>"
        assert torch.equal(row[labels != IGNORE], learned)
        assert (row == run.model.config.image_token_id).sum() == 4  # 28² pixels, patches of 14²
        assert row[0] == 0 and (row == 0).sum() == 1  # one beginning
    expected = 0.0
    for i in range(2):
        alone = run.collate(samples[i:i + 1])
        logits = run.model(input_ids=alone["input_ids"], pixel_values=alone["pixel_values"]).logits[0]
        for at, label in enumerate(alone["labels"][0].tolist()):
            if label != IGNORE:
                expected -= logits[at - 1].log_softmax(0)[label].item()
    assert answer_loss(run.model, inputs).item() == pytest.approx(expected, abs=1e-3)


def test_p1_asks_in_the_words_of_the_training(towers, data):
    run = trainer(towers, stage1_epochs=1, stage2_epochs=0)
    run.fit()
    llava, query = Llava(data / "llava"), "What colour is the dog?"
    picture = Image.open(data / "data" / "images" / "train" / "red.png").convert("RGB")
    ids = run.collate([Sample(0, query, "Red.")])
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
    drawn = draw_epoch(groups, parts, 50, torch.Generator().manual_seed(0))
    kinds = [sample.query for sample in drawn]
    assert (kinds.count("qa"), kinds.count("relation"), kinds.count("detail")) == (30, 10, 10)
    assert len({sample.answer for sample in drawn if sample.query == "qa"}) == 30  # each once before any again
    assert {sum(sample.answer == str(i) for sample in drawn if sample.query == "relation") for i in range(3)} == {3, 4}
    assert kinds[:30] != ["qa"] * 30


def test_stages_ask_nothing_then_something(towers, data):
    run = trainer(towers)
    first = [sample for step in range(4) for sample in run.samples(step)]
    second = [sample for step in range(4, 8) for sample in run.samples(step)]
    assert sorted(sample.image for sample in first) == sorted([*range(8)] * 2)
    assert {sample.query for sample in first} == {""}
    assert sum(sample.query == "What colour is the dog?" for sample in second) == 8 and all(sample.query for sample in second)


# ---- going on --------------------------------------------------------------------------------------------------


def test_a_resumed_run_equals_one_that_was_not_stopped(towers, data, monkeypatch):
    assert trainer(towers, "whole", train_vision_layers=1).fit()

    monkeypatch.setattr(p4_align, "Interruption", stopping(lambda: run.progress["step"] in (3, 5)))
    for finished in False, False, True:
        run = trainer(towers, "parts", train_vision_layers=1, accumulation=2 if finished else 1)
        assert run.fit() == finished
    whole, parts = (load_file(data / name / "trained.safetensors") for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert all(torch.allclose(whole[name].float(), parts[name].float(), atol=2e-3) for name in whole)
    assert not (data / "parts.state.pt").exists()


def test_stopping_changes_no_bit(towers, data, monkeypatch):
    trainer(towers, "whole").fit()
    run = trainer(towers, "parts", max_hours=1e-9)
    while not run.fit():  # after every single update
        run = trainer(towers, "parts", max_hours=1e-9)
    whole, parts = (load_file(data / name / "trained.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_two_processes_align_as_one_with_the_language_model_sharded(towers, data):
    with open("driver.py", "w") as file:
        file.write(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nimport torch\ntorch.set_num_threads(1)\n"
                   "import cli, p4_align\np4_align.LOG_STEPS = 1\ncli.run(p4_align.main)\n")
    options = ["--batch_size=4", "--stage1_epochs=1", "--stage2_epochs=1", "--instructions=questions.json",
               "--mix", "qa=0.5", "caption=0.5"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for processes, more in (1, []), (2, ["--fsdp"]):
        shared = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1",
                  "MASTER_PORT": str(port), "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
        command = [sys.executable, "driver.py", str(towers / "vision"), str(towers / "language"), f"out{processes}"]
        started = [subprocess.Popen([*command, *options, *more], env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                                    stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for rank in range(processes)]
        outputs = [process.communicate(timeout=300)[0] for process in started]
        assert [process.returncode for process in started] == [0] * processes, outputs
    one, two = ([json.loads(line)["loss"] for line in open(f"out{n}.jsonl")] for n in (1, 2))
    assert len(one) == 4 and two == pytest.approx(one, abs=1e-4)
    whole, sharded = (load_file(f"out{n}/model.safetensors") for n in (1, 2))
    assert whole.keys() == sharded.keys()
    assert all(torch.allclose(whole[name].float(), sharded[name].float(), atol=2e-3) for name in whole)


# ---- mistakes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes, message", [
    ({"projection": "cubic"}, "choose from linear, mlp"),
    ({"mix": ("qa",)}, "kind=part"),
    ({"mix": ("qa=-1",)}, "at least 0"),
    ({"stage1_epochs": 0, "stage2_epochs": 0}, "one stage above"),
    ({"mix": ("poems=1",)}, "of which there are no samples"),
    ({"image_size": 30}, "multiple of the patches' 14"),
    ({"train_vision_layers": 9}, "but there are 3"),
    ({"precision": "fp16"}, "choose bf16 or fp32"),
    ({"instructions": "nothing.json"}, "does not exist"),
])
def test_mistakes_are_named(towers, data, changes, message):
    with pytest.raises(UserError, match=message):
        trainer(towers, **changes)


def test_what_is_no_pair_of_models_is_refused(towers, data):
    with pytest.raises(UserError, match="cannot be loaded"):
        build(data, towers / "language", settings())
    (data / "taken").mkdir()
    (data / "taken" / "file").touch()
    with pytest.raises(UserError, match="there already"):
        trainer(towers, "taken")


def test_training_keeps_gradients_to_what_is_trained(towers):
    model, _ = build(towers / "vision", towers / "language", settings())
    names = trained_parameters(model, 2)
    assert {name.split("layer.")[1].split(".")[0] for name in names if "vision_tower" in name} == {"1", "2"}
    assert not any("language_model" in name or "lm_head" in name for name in names)
