"""Attention maps: the weights, their alignment with words, the maps on the picture, the figures, and their faithfulness."""

import base64
import json
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import faithfulness
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, make_llava
from PIL import Image, ImageDraw
from torch import nn

import cli
import p3_attention
from attention import END, Attention, align_words, kept_region, llava_attention, p2_attention, peak, rollout, teacher_forced, upsample, word_maps
from attention_figures import plot_layers, plot_words
from attention_page import page, page_entry
from captioner import Captioner, CaptionerConfig
from cli import UserError
from clip_model import default_clip
from dataset import collate
from decoder import Cache, Decoder, DecoderConfig
from encoder import ImageEncoder
from generation import GenerationConfig
from llava import SMALL, Llava, LlavaSettings
from tokenizer import END_OF_TEXT, BPETokenizer

CORNERS = "NW", "NE", "SW", "SE"


# ---- small models ----------------------------------------------------------------------------------------------


class Squares(nn.Module):
    """An encoder whose 16 patch tokens say how bright a patch is, and where it lies.

    Dark is as far from zero as bright: a normalisation then leaves the place as it is, and only who attends learns it.
    """

    name, weights_hash, image_size, levels, grid, dim, num_tokens, num_prefix_tokens = "squares", "", 32, 1, (4, 4), 17, 16, 0
    preprocess = ImageEncoder.preprocess

    def forward(self, images):
        light = F.avg_pool2d(images.float().mean(1) / 255, 8).flatten(1)
        return torch.cat([4 * light[..., None] - 2, torch.eye(16).expand(len(images), -1, -1)], -1)


def tiny_captioner(fusion="cross", layers=0, width=64, token_ids=None):
    config = CaptionerConfig(fusion=fusion, projection_layers=layers, projection_dim=width, projection_dropout=0,
                             patch_dropout=0, dropout=0, lora_rank=0)
    torch.manual_seed(0)
    decoder = Decoder(DecoderConfig(n_positions=16, n_embd=width, n_layer=2, **config.decoder_options()))
    nn.init.normal_(decoder.wte.weight, std=0.1)
    decoder.wte.requires_grad_(False)
    return Captioner(config, Squares(), decoder, token_ids).eval()


def random_captioner(**options):
    """One whose every matrix is so random that attention is far from even."""
    model = tiny_captioner(width=128, token_ids=torch.tensor([*range(300, 700), END_OF_TEXT]), **options)
    for name, parameter in [*model.decoder.named_parameters(), *model.projection.named_parameters()]:
        if parameter.ndim > 1 and "wte" not in name:
            nn.init.normal_(parameter, std=2 * parameter.shape[-1] ** -0.5)
    return model


def noise(seed, size=(50, 40)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*size[::-1], 3), dtype=np.uint8))


