"""What the documentation names is there, after a bare `import dycoke`."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import dycoke

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "AGENTS.md")]
PAGES += sorted((ROOT / "docs").glob("*.md"))
# Not a name behind a dot or a slash, such as a file's.
NAME = re.compile(r"(?<![\w/.-])(?<!-m )dycoke(?:\.[A-Za-z_]\w*)+")
RUN = re.compile(r"python -m (dycoke(?:\.\w+)*)")

RESOLVE = """
import functools, json, sys
import dycoke
missing = []
for name in json.load(sys.stdin):
    try:
        functools.reduce(getattr, name.split(".")[1:], dycoke)
    except AttributeError as error:
        missing.append(f"{name}: {error}")
print(json.dumps(missing))
"""


@pytest.mark.once
def test_names_in_the_documentation_resolve_after_a_bare_import() -> None:
    found = {name for page in PAGES for name in NAME.findall(page.read_text())}
    assert {"dycoke.encode_in_chunks", "dycoke.merging.budget_mask", "dycoke.VideoSpan"} <= found
    done = subprocess.run(
        [sys.executable, "-c", RESOLVE],
        input=json.dumps(sorted(found)),
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout) == []


def test_modules_that_the_documentation_runs_are_there() -> None:
    found = {name for page in PAGES for name in RUN.findall(page.read_text())}
    assert "dycoke.nano.train" in found
    for name in found:
        assert importlib.util.find_spec(name) is not None


def test_every_listed_room_is_there_and_listed_once() -> None:
    names = [name for name in dir(dycoke) if not name.startswith("_")]
    assert len(names) == len(set(names))
    for name in (*dycoke.__all__, *dycoke._ROOMS):
        assert getattr(dycoke, name) is not None
        assert name in dir(dycoke)


def test_the_documentation_cites_only_pages_that_are_there() -> None:
    cited = re.compile(r"(?<![\w/.-])((?:[\w-]+/)*[\w-]+\.md)\b")
    texts = [*PAGES, *sorted((ROOT / "src").rglob("*.py"))]
    for page in texts:
        for name in cited.findall(page.read_text()):
            assert any((folder / name).exists() for folder in (ROOT, page.parent)), (page, name)
