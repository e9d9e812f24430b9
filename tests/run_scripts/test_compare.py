"""compare.py: every method under one budget, each at its own learning rate, continued where it stopped."""

import json
import statistics

import pytest
import torch
from conftest import SENTENCES

from modeling_2dmse import parse_ladder
from run_scripts import compare, finetune
from run_scripts.comparing import methods, running
from run_scripts.comparing.methods import METHODS, Budget, Unit
from run_scripts.comparing.rates import choose_rate
from run_scripts.comparing.report import ladder_means, means, table
from run_scripts.comparing.store import Store, claim
from run_scripts.training.finetuning import load_tables

LADDER = ["1x8", "4x32"]
RATES = ("1e-2", "5e-2")

pytestmark = pytest.mark.usefixtures("few_refining_steps")


@pytest.fixture
def folder(tmp_path, backbone_path, monkeypatch):
    """Data, and recipes of two steps on a tiny model."""
    triplets = [f"{a},{b},{c}" for a, b, c in zip(SENTENCES, SENTENCES[1:], SENTENCES[2:], strict=False)]
    (tmp_path / "t.csv").write_text("\n".join(["anchor,positive,negative", *triplets]))
    scored = [f"{a},{b},{i % 5}" for i, (a, b) in enumerate(zip(SENTENCES, SENTENCES[3:], strict=False))]
    for name in ("dev", "one", "two"):
        (tmp_path / f"{name}.csv").write_text("\n".join(["sentence1,sentence2,score", *scored]))
        scored = scored[2:]
    (tmp_path / "plain.txt").write_text("\n".join(SENTENCES))
    sizes = f"model_name_or_path: {backbone_path('bert')}\nsizes: [{', '.join(LADDER)}]\n"
    shared = "max_length: 16\nper_device_train_batch_size: 4\nuse_cpu: true\nbf16: false\n"
    (tmp_path / "recipe.yaml").write_text(f"{sizes}{shared}num_train_epochs: 1\n")
    best = "loss_scale: 5\nexit_projections: true\nteacher: start\nalignment: score_kl\nalignment_weight: 3\n"
    (tmp_path / "best.yaml").write_text(f"{sizes}{shared}num_train_epochs: 1\n{best}")
    (tmp_path / "smae.yaml").write_text(f'{sizes}{shared}max_steps: 2\neval_strategy: "no"\n')
    monkeypatch.chdir(tmp_path)
    return tmp_path


def flags(*more: str) -> list[str]:
    return [
        *("--train_file", "t.csv", "--eval_file", "dev.csv", "--sts_files", "one.csv", "two.csv"),
        *("--recipe", "recipe.yaml", "--best_recipe", "best.yaml", "--pretrain_recipe", "smae.yaml"),
        *("--pretrain_file", "plain.txt", "--max_train_samples", "8", "--seeds", "0", "1", "--learning_rates", *RATES),
        *("--output_dir", "out", "--results_file", "results.json", *more),
    ]


def test_every_method_is_run_once_and_reported(folder, monkeypatch, capsys):
    compare.main(flags())
    printed = capsys.readouterr().out
    text = (folder / "results.json").read_text()
    rows = json.loads(text)["rows"]
    assert {row["method"] for row in rows} == set(METHODS)
    for method in METHODS:
        own = [row for row in rows if row["method"] == method]
        sizes = [[size for row in own if row["seed"] == seed for size in row["scores"]["one"]] for seed in (0, 1)]
        assert sizes == ([LADDER, []] if method == "untrained" else [LADDER, LADDER]), "each size once per seed"
    assert all(set(row["scores"]) == {"dev", "one", "two"} for row in rows)
    # With so few pairs, refining and gates need not change their order.
    trained = [str(row["scores"]) for row in rows if not row["method"].startswith("projections-")]
    assert len(set(trained)) == len(trained), "no two runs give the same model"
    assert printed.count("|") > 50
    assert (folder / "results-nli.png").stat().st_size > 5000
    assert (folder / "results-nli.md").read_text() in printed

    search = json.loads(text)["search"]
    for row in rows:
        mine = [r for r in search if (r["method"], r.get("size")) == (row["method"], row.get("size"))]
        score = {r["learning_rate"]: statistics.fmean(r["scores"]["dev"].values()) for r in mine}
        assert row["learning_rate"] == (max(score, key=score.get) if score else None)

    monkeypatch.setattr(running, "train", lambda *args: pytest.fail("a finished run was run again"))
    compare.main(flags())
    assert (folder / "results.json").read_text() == text


