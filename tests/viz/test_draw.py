"""Drawings show what they were given: colours, numbers, labels, boxes; and they refuse what does not fit."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from attnsteer import HeadSet
from attnsteer.errors import MissingExtra, SelectionError
from attnsteer.viz import contact_sheet, cross_attention, head_grid, strength_by_head, strength_by_layer, word_attention
from attnsteer.viz.sheet import as_image

RED = torch.zeros(3, 8, 8)
RED[0] = 1.0


def texts(figure: Any) -> list[str]:
    """All that a figure says."""
    found = []
    for axes in figure.axes:
        labels = [axes.title, axes.xaxis.label, axes.yaxis.label, *axes.texts, *axes.get_xticklabels()]
        found += [t.get_text() for t in labels if t.get_text()]
    return found


def overlaps(figure: Any) -> list[str]:
    """Panel titles and labels that run into each other or over the edge."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure).draw()
    boxes = [
        (t.get_text(), t.get_window_extent())
        for axes in figure.axes
        for t in (axes.title, axes.xaxis.label, axes.yaxis.label)
        if t.get_text()
    ]
    width, height = figure.bbox.width, figure.bbox.height
    out = [t for t, b in boxes if b.x0 < -1 or b.y0 < -1 or b.x1 > width + 1 or b.y1 > height + 1]
    return out + [f"{t} / {s}" for i, (t, b) in enumerate(boxes) for s, c in boxes[i + 1 :] if b.overlaps(c)]


class TestHeadGrid:
    def test_scores_and_frames(self, tmp_path: Path) -> None:
        scores = {(0, 0): 0.5, (0, 1): -0.25, (1, 1): 0.125}
        figure = head_grid(
            scores, tmp_path / "new" / "grid.png", selected=HeadSet([(1, 1)]), title="gain", label="accuracy"
        )
        axes = figure.axes[0]
        table = axes.images[0].get_array()
        assert table.shape == (2, 2) and table[0, 1] == -0.25 and table[1, 1] == 0.125 and table.mask[1, 0]
        # Both signs: white is zero.
        assert axes.images[0].get_clim() == (-0.5, 0.5)
        assert {"gain", "head", "layer", ".5", "-.25", ".12"} <= set(texts(figure)) and "accuracy" in texts(figure)
        (frame,) = axes.patches
        assert (frame.get_x() + 0.47, frame.get_y() + 0.47) == pytest.approx((1.0, 1.0))
        assert (tmp_path / "new" / "grid.png").stat().st_size > 1000 and not overlaps(figure)

    def test_a_head_set_with_the_whole_table_of_its_search(self) -> None:
        facts = {"metric": "accuracy", "gains": {"accuracy": [[0.1, -0.2], [None, 0.3]]}}
        heads = HeadSet([(0, 0), (1, 1)], scores={(0, 0): 0.1, (1, 1): 0.3}, shape=(2, 2), provenance=facts)
        figure = head_grid(heads)
        assert figure.axes[0].images[0].get_array()[0, 1] == -0.2 and len(figure.axes[0].patches) == 2
        bare = head_grid(HeadSet([(0, 0)], scores={(0, 0): 0.1}, shape=(3, 4)))
        assert bare.axes[0].images[0].get_array().shape == (3, 4)

    def test_a_large_model(self) -> None:
        figure = head_grid({(i, j): i + j for i in range(40) for j in range(64)})
        assert not overlaps(figure) and not figure.axes[0].texts and len(figure.axes[0].get_xticks()) == 16

    def test_bad_input(self) -> None:
        with pytest.raises(SelectionError, match="no scores"):
            head_grid(HeadSet([(0, 0)]))
        with pytest.raises(SelectionError, match=r"\(3, 0\) is outside the shape \(2, 2\)"):
            head_grid({(3, 0): 1.0}, shape=(2, 2))


