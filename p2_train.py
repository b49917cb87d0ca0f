"""Train the captioner: projection, cross-attention and PEFT on the features of the frozen encoder.

    python3 p2_train.py --data data --decoder weights/decoder_model.bin
    python3 p2_train.py --data flickr8k coco --data_weights 1 0.5
    python3 p2_train.py --concepts 8 --text captions.txt
    python3 p2_train.py --config configs/clip_large_lora8.yaml
    accelerate launch --num_processes 8 p2_train.py …

`data` are folders in the course's layout: train.json in COCO's caption form and images/train. The last 500 images of each
are held out; the epoch with the best CIDEr on them becomes the checkpoint. The epochs of cross-entropy are followed by
`--scst_epochs` of self-critical training, which optimise CIDEr itself. Captions of `--text`, one per line, need no pictures: in place
of a picture, the captioner gets the concepts that would be recognised in one (CapDec: Nukrai et al. 2022, arXiv:2211.00575; ViECap).

A run that was killed, or stopped by SIGTERM or --max_hours, resumes when the same command is given again, on any number
of processes: on a CPU bit for bit, if the number is the same.
"""

import math
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from captioner import MAX_TRAINED, Captioner, CaptionerConfig, caption_features, count_trained
from checkpoints import start_from
from cli import ArgumentParser, UserError, add_options, check_settings, option, run, take_options, with_config
from clip_small import Folds
from dataset import IGNORE, CaptionData, Mixture, TextData, bucketed_batches, data_digest, token_ids
from devices import Processes, autocast, memory_in_use, pick_precision, shard, unsharded
from features import SomeFeatures, features_of
from generation import GenerationConfig
from images import ahead
from metrics import cider, tokenize
from objectives import TEMPERATURE, CrossEntropy, Reward, SelfCritical, TextCrossEntropy, look_around
from runtime import RUNTIME_HELP, pick_runtime
from tokenizer import BPETokenizer
from training import Interruption, MovingAverage, Run, TrainingLog, adamw, comparable, cosine, prepare_output

WARMUP = 0.02  # fraction of a stage's steps; short, since cross-attention, LoRA and adapters start as no-ops
CLIP = 1.0  # gradient norm, which limits the damage of a single odd batch
SHOWN = 3  # selection images whose captions are printed after each epoch


