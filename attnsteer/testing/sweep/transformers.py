"""The part of the sweep for transformers: every model type, by the class that does most with it."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ... import HeadGate, Where, ZeroTuning, sites, steer
from ...errors import AttnSteerError
from ...site import Site
from ..weights import randomize_
from .hints import CLASSES, CONFIGS, ELSEWHERE, MIXTURES
from .inputs import candidates
from .rows import Row
from .small_configs import small
from .watch import Watch, watching

# A type is built by the first of these that lists it.
AUTO = (
    "SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM", "MASKED_LM", "CAUSAL_LM", "BASE",
)  # fmt: skip
LARGEST = 30_000_000
# Relative to the largest output: two ways to compute the same in float32.
LIMIT = 2e-5


def versions() -> dict[str, str]:
    """Library -> version that is installed."""
    import transformers

    return {"transformers": transformers.__version__}


def names() -> list[str]:
    """All model types that some model class is for."""
    preload()
    return sorted(_classes())


def preload() -> None:
    """Import what all types share, so that a process forked later need not."""
    import transformers.generation.utils
    import transformers.modeling_utils
    import transformers.models.bart.modeling_bart
    import transformers.models.llama.modeling_llama
    import transformers.models.qwen2_vl.modeling_qwen2_vl

    transformers.logging.set_verbosity_error()


def _classes() -> dict[str, str]:
    from transformers.models.auto import modeling_auto

    found: dict[str, str] = {}
    for auto in AUTO:
        mapping = "MODEL_MAPPING_NAMES" if auto == "BASE" else f"MODEL_FOR_{auto}_MAPPING_NAMES"
        for name, cls in getattr(modeling_auto, mapping).items():
            found.setdefault(name, cls if isinstance(cls, str) else cls[0])
    return {**found, **CLASSES}


def build(name: str, seed: int = 0) -> nn.Module:
    """The type's model, small, with random weights, in `eval()`."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    cls = getattr(transformers, _classes()[name])
    config = small(CONFIG_MAPPING[name], CONFIGS.get(name))
    with torch.device("meta"):
        size = sum(p.numel() for p in cls(config).parameters())
    if size > LARGEST:
        raise OverflowError(f"the shrinking rule leaves {size} parameters, more than the {LARGEST} that are built")
    torch.manual_seed(seed)
    model = cls(config)
    randomize_(model, seed)
    return model.eval()


def measure(name: str) -> Row:
    """Build `name` small, and measure it."""
    row = Row(name, _classes()[name])
    if name in ELSEWHERE:
        row.reason = ELSEWHERE[name]
        return row
    try:
        model = build(name)
        call, watch = _running(model, name)
    except Exception as error:  # of the library's: nothing of ours is attached
        row.reason = _missing(error)
        return row
    try:
        _measure(row, model, call, watch)
    except AttnSteerError as error:
        row.verdict, row.reason = "refused", str(error)
    except Exception as error:  # a fault of ours, whatever it is
        row.verdict, row.reason = "wrong", _brief(error)
    return row


def _missing(error: Exception) -> str:
    """What a type lacks so that it could be built and run; the library's own error where that does not say."""
    package = re.search(r"requires the (\w+) library", str(error))
    if isinstance(error, ImportError) and package:
        return f"it needs {package[1]}, which is not installed"
    wanted = re.search(r"missing \d+ required positional arguments?: (.*)", str(error))
    if isinstance(error, TypeError) and wanted:
        return f"its forward needs {wanted[1]}, of which no small one is recorded"
    if isinstance(error, OverflowError):
        return str(error)
    if isinstance(error, NotImplementedError) and "forward" in str(error):
        return "it has no forward of its own"
    return f"by the shrinking rule it does not run: {_brief(error)}"


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error) or 'without a message'}"[:240]


Call = Callable[[], list[Tensor]]


