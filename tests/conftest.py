"""Puts the repository's root and report/ on the path, since their scripts are flat modules. Paths of the data, tiny training data, and
functions that start scripts as processes."""

import functools
import gc
import json
import multiprocessing
import os
import socket
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

if "PYTEST_XDIST_WORKER" in os.environ:  # a process for each core: more threads would only wait for each other
    os.environ["OMP_NUM_THREADS"] = "1"

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = str(ROOT), str(ROOT / "report")
COLOURS = {"red": (200, 30, 30), "green": (30, 160, 40), "blue": (30, 40, 200), "yellow": (220, 210, 40)}
VIT, CNN = "test_vit", "test_efficientnet"
WORDS = "[PAD] [UNK] [CLS] [SEP] a an the red green blue yellow picture colour photo of tench fish dog cat is . there".split()
DRIVER = """
from pathlib import Path
import torch
torch.set_num_threads(1)
import encoder, runtime
runtime.PREFERRED = "torch"
encoder.WEIGHTS_FOLDER = Path.cwd()
import cli, conftest, {module}
conftest.hasten(setattr)
{before}
cli.run({module}.main)
"""


@pytest.fixture(autouse=True)
def encode_with_torch(request, monkeypatch):
    """Hundreds of small encoders would be compiled in vain: OpenVINO is for tests that are marked `openvino`."""
    if not request.node.get_closest_marker("openvino"):
        import runtime

        monkeypatch.setattr(runtime, "PREFERRED", "torch")


@pytest.fixture(autouse=True, scope="module")
def forget():
    """A trainer and what it hooks into know each other, so that its memory comes back with the garbage alone."""
    yield
    gc.collect()


def quick_tokens(captions):
    """metrics.tokenize without Java; test_cider.py compares them."""
    from cider import ptb_tokens

    return {key: [" ".join(ptb_tokens(caption)) for caption in group] for key, group in captions.items()}


def hasten(put):
    """Leave out of trainings what takes longer than they do: a start of Java for each epoch, and the curves. `put` as setattr."""
    for name in {"p2_train", "p2_tune"} & sys.modules.keys():
        put(sys.modules[name], "tokenize", quick_tokens)
    if "training" in sys.modules:
        put(sys.modules["training"].TrainingLog, "draw", lambda self, curves: None)


@pytest.fixture(autouse=True)
def train_in_haste(request, monkeypatch):
    """Dozens of tiny trainings leave out what none but tests that are marked `whole` looks at."""
    if not request.node.get_closest_marker("whole"):
        hasten(monkeypatch.setattr)


@pytest.fixture
def without_meteor(monkeypatch):
    """METEOR takes ten seconds to start, and has tests of its own in test_evaluate.py."""
    import metrics

    monkeypatch.setattr(metrics, "meteor", lambda references, systems: [metrics.rouge_l(references, one) for one in systems])


@pytest.fixture(scope="session")
def flickr8k():
    """The folder that holds Flickr8k in the course's layout; a test that wants it is skipped where there is none."""
    for folder in ROOT / "data", ROOT.parent / "shared/data/flickr8k":
        if (folder / "train.json").exists() and (folder / "val.json").exists():
            return folder
    pytest.skip("Flickr8k is neither in data/ nor in ../shared/data/flickr8k")