@dataclass
class Settings:
    data: tuple = option(("data",), "folders with train.json and images/train")
    data_weights: tuple = option(
        (), "how often each folder's images are used per epoch: 0.5, half of them; 2, each twice; default: once")
    text: tuple = option((), "files of captions without pictures, one per line")
    text_batch_size: int = option(40, "captions without pictures per batch of images")
    text_weight: float = option(1.0, "weight of the loss on captions without pictures")
    folds: str = option("", "for --meaning and --scst_clip: the output of p4_clip.py --folds, since our CLIP was trained on these images")
    decoder: str = option("weights/decoder_small.safetensors", "GPT-2 weights, .bin or .safetensors")
    output: str = option("checkpoints/captioner.safetensors", "the checkpoint; beside it the log (.jsonl) and its curves (.png)")
    cache: str = option("cache", "folder for the encoder's features; empty: run the encoder in every step, which is much slower")
    runtime: str = option("auto", RUNTIME_HELP)
    views: int = option(4, "of each image in the cache: 1, the image as it is; more: random crops too, every other one mirrored")
    init: str = option(
        "", "checkpoint to start from, of the same model options; its encoder may be the first part of this one")
    fusion_epochs: int = option(0, "of cross-entropy that train the projection and cross-attention only, before PEFT")
    epochs: int = option(9, "of cross-entropy")
    batch_size: int = option(8, "images per update, over all processes, each with all its captions")
    accumulation: int = option(1, "number of parts that each batch is split into, to save memory")
    precision: str = option("auto", "auto (bf16 on CUDA, else fp32), fp32, bf16 or fp16")
    fsdp: bool = option(False, "shard the frozen decoder over the processes")
    max_tokens: int = option(64, "longer captions are truncated")
    learning_rate: float = 1.2e-3
    fusion_learning_rate: float = option(0.0, "of the projection and cross-attention; 0: as learning_rate")
    weight_decay: float = 0.1
    average: float = option(0.999, "decay of the moving average of the weights, which is what is saved; 0: save the last step's weights")
    label_smoothing: float = option(0.1, "of the targets of cross-entropy")
    scst_epochs: int = option(4, "of self-critical training on CIDEr, after those of cross-entropy")
    scst_learning_rate: float = 2e-4
    scst_samples: int = option(5, "captions sampled per image")
    scst_clip: float = option(0.0, "weight of our CLIP's image-text cosine in the reward, beside CIDEr")
    scst_chair: float = option(0.0, "penalty for each object of COCO's 80 kinds that a caption mentions and no reference does (chair.py)")
    selection: tuple = option(
        (500,), "images held out at the end of each train.json to select checkpoints on: one number, or one per folder; 0: train "
        "on all and keep the last epoch")
    seed: int = 0
    max_hours: float = option(0.0, "stop after so many hours, ready to resume; 0: no limit")
    tensorboard: str = option("", "folder for TensorBoard's files; empty: none")

    def __post_init__(self):
        self.data, self.text = (tuple(map(str, np.atleast_1d(paths))) for paths in (self.data, self.text))
        try:
            self.data_weights, self.selection = tuple(map(float, self.data_weights)), tuple(map(int, np.atleast_1d(self.selection)))
        except ValueError as error:
            raise UserError(f"--data_weights and --selection take numbers: {error}") from None
        if not self.data or len(self.data_weights) not in (0, len(self.data)) or not all(
                0 < weight < math.inf for weight in self.data_weights):
            raise UserError("--data names at least one folder, --data_weights none or one number above 0 for each")
        check_settings(self, ("batch_size", "text_batch_size", "accumulation", "views", "max_tokens"), ("label_smoothing", "average"))
        if self.learning_rate <= 0:
            raise UserError("--learning_rate must be above 0")
        if sum(self.selection) == 1 and len(self.selection) == len(self.data):
            raise UserError("--selection is one image, whose CIDEr is always 0: name 0, or at least 2")
        if self.fusion_epochs + self.epochs + self.scst_epochs < 1:
            raise UserError("--fusion_epochs, --epochs and --scst_epochs must be at least 1 together")
        if self.scst_samples < 2:
            raise UserError("--scst_samples must be at least 2: a caption is compared with the image's others")


