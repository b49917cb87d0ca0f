"""The captioner: frozen encoder, trained projection, frozen GPT-2 with trained cross-attention and LoRA.

    captioner = Captioner.load("weights/captioner.safetensors", "weights/decoder_small.safetensors")
    captioner.caption(images)          # uint8 (B, 3, S, S) -> list of B strings

Shapes: B images, K captions or beams of each, N patches, D the encoder's width, T text tokens, V scored tokens.
"""

import json
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from cli import UserError, write_whole
from clip_small import SMALL_WEIGHTS, ClipSmall
from concepts import ClassifierWords, ClassWords, ClipWords, Concepts, RetrievedWords
from dataset import IGNORE, collate
from decoder import ADAPTER_PLACES, Block, Cache, Decoder, DecoderConfig, LayerContext, init_weights
from encoder import EMBEDDED, WEIGHTS_FOLDER, load_encoder
from tokenizer import END_OF_TEXT, BPETokenizer
from training import check_settings
from weightfiles import check_digest, digest, first_line, read_weights

EMBEDDED_DECODER = WEIGHTS_FOLDER / "decoder_small.safetensors"
EMBEDDED_CHECKPOINT = WEIGHTS_FOLDER / "captioner.safetensors"
CHECKPOINT_FOLDERS = Path("checkpoints"), Path(__file__).resolve().parent / "checkpoints"
MAX_TRAINED = 35_000_000
CONCEPT_SOURCES = "classifier", "clip"


@dataclass
class CaptionerConfig:
    """What joins the encoder to the decoder. With the two weight files it rebuilds the model."""

    encoder: str = EMBEDDED
    image_size: int = 0  # 0: the encoder's own
    encoder_levels: int = 0  # a CNN's feature maps that make a token; 0: up to three
    fusion: str = "cross"  # cross-attention, or "prefix": image tokens before the text
    concepts: int = 0  # things recognised in the image whose words the text sees beside it; 0: none
    concept_source: str = "classifier"  # or "clip": the nouns nearest to the image in our CLIP's space
    meaning: int = 0  # tokens that the image's embedding in our CLIP's space makes beside it; 0: none
    concept_dropout: float = 0.2  # part of the concepts that a training step leaves out
    projection_layers: int = 0  # transformer layers over the image tokens; 0: a linear projection
    projection_dim: int = 384  # under fusion "prefix", the decoder's width instead
    projection_dropout: float = 0.3
    patch_dropout: float = 0.3  # part of an image's patches that a training step leaves out
    dropout: float = 0.1  # in the decoder
    cross_dim: int = 0  # 0: the decoder's width
    lora_rank: int = 16
    lora_alpha: float = 32.0
    lora_dropout: float = 0.0
    lora_targets: tuple = ("q", "k", "v", "attn_proj", "mlp")
    adapter_dim: int = 0
    adapter_places: tuple = ADAPTER_PLACES
    prefix_length: int = 0
    prefix_hidden: int = 0
    prompt_length: int = 0

    def __post_init__(self):
        # Lists on the command line and in a checkpoint.
        self.lora_targets, self.adapter_places = tuple(self.lora_targets), tuple(self.adapter_places)
        check_settings(self, fractions=("projection_dropout", "patch_dropout", "concept_dropout", "dropout", "lora_dropout"))
        if self.concept_source not in CONCEPT_SOURCES:
            raise UserError(f"unknown concept_source {self.concept_source}: choose from {', '.join(CONCEPT_SOURCES)}")

    def concept_words(self, encoder):
        """The ClassWords that concepts are numbered by; None without concepts. Raises UserError where there is no source."""
        if not self.concepts:
            return None
        return ClassWords.of_imagenet() if self.concept_source == "clip" else ClassWords.of_encoder(encoder)

    def load_encoder(self, weights=None):
        """The frozen encoder; `weights`: None, or "random" for untrained ones."""
        return load_encoder(self.encoder, self.image_size, self.encoder_levels, weights)

    def load_decoder(self, path):
        """The frozen decoder of a GPT-2 state dict, with what this configuration adds to it."""
        return Decoder.from_pretrained(path, **self.decoder_options())

    def decoder_options(self):
        """The fields of DecoderConfig that add to GPT-2."""
        shared = {field.name for field in fields(DecoderConfig)} & {field.name for field in fields(self)}
        return {"image_dim": self.projection_dim} | {name: getattr(self, name) for name in shared}


