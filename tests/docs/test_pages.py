# SPDX-License-Identifier: Apache-2.0
"""README.md and docs/: Python runs, commands parse, figures, names and links are real."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

import ivg_fast
from ivg_fast.cli import build_parser

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
IDS = [page.name for page in PAGES]
LANGUAGES = {"python", "sh"}


def fences(page: str) -> Iterator[tuple[str, str]]:
    """(language, text) of each fenced block."""
    for match in re.finditer(r"^```(\w*)\n(.*?)^```$", page, re.MULTILINE | re.DOTALL):
        yield match[1], match[2]


def commands(page: str) -> Iterator[str]:
    """The lines of sh blocks, indented commands, and `ivg-fast ...` inside sentences."""
    for language, text in fences(page):
        if language == "sh":
            yield from (line for line in text.replace("\\\n", " ").splitlines() if line.strip())
    plain = re.sub(r"^```.*?^```$", "", page, flags=re.MULTILINE | re.DOTALL)
    yield from re.findall(r"^ {4}((?:ivg-fast|python -m|make) .*)$", plain, re.MULTILINE)
    inline = re.findall(r"`((?:ivg-fast|python -m|make) [^`]*)`", plain)
    yield from (" ".join(text.split()) for text in inline)


def fault(command: str) -> str | None:
    """What is wrong with a command of the documents."""
    words = shlex.split(command, comments=True)
    words = words[: words.index(">")] if ">" in words else words
    if words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
        unknown = [word for word in words[1:] if "=" not in word and word not in targets]
        return f"no such target: {unknown}" if unknown else None
    if words[:2] == ["python", "-m"]:
        return _module(words[2], words[3:])
    if words[0] == "ivg-fast":
        return _parse(words[1:])
    return None if words[0] == "pip" else f"unknown command {words[0]}"


def _module(name: str, words: list[str]) -> str | None:
    """A module's options are looked for in its package, where they are spelt or made of fields."""
    if not importlib.util.find_spec(name):
        return f"no module {name}"
    package = (ROOT / name.split(".")[0]).rglob("*.py")
    text = "".join(path.read_text("utf-8") for path in package)
    if name == "bench":
        known = set(re.findall(r'^    "(\w+)": "', (ROOT / "bench/__main__.py").read_text(), re.M))
        if words and words[0] != "NAME" and words[0] not in known:
            return f"no bench {words[0]}"
    options = [word.strip("[]") for word in words if word.strip("[").startswith("--")]
    unknown = [option for option in options if f'"{option}"' not in text]
    return f"no options {unknown}" if unknown else None


def _parse(words: list[str]) -> str | None:
    is_name = len(words) < 3 and not any(word.startswith("-") for word in words)
    if is_name:  # a command is named, not given: its options need not be there
        words = [*words, "--help"]
    try:
        build_parser().parse_args([word.replace("...", "") for word in words if word != "..."])
    except SystemExit as end:
        return None if end.code == 0 else f"does not parse: {words}"
    return None


