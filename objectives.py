"""The captioner's training objectives: cross-entropy of captions, with or without pictures, and rewards of captions that it samples.

An objective is called with a batch that is split into pieces. It accumulates the gradients of its mean over the whole batch, whatever the
number of processes and pieces, and returns that mean.

Shapes: B images, K captions of each, N patches, D the encoder's width, T text tokens.
"""

from functools import cached_property, partial

import numpy as np
import torch
import torch.nn.functional as F

from chair import kinds_named
from cider import CiderScorer
from concepts import Concepts, embed_texts
from dataset import IGNORE, clean_captions, collate, count_targets
from devices import at_once, autocast
from generation import GenerationConfig
from tokenizer import END_OF_TEXT

TEMPERATURE = 0.5  # of the policy that samples captions: at 1, a model that was trained with label smoothing samples poor ones
SEEN = 1000  # training pictures that are looked at before training; enough for means, and it takes a few seconds


class Objective:
    """What the objectives share.

    Args:
        model: a Captioner.
        processes: Processes, each with its part of a batch.
        dtype: of autocast, as pick_precision gives it.
        backward: function that computes the gradients of a loss and returns its value.
    """

    def __init__(self, model, processes, dtype, backward):
        self.model, self.processes, self.dtype, self.backward, self.device = model, processes, dtype, backward, processes.device

    def autocast(self):
        return autocast(self.device, self.dtype)

    def see(self, features, embeddings):
        """Move features, and embeddings or None, to the device; return both and the captioner's Concepts."""
        features, embeddings = features.to(self.device).float(), None if embeddings is None else embeddings.to(self.device)
        return features, embeddings, self.model.concepts(features, embeddings)


class CrossEntropy(Objective):
    """Cross-entropy of pictures' captions, averaged over all their target tokens.

    Args:
        rows: for each image, the tokens of its captions.
    """

    def __init__(self, *shared, rows, label_smoothing):
        super().__init__(*shared)
        self.targets, self.label_smoothing = count_targets(rows, self.model.token_ids), label_smoothing

    def __call__(self, indices, pieces, seed):
        total = sum(self.targets[i] for i in indices)
        value = 0.0
        for _, features, embeddings, tokens, targets in pieces:
            with self.autocast():
                features, _, concepts = self.see(features, embeddings)
                loss = self.model.loss(features, tokens.to(self.device), targets.to(self.device), self.label_smoothing,
                                       reduction="sum", concepts=concepts) / total
            value += self.backward(loss)
        return self.processes.add(value)


