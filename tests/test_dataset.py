"""Images and captions as the model gets them: unusual image files, captions, batches, views, cached features."""

import json
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import act, forge
from PIL import Image

import devices
import features
import images
from cli import Stopped, UserError
from dataset import CaptionedImage, bucketed_batches, clean_caption, collate, read_captions, read_folders, write_subset
from encoder import ImageEncoder, JoinedEncoder, load_encoder, without_batch_norm
from features import FeatureCache, LiveFeatures, make_view
from images import ImageError, list_images, load_ahead, load_image

RED, GREEN, BLUE, BLACK, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (0, 0, 0), (255, 255, 255)
SAMPLES = sorted((Path(__file__).resolve().parent.parent / "samples").glob("*.jpg"))


def four_colours(width=96, height=64, colours=(RED, GREEN, BLUE, BLACK)):
    """Red, green, blue and black quarters, in reading order: which way is up shows at once."""
    image = Image.new("RGB", (2, 2))
    image.putdata(colours)
    return image.resize((width, height), Image.Resampling.NEAREST)


def quarters(image):
    """The colours in the middle of an image's quarters."""
    width, height = image.size
    return [image.getpixel((x * width // 4, y * height // 4)) for y in (1, 3) for x in (1, 3)]


def assert_colours(actual, expected, tolerance=0):
    np.testing.assert_allclose(np.array(actual, dtype=int), np.array(expected, dtype=int), atol=tolerance)


def save_rotated(path, image, orientation):
    """Save as a camera does that was held another way: pixels turned, and a tag that says how to turn them back."""
    turn = Image.Transpose
    turns = {1: None, 2: turn.FLIP_LEFT_RIGHT, 3: turn.ROTATE_180, 4: turn.FLIP_TOP_BOTTOM, 5: turn.TRANSPOSE,
             6: turn.ROTATE_90, 7: turn.TRANSVERSE, 8: turn.ROTATE_270}  # 6: show it turned right, so it is stored left
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = image if orientation == 1 else image.transpose(turns[orientation])
    stored.save(path, quality=95, exif=exif)


# ---- images as a person sees them ------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", sorted(images.IMAGE_SUFFIXES))
def test_every_listed_format_is_read(tmp_path, suffix):
    if suffix in images.PHONES:
        pytest.importorskip("pillow_heif").register_heif_opener()  # to write it
    four_colours().save(tmp_path / f"x{suffix}")
    image = load_image(tmp_path / f"x{suffix}")
    assert image.mode == "RGB" and image.size == (96, 64)
    assert_colours(quarters(image), (RED, GREEN, BLUE, BLACK), tolerance=6)


@pytest.mark.parametrize("side", [None, 32])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotated_photo_is_upright(tmp_path, orientation, side):
    save_rotated(tmp_path / "x.jpg", four_colours(600, 400), orientation)
    image = load_image(tmp_path / "x.jpg", side)
    assert image.width > image.height
    assert_colours(quarters(image), (RED, GREEN, BLUE, BLACK), tolerance=6)


def test_cmyk_jpeg_has_its_colours(tmp_path):
    four_colours().convert("CMYK").save(tmp_path / "x.jpg", quality=95)
    assert Image.open(tmp_path / "x.jpg").mode == "CMYK"
    assert_colours(quarters(load_image(tmp_path / "x.jpg")), (RED, GREEN, BLUE, BLACK), tolerance=6)


@pytest.mark.parametrize("name", ["x.png", "x.tif"])
def test_16_bit_grey_keeps_its_range(tmp_path, name):
    values = np.array([[0, 16448, 32896, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / name)
    image = load_image(tmp_path / name)
    assert_colours([image.getpixel((x, 0)) for x in range(4)], [(v, v, v) for v in (0, 64, 128, 255)])


def test_float_and_32_bit_grey_show_what_is_there(tmp_path):
    for values in np.float32([[-1, 0, 1]]), np.int32([[-200_000, 0, 200_000]]):
        Image.fromarray(values).save(tmp_path / "x.tif")
        image = load_image(tmp_path / "x.tif")
        assert_colours([image.getpixel((x, 0))[0] for x in range(3)], [0, 128, 255])


def test_transparent_palette_stands_on_white(tmp_path):
    image = four_colours().quantize(4)
    black = image.getpixel((95, 63))
    for name in "x.png", "x.gif":
        image.save(tmp_path / name, transparency=black)
        assert Image.open(tmp_path / name).mode == "P"
        assert_colours(quarters(load_image(tmp_path / name)), (RED, GREEN, BLUE, WHITE), tolerance=6)


def test_transparency_blends_with_white(tmp_path):
    for mode, colour, expected in [("RGBA", (255, 0, 0, 128), (255, 127, 127)), ("RGBA", (9, 9, 9, 0), WHITE),
                                   ("LA", (0, 64), (191, 191, 191))]:
        Image.new(mode, (8, 8), colour).save(tmp_path / "x.png")
        assert_colours(load_image(tmp_path / "x.png").getpixel((4, 4)), expected, tolerance=1)


def test_colour_named_as_transparent_is_white(tmp_path):
    for image, transparent, expected in [(four_colours(), BLACK, (RED, GREEN, BLUE, WHITE)),
                                         (Image.new("L", (8, 8), 7), 7, [WHITE] * 4)]:
        image.save(tmp_path / "x.png", transparency=transparent)
        assert_colours(quarters(load_image(tmp_path / "x.png")), expected)


def test_black_and_white_is_black_and_white(tmp_path):
    four_colours(colours=(WHITE, BLACK, BLACK, WHITE)).convert("1").save(tmp_path / "x.png")
    assert_colours(quarters(load_image(tmp_path / "x.png")), (WHITE, BLACK, BLACK, WHITE))


def test_animated_gif_is_its_first_frame(tmp_path):
    later = [Image.new("RGB", (96, 64), colour) for colour in (WHITE, GREEN)]
    four_colours().save(tmp_path / "x.gif", save_all=True, append_images=later, duration=50)
    assert Image.open(tmp_path / "x.gif").n_frames == 3
    assert_colours(quarters(load_image(tmp_path / "x.gif")), (RED, GREEN, BLUE, BLACK), tolerance=6)


@pytest.mark.parametrize("size", [(20_000, 10), (10, 20_000), (20_000, 30)])
@pytest.mark.parametrize("name", ["x.jpg", "x.png"])
def test_very_long_picture_is_squeezed_whole(tmp_path, vit, name, size):
    four_colours(*size).save(tmp_path / name, quality=95)
    image = load_image(tmp_path / name, vit.image_size)
    x = vit.preprocess(image)
    assert image.size == size and x.shape == (3, 32, 32)
    assert_colours([x[:, row, column].tolist() for row in (4, 28) for column in (4, 28)],
                   (RED, GREEN, BLUE, BLACK), tolerance=12)


def test_one_pixel_fills_the_square(tmp_path, vit):
    Image.new("RGB", (1, 1), (10, 200, 30)).save(tmp_path / "x.png")
    x = vit.preprocess(load_image(tmp_path / "x.png", vit.image_size))
    assert (x == torch.tensor([10, 200, 30]).view(3, 1, 1)).all()


def test_large_photo_is_decoded_small_but_looks_the_same(vit):
    for path in SAMPLES[:4]:
        whole, small = load_image(path), load_image(path, vit.image_size)
        assert small.width < whole.width and min(small.size) >= 3 * vit.image_size
        difference = vit.preprocess(whole).int() - vit.preprocess(small).int()
        assert difference.abs().float().mean() < 1.5  # of 255


# ---- images that cannot be read --------------------------------------------------------------------------------


def cut_in_half(path):
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])


@pytest.mark.parametrize("name", ["x.jpg", "x.png", "x.tif", "x.webp"])
def test_truncated_image_is_refused(tmp_path, name):
    path = tmp_path / name
    Image.effect_noise((200, 200), 80).convert("RGB").save(path)
    cut_in_half(path)
    for side in None, 32:
        with pytest.raises(ImageError, match="truncated|decod" if name != "x.tif" else "."):
            load_image(path, side)


@pytest.mark.parametrize("content, reason", [(b"", "the file is empty"), (b"not a picture\n", "not an image"),
                                             (b"\xff\xd8\xff\xe0 JPEG?", ".")])
def test_file_that_is_no_image_is_refused(tmp_path, content, reason):
    (tmp_path / "x.jpg").write_bytes(content)
    with pytest.raises(ImageError, match=reason):
        load_image(tmp_path / "x.jpg")


def test_image_that_vanished_or_is_absurdly_large_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ImageError, match="No such file"):
        load_image(tmp_path / "gone.jpg")
    four_colours().save(tmp_path / "x.png")
    monkeypatch.setattr("images.MOST_PIXELS", {"JPEG": 1000, "other": 1000})
    with pytest.raises(ImageError, match="absurd"):
        load_image(tmp_path / "x.png")


# ---- folders of images -----------------------------------------------------------------------------------------


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")


def test_folder_lists_its_own_images_in_order(tmp_path):
    touch(tmp_path, "b.JPG", "a.jpeg", "d.Tiff", "c.v2.webp", "no suffix", "notes.txt", ".png", "sub/e.jpg",
          "folder.jpg/f.jpg")
    (tmp_path / "link.gif").symlink_to("b.JPG")
    (tmp_path / "lost.gif").symlink_to("nowhere")  # to be named as unreadable, not passed over
    assert {stem: path.name for stem, path in list_images(tmp_path).items()} == {
        "a": "a.jpeg", "b": "b.JPG", "c.v2": "c.v2.webp", "d": "d.Tiff", "link": "link.gif", "lost": "lost.gif"}
    assert list(list_images(tmp_path)) == ["a", "b", "c.v2", "d", "link", "lost"]


def test_folder_that_cannot_be_listed_is_refused(tmp_path):
    touch(tmp_path, "a.txt", "two/cat.jpg", "two/cat.PNG")
    for folder, message in [("", "holds no images"), ("gone", "does not exist"), ("a.txt", "is a file"),
                            ("two", "cat.PNG and cat.jpg .* 'cat'")]:
        with pytest.raises(UserError, match=message):
            list_images(tmp_path / folder)


def test_images_are_loaded_ahead_in_order_and_failures_named(tmp_path, vit):
    for i in range(11):
        Image.new("RGB", (40, 40), (20 * i, 0, 0)).save(tmp_path / f"{i:02}.png")
    touch(tmp_path, "03.png", "08.png", "09.png", "10.png")
    paths = sorted(tmp_path.iterdir())
    batches = list(load_ahead(paths, vit.preprocess, vit.image_size, batch_size=4))
    assert [[path.stem for path in good] for good, _, _ in batches] == [["00", "01", "02"], ["04", "05", "06", "07"], []]
    assert [images[:, 0, 9, 9].tolist() for _, images, _ in batches[:2]] == [[0, 20, 40], [80, 100, 120, 140]]
    assert batches[2][1] is None
    assert [(path.stem, str(error)) for _, _, bad in batches for path, error in bad] == [
        (stem, "not an image") for stem in ("03", "08", "09", "10")]
    assert list(load_ahead([], vit.preprocess, vit.image_size, batch_size=4)) == []


# ---- captions --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text, cleaned", [
    ("a dog runs", "A dog runs."),
    ("  A dog \t runs .\n", "A dog runs."),
    ("A dog , wet , runs ; it 's cold..", "A dog, wet, runs; it's cold."),
    ("Is it a dog ?", "Is it a dog?"),
    ("Look !", "Look!"),
    ("A 3.5 m pole", "A 3.5 m pole."),
    ("élan", "Élan."),
    ("USA", "USA."),
    (" . ", ""),
    ("", "")])
