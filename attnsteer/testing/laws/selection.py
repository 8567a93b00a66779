"""What is not selected is left alone: sites, heads, query rows."""

from __future__ import annotations

from ...errors import CompositionError
from ..cases import NotApplicable
from .bench import Bench, attached
from .compare import EXACT, close, moved, same
from .head_outputs import head_outputs

AROUND = "what it changes is no head output of the strong pass; tests of the method itself compare it whole"


def local(bench: Bench) -> None:
    """Heads and sites that are not selected compute what they computed before."""
    made = bench.make(2)
    if "around" in made.doors():
        raise NotApplicable(AROUND)
    bench.need_prefill()
    inputs = bench.inputs(2, None, 3)
    with attached(bench.target, made) as run:
        chosen = {r.site.path: r.entries[0][1] for r in run.runtimes.values()}
    first = next(iter(chosen))
    before = head_outputs(bench.target, bench.host, inputs)
    after = head_outputs(bench.target, bench.host, inputs, made)
    for path in before:
        if path != first:
            same(after[path], before[path], f"head outputs at {path}, which is not selected and runs before {first}")
            continue
        if chosen[first] is not None:
            heads = list(chosen[first])
            others = [h for h in range(before[path].shape[1]) if h not in heads]
            same(after[path][:, others], before[path][:, others], f"outputs of heads {others}, not selected at {path}")
            moved(after[path][:, heads], before[path][:, heads], f"outputs of the selected heads {heads} at {path}")
        return


def rows(bench: Bench) -> None:
    """Where(rows=...) leaves the other rows of the site as they were: bit for bit, where outputs are what is edited.

    An edit of queries or scores runs all rows through a kernel anew, which may round otherwise than the model's own.
    """
    made = bench.make(2)
    if "around" in made.doors():
        raise NotApplicable(AROUND)
    if made.where.rows is not None:
        raise NotApplicable("the case selects rows itself")
    bench.need_prefill()
    inputs, edited = bench.inputs(2), bench.moved_rows
    if not edited:
        raise NotApplicable("it moves no head output of the first site in a forward over a prompt")
    with attached(bench.target, made) as run:
        first = run.sites[0].path
    before = head_outputs(bench.target, bench.host, inputs)[first]
    n = before.shape[2]
    cut = edited[len(edited) // 2]
    # Each side of the cut once alone: a method that edits one row only is then tested with and without it.
    for start, stop in ((0, cut), (cut, n)):
        if start == stop:
            continue
        limited = made.new(where=made.where & type(made.where)(rows=(start, stop)))
        try:
            after = head_outputs(bench.target, bench.host, inputs, limited)[first]
        except CompositionError as error:
            raise NotApplicable(f"refused: {error}") from error
        others = [i for i in range(n) if not start <= i < stop]
        inside = [i for i in edited if start <= i < stop]
        what = f"rows outside Where(rows=({start}, {stop})) at {first}"
        if made.doors() & {"inputs", "bias"}:
            close(after[:, :, others], before[:, :, others], EXACT, what)
        else:
            same(after[:, :, others], before[:, :, others], what)
        if inside:
            moved(after[:, :, inside], before[:, :, inside], f"rows inside Where(rows=({start}, {stop})) at {first}")
