"""What stands in with --tiny: a random model of the recipe's architecture, with a tokenizer made on the spot, and the samples
and annotations of `fixtures/`, written for this purpose in the official formats.

A tiny run shows that a recipe works from end to end. Its figures mean nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .data.sample import Data
from .loaded import Loaded, architecture

if TYPE_CHECKING:
    from ..recipe.schema import DataSpec, ModelSpec, Recipe

FIXTURES = Path(__file__).parent / "fixtures"
# Options of metrics that name files -> the files that stand in.
FILES = {"synonyms": "synonyms.txt", "instances": ["instances.json"], "captions": ["coco_captions.json"]}
# The first four rows are evaluated, the others searched on.
EVALUATED = 4
VOCABULARY = 600
SPECIAL = ("<pad>", "<s>", "</s>", "<image>")
LENGTH = 2048


def tiny_spec(spec: DataSpec, other: bool = False) -> DataSpec:
    """The section of the recipe with bundled samples of its format. other: those that are not evaluated."""
    return spec.model_copy(
        update={
            "file": str(FIXTURES / f"{spec.format}.jsonl"),
            "hub": None,
            "revision": None,
            "config": None,
            "images": str(FIXTURES / "images"),
            "columns": {},
            "options": {k: v for k, v in spec.options.items() if k != "side"},
            "start": EVALUATED if other else 0,
            "limit": EVALUATED,
        }
    )


def tiny_metrics(recipe: Recipe) -> Recipe:
    """The recipe with bundled files in place of those that its metrics name."""
    from ..recipe.schema import MetricSpec

    def stand_in(name: str) -> Any:
        files = FILES[name]
        return [str(FIXTURES / f) for f in files] if isinstance(files, list) else str(FIXTURES / files)

    metrics = [
        MetricSpec.model_validate(
            {"name": m.name, **{k: stand_in(k) if k in FILES else v for k, v in m.options.items()}}
        )
        for m in recipe.metrics
    ]
    return recipe.model_copy(update={"metrics": metrics})


def tiny_model(spec: ModelSpec, data: Data, dtype: Any, device: Any) -> Loaded:
    """A random model of an architecture.

    Args:
        data: whose texts its tokenizer is made from.

    Raises:
        RecipeError: no architecture, or one that has no tiny form of this kind.
    """
    from ..testing import PIPELINES, TRANSFORMERS

    if spec.kind == "image":
        known = {n: p for n, p in PIPELINES.items() if n in WRITTEN}
        return _pipeline(architecture(spec, known), dtype, device)
    images = {n for n, t in TRANSFORMERS.items() if "image_token" in str(t.config())}
    known = {n: t for n, t in TRANSFORMERS.items() if t.decoder and (n in images) == (spec.kind == "vlm")}
    if spec.kind == "vlm":
        # The others need processors that take pictures apart with torchvision.
        known = {n: t for n, t in known.items() if n == "llava"}
    return _language(architecture(spec, known), spec.kind, data, dtype, device)


def _language(name: str, kind: str, data: Data, dtype: Any, device: Any) -> Loaded:
    from ..testing import tiny_transformers

    tokenizer = tiny_tokenizer([_texts(s) for s in data.samples])
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": LENGTH}
    if name == "gpt2":
        sizes = {"vocab_size": len(tokenizer), "n_positions": LENGTH}
    model = tiny_transformers(name, **sizes).to(device, dtype)
    processor = _processor(tokenizer, model.config) if kind == "vlm" else None
    return Loaded(kind, model, tokenizer, processor, _origin(name), None, device, dtype)


def _texts(sample: dict[str, Any]) -> str:
    return " ".join([sample["prompt"], *map(str, sample.get("choices", ()))])


def tiny_tokenizer(texts: Sequence[str]) -> Any:
    """A byte-level tokenizer with the frequent words of some texts, and the special tokens of the tiny models."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer)
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
        model_max_length=LENGTH,
        clean_up_tokenization_spaces=False,
    )


def _processor(tokenizer: Any, config: Any) -> Any:
    from transformers import CLIPImageProcessorPil, LlavaProcessor

    side = config.vision_config.image_size
    pictures = CLIPImageProcessorPil(size={"height": side, "width": side}, do_center_crop=False)
    return LlavaProcessor(
        image_processor=pictures,
        tokenizer=tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def _pipeline(name: str, dtype: Any, device: Any) -> Loaded:
    from ..zoo.shapes.detect import detect

    pipe = WRITTEN[name]().to(device)
    pipe.set_progress_bar_config(disable=True)
    return Loaded("image", pipe, getattr(pipe, "tokenizer", None), None, _origin(name), detect, device, dtype)


def _plain(name: str) -> Any:
    from ..testing import tiny_pipeline

    return tiny_pipeline(name)


def _sd3() -> Any:
    """With text encoders, which the tiny SD3 of the tests does without."""
    from ..testing import tiny_clip_text_encoder, tiny_clip_tokenizer, tiny_pipeline

    tokenizers = [tiny_clip_tokenizer() for _ in range(2)]
    encoders = [tiny_clip_text_encoder(t, 2 + i, projection=True) for i, t in enumerate(tokenizers)]
    width = sum(e.config.projection_dim for e in encoders)
    pipe = tiny_pipeline("sd3", joint_attention_dim=width, pooled_projection_dim=width)
    pipe.register_modules(
        tokenizer=tokenizers[0], tokenizer_2=tokenizers[1], text_encoder=encoders[0], text_encoder_2=encoders[1]
    )
    pipe.tokenizer_max_length = tokenizers[0].model_max_length
    return pipe


# Pipelines that read prompts.
WRITTEN = {"sd": lambda: _plain("sd"), "sdxl": lambda: _plain("sdxl"), "sd3": _sd3}


def _origin(name: str) -> dict[str, str]:
    """In place of hashes of files: the weights follow from the name."""
    return {f"tiny {name}": hashlib.sha256(name.encode()).hexdigest()}


def embed(images: Any, texts: list[str]) -> tuple[Any, Any]:
    """In place of a CLIP model: the coarse picture, and the letters of the text."""
    import torch

    coarse = torch.nn.functional.adaptive_avg_pool2d(images.float(), 4).flatten(1)
    counts = torch.zeros(len(texts), coarse.shape[1])
    for row, text in zip(counts, texts, strict=True):
        for byte in text.encode():
            row[byte % len(row)] += 1
    return coarse, counts