def _running(model: nn.Module, name: str) -> tuple[Call, Watch]:
    """The call of the model by the first inputs that it takes, and what ran in it."""
    first: Exception | None = None
    for inputs in candidates(model, name):

        def call(inputs: dict[str, Any] = inputs) -> list[Tensor]:
            torch.manual_seed(0)
            with torch.no_grad():
                return tensors(model(**inputs))

        try:
            with watching(model) as watch:
                out = call()
        except Exception as error:
            # What was tried first says most about what is missing.
            first = first or error
            continue
        if out and all(same(a, b) for a, b in zip(out, call(), strict=True)):
            call.inputs = inputs
            return call, watch
        first = first or ValueError("two equal calls give different outputs, or none")
    raise first or ValueError("no inputs are known for it")


def tensors(output: Any) -> list[Tensor]:
    """The float tensors of a model's output."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, dict):
        output = list(output.values())
    if isinstance(output, (list, tuple)):
        return [t for o in output for t in tensors(o)]
    return []


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same bits, but that all NaN are one."""
    return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())


def distance(a: list[Tensor], b: list[Tensor]) -> float:
    """The largest difference, relative to the size of its tensor."""
    worst = 0.0
    for x, y in zip(a, b, strict=True):
        if x.shape != y.shape:
            return float("inf")
        if x.numel():
            gap = torch.where(x == y, 0.0, (x - y).abs()).nan_to_num(0.0 if same(x.isnan(), y.isnan()) else torch.inf)
            size = y[y.isfinite()].abs().max() if y.isfinite().any() else y.new_tensor(1.0)
            worst = max(worst, float(gap.max() / size.clamp_min(1e-6)))
    return worst


def gate(site: Site, gates: dict[int, float]) -> HeadGate:
    """Gates of some heads of one site, whatever other sites have its layer number."""
    where = Where(modules=re.escape(site.path), kinds=site.kind, modalities=site.modality)
    return HeadGate({(site.layer, h): g for h, g in gates.items()}, where=where)


def _site_of(owner: str, found: dict[str, Site]) -> str | None:
    """The site that an attention belongs to: its own module, or one above."""
    while owner not in found:
        if not owner:
            return None
        owner = owner.rpartition(".")[0]
    return owner


def pattern(path: str) -> str:
    """A path without its numbers: sites of the same kind share it."""
    return re.sub(r"\d+", "#", path)


def _measure(row: Row, model: nn.Module, call: Call, watch: Watch) -> None:
    mixes = MIXTURES.get(row.name, ("(?!)", ""))[0]
    owners = sorted({s.owner for s in watch.seen if not re.fullmatch(mixes, s.owner)})
    named = {s.how for s in watch.seen if s.how.startswith("nn.")}
    try:
        every = {s.path: s for s in sites(model)}
    except AttnSteerError as error:
        if not owners:
            row.verdict = "no softmax attention"
            return
        row.verdict, row.reason = "refused", f"{error} (softmax attention ran in {_some(owners)})"
        return
    if not owners:
        row.verdict = "no softmax attention"
        if every:
            row.reason = f"{len(every)} sites are listed, of which none ran"
        return
    found = {path: s for path, s in every.items() if not getattr(s, "refused", "")}
    ran = sorted({_site_of(o, found) for o in owners} - {None})
    missing = [o for o in owners if _site_of(o, found) is None]
    row.sites, row.heads = len(found), sorted({s.heads for s in found.values()})
    if not ran:
        why = next((s.refused for s in every.values() if getattr(s, "refused", "")), "")
        by = f" (by {', '.join(named)})" if named else ""
        row.verdict, row.reason = "refused", why or f"softmax attention ran in {_some(owners)}{by}, which are no sites"
        return
    plain = call()
    kept = vars_of(model)
    refused = _identity(row, model, call, plain, [found[p] for p in ran])
    ran = [p for p in ran if p not in refused]
    if not ran:
        row.verdict, row.reason = "refused", next(iter(refused.values()))
        return
    _gates(row, model, call, plain, list({pattern(p): found[p] for p in ran}.values()))
    after = call()
    row.measured["undone"] = all(map(same, plain, after)) and kept == vars_of(model)
    _reweighting(row, model, call, [found[p] for p in ran])
    _cache(row, model, call, [found[p] for p in ran])
    _packed(row, model, call, [found[p] for p in ran])
    faults = [k for k in ("identity", "training", "undone") if row.measured.get(k) is False]
    faults += [
        f"{k} {row.measured[k]:.2g}" for k in ("gate", "reweighting", "cache", "packed") if _number(row, k) > LIMIT
    ]
    if not row.measured.get("effect"):
        faults.append("a closed head has no effect")
    if faults:
        row.verdict, row.reason = "wrong", "; ".join(faults)
    elif missing or refused or isinstance(row.measured.get("reweighting"), str):
        said = [f"attention in {_some(missing)} is no site"] if missing else []
        said += [f"{_some(list(refused))}: {next(iter(refused.values()))}"] if refused else []
        if isinstance(row.measured.get("reweighting"), str):
            said.append(f"edits of weights are {row.measured['reweighting']}")
        row.verdict, row.reason = "exact but", "; ".join(said)
    else:
        row.verdict = "exact"


