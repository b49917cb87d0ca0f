"""Our own small CLIP: trained heads on a frozen image encoder and a frozen sentence encoder (p4_clip.py trains it).

    clip = ClipSmall.load("weights/clip_small.safetensors")
    clip.embed_images(clip.encoder(images))         # uint8 (B, 3, S, S) -> (B, width)
    clip.embed_texts(["two dogs in the snow"])      # (1, width)

Both towers are pretrained and stay locked, as in LiT (Zhai et al. 2022, https://arxiv.org/abs/2111.07991), except the last
layers of the sentence encoder. The image head has three inputs: mean and standard deviation of every channel over the
patches, patches pooled by attention, and the class probabilities of the encoder's own ImageNet classifier (ConSE: Norouzi et
al. 2014, https://arxiv.org/abs/1312.5650).

Shapes: B images or texts, N patches, D the encoder's width, R the width of a reduced patch, K classes, T text tokens.
"""

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn
from tqdm import tqdm

from cli import UserError, check_settings, option
from encoder import EMBEDDED, load_encoder
from files import WEIGHTS_FOLDER, check_digest, content_hash, digest, digest_of, fingerprints, first_line, read_weights, uninitialised, write_whole
from runtime import Network

USUAL = "stats_mean", "stats_std", "cell_mean"  # buffers of ImageHead, saved in fp32: differences from them are small
SMALL_WEIGHTS = WEIGHTS_FOLDER / "clip_small.safetensors"
TEXT_FOLDER = WEIGHTS_FOLDER / "all-minilm-l6-v2"


@dataclass
class ClipConfig:
    """Settings of the heads. With the weights of the two encoders they rebuild the model."""

    encoder: str = option(EMBEDDED, "timm's name of a ViT or a CNN, or several joined by +")
    image_size: int = option(0, "0: the encoder's own")
    encoder_levels: int = option(0, "number of a CNN's feature maps that become tokens; 0: up to three")
    width: int = option(512, "of the shared space")
    attention_heads: int = option(4, "of the attention pooling over patches; 0: none")
    cell_dim: int = option(160, "number of principal components kept of a patch")
    classes: bool = option(True, "also use the class probabilities of the encoder's own classifier")
    text_layers: int = option(0, "number of the sentence encoder's last layers to train")
    text_heads: int = option(4, "of the attention pooling over a sentence's tokens; 0: none")

    def __post_init__(self):
        check_settings(self, ("width", "cell_dim"))

    def load_encoder(self, weights=None, runtime="torch", device="cpu"):
        return load_encoder(self.encoder, self.image_size, self.encoder_levels, weights, runtime, device=device)


class TextEncoder:
    """all-MiniLM-L6-v2 (Reimers and Gurevych 2019, https://arxiv.org/abs/1908.10084): sentences -> unit vectors (n, 384).

    Args:
        runtime: as from pick_runtime. With "openvino" there is no `model`, and `lower` can only run all layers.
    """

    def __init__(self, folder=None, device="cpu", max_tokens=128, runtime="torch"):
        from tokenizers import Tokenizer

        folder = Path(folder or TEXT_FOLDER)
        if not folder.is_dir():
            raise UserError(f"{folder} is not here yet: run `bash hw3_download.sh`")
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.enable_padding()
        self.tokenizer.enable_truncation(max_tokens)
        self.max_tokens, self.model, self.network = max_tokens, None, None
        if runtime == "torch":
            self.model = read_bert(folder).to(device)
        else:
            weights = [digest_of(file, "sha256") for file in [Path(__file__), *sorted(folder.iterdir())] if file.name != "tokenizer.json"]
            self.network = Network(["sentences", weights], partial(trace_bert, folder), folder.parent / "openvino")
        self.dim = self.model.config.hidden_size if self.model else self.network.facts["dim"]

    @property
    def device(self):
        return self.model.device if self.model else torch.device("cpu")

    @cached_property
    def weights_hash(self):
        """Content hash of all its weights."""
        return content_hash(self.model.state_dict()) if self.model else self.network.facts["weights_hash"]

    def frozen_hash(self, layers):
        """Content hash of all weights below the last `layers` layers."""
        return frozen_hash(self.model, layers) if self.model else self.network.facts["frozen_hash"]

    def tokenize(self, sentences):
        """Token ids and mask (B, T), with the special tokens."""
        rows = self.tokenizer.encode_batch(sentences)
        return (torch.tensor([getattr(row, part) for row in rows], device=self.device) for part in ("ids", "attention_mask"))

    def count_tokens(self, sentence):
        """The number of tokens of a sentence, special ones included, before truncation."""
        self.tokenizer.no_truncation()
        count = len(self.tokenizer.encode(sentence).ids)
        self.tokenizer.enable_truncation(self.max_tokens)
        return count

    def lower(self, sentences, layers):
        """Hidden states (B, T, 384) below the last `layers` layers, and mask (B, T)."""
        ids, mask = self.tokenize(sentences)
        if self.network:
            return self.network(ids, mask), mask
        below = self.model.encoder.layer[:len(self.model.encoder.layer) - layers]
        return run_layers(self.model.embeddings(ids), mask, below), mask

    @torch.inference_mode()
    def __call__(self, sentences, batch_size=128):
        order = sorted(range(len(sentences)), key=lambda i: len(sentences[i]))  # little padding
        vectors = torch.empty(len(sentences), self.dim)
        for start in tqdm(range(0, len(order), batch_size), desc="embedding captions", unit="batch"):
            some = order[start:start + batch_size]
            ids, mask = self.tokenize([sentences[i] for i in some])
            hidden = self.model(ids, mask).last_hidden_state
            vectors[some] = F.normalize(mean_of_tokens(hidden, mask), dim=-1).float().cpu()
        return vectors


