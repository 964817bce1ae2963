"""What the README and the documents say is true: commands, links, the tree, the example."""

from __future__ import annotations

import ast
import functools
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import dycoke
from dycoke.methods import METHODS, create

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.M | re.S)
IDS = [str(page.relative_to(ROOT)) for page in PAGES]
TODAY = [page for page in PAGES if page.name != "CHANGELOG.md"]  # which names old commands, too


def blocks(page: Path, language: str) -> list[str]:
    return [body for found, body in FENCE.findall(page.read_text()) if found == language]


def commands(page: Path, name: str) -> list[list[str]]:
    """What the page runs by this name, in shell blocks and between backticks, as words.

    Backticks in a sentence count where something follows the name: `dycoke` alone is the package.
    """
    text = page.read_text()
    prose = FENCE.sub("", text)
    lines = [line for block in blocks(page, "sh") for line in joined(block).splitlines()]
    lines += [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]
    found = []
    for line in lines:
        words = line.split("#")[0].split()
        if len(words) > 1 and words[0].rsplit("/", 1)[-1] == name:
            found.append(words[1:])
    return found


def joined(block: str) -> str:
    """Lines that a backslash continues, as one."""
    return re.sub(r"\\\n\s*", " ", block)


@functools.cache
def help_of(*command: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", "from dycoke.cli import main; main()", *command, "--help"],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "200"},
    )
    assert done.returncode == 0, f"dycoke {' '.join(command)}: {done.stderr}"
    return done.stdout


def options_of(command: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", help_of(command)))


def slugs(page: Path) -> set[str]:
    """The anchors of a page's headings, as a forge makes them."""
    heads = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text()), re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in heads}


def test_the_readme_is_short() -> None:
    assert len(README.read_text().splitlines()) <= 150


def test_the_commands_that_are_named_exist() -> None:
    known = set(re.findall(r"^  ([a-z]+)  ", help_of(), re.M))
    assert {"run", "eval", "bench", "methods"} <= known
    named = {(page, tuple(words)) for page in TODAY for words in commands(page, "dycoke")}
    assert {words[0] for _, words in named} >= {"run", "eval", "bench", "methods", "models", "demo"}
    for page, (command, *words) in sorted(named):
        if command.startswith("-"):
            assert command.split("=")[0] in help_of(), (page.name, command)
            continue
        assert command in known, (page.name, command)
        for word in words:
            if re.match(r"--?[a-z]", word):
                option = word.rstrip(".,").split("=")[0]
                assert option in options_of(command), (page.name, command, option)


def test_the_methods_that_are_named_exist() -> None:
    checked = 0
    for page in TODAY:
        for words in commands(page, "dycoke"):
            for option, value in itertools.pairwise(words):
                if option in ("--methods", "--method", "--against") and value != "NAME":
                    for name in value.split(","):
                        create(name)  # raises where there is none
                    checked += 1
    assert checked >= 4


def test_the_targets_of_make_exist() -> None:
    targets = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.M))
    named = {(page, words[0]) for page in TODAY for words in commands(page, "make")}
    assert {target for _, target in named} >= {"demo", "test", "check", "test-floor", "test-all"}
    for page, target in sorted(named):
        assert target in targets, (page.name, target)


def test_the_scripts_that_are_named_are_there() -> None:
    cited = re.compile(r"\b((?:benchmarks|examples|tests)/[\w/-]+\.(?:py|json))\b")
    found = {(page, name) for page in PAGES for name in cited.findall(page.read_text())}
    assert {name for _, name in found} >= {"benchmarks/memory.py", "examples/quickstart.py"}
    missing = sorted(f"{page.name}: {name}" for page, name in found if not (ROOT / name).exists())
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_relative_links_and_anchors_resolve(page: Path) -> None:
    for target in re.findall(r"\]\(([^()\s]+)\)", FENCE.sub("", page.read_text())):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), target
        assert not anchor or anchor in slugs(file), target


def test_every_document_is_in_the_index() -> None:
    index = (ROOT / "docs" / "index.md").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name == "index.md" or f"]({page.name})" in index, page.name


def test_the_tree_is_that_of_the_package() -> None:
    design = (ROOT / "docs" / "design.md").read_text()
    (tree,) = re.findall(r"^```\nsrc/dycoke/\n(.*?)^```$", design, re.M | re.S)
    drawn = [name.removesuffix("/") for name in re.findall(r"^  ([\w./]+)  ", tree, re.M)]
    folder = Path(dycoke.__file__).parent
    there = {path.parent.name for path in folder.glob("*/__init__.py")}
    there |= {path.name for path in folder.glob("*.py")} - {"__init__.py"}
    assert sorted(drawn) == sorted(there)


