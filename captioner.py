"""The captioner: frozen encoder, trained projection, frozen GPT-2 with trained cross-attention and LoRA.

    captioner = Captioner.load("weights/captioner.safetensors", "weights/decoder_small.safetensors")
    captioner.caption(images)          # uint8 (B, 3, S, S) -> list of B strings

Shapes: B images, K captions or beams of each, N patches, D the encoder's width, T text tokens, V scored tokens.
"""

import json
import sys
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn
from tqdm import tqdm

from cli import UserError, check_settings, option, printable
from clip_small import SMALL_WEIGHTS, ClipConfig, ClipSmall
from concepts import ClassifierWords, ClassWords, ClipWords, Concepts, RetrievedWords
from dataset import IGNORE
from decoder import Block, Decoder, DecoderConfig, LayerContext, init_weights
from devices import at_once
from encoder import EMBEDDED, load_encoder
from files import WEIGHTS_FOLDER, check_digest, digest, first_line, read_weights, uninitialised, write_whole
from generation import GenerationConfig, TextGenerator, best_of
from images import ahead, load_ahead
from peft_kinds import PeftConfig
from tokenizer import END_OF_TEXT, BPETokenizer

EMBEDDED_DECODER = WEIGHTS_FOLDER / "decoder_small.safetensors"
EMBEDDED_CHECKPOINT = WEIGHTS_FOLDER / "captioner.safetensors"
MAX_TRAINED = 35_000_000
CONCEPT_SOURCES = "classifier", "clip"


@dataclass
class CaptionerConfig(PeftConfig):
    """Settings of the trained part. With the weights of encoder and decoder they rebuild the model."""

    encoder: str = option(EMBEDDED, "timm's name of a ViT or a CNN, or several joined by +")
    image_size: int = option(0, "0: the encoder's own")
    encoder_levels: int = option(0, "number of a CNN's feature maps that become tokens; 0: up to three")
    fusion: str = option("cross", "cross: cross-attention; prefix: image tokens before the text")
    concepts: int = option(0, "number of concept words for what is recognised in the image; 0: none")
    concept_source: str = option("classifier", "classifier: the encoder's own; clip: the nearest nouns in our CLIP's space")
    meaning: int = option(0, "number of tokens made from the image's embedding by our CLIP; 0: none")
    concept_dropout: float = option(0.2, "fraction of concepts dropped in training")
    projection_layers: int = option(0, "transformer layers; 0: a linear projection")
    projection_dim: int = option(384, "width of the image tokens; with fusion prefix always the decoder's")
    projection_dropout: float = option(0.3, "of the image tokens")
    patch_dropout: float = option(0.3, "fraction of an image's patches dropped in training")
    dropout: float = option(0.1, "in the decoder")
    cross_dim: int = option(0, "inner width of cross-attention; 0: the decoder's")

    def __post_init__(self):
        check_settings(self, ("projection_dim",), fractions=("projection_dropout", "patch_dropout", "concept_dropout", "dropout", "lora_dropout"))
        super().__post_init__()
        if self.concept_source not in CONCEPT_SOURCES:
            raise UserError(f"unknown concept_source {self.concept_source}: choose from {', '.join(CONCEPT_SOURCES)}")

    def concept_words(self, encoder):
        """The ClassWords, which number the concepts; None without concepts. Raises UserError if the encoder cannot recognise any."""
        if not self.concepts:
            return None
        return ClassWords.of_imagenet() if self.concept_source == "clip" else ClassWords.of_encoder(encoder)

    def load_encoder(self, weights=None, runtime="torch", device="cpu"):
        """The frozen encoder. `weights`: None, or "random" for untrained ones; `runtime`, `device`: as of encoder.load_encoder."""
        return load_encoder(self.encoder, self.image_size, self.encoder_levels, weights, runtime, device=device)

    def load_decoder(self, path):
        """The frozen decoder from a GPT-2 state dict, with the trained parts that this configuration adds."""
        return Decoder.from_pretrained(path, **self.decoder_options())

    def decoder_options(self):
        """The fields of DecoderConfig that add to GPT-2."""
        peft = PeftConfig(**{field.name: getattr(self, field.name) for field in fields(PeftConfig)})
        return {"image_dim": self.projection_dim, "fusion": self.fusion, "cross_dim": self.cross_dim, "dropout": self.dropout, "peft": peft}


