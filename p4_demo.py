"""A local web page: find a picture by a sentence, see its caption with each word's attention map, and chat about it.

    bash hw3_4.sh [<folder>]                                      http://127.0.0.1:7860, for the folder's pictures, or samples/
    python3 p4_demo.py <folder> --index photos.db --model ViT-B/32 --llava llava-hf/llava-1.5-7b-hf

Nothing leaves the machine: no analytics, no fonts or scripts from elsewhere, no public link.
"""

import html
import os
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}  # before gradio is imported

from attention import p2_attention
from attention_page import page, page_entry
from captioner import EMBEDDED_CHECKPOINT, EMBEDDED_DECODER, Captioner
from cli import ArgumentParser, UserError, printable, run
from clip_model import load_clip
from devices import pick_device
from images import load_picture, thumbnail
from llava import SMALL, Llava, LlavaSettings, default_model
from picture_index import DEFAULT_INDEX, PictureIndex
from runtime import RUNTIME_HELP, pick_runtime

SAMPLES = Path(__file__).resolve().parent / "samples"
THUMBNAIL = 320  # pixels
QUESTION = "What is in the picture?"
STYLE = """
.gradio-container { max-width: 1280px !important; margin: auto }
#hits .grid-wrap { max-height: none }
#words iframe { width: 100%; height: 560px; border: 0 }
"""


class Models:
    """The models behind the page, each used by one thread at a time. The LLaVA is loaded at the first question.

    Args:
        where: folder or address of the index.
        clip: a name, as for load_clip.
        llava: a folder or hub name; None: the one in weights/.
    """

    def __init__(self, where, clip=None, llava=None, runtime="auto"):
        device = pick_device()
        self.index = PictureIndex(where, load_clip(clip, device, runtime=runtime), rebuild=True)
        self.captioner = Captioner.load(EMBEDDED_CHECKPOINT, EMBEDDED_DECODER, runtime=pick_runtime(runtime, device)).to(device)
        self.llava_name, self.llava = llava, None
        self.searching, self.captioning, self.talking, self.indexing = (threading.Lock() for _ in range(4))
        self.status = ""

    def find(self, text, like, top):
        """(hits, whether the best one matches) for a sentence, or a similar picture."""
        with self.searching:
            vector = self.index.query_like(like) if like else self.index.query(text)
            return self.index.find(vector, top), bool(like) or self.index.fits(text)

    def take_in(self, folder):
        """Index a folder, by one thread at a time, while searches continue; yields status messages."""
        folder = os.path.expanduser(folder.strip())
        if not folder:
            yield "name a folder of this machine"
            return
        if not self.indexing.acquire(blocking=False):
            yield "another folder is being indexed: wait until it is done"
            return
        try:
            yield f"indexing {folder} …"
            counts, unread = self.index.update(folder)
            yield (f"{folder}: " + ", ".join(f"{count} {what}" for what, count in counts.items())
                   + (f"; {len(unread)} could not be read" if unread else ""))
        except (UserError, OSError) as error:
            yield str(error)
        finally:
            self.indexing.release()

    def explain(self, path):
        """HTML page of a picture's caption with its words' attention maps."""
        with self.captioning:
            picture = load_picture(path, self.captioner.encoder.image_size)
            attention, = p2_attention(self.captioner, [picture], self.captioner.generation)
            return page([page_entry(Path(path).name, picture, attention)], part=True).decode()

    def talk(self, path, turns, beams, temperature, stopped):
        """Yield LLaVA's answer as far as it is generated; concurrent visitors wait for each other."""
        with self.talking:
            if self.llava is None:
                self.llava_name = self.llava_name or default_model()
                self.llava = Llava(self.llava_name)
            if Path(self.llava_name).name == SMALL.name:  # it was not trained on conversations
                turns = turns[-1:]
            settings = LlavaSettings(max_new_tokens=120, num_beams=beams, temperature=temperature)
            yield from self.llava.talk(load_picture(path, 336), turns, settings, stopped)