def test_the_example_is_the_readmes() -> None:
    (block,) = (b for b in blocks(README, "python") if "from_pretrained" in b)
    example = (ROOT / "examples" / "quickstart.py").read_text()
    imports, work = block.split('checkpoint, clip = "', 1)
    lines = example.splitlines()
    for line in filter(None, imports.splitlines()):
        assert line in lines
    # The first line names a checkpoint; what follows is the example's, to its last line.
    assert example.endswith("checkpoint, clip = given()\n" + work.split("\n", 1)[1])


def test_python_blocks_are_python() -> None:
    found = [(page, block) for page in PAGES for block in blocks(page, "python")]
    assert len(found) > 5
    for page, block in found:
        body = [line for line in block.splitlines() if line.strip()]
        least = min(len(line) - len(line.lstrip()) for line in body)
        source = "\n".join(line[least:] for line in block.splitlines())
        try:
            ast.parse(source)
        except SyntaxError as error:
            raise AssertionError(f"{page.name}: {error}") from None


def test_the_methods_table_has_every_paper_and_its_code() -> None:
    rows = [line for line in README.read_text().splitlines() if line.startswith("| `")]
    entries = [entry for entry in METHODS.values() if entry.paper]
    assert len(entries) >= 8
    assert len(rows) == len(entries)
    for entry in entries:
        assert any(f"]({entry.paper})" in row and f"]({entry.source})" in row for row in rows)


def result(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ROOT / "benchmarks" / "results" / name).read_text())
    return found


def test_the_figures_of_speed_and_memory_are_those_that_are_committed() -> None:
    speed = result("llava-onevision-0.5b-cpu.json")
    full, ours = ({**r, **r["stages"]} for r in speed["results"][:2])
    assert (full["method"], ours["method"]) == ("full", "dycoke")
    rows = {
        f"prefill of {speed['prompt_tokens']} tokens": ("prefill_s", 1, "{:.1f} s"),
        "time per token": ("per_token_s", 1e3, "{:.0f} ms"),
        f"language model, prefill and {speed['new_tokens']} tokens": ("llm_s", 1, "{:.1f} s"),
        "KV cache": ("kv_bytes", 1 / 2**20, "{:.1f} MiB"),
    }
    text = README.read_text()
    for name, (field, scale, form) in rows.items():
        cells = [form.format(side[field] * scale) for side in (full, ours)]
        assert f"| {name} | {cells[0]} | {cells[1]} | {ours['vs_full'][field]:.2f}x |" in text
    assert f"| {ours['vs_full']['flops']:.2f}x |" in text


def test_the_figures_of_accuracy_are_those_that_are_committed() -> None:
    text = " ".join(README.read_text().split())
    lines = {row["name"]: row for row in result("storyqa-plus-500.json")["results"]}
    full, dycoke, plus = (
        lines[name] for name in ("full", "dycoke K=0.7 P=0.7 L=3", "dycoke+ K=0.7 P=0.7 L=3")
    )
    for name, task in (("questions answered", "ask"), ("events told", "describe")):
        whole, plain, ours = (
            f"{100 * row[task]['correct'] / row[task]['n']:.1f} %" for row in (full, dycoke, plus)
        )
        lost = ", ".join(f"{100 * side[task]['to_full'][0]:.1f}" for side in (dycoke, plus))
        cells = f"| nano: {name} right | {whole} | {plain}, DyCoke+ {ours} | {lost} points |"
        assert cells in text

    rows = {
        row["method"]: row["describe"]["correct"] / row["describe"]["n"]
        for row in result("storyqa-retention-200.json")["results"]
        if "attended" in row["bases"] and row["target_retention"] == 0.1
    }
    ours, plain = rows.pop("dycoke+"), rows.pop("dycoke")
    rows.pop("once")  # DyCoke's own
    best = max(rows, key=lambda name: rows[name])
    assert best == "flashvid+" and ours > plain > rows[best]
    assert f"DyCoke+ {100 * ours:.1f} %, DyCoke {100 * plain:.1f} %" in text
    assert f"FlashVID with our echoes, {100 * rows[best]:.1f} %" in text


def test_the_figures_of_the_papers_setting_are_those_that_are_committed() -> None:
    text = " ".join((ROOT / "docs" / "accuracy.md").read_text().split())
    nominal = result("storyqa-nominal-200.json")["results"]
    rows = {row["method"]: row for row in nominal if "attended" in row["bases"]}
    dycoke = rows.pop("dycoke")
    controls = ("full", "once", "always", "merging", "random", "fewer-frames")
    others = [row for name, row in rows.items() if name not in controls]
    best = max(others, key=lambda row: int(row["describe"]["correct"]))
    assert best["method"] == "flashvid"
    told = [row["describe"]["correct"] / row["describe"]["n"] for row in (dycoke, best)]
    assert f"{told[0]:.1%}".replace("%", " %") + " of events" in text
    assert f"methods, {told[1]:.1%}".replace("%", " %") in text
    assert f"DyCoke holds {dycoke['retention']:.1%}".replace("%", " %") in text
    assert f"FlashVID {best['retention']:.1%}".replace("%", " %") in text