class Projection(nn.Module):
    """Encoder tokens (B, N, D) -> layer-normalised image tokens (B, N, width), followed by one token per concept and M tokens for
    the meaning.

    Args:
        concept_dim, meaning_dim: widths of the concept and meaning vectors, if used.
        width: of the image tokens; None: `config.projection_dim`.
        scale: their initial root mean square; with fusion "prefix", that of the token embeddings.
    """

    def __init__(self, config, encoder_dim, num_tokens, width=None, scale=1.0, concept_dim=0, meaning_dim=0):
        super().__init__()
        width = width or config.projection_dim
        self.input = nn.Linear(encoder_dim, width)
        if config.concepts:
            self.concepts = nn.Linear(concept_dim, width)
        if config.meaning:
            self.meaning = nn.Linear(meaning_dim, config.meaning * width)
        self.layers = nn.ModuleList()
        self.has_positions = config.projection_layers > 0 or config.fusion == "prefix"
        if self.has_positions:
            self.positions = nn.Embedding(num_tokens, width)
        if config.projection_layers:
            layer = DecoderConfig(n_embd=width, dropout=config.projection_dropout)
            self.layers.extend(Block(layer, causal=False) for _ in range(config.projection_layers))
        self.norm = nn.LayerNorm(width)
        self.dropout, self.patch_dropout, self.concept_dropout = (
            config.projection_dropout, config.patch_dropout, config.concept_dropout)
        init_weights(self, max(1, config.projection_layers))
        nn.init.normal_(self.input.weight, std=encoder_dim**-0.5)
        if config.concepts:
            nn.init.normal_(self.concepts.weight, std=concept_dim**-0.5)
        if config.meaning:
            nn.init.normal_(self.meaning.weight)  # of a vector of length 1
        nn.init.constant_(self.norm.weight, scale)
        for layer in self.layers:  # initialised as the identity, since attention learns faster from a linear projection
            nn.init.zeros_(layer.attn.c_proj.weight)
            nn.init.zeros_(layer.mlp.c_proj.weight)

    def forward(self, features, concepts=None, strengths=None, meaning=None, attentions=None):
        """Image tokens (B, N + K + M, width).

        Args:
            features: (B, N, D); None: no image, only concepts and meaning.
            concepts: (B, K, concept_dim), or None.
            strengths: (B, K), factors of the concepts' normalised tokens; 0 removes a concept's information.
            meaning: (B, meaning_dim), or None.
            attentions: a list to which each layer's attention weights (B, H, S, S) over all S tokens are appended.
        """
        parts = [] if features is None else [self.patches(features)]
        if concepts is not None:
            if self.training and self.concept_dropout:
                strengths = strengths * (torch.rand(strengths.shape, device=strengths.device) >= self.concept_dropout)
            at = parts[0].shape[1] if parts else 0
            parts.append(self.concepts(concepts))
        if meaning is not None:
            parts.append(self.meaning(meaning).unflatten(-1, (-1, self.norm.weight.shape[0])))
        x = F.dropout(torch.cat(parts, 1), self.dropout, self.training)
        all_of_them = LayerContext(image=slice(None))  # these layers attend to image tokens only
        for layer in self.layers:
            x = layer(x, all_of_them, attentions=attentions)
        x = self.norm(x)
        if concepts is not None:
            x = x * F.pad(strengths, (at, x.shape[1] - at - strengths.shape[1]), value=1.0)[..., None]
        return x

    def patches(self, features):
        """(B, N, D) -> (B, N, width); in training, fewer patches because of patch dropout."""
        x = self.input(features)
        if self.has_positions:
            x = x + self.positions.weight
        if self.training and self.patch_dropout:  # the same number in every image (Liu et al. 2022, arXiv:2208.07220)
            order = torch.rand(x.shape[:2], device=x.device).argsort(1)
            kept = order[:, :max(1, round(x.shape[1] * (1 - self.patch_dropout)))]
            x = x.gather(1, kept[..., None].expand(-1, -1, x.shape[-1]))
        return x


