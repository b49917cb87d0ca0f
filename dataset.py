"""Captions: COCO-format files, folders in the course's layout, token batches, and training data."""

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path, PurePath

import numpy as np
import torch

from cli import UserError
from files import fingerprints, is_file, read_json, read_lines, write_json
from tokenizer import END_OF_TEXT

IGNORE = -100  # the target that cross_entropy ignores


# ---- captions --------------------------------------------------------------------------------------------------


@dataclass
class CaptionedImage:
    path: Path
    captions: list


def clean_caption(text):
    """Normalise the style of a caption: single spaces, none before punctuation, a capital first, a full stop last.

    Metrics ignore all of this, and a model that does not have to predict the style does not split probability, or beams,
    between variants of the same caption.
    """
    text = re.sub(r"\s+([.,;:!?]+(?!\S)|['’](?:s|re|ve|ll|d|m|t)\b|['’](?!\S))", r"\1", " ".join(text.split())).rstrip(" .,;:")
    return text[:1].upper() + text[1:] + ("" if text.endswith(("!", "?")) else ".") if text else ""


def clean_captions(image):
    """The captions of a CaptionedImage in that style, without empty ones."""
    return [text for text in map(clean_caption, image.captions) if text]


def read_captions(annotation_file, images_root):
    """Read COCO-format captions: a list of CaptionedImage in the file's order, captions unchanged.

    `images_root` None: only the captions are needed, and image files are not checked.
    Raises UserError for a file of another format, duplicate ids, a caption of an unlisted image, or a
    missing image file.
    """
    data = read_json(annotation_file, "captions file")
    root = Path(images_root or ".")
    if not root.is_dir():
        raise UserError(f"the image folder {root} does not exist")
    try:
        items, names = {}, set()
        for image in data["images"]:
            name = image["file_name"]
            if PurePath(name).is_absolute() or ".." in PurePath(name).parts:
                raise UserError(f"{annotation_file} names {name!r}, which leads out of the folder of images")
            if image["id"] in items:
                raise UserError(f"{annotation_file} has two images with the id {image['id']!r}: it is unclear which one a caption belongs to")
            if name in names:
                raise UserError(f"{annotation_file} has two images with the file name {name!r}: it is unclear which one a caption belongs to")
            names.add(name)
            items[image["id"]] = CaptionedImage(root / image["file_name"], [])
        ids = set()
        for annotation in data["annotations"]:
            if "id" in annotation and annotation["id"] in ids:
                raise UserError(f"{annotation_file} has two captions with the id {annotation['id']!r}: were files joined?")
            ids.add(annotation.get("id"))
            if not isinstance(annotation["caption"], str):
                raise TypeError(f"caption {annotation['caption']!r} is not a string")
            items[annotation["image_id"]].captions.append(annotation["caption"])
    except (LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{annotation_file} is not in COCO's caption form (images: id, file_name; "
                        f"annotations: image_id, caption): {type(error).__name__} {error}") from None
    missing = [item.path for item in items.values() if images_root and not is_file(item.path)]
    if missing:
        raise UserError(f"{len(missing)} images of {annotation_file} are not in {root}, the first is {missing[0].name}")
    return list(items.values())


class Folder:
    """A folder in the course's layout: its images that have captions, the last of which may be held out.

    Attributes: `path`; `images`, CaptionedImages in the file's order; `train`, how many of them, from the first on, are for training;
    `without_captions`, the number of images left out because they have none.
    """

    def __init__(self, path, selection=0):
        """Hold out the last `selection` images. Raises UserError if none are left to train on."""
        self.path = Path(path)
        images = read_captions(self.path / "train.json", self.path / "images" / "train")
        self.images = [image for image in images if clean_captions(image)]
        self.without_captions = len(images) - len(self.images)
        self.train = len(self.images) - selection
        if not 0 < self.train <= len(self.images):
            raise UserError(f"{len(self.images)} images of {path} cannot be split into training and {selection} for selection")

    def paths(self):
        return [image.path for image in self.images]


def read_folders(paths, selection):
    """A Folder for each path. `selection`: how many images each holds out, one number for all or one per folder. Raises UserError if
    there are others."""
    if not paths or len(selection) not in (1, len(paths)):
        raise UserError("--selection is one number for every folder of --data, or one for each")
    return [Folder(path, count) for path, count in zip(paths, selection * (len(paths) if len(selection) == 1 else 1))]


