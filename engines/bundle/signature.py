"""Signatures of bundles: compiled code runs with our rights, so it matters who built it. No torch here.

`manifest.sig` beside the manifest holds an HMAC-SHA256 (RFC 2104) of the manifest's bytes. The manifest has
the hash of every other file, so the signature is of the whole bundle. Whoever has the key can sign; keep it
from those who may only put bundles where workers find them.
"""

from __future__ import annotations

import hmac
import json
from hashlib import sha256
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from engines.bundle.integrity import verify_files
from engines.bundle.manifest import MANIFEST, SIGNATURE
from engines.errors import BundleError, ConfigError
from engines.files import atomic_write

MIN_KEY_BYTES = 32


class Signature(BaseModel):
    """The content of `manifest.sig`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    algorithm: Literal["hmac-sha256"] = "hmac-sha256"
    key: str = Field(pattern=r"^[0-9a-f]{16}$")
    """Tells keys apart; says nothing of the key itself."""
    signature: str = Field(pattern=r"^[0-9a-f]{64}$")


def read_key(path: Path) -> bytes:
    """Read a key: the bytes of a file without white space around them.

    Raises:
        ConfigError: there is no such file, or it holds fewer than `MIN_KEY_BYTES`.
    """
    try:
        key = path.read_bytes().strip()
    except OSError as error:
        raise ConfigError(f"key file {path}: {error.strerror}") from None
    if len(key) < MIN_KEY_BYTES:
        raise ConfigError(
            f"key file {path}: {len(key)} bytes, at least {MIN_KEY_BYTES} are needed; "
            "openssl rand -hex 32 makes a good one"
        )
    return key


def sign_bundle(directory: Path, key: bytes) -> Signature:
    """Check that a bundle is whole, then sign it.

    Raises:
        BundleError: a file is missing, changed or was added.
    """
    verify_files(directory)
    signed = _sign(directory, key)
    atomic_write(directory / SIGNATURE, json.dumps(signed.model_dump(), indent=2) + "\n")
    return signed


def check_signature(directory: Path, key: bytes) -> None:
    """Return if the manifest of a bundle was signed with `key`; call it before anything in it is believed.

    Raises:
        BundleError: it is not a bundle, not signed, signed with another key, or was changed since.
    """
    remedy = f"if you trust it: python -m engines sign {directory} --key-file FILE"
    try:
        found = Signature.model_validate_json((directory / SIGNATURE).read_bytes())
    except FileNotFoundError:
        raise BundleError(SIGNATURE, f"is missing, and only signed bundles are accepted; {remedy}") from None
    except ValidationError as error:
        raise BundleError(SIGNATURE, f"not a signature ({error.errors()[0]['msg']}); {remedy}") from None
    expected = _sign(directory, key)
    if not hmac.compare_digest(found.key, expected.key):
        raise BundleError(SIGNATURE, f"signed with key {found.key}, not with {expected.key}; {remedy}")
    if not hmac.compare_digest(found.signature, expected.signature):
        raise BundleError(SIGNATURE, "the manifest was changed after it was signed; get the bundle again")


def _sign(directory: Path, key: bytes) -> Signature:
    try:
        manifest = (directory / MANIFEST).read_bytes()
    except OSError:
        raise BundleError(MANIFEST, f"not found; {directory} is not a bundle") from None
    return Signature(
        key=hmac.new(key, b"id of a bundle key", sha256).hexdigest()[:16],
        signature=hmac.new(key, manifest, sha256).hexdigest(),
    )