def test_captions_are_cleaned_to_one_style(text, cleaned):
    assert clean_caption(text) == cleaned
    assert clean_caption(cleaned) == cleaned


def captions_file(folder, data):
    (folder / "captions.json").write_text(data if isinstance(data, str) else json.dumps(data))
    return folder / "captions.json"


COCO = {"annotations": [{"caption": "two", "id": 7, "image_id": 20}, {"caption": " one ", "id": 8, "image_id": 10},
                        {"caption": "zwei", "id": 9, "image_id": 20}],
        "images": [{"file_name": "b.jpg", "id": 20}, {"file_name": "a.jpg", "id": 10}]}


def test_coco_captions_are_read_in_order_as_they_are(tmp_path):
    touch(tmp_path, "a.jpg", "b.jpg")
    file = captions_file(tmp_path, COCO)
    assert read_captions(file, tmp_path) == [CaptionedImage(tmp_path / "b.jpg", ["two", "zwei"]),
                                             CaptionedImage(tmp_path / "a.jpg", [" one "])]
    assert [item.captions for item in read_captions(file, None)] == [["two", "zwei"], [" one "]]


@pytest.mark.parametrize("data, message", [
    ("{", "is not JSON"),
    ([], "COCO's caption form"),
    ({"images": []}, "COCO's caption form.*annotations"),
    (COCO | {"images": [{"id": 10}]}, "COCO's caption form.*file_name"),
    (COCO | {"images": COCO["images"][:1]}, "COCO's caption form.*10"),
    (COCO | {"annotations": [{"caption": None, "image_id": 10}]}, "COCO's caption form.*None is not a string"),
    (COCO, "1 images of .* are not in .*, the first is b.jpg")])
