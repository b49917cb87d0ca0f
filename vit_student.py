"""The ViT that p4_pretrain_vit.py trains: its crops and augmentation, its heads, and its distillation loss."""

import json
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save, save_file
from timm.layers import resample_abs_pos_embed
from torch import nn
from torchvision.transforms.functional import adjust_brightness, adjust_contrast, adjust_saturation
from tqdm import tqdm

from cli import UserError
from encoder import HEADS, OWN, dinov2_names
from features import make_view
from files import make_ordinary, read_weights, write_whole
from images import load_picture, resize_to_square

CROP_PIXELS = 256  # side of the square that random crops are taken from
SHARED_DIM = 256  # width of the joint space of images and texts
LOSSES = "distillation", "contrast", "caption"


def read_pixels(sources, size, views=1, side=None):
    """Every view of every picture, as FeatureCache encodes them: uint8 (n, views, 3, size, size). Raises UserError.

    Args:
        sources: lists of paths, each numbered from 0, since each has a separate cache.
        side: size that pictures are decoded for, which affects the position of crops; default: `size`.
    """
    numbered = [(number, path) for paths in sources for number, path in enumerate(paths)]
    pixels = torch.empty(len(numbered), views, 3, size, size, dtype=torch.uint8)

    def read(place):
        number, path = numbered[place]
        image = load_picture(path, side or size)
        for view in range(views):
            pixels[place, view] = resize_to_square(make_view(image, view, number), size)

    with ThreadPoolExecutor() as pool:
        for _ in tqdm(pool.map(read, range(len(numbered))), total=len(numbered), desc=f"reading at {size} pixels",
                      unit="image"):
            pass
    return pixels


def crop(images, size, generator, smallest=0.35):
    """Random crops of at least this fraction of the area, mirrored with probability 1/2: (B, 3, S, S) -> float (B, 3, size, size),
    0 to 255.

    The generator is a CPU's, so that crops are the same on any device.
    """
    random = torch.rand(5, len(images), generator=generator)
    area, aspect = smallest + (1 - smallest) * random[0], torch.exp((random[1] - 0.5) * math.log(16 / 9))  # 3:4 to 4:3
    width, height = (area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1)
    theta = torch.zeros(len(images), 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = torch.where(random[2] < 0.5, -width, width), height
    theta[:, 0, 2], theta[:, 1, 2] = (2 * random[3] - 1) * (1 - width), (2 * random[4] - 1) * (1 - height)
    grid = F.affine_grid(theta.to(images.device), (len(images), 3, size, size), align_corners=False)
    return F.grid_sample(images.float(), grid, align_corners=False, padding_mode="border")


def jitter(images, generator):
    """Jitter brightness, contrast and saturation, each by up to 40%: (B, 3, S, S) -> float, 0 to 255.

    Sampled once per eighth of a batch, since torchvision changes all pictures of a call in the same way.
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
    """Float (B, 3, S, S) -> (B, 3, size, size), with antialiasing."""
    if images.shape[-1] == size:
        return images
    return F.interpolate(images, size=(size, size), mode="bicubic", antialias=True).clamp(0, 255)


class Student(nn.Module):
    """The ViT, and a head for each loss except the captions'.

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
        """Tokens (B, 1 + N, 384) -> unit vectors in the joint space (B, 256)."""
        return F.normalize(self.image_projection(tokens[:, 0]), dim=-1)

    def embed_texts(self, vectors):
        """Sentence embeddings (B, 384) -> unit vectors in the joint space (B, 256)."""
        return F.normalize(self.text_projection(vectors), dim=-1)

    def save(self, path, training):
        """Write the ViT with timm's names and the two projections, in fp16, with the training settings."""
        state = self.vit.state_dict() | {f"{name}.weight": getattr(self, name).weight for name in HEADS}
        state = {name: value.detach().to("cpu", torch.float16).contiguous() for name, value in state.items()}
        write_whole(path, save(state, {"training": json.dumps(training)}))

    @classmethod
    def load(cls, path):
        """The student from a file of `save`, or from a ViT's weights, with untrained heads. Raises UserError."""
        student, state = cls(), read_weights(path, "ViT")
        heads = {name: state.pop(name).float() for name in [*state] if name.startswith(HEADS)}
        try:
            student.vit.load_state_dict({name: value.float() for name, value in state.items()})
        except RuntimeError:
            raise UserError(f"{path} does not hold timm's {OWN['vit_small']} at 224 pixels") from None
        student.load_state_dict(heads, strict=False)
        return student


class Standardizer(nn.Module):
    """Normalises the teacher's features to mean 0 and standard deviation 1 per channel, so that the student learns what differs
    between pictures; separately for the map's cells and the pooled features. Statistics are those of `sample` (n, N, D)."""

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

    If the student has another number of patches (tokens: (B, 1 + n, 384)), they are resampled to the teacher's grid.
    """
    side, target = math.isqrt(tokens.shape[1] - 1), math.isqrt(cells.shape[1])
    patches = tokens[:, 1:].transpose(1, 2).unflatten(2, (side, side)).float()
    if side != target:
        patches = F.interpolate(patches, size=(target, target), mode="bilinear", antialias=True)
    patches = patches.flatten(2).transpose(1, 2)  # (B, N, 384)
    return (2 - F.cosine_similarity(student.pooled(tokens[:, 0]), pooled, dim=-1).mean()
            - F.cosine_similarity(student.map(patches), cells, dim=-1).mean())


def parameter_groups(student, others, layer_decay, weight_decay):
    """AdamW's groups: weight decay for matrices only, and each layer's learning rate is `layer_decay` times the next layer's.

    `others`: parameters of the captioner, with the heads' learning rate.
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
    """Write a ViT of p4_pretrain_vit.py as a folder that transformers loads as a Dinov2Model with its image processor.

    Parameters have the names of Meta's published models, whatever a version of transformers calls them inside. The processor resizes
    the whole picture to `size` × `size` pixels, as everywhere here; the position embedding is resized as in timm, from which
    transformers differs.
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


@torch.inference_mode()
def embed(student, pixels, batch_size=64):
    """Pictures uint8 (n, 3, S, S) -> their unit vectors in the joint space (n, 256), on the CPU."""
    device = student.log_scale.device
    return torch.cat([student.embed_images(student(batch.to(device).float())).cpu() for batch in pixels.split(batch_size)])
