"""Training and captioning at scale: several processes, accumulation, precision, interruption, logs, configs."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import compare
import numpy as np
import pytest
import timm
import torch
import yaml
from conftest import ROOT, VIT, finish, quick_tokens, start
from safetensors.torch import load_file, save_file

import dataset
import devices
import encoder
import p2_train
import training
from captioner import CaptionerConfig, count_trained, read_metadata
from cli import UserError, with_config
from encoder import ImageEncoder
from features import FeatureCache, LiveFeatures
from images import ahead
from training import Interruption, TrainingLog

CONFIG = CaptionerConfig(encoder=VIT, image_size=32, projection_dim=64, lora_rank=2, dropout=0, projection_dropout=0,
                         patch_dropout=0)


def settings(**changes):
    return p2_train.Settings(**{"decoder": "decoder.safetensors", "epochs": 2, "batch_size": 5, "selection": 4, "views": 2,
                                "learning_rate": 3e-3, "scst_epochs": 1,
                                "average": 0.5} | changes)


def options(settings):
    """The same as a command line."""
    lines = []
    for holder in settings, CONFIG:
        for name, value in vars(holder).items():
            if isinstance(value, bool):
                lines.append(f"--{name}" if value else f"--no-{name}")
            elif isinstance(value, (tuple, list)):
                lines += [f"--{name}", *map(str, value)]
            else:
                lines.append(f"--{name}={value}")
    return lines


def lines(file):
    return [json.loads(line) for line in open(file, encoding="utf-8")]


def values(file):
    """Loss or reward of every update that was logged."""
    return [entry.get("loss", entry.get("reward")) for entry in lines(file) if "learning rate" in entry]


@pytest.fixture
def every_step(monkeypatch):
    monkeypatch.setattr(training, "LOG_STEPS", 1)


EVERY_STEP = "import training; training.LOG_STEPS = 1"


def stop_after(steps):
    return "\n".join([EVERY_STEP, "import training", f"calls = iter([False] * {steps - 1} + [True])",
                      "training.Interruption.__bool__ = lambda self: next(calls)"])


# ---- several processes -----------------------------------------------------------------------------------------


SHARDED = EVERY_STEP + """
from torch.distributed.tensor import DTensor
original = p2_train.CaptionerTrainer.finish_epoch
def check(self, epoch):
    for block in self.model.decoder.h:
        assert isinstance(block.mlp.c_fc.weight, DTensor) and not isinstance(block.cross.c_q.weight, DTensor)
    original(self, epoch)
p2_train.CaptionerTrainer.finish_epoch = check
move = p2_train.Captioner.to
def to(self, device):
    assert all(isinstance(block.mlp.c_fc.weight, DTensor) for block in self.decoder.h)  # the whole never moves to a GPU
    return move(self, device)
