"""Train our own small CLIP: heads on a frozen image encoder and a frozen sentence encoder, in minutes on a laptop.

    bash hw3_download.sh
    python3 p4_clip.py --data data coco --output checkpoints/clip_small.safetensors

Each folder of --data is in the course's layout: train.json in COCO's caption form and images/train. Features of the image
encoder, and what comes out below the trained layers of the sentence encoder, are computed once and kept in cache/. Three
losses, each with a weight of its own:

  contrast   every caption of a picture is to find it among a batch's pictures, and a picture its captions among the
             others' (CLIP: Radford et al. 2021, https://arxiv.org/abs/2103.00020; several positives: Khosla et al. 2020,
             https://arxiv.org/abs/2004.11362)
  anchors    the classifier of the encoder knows 1,000 classes by name: a picture as it would make the encoder see a class is
             to find sentences that name it. No picture is needed: see VirtualPictures
  keep       sentences without pictures are to stay as far from each other as the sentence encoder puts them, so that words that
             no picture here has keep their place

A run that was killed, or stopped by SIGTERM or --max_hours, goes on when the same command is given again, on a CPU bit for bit
as if it had never stopped. `report/measure_clip.py` measures what came of it.

    python3 p4_clip.py --data data coco --folds 5 --of weights/clip_small.safetensors --output cache/clip_folds.safetensors

A CLIP knows the pictures that it learnt from too well: of 300 training pictures it finds 68% by a caption, of new ones 43%. What
is trained to read its embeddings, or rewarded by them, should see those of pictures that are new to it. So `--folds` trains no
model, but for each part of the pictures an image head on all other parts, towards the texts of a finished model, and writes what
these say of the pictures that they have not seen (cross-fitting, as in stacking: Wolpert 1992). p2_train.py and p2_tune.py read it.
"""

import hashlib
import json
import math
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from cli import ArgumentParser, UserError, add_options, read_lines, run, take_options
from clip_small import SMALL_WEIGHTS, USUAL, ClipConfig, ClipSmall, Folds, ImageHead, Summary, TextEncoder, mean_of_tokens, run_layers
from dataset import FeatureCache, Folder, clean_captions, fingerprints
from retrieval import Ranks
from training import (Interruption, MovingAverage, TrainingLog, adamw, check_settings, cosine, load_state, pick_device,
                      prepare_output, save_state, step_optimizer, what_matters)

LOG_STEPS = 20
TEXTS = 128  # sentences that pass the trained layers at a time
SAMPLE = 2000  # pictures on which principal components and usual values are measured
PHRASES = ("{}", "a photo of a {}", "a picture of a {}", "a {} in the picture", "there is a {}", "a close up of a {}",
           "this is a photo of {}", "someone with a {}")


@dataclass
class Settings:
    data: tuple = ("data",)
    output: str = "checkpoints/clip_small.safetensors"
    folds: int = 0
    of: str = str(SMALL_WEIGHTS)
    cache: str = "cache"
    views: int = 1
    captions: int = 1
    text: tuple = ()
    epochs: int = 18
    batch_size: int = 1536
    learning_rate: float = 2e-3
    text_learning_rate: float = 1e-4
    weight_decay: float = 0.05
    warmup: float = 0.05
    clip: float = 1.0
    average: float = 0.99
    dropout: float = 0.5
    text_dropout: float = 0.1
    anchors: float = 0.1
    keep: float = 0.1
    selection: tuple = (500,)
    seed: int = 0
    save_minutes: float = 5.0
    max_hours: float = 0.0

    def __post_init__(self):
        self.data, self.text = tuple(map(str, self.data)), tuple(map(str, self.text))
        self.selection = tuple(map(int, self.selection))
        if len(self.selection) == 1:
            self.selection *= len(self.data)
        check_settings(self, ("batch_size", "views", "captions", "epochs"), ("warmup", "average", "dropout", "text_dropout"))
        if self.folds == 1:
            raise UserError("--folds must be at least 2: a head learns from the other parts")
        if not self.data or len(self.selection) != len(self.data) or min(self.selection) < 0:
            raise UserError("--selection takes one number for all folders of --data, or one for each, at least 0")
        if min(self.learning_rate, self.text_learning_rate) <= 0 or self.seed < 0 or min(self.anchors, self.keep) < 0:
            raise UserError("the learning rates must be above 0, --seed, --anchors and --keep at least 0")