def read_bert(folder):
    from transformers import BertModel
    from transformers.utils import logging

    logging.disable_progress_bar()  # loading takes a tenth of a second
    return BertModel.from_pretrained(folder).eval().requires_grad_(False)


def frozen_hash(bert, layers):
    """Content hash of a BERT's weights without its last `layers` layers and its pooler."""
    total = len(bert.encoder.layer)
    trained = tuple(f"encoder.layer.{i}." for i in range(total - layers, total))
    return content_hash({name: value for name, value in bert.state_dict().items()
                         if name.startswith(("embeddings.", "encoder.")) and not name.startswith(trained or "\0")})


class Layers(nn.Module):
    """All of a BERT's layers as a traceable module: token ids and mask (B, T) -> (B, T, C)."""

    def __init__(self, bert):
        super().__init__()
        self.bert = bert

    def forward(self, ids, mask):
        return run_layers(self.bert.embeddings(ids), mask, self.bert.encoder.layer)


def trace_bert(folder):
    """What a Network asks for."""
    bert = read_bert(folder)
    example = torch.ones(2, 8, dtype=torch.long)
    return Layers(bert), (example, example), [[-1, -1]] * 2, {
        "dim": bert.config.hidden_size, "weights_hash": content_hash(bert.state_dict()), "frozen_hash": frozen_hash(bert, 0)}


def run_layers(hidden, mask, layers):
    """Run hidden states (B, T, C) through these layers of a BERT; tokens whose mask (B, T) is 0 are not attended to."""
    shut = torch.zeros_like(mask, dtype=hidden.dtype).masked_fill(mask == 0, torch.finfo(hidden.dtype).min)[:, None, None]
    for layer in layers:
        hidden = layer(hidden, attention_mask=shut)
    return hidden


def mean_of_tokens(hidden, mask):
    """(B, T, C), (B, T) -> (B, C)"""
    return (hidden * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)


class Summary(NamedTuple):
    """The image head's input for B pictures."""

    stats: torch.Tensor  # (B, 2 D), mean 0 and standard deviation 1 over the training pictures
    cells: torch.Tensor  # (B, N, R)
    classes: torch.Tensor  # (B, K), probabilities; K = 0 if the encoder has no classifier


