"""The table of pipelines against the pipelines' own code: which rows or calls are conditional."""

from __future__ import annotations

import ast
import functools
import inspect
import re
from pathlib import Path

from attnsteer.hosts.diffusers.formula import NORMALISES
from attnsteer.hosts.diffusers.pipelines import DOUBLED, IN_CONTEXTS, IN_TURN, TRIPLED

TABLES = {"doubled": DOUBLED, "tripled": TRIPLED, "contexts": IN_CONTEXTS, "turn": IN_TURN}


@functools.cache
def pipeline_sources() -> dict[str, str]:
    """Name -> source of every pipeline class of diffusers with a call of its own; nothing is imported."""
    import diffusers

    found = {}
    for path in sorted((Path(diffusers.__file__).parent / "pipelines").rglob("pipeline_*.py")):
        source = path.read_text(encoding="utf-8")
        for node in ast.parse(source).body:
            if isinstance(node, ast.ClassDef) and node.name.endswith("Pipeline"):
                if any(isinstance(f, ast.FunctionDef) and f.name == "__call__" for f in node.body):
                    found[node.name] = "\n".join(source.splitlines()[node.lineno - 1 : node.end_lineno])
    return found


def listed(table: str) -> list[str]:
    return [n for n in pipeline_sources() if TABLES[table].match(n)]


def text_of_calls(source: str) -> list[str]:
    """The text arguments of the denoiser calls, in order of appearance."""
    names = {f"self.{n}" for n in ("unet", "transformer", "transformer_2")} | {"current_model"}
    calls = []
    for node in ast.walk(ast.parse(inspect.cleandoc("\n" + source))):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in names:
            given = {k.arg: ast.unparse(k.value) for k in node.keywords}
            calls.append((node.lineno, given.get("encoder_hidden_states", "?")))
    return [text for _, text in sorted(calls)]


def test_every_pipeline_is_in_one_table_at_most() -> None:
    assert [n for n in pipeline_sources() if sum(bool(t.match(n)) for t in TABLES.values()) > 1] == []
    assert len(listed("doubled")) > 80 and len(listed("contexts")) > 20 and len(listed("turn")) > 25
    assert len(listed("tripled")) == 2


def test_doubled_batches_put_the_negative_prompt_first() -> None:
    assert {name: fault for name in listed("doubled") if (fault := fault_of_doubled(name))} == {}


def fault_of_doubled(name: str) -> str:
    """What in the source of a pipeline contradicts the table, or nothing."""
    source = pipeline_sources()[name]
    flat = re.sub(r"\s+", " ", source)
    if "prepare_latents" not in source or "scheduler.step" not in source:
        return "no latents or no steps"
    halves = re.findall(r"(\w*uncond\w*), (\w+) = [\w.]+\.chunk\(2\)", flat)
    joined = re.findall(r"(?:cat\(|prompts=) ?\[ ?(\w*neg\w*|\w*uncond\w*), (\w+)", flat)
    single = "LatentConsistency" in name or "Sprint" in name or "Mobile" in name
    if not single and not (halves and joined):
        return "no doubled batch"
    if re.search(r"cat\( ?\[ ?prompt_embeds, negative_prompt_embeds", flat):
        return "the prompt is joined first"
    return "the prompt is cut off first" if re.search(r"noise_pred_(text|cond), noise_pred_uncond = ", flat) else ""


def test_calls_of_their_own_put_the_prompt_first() -> None:
    names = [*listed("contexts"), *listed("turn")]
    assert {name: fault for name in names if (fault := fault_of_separate(name))} == {}


def fault_of_separate(name: str) -> str:
    """What in the source of a pipeline contradicts the table, or nothing."""
    source = pipeline_sources()[name]
    if "prepare_latents" not in source or "scheduler.step" not in source:
        return "no latents or no steps"
    calls = text_of_calls(source)
    if len(calls) not in (1, 2) or "neg" in calls[0] or (len(calls) == 2 and "neg" not in calls[1]):
        return f"its calls take {calls}"
    contexts = re.findall(r'cache_context\(\s*"(\w+)"', source)
    return (
        "" if contexts == (["cond", "uncond"] if name in listed("contexts") else []) else f"its contexts are {contexts}"
    )


def test_the_pipelines_that_normalise() -> None:
    """Those are recognised by what their code names."""
    words = "|".join(NORMALISES)
    normalising = {
        n for n, s in pipeline_sources().items() if re.search(r"torch\.norm|normalized_guidance\(|\.norm\(", s)
    }
    assert len(normalising) > 12
    assert {n for n in normalising if not re.search(words, pipeline_sources()[n])} == ODD


# Their norms are those of embeddings, of an error or of an output, not of the combination.
ODD = {
    "VQDiffusionPipeline", "StableDiffusionParadigmsPipeline", "StableDiffusionGLIGENTextImagePipeline", "ShapEPipeline",
    "VersatileDiffusionDualGuidedPipeline", "VersatileDiffusionImageVariationPipeline", "VersatileDiffusionTextToImagePipeline",
    "AudioDiffusionPipeline", "MarigoldNormalsPipeline",
}  # fmt: skip
