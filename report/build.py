"""report.pdf and the tables of report/README.md, from the files of report/results/ and report/figures/.

    python3 report/build.py [report.pdf] [--pages <folder for a PNG of each page>]

The text is report/report.typ, in typst's markup. In it `⟨file/key/key|form⟩` is a number of report/results/file.json, formatted by one
of FORMS or by Python's format(), and `#numbers("name")` is a table of TABLES. The same tables are in report/README.md between
`<!-- table name -->` and `<!-- end -->`. The same results give the same bytes: no dates, system fonts or downloaded packages are used.
"""

import json
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from cli import ArgumentParser, UserError, run
from files import check_writable, read_json, write_whole

REPORT = ROOT / "report"
NUMBER = re.compile(r"⟨([^⟩|]+)\|([^⟩]+)⟩")
MARKERS = re.compile(r"(<!-- table (\S+) -->\n).*?(<!-- end -->)", re.S)
SETS = {"coco": "COCO", "flickr8k": "Flickr8k"}


# ---- numbers -------------------------------------------------------------------------------------------------------


def read_results(folder=REPORT / "results"):
    """{name of a file without .json: its content}, and under "derived" the output of `derive`."""
    results = {path.stem: read_json(path, "results file") for path in sorted(folder.glob("*.json"))}
    return results | {"derived": derive(results)}


def derive(results):
    """Numbers that are computed from measured ones."""
    ways, training = results["speed"]["ways"]["images per second"], results["speed"]["training"]["captions per second"]
    against, encoders = results["speed"]["against"], {entry["kind"]: entry for entry in results["encoders"]["runs"]}
    layers = {name: found["most - moved"]["value"] for name, found in results["faithfulness"]["deletion"].items() if name.isdigit()}
    pictures = results["samples"]["p2"]
    models = results["training"]["models"]
    operations, stages = results["speed"]["profile"]["search by operation"], results["speed"]["profile"]["ms an image"]
    total, int8 = sum(stages.values()), results["speed_more"]["int8"]["times as fast"]
    return {
        "OpenVINO over eager": ways["encoder"] / ways["eager"],
        "captioning over transformers": ways["captioning"] / ways["transformers"],
        "training over transformers": training["cached"] / training["transformers"],
        "images/s of 1,000": against["images"] / sorted(against["here, seconds"])[1],
        "of the encoder": {name: value / ways["encoder"] for name, value in ways.items()},
        "ms of a picture": total,
        "captioning with an encoder in int8": total / (total - stages["encoding"] * (1 - 1 / int8)),
        "search by operation, %": {name: 100 * share for name, share in operations.items()},
        "vit_small over its start": encoders["vit_small"]["CIDEr"] - encoders["vit_small_focus"]["CIDEr"],
        "spread of a recall of 0.1 of 1,000": math.sqrt(0.1 * 0.9 / 1000),
        "spread of a vote of 0.8 of 361": math.sqrt(0.8 * 0.2 / 361),
        "layer most felt": int(max(layers, key=layers.get)),
        "score of the layer most felt": max(layers.values()),
        "best picture": max(pictures, key=lambda name: pictures[name]["score"]),
        "worst picture": min(pictures, key=lambda name: pictures[name]["score"]),
        "best picture of LLaVA": max(results["samples"]["p1"], key=lambda name: results["samples"]["p1"][name]["score"]),
        "worst picture of LLaVA": min(results["samples"]["p1"], key=lambda name: results["samples"]["p1"][name]["score"]),
        "minutes": {name: sum(one["minutes"] for one in model["runs"]) for name, model in models.items()},
        "CPU hours": {name: sum(2 * one["minutes"] / 60 for one in model["runs"] if "CPU" in one["machine"])
                      for name, model in models.items()},
        "all CPU hours": sum(2 * one["minutes"] / 60 for model in models.values() for one in model["runs"] if "CPU" in one["machine"]),
        "search, gain on COCO": results["search"]["coco"]["all captions, captioner's weight 0.25: more than without, R@10"],
    }


def look_up(results, path):
    """The value at file/key/key; keys of a list are indices. Raises UserError."""
    found = results
    for key in path.split("/"):
        try:
            found = found[int(key)] if isinstance(found, list) else found[key]
        except (KeyError, IndexError, ValueError, TypeError):
            raise UserError(f"report/results has no {path!r}: {key!r} is missing") from None
    return found