p2_train.Captioner.to = to
"""


@pytest.mark.parametrize("changes", [{}, {"fsdp": True, "accumulation": 2}], ids=["plain", "fsdp and accumulation"])
def test_two_processes_train_as_one(workplace, every_step, changes):
    p2_train.train(CONFIG, settings(output="checkpoints/one.safetensors"), "cpu")
    run = options(settings(output="checkpoints/two.safetensors", **changes))
    if changes:  # and go on after a stop at the end of an epoch
        out, _ = finish(start(*run, processes=2, before=stop_after(4)))
        assert "stopped in epoch 1 after 4 of 4 batches" in out
    out, _ = finish(start(*run, processes=2, before=SHARDED if changes else EVERY_STEP))
    assert "2 x cpu" in out and out.count("epoch 1:") == 1
    one, two = values("checkpoints/one.jsonl"), values("checkpoints/two.jsonl")
    assert len(one) == 12 and one[0] > one[7]
    assert two == pytest.approx(one, abs=1e-4)
    first, second = load_file("checkpoints/one.safetensors"), load_file("checkpoints/two.safetensors")
    assert first.keys() == second.keys()
    for name in first:
        assert torch.allclose(first[name].float(), second[name].float(), atol=2e-3), name
    history = [entry["CIDEr"] for entry in lines("checkpoints/two.jsonl") if "CIDEr" in entry]
    assert history == pytest.approx([entry["CIDEr"] for entry in lines("checkpoints/one.jsonl") if "CIDEr" in entry])


def test_a_run_goes_on_with_another_number_of_processes(workplace, every_step):
    """What one process leaves behind, two take up, and the other way round."""
    p2_train.train(CONFIG, settings(output="checkpoints/whole.safetensors"), "cpu")
    run = settings(output="checkpoints/parts.safetensors")
    for processes, where in ((1, "epoch 2 after 1 of 4"), (2, "epoch 3 after 2 of 4")):
        out, _ = finish(start(*options(run), processes=processes, before=stop_after(5)))
        assert f"stopped in {where} batches" in out and f"{processes} x cpu" in out
    p2_train.train(CONFIG, run, "cpu")
    assert values("checkpoints/parts.jsonl") == pytest.approx(values("checkpoints/whole.jsonl"), abs=1e-4)


SLOWLY = EVERY_STEP + """
import features, time
features.BLOCK = 1
encode, features.seen = encoder.ImageEncoder.forward, []
def forward(self, images):
    time.sleep(0.2)
    features.seen.append(len(images))
    return encode(self, images)
encoder.ImageEncoder.forward = forward
train = p2_train.CaptionerTrainer.fit
def fit(self):
    print("encoded", sum(features.seen), flush=True)
    return train(self)
