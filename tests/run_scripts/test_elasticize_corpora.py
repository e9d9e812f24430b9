"""elasticize.py on corpora and models that are not as its others: prompts, ids, repetitions, names and encodings."""

import json

import datasets
import pytest
import torch
from conftest import LADDER, SENTENCES
from datasets import Dataset
from test_elasticize import TEXTS, start, weights, write_beir, write_jsonl  # noqa: F401

from modeling_2dmse import Size, TwoDMSEModel
from run_scripts import elasticize, finetune, pretrain
from run_scripts.shared.output_dir import is_fresh
from run_scripts.training import elasticizing, finetuning
from run_scripts.training.corpus import check_read
from trainer import exits
from trainer.pseudo_pairs import Document
from trainer.teacher_embeddings import TargetCollator

MODULES = "sentence_transformers.sentence_transformer.modules"
PROMPTS = {"query": "two dogs run ", "document": "the road is wet the road is "}


def refused(run, capsys) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        run()
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    return line


@pytest.fixture
def prompted(tmp_path, backbone_path):
    """A folder of a model with prompts, one of which is the default."""
    model = TwoDMSEModel.from_backbone(backbone_path("bert"), prompts=PROMPTS)
    model.config.default_prompt_name = "query"
    model.save_pretrained(tmp_path / "prompted")
    return tmp_path / "prompted"


@pytest.mark.parametrize("effort", ["fit", "short"])
def test_texts_have_the_prompts_of_the_model(effort, start, prompted, monkeypatch):  # noqa: F811
    fitted, trained = [], []
    fit, call = elasticizing.fit_exit_projections, TargetCollator.__call__
    monkeypatch.setattr(elasticizing, "fit_exit_projections", lambda *a, **b: fitted.extend(a[1]) or fit(*a, **b))
    monkeypatch.setattr(TargetCollator, "__call__", lambda own, rows: trained.append(own) or call(own, rows))
    folder = start.run(model_name_or_path=prompted, effort=effort)
    results = json.loads((folder / "results.json").read_text())
    assert results["before"]["agreement"]["overlap@10"]["4x32"] == 1.0
    assert all(text.startswith(tuple(PROMPTS.values())) for text in fitted)
    assert {prompt for prompt in PROMPTS.values() for text in fitted if text.startswith(prompt)} == {*PROMPTS.values()}
    assert bool(trained) == (effort == "short")
    assert TwoDMSEModel.from_pretrained(folder).config.prompts == PROMPTS


def test_a_prompt_of_the_flags_and_a_teacher_with_its_own(start, prompted, monkeypatch):  # noqa: F811
    seen = []
    compute = elasticizing.compute_teacher_embeddings
    record = lambda teacher, texts, *a, **b: seen.extend(texts) or compute(teacher, texts, *a, **b)
    monkeypatch.setattr(elasticizing, "compute_teacher_embeddings", record)
    folder = start.run(teacher_model_name_or_path=prompted, query_prompt="a cat sleeps ")
    assert all(text.startswith(tuple(PROMPTS.values())) for text in seen)
    assert TwoDMSEModel.from_pretrained(folder).config.prompts == {"query": "a cat sleeps "}


def test_exits_are_refined_to_find_the_document_of_each_query(start, prompted, monkeypatch):  # noqa: F811
    seen = []
    refine = exits.refine_exit_projections
    record = lambda *args, **options: seen.append((args[1], options)) or refine(*args, **options)
    monkeypatch.setattr(exits, "refine_exit_projections", record)
    monkeypatch.setattr(elasticizing, "_FITTED", 18)
    start.run(effort="short", model_name_or_path=prompted)
    texts, options = seen[-1]
    pairs = [(texts[query], texts[document]) for query, document in options["pairs"]]
    assert len(pairs) == 6
    assert len(texts) == 18
    for query, document in pairs:
        assert query.startswith(PROMPTS["query"])
        assert document.startswith(PROMPTS["document"])
        assert query.removeprefix(PROMPTS["query"]) in document


def test_documents_need_no_ids(tmp_path):
    rows = [{"_id": {"$oid": str(i)}, "text": text} for i, text in enumerate(TEXTS)]
    write_jsonl(tmp_path / "a.jsonl", rows)
    learned, held = elasticizing.read_documents(elasticize.CorpusArguments(corpus_file=str(tmp_path / "a.jsonl")), 0)
    assert len(learned + held) == len(TEXTS)


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "saved", "beir"])
def test_numbers_are_titles(kind, tmp_path):
    rows = [{"_id": str(i), "title": i or None, "text": text} for i, text in enumerate(TEXTS)]
    path = tmp_path / f"a.{kind}"
    if kind == "beir":
        path.mkdir()
    if kind in ("beir", "jsonl"):
        write_jsonl(path / "corpus.jsonl" if kind == "beir" else path, rows)
    else:
        table = Dataset.from_list(rows)
        table.save_to_disk(path) if kind == "saved" else table.to_parquet(path)
    learned, held = elasticizing.read_documents(elasticize.CorpusArguments(corpus_file=str(path)), 0)
    expected = {text: str(i) if i else "" for i, text in enumerate(TEXTS)}
    assert {document.text: document.title for document in learned + held} == expected


