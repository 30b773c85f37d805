"""The README's table of settings is written from the settings."""

import re

import pytest

from server.settings import Settings
from server.settings_table import BEGIN, END, table, with_table

ROWS = {
    name: (default, allowed, says)
    for name, default, allowed, says in re.findall(
        r"^\| `(\w+)` \| (.*?) \| (.*?) \| (.*) \|$", table(), flags=re.MULTILINE
    )
}


def test_every_setting_of_an_operator_has_a_row() -> None:
    ours_alone = {"listen_fd", "worker_index"}

    fields = {name.removeprefix("TDM_").lower() for name in ROWS}
    assert fields == set(Settings.model_fields) - ours_alone


def test_every_row_says_something() -> None:
    assert [name for name, (_, _, says) in ROWS.items() if len(says) < 20] == []


def test_row_has_default_and_limits() -> None:
    assert ROWS["TDM_PORT"][:2] == ("`8000`", "from 0 to 65535")
    assert ROWS["TDM_LEASE_S"][:2] == ("`20.0`", "above 0")
    assert ROWS["TDM_BACKEND"][:2] == ("`auto`", "`auto`, `eager`, `aotinductor`, `tensorrt`")
    assert ROWS["TDM_BUNDLES"][:2] == ("empty", "")


def test_other_settings_are_named_as_the_reader_sets_them() -> None:
    assert "`TDM_DATA_DIR/results`" in ROWS["TDM_STORE_URL"][2]
    assert "`redis://`" in ROWS["TDM_REDIS_URL"][2]


def test_variable_of_another_project_keeps_its_name() -> None:
    assert "CUDA_VISIBLE_DEVICES" in ROWS


def test_table_replaces_the_one_that_stood_there() -> None:
    stale = f"above\n{BEGIN}\n| old |\n{END}\nbelow\n"

    written = with_table(stale)
    assert written == f"above\n{BEGIN}\n{table()}\n{END}\nbelow\n"
    assert with_table(written) == written


@pytest.mark.parametrize(
    "document", ["none", f"{BEGIN} never ends", f"{END} before {BEGIN}", f"{BEGIN}{END}{BEGIN}{END}"]
)
def test_document_without_a_place_for_it_is_refused(document: str) -> None:
    with pytest.raises(ValueError, match="no place for the table"):
        with_table(document)
