"""The sweep: its tables are those of the installed libraries, a sample of them holds, and what it measures with can fail."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import nn

from attnsteer import HeadGate, sites, steer
from attnsteer.testing.sweep import PARTS, Row, Table, report, runner
from attnsteer.testing.sweep import transformers as part
from attnsteer.testing.sweep.checkout import moved
from attnsteer.testing.sweep.watch import watching

TABLES = {name: table for name in PARTS if (table := Table.load(name)).rows}
# One of each kind: the interface, gates beside queries, an indexer, SDPA called, written out, windows, relative positions, an
# encoder with a decoder, images, speech.
SAMPLE = ("llama", "qwen3_next", "deepseek_v32", "falcon", "bloom", "swin", "deberta-v2", "t5", "llava", "whisper")


@pytest.mark.parametrize("name", TABLES)
def test_the_table_is_one_of_the_installed_version(name: str) -> None:
    versions = importlib.import_module(f"attnsteer.testing.sweep.{name}").versions()
    assert TABLES[name].versions == versions, f"run python -m attnsteer.testing.sweep {name}, and commit what it writes"


@pytest.mark.parametrize("name", SAMPLE)
def test_a_sample_measures_as_the_table_says(name: str) -> None:
    stored, row = TABLES["transformers"].rows[name], part.measure(name)
    assert (row.verdict, row.sites, row.heads) == (stored.verdict, stored.sites, stored.heads), row
    assert row.verdict == "exact"


def test_the_tables_have_every_type_and_a_reason_for_what_is_not_exact() -> None:
    rows = TABLES["transformers"].rows
    assert sorted(rows) == part.names()
    assert TABLES["transformers"].counts()["exact"] >= 300
    for row in rows.values():
        assert row.verdict in ("exact", "no softmax attention") or row.reason, row
        assert row.verdict != "wrong", row


def test_the_page_is_the_one_of_the_tables(tmp_path) -> None:
    written = report.write(PARTS, tmp_path / "page.md")
    assert written.read_text(encoding="utf-8") == report.DOCS.read_text(encoding="utf-8")


class Written(nn.Module):
    """Softmax attention by hand, of two heads."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = x.unflatten(-1, (2, 4)).transpose(1, 2)
        maps = torch.nn.functional.dropout((q @ q.transpose(-1, -2)).softmax(-1), 0.0)
        router = x.softmax(-1)
        return torch.matmul(maps, q).transpose(1, 2).flatten(2) + router


def test_the_watch_sees_products_of_maps_and_closes_a_head() -> None:
    module, x = nn.Sequential(Written()), torch.randn(1, 3, 8)
    with watching(module, {"0": (2, 1)}) as watch:
        out = module(x)
    assert [(s.owner, s.how, s.shape) for s in watch.seen] == [("0", "softmax", (1, 2, 3, 4))]
    plain = module(x)
    assert torch.equal(out[..., :4], plain[..., :4])
    assert torch.equal(out[..., 4:], x.softmax(-1)[..., 4:])


def test_a_wrong_edit_is_a_wrong_row(monkeypatch) -> None:
    """The comparison can fail: gates that close another head."""
    real = part.gate
    monkeypatch.setattr(
        part, "gate", lambda site, gates: real(site, {(h + 1) % site.heads: g for h, g in gates.items()})
    )
    row = part.measure("gpt2")
    assert row.verdict == "wrong" and row.reason.startswith("gate ")


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_tests_of_older_versions_import_from_where_things_are_today() -> None:
    text = "from diffusers.pipelines.unclip.text_proj import A\nfrom src.diffusers.utils import B\nimport diffusers.pipelines.wan"
    assert moved(text, frozenset({"unclip"})).split("\n") == [
        "from diffusers.pipelines.deprecated.unclip.text_proj import A",
        "from diffusers.utils import B",
        "import diffusers.pipelines.wan",
    ]


def test_what_dies_or_takes_too_long_is_a_row_that_says_so() -> None:
    def measure(name: str) -> Row:
        if name == "endless":
            while True:
                pass
        raise RuntimeError(name)

    found = {row.name: row.reason for row in runner.rows(measure, ["endless", "dead"], timeout=1)}
    assert found == {"endless": "it took more than 1 s of processor time", "dead": "exit 1"}


def test_a_type_without_attention_and_a_type_that_is_refused() -> None:
    assert part.measure("mamba").verdict == "no softmax attention"
    row = part.measure("longformer")
    assert row.verdict == "refused" and "multiplied no softmax" in row.reason
    model = part.build("longformer")
    with pytest.raises(TypeError), steer(model, HeadGate({(0, 0): 0.0})):
        model(input_ids=torch.ones(1, 8, dtype=torch.long))
    assert len(sites(model)) == 2