def test_captions_of_another_form_are_refused(tmp_path, data, message):
    touch(tmp_path, "a.jpg")
    with pytest.raises(UserError, match=message):
        read_captions(captions_file(tmp_path, data), tmp_path)


def test_a_subset_is_the_first_images_with_their_captions(tmp_path):
    (tmp_path / "images").mkdir()
    touch(tmp_path, "a.jpg", "b.jpg")
    (tmp_path / "images" / "train").symlink_to(tmp_path)
    captions_file(tmp_path, COCO).rename(tmp_path / "train.json")
    for _ in range(2):
        write_subset(tmp_path, tmp_path / "new", 1)
        (image,) = read_captions(tmp_path / "new" / "train.json", tmp_path / "new" / "images" / "train")
        assert image.path.name == "b.jpg" and image.captions == ["two", "zwei"]


@pytest.mark.parametrize("selection, held_out", [((1,), ["a.jpg", "a.jpg"]), ((0, 1), ["a.jpg"]), ((0,), [])])
def test_each_folder_holds_out_its_last_images(tmp_path, selection, held_out):
    (tmp_path / "images").mkdir()
    touch(tmp_path, "a.jpg", "b.jpg")
    (tmp_path / "images" / "train").symlink_to(tmp_path)
    captions_file(tmp_path, COCO).rename(tmp_path / "train.json")
    folders = read_folders([tmp_path, tmp_path], selection)
    assert [image.path.name for folder in folders for image in folder.images[folder.train:]] == held_out
    assert [image.path.name for folder in folders for image in folder.images[:folder.train]][0] == "b.jpg"
    with pytest.raises(UserError, match="cannot be split"):
        read_folders([tmp_path], (2,))


@pytest.mark.parametrize("paths, selection", [([], (1,)), (["data"], (1, 1)), (["a", "b"], (1, 1, 1))])
def test_counts_of_held_out_images_that_do_not_fit_are_refused(paths, selection):
    with pytest.raises(UserError, match="--selection is one number"):
        read_folders(paths, selection)


def test_missing_captions_and_images_are_refused(tmp_path):
    with pytest.raises(UserError, match="captions file .* does not exist"):
        read_captions(tmp_path / "gone.json", tmp_path)
    with pytest.raises(UserError, match="folder .* does not exist"):
        read_captions(captions_file(tmp_path, COCO), tmp_path / "gone")


