"""Train our own small CLIP: heads on a frozen image encoder and a frozen sentence encoder, in minutes on a laptop.

    bash hw3_download.sh
    python3 p4_clip.py --data data coco --output checkpoints/clip_small.safetensors

Each folder of --data is in the course's layout: train.json in COCO's caption form and images/train. Features of the image
encoder, and hidden states below the trained layers of the sentence encoder, are computed once and cached in cache/. The
loss is a weighted sum of three:

  contrast   match each caption with its picture within a batch, and each picture with its captions (CLIP: Radford et al.
             2021, https://arxiv.org/abs/2103.00020; several positives: Khosla et al. 2020,
             https://arxiv.org/abs/2004.11362)
  anchors    match each of the encoder's 1,000 classes with sentences that name it, by virtual pictures: what the encoder would
             output if its classifier recognised the class. No real picture is needed: see VirtualPictures
  keep       similarities between sentences without pictures must stay as in the sentence encoder's space, so that words that
             describe no picture here keep their meaning

The same command resumes a run that was killed, or stopped by SIGTERM or --max_hours; on a CPU the result is bit for bit that of an
uninterrupted run. `report/measure_clip.py` evaluates the model.

    python3 p4_clip.py --data data coco --folds 5 --of weights/clip_small.safetensors --output cache/clip_folds.safetensors

A CLIP overfits its training pictures: among 300 of them, it finds 68% by a caption; among new ones, 43%. A model that is trained
on its embeddings, or rewarded by them, should get those of pictures that are new to the CLIP. So `--folds` trains no model, but
for each part of the pictures an image head on all other parts, towards the text embeddings of a finished model, and writes its
embeddings of the held-out part (cross-fitting, as in stacking: Wolpert 1992). p2_train.py and p2_tune.py read them.
"""

import math
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from cli import ArgumentParser, UserError, add_options, check_settings, option, run, take_options, whole_numbers
from clip_data import Pictures, VirtualPictures, joined, partial_sentences, sample_of
from clip_small import SMALL_WEIGHTS, USUAL, ClipConfig, ClipSmall, Folds, ImageHead, Summary, TextEncoder, keep_loss, multi_positive_loss
from dataset import clean_captions, read_folders
from devices import Processes, pick_device
from features import FeatureCache
from files import fingerprints, read_lines
from retrieval import Ranks
from runtime import RUNTIME_HELP, pick_runtime
from training import Interruption, MovingAverage, Run, adamw, bound_scale, comparable, cosine, epoch_order, prepare_output, step_generator

TEXTS = 128  # batch size of sentences in the trained layers
PHRASES = ("{}", "a photo of a {}", "a picture of a {}", "a {} in the picture", "there is a {}", "a close up of a {}",
           "this is a photo of {}", "someone with a {}")


@dataclass
class Settings:
    data: tuple = option(("data",), "folders with train.json and images/train")
    output: str = option("checkpoints/clip_small.safetensors", "the model to write, or the embeddings of --folds")
    folds: int = option(0, "number of folds, each embedded by a head trained on the others; 0: train a model")
    of: str = option(str(SMALL_WEIGHTS), "the finished model, for --folds")
    cache: str = option("cache", "folder for features")
    runtime: str = option("auto", RUNTIME_HELP)
    views: int = option(1, "of each picture: 1: the whole picture; more: random crops too, every other one mirrored")
    captions: int = option(1, "maximum number of captions per picture in a step")
    text: tuple = option((), "files with a sentence per line, without pictures, for --keep")
    epochs: int = 18
    batch_size: int = 1536
    learning_rate: float = 2e-3
    text_learning_rate: float = option(1e-4, "of the sentence encoder's last layers")
    weight_decay: float = 0.05
    warmup: float = option(0.05, "fraction of all steps")
    clip: float = option(1.0, "maximum gradient norm")
    average: float = option(0.99, "decay of the weights' moving average, which is saved; 0: save the last step's weights")
    dropout: float = option(0.5, "of the pictures' statistics")
    text_dropout: float = option(0.1, "of a sentence's tokens")
    anchors: float = option(0.1, "weight of this loss")
    keep: float = option(0.1, "weight of this loss")
    selection: tuple = option(
        (500,), "number of pictures at the end of each train.json to hold out: one number, or one for each folder")
    seed: int = 0
    max_hours: float = option(0.0, "stop after so many hours, ready to resume; 0: no limit")

    def __post_init__(self):
        self.data, self.text = tuple(map(str, self.data)), tuple(map(str, self.text))
        self.selection = whole_numbers("selection", self.selection)
        check_settings(self, ("batch_size", "views", "captions", "epochs"), ("warmup", "average", "dropout", "text_dropout"))
        if self.folds == 1:
            raise UserError("--folds must be at least 2: a head learns from the other parts")
        if min(self.learning_rate, self.text_learning_rate) <= 0:
            raise UserError("the learning rates must be above 0")


