"""Put the repository's root on the path: the scripts are flat modules there. Where the data is; tiny data to train on."""

import json
import os
import sys
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # a process for each core: more threads would only wait for each other
    os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
COLOURS = {"red": (200, 30, 30), "green": (30, 160, 40), "blue": (30, 40, 200), "yellow": (220, 210, 40)}
VIT = "vit_tiny_patch16_224"


@pytest.fixture(scope="session")
def flickr8k():
    """The folder that holds Flickr8k in the course's layout; a test that wants it is skipped where there is none."""
    for folder in ROOT / "data", ROOT.parent / "shared/data/flickr8k":
        if (folder / "train.json").exists() and (folder / "val.json").exists():
            return folder
    pytest.skip("Flickr8k is neither in data/ nor in ../shared/data/flickr8k")


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
