"""Answers of a LLaVA to many pictures: in batches, saved after each, so that an interrupted run can resume."""

import hashlib
import json
import sys
from pathlib import Path

from tqdm import tqdm

from files import fingerprints
from images import ImageError, load_image, read_batches
from llava import SIDE


class PartFile:
    """The answers so far, as JSON lines beside the output, so that an interrupted run can resume.

    Unreadable images are tried again, since they may have been repaired.

    Args:
        output: the final output file. what: all settings that answers depend on; answers of other settings are discarded.
        pictures: {stem: fingerprint}; answers to other pictures with the same names are discarded.
    """

    def __init__(self, output, what, pictures):
        self.path = Path(f"{output}.part")
        self.entries = {}
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        first, *rest = [entry for entry in map(self._entry, lines) if entry] or [None]
        if first == {"what": what}:
            self.entries = {entry["stem"]: entry for entry in rest if "answer" in entry
                            and entry.get("of") == pictures.get(entry["stem"])}
        elif lines:
            print(f"{self.path} is of other settings: starting again", file=sys.stderr)
        self.pictures = pictures
        self.path.write_text("".join(f"{json.dumps(entry)}\n" for entry in [{"what": what}, *self.entries.values()]), "utf-8")

    @staticmethod
    def _entry(line):
        try:
            return json.loads(line)
        except ValueError:  # a killed run may leave half a line
            return None

    def add(self, entries):
        entries = [entry | {"of": self.pictures[entry["stem"]]} for entry in entries]
        self.entries |= {entry["stem"]: entry for entry in entries}
        with open(self.path, "a", encoding="utf-8") as file:
            file.write("".join(f"{json.dumps(entry)}\n" for entry in entries))


def digest_of_model(name):
    """sha256 over the fingerprints of the files in a model's folder; a name on the hub has none."""
    return hashlib.sha256(json.dumps(fingerprints(sorted(path for path in Path(name).glob("*") if path.is_file()))).encode()).hexdigest()


def answer_all(model, asked, settings, output, what, batch_size, description="answering", change=None):
    """Ask about many pictures; answers of an earlier run with the same `what` and batches are kept in `output`.part.

    Args:
        model: a Llava. asked: {name: (path of the picture, instruction)}.
        change: function from a picture to the one to show instead.
    Returns ({name: answer}, {name: reason} for unreadable pictures).
    """
    names, paths = list(asked), [path for path, _ in asked.values()]
    part = PartFile(output, what, {name: [*fingerprint, asked[name][1]] for name, (_, *fingerprint) in zip(names, fingerprints(paths))})
    batches = [(start, names[start:start + batch_size]) for start in range(0, len(names), batch_size)]
    batches = [(start, batch) for start, batch in batches if not all(name in part.entries for name in batch)]

    def read(name):
        picture = load_image(asked[name][0], SIDE)
        return change(picture) if change else picture

    with tqdm(total=len(names), initial=len(names) - sum(len(batch) for _, batch in batches), unit="image", desc=description) as bar:
        for (start, batch), found in zip(batches, read_batches([batch for _, batch in batches], read)):
            good = [(name, picture) for name, picture in found if not isinstance(picture, ImageError)]
            answers = model.answer([picture for _, picture in good], [asked[name][1] for name, _ in good], settings,
                                   settings.seed * 1_000_003 + start) if good else []
            part.add([{"stem": name, "answer": answer} for (name, _), answer in zip(good, answers)]
                     + [{"stem": name, "unread": str(error)} for name, error in found if isinstance(error, ImageError)])
            bar.update(len(batch))
    return ({name: part.entries[name]["answer"] for name in names if "answer" in part.entries[name]},
            {name: part.entries[name]["unread"] for name in names if "unread" in part.entries[name]})