def test_captions_are_laid_out_for_next_token_prediction():
    end, none = 50256, -100
    kitchen = [64, 9592, 351, 257, 14595, 290, 867, 10801, 8217, 290, 257, 1787, 286, 2057]
    inputs, targets = collate([kitchen, [64, 9592], []])
    assert inputs.tolist() == [
        [end, 64, 9592, 351, 257, 14595, 290, 867, 10801, 8217, 290, 257, 1787, 286, 2057],
        [end, 64, 9592, end, end, end, end, end, end, end, end, end, end, end, end],
        [end] * 15]
    assert targets.tolist() == [
        [64, 9592, 351, 257, 14595, 290, 867, 10801, 8217, 290, 257, 1787, 286, 2057, end],
        [64, 9592, end, none, none, none, none, none, none, none, none, none, none, none, none],
        [none] * 15]


def test_batches_hold_every_index_once_and_little_padding():
    lengths = np.random.default_rng(0).integers(5, 40, 1003)

    def batches(seed):
        return bucketed_batches(lengths, 16, torch.Generator().manual_seed(seed))

    assert sorted(i for batch in batches(0) for i in batch) == list(range(1003))
    assert max(map(len, batches(0))) == 16
    assert batches(0) == batches(0) != batches(1)
    padded = sum(len(batch) * max(lengths[batch]) for batch in batches(0))
    assert padded < 1.1 * lengths.sum()
    longest = [max(lengths[batch]) for batch in batches(0)]
    assert np.abs(np.corrcoef(longest, range(len(longest)))[0, 1]) < 0.4  # long and short come mixed


# ---- cached features -------------------------------------------------------------------------------------------


def test_the_first_view_is_the_picture_and_the_second_is_mirrored():
    image = four_colours()
    assert quarters(make_view(image, 0, seed=3)) == [RED, GREEN, BLUE, BLACK]
    assert make_view(image, 0, seed=3).size == image.size
    assert quarters(make_view(image, 1, seed=3)) == [GREEN, RED, BLACK, BLUE]


def test_later_views_are_large_crops_the_same_for_the_same_seed():
    across, down = np.meshgrid(np.arange(200, dtype=np.uint8), np.arange(150, dtype=np.uint8))
    image = Image.fromarray(np.stack([across, down, down], -1))  # each pixel says where it stood
    crops = {(seed, view): make_view(image, view, seed) for seed in range(20) for view in (1, 2, 3)}
    for (seed, view), crop in crops.items():
        assert np.array_equal(crop, make_view(image, view, seed))
        assert crop.width * crop.height >= 0.595 * 200 * 150
        pixels = np.asarray(crop)
        left, right = pixels[0, 0, 0], pixels[0, -1, 0]
        assert left < right if view == 2 else left > right
        assert abs(int(right) - int(left)) == crop.width - 1 and pixels[-1, 0, 1] - pixels[0, 0, 1] == crop.height - 1
    assert len({crop.tobytes() for crop in crops.values()}) == len(crops)
    assert make_view(Image.new("RGB", (1, 1)), 2, seed=0).size == (1, 1)


@pytest.fixture
def photos(tmp_path):
    paths = [tmp_path / f"{i}.jpg" for i in range(7)]
    for i, path in enumerate(paths):
        Image.effect_noise((60 + i, 50), 90).convert("RGB").save(path)
    return paths


class Encoded:
    """Counts the images that an encoder is given, and interrupts it at a batch."""

    def __init__(self, encoder, interrupt_at=None):
        self.images, self.batches, self.interrupt_at = 0, 0, interrupt_at
        self.hook = encoder.register_forward_pre_hook(self.seen)

    def seen(self, module, inputs):
        self.batches += 1
        if self.batches == self.interrupt_at:
            raise KeyboardInterrupt
        self.images += len(inputs[0])

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.hook.remove()


def cache_of(vit, photos, folder, views=3):
    return FeatureCache(vit, photos, folder, views=views, batch_size=6)  # two photos a batch


def test_cached_features_are_the_encoders_own(vit, photos, tmp_path):
    cache = cache_of(vit, photos, tmp_path / "cache")
    for number, view in (0, 0), (3, 1), (6, 2):
        image = vit.preprocess(make_view(load_image(photos[number], vit.image_size), view, seed=number))
        torch.testing.assert_close(cache[[number], [view]].float(), vit(image[None]), atol=4e-3, rtol=2e-3)
    both = cache[np.array([5, 1]), np.array([2, 0])]
    assert both.shape == (2, vit.num_tokens, vit.dim) and both.dtype == torch.float16
    assert torch.equal(both, torch.cat([cache[[5], [2]], cache[[1], [0]]]))


def test_second_opening_encodes_nothing(vit, photos, tmp_path):
    first = cache_of(vit, photos, tmp_path / "cache")
    with Encoded(vit) as encoded:
        second = cache_of(vit, photos, tmp_path / "cache")
    assert encoded.images == 0 and np.array_equal(first.data, second.data)


