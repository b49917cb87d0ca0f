"""Images and texts in one space: our own small CLIP and its training, the dual encoders of transformers, retrieval, and load_clip,
which loads any of them by name."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import CNN, COLOURS, WORDS, write_bert
from PIL import Image
from safetensors.torch import load_file, save_file

import clip_model
import clip_small
import encoder as encoder_module
import training
from cli import Stopped, UserError
from clip_data import Sentences, VirtualPictures
from clip_model import Clip, SmallClip, TransformersClip, default_clip, load_clip, paired_similarity, similarity
from clip_small import ClipConfig, ClipSmall, Folds, Summary, TextEncoder, keep_loss, multi_positive_loss
from encoder import ImageEncoder
from p4_clip import ClipTrainer, CrossFit, Settings
from retrieval import Ranks

CONFIG = ClipConfig(encoder=CNN, image_size=64, width=32, attention_heads=2, cell_dim=8, text_layers=1, text_heads=2)


def settings(**changes):
    return Settings(**{"epochs": 3, "batch_size": 8, "selection": (4,), "views": 2, "learning_rate": 3e-3,
                       "captions": 2} | changes)


def pictures(folder, count=8):
    folder = Path(folder)
    folder.mkdir(exist_ok=True)
    generator = np.random.default_rng(0)
    paths = [folder / f"{i}.png" for i in range(count)]
    for path in paths:
        Image.fromarray(generator.integers(0, 256, (5, 6, 3), dtype=np.uint8)).resize((60, 50)).save(path)
    return paths


# ---- what the encoder's classifier says -------------------------------------------------------------------------


@pytest.mark.parametrize("name, size", [(CNN, 64), ("test_resnet", 64), ("test_vit", 160)])
def test_class_probabilities_are_those_of_the_whole_model(name, size, tmp_path):
    import timm

    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=1000, **({"img_size": size} if "vit" in name else {})).eval()
    file = tmp_path / f"{name}.safetensors"
    save_file(model.state_dict(), file)
    encoder = ImageEncoder(name, size, file, levels=0)
    images = torch.randint(0, 256, (3, 3, size, size), dtype=torch.uint8)
    with torch.inference_mode():
        expected = model((images - encoder.mean) / encoder.std).softmax(-1)
        torch.testing.assert_close(encoder.class_probabilities(encoder(images)), expected, atol=1e-5, rtol=1e-3)
    assert len(encoder.class_names) == 1000 and encoder.class_names[0] == "tench, Tinca tinca"


def test_joined_encoders_average_what_their_classifiers_say(place):
    encoder = encoder_module.load_encoder(f"{CNN}+{CNN}", 64)
    features = encoder(torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8))
    one = encoder.parts[0].class_probabilities(features[..., :encoder.parts[0].dim])
    torch.testing.assert_close(encoder.class_probabilities(features), one)
    assert encoder.class_names == encoder.parts[0].class_names


def test_an_encoder_without_a_classifier_has_no_class_names(tmp_path):
    assert ImageEncoder("test_vit", 32, "random").class_names == []


# ---- retrieval -------------------------------------------------------------------------------------------------


def test_ranks_by_hand():
    similarity = torch.tensor([[0.9, 0.1, 0.3], [0.2, 0.8, 0.5], [0.7, 0.6, 0.5], [0.1, 0.4, 0.4]])  # 4 texts, 3 images
    ranks = Ranks.of(similarity, torch.tensor([0, 1, 2, 2]))
    assert ranks.texts.tolist() == [0, 0, 2, 1]  # the last is a tie, and lost
    assert ranks.images.tolist() == [0, 0, 1]  # the third image's best text has 0.5, as another's has: lost
    assert ranks.recalls((1, 2))["text to image"] == {1: 0.5, 2: 0.75}
    assert ranks.medians() == {"text to image": 1.5, "image to text": 1.0}


# ---- losses ----------------------------------------------------------------------------------------------------


def test_multi_positive_loss_is_clips_where_each_picture_has_one_text():
    torch.manual_seed(0)
    images, texts = (F.normalize(torch.randn(5, 8), dim=-1) for _ in range(2))
    expected = clip_small.contrastive_loss(images, texts, torch.tensor(7.0))
    torch.testing.assert_close(multi_positive_loss(images, texts, torch.arange(5), torch.tensor(7.0)), expected)


def test_multi_positive_loss_by_hand():
    """A picture's other texts are not among those that each of its texts is to beat."""
    images, texts = torch.eye(2), torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
    found = multi_positive_loss(images, texts, torch.tensor([0, 0, 1]), 2.0)
    logits = 2 * texts @ images.t()
    to_image = -torch.stack([logits[i].log_softmax(0)[owner] for i, owner in enumerate([0, 0, 1])]).mean()
    to_text = torch.stack([torch.log(1 + torch.exp(logits[2, 0] - logits[0, 0])), torch.log(1 + torch.exp(logits[2, 0] - logits[1, 0])),
                           torch.log(1 + torch.exp(logits[0, 1] - logits[2, 1]) + torch.exp(logits[1, 1] - logits[2, 1]))]).mean()
    torch.testing.assert_close(found, (to_image + to_text) / 2)


