"""generic: any `nn.Module` whose own forward names `F.scaled_dot_product_attention` (timm, own models)."""

from __future__ import annotations

import functools
import re
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ... import kernels
from ...account import plain
from ...bound import Bound
from ...call import AttnCall
from ...engine import SiteRuntime
from ...errors import UnsupportedHost
from ...kernels import Attention
from ...site import Site
from ...undo import MISSING, below_layers
from ..base import Host
from .rebind import SDPA, names_called, rebind
from .softmax import writes_attention

if TYPE_CHECKING:
    from ...steering import Steering
    from ...undo import Journal

HEADS = ("num_heads", "n_heads", "heads", "n_head", "nhead")


class GenericHost(Host):
    """Modules with `num_heads`-like attributes whose forward calls SDPA on [B, H, N, d] tensors."""

    def __init__(self, target: Any):
        super().__init__(target)
        self.model = getattr(target, "_orig_mod", target)
        self._sites: list[Site] | None = None

    @classmethod
    def takes(cls, target: Any) -> bool:
        module = getattr(target, "_orig_mod", target)
        return isinstance(module, nn.Module) and any(reaches(m) for m in module.modules())

    def sites(self) -> list[Site]:
        if self._sites is None:
            self._sites = self._find()
            self.main = ("text",)
        return self._sites

    def _find(self) -> list[Site]:
        found: list[Site] = []
        blocks: dict[str, int] = {}
        reaching = {n or type(m).__name__: m for n, m in self.model.named_modules() if reaches(m)}
        refused = self._refused(reaching)
        # Those that can be steered are numbered first, as if there were no others.
        for name, module in sorted(self._attending(reaching, refused), key=lambda pair: pair[0] in refused):
            heads = _heads(module) or 0
            kv = getattr(module, "num_kv_heads", None)
            block = re.match(r"(.*\.\d+|\d+)(\.|$)", name)
            found.append(
                Site(
                    name=name,
                    layer=blocks.setdefault(block[1] if block else name, len(blocks)),
                    kind="cross" if "cross" in name else "self",
                    heads=heads,
                    kv_heads=kv if isinstance(kv, int) else heads,
                    modality="text",
                    stack="encoder",
                    refused=refused.get(name, ""),
                    module=module,
                )
            )
        if all(site.refused for site in found):
            raise UnsupportedHost(
                f"{', '.join(reaching)}: these call SDPA but have no {', '.join(HEADS)} attribute; set one, so that heads can be "
                "named."
            )
        return found

    def _refused(self, reaching: dict[str, nn.Module]) -> dict[str, str]:
        """Name -> why it cannot be steered, of the modules that attend and cannot."""
        found = {
            name: f"{type(m).__name__} does not say how many heads it has; set num_heads on it"
            for name, m in reaching.items()
            if _heads(m) is None
        }
        for name, module in self.model.named_modules():
            if name and name not in reaching and writes_attention(module):
                found[name] = (
                    f"{type(module).__name__} takes its softmax itself, which is followed in models of transformers and diffusers "
                    "only; call F.scaled_dot_product_attention in its forward"
                )
        return found

    def _attending(self, reaching: dict[str, nn.Module], refused: dict[str, str]) -> list[tuple[str, nn.Module]]:
        """The modules that attend, in the model's order."""
        named = {name or type(m).__name__: m for name, m in self.model.named_modules()}
        return [(name, m) for name, m in named.items() if name in reaching or name in refused]

    def check(self, site: Site, bound: Bound) -> None:
        check_copyable(site)

    def attach(self, run: Steering, journal: Journal) -> None:
        for runtime in run.runtimes.values():
            module = runtime.site.module
            primitive = sdpa_primitive(runtime, functools.partial(plain_call, runtime.site), always)
            patch_forward(module, counting(runtime.site, primitive, functools.partial(always, runtime)), journal)


def check_copyable(site: Site) -> None:
    """Raise where a copy of the forward's code would not be the forward."""
    forward = type(site.module).forward
    place = "_old_forward" if "_old_forward" in vars(site.module) else "forward"
    own = below_layers(site.module, place)
    if hasattr(forward, "__wrapped__") or (own is not MISSING and getattr(own, "__func__", None) is not forward):
        raise UnsupportedHost(
            f"{site.path}: the forward of {type(site.module).__name__} is decorated or was exchanged on the module, which a "
            "copy of its code would lose. Steer before that, or take it off."
        )


def _heads(module: nn.Module) -> int | None:
    return next((getattr(module, n) for n in HEADS if isinstance(getattr(module, n, None), int)), None)


