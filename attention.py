"""Where each word of a caption looked: attention over the image patches, for p1 (LLaVA) and p2 (the captioner)."""

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
    """Where each word of one caption looked."""

    caption: str
    words: list  # W of them; the last is <end>, unless the caption was cut at its greatest length
    tokens: list  # T token ids, without <|endoftext|>
    places: list  # where each word's tokens stand among them; <end> at T
    maps: np.ndarray  # (W, layers, heads, rows, columns): what the word's position gives each patch
    log_probs: np.ndarray  # (W,): of the word, given those before it; a sum over its tokens
    region: tuple = (0.0, 0.0, 1.0, 1.0)  # what of the picture the maps cover: left, top, right, bottom
    concepts: tuple = ()  # names of the K concepts that stood beside the patches
    shares: np.ndarray = None  # (W, layers, heads, K): what the word's position gives each of them

    @classmethod
    def of_tokens(cls, caption, tokens, words, weights, log_probs, grid, region=(0.0, 0.0, 1.0, 1.0), concepts=()):
        """Merge tokens to words.

        Args:
            words: [(word, places of its tokens), …].
            weights: (T + 1, layers, heads, N), of the positions that predict the tokens and the end; class and register
                tokens, if any, stand before the patches among the N and are left out; concepts stand behind them.
            log_probs: (T + 1,), or (T,) where there is no <end>.
            grid: rows and columns of patches.
            concepts: names of those behind the patches.
        """
        words, places = map(list, zip(*words))
        weights = torch.stack([weights[of_word].float().mean(0) for of_word in places]).cpu()
        seen = weights.shape[-1] - len(concepts)
        maps = weights[..., seen - grid[0] * grid[1]:seen].unflatten(-1, grid)
        return cls(caption, words, tokens, places, maps.numpy(), of_words(log_probs, places).cpu().numpy(), region,
                   tuple(concepts), weights[..., seen:].numpy())

    def content_words(self):
        """Places of the words that carry meaning: no stop words, no punctuation, no <end>."""
        return [i for i, word in enumerate(self.words) if word[0].isalnum() and word.lower() not in STOP_WORDS]


def align_words(tokens, decode, ended):
    """The words of a caption, each with the places of its tokens: [(word, [place, …]), …]

    A token belongs to the word that holds its last character. `ended`: the token after them is the end, a word too. Tokens that
    make no word at all are a blank one.
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

    How much of each token before the layers is in each token after them. Half of every layer's output is counted as the
    residual's, half as attention's, the heads averaged (Abnar and Zuidema 2020, https://arxiv.org/abs/2005.00928).
    """
    mixed = torch.eye(attentions[0].shape[-1], device=attentions[0].device)
    for weights in attentions:
        mixed = (weights.mean(1) + torch.eye(weights.shape[-1], device=weights.device)) / 2 @ mixed
    return mixed


def teacher_forced(model, features, rows, attentions=None, mixing=None, concepts=None):
    """The log-probability of every token of B captions, given those before it: (B, T), T the longest with its end.

    Args:
        features: (B, N, D) from the encoder.
        rows: B lists of token ids; what lies behind a caption's end means nothing.
        attentions, mixing: lists that receive the decoder's weights (B, H, T, N) and the projection's (B, H, N, N).
        concepts: the Concepts of the images; None: those that are recognised in the features.
    """
    inputs, targets = (part[:, :model.decoder.config.n_positions].to(features.device) for part in collate(rows))
    context = model.decoder.context(model.image_tokens(features, concepts, mixing))
    hidden = model.decoder.hidden(inputs, context, attentions=attentions)
    log_probs = F.linear(hidden, model.decoder.head_weight(model.token_ids)).float().log_softmax(-1)
    places = model.column_of[targets.masked_fill(targets == IGNORE, END_OF_TEXT)]
    return log_probs.gather(-1, places[..., None]).squeeze(-1)