def interval(difference, digits=3):
    """{"value", "low", "high"} or {"difference", "from", "to"} -> +0.004 (-0.021 to +0.028)"""
    value, low, high = (difference[name] for name in (
        ("value", "low", "high") if "low" in difference else ("difference", "from", "to")))
    value, low, high = (f"{number:+.{digits}f}" if round(number, digits) else f"{0:.{digits}f}" for number in (value, low, high))
    return f"{value} ({low} to {high})"


def verdict(difference):
    """An interval in words."""
    if difference["low"] > 0:
        return "a gain beyond chance"
    return "a loss beyond chance" if difference["high"] < 0 else "no difference beyond chance"


def shift(difference):
    """An interval in words, as a predicate of the score's name."""
    if difference["low"] <= 0 <= difference["high"]:
        return "does not change beyond chance"
    return "rises beyond chance" if difference["low"] > 0 else "falls beyond chance"


FORMS = {
    "interval": interval,
    "verdict": verdict,
    "shift": shift,
    "million": lambda value: f"{value / 1e6:.3g}",
    "text": str,
    "list3": lambda values: ", ".join(f"{value:.3f}" for value in values),
    "to2": lambda values: f"{min(values):.2f} to {max(values):.2f}",
    "list1": lambda values: ", ".join(f"{value:.1f}" for value in values),
}


def fill(text, results):
    """A text with its numbers filled in."""
    def value(match):
        path, form = match[1].strip(), match[2].strip()
        found = look_up(results, path)
        return FORMS[form](found) if form in FORMS else format(found, form)

    return NUMBER.sub(value, text)


def fill_source(source, results):
    """A typst source with its numbers filled in; characters in them that are markup of typst are escaped."""
    return NUMBER.sub(lambda match: re.sub(r"([\\#@$*_<>`~\[\]])", r"\\\1", minus(fill(match[0], results))), source)


def minus(text):
    """Replace hyphens before digits by minus signs."""
    return re.sub(r"(?<![\w.])-(?=\d)", "−", text)


# ---- tables --------------------------------------------------------------------------------------------------------


@dataclass
class Table:
    """Cells as text, with `code`; and the command that reproduces the numbers."""

    header: list
    rows: list
    command: str

    def markdown(self):
        def line(cells):
            return "|" + "|".join(f" {cell} " if cell else " " for cell in cells) + "|\n"

        return line(self.header) + "|" + "---|" * len(self.header) + "\n" + "".join(map(line, self.rows))


def captioner(results):
    names = {"CIDEr": "CIDEr", "BLEU-4": "BLEU-4", "METEOR": "METEOR", "ROUGE-L": "ROUGE-L", "CHAIRs": "CHAIRs (lower is better)",
             "ImageTextScore": "image-text score"}
    found = results["captioner"]
    header = ["", *(text for key, name in SETS.items() for text in (
        f"{name}, {found[key]['images']:,} images", "before", "difference, 95%"))]
    rows = [[title, *(text for key in SETS for text in (
        f"{found[key][name]:.3f}", f"{found[key]['before'][name]:.3f}", interval(found[key]["difference"][name])))]
        for name, title in names.items()]
    return Table(header, rows, found["command"])


def choice(results):
    rows = [[row["weights"], str(row["beams"]), *(f"{row[key][name]:.3f}" for key in SETS for name in ("CIDEr", "CHAIRs"))]
            for row in results["captioner_history"]["choice"]["rows"]]
    return Table(["weights", "beams", "COCO, CIDEr", "CHAIRs", "Flickr8k, CIDEr", "CHAIRs"], rows,
                 "python3 p2_average.py, hw3_2.sh and p2_evaluate.py, as weights/captioner.md says")


