"""Inputs that once broke something: inputs are not overwritten, and non-finite values are neither trained on nor accepted."""

import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from safetensors.torch import load_file, save_file
from test_captioner import make_captioner, save_decoder
from test_train import CONFIG, Interrupted, interrupt_after, settings

import captioner
import cli
import p1_clip_classify
import p2_evaluate
import p2_infer
import p2_train
import training
from captioner import Captioner
from checkpoints import find_weights
from cli import UserError
from dataset import clean_caption, read_captions
from decoder import Decoder
from devices import pick_precision
from features import FeatureCache
from files import check_output, check_writable, read_archive, read_json, read_lines, read_weights, write_json
from images import ImageError, image_files, load_image
from training import prepare_output, step_optimizer

CASES = ROOT.parent / "shared/cases"


# ---- outputs ---------------------------------------------------------------------------------------------------


def test_an_output_is_neither_read_nor_of_another_kind(tmp_path):
    (tmp_path / "in.json").write_text('{"a": "b"}')
    (tmp_path / "old.json").write_text("{}")
    os.link(tmp_path / "in.json", tmp_path / "same.json")
    (tmp_path / "weights.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    Image.new("RGB", (2, 2)).save(tmp_path / "picture.png")
    for name in "old.json", "new.json":
        check_output(tmp_path / name, "JSON", [tmp_path / "in.json", None, tmp_path / "nowhere"])
    check_output(tmp_path / "picture.png", "PNG")
    for name, kind, words in (("in.json", "JSON", "is an input"), ("same.json", "JSON", "is an input"),
                              ("weights.safetensors", "JSON", "not a JSON file"), ("picture.png", "JSON", "not a JSON file"),
                              ("picture.png", "CSV", "not a CSV file"), ("old.json", "PNG", "not a PNG file")):
        with pytest.raises(UserError, match=words):
            check_output(tmp_path / name, kind, [tmp_path / "in.json"])


def test_no_script_writes_over_what_it_reads(workplace, monkeypatch, capsys):
    (workplace / "pictures").mkdir()
    shutil.copy("data/images/train/0.png", "pictures/0.png")
    Path("predictions.json").write_text('{"0": "A dog"}')
    Path("references.json").write_text(json.dumps({"images": [{"id": 0, "file_name": "0.png"}],
                                                   "annotations": [{"id": 0, "image_id": 0, "caption": "A dog"}]}))
    Path("id2label.json").write_text('{"0": "dog"}')
    before = {path: path.read_bytes() for path in workplace.rglob("*") if path.is_file()}
    for script, *arguments in ((p2_infer, "pictures", "decoder.safetensors"), (p2_infer, "pictures", "pictures/0.png"),
                               (p2_infer, "pictures", "predictions.json", "--datastore", "predictions.json"),
                               (p2_evaluate, "--pred_file", "predictions.json", "--annotation_file", "references.json", "--out", "references.json"),
                               (p2_evaluate, "--pred_file", "predictions.json", "--annotation_file", "references.json", "--out", "predictions.json"),
                               (p1_clip_classify, "pictures", "id2label.json", "pictures/0.png")):
        monkeypatch.setattr(sys, "argv", [script.__name__, *arguments])
        with pytest.raises(UserError, match="overwrit|must end in"):
            script.main()
    assert before == {path: path.read_bytes() for path in workplace.rglob("*") if path.is_file()}


# ---- what is no number -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{"weight_decay": -0.1}, {"scst_learning_rate": float("nan")}, {"max_hours": float("inf")},
                                     {"fusion_learning_rate": -1e-3}, {"selection": (1,)}, {"data_weights": (float("nan"),)}])
def test_options_that_would_do_harm_are_refused(changes):
    with pytest.raises(UserError):
        settings(**changes)
    with pytest.raises(UserError, match="lora_alpha is nan"):
        replace(CONFIG, lora_alpha=float("nan"))


def test_a_clip_of_zero_clips_nothing():
    values = []
    for clip in 0.0, 1e9:
        parameter = torch.nn.Parameter(torch.zeros(2))
        optimizer = torch.optim.SGD([{"params": [parameter], "factor": 1.0}], 1.0)
        parameter.grad = torch.tensor([3.0, 4.0])
        assert step_optimizer(optimizer, 1.0, clip) == pytest.approx(5)
        values.append(parameter.tolist())
    assert values == [[-3.0, -4.0]] * 2
    parameter.grad = torch.tensor([float("nan"), 1.0])
    with pytest.raises(UserError, match="gradient is nan"):
        step_optimizer(optimizer, 1.0, 0.0)
    assert parameter.tolist() == [-3.0, -4.0]


