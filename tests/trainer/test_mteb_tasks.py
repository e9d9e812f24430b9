"""MTEB's tasks at every size, from one encoding pass per text; the tasks are local ones of MTEB's own classes."""

import json
import re

import pytest
import torch
from conftest import SENTENCES
from datasets import Dataset, DatasetDict
from huggingface_hub import EvalResult, ModelCard

from modeling_2dmse import parse_ladder
from run_scripts import evaluate
from trainer.evaluation import RetrievalData, StsData, evaluate_retrieval, evaluate_sts, main_scores
from trainer.model_card import add_mteb
from trainer.mteb_tasks import StateStore

SIZES = parse_ladder(["1x8", "2x16", "2x32", "4x32"])
PAIRS = {"sentence1": SENTENCES[:8], "sentence2": SENTENCES[8:16], "score": [0.1, 0.9, 0.4, 0.3, 0.8, 0.2, 0.7, 0.6]}
QUERIES = {f"q{i}": SENTENCES[i] for i in range(5)}
CORPUS = {f"d{i}": SENTENCES[i + 5] for i in range(15)}
QRELS = {f"q{i}": {f"d{3 * i}": 1} for i in range(5)}


@pytest.fixture
def local_tasks(monkeypatch):
    """MTEB finds a task of sentence pairs, one of retrieval, one about images, and one without data."""
    mteb = pytest.importorskip("mteb", reason="needs the extra mteb")
    from mteb.abstasks import AbsTaskRetrieval, AbsTaskSTS
    from mteb.abstasks.task_metadata import TaskMetadata

    def facts_of(name, kind, metric, **more):
        facts = {"description": "local", "dataset": {"path": "local/none", "revision": "1"}, "reference": None}
        facts |= {"eval_langs": ["eng-Latn"], "eval_splits": ["test"], "bibtex_citation": ""} | more
        return TaskMetadata(name=name, type=kind, main_score=metric, **facts)

    class LocalSts(AbsTaskSTS):
        metadata = facts_of("LocalSts", "STS", "cosine_spearman")
        min_score, max_score = 0, 1

        def load_data(self, **kwargs):
            self.dataset, self.data_loaded = DatasetDict({"test": Dataset.from_dict(PAIRS)}), True

    class LocalRetrieval(AbsTaskRetrieval):
        metadata = facts_of("LocalRetrieval", "Retrieval", "ndcg_at_10")

        def load_data(self, **kwargs):
            rows = [Dataset.from_dict({"id": list(side), "text": list(side.values())}) for side in (CORPUS, QUERIES)]
            split = {"corpus": rows[0], "queries": rows[1], "relevant_docs": QRELS, "top_ranked": None}
            self.dataset, self.data_loaded = {"default": {"test": split}}, True

    class LocalImages(LocalSts):
        metadata = facts_of("LocalImages", "STS", "cosine_spearman", modalities=["text", "image"])

    class LocalNothing(LocalSts):
        metadata = facts_of("LocalNothing", "STS", "cosine_spearman")

        def load_data(self, **kwargs):
            raise ConnectionError("the Hub cannot be reached")

    tasks = {kind.metadata.name: kind for kind in (LocalSts, LocalRetrieval, LocalImages, LocalNothing)}
    monkeypatch.setattr(mteb, "get_task", lambda name: tasks[name]())
    monkeypatch.setattr(mteb, "get_tasks", lambda: [kind() for kind in tasks.values()])
    return tasks


def saved(tiny_model, tmp_path, **config):
    model = tiny_model(sizes=["1x8", "2x16", "4x32"])
    for name, value in config.items():
        setattr(model.config, name, value)
    model.save_pretrained(tmp_path / "model")
    return model


