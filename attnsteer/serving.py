"""A server with an OpenAI-compatible API, whose requests choose one of the steerings that it was started with.

It is the server of transformers with continuous batching; what is ours stands before it and takes `steering` out of a request's
body: a name, or an object with the name and numbers. Never a path, and never code.
"""

from __future__ import annotations

import copy
import json
import uuid
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from dataclasses import fields
from typing import Any

from .choices import NAME, NOTHING, Choice
from .errors import AttnSteerError, CompositionError, MissingExtra, SelectionError, UnsupportedHost, brief, listing
from .intervention import Intervention
from .parameters import Number, declared
from .steering import Steering, detach, steer

# What a request may ask for, and where; all else of the library's server would load other models, or throw this one away.
GENERATES = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
HEALTH, MODELS, STEERINGS = "/health", "/v1/models", "/v1/steerings"
FIELD = "steering"
# All requests of a manager are sampled alike, as it was started.
SAMPLING = ("top_p", "frequency_penalty", "presence_penalty", "seed", "generation_config", "stop", "logit_bias")
LARGEST_BODY = 16 * 2**20

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class Refusal(Exception):
    """A request that gets an answer of its own: status and message."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


class Chooser:
    """ASGI middleware: reads what steering a request asks for, and hands the rest on.

    Args:
        app: the server behind it. run: the steering of its model, with names. model: under which name it is asked for.
        temperature: with which it samples.
    """

    def __init__(self, app: Any, run: Steering, model: str = "", temperature: float = 0.0):
        self.app, self.run, self.model, self.temperature = app, run, model, temperature
        self._chosen: dict[str, Choice] = {}
        run.by_id = self._choice_of

    def _choice_of(self, request_id: str | None) -> Choice:
        if request_id not in self._chosen:
            raise CompositionError(f"request {request_id} came to the steered model by another way than this server.")
        return self._chosen[request_id]

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        method, path = scope["method"], scope["path"].rstrip("/")
        try:
            if method == "GET" and path == STEERINGS:
                await _answer(send, 200, _listed([_described(self.run, name) for name in self.run.choices.names]))
            elif method == "GET" and path == MODELS:
                await _answer(send, 200, _listed([{"id": self.model, "object": "model", "created": 0, "owned_by": ""}]))
            elif method == "GET" and path == HEALTH:
                await self.app(scope, receive, send)
            elif method == "POST" and path in GENERATES:
                await self._generate(scope, receive, send)
            else:
                there = f"POST {listing(GENERATES)} and GET {listing((HEALTH, MODELS, STEERINGS))}"
                raise Refusal(404, f"{method} {path}: there are {there}.")
        except Refusal as refusal:
            await _answer(send, refusal.status, _error(str(refusal)))

    async def _generate(self, scope: Message, receive: Receive, send: Send) -> None:
        body = _parsed(await _read(receive))
        choice = self._asked(body.pop(FIELD, NOTHING))
        self._check_sampling(body)
        data = json.dumps(body).encode()
        # An id of ours: two clients may have chosen the same.
        request_id = uuid.uuid4().hex
        own = {b"content-length": str(len(data)).encode(), b"x-request-id": request_id.encode()}
        headers = [(k, v) for k, v in scope["headers"] if k.lower() not in own] + list(own.items())
        told = False

        async def receive_again() -> Message:
            nonlocal told
            if told:
                return await receive()
            told = True
            return {"type": "http.request", "body": data, "more_body": False}

        self._chosen[request_id] = choice
        try:
            await self.app({**scope, "headers": headers}, receive_again, send)
        finally:
            del self._chosen[request_id]

    def _asked(self, given: Any) -> Choice:
        """The steering of a request: `"name"`, or `{"name": ..., parameter: number, ...}`."""
        values = dict(given) if isinstance(given, dict) else {"name": given}
        name = values.pop("name", None)
        try:
            if name is None or name == NOTHING:
                if values:
                    raise SelectionError(f"{FIELD}: {listing(values)} without a name.")
                return Choice()
            self.run.choices.choose({NAME: name})
            for parameter, value in values.items():
                self._check_value(name, parameter, value)
            return self.run.choices.choose({**values, NAME: name})
        except AttnSteerError as error:
            raise Refusal(400, str(error)) from None

    def _check_value(self, name: str, parameter: str, value: Any) -> None:
        """A value from a client is a number for a number, or spans for spans; an object is the values of one method."""
        methods = [self.run.bounds[i].method for i in self.run.choices.names[name]]
        if isinstance(value, dict) and parameter in {type(m).__name__ for m in methods}:
            for inner, own in value.items():
                self._check_value(name, inner, own)
            return
        allowed = sorted({n for m in methods for n in _open(m)})
        if parameter not in allowed:
            raise SelectionError(f"a request may set {listing(allowed) or 'nothing'} of {name!r}, not {parameter!r}.")
        if not (_is_spans(value) if parameter == "spans" else _is_number(value)):
            form = "a list of [start, stop] or of strings" if parameter == "spans" else "a number"
            raise SelectionError(f"{parameter}={brief(value)}: give {form}.")

    def _check_sampling(self, body: Mapping[str, Any]) -> None:
        other = [name for name in SAMPLING if body.get(name) is not None]
        asked = body.get("temperature")
        if asked is not None and asked != self.temperature:
            other.append("temperature")
        if other:
            raise Refusal(
                400,
                f"{listing(other)}: all requests of this server are sampled alike, at temperature {self.temperature:g}. Leave it "
                "out, or start the server with --temperature.",
            )


def _open(method: Intervention) -> list[str]:
    """The parameters of a method that a request may set."""
    return [f.name for f in fields(method) if f.name == "spans" or isinstance(declared(type(method), f.name), Number)]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_spans(value: Any) -> bool:
    if not isinstance(value, list) or not value:
        return False
    pairs = all(isinstance(v, list) and len(v) == 2 and all(_is_number(i) for i in v) for v in value)
    return pairs or all(isinstance(v, str) for v in value)


def _described(run: Steering, name: str) -> dict[str, Any]:
    methods = [run.bounds[i].method for i in run.choices.names[name]]
    own = [{"method": type(m).__name__, "parameters": {n: _shown(getattr(m, n)) for n in _open(m)}} for m in methods]
    return {"id": name, "object": FIELD, "methods": own}


def _listed(data: list[Any]) -> dict[str, Any]:
    return {"object": "list", "data": data}


def _shown(value: Any) -> Any:
    return value if value is None or isinstance(value, (int, float, str)) else repr(value)


def _error(message: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": "invalid_request_error", "param": FIELD, "code": None}}


async def _answer(send: Send, status: int, content: Any) -> None:
    data = json.dumps(content).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(data)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": data})


async def _read(receive: Receive) -> bytes:
    parts, size = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Refusal(400, "the request ended before its body did.")
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > LARGEST_BODY:
            raise Refusal(413, f"the body is larger than {LARGEST_BODY} bytes.")
        if not message.get("more_body"):
            return b"".join(parts)


def _parsed(data: bytes) -> dict[str, Any]:
    try:
        body = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise Refusal(400, f"the body is not JSON ({error}).") from None
    if not isinstance(body, dict):
        raise Refusal(400, "the body is no JSON object.")
    return body


class Server:
    """A steered model behind the library's server.

    Args:
        model: a folder, a hub id, or an embedded model. steerings: name -> interventions.
        temperature: of all requests; 0 takes the likeliest token. batching: fields of `ContinuousBatchingConfig`.
        device, dtype, attn_implementation: as `transformers serve` takes them.

    Attributes:
        app: the ASGI application. model, run: the model and its steering.

    Raises:
        MissingExtra: the libraries of the extra "serve" are not there.
        UnsupportedHost: the model has no continuous batching, or a steering cannot be exact in it.
    """

    def __init__(
        self,
        model: str,
        steerings: Mapping[str, Sequence[Intervention]],
        *,
        temperature: float = 0.0,
        batching: Mapping[str, Any] | None = None,
        device: str = "auto",
        dtype: str | None = "auto",
        attn_implementation: str | None = None,
    ):
        from transformers import ContinuousBatchingConfig
        from transformers.utils.import_utils import is_serve_available

        if not is_serve_available():
            raise MissingExtra("a server needs fastapi, uvicorn and openai: pip install 'attnsteer[serve]'.")
        from transformers.cli.serving.chat_completion import ChatCompletionHandler
        from transformers.cli.serving.completion import CompletionHandler
        from transformers.cli.serving.model_manager import ModelManager
        from transformers.cli.serving.response import ResponseHandler
        from transformers.cli.serving.server import build_server
        from transformers.cli.serving.systemone import SystemOneHandler
        from transformers.cli.serving.transcription import TranscriptionHandler
        from transformers.cli.serving.utils import GenerationState

        models = ModelManager(
            device=device,
            dtype=dtype,
            attn_implementation=attn_implementation,
            continuous_batching=True,
            force_model=_folder(model),
        )
        name = models.process_model_name(models.force_model)
        self.model, processor = models.load_model_and_processor(name)
        self._state = GenerationState(continuous_batching=True, cb_config=ContinuousBatchingConfig(**(batching or {})))
        modality = models.get_model_modality(self.model, processor=processor)
        if not self._state.use_continuous_batching(self.model, modality):
            raise UnsupportedHost(
                f"{type(self.model).__name__} has no continuous batching of text. Serve a language model."
            )
        tokenizer = getattr(processor, "tokenizer", processor)
        named = {n: [_with_tokenizer(m, tokenizer) for m in methods] for n, methods in steerings.items()}
        self.run = steer(self.model, named=named)
        config = copy.deepcopy(self.model.generation_config)
        config.do_sample, config.use_cache = temperature > 0, False
        config.temperature = temperature if temperature > 0 else None
        # Whatever cannot be exact is refused here, before the first request.
        self._state.get_manager(name, use_cb=True).init_cb(self.model, config)
        parts: dict[str, Any] = {"model_manager": models, "generation_state": self._state}
        app = build_server(
            models,
            ChatCompletionHandler(**parts),
            completion_handler=CompletionHandler(**parts),
            response_handler=ResponseHandler(**parts),
            transcription_handler=TranscriptionHandler(models, self._state),
            systemone_handler=SystemOneHandler(**parts),
            generation_state=self._state,
        )
        app.add_exception_handler(AttnSteerError, _told)
        self.app = Chooser(app, self.run, models.force_model, temperature)

    def serve(self, host: str = "localhost", port: int = 8000, log_level: str = "info") -> None:
        """Answer requests until interrupted."""
        import uvicorn

        try:
            uvicorn.run(self.app, host=host, port=port, log_level=log_level)
        finally:
            self.close()

    def close(self) -> None:
        """Stop the manager, and release the model."""
        self._state.shutdown()
        detach(self.model)


async def _told(request: Any, error: Exception) -> Any:
    """What a request asked wrongly was seen when its tokens were there (a span that is not in the text)."""
    from starlette.responses import JSONResponse

    return JSONResponse(_error(str(error)), status_code=400)


def _with_tokenizer(method: Intervention, tokenizer: Any) -> Intervention:
    return method.new(tokenizer=tokenizer) if hasattr(method, "tokenizer") and method.tokenizer is None else method


def _folder(model: str) -> str:
    from . import zoo

    return str(zoo.folder(model)) if model in zoo.KNOWN else model
