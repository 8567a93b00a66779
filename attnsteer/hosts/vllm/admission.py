"""A request at the door of an engine: what it asks for is looked up and checked, and its cache blocks are told apart.

It runs twice: in the front end, whose errors are answers to the client, and before the scheduler, for requests that came by another
front end. vLLM finds a cache block again by the hash of its tokens, of the blocks before it, and of the request's salt; the salt of
a steered request names its steering, so that only requests steered alike share blocks. What an edit does to a row may depend on
whether its token is of the prompt, and is its last: so blocks are shared up to there only, and what a request has generated is
computed again when it comes as the prompt of the next turn. Duck-typed: it imports nothing of vLLM.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import Any

from ...choices import Choice
from ...errors import SelectionError, UnsupportedHost
from . import wire
from .menu import Engine, Menu, settings_of

# What no client may begin a salt of its own with.
MARK = f"{wire.KEY}:"
STARTED_WITHOUT = (
    f"{wire.KEY}: this engine was started without steering. Start it with additional_config={{'{wire.KEY}': {{}}}} "
    f"(--additional-config '{{\"{wire.KEY}\": {{}}}}')."
)


def facts_of(config: Any) -> Engine:
    """The facts of a `VllmConfig`."""
    model, parallel = config.model_config, config.parallel_config
    text = model.hf_text_config
    heads = text.num_attention_heads
    return Engine(
        model=str(model.model),
        layers=text.num_hidden_layers,
        heads=heads,
        kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        shards=parallel.tensor_parallel_size,
        whole_prompts=not config.scheduler_config.enable_chunked_prefill,
    )


def menu_of(owner: Any) -> Menu | None:
    """The menu of a front end or an engine core, which has a `vllm_config`; made once. None: steering is off."""
    found = owner.__dict__.get("_attnsteer_menu", False)
    if found is False:
        settings = settings_of(owner.vllm_config.additional_config)
        found = None if settings is None else Menu(settings, facts_of(owner.vllm_config))
        owner._attnsteer_menu = found
    return found


def salt(choice: Choice, request_id: str, own: str | None) -> str:
    """The salt of a steered request.

    Args:
        own: what the client has salted it with.

    Blocks of methods whose statistics need every row of the prompt are found by nobody: the salt is the request's alone.
    """
    alone = "" if choice.row_local else f"{request_id}:"
    return f"{MARK}{choice.identity.hex()}:{alone}{own or ''}"


def own_key(request: Any, stop: int) -> tuple[str, str] | None:
    """What the hash of a block that ends before token `stop` has in it that no other request's has.

    Args:
        request: of the scheduler. None: it is not steered, or the block lies before the last token of its prompt.
    """
    if not (request.cache_salt or "").startswith(MARK):
        return None
    end = wire.prompt_of(request.sampling_params, request.num_prompt_tokens)
    if stop < end:
        return None
    # Of the request itself: ids come from clients.
    return wire.KEY, request.__dict__.setdefault("_attnsteer_own", uuid.uuid4().hex)


def admit(request: Any, menu: Menu | None, tokenizer: Callable[[], Any] | None = None) -> Any:
    """An `EngineCoreRequest` with its steering resolved and its salt set.

    Raises:
        SelectionError, UnsupportedHost: what it asks for does not exist, or cannot be exact here.
    """
    params = request.sampling_params
    extra = getattr(params, "extra_args", None) or {}
    value = extra.get(wire.KEY)
    own = request.cache_salt
    if wire.KEY not in extra or value is None:
        if menu is not None and (own or "").startswith(MARK):
            raise SelectionError(f"cache_salt: {MARK!r} is how salts of steered requests begin; choose another one.")
        return request
    if menu is None:
        raise SelectionError(STARTED_WITHOUT)
    if (own or "").startswith(MARK):
        raise SelectionError(f"cache_salt: {MARK!r} is how salts of steered requests begin; choose another one.")
    _check_kind(request)
    given, end = wire.ended(wire.parsed(value), len(request.prompt_token_ids))
    choice = menu.asked(given, request.prompt_token_ids[:end], tokenizer() if tokenizer is not None else None)
    rest = {k: v for k, v in extra.items() if k != wire.KEY}
    if not choice.parts:
        params.extra_args = rest or None
        return request
    params.extra_args = {**rest, wire.KEY: {**wire.resolved(choice), "by": _STAMP, wire.PROMPT: end}}
    request.cache_salt = salt(choice, uuid.uuid4().hex, own)
    if not choice.row_local:
        # Rows that are not computed are not counted.
        params.skip_reading_prefix_cache = True
    return request


# Set on what was resolved. A client cannot say it: its requests are read by `Menu.asked`, which has no such entry.
_STAMP = "admission"


def _is_resolved(value: Any) -> bool:
    return isinstance(value, dict) and value.get("by") == _STAMP and wire.RESOLVED in value


def enter(request: Any, menu: Menu | None) -> Any:
    """A request before the scheduler: as the front end made it, or resolved here; told apart where copies of it are not alike."""
    params = request.sampling_params
    value = (getattr(params, "extra_args", None) or {}).get(wire.KEY)
    if menu is None or not _is_resolved(value):
        return admit(request, menu)
    if not (request.cache_salt or "").startswith(MARK):
        raise SelectionError(f"request {request.request_id}: its steering is resolved, and its salt is not.")
    if params.skip_reading_prefix_cache and not menu.received(value).row_local:
        # Several sequences of one request have each a statistic of its own.
        request.cache_salt = f"{request.cache_salt}{request.request_id}"
    return request


def _check_kind(request: Any) -> None:
    if request.prompt_token_ids is None or getattr(request, "prompt_embeds", None) is not None:
        raise UnsupportedHost(f"{wire.KEY}: a prompt of embeddings has no tokens to count. Send text or token ids.")
    if getattr(request, "resumable", False):
        raise UnsupportedHost(f"{wire.KEY}: a prompt that comes piece by piece has no known end. Send it whole.")
