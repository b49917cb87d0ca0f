"""Train the captioner: projection, cross-attention and LoRA on cached features of the frozen encoder.

    python3 p2_train.py --data data --decoder weights/decoder_model.bin

`data` is in the course's layout: train.json in COCO's caption form and images/train. The last 500 images are split
off; the epoch with the best CIDEr on them is the checkpoint. An interrupted run goes on when the same command is
given again. After the epochs of cross-entropy, `--scst_epochs` of self-critical training raise CIDEr itself.
"""

import time
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from captioner import Captioner, CaptionerConfig, GenerationConfig, check_hashes, is_fusion, read_metadata
from cider import CiderScorer
from cli import ArgumentParser, UserError, add_options, run, take_options
from dataset import FeatureCache, bucketed_batches, clean_caption, collate, read_captions
from decoder import ADAPTER_PLACES, LORA_TARGETS
from encoder import ImageEncoder
from metrics import cider, tokenize
from tokenizer import END_OF_TEXT, BPETokenizer
from training import adamw, autocast, check_settings, cosine, load_state, pick_device, prepare_output, save_state, step_optimizer
from weightfiles import read_weights


@dataclass
class Settings:
    data: str = "data"
    decoder: str = "weights/decoder_small.safetensors"
    output: str = "checkpoints/captioner.safetensors"
    cache: str = "cache"
    views: int = 4
    init: str = ""
    fusion_epochs: int = 0
    epochs: int = 9
    batch_size: int = 8
    learning_rate: float = 1.2e-3
    fusion_learning_rate: float = 0.0
    weight_decay: float = 0.1
    warmup: float = 0.02
    clip: float = 1.0
    label_smoothing: float = 0.1
    scst_epochs: int = 4
    scst_learning_rate: float = 2e-4
    scst_samples: int = 5
    scst_temperature: float = 0.5
    selection: int = 500
    selection_beam: int = 3
    seed: int = 0
    save_minutes: float = 5.0

    def __post_init__(self):
        check_settings(self, ("batch_size", "views", "selection_beam"), ("warmup", "label_smoothing"))
        epochs = self.fusion_epochs, self.epochs, self.scst_epochs
        if min(epochs) < 0 or sum(epochs) < 1:
            raise UserError("--fusion_epochs, --epochs and --scst_epochs must be at least 1 together")
        if self.scst_samples < 2 or self.scst_temperature <= 0:
            raise UserError("--scst_samples must be at least 2, --scst_temperature above 0")


HELP = dict(
    data="folder with train.json and images/train", decoder="GPT-2 weights, .bin or .safetensors",
    output="the checkpoint to write", cache="folder for the encoder's features",
    init="checkpoint whose trained weights to start from; same model options",
    fusion_epochs="of cross-entropy on the projection and cross-attention alone, before PEFT", epochs="of cross-entropy",
    fusion_learning_rate="of the projection and cross-attention in both; 0: as learning_rate",
    scst_epochs="of self-critical training on CIDEr, after the others", scst_samples="captions drawn for each image",
    scst_temperature="of the drawing",
    views="of each image in the cache: 1 as it is, 2 its mirror image as well, more: random crops too",
    batch_size="images, each with all its captions", warmup="part of all steps", clip="gradient norm",
    selection="images at the end of train.json, on which checkpoints are selected",
    selection_beam="beam size on them", save_minutes="minutes between states to resume from",
    image_size="0: the encoder's own", projection_layers="transformer layers; 0: a linear projection",
    fusion="cross: cross-attention; prefix: image tokens before the text",
    projection_dim="width of the image tokens; under fusion prefix always the decoder's",
    cross_dim="inner width of cross-attention; 0: the decoder's", lora_rank="0: no LoRA",
    lora_targets=f"of {' '.join(LORA_TARGETS)}", adapter_dim="bottleneck of the adapters; 0: none",
    adapter_places=f"of {' '.join(ADAPTER_PLACES)}", prefix_length="of prefix-tuning; 0: none",
    prefix_hidden="width of the MLP behind the prefix, for training alone; 0: none",
    prompt_length="of prompt tuning; 0: none", patch_dropout="part of an image's patches left out of a step")


