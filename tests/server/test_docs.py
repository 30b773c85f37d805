"""server/README.md names tests, codes and modules: they must be there."""

import re
from pathlib import Path

import pytest

from server.job import JobErrorCode
from server.supervisor.audit import LEFTOVERS, Code

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "server/README.md").read_text(encoding="utf-8")
PROOFS = re.findall(r"`((?:server|failures|e2e)/(?:\w+/)?test_\w+\.py)::(\w+)`", TEXT)


def test_every_failure_names_its_proof() -> None:
    table = TEXT.partition("| failure | what happens | test |\n|---|---|---|\n")[2].partition("\n\n")[0]
    rows = table.splitlines()
    assert len(rows) > 20
    assert [row for row in rows if "::test_" not in row] == []


@pytest.mark.parametrize(("path", "name"), PROOFS, ids=[name for _, name in PROOFS])
def test_proof_exists(path: str, name: str) -> None:
    source = (ROOT / "tests" / path).read_text(encoding="utf-8")
    assert re.search(rf"^ *(?:async )?def {name}\(", source, flags=re.MULTILINE)


def test_every_code_of_the_audit_is_explained() -> None:
    explained = set(re.findall(r"`(\w+)`", TEXT.partition("### Audit")[2]))
    assert {str(code) for code in Code} <= explained
    leftovers = TEXT.partition("*Leftovers*")[2]
    assert all(f"`{code}`" in leftovers for code in LEFTOVERS)


def test_every_code_that_a_job_can_end_with_is_listed() -> None:
    listed = TEXT.partition("Errors a job can end with")[2].partition("\n\n")[0]
    assert set(JobErrorCode) <= set(re.findall(r"`(\w+)`", listed))


def test_every_module_is_listed() -> None:
    table = TEXT.partition("## Modules")[2].partition("\n## ")[0]
    files = [path for path in (ROOT / "server").rglob("*.py") if path.stat().st_size]
    names = {path.relative_to(ROOT / "server").as_posix() for path in files}
    missing = {name for name in names if not name.startswith("api/routes/") and f"`{name}`" not in table}
    assert missing == set()