def test_interrupted_cache_goes_on_where_it_stopped(vit, photos, tmp_path):
    with Encoded(vit, interrupt_at=2), pytest.raises(KeyboardInterrupt):
        cache_of(vit, photos, tmp_path / "cache")
    with Encoded(vit) as encoded:
        resumed = cache_of(vit, photos, tmp_path / "cache")
    assert encoded.images == 5 * 3  # the first batch held two photos
    assert np.array_equal(resumed.data, cache_of(vit, photos, tmp_path / "other").data)


def test_a_copy_of_the_pictures_finds_their_features(vit, photos, tmp_path):
    first = cache_of(vit, photos, tmp_path / "cache")
    (tmp_path / "copy").mkdir()
    copies = [Path(shutil.copyfile(photo, tmp_path / "copy" / photo.name)) for photo in photos]
    with Encoded(vit) as encoded:
        assert cache_of(vit, copies, tmp_path / "cache").files == first.files
    assert encoded.images == 0


def test_any_change_makes_a_new_cache(vit, photos, tmp_path):
    folder = tmp_path / "cache"
    first = cache_of(vit, photos, folder, views=1)
    Image.new("RGB", (50, 50), RED).save(photos[4])
    second = cache_of(vit, photos, folder, views=1)
    assert [i for i in range(7) if not np.array_equal(first.data[0][i], second.data[0][i])] == [4]
    other = ImageEncoder("test_vit", 32, "random")
    files = {tuple(cache.files) for cache in (first, second, cache_of(vit, photos, folder, views=2),
                                      cache_of(vit, photos[:5], folder, views=1), cache_of(other, photos, folder, views=1))}
    assert len(files) == 5


def test_a_system_without_fallocate_caches_too(vit, photos, tmp_path, monkeypatch):
    expected = cache_of(vit, photos, tmp_path / "one").data
    monkeypatch.delattr(os, "posix_fallocate")  # macOS
    np.testing.assert_array_equal(cache_of(vit, photos, tmp_path / "other").data, expected)


def test_unreadable_training_images_are_all_named_at_once(vit, photos, tmp_path):
    cut_in_half(photos[2])
    photos[6].write_bytes(b"")
    with pytest.raises(UserError, match="^2 images cannot be read, .*2.jpg: .*truncated.*6.jpg: the file is empty$"):
        cache_of(vit, photos, tmp_path / "cache")
    photos[4].unlink()
    photos[4].mkdir()  # which nobody may open
    with pytest.raises(UserError, match="^3 images cannot be read, .*4.jpg: .*"):
        cache_of(vit, photos, tmp_path / "cache")


SHARING = """
import time
from pathlib import Path
import features, torch
from encoder import ImageEncoder
torch.set_num_threads(1)
torch.manual_seed(0)
vit = ImageEncoder("test_vit", 32, "random")
features.BLOCK, begin, seen = 1, Path("begin"), []
encode, read = vit.forward, features.read_batches
vit.forward = lambda images: (time.sleep(0.3), seen.append(len(images)), encode(images))[-1]
features.read_batches = lambda batches, load, threads, waiting: read(batches, load, 1, 1)  # who reads far ahead would claim all there is
print("ready", flush=True)
while not begin.exists():
    time.sleep(0.01)
cache = features.FeatureCache(vit, [Path(f"{i}.jpg") for i in range(7)], "cache", views=2, batch_size=2)
print(sum(seen), float(sum(part.astype(float).sum() for part in cache.data)), flush=True)
"""


@pytest.mark.parametrize("killed", [False, True], ids=["both to the end", "one killed"])
def test_runs_that_want_one_cache_share_the_work(vit, photos, tmp_path, monkeypatch, killed):
    """One picture a batch, and a batch a block. What a killed one had claimed, the other encodes."""
    monkeypatch.chdir(tmp_path)
    outputs = [[Path(f"{number}.out"), Path(f"{number}.err")] for number in range(2)]
    runs = [forge().Process(target=act, args=(SHARING, [], {}, files)) for files in outputs]
    for run in runs:
        run.start()
    while not all(out.exists() and out.read_text() for out, _ in outputs):
        assert all(run.is_alive() for run in runs)
        time.sleep(0.01)
    Path("begin").touch()
    if killed:
        while not [*Path("cache").glob("*.json")]:
            time.sleep(0.01)
        runs[0].kill()
    for run in runs:
        run.join(timeout=120)
    assert [run.exitcode for run in runs] == [-9 if killed else 0, 0]
    ends = [out.read_text().split() for out, _ in outputs]
    assert [end[0] for end in ends] == ["ready"] * 2
    counts = [int(end[1]) for end in ends if end[1:]]
    whole = cache_of(vit, photos, tmp_path / "cache", views=2)
    assert {float(end[2]) for end in ends if end[1:]} == {float(sum(part.astype(float).sum() for part in whole.data))}
    assert len(counts) == 1 and counts[0] >= 2 if killed else sum(counts) == 14 and min(counts) >= 2
    other = cache_of(vit, photos, tmp_path / "other", views=2)
    np.testing.assert_allclose(whole.data, other.data, atol=4e-3, rtol=2e-3)