HELP = dict(
    data="folders with train.json and images/train", output="the model to write, or the embeddings of --folds",
    folds="parts of the pictures, each to be embedded by a head that has not seen it; 0: train a model", of="the model of --folds", cache="folder for features",
    views="of each picture in the cache: 1 as it is, more: random crops too, every other mirrored",
    captions="of each picture in a step, at most", text="files with a sentence a line, without pictures, for --keep",
    text_learning_rate="of the sentence encoder's last layers", warmup="part of all steps", clip="gradient norm",
    average="decay of the moving average of the weights, which is what is saved; 0: the last step's",
    dropout="of the pictures' statistics", text_dropout="of a sentence's tokens", anchors="weight of that loss",
    keep="weight of that loss",
    selection="pictures at the end of each train.json that are not trained on: one number, or one for each folder",
    save_minutes="between states to resume from", max_hours="stop then, ready to go on; 0: no limit",
    encoder="timm's name of a ViT or a CNN, or several joined by +", image_size="0: the encoder's own",
    encoder_levels="how many of a CNN's feature maps make its tokens; 0: up to three", width="of the shared space",
    attention_heads="of the pooling over patches; 0: none", cell_dim="principal components of a patch",
    classes="what the encoder's own classifier says is seen too", text_layers="last layers of the sentence encoder to train",
    text_heads="of the pooling over a sentence's tokens; 0: none")


# ---- texts -----------------------------------------------------------------------------------------------------


class Sentences:
    """Sentences as the trained layers meet them: hidden states, kept in a file in fp16, and the encoder's own vectors.

    `starts` (n + 1,): where each sentence's tokens begin among all of them.
    """

    def __init__(self, texts, encoder, layers, text_hash, folder, batch_size=256):
        key = hashlib.sha256(json.dumps([text_hash, layers, encoder.max_tokens, texts]).encode()).hexdigest()[:16]
        file = Path(folder) / f"texts-{key}.npz"
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            hidden, lengths, vectors = self.encode(texts, encoder, layers, batch_size)
            temporary = file.with_suffix(".tmp.npz")
            np.savez(temporary, hidden=hidden, starts=np.concatenate([[0], np.cumsum(lengths)]), vectors=vectors)
            temporary.replace(file)
        with np.load(file) as found:
            self.hidden, self.starts = torch.from_numpy(found["hidden"]), torch.from_numpy(found["starts"])
            self.vectors = torch.from_numpy(found["vectors"])

    @staticmethod
    @torch.inference_mode()
    def encode(texts, encoder, layers, batch_size):
        """Hidden states below the last `layers` of all tokens (sum of lengths, C), the lengths, and unit vectors (n, C)."""
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        rows, vectors = [None] * len(texts), np.empty((len(texts), encoder.dim), np.float32)
        above = encoder.model.encoder.layer[len(encoder.model.encoder.layer) - layers:] if layers else []
        for start in tqdm(range(0, len(order), batch_size), desc="embedding sentences", unit="batch"):
            some = order[start:start + batch_size]
            hidden, mask = encoder.lower([texts[i] for i in some], layers)
            vectors[some] = F.normalize(mean_of_tokens(run_layers(hidden, mask, above), mask), dim=-1).cpu().numpy()
            for i, row, length in zip(some, hidden.half().cpu().numpy(), mask.sum(1).tolist()):
                rows[i] = row[:length]
        return np.concatenate(rows), [*map(len, rows)], vectors

    def __len__(self):
        return len(self.vectors)

    def batch(self, numbers):
        """Sentence numbers (B,) -> hidden states (B, T, C), fp32, and mask (B, T)"""
        starts, ends = self.starts[numbers], self.starts[numbers + 1]
        place = torch.arange(int((ends - starts).max())) + starts[:, None]
        mask = (place < ends[:, None]).long()
        return self.hidden[place.clamp(max=len(self.hidden) - 1)].float() * mask[:, :, None], mask


# ---- pictures --------------------------------------------------------------------------------------------------


class Pictures:
    """Summaries of all views of all pictures of several feature caches, in memory in fp16: 50 kB each."""

    def __init__(self, caches, head, encoder, batch_size=64):
        rows = []
        for cache in caches:
            for view in range(len(cache.data)):
                parts = [head.summarize(part.to(head.stats_mean.device), encoder)
                         for part in batches_of(cache, view, batch_size, "summarizing")]
                rows.append(Summary(*(torch.cat([getattr(part, name).half().cpu() for part in parts])
                                      for name in Summary._fields)))
        views = len(caches[0].data)
        self.parts = Summary(*(torch.stack([torch.cat([getattr(row, name) for row in rows[view::views]])
                                            for view in range(views)], 1) for name in Summary._fields))

    def __len__(self):
        return len(self.parts.stats)

    def batch(self, numbers, views):
        """Picture numbers and views (B,) -> Summary, fp32, on the CPU"""
        return Summary(*(part[numbers, views].float() for part in self.parts))


