"""How fast captioning is, as ratios measured in one run.

    python3 report/bench.py <images> [--beam_size 3] [--count 1000]
    python3 report/bench.py --training data [--steps 20]

Four ways through the same images, each with its images per second and its ratio to the first, which is the floor
that the frozen encoder sets:
  encoder       the frozen encoder alone, on pictures already decoded
  hw3_2.sh      the whole command, start of Python and loading of weights included
  captioning    the same without the start: decode, encode, search, in batches with a cache
  one by one    one image at a time, every step computing the whole text again

And three ways to train the same model, a ViT-Tiny with random weights and a GPT-2 of six layers, frozen, with a projection
and cross-attention between them, in captions per second, the start left out:
  cached        p2_train.py on features that were encoded before
  encoding      the same with the encoder in every step
  transformers  VisionEncoderDecoderModel and its Trainer, where every row is an image with one of its captions
"""

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import captioner
import generation
import p2_train
from captioner import EMBEDDED_CHECKPOINT, EMBEDDED_DECODER, Captioner, CaptionerConfig, caption_folder
from cli import ArgumentParser, UserError, run
from dataset import clean_caption, collate, read_captions, write_subset
from devices import pick_device
from encoder import ImageEncoder
from images import list_images, load_ahead, load_image
from tokenizer import BPETokenizer


class TokenHistory:
    """Stands in for Cache in a search without one: it remembers the tokens, not their keys and values."""

    def __init__(self, max_length):
        self.tokens = None

    def select(self, rows):
        self.tokens = self.tokens[rows]


def log_probs_without_cache(self, tokens, context, history, head, temperature=1.0):
    """Captioner.next_log_probs that runs the decoder over the whole text at every step."""
    history.tokens = tokens if history.tokens is None else torch.cat([history.tokens, tokens], 1)
    hidden = self.decoder.hidden(history.tokens, context)[:, -1]
    return (F.linear(hidden, head).float() / temperature).log_softmax(-1)


def one_by_one_without_cache(model, batches, settings):
    """Caption decoded batches one image at a time and without a cache: list of captions."""
    originals = generation.Cache, Captioner.next_log_probs
    generation.Cache, Captioner.next_log_probs = TokenHistory, log_probs_without_cache
    try:
        return [caption for batch in batches for image in batch for caption in model.caption(image[None], settings)]
    finally:
        generation.Cache, Captioner.next_log_probs = originals


def timed(function):
    """Seconds that `function` takes, CUDA's work included, and what it returns."""
    start = time.perf_counter()
    result = function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def training_speed(data, steps, images_a_step=8):
    """Print how many captions a second each of the three ways trains on."""
    device = pick_device()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        write_subset(data, folder / "data", steps * images_a_step)
        write_subset(data, folder / "few", images_a_step)
        config = CaptionerConfig(encoder="vit_tiny_patch16_224", projection_dim=256, projection_dropout=0, patch_dropout=0,
                                 lora_rank=0)
        encoder = ImageEncoder(config.encoder, weights="random")
        images = read_captions(folder / "data" / "train.json", folder / "data" / "images" / "train")
        captions = sum(len(image.captions) for image in images)
        seconds = {}
        original, captioner.load_encoder = captioner.load_encoder, lambda *arguments: encoder
        try:
            for name, part, cache in (("warm", "few", ""), ("cached", "data", str(folder / "cache")), ("encoding", "data", "")):
                trainer = p2_train.CaptionerTrainer(config, p2_train.Settings(
                    data=str(folder / part), output=str(folder / f"{name}.safetensors"), cache=cache, views=1,
                    decoder=str(EMBEDDED_DECODER), epochs=1, scst_epochs=0, selection=0, batch_size=images_a_step))
                seconds[name], _ = timed(trainer.fit)
        finally:
            captioner.load_encoder = original
        del seconds["warm"]
        trained = trainer.model.num_trained()
        hugging_face, trained_there = hugging_face_trainer(images, images_a_step * 5, trainer.model.decoder.config, folder, device)
        seconds["transformers"], _ = timed(hugging_face.train)
    print(f"{len(images)} images, {captions} captions, {torch.get_num_threads()} threads of {os.cpu_count()} cores, {device}; "
          f"trained parameters {trained / 1e6:.2f}M, transformers {trained_there / 1e6:.2f}M")
    for name, value in seconds.items():
        print(f"{name:13}{captions / value:8.1f} captions/s  {seconds['transformers'] / value:6.2f} of transformers")


