"""Initialise a projection so that its image tokens resemble the embeddings of the captions' words.

Through a language model's loss, a random projection needs thousands of the model's forward passes to reach its word embeddings. This
loss needs none: by their cosines with word embeddings, a picture's tokens predict the words of its captions, and each word needs only
some tokens that show it (multiple instance learning, as Fang et al. 2015, arXiv:1411.4952, learn words of regions from captions).
"""

import re
from collections import Counter

import torch
import torch.nn.functional as F

from attention import STOP_WORDS
from dataset import clean_captions

LEAST = 3  # fewest occurrences of a word
SCALE = 25.0  # factor from cosines between image tokens and words to logits


class WordTargets:
    """The words of pictures' captions as tokens of a language model, and a loss that makes image tokens similar to them.

    Args:
        images: CaptionedImages. tokenizer: of the language model. embedding: its input embedding.
    """

    def __init__(self, images, tokenizer, embedding):
        rows = [[word for text in clean_captions(image) for word in re.findall(r"[a-z]+", text.lower()) if word not in STOP_WORDS]
                for image in images]
        known = {}
        for word in {word for row in rows for word in row}:  # with a leading space, as within a text
            known[word] = tokenizer(f" {word}", add_special_tokens=False)["input_ids"]
        counts = [Counter(token for word in row for token in known[word]) for row in rows]
        total = sum(counts, Counter())
        chosen = sorted(token for token, count in total.items() if count >= LEAST)
        self.places = {token: place for place, token in enumerate(chosen)}
        self.counts, self.tokens = counts, torch.tensor(chosen, dtype=torch.long)
        self.bias = torch.tensor([total[token] for token in chosen], dtype=torch.float32).log()
        with torch.no_grad():
            words = embedding(self.tokens.to(embedding.weight.device)).float()
        self.norm, self.words = words.norm(dim=-1).mean().item(), F.normalize(words, dim=-1)

    def __len__(self):
        return len(self.tokens)

    def shares(self, numbers):
        """Each word's share of the words in a picture's captions, for some pictures: (B, words); rows of zeros if there are none."""
        found = torch.zeros(len(numbers), len(self))
        for row, number in zip(found, numbers):
            for token, count in self.counts[number].items():
                if token in self.places:
                    row[self.places[token]] = count
        return found / found.sum(1, keepdim=True).clamp(min=1)

    def loss(self, tokens, shares):
        """Image tokens (B, N, C) and `shares` (B, words) -> the cross-entropy of the pictures' words, summed over pictures.

        A word's probability is the mean over the N tokens. A bias gives the words' frequencies, which need not be learned.
        """
        logits = F.normalize(tokens.float(), dim=-1) @ self.words.to(tokens.device).t() * SCALE + self.bias.to(tokens.device)
        mean = logits.log_softmax(-1).logsumexp(1) - torch.tensor(float(tokens.shape[1])).log()
        return -(mean * shares).sum()
