"""shapes-lvlm: a Llava of 2.3 M parameters: a CLIP vision tower, a projector, and the reading language model.

The tower is trained first, alone, on what the renderer knows of each patch; the decoder starts from shapes-lm.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..shapes.questions import lesson, picture
from ..shapes.render import coverage, render
from ..shapes.world import COLOUR_NAMES, SHAPES, rng
from ..tokenizers import encode, word_tokenizer
from .loop import Plan, fit, shorten

SIDE, PATCH = 64, 8
GRID = SIDE // PATCH
TOKENS = GRID * GRID
TOWER_BATCH, BATCH, LENGTH, QUESTIONS = 32, 32, 64, 4
# A tower trained for twice as long names nearly every patch, and leaves nothing to hallucinate.
TOWER_PLAN = Plan(steps=750, lr=1e-3, warmup=100)
PLAN = Plan(steps=1500, lr=1.5e-3, warmup=200)
# More questions about what is there than about what is not: the bias that vision-language models are known for.
POSITIVE = 0.7
# Least part of a patch that an object covers to name it.
COVERED = 0.2


def vision_config() -> Any:
    """Four layers, 128 wide, 64 patches and a class token."""
    from transformers import CLIPVisionConfig

    return CLIPVisionConfig(
        image_size=SIDE,
        patch_size=PATCH,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        projection_dim=128,
    )


class Tower(nn.Module):
    """The vision tower with a reading head: shape, colour, and whether an object's centre is here, per patch."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import CLIPVisionModel

        self.vision = CLIPVisionModel(vision_config())
        self.head = nn.Linear(128, len(SHAPES) + 1 + len(COLOUR_NAMES) + 1 + 2)

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """Logits [B, 64, classes] of shape, colour and centre."""
        patches = self.vision(pixels).last_hidden_state[:, 1:]
        return self.head(patches).float().split((len(SHAPES) + 1, len(COLOUR_NAMES) + 1, 2), dim=-1)


def labels(scenes: list[Any]) -> Tensor:
    """Shape, colour (0 for none) and centre of each patch, [B, 64, 3], from the renderer."""
    cover, owner, _ = coverage(scenes, SIDE)
    share = cover.view(-1, GRID, PATCH, GRID, PATCH).mean(dim=(2, 4)).flatten(1)
    out, most = torch.zeros(len(scenes), TOKENS, 3, dtype=torch.long), torch.full((len(scenes), TOKENS), COVERED)
    for (row, place), own in zip(owner, share, strict=True):
        o = scenes[row].objects[place]
        here = own > most[row]
        out[row, here, 0], out[row, here, 1] = SHAPES.index(o.shape) + 1, COLOUR_NAMES.index(o.colour) + 1
        most[row] = torch.maximum(most[row], own)
        out[row, int(o.y * GRID) * GRID + int(o.x * GRID), 2] = 1
    return out


def tower_loss(model: nn.Module, step: int) -> tuple[Tensor, dict[str, float]]:
    """Cross-entropy of the three labels; patches with objects count as much as empty ones."""
    scenes = [picture("train", step * TOWER_BATCH + i) for i in range(TOWER_BATCH)]
    place = next(model.parameters()).device
    wanted = labels(scenes).to(place)
    found = model((render(scenes) * 2 - 1).to(place))
    full = wanted[..., 0] > 0
    weight = torch.where(full, (~full).sum() / full.sum().clamp(min=1), 1.0)
    total = sum(
        (
            nn.functional.cross_entropy(f.flatten(0, 1), wanted[..., i].flatten(), reduction="none") * weight.flatten()
        ).mean()
        for i, f in enumerate(found)
    )
    right = (found[0].argmax(-1) == wanted[..., 0]) & (found[1].argmax(-1) == wanted[..., 1])
    return total, {"object patches right": right[full].float().mean().item()}


