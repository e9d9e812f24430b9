"""The whole card, its metadata, and its costs."""

import shutil

import pytest
import transformers
import yaml
from conftest import SENTENCES
from datasets import Dataset
from huggingface_hub import ModelCard

from modeling_2dmse import TwoDMSEModel, parse_ladder
from trainer import TwoDMSETrainer, TwoDMSETrainingArguments
from trainer.base_card import BaseFacts, card_facts, read_base_facts
from trainer.citations import CITATIONS
from trainer.model_card import Run, build_card, measure_costs, write_card
from trainer.objectives import OBJECTIVES, Objective

RESULTS = {
    "sts": {"stsb": {"n": 9, "spearman": {"1x8": 0.5, "1x32": 0.55, "4x8": 0.6, "4x32": 0.75}}},
    "retrieval": {"docs": {"n_queries": 3, "ndcg@10": {"1x8": 0.1, "1x32": 0.2, "4x8": 0.3, "4x32": 0.4}}},
}


def objective(name="starbucks") -> Objective:
    return Objective(name, parse_ladder(["1x8", "4x32"]), 4, 32)


def test_the_whole_card(tiny_model, tmp_path):
    costs = {
        "1x8": {"parameters": 1_500_000, "megabytes": 6.0, "relative_time": 0.25},
        "4x32": {"parameters": 3_000_000, "megabytes": 12.0, "relative_time": 1.0},
    }
    run = Run("name", {"rows": 7}, RESULTS, costs, "accelerate launch x", "base/model", ["some/data"], "apache-2.0")
    run.repo_id, run.languages, run.pictures = "org/name", ["en"], {"heatmap.png": "Every layer by every dim"}
    run.rows = {"docs": "its rows were held out"}
    write_card(tmp_path, build_card(tiny_model(), objective(), run))
    card = ModelCard.load(tmp_path / "README.md")
    data = card.data.to_dict()
    assert data["library_name"] == "transformers"
    assert data["pipeline_tag"] == "sentence-similarity"
    assert (data["base_model"], data["datasets"], data["license"]) == ("base/model", ["some/data"], "apache-2.0")
    assert data["language"] == ["en"]
    assert {"matryoshka", "2dmse", "sentence-transformers"} <= set(data["tags"])
    (index,) = data["model-index"]
    found = {(r["dataset"]["name"], m["name"], m["value"]) for r in index["results"] for m in r["metrics"]}
    assert found == {
        ("stsb", "Spearman at 1x8", 0.5),
        ("stsb", "Spearman at 4x32", 0.75),
        ("docs", "nDCG@10 at 1x8", 0.1),
        ("docs", "nDCG@10 at 4x32", 0.4),
    }
    for line in (
        "| size | stsb, Spearman | docs, nDCG@10 | parameters | MB on disk | encode time |",
        "| 1x8 | 0.5000 | 0.1000 | 1.5 M | 6 | 0.25 |",
        "| 4x32 | 0.7500 | 0.4000 | 3.0 M | 12 | 1.00 |",
        "| layers | 8 | 32 |",
        "| 4 | 0.6000 | 0.7500 |",
        "accelerate launch x",
        "- rows: `7`",
        "![Every layer by every dim](heatmap.png)",
        "- docs: retrieval (3 queries); nDCG@10, documents ranked by cosine; its rows were held out",
        "Encode time is relative to all layers",
        'AutoModel.from_pretrained("org/name", trust_remote_code=True)',
        'SentenceTransformer("org/name", trust_remote_code=True)',
        "arXiv:2410.13230",
    ):
        assert line in card.text, line
    assert "{{" not in card.content
    yaml.safe_load(card.content.split("---")[1])


def test_a_card_shows_nothing_that_was_not_measured(tiny_model):
    card = build_card(tiny_model(), objective(), Run("m")).text
    assert "Not evaluated.\n\n## Training" in card
    assert "Encode time" not in card
    assert "![" not in card


