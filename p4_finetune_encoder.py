"""Fine-tune the image encoder on captioned pictures, so that its features hold more of what captions describe.

    bash hw3_download.sh
    python3 p4_finetune_encoder.py --data flickr8k coco --output checkpoints

The embedded encoder was trained to classify ImageNet's 1,000 classes, but captions need more: who does what, with what, where. Its
convolutions are trained further, at a low learning rate, with a weighted sum of three losses:

  contrast   match each caption with its picture within a batch, and each picture with its captions (CLIP: Radford et al. 2021,
             https://arxiv.org/abs/2103.00020), through the heads of clip_small.py; such fine-tuning improves retrieval (VSE++: Faghri
             et al. 2018, https://arxiv.org/abs/1707.05612)
  caption    cross-entropy of the captions through the small frozen decoder, by a captioner of captioner.py
  keep       the classifier's predictions must stay as they were, so that it does not forget what no caption here mentions (learning
             without forgetting: Li and Hoiem 2016, https://arxiv.org/abs/1606.09282)

Every step takes new random crops, which suits a GPU: pictures are kept there as uint8, 250 kB each. For the first `--head_epochs` only
the heads are trained, since the gradients of untrained heads would damage the encoder. The output is the moving average of the encoder's
weights, one file for each of its parts, `<part>_captions.safetensors`; put into weights/, the encoder's name is
`<part>_captions+<part>_captions`. All later trainings freeze it again. The same command resumes a run that was killed, or stopped by SIGTERM
or --max_hours.

Shapes: B pictures, M captions, S pixels a side, N patches, D the encoder's width.
"""

import json
import math
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save

from captioner import EMBEDDED_DECODER, Captioner, CaptionerConfig
from cli import ArgumentParser, UserError, add_options, check_settings, option, run, take_options, whole_numbers
from clip_data import SAMPLE, joined, partial_sentences
from clip_small import ClipConfig, ClipSmall, TextEncoder, multi_positive_loss
from dataset import CaptionData, Mixture, clean_captions, collate, data_digest, token_ids
from devices import Processes, autocast, pick_device
from encoder import CLASSIFIER, EMBEDDED, TUNED, architecture_of, load_encoder
from files import write_whole
from retrieval import Ranks
from tokenizer import BPETokenizer
from training import MovingAverage, Run, adamw, bound_scale, comparable, cosine, epoch_order, prepare_output, step_generator
from vit_student import crop, jitter, read_pixels

BATCH = 64  # pictures, or captions, in a batch at evaluation
MAX_TOKENS = 40  # of a caption
SMALLEST = 0.5  # minimum fraction of a picture's area in a crop: its captions are often wrong for smaller ones
LOSSES = "contrast", "caption", "keep"


@dataclass
class Settings:
    data: tuple = option(("data",), "folders with train.json and images/train")
    encoder: str = option(EMBEDDED, "initial encoder: timm's name, or several joined by +")
    image_size: int = option(0, "0: the encoder's own")
    output: str = option("checkpoints", "folder for the encoder's parts")
    decoder: str = option(str(EMBEDDED_DECODER), "GPT-2 weights for the caption loss")
    cache: str = option("cache", "folder for the sentence encoder's outputs for the captions")
    head_epochs: int = option(1, "first train only the heads for so many epochs")
    epochs: int = option(10, "then train heads and encoder for so many")
    batch_size: int = 256
    captions: int = option(2, "maximum number of captions per picture in a step")
    learning_rate: float = option(1e-3, "of the heads")
    encoder_learning_rate: float = 1e-4
    weight_decay: float = 0.05
    warmup: float = option(0.05, "fraction of all steps")
    average: float = option(0.99, "decay of the weights' moving average, which is saved; 0: save the last step's weights")
    contrast: float = option(1.0, "weight of this loss")
    caption: float = option(1.0, "weight of this loss")
    keep: float = option(1.0, "weight of this loss")
    selection: tuple = option((300,), "number of pictures at the end of each train.json to hold out: one number, or one for each folder")
    seed: int = 0
    max_hours: float = option(0.0, "stop after so many hours, ready to resume; 0: no limit")

    def __post_init__(self):
        self.data, self.selection = tuple(map(str, self.data)), whole_numbers("selection", self.selection)
        check_settings(self, ("epochs", "batch_size", "captions"), ("warmup", "average"))
        if min(self.learning_rate, self.encoder_learning_rate) <= 0:
            raise UserError("the learning rates must be above 0")
        if not self.contrast + self.caption:
            raise UserError("--contrast or --caption must be above 0")