def references(results):
    course, history = results["references"]["course"], results["captioner_history"]
    ours, llava = results["captioner"], results["llava"]["captions"]["now"]
    unscored = "not measured"
    rows = [
        ["course's references", "a large ViT, GPT-2", "its subset of COCO", "its own of COCO", FORMS["to2"](course["CIDEr"]),
         FORMS["to2"](course["CLIPScore"])],
        ["this captioner", "CNNs, small GPT-2", "Flickr8k, COCO, texts", f"COCO, {ours['coco']['images']}", f"{ours['coco']['CIDEr']:.3f}", unscored],
        ["this captioner", "the same", "the same", f"Flickr8k, {ours['flickr8k']['images']:,}", f"{ours['flickr8k']['CIDEr']:.3f}", unscored],
        ["small LLaVA", "CNNs, Gemma 3 270M", "Flickr8k, COCO", f"COCO, {ours['coco']['images']}", f"{llava['coco']['CIDEr']:.3f}", unscored],
        ["small LLaVA", "the same", "the same", f"Flickr8k, {ours['flickr8k']['images']:,}", f"{llava['flickr8k']['CIDEr']:.3f}", unscored],
        ["first captioner", "CNNs, small GPT-2", "Flickr8k", f"COCO, {ours['coco']['images']}",
         f"{history['first model']['coco']['CIDEr']:.3f}", unscored],
        ["retrieval baseline", "our CLIP, no decoder", "Flickr8k, COCO", f"COCO, {ours['coco']['images']}",
         f"{history['look-up']['coco']['CIDEr']:.3f}", unscored],
        ["LLaVA-1.5-7B", "CLIP ViT-L, Vicuna", "as published", "", unscored, unscored],
    ]
    return Table(["system", "encoder, decoder", "trained on", "scored on", "CIDEr", "CLIPScore"], rows, ours["command"])


def peft(results):
    names = {"none": "none", "lora4": "LoRA, rank 4", "lora8": "LoRA, rank 8", "adapter64": "adapters, 64",
             "prefix100": "prefix-tuning, 100", "ia3": "IA³", "image_prefix_lora8": "image prefix, LoRA, rank 8"}
    return study(results["peft"], names, "none", memory=True, command="python3 report/compare.py peft --data data")


def encoders(results):
    names = {"hybrid": "EfficientNet-Lite2, 288 pixels, its last feature map", "hybrid_3_levels": "the same, three feature maps",
             "joined": "EfficientNet-Lite2 and -Lite1, three feature maps", "vit_small": "`vit_small`, 224 pixels",
             "vit_small_focus": "`vit_small_focus`, the ViT that it started from"}
    return study(results["encoders"], names, "hybrid", command="python3 report/compare.py encoders --data data")


def study(found, names, baseline, command, memory=False):
    against = found[f"CIDEr_against_{baseline}_95"]
    rows = [[names[entry["kind"]], f"{entry['trained_parameters'] / 1e6:.2f}M", f"{entry['CIDEr']:.3f}",
             interval(against[entry["kind"]]) if entry["kind"] in against else "", f"{entry['BLEU-4']:.3f}",
             f"{entry['seconds_per_epoch']:.0f}", *([f"{entry['memory_MB'] / 1e3:.2f} GB"] if memory else [])]
            for entry in found["runs"] if not entry["seed"]]
    return Table(["", "trained", "CIDEr", "against the first, 95%", "BLEU-4", "s/epoch", *(["memory"] if memory else [])], rows, command)


def speed(results):
    ways, seconds = results["speed"]["ways"], results["speed"]["ways"]["seconds"]
    names = {"encoder": "the encoders alone, OpenVINO in fp32", "eager": "the same in eager PyTorch", "hw3_2.sh": "`hw3_2.sh`",
             "captioning": "the same without the start", "one by one": "one by one, without a cache",
             "transformers": "the eager encoder and `transformers`' VisionEncoderDecoderModel.generate, equal sizes and tokens"}
    rows, count = [], ways["images"]
    for name, title in names.items():
        value, share = ways["images per second"][name], results["derived"]["of the encoder"][name]
        rows.append([title, f"{value:.1f} ({count / max(seconds[name]):.1f}–{count / min(seconds[name]):.1f})",
                     "1" if name == "encoder" else f"{share:.2f}"])
    return Table(["way", "images/s", "of the encoder"], rows, "python3 report/bench.py data/images/val --count 200 --beam_size 3")


