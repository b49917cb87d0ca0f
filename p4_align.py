"""Make a LLaVA: train the projection between a frozen vision tower and a frozen language model.

    python3 p4_align.py <vision model> <language model> <folder to write> --data data
    accelerate launch --num_processes 8 p4_align.py Salesforce/blip2-opt-2.7b meta-llama/Llama-2-7b-hf <folder> \\
        --config configs/p4/blip2_llama2.yaml

After LLaVA (Liu et al. 2023, https://arxiv.org/abs/2304.08485, and its 1.5: https://arxiv.org/abs/2310.03744), from a vision
transformer and a causal language model of `transformers` (folders, or names on the model hub; for the former also a ViT-S/14
that p4_pretrain_vit.py wrote, or the name of an encoder of encoder.py, such as tf_efficientnet_lite2+tf_efficientnet_lite1;
for the latter most with the architecture of Llama, Qwen, Mistral or Gemma 3), in two stages:
captions without a question, then questions and instructions, mixed by kind. Before these, with --word_epochs, image tokens
learn to be similar to the embeddings of words (word_targets.py). Only answers count in the loss. The output
is a complete LlavaForConditionalGeneration with its processor, and in the same folder trained.safetensors with the trained parameters only,
from which `assemble` builds the same model again.

All questions about one picture go through the model in one row: the picture's tokens once, then a branch for each question with
its answer, which attends to the picture and to itself but to no other branch. The loss is that of separate rows, for a fraction of the work.

A run that was killed, or stopped by SIGTERM or --max_hours, resumes at the same sample when the same command is given again, on
any number of processes.

Shapes: B rows, N image tokens of each, T positions of a row, C the language model's width, V its vocabulary.
"""

import hashlib
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from cli import ArgumentParser, UserError, add_options, check_settings, option, run, take_options, with_config
from dataset import IGNORE, clean_captions, read_captions
from devices import Processes, autocast, pick_precision, shard
from files import check_writable
from images import ahead
from llava_data import Rows, cached_features
from llava_training import (
    LlavaOptions,
    answer_loss,
    build,
    check_folder,
    check_trained,
    checkpoint_layers,
    fit_projection,
    frozen_hash,
    image_tokens,
    read_trained,
    scale_image_tokens,
    trained_parameters,
    write_llava,
)
from questions import Sample, by_picture, instruction_samples, sample_epoch
from training import Interruption, Run, adamw, comparable, cosine
from word_targets import WordTargets

WORD_BATCH = 64  # images of an update of the stage before stage 1
FIT_PICTURES = 32  # that a fresh projection is fitted to
WORDS, CAPTIONS, QUESTIONS = range(3)  # the stages: the one before stage 1, with --word_epochs; 1; 2
SEEDS = 500_009, 0, 1009  # offsets of the stages' random seeds


