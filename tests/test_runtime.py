"""Networks in OpenVINO: the same outputs as PyTorch's, cached on disk, and rebuilt if the cache is damaged or stale."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import CNN, ROOT, VIT, write_bert
from safetensors.torch import save_file

import encoder as encoder_module
import runtime
from captioner import Captioner, CaptionerConfig
from cli import UserError
from clip_small import ClipConfig, ClipSmall, TextEncoder
from encoder import load_encoder
from generation import GenerationConfig
from p2_train import CaptionerTrainer, Settings
from runtime import CompiledEncoder, pick_runtime

pytestmark = pytest.mark.openvino
pytest.importorskip("openvino")


def images(count, size, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (count, 3, size, size), dtype=np.uint8))


@pytest.mark.parametrize("name, size", [(CNN, 64), (f"{CNN}+{CNN}", 64), (VIT, 32)])
def test_a_compiled_encoder_is_the_encoder(place, name, size):
    """Features, what the classifier says, and every attribute that somebody asks for."""
    plain, compiled = (load_encoder(name, size, runtime=kind) for kind in ("torch", "openvino"))
    assert isinstance(compiled, CompiledEncoder) and not list(compiled.parameters())
    with torch.inference_mode():
        features = plain(images(5, size))
        torch.testing.assert_close(compiled(images(5, size)), features, atol=1e-4, rtol=1e-4)
        if plain.class_names:
            torch.testing.assert_close(compiled.class_probabilities(features), plain.class_probabilities(features), atol=1e-5, rtol=1e-3)
    for attribute in runtime.FACTS:
        assert getattr(compiled, attribute) == getattr(plain, attribute), attribute
    assert (compiled.first.name, compiled.first.weights_hash) == (plain.first.name, plain.first.weights_hash)
    assert (compiled.first is compiled) == (plain.first is plain)


def test_an_image_has_the_same_features_in_any_batch(place):
    compiled = load_encoder(CNN, 64, runtime="openvino")
    together = compiled(images(5, 64))
    assert torch.equal(together, torch.cat([compiled(one[None]) for one in images(5, 64)]))


def test_what_is_kept_is_taken_and_what_is_damaged_is_made_anew(place, monkeypatch):
    load_encoder(CNN, 64, runtime="openvino")
    kept = sorted((place / "openvino").iterdir())
    contents = [file.read_bytes() for file in kept]
    assert len(kept) == 4  # tokens and classes, each with its record
    built, original = [], encoder_module.ImageEncoder
    monkeypatch.setattr(encoder_module, "ImageEncoder", lambda *arguments: built.append(arguments) or original(*arguments))
    features = load_encoder(CNN, 64, runtime="openvino")(images(2, 64))
    assert not built  # nor is timm asked
    for file, damage in ((kept[0], b"{}"), (kept[1], contents[1][:-100] + b"\0" * 100), (kept[3], b"")):
        file.write_bytes(damage)
        assert torch.equal(load_encoder(CNN, 64, runtime="openvino")(images(2, 64)), features)
        assert len(built) == 1 and built.pop()
        load_encoder(CNN, 64, runtime="openvino")
        assert not built  # whole again


def test_other_weights_are_another_network(place):
    before = load_encoder(CNN, 64, runtime="openvino")(images(1, 64))
    torch.manual_seed(7)
    import timm

    save_file(timm.create_model(CNN, num_classes=1000).state_dict(), place / f"{CNN}.safetensors")
    after = load_encoder(CNN, 64, runtime="openvino")
    assert not torch.allclose(after(images(1, 64)), before)
    torch.testing.assert_close(after(images(1, 64)), load_encoder(CNN, 64)(images(1, 64)), atol=1e-4, rtol=1e-4)


def test_a_folder_that_cannot_be_written_costs_time_alone(place, capsys):
    (place / "openvino").write_text("a file")
    found = load_encoder(CNN, 64, runtime="openvino")(images(1, 64))
    torch.testing.assert_close(found, load_encoder(CNN, 64)(images(1, 64)), atol=1e-4, rtol=1e-4)
    assert "cannot be kept" in capsys.readouterr().err


FIRST_CALLS = """
import sys, threading
sys.path.insert(0, {root!r})
sys.setswitchinterval(1e-6)
import torch
from pathlib import Path
from runtime import Network
network = Network("first", lambda: (torch.nn.Linear(4, 4), (torch.zeros(2, 4),), [[-1, 4]], {{}}), Path({folder!r}))
together, found = threading.Barrier(8), []
def ask():
    together.wait()
    found.append(network(torch.ones(2, 4)))