def _number(row: Row, key: str) -> float:
    value = row.measured.get(key)
    return value if isinstance(value, float) else 0.0


def _some(paths: list[str]) -> str:
    kinds = sorted({pattern(p) for p in paths})
    return ", ".join(kinds[:3]) + (f" and {len(kinds) - 3} more" if len(kinds) > 3 else "")


def vars_of(model: nn.Module) -> list[tuple[str, list[str]]]:
    """The names of everything that stands on the modules."""
    return [(name, sorted(vars(module))) for name, module in model.named_modules()]


def _identity(row: Row, model: nn.Module, call: Call, plain: list[Tensor], ran: list[Site]) -> dict[str, str]:
    """Open gates everywhere; returns the sites that are refused, with the reason."""

    def steered(chosen: list[Site]) -> list[Tensor]:
        with steer(model, *(gate(s, dict.fromkeys(range(s.heads), 1.0)) for s in chosen), control=True):
            return call()

    refused: dict[str, str] = {}
    try:
        out = steered(ran)
    except AttnSteerError:
        # Which of them it is: one site of each kind says it for all of its kind.
        for kind, site in {pattern(s.path): s for s in ran}.items():
            try:
                steered([site])
            except AttnSteerError as error:
                refused |= {s.path: str(error) for s in ran if pattern(s.path) == kind}
        ran = [s for s in ran if s.path not in refused]
        if not ran:
            return refused
        out = steered(ran)
    row.measured["identity"] = all(map(same, plain, out))
    # Running statistics move in training.
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    model.train()
    try:
        before = call()
        if all(map(same, before, call())):
            row.measured["training"] = all(map(same, before, steered(ran)))
    except AttnSteerError as error:
        row.measured["training"] = f"refused: {error}"[:200]
    except Exception as error:  # the library's own, as the unsteered call shows
        row.measured["training"] = _brief(error)[:100]
    finally:
        model.eval()
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(buffers[name])
    return refused


