"""Evaluate a LLaVA on visual question answering, relations between objects, and referring expressions.

    python3 p4_evaluate.py vqa coco/vqa_val.json --out vqa.csv
    python3 p4_evaluate.py vqa v2_OpenEnded_mscoco_val2014_questions.json --annotations v2_mscoco_val2014_annotations.json \\
        --images val2014 --out vqa.csv
    python3 p4_evaluate.py relations relationships.json --images VG_100K --out relations.csv
    python3 p4_evaluate.py boxes "refs(unc).p" --annotations instances.json --images train2014 --form llava --split val \\
        --out boxes.csv

`--model` is a folder or a name on the model hub; by default the same as for hw3_1.sh. Instead of a file, questions may be the name of a
data set on the hub (lmms-lab/VQAv2, lmms-lab/OK-VQA, lmms-lab/RefCOCO), with the package `datasets`.

  vqa        VQA v2's accuracy by the official rule, the same with answers always normalised, and exact matches; by kind of
             question and of answer. Files of OK-VQA have the same form.
  relations  exact matches, on Visual Genome's relationships.json ("What is the relationship between the man and the horse?") or its
             question_answers.json
  boxes      fraction of boxes whose intersection over union with the right one is at least 0.5

Each score is compared with that of the most common answer to other questions of the same kind, and of the same model with another
question's picture, or a grey one, with the interval of the difference. The same command resumes an interrupted run. All answers are
written to the CSV file, the best and worst as a picture beside it, the scores as JSON.
"""

import csv
import random
import re
import sys
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from answers import answer_all, digest_of_model
from cli import ArgumentParser, UserError, add_options, option, printable, run, take_options
from files import check_output, write_json
from grounding import FORMS, overlaps, parse_box, read_references
from images import load_picture
from llava import SIDE, Llava, LlavaSettings, default_model
from significance import Difference, resampled_sums
from vqa import Asked, accuracy, first_words, normalize, picture_files, read_relations, read_vqa


@dataclass
class Options:
    annotations: str = option("", "vqa: the file of answers; boxes: instances.json")
    images: str = option("", "folder of pictures; default: images/ beside the questions")
    model: str = option("", "folder, or name on the model hub")
    out: str = option("answers.csv", "CSV file of all answers; beside it, .json of the scores and .png of the best and worst")
    prompt: str = option("{}", "prompt, with {} for the question")
    form: str = option("llava", f"boxes: the model's format: {', '.join(FORMS)}")
    split: str = option("", "boxes: only this split, such as val; on the hub, the split's name")
    limit: int = option(0, "a random sample of so many questions; 0: all")
    batch_size: int = option(32, "questions per batch")


def plain(answer):
    """A model's answer in the style of human answers: in lower case, without a full stop."""
    return answer.strip().lower().removesuffix(".")


# ---- baselines -------------------------------------------------------------------------------------------------