class Mixture:
    """Images of several folders: those to train on, those to select on, and how many of each make an epoch.

    Attributes: `images`, `selection`, lists of CaptionedImage, folder by folder; `size`, images per epoch.

    Args:
        paths: of the folders. selection: images to hold out at the end of each: one number, or one per folder.
        weights: how often an epoch uses each folder's images; empty: once.
    """

    def __init__(self, paths, selection=(0,), weights=()):
        self.folders = read_folders(paths, selection)
        self.images = [image for folder in self.folders for image in folder.images[:folder.train]]
        self.selection = [image for folder in self.folders for image in folder.images[folder.train:]]
        self.without_captions = sum(folder.without_captions for folder in self.folders)
        ends = np.cumsum([folder.train for folder in self.folders]).tolist()
        self.numbers = [range(end - folder.train, end) for end, folder in zip(ends, self.folders)]
        self.shown = [max(1, round(weight * folder.train)) for weight, folder in zip(weights or [1.0] * len(ends), self.folders)]
        self.size = sum(self.shown)

    def sample_epoch(self, generator):
        """The image numbers of an epoch: each folder's as often as its weight says, a fraction as a random subset."""
        drawn = []
        for count, numbers in zip(self.shown, self.numbers):
            whole, rest = divmod(count, len(numbers))
            drawn += [*numbers] * whole
            if rest:
                drawn += [numbers[i] for i in torch.randperm(len(numbers), generator=generator)[:rest].tolist()]
        return drawn

    def left_out(self):
        """Lines about images that are left out."""
        return [f"{self.without_captions} images have no caption and are left out"] * bool(self.without_captions)

    def places(self):
        """(folder, number within it) of the training images, and of the selection images."""
        return ([(number, i) for number, folder in enumerate(self.folders) for i in range(folder.train)],
                [(number, i) for number, folder in enumerate(self.folders) for i in range(folder.train, len(folder.images))])


def write_subset(data, folder, count):
    """Write a folder in the course's layout with only the first images of another's train.json."""
    data, folder = Path(data), Path(folder)
    images = folder / "images" / "train"
    images.parent.mkdir(parents=True, exist_ok=True)
    if images.resolve() != (data / "images" / "train").resolve():
        images.unlink(missing_ok=True)
        images.symlink_to((data / "images" / "train").resolve(), target_is_directory=True)
    coco = read_json(data / "train.json", "captions file")
    kept = coco["images"][:count]
    ids = {image["id"] for image in kept}
    write_json(folder / "train.json", {
        "images": kept, "annotations": [item for item in coco["annotations"] if item["image_id"] in ids]})


def collate(captions):
    """Token lists -> input and target (R, T), laid out for next-token prediction.

    [g1 … gN] becomes input [50256, g1 … gN, 50256 …] and target [g1 … gN, 50256, -100 …]. An empty list
    means no caption: its targets are all -100.
    """
    length = max(len(tokens) for tokens in captions) + 1
    inputs = torch.full((len(captions), length), END_OF_TEXT)
    targets = torch.full((len(captions), length), IGNORE)
    for row, tokens in enumerate(captions):
        if tokens:
            inputs[row, 1:len(tokens) + 1] = torch.tensor(tokens)
            targets[row, :len(tokens) + 1] = torch.tensor([*tokens, END_OF_TEXT])
    return inputs, targets


def bucketed_batches(lengths, batch_size, generator):
    """Shuffled batches of indices of similar lengths, so that there is little padding.

    Sorting by length only within random pools of 20 batches keeps batches random enough.
    """
    order = torch.randperm(len(lengths), generator=generator).tolist()
    batches = []
    for start in range(0, len(order), 20 * batch_size):
        pool = sorted(order[start:start + 20 * batch_size], key=lambda i: lengths[i])
        batches += [pool[i:i + batch_size] for i in range(0, len(pool), batch_size)]
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def data_digest(images):
    """sha256 over CaptionedImages in order: file names, captions and fingerprints of the files."""
    found = [[*of_file, image.captions] for of_file, image in zip(fingerprints([image.path for image in images]), images)]
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()


def load_references(annotation_file, images_root=None):
    """COCO-format captions as {file name without its last extension: CaptionedImage}, in the file's order of images."""
    references = {}
    for image in read_captions(annotation_file, images_root):
        if image.path.stem in references:
            raise UserError(f"{annotation_file} has two images called {image.path.stem!r}: it is unclear which one a prediction belongs to")
        if not image.captions:
            raise UserError(f"{annotation_file} has no caption for {image.path.name}")
        references[image.path.stem] = image
    if not references:
        raise UserError(f"{annotation_file} lists no images")
    return references