@dataclass
class GenerationConfig:
    """How captions are searched for. `sample` draws tokens; otherwise beam search, greedy at beam_size 1."""

    beam_size: int = 3
    length_penalty: float = 0.0  # a hypothesis of n tokens scores log p / n ** length_penalty
    clip_weight: float = 0.0  # what the cosine of image and text in our CLIP's space counts beside a hypothesis' score
    max_length: int = 40  # tokens, the closing <|endoftext|> included
    sample: bool = False
    temperature: float = 1.0
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self):
        check_settings(self, ("beam_size", "max_length"), signed=("length_penalty", "clip_weight"))
        if self.temperature <= 0 or not 0 < self.top_p <= 1:
            raise UserError("temperature must be above 0 and top_p in (0, 1]")
        if self.sample and self.clip_weight:
            raise UserError("clip_weight chooses among beams: it goes without sample")


class Projection(nn.Module):
    """Encoder tokens (B, N, D) -> image tokens (B, N, width), normalised; after them a token for each concept, and M for the
    meaning.

    Args:
        concept_dim, meaning_dim: widths of a concept's vector, and of a meaning, if there are any.
        width: of the image tokens; None: `config.projection_dim`.
        scale: their root mean square to begin with; under fusion "prefix", that of the token embeddings.
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
        for layer in self.layers:  # they start as the identity, since attention learns a linear projection sooner
            nn.init.zeros_(layer.attn.c_proj.weight)
            nn.init.zeros_(layer.mlp.c_proj.weight)

    def forward(self, features, concepts=None, strengths=None, meaning=None, attentions=None):
        """Image tokens (B, N + K + M, width).

        Args:
            features: (B, N, D); None: of no image, where the rest is all there is.
            concepts: (B, K, concept_dim); None: none.
            strengths: (B, K), what the concepts' tokens are multiplied by once they are normalised, so that 0 says nothing.
            meaning: (B, meaning_dim); None: none.
            attentions: a list that receives each layer's weights (B, H, S, S) over all S of them.
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
        all_of_them = LayerContext(image=slice(None))  # image tokens are all that a layer here attends to
        for layer in self.layers:
            x = layer(x, all_of_them, attentions=attentions)
        x = self.norm(x)
        if concepts is not None:
            x = x * F.pad(strengths, (at, x.shape[1] - at - strengths.shape[1]), value=1.0)[..., None]
        return x

    def patches(self, features):
        """(B, N, D) -> (B, N, width), or in training those of them that patch dropout leaves."""
        x = self.input(features)
        if self.has_positions:
            x = x + self.positions.weight
        if self.training and self.patch_dropout:  # the same number from every image (Liu et al. 2022, arXiv:2208.07220)
            order = torch.rand(x.shape[:2], device=x.device).argsort(1)
            kept = order[:, :max(1, round(x.shape[1] * (1 - self.patch_dropout)))]
            x = x.gather(1, kept[..., None].expand(-1, -1, x.shape[-1]))
        return x


def is_fusion(name):
    """Whether a trained parameter of this name joins encoder and decoder, rather than tuning the decoder."""
    return name.startswith("projection.") or ".cross." in name or ".ln_cross." in name