def llava(results):
    found, questions, people = results["llava"], results["llava_questions"], results["llava_vqa"]
    before, now, was, is_now = found["captions"]["before"], found["captions"]["now"], found["speed"]["before"], found["speed"]["now"]
    rows = [
        ["CIDEr, \"describe the image in one sentence\", greedy, Flickr8k's 1,000 validation images", f"{before['flickr8k']['CIDEr']:.3f}",
         f"{now['flickr8k']['CIDEr']:.3f}"],
        ["the same, COCO's 500", "", f"{now['coco']['CIDEr']:.3f}"],
        [f"{questions['questions']} questions that follow from captions, exact answers", f"{found['derived questions']['before']:.3f}",
         f"{questions['accuracy']['all']['own picture']:.3f}"],
        [f"COCO's {people['questions']} human questions, VQA accuracy", "", f"{people['scores']['own picture']:.3f}"],
        ["images/s, `hw3_1.sh`, the same hour, 32 at a time", f"{was['images a second, 32 at a time']:.1f}", f"{is_now['images a second']:.1f}"],
        ["the same with each one's default", f"{was['images a second, its default of 8']:.1f} (8 at a time)",
         f"{is_now['images a second']:.1f} (32)"],
        ["memory at most, GB", f"{was['memory, GB']:.1f}", f"{is_now['memory, GB']:.1f}"],
    ]
    return Table(["", "before, on a ViT", "now"], rows, "report/ask_llava.py, p4_evaluate.py vqa, hw3_1.sh with p2_evaluate.py")


def settings(found, key, title, sets):
    names = [name for name in found[next(iter(sets))]]
    rows = [[title(name, found[next(iter(sets))][name]),
             *(f"{found[of][name][metric]:.3f}" for of in sets for metric in ("CIDEr", "ImageTextScore"))] for name in names]
    header = [key, *(text for of in sets.values() for text in (f"{of}, CIDEr", "image-text score"))]
    return Table(header, rows, found["command"])


def instructions(results):
    return settings(results["llava_instructions"], "instruction", lambda _, entry: entry["instruction"],
                    {"coco": "COCO", "flickr8k": "Flickr8k's first 200"})


def generation(results):
    def title(name, entry):
        if entry["temperature"]:
            return f"sampling, temperature {entry['temperature']}, top-p {entry['top_p']}"
        return f"{entry['num_beams']} beams" if entry["num_beams"] > 1 else "greedy"

    return settings(results["llava_generation"], "generation", lambda name, entry: title(name, entry), {"flickr8k": "Flickr8k's first 200"})


def own_layers(results):
    found = results["llava"]["own layers"]
    names = ["CIDEr, Flickr8k", "CIDEr, COCO", "derived", "people's"]
    rows = [[str(row["own layers"]), str(row["MB"]), *(f"{row[name]:.3f}" for name in names)] for row in found["rows"]]
    header = ["own layers", "trained, MB", "CIDEr, Flickr8k", "CIDEr, COCO", "derived questions", "human questions, exact"]
    return Table(header, rows, found["command"])


def people(results):
    found = results["llava_vqa"]
    kinds = ["yes/no", "number", "other"]
    names = {"own picture": "right image", "another's picture": "another image", "grey picture": "grey image",
             "commonest answer": "most frequent answer to the kind of question"}
    rows = [[title, f"{found['scores'][name]:.3f}", *(f"{found['answer_kind'][kind][name]:.3f}" for kind in kinds),
             interval(found["differences"][name]) if name in found["differences"] else ""] for name, title in names.items()]
    return Table(["", "all", *(f"{kind} ({found['answer_kind'][kind]['questions']})" for kind in kinds), "gain of the right image, 95%"], rows,
                 found["command"])


def questions(results):
    found = results["llava_questions"]["accuracy"]
    rows = [[kind, str(entry["questions"]), *(f"{entry[name]:.3f}" for name in ("own picture", "another's picture", "constant"))]
            for kind, entry in found.items()]
    return Table(["kind", "questions", "right image", "another image", "best constant"], rows,
                 "python3 report/ask_llava.py output/questions.json data/images/val")


def answers(results):
    found = results["llava_answers"]
    return Table(["", *found["questions"]], [[name, *texts] for name, texts in found["answers"].items()], found["command"])


def clip(results):
    sizes = {"flickr8k": "Flickr8k, 1,000 validation images", "coco": "COCO, 500 validation images"}
    rows = [[title if way == "text to image" else "", way,
             *("{:.3f} ({:.3f}–{:.3f})".format(*results["clip"]["clip_small"][key][way][name]) for name in ("R@1", "R@5", "R@10")),
             f"{results['clip']['clip_small'][key][way]['median rank']:.0f}"]
            for key, title in sizes.items() for way in ("text to image", "image to text")]
    return Table(["`clip_small`", "way", "R@1", "R@5", "R@10", "median rank"], rows,
                 "python3 report/measure_clip.py --data flickr8k coco --cifar10 <folder> --limit 2500 --stamps <folder>")