@pytest.fixture(scope="session")
def clip_weights(tmp_path_factory):
    """A file with the state dict of a small random CLIP, in fp16's precision as OpenAI's are."""
    import torch
    from clip.model import CLIP

    torch.manual_seed(0)
    model = CLIP(embed_dim=32, image_resolution=32, vision_layers=2, vision_width=64, vision_patch_size=16,
                 context_length=77, vocab_size=49408, transformer_width=64, transformer_heads=1, transformer_layers=2)
    path = tmp_path_factory.mktemp("clip") / "clip.pt"
    torch.save({name: value.half().float() for name, value in model.state_dict().items()}, path)
    return path


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with 24 coloured pictures and their captions, a random ViT and a random small GPT-2."""
    import timm
    import torch
    from safetensors.torch import save_file

    import encoder
    from decoder import Decoder, DecoderConfig

    monkeypatch.setattr(encoder, "WEIGHTS_FOLDER", tmp_path)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    save_file(timm.create_model(VIT, img_size=32, num_classes=0).state_dict(), tmp_path / f"{VIT}.safetensors")
    decoder = Decoder(DecoderConfig(n_positions=48, n_embd=64, n_layer=2))
    torch.nn.init.normal_(decoder.wte.weight, std=0.1)
    save_file({name: tensor.contiguous() for name, tensor in decoder.pretrained_state().items()},
              tmp_path / "decoder.safetensors")
    folder = tmp_path / "data" / "images" / "train"
    folder.mkdir(parents=True)
    images, annotations = [], []
    for i in range(24):
        name, colour = list(COLOURS.items())[i % 4]
        Image.fromarray(np.full((40, 50, 3), colour, np.uint8)).save(folder / f"{i}.png")
        images.append({"id": i, "file_name": f"{i}.png"})
        annotations += [{"id": 2 * i + j, "image_id": i, "caption": caption} for j, caption in
                        enumerate([f"a {name} picture", f"The colour {name} ."])]
    (tmp_path / "data" / "train.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    return tmp_path


def write_bert(folder, layers=2):
    """A tiny random BERT with a tokenizer, as all-MiniLM-L6-v2 lies in its folder."""
    import torch
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertModel

    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    torch.manual_seed(2)
    BertModel(BertConfig(vocab_size=len(WORDS), hidden_size=24, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=32,
                         initializer_range=0.3)).save_pretrained(folder)
    tokenizer.save(str(Path(folder) / "tokenizer.json"))


@pytest.fixture
def place(workplace, monkeypatch):
    """conftest's workplace with a small CNN that has a classifier of 1,000 classes, and a small sentence encoder."""
    import timm
    import torch
    from safetensors.torch import save_file

    import clip_small

    torch.manual_seed(3)
    model = timm.create_model(CNN, num_classes=1000)
    for parameter in model.classifier.parameters():
        parameter.data.normal_(std=0.3)
    save_file(model.state_dict(), workplace / f"{CNN}.safetensors")
    write_bert(workplace / "bert")
    monkeypatch.setattr(clip_small, "TEXT_FOLDER", workplace / "bert")
    return workplace


def stopping(when):
    """A class to put in Interruption's place, which asks a run to stop when the function `when` says so."""
    from training import Interruption

    return type("Stopping", (Interruption,), {"__bool__": lambda self: when()})


@functools.cache
def forge():
    """A process that has imported what takes seconds to import, and of which `start` gets its processes."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["conftest", "timm", "p2_train", "p2_infer", "p4_align"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PYTHONPATH", str(ROOT / "tests"))
        multiprocessing.forkserver.ensure_running()
    return context


def act(script, arguments, environment, outputs):
    """Be that script, with its output in files."""
    os.environ.update(environment)
    for number, file in enumerate(outputs, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.argv = ["driver.py", *arguments]
    exec(script, {"__name__": "__main__"})


def start(*arguments, processes=1, module="p2_train", before=""):
    """Start a script in the current folder, with the folder's encoder weights: [process, …], as a launcher does."""
    script = DRIVER.format(module=module, before=before)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launched = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    started = []
    for rank in range(processes):
        environment = launched | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
        process = forge().Process(target=act, args=(script, arguments, environment, [f"process{rank}.out", f"process{rank}.err"]))
        process.start()
        started.append(process)
    return started


def finish(processes, status=0):
    """What they wrote to stdout and to stderr, after an end with this status; the others' is 0."""
    for process in processes:
        process.join(timeout=300)
    texts = [[Path(f"process{rank}.{name}").read_text() for name in ("out", "err")] for rank in range(len(processes))]
    assert [process.exitcode for process in processes] == [status] + [0] * (len(processes) - 1), [err[-3000:] for _, err in texts]
    return tuple("".join(some) for some in zip(*texts))


def make_llava(folder, strategy, text=None):
    """Write a tiny random LLaVA-1.5 with its processor; `strategy`: "full" keeps the class token; `text`: the language model's
    configuration, default: a Llama's."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<image>"]
    bpe.train_from_iterator(["USER: ASSISTANT: Describe the picture in one sentence. A dog runs on the green grass."] * 9,
                            trainers.BpeTrainer(vocab_size=400, special_tokens=special,
                                                initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])  # as Llama's
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    image_processor = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    LlavaProcessor(image_processor, tokenizer, patch_size=7, vision_feature_select_strategy=strategy,
                   num_additional_image_tokens=1).save_pretrained(folder)
    torch.manual_seed(1)
    vision = CLIPVisionConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                              image_size=28, patch_size=7)
    text = text or LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=3,
                       num_attention_heads=2, num_key_value_heads=1, initializer_range=0.3, bos_token_id=1,
                       eos_token_id=2, pad_token_id=0)
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_index=3,
                                                      vision_feature_select_strategy=strategy))
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = 2, 0
    model.save_pretrained(folder)
