"""The page of a capture, its data, projection and exporters, against slow definitions."""

from __future__ import annotations

import json
import math
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from attnsteer.analysis.table import Column, HeadTable
from attnsteer.captured import Captured
from attnsteer.errors import SelectionError, SerializationError
from attnsteer.viz import joint_projection, to_bertviz, to_circuitsvis, view, viewer
from attnsteer.viz.page import script_json
from tests.viz.captures import captured, causal, take, text

HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=alert(1)>"


def decoded(blob: bytes, shape: tuple[int, ...]) -> torch.Tensor:
    """As the page reads it."""
    raw = torch.frombuffer(bytearray(zlib.decompress(blob)), dtype=torch.uint8)
    return (raw.reshape(shape).double() / 255) ** 2


def test_maps_come_out_as_they_went_in() -> None:
    before, after = text(0), text(1)
    found = viewer.collect(before, after=after)
    assert found.data["arms"] == ["before", "after"] and [s["label"] for s in found.data["sites"]] == ["0", "1"]
    for a, arm in enumerate((before, after)):
        for s in range(2):
            own = decoded(found.later[f"m-{a}-0-{s}"], (3, 7, 7))
            assert float((own - arm.get(s, "map", sample=0)).abs().max()) < 0.004
    assert len(found.first["t-0-0"]) == 2 * 3 * 7 * 7
    axis = found.data["axes"][0]
    assert axis["n"] == 7 and axis["words"] == [f"#{i}" for i in range(5, 12)] and len(found.data["axes"]) == 1


def test_of_many_maps_the_strongest_keys_of_each_row_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(viewer, "WHOLE", 0)
    monkeypatch.setattr(viewer, "KEPT", 0)
    given = captured(take(causal(3, n=12)))
    found = viewer.collect(given)
    own, whole = decoded(found.later["m-0-0-0"], (3, 12, 12)), given.get(0, "map", sample=0)
    kept = 0.0
    for h in range(3):
        for i in range(12):
            best = sorted(range(12), key=lambda j: -float(whole[h, i, j]))[: viewer.LEAST]
            kept += sum(float(whole[h, i, j]) for j in best)
            assert all(own[h, i, j] == 0 for j in range(12) if j not in best)
            assert all(abs(float(own[h, i, j] - whole[h, i, j])) < 0.004 for j in best)
    assert found.data["kept"]["keys"] == viewer.LEAST
    assert found.data["kept"]["share"] == pytest.approx(kept / 36, abs=1e-3)


def test_readings_are_those_of_the_rows_that_see_two_keys() -> None:
    one, two = text(0), text(1)
    readings = {r["name"]: r["values"] for r in viewer.collect(one, after=two).data["readings"]}
    A, B = (x.get(1, "map", sample=0).double() for x in (one, two))
    for h in range(3):
        rows = range(1, 7)
        entropy = sum(-p * math.log(p) for i in rows for p in A[h, i].tolist() if p > 0) / 6
        assert readings["entropy"][0][1][h] == pytest.approx(entropy, rel=1e-3)
        assert readings["first"][0][1][h] == pytest.approx(sum(float(A[h, i, 0]) for i in rows) / 6, rel=1e-3)
        assert readings["self"][0][1][h] == pytest.approx(sum(float(A[h, i, i]) for i in rows) / 6, rel=1e-3)
        assert readings["previous"][1][1][h] == pytest.approx(sum(float(B[h, i, i - 1]) for i in rows) / 6, rel=1e-3)
        far = sum(abs(float(A[h, i, j] - B[h, i, j])) for i in range(7) for j in range(7)) / 14
        assert readings["change"][0][1][h] == pytest.approx(far, rel=1e-3)
    assert "image" not in readings


