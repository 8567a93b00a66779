"""What a recipe can say: the models behind the YAML, with every field described; nothing here loads torch.

What is said in one section against another is checked here too. `loading` reads the YAML, `checks` sees whether methods,
parameters, metrics and files exist.
"""

from __future__ import annotations

import hashlib
import json
import re
import string
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    PrivateAttr,
    field_validator,
    model_validator,
)

from ..errors import did_you_mean, listing
from . import yaml

SCHEMA_VERSION = 1
KINDS = ("lm", "vlm", "image")
# Which kinds of model a task can ask.
TASKS = {"choice": ("lm", "vlm"), "answer": ("lm", "vlm"), "caption": ("vlm",), "image": ("image",)}
# Arguments of the model's call that the run sets itself: one answer for each sample, and nothing beside it.
RESERVED = {
    "choice": (),
    "answer": ("num_return_sequences", "return_dict_in_generate"),
    "caption": ("num_return_sequences", "return_dict_in_generate"),
    "image": ("prompt", "generator", "output_type", "return_dict", "num_images_per_prompt"),
}
# Embedded models, and those that `attnsteer zoo fetch` gets, in whose place a random one stands with --tiny.
FETCHED = ("smollm2-135m", "gemma3-270m", "smollm2-llava")
ZOO_KINDS = {
    "shapes-lm": "lm",
    "shapes-lvlm": "vlm",
    "shapes-sd": "image",
    "shapes-mmdit": "image",
    "smollm2-135m": "lm",
    "gemma3-270m": "lm",
    "smollm2-llava": "vlm",
}
# Which tasks the sources of the shapes world and of the text tasks have samples for.
ZOO_TASKS = {
    "reading": ("choice", "answer"),
    "existence": ("answer", "choice"),
    "pairs": ("answer", "choice"),
    "captions": ("caption",),
    "layouts": ("image",),
    "prompts": ("image",),
    "facts": ("choice", "answer"),
    "passages": ("choice", "answer"),
    "sources": ("choice", "answer"),
    "reviews": ("choice", "answer"),
    "instructions": ("answer",),
}
FORMATS = {
    "choices": ("choice", "answer"),
    "pope": ("answer",),
    "mme": ("answer",),
    "captions": ("caption",),
    "questions": ("answer",),
    "prompts": ("image",),
    "boxes": ("image",),
}
CALIBRATED = "calibrated"
# Arguments of a model's call that load code, or objects that a text cannot be.
REFUSED = (
    "custom_generate",
    "trust_remote_code",
    "custom_pipeline",
    "generation_config",
    "assistant_model",
    "streamer",
)
# What a recipe may say of an engine of vLLM; others load code, or are the run's own.
ENGINE_OPTIONS = (
    "model",
    "revision",
    "max_model_len",
    "max_num_seqs",
    "max_num_batched_tokens",
    "tensor_parallel_size",
    "pipeline_parallel_size",
    "distributed_executor_backend",
    "gpu_memory_utilization",
    "enforce_eager",
    "enable_prefix_caching",
    "enable_chunked_prefill",
    "block_size",
    "quantization",
)
# What a digest leaves out: words about a run, not of it; and names of files, whose contents have hashes of their own.
WORDS = ("summary", "notes", "claims", "requires", "imports", "chosen")

Options = dict[str, JsonValue]
Name = Annotated[str, Field(min_length=1, max_length=200)]