class Captioner(nn.Module):
    """Encoder, projection and decoder. `loss` and `generate` take the encoder's features, `caption` takes images.

    Args:
        config: CaptionerConfig.
        encoder: frozen, of `config.load_encoder`.
        decoder: Decoder, of `config.load_decoder`.
        token_ids: sorted tokens that may be generated (V), <|endoftext|> among them; None: all that the decoder knows.
    """

    def __init__(self, config, encoder, decoder, token_ids=None):
        super().__init__()
        self.config = replace(config, image_size=encoder.image_size, encoder_levels=encoder.levels)
        self.decoder = decoder
        # Rows of zeros are tokens that the decoder itself never met: it cannot say them.
        known = decoder.wte.weight[:END_OF_TEXT + 1].any(1).nonzero().squeeze(1)  # some have rows behind their last token
        scale = decoder.wte.weight[known].square().mean().sqrt().item() if config.fusion == "prefix" else 1.0
        self.encoder = encoder
        self.projection = Projection(config, encoder.dim, encoder.num_tokens, decoder.config.image_dim, scale,
                                     decoder.config.n_embd, self.judge.config.width if config.meaning else 0)
        # Of embeddings of images, and of texts: in a contrastive space the two lie apart (Liang et al. 2022, arXiv:2203.02053).
        self.register_buffer("centres", torch.zeros(2, self.judge.config.width) if config.meaning else None, persistent=False)
        self.tokenizer = BPETokenizer()
        self.generation = GenerationConfig()  # how captions are searched for unless it is said
        self.words = config.concept_words(encoder)
        self.register_buffer("concept_vectors", self.vectors_of_concepts(config.concept_source == "clip"), persistent=False)
        token_ids = known if token_ids is None else token_ids[torch.isin(token_ids, known)]
        # Where each token stands among those scored; others, as targets, do not count.
        places = torch.full((self.decoder.config.vocab_size,), IGNORE)
        places[token_ids] = torch.arange(len(token_ids))
        self.end = int(places[min(END_OF_TEXT, len(places) - 1)])  # in a smaller vocabulary, its last token
        if self.end == IGNORE:
            raise UserError("the decoder weights, or the tokens of the checkpoint, lack <|endoftext|>: they are damaged")
        self.register_buffer("token_ids", torch.as_tensor(token_ids), persistent=False)
        self.register_buffer("places", places, persistent=False)
        if self.num_trained() > MAX_TRAINED:
            raise UserError(f"{self.num_trained() / 1e6:.1f}M trained parameters are more than the "
                            f"{MAX_TRAINED / 1e6:.0f}M allowed: shrink the projection, cross_dim or the LoRA rank")

    def trained_parameters(self):
        """All that training may change, by name."""
        frozen = {f"decoder.{name}" for name in self.decoder.pretrained_names()}
        return {name: parameter for name, parameter in self.named_parameters()
                if name not in frozen and not name.startswith("encoder.")}

    def train_fusion_alone(self, alone):
        """Freeze, or thaw, what PEFT adds: all that is trained but the projection and cross-attention."""
        for name, parameter in self.trained_parameters().items():
            parameter.requires_grad_(not alone or is_fusion(name))

    def num_trained(self):
        return sum(parameter.numel() for parameter in self.trained_parameters().values())

    # ---- what the text sees ----

    def vectors_of_concepts(self, nouns):
        """(C, n_embd), or with those of the nouns (C + L, n_embd); None for a model without concepts."""
        return self.words and self.words.vectors(self.decoder.wte.weight, self.tokenizer.encode, nouns)

    @cached_property
    def source(self):
        """What recognises concepts in an image's features."""
        if self.config.concept_source == "clip":
            return ClipWords(self.words, self.judge)
        return ClassifierWords(self.words, self.encoder)

    @torch.no_grad()
    def concepts(self, features, embeddings=None):
        """Features (B, N, D) -> the Concepts that are recognised in them; None for a model that is told of none.

        `embeddings` (B, width): of the images in our CLIP's space; None: worked out where they are needed.
        """
        if not self.words and not self.config.meaning:
            return None
        found = self.source.recognise(features, self.config.concepts) if self.words else Concepts(None, None)
        if not self.config.meaning:
            return found
        embeddings = self.judge.embed_images(features) if embeddings is None else embeddings
        return found._replace(meaning=self.meaning(embeddings, 0))

    def meaning(self, embeddings, of_texts):
        """Embeddings in our CLIP's space, of images (0) or of texts (1), seen from their centre: unit vectors (B, width)"""
        return F.normalize(F.normalize(embeddings, dim=-1) - self.centres[of_texts].to(embeddings), dim=-1)

    @cached_property
    def judge(self):
        """Our CLIP on the captioner's own encoder. Raises UserError where it is not here, or was made for another encoder."""
        return ClipSmall.load(SMALL_WEIGHTS, self.encoder).to(self.decoder.wte.weight.device)

    def _apply(self, *arguments, **options):
        """Where the model goes, its judge goes too, which is none of its submodules: nothing of it is saved or trained."""
        if isinstance(judge := self.__dict__.get("judge"), nn.Module):
            judge._apply(*arguments, **options)
        return super()._apply(*arguments, **options)

    def retrieve(self, captions, cache=None):
        """From now on recognise also what captions of pictures like it name: a list of strings, which can be swapped at will."""
        if not self.words:
            raise UserError("this captioner was trained without concepts: retrieved captions can tell it nothing")
        self.concept_vectors = self.vectors_of_concepts(nouns=True)
        self.source = RetrievedWords(self.source, self.judge, captions, cache)

    def image_tokens(self, features, concepts=None, attentions=None):
        """What the text sees: a token for each patch, then one for each concept, then those of the meaning (B, N + K + M, width).

        A concept's token comes of the mean of its words' embeddings (object tags: Li et al. 2020, arXiv:2004.06165; entity
        prompts: Fei et al. 2023, arXiv:2307.16525), times the root of its probability. That comes after the normalisation,
        which would undo it.

        Args:
            features: (B, N, D) from the encoder; None: of no image.
            concepts: Concepts; None: those that are recognised in the features.
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
        """Cross-entropy at the target tokens that are among those scored: their mean, or "sum".

        Args:
            features, concepts: as of `image_tokens`.
            tokens, targets: (B * K, T), an image's K captions adjacent; IGNORE where there is no target.
            weights: (B * K), what each caption's tokens count.
        """
        hidden = self.decoder.hidden(tokens, self.decoder.context(self.image_tokens(features, concepts)))
        places = torch.where(targets == IGNORE, IGNORE, self.places[targets.clamp(min=0)])
        used = places != IGNORE
        logits = F.linear(hidden[used], self.decoder.head_weight(self.token_ids)).float()  # (tokens used, V)
        losses = F.cross_entropy(logits / temperature, places[used], label_smoothing=label_smoothing, reduction="none")
        if weights is not None:
            losses = losses * weights[:, None].expand_as(targets)[used]
        return losses.sum() if reduction == "sum" else losses.mean()

    def draw(self, features, reward, samples, temperature=1.0, seed=0, numbers=None, max_length=24, concepts=None):
        """What self-critical sequence training (Rennie et al. 2017, arXiv:1612.00563) learns from: captions that the model
        draws itself, and how much better each is than the others.

        `loss` of them, with the advantages as weights, is REINFORCE. The baseline of a caption's reward is the mean
        over the image's other samples (Luo 2020, arXiv:2003.09971), which needs no greedy caption beside them.

        Args:
            features, concepts: as of `image_tokens`.
            reward: function from B * samples captions, an image's adjacent, and whether each came to its end before
                max_length, to as many numbers.
            samples: captions drawn for each image, at least 2.
            temperature: of the policy that draws and is improved. At 1, label smoothing makes its captions poor.
            seed, numbers: of the drawing, and of each caption; default: 0, 1, ….
        Returns tokens and targets (B * samples, T), advantages and rewards (B * samples).
        """
        generation = GenerationConfig(sample=True, temperature=temperature, max_length=max_length, seed=seed)
        training = self.training
        self.eval()  # captions are drawn without dropout, and judged with it
        with torch.inference_mode():
            rows = self.sample(self.image_tokens(features, concepts), generation,
                               range(samples * len(features)) if numbers is None else numbers)
        self.train(training)
        torch.clear_autocast_cache()  # of casts that were made without gradients
        ended = [len(row) < max_length for row in rows]
        rewards = torch.as_tensor(reward([self.text(row) for row in rows], ended)).to("cpu", torch.float32).view(-1, samples)
        others = (rewards.sum(1, keepdim=True) - rewards) / (samples - 1)
        tokens, targets = collate(rows)
        targets[[not row for row in rows], 0] = END_OF_TEXT  # drawn at once; to collate, an empty row is no caption
        targets[:, max_length:] = IGNORE  # a caption that was cut there did not draw its end
        return *(x.to(features.device) for x in (tokens, targets, (rewards - others).flatten())), rewards.flatten()

    # ---- generation ----

    @torch.inference_mode()
    def caption(self, images, generation=None, seeds=None):
        """uint8 images (B, 3, S, S) -> list of B captions."""
        return self.generate(self.encoder(images), generation, seeds)

    @torch.inference_mode()
    def generate(self, features, generation=None, seeds=None, concepts=None, embeddings=None):
        """Features (B, N, D) -> list of B captions.

        `concepts`: those to see instead of what is recognised; `embeddings` (B, width): of the images in our CLIP's space,
        instead of what it says of them.

        `seeds`: one number for each image, which with `generation.seed` decides its sample whatever the batch
        (default: 0 … B - 1); with K numbers for each image, K samples of each.
        """
        return [self.text(row) for row in self.search(features, generation, seeds, concepts, embeddings)]

    @torch.inference_mode()
    def search(self, features, generation=None, seeds=None, concepts=None, embeddings=None):
        """As `generate`, but the captions as lists of token ids, without <|endoftext|>."""
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
        """Token ids, without <|endoftext|> -> the caption, on one line, a capital first: CIDEr as a reward is blind to it."""
        caption = " ".join(self.tokenizer.decode(tokens).split())
        return caption[:1].upper() + caption[1:]

    def next_log_probs(self, tokens, context, cache, head, temperature=1.0):
        """The step of generation: tokens (R, 1) after those in the cache -> log-probabilities (R, V), fp32."""
        hidden = self.decoder.hidden(tokens, context, cache)[:, -1]
        return (F.linear(hidden, head).float() / temperature).log_softmax(-1)

    def beam_search(self, image, generation):
        """Image tokens (B, N, C) -> B lists of token ids, without <|endoftext|>: the best hypothesis of each."""
        return [found[0][1] for found in self.hypotheses(image, generation)]

    def hypotheses(self, image, generation):
        """Image tokens (B, N, C) -> what beam search found for each image, best first: B lists of (score, token ids).

        Each image keeps K running beams. Of each step's 2K best continuations, those among the first K that end
        are finished hypotheses, and the K best that do not end run on. An image is done, and leaves the batch,
        when K hypotheses have finished (first come, first served: Kasai et al. 2022, arXiv:2204.05424) or
        max_length is reached, where its best running beam counts as it is.
        """
        K, alpha, max_length = generation.beam_size, generation.length_penalty, generation.max_length
        max_length = min(max_length, self.decoder.config.n_positions)
        device, images = image.device, len(image)
        end = self.end
        head = self.decoder.head_weight(self.token_ids)
        context = self.decoder.context(image)
        cache = Cache(max_length)

        active = torch.arange(images, device=device)  # which image each slot of the batch holds
        scores = torch.full((images, K), -torch.inf, device=device)
        scores[:, 0] = 0  # one beam to begin with
        tokens = torch.full((images, K, max_length + 1), end, device=device)  # places, not ids
        finished = torch.zeros(images, dtype=torch.long, device=device)  # hypotheses, for each slot
        # Of each image, in the order in which they were finished: below K before a step, and K more in it.
        found_scores = torch.full((images, 2 * K), -torch.inf, device=device)
        found = torch.full((images, 2 * K, max_length + 1), end, device=device)

        for length in range(1, max_length + 1):
            last = self.token_ids[tokens[:, :, length - 1]].view(-1, 1)
            log_probs = self.next_log_probs(last, context, cache, head).view(len(active), K, -1)
            V = log_probs.shape[-1]
            scores, flat = (scores[:, :, None] + log_probs).flatten(1).topk(min(2 * K, K * V))
            beam, token = flat // V, flat % V  # (B, 2K) each
            ends = token == end

            # Those that end.
            ended = scores.masked_fill(~ends, -torch.inf)[:, :K] / length**alpha
            ending = ended > -torch.inf
            slot, which = ending.nonzero(as_tuple=True)
            if len(slot):
                place = active[slot], (finished[:, None] + ending.cumsum(1) - 1)[slot, which]
                found_scores[place] = ended[slot, which]
                found[place] = tokens[slot, beam[slot, which]]
            finished += ending.sum(1)

            # Those that run on.
            scores, pick = scores.masked_fill(ends, -torch.inf).topk(min(K, scores.shape[1]))
            beam, token = beam.gather(1, pick), token.gather(1, pick)
            going = ((finished < K) & (scores[:, 0] > -torch.inf)).nonzero().squeeze(1)
            if not len(going):
                break
            if len(going) < len(active):
                context = [layer.select(going) for layer in context]
                active, finished, scores = active[going], finished[going], scores[going]
            beam, token = beam[going], token[going]
            if beam.shape[1] < K:  # fewer continuations than beams, in a tiny vocabulary: fill with dead ones
                pad = (0, K - beam.shape[1])
                scores, beam, token = F.pad(scores, pad, value=-torch.inf), F.pad(beam, pad), F.pad(token, pad)
            tokens = tokens[going[:, None], beam]
            tokens[:, :, length] = token
            cache.select((going[:, None] * K + beam).flatten())
        else:
            found_scores[active, finished] = scores[:, 0] / max_length**alpha
            found[active, finished] = tokens[:, 0]

        order = found_scores.argsort(dim=1, descending=True, stable=True)
        hypotheses = [[(score[i], self.until_end(rows[i][1:])) for i in best if score[i] > -torch.inf]
                      for best, score, rows in zip(order.tolist(), found_scores.tolist(), found.tolist())]
        if not all(hypotheses):
            raise UserError("the model's probabilities are not numbers: its weights, or the encoder's, are damaged")
        return hypotheses

    def choose(self, embeddings, hypotheses, weight):
        """Of each image's hypotheses the token ids of the one that is best by its score and what the `judge` gives it."""
        chosen = []
        for found, cosines in zip(hypotheses, self.cosines(embeddings, hypotheses)):
            scores = [score + weight * cosine for (score, _), cosine in zip(found, cosines)]
            chosen.append(found[scores.index(max(scores))][1])
        return chosen

    @torch.inference_mode()
    def cosines(self, embeddings, hypotheses):
        """What the `judge` gives each image's hypotheses, by the images' embeddings (B, width): B lists."""
        texts = [self.text(tokens) for found in hypotheses for _, tokens in found]
        images = F.normalize(embeddings, dim=-1)
        counts = torch.tensor([len(found) for found in hypotheses], device=images.device)
        of_clip = (images.repeat_interleave(counts, 0) * F.normalize(self.judge.embed_texts(texts), dim=-1)).sum(-1)
        return [values.tolist() for values in of_clip.split(counts.tolist())]

    def until_end(self, places):
        places = places[:places.index(self.end)] if self.end in places else places
        return self.token_ids[places].tolist()

    def sample(self, image, generation, seeds=None):
        """Image tokens (B, N, C) -> as many lists of token ids as seeds, drawn with temperature, top-k and top-p.

        Top-p is nucleus sampling (Holtzman et al. 2020, arXiv:1904.09751). Drawn as the largest of log p + Gumbel noise,
        each image's noise its own, so that its caption depends neither on the others of the batch nor on p's last bit.
        """
        max_length = min(generation.max_length, self.decoder.config.n_positions)
        head = self.decoder.head_weight(self.token_ids)
        context = self.decoder.context(image)
        cache = Cache(max_length)
        seeds = range(len(image)) if seeds is None else seeds
        random = [np.random.default_rng([generation.seed, seed]) for seed in seeds]
        tokens = torch.full((len(random), max_length + 1), self.end, device=image.device)
        ended = torch.zeros(len(random), dtype=torch.bool, device=image.device)
        for length in range(1, max_length + 1):
            last = self.token_ids[tokens[:, length - 1:length]]
            log_probs = self.next_log_probs(last, context, cache, head, generation.temperature)
            if generation.top_k or generation.top_p < 1:
                likely = log_probs.sort(-1, descending=True).values
                if generation.top_k:
                    likely = likely[:, :generation.top_k]
                probs = likely.softmax(-1)
                # Tokens before which less than top_p lies stay: the one that crosses it as well.
                kept = (probs.cumsum(-1) - probs < generation.top_p).sum(-1, keepdim=True)
                log_probs = log_probs.masked_fill(log_probs < likely.gather(1, kept - 1), -torch.inf)
            noise = np.stack([rng.standard_exponential(len(head), dtype=np.float32) for rng in random])
            choice = (log_probs - torch.from_numpy(noise).to(image.device).log()).argmax(-1)
            tokens[:, length] = choice.masked_fill(ended, self.end)
            ended |= tokens[:, length] == self.end
            if ended.all():
                break
        return [self.until_end(row) for row in tokens[:, 1:].tolist()]

    # ---- checkpoints ----

    def save(self, path, training=None, scores=None):
        """Write what was trained, in fp16, and in the metadata all that `load` needs to rebuild the model."""
        state = {f"projection.{name}": value for name, value in self.projection.state_dict().items()}
        state |= {f"decoder.{name}": value for name, value in self.decoder.trained_state().items()}
        tensors = {name: value.to("cpu", torch.float16).contiguous() for name, value in state.items()}
        tensors["token_ids"] = self.token_ids.to("cpu", torch.int32)
        if self.config.meaning:
            tensors["centres"] = self.centres.to("cpu", torch.float16)
        config = replace(self.config, prefix_hidden=0)  # that MLP has done its work
        metadata = {"model": asdict(config), "encoder_hash": self.encoder.weights_hash,
                    "decoder_hash": self.decoder.weights_hash, "digest": digest(tensors),
                    "trained_parameters": self.num_trained(), "generation": asdict(self.generation), "training": training or {}, "scores": scores or {}}
        write_whole(path, save(tensors, {"captioner": json.dumps(metadata)}))

    def load_trained(self, state):
        """Take these values for all that is trained. Raises KeyError or RuntimeError where names or shapes differ."""
        if state.keys() != self.trained_parameters().keys():
            raise KeyError("other names")
        self.load_state_dict(state, strict=False)

    @classmethod
    def load(cls, checkpoint, decoder_weights, encoder=None, all_tokens=False):
        """Rebuild a captioner for inference from a checkpoint and the decoder weights it was trained with.

        Args:
            encoder: if one is there already; otherwise the checkpoint's is loaded.
            all_tokens: score all tokens instead of those that the training captions held.
        Raises UserError where the encoder's or the decoder's weights are not those of the training.
        """
        metadata = read_metadata(checkpoint)
        state = read_weights(checkpoint, "checkpoint")
        check_digest(checkpoint, "checkpoint", state, metadata.get("digest"))
        config = CaptionerConfig(**{"encoder_levels": 1} | metadata["model"])  # of checkpoints that say nothing of levels
        decoder = config.load_decoder(decoder_weights)
        encoder = encoder or config.load_encoder()
        check_hash(checkpoint, metadata, "decoder", decoder.weights_hash, decoder_weights)
        check_hash(checkpoint, metadata, "encoder", encoder.weights_hash, encoder.name)
        try:
            token_ids, centres = state.pop("token_ids").long(), state.pop("centres", None)
            model = cls(config, encoder, decoder, None if all_tokens else token_ids)
            if config.meaning:
                model.centres.copy_(centres)
            model.load_trained(state)
        except (KeyError, RuntimeError, TypeError):
            raise UserError(f"the checkpoint {checkpoint} does not fit its own description: it is damaged") from None
        model.metadata, model.generation = metadata, recorded_generation(metadata)
        model.decoder.merge_lora()
        return model.eval()