# ---- training data ----------------------------------------------------------------------------------


class CaptionData:
    """Tokens of every image's captions, with the images' cached features and, if needed, their embeddings by a CLIP that was not
    trained on them (images, views, width)."""

    def __init__(self, images, tokenizer, max_tokens, features=None, embeddings=None):
        self.features, self.embeddings, self.max_tokens = features, embeddings, max_tokens
        self.rows = []  # for each image, its captions' tokens
        self.cut = self.empty = 0  # captions that are too long, or empty
        for image in images:
            rows = tokenizer.encode_batch(clean_captions(image))
            self.empty += len(image.captions) - len(rows)
            self.cut += sum(len(row) > max_tokens for row in rows)
            self.rows.append([row[:max_tokens] for row in rows])
        self.captions = max(map(len, self.rows), default=0)  # K; images with fewer get empty rows
        self.lengths = [max(map(len, rows), default=0) for rows in self.rows]

    def left_out(self):
        """Lines about captions that are left out, or truncated."""
        return ([f"{self.empty} captions are empty and left out"] * bool(self.empty)
                + [f"{self.cut} captions are longer than {self.max_tokens} tokens and cut there"] * bool(self.cut))

    def batch(self, indices, views):
        """Image numbers and a view of each -> features (B, N, D), embeddings (B, width) or None, tokens and targets (B * K, T)"""
        rows = [row for i in indices for row in self.rows[i] + [[]] * (self.captions - len(self.rows[i]))]
        embeddings = None if self.embeddings is None else self.embeddings[list(indices), list(views)]
        return self.features[np.array(indices), np.array(views)], embeddings, *collate(rows)


class TextData:
    """Captions without pictures, and concepts such as might be recognised in pictures of them.

    Attributes: `rows`, the tokens of each caption. `look` must be called before `batch`.
    """

    def __init__(self, files, tokenizer, max_tokens, words, without=()):
        """The distinct captions of these files, except those of the CaptionedImages `without`. Raises UserError."""
        self.words = words
        known = {clean_caption(line).lower(): clean_caption(line) for file in files for line in read_lines(file)}
        for caption in (caption for image in without for caption in clean_captions(image)):
            known.pop(caption.lower(), None)
        known.pop("", None)
        if not known:
            raise UserError(f"{', '.join(files)}: no captions are there")
        self.captions = list(known.values())
        self.nouns = [words.find(caption) for caption in self.captions]
        self.rows = [row[:max_tokens] for row in tokenizer.encode_batch(self.captions)]
        self.digest = hashlib.sha256("\n".join(self.captions).encode()).hexdigest()

    def sample_epoch(self, count, batch_size, generator):
        """`count` batches of captions of similar lengths: lists of numbers."""
        rounds = -(-count * batch_size // len(self.rows))
        order = torch.cat([torch.randperm(len(self.rows), generator=generator) for _ in range(rounds)])
        order = order[:count * batch_size].tolist()
        return [[order[i] for i in batch] for batch in
                bucketed_batches([len(self.rows[i]) for i in order], batch_size, generator)]

    def look(self, source, seen):
        """Set the source of concepts, and what it recognises in some real pictures: Concepts, whose meanings are the residuals that the
        pictures' own captions do not explain."""
        self.source, self.seen = source, seen

    def batch(self, numbers, random):
        """Caption numbers and a numpy Generator -> tokens and targets (B, T), and B Concepts, their meanings as given to `look`"""
        pictures = random.integers(len(self.seen.numbers), size=len(numbers))
        seen = self.seen.each(lambda part: part[pictures])
        things = [[self.source.meanings(noun) for noun in self.nouns[i]] for i in numbers]
        return *collate([self.rows[i] for i in numbers]), self.words.imagine(things, seen, random)


def token_ids(texts):
    """Lists of token lists -> sorted ids of all tokens that occur, including <|endoftext|>: (V,)"""
    return torch.tensor(sorted({token for rows in texts for row in rows for token in row} | {END_OF_TEXT}))


def count_targets(texts, token_ids):
    """The number of target tokens of each list of token lists, among those scored; a batch's loss is divided by their sum."""
    scored = set(token_ids.tolist())
    return [sum(1 + sum(token in scored for token in row) for row in rows) for rows in texts]
