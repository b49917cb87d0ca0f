"""Text generation: greedy and beam search, and sampling, batched over images with a key/value cache.

Shapes: B images, K beams of each, N image tokens, R = B * K rows, T text tokens, V scored tokens.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from cli import UserError, check_settings, option
from decoder import BeamCache, Cache

LEAVE = 0.75  # finished images are removed once at most this fraction of the batch is unfinished, since removal copies the others' context


@dataclass
class GenerationConfig:
    """Generation settings: sampling with `sample`, otherwise beam search, which is greedy with beam_size 1."""

    beam_size: int = option(3, "1: greedy")
    length_penalty: float = option(0.0, "a hypothesis of n tokens scores log p / n ** this")
    clip_weight: float = option(0.0, "weight of our CLIP's image-text cosine, added to that score")
    max_length: int = option(40, "tokens, including the final <|endoftext|>")
    sample: bool = option(False, "sample instead of beam search")
    temperature: float = 1.0
    top_k: int = option(0, "0: all")
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self):
        check_settings(self, ("beam_size", "max_length"), signed=("length_penalty", "clip_weight"))
        if self.temperature <= 0 or not 0 < self.top_p <= 1:
            raise UserError("temperature must be above 0 and top_p in (0, 1]")
        if self.sample and self.clip_weight:
            raise UserError("clip_weight chooses among beams: it goes without sample")


def best_of(scores, cosines, clip_weight):
    """The index of an image's best hypothesis, by score plus weighted cosine."""
    totals = [score + clip_weight * cosine for score, cosine in zip(scores, cosines)]
    return totals.index(max(totals))