def test_a_profile_colours_the_heads_it_speaks_of() -> None:
    heads = ((0, 0), (0, 2), (1, 1))
    top = torch.tensor([[0.25, 0.5, math.nan]]).double()
    bottom = torch.tensor([[1.0, 1.0, 0.0]]).double()
    table = HeadTable(
        heads, (2, 3), {"induction": Column(top.nan_to_num(0), bottom, "mass behind", torch.tensor([0.1, 0.2, 0.3]))}
    )
    (column,) = [r for r in viewer.collect(text(0), profile=table).data["readings"] if r["group"] == "head_profile"]
    assert column["values"] == [[[0.25, None, 0.5], None]] and column["about"] == "mass behind"
    assert column["chance"][0] == [pytest.approx(0.1), None, pytest.approx(0.2)]
    assert viewer.collect(text(0), profile={"readings": {"x": "y"}, "heads": [{"layer": 1, "head": 0, "x": 2}]})
    with pytest.raises(SelectionError, match="none of its heads"):
        viewer.collect(text(0), profile={"readings": {"x": "y"}, "heads": [{"layer": 7, "head": 0, "x": 2}]})
    with pytest.raises(SelectionError, match="HeadTable"):
        viewer.collect(text(0), profile={"heads": 3})


def image_maps(steps: int = 5, n: int = 16, m: int = 9) -> Captured:
    """Of a pipeline: 4 x 4 places over nine text places, in some steps, with a weak pass beside."""
    maps = lambda i: torch.randn(1, 2, n, m, generator=torch.Generator().manual_seed(i)).softmax(dim=-1)  # noqa: E731
    given = {"segments": {"image": (0, n)}, "grid": (4, 4)}
    takes = [take(maps(i), 0, "cross", step=i, branch=b, **given) for i in range(steps) for b in (None, "weak")]
    return captured(*takes)


def test_a_denoiser_has_steps_a_grid_and_its_words() -> None:
    seen = image_maps()
    found = viewer.collect(seen, tokens=["<s>", "red", "fox"], image=Image.new("RGB", (32, 32), "red"))
    assert found.data["frames"] == ["step 0", "step 1", "step 3", "step 4"] and len(found.data["images"]) == 1
    rows, keys = (found.data["axes"][found.data["sites"][0][side]] for side in ("rows", "keys"))
    assert rows["grid"] == [0, 4, 4] and rows["words"] is None
    # What lies behind the words is one key, with all that it gets.
    assert keys["words"] == ["<s>", "red", "fox", "+ 6 behind the words"]
    own = decoded(found.later["m-0-3-0"], (2, 16, 4))
    whole = seen.of(0, step=4)[0].tensor("map")[0]
    assert float((own[..., :3] - whole[..., :3]).abs().max()) < 0.004
    assert float((own[..., 3] - whole[..., 3:].sum(dim=-1)).abs().max()) < 0.004
    only = viewer.collect(seen, tokens=["fox"], step=3, branch="weak")
    own = decoded(only.later["m-0-0-0"], (2, 16, 2))
    assert float((own[..., 0] - seen.of(0, step=3, branch="weak")[0].tensor("map")[0, ..., 0]).abs().max()) < 0.004
    with pytest.raises(SelectionError, match="step 9 was not captured; there are 0, 1"):
        viewer.collect(seen, step=9)
    with pytest.raises(SelectionError, match="branch 'cond' was not captured"):
        viewer.collect(seen, branch="cond")


def test_joint_rows_of_filling_are_left_out() -> None:
    maps = torch.rand(1, 1, 10, 10).softmax(dim=-1)
    seen = captured(take(maps, 0, "joint", segments={"image": (0, 4), "text": (4, 10)}, grid=(2, 2), step=0))
    found = viewer.collect(seen, tokens=["a", "b"])
    rows, keys = (found.data["axes"][found.data["sites"][0][side]] for side in ("rows", "keys"))
    assert rows["n"] == 6 and keys["n"] == 7 and rows["words"][4:] == ["a", "b"] and keys["grid"] == [0, 2, 2]
    own = decoded(found.later["m-0-0-0"], (1, 6, 7))
    assert float((own[0, :, 6] - maps[0, 0, :6, 6:].sum(dim=-1)).abs().max()) < 0.004


