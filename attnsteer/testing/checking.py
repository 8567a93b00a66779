"""Run laws on a method: one, a list of them with their results, or as a parametrised test."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from ..errors import SelectionError, did_you_mean
from .cases import HostCase, MethodCase, NotApplicable
from .host_cases import HOSTS
from .laws import LAWS
from .laws.bench import Bench, discard, discard_if_changed
from .laws.compare import Broken

_BENCH: list[Bench] = []


class LawFailure(AssertionError):
    """A law does not hold. The message says law, method, host, difference, tolerance, and the usual cause."""


@dataclass(frozen=True)
class Result:
    """What came of one law.

    Attributes:
        law, method, host: names. outcome: "pass", "fail" or "not applicable".
        message: of a failure, or why the law does not apply; empty for a pass.
    """

    law: str
    method: str
    host: str
    outcome: str
    message: str = ""

    def __str__(self) -> str:
        return f"{self.outcome:14} {self.law:10} {self.method} on {self.host}" + (
            f": {self.message}" * bool(self.message)
        )


def check_law(law: str, case: MethodCase, host: str | HostCase) -> None:
    """Run one law.

    Raises:
        LawFailure: it does not hold. NotApplicable: it does not speak about this method here; the message says why.
        SelectionError: there is no such law or host.
    """
    [host], [found] = _hosts([host]), _laws([law])
    try:
        with torch.no_grad():
            LAWS[found].holds(_bench(case, host))
    except NotApplicable:
        discard_if_changed(host)
        raise
    except Exception as error:
        # Whatever went wrong must not reach the next law.
        _BENCH.clear()
        discard(host)
        raise LawFailure(_message(found, case, host, error)) from error
    discard_if_changed(host)


def check_laws(
    case: MethodCase, hosts: str | HostCase | Iterable[str | HostCase] | None = None, laws: Iterable[str] | None = None
) -> list[Result]:
    """Run laws (all) on hosts (all of `HOSTS`) and return what came of each; nothing is raised for a law that fails."""
    results = []
    for host in _hosts(hosts):
        for law in _laws(laws):
            try:
                check_law(law, case, host)
            except NotApplicable as reason:
                results.append(Result(law, case.name, host.name, "not applicable", str(reason)))
            except LawFailure as failure:
                results.append(Result(law, case.name, host.name, "fail", str(failure)))
            else:
                results.append(Result(law, case.name, host.name, "pass"))
    return results


def run_laws(
    cases: MethodCase | Sequence[MethodCase],
    hosts: str | HostCase | Iterable[str | HostCase] | None = None,
    laws: Iterable[str] | None = None,
) -> Callable[..., None]:
    """A pytest test over laws (all), cases and hosts (all of `HOSTS`): `test_laws = run_laws(case, hosts=["llama"])`.

    A law that does not apply is skipped with its reason.
    """
    import pytest

    cases = [cases] if isinstance(cases, MethodCase) else list(cases)
    grid = [(law, case, host) for host in _hosts(hosts) for case in cases for law in _laws(laws)]

    @pytest.mark.parametrize(
        ("law", "method", "host"), grid, ids=[f"{law}-{case.name}-{host.name}" for law, case, host in grid]
    )
    def test_laws(law: str, method: MethodCase, host: HostCase) -> None:
        try:
            check_law(law, method, host)
        except NotApplicable as reason:
            pytest.skip(str(reason))

    return test_laws


def _bench(case: MethodCase, host: HostCase) -> Bench:
    """The bench of this case and host, which laws in a row share."""
    if not _BENCH or _BENCH[0].case is not case or _BENCH[0].host is not host:
        _BENCH[:] = [Bench(case, host)]
    return _BENCH[0]


def _hosts(hosts: str | HostCase | Iterable[str | HostCase] | None) -> list[HostCase]:
    wanted = HOSTS if hosts is None else [hosts] if isinstance(hosts, (str, HostCase)) else hosts
    return [host if isinstance(host, HostCase) else HOSTS[_known("host", host, HOSTS)] for host in wanted]


def _laws(laws: Iterable[str] | None) -> list[str]:
    wanted = LAWS if laws is None else [laws] if isinstance(laws, str) else laws
    return [_known("law", law, LAWS) for law in wanted]


def _known(kind: str, name: str, table: Iterable[str]) -> str:
    if name not in table:
        raise SelectionError(f"there is no {kind} {name!r}; there are {', '.join(table)}.{did_you_mean(name, table)}")
    return name


def _message(law: str, case: MethodCase, host: HostCase, error: Exception) -> str:
    found = LAWS[law]
    if isinstance(error, Broken):
        what = error.what
        if error.difference is not None:
            what += f": differ by {error.difference:.3g}, tolerance {error.tolerance:.3g}"
    else:
        what = f"raised {type(error).__name__}: {error}"
    return (
        f"law {law} does not hold for {case.name} on {host.name}: {what}.\n"
        f"  The law: {found.says}.\n  Usual cause: {found.usual_cause}."
    )