def test_keep_loss_is_zero_where_likenesses_are_the_same():
    torch.manual_seed(0)
    vectors = F.normalize(torch.randn(6, 12), dim=-1)
    turned = vectors @ torch.linalg.qr(torch.randn(12, 12))[0]
    assert keep_loss(turned, vectors, 5.0).abs() < 1e-5
    assert keep_loss(F.normalize(torch.randn(6, 12), dim=-1), vectors, 5.0) > 0.01


# ---- sentences and pictures ------------------------------------------------------------------------------------


def test_sentences_pass_the_encoder_in_two_parts_as_in_one(place):
    text = TextEncoder(place / "bert")
    texts = ["a red picture", "the colour blue is there .", "dog"]
    for layers in 0, 1, 2:
        found = Sentences(texts, text, layers, "hash", place / "cache")
        torch.testing.assert_close(found.vectors, text(texts), atol=1e-5, rtol=1e-4)
        again = Sentences(texts, None if layers else text, layers, "hash", place / "cache") if not layers else found
        assert torch.equal(again.vectors, found.vectors)
        hidden, mask = found.batch(torch.tensor([2, 0]))
        alone, _ = text.lower(["dog"], layers)
        torch.testing.assert_close(hidden[:1, :alone.shape[1]], alone, atol=2e-3, rtol=2e-3)
        assert mask.sum(1).tolist() == [3, 5] and not hidden[0, 3:].any()


def test_summary_of_pictures_is_standardised(place):
    encoder = CONFIG.load_encoder()
    model = ClipSmall(CONFIG, encoder, TextEncoder(place / "bert"))
    # Eight directions in which patches differ, and a little noise.
    features = torch.randn(6000, encoder.num_tokens, 8) @ torch.randn(8, encoder.dim) + 1
    features += 0.1 * torch.randn(features.shape)
    model.image_head.measure(features.split(500), encoder)
    summary = model.image_head.summarize(features, encoder)
    torch.testing.assert_close(summary.stats.mean(0), torch.zeros(2 * encoder.dim), atol=1e-4, rtol=0)
    torch.testing.assert_close(summary.stats.std(0, correction=0), torch.ones(2 * encoder.dim), atol=2e-2, rtol=0)
    cells = summary.cells.flatten(0, 1)
    torch.testing.assert_close(cells.t() @ cells / len(cells), torch.eye(8), atol=0.12, rtol=0)  # of a part of them
    assert summary.classes.shape == (6000, 1000)


def test_a_virtual_picture_is_of_its_class():
    """Where everything is linear and normal, a shift raises the logit of its class most."""
    torch.manual_seed(0)
    stats = torch.randn(3000, 20)
    weight = torch.randn(6, 20)
    classes = (stats @ weight.t()).softmax(-1)
    held = type("Held", (), {"__len__": lambda self: 3000, "batch": lambda self, numbers, views: Summary(
        stats[numbers], stats[numbers, None, :5], classes[numbers])})()
    virtual = VirtualPictures(held)
    base = Summary(torch.zeros(6, 20), torch.zeros(6, 1, 5), classes[:6])
    moved = virtual.shift(base, torch.arange(6), torch.Generator().manual_seed(0))
    assert (moved.stats @ weight.t()).argmax(-1).tolist() == list(range(6))
    torch.testing.assert_close(moved.classes.sum(-1), torch.ones(6))
    assert (moved.classes.argmax(-1) == torch.arange(6)).float().mean() > 0.5


# ---- training --------------------------------------------------------------------------------------------------


