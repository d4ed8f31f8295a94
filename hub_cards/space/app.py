"""The demo: chat with images, at a token budget that you or the model chooses.

    python app.py                       # in a Space
    python -m adaptive_llava.hub_cards.space.app --model user/name

The variable MODEL names the model too. Without one, the small model that comes with the package answers.
"""

from __future__ import annotations

import argparse
import os
import socket
import tempfile
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from adaptive_llava.hub_cards.space.chat_turn import (
    assistant_message,
    budget_range,
    comparison_table,
    images_of,
    next_prompt,
    prepare,
    run_both,
    user_message,
    warm_up,
)
from adaptive_llava.hub_cards.space.model_choice import chosen_model, example_pictures, load
from adaptive_llava.hub_cards.space.token_overlay import overlays
from adaptive_llava.hub_cards.space.upload_check import check_text, read_uploads
from adaptive_llava.image_bytes import MAX_BYTES


_CARD = Path(__file__).resolve().parent / "README.md"
_SUFFIXES = [".jpg", ".jpeg", ".png", ".webp"]
_STYLE = """
.comparison { width: 100% } .comparison th, .comparison td { text-align: left; padding: 4px 8px }
"""


def build(model: Any, processor: Any, name: str | None) -> gr.Blocks:
    """The page.

    Args:
        model: An adaptive LLaVA model.
        processor: Its processor.
        name: What the model is called; `None` for the one that comes with the package.
    """
    fewest, most = budget_range(model.config)

    def turn(message: dict, shown: list, history: list, auto: bool, tokens: int, remember: bool):
        try:
            contents = [Path(path).read_bytes() for path in message["files"]]
            question = user_message(check_text(message["text"] or ""), read_uploads(contents))
            prompt = next_prompt(history, question, remember=remember)
            chosen, full = run_both(model, processor, prompt, "auto" if auto else int(tokens))
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from error
        pictures = overlays(model, processor, images_of(prompt), prepare(processor, prompt), chosen.rungs)
        said = [*history, question, assistant_message(chosen.answer)]
        shown = [*shown, *({"role": "user", "content": {"path": path}} for path in message["files"])]
        # the chat drops what looks like a tag, also where it renders no Markdown
        shown += [{"role": "user", "content": escape(message["text"])}]
        shown += [{"role": "assistant", "content": escape(chosen.answer)}]
        return None, shown, shown, said, pictures, comparison_table(chosen, full)

    with gr.Blocks(title="adaptive-llava", analytics_enabled=False) as page:
        gr.Markdown(f"## adaptive-llava\n{_about(model, name)}")
        # both are kept on the server: what the page would send back of the chat is never read
        shown, history = gr.State([]), gr.State([])
        with gr.Row():
            with gr.Column():
                chat = gr.Chatbot(label="Chat", height=320, render_markdown=False, buttons=[], elem_id="chat")
                box = gr.MultimodalTextbox(
                    label="Question",
                    placeholder="Upload an image and ask about it",
                    file_count="multiple",
                    file_types=_SUFFIXES,
                    elem_id="question",
                )
                _take_uploads_only(box)
                auto = gr.Checkbox(True, label="auto: the model chooses the tokens of each image", elem_id="auto")
                tokens = gr.Slider(
                    fewest, most, value=most, step=1, label="Visual tokens per image, at most", elem_id="tokens"
                )
                remember = gr.Checkbox(name is not None, label="Send earlier turns too", elem_id="remember")
                clear = gr.Button("New chat", elem_id="clear")
            with gr.Column():
                gr.Markdown("**What each visual token stands for**")
                gallery = gr.Gallery(
                    show_label=False,
                    height=360,
                    columns=2,
                    fit_columns=False,
                    object_fit="contain",
                    format="png",
                    buttons=[],
                    elem_id="overlay",
                )
                table = gr.HTML(elem_id="comparison")
        if name is None:
            gr.Examples(_examples(), inputs=[box])
        outputs = [box, chat, shown, history, gallery, table]
        box.submit(turn, [box, shown, history, auto, tokens, remember], outputs, api_visibility="private")
        tokens.input(lambda: False, None, auto, api_visibility="private")
        gr.on([clear.click, chat.clear], lambda: (None, [], [], [], [], ""), None, outputs, api_visibility="private")
    return page


def main(arguments: Sequence[str] | None = None) -> None:
    """Load the model and serve the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="Hub id or folder (the variable MODEL; else the model of the package)")
    parser.add_argument("--port", type=int, help="port, 0 for any that is free (7860, or the next free one)")
    options = parser.parse_args(arguments)
    name = chosen_model(options.model, os.environ, _CARD)
    model, processor = load(name)
    warm_up(model, processor)
    page = build(model, processor, name)
    port = _free_port() if options.port == 0 else options.port
    page.launch(server_port=port, max_file_size=MAX_BYTES, css=_STYLE, footer_links=[], ssr_mode=False)


def _take_uploads_only(box: gr.MultimodalTextbox) -> None:
    """Refuse an address in place of an uploaded file: gradio would fetch it before `turn` sees anything."""
    move = box.async_move_resource_to_block_cache

    async def move_upload(source: Any) -> str | None:
        if "://" in str(source):
            raise gr.Error("Addresses are not fetched. Upload the image itself.", print_exception=False)
        return await move(source)

    box.async_move_resource_to_block_cache = move_upload  # type: ignore[method-assign, unused-ignore]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _about(model: Any, name: str | None) -> str:
    counts = ", ".join(map(str, model.config.visual_token_counts))
    small = (
        "The small model of the package (it reads drawn pictures of 48 pixels; its milliseconds are mostly overhead)"
    )
    what = f"`{name}`" if name else small
    return f"{what} with `{model.config.compressor['type']}` at {counts} visual tokens per view."


def _examples() -> list[list[dict]]:
    folder = Path(tempfile.mkdtemp(prefix="examples"))
    rows = []
    for number, (picture, question) in enumerate(example_pictures()):
        path = folder / f"{number}.png"
        picture.save(path)
        rows.append([{"text": question, "files": [str(path)]}])
    return rows


if __name__ == "__main__":
    main()
