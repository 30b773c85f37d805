"""Signed bundles: what a key accepts, and what it refuses before anything in the bundle is believed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from engines.__main__ import main
from engines.bundle.integrity import verify_files
from engines.bundle.manifest import MANIFEST, SIGNATURE, read_manifest, write_manifest
from engines.bundle.signature import check_signature, read_key, sign_bundle
from engines.bundle.stages import Backend
from engines.errors import BundleError, ConfigError
from engines.runtime.pipeline import Pipeline

KEY, OTHER = b"k" * 32, b"o" * 32


@pytest.fixture
def bundle(eager_bundle: Path, tmp_path: Path) -> Path:
    return shutil.copytree(eager_bundle, tmp_path / "bundle")


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "key"
    path.write_bytes(KEY + b"\n")
    return path


def refusal(bundle: Path, key: bytes = KEY) -> str:
    """Why the bundle is not accepted; every refusal names the signature."""
    with pytest.raises(BundleError) as caught:
        check_signature(bundle, key)
    assert caught.value.field == SIGNATURE
    return caught.value.message


def test_signed_bundle_is_accepted_and_still_whole(bundle: Path) -> None:
    sign_bundle(bundle, KEY)
    check_signature(bundle, KEY)
    verify_files(bundle)
    assert Pipeline.load(bundle, backend=Backend.EAGER, key=KEY).manifest == read_manifest(bundle)


def test_unsigned_bundle_is_refused_with_the_remedy(bundle: Path) -> None:
    assert "engines sign" in refusal(bundle)
    with pytest.raises(BundleError, match=SIGNATURE):
        Pipeline.load(bundle, backend=Backend.EAGER, key=KEY)


def test_bundle_of_another_key_is_refused_and_both_keys_are_named(bundle: Path) -> None:
    ours, theirs = sign_bundle(bundle, KEY).key, sign_bundle(bundle, OTHER).key
    assert ours != theirs
    message = refusal(bundle)
    assert ours in message
    assert theirs in message


def test_manifest_that_was_changed_after_signing_is_refused(bundle: Path) -> None:
    sign_bundle(bundle, KEY)
    text = (bundle / MANIFEST).read_text()
    (bundle / MANIFEST).write_text(text.replace('"num_threads": 1', '"num_threads": 2'))
    assert "changed" in refusal(bundle)


def test_signature_of_another_bundle_is_refused(bundle: Path, tmp_path: Path) -> None:
    other = shutil.copytree(bundle, tmp_path / "other")
    write_manifest(other, read_manifest(other).model_copy(update={"created": "2020-01-01T00:00:00+00:00"}))
    sign_bundle(other, KEY)
    shutil.copy(other / SIGNATURE, bundle / SIGNATURE)
    assert "changed" in refusal(bundle)


@pytest.mark.parametrize("content", ["", "{}", '{"algorithm": "none", "key": "", "signature": ""}'])
def test_what_is_no_signature_is_refused(bundle: Path, content: str) -> None:
    (bundle / SIGNATURE).write_text(content)
    assert "not a signature" in refusal(bundle)


def test_changed_file_is_refused_though_the_signature_is_right(bundle: Path) -> None:
    sign_bundle(bundle, KEY)
    (bundle / "checkpoint" / "student.json").write_text("{}")
    with pytest.raises(BundleError, match=r"^files\.checkpoint/student\.json"):
        Pipeline.load(bundle, backend=Backend.EAGER, key=KEY)


def test_damaged_bundle_is_not_signed(bundle: Path) -> None:
    (bundle / "checkpoint" / "student.json").unlink()
    with pytest.raises(BundleError, match="is missing"):
        sign_bundle(bundle, KEY)
    assert not (bundle / SIGNATURE).exists()


def test_new_manifest_takes_the_old_signature_away(bundle: Path) -> None:
    sign_bundle(bundle, KEY)
    write_manifest(bundle, read_manifest(bundle))
    assert not (bundle / SIGNATURE).exists()


def test_short_or_missing_key_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        read_key(tmp_path / "nowhere")
    (tmp_path / "short").write_bytes(b"x" * 31 + b"\n")
    with pytest.raises(ConfigError, match="31 bytes"):
        read_key(tmp_path / "short")


def test_commands_sign_verify_and_refuse(
    bundle: Path, key_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(bundle), "--key-file", str(key_file)]) == 2
    assert "manifest.sig: is missing" in capsys.readouterr().err
    assert main(["sign", str(bundle), "--key-file", str(key_file)]) == 0
    assert main(["verify", str(bundle), "--key-file", str(key_file)]) == 0
    assert "signature: made with this key" in capsys.readouterr().out


def test_build_signs_what_it_builds_and_vouches_for_nothing_else(
    tiny_student: Path, key_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "built"
    left = out / "engines" / "planted.pt2"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"not ours")
    command = ["build", str(tiny_student), "--out", str(out), "--backends", "eager", "--batches", "1"]
    signing = ["--if-needed", "--key-file", str(key_file)]

    assert main([*command, *signing]) == 0
    check_signature(out, KEY)
    assert not left.exists()
    capsys.readouterr()

    assert main([*command, *signing]) == 0
    assert "is up to date" in capsys.readouterr().out

    manifest = json.loads((out / MANIFEST).read_text())
    (out / MANIFEST).write_text(json.dumps(manifest | {"created": "yesterday"}))
    assert main([*command, *signing]) == 2
    assert "changed after it was signed" in capsys.readouterr().err