class CaptionData:
    """Tokens of every image's captions, and the cached features beside them."""

    def __init__(self, images, tokenizer, max_tokens, features=None):
        self.features = features
        self.rows = []  # for each image, its captions' tokens
        for image in images:
            captions = [clean_caption(caption) for caption in image.captions]
            rows = tokenizer.encode_batch([caption for caption in captions if caption])
            self.rows.append([row[:max_tokens] for row in rows])
        self.captions = max(len(rows) for rows in self.rows)  # K; images with fewer get empty rows
        self.lengths = [max(map(len, rows), default=0) for rows in self.rows]

    def token_ids(self):
        """Sorted ids of all tokens that occur, <|endoftext|> among them: (V,)"""
        return torch.tensor(sorted({token for rows in self.rows for row in rows for token in row} | {END_OF_TEXT}))

    def batch(self, indices, views):
        """Image numbers and a view of each -> features (B, N, D), tokens and targets (B * K, T)"""
        rows = [row for i in indices for row in self.rows[i] + [[]] * (self.captions - len(self.rows[i]))]
        return self.features[np.array(indices), np.array(views)], *collate(rows)


@torch.inference_mode()
def caption_features(model, features, generation, device, batch_size=100):
    """Captions of the first view of every cached image."""
    captions = []
    with autocast(device), model.decoder.merged_lora():
        for start in range(0, len(features.data), batch_size):
            numbers = np.arange(start, min(start + batch_size, len(features.data)))
            captions += model.generate(features[numbers, np.zeros_like(numbers)].to(device).float(), generation)
    return captions


