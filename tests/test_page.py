"""p4_demo.py's page in a real browser: Debian's chromium, driven by selenium. Skipped with a message if there is none."""

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import ROOT, make_llava
from PIL import Image

pytest.importorskip("gradio")
pytest.importorskip("pymilvus")
webdriver = pytest.importorskip("selenium.webdriver")
BROWSER, DRIVER = (next((found for name in names if (found := shutil.which(name))), None)
                   for names in (("chromium", "chromium-browser", "google-chrome"), ("chromedriver",)))
if not BROWSER or not DRIVER:
    pytest.skip("the page's tests need chromium and chromedriver: apt install chromium chromium-driver", allow_module_level=True)
if not all((ROOT / "weights" / f"{name}.safetensors").exists() for name in ("tf_efficientnet_lite2", "tf_efficientnet_lite1")):
    pytest.skip("the page's tests need the embedded weights: bash hw3_download.sh", allow_module_level=True)

PATIENCE = 90  # seconds


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The page's address, and the folder of its pictures; a tiny random LLaVA talks."""
    place = tmp_path_factory.mktemp("page")
    shutil.copytree(ROOT / "samples", place / "pictures")
    make_llava(place / "llava", "default")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "p4_demo.py"), str(place / "pictures"), "--index", str(place / "search.db"), "--llava", str(place / "llava"),
         "--port", str(port)], stderr=subprocess.PIPE, text=True, cwd=place)
    lines = []
    for line in process.stderr:
        lines.append(line)
        if line.startswith("http://127.0.0.1"):
            break
    else:
        pytest.fail("".join(lines))
    threading.Thread(target=process.stderr.read, daemon=True).start()
    yield f"http://127.0.0.1:{port}", place
    process.terminate()
    process.wait()


def open_browser():
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for argument in "--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1400,1400", "--disable-background-networking":
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))


@pytest.fixture
def browser(site):
    browser = open_browser()
    browser.get(site[0])
    find(browser, "#question textarea")
    time.sleep(2)  # until its events are bound
    yield browser
    browser.quit()


def wait(condition, what):
    """What `condition` gives once it is true."""
    started = time.monotonic()
    while time.monotonic() - started < PATIENCE:
        try:
            if found := condition():
                return found
        except Exception:  # of elements that are being replaced
            pass
        time.sleep(0.2)
    pytest.fail(f"waited in vain for {what}")


def find(browser, selector):
    return wait(lambda: browser.find_elements("css selector", selector), selector)[0]


def type_into(browser, name, text):
    field = find(browser, f"#{name} textarea, #{name} input")
    field.clear()
    field.send_keys(text)
    time.sleep(0.5)  # until the page has taken it in
    field.send_keys("\n")


def hits(browser):
    """The gallery's pictures, once they are drawn."""
    return wait(lambda: (found := browser.find_elements("css selector", "#hits img")) and all(
        browser.execute_script("return arguments[0].naturalWidth", image) for image in found) and found, "pictures")


def search(browser, text):
    before = [image.get_attribute("src") for image in browser.find_elements("css selector", "#hits img")]
    type_into(browser, "text", text)
    wait(lambda: (now := [image.get_attribute("src") for image in browser.find_elements("css selector", "#hits img")]) and now != before,
         "other hits")
    return hits(browser)


def labels(browser):
    return [label.text for label in browser.find_elements("css selector", "#hits .caption-label")]


def said(browser, count):
    """The chat's messages, once there are so many and the last has ended."""
    def messages():
        return [message.text for message in browser.find_elements("css selector", "#chat [data-testid=bot]")]

    def ended():
        before = messages()
        time.sleep(1.5)
        return len(before) >= count and before == messages()

    wait(ended, "an answer")
    return messages()[-1]


def hosts(browser):
    """Hosts that the page asked for anything."""
    asked = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return {message["params"]["request"]["url"].split("/")[2].split(":")[0] for message in asked
            if message["method"] == "Network.requestWillBeSent" and message["params"]["request"]["url"].startswith(("http", "ws"))}


def keep(browser, name):
    """A screenshot into $HW3_SCREENSHOTS, where that is set: the README's are made so."""
    if folder := os.environ.get("HW3_SCREENSHOTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        browser.save_screenshot(str(Path(folder) / f"{name}.png"))


def test_search_choose_and_talk(browser):
    assert len(search(browser, "a cat")) == 9
    assert "cat.jpg" in labels(browser)[0]
    keep(browser, "search")
    hits(browser)[0].click()
    words = find(browser, "#words iframe")
    browser.switch_to.frame(words)
    first = find(browser, ".word")
    browser.execute_script("arguments[0].dispatchEvent(new Event('mouseenter'))", first)
    assert find(browser, ".picture").get_attribute("class") == "picture on"
    assert len(browser.find_elements("css selector", ".word")) >= 4
    browser.switch_to.default_content()
    keep(browser, "chosen")
    for count, question in enumerate(("What is it?", "And what colour?"), 1):
        type_into(browser, "question", question)
        assert said(browser, count)
    keep(browser, "talk")
    assert hosts(browser) == {"127.0.0.1"}


def test_a_question_without_a_picture(browser):
    type_into(browser, "question", "What is it?")
    wait(lambda: "Choose a picture first" in find(browser, "#chat").text, "advice")


def test_upload_finds_pictures_like_it(browser, site):
    wait(lambda: browser.find_elements("css selector", "#upload input[type=file]"), "the upload")[0].send_keys(
        str(site[1] / "pictures" / "flower.jpg"))
    hits(browser)
    wait(lambda: "flower.jpg" in labels(browser)[0], "the flower")
    find(browser, "#words iframe")


def test_an_upload_that_is_no_picture(browser, tmp_path):
    (tmp_path / "letter.jpg").write_text("no picture")
    wait(lambda: browser.find_elements("css selector", "#upload input[type=file]"), "the upload")[0].send_keys(str(tmp_path / "letter.jpg"))
    wait(lambda: browser.find_elements("css selector", ".toast-wrap, [data-testid=toast-body]"), "what is wrong")
    assert search(browser, "a cat")  # it goes on


def test_a_folder_is_taken_in_while_two_people_search(browser, site):
    more = site[1] / "more"
    more.mkdir(exist_ok=True)
    for i in range(12):
        Image.new("RGB", (40, 30), (20 * i, 250 - 20 * i, 90)).save(more / f"plain {i}.png")
    other = open_browser()
    try:
        other.get(site[0])
        type_into(browser, "folder", str(more))
        assert "cat.jpg" in (search(other, "a cat") and labels(other)[0])
        wait(lambda: "12 new" in find(browser, "#state").text, "the folder")
        assert len(search(browser, "a tower with a clock")) == 15
        type_into(browser, "folder", str(site[1] / "nowhere"))
        wait(lambda: "is not a folder" in find(browser, "#state").text, "the reason")
    finally:
        other.quit()
