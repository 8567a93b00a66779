"""Continuous batching (`generate_batch`, `init_continuous_batching`) of a steered model: its managers follow what each request is.

A manager runs in a thread of its own, which keeps errors to itself. So whatever can be wrong is looked at before the first token,
where the caller stands, and what still fails is raised when `generate_batch` returns or the steering is left.
"""

from __future__ import annotations

import copy
import threading
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ...choices import DEFAULT, Choice
from ...errors import CompositionError, SelectionError, UnsupportedHost, brief, listing
from ...scope import PLAIN
from ...tokens import Tokens
from .attention_function import base_name
from .outer_calls import KEY
from .packed import CARRIER, Joint, Packed, Request, pieces
from .prefixes import salt_prefixes

BASES = ("sdpa", "eager", "paged|eager")
# What continuous batching cannot give a method: it takes token ids, and runs layers on packed rows.
ABSENT = ("images", "image_free", "residual")
# Where the library keeps a manager that later calls take again.
CACHED = "_cached_continuous_batching_manager"


class Continuous:
    """What a steering knows of the continuous batching of its model."""

    def __init__(self, run: Any, direct: set[str]):
        self.run, self.joint = run, Joint(run)
        self._direct = direct
        # Attention modules that were found to compute what their arguments say.
        self.exact: set[int] = set()
        self._managers: weakref.WeakSet[Any] = weakref.WeakSet()
        # Counting of requests and of inputs must not be interleaved.
        self.lock = threading.RLock()
        # What `generate_batch` of this thread has chosen for its inputs.
        self._chosen = threading.local()

    def watch(self, module: nn.Module, journal: Any) -> None:
        """Put layers around the entries of a model; undone by the journal."""
        for name, around in (("init_continuous_batching", self._init), ("generate_batch", self._generate_batch)):
            if callable(getattr(type(module), name, None)):
                journal.wrap(module, name, around)
        if callable(getattr(type(module), "init_continuous_batching", None)):
            journal.add(lambda: self._release(module))

    def _init(
        self,
        inner: Any,
        generation_config: Any = None,
        continuous_batching_config: Any = None,
        workload_hints: Any = None,
    ) -> Any:
        """A manager whose requests are steered."""
        model = inner.__self__
        self._check(model)
        config = _config(continuous_batching_config, generation_config or model.generation_config)
        # Flash kernels take no mask, and tell no row from another.
        config.auto_switch_to_flash = False
        known = getattr(model, CACHED, None)
        manager = inner(generation_config, config, workload_hints)
        if manager is known:
            return manager
        try:
            _check_manager(manager)
        except UnsupportedHost:
            manager.destroy()
            raise
        Session(self, manager)
        self._managers.add(manager)
        return manager

    def _check(self, model: Any) -> None:
        """Raise where a manager of this model could not be steered exactly."""
        run = self.run
        for bound in run.bounds:
            absent = [need for need in bound.method.needs if need in ABSENT]
            if absent:
                raise UnsupportedHost(
                    f"{bound.name} needs {listing(absent)}, which continuous batching does not have: its requests are token ids, "
                    "packed into one row. Use generate with a padded batch."
                )
        for site in run.sites:
            base = base_name(site.module.config) if site.path not in self._direct else "an SDPA of its own"
            if base not in BASES or site.kind != "self":
                raise UnsupportedHost(
                    f"{site.path} is {site.kind}-attention by {base}; continuous batching is steered where self-attention runs "
                    'sdpa or eager. Call model.set_attn_implementation("sdpa") first.'
                )
            if base != "sdpa" and getattr(site.module.config, "attn_logit_softcapping", None):
                raise UnsupportedHost(
                    f"{site.path} caps its scores, which the library's paged eager attention leaves out, so its tokens are not "
                    "those of generate. Use generate with a padded batch."
                )
        if run.scope != PLAIN:
            raise UnsupportedHost(
                "run.freeze, run.chunked_prefill and run.images hold for calls of their own thread, and continuous batching runs "
                "in another one. Leave that block first."
            )
        known = getattr(model, CACHED, None)
        if known is not None and known not in self._managers:
            raise UnsupportedHost(
                "the model keeps a manager of continuous batching that was not made under this steering; its cache holds prefixes "
                "that were steered otherwise. Call model.destroy_cached_continuous_batching_manager() first."
            )

    def _generate_batch(self, inner: Any, inputs: Any, *args: Any, steer: Any = DEFAULT, **kwargs: Any) -> Any:
        """The library's `generate_batch`, with `steer`: one entry for all inputs or a list with one for each."""
        run, before = self.run, len(self.run.failures)
        inputs = [_ids(ids) for ids in inputs]
        self._chosen.values, self._chosen.refused = self.choices(inputs, steer), None
        try:
            results = inner(inputs, *args, **kwargs)
        finally:
            refused, self._chosen.values, self._chosen.refused = self._chosen.refused, None, None
        if refused is not None:
            # The library logs what its manager raises, and returns.
            raise refused
        if len(run.failures) > before:
            # Raised here, so not again on leaving the steering.
            error = run.failures[before]
            del run.failures[before:]
            raise error
        return results

    def choices(self, inputs: Sequence[list[int]], steer: Any) -> list[Choice]:
        """What each of several inputs gets; all are looked at before the first token."""
        count = len(inputs)
        each = steer if isinstance(steer, (list, tuple)) else [steer] * count
        if len(each) != count:
            raise SelectionError(
                f"steer has {len(each)} entries for {count} inputs; give one for all, or one for each."
            )
        return [self.choice(ids, own, (i, count)) for i, (ids, own) in enumerate(zip(inputs, each, strict=True))]

    def choice(self, ids: list[int], wanted: Any, place: tuple[int, int] | None) -> Choice:
        """What one request gets, with its own tokens looked up."""
        return self.run.choices.choose(wanted, place).settled(_tokens(ids))

    def taken(self) -> list[Choice] | None:
        """What `generate_batch` of this thread has chosen for its inputs; None where none runs."""
        return getattr(self._chosen, "values", None)

    def refuse(self, error: Exception) -> None:
        """Let `generate_batch` of this thread, if one runs, raise what its manager did."""
        self._chosen.refused = error

    def _release(self, model: nn.Module) -> None:
        """The steering is removed: a manager that the library keeps goes with it."""
        known = vars(model).get(CACHED)
        if known is not None and known in self._managers:
            model.destroy_cached_continuous_batching_manager()