# ---- training --------------------------------------------------------------------------------------------------


class ClipTrainer:
    """One run: pictures and sentences in memory, heads, optimizer and progress."""

    def __init__(self, config, settings, device=None):
        self.config, self.settings, self.device, self.begun = config, settings, device or pick_device(), time.monotonic()
        self.state_file = prepare_output(settings.output)
        self.folders = read_folders(settings.data, settings.selection)
        extra = [line.strip() for file in settings.text for line in read_lines(file)]
        torch.manual_seed(settings.seed)
        encoder = config.load_encoder(runtime=pick_runtime(settings.runtime, self.device), device=self.device).to(self.device)
        text = TextEncoder(device=self.device)
        self.names = [name.split(", ") for name in encoder.class_names] if config.classes and settings.anchors else []
        sentences = partial_sentences(text, config, settings.cache)
        captions = [[*map(clean_captions, folder.images)] for folder in self.folders]
        self.texts = [sentences([text for texts in part for text in texts]) for part in captions]
        self.extra = sentences(extra) if extra and settings.keep else None
        phrased = [phrase.format(name) for names in self.names for name in names for phrase in PHRASES]
        self.phrases = sentences(phrased) if phrased else None
        self.model = self.make_model(encoder, text).to(self.device)
        with Interruption(settings.max_hours, self.begun) as stop:
            caches = [FeatureCache(encoder, folder.paths(), settings.cache, settings.views, device=self.device, stop=stop)
                      for folder in self.folders]
        self.measure(caches)
        self.pictures = Pictures(caches, self.model.image_head, encoder)
        self.index(captions)
        self.virtual = VirtualPictures(self.pictures) if self.names else None
        self.restore()

    def make_model(self, encoder, text):
        return ClipSmall(self.config, encoder, text)

    def measure(self, caches):
        self.model.image_head.measure((part for cache in caches for part in sample_of(cache)), self.model.encoder)

    def index(self, captions):
        """Number pictures and captions over all folders, and record which are for training."""
        first, self.train, self.selection, self.captions, offset = 0, [], [], [], 0
        for folder, part in zip(self.folders, captions):
            for texts in part:
                self.captions.append(range(offset, offset + len(texts)))
                offset += len(texts)
            numbers = range(first, first + len(folder.images))
            self.train += numbers[:folder.train]
            self.selection.append(numbers[folder.train:])
            first += len(folder.images)
        self.counts = torch.tensor([*map(len, self.captions)])
        self.sentences = joined(self.texts)
        self.name_starts = np.cumsum([0] + [len(names) for names in self.names])
        self.steps = math.ceil(len(self.train) / self.settings.batch_size)

    def restore(self):
        settings, parameters = self.settings, self.model.trained_parameters()
        text = [parameter for name, parameter in parameters.items() if name.startswith("text_head.layers.")]
        others = [parameter for name, parameter in parameters.items() if not name.startswith("text_head.layers.")]
        self.optimizer = adamw([(others, 1.0), (text, settings.text_learning_rate / settings.learning_rate)],
                               settings.learning_rate, settings.weight_decay)
        self.average = MovingAverage(parameters, settings.average)
        same = comparable(settings, "max_hours", "cache", "runtime") | comparable(self.config) | {
            "number of pictures": len(self.pictures), "number of captions": len(self.sentences)}
        self.run = Run(self.state_file, same, parameters, self.optimizer, average=self.average, processes=Processes(self.device),
                       clip=settings.clip, after=partial(bound_scale, self.model.log_scale), max_hours=settings.max_hours, since=self.begun,
                       log=Path(settings.output).with_suffix(".jsonl"), first={"history": []})
        self.progress = self.run.progress

    def fit(self):
        """Train to the end and return the metrics of each epoch; None if interrupted, ready to resume."""
        total = self.steps * self.settings.epochs
        trained = sum(parameter.numel() for parameter in self.model.trained_parameters().values())
        print(f"{len(self.train)} pictures with {int(self.counts[self.train].sum())} captions to train on, "
              f"{sum(map(len, self.selection))} to select on; {trained / 1e6:.2f}M trained parameters", flush=True)
        with self.run:
            for step in self.run.steps(total):
                self.step(step, total)
                if (step + 1) % self.steps == 0:
                    self.report((step + 1) // self.steps)
        if self.run.stopped:
            return None
        history = self.progress["history"]
        with self.average.in_place():
            self.model.save(self.settings.output, asdict(self.settings), history[-1])
        self.run.finish(["contrast", "anchors", "keep", *(name for name in history[-1] if "@1" in name)])
        return history

    def step(self, step, total):
        """One update; all randomness depends only on the seed and the step."""
        settings = self.settings
        epoch, place = divmod(step, self.steps)
        order = epoch_order(len(self.train), settings.seed, epoch)
        numbers = torch.tensor(self.train)[order[place * settings.batch_size:][:settings.batch_size]]
        losses = self.losses(numbers, step_generator(settings.seed, step))
        sum(weight * loss for weight, loss in losses.values()).backward()
        warmup = max(1, int(settings.warmup * total))
        self.run.update(settings.learning_rate * cosine(step, total, warmup), **{name: loss.item() for name, (_, loss) in losses.items()})

    def losses(self, numbers, generator):
        """{loss: (its weight, its value)} for these pictures."""
        settings, model = self.settings, self.model
        scale = model.log_scale.exp()
        views = torch.randint(settings.views, (len(numbers),), generator=generator)
        drawn, owners = [], []
        for place, number in enumerate(numbers.tolist()):
            captions = self.captions[number]
            some = torch.randperm(len(captions), generator=generator)[:settings.captions].tolist()
            drawn += [captions[i] for i in some]
            owners += [place] * len(some)
        summary = self.pictures.batch(numbers, views)
        images = self.embed_images(summary)
        texts = self.embed_texts(self.sentences, torch.tensor(drawn))
        losses = {"contrast": (1.0, multi_positive_loss(images, texts, torch.tensor(owners, device=self.device), scale))}
        if self.virtual:
            classes = torch.randperm(len(self.names), generator=generator)[:len(numbers)]
            pictures = Summary(*(part[:len(classes)] for part in summary))
            virtual = self.embed_images(self.virtual.shift(pictures, classes, generator))
            random = torch.rand(2, len(classes), generator=generator)
            of_name = [self.name_starts[c] + int(part * len(self.names[c]))
                       for part, c in zip(random[0].tolist(), classes.tolist())]
            phrases = torch.tensor(of_name) * len(PHRASES) + (random[1] * len(PHRASES)).long()
            named = self.embed_texts(self.phrases, phrases)
            numbered = torch.arange(len(classes), device=self.device)
            losses["anchors"] = (settings.anchors, multi_positive_loss(virtual, named, numbered, scale))
        if self.extra:
            some = torch.randint(len(self.extra), (settings.batch_size,), generator=generator)
            vectors = self.extra.vectors[some].to(self.device)
            losses["keep"] = (settings.keep, keep_loss(self.embed_texts(self.extra, some), vectors, 20.0))
        return losses

    def embed_images(self, summary, train=True):
        """Summary -> unit vectors (B, width)"""
        summary = Summary(*(part.to(self.device) for part in summary))
        return F.normalize(self.model.image_head(summary, self.settings.dropout if train else 0.0), dim=-1)

    def embed_texts(self, sentences, numbers, train=True):
        """Sentences with these indices (M,) -> unit vectors (M, width), batched by length to reduce padding."""
        order = (sentences.starts[numbers + 1] - sentences.starts[numbers]).argsort(stable=True)
        dropout = self.settings.text_dropout if train else 0.0
        rows = [self.model.text_head(*(part.to(self.device) for part in sentences.batch(some)), dropout=dropout)
                for some in numbers[order].split(TEXTS)]
        return F.normalize(torch.cat(rows)[order.argsort()], dim=-1)

    @torch.inference_mode()
    def report(self, epoch):
        """Evaluate the averaged weights on each folder's selection pictures; print and record the metrics."""
        entry = {"epoch": epoch, "seconds": self.progress["seconds"], "scale": self.model.log_scale.exp().item()}
        with self.average.in_place():
            for folder, numbers in zip(self.folders, self.selection):
                if not len(numbers):
                    continue
                numbers = torch.tensor(numbers)
                images = self.embed_images(self.pictures.batch(numbers, torch.zeros_like(numbers)), train=False)
                captions = torch.tensor([i for number in numbers.tolist() for i in self.captions[number]])
                texts = self.embed_texts(self.sentences, captions, train=False)
                ranks = Ranks.of((texts @ images.t()).cpu(), torch.arange(len(numbers)).repeat_interleave(self.counts[numbers]))
                entry |= {f"{folder.path.name}, {way}@{k}": value
                          for way, found in ranks.recalls().items() for k, value in found.items()}
        self.progress["history"].append(entry)
        self.run.write(**entry)
        print(f"epoch {epoch}, {entry['seconds']:.0f} s: " + ", ".join(
            f"{name} {value:.3f}" for name, value in entry.items() if "@" in name), flush=True)


class CrossFit(ClipTrainer):
    """Embeddings of every picture by an image head trained without it, towards the text embeddings of a finished model."""

    def __init__(self, config, settings, device=None):
        self.embedded = {}  # {id of a Sentences: its text embeddings}
        super().__init__(ClipSmall.read_metadata(settings.of)[1], settings, device)  # not `config`: another model's

    def make_model(self, encoder, text):
        return ClipSmall.load(self.settings.of, encoder, text)

    def measure(self, caches):
        """Nothing: the finished model's statistics are used."""

    def restore(self):
        """Nothing: each fold is a separate run."""

    def embed_texts(self, sentences, numbers, train=True):
        if id(sentences) not in self.embedded:
            with torch.no_grad():
                self.embedded[id(sentences)] = super().embed_texts(sentences, torch.arange(len(sentences)), train=False)
        return self.embedded[id(sentences)][numbers]

    def fit(self):
        """Write the embeddings, as clip_small.Folds reads them. Returns whether all folds are done."""
        settings = self.settings
        same = comparable(settings, "max_hours", "cache", "runtime") | {
            "number of pictures": len(self.pictures), "number of captions": len(self.sentences), "texts": self.model.text_digest}
        runs = []
        everything = torch.randperm(len(self.pictures), generator=torch.Generator().manual_seed(settings.seed))
        embeddings = torch.empty(len(self.pictures), settings.views, self.config.width)
        usual = {name: value for name, value in self.model.image_head.state_dict().items() if name in (*USUAL, "components")}
        for fold, unseen in enumerate(everything.chunk(settings.folds)):
            self.train = sorted({*range(len(self.pictures))} - {*unseen.tolist()})
            self.steps = math.ceil(len(self.train) / settings.batch_size)
            torch.manual_seed(settings.seed)
            head = self.model.image_head = ImageHead(self.config, self.model.encoder.dim, len(self.model.encoder.class_names)).to(self.device)
            head.load_state_dict(usual, strict=False)
            parameters = {f"image_head.{name}": parameter for name, parameter in head.named_parameters()}
            self.optimizer = adamw([(parameters.values(), 1.0)], settings.learning_rate, settings.weight_decay)
            self.average = MovingAverage(parameters, settings.average)
            total = self.steps * settings.epochs
            self.run = Run(self.state_file.with_name(f"{self.state_file.name.removesuffix('.state.pt')}.{fold + 1}.state.pt"), same,
                           parameters, self.optimizer, average=self.average, processes=Processes(self.device), clip=settings.clip,
                           max_hours=settings.max_hours, since=self.begun)
            runs.append(self.run)
            with self.run:
                for step in self.run.steps(total, description=f"fold {fold + 1} of {settings.folds}"):
                    self.step(step, total)
                if self.run.stopped:
                    return False
                self.run.save()  # until the last is done
            with self.average.in_place(), torch.inference_mode():
                for some in unseen.split(512):
                    for view in range(settings.views):
                        views = torch.full_like(some, view)
                        embeddings[some, view] = self.embed_images(self.pictures.batch(some, views), train=False).cpu()
            self.report_recall(unseen, embeddings)
        Folds.save(settings.output, embeddings, fingerprints([path for folder in self.folders for path in folder.paths()]),
                   self.model.text_digest, asdict(settings))
        for finished in runs:
            finished.finish([])
        return True

    def report_recall(self, numbers, embeddings, most=500):
        """Print the recall, in both directions, of these pictures, which their head was not trained on."""
        numbers = numbers[:most].sort().values
        captions = torch.tensor([i for number in numbers.tolist() for i in self.captions[number]])
        likenesses = self.embed_texts(self.sentences, captions).cpu() @ embeddings[numbers, 0].t()
        ranks = Ranks.of(likenesses, torch.arange(len(numbers)).repeat_interleave(self.counts[numbers]))
        print(", ".join(f"{way}@{k} {value:.3f}" for way, found in ranks.recalls().items() for k, value in found.items()), flush=True)


def main():
    parser = ArgumentParser(description="Train a small CLIP on frozen encoders.")
    for config in Settings, ClipConfig:
        add_options(parser, config)
    arguments = parser.parse_args()
    config, settings = take_options(arguments, ClipConfig), take_options(arguments, Settings)
    (CrossFit if settings.folds else ClipTrainer)(config, settings).fit()


if __name__ == "__main__":
    run(main)