def test_training_that_comes_apart_ends_and_keeps_what_was_good(workplace, monkeypatch):
    p2_train.train(CONFIG, settings(epochs=1, output="good.safetensors"), "cpu")
    kept = Path("good.safetensors").read_bytes()
    original, count = p2_train.cosine, iter(range(100))
    monkeypatch.setattr(p2_train, "cosine", lambda *arguments: 1e30 if next(count) == 5 else original(*arguments))
    with pytest.raises(UserError, match="(loss|gradient) is (nan|inf)"):
        p2_train.train(CONFIG, settings(epochs=3, output="bad.safetensors"), "cpu")
    state = load_file("bad.safetensors")  # of the first epoch, four steps
    assert all(value.isfinite().all() for value in state.values()) and Path("good.safetensors").read_bytes() == kept


def test_weights_that_are_not_finite_are_refused(workplace):
    for suffix in ".safetensors", ".bin":
        state = load_file("decoder.safetensors")
        state["h.1.ln_2.bias"][3] = float("nan")
        path = Path(f"damaged{suffix}")
        save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
        with pytest.raises(UserError, match="damaged.*h.1.ln_2.bias"):
            Decoder.from_pretrained(path)


def test_a_checkpoint_notices_flipped_bits(workplace):
    p2_train.train(CONFIG, settings(epochs=1), "cpu")
    path = Path("checkpoints/captioner.safetensors")
    whole = bytearray(path.read_bytes())
    whole[-200] ^= 1
    path.write_bytes(whole)
    with pytest.raises(UserError, match="damaged"):
        Captioner.load(path, "decoder.safetensors")


def test_captions_are_not_made_of_what_is_no_number(tmp_path):
    model = make_captioner(tmp_path)
    with pytest.raises(UserError, match="not numbers"):
        model.generate(torch.full((1, 4, 12), float("nan")))


# ---- going on --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", ["captions", "picture", "order"])
def test_a_run_does_not_go_on_with_other_data(workplace, monkeypatch, change):
    original = interrupt_after(monkeypatch, 6)
    with pytest.raises(Interrupted):
        p2_train.train(CONFIG, settings(), "cpu")
    monkeypatch.setattr(training, "step_optimizer", original)
    data = json.loads(Path("data/train.json").read_text())
    if change == "captions":
        data["annotations"][0]["caption"] = "Another picture altogether"
    elif change == "picture":
        Image.fromarray(np.full((40, 50, 3), 7, np.uint8)).save("data/images/train/3.png")
    else:
        data["images"][0], data["images"][-1] = data["images"][-1], data["images"][0]
    Path("data/train.json").write_text(json.dumps(data))
    with pytest.raises(UserError, match="another training images"):
        p2_train.train(CONFIG, settings(), "cpu")


# ---- captions and pictures -------------------------------------------------------------------------------------


@pytest.mark.parametrize("text, clean", [
    ("in the 'Taste' section", "In the 'Taste' section."), ("a .22 rifle", "A .22 rifle."), ("the dog 's ball .", "The dog's ball."),
    ("a man , with two dogs ' toys", "A man, with two dogs' toys."), ("He isn 't here !", "He isn't here!"), ("wait ... what ?", "Wait... what?")])
def test_cleaning_glues_no_words_together(text, clean):
    assert clean_caption(text) == clean


def test_captions_files_that_lead_astray_are_refused(tmp_path):
    for names, words in ((["a.jpg", "a.jpg"], "two images with the file name"), (["../a.jpg"], "leads out"), (["/etc/a.jpg"], "leads out")):
        (tmp_path / "captions.json").write_text(json.dumps({
            "images": [{"id": i, "file_name": name} for i, name in enumerate(names)], "annotations": []}))
        with pytest.raises(UserError, match=words):
            read_captions(tmp_path / "captions.json", None)


def test_a_picture_starts_no_program(tmp_path, monkeypatch):
    """An EPS under a picture's name would be drawn by Ghostscript."""
    path = tmp_path / "drawing.jpg"
    path.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n0 0 9 9 rectfill\nshowpage\n")
    monkeypatch.setattr("subprocess.check_call", lambda *arguments, **named: pytest.fail("a program was started"))
    files = [path] + ([CASES / "eps_named.jpg"] if CASES.is_dir() else [])
    for file in files:
        with pytest.raises(ImageError, match="not an image"):
            load_image(file)


