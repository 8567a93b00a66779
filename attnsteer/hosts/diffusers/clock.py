"""The clock of a denoiser: steps, guidance rows, token grid."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ...account import plain
from ...branches import samples_of
from ...call import AttnCall
from ...engine import SiteRuntime
from ...errors import UnsupportedHost
from ...maps.words_to_image import Capture, Enough
from ...site import Site
from .latents import INPUTS, unet_scale
from .pipelines import layout
from .steps import TIMES, Sampling
from .streams import order_of, segments


class DenoiserClock:
    """What one denoiser is doing now; shared by all of its sites.

    Attributes:
        layout: names of the equal parts of the batch, e.g. ("uncond", "cond"); None when not known.
        batch: rows in all. image_tokens: rows of an image in its sequences, where the input tells.
        size: (height, width) of the latent, in units whose ratio is that of the token grid.
        capture: where the maps of the running pass go. cut: whether that pass ends as soon as all are there.
    """

    def __init__(self, run: Any, name: str, model: nn.Module, sampling: Sampling):
        self.run, self.name, self.model, self.sampling = run, name, model, sampling
        self.runtimes = {path: r for path, r in run.runtimes.items() if r.site.component == name}
        self._orders = {path: order_of(r.site) for path, r in self.runtimes.items()}
        # Compiled code is compiled anew for each value that it reads here, so it reads no more than is needed.
        self._acting: dict[str, tuple[int, ...]] = {}
        self._stepwise = any("steps" in b.method.needs for b in run.bounds)
        self._sampled = any(b.method.sample_values for b in run.bounds)
        self._branched = any(b.where.branches is not None for b in run.bounds)
        self.layout: tuple[str, ...] | None = None
        self.batch = 0
        self.image_tokens: int | None = None
        self.size: tuple[int, int] | None = None
        self.capture: Capture | None = None
        self.cut = False

    def begin(self, values: dict[str, Any]) -> None:
        """Read the arguments of one forward of the denoiser."""
        sample = next(values[n] for n in INPUTS if values.get(n) is not None)
        self.batch = len(sample)
        patch = getattr(getattr(self.model, "config", None), "patch_size", 1)
        self.image_tokens = _image_tokens(sample, patch)
        self.size = _grid_size(sample, values)
        sampling = self.sampling
        sampling.tick(next((values[n] for n in TIMES if values.get(n) is not None), None))
        self.layout = self.run.scope.layout
        if self.layout is None and sampling.pipeline is not None:
            self.layout = layout(sampling.pipeline, sampling.context, self.batch, sampling.latent_rows, sampling.turn)
        sampling.turn += 1

    def refresh(self) -> None:
        """Find out which interventions act in the pass that starts now."""
        step, steps = self.sampling.step, self.sampling.steps
        self._acting = {path: runtime.active(None, step, steps) for path, runtime in self.runtimes.items()}
        self.prepare()

    def prepare(self) -> None:
        """Fill the tables that a first call would fill: compiled code would be compiled anew after that."""
        for runtime in self.runtimes.values():
            runtime.partition(self.active(runtime))

    @contextlib.contextmanager
    def of(self, layout: tuple[str, ...] | None, batch: int) -> Iterator[None]:
        """One pass of the model on rows with this layout."""
        before = self.layout, self.batch, self._acting
        self.layout, self.batch = layout, batch
        self.refresh()
        try:
            yield
        finally:
            self.layout, self.batch, self._acting = before

    def check_samples(self) -> None:
        """Raise where values per sample are not those of this call's rows; before the model runs."""
        if not self._sampled:
            return
        pipe = self.sampling.pipeline
        if self.layout is None and pipe is not None:
            raise UnsupportedHost(
                f"values per sample need to know which of the {self.batch} rows of a call are conditional, which is not known for "
                f'{type(pipe).__name__}; enter run.branches("uncond", "cond") around the calls, or give one value for all.'
            )
        for bound in self.run.bounds:
            bound.method.check_samples(
                samples_of(len(self.layout or ("cond",)), self.batch, self.sampling.prompts.count)
            )

    def active(self, runtime: SiteRuntime) -> tuple[int, ...]:
        """Which interventions act at a site now."""
        found = self._acting.get(runtime.site.path)
        return runtime.active(None, None, None) if found is None else found

    def finished(self) -> None:
        """A site's attention is done: end the pass if it was run for its maps, and all are there."""
        if self.cut and self.capture is not None and self.capture.complete:
            raise Enough

    def grid_at(self, site: Site) -> tuple[int, int] | None:
        """(height, width) of the image rows of a site in this call, where it can be told before it runs."""
        if self.size is None:
            return None
        scale = unet_scale(self.model, site.name)
        if scale is not None:
            return -(-self.size[0] // scale), -(-self.size[1] // scale)
        return None if self.image_tokens is None else _grid_of(self.image_tokens, self.size)

    def call(self, site: Site, batch: int, rows: int, keys: int, device: torch.device, image: int | None) -> AttnCall:
        """One attention call with `rows` query rows of `batch` sequences over `keys` keys.

        Args:
            image: rows of the stream that the processor got apart from its text; None when it got one sequence.
        """
        roles = segments(self._orders[site.path], rows, self.image_tokens if image is None else image)
        facts: dict[str, Any] = {"capture": self.capture}
        found = roles.get("image")
        if found is not None and self.size is not None:
            facts["grid"] = _grid_of(found.stop - found.start, self.size)
        step, steps, branch_rows = None, None, None
        if self._stepwise or not torch.compiler.is_compiling():
            step, steps = self.sampling.step, self.sampling.steps
        if self._branched and self.layout is not None and batch % max(self.batch, 1) == 0:
            branch_rows = self._branch_rows(batch, site.module)
        samples = None
        if self._sampled:
            samples = samples_of(len(self.layout or ("cond",)), self.batch, self.sampling.prompts.count)
        return AttnCall(
            site,
            plain(rows, device),
            plain(keys, device),
            host="diffusers",
            step=step,
            steps=steps,
            segments=roles,
            branch_rows=branch_rows,
            samples=samples,
            facts=facts,
        )

    def _branch_rows(self, batch: int, module: nn.Module) -> dict[str, Tensor]:
        """Branch name -> bool [batch]; frames or positions folded into the batch follow their sample."""
        device = next(module.parameters()).device
        part = torch.arange(batch, device=device) // (batch // len(self.layout))
        return {
            name: torch.stack([part == i for i, n in enumerate(self.layout) if n == name]).any(dim=0)
            for name in set(self.layout)
        }


def _image_tokens(sample: Any, patch: Any) -> int | None:
    """Image rows per sample: of packed latents [B, N, C], or of [B, C, H, W] cut into patches."""
    if not isinstance(sample, Tensor) or sample.ndim not in (3, 4):
        return None
    if sample.ndim == 3:
        return int(sample.shape[1])
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
    if not isinstance(sample, Tensor) or sample.ndim != 4:
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
