"""OpenAI's CLIP (Radford et al. 2021): read from disk, and asked for embeddings of images and of texts."""

import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from cli import UserError
from dataset import load_ahead
from weightfiles import first_line, read_weights

CLIP_WEIGHTS = Path(__file__).resolve().parent / "weights" / "ViT-B-32.pt"
NO_CLIP = "needs CLIP's weights: `bash hw3_download.sh full`, or --clip_weights FILE or ViT-B/32"


class Clip:
    """CLIP through OpenAI's `clip`, in fp32.

    Images are turned as their EXIF data says and transparency is shown on white, as everywhere here; the rest of the
    preprocessing is `clip`'s.

    Args:
        weights: a name of `clip.available_models()`, or a file of CLIP's weights: a state dict, or the TorchScript
            archive that OpenAI publishes, of which the tensors alone are used.
    """

    def __init__(self, weights, device="cpu", batch_size=64):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pkg_resources, which clip imports and setuptools wants gone
            import clip  # slow to import, and only needed here
            from clip.model import build_model

        self.clip, self.device, self.batch_size = clip, device, batch_size
        if str(weights) in clip.available_models():
            try:
                model, _ = clip.load(str(weights), "cpu")
            except (OSError, RuntimeError) as error:
                raise UserError(f"CLIP {weights} cannot be had ({first_line(error)}); name a file of its weights") from None
        else:
            try:
                state = read_weights(weights, "CLIP weights")
            except UserError as error:
                if "TorchScript" not in str(error):
                    raise
                state = torch.jit.load(weights, "cpu").state_dict()
            try:
                model = build_model(state)
            except (LookupError, RuntimeError, ValueError, ArithmeticError, AssertionError, TypeError) as error:
                raise UserError(f"{weights} does not hold the weights of an OpenAI CLIP: {first_line(error)}") from None
        self.model = model.float().eval().to(device)
        self.preprocess = clip.clip._transform(self.model.visual.input_resolution)
        self.logit_scale = self.model.logit_scale.exp().item()  # cosines times this are the logits of its softmax

    @torch.inference_mode()
    def encode_images(self, paths):
        """Look at these images, with a progress bar on stderr.

        Returns the paths that could be read, their normalised embeddings (n, D), and {path: reason} of the others.
        """
        read, unread, embeddings = [], {}, [torch.zeros(0, self.model.text_projection.shape[1])]
        with tqdm(total=len(paths), unit="image", desc="looking") as bar:
            for good, images, bad in load_ahead(paths, self.preprocess, None, self.batch_size):
                if images is not None:
                    embeddings.append(F.normalize(self.model.encode_image(images.to(self.device)), dim=-1).cpu())
                read += good
                unread.update(bad)
                bar.update(len(good) + len(bad))
        return read, torch.cat(embeddings), unread

    @torch.inference_mode()
    def encode_texts(self, texts):
        """Normalised embeddings (len(texts), D)."""
        embeddings = []
        for start in range(0, len(texts), 4 * self.batch_size):
            tokens = self.clip.tokenize(list(map(whole_characters, texts[start:start + 4 * self.batch_size])), truncate=True)
            embeddings.append(F.normalize(self.model.encode_text(tokens.to(self.device)), dim=-1).cpu())
        return torch.cat(embeddings)

    def too_long(self, texts):
        """How many of these texts are longer than the 77 tokens that CLIP reads, and are cut."""
        return sum(len(self.clip.clip._tokenizer.encode(whole_characters(text))) + 2 > 77 for text in texts)


def whole_characters(text):
    """The text with "?" for each half of a surrogate pair, which neither CLIP's tokenizer nor matplotlib takes."""
    return text.encode("utf-8", "replace").decode()
