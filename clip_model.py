"""Embeddings of images and texts in one space (CLIP: Radford et al. 2021, https://arxiv.org/abs/2103.00020): one interface to
OpenAI's CLIP, our own small one, and the dual encoders of transformers.

    clip = load_clip()                              # OpenAI's if weights/ViT-B-32.pt exists, else clip_small
    read, images, unread = clip.encode_images(paths)        # (n, D), or (n, Q, D) where an image has Q vectors
    similarity(images, clip.encode_texts(["a dog"]))        # cosines (n, 1)
"""

import re
import sys
import warnings
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from cli import UserError
from clip_small import SMALL_WEIGHTS, TEXT_FOLDER, ClipSmall
from encoder import EMBEDDED
from files import WEIGHTS_FOLDER, content_hash, first_line, read_archive, read_weights
from images import load_ahead
from runtime import pick_runtime

CLIP_WEIGHTS = WEIGHTS_FOLDER / "ViT-B-32.pt"
SMALL = "clip_small"  # our own CLIP, on the embedded encoder
NO_CLIP = "needs CLIP's weights: `bash hw3_download.sh full`, or --clip_weights FILE or ViT-B/32"


class DualEncoder:
    """Base class. A subclass embeds a batch of images and a batch of texts.

    As everywhere here, images are rotated as their EXIF data says and transparency becomes white; the rest of the
    preprocessing is the model's own.

    Attributes: `name`; `preprocess`, RGB PIL image -> tensor; `logit_scale`, the factor from cosines to the logits of its
    softmax; `limit`, the maximum number of tokens of a text, including special ones; `pixels`, the image side
    that it needs (larger JPEGs may be decoded smaller), or None.
    """

    is_openai = False  # CLIPScore is defined by OpenAI's CLIP
    pixels = None
    vectors_per_image = 1
    # (level, slope): a picture matches a text if their cosine is at least level + slope * the standard deviation, over pictures, of the
    # text's cosines; None: not measured.
    fit = None
    text_batch = 256

    def __init__(self, name, device, batch_size):
        self.name, self.device, self.batch_size = str(name), device, batch_size

    def embed_images(self, images):
        """A batch of preprocessed images -> embeddings (B, D) or (B, Q, D), not normalised."""
        raise NotImplementedError

    def embed_texts(self, texts):
        """List of B strings -> embeddings (B, D), not normalised."""
        raise NotImplementedError

    def count_tokens(self, text):
        """Number of tokens of the text before truncation, including special ones."""
        raise NotImplementedError

    @cached_property
    def fingerprint(self):
        """Hash of all weights: embeddings of models with different fingerprints cannot be compared."""
        return content_hash(self.model.state_dict())

    @torch.inference_mode()
    def embed_pictures(self, images):
        """A batch of preprocessed images -> normalised embeddings on the CPU, (B, D) or (B, Q, D)"""
        return F.normalize(self.embed_images(images.to(self.device)).float(), dim=-1).cpu()

    def encode_images(self, paths):
        """Embed images from files, with a progress bar on stderr.

        Returns the paths that could be read, their normalised embeddings (n, D) or (n, Q, D), and {path: error} of the
        others.
        """
        read, unread, embeddings = [], {}, []
        with tqdm(total=len(paths), unit="image", desc="looking") as bar:
            for good, images, bad in load_ahead(paths, self.preprocess, self.pixels, self.batch_size):
                if images is not None:
                    embeddings.append(self.embed_pictures(images))
                read += good
                unread.update((path, str(error)) for path, error in bad)
                bar.update(len(good) + len(bad))
        return read, torch.cat(embeddings) if embeddings else self.encode_texts([]), unread

    @torch.inference_mode()
    def encode_texts(self, texts):
        """Normalised embeddings (len(texts), D)."""
        embeddings = [F.normalize(self.embed_texts(texts[start:start + self.text_batch]).float(), dim=-1).cpu()
                      for start in range(0, len(texts), self.text_batch)]
        return torch.cat(embeddings) if embeddings else self.encode_texts([""])[:0]

    def too_long(self, texts):
        """How many of these texts are truncated, having more tokens than `limit`."""
        return sum(self.count_tokens(text) > self.limit for text in texts)


def similarity(images, texts):
    """Cosines of normalised embeddings of images (n, D) and texts (m, D): (n, m). For images (n, Q, D), the maximum over Q."""
    cosines = images @ texts.t()
    return cosines.amax(1) if images.ndim == 3 else cosines


def paired_similarity(images, texts):
    """Cosine of each image with the text of the same index: (n, D) or (n, Q, D), (n, D) -> (n,)"""
    return (images * texts).sum(-1) if images.ndim == 2 else (images * texts[:, None]).sum(-1).amax(1)