class ImageHead(nn.Module):
    """A Summary -> unnormalised image embeddings (B, width): the sum of a projection of each of its three parts."""

    def __init__(self, config, dim, num_classes):
        super().__init__()
        self.config = config
        for name, shape in {"stats_mean": 2 * dim, "stats_std": 2 * dim, "cell_mean": dim,
                            "components": (dim, config.cell_dim if config.attention_heads else 0)}.items():
            self.register_buffer(name, torch.zeros(shape))
        self.stats = nn.Linear(2 * dim, config.width)
        nn.init.normal_(self.stats.weight, std=(2 * dim) ** -0.5)
        if config.attention_heads:
            self.gates = nn.Linear(config.cell_dim, config.attention_heads)
            self.values = nn.Linear(config.attention_heads * config.cell_dim, config.width, bias=False)
            nn.init.normal_(self.values.weight, std=0.3 * (config.attention_heads * config.cell_dim) ** -0.5)
        if config.classes and num_classes:
            self.names = nn.Linear(num_classes, config.width, bias=False)
            nn.init.zeros_(self.names.weight)
        self.num_classes = num_classes if config.classes else 0

    @torch.no_grad()
    def measure(self, batches, encoder):
        """Compute, from tokens of the training pictures (B, N, D), the means and deviations that `summarize` normalises with, and
        the principal components of their patches."""
        sums = squares = outer = 0.0
        count = 0
        for features in batches:
            patches, stats = statistics(features.to(self.stats_mean.device), encoder)
            sums, squares, count = sums + stats.double().sum(0), squares + stats.double().square().sum(0), count + len(stats)
            if self.config.attention_heads:
                # A sample of the patches, since neighbours are similar; such a step samples every position equally often.
                step = next(step for step in (8, 9, 7, 11, 13) if math.gcd(step, patches.shape[1]) == 1)
                flat = patches.flatten(0, 1)[::step]
                outer = outer + flat.t() @ flat / len(flat) * len(stats)
        mean = sums / count
        self.stats_mean.copy_(mean)
        self.stats_std.copy_((squares / count - mean.square()).clamp(min=0).sqrt() + 1e-3)
        self.cell_mean.copy_(mean[:len(self.cell_mean)])
        if self.config.attention_heads:
            values, vectors = torch.linalg.eigh(outer.double() / count - torch.outer(self.cell_mean, self.cell_mean).double())
            best = values.argsort(descending=True)[:self.config.cell_dim]
            # Whitened, so that no component dominates only because of its variance.
            self.components.copy_(vectors[:, best] / values[best].clamp(min=1e-6).sqrt())

    def summarize(self, features, encoder):
        """Tokens of the encoder (B, N, D) -> Summary"""
        patches, stats = statistics(features, encoder)
        classes = encoder.class_probabilities(features.float()) if self.num_classes else patches.new_zeros(len(patches), 0)
        return Summary((stats - self.stats_mean) / self.stats_std, patches @ self.components - self.cell_mean @ self.components, classes)

    def forward(self, summary, dropout=0.0):
        """`dropout` applies to the statistics, half of it to the pooled patches."""
        x = self.stats(F.dropout(summary.stats, dropout, dropout > 0))
        if self.config.attention_heads:
            weights = self.gates(summary.cells).softmax(1)  # (B, N, H)
            seen = (weights.transpose(1, 2) @ summary.cells).flatten(1)  # (B, H R)
            x = x + self.values(F.dropout(seen, dropout / 2, dropout > 0))
        if self.num_classes:
            x = x + self.names(summary.classes.sqrt())  # the square root gives less likely classes more weight
        return x


def statistics(features, encoder):
    """Tokens (B, N, D) -> the patches among them, fp32, and mean and standard deviation of each channel over them (B, 2 D)"""
    patches = features[:, features.shape[1] - encoder.grid[0] * encoder.grid[1]:].float()  # without class tokens
    deviation, mean = torch.std_mean(patches, 1)
    return patches, torch.cat([mean, deviation], -1)


class TextHead(nn.Module):
    """Hidden states below the trained layers -> unnormalised text embeddings (B, width): the sum of projections of the tokens' mean
    and of tokens pooled by attention, since a picture shows a caption's few nouns."""

    def __init__(self, config, text):
        super().__init__()
        layers = text.model.encoder.layer if config.text_layers else []
        if config.text_layers > len(layers):
            raise UserError(f"--text_layers is {config.text_layers}, but the sentence encoder has {len(layers)}")
        self.layers = nn.ModuleList(layers[len(layers) - config.text_layers:])
        self.layers.requires_grad_(True)
        self.output = nn.Linear(text.dim, config.width, bias=False)
        nn.init.normal_(self.output.weight, std=text.dim ** -0.5)
        self.heads = config.text_heads
        if self.heads:
            self.gates = nn.Linear(text.dim, self.heads)
            self.values = nn.Linear(self.heads * text.dim, config.width, bias=False)
            nn.init.normal_(self.values.weight, std=0.3 * (self.heads * text.dim) ** -0.5)

    def forward(self, hidden, mask, dropout=0.0):
        """(B, T, 384), (B, T) -> (B, width); in training, a fraction `dropout` of the tokens is masked."""
        if dropout:
            kept = torch.rand(mask.shape, device=mask.device) >= dropout
            kept[:, 0] = True
            mask = mask * kept
        hidden = run_layers(hidden, mask, self.layers)
        vectors = F.normalize(mean_of_tokens(hidden, mask), dim=-1) * hidden.shape[-1] ** 0.5
        x = self.output(F.dropout(vectors, dropout, dropout > 0))
        if self.heads:
            hidden = 3 * hidden  # its standard deviation is a third
            weights = self.gates(hidden).masked_fill(mask[:, :, None] == 0, -torch.inf).softmax(1)  # (B, T, heads)
            seen = (weights.transpose(1, 2) @ hidden).flatten(1)
            x = x + self.values(F.dropout(seen, 2 * dropout, dropout > 0))
        return x


