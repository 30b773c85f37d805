"""`python -m server up | api | worker | bundle | audit | dead | plan`: the settings, and one of these."""

from __future__ import annotations

import argparse
import logging
import resource
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from pydantic import ValidationError

from server import logs
from server.queue.preflight import RedisUnreachableError, wait_until_usable
from server.settings import Settings, explain

EXIT_FAILURE = 1
EXIT_USAGE = 2

logger = logging.getLogger(__name__)


def run_up(settings: Settings) -> int:
    """Everything on this machine: Valkey, api, workers."""
    from server.supervisor.supervisor import run_supervisor

    if settings.redis_url:  # its children ask too; here one line says it for all of them
        wait_until_usable(settings.redis_url, patience_s=settings.redis_wait_s, report=_print_error)
    return run_supervisor(settings)


def run_api(settings: Settings) -> int:
    """One api process."""
    from server.api.process import serve

    logs.configure(settings.log_level)
    _check_store(settings)
    _check_redis(settings)
    return serve(settings)


def run_worker(settings: Settings) -> int:
    """One worker process for one bundle."""
    worker_settings = settings.for_worker()
    from server.worker.process import run_worker as run

    logs.configure(settings.log_level)
    _check_store(settings)
    _check_redis(settings)
    return run(worker_settings)


def _check_store(settings: Settings) -> None:
    """Return if results can lie where they should; a store that only does not answer now goes to the log.

    Raises:
        ValueError: it is set up wrongly.
    """
    from server.store import ResultStore

    try:
        ResultStore(settings.results_url).check()
    except (FileNotFoundError, PermissionError, NotADirectoryError) as error:
        raise ValueError(f"TDM_STORE_URL or TDM_DATA_DIR: {error}") from None
    except OSError as error:
        logger.warning("%s", error)


def _check_tracing(settings: Settings) -> None:
    """Return if spans can be sent, or none are to be.

    Raises:
        ValueError: the extra `tracing` is not installed.
    """
    from server.tracing import check_extra

    check_extra(settings.otlp_endpoint)


def _check_redis(settings: Settings) -> None:
    """Return once a Redis that can be trusted answers; what is risky about it goes to the log.

    Raises:
        UnusableRedisError, RedisUnreachableError: see `server.queue.preflight`.
    """
    if settings.redis_url:
        for warning in wait_until_usable(
            settings.redis_url, patience_s=settings.redis_wait_s, report=logger.warning
        ):
            logger.warning(warning)


def _print_error(line: str) -> None:
    print(line, file=sys.stderr)


def run_audit(settings: Settings, args: argparse.Namespace) -> int:
    """Compare accepted ids, job records and stored objects, and name every mismatch."""
    from server.supervisor import console

    return console.run_audit(
        settings, accepted=args.accepted, settled=args.settled, strict=args.strict, as_json=args.json
    )


def run_dead(settings: Settings, args: argparse.Namespace) -> int:
    """List, show, retry or drop what is kept of jobs that killed their workers."""
    from server.queue.dead import DeadLetters
    from server.supervisor import console

    letters = DeadLetters(console.redis_url(settings))
    try:
        if args.verb == "list":
            return console.list_dead(letters, as_json=args.json)
        if args.verb == "show":
            return console.show_dead(letters, args.id, as_json=args.json)
        if args.verb == "retry":
            return console.retry_dead(letters, settings, args.ids)
        return console.drop_dead(letters, args.ids)
    except console.NotThereError as error:
        print(f"error: {error}", file=sys.stderr)
        return console.EXIT_FOUND
    finally:
        letters.close()


def run_bundle(settings: Settings, args: argparse.Namespace) -> int:
    """Swap a model's bundle for another version under load, try one on a share of the jobs, go back."""
    from server.queue.routes import Routes
    from server.supervisor import console, swap

    routes = Routes(console.redis_url(settings))
    try:
        if args.verb == "swap":
            return swap.run_swap(routes, args.bundle, args.canary)
        if args.verb == "canary":
            return swap.run_share(routes, args.model, args.percent)
        if args.verb == "promote":
            return swap.run_promote(routes, args.model)
        if args.verb == "rollback":
            return swap.run_rollback(routes, args.model)
        if args.verb == "forget":
            return swap.run_forget(routes, args.model)
        return swap.run_status(routes, as_json=args.json)
    except swap.SwapError as error:
        print(f"error: {error}", file=sys.stderr)
        return console.EXIT_FOUND
    finally:
        routes.close()


def run_plan(_: Settings, args: argparse.Namespace) -> int:
    """How many workers a load needs, from a bundle's latency table."""
    from rich.console import Console

    from server.worker.plan import Demand
    from server.worker.plan import run_plan as run

    demand = Demand(
        rate_per_s=args.rate or 0.0,
        num_samples=args.n,
        slo_ms=args.slo * 1000,
        percent=args.percentile,
        beside_ms=args.beside_ms,
    )
    return run(
        args.bundle,
        demand,
        num_workers=args.workers,
        size=args.size,
        num_steps=args.steps,
        pace=args.pace,
        price=args.price,
        as_json=args.json,
        console=Console(),
    )