class TextCrossEntropy(Objective):
    """Cross-entropy of captions without pictures, given concepts and a meaning such as a picture might have.

    Args:
        text: TextData. `look_around` must be called before there are batches.
        weight: of this loss.
    """

    def __init__(self, *shared, text, label_smoothing, weight):
        super().__init__(*shared)
        self.text, self.label_smoothing, self.weight = text, label_smoothing, weight
        self.targets = count_targets([[row] for row in text.rows], self.model.token_ids)

    def look(self, features, numbers, of_images=None, of_texts=None):
        """Learn from some pictures what concepts look like, and how a picture's meaning depends on its caption's (a regression through the
        origin). Called by `look_around`.

        Args:
            features: of all training images; numbers: which of them to look at.
            of_images, of_texts: embeddings of these, and of a caption of each (n, width); None: a model without meanings.
        """
        residuals = None
        if of_images is not None:
            meanings, explaining = self.model.meaning(of_images, 0), self.model.meaning(of_texts, 1)
            self.slope = (meanings * explaining).sum(-1).mean()
            residuals = (meanings - self.slope * explaining).cpu()
        batch_size = at_once(8 * self.model.encoder.num_tokens * self.model.encoder.dim, 100)
        seen = [self.model.source.recognise(features[part, np.zeros_like(part)].float().to(self.device), self.model.config.concepts)
                for part in np.array_split(numbers, -(-len(numbers) // batch_size))]
        concepts, probabilities, _ = zip(*seen)
        self.text.look(self.model.source, Concepts(torch.cat(concepts).cpu(), torch.cat(probabilities).cpu(), residuals))

    def local_batch(self, numbers, random):
        """This process's part of a batch of captions, and the number of target tokens of the whole batch. `random`: a numpy Generator."""
        tokens, targets, concepts = self.text.batch(numbers, random)
        total = sum(self.targets[i] for i in numbers)
        mine = slice(self.processes.number, None, self.processes.count)
        return tokens[mine], targets[mine], concepts.each(lambda part: part[mine]), [self.text.captions[i] for i in numbers[mine]], total

    def __call__(self, tokens, targets, concepts, captions, total):
        if len(tokens):
            with self.autocast():
                concepts = concepts.each(lambda part: part.to(self.device))
                concepts = concepts._replace(meaning=self.meanings(captions, concepts.meaning))
                loss = self.model.loss(None, tokens.to(self.device), targets.to(self.device), self.label_smoothing,
                                       reduction="sum", concepts=concepts)
            self.backward(loss * self.weight / total)

    @torch.no_grad()
    def meanings(self, captions, residuals):
        """Meanings that pictures of these captions might have (B, width): predicted from the captions, plus other pictures' residuals.
        None for a model without meanings."""
        if not self.model.config.meaning:
            return None
        return F.normalize(self.slope * self.model.meaning(self.model.judge.embed_texts(captions), 1) + residuals, dim=-1)


@torch.no_grad()
def look_around(model, data, images, seed, text_cross_entropy=None):
    """Before training, look at some training pictures: centre meanings on their means, and prepare captions without pictures.

    Args:
        data, images: CaptionData and its CaptionedImages.
        text_cross_entropy: TextCrossEntropy; None: there are no captions without pictures.
    """
    some = np.sort(np.random.default_rng(seed).permutation(len(images))[:SEEN])
    embeddings = ()
    if model.config.meaning:
        captions, device = [clean_captions(images[i])[0] for i in some], model.token_ids.device
        embeddings = data.embeddings[some, 0].to(device), embed_texts(model.judge, captions).to(device)
        if not model.centres.any():  # otherwise they came with the checkpoint that training starts from
            model.centre(*embeddings)
    if text_cross_entropy:
        text_cross_entropy.look(data.features, some, *embeddings)


class SelfCritical(Objective):
    """Self-critical sequence training (Rennie et al. 2017, arXiv:1612.00563): REINFORCE on captions that the model samples.

    Args:
        reward: a Reward. samples: captions sampled per image.
        generating: context manager in which the decoder is ready to generate.
    """

    def __init__(self, *shared, reward, samples, generating):
        super().__init__(*shared)
        self.reward, self.samples, self.generating = reward, samples, generating

    def __call__(self, indices, pieces, seed):
        samples, drawn = self.samples, []
        self.model.eval()  # before LoRA is merged, which switching modes would undo
        with self.autocast(), self.generating():
            for piece, features, embeddings, *_ in pieces:
                # An image's samples depend on its place in the batch only, not on the process.
                numbers = [samples * indices.index(i) + k for i in piece or indices[:1] for k in range(samples)]
                features, embeddings, concepts = self.see(features, embeddings)
                reward = partial(self.reward, np.repeat(piece or indices[:1], samples), embeddings)
                drawn.append((features, concepts, *draw(self.model, features, reward, samples, TEMPERATURE, seed, numbers, concepts=concepts)))
        self.model.train()
        drawn = [(features, concepts, tokens, targets, advantages * bool(piece[0]), rewards * bool(piece[0]))
                 for piece, (features, concepts, tokens, targets, advantages, rewards) in zip(pieces, drawn)]
        count = sum((targets != IGNORE).sum().item() * bool(piece[0]) for piece, (*_, targets, _, _) in zip(pieces, drawn))
        total, reward = self.processes.add(count, sum(rewards.sum().item() for *_, rewards in drawn))
        for features, concepts, tokens, targets, advantages, _ in drawn:
            with self.autocast():
                loss = self.model.loss(features, tokens, targets, weights=advantages, temperature=TEMPERATURE, reduction="sum",
                                       concepts=concepts) / total
            self.backward(loss)
        return reward / (len(indices) * samples)


def draw(model, features, reward, samples, temperature=1.0, seed=0, numbers=None, max_length=24, concepts=None):
    """Sample captions, and compute how much better each is than the others of its image.

    `Captioner.loss` of them, with the advantages as weights, is REINFORCE. The baseline of a caption's reward is the mean
    over the image's other samples (Luo 2020, arXiv:2003.09971), so that no greedy caption is needed.

    Args:
        features, concepts: as of `Captioner.image_tokens`.
        reward: function from B * samples captions, an image's adjacent, and whether each ended before max_length, to
            as many numbers.
        samples: captions per image, at least 2.
        temperature: of the policy.
        seed, numbers: of the sampling, and of each caption; default: 0, 1, ….
    Returns tokens and targets (B * samples, T), advantages and rewards (B * samples).
    """
    generation = GenerationConfig(sample=True, temperature=temperature, max_length=max_length, seed=seed)
    training = model.training
    model.eval()  # captions are sampled without dropout; the loss has it
    with torch.inference_mode():
        rows = model.sample(model.image_tokens(features, concepts), generation,
                            range(samples * len(features)) if numbers is None else numbers)
    model.train(training)
    torch.clear_autocast_cache()  # its casts were made without gradients
    ended = [len(row) < max_length for row in rows]
    rewards = torch.as_tensor(reward([model.text(row) for row in rows], ended)).to("cpu", torch.float32).view(-1, samples)
    others = (rewards.sum(1, keepdim=True) - rewards) / (samples - 1)
    tokens, targets = collate(rows)
    targets[[not row for row in rows], 0] = END_OF_TEXT  # an empty caption, whose end was sampled at once; collate takes an empty row for no caption
    targets[:, max_length:] = IGNORE  # a caption that was cut there has no end
    return *(x.to(features.device) for x in (tokens, targets, (rewards - others).flatten())), rewards.flatten()


class Reward:
    """The reward of captions: CIDEr, plus their cosine with the image in our CLIP's space (Cho et al. 2022, arXiv:2205.13115), minus a
    penalty for objects that are not there.

    Args:
        images: CaptionedImages, whose captions are the references.
        model: the Captioner, whose `judge` is our CLIP. samples: captions per image, adjacent.
        clip: weight of the cosine; 0: embeddings are not needed.
        chair: penalty for each object of COCO's 80 kinds that a caption mentions and no reference does.
    """

    def __init__(self, images, model, samples, clip=0.0, chair=0.0):
        self.images, self.model, self.samples, self.clip, self.chair = images, model, samples, clip, chair

    def __call__(self, images, embeddings, captions, ended):
        """Image numbers and captions (n), and whether each caption ended -> rewards (n,). `embeddings`: one for each image."""
        rewards = torch.from_numpy(self.scorer.score(images, captions, ended))
        if self.clip:
            seen = F.normalize(embeddings, dim=-1).repeat_interleave(self.samples, 0)
            rewards += self.clip * (seen * F.normalize(self.model.judge.embed_texts(captions), dim=-1)).sum(-1).cpu()
        if self.chair:
            made_up = [len({*kinds_named(caption)} - self.kinds[image]) for image, caption in zip(images, captions)]
            rewards -= self.chair * torch.tensor(made_up)
        return rewards

    @cached_property
    def scorer(self):
        """Scores CIDEr; built when first needed."""
        return CiderScorer([image.captions for image in self.images], end="<end>")

    @cached_property
    def kinds(self):
        """The kinds of objects that each image's references mention: a list of sets."""
        return [{kind for caption in image.captions for kind in kinds_named(caption)} for image in self.images]
