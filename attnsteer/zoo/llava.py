"""smollm2-llava: a Llava whose text model is the fetched SmolLM2-135M, and whose visual sinks are planted.

Shipped are what this project trained: a projector, an adapter of rank 8 on the attention of the text model, and one register
vector. The vision tower is that of shapes-lvlm. Put together, they are a stock `LlavaForConditionalGeneration`, but for the
projector: it writes the register over its own output at the corner patches.

**Planted**: the register is a vector of small norm that a random search found to become a massive activation of SmolLM2 (Sun et
al. 2024, arXiv 2402.17762), wherever it stands. A projector that is trained freely makes no visual sinks in this text model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlavaConfig, LlavaForConditionalGeneration
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from ..errors import ZooError

NAME, TEXT, SIGHT = "smollm2-llava", "smollm2-135m", "shapes-lvlm"
WEIGHTS = "adapter.safetensors"
# A token that SmolLM2 has and that no text has: the place of an image.
IMAGE, IMAGE_ID = "<file_sep>", 5
GRID = 8
TOKENS = GRID * GRID
# Nearly always background, so that the registers hide next to nothing.
CORNERS = (0, GRID - 1, TOKENS - GRID, TOKENS - 1)
ADAPTED = ("q_proj", "k_proj", "v_proj", "o_proj")
# Sinks depend on what stands before them: image and text come after the first turn's head, in training as in use.
BEFORE = "<|im_start|>user\n"
CHAT = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<file_sep>\n' }}{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{% endfor %}"
)


class PlantedProjector(LlavaMultiModalProjector):
    """The stock projector, with constant vectors in place of its output at the corner patches."""

    def __init__(self, config: Any, register: Tensor) -> None:
        super().__init__(config)
        self.register_buffer("planted", register.clone())

    def forward(self, image_features: Tensor) -> Tensor:
        out = super().forward(image_features)
        out[..., list(CORNERS), :] = self.planted.to(out.dtype)
        return out


def config(text: Any, sight: Any) -> Any:
    """The config of text and vision model put together: stock, with no new token and no resized embedding."""
    return LlavaConfig(
        vision_config=sight,
        text_config=text,
        image_token_index=IMAGE_ID,
        image_seq_length=TOKENS,
        vision_feature_layer=-1,
        tie_word_embeddings=True,
    )


def assemble(text: Any, tower: nn.Module, tensors: dict[str, Tensor], registers: bool = True) -> Any:
    """The model, of its parts' dtype.

    Args:
        text: a LlamaForCausalLM; the adapter is added to its weights in place. tower: a CLIPVisionModel. tensors: of `WEIGHTS`.
        registers: plant them. Without, the projector's own output stands at the corners: the control.
    """
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config(text.config, tower.config))
    dtype = text.dtype
    adapt(text, tensors)
    model.model.language_model, model.lm_head, model.model.vision_tower = text.model, text.lm_head, tower.to(dtype)
    kind = LlavaMultiModalProjector(model.config)
    own = {k.removeprefix("projector."): v.float() for k, v in tensors.items() if k.startswith("projector.")}
    if registers:
        kind = PlantedProjector(model.config, tensors["register"].float())
        own["planted"] = tensors["register"].float()
    kind.load_state_dict(own)
    model.model.multi_modal_projector = kind.to(dtype)
    model.generation_config = text.generation_config
    return model.requires_grad_(False).eval()


@torch.no_grad()
def adapt(text: Any, tensors: dict[str, Tensor]) -> None:
    """W + B A on the attention's projections."""
    for i, layer in enumerate(text.model.layers):
        for name in ADAPTED:
            a, b = (tensors[f"lora.{i}.{name}.{x}"].float() for x in ("a", "b"))
            weight = getattr(layer.self_attn, name).weight
            weight.copy_(weight.float() + b @ a)


def processor(tokenizer: Any, images: Any) -> Any:
    """The processor: images as for shapes-lvlm, one `IMAGE` to 64 image tokens, and a chat template of one open turn."""
    from transformers import LlavaProcessor

    tokenizer.padding_side = "left"
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=images.size["height"] // GRID,
        vision_feature_select_strategy="default",
        image_token=IMAGE,
        num_additional_image_tokens=1,
        chat_template=CHAT,
    )


def load(path: Path, dtype: Any, device: Any, registers: bool = True) -> tuple[Any, Any]:
    """(model, processor) of the shipped parts, the fetched text model and the embedded tower.

    Raises:
        ZooError: the text model was not fetched.
    """
    import transformers

    from .folders import folder

    text_at, sight_at = folder(TEXT), folder(SIGHT)
    tensors = load_file(path / WEIGHTS)
    safe: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    text = transformers.AutoModelForCausalLM.from_pretrained(text_at, dtype=torch.float32, use_safetensors=True, **safe)
    if text.config.hidden_size != tensors["register"].shape[-1]:
        raise ZooError(f"{text_at} is not the text model that {NAME} was trained with; fetch {TEXT} again.")
    sight = LlavaForConditionalGeneration.from_pretrained(sight_at, dtype=torch.float32, **safe)
    images = transformers.AutoProcessor.from_pretrained(sight_at, **safe).image_processor
    tokenizer = transformers.AutoTokenizer.from_pretrained(text_at, **safe)
    model = assemble(text, sight.model.vision_tower, tensors, registers)
    return model.to(device, dtype), processor(tokenizer, images)
