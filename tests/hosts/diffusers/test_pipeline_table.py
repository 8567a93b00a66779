"""The table of pipelines against the pipelines' own code: which rows or calls are conditional."""

from __future__ import annotations

import ast
import functools
import inspect
import re
from pathlib import Path

import pytest

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


@pytest.mark.parametrize("name", listed("doubled"))
def test_doubled_batches_put_the_negative_prompt_first(name: str) -> None:
    source = pipeline_sources()[name]
    flat = re.sub(r"\s+", " ", source)
    assert "prepare_latents" in source and "scheduler.step" in source
    halves = re.findall(r"(\w*uncond\w*), (\w+) = [\w.]+\.chunk\(2\)", flat)
    joined = re.findall(r"cat\( ?\[ ?(\w*neg\w*|\w*uncond\w*), (\w+)", flat)
    single = "LatentConsistency" in name or "Sprint" in name
    assert single or (halves and joined), "no doubled batch"
    assert not re.search(r"cat\( ?\[ ?prompt_embeds, negative_prompt_embeds", flat)
    assert not re.search(r"noise_pred_(text|cond), noise_pred_uncond = ", flat)


@pytest.mark.parametrize("name", [*listed("contexts"), *listed("turn")])
def test_calls_of_their_own_put_the_prompt_first(name: str) -> None:
    source = pipeline_sources()[name]
    assert "prepare_latents" in source and "scheduler.step" in source
    calls = text_of_calls(source)
    assert len(calls) in (1, 2)
    assert "neg" not in calls[0]
    assert len(calls) == 1 or "neg" in calls[1]
    contexts = re.findall(r'cache_context\(\s*"(\w+)"', source)
    assert contexts == (["cond", "uncond"] if name in listed("contexts") else [])


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