p2_train.CaptionerTrainer.fit = fit
"""


def test_two_processes_encode_their_parts_and_stop_together(workplace, every_step):
    p2_train.train(CONFIG, settings(output="checkpoints/one.safetensors", cache="other", epochs=1, scst_epochs=0), "cpu")
    run = options(settings(output="checkpoints/two.safetensors", views=8, epochs=1, scst_epochs=0))  # four pictures a batch
    processes = start(*run, processes=2, before=SLOWLY)
    while not [*(workplace / "cache").glob("*.json")]:
        assert processes[0].is_alive()
        time.sleep(0.02)
    os.kill(processes[1].pid, signal.SIGTERM)  # to one of them only
    out, _ = finish(processes)
    assert out.count("stopped in encoding after ") == 1 and "encoded" not in out
    first = int(out.split("stopped in encoding after ")[1].split()[0])
    out, _ = finish(start(*run, processes=2, before=SLOWLY))
    counts = [int(line.split()[1]) // 8 for line in out.splitlines() if line.startswith("encoded")]
    assert 0 < first < 24 and len(counts) == 2 and sum(counts) == 24 - first
    assert out.count("epoch 1:") == 1 and not (workplace / "checkpoints" / "two.state.pt").exists()


def test_two_processes_caption_a_folder_as_one(workplace):
    p2_train.train(CONFIG, settings(scst_epochs=0), "cpu")
    folder = workplace / "data" / "images" / "train"
    (folder / "broken.jpg").write_bytes(b"not a picture")
    weights = "decoder.safetensors", "checkpoints/captioner.safetensors"
    for processes in 1, 2:
        _, err = finish(start(str(folder), f"{processes}.json", *weights, module="p2_infer", processes=processes), 3)
        assert err.count("skipped") == 1 and err.count("24 captions") == 1
    assert (workplace / "1.json").read_bytes() == (workplace / "2.json").read_bytes()
    assert len(json.loads((workplace / "1.json").read_text())) == 24


# ---- one process -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulation", [3])
def test_accumulated_parts_train_as_the_whole_batch(workplace, every_step, accumulation):
    p2_train.train(CONFIG, settings(output="checkpoints/whole.safetensors"), "cpu")
    p2_train.train(CONFIG, settings(output="checkpoints/parts.safetensors", accumulation=accumulation), "cpu")
    assert values("checkpoints/parts.jsonl") == pytest.approx(values("checkpoints/whole.jsonl"), abs=1e-4)


def test_a_loss_is_averaged_over_the_tokens_of_the_whole_batch(workplace):
    trainer = p2_train.CaptionerTrainer(CONFIG, settings(), "cpu")
    trainer.model.train()
    whole = trainer.data.batch([0, 1, 2], np.zeros(3, int))
    expected = trainer.model.loss(whole[0].float(), *whole[2:], 0.1)
    pieces = [([i], *trainer.data.batch([i], np.zeros(1, int))) for i in (0, 1, 2)]
    assert trainer.cross_entropy([0, 1, 2], pieces, 0) == pytest.approx(expected.item(), rel=1e-5)
    # Targets that are not scored count for nothing.
    assert trainer.cross_entropy.targets == [sum(len(row) + 1 for row in rows) for rows in trainer.data.rows]
    known = torch.tensor([token for token in trainer.model.token_ids.tolist() if token != trainer.data.rows[0][0][1]])
    assert dataset.count_targets(trainer.data.rows, known)[0] == trainer.cross_entropy.targets[0] - sum(
        row.count(trainer.data.rows[0][0][1]) for row in trainer.data.rows[0])


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_trains_nearly_alike_and_resumes(workplace, every_step, monkeypatch, precision):
    def run(name, **changes):
        return settings(output=f"checkpoints/{name}.safetensors", scst_epochs=0, **changes)

    config = replace(CONFIG, encoder="vit_tiny_patch16_224")  # whose features are learnt from at the same pace where updates are left out
    save_file(timm.create_model(config.encoder, img_size=32, num_classes=0).state_dict(), f"{config.encoder}.safetensors")
    p2_train.train(config, run("full"), "cpu")
    p2_train.train(config, run("half", precision=precision), "cpu")
    full, half = values("checkpoints/full.jsonl"), values("checkpoints/half.jsonl")
    assert half != full and half[0] == pytest.approx(full[0], rel=0.02)
    # Until its scale has come down, fp16 leaves out updates.
    assert half[-3:] == pytest.approx(full[-3:], rel=0.2)

    trainer = p2_train.CaptionerTrainer(config, run("parts", precision=precision), "cpu")
    assert (trainer.scaler is not None) == (precision == "fp16")
    calls = iter([False] * 4 + [True] * 9)
    monkeypatch.setattr(Interruption, "__bool__", lambda self: next(calls))
    assert trainer.fit() is False
    if trainer.scaler:
        state = torch.load("checkpoints/parts.state.pt")["scaler"]
        assert state == trainer.scaler.state_dict() and state["_growth_tracker"] > 0
    monkeypatch.setattr(Interruption, "__bool__", lambda self: False)
    p2_train.train(config, run("parts", precision=precision), "cpu")
    assert values("checkpoints/parts.jsonl") == half
    first, second = load_file("checkpoints/half.safetensors"), load_file("checkpoints/parts.safetensors")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_mistakes_show_before_anything_is_encoded(workplace, monkeypatch):
    monkeypatch.setattr(p2_train, "features_of", None)
    with pytest.raises(UserError, match="precision is int8"):
        p2_train.train(CONFIG, settings(precision="int8"), "cpu")
    with pytest.raises(UserError, match="accelerate launch"):
        p2_train.train(CONFIG, settings(fsdp=True), "cpu")
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match="pip install tensorboard"):
        p2_train.train(CONFIG, settings(tensorboard="board"), "cpu")
    for wrong in {"learning_rate": 0.0}, {"seed": -1}, {"accumulation": 0}, {"average": 1.0}, {"max_tokens": 0}:
        with pytest.raises(UserError, match=next(iter(wrong))):
            settings(**wrong)


def test_as_many_images_are_captioned_at_once_as_memory_holds(workplace, monkeypatch):
    trainer = p2_train.CaptionerTrainer(CONFIG, settings(), "cpu")
    sizes, generate = [], trainer.model.generate
    monkeypatch.setattr(trainer.model, "generate", lambda features, *rest, **named: sizes.append(len(features)) or generate(
        features, *rest, **named))
    trainer.model.eval()
    whole = trainer.caption_selection()
    monkeypatch.setattr(devices, "MEMORY", 1)
    assert trainer.caption_selection() == whole and sizes == [4, 1, 1, 1, 1]


def test_training_without_a_selection_split_keeps_the_last_epoch(workplace):
    history = p2_train.train(CONFIG, settings(selection=0, average=0.0), "cpu")
    assert ["cider" in entry for entry in history] == [False] * 3
    assert read_metadata("checkpoints/captioner.safetensors")["scores"]["selection"]["epoch"] == 3


# ---- features --------------------------------------------------------------------------------------------------


def test_features_worked_out_in_every_step_are_those_of_the_cache(workplace):
    encoder = ImageEncoder(VIT, 32)
    paths = sorted((workplace / "data" / "images" / "train").iterdir())[:6]
    cached, live = FeatureCache(encoder, paths, "cache", views=3), LiveFeatures(encoder, paths, views=3)
    assert len(cached) == len(live) == 6
    index = np.array([4, 0, 5, 4]), np.array([0, 2, 1, 1])
    torch.testing.assert_close(live[index], cached[index], atol=2e-3, rtol=1e-3)
    (workplace / "broken.png").write_bytes(b"x")
    with pytest.raises(UserError, match="broken.png cannot be read: not an image"):
        LiveFeatures(encoder, [workplace / "broken.png"])[np.array([0]), np.array([0])]


def test_training_with_the_encoder_in_the_loop_is_training_on_the_cache(workplace, every_step):
    p2_train.train(CONFIG, settings(output="checkpoints/cached.safetensors"), "cpu")
    p2_train.train(CONFIG, settings(output="checkpoints/live.safetensors", cache=""), "cpu")
    # Not exactly: the cache's batches are others, and its fp16 can fall to the other side.
    assert values("checkpoints/live.jsonl") == pytest.approx(values("checkpoints/cached.jsonl"), abs=1e-2)


def test_work_is_done_ahead_and_in_order():
    done = []
    results = ahead(lambda i: done.append(i) or i * i, range(6), count=2)
    assert next(results) == 0
    time.sleep(0.2)
    assert done == [0, 1, 2]
    assert list(results) == [1, 4, 9, 16, 25]

    def fail(i):
        raise UserError("broken")

    with pytest.raises(UserError, match="broken"):
        list(ahead(fail, range(2)))
    assert list(ahead(abs, [])) == []


# ---- interruption ----------------------------------------------------------------------------------------------

OFTEN = "\nimport training; training.LOG_STEPS, training.SAVE_MINUTES = 1, 0.005"
SLOW = "\n".join([EVERY_STEP, "import time", "original = training.step_optimizer",
                  "training.step_optimizer = lambda *arguments: (time.sleep(0.3), original(*arguments))[1]"])


def test_a_killed_run_goes_on_to_the_same_weights_bit_for_bit(workplace):
    """By SIGKILL in the first epoch, by SIGTERM in the second."""
    dropout = ["--dropout=0.1", "--projection_dropout=0.3", "--patch_dropout=0.3"]
    whole, killed = (settings(output=f"checkpoints/{name}.safetensors", scst_epochs=0, selection=0)
                     for name in ("whole", "killed"))
    finish(start(*options(whole), *dropout, before=OFTEN))
    log, state = (workplace / "checkpoints" / f"killed.{suffix}" for suffix in ("jsonl", "state.pt"))
    for how, updates in ((signal.SIGKILL, 3), (signal.SIGTERM, 6)):
        (process,) = start(*options(killed), *dropout, before=SLOW + OFTEN)
        while process.is_alive() and not (log.exists() and f'"update": {updates}' in log.read_text()):
            time.sleep(0.05)
        os.kill(process.pid, how)
        out, err = finish([process], 0 if how == signal.SIGTERM else -signal.SIGKILL)
        assert ("stopped in epoch 2" in out) == (how == signal.SIGTERM) and state.exists()
    finish(start(*options(killed), *dropout, before=OFTEN))
    first, second = load_file("checkpoints/whole.safetensors"), load_file("checkpoints/killed.safetensors")
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert values("checkpoints/whole.jsonl") == values("checkpoints/killed.jsonl")  # and no line is there twice
    assert not state.exists()


def test_a_run_stops_after_max_hours_and_goes_on(workplace):
    whole, parts = (settings(output=f"checkpoints/{name}.safetensors", selection=0) for name in ("whole", "parts"))
    p2_train.train(CONFIG, whole, "cpu")
    parts.max_hours = 1e-9
    for stop in range(2):
        assert p2_train.CaptionerTrainer(CONFIG, parts, "cpu").fit() is False
    parts.max_hours = 1.0
    assert p2_train.CaptionerTrainer(CONFIG, parts, "cpu").fit() is True
    first, second = load_file("checkpoints/whole.safetensors"), load_file("checkpoints/parts.safetensors")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_sigterm_is_python_s_again_after_training():
    script = """