@dataclass
class Settings(LlavaOptions):
    data: tuple = option(("data",), "folders with train.json and images/train")
    instructions: tuple = option(
        (), "JSON lists of {image, kind, query, answer}, or of people's {image, folder, question, answer}, for stage 2; default: "
        "derived from the captions (p4_questions.py)")
    init: str = option("", "trained.safetensors of an earlier run with the same models and layers, to start from")
    mix: tuple = option(
        ("qa=0.6", "relation=0.2", "detail=0.2", "caption=0"), "fractions of stage 2: qa, relation, detail, caption, or other kinds of instructions")
    word_epochs: float = option(
        0.0, "before stage 1, over the images: image tokens learn to be similar to the words of captions, without running the language model")
    stage1_epochs: float = option(1.0, "of captions without a question, over the images")
    stage2_epochs: float = option(1.0, "of questions and instructions; an epoch has `per_picture` times as many as there are images")
    batch_size: int = option(32, "pictures per update, over all processes")
    stage2_batch_size: int = option(0, "the same in stage 2; 0: as in stage 1")
    per_picture: int = option(4, "maximum number of samples in a picture's row")
    accumulation: int = option(1, "number of parts that each batch is split into, to save memory")
    learning_rate: float = option(1e-3, "of the projection in stage 1")
    stage2_learning_rate: float = option(1e-3, "of the projection in stage 2")
    vision_learning_rate: float = option(
        5e-5, "of the trained vision layers in stage 1; it is scaled as the projection's")
    weight_decay: float = 0.0
    warmup_epochs: float = option(1.0, "of linear warm-up in each stage; half a cosine follows")
    first_learning_rate: float = option(0.0, "at the start of each stage's warm-up")
    last_learning_rate: float = option(0.0, "at the end of stage 1")
    stage2_last_learning_rate: float = option(0.0, "at the end of stage 2")
    clip: float = option(1.0, "maximum gradient norm")
    precision: str = option("auto", "auto (bf16 on CUDA, else fp32), fp32 or bf16")
    fsdp: bool = option(False, "shard the language model over the processes")
    weigh: str = option("tokens", "what has equal weight in the loss: tokens, or answers, so that long answers do not outweigh a yes")
    head_sample: int = option(
        0, "estimate the softmax's denominator with so many tokens, sampled for each update, from those that occur in no answer; 0: the full softmax")
    max_tokens: int = option(96, "of an answer; longer ones are truncated")
    cache: str = option("", "folder for the features of a frozen encoder; default: run it in every step")
    views: int = option(1, "of each image: 1, the image as it is; more: random crops too, every other one mirrored")
    max_hours: float = option(0.0, "stop after so many hours, ready to resume; 0: no limit")

    def __post_init__(self):
        self.mix = tuple(self.mix)
        self.data, self.instructions = (tuple(str(path) for path in np.atleast_1d(paths) if path)
                                        for paths in (self.data, self.instructions))
        check_settings(self, ("batch_size", "per_picture", "accumulation", "max_tokens", "views", "own_width"), signed=("vision_layer",))
        if self.own_layers and self.own_width % 64:
            raise UserError(f"--own_width is {self.own_width}, but must be a multiple of 64, the width of a head")
        if self.projection not in ("linear", "mlp"):
            raise UserError(f"--projection is {self.projection}: choose from linear, mlp")
        if self.weigh not in ("tokens", "answers"):
            raise UserError(f"--weigh is {self.weigh}: choose from tokens, answers")
        if not self.data:
            raise UserError("--data names at least one folder")
        if not self.stage1_epochs + self.stage2_epochs:
            raise UserError("--stage1_epochs or --stage2_epochs must be above 0")
        if min(self.learning_rate, self.stage2_learning_rate, self.vision_learning_rate) <= 0 or min(
                self.first_learning_rate, self.last_learning_rate, self.stage2_last_learning_rate) < 0:
            raise UserError("learning rates must be above 0, those that a stage begins or ends with at least 0")
        self.parts()

    def parts(self):
        """{kind: its fraction of stage 2}, which sum to 1. Raises UserError."""
        try:
            parts = {kind: float(part) for kind, part in (entry.split("=") for entry in self.mix)}
        except ValueError:
            raise UserError("--mix takes kind=part, such as qa=0.6 relation=0.2 detail=0.2") from None
        if min(parts.values(), default=-1) < 0 or not sum(parts.values()):
            raise UserError("--mix needs a part of at least 0 for each kind, and one above")
        return {kind: part / sum(parts.values()) for kind, part in parts.items() if part}