def test_what_cannot_be_shown_is_said() -> None:
    with pytest.raises(SelectionError, match="nothing was captured"):
        viewer.collect(captured())
    with pytest.raises(SelectionError, match=r"has q, and no maps; take them: capture"):
        viewer.collect(captured(take(causal(0)), what=("q",)))
    with pytest.raises(SelectionError, match="capture both over the same tokens"):
        viewer.collect(text(0), after=text(0, n=5))
    with pytest.raises(SelectionError, match="capture the same ones"):
        viewer.collect(text(0), after=text(0, layers=1))
    with pytest.raises(SelectionError, match=r"3 image places are no square.*give grid"):
        viewer.collect(text(0), image_tokens=(1, 4))
    with pytest.raises(SelectionError, match="has 4 places, the image has 3"):
        viewer.collect(text(0), image_tokens=(1, 4), grid=(2, 2))
    with pytest.raises(SelectionError, match="this sequence has 7 tokens"):
        viewer.collect(text(0), image_tokens=(5, 9))
    with pytest.raises(SelectionError, match=r"give image_tokens=\(start, stop\)"):
        viewer.collect(text(0), image=Image.new("RGB", (8, 8)))
    with pytest.raises(SelectionError, match="has 2 texts, the capture has 7 tokens"):
        viewer.collect(text(0), tokens=["a", "b"])
    with pytest.raises(SelectionError, match="cannot be read"):
        viewer.collect(text(0), image=Path("missing.png"), image_tokens=(1, 5))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tokens": 3}, "give a list with the text"), ({"tokens": "abcdefg"}, "give a list with the text"),
        ({"image_tokens": 3}, "two whole numbers"), ({"image_tokens": (1.0, 2)}, "two whole numbers"),
        ({"image_tokens": (1, 5), "grid": "ab"}, "grid='ab': give"), ({"image_tokens": (1, 5), "grid": 4}, "grid=4: give"),
        ({"profile": 3}, "give a HeadTable"), ({"profile": [1]}, "give a HeadTable"),
        ({"profile": {"readings": {"x": "y"}, "heads": [{"layer": [], "head": {}, "x": 1}]}}, "none of its heads"),
        ({"facts": [1]}, "give a mapping"),
    ],
)  # fmt: skip
def test_odd_arguments_are_refused_by_name(given: dict[str, Any], message: str) -> None:
    with pytest.raises(SelectionError, match=message):
        viewer.collect(text(0), **given)


def test_no_captures_and_no_paths(tmp_path: Path) -> None:
    for odd in (3, None, "x", []):
        for show in (to_bertviz, to_circuitsvis, lambda c: view(c, tmp_path / "page.html")):
            with pytest.raises(SelectionError, match="is no capture"):
                show(odd)
    for path in (3, None, "/proc/nothing/page.html"):
        with pytest.raises(SerializationError, match=r"give a path|cannot be written"):
            view(text(0), path)


def test_entries_that_are_no_numbers_are_told(tmp_path: Path) -> None:
    """They are shown as nothing, in the pictures of the other heads nothing changes, and what has no plane has none."""
    odd, plain = text(0), text(0)
    for name in ("map", "k"):
        odd.takes[1].tensors[name][0, 2, 3, 1] = math.nan
    odd.takes[1].tensors["map"][0, 1, 6, 0] = math.inf
    found, want = viewer.collect(odd), viewer.collect(plain)
    assert found.data["facts"] == [["not finite", "maps with entries that are NaN or infinite: 2; shown as 0"]]
    assert want.data["facts"] == [] and found.later["m-0-0-0"] == want.later["m-0-0-0"]
    shown = decoded(found.later["m-0-0-1"], (3, 7, 7))
    assert shown[2, 3, 1] == 0 and torch.equal(shown[0], decoded(want.later["m-0-0-1"], (3, 7, 7))[0])
    assert "p-0-0-0" in found.later and "p-0-0-1" not in found.later and "p-0-0-1" in want.later
    both = viewer.collect(text(0), after=odd).data
    assert both["facts"] == [["not finite", "maps with entries that are NaN or infinite: 2 after; shown as 0"]]


