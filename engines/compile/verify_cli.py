"""The `verify` and `sign` commands: arguments here, the work imported when they run."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from engines.arguments import add_key_file, key_of, say
from engines.bundle.signature import check_signature, read_key, sign_bundle
from engines.compile.tables import parity_table

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

EXIT_DOES_NOT_FIT = 1


def add_verify_parser(commands: Commands) -> None:
    """Add `verify` to the command line."""
    parser = commands.add_parser("verify", help="check a bundle: hashes, platform, agreement with eager")
    parser.add_argument("bundle", type=Path)
    add_key_file(parser, "check that this key has signed it, too")
    parser.set_defaults(run=run_verify)


def run_verify(args: argparse.Namespace) -> int:
    """Verify; exit status 0 if everything is well, 1 if only eager can serve the bundle here."""
    from engines.compile.verify import verify_bundle

    console = Console()
    key = key_of(args)
    if key is not None:
        check_signature(args.bundle, key)
        say(console, "signature: made with this key")
    verdict = verify_bundle(args.bundle)
    manifest = verdict.manifest
    say(console, f"hashes: {len(manifest.files)} files are as they were built ({manifest.version})")
    for mismatch in verdict.mismatches:
        say(console, f"platform: {mismatch}")
    if not manifest.engines:
        say(console, f"no compiled code: {manifest.eager_only}; eager serves")
        return 0
    if not verdict.fitting:
        say(console, "compiled code does not fit this machine; eager can serve, or build again")
        return EXIT_DOES_NOT_FIT
    which = f" ({', '.join(verdict.fitting)})" if verdict.mismatches else ""
    say(console, f"platform: compiled code fits this machine{which}")
    console.print(parity_table(verdict.parity))
    say(console, "parity: compiled code agrees with eager")
    return 0


def add_sign_parser(commands: Commands) -> None:
    """Add `sign` to the command line."""
    parser = commands.add_parser("sign", help="sign a bundle, for workers that take only signed ones")
    parser.add_argument("bundle", type=Path)
    add_key_file(parser, "key: at least 32 bytes (openssl rand -hex 32)", required=True)
    parser.set_defaults(run=run_sign)


def run_sign(args: argparse.Namespace) -> int:
    """Sign a bundle that is whole."""
    signed = sign_bundle(args.bundle, read_key(args.key_file))
    say(Console(), f"{args.bundle} signed with key {signed.key}")
    return 0