def check_hash(checkpoint, metadata, part, now, where):
    """Raise UserError unless the frozen weights of this part, "encoder" or "decoder", are those of the checkpoint's training."""
    if now != metadata[f"{part}_hash"]:
        raise UserError(f"the checkpoint {checkpoint} was trained with other {part} weights than {where}")


def recorded_generation(metadata):
    """How a checkpoint says that its captions are best searched for; GenerationConfig's defaults where it says nothing."""
    return GenerationConfig(**metadata.get("generation", {}))


def read_metadata(checkpoint):
    """What a checkpoint says of itself, without reading its tensors. Raises UserError."""
    if not Path(checkpoint).is_file():
        raise UserError(f"the checkpoint {checkpoint} does not exist")
    try:
        with safe_open(checkpoint, "pt") as file:
            metadata = json.loads((file.metadata() or {})["captioner"])
        CaptionerConfig(**metadata["model"]), recorded_generation(metadata), metadata["encoder_hash"], metadata["decoder_hash"]  # all there?
        return metadata
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"the checkpoint {checkpoint} is damaged or of another format: {first_line(error)}") from None
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{checkpoint} is not a checkpoint of p2_train.py") from None


def newest_checkpoint(decoder_hash, folders=CHECKPOINT_FOLDERS):
    """The newest checkpoint that was trained with these decoder weights, or None; here, or beside this module."""
    paths = [path for folder in folders for path in Path(folder).glob("*.safetensors") if path.is_file()]
    for path in sorted(paths, key=lambda path: path.stat().st_mtime, reverse=True):
        try:
            if read_metadata(path)["decoder_hash"] == decoder_hash:
                return path
        except (UserError, KeyError):
            continue  # some other file: not ours to complain about
    return None
