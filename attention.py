"""Attention maps: each word's attention over the image patches, for p1 (LLaVA) and p2 (the captioner)."""

import re
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from cli import UserError
from dataset import IGNORE, collate
from llava import LlavaSettings
from tokenizer import END_OF_TEXT

START, END = "<start>", "<end>"
WORD = re.compile(r"\w+(?:['’-]\w+)*|[^\w\s]+")  # punctuation is a word of its own
STOP_WORDS = set("""a about above across after all along also an and another are around as at away be been before behind
being below beneath beside between both by can do does down during each few for from front has have he her him his
how i in inside into is it its itself just like many more most near next no not of off on one or other out outside over
own several she side so some such than that the their them then there these they this those three through to together
top two under up upon very was we were what when where which while who with within without you your""".split())
COLOUR_MAP = "inferno"  # matplotlib's
CORRECTIONS = "none", "divide", "subtract"


@dataclass
class Attention:
    """The attention of each word of one caption."""

    caption: str
    words: list  # W words; the last is <end>, unless the caption was cut at its maximum length
    tokens: list  # T token ids, without <|endoftext|>
    places: list  # the indices of each word's tokens; T for <end>
    maps: np.ndarray  # (W, layers, heads, rows, columns): attention from the word's position to each patch
    log_probs: np.ndarray  # (W,): of each word given those before it, summed over its tokens
    region: tuple = (0.0, 0.0, 1.0, 1.0)  # part of the picture that the maps cover: left, top, right, bottom
    concepts: tuple = ()  # names of the K concepts beside the patches
    shares: np.ndarray = None  # (W, layers, heads, K): attention to each of them

    @classmethod
    def of_tokens(cls, caption, tokens, words, weights, log_probs, grid, region=(0.0, 0.0, 1.0, 1.0), concepts=()):
        """Merge tokens to words.

        Args:
            words: [(word, indices of its tokens), …].
            weights: (T + 1, layers, heads, N), of the positions that predict the tokens and the end. Among the N, class and
                register tokens come before the patches and are left out; concepts come after the patches.
            log_probs: (T + 1,), or (T,) without <end>.
            grid: rows and columns of patches.
            concepts: names of the concepts after the patches.
        """
        words, places = map(list, zip(*words))
        weights = torch.stack([weights[of_word].float().mean(0) for of_word in places]).cpu()
        seen = weights.shape[-1] - len(concepts)
        maps = weights[..., seen - grid[0] * grid[1]:seen].unflatten(-1, grid)
        return cls(caption, words, tokens, places, maps.numpy(), of_words(log_probs, places).cpu().numpy(), region,
                   tuple(concepts), weights[..., seen:].numpy())

    def content_words(self):
        """Indices of the content words: without stop words, punctuation and <end>."""
        return [i for i, word in enumerate(self.words) if word[0].isalnum() and word.lower() not in STOP_WORDS]


def align_words(tokens, decode, ended):
    """The words of a caption with the indices of their tokens: [(word, [index, …]), …]

    A token belongs to the word that contains its last character. `ended`: the next token is the end, which counts as a word. If the
    tokens contain no word, they form an empty one.
    """
    text = decode(tokens)
    last = [min(len(decode(tokens[:count])), len(text)) - 1 for count in range(1, len(tokens) + 1)]
    words = [(match[0], [place for place, at in enumerate(last) if match.start() <= at < match.end()])
             for match in WORD.finditer(text)]
    words = [(word, places) for word, places in words if places] + [(END, [len(tokens)])] * ended
    return words or [("", [*range(len(tokens))])] * bool(tokens)


def of_words(log_probs, places):
    """Log-probabilities of tokens (…, T) -> of words (…, W)"""
    return torch.stack([log_probs[..., of_word].sum(-1) for of_word in places], -1)


def rollout(attentions):
    """Attention rollout through layers that mix the image tokens: [(B, H, N, N), …] -> (B, N, N)

    How much each token before the layers contributes to each token after them. Half of every layer's output is attributed to the
    residual, half to attention, averaged over heads (Abnar and Zuidema 2020, https://arxiv.org/abs/2005.00928).
    """
    mixed = torch.eye(attentions[0].shape[-1], device=attentions[0].device)
    for weights in attentions:
        mixed = (weights.mean(1) + torch.eye(weights.shape[-1], device=weights.device)) / 2 @ mixed
    return mixed


