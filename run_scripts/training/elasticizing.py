"""The steps of elasticize.py: read the corpus, fit, train, report."""

from __future__ import annotations

import fnmatch
import itertools
import os
import random
import shutil
import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from datasets import Dataset

from modeling_2dmse import Size, TwoDMSEModel, parse_ladder
from modeling_2dmse.configuration_2dmse import default_ladder
from run_scripts.shared import cli, models, output, output_dir, plots
from run_scripts.shared.shares import save_shares
from run_scripts.training import finetuning
from run_scripts.training.corpus import check_read, find_source, read_documents
from trainer import TwoDMSETrainer, TwoDMSETrainingArguments
from trainer.agreement import agreement, count_neighbours, reference_similarities
from trainer.data import check_table
from trainer.evaluation import (
    RetrievalData,
    StsData,
    check_varied,
    load_beir,
    name_apart,
    retrieval_from_pairs,
    task_from_table,
)
from trainer.exits import refine_exits, refine_trained
from trainer.model_card import measure_costs
from trainer.objectives import two_thirds
from trainer.preparation import set_comparison
from trainer.projections import fit_exit_projections, full_dim
from trainer.pseudo_pairs import Document, make_pairs, make_queries
from trainer.refining import dims_of_last_exit, rotate_last_exit
from trainer.shared.inference import evaluation_mode
from trainer.shared.tables import read_table
from trainer.teacher_embeddings import TeacherEmbeddings, compute_teacher_embeddings, principal_directions

if TYPE_CHECKING:
    from run_scripts.elasticize import CorpusArguments, EncoderArguments

# Texts that projections are fitted to.
_FITTED = 6000
# Words of a passage for a token of max_length: English has about 1.3 tokens a word.
_WORDS_PER_TOKEN = 0.75
PSEUDO_QUERIES = "pseudo-queries"
_PSEUDO_ROWS = "the title, a sentence or some words of each held-out document, with which it is to be found"


