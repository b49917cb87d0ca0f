"""Concept words: the table from WordNet, the concepts of captions and pictures, and the captioner that uses them."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import VIT
from PIL import Image
from safetensors.torch import load_file, save_file
from test_captioner import FakeEncoder, save_decoder
from test_train import Interrupted, interrupt_after
from test_train import settings as train_settings
from timm.data import ImageNetInfo

import get_concepts
import p2_train
import training
from attention import p2_attention, teacher_forced
from captioner import Captioner, CaptionerConfig, Projection, read_metadata
from cli import UserError
from clip_small import ClipConfig, Folds
from concepts import MISSING, ClassWords, ClipWords, Concepts, embed_texts
from dataset import Folder, collate
from files import fingerprints
from generation import GenerationConfig
from p2_infer import read_datastore
from tokenizer import END_OF_TEXT

IDS = ImageNetInfo("imagenet-1k").label_names()


@pytest.fixture(scope="module")
def words():
    return ClassWords(IDS)


def numbers_of(words, *names):
    return [words.names.index(name) for name in names]


# ---- words -----------------------------------------------------------------------------------------------------


def test_every_class_of_imagenet_has_words(words):
    names = ImageNetInfo("imagenet-1k").label_descriptions()
    assert len(words.levels) == 1000 and all(words.words(number) for number in range(1000))
    shared = [bool({part.strip().lower() for part in name.split(",")} & {own.lower() for own in levels[0]})
              for name, levels in zip(names, words.levels)]
    assert all(shared), [name for name, same in zip(names, shared) if not same]
    number, = numbers_of(words, "golden retriever")
    assert words.words(number)[0] == "golden retriever" and "dog" in words.words(number)


def test_nouns_lead_to_classes(words):
    nouns = words.find("Two zebras beside a golden retriever, 3 kitties and some buses; a red traffic light.")
    assert nouns == ["zebra", "golden retriever", "bus", "traffic light"]
    found = [words.classes[noun] for noun in nouns]
    assert found[:2] == [numbers_of(words, "zebra"), numbers_of(words, "golden retriever")]
    assert set(numbers_of(words, "school bus", "trolleybus")) <= set(found[2]) and found[3] == numbers_of(words, "traffic light")
    assert words.find("A man smiles at her") == [] == words.find("")
    dogs = words.classes[words.find("Dogs")[0]]
    assert len(dogs) > 100 and numbers_of(words, "golden retriever")[0] in dogs
    assert [words.find(plural) for plural in ("foxes", "wolfs", "lilies", "berries")] == [["fox"], ["wolf"], [], ["berry"]]
    assert [words.names[words.nouns[noun]] for noun in ("zebra", "dog")] == ["zebra", "dog"] and words.words(words.nouns["dog"]) == ["dog"]


def test_sisters_are_of_the_same_kind(words):
    number, = numbers_of(words, "golden retriever")
    names = {words.names[sister] for sister in words.sisters[number]}
    assert "Labrador retriever" in names and "golden retriever" not in names and "tabby" not in names


def test_a_class_vector_is_the_mean_of_its_words(words):
    torch.manual_seed(0)
    embeddings = torch.randn(50, 6)
    embeddings[7] = 0  # never met
    vocabulary = {}

    def encode(text):
        assert text[0] == " "
        return [vocabulary.setdefault(word, len(vocabulary) % 50) for word in text.split()]

    vectors = words.vectors(embeddings, encode)
    number, = numbers_of(words, "golden retriever")
    known = [[token for token in encode(f" {word}") if token != 7] for word in words.words(number)]
    expected = torch.stack([embeddings[tokens].mean(0) for tokens in known if tokens]).mean(0)
    torch.testing.assert_close(vectors[number] / vectors[number].norm(), expected / expected.norm())
    assert vectors.shape == (1000, 6) and vectors.square().mean().sqrt() == pytest.approx(1)


def test_what_is_imagined_of_a_caption_errs_as_a_classifier_does(words):
    captions, count = ["Two zebras and a pizza", "A dog", "Nothing at all"], 400
    seen = Concepts(torch.full((3 * count, 8), 5), torch.tensor([0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.01, 0.01]).expand(3 * count, -1))
    found = [[words.classes[noun] for noun in words.find(caption)] for caption in captions for _ in range(count)]
    concepts = words.imagine(found, seen, np.random.default_rng(0))
    assert torch.equal(concepts.probabilities, seen.probabilities) and (seen.numbers == 5).all()
    zebra, pizza = numbers_of(words, "zebra", "pizza")
    of_two, of_dog, of_nothing = concepts.numbers.split(count)
    assert (of_nothing == 5).all()
    for number in zebra, pizza:
        assert 1 - MISSING - 0.22 < (of_two == number).any(1).float().mean() < 1 - MISSING + 0.05
    assert (of_two == zebra)[:, 0].float().mean() > 2 * (of_two == zebra)[:, 4].float().mean()
    dogs = torch.isin(of_dog, torch.tensor(words.classes["dog"])).sum(1)
    assert dogs.unique().tolist()[:3] == [0, 1, 2] and of_dog.unique().numel() > 60
    again = words.imagine(found, seen, np.random.default_rng(0))
    assert torch.equal(again.numbers, concepts.numbers)


def test_the_table_is_read_from_wordnet(tmp_path):
    path = tmp_path / "data.noun"
    path.write_text("  1 This software\n"
                    "00000001 03 n 01 entity 0 000 | that which is\n"
                    "00000002 03 n 02 cat 0 true_cat 0 002 @ 00000001 n 0000 #m 00000009 n 0000 | a feline; \"it purred\"\n"
                    "00000003 03 n 01 tabby 0 001 @ 00000002 n 0000 | a striped cat; soft  \n")
    synsets = get_concepts.read_synsets(path)
    assert synsets["00000002"] == (["cat", "true cat"], ["00000001"], "a feline")
    assert synsets["00000003"][2] == "a striped cat; soft"
    assert get_concepts.kinds_of("00000003", synsets) == ["00000003", "00000002", "00000001"]
    assert [get_concepts.depth(f"0000000{i}", synsets) for i in (1, 2, 3)] == [0, 1, 2]
    with pytest.raises(UserError, match="no synset"):
        get_concepts.find_classes(synsets, ImageNetInfo("imagenet-1k"))
    path.write_text("nonsense | here\n")
    with pytest.raises(UserError, match="data.noun"):
        get_concepts.read_synsets(path)


# ---- the captioner ---------------------------------------------------------------------------------------------


class NamingEncoder(FakeEncoder):
    """Its features' first channels are logits of classes."""

    class_ids = IDS

    def class_probabilities(self, features):
        logits = torch.nn.functional.pad(8 * features.mean(1), (0, len(IDS) - features.shape[-1]), value=-4.0)
        return logits.softmax(-1)