class Captioner(TextGenerator, nn.Module):
    """Encoder, projection and decoder. `loss` and `generate` take the encoder's features, `caption` takes images.

    Args:
        config: CaptionerConfig.
        encoder: frozen, of `config.load_encoder`.
        decoder: Decoder, of `config.load_decoder`.
        token_ids: sorted tokens that may be generated (V), including <|endoftext|>; None: all that the decoder knows.
    """

    def __init__(self, config, encoder, decoder, token_ids=None):
        super().__init__()
        self.config = replace(config, image_size=encoder.image_size, encoder_levels=encoder.levels)
        self.decoder = decoder
        # Rows of zeros are tokens that the decoder was not trained on, and cannot generate.
        known = decoder.wte.weight[:END_OF_TEXT + 1].any(1).nonzero().squeeze(1)  # some decoders have rows after their last token
        scale = decoder.wte.weight[known].square().mean().sqrt().item() if config.fusion == "prefix" else 1.0
        self.encoder = encoder
        self.projection = Projection(config, encoder.dim, encoder.num_tokens, decoder.config.image_dim, scale,
                                     decoder.config.n_embd, self.judge.config.width if config.meaning else 0)
        # Means of image and of text embeddings, which differ in a contrastive space (Liang et al. 2022, arXiv:2203.02053).
        self.register_buffer("centres", torch.zeros(2, self.judge.config.width) if config.meaning else None, persistent=False)
        self.tokenizer = BPETokenizer()
        self.generation = GenerationConfig()  # default settings of the search
        self.words = config.concept_words(encoder)
        kinds = self.words and len(self.words.nouns if config.concept_source == "clip" else self.words.levels)
        if config.concepts and config.concepts > kinds:
            raise UserError(f"concepts is {config.concepts}, but there are only {kinds} to recognise")
        self.register_buffer("concept_vectors", self.vectors_of_concepts(config.concept_source == "clip"), persistent=False)
        token_ids = known if token_ids is None else token_ids[torch.isin(token_ids, known)]
        # The column of each token among those scored; as targets, others are ignored.
        columns = torch.full((self.decoder.config.vocab_size,), IGNORE)
        columns[token_ids] = torch.arange(len(token_ids))
        self.end = int(columns[min(END_OF_TEXT, len(columns) - 1)])  # in a smaller vocabulary, its last token
        if self.end == IGNORE:
            raise UserError("the decoder weights, or the tokens of the checkpoint, lack <|endoftext|>: they are damaged")
        self.register_buffer("token_ids", torch.as_tensor(token_ids), persistent=False)
        self.register_buffer("column_of", columns, persistent=False)
        if self.num_trained() > MAX_TRAINED:
            raise UserError(f"{self.num_trained() / 1e6:.1f}M trained parameters are more than the "
                            f"{MAX_TRAINED / 1e6:.0f}M allowed: shrink the projection, cross_dim or the LoRA rank")

    def trained_parameters(self):
        """All trainable parameters, by name."""
        frozen = {f"decoder.{name}" for name in self.decoder.pretrained_names()}
        return {name: parameter for name, parameter in self.named_parameters()
                if name not in frozen and not name.startswith("encoder.")}

    def is_fusion(self, name):
        """Whether a trained parameter belongs to the connection of encoder and decoder, rather than tuning the decoder."""
        return self.decoder.added.get(name.removeprefix("decoder."), "projection") in ("projection", "cross-attention")

    def train_fusion_alone(self, alone):
        """Freeze, or unfreeze, the parameters of PEFT: all trained ones except the projection and cross-attention."""
        for name, parameter in self.trained_parameters().items():
            parameter.requires_grad_(not alone or self.is_fusion(name))

    def num_trained(self):
        return sum(parameter.numel() for parameter in self.trained_parameters().values())

    # ---- image tokens, concepts and meanings ----

    def vectors_of_concepts(self, nouns):
        """Vectors of the concepts (C, n_embd), with nouns (C + L, n_embd); None for a model without concepts."""
        return self.words and self.words.vectors(self.decoder.wte.weight, self.tokenizer.encode, nouns)

    @cached_property
    def source(self):
        """The object that recognises concepts in an image's features."""
        if self.config.concept_source == "clip":
            return ClipWords(self.words, self.judge)
        return ClassifierWords(self.words, self.encoder)

    @torch.no_grad()
    def concepts(self, features, embeddings=None):
        """Features (B, N, D) -> the Concepts recognised in them; None for a model without concepts and meanings.

        `embeddings` (B, width): of the images in our CLIP's space; None: computed if needed.
        """
        if not self.words and not self.config.meaning:
            return None
        found = self.source.recognise(features, self.config.concepts) if self.words else Concepts(None, None)
        if not self.config.meaning:
            return found
        embeddings = self.judge.embed_images(features) if embeddings is None else embeddings
        return found._replace(meaning=self.meaning(embeddings, 0))

    def meaning(self, embeddings, of_texts):
        """Embeddings in our CLIP's space, of images (0) or of texts (1), minus their mean: unit vectors (B, width)"""
        return F.normalize(F.normalize(embeddings, dim=-1) - self.centres[of_texts].to(embeddings), dim=-1)

    def centre(self, of_images, of_texts):
        """Set the means that `meaning` subtracts to those of these embeddings, each (n, width)."""
        self.centres.copy_(torch.stack([F.normalize(part, dim=-1).mean(0) for part in (of_images, of_texts)]))

    @cached_property
    def judge(self):
        """Our CLIP, on the captioner's own encoder. Raises UserError if it is missing, or was trained on another encoder."""
        return ClipSmall.load(SMALL_WEIGHTS, self.encoder, runtime=self.encoder.runtime).to(self.decoder.wte.weight.device)

    def _apply(self, *arguments, **options):
        """Move the judge with the model. It is not a submodule, so that it is neither saved nor trained."""
        if isinstance(judge := self.__dict__.get("judge"), nn.Module):
            judge._apply(*arguments, **options)
        return super()._apply(*arguments, **options)

    def retrieve(self, captions, cache=None):
        """Also recognise what the captions of similar pictures mention; `captions` is a list of strings, and can be any."""
        if not self.words:
            raise UserError("this captioner was trained without concepts: retrieved captions can tell it nothing")
        self.concept_vectors = self.vectors_of_concepts(nouns=True)
        self.source = RetrievedWords(self.source, self.judge, captions, cache)

    def image_tokens(self, features, concepts=None, attentions=None):
        """What the text attends to: a token for each patch, then one for each concept, then those of the meaning (B, N + K + M, width).

        A concept's token is projected from the mean of its words' embeddings (object tags: Li et al. 2020, arXiv:2004.06165;
        entity prompts: Fei et al. 2023, arXiv:2307.16525) and scaled by the square root of its probability, after the
        normalisation, which would undo the scaling.

        Args:
            features: (B, N, D) from the encoder; None: no image.
            concepts: Concepts; None: those recognised in the features.
            attentions: as of Projection.
        """
        concepts = self.concepts(features) if concepts is None else concepts
        if concepts is None:
            return self.projection(features, attentions=attentions)
        vectors, strengths = None, None
        if self.words:
            vectors, strengths = self.concept_vectors[concepts.numbers], concepts.probabilities.sqrt()
        return self.projection(features, vectors, strengths, concepts.meaning, attentions)

    # ---- training ----

    def loss(self, features, tokens, targets, label_smoothing=0.0, temperature=1.0, weights=None, reduction="mean",
             concepts=None):
        """Cross-entropy over the target tokens that are among those scored: the mean, or the sum.

        Args:
            features, concepts: as of `image_tokens`.
            tokens, targets: (B * K, T), an image's K captions adjacent; IGNORE where there is no target.
            weights: (B * K), of each caption's tokens.
        """
        hidden = self.decoder.hidden(tokens, self.decoder.context(self.image_tokens(features, concepts)))
        columns = torch.where(targets == IGNORE, IGNORE, self.column_of[targets.clamp(min=0)])
        used = columns != IGNORE
        logits = F.linear(hidden[used], self.decoder.head_weight(self.token_ids)).float()  # (tokens used, V)
        losses = F.cross_entropy(logits / temperature, columns[used], label_smoothing=label_smoothing, reduction="none")
        if weights is not None:
            losses = losses * weights[:, None].expand_as(targets)[used]
        return losses.sum() if reduction == "sum" else losses.mean()

    # ---- generation ----

    @torch.inference_mode()
    def caption(self, images, generation=None, seeds=None):
        """uint8 images (B, 3, S, S) -> list of B captions."""
        return self.generate(self.encoder(images), generation, seeds)

    @torch.inference_mode()
    def generate(self, features, generation=None, seeds=None, concepts=None, embeddings=None):
        """Features (B, N, D) -> list of B captions.

        `concepts`: in place of those recognised in the features; `embeddings` (B, width): in place of those that our CLIP
        computes from the features.

        `seeds`: one number per image, which together with `generation.seed` determines its sample, independent of the batch
        (default: 0 … B - 1); with K numbers per image, K samples of each.
        """
        return [self.text(row) for row in self.search(features, generation, seeds, concepts, embeddings)]

    @torch.inference_mode()
    def search(self, features, generation=None, seeds=None, concepts=None, embeddings=None):
        """Like `generate`, but returns captions as lists of token ids, without <|endoftext|>."""
        generation = generation or self.generation
        if embeddings is None and (generation.clip_weight or self.config.meaning and concepts is None):
            embeddings = self.judge.embed_images(features)
        image = self.image_tokens(features, self.concepts(features, embeddings) if concepts is None else concepts)
        if generation.sample:
            return self.sample(image, generation, seeds)
        if generation.clip_weight:
            return self.choose(embeddings, self.hypotheses(image, generation), generation.clip_weight)
        return self.beam_search(image, generation)

    def text(self, tokens):
        """Token ids, without <|endoftext|> -> the caption on one line, capitalised, since training with CIDEr ignores case."""
        caption = " ".join(self.tokenizer.decode(tokens).split())
        return caption[:1].upper() + caption[1:]

    def choose(self, embeddings, hypotheses, weight):
        """Rerank: the token ids of each image's best hypothesis by its score and the `judge`'s cosine with this weight."""
        return [found[best_of([score for score, _ in found], cosines, weight)][1]
                for found, cosines in zip(hypotheses, self.cosines(embeddings, hypotheses))]

    @torch.inference_mode()
    def cosines(self, embeddings, hypotheses):
        """The `judge`'s cosines of each image's hypotheses with the image, whose embeddings are (B, width): B lists."""
        texts = [self.text(tokens) for found in hypotheses for _, tokens in found]
        images = F.normalize(embeddings, dim=-1)
        counts = torch.tensor([len(found) for found in hypotheses], device=images.device)
        of_clip = (images.repeat_interleave(counts, 0) * F.normalize(self.judge.embed_texts(texts), dim=-1)).sum(-1)
        return [values.tolist() for values in of_clip.split(counts.tolist())]

    # ---- checkpoints ----

    def save(self, path, training=None, scores=None):
        """Write the trained parameters in fp16, with the metadata from which `load` rebuilds the model."""
        state = {f"projection.{name}": value for name, value in self.projection.state_dict().items()}
        state |= {f"decoder.{name}": value for name, value in self.decoder.trained_state().items()}
        tensors = {name: value.to("cpu", torch.float16).contiguous() for name, value in state.items()}
        tensors["token_ids"] = self.token_ids.to("cpu", torch.int32)
        if self.config.meaning:
            tensors["centres"] = self.centres.to("cpu", torch.float16)
        config = replace(self.config, prefix_hidden=0)  # the MLP is not saved, only its output
        metadata = {"model": asdict(config), "encoder_hash": self.encoder.weights_hash,
                    "decoder_hash": self.decoder.weights_hash, "digest": digest(tensors),
                    "trained_parameters": self.num_trained(), "generation": asdict(self.generation), "training": training or {},
                    "scores": scores or {}}
        write_checkpoint(path, tensors, metadata)

    def load_trained(self, state):
        """Set all trained parameters. Raises KeyError or RuntimeError if names or shapes differ."""
        if state.keys() != self.trained_parameters().keys():
            raise KeyError("other names")
        self.load_state_dict(state, strict=False)

    @classmethod
    def load(cls, checkpoint, decoder_weights, encoder=None, all_tokens=False, runtime="torch"):
        """Rebuild a captioner for inference from a checkpoint and the decoder weights it was trained with.

        Args:
            encoder: if one is loaded already; None: load the checkpoint's.
            all_tokens: score all tokens, not only those of the training captions.
            runtime: what runs the encoder, as pick_runtime gives it.
        Raises UserError if the encoder's or the decoder's weights are not those of the training.
        """
        metadata = read_metadata(checkpoint)
        state = read_weights(checkpoint, "checkpoint")
        check_digest(checkpoint, "checkpoint", state, metadata.get("digest"))
        config = recorded_config(metadata)
        with uninitialised():
            decoder = config.load_decoder(decoder_weights)
        encoder = encoder or config.load_encoder(runtime=runtime)
        check_hash(checkpoint, metadata, "decoder", decoder.weights_hash, decoder_weights)
        check_hash(checkpoint, metadata, "encoder", encoder.weights_hash, encoder.name)
        try:
            token_ids, centres = state.pop("token_ids").long(), state.pop("centres", None)
            with uninitialised():
                model = cls(config, encoder, decoder, None if all_tokens else token_ids)
            if config.meaning:
                model.centres.copy_(centres)
            model.load_trained(state)
        except (KeyError, RuntimeError, TypeError):
            raise UserError(f"the checkpoint {checkpoint} does not fit its own description: it is damaged") from None
        model.metadata, model.generation = metadata, recorded_generation(metadata)
        model.decoder.merge_lora()
        return model.eval()


