"""COCO in the course's layout, from a local copy and from a small server in place of COCO's."""

import hashlib
import http.server
import io
import json
import subprocess
import threading
import zipfile

import pytest
from conftest import ROOT
from PIL import Image

import get_dataset
from cli import UserError
from dataset import read_captions


def jpeg(shade):
    data = io.BytesIO()
    Image.new("RGB", (8, 8), (shade, 0, 0)).save(data, "JPEG")
    return data.getvalue()


IMAGES = {"train2017": {f"{i:012}.jpg": jpeg(i) for i in range(5)}, "val2017": {f"{i:012}.jpg": jpeg(i) for i in (7, 8)}}
CAPTIONS = {folder: {
    "info": {"year": 2017}, "licenses": [],
    "images": [{"file_name": name, "id": int(name[:-4]), "height": 8, "width": 8, "license": 1} for name in names],
    "annotations": [{"id": 10 * int(name[:-4]) + k, "image_id": int(name[:-4]), "caption": f"caption {k} of {name}"}
                    for name in [*names][:4] for k in range(2)]} for folder, names in IMAGES.items()}


def archive(files):
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as zipped:
        for name, content in files.items():
            zipped.writestr(name, content)
    return data.getvalue()


ARCHIVES = {f"zips/{folder}.zip": archive({f"{folder}/": b"", **{f"{folder}/{name}": data for name, data in files.items()}})
            for folder, files in IMAGES.items()}
ARCHIVES["annotations/annotations_trainval2017.zip"] = archive(
    {f"annotations/captions_{folder}.json": json.dumps(data) for folder, data in CAPTIONS.items()}
    | {"annotations/instances_val2017.json": "{}"})


class Server:
    """Serves ARCHIVES with ranges; `cut`: break off the next answer after so many bytes."""

    def __init__(self):
        self.cut, self.ranges, server = None, [], self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                data = ARCHIVES[self.path[1:]]
                start = int(self.headers.get("Range", "bytes=0-")[6:-1])
                server.ranges.append((self.path[1:], start))
                self.send_response(206 if "Range" in self.headers else 200)
                self.send_header("Content-Length", str(len(data) - start))
                self.end_headers()
                cut, server.cut = server.cut, None
                self.wfile.write(data[start:][:cut])

            def log_message(self, *arguments):
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, args=(0.05,), daemon=True).start()


@pytest.fixture
def server(monkeypatch):
    server = Server()
    monkeypatch.setattr(get_dataset, "SERVER", f"http://127.0.0.1:{server.http.server_port}")
    monkeypatch.setattr(get_dataset, "FILES", {name: (len(data), hashlib.md5(data).hexdigest()) for name, data in ARCHIVES.items()})
    yield server
    server.http.shutdown()
    server.http.server_close()


def check(folder, splits=("train", "val")):
    """The layout as training reads it: images with captions alone, two captions each, nothing left over."""
    for split in splits:
        images = read_captions(folder / f"{split}.json", folder / "images" / split)
        names = [*IMAGES[f"{split}2017"]][:4]
        assert [image.path.name for image in images] == names
        assert images[0].captions == [f"caption {k} of {names[0]}" for k in range(2)]
        assert images[0].path.read_bytes() == IMAGES[f"{split}2017"][names[0]]
        assert json.loads((folder / f"{split}.json").read_text()).keys() == {"annotations", "images"}
    assert sorted(path.name for path in folder.iterdir()) == sorted(["images", *(f"{split}.json" for split in splits)])
    assert sorted(path.name for path in (folder / "images").iterdir()) == sorted(splits)


def test_coco_is_downloaded_and_goes_on_where_it_was_interrupted(tmp_path, server, capsys):
    folder = tmp_path / "my data"
    server.cut = 100
    with pytest.raises(UserError, match="is not complete: run the same command again"):
        get_dataset.download(folder_of(folder), ["train", "val"])
    get_dataset.download(folder, ["train", "val"])
    check(folder)
    assert [start for name, start in server.ranges if name == "zips/train2017.zip"] == [0, 100]
    before = len(server.ranges)
    get_dataset.download(folder, ["train", "val"])  # everything is there
    assert len(server.ranges) == before and "0.0 GB to download" in capsys.readouterr().out.splitlines()[-1]


def folder_of(folder):
    (folder / "images").mkdir(parents=True)
    return folder


def test_one_split_alone(tmp_path, server):
    get_dataset.download(folder_of(tmp_path / "data"), ["val"])
    check(tmp_path / "data", ["val"])
    assert {name for name, _ in server.ranges} == {"zips/val2017.zip", "annotations/annotations_trainval2017.zip"}


def test_a_damaged_archive_is_fetched_again(tmp_path, server):
    folder = folder_of(tmp_path / "data")
    (folder / "val2017.zip").write_bytes(b"x" * len(ARCHIVES["zips/val2017.zip"]))
    with pytest.raises(UserError, match="val2017.zip is damaged and was deleted"):
        get_dataset.download(folder, ["val"])
    get_dataset.download(folder, ["val"])
    check(folder, ["val"])


def test_no_network_and_no_space_are_said_in_one_line(tmp_path, server, monkeypatch):
    folder = folder_of(tmp_path / "data")
    with monkeypatch.context() as context:
        context.setattr(get_dataset, "SERVER", "http://127.0.0.1:9")
        with pytest.raises(UserError, match="downloading .* failed .*the same command goes on"):
            get_dataset.download(folder, ["val"])
    monkeypatch.setattr(get_dataset.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 10}))
    with pytest.raises(UserError, match="too little space"):
        get_dataset.download(folder, ["val"])


@pytest.fixture
def copy(tmp_path):
    copy = tmp_path / "COCO copy"
    (copy / "annotations").mkdir(parents=True)
    for folder, files in IMAGES.items():
        (copy / folder).mkdir()
        for name, data in files.items():
            (copy / folder / name).write_bytes(data)
        (copy / "annotations" / f"captions_{folder}.json").write_text(json.dumps(CAPTIONS[folder]))
    return copy


def test_a_copy_is_converted_by_the_script(tmp_path, copy):
    command = ["bash", str(ROOT / "get_dataset.sh"), str(tmp_path / "new" / "data"), copy.name]
    for _ in range(2):  # a second run changes nothing
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0 and "4 images, 8 captions" in done.stdout, done.stderr
        check(tmp_path / "new" / "data")
    (copy / "val2017").rename(copy / "elsewhere")
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and "val2017 does not exist" in done.stderr and done.stderr.count("\n") == 1


def test_other_images_are_not_replaced_and_other_files_are_refused(tmp_path, copy):
    folder = folder_of(tmp_path / "data")
    (folder / "images" / "val").mkdir()
    with pytest.raises(UserError, match="images/val is there already"):
        get_dataset.link(folder, copy, ["val"])
    (copy / "annotations" / "captions_train2017.json").write_text('{"images": []}')
    with pytest.raises(UserError, match="not in COCO's form"):
        get_dataset.link(folder, copy, ["train"])
