"""elasticize.py as a user runs it: corpora of every kind, both ways of working, the report, and wrong input."""

import gzip
import io
import itertools
import json
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from conftest import LADDER, SENTENCES, Signal, cpu_environment, tiny_config
from datasets import Dataset, DatasetDict
from forking import finish, start_group
from PIL import Image
from transformers import AutoModel

from modeling_2dmse import TwoDMSEModel
from run_scripts import elasticize
from run_scripts.shared import cli
from run_scripts.shared.shares import save_shares, shares
from run_scripts.training import corpus, elasticizing
from trainer.evaluation import best_for_cost

ROOT = Path(__file__).resolve().parents[2]
TEXTS = [f"{a}. {b}." for i, a in enumerate(SENTENCES) for b in SENTENCES[i + 1 : i + 4]]
ROWS = {"text": TEXTS, "title": [" ".join(text.split()[:3]) for text in TEXTS]}


# elasticize.py as a script of its own, whose projections are refined in a few steps.
FEW_STEPS = """import functools
from run_scripts import elasticize
from trainer import gates, refining

gates.fit_exit_gates = functools.partial(gates.fit_exit_gates, steps=2)
refining.refine_exit_projections = functools.partial(refining.refine_exit_projections, steps=2)
elasticize.main()
"""


def write_jsonl(path, rows) -> None:
    with (gzip.open if path.suffix == ".gz" else open)(path, "wt", encoding="utf-8") as file:
        file.write("\n".join(map(json.dumps, rows)))


def write_beir(folder) -> None:
    (folder / "qrels").mkdir(parents=True)
    titles, texts = ROWS["title"], ROWS["text"]
    documents = [{"_id": f"d{i}", "title": titles[i], "text": text} for i, text in enumerate(texts)]
    write_jsonl(folder / "corpus.jsonl", documents)
    write_jsonl(folder / "queries.jsonl", [{"_id": f"q{i}", "text": text} for i, text in enumerate(SENTENCES[:5])])
    lines = ["query-id\tcorpus-id\tscore", *(f"q{i}\td{3 * i}\t1" for i in range(5))]
    (folder / "qrels" / "test.tsv").write_text("\n".join(lines))


def rows() -> list[dict]:
    return [dict(zip(ROWS, values, strict=True)) for values in zip(*ROWS.values(), strict=True)]


CORPORA = {
    "a.txt": lambda path: path.write_text("\n".join(TEXTS)),
    "a.csv": lambda path: Dataset.from_dict(ROWS).to_csv(path, index=False),
    "a.jsonl.gz": lambda path: write_jsonl(path, rows()),
    "a.parquet": lambda path: Dataset.from_dict(ROWS).to_parquet(path),
    "beir": write_beir,
    "saved": lambda path: Dataset.from_dict(ROWS).save_to_disk(path),
    "splits": lambda path: DatasetDict(train=Dataset.from_dict(ROWS)).save_to_disk(path),
}


@pytest.fixture
def start(tmp_path, backbone_path, few_refining_steps):
    """Flags of a run of a few steps on a small corpus; `run(**flags)` runs it and gives its folder."""
    (tmp_path / "corpus.txt").write_text("\n".join(TEXTS))
    settings = {"model_name_or_path": backbone_path("bert"), "corpus_file": tmp_path / "corpus.txt", "sizes": LADDER}
    settings |= {"output_dir": tmp_path / "out", "num_pairs": 48, "per_device_train_batch_size": 16, "bf16": "false"}
    settings |= {"use_cpu": "true", "disable_tqdm": "true", "report_to": "none", "max_length": 24}

    def words(**more) -> list[str]:
        kept = {name: value for name, value in (settings | more).items() if value is not None}
        pairs = [(name, value if isinstance(value, list) else [value]) for name, value in kept.items()]
        return [str(word) for name, values in pairs for word in (f"--{name}", *values)]

    def run(**more):
        elasticize.main(words(**more))
        return (settings | more)["output_dir"]

    return SimpleNamespace(words=words, run=run, model=settings["model_name_or_path"])


def weights(folder) -> dict[str, torch.Tensor]:
    return dict(TwoDMSEModel.from_pretrained(folder).named_parameters())


