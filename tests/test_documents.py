"""README and manual: their code runs, their links lead somewhere, and the site builds."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from manual_blocks import ROOT, find_blocks, links, paths, problems, relative, run_block
from manual_workspace import make_workspace

from run_scripts import digits_m3

WITH_CODE = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
PAGES = [*WITH_CODE, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
BLOCKS = {page: find_blocks(Path(relative(page)), page.read_text()) for page in WITH_CODE}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Models are so small that threads would wait for each other most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def prepared(tokenizer, tmp_path_factory):
    return make_workspace(tmp_path_factory.mktemp("prepared"), tokenizer)


@pytest.fixture
def workspace(prepared, tmp_path, monkeypatch, few_refining_steps):
    """The current folder, where a page may write what it likes; what was prepared in out/ is there as well."""
    for path in prepared.iterdir():
        if path.name != "out":
            (tmp_path / path.name).symlink_to(path)
    shutil.copytree(prepared / "out", tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(digits_m3, "SPLITS", {"train": 24, "valid": 8, "test": 12})
    return tmp_path


@pytest.mark.parametrize("page", [page for page in WITH_CODE if BLOCKS[page]], ids=relative)
def test_code_runs(page, workspace, monkeypatch):
    namespace = {"__name__": "manual"}
    for block in BLOCKS[page]:
        run_block(block, namespace, workspace, monkeypatch)


def test_every_marker_has_a_reason(capsys):
    blocks = [block for found in BLOCKS.values() for block in found]
    assert not [problem for block in blocks for problem in problems(block)]
    marked = [block for block in blocks if block.kind]
    with capsys.disabled():
        print("".join(f"\n{block}: {block.kind}: {block.reason}" for block in marked if os.environ.get("LIST_MARKERS")))
    runnable = [block for block in blocks if block.language in ("bash", "python")]
    assert len(marked) < len(runnable)


MARKED = "<!-- not run: needs a GPU -->\n```bash\ntrain\n```\n"
UNMARKED = "```python\n1 / 0\n```\n\n```bash\nls\n```\n"
WRONG = "<!-- skipped: later -->\n```\ncode\n```\n\n<!-- not run: -->\n```bash\n```\n"
PARSED = "<!-- parsed only: slow -->\n```bash\npython run_scripts/evaluate.py --nonsense 1\n```\n"


def test_a_block_that_does_not_run_is_named(workspace, monkeypatch):
    marked, python, bash, parsed = find_blocks(Path("page.md"), f"# Title\n\n{MARKED}\n{UNMARKED}\n{PARSED}")
    assert (marked.kind, marked.reason, str(marked)) == ("not run", "needs a GPU", "page.md:5")
    run_block(marked, {}, workspace, monkeypatch)
    with pytest.raises(ZeroDivisionError):
        run_block(python, {}, workspace, monkeypatch)
    with pytest.raises(AssertionError, match=r"page.md:13: bash block: .*ls"):
        run_block(bash, {}, workspace, monkeypatch)
    with pytest.raises(AssertionError, match="evaluate --nonsense 1 ended with exit code 2"):
        run_block(parsed, {}, workspace, monkeypatch)
    assert [len(problems(block)) for block in find_blocks(Path("page.md"), WRONG)] == [2, 1]


def test_the_site_builds(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    built = {path.parent.name for path in (tmp_path / "site").glob("*/index.html")}
    assert {page.stem for page in (ROOT / "docs").glob("*.md")} - {"index"} <= built
    text = (tmp_path / "site" / "api" / "index.html").read_text()
    assert "fit_exit_projections" in text
    assert not re.findall(r'(?:src|rel="stylesheet" href)="https?://[^"]+"', text), "nothing is fetched from elsewhere"


def test_the_readme_is_one_page():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150
    assert not [link for link in links(text) if "://" in link]


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_links_and_paths_exist(page):
    text = page.read_text()
    local = [link.partition("#")[0] for link in links(text) if "://" not in link]
    missing = [link for link in local if link and not (page.parent / link).exists()]
    assert not missing
    if page.name != "CHANGELOG.md":  # which names files that have moved
        assert not [path for path in paths(text) if not (ROOT / path).exists()]
    own = re.compile(r"2dmse|twodmse", re.IGNORECASE)
    assert not [link for link in links(text) if "://" in link and own.search(link)], "the project is linked relatively"
