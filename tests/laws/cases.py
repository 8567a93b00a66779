"""The table of the methods that drive the laws; the hosts are in `attnsteer.testing.HOSTS`."""

from __future__ import annotations

from attnsteer import (
    ACT,
    ADHH,
    CONFORM,
    HGAI,
    NAG,
    PAG,
    PAI,
    PAINT,
    PASTA,
    SEG,
    SLG,
    SPIN,
    VAR,
    VHR,
    AttendAndExcite,
    AttentionBuckets,
    AttentionRefocusing,
    AttentionRegulation,
    BlockMask,
    HeadGate,
    InjectMap,
    InstABoost,
    SoftPAG,
    SpotLight,
    StoryAdapter,
    VisualHighlight,
    VisualKnockout,
    Where,
    ZeroTuning,
)
from attnsteer.testing import MethodCase, Setting

SPAN = [(1, 3), (4, 5)]


def narrow(setting: Setting) -> Where:
    """Half of the heads of the middle layer."""
    return setting.where & Where(heads=setting.heads)


METHODS = [
    MethodCase(
        HeadGate,
        lambda s: HeadGate({p: -0.5 for p in s.heads}, where=s.where),
        lambda s: HeadGate({p: 1.0 for p in s.heads}, where=s.where),
    ),
    MethodCase(
        ACT,
        lambda s: ACT(s.heads, 0.4, 0.12, where=s.where),
        lambda s: ACT(s.heads, 1.0, 0.12, where=s.where),
    ),
    MethodCase(
        ZeroTuning,
        lambda s: ZeroTuning(s.heads, 6.0, where=s.where),
        lambda s: ZeroTuning(s.heads, 1.0, where=s.where),
    ),
    MethodCase(
        SpotLight,
        lambda s: SpotLight([SPAN] * s.batch, 0.6, where=narrow(s)),
        lambda s: SpotLight([SPAN] * s.batch, 0.0, where=narrow(s)),
    ),
    MethodCase(
        PASTA,
        lambda s: PASTA([SPAN] * s.batch, s.heads, 0.02, where=s.where),
        lambda s: PASTA([SPAN] * s.batch, s.heads, 1.0, where=s.where),
        prompt_bound=True,
    ),
    MethodCase(
        InstABoost,
        lambda s: InstABoost([SPAN] * s.batch, 5.0, where=narrow(s)),
        lambda s: InstABoost([SPAN] * s.batch, 1.0, where=narrow(s)),
    ),
    MethodCase(
        AttentionBuckets,
        lambda s: AttentionBuckets((10000.0, 200.0)),
        lambda s: AttentionBuckets((10000.0,)),
        whole_model=True,
    ),
    MethodCase(
        InjectMap,
        lambda s: InjectMap("previous", s.heads, strength=0.6, where=s.where),
        lambda s: InjectMap("previous", s.heads, strength=0.0, where=s.where),
    ),
    MethodCase(
        BlockMask,
        lambda s: BlockMask(2, top_k=2, where=narrow(s)),
        lambda s: BlockMask(2, threshold=1.0, where=narrow(s)),
    ),
]
# Another method in the same form: a few hosts tell all.
FEW_HOSTS = {
    "AttentionBuckets": ("llama",),
    "BlockMask": ("llama", "gpt_oss", "bert"),
    "InjectMap": ("llama", "gpt_oss"),
    "InstABoost": ("llama", "gpt_oss", "t5"),
    "SLG": ("sd-pipeline", "sd3-pipeline"),
}
# On hosts whose prompts have images.
VISION = [
    MethodCase(
        VAR,
        lambda s: VAR((3, 17), 1.6, 0.2, 0.2, 0.6, where=narrow(s)),
        lambda s: VAR((3, 17), 1.6, 0.2, 0.2, 0.0, where=narrow(s)),
        # Its sinks are tokens of the prompt.
        prompt_bound=True,
    ),
    MethodCase(
        VAR,
        lambda s: VAR((3, 17), 1.6, 0.2, 0.2, 0.6, sinks="placebo", seed=7, where=narrow(s)),
        lambda s: VAR((3, 17), 1.6, 0.2, 0.2, 0.0, sinks="placebo", seed=7, where=narrow(s)),
        prompt_bound=True,
    ),
    MethodCase(
        VHR,
        lambda s: VHR(1.7, where=narrow(s)),
        lambda s: VHR(1.0, where=narrow(s)),
    ),
    # What acts in the rows that speak: to a run without a cache, where all tokens are prompt, only the last one does.
    MethodCase(
        PAI,
        lambda s: PAI(0.8, where=narrow(s)),
        lambda s: PAI(0.0, where=narrow(s)),
        prompt_bound=True,
    ),
    MethodCase(
        HGAI,
        lambda s: HGAI(0.8, where=narrow(s)),
        lambda s: HGAI(0.0, where=narrow(s)),
        prompt_bound=True,
    ),
    MethodCase(
        PAINT,
        lambda s: PAINT([[0, 3, 5]] * s.batch, [[3, 7]] * s.batch, 0.9, 1.4, where=narrow(s)),
        lambda s: PAINT([[0, 3, 5]] * s.batch, [[3, 7]] * s.batch, 0.0, 0.0, where=narrow(s)),
        prompt_bound=True,
    ),
    MethodCase(
        ADHH,
        lambda s: ADHH(s.heads, 0.1, where=s.where),
        lambda s: ADHH(s.heads, 1.1, where=s.where),
        prompt_bound=True,
    ),
    MethodCase(
        SPIN,
        lambda s: SPIN(0.5, 0.1, where=narrow(s)),
        lambda s: SPIN(0.5, 1.0, where=narrow(s)),
        prompt_bound=True,
    ),
    MethodCase(
        VisualHighlight,
        lambda s: VisualHighlight(1.8, where=narrow(s)),
        lambda s: VisualHighlight(1.0, where=narrow(s)),
        # To a run without a cache generated tokens are prompt.
        prompt_bound=True,
    ),
    MethodCase(
        VisualKnockout,
        lambda s: VisualKnockout([("last", "image"), ("generated", "image")], where=narrow(s)),
        lambda s: VisualKnockout([], where=narrow(s)),
        prompt_bound=True,
    ),
]
GUIDANCE = [
    MethodCase(PAG, lambda s: PAG(2.0, where=s.where), lambda s: PAG(0.0, where=s.where)),
    MethodCase(
        SoftPAG,
        lambda s: SoftPAG(2.0, 0.5, heads=s.heads, where=s.where),
        lambda s: SoftPAG(0.0, 0.5, heads=s.heads, where=s.where),
    ),
    MethodCase(SEG, lambda s: SEG(2.0, where=s.where), lambda s: SEG(0.0, where=s.where)),
    MethodCase(
        SLG,
        lambda s: SLG(2.0, None, None, heads=s.heads, where=s.where),
        lambda s: SLG(0.0, None, None, where=s.where),
    ),
]
# Moves of the latent, with words as positions, because the prompts are embeddings; two steps.
LATENT = [
    MethodCase(
        AttendAndExcite,
        # A milder softmax than the published one, whose gradient vanishes on some of these random maps.
        lambda s: AttendAndExcite([(2, 3), (4, 5)], {}, compete="all", sharpness=20.0, where=narrow(s)),
        lambda s: AttendAndExcite([(2, 3), (4, 5)], step_size=0.0, where=narrow(s)),
    ),
    MethodCase(
        AttentionRefocusing,
        lambda s: AttentionRefocusing(BOXES, compete="all", schedule=[(0.0, 0.5, 4.0, 2)], where=s.where),
        lambda s: AttentionRefocusing(BOXES, step_size=0.0, where=s.where),
    ),
]
# On the pipeline with a text encoder and a UNet.
ON_UNET = [
    MethodCase(
        AttentionRegulation,
        # A slower descent than the published one, which multiplies rounding.
        lambda s: AttentionRegulation([(2, 3)], 1.0, iterations=4, rate=5.0, keep=False, where=s.where),
        lambda s: AttentionRegulation([(2, 3)], 1.0, 0.0, keep=False, where=s.where),
    ),
    MethodCase(NAG, lambda s: NAG("dark photo", where=s.where), lambda s: NAG("dark photo", 0.0, where=s.where)),
    MethodCase(
        CONFORM,
        lambda s: CONFORM([[(2, 3), (3, 4)], [(5, 6)]], (0,), 1, until=2, where=narrow(s)),
        lambda s: CONFORM([(2, 3), (5, 6)], step_size=0.0, where=narrow(s)),
    ),
]
# On the pipeline of a UNet with an IP-Adapter, whose own scale is zero.
ON_IMAGE_PROMPT = [
    MethodCase(StoryAdapter, lambda s: StoryAdapter(0.4, where=narrow(s)), lambda s: StoryAdapter(0.0, where=narrow(s)))
]
BOXES = {(2, 4): (0.0, 0.0, 0.5, 0.5), (5, 6): (0.25, 0.5, 1.0, 1.0)}