@dataclass
class Chosen:
    """What one visitor's page shows."""

    paths: tuple = ()  # of the hits
    path: str = ""  # of the chosen picture


def frame(document):
    """A sandboxed iframe that shows an HTML document."""
    return f'<iframe sandbox="allow-scripts" srcdoc="{html.escape(document, quote=True)}"></iframe>' if document else ""


def build(models):
    """The page."""
    import gradio as gr

    running = {}  # {session: event that stops its current answer}; a later question replaces the event

    def end(request: gr.Request):
        if request.session_hash in running:
            running[request.session_hash].set()

    def leave(request):
        """Stop the session's current answer, since there is a new question or picture."""
        if before := running.pop(request.session_hash, None):
            before.set()

    def show(hits, fits, chosen):
        pictures = []
        for hit in hits:
            try:
                pictures.append((thumbnail(load_picture(hit.path, THUMBNAIL), THUMBNAIL), f"{hit.score:.2f}  {Path(hit.path).name}"))
            except UserError:
                pictures.append((blank(), "gone"))
        said = "" if fits else "Nothing here seems to show that; the nearest:" if hits else "The index holds no picture yet."
        return gr.Gallery(value=pictures, selected_index=None), said, Chosen(tuple(hit.path for hit in hits), chosen.path)

    def search(text, top, chosen):
        if not text.strip():
            raise gr.Error("Write what you look for.")
        try:
            return show(*models.find(text, None, int(top)), chosen)
        except UserError as error:
            raise gr.Error(str(error)) from None

    def search_like(path, top, chosen, request: gr.Request):
        if not path:
            return gr.skip(), gr.skip(), chosen, gr.skip()
        leave(request)
        try:
            hits, _ = models.find(None, path, int(top))
        except UserError as error:
            raise gr.Error(str(error)) from None
        return *show(hits, True, chosen)[:2], Chosen(tuple(hit.path for hit in hits), path), []

    def explain(chosen):
        if not chosen.path:
            return ""
        try:
            return frame(models.explain(chosen.path))
        except UserError as error:
            raise gr.Error(str(error)) from None

    def choose(chosen, event: gr.SelectData, request: gr.Request):
        leave(request)
        return Chosen(chosen.paths, chosen.paths[event.index]), []

    def ask(question, history, request: gr.Request):
        leave(request)
        return "", [*history, {"role": "user", "content": question.strip() or QUESTION}]

    def answer(chosen, history, beams, temperature, request: gr.Request):
        if not chosen.path:
            yield [*history, {"role": "assistant", "content": "Choose a picture first, or upload one."}]
            return
        turns = turns_of(history)
        stopped = running[request.session_hash] = threading.Event()
        try:
            for text in models.talk(chosen.path, turns, int(beams), temperature, stopped):
                if stopped.is_set() and running.get(request.session_hash) is not stopped:
                    return  # there is a later question, or another picture
                yield [*history, {"role": "assistant", "content": text}]
        except UserError as error:
            yield [*history, {"role": "assistant", "content": str(error)}]
        finally:
            stopped.set()

    with gr.Blocks(title="Find a picture and talk about it", analytics_enabled=False, delete_cache=(3600, 3600)) as demo:
        chosen = gr.State(Chosen())
        with gr.Row():
            text = gr.Textbox(label="What do you look for?", placeholder="two dogs in the snow", scale=5, elem_id="text", autofocus=True)
            top = gr.Slider(5, 50, 15, step=5, label="How many", scale=2)
            start = gr.Button("Search", variant="primary", scale=1, elem_id="search")
        said = gr.Markdown(elem_id="said")
        with gr.Row():
            gallery = gr.Gallery(show_label=False, columns=5, allow_preview=False, object_fit="cover", scale=4, elem_id="hits", height="auto")
            with gr.Column(scale=1):
                upload = gr.Image(label="… or pictures like this one", type="filepath", sources=["upload", "clipboard"], height=180,
                                  elem_id="upload")
                folder = gr.Textbox(label="Take in a folder of this machine", elem_id="folder")
                state = gr.Markdown(models.status, elem_id="state")
        with gr.Row():
            words = gr.HTML(elem_id="words", label="its caption, and where each word looked")
            with gr.Column():
                chat = gr.Chatbot(label="Talk about it", height=420, elem_id="chat", feedback_options=None, buttons=[])
                question = gr.Textbox(show_label=False, placeholder=QUESTION, elem_id="question")
                with gr.Row():
                    beams = gr.Slider(1, 5, 1, step=1, label="Beams (1: word by word)")
                    temperature = gr.Slider(0, 2, 0, step=0.1, label="Temperature (0: the likeliest)")
                stop = gr.Button("Stop", elem_id="stop")
        found = [gallery, said, chosen]
        gr.on([start.click, text.submit], search, [text, top, chosen], found, concurrency_limit=4)
        upload.upload(search_like, [upload, top, chosen], [*found, chat]).success(explain, chosen, words)
        gallery.select(choose, chosen, [chosen, chat]).success(explain, chosen, words)
        asked = question.submit(ask, [question, chat], [question, chat])
        asked.then(answer, [chosen, chat, beams, temperature], chat, concurrency_limit=4)
        stop.click(end, queue=False)
        folder.submit(models.take_in, folder, state, concurrency_limit=None)
    return demo