@pytest.mark.parametrize(
    ("name", "value"), [("rows", -9), ("rows", 40), ("rows", 10**12), ("keys", -9), ("keys", 10**12)]
)
def test_numbers_of_tokens_that_cannot_be_are_refused(tmp_path: Path, name: str, value: int) -> None:
    text(0).save(tmp_path / "seen")
    file = tmp_path / "seen" / "000000.safetensors"
    tensors = load_file(file)
    save_file({**tensors, name: torch.full_like(tensors[name], value)}, file)
    with pytest.raises(SerializationError, match="not a whole file of a capture"):
        Captured.load(tmp_path / "seen")


def test_a_sample_without_rows_is_said() -> None:
    seen = captured(take(causal(0).repeat(2, 1, 1, 1)))
    seen.takes[0].rows = torch.stack([torch.arange(7), torch.full((7,), -1)])
    assert viewer.collect(seen).data["axes"][0]["n"] == 7
    with pytest.raises(SelectionError, match="sample 1 has none of the rows"):
        viewer.collect(seen, sample=1)


def test_no_text_becomes_markup(tmp_path: Path) -> None:
    tokens = [HOSTILE, "\u2028", "<!--", "&amp;", "\udc80", "x", "y"]
    path = view(text(0), tmp_path / "page.html", tokens=tokens, title=HOSTILE, facts={HOSTILE: HOSTILE})
    page = path.read_text(encoding="utf-8")
    assert (
        "<img" not in page.replace('<img id="shot"', "")
        and "<!--" not in page
        and page.count("</script>") == page.count("<script")
    )
    assert "default-src 'none'" in page and "http" not in page.replace("http-equiv", "")
    assert json.loads(script_json({"a": HOSTILE})) == {"a": HOSTILE}


def test_segments_and_grid_are_kept_with_a_capture(tmp_path: Path) -> None:
    image_maps(steps=1).save(tmp_path / "seen")
    back = Captured.load(tmp_path / "seen")
    assert back.takes[0].segments == {"image": [0, 16]} and back.takes[0].grid == [4, 4]
    assert viewer.collect(back).data["axes"][0]["grid"] == [0, 4, 4]


# ------------------------------------------------------------------------------------------------ queries and keys