def test_the_store_encodes_each_text_once_and_gives_every_size(tiny_model, monkeypatch):
    model = tiny_model()
    model.config.prompts = {"query": "a man "}
    monkeypatch.setattr("trainer.mteb_tasks._PIECE", 3)
    encoded, encode_states = [], model.encode_states
    model.encode_states = lambda texts, *args, **kwargs: encoded.extend(texts) or encode_states(texts, *args, **kwargs)
    store = StateStore(model, SIZES, max_length=9)
    for size in SIZES:
        for texts in (SENTENCES[:7], [SENTENCES[9], *SENTENCES[3:9], SENTENCES[3]]):
            expected = model.encode(texts, *size, max_length=9)
            encoded.clear() if size == SIZES[0] else None
            torch.testing.assert_close(store.embeddings(texts, size), torch.from_numpy(expected), atol=1e-5, rtol=0)
    assert store.widths == {1: 8, 2: 32, 4: 32}
    encoded.clear()
    got = store.embeddings(SENTENCES[:2], SIZES[0], "query")
    assert encoded == SENTENCES[:2], "the same texts in another role have another prompt"
    expected = torch.from_numpy(model.encode(SENTENCES[:2], *SIZES[0], prompt_name="query", max_length=9))
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_evaluate_runs_local_tasks_at_every_size(similarity, local_tasks, tiny_model, tmp_path, capsys, monkeypatch):
    prompts = {"query": "a man ", "document": "the cat "}
    model = saved(tiny_model, tmp_path, similarity=similarity, prompts=prompts)
    encoded, encode_states = [], type(model).encode_states

    def counted(self, texts, layers=None, batch_size=None, prompt="", *args, **kwargs):
        if texts != ["a text"]:  # that a model is tried with when it is loaded
            encoded.extend(prompt + text for text in texts)
        return encode_states(self, texts, layers, batch_size, prompt, *args, **kwargs)

    monkeypatch.setattr(type(model), "encode_states", counted)
    flags = ["--model_name_or_path", str(tmp_path / "model"), "--output_dir", str(tmp_path / "out"), "--sizes"]
    evaluate.main([*flags, *map(str, SIZES), "--mteb_tasks", "LocalSts", "LocalRetrieval"])
    expected = list(dict.fromkeys([*PAIRS["sentence1"], *PAIRS["sentence2"]]))
    expected += ["a man " + text for text in QUERIES.values()] + ["the cat " + text for text in CORPUS.values()]
    assert sorted(encoded) == sorted(expected), "each text is encoded once for all sizes"
    results = json.loads((tmp_path / "out" / "results.json").read_text())["mteb"]
    sts = evaluate_sts(model, StsData("s", *PAIRS.values()), SIZES)["spearman"]
    retrieval = evaluate_retrieval(model, RetrievalData("r", QUERIES, CORPUS, QRELS), SIZES)["ndcg@10"]
    assert len(set(retrieval.values())) > 1
    printed = capsys.readouterr().out
    for size in map(str, SIZES):
        files = {name: json.loads((tmp_path / "out" / "mteb" / size / f"{name}.json").read_text()) for name in results}
        assert files["LocalSts"]["scores"]["test"][0]["spearman"] == pytest.approx(sts[size], abs=1e-4)
        assert files["LocalRetrieval"]["scores"]["test"][0]["ndcg_at_10"] == pytest.approx(retrieval[size], abs=1e-4)
        assert results["LocalRetrieval"]["scores"][size] == pytest.approx(retrieval[size], abs=1e-4)
        assert f"{results['LocalRetrieval']['scores'][size]:.4f}" in printed
    assert results["LocalRetrieval"]["metric"] == "ndcg_at_10"
    assert (tmp_path / "out" / "heatmap.png").exists()


def test_a_file_that_is_named_like_a_task_of_mteb_keeps_its_scores(local_tasks, tiny_model, tmp_path):
    saved(tiny_model, tmp_path)
    scored = {name: PAIRS[name] for name in ("sentence1", "sentence2", "score")}
    Dataset.from_dict(scored).to_csv(tmp_path / "LocalSts.csv")
    flags = ["--model_name_or_path", str(tmp_path / "model"), "--output_dir", str(tmp_path / "out")]
    evaluate.main([*flags, "--sts_files", str(tmp_path / "LocalSts.csv"), "--mteb_tasks", "LocalSts"])
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert set(main_scores(results)) == {"LocalSts.csv", "LocalSts"}


