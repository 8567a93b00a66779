"""The registry: built-ins, decorators, entry points of other packages, and names that clash."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch

import attnsteer
from attnsteer import ACT, HeadGate, Intervention, get_method, methods, register_host, register_method, registry, steer
from attnsteer.errors import RegistrationError, UnknownName
from attnsteer.hosts.base import Host
from attnsteer.registry import get_host, hosts, registered_name

BUILT_IN = {"ACT", "HeadGate", "PAG", "PASTA", "SEG", "SoftPAG", "SpotLight", "ZeroTuning"}


class Third(Intervention):
    """A method of another package: doubles head outputs."""

    def output(self, call: Any, out: torch.Tensor) -> torch.Tensor:
        return 2 * out


class Elsewhere(Host):
    """A host of another package."""

    @classmethod
    def takes(cls, target: Any) -> bool:
        return isinstance(target, dict)


@pytest.fixture(autouse=True)
def _own_tables(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each test has copies of the tables."""
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    monkeypatch.setattr(registry, "_HOSTS", dict(registry._HOSTS))
    monkeypatch.setattr(registry, "_PLUGINS", {"methods": {}, "hosts": {}})
    module = types.ModuleType("a_third_party")
    module.Third, module.Elsewhere, module.NOT_A_CLASS = Third, Elsewhere, 3
    monkeypatch.setitem(sys.modules, "a_third_party", module)
    yield