class ClipSmall(nn.Module):
    """Two frozen encoders, `encoder` and `text`, and the two heads that are trained, `image_head` and `text_head`.

    Args:
        encoder: as from `config.load_encoder`.
        text: a TextEncoder; its last `config.text_layers` layers become part of the model.
    """

    def __init__(self, config, encoder, text):
        super().__init__()
        self.config, self.encoder, self.text = config, encoder, text
        self.image_head = ImageHead(config, encoder.dim, len(encoder.class_names))
        self.text_head = TextHead(config, text)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def trained_parameters(self):
        """The trained parameters, by name."""
        return {name: parameter for name, parameter in self.named_parameters() if not name.startswith("encoder.")}

    def embed_images(self, features):
        """Tokens of the encoder (B, N, D) -> (B, width), unnormalised"""
        return self.image_head(self.image_head.summarize(features, self.encoder))

    def embed_texts(self, texts):
        """List of B strings -> (B, width), unnormalised"""
        return self.text_head(*self.text.lower(texts, self.config.text_layers))

    def _apply(self, *arguments, **options):
        """Move the sentence encoder along with the model, since it is not a submodule."""
        if self.text.model:
            self.text.model._apply(*arguments, **options)
        return super()._apply(*arguments, **options)

    def save(self, path, training, scores=None):
        """Write the heads in fp16, their statistics in fp32, and in the metadata all that `load` needs to rebuild the model."""
        state = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()
                 if not name.startswith("encoder.")}
        tensors = {name: value if name.endswith(USUAL) else value.half() for name, value in state.items()}
        metadata = {"model": asdict(self.config), "encoder_hash": self.encoder.weights_hash,
                    "digest": digest(tensors),
                    "text_hash": self.text.frozen_hash(self.config.text_layers), "training": training, "scores": scores or {}}
        write_whole(path, save(tensors, {"clip_small": json.dumps(metadata)}))

    @property
    def text_digest(self):
        """Content hash of all weights that embed texts."""
        return hashlib.sha256(f"{self.text.weights_hash} {content_hash(self.text_head.state_dict())}".encode()).hexdigest()

    @staticmethod
    def read_metadata(path):
        """A file's metadata and ClipConfig. Raises UserError."""
        if not Path(path).is_file():
            raise UserError(f"{path} is not here: it comes with this repository, `git checkout -- weights` brings it back")
        try:
            with safe_open(path, "pt") as file:
                metadata = json.loads((file.metadata() or {})["clip_small"])
            return metadata, ClipConfig(**metadata["model"])
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is damaged, or was not written by p4_clip.py: {first_line(error)}") from None

    @classmethod
    def load(cls, path, encoder=None, text=None, runtime="torch"):
        """Rebuild the model for inference. Raises UserError if the encoders' weights are not those of the training.

        Args:
            encoder, text: if already loaded; None: load them.
            runtime: as from pick_runtime, for those loaded here.
        """
        metadata, config = cls.read_metadata(path)
        state = read_weights(path, "CLIP weights")
        check_digest(path, "CLIP weights", state, metadata.get("digest"))
        state = {name: value.float() for name, value in state.items()}
        encoder = encoder or config.load_encoder(runtime=runtime)
        text = text or TextEncoder(runtime="torch" if config.text_layers else runtime)
        with uninitialised():
            model = cls(config, encoder, text)
        for part, now, before in (("image", model.encoder.weights_hash, metadata["encoder_hash"]),
                                  ("text", model.text.frozen_hash(config.text_layers), metadata["text_hash"])):
            if now != before:
                raise UserError(f"{path} was trained with other weights of the {part} encoder than are here")
        try:
            missing = model.load_state_dict(state, strict=False)
        except RuntimeError as error:
            raise UserError(f"{path} does not fit its own description: it is damaged ({first_line(error)})") from None
        if missing.unexpected_keys or any(not name.startswith("encoder.") for name in missing.missing_keys):
            raise UserError(f"{path} does not fit its own description: it is damaged")
        model.metadata = metadata
        return model.eval().requires_grad_(False)