def hugging_face_trainer(images, batch_size, sizes, folder, device):
    """A Trainer for one epoch over these captions, of a model of the same sizes, and the number of its trained parameters."""
    try:
        from transformers import GPT2Config, Trainer, TrainingArguments, VisionEncoderDecoderConfig, VisionEncoderDecoderModel, ViTConfig
    except ImportError:
        raise UserError("--training compares with transformers: pip install -c constraints.txt transformers") from None

    vit = ViTConfig(hidden_size=192, num_hidden_layers=12, num_attention_heads=3, intermediate_size=768, image_size=224)
    decoder = GPT2Config(n_embd=sizes.n_embd, n_layer=sizes.n_layer, n_head=sizes.n_embd // 64,
                         n_positions=sizes.n_positions, add_cross_attention=True)
    model = VisionEncoderDecoderModel(VisionEncoderDecoderConfig.from_encoder_decoder_configs(vit, decoder))
    model.config.decoder_start_token_id = model.config.pad_token_id = 50256
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("enc_to_dec_proj" in name or "cross" in name)
    tokenizer = BPETokenizer()
    encoder = ImageEncoder("vit_tiny_patch16_224", weights="random")
    rows = [(image.path, tokenizer.encode(clean_caption(caption))[:sizes.n_positions - 1]) for image in images for caption in image.captions]

    def collate_rows(rows):
        pixels = torch.stack([encoder.preprocess(load_image(path, encoder.image_size)) for path, _ in rows])
        return {"pixel_values": (pixels - encoder.mean) / encoder.std, "labels": collate([tokens for _, tokens in rows])[1]}

    arguments = TrainingArguments(
        output_dir=str(folder / "transformers"), num_train_epochs=1, per_device_train_batch_size=batch_size, report_to="none",
        save_strategy="no", learning_rate=1e-4, remove_unused_columns=False, disable_tqdm=True,
        use_cpu=device == "cpu", bf16=device == "cuda")
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, data_collator=collate_rows)
    return trainer, sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def main():
    parser = ArgumentParser(description="How fast captioning is, as ratios measured in one run.")
    parser.add_argument("images", nargs="?", help="folder of images")
    parser.add_argument("--training", metavar="DATA", type=Path, help="measure training, on this train.json and images/train")
    parser.add_argument("--steps", type=int, default=20, help="of training, 8 images each")
    parser.add_argument("--beam_size", type=int, help="beams of every search; default: as the embedded model's checkpoint says")
    parser.add_argument("--batch_size", type=int, default=32, help="images at a time")
    parser.add_argument("--count", type=int, default=1000, help="images, the first by name")
    arguments = parser.parse_args()
    if (arguments.images is None) == (arguments.training is None):
        parser.error("name a folder of images, or --training and a folder of data")
    if arguments.training:
        return training_speed(arguments.training, arguments.steps)
    device = pick_device()
    images = dict(list(list_images(arguments.images).items())[:arguments.count])
    model = Captioner.load(EMBEDDED_CHECKPOINT, EMBEDDED_DECODER).to(device)
    settings = model.generation if arguments.beam_size is None else replace(model.generation, beam_size=arguments.beam_size)
    encoder = model.encoder
    batches = [batch.to(device) for _, batch, _ in
               load_ahead(images.values(), encoder.preprocess, encoder.image_size, arguments.batch_size)
               if batch is not None]
    few = batches[:1]  # the slow way, on few images

    with torch.inference_mode():
        encoder(batches[0])  # warm up
        seconds = {"encoder": timed(lambda: [encoder(batch) for batch in batches])[0]}
    with tempfile.TemporaryDirectory() as folder:
        for path in images.values():
            (Path(folder) / path.name).symlink_to(path.resolve())
        output = Path(folder) / "captions.json"
        command = ["bash", str(ROOT / "hw3_2.sh"), folder, str(output),
                   "--beam_size", str(settings.beam_size), "--batch_size", str(arguments.batch_size)]
        environment = os.environ | {"VIRTUAL_ENV": sys.prefix, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        seconds["hw3_2.sh"], done = timed(lambda: subprocess.run(command, env=environment, capture_output=True, text=True))
        if done.returncode not in (0, 3):
            raise UserError(f"hw3_2.sh failed: {done.stderr.strip().splitlines()[-1]}")
    seconds["captioning"], (captions, _) = timed(
        lambda: caption_folder(model, images, settings, arguments.batch_size, device))
    slow, alone = timed(lambda: one_by_one_without_cache(model, few, settings))
    seconds["one by one"] = slow / len(few[0]) * len(images)

    same = sum(one == two for one, two in zip(alone, captions.values()))
    print(f"{len(images)} images, beam {settings.beam_size}, batch {arguments.batch_size}, "
          f"{torch.get_num_threads()} threads of {os.cpu_count()} cores, {device}")
    for name, value in seconds.items():
        print(f"{name:12}{len(images) / value:8.1f} images/s  {seconds['encoder'] / value:6.2f} of the encoder alone")
    print(f"one by one and in batches gave the same caption for {same} of {len(alone)} images")


if __name__ == "__main__":
    run(main)
