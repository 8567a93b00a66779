"""How the sweep builds a pipeline of diffusers small, without a network.

The components and inputs stand in the library's own tests, so a checkout of diffusers is needed, named by the environment variable
DIFFUSERS_CHECKOUT; text encoders and tokenizers that they would download are small random ones here.
"""

from __future__ import annotations

import builtins
import contextlib
import functools
import importlib
import inspect
import os
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

from ..weights import randomize_
from .diffusers import stand_in
from .pipeline_siblings import SIBLINGS

# Names that tests of older versions import from transformers, and schedulers that need a package, with what does here.
RENAMED = {"DPTFeatureExtractor": "DPTImageProcessor", "CLIPFeatureExtractor": "CLIPImageProcessor"}
STAND_INS = {"CosineDPMSolverMultistepScheduler": "EDMDPMSolverMultistepScheduler"}
# Models whose width the tests of pipelines count on.
SIZES: dict[str, dict[str, Any]] = {
    "bert": {"hidden_size": 32},
    "clip": {"hidden_size": 32},
    "gemma3": {"text_config": {"hidden_size": 32}, "vision_config": {"hidden_size": 32}},
    "llama": {"hidden_size": 16, "head_dim": 4},
    "siglip_vision_model": {"hidden_size": 32},
    "qwen3_vl": {"text_config": {"hidden_size": 16}, "vision_config": {"out_hidden_size": 16}},
    "qwen2_vl": {
        "text_config": {
            "hidden_size": 16,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
        },
        "vision_config": {"hidden_size": 16},
    },
}
NO_TEST = "no test of the library builds it small"
# Pipelines without a test of which more is known, by their code.
WITHOUT = {
    "DiffusionGemmaPipeline": "its model is a language model of transformers, which is steered by itself",
    "FluxPriorReduxPipeline": "it makes embeddings in one pass, without a denoiser",
    "LLaDA2Pipeline": "its model is a language model of transformers, which is steered by itself",
    "LTX2LatentUpsamplePipeline": "it enlarges latents by convolutions, without a denoiser",
    "AudioDiffusionPipeline": "its component Mel needs librosa, which is not installed",
    "Ideogram4Pipeline": "its prompt goes through a Qwen3-VL by a chat template, of which there is no small one; what comes after "
    "its text encoder is measured as the modular family ideogram4",
    "Kandinsky6SRPipeline": "it cuts a video into tiles of 512 pixels or more for a VAE of its own, of which there is no "
    "small one; its denoiser is measured",
    "LTX2DFRTemporalRefinePipeline": "it refines what a temporal upsampler made, of which there is no small one; its denoiser "
    "and loop are those of LTX2DFRPipeline",
    "LTX2VideoDiffusionDecodePipeline": "it decodes latents by an autoencoder of its own, of which there is no small one",
    "RFD4ProteinaPipeline": "its denoiser takes coordinates of proteins, and nothing that is a latent; gates are measured at it, "
    "guidance and branches are refused by name",
    "SanaWMPipeline": "it asks for a camera's path beside a Gemma 2 and a first frame, of which there is no small set; its "
    "denoiser is measured",
    "VersatileDiffusionDualGuidedPipeline": "it exchanges the blocks of two UNets, the flat one of which has no small one",
}
DENOISERS = ("unet", "transformer", "transformer_2", "prior_prior", "prior", "decoder", "super_res_first", "image_unet")