class TestContactSheet:
    def test_every_image_is_in_its_place(self, tmp_path: Path) -> None:
        blue = torch.zeros(8, 8, 3).numpy()
        blue[..., 2] = 1.0
        sheet = contact_sheet([[RED, None], [blue, as_image(RED)]], ["one", "two"], ["a", "b"], tmp_path / "s.png")
        assert (tmp_path / "s.png").exists()
        # Cells of 128 pixels from the right and the bottom edge: 6 apart.
        right, down = sheet.width - 6 - 64, sheet.height - 6 - 64
        pixel = {(i, j): sheet.getpixel((right - 134 * (1 - j), down - 134 * (1 - i))) for i in (0, 1) for j in (0, 1)}
        assert pixel == {(0, 0): (255, 0, 0), (0, 1): (255, 255, 255), (1, 0): (0, 0, 255), (1, 1): (255, 0, 0)}

    def test_long_labels_get_lines_and_stay_in_their_cells(self) -> None:
        words = "a red circle and a blue square above a very large green triangle"
        short, long = (contact_sheet([[RED, RED]], ["r"], [label, "b"]) for label in ("a", words))
        assert long.width == short.width and long.height > short.height
        endless = contact_sheet([[RED, RED]], ["r"], ["x" * 200, "b"])
        assert endless.size == short.size
        # Nothing is written in the gap between the two columns.
        column = [long.getpixel((long.width - 6 - 128 - 3, y)) for y in range(long.height)]
        assert set(column) == {(255, 255, 255)}

    def test_rows_of_labels_beside_low_images(self) -> None:
        low = torch.zeros(3, 4, 256)
        sheet = contact_sheet([[low], [low]], ["a label that needs more than one line beside it " * 2] * 2, ["x"])
        assert sheet.height > 2 * 3 * 18

    def test_strength_by_layer(self) -> None:
        seen = []
        sheet = strength_by_layer(lambda s, layer: seen.append((s, layer)) or RED * s, [0.5, 1.0], [2, 7, 9], title="u")
        assert seen == [(s, layer) for s in (0.5, 1.0) for layer in (2, 7, 9)]
        assert sheet.getpixel((sheet.width - 20, sheet.height - 20)) == (255, 0, 0)
        assert sheet.getpixel((sheet.width - 20, sheet.height - 154)) == (128, 0, 0)

    def test_strength_by_head(self) -> None:
        seen = []
        make = lambda s, pair: seen.append((s, pair)) or RED * s  # noqa: E731
        sheet = strength_by_head(make, [0.5, 1.0], HeadSet({3: [1, 0], 5: [2]}))
        assert seen == [(s, pair) for s in (0.5, 1.0) for pair in ((3, 0), (3, 1), (5, 2))]
        assert sheet.getpixel((sheet.width - 20, sheet.height - 20)) == (255, 0, 0)

    def test_bad_input(self) -> None:
        with pytest.raises(SelectionError, match="one label per row"):
            contact_sheet([[RED]], ["a", "b"], ["x"])
        with pytest.raises(SelectionError, match="no image"):
            contact_sheet([[None]], ["a"], ["x"])
        with pytest.raises(SelectionError, match=r"shape \(4, 4\) is no image"):
            contact_sheet([[torch.zeros(4, 4)]], ["a"], ["x"])


class TestAttention:
    def test_words_before_and_after(self, tmp_path: Path) -> None:
        words = ["the", "red", "star", "is", "left", "of", "a", "blue", "circle", "supercalifragilistic"]
        before, after = torch.full((10, 2, 3), 0.05), torch.full((10, 2, 3), 0.1)
        after[3, 0, 0] = 0.3
        figure = word_attention(RED, words, before, after, tmp_path / "w.png", title="heads", labels=("plain", "ACT"))
        panels = [a for a in figure.axes if len(a.images) == 2]
        assert len(panels) == 20
        # One scale for all, so that before and after can be compared; what is said is the sum.
        assert all(a.images[1].get_clim() == pytest.approx((0.0, 0.3)) for a in panels)
        said = texts(figure)
        assert {"the\n0.30", "is\n0.30", "0.80", "plain", "ACT", "attention"} <= set(said) and said.count("0.60") == 9
        assert "supercalifragilis…\n0.30" in said and not overlaps(figure)
        assert len([a for a in word_attention(RED, words[:2], before[:2]).axes if len(a.images) == 2]) == 2

    def test_boxes_and_rows(self, tmp_path: Path) -> None:
        maps = torch.ones(2, 4, 4)
        maps[0, :2, :2] = 5.0
        boxes = {"red star": (0.0, 0.0, 0.5, 0.5)}
        rows = {"down_blocks.1.attentions.0.transformer_blocks.0.attn2, step 3": maps, "step 9": torch.ones(2, 8, 8)}
        figure = cross_attention(RED, ["red star", "and"], rows, tmp_path / "c.png", boxes=boxes, title="maps")
        assert {"red star\n2.50x in its box", "1.00x in its box", "and", "step 9"} <= set(texts(figure))
        panels = [a for a in figure.axes if len(a.images) == 2]
        assert len(panels) == 4 and [len(a.patches) for a in panels] == [1, 0, 1, 0] and not overlaps(figure)
        frame = panels[0].patches[0]
        assert (frame.get_x(), frame.get_y(), frame.get_width(), frame.get_height()) == (0.0, 0.0, 0.5, 0.5)

    def test_bad_input(self) -> None:
        with pytest.raises(SelectionError, match=r"maps of shape \(2, 4, 4\)"):
            word_attention(RED, ["a"], torch.ones(2, 4, 4))
        with pytest.raises(SelectionError, match="give a list of words"):
            cross_attention(RED, "ab", torch.ones(2, 4, 4))
        with pytest.raises(SelectionError, match="got boxes for"):
            cross_attention(RED, ["a"], torch.ones(1, 4, 4), boxes={"b": (0.0, 0.0, 1.0, 1.0)})
        with pytest.raises(SelectionError, match="in fractions of the image"):
            cross_attention(RED, ["a"], torch.ones(1, 4, 4), boxes={"a": (0.0, 0.0, 2.0, 1.0)})


def test_nothing_is_left_in_pyplot_and_nothing_is_imported_early() -> None:
    import subprocess

    code = (
        "import sys, attnsteer.viz as v; v.head_grid; v.contact_sheet; v.word_maps\n"
        "assert not {'matplotlib', 'PIL', 'transformers', 'diffusers'} & set(sys.modules), sorted(sys.modules)\n"
        "v.head_grid({(0, 0): 1.0}); assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_missing_library_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtra, match=r"attnsteer\[viz\]"):
        head_grid({(0, 0): 1.0})
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(MissingExtra, match=r"attnsteer\[viz\]"):
        contact_sheet([[RED]], ["a"], ["b"])
