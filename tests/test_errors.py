"""One family of errors, and messages with a way out."""

import sys
from pathlib import Path

import pytest

from medgraft import errors
from medgraft.errors import MedgraftError, MissingExtra, SaveFailed, UnknownName, WrongBackbone, nearest, need, unknown
from tests.helpers import says

FAMILY = [e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, Exception)]


@pytest.mark.parametrize("error", FAMILY, ids=lambda e: e.__name__)
def test_one_except_catches_them_all(error: type[Exception]) -> None:
    assert issubclass(error, MedgraftError)
    assert issubclass(error, ValueError)
    assert error.__doc__


def test_some_are_what_python_would_raise_too() -> None:
    assert issubclass(SaveFailed, OSError)
    assert issubclass(MissingExtra, ImportError)
    assert issubclass(WrongBackbone, errors.BadAdapter)
    assert str(SaveFailed("no space")) == "no space"


def test_near_misses() -> None:
    assert nearest("polip", ["polyp", "skin", "glands"]) == ["polyp"]
    assert nearest("zzz", ["polyp"]) == []
    assert len(nearest("a1", [f"a{i}" for i in range(9)])) == 3
    assert nearest("a", [], n=5) == []


def test_a_name_with_near_misses() -> None:
    said = unknown("part", "lorra", ["lora", "tuned"])
    assert isinstance(said, UnknownName)
    says(said, "no part called 'lorra'", "did you mean 'lora'?")
    assert "tuned" not in str(said)


def test_a_name_without_near_misses_gets_the_list() -> None:
    says(unknown("part", "zzz", ["b", "a"]), "there are: a, b")
    long = unknown("part", "zzz", [f"name{i:02}" for i in range(25)])
    says(long, "name19", "and 5 more")
    assert "name20" not in str(long)
    says(unknown("part", "zzz", []), "there is none")
    says(unknown("part", "x", [], hint="Make one."), "Make one.")
    says(unknown("part", 3, ["a"]), "no part called 3")  # type: ignore[arg-type]


def test_an_absent_extra_is_named() -> None:
    with pytest.raises(MissingExtra) as refused:
        need("no_such_module_at_all", "volumes")
    says(refused.value, "'no_such_module_at_all'", "pip install 'medgraft[volumes]'")
    with pytest.raises(MissingExtra):
        need("no_such_module_at_all.inner", "volumes")


def test_a_broken_install_shows_its_own_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_install.py").write_text("import what_it_needs_itself\n")
    (tmp_path / "raising_install.py").write_text("raise RuntimeError('from inside')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="what_it_needs_itself") as shown:
        need("broken_install", "volumes")
    assert not isinstance(shown.value, MissingExtra)
    with pytest.raises(RuntimeError, match="from inside"):
        need("raising_install", "volumes")
    assert "broken_install" not in sys.modules


def test_what_is_there_is_imported() -> None:
    assert need("math", "volumes").pi > 3