def templates(results):
    found = results["clip"]["clip_small"]
    names = [name for name in found["CIFAR-10"] if "{object}" in name]
    rows = [[f"{title}, {found[key]['pictures']:,} pictures", f"{found[key]['classes']}, {found[key]['chance']:.3f}",
             *(f"{found[key][name]:.3f}" for name in (*names, "average"))]
            for key, title in {"CIFAR-10": "CIFAR-10", "stamps": "Tux Paint's stamps"}.items()]
    return Table(["", "classes, chance", *(f'"{name}"' for name in names), "average"], rows, clip(results).command)


def clip_steps(results):
    titles = ["statistics of the patches", "+ attention over words, larger batches", "+ attention over patches, class probabilities",
              "+ names of classes, two views"]
    rows = []
    for title, found in zip(titles, results["clip_steps"].values()):
        row = [title]
        for key in ("flickr8k", "coco"):
            low = found[key].get("against the first", {}).get("text to image", {}).get("R@1")
            row += [f"{found[key]['text to image']['R@1'][0]:.3f}", interval(dict(zip(("value", "low", "high"), low))) if low else ""]
        rows.append(row)
    return Table(["each adds to the one before", "Flickr8k, R@1", "against the first, 95%", "COCO, R@1", "against the first, 95%"], rows,
                 "python3 report/measure_clip.py --models …, the options of each in weights/clip_small.md")


def search(results):
    sizes, rows = {"flickr8k": "Flickr8k, 1,000", "coco": "COCO, 500"}, []
    for key, title in sizes.items():
        for asked in "all", "first":
            found = results["search"][key][f"{asked} captions, captioner's weight 0: the index's answers"]
            more = [interval(results["search"][key][f"all captions, captioner's weight {weight}: more than without, R@1"])
                    for weight in ("0.25", "0.5", "1")] if asked == "all" else ["", "", ""]
            rows.append([title if asked == "all" else "", "all captions" if asked == "all" else "the first",
                         *(f"{found[name]:.3f}" for name in ("R@1", "R@5", "R@10")), *more])
    return Table(["pictures", "asked", "R@1", "R@5", "R@10", "R@1, captions joined in, weight 0.25", "weight 0.5", "weight 1"],
                 rows, "python3 p4_search.py evaluate --data coco --captions_file captions.json --caption_weight 0.25 0.5 1 2 --json found.json")


def frozen(results):
    names = {"vit_small": "`vit_small`", "vit_small_focus": "`vit_small_focus`", "tf_efficientnet_lite2": "EfficientNet-Lite2"}
    rows = [[f"{names[name]}, {projection}", f"{found['5-nearest-neighbour accuracy']:.3f}", f"{found['CIFAR-10, 5-nearest-neighbour accuracy']:.3f}",
             *recalls(found[projection])] for name, found in results["encoders_frozen"]["encoders"].items()
            for projection in ("own", "linear") if projection in found]
    return Table(["encoder, projections", "kinds, 5-NN", "CIFAR-10, 5-NN", "image to text", "text to image"], rows,
                 "python3 report/measure_encoders.py --data data --cifar10 <folder>")


def signals(results):
    names = {"all": "all three", "without_distillation": "without distillation", "without_contrast": "without contrast",
             "without_caption": "without captioning"}
    rows = [[names[name], f"{found['5-nearest-neighbour accuracy']:.3f}", *recalls(found["linear"])]
            for name, found in results["signals"]["encoders"].items()]
    return Table(["signals", "kinds, 5-NN", "image to text", "text to image"], rows, "python3 report/measure_encoders.py --data data --signals")


def recalls(found):
    """R@1 / R@5 / R@10 in both directions."""
    return [" / ".join(f"{found[way][at]:.3f}" for at in ("1", "5", "10")) for way in ("image to text", "text to image")]