import signal
from training import Interruption
before = signal.getsignal(signal.SIGTERM)
with Interruption() as interruption:
    assert not interruption
    signal.raise_signal(signal.SIGTERM)
    assert interruption
assert signal.getsignal(signal.SIGTERM) is before
print("still here", flush=True)
signal.raise_signal(signal.SIGTERM)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (-signal.SIGTERM, "still here\n"), done.stderr


# ---- logs ------------------------------------------------------------------------------------------------------


@pytest.mark.whole
def test_a_run_leaves_a_log_curves_samples_and_tensorboard_files(workplace, every_step, capsys):
    p2_train.train(CONFIG, settings(tensorboard="board"), "cpu")
    log = lines("checkpoints/captioner.jsonl")
    steps = [entry for entry in log if "learning rate" in entry]
    assert [entry["update"] for entry in steps] == list(range(1, 13))
    assert [entry["stage"] for entry in steps] == ["cross-entropy"] * 8 + ["scst"] * 4
    assert all(entry["gradient norm"] > 0 and entry["images per second"] > 0 for entry in steps)
    epochs = [entry for entry in log if "CIDEr" in entry]
    assert [entry["update"] for entry in epochs] == [4, 8, 12] and epochs[0]["memory"] > 1e6
    assert [*epochs[2]["captions"]] == ["20.png", "21.png", "22.png"]
    out = capsys.readouterr().out
    assert all(f"    {name}: {caption}" in out for name, caption in epochs[2]["captions"].items())
    with open("checkpoints/captioner.png", "rb") as file:
        assert file.read(4) == b"\x89PNG"
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator("board").Reload()
    assert [event.step for event in board.Scalars("CIDEr")] == [4, 8, 12]
    assert [event.value for event in board.Scalars("loss")] == pytest.approx([entry["loss"] for entry in steps[:8]])