def other_pictures(asked, seed=0):
    """For each question the picture of another question, different from its own: a list of paths."""
    order = list(range(len(asked)))
    random.Random(seed).shuffle(order)
    order.sort(key=lambda number: str(asked[number].picture))  # group by picture: an offset of half the list gives another picture
    most = max(Counter(str(item.picture) for item in asked).values())
    if 2 * most > len(asked):
        raise UserError("most questions are about one picture: there is no other to show instead")
    found = [None] * len(asked)
    for place, number in enumerate(order):
        found[number] = asked[order[(place + len(order) // 2) % len(order)]].picture
    return found


def grey(picture):
    """A grey picture of the same size."""
    return Image.new("RGB", picture.size, (127, 127, 127))


def padded(picture):
    """The picture in the middle of a square, on LLaVA-1.5's grey, as that was trained for boxes; its processor would crop the square."""
    side = max(picture.size)
    return ImageOps.pad(picture, (side, side), color=(122, 116, 104))


def commonest_answers(asked):
    """For each question the most common answer to the other questions of its kind, or to all others if that is the only one: a list."""
    kinds, everything = defaultdict(Counter), Counter()
    for item in asked:
        kinds[item.kind][item.commonest] += 1
        everything[item.commonest] += 1
    found = []
    for item in asked:
        for counts in kinds[item.kind] - Counter([item.commonest]), everything - Counter([item.commonest]):
            if counts:
                found.append(counts.most_common(1)[0][0])
                break
        else:
            found.append(item.commonest)  # all answers are the same
    return found


# ---- scores ----------------------------------------------------------------------------------------------------


def difference(asked, ours, theirs):
    """The difference of two mean scores on the same questions, with its interval from a bootstrap over pictures with their questions."""
    pictures = {}
    for item, one, other in zip(asked, ours, theirs):
        entry = pictures.setdefault(str(item.picture), [0.0, 0])
        entry[0] += one - other
        entry[1] += 1
    columns = np.array(list(pictures.values()))
    draws = resampled_sums(columns)
    return Difference.of_draws(columns[:, 0].sum() / columns[:, 1].sum(), draws[:, 0] / draws[:, 1])


def by_kind(asked, scores, kind, least=10):
    """{kind: (questions, mean score)} for kinds with at least so many questions, the most common first."""
    groups = defaultdict(list)
    for item, score in zip(asked, scores):
        groups[getattr(item, kind)].append(score)
    return {name: (len(some), sum(some) / len(some)) for name, some in sorted(groups.items(), key=lambda pair: -len(pair[1]))
            if name and len(some) >= least}


def summarize(asked, scores, measure):
    """Print and return a table of {name of a system: scores of `asked`}; the first is the model itself."""
    own, *others = scores
    table = {"questions": len(asked), "measure": measure, "scores": {name: float(np.mean(some)) for name, some in scores.items()}}
    print(f"{len(asked)} questions about {len({item.picture for item in asked})} pictures, {measure}:")
    for name in scores:
        print(f"  {name:28}{table['scores'][name]:.3f}", end="")
        if name in others:
            found = difference(asked, scores[own], scores[name])
            table.setdefault("differences", {})[name] = asdict(found)
            print(f"   {own} over it {found.value:+.3f} ({found.low:+.3f} to {found.high:+.3f})", end="")
        print()
    for kind in "answer_kind", "kind":
        if groups := {name: by_kind(asked, some, kind) for name, some in scores.items()}:
            table[kind] = {group: {"questions": count} | {name: groups[name][group][1] for name in groups}
                           for group, (count, _) in groups[own].items()}
            for group, row in list(table[kind].items())[:12]:
                print(f"    {group:26}{row['questions']:5}  " + "  ".join(f"{row[name]:.3f}" for name in groups))
    return table


# ---- the tasks -------------------------------------------------------------------------------------------------


class Evaluation:
    """One run: the model, its questions, and its output files.

    Args:
        asked: [Asked, …]. what: all settings that the answers depend on, except the pictures shown.
    """

    def __init__(self, model, asked, options, settings, what):
        self.model, self.asked, self.options, self.settings, self.what = model, asked, options, settings, what
        self.squares = what["task"] == "boxes" and options.form == "llava"
        self.parts, self.unread = [], {}

    def answers(self, name, pictures=None, change=None):
        """The answers to all questions with their own pictures, with others, or with changed ones: a list; "" if a picture is unreadable."""
        output, pad = f"{self.options.out}.{name}", change
        if self.squares:
            pad = padded if change is None else lambda picture: padded(change(picture))
        shown = pictures or [item.picture for item in self.asked]
        asked = {item.name: (picture, self.options.prompt.replace("{}", item.query)) for item, picture in zip(self.asked, shown)}
        found, unread = answer_all(self.model, asked, self.settings, output, self.what | {"shown": name}, self.options.batch_size,
                                   f"{name} picture", pad)
        self.parts.append(Path(f"{output}.part"))
        self.unread |= {asked[name][0]: reason for name, reason in unread.items()}
        return [found.get(item.name, "") for item in self.asked]

    def all_answers(self):
        """{pictures shown: answers}"""
        return {"own picture": self.answers("own"), "another's picture": self.answers("another", other_pictures(self.asked)),
                "grey picture": self.answers("grey", change=grey)}

    def finish(self, rows, scores, table):
        """Write all files: rows of the CSV, the best and worst by scores, and the table."""
        out = Path(self.options.out)
        with open(out, "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        write_json(out.with_suffix(".json"), table)
        seen = [i for i, item in enumerate(self.asked) if item.picture not in self.unread]
        draw_best_and_worst([self.asked[i] for i in seen], [rows[i] for i in seen], [scores[i] for i in seen], out.with_suffix(".png"))
        for path, reason in self.unread.items():
            print(f"skipped {printable(str(path))}: {printable(reason)}", file=sys.stderr)
        for part in self.parts:  # needed to resume until all files are written
            part.unlink(missing_ok=True)
        print(f"every answer is in {out}, the best and worst in {out.with_suffix('.png')}")
        return 3 if self.unread else 0


def evaluate_questions(evaluation, measures):
    """Evaluate vqa or relations. `measures`: {name: function of an answer and a question}; the first is reported by kind."""
    asked = evaluation.asked
    answers = {name: [*map(plain, said)] for name, said in evaluation.all_answers().items()}
    answers["commonest answer"] = commonest_answers(asked)
    scores = {measure: {name: [of(answer, item) for answer, item in zip(said, asked)] for name, said in answers.items()}
              for measure, of in measures.items()}
    first = next(iter(measures))
    table = summarize(asked, scores[first], first)
    for measure in list(measures)[1:]:
        table[measure] = {name: float(np.mean(some)) for name, some in scores[measure].items()}
        print(f"{measure}: " + ", ".join(f"{name} {value:.3f}" for name, value in table[measure].items()))
    table["answers that normalise to nothing"] = sum(not normalize(answer) for answer in answers["own picture"])
    if table["answers that normalise to nothing"]:
        print(f"{table['answers that normalise to nothing']} answers are nothing, or articles alone")
    rows = [{"name": item.name, "picture": str(item.picture), "kind": item.kind, "answer kind": item.answer_kind, "question": item.query,
             "people": item.commonest} | {name: answers[name][i] for name in answers} | {
            measure: round(scores[measure]["own picture"][i], 4) for measure in measures} for i, item in enumerate(asked)]
    return rows, scores[first]["own picture"], table


def evaluate_boxes(evaluation):
    """Evaluate boxes."""
    asked, form = evaluation.asked, evaluation.options.form
    answers = evaluation.all_answers()
    sizes = [(1, 1) if item.picture in evaluation.unread else load_picture(item.picture, None).size for item in asked]
    boxes = {name: [parse_box(answer, form, *size) for answer, size in zip(said, sizes)] for name, said in answers.items()}
    boxes["the whole picture"] = [(0.0, 0.0, float(width), float(height)) for width, height in sizes]
    expected = [item.box for item in asked]
    values = {name: overlaps(found, expected) for name, found in boxes.items()}
    scores = {name: [float(value >= 0.5) for value in some] for name, some in values.items()}
    table = summarize(asked, scores, "IoU of at least 0.5")
    table["mean IoU"] = {name: float(np.mean(some)) for name, some in values.items()}
    table["answers without a box"] = {name: sum(box is None for box in found) for name, found in boxes.items()}
    print(f"answers without a box, which count as wrong: {table['answers without a box']['own picture']} of {len(asked)}")
    rows = [{"name": item.name, "picture": str(item.picture), "expression": item.query, "answer": answers["own picture"][i],
             "box": boxes["own picture"][i], "expected": expected[i], "IoU": round(values["own picture"][i], 4)} for i, item in enumerate(asked)]
    return rows, values["own picture"], table


def draw_best_and_worst(asked, rows, scores, path, number=4):
    """Draw the pictures of the best and worst answers, with question, answer, and people's answers."""
    from matplotlib.figure import Figure

    order = np.argsort(scores, kind="stable")
    number = min(number, len(asked))
    if not number:
        return
    chosen = [*order[::-1][:number], *order[:number]]
    figure = Figure(figsize=(3.2 * number, 7.6), layout="constrained")
    for axes, i in zip(figure.subplots(2, number, squeeze=False).flat, chosen):
        row = rows[i]
        axes.imshow(load_picture(asked[i].picture, SIDE))
        said = row.get("own picture", row.get("answer"))
        right = row.get("people", row.get("expected"))
        axes.set_title("\n".join(re.sub(r"(.{34}\S*) ", "\\1\n", text).replace("$", r"\$") for text in (
            asked[i].query, f"model: {said}", f"right: {right}  ({scores[i]:.2f})")), fontsize=8)
        axes.axis("off")
    figure.savefig(path, dpi=110, bbox_inches="tight")  # otherwise titles of the tallest pictures are cut off


# ---- the model hub's data sets ---------------------------------------------------------------------------------


def read_hub(task, name, split, folder):
    """A data set on the hub in lmms-lab's form: [Asked, …]; its pictures are saved in `folder`.

    Raises UserError if the package `datasets` or the hub is not available.
    """
    try:
        from datasets import load_dataset
    except ImportError:
        raise UserError(f"{name} is no file; for the hub's data sets: pip install datasets") from None
    try:
        rows = load_dataset(name, split=split or "val")
    except Exception as error:  # the hub's client raises many kinds
        raise UserError(f"{name} is neither a file nor a data set of the hub that can be had: {str(error).splitlines()[0]}") from None
    return hub_rows(task, rows, folder)


def hub_rows(task, rows, folder):
    """`read_hub` for loaded rows."""
    folder.mkdir(parents=True, exist_ok=True)
    asked = []
    for number, row in enumerate(rows):
        name = str(row.get("question_id", number))
        picture = folder / f"{row.get('image_id', name)}.png"
        if not picture.exists():
            row["image"].convert("RGB").save(picture)
        if task == "boxes":  # a row's answers are the expressions for one box: left, top, width, height
            x, y, width, height = row["bbox"]
            for i, text in enumerate([row["answer"]] if isinstance(row["answer"], str) else row["answer"]):
                asked.append(Asked(f"{name}-{i}", picture, text, box=(x, y, x + width, y + height)))
        else:
            people = [said if isinstance(said, str) else said["answer"] for said in row["answers"]]
            asked.append(Asked(name, picture, row["question"], people, row.get("question_type") or first_words(row["question"]),
                               row.get("answer_type") or ""))
    return asked


# ---- command line ----------------------------------------------------------------------------------------------


def read_task(task, questions, options):
    """[Asked, …]. Raises UserError."""
    if not Path(questions).exists() and questions.count("/") == 1 and not Path(questions).suffix:
        return read_hub(task, questions, options.split, Path(options.out).with_suffix(".pictures"))
    if task == "boxes":
        if not options.annotations or not options.images:
            raise UserError("boxes needs --annotations instances.json and --images")
        return read_references(questions, options.annotations, options.images, options.split)
    if task == "relations":
        if not options.images:
            raise UserError("relations needs --images, the folder of Visual Genome's pictures")
        return read_relations(questions, picture_files(options.images))
    return read_vqa(questions, options.annotations or None, options.images or None)


def main():
    parser = ArgumentParser(description="Evaluate a LLaVA on questions, relations or boxes.")
    parser.add_argument("task", choices=["vqa", "relations", "boxes"])
    parser.add_argument("questions", help="file of questions, or data set on the hub")
    add_options(parser, Options)
    add_options(parser, LlavaSettings)
    parser.set_defaults(max_new_tokens=20)
    arguments = parser.parse_args()
    task, options, settings = arguments.task, take_options(arguments, Options), take_options(arguments, LlavaSettings)
    if options.form not in FORMS:
        raise UserError(f"--form is {options.form}: choose from {', '.join(FORMS)}")
    if options.batch_size < 1 or options.limit < 0 or "{}" not in options.prompt:
        raise UserError("--batch_size must be at least 1, --limit at least 0, and --prompt must hold {} for the question")
    out = Path(options.out)
    if out.suffix != ".csv":
        raise UserError(f"--out is {out}: it ends in .csv")
    for path, kind in (out, "CSV"), (out.with_suffix(".json"), "JSON"), (out.with_suffix(".png"), "PNG"):
        check_output(path, kind, [arguments.questions, options.annotations or None])
    asked = read_task(task, arguments.questions, options)
    if options.limit and options.limit < len(asked):
        asked = [asked[i] for i in sorted(random.Random(settings.seed).sample(range(len(asked)), options.limit))]
    if task == "boxes" and options.prompt == Options.prompt:
        options = replace(options, prompt=FORMS[options.form][2])
    name = options.model or default_model()
    print(f"with {name}", file=sys.stderr)
    what = {"task": task, "model": str(name), "batch_size": options.batch_size, "prompt": options.prompt, "form": options.form,
            "weights": digest_of_model(name)} | asdict(settings)
    evaluation = Evaluation(Llava(name), asked, options, settings, what)
    if task == "boxes":
        found = evaluate_boxes(evaluation)
    else:
        measures = {"exact matches": lambda answer, item: float(normalize(answer) in map(normalize, item.people))}
        if task == "vqa":
            measures = {"VQA accuracy": lambda answer, item: accuracy(answer, item.people),
                        "VQA accuracy, always normalised": lambda answer, item: accuracy(answer, item.people, always=True)} | {
                        "exact matches with the commonest answer": lambda answer, item: float(answer == item.commonest)}
        found = evaluate_questions(evaluation, measures)
    return evaluation.finish(*found)


if __name__ == "__main__":
    run(main)
