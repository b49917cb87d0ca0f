"""Make a LLaVA: train the projection between a frozen vision tower and a frozen language model.

    python3 p4_align.py <vision model> <language model> <folder to write> --data data
    accelerate launch --num_processes 8 p4_align.py …

After LLaVA (Liu et al. 2023, https://arxiv.org/abs/2304.08485, and its 1.5: https://arxiv.org/abs/2310.03744), from a vision
transformer and a causal language model of `transformers` (folders, or names on the model hub; for the former also a ViT-S/14
that p4_pretrain_vit.py wrote; for the latter most that are built as Llama, Qwen, Mistral or Gemma 3 are), in two stages:
captions with nothing asked, then questions and instructions, mixed by kind. Only the answers count in the loss. What is written
is a complete LlavaForConditionalGeneration with its processor, and beside it trained.safetensors with what was trained alone,
from which `assemble` makes the same again.

What is asked about one picture goes through the model in one row: the picture's tokens once, then a branch for each query with
its answer, which sees the picture and itself but no other branch. The loss is that of as many rows, for a fraction of the work.

A run that was killed, or stopped by SIGTERM or --max_hours, goes on when the same command is given again, from the very
sample, on any number of processes.

Shapes: B rows, N image tokens of each, T positions of a row, C the language model's width, V its vocabulary.
"""

import hashlib
import json
import math
import random
import time
from dataclasses import dataclass, fields
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from cli import ArgumentParser, UserError, add_options, check_writable, make_ordinary, run, take_options
from dataset import IGNORE, ahead, clean_captions, load_picture, read_captions
from p1_llava_infer import LOADING_ERRORS, without_bos
from p4_questions import derive_all, read_questions
from training import (Interruption, Processes, TrainingLog, adamw, autocast, check_settings, cosine, load_state, pick_precision,
                      save_state, step_optimizer, what_matters)
from weightfiles import content_hash, first_line, read_weights

GROUPS = {"animal": "qa", "count": "qa", "colour": "qa", "action": "qa", "presence": "qa", "where": "relation"}
CAPTION_QUERIES = ["Please give me a one sentence caption about the image.", "describe the image in one sentence",
                   "What is happening in the picture?", "Write a caption for this image."]
# What the texts of a conversation stand in: every query between the first two, every answer before the end of text.
LLAMA_FORM = "[INST] ", " [/INST]"
PLAIN_FORM = "", "\n"
LOG_STEPS = 20
COMMON_TOKENS = 8192  # the first so many of a vocabulary, among which BPE and SentencePiece have the commonest
FIT_PICTURES = 32  # that a fresh projection is fitted to


@dataclass
class Settings:
    data: str = "data"
    instructions: str = ""
    init: str = ""
    mix: tuple = ("qa=0.6", "relation=0.2", "detail=0.2", "caption=0")
    projection: str = "mlp"
    image_size: int = 0
    vision_layer: int = -1
    train_vision_layers: int = 0
    stage1_epochs: float = 1.0
    stage2_epochs: float = 1.0
    batch_size: int = 32
    per_picture: int = 4
    accumulation: int = 1
    learning_rate: float = 1e-3
    stage2_learning_rate: float = 1e-3
    vision_learning_rate: float = 5e-5
    weight_decay: float = 0.0
    warmup_epochs: float = 1.0
    clip: float = 1.0
    precision: str = "auto"
    fsdp: bool = False
    head_sample: int = 0
    max_tokens: int = 96
    seed: int = 0
    save_minutes: float = 5.0
    max_hours: float = 0.0

    def __post_init__(self):
        self.mix = tuple(self.mix)
        check_settings(self, ("batch_size", "per_picture", "accumulation", "max_tokens"), signed=("vision_layer",))
        if self.projection not in ("linear", "mlp"):
            raise UserError(f"--projection is {self.projection}: choose from linear, mlp")
        if min(self.stage1_epochs, self.stage2_epochs, self.warmup_epochs) < 0 or not self.stage1_epochs + self.stage2_epochs:
            raise UserError("--stage1_epochs, --stage2_epochs and --warmup_epochs must be at least 0, one stage above")
        if min(self.learning_rate, self.stage2_learning_rate, self.vision_learning_rate) <= 0:
            raise UserError("learning rates must be above 0")
        if min(self.train_vision_layers, self.image_size, self.head_sample, self.seed) < 0:
            raise UserError("--train_vision_layers, --image_size, --head_sample and --seed must be at least 0")
        self.parts()

    def parts(self):
        """{kind: its part of stage 2}, which sum to 1. Raises UserError."""
        try:
            parts = {kind: float(part) for kind, part in (entry.split("=") for entry in self.mix)}
        except ValueError:
            raise UserError("--mix takes kind=part, such as qa=0.6 relation=0.2 detail=0.2") from None
        if min(parts.values(), default=-1) < 0 or not sum(parts.values()):
            raise UserError("--mix needs a part of at least 0 for each kind, and one above")
        return {kind: part / sum(parts.values()) for kind, part in parts.items() if part}