class Work:
    """A run, from what `prepare` has checked to the saved folder.

    Attributes:
        trainer: the trainer of the encoder.
        data_args: what the corpus is and what is made of it.
    """

    def __init__(
        self,
        model_args: EncoderArguments,
        data_args: CorpusArguments,
        args: TwoDMSETrainingArguments,
        encoder: TwoDMSEModel,
        teacher: TwoDMSEModel | None,
        documents: tuple[list[Document], list[Document]],
        tasks: Sequence[StsData | RetrievalData],
    ):
        self.model_args, self.data_args, self.args = model_args, data_args, args
        self.encoder, self.teacher = encoder, teacher
        # Nothing is left to the trainer, which adds gates last, and would fit projections to the training texts again.
        self.gates, args.exit_gates = args.exit_gates, False
        args.exit_projections = args.refine_projections = False
        self.documents, held = documents
        self.max_words = max(1, int(_WORDS_PER_TOKEN * min(args.max_length, encoder.max_length)))
        self.held_texts = [document.whole for document in held]
        held_pairs = make_pairs(held, len(held), args.seed, self.max_words)
        self.tasks: list[StsData | RetrievalData] = list(tasks)
        if held_pairs:
            self.tasks.insert(0, retrieval_from_pairs(PSEUDO_QUERIES, pair_table(held_pairs)))
        set_comparison(encoder, args)  # so that the prompts are known
        self.pairs = [] if data_args.effort == "fit" else self._make_pairs()
        rows = [row for pair in self.pairs for row in zip(("query", "document"), pair, strict=True)]
        self.rows = list(dict(zip(with_prompts(encoder, rows), rows, strict=True)).values())
        texts = with_prompts(encoder, self.rows)
        self.targets = TeacherEmbeddings(texts, np.zeros((len(texts), encoder.config.hidden_size), np.float32))
        training: dict = {}
        if self.pairs:
            training = {"train_dataset": pair_table(self.pairs), "teacher_embeddings": self.targets}
        self.trainer = TwoDMSETrainer(model=encoder, args=args, **training)
        self.ladder = self.trainer.ladder
        self.gates = self.gates and self.ladder[0].num_layers < encoder.num_layers
        self._draw_fit_rows()
        self.before: dict = {}
        self.directions: torch.Tensor | None = None
        self.started = time.perf_counter()

    def _make_pairs(self) -> list[tuple[str, str]]:
        batch, found = self.args.per_device_train_batch_size, len(self.documents)
        argument, _ = find_source(self.data_args)
        if found < batch:
            raise ValueError(
                f"{argument}: {found} different documents to train on are fewer than one batch of {batch}; add "
                "documents, lower --per_device_train_batch_size, or use --effort fit"
            )
        pairs = make_pairs(self.documents, self.data_args.num_pairs, self.args.seed, self.max_words)
        if len(pairs) < batch:
            raise ValueError(
                f"{argument}: its documents make {len(pairs)} pairs of texts with letters or digits, fewer than one "
                f"batch of {batch}; add longer documents, or use --effort fit"
            )
        if len(pairs) < self.data_args.num_pairs:
            output.say(f"the corpus makes {len(pairs)} pairs, fewer than the {self.data_args.num_pairs} of --num_pairs")
        return pairs

    @property
    def start(self) -> str:
        """A checksum of the encoders and the texts, by which everything before the first step can be told."""
        models_used = [models.fingerprint(model) for model in (self.encoder, self.teacher) if model is not None]
        sizes, texts = list(map(str, self.ladder)), self.texts_to_fit()
        known = [models_used, sizes, self.gates, texts, self.fit_pairs, self.pairs]
        return output_dir.checksum(known)

    def fit(self, trains: bool = True) -> None:
        """Measure the encoder as it is, fit the projections, and compute what the sizes learn to reproduce, unless
        nothing is trained."""
        self._trains = trains and bool(self.pairs)
        self.encoder.to(self.args.device)  # type: ignore[arg-type]  # the type of transformers' wrapper is wrong
        with evaluation_mode(self.encoder):
            self.reference: torch.Tensor | None = None
            if self.held_texts:
                self.reference = reference_similarities(self.encoder, self.held_texts, prompt=self._document_prompt)
            self.before = self.measure()
            if not self.gates:  # a model that is elastic already may have them
                self.encoder.remove_exit_gates()
            self.fit_texts = self.texts_to_fit()
            if self.teacher is None:
                name = f"fitted {self.model_args.model_name_or_path} {models.fingerprint(self.encoder)}"
                states = self._fit(None)
                self.fit_targets = states[-1]
                self._fill_targets(self.encoder, name)
            else:
                states = self._fit_to_teacher(self.teacher)
            if self.gates or not self.pairs:
                options = {"gates": self.gates, "seed": self.args.seed, "states": states[:-1]}
                refine_exits(self.encoder, self.fit_texts, self.fit_targets, self.ladder, **options)
            if not self.pairs:
                dims = dims_of_last_exit(self.encoder, self.ladder)
                rotate_last_exit(self.encoder, states[-1], states[-1], dims, seed=self.args.seed)

    def _fit(self, targets: torch.Tensor | None) -> torch.Tensor:
        """Fit every exit; (N, texts, hidden), the states of the texts after the fit."""
        states = fit_exit_projections(self.encoder, self.fit_texts, targets=targets, keep_states=True)
        return cast(torch.Tensor, states)

    def _fit_to_teacher(self, teacher: TwoDMSEModel) -> torch.Tensor:
        """The projections map to the principal directions of the other teacher's embeddings."""
        teacher.to(self.args.device)  # type: ignore[arg-type]
        name = f"{self.model_args.teacher_model_name_or_path} {models.fingerprint(teacher)}"
        vectors = self._embed(teacher, name, self.texts_to_fit(teacher), None)
        self.directions = principal_directions(vectors.numpy(), self.encoder.config.hidden_size)
        self.fit_targets = (vectors.double() @ self.directions).float()
        states = self._fit(self.fit_targets)
        self._fill_targets(teacher, name)
        teacher.cpu()
        return states

    def _fill_targets(self, teacher: TwoDMSEModel, name: str) -> None:
        """The targets of the training texts, in the precision of training."""
        if self._trains:
            with torch.autocast(self.args.device.type, torch.bfloat16, enabled=self.args.bf16):
                texts = with_prompts(teacher, self.rows)
                vectors = self._embed(teacher, f"{name} {self.args.bf16}", texts, self.args.max_length)
            if self.directions is not None:
                vectors = (vectors.double() @ self.directions).float()
            self.targets.vectors[:, : vectors.shape[1]] = vectors.numpy()

    def _embed(self, teacher: TwoDMSEModel, name: str, texts: list[str], max_length: int | None) -> torch.Tensor:
        folder = str(self.args.output_dir)
        return torch.from_numpy(compute_teacher_embeddings(teacher, texts, folder, name, max_length=max_length))

    @property
    def _document_prompt(self) -> str:
        return self.encoder.config.prompts.get("document", "")

    def _draw_fit_rows(self) -> None:
        """Whole documents, as they will be embedded, and queries made from them, in random order."""
        documents = self.documents[: _FITTED * 2 // 3]
        queries = make_queries(documents, _FITTED // 3, self.args.seed + 1, self.max_words)
        rows = [("document", document.whole) for document in documents] + [("query", query) for query, _ in queries]
        order = random.Random(self.args.seed).sample(range(len(rows)), len(rows))
        self.fit_rows = [rows[place] for place in order]
        places = {place: new for new, place in enumerate(order)}
        self.fit_pairs = [(places[len(documents) + i], places[place]) for i, (_, place) in enumerate(queries)]

    def texts_to_fit(self, model: TwoDMSEModel | None = None) -> list[str]:
        """The texts that projections are fitted to, with the prompts of the encoder or of another model."""
        return with_prompts(model or self.encoder, self.fit_rows)

    def measure(self) -> dict:
        """The scores of every size of the ladder, in the form of results.json."""
        results = self.trainer.results(self.tasks, self.ladder, max_length=None) if self.tasks else {}
        if self.reference is not None:
            texts, prompt = self.held_texts, self._document_prompt
            results["agreement"] = agreement(self.encoder, texts, self.ladder, self.reference, prompt=prompt)
        return results

    def finish(self) -> None:
        """Fit the exits that were not trained again, save, measure, report, write the card."""
        trainer, encoder, folder = self.trainer, self.trainer.encoder, str(self.args.output_dir)
        others = sorted(set(range(1, encoder.num_layers + 1)) - {size.num_layers for size in self.ladder})
        with evaluation_mode(encoder):
            if self.pairs:
                options = {"gates": self.gates, "seed": self.args.seed, "pairs": self.fit_pairs}
                refine_trained(encoder, self.fit_texts, self.ladder, self.fit_targets, **options)
                if others:
                    fit_exit_projections(encoder, self.fit_texts, layers=others)
            trainer.save_model()
            results = {"model": folder, **self.measure(), "before": self.before}
            if trainer.is_world_process_zero():
                self._report(encoder, results)
        trainer.accelerator.wait_for_everyone()  # others may still read the teacher's vectors
        if trainer.is_world_process_zero():
            for name in os.listdir(folder):
                if fnmatch.fnmatchcase(name, output_dir.TEACHER):
                    shutil.rmtree(os.path.join(folder, name))
            finetuning.push(trainer)

    def _report(self, encoder: TwoDMSEModel, results: dict) -> None:
        folder = str(self.args.output_dir)
        sample = (self.held_texts or [document.whole for document in self.documents])[: finetuning.COST_ROWS]
        costs = measure_costs(encoder, self.ladder, sample)
        base = plots.public_name(self.model_args.model_name_or_path)
        written = results | {"base_model": base, "corpus": self._corpus(), "effort": self.data_args.effort}
        written["costs"] = costs
        output.write_json(os.path.join(folder, "results.json"), written)
        save_shares([written], os.path.join(folder, "shares.png"))
        names = [self.data_args.dataset_name] if self.data_args.dataset_name else []
        run = (self.trainer, encoder, self.model_args, self._settings(), results, costs, names, "elasticize")
        finetuning.save_card(*run, {PSEUDO_QUERIES: _PSEUDO_ROWS})
        print(report(results, costs, self.ladder))
        print(f"\nDone in {time.perf_counter() - self.started:.0f} s. Use it:\n")
        print(finetuning.usage(folder, results, self.ladder))

    def _corpus(self) -> str:
        return self.data_args.dataset_name or os.path.basename(os.path.normpath(str(self.data_args.corpus_file)))

    def _settings(self) -> dict[str, object]:
        """What the card says of the run."""
        settings: dict[str, object] = {"corpus": self._corpus(), "documents": len(self.documents)}
        settings |= {"effort": self.data_args.effort, "exit gates": self.encoder.exit_gates is not None}
        if self.teacher is not None:
            settings["teacher model"] = plots.public_name(str(self.model_args.teacher_model_name_or_path))
        return settings | (self.trainer.describe() if self.pairs else {})


def prepare(model_args: EncoderArguments, data_args: CorpusArguments, args: TwoDMSETrainingArguments) -> Work:
    """Read the corpus and the models, and check that they fit; ValueError for anything that cannot be made elastic."""
    batch, pairs = args.per_device_train_batch_size, data_args.num_pairs
    if data_args.effort != "fit" and pairs < batch:
        raise ValueError(
            f"num_pairs: {pairs} is fewer than one batch of {batch}; ask for more, or lower "
            "--per_device_train_batch_size"
        )
    # What is read fast comes first: a corpus may take long.
    encoder, teacher = load_encoder(model_args, args, data_args.effort), load_teacher(model_args)
    tasks = load_tasks(data_args)
    documents = read_documents(data_args, args.seed)
    check_read(encoder, documents[0], find_source(data_args)[0])
    return Work(model_args, data_args, args, encoder, teacher, documents, tasks)


def load_encoder(model_args: EncoderArguments, args: TwoDMSETrainingArguments, effort: str) -> TwoDMSEModel:
    """The encoder; without `--sizes`, its ladder is the model's own or the default one."""
    encoder = models.load_encoder(
        model_args.model_name_or_path, args.sizes, model_args.pooling, trust_remote_code=model_args.trust_remote_code
    )
    full = Size(encoder.num_layers, full_dim(encoder))
    if args.sizes is None and encoder.config.sizes is None:
        ladder = default_ladder(*full)
        output.say(f"sizes: {' '.join(map(str, ladder))}, the default for this encoder (--sizes)")
        args.sizes = list(map(str, ladder))
    flags = cli.recipe_flags(str(cli.RECIPES / f"elasticize-{effort}.yaml"))
    recipe = dict(itertools.pairwise(flags)).get("--max_length")
    models.check_training_length(args, encoder.max_length, recipe and int(recipe))
    sizes = args.sizes if args.sizes is not None else encoder.config.sizes
    largest = parse_ladder(sizes, *full)[-1]
    if largest != full:
        raise ValueError(f"sizes: the largest is {largest}, but every size learns from the full one; add {full}")
    if not args.exit_gates and encoder.is_gated:
        raise ValueError(
            f"exit_gates: false is not allowed for {model_args.model_name_or_path}: its last exit has a gate, without "
            "which the full size would be another one; use true"
        )
    if args.shallow_steps and min(parse_ladder(sizes)).num_layers > two_thirds(full.num_layers):
        output.say("no size has at most two thirds of the layers: every step trains all sizes (no --shallow_steps)")
        args.shallow_steps = 0.0
    return encoder


def load_teacher(model_args: EncoderArguments) -> TwoDMSEModel | None:
    """The other encoder to learn from, if one is named."""
    name = model_args.teacher_model_name_or_path
    trusted = model_args.trust_remote_code
    return name and models.load_encoder(name, argument="teacher_model_name_or_path", trust_remote_code=trusted)


def load_tasks(data_args: CorpusArguments) -> list[StsData | RetrievalData]:
    """What the flags name to be scored before and after."""
    paths = list(data_args.beir_dirs or [])
    tasks: list[StsData | RetrievalData] = [load_beir(folder) for folder in paths]
    if data_args.eval_file is not None:
        paths.append(data_args.eval_file)
        name = os.path.basename(data_args.eval_file).split(".")[0]
        table = check_table(read_table(data_args.eval_file, "eval_file"), "eval_file")
        if "score" in table.column_names:
            check_varied(table, f"eval_file: {data_args.eval_file}")
        tasks.append(task_from_table(name, table))
    return name_apart(tasks, paths, taken=[PSEUDO_QUERIES])


def with_prompts(model: TwoDMSEModel, rows: Iterable[tuple[str, str]]) -> list[str]:
    """The texts of rows (`query` or `document`, text), with the model's prompts before them."""
    return [model.config.prompts.get(role, "") + text for role, text in rows]


def pair_table(pairs: list[tuple[str, str]]) -> Dataset:
    """The pairs as a table to train on, with the columns anchor and positive."""
    return Dataset.from_dict({"anchor": [query for query, _ in pairs], "positive": [passage for _, passage in pairs]})


def report(results: dict, costs: dict, ladder: list[Size]) -> str:
    """The tables before and after, and what a size costs."""
    tables = []
    for title, scores in _columns(results).items():
        before, after = scores
        full = before[str(ladder[-1])]
        columns = {"before": before, "after": after}
        if full > 0:
            columns["share of full"] = {size: after[size] / full for size in after}
        columns["encode time"] = {size: cost["relative_time"] for size, cost in costs.items()}
        columns["bytes"] = {str(size): 4 * size.dim for size in ladder}
        tables.append(f"\n{title}\n\n{output.score_table(columns, ladder, 'size')}")
    return "\n".join(tables)


def _columns(results: dict) -> dict[str, tuple[dict, dict]]:
    """The scores of each size before and after, by the title of their table."""
    found, before = {}, results["before"]
    if "agreement" in results:
        count = results["agreement"]["n"]
        nearest = f"Share of the {count_neighbours(count)} nearest"
        for key, what in (("overlap@10", nearest), ("spearman", "Spearman of the similarities")):
            title = f"{what}, compared with the encoder as it was, {count} held-out documents"
            found[title] = (before["agreement"][key], results["agreement"][key])
    for kind, metric, shown in (("retrieval", "ndcg@10", "nDCG@10"), ("sts", "spearman", "Spearman")):
        for name, task in results.get(kind, {}).items():
            rows = task.get("n_queries", task.get("n"))
            what = "queries" if kind == "retrieval" else "pairs"
            found[f"{shown}, {name}, {rows} {what}"] = (before[kind][name][metric], task[metric])
    return found