def batches_of(cache, view, batch_size, what):
    """A cache's features of a view, in order: (B, N, D) each, fp16."""
    for start in tqdm(range(0, len(cache), batch_size), desc=what, unit="batch", leave=False):
        yield cache[range(start, min(start + batch_size, len(cache))), view]


class VirtualPictures:
    """Pictures that the encoder never saw, as it would see them if its classifier were sure of a class.

    Among the training pictures, what else is usual where the logit of a class lies t deviations above its mean? Where all is
    normally distributed that is linear in t: t times the correlation with the logit. Such a shift of a random picture's
    summary is a picture of that class, whether or not one was among them.
    """

    def __init__(self, pictures, sample=6000):  # on the CPU, as the pictures are
        some = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(0))[:sample]
        summary = pictures.batch(some, torch.zeros_like(some))
        logits = summary.classes.clamp(min=1e-8).log()
        logits = (logits - logits.mean(0)) / logits.std(0)
        self.stats = logits.t() @ summary.stats / len(some)  # (K, 2 D)
        self.cells = logits.t() @ summary.cells.mean(1) / len(some) if summary.cells.shape[-1] else None  # (K, R)

    def shift(self, summary, classes, generator):
        """A Summary of B random pictures, moved to these classes (B,)."""
        random = torch.rand(3, len(classes), generator=generator)
        strength = 2 + 6 * random[0, :, None]  # in deviations; real pictures of a class lie 3 to 8 above the mean
        keep = random[1, :, None]  # of the random picture
        sure = 0.2 + 0.7 * random[2, :, None]
        cells = keep[:, :, None] * summary.cells
        if self.cells is not None:
            cells = cells + (strength * self.cells[classes])[:, None]
        named = F.one_hot(classes, summary.classes.shape[1])
        return Summary(keep * summary.stats + strength * self.stats[classes], cells, sure * named + (1 - sure) * summary.classes)


# ---- losses ----------------------------------------------------------------------------------------------------


def multi_positive_loss(images, texts, owners, scale):
    """CLIP's loss where a picture has several texts: unit vectors (B, C) and (M, C), and each text's picture (M,).

    A text is to find its picture among all; a picture each of its texts among the other pictures' texts.
    """
    logits = scale * texts @ images.t()  # (M, B)
    to_image = F.cross_entropy(logits, owners)
    own = F.one_hot(owners, len(images)).bool()
    others = logits.masked_fill(own, -torch.inf).logsumexp(0)  # (B,)
    positives = logits.gather(1, owners[:, None]).squeeze(1)
    to_text = (torch.logaddexp(positives, others[owners]) - positives).mean()
    return (to_image + to_text) / 2


def keep_loss(embeddings, vectors, scale):
    """How far the likenesses of sentences to each other, unit vectors (B, C), are from those that the sentence encoder sees
    (B, 384): cross-entropy of one softmax over the others to the other, less its entropy."""
    own = torch.eye(len(vectors), dtype=torch.bool, device=vectors.device)
    target = (scale * vectors @ vectors.t()).masked_fill(own, -torch.inf).log_softmax(-1).masked_fill(own, 0)
    found = (scale * embeddings @ embeddings.t()).masked_fill(own, -torch.inf).log_softmax(-1).masked_fill(own, 0)
    return (target.exp().masked_fill(own, 0) * (target - found)).sum(-1).mean()


# ---- training --------------------------------------------------------------------------------------------------


