"""p2_infer.py: refused inputs and their messages, skipped pictures, and the output."""

import json
import os
import pickle
import shutil
import signal
import stat
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import cli
import encoder
import p2_infer
import p2_tune
from captioner import EMBEDDED_CHECKPOINT, EMBEDDED_DECODER, Captioner, CaptionerConfig
from decoder import Decoder, DecoderConfig
from encoder import ImageEncoder
from features import make_view
from generation import GenerationConfig
from images import load_image
from runtime import pick_runtime
from tokenizer import END_OF_TEXT, BPETokenizer

ROOT = Path(__file__).resolve().parent.parent
WORDS = " a small brown dog and two cats sit near the old red boat while children play on green grass"


# ---- a small random model --------------------------------------------------------------------------------------


def randomize(parameters, seed, std):
    """Matrices so random that different pictures get different captions."""
    torch.manual_seed(seed)
    for parameter in parameters:
        if parameter.ndim > 1:
            parameter.data.normal_(std=std)


def make_encoder_weights(folder, seed):
    """Weights where ImageEncoder looks for those of its name."""
    model = ImageEncoder("test_vit", 32, "random").model
    randomize(model.parameters(), seed, std=0.3)
    folder.mkdir()
    save_file(model.state_dict(), folder / "test_vit.safetensors")


def make_decoder_weights(path, seed, width=64, vocab_size=END_OF_TEXT + 1):
    decoder = Decoder(DecoderConfig(vocab_size=vocab_size, n_positions=24, n_embd=width, n_layer=1))
    randomize(decoder.parameters(), seed, std=0.1)
    torch.save(decoder.pretrained_state(), path)


def make_checkpoint(path, decoder_weights, seed):
    config = CaptionerConfig(encoder="test_vit", image_size=32, projection_layers=0, projection_dim=64,
                             lora_rank=8, lora_targets=("q", "v"))
    token_ids = torch.tensor(sorted({END_OF_TEXT, *BPETokenizer().encode(WORDS)}))
    model = Captioner(config, ImageEncoder(config.encoder, config.image_size), config.load_decoder(decoder_weights),
                      token_ids)
    randomize(model.trained_parameters().values(), seed, std=0.3)
    model.save(path)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with decoder.bin and other_decoder.bin, checkpoints of both, and the encoder's weights in encoder/."""
    folder = tmp_path_factory.mktemp("models")
    make_encoder_weights(folder / "encoder", seed=1)
    make_encoder_weights(folder / "other_encoder", seed=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoder, "WEIGHTS_FOLDER", folder / "encoder")
        for name, seed in ("decoder", 3), ("other_decoder", 4):
            make_decoder_weights(folder / f"{name}.bin", seed)
            make_checkpoint(folder / f"{name}_checkpoint.safetensors", folder / f"{name}.bin", seed)
        make_checkpoint(folder / "second_checkpoint.safetensors", folder / "decoder.bin", seed=5)
    return folder