class Spec(BaseModel):
    """Base: unknown fields and wrong types are errors, and nothing changes after it is made."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, populate_by_name=True, protected_namespaces=())


def one_of(spec: Spec, *names: str) -> None:
    """Raise unless exactly one of the fields is given."""
    given = [n for n in names if getattr(spec, n) is not None]
    if len(given) != 1:
        raise ValueError(
            f"give exactly one of {', '.join(names)}; there {'is ' + ' and '.join(given) if given else 'is none'}"
        )


class ModelSpec(Spec):
    """The model: exactly one of zoo, path, hub and vllm."""

    zoo: Name | None = Field(
        None,
        description="A model of attnsteer.zoo: shapes-lm, shapes-lvlm, shapes-sd, shapes-mmdit, smollm2-135m, gemma3-270m or "
        "smollm2-llava.",
    )
    path: Name | None = Field(None, description="A folder in the public format, relative to the recipe.")
    hub: Name | None = Field(None, description="A repository on the hub, as owner/name.")
    vllm: Name | Options | None = Field(
        None,
        description="The address of a server of vLLM, such as http://127.0.0.1:8000/v1; or options of an engine in this process: "
        "model (a folder relative to the recipe, or a repository on the hub), max_model_len, tensor_parallel_size, ...",
    )
    revision: Name | None = Field(None, description="Commit, tag or branch of the hub repository.")
    kind: Literal["lm", "vlm", "image"] = Field(
        description="Language model, vision-language model, or diffusion pipeline; checked against what is loaded."
    )
    architecture: Name | None = Field(
        None, description="The tiny random model that stands in with --tiny, by its name in attnsteer.testing."
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="Of the weights.")
    device: Annotated[str, Field(pattern=r"^(auto|cpu|mps|cuda(:[0-9]{1,3})?)$")] = Field(
        "auto", description="auto (CUDA where there is one), cpu, mps, cuda or cuda:N."
    )
    device_map: Name | None = Field(None, description="auto and the like, for models spread over devices.")

    @property
    def embedded(self) -> bool:
        """Whether it comes with the package, and is small already."""
        return self.zoo is not None and self.zoo not in FETCHED

    @property
    def name(self) -> str:
        """What it is called in tables."""
        engine = self.vllm.get("model") if isinstance(self.vllm, dict) else self.vllm
        return str(self.zoo or self.hub or self.path or engine)

    def _check_vllm(self) -> None:
        if self.vllm is None:
            return
        if self.kind != "lm":
            raise ValueError("vllm is for language models; kind is lm there")
        if isinstance(self.vllm, str):
            if not re.fullmatch(r"https?://[^\s/@?#]+(/[^\s?#]*)?", self.vllm):
                raise ValueError(f"vllm={self.vllm!r} is no address; give one such as http://127.0.0.1:8000/v1")
            return
        if not isinstance(self.vllm.get("model"), str):
            raise ValueError("vllm: an engine needs a model, a folder or a repository on the hub")
        wrong = next((n for n in self.vllm if n not in ENGINE_OPTIONS), None)
        if wrong is not None:
            raise ValueError(f"vllm: no option {wrong!r}; {_known(wrong, ENGINE_OPTIONS)}")

    @model_validator(mode="after")
    def _whole(self) -> ModelSpec:
        one_of(self, "zoo", "path", "hub", "vllm")
        self._check_vllm()
        if self.zoo is not None and self.zoo not in ZOO_KINDS:
            raise ValueError(f"no model {self.zoo!r} in the zoo; {_known(self.zoo, ZOO_KINDS)}")
        if self.zoo is not None and self.kind != ZOO_KINDS[self.zoo]:
            raise ValueError(f"{self.zoo} is a model of kind {ZOO_KINDS[self.zoo]}, not {self.kind}")
        if self.hub in ZOO_KINDS:
            raise ValueError(f"{self.hub} is a model of the zoo, which is not on the hub; write zoo: {self.hub}")
        if self.revision is not None and self.hub is None:
            raise ValueError("revision is for a model from the hub")
        if self.device_map is not None and self.device != "auto":
            raise ValueError("give device or device_map, not both")
        return self


class DataSpec(Spec):
    """The samples: exactly one of zoo, file and hub."""

    zoo: Name | None = Field(
        None,
        description="A source of the shapes world: reading, existence, pairs, captions, layouts or prompts; or in plain English: "
        "facts, passages, sources, reviews or instructions.",
    )
    file: Name | None = Field(None, description="A JSON or JSON Lines file, relative to the recipe.")
    hub: Name | None = Field(None, description="A data set on the hub, as owner/name; needs the extra `eval`.")
    format: Literal["choices", "pope", "mme", "captions", "questions", "prompts", "boxes"] | None = Field(
        None, description="What the rows of a file or of a hub data set are."
    )
    images: Name | None = Field(None, description="The folder of the images that rows name, relative to the recipe.")
    revision: Name | None = Field(None, description="Commit, tag or branch of the hub data set.")
    config: Name | None = Field(None, description="Configuration (subset) of the hub data set.")
    columns: dict[str, Name] = Field({}, description="Which column of the rows has which field: {question: query}.")
    split: Name = Field("test", description="The part of the data.")
    options: Options = Field({}, description="Of the source, such as {task: one-shot}.")
    start: int = Field(0, ge=0, le=10**9, description="The first sample.")
    limit: int | None = Field(None, ge=1, le=10**9, description="How many samples; null: all there are.")

    @model_validator(mode="after")
    def _whole(self) -> DataSpec:
        one_of(self, "zoo", "file", "hub")
        if self.zoo is not None:
            if self.zoo not in ZOO_TASKS:
                raise ValueError(f"no source {self.zoo!r} in the zoo; {_known(self.zoo, ZOO_TASKS)}")
            if self.format is not None or self.columns or self.images is not None:
                raise ValueError("format, columns and images are for files and hub data; a zoo source has its own")
            if self.limit is None:
                raise ValueError("a zoo source has no end; give a limit")
        elif self.format is None:
            raise ValueError(f"give the format of the rows: {', '.join(FORMATS)}")
        if self.hub is None and (self.revision is not None or self.config is not None):
            raise ValueError("revision and config are for hub data")
        return self


class InterventionSpec(Spec):
    """One method with its parameters."""

    method: Name = Field(description="A registered method (attnsteer methods).")
    params: Options = Field(
        {}, description="Hyper-parameters by name; {sample: KEY} takes the value from each sample of the batch."
    )
    zero: Options | None = Field(
        None,
        description="What is changed in params for the zero-strength control; null: what turns a shipped method off.",
    )
    heads: Name | dict[str, list[int] | dict[str, list[int]]] | None = Field(
        None,
        description='A HeadSet file relative to the recipe, {layer: [head, ...]} or {tower: {layer: [head, ...]}}, "calibrated", '
        'or "zoo:act".',
    )
    where: Options | None = Field(
        None, description="Fields of Where: layers, kinds, modules, phases, steps, branches, ..."
    )

    @field_validator("heads")
    @classmethod
    def _heads(cls, heads: Any) -> Any:
        rows = list(heads.items()) if isinstance(heads, dict) else []
        if any(isinstance(chosen, dict) for _, chosen in rows):
            loose = [layer for layer, chosen in rows if not isinstance(chosen, dict)]
            if loose:
                raise ValueError(f"layer {loose[0]} stands beside towers; name the tower of all heads, or of none")
            rows = [row for _, chosen in rows for row in chosen.items()]
        for layer, chosen in rows:
            if not re.fullmatch(r"[0-9]{1,6}", layer):
                raise ValueError(f"{layer!r} is not the index of a layer")
            if not chosen or any(not 0 <= h < 10**6 for h in chosen):
                raise ValueError(f"layer {layer} has the heads {chosen}; give at least one, counted from 0")
        return heads


class CalibrationSpec(Spec):
    """A search that runs before the evaluation, on other samples."""

    search: Name = Field(description="Of attnsteer.search: calibrate_act, headhunter, vhd or find_sink_dims.")
    data: DataSpec = Field(description="Its samples, from another split than the test's.")
    options: Options = Field({}, description="Arguments of the search.")
    top: int | None = Field(
        None, ge=1, le=10**6, description="How many of the best heads to keep; null: as the search says."
    )
    into: Name = Field(
        "heads", description='Where the result goes: "heads" (of interventions that say "calibrated"), or a parameter.'
    )


class ControlsSpec(Spec):
    """What the method is compared with besides the baseline."""

    zero: bool = Field(True, description="The method at zero strength, which must equal the baseline.")
    random_heads: int = Field(0, ge=0, le=100, description="Draws of random heads, as many as chosen ones.")
    random_spans: int = Field(
        0,
        ge=0,
        le=100,
        description="Draws of random spans of tokens, as many and as long as the marked ones (kind lm).",
    )
    random_from: Literal["layer", "where", "both"] = Field(
        "layer",
        description="Drawn from the layers of the chosen heads, as many in each; or from all heads that `where` allows; or both.",
    )
    spans: list[Name] = Field(
        [],
        max_length=10,
        description="Keys of the samples: what is marked in the place of `spans`, in an arm each, such as a random span.",
    )


class MetricSpec(BaseModel):
    """A metric by name, with its options beside it."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)

    name: Name = Field(description="Of attnsteer.evals.metrics.")

    @property
    def options(self) -> dict[str, Any]:
        """Its options."""
        return dict(self.model_extra or {})


