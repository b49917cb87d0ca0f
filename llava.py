"""A LLaVA of `transformers`: settings, loading, and answering questions about pictures."""

import re
import sys
import threading
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec

import torch
from safetensors import SafetensorError

from cli import UserError, check_settings, option
from devices import pick_device
from files import WEIGHTS_FOLDER, first_line
from runtime import pick_runtime

BIG = WEIGHTS_FOLDER / "llava-1.5-7b-hf"
SMALL = WEIGHTS_FOLDER / "llava_small"
ROOM = {False: 19e9, True: 8e9}  # bytes that the 7B needs on a GPU, in half precision and in 4 bits, for a batch of 8
LOADING_ERRORS = OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError  # raised by from_pretrained
SIDE = 336  # input size of LLaVA-1.5; large pictures are decoded at three times that or more


@dataclass
class LlavaSettings:
    """The prompt and the generation settings, with the names of `transformers` if it has them."""

    instruction: str = option("Please give me a one sentence caption about the image.", "prompt given with the picture")
    max_new_tokens: int = option(40, "of an answer")
    num_beams: int = option(1, "1: no beam search")
    temperature: float = option(0.0, "of sampling; 0: no sampling")
    top_p: float = option(1.0, "sample from the likeliest tokens with this total probability")
    top_k: int = option(0, "sample from so many likeliest tokens; 0: all")
    repetition_penalty: float = 1.0
    length_penalty: float = option(1.0, "of beam search: above 0 favours long answers")
    one_sentence: bool = option(False, "truncate answers after their first sentence")
    seed: int = option(0, "of sampling")

    def __post_init__(self):
        if not isinstance(self.instruction, str):
            raise UserError(f"instruction must be a text, not {self.instruction!r}")
        check_settings(self, ("max_new_tokens", "num_beams"), signed=("length_penalty",))
        if self.temperature < 0 or not 0 < self.top_p <= 1 or self.repetition_penalty <= 0:
            raise UserError("temperature must be at least 0, top_p in (0, 1] and repetition_penalty above 0")

    def generation(self):
        """The arguments of `generate`; those that would be ignored are None, to override the model's own defaults."""
        sampling, beams = self.temperature > 0, self.num_beams > 1
        return {"max_new_tokens": self.max_new_tokens, "num_beams": self.num_beams, "do_sample": sampling,
                "temperature": self.temperature if sampling else None, "top_p": self.top_p if sampling else None,
                "top_k": self.top_k if sampling else None, "repetition_penalty": self.repetition_penalty,
                "length_penalty": self.length_penalty if beams else None}