def test_the_agreement_of_a_run_without_labels_is_on_its_card(tiny_model):
    scores = {"n": 9, "overlap@10": {"1x8": 0.7, "4x32": 1.0}, "spearman": {"1x8": 0.5, "4x32": 1.0}}
    before = {"agreement": scores | {"overlap@10": {"1x8": 0.25, "4x32": 1.0}}}
    card = build_card(tiny_model(), objective(), Run("m", results={"agreement": scores, "before": before})).text
    assert "- share of the 4 nearest: of the 4 nearest others of each of 9 held-out documents" in card
    assert "| size | share of the 4 nearest before | share of the 4 nearest after |\n|---|---:|---:|\n" in card
    assert "| 1x8 | 0.2500 | 0.7000 |" in card


def test_a_card_of_dot_products_does_not_normalise(tiny_model):
    model = tiny_model(prompts={"query": "find: ", "document": ""})
    model.config.default_prompt_name = "query"
    cosine = build_card(model, objective(), Run("m")).text
    model.config.similarity = "dot"
    dot = build_card(model, objective(), Run("m")).text
    for card in (cosine, dot):
        assert "- Prompts (`prompt_name`): `query`: 'find: ' (the default)\n" in card
    assert "normalize_embeddings=True" in cosine
    assert "normali" not in dot


def test_one_layer_is_no_layers(tiny_model):
    ladder = Objective("starbucks", parse_ladder(["1x8"]), 4, 32)
    card = build_card(tiny_model(), ladder, Run("m")).text
    assert "run 1 layer, pool," in card
    assert "only one layer is built and read" in card
    assert "1 layers" not in card
    assert "run 4 layers, pool," in build_card(tiny_model(), objective(), Run("m")).text


def card_of(tiny_model, run: Run, name: str = "starbucks"):
    return build_card(tiny_model(), objective(name), run)


def test_scores_before_and_after_and_what_was_measured(tiny_model):
    before = {"sts": {"stsb": {"n": 9, "spearman": {"1x8": 0.25, "4x32": 0.5}}}}
    card = card_of(tiny_model, Run("m", {"max_length": 24}, RESULTS | {"before": before}))
    for line in (
        "| size | stsb, Spearman before | stsb, Spearman after | docs, nDCG@10 |",
        "| 1x8 | 0.2500 | 0.5000 | 0.1000 |",
        "- stsb: semantic similarity of sentence pairs (9 rows); Spearman correlation of cosine and score",
        "- docs: retrieval (3 queries); nDCG@10, documents ranked by cosine",
        "- Similarity function: cosine",
        "- Pooling: mean",
        "- Maximum length: 48 tokens; trained at up to 24",
    ):
        assert line in card.text, line
    assert f"transformers {transformers.__version__}" in card.text
    values = [m["value"] for r in card.data.to_dict()["model-index"][0]["results"] for m in r["metrics"]]
    assert values == [0.5, 0.75, 0.1, 0.4], "the metadata have the trained model's scores"


def test_the_owner_in_the_snippets(tiny_model):
    for run, repo, name in (
        (Run("m"), "your-name/m", "m"),
        (Run("m", repo_id="org/elastic"), "org/elastic", "org/elastic"),
        (Run("m", repo_id="elastic"), "your-name/elastic", "elastic"),
    ):
        text = card_of(tiny_model, run).text
        assert text.count(f'from_pretrained("{repo}"') == 2
        assert f'SentenceTransformer("{repo}"' in text
        assert f"# {name}\n" in text


def test_the_snippets_use_the_best_size_for_its_cost_and_normalise(tiny_model):
    results = {"sts": {"s": {"spearman": {"1x8": 0.79, "4x32": 0.8}}}}
    text = card_of(tiny_model, Run("m", results=results)).text
    assert 'model.encode(["a text"], num_layers=1, truncate_dim=8, normalize_embeddings=True)' in text


def test_what_is_said_of_different_depths(tiny_model):
    assert "was not trained for it" in card_of(tiny_model, Run("m")).text
    crossed = card_of(tiny_model, Run("m", {"cross size weight": 1.0})).text
    assert "were trained to be compared" in crossed
    assert "was not trained for it" not in crossed