class EncoderTrainer:
    """One run: pictures in memory, the encoder, the heads for its losses, optimizer and progress."""

    def __init__(self, settings, device=None):
        self.settings, self.device = settings, device or pick_device()
        names = settings.encoder.split("+")
        if any(name.endswith(TUNED) for name in names):
            raise UserError(f"{settings.encoder} is fine-tuned already: name the encoder that it was made from")
        self.files = [Path(settings.output) / f"{name}{TUNED}.safetensors" for name in names]
        self.state_file = [prepare_output(file) for file in self.files][0]
        mixture = Mixture(settings.data, settings.selection)
        self.images, self.selection = mixture.images, mixture.selection

        torch.manual_seed(settings.seed)
        self.teacher = load_encoder(settings.encoder, settings.image_size).to(self.device)
        encoder = load_encoder(settings.encoder, settings.image_size, frozen=False).to(self.device)
        if not encoder.class_names:
            raise UserError(f"{settings.encoder} brings no classifier, which says what is to be kept")
        self.data = CaptionData(self.images, BPETokenizer(), MAX_TOKENS)
        self.make_clip(encoder)
        config = CaptionerConfig(encoder=settings.encoder, lora_rank=0)
        self.captioner = Captioner(config, encoder, config.load_decoder(settings.decoder), token_ids(self.data.rows)).to(self.device)
        self.restore(encoder)
        self.pixels = read_pixels([[image.path for image in self.images]], encoder.image_size)[:, 0].to(self.device)
        self.selection_pixels = read_pixels([[image.path for image in self.selection]], encoder.image_size)[:, 0]
        if not self.run.resumed:
            some = torch.linspace(0, len(self.images) - 1, min(SAMPLE, len(self.images))).long().split(BATCH)
            with torch.no_grad():
                self.clip.image_head.measure((encoder(self.pixels[part]) for part in some), encoder)

    def make_clip(self, encoder):
        """Our CLIP on this encoder, with untrained heads, and the inputs of its text head for all captions."""
        config = ClipConfig(encoder=self.settings.encoder)
        text = TextEncoder(device=self.device)
        sentences = partial_sentences(text, config, self.settings.cache)
        parts = [[*map(clean_captions, images)] for images in (self.images, self.selection)]
        self.sentences = joined([sentences([caption for captions in part for caption in captions]) for part in parts if part])
        counts = torch.tensor([len(captions) for part in parts for captions in part])
        self.starts = F.pad(counts.cumsum(0), (1, 0))  # index of each picture's first caption; selection pictures come last
        self.clip = ClipSmall(config, encoder, text).to(self.device)

    def restore(self, encoder):
        settings = self.settings
        self.weights = {f"encoder.{name}": value for name, value in encoder.named_parameters()}
        heads = ({f"clip.{name}": value for name, value in self.clip.trained_parameters().items()}
                 | {f"captioner.{name}": value for name, value in self.captioner.trained_parameters().items()})
        self.optimizer = adamw([(heads.values(), 1.0), (self.weights.values(), settings.encoder_learning_rate / settings.learning_rate)],
                               settings.learning_rate, settings.weight_decay)
        self.steps = math.ceil(len(self.images) / settings.batch_size)
        parameters = heads | self.weights
        self.average = MovingAverage(parameters, settings.average)
        # The statistics of the features are measured once, at the start.
        usual = {f"clip.{name}": value for name, value in self.clip.image_head.named_buffers()}
        same = comparable(settings, "max_hours", "cache") | {
            "training images": data_digest(self.images), "encoder's weights": self.teacher.weights_hash}
        self.run = Run(self.state_file, same, parameters | usual, self.optimizer, average=self.average, processes=Processes(self.device),
                       after=partial(bound_scale, self.clip.log_scale), max_hours=settings.max_hours,
                       log=self.state_file.with_name("finetune_encoder.jsonl"), first={"history": []})

    def fit(self):
        """Train to the end and return the metrics of each epoch; None if interrupted, ready to resume."""
        settings = self.settings
        count = sum(weight.numel() for weight in self.weights.values())
        print(f"{len(self.images)} pictures to train on, {len(self.selection)} to select on; {count / 1e6:.1f}M weights of the encoder",
              flush=True)
        with self.run:
            for step in self.run.steps(self.steps * (settings.head_epochs + settings.epochs)):
                self.step(step)
                if (step + 1) % self.steps == 0:
                    self.report((step + 1) // self.steps)
        if self.run.stopped:
            return None
        with self.average.in_place():
            for file, part in zip(self.files, getattr(self.clip.encoder, "parts", [self.clip.encoder])):
                write_encoder(file, part, asdict(settings))
        self.run.finish([*LOSSES, "selection text to image@1"])
        return self.run.progress["history"]

    def step(self, step):
        """One update; all randomness depends only on the seed and the step."""
        settings = self.settings
        epoch, place = divmod(step, self.steps)
        for weight in self.weights.values():
            weight.requires_grad_(epoch >= settings.head_epochs)
        numbers = epoch_order(len(self.images), settings.seed, epoch)[place * settings.batch_size:][:settings.batch_size]
        generator = step_generator(settings.seed, step)
        pixels = self.pixels[numbers.to(self.device)]
        with autocast(self.device):
            images = jitter(crop(pixels, pixels.shape[-1], generator, SMALLEST), generator)
            drawn = [torch.randperm(count, generator=generator)[:settings.captions] for count in self.counts(numbers)]
            losses = self.losses(images, numbers, drawn, dropout=0.5)
        sum(getattr(settings, name) * loss for name, loss in losses.items()).backward()
        # Each phase, heads alone and then all, has a learning rate schedule of its own.
        first, total = (0, settings.head_epochs) if epoch < settings.head_epochs else (settings.head_epochs, settings.epochs)
        warmup = max(1, round(settings.warmup * total * self.steps))
        rate = settings.learning_rate * cosine(step - first * self.steps, total * self.steps, warmup)
        self.run.update(rate, len(numbers), **{name: loss.item() for name, loss in losses.items()})

    def counts(self, numbers):
        """The number of captions of each of these pictures."""
        return (self.starts[numbers + 1] - self.starts[numbers]).tolist()

    def losses(self, images, numbers, drawn, dropout=0.0):
        """{loss: its value}.

        Args:
            images: float (B, 3, S, S), from 0 to 255. numbers: (B,), of training pictures. drawn: indices of each one's captions to use.
        """
        features = self.clip.encoder(images).float()  # (B, N, D)
        owners = torch.tensor([place for place, some in enumerate(drawn) for _ in some], device=self.device)
        captions = torch.cat([self.starts[number] + some for number, some in zip(numbers, drawn)])
        seen, read = self.embed_images(features, dropout), self.embed_texts(captions, dropout / 5)
        with torch.autocast(self.device, enabled=False):  # half precision is too coarse for a scale of 100
            contrast = multi_positive_loss(seen.float(), read.float(), owners, self.clip.log_scale.exp())
        rows = [[self.data.rows[number][k] for k in some.tolist()] for number, some in zip(numbers, drawn)]
        most = max(map(len, rows))
        tokens, targets = collate([row for of_one in rows for row in of_one + [[]] * (most - len(of_one))])
        caption = self.captioner.loss(features, tokens.to(self.device), targets.to(self.device))
        with torch.no_grad():
            before = self.teacher.class_probabilities(self.teacher(images).float())
        now = self.clip.encoder.class_probabilities(features).clamp(min=1e-8)
        keep = (before * (before.clamp(min=1e-8).log() - now.log())).sum(-1).mean()
        return {"contrast": contrast, "caption": caption, "keep": keep}

    def embed_images(self, features, dropout=0.0):
        head = self.clip.image_head
        return F.normalize(head(head.summarize(features, self.clip.encoder), dropout), dim=-1)

    def embed_texts(self, numbers, dropout=0.0):
        hidden, mask = (part.to(self.device) for part in self.sentences.batch(numbers))
        return F.normalize(self.clip.text_head(hidden, mask, dropout), dim=-1)

    @torch.inference_mode()
    def report(self, epoch):
        """Evaluate the averaged weights on the selection pictures; print and record the metrics."""
        entry = {"epoch": epoch, "seconds": self.run.seconds}
        numbers = torch.arange(len(self.images), len(self.images) + len(self.selection))
        if len(numbers):
            with self.average.in_place(), autocast(self.device):
                features = [self.clip.encoder(part.to(self.device)).float() for part in self.selection_pixels.split(BATCH)]
                images = torch.cat([self.embed_images(part) for part in features])
                before = torch.cat([self.teacher.class_probabilities(self.teacher(part.to(self.device)).float())
                                    for part in self.selection_pixels.split(BATCH)])
                now = torch.cat([self.clip.encoder.class_probabilities(part) for part in features])
                texts = torch.cat([self.embed_texts(part) for part in torch.arange(
                    int(self.starts[numbers[0]]), int(self.starts[-1])).split(BATCH)])
            owners = torch.arange(len(numbers)).repeat_interleave(torch.tensor(self.counts(numbers)))
            entry["same class"] = (before.argmax(-1) == now.argmax(-1)).float().mean().item()
            entry |= {f"{way}@{k}": value for way, found in Ranks.of((texts @ images.t()).float().cpu(), owners).recalls().items()
                      for k, value in found.items()}
        self.run.progress["history"].append(entry)
        self.run.write(**{f"selection {name}": value for name, value in entry.items()})
        print(", ".join(f"{name} {value:.3f}" for name, value in entry.items()), flush=True)


def write_encoder(path, encoder, training):
    """Write a trainable ImageEncoder with its classifier, under timm's names: matrices in fp16, all else in its own type, since
    normalisation statistics need the precision."""
    import timm

    classifier = timm.get_pretrained_cfg(architecture_of(encoder.name)).classifier
    state = encoder.model.state_dict() | {f"{classifier}.{part.removeprefix('class_')}": getattr(encoder, part) for part in CLASSIFIER}
    tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    tensors = {name: value.half() if value.ndim > 1 else value for name, value in tensors.items()}
    write_whole(path, save(tensors, {"training": json.dumps(training)}))


def main():
    parser = ArgumentParser(description="Fine-tune the image encoder on pictures with captions.")
    add_options(parser, Settings)
    EncoderTrainer(take_options(parser.parse_args(), Settings)).fit()


if __name__ == "__main__":
    run(main)