def test_a_missing_run_is_repeated_with_the_same_scores(folder):
    wanted = flags("--methods", "2dmse", "--learning_rates", "5e-2")
    compare.main(wanted)
    before = json.loads((folder / "results.json").read_text())
    lost = {**before, "rows": before["rows"][:1]}
    (folder / "results.json").write_text(json.dumps(lost))
    trained = folder / "out" / "nli" / "2dmse-0.05-1"
    trained.rename(trained.with_name("2dmse-0.05-1.partial"))  # as if it had been stopped halfway
    compare.main(wanted)
    after = json.loads((folder / "results.json").read_text())
    assert after["rows"] == before["rows"]
    assert before["rows"][0]["scores"] != before["rows"][1]["scores"]


def make_budget(num_train_epochs=None, loss_scale=None, bf16=None) -> Budget:
    return Budget(
        recipe="recipe.yaml",
        train_file="t.csv",
        max_train_samples=8,
        best_recipe="best.yaml",
        pretrain_recipe="smae.yaml",
        num_train_epochs=num_train_epochs,
        loss_scale=loss_scale,
        bf16=bf16,
    )


def test_all_methods_train_on_the_rows_that_finetune_draws(folder):
    budget = make_budget()
    parser = finetune.cli.Parser((finetune.ModelArguments, finetune.DataArguments, finetune.TwoDMSETrainingArguments))
    drawn = []
    for seed in ("0", "1"):
        given = ["recipe.yaml", "--train_file", "t.csv", "--max_train_samples", "8", "--max_eval_samples", "0"]
        _, data, args = parser.parse([*given, "--seed", seed, "--output_dir", "x"])
        (ours,), _ = load_tables(data, args)
        assert budget.rows(int(seed))["anchor"][:] == ours["anchor"][:]
        drawn.append(ours["anchor"][:])
    assert drawn[0] != drawn[1]
    assert len(drawn[0]) == 8


@pytest.mark.parametrize("top", [0, 3, 6])
@pytest.mark.parametrize("count", [2, 4, 5, 7, 9])
def test_every_method_gets_the_same_number_of_rates(count, top):
    asked = []
    found = choose_rate(list(range(7)), lambda rate: asked.append(rate) or -abs(rate - top), count)
    assert len(asked) == len(set(asked)) == min(count, 7)
    assert found == min(asked, key=lambda rate: abs(rate - top))
    assert (found == top) or count < 5


@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_climbing_finds_the_top_of_a_hill(count):
    rates = [2.0**n for n in range(count)]
    for top in rates:
        asked = []
        assert choose_rate(rates, lambda rate, top=top, asked=asked: asked.append(rate) or -abs(rate - top)) == top
        assert len(asked) == len(set(asked))


def test_the_table_shows_means_over_tasks_then_seeds():
    ladder = parse_ladder(["1x8", "4x32"])
    score = {("separate", "1x8"): 0.1, ("separate", "4x32"): 0.3, ("2dmse", "1x8"): 0.2, ("2dmse", "4x32"): 0.5}
    rows = [
        {"train": "nli", "method": "separate", "size": size, "seed": seed,
         "scores": {task: {size: score["separate", size] + 0.02 * seed + shift} for task, shift in TASKS.items()}}
        for size in ("1x8", "4x32") for seed in (0, 1)
    ]  # fmt: skip
    both = {task: {size: score["2dmse", size] for size in ("1x8", "4x32")} for task in TASKS}
    rows += [{"train": train, "method": "2dmse", "seed": 0, "scores": both} for train in ("nli", "other")]
    scores = means(rows, "nli", list(TASKS))
    assert scores["separate"]["1x8"] == pytest.approx({0: 0.12, 1: 0.14})
    assert ladder_means(scores["separate"], ["1x8", "4x32"]) == pytest.approx({0: 0.22, 1: 0.24})
    lines = table(scores, ladder).splitlines()
    assert lines[0] == "| size | separate | 2dmse |"
    assert lines[2] == "| 1x8 | 13.00 ± 1.41 | 20.00 |"
    assert lines[4] == "| ladder mean | 23.00 ± 1.41 | 35.00 |"


