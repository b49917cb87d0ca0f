"""Speed of captioning, as ratios measured in one run.

    python3 report/bench.py <images> [--beam_size 3] [--count 1000] [--out speed.json]
    python3 report/bench.py <images> --profile
    python3 report/bench.py <images> --growth
    python3 report/bench.py <images> --against <clone at another commit>
    python3 report/bench.py <images> --int8                            # needs nncf: pip install nncf
    python3 report/bench.py --training data [--steps 20]

Methods on the same images, medians of `--repeats`, each with its images per second and its ratio to the first, the frozen
encoder, which limits the speed:
  encoder       the frozen encoder alone, on decoded pictures
  eager         the same in PyTorch
  hw3_2.sh      the whole command, including the start of Python and loading of weights
  captioning    the same without the start: decode, encode, search, in batches with a cache
  one by one    one image at a time, without a cache: every step computes the whole text again
  transformers  the eager encoder, and VisionEncoderDecoderModel.generate with a decoder of the same size, as many tokens and beams

`--profile` measures the milliseconds of each stage; `--growth` how the whole command's time and memory grow with pictures, beams and the
maximum caption length; `--against` runs hw3_2.sh here and in another clone alternately, and compares their captions; `--int8` compares
the encoder in OpenVINO with itself, quantised to int8 after training.

And three methods to train the same model, a ViT-Tiny with random weights and a frozen GPT-2 of six layers, with a projection
and cross-attention between them, in captions per second, without the start:
  cached        p2_train.py on cached features
  encoding      the same with the encoder in every step
  transformers  VisionEncoderDecoderModel and its Trainer, where every row is an image with one of its captions
"""

import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import captioner
import generation
import p2_train
from captioner import EMBEDDED_CHECKPOINT, EMBEDDED_DECODER, Captioner, CaptionerConfig, caption_folder
from cli import ArgumentParser, UserError, run
from dataset import clean_caption, collate, read_captions, write_subset
from devices import pick_device
from encoder import ImageEncoder
from files import read_json, write_json
from images import list_images, load_ahead, load_image
from runtime import STEP, Network, infer, pick_runtime
from tokenizer import BPETokenizer


class TokenHistory:
    """Replaces BeamCache in a search without a cache: keeps the beams' tokens, not their keys and values."""

    def __init__(self, images, beams, max_length, device=None):
        self.tokens, self.beams = None, beams

    def select(self, beams, images=None):
        tokens = self.tokens if images is None else self.tokens[images]
        self.tokens = tokens.gather(1, beams[:, :, None].expand(-1, -1, tokens.shape[2]))


def logits_without_cache(self, tokens, context, history, head):
    """Replaces Captioner.next_logits: runs the decoder over the whole text at every step: tokens (B, K) -> (B, K, V)."""
    history.tokens = tokens[:, :, None] if history.tokens is None else torch.cat([history.tokens, tokens[:, :, None]], 2)
    hidden = self.decoder.hidden(history.tokens.flatten(0, 1), context)[:, -1]
    return F.linear(hidden, head).float().view(*tokens.shape, -1)


def one_by_one_without_cache(model, batches, settings):
    """Caption decoded batches one image at a time and without a cache: list of captions."""
    originals = generation.BeamCache, Captioner.next_logits
    generation.BeamCache, Captioner.next_logits = TokenHistory, logits_without_cache
    try:
        return [caption for batch in batches for image in batch for caption in model.caption(image[None], settings)]
    finally:
        generation.BeamCache, Captioner.next_logits = originals