class Llava:
    """A frozen LlavaForConditionalGeneration and its processor, on the available device.

    Args:
        name: a folder, or a name on the model hub.
        load_in_4bit: 4-bit weights by bitsandbytes, on CUDA.
        attention: "sdpa", or "eager", the only one that returns attention weights.
        runtime: as from pick_runtime: runs the vision tower on a CPU if it is vision_tower.py's, and with `many` the language model.
        many: whether there are enough questions that compiling a small language model by llava_runtime.py, which takes seconds, pays off.
    Raises UserError if it is not a LLaVA or cannot be loaded.
    """

    def __init__(self, name, load_in_4bit=False, attention="sdpa", runtime="auto", many=True):
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

            import vision_tower  # registers our encoders
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
            raise UserError(f"the GPU has no room for {name}: p1_llava_infer.py has --load_in_4bit, which needs a quarter of it") from None
        except LOADING_ERRORS as error:
            raise UserError(f"{name} is no LLaVA that can be loaded ({first_line(error)}): `bash hw3_download.sh llava` "
                            "makes one") from None
        tokenizer = self.processor.tokenizer
        tokenizer.padding_side = "left"  # the answer follows the last token
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        tower, self.compiled = self.model.model.vision_tower, False
        if pick_runtime(runtime, self.device) == "openvino":
            if isinstance(tower, vision_tower.EncoderVisionModel):
                tower.compile_encoder()
            if many and attention == "sdpa":
                self.compile_language()
        self.model.lm_head.register_forward_hook(partial(never, self.model.config.image_token_id))

    def compile_language(self):
        """Run a small language model in OpenVINO; if that cannot run it, it stays in PyTorch, with a message."""
        from llava_runtime import MOST_PARAMETERS, compile_language

        if sum(value.numel() for value in self.model.model.language_model.parameters()) > MOST_PARAMETERS:
            return
        try:
            compile_language(self.model, self.processor.tokenizer.pad_token_id)
            self.compiled = True
        except UserError as error:
            print(f"the language model stays with PyTorch, which takes twice the time: {error}", file=sys.stderr)

    def generation(self, settings):
        """The arguments of the model's `generate`, for one call."""
        options = settings.generation() | {"pad_token_id": self.processor.tokenizer.pad_token_id}
        return options | {"past_key_values": self.model.model.language_model.new_cache()} if self.compiled else options

    def prompt(self, instruction):
        """The text around a picture: the processor's chat template, or LLaVA-1.5's."""
        return self.conversation([(instruction, None)])

    def conversation(self, turns):
        """The prompt of a conversation about a picture. Turns are (question, answer); the last answer is None."""
        turns = [(asked.replace(self.processor.image_token, " ").strip(), answered) for asked, answered in turns]
        if not self.processor.chat_template:
            asked = [f"USER: {self.processor.image_token}\n{turns[0][0]} ASSISTANT:", *(f"USER: {text} ASSISTANT:" for text, _ in turns[1:])]
            ends = [f" {answered}{self.processor.tokenizer.eos_token}" for _, answered in turns[:-1]] + [""]
            return "".join(part for pair in zip(asked, ends) for part in pair)
        said = []
        for number, (asked, answered) in enumerate(turns):
            said.append({"role": "user", "content": [{"type": "image"}] * (not number) + [{"type": "text", "text": asked}]})
            if answered is not None:
                said.append({"role": "assistant", "content": [{"type": "text", "text": answered}]})
        return without_bos(self.processor.apply_chat_template(said, add_generation_prompt=True), self.processor.tokenizer)

    @torch.inference_mode()
    def talk(self, picture, turns, settings, stopped):
        """Answer the last turn of a conversation about a picture; yields the answer so far: word by word with one beam, else only when
        complete.

        Args:
            turns: as for `conversation`.
            stopped: a threading.Event that stops the generation.
        """
        from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

        class Stop(StoppingCriteria):
            def __call__(self, tokens, scores, **options):
                return torch.full((len(tokens),), stopped.is_set(), device=tokens.device)

        inputs = self.processor(images=[picture], text=[self.conversation(turns)], return_tensors="pt").to(self.model.device, self.model.dtype)
        options = self.generation(settings) | {"stopping_criteria": StoppingCriteriaList([Stop()])}
        if settings.num_beams > 1:
            tokens = self.model.generate(**inputs, **options)
            yield self.texts(tokens[:, inputs["input_ids"].shape[1]:])[0]
            return
        streamer = TextIteratorStreamer(self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        failed = []

        def generate():
            try:
                with torch.inference_mode():
                    self.model.generate(**inputs, **options, streamer=streamer)
            except Exception as error:  # in another thread: raised again in this one
                failed.append(error)
                streamer.end()

        thread = threading.Thread(target=generate, daemon=True)
        thread.start()
        said = ""
        try:
            for part in streamer:
                said += part
                yield " ".join(said.split())
        finally:
            stopped.set()
            thread.join()
        if failed:
            raise failed[0]

    def inputs(self, pictures, instructions):
        """RGB PIL images and as many instructions -> the model's input tensors, with left padding."""
        inputs = self.processor(images=pictures, text=[self.prompt(text) for text in instructions], padding=True,
                                return_tensors="pt")
        return inputs.to(self.model.device, self.model.dtype)

    def generate(self, inputs, settings):
        """Generate answers to `inputs`: token ids (B, T), padded after their ends."""
        tokens = self.model.generate(**inputs, **self.generation(settings))
        return tokens[:, inputs["input_ids"].shape[1]:]

    def texts(self, tokens):
        """Token ids, B rows -> B strings, each on one line."""
        return [" ".join(text.split()) for text in self.processor.tokenizer.batch_decode(tokens, skip_special_tokens=True)]

    @torch.inference_mode()
    def answer(self, pictures, instructions, settings, seed=0):
        """Answers without their prompts: RGB PIL images (B) and an instruction for each -> B strings. Raises UserError."""
        torch.manual_seed(seed)
        try:
            texts = self.texts(self.generate(self.inputs(pictures, instructions), settings))
        except torch.OutOfMemoryError:
            raise UserError(f"the GPU has no room for {len(pictures)} pictures at a time: lower --batch_size or --num_beams, or "
                            "choose p1_llava_infer.py's --load_in_4bit") from None
        return [*map(first_sentence, texts)] if settings.one_sentence else texts


def never(token, head, inputs, logits):
    """A forward hook of a language model's head that suppresses this token."""
    logits[..., token] = torch.finfo(logits.dtype).min


def without_bos(text, tokenizer):
    """The output of a chat template, without its start token if tokenizing adds it again."""
    added = tokenizer.bos_token and tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id
    return text.removeprefix(tokenizer.bos_token) if added else text


def four_bits(device):
    """The options of from_pretrained for 4-bit weights. Raises UserError if they are not supported."""
    if device != "cuda":
        raise UserError("--load_in_4bit needs a GPU with CUDA, and there is none")
    if not find_spec("bitsandbytes"):
        raise UserError("--load_in_4bit needs a package: pip install bitsandbytes")
    from transformers import BitsAndBytesConfig

    return {"dtype": torch.float16, "quantization_config": BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_compute_dtype=torch.float16, bnb_4bit_quant_type="nf4")}


def first_sentence(text):
    """The text up to its first full stop, question or exclamation mark; full stops of abbreviations do not count."""
    for end in re.finditer(r"[.!?]+[\"'”’)]*(?=\s|$)", text):
        if not re.search(r"(?:\b(?:Mr|Mrs|Ms|Dr|St|Jr|No|vs|etc|approx|[A-Za-z])|\b[ap]\.m|\b[ie]\.[eg])\.$", text[:end.end()]):
            return text[:end.end()]
    return text


def default_model(load_in_4bit=False):
    """The 7B if it fits on the GPU and its weights exist, else the small one. Raises UserError if neither exists."""
    if BIG.is_dir() and torch.cuda.is_available():
        free = sum(torch.cuda.mem_get_info(i)[0] for i in range(torch.cuda.device_count()))
        if free > ROOM[load_in_4bit]:
            return BIG
    if SMALL.is_dir():
        return SMALL
    if BIG.is_dir():
        raise UserError(f"{BIG} is there, but no GPU with room for it: name it to run it all the same, on the CPU")
    raise UserError(f"there is no LLaVA in {WEIGHTS_FOLDER}: `bash hw3_download.sh llava` makes the small one, or name a folder")
