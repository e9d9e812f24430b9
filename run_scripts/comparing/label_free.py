"""What elasticize.py is compared with, on the same texts: methods without training, and separate models of each size.

    python -m run_scripts.comparing.label_free --methods pca separate --model_name_or_path M --corpus_file C \
        --beir_dirs C --results_file baselines.json --output_dir out/baselines

All flags but `--methods` and `--results_file` are those of elasticize.py. A method in the file is not run again.
"""

import copy
import dataclasses
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from modeling_2dmse import Size
from run_scripts import elasticize
from run_scripts.comparing.fitting import fit_principal_components
from run_scripts.shared import checks, cli, models, output
from run_scripts.training import elasticizing
from trainer import TwoDMSETrainer
from trainer.refining import refine_exit_projections
from trainer.shared.inference import evaluation_mode

METHODS = ("pca", "projections", "projections-refined", "separate")


@dataclass
class BaselineArguments:
    """What is compared, and where the scores go."""

    results_file: str = field(metadata={"help": "JSON file of the scores; finished methods in it are kept."})
    methods: list[str] = field(
        default_factory=lambda: list(METHODS),
        metadata={"help": "pca (of each exit's own states), projections (fitted in closed form), projections-refined "
                  "(as --effort fit), separate (a model of each size, trained alone as elasticize.py trains all)."},
    )  # fmt: skip


def main(argv=None) -> None:
    """Parse, read, check; then one method after the other."""
    with cli.user_errors():
        parser = cli.Parser((BaselineArguments, *elasticize.ARGUMENTS))
        baseline, *arguments = parser.parse(elasticize.with_recipe(argv))
        for method in baseline.methods:
            checks.check_choice("methods", method, METHODS)
        elasticize.check(*arguments[:2])
        if arguments[1].effort == "fit":
            raise ValueError("effort: fit is the method projections-refined; use short or full")
        work = elasticizing.prepare(*arguments)
        os.makedirs(work.args.output_dir, exist_ok=True)
        Baselines(work, baseline.results_file).run(baseline.methods)


class Baselines:
    """The methods on the texts of one run of elasticize.py.

    Attributes:
        work: the run; it is not trained.
        results: of the file: the scores of the untouched encoder, and of each method, in the form of results.json.
    """

    def __init__(self, work: elasticizing.Work, results_file: str):
        self.work, self.file = work, results_file
        self.results: dict = {}
        if os.path.exists(results_file):
            with open(results_file, encoding="utf-8") as file:
                self.results = json.load(file)

    def run(self, methods: list[str]) -> None:
        """Run what the file does not have yet."""
        work = self.work
        if "pca" in methods:
            with evaluation_mode(work.encoder):
                self._add("pca", self._pca)
        if set(methods) & {"projections", "projections-refined", "separate"}:
            alone = [size for size in work.ladder if f"separate {size}" not in self.results]
            work.fit(trains="separate" in methods and bool(alone))
            self._write("untouched", work.before)
            self._add("projections", work.measure)
        if "separate" in methods:
            start = os.path.join(str(work.args.output_dir), "start")
            work.encoder.save_pretrained(start)
            for size in work.ladder:
                self._add(f"separate {size}", lambda size=size: self._separate(start, size))
        if "projections-refined" in methods:
            self._add("projections-refined", self._refined)

    def _add(self, method: str, measure: Callable[[], dict]) -> None:
        if method not in self.results:
            started = time.perf_counter()
            scores = measure()
            self._write(method, scores | {"seconds": time.perf_counter() - started})

    def _write(self, method: str, scores: dict) -> None:
        self.results[method] = scores
        output.write_json(self.file, self.results)
        output.say(f"{method}: {json.dumps(scores.get('retrieval', scores))}")

    def _pca(self) -> dict:
        encoder = self.work.encoder
        encoder.add_exit_projections()
        before = copy.deepcopy(encoder.exit_projections.state_dict())
        fit_principal_components(encoder, self.work.texts_to_fit(), show_progress_bar=False)
        scores = self.work.trainer.results(self.work.tasks, self.work.ladder, max_length=None)
        encoder.exit_projections.load_state_dict(before)  # the next methods start from the untouched encoder
        return scores

    def _refined(self) -> dict:
        work = self.work
        with evaluation_mode(work.encoder):
            refine_exit_projections(
                work.encoder, work.fit_texts, work.fit_targets, work.encoder.config.ladder, seed=work.args.seed
            )
            return work.measure()

    def _separate(self, start: str, size: Size) -> dict:
        """The start, cut to a size, trained on the same pairs for the same steps, all of them at this size.

        Its teacher and its refining are those of elasticize.py; the full size is not refined. Below the full size, the
        weights are not averaged with the start, because there is no larger size to keep.
        """
        work = self.work
        full = models.load_encoder(start)
        layers = full.num_layers
        args = dataclasses.replace(
            work.args,
            objective="separate",
            sizes=[str(size)],
            shallow_steps=0.0,
            initial_share=work.args.initial_share if size.num_layers == layers else 0.0,
            initial_share_by_layer="linear",  # a step would average every layer of the only size
            save_strategy="no",
            output_dir=os.path.join(str(work.args.output_dir), str(size)),
        )
        trainer = TwoDMSETrainer(
            model=full.truncate(*size),
            args=args,
            train_dataset=elasticizing.pair_table(work.pairs),
            teacher_embeddings=work.targets,
        )
        trainer.train()
        with evaluation_mode(trainer.encoder):
            if size.num_layers < layers:
                options = {"seed": work.args.seed, "layers": [size.num_layers], "pairs": work.fit_pairs}
                refine_exit_projections(trainer.encoder, work.fit_texts, work.fit_targets, [size], **options)
            return trainer.results(work.tasks, [size], max_length=None)


if __name__ == "__main__":
    main()
