"""OpenAI's `/v1/chat/completions` for one model, by the chat handler of `transformers serve`.

Of the stock server's routes only chat is here: others load any model of the Hub, or open what a message names.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse
from jinja2 import TemplateError
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.utils import GenerationState, Modality

from adaptive_llava.chat_requests import check_request, images_of, read_messages
from adaptive_llava.image_bytes import MAX_BYTES, MAX_IMAGES


MAX_BODY = 2 * MAX_IMAGES * MAX_BYTES  # base64 makes 4 bytes of 3, and there is text

_TOO_LONG = f"The request has more than {MAX_BODY:,} bytes. Send fewer or smaller images."


def build_app(model: Any, processor: Any, name: str, *, max_new_tokens: int = 1024) -> FastAPI:
    """The server's routes: `/v1/chat/completions`, `/v1/models` and `/health`.

    Args:
        model: An adaptive LLaVA model, on its device.
        processor: Its processor.
        name: What requests call the model.
        max_new_tokens: Longest answer, in tokens.
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    handler = CheckedChatHandler(model, processor, name, max_new_tokens)
    started = int(time.time())

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Any:
        return await handler.handle_request(await _read_json(request), f"chatcmpl-{uuid.uuid4().hex}")

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        entry = {"id": name, "object": "model", "created": started, "owned_by": "adaptive-llava"}
        return {"object": "list", "data": [entry]}

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.exception_handler(HTTPException)
    async def refused(_: Request, error: HTTPException) -> JSONResponse:
        return _error(error.status_code, str(error.detail))

    for kind in (ValueError, TypeError):
        app.add_exception_handler(kind, _bad_request)
    return app


class CheckedChatHandler(ChatCompletionHandler):
    """The stock handler for one model, given requests that are checked and images that are decoded.

    Args:
        model: An adaptive LLaVA model, on its device.
        processor: Its processor.
        name: What requests call the model.
        max_new_tokens: Longest answer, in tokens.
    """

    def __init__(self, model: Any, processor: Any, name: str, max_new_tokens: int):
        super().__init__(model_manager=_OneModel(), generation_state=GenerationState())
        self.model, self.processor, self.name, self.max_new_tokens = model, processor, name, max_new_tokens

    async def handle_request(self, body: Any, request_id: str) -> Any:
        """The answer to a request, whole or as a stream.

        Raises:
            ValueError: A field, a message, an image or a budget that cannot be served.
            HTTPException: Another model is asked for.
        """
        fields = check_request(body, max_new_tokens=self.max_new_tokens)
        if fields.get("model") != self.name:
            raise HTTPException(
                404, f"`model={fields.get('model')!r}` is not here. This server has {self.name!r}: name that."
            )
        return await super().handle_request(await run_in_threadpool(self._prepared, fields), request_id)

    def _prepared(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        chat = read_messages(fields["messages"] if "messages" in fields else None)
        budget = fields.get("visual_token_budget")
        images = images_of(chat)
        try:
            self.processor.apply_chat_template(chat, add_generation_prompt=True)
        except TemplateError as error:
            raise ValueError(
                f"`messages` do not fit the model's chat template: {error} Send them as it asks."
            ) from error
        if budget is not None and images:  # here, since a stream has begun when the model would refuse it
            self.processor.count_tokens([images], visual_token_budget=budget)
        kept = {key: value for key, value in fields.items() if key != "visual_token_budget"}
        return {**kept, "messages": chat, "chat_template_kwargs": {"visual_token_budget": budget}}

    def _validate_request(self, body: dict[str, Any]) -> None:
        """Done: `check_request` was first."""

    def _resolve_model(self, body: dict[str, Any]) -> tuple[str, Any, Any]:
        return self.name, self.model, self.processor

    @staticmethod
    def get_processor_inputs_from_messages(messages: list[dict[str, Any]], modality: Any) -> list[dict[str, Any]]:
        """The messages as they are: `read_messages` gave them their form."""
        return messages

    def _build_generation_config(
        self, body: dict[str, Any], model_generation_config: Any, use_cb: bool = False
    ) -> Any:
        config = super()._build_generation_config(body, model_generation_config, use_cb=use_cb)
        config.max_new_tokens = min(config.max_new_tokens, self.max_new_tokens)
        if body.get("temperature", 0) > 0:  # a model that is greedy by default would leave it out in silence
            config.do_sample = True
        return config


class _OneModel:
    """What the stock handler asks of the stock model manager, which loads models by the name in a request."""

    @staticmethod
    def get_model_modality(model: Any, processor: Any = None) -> Modality:
        return Modality.VLM


async def _read_json(request: Request) -> Any:
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise HTTPException(415, "The request is no JSON. Send it with `Content-Type: application/json`.")
    content, announced = bytearray(), request.headers.get("content-length", "0")
    if not announced.isdigit() or int(announced) > MAX_BODY:
        raise HTTPException(413, _TOO_LONG)
    async for chunk in request.stream():
        content += chunk
        if len(content) > MAX_BODY:  # nothing was announced
            raise HTTPException(413, _TOO_LONG)
    try:
        return json.loads(bytes(content))
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, f"The request is no JSON that can be read: {error}.") from error


async def _bad_request(_: Request, error: Exception) -> JSONResponse:
    return _error(400, str(error))


def _error(status: int, message: str) -> JSONResponse:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return JSONResponse({"error": {"message": message, "type": kind, "param": None, "code": status}}, status)
