"""The whole card, its metadata, and its costs."""

import yaml
from conftest import SENTENCES
from huggingface_hub import ModelCard

from modeling_2dmse import parse_ladder
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
    run = Run("org/name", {"rows": 7}, RESULTS, costs, "accelerate launch x", "base/model", ["some/data"], "apache-2.0")
    write_card(tmp_path, build_card(tiny_model(), objective(), run))
    card = ModelCard.load(tmp_path / "README.md")
    data = card.data.to_dict()
    assert data["library_name"] == "transformers"
    assert data["pipeline_tag"] == "sentence-similarity"
    assert (data["base_model"], data["datasets"], data["license"]) == ("base/model", ["some/data"], "apache-2.0")
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
        'AutoModel.from_pretrained("org/name", trust_remote_code=True)',
        'SentenceTransformer("org/name", trust_remote_code=True)',
        "arXiv:2410.13230",
    ):
        assert line in card.text, line
    assert "{{" not in card.content
    yaml.safe_load(card.content.split("---")[1])


def test_a_card_without_results(tiny_model):
    for name in OBJECTIVES:
        card = build_card(tiny_model(), objective(name), Run("m"))
        assert "Not evaluated." in card.text
        assert f"Objective: `{name}`" in card.text
        assert "model-index" not in card.data.to_dict()


def test_costs_count_the_parameters_of_each_size(tiny_model, tmp_path):
    model = tiny_model()
    costs = measure_costs(model, parse_ladder(["1x8", "4x32"]), SENTENCES, runs=1)
    for n, size in ((1, "1x8"), (4, "4x32")):
        assert costs[size]["parameters"] == sum(p.numel() for p in model.truncate(n).parameters())
    assert costs["4x32"]["relative_time"] == 1.0
    model.save_pretrained(tmp_path)
    on_disk = (tmp_path / "model.safetensors").stat().st_size / 1e6
    assert abs(costs["4x32"]["megabytes"] - on_disk) < 0.02