def test_scores_are_put_into_the_card_of_the_model(local_tasks, tiny_model, tmp_path):
    saved(tiny_model, tmp_path)
    card = tmp_path / "model" / "README.md"
    card.write_text("---\nlicense: mit\n---\n# A model\n\n## Use\n\nText.\n")
    flags = ["--model_name_or_path", str(tmp_path / "model"), "--update_card", "true", "--mteb_tasks", "LocalSts"]
    for number in range(2):  # the second time, the scores of the first are replaced
        evaluate.main([*flags, "--output_dir", str(tmp_path / f"out-{number}")])
    found = ModelCard.load(card)
    scores = json.loads((tmp_path / "out-1" / "results.json").read_text())["mteb"]["LocalSts"]["scores"]
    assert found.data.license == "mit"
    assert {result.metric_name: result.metric_value for result in found.data.eval_results} == {
        f"cosine_spearman at {size}": value for size, value in scores.items()
    }
    assert {(r.task_type, r.dataset_name) for r in found.data.eval_results} == {("STS", "MTEB LocalSts")}
    assert found.text.count("## MTEB") == 1
    assert "## Use\n\nText." in found.text
    assert f"| 1x8 | {scores['1x8']:.4f} |" in found.text


def test_other_sections_and_scores_of_a_card_are_kept(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# A model\n\n## MTEB\n\nold\n\n## Use\n\nText.\n")
    card = ModelCard.load(tmp_path / "README.md")
    own = {"task_type": "STS", "dataset_type": "own", "dataset_name": "own", "metric_type": "m", "metric_value": 0.5}
    card.data.model_name, card.data.eval_results = "name", [EvalResult(**own)]
    card.save(tmp_path / "README.md")
    for name in ("First", "Second"):
        facts = {"type": "STS", "dataset": name.lower(), "metric": "m", "scores": {"1x8": 0.25}}
        add_mteb(tmp_path, {"mteb": {name: facts}}, parse_ladder(["1x8"]))
    card = ModelCard.load(tmp_path / "README.md")
    assert sorted(result.dataset_name for result in card.data.eval_results) == ["MTEB Second", "own"]
    assert "old" not in card.text
    assert "First" not in card.text
    assert card.text.index("## MTEB") < card.text.index("## Use\n\nText.")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--mteb_tasks", "LocalStz"], "mteb_tasks: MTEB has no task 'LocalStz'; did you mean LocalSts"),
        (["--mteb_tasks", "LocalImages"], "mteb_tasks: LocalImages is about text, image, not only texts"),
        (
            ["--mteb_tasks", "LocalNothing"],
            "mteb_tasks: the data of LocalNothing cannot be loaded: the Hub cannot be reached",
        ),
        (["--update_card", "true"], "sts_files: name something to evaluate on with --sts_files, --beir_dirs or"),
        (["--mteb_tasks", "LocalSts", "--update_card", "true"], "update_card: .* is not a folder with a README.md"),
    ],
)
def test_wrong_tasks_are_refused_in_one_line(flags, message, local_tasks, tiny_model, tmp_path, capsys):
    saved(tiny_model, tmp_path)
    with pytest.raises(SystemExit, match="2"):
        evaluate.main(["--model_name_or_path", str(tmp_path / "model"), "--output_dir", str(tmp_path / "out"), *flags])
    assert re.search(message, capsys.readouterr().err.strip().splitlines()[-1])
    assert not (tmp_path / "out").exists()


def test_without_mteb_the_extra_is_named(monkeypatch):
    from trainer.mteb_tasks import load_tasks

    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r'mteb_tasks: mteb is not installed; pip install "twodmse\[mteb\]"'):
        load_tasks(["STSBenchmark"])
