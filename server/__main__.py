"""`python -m server up | api | worker`: build the settings, run one role."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from pydantic import ValidationError

from server import logs
from server.settings import Settings, explain

EXIT_USAGE = 2


def run_up(settings: Settings) -> int:
    """Everything on this machine: Valkey, api, workers."""
    from server.launch import run_supervisor

    return run_supervisor(settings)


def run_api(settings: Settings) -> int:
    """One api process."""
    from server.app import serve

    logs.configure(settings.log_level)
    return serve(settings)


def run_worker(settings: Settings) -> int:
    """One worker process for one bundle."""
    worker_settings = settings.for_worker()
    from server.worker import run_worker as run

    logs.configure(settings.log_level)
    return run(worker_settings)


ROLES: dict[str, Callable[[Settings], int]] = {"up": run_up, "api": run_api, "worker": run_worker}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one role until it ends.

    Returns:
        The role's exit status; 2 with one line on stderr where a setting or a port is at fault.
    """
    parser = argparse.ArgumentParser(
        prog="python -m server",
        description="Serve few-step diffusion students over HTTP. Settings are TDM_* environment variables.",
    )
    roles = parser.add_subparsers(dest="role", required=True, metavar="ROLE")
    for name, run in ROLES.items():
        roles.add_parser(name, help=run.__doc__)
    args = parser.parse_args(argv)
    try:
        return ROLES[args.role](Settings())
    except ValidationError as error:
        for line in explain(error):
            print(f"error: {line}", file=sys.stderr)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
    return EXIT_USAGE


if __name__ == "__main__":
    sys.exit(main())