def test_progress_of_one_process_and_of_several_is_gone_on_with(vit, photos, tmp_path):
    whole = cache_of(vit, photos, tmp_path / "cache")
    for progress, left in (3, 5), ([[0, 3]], 5), ([[0, 1], [2, 3], [6, 7]], 6), ([[0, 2], [4, 7]], 2):
        for file in whole.files:
            file.with_suffix(".json").write_text(json.dumps({"done": progress}))
        with Encoded(vit) as encoded:
            again = cache_of(vit, photos, tmp_path / "cache")
        # Two photos a batch, each of which is encoded unless both are done.
        assert encoded.images == left * 3 and np.allclose(again.data, whole.data, atol=4e-3)


def test_pictures_are_read_by_all_threads_and_while_others_are_encoded(vit, photos, tmp_path, monkeypatch):
    """Also where a batch is a single picture, and across the blocks that a process claims."""
    now, most, ahead = [], [], []
    read = features.read_views

    def slowly(path, *arguments):
        now.append(path)
        most.append(len(now))
        time.sleep(0.2)
        now.remove(path)
        return read(path, *arguments)

    monkeypatch.setattr(features, "read_views", slowly)
    monkeypatch.setattr(features, "BLOCK", 1)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)  # and four threads more, since some wait for the disk
    with vit.register_forward_pre_hook(lambda module, inputs: ahead.append(len(most))):
        FeatureCache(vit, photos, tmp_path / "cache", batch_size=1)
    assert max(most) == 6 and ahead[0] >= 6


def test_encoding_stops_when_it_is_time_and_goes_on(vit, photos, tmp_path):
    images = []
    for stop in range(1, 4):
        with Encoded(vit) as encoded, pytest.raises(Stopped, match=f"in encoding after {2 * stop} of 7 images: the same command goes on"):
            FeatureCache(vit, photos, tmp_path / "cache", views=3, batch_size=6, stop=True)
        images.append(encoded.images)
    with Encoded(vit) as encoded:
        parts = FeatureCache(vit, photos, tmp_path / "cache", views=3, batch_size=6, stop=False)
    assert [*images, encoded.images] == [6, 6, 6, 3]
    assert np.array_equal(parts.data, cache_of(vit, photos, tmp_path / "other").data)
    FeatureCache(vit, photos, tmp_path / "cache", views=3, stop=True)  # for which there is nothing to do


def test_more_views_of_the_same_pictures_add_only_theirs(vit, photos, tmp_path):
    few = cache_of(vit, photos, tmp_path / "cache", views=2)
    with Encoded(vit) as encoded:
        many = cache_of(vit, photos, tmp_path / "cache", views=4)
    assert encoded.images == 7 * 2 and many.files[:2] == few.files and len(set(many.files)) == 4
    other = cache_of(vit, photos, tmp_path / "other", views=4)  # all in one go, so in other batches
    np.testing.assert_allclose(many.data, other.data, atol=4e-3, rtol=2e-3)


def test_a_halved_encoder_has_the_features_of_autocast_and_its_own_name(photos, tmp_path):
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    encoder, halved = make_encoder("test_vit", 32), make_encoder("test_vit", 32)
    halved.halve()
    with torch.inference_mode():
        with torch.autocast("cpu", torch.float16):
            expected = encoder(images)
        assert torch.equal(halved(images), expected) and not torch.equal(encoder(images), expected)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(halved(images), expected)
    size, before = (sum(value.nbytes for value in one.model.blocks.state_dict().values()) for one in (halved, encoder))
    assert size < 0.55 * before and halved.weights_hash == encoder.weights_hash
    cnn = make_encoder("test_efficientnet", 64)
    expected = cnn(images)
    cnn.halve()
    assert torch.equal(cnn(images), expected)


def test_as_many_images_are_encoded_at_once_as_memory_holds(vit, photos, monkeypatch):
    live, index = LiveFeatures(vit, photos), (np.arange(7), np.zeros(7, int))
    with Encoded(vit) as encoded:
        expected = live[index]
    assert encoded.batches == 1
    monkeypatch.setattr(devices, "MEMORY", 3 * 64 * vit.num_tokens * vit.dim)
    with Encoded(vit) as encoded:
        torch.testing.assert_close(live[index], expected, atol=4e-3, rtol=2e-3)
    assert encoded.batches == 3 and devices.at_once(10**12, 100) == 1


# ---- the encoder -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vit():
    return make_encoder("test_vit", 32)


def make_encoder(name, image_size=None, levels=1):
    """A random encoder whose batch statistics, where it has them, are not those that it would start from."""
    torch.manual_seed(0)
    encoder = ImageEncoder(name, image_size, "random", levels)
    for buffer_name, buffer in encoder.model.named_buffers():
        if buffer_name.endswith(("running_mean", "running_var")):
            buffer.uniform_(0.5, 1.5)
    return encoder


def random_images(encoder, count=2):
    return torch.randint(0, 256, (count, 3, encoder.image_size, encoder.image_size), dtype=torch.uint8)


@pytest.mark.parametrize("name, image_size, grid, prefix", [
    ("test_vit", 32, (2, 2), 1), ("test_vit", 96, (6, 6), 1), ("test_vit", None, (10, 10), 1),
    ("deit_tiny_distilled_patch16_224", 48, (3, 3), 2),
    ("test_efficientnet", 96, (3, 3), 0), ("test_efficientnet", 100, (4, 4), 0), ("test_efficientnet", None, (9, 9), 0)])
