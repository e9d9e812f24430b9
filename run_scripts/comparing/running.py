"""Running a comparison: every unit at its best learning rate with every seed, then the report."""

import os
import time
from pathlib import Path

import torch

from modeling_2dmse import parse_ladder
from run_scripts.shared import models, output, plots
from run_scripts.shared.peer import check_installed
from trainer.evaluation import RetrievalData, StsData, evaluate_tasks, load_beir, load_sts, name_apart

from .methods import PEER, PEER_ALL, UNTRAINED, WITHOUT_TRAINING, Budget, Unit, units
from .rates import choose_rate
from .report import draw, means, table, tried, tried_table
from .store import Store, claim
from .training import train


class Comparison:
    """
    What is left to do of a comparison.

    Args:
        args: of compare.py.
        budget: shared by all methods.

    Raises:
        ValueError: data or recipes cannot be used, or the results file holds runs with other settings.
    """

    def __init__(self, args, budget: Budget):
        if PEER in args.methods or PEER_ALL in args.methods:
            check_installed()
        self.args, self.budget = args, budget
        rows = len(budget.rows(args.seeds[0]))
        sizes = budget.arguments()[1].sizes
        if sizes is None:
            raise ValueError(f"recipe: {budget.recipe} does not name sizes")
        self.ladder = parse_ladder(sizes)
        paths = list(dict.fromkeys([args.eval_file, *args.sts_files]))
        folders = list(dict.fromkeys(args.beir_dirs or []))
        loaded = [load_sts(path) for path in paths] + [load_beir(folder) for folder in folders]
        named = name_apart(loaded, [*paths, *folders])
        self.tasks, self.retrieval = named[: len(paths)], named[len(paths) :]
        self.output_dir = Path(args.output_dir)
        self.store = Store(args.results_file, self.output_dir / "results.lock", args.train, self._settings(rows))

    def run(self) -> None:
        """Run what is not finished and what no other process works on, and report."""
        left = []
        for unit in units(self.args.methods, self.ladder):
            with claim(self.output_dir / f"{self.args.train}-{unit}.lock") as ours:
                if ours:
                    self._run_unit(unit)
                else:
                    left.append(str(unit))
        if left:
            print(f"\nleft to another process: {', '.join(left)}")
        self._report()

    def _run_unit(self, unit: Unit) -> None:
        """Choose a learning rate and run every seed, unless it is done."""
        key = {"method": unit.method} | ({"size": unit.size} if unit.size else {})
        first = self.args.seeds[0]
        if unit.method == UNTRAINED:
            if not self.store.find("rows", **key, seed=first):
                scores = self._evaluate_all(self.budget.arguments()[0].model_name_or_path, unit)
                self.store.add("rows", key | {"seed": first, "learning_rate": None, **scores})
            return
        if unit.method in WITHOUT_TRAINING:
            self._run_seeds(unit, key, None)
            return

        def on_dev(rate: float) -> float:
            run = {**key, "learning_rate": rate, "seed": first}
            row = self.store.find("search", **run)
            if row is None:
                start = time.perf_counter()
                model = self._train(unit, rate, first)
                seconds = round(time.perf_counter() - start)
                row = run | self._evaluate(model, unit, self.tasks[:1]) | {"seconds": seconds}
                self.store.add("search", row)
            scores = row["scores"][self.tasks[0].name]
            return sum(scores.values()) / len(scores)

        rates = sorted(set(self.args.learning_rates))
        self._run_seeds(unit, key, choose_rate(rates, on_dev, self.args.rates_per_method))

    def _run_seeds(self, unit: Unit, key: dict, rate: float | None) -> None:
        for seed in self.args.seeds:
            run = {**key, "learning_rate": rate, "seed": seed}
            if self.store.find("rows", **run) is None:
                self.store.add("rows", run | self._evaluate_all(self._train(unit, rate, seed), unit))

    def _train(self, unit: Unit, rate: float | None, seed: int) -> str:
        return train(unit, rate, seed, self.budget, self.output_dir / self.args.train)

    def _evaluate_all(self, model: str, unit: Unit) -> dict:
        return self._evaluate(model, unit, [*self.tasks, *self.retrieval])

    def _evaluate(self, model: str, unit: Unit, tasks: list[StsData | RetrievalData]) -> dict:
        """
        {"scores": {task: {size: Spearman}}} of a model folder, and the machine it was evaluated on; with search tasks
        also {"retrieval": {task: {size: nDCG@10}}}.
        """
        trained, args = self.budget.arguments()
        sizes = [unit.size] if unit.size else args.sizes
        encoder = models.to_device(models.load_encoder(model, sizes, trust_remote_code=trained.trust_remote_code))
        options = {"max_length": args.max_length, "show_progress_bar": False}
        results = evaluate_tasks(encoder, tasks, parse_ladder(sizes), **options)
        scores = {name: task["spearman"] for name, task in results["sts"].items()}
        found = {name: task["ndcg@10"] for name, task in results.get("retrieval", {}).items()}
        mean = {name: sum(values.values()) / len(values) for name, values in (scores | found).items()}
        print(f"{unit} {os.path.basename(model)}: " + ", ".join(f"{n} {m:.4f}" for n, m in mean.items()), flush=True)
        device = torch.cuda.get_device_name() if encoder.device.type == "cuda" else encoder.device.type
        retrieval = {"retrieval": found} if found else {}
        return {"scores": scores, **retrieval, "threads": torch.get_num_threads(), "device": device}

    def _report(self) -> None:
        """Print the table, and write it and the picture next to the results."""
        names = [task.name for task in self.tasks[1:]]
        scores = means(self.store.rows(), self.args.train, names)
        if not scores:
            return
        head = f"Trained on {self.args.train}; Spearman x 100, mean over {', '.join(names)}"
        text = f"{head}\n\n{table(scores, self.ladder)}\n"
        if self.retrieval:
            searched = [task.name for task in self.retrieval]
            found = means(self.store.rows(), self.args.train, searched, "retrieval")
            text += f"\nnDCG@10 x 100, mean over {', '.join(searched)}\n\n{table(found, self.ladder)}\n"
        entries = tried(self.store.search(), self.store.rows(), self.args.train)
        self.store.note_tried(entries)
        text += f"\nWhat was tried, chosen by the mean over sizes on {self.tasks[0].name}\n\n{tried_table(entries)}\n"
        print(f"\n{text}")
        start = f"{os.path.splitext(self.args.results_file)[0]}-{self.args.train}"
        with output.replacing(f"{start}.md") as partial:
            Path(partial).write_text(text, encoding="utf-8")
        title = f"{plots.public_name(self.budget.arguments()[0].model_name_or_path)}, trained on {self.args.train}"
        draw(scores, self.ladder, f"{start}.png", title, names)

    def _settings(self, rows: int) -> dict:
        """What runs must share to be compared."""
        model, training = self.budget.arguments()
        unlabeled = self.budget.unlabeled_file
        return {
            "model": model.model_name_or_path,
            "rows": rows,
            "sizes": training.sizes,
            "batch": training.per_device_train_batch_size,
            "epochs": training.num_train_epochs,
            "max_length": training.max_length,
            "loss_scale": training.loss_scale,
            "bf16": training.bf16,
            "best_recipe": os.path.basename(self.budget.best_recipe),
            "unlabeled_file": unlabeled and os.path.basename(unlabeled),
            "chosen_on": self.tasks[0].name,
            "tasks": [task.name for task in self.tasks[1:]],
            "retrieval": [task.name for task in self.retrieval] or None,
        }