def teacher_forced(model, features, rows, attentions=None, mixing=None, concepts=None):
    """The log-probability of every token of B captions, given those before it: (B, T), T the longest with its end.

    Args:
        features: (B, N, D) from the encoder.
        rows: B lists of token ids; results after a caption's end are meaningless.
        attentions, mixing: lists to which the attention weights of the decoder (B, H, T, N) and the projection (B, H, N, N) are appended.
        concepts: the Concepts of the images; None: those recognised in the features.
    """
    inputs, targets = (part[:, :model.decoder.config.n_positions].to(features.device) for part in collate(rows))
    context = model.decoder.context(model.image_tokens(features, concepts, mixing))
    hidden = model.decoder.hidden(inputs, context, attentions=attentions)
    log_probs = F.linear(hidden, model.decoder.head_weight(model.token_ids)).float().log_softmax(-1)
    places = model.column_of[targets.masked_fill(targets == IGNORE, END_OF_TEXT)]
    return log_probs.gather(-1, places[..., None]).squeeze(-1)


@torch.inference_mode()
def p2_attention(model, pictures, generation=None, through_projection=False):
    """Caption pictures with p2's model and record each word's attention.

    The generated caption is run through the decoder once more, which gives the attention weights of its generation.

    Args:
        model: a Captioner.
        pictures: RGB PIL images.
        generation: GenerationConfig; default: the model's own.
        through_projection: trace the maps back through the projection's transformer layers, by rollout.
    Returns an Attention for each. With fusion "prefix" the maps are the image's part of self-attention, and
    sum to less than one; with cross-attention they sum to one minus the shares of class and register tokens and concepts.
    """
    if through_projection and not len(model.projection.layers):
        raise UserError("this model's projection has no transformer layers to carry the maps back through: without "
                        "--rollout they lie where the encoder saw them")
    generation = generation or model.generation
    device = model.token_ids.device
    with torch.autocast("cuda", torch.float16, enabled=device.type == "cuda"):  # as p2_infer.py captions
        features = model.encoder(torch.stack([model.encoder.preprocess(picture) for picture in pictures]).to(device))
        embeddings = model.judge.embed_images(features) if model.config.meaning or generation.clip_weight else None
        concepts = model.concepts(features, embeddings)
        rows = model.search(features, generation, concepts=concepts, embeddings=embeddings)
    features = features.float()
    attentions, mixing = [], [] if through_projection else None
    log_probs = teacher_forced(model, features, rows, attentions, mixing, concepts)
    weights = torch.stack(attentions, 1)  # (B, layers, H, T, N)
    if through_projection:
        weights = weights @ rollout(mixing)[:, None, None]
    weights = weights.permute(0, 3, 1, 2, 4)
    longest = min(generation.max_length, model.decoder.config.n_positions)
    found = []
    for i, row in enumerate(rows):
        words = align_words(row, model.tokenizer.decode, ended=len(row) < longest)
        names = [model.words.names[number] for number in concepts.numbers[i].tolist()] if model.words else []
        names += [f"the whole picture {number}" for number in range(1, model.config.meaning + 1)]
        found.append(Attention.of_tokens(model.text(row), row, words, weights[i], log_probs[i], model.encoder.grid,
                                         concepts=names))
    return found


