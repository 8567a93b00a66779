"""The entry point that vLLM calls once in each of its processes. It imports the standard library only; the rest comes when needed.

It puts a layer around a few functions, each of which first asks whether this engine was started with steering, or this request is
steered, and passes on if not.
"""

from __future__ import annotations

import functools
from typing import Any

_DONE = "_attnsteer"


def register() -> None:
    """Let engines of this process be steered; a second time does nothing."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.core import block_pool, kv_cache_utils
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.engine.input_processor import InputProcessor
    from vllm.v1.worker.gpu_worker import Worker

    _around(InputProcessor, "process_inputs", _admitted)
    _around(EngineCore, "preprocess_add_request", _entered)
    _around(EngineCore, "__init__", _complete)
    _around(Worker, "load_model", _armed)
    _around(EngineArgs, "create_engine_config", _piecewise)
    for module in (kv_cache_utils, block_pool):
        # The second has the function by name.
        _around(module, "generate_block_hash_extra_keys", _keyed)


def _around(owner: Any, name: str, layer: Any) -> None:
    inner = getattr(owner, name)
    if getattr(inner, _DONE, False):
        return

    @functools.wraps(inner)
    def outer(self: Any, *args: Any, **kwargs: Any) -> Any:
        return layer(inner, self, *args, **kwargs)

    setattr(outer, _DONE, True)
    setattr(owner, name, outer)


def _admitted(inner: Any, processor: Any, *args: Any, **kwargs: Any) -> Any:
    """The front end: errors are answers to the client."""
    request = inner(processor, *args, **kwargs)
    if request.sampling_params is None:
        return request
    from ...errors import AttnSteerError
    from .admission import admit, menu_of

    try:
        return admit(request, menu_of(processor), lambda: processor.tokenizer)
    except AttnSteerError as error:
        from vllm.exceptions import VLLMValidationError

        raise VLLMValidationError(str(error), parameter="attnsteer") from error


def _entered(inner: Any, core: Any, request: Any) -> Any:
    """Before the scheduler, whichever front end a request came by."""
    if request.sampling_params is not None:
        from .admission import enter, menu_of

        request = enter(request, menu_of(core))
    return inner(core, request)


def _keyed(inner: Any, request: Any, start: int, stop: int, *rest: Any) -> Any:
    """What the hash of a block has beside its tokens; see `admission.own_key`."""
    keys, index = inner(request, start, stop, *rest)
    if request.cache_salt:
        from .admission import own_key

        own = own_key(request, stop)
        if own is not None:
            return (*(keys or ()), own), index
    return keys, index


def _complete(inner: Any, core: Any, *args: Any, **kwargs: Any) -> None:
    """An engine starts only if each of its workers is armed."""
    inner(core, *args, **kwargs)
    from .admission import menu_of

    if menu_of(core) is None:
        return
    from ...errors import UnsupportedHost
    from .seam import status

    found = core.collective_rpc(status)
    if not all(own.get("armed") for own in found):
        raise UnsupportedHost(
            f"{sum(not own.get('armed') for own in found)} of {len(found)} workers did not load attnsteer's plug-in, and would "
            "leave steered requests as they are. Look for its error in their logs, and at VLLM_PLUGINS."
        )


def _armed(inner: Any, worker: Any, *args: Any, **kwargs: Any) -> Any:
    """A worker, once its model is there: before it is profiled, compiled or captured."""
    result = inner(worker, *args, **kwargs)
    from .menu import settings_of

    settings = settings_of(worker.vllm_config.additional_config)
    if settings is not None:
        from .seam import attach

        attach(worker, settings)
    return result


def _piecewise(inner: Any, arguments: Any, *args: Any, **kwargs: Any) -> Any:
    """On CUDA: graphs that leave attention out, since one that holds it would replay decode without the edits."""
    config = inner(arguments, *args, **kwargs)
    from .menu import settings_of

    if settings_of(config.additional_config) is None:
        return config
    mode = config.compilation_config.cudagraph_mode
    if mode is not None and mode.has_full_cudagraphs():
        from vllm.config.compilation import CUDAGraphMode

        config.compilation_config.cudagraph_mode = CUDAGraphMode.PIECEWISE
    return config
