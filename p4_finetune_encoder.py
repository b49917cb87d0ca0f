"""Fine-tune the image encoder on pictures with captions, so that the captioner and our CLIP see more of what people write about.

    bash hw3_download.sh
    python3 p4_finetune_encoder.py --data flickr8k coco --output checkpoints

The embedded encoder learnt to tell ImageNet's 1,000 classes apart, and what matters to a caption is more: who does what, with what,
where. Its convolutions go on learning, at a low learning rate, from three losses, each with a weight of its own:

  contrast   every caption is to find its picture among a batch's, and a picture its captions (CLIP: Radford et al. 2021,
             https://arxiv.org/abs/2103.00020), through the heads of clip_small.py; fine-tuning so pays in retrieval (VSE++: Faghri
             et al. 2018, https://arxiv.org/abs/1707.05612)
  caption    cross-entropy of the captions through the small frozen decoder, by a captioner of captioner.py
  keep       its classifier is to say what it said before, so that it does not forget what no caption here speaks of (learning
             without forgetting: Li and Hoiem 2016, https://arxiv.org/abs/1606.09282)

Every step crops anew, which suits a GPU: pictures wait there as uint8, 250 kB each. For the first `--head_epochs` the heads learn
alone, since what an untrained head asks for would only destroy. What is written is the moving average of the encoder's weights, a file
for each of its parts, `<part>_captions.safetensors`; in weights/ the encoder is `<part>_captions+<part>_captions`. It is frozen again for
all that is trained on it. A run that was killed, or stopped by SIGTERM or --max_hours, goes on when the same command is given again.

Shapes: B pictures, M captions, S pixels a side, N patches, D the encoder's width.
"""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save

from captioner import EMBEDDED_DECODER, Captioner, CaptionerConfig
from cli import ArgumentParser, UserError, add_options, check_settings, option, run, take_options
from clip_data import SAMPLE, joined, partial_sentences
from clip_small import ClipConfig, ClipSmall, TextEncoder, multi_positive_loss
from dataset import CaptionData, Mixture, clean_captions, collate, data_digest, token_ids
from devices import Processes, autocast, pick_device
from encoder import CLASSIFIER, EMBEDDED, TUNED, load_encoder
from files import write_whole
from retrieval import Ranks
from tokenizer import BPETokenizer
from training import MovingAverage, Run, adamw, comparable, cosine, prepare_output
from vit_student import crop, jitter, read_pixels

BATCH = 64  # pictures, or captions, that are looked at together where nothing is learnt
MAX_TOKENS = 40  # of a caption
SMALLEST = 0.5  # part of a picture's area that a crop shows: of less, its captions are often untrue
LOSSES = "contrast", "caption", "keep"


@dataclass
class Settings:
    data: tuple = option(("data",), "folders with train.json and images/train")
    encoder: str = option(EMBEDDED, "what to start from: timm's name, or several joined by +")
    image_size: int = option(0, "0: the encoder's own")
    output: str = option("checkpoints", "folder for the encoder's parts")
    decoder: str = option(str(EMBEDDED_DECODER), "GPT-2 weights that captions are written with")
    cache: str = option("cache", "folder for what the sentence encoder says of the captions")
    head_epochs: int = option(1, "of the heads alone, before the encoder is trained too")
    epochs: int = option(10, "of all of it")
    batch_size: int = 256
    captions: int = option(2, "of each picture in a step, at most")
    learning_rate: float = option(1e-3, "of the heads")
    encoder_learning_rate: float = 1e-4
    weight_decay: float = 0.05
    warmup: float = option(0.05, "part of all steps")
    average: float = option(0.99, "decay of the moving average of the weights, which is what is saved; 0: the last step's")
    contrast: float = option(1.0, "weight of that loss")
    caption: float = option(1.0, "weight of that loss")
    keep: float = option(1.0, "weight of that loss")
    selection: tuple = option((300,), "pictures at the end of each train.json that are not trained on: one number, or one for each folder")
    seed: int = 0
    max_hours: float = option(0.0, "stop then, ready to go on; 0: no limit")

    def __post_init__(self):
        self.data, self.selection = tuple(map(str, self.data)), tuple(map(int, self.selection))
        check_settings(self, ("epochs", "batch_size", "captions"), ("warmup", "average"))
        if len(self.selection) not in (1, len(self.data)) or min(self.selection) < 0:
            raise UserError("--selection is one number for every folder of --data, or one for each, at least 0")
        if min(self.learning_rate, self.encoder_learning_rate) <= 0:
            raise UserError("the learning rates must be above 0")
        if not self.contrast + self.caption:
            raise UserError("--contrast or --caption must be above 0")