def train(config, settings, device=None):
    """Train, keep the best checkpoint, and return [{epoch, loss or reward, cider, seconds}, …]."""
    device = device or pick_device()
    state_file = prepare_output(settings.output)
    data = Path(settings.data)
    images = read_captions(data / "train.json", data / "images" / "train")
    images = [image for image in images if image.captions]
    if not 0 < settings.selection < len(images):
        raise UserError(f"{len(images)} images cannot be split into training and {settings.selection} for selection")
    parts = images[:-settings.selection], images[-settings.selection:]

    torch.manual_seed(settings.seed)
    encoder = ImageEncoder(config.encoder, config.image_size)
    decoder = config.load_decoder(settings.decoder)
    train_data = CaptionData(parts[0], BPETokenizer(), max_tokens=decoder.config.n_positions - 1)
    model = Captioner(config, encoder, decoder, train_data.token_ids()).to(device)
    if settings.init:
        metadata = read_metadata(settings.init)
        check_hashes(settings.init, metadata, decoder, settings.decoder, encoder)
        try:
            state = read_weights(settings.init, "checkpoint")
            model.load_trained({name: value for name, value in state.items() if name != "token_ids"})
        except (KeyError, RuntimeError):
            raise UserError(f"the checkpoint {settings.init} has other model options: {metadata['model']}") from None
    # Last, since it can take long: whatever is wrong above shows first.
    train_data.features, selection_features = (
        FeatureCache(encoder, [image.path for image in part], settings.cache, views, device=device)
        for part, views in zip(parts, (settings.views, 1)))
    references = tokenize({str(i): image.captions for i, image in enumerate(parts[1])})
    trained = model.trained_parameters()
    groups = {True: [], False: []}
    for name, parameter in trained.items():
        groups[is_fusion(name)].append(parameter)
    factor = (settings.fusion_learning_rate or settings.learning_rate) / settings.learning_rate
    optimizer = adamw([(groups[True], factor), (groups[False], 1.0)], settings.learning_rate, settings.weight_decay)
    steps = -(-len(parts[0]) // settings.batch_size)
    print(f"{len(parts[0])} images to train on, {len(parts[1])} to select on, {len(model.token_ids)} tokens occur; "
          f"{model.num_trained() / 1e6:.2f}M trained parameters of {sum(p.numel() for p in model.parameters()) / 1e6:.1f}M; "
          f"{device}", flush=True)

    same = asdict(settings) | asdict(config) | {"lora_targets": list(config.lora_targets)} | {
        "captions": sum(map(len, train_data.rows)), "encoder's weights": encoder.weights_hash,
        "decoder's weights": decoder.weights_hash}
    del same["save_minutes"], same["cache"]  # these change no result
    progress = load_state(state_file, same, optimizer, trained, device)
    progress = progress or {"epoch": 0, "step": 0, "running": 0.0, "seconds": 0.0, "history": []}
    started = saved = time.monotonic()
    before = progress["seconds"]
    if not state_file.exists():
        save_state(state_file, same, optimizer, trained, progress)
    scorer = None
    stages = {"fusion": settings.fusion_epochs, "cross-entropy": settings.epochs, "scst": settings.scst_epochs}
    schedule = [(name, number, epochs) for name, epochs in stages.items() for number in range(epochs)]
    for epoch, (stage, number, stage_epochs) in list(enumerate(schedule))[progress["epoch"]:]:
        scst, total = stage == "scst", steps * stage_epochs
        model.train_fusion_alone(stage == "fusion")
        if scst and scorer is None:
            scorer = CiderScorer([image.captions for image in parts[0]], end="<end>")
        generator = torch.Generator().manual_seed(settings.seed * 1000 + epoch)
        batches = bucketed_batches(train_data.lengths, settings.batch_size, generator)
        views = torch.randint(settings.views, (len(parts[0]),), generator=generator).numpy()
        model.train()
        running = torch.tensor(progress["running"], device=device)  # the sum of the losses, or of the rewards
        name = "reward" if scst else "loss"
        bar = tqdm(range(progress["step"], steps), desc=f"epoch {epoch + 1}/{len(schedule)}",
                   unit="batch")
        for step in bar:
            inputs, tokens, targets = (x.to(device) for x in train_data.batch(batches[step], views[batches[step]]))
            with autocast(device):
                if scst:
                    numbers = np.repeat(batches[step], settings.scst_samples)
                    loss, mean_reward = model.self_critical_loss(
                        inputs.float(), partial(scorer.score, numbers), settings.scst_samples,
                        settings.scst_temperature, seed=(settings.seed * 1000 + epoch) * steps + step)
                else:
                    loss = model.loss(inputs.float(), tokens, targets, settings.label_smoothing)
            loss.backward()
            factor = cosine(number * steps + step, total, max(1, int(settings.warmup * total)))
            peak = settings.scst_learning_rate if scst else settings.learning_rate
            step_optimizer(optimizer, peak * factor, settings.clip)
            running += mean_reward if scst else loss.detach()
            if step % 20 == 0:
                bar.set_postfix({name: f"{running.item() / (step + 1):.3f}"})
            if time.monotonic() - saved > 60 * settings.save_minutes:
                progress.update(epoch=epoch, step=step + 1, running=running.item(),
                                seconds=before + time.monotonic() - started)
                save_state(state_file, same, optimizer, trained, progress)
                saved = time.monotonic()
        model.eval()
        captions = caption_features(model, selection_features, GenerationConfig(settings.selection_beam), device)
        score, _ = cider(references, tokenize({str(i): [caption] for i, caption in enumerate(captions)}))
        seconds = before + time.monotonic() - started
        history = progress["history"]
        history.append({"epoch": epoch + 1, name: running.item() / steps, "cider": score, "seconds": seconds})
        print(f"epoch {epoch + 1}: {name} {history[-1][name]:.3f}, CIDEr {score:.4f} on the selection split, "
              f"{seconds / 60:.1f} min", flush=True)
        if score > max((entry["cider"] for entry in history[:-1]), default=-1):
            model.save(settings.output, asdict(settings), {"selection": history[-1]})
        progress.update(epoch=epoch + 1, step=0, running=0.0, seconds=seconds)
        save_state(state_file, same, optimizer, trained, progress)
        saved = time.monotonic()
    best = max(progress["history"], key=lambda entry: entry["cider"])
    print(f"best: CIDEr {best['cider']:.4f} after epoch {best['epoch']}, in {settings.output}")
    state_file.unlink(missing_ok=True)
    return progress["history"]


def main():
    parser = ArgumentParser(description="Train the captioner on COCO-format captions.")
    for config in Settings, CaptionerConfig:
        add_options(parser, config, **{key: text for key, text in HELP.items()
                                       if key in {field.name for field in fields(config)}})
    arguments = parser.parse_args()
    train(take_options(arguments, CaptionerConfig), take_options(arguments, Settings))


if __name__ == "__main__":
    run(main)
