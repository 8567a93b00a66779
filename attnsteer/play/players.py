"""A model that a page plays with: what it can be asked, and what it answers before and after a method."""

from __future__ import annotations

import abc
import base64
import binascii
import io
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..capturing import capture
from ..errors import NeverFired, SelectionError, UnsupportedHost, brief, listing
from ..intervention import Intervention
from ..run.loaded import Loaded
from ..site import Site
from ..viz.axes import grid_of, shown_tokens
from ..viz.page import picture_uri
from ..where import Where
from .dials import TEXT, VISION, Choice, Dial, dial, image_dials
from .drawing import Stale, previewed, whole

# Characters and tokens of a prompt, likeliest answers that are shown, prompts that are remembered.
LONGEST, MOST, ANSWERS, KEPT = 20_000, 2048, 8, 16
STEPS, SEEDS = 50, 4
# Clients whose last turn is known.
CLIENTS = 64
# Pixels of a picture's longer side that a visitor may send.
LARGEST = 4096
WAIT = 120.0


class Busy(Exception):
    """Another client's request is being answered, and has been for long."""


class Player(abc.ABC):
    """One model, for one page. Requests are answered one after the other; each answer is of its own request alone.

    Args:
        loaded: the model. name: under which it is shown.
    """

    dials: tuple[Dial, ...] = ()
    sites: list[Site]

    def __init__(self, loaded: Loaded, name: str):
        self.loaded, self.name = loaded, name
        self._lock = threading.Lock()
        self._known: OrderedDict[Any, Any] = OrderedDict()

    def about(self) -> dict[str, Any]:
        """What the page shows before anything is asked."""
        return {"name": self.name, "kind": self.loaded.kind, "dials": [d.to_dict() for d in self.dials]}

    def answer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Before and after, for one request.

        Raises:
            SelectionError: it asks for what is not there. Busy: nobody's turn came within two minutes. Stale: its client asked
                for something else meanwhile.
        """
        begun = time.perf_counter()
        self._hear(request)
        if not self._lock.acquire(timeout=WAIT):
            raise Busy
        try:
            found = self._answer(request)
        finally:
            self._lock.release()
        return {**found, "ms": round(1000 * (time.perf_counter() - begun))}

    def _hear(self, request: Mapping[str, Any]) -> None:  # noqa: B027 (some never wait)
        """A request that may have to wait for its turn."""

    @abc.abstractmethod
    def _answer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """What the page shows for a request; each kind of model has its own."""

    def _remembered(self, key: Any, make: Any) -> Any:
        """Of the last requests, what does not depend on the method."""
        if key in self._known:
            self._known.move_to_end(key)
            return self._known[key]
        found = self._known[key] = make()
        while len(self._known) > KEPT:
            self._known.popitem(last=False)
        return found

    def _choice(self, request: Mapping[str, Any], count: int) -> Choice:
        spans = _pairs(request.get("spans", []), "spans")
        wrong = [s for s in spans if not 0 <= s[0] < s[1] <= count]
        if wrong:
            raise SelectionError(f"spans: {wrong[0]} is no (start, stop) among {count} tokens.")
        heads = _pairs(request.get("heads", []), "heads")
        # Said also where the method is off or waits for marks, and would not ask.
        there = {(s.layer, h) for s in self.sites for h in range(s.heads)}
        absent = [pair for pair in heads if pair not in there]
        if absent:
            raise SelectionError(f"heads: {absent[0]} is no (layer, head) of this model.")
        return Choice(spans, heads)

    def _method(self, request: Mapping[str, Any], choice: Choice) -> Intervention | None:
        return dial(self.dials, request.get("method")).method(request.get("value"), choice)


def _pairs(given: Any, name: str) -> tuple[tuple[int, int], ...]:
    whole = lambda v: isinstance(v, int) and not isinstance(v, bool)  # noqa: E731
    if (
        not isinstance(given, list)
        or len(given) > 4096
        or not all(isinstance(p, list) and len(p) == 2 and all(map(whole, p)) for p in given)
    ):
        raise SelectionError(f"{name}={brief(given)}: give a list of pairs of whole numbers.")
    return tuple((p[0], p[1]) for p in given)


def _text(request: Mapping[str, Any]) -> str:
    text = request.get("prompt")
    if not isinstance(text, str) or not text.strip():
        raise SelectionError("give a prompt.")
    if len(text) > LONGEST:
        raise SelectionError(f"the prompt has {len(text)} characters; {LONGEST} are the most.")
    if any("\ud800" <= c <= "\udfff" for c in text):
        raise SelectionError(
            "the prompt has half of a character (a lone surrogate), which no tokenizer reads; write it anew."
        )
    return text


class TextPlayer(Player):
    """A language model: the likeliest next tokens, and where the last row looks."""

    dials = TEXT
    example = (
        "a small red star , a large blue cross and a small green circle . question what colour is the cross ? options A green "
        "B red C blue D yellow answer"
    )

    def __init__(self, loaded: Loaded, name: str):
        super().__init__(loaded, name)
        self.sites = [s for s in loaded.sites() if s.kind == "self" and s.modality in ("text", None)] or list(
            loaded.sites()
        )
        self.where = Where(kinds="self")

    def about(self) -> dict[str, Any]:
        """With the heads."""
        sites = [{"layer": s.layer, "heads": s.heads} for s in self.sites]
        return {**super().about(), "sites": sites, "example": self.example, "scenes": 0, "where": "all heads"}

    def _inputs(self, request: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
        """(a key of the request's inputs, what is made of them)."""
        text = _text(request)
        return text, self._remembered(("inputs", text), lambda: self._encoded(text))

    def _encoded(self, text: str) -> dict[str, Any]:
        batch = self.loaded.tokenizer(text, return_tensors="pt", return_token_type_ids=False)
        return {"batch": self._fits(batch).to(self.loaded.device), "image": None, "picture": None}

    def _fits(self, batch: Any) -> Any:
        count = batch["input_ids"].shape[1]
        most = min(MOST, getattr(self.loaded.target.config.get_text_config(), "max_position_embeddings", MOST))
        if count > most:
            raise SelectionError(f"the prompt has {count} tokens; this model and page take {most}.")
        return batch

    def _pass(self, inputs: Mapping[str, Any], *methods: Intervention) -> tuple[Tensor, list[Tensor], bool]:
        """(probabilities of the next token [V], maps of the last row by site [heads, T], whether anything changed)."""
        fired, logits = True, None
        with torch.inference_mode():
            try:
                with capture(self.loaded.target, self.where, *methods, rows="last") as seen:
                    logits = self.loaded.target(**inputs["batch"]).logits[0, -1]
            except NeverFired:
                if logits is None:
                    raise
                fired = False
        rows = [seen.get(site, "map", sample=0)[:, -1] for site in seen.sites]
        return logits.float().softmax(dim=-1).cpu(), [r.float().cpu() for r in rows], fired

    def _answer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        key, inputs = self._inputs(request)
        ids = inputs["batch"]["input_ids"][0].tolist()
        choice = self._choice(request, len(ids))
        method = self._method(request, choice)
        before = self._remembered(("plain", key), lambda: self._pass(inputs))
        after = before if method is None else self._pass(inputs, method)
        top = dict.fromkeys(i for p in (before[0], after[0]) for i in p.topk(min(ANSWERS, len(p))).indices.tolist())
        order = sorted(top, key=lambda i: -max(float(before[0][i]), float(after[0][i])))[:ANSWERS]
        marked = [i for a, b in choice.spans for i in range(a, b)]
        return {
            "tokens": inputs.setdefault("words", self._words(ids)),
            "image": inputs["image"],
            "picture": inputs["picture"],
            "answers": [{"text": self._word(i), "before": _f(before[0][i]), "after": _f(after[0][i])} for i in order],
            "row": [_list(torch.cat(p[1]).mean(dim=0)) for p in (before, after)],
            "change": [_list((a - b).abs().sum(dim=-1) / 2) for a, b in zip(before[1], after[1], strict=True)],
            "mass": [[_list(r[:, marked].sum(dim=-1)) for r in p[1]] for p in (before, after)] if marked else None,
            "steered": method is not None,
            "changed": method is None or after[2],
            "method": "" if method is None else repr(method),
        }

    def _words(self, ids: list[int]) -> list[str]:
        from ..captured import Captured

        known = Captured(("map",))
        known.ids = [ids]
        return shown_tokens(known, 0, len(ids), None, self.loaded.tokenizer)

    def _word(self, token: int) -> str:
        return self._words([token])[0]


class VisionPlayer(TextPlayer):
    """A vision-language model: the same, about a picture whose places can be marked."""

    dials = VISION
    example = "question is there a green circle ? answer"

    def about(self) -> dict[str, Any]:
        """With the scenes that an embedded model knows."""
        return {**super().about(), "scenes": 40 if self.name.startswith("shapes-") else 0}

    def _inputs(self, request: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
        text, scene, sent = _text(request), request.get("scene"), request.get("image")
        if isinstance(sent, str) and sent:
            key = (text, sent)
        elif isinstance(scene, int) and not isinstance(scene, bool) and 0 <= scene < 10_000 and self.about()["scenes"]:
            key = (text, scene)
        else:
            raise SelectionError("give a picture" + (", or the number of a scene." if self.about()["scenes"] else "."))
        return key, self._remembered(("inputs", key), lambda: self._seen(*key))

    def _seen(self, text: str, image: str | int) -> dict[str, Any]:
        from ..run.tasks.prompts import with_image

        picture = _scene(image) if isinstance(image, int) else sent_picture(image)
        try:
            batch = self.loaded.processor(images=[picture], text=[with_image(self.loaded, text)], return_tensors="pt")
        except ValueError as error:
            # Two places for a picture, of which there is one.
            raise SelectionError(
                f"the prompt and one picture do not fit: {' '.join(str(error).split())[:300]}"
            ) from error
        batch = self._fits(batch).to(self.loaded.device)
        mark = getattr(self.loaded.target.config, "image_token_id", None)
        at = (batch["input_ids"][0] == mark).nonzero()[:, 0].tolist() if mark is not None else []
        grid = None
        if at and at[-1] - at[0] + 1 == len(at):
            try:
                grid = [at[0], *grid_of(len(at), None, "picture")]
            except SelectionError:
                grid = None
        return {"batch": batch, "image": grid, "picture": picture_uri(picture)}


class ImagePlayer(Player):
    """A diffusion pipeline: pictures of seeds, before and after."""

    def __init__(self, loaded: Loaded, name: str):
        super().__init__(loaded, name)
        sites = [s for s in loaded.sites() if s.kind in ("self", "joint")]
        layers = sorted({s.layer for s in sites})
        # The last third: where the embedded models' recipes guide; a visitor may choose heads instead.
        own = self.layers = layers[-max(1, len(layers) // 3) :]
        self.dials = image_dials(Where(layers=own, kinds=tuple({s.kind for s in sites if s.layer in own})))
        self.sites = sites
        # Client -> (the newest of its turns, its prompt, its steps).
        self._turns: OrderedDict[str, tuple[int, Any, Any]] = OrderedDict()
        self._hearing = threading.Lock()

    def about(self) -> dict[str, Any]:
        """With the heads."""
        sites = [{"layer": s.layer, "heads": s.heads} for s in self.sites]
        example = "a large red circle and a small blue star" if self.name.startswith("shapes-") else "a fox in the snow"
        where = f"all heads of layers {listing(self.layers)}"
        return {**super().about(), "sites": sites, "example": example, "steps": STEPS, "seeds": SEEDS, "where": where}

    def _answer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        text, choice = _text(request), self._choice({**request, "spans": []}, 0)
        seed, steps = request.get("seed"), request.get("steps", 20)
        for name, value, most in (("seed", seed, 2**31), ("steps", steps, STEPS)):
            if (
                not isinstance(value, int)
                or isinstance(value, bool)
                or not (0 if name == "seed" else 1) <= value <= most
            ):
                raise SelectionError(f"{name}={brief(value)}: give a whole number up to {most}.")
        stage = request.get("stage", "picture")
        if stage not in ("picture", "preview"):
            raise SelectionError(f"stage={brief(stage)}: there are picture, preview.")
        method, key = self._method(request, choice), (text, seed, steps)
        wanted = self._turn(request, key)
        # A run as it is serves all values of the slider: only another prompt, or another number of steps, makes it useless.
        before, moment = self._remembered(key, lambda: self._plain(key, lambda: wanted(True)))
        told = {
            "seed": seed,
            "stage": stage,
            "steered": method is not None,
            "method": "" if method is None else repr(method),
        }
        if stage == "preview":
            return {**told, **self._preview(key, moment, method)}
        after, changed = before, True
        if method is not None:
            image, changed, _ = whole(self.loaded.target, *key, method, wanted=wanted)
            after = picture_uri(image)
        return {**told, "before": before, "after": after, "changed": changed}

    def _turn(self, request: Mapping[str, Any], key: tuple[str, int, int]) -> Callable[..., bool]:
        """Whether a request is still wanted: until its client asks for something else; of a run as it is, for another prompt."""
        client, turn = request.get("client"), request.get("turn", 0)
        if client is None:
            return lambda plain=False: True
        if not isinstance(client, str) or len(client) > 64 or isinstance(turn, bool) or not isinstance(turn, int):
            raise SelectionError("client, turn: give a text of up to 64 characters, and a whole number.")

        def wanted(plain: bool = False) -> bool:
            newest, text, steps = self._turns.get(client, (turn, key[0], key[2]))
            return newest <= turn or (plain and (text, steps) == (key[0], key[2]))

        if not wanted():
            raise Stale
        return wanted

    def _hear(self, request: Mapping[str, Any]) -> None:
        client, turn = request.get("client"), request.get("turn", 0)
        if isinstance(client, str) and len(client) <= 64 and isinstance(turn, int):
            with self._hearing:
                text = request.get("prompt")
                if turn >= self._turns.get(client, (turn,))[0]:
                    kept = text if isinstance(text, str) and len(text) <= LONGEST else None
                    self._turns[client] = (turn, kept, request.get("steps", 20))
                    self._turns.move_to_end(client)
                while len(self._turns) > CLIENTS:
                    self._turns.popitem(last=False)

    def _plain(self, key: tuple[str, int, int], wanted: Callable[[], bool]) -> tuple[str, Any]:
        image, _, moment = whole(self.loaded.target, *key, wanted=wanted)
        return picture_uri(image), moment

    def _preview(self, key: tuple[str, int, int], moment: Any, method: Intervention | None) -> dict[str, Any]:
        """One step, before and after; without pictures where this pipeline's runs cannot be previewed."""
        pipe = self.loaded.target
        try:
            if moment is None:
                raise UnsupportedHost(f"{type(pipe).__name__}: its scheduler's steps are not seen; no previews.")
            before = self._remembered(("preview", key), lambda: picture_uri(previewed(pipe, *key, moment)[0]))
            after, changed = (before, True) if method is None else previewed(pipe, *key, moment, method)
        except UnsupportedHost as error:
            return {"before": None, "after": None, "changed": True, "why": " ".join(str(error).split())}
        after = after if isinstance(after, str) else picture_uri(after)
        return {"before": before, "after": after, "changed": changed, "step": moment.step + 1, "of": moment.steps}


def _scene(index: int) -> Any:
    from ..viz.sheet import as_image
    from ..zoo.shapes.questions import picture
    from ..zoo.shapes.render import render

    return as_image(render([picture("test", index)])[0])


def sent_picture(uri: str) -> Any:
    """A picture that a visitor sent, as a data URI.

    Raises:
        SelectionError: it is none, or too large.
    """
    from PIL import Image, UnidentifiedImageError

    head, comma, data = uri.partition(",")
    if not head.startswith("data:image/") or not comma:
        raise SelectionError("image: give a picture as a data URI.")
    try:
        image = Image.open(io.BytesIO(base64.b64decode(data, validate=True)), formats=["PNG", "JPEG", "WEBP", "GIF"])
        if max(image.size) > LARGEST:
            raise SelectionError(
                f"the picture is {image.size[0]} x {image.size[1]} pixels; {LARGEST} a side are the most."
            )
        return image.convert("RGB")
    except (binascii.Error, UnidentifiedImageError, Image.DecompressionBombError, OSError, ValueError) as error:
        if isinstance(error, SelectionError):
            raise
        raise SelectionError(f"the picture cannot be read ({type(error).__name__}).") from error


def _f(value: Tensor) -> float:
    return round(float(value), 5)


def _list(values: Tensor) -> list[float]:
    return [round(v, 5) for v in values.tolist()]


PLAYERS = {"lm": TextPlayer, "vlm": VisionPlayer, "image": ImagePlayer}


def player(model: str, dtype: str = "float32", device: str = "auto") -> Player:
    """The player of an embedded or fetched model, a folder, or a hub id.

    Raises:
        RecipeError: it is not there, or no model that can be loaded.
    """
    from ..recipe.schema import ZOO_KINDS, ModelSpec
    from ..run.models import load

    if model in ZOO_KINDS:
        kind = ZOO_KINDS[model]
        spec = ModelSpec(zoo=model, kind=kind, dtype=dtype, device=device)
    else:
        folder = _folder(model)
        kind = kind_of(folder)
        spec = ModelSpec(path=str(folder), kind=kind, dtype=dtype, device=device)
    return PLAYERS[kind](load(spec), model)


def _folder(model: str) -> Path:
    from ..run.models import snapshot

    path = Path(model).expanduser()
    if path.is_dir():
        return path.resolve()
    return snapshot(model, None, "lm")


def kind_of(folder: Path) -> str:
    """lm, vlm or image, from a model's config."""
    if (folder / "model_index.json").is_file():
        return "image"
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise SelectionError(
            f"{folder} is no model that can be read ({' '.join(str(error).split())[:200]})."
        ) from error
    return "lm" if type(config) in transformers.AutoModelForCausalLM._model_mapping else "vlm"
