"""Referring expressions and boxes: reading RefCOCO, and parsing the boxes in a model's answers in several formats.

Boxes are left, top, right, bottom in pixels of the stored picture.
"""

import pickle
import re
from pathlib import Path

import torch
from torchvision.ops import box_iou

from cli import UserError
from files import read_json
from vqa import Asked

NUMBER = r"(-?\d+(?:\.\d+)?)"


class PlainUnpickler(pickle.Unpickler):
    """Reads lists, dicts, strings and numbers, and refuses everything that would run code."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def read_references(references, instances, pictures, split=""):
    """RefCOCO's refs(unc).p, or the same as JSON, with instances.json: [Asked, …], one for each sentence, with its box.

    Args:
        pictures: folder of COCO's pictures.
        split: only this split, such as val or testA; "": all.
    Raises UserError, also for a pickle of more than plain values, without running its code.
    """
    try:
        if Path(references).suffix == ".json":
            rows = read_json(references, "referring expressions")
        else:
            with open(references, "rb") as file:
                rows = PlainUnpickler(file, encoding="utf-8").load()
        content = read_json(instances, "instances file")
        boxes = {entry["id"]: entry["bbox"] for entry in content["annotations"]}
        files = {entry["id"]: entry["file_name"] for entry in content["images"]}
        found = []
        for row in rows:
            if split and row["split"] != split:
                continue
            x, y, width, height = map(float, boxes[row["ann_id"]])
            for number, sentence in enumerate(row["sentences"]):
                found.append(Asked(f"{row['ref_id']}-{number}", Path(pictures) / files[row["image_id"]], sentence["sent"],
                                   box=(x, y, x + width, y + height)))
    except OSError as error:
        raise UserError(f"cannot read the referring expressions {references}: {error.strerror}") from None
    except (pickle.UnpicklingError, EOFError, ValueError, IndexError, AttributeError) as error:
        raise UserError(f"{references} is not a plain file of referring expressions: {error}") from None
    except (LookupError, TypeError) as error:
        raise UserError(f"{references} with {instances} is not as RefCOCO has it: {type(error).__name__} {error}") from None
    if not found:
        raise UserError(f"{references} has no expressions" + (f" of the split {split}" if split else ""))
    return found


def fractions_of_padded_square(numbers, width, height):
    """LLaVA-1.5's format: fractions of a square with the longer side's length, with the picture centred in it, as it was shown."""
    side = max(width, height)
    left, top = (side - width) / 2, (side - height) / 2
    return [numbers[0] * side - left, numbers[1] * side - top, numbers[2] * side - left, numbers[3] * side - top]


def parts_of_picture(parts):
    """A format that divides each side of the picture into so many parts."""
    return lambda numbers, width, height: [number / parts * length for number, length in zip(numbers, (width, height) * 2)]


def corner_and_size(numbers, width, height):
    """The format "hundredths": left, top, width and height in hundredths of the picture."""
    x, y, w, h = numbers
    return parts_of_picture(100)([x, y, x + w, y + h], width, height)


def paligemma(numbers, width, height):
    """PaliGemma's format: top, left, bottom, right in 1,024ths of the picture."""
    top, left, bottom, right = numbers
    return parts_of_picture(1024)([left, top, right, bottom], width, height)


# Box formats of models: pattern in an answer, function from its numbers to pixels, and prompt.
FORMS = {
    "hundredths": (re.compile(rf"\{{<{NUMBER}><{NUMBER}><{NUMBER}><{NUMBER}>\}}"), corner_and_size,
                   "Where is {}? Answer with its box."),
    "llava": (re.compile(rf"\[\s*{NUMBER},\s*{NUMBER},\s*{NUMBER},\s*{NUMBER}\s*\]"), fractions_of_padded_square,
              "Please provide the bounding box coordinate of the region this sentence describes: {}."),
    "paligemma": (re.compile(r"<loc(\d{4})><loc(\d{4})><loc(\d{4})><loc(\d{4})>"), paligemma, "detect {}"),
    "qwen": (re.compile(rf"\({NUMBER},\s*{NUMBER}\)\s*,?\s*\({NUMBER},\s*{NUMBER}\)"), parts_of_picture(1000),
             "Output the bounding box of: {}"),
    "qwen2.5": (re.compile(rf"\"bbox_2d\":\s*\[\s*{NUMBER},\s*{NUMBER},\s*{NUMBER},\s*{NUMBER}\s*\]"),
                lambda numbers, width, height: numbers, "Locate {}, output its bbox coordinates using JSON format."),
}


def parse_box(answer, form, width, height):
    """The first box of an answer in pixels of a picture of this size; None if there is none, or its area is zero.

    Args:
        form: one of FORMS. Boxes in other formats are ignored.
    """
    pattern, frame, _ = FORMS[form]
    if not (found := pattern.search(answer)):
        return None
    left, top, right, bottom = frame([float(number) for number in found.groups()], width, height)
    return (left, top, right, bottom) if left < right and top < bottom else None


def overlaps(found, expected):
    """Intersection over union of pairs of boxes, 0 if the found one is None: two lists -> floats."""
    first = torch.tensor([box or (0.0, 0.0, 0.0, 0.0) for box in found]).view(-1, 4)
    values = box_iou(first, torch.tensor(expected, dtype=torch.float32).view(-1, 4)).diagonal()
    return [value if box else 0.0 for box, value in zip(found, values.tolist())]