HELP = dict(
    data="folder with train.json and images/train",
    instructions="JSON list of {image, kind, query, answer} for stage 2; default: derived from the captions (p4_questions.py)",
    init="trained.safetensors of an earlier run of the same models and layers, to start from",
    mix="parts of stage 2: qa, relation, detail, caption, or other kinds of the instructions",
    projection="linear, or mlp: two layers",
    image_size="pixels a side; 0: the vision model's own", vision_layer="whose output the projection takes; -1: the last",
    train_vision_layers="so many layers of the vision model, up to `vision_layer`, are trained along",
    stage1_epochs="of captions with nothing asked, over the images",
    stage2_epochs="of questions and instructions, `per_picture` times as many as images",
    batch_size="pictures of an update, over all processes", per_picture="samples that share a picture's pass, at most",
    accumulation="parts that go through the model one after the other",
    learning_rate="of the projection in stage 1", stage2_learning_rate="of the projection in stage 2",
    vision_learning_rate="of the vision layers that are trained along, in stage 1; it changes as the projection's does",
    warmup_epochs="of each stage, linear; then half a cosine",
    clip="gradient norm", precision="auto (bf16 on CUDA, else fp32), fp32 or bf16",
    fsdp="shard the language model over the processes",
    head_sample="so many tokens, drawn anew for each update, stand for all that no answer has; 0: the softmax over all",
    max_tokens="of an answer; longer ones are cut",
    save_minutes="between states to resume from", max_hours="stop then, ready to go on; 0: no limit")


# ---- the model -------------------------------------------------------------------------------------------------


