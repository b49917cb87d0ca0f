"""Training batches of a LLaVA: rows of samples about one picture each, as tensors.

All questions about one picture go through the model in one row: the picture's tokens once, then a branch for each question with
its answer, which attends to the picture and to itself but to no other branch.

Shapes: B rows, N image tokens of each, T positions of a row, D the vision tower's width.
"""

import numpy as np
import torch

from cli import UserError
from dataset import IGNORE, clean_captions
from encoder import load_encoder
from features import FeatureCache, make_view
from images import load_picture
from llava_training import is_encoder, query_form
from runtime import pick_runtime

COMMON_TOKENS = 8192  # the first tokens of a vocabulary, where BPE and SentencePiece have the most frequent ones


class Rows:
    """Makes tensors from rows, which are lists of Samples about one picture.

    Args:
        model, processor: of `build`. images: CaptionedImages, to whose numbers samples refer.
        settings: of p4_align.py: the maximum length of answers, and their weight.
        features: FeatureCache of the images; None: pictures are read and encoded in every step.
    """

    def __init__(self, model, processor, images, settings, features=None):
        self.processor, self.images, self.settings, self.features = processor, images, settings, features
        self.image_tokens, self.vocabulary_size = model.config.image_seq_length, model.lm_head.weight.shape[0]
        self.before, self.after = query_form(processor.tokenizer, model.config.text_config.model_type)

    def text(self, sample):
        """The text before the answer; the processor expands the image token to as many as there are patches."""
        return f"{self.before}{self.processor.image_token}{' ' + sample.query if sample.query else ''}{self.after}"

    def collate(self, rows, view=0):
        """Rows of samples, and the views of their pictures -> pixel_values, and tensors (B, T), padded on the right: input_ids, labels,
        position_ids and branches (0 for the part with the picture, then 1, 2, … for the samples, -1 after the end), and weights
        of the labels. Raises UserError."""
        tokenizer, token = self.processor.tokenizer, self.processor.image_token
        asked = tokenizer([self.text(row[0]).replace(token, token * self.image_tokens) for row in rows])
        columns = {"input_ids": [], "labels": [], "position_ids": [], "branches": [], "weights": []}
        for ids, row in zip(asked["input_ids"], rows):
            for name, values in self.columns(ids, row).items():
                columns[name].append(values)
        longest = max(map(len, columns["labels"]))
        padding = {"input_ids": tokenizer.pad_token_id, "labels": IGNORE, "position_ids": 0, "branches": -1, "weights": 0.0}
        return {name: torch.tensor([values + [padding[name]] * (longest - len(values)) for values in column])
                for name, column in columns.items()} | {"pixel_values": self.see([row[0].image for row in rows], view)}

    def columns(self, asked, row):
        """A row's input_ids, labels, position_ids, branches and weights; `asked`: the ids of its first question, with the picture's."""
        tokenizer, token = self.processor.tokenizer, self.processor.image_token_id
        shared = len(asked) - asked[::-1].index(token)  # up to the last image token
        found = {"input_ids": asked[:shared], "labels": [IGNORE] * shared, "position_ids": [*range(shared)],
                 "branches": [0] * shared, "weights": [0.0] * shared}
        for number, sample in enumerate(row, 1):
            query = tokenizer(self.text(sample))["input_ids"]
            query = query[query.index(token) + 1:]
            answer = tokenizer(sample.answer, add_special_tokens=False)["input_ids"][:self.settings.max_tokens]
            answer = [*answer, tokenizer.eos_token_id]
            length = len(query) + len(answer)
            found["input_ids"] += query + answer
            found["labels"] += [IGNORE] * len(query) + answer
            found["position_ids"] += range(shared, shared + length)
            found["branches"] += [number] * length
            found["weights"] += [0.0] * len(query) + [1.0 / len(answer) if self.settings.weigh == "answers" else 1.0] * len(answer)
        return found

    def see(self, numbers, view=0):
        """The vision tower's input for these views of some images: pixels (B, 3, S, S), or cached features (B, N, D). Raises UserError."""
        views = np.broadcast_to(view, len(numbers))
        if self.features is not None:
            return self.features[numbers, views].float()
        return self.pixels([make_view(self.picture(number), view, number) for number, view in zip(numbers, views)])

    def picture(self, number):
        """An image, decoded at a sufficient size for the processor. Raises UserError."""
        return load_picture(self.images[number].path, self.processor.image_processor.size["height"])

    def pixels(self, pictures):
        """RGB PIL images -> pixels, as the processor gives them (B, 3, S, S)"""
        return torch.as_tensor(np.stack([np.asarray(picture) for picture in self.processor.image_processor(pictures)["pixel_values"]]))

    def vocabulary(self, groups, device):
        """Sorted ids of the tokens that occur in answers, the end of text and the commonest of all; and the ids of all others.

        `groups`: {kind: samples}, in addition to captions.
        """
        tokenizer, total = self.processor.tokenizer, self.vocabulary_size
        answers = [text for image in self.images for text in clean_captions(image)]
        answers += [sample.answer for samples in groups.values() for sample in samples]
        found = {token for row in tokenizer(answers, add_special_tokens=False)["input_ids"] for token in row}
        likely = torch.tensor(sorted(found | {tokenizer.eos_token_id} | {*range(min(COMMON_TOKENS, total))}))
        others = torch.ones(total, dtype=torch.bool)
        others[likely] = False
        return likely.to(device), others.nonzero().squeeze(1)


def cached_features(model, name, images, settings, device, stop=False):
    """The features of all images in --cache, computed if they are missing, by the tower's own encoder, or on a CPU through OpenVINO.
    `stop`: as of FeatureCache. Raises UserError if the vision model, called `name`, is not a frozen encoder."""
    tower, runtime = model.model.vision_tower, pick_runtime("auto", device)
    if not is_encoder(tower):
        raise UserError(f"--cache is for encoders that are named, such as tf_efficientnet_lite2, and {name} is none")
    encoder = tower.encoder if runtime == "torch" else load_encoder(name, settings.image_size or None, runtime=runtime)
    return FeatureCache(encoder, [image.path for image in images], settings.cache, settings.views, device=device, stop=stop)