class TextGenerator:
    """Generation, for a module with a `decoder`, `token_ids` (V,) that may be generated, and `end`, the index of <|endoftext|> in
    them."""

    def next_logits(self, tokens, context, cache, head):
        """One step: tokens (R, 1), or (B, K) with a BeamCache, that follow those in the cache -> logits (R, 1, V) or (B, K, V), in fp32."""
        return F.linear(self.decoder.hidden(tokens, context, cache), head).float()

    def beam_search(self, image, generation):
        """Image tokens (B, N, C) -> B lists of token ids, without <|endoftext|>: the best hypothesis of each."""
        return [found[0][1] for found in self.hypotheses(image, generation)]

    def hypotheses(self, image, generation):
        """Image tokens (B, N, C) -> the hypotheses of beam search for each image, best first: B lists of (score, token ids).

        Each image has K active beams. Of each step's 2K best continuations, those among the first K that end become
        finished hypotheses, and the K best that do not end remain active. An image is done when K hypotheses have finished
        (first come, first served: Kasai et al. 2022, arXiv:2204.05424), or at max_length, where its best active beam is
        added unfinished.
        """
        K, alpha, max_length = generation.beam_size, generation.length_penalty, generation.max_length
        max_length = min(max_length, self.decoder.config.n_positions)
        device, images = image.device, len(image)
        end = self.end
        head = self.decoder.head_weight(self.token_ids)
        context = self.decoder.context(image)
        cache = BeamCache(images, K, max_length, device)

        active = torch.arange(images, device=device)  # the image in each slot of the batch
        scores = torch.zeros(images, 1, device=device)  # initially one beam; all are -inf once a slot's image is done
        tokens = torch.full((images, 1, max_length + 1), end, device=device)  # indices into token_ids
        finished = torch.zeros(images, dtype=torch.long, device=device)  # number of hypotheses of each slot
        # Each image's hypotheses in the order of finishing: fewer than K before a step, which adds up to K.
        found_scores = torch.full((images, 2 * K), -torch.inf, device=device)
        found = torch.full((images, 2 * K, max_length + 1), end, device=device)

        for length in range(1, max_length + 1):
            logits = self.next_logits(self.token_ids[tokens[:, :, length - 1]], context, cache, head)  # (B, K, V)
            best, token = logits.topk(min(2 * K, logits.shape[-1]))  # per beam; others cannot be among the image's 2K best
            scores = scores[:, :, None] + (best - logits.logsumexp(-1, keepdim=True))
            scores, flat = scores.flatten(1).topk(min(2 * K, scores[0].numel()))  # (B, 2K)
            beam, token = flat // best.shape[-1], token.flatten(1).gather(1, flat)
            ends = token == end

            # Continuations that end.
            ended = scores.masked_fill(~ends, -torch.inf)[:, :K] / length**alpha
            ending = ended > -torch.inf
            slot, which = ending.nonzero(as_tuple=True)
            if len(slot):
                place = active[slot], (finished[:, None] + ending.cumsum(1) - 1)[slot, which]
                found_scores[place] = ended[slot, which]
                found[place] = tokens[slot, beam[slot, which]]
            finished += ending.sum(1)

            # Continuations that do not.
            scores, pick = scores.masked_fill(ends, -torch.inf).topk(min(K, scores.shape[1]))
            beam, token = beam.gather(1, pick), token.gather(1, pick)
            if beam.shape[1] < K:  # fewer continuations than beams, with a tiny vocabulary: pad with dead beams
                pad = (0, K - beam.shape[1])
                scores, beam, token = F.pad(scores, pad, value=-torch.inf), F.pad(beam, pad), F.pad(token, pad)
            tokens = tokens.gather(1, beam[:, :, None].expand(-1, -1, max_length + 1))
            tokens[:, :, length] = token
            done = (finished >= K) | (scores[:, 0] == -torch.inf)
            scores = scores.masked_fill(done[:, None], -torch.inf)
            going = (~done).nonzero().squeeze(1)
            if not len(going):
                break
            leave = len(going) <= LEAVE * len(active)
            if leave:
                context = [layer.select(going) for layer in context]
                active, finished, scores, tokens, beam = (part[going] for part in (active, finished, scores, tokens, beam))
            cache.select(beam, going if leave else None)
        else:
            going = (scores[:, 0] > -torch.inf).nonzero().squeeze(1)
            place = active[going], finished[going]
            found_scores[place] = scores[going, 0] / max_length**alpha
            found[place] = tokens[going, 0]

        order = found_scores.argsort(dim=1, descending=True, stable=True)
        hypotheses = [[(score[i], self.until_end(rows[i][1:])) for i in best if score[i] > -torch.inf]
                      for best, score, rows in zip(order.tolist(), found_scores.tolist(), found.tolist())]
        if not all(hypotheses):
            raise UserError("the model's probabilities are not numbers: its weights, or the encoder's, are damaged")
        return hypotheses

    def until_end(self, places):
        places = places[:places.index(self.end)] if self.end in places else places
        return self.token_ids[places].tolist()

    def sample(self, image, generation, seeds=None):
        """Image tokens (B, N, C) -> a list of token ids for each seed (default: one per image), with temperature, top-k and top-p.

        Top-p is nucleus sampling (Holtzman et al. 2020, arXiv:1904.09751). A token is sampled as the largest of log p + Gumbel
        noise, with separate noise for each image, so that a caption depends neither on the rest of the batch nor on the last bit of p.
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
            logits = self.next_logits(self.token_ids[tokens[:, length - 1:length]], context, cache, head)[:, -1]
            log_probs = (logits / generation.temperature).log_softmax(-1)
            if generation.top_k or generation.top_p < 1:
                likely = log_probs.sort(-1, descending=True).values
                if generation.top_k:
                    likely = likely[:, :generation.top_k]
                probs = likely.softmax(-1)
                # Keep tokens while those more likely sum to less than top_p, so that the one that crosses top_p is included.
                kept = (probs.cumsum(-1) - probs < generation.top_p).sum(-1, keepdim=True)
                log_probs = log_probs.masked_fill(log_probs < likely.gather(1, kept - 1), -torch.inf)
            noise = np.stack([rng.standard_exponential(len(head), dtype=np.float32) for rng in random])
            choice = (log_probs - torch.from_numpy(noise).to(image.device).log()).argmax(-1)
            tokens[:, length] = choice.masked_fill(ended, self.end)
            ended |= tokens[:, length] == self.end
            if ended.all():
                break
        return [self.until_end(row) for row in tokens[:, 1:].tolist()]