def build(vision_name, language_name, settings):
    """A LlavaForConditionalGeneration of two pretrained models and a fresh projection, and its processor. Raises UserError."""
    from transformers import (AutoImageProcessor, AutoModel, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlavaConfig,
                              LlavaForConditionalGeneration, LlavaProcessor)

    try:
        with TemporaryDirectory() as folder:
            if Path(vision_name).suffix == ".safetensors":
                from p4_pretrain_vit import write_dinov2

                write_dinov2(vision_name, folder, settings.image_size or 224)
            else:
                folder = vision_name
            vision = AutoModel.from_pretrained(folder, dtype=torch.float32)
            vision = getattr(vision, "vision_model", vision)  # of a CLIP, its vision half
            image_processor = AutoImageProcessor.from_pretrained(folder)
        language = AutoModelForCausalLM.from_pretrained(language_name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(language_name)
    except LOADING_ERRORS as error:
        raise UserError(f"{vision_name} with {language_name} cannot be loaded as a vision and a causal language model: "
                        f"{first_line(error)}") from None
    size, patch, prefix_tokens = check_vision(vision, vision_name, settings)
    check_language(language, language_name)
    # Nothing is cropped away: the whole picture is squeezed into the square.
    image_processor.do_center_crop, image_processor.do_resize = False, True
    image_processor.size = {"height": size, "width": size}

    torch.manual_seed(settings.seed)  # new words and the projection begin at random
    token = image_token(tokenizer)
    if len(tokenizer) > language.get_input_embeddings().num_embeddings:
        language.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    select = "default" if prefix_tokens else "full"
    config = LlavaConfig(
        vision_config=vision.config, text_config=language.config, image_token_index=tokenizer.convert_tokens_to_ids(token),
        image_seq_length=(size // patch) ** 2, projector_hidden_act="gelu" if settings.projection == "mlp" else "linear",
        vision_feature_select_strategy=select, vision_feature_layer=settings.vision_layer,
        tie_word_embeddings=language.config.tie_word_embeddings)
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    model.model.vision_tower, model.model.language_model, model.lm_head = vision, language.model, language.lm_head
    projector = model.model.multi_modal_projector.to_empty(device="cpu")
    for layer in projector.linear_1, projector.linear_2:
        layer.reset_parameters()
    if settings.projection == "linear":  # two layers with nothing between them are one, if the second is the identity
        torch.nn.init.eye_(projector.linear_2.weight)
        torch.nn.init.zeros_(projector.linear_2.bias)
    # The language model's own may sample, or end where no answer here ended.
    model.generation_config = GenerationConfig(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
                                               pad_token_id=tokenizer.pad_token_id)
    processor = LlavaProcessor(image_processor, tokenizer, patch_size=patch, vision_feature_select_strategy=select,
                               chat_template=chat_template(tokenizer, language.config.model_type, token),
                               image_token=token, num_additional_image_tokens=prefix_tokens)
    return model, processor


def check_vision(model, name, settings):
    """(pixels a side, pixels of a patch, tokens before the patches') of a vision model. Raises UserError if it cannot serve."""
    patch, depth = getattr(model.config, "patch_size", None), getattr(model.config, "num_hidden_layers", 0)
    if not isinstance(patch, int) or not hasattr(model.config, "hidden_size"):
        raise UserError(f"{name} has no square patches: it is no vision transformer")
    size = settings.image_size or model.config.image_size
    if size % patch:
        raise UserError(f"--image_size is {size}, but must be a multiple of the patches' {patch} pixels")
    if not -depth - 1 <= settings.vision_layer <= depth:
        raise UserError(f"--vision_layer is {settings.vision_layer}, but {name} has {depth} layers")
    if settings.train_vision_layers > layers_used(depth, settings.vision_layer):
        raise UserError(f"--train_vision_layers is {settings.train_vision_layers}, but --vision_layer comes after "
                        f"{layers_used(depth, settings.vision_layer)} layers of {name}")
    try:
        with torch.inference_mode():
            tokens = model(torch.zeros(1, 3, size, size)).last_hidden_state.shape[1]
    except (ValueError, RuntimeError) as error:
        raise UserError(f"{name} does not take {size} pixels: {first_line(error)}") from None
    prefix_tokens = tokens - (size // patch) ** 2
    if prefix_tokens not in (0, 1):
        raise UserError(f"{name} has {prefix_tokens} tokens before those of its patches, where LLaVA knows a class token alone")
    return size, patch, prefix_tokens


def layers_used(depth, vision_layer):
    """How many of the vision model's layers come before what the projection takes."""
    return vision_layer if vision_layer >= 0 else depth + 1 + vision_layer


def check_language(model, name):
    """Raise UserError unless transformers' LLaVA computes with this language model as the model itself does."""
    config, inner = model.config, getattr(model, "model", None)
    if not hasattr(inner, "embed_tokens") or not hasattr(inner, "layers") or not hasattr(model, "lm_head"):
        raise UserError(f"{name} ({config.model_type}) is not built as LLaVA needs it: choose one such as Llama, Qwen or Gemma 3")
    scales = [key for key in ("logit_scale", "logits_scaling", "final_logit_softcapping") if getattr(config, key, None)]
    if scales or model.lm_head.bias is not None:
        raise UserError(f"{name} ({config.model_type}) changes its logits by {scales[0] if scales else 'a bias'}, which LLaVA "
                        "leaves out")
    if strange := set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}:
        raise UserError(f"{name} ({config.model_type}) has layers of {min(strange)}, which cannot tell a picture's questions "
                        "apart")


@torch.no_grad()
def fit_projection(model, pixel_values):
    """Fit a fresh projection to what it stands between, as seen on some pictures (B, 3, S, S).

    The vision tower's channels come to mean 0 and deviation 1, since some of a DINOv2's are ten times as large as others; the
    image tokens become as large as words: a tenfold difference would drown either.
    """
    tower, projector = model.model.vision_tower, model.model.multi_modal_projector
    hidden = tower(pixel_values, output_hidden_states=True).hidden_states[model.config.vision_feature_layer]
    hidden = hidden[:, hidden.shape[1] - model.config.image_seq_length:]
    first, last = projector.linear_1, projector.linear_2
    if model.config.projector_hidden_act == "linear":
        last = first
    first.weight /= hidden.std((0, 1)) + 1e-6
    first.bias -= first.weight @ hidden.mean((0, 1))
    words = model.get_input_embeddings()(torch.arange(min(1000, model.config.text_config.vocab_size)))
    factor = words.std() / projector(hidden).std()
    last.weight *= factor
    last.bias *= factor


def image_token(tokenizer):
    """The token that stands for a patch: <image>, or one that the vocabulary keeps unused, or else a new one."""
    vocabulary = tokenizer.get_vocab()
    token = next((token for token in ("<image>", "<unused0>", "<|reserved_special_token_0|>") if token in vocabulary), "<image>")
    tokenizer.add_special_tokens({"additional_special_tokens": [token]})
    return token


def query_form(tokenizer, kind):
    """What stands before and after a query: the tokenizer's own template, Llama-2's, or a line of its own."""
    if not tokenizer.chat_template:
        return LLAMA_FORM if kind == "llama" else PLAIN_FORM
    said = tokenizer.apply_chat_template([{"role": "user", "content": "QUERY"}], tokenize=False, add_generation_prompt=True)
    before, *after = said.split("QUERY")
    if len(after) != 1:
        raise UserError("the language model's chat template does not give a query as it is: delete it from the tokenizer")
    return without_bos(before, tokenizer), after[0] or "\n"


def chat_template(tokenizer, kind, token):
    """A Jinja template for the processor: turns of queries, each with its pictures first, and answers."""
    before, after = (json.dumps(part) for part in query_form(tokenizer, kind))
    end = json.dumps(tokenizer.eos_token)
    return ("{% for message in messages %}{% if message['role'] == 'user' %}{{ " + before + " }}"
            "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ " + json.dumps(token) + " }}"
            "{% elif part['text'] %}{{ ' ' + part['text'] }}{% endif %}{% endfor %}{{ " + after + " }}"
            "{% else %}{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{{ " + end + " }}{% endif %}{% endfor %}")


def trained_parameters(model, vision_layers):
    """Freeze all but the projection and the vision tower's last layers before it: {name: parameter} of those, on fp32."""
    model.requires_grad_(False)
    projector = model.model.multi_modal_projector
    chosen = [*projector.parameters()]
    if model.config.projector_hidden_act == "linear":
        chosen = [*projector.linear_1.parameters()]
    if vision_layers:
        used = layers_used(model.config.vision_config.num_hidden_layers, model.config.vision_feature_layer)
        last = tuple(f".{number}." for number in range(used - vision_layers, used))
        for name, parameter in model.model.vision_tower.named_parameters():
            if any(number in name for number in last) and ("layer." in name or "layers." in name):
                chosen.append(parameter)
    for parameter in chosen:
        parameter.requires_grad_(True)
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def answer_loss(model, inputs, likely=None, drawn=None):
    """The cross-entropy of each answer's tokens, given its picture and what its branch says before: their sum.

    Args:
        inputs: input_ids, position_ids, branches and labels (B, T), as `collate` gives them; pixel_values (B, 3, S, S).
        likely, drawn: for `sampled_cross_entropy`; default: the softmax over all tokens.
    The head is computed at the answers alone: with a large vocabulary it would cost more than all layers.
    """
    mask = attention_mask(model.config.text_config, inputs["branches"], inputs["position_ids"])
    hidden = model.model(input_ids=inputs["input_ids"], position_ids=inputs["position_ids"], attention_mask=mask,
                         pixel_values=inputs["pixel_values"], use_cache=False).last_hidden_state[:, :-1]
    labels = inputs["labels"][:, 1:]
    learned = labels != IGNORE
    if likely is None:
        return F.cross_entropy(model.lm_head(hidden[learned]).float(), labels[learned], reduction="sum")
    return sampled_cross_entropy(hidden[learned], labels[learned], model.lm_head.weight, likely, drawn)


def attention_mask(config, branches, positions):
    """What may be attended to, as a language model of `transformers` takes it: (B, 1, T, T), or one for each type of layer.

    A position sees those of the picture's part (branch 0) and of its own branch, up to itself; in layers with a sliding
    window, those near it alone.

    Args:
        config: the language model's. branches, positions: (B, T), as `Trainer.collate` gives them.
    """

    def finish(mask):
        if config._attn_implementation == "sdpa":  # which alone takes truth values
            return mask
        return torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, torch.finfo(torch.float32).min)

    one, other = branches[:, None, :, None], branches[:, None, None, :]
    seen = ((other == 0) | (one == other)).tril()
    types, window = getattr(config, "layer_types", None), getattr(config, "sliding_window", None)
    if not window or types and "sliding_attention" not in types:
        return finish(seen)
    near = positions[:, None, :, None] - positions[:, None, None, :] < window
    near = finish(seen & near)
    return {"full_attention": finish(seen), "sliding_attention": near} if types else near


def sampled_cross_entropy(hidden, targets, head, likely, drawn):
    """The cross-entropy of a softmax over the whole vocabulary whose unlikely part is estimated: its sum over the targets.

    The denominator is exact over the tokens `likely`; what is `drawn` evenly from the others stands for all of these
    (importance sampling: Bengio and Senécal 2008, https://doi.org/10.1109/TNN.2007.912312).

    Args:
        hidden: (n, C). targets: (n), of which each is in `likely`. head: (V, C).
        likely: sorted token ids. drawn: ids of others, none twice.
    """
    logits = F.linear(hidden, head[torch.cat([likely, drawn])]).float()
    if len(drawn):
        logits[:, len(likely):] += math.log((len(head) - len(likely)) / len(drawn))
    return F.cross_entropy(logits, torch.searchsorted(likely, targets), reduction="sum")


# ---- the samples -----------------------------------------------------------------------------------------------


@dataclass
class Sample:
    image: int  # its number
    query: str
    answer: str


def read_instructions(path, images):
    """An instructions file -> [(kind, Sample), …]. Raises UserError."""
    numbers, found = {image.path.name: number for number, image in enumerate(images)}, []
    for name, question in read_questions(path):
        if name not in numbers:
            raise UserError(f"{path} asks about {name}, which is not in train.json")
        query = " ".join(question.query.replace("<image>", " ").split())  # LLaVA's own data has it where the picture comes
        found.append((question.kind, Sample(numbers[name], query, question.answer)))
    return found


def instruction_samples(settings, images):
    """The samples of stage 2 by group: {group: [Sample, …]}. Raises UserError where a group of --mix has none."""
    if settings.instructions:
        found = read_instructions(settings.instructions, images)
    else:
        found = [(question.kind, Sample(number, question.query, question.answer))
                 for number, question in derive_all(images, settings.seed)]
    groups = {}
    for kind, sample in found:
        groups.setdefault(GROUPS.get(kind, kind), []).append(sample)
    rng = random.Random(settings.seed)
    groups.setdefault("caption", [Sample(number, rng.choice(CAPTION_QUERIES), text) for number, image in enumerate(images)
                                  for text in clean_captions(image)])
    if lacking := [kind for kind in settings.parts() if not groups.get(kind)]:
        raise UserError(f"--mix names {lacking[0]}, of which there are no samples: there are {', '.join(sorted(groups))}")
    return groups


def draw_epoch(groups, parts, count, generator):
    """`count` samples, so many of each group, each group gone through before any of its samples comes again."""
    counts = {kind: int(part * count) for kind, part in parts.items()}
    counts[max(parts, key=parts.get)] += count - sum(counts.values())
    drawn = []
    for kind, number in counts.items():
        samples = groups[kind]
        rounds = [torch.randperm(len(samples), generator=generator) for _ in range(-(-number // len(samples)))]
        drawn += [samples[i] for i in torch.cat(rounds)[:number].tolist()] if number else []
    return [drawn[i] for i in torch.randperm(len(drawn), generator=generator).tolist()]


def by_picture(samples, most):
    """Samples in rows of at most so many, each row about one picture, in the order in which pictures come first."""
    rows, open_rows = [], {}
    for sample in samples:
        row = open_rows.get(sample.image)
        if row is None or len(row) == most:
            rows.append(row := [])
            open_rows[sample.image] = row
        row.append(sample)
    return rows


class Trainer:
    """One run: the model, the samples, the optimizer and the place that it has come to."""

    def __init__(self, vision_name, language_name, output, settings, device=None):
        self.settings, self.output, self.names = settings, Path(output), (vision_name, language_name)
        self.processes = Processes(device)
        self.device = self.processes.device
        self.dtype = pick_precision(self.device, settings.precision)
        if self.dtype == torch.float16:
            raise UserError("--precision fp16 is not enough for a large language model: choose bf16 or fp32")
        if settings.fsdp and self.processes.count == 1:
            raise UserError("--fsdp shards over several processes: start them with accelerate launch")
        check_folder(self.output)
        self.state_file = self.output.with_name(f"{self.output.name}.state.pt")
        check_writable(self.state_file)
        start = read_trained(settings.init) if settings.init else None
        data = Path(settings.data)
        self.images = [image for image in read_captions(data / "train.json", data / "images" / "train")
                       if clean_captions(image)]
        if not self.images:
            raise UserError(f"{data / 'train.json'} has no image with a caption")
        self.groups = instruction_samples(settings, self.images) if settings.stage2_epochs else {}
        self.model, self.processor = build(vision_name, language_name, settings)
        self.trained = trained_parameters(self.model, settings.train_vision_layers)
        self.frozen = frozen_hash(self.model, self.trained)
        if start:
            check_trained(settings.init, *start, self.trained, self.frozen, self.names)
            self.model.load_state_dict(start[0], strict=False)
        else:
            first = [load_picture(image.path, self.size()) for image in self.images[:FIT_PICTURES]]
            fit_projection(self.model, self.processor.image_processor(first, return_tensors="pt")["pixel_values"])
        self.before, self.after = query_form(self.processor.tokenizer, self.model.config.text_config.model_type)
        if self.device == "cuda":  # what is frozen needs no more than half precision
            for name, parameter in self.model.named_parameters():
                if name not in self.trained:
                    parameter.data = parameter.data.to(self.dtype)
        self.model.to(self.device).eval()
        self.processes.share(self.trained.values())
        if settings.fsdp:
            self.shard()
        projection = [value for name, value in self.trained.items() if "projector" in name]
        vision = [value for name, value in self.trained.items() if "projector" not in name]
        factor = settings.vision_learning_rate / settings.learning_rate
        self.optimizer = adamw([(projection, 1.0), (vision, factor)], settings.learning_rate, settings.weight_decay)
        plans = [self.plan(False, settings.stage1_epochs), self.plan(True, settings.stage2_epochs)]
        self.batches, self.stages = sum((batches for batches, _ in plans), []), [len(batches) for batches, _ in plans]
        self.warmups = [max(1, min(len(batches) // 2, round(settings.warmup_epochs * epoch))) for batches, epoch in plans]
        self.same = what_matters(settings, "save_minutes", "max_hours", "accumulation", "fsdp") | {
            "frozen weights": self.frozen, "samples": hashlib.sha256(repr(self.batches).encode()).hexdigest()}
        self.progress = load_state(self.state_file, self.same, self.optimizer, self.trained, self.device) or {
            "step": 0, "seconds": 0.0, "losses": []}
        self.likely, self.others = self.vocabulary() if settings.head_sample else (None, None)

    def size(self):
        """Pixels a side of the square that pictures are brought to."""
        return self.processor.image_processor.size["height"]

    def vocabulary(self):
        """Ids of the tokens that answers have, with the end of text and the commonest of all, sorted; and of all others."""
        tokenizer, total = self.processor.tokenizer, self.model.lm_head.weight.shape[0]
        answers = [text for image in self.images for text in clean_captions(image)]
        answers += [sample.answer for samples in self.groups.values() for sample in samples]
        found = {token for row in tokenizer(answers, add_special_tokens=False)["input_ids"] for token in row}
        likely = torch.tensor(sorted(found | {tokenizer.eos_token_id} | {*range(min(COMMON_TOKENS, total))}))
        others = torch.ones(total, dtype=torch.bool)
        others[likely] = False
        return likely.to(self.device), others.nonzero().squeeze(1)

    def shard(self):
        """Spread the language model's layers over the processes (FSDP); what is trained stays whole on each."""
        from torch.distributed.fsdp import fully_shard

        for layer in self.model.model.language_model.layers:
            fully_shard(layer, reshard_after_forward=True)

    # ---- samples ----

    def plan(self, second, epochs):
        """A stage's batches, each a list of rows, and each row a list of samples about one picture; and how many an epoch has."""
        size, most, batches, epoch_steps = self.settings.batch_size, self.settings.per_picture, [], 0
        for epoch in range(math.ceil(epochs)):
            generator = torch.Generator().manual_seed(self.settings.seed * 1_000_003 + 1009 * second + epoch)
            if second:
                rows = by_picture(draw_epoch(self.groups, self.settings.parts(), most * len(self.images), generator), most)
            else:  # each picture once
                rows = []
                for number in torch.randperm(len(self.images), generator=generator).tolist():
                    captions = clean_captions(self.images[number])
                    order = torch.randperm(len(captions), generator=generator)[:most].tolist()
                    rows.append([Sample(number, "", captions[i]) for i in order])
            steps = -(-len(rows) // size)
            epoch_steps = epoch_steps or steps
            part = min(1.0, epochs - epoch)  # of the last epoch, perhaps
            batches += [rows[place * size:(place + 1) * size] for place in range(round(part * steps))]
        return batches, epoch_steps

    def text(self, sample):
        """What stands before the answer; the processor puts in as many image tokens as there are patches."""
        return f"{self.before}{self.processor.image_token}{' ' + sample.query if sample.query else ''}{self.after}"

    def collate(self, rows):
        """Rows of samples -> pixel_values, and tensors (B, T), padded on the right: input_ids, labels, position_ids and
        branches: 0 for the part with the picture, then 1 for the first sample's, 2, …; -1 behind the end. Raises UserError."""
        tokenizer = self.processor.tokenizer
        pictures = [load_picture(self.images[row[0].image].path, self.size()) for row in rows]
        asked = self.processor(images=pictures, text=[self.text(row[0]) for row in rows])
        columns = {"input_ids": [], "labels": [], "position_ids": [], "branches": []}
        for ids, row in zip(asked["input_ids"], rows):
            for name, values in self.columns(ids, row).items():
                columns[name].append(values)
        longest = max(map(len, columns["labels"]))
        padding = {"input_ids": tokenizer.pad_token_id, "labels": IGNORE, "position_ids": 0, "branches": -1}
        return {name: torch.tensor([values + [padding[name]] * (longest - len(values)) for values in column])
                for name, column in columns.items()} | {
            "pixel_values": torch.as_tensor(np.stack([np.asarray(picture) for picture in asked["pixel_values"]]))}

    def columns(self, asked, row):
        """A row's input_ids, labels, position_ids and branches; `asked`: the ids of its first question, with the picture's."""
        tokenizer, token = self.processor.tokenizer, self.processor.image_token_id
        shared = len(asked) - asked[::-1].index(token)  # up to the last image token
        found = {"input_ids": asked[:shared], "labels": [IGNORE] * shared, "position_ids": [*range(shared)],
                 "branches": [0] * shared}
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
        return found

    def pieces(self, step):
        """This process's part of a step's batch, cut for accumulation.

        Every process gets as many pieces, since they compute in step; one for which no row is left repeats the first,
        with nothing to learn.
        """
        rows, count = self.batches[step], self.processes.count
        mine = rows[self.processes.number::count]
        size = -(-len(rows) // (count * self.settings.accumulation))
        found = []
        for start in range(0, -(-len(rows) // count), size):
            piece = mine[start:start + size]
            inputs = self.collate(piece or rows[:1])
            if not piece:
                inputs["labels"] = torch.full_like(inputs["labels"], IGNORE)
            found.append(inputs)
        return found

    # ---- running ----

    def fit(self):
        """Train to the end and write the folder, or until it is time to stop. Returns whether the end was reached."""
        settings, progress, main = self.settings, self.progress, self.processes.main
        total = len(self.batches)
        log = TrainingLog(self.output.with_name(f"{self.output.name}.jsonl"), progress["step"]) if main else None
        if main:
            print(f"{len(self.images)} images, {sum(map(len, self.groups.values()))} instructions; "
                  f"{sum(p.numel() for p in self.trained.values()) / 1e6:.2f}M trained parameters of "
                  f"{sum(p.numel() for p in self.model.parameters()) / 1e6:.1f}M; {self.stages[0]} + {self.stages[1]} updates; "
                  f"{self.processes.count} x {self.device}, {str(self.dtype).removeprefix('torch.')}", flush=True)
        started = saved = time.monotonic()
        before, values = progress["seconds"], []
        todo = range(progress["step"], total)
        with Interruption(settings.max_hours) as interruption, tqdm(
                total=total, initial=progress["step"], unit="batch", desc="aligning", disable=not main) as bar:
            for step, pieces in zip(todo, ahead(self.pieces, todo)):
                value, rate = self.step(step, pieces)
                values.append(value)
                progress.update(step=step + 1, seconds=before + time.monotonic() - started)
                bar.update()
                if main and (step + 1) % LOG_STEPS == 0:
                    loss = sum(values) / len(values)
                    progress["losses"].append(loss)
                    log.write(step + 1, loss=loss, stage=1 + (step >= self.stages[0]), **{
                        "learning rate": rate, "updates per second": (step + 1) / progress["seconds"]})
                    bar.set_postfix(loss=f"{loss:.3f}")
                    values = []
                stop = self.processes.add(bool(interruption))
                if stop or time.monotonic() - saved > 60 * settings.save_minutes:
                    if main:
                        save_state(self.state_file, self.same, self.optimizer, self.trained, progress)
                    saved = time.monotonic()
                if stop:
                    if main:
                        print(f"stopped after {step + 1} of {total} updates: the same command goes on from there", flush=True)
                    return False
        if main:
            self.save()
            log.close(["loss", "learning rate"])
            self.state_file.unlink(missing_ok=True)
        self.processes.wait()
        return True

    def step(self, step, pieces):
        """One update. Returns the mean loss of a target token and the learning rate."""
        settings, second = self.settings, step >= self.stages[0]
        number, total = step - second * self.stages[0], self.stages[second]  # of this stage's updates
        targets = self.processes.add(sum((inputs["labels"] != IGNORE).sum().item() for inputs in pieces))
        value, drawn = 0.0, None
        if self.likely is not None:
            generator = torch.Generator().manual_seed((settings.seed << 32) + step)
            drawn = self.others[torch.randperm(len(self.others), generator=generator)[:settings.head_sample]].to(self.device)
        for inputs in pieces:
            inputs = {name: tensor.to(self.device) for name, tensor in inputs.items()}
            with autocast(self.device, self.dtype):
                loss = answer_loss(self.model, inputs, self.likely, drawn) / targets
            loss.backward()
            value += loss.item()
        self.processes.add_gradients(self.trained.values())
        peak = settings.stage2_learning_rate if second else settings.learning_rate
        rate = peak * cosine(number, total, self.warmups[second])
        step_optimizer(self.optimizer, rate, settings.clip)
        return self.processes.add(value), rate

    def save(self):
        """Write the complete model with its processor, and what was trained alone, in fp16; whole or not at all."""
        trained = {name: value.detach().to("cpu", torch.float16).contiguous() for name, value in self.trained.items()}
        write_llava(*build(*self.names, self.settings), self.output, trained, self.same)


# ---- folders ---------------------------------------------------------------------------------------------------


def write_llava(model, processor, folder, trained, training):
    """Write what `build` built as transformers reads it, in fp16, with what was trained in it, and how, alone beside it; whole or
    not at all."""
    model.load_state_dict(trained, strict=False)
    staging = folder.with_name(f"{folder.name}.tmp")
    model.half().save_pretrained(staging)
    processor.save_pretrained(staging)
    save_file(trained, staging / "trained.safetensors", {"training": json.dumps(training)})
    make_ordinary(*staging.glob("*.safetensors"))
    if folder.exists():
        folder.rmdir()  # it was empty
    staging.rename(folder)
    print(f"wrote {folder}", flush=True)


def check_folder(folder):
    """Raise UserError unless a new folder can be written there."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is there already: delete it or name another folder")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot create the folder {folder.parent}: {error.strerror}") from None


def assemble(vision_name, language_name, trained_file, folder):
    """Write the LLaVA of two models and of the trained.safetensors that a run of this script left. Raises UserError."""
    check_folder(folder := Path(folder))
    trained, training = read_trained(trained_file)
    settings = Settings(**{field.name: training[field.name] for field in fields(Settings) if field.name in training})
    model, processor = build(vision_name, language_name, settings)
    check_trained(trained_file, trained, training, trained_parameters(model, settings.train_vision_layers),
                  frozen_hash(model, trained), (vision_name, language_name))
    write_llava(model, processor, folder, trained, training)


def read_trained(file):
    """A trained.safetensors -> {name: tensor} and how it was trained. Raises UserError."""
    state = read_weights(file, "trained part of a LLaVA")
    with safe_open(file, "pt") as content:
        training = json.loads((content.metadata() or {}).get("training", "{}"))
    if "frozen weights" not in training:
        raise UserError(f"{file} is not the trained part of a LLaVA, as p4_align.py writes it")
    return state, training


def check_trained(file, state, training, parameters, frozen, names):
    """Raise UserError unless what `read_trained` gave is of these parameters, and was trained beside these frozen weights."""
    if {name: value.shape for name, value in state.items()} != {name: value.shape for name, value in parameters.items()}:
        raise UserError(f"{file} does not fit {names[0]} with {names[1]}, or other layers were trained")
    if frozen != training["frozen weights"]:
        raise UserError(f"{file} was trained with other weights than those of {names[0]} with {names[1]}")


def frozen_hash(model, trained):
    """content_hash of all that is not trained but position embeddings: those may be interpolated, to other bits elsewhere."""
    return content_hash({name: value for name, value in model.state_dict().items()
                         if name not in trained and "position_embedding" not in name})


def main():
    parser = ArgumentParser(description="Make a LLaVA: train the projection between a vision and a language model.")
    parser.add_argument("vision", help="vision model of transformers: folder, or name on the model hub")
    parser.add_argument("language", help="causal language model: folder, or name on the model hub")
    parser.add_argument("output", help="folder to write")
    add_options(parser, Settings, **HELP)
    arguments = parser.parse_args()
    Trainer(arguments.vision, arguments.language, arguments.output, take_options(arguments, Settings)).fit()


if __name__ == "__main__":
    run(main)