def turns_of(history):
    """(question, answer) for each answered question of the chat, and for the last one, which has no answer yet."""
    turns = []
    for message in history:
        content = message["content"]
        text = content if isinstance(content, str) else " ".join(part["text"] for part in content if part.get("type") == "text")
        if message["role"] == "user":
            turns.append((text, None))
        elif turns:
            turns[-1] = turns[-1][0], text
    return [turn for turn in turns[:-1] if turn[1] is not None] + turns[-1:]


def blank():
    from PIL import Image

    return Image.new("RGB", (8, 8), "grey")


def main():
    parser = ArgumentParser(description="A local web page: find pictures, see their captions, chat about them.")
    parser.add_argument("folder", nargs="?", default=str(SAMPLES), help="pictures to index first, with subfolders")
    parser.add_argument("--index", default=DEFAULT_INDEX, help="a folder for the index, or http://host:port of a Milvus server")
    parser.add_argument("--model", help="CLIP: clip_small, OpenAI's, or a folder or hub name of a dual encoder of transformers")
    parser.add_argument("--llava", help="folder or hub name of a LLaVA; default: the one in weights/")
    parser.add_argument("--port", type=int, default=7860)
    parser.add_argument("--runtime", default="auto", help=RUNTIME_HELP)
    arguments = parser.parse_args()
    if not Path(arguments.folder).is_dir():
        raise UserError(f"{arguments.folder} is not a folder")
    try:
        import gradio as gr
    except ImportError:
        raise UserError("the page needs packages: pip install -c constraints.txt gradio") from None
    models = Models(arguments.index, arguments.model, arguments.llava, arguments.runtime)
    for line in models.take_in(arguments.folder):
        models.status = line
        print(printable(line), file=sys.stderr, flush=True)
    demo = build(models)
    try:
        demo.launch(server_name="127.0.0.1", server_port=arguments.port, share=False, inbrowser=False, quiet=True, prevent_thread_lock=True,
                    css=STYLE, theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]), footer_links=[],
                    ssr_mode=False, max_file_size="100mb")
    except OSError:
        raise UserError(f"port {arguments.port} of 127.0.0.1 is taken: name another with --port") from None
    print(f"http://127.0.0.1:{arguments.port} (Ctrl-C ends it)", file=sys.stderr, flush=True)
    try:
        threading.Event().wait()
    finally:
        demo.close()
        models.index.close()


if __name__ == "__main__":
    run(main)