class CaptionerTrainer:
    """One run: data, model, optimizer and progress.

    Every process holds all trained parameters and takes its part of each batch; gradients are summed. All randomness in a step
    depends only on the seed, the epoch, the step and the process, so that a resumed run is exact.
    """

    def __init__(self, config, settings, device=None):
        self.config, self.settings = config, settings
        self.processes = Processes(device)
        self.device = self.processes.device
        self.dtype = pick_precision(self.device, settings.precision, scaled=True)
        if (config.meaning or settings.scst_clip) and not settings.folds:
            raise UserError("--meaning and --scst_clip need --folds, which p4_clip.py makes: our CLIP was trained on the training images")
        if settings.text and not config.concepts:
            raise UserError("--text needs --concepts: without a picture, they are all that a caption is generated from")
        if settings.fsdp and self.processes.count == 1:
            raise UserError("--fsdp shards over several processes: start them with accelerate launch")
        if settings.tensorboard:
            TrainingLog.find_tensorboard()
        self.state_file = prepare_output(settings.output, self.processes.main)
        self.mixture = Mixture(settings.data, settings.selection, settings.data_weights)
        self.images, self.selection = self.mixture.images, self.mixture.selection

        torch.manual_seed(settings.seed)
        encoder = config.load_encoder(runtime=pick_runtime(settings.runtime, self.device), device=self.device)
        decoder = config.load_decoder(settings.decoder)
        max_tokens = min(settings.max_tokens, decoder.config.n_positions - 1)
        self.data = CaptionData(self.images, BPETokenizer(), max_tokens)
        self.text = TextData(settings.text, BPETokenizer(), max_tokens, config.concept_words(encoder), self.selection) if settings.text else None
        texts = [self.text.rows] if self.text else []
        self.model = Captioner(config, encoder, decoder, token_ids(self.data.rows + texts))
        if settings.fsdp:  # before it moves, so that no GPU ever holds the whole decoder
            shard(self.model.decoder.h, self.model.trained_parameters().values())
        self.model.to(self.device)
        if settings.init:
            for line in start_from(self.model, settings.init, settings.decoder):
                if self.processes.main:
                    print(line, flush=True)
        self.folds = Folds(settings.folds, self.model.judge.text_digest) if settings.folds else None
        self.data.embeddings, self.selection_embeddings = self.unseen_embeddings() if settings.folds else (None, None)
        self.trained = self.model.trained_parameters()
        fusion = [parameter for name, parameter in self.trained.items() if self.model.is_fusion(name)]
        peft = [parameter for name, parameter in self.trained.items() if not self.model.is_fusion(name)]
        factor = (settings.fusion_learning_rate or settings.learning_rate) / settings.learning_rate
        self.optimizer = adamw([(fusion, factor), (peft, 1.0)], settings.learning_rate, settings.weight_decay)
        self.scaler = torch.amp.GradScaler(self.device) if self.dtype == torch.float16 else None
        self.average = MovingAverage(self.trained, settings.average)
        self.steps = -(-self.mixture.size // settings.batch_size)
        self.restore()
        self.set_objectives()
        # Last, since it can take long: mistakes above are reported first.
        with Interruption(settings.max_hours, self.run.begun) as stop:
            features = [features_of(folder.paths(), encoder, settings.cache, settings.views, self.device, stop) for folder in self.mixture.folders]
        self.data.features, self.selection_features = (SomeFeatures(features, places) for places in self.mixture.places())
        self.references = tokenize({str(i): image.captions for i, image in enumerate(self.selection)}) if self.selection else {}
        if self.text or config.meaning:
            look_around(self.model, self.data, self.images, settings.seed, self.text_cross_entropy)

    # ---- set-up ----

    def unseen_embeddings(self):
        """Embeddings of training and selection images by a CLIP that was not trained on them: (n, views, width), and (n, width)."""
        training, selection = ([image.path for image in images] for images in (self.images, self.selection))
        return self.folds.of(training, self.settings.views), self.folds.of(selection)[:, 0] if selection else None

    def set_objectives(self):
        """The losses of a batch of images, and of one of texts."""
        settings, shared = self.settings, (self.model, self.processes, self.dtype, self.backward)
        self.cross_entropy = CrossEntropy(*shared, rows=self.data.rows, label_smoothing=settings.label_smoothing)
        self.text_cross_entropy = self.text and TextCrossEntropy(*shared, text=self.text, label_smoothing=settings.label_smoothing,
                                                                 weight=settings.text_weight)
        self.reward = Reward(self.images, self.model, settings.scst_samples, settings.scst_clip, settings.scst_chair)
        self.self_critical = SelfCritical(*shared, reward=self.reward, samples=settings.scst_samples, generating=self.generating)

    def restore(self):
        """Resume from the state of an interrupted run, if there is one."""
        settings = self.settings
        # Options that do not change the result are left out. The constants used to be options, so an older state may have other values.
        same = comparable(settings, "cache", "runtime", "max_hours", "tensorboard", "accumulation", "fsdp", "folds") | comparable(self.config) | {
            "warmup": WARMUP, "clip": CLIP, "scst_temperature": TEMPERATURE, "folds": f"of digest {self.folds.digest}" if self.folds else "",
            "training images": data_digest(self.images), "selection images": data_digest(self.selection),
            "texts": self.text.digest if self.text else "", "encoder's weights": self.model.encoder.weights_hash,
            "decoder's weights": self.model.decoder.weights_hash}
        self.run = Run(self.state_file, same, self.trained, self.optimizer, average=self.average, processes=self.processes,
                       scaler=self.scaler, clip=CLIP, max_hours=settings.max_hours, log=Path(settings.output).with_suffix(".jsonl"),
                       tensorboard=settings.tensorboard, first={"sum": 0.0, "memory": 0, "history": []})
        self.progress = self.run.progress
        if len(set(self.processes.gather([self.progress["step"]]))) > 1:
            raise UserError(f"some processes found no {self.state_file}: --output must be on a disk that all share")

    # ---- training ----

    def fit(self):
        """Train to the end, or until it is time to stop. Returns whether the end was reached."""
        settings, history = self.settings, self.progress["history"]
        stages = {"fusion": settings.fusion_epochs, "cross-entropy": settings.epochs, "scst": settings.scst_epochs}
        schedule = [(name, number, epochs) for name, epochs in stages.items() for number in range(epochs)]
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        with self.run:
            if self.processes.main:
                self.announce()
            if not self.run.resumed:
                self.run.save()
            for epoch in range(len(history), len(schedule)):
                self.train_epoch(epoch, schedule)
                if self.run.stopped:
                    return False
                self.finish_epoch(epoch)
        if self.processes.main and self.selection:
            best = max(history, key=lambda entry: entry["cider"])
            print(f"best: CIDEr {best['cider']:.4f} after epoch {best['epoch']}, in {settings.output}")
        self.run.finish(["loss", "reward", "CIDEr", "learning rate"])
        return True

    def announce(self):
        model = self.model
        texts = f", and {len(self.text.rows)} captions without images" if self.text else ""
        print(f"{len(self.images)} images to train on{texts}, {len(self.selection)} to select on, {len(model.token_ids)} tokens "
              f"occur; {model.num_trained() / 1e6:.2f}M trained parameters; {self.processes.count} x {self.device}, "
              f"{str(self.dtype).removeprefix('torch.')}", flush=True)
        for line in self.mixture.left_out() + self.data.left_out():
            print(line, flush=True)

    def train_epoch(self, epoch, schedule):
        """The rest of an epoch, or as much of it as there is time for."""
        settings, progress = self.settings, self.progress
        stage, number, stage_epochs = schedule[epoch]
        self.model.train_fusion_alone(stage == "fusion")
        self.model.train()
        objective, name = (self.self_critical, "reward") if stage == "scst" else (self.cross_entropy, "loss")
        peak = settings.scst_learning_rate if stage == "scst" else settings.learning_rate
        total = self.steps * stage_epochs
        warmup = max(1, int(WARMUP * total))

        generator = torch.Generator().manual_seed(settings.seed * 1000 + epoch)
        drawn = self.mixture.sample_epoch(generator)
        batches = [[drawn[i] for i in batch] for batch in
                   bucketed_batches([self.data.lengths[i] for i in drawn], settings.batch_size, generator)]
        views = torch.randint(settings.views, (len(self.images),), generator=generator).numpy()
        texts = self.text.sample_epoch(self.steps, settings.text_batch_size, generator) if self.text else None
        first, end = epoch * self.steps, (epoch + 1) * self.steps

        def prepare(step):
            return self.local_batch(batches[step - first], views), texts and self.text_cross_entropy.local_batch(
                texts[step - first], np.random.default_rng([settings.seed, epoch, step - first]))

        self.run.about = {"epoch": epoch + 1, "stage": stage}
        steps = self.run.steps(end, first, f"epoch {epoch + 1}/{len(schedule)}", f" in epoch {epoch + 1}")
        for step, (batch, text) in zip(steps, ahead(prepare, range(progress["step"], end))):
            place = step - first
            seed = np.random.SeedSequence([settings.seed, epoch, place, self.processes.number])
            torch.manual_seed(int(seed.generate_state(1)[0]))
            if text and stage != "scst":
                self.text_cross_entropy(*text)
            value = objective(batches[place], batch, (settings.seed * 1000 + epoch) * self.steps + place)
            self.run.update(peak * cosine(number * self.steps + place, total, warmup), len(batches[place]), **{name: value})
            progress["sum"] += value

    def local_batch(self, indices, views):
        """This process's part of a batch, split for accumulation: [(indices, features, embeddings, tokens, targets), …]. A piece for which
        no image is left has no indices; it gets the batch's first image with no targets."""
        pieces = []
        for piece in self.processes.pieces(indices, self.settings.accumulation):
            *seen, tokens, targets = self.data.batch(piece or indices[:1], views[piece or indices[:1]])
            pieces.append((piece, *seen, tokens, targets if piece else torch.full_like(targets, IGNORE)))
        return pieces

    def backward(self, loss):
        self.progress["memory"] = max(self.progress["memory"], memory_in_use(self.device))
        (self.scaler.scale(loss) if self.scaler else loss).backward()
        return loss.item()

    def generating(self):
        """A context in which the decoder is ready to generate: LoRA merged or, if it is sharded, gathered on each process."""
        return unsharded(self.model.decoder.h) if self.settings.fsdp else self.model.decoder.merged_lora()

    def finish_epoch(self, epoch):
        """Score the averaged weights on the selection images, keep them if they are the best so far, print samples, save the state."""
        settings, progress, history = self.settings, self.progress, self.progress["history"]
        self.run.note()
        self.run.save()  # since this can take long
        self.model.eval()
        name = "reward" if epoch >= settings.fusion_epochs + settings.epochs else "loss"
        entry = {"epoch": epoch + 1, name: progress["sum"] / self.steps}
        with self.average.in_place():
            captions = self.caption_selection()
            if captions:
                tokens = tokenize({str(i): [caption] for i, caption in enumerate(captions)})
                entry["cider"] = cider(self.references, tokens)[0]
            entry |= {"seconds": self.run.seconds, "memory": progress["memory"]}
            history.append(entry)
            best = max((past["cider"] for past in history[:-1] if captions), default=-1)
            if self.processes.main and (not captions or entry["cider"] > best):
                self.model.save(settings.output, asdict(settings), {"selection": entry})
        if self.processes.main:
            score = f"CIDEr {entry['cider']:.4f} on the selection split, " if captions else ""
            print(f"epoch {epoch + 1}: {name} {entry[name]:.3f}, {score}{entry['seconds'] / 60:.1f} min", flush=True)
            shown = {image.path.name: caption for image, caption in zip(self.selection[:SHOWN], captions)}
            for file, caption in shown.items():
                print(f"    {file}: {caption}", flush=True)
            self.run.write(epoch=epoch + 1, minutes=entry["seconds"] / 60, memory=entry["memory"],
                           **({"CIDEr": entry["cider"], "captions": shown} if captions else {}))
        progress["sum"] = 0.0
        self.run.save()

    def caption_selection(self):
        """Captions of the selection images, divided among the processes."""
        part = np.array_split(np.arange(len(self.selection_features)), self.processes.count)[self.processes.number]
        with autocast(self.device, self.dtype), self.generating():
            return self.processes.gather(caption_features(self.model, self.selection_features, part, GenerationConfig(),
                                                          self.selection_embeddings))


def train(config, settings, device=None):
    """Train, keep the best checkpoint, and return [{epoch, loss or reward, cider, seconds, memory}, …]."""
    trainer = CaptionerTrainer(config, settings, device)
    trainer.fit()
    return trainer.progress["history"]


def main():
    parser = ArgumentParser(description="Train the captioner on COCO-format captions.")
    parser.add_argument("--config", help="YAML file of the options below, which the command line overrides")
    parser.add_argument("--dry_run", action="store_true", help="print the number of trained parameters, and stop")
    for config in Settings, CaptionerConfig:
        add_options(parser, config)
    arguments = parser.parse_args(with_config(None))
    config, settings = take_options(arguments, CaptionerConfig), take_options(arguments, Settings)
    if arguments.dry_run:
        parts = count_trained(config, settings.decoder)
        total = sum(parts.values())
        print(f"{total / 1e6:.2f}M trained parameters: " + ", ".join(f"{part} {n / 1e6:.2f}M" for part, n in parts.items()))
        if total > MAX_TRAINED:
            raise UserError(f"more than the {MAX_TRAINED / 1e6:.0f}M allowed")
        return
    CaptionerTrainer(config, settings).fit()


if __name__ == "__main__":
    run(main)
