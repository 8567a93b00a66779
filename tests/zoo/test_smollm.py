"""The README's example on the real checkpoint, where it was fetched."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from attnsteer import steer, zoo
from attnsteer.evals.continuations import score_continuations
from attnsteer.run.tasks.prompts import continuations

NAME = "smollm2-135m"
README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


@pytest.mark.skipif(NAME not in zoo.present(), reason=f"{NAME} is not fetched (attnsteer zoo fetch {NAME})")
def test_the_first_screen_of_the_readme() -> None:
    quoted = " ".join(re.findall(r"^> (.*)$", README, re.M)).removesuffix(" ...")
    (marked,) = re.findall(r"\*\*(.*)\*\*", quoted)
    (names,) = re.findall(r"^\| \| (Phnom Penh) \| (Beirut) \|$", README, re.M)
    shown = [[float(v) for v in row] for row in re.findall(r"^\| [^|]* \| ([\d.]+) % \| ([\d.]+) % \|$", README, re.M)]
    assert len(shown) == 2
    model, tokenizer = zoo.load(NAME)
    prompt, choices = continuations(tokenizer, quoted.replace("**", ""), names)
    found = [score_continuations(model, [prompt], [choices])]
    method = zoo.preset(NAME, "SpotLight", spans=[[marked]], tokenizer=tokenizer)
    with steer(model, method) as run:
        found.append(score_continuations(model, [prompt], [choices], run))
    for (own,), printed in zip(found, shown, strict=True):
        chances = 100 * torch.tensor([s.log_likelihood for s in own]).softmax(0)
        assert chances.tolist() == pytest.approx(printed, abs=0.5)
