"""Prompts for load: scenes in the words of the shipped student, hardly ever the same one twice.

A benchmark that repeats ten prompts measures its server's caches. These are drawn from 12,800 captions.
"""

import itertools
import random
from collections.abc import Iterator
from typing import Any

_SIZES = ("small", "large")
_COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "white")
_SHAPES = ("sphere", "cube", "cone", "cylinder", "torus")
_RELATIONS = ("left of", "behind")

_SOLIDS = [" ".join(("a", *words)) for words in itertools.product(_SIZES, _COLOURS, _SHAPES)]
CAPTIONS = [f"{a} {relation} {b}" for a, relation, b in itertools.product(_SOLIDS, _RELATIONS, _SOLIDS)]


def requests(seed: int) -> Iterator[dict[str, Any]]:
    """Endless bodies for `POST /v1/images/generations`: a shuffled caption and a seed of its own each."""
    rng = random.Random(seed)
    while True:
        for caption in rng.sample(CAPTIONS, len(CAPTIONS)):
            yield {"prompt": caption, "seed": rng.randrange(2**31), "response_format": "b64_json"}