def write_checkpoint(path, tensors, metadata):
    """Write a checkpoint's tensors and the metadata that `read_metadata` returns, atomically."""
    write_whole(path, save(tensors, {"captioner": json.dumps(metadata)}))


def check_hash(checkpoint, metadata, part, now, where):
    """Raise UserError unless the frozen weights of this part, "encoder" or "decoder", are those the checkpoint was trained with."""
    if now != metadata[f"{part}_hash"]:
        raise UserError(f"the checkpoint {checkpoint} was trained with other {part} weights than {where}")


def recorded_config(metadata):
    """The CaptionerConfig of a checkpoint. The oldest do not record encoder_levels, which were 1 then."""
    return CaptionerConfig(**{"encoder_levels": 1} | metadata["model"])


def recorded_generation(metadata):
    """The search settings recorded in a checkpoint; GenerationConfig's defaults if there are none."""
    return GenerationConfig(**metadata.get("generation", {}))


def read_metadata(checkpoint):
    """A checkpoint's metadata, without reading its tensors. Raises UserError."""
    if not Path(checkpoint).is_file():
        raise UserError(f"the checkpoint {checkpoint} does not exist")
    try:
        with safe_open(checkpoint, "pt") as file:
            metadata = json.loads((file.metadata() or {})["captioner"])
        recorded_config(metadata), recorded_generation(metadata), metadata["encoder_hash"], metadata["decoder_hash"]  # all there?
        return metadata
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"the checkpoint {checkpoint} is damaged or of another format: {first_line(error)}") from None
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{checkpoint} is not a checkpoint of p2_train.py") from None