def make_captioner(tmp_path, token_ids=None, **config):
    path = tmp_path / "decoder.bin"
    if not path.exists():
        save_decoder(path)
    config = CaptionerConfig(**{"projection_dim": 64, "lora_rank": 2, "lora_targets": ("q", "v"), "concepts": 3} | config)
    model = Captioner(config, NamingEncoder(), config.load_decoder(path), token_ids).eval()
    torch.manual_seed(1)
    for name, parameter in model.trained_parameters().items():
        if not (config.fusion == "prefix" and "norm" in name):
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def test_more_concepts_than_there_are_are_refused(tmp_path):
    with pytest.raises(UserError, match="concepts is 1001, but there are only 1000"):
        make_captioner(tmp_path, concepts=1001)
    with pytest.raises(UserError, match="projection_dim is 0"):
        make_captioner(tmp_path, projection_dim=0)


@pytest.mark.parametrize("config", [{}, {"fusion": "prefix"}, {"projection_layers": 1}, {"fusion": "prefix", "prompt_length": 2}])
def test_captions_with_concepts_are_the_same_in_any_batch_and_with_the_cache(tmp_path, config):
    model = make_captioner(tmp_path, **config)
    torch.manual_seed(2)
    features = torch.randn(6, 4, 12)
    generation = GenerationConfig(max_length=8)
    together = model.search(features, generation)
    assert [model.search(features[i:i + 1], generation)[0] for i in range(6)] == together
    assert model.image_tokens(features).shape[:2] == (6, 4 + 3) and len({tuple(row) for row in together}) > 1
    # Greedy with the cache, against the whole sequence at each step.
    for i, row in enumerate(model.search(features, replace(generation, beam_size=1))):
        inputs = torch.tensor([[END_OF_TEXT, *row[:-1]]])
        with torch.inference_mode():
            logits = model.decoder(inputs, model.image_tokens(features[i:i + 1]), model.token_ids)
        assert model.token_ids[logits[0].argmax(-1)].tolist() == row