@pytest.fixture(autouse=True)
def place(models, tmp_path, monkeypatch):
    """Each test runs in a folder of its own, with five pictures in images/."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(encoder, "WEIGHTS_FOLDER", models / "encoder")
    make_images("images", "one.png", "two.png", "three.png", "four.png", "five.png")
    return tmp_path


def make_images(folder, *names):
    Path(folder).mkdir(exist_ok=True)
    random = np.random.default_rng(0)
    for name in names:
        colours = random.integers(0, 256, (3, 4, 3), dtype=np.uint8)
        Image.fromarray(colours).resize((50, 40)).save(Path(folder, name))


@dataclass
class Run:
    status: int
    stderr: str
    lines: list


@pytest.fixture
def infer(monkeypatch, capfd):
    """Run p2_infer.py with these arguments: its exit status and what it says on stderr, warnings included."""

    def infer(*arguments):
        monkeypatch.setattr(sys, "argv", ["p2_infer.py", *map(str, arguments)])
        with warnings.catch_warnings(record=True) as warned, pytest.raises(SystemExit) as exit:
            warnings.simplefilter("always", UserWarning)
            cli.run(p2_infer.main)
        stderr = capfd.readouterr().err + "".join(f"{warning.message}\n" for warning in warned)
        return Run(exit.value.code, stderr, stderr.splitlines())

    return infer


def contents(folder):
    return {path: (path.lstat().st_mtime_ns, path.read_bytes() if path.is_file() else None)
            for path in Path(folder).rglob("*")}


@pytest.fixture
def refused(infer, place):
    """Run with a mistake: status 2, one line that holds these words, nothing written."""

    def refused(*arguments, says):
        before = contents(place)
        run = infer(*arguments)
        assert run.status == 2, run.stderr
        assert len(run.lines) == 1 and run.stderr.startswith("p2_infer.py: ") and run.stderr.endswith("\n"), run.stderr
        for words in says:
            assert words in run.stderr
        assert contents(place) == before

    return refused


@pytest.fixture
def weights(models):
    return models / "decoder.bin", models / "decoder_checkpoint.safetensors"


def read(path):
    return json.loads(Path(path).read_bytes().decode("utf-8"))


# ---- mistakes in the arguments ---------------------------------------------------------------------------------


def test_image_folder_that_cannot_be_used(refused, weights):
    Path("empty").mkdir()
    make_images("twice", "cat.png", "cat.JPG", "dog.png")
    for folder, *says in [("empty", "empty holds no images"), ("gone", "gone does not exist"),
                          ("images/one.png", "one.png is a file"), ("twice", "cat.png", "cat.JPG", "rename one")]:
        refused(folder, "out.json", *weights, says=says)


def test_output_that_cannot_be_written(refused, weights):
    Path("results").mkdir()
    os.mkfifo("pipe")
    for output, *says in [("gone/out.json", "folder gone does not exist"), ("results", "is a folder"),
                          ("pipe", "not an ordinary file")]:
        refused("images", output, *weights, says=[output, *says])


@pytest.mark.parametrize("read_only, mode", [("results/out.json", 0o444), ("results", 0o555)])
def test_read_only_output(refused, weights, read_only, mode):
    """For root as well, whom the system would let through."""
    Path("results").mkdir()
    Path("results/out.json").write_text("{}")
    os.chmod(read_only, mode)
    try:
        refused("images", "results/out.json", *weights, says=["results/out.json", f"{read_only} is read-only"])
    finally:
        os.chmod(read_only, 0o755)


@pytest.mark.parametrize("options, says", [
    (["--beam_size", "0"], "beam_size"), (["--beam_size", "many"], "many"), (["--top_p", "1.5"], "top_p"),
    (["--temperature", "0"], "temperature"), (["--max_length", "0"], "max_length"), (["--batch_size", "0"], "batch_size"),
    (["--beams", "3"], "--beams"), (["a", "b", "c"], "unrecognized")])
def test_bad_options(refused, weights, options, says):
    refused("images", "out.json", *weights, *options, says=[says])


def test_no_arguments(refused):
    refused(says=["images, output", "--help"])


# ---- wrong weights ---------------------------------------------------------------------------------------------


def cut(source, target, size):
    Path(target).write_bytes(Path(source).read_bytes()[:size])
    return target


def test_missing_weights(refused, weights):
    refused("images", "out.json", "gone.bin", says=["decoder weights gone.bin does not exist"])
    refused("images", "out.json", weights[0], "gone.safetensors", says=["checkpoint gone.safetensors does not exist"])


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("size", [0, 1, 100, 1500, 500_000, -1])
def test_truncated_decoder(refused, weights, zipped, size):
    torch.save(torch.load(weights[0]), "whole.bin", _use_new_zipfile_serialization=zipped)
    cut("whole.bin", "cut.bin", size)
    refused("images", "out.json", "cut.bin", weights[1], says=["decoder weights cut.bin", "damaged"])


def test_truncated_safetensors(refused, weights):
    save_file({name: tensor.contiguous() for name, tensor in torch.load(weights[0]).items()}, "whole.safetensors")
    for size in 0, 5, 300, 500_000:
        cut("whole.safetensors", "cut.safetensors", size)
        refused("images", "out.json", "cut.safetensors", weights[1], says=["decoder weights cut.safetensors", "damaged"])
        cut(weights[1], "cut.safetensors", min(size, 20_000))
        refused("images", "out.json", weights[0], "cut.safetensors", says=["checkpoint cut.safetensors", "damaged"])


@pytest.mark.parametrize("state, says", [
    ({"fc.weight": torch.ones(2, 2)}, "GPT-2"), ({}, "GPT-2"), ({"model": {"a": torch.ones(1)}}, "state dict"),
    ([torch.ones(1)], "state dict"), ({1: torch.ones(1)}, "state dict"),
    ({"wte.weight": torch.ones(300, 64), "wpe.weight": torch.ones(9, 64)}, "GPT-2"),
    ({"wte.weight": torch.ones(300, 64), "wpe.weight": torch.ones(()), "h.0.ln_1.bias": torch.ones(64)}, "GPT-2"),
    ({"wte.weight": torch.ones(300, 64), "wpe.weight": torch.ones(9, 64), "h.0.ln_1.bias": torch.ones(64)}, "lacks"),
    ({"wte.weight": torch.ones(300, 60), "wpe.weight": torch.ones(9, 60), "h.0.ln_1.bias": torch.ones(60)}, "64 wide")])
def test_decoder_that_is_something_else(refused, weights, state, says):
    torch.save(state, "other.bin")
    refused("images", "out.json", "other.bin", weights[1], says=["GPT-2" if says == "lacks" else "", says])


def test_decoder_that_is_no_weights_at_all(refused, weights):
    Path("page.bin").write_text("<!DOCTYPE html><title>Quota exceeded</title>")
    Path("page.safetensors").write_text("<!DOCTYPE html><title>Quota exceeded</title>")
    for name in "page.bin", "page.safetensors":
        refused("images", "out.json", name, weights[1], says=[name, "another format"])


class Evil:
    """Unpickled, it leaves a file behind."""

    def __reduce__(self):
        return open, ("it ran", "w")


def test_pickle_that_would_run_code_is_not_run(refused, weights):
    Path("raw.bin").write_bytes(pickle.dumps(Evil()))
    Path("raw2.bin").write_bytes(pickle.dumps({"wte.weight": Evil()}, protocol=2))
    torch.save({"wte.weight": Evil()}, "saved.bin")
    torch.save({"wte.weight": Evil()}, "legacy.pt", _use_new_zipfile_serialization=False)
    for name in "raw.bin", "raw2.bin", "saved.bin", "legacy.pt":
        refused("images", "out.json", name, weights[1], says=[name, "was not loaded"])
        refused("images", "out.json", weights[0], name, says=[name])
    assert not Path("it ran").exists()
    pickle.loads(Path("raw.bin").read_bytes())
    assert Path("it ran").exists()  # it would have


def test_checkpoint_with_another_decoder(refused, models):
    refused("images", "out.json", models / "decoder.bin", models / "other_decoder_checkpoint.safetensors",
            says=["other_decoder_checkpoint.safetensors", "other decoder weights", "decoder.bin"])


@pytest.mark.parametrize("sizes", [dict(width=128), dict(vocab_size=300)])
def test_checkpoint_with_a_decoder_of_another_size(refused, weights, sizes):
    make_decoder_weights("wide.bin", seed=3, **sizes)
    refused("images", "out.json", "wide.bin", weights[1], says=["other decoder weights", "wide.bin"])


def test_checkpoint_with_another_encoder(refused, models, weights, monkeypatch):
    monkeypatch.setattr(encoder, "WEIGHTS_FOLDER", models / "other_encoder")
    refused("images", "out.json", *weights, says=["other encoder weights", "test_vit"])


def test_encoder_weights_that_are_damaged(refused, models, weights, monkeypatch):
    monkeypatch.setattr(encoder, "WEIGHTS_FOLDER", Path("cut"))
    Path("cut").mkdir()
    cut(models / "encoder" / "test_vit.safetensors", "cut/test_vit.safetensors", 100_000)
    refused("images", "out.json", *weights, says=["encoder weights cut/test_vit.safetensors", "damaged"])


def test_checkpoint_that_is_something_else(refused, models, weights):
    refused("images", "out.json", weights[0], models / "encoder" / "test_vit.safetensors", says=["not a checkpoint"])
    refused("images", "out.json", weights[0], weights[0], says=["decoder.bin is damaged or of another format"])


# ---- the newest checkpoint -------------------------------------------------------------------------------------


def test_newest_checkpoint_of_the_decoder_is_taken(infer, models, weights):
    Path("checkpoints").mkdir()
    for age, name in enumerate(["other_decoder_checkpoint", "second_checkpoint", "decoder_checkpoint"]):
        shutil.copy(models / f"{name}.safetensors", "checkpoints")
        os.utime(f"checkpoints/{name}.safetensors", (1e9 - age, 1e9 - age))
    Path("checkpoints/unfinished.safetensors").write_bytes(b"half")
    assert infer("images", "found.json", weights[0]).status == 0
    assert infer("images", "named.json", weights[0], models / "second_checkpoint.safetensors").status == 0
    assert infer("images", "older.json", *weights).status == 0
    assert read("found.json") == read("named.json") != read("older.json")


def test_no_checkpoint_of_the_decoder(refused, models, weights):
    refused("images", "out.json", weights[0], says=["no checkpoint in checkpoints", "p2_train.py --decoder"])
    Path("checkpoints").mkdir()
    shutil.copy(models / "other_decoder_checkpoint.safetensors", "checkpoints")
    refused("images", "out.json", weights[0], says=["no checkpoint in checkpoints", "p2_train.py --decoder"])


# ---- captions --------------------------------------------------------------------------------------------------


def test_output_is_utf8_json_with_a_caption_for_each_stem(infer, weights):
    names = ["with space.png", "it's \"quoted\".jpg", "Übung 狗 🐕.PNG", "v1.2.final.webp", "-dash.gif", "a\\b.bmp"]
    make_images("my images", *names)
    run = infer("my images", "out.json", *weights)
    assert run.status == 0 and "6 captions in out.json" in run.stderr
    text = Path("out.json").read_bytes().decode("utf-8")
    captions = json.loads(text)
    assert list(captions) == sorted(name.rpartition(".")[0] for name in names)
    assert "Übung 狗 🐕" in text  # itself, not its escapes
    assert set(" ".join(captions.values()).lower().split()) <= set(WORDS.lower().split()) and any(captions.values())
    assert all(caption[:1] == caption[:1].upper() for caption in captions.values())
    assert stat.S_IMODE(os.stat("out.json").st_mode) == 0o666 & ~current_umask()


def current_umask():
    umask = os.umask(0)
    os.umask(umask)
    return umask


def test_file_name_that_is_not_utf8(infer, weights):
    name = os.fsdecode(b"caf\xe9.png")
    try:
        Path("images/one.png").rename(Path("images", name))
    except OSError:
        pytest.skip("the file system takes UTF-8 names only")
    assert infer("images", "out.json", *weights).status == 0
    assert sorted(read("out.json")) == sorted([name.removesuffix(".png"), "two", "three", "four", "five"])


def test_unreadable_images_are_named_and_the_others_captioned(infer, weights):
    assert infer("images", "before.json", *weights).status == 0
    Path("images/text.jpg").write_text("not a picture")
    Path("images/empty file.png").touch()
    Path("images/lost.png").symlink_to("nowhere.png")
    Image.effect_noise((200, 200), 90).save("images/whole.jpg")
    cut("images/whole.jpg", "images/truncated.jpg", 5000)
    Path("images/whole.jpg").unlink()
    run = infer("images", "out.json", *weights, "--batch_size", 2)
    assert run.status == 3
    for name, reason in [("text.jpg", "not an image"), ("empty file.png", "the file is empty"),
                         ("truncated.jpg", "truncated"), ("lost.png", "No such file")]:
        assert any(f"skipped images/{name}: " in line and reason in line for line in run.lines), run.stderr
    assert "4 of 9 images could not be read" in run.stderr
    assert read("out.json") == read("before.json")


def test_folder_of_unreadable_images_only(infer, weights):
    Path("bad").mkdir()
    Path("bad/text.jpg").write_text("not a picture")
    assert infer("bad", "out.json", *weights).status == 3
    assert read("out.json") == {}


@pytest.mark.parametrize("options", [["--beam_size", 1], ["--length_penalty", 1], ["--sample", "--top_p", 0.9]],
                         ids=["greedy", "beam", "sample"])
def test_captions_are_the_same_at_any_batch_size(infer, weights, options):
    make_images("many", *(f"{'x' * i}.png" for i in range(1, 13)))
    Path("many/bad.png").touch()
    for size in 1, 7, 32:
        assert infer("many", f"{size}.json", *weights, *options, "--batch_size", size).status == 3
    assert read("1.json") == read("7.json") == read("32.json")
    assert len(read("1.json")) == 12 and len(set(read("1.json").values())) > 3


def test_a_checkpoint_says_how_it_is_searched_unless_one_says_otherwise(infer, weights):
    shutil.copy(weights[1], "recorded.safetensors")
    p2_tune.write_generation("recorded.safetensors", GenerationConfig(beam_size=1, max_length=3))
    said = {}
    for name, arguments in {"plain": weights, "recorded": (weights[0], "recorded.safetensors"),
                            "named": (*weights, "--beam_size", 1, "--max_length", 3),
                            "otherwise": (weights[0], "recorded.safetensors", "--beam_size", 3, "--max_length", 40)}.items():
        assert infer("images", f"{name}.json", *arguments).status == 0
        said[name] = read(f"{name}.json")
    assert said["recorded"] == said["named"] != said["otherwise"] == said["plain"]


def test_all_tokens_lifts_the_limit_to_training_captions(infer, weights):
    assert infer("images", "out.json", *weights, "--all_tokens").status == 0
    words = {word for caption in read("out.json").values() for word in caption.split()}
    assert words - set(WORDS.split())


# ---- the output is whole or not there --------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["fsync", "replace", "chmod"])
def test_failure_while_writing_leaves_the_old_output(infer, weights, monkeypatch, call):
    Path("results").mkdir()
    Path("results/out.json").write_text('{"old": ""}')

    def fail(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, call, fail)
    run = infer("images", "results/out.json", *weights)
    assert run.status == 1 and "No space left on device" in run.lines[-1]
    assert [path.name for path in Path("results").iterdir()] == ["out.json"]
    assert Path("results/out.json").read_text() == '{"old": ""}'


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_killed_run_leaves_the_old_output(call):
    Path("out.json").write_text("old")
    script = (f"import os, sys, time; sys.path.insert(0, {str(ROOT)!r}); import files\n"
              f"os.{call} = lambda *_: (print('now', flush=True), time.sleep(60))\n"
              "files.write_json('out.json', {str(i): 'a caption' for i in range(10_000)})")
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"now\n"
        process.send_signal(signal.SIGKILL)
    assert Path("out.json").read_text() == "old"
    assert not [path for path in Path().glob("*.json") if path.name != "out.json"]


def test_output_that_is_a_link_stays_one(infer, weights):
    Path("results").mkdir()
    Path("out.json").symlink_to("results/real.json")
    assert infer("images", "out.json", *weights).status == 0
    assert Path("out.json").is_symlink() and len(read("results/real.json")) == 5


def test_interruption_is_one_line(infer, weights, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(p2_infer, "caption_folder", interrupt)
    run = infer("images", "out.json", *weights)
    assert run.status == 130 and run.stderr == "p2_infer.py: interrupted\n" and not Path("out.json").exists()


# ---- the embedded model ----------------------------------------------------------------------------------------


def test_hw3_2_captions_a_real_folder_with_the_embedded_model(place):
    folder = place / "my pictures"
    folder.mkdir()
    for name in "cat", "coffee", "temple":
        shutil.copy(ROOT / "samples" / f"{name}.jpg", folder)
    good = sorted(path.stem for path in folder.glob("*.jpg"))
    (folder / "a text.jpg").write_text("not a picture")
    (folder / "nothing.png").touch()
    cut(folder / "cat.jpg", folder / "half a cat.jpg", 9000)
    run = subprocess.run(["bash", ROOT / "hw3_2.sh", "my pictures", "captions.json"], cwd=place, capture_output=True,
                         text=True, env=os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
                                                      "VIRTUAL_ENV": sys.prefix})
    assert run.returncode == 3, run.stderr
    captions = read("captions.json")
    assert sorted(captions) == good
    assert all(len(caption.split()) >= 3 for caption in captions.values()), captions
    for name in "a text.jpg", "nothing.png", "half a cat.jpg":
        assert f"skipped my pictures/{name}: " in run.stderr


@pytest.mark.openvino
@pytest.mark.parametrize("beam_size", [1, 3])
def test_embedded_captions_are_the_same_at_any_batch_size(beam_size, monkeypatch):
    monkeypatch.setattr(encoder, "WEIGHTS_FOLDER", ROOT / "weights")
    model = Captioner.load(EMBEDDED_CHECKPOINT, EMBEDDED_DECODER, runtime=pick_runtime("auto", "cpu"))
    pictures = [make_view(load_image(path), view, seed=0) for path in sorted((ROOT / "samples").glob("*.jpg"))[:5]
                for view in range(2)]
    images = torch.stack([model.encoder.preprocess(picture) for picture in pictures])
    captions = {size: [caption for start in range(0, len(images), size)
                       for caption in model.caption(images[start:start + size], GenerationConfig(beam_size))]
                for size in (1, 4, 10)}
    assert captions[1] == captions[4] == captions[10]
