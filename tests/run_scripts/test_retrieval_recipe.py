"""Training for retrieval from the command line: Starbucks' recipe, a guide, a teacher's scores, mining with prompts."""

import json
from pathlib import Path

import pytest
from conftest import LADDER, SENTENCES
from datasets import Dataset

from modeling_2dmse import TwoDMSEModel
from run_scripts import evaluate, finetune, mine_negatives
from run_scripts.shared import cli

RECIPE = str(cli.RECIPES / "starbucks-msmarco.yaml")
NEGATIVES = ["negative", *(f"negative_{number}" for number in range(1, 7))]


@pytest.fixture
def flags(tmp_path, backbone_path):
    """Flags of a run of two steps on eight rows with seven negatives each."""
    rows = {"anchor": SENTENCES[:8], "positive": SENTENCES[8:16]}
    rows |= {name: [SENTENCES[(i + 3 * n) % 20] for i in range(8)] for n, name in enumerate(NEGATIVES, start=3)}
    Dataset.from_dict(rows).to_json(tmp_path / "rows.jsonl")
    scores = {f"{name}_score": [0.3 * i - n for i in range(8)] for n, name in enumerate(["positive", *NEGATIVES])}
    Dataset.from_dict(rows | scores).to_json(tmp_path / "taught.jsonl")
    settings = {"model_name_or_path": backbone_path("bert"), "output_dir": tmp_path / "out", "sizes": LADDER}
    settings |= {"train_file": tmp_path / "rows.jsonl", "per_device_train_batch_size": 4, "max_steps": 2}
    settings |= {"bf16": "false", "use_cpu": "true", "disable_tqdm": "true", "max_eval_samples": 2}

    def words(**more) -> list[str]:
        pairs = [(name, value if isinstance(value, list) else [value]) for name, value in (settings | more).items()]
        return [str(word) for name, values in pairs for word in (f"--{name}", *values)]

    return words


def test_the_recipe_is_that_of_the_published_code():
    flags = ["--train_file", "rows.jsonl", "--bf16", "false", "--output_dir", "x"]
    model, _, args = cli.Parser(finetune.ARGUMENTS).parse([RECIPE, *flags])
    assert (model.pooling, args.similarity, args.loss, args.loss_scale) == ("cls", "dot", "infonce", 1)
    assert (args.objective, args.alignment, args.alignment_weight) == ("starbucks", "query_kl", 1)
    assert (args.max_query_length, args.max_length) == (32, 196)
    assert (args.per_device_train_batch_size, args.num_train_epochs, args.learning_rate) == (128, 3, 1e-4)
    assert args.sizes == ["2x32", "4x64", "6x128", "8x256", "10x512", "12x768"]
    assert "Not run here" in Path(RECIPE).read_text(encoding="utf-8")


def test_the_recipe_trains_on_a_tiny_table(flags, tmp_path):
    finetune.main([RECIPE, *flags(max_length=40)])  # the tiny model reads up to 48 tokens
    model = TwoDMSEModel.from_pretrained(tmp_path / "out")
    assert (model.config.similarity, model.config.pooling) == ("dot", "cls")
    card = (tmp_path / "out" / "README.md").read_text()
    for line in ("- steps: `2`", "- similarity: `dot`", "- alignment: `query_kl`", "- max_query_length: `32`"):
        assert line in card
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert set(results["before"]["retrieval"]["eval"]["ndcg@10"]) == set(LADDER)


def test_prompts_of_the_training_are_used_by_evaluate_and_by_mining(flags, tmp_path, monkeypatch):
    finetune.main(flags(query_prompt="a man ", document_prompt="the cat ", max_query_length=7))
    seen, encode_states = [], TwoDMSEModel.encode_states

    def recorded(self, texts, layers=None, batch_size=None, prompt="", max_length=None, *args, **kwargs):
        if texts != ["a text"]:  # that a model is tried with when it is loaded
            seen.append((prompt, max_length))
        return encode_states(self, texts, layers, batch_size, prompt, max_length, *args, **kwargs)

    monkeypatch.setattr(TwoDMSEModel, "encode_states", recorded)
    beir = tmp_path / "beir"
    (beir / "qrels").mkdir(parents=True)
    (beir / "corpus.jsonl").write_text("".join(json.dumps({"_id": t, "text": t}) + "\n" for t in SENTENCES))
    (beir / "queries.jsonl").write_text(json.dumps({"_id": "q", "text": SENTENCES[0]}) + "\n")
    (beir / "qrels" / "test.tsv").write_text(f"query-id\tcorpus-id\tscore\nq\t{SENTENCES[3]}\t1\n")
    model = ["--model_name_or_path", str(tmp_path / "out")]
    lengths = ["--max_length", "9", "--max_query_length", "7"]
    evaluate.main([*model, *lengths, "--beir_dirs", str(beir), "--output_dir", str(tmp_path / "results")])
    assert seen == [("a man ", 7), ("the cat ", 9)]
    seen.clear()
    pairs = ["--train_file", str(tmp_path / "pairs.csv"), "--output_file", str(tmp_path / "mined.csv")]
    Dataset.from_dict({"anchor": SENTENCES[:8], "positive": SENTENCES[8:16]}).to_csv(
        tmp_path / "pairs.csv", index=False
    )
    mine_negatives.main([*model, *pairs, "--range_min", "0", "--range_max", "5"])
    assert [prompt for prompt, _ in seen] == ["a man ", "the cat "]


def test_filters_of_cosines_are_refused_for_dot_products(flags, tmp_path, capsys):
    finetune.main(flags(similarity="dot", max_eval_samples=0))
    model = ["--model_name_or_path", str(tmp_path / "out"), "--train_file", str(tmp_path / "rows.jsonl")]
    with pytest.raises(SystemExit, match="2"):
        mine_negatives.main(
            [
                *model,
                "--output_file",
                str(tmp_path / "mined.csv"),
                "--range_min",
                "0",
                "--range_max",
                "5",
                "--margin",
                "0.1",
            ]
        )
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "margin: it limits cosines, but the model compares embeddings by dot product" in error


@pytest.mark.parametrize("loss", [None, "margin_mse"])
def test_scores_of_a_teacher_train_by_default_with_distill_kl(loss, flags, tmp_path):
    more = {"loss": loss} if loss else {}
    finetune.main(flags(train_file=tmp_path / "taught.jsonl", **more))
    assert f"- loss: `{loss or 'distill_kl'}`" in (tmp_path / "out" / "README.md").read_text()


def test_a_guide_is_loaded_from_its_folder(flags, tmp_path, backbone_path, capsys):
    weights = {}
    for name, guide in (("none", {}), ("roberta", {"guide_model_name_or_path": backbone_path("roberta")})):
        finetune.main(flags(output_dir=tmp_path / name, max_eval_samples=0, dropout="false", **guide))
        weights[name] = (tmp_path / name / "model.safetensors").read_bytes()
    assert weights["none"] != weights["roberta"]
    assert "- guide: `roberta" in (tmp_path / "roberta" / "README.md").read_text()
    with pytest.raises(SystemExit, match="2"):
        finetune.main(flags(output_dir=tmp_path / "x", guide_model_name_or_path="/no/such/folder"))
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.endswith("guide_model_name_or_path: /no/such/folder does not exist")