def corner_box(corner, width, height):
    """The quarter of both sides at a corner: left, top, right, bottom"""
    across, down = max(1, width // 4), max(1, height // 4)
    x, y = (0 if "W" in corner else width - across), (0 if "N" in corner else height - down)
    return x, y, x + across, y + down


def corner_picture(corner, width, height):
    picture = Image.new("RGB", (width, height), (20, 20, 20))
    x0, y0, x1, y1 = corner_box(corner, width, height)
    ImageDraw.Draw(picture).rectangle((x0, y0, x1 - 1, y1 - 1), fill="white")
    return picture


@pytest.fixture(scope="session")
def corner_model():
    """A captioner that was trained for some seconds to name the corner that holds a bright square."""
    tokenizer = BPETokenizer()
    captions = [tokenizer.encode(corner) for corner in CORNERS]
    model = tiny_captioner(token_ids=torch.tensor(sorted({END_OF_TEXT, *sum(captions, [])})))
    model.train()
    quarter = torch.tensor([0, 0, 1, 1, 0, 0, 1, 1, 2, 2, 3, 3, 2, 2, 3, 3])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    for step in range(200):
        patch = torch.randint(16, (32,))
        light = 40 * torch.rand(32, 16)
        light[range(32), patch] = 255
        images = light.view(-1, 1, 4, 4).expand(-1, 3, -1, -1).repeat_interleave(8, 2).repeat_interleave(8, 3)
        loss = model.loss(model.encoder(images), *collate([captions[i] for i in quarter[patch]]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def made_up(words, maps, region=(0.0, 0.0, 1.0, 1.0)):
    """An Attention with these maps (W, layers, heads, rows, columns)."""
    return Attention(" ".join(words), words, [1] * len(words), [[i] for i in range(len(words))],
                     np.asarray(maps, np.float32), np.zeros(len(words)), region)


# ---- the weights -----------------------------------------------------------------------------------------------


def softmax(scores):
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def record(modules):
    """What each of these modules puts out from now on: {module: [arrays]}"""
    outputs = {module: [] for module in modules}
    for module in modules:
        module.register_forward_hook(lambda module, _, output: outputs[module].append(output[0].detach().numpy()))
    return outputs


def by_hand(q, k, mask=0.0):
    """(T, C), (S, C) -> (H, T, S)"""
    return np.stack([softmax(q[:, at:at + 64] @ k[:, at:at + 64].T / 8 + mask) for at in range(0, q.shape[1], 64)])


@pytest.mark.parametrize("fusion", ["cross", "prefix"])
def test_weights_are_those_of_a_hand_written_softmax(fusion):
    model = random_captioner(fusion=fusion)
    attention, = p2_attention(model, [noise(0)], GenerationConfig(2, max_length=8))
    layers = [block.cross if fusion == "cross" else block.attn for block in model.decoder.h]
    names = ("c_q", "c_kv") if fusion == "cross" else ("c_attn",)
    outputs = record([getattr(layer, name) for layer in layers for name in names])
    features = model.encoder(model.encoder.preprocess(noise(0))[None])
    with torch.inference_mode():
        log_probs = teacher_forced(model, features, [attention.tokens])[0]
    length = len(attention.tokens) + 1
    expected = []
    for layer in layers:
        if fusion == "cross":
            expected.append(by_hand(outputs[layer.c_q][0], outputs[layer.c_kv][0][:, :128]))
        else:
            image, text = outputs[layer.c_attn]  # the image's own pass, then the text's
            keys = np.concatenate([image[:, 128:256], text[:, 128:256]])
            unseen = np.triu(np.ones((length, 16 + length)), 17)
            expected.append(by_hand(text[:, :128], keys, np.where(unseen, -np.inf, 0))[..., :16])
    expected = np.stack(expected)  # (layers, H, T, N)
    for word, places in enumerate(attention.places):
        np.testing.assert_allclose(attention.maps[word].reshape(2, 2, 16), expected[:, :, places].mean(2), atol=1e-5)
        assert attention.log_probs[word] == pytest.approx(log_probs[places].sum().item(), abs=1e-4)
    sums = attention.maps.sum((-1, -2))
    if fusion == "cross":
        np.testing.assert_allclose(sums, 1, atol=1e-5)
    else:
        assert (sums > 0).all() and (sums < 1).all()
    assert attention.maps.std() > 0.01


def test_rollout_carries_maps_back_through_the_projection():
    model = random_captioner(layers=2)
    generation = GenerationConfig(1, max_length=6)
    raw, = p2_attention(model, [noise(1)], generation)
    outputs = record([layer.attn.c_attn for layer in model.projection.layers])
    carried, = p2_attention(model, [noise(1)], generation, through_projection=True)
    assert carried.tokens == raw.tokens
    mixed = np.eye(16)
    for layer in model.projection.layers:
        qkv = outputs[layer.attn.c_attn][-1]
        mixed = (by_hand(qkv[:, :128], qkv[:, 128:256]).mean(0) + np.eye(16)) / 2 @ mixed
    expected = raw.maps.reshape(-1, 2, 2, 16) @ mixed
    np.testing.assert_allclose(carried.maps.reshape(-1, 2, 2, 16), expected, atol=1e-5)
    np.testing.assert_allclose(carried.maps.sum((-1, -2)), 1, atol=1e-5)
    assert abs(carried.maps - raw.maps).max() > 0.01
    even = torch.full((1, 2, 4, 4), 0.25)
    np.testing.assert_allclose(rollout([even])[0], np.full((4, 4), 0.125) + np.eye(4) / 2)
    with pytest.raises(UserError, match="no transformer layers"):
        p2_attention(random_captioner(), [noise(1)], generation, through_projection=True)


def test_beam_1_is_greedy_and_each_row_is_the_one_that_predicts():
    model = random_captioner()
    attention, = p2_attention(model, [noise(2)], GenerationConfig(1, max_length=8))
    tokens, weights, log_probs = [END_OF_TEXT], [], []
    with torch.inference_mode():
        context = model.decoder.context(model.projection(model.encoder(model.encoder.preprocess(noise(2))[None])))
        for _ in range(8):
            attentions = []
            hidden = model.decoder.hidden(torch.tensor([tokens]), context, attentions=attentions)[0, -1]
            values, best = (model.decoder.head_weight(model.token_ids) @ hidden).log_softmax(0).max(0)
            tokens.append(model.token_ids[best].item())
            weights.append(torch.stack(attentions)[:, 0, :, -1].numpy())
            log_probs.append(values.item())
            if tokens[-1] == END_OF_TEXT:
                break
    said = [token for token in tokens[1:] if token != END_OF_TEXT]
    assert attention.tokens == said and (attention.words[-1] == END) == (len(said) < 8)
    for word, places in enumerate(attention.places):
        expected = np.mean([weights[place] for place in places], 0)
        np.testing.assert_allclose(attention.maps[word].reshape(2, 2, 16), expected, atol=1e-5)
        assert attention.log_probs[word] == pytest.approx(sum(log_probs[place] for place in places), abs=1e-4)


def test_the_winning_beams_weights_are_those_of_its_generation():
    model = random_captioner()
    pictures = [noise(seed) for seed in (3, 4, 5)]
    together = p2_attention(model, pictures, GenerationConfig(3, max_length=7))
    for picture, found in zip(pictures, together):
        with torch.inference_mode():
            features = model.encoder(model.encoder.preprocess(picture)[None])
            assert found.caption == model.generate(features, GenerationConfig(3, max_length=7))[0]
            context, cache, weights = model.decoder.context(model.projection(features)), Cache(8), []
            for token in [END_OF_TEXT, *found.tokens]:  # one at a time, with a cache, as the search does
                attentions = []
                model.decoder.hidden(torch.tensor([[token]]), context, cache, attentions)
                weights.append(torch.stack(attentions)[:, 0, :, 0].numpy())
        for word, places in enumerate(found.places):
            expected = np.mean([weights[place] for place in places], 0)
            np.testing.assert_allclose(found.maps[word].reshape(2, 2, 16), expected, atol=1e-5)


@pytest.mark.parametrize("text, words", [
    (" a skateboarder's half-pipe, wow!", ["a", "skateboarder's", "half-pipe", ",", "wow", "!"]),
    ("A naïve façade ...", ["A", "naïve", "façade", "..."]),
    ("Two 🙂 dogs", ["Two", "🙂", "dogs"]),
    ("", []),
])
def test_tokens_are_merged_to_words(text, words):
    tokenizer = BPETokenizer()
    tokens = tokenizer.encode(text)
    found = align_words(tokens, tokenizer.decode, ended=True)
    assert [word for word, _ in found] == [*words, END]
    assert sum((places for _, places in found), []) == list(range(len(tokens) + 1))
    for word, places in found[:-1]:
        assert tokenizer.decode([tokens[place] for place in places]).strip() == word
    assert [word for word, _ in align_words(tokens, tokenizer.decode, ended=False)] == words


def test_class_tokens_are_left_out():
    weights = torch.arange(3 * 7.0).view(3, 1, 1, 7)  # a class token, then 2 x 3 patches
    words, log_probs = [("a", [0, 1]), (END, [2])], torch.tensor([-1.0, -2, -4])
    attention = Attention.of_tokens("a b", [1, 2], words, weights, log_probs, (2, 3))
    np.testing.assert_array_equal(attention.maps[1, 0, 0], [[15, 16, 17], [18, 19, 20]])
    np.testing.assert_array_equal(attention.maps[0, 0, 0], [[4.5, 5.5, 6.5], [7.5, 8.5, 9.5]])
    assert attention.log_probs.tolist() == [-3, -4]


# ---- maps on the picture ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("corner", CORNERS)
@pytest.mark.parametrize("size", [(320, 90), (9, 4), (3000, 4000)])
def test_a_model_that_names_the_bright_corner_looks_there(corner_model, corner, size):
    """Whatever the picture's shape and size: the peak of the map, over its pixels, lies in the bright square."""
    picture = corner_picture(corner, *size)
    attention, = p2_attention(corner_model, [picture])
    assert attention.words == [corner, END]
    left, top, right, bottom = corner_box(corner, *size)
    values = word_maps(attention)[0]
    x, y = peak(upsample(values, size))
    assert left <= x < right and top <= y < bottom and values.max() > 0.4


def test_a_map_keeps_its_place_when_upsampled():
    values = np.zeros((3, 5))
    values[2, 1] = 1
    pixels = upsample(values, (500, 90))
    assert pixels.shape == (90, 500) and 0.9 < pixels.max() < 1.2
    assert abs(np.array(peak(pixels)) - (150, 75)).max() <= 15
    part = upsample(values, (500, 90), (0.2, 0.0, 0.8, 1.0))
    assert np.isnan(part[:, :100]).all() and np.isnan(part[:, 400:]).all() and not np.isnan(part[:, 100:400]).any()
    assert abs(np.array(peak(part)) - (100 + 90, 75)).max() <= 15


def test_layers_heads_and_corrections_are_chosen():
    maps = np.random.default_rng(0).random((4, 3, 2, 5, 5))
    attention = made_up(["a", "b", "c", END], maps)
    np.testing.assert_allclose(word_maps(attention), maps.mean((1, 2)), rtol=1e-5)
    np.testing.assert_allclose(word_maps(attention, 3, 1), maps[:, 2, 0], rtol=1e-5)
    chosen = maps[:, 1].mean(1)
    np.testing.assert_allclose(word_maps(attention, 2, correction="subtract"), chosen - chosen.mean(0), atol=1e-6)
    np.testing.assert_allclose(word_maps(attention, 2, correction="divide"), chosen / chosen.mean(0), rtol=1e-5)
    for wrong in {"layer": 4}, {"layer": 0}, {"head": 3}:
        with pytest.raises(UserError, match="counted from 1"):
            word_maps(attention, **wrong)


# ---- figures, files and the page -------------------------------------------------------------------------------


def titles(figure):
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def test_the_figure_has_a_panel_for_each_word_at_the_pictures_aspect():
    words = ["A", "$5$", "of", "incomprehensibilities", END]
    attention = made_up(words, np.random.default_rng(0).random((5, 2, 1, 3, 3)))
    picture = noise(0, (300, 100))
    figure = plot_words(picture, attention, layer=2, columns=3)
    assert titles(figure) == ["<start>", *words]
    for axes in figure.axes:
        assert axes.images[0].get_array().shape == (100, 300, 3)
    boxes = [text.get_window_extent() for axes in figure.axes for text in axes.texts]
    assert not any(one.overlaps(other) for i, one in enumerate(boxes) for other in boxes[:i])
    shared = plot_words(picture, attention, scale="shared", correction="divide")
    assert len(shared.axes) == 7 and shared.axes[-1].get_ylabel() == "attention / its mean over words"
    layers = plot_layers(picture, attention)
    assert [text for text in titles(layers) if text] == ["<start>", "incomprehensibilities"]
    assert [text.get_text() for text in layers.texts] == ["layer 1", "layer 2", "mean"]


def test_brighter_where_the_word_looked():
    maps = np.zeros((1, 1, 1, 4, 4))
    maps[..., 0, 3] = 1
    panel = plot_words(Image.new("RGB", (400, 100), "grey"), made_up(["dog"], maps)).axes[1].images[0].get_array()
    brightness = np.asarray(panel).sum(-1)
    assert brightness[:25, 300:].mean() > 2 * brightness[50:, :200].mean()


def test_the_page_holds_every_map_and_no_word_can_end_its_script():
    random = np.random.default_rng(0)
    attention = made_up(["</script>", "dog"], random.random((2, 3, 2, 4, 5)), region=(0.25, 0, 0.75, 1))
    text = page([page_entry("<b>.jpg", noise(0), attention)], layer=2).decode()
    assert text.count("</script>") == 1 and "<b>.jpg" not in text
    entry, = json.loads(re.search(r"const entries = (.*), colours = ", text)[1])
    assert entry["words"] == attention.words and (entry["layers"], entry["rows"], entry["columns"]) == (3, 4, 5)
    assert entry["region"] == "left:25.0%;top:0%;width:50.0%;height:100%"
    maps = np.frombuffer(base64.b64decode(entry["maps"]), "<u2").reshape(4, 2, 4, 5) / 65535
    heads = attention.maps.mean(2)
    for layer in range(3):
        expected = heads[:, layer] / heads[:, layer].max()
        np.testing.assert_allclose(maps[layer + 1], expected, atol=1e-4)


def command(monkeypatch, module, *arguments):
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
    with pytest.raises(SystemExit) as exit:
        cli.run(module.main)
    return exit.value.code


def test_the_command_writes_figures_maps_and_a_page(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "my pictures"
    folder.mkdir()
    Image.open(ROOT / "samples" / "astronaut.jpg").resize((160, 90)).save(folder / "a b.png")
    (folder / "broken.jpg").write_bytes(b"no picture")
    out = tmp_path / "new" / "out"
    assert command(monkeypatch, p3_attention, folder, out, "--beam_size", 1, "--layer", 6, "--correction", "divide") == 3
    printed = capsys.readouterr()
    assert "broken.jpg: not an image" in printed.err
    assert sorted(path.name for path in out.iterdir()) == [
        "a b.layers.pdf", "a b.layers.png", "a b.npz", "a b.words.pdf", "a b.words.png", "index.html"]
    with np.load(out / "a b.npz") as maps:
        assert maps["maps"].shape == (len(maps["words"]), 6, 4, 9, 9)
        on_patches = maps["maps"].sum((-1, -2))
        assert (on_patches > 0.05).all() and (on_patches <= 1 + 1e-4).all()  # the rest is on concept words and the picture's meaning
        assert maps["words"][-1] == END and printed.out == f"a b.png  {maps['caption']}\n"
    with Image.open(out / "a b.words.png") as figure:
        assert figure.info["dpi"][0] == pytest.approx(300, abs=1)
    assert (out / "a b.words.pdf").read_bytes().startswith(b"%PDF")


@pytest.mark.parametrize("arguments, says", [
    (["samples", "{tmp}/file/out"], "cannot make the folder"),
    (["{tmp}/nothing", "{tmp}/out"], "does not exist"),
    (["samples", "{tmp}/out", "--rollout"], "no transformer layers"),
    (["samples", "{tmp}/out", "--model", "{tmp}"], "no LLaVA that can be loaded"),
    (["samples", "{tmp}/out", "--model", "{tmp}", "--rollout"], "for p2's model"),
    (["samples", "{tmp}/out", "--checkpoint", "x"], "needs the --decoder_weights"),
])
def test_mistakes_are_one_line(tmp_path, monkeypatch, capsys, arguments, says):
    monkeypatch.chdir(ROOT)
    (tmp_path / "file").write_text("")
    assert command(monkeypatch, p3_attention, *(text.format(tmp=tmp_path) for text in arguments)) == 2
    error = capsys.readouterr().err.strip()
    assert says in error and "\n" not in error


# ---- LLaVA -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session", params=["default", "full"])
def llava(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("llava")
    make_llava(folder, request.param)
    return Llava(folder, attention="eager")


def test_llavas_weights_are_those_of_its_generation(llava):
    picture = noise(0, (60, 40))
    settings = LlavaSettings(max_new_tokens=12)
    attention = llava_attention(llava, picture, settings)
    inputs = llava.inputs([picture], [settings.instruction])
    on_image = inputs["input_ids"][0] == 3
    patches = 16 + (llava.model.config.vision_feature_select_strategy == "full")
    assert on_image.sum() == patches
    with torch.inference_mode():
        made = llava.model.generate(**inputs, max_new_tokens=12, do_sample=False, suppress_tokens=[3],
                                    output_attentions=True, output_logits=True, return_dict_in_generate=True)
    said = made.sequences[0, inputs["input_ids"].shape[1]:].tolist()
    assert attention.tokens == [token for token in said if token != 2]
    assert attention.maps.shape == (len(attention.words), 3, 2, 4, 4)
    for word, places in enumerate(attention.places):
        # step by step, each step's last row is the one that predicts its token
        steps = [torch.stack([layer[0, :, -1, :len(on_image)][:, on_image] for layer in made.attentions[place]])
                 for place in places]
        expected = torch.stack(steps).mean(0)[..., -16:].numpy()
        np.testing.assert_allclose(attention.maps[word].reshape(3, 2, 16), expected, atol=1e-5)
        log_probs = sum(made.logits[place][0].log_softmax(-1)[said[place]].item() for place in places)
        assert attention.log_probs[word] == pytest.approx(log_probs, abs=1e-3)
    assert attention.caption == llava.answer([picture], [settings.instruction], settings)[0]
    beams = LlavaSettings(max_new_tokens=5, num_beams=2)
    assert llava_attention(llava, picture, beams).caption == llava.answer([picture], [beams.instruction], beams)[0]


def test_llavas_maps_cover_what_its_processor_keeps(llava):
    wide = Image.fromarray(np.tile(np.arange(240, dtype=np.uint8), (80, 1)))
    region = kept_region(llava.processor.image_processor, *wide.size)
    assert region == pytest.approx((1 / 3, 0, 2 / 3, 1))
    pixels = llava.processor.image_processor(wide.convert("RGB"), return_tensors="np")["pixel_values"][0, 0]
    mean, std = llava.processor.image_processor.image_mean[0], llava.processor.image_processor.image_std[0]
    ends = (pixels[:, [0, -1]] * std + mean).mean(0) * 255
    assert ends == pytest.approx([80, 160], abs=4)  # the grey value says how far right
    assert kept_region(llava.processor.image_processor, 80, 240) == pytest.approx((0, 1 / 3, 1, 2 / 3))


@dataclass
class Short(LlavaSettings):
    max_new_tokens: int = 4


@pytest.mark.filterwarnings("ignore:Glyph")  # it babbles control characters
def test_llavas_figures_come_from_the_shell(llava, tmp_path, monkeypatch, capsys):
    picture = noise(3, (90, 60))
    picture.save(tmp_path / "a.png")
    monkeypatch.setattr(p3_attention, "Llava", lambda name, attention: llava)
    monkeypatch.setattr(p3_attention, "LlavaSettings", Short)
    asked = []
    monkeypatch.setattr(p3_attention, "llava_attention", lambda *arguments: asked.append(arguments[2]) or llava_attention(*arguments))
    for more in [], ["--beam_size", 3]:
        assert command(monkeypatch, p3_attention, tmp_path / "a.png", tmp_path / "out", "--model", "x", *more) == 0
        assert capsys.readouterr().out == f"a.png  {llava.answer([picture], [Short.instruction], asked[-1])[0]}\n"
    assert [settings.num_beams for settings in asked] == [1, 3]  # greedy, if nothing is said, as hw3_1.sh
    assert len(list((tmp_path / "out").iterdir())) == 6


# ---- did it matter? --------------------------------------------------------------------------------------------


def test_masking_what_a_word_attends_to_hurts_it_most(corner_model):
    """On a model that is known to look at the bright corner."""
    found = []
    for number, corner in enumerate(CORNERS):
        picture = corner_picture(corner, 64, 64)
        attention, = p2_attention(corner_model, [picture])
        found.append(faithfulness.deletion(corner_model, picture, attention, np.random.default_rng(number)))
    results = faithfulness.summarize(found, ["most"], ["random", "least"])
    difference = results["mean"]["most - random"]
    assert difference["low"] > 0 and results["mean"]["most"]["value"] > 0.5
    assert results["mean"]["most - least"]["low"] > 0 and abs(results["mean"]["least"]["value"]) < 0.5


def test_a_mask_covers_its_area_to_the_pixel():
    values = np.random.default_rng(0).random((37, 41))
    mask = faithfulness.largest(values)
    assert mask.sum() == 152 and values[mask].min() > values[~mask].max()


def test_the_pointing_game(tmp_path):
    """Two nouns: the man's peak falls into his box in layer 1 alone, the dogs' in both."""
    maps = np.zeros((3, 2, 1, 10, 10))
    maps[0, 0, 0, 2, 2], maps[0, 1, 0, 2, 8], maps[1, :, 0, 7, 6], maps[2] = 1, 1, 1, 0.01
    attention = made_up(["man", "dogs", END], maps)
    box = {"image_id": 5, "bbox": [0, 0, 100, 50]}
    data = {"images": [{"id": 5, "file_name": "a.jpg", "width": 200, "height": 100}],
            "categories": [{"id": 1, "name": "person"}, {"id": 2, "name": "dog"}],
            "annotations": [box | {"category_id": 1}, box | {"category_id": 2, "bbox": [100, 50, 100, 50]}]}
    (tmp_path / "boxes.json").write_text(json.dumps(data))
    boxes = faithfulness.read_boxes(tmp_path / "boxes.json")
    found = faithfulness.pointing(attention, boxes["a.jpg"])
    assert (found["hits", 1], found["hits", 2]) == (1, 0.5)
    assert found["chance", None] == pytest.approx(0.25) and found["middle", None] == 0.5
    assert faithfulness.pointing(made_up(["sky"], maps[:1]), boxes["a.jpg"]) == {}
    data["annotations"][0].pop("bbox")
    (tmp_path / "boxes.json").write_text(json.dumps(data))
    with pytest.raises(UserError, match="instances form"):
        faithfulness.read_boxes(tmp_path / "boxes.json")
    assert faithfulness.class_of("Children", {"person"}) == "person" and faithfulness.class_of("bus", {"bus"}) == "bus"
    assert faithfulness.class_of("benches", {"bench"}) == "bench" and faithfulness.class_of("tree", {"person"}) is None


def test_the_deletion_test_runs_on_flickr8k(flickr8k, tmp_path, monkeypatch, capsys):
    results = tmp_path / "results.json"
    monkeypatch.setattr(faithfulness, "every_layer", lambda attention: [6])
    assert command(monkeypatch, faithfulness, "--data", flickr8k, "--images", 1, "--results", results) == 0
    found = json.loads(results.read_text())
    assert found["conditions"]["images"] == 1 and set(found["deletion"]) == {"all", "6"}
    assert "| 6 |" in capsys.readouterr().out


# ---- the notebook ----------------------------------------------------------------------------------------------


def outputs(notebook):
    return [output for cell in notebook["cells"] for output in cell.get("outputs", [])]


def run_notebook(notebook):
    from nbclient import NotebookClient

    start = time.monotonic()
    NotebookClient(notebook, timeout=200, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}).execute()
    return time.monotonic() - start


@pytest.fixture
def notebook():
    import nbformat

    return nbformat.read(ROOT / "p3_visualize.ipynb", as_version=4)


def test_the_notebook_runs_from_a_clean_kernel_on_samples(notebook):
    assert run_notebook(notebook) < 300
    kinds = [kind for output in outputs(notebook) for kind in output.get("data", {})]
    assert kinds.count("image/jpeg") >= 14
    text = "".join(output["text"] for output in outputs(notebook) if output["output_type"] == "stream")
    assert ("on the image: " if SMALL.is_dir() else "p1 is left out: there is no LLaVA in ") in text


def test_the_notebook_is_committed_with_its_outputs(notebook):
    ran = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in ran] == list(range(1, len(ran) + 1))
    assert {output["output_type"] for output in outputs(notebook)} <= {"stream", "display_data", "execute_result"}
    whole = (ROOT / "p3_visualize.ipynb").read_text()
    assert len(whole) < 3e6 and '"stderr"' not in whole and str(Path.home()) not in whole
    settings = next(cell["source"] for cell in ran if "IMAGES =" in cell["source"])
    assert 'IMAGES = "samples"' in settings and "DATA = None" in settings


def test_the_notebook_takes_other_folders(notebook, flickr8k, tmp_path):
    """A LLaVA, a picture in a folder of one's own, and captions that people wrote; figures are coarse, since the other test draws them."""
    make_llava(tmp_path / "llava", "default")
    noise(0, (90, 60)).save(tmp_path / "one.png")
    settings = next(cell for cell in notebook["cells"] if "IMAGES =" in cell["source"])
    settings["source"] = f"IMAGES, DATA, COUNT, LLAVA = {str(tmp_path)!r}, {str(flickr8k)!r}, 2, {str(tmp_path / 'llava')!r}"
    for cell in notebook["cells"]:
        cell["source"] = cell["source"].replace("dpi=90", "dpi=20")
    run_notebook(notebook)
    text = json.dumps(outputs(notebook))
    by = {None: "CIDEr", "clip_small": "ImageTextScore"}.get(default_clip(), "CLIPScore")
    assert f"**, {by} " in text and "on the image: " in text and "left out" not in text
