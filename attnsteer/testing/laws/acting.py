"""The method acts where it is told to, changes nothing at strength zero, and keeps nothing to itself."""

from __future__ import annotations

from ...errors import NeverFired
from ...steering import steer
from ..cases import NotApplicable
from .bench import WHOLE, Bench, attached
from .compare import EXACT, Broken, moved, require, same, scale, valid_rows


def effect(bench: Bench) -> None:
    """At full strength the output changes: without this, the other laws would be vacuous."""
    bench.make(2)
    out, _, edits = bench.acting
    if not edits and not bench.host.decoder:
        bench.need_action()
    require(edits > 0, "the method edited nothing, neither in the prompt nor in decoding")
    plain = bench.plain(2)
    moved(out, plain, "the output at full strength", 20 * EXACT * scale(bench.host, plain))


def identity(bench: Bench) -> None:
    """Strength zero changes nothing, bit for bit."""
    for padding in (None, *bench.host.padded[:1]):
        made, inputs = bench.make(3, zero=True), bench.inputs(3, padding, 1)
        plain = bench.plain(3, padding, 1)
        with attached(bench.target, made):
            out = bench.whole(bench.target, inputs)
        rows = valid_rows(inputs, plain)
        same(out[rows], plain[rows], f"the output at strength zero, padding {padding}")


def fires(bench: Bench) -> None:
    """Every selected site reports its calls, edits are counted, and an attachment that is never used is an error."""
    bench.need_action()
    if bench.case.whole_model:
        raise NotApplicable(WHOLE)
    made = bench.make(2)
    with attached(bench.target, made) as run:
        bench.run(bench.target, bench.inputs(2))
    records = [(s.path, run.audit.record(0, s.path)) for s in run.sites]
    for path, record in records:
        require(record.calls >= 1, f"{path} was selected, and reports no call")
    require(any(r.edits >= 1 and r.rows > 0 and r.heads > 0 for _, r in records), "the audit counts no edit")
    require("around" in made.doors() or any(r.changed >= 1 for _, r in records), "the audit counts no change")
    require(run.audit.fired(0), "the audit says that the method never fired")
    try:
        with steer(bench.target, made):
            pass
    except NeverFired:
        return
    raise Broken("leaving without a call must raise NeverFired")


def memory(bench: Bench) -> None:
    """A method that has run before acts as a new one: no call leaves anything in it for another sequence."""
    bench.need_action()
    made, inputs = bench.make(2), bench.inputs(2)
    expected = bench.acting[0]
    other = bench.inputs(2, None, 9)
    with attached(bench.target, bench.make(2)):
        fresh = bench.whole(bench.target, other)
    with attached(bench.target, made):
        bench.whole(bench.target, inputs)
        same(bench.whole(bench.target, other), fresh, "a second prompt, and the same prompt with a new method")
    with attached(bench.target, made):
        same(bench.whole(bench.target, inputs), expected, "the first prompt again, after another one")
