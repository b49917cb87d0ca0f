"""The frozen image encoder: a timm ViT, a timm CNN whose feature map serves as the patch grid, or several of them concatenated.

    encoder = load_encoder("tf_efficientnet_lite2")
    tokens = encoder(torch.stack([encoder.preprocess(image) for image in images]))   # (B, N, D)

A CNN gives the hybrid of Dosovitskiy et al. 2021, section 3.1 (https://arxiv.org/abs/2010.11929):
each cell of its last feature map is one patch token. Earlier maps, and further CNNs, add channels.
"""

import copy
import hashlib
import sys
from contextlib import nullcontext
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from cli import UserError
from files import WEIGHTS_FOLDER, content_hash, digest_of, first_line, read_weights
from images import resize_to_square

# timm is imported where it is used: that takes two seconds, and an encoder compiled for OpenVINO does not need it.

EMBEDDED = "tf_efficientnet_lite2+tf_efficientnet_lite1"  # the embedded captioner's, which hw3_download.py fetches
# Pixels per forward pass of a CNN on a CPU, so that its feature maps stay in the CPU's cache: 8 images at 224², 4 at 288².
CPU_PIXELS = 8 * 224**2
# Models of this repository, and the timm architecture of their weights, at 224 pixels.
OWN = {"vit_small": "vit_small_patch14_dinov2",  # p4_pretrain_vit.py
       "vit_small_focus": "vit_small_patch14_dinov2"}  # which vit_small was trained from
TUNED = "_captions"  # what p4_finetune_encoder.py adds to the name of an encoder that it fine-tunes
FETCHED = "vit_large_patch14_clip_quickgelu_224.openai"  # by `hw3_download.sh full`
CLASSIFIER = "class_weight", "class_bias"  # buffers of an encoder whose weights file includes its classifier
HEADS = "image_projection", "text_projection"  # also in the files of OWN: projections into a joint space of images and texts


def load_encoder(name, image_size=None, levels=0, weights=None, runtime="torch", frozen=True, device="cpu"):
    """The encoder of that name: an ImageEncoder, or for names joined by `+` a JoinedEncoder. Raises UserError.

    Args:
        image_size, levels, weights: as of ImageEncoder, but with up to three levels by default; `weights` are None or "random".
        runtime: as pick_runtime gives it; "openvino": a CompiledEncoder, for the CPU only.
        frozen: as of ImageEncoder.
        device: where it is going to run; for "cuda" it is halved.
    """
    names = [part.strip() for part in name.split("+")]

    def build():
        encoders = [ImageEncoder(part, image_size, weights, levels, frozen) for part in names]
        encoder = encoders[0] if len(encoders) == 1 else JoinedEncoder(encoders)
        if device == "cuda":
            encoder.halve()
        return encoder

    if runtime == "torch":
        return build()
    from runtime import CompiledEncoder

    files = [] if weights else list(map(weights_file, names))
    if files and all(files):
        return CompiledEncoder([names, image_size, levels, [digest_of(file, "sha256") for file in files]], build, kept_networks())
    encoder = build()  # with weights from the model hub, or random ones
    return CompiledEncoder([names, encoder.image_size, encoder.levels, encoder.weights_hash], lambda: encoder, kept_networks())


def architecture_of(name):
    """timm's name of an encoder's architecture, which the models of this repository have beside a name of their own."""
    return OWN.get(name, name.removesuffix(TUNED))


def kept_networks():
    """The folder of compiled OpenVINO networks."""
    return WEIGHTS_FOLDER / "openvino"


def weights_file(name):
    """An encoder's file in weights/, or None."""
    files = [WEIGHTS_FOLDER / f"{name}{suffix}" for suffix in (".safetensors", ".bin", ".pth")]
    return next((file for file in files if file.is_file()), None)


