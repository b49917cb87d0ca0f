"""Find pictures by a sentence, or by a similar picture.

    python3 p4_search.py index <folder> [--captions]                 with subfolders; run again to update
    python3 p4_search.py query "two dogs in the snow" [--top 15] [--not "people"] [--folder F] [--since 2026-01] [--sheet out.png]
    python3 p4_search.py query --like picture.jpg
    python3 p4_search.py evaluate --data <folder> [<more>]           recall, and detection that nothing matches

Pictures are embedded by our own CLIP, or another `--model`, and stored in Milvus: in the folder `--index`, or on a server at
http://host:port. With `--captions` they are also captioned, and the caption's similarity is part of the score.
"""

import tempfile
from datetime import datetime
from pathlib import Path

import numpy as np
import torch

from captioner import EMBEDDED_CHECKPOINT, EMBEDDED_DECODER, Captioner, caption_folder
from cli import ArgumentParser, UserError, printable, run
from clip_model import load_clip
from dataset import clean_captions, read_captions
from devices import pick_device
from files import check_output, read_json, write_json, write_whole
from picture_index import CAPTION_WEIGHT, DEFAULT_INDEX, FITS, PictureIndex
from retrieval import Ranks, auroc
from runtime import RUNTIME_HELP, pick_runtime
from significance import paired_bootstrap

COLUMNS = 5  # of a contact sheet


def captions_of(model, generation=None):
    """A function that captions a list of paths, for PictureIndex.update."""
    def caption(paths):
        numbered = {str(number): Path(path) for number, path in enumerate(paths)}
        found, _ = caption_folder(model, numbered, generation or model.generation, device=pick_device(), progress=False)
        return {paths[int(number)]: text for number, text in found.items()}

    return caption


def load_captioner(runtime):
    return Captioner.load(EMBEDDED_CHECKPOINT, EMBEDDED_DECODER, runtime=pick_runtime(runtime, pick_device()))


def seconds_of(date):
    """"2026", "2026-01" or "2026-01-31" -> seconds since 1970 of its start in local time. Raises UserError."""
    for form in "%Y-%m-%d", "%Y-%m", "%Y":
        try:
            return int(datetime.strptime(date, form).timestamp())
        except ValueError:
            continue
    raise UserError(f"--since is {date!r}, but must be a date such as 2026-01-31, 2026-01 or 2026")