def test_encoder_gives_prefix_tokens_and_a_grid_of_patches(name, image_size, grid, prefix):
    encoder = make_encoder(name, image_size)
    tokens = encoder(random_images(encoder))
    assert (encoder.grid, encoder.num_prefix_tokens) == (grid, prefix)
    assert tokens.shape == (2, encoder.num_tokens, encoder.dim) == (2, prefix + grid[0] * grid[1], encoder.dim)


@pytest.mark.parametrize("name", ["test_vit", "test_efficientnet"])
def test_encoder_is_timms_model_on_normalised_pixels(name):
    encoder = make_encoder(name, 96)
    images = random_images(encoder)
    config = timm.get_pretrained_cfg(name)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (config.mean, config.std))
    expected = encoder.model.forward_features((images / 255 - mean) / std)
    tokens = encoder(images)
    if expected.ndim == 4:  # patch tokens go row by row
        tokens = tokens.unflatten(1, encoder.grid).permute(0, 3, 1, 2)
    torch.testing.assert_close(tokens, expected, atol=1e-4, rtol=1e-4)


def test_earlier_feature_maps_add_channels_to_a_patch():
    """By hand: timm's maps before the last, pooled onto its cells and normalised there; the last one as it is alone."""
    one, three = (make_encoder("test_efficientnet", 96, levels) for levels in (1, 3))
    three.load_state_dict(one.state_dict())
    images = random_images(one)
    tokens = three(images)
    assert (three.levels, three.dim, three.grid) == (3, tokens.shape[-1], one.grid) and one.levels == 1
    torch.testing.assert_close(tokens[..., :one.dim], one(images))
    pixels = (images - three.mean) / three.std
    last, maps = three.model.forward_intermediates(pixels)
    place = one.dim
    for part in maps[:-3:-1]:
        side = part.shape[2] // 3
        assert part.shape[2] == 3 * side  # so that a cell is the mean of a square
        cell = part[1, :, :side, 2 * side:].mean((1, 2))  # the first row's last
        found = tokens[1, 2, place:(place := place + len(cell))]
        torch.testing.assert_close(found, (cell - cell.mean()) / (cell.var(correction=0) + 1e-5).sqrt(), atol=1e-4, rtol=1e-4)
    assert place == three.dim


@pytest.mark.parametrize("name, levels, expected", [
    ("test_efficientnet", 0, 3), ("test_efficientnet", 2, 2), ("resnet18", 0, 3), ("test_vit", 0, 1), ("test_vit", 1, 1)])
def test_how_many_levels_an_encoder_has(name, levels, expected):
    assert ImageEncoder(name, 32, "random", levels).levels == load_encoder(name, 32, levels, "random").levels == expected


@pytest.mark.parametrize("name, levels, message", [
    ("test_efficientnet", -1, "at least 0"), ("test_efficientnet", 9, "test_efficientnet has 6"), ("test_vit", 2, "test_vit has 1"),
    ("test_resnet", 9, "test_resnet has 5")])  # whose last stage gives the last map
def test_levels_that_an_encoder_has_not_are_refused(name, levels, message):
    with pytest.raises(UserError, match=message):
        ImageEncoder(name, 32, "random", levels)


def test_joined_encoders_give_their_channels_side_by_side():
    torch.manual_seed(0)
    joined = load_encoder("test_efficientnet+test_resnet", 96, 2, "random")
    images = random_images(joined, 3)
    one, two = joined.parts
    assert (joined.name, joined.image_size, joined.levels, joined.grid, joined.num_tokens, joined.dim) == (
        "test_efficientnet+test_resnet", 96, 2, (3, 3), 9, one.dim + two.dim)
    torch.testing.assert_close(joined(images), torch.cat([one(images), two(images)], -1))
    assert torch.equal(joined.preprocess(load_image(SAMPLES[0])), two.preprocess(load_image(SAMPLES[0])))
    before = joined.weights_hash
    assert JoinedEncoder([one, two]).weights_hash == before != JoinedEncoder([two, one]).weights_hash
    two.weights_hash = "another"
    assert JoinedEncoder([one, two]).weights_hash != before


@pytest.mark.parametrize("name, message", [
    ("test_efficientnet+test_vit", "cannot be joined: their patches are"),
    ("test_vit+deit_tiny_distilled_patch16_224", "cannot be joined: their patches are"),
    ("test_efficientnet+vit_base_patch32_siglip_256", "cannot be joined: they have 3 and 1 feature maps"),
    ("test_vit+", "no model named ''"), ("test_vit + vit_of_nobody", "no model named 'vit_of_nobody'")])
def test_encoders_that_do_not_go_together_are_not_joined(name, message):
    with pytest.raises(UserError, match=message), torch.device("meta"):
        load_encoder(name, 96, 0, "random")


def test_a_joined_encoder_comes_back_with_the_levels_that_it_recorded():
    with torch.device("meta"):
        joined = load_encoder("test_efficientnet+test_resnet", 96, 0, "random")
        assert load_encoder(joined.name, joined.image_size, joined.levels, "random").dim == joined.dim


def test_features_of_other_levels_are_others(photos, tmp_path):
    one, two = (make_encoder("test_efficientnet", 32, levels) for levels in (1, 2))
    assert one.weights_hash == two.weights_hash
    for encoder in one, two:
        assert cache_of(encoder, photos, tmp_path / "cache").data[0].shape[-1] == encoder.dim