class AlignmentTrainer:
    """One run: the model, the samples, the optimizer and the progress."""

    def __init__(self, vision_name, language_name, output, settings, device=None):
        self.settings, self.output, self.names, begun = settings, Path(output), (vision_name, language_name), time.monotonic()
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
        self.images = [image for data in map(Path, settings.data)
                       for image in read_captions(data / "train.json", data / "images" / "train") if clean_captions(image)]
        if not self.images:
            raise UserError(f"{Path(settings.data[0]) / 'train.json'} has no image with a caption")
        self.captioned = len(self.images)  # captioned images come first, then those with questions only
        self.groups = instruction_samples(settings, self.images) if settings.stage2_epochs else {}
        self.model, self.processor = build(vision_name, language_name, settings)
        with Interruption(settings.max_hours, begun) as stop:
            features = cached_features(self.model, str(vision_name), self.images, settings, self.device, stop) if settings.cache else None
        self.rows = Rows(self.model, self.processor, self.images, settings, features)
        self.words = None
        if settings.word_epochs:
            self.words = WordTargets(self.images[:self.captioned], self.processor.tokenizer, self.model.get_input_embeddings())
        self.trained = trained_parameters(self.model, settings.train_vision_layers)
        self.frozen = frozen_hash(self.model, self.trained)
        if start:
            check_trained(settings.init, *start, self.trained, self.frozen, self.names)
            self.model.load_state_dict(start[0], strict=False)
        else:
            first = range(min(len(self.images), FIT_PICTURES))
            fit_projection(self.model, self.rows.pixels([self.rows.picture(number) for number in first]))
        if self.device == "cuda":  # frozen weights can be in half precision
            for name, parameter in self.model.named_parameters():
                if name not in self.trained:
                    parameter.data = parameter.data.to(self.dtype)
        if settings.fsdp:  # moves a layer at a time, so that no GPU ever holds the whole language model
            shard(self.model.model.language_model.layers)
        self.model.to(self.device).eval()
        checkpoint_layers(self.model)
        self.processes.share(self.trained.values())
        projection = [value for name, value in self.trained.items() if "projector" in name]
        vision = [value for name, value in self.trained.items() if "projector" not in name]
        factor = settings.vision_learning_rate / settings.learning_rate
        self.optimizer = adamw([(projection, 1.0), (vision, factor)], settings.learning_rate, settings.weight_decay)
        plans = [self.plan(CAPTIONS, settings.stage1_epochs), self.plan(QUESTIONS, settings.stage2_epochs)]
        self.stages = [len(batches) for batches, _ in plans]
        first, _ = self.plan(WORDS, settings.word_epochs)
        self.batches, self.word_steps = sum((batches for batches, _ in plans), first), len(first)
        self.warmups = [max(1, min(len(batches) // 2, round(settings.warmup_epochs * epoch))) for batches, epoch in plans]
        self.same = comparable(settings, "max_hours", "accumulation", "fsdp") | {
            "frozen weights": self.frozen, "samples": hashlib.sha256(repr(self.batches).encode()).hexdigest()}
        self.run = Run(self.state_file, self.same, self.trained, self.optimizer, processes=self.processes, clip=settings.clip,
                       max_hours=settings.max_hours, since=begun,
                       log=self.output.with_name(f"{self.output.name}.jsonl"))
        self.progress = self.run.progress
        self.likely, self.others = self.rows.vocabulary(self.groups, self.device) if settings.head_sample else (None, None)

    # ---- samples ----

    def plan(self, stage, epochs):
        """A stage's batches, each a list of rows, and each row a list of samples about one picture; and the batches per epoch."""
        batches, epoch_steps, settings = [], 0, self.settings
        size = {WORDS: WORD_BATCH, CAPTIONS: settings.batch_size, QUESTIONS: settings.stage2_batch_size or settings.batch_size}[stage]
        for epoch in range(math.ceil(epochs)):
            rows = self.sample_rows(stage, torch.Generator().manual_seed(settings.seed * 1_000_003 + SEEDS[stage] + epoch))
            steps = -(-len(rows) // size)
            epoch_steps = epoch_steps or steps
            part = min(1.0, epochs - epoch)  # the last epoch may be a fraction
            batches += [rows[place * size:(place + 1) * size] for place in range(round(part * steps))]
        return batches, epoch_steps

    def sample_rows(self, stage, generator):
        """The rows of an epoch: each picture once, with an empty sample (WORDS) or its captions, or samples of the questions."""
        most = self.settings.per_picture
        if stage == QUESTIONS:
            return by_picture(sample_epoch(self.groups, self.settings.parts(), most * self.captioned, generator), most)
        numbers = torch.randperm(self.captioned, generator=generator).tolist()
        if stage == WORDS:
            return [[Sample(number, "", "")] for number in numbers]
        rows = []
        for number in numbers:
            captions = clean_captions(self.images[number])
            order = torch.randperm(len(captions), generator=generator)[:most].tolist()
            rows.append([Sample(number, "", captions[i]) for i in order])
        return rows

    def pieces(self, step):
        """This process's part of a step's batch, split for accumulation. A piece for which no row is left gets the batch's first row
        with no targets."""
        rows, found = self.batches[step], []
        views = np.random.default_rng((self.settings.seed, step)).integers(self.settings.views, size=len(rows))
        for piece in self.processes.pieces([*zip(rows, views)], self.settings.accumulation):
            own, view = zip(*piece or [(rows[0], 0)])
            if step < self.word_steps:
                numbers = [row[0].image for row in own]
                shares = self.words.shares(numbers)
                found.append({"pixel_values": self.rows.see(numbers, view), "shares": shares if piece else torch.zeros_like(shares)})
                continue
            inputs = self.rows.collate(own, view)
            if not piece:
                inputs["labels"], inputs["weights"] = torch.full_like(inputs["labels"], IGNORE), torch.zeros_like(inputs["weights"])
            found.append(inputs)
        return found

    # ---- running ----

    def fit(self):
        """Train to the end and write the folder, or stop at the time limit. Returns whether the end was reached."""
        total, main = len(self.batches), self.processes.main
        todo = range(self.progress["step"], total)
        if self.settings.own_layers:
            self.model.model.vision_tower.layers.train()  # for their dropout
        before = f"{self.word_steps} updates for words, then " if self.words else ""
        with self.run:
            if main:
                print(f"{len(self.images)} images, {sum(map(len, self.groups.values()))} instructions; "
                      f"{sum(p.numel() for p in self.trained.values()) / 1e6:.2f}M trained parameters of "
                      f"{sum(p.numel() for p in self.model.parameters()) / 1e6:.1f}M; {before}{self.stages[0]} + {self.stages[1]} updates; "
                      f"{self.processes.count} x {self.device}, {str(self.dtype).removeprefix('torch.')}", flush=True)
            for step, pieces in zip(self.run.steps(total, description="aligning"), ahead(self.pieces, todo)):
                self.step(step, pieces)
        if self.run.stopped:
            return False
        if main:
            self.save()
        self.run.finish(["loss", "learning rate"])
        return True

    def step(self, step, pieces):
        """One update. Returns the mean loss of a target token."""
        torch.manual_seed((self.settings.seed << 32) + step * self.processes.count + self.processes.number)  # dropout
        if step < self.word_steps:
            return self.word_step(step, pieces)
        settings, second = self.settings, step - self.word_steps >= self.stages[0]
        number, total = step - self.word_steps - second * self.stages[0], self.stages[second]  # of this stage's updates
        targets = self.processes.add(sum(inputs["weights"].sum().item() for inputs in pieces))
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
        value = self.processes.add(value)
        peak, last = ((settings.stage2_learning_rate, settings.stage2_last_learning_rate) if second
                      else (settings.learning_rate, settings.last_learning_rate))
        self.run.about = {"stage": 1 + second}
        floor = settings.first_learning_rate if number < self.warmups[second] else last
        self.run.update(floor + (peak - floor) * cosine(number, total, self.warmups[second]), loss=value)
        return value

    def word_step(self, step, pieces):
        """One update of the stage without the language model. Returns the mean loss of a picture's words."""
        pictures, value, size, tokens_seen = len(self.batches[step]), 0.0, 0.0, 0
        for inputs in pieces:
            inputs = {name: tensor.to(self.device) for name, tensor in inputs.items()}
            with autocast(self.device, self.dtype):
                tokens = image_tokens(self.model, inputs["pixel_values"])
            loss = self.words.loss(tokens, inputs["shares"]) / pictures
            loss.backward()
            value, size, tokens_seen = value + loss.item(), size + tokens.detach().norm(dim=-1).sum().item(), tokens_seen + tokens[..., 0].numel()
        value, size, tokens_seen = map(self.processes.add, (value, size, tokens_seen))
        self.run.about = {"stage": 0}
        self.run.update(self.settings.learning_rate * cosine(step, self.word_steps, min(50, self.word_steps // 2)), loss=value)
        if step == self.word_steps - 1:  # directions are learnt; now scale tokens to the length of words
            scale_image_tokens(self.model, self.words.norm * tokens_seen / size)
        return value

    def save(self):
        """Write the complete model with its processor, and the trained parameters separately, in fp16; all or nothing."""
        trained = {name: value.detach().to("cpu", torch.float16).contiguous() for name, value in self.trained.items()}
        write_llava(*build(*self.names, self.settings), self.output, trained, self.same)


def main():
    parser = ArgumentParser(description="Make a LLaVA: train the projection between a vision and a language model.")
    parser.add_argument("vision", help="vision model of transformers, folder or name on the model hub; a ViT's file; or an encoder's name")
    parser.add_argument("language", help="causal language model: folder, or name on the model hub")
    parser.add_argument("output", help="folder to write")
    parser.add_argument("--config", help="YAML file of the options below, which the command line overrides")
    add_options(parser, Settings)
    arguments = parser.parse_args(with_config(None))
    AlignmentTrainer(arguments.vision, arguments.language, arguments.output, take_options(arguments, Settings)).fit()


if __name__ == "__main__":
    run(main)