class ClaimSpec(Spec):
    """A figure of the paper."""

    metric: Name = Field(description="The figure here that is the nearest, as metric.estimate.")
    baseline: float | None = Field(None, description="The paper's figure without the method.")
    value: float = Field(description="The paper's figure with the method.")
    unit: Name = Field("percent", description="percent, fraction, points, or the name of a scale.")
    source: Name = Field(description="Table and paper.")
    setting: str = Field("", description="Model and data of that figure.")


def _named(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


class Recipe(Spec):
    """A method, a model, samples, metrics and controls: one evaluation."""

    schema_: Literal[1] = Field(alias="schema", description="Version of this schema.")
    name: Annotated[str, Field(pattern=r"^[a-z0-9_-]+(/[a-z0-9_-]+)*$", max_length=100)] = Field(
        description="Method and task, such as act/shapes-reading."
    )
    summary: Annotated[str, Field(pattern=r"^[^\n]*$", max_length=300)] = Field("", description="One line.")
    requires: list[Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)*$")]] = Field(
        [], description="Modules that a run needs beyond the required ones; not asked for with --tiny."
    )
    imports: list[Annotated[str, Field(pattern=r"^[^\n]+\.py$", max_length=500)]] = Field(
        [],
        max_length=20,
        description="Files of Python that register its methods, relative to the recipe. Not imported without the user's word.",
    )
    model: ModelSpec = Field(description="The model.")
    data: DataSpec = Field(description="The samples.")
    task: Literal["choice", "answer", "caption", "image"] = Field(description="What the model is asked to do.")
    prompt: Annotated[str, Field(max_length=20_000)] | None = Field(
        None, description="Template of the prompt with {question}, {choices}, ... for file and hub data."
    )
    interventions: list[InterventionSpec] = Field(min_length=1, max_length=20, description="Methods, applied in order.")
    calibration: CalibrationSpec | None = Field(None, description="A search before the evaluation.")
    baseline: Options = Field({}, description="Changes of decoding for the baseline; empty: the same model, unsteered.")
    controls: ControlsSpec = Field(ControlsSpec(), description="Other arms.")
    decoding: Options = Field({}, description="Arguments of generate, or of the pipeline's call.")
    metrics: list[Annotated[MetricSpec, BeforeValidator(_named, json_schema_input_type=str | MetricSpec)]] = Field(
        min_length=1, max_length=20, description="Names of metrics, or {name: ..., option: ...}."
    )
    primary: Annotated[str, Field(pattern=r"^[a-z0-9_]+\.[A-Za-z0-9_.-]+$")] = Field(
        description="The figure of the headline, as metric.estimate."
    )
    seeds: list[Annotated[int, Field(ge=0, lt=2**31)]] = Field([0], min_length=1, max_length=100, description="Seeds.")
    batch_size: int = Field(16, ge=1, le=10_000, description="Samples per batch.")
    share: Literal["off", "auto"] = Field(
        "off", description="Whether arms that differ in values per sample answer together, in one batch: off or auto."
    )
    prefix: Literal["off", "shared"] = Field(
        "off",
        description="Whether what prompts of a batch begin with (all, or those about one image) is read once: off or shared.",
    )
    sweep: dict[str, list[JsonValue]] = Field(
        {}, description="Values by path (interventions.0.params.beta): every combination is a point."
    )
    tiny: Options = Field(
        {},
        description="Values by path for --tiny, where those of the real model do not fit a tiny one (heads, layers).",
    )
    claims: list[ClaimSpec] = Field([], description="The paper's figures.")
    chosen: Name | None = Field(
        None,
        description="Where strength, heads and the like were chosen: a split other than the test's, `published` (the paper's "
        "own), `unsearched` (fixed before any run), or `partly` (some on such a split, the rest not); null: figures are "
        "marked as tuned on the test.",
    )
    notes: str = Field("", description="Known deviations from the paper.")

    _source: Path | None = PrivateAttr(None)

    @property
    def source(self) -> Path | None:
        """The file that it was read from."""
        return self._source

    @property
    def folder(self) -> Path:
        """What its relative paths are relative to."""
        return self._source.parent if self._source is not None else Path()

    def import_paths(self) -> list[Path]:
        """The files of `imports`."""
        return [self.folder / name for name in self.imports]

    @field_validator("decoding", "baseline")
    @classmethod
    def _decoding(cls, decoding: dict[str, Any]) -> dict[str, Any]:
        for name in decoding:
            if name in REFUSED:
                raise ValueError(f"{name} is not for a recipe: it brings code or objects from elsewhere")
        return decoding

    @field_validator("prompt")
    @classmethod
    def _prompt(cls, prompt: str | None) -> str | None:
        if prompt is not None:
            template_fields(prompt)
        return prompt

    @model_validator(mode="after")
    def _whole(self) -> Recipe:
        if self.model.kind not in TASKS[self.task]:
            kinds = " or ".join(TASKS[self.task])
            raise ValueError(f"the task {self.task} needs a model of kind {kinds}; model.kind is {self.model.kind}")
        tasks = ZOO_TASKS[self.data.zoo] if self.data.zoo is not None else FORMATS[self.data.format or ""]
        if self.task not in tasks:
            raise ValueError(
                f"data of {self.data.zoo or self.data.format} is for the task {' or '.join(tasks)}, not {self.task}"
            )
        if self.prompt is not None and self.data.zoo is not None:
            raise ValueError("prompt is for file and hub data; a zoo source has its own prompts")
        names = [m.name for m in self.metrics]
        if len(set(names)) != len(names):
            raise ValueError(f"metrics: {listing(names)} has a name twice")
        if self.primary.partition(".")[0] not in names:
            raise ValueError(f"primary: {self.primary!r} is of none of the metrics {', '.join(names)}")
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError("seeds: one is given twice")
        if self.chosen is not None and self.chosen == self.data.split:
            raise ValueError(
                f"chosen: {self.chosen!r} is the split of the test; what was chosen on it is tuned on the test: leave it out"
            )
        self._whole_calibration()
        return self

    def _whole_calibration(self) -> None:
        asked = [i for i, spec in enumerate(self.interventions) if spec.heads == CALIBRATED]
        if self.calibration is None:
            if asked:
                raise ValueError(f"interventions.{asked[0]}.heads is calibrated, but there is no calibration section")
            return
        if self.calibration.into == "heads" and not asked:
            raise ValueError('calibration finds heads, but no intervention has "heads: calibrated"')
        if same_samples(self.data, self.calibration.data):
            raise ValueError(
                f"the calibration split is the test split ({self.data.split}); search on another one, or what is "
                "found there is tested on itself"
            )

    def dump(self) -> dict[str, Any]:
        """All fields as plain data, in the order of the schema."""
        return self.model_dump(mode="json", by_alias=True)

    def canonical(self) -> str:
        """The YAML of all fields: equal recipes have equal texts, and it loads as the same recipe."""
        return yaml.dump(self.dump())

    def digest(self) -> str:
        """SHA-256, in hex, of all that can change a record or a figure; texts and claims are left out."""
        found = {k: v for k, v in self.dump().items() if k not in WORDS}
        # What was not asked for is as none: runs of recipes without it go on.
        if found["prefix"] == "off":
            del found["prefix"]
        found["controls"] = {k: v for k, v in found["controls"].items() if k != "random_spans" or v}
        found["model"] = {k: v for k, v in found["model"].items() if k != "vllm" or v is not None}
        return digest(found)


