"""Does a LLaVA use the picture and the question? Exact-match accuracy on questions derived from captions.

    python3 p4_questions.py data/val.json output/questions.json --number 300 --kinds animal count colour action presence where
    python3 report/ask_llava.py output/questions.json data/images/val [--model weights/llava_small]

Each question is asked about its own picture, and about another question's. The baseline is the best constant answer for each kind
of question, chosen on these same questions. Intervals are from the paired bootstrap over questions. Writes the accuracies to
report/results/llava_questions.json, and all answers to the file --answers.
"""

import re
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from cli import ArgumentParser, UserError, run
from files import check_writable, write_json
from images import load_picture
from llava import SIDE, Llava, LlavaSettings, default_model
from questions import best_constants, read_questions
from significance import paired_bootstrap


def main():
    parser = ArgumentParser(description="Ask a LLaVA questions whose answers are known.")
    parser.add_argument("questions", help="JSON list of {image, kind, query, answer}, as p4_questions.py writes it")
    parser.add_argument("images", type=Path, help="folder of the pictures")
    parser.add_argument("--model", help="folder, or name on the model hub; default: that of p1_llava_infer.py")
    parser.add_argument("--batch_size", type=int, default=8, help="questions per batch")
    parser.add_argument("--seed", type=int, default=0, help="of the shuffling")
    parser.add_argument("--results", type=Path, default=ROOT / "report" / "results" / "llava_questions.json", help="output file")
    parser.add_argument("--answers", type=Path, help="output file for every question with its answers")
    arguments = parser.parse_args()
    if arguments.batch_size < 1:
        raise UserError("--batch_size must be at least 1")
    for file in filter(None, (arguments.results, arguments.answers)):
        check_writable(file)
    found = read_questions(arguments.questions)
    names, questions = [name for name, _ in found], [question for _, question in found]
    if len(set(names)) < 2:
        raise UserError(f"{arguments.questions} asks about fewer than two pictures")
    if missing := [name for name in names if not (arguments.images / name).is_file()]:
        raise UserError(f"{arguments.questions} asks about {missing[0]}, which is not in {arguments.images}")
    name = str(arguments.model or default_model())
    model = Llava(name)
    answers = {"own picture": ask(model, questions, names, arguments), "another's picture": ask(
        model, questions, others(names, arguments.seed), arguments)}
    constants = best_constants(questions)
    answers["constant"] = [constants[question.kind] for question in questions]
    right = {who: np.array([same(text, question.answer) for text, question in zip(texts, questions)], np.float64)
             for who, texts in answers.items()}
    if arguments.answers:
        write_json(arguments.answers, [{"image": image} | vars(question) | {who: texts[i] for who, texts in answers.items()}
                                       for i, (image, question) in enumerate(zip(names, questions))])
    found = {"model": name.removeprefix(f"{ROOT}/"), "questions": len(questions), "accuracy": {},
             "gain of the own picture, 95%": {}}
    kinds = {"all": np.full(len(questions), True)}
    kinds |= {kind: np.array([question.kind == kind for question in questions]) for kind in sorted(constants)}
    print(f"| kind | questions | {' | '.join(answers)} |\n|{'---|' * (2 + len(answers))}")
    for kind, chosen in kinds.items():
        found["accuracy"][kind] = {"questions": int(chosen.sum())} | {who: float(right[who][chosen].mean()) for who in answers}
        print(f"| {kind} | {chosen.sum()} | {' | '.join(f'{right[who][chosen].mean():.3f}' for who in answers)} |")
    for who in "another's picture", "constant":
        gain = paired_bootstrap(right["own picture"] - right[who])
        found["gain of the own picture, 95%"][f"over {who}"] = vars(gain)
        print(f"own picture over {who}: {gain.value:+.3f} ({gain.low:+.3f} to {gain.high:+.3f})")
    write_json(arguments.results, found)


def ask(model, questions, names, arguments):
    """An answer to each question about the picture with that name."""
    answers = []
    for start in tqdm(range(0, len(questions), arguments.batch_size), unit="batch", desc="asking"):
        some = slice(start, start + arguments.batch_size)
        pictures = [load_picture(arguments.images / name, SIDE) for name in names[some]]
        answers += model.answer(pictures, [question.query for question in questions[some]], LlavaSettings(max_new_tokens=12))
    return answers


def others(names, seed):
    """The same names, permuted so that no question has its own picture, if possible."""
    random = np.random.default_rng(seed)
    dealt = list(random.permutation(names))
    for i, name in enumerate(names):
        if dealt[i] == name:  # swap with one that fits both
            j = next((int(j) for j in random.permutation(len(names)) if dealt[j] != name and names[j] != name), i)
            dealt[i], dealt[j] = dealt[j], dealt[i]
    return [str(name) for name in dealt]


def same(one, other):
    """Whether two answers have the same words."""
    return re.findall(r"\w+", one.lower()) == re.findall(r"\w+", other.lower())


if __name__ == "__main__":
    run(main)
