"""Where prompts come from: files of several kinds, and what is refused."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from engines.distill.prompts import load_prompts
from engines.errors import ConfigError

PROMPTS = ['a "red" cube, on grass', "ein grüner Würfel", "three\nlines"]


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_text_has_a_prompt_per_line_and_blank_lines_do_not_count(tmp_path: Path) -> None:
    file = write(tmp_path / "prompts.TXT", "a red cube \n\n \n  a torus\r\na cone\n")
    assert load_prompts(file, 10, 0) == ["a red cube", "a torus", "a cone"]
    assert load_prompts(file, 2, 0) == ["a red cube", "a torus"]


@pytest.mark.parametrize("field", ["prompt", "caption"])
def test_json_lines_keep_prompts_in_a_field(tmp_path: Path, field: str) -> None:
    rows = "\n".join(json.dumps({"id": index, field: prompt}) for index, prompt in enumerate(PROMPTS))
    assert load_prompts(write(tmp_path / "prompts.jsonl", rows + "\n\n"), 10, 0) == PROMPTS


def test_csv_keeps_prompts_in_a_column(tmp_path: Path) -> None:
    rows = 'id,caption\n1,"a ""red"" cube, on grass"\n2,\n3,ein grüner Würfel\n4,"three\nlines"\n'
    assert load_prompts(write(tmp_path / "prompts.csv", "\ufeff" + rows), 10, 0) == PROMPTS


def test_only_as_much_is_read_as_is_wanted(tmp_path: Path) -> None:
    file = write(tmp_path / "prompts.jsonl", '{"prompt": "a torus"}\nnot JSON\n')
    assert load_prompts(file, 1, 0) == ["a torus"]


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("prompts.txt", "", "holds no prompt"),
        ("prompts.txt", "\n \n", "holds no prompt"),
        ("prompts.csv", "", "field prompt or caption is expected, found nothing"),
        ("prompts.csv", "prompt\n", "holds no prompt"),
        ("prompts.csv", "id,text\n1,a cube\n", "field prompt or caption is expected, found id, text"),
        ("prompts.jsonl", '{"prompt": "a"}\n{"prompt": \n', "line 2: not JSON"),
        ("prompts.jsonl", '["a"]\n', "line 1: an object is expected"),
        ("prompts.jsonl", '{"prompt": "a"}\n\n{"text": "b"}\n', "line 3: a field prompt or caption"),
        ("prompts.jsonl", '{"prompt": 7}\n', "field prompt: text is expected, not 7"),
        ("prompts.json", "[]", r"\.txt, \.jsonl, \.csv, \.parquet is expected, not '\.json'"),
        ("prompts", "a cube", "not 'no suffix'"),
    ],
)
def test_files_without_prompts_are_refused_with_the_place(
    tmp_path: Path, name: str, content: str, match: str
) -> None:
    with pytest.raises(ConfigError, match=match) as error:
        load_prompts(write(tmp_path / name, content), 10, 0)
    assert str(tmp_path / name) in str(error.value)


def test_missing_unreadable_and_wrong_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*No such file"):
        load_prompts(tmp_path / "missing.txt", 10, 0)
    (tmp_path / "directory.txt").mkdir()
    with pytest.raises(ConfigError, match="is a directory"):
        load_prompts(tmp_path / "directory.txt", 10, 0)
    (tmp_path / "latin.txt").write_bytes("grün\n".encode("latin-1"))
    with pytest.raises(ConfigError, match="cannot read"):
        load_prompts(tmp_path / "latin.txt", 10, 0)


@pytest.mark.skipif(find_spec("pyarrow") is not None, reason="pyarrow is installed")
def test_parquet_without_pyarrow_says_what_to_install(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="pip install pyarrow"):
        load_prompts(write(tmp_path / "prompts.parquet", "PAR1"), 10, 0)


@pytest.mark.skipif(find_spec("pyarrow") is None, reason="pyarrow is not installed")
def test_parquet_keeps_prompts_in_a_column(tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    table = pa.table({"id": [1, 2, 3, 4], "caption": [*PROMPTS, None]})
    parquet.write_table(table, tmp_path / "prompts.parquet")
    assert load_prompts(tmp_path / "prompts.parquet", 10, 0) == PROMPTS
    with pytest.raises(ConfigError, match="cannot read"):
        load_prompts(write(tmp_path / "damaged.parquet", "PAR1"), 10, 0)


def test_demo_prompts_are_captions_that_depend_on_the_seed() -> None:
    prompts = load_prompts("demo", 20, 3)
    assert len(prompts) == 20
    assert prompts == load_prompts("demo", 20, 3) != load_prompts("demo", 20, 4)