def test_one_image_has_no_interval(workplace, monkeypatch, capsys, without_meteor):
    Path("predictions.json").write_text('{"0": "a red picture"}')
    Path("references.json").write_text(json.dumps({"images": [{"id": 0, "file_name": "0.png"}],
                                                   "annotations": [{"id": 0, "image_id": 0, "caption": "a red picture"}]}))
    shutil.copy("predictions.json", "others.json")
    monkeypatch.setattr(sys, "argv", ["p2_evaluate.py", "--pred_file", "predictions.json", "--annotation_file", "references.json",
                                      "--compare", "others.json"])
    p2_evaluate.main()
    printed = capsys.readouterr().out
    assert "one image: its CIDEr is 0 by definition" in printed and "p =" not in printed


# ---- weights ---------------------------------------------------------------------------------------------------


def test_a_torchscript_archive_is_read_as_data(tmp_path):
    class Part(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(3, 2).half()
            self.parts = torch.nn.ModuleList([torch.nn.Linear(2, 2)])
            self.register_buffer("shared", torch.arange(6.0).view(2, 3).t())
            self.scale = torch.nn.Parameter(torch.tensor(0.5))

        def forward(self, x):
            return x

    model = Part()
    torch.jit.script(model).save(tmp_path / "model.pt")
    state = read_archive(tmp_path / "model.pt")
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[name], value) and state[name].dtype == value.dtype for name, value in model.state_dict().items())


def test_no_code_of_an_archive_runs(tmp_path):
    class Evil(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1))

        @torch.jit.export
        def __getstate__(self):
            return (self.weight, self.training)

        @torch.jit.export
        def __setstate__(self, state: tuple[torch.Tensor, bool]):
            raise RuntimeError("this ran")

        def forward(self, x):
            return x

    torch.jit.script(Evil()).save(tmp_path / "evil.pt")
    with pytest.raises(Exception, match="this ran"):  # as torch would load it
        torch.jit.load(tmp_path / "evil.pt")
    try:
        read_archive(tmp_path / "evil.pt")
    except UserError as error:
        assert "this ran" not in str(error)
    (tmp_path / "text.pt").write_text("nothing")
    with pytest.raises(UserError, match="no TorchScript archive"):
        read_archive(tmp_path / "text.pt")


@pytest.mark.parametrize("config, words", [({"n_head": 4, "n_embd": 64}, "4 heads of 16"), ({"activation_function": "gelu"}, "activation is gelu"),
                                           ({"n_head": 1, "activation_function": "gelu_new"}, None), ({"model_type": "llava", "n_head": 7}, None)])
def test_a_config_beside_the_weights_is_believed(tmp_path, config, words):
    save_decoder(tmp_path / "decoder.bin", vocab_size=50)
    (tmp_path / "config.json").write_text(json.dumps(config))
    if words:
        with pytest.raises(UserError, match=words):
            Decoder.from_pretrained(tmp_path / "decoder.bin")
    else:
        Decoder.from_pretrained(tmp_path / "decoder.bin")


def test_the_shipped_decoder_is_known_by_its_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("checkpoints.CHECKPOINT_FOLDERS", ())
    shutil.copy(captioner.EMBEDDED_DECODER, tmp_path / "mine.safetensors")
    assert find_weights(tmp_path / "mine.safetensors") == (tmp_path / "mine.safetensors", captioner.EMBEDDED_CHECKPOINT)


# ---- tones, sizes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("values, expected", [
    (np.int32([[0, 128, 255]]), [0, 128, 255]), (np.uint16([[0, 2048, 4095]]), [0, 128, 255]), (np.uint16([[0, 32768, 65535]]), [0, 128, 255]),
    (np.float32([[0, 0.25, 1]]), [0, 64, 255]), (np.float32([[0, 128, 255]]), [0, 128, 255]), (np.float32([[-2, 0, 2]]), [0, 128, 255]),
    (np.float32([[0, 128, np.inf]]), [0, 128, 0]), (np.float32([[np.nan, 0, 255]]), [0, 0, 255]), (np.float32([[np.nan] * 3]), [0, 0, 0])])
def test_grey_of_any_range_is_seen_as_in_a_viewer(tmp_path, values, expected):
    Image.fromarray(values).save(tmp_path / "x.tif")
    image = load_image(tmp_path / "x.tif")
    assert [image.getpixel((x, 0))[0] for x in range(3)] == pytest.approx(expected, abs=1)