def test_concepts_are_the_likeliest_classes_and_change_what_is_said(tmp_path):
    model = make_captioner(tmp_path)
    torch.manual_seed(2)
    features = torch.randn(6, 4, 12)
    own = model.concepts(features)
    probabilities = model.encoder.class_probabilities(features)
    assert torch.equal(own.probabilities, probabilities.gather(1, own.numbers)) and own.numbers.shape == (6, 3)
    assert torch.equal(own.numbers[:, 0], probabilities.argmax(-1))
    generation = GenerationConfig(max_length=8)
    captions = model.generate(features, generation)
    assert model.generate(features, generation, concepts=own) == captions
    others = Concepts(own.numbers.flip(0), own.probabilities.flip(0))
    none = Concepts(own.numbers, torch.zeros_like(own.probabilities))
    assert model.generate(features, generation, concepts=others) != captions != model.generate(features, generation, concepts=none)
    # Without a probability it does not matter whose words they are.
    torch.testing.assert_close(model.image_tokens(features, none),
                               model.image_tokens(features, Concepts(others.numbers, none.probabilities)))
    assert not model.image_tokens(features, none)[:, 4:].any()


def test_a_caption_without_a_picture_is_learnt_from_its_concepts(tmp_path):
    model = make_captioner(tmp_path)
    concepts = Concepts(torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.full((2, 3), 0.3))
    rows = [[5, 6, 7], [8, 9]]
    loss = model.loss(None, *collate(rows), concepts=concepts)
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.projection.named_parameters()}
    assert gradients["concepts.weight"].abs().sum() > 0 and gradients["input.weight"] is None
    alone = [model.loss(None, *collate(rows[i:i + 1]), concepts=concepts.each(lambda part: part[i:i + 1])) for i in range(2)]
    torch.testing.assert_close(loss, (4 * alone[0] + 3 * alone[1]) / 7)


def test_concept_dropout_leaves_whole_concepts_out():
    torch.manual_seed(0)
    config = CaptionerConfig(projection_dim=64, projection_dropout=0, patch_dropout=0, concepts=5, concept_dropout=0.4)
    projection = Projection(config, 12, 10, concept_dim=6)
    features, concepts, strengths = torch.randn(40, 10, 12), torch.randn(40, 5, 6), torch.rand(40, 5) + 0.1
    whole, part = projection.eval()(features, concepts, strengths), projection.train()(features, concepts, strengths)
    torch.testing.assert_close(whole[:, :10], part[:, :10])
    kept = torch.isclose(part[:, 10:], whole[:, 10:], atol=1e-5).all(-1)
    assert (kept | (part[:, 10:] == 0).all(-1)).all() and 0.5 < kept.float().mean() < 0.7
    # A concept is as strong as it is likely, which a normalisation behind it would undo.
    torch.testing.assert_close(whole[:, 10:].norm(dim=-1), strengths * 64**0.5, rtol=1e-3, atol=0)


def test_an_encoder_without_a_classifier_says_so(tmp_path):
    save_decoder(tmp_path / "decoder.bin")
    config = CaptionerConfig(concepts=3, projection_dim=64)
    for ids in [], ["n00000000"]:
        encoder = NamingEncoder()
        encoder.class_ids = ids
        with pytest.raises(UserError, match="fake brings no classifier.*--concepts 0"):
            Captioner(config, encoder, config.load_decoder(tmp_path / "decoder.bin"))


def test_checkpoints_record_concepts_and_those_of_before_still_load(tmp_path):
    features = torch.randn(3, 4, 12)
    for concepts in 0, 3:
        model = make_captioner(tmp_path, concepts=concepts)
        for parameter in model.trained_parameters().values():
            parameter.data = parameter.data.half().float()
        path = tmp_path / f"{concepts}.safetensors"
        model.save(path)
        if not concepts:  # as checkpoints were written before there were any
            metadata = read_metadata(path)
            metadata["model"] = {name: value for name, value in metadata["model"].items() if "concept" not in name}
            save_file(load_file(path), path, {"captioner": json.dumps(metadata)})
        loaded = Captioner.load(path, tmp_path / "decoder.bin", NamingEncoder())
        assert loaded.config.concepts == concepts and (loaded.concepts(features) is None) == (concepts == 0)
        assert loaded.generate(features, GenerationConfig(max_length=6)) == model.generate(features, GenerationConfig(max_length=6))