class EncoderTrainer:
    """One run: pictures in memory, the encoder, the heads that teach it, optimizer and the place that it has come to."""

    def __init__(self, settings, device=None):
        self.settings, self.device = settings, device or pick_device()
        names = settings.encoder.split("+")
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
        """Our CLIP on this encoder, untrained, and the captions as its text head meets them."""
        config = ClipConfig(encoder=self.settings.encoder)
        text = TextEncoder(device=self.device)
        sentences = partial_sentences(text, config, self.settings.cache)
        parts = [[*map(clean_captions, images)] for images in (self.images, self.selection)]
        self.sentences = joined([sentences([caption for captions in part for caption in captions]) for part in parts if part])
        counts = torch.tensor([len(captions) for part in parts for captions in part])
        self.starts = F.pad(counts.cumsum(0), (1, 0))  # where the captions of each picture begin, the selection's last
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
        # What is usual among features is measured once, at the beginning.
        usual = {f"clip.{name}": value for name, value in self.clip.image_head.named_buffers()}
        same = comparable(settings, "max_hours", "cache") | {
            "training images": data_digest(self.images), "encoder's weights": self.teacher.weights_hash}
        self.run = Run(self.state_file, same, parameters | usual, self.optimizer, average=self.average, processes=Processes(self.device),
                       after=self.bound_scale, max_hours=settings.max_hours,
                       log=self.state_file.with_name("finetune_encoder.jsonl"), first={"history": []})

    @torch.no_grad()
    def bound_scale(self):
        self.clip.log_scale.clamp_(max=math.log(100))  # as CLIP's

    def fit(self):
        """Train to the end and return what each epoch was worth; None where it was interrupted, ready to go on."""
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
        self.run.finish([*LOSSES, *(f"selection {name}" for name in (*LOSSES, "text to image@1"))])
        return self.run.progress["history"]

    def step(self, step):
        """One update; everything random follows from the seed and the step."""
        settings = self.settings
        epoch, place = divmod(step, self.steps)
        for weight in self.weights.values():
            weight.requires_grad_(epoch >= settings.head_epochs)
        order = torch.randperm(len(self.images), generator=torch.Generator().manual_seed(settings.seed * 1_000_003 + epoch))
        numbers = order[place * settings.batch_size:][:settings.batch_size]
        generator = torch.Generator().manual_seed((settings.seed << 32) + step)
        torch.manual_seed((settings.seed << 32) + step)  # dropout
        pixels = self.pixels[numbers.to(self.device)]
        with autocast(self.device):
            images = jitter(crop(pixels, pixels.shape[-1], generator, SMALLEST), generator)
            drawn = [torch.randperm(count, generator=generator)[:settings.captions] for count in self.counts(numbers)]
            losses = self.losses(images, numbers, drawn, dropout=0.5)
        sum(getattr(settings, name) * loss for name, loss in losses.items()).backward()
        # Both parts have a schedule of their own: the encoder's learning rate rises when the heads' has been falling for a while.
        first, total = (0, settings.head_epochs) if epoch < settings.head_epochs else (settings.head_epochs, settings.epochs)
        warmup = max(1, round(settings.warmup * total * self.steps))
        rate = settings.learning_rate * cosine(step - first * self.steps, total * self.steps, warmup)
        self.run.update(rate, len(numbers), **{name: loss.item() for name, loss in losses.items()})

    def counts(self, numbers):
        """How many captions these pictures have."""
        return (self.starts[numbers + 1] - self.starts[numbers]).tolist()

    def losses(self, images, numbers, drawn, dropout=0.0):
        """{loss: its value}.

        Args:
            images: float (B, 3, S, S), from 0 to 255. numbers: (B,), theirs among all. drawn: which captions of each are looked at.
        """
        features = self.clip.encoder(images).float()  # (B, N, D)
        owners = torch.tensor([place for place, some in enumerate(drawn) for _ in some], device=self.device)
        captions = torch.cat([self.starts[number] + some for number, some in zip(numbers, drawn)])
        seen, read = self.embed_images(features, dropout), self.embed_texts(captions, dropout / 5)
        with torch.autocast(self.device, enabled=False):  # half precision is too coarse for a scale of 100
            contrast = multi_positive_loss(seen.float(), read.float(), owners, self.clip.log_scale.exp())
        rows = [[self.data.rows[number][k] for k in some.tolist()] if number < len(self.images) else [] for number, some in zip(numbers, drawn)]
        most = max(1, *map(len, rows))
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
        """Print, and keep, what the average of the weights is worth on the selection pictures."""
        entry = {"epoch": epoch, "seconds": self.run.seconds}
        numbers = torch.arange(len(self.images), len(self.images) + len(self.selection))
        if len(numbers):
            with self.average.in_place(), autocast(self.device):
                self.captioner.eval()
                features = [self.clip.encoder(part.to(self.device)).float() for part in self.selection_pixels.split(BATCH)]
                images = torch.cat([self.embed_images(part) for part in features])
                before = torch.cat([self.teacher.class_probabilities(self.teacher(part.to(self.device)).float())
                                    for part in self.selection_pixels.split(BATCH)])
                now = torch.cat([self.clip.encoder.class_probabilities(part) for part in features])
                texts = torch.cat([self.embed_texts(part) for part in torch.arange(
                    int(self.starts[numbers[0]]), int(self.starts[-1])).split(BATCH)])
                self.captioner.train()
            owners = torch.arange(len(numbers)).repeat_interleave(torch.tensor(self.counts(numbers)))
            entry["same class"] = (before.argmax(-1) == now.argmax(-1)).float().mean().item()
            entry |= {f"{way}@{k}": value for way, found in Ranks.of((texts @ images.t()).float().cpu(), owners).recalls().items()
                      for k, value in found.items()}
        self.run.progress["history"].append(entry)
        self.run.write(**{f"selection {name}": value for name, value in entry.items()})
        print(", ".join(f"{name} {value:.3f}" for name, value in entry.items()), flush=True)


def write_encoder(path, encoder, training):
    """Write an ImageEncoder that can be trained, in timm's names with its classifier: matrices in fp16, the rest, whose statistics would
    suffer from it, as it is."""
    import timm

    classifier = timm.get_pretrained_cfg(encoder.name).classifier
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