def test_no_data_and_min_is_white(tmp_path):
    Image.fromarray(np.float32([[-9999, 0, 255]])).save(tmp_path / "x.tif", tiffinfo={42113: "-9999"})
    assert [load_image(tmp_path / "x.tif").getpixel((x, 0))[0] for x in range(3)] == [0, 0, 255]
    Image.fromarray(np.uint16([[0, 30000, 65535]])).save(tmp_path / "x.tif")
    whole = bytearray((tmp_path / "x.tif").read_bytes())
    entry = whole.index(b"\x06\x01\x03\x00\x01\x00\x00\x00")  # PhotometricInterpretation, one short
    whole[entry + 8] = 0
    (tmp_path / "x.tif").write_bytes(whole)
    assert [load_image(tmp_path / "x.tif").getpixel((x, 0))[0] for x in range(3)] == pytest.approx([255, 138, 0], abs=1)


def test_a_huge_picture_is_shrunk_and_a_phones_is_not_refused(tmp_path, monkeypatch):
    from test_dataset import four_colours, quarters

    monkeypatch.setattr("images.LARGE", 10_000)
    for name, mode in (("x.png", "1"), ("x.png", "P"), ("x.png", "RGBA"), ("x.tif", "RGB")):
        image = four_colours(900, 600, ((255, 255, 255), (0, 0, 0), (0, 0, 0), (255, 255, 255))).convert(mode)
        image.save(tmp_path / name)
        small, whole = load_image(tmp_path / name, 50), load_image(tmp_path / name)
        assert small.size == (225, 150) and whole.size == (900, 600)
        assert quarters(small) == quarters(whole)
    exif = Image.Exif()
    exif[0x0112] = 6
    for name in "x.png", "x.tif", "x.jpg":
        four_colours(900, 600).save(tmp_path / name, exif=exif)
        assert load_image(tmp_path / name, 50).size in ((150, 225), (300, 450), (600, 900))
    monkeypatch.setattr("images.MOST_PIXELS", {"JPEG": 1_000_000, "other": 100_000})
    assert load_image(tmp_path / "x.jpg")
    with pytest.raises(ImageError, match="absurd: 1 million"):
        load_image(tmp_path / "x.png")


def test_a_jpeg_of_thousands_of_scans_is_refused_at_once(tmp_path):
    Image.effect_noise((64, 64), 50).save(tmp_path / "x.jpg", progressive=True)
    assert load_image(tmp_path / "x.jpg").size == (64, 64)
    whole = (tmp_path / "x.jpg").read_bytes()
    last = whole.rindex(b"\xff\xda")
    (tmp_path / "x.jpg").write_bytes(whole[:last] + (whole[last:-2]) * 300 + whole[-2:])
    with pytest.raises(ImageError, match="scans would take too long"):
        load_image(tmp_path / "x.jpg")


def test_damaged_exif_data_costs_no_picture(tmp_path):
    exif = Image.Exif()
    exif[0x0112], exif[0x011A] = 6, 72.0
    Image.new("RGB", (40, 20)).save(tmp_path / "x.jpg", exif=exif)
    whole = bytearray((tmp_path / "x.jpg").read_bytes())
    entry = whole.index(b"\x01\x1a\x00\x05" if b"\x01\x1a\x00\x05" in whole else b"\x1a\x01\x05\x00")
    whole[entry:entry + 4] = whole[entry:entry + 4].replace(b"\x05", b"\x02")  # XResolution as text
    (tmp_path / "x.jpg").write_bytes(whole)
    assert load_image(tmp_path / "x.jpg").size == (20, 40)


def test_phones_pictures_are_read_and_others_named(tmp_path, capsys, monkeypatch):
    pillow_heif = pytest.importorskip("pillow_heif")
    picture = Image.new("RGB", (64, 48), (200, 30, 30))
    heif = pillow_heif.from_pillow(picture)
    heif.save(tmp_path / "a.HEIC")
    picture.save(tmp_path / "b.jfif", "JPEG")
    for name in "c.svg", "d.psd", "notes.txt", "e\x1b[31m.ppm":
        (tmp_path / name).write_bytes(b"x")
    assert [path.name for path in image_files(tmp_path)] == ["a.HEIC", "b.jfif"]
    assert [load_image(path).getpixel((9, 9))[0] for path in image_files(tmp_path)] == pytest.approx([200, 200], abs=6)
    said = capsys.readouterr().err
    assert "c.svg, d.psd, e\\x1b[31m.ppm" in said and "notes" not in said and "\x1b" not in said
    monkeypatch.setattr("images.FORMATS", ["JPEG"])
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(ImageError, match="pip install pillow-heif"):
        load_image(tmp_path / "a.HEIC")


