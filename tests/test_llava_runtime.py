"""A language model in OpenVINO generates the same text as in PyTorch, with all kinds of settings."""

import threading

import pytest
import torch
from conftest import make_llava
from PIL import Image
from transformers import DynamicCache, Gemma3TextConfig, LlamaConfig

import llava_runtime
from cli import UserError
from llava import Llava, LlavaSettings

pytest.importorskip("openvino")

ASKED = ["Describe the picture in one sentence.", "What?", "A dog runs on the green grass. Describe the picture."]
# With shared keys; with keys of their own; and with a window that is shorter than the texts.
TEXTS = {
    "llama": LlamaConfig(vocab_size=400, hidden_size=32, intermediate_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
                         initializer_range=0.3, bos_token_id=1, eos_token_id=2, pad_token_id=0),
    "alone": LlamaConfig(vocab_size=400, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
                         initializer_range=0.3, bos_token_id=1, eos_token_id=2, pad_token_id=0),
    "gemma": Gemma3TextConfig(vocab_size=400, hidden_size=32, intermediate_size=32, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=1,
                              head_dim=16, sliding_window=6, sliding_window_pattern=2, initializer_range=0.3, bos_token_id=1, eos_token_id=2,
                              pad_token_id=0),
}


@pytest.fixture(scope="module", params=TEXTS)
def both(request, tmp_path_factory):
    """The same LLaVA through PyTorch and through OpenVINO."""
    folder = tmp_path_factory.mktemp(request.param)
    make_llava(folder, "default", TEXTS[request.param])
    one, other = Llava(folder, runtime="torch"), Llava(folder, runtime="openvino")
    assert (one.compiled, other.compiled) == (False, True)
    return one, other


@pytest.fixture
def pictures():
    return [Image.effect_noise((40, 30), 10 + 30 * number).convert("RGB") for number in range(3)]


def seen(model, pictures, asked, steps=9):
    """A greedy answer's tokens, and the logits of each of its steps: (B, steps, V)."""
    inputs = model.inputs(pictures, asked)
    found = model.model.generate(**inputs, **model.generation(LlavaSettings(max_new_tokens=steps)), return_dict_in_generate=True,
                                 output_logits=True)
    return found.sequences, torch.stack(found.logits, 1)


def test_logits_are_the_same_with_padding_and_windows(both, pictures):
    (tokens, expected), (others, found) = (seen(model, pictures, ASKED) for model in both)
    assert torch.equal(tokens, others)
    ended = (tokens[:, -expected.shape[1]:] == 2).cumsum(1).roll(1, 1)  # whose logits after the end are nobody's business
    ended[:, 0] = 0
    assert (expected - found)[ended == 0].abs().max() < 2e-4


@pytest.mark.parametrize("options", [{}, {"num_beams": 3, "length_penalty": 2.0}, {"temperature": 1.3, "top_k": 40}, {"repetition_penalty": 1.5},
                                     {"max_new_tokens": 1}], ids=["greedy", "beams", "drawn", "no word twice", "one token"])
def test_answers_are_the_same(both, pictures, options):
    settings = LlavaSettings(**{"max_new_tokens": 20} | options)
    expected, found = (model.answer(pictures, ASKED, settings, seed=5) for model in both)
    assert found == expected
    assert any(expected)


def test_a_text_that_ended_takes_no_more_time(both, pictures, monkeypatch):
    """A row that is given padding is left out from then on; the others go on as before."""
    rows, infer = [], llava_runtime.infer
    monkeypatch.setattr(llava_runtime, "infer", lambda request, inputs: rows.append(len(inputs[0])) or infer(request, inputs))
    inputs = both[0].inputs(pictures, ASKED)
    caches = [DynamicCache(config=both[0].model.config.text_config), both[1].model.model.language_model.new_cache()]
    mask = inputs["attention_mask"]
    following = torch.randint(4, 300, (3, 8), generator=torch.Generator().manual_seed(0))
    following[1, 2:], following[0, 5:] = 0, 0
    step = dict(inputs)
    for number in range(9):
        with torch.inference_mode():
            positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -step["input_ids"].shape[1]:]
            expected, found = (model.model(**step | {"attention_mask": mask}, position_ids=positions, past_key_values=cache, logits_to_keep=1).logits
                               for model, cache in zip(both, caches))
        going = torch.ones(3, dtype=torch.bool) if number == 0 else following[:, number - 1] > 0
        assert (expected - found)[going].abs().max() < 2e-4, number
        if number < 8:
            step, mask = {"input_ids": following[:, number:number + 1]}, torch.cat([mask, torch.ones(3, 1, dtype=mask.dtype)], 1)
    assert rows[::2] == [3, 3, 3, 2, 2, 2, 1, 1, 1] and rows[1::2] == rows[::2]  # of the layers, and of the head


def test_two_talks_at_once_do_not_mix(both, pictures):
    one, other = both
    talks = [[(ASKED[0], None)], [(ASKED[1], "A dog."), (ASKED[2], None)]]
    settings, found = LlavaSettings(max_new_tokens=15), {}

    def talk(number):
        found[number] = [*other.talk(pictures[number], talks[number], settings, threading.Event())][-1:]

    threads = [threading.Thread(target=talk, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[number] for number in range(2)] == [[*one.talk(pictures[number], talks[number], settings, threading.Event())][-1:]
                                                      for number in range(2)]


def test_what_openvino_cannot_take_stays_with_pytorch(tmp_path, pictures, monkeypatch, capsys):
    make_llava(tmp_path, "default", TEXTS["llama"])
    expected = Llava(tmp_path, runtime="torch").answer(pictures, ASKED, LlavaSettings(max_new_tokens=5))

    def refuse(*arguments):
        raise RuntimeError("no such operation\nand more")

    monkeypatch.setattr(llava_runtime.Network, "trace", refuse)
    model = Llava(tmp_path, runtime="openvino")
    assert not model.compiled
    assert "the language model stays with PyTorch, which takes twice the time: no such operation" in capsys.readouterr().err
    assert model.answer(pictures, ASKED, LlavaSettings(max_new_tokens=5)) == expected


def test_large_models_few_questions_and_attention_maps_stay_with_pytorch(tmp_path, monkeypatch):
    make_llava(tmp_path, "default", TEXTS["alone"])
    assert not Llava(tmp_path, runtime="openvino", many=False).compiled
    assert not Llava(tmp_path, runtime="openvino", attention="eager").compiled
    monkeypatch.setattr(llava_runtime, "MOST_PARAMETERS", 1000)
    assert not Llava(tmp_path, runtime="openvino").compiled


def test_layers_of_another_kind_are_refused(tmp_path):
    make_llava(tmp_path, "default", TEXTS["alone"])
    language = Llava(tmp_path, runtime="torch").model.model.language_model
    language.config.layer_types = ["linear_attention", "full_attention"]
    with pytest.raises(UserError, match="it has layers of linear_attention"):
        llava_runtime.CompiledLanguageModel(language, 0)