def test_a_small_clip_learns_which_caption_is_whose(place):
    noise = np.random.default_rng(0)
    for path in (place / "data" / "images" / "train").iterdir():  # a picture of one colour alone has no deviations
        colours = np.asarray(Image.open(path), np.int16) + noise.integers(-60, 60, (40, 50, 3))
        Image.fromarray(colours.clip(0, 255).astype(np.uint8)).save(path)
    history = ClipTrainer(replace(CONFIG, classes=False), settings(epochs=40, anchors=0, dropout=0.1, output="clip.safetensors")).fit()
    assert history[-1]["data, text to image@1"] == history[-1]["data, image to text@1"] == 1
    clip = SmallClip("clip.safetensors")
    _, images, _ = clip.encode_images([place / "data" / "images" / "train" / f"{i}.png" for i in range(4)])
    found = similarity(images, clip.encode_texts([f"A {name} picture." for name in COLOURS]))
    assert found.argmax(-1).tolist() == [0, 1, 2, 3]


def test_resumed_training_equals_training_without_interruption(place, monkeypatch):
    text = place / "text.txt"
    text.write_text("a dog\nthe cat is there\na fish\n" * 5)
    options = settings(text=(str(text),), anchors=0.2, keep=0.3)
    whole = ClipTrainer(CONFIG, replace(options, output="whole.safetensors"), "cpu").fit()
    original, left = training.step_optimizer, iter(range(4))

    def step(*arguments):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(training, "step_optimizer", step)
    parts = replace(options, output="parts.safetensors")
    monkeypatch.setattr(training, "SAVE_MINUTES", 0)
    with pytest.raises(KeyboardInterrupt):
        ClipTrainer(CONFIG, parts, "cpu").fit()
    monkeypatch.setattr(training, "step_optimizer", original)
    torch.manual_seed(99)
    resumed = ClipTrainer(CONFIG, parts, "cpu").fit()
    for entry in whole + resumed:
        assert entry.pop("seconds") > 0
    assert resumed == whole and len(whole) == 3
    one, two = load_file("whole.safetensors"), load_file("parts.safetensors")
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    with pytest.raises(UserError, match="is there already"):
        ClipTrainer(CONFIG, parts, "cpu")


def test_stops_in_time_and_goes_on(place):
    for batches in 1, 2:
        with pytest.raises(Stopped, match=f"in encoding after {min(24, 16 * batches)} of 24 images"):
            ClipTrainer(CONFIG, settings(max_hours=1e-9, output="clip.safetensors"))
    assert ClipTrainer(CONFIG, settings(max_hours=1e-9, output="clip.safetensors")).fit() is None
    assert not Path("clip.safetensors").exists()
    assert len(ClipTrainer(CONFIG, settings(output="clip.safetensors")).fit()) == 3


def test_several_folders_and_a_selection_of_each(place):
    import shutil

    shutil.copytree("data", "other")
    run = ClipTrainer(CONFIG, settings(data=("data", "other"), selection=(4, 0), output="clip.safetensors"))
    assert len(run.train) == 20 + 24 and [*map(len, run.selection)] == [4, 0] and run.train[20] == 24
    assert not set(run.train) & set(run.selection[0]) and len(run.pictures) == 48
    # The 25th picture is the other folder's first, with its captions.
    assert run.captions[24] == range(48, 50)
    for problem, changes in (("cannot be split", {"selection": (24,)}), ("one number", {"selection": (1, 2, 3)})):
        with pytest.raises(UserError, match=problem):
            ClipTrainer(CONFIG, settings(output="x.safetensors", **changes))


# ---- the file --------------------------------------------------------------------------------------------------


@pytest.fixture
def trained(place):
    ClipTrainer(CONFIG, settings(epochs=1, output="clip.safetensors"), "cpu").fit()
    return place / "clip.safetensors"