def digest(value: Any) -> str:
    """SHA-256, in hex, of plain data."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def same_samples(one: DataSpec, other: DataSpec) -> bool:
    """Whether two sections draw from the same samples."""
    first, second = (d.model_dump(include={"zoo", "file", "hub", "config", "split"}) for d in (one, other))
    if first != second:
        return False
    ends = [d.start + d.limit if d.limit is not None else None for d in (one, other)]
    apart = (ends[0] is not None and ends[0] <= other.start) or (ends[1] is not None and ends[1] <= one.start)
    return not apart


def template_fields(template: str) -> tuple[str, ...]:
    """The fields of a prompt template.

    Raises:
        ValueError: it is not one, or has a field that is more than a name.
    """
    found = []
    for _, name, form, conversion in string.Formatter().parse(template):
        if name is None:
            continue
        if not name.isidentifier() or form or conversion:
            raise ValueError(f"the field {{{name}}} is not a plain name; {{question}} and the like are allowed")
        found.append(name)
    return tuple(dict.fromkeys(found))


def _known(name: str, known: Iterable[str]) -> str:
    return f"there are {', '.join(known)}.{did_you_mean(name, known)}"


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a recipe, for editors."""
    schema = Recipe.model_json_schema(by_alias=True)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "attnsteer recipe", **schema}
