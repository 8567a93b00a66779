"""The clock of a denoiser: what one call of it is about (rows of each branch, token grid, step), and what acts in it."""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...account import Samples, Track
from ...branches import samples_of
from ...call import AttnCall
from ...engine import SiteRuntime
from ...errors import SelectionError, UnsupportedHost
from ...maps.words_to_image import Capture, MapsComplete
from ...site import Site
from .declarations import Declarations
from .latents import unet_scale
from .probe import probe
from .rows import INPUTS, latent_name
from .steps import TIMES, Sampling
from .streams import RAGGED, order_of, own_place

if TYPE_CHECKING:
    from ...steering import Steering


# Marks the classes of processors that are put in the place of a model's own.
STEERED = "__attnsteer__"


# What was found by looking, of each model, so that it is looked at once, however often it is steered.
_LOOKED: weakref.WeakKeyDictionary[nn.Module, dict[Any, tuple[str, ...]]] = weakref.WeakKeyDictionary()


class ProcessorCall:
    """The running call of one attention processor.

    Attributes:
        primitives: attention primitives called so far. image_rows: rows of `hidden_states` where the text came as a second
            argument, else None. ran: whether a primitive was called in this pass; only written where code may be compiled.
        negative: the attention to the negative prompt, where one is compared with: a function of the queries, then its output.
        collecting: this call is made for that.
        blocks: calls of a processor before its last one, where its sequence is in blocks.
        image_prompt: what makes of the attention to an image prompt what a method sees, where one acts on it.
    """

    __slots__ = ("blocks", "collecting", "image_prompt", "image_rows", "negative", "primitives", "ran")

    def __init__(self) -> None:
        self.primitives = self.blocks = 0
        self.image_rows: int | None = None
        self.ran = False
        self.negative: Tensor | Callable[[Tensor], Tensor] | None = None
        self.collecting = False
        self.image_prompt: Callable[[Tensor], tuple[Any, Tensor]] | None = None


