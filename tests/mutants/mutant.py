"""What a mutant is."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Mutant:
    """One change to one file.

    Attributes:
        name: what is broken, in words.
        path: the file, from the root of the project.
        before: text in it, found exactly once.
        after: what replaces it.
        tests: arguments of pytest.
    """

    name: str
    path: str
    before: str
    after: str
    tests: str