def _gates(row: Row, model: nn.Module, call: Call, plain: list[Tensor], chosen: list[Site]) -> None:
    """One head closed at each site, against the same by the watch."""
    head = {s.path: s.heads // 2 for s in chosen}
    with watching(model, {s.path: (s.heads, head[s.path]) for s in chosen}):
        expected = call()
    with steer(model, *(gate(s, {head[s.path]: 0.0}) for s in chosen)):
        out = call()
    row.measured["gate"] = distance(out, expected)
    row.measured["effect"] = distance(out, plain) > 10 * max(row.measured["gate"], 1e-7)
    if row.measured["gate"] > LIMIT or not row.measured["effect"]:
        # Which of them it is.
        for site in chosen:
            with watching(model, {site.path: (site.heads, head[site.path])}):
                expected = call()
            with steer(model, gate(site, {head[site.path]: 0.0})):
                out = call()
            if distance(out, expected) > LIMIT or distance(out, plain) == 0.0:
                row.measured[f"gate of {pattern(site.path)}"] = [distance(out, expected), distance(out, plain)]


def _reweighting(row: Row, model: nn.Module, call: Call, ran: list[Site]) -> None:
    """A reweighting, against the one computed from explicit maps."""
    own = [s for s in ran if s.kind == "self" and s.modality == "text" and not s.linear]
    if not own:
        return
    where = Where(modules=[re.escape(s.path) for s in own])
    try:
        with steer(model, ZeroTuning(gamma=3.0, where=where), control=True):
            fast = call()
        with steer(model, ZeroTuning(gamma=3.0, where=where), control=True, reference=True):
            slow = call()
    except AttnSteerError as error:
        row.measured["reweighting"] = f"refused: {error}"
        return
    row.measured["reweighting"] = distance(fast, slow)


def _cache(row: Row, model: nn.Module, call: Call, ran: list[Site]) -> None:
    """Greedy decoding of three tokens with a cache and without, steered."""
    inputs = getattr(call, "inputs", {})
    if not getattr(model, "can_generate", lambda: False)() or "input_ids" not in inputs:
        return
    chosen = list({pattern(s.path): s for s in ran}.values())
    given = {k: v for k, v in inputs.items() if not k.startswith("decoder_") and k != "labels"}

    def generate(cached: bool) -> list[Tensor]:
        torch.manual_seed(0)
        out = model.generate(
            **given, max_new_tokens=3, min_new_tokens=3, do_sample=False, use_cache=cached, output_logits=True,
            return_dict_in_generate=True,
        )  # fmt: skip
        return list(out.logits)

    try:
        clean = distance(generate(True), generate(False))
    except Exception as error:  # it cannot generate so, unsteered
        row.measured["cache"] = f"unsteered: {_brief(error)}"[:120]
        return
    if clean > LIMIT / 2:
        row.measured["cache"] = f"unsteered differs by {clean:.1g}"
        return
    try:
        with steer(model, *(gate(s, {0: 0.0}) for s in chosen), control=True):
            row.measured["cache"] = distance(generate(True), generate(False))
    except AttnSteerError as error:
        row.measured["cache"] = f"refused: {error}"[:200]


def _packed(row: Row, model: nn.Module, call: Call, ran: list[Site]) -> None:
    """Two sequences in one row, told by positions that start again, against each alone, steered by a gate and a reweighting."""
    inputs = getattr(call, "inputs", {})
    takes = inspect.signature(model.forward).parameters
    own = [s for s in ran if s.kind == "self" and s.modality == "text" and s.causal and not s.linear]
    if not own or "input_ids" not in inputs or "position_ids" not in takes or "decoder_input_ids" in takes:
        return
    ids = inputs["input_ids"]
    if not isinstance(ids, Tensor) or ids.ndim != 2 or len(ids) < 2 or ids.shape[1] < 5:
        return
    rows = [ids[:1], ids[1:2, :-2]]
    further = {"use_cache": False} if "use_cache" in takes else {}

    def first(given: Tensor, positions: Tensor) -> Tensor:
        torch.manual_seed(0)
        with torch.no_grad():
            return tensors(model(input_ids=given, position_ids=positions[None], **further))[0]

    def gap() -> float:
        at = [torch.arange(r.shape[1]) for r in rows]
        alone = torch.cat([first(r, p) for r, p in zip(rows, at, strict=True)], dim=1)
        return distance([first(torch.cat(rows, dim=1), torch.cat(at))], [alone])

    try:
        clean = gap()
    except Exception as error:  # it takes no packed rows, unsteered
        row.measured["packed"] = f"unsteered: {_brief(error)}"[:120]
        return
    if clean > LIMIT / 2:
        row.measured["packed"] = f"unsteered differs by {clean:.1g}"
        return
    where = Where(modules=[re.escape(s.path) for s in own])
    try:
        with steer(model, gate(own[0], {0: 0.0}), ZeroTuning(gamma=3.0, where=where), control=True):
            row.measured["packed"] = gap()
    except AttnSteerError as error:
        row.measured["packed"] = f"refused: {error}"[:200]