@pytest.fixture
def plugins(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Entry points as if packages had brought them: plugins(group, name=value, ...)."""
    found: list[EntryPoint] = []

    def add(group: str, **points: str) -> None:
        found.extend(EntryPoint(name, value, f"attnsteer.{group}") for name, value in points.items())

    monkeypatch.setattr(registry, "entry_points", lambda group: [p for p in found if p.group == group])
    return add


def test_built_in_methods_are_listed_and_found() -> None:
    assert set(methods()) >= BUILT_IN and list(methods()) == sorted(methods())
    assert all(get_method(name) is getattr(attnsteer, name) for name in BUILT_IN)
    assert attnsteer.methods() == methods() == registry.methods()


def test_an_unknown_name_lists_what_there_is() -> None:
    with pytest.raises(UnknownName, match=r"no method 'Zerotuning'; there are ACT, .*Did you mean 'ZeroTuning'\?$"):
        get_method("Zerotuning")
    with pytest.raises(UnknownName, match=r"no host 'difusers'.*generic.*Did you mean 'diffusers'\?$"):
        get_host("difusers")
    with pytest.raises(KeyError):
        get_method("x")


def test_the_decorator_adds_a_method_under_its_name_or_another() -> None:
    assert register_method(Third) is Third
    assert register_method(name="Other")(Third) is Third
    assert get_method("Third") is get_method("Other") is Third
    assert registered_name(Third) == "Third" and registered_name(ACT) == "ACT"
    assert {"Third", "Other"} <= set(methods())


def test_registering_the_same_class_again_is_no_clash() -> None:
    register_method(Third)
    register_method(Third)
    register_method(ACT)
    again = type("Third", (Third,), {"__module__": Third.__module__, "__qualname__": Third.__qualname__})
    assert register_method(again) is again and get_method("Third") is again


@pytest.mark.parametrize("name", ["ACT", "HeadGate"])
def test_a_taken_name_is_refused(name: str) -> None:
    before = get_method(name)
    with pytest.raises(RegistrationError, match=f"'{name}' is taken by attnsteer"):
        register_method(name=name)(Third)
    assert get_method(name) is before


@pytest.mark.parametrize("thing", [3, "Third", dict, Third()])
def test_what_is_no_method_is_refused(thing: Any) -> None:
    with pytest.raises(RegistrationError, match="not a subclass of Intervention"):
        register_method(name="X")(thing)
    with pytest.raises(RegistrationError, match="not a subclass of Host"):
        register_host(name="x")(thing)
    assert "X" not in methods() and "x" not in hosts()


def test_an_unregistered_class_has_no_name() -> None:
    with pytest.raises(UnknownName, match=r"Third is not registered.*register_method"):
        registered_name(Third)


def test_an_entry_point_adds_a_method(plugins: Any) -> None:
    plugins("methods", Third="a_third_party:Third")
    assert "Third" in methods() and get_method("Third") is Third
    assert attnsteer.methods.Third is Third
    register_method(Third)


def test_an_entry_point_and_the_decorator_on_one_class_are_no_clash(plugins: Any) -> None:
    register_method(Third)
    plugins("methods", Third="a_third_party:Third")
    assert get_method("Third") is Third and registered_name(Third) == "Third"


def test_listing_loads_no_plugin(plugins: Any) -> None:
    plugins("methods", Broken="a_missing_module:Broken")
    assert "Broken" in methods()
    with pytest.raises(RegistrationError, match=r"Broken = 'a_missing_module:Broken'.*No module named"):
        get_method("Broken")
    assert get_method("ACT") is ACT


@pytest.mark.parametrize("value", ["a_third_party:Missing", "a_third_party:NOT_A_CLASS", "a_third_party:Elsewhere"])
def test_an_entry_point_to_something_else_is_refused(plugins: Any, value: str) -> None:
    plugins("methods", Third=value)
    with pytest.raises(RegistrationError):
        get_method("Third")


def test_an_entry_point_cannot_take_a_built_in_name(plugins: Any) -> None:
    plugins("methods", ACT="a_third_party:Third")
    with pytest.raises(RegistrationError, match=r"ACT = 'a_third_party:Third'.*attnsteer\.methods\.act:ACT"):
        methods()
    with pytest.raises(RegistrationError):
        get_method("ACT")


def test_two_packages_cannot_take_one_name_but_one_may_be_found_twice(plugins: Any) -> None:
    plugins("methods", Third="a_third_party:Third")
    plugins("methods", Third="a_third_party:Third")
    assert "Third" in methods()
    plugins("methods", Third="another_party:Third")
    with pytest.raises(RegistrationError, match="another_party"):
        methods()


def test_hosts_of_others_are_asked_first(plugins: Any) -> None:
    assert hosts() == ("diffusers", "transformers", "generic")
    plugins("hosts", elsewhere="a_third_party:Elsewhere")
    assert hosts()[0] == "elsewhere" and get_host("elsewhere") is Elsewhere
    own = type("Own", (Host,), {})
    assert register_host(own) is own
    assert hosts() == ("Own", "elsewhere", "diffusers", "transformers", "generic")
    with pytest.raises(RegistrationError, match="'generic' is taken"):
        register_host(name="generic")(own)
    assert hosts()[-1] == "generic"


def test_a_registered_method_is_saved_loaded_and_steers(tmp_path: Any) -> None:
    from attnsteer.testing import tiny_transformers, tiny_transformers_inputs

    register_method(Third)
    loaded = Intervention.from_pretrained(Third().save_pretrained(tmp_path))
    assert type(loaded) is Third
    model = tiny_transformers("llama")
    inputs = tiny_transformers_inputs("llama", model)
    with torch.no_grad():
        with steer(model, loaded):
            ours = model(**inputs).logits
        with steer(model, HeadGate({(i, j): 2.0 for i in range(3) for j in range(4)})):
            theirs = model(**inputs).logits
    assert torch.equal(ours, theirs)


def test_entry_points_are_read_once_and_anew_where_the_path_has_changed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    reads: list[str] = []
    registry._read_once.cache_clear()
    monkeypatch.setattr(registry, "read_entry_points", lambda group: reads.append(group) or [])
    methods()
    methods()
    assert reads == ["attnsteer.methods"]
    monkeypatch.syspath_prepend(tmp_path)
    methods()
    assert reads == ["attnsteer.methods"] * 2
    registry._read_once.cache_clear()