def build(tower: nn.Module | None = None, decoder: nn.Module | None = None) -> Any:
    """A Llava with the weights of a trained tower and a trained decoder, where they are given."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    from .lm import config

    tokenizer = word_tokenizer()
    text = config()
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision_config(),
            text_config=text,
            image_token_index=tokenizer.image_token_id,
            image_seq_length=TOKENS,
            vision_feature_layer=-1,
            tie_word_embeddings=True,
        )
    )
    if tower is not None:
        model.model.vision_tower.load_state_dict(tower.state_dict())
    if decoder is not None:
        model.model.language_model.load_state_dict(decoder.model.state_dict())
        model.tie_weights()
    return model


def processor() -> Any:
    """The processor: images to 64x64 in [-1, 1], one <image> to 64 image tokens."""
    from transformers import CLIPImageProcessorPil, LlavaProcessor

    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(
            size={"height": SIDE, "width": SIDE},
            do_center_crop=False,
            image_mean=[0.5] * 3,
            image_std=[0.5] * 3,
        ),
        tokenizer=word_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def batch(step: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pixels, tokens [B, 1 + 64 + L] and target weights of a step."""
    g = rng("train", step, stream=3)
    scenes = [picture("train", step * BATCH + i) for i in range(BATCH)]
    head = [*encode("<image>")[:1], *encode("<image>")[1:] * TOKENS]
    ids = torch.zeros(BATCH, len(head) + LENGTH, dtype=torch.long)
    weights = torch.zeros(ids.shape)
    ids[:, : len(head)] = torch.tensor(head)
    for row, scene in enumerate(scenes):
        text, marks = lesson(scene, g, QUESTIONS, POSITIVE)
        tokens = encode(text)[1 : LENGTH + 1]
        ids[row, len(head) : len(head) + len(tokens)] = torch.tensor(tokens)
        weights[row, len(head) : len(head) + len(tokens)] = 0.05
        weights[row, [len(head) + m for m in marks if m < LENGTH]] = 1.0
    return render(scenes) * 2 - 1, ids, weights


def loss(model: nn.Module, step: int) -> tuple[Tensor, dict[str, float]]:
    """Next-word loss, answers weighted; accuracy of the answers."""
    pixels, ids, weights = batch(step)
    place = next(model.parameters()).device
    pixels, ids, weights = pixels.to(place), ids.to(place), weights.to(place)[:, TOKENS + 1 :]
    out = model(input_ids=ids, pixel_values=pixels, logits_to_keep=LENGTH + 1)
    logits, wanted = out.logits[:, :-1].float(), ids[:, TOKENS + 1 :]
    each = nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none").view_as(weights)
    answers = weights == 1.0
    right = (logits.detach().argmax(dim=-1) == wanted)[answers].float().mean()
    return (each * weights).sum() / weights.sum(), {"answers right": right.item()}


def train(out: Path, device: str = "auto", steps: int | None = None) -> Path:
    """Train and write the model folder `out/shapes-lvlm`; needs `out/shapes-lm`, or the embedded shapes-lm."""
    from transformers import LlamaForCausalLM

    from .. import folder
    from .publish import publish

    tower_plan, plan = shorten(TOWER_PLAN, steps), shorten(PLAN, steps)
    torch.manual_seed(tower_plan.seed)
    tower = Tower()
    tower_curve = fit("lvlm-tower", tower, tower_loss, tower_plan, out, device=device)
    start = out / "shapes-lm" if (out / "shapes-lm").is_dir() else folder("shapes-lm")
    decoder = LlamaForCausalLM.from_pretrained(start, dtype=torch.float32)
    torch.manual_seed(plan.seed)
    model = build(tower.vision, decoder)
    model.model.vision_tower.requires_grad_(False)
    compiled = () if steps else (model.model.language_model,)
    curve = fit("lvlm", model, loss, plan, out, device=device, compiled=compiled)
    model.config.text_config.use_cache = model.generation_config.use_cache = True
    curves = {"lvlm-tower": tower_curve, "lvlm": curve}
    return publish("shapes-lvlm", {"": model}, {"": processor()}, out, curves)