class ImageEncoder(nn.Module):
    """A frozen backbone and its preprocessing.

    Args:
        name: a timm model, such as `vit_large_patch14_clip_quickgelu_224.openai` or `tf_efficientnet_lite2`, or one of
            OWN, such as `vit_small`.
        image_size: side of the square input in pixels; default: a ViT's own size, and 288 for a CNN, which works better at a
            larger size than it was trained at (Touvron et al. 2019, https://arxiv.org/abs/1906.06423).
        weights: a file of timm's tensors; None: `weights/<name>.*` if there, else the model hub;
            "random": untrained (for tests).
        levels: how many of a CNN's feature maps make a token: the last one and those at the ends of the preceding stages;
            0: up to three. Earlier maps carry more colour and texture; finer ones are averaged over the cells of the last
            one, and all are normalised, since their scales differ (hypercolumns: Hariharan et al. 2015, arXiv:1411.5752). A
            ViT has one level.
        frozen: False: its weights can be trained; batch norms keep their statistics, and are not folded into convolutions.

    Attributes: `name`, `image_size`, `levels`, `dim` (D), `grid` (rows, columns of patches), `num_prefix_tokens`
    (class and register tokens, which come before the patches).
    """

    runtime = "torch"

    def __init__(self, name, image_size=None, weights=None, levels=1, frozen=True):
        import timm

        super().__init__()
        if levels < 0:
            raise UserError(f"encoder_levels is {levels}, but must be at least 0")
        architecture = architecture_of(name)
        try:
            config = timm.get_pretrained_cfg(architecture, allow_unregistered=False) if timm.is_model(architecture) else None
        except (RuntimeError, KeyError):
            config = None
        if config is None:
            raise UserError(f"timm has no model named {name!r}; timm.list_models() lists those it has")
        # A ViT is built for one size, to which its position embeddings are resampled; a CNN takes any.
        own_size = 224 if name in OWN else config.input_size[-1]
        self.image_size = image_size or (own_size if config.fixed_input_size else 288)
        if self.image_size < 1:
            raise UserError(f"image_size is {self.image_size}, but must be at least 1 pixel")
        size = {"img_size": self.image_size} if config.fixed_input_size else {}
        self.name, self.halved = name, False
        self.resampled = bool(size) and self.image_size != own_size  # its position embeddings
        for part in CLASSIFIER:  # (classes, num_features), (classes,)
            self.register_buffer(part, None, persistent=False)
        self.model = self._load(name, config, size, weights)
        self.model.eval().requires_grad_(not frozen)
        self.is_vit = hasattr(self.model, "num_prefix_tokens")
        self.dim, self.stages = self.model.num_features, []
        if self.is_vit:
            self.grid = tuple(self.model.patch_embed.grid_size)
            patch = self.model.patch_embed.patch_size[0]
            if self.image_size % patch:
                raise UserError(f"image_size is {self.image_size}, but must be a multiple of {name}'s patches of {patch}")
        else:
            self.model.to(memory_format=torch.channels_last)  # twice as fast on a CPU
            with torch.inference_mode():
                features = self.model.forward_features(torch.zeros(1, 3, self.image_size, self.image_size))
            if features.ndim != 4 or features.shape[1] != self.model.num_features:
                raise UserError(f"{name} is neither a ViT nor a CNN with one feature map")
            self.grid = tuple(features.shape[2:])
            if levels != 1:
                channels = self.find_stages()
                self.stages = list(channels)[:(levels or 3) - 1]
                self.dim += sum(channels[stage] for stage in self.stages)
            if frozen and not features.is_meta:
                _ = self.weights_hash  # of the weights before batch norms are folded
                self.model = without_batch_norm(self.model, self.image_size)
        self.levels = 1 + len(self.stages)
        if levels > self.levels:
            raise UserError(f"encoder_levels is {levels}, but {name} has {self.levels}")
        self.num_prefix_tokens = self.model.num_prefix_tokens if self.is_vit else 0
        self.statistics = config.mean, config.std  # of pixels from 0 to 1
        self.register_buffer("mean", torch.empty(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.empty(3, 1, 1), persistent=False)
        self.reset_buffers()

    def reset_buffers(self):
        """Fill the buffers `mean` and `std`, which are in no file."""
        for buffer, values in zip((self.mean, self.std), self.statistics):
            buffer.copy_(torch.tensor(values).view(3, 1, 1) * 255)

    def _load(self, name, config, size, weights):
        import timm

        weights = weights or weights_file(name)
        if weights is None and name in EMBEDDED.split("+"):
            raise UserError(f"the embedded encoder's weights {name} are not here yet: run `bash hw3_download.sh`")
        if weights is None and name in OWN:
            raise UserError(f"{WEIGHTS_FOLDER / name}.safetensors is not here: run `bash hw3_download.sh vit`, and for "
                            "vit_small p4_pretrain_vit.py")
        if weights is None and name.endswith(TUNED):
            raise UserError(f"{WEIGHTS_FOLDER / name}.safetensors is not here: p4_finetune_encoder.py makes such files")
        if weights is None:
            try:
                return timm.create_model(name, pretrained=True, num_classes=0, **size)
            except Exception as error:  # the hub's client raises all kinds without a network
                way = ("run `bash hw3_download.sh full`" if name == FETCHED else
                       f"put timm's file of them there as {name}.safetensors")
                raise UserError(f"the weights of {name} are neither in {WEIGHTS_FOLDER} nor to be had from the "
                                f"model hub ({first_line(error)}); {way}") from None
        model = timm.create_model(architecture_of(name), num_classes=0, **size)
        if weights == "random":
            return model
        state = read_weights(weights, "encoder weights")
        # In timm, a function in each model's module renames keys and resamples position embeddings.
        convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
        head = tuple(f"{classifier}." for classifier in [*np.atleast_1d(config.classifier or []), *HEADS])
        try:
            state = convert(state, model) if convert else state
            model.load_state_dict({key: value for key, value in state.items() if not key.startswith(head or "\0")})
        except (RuntimeError, LookupError, AttributeError, TypeError, AssertionError) as error:
            raise UserError(f"{weights} does not hold the weights of timm's {name}: {first_line(error)}") from None
        self._keep_classifier(state, config, model.num_features)
        return model

    def _keep_classifier(self, state, config, dim):
        """Keep the last layer of a weights file for `class_probabilities`, if it is a classifier of a known list of classes."""
        from timm.data import infer_imagenet_subset

        name = config.classifier if isinstance(config.classifier, str) else "\0"
        weight, bias = (state.get(f"{name}.{part}") for part in ("weight", "bias"))
        if (weight is not None and bias is not None and weight.shape == (len(bias), dim)
                and infer_imagenet_subset({"num_classes": len(bias)})):
            for part, value in zip(CLASSIFIER, (weight, bias)):
                setattr(self, part, value.float())

    def halve(self):
        """Keep the matrices of a frozen ViT's blocks in fp16, for half the memory. Its features are then always those that it has under
        autocast in fp16, which would cast these matrices in every call."""
        _ = self.weights_hash  # of the weights as they came
        blocks = self.model.blocks if self.is_vit and hasattr(self.model, "blocks") else nn.Module()
        for layer in blocks.modules():
            if isinstance(layer, nn.Linear):
                layer.half()
                self.halved = True

    def find_stages(self):
        """The stages whose maps precede the last one, last first, with their numbers of channels: {stage: channels}"""
        if not hasattr(self.model, "forward_intermediates"):
            return {}
        with torch.inference_mode():
            last, maps = self.model.forward_intermediates(torch.zeros(1, 3, self.image_size, self.image_size))
        if maps[-1].shape == last.shape:  # the last stage is followed by no layer
            maps.pop()
        return {stage: maps[stage].shape[1] for stage in reversed(range(len(maps)))}

    def train(self, mode=True):
        """Frozen: always in evaluation mode, without dropout and batch statistics."""
        return super().train(False)

    @property
    def first(self):
        """The encoder itself; for a JoinedEncoder, its first part."""
        return self

    @property
    def device(self):
        return self.mean.device

    @property
    def num_tokens(self):
        return self.num_prefix_tokens + self.grid[0] * self.grid[1]

    @cached_property
    def weights_hash(self):
        """Content hash of the backbone's weights, which checkpoints record.

        Resampled position embeddings are left out, since resampling gives different bits on different machines.
        """
        return content_hash({name: value for name, value in self.model.state_dict().items()
                             if not (self.resampled and "pos_embed" in name)})

    @property
    def class_names(self):
        """The classes of its classifier as ImageNet names them ("tabby, tabby cat"); [] without a classifier."""
        return self.class_info.label_descriptions() if self.class_info else []

    @property
    def class_ids(self):
        """The same classes by their WordNet ids ("n02123045")."""
        return self.class_info.label_names() if self.class_info else []

    @cached_property
    def class_info(self):
        """timm's description of the classes; None without a classifier."""
        from timm.data import ImageNetInfo, infer_imagenet_subset

        if self.class_bias is None:
            return None
        return ImageNetInfo(infer_imagenet_subset({"num_classes": len(self.class_bias)}))

    def class_probabilities(self, features):
        """Tokens (B, N, D) of `forward` -> (B, classes): the output of the classifier that it was pretrained with."""
        x = features[..., :self.model.num_features]
        if not self.is_vit:
            x = x.transpose(1, 2).unflatten(2, self.grid)
        return F.linear(self.model.forward_head(x, pre_logits=True), self.class_weight, self.class_bias).softmax(-1)

    def preprocess(self, image):
        """RGB PIL image of any size -> uint8 tensor (3, S, S): the whole picture, aspect ignored, bicubic."""
        return resize_to_square(image, self.image_size)

    def forward(self, images):
        """uint8 images (B, 3, S, S) -> tokens (B, N, D): prefix tokens, then patches row by row."""
        step = max(1, CPU_PIXELS // self.image_size**2)
        if images.device.type == "cpu" and not self.is_vit and len(images) > step:
            return torch.cat([self(part) for part in images.split(step)])
        x = (images.to(self.mean.dtype) - self.mean) / self.std
        if self.is_vit:
            with torch.autocast(x.device.type, torch.float16) if self.halved else nullcontext():
                return self.model.forward_features(x)  # (B, N, D)
        x = x.contiguous(memory_format=torch.channels_last)
        if not self.stages:
            return cells(self.model.forward_features(x))
        last, maps = self.model.forward_intermediates(x, indices=self.stages[::-1])
        earlier = (cells(F.adaptive_avg_pool2d(part, self.grid)) for part in reversed(maps))
        return torch.cat([cells(last), *(F.layer_norm(part, part.shape[-1:]) for part in earlier)], -1)


def cells(x):
    """A feature map (B, D, rows, columns) -> its cells, row by row (B, N, D)"""
    return x.flatten(2).transpose(1, 2)


class JoinedEncoder(nn.Module):
    """Several ImageEncoders of one picture: a token is the concatenation of their channels for one patch.

    Networks that were trained separately know different things; the projection learns what to take from which.
    Attributes, `preprocess` and `forward` are as of an ImageEncoder. Raises UserError unless the encoders have the same
    patches and the same number of levels.
    """

    runtime = "torch"

    def __init__(self, encoders):
        super().__init__()
        self.parts = nn.ModuleList(encoders)
        first = self.first
        for part in encoders[1:]:
            if (part.image_size, part.grid, part.num_prefix_tokens) != (first.image_size, first.grid, first.num_prefix_tokens):
                raise UserError(f"{first.name} and {part.name} cannot be joined: their patches are {first.grid} of "
                                f"{first.image_size} pixels and {part.grid} of {part.image_size}, with "
                                f"{first.num_prefix_tokens} and {part.num_prefix_tokens} prefix tokens")
            if part.levels != first.levels:  # a checkpoint records one number
                raise UserError(f"{first.name} and {part.name} cannot be joined: they have {first.levels} and {part.levels} "
                                "feature maps; say --encoder_levels 1")
        self.name = "+".join(part.name for part in encoders)
        self.dim = sum(part.dim for part in encoders)
        self.image_size, self.levels, self.grid = first.image_size, first.levels, first.grid
        self.num_prefix_tokens, self.num_tokens, self.preprocess = first.num_prefix_tokens, first.num_tokens, first.preprocess

    @property
    def first(self):
        return self.parts[0]

    @property
    def device(self):
        return self.first.device

    @cached_property
    def weights_hash(self):
        """Content hash of the hashes of its parts."""
        return hashlib.sha256(" ".join(part.weights_hash for part in self.parts).encode()).hexdigest()

    @property
    def class_names(self):
        """The classes of the parts' classifiers, which must agree; [] if none has one."""
        return self.agreed("class_names")

    @property
    def class_ids(self):
        return self.agreed("class_ids")

    def halve(self):
        for part in self.parts:
            part.halve()

    def agreed(self, attribute):
        found = [value for part in self.parts if (value := getattr(part, attribute))]
        return found[0] if found and found.count(found[0]) == len(found) else []

    def class_probabilities(self, features):
        """Tokens (B, N, D) -> (B, classes): the mean over the parts' classifiers."""
        parts = zip(self.parts, features.split([part.dim for part in self.parts], -1))
        return torch.stack([part.class_probabilities(rows) for part, rows in parts if part.class_bias is not None]).mean(0)

    def forward(self, images):
        """uint8 images (B, 3, S, S) -> tokens (B, N, D)"""
        return torch.cat([part(images) for part in self.parts], -1)


def without_batch_norm(model, image_size):
    """A copy of a frozen CNN with its batch norms folded into its convolutions: the same features, faster.

    Returns the model itself if the copy's features differ, as when layers do not run in the order of their names.
    """
    folded = copy.deepcopy(model)
    fold_batch_norm(folded)
    images = torch.rand(2, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected, found = model.forward_features(images), folded.forward_features(images)
    return folded if torch.allclose(found, expected, rtol=0, atol=1e-3 * expected.abs().max().item()) else model


def fold_batch_norm(module):
    """Fold each batch norm into the convolution whose name precedes it."""
    from timm.layers import BatchNormAct2d

    conv = None
    for name, child in list(module.named_children()):
        if isinstance(child, nn.BatchNorm2d) and conv:
            setattr(module, conv, fuse_conv_bn_eval(getattr(module, conv), child))
            setattr(module, name, child.act if isinstance(child, BatchNormAct2d) else nn.Identity())
        elif not isinstance(child, nn.Conv2d):
            fold_batch_norm(child)
        conv = name if isinstance(child, nn.Conv2d) else None


def dinov2_names(depth=12):
    """Pairs of names of a DINOv2 ViT's tensors: timm's, and a tuple of those in Meta's models on the model hub.

    timm joins the projections to queries, keys and values into one tensor. The position embedding is left out, since not
    every file has all of it.
    """
    pairs = [("cls_token", ("embeddings.cls_token",))]
    for kind in "weight", "bias":
        pairs += [(f"patch_embed.proj.{kind}", (f"embeddings.patch_embeddings.projection.{kind}",)),
                  (f"norm.{kind}", (f"layernorm.{kind}",))]
        for i in range(depth):
            ours, theirs = f"blocks.{i}", f"encoder.layer.{i}"
            pairs.append((f"{ours}.attn.qkv.{kind}", tuple(
                f"{theirs}.attention.attention.{part}.{kind}" for part in ("query", "key", "value"))))
            pairs.append((f"{ours}.attn.proj.{kind}", (f"{theirs}.attention.output.dense.{kind}",)))
            pairs += [(f"{ours}.{part}.{kind}", (f"{theirs}.{part}.{kind}",)) for part in ("norm1", "norm2", "mlp.fc1", "mlp.fc2")]
    return pairs + [(f"blocks.{i}.ls{k}.gamma", (f"encoder.layer.{i}.layer_scale{k}.lambda1",))
                    for i in range(depth) for k in (1, 2)]