@pytest.mark.parametrize("name", [*CORPORA, "-"])
def test_every_kind_of_corpus(name, tmp_path, monkeypatch):
    titled = name not in ("a.txt", "-")
    if name == "-":
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO("\n".join(TEXTS).encode())))
    else:
        CORPORA[name](tmp_path / name)
    path = "-" if name == "-" else str(tmp_path / name)
    data = elasticize.CorpusArguments(corpus_file=path, held_out=7)
    documents, held = elasticizing.read_documents(data, seed=0)
    assert (len(held), len(documents)) == (len(TEXTS) // 10, len(TEXTS) - len(TEXTS) // 10)
    found = {document.text: document.title for document in documents + held}
    assert found == dict(zip(TEXTS, ROWS["title"] if titled else [""] * len(TEXTS), strict=True))


def test_a_dataset_is_streamed(tmp_path):
    (tmp_path / "data").mkdir()
    write_jsonl(tmp_path / "data" / "train.jsonl", [{"text": text, "title": "a"} for text in TEXTS])
    found = corpus.read_corpus(None, str(tmp_path / "data"), None, "train", "text")
    assert [(document.title, document.text) for document in itertools.islice(found, 3)] == [("a", t) for t in TEXTS[:3]]
    with pytest.raises(ValueError, match="text_column: dataset_name has no column body among text, title"):
        next(corpus.read_corpus(None, str(tmp_path / "data"), None, "train", "body"))


def test_two_processes_share_the_work(start, tmp_path, backbone_path):
    words = start.words(per_device_train_batch_size=8, ddp_backend="gloo")
    (tmp_path / "run.py").write_text(FEW_STEPS)
    printed = "".join(finish(start_group(tmp_path / "run.py", words, cpu_environment(ROOT), 2)))
    assert printed.count("Use it:") == printed.count("documents to learn from") == 1
    two = json.loads((tmp_path / "out" / "results.json").read_text())
    state = json.loads((tmp_path / "out" / "checkpoint-12" / "trainer_state.json").read_text())
    assert state["global_step"] == 12  # 48 pairs, 2 processes of 8, 4 times
    # The order of the rows is not that of one process; what is measured before training is.
    start.run(output_dir=tmp_path / "one")
    one = json.loads((tmp_path / "one" / "results.json").read_text())
    assert two["before"]["agreement"]["spearman"] == pytest.approx(one["before"]["agreement"]["spearman"])
    assert set(two["retrieval"]) == set(one["retrieval"])
    began = TwoDMSEModel.from_backbone(backbone_path("bert")).state_dict()["backbone.embeddings.LayerNorm.weight"]
    alone, both = (weights(tmp_path / name)["backbone.embeddings.LayerNorm.weight"] for name in ("one", "out"))
    assert (alone - both).norm() < 0.7 * (alone - began).norm()


def test_fit_keeps_the_full_size_and_brings_the_others_nearer(start, tmp_path, capsys, backbone_path):
    CORPORA["beir"](tmp_path / "beir")
    folder = start.run(effort="fit", corpus_file=tmp_path / "beir", per_device_train_batch_size=None, num_pairs=None)
    printed = capsys.readouterr().out
    plain = TwoDMSEModel.from_backbone(backbone_path("bert")).encode(SENTENCES)
    model = TwoDMSEModel.from_pretrained(folder)
    fitted = model.encode(SENTENCES)
    assert fitted @ fitted.T == pytest.approx(plain @ plain.T, abs=1e-5)
    assert model.config.sizes == LADDER
    results = json.loads((folder / "results.json").read_text())
    before, after = results["before"]["agreement"], results["agreement"]
    assert before["overlap@10"]["4x32"] == 1.0
    assert after["overlap@10"]["4x32"] == 1.0
    assert after["n"] == len(TEXTS) // 10
    assert after["spearman"]["1x8"] > before["spearman"]["1x8"]
    assert set(results["costs"]) == set(LADDER)
    assert set(results["retrieval"]) == set(results["before"]["retrieval"]) == {elasticizing.PSEUDO_QUERIES}
    assert (results["corpus"], results["effort"]) == ("beir", "fit")
    wanted = {"README.md", "model.safetensors", "tokenizer.json", "modules.json", "shares.png"}
    assert wanted <= set(os.listdir(folder))
    assert not [name for name in os.listdir(folder) if name.startswith(("teacher-", "checkpoint-"))]
    assert "held out for the report" in printed
    assert f"nDCG@10, {elasticizing.PSEUDO_QUERIES}" in printed
    code = "\n".join(line.strip() for line in printed.split("Use it:")[1].strip().splitlines())
    scope: dict = {}
    exec(code, scope)
    best = best_for_cost(json.loads((folder / "results.json").read_text()), scope["model"].config.ladder)
    assert scope["embeddings"].shape == (1, best.dim)


def test_the_picture_has_shares_of_the_untouched_full_size(tmp_path):
    costs = {"1x8": {"relative_time": 0.3}, "4x32": {"relative_time": 1.0}}
    scores = lambda small, full: {"ndcg@10": {"1x8": small, "4x32": full}}
    run = {"costs": costs, "corpus": "beir", "effort": "short", "before": {"retrieval": {"beir": scores(0.1, 0.5)}}}
    run |= {"retrieval": {"beir": scores(0.4, 0.6)}, "model": "out/elastic"}
    assert shares(run, "beir") == {"untouched": {"1x8": 0.2, "4x32": 1.0}, "short": {"1x8": 0.8, "4x32": 1.2}}
    assert save_shares([run, run | {"effort": "fit"}], tmp_path / "shares.png")
    with Image.open(tmp_path / "shares.png") as picture:
        assert picture.width > picture.height > 300
    nothing = run | {"before": {"retrieval": {"beir": scores(0.0, 0.0)}}}
    assert shares(nothing, "beir") == {}
    assert not save_shares([nothing], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_short_trains_every_size_and_scores_what_is_asked(start, tmp_path, capsys, backbone_path):
    CORPORA["beir"](tmp_path / "beir")
    scored = {"sentence1": SENTENCES[::2], "sentence2": SENTENCES[1::2], "score": list(range(10))}
    Dataset.from_dict(scored).to_csv(tmp_path / "scored.csv", index=False)
    folder = start.run(beir_dirs=[tmp_path / "beir"], eval_file=tmp_path / "scored.csv", license="mit")
    printed = capsys.readouterr().out
    results = json.loads((folder / "results.json").read_text())
    for scores in (results, results["before"]):
        assert set(scores["retrieval"]["beir"]["ndcg@10"]) == set(LADDER)
        assert set(scores["sts"]["scored"]["spearman"]) == set(LADDER)
    assert results["before"]["retrieval"]["beir"] != results["retrieval"]["beir"]
    for title, kind, name, metric in (
        ("nDCG@10, beir, 5 queries", "retrieval", "beir", "ndcg@10"),
        ("Spearman, scored, 10 pairs", "sts", "scored", "spearman"),
    ):
        before, after = (scores[kind][name][metric] for scores in (results["before"], results))
        lines = printed.split(f"\n{title}\n")[1].splitlines()
        for size in LADDER:
            (line,) = [line for line in lines[:7] if line.startswith(f"{size} ")]
            assert line.split()[1:3] == [f"{before[size]:.4f}", f"{after[size]:.4f}"]
    card = (folder / "README.md").read_text()
    lines = ("license: mit", "- corpus: `corpus.txt`", "- effort: `short`", "- teacher: `embeddings`")
    for line in (*lines, "- share of the 2 nearest: ", "with which it is to be found", "cost](shares.png)"):
        assert line in card
    assert "heatmap.png" not in card
    assert str(tmp_path) not in card
    start_of = dict(TwoDMSEModel.from_backbone(backbone_path("bert")).named_parameters())
    trained = weights(folder)
    assert (trained["backbone.encoder.layer.0.output.dense.weight"] -
            start_of["backbone.encoder.layer.0.output.dense.weight"]).abs().max() > 1e-4  # fmt: skip


@pytest.fixture
def wide_teacher(tmp_path, tokenizer):
    config = tiny_config("roberta")
    config.hidden_size, config.num_hidden_layers = 48, 2
    torch.manual_seed(5)
    AutoModel.from_config(config).save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    return str(tmp_path / "teacher")


@pytest.mark.parametrize("effort", ["fit", "short"])
def test_another_teacher_of_another_width(effort, start, wide_teacher, tmp_path):
    folder = start.run(effort=effort, teacher_model_name_or_path=wide_teacher)
    model, teacher = TwoDMSEModel.from_pretrained(folder), TwoDMSEModel.from_backbone(wide_teacher)

    def agrees(encoder) -> float:
        mine, theirs = encoder.encode(TEXTS), teacher.encode(TEXTS)
        return float(np.corrcoef((mine @ mine.T).ravel(), (theirs @ theirs.T).ravel())[0, 1])

    assert agrees(model) > agrees(TwoDMSEModel.from_backbone(start.words()[1])) + 0.1
    assert not [name for name in os.listdir(folder) if name.startswith("teacher-")]
    card = (folder / "README.md").read_text()
    assert "- teacher model: `teacher`" in card
    assert str(tmp_path) not in card


def stop_in_training(start, number, monkeypatch, **flags) -> None:
    """A run that a signal ends in its second step."""
    prepare = elasticizing.prepare

    def with_signal(*arguments):
        work = prepare(*arguments)
        work.trainer.add_callback(Signal(number))
        return work

    with monkeypatch.context() as patch:
        patch.setattr(elasticizing, "prepare", with_signal)
        with pytest.raises(SystemExit) as stopped:
            start.run(**flags)
    assert stopped.value.code == 128 + number


def test_a_stopped_run_resumes_to_the_same_weights(start, tmp_path, monkeypatch, capsys):
    whole = start.run(output_dir=tmp_path / "whole")
    stop_in_training(start, signal.SIGINT, monkeypatch)
    assert "with --resume_from_checkpoint true to resume" in capsys.readouterr().out
    out = tmp_path / "out"
    assert not (out / "model.safetensors").exists()
    assert list(out.glob("teacher-*"))
    start.run(resume_from_checkpoint="true")
    expected = weights(whole)
    for name, value in weights(out).items():
        assert torch.equal(value, expected[name]), name
    assert not list(out.glob("teacher-*"))


def test_a_run_that_ended_before_its_first_step_starts_again(start, tmp_path, monkeypatch):
    compute = elasticizing.compute_teacher_embeddings

    def interrupted(*arguments, **more):
        compute(*arguments, **more)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(elasticizing, "compute_teacher_embeddings", interrupted)
        with pytest.raises(KeyboardInterrupt, match="the same command with --resume_from_checkpoint true"):
            start.run()
    assert list((tmp_path / "out").glob("teacher-*"))
    start.run(resume_from_checkpoint="true")
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert not list((tmp_path / "out").glob("teacher-*"))


def test_a_half_run_is_replaced_by_overwrite(start, tmp_path, monkeypatch):
    start.run(effort="fit")
    (tmp_path / "out" / "teacher-0123456789abcdef").mkdir()
    start.run(effort="fit", overwrite="true")
    assert not list((tmp_path / "out").glob("teacher-*"))


def test_texts_longer_than_the_context_work(start, tmp_path, capsys):
    texts = [" ".join(f"{SENTENCES[(i + j) % 20]}." for j in range(30)) for i in range(20)]
    texts += [" ".join(SENTENCES[(i + j) % 20] for j in range(0, 60, 3)) for i in range(20)]
    (tmp_path / "long.txt").write_text("\n".join(texts))
    folder = start.run(corpus_file=tmp_path / "long.txt", max_length=None)
    assert "max_length: 96 is cut to the 48 tokens that this model reads" in capsys.readouterr().out
    assert np.isfinite(TwoDMSEModel.from_pretrained(folder).encode(texts)).all()


def test_documents_of_one_word_are_fitted(start, tmp_path):
    words = sorted({word for sentence in SENTENCES for word in sentence.split()})
    (tmp_path / "words.txt").write_text("\n".join(words))
    folder = start.run(corpus_file=tmp_path / "words.txt", effort="fit")
    assert "retrieval" not in json.loads((folder / "results.json").read_text())


def test_without_sizes_the_default_ladder_is_used(start, capsys):
    folder = start.run(effort="fit", sizes=None)
    assert "the default for this encoder (--sizes)" in capsys.readouterr().out
    assert TwoDMSEModel.from_pretrained(folder).config.sizes[-1] == "4x32"


def test_the_recipe_of_the_effort_comes_first():
    for effort, flags in (("fit", ["--effort", "fit"]), ("full", ["--effort=full"]), ("short", ["--seed", "3"])):
        recipe = str(cli.RECIPES / f"elasticize-{effort}.yaml")
        assert elasticize.with_recipe(flags) == [recipe, *flags]
        needed = ["--model_name_or_path", "m", "--corpus_file", "c", "--output_dir", "o", "--bf16", "false"]
        _, data, args = cli.Parser(elasticize.ARGUMENTS).parse([*elasticize.with_recipe(flags), *needed])
        assert data.effort == effort
        if effort != "fit":
            assert (args.teacher, data.num_pairs) == ("embeddings", {"short": 12_800, "full": 25_600}[effort])
    assert elasticize.with_recipe(["own.yaml", "--seed", "3"]) == ["own.yaml", "--seed", "3"]


def test_full_is_short_on_more_pairs():
    paths = [cli.RECIPES / f"elasticize-{effort}.yaml" for effort in ("short", "full")]
    short, full = (yaml.safe_load(path.read_text()) for path in paths)
    assert full == short | {"effort": "full", "num_pairs": 2 * short["num_pairs"]}


WRONG = {
    "empty": ({"corpus_file": "empty.txt"}, "corpus_file: {tmp}/empty.txt has no text"),
    "few": ({"corpus_file": "few.txt"}, "2 different texts, and 16 are needed"),
    "duplicates": ({"corpus_file": "same.txt"}, "1 different texts, and 16 are needed"),
    "batch": (
        {"per_device_train_batch_size": 64, "num_pairs": 64},
        "different documents to train on are fewer than one batch of 64",
    ),
    "few pairs": ({"per_device_train_batch_size": 64}, "num_pairs: 48 is fewer than one batch of 64"),
    "words": ({"corpus_file": "words.txt"}, "its documents make 0 pairs of texts with letters or digits"),
    "column": ({"corpus_file": "pairs.csv", "text_column": "body"}, "{tmp}/pairs.csv has no column body"),
    "saved": ({"corpus_file": "saved", "text_column": "body"}, "text_column: corpus_file has no column body"),
    "split": ({"corpus_file": "splits", "dataset_split": "dev"}, "dataset_split: {tmp}/splits has no split dev"),
    "numbers": ({"corpus_file": "saved", "text_column": "number"}, "row 1 of number is a int, not a text"),
    "format": ({"corpus_file": "a.pdf"}, "corpus_file: {tmp}/a.pdf"),
    "folder": ({"corpus_file": "folder"}, "corpus_file: {tmp}/folder is a folder without a corpus.jsonl"),
    "no corpus": ({"corpus_file": None}, "corpus_file: name the corpus with either"),
    "effort": ({"effort": "huge"}, "effort: 'huge' is unknown; choose one of fit, short, full"),
    "sizes": ({"sizes": ["1x8", "3x16"]}, "every size learns from the full one; add 4x32"),
    "teacher": ({"teacher_model_name_or_path": "no/such-teacher"}, "teacher_model_name_or_path: no/such-teacher is"),
    "teacher folder": ({"teacher_model_name_or_path": "./nowhere"}, "teacher_model_name_or_path: ./nowhere does not"),
    "trainer's teacher": ({"teacher": "start"}, "teacher: start is not allowed; sizes learn from"),
    "model": ({"model_name_or_path": "no/such-model"}, "model_name_or_path: no/such-model is not a folder"),
    "beir": ({"beir_dirs": ["folder"]}, "beir_dirs: {tmp}/folder is not in BEIR layout"),
    "eval": ({"eval_file": "none.csv"}, "eval_file: {tmp}/none.csv is not a file"),
    "scores": ({"eval_file": "same.csv"}, "eval_file: {tmp}/same.csv has 2 rows that all have the same text twice"),
    "pairs": ({"num_pairs": 0}, "num_pairs: 0 is not allowed"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_ends_in_one_line(name, start, tmp_path, capsys):
    changed, message = WRONG[name]
    words = sorted({word for sentence in SENTENCES for word in sentence.split()})
    files = {"empty.txt": "\n \n", "few.txt": "a man\nthe cat", "same.txt": "A man\na  man\n" * 30, "a.pdf": "x"}
    files["same.csv"] = "sentence1,sentence2,score\na man,a man,1\nthe cat,the cat,2\n"
    for file, text in (files | {"words.txt": "\n".join(words)}).items():
        (tmp_path / file).write_text(text)
    table = Dataset.from_dict(ROWS | {"number": list(range(len(TEXTS)))})
    table.to_csv(tmp_path / "pairs.csv", index=False)
    table.save_to_disk(tmp_path / "saved")
    CORPORA["splits"](tmp_path / "splits")
    (tmp_path / "folder").mkdir()
    for flag in ("corpus_file", "eval_file"):
        if changed.get(flag):
            changed = changed | {flag: tmp_path / changed[flag]}
    if "beir_dirs" in changed:
        changed = changed | {"beir_dirs": [tmp_path / "folder"]}
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        start.run(**changed)
    assert stopped.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert message.format(tmp=tmp_path) in line
    assert not (tmp_path / "out").exists()


def test_the_models_own_flag_is_not_named_for_the_teacher(start, capsys, wide_teacher):
    os.truncate(os.path.join(wide_teacher, "model.safetensors"), 100)
    with pytest.raises(SystemExit, match="2"):
        start.run(teacher_model_name_or_path=wide_teacher)
    assert "error: teacher_model_name_or_path: " in capsys.readouterr().err