@pytest.mark.parametrize("path", PAGES, ids=IDS)
def test_python_runs(path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """A page's blocks run in order, as one program."""
    blocks = list(fences(path.read_text("utf-8")))
    assert {language for language, _ in blocks} <= LANGUAGES, "every block has a language"
    namespace: dict[str, object] = {"__name__": "page"}
    for language, text in blocks:
        if language == "python":
            exec(compile(text, path.name, "exec"), namespace)  # the page is ours
    if path.name in ("README.md", "engine_integration.md"):
        assert capsys.readouterr().out


@pytest.mark.parametrize("path", PAGES, ids=IDS)
def test_commands_parse(path: Path) -> None:
    wrong = {c: fault(c) for c in commands(path.read_text("utf-8"))}
    assert {c: message for c, message in wrong.items() if message} == {}


def test_the_check_of_commands_sees_wrong_ones() -> None:
    page = (
        "```sh\nmake demo   # yes\nmake tea\nivg-fast generate --base B \\\n  --beams 4\n```\n"
        "Run `ivg-fast score --value V` or `ivg-fast scores`.\n\n    python -m bench.nothing --x\n"
        "\n    python -m bench e2e --quick --slow\n\n    python -m bench oops\n"
    )
    wrong = [command for command in commands(page) if fault(command)]
    assert [command.split()[1] for command in wrong] == [
        "tea",
        "generate",
        "-m",
        "-m",
        "-m",
        "scores",
    ]


@pytest.mark.parametrize("path", PAGES, ids=IDS)
def test_links_and_files_exist(path: Path) -> None:
    page = path.read_text("utf-8")
    links = re.findall(r"\]\((?!https?:)([^)#]+)", page)
    assert [link for link in links if not (path.parent / link).exists()] == []
    files = re.findall(r"`((?:examples|bench/results|docs)/[\w./]+)`", page)
    assert [file for file in files if not (ROOT / file).exists()] == []


@pytest.mark.parametrize("path", PAGES, ids=IDS)
def test_names_exist(path: Path) -> None:
    """What a page imports of the package, or names with it in front, is there."""
    for name in set(re.findall(r"`ivg_fast\.([\w.]+)`", path.read_text("utf-8"))):
        parts = name.split(".")
        found: object = ivg_fast
        for i, part in enumerate(parts):
            if not hasattr(found, part):
                spec = importlib.util.find_spec(".".join(["ivg_fast", *parts[: i + 1]]))
                assert spec is not None, name
                break
            found = getattr(found, part)


def test_figures_are_those_of_the_results() -> None:
    page = (ROOT / "docs" / "engine_integration.md").read_text("utf-8")
    stored = json.loads(
        (ROOT / "bench/results/controlled_sentiment/summary.json").read_text("utf-8")
    )
    by_weight: dict[float, dict[str, str]] = {}
    for row in stored["dev"]:
        if row["method"] in ("eft", "ivg"):
            cells = f"{row['gold']:.2f} | {row['distinct_2']:.2f}"
            by_weight.setdefault(row["weight"], {})[row["method"]] = cells
    for weight, cells in by_weight.items():
        assert f"| {weight} | {cells['eft']} | {cells['ivg']} |" in page
    settings = stored["settings"]
    assert f"{settings['num_dev_prompts']} development prompts" in page
    assert f"On {settings['num_prompts']} test prompts and three seeds" in page
    assert len(settings["seeds"]) == 3
    figures = {name: f"{method['gold']:.2f}" for name, method in stored["methods"].items()}
    said = page[page.index("test prompts and three seeds") :][:200]
    names = ("base", "cbs_explicit", "eft", "ivg", "eft_wide")
    assert re.findall(r"-?\d+\.\d\d", said) == [figures[name] for name in names]
    kl = [f"{stored['methods'][name]['kl']['total']:.0f}" for name in ("eft_wide", "ivg")]
    assert f"{kl[0]} nats for the last, at most {kl[1]} for" in page
    cbs, ivg = (
        {
            tuple(row["params"][n] for n in ("beam_width", "num_candidates", "chunk_length")): row
            for row in stored["search_sweep"]
            if row["method"] == method
        }
        for method in ("cbs_explicit", "ivg")
    )
    shown = re.findall(r"^\| (\d), (\d), (\d+|whole) \| (.+) \|$", page, re.MULTILINE)
    assert len(shown) == 9
    for width, children, chunk, cells in shown:
        key = (int(width), int(children), None if chunk == "whole" else int(chunk))
        tokens = f"{ivg[key]['tokens_forwarded']['base']:.0f}"
        assert cells == f"{cbs[key]['gold']:.2f} | {ivg[key]['gold']:.2f} | {tokens}"
    falls = [f"{ivg[4, 4, length]['distinct_2']:.2f}" for length in (5, 1)]
    assert re.sub(r"\s+", " ", page).count(f"falls from {falls[0]} to {falls[1]} at L = 1") == 1
