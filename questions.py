"""Questions that follow from the captions of a picture, and their answers."""

import random
import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch

from cli import UserError
from dataset import CaptionedImage, clean_caption, clean_captions
from files import read_json

ANIMALS = {"dog", "cat", "horse", "cow", "sheep", "bird", "bear", "elephant", "goat", "camel", "duck", "monkey", "zebra", "giraffe"}
THINGS = sorted(ANIMALS | {
    "ball", "bike", "boat", "bench", "beach", "car", "child", "fence", "flag", "flower", "frisbee", "grass", "guitar",
    "hat", "helmet", "kayak", "man", "motorcycle", "mountain", "pool", "rock", "rope", "sand", "shirt", "skateboard", "snow",
    "stick", "street", "surfboard", "table", "tree", "umbrella", "wall", "water", "wave", "woman"})
ANYONE = """person people someone somebody couple crowd group family friend team player worker athlete runner racer rider biker cyclist
bicyclist motorcyclist climber hiker surfer swimmer diver skier skater skateboarder snowboarder sledder kayaker performer dancer
musician artist tourist fan"""  # who may be a man, a woman or a child
SAME = {  # words that mean a thing, or that suggest that it may be there
    "dog": "dogs puppy puppies animal animals canine hound poodle retriever", "cat": "cats kitten animal", "horse": "horses pony animal",
    "man": f"men guy adult he his him male boy {ANYONE}", "woman": f"women lady ladies adult she her female girl {ANYONE}",
    "child": f"children kid boy girl toddler baby babies infant youth youngster teenager student {ANYONE}",
    "bike": "bikes bicycle bicycles biker bikers bicyclist cyclist cyclists motorcycle motorbike cycle biking riding",
    "motorcycle": "motorcycles motorbike motorbikes bike motorcyclist dirt biker racer rider",
    "car": "cars vehicle vehicles truck traffic suv taxi van race",
    "water": "ocean sea lake river pool wave waves surf surfer surfing swim swims swimming stream pond splash splashing beach wet creek fountain",
    "pool": "swimming swim water swims swimmer", "beach": "sand sandy shore ocean sea coast seashore", "grass": "grassy lawn field park yard meadow",
    "snow": "snowy snowboard snowboarder snowboarding ski skier skis skiing snowball winter sled sledding ice",
    "ball": "balls football soccer basketball tennis baseball volleyball rugby player game",
    "shirt": "shirts t-shirt tshirt jersey top dressed wearing clothes",
    "mountain": "mountains hill hills cliff peak climbing climber", "rock": "rocks rocky stone stones boulder cliff climber climbing",
    "street": "streets road roads sidewalk city traffic town corner", "tree": "trees forest woods wooded branch branches log leaves",
    "hat": "hats cap caps helmet beanie headgear", "helmet": "helmets hat gear headgear biker motorcyclist football",
    "wall": "walls brick building graffiti mural", "sand": "sandy beach desert dune dunes dirt", "wave": "waves surf surfer surfing surfboard ocean",
    "surfboard": "surfboards surf surfer surfing board", "skateboard": "skateboards skateboarder skateboarding board skater",
    "bird": "birds duck ducks goose geese seagull pigeon pigeons", "boat": "boats kayak canoe raft ship sailboat",
    "kayak": "kayaker canoe boat kayaking",
    "rope": "ropes leash climber climbing swing", "table": "tables desk restaurant", "bench": "benches seat", "stick": "sticks branch log",
    "fence": "fences gate railing", "flag": "flags banner", "flower": "flowers",
    "guitar": "guitars musician band instrument", "umbrella": "umbrellas", "frisbee": "frisbees disc",
}
COLOURS = ["black", "white", "brown", "red", "blue", "green", "yellow", "orange", "pink", "purple", "gray"]
NUMBERS = {"one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6}
VERBS = {"sticks", "waves"}  # usually verbs
COUNTED = ["dogs", "men", "women", "people", "children", "boys", "girls", "horses", "kids", "players"]
PLACES = ["beach", "water", "snow", "grass", "street", "field", "pool", "air", "rock", "mountain", "sand", "park", "road", "ocean",
          "lake", "river", "woods", "forest", "bench", "wall", "sidewalk", "hill"]
ACTORS = ["dog", "man", "woman", "boy", "girl", "child", "person", "baby"]
ACTIONS = """running jumping swimming sitting standing walking playing riding climbing sleeping smiling skateboarding surfing
skiing snowboarding dancing eating singing digging laughing crawling swinging""".split()
WORDINGS = {
    "animal": ["What animal is in the picture?", "Which animal can be seen?", "What kind of animal is this?"],
    "count": ["How many {} are there?", "How many {} can you see?", "How many {} are in the picture?"],
    "colour": ["What colour is the {}?", "Which colour does the {} have?", "What is the colour of the {}?"],
    "action": ["What is the {} doing?", "What does the {} do?"],
    "presence": ["Is there a {} in the picture?", "Can you see a {}?", "Does the picture show a {}?"],
    "where": ["Where is the {}?", "In what place is the {}?"],
    "detail": ["Describe the image in detail.", "What can be seen in the picture? Tell everything.", "Give a detailed description."],
}
MASS = {"water", "grass", "snow", "sand"}  # without an article
GROUPS = {"animal": "qa", "count": "qa", "colour": "qa", "action": "qa", "presence": "qa", "where": "relation"}
CAPTION_QUERIES = ["Please give me a one sentence caption about the image.", "describe the image in one sentence",
                   "What is happening in the picture?", "Write a caption for this image."]


@dataclass
class Question:
    kind: str
    query: str
    answer: str


def read_questions(path):
    """A file of questions -> [(image, Question), …]. Raises UserError.

    Either a file of p4_questions.py, {image, kind, query, answer}, where `image` is a file name, or questions by people, {image,
    folder, question, answer}, where it becomes the Path images/<folder>/<image> beside the file, and the kind is "vqa".
    """
    entries = read_json(path, "questions file")
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise UserError(f"{path} is not a list of {{image, kind, query, answer}}")
    asked = all("question" in entry for entry in entries)
    keys = ("image", "folder", "question", "answer") if asked else ("image", "kind", "query", "answer")
    for entry in entries:
        if not all(isinstance(entry.get(key), str) for key in keys):
            raise UserError(f"{path} is not a list of {{{', '.join(keys)}}}, each a text: {str(entry)[:200]}")
    if not asked:
        return [(entry["image"], Question(*(entry[key] for key in keys[1:]))) for entry in entries]
    return [(Path(path).parent / "images" / entry["folder"] / entry["image"], Question("vqa", entry["question"], as_sentence(entry["answer"])))
            for entry in entries]


def as_sentence(answer):
    """"yes" -> "Yes.", the style of all answers here."""
    return f"{answer[:1].upper()}{answer[1:]}".removesuffix(".") + "."


def words_of(caption):
    return re.findall(r"[a-z][a-z-]*", caption.lower().replace("grey", "gray"))


def agreed(votes, captions=2):
    """The word in at least so many captions' sets, if no set has another word; else None. `votes`: a set of words per caption."""
    counts = Counter(word for said in votes for word in said)
    if len(counts) != 1:
        return None
    word, count = counts.most_common(1)[0]
    return word if count >= captions else None


def derive(captions, rng, all_things=False):
    """All questions that a picture's captions can answer, as a list of Question.

    Args:
        rng: random.Random, selects wordings and things.
        all_things: ask about all things that are present and all that are absent; else about one of each.
    """
    captions = [text for text in map(clean_caption, captions) if text]
    rows = [words_of(text) for text in captions]
    said = {form for row in rows for word in row for form in (word, word.removesuffix("s"))}
    found = []

    def ask(kind, answer, about=""):
        query = rng.choice(WORDINGS[kind]).format(about)
        query = re.sub(rf"\ba (?=(?:{'|'.join(MASS)})\b)", "", query)
        found.append(Question(kind, re.sub(r"\ba (?=[aeiou])", "an ", query), answer))

    if animal := agreed([{word.removesuffix("s") for word in row} & ANIMALS for row in rows]):
        ask("animal", f"A {animal}." if animal != "elephant" else "An elephant.")
    for plural in COUNTED:
        votes = [{a for a, b, c in zip(row, row[1:], row[2:] + [""]) if a in NUMBERS and plural in (b, c)} for row in rows]
        if number := agreed(votes):
            ask("count", f"{number.capitalize()}.", plural)
    mixed = any(b in ("and", "with") and c in COLOURS for row in rows for a, b, c in zip(row, row[1:], row[2:]) if a in COLOURS)
    for thing in [*sorted(ANIMALS), "shirt", "hat", "jacket", "dress", "car", "ball", "bike", "helmet", "coat", "shorts"]:
        votes = [{a for a, b in zip(row, row[1:]) if a in COLOURS and b == thing} for row in rows]
        if (colour := agreed(votes)) and not mixed:
            ask("colour", f"{colour.capitalize()}.", thing)
    for actor in ACTORS:
        votes = [{c if b in ("is", "are") else b for a, b, c in zip(row, row[1:], row[2:] + [""])
                  if a == actor and (c if b in ("is", "are") else b) in ACTIONS} for row in rows]
        if action := agreed(votes):
            ask("action", f"{action.capitalize()}.", actor)
        places = [{(" ".join(phrase)) for phrase in places_in(row)} for row in rows] if sum(actor in row for row in rows) > 1 else []
        if place := most_said(places):
            ask("where", f"{place.capitalize()}.", actor)
    nouns = [{*row} - VERBS for row in rows]
    present = [thing for thing in THINGS if sum(thing in row or f"{thing}s" in row for row in nouns) > 1]
    absent = [thing for thing in THINGS if not said & {thing, *SAME.get(thing, "").split()}]
    for answer, some in ("Yes.", present), ("No.", absent):
        for thing in some if all_things else rng.sample(some, min(1, len(some))):
            ask("presence", answer, thing)
    if len(captions) > 1:
        ask("detail", told_together(captions))
    return found


def places_in(row):
    """Phrases such as ("in", "the", "water") among a caption's words."""
    for i, word in enumerate(row[:-1]):
        if word in ("in", "on", "at"):
            after = row[i + 1:i + 4]
            for at, noun in enumerate(after):
                if noun in PLACES:
                    yield word, "the", noun
                    break
                if noun not in ("the", "a", "some") and at:
                    break


def most_said(votes, captions=2):
    """The word or phrase in the most captions' sets, if in at least so many and no other is in as many; else None."""
    counts = Counter(word for said in votes for word in said).most_common(2)
    if not counts or counts[0][1] < captions or len(counts) > 1 and counts[1][1] == counts[0][1]:
        return None
    return counts[0][0]


def told_together(captions):
    """The longest caption, followed by the one that adds the most new words to it."""
    longest = max(captions, key=lambda text: len(words_of(text)))
    others = [text for text in captions if text != longest]
    if not others:
        return longest
    return f"{longest} {max(others, key=lambda text: len(set(words_of(text)) - set(words_of(longest))))}"


def derive_all(images, seed=0, each_thing=None):
    """Questions about CaptionedImages: [(index of the image, Question), …], deterministic for a seed.

    Args:
        each_thing: a number: ask about all things in every picture, and keep at most so many yes and as many no for each thing;
            None: ask about one present and one absent thing per picture.
    """
    rng = random.Random(seed)
    found = [(number, question) for number, image in enumerate(images)
             for question in derive(image.captions, rng, all_things=each_thing is not None)]
    # Balance yes and no for each thing, so that its name alone does not predict the answer.
    answers = defaultdict(lambda: {"Yes.": [], "No.": []})
    for number, question in found:
        if question.kind == "presence":
            answers[thing_of(question.query)][question.answer].append((number, question))
    kept = [pair for pair in found if pair[1].kind != "presence"]
    for both in answers.values():
        count = min(map(len, both.values()))
        count = count if each_thing is None else min(count, each_thing)
        for some in both.values():
            kept += rng.sample(some, count)
    return sorted(kept, key=lambda pair: pair[0])


def thing_of(query):
    """The thing that a presence question asks about."""
    return re.search(rf"\b({'|'.join(THINGS)})\b", query)[1]


def best_constants(questions):
    """The most frequent answer of each kind: {kind: answer}, the baseline of a model that sees no picture."""
    answers = defaultdict(Counter)
    for question in questions:
        answers[question.kind][question.answer] += 1
    return {kind: counts.most_common(1)[0][0] for kind, counts in answers.items()}


@dataclass
class Sample:
    image: int  # its index
    query: str
    answer: str


def read_instructions(path, images):
    """A file of questions -> [(kind, Sample), …]; pictures without captions are appended to `images`. Raises UserError."""
    names, places, found = defaultdict(list), {}, []
    for number, image in enumerate(images):
        names[image.path.name].append(number)
        places[image.path.resolve()] = number
    for image, question in read_questions(path):
        if isinstance(image, Path):
            number = places.setdefault(image.resolve(), len(images))
            if number == len(images):
                images.append(CaptionedImage(image, []))
        elif len(names[image]) == 1:
            number = names[image][0]
        else:
            raise UserError(f"{path} asks about {image}, which " + ("several folders have" if names[image] else "is not in train.json"))
        query = " ".join(question.query.replace("<image>", " ").split())  # LLaVA's own data marks the picture's position so
        found.append((question.kind, Sample(number, query, question.answer)))
    return found


def instruction_samples(settings, images):
    """The samples of stage 2 by group: {group: [Sample, …]}. Raises UserError if a group of --mix has none."""
    captioned = list(enumerate(images))
    if settings.instructions:
        found = [pair for path in settings.instructions for pair in read_instructions(path, images)]
    else:
        found = [(question.kind, Sample(number, question.query, question.answer))
                 for number, question in derive_all(images, settings.seed)]
    groups = {}
    for kind, sample in found:
        groups.setdefault(GROUPS.get(kind, kind), []).append(sample)
    rng = random.Random(settings.seed)
    groups.setdefault("caption", [Sample(number, rng.choice(CAPTION_QUERIES), text) for number, image in captioned
                                  for text in clean_captions(image)])
    if lacking := [kind for kind in settings.parts() if not groups.get(kind)]:
        raise UserError(f"--mix names {lacking[0]}, of which there are no samples: there are {', '.join(sorted(groups))}")
    return groups


def sample_epoch(groups, parts, count, generator):
    """`count` samples in the groups' fractions `parts`; a group's samples are repeated only after all of them were used."""
    counts = {kind: int(part * count) for kind, part in parts.items()}
    counts[max(parts, key=parts.get)] += count - sum(counts.values())
    drawn = []
    for kind, number in counts.items():
        samples = groups[kind]
        rounds = [torch.randperm(len(samples), generator=generator) for _ in range(-(-number // len(samples)))]
        drawn += [samples[i] for i in torch.cat(rounds)[:number].tolist()] if number else []
    return [drawn[i] for i in torch.randperm(len(drawn), generator=generator).tolist()]


def by_picture(samples, most):
    """Group samples into rows of at most so many, each row about one picture, in the order of each row's first sample."""
    rows, open_rows = [], {}
    for sample in samples:
        row = open_rows.get(sample.image)
        if row is None or len(row) == most:
            rows.append(row := [])
            open_rows[sample.image] = row
        row.append(sample)
    return rows