TASKS = {"one": 0.0, "two": 0.04}


def test_what_another_process_runs_is_left_to_it(folder, capsys):
    with claim(folder / "out" / "nli-2dmse.lock") as ours:
        assert ours
        compare.main(flags("--methods", "2dmse", "untrained"))
    assert "left to another process: 2dmse" in capsys.readouterr().out
    assert [row["method"] for row in json.loads((folder / "results.json").read_text())["rows"]] == ["untrained"]


def test_a_better_rate_replaces_the_run_of_the_worse_one(folder):
    store = Store("results.json", folder / "lock", "nli", {})
    for rate, size, seed in ((1e-3, "1x8", 0), (1e-3, "1x8", 1), (1e-3, "4x32", 0), (2e-3, "1x8", 0)):
        run = {"method": "separate", "size": size, "learning_rate": rate, "seed": seed}
        store.add("rows", run)
        store.add("search", run)
    kept = [(row["learning_rate"], row["size"], row["seed"]) for row in store.rows()]
    assert kept == [(1e-3, "1x8", 1), (1e-3, "4x32", 0), (2e-3, "1x8", 0)]
    assert store.find("search", method="separate", size="1x8", learning_rate=1e-3, seed=0), "a search keeps all rates"


def test_the_precision_is_that_of_all_methods(folder):
    for bf16, flag in ((None, []), (True, ["--bf16", "True"]), (False, ["--bf16", "False"])):
        budget = make_budget(bf16=bf16)
        assert budget.precision == flag
        assert budget.arguments()[1].bf16 is bool(bf16), "the recipe says false"


def test_epochs_are_those_of_all_methods(folder):
    assert make_budget().arguments()[1].num_train_epochs != 7
    assert make_budget(num_train_epochs=7.0).arguments()[1].num_train_epochs == 7
    compare.main(flags("--methods", "starbucks-score_kl", "--num_train_epochs", "2", "--seeds", "0"))
    trained = next((folder / "out" / "nli").glob("starbucks-score_kl-*"))
    assert torch.load(trained / "training_args.bin", weights_only=False).num_train_epochs == 2
    assert json.loads((folder / "results.json").read_text())["settings"]["nli"]["epochs"] == 2


def test_a_named_scale_is_that_of_all_methods_and_one_in_the_best_recipe_its_own(folder, monkeypatch):
    from sentence_transformers.sentence_transformer import losses

    peers, theirs = [], losses.MultipleNegativesRankingLoss
    monkeypatch.setattr(
        losses, "MultipleNegativesRankingLoss", lambda *a, scale: peers.append(scale) or theirs(*a, scale=scale)
    )
    assert make_budget().arguments()[1].loss_scale == 20
    assert make_budget(loss_scale=7.0).arguments()[1].loss_scale == 7
    for given, wanted in (((), {"2dmse": 20, "best": 5}), (("--loss_scale", "7"), {"2dmse": 7, "best": 7})):
        out, results = f"out{len(given)}", f"{len(given)}.json"
        named = flags("--methods", "2dmse", "best", methods.PEER, *given, "--seeds", "0", "--learning_rates", "1e-2")
        compare.main([*named, "--output_dir", out, "--results_file", results])
        scales = {
            path.parent.name.split("-")[0]: torch.load(path, weights_only=False).loss_scale
            for path in folder.glob(f"{out}/nli/*/training_args.bin")
        }
        assert scales == wanted
        assert set(peers) == {wanted["2dmse"]}
        peers.clear()
        assert json.loads((folder / results).read_text())["settings"]["nli"]["loss_scale"] == wanted["2dmse"]