ROLES: dict[str, Callable[[Settings], int]] = {"up": run_up, "api": run_api, "worker": run_worker}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one role or command until it ends.

    Returns:
        Its exit status; 2 with one line on stderr where a setting, a port or Redis is at fault.
    """
    args = _parser().parse_args(argv)
    try:
        settings = Settings()
        if args.command in ROLES:
            _raise_descriptor_limit()
            _check_tracing(settings)
            return ROLES[args.command](settings)
        return _run_command(settings, args)
    except ValidationError as error:
        for line in explain(error):
            print(f"error: {line}", file=sys.stderr)
    except RedisUnreachableError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_FAILURE
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
    return EXIT_USAGE


def _raise_descriptor_limit() -> None:
    """Take as many open files as we may: every client is one, and shells often give 1024."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):  # a system that allows less than it says
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _run_command(settings: Settings, args: argparse.Namespace) -> int:
    from server.queue.errors import QueueError

    try:
        run: Callable[[Settings, argparse.Namespace], int] = args.run
        return run(settings, args)
    except QueueError as error:
        print(f"error: Redis: {error}", file=sys.stderr)
    return EXIT_USAGE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m server",
        description="Serve few-step diffusion students over HTTP. Settings are TDM_* environment variables.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, run in ROLES.items():
        commands.add_parser(name, help=run.__doc__)
    audit = commands.add_parser("audit", help=run_audit.__doc__)
    audit.set_defaults(run=run_audit)
    audit.add_argument("--accepted", metavar="FILE", help="job ids that clients hold, one a line; - is stdin")
    audit.add_argument("--settled", action="store_true", help="nothing should be unfinished any more")
    audit.add_argument("--strict", action="store_true", help="leftovers are mismatches, too")
    audit.add_argument("--json", action="store_true", help="print JSON")
    _add_bundle(commands.add_parser("bundle", help=run_bundle.__doc__))
    _add_dead(commands.add_parser("dead", help=run_dead.__doc__))
    _add_plan(commands.add_parser("plan", help=run_plan.__doc__))
    return parser


def _add_bundle(bundle: argparse.ArgumentParser) -> None:
    bundle.set_defaults(run=run_bundle)
    verbs = bundle.add_subparsers(dest="verb", required=True, metavar="VERB")
    status = verbs.add_parser("status", help="which versions are served, and what is under way")
    status.add_argument("--json", action="store_true", help="print JSON")
    swap = verbs.add_parser("swap", help="load a bundle beside the one that serves; then it takes over")
    swap.add_argument("bundle", type=Path, metavar="DIR", help="a bundle of a model that is served")
    swap.add_argument(
        "--canary",
        type=int,
        default=100,
        metavar="PERCENT",
        help="instead, let both serve, and the new one get this share of the jobs",
    )
    canary = verbs.add_parser("canary", help="let the new version get another share of the jobs")
    canary.add_argument("percent", type=int, metavar="PERCENT", help="0 to 100")
    promote = verbs.add_parser("promote", help="let the new version take over")
    rollback = verbs.add_parser("rollback", help="drop the new version, or go back to the one before")
    forget = verbs.add_parser("forget", help="without an `up`: let every version that is served get jobs")
    for verb in (canary, promote, rollback, forget):
        verb.add_argument("--model", metavar="NAME", help="where several are served")


def _add_dead(dead: argparse.ArgumentParser) -> None:
    dead.set_defaults(run=run_dead)
    verbs = dead.add_subparsers(dest="verb", required=True, metavar="VERB")
    listing = verbs.add_parser("list", help="every dead letter, oldest first")
    show = verbs.add_parser("show", help="all that is known of one")
    show.add_argument("id", metavar="ID", help="the failed job")
    for verb in (listing, show):
        verb.add_argument("--json", action="store_true", help="print JSON")
    for name, what in (("retry", "accept the request again, as a new job"), ("drop", "forget the letter")):
        verb = verbs.add_parser(name, help=what)
        which = verb.add_mutually_exclusive_group(required=True)
        which.add_argument("ids", nargs="*", default=[], metavar="ID", help="failed jobs")
        which.add_argument("--all", action="store_true", help="all of them")


def _add_plan(plan: argparse.ArgumentParser) -> None:
    plan.set_defaults(run=run_plan)
    plan.add_argument(
        "bundle", type=Path, metavar="DIR", help="its table was measured on a machine like the workers'"
    )
    asked = plan.add_mutually_exclusive_group(required=True)
    asked.add_argument("--rate", type=_positive, metavar="N", help="requests per second: how many workers?")
    asked.add_argument("--workers", type=_count, metavar="N", help="workers: how many requests per second?")
    plan.add_argument(
        "--slo", type=_positive, required=True, metavar="SECONDS", help="latency that is promised"
    )
    plan.add_argument(
        "--percentile", type=_percent, default=95.0, metavar="P", help="to so many of 100 requests (95)"
    )
    plan.add_argument("--n", type=_count, default=1, metavar="N", help="samples of each request (1)")
    plan.add_argument(
        "--size", default="", metavar="WxH", help="of the samples; videos: WxHxFRAMES (the bundle's first)"
    )
    plan.add_argument(
        "--steps", type=_count, metavar="N", help="denoiser calls per sample (the bundle's default)"
    )
    plan.add_argument(
        "--beside-ms",
        type=float,
        default=0.0,
        metavar="MS",
        help="what a request takes beside waiting and engine (0)",
    )
    plan.add_argument(
        "--pace",
        type=_positive,
        default=1.0,
        metavar="X",
        help="what batches take where they are served, over the table: tdm_engine_pace_ratio under load (1)",
    )
    plan.add_argument("--price", type=_positive, metavar="X", help="of one worker's machine for an hour")
    plan.add_argument("--json", action="store_true", help="print JSON")


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text}: more than 0 is expected")
    return value


def _percent(text: str) -> float:
    value = _positive(text)
    if value >= 100:
        raise argparse.ArgumentTypeError(f"{text}: less than 100 is expected")
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: at least 1 is expected")
    return value


if __name__ == "__main__":
    sys.exit(main())
