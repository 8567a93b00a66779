"""lmms-eval on a steered model, in lmms-eval's own environment (it cannot share one with a CPU build of torch).

    python lmms_eval_attnsteer.py --model llava_hf --tasks pope --batch_size 1 --output_path logs \\
        --model_args pretrained=llava-hf/llava-1.5-7b-hf,steer=DIR

All arguments are lmms-eval's own but `steer`: the folder or hub id where `save_pretrained` wrote an intervention, or several,
separated by os.pathsep (":"). The model class keeps its name, because tasks choose prompts by it; its `model` has to be a
transformers model. Written for lmms-eval 0.7.2 (EvolvingLMMs-Lab/lmms-eval at 75571cf).
"""

from __future__ import annotations

import argparse
import os
import sys
import types
from typing import Any

import attnsteer
from attnsteer.errors import AttnSteerError, UnsupportedHost


def steered(base: type) -> type:
    """A model class of lmms-eval that takes `steer`, and steers its model while it generates."""

    class Steered(base):
        def __init__(self, steer: str, **options: Any):
            super().__init__(**options)
            folders = [folder for folder in str(steer).split(os.pathsep) if folder]
            self.interventions = [attnsteer.Intervention.from_pretrained(folder) for folder in folders]
            self.audit = None
            # Whatever cannot be steered is refused now. An empty `steer` is refused too: leave it out and use the class itself.
            attnsteer.steer(self.model, *self.interventions, control=True).remove()

        def generate_until(self, requests: list[Any]) -> list[str]:
            return self._generate(super().generate_until, requests)

        def generate_until_multi_round(self, requests: list[Any]) -> list[str]:
            return self._generate(super().generate_until_multi_round, requests)

        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            raise UnsupportedHost(
                f"{base.__name__} scores an answer in one pass with its prompt, so the answer would be steered, and counted, as "
                "part of the prompt. Take a task that generates."
            )

        def _generate(self, ask: Any, requests: list[Any]) -> list[str]:
            model, failed = self.model, []
            original, own = model.generate, vars(model).get("generate")

            def generate(_: Any, *args: Any, **kwargs: Any) -> Any:
                try:
                    return original(*args, **kwargs)
                except AttnSteerError as error:
                    failed.append(error)
                    raise

            # Some classes log an error in generation and go on with an empty answer.
            model.generate = types.MethodType(generate, model)
            try:
                with attnsteer.steer(model, *self.interventions) as run:
                    answers = ask(requests)
                    if failed:
                        raise failed[0]
            finally:
                del model.generate
                if own is not None:
                    model.generate = own
            self.audit = run.audit
            print(run.audit, file=sys.stderr)
            return answers

    Steered.__name__ = Steered.__qualname__ = f"Steered{base.__name__}"
    return Steered


def register(name: str) -> type:
    """Put the steered class in the place of lmms-eval's class of this name."""
    from lmms_eval.models import MODEL_REGISTRY_V2, get_model
    from lmms_eval.models.registry_v2 import ModelManifest

    cls = steered(get_model(name))
    # lmms-eval imports a class by its path.
    sys.modules[__name__].Steered = cls
    kind = "simple_class_path" if cls.is_simple else "chat_class_path"
    MODEL_REGISTRY_V2.register_manifest(ModelManifest(name, **{kind: f"{__name__}.Steered"}), overwrite=True)
    return cls


def main() -> None:
    """lmms-eval's command line."""
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    parser.add_argument("--model", required=True)
    register(parser.parse_known_args()[0].model)
    from lmms_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