def hugging_face_captions(eager, batches, sizes, beams, length):
    """Generate with a randomly initialised transformers decoder of these sizes on the eager encoder's tokens: as many captions, of so
    many tokens."""
    from transformers import GPT2Config, VisionEncoderDecoderConfig, VisionEncoderDecoderModel, ViTConfig
    from transformers.modeling_outputs import BaseModelOutput

    torch.manual_seed(0)
    decoder = GPT2Config(n_embd=sizes.n_embd, n_layer=sizes.n_layer, n_head=sizes.n_embd // 64, n_positions=sizes.n_positions,
                         add_cross_attention=True)
    vit = ViTConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=1, intermediate_size=64)  # not run
    model = VisionEncoderDecoderModel(VisionEncoderDecoderConfig.from_encoder_decoder_configs(vit, decoder)).eval()
    model.enc_to_dec_proj = torch.nn.Linear(eager.dim, sizes.n_embd)
    count = 0
    for batch in batches:
        rows = model.generate(encoder_outputs=BaseModelOutput(last_hidden_state=eager(batch)), num_beams=beams, do_sample=False,
                              min_new_tokens=length, max_new_tokens=length, decoder_start_token_id=50256, pad_token_id=50256,
                              eos_token_id=50256)
        count += len(rows)
    return count


def timed(function):
    """Seconds that `function` takes, including its work on CUDA, and its result."""
    start = time.perf_counter()
    result = function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


# ---- the whole command -----------------------------------------------------------------------------------------


