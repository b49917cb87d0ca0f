"""Get COCO 2017's captions and images in the course's layout, which p2_train.py reads.

    python3 get_dataset.py data [copy of COCO] [--splits train val]

Writes data/train.json and data/images/train, data/val.json and data/images/val. By default it downloads, and resumes
if interrupted; from a copy (annotations/captions_train2017.json, train2017/, …), it links the images.
COCO: Lin et al. 2014, https://arxiv.org/abs/1405.0312; https://cocodataset.org/#termsofuse.
"""

import http.client
import shutil
import urllib.request
import zipfile
from pathlib import Path

from tqdm import tqdm

from cli import ArgumentParser, UserError, run
from files import digest_of, read_json, write_json

SERVER = "http://images.cocodataset.org"  # its HTTPS certificate is for another name, so files are verified by the digests below
# {file: (bytes, MD5)}
FILES = {"annotations/annotations_trainval2017.zip": (252907541, "f4bbac642086de4f52a3fdda2de5fa2c"),
         "zips/train2017.zip": (19336861798, "cced6f7f71b7629ddf16f17bbcfab6b2"),
         "zips/val2017.zip": (815585330, "442b8da7639aecaf257c1dceb8ba8c80")}


def main():
    parser = ArgumentParser(description="Get COCO 2017's captions and images in the course's layout.")
    parser.add_argument("folder", type=Path, help="where to write train.json, val.json and images/")
    parser.add_argument("copy", type=Path, nargs="?", help="folder with annotations/, train2017/ and val2017/, to link instead of downloading")
    parser.add_argument("--splits", nargs="+", choices=["train", "val"], default=["train", "val"], help="splits of COCO")
    arguments = parser.parse_args()
    try:
        (arguments.folder / "images").mkdir(parents=True, exist_ok=True)
        if arguments.copy:
            link(arguments.folder, arguments.copy, arguments.splits)
        else:
            download(arguments.folder, arguments.splits)
    except OSError as error:
        raise UserError(f"cannot write to {arguments.folder}: {error}") from None


def link(folder, copy, splits):
    """Convert the captions of a local copy of COCO and link its images."""
    for split in splits:
        images = copy / f"{split}2017"
        if not images.is_dir():
            raise UserError(f"{images} does not exist: name a folder that holds annotations/, train2017/ and val2017/")
        captions = read_json(copy / "annotations" / f"captions_{split}2017.json", "captions file")
        target = folder / "images" / split
        if not target.exists():
            target.symlink_to(images.resolve(), target_is_directory=True)
        elif target.resolve() != images.resolve():
            raise UserError(f"{target} is there already: delete it, or name another folder")
        write_captions(folder, split, captions)


def download(folder, splits):
    """Download what is missing, unpack it, and convert the captions."""
    archives = {split: f"zips/{split}2017.zip" for split in splits if not (folder / "images" / split).exists()}
    captions = [split for split in splits if not (folder / f"{split}.json").exists()]
    wanted = [*archives.values()] + ["annotations/annotations_trainval2017.zip"] * bool(captions)
    size = sum(FILES[name][0] for name in wanted)
    have = sum((folder / Path(name).name).stat().st_size for name in wanted if (folder / Path(name).name).exists())
    unpacked = sum(file.stat().st_size for file in folder.glob("images/*.part/*"))
    print(f"{(size - have) / 1e9:.1f} GB to download from {SERVER}", flush=True)
    # For a while, an archive and its contents are both on disk; JPEGs hardly compress, so both are of the same size.
    if (needed := 2 * size - have - unpacked) > shutil.disk_usage(folder).free:
        raise UserError(f"{folder} has too little space: {needed / 1e9:.0f} GB are needed")
    for split, name in archives.items():
        file = fetch(name, folder)
        part = folder / "images" / f"{split}.part"
        unpack(file, part)
        part.rename(folder / "images" / split)
        file.unlink()
    if captions:
        file = fetch("annotations/annotations_trainval2017.zip", folder)
        part = folder / "annotations.part"
        unpack(file, part, [f"captions_{split}2017.json" for split in captions])
        for split in captions:
            write_captions(folder, split, read_json(part / f"captions_{split}2017.json", "captions file"))
        shutil.rmtree(part)
        file.unlink()


def fetch(name, folder):
    """Download one archive, resuming if interrupted, and verify it."""
    file, (size, digest) = folder / Path(name).name, FILES[name]
    done = file.stat().st_size if file.exists() else 0
    if done < size:
        request = urllib.request.Request(f"{SERVER}/{name}", headers={"Range": f"bytes={done}-"} if done else {})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer, \
                    open(file, "ab" if answer.status == 206 else "wb") as out, \
                    tqdm(total=size, initial=out.tell(), unit="B", unit_scale=True, desc=file.name) as bar:
                while block := answer.read(1 << 20):
                    out.write(block)
                    bar.update(len(block))
        except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
            raise UserError(f"downloading {SERVER}/{name} failed ({error}): the same command goes on from there") from None
    if digest_of(file, "md5") != digest:
        short = file.stat().st_size < size
        if not short:
            file.unlink()
        raise UserError(f"{file} is {'not complete' if short else 'damaged and was deleted'}: run the same command again")
    return file


def unpack(archive, folder, names=None):
    """Extract all files, or those of these names, into `folder` without subfolders; complete ones that exist are skipped."""
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(archive) as zipped:
        members = [member for member in zipped.infolist() if not member.is_dir()]
        for member in tqdm(members, unit="file", desc=archive.name):
            target = folder / Path(member.filename).name
            if (names is None or target.name in names) and not (target.exists() and target.stat().st_size == member.file_size):
                with zipped.open(member) as source, open(target, "wb") as out:
                    shutil.copyfileobj(source, out)


def write_captions(folder, split, coco):
    """Write COCO's captions with the fields of the course's file, and only images that have a caption."""
    try:
        annotations = [{key: item[key] for key in ("caption", "id", "image_id")} for item in coco["annotations"]]
        captioned = {item["image_id"] for item in annotations}
        images = [{key: item[key] for key in ("file_name", "id")} for item in coco["images"] if item["id"] in captioned]
    except (KeyError, TypeError) as error:
        raise UserError(f"the captions of {split} are not in COCO's form: {type(error).__name__} {error}") from None
    file, content = folder / f"{split}.json", {"annotations": annotations, "images": images}
    if file.exists() and read_json(file, "captions file") != content:
        raise UserError(f"{file} is there already, with other captions: delete it, or name another folder")
    write_json(file, content)
    print(f"{folder / split}.json: {len(images)} images, {len(annotations)} captions")


if __name__ == "__main__":
    run(main)
