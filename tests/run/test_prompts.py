"""Prompts about images in the form of each family's processor."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from attnsteer import VHR, steer
from attnsteer.run.data.sample import Data
from attnsteer.run.loaded import Loaded
from attnsteer.run.tasks import Request
from attnsteer.run.tasks.answer import answer
from attnsteer.run.tasks.prompts import encode, with_image
from attnsteer.run.tiny import tiny_tokenizer
from tests.hosts.transformers.vision_families import FAMILIES


def test_where_a_prompt_has_its_image() -> None:
    def loaded(**processor: Any) -> Any:
        return SimpleNamespace(processor=SimpleNamespace(**processor))

    assert with_image(loaded(), "What is it?") == "<image> What is it?"
    assert with_image(loaded(image_token="<|image_pad|>"), "<|image_pad|> What?") == "<|image_pad|> What?"
    turns = loaded(chat_template="x", apply_chat_template=lambda turn, **k: f"[{turn[0]['content'][1]['text']}]")
    assert with_image(turns, "What?") == "[What?]"
    assert with_image(loaded(num_query_tokens=32, image_token="<image>"), "What?") == "What?"


def test_a_language_model_of_the_zoo_is_padded_on_the_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fetched one brings its own tokenizer; behind padding on the right, answers and single-token choices are nonsense."""
    from attnsteer import zoo
    from attnsteer.run import models

    tokenizer = tiny_tokenizer(["one two three"])
    tokenizer.padding_side = "right"
    monkeypatch.setattr(zoo, "load", lambda name, **_: (SimpleNamespace(), tokenizer))
    loaded = models._zoo("shapes-lm", "lm", torch.float32, "cpu")
    batch = encode(loaded, Request([{"prompt": p} for p in ("one", "one two three")], None, {}, 0))
    assert batch["attention_mask"][0].tolist() == sorted(batch["attention_mask"][0].tolist())


def test_instructblip_puts_its_queries_in_front_by_itself() -> None:
    """The batch is that of the processor called as its card says, and a method on images acts while answers are written."""
    import transformers
    from PIL import Image

    texts = ["Is there a dog in the image?"]
    # The checkpoints' tokenizer knows no image token; the processor adds it.
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tiny_tokenizer(texts).backend_tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    pictures = transformers.BlipImageProcessor(size={"height": 16, "width": 16})
    processor = transformers.InstructBlipProcessor(pictures, tokenizer, tokenizer, num_query_tokens=4)
    family = FAMILIES["instructblip"].config()
    for part in ("text_config", "qformer_config"):
        family[part] = {**family[part], "vocab_size": len(tokenizer)}
    family["image_token_index"] = tokenizer.convert_tokens_to_ids("<image>")
    config = transformers.InstructBlipConfig(**family)
    model = transformers.InstructBlipForConditionalGeneration(config).eval()
    image = Image.new("RGB", (16, 16), (200, 10, 10))
    samples = [{"id": "1", "prompt": texts[0], "image": "a.png", "label": "no"}]
    loaded = Loaded("vlm", model, tokenizer, processor, dtype=torch.float32)
    request = Request(samples, Data(samples, lambda s: image), {"max_new_tokens": 3}, 0)
    batch = encode(loaded, request)
    expected = processor(images=image, text=texts[0], return_tensors="pt")
    assert set(batch) >= set(expected)
    for key in expected:
        torch.testing.assert_close(batch[key], expected[key])
    assert int((batch["input_ids"] == config.image_token_index).sum()) == 4
    with steer(model, VHR(alpha=3.0)) as run:
        (record,), (written,) = answer(loaded, Request(samples, request.data, request.decoding, 0, run))
    assert written == 3 and record["label"] == "no" and any(r.changed for r in run.audit.records.values())