class Session:
    """One manager under a steering. It holds to it for good: once the steering is removed, the manager refuses to go on."""

    def __init__(self, batching: Continuous, manager: Any):
        self.batching, self.run = batching, batching.run
        self._inner = {
            n: getattr(manager, n)
            for n in ("add_request", "add_requests", "_create_batch_processor", "_handle_critical_error")
        }
        self._limit = manager.continuous_batching_config.max_batch_tokens or _default_limit()
        self._copies = manager.num_return_sequences
        self._wrapped: weakref.WeakSet[Any] = weakref.WeakSet()
        # Which input each id is, and what was chosen, while a thread adds several.
        self._adding = threading.local()
        manager.logit_processor.supported_keys = {**manager.logit_processor.supported_keys, CARRIER: Request}
        manager.add_request = self._add
        manager.add_requests = self._add_all
        manager._create_batch_processor = self._create
        manager._handle_critical_error = self._fail
        self.manager = weakref.ref(manager)

    def _attached(self) -> None:
        if not self.run.attached:
            raise CompositionError(
                f"{self.run} was removed, and this manager of continuous batching belongs to it. Make another one, and leave the "
                "steering after its requests are done."
            )

    def _add(self, input_ids: Any, *args: Any, **kwargs: Any) -> Any:
        """One request; `steer` says what acts on it: a name, values of its own, both, or None."""
        try:
            ids, choice = self._chosen(input_ids, kwargs)
        except Exception:
            # A server waits for the result already.
            self.manager().output_router.result_handlers.pop(kwargs.get("request_id"), None)
            raise
        self.run.asked_for.update(p.bound.index for p in choice.parts)
        with self.batching.lock:
            return self._inner["add_request"](ids, *args, **kwargs, **{CARRIER: Request(choice)})

    def _chosen(self, input_ids: Any, kwargs: dict[str, Any]) -> tuple[list[int], Choice]:
        """(token ids, what acts on them); `steer` is taken out of the arguments."""
        self._attached()
        wanted, name = kwargs.pop(CARRIER, DEFAULT), kwargs.get("request_id")
        known = getattr(self._adding, "places", None)
        if known is not None and name in known:
            return list(input_ids), known[name]
        if wanted is DEFAULT and self.run.by_id is not None:
            wanted = self.run.by_id(name)
        ids = _ids(input_ids)
        choice = self.batching.choice(ids, wanted, None)
        self._check(choice, len(ids))
        return ids, choice

    def _add_all(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Several requests; `steer` is one entry for all, or a list with one for each."""
        try:
            return self._add_checked(inputs, args, kwargs)
        except Exception as error:
            self.batching.refuse(error)
            raise

    def _add_checked(self, inputs: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._attached()
        wanted = kwargs.pop(CARRIER, DEFAULT)
        inputs = [_ids(ids) for ids in inputs]
        chosen = self.batching.taken() or self.batching.choices(inputs, wanted)
        for choice, ids in zip(chosen, inputs, strict=True):
            self._check(choice, len(ids))
        with self.batching.lock:
            # The library numbers them in this order, and adds them in another one.
            first = self.manager()._request_counter
            self._adding.places = {f"req_{first + i}": choice for i, choice in enumerate(chosen)}
            try:
                return self._inner["add_requests"](inputs, *args, **kwargs)
            finally:
                self._adding.places = None

    def _check(self, choice: Choice, length: int) -> None:
        if choice.row_local:
            return
        names = (
            listing(p.bound.name for p in choice.parts if not p.bound.method.row_local) or choice.parts[0].bound.name
        )
        if length > self._limit:
            raise UnsupportedHost(
                f"{names} takes a prompt in one piece, and this one of {length} tokens is longer than a batch of {self._limit}. "
                "Raise max_batch_tokens in ContinuousBatchingConfig."
            )
        if self._copies > 1:
            raise UnsupportedHost(
                f"{names} takes a prompt in one piece, which num_return_sequences={self._copies} splits. Add the request "
                f"{self._copies} times."
            )

    def _create(self) -> Any:
        processor = self._inner["_create_batch_processor"]()
        if processor not in self._wrapped:
            self._wrapped.add(processor)
            self._follow(processor)
        return processor

    def _follow(self, processor: Any) -> None:
        """Let each forward carry the account of its rows, prompts stay whole where they must, and prefixes apart."""
        cache, ios, scheduler = processor.cache, processor.inputs_and_outputs, processor.scheduler
        self._limit = cache.max_batch_tokens
        inner, stored = ios.get_model_kwargs, cache.can_store_request_tokens
        seqlen_k = {kind: allocator.get_seqlen_k for kind, allocator in cache.cache_allocators.items()}

        def get_model_kwargs(*args: Any, **kwargs: Any) -> Any:
            found = inner(*args, **kwargs)
            self._attached()
            packed = Packed(
                self.batching.joint, pieces(ios.requests_in_batch, seqlen_k), ios.device, self.batching.exact
            )
            found[KEY] = {id(self.run): packed}
            return found

        def can_store_request_tokens(state: Any, request_len: int, dry_run: bool = False) -> Any:
            # As if there were no room: the request waits for a batch that takes its prompt whole.
            if request_len < _whole(state) - state.position_offset:
                return False
            return stored(state, request_len, dry_run)

        ios.get_model_kwargs = get_model_kwargs
        cache.can_store_request_tokens = can_store_request_tokens
        salt_prefixes(cache, scheduler)

    def _fail(self, error: Exception, processor: Any) -> None:
        self.run.failures.append(error)
        self._inner["_handle_critical_error"](error, processor)


def _whole(state: Any) -> int:
    """Tokens of a request that must come in one forward."""
    request = state.logit_processor_kwargs.get(CARRIER)
    if request is None or request.choice.row_local:
        return 0
    return state._true_initial_tokens or len(state.initial_tokens)


def _config(given: Any, generation: Any) -> Any:
    """A copy of the manager's config, wherever it was given."""
    from transformers.generation import ContinuousBatchingConfig

    given = getattr(generation, "continuous_batching_config", None) if given is None else given
    return copy.copy(given) if isinstance(given, ContinuousBatchingConfig) else ContinuousBatchingConfig()


def _default_limit() -> int:
    from transformers.generation.continuous_batching.cache import PagedAttentionMemoryHandler

    return PagedAttentionMemoryHandler._default_max_batch_tokens


def _check_manager(manager: Any) -> None:
    """Raise where a manager replays or reorders forwards, so that an account of rows would be that of other ones."""
    config = manager.continuous_batching_config
    asked = {
        "CUDA graphs (use_cuda_graph=False)": any(config.cuda_graph_booleans),
        "compiled forwards (varlen_compile_config=None)": config.varlen_compile_config is not None,
        "compiled decoding (decode_compile_config=None)": config.decode_compile_config is not None,
        "asynchronous batching (use_async_batching=False)": config.use_async_batching,
        "tensor parallelism": manager.distributed_helper.tp_size > 1,
    }
    wrong = [name for name, on in asked.items() if on]
    if wrong:
        raise UnsupportedHost(
            f"continuous batching of a steered model does without {listing(wrong)}: which row belongs to which request is drawn up "
            "anew for each forward. Set it in ContinuousBatchingConfig."
        )


def _ids(given: Any) -> list[int]:
    """Token ids of one request as a list."""
    found = given.tolist() if hasattr(given, "tolist") else list(given) if isinstance(given, (list, tuple)) else None
    if not found or not all(isinstance(i, int) and not isinstance(i, bool) for i in found):
        raise SelectionError(f"a request is {brief(given)}; give a list of at least one token id.")
    return found


def _tokens(ids: list[int]) -> Tokens:
    return Tokens(batch=1, length=len(ids), ids=torch.tensor([ids]), prompt=len(ids))
