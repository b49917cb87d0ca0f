"""Caption a folder of images with LLaVA, zero-shot, through `transformers`.

    python3 p1_llava_infer.py images/ captions.json [model] [--instruction "describe the image in one sentence"]
    python3 p1_llava_infer.py images/ table.json [model] --settings configs/p1/prompts.yaml --annotation_file val.json

`model` is a folder or a name on the model hub. With none named it is LLaVA-1.5-7B where a GPU has room and its weights are in
weights/, else the small LLaVA of weights/. An interrupted run goes on when the same command is given again: until it is done,
its answers wait in <captions.json>.part. Exit status: 0 all well; 2 nothing was done, one line says why; 3 done, but some
images could not be read and are named.

With --settings every setting of the file is tried, its captions are written beside the table (table.<name>.json), and the
table gives CIDEr and CLIPScore, or our own CLIP's ImageTextScore, for each.
"""

import hashlib
import json
import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors import SafetensorError
from tqdm import tqdm

from cli import ArgumentParser, UserError, add_options, check_output, printable, run, take_options, write_json
from dataset import ImageError, ahead, fingerprints, list_images, load_image
from encoder import WEIGHTS_FOLDER
from p2_evaluate import clip_scorer, evaluate, load_references
from training import check_settings, pick_device
from weightfiles import first_line

BIG = WEIGHTS_FOLDER / "llava-1.5-7b-hf"
SMALL = WEIGHTS_FOLDER / "llava_small"
ROOM = {False: 19e9, True: 8e9}  # bytes that the 7B needs on a GPU, in half precision and in 4 bits, to answer 8 at a time
LOADING_ERRORS = OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError  # of from_pretrained, for what is wrong
SIDE = 336  # pixels that LLaVA-1.5 sees; photographs are decoded at three times that or more


@dataclass
class LlavaSettings:
    """What LLaVA is told, and how it answers; the names of `transformers` where it has one."""

    instruction: str = "Please give me a one sentence caption about the image."
    max_new_tokens: int = 40
    num_beams: int = 1
    temperature: float = 0.0  # 0: the likeliest words, none drawn
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    length_penalty: float = 1.0
    one_sentence: bool = False
    seed: int = 0

    def __post_init__(self):
        if not isinstance(self.instruction, str):
            raise UserError(f"instruction must be a text, not {self.instruction!r}")
        check_settings(self, ("max_new_tokens", "num_beams"), signed=("length_penalty",))
        if self.temperature < 0 or not 0 < self.top_p <= 1 or self.repetition_penalty <= 0:
            raise UserError("temperature must be at least 0, top_p in (0, 1] and repetition_penalty above 0")

    def generation(self):
        """The arguments of `generate`; those that would be ignored are None, whatever the model's own defaults."""
        sampling, beams = self.temperature > 0, self.num_beams > 1
        return {"max_new_tokens": self.max_new_tokens, "num_beams": self.num_beams, "do_sample": sampling,
                "temperature": self.temperature if sampling else None, "top_p": self.top_p if sampling else None,
                "top_k": self.top_k if sampling else None, "repetition_penalty": self.repetition_penalty,
                "length_penalty": self.length_penalty if beams else None}


HELP = dict(instruction="what it is told beside the picture", max_new_tokens="of an answer", num_beams="1: no beam search",
            temperature="of the drawing; 0: the likeliest words", top_p="draw from the likeliest tokens of so much probability",
            top_k="draw from so many; 0: all", length_penalty="of beams: above 0 favours long answers",
            one_sentence="cut answers after their first sentence", seed="of the drawing")