def test_results_of_another_budget_are_refused(folder):
    lock = folder / "lock"
    Store("results.json", lock, "nli", {"rows": 8})
    Store("results.json", lock, "stsb", {"rows": 9})
    with pytest.raises(ValueError, match="holds runs on nli with rows 8, not 9"):
        Store("results.json", lock, "nli", {"rows": 9})
    (folder / "results.json").write_text("[]")
    with pytest.raises(ValueError, match="is not a file of this script"):
        Store("results.json", lock, "nli", {"rows": 8})


def test_unlabeled_texts_are_for_the_best_recipe_only(folder):
    compare.main(
        flags("--methods", "starbucks-score_kl", "best", "--learning_rates", "1e-2", "--unlabeled_file", "t.csv")
    )
    cards = {path.parent.name: path.read_text() for path in folder.glob("out/nli/*/README.md")}
    told = {name: "weight on unlabeled texts" in card for name, card in cards.items()}
    assert told == {f"{name}-0.01-{s}": name == "best" for name in ("starbucks-score_kl", "best") for s in (0, 1)}
    assert json.loads((folder / "results.json").read_text())["settings"]["nli"]["unlabeled_file"] == "t.csv"


def test_runs_of_two_best_recipes_do_not_mix(folder, capsys):
    (folder / "other.yaml").write_text((folder / "best.yaml").read_text())
    compare.main(flags("--methods", "untrained"))
    text = (folder / "results.json").read_text()
    with pytest.raises(SystemExit):
        compare.main(flags("--methods", "untrained", "--best_recipe", "other.yaml"))
    assert "holds runs on nli with best_recipe best.yaml, not other.yaml" in capsys.readouterr().err
    assert (folder / "results.json").read_text() == text


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--methods", "magic"], "methods: 'magic' is unknown"),
        (["--learning_rates", "0"], "learning_rates: [0.0] is not allowed"),
        (["--pretrain_file", "none.txt"], "pretrain_file: none.txt is not a file"),
        (["--best_recipe", "none.yaml"], "best_recipe: none.yaml is not a file"),
        (["--unlabeled_file", "none.txt"], "unlabeled_file: none.txt is not a file"),
        (["--recipe", "none.yaml"], "none.yaml is not a file"),
        (["--train_file", "none.csv"], "none.csv"),
        (["--dataset_name", "org/data"], "either --train_file or --dataset_name"),
    ],
)
def test_what_would_fail_after_hours_fails_at_once(folder, capsys, monkeypatch, more, message):
    monkeypatch.setattr(running, "train", lambda *args: pytest.fail("something was trained"))
    with pytest.raises(SystemExit):
        compare.main(flags(*more))
    assert message in capsys.readouterr().err
    assert not (folder / "results.json").exists()


@pytest.mark.parametrize("path", sorted(compare.cli.RECIPES.glob("compare-*.yaml")), ids=lambda path: path.name)
def test_recipes_name_existing_recipes_and_their_data_unless_it_is_a_flag(path):
    needed = ["--eval_file", "dev.csv", "--sts_files", "one.csv"]
    _, budget = compare.cli.Parser((compare.ComparisonArguments, Budget)).parse([str(path), *needed])
    for recipe in (budget.recipe, budget.best_recipe, budget.pretrain_recipe):
        assert (compare.cli.RECIPES / recipe.split("/")[-1]).is_file()
    if budget.dataset_name:
        compare.check_pretraining(budget)
    else:
        with pytest.raises(ValueError, match="pretrain_file: name plain text"):
            compare.check_pretraining(budget)


def test_units_are_methods_and_separate_once_per_size():
    assert list(map(str, methods.units(["2dmse", "separate"], parse_ladder(LADDER)))) == [
        "2dmse", *(f"separate-{size}" for size in LADDER)
    ]  # fmt: skip
    assert Unit("separate", "1x8").size == "1x8"