class DenoiserClock:
    """What one denoiser is doing now; shared by all of its sites.

    Attributes:
        declared: what the run asks of this denoiser.
        layout: names of the equal parts of the batch, e.g. ("uncond", "cond"); None when not known.
        batch: rows in all. image_tokens: rows of an image in its sequences, where the input tells.
        size: (height, width) of the latent, in units whose ratio is that of the token grid.
        contrast: the negative prompt of the running pass. collecting: attention runs for its output alone, which is raised.
        capture: where the maps of the running pass go. cut: whether that pass ends as soon as all are there.
        calls: by path of a site, the running call of its processor.
    """

    def __init__(self, run: Steering, name: str, owner: nn.Module, model: nn.Module, sampling: Sampling):
        self.run, self.name, self.owner, self.model, self.sampling = run, name, owner, model, sampling
        self.runtimes = {path: r for path, r in run.runtimes.items() if r.site.component == name}
        self.declared = Declarations.of(run, self.runtimes.values(), owner, model)
        self._orders = {path: order_of(r.site, model) for path, r in self.runtimes.items()}
        self._own = {path: own_place(r.site, model) for path, r in self.runtimes.items()}
        # Sites whose order a method needs and no table has, until the model was looked at.
        needed = any("segments" in b.method.needs or b.where.rows in ("image", "text") for b in run.bounds)
        told = RAGGED.search(type(model).__name__) or self.declared.compiled or not needed
        self.unknown = set() if told else {path for path, order in self._orders.items() if not order}
        # Why it could not be looked at.
        self.unlooked = ""
        if needed and self.declared.compiled and not all(self._orders.values()):
            self.unlooked = (
                f"{type(model).__name__} is compiled, and compiled code cannot be looked at; steer it uncompiled"
            )
        self._patch = getattr(getattr(model, "config", None), "patch_size", 1)
        # Compiled code is compiled anew for each value that it reads here, so it reads no more than is needed.
        self._acting: dict[str, tuple[int, ...]] = {}
        self.layout: tuple[str, ...] | None = None
        self.batch = 0
        self.image_tokens: int | None = None
        self.size: tuple[int, int] | None = None
        self.contrast: Any = None
        self.collecting = False
        self.capture: Capture | None = None
        self.cut = False
        self.calls: dict[str, ProcessorCall] = {}
        # By path of a site: its module, where its processor is one of ours.
        self.steered: dict[str, nn.Module] = {}

    def forget_calls(self) -> None:
        """A pass begins: no site has computed its attention."""
        for call in self.calls.values():
            call.ran = False

    def reached(self) -> set[str]:
        """Paths of the sites that have computed their attention since."""
        return {path for path, call in self.calls.items() if call.ran}

    def paths_of(self, index: int) -> set[str]:
        """The sites here at which intervention number `index` is attached."""
        return {path for path, r in self.runtimes.items() if any(b.index == index for b, _ in r.entries)}

    def look(self, run: Callable[[dict[str, Any]], Any], values: dict[str, Any]) -> None:
        """Find out in what order the streams lie at sites of which no table says it, from this call's own arguments.

        What cannot be found out stays unknown, so that a method that needs it raises.
        """
        unknown, self.unknown = self.unknown, set()
        given = frozenset(name for name, value in values.items() if value is not None)
        known = _LOOKED.setdefault(self.model, {})
        keys = {path: (path, type(self.runtimes[path].site.module.processor).__name__, given) for path in unknown}
        self._orders |= {path: known[key] for path, key in keys.items() if known.get(key)}
        if all(key in known for key in keys.values()):
            return
        acting, self._acting = self._acting, {path: () for path in self.runtimes}
        try:
            found = probe(self.model, values, run)
        except Exception as error:
            # The dry run is ours: whatever it cannot do, the call itself may.
            self.unlooked = f"{type(error).__name__}: {error}"
            return
        finally:
            self._acting = acting
        for path in unknown:
            orders = {s.order for s in found if s.site == self.runtimes[path].site.name and not s.ragged}
            if len(orders) == 1 and set(*orders) == {"image", "text"} and len(min(orders)) == 2:
                self._orders[path] = min(orders)
            known[keys[path]] = self._orders[path]

    def begin(self, values: dict[str, Any]) -> None:
        """Read the arguments of one forward of the denoiser."""
        latent = latent_name(values)
        if latent is None:
            raise UnsupportedHost(
                f"{type(self.model).__name__} has no latent among its arguments ({', '.join(INPUTS)}), so what its calls are about "
                "is not known: no guidance, steps or branches here. Edits without them act as they do elsewhere."
            )
        if not torch.compiler.is_compiling():
            gone = next((p for p, module in self.steered.items() if not hasattr(type(module.processor), STEERED)), None)
            if gone is not None:
                raise UnsupportedHost(
                    f"the attention processor of {gone} was exchanged while it is steered, so the edit would vanish. Detach first, "
                    "change the processors, then steer again; or leave this site out of Where."
                )
        sample = values[latent]
        if self.declared.latent and isinstance(sample, Tensor) and not sample.is_floating_point():
            raise UnsupportedHost(
                f"{type(self.model).__name__} samples numbers of tokens, which have no gradient: no method that moves the latent "
                "acts here."
            )
        if isinstance(sample, Tensor) and sample.is_meta:
            raise UnsupportedHost(
                f"{type(self.model).__name__} runs on the meta device, which computes nothing; steer the model with its weights."
            )
        self.batch = len(sample)
        self.image_tokens = _image_tokens(sample, self._patch)
        self.size = _grid_size(sample, values)
        self.sampling.begin(next((values[n] for n in TIMES if values.get(n) is not None), None))
        self.layout = self.run.scope.layout
        if self.layout is not None and self.batch % len(self.layout):
            raise SelectionError(
                f"run.branches{self.layout} names {len(self.layout)} equal parts, and a call of {type(self.model).__name__} has "
                f"{self.batch} rows. Name each part of the batch."
            )
        if self.layout is None and self.declared.rows:
            self.layout = self.sampling.layout(self.batch, values, latent)
        self.sampling.turn += 1
        self.refresh()

    def refresh(self) -> None:
        """Find out which interventions act in the pass that starts now."""
        step, steps = self.sampling.step, self.sampling.steps
        self._acting = {path: runtime.active(None, step, steps) for path, runtime in self.runtimes.items()}
        self.prepare()

    def prepare(self) -> None:
        """Fill the tables that a first call would fill: compiled code would be compiled anew after that."""
        for runtime in self.runtimes.values():
            runtime.partition(self.active(runtime))

    def stop(self) -> None:
        """The run is over: nothing of the last pass stays."""
        self._acting = {}

    @contextlib.contextmanager
    def on_rows(self, layout: tuple[str, ...] | None, batch: int) -> Iterator[None]:
        """One pass of the model on `batch` rows with this layout."""
        before = self.layout, self.batch, self._acting
        self.layout, self.batch = layout, batch
        self.refresh()
        try:
            yield
        finally:
            self.layout, self.batch, self._acting = before

    @property
    def samples(self) -> Samples:
        """Which prompt, and which image, each row of this call belongs to."""
        return samples_of(1 if self.layout is None else len(self.layout), self.batch, self.sampling.prompts.count)

    def check_samples(self) -> None:
        """Raise where values per sample are not those of this call's rows; before the model runs."""
        if not self.declared.sampled:
            return
        if self.layout is None and self.sampling.pipeline is not None:
            raise UnsupportedHost(
                f"values per sample need to know which of the {self.batch} rows of a call are conditional, which is not known for "
                f'{type(self.sampling.pipeline).__name__}; enter run.branches("uncond", "cond") around the calls, or give one '
                "value for all."
            )
        for bound in self.run.bounds:
            bound.method.check_samples(self.samples)

    def active(self, runtime: SiteRuntime) -> tuple[int, ...]:
        """Which interventions act at a site now."""
        found = self._acting.get(runtime.site.path)
        return runtime.active(None, None, None) if found is None else found

    def end_if_captured(self) -> None:
        """A site's attention is done: end the pass if it was run for its maps, and all are there."""
        if self.cut and self.capture is not None and self.capture.complete:
            raise MapsComplete

    def grid_at(self, site: Site) -> tuple[int, int] | None:
        """(height, width) of the image rows of a site in this call, where it is known before the site runs."""
        if self.size is None:
            return None
        scale = unet_scale(self.model, site.name)
        if scale is not None:
            return -(-self.size[0] // scale), -(-self.size[1] // scale)
        return None if self.image_tokens is None else _grid_of(self.image_tokens, self.size)

    def call(
        self,
        site: Site,
        batch: int,
        rows: int,
        keys: int,
        device: torch.device,
        image: int | None,
        number: int = 1,
        own: str | None = None,
    ) -> AttnCall:
        """One attention call with `rows` query rows of `batch` sequences over `keys` keys.

        Args:
            image: rows of the stream that the processor got apart from its text; None when it got one sequence.
            number: of this call in the processor's, from 1: of the sample, where it attends for each by itself.
            own: where the rows' own keys stand, "first" or "last", among further ones; None: as at the site.
        """
        compiling = torch.compiler.is_compiling()
        roles = segments(self._orders[site.path], rows, self.image_tokens if image is None else image)
        facts: dict[str, Any] = {"capture": self.capture}
        own = self._own.get(site.path) if own is None else own
        if own and rows < keys:
            facts["own keys"] = slice(0, rows) if own == "first" else slice(keys - rows, keys)
        states: dict[Any, Any] = {}
        if self.declared.prompt:
            facts["prompt"], states = self.sampling.prompts.current, self.sampling.memory.setdefault("states", {})
        found = roles.get("image")
        if found is not None and self.size is not None:
            facts["grid"] = _grid_of(found.stop - found.start, self.size)
        step, steps, branch_rows = None, None, None
        if self.declared.steps or not compiling:
            step, steps = self.sampling.step, self.sampling.steps
        if self.declared.branches and self.layout is not None:
            if batch % max(self.batch, 1) == 0:
                branch_rows = self._branch_rows(batch, device)
            elif batch == 1 and number <= self.batch:
                # One call for each sample.
                every = self._branch_rows(self.batch, device)
                branch_rows = {name: found[number - 1 : number] for name, found in every.items()}
        return AttnCall(
            site,
            _track(rows, device, compiling),
            _track(keys, device, compiling),
            host="diffusers",
            step=step,
            steps=steps,
            segments=roles,
            branch_rows=branch_rows,
            samples=self.samples if self.declared.sampled else None,
            facts=facts,
            states=states,
        )

    def _branch_rows(self, batch: int, device: torch.device) -> dict[str, Tensor]:
        """Branch name -> bool [batch]; frames or positions folded into the batch follow their sample."""
        part = torch.arange(batch, device=device) // (batch // len(self.layout))
        return {
            name: torch.stack([part == i for i, n in enumerate(self.layout) if n == name]).any(dim=0)
            for name in set(self.layout)
        }


def segments(order: tuple[str, ...], rows: int, image: int | None) -> dict[str, slice]:
    """Roles of the rows of one call; empty where they are not known.

    Args:
        order: from `streams.order_of`. rows: of the call. image: image rows among them, where they are known.
    """
    if len(order) == 1:
        return {order[0]: slice(0, rows)}
    if not order or image is None or not 0 < image <= rows:
        return {}
    first = image if order[0] == "image" else rows - image
    return {order[0]: slice(0, first), order[1]: slice(first, rows)}


def _track(size: int, device: torch.device, compiling: bool) -> Callable[[], Track]:
    """Rows or keys of a denoiser have no padding that it tells of; made on the first call, for few methods ask."""
    make = functools.partial(Track.plain, size, device)
    # torch.compile cannot trace the making of a cache.
    return make if compiling else functools.cache(make)


def _image_tokens(sample: Any, patch: Any) -> int | None:
    """Image rows per sample: of packed latents [B, N, C], or of [B, C, H, W] cut into patches."""
    if not isinstance(sample, Tensor) or sample.ndim not in (3, 4):
        return None
    if sample.ndim == 3:
        # Numbers of tokens lie on their grid.
        return int(sample.shape[1]) if sample.is_floating_point() else int(sample.shape[1] * sample.shape[2])
    return (sample.shape[2] // patch) * (sample.shape[3] // patch) if isinstance(patch, int) else None


def _grid_size(sample: Any, values: dict[str, Any]) -> tuple[int, int] | None:
    """(height, width) of the latent, in units whose ratio is that of the token grid."""
    ids = values.get("img_ids")
    if isinstance(ids, Tensor) and ids.shape[-1] in (3, 4):
        ids = ids.reshape(-1, ids.shape[-1]) if ids.ndim == 2 else ids[0]
        return int(ids[:, 1].max()) + 1, int(ids[:, 2].max()) + 1
    shapes = values.get("img_shapes")
    if shapes and len(shapes[0]) == 1 and shapes[0][0][0] == 1:
        return int(shapes[0][0][1]), int(shapes[0][0][2])
    if not isinstance(sample, Tensor) or sample.ndim != (4 if sample.is_floating_point() else 3):
        return None
    return int(sample.shape[-2]), int(sample.shape[-1])


def _grid_of(tokens: int, size: tuple[int, int]) -> tuple[int, int] | None:
    """The token grid at a site: the latent's size over the down-sampling factor that gives `tokens`."""
    for factor in range(1, max(size) + 1):
        h, w = -(-size[0] // factor), -(-size[1] // factor)
        if h * w == tokens:
            return h, w
        if h * w < tokens:
            return None
    return None