@pytest.mark.parametrize("saved", [False, True])
def test_titles_that_are_none_are_said(saved, tmp_path, capsys):
    rows = [{"title": [str(i)], "text": text} for i, text in enumerate(TEXTS)]
    path = tmp_path / "a.jsonl"
    Dataset.from_list(rows).save_to_disk(path) if saved else write_jsonl(path, rows)
    learned, held = elasticizing.read_documents(elasticize.CorpusArguments(corpus_file=str(path)), 0)
    assert not any(document.title for document in learned + held)
    assert f"rows whose title is neither a text nor a number: {len(TEXTS)}; they are" in capsys.readouterr().out


def test_no_text_is_held_out_that_is_learned_under_another_title(tmp_path):
    rows = [{"title": f"copy {i}", "text": TEXTS[i % 40]} for i in range(60)]
    write_jsonl(tmp_path / "a.jsonl", rows)
    data = elasticize.CorpusArguments(corpus_file=str(tmp_path / "a.jsonl"))
    found = [elasticizing.read_documents(data, seed) for seed in range(12)]
    for learned, held in found:
        assert len(learned) == (54 if held else 60)
        assert not {document.text for document in learned} & {document.text for document in held}
    assert any(held for _, held in found)


def test_tasks_of_one_name_are_told_apart(start, tmp_path):  # noqa: F811
    for name in ("a", "b"):
        write_beir(tmp_path / name / "beir")
    Dataset.from_dict({"anchor": SENTENCES[::2], "positive": SENTENCES[1::2]}).to_csv(tmp_path / "beir.csv")
    folders = [tmp_path / name / "beir" for name in ("a", "b")]
    folder = start.run(effort="fit", beir_dirs=folders, eval_file=tmp_path / "beir.csv")
    results = json.loads((folder / "results.json").read_text())
    assert set(results["retrieval"]) == {elasticizing.PSEUDO_QUERIES, "a/beir", "b/beir", "beir.csv"}


@pytest.mark.parametrize("held_out", [500, 0])
def test_a_folder_named_like_the_pseudo_queries_keeps_its_scores(held_out, start, tmp_path):  # noqa: F811
    write_beir(tmp_path / "a" / elasticizing.PSEUDO_QUERIES)
    pairs = {"anchor": SENTENCES[::2], "positive": SENTENCES[1::2]}
    Dataset.from_dict(pairs).to_csv(tmp_path / f"{elasticizing.PSEUDO_QUERIES}.csv")
    flags = {"beir_dirs": [tmp_path / "a" / elasticizing.PSEUDO_QUERIES], "held_out": held_out}
    folder = start.run(effort="fit", eval_file=tmp_path / f"{elasticizing.PSEUDO_QUERIES}.csv", **flags)
    results = json.loads((folder / "results.json").read_text())
    names = {f"a/{elasticizing.PSEUDO_QUERIES}", f"{elasticizing.PSEUDO_QUERIES}.csv"}
    assert set(results["retrieval"]) == set(results["before"]["retrieval"])
    assert set(results["retrieval"]) == names | ({elasticizing.PSEUDO_QUERIES} if held_out else set())
    card = (folder / "README.md").read_text()
    assert all(name in card for name in results["retrieval"])


def test_other_folders_named_like_a_teacher_stay(start, tmp_path, monkeypatch, capsys):  # noqa: F811
    own = tmp_path / "out" / "teacher-large"
    own.mkdir(parents=True)
    assert not is_fresh(tmp_path / "out")
    assert "no complete checkpoint" in refused(lambda: start.run(effort="fit", resume_from_checkpoint="true"), capsys)
    own.rmdir()
    (tmp_path / "out" / "teacher-0123456789abcdef").mkdir()
    assert is_fresh(tmp_path / "out")
    finish = elasticizing.Work.finish
    monkeypatch.setattr(elasticizing.Work, "finish", lambda work: own.mkdir() or finish(work))
    folder = start.run(effort="fit", resume_from_checkpoint="true")
    assert [path.name for path in folder.glob("teacher-*")] == ["teacher-large"]
    assert "overwrite: " in refused(lambda: start.run(effort="fit", overwrite="true"), capsys)