def test_the_plane_holds_what_it_says() -> None:
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(4, 9, 6, generator=g) + 1.0, 3.0 * torch.randn(2, 11, 6, generator=g) - 2.0
    found = joint_projection(q, k)
    assert found.queries.shape == (4, 9, 2) and found.keys.shape == (4, 11, 2)
    for h in range(4):
        Q, K = q[h].double(), k[h // 2].double()
        K = K - K.mean(dim=0)

        def correlation(c: float, Q: torch.Tensor = Q, K: torch.Tensor = K) -> float:
            middle = Q.mean(dim=0)
            pairs = [(float((c * (a - middle) - b / c).norm()), float(a @ b)) for a in Q for b in K]
            return float(torch.corrcoef(torch.tensor(pairs, dtype=torch.float64).T)[0, 1])

        c = float(found.factor[h])
        assert correlation(c) == pytest.approx(float(found.correlation[h]), abs=1e-9)
        # No other factor makes nearness mean a higher score.
        assert min(correlation(c * f) for f in (0.5, 0.8, 0.95, 1.05, 1.25, 2.0)) > correlation(c) - 1e-3
        every = torch.cat([c * (Q - Q.mean(dim=0)), K / c])
        s = torch.linalg.svdvals(every - every.mean(dim=0)) ** 2
        assert float(found.explained[h]) == pytest.approx(float(s[:2].sum() / s.sum()), abs=1e-9)
        own = torch.cat([found.queries[h], found.keys[h]])
        assert float(own.pow(2).sum()) == pytest.approx(float(s[:2].sum()), rel=1e-9)


def test_moving_all_keys_and_scaling_both_changes_nothing() -> None:
    q, k = torch.randn(2, 8, 5), torch.randn(2, 8, 5)
    one, two = joint_projection(q, k), joint_projection(4.0 * q, k / 4.0 + 7.0)
    ratio = one.queries.norm() / two.queries.norm()
    assert torch.allclose(one.correlation, two.correlation, atol=1e-6)
    assert torch.allclose(one.queries, two.queries * ratio, atol=1e-4)


# ------------------------------------------------------------------------------------------------ other viewers


def test_bertviz_gets_what_its_code_stacks() -> None:
    seen = text(0)
    given = to_bertviz(seen, tokens=list("abcdefg"))
    # bertviz.util.format_attention: every layer 4-D with a batch of one, squeezed and stacked.
    stacked = torch.stack([a.squeeze(0) for a in given["attention"]])
    assert stacked.shape == (2, 3, 7, 7) and all(a.ndim == 4 for a in given["attention"])
    assert torch.equal(stacked[1], seen.get(1, "map", sample=0)) and given["tokens"] == list("abcdefg")


def test_circuitsvis_gets_heads_with_names() -> None:
    seen = text(0)
    given = to_circuitsvis(seen, 1)
    assert torch.equal(given["attention"], seen.get(1, "map", sample=0))
    assert given["attention_head_names"] == ["L1H0", "L1H1", "L1H2"] and given["mask_upper_tri"] is True
    assert len(to_circuitsvis(seen)["attention_head_names"]) == len(to_circuitsvis(seen)["attention"]) == 6
    square = captured(take(torch.full((1, 2, 4, 4), 0.25)))
    assert to_circuitsvis(square)["mask_upper_tri"] is False


def test_other_viewers_need_whole_maps_of_one_shape() -> None:
    with pytest.raises(SelectionError, match="cross-attention"):
        to_bertviz(image_maps(steps=1))
    with pytest.raises(SelectionError, match="in 1 rows of 7 tokens"):
        to_bertviz(captured(take(causal(0)[:, :, -1:], rows=[6])))
    with pytest.raises(SelectionError, match="stack layers"):
        to_bertviz(captured(take(causal(0)), take(causal(0, heads=2), 1)))


def test_an_index_that_says_odd_things_is_refused(tmp_path: Path) -> None:
    """Whatever stands in the place of what a capture says of itself: it is shown, or refused by name."""
    text(0).save(tmp_path / "seen")
    index = tmp_path / "seen" / "capture.json"
    record, refused, shown = json.loads(index.read_text()), 0, 0
    odd = [None, 3, -1, 10**30, "<b>", [], [[]], {}, True, ["a"], [-5], [{}], ["map", "map"]]
    changes = [((name,), v) for name in record for v in odd]
    changes += [(("takes", 0, name), v) for name in record["takes"][0] for v in odd]
    changes += [(("takes",), [{**record["takes"][0], "more": 1}]), (("takes",), [{}]), (("takes", 0, "heads"), [0, 1])]
    for (*way, last), value in changes:
        wrong = json.loads(json.dumps(record))
        inner = wrong
        for key in way:
            inner = inner[key]
        inner[last] = value
        index.write_text(json.dumps(wrong))
        try:
            view(Captured.load(tmp_path / "seen"), tmp_path / "page.html")
            shown += 1
        except (SelectionError, SerializationError):
            refused += 1
    assert refused > 150 and shown > 5
    index.write_text(json.dumps(record))
    view(Captured.load(tmp_path / "seen"), tmp_path / "page.html")