def test_a_loaded_clip_embeds_as_the_trained_one(place, trained):
    run = ClipTrainer(CONFIG, settings(epochs=1, output="again.safetensors"), "cpu")
    run.fit()
    with run.average.in_place():
        numbers = torch.arange(20, 24)
        expected = run.embed_images(run.pictures.batch(numbers, torch.zeros_like(numbers)), train=False)
        words = F.normalize(run.model.embed_texts(["a red picture"]), dim=-1)
    clip = load_clip(trained)
    paths = [place / "data" / "images" / "train" / f"{i}.png" for i in range(20, 24)]
    (place / "broken.png").write_bytes(b"no picture")
    read, images, unread = clip.encode_images([*paths, place / "broken.png"])
    assert read == paths and [*unread] == [place / "broken.png"]
    torch.testing.assert_close(images, expected, atol=2e-2, rtol=0)
    torch.testing.assert_close(clip.encode_texts(["a red picture"]), words, atol=1e-2, rtol=0)
    _, alone, _ = clip.encode_images(paths[:1])
    torch.testing.assert_close(alone, images[:1], atol=1e-5, rtol=0)
    both = clip.encode_texts(["a red picture", "the colour blue is there ."])
    torch.testing.assert_close(both[:1], clip.encode_texts(["a red picture"]), atol=1e-5, rtol=0)
    assert clip.too_long(["a " * 200, "a dog"]) == 1


def test_folds_embed_each_picture_by_a_head_that_has_not_seen_it(place, trained, capsys):
    """So what is written of a picture does not change with its captions, but what is written of others may."""
    def embeddings(name):
        # The finished model's own options count, not those of the command line.
        CrossFit(replace(CONFIG, image_size=32, width=8), settings(folds=3, of=str(trained), output=name), "cpu").fit()
        return load_file(name)["embeddings"]

    first, paths = embeddings("first.safetensors"), [place / "data" / "images" / "train" / f"{i}.png" for i in range(24)]
    assert first.shape == (24, 2, 32) and torch.allclose(first.float().norm(dim=-1), torch.ones(24, 2), atol=1e-2)
    assert capsys.readouterr().out.count("text to image@5") == 3
    captions = json.loads((place / "data" / "train.json").read_text())
    for annotation in captions["annotations"]:
        if annotation["image_id"] == captions["images"][7]["id"]:
            annotation["caption"] = "there is a dog"
    (place / "data" / "train.json").write_text(json.dumps(captions))
    second = embeddings("folds.safetensors")
    same = [torch.equal(*pair) for pair in zip(first, second)]
    assert same[7] and 8 <= sum(same) < 24  # its fold, but for pictures that other folds hold
    clip = ClipSmall.load(trained)
    read = Folds("folds.safetensors", clip.text_digest)
    assert torch.equal(read.of(paths[5:3:-1], 2), second[[5, 4]].float()) and read.of(paths[:3]).shape == (3, 1, 32)
    for changes, message in (({"folds": 1}, "at least 2"), ({"of": "nowhere"}, "nowhere is not here")):
        with pytest.raises(UserError, match=message):
            CrossFit(CONFIG, settings(**{"folds": 3, "output": "other.safetensors"} | changes), "cpu")


def test_other_weights_than_the_trainings_are_refused(place, trained):
    with pytest.raises(UserError, match="other weights of the image encoder"):
        ClipSmall.load(trained, ImageEncoder(CNN, 64, "random", 0))
    write_bert(place / "other", layers=3)
    with pytest.raises(UserError, match="other weights of the text encoder"):
        ClipSmall.load(trained, text=TextEncoder(place / "other"))
    state = load_file(trained)
    with pytest.raises(UserError, match="damaged"):
        save_file(state, "nameless.safetensors")
        ClipSmall.load("nameless.safetensors")
    with pytest.raises(UserError, match="git checkout"):
        ClipSmall.load("absent.safetensors")
    metadata = {"clip_small": json.dumps({"model": {}})}
    save_file(state, "other.safetensors", metadata)
    with pytest.raises(UserError):
        ClipSmall.load("other.safetensors")


def test_which_model_a_name_means(place, trained, clip_weights, monkeypatch):
    monkeypatch.setattr(clip_model, "CLIP_WEIGHTS", place / "ViT-B-32.pt")
    monkeypatch.setattr(clip_model, "SMALL_WEIGHTS", place / "absent.safetensors")
    assert default_clip() is None
    with pytest.raises(UserError, match="hw3_download.sh"):
        load_clip()
    assert isinstance(load_clip(clip_weights), Clip) and load_clip(clip_weights).is_openai
    assert isinstance(load_clip(trained), SmallClip) and not load_clip(trained).is_openai
    (place / "ViT-B-32.pt").write_bytes(clip_weights.read_bytes())
    assert default_clip() == place / "ViT-B-32.pt" and isinstance(load_clip(), Clip)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # which tries again and again where there is no network
    with pytest.raises(UserError, match="nor to be had from the model hub"):
        load_clip("nobody/nothing")


