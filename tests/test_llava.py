"""p1_llava_infer.py: LLaVA's prompts, the same answers in batches, resuming, and refused inputs."""

import json
import shutil
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, make_llava
from PIL import Image

import metrics
import p1_llava_infer
from cli import UserError
from llava import Llava, LlavaSettings, default_model, first_sentence
from p1_llava_infer import read_settings

TEMPLATE = "{% for message in messages %}<s>[INST] {% for part in message['content'] %}" \
           "{% if part['type'] == 'image' %}<image>{% else %} {{ part['text'] }}{% endif %}{% endfor %} [/INST]{% endfor %}"


@pytest.fixture(scope="session")
def llava_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llava")
    make_llava(folder, "default")
    return folder


@pytest.fixture(scope="session")
def llava(llava_folder):
    return Llava(llava_folder)


@pytest.fixture
def pictures(tmp_path):
    """A folder with five pictures of odd sizes, and one file that is none."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i, size in enumerate([(28, 28), (90, 30), (30, 200), (7, 5), (64, 48)]):
        pixels = np.random.default_rng(i).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    (folder / "broken.jpg").write_bytes(b"nothing")
    return folder


def open_pictures(folder):
    return [Image.open(path).convert("RGB") for path in sorted(folder.glob("*.png"))]


def call(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["p1_llava_infer.py", *map(str, arguments)])
    return p1_llava_infer.main()


def interrupt_after(monkeypatch, number):
    """Let Llava answer so many batches, then interrupt it; 0: count alone. Returns the seeds of those answered, as they come."""
    answered, answer = [], Llava.answer

    def count(self, pictures, instructions, settings, seed=0):
        if number and len(answered) == number:
            raise KeyboardInterrupt
        answered.append(seed)
        return answer(self, pictures, instructions, settings, seed)

    monkeypatch.setattr(Llava, "answer", count)
    return answered


# ---- what it is told -------------------------------------------------------------------------------------------


def test_prompt_is_llavas_own_without_a_template(llava):
    assert llava.prompt("What is this?") == "USER: <image>\nWhat is this? ASSISTANT:"


def test_prompt_is_the_processors_template_where_it_has_one(llava, pictures, monkeypatch):
    monkeypatch.setattr(llava.processor, "chat_template", TEMPLATE)
    assert llava.prompt("What is this?") == "[INST] <image> What is this? [/INST]"
    ids = llava.inputs(open_pictures(pictures)[:1], ["What is this?"])["input_ids"][0].tolist()
    assert ids[0] == 1 and ids.count(1) == 1  # the text's start, which the template and the tokenizer would both add
    monkeypatch.setattr(llava.processor.tokenizer.backend_tokenizer, "post_processor", None)
    assert llava.prompt("What is this?") == "<s>[INST] <image> What is this? [/INST]"


def test_one_picture_is_asked_about_whatever_the_instruction_says(llava):
    assert llava.prompt("<image>\nWhat is this?") == llava.prompt("What is this?")


def test_texts_are_padded_on_the_left_around_whole_pictures(llava, pictures):
    short, long = "What?", "describe the image in one sentence, and then in another"
    inputs = llava.inputs(open_pictures(pictures)[:2], [short, long])
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    padded = int((mask[0] == 0).sum())
    assert padded > 0 and (ids[0, :padded] == 0).all() and mask[0, padded:].all() and mask[1].all()
    assert ((ids == 3).sum(1) == 16).all()  # 28² pixels in patches of 7², the class token left out
    alone = llava.inputs(open_pictures(pictures)[:1], [short])
    assert ids[0, padded:].tolist() == alone["input_ids"][0].tolist()
    assert torch.equal(inputs["pixel_values"][:1], alone["pixel_values"])


@pytest.mark.parametrize("changes", [{}, {"num_beams": 3}, {"num_beams": 2, "length_penalty": 2.0, "repetition_penalty": 1.3}])
def test_a_batch_answers_as_its_pictures_alone(llava, pictures, changes):
    settings = LlavaSettings(max_new_tokens=12, **changes)
    instructions = ["What?", "describe the image", "A dog runs on the green grass. Describe it.", "Why", "What are these?"]
    together = llava.answer(open_pictures(pictures), instructions, settings)
    alone = [llava.answer([picture], [text], settings)[0] for picture, text in zip(open_pictures(pictures), instructions)]
    assert together == alone and len(set(together)) > 1
    assert not any(special in text for text in together for special in ("<image>", "<pad>", "</s>"))


@pytest.mark.parametrize("changes, expected", [
    ({}, {"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "length_penalty": None}),
    ({"temperature": 0.7, "top_p": 0.9, "top_k": 20}, {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 20}),
    ({"num_beams": 4, "length_penalty": 0.5, "repetition_penalty": 1.2, "max_new_tokens": 5},
     {"num_beams": 4, "length_penalty": 0.5, "repetition_penalty": 1.2, "max_new_tokens": 5, "do_sample": False}),
])
def test_settings_reach_generate(llava, pictures, monkeypatch, changes, expected):
    seen = {}
    generate = llava.model.generate
    monkeypatch.setattr(llava.model, "generate", lambda **options: seen.update(options) or generate(**options))
    llava.answer(open_pictures(pictures)[:2], ["What?"] * 2, LlavaSettings(**{"max_new_tokens": 4} | changes))
    assert expected.items() <= seen.items()


def test_drawn_answers_follow_the_seed(llava, pictures):
    settings = LlavaSettings(max_new_tokens=8, temperature=1.0)
    first, again, other = (llava.answer(open_pictures(pictures), ["What?"] * 5, settings, seed) for seed in (0, 0, 1))
    assert first == again != other


def test_too_little_memory_is_said_in_a_line(llava, pictures, monkeypatch):
    def fail(**options):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(llava.model, "generate", fail)
    with pytest.raises(UserError, match="2 pictures at a time: lower --batch_size"):
        llava.answer(open_pictures(pictures)[:2], ["What?"] * 2, LlavaSettings())


@pytest.mark.parametrize("text, first", [
    ("A dog runs. It is brown.", "A dog runs."),
    ("A dog", "A dog"),
    ("Is it a dog? Yes.", "Is it a dog?"),
    ('A sign says "stop." Cars wait.', 'A sign says "stop."'),
    ("Mr. Smith and Dr. Lee wait at 5 p.m. in St. Paul. Cars pass.", "Mr. Smith and Dr. Lee wait at 5 p.m. in St. Paul."),
    ("It costs 3.50 dollars. Cheap!", "It costs 3.50 dollars."),
    ("Wow!! Great.", "Wow!!"),
    ("", ""),
])
def test_one_sentence_is_the_first(text, first):
    assert first_sentence(text) == first


# ---- folders ---------------------------------------------------------------------------------------------------


def test_a_folder_is_captioned_and_bad_files_are_named(llava_folder, pictures, tmp_path, monkeypatch, capsys):
    output = tmp_path / "out.json"
    assert call(monkeypatch, pictures, output, llava_folder, "--max_new_tokens", 6, "--batch_size", 4) == 3
    captions = json.loads(output.read_text())
    assert [*captions] == ["0", "1", "2", "3", "4"]
    assert captions["2"] == Llava(llava_folder).answer(open_pictures(pictures)[2:3], [LlavaSettings().instruction],
                                                       LlavaSettings(max_new_tokens=6))[0]
    err = capsys.readouterr().err
    assert f"with {llava_folder}" in err and "broken.jpg: not an image" in err and "5 captions" in err
    assert not Path(f"{output}.part").exists()
    assert call(monkeypatch, pictures, output, llava_folder, "--max_new_tokens", 6, "--limit", 2) == 0
    assert [*json.loads(output.read_text())] == ["0", "1"]


def test_an_interrupted_run_goes_on(llava_folder, pictures, tmp_path, monkeypatch, capsys):
    (pictures / "broken.jpg").unlink()
    arguments = pictures, tmp_path / "out.json", llava_folder, "--max_new_tokens", 6, "--batch_size", 2, "--temperature", 1
    assert call(monkeypatch, *arguments) == 0
    whole = (tmp_path / "out.json").read_bytes()
    (tmp_path / "out.json").unlink()

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_after(patch, 2)
        call(patch, *arguments)
    assert not (tmp_path / "out.json").exists()
    part = tmp_path / "out.json.part"
    assert len(part.read_text().splitlines()) == 1 + 4
    with open(part, "a") as file:
        file.write('{"stem": "4", "answ')  # as a killed run leaves it
    answered = interrupt_after(monkeypatch, 0)
    assert call(monkeypatch, *arguments) == 0
    assert answered == [4]  # the last batch alone
    assert (tmp_path / "out.json").read_bytes() == whole and not part.exists()


def test_answers_under_other_settings_are_not_taken_over(llava_folder, pictures, tmp_path, monkeypatch, capsys):
    part = tmp_path / "out.json.part"
    part.write_text(json.dumps({"what": {"instruction": "another"}}) + '\n{"stem": "0", "answer": "stale"}\n')
    call(monkeypatch, pictures, tmp_path / "out.json", llava_folder, "--max_new_tokens", 3)
    assert json.loads((tmp_path / "out.json").read_text())["0"] != "stale"
    assert "other settings" in capsys.readouterr().err


def test_answers_about_another_folder_are_not_taken_over(llava_folder, pictures, tmp_path, monkeypatch, capsys):
    (pictures / "broken.jpg").unlink()
    other = tmp_path / "other"
    other.mkdir()
    for i in range(5):
        Image.new("RGB", (28, 28), (50 * i, 0, 0)).save(other / f"{i}.png")
    arguments = tmp_path / "out.json", llava_folder, "--max_new_tokens", 6, "--batch_size", 2
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_after(patch, 2)
        call(patch, other, *arguments)
    answered = interrupt_after(monkeypatch, 0)
    assert call(monkeypatch, pictures, *arguments) == 0
    assert answered == [0, 2, 4] and "other settings" in capsys.readouterr().err


def test_a_picture_mended_meanwhile_is_read(llava_folder, pictures, tmp_path, monkeypatch):
    arguments = pictures, tmp_path / "out.json", llava_folder, "--max_new_tokens", 6, "--batch_size", 2
    (pictures / "broken.jpg").rename(pictures / "0.jpg")
    (pictures / "0.png").unlink()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_after(patch, 2)
        call(patch, *arguments)
    Image.new("RGB", (28, 28)).save(pictures / "0.jpg")
    answered = interrupt_after(monkeypatch, 0)
    assert call(monkeypatch, *arguments) == 0
    assert answered == [0, 4]
    assert [*json.loads((tmp_path / "out.json").read_text())] == ["0", "1", "2", "3", "4"]


# ---- settings compared -----------------------------------------------------------------------------------------


@pytest.fixture
def annotations(pictures, tmp_path):
    images = [{"id": i, "file_name": f"{i}.png"} for i in range(5)]
    captions = [{"id": 10 * i + k, "image_id": i, "caption": text} for i in range(5)
                for k, text in enumerate([f"a dog number {i}", f"picture {i} of a dog"])]
    (tmp_path / "val.json").write_text(json.dumps({"images": images, "annotations": captions}))
    return tmp_path / "val.json"


def test_settings_are_compared_in_a_table(llava_folder, pictures, annotations, tmp_path, monkeypatch, capsys):
    (pictures / "broken.jpg").unlink()
    (tmp_path / "settings.yaml").write_text("short:\n  instruction: What?\nlong:\n  num_beams: 2\n  max_new_tokens: 9\n")
    monkeypatch.setattr(Llava, "answer", lambda self, pictures, instructions, settings, seed=0:
                        [f"picture {i} of a dog" if settings.num_beams == 1 else "nothing at all" for i in range(len(pictures))])
    assert call(monkeypatch, pictures, tmp_path / "table.json", llava_folder, "--settings", tmp_path / "settings.yaml",
                "--annotation_file", annotations) == 0
    table = json.loads((tmp_path / "table.json").read_text())
    assert [*table] == ["short", "long"] and table["short"]["instruction"] == "What?"
    assert table["long"]["instruction"] == LlavaSettings().instruction and table["long"]["max_new_tokens"] == 9
    assert table["short"]["CIDEr"] > 1 > table["long"]["CIDEr"] == 0 and table["short"]["images"] == 5
    assert json.loads((tmp_path / "table.short.json").read_text())["3"] == "picture 3 of a dog"
    out = capsys.readouterr().out
    assert "| short | What? |" in out and "CLIPScore needs CLIP's weights" in out


def test_an_interrupted_comparison_goes_on_with_its_next_setting(llava_folder, pictures, annotations, tmp_path, monkeypatch):
    (pictures / "broken.jpg").unlink()
    (tmp_path / "settings.yaml").write_text("one:\n  seed: 1\ntwo:\n  seed: 2\n")
    arguments = (pictures, tmp_path / "table.json", llava_folder, "--settings", tmp_path / "settings.yaml", "--annotation_file",
                 annotations, "--batch_size", 5, "--max_new_tokens", 4)
    monkeypatch.setattr(metrics, "evaluate", lambda systems, *others: [(defaultdict(float), None, None)] * len(systems))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_after(patch, 1)
        call(patch, *arguments)
    answered = interrupt_after(monkeypatch, 0)
    assert call(monkeypatch, *arguments) == 0
    assert answered == [2 * 1_000_003]  # of the second alone
    assert [*json.loads((tmp_path / "table.json").read_text())] == ["one", "two"] and not [*tmp_path.glob("*.part")]


@pytest.mark.parametrize("text, message", [
    ("one:\n  instruction:\n", "instruction is None, but must be a text"),
    ("one:\n  num_beams: '3'\n", "num_beams is '3', but must be a whole number"),
    ("one:\n  one_sentence: 1\n", "one_sentence is 1, but must be true or false"),
    ("one:\n  5: 2\n  foo: 1\n", "no option 5"),
    ("- a\n- b\n", "not a list of `name:`"),
    ("one: text\n", "not a list of `name:`"),
    ("one:\n  instructions: x\n", "no option instructions"),
    ("one two:\n  seed: 1\n", "'one two'"),
    ("one:\n  num_beams: 0\n", "num_beams is 0, but must be at least 1"),
    ("one: [", "not YAML"),
])
def test_odd_settings_are_named(tmp_path, text, message):
    (tmp_path / "settings.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        read_settings(tmp_path / "settings.yaml", LlavaSettings())


def test_the_courses_prompts_are_settings():
    every = read_settings(ROOT / "configs" / "p1" / "prompts.yaml", LlavaSettings())
    assert len(every) == 4 and len({settings.instruction for settings in every.values()}) == 4
    assert every["subject"].instruction.endswith("Avoid any extra details.")


# ---- what is refused -------------------------------------------------------------------------------------------


def test_models_that_cannot_be_are_refused(llava_folder, tmp_path, pictures, monkeypatch):
    from transformers import LlamaConfig

    with pytest.raises(UserError, match="is no LLaVA that can be loaded"):
        Llava(tmp_path)
    shutil.copytree(llava_folder, tmp_path / "damaged")
    (tmp_path / "damaged" / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(UserError, match="is no LLaVA that can be loaded"):
        Llava(tmp_path / "damaged")
    LlamaConfig().save_pretrained(tmp_path / "llama")
    with pytest.raises(UserError, match="of the kind llama, not LLaVA"):
        Llava(tmp_path / "llama")
    monkeypatch.setattr("llava.pick_device", lambda: "cpu")
    with pytest.raises(UserError, match="--load_in_4bit needs a GPU"):
        call(monkeypatch, pictures, tmp_path / "out.json", tmp_path, "--load_in_4bit")
    assert not (tmp_path / "out.json").exists()


def test_the_default_is_the_model_that_there_is_room_for(tmp_path, monkeypatch):
    big, small = tmp_path / "big", tmp_path / "small"
    monkeypatch.setattr("llava.BIG", big)
    monkeypatch.setattr("llava.SMALL", small)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda i: (10e9, 24e9))
    with pytest.raises(UserError, match="there is no LLaVA"):
        default_model()
    big.mkdir()
    with pytest.raises(UserError, match="no GPU with room"):
        default_model()
    assert default_model(load_in_4bit=True) == big
    small.mkdir()
    assert default_model() == small
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda i: (20e9, 24e9))
    assert default_model() == big
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert default_model() == small


@pytest.mark.parametrize("changes, message", [
    ({"num_beams": 0}, "num_beams"), ({"temperature": -1.0}, "temperature"), ({"top_p": 0.0}, "top_p"),
    ({"repetition_penalty": 0.0}, "repetition_penalty"), ({"max_new_tokens": 0}, "max_new_tokens")])
def test_settings_that_cannot_be_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        LlavaSettings(**changes)


@pytest.mark.parametrize("arguments, message", [
    (["--settings", "a.yaml"], "go together"), (["--batch_size", "0"], "at least 1"), (["--limit", "0"], "at least 1")])
def test_options_that_cannot_be_are_refused(pictures, tmp_path, monkeypatch, arguments, message):
    with pytest.raises(UserError, match=message):
        call(monkeypatch, pictures, tmp_path / "out.json", *arguments)