def test_the_lines_to_use_a_model_run_with_any_name_of_its_folder():
    name = 'out/a "good" \\ model'
    lines = finetuning.usage(name, {}, [Size(1, 8), Size(4, 32)])
    code = "\n".join(line.strip() for line in lines.splitlines()[1:])
    calls = []
    model = type("Model", (), {"from_pretrained": lambda folder, num_layers: calls.append(folder) or model,
                               "encode": lambda texts, dim: None})  # fmt: skip
    exec(code, {"TwoDMSEModel": model})
    assert calls == [name]


def test_what_is_wrong_is_said_as_it_is(start, tmp_path, capsys):  # noqa: F811
    write_jsonl(tmp_path / "body.jsonl", [{"id": i, "body": text} for i, text in enumerate(TEXTS)])
    write_jsonl(tmp_path / "lists.jsonl", [{"text": [text]} for text in TEXTS])
    (tmp_path / "beir").mkdir()
    write_jsonl(tmp_path / "beir" / "corpus.jsonl", [{"_id": "d", "contents": text} for text in TEXTS])
    (tmp_path / "wide.txt").write_bytes("\n".join(TEXTS).encode("utf-16"))
    (tmp_path / "bare.jsonl").write_bytes("\n".join(json.dumps({"text": text}) for text in TEXTS).encode("utf-16-le"))
    (tmp_path / "packed.txt").write_bytes(b"\x1f\x8b\x08\x00")
    Dataset.from_dict({"sentence1": SENTENCES, "sentence2": SENTENCES, "score": [1] * 20}).to_csv(tmp_path / "s.csv")
    for changed, message in (
        ({"num_pairs": 15}, "num_pairs: 15 is fewer than one batch of 16; ask for more, or lower --per_device_train"),
        ({"max_documents": 15}, "max_documents: 15 is not allowed; use a whole number from 16"),
        ({"corpus_file": "body.jsonl"}, "has the column text; its first line has id, body"),
        ({"corpus_file": "lists.jsonl"}, "lists.jsonl has no text: none of its 54 lines can be used"),
        ({"corpus_file": "beir"}, "has the column text; its first line has _id, contents"),
        ({"corpus_file": "wide.txt"}, "wide.txt: it is not UTF-8, perhaps UTF-16: convert it with iconv"),
        ({"corpus_file": "bare.jsonl"}, "bare.jsonl: it is not UTF-8, perhaps UTF-16LE: convert it with iconv"),
        ({"corpus_file": "packed.txt"}, "packed.txt is compressed by gzip: add .gz to its name"),
        # What is read fast is refused before a corpus is read.
        ({"corpus_file": "body.jsonl", "eval_file": tmp_path / "s.csv"}, "eval_file: "),
        ({"corpus_file": "body.jsonl", "sizes": ["1x8", "9x32"]}, "sizes: "),
    ):
        if "corpus_file" in changed:
            changed = changed | {"corpus_file": tmp_path / changed["corpus_file"]}
        assert message in refused(lambda changed=changed: start.run(**changed), capsys)
    assert len(TEXTS) == 54
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("effort", ["fit", "short"])
def test_a_dense_module_to_fewer_dimensions_makes_the_full_size(effort, start, tmp_path, backbone_path):  # noqa: F811
    st, modules = pytest.importorskip("sentence_transformers"), pytest.importorskip(MODULES)
    torch.manual_seed(0)
    dense = modules.Dense(32, 16, bias=False, activation_function=torch.nn.Identity())
    parts = [modules.Transformer(backbone_path("bert")), modules.Pooling(32), dense, modules.Normalize()]
    peer = st.SentenceTransformer(modules=parts, device="cpu")
    peer.save(str(tmp_path / "peer"))
    flags = {"model_name_or_path": tmp_path / "peer", "effort": effort, "sizes": None, "held_out": 3}
    folder = start.run(**flags)
    results, model = json.loads((folder / "results.json").read_text()), TwoDMSEModel.from_pretrained(folder)
    *_, full = results["agreement"]["overlap@10"]
    assert (full, model.config.dim) == ("4x16", 16)
    assert results["before"]["agreement"]["overlap@10"][full] == 1.0
    ours, theirs = model.encode(SENTENCES), peer.encode(SENTENCES)
    gap = abs(ours @ ours.T - theirs @ theirs.T).max()
    assert gap < 1e-5 if effort == "fit" else gap > 1e-5  # `fit` leaves the full size as it is
    with pytest.raises(SystemExit):
        start.run(**flags | {"sizes": ["2x8", "4x32"], "output_dir": tmp_path / "other"})