# ---- files -----------------------------------------------------------------------------------------------------


def test_json_of_every_kind_is_read_or_refused_in_a_line(tmp_path):
    (tmp_path / "bom.json").write_bytes(b"\xef\xbb\xbf" + b'{"a": "b"}')
    assert read_json(tmp_path / "bom.json", "file") == {"a": "b"}
    (tmp_path / "twice.json").write_text('[{"a": "one", "b": {"c": 1, "a": 2}, "a": "other"}]')
    with pytest.raises(UserError, match="has 'a' twice in one object"):
        read_json(tmp_path / "twice.json", "file")
    (tmp_path / "deep.json").write_text("[" * 100_000 + "]" * 100_000)
    for name, content in (("object", {"images": [], "annotations": {"a": 1}}), ("strings", {"images": [], "annotations": ["a"]}),
                          ("list", [1]), ("long", {"images": [{"id": 1, "file_name": "x" * 300}], "annotations": []})):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    for name in "deep", "object", "strings", "list", "long":
        with pytest.raises(UserError):
            read_captions(tmp_path / f"{name}.json", tmp_path)
    (tmp_path / "latin1.txt").write_bytes(b"a caf\xe9\n")
    with pytest.raises(UserError, match="not UTF-8"):
        read_lines(tmp_path / "latin1.txt")


def test_one_bad_link_does_not_lose_the_folder(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "b.png").symlink_to("nowhere")
    os.symlink("x" * 256, tmp_path / "c.png")  # no name can be that long
    (tmp_path / "d.png").mkdir()
    assert [path.name for path in image_files(tmp_path)] == ["a.png", "b.png", "c.png"]
    for name in "b.png", "c.png":
        with pytest.raises(ImageError):
            load_image(tmp_path / name)