@pytest.mark.parametrize("config", [{}, {"fusion": "prefix"}])
def test_attention_to_concepts_stands_beside_that_to_patches(tmp_path, config):
    model = make_captioner(tmp_path, **config)
    model.encoder.grid, model.encoder.preprocess = (2, 2), lambda picture: torch.zeros(3, 8, 8, dtype=torch.uint8)
    features = torch.randn(1, 4, 12)
    model.encoder.forward = lambda images: features
    attention, = p2_attention(model, [Image.new("RGB", (8, 8))], GenerationConfig(max_length=6))
    assert attention.concepts == tuple(model.words.names[number] for number in model.concepts(features).numbers[0].tolist())
    assert attention.maps.shape[3:] == (2, 2) and attention.shares.shape == (*attention.maps.shape[:3], 3)
    sums = attention.maps.sum((3, 4)) + attention.shares.sum(3)
    assert np.allclose(sums, 1, atol=1e-5) if not config else (sums < 1 + 1e-5).all() and sums.mean() < 0.999
    assert (attention.shares >= 0).all() and attention.shares.mean() > 1e-3
    weights = []
    with torch.inference_mode():
        teacher_forced(model, features, [attention.tokens], weights)
    first = weights[0][0, :, 0]  # (H, N + K), of the first layer and position
    assert np.allclose(attention.shares[0, 0], first[:, 4:].numpy(), atol=1e-6) or len(attention.places[0]) > 1


class FakeJudge:
    """A CLIP whose embeddings a test makes up: of a picture its first two channels, of a text what `texts` says."""

    log_scale, text_digest, config = torch.tensor(3.0), "fake", ClipConfig(width=2)

    def __init__(self, texts=lambda text: (1.0, 0.0)):
        self.texts, self.asked = texts, []

    def embed_images(self, features):
        return features.mean(1)[:, :2]

    def embed_texts(self, texts):
        self.asked += texts
        return torch.tensor([self.texts(text) for text in texts])

    def to(self, device):
        return self


def looking_at(*vectors):
    """Features of pictures whose embeddings are these."""
    features = torch.zeros(len(vectors), 4, 12)
    features[..., :2] = torch.tensor(vectors)[:, None]
    return features


def test_our_clip_chooses_among_the_beams(tmp_path):
    model = make_captioner(tmp_path, torch.tensor([50, 64, 262, 290, END_OF_TEXT]))  # so few that captions come to an end
    features = torch.randn(5, 4, 12)
    features[..., :2] += torch.tensor([3.0, 0.0])
    generation = GenerationConfig(beam_size=4, max_length=8)
    found = model.hypotheses(model.image_tokens(features), generation)
    assert all(len(rows) > 1 and rows == sorted(rows, key=lambda row: -row[0]) for rows in found)
    assert model.beam_search(model.image_tokens(features), generation) == [rows[0][1] for rows in found]
    second = {model.text(rows[1][1]) for rows in found}
    model.judge = FakeJudge(lambda text: (1.0, 0.0) if text in second else (-1.0, 0.0))
    chosen = model.search(features, replace(generation, clip_weight=1e3))
    assert {model.text(row) for row in chosen} <= second
    assert model.search(features, replace(generation, clip_weight=1e-9)) == [rows[0][1] for rows in found]
    with pytest.raises(UserError, match="without sample"):
        GenerationConfig(sample=True, clip_weight=1.0)


def test_nouns_near_the_picture_in_our_clips_space(words):
    judge = FakeJudge(lambda text: (0.0, 1.0) if "zebra" in text else (1.0, 0.1))
    source = ClipWords(words, judge)
    concepts = source.recognise(looking_at((0.0, 2.0), (1.0, 0.0)), 3)
    assert words.names[concepts.numbers[0, 0]] == "zebra" and "a photo of a zebra" in judge.asked
    assert len(judge.asked) == len(words.nouns) == len(words.names) - 1000
    assert (concepts.numbers >= 1000).all() and concepts.probabilities[0, 0] > 10 * concepts.probabilities[0, 1]
    assert source.meanings("zebra") == [words.nouns["zebra"]]