class Llava:
    """A LlavaForConditionalGeneration and its processor, frozen, on the device that is there.

    Args:
        name: a folder, or a name on the model hub.
        load_in_4bit: 4-bit weights through bitsandbytes, on CUDA.
        attention: "sdpa", or "eager", which alone gives its weights.
    Raises UserError for what is no LLaVA, or not to be had.
    """

    def __init__(self, name, load_in_4bit=False, attention="sdpa"):
        options = {"attn_implementation": attention, "dtype": torch.float32}
        self.device = pick_device()
        if load_in_4bit:
            options |= four_bits(self.device)
        elif self.device == "cuda":
            options["dtype"] = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
        if self.device == "cuda":
            options["device_map"] = "auto" if torch.cuda.device_count() > 1 else 0
        try:
            from transformers import AutoConfig, AutoProcessor, LlavaForConditionalGeneration
        except ImportError:
            raise UserError("LLaVA needs transformers: pip install -c constraints.txt transformers") from None
        try:
            kind = AutoConfig.from_pretrained(name).model_type
            if kind != "llava":
                raise UserError(f"{name} is a model of the kind {kind}, not LLaVA")
            self.model = LlavaForConditionalGeneration.from_pretrained(name, **options).eval()
            self.processor = AutoProcessor.from_pretrained(name)
            damaged = [part for part, value in self.model.named_parameters() if not value.isfinite().all()]
            if damaged:
                raise UserError(f"the weights of {name} hold values in {damaged[0]} that are not numbers: they are damaged")
        except torch.OutOfMemoryError:
            raise UserError(f"the GPU has no room for {name}: --load_in_4bit needs a quarter of it") from None
        except LOADING_ERRORS as error:
            raise UserError(f"{name} is no LLaVA that can be loaded ({first_line(error)}): `bash hw3_download.sh llava` "
                            "makes one") from None
        tokenizer = self.processor.tokenizer
        tokenizer.padding_side = "left"  # the answer follows the last token
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token

    def prompt(self, instruction):
        """The text around a picture: the processor's chat template, or LLaVA-1.5's."""
        instruction = instruction.replace(self.processor.image_token, " ").strip()
        if not self.processor.chat_template:
            return f"USER: {self.processor.image_token}\n{instruction} ASSISTANT:"
        said = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": instruction}]}]
        return without_bos(self.processor.apply_chat_template(said, add_generation_prompt=True), self.processor.tokenizer)

    def inputs(self, pictures, instructions):
        """RGB PIL images and as many instructions -> the tensors that the model takes, texts padded on the left."""
        inputs = self.processor(images=pictures, text=[self.prompt(text) for text in instructions], padding=True,
                                return_tensors="pt")
        return inputs.to(self.model.device, self.model.dtype)

    def generate(self, inputs, settings):
        """What the model says after `inputs`: token ids (B, T), padded behind their ends."""
        tokens = self.model.generate(**inputs, **settings.generation(), suppress_tokens=[self.model.config.image_token_id],
                                     pad_token_id=self.processor.tokenizer.pad_token_id)
        return tokens[:, inputs["input_ids"].shape[1]:]

    def texts(self, tokens):
        """Token ids, B rows -> B strings, each on one line."""
        return [" ".join(text.split()) for text in self.processor.tokenizer.batch_decode(tokens, skip_special_tokens=True)]

    @torch.inference_mode()
    def answer(self, pictures, instructions, settings, seed=0):
        """Answers, and nothing but them: RGB PIL images (B) and an instruction for each -> B strings. Raises UserError."""
        torch.manual_seed(seed)
        try:
            texts = self.texts(self.generate(self.inputs(pictures, instructions), settings))
        except torch.OutOfMemoryError:
            raise UserError(f"the GPU has no room for {len(pictures)} pictures at a time: lower --batch_size or --num_beams, or "
                            "choose --load_in_4bit") from None
        return [*map(first_sentence, texts)] if settings.one_sentence else texts


def without_bos(text, tokenizer):
    """What a chat template gave, without the token of its start where tokenizing adds that anyway."""
    added = tokenizer.bos_token and tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id
    return text.removeprefix(tokenizer.bos_token) if added else text


def four_bits(device):
    """The options of from_pretrained for 4-bit weights. Raises UserError where they cannot be had."""
    if device != "cuda":
        raise UserError("--load_in_4bit needs a GPU with CUDA, and there is none")
    if not find_spec("bitsandbytes"):
        raise UserError("--load_in_4bit needs a package: pip install bitsandbytes")
    from transformers import BitsAndBytesConfig

    return {"dtype": torch.float16, "quantization_config": BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_compute_dtype=torch.float16, bnb_4bit_quant_type="nf4")}


def first_sentence(text):
    """The text up to its first full stop, question or exclamation mark; an abbreviation's stop ends nothing."""
    for end in re.finditer(r"[.!?]+[\"'”’)]*(?=\s|$)", text):
        if not re.search(r"(?:\b(?:Mr|Mrs|Ms|Dr|St|Jr|No|vs|etc|approx|[A-Za-z])|\b[ap]\.m|\b[ie]\.[eg])\.$", text[:end.end()]):
            return text[:end.end()]
    return text


def default_model(load_in_4bit=False):
    """The 7B where a GPU has room and its weights are there, else the small one. Raises UserError where neither is."""
    if BIG.is_dir() and torch.cuda.is_available():
        free = sum(torch.cuda.mem_get_info(i)[0] for i in range(torch.cuda.device_count()))
        if free > ROOM[load_in_4bit]:
            return BIG
    if SMALL.is_dir():
        return SMALL
    if BIG.is_dir():
        raise UserError(f"{BIG} is there, but no GPU with room for it: name it to run it all the same, on the CPU")
    raise UserError(f"there is no LLaVA in {WEIGHTS_FOLDER}: `bash hw3_download.sh llava` makes the small one, or name a folder")


# ---- folders ---------------------------------------------------------------------------------------------------