class Folds:
    """Embeddings of pictures by image heads not trained on them, in the text space of a finished model (p4_clip.py --folds).

    Args:
        path: file written by p4_clip.py.
        text_digest: of the ClipSmall whose text embeddings they will be compared with. Raises UserError if it is another.
    Attributes: `embeddings` (n, views, width), fp16; `numbers`, {fingerprint of a picture: its number}.
    """

    def __init__(self, path, text_digest):
        try:
            with safe_open(path, "pt") as file:
                metadata, self.embeddings = json.loads((file.metadata() or {})["clip_folds"]), file.get_tensor("embeddings")
            self.numbers = {tuple(picture): number for number, picture in enumerate(metadata["pictures"])}
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} was not written by p4_clip.py --folds, or is damaged: {first_line(error)}") from None
        self.path = path
        if metadata["texts"] != text_digest:
            raise UserError(f"{path} belongs to another CLIP than {SMALL_WEIGHTS}: run p4_clip.py --folds again")

    @staticmethod
    def save(path, embeddings, pictures, text_digest, training):
        """Write the embeddings (n, views, width) of pictures, given by their `fingerprints`."""
        write_whole(path, save({"embeddings": embeddings.half().contiguous()}, {"clip_folds": json.dumps(
            {"pictures": pictures, "texts": text_digest, "training": training})}))

    @property
    def digest(self):
        """Hash of the content, independent of the file's location."""
        pictures = json.dumps([*self.numbers]).encode()
        return hashlib.sha256(content_hash({"embeddings": self.embeddings}).encode() + pictures).hexdigest()

    def of(self, paths, views=1):
        """Embeddings of these pictures (n, views, width), fp32. Raises UserError if a picture or view is missing."""
        found = fingerprints(paths)
        missing = [name for name, *rest in found if (name, *rest) not in self.numbers]
        if missing or views > self.embeddings.shape[1]:
            raise UserError(f"{self.path} lacks {len(missing)} of {len(paths)} pictures, the first is {missing[0]}" if missing else
                            f"{self.path} has {self.embeddings.shape[1]} views of each picture, not {views}")
        return self.embeddings[[self.numbers[picture] for picture in found], :views].float()


def contrastive_loss(images, texts, scale):
    """CLIP's loss: cross-entropy of each image among the texts and of each text among the images; unit vectors (B, C)."""
    with torch.autocast(images.device.type, enabled=False):  # half precision is too coarse for a scale of 100
        logits = scale * images.float() @ texts.float().t()
    labels = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.t(), labels)) / 2


def multi_positive_loss(images, texts, owners, scale):
    """CLIP's loss for pictures with several texts: unit vectors (B, C) and (M, C), and each text's picture index (M,).

    Cross-entropy of a text's picture among all pictures, and of each of a picture's texts among the other pictures' texts.
    """
    logits = scale * texts @ images.t()  # (M, B)
    to_image = F.cross_entropy(logits, owners)
    own = F.one_hot(owners, len(images)).bool()
    others = logits.masked_fill(own, -torch.inf).logsumexp(0)  # (B,)
    positives = logits.gather(1, owners[:, None]).squeeze(1)
    to_text = (torch.logaddexp(positives, others[owners]) - positives).mean()
    return (to_image + to_text) / 2


def keep_loss(embeddings, vectors, scale):
    """How much the similarities between sentences, unit vectors (B, C), differ from those in the sentence encoder's space (B, 384):
    the KL divergence between the softmaxes over each sentence's similarities to the others."""
    own = torch.eye(len(vectors), dtype=torch.bool, device=vectors.device)
    target = (scale * vectors @ vectors.t()).masked_fill(own, -torch.inf).log_softmax(-1).masked_fill(own, 0)
    found = (scale * embeddings @ embeddings.t()).masked_fill(own, -torch.inf).log_softmax(-1).masked_fill(own, 0)
    return (target.exp().masked_fill(own, 0) * (target - found)).sum(-1).mean()
