"""The search index of pictures, local and on a server, and p4_search.py."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import COLOURS, ROOT, VIT
from PIL import Image

import p4_search
import picture_index
from cli import UserError
from clip_model import DualEncoder
from images import resize_to_square
from picture_index import MOST, Hit, PictureIndex
from retrieval import auroc

pytest.importorskip("pymilvus")
pytest.importorskip("milvus_lite")


class Colourful(DualEncoder):
    """Embeds a picture by its mean colour, and a text by the colours that it names: no weights to load."""

    pixels, limit, fingerprint = 8, 100, "colourful"

    def __init__(self, name="colourful"):
        super().__init__(name, "cpu", 4)
        self.looked = 0

    def preprocess(self, image):
        return resize_to_square(image, 8)

    def embed_images(self, images):
        self.looked += len(images)
        return images.float().mean((2, 3)) / 255 - 0.5

    def embed_texts(self, texts):
        named = [[COLOURS[word] for word in text.lower().split() if word in COLOURS] or [(130, 128, 128)] for text in texts]
        return torch.tensor(np.array([np.mean(colours, 0) for colours in named])).float() / 255 - 0.5


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The address of a Milvus server on the loopback address."""
    folder = tmp_path_factory.mktemp("server")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen([str(Path(sys.executable).with_name("milvus-lite")), "server", "--data-dir", str(folder), "--host", "127.0.0.1",
                                "--port", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for _ in range(200):
        with socket.socket() as probe:
            if not probe.connect_ex(("127.0.0.1", port)):
                break
        time.sleep(0.1)
    yield f"http://127.0.0.1:{port}"
    process.kill()
    process.wait()


@pytest.fixture(params=["file", "server"])
def opened(request, tmp_path):
    """Function that opens the index, and what it embeds with."""
    where = tmp_path / "search.db" if request.param == "file" else request.getfixturevalue("server")
    clip = Colourful()
    clip.fingerprint = str(tmp_path)  # on the server, a collection for each test
    indices = []

    def opened(**options):
        while indices:
            indices.pop().close()
        indices.append(PictureIndex(where, clip, **options))
        return indices[-1]

    opened.clip, opened.where = clip, where
    yield opened
    while indices:
        indices.pop().close()


@pytest.fixture
def photos(tmp_path):
    """A folder with a subfolder; 40 pictures, of one colour each, and a bit of another."""
    folder, chance = tmp_path / "photos", np.random.default_rng(0)
    (folder / "sub folder").mkdir(parents=True)
    for i in range(40):
        colour = np.array(list(COLOURS.values())[i % 4]) + chance.integers(-12, 12, 3)
        place = folder / "sub folder" if i % 8 >= 4 else folder
        Image.new("RGB", (20, 16), tuple(map(int, colour.clip(0, 255)))).save(place / f"{list(COLOURS)[i % 4]} {i}.png")
    return folder


def names(hits):
    return [Path(hit.path).stem.split()[0] for hit in hits]


def contents(index):
    return sorted((entry["path"], entry["caption"], tuple(np.round(entry["vector"], 5))) for entry in index.entries(("path", "caption", "vector")))


def test_pictures_are_found_by_what_they_show(opened, photos):
    index = opened()
    counts, unread = index.update(photos)
    assert counts == {"new": 40, "moved": 0, "gone": 0, "kept": 0} and not unread and len(index) == 40
    for colour in COLOURS:
        hits = index.find(index.query(f"a {colour} picture"), 10)
        assert names(hits) == [colour] * 10 and [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
    assert names(index.find(index.query_like(photos / "red 0.png"), 10)) == ["red"] * 10
    assert index.find(index.query("red"), 1)[0].path == str(max(index.search(index.query("red"), 40), key=lambda hit: hit.score).path)


def test_conditions(opened, photos):
    index = opened()
    os.utime(photos / "red 0.png", (10**9, 10**9))
    index.update(photos)
    assert {Path(hit.path).parent.name for hit in index.search(index.query("red"), 40, folder=photos / "sub folder")} == {"sub folder"}
    assert len(index.search(index.query("red"), 40, folder=photos)) == 40
    assert len(index.search(index.query("red"), 40, since=10**9 + 1)) == 39
    assert not index.search(index.query("red"), 40, folder=photos / "elsewhere")
    without = index.find(index.query("red"), 40, without=index.query("blue"))
    assert set(names(without)) == {"red", "yellow"}  # nearer to red than to blue


def test_pictures_behind_many_to_leave_out_are_found(opened, monkeypatch):
    index, asked = opened(), []
    everything = [Hit(str(i), 1 - i / 1000, "", 0) for i in range(1000)]

    def search(vector, top, *conditions):
        asked.append(top)
        return [replace(hit, score=2.0) for hit in everything[:500]] if vector == "unwanted" else everything[:top]

    monkeypatch.setattr(index, "search", search)
    monkeypatch.setattr(index, "spread_of", lambda vector: (0.0, 0.0))
    assert index.find("wanted", 5, without="unwanted") == everything[500:505]
    assert asked == [MOST, 150, MOST]


def test_only_what_is_new_is_looked_at(opened, photos):
    index = opened()
    index.update(photos)
    looked = opened.clip.looked
    index = opened()  # another start
    assert index.update(photos)[0] == {"new": 0, "moved": 0, "gone": 0, "kept": 40} and opened.clip.looked == looked
    (photos / "red 0.png").rename(photos / "renamed.png")
    shutil.copy(photos / "blue 2.png", photos / "sub folder" / "copied.png")
    (photos / "green 1.png").unlink()
    Image.new("RGB", (9, 9), (0, 0, 0)).save(photos / "yellow 3.png")  # changed
    (photos / "broken.png").write_text("no picture")
    counts, unread = index.update(photos)
    assert counts == {"new": 1, "moved": 2, "gone": 2, "kept": 37} and opened.clip.looked == looked + 1
    assert [Path(path).name for path in unread] == ["broken.png"]
    paths = {Path(hit.path).name for hit in index.search(index.query("red"), 100)}
    assert {"renamed.png", "copied.png", "yellow 3.png"} <= paths and not {"red 0.png", "green 1.png", "broken.png"} & paths
    assert index.update(photos / "sub folder")[0]["gone"] == 0 and len(index) == 40


def test_files_that_change_names_in_a_chain_keep_what_they_show(opened, photos):
    index = opened()
    index.update(photos)
    names = ["red 0.png", "green 1.png", "blue 2.png", "yellow 3.png"]
    (photos / "yellow 3.png").rename(photos / "last.png")
    for old, new in ((2, 3), (1, 2), (0, 1)):
        (photos / names[old]).rename(photos / names[new])
    assert index.update(photos)[0] == {"new": 0, "moved": 4, "gone": 1, "kept": 36}
    expected = index.clip.encode_images([photos / name for name in (*names[1:], "last.png")])[1].numpy()
    found = {Path(entry["path"]).name: entry["vector"] for entry in index.entries(("path", "vector"))}
    np.testing.assert_allclose([found[name][:3] for name in (*names[1:], "last.png")], expected, atol=1e-5)


def test_names_and_links_that_are_odd(opened, photos, capsys):
    (photos / "to nowhere.png").symlink_to(photos / "absent.png")
    shutil.copy(photos / "red 0.png", os.fsdecode(os.fsencode(photos) + b"/caf\xe9 'red' %.png"))
    Image.new("RGB", (8, 8), COLOURS["blue"]).save(photos / "蓝色.png")
    index = opened()
    counts, unread = index.update(photos)
    assert counts["new"] + counts["moved"] == 42 and [Path(path).name for path in unread] == ["to nowhere.png"]
    assert {"蓝色.png", os.fsdecode(b"caf\xe9 'red' %.png")} <= {Path(hit.path).name for hit in index.search(index.query("red"), 50)}
    assert opened().update(photos)[0]["kept"] == 42


def test_captions_are_those_of_the_captioner(workplace, monkeypatch):
    """Each picture's own, whatever the files are called: 3.png, 0.png, …"""
    from captioner import Captioner, CaptionerConfig

    config = CaptionerConfig(encoder=VIT, image_size=32, projection_dim=64)
    model = Captioner(config, config.load_encoder(), config.load_decoder(workplace / "decoder.safetensors")).eval()
    monkeypatch.setattr(model, "generate", lambda features, generation, seeds: [f"picture {seed}" for seed in seeds])
    paths = [str(workplace / "data" / "images" / "train" / f"{i}.png") for i in (3, 0, 1, 2)]
    assert p4_search.captions_of(model)(paths) == {path: f"picture {number}" for number, path in enumerate(paths)}


def test_captions_join_in(opened, photos):
    index = opened()
    index.update(photos)
    said = lambda paths: {path: "something red" if "blue 2" in path else "something" for path in paths}
    assert index.update(photos, said)[0]["new"] == 40  # they had none
    assert opened().update(photos, said)[0]["kept"] == 40
    first = index = opened()
    of_blue = next(hit for hit in first.search(first.query("red", caption_weight=0.0), 40) if "blue 2.png" in hit.path)
    joined = next(hit for hit in index.search(index.query("red", caption_weight=2.0), 40) if "blue 2.png" in hit.path)
    assert joined.caption == "something red" and joined.score > of_blue.score + 1


def test_an_interrupted_run_goes_on_to_the_same_index(opened, photos, monkeypatch):
    index = opened()
    index.update(photos)
    expected = contents(index)
    index.client.drop_collection(index.name)
    monkeypatch.setattr(picture_index, "BATCH", 7)
    index, put = opened(), PictureIndex.put
    calls = []
    monkeypatch.setattr(PictureIndex, "put", lambda self, *arguments: (calls.append(1), put(self, *arguments), len(calls) == 3 and 1 / 0))
    with pytest.raises(ZeroDivisionError):
        index.update(photos)
    monkeypatch.setattr(PictureIndex, "put", put)
    looked = opened.clip.looked
    index = opened()
    assert index.update(photos)[0]["kept"] == 21 and opened.clip.looked == looked + 19
    assert contents(index) == expected


def test_whether_anything_fits(opened, photos):
    index = opened()
    index.update(photos)
    vector = index.query("red")
    mean, deviation = index.spread_of(vector)
    scores = [hit.score for hit in index.search(vector, 40)]
    assert mean == pytest.approx(np.mean(scores), abs=1e-5) and deviation == pytest.approx(np.std(scores), abs=1e-5)
    assert index.bar(vector) == pytest.approx(mean + picture_index.FITS * deviation)
    assert not index.fits("red")  # a quarter of them are: no picture stands out
    opened.clip.fit = 0.9, 0.1
    assert index.bar(vector) == pytest.approx(0.9 + 0.1 * deviation) and index.fits("red") and not index.fits("a grey dog")
    assert not index.fits("red", since=4 * 10**9)
    opened.clip.fit = None
    for path in sorted(photos.rglob("*.png"))[4:]:
        path.unlink()
    index.update(photos)
    assert len(index) == 4 and index.fits("red")  # too few to say


# ---- a file's own troubles -------------------------------------------------------------------------------------

KILLED = """
import sys; sys.path[:0] = {path!r}
import test_search, picture_index
picture_index.BATCH = 4
index = picture_index.PictureIndex({where!r}, test_search.Colourful())
original = picture_index.PictureIndex.put
def put(*arguments):
    original(*arguments)
    print("put", flush=True)
picture_index.PictureIndex.put = put
index.update({folder!r}, progress=False)
"""


def test_killed_in_the_middle_the_rerun_ends_with_the_same_index(tmp_path, photos):
    code = KILLED.format(path=[str(ROOT), str(ROOT / "report"), str(ROOT / "tests")], where=str(tmp_path / "killed.db"), folder=str(photos))
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    for _ in range(3):
        assert process.stdout.readline() == "put\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    index, whole = PictureIndex(tmp_path / "killed.db", Colourful()), PictureIndex(tmp_path / "whole.db", Colourful())
    counts, _ = index.update(photos)
    assert counts["kept"] >= 12 and counts["new"] == 40 - counts["kept"]
    whole.update(photos)
    assert contents(index) == contents(whole)
    index.close(), whole.close()


def test_a_second_process_is_refused_in_one_line(tmp_path, photos, monkeypatch, capsys):
    index = PictureIndex(tmp_path / "search.db", Colourful())
    code = (f"import sys; sys.path[:0] = {[str(ROOT), str(ROOT / 'report'), str(ROOT / 'tests')]!r}\nimport cli, test_search, picture_index\n"
            f"cli.run(lambda: picture_index.PictureIndex({str(tmp_path / 'search.db')!r}, test_search.Colourful(), rebuild=True))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2 and "open in another process" in done.stderr and len(done.stderr.splitlines()) == 1
    index.close()


def test_a_damaged_index_is_said_and_made_anew(tmp_path, photos, capsys):
    index = PictureIndex(tmp_path / "search.db", Colourful())
    index.update(photos)
    expected = contents(index)
    index.close()
    for file in (tmp_path / "search.db").rglob("*.parquet"):
        file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(UserError, match="damaged"):
        PictureIndex(tmp_path / "search.db", Colourful())
    index = PictureIndex(tmp_path / "search.db", Colourful(), rebuild=True)
    assert "made anew" in capsys.readouterr().err and (tmp_path / "search.db.damaged").is_dir()
    index.update(photos)
    assert contents(index) == expected
    index.close()


def test_nothing_else_is_taken_for_an_index(tmp_path):
    (tmp_path / "letters.db" / "collections").mkdir(parents=True)
    (tmp_path / "letters.db" / "letter.txt").write_text("dear")
    (tmp_path / "file.db").write_text("x")
    for where in tmp_path / "letters.db", tmp_path / "file.db":
        with pytest.raises(UserError, match="is no index"):
            PictureIndex(where, Colourful(), rebuild=True)
    assert (tmp_path / "letters.db" / "letter.txt").read_text() == "dear"
    with pytest.raises(UserError, match="ends in .db"):
        PictureIndex(tmp_path / "letters", Colourful(), rebuild=True)
    with pytest.raises(UserError, match="no Milvus server answers"):
        PictureIndex("http://127.0.0.1:9", Colourful())


def test_another_model_has_entries_of_its_own(tmp_path, photos):
    index = PictureIndex(tmp_path / "search.db", Colourful())
    index.update(photos)
    index.close()
    other = Colourful()
    other.fingerprint = "other weights"
    index = PictureIndex(tmp_path / "search.db", other)
    assert len(index) == 0
    index.close()


# ---- the script ------------------------------------------------------------------------------------------------


def command(monkeypatch, *arguments):
    monkeypatch.setattr(p4_search, "load_clip", lambda *arguments, **options: Colourful())
    monkeypatch.setattr(sys, "argv", ["p4_search.py", *map(str, arguments)])
    return p4_search.main()


def test_commands(tmp_path, photos, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (photos / "broken.jpg").write_text("")
    assert command(monkeypatch, "index", "photos") == 3
    assert "40 new" in capsys.readouterr().out
    assert not command(monkeypatch, "query", "a yellow one", "--top", "3", "--sheet", "sheet.png", "--json", "hits.json")
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if "yellow" in line]) == 3
    with Image.open("sheet.png") as sheet:
        assert sheet.width > 1000
    found = json.loads(Path("hits.json").read_text())
    assert len(found["hits"]) == 3 and "yellow" in found["hits"][0]["path"]
    command(monkeypatch, "query", "--like", photos / "blue 2.png", "--top", "5")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5 and "blue 2.png" not in "".join(lines)
    command(monkeypatch, "query", "red", "--since", "2999-01")
    assert "no picture is left" in capsys.readouterr().out


@pytest.mark.parametrize("arguments, message", [
    (["query"], "a sentence, or a picture"), (["query", "red", "--like", "x.png"], "a sentence, or a picture"),
    (["query", "red"], "there is no index"), (["query", "red", "--top", "0"], "--top"), (["query", "red", "--since", "May"], "--since"),
    (["index", "nowhere"], "is not a folder"), (["query", "red", "--sheet", "notes.txt"], "not a PNG file")])
def test_mistakes(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=message):
        command(monkeypatch, *arguments)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_evaluate_by_hand(tmp_path, monkeypatch, capsys):
    """Four pictures of four colours: whoever names the colour finds it; a caption that names none finds one of four."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "images" / "val").mkdir(parents=True)
    for i, colour in enumerate(COLOURS):
        Image.new("RGB", (8, 8), COLOURS[colour]).save(tmp_path / "data" / "images" / "val" / f"{i}.png")
    annotations = [{"id": 2 * i + j, "image_id": i, "caption": text} for i, colour in enumerate(COLOURS)
                   for j, text in enumerate([f"a {colour} one", "a red one"])]
    (tmp_path / "data" / "val.json").write_text(json.dumps({
        "images": [{"id": i, "file_name": f"{i}.png"} for i in range(4)], "annotations": annotations}))
    Path("said.json").write_text(json.dumps({str(i): colour for i, colour in enumerate(COLOURS)}))
    command(monkeypatch, "evaluate", "--captions_file", "said.json", "--caption_weight", "1", "--json", "found.json")
    found = json.loads(Path("found.json").read_text())["data"]
    for weight in 0, 1:
        assert found[f"all captions, captioner's weight {weight}: the index's answers"]["R@1"] == 5 / 8  # every second caption says red
        assert found[f"first captions, captioner's weight {weight}: text to image"] == {"R@1": 1, "R@5": 1, "R@10": 1, "median rank": 1}
    assert found["all captions, captioner's weight 1: more than without, R@1"]["difference"] == 0


def test_auroc_is_the_share_of_pairs_in_order():
    chance = np.random.default_rng(0)
    present, absent = chance.integers(0, 9, 30), chance.integers(0, 7, 20)
    pairs = [(a > b) + (a == b) / 2 for a in present for b in absent]
    assert auroc(present, absent) == pytest.approx(np.mean(pairs))