def draw_sheet(hits, title):
    """A contact sheet of the hits with their scores, as PNG."""
    from matplotlib.figure import Figure

    from attention_figures import render
    from images import ImageError, load_image, thumbnail

    rows = -(-len(hits) // COLUMNS)
    figure = Figure((3 * COLUMNS, 3.2 * rows + 0.6), layout="constrained")
    figure.suptitle(title.replace("$", r"\$"))
    for axis, hit in zip(figure.subplots(rows, COLUMNS, squeeze=False).flat, hits):
        try:
            axis.imshow(thumbnail(load_image(hit.path, 400), 400))
        except ImageError:
            axis.text(0.5, 0.5, "gone", ha="center")
        axis.set_title(f"{hit.score:.3f}  {Path(hit.path).name[:28]}".replace("$", r"\$"), fontsize=9)
    for axis in figure.axes:
        axis.axis("off")
    return render(figure, "png")


# ---- commands --------------------------------------------------------------------------------------------------


def index_folder(arguments):
    index = PictureIndex(arguments.index, load_clip(arguments.model, pick_device(), runtime=arguments.runtime), rebuild=True)
    caption = captions_of(load_captioner(arguments.runtime)) if arguments.captions else None
    counts, unread = index.update(arguments.folder, caption)
    print(f"{printable(str(arguments.folder))}: " + ", ".join(f"{count} {what}" for what, count in counts.items())
          + (f"; {len(unread)} could not be read" if unread else "") + f"; the index {arguments.index} holds {len(index)} vectors")
    index.close()
    return 3 if unread else 0


def query_index(arguments):
    if (arguments.text is None) == (arguments.like is None):
        raise UserError("name a sentence, or a picture with --like")
    if arguments.top < 1:
        raise UserError("--top must be at least 1")
    since = seconds_of(arguments.since) if arguments.since else None
    for path, kind in (arguments.sheet, "PNG"), (arguments.json, "JSON"):
        if path:
            check_output(path, kind, [arguments.like])
    if "://" not in arguments.index and not Path(arguments.index).is_dir():
        raise UserError(f"there is no index {arguments.index}: make one with `p4_search.py index <folder>`")
    index = PictureIndex(arguments.index, load_clip(arguments.model, pick_device(), runtime=arguments.runtime))
    if not len(index):
        raise UserError(f"the index {arguments.index} holds no pictures of this model: `p4_search.py index <folder>` puts them in")
    vector = index.query(arguments.text) if arguments.text is not None else index.query_like(arguments.like)
    without = index.query(arguments.without) if arguments.without else None
    hits = index.find(vector, arguments.top + bool(arguments.like), without, arguments.folder, since)
    fits = arguments.text is None or index.fits(arguments.text, arguments.folder, since)
    if arguments.like:
        hits = [hit for hit in hits if hit.path != str(Path(arguments.like).resolve())][:arguments.top]
    index.close()
    if not hits:
        print("no picture is left by --folder, --since and --not")
    elif not fits:
        print("nothing here seems to show that; the nearest:")
    for hit in hits:
        print(f"{hit.score:7.3f}  {printable(hit.path)}" + (f"  {hit.caption}" if hit.caption else ""))
    if arguments.sheet and hits:
        write_whole(arguments.sheet, draw_sheet(hits, arguments.text or f"like {Path(arguments.like).name}"))
    if arguments.json:
        write_json(arguments.json, {"fits": fits, "hits": [vars(hit) for hit in hits]})


def evaluate(arguments):
    """Recall of a temporary index of each folder's validation pictures."""
    clip, results = load_clip(arguments.model, pick_device(), runtime=arguments.runtime), {}
    predicted = read_json(arguments.captions_file, "captions") if arguments.captions_file else None
    caption = captions_of(load_captioner(arguments.runtime)) if arguments.captions else None
    if predicted is not None:
        caption = lambda paths: {path: predicted[Path(path).stem] for path in paths if Path(path).stem in predicted}
    for data in arguments.data:
        images = read_captions(Path(data) / f"{arguments.split}.json", Path(data) / "images" / arguments.split)
        images = [image for image in images if image.captions][-arguments.last:]
        if len({image.path.name for image in images}) < len(images):
            raise UserError(f"{data} has two pictures of the same name in different folders, which the index would mix up")
        with tempfile.TemporaryDirectory() as folder:
            for image in images:
                (Path(folder) / image.path.name).symlink_to(image.path.resolve())
            index = PictureIndex(Path(folder) / "search.db", clip)
            _, unread = index.update(folder, caption)
            images = [image for image in images if str(Path(folder).resolve() / image.path.name) not in unread]
            results[data] = measure(index, Path(folder).resolve(), images, arguments.caption_weight if caption else [0.0])
            index.close()
        print(f"{data}: {len(images)} pictures, {sum(len(image.captions) for image in images)} captions")
        for name, row in results[data].items():
            print(f"  {name:58}" + "  ".join(f"{key} {value:.3f}" for key, value in row.items()))
    if arguments.json:
        write_json(arguments.json, results)


def measure(index, folder, images, caption_weights):
    """{name: {"R@1": …, …}} of an index of these pictures, with their reference captions as queries: recall of the index's answers and of
    exact ranking, and how well it detects that nothing matches. For each weight of the captioner's captions, also the gain over
    weight 0, with a 95% interval."""
    number = {str(folder / image.path.name): i for i, image in enumerate(images)}
    vectors = np.empty((len(images), 2 * index.dim), np.float32)
    for entry in index.entries(("path", "vector")):
        vectors[number[entry["path"]]] = entry["vector"]  # if a picture has several, the last
    texts = [clean_captions(image) for image in images]
    owners = torch.repeat_interleave(torch.tensor([*map(len, texts)]))
    of_texts = index.clip.encode_texts([text for captions in texts for text in captions]).numpy()
    first = np.append(True, owners[1:] != owners[:-1])
    found, plain = {}, None
    for weight in dict.fromkeys([0.0, *caption_weights]):
        queries = np.concatenate([of_texts, weight * of_texts], 1)
        answers = [[number[hit.path] for hit in hits] for hits in index.search_many(queries, 10)]
        for what, chosen in ("all captions", np.ones(len(owners), bool)), ("first captions", first):
            name = f"{what}, captioner's weight {weight:g}"
            right = np.array([[owner in answer[:k] for k in (1, 5, 10)] for owner, answer, use in zip(owners.tolist(), answers, chosen) if use])
            found[f"{name}: the index's answers"] = {f"R@{k}": float(part) for k, part in zip((1, 5, 10), right.mean(0))}
            if index.clip.vectors_per_image == 1:
                ranks = Ranks.of(torch.from_numpy(queries[chosen] @ vectors.T), owners[chosen])
                for way, parts in ranks.recalls().items():
                    found[f"{name}: {way}"] = {f"R@{k}": part for k, part in parts.items()} | {"median rank": ranks.medians()[way]}
            if what == "all captions":
                hits = np.array([right[(owners == i).numpy()].mean(0) for i in range(len(images))])
                plain = hits if plain is None else plain
                if weight:
                    for k, part in zip((1, 5, 10), (hits - plain).T):
                        gain = paired_bootstrap(part)
                        found[f"{name}: more than without, R@{k}"] = {"difference": gain.value, "from": gain.low, "to": gain.high}
    if index.clip.vectors_per_image == 1:  # only half of the pictures are searched, so that nothing matches the others' captions
        scores = of_texts[first] @ vectors[::2, :index.dim].T
        best, present = scores.max(1), owners.numpy()[first] % 2 == 0
        level, slope = index.clip.fit or (scores.mean(1), FITS)
        above = best - level - slope * scores.std(1)
        found["nothing here fits"] = {"AUROC": auroc(above[present], above[~present]), "kept of those here": float((above[present] >= 0).mean()),
                                      "told of the others": float((above[~present] < 0).mean())}
    return found


def main():
    parser = ArgumentParser(description="Find pictures by a sentence, or by a similar picture.")
    commands = parser.add_subparsers(dest="command", required=True)
    adding = commands.add_parser("index", help="add a folder's pictures, with subfolders, or update them")
    adding.add_argument("folder", type=Path)
    adding.add_argument("--captions", action="store_true", help="also caption each picture")
    asking = commands.add_parser("query", help="find pictures")
    asking.add_argument("text", nargs="?", help="a sentence")
    asking.add_argument("--like", metavar="PICTURE", help="a picture to search by, instead of a sentence")
    asking.add_argument("--top", type=int, default=15)
    asking.add_argument("--not", dest="without", metavar="TEXT", help="leave out pictures that show this")
    asking.add_argument("--folder", help="only pictures in this folder and its subfolders")
    asking.add_argument("--since", metavar="DATE", help="only pictures taken since: 2026, 2026-01 or 2026-01-31")
    asking.add_argument("--sheet", metavar="PNG", help="write a contact sheet of the hits")
    asking.add_argument("--json", metavar="FILE", help="write the hits as JSON")
    scoring = commands.add_parser("evaluate", help="recall on folders in the course's layout")
    scoring.add_argument("--data", nargs="+", default=["data"], help="folders with val.json and images/val")
    scoring.add_argument("--captions", action="store_true", help="also index the captioner's captions")
    scoring.add_argument("--captions_file", help="use these captions: predictions of p2_infer.py")
    scoring.add_argument("--caption_weight", nargs="+", type=float, default=[CAPTION_WEIGHT], help="of the captioner's captions in the score")
    scoring.add_argument("--split", choices=["val", "train"], default="val")
    scoring.add_argument("--last", type=int, default=0, help="only so many pictures, from the end of the file; 0: all")
    scoring.add_argument("--json", metavar="FILE", help="write the metrics as JSON")
    for command in adding, asking:
        command.add_argument("--index", default=DEFAULT_INDEX, help="a folder for the index, or http://host:port of a Milvus server")
    for command in adding, asking, scoring:
        command.add_argument("--model", help="CLIP: clip_small, OpenAI's, or a folder or hub name of a dual encoder of transformers")
        command.add_argument("--runtime", default="auto", help=RUNTIME_HELP)
    arguments = parser.parse_args()
    return {"index": index_folder, "query": query_index, "evaluate": evaluate}[arguments.command](arguments)


if __name__ == "__main__":
    run(main)