# ---- transformers ----------------------------------------------------------------------------------------------


def write_dual_encoder(kind, folder):
    """A tiny random CLIP, SigLIP or BLIP-2 for image-text retrieval, with its processor."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import (
        Blip2Config,
        Blip2ForImageTextRetrieval,
        Blip2Processor,
        BlipImageProcessor,
        CLIPConfig,
        CLIPImageProcessor,
        CLIPModel,
        CLIPProcessor,
        PreTrainedTokenizerFast,
        SiglipConfig,
        SiglipImageProcessor,
        SiglipModel,
        SiglipProcessor,
    )

    vocabulary = {word: i for i, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", bos_token="[CLS]",
                                        eos_token="[SEP]", model_max_length=12)
    torch.manual_seed(0)
    text = dict(vocab_size=len(WORDS), hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
                max_position_embeddings=12, bos_token_id=2, eos_token_id=3, pad_token_id=0)
    vision = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14)
    size = {"height": 28, "width": 28}
    if kind == "clip":
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
        processor = CLIPProcessor(CLIPImageProcessor(size=size, crop_size=size), tokenizer)
    elif kind == "siglip":
        model = SiglipModel(SiglipConfig(text_config=text | {"projection_size": 16}, vision_config=vision))
        processor = SiglipProcessor(SiglipImageProcessor(size=size), tokenizer)
    else:
        qformer = dict(vocab_size=len(WORDS), hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
                       max_position_embeddings=12, encoder_hidden_size=16, use_qformer_text_input=True, pad_token_id=0)
        model = Blip2ForImageTextRetrieval(Blip2Config(vision_config=vision, qformer_config=qformer, text_config=text | {"model_type": "opt"},
                                                       num_query_tokens=4, image_text_hidden_size=8))
        torch.nn.init.normal_(model.query_tokens)
        processor = Blip2Processor(BlipImageProcessor(size=size), tokenizer, num_query_tokens=4)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    model.eval().save_pretrained(folder)
    processor.save_pretrained(folder)
    return model, processor


@torch.inference_mode()
@pytest.mark.parametrize("kind", ["clip", "siglip", "blip2"])
def test_dual_encoders_of_transformers_agree_with_their_own_forward_pass(kind, tmp_path, monkeypatch):
    model, processor = write_dual_encoder(kind, tmp_path / kind)
    paths, texts = pictures(tmp_path / "images"), ["a red picture", "dog", "the colour of a fish is blue ."]
    clip = load_clip(tmp_path / kind, batch_size=3)
    assert isinstance(clip, TransformersClip) and not clip.is_openai
    read, images, unread = clip.encode_images(paths)
    assert read == paths and not unread and images.ndim == (3 if kind == "blip2" else 2)
    found = similarity(images, clip.encode_texts(texts))
    pixels = processor.image_processor(images=[Image.open(path).convert("RGB") for path in paths], return_tensors="pt")
    if kind == "blip2":
        for column, text in enumerate(texts):
            rows = processor.tokenizer([text], return_tensors="pt")
            # Its forward pass expects place-holders of the image before the text where the config names their token.
            expected = model(pixel_values=pixels["pixel_values"], input_ids=rows["input_ids"], attention_mask=rows["attention_mask"])
            torch.testing.assert_close(found[:, column], expected.logits_per_image[:, 0], atol=1e-5, rtol=1e-4)
    else:
        padding = {"padding": "max_length", "max_length": 12} if kind == "siglip" else {"padding": True}
        rows = processor.tokenizer(texts, return_tensors="pt", **padding)
        rows.pop("token_type_ids", None)
        output = model(**rows, **pixels)
        expected = F.normalize(output.image_embeds, dim=-1) @ F.normalize(output.text_embeds, dim=-1).t()
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
        assert clip.logit_scale == pytest.approx(model.logit_scale.exp().item())
    paired = paired_similarity(images[:3], clip.encode_texts(texts))
    torch.testing.assert_close(paired, found[:3].diagonal())
    assert clip.too_long(["a " * 30, "dog"]) == 1 and clip.encode_texts(["a " * 30]).isfinite().all()


def test_models_that_are_no_dual_encoders_are_refused(place):
    with pytest.raises(UserError, match="does not embed images and texts in one space"):
        load_clip(place / "bert")
    (place / "empty").mkdir()
    with pytest.raises(UserError, match="neither a dual encoder"):
        load_clip(place / "empty")