class Clip(DualEncoder):
    """OpenAI's CLIP through its package `clip`, in fp32.

    Args:
        weights: a name of `clip.available_models()`, or a file: a state dict, or the TorchScript archive that OpenAI
            publishes, of which only the tensors are used.
    """

    is_openai = True
    limit = 77

    def __init__(self, weights, device="cpu", batch_size=64):
        super().__init__(weights, device, batch_size)
        self.clip = import_clip()
        if str(weights) in self.clip.available_models():
            try:
                model, _ = self.clip.load(str(weights), "cpu")
            except (OSError, RuntimeError) as error:
                raise UserError(f"CLIP {weights} cannot be had ({first_line(error)}); name a file of its weights") from None
        else:
            from clip.model import build_model

            try:
                state = read_weights(weights, "CLIP weights")
            except UserError as error:
                if "TorchScript" not in str(error):
                    raise
                state = read_archive(weights, "CLIP weights")
            try:
                model = build_model(state)
            except (LookupError, RuntimeError, ValueError, ArithmeticError, AssertionError, TypeError) as error:
                raise UserError(f"{weights} does not hold the weights of an OpenAI CLIP: {first_line(error)}") from None
        self.model = model.float().eval().to(device)
        self.preprocess = self.clip.clip._transform(self.model.visual.input_resolution)
        self.logit_scale = self.model.logit_scale.exp().item()

    def embed_images(self, images):
        return self.model.encode_image(images)

    def embed_texts(self, texts):
        return self.model.encode_text(self.clip.tokenize([*map(whole_characters, texts)], truncate=True).to(self.device))

    def count_tokens(self, text):
        return len(self.clip.clip._tokenizer.encode(whole_characters(text))) + 2


def import_clip():
    """OpenAI's package `clip`, imported only for its models because that is slow."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pkg_resources, which clip imports, is deprecated
        try:
            import clip
        except ImportError:
            raise UserError("OpenAI's CLIP needs a package: pip install -c constraints.txt clip-anytorch") from None
    return clip


def is_openai_name(name):
    """Whether OpenAI's package `clip`, if it is installed, has a model of this name."""
    try:
        return name in import_clip().available_models()
    except UserError:
        return False


class TransformersClip(DualEncoder):
    """A dual encoder of transformers: CLIP, SigLIP, … (`get_image_features` and `get_text_features`), or BLIP-2's
    image-text matching model (Li et al. 2023, https://arxiv.org/abs/2301.12597), whose Q query outputs embed an image.

    Args:
        name: a folder, or a name on the Hugging Face Hub.
    """

    def __init__(self, name, device="cpu", batch_size=64):
        super().__init__(name, device, batch_size)
        from transformers import AutoConfig, AutoModel, AutoProcessor, Blip2ForImageTextRetrieval

        try:
            config = AutoConfig.from_pretrained(name)
            self.is_blip2 = "Blip2ForImageTextRetrieval" in (config.architectures or [])
            kind = Blip2ForImageTextRetrieval if self.is_blip2 else AutoModel
            model, found = kind.from_pretrained(name, dtype=torch.float32, output_loading_info=True)
            self.processor = AutoProcessor.from_pretrained(name)
        except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:  # those of the hub's client and the loaders
            raise UserError(f"{name} is neither a dual encoder's folder nor to be had from the model hub: "
                            f"{first_line(error)}") from None
        if not self.is_blip2 and not hasattr(model, "get_image_features"):
            raise UserError(f"{name} is a {type(model).__name__}, which does not embed images and texts in one space")
        if found["missing_keys"]:
            raise UserError(f"{name} lacks weights, the first is {min(found['missing_keys'])}: it would be partly random")
        self.model = model.eval().to(device)
        self.logit_scale = model.logit_scale.exp().item() if hasattr(model, "logit_scale") else 100.0
        tokenizer = self.processor.tokenizer
        text = getattr(config, "qformer_config" if self.is_blip2 else "text_config")
        self.vectors_per_image = config.num_query_tokens if self.is_blip2 else 1
        self.limit = min(tokenizer.model_max_length, getattr(text, "max_position_embeddings", tokenizer.model_max_length))

    def preprocess(self, image):
        return self.processor.image_processor(images=image, return_tensors="pt")["pixel_values"][0]

    def embed_images(self, images):
        if not self.is_blip2:
            return pooled(self.model.get_image_features(pixel_values=images))
        seen = self.model.vision_model(pixel_values=images).last_hidden_state
        queries = self.model.query_tokens.expand(len(images), -1, -1)
        outputs = self.model.qformer(query_embeds=queries, encoder_hidden_states=seen).last_hidden_state
        return self.model.vision_projection(outputs)  # (B, Q, D)

    def embed_texts(self, texts):
        # SigLIP was trained on texts padded to the full length, without a mask; for the others padding makes no difference.
        rows = self.processor.tokenizer([*map(whole_characters, texts)], truncation=True, max_length=self.limit,
                                        padding="max_length" if "siglip" in self.model.config.model_type else True,
                                        return_tensors="pt").to(self.device)
        if not self.is_blip2:
            named = {name: rows[name] for name in ("input_ids", "attention_mask") if name in rows}
            return pooled(self.model.get_text_features(**named))
        embedded = self.model.embeddings(input_ids=rows["input_ids"])
        outputs = self.model.qformer(query_embeds=embedded, query_length=0, attention_mask=rows["attention_mask"])
        return self.model.text_projection(outputs.last_hidden_state[:, 0])

    def count_tokens(self, text):
        return len(self.processor.tokenizer(whole_characters(text))["input_ids"])