def test_embeddings_of_texts_are_kept_and_damaged_ones_made_anew(tmp_path, capsys):
    judge = FakeJudge(lambda text: (0.0, 1.0) if "zebra" in text else (1.0, 0.1))
    vectors = embed_texts(judge, ["a zebra", "a horse"], tmp_path)
    torch.testing.assert_close(embed_texts(FakeJudge(None), ["a zebra", "a horse"], tmp_path), vectors)
    (file,) = tmp_path.iterdir()
    for content in b"", file.read_bytes()[:100]:
        file.write_bytes(content)
        torch.testing.assert_close(embed_texts(judge, ["a zebra", "a horse"], tmp_path), vectors)
        assert len(file.read_bytes()) > 100
    assert not capsys.readouterr().err
    torch.testing.assert_close(embed_texts(judge, ["a zebra", "a horse"], file / "folder"), vectors)
    assert "cannot be kept" in capsys.readouterr().err


def test_captions_of_similar_pictures_name_what_a_picture_shows(tmp_path):
    model = make_captioner(tmp_path)
    features = looking_at((0.0, 2.0), (1.0, 0.0))
    before, captions = model.concepts(features), model.generate(features, GenerationConfig(max_length=6))
    model.judge = FakeJudge(lambda text: (0.0, 1.0) if "zebra" in text else (1.0, 0.0))
    model.retrieve([f"Two zebras, number {i}" for i in range(20)] + [f"A dog and a pizza {i}" for i in range(15)] + ["A dog"] * 5)
    after = model.concepts(features)
    named = [dict(zip((model.words.names[number] for number in numbers), values)) for numbers, values in
             zip(after.numbers.tolist(), after.probabilities.tolist())]
    assert named[0]["zebra"] == pytest.approx(1) and named[1]["dog"] == pytest.approx(1) and named[1]["pizza"] == pytest.approx(0.75)
    assert model.words.names[before.numbers[0, 0]] in named[0] and len(named[0]) == 3  # beside what the classifier says
    assert model.generate(features, GenerationConfig(max_length=6)) != captions
    with pytest.raises(UserError, match="without concepts"):
        make_captioner(tmp_path, concepts=0).retrieve(["A dog"])


@pytest.fixture
def judged(monkeypatch):
    """Every captioner's judge is this one, which tells zebras from all else."""
    judge = FakeJudge(lambda text: (0.0, 2.0) if "zebra" in text else (2.0, 0.0))
    monkeypatch.setattr("captioner.ClipSmall.load", lambda *arguments, **options: judge)
    return judge


@pytest.mark.parametrize("config", [{}, {"fusion": "prefix", "meaning": 2}, {"concepts": 0}, {"projection_layers": 1, "meaning": 3}])
def test_the_meaning_makes_more_tokens(tmp_path, judged, config):
    model = make_captioner(tmp_path, **{"meaning": 1} | config)
    torch.manual_seed(2)
    features = torch.randn(6, 4, 12)
    model.centres.copy_(torch.tensor([[0.1, 0.2], [0.3, 0.0]]))
    seen = model.concepts(features)
    raw = torch.nn.functional.normalize(features.mean(1)[:, :2], dim=-1)
    torch.testing.assert_close(seen.meaning, torch.nn.functional.normalize(raw - torch.tensor([0.1, 0.2]), dim=-1))
    assert model.image_tokens(features).shape[1] == 4 + model.config.concepts + model.config.meaning
    generation = GenerationConfig(max_length=6)
    together = model.search(features, generation)
    assert [model.search(features[i:i + 1], generation)[0] for i in range(6)] == together
    other = model.image_tokens(features, seen._replace(meaning=-seen.meaning))
    assert not torch.allclose(other[:, -1], model.image_tokens(features)[:, -1], atol=0.1)
    loss = model.loss(None, *collate([[5, 6]]), concepts=seen.each(lambda part: part[:1]))
    loss.backward()
    assert model.projection.meaning.weight.grad.abs().sum() > 0 and model.projection.input.weight.grad is None
    for parameter in model.trained_parameters().values():
        parameter.data = parameter.data.half().float()
    model.centres = model.centres.half().float()
    model.save(tmp_path / "meaning.safetensors")
    loaded = Captioner.load(tmp_path / "meaning.safetensors", tmp_path / "decoder.bin", NamingEncoder())
    assert torch.equal(loaded.centres, model.centres) and not {name for name in loaded.state_dict() if "judge" in name}
    assert loaded.search(features, generation) == model.search(features, generation)