# ---- captioning a folder ------------------------------------------------------------------------------------------


def caption_folder(model, images, generation, batch_size=128, device="cpu", processes=None, progress=True):
    """Caption {name: path}, divided among the processes.

    Returns ({name: caption}, {path: reason} of the images that could not be read). While one batch is captioned, the next is encoded in
    a thread and pictures are decoded in others. Shows a progress bar on stderr.
    """
    if device == "cuda":
        model.encoder.halve()
    model.to(device)
    numbers, names = {path: number for number, path in enumerate(images.values())}, {path: name for name, path in images.items()}
    number, count, main = (processes.number, processes.count, processes.main) if processes else (0, 1, True)
    mine = list(numbers)[number::count]
    captions, unread = {}, {}
    with tqdm(total=len(mine), unit="image", desc="captioning", disable=not (main and progress)) as bar:
        batches = load_ahead(mine, model.encoder.preprocess, model.encoder.image_size, batch_size)
        for paths, features, bad in ahead(partial(encode_batch, model.encoder, device), batches, count=1):
            if features is not None:
                with torch.autocast("cuda", torch.float16, enabled=device == "cuda"):
                    texts = model.generate(features, generation, [numbers[path] for path in paths])
                captions.update((names[path], text) for path, text in zip(paths, texts))
            for path, error in bad:
                unread[path] = str(error)
                tqdm.write(f"skipped {printable(str(path))}: {printable(str(error))}", file=sys.stderr)
            bar.update(len(paths) + len(bad))
    if processes:
        captions, unread = (dict(processes.gather(list(found.items()))) for found in (captions, unread))
    return {name: captions[name] for name in images if name in captions}, unread