def deletion(results):
    rows = [[layer, *(f"{found[name]['value']:.2f}" for name in ("most", "corrected", "least")),
             interval(found["most - random"], 2), interval(found["most - moved"], 2)]
            for layer, found in results["faithfulness"]["deletion"].items() if layer != "all"]
    return Table(["layer", "most attended", "less the mean over words", "least attended", "most − random patches", "most − same shape, moved"], rows,
                 "python3 report/faithfulness.py --data data --images 60")


def cost(results):
    rows = []
    for model in results["training"]["models"].values():
        for i, one in enumerate(model["runs"]):
            cpu = f"{2 * one['minutes'] / 60:.1f}" if "CPU" in one["machine"] else ""
            about = "some " if one.get("about") else ""
            rows.append([model["what"] if not i else "", one["what"], one["machine"], f"{about}{one['minutes']:.0f}", cpu,
                         f"{one['memory, GB']:.1f} GB" if "memory, GB" in one else "not recorded"])
    return Table(["what", "training", "machine", "minutes", "core hours", "memory"], rows, "the commands in weights/*.md")


def samples(results):
    found = results["samples"]
    rows = [[name, *(text for model in ("p2", "p1") for text in (found[model][name]["caption"], f"{found[model][name]['score']:.3f}"))]
            for name in found["p2"]]
    return Table(["", "captioner", "score", "small LLaVA", "score"], rows, found["command"])


def failures(results):
    """The captions are from samples.json; raises UserError if by_eye.json explains other captions."""
    rows = []
    for failure in results["by_eye"]["failures"]:
        caption = results["samples"][failure["model"]][failure["picture"]]["caption"]
        if caption != failure["caption"]:
            raise UserError(f"report/results/by_eye.json explains {failure['caption']!r}, but {failure['picture']} is now captioned {caption!r}")
        rows.append([failure["picture"], "captioner" if failure["model"] == "p2" else "LLaVA", caption, fill(failure["why"], results)])
    return Table(["picture", "by", "caption", "what is wrong, and why"], rows, results["samples"]["command"])


TABLES = {function.__name__: function for function in (
    captioner, choice, references, peft, encoders, speed, llava, instructions, generation, own_layers, people, questions, answers, clip, templates,
    clip_steps, search, frozen, signals, deletion, samples, failures, cost)}


# ---- output --------------------------------------------------------------------------------------------------------


def fill_readme(text, tables):
    """report/README.md with its tables filled in. Raises UserError."""
    def table(match):
        if match[2] not in tables:
            raise UserError(f"report/README.md has a table {match[2]}, which report/build.py does not know")
        return f"{match[1]}\n{tables[match[2]].markdown()}\n{match[3]}"

    return MARKERS.sub(table, text)


def compile_report(results, tables, form="pdf"):
    """The report as bytes; in form "png" a list of pages, or the only page. Raises UserError."""
    try:
        import typst
    except ImportError:
        raise UserError("report.pdf needs typst: pip install -c constraints.txt typst") from None
    source = fill_source((REPORT / "report.typ").read_text(encoding="utf-8"), results)
    inputs = {"results": json.dumps(results), "tables": json.dumps({name: {
        "header": table.header, "rows": [[*map(minus, row)] for row in table.rows], "command": table.command} for name, table in tables.items()})}
    return typst.compile(source.encode(), root=str(ROOT), ignore_system_fonts=True, sys_inputs=inputs, format=form, timestamp=0,
                         **({"ppi": 110} if form == "png" else {}))


def main():
    parser = ArgumentParser(description="Write report.pdf and the tables of report/README.md.")
    parser.add_argument("pdf", nargs="?", type=Path, default=ROOT / "report.pdf", help="output file")
    parser.add_argument("--pages", type=Path, help="folder for a PNG of each page")
    arguments = parser.parse_args()
    check_writable(arguments.pdf)
    results = read_results()
    tables = {name: function(results) for name, function in TABLES.items()}
    readme = REPORT / "README.md"
    write_whole(readme, fill_readme(readme.read_text(encoding="utf-8"), tables).encode())
    write_whole(arguments.pdf, compile_report(results, tables))
    if arguments.pages:
        arguments.pages.mkdir(parents=True, exist_ok=True)
        pages = compile_report(results, tables, "png")
        for number, page in enumerate(pages if isinstance(pages, list) else [pages], 1):
            write_whole(arguments.pages / f"{number:02}.png", page)


if __name__ == "__main__":
    run(main)