def test_a_datastore_is_a_captions_file_or_predictions(tmp_path):
    files = {"coco.json": {"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"id": 1, "image_id": 1, "caption": "A dog"}]},
             "predictions.json": {"a": "A dog"}, "numbers.json": {"a": 1}, "list.json": ["A dog"], "nothing.json": {}}
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    assert read_datastore(tmp_path / "coco.json") == read_datastore(tmp_path / "predictions.json") == ["A dog"]
    for name in "numbers.json", "list.json", "nothing.json":
        with pytest.raises(UserError, match="neither a captions file"):
            read_datastore(tmp_path / name)


# ---- training --------------------------------------------------------------------------------------------------


CONFIG = CaptionerConfig(encoder=VIT, image_size=32, projection_dim=64, lora_rank=2, concepts=4)


def settings(**changes):
    return train_settings(**{"epochs": 2, "text": ("text.txt",), "text_batch_size": 3} | changes)


@pytest.fixture
def place(workplace):
    """The folder of data, with a classifier in the encoder's file and captions without pictures."""
    torch.manual_seed(0)
    save_file(timm.create_model(VIT, img_size=32).state_dict(), workplace / f"{VIT}.safetensors")
    (workplace / "text.txt").write_text("Two zebras .\ntwo zebras\n\nA dog beside a pizza\na yellow picture\nAn old piano\n")
    return workplace


def test_captions_without_pictures_are_read_once_and_not_those_of_the_selection(place):
    trainer = p2_train.CaptionerTrainer(CONFIG, settings(output="o.safetensors"), "cpu")
    decode = trainer.model.tokenizer.decode
    # The selection's last four pictures hold one of each colour.
    assert [decode(row) for row in trainer.text.rows] == ["Two zebras.", "A dog beside a pizza.", "An old piano."]
    known = trainer.model.token_ids.tolist()
    assert all(token in known for row in trainer.text.rows for token in row)
    assert trainer.text.seen.numbers.shape == (20, 4)
    first = trainer.model.concepts(trainer.data.features[[0], [0]].float())
    assert any(torch.equal(first.numbers[0], row) for row in trainer.text.seen.numbers)
    drawn = trainer.text.sample_epoch(4, 3, torch.Generator().manual_seed(0))
    assert [len(batch) for batch in drawn] == [3] * 4 and sorted(sum(drawn, [])) == sorted([0, 1, 2] * 4)
    tokens, targets, concepts = trainer.text.batch([2, 0], np.random.default_rng(0))
    assert tokens[1, 1:4].tolist() == trainer.text.rows[0][:3] and len(concepts.numbers) == 2
    for changes, config, message in (({}, replace(CONFIG, concepts=0), "needs --concepts"),
                                     ({"text": ("nowhere.txt",)}, CONFIG, "cannot read the text file nowhere.txt")):
        with pytest.raises(UserError, match=message):
            p2_train.CaptionerTrainer(config, settings(output="o.safetensors", **changes), "cpu")


def test_training_with_text_resumes_exactly_and_changes_what_is_learnt(place, monkeypatch):
    p2_train.train(CONFIG, settings(output="whole.safetensors"), "cpu")
    original = interrupt_after(monkeypatch, 5)
    stopped = settings(output="stopped.safetensors")
    monkeypatch.setattr(training, "SAVE_MINUTES", 0)
    with pytest.raises(Interrupted):
        p2_train.train(CONFIG, stopped, "cpu")
    monkeypatch.setattr(training, "step_optimizer", original)
    p2_train.train(CONFIG, stopped, "cpu")
    p2_train.train(CONFIG, settings(output="without.safetensors", text=()), "cpu")
    whole, again, without = (load_file(f"{name}.safetensors") for name in ("whole", "stopped", "without"))
    assert whole.keys() == again.keys() and all(torch.equal(whole[name], again[name]) for name in whole)
    assert len(without["token_ids"]) < len(whole["token_ids"])
    assert not torch.equal(whole["projection.concepts.weight"], without["projection.concepts.weight"])


def test_a_step_adds_the_gradients_of_both(place):
    trainer = p2_train.CaptionerTrainer(replace(CONFIG, concept_dropout=0, projection_dropout=0, patch_dropout=0, dropout=0),
                               settings(output="o.safetensors", text_weight=0.5, label_smoothing=0.0), "cpu")
    model = trainer.model.eval()
    piece = trainer.local_batch([0, 1], np.zeros(20, int))
    text = trainer.text_cross_entropy.local_batch([0, 2], np.random.default_rng([0, 0, 0]))
    trainer.text_cross_entropy(*text)
    trainer.cross_entropy([0, 1], piece, 0)
    found = {name: parameter.grad.clone() for name, parameter in trainer.trained.items() if parameter.grad is not None}
    model.zero_grad()
    (_, features, _, *captions), (*lines, concepts, said, total) = piece[0], text
    assert said == [trainer.text.captions[i] for i in (0, 2)]
    loss = model.loss(features.float(), *captions) + 0.5 * model.loss(None, *lines, concepts=concepts)
    loss.backward()
    assert total == sum(len(trainer.text.rows[i]) + 1 for i in (0, 2))
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, trainer.trained[name].grad, atol=1e-6, rtol=1e-4)