@pytest.mark.whole
def test_a_log_drops_what_a_killed_run_wrote_after_its_last_state(tmp_path):
    log = TrainingLog(tmp_path / "run.jsonl")
    for update in 1, 2, 3:
        log.write(update, loss=float(update))
    with open(tmp_path / "run.jsonl", "a") as file:
        file.write('{"update": 4, "lo')
    log = TrainingLog(tmp_path / "run.jsonl", updates=2)
    log.write(3, loss=30.0, norm=float("inf"), name="é")
    log.close(["loss", "CIDEr", "norm"])
    assert lines(tmp_path / "run.jsonl") == [{"update": 1, "loss": 1.0}, {"update": 2, "loss": 2.0},
                                             {"update": 3, "loss": 30.0, "norm": None, "name": "é"}]
    assert (tmp_path / "run.png").exists()
    assert TrainingLog(tmp_path / "run.jsonl").entries == []  # a new run


# ---- bad data --------------------------------------------------------------------------------------------------


def test_odd_captions_are_announced_before_training(workplace, capsys):
    file = workplace / "data" / "train.json"
    data = json.loads(file.read_text())
    data["annotations"][0]["caption"] = "word " * 500
    data["annotations"][2]["caption"] = "  "
    data["annotations"][4]["caption"] = data["annotations"][5]["caption"] = "."  # the third image says nothing at all
    file.write_text(json.dumps(data))
    p2_train.train(CONFIG, settings(epochs=1, scst_epochs=0, max_tokens=20), "cpu")
    out = capsys.readouterr().out
    assert "1 images have no caption and are left out" in out and "1 captions are empty and left out" in out
    assert "1 captions are longer than 20 tokens and cut there" in out