@torch.inference_mode()
def llava_attention(llava, picture, settings=None):
    """Caption an RGB PIL image with LLaVA and record each word's Attention.

    Its maps are the image's part of the language model's self-attention; most attention goes to the text.

    Args:
        llava: a Llava with attention "eager", the only one that returns attention weights.
        settings: LlavaSettings.
    """
    settings = settings or LlavaSettings()
    model, tokenizer = llava.model, llava.processor.tokenizer
    inputs = llava.inputs([picture], [settings.instruction])
    asked = inputs["input_ids"].shape[1]
    tokens = llava.generate(inputs, settings)
    ends = torch.atleast_1d(torch.as_tensor(model.generation_config.eos_token_id, device=tokens.device))
    at = torch.isin(tokens[0], ends).nonzero()
    length, ended = (int(at[0]), True) if len(at) else (tokens.shape[1], False)

    # Once more with the caption given: each position predicts the next token.
    inputs["input_ids"] = torch.cat([inputs["input_ids"], tokens[:, :length]], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    output = model(**inputs, output_attentions=True)
    predicting = slice(asked - 1, asked + length)
    on_image = inputs["input_ids"][0] == model.config.image_token_id
    weights = torch.stack([layer[0][:, predicting][..., on_image] for layer in output.attentions])  # (layers, H, T, N)
    log_probs = output.logits[0, predicting].float().log_softmax(-1)
    log_probs = log_probs[:length + ended].gather(1, tokens[0, :length + ended, None])[:, 0]

    if hasattr(model.config.vision_config, "num_image_tokens"):
        raise UserError("the image tokens of this LLaVA are no patches of the picture, but a Q-Former's: there is nothing to draw")
    side = int(weights.shape[-1] ** 0.5)  # of the square of patches; there may be a class token, too
    row = tokens[0, :length].tolist()
    words = align_words(row, tokenizer.decode, ended)
    return Attention.of_tokens(llava.texts([row])[0], row, words, weights.permute(2, 0, 1, 3), log_probs, (side, side),
                               kept_region(llava.processor.image_processor, *picture.size))


def kept_region(image_processor, width, height):
    """The part of a picture that an image processor of `transformers` keeps: left, top, right, bottom as fractions of its sides.

    CLIP's resizes the shorter side and crops the centre, so that the model does not see the ends of a wide picture.
    """
    edge = image_processor.size.get("shortest_edge")
    if not (image_processor.do_center_crop and edge):
        return 0.0, 0.0, 1.0, 1.0
    crop, shorter = image_processor.crop_size, min(width, height)
    kept_x = min(1.0, crop["width"] / (edge * width / shorter))
    kept_y = min(1.0, crop["height"] / (edge * height / shorter))
    return (1 - kept_x) / 2, (1 - kept_y) / 2, (1 + kept_x) / 2, (1 + kept_y) / 2


def word_maps(attention, layer="mean", head="mean", correction="none"):
    """One map per word, (W, rows, columns), from those of all layers and heads.

    Args:
        layer, head: counted from 1, or "mean" over them.
        correction: for patches that every word attends to: "divide" by the mean over words, or "subtract" it.
    Raises UserError for a layer or head that does not exist.
    """
    maps = choose(attention.maps, layer, head)
    usual = maps.mean(0)
    if correction == "divide":
        return maps / usual.clip(1e-9)
    return maps - usual if correction == "subtract" else maps


def choose(values, layer="mean", head="mean"):
    """Values (W, layers, heads, …) of a layer and a head, counted from 1, or their "mean": (W, …)"""
    for name, choice in (("layer", layer), ("head", head)):
        count = values.shape[1]
        if choice != "mean" and not 1 <= choice <= count:
            raise UserError(f"there is no {name} {choice}: the model has {count}, counted from 1")
        values = values.mean(1) if choice == "mean" else values[:, choice - 1]
    return values


def favourite_concepts(attention, layer="mean", head="mean"):
    """For each word, the concept that it attends to most, and its share: [(name, share), …]; [] without concepts."""
    if not attention.concepts:
        return []
    shares = choose(attention.shares, layer, head)
    return [(attention.concepts[best], float(row[best])) for row, best in zip(shares, shares.argmax(-1))]


def upsample(values, size, region=(0.0, 0.0, 1.0, 1.0)):
    """A map over patches (rows, columns) -> over the pixels of a picture of `size` (width, height): (height, width)

    Each patch is a rectangle of the region with its value at the centre; values in between are interpolated bicubically,
    which can overshoot a little. NaN outside the region, which the model has not seen.
    """
    left, top, right, bottom = (round(edge * length) for edge, length in zip(region, [*size, *size]))
    patch = Image.fromarray(np.asarray(values, np.float32))
    pixels = np.full(size[::-1], np.nan, np.float32)
    pixels[top:bottom, left:right] = patch.resize((right - left, bottom - top), Image.Resampling.BICUBIC)
    return pixels


def peak(pixels):
    """The position of the maximum of a map over pixels: x, y"""
    y, x = np.unravel_index(np.nanargmax(pixels), pixels.shape)
    return int(x), int(y)