@pytest.mark.parametrize(
    ("sizes", "cheap"), [(["1x8", "4x32"], True), (["2x8", "4x32"], True), (["3x8", "4x32"], False)]
)
def test_sizes_of_any_depth_are_trained(sizes, cheap, start, capsys):  # noqa: F811
    folder = start.run(effort="short", sizes=sizes)
    assert TwoDMSEModel.from_pretrained(folder).config.sizes == sizes
    assert ("every step trains all sizes" in capsys.readouterr().out) != cheap


@pytest.mark.parametrize(("kind", "message"), [
    ("emoji", "the encoder knows none of its words or characters; take an encoder that was made for this language"),
    ("header", "the encoder reads the first 48 tokens of a document, and they are the same in all; leave out what"),
])  # fmt: skip
def test_documents_that_are_the_same_to_the_encoder_are_refused(kind, message, start, tmp_path, capsys):  # noqa: F811
    texts = {"emoji": [chr(0x1F600 + i) * 3 for i in range(40)], "header": [60 * "the " + text for text in TEXTS]}
    (tmp_path / "a.txt").write_text("\n".join(texts[kind]))
    line = refused(lambda: start.run(effort="fit", corpus_file=tmp_path / "a.txt"), capsys)
    assert f"error: corpus_file: {message}" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("strange", "said"), [
    ([f"a {chr(0x1F600 + i)}" for i in range(20)], ["25% of the tokens of the corpus are unknown to this encoder; take",
                                                   "48% of the documents are like others in the 48 tokens"]),
    (["a \U0001F600", "a \U0001F601"], []),
])  # fmt: skip
def test_lines_say_what_the_encoder_cannot_tell_apart(strange, said, backbone_path, capsys):
    model = TwoDMSEModel.from_backbone(backbone_path("bert"))
    known = [f"a {word}" for text in SENTENCES for word in text.split()]
    known = list(dict.fromkeys(known))[:20]
    check_read(model, [Document(text) for text in strange + known], "corpus_file")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(said)
    assert all(map(str.startswith, lines, said)), lines


def test_the_table_of_few_documents_says_how_many_neighbours_are_compared():
    scores = {"n": 8, "overlap@10": {"1x8": 0.5}, "spearman": {"1x8": 0.5}}
    nearest, _ = elasticizing._columns({"agreement": scores, "before": {"agreement": scores}})
    assert nearest == "Share of the 3 nearest, compared with the encoder as it was, 8 held-out documents"


@pytest.mark.parametrize(
    "flags", [["elasticize"], ["finetune", "run_scripts/recipes/minilm-nli.yaml"],
              ["pretrain", "run_scripts/recipes/smae-quick.yaml"]],
)  # fmt: skip
def test_a_dataset_that_cannot_be_read_is_named(flags, start, tmp_path, monkeypatch, capsys):  # noqa: F811
    def unreachable(*args, **options):
        raise ConnectionError("Couldn't reach\nthe Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    name, *recipe = flags
    words = ["--model_name_or_path", start.model, "--dataset_name", "no/such", "--output_dir", str(tmp_path / "out")]
    main = {"elasticize": elasticize, "finetune": finetune, "pretrain": pretrain}[name].main
    line = refused(lambda: main([*recipe, *words, "--sizes", *LADDER, "--max_length", "32"]), capsys)
    assert "error: dataset_name: no/such cannot be read: Couldn't reach the Hub" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("held_out", "said"), [(2, "0 held out for the report (fewer than 3 say nothing)"),
                                               (0, "0 held out for the report"), (3, "3 held out")])  # fmt: skip
def test_a_line_says_why_nothing_is_held_out(held_out, said, tmp_path, capsys):
    (tmp_path / "a.txt").write_text("\n".join(TEXTS))
    elasticizing.read_documents(
        elasticize.CorpusArguments(corpus_file=str(tmp_path / "a.txt"), held_out=held_out), seed=0
    )
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.endswith(said) or held_out == 3
    assert said in last


def test_projections_are_not_fitted_again_by_the_trainer(start, tmp_path):  # noqa: F811
    plain = weights(start.run(output_dir=tmp_path / "plain"))
    asked = weights(start.run(exit_projections="true", refine_projections="true"))
    assert all(torch.equal(value, asked[name]) for name, value in plain.items())


@pytest.mark.parametrize(
    ("changed", "message"),
    [({"text_column": "body"}, "text_column: body is not allowed; "), ({"corpus_file": "a.doc"}, "an unknown format")],
)
def test_the_format_of_a_corpus_is_checked_first(changed, message, start, tmp_path, monkeypatch, capsys):  # noqa: F811
    (tmp_path / "a.doc").write_text("x")
    if "corpus_file" in changed:
        changed = {"corpus_file": tmp_path / "a.doc"}
    monkeypatch.setattr(elasticizing, "prepare", lambda *args: 1 / 0)
    assert message in refused(lambda: start.run(**changed), capsys)
