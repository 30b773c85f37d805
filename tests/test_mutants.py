"""The mutants of `make mutants` fit the code as it is; whether tests catch them is asked there."""

import pytest

from tests.mutants.__main__ import ROOT
from tests.mutants.catalog import MUTANTS, Mutant


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_mutant_changes_one_place_and_leaves_a_program(mutant: Mutant) -> None:
    text = (ROOT / mutant.path).read_text(encoding="utf-8")
    assert text.count(mutant.before) == 1
    if mutant.path.endswith(".py"):
        compile(text.replace(mutant.before, mutant.after), mutant.path, "exec")


def test_names_tell_them_apart() -> None:
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) >= 30