@pytest.mark.parametrize("spoil, message", [
    (lambda data: data["images"].append({"id": 99, "file_name": "gone.png"}), "1 images of .* are not in .*gone.png"),
    (lambda data: data["images"].append(data["images"][0]), "two images with the id 0"),
    (lambda data: data["annotations"].append(data["annotations"][3]), "two captions with the id 3"),
    (lambda data: data["annotations"].append({"id": 99, "image_id": 99, "caption": "x"}), "99")])
def test_bad_captions_files_are_refused_before_training(workplace, spoil, message):
    file = workplace / "data" / "train.json"
    data = json.loads(file.read_text())
    spoil(data)
    file.write_text(json.dumps(data))
    with pytest.raises(UserError, match=message):
        p2_train.train(CONFIG, settings(), "cpu")


def test_broken_pictures_are_all_named_before_training(workplace):
    for name in "3.png", "7.png":
        (workplace / "data" / "images" / "train" / name).write_bytes(b"\x89PNG")
    with pytest.raises(UserError, match="2 images cannot be read.*3.png.*7.png"):
        p2_train.train(CONFIG, settings(), "cpu")
    assert not list((workplace / "checkpoints").glob("*.state.pt"))


# ---- configs ---------------------------------------------------------------------------------------------------


def test_a_config_stands_before_the_command_line(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("lora_rank: 8\nlearning_rate: 2e-4\nlora_targets: [q, v]\nfsdp: true\nall: false\ncache:\n")
    assert with_config(["--data", "d", "--config", str(file), "--lora_rank", "4"]) == [
        "--lora_targets", "q", "v", "--lora_rank=8", "--learning_rate=2e-4", "--fsdp", "--no-all", "--cache=",
        "--data", "d", "--lora_rank", "4"]
    file.write_text("mix: [a, b]")
    assert with_config(["one", "two", "--config", str(file), "--mix", "c"]) == ["one", "two", "--mix", "a", "b", "--mix", "c"]
    assert with_config(["--data", "d"]) == ["--data", "d"]
    for text, message in (("- a", "option: value"), ("config: a", "option: value"), ("a: [", "is not YAML")):
        file.write_text(text)
        with pytest.raises(UserError, match=message):
            with_config(["--config", str(file)])
    with pytest.raises(UserError, match="cannot read the config"):
        with_config(["--config", str(tmp_path / "gone.yaml")])


def dry_run(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["p2_train.py", "--dry_run", *arguments])
    p2_train.main()
    return capsys.readouterr().out


CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_every_recipe_is_counted_without_weights(file, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    out = dry_run(monkeypatch, capsys, "--config", str(file))
    assert "124M parameters, are taken" in out
    assert 0 < float(out.splitlines()[-1].split("M trained")[0]) <= 35


def test_dry_run_counts_what_training_trains(workplace, monkeypatch, capsys):
    out = dry_run(monkeypatch, capsys, *options(settings()))
    trained = p2_train.CaptionerTrainer(CONFIG, settings(), "cpu").model.num_trained()
    assert f"{trained / 1e6:.2f}M trained" in out and sum(count_trained(CONFIG, settings().decoder).values()) == trained
    monkeypatch.setattr(sys, "argv", ["p2_train.py", "--dry_run", "--lora_rank=2000", "--encoder", VIT])
    with pytest.raises(UserError, match="more than the 35M"):
        p2_train.main()


def test_a_small_cross_attention_has_few_parameters(tmp_path, monkeypatch):
    """On GPT-2, as SmallCap (Ramos et al. 2023, arXiv:2209.15323) shrinks it."""
    monkeypatch.chdir(tmp_path)
    parts = count_trained(CaptionerConfig(encoder="vit_base_patch32_clip_224", cross_dim=64, projection_dim=64, lora_rank=0),
                          "weights/decoder_model.bin")
    assert sum(parts.values()) < 2e6, parts


def test_all_options_are_in_the_checkpoint(workplace):
    p2_train.train(CONFIG, settings(epochs=1, scst_epochs=0), "cpu")
    metadata = read_metadata("checkpoints/captioner.safetensors")
    assert metadata["training"].keys() == p2_train.Settings.__dataclass_fields__.keys()
    assert metadata["model"].keys() == CaptionerConfig.__dataclass_fields__.keys()
    assert yaml.safe_load(yaml.safe_dump(metadata["training"])) == metadata["training"]


# ---- the comparison --------------------------------------------------------------------------------------------


def test_the_comparison_trains_scores_and_goes_on(workplace, monkeypatch, capsys):
    """With the embedded encoder and decoder, on pictures too small to learn much from."""
    if not (ROOT / "weights" / "tf_efficientnet_lite2.safetensors").exists():
        pytest.skip("run `bash hw3_download.sh` first")
    monkeypatch.setattr(encoder, "WEIGHTS_FOLDER", ROOT / "weights")
    monkeypatch.setattr(compare, "STUDIES", {"peft": {
        name: compare.HYBRID | {"image_size": 32, "lora_rank": rank} for name, rank in (("none", 0), ("lora4", 4))}})

    def train(command):
        assert command[:2] == [sys.executable, str(ROOT / "p2_train.py")]
        finish(start(*command[2:], before=f"encoder.WEIGHTS_FOLDER = Path({str(ROOT / 'weights')!r})"))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(compare.subprocess, "run", train)
    monkeypatch.setattr(compare, "tokenize", quick_tokens)
    data = workplace / "data"
    shutil.copy(data / "train.json", data / "val.json")
    (data / "images" / "val").symlink_to(data / "images" / "train")
    arguments = ["compare.py", "peft", "--images", "8", "--epochs", "1", "--views", "1", "--results", "peft.json"]
    for kinds in ["none"], ["none", "lora4"]:
        monkeypatch.setattr(sys, "argv", [*arguments, "--kinds", *kinds])
        compare.main()
    results = json.loads((workplace / "peft.json").read_text())
    assert [(entry["kind"], entry["seed"]) for entry in results["runs"]] == [("none", 0), ("lora4", 0)]
    none, lora = results["runs"]
    assert 0 < none["trained_parameters"] < lora["trained_parameters"] < 35e6
    assert all(entry["CIDEr"] >= 0 and entry["seconds_per_epoch"] > 0 and entry["memory_MB"] > 100 for entry in results["runs"])
    against = results["CIDEr_against_none_95"]["lora4"]
    assert against["low"] <= against["value"] <= against["high"]
    assert against["value"] == pytest.approx(lora["CIDEr"] - none["CIDEr"])
    assert len(json.loads((workplace / "output" / "peft" / "data" / "train.json").read_text())["images"]) == 8
    assert "| lora4 | 0 |" in capsys.readouterr().out