class Command:
    """hw3_2.sh of a clone on the same pictures, as a separate process."""

    def __init__(self, images, folder, root=ROOT):
        self.root, self.images, self.output = Path(root), folder / "images", folder / "captions.json"
        self.images.mkdir(exist_ok=True)
        for name, path in images.items():
            link = self.images / f"{name}{path.suffix}"
            if not link.is_symlink():
                link.symlink_to(path.resolve())
        self.environment = os.environ | {"VIRTUAL_ENV": sys.prefix, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}

    def __call__(self, *options):
        """Seconds, peak memory in GB, {name: caption}"""
        command = ["bash", str(self.root / "hw3_2.sh"), str(self.images), str(self.output), *map(str, options)]
        start = time.perf_counter()
        process = subprocess.Popen(command, env=self.environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        errors = process.stderr.read()
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        if os.waitstatus_to_exitcode(status) not in (0, 3):
            raise UserError(f"hw3_2.sh failed: {errors.strip().splitlines()[-1]}")
        memory = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9
        return seconds, memory, read_json(self.output, "captions")


def several(images, count):
    """A folder of so many pictures: these, repeated under other names if there are fewer."""
    names = list(images)
    return {names[i] if i < len(names) else f"{names[i % len(names)]}-{i // len(names)}": images[names[i % len(names)]] for i in range(count)}


def growth(images, runtime, counts=(100, 1000, 5000), beams=(1, 3, 5, 10), lengths=(10, 20, 40)):
    """Time and memory of hw3_2.sh as one thing grows: the number of pictures; with 200 pictures, beams or the maximum length."""
    rows = []
    settings = [({"pictures": count}, []) for count in counts]
    settings += [({"pictures": 200, "beams": beam}, ["--beam_size", beam]) for beam in beams]
    settings += [({"pictures": 200, "longest caption": length}, ["--max_length", length]) for length in lengths]
    with tempfile.TemporaryDirectory() as folder:
        Command(several(images, 1), Path(folder))("--runtime", runtime)  # exclude one-time compilation
    for setting, options in settings:
        with tempfile.TemporaryDirectory() as folder:
            seconds, memory, _ = Command(several(images, setting["pictures"]), Path(folder))("--runtime", runtime, *options)
        rows.append({**setting, "seconds": round(seconds, 2), "images per second": round(setting["pictures"] / seconds, 2),
                     "memory, GB": round(memory, 2)})
        print(", ".join(f"{name} {value}" for name, value in rows[-1].items()), flush=True)
    return rows


def draw_growth(rows, path):
    """Plot the rows of `growth`: seconds and memory over each quantity."""
    from matplotlib.figure import Figure

    figure = Figure((12, 3.6), layout="constrained")
    for axes, name in zip(figure.subplots(1, 3), ("pictures", "beams", "longest caption")):
        some = [row for row in rows if name in row and (name == "pictures") == (len({"beams", "longest caption"} & row.keys()) == 0)]
        values = [row[name] for row in some]
        axes.plot(values, [row["seconds"] for row in some], marker="o", color="tab:blue")
        axes.set(xlabel=name if name == "pictures" else f"{name}, of 200 pictures", ylabel="seconds, start included", ylim=(0, None))
        memory = axes.twinx()
        memory.plot(values, [row["memory, GB"] for row in some], marker="s", linestyle="--", color="tab:orange")
        memory.set(ylabel="most memory, GB (dashed)", ylim=(0, 4))
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def against(images, other, repeats, options):
    """Run hw3_2.sh of another clone and of this one alternately: medians, their ratio, and the number of equal captions."""
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as two:
        there, here = Command(images, Path(one), other), Command(images, Path(two))
        here(*options)  # exclude one-time compilation
        runs = [(there(*options), here(*options)) for _ in range(repeats)]
    seconds = [[run[which][0] for run in runs] for which in (0, 1)]
    (_, _, before), (_, _, after) = runs[-1]
    found = {"there, seconds": seconds[0], "here, seconds": seconds[1], "times as fast": median(seconds[0]) / median(seconds[1]),
             "same captions": sum(before[name] == after[name] for name in before), "images": len(before)}
    print("\n".join(f"{name}: {value}" for name, value in found.items()))
    return found


# ---- where the time goes ---------------------------------------------------------------------------------------


def profile(images, settings, runtime, batch_size):
    """Print and return the milliseconds per picture of each stage, run separately, and of the search by operation."""
    start, _ = timed(lambda: subprocess.run([sys.executable, str(ROOT / "p2_infer.py"), "--help"], capture_output=True, check=True))
    loading, model = timed(lambda: Captioner.load(EMBEDDED_CHECKPOINT, EMBEDDED_DECODER, runtime=runtime))
    encoder, paths, found = model.encoder, list(images.values()), {}
    found["reading"], pictures = timed(lambda: [load_image(path, encoder.image_size) for path in paths])
    found["resizing"], tensors = timed(lambda: [encoder.preprocess(picture) for picture in pictures])
    batches = torch.stack(tensors).split(batch_size)
    with torch.inference_mode():
        model.caption(batches[0], settings)  # warm up
        found["encoding"], features = timed(lambda: [encoder(batch) for batch in batches])
        embeddings = [None] * len(features)
        if settings.clip_weight or model.config.meaning:
            found["embedding"], embeddings = timed(lambda: [model.judge.embed_images(part) for part in features])
        found["projecting"], tokens = timed(lambda: [
            model.image_tokens(part, model.concepts(part, seen)) for part, seen in zip(features, embeddings)])
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as operations:
            model.hypotheses(tokens[0], settings)
        found["searching"], hypotheses = timed(lambda: [model.hypotheses(part, settings) for part in tokens])
        if settings.clip_weight:
            found["choosing"], _ = timed(lambda: [model.choose(seen, some, settings.clip_weight) for seen, some in zip(embeddings, hypotheses)])
        found["detokenising"], _ = timed(lambda: [model.text(rows[0][1]) for some in hypotheses for rows in some])
    stages = {name: 1000 * seconds / len(paths) for name, seconds in found.items()}
    print(f"{len(paths)} images, ms each:")
    for name, value in stages.items():
        print(f"  {name:13}{value:8.2f}")
    print(f"  together     {sum(stages.values()):8.2f}, one after the other\nstart: {start:.1f} s to --help, then {loading:.1f} s to load")
    averages = sorted(operations.key_averages(), key=lambda row: -row.self_cpu_time_total)
    total = sum(row.self_cpu_time_total for row in averages)
    parts = {row.key: row.self_cpu_time_total / total for row in averages[:10]}
    print("searching, by operation: " + ", ".join(f"{name.removeprefix('aten::')} {share:.0%}" for name, share in parts.items()))
    return {"ms an image": stages, "seconds to help": start, "seconds to load": loading, "search by operation": parts}


def int8(images, repeats):
    """Quantise the encoder with NNCF, calibrated on half of the pictures, and run it and the fp32 network on the others: images per
    second of both, and the relative error of the features."""
    try:
        import nncf
    except ImportError:
        raise UserError("--int8 quantises with nncf: pip install nncf") from None
    import openvino

    with torch.inference_mode():
        encoder = CaptionerConfig().load_encoder()
        pictures = torch.stack([encoder.preprocess(load_image(path, encoder.image_size)) for path in images.values()])
        known, others = pictures.split(-(-len(pictures) // 2))
        network = Network.trace(encoder, (others[:2],), [[-1, *others.shape[1:]]])
        calibration = nncf.Dataset([picture[None].numpy() for picture in known])
        quantized = nncf.quantize(network, calibration, preset=nncf.QuantizationPreset.MIXED, subset_size=len(known))
    options = {"NUM_STREAMS": torch.get_num_threads(), "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    networks = {name: openvino.Core().compile_model(model, "CPU", options | {"INFERENCE_PRECISION_HINT": "f32"})
                for name, model in (("fp32", network), ("int8", quantized))}
    seconds, features = {name: [] for name in networks}, {}
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for _ in range(repeats):
            for name, compiled in networks.items():
                taken, parts = timed(lambda: [*pool.map(lambda part: infer(compiled.create_infer_request(), [part]).clone(), others.split(STEP))])
                seconds[name].append(taken)
                features[name] = torch.cat(parts)
    found = {"images": len(others), "calibrated on": len(known), "images per second": {
        name: len(others) / median(values) for name, values in seconds.items()}}
    found["times as fast"] = median(seconds["fp32"]) / median(seconds["int8"])
    found["relative error"] = ((features["int8"] - features["fp32"]).norm() / features["fp32"].norm()).item()
    print("\n".join(f"{name}: {value}" for name, value in found.items()))
    return found


# ---- training --------------------------------------------------------------------------------------------------


def training_speed(data, steps, images_a_step=8):
    """Print the captions per second of each training method."""
    device = pick_device()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        write_subset(data, folder / "data", steps * images_a_step)
        write_subset(data, folder / "few", images_a_step)
        config = CaptionerConfig(encoder="vit_tiny_patch16_224", projection_dim=256, projection_dropout=0, patch_dropout=0,
                                 lora_rank=0)
        encoder = ImageEncoder(config.encoder, weights="random")
        images = read_captions(folder / "data" / "train.json", folder / "data" / "images" / "train")
        captions = sum(len(image.captions) for image in images)
        seconds = {}
        original, captioner.load_encoder = captioner.load_encoder, lambda *arguments: encoder
        try:
            for name, part, cache in (("warm", "few", ""), ("cached", "data", str(folder / "cache")), ("encoding", "data", "")):
                trainer = p2_train.CaptionerTrainer(config, p2_train.Settings(
                    data=str(folder / part), output=str(folder / f"{name}.safetensors"), cache=cache, views=1,
                    decoder=str(EMBEDDED_DECODER), epochs=1, scst_epochs=0, selection=0, batch_size=images_a_step))
                seconds[name], _ = timed(trainer.fit)
        finally:
            captioner.load_encoder = original
        del seconds["warm"]
        trained = trainer.model.num_trained()
        hugging_face, trained_there = hugging_face_trainer(images, images_a_step * 5, trainer.model.decoder.config, folder, device)
        seconds["transformers"], _ = timed(hugging_face.train)
    print(f"{len(images)} images, {captions} captions, {torch.get_num_threads()} threads of {os.cpu_count()} cores, {device}; "
          f"trained parameters {trained / 1e6:.2f}M, transformers {trained_there / 1e6:.2f}M")
    for name, value in seconds.items():
        print(f"{name:13}{captions / value:8.1f} captions/s  {seconds['transformers'] / value:6.2f} of transformers")
    return {"captions": captions, "captions per second": {name: captions / value for name, value in seconds.items()}}


def hugging_face_trainer(images, batch_size, sizes, folder, device):
    """A Trainer for one epoch over these captions, for a model of the same sizes, and its number of trained parameters."""
    try:
        from transformers import GPT2Config, Trainer, TrainingArguments, VisionEncoderDecoderConfig, VisionEncoderDecoderModel, ViTConfig
    except ImportError:
        raise UserError("--training compares with transformers: pip install -c constraints.txt transformers") from None

    vit = ViTConfig(hidden_size=192, num_hidden_layers=12, num_attention_heads=3, intermediate_size=768, image_size=224)
    decoder = GPT2Config(n_embd=sizes.n_embd, n_layer=sizes.n_layer, n_head=sizes.n_embd // 64,
                         n_positions=sizes.n_positions, add_cross_attention=True)
    model = VisionEncoderDecoderModel(VisionEncoderDecoderConfig.from_encoder_decoder_configs(vit, decoder))
    model.config.decoder_start_token_id = model.config.pad_token_id = 50256
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("enc_to_dec_proj" in name or "cross" in name)
    tokenizer = BPETokenizer()
    encoder = ImageEncoder("vit_tiny_patch16_224", weights="random")
    rows = [(image.path, tokenizer.encode(clean_caption(caption))[:sizes.n_positions - 1]) for image in images for caption in image.captions]

    def collate_rows(rows):
        pixels = torch.stack([encoder.preprocess(load_image(path, encoder.image_size)) for path, _ in rows])
        return {"pixel_values": (pixels - encoder.mean) / encoder.std, "labels": collate([tokens for _, tokens in rows])[1]}

    arguments = TrainingArguments(
        output_dir=str(folder / "transformers"), num_train_epochs=1, per_device_train_batch_size=batch_size, report_to="none",
        save_strategy="no", learning_rate=1e-4, remove_unused_columns=False, disable_tqdm=True,
        use_cpu=device == "cpu", bf16=device == "cuda")
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, data_collator=collate_rows)
    return trainer, sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


# ---- all methods on the same images -----------------------------------------------------------------------------


def compare_ways(images, settings, runtime, batch_size, repeats):
    """Print and return the median images per second of each method."""
    device = pick_device()
    model = Captioner.load(EMBEDDED_CHECKPOINT, EMBEDDED_DECODER, runtime=runtime).to(device)
    eager = model.config.load_encoder().to(device)
    encoder = model.encoder
    batches = [batch.to(device) for _, batch, _ in load_ahead(images.values(), encoder.preprocess, encoder.image_size, batch_size)
               if batch is not None]
    few = [batches[0][:32]]  # for the slow method, few images
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        command = Command(images, Path(folder))
        options = ["--beam_size", settings.beam_size, "--clip_weight", settings.clip_weight, "--length_penalty", settings.length_penalty,
                   "--batch_size", batch_size, "--runtime", runtime]
        encoder(batches[0]), eager(few[0])  # warm up
        captions, _ = caption_folder(model, images, settings, batch_size, device)
        length = round(sum(len(model.tokenizer.encode(text)) + 1 for text in captions.values()) / len(captions))
        ways = {
            "encoder": (1, lambda: [encoder(batch) for batch in batches]),
            "eager": (1, lambda: [eager(batch) for batch in batches]),
            "hw3_2.sh": (1, lambda: command(*options)),
            "captioning": (1, lambda: caption_folder(model, images, settings, batch_size, device)),
            "one by one": (len(few[0]) / len(images), lambda: one_by_one_without_cache(model, few, settings)),
            "transformers": (min(1, len(batches[0]) / len(images)), lambda: hugging_face_captions(
                eager, batches[:1], model.decoder.config, settings.beam_size, length))}
        seconds = {name: [] for name in ways}
        for _ in range(repeats):  # alternately, so that slow phases of the machine affect all methods
            for name, (part, way) in ways.items():
                taken, result = timed(way)
                seconds[name].append(taken / part)
                if name == "one by one":
                    alone = result
    same = sum(one == two for one, two in zip(alone, captions.values()))
    print(f"{len(images)} images, beam {settings.beam_size}, batch {batch_size}, {torch.get_num_threads()} threads of {os.cpu_count()} "
          f"cores, {device}, {runtime}, captions of {length} tokens")
    speeds = {name: len(images) / median(values) for name, values in seconds.items()}
    for name, value in speeds.items():
        low, high = (len(images) / bound for bound in (max(seconds[name]), min(seconds[name])))
        print(f"{name:13}{value:8.1f} images/s ({low:.1f} to {high:.1f})  {value / speeds['encoder']:6.2f} of the encoder alone")
    print(f"one by one and in batches gave the same caption for {same} of {len(alone)} images")
    return {"images": len(images), "beam size": settings.beam_size, "images per second": speeds, "seconds": seconds,
            "same captions one by one": [same, len(alone)]}


def main():
    parser = ArgumentParser(description="Measure the speed of captioning, as ratios in one run.")
    parser.add_argument("images", nargs="?", help="folder of images")
    parser.add_argument("--profile", action="store_true", help="the time of each stage")
    parser.add_argument("--growth", action="store_true", help="time and memory by pictures, beams and maximum caption length")
    parser.add_argument("--against", metavar="CLONE", type=Path, help="compare with hw3_2.sh of another clone")
    parser.add_argument("--int8", action="store_true", help="the encoder, quantised")
    parser.add_argument("--training", metavar="DATA", type=Path, help="measure training, on this train.json and images/train")
    parser.add_argument("--steps", type=int, default=20, help="of training, 8 images each")
    parser.add_argument("--beam_size", type=int, help="of every search; default: from the embedded model's checkpoint")
    parser.add_argument("--clip_weight", type=float, help="weight of our CLIP in reranking beams; default: likewise")
    parser.add_argument("--runtime", default="auto", help="of the encoder")
    parser.add_argument("--batch_size", type=int, default=128, help="images per batch")
    parser.add_argument("--count", type=int, default=1000, help="number of images, the first by name")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", help="output JSON file")
    parser.add_argument("--figure", help="with --growth: file for a plot")
    arguments = parser.parse_args()
    if (arguments.images is None) == (arguments.training is None):
        parser.error("name a folder of images, or --training and a folder of data")
    if arguments.training:
        found = training_speed(arguments.training, arguments.steps)
    else:
        images = dict(list(list_images(arguments.images).items())[:arguments.count])
        changes = {name: value for name in ("beam_size", "clip_weight") if (value := getattr(arguments, name)) is not None}
        settings = replace(captioner.recorded_generation(captioner.read_metadata(EMBEDDED_CHECKPOINT)), **changes)
        runtime = pick_runtime(arguments.runtime, pick_device())
        if arguments.growth:
            found = growth(images, runtime)
            if arguments.figure:
                draw_growth(found, arguments.figure)
        elif arguments.against:
            options = [part for name, value in changes.items() for part in (f"--{name}", value)]
            found = against(images, arguments.against, arguments.repeats, options)
        elif arguments.int8:
            found = int8(images, arguments.repeats)
        elif arguments.profile:
            found = profile(images, settings, runtime, arguments.batch_size)
        else:
            found = compare_ways(images, settings, runtime, arguments.batch_size, arguments.repeats)
    if arguments.out:
        write_json(arguments.out, found)


if __name__ == "__main__":
    run(main)