@pytest.mark.parametrize(
    ("name", "key"), [("2dmse", "2402.14776"), ("starbucks", "2410.13230"), ("matryoshka", "2205.13147")]
)
def test_citations_are_bibtex(tiny_model, name, key):
    text = card_of(tiny_model, Run("m"), name).text.split("```bibtex\n")[1].split("```")[0]
    assert key in text
    assert "2205.13147" in text
    assert text.count("@") == len(CITATIONS[name])
    assert text.count("{") == text.count("}")


def test_facts_of_a_local_backbone(tmp_path):
    head = "---\nbase_model: org/plain\nlicense: mit\nlanguage: [de, en]\n---\n# x\n"
    (tmp_path / "README.md").write_text(head)
    assert read_base_facts(str(tmp_path), True) == BaseFacts("org/plain", "mit", ("de", "en"))
    (tmp_path / "README.md").write_text("---\nbase_model: [org/a, org/b]\nlanguage: en\n---\n")
    assert read_base_facts(str(tmp_path), True) == BaseFacts("org/a", None, ("en",))
    (tmp_path / "README.md").write_text("---\nlicense: [\n---\n")
    assert read_base_facts(str(tmp_path), True) == BaseFacts()
    assert read_base_facts(str(tmp_path / "absent"), True) == BaseFacts()
    assert read_base_facts("org/not-in-the-cache", False) == BaseFacts("org/not-in-the-cache")


def test_the_card_of_a_trainer_names_the_facts_of_a_local_backbone(tiny_model, backbone_path, tmp_path):
    shutil.copytree(backbone_path("bert"), tmp_path / "backbone")
    head = "---\nbase_model: org/plain\nlicense: mit\nlanguage: [de, en]\n---\n# x\n"
    (tmp_path / "backbone" / "README.md").write_text(head)
    rows = Dataset.from_dict({"anchor": SENTENCES[:8], "positive": SENTENCES[8:16]})
    for model, given, expected in (
        (TwoDMSEModel.from_backbone(tmp_path / "backbone"), {}, ("org/plain", "mit", ["de", "en"])),
        (
            TwoDMSEModel.from_backbone(tmp_path / "backbone"),
            {"language": "fr", "license": "apache-2.0", "finetuned_from": "org/other"},
            ("org/other", "apache-2.0", ["fr"]),
        ),
        (tiny_model(), {}, (None, None, None)),
    ):
        folder = tmp_path / str(expected[0])
        args = TwoDMSETrainingArguments(output_dir=str(folder), use_cpu=True, report_to="none")
        folder.mkdir(exist_ok=True, parents=True)
        TwoDMSETrainer(model, args, rows).create_model_card(**given)
        data = ModelCard.load(folder / "README.md").data.to_dict()
        assert (data.get("base_model"), data.get("license"), data.get("language")) == expected
    assert card_facts(str(tmp_path / "gone"))["base_model"] is None, "a folder is no name of the Hub"


def test_a_card_without_results(tiny_model):
    for name in OBJECTIVES:
        card = build_card(tiny_model(), objective(name), Run("m"))
        assert "Not evaluated." in card.text
        assert f"Objective: `{name}`" in card.text
        assert "model-index" not in card.data.to_dict()


def test_costs_count_the_parameters_of_each_size(tiny_model, tmp_path):
    model = tiny_model()
    model.add_exit_projections()
    costs = measure_costs(model, parse_ladder(["1x8", "4x32"]), SENTENCES, runs=1)
    for n, size in ((1, "1x8"), (4, "4x32")):
        assert costs[size]["parameters"] == sum(p.numel() for p in model.truncate(n).parameters())
    assert costs["4x32"]["relative_time"] == 1.0
    model.save_pretrained(tmp_path)
    on_disk = (tmp_path / "model.safetensors").stat().st_size / 1e6
    assert abs(costs["4x32"]["megabytes"] - on_disk) < 0.02