@torch.inference_mode()
def encode_batch(encoder, device, batch):
    """A batch of load_ahead with features (B, N, D) in place of the images."""
    paths, images, bad = batch
    with torch.autocast("cuda", torch.float16, enabled=device == "cuda"):
        return paths, None if images is None else encoder(images.to(encoder.device)), bad  # "cuda" is GPU 0 in this thread


def caption_features(model, features, numbers, generation, embeddings=None):
    """Captions of the first view of the images with these numbers; `embeddings` (n, width): of all images in our CLIP's space, if known."""
    captions, device, encoder, sizes = [], model.token_ids.device, model.encoder, model.decoder.config
    width = sizes.cross_dim if sizes.fusion == "cross" else sizes.n_embd  # of the keys and values that each layer keeps of an image
    batch_size = at_once(4 * encoder.num_tokens * (encoder.dim + 2 * width * sizes.n_layer), 100)
    for start in range(0, len(numbers), batch_size):
        some = numbers[start:start + batch_size]
        seen = None if embeddings is None else embeddings[some].to(device)
        captions += model.generate(features[some, np.zeros_like(some)].to(device).float(), generation, embeddings=seen)
    return captions


def count_trained(config, decoder_weights):
    """Count the parameters that would be trained, without weights or data: {part: parameters}."""
    sizes = {}
    if Path(decoder_weights).exists():
        loaded = config.load_decoder(decoder_weights).config
        sizes = {name: getattr(loaded, name) for name in ("vocab_size", "n_positions", "n_embd", "n_layer")}
    else:
        print(f"{decoder_weights} is not here: the sizes of the published GPT-2, 124M parameters, are taken")
    with torch.device("meta"):
        encoder = config.load_encoder("random")
        decoder = Decoder(DecoderConfig(**sizes, **config.decoder_options()))
        projection = Projection(config, encoder.dim, encoder.num_tokens, decoder.config.image_dim,
                                concept_dim=decoder.config.n_embd, meaning_dim=ClipConfig().width)
    parts = {"projection": sum(parameter.numel() for parameter in projection.parameters())}
    sizes = {name: parameter.numel() for name, parameter in decoder.named_parameters()}
    for name, part in decoder.added.items():
        parts[part] = parts.get(part, 0) + sizes[name]
    return parts
