# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json

import pytest

from ivg_fast.training.records import (
    PAIR_COLUMNS,
    SAMPLE_COLUMNS,
    TrainingDataError,
    read_jsonl,
    read_texts,
    whole_lines,
    write_jsonl,
)

GOOD = {"prompt": "a", "response": " b", "reward": 1.5}


def write(path, *lines):
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_round_trip(tmp_path):
    records = [GOOD, {**GOOD, "reward": 2, "extra": "é"}]
    write_jsonl(tmp_path / "a.jsonl", records)
    assert read_jsonl(tmp_path / "a.jsonl", SAMPLE_COLUMNS) == records


@pytest.mark.parametrize(
    ("lines", "columns", "message"),
    [
        ([""], SAMPLE_COLUMNS, "is empty"),
        (["{"], SAMPLE_COLUMNS, "line 1: not JSON"),
        (
            [json.dumps({**GOOD, "response_is_whole": 1})],
            SAMPLE_COLUMNS,
            "response_is_whole must be bool, got 1",
        ),
        (
            [json.dumps({**GOOD, "response": "", "response_is_whole": False})],
            SAMPLE_COLUMNS,
            "response is an empty string",
        ),
        (["[1]"], SAMPLE_COLUMNS, "not a JSON object"),
        ([json.dumps({"prompt": "a", "reward": 1})], SAMPLE_COLUMNS, "missing column 'response'"),
        ([json.dumps(GOOD), json.dumps({**GOOD, "reward": float("nan")})], SAMPLE_COLUMNS, "nan"),
        ([json.dumps({**GOOD, "reward": float("inf")})], SAMPLE_COLUMNS, "finite"),
        ([json.dumps({**GOOD, "reward": "1"})], SAMPLE_COLUMNS, "finite number, got '1'"),
        ([json.dumps({**GOOD, "reward": True})], SAMPLE_COLUMNS, "finite number, got True"),
        ([json.dumps({**GOOD, "response": 3})], SAMPLE_COLUMNS, "response must be str, got 3"),
        ([json.dumps({**GOOD, "response": ""})], SAMPLE_COLUMNS, "response is an empty string"),
        ([json.dumps(GOOD)], PAIR_COLUMNS, "missing column 'chosen'"),
    ],
)
def test_bad_files_name_what_is_wrong(tmp_path, lines, columns, message):
    with pytest.raises(TrainingDataError, match=message):
        read_jsonl(write(tmp_path / "bad.jsonl", *lines), columns)


def test_absent_file(tmp_path):
    with pytest.raises(TrainingDataError, match="no such file"):
        read_jsonl(tmp_path / "absent.jsonl", {})


def test_texts_from_either_form(tmp_path):
    one = write(tmp_path / "one.jsonl", json.dumps({"text": "a b"}))
    two = write(tmp_path / "two.jsonl", json.dumps(GOOD))
    assert read_texts(one) == read_texts(two) == ["a b"]


def test_whole_lines_of_a_file_that_was_cut_short(tmp_path):
    path = tmp_path / "growing.jsonl"
    assert whole_lines(path) == []
    # Characters that str.splitlines takes for ends of lines.
    texts = ["a\u2028b", "c\x85d", "\u00e9"]
    write_jsonl(path, [{"text": text} for text in texts])
    whole = path.read_bytes()
    path.write_bytes(whole + whole[: whole.index(b"\xe2") + 1])  # within a character
    assert [record["text"] for record in whole_lines(path)] == texts
    assert path.read_bytes() == whole
    path.write_bytes(b'{"te')
    assert whole_lines(path) == []
    assert path.read_bytes() == b""