def counting(site: Site, primitive: Callable[..., Tensor], acting: Callable[[], Any]) -> Callable[..., Any]:
    """The forward of a site with SDPA exchanged; raises where that was called no time, or more than once, while acting."""
    # Threads that share the module count apart.
    calls = threading.local()

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        calls.count = getattr(calls, "count", 0) + 1
        return primitive(*args, **kwargs)

    copied = rebind(type(site.module).forward, {SDPA: counted})

    @functools.wraps(copied)
    def forward(*args: Any, **kwargs: Any) -> Any:
        calls.count = 0
        out = copied(*args, **kwargs)
        if calls.count != 1 and acting():
            why = (
                "it took another path (call it without output_attentions), or reaches SDPA through an object or a helper function, "
                "whose code is not exchanged (in compiled code also by an import inside the forward)"
                if calls.count == 0
                else "which of them is its attention cannot be told"
            )
            raise UnsupportedHost(
                f"{site.path}: one forward of {type(site.module).__name__} called SDPA {calls.count} times by a name that can be "
                f"exchanged; exactly one is needed. Here {why}. Leave this site out of Where otherwise."
            )
        return out

    return forward


def patch_forward(module: nn.Module, function: Callable[..., Any], journal: Journal) -> None:
    """Exchange a module's forward for `function(module, ...)`, below any accelerate hook, until undone."""
    # `check_copyable` has seen that what is replaced is the class's own forward.
    journal.wrap(module, "forward", lambda inner, *args, **kwargs: function(module, *args, **kwargs))


def always(runtime: SiteRuntime) -> tuple[int, ...]:
    """Which interventions act at a site without a clock."""
    return runtime.active(None, None, None)


def problem(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float | None) -> Attention:
    """The `Attention` of one SDPA call."""
    q, k, v = Attention.cast(q, k, v)
    return Attention(q, k, v, float(q.shape[-1] ** -0.5 if scale is None else scale), mask=mask, causal=causal)


def sdpa_primitive(
    runtime: SiteRuntime,
    make_call: Callable[[int, int, int, torch.device], AttnCall],
    acting: Callable[[SiteRuntime], tuple[int, ...]],
) -> Callable[..., Tensor]:
    """A stand-in for `F.scaled_dot_product_attention` at one site.

    Args:
        make_call: from batch, rows, keys and device. acting: which interventions act now.
    """
    base = torch.nn.functional.scaled_dot_product_attention

    def primitive(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        active = acting(runtime)
        options = {"attn_mask": attn_mask, "dropout_p": dropout_p, "is_causal": is_causal, "scale": scale}
        run_base = lambda: base(query, key, value, enable_gqa=enable_gqa, **options)  # noqa: E731
        if not active:
            return run_base()
        if dropout_p:
            raise UnsupportedHost(f"{runtime.site.path} runs with dropout {dropout_p}; call eval() on the model first.")
        if query.ndim != 4:
            raise UnsupportedHost(f"{runtime.site.path} attends on {query.ndim}-D tensors; [B, H, N, d] is needed.")
        call = make_call(query.shape[0], query.shape[2], key.shape[2], query.device)
        att = problem(query, key, value, attn_mask, is_causal, scale)
        # Without `enable_gqa` the broadcast of one kv head runs another kernel than ours.
        same = functools.partial(same_kernel, att) if enable_gqa or query.shape[1] == key.shape[1] else None
        return runtime(att, run_base, call, active, same, sdpa=same is not None)

    return primitive


def plain_call(site: Site, batch: int, rows: int, keys: int, device: torch.device) -> AttnCall:
    """A call of a module about which nothing else is known."""
    return AttnCall(site, plain(rows, device), plain(keys, device), host="sdpa")


def same_kernel(att: Attention, few: int = 0) -> bool:
    """Whether torch's SDPA would run the very kernel that `kernels.attend_lse` runs here; never in compiled code."""
    if att.shape[2] <= few or att.requires_grad or torch.compiler.is_compiling():
        return False
    wanted = {"cpu-flash": 1, "cuda-flash": 1, "cuda-efficient": 2}.get(kernels.lse_source(att))
    if wanted is None:
        return False
    choice = torch._fused_sdp_choice(
        att.q, att.k, att.v, att.mask4(), 0.0, att.causal, scale=att.scale, enable_gqa=att.groups > 1
    )
    return choice == wanted


def reaches(module: nn.Module) -> bool:
    """Whether the module's own forward names SDPA."""
    return SDPA in names_called(type(module).forward)
