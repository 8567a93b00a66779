"""Every law on every method and host. A combination that does not apply must have its reason in SKIPS.md.

Each law meets each method on several hosts, and each host with one or two methods; the other pairs run what finds most faults here,
and all laws with `-m long`.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from attnsteer import Where, sites, steer
from attnsteer.errors import SelectionError, UnsupportedHost
from attnsteer.intervention import needs_of
from attnsteer.testing import HOSTS, LAWS, HostCase, MethodCase, NotApplicable, Setting, check_law
from attnsteer.testing.fingerprint import fingerprint

from .cases import FEW_HOSTS, GUIDANCE, LATENT, METHODS, ON_IMAGE_PROMPT, ON_UNET, VISION
from .image_prompt import IMAGE_PROMPT

SKIPS = (Path(__file__).parents[1] / "SKIPS.md").read_text(encoding="utf-8")
LANGUAGE, DENOISERS, PIPELINES = (
    [h for h in HOSTS.values() if h.family == family] for family in ("transformers", "denoiser", "pipeline")
)
# Tracing a model takes seconds; what it meets is the host, so one method of each door and a few hosts tell all.
COMPILED = {("HeadGate", h) for h in ("llama", "bert", "t5", "llava", "sd", "flux")} | {
    ("ACT", "llama"),
    ("PASTA", "gpt_oss"),
}
CONTINUOUS = {("ACT", "llama"), ("ZeroTuning", "mistral"), ("PASTA", "gpt_oss"), ("HeadGate", "gpt2")}
PAIRS = [
    *(
        (m, h)
        for h in LANGUAGE
        for m in [*METHODS, *(VISION if h.images else [])]
        if h.name in FEW_HOSTS.get(m.name, (h.name,))
    ),
    *((METHODS[0], h) for h in DENOISERS),
    *((m, h) for h in PIPELINES for m in [*GUIDANCE, METHODS[0]] if h.name in FEW_HOSTS.get(m.name, (h.name,))),
    *((LATENT[0], HOSTS[f"{name}-pipeline"]) for name in ("sd", "sdxl", "sd3", "flux")),
    (LATENT[1], HOSTS["sd3-pipeline"]),
    *((m, HOSTS["sd-pipeline"]) for m in ON_UNET),
    *((m, IMAGE_PROMPT) for m in ON_IMAGE_PROMPT),
]
# Pairs of methods and language models that run all laws in every run, besides the parts of a Latin square.
WHOLE = {("HeadGate", "llama"), ("HeadGate", "bert"), ("ACT", "llama"), ("PASTA", "gpt_oss"), ("HeadGate", "llava")} | {
    ("HeadGate", "gpt2"),
    ("ZeroTuning", "mistral"),
    ("SpotLight", "t5"),
    ("HeadGate", "sd-pipeline"),
    ("PAG", "sd3-pipeline"),
}
CORE = ("effect", "identity", "reference", "padding", "cache", "ways", "packed", "undo")


def in_short(law: str, method: MethodCase, host: HostCase) -> bool:
    """Whether the combination is in every run."""
    if law == "compile":
        # Half a minute each; tests/hosts has compiled models of every kind.
        return False
    if law == "continuous":
        # A thread of its own for each batch; tests/hosts/transformers/test_continuous.py has every kind of method.
        return (method.name, host.name) in CONTINUOUS or not (method in METHODS and host in LANGUAGE)
    if host in DENOISERS or (method.name, host.name) in WHOLE:
        return True
    if method in METHODS and host in LANGUAGE:
        return (METHODS.index(method) + LANGUAGE.index(host)) % (3 if law in CORE else 6) == 0
    if law in CORE and (method in VISION or method in ON_UNET or method in ON_IMAGE_PROMPT):
        # These have one host.
        return True
    return ([m for m, _ in PAIRS].index(method) + [h for _, h in PAIRS].index(host) + list(LAWS).index(law)) % 2 == 0


# All laws of a pair in a row: they share what the first of them computes.
COMBINATIONS = [
    pytest.param(law, m, h, id=f"{law}-{m.name}-{h.name}", marks=[] if in_short(law, m, h) else pytest.mark.long)
    for m, h in PAIRS
    for law in LAWS
    if law != "compile" or (m.name, h.name) in COMPILED
]


@pytest.mark.parametrize(("law", "method", "host"), COMBINATIONS)
def test_law(law: str, method: MethodCase, host: HostCase) -> None:
    try:
        check_law(law, method, host)
    except NotApplicable as reason:
        known = str(reason).removesuffix(f", which {host.name} does not have")
        assert known in SKIPS, f"tests/SKIPS.md has no row with the reason: {reason}"
        pytest.skip(str(reason))


@pytest.mark.parametrize("host", DENOISERS, ids=lambda h: h.name)
@pytest.mark.parametrize("method", [m for m in METHODS if "tokens" in needs_of(m.method)], ids=lambda m: m.name)
def test_methods_on_tokens_refuse_denoisers(method: MethodCase, host: HostCase) -> None:
    """One clear error before any computation, and nothing left behind."""
    model = host.build()
    before = fingerprint(model)
    made = method.acting(Setting(host.name, tuple(s for s in sites(model) if s.kind != "cross"), 2))
    with pytest.raises((SelectionError, UnsupportedHost), match=r"needs tokens|linear attention|causal|is defined on"):
        steer(model, made.new(where=Where()))
    assert fingerprint(model) == before