threads = [threading.Thread(target=ask) for _ in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert len(found) == 8 and all(torch.equal(one, found[0]) for one in found)
"""


def test_the_first_calls_of_several_threads_end(tmp_path):
    """In OpenVINO's binding alone, every other such start waits for ever."""
    for _ in range(3):
        code = FIRST_CALLS.format(root=str(ROOT), folder=str(tmp_path))
        subprocess.run([sys.executable, "-c", code], check=True, timeout=100)


def test_sentences(tmp_path):
    write_bert(tmp_path / "bert")
    plain, compiled, again = (TextEncoder(tmp_path / "bert", runtime=kind) for kind in ("torch", "openvino", "openvino"))
    texts = ["a red picture", "the colour blue is there .", "dog"]
    with torch.inference_mode():
        hidden, mask = plain.lower(texts, 0)
        for text in compiled, again:
            found, its_mask = text.lower(texts, 0)
            assert torch.equal(its_mask, mask)
            torch.testing.assert_close(found * mask[:, :, None], hidden * mask[:, :, None], atol=1e-4, rtol=1e-4)
            assert (text.dim, text.weights_hash, text.frozen_hash(0)) == (plain.dim, plain.weights_hash, plain.frozen_hash(0))


def test_our_clip(place):
    config = ClipConfig(encoder=CNN, image_size=64, width=32, attention_heads=2, cell_dim=8, text_heads=2)
    torch.manual_seed(0)
    model = ClipSmall(config, config.load_encoder(), TextEncoder(place / "bert")).eval()
    with torch.inference_mode():
        model.image_head.measure([model.encoder(images(40, 64, seed=1))], model.encoder)
    model.save("clip.safetensors", {})
    plain, compiled = (ClipSmall.load("clip.safetensors", runtime=kind) for kind in ("torch", "openvino"))
    assert plain.text_digest == compiled.text_digest
    with torch.inference_mode():
        torch.testing.assert_close(compiled.embed_texts(["a dog", "a blue fish"]), plain.embed_texts(["a dog", "a blue fish"]),
                                   atol=1e-3, rtol=1e-3)
        one, other = (clip.embed_images(clip.encoder(images(3, 64))) for clip in (compiled, plain))
        torch.testing.assert_close(one, other, atol=1e-2, rtol=1e-2)  # of statistics divided by small deviations


@pytest.mark.parametrize("generation", [GenerationConfig(1), GenerationConfig(3), GenerationConfig(sample=True, seed=4)])
def test_captions_are_the_same(place, generation):
    config = CaptionerConfig(encoder=CNN, image_size=64, projection_dim=64, concepts=4)
    torch.manual_seed(0)
    model = Captioner(config, config.load_encoder(), config.load_decoder(place / "decoder.safetensors")).eval()
    for parameter in model.trained_parameters().values():
        parameter.data.normal_(std=0.3)
    model.save("captioner.safetensors")
    plain, compiled = (Captioner.load("captioner.safetensors", place / "decoder.safetensors", runtime=kind) for kind in ("torch", "openvino"))
    found = plain.caption(images(6, 64), generation)
    assert compiled.caption(images(6, 64), generation) == found and len(set(found)) > 1


def test_training_fills_its_cache_with_it(place):
    config = CaptionerConfig(encoder=VIT, image_size=32, projection_dim=64)
    data = {"data": "data", "decoder": "decoder.safetensors", "views": 1, "epochs": 1, "scst_epochs": 0, "selection": 4}
    plain, compiled = (CaptionerTrainer(config, Settings(**data, runtime=kind, output=f"{kind}.safetensors", cache=f"cache_{kind}"))
                       for kind in ("torch", "openvino"))
    assert [file.name for part in (plain, compiled) for file in part.data.features.parts[0].files[:1]].count(
        plain.data.features.parts[0].files[0].name) == 2  # either may go on from the other's
    one, other = (trainer.data.features[np.arange(8), np.zeros(8, int)].float() for trainer in (plain, compiled))
    assert type(compiled.model.encoder) is CompiledEncoder and type(plain.model.encoder) is not CompiledEncoder
    torch.testing.assert_close(one, other, atol=4e-3, rtol=2e-3)  # in fp16
    assert compiled.fit()


def test_which_runtime(monkeypatch, capsys):
    assert pick_runtime("auto", "cpu") == pick_runtime("openvino", "cpu") == "openvino"
    assert pick_runtime("torch", "cpu") == pick_runtime("auto", "cuda") == "torch"
    with pytest.raises(UserError, match="choose from auto, openvino, torch"):
        pick_runtime("onnx", "cpu")
    with pytest.raises(UserError, match="for the CPU"):
        pick_runtime("openvino", "cuda")
    assert capsys.readouterr().err == ""
    monkeypatch.setitem(sys.modules, "openvino", None)  # as if it were not installed
    assert pick_runtime("auto", "cpu") == "torch" and "PyTorch encodes" in capsys.readouterr().err
    with pytest.raises(UserError, match="pip install openvino"):
        pick_runtime("openvino", "cpu")


def test_a_network_that_openvino_cannot_take_is_said(tmp_path, monkeypatch):
    def broken(*arguments):
        raise RuntimeError("Check 'false' failed")

    monkeypatch.setattr(runtime.Network, "trace", broken)
    with pytest.raises(UserError, match="--runtime torch"):
        runtime.Network("x", lambda: (torch.nn.Identity(), (torch.zeros(1),), [[1]], {}), tmp_path)


def test_nothing_is_reported_to_anybody():
    """OpenVINO's own converter tells its makers; what this uses does not."""
    source = open(runtime.__file__, encoding="utf-8").read()
    assert "openvino.convert_model" not in source and "ov.convert_model" not in source


def test_a_signal_is_survived_after_openvino_is_gone(tmp_path):
    """OpenVINO gives the thread a stack for signals and frees it: a SIGTERM after that killed what should have saved its state."""
    script = """
import gc, os, signal, sys, torch
from runtime import Network
caught = []
signal.signal(signal.SIGTERM, lambda *arguments: caught.append(1))
networks = [Network([number], lambda: (torch.nn.Linear(3, 2), (torch.zeros(2, 3),), [[-1, 3]], {}), sys.argv[1]) for number in range(2)]
assert networks[1](torch.ones(4, 3)).shape == (4, 2)
while networks:  # each puts back what was before it: the first nothing, the second the first's
    networks.pop(0)
    gc.collect()
os.kill(os.getpid(), signal.SIGTERM)
print(caught)
"""
    for _ in "made", "kept":
        done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, cwd=ROOT)
        assert (done.returncode, done.stdout) == (0, "[1]\n"), done.stderr
    assert len([*tmp_path.glob("*.openvino")]) == 2
