"""Readers: what a model's attention says about its inputs. They edit nothing in attention. Imported on first use."""

from .._lazy import lazy

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "Relevance": "chains",
        "AttentionPrompting": "attention_prompting",
        "CARVE": "carve",
        "ControlMLLM": "controlmllm",
        "Controlled": "controlmllm",
        "Grounded": "tag",
        "NormMap": "norms",
        "Prompted": "attention_prompting",
        "RefAM": "refam",
        "Referred": "refam",
        "Refined": "carve",
        "Region": "tag",
        "SoundMaps": "sound",
        "TAG": "tag",
        "flow": "chains",
        "in_words": "sentences",
        "norm_maps": "norms",
        "rollout": "chains",
        "sentence": "sentences",
        "signals": "sentences",
        "sound_maps": "sound",
        "trace_view": "sentences",
    },
)
