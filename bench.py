"""How fast captioning is, as ratios measured in one run.

    python3 bench.py <images> [--beam_size 3] [--count 1000]

Four ways through the same images, each with its images per second and its ratio to the first, which is the floor
that the frozen encoder sets:
  encoder       the frozen encoder alone, on pictures already decoded
  hw3_2.sh      the whole command, start of Python and loading of weights included
  captioning    the same without the start: decode, encode, search, in batches with a cache
  one by one    one image at a time, every step computing the whole text again
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import captioner
from captioner import EMBEDDED_CHECKPOINT, EMBEDDED_DECODER, Captioner, GenerationConfig
from cli import ArgumentParser, UserError, run
from dataset import list_images, load_ahead
from p2_infer import caption_folder
from training import pick_device


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


def one_by_one_without_cache(model, batches, generation):
    """Caption decoded batches one image at a time and without a cache: list of captions."""
    originals = captioner.Cache, Captioner.next_log_probs
    captioner.Cache, Captioner.next_log_probs = TokenHistory, log_probs_without_cache
    try:
        return [caption for batch in batches for image in batch for caption in model.caption(image[None], generation)]
    finally:
        captioner.Cache, Captioner.next_log_probs = originals


def timed(function):
    """Seconds that `function` takes, CUDA's work included, and what it returns."""
    start = time.perf_counter()
    result = function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def main():
    parser = ArgumentParser(description="How fast captioning is, as ratios measured in one run.")
    parser.add_argument("images", help="folder of images")
    parser.add_argument("--beam_size", type=int, default=3, help="beams of every search")
    parser.add_argument("--batch_size", type=int, default=32, help="images at a time")
    parser.add_argument("--count", type=int, default=1000, help="images, the first by name")
    arguments = parser.parse_args()
    device = pick_device()
    images = dict(list(list_images(arguments.images).items())[:arguments.count])
    generation = GenerationConfig(arguments.beam_size)
    model = Captioner.load(EMBEDDED_CHECKPOINT, EMBEDDED_DECODER).to(device)
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
        command = ["bash", str(Path(__file__).with_name("hw3_2.sh")), folder, str(output),
                   "--beam_size", str(arguments.beam_size), "--batch_size", str(arguments.batch_size)]
        environment = os.environ | {"VIRTUAL_ENV": sys.prefix, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        seconds["hw3_2.sh"], done = timed(lambda: subprocess.run(command, env=environment, capture_output=True, text=True))
        if done.returncode not in (0, 3):
            raise UserError(f"hw3_2.sh failed: {done.stderr.strip().splitlines()[-1]}")
    seconds["captioning"], (captions, _) = timed(
        lambda: caption_folder(model, images, generation, arguments.batch_size, device))
    slow, alone = timed(lambda: one_by_one_without_cache(model, few, generation))
    seconds["one by one"] = slow / len(few[0]) * len(images)

    same = sum(one == two for one, two in zip(alone, captions.values()))
    print(f"{len(images)} images, beam {arguments.beam_size}, batch {arguments.batch_size}, "
          f"{torch.get_num_threads()} threads of {os.cpu_count()} cores, {device}")
    for name, value in seconds.items():
        print(f"{name:12}{len(images) / value:8.1f} images/s  {seconds['encoder'] / value:6.2f} of the encoder alone")
    print(f"one by one and in batches gave the same caption for {same} of {len(alone)} images")


if __name__ == "__main__":
    run(main)