class Trainer:
    """One run: pictures and sentences in memory, heads, optimizer and the place that it has come to."""

    def __init__(self, config, settings, device=None):
        self.config, self.settings, self.device = config, settings, device or pick_device()
        self.state_file = prepare_output(settings.output)
        self.folders = [Folder(folder, selection) for folder, selection in zip(settings.data, settings.selection)]
        extra = [line.strip() for file in settings.text for line in read_lines(file)]
        torch.manual_seed(settings.seed)
        encoder, text = config.load_encoder().to(self.device), TextEncoder(device=self.device)
        self.names = [name.split(", ") for name in encoder.class_names] if config.classes and settings.anchors else []
        sentences = partial_sentences(text, config, settings.cache)
        captions = [[*map(clean_captions, folder.images)] for folder in self.folders]
        self.texts = [sentences([text for texts in part for text in texts]) for part in captions]
        self.extra = sentences(extra) if extra and settings.keep else None
        phrased = [phrase.format(name) for names in self.names for name in names for phrase in PHRASES]
        self.phrases = sentences(phrased) if phrased else None
        self.model = self.make_model(encoder, text).to(self.device)
        caches = [FeatureCache(encoder, folder.paths(), settings.cache, settings.views,
                               device=self.device) for folder in self.folders]
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
        """Number pictures and captions over all folders, and note which are trained on."""
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
        self.kept = parameters | {f"average.{name}": value for name, value in self.average.values.items()}
        self.same = what_matters(settings, "save_minutes", "max_hours", "cache") | what_matters(self.config) | {
            "number of pictures": len(self.pictures), "number of captions": len(self.sentences)}
        self.progress = load_state(self.state_file, self.same, self.optimizer, self.kept, self.device) or {
            "step": 0, "seconds": 0.0, "history": []}
        self.average.steps = self.progress["step"]

    def fit(self):
        """Train to the end and return what each epoch was worth; None where it was interrupted, ready to go on."""
        settings, progress = self.settings, self.progress
        total = self.steps * settings.epochs
        log = TrainingLog(Path(settings.output).with_suffix(".jsonl"), progress["step"])
        started, saved, running = time.monotonic() - progress["seconds"], time.monotonic(), {}
        trained = sum(parameter.numel() for parameter in self.model.trained_parameters().values())
        print(f"{len(self.train)} pictures with {int(self.counts[self.train].sum())} captions to train on, "
              f"{sum(map(len, self.selection))} to select on; {trained / 1e6:.2f}M trained parameters", flush=True)
        with Interruption(settings.max_hours) as interruption, tqdm(
                total=total, initial=progress["step"], unit="batch", desc="training") as bar:
            while progress["step"] < total:
                for name, value in self.step(progress["step"], total).items():
                    running.setdefault(name, []).append(value)
                progress.update(step=progress["step"] + 1, seconds=time.monotonic() - started)
                bar.update()
                if progress["step"] % LOG_STEPS == 0:
                    means = {name: sum(values) / len(values) for name, values in running.items()}
                    log.write(progress["step"], **means, seconds=progress["seconds"])
                    bar.set_postfix({name: f"{value:.3f}" for name, value in means.items()})
                    running = {}
                if progress["step"] % self.steps == 0:
                    self.report(progress["step"] // self.steps, log)
                if interruption or time.monotonic() - saved > 60 * settings.save_minutes:
                    save_state(self.state_file, self.same, self.optimizer, self.kept, progress)
                    saved = time.monotonic()
                if interruption:
                    print(f"stopped after {progress['step']} of {total} steps: the same command goes on")
                    return None
        with self.average.in_place():
            self.model.save(settings.output, asdict(settings), progress["history"][-1])
        log.close(["contrast", "anchors", "keep", *(name for name in log.entries[-1] if "@1" in name)])
        self.state_file.unlink(missing_ok=True)
        return progress["history"]

    def step(self, step, total):
        """One update; everything random follows from the seed and the step. Returns {loss: value}."""
        settings = self.settings
        epoch, place = divmod(step, self.steps)
        order = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(settings.seed * 1_000_003 + epoch))
        numbers = torch.tensor(self.train)[order[place * settings.batch_size:][:settings.batch_size]]
        generator = torch.Generator().manual_seed((settings.seed << 32) + step)
        torch.manual_seed((settings.seed << 32) + step)  # dropout
        losses = self.losses(numbers, generator)
        sum(weight * loss for weight, loss in losses.values()).backward()
        warmup = max(1, int(settings.warmup * total))
        step_optimizer(self.optimizer, settings.learning_rate * cosine(step, total, warmup), settings.clip)
        with torch.no_grad():
            self.model.log_scale.clamp_(max=math.log(100))  # as CLIP's
        self.average.update()
        return {name: loss.item() for name, (_, loss) in losses.items()}

    def losses(self, numbers, generator):
        """{loss: (its weight, its value)} on these pictures."""
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
        """Sentences of these numbers (M,) -> unit vectors (M, width); alike lengths together, so that little is padding."""
        order = (sentences.starts[numbers + 1] - sentences.starts[numbers]).argsort(stable=True)
        dropout = self.settings.text_dropout if train else 0.0
        rows = [self.model.text_head(*(part.to(self.device) for part in sentences.batch(some)), dropout=dropout)
                for some in numbers[order].split(TEXTS)]
        return F.normalize(torch.cat(rows)[order.argsort()], dim=-1)

    @torch.inference_mode()
    def report(self, epoch, log):
        """Print, and keep, what the average of the weights is worth on each folder's selection pictures."""
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
        log.write(self.progress["step"], **entry)
        print(f"epoch {epoch}, {entry['seconds']:.0f} s: " + ", ".join(
            f"{name} {value:.3f}" for name, value in entry.items() if "@" in name), flush=True)


