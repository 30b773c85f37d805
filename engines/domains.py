"""Domains of pictures by name: what distilling and gating have prompts, real pictures and a judge from."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Literal, cast

from engines.errors import ConfigError

if TYPE_CHECKING:
    from engines.gate.domain import Domain

DOMAINS = {"demo": "engines.demo.domain:SCENES", "demo-video": "engines.demo.video.domain:CLIPS"}
"""Those that come with the project, each as `module:NAME`."""

_ASKED_FOR = ("groups", "judge_file", "load_judge", "counts", "prompts", "render", "render_again")


def default_domain(kind: Literal["image", "video"]) -> str:
    """Name of the domain of a demo's students of that kind."""
    return {"image": "demo", "video": "demo-video"}[kind]


def load_domain(name: str) -> Domain:
    """Import a domain.

    Args:
        name: one of `DOMAINS`, or `module:NAME` of one's own, see `engines.gate.domain.Domain`.
    Raises:
        ConfigError: there is none of that name, or it lacks what a gate asks a domain for.
    """
    module, _, attribute = DOMAINS.get(name, name).partition(":")
    if not module or not attribute:
        known = ", ".join(DOMAINS)
        raise ConfigError(f"domain: {known} or module:NAME is expected, not {name!r}")
    try:
        found = getattr(import_module(module), attribute)
    except ModuleNotFoundError as error:
        raise ConfigError(f"domain: {name}: {error}") from None
    except AttributeError:
        raise ConfigError(f"domain: {name}: module {module} has no {attribute}") from None
    lacking = [part for part in _ASKED_FOR if not hasattr(found, part)]
    if lacking:
        raise ConfigError(f"domain: {name}: {lacking[0]} is missing, see engines.gate.domain.Domain")
    return cast("Domain", found)
