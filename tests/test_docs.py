"""The documentation is true where a machine can tell: its examples run, its links and the files it names exist."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import rnnfast

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "tests").rglob("*.md"))]
EXAMPLE = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?:)([^)#]+)")
FILE = re.compile(r"`((?:csrc|rnnfast|tests|benchmarks|examples|docs)/[\w./-]+)`")

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def run_examples(name: str, text: str) -> int:
    """Runs the examples of one page in one namespace, and counts them; a traceback names the page's line."""
    namespace: dict[str, object] = {}
    examples = list(EXAMPLE.finditer(text))
    for example in examples:
        lines_before = text.count("\n", 0, example.start(1))
        exec(compile("\n" * lines_before + example[1], name, "exec"), namespace)
    return len(examples)


@each_page
def test_examples_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # for what they write
    for header in (ROOT / "examples").glob("*.h"):  # and for what they read
        shutil.copy(header, tmp_path)
    count = run_examples(str(page), page.read_text())
    assert count or page != ROOT / "README.md"


def test_the_reference_of_the_api_has_no_warnings(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", str(ROOT / "docs" / "api")]
    done = subprocess.run([*command, str(tmp_path / "pages")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "pages" / "index.html").read_text()
    public = set(rnnfast.__all__) - {"__version__"}
    assert {name for name in public if re.search(rf'id="rnnfast\.{name}[".]', page)} == public


def test_from_scratch_prints_and_draws_what_it_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs/FROM_SCRATCH.md").read_text()
    run_examples("FROM_SCRATCH.md", text)
    shown = re.findall(r"^print\(.*\)  # (.*)$", text, re.MULTILINE)
    assert len(shown) >= 10
    assert capsys.readouterr().out.splitlines() == shown
    (picture,) = re.findall(r"!\[.*\]\((.*)\)", text)
    assert [path.name for path in tmp_path.iterdir()] == [picture]


@pytest.mark.parametrize(
    ("language", "files", "count"), [("cpp", ["csrc/cell/*.h", "examples/*.h"], 3), ("py", ["rnnfast/*.py"], 1)]
)
def test_code_that_is_shown_is_in_the_sources(language: str, files: list[str], count: int) -> None:
    """A file as a whole, or lines of one."""
    page = (ROOT / "docs/ADDING_A_CELL.md").read_text()
    sources = [path.read_text() for pattern in files for path in ROOT.glob(pattern)]
    blocks = re.findall(rf"^ *```{language}\n(.*?)^ *```$", page, re.MULTILINE | re.DOTALL)
    assert len(blocks) == count
    for block in map(textwrap.dedent, blocks):
        assert any(block.strip() in source for source in sources), block


@each_page
def test_what_is_named_exists(page: Path) -> None:
    text = page.read_text()
    missing = [name for name in LINK.findall(text) if not (page.parent / name).exists()]
    missing += [name for name in FILE.findall(text) if not (ROOT / name).exists()]
    assert missing == []


def test_a_wrong_example_is_seen() -> None:
    with pytest.raises(NameError) as error:
        run_examples("page.md", "Text.\n\n```python\nx = 1\n```\n\n```python\nassert x == 1\nprint(y)\n```\n")
    assert error.traceback[-1].lineno == 8  # from 0