class CrossFit(Trainer):
    """Embeddings of every picture by an image head that was trained without it, towards the texts of a finished model."""

    def __init__(self, config, settings, device=None):
        self.embedded = {}  # of each Sentences, by id: its texts' embeddings
        super().__init__(config, settings, device)

    def make_model(self, encoder, text):
        model = ClipSmall.load(self.settings.of, encoder, text)
        self.config = model.config
        return model

    def measure(self, caches):
        """Nothing: what is usual is known, and has to be what it was for the model."""

    def restore(self):
        """Nothing: a fold takes minutes."""

    def embed_texts(self, sentences, numbers, train=True):
        if id(sentences) not in self.embedded:
            with torch.no_grad():
                self.embedded[id(sentences)] = super().embed_texts(sentences, torch.arange(len(sentences)), train=False)
        return self.embedded[id(sentences)][numbers]

    def fit(self):
        """Write the embeddings, as clip_small.Folds reads them."""
        settings = self.settings
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
            bar = tqdm(range(total), desc=f"fold {fold + 1} of {settings.folds}", unit="batch")
            for step in bar:
                bar.set_postfix(self.step(step, total))
            with self.average.in_place(), torch.inference_mode():
                for some in unseen.split(512):
                    for view in range(settings.views):
                        views = torch.full_like(some, view)
                        embeddings[some, view] = self.embed_images(self.pictures.batch(some, views), train=False).cpu()
            self.report_recall(unseen, embeddings)
        Folds.save(settings.output, embeddings, fingerprints([path for folder in self.folders for path in folder.paths()]),
                   self.model.text_digest, asdict(settings))

    def report_recall(self, numbers, embeddings, most=500):
        """Print how well these pictures, new to their head, find their captions and are found."""
        numbers = numbers[:most].sort().values
        captions = torch.tensor([i for number in numbers.tolist() for i in self.captions[number]])
        likenesses = self.embed_texts(self.sentences, captions).cpu() @ embeddings[numbers, 0].t()
        ranks = Ranks.of(likenesses, torch.arange(len(numbers)).repeat_interleave(self.counts[numbers]))
        print(", ".join(f"{way}@{k} {value:.3f}" for way, found in ranks.recalls().items() for k, value in found.items()), flush=True)


def partial_sentences(text, config, cache):
    """A function from a list of texts to their Sentences."""
    frozen = ClipSmall.hash_of(text, config)
    return lambda texts: Sentences(texts, text, config.text_layers, frozen, cache)


def joined(parts):
    """Several Sentences as one."""
    whole = Sentences.__new__(Sentences)
    ends = np.cumsum([0] + [len(part.hidden) for part in parts])
    whole.hidden = torch.cat([part.hidden for part in parts])
    whole.vectors = torch.cat([part.vectors for part in parts])
    whole.starts = torch.cat([torch.zeros(1, dtype=torch.long), *(part.starts[1:] + end for part, end in zip(parts, ends))])
    return whole


def sample_of(cache, batch_size=50):
    """Batches of the first view of SAMPLE pictures, spread over the cache."""
    numbers = np.linspace(0, len(cache) - 1, min(SAMPLE, len(cache))).round().astype(int)
    for start in range(0, len(numbers), batch_size):
        some = numbers[start:start + batch_size]
        yield cache[some, np.zeros_like(some)]


def main():
    parser = ArgumentParser(description="Train a small CLIP on frozen encoders.")
    for config in Settings, ClipConfig:
        names = {field.name for field in fields(config)}
        add_options(parser, config, **{key: text for key, text in HELP.items() if key in names})
    arguments = parser.parse_args()
    config, settings = take_options(arguments, ClipConfig), take_options(arguments, Settings)
    (CrossFit if settings.folds else Trainer)(config, settings).fit()


if __name__ == "__main__":
    run(main)