def classes_in(path: Path) -> list[tuple[str, str, str]]:
    """(name, bases, body) of the classes of a module, read and not run."""
    parts = re.split(r"^class (\w+)(?:\(([^)]*)\))?:", path.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    return list(zip(parts[::3], (b or "" for b in parts[1::3]), parts[2::3], strict=True))


@functools.cache
def tests() -> dict[str, list[tuple[str, str]]]:
    """Pipeline class -> (test module, test class) that build it: those of today first."""
    checkout = Path(os.environ.get("DIFFUSERS_CHECKOUT", "."))
    found: dict[str, list[tuple[str, str]]] = {}
    for root in sorted(checkout.glob("tests*")):
        for path in sorted((root / "pipelines").rglob("test_*.py")):
            classes = classes_in(path)
            bases = {name: given for name, given, _ in classes}
            for name, _, body in classes:
                told = re.search(r"^    pipeline_class = (\w+)$", body, re.MULTILINE)
                if told:
                    # A wrapper in the same file stands for the class that it wraps.
                    built = bases.get(told[1], told[1])
                    module = ".".join(path.relative_to(checkout).with_suffix("").parts)
                    found.setdefault(built, []).append((module, name))
    return found


def _tokens(text: str) -> list[int]:
    """A number for each word, mark and line end, as many as templates expect; the smallest vocabularies have few entries."""
    parts = re.findall(r"<\|\w+\|>|\w+|\n|[^\w\s]", text)
    return [3 + sum((i + 1) * ord(c) for i, c in enumerate(part)) % 4 for part in parts] + [2]


@functools.cache
def _encoding() -> Any:
    from transformers import BatchEncoding

    class Encoding(BatchEncoding):
        """With positions for those who ask for them, as Kolors does; most models take none."""

        def __getitem__(self, item: Any) -> Any:
            if item == "position_ids" and item not in self.data:
                ids = self.data["input_ids"]
                return torch.arange(ids.shape[1]).expand_as(ids)
            return super().__getitem__(item)

    return Encoding


class Words:
    """Stands for any tokenizer or processor: a number for every word."""

    model_max_length = 77
    vocab_size = 1000
    image_token_id = video_token_id = audio_token_id = 9
    pad_token_id = bos_token_id = eos_token_id = unk_token_id = 0
    pad_token = bos_token = eos_token = "<p>"
    padding_side = "right"
    is_fast = False
    # Whether it pads in front.
    left = False
    chat_template = None
    image_token = "<image>"

    @property
    def tokenizer(self) -> Words:
        return self

    def __call__(self, text: Any = None, *args: Any, **kwargs: Any) -> Any:
        if text is None and kwargs.get("images") is not None:
            return _encoding()({"pixel_values": torch.full((1, 3, 224, 224), 0.5)})
        texts = [text] if isinstance(text, str) or text is None else list(text)
        texts = [t if isinstance(t, str) else str(t) for t in texts]
        limit = kwargs.get("max_length") or 10_000
        rows = [_tokens(t) for t in texts]
        length = kwargs.get("max_length") if kwargs.get("padding") == "max_length" else None
        length = length or (self.model_max_length if kwargs.get("padding") == "max_length" else max(map(len, rows)))
        length = min(length, limit)
        # What is asked stands behind the template.
        rows = [r[-length:] for r in rows]
        rows = [[0] * (length - len(r)) * self.left + r for r in rows]
        ids = torch.tensor([r + [0] * (length - len(r)) for r in rows])
        mask = (ids != 0).long()
        given = {"input_ids": ids, "attention_mask": mask}
        if kwargs.get("return_length"):
            given["length"] = torch.tensor([length] * len(rows))
        if kwargs.get("return_tensors") is None:
            given = {k: v.tolist() for k, v in given.items()}
            if isinstance(text, str):
                given = {k: v[0] for k, v in given.items()}
        return _encoding()(given)

    def apply_chat_template(self, messages: Any, *args: Any, **kwargs: Any) -> Any:
        text = " ".join(re.findall(r"\w+", str(messages)))
        if not kwargs.get("tokenize", True):
            return text
        if kwargs.get("return_dict") is False:
            return self([text])["input_ids"]
        one = kwargs.get("return_tensors") is None and not (messages and isinstance(messages[0], list))
        return self(text if one else [text], **kwargs)

    def pad(self, encoded: Any, max_length: int | None = None, **kwargs: Any) -> Any:
        rows = encoded["input_ids"]
        size = max_length or max(map(len, rows))
        ids = torch.tensor([[*r, *[0] * (size - len(r))] for r in rows])
        mask = torch.tensor([[1] * len(r) + [0] * (size - len(r)) for r in rows])
        return _encoding()({"input_ids": ids, "attention_mask": mask})

    def encode(self, text: str, *args: Any, **kwargs: Any) -> Any:
        return self(text)["input_ids"]

    def batch_decode(self, ids: Any, *args: Any, **kwargs: Any) -> list[str]:
        return ["word"] * len(ids)

    def decode(self, ids: Any, *args: Any, **kwargs: Any) -> str:
        return "word"

    def tokenize(self, text: str, *args: Any, **kwargs: Any) -> list[str]:
        return text.split()

    def convert_tokens_to_ids(self, tokens: Any) -> Any:
        return 3 if isinstance(tokens, str) else [3] * len(tokens)

    def __len__(self) -> int:
        return 100

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return {} if name.startswith("added_tokens") else mock.MagicMock()


def _words(name: str) -> Words:
    """In the place of a tokenizer of that class."""
    made = Words()
    made.left = name == "ChatGLMTokenizer"
    return made


def _config() -> Any:
    """That of the small T5 which most tests of the library load."""
    import transformers

    return transformers.T5Config(
        vocab_size=1000, d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4, relative_attention_num_buckets=8
    )


def _small(cls: type, *args: Any, **kwargs: Any) -> Any:
    """A small random model in the place of one that would be downloaded."""
    torch.manual_seed(0)
    if "ChatGLM" in cls.__name__:
        config = cls.config_class(
            num_layers=1, hidden_size=8, ffn_hidden_size=8, num_attention_heads=2, kv_channels=4, padded_vocab_size=1000
        )
        config.original_rope = True
        # Its own start is whatever the memory holds.
        model = randomize_(cls(config).eval(), 0)
        for module in model.modules():
            if "Norm" in type(module).__name__:
                module.weight.data.fill_(1.0)
        return model
    if "T5" in cls.__name__:
        return cls(_config()).eval()
    from .hints import CONFIGS
    from .small_configs import small

    kind = cls.config_class.model_type
    return cls(small(cls.config_class, SIZES.get(kind, CONFIGS.get(kind)))).eval()


@contextlib.contextmanager
def offline() -> Iterator[None]:
    import transformers
    from transformers.feature_extraction_utils import FeatureExtractionMixin
    from transformers.image_processing_base import ImageProcessingMixin
    from transformers.modeling_utils import PreTrainedModel
    from transformers.processing_utils import ProcessorMixin
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase

    words = classmethod(lambda cls, *args, **kwargs: _words(cls.__name__))
    patches = [mock.patch.object(c, "from_pretrained", words) for c in (PreTrainedTokenizerBase, ProcessorMixin)]
    patches += [
        mock.patch.object(getattr(transformers, n), "from_pretrained", words)
        for n in ("AutoTokenizer", "AutoProcessor")
    ]
    config = classmethod(lambda cls, *args, **kwargs: _config())
    patches.append(mock.patch.object(transformers.AutoConfig, "from_pretrained", config))
    # Cleaning of prompts, which the library leaves undefined where the package is not here.
    patches.append(mock.patch.object(builtins, "ftfy", types.SimpleNamespace(fix_text=str), create=True))
    patches += [
        mock.patch.object(c, "from_pretrained", classmethod(lambda cls, *args, **kwargs: cls()))
        for c in (FeatureExtractionMixin, ImageProcessingMixin)
    ]
    patches.append(mock.patch.object(PreTrainedModel, "from_pretrained", classmethod(_small)))
    for missing in ("parameterized", "requests_mock", "cv2", "safetensors.flax"):
        with contextlib.suppress(ImportError):
            importlib.import_module(missing)
            continue
        module = types.ModuleType(missing)
        module.parameterized = mock.MagicMock(expand=lambda *a, **k: lambda f: f)
        # It stays: `mock.patch.dict` would take every module that is imported meanwhile away again.
        sys.modules[missing] = module
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        yield


def randomized(pipe: Any) -> None:
    """Its parts in eval mode, its denoisers with weights that do something."""
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            stand_in(type(part))
            part.eval()
    for name in DENOISERS:
        if isinstance(getattr(pipe, name, None), nn.Module):
            randomize_(getattr(pipe, name), 0)


def fitted(pipe: Any) -> None:
    """Pictures get the size that its small models take, wherever that is told."""
    parts = pipe.components
    sizes = [
        getattr(getattr(getattr(parts.get(name), "config", None), "vision_config", None), "image_size", None)
        or getattr(getattr(parts.get(name), "config", None), "image_size", None)
        for name in ("image_encoder", "depth_estimator")
    ]
    size = next((s for s in sizes if isinstance(s, int)), None)
    for name in ("feature_extractor", "image_processor"):
        for key in ("size", "crop_size"):
            if size and key in vars(parts.get(name) or object):
                setattr(parts[name], key, {"height": size, "width": size})
    module = sys.modules[type(pipe).__module__]
    if hasattr(module, "calculate_dimensions"):
        # They work on pictures of a million pixels, whatever they are given.
        count = len(module.calculate_dimensions(1024, 1.0))
        module.calculate_dimensions = lambda area, ratio: (32, 32, None)[:count]


class Built:
    """One pipeline, built once, and the arguments of its calls, made afresh for each.

    Args:
        cls: the test class that has its parts. name: of the pipeline, where it is a sibling of the test's.
    """

    def __init__(self, cls: Any, name: str | None = None):
        self.case, self.sibling = object.__new__(cls), SIBLINGS.get(name or "")
        torch.manual_seed(0)
        make, kind = self.case.get_dummy_components, cls.pipeline_class
        parts = make("full_adapter") if "adapter_type" in inspect.signature(make).parameters else make()
        if "dummy" in kind.__module__:
            kind = _pipeline(kind.__name__)
        if self.sibling is not None:
            kind = _pipeline(name)
            parts = _taken(kind.__init__, parts | self.sibling.parts(parts))
        self.pipe = kind(**parts)
        self.pipe.set_progress_bar_config(disable=True)
        if self.sibling is not None:
            self.sibling.after(self.pipe)
        fitted(self.pipe)
        randomized(self.pipe)
        if hasattr(self.case, "get_dummy_inversion_inputs") and hasattr(self.pipe, "invert"):
            self.pipe.invert(**self.case.get_dummy_inversion_inputs("cpu"))
        self.inputs()

    def inputs(self) -> dict[str, Any]:
        """The arguments of one call, of two steps where they can be told."""
        make = self.case.get_dummy_inputs
        given = make("cpu") if "device" in inspect.signature(make).parameters else make()
        if "num_inference_steps" in given:
            given["num_inference_steps"] = 2
        if isinstance(given.get("strength"), float):
            given["strength"] = max(given["strength"], 0.8)
        if given.get("prompt") in ("", "."):
            given["prompt"] = "a red square"
        if "pag_scale" in given:
            # Its own guidance has rows of its own, which ours would perturb too.
            given["pag_scale"] = 0.0
        if given.get("true_cfg_scale") == 1.0 and "negative_prompt" in given:
            given["true_cfg_scale"] = 3.0
        if self.sibling is not None:
            given = _taken(type(self.pipe).__call__, given | self.sibling.inputs(given))
        return given


def _pipeline(name: str) -> Any:
    """A pipeline class of the library; the old ones have no name in it but their own module's."""
    import diffusers

    found = getattr(diffusers, name, None)
    # Without an optional package of the pipeline's, the name stands for an error.
    if found is not None and "dummy" not in found.__module__:
        return found
    root = Path(diffusers.__file__).parent
    for path in sorted((root / "pipelines").rglob("pipeline_*.py")):
        if f"class {name}(" in path.read_text(encoding="utf-8"):
            module = ".".join(path.relative_to(root).with_suffix("").parts)
            return getattr(importlib.import_module(f"diffusers.{module}"), name)
    raise AttributeError(f"diffusers has no {name}")


def _taken(function: Any, given: dict[str, Any]) -> dict[str, Any]:
    """What a function takes of these arguments."""
    names = inspect.signature(function).parameters
    return {key: value for key, value in given.items() if key in names}


def cases(module: str) -> Any:
    """A module of the library's tests."""
    if os.environ["DIFFUSERS_CHECKOUT"] not in sys.path:
        sys.path.insert(0, os.environ["DIFFUSERS_CHECKOUT"])
    import diffusers.utils.testing_utils as tools
    import transformers

    for name, other in RENAMED.items():
        if not hasattr(transformers, name):
            setattr(transformers, name, getattr(transformers, other))
    _restore(transformers)
    # Marks that tests of older versions have on their functions.
    vars(tools).setdefault("__getattr__", _mark)
    found = importlib.import_module(module)
    if hasattr(found, "load_image"):
        from PIL import Image

        found.load_image = lambda *args, **kwargs: Image.new("RGB", (64, 64), "red")
    for name, other in STAND_INS.items():
        if hasattr(found, name):
            import diffusers

            setattr(found, name, getattr(diffusers, other))
    return found


def _restore(transformers: Any) -> None:
    """What pipelines that diffusers still ships use of transformers, and what newer versions of it have taken away."""
    from diffusers import ModelMixin

    def clap(cls: Any, text_config: Any, audio_config: Any, **kwargs: Any) -> Any:
        return cls(text_config=text_config.to_dict(), audio_config=audio_config.to_dict(), **kwargs)

    def inverted(self: Any, mask: torch.Tensor, *_: Any) -> torch.Tensor:
        mask = mask[:, None, None] if mask.ndim == 2 else mask[:, None]
        return (1.0 - mask.float()) * torch.finfo(torch.float32).min

    if not hasattr(transformers.ClapConfig, "from_text_audio_configs"):
        transformers.ClapConfig.from_text_audio_configs = classmethod(clap)
    for owner in (ModelMixin, transformers.PreTrainedModel):
        for name in ("invert_attention_mask", "get_extended_attention_mask"):
            if name not in dir(owner):
                setattr(owner, name, inverted)
        if "get_head_mask" not in dir(owner):
            owner.get_head_mask = lambda self, mask, layers, *_: [None] * layers
    for owner in (transformers.CLIPTextModel, transformers.CLIPVisionModel):
        if not any(hasattr(c, n) for c in (owner,) for n in ("text_model", "vision_model")):
            # Set on an instance, a part of that name is found there first.
            owner.text_model = owner.vision_model = property(lambda self: self)


def _mark(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return lambda *given: given[0] if len(given) == 1 and callable(given[0]) else lambda f: f


def built(name: str) -> tuple[Built | None, str]:
    """The pipeline of that name, and what kept the first try from it."""
    reason = WITHOUT.get(name, NO_TEST)
    source = SIBLINGS[name].of if name in SIBLINGS else name
    for module, test in tests().get(source, []):
        try:
            cls = getattr(cases(module), test)
            if hasattr(cls, "get_dummy_components"):
                return Built(cls, name if name in SIBLINGS else None), ""
        except Exception as error:  # of the library's, or of what is not here
            reason = brief(error) if reason == NO_TEST else reason
    return None, reason


def brief(error: Exception) -> str:
    """An error in a table's cell."""
    return f"{type(error).__name__}: {str(error) or 'without a message'}"[:240]
