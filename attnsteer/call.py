"""`AttnCall`: what a method sees of one attention call. One typed object, made by the host, the same for all doors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .account import Samples, Track
from .attention_map import FEW_ROWS, AttentionMap
from .edits import BlockBias, HeadOutputs, KeyBias, MergedTokens, Reweight, Share
from .errors import ContractError, UnsupportedHost
from .kernels import Attention
from .parameters import PerSample
from .shards import Pool
from .site import Site

if TYPE_CHECKING:
    from .maps.phrases import Prompt
    from .maps.words_to_image import Capture
    from .tokens import Tokens


@dataclass(frozen=True, eq=False)
class Contrast:
    """Which rows of a call are to be compared with the negative prompt, and what they are compared with.

    Attributes:
        rows: the batch rows with the prompt. twins: those with the negative prompt in its place, one for each, or None.
        apart: whether the image stream of twins is kept apart from their text, and is to be that of their row.
        negative: the outputs of `rows` for the negative prompt, [b, H, n, dv], where there are no twins.
    """

    rows: slice
    twins: slice | None = None
    apart: bool = False
    negative: Tensor | None = None


@dataclass(frozen=True, eq=False)
class ImagePrompt:
    """The attention to an image prompt, whose output a UNet adds to that of the text.

    Attributes:
        images: reference images. tokens: of each. scale: what the pipeline itself adds the output with.
        out: the outputs of all heads of the site, before any scale, [B, H, n, dv].
    """

    images: int
    tokens: int
    scale: float
    out: Tensor


@dataclass(frozen=True, eq=False)
class AttnCall:
    """One attention call, restricted to the heads that a method selects.

    Shapes: q [B, H, n, d], k and v [B, Hkv, m, d]; H counts the selected heads only. Masks and validity are never None: a
    plain call has them too, broadcast. Slots, positions and requests: see `attnsteer.account`.

    Attributes:
        site: the `Site`. heads: global indices of the selected heads.
        rows, keys: what each of the n rows and m keys is: slot, index in its request, request, validity, generated or prompt.
        map: the lazy attention map (edits of earlier methods included). shape: (B, H, n, m), its shape.
        phase: "prefill" where some row belongs to a prompt, else "decode". Where rows of both kinds meet in one call
            (assisted decoding, a step without a cache) `mixed` is true, and `rows.generated` tells them apart.
        step: denoising step or None. branch: None or the running branch ("weak").
        segments: role -> slice of the rows (and of the keys of a self or joint call): "image", "text".
        state: a dict of this method at this site for this sequence; survives from prefill to decode.
        frozen: True where statistics must not move (a continuation is being scored).
        branch_rows: branch name -> bool [B], where the host can tell the rows apart; None where it cannot.
        samples: which sample each batch row belongs to; None: each is one.
        host: name of the host. method: name of the method that this call is shown to.

    What only some hosts give is read through properties, which raise where it is missing: `tokens`, `residual`,
    `image_free`, `grid`, `capture`, `prompt`, `contrast`, `image_prompt`; `gives(name)` asks.
    """

    site: Site
    # Made when they are asked for: most methods on most hosts never do.
    make_rows: Callable[[], Track] = field(repr=False)
    make_keys: Callable[[], Track] = field(repr=False)
    host: str = "this host"
    phase: str = "prefill"
    mixed: bool = False
    step: int | None = None
    steps: int | None = None
    branch: str | None = None
    segments: dict[str, slice] = field(default_factory=dict)
    frozen: bool = False
    branch_rows: dict[str, Tensor] | None = None
    samples: Samples | None = None
    heads: tuple[int, ...] = ()
    state: dict[str, Any] = field(default_factory=dict)
    method: str = "the method"
    past: int = 0
    # Whether batch rows hold several requests, which do not see each other.
    packed: bool = False
    # State of all methods for this sequence, by (number of the intervention, site, heads).
    states: dict[Any, dict[str, Any]] = field(default_factory=dict, repr=False)
    facts: dict[str, Any] = field(default_factory=dict, repr=False)
    # The map, or what makes it, and its shape: in a decode step many methods do without.
    view: AttentionMap | Callable[[], AttentionMap] | None = field(default=None, repr=False)
    size: tuple[int, int, int, int] | None = None
    # What was made once for all calls of this forward; what tells apart the intervention that this call is shown to.
    memo: dict[Any, Any] = field(default_factory=dict, repr=False)
    owner: int = 0
    # Made when it is asked for; None: the method does not say that it pools over heads.
    pool: Callable[[], Pool] | None = field(default=None, repr=False)

    def replace(self, **changes: Any) -> AttnCall:
        """A copy with some fields changed."""
        # Some times a layer: `dataclasses.replace` would cost more than a decode step has.
        new = object.__new__(AttnCall)
        new.__dict__.update(self.__dict__)
        new.__dict__.update(changes)
        return new

    def once(self, name: Any, make: Callable[[], Any]) -> Any:
        """What `make()` gives, made once for all layers of this forward that have the same rows and keys.

        For key sets and edits that follow from tokens and hyper-parameters alone: `make` must read nothing of the site, its
        heads, its state or its map. `name` tells several things of one method apart.
        """
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            # A layer that is computed again for its gradient must find what it found before; compiled code finds twins itself.
            return make()
        key = (self.owner, name, id(self.rows), id(self.keys))
        found = self.memo.get(key)
        if found is None:
            found = self.memo[key] = (make(), self.rows, self.keys)
        return found[0]

    def once_masked(self, name: Any, make: Callable[[], Any]) -> Any:
        """As `once`, for what follows from the masks of the call and its heads too: made once for all layers that have the same."""
        att, _ = self.map.ungathered
        masks = id(att.mask), id(att.key_bias), att.causal, att.shape, self.heads if _by_head(att) else None
        # What the names are made of is kept, so that none comes again meanwhile.
        return self.once((name, masks), lambda: (make(), att.mask, att.key_bias))[0]

    def seen_by(self, counted: Tensor) -> Tensor:
        """sum of `counted` [B or 1, n] over the rows that may see each key, [B or 1, H or 1, m]; made once for all layers of this
        forward whose masks hide the same keys from rows `counted`."""
        att = self.map.att
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self.map.seen_by(counted)
        key = ("seen_by", id(counted), id(att.mask), id(att.key_bias), att.causal, att.shape[2:])
        found = self.memo.get(key)
        if found is None:
            found = self.memo[key] = (self.map.seen_by(counted), counted, att.mask, att.key_bias)
        return found[0]

    @property
    def rows(self) -> Track:
        """What each of the n rows is."""
        return self.make_rows()

    @property
    def keys(self) -> Track:
        """What each of the m keys is."""
        return self.make_keys()

    @property
    def map(self) -> AttentionMap:
        """The lazy attention map of the selected heads."""
        return self.view() if callable(self.view) else self.view

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, H, n, m) of the map."""
        return self.map.shape if self.size is None else self.size

    @property
    def q(self) -> Tensor:
        """[B, H, n, d], after positional encoding."""
        return self.map.att.q

    @property
    def k(self) -> Tensor:
        """[B, Hkv, m, d], after positional encoding and cache."""
        return self.map.att.k

    @property
    def v(self) -> Tensor:
        """[B, Hkv, m, d]."""
        return self.map.att.v

    @property
    def values(self) -> Tensor:
        """V per selected query head, [B, H, m, d]."""
        att = self.map.att
        return att.v if att.v.shape[1] == att.q.shape[1] else att.expanded_values()

    # Parameters with one value per sample.

    def each(self, value: Any, like: Tensor | None = None) -> Any:
        """A parameter as it enters the maths: a number as it is, one value per sample as a tensor [B, 1, 1].

        Args:
            like: a tensor whose device and dtype it gets; None: those of statistics. A sample that is left alone has the
                value of another one here; what is computed for it is not used.

        Raises:
            SelectionError: the batch is not of so many samples.
        """
        if not isinstance(value, PerSample):
            return value
        return self.each_row(value, like, axes=2)

    def each_row(self, value: PerSample, like: Tensor | None = None, **how: Any) -> Tensor:
        """One value per sample by batch row, [B, ...] (see `PerSample.tensor`)."""
        if like is None:
            batch, dtype, device = self.map.shape[0], self.map.stat_dtype, self.map.device
        else:
            batch, dtype, device = len(like), like.dtype, like.device
        return value.tensor(self._samples(batch), batch, dtype, device, **how)

    def listed(self, value: Any) -> list[Any]:
        """A parameter by batch row, [B] numbers; that of a sample that is left alone is None.

        Raises:
            SelectionError: the batch is not of so many samples.
        """
        batch = self.map.shape[0]
        return value.listed(self._samples(batch), batch) if isinstance(value, PerSample) else [value] * batch

    def _samples(self, batch: int) -> Samples:
        return Samples.plain(batch) if self.samples is None else self.samples

    def over_heads(self, values: Tensor, how: str = "sum") -> Tensor:
        """`values` [B, H, ...] reduced over all heads that the method has at this site, [B, 1, ...], with its gradient.

        Under tensor parallelism H counts the heads of this process, and the result is that over all processes. Each process
        that has such a head must ask as often as the others, so it must not depend on what the heads hold whether one asks.

        Args:
            how: "sum" or "mean".

        Raises:
            ContractError: the method does not declare `pools_heads`, without which other methods may divide its heads.
        """
        if self.pool is None:
            raise ContractError(
                f"{self.method} reduces over heads at {self.site.path}. Set pools_heads = True on its class, so that its heads "
                "stay together where other methods act too."
            )
        if how not in ("sum", "mean"):
            raise ContractError(f"{self.method} asks call.over_heads for {how!r}; it gives 'sum' and 'mean'.")
        pool = self.pool()
        total = pool.sum(values.sum(dim=1, keepdim=True))
        return total / pool.heads if how == "mean" else total

    # What is a fact of some hosts only.

    @property
    def own_keys(self) -> slice | None:
        """Which keys are the rows' own, in their order; None where rows have none, or it is not known which they are."""
        rows, keys = self.shape[2:]
        return slice(0, rows) if rows == keys else self.facts.get("own keys")

    def gives(self, name: str) -> bool:
        """Whether the host gives "tokens", "residual", "image_free", "grid", "capture", "prompt", "contrast" or "image_prompt"."""
        return self.facts.get(name) is not None

    def _fact(self, name: str) -> Any:
        value = self.facts.get(name)
        if value is None:
            raise UnsupportedHost(
                f"{self.method} reads call.{name} at {self.site.path}, which the host {self.host} does not give in this call. "
                f"Put {name!r} into the method's `needs`, so that targets without it are refused when it is attached; if it is "
                "there, the attention module was called outside its model's forward: call the model itself."
            )
        return value

    @property
    def tokens(self) -> Tokens:
        """Roles of the tokens so far (need "tokens")."""
        return self._fact("tokens")

    @property
    def residual(self) -> Tensor:
        """Hidden states [B, n, D] that enter the layer, before any norm (need "residual")."""
        return self._fact("residual")

    @property
    def image_free(self) -> Callable[..., None]:
        """Runs the prompt without its images up to this site, and its outputs through an edit (need "image_free")."""
        return self._fact("image_free")

    @property
    def grid(self) -> tuple[int, int]:
        """(height, width) of the image rows in tokens (need "grid")."""
        return self._fact("grid")

    @property
    def capture(self) -> Capture:
        """Where the maps of the running pass go (need "latent")."""
        return self._fact("capture")

    @property
    def prompt(self) -> Prompt:
        """Where the words of the prompts are among the text keys (need "prompt")."""
        return self._fact("prompt")

    @property
    def contrast(self) -> Contrast:
        """What the negative prompt gives (need "contrast")."""
        return self._fact("contrast")

    @property
    def image_prompt(self) -> ImagePrompt:
        """The attention to an image prompt that this call is (need "image_prompt")."""
        return self._fact("image_prompt")

    # Rows and keys by role.

    @property
    def row_valid(self) -> Tensor:
        """bool [B or 1, n], False for padding rows."""
        return self.rows.valid

    @property
    def key_valid(self) -> Tensor:
        """bool [B or 1, m], False for padding keys."""
        return self.keys.valid

    @property
    def row_position(self) -> Tensor:
        """int [n], the slot of each row."""
        return self.rows.slot

    @property
    def key_position(self) -> Tensor:
        """int [m], the slot of each key."""
        return self.keys.slot

    @property
    def generates(self) -> Tensor:
        """bool [B or 1, n]: the rows that belong to generated tokens."""
        return self.rows.generated & self.rows.valid

    @property
    def prompt_end(self) -> Tensor:
        """bool [B or 1, n]: the row of each prompt's last token, where this call has it (need "tokens").

        No row is it where a prompt goes on in later chunks, nor in a call that only decodes; of padded prompts in chunks, those
        have it that reach into the last one. A call without a cache has it again at every step, with generated rows behind it.
        """
        end = self.rows.last_prompt
        return torch.zeros_like(end) if self.tokens.more_to_come else end

    def key_index(self) -> Tensor:
        """Number of each key counted from its request's first valid token, [B or 1, m]; negative for left padding."""
        return self.keys.index

    def first_key(self) -> Tensor:
        """The first valid token of each request as a key set [B or 1, 1, m]; empty once it has left a window cache."""
        return self.keys.first[:, None]

    def prompt_keys(self) -> Tensor:
        """The valid tokens of the prompts as a key set [B or 1, 1, m]."""
        return self.keys.prompt[:, None]

    def padding_keys(self) -> Tensor:
        """Padding and unused slots as a key set [B or 1, 1, m]."""
        return ~self.keys.valid[:, None]

    def span_keys(self, spans: Sequence[Sequence[tuple[int, int]]]) -> Tensor:
        """Token ranges per sample, counted from its first valid token, as a key set [B, 1, m]."""
        keys = self.keys
        if all(ranges == spans[0] for ranges in spans):
            # The same for all rows, as for a single one.
            found = None
            for start, stop in spans[0]:
                inside = (keys.index >= start) & (keys.index < stop)
                found = inside if found is None else found | inside
            found = torch.zeros_like(keys.valid) if found is None else found & keys.valid if keys.padded else found
            return found.expand(len(spans), -1)[:, None] if len(spans) != len(found) else found[:, None]
        wide = keys.index.expand(len(spans), -1)
        flat = [(b, start, stop) for b, ranges in enumerate(spans) for start, stop in ranges]
        if not flat:
            return torch.zeros_like(wide, dtype=torch.bool)[:, None]
        row, start, stop = torch.tensor(flat, device=wide.device).unbind(dim=1)
        inside = wide[row]
        inside = (inside >= start[:, None]) & (inside < stop[:, None])
        if len(flat) == len(spans) and all(len(ranges) == 1 for ranges in spans):
            found = inside
        else:
            found = torch.zeros_like(wide, dtype=torch.bool).index_put((row,), inside, accumulate=True)
        return (found & keys.valid)[:, None]

    def at_keys(self, tokens: Tensor) -> Tensor:
        """A mask of tokens bool [B, T] (by slot, T up to the slots so far) as a key set [B, 1, m]."""
        slot, size = self.keys.slot, tokens.shape[1]
        inside = (slot < size) & self.keys.valid
        return (tokens[:, slot.clamp_max(max(size - 1, 0))] & inside)[:, None]

    def at_rows(self, tokens: Tensor) -> Tensor:
        """A mask of tokens bool [B, T] (by slot) at the rows of this call, bool [B, n]."""
        slot, size = self.rows.slot, tokens.shape[1]
        inside = (slot < size) & self.rows.valid
        return tokens[:, slot.clamp_max(max(size - 1, 0))] & inside

    def image_tokens(self) -> Tensor:
        """bool [B, T]: the tokens so far that stand for images (need "images").

        Raises:
            SelectionError: where the images are is not known.
        """
        return self.tokens.image_mask().to(self.keys.slot.device)

    def image_keys(self) -> Tensor:
        """The tokens of images as a key set [B, 1, m] (need "images")."""
        return self.at_keys(self.image_tokens())


def _by_head(att: Attention) -> bool:
    return any(t is not None and t.shape[1] > 1 for t in (att.mask4(), att.key_bias))


__all__ = [
    "FEW_ROWS",
    "AttentionMap",
    "AttnCall",
    "BlockBias",
    "Contrast",
    "HeadOutputs",
    "ImagePrompt",
    "KeyBias",
    "MergedTokens",
    "Reweight",
    "Share",
]