@torch.inference_mode()
def p2_attention(model, pictures, generation=None, through_projection=False):
    """Caption pictures with p2's model and say where each word looked.

    The winning caption is run through the decoder once more, which gives the weights of its generation.

    Args:
        model: a Captioner.
        pictures: RGB PIL images.
        generation: GenerationConfig; default: the model's own.
        through_projection: carry the maps back through the projection's transformer layers, by rollout.
    Returns an Attention for each. Under fusion "prefix" the maps are the image's part of self-attention, so that they
    sum to less than one; with cross-attention to one, less the shares of class and register tokens and of concepts.
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
    """Caption an RGB PIL image with LLaVA and say where each word looked: an Attention.

    Its maps are the image's part of the language model's self-attention; the rest, most of it, goes to text.

    Args:
        llava: a Llava with attention "eager", which alone gives its weights.
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

    # Once more with the words given; the position before each token predicts it.
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
    side = int(weights.shape[-1] ** 0.5)  # of the square of patches; with a class token there is one more
    row = tokens[0, :length].tolist()
    words = align_words(row, tokenizer.decode, ended)
    return Attention.of_tokens(llava.texts([row])[0], row, words, weights.permute(2, 0, 1, 3), log_probs, (side, side),
                               kept_region(llava.processor.image_processor, *picture.size))


def kept_region(image_processor, width, height):
    """What an image processor of `transformers` leaves of a picture: left, top, right, bottom as parts of its sides.

    CLIP's resizes the shorter side and crops the middle, so of a wide picture the model never sees the ends.
    """
    edge = image_processor.size.get("shortest_edge")
    if not (image_processor.do_center_crop and edge):
        return 0.0, 0.0, 1.0, 1.0
    crop, shorter = image_processor.crop_size, min(width, height)
    kept_x = min(1.0, crop["width"] / (edge * width / shorter))
    kept_y = min(1.0, crop["height"] / (edge * height / shorter))
    return (1 - kept_x) / 2, (1 - kept_y) / 2, (1 + kept_x) / 2, (1 + kept_y) / 2


def word_maps(attention, layer="mean", head="mean", correction="none"):
    """One map a word, (W, rows, columns), from those of all layers and heads.

    Args:
        layer, head: counted from 1, or "mean" over them.
        correction: for patches that every word attends to: "divide" by the mean over words, or "subtract" it.
    Raises UserError for a layer or head that is not there.
    """
    maps = choose(attention.maps, layer, head)
    usual = maps.mean(0)
    if correction == "divide":
        return maps / usual.clip(1e-9)
    return maps - usual if correction == "subtract" else maps


def choose(values, layer="mean", head="mean"):
    """Of values (W, layers, heads, …) those of a layer and a head, counted from 1, or their "mean": (W, …)"""
    for name, choice in (("layer", layer), ("head", head)):
        count = values.shape[1]
        if choice != "mean" and not 1 <= choice <= count:
            raise UserError(f"there is no {name} {choice}: the model has {count}, counted from 1")
        values = values.mean(1) if choice == "mean" else values[:, choice - 1]
    return values


def favourite_concepts(attention, layer="mean", head="mean"):
    """For each word, the concept that its position attends to most, and its share: [(name, share), …]; [] without concepts."""
    if not attention.concepts:
        return []
    shares = choose(attention.shares, layer, head)
    return [(attention.concepts[best], float(row[best])) for row, best in zip(shares, shares.argmax(-1))]


def upsample(values, size, region=(0.0, 0.0, 1.0, 1.0)):
    """A map over patches (rows, columns) -> over the pixels of a picture of `size` (width, height): (height, width)

    Each patch is a rectangle of the region; its value stands at its centre, with a bicubic curve through them, which
    can swing a little above and below. Outside the region, which the model has not seen, NaN.
    """
    left, top, right, bottom = (round(edge * length) for edge, length in zip(region, [*size, *size]))
    patch = Image.fromarray(np.asarray(values, np.float32))
    pixels = np.full(size[::-1], np.nan, np.float32)
    pixels[top:bottom, left:right] = patch.resize((right - left, bottom - top), Image.Resampling.BICUBIC)
    return pixels


def peak(pixels):
    """Where a map over pixels is largest: x, y"""
    y, x = np.unravel_index(np.nanargmax(pixels), pixels.shape)
    return int(x), int(y)
