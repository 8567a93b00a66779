"""Pipelines that no test of the library builds: they take the components of a sibling whose test does, and these changes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Changes = Callable[[dict[str, Any]], dict[str, Any]]


@dataclass(frozen=True)
class Sibling:
    """How to build one pipeline from the parts of another.

    Attributes:
        of: the pipeline whose test has the parts. parts: components that differ, from those. inputs: arguments of a call that
            differ, from those; what the pipeline does not take is left out. after: what is set on the pipeline itself.
        note: what is left out of the measurement.
    """

    of: str
    parts: Changes = lambda parts: {}
    inputs: Changes = lambda given: {}
    after: Callable[[Any], None] = lambda pipe: None
    note: str = ""


def _set(**values: Any) -> Callable[[Any], None]:
    """Attributes of a pipeline: where its template ends, in words rather than tokens."""
    return lambda pipe: vars(pipe).update(values)


def _features(pipe: Any) -> None:
    """Text features as older versions of transformers gave them: the tensor alone."""
    inner = pipe.text_encoder.get_text_features

    def features(*args: Any, **kwargs: Any) -> Tensor:
        out = inner(*args, **kwargs)
        return out if isinstance(out, Tensor) else out.pooler_output

    vars(pipe.text_encoder)["get_text_features"] = features


def _like(model: nn.Module, **changes: Any) -> nn.Module:
    """Another of its class, of a config that differs."""
    torch.manual_seed(0)
    # Without the note of what was left to the defaults, which would be left to them again.
    config = {k: v for k, v in {**model.config, **changes}.items() if k != "_use_default_values"}
    return type(model).from_config(config).eval()


def _wider(name: str = "transformer", by: int = 2, to: int | None = None) -> Changes:
    """A denoiser with more input channels: for a control, a video or a mask beside the latent."""
    return lambda parts: {name: _like(parts[name], in_channels=to or parts[name].config.in_channels * by)}


def _picture(size: int, channels: int = 3) -> Tensor:
    """[1, channels, size, size], from 0 to 1."""
    return torch.rand(1, channels, size, size, generator=torch.Generator().manual_seed(0))


def _mask(size: int) -> Tensor:
    """[1, 1, size, size]; the left half is one."""
    return (torch.arange(size) < size // 2).float().expand(1, 1, size, size).clone()


def _pil(size: int, mode: str = "RGB") -> Any:
    from PIL import Image

    return Image.new(mode, (size, size))


def _union(parts: dict[str, Any]) -> dict[str, Any]:
    from diffusers import ControlNetUnionModel

    known = ControlNetUnionModel.from_config(
        dict(parts["controlnet"].config), num_trans_channel=32, num_trans_head=2, num_proj_channel=32
    )
    return {"controlnet": known.eval()}


def _union_inputs(given: dict[str, Any]) -> dict[str, Any]:
    return {"control_image": given.get("control_image", given["image"]), "control_mode": 0}


def _z_control(extra: int) -> Changes:
    def parts(parts: dict[str, Any]) -> dict[str, Any]:
        from diffusers import ZImageControlNetModel

        torch.manual_seed(0)
        model = ZImageControlNetModel(
            control_layers_places=[0],
            control_refiner_layers_places=[0],
            control_in_dim=16 + extra,
            add_control_noise_refiner="control_noise_refiner",
            dim=32,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
        )
        return {"controlnet": model.eval()}

    return parts


def _siglip(parts: dict[str, Any]) -> dict[str, Any]:
    from transformers import SiglipImageProcessor, SiglipVisionConfig, SiglipVisionModel

    torch.manual_seed(0)
    config = SiglipVisionConfig(
        hidden_size=12, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
    )
    return {
        "image_encoder": SiglipVisionModel(config).eval(),
        "feature_extractor": SiglipImageProcessor(size={"height": 16, "width": 16}),
        "transformer": _like(parts["transformer"], task_type="i2v"),
    }


def _upscaling(parts: dict[str, Any]) -> dict[str, Any]:
    from diffusers import DDPMScheduler

    return {
        "unet": _like(parts["unet"], in_channels=7, num_class_embeds=1000),
        "low_res_scheduler": DDPMScheduler(),
    }


def _small_unet(parts: dict[str, Any]) -> nn.Module:
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    return UNet2DModel(
        block_out_channels=(32, 64),
        layers_per_block=2,
        sample_size=16,
        in_channels=3,
        out_channels=3,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    ).eval()


def _pixels(scheduler: str) -> Changes:
    def parts(parts: dict[str, Any]) -> dict[str, Any]:
        import diffusers

        return {"unet": _small_unet(parts), "scheduler": getattr(diffusers, scheduler)()}

    return parts


def _latents(channels: int) -> Changes:
    def parts(parts: dict[str, Any]) -> dict[str, Any]:
        from diffusers import DDIMScheduler, VQModel

        torch.manual_seed(0)
        vae = VQModel(
            block_out_channels=[32, 64],
            down_block_types=["DownEncoderBlock2D", "DownEncoderBlock2D"],
            up_block_types=["UpDecoderBlock2D", "UpDecoderBlock2D"],
            latent_channels=3,
        )
        unet = _like(_small_unet(parts), in_channels=channels)
        return {"vqvae": vae.eval(), "unet": unet, "scheduler": DDIMScheduler()}

    return parts


def _ernie(parts: dict[str, Any]) -> dict[str, Any]:
    from .diffusers import build

    return {"transformer": build("ErnieImageTransformer2DModel")[0], "pe": None, "pe_tokenizer": None}


def _ernie_inputs(given: dict[str, Any]) -> dict[str, Any]:
    seed = torch.Generator().manual_seed(0)
    return {
        "prompt": None,
        "prompt_embeds": [torch.randn(6, 16, generator=seed)],
        "negative_prompt_embeds": [torch.randn(6, 16, generator=seed)],
        "use_pe": False,
        "guidance_scale": 4.0,
        "height": 128,
        "width": 128,
        "output_type": "latent",
    }


def _longcat(parts: dict[str, Any]) -> dict[str, Any]:
    from diffusers import AutoencoderKL, LongCatImageTransformer2DModel

    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=[32, 64],
        down_block_types=["DownEncoderBlock2D", "DownEncoderBlock2D"],
        up_block_types=["UpDecoderBlock2D", "UpDecoderBlock2D"],
        latent_channels=16,
    )
    transformer = LongCatImageTransformer2DModel(
        in_channels=64,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=32,
        axes_dims_rope=[4, 4, 8],
    )
    return {"vae": vae.eval(), "transformer": transformer.eval(), "text_processor": parts["processor"]}


def _recorded(name: str, **others: Any) -> Changes:
    """A denoiser in its recorded small config, and other parts."""

    def parts(parts: dict[str, Any]) -> dict[str, Any]:
        from .diffusers import build

        return {"transformer": build(name)[0], **others}

    return parts


def _embedded(shape: tuple[int, ...], **others: Any) -> Changes:
    """Embeddings in the place of a prompt, of which the text encoder would make them."""

    def inputs(given: dict[str, Any]) -> dict[str, Any]:
        seed = torch.Generator().manual_seed(0)
        return {
            "prompt": None,
            "negative_prompt": None,
            "prompt_embeds": torch.randn(shape, generator=seed),
            "negative_prompt_embeds": torch.randn(shape, generator=seed),
            "output_type": "latent",
            **others,
        }

    return inputs


def _refiner(parts: dict[str, Any]) -> dict[str, Any]:
    model = parts["transformer"]
    config = dict(in_channels=8, patch_size=(1, 1, 1), rope_axes_dim=(2, 2, 4), guidance_embeds=True)
    return {"transformer": _like(model, **config), "guider": None}


def _versatile(parts: dict[str, Any]) -> dict[str, Any]:
    """The image's UNet alone, which is all that is left once the pipeline has taken what it needs of the text's."""
    from transformers import CLIPTextModelWithProjection

    torch.manual_seed(0)
    width = parts["unet"].config.cross_attention_dim
    config = type(parts["text_encoder"].config)(**{**parts["text_encoder"].config.to_dict(), "projection_dim": width})
    return {
        "image_unet": parts["unet"],
        "text_unet": None,
        "text_encoder": CLIPTextModelWithProjection(config).eval(),
    }


def _versatile_picture(parts: dict[str, Any]) -> dict[str, Any]:
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=37, num_hidden_layers=2, num_attention_heads=2)
    width = parts["unet"].config.cross_attention_dim
    config = CLIPVisionConfig(**sizes, projection_dim=width, image_size=32, patch_size=8)
    size = {"height": 32, "width": 32}
    return {
        "image_unet": parts["unet"],
        "image_encoder": CLIPVisionModelWithProjection(config).eval(),
        "image_feature_extractor": CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size),
    }


def _tokens(parts: dict[str, Any]) -> dict[str, Any]:
    """As the tests of the versions that had it build it."""
    import importlib

    from diffusers import Transformer2DModel, VQDiffusionScheduler, VQModel

    home = importlib.import_module("diffusers.pipelines.deprecated.vq_diffusion.pipeline_vq_diffusion")
    torch.manual_seed(0)
    vae = VQModel(
        block_out_channels=[32, 64],
        down_block_types=["DownEncoderBlock2D", "DownEncoderBlock2D"],
        up_block_types=["UpDecoderBlock2D", "UpDecoderBlock2D"],
        latent_channels=3,
        num_vq_embeddings=12,
        vq_embed_dim=3,
    )
    transformer = Transformer2DModel(
        attention_bias=True,
        cross_attention_dim=parts["text_encoder"].config.hidden_size,
        attention_head_dim=16,
        num_attention_heads=2,
        num_vector_embeds=12,
        num_embeds_ada_norm=12,
        sample_size=6,
        activation_fn="geglu-approximate",
        norm_type="ada_norm",
    )
    empty = home.LearnedClassifierFreeSamplingEmbeddings(learnable=False)
    return {
        "vqvae": vae.eval(),
        "transformer": transformer.eval(),
        "scheduler": VQDiffusionScheduler(12),
        "learned_classifier_free_sampling_embeddings": empty,
    }


SIBLINGS: dict[str, Sibling] = {
    "VQDiffusionPipeline": Sibling("StableDiffusionPipeline", parts=_tokens),
    "VersatileDiffusionTextToImagePipeline": Sibling("StableDiffusionPipeline", parts=_versatile),
    "VersatileDiffusionImageVariationPipeline": Sibling(
        "StableDiffusionPipeline",
        parts=_versatile_picture,
        inputs=lambda given: {"image": _pil(32), "negative_prompt": None},
    ),
    "TextToVideoZeroSDXLPipeline": Sibling(
        "TextToVideoZeroSDXLPipeline", inputs=lambda given: {"t0": 1, "t1": 2, "num_inference_steps": 4}
    ),
    "BriaFibo2Pipeline": Sibling(
        "Flux2KleinPipeline",
        parts=_recorded("BriaFibo2Transformer2DModel", processor=None, text_encoder=None),
        inputs=_embedded((1, 2, 6, 16), guidance_scale=4.0, height=64, width=64),
    ),
    "HunyuanImageRefinerPipeline": Sibling(
        "HunyuanImagePipeline",
        parts=_refiner,
        inputs=_embedded(
            (1, 6, 32),
            negative_prompt_embeds=None,
            prompt_embeds_mask=torch.ones(1, 6, dtype=torch.long),
            image=torch.rand(1, 4, 1, 4, 4),
            height=32,
            width=32,
        ),
    ),
    "Kandinsky6TI2VAPipeline": Sibling(
        "HunyuanVideoPipeline",
        parts=_recorded("Kandinsky6Transformer3DModel"),
        inputs=_embedded(
            (1, 6, 16),
            pooled_prompt_embeds=torch.rand(1, 8),
            negative_pooled_prompt_embeds=torch.rand(1, 8),
            sample_audio=False,
            height=128,
            width=128,
            num_frames=5,
            guidance_scale=4.0,
        ),
    ),
    "LTX2DFRPipeline": Sibling(
        "LTX2Pipeline", inputs=lambda given: {"sigmas": [1.0, 0.5], "generate_slots": False, "output_type": "latent"}
    ),
    "QwenImage21Pipeline": Sibling(
        "QwenImagePipeline",
        parts=lambda parts: {
            **_recorded("QwenImage21Transformer2DModel")(parts),
            "processor": parts["tokenizer"],
        },
        inputs=_embedded((1, 6, 16), true_cfg_scale=3.0, height=64, width=64),
    ),
    "ZImageOmniPipeline": Sibling("ZImagePipeline", parts=lambda parts: {"siglip": None, "siglip_processor": None}),
    "AceStepPipeline": Sibling("AceStepPipeline", inputs=lambda given: {"max_text_length": 256}),
    "AudioLDM2Pipeline": Sibling("AudioLDM2Pipeline", inputs=lambda given: {"transcription": given["prompt"]}),
    "HunyuanVideo15Pipeline": Sibling("HunyuanVideo15Pipeline", after=_set(prompt_template_encode_start_idx=60)),
    "Kandinsky5I2IPipeline": Sibling("Kandinsky5I2IPipeline", after=_set(resolutions=[(64, 64)])),
    "KarrasVePipeline": Sibling("DDIMPipeline", parts=_pixels("KarrasVeScheduler")),
    "OvisImagePipeline": Sibling("OvisImagePipeline", after=_set(user_prompt_begin_id=10)),
    "StableDiffusionSAGPipeline": Sibling(
        # Its own guidance runs the model again on a blurred latent, which is a call of no known side.
        "StableDiffusionSAGPipeline",
        inputs=lambda given: {"guidance_scale": 3.0, "sag_scale": 0.0},
        note="measured with sag_scale=0; beside its own guidance it is refused",
    ),
    "AltDiffusionImg2ImgPipeline": Sibling("AltDiffusionPipeline", inputs=lambda given: {"image": _picture(32)}),
    "ChromaInpaintPipeline": Sibling(
        "ChromaImg2ImgPipeline",
        inputs=lambda given: {"image": _picture(8), "mask_image": _mask(8)},
        # It asks its model for an entry that Chroma's has not.
        after=lambda pipe: pipe.transformer.register_to_config(guidance_embeds=False),
    ),
    "CogView4ControlPipeline": Sibling(
        "CogView4Pipeline", parts=_wider(), inputs=lambda given: {"control_image": _picture(16)}
    ),
    "ConsistencyModelPipeline": Sibling("DDIMPipeline", parts=_pixels("CMStochasticIterativeScheduler")),
    "DDPMPipeline": Sibling("DDIMPipeline", parts=_pixels("DDPMScheduler")),
    "EasyAnimateControlPipeline": Sibling("EasyAnimatePipeline", parts=_wider(by=3)),
    "EasyAnimateInpaintPipeline": Sibling(
        "EasyAnimatePipeline",
        parts=_wider(to=9),
        inputs=lambda given: {"video": torch.rand(1, 3, 5, 16, 16), "mask_video": torch.ones(1, 1, 5, 16, 16) * 255},
    ),
    "ErnieImagePipeline": Sibling("Flux2KleinPipeline", parts=_ernie, inputs=_ernie_inputs),
    "HeliosPyramidPipeline": Sibling(
        "HeliosPipeline", inputs=lambda given: {"pyramid_num_inference_steps_list": [2], "guidance_scale": 5.0}
    ),
    "HunyuanVideo15ImageToVideoPipeline": Sibling(
        "HunyuanVideo15Pipeline",
        parts=_siglip,
        inputs=lambda given: {"image": _pil(16)},
        after=_set(prompt_template_encode_start_idx=60),
    ),
    "LDMPipeline": Sibling("DDIMPipeline", parts=_latents(3)),
    "LDMSuperResolutionPipeline": Sibling(
        "DDIMPipeline", parts=_latents(6), inputs=lambda given: {"image": _picture(32)}
    ),
    "LTX2InContextPipeline": Sibling(
        "LTX2InContextPipeline",
        inputs=lambda given: {
            **dict.fromkeys(("stg_scale", "audio_stg_scale", "guidance_rescale", "audio_guidance_rescale"), 0.0),
            **dict.fromkeys(("modality_scale", "audio_modality_scale"), 1.0),
        },
        note="measured without its STG, modality guidance and rescale; beside them it is refused",
    ),
    "MusicLDMPipeline": Sibling("MusicLDMPipeline", after=_features),
    "LTXI2VLongMultiPromptPipeline": Sibling("LTXPipeline", inputs=lambda given: {"cond_image": _picture(32)}),
    "LongCatImagePipeline": Sibling(
        "QwenImageEditPipeline",
        parts=_longcat,
        inputs=lambda given: {"enable_prompt_rewrite": False, "guidance_scale": 4.5, "output_type": "latent"},
    ),
    "LongCatImageEditPipeline": Sibling(
        "QwenImageEditPipeline", parts=_longcat, inputs=lambda given: {"guidance_scale": 4.5, "output_type": "latent"}
    ),
    "LucyEditPipeline": Sibling("WanVideoToVideoPipeline", parts=_wider()),
    "PNDMPipeline": Sibling(
        "DDIMPipeline", parts=_pixels("PNDMScheduler"), inputs=lambda given: {"num_inference_steps": 4}
    ),
    "QwenImageControlNetInpaintPipeline": Sibling(
        "QwenImageControlNetPipeline",
        parts=lambda parts: {"controlnet": _like(parts["controlnet"], extra_condition_channels=4)},
        inputs=lambda given: {"control_mask": _mask(32), "true_cfg_scale": 3.0},
    ),
    "QwenImageEditInpaintPipeline": Sibling(
        "QwenImageEditPipeline", inputs=lambda given: {"mask_image": _pil(32, "L"), "strength": 1.0}
    ),
    "QwenImageLayeredPipeline": Sibling(
        "QwenImageEditPipeline",
        parts=lambda parts: {
            "transformer": _like(parts["transformer"], use_additional_t_cond=True, use_layer3d_rope=True)
        },
        inputs=lambda given: {"image": _pil(32, "RGBA"), "layers": 2, "resolution": 640},
    ),
    "ScoreSdeVePipeline": Sibling("DDIMPipeline", parts=_pixels("ScoreSdeVeScheduler")),
    "SemanticStableDiffusionPipeline": Sibling("StableDiffusionPipeline"),
    "StableAudio3AudioToAudioPipeline": Sibling(
        "StableAudio3Pipeline", inputs=lambda given: {"audio": torch.rand(1, 2, 64) - 0.5}
    ),
    "StableAudio3InpaintPipeline": Sibling(
        "StableAudio3Pipeline",
        parts=lambda parts: {"transformer": _like(parts["transformer"], local_add_cond_dim=9)},
        inputs=lambda given: {
            "audio": torch.rand(1, 2, 64) - 0.5,
            "mask_start_seconds": 0.25,
            "mask_end_seconds": 0.75,
        },
    ),
    "StableDiffusionInpaintPipelineLegacy": Sibling(
        "StableDiffusionPipeline", inputs=lambda given: {"image": _picture(64), "mask_image": _mask(64)}
    ),
    "StableDiffusionPipelineSafe": Sibling("StableDiffusionPipeline"),
    "StableDiffusionUpscalePipeline": Sibling(
        "StableDiffusionPipeline", parts=_upscaling, inputs=lambda given: {"image": _picture(32)}
    ),
    "StableDiffusionXLControlNetUnionPipeline": Sibling(
        "StableDiffusionXLControlNetPipeline", parts=_union, inputs=_union_inputs
    ),
    "StableDiffusionXLControlNetUnionImg2ImgPipeline": Sibling(
        "StableDiffusionXLControlNetImg2ImgPipeline", parts=_union, inputs=_union_inputs
    ),
    "StableDiffusionXLControlNetUnionInpaintPipeline": Sibling(
        "StableDiffusionXLControlNetPipeline",
        parts=_union,
        inputs=lambda given: {"image": _picture(64), "mask_image": _mask(64), **_union_inputs(given)},
    ),
    "TextToVideoZeroPipeline": Sibling(
        "StableDiffusionPipeline", inputs=lambda given: {"video_length": 2, "t0": 1, "t1": 2, "num_inference_steps": 3}
    ),
    "ZImageControlNetPipeline": Sibling(
        "ZImagePipeline", parts=_z_control(0), inputs=lambda given: {"control_image": _picture(32)}
    ),
    "ZImageControlNetInpaintPipeline": Sibling(
        "ZImagePipeline",
        parts=_z_control(17),
        inputs=lambda given: {"control_image": _picture(32), "image": _picture(32), "mask_image": _mask(32)},
    ),
}
