"""Serve a model over OpenAI's chat protocol: `/v1/chat/completions` with images, whole or streamed.

    pip install "adaptive-llava[serve]"
    python -m adaptive_llava serve my_model

```python
client = openai.OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
url = "data:image/png;base64," + base64.b64encode(Path("page.png").read_bytes()).decode()
content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is the total?"}]
client.chat.completions.create(
    model="my_model",
    messages=[{"role": "user", "content": content}],
    extra_body={"visual_token_budget": 144},  # as in `generate`; without it the router decides
)
```

The classes are this package's own, so no remote code runs, and weights are safetensors. A message carries its images
as `data:` URLs: no address is fetched and no file is opened. `stop` works as in `generate`: an answer ends with the
stop word. There is no authentication: put a proxy that has it in front before other machines can reach the server.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import signal
import socket
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import transformers

from adaptive_llava.training.finite_training import spoiled_tensor
from adaptive_llava.training.freeze_budget import check_model_folder


def main(arguments: list[str] | None = None) -> int:
    """Serve as the command line says, until a signal ends it."""
    parser = argparse.ArgumentParser(prog="python -m adaptive_llava serve", description=__doc__.split("\n")[0])
    parser.add_argument("folder", metavar="DIR", help="folder of an adaptive LLaVA model with its processor")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (%(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="port; 0 takes a free one and tells it (%(default)s)")
    parser.add_argument("--name", help="what requests call the model (the folder's name)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)")
    parser.add_argument("--dtype", default="auto", help="of the weights, such as bfloat16 (as they are stored)")
    parser.add_argument("--max-new-tokens", type=int, default=1024, help="longest answer, in tokens (%(default)s)")
    options = parser.parse_args(arguments)
    check_model_folder(Path(options.folder))
    _check_server_installed()
    listener = _listen(options.host, options.port)
    model, processor = load(options.folder, options.device, options.dtype)
    name = options.name or Path(options.folder).resolve().name
    _serve(model, processor, name, options.max_new_tokens, listener)
    return 0


def load(folder: str, device: str = "cpu", dtype: str = "auto") -> tuple[Any, Any]:
    """Model and processor of a folder, by this package's own classes and from safetensors alone.

    Args:
        folder: As `save_pretrained` of both wrote it.
        device: Where the model goes.
        dtype: Name of a floating-point type of torch, or `"auto"`.

    Raises:
        ValueError: `dtype` is no such name, or a weight is not finite.
    """
    from adaptive_llava import AdaptiveLlavaForConditionalGeneration, AdaptiveLlavaProcessor

    kind = dtype if dtype == "auto" else getattr(torch, dtype, None)
    if dtype != "auto" and not (isinstance(kind, torch.dtype) and kind.is_floating_point):
        raise ValueError(
            f"`dtype={dtype!r}` is no floating-point type of torch. Pass 'auto', 'bfloat16' or 'float16'."
        )
    model = AdaptiveLlavaForConditionalGeneration.from_pretrained(folder, dtype=kind)
    spoiled = spoiled_tensor(model.named_parameters())
    if spoiled is not None:
        raise ValueError(
            f"`{folder}` holds NaN or infinite numbers in `{spoiled}`, also possible for `dtype={dtype!r}` if it is "
            "narrower than the stored one. Take an earlier checkpoint, or pass `--dtype auto`."
        )
    return model.to(device).eval(), AdaptiveLlavaProcessor.from_pretrained(folder)


def _serve(model: Any, processor: Any, name: str, max_new_tokens: int, listener: socket.socket) -> None:
    import uvicorn

    from adaptive_llava.chat_server import build_app

    app = build_app(model, processor, name, max_new_tokens=max_new_tokens)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=10))
    host, port = listener.getsockname()[:2]
    print(f"{name} is served at http://{host}:{port}/v1", flush=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # uvicorn ends, then raises the signal anew
    with suppress(KeyboardInterrupt):
        server.run(sockets=[listener])
    print(f"{name} is no longer served", flush=True)


def _listen(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port))
    except (OSError, OverflowError) as error:
        raise ValueError(
            f"`--host {host} --port {port}` cannot be listened at: {error}. Pass another port, or 0 for a free one."
        ) from error


def _check_server_installed() -> None:
    missing = [name for name in ("fastapi", "openai", "uvicorn") if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"The server needs {' and '.join(missing)}. Install: pip install 'adaptive-llava[serve]'.")
    try:
        importlib.import_module("transformers.cli.serving.chat_completion")
    except ImportError as error:
        raise ValueError(
            f"The server is that of transformers 5, and this is {transformers.__version__}. Install: "
            "pip install --upgrade 'transformers>=5'."
        ) from error
