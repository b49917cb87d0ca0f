"""Visual question answering: reading data sets, and the official accuracy.

Accuracy is VQA v2's (Goyal et al. 2017, https://arxiv.org/abs/1612.00837; https://visualqa.org/evaluation.html): each of the ten people's
answers is left out in turn, and an answer that equals three or more of the other nine counts 1; with fewer, a third for each.
"""

import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from cli import UserError
from files import read_json

CONTRACTED = """ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't
hadn't've hasn't haven't he'd he'd've he's how'd how'll how's I'd've I'm I've isn't it'd it'd've it'll ma'am mightn't mightn't've might've
mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll
somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's where'd where's where've
who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll
you're you've""".split()
# The official rule restores a missing apostrophe of contractions.
CONTRACTIONS = {word[:at] + word[at + 1:]: word for word in CONTRACTED for at, mark in enumerate(word) if mark == "'"}
NUMBERS = {word: str(number) for number, word in enumerate("zero one two three four five six seven eight nine ten".split())} | {"none": "0"}
ARTICLES = {"a", "an", "the"}
PUNCTUATION = [*";/[]\"{}()=+\\_-><@`,?!"]
STOP = re.compile(r"(?!<=\d)\.(?!\d)")  # as in the official code: a full stop that no digit follows
THOUSANDS = re.compile(r"\d,\d")


def normalize(text):
    """An answer normalised by the official rule: without punctuation and articles, numbers as digits, in lower case."""
    text = " ".join(text.replace("\n", " ").replace("\t", " ").split(" ")).strip()
    plain = text
    for mark in PUNCTUATION:
        alone = f"{mark} " in text or f" {mark}" in text or THOUSANDS.search(text)
        plain = plain.replace(mark, "" if alone else " ")
    words = [NUMBERS.get(word, word) for word in STOP.sub("", plain).lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def accuracy(answer, people, always=False):
    """The accuracy of an answer, 0 to 1, given those of people (usually ten).

    Args:
        always: always normalise; the official rule does so only if people's answers differ.
    """
    answer = answer.replace("\n", " ").replace("\t", " ").strip()
    if always or len(set(people)) > 1:
        answer, people = normalize(answer), [normalize(text) for text in people]
    equal = [text == answer for text in people]
    return sum(min(1, (sum(equal) - one) / 3) for one in equal) / len(equal)


@dataclass
class Asked:
    """A question about a picture, or an expression for one object in it. `people`: people's answers; `kind` and `answer_kind`: of question
    and answer, for tables; `box`: the object's left, top, right, bottom."""

    name: str
    picture: Path
    query: str
    people: list = field(default_factory=list)
    kind: str = ""
    answer_kind: str = ""
    box: tuple = None

    @property
    def commonest(self):
        return Counter(self.people).most_common(1)[0][0]


def answer_kind(answer):
    """VQA v2's answer type: yes/no, number or other."""
    word = normalize(answer)
    return "yes/no" if word in ("yes", "no") else "number" if word.isdigit() else "other"


def first_words(query):
    """A question's kind if its file has none: its first two words."""
    return " ".join(re.findall(r"[\w']+", query.lower())[:2])


def read_vqa(questions, annotations=None, images=None):
    """Questions of VQA v2's or OK-VQA's two files, or of one list {image, folder, question, answer, agree}: [Asked, …].

    For OK-VQA, people's `answer` is used, not `raw_answer`. In the list, `agree` is the number of people, out of ten, who gave an
    answer; the others' answers are unknown, so an answer equal to theirs counts as wrong.

    Args:
        images: folder of pictures named COCO_<split>_<id>.jpg or <id>.jpg; default, for the list: images/ beside it.
    Raises UserError.
    """
    content = read_json(questions, "questions file")
    try:
        if isinstance(content, list):
            if not content:
                raise UserError(f"{questions} has no questions")
            root = Path(images) if images else Path(questions).parent / "images"
            return [Asked(str(number), root / entry["folder"] / entry["image"], entry["question"],
                          [entry["answer"]] * int(entry["agree"]) + [f"\0{i}" for i in range(10 - int(entry["agree"]))],
                          first_words(entry["question"]), answer_kind(entry["answer"])) for number, entry in enumerate(content)]
        if not annotations or not images:
            raise UserError(f"{questions} has questions alone: name --annotations and --images too")
        answers = {entry["question_id"]: entry for entry in read_json(annotations, "annotations file")["annotations"]}
        files = picture_files(images)
        found = []
        for entry in content["questions"]:
            said = answers[entry["question_id"]]
            found.append(Asked(str(entry["question_id"]), files[int(entry["image_id"])], entry["question"],
                               [person["answer"] for person in said["answers"]],
                               said.get("question_type", ""), said.get("answer_type", "")))
        return found
    except (LookupError, TypeError, ValueError) as error:
        raise UserError(f"{questions} with its annotations is not as VQA v2 has it: {type(error).__name__} {error}") from None


def picture_files(folder):
    """{COCO's or Visual Genome's image id: path} of a folder's pictures, from the last digits of their names. Raises UserError."""
    try:
        paths = sorted(Path(folder).iterdir())
    except OSError as error:
        raise UserError(f"cannot read the folder {folder}: {error.strerror}") from None
    return {int(digits[0]): path for path in paths if (digits := re.findall(r"\d+$", path.stem))}


def read_relations(path, pictures):
    """Visual Genome's question_answers.json, or questions like "What is the relationship between the man and the horse?" made from
    relationships.json: [Asked, …] for existing pictures.

    Args:
        pictures: as from `picture_files`. Raises UserError.
    """
    found = []
    try:
        for row in read_json(path, "questions file"):
            for entry in row.get("qas", ()):
                if entry["image_id"] in pictures:
                    found.append(Asked(str(entry["qa_id"]), pictures[entry["image_id"]], entry["question"], [entry["answer"].rstrip(".").lower()],
                                       first_words(entry["question"])))
            for entry in row.get("relationships", ()):
                if row["image_id"] in pictures:
                    names = [thing.get("name") or thing["names"][0] for thing in (entry["subject"], entry["object"])]
                    found.append(Asked(str(entry["relationship_id"]), pictures[row["image_id"]],
                                       f"What is the relationship between the {names[0].lower()} and the {names[1].lower()}?",
                                       [" ".join(entry["predicate"].lower().split())], "relationship"))
    except (LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not as Visual Genome has it: {type(error).__name__} {error}") from None
    if not found:
        raise UserError(f"{path} asks about none of the pictures that are there")
    return found
