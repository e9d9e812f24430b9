"""Running a comparison: every unit at its best learning rate with every seed, then the report."""

import os
import time
from pathlib import Path

import torch

from modeling_2dmse import parse_ladder
from run_scripts.shared import models, plots
from run_scripts.shared.peer import check_installed
from trainer.evaluation import StsData, evaluate_tasks, load_sts, name_apart

from .methods import PEER, UNTRAINED, Budget, Unit, units
from .rates import choose_rate
from .report import draw, means, table
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
        if PEER in args.methods:
            check_installed()
        self.args, self.budget = args, budget
        rows = len(budget.rows(args.seeds[0]))
        sizes = budget.arguments()[1].sizes
        if sizes is None:
            raise ValueError(f"recipe: {budget.recipe} does not name sizes")
        self.ladder = parse_ladder(sizes)
        paths = list(dict.fromkeys([args.eval_file, *args.sts_files]))
        self.tasks = name_apart([load_sts(path) for path in paths], paths)
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
        seeds, first = self.args.seeds, self.args.seeds[0]
        if unit.method == UNTRAINED:
            if not self.store.find("rows", **key, seed=first):
                scores = self._evaluate(self.budget.arguments()[0].model_name_or_path, unit, self.tasks)
                self.store.add("rows", key | {"seed": first, "learning_rate": None, **scores})
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

        rate = choose_rate(sorted(self.args.learning_rates), on_dev)
        for seed in seeds:
            run = {**key, "learning_rate": rate, "seed": seed}
            if self.store.find("rows", **run) is None:
                self.store.add("rows", run | self._evaluate(self._train(unit, rate, seed), unit, self.tasks))

    def _train(self, unit: Unit, rate: float, seed: int) -> str:
        return train(unit, rate, seed, self.budget, self.output_dir / self.args.train)

    def _evaluate(self, model: str, unit: Unit, tasks: list[StsData]) -> dict:
        """{"scores": {task: {size: Spearman}}} of a model folder, and the machine it was evaluated on."""
        trained, args = self.budget.arguments()
        sizes = [unit.size] if unit.size else args.sizes
        encoder = models.to_device(models.load_encoder(model, sizes, trust_remote_code=trained.trust_remote_code))
        options = {"max_length": args.max_length, "show_progress_bar": False}
        results = evaluate_tasks(encoder, tasks, parse_ladder(sizes), **options)["sts"]
        scores = {task.name: results[task.name]["spearman"] for task in tasks}
        mean = {name: sum(values.values()) / len(values) for name, values in scores.items()}
        print(f"{unit} {os.path.basename(model)}: " + ", ".join(f"{n} {m:.4f}" for n, m in mean.items()), flush=True)
        device = torch.cuda.get_device_name() if encoder.device.type == "cuda" else encoder.device.type
        return {"scores": scores, "threads": torch.get_num_threads(), "device": device}

    def _report(self) -> None:
        """Print the table, and write it and the picture next to the results."""
        names = [task.name for task in self.tasks[1:]]
        scores = means(self.store.rows(), self.args.train, names)
        if not scores:
            return
        head = f"Trained on {self.args.train}; Spearman x 100, mean over {', '.join(names)}"
        text = f"{head}\n\n{table(scores, self.ladder)}\n"
        print(f"\n{text}")
        start = f"{os.path.splitext(self.args.results_file)[0]}-{self.args.train}"
        Path(f"{start}.md").write_text(text, encoding="utf-8")
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
        }