def pooled(output):
    """The embedding in the output of `get_image_features`: since transformers 5, its pooler_output."""
    return output if isinstance(output, torch.Tensor) else output.pooler_output


class SmallClip(DualEncoder):
    """Our own CLIP, weights/clip_small.safetensors (p4_clip.py): heads on the frozen embedded encoder and MiniLM.

    With `fit`, 90% of the captions of 300 training pictures of each set match their picture, by heads that were not trained on them.

    Args:
        weights: the file.
        runtime: of the image encoder on a CPU, see pick_runtime.
    """

    fit = 0.27, 1.1

    def __init__(self, weights=SMALL_WEIGHTS, device="cpu", batch_size=32, runtime="auto"):
        super().__init__(Path(weights).stem, device, batch_size)
        self.model = ClipSmall.load(weights, runtime=pick_runtime(runtime, device)).to(device)
        self.preprocess, self.pixels = self.model.encoder.preprocess, self.model.encoder.image_size
        self.logit_scale = self.model.log_scale.exp().item()
        self.limit = self.model.text.max_tokens

    @cached_property
    def fingerprint(self):
        image_head = content_hash(self.model.image_head.state_dict())
        return f"{self.model.encoder.weights_hash} {image_head} {self.model.text_digest}"

    def embed_images(self, images):
        return self.model.embed_images(self.model.encoder(images))

    def embed_texts(self, texts):
        return self.model.embed_texts([*map(whole_characters, texts)])

    def count_tokens(self, text):
        return self.model.text.count_tokens(whole_characters(text))


def default_clip():
    """load_clip's default: OpenAI's weights if they are present, else "clip_small" if all its files are, else None."""
    if CLIP_WEIGHTS.exists():
        return CLIP_WEIGHTS
    parts = [SMALL_WEIGHTS, TEXT_FOLDER, *(WEIGHTS_FOLDER / f"{name}.safetensors" for name in EMBEDDED.split("+"))]
    return SMALL if all(part.exists() for part in parts) else None


def load_clip(weights=None, device="cpu", batch_size=64, runtime="auto"):
    """Load a dual encoder by name or file. Raises UserError.

    Args:
        weights: "clip_small", a file of p4_clip.py, a file or name of OpenAI's CLIP (`ViT-B-32.pt`, `ViT-B/32`), or a folder
            or hub name of a dual encoder of transformers. None: default_clip(); if that is clip_small, a line on stderr says so.
        runtime: of our own CLIP's image encoder on a CPU, see pick_runtime.
    """
    if weights is None:
        weights = default_clip()
        if weights is None:
            raise UserError(f"this {NO_CLIP}; or `bash hw3_download.sh`, for our own small one")
        if weights == SMALL:
            print(f"with {SMALL}, our own CLIP, since {CLIP_WEIGHTS.name} is not in weights/", file=sys.stderr)
    name, path = str(weights), Path(weights)
    if name == SMALL:
        return SmallClip(device=device, runtime=runtime)
    if path.is_file() and is_small_clip(path):
        return SmallClip(path, device, runtime=runtime)
    is_a_file = path.is_file() or path.suffix in (".pt", ".pth", ".bin", ".safetensors")
    if not path.is_dir() and (is_a_file or is_openai_name(name)):
        return Clip(weights, device, batch_size)
    return TransformersClip(name, device, batch_size)


def is_small_clip(path):
    """Whether p4_clip.py wrote this file."""
    from safetensors import SafetensorError, safe_open

    if path.suffix != ".safetensors":
        return False
    try:
        with safe_open(path, "pt") as file:
            return SMALL in (file.metadata() or {})
    except (SafetensorError, OSError):
        return False


def whole_characters(text):
    """The text with "?" for each lone surrogate, which neither CLIP's tokenizer nor matplotlib accepts."""
    return text.encode("utf-8", "replace").decode()


# ---- zero-shot classification ------------------------------------------------------------------------------------

TEMPLATE = "A photo of a {object}."  # the paper's default
ASSIGNMENT_TEMPLATES = ["This is a photo of {object}", "This is not a photo of {object}", "No {object}, no score."]
CLASS_NAME = re.compile(r"\{(object)?\}")  # {object} as in the assignment, {} as in CLIP's own prompt lists


def prompt_name(name):
    """A class's name as words: aquarium_fish -> aquarium fish."""
    return " ".join(name.replace("_", " ").split())


def embed_classes(clip, names, templates):
    """Normalised embeddings (K, C, D) of K templates, each filled with each of C class names."""
    prompts = [CLASS_NAME.sub(lambda _: prompt_name(name), template) for template in templates for name in names]
    if cut := clip.too_long(prompts):
        print(f"{cut} prompts are longer than CLIP's {clip.limit} tokens and were cut", file=sys.stderr)
    return clip.encode_texts(prompts).view(len(templates), len(names), -1)


def average(embeddings):
    """Ensemble the classifiers of several templates (K, C, D) into one (C, D): their normalised mean, as in the paper."""
    return F.normalize(embeddings.mean(0), dim=-1)