def test_a_vits_hash_is_that_of_its_weights_at_any_size(tmp_path):
    """A checkpoint of another size than the ViT's own is accepted where resampling gave other bits."""
    torch.save(make_encoder("test_vit").model.state_dict(), tmp_path / "vit.bin")
    hashes = {}
    for size in 160, 96, 64:
        for change in "none", "pos_embed", "norm.weight":
            encoder = ImageEncoder("test_vit", size, tmp_path / "vit.bin")
            with torch.no_grad():
                for name, value in encoder.model.named_parameters():
                    value += 1e-6 * (name == change)
            hashes[size, change] = encoder.weights_hash
    assert hashes[96, "none"] == hashes[96, "pos_embed"] == hashes[64, "none"]
    assert hashes[160, "none"] != hashes[160, "pos_embed"]
    assert all(hashes[size, "none"] != hashes[size, "norm.weight"] for size in (160, 96))


@pytest.mark.parametrize("name, folds", [("test_efficientnet", True), ("resnet18", True), ("repvit_m0_9", False)])
def test_batch_norm_is_folded_where_that_changes_nothing(name, folds, image_size=64):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=0).eval()
    for module in model.modules():  # statistics as after training
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, 0, 0.1)
    images = torch.randn(2, 3, image_size, image_size)
    with torch.inference_mode():
        expected = model.forward_features(images)
        folded = without_batch_norm(model, image_size)
        found = folded.forward_features(images)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * expected.abs().max().item())
    assert any(isinstance(module, torch.nn.BatchNorm2d) for module in folded.modules()) != folds


@pytest.mark.parametrize("size, batch", [(32, 3), (224, 9)])
def test_a_cnn_takes_a_few_images_at_a_time(size, batch):
    encoder = ImageEncoder("test_efficientnet", size, "random")
    images = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8)
    sizes = []
    original = encoder.model.forward_features
    encoder.model.forward_features = lambda x: sizes.append(len(x)) or original(x)
    whole = encoder(images)
    assert sizes == ([3] if batch == 3 else [8, 1])
    torch.testing.assert_close(whole, torch.cat([encoder(image[None]) for image in images]), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["test_vit", "test_efficientnet"])
def test_encoder_stays_frozen(name):
    encoder = make_encoder(name, 32)
    images, before = random_images(encoder), encoder.weights_hash
    expected = encoder(images)
    encoder.train()
    assert torch.equal(encoder(images), expected) and encoder.weights_hash == before
    assert not any(module.training for module in encoder.modules())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


def test_preprocessing_squeezes_the_whole_picture(vit):
    for size in (300, 100), (32, 32), (7, 90):
        x = vit.preprocess(four_colours(*size))
        assert x.shape == (3, 32, 32) and x.dtype == torch.uint8
        assert_colours([x[:, row, column].tolist() for row in (5, 26) for column in (5, 26)],
                       (RED, GREEN, BLUE, BLACK), tolerance=12)
    photo = load_image(SAMPLES[0])
    expected = np.array(photo.resize((32, 32), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    assert np.abs(vit.preprocess(photo).numpy().astype(int) - expected).mean() < 1


def test_encoder_weights_come_from_a_file(tmp_path):
    for name in "test_vit", "test_efficientnet":
        torch.manual_seed(1)
        model = timm.create_model(name)  # its classifier is left out
        torch.save(model.state_dict(), tmp_path / f"{name}.bin")
        encoder = ImageEncoder(name, 160, tmp_path / f"{name}.bin")
        images = random_images(encoder)
        expected = model.eval().forward_features((images - encoder.mean) / encoder.std)
        expected = expected.flatten(2).transpose(1, 2) if expected.ndim == 4 else expected
        torch.testing.assert_close(encoder(images), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name, tensor", [("test_vit", "blocks.1.mlp.fc1.bias"), ("test_efficientnet", "bn1.running_var")])
def test_encoder_weights_that_do_not_fit_are_refused(tmp_path, name, tensor):
    state = timm.create_model(name).state_dict()
    other = timm.create_model("test_resnet").state_dict()
    lacking = {key: value for key, value in state.items() if key != tensor}
    torch.save(lacking, tmp_path / "lacking.bin")
    torch.save(other, tmp_path / "other.bin")
    torch.save(state | {"extra": torch.ones(1)}, tmp_path / "extra.bin")
    for file, message in ("lacking", tensor), ("other", ""), ("extra", "extra"):
        with pytest.raises(UserError, match=f"{file}.bin does not hold the weights of timm's {name}.*{message}"):
            ImageEncoder(name, 32, tmp_path / f"{file}.bin")


@pytest.mark.parametrize("name, image_size, message", [
    ("vit_of_nobody", None, "no model named 'vit_of_nobody'"), ("test_vit.nobodys_weights", None, "no model named"),
    ("test_vit", 40, "multiple of test_vit's patches of 16"), ("test_vit", -16, "at least 1"),
    ("test_mambaout", 64, "neither a ViT nor a CNN")])
def test_encoder_that_cannot_be_is_refused(name, image_size, message):
    with pytest.raises(UserError, match=message):
        ImageEncoder(name, image_size, "random")