def test_a_pipe_among_the_training_images_is_no_image(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    (tmp_path / "captions.json").write_text(json.dumps({"images": [{"id": 1, "file_name": "a.png"}], "annotations": []}))
    with pytest.raises(UserError, match="not in"):
        read_captions(tmp_path / "captions.json", tmp_path)


def test_a_full_cache_serves_where_nothing_can_be_written_and_a_cut_one_is_made_again(workplace, monkeypatch):
    encoder = CONFIG.load_encoder()
    paths = [Path("data/images/train/0.png"), Path("data/images/train/1.png")]
    first = FeatureCache(encoder, paths, "cache", 2)
    expected = first[[0, 1], [1, 0]]
    with monkeypatch.context() as patch:
        patch.setattr("features.lockf", lambda *arguments: pytest.fail("a lock was taken"))
        assert torch.equal(FeatureCache(encoder, paths, "cache", 2)[[0, 1], [1, 0]], expected)
    whole = first.files[1].read_bytes()
    for damage in whole[:-100], b"", b"nothing":
        first.files[1].write_bytes(damage)
        assert torch.equal(FeatureCache(encoder, paths, "cache", 2)[[0, 1], [1, 0]], expected)
    for progress in '{"done": "two"}', "[]", '{"done": 9}', "{":
        first.files[0].with_suffix(".json").write_text(progress)
        assert torch.equal(FeatureCache(encoder, paths, "cache", 2)[[0, 1], [1, 0]], expected)
    Path("a file").write_text("")
    with pytest.raises(UserError, match="cannot keep features in the cache"):
        FeatureCache(encoder, paths, "a file", 1)
    monkeypatch.setattr(os, "posix_fallocate", lambda *arguments: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(UserError, match="No space left"):
        FeatureCache(encoder, paths, "another", 1)


def test_damaged_states_are_named_and_full_disks_leave_nothing_behind(workplace, monkeypatch):
    original = interrupt_after(monkeypatch, 6)
    with pytest.raises(Interrupted):
        p2_train.train(CONFIG, settings(), "cpu")
    monkeypatch.setattr(training, "step_optimizer", original)
    file = Path("checkpoints/captioner.state.pt")
    state, whole = torch.load(file), file.read_bytes()
    random = np.random.default_rng(0)
    damaged = []
    for key, value in (("progress", [1]), ("settings", None), ("parameters", {}), ("optimizer", {}), ("random", torch.zeros(3))):
        torch.save(state | {key: value}, file)
        damaged.append(file.read_bytes())
    damaged += [whole[:n] for n in (0, 10, len(whole) // 2)]
    for _ in range(12):
        broken = bytearray(whole)
        for at in random.integers(0, len(whole), 40):
            broken[at] = random.integers(256)
        damaged.append(bytes(broken))
    for content in damaged:
        file.write_bytes(content)
        try:
            p2_train.CaptionerTrainer(CONFIG, settings(), "cpu")  # where only weights' bits were hit, it goes on
        except UserError as error:
            assert "damaged" in str(error) or "another" in str(error)
    file.write_bytes(whole)
    trainer = p2_train.CaptionerTrainer(CONFIG, settings(), "cpu")

    def full(*arguments):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match="No space left.*goes on"):
            trainer.run.save()
    assert file.read_bytes() == whole and not list(Path("checkpoints").glob("*.tmp"))


def test_weights_of_strange_forms_are_refused(tmp_path):
    for name, tensor in (("expanded", torch.zeros(1).expand(10**6)), ("sparse", torch.eye(3).to_sparse()), ("meta", torch.empty(3, device="meta"))):
        torch.save({"weight": tensor}, tmp_path / f"{name}.bin")
        with pytest.raises(UserError):
            read_weights(tmp_path / f"{name}.bin")
    if CASES.is_dir():
        with pytest.raises(UserError):
            read_weights(CASES / "w_bin_hugedims.bin")


def test_two_runs_do_not_write_one_output(workplace):
    import subprocess

    output = (workplace / "checkpoints/one.safetensors").resolve()
    script = (f"import sys; sys.path.insert(0, {str(ROOT)!r}); import training; training.prepare_output({str(output)!r}); "
              "print('held', flush=True); sys.stdin.read()")
    other = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="another run is writing"):
            prepare_output(output)
        prepare_output(output, main=False)
        prepare_output(output.with_name("two.safetensors"))
    finally:
        other.communicate()
    prepare_output(output)
    prepare_output(output)  # of this process's own there is no end to wait for


def test_names_that_are_too_long_are_seen_before_the_work(tmp_path):
    check_writable(tmp_path / ("x" * 250 + ".json"))
    write_json(tmp_path / ("x" * 250 + ".json"), {})
    with pytest.raises(UserError, match="256 bytes"):
        check_writable(tmp_path / ("é" * 128))


def test_numbers_that_are_none_are_named():
    import p4_pretrain_vit

    with pytest.raises(UserError, match="take numbers"):
        settings(selection=("many",))
    with pytest.raises(UserError, match="take numbers"):
        p4_pretrain_vit.Settings(sizes=("abc",))


@pytest.mark.parametrize("native, scaled, expected", [(True, True, torch.bfloat16), (False, True, torch.float16), (False, False, torch.bfloat16)])
def test_precision_on_a_gpu_that_only_emulates_bf16(monkeypatch, native, scaled, expected):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: native or including_emulation)
    assert pick_precision("cuda", scaled=scaled) == expected and pick_precision("cpu", scaled=scaled) == torch.float32


@pytest.mark.parametrize("error, words", [(OSError(28, "No space left on device", "out.json"), "No space left on device for out.json"),
                                          (torch.OutOfMemoryError("CUDA out of memory"), "lower --batch_size"),
                                          (UserError("a\x1b[31m name"), "a\\x1b[31m name")])
def test_what_a_script_ends_with_is_one_line(capsys, error, words):
    def main():
        raise error

    with pytest.raises(SystemExit) as end:
        cli.run(main)
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1 and end.value.code == (2 if isinstance(error, UserError) else 1)


def test_a_picture_that_was_changed_in_place_gets_new_features(workplace):
    encoder = CONFIG.load_encoder()
    path = Path("data/images/train/0.bmp")  # uncompressed: of the same size, the same almost everywhere
    pixels = np.zeros((400, 400, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    before = FeatureCache(encoder, [path], "cache")[[0], [0]]
    pixels[20:100, 30:200] = 255
    Image.fromarray(pixels).save(path)
    assert not torch.equal(FeatureCache(encoder, [path], "cache")[[0], [0]], before)


def test_a_blank_caption_has_a_blank_word():
    from attention import END, align_words

    assert align_words([1, 2], lambda tokens: " " * len(tokens), ended=False) == [("", [0, 1])]
    assert align_words([1], lambda tokens: " ", ended=True) == [(END, [1])]