def test_our_clip_rewards_captions_beside_cider(place, judged):
    write_folds()
    config = settings(text=(), epochs=0, scst_epochs=1, scst_clip=2.0, folds="folds.safetensors", output="o.safetensors")
    trainer = p2_train.CaptionerTrainer(CONFIG, config, "cpu")
    trainer.model.judge = FakeJudge(lambda text: (1.0, 0.0) if "zebra" in text else (-1.0, 0.0))
    features = torch.tensor([[3.0, 0.0]])
    captions, numbers = ["a red picture", "a zebra", "a red zebra", "", "red"], np.zeros(5, int)
    rewards = trainer.reward(numbers, features, captions, [True] * 5)
    cider = trainer.reward.scorer.score(numbers, captions, [True] * 5)
    assert (rewards.numpy() - cider).tolist() == pytest.approx([-2, 2, 2, -2, -2]) and cider[0] > cider[1]
    trainer.reward.clip = 0.0
    assert trainer.reward(numbers, features, captions, [True] * 5).tolist() == pytest.approx(cider.tolist())


def test_what_is_made_up_costs_its_price(place):
    trainer = p2_train.CaptionerTrainer(CONFIG, settings(text=(), epochs=0, scst_epochs=1, scst_chair=0.5, output="o.safetensors"), "cpu")
    trainer.images[0] = replace(trainer.images[0], captions=["A dog on a couch."])
    captions = ["a dog", "a dog and a cat", "two cats, a horse and a cat", "a puppy on a sofa", ""]
    numbers = np.zeros(5, int)
    cider = trainer.reward.scorer.score(numbers, captions, [True] * 5)
    assert (trainer.reward(numbers, None, captions, [True] * 5).numpy() - cider).tolist() == pytest.approx([0, -0.5, -1, 0, 0])


def write_folds(views=2):
    """Embeddings of the workplace's pictures, as p4_clip.py --folds writes them: each its own."""
    folder = Folder("data")
    embeddings = torch.randn(len(folder.images), views, 2, generator=torch.Generator().manual_seed(4))
    Folds.save("folds.safetensors", embeddings, fingerprints(folder.paths()), FakeJudge.text_digest, {})
    return embeddings.half().float()


def test_meanings_of_training_pictures_are_those_of_a_clip_that_has_not_seen_them(place, judged):
    config, embeddings = replace(CONFIG, meaning=2), write_folds()
    p2_train.train(CONFIG, settings(text=(), epochs=1, output="first.safetensors"), "cpu")
    trainer = p2_train.CaptionerTrainer(config, settings(folds="folds.safetensors", output="o.safetensors", init="first.safetensors"), "cpu")
    assert torch.equal(trainer.data.embeddings, embeddings[:20]) and torch.equal(trainer.selection_embeddings, embeddings[20:, 0])
    torch.testing.assert_close(trainer.model.centres[0], torch.nn.functional.normalize(embeddings[:20, 0], dim=-1).mean(0))
    assert trainer.model.centres[1].tolist() == [1, 0]  # no caption of the training pictures has a zebra
    (_, features, known, *_), = trainer.local_batch([3, 5], np.ones(20, int))
    assert torch.equal(known, embeddings[[3, 5], 1])
    model = trainer.model.eval()
    torch.testing.assert_close(model.concepts(features.float(), known).meaning, model.meaning(embeddings[[3, 5], 1], 0))
    assert model.generate(features.float(), embeddings=known) == model.generate(features.float(), concepts=model.concepts(features.float(), known))
    assert trainer.fit() and "projection.meaning.weight" in load_file("o.safetensors")
    again = p2_train.CaptionerTrainer(config, settings(folds="folds.safetensors", init="o.safetensors", text=(), scst_epochs=1, epochs=0,
                                              output="p.safetensors"), "cpu")
    assert torch.equal(again.model.centres, model.centres.half().float())  # those of --init
    assert again.fit()
    with pytest.raises(UserError, match="other model options"):
        p2_train.CaptionerTrainer(CONFIG, settings(init="o.safetensors", output="q.safetensors"), "cpu")


