"""A page to try a model in: photos in, a caption out, and what it was read from. `mivpg app` serves it with Gradio.

What the page reads is in `app_bags.py`, what the model says of it in `app_answers.py`, how both are shown in
`app_html.py`, and what the server may be asked and sent in `app_hosts.py`.
"""

import importlib.util
import os
import signal
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mivpg.app_answers import MAX_PROMPT, Result, as_json, caption_opened, leave_out
from mivpg.app_bags import OpenedBag, Progress, generated_products, open_files, open_pictures
from mivpg.app_hosts import LimitedUploads, OwnNames, check_address, is_loopback
from mivpg.app_html import (
    COPY_JSON,
    CSS,
    show_attention,
    show_beams,
    show_caption,
    show_comparison,
    show_heading,
    show_json,
    show_photos,
    show_refused,
)
from mivpg.errors import MivpgError
from mivpg.modeling_mivpg import MivpgForConditionalGeneration
from mivpg.processing_mivpg import MivpgProcessor

if TYPE_CHECKING:
    import gradio


def check_installed() -> None:
    """Raises a `MivpgError` where Gradio is missing."""
    if importlib.util.find_spec("gradio") is None:
        raise MivpgError("The page takes Gradio: pip install 'mivpg[app]'.")


def build_page(
    model: MivpgForConditionalGeneration, processor: MivpgProcessor, *, name: str, max_files: int, max_file_mb: int
) -> "gradio.Blocks":
    """The page; its two limits stand on it.

    Raises:
        MivpgError: The model has no vision model.
    """
    import gradio as gr

    if processor.image_processor is None:
        raise MivpgError(f"{name} has no vision model: it takes stored features, and the page takes photos.")
    products = generated_products()
    first = next(iter(products))

    def tell(progress: gr.Progress) -> Progress:
        return lambda share, what: progress(share, desc=what)

    def forget() -> dict[Any, Any]:
        """What was said of other photos must not stand beside these."""
        return {
            result: None,
            results: gr.Column(visible=False),
            comparison: "",
            chosen: gr.CheckboxGroup(choices=[], value=[]),
        }

    def open_dropped(paths: list[str] | None, progress: gr.Progress = gr.Progress()) -> dict[Any, Any]:  # noqa: B008
        found, refused = open_files(
            model, processor, [Path(path) for path in paths or []], max_files=max_files, progress=tell(progress)
        )
        photos_shown = "" if found is None else show_photos(found)
        return {opened: found, refusal: show_refused(refused), photos: photos_shown, product: None, **forget()}

    def open_product(label: str | None) -> dict[Any, Any]:
        found = open_pictures(model, processor, products[label]) if label else None
        shown = "" if found is None else show_photos(found)
        return {opened: found, refusal: "", photos: shown, **forget()}

    def choose_product(label: str | None) -> dict[Any, Any]:
        return {files: None, **open_product(label)}

    def write(
        found: OpenedBag | None,
        text: str,
        number: float,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> dict[Any, Any]:
        if found is None:
            return {refusal: show_refused(["There is no photo yet; drop some, or pick a generated product."])}
        try:
            said = caption_opened(model, processor, found, prompt=text, num_beams=int(number), progress=tell(progress))
        except MivpgError as error:
            return {refusal: show_refused([str(error)])}
        choices = [(f"{index + 1}. {photo}", index) for index, photo in enumerate(found.names)]
        return {
            result: said,
            refusal: "",
            photos: show_photos(found, said.weights),
            results: gr.Column(visible=True),
            caption: show_caption(said),
            beams: show_beams(said),
            attention: show_attention(said),
            chosen: gr.CheckboxGroup(label=f"{found.noun.capitalize()}s to leave out", choices=choices, value=[]),
            comparison: "",
            code: show_json(as_json(said, model=name)),
        }

    def compare(
        said: Result | None,
        indices: list[int],
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> dict[Any, Any]:
        if said is None:
            return {refusal: show_refused(["There is no caption yet."])}
        try:
            found = leave_out(model, processor, said, indices, progress=tell(progress))
        except MivpgError as error:
            return {comparison: show_refused([str(error)])}
        return {comparison: show_comparison(found), code: show_json(as_json(said, found, model=name))}

    with gr.Blocks(title="mivpg", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        opened, result = gr.State(time_to_live=3600), gr.State(time_to_live=3600)
        gr.HTML(show_heading(name, max_files=max_files, max_file_mb=max_file_mb), elem_id="heading")
        with gr.Row():
            with gr.Column(min_width=300):
                files = gr.File(
                    label="Photos, or one slide",
                    file_count="multiple",
                    height=180,
                )
                product = gr.Radio(label="Or a generated product", choices=list(products), value=first)
                refusal = gr.HTML(elem_id="refusal")
            with gr.Column(min_width=300):
                prompt = gr.Textbox(
                    label="Prompt",
                    info="What the model reads before it writes.",
                    value=processor.prompt,
                    max_length=MAX_PROMPT,
                )
                num_beams = gr.Slider(
                    1, 10, value=5, step=1, label="Beams", info="Captions that are kept at each token."
                )
                button = gr.Button("Write the caption", variant="primary")
        photos = gr.HTML(elem_id="photos")
        with gr.Column(visible=False, elem_classes="results") as results:
            gr.Markdown("## Caption")
            caption = gr.HTML(elem_id="caption")
            gr.Markdown("## Beams")
            beams = gr.HTML(elem_id="beams")
            gr.Markdown("## Heat maps")
            attention = gr.HTML(elem_id="attention")
            gr.Markdown("## Leave photos out")
            chosen = gr.CheckboxGroup(label="Photos to leave out", choices=[])
            compare_button = gr.Button("Compare without them")
            comparison = gr.HTML(elem_id="comparison")
            gr.Markdown("## JSON")
            code = gr.HTML(elem_id="json")
            copy_button = gr.Button("Copy the JSON")

        forgotten = [result, results, comparison, chosen]
        shown = [opened, refusal, photos, *forgotten]
        answers = [result, refusal, photos, results, caption, beams, attention, chosen, comparison, code]
        # One job at a time: who asks for a caption while photos are read gets that of these photos.
        private: dict[str, Any] = {"api_visibility": "private", "concurrency_id": "model"}
        for event in (files.upload, files.delete, files.clear):
            event(open_dropped, files, [*shown, product], show_progress_on=photos, **private)
        product.input(choose_product, product, [*shown, files], show_progress_on=photos, **private)
        button.click(write, [opened, prompt, num_beams], answers, show_progress_on=photos, **private)
        prompt.submit(write, [opened, prompt, num_beams], answers, show_progress_on=photos, **private)
        compare_button.click(
            compare, [result, chosen], [comparison, refusal, code], show_progress_on=comparison, **private
        )
        copy_button.click(None, js=COPY_JSON, **private)
        page.load(open_product, product, shown, show_progress="hidden", **private)
    return page.queue(default_concurrency_limit=1, max_size=16, api_open=False)


def launch(page: "gradio.Blocks", *, host: str, port: int | None, max_files: int, max_file_mb: int) -> str:
    """Starts to serve a page, without waiting.

    Args:
        page: What `build_page` made.
        host: The address to listen on.
        port: By default the first free one from 7860.
        max_files: So many of the largest are taken at once.
        max_file_mb: Larger files are cut off while they arrive.

    Raises:
        MivpgError: There is no such address here, no such port is free, or the system refuses something else.

    Returns:
        The page's address.
    """
    import gradio as gr
    from starlette.middleware import Middleware

    check_address(host, port)
    layers = [Middleware(OwnNames, host=host)] if is_loopback(host) else []
    layers.append(Middleware(LimitedUploads, max_files=max_files, max_file_mb=max_file_mb))
    theme = gr.themes.Default(primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["monospace"])
    theme.set(  # Gradio's own white on orange, and its pale grey, are hard to read
        button_primary_background_fill="#2f6690",
        button_primary_background_fill_hover="#244f70",
        block_info_text_color="*neutral_600",
    )
    try:
        _, address, _ = page.launch(
            server_name=f"[{host}]" if ":" in host else host,  # as it stands in an address
            server_port=port,
            share=False,
            inline=False,
            quiet=True,
            prevent_thread_lock=True,
            max_file_size=max_file_mb * 2**20,
            footer_links=[],
            run_history=False,
            enable_monitoring=False,
            ssr_mode=False,
            mcp_server=False,
            app_kwargs={"middleware": layers},
            theme=theme,
            css=CSS,
        )
    except OSError as error:
        raise MivpgError(f"{host}: the page could not be served there: {error}") from None
    return address


def serve(
    model: MivpgForConditionalGeneration,
    processor: MivpgProcessor,
    *,
    name: str,
    host: str = "127.0.0.1",
    port: int | None = None,
    max_files: int = 32,
    max_file_mb: int = 50,
) -> None:
    """Serves the page until it is interrupted or told to end; what was uploaded is deleted then.

    Args:
        model: What captions.
        processor: The model's.
        name: What the page calls it.
        host: The address to listen on; the default is seen from this machine alone.
        port: By default the first free one from 7860.
        max_files: Read at once.
        max_file_mb: Largest file, in megabytes.

    Raises:
        MivpgError: A limit below one, a model without a vision model, or no free port.
    """
    if min(max_files, max_file_mb) < 1:
        raise MivpgError(f"--max-files is {max_files} and --max-file-mb {max_file_mb}, expected at least 1 of each.")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that uploads are deleted then, too
    with tempfile.TemporaryDirectory(prefix="mivpg-") as folder:
        # Gradio serves whatever lies in these two, which by default all its pages on a machine share.
        os.environ |= {"GRADIO_TEMP_DIR": folder, "GRADIO_EXAMPLES_CACHE": folder}
        page = build_page(model, processor, name=name, max_files=max_files, max_file_mb=max_file_mb)
        try:
            print(launch(page, host=host, port=port, max_files=max_files, max_file_mb=max_file_mb), flush=True)
            threading.Event().wait()
        finally:
            page.close(verbose=False)