class PartFile:
    """Answers to images so far, in lines of JSON beside the output, so that an interrupted run goes on.

    Images that could not be read are tried again: someone may have mended them.

    Args:
        output: the file to be written in the end. what: all that the answers depend on; others are thrown away.
        pictures: {stem: fingerprint}; answers to other pictures of the same names are thrown away.
    """

    def __init__(self, output, what, pictures):
        self.path = Path(f"{output}.part")
        self.entries = {}
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        first, *rest = [entry for entry in map(self._entry, lines) if entry] or [None]
        if first == {"what": what}:
            self.entries = {entry["stem"]: entry for entry in rest if "answer" in entry
                            and entry.get("of") == pictures.get(entry["stem"])}
        elif lines:
            print(f"{self.path} is of other settings: starting again", file=sys.stderr)
        self.pictures = pictures
        self.path.write_text("".join(f"{json.dumps(entry)}\n" for entry in [{"what": what}, *self.entries.values()]), "utf-8")

    @staticmethod
    def _entry(line):
        try:
            return json.loads(line)
        except ValueError:  # the last line of a killed run can be half a line
            return None

    def add(self, entries):
        entries = [entry | {"of": self.pictures[entry["stem"]]} for entry in entries]
        self.entries |= {entry["stem"]: entry for entry in entries}
        with open(self.path, "a", encoding="utf-8") as file:
            file.write("".join(f"{json.dumps(entry)}\n" for entry in entries))


def read_pictures(paths):
    """[(path, RGB PIL image or the reason why there is none), …]"""

    def read(path):
        try:
            return path, load_image(path, SIDE)
        except ImageError as error:
            return path, str(error)

    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(read, paths))


def caption_folder(model, images, settings, output, what, batch_size=8):
    """Caption {stem: path}; answers of an earlier run with the same `what` and batches are kept.

    Returns ({stem: caption}, {path: reason} of the images that could not be read).
    """
    part = PartFile(output, what, {stem: fingerprint for stem, (_, *fingerprint) in zip(images, fingerprints(images.values()))})
    paths = list(images.values())
    batches = [(start, paths[start:start + batch_size]) for start in range(0, len(paths), batch_size)]
    batches = [(start, batch) for start, batch in batches if not all(path.stem in part.entries for path in batch)]
    with tqdm(total=len(paths), initial=len(paths) - sum(len(batch) for _, batch in batches), unit="image",
              desc="captioning") as bar:
        for (start, batch), read in zip(batches, ahead(read_pictures, [batch for _, batch in batches])):
            good = [(path, picture) for path, picture in read if not isinstance(picture, str)]
            answers = model.answer([picture for _, picture in good], [settings.instruction] * len(good), settings,
                                   settings.seed * 1_000_003 + start) if good else []
            part.add([{"stem": path.stem, "answer": answer} for (path, _), answer in zip(good, answers)]
                     + [{"stem": path.stem, "unread": reason} for path, reason in read if isinstance(reason, str)])
            bar.update(len(batch))
    unread = {path: part.entries[stem]["unread"] for stem, path in images.items() if "unread" in part.entries[stem]}
    for path, reason in unread.items():
        print(f"skipped {printable(str(path))}: {printable(reason)}", file=sys.stderr)
    return {stem: part.entries[stem]["answer"] for stem in images if "answer" in part.entries[stem]}, unread


def caption_to_file(model, images, settings, output, what, batch_size):
    """caption_folder, then the predictions to `output`, whole; returns the same. The answers stay in `output`.part, too."""
    captions, unread = caption_folder(model, images, settings, output, what, batch_size)
    write_json(output, captions)
    print(f"{len(captions)} captions in {output}"
          + (f"; {len(unread)} of {len(images)} images could not be read" if unread else ""), file=sys.stderr)
    return captions, unread


# ---- settings compared -----------------------------------------------------------------------------------------


def read_settings(path, defaults):
    """A YAML file {name: {option: value}} -> {name: LlavaSettings}; options not named are those of `defaults`."""
    import yaml

    try:
        named = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read the settings {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"the settings {path} are not YAML: {first_line(error)}") from None
    known = {field.name for field in fields(LlavaSettings)}
    if not isinstance(named, dict) or not named or not all(isinstance(options, dict) for options in named.values()):
        raise UserError(f"the settings {path} are not a list of `name:` with options under each")
    found = {}
    for name, options in named.items():
        if not re.fullmatch(r"[\w-]+", str(name)):
            raise UserError(f"the settings {path} name one {name!r}: letters, digits, _ and - make a file's name")
        if unknown := set(options) - known:
            raise UserError(f"the settings {path} have no option {min(unknown)}: choose from {', '.join(sorted(known))}")
        try:
            found[str(name)] = LlavaSettings(**asdict(defaults) | options)
        except TypeError as error:
            raise UserError(f"the settings {name} of {path}: {error}") from None
    return found