def test_the_meaning_of_a_caption_without_a_picture_is_as_far_from_it_as_a_pictures_is(place, judged):
    """What captions explain of pictures' meanings is kept, what they do not is another picture's."""
    write_folds()
    config = settings(folds="folds.safetensors", output="o.safetensors")
    trainer = p2_train.CaptionerTrainer(replace(CONFIG, meaning=1), config, "cpu")
    assert trainer.text.seen.meaning.shape == (20, 2)
    trainer.text_cross_entropy.slope, trainer.model.centres[:] = 0.5, 0
    residuals = torch.tensor([[0.0, 0.5], [0.5, 0.0]])
    torch.testing.assert_close(trainer.text_cross_entropy.meanings(["red", "two zebras"], residuals), torch.tensor([[0.5, 0.5], [0.5, 0.5]]) * 2**0.5)
    *_, concepts, captions, _ = trainer.text_cross_entropy.local_batch([0, 2], np.random.default_rng([0, 0, 0]))
    assert concepts.meaning.shape == (2, 2) and all(any(torch.equal(row, other) for other in trainer.text.seen.meaning) for row in concepts.meaning)


def test_a_run_goes_on_with_its_folds_wherever_they_lie(place, judged):
    embeddings, config = write_folds(), replace(CONFIG, meaning=1)
    p2_train.CaptionerTrainer(config, settings(folds="folds.safetensors", output="o.safetensors"), "cpu").run.save()
    Path("folds.safetensors").rename("moved.safetensors")
    assert p2_train.CaptionerTrainer(config, settings(folds="moved.safetensors", output="o.safetensors"), "cpu").run.resumed
    Folds.save("moved.safetensors", embeddings * 2, fingerprints(Folder("data").paths()), FakeJudge.text_digest, {})
    with pytest.raises(UserError, match="an unfinished run with another folds"):
        p2_train.CaptionerTrainer(config, settings(folds="moved.safetensors", output="o.safetensors"), "cpu")


def test_folds_that_lack_something_are_refused(place, judged):
    write_folds(views=1)
    for config, changes, message in ((replace(CONFIG, meaning=1), {}, "--meaning and --scst_clip need --folds"),
                                     (CONFIG, {"scst_clip": 1.0}, "--meaning and --scst_clip need --folds"),
                                     (CONFIG, {"folds": "folds.safetensors", "views": 2}, "1 views of each picture, not 2"),
                                     (CONFIG, {"folds": "data/train.json"}, "data/train.json was not written by p4_clip.py --folds")):
        with pytest.raises(UserError, match=message):
            p2_train.CaptionerTrainer(config, settings(output="o.safetensors", **changes), "cpu")
    judged.text_digest = "other"
    with pytest.raises(UserError, match="belongs to another CLIP"):
        Folds("folds.safetensors", judged.text_digest)
    with pytest.raises(UserError, match="lacks 1 of 1 pictures, the first is missing.png"):
        Folds("folds.safetensors", "fake").of([Path("missing.png")])


def test_concepts_are_added_to_a_captioner_that_knew_none(place):
    p2_train.train(replace(CONFIG, concepts=0), settings(text=(), epochs=1, output="first.safetensors"), "cpu")
    trainer = p2_train.CaptionerTrainer(CONFIG, settings(init="first.safetensors", output="second.safetensors"), "cpu")
    before = load_file("first.safetensors")
    state = trainer.model.trained_parameters()
    assert all(torch.equal(state[name].half(), before[name]) for name in before if name != "token_ids")
    assert state.keys() - before.keys() == {"projection.concepts.weight", "projection.concepts.bias"}
    assert state["projection.concepts.weight"].any()