def compare_settings(every, output, images, references, clip, caption):
    """Caption with each of the settings, score, print a table and write it.

    Args:
        every: {name: LlavaSettings}. references: {stem: CaptionedImage}. clip: a ClipScorer or None.
        caption: function of settings and a file to write, which returns ({stem: caption}, unread).
    """
    systems, files, unread = [], [], {}
    for name, settings in every.items():
        files.append(output.with_name(f"{output.stem}.{name}.json"))
        captions, bad = caption(settings, files[-1])
        systems.append(captions)
        unread |= bad
    scored = {stem: references[stem] for stem in images if all(captions.get(stem, "").strip() for captions in systems)}
    if len(scored) < len(images):
        print(f"scored on {len(scored)} of {len(images)} images: the others could not be read, or got an empty answer")
    if not scored:
        raise UserError("no image got an answer under every setting: there is nothing to score")
    found = evaluate(systems, scored, clip)
    names = ["CIDEr"] + (clip.names[:1] if clip else [])
    table = {name: asdict(settings) | {"images": len(scored), "captions": file.name} | {of: corpus[of] for of in names}
             for (name, settings), file, (corpus, _, _) in zip(every.items(), files, found)}
    write_json(output, table)
    print(f"| setting | instruction | {' | '.join(names)} |\n|{'---|' * (2 + len(names))}")
    for name, entry in table.items():
        print(f"| {name} | {entry['instruction']} | {' | '.join(f'{entry[of]:.3f}' for of in names)} |")
    return unread


# ---- command line ----------------------------------------------------------------------------------------------


def main():
    parser = ArgumentParser(description="Caption a folder of images with LLaVA.")
    parser.add_argument("images", help="folder; its own image files count, not those in subfolders")
    parser.add_argument("output", type=Path, help="JSON file: file name without extension -> caption")
    parser.add_argument("model", nargs="?", help="folder, or name on the model hub")
    parser.add_argument("--batch_size", type=int, default=8, help="images at a time")
    parser.add_argument("--load_in_4bit", action="store_true", help="a quarter of the memory, on CUDA with bitsandbytes")
    parser.add_argument("--limit", type=int, help="only the first so many images of the folder")
    parser.add_argument("--settings", help="YAML file of several settings to compare")
    parser.add_argument("--annotation_file", help="with --settings: captions in COCO's form, to score against")
    parser.add_argument("--clip_weights", help="with --settings: CLIP's, for CLIPScore (default: weights/ViT-B-32.pt, else clip_small)")
    add_options(parser, LlavaSettings, **HELP)
    arguments = parser.parse_args()
    settings = take_options(arguments, LlavaSettings)
    if arguments.batch_size < 1 or arguments.limit is not None and arguments.limit < 1:
        raise UserError("--batch_size and --limit must be at least 1")
    if bool(arguments.settings) != bool(arguments.annotation_file):
        raise UserError("--settings and --annotation_file go together")
    # Cheap questions first: a mistake shows before a model is loaded.
    images = list_images(arguments.images)
    images = dict(list(images.items())[:arguments.limit])
    check_output(arguments.output, "JSON", [*images.values(), arguments.settings, arguments.annotation_file])
    if arguments.settings:
        every = read_settings(arguments.settings, settings)
        references = load_references(arguments.annotation_file, arguments.images)
        if strange := [stem for stem in images if stem not in references]:
            raise UserError(f"{arguments.annotation_file} has no captions of {strange[0]}")
        clip, lacking = clip_scorer(arguments.images, arguments.clip_weights, "")
        if lacking:
            print(lacking)
    name = arguments.model or default_model(arguments.load_in_4bit)
    print(f"with {name}", file=sys.stderr)
    model = Llava(name, arguments.load_in_4bit)
    folder, written = Path(arguments.images).resolve(), []
    same_images = hashlib.sha256(b"\0".join(os.fsencode(folder / path.name) for path in images.values())).hexdigest()
    weights = sorted(path for path in Path(name).glob("*") if path.is_file())
    same_weights = hashlib.sha256(json.dumps(fingerprints(weights)).encode()).hexdigest()

    def caption(settings, output):
        what = {"model": str(name), "4bit": arguments.load_in_4bit, "batch_size": arguments.batch_size,
                "images": same_images, "weights": same_weights} | asdict(settings)
        written.append(output)
        return caption_to_file(model, images, settings, output, what, arguments.batch_size)

    if arguments.settings:
        unread = compare_settings(every, arguments.output, images, references, clip, caption)
    else:
        _, unread = caption(settings, arguments.output)
    for output in written:  # all of them are needed until the last is there
        Path(f"{output}.part").unlink()
    return 3 if unread else 0


if __name__ == "__main__":
    run(main)
