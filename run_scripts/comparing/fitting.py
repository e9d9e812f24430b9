"""Models whose exits are fitted in closed form: two methods without training, and the start of separate models."""

import torch
from datasets import Dataset

from modeling_2dmse import TwoDMSEModel, parse_ladder
from run_scripts import finetune
from run_scripts.shared import cli, models
from run_scripts.training import finetuning
from trainer import TwoDMSETrainer, TwoDMSETrainingArguments
from trainer.data import UNLABELED, query_document_prompts, text_columns, texts_to_fit
from trainer.exits import refine_exits
from trainer.preparation import prepare_rows, set_comparison
from trainer.projections import fit_exit_projections
from trainer.teacher_embeddings import TeacherEmbeddings
from trainer.unlabeled import read_unlabeled_texts

from .methods import GATES, PCA, PROJECTIONS, Budget, Unit

# A run of the comparison is evaluated afterwards, on all tasks at once.
QUIET = ("--max_eval_samples", "0", "--eval_strategy", "no", "--save_strategy", "no", "--disable_tqdm", "true")
QUIET += ("--report_to", "none")
# Texts whose states of all layers are in memory at once.
_PIECE = 2048


def fit(method: str, recipe: str, seed: int, budget: Budget, folder: str, unlabeled_file: str | None = None) -> None:
    """
    Write the encoder of a recipe with new exit projections, fitted as its training would fit them, or to PCA.

    Args:
        method: `pca` for `fit_principal_components`, `projections` for `fit_exit_projections`,
            `projections-refined` for both this and `refine_exit_projections`, and `projections-gates` for this and
            `fit_exit_gates`, which is what `elasticize --effort fit` does.
        recipe: of finetune.py.
        seed: draws the rows and the texts, as in a run of finetune.py.
        unlabeled_file: further texts, as for finetune.py.
    """
    model_args, _, args = _arguments(recipe, seed, budget)
    encoder = models.to_device(finetuning.load_model(model_args, args))
    set_comparison(encoder, args)
    texts = _training_texts(encoder, recipe, seed, budget, unlabeled_file)
    if method == PCA:
        fit_principal_components(encoder, texts, **_encoding(args))
    else:
        states = fit_exit_projections(encoder, texts, keep_states=method != PROJECTIONS, **_encoding(args))
        if states is not None:
            options = {"gates": method == GATES, "seed": seed, "states": states[:-1], "max_length": args.max_length}
            refine_exits(encoder, texts, states[-1], parse_ladder(args.sizes), **options)
    encoder.save_pretrained(folder)


def _training_texts(
    encoder: TwoDMSEModel, recipe: str, seed: int, budget: Budget, unlabeled_file: str | None
) -> list[str]:
    """The texts that a run of finetune.py would fit projections to."""
    _, data, args = _arguments(recipe, seed, budget)
    tables, _ = finetuning.load_tables(data, args)
    unlabeled = unlabeled_file and read_unlabeled_texts(unlabeled_file, sum(map(len, tables)), seed + 1)
    rows = prepare_rows(tables, args, encoder.config.ladder, unlabeled)
    return texts_to_fit(tables, rows, seed, encoder.config.prompts)


def _encoding(args: TwoDMSETrainingArguments) -> dict:
    return {
        "max_length": args.max_length,
        "batch_size": args.per_device_eval_batch_size,
        "show_progress_bar": False,
    }


@torch.no_grad()
def fit_principal_components(encoder: TwoDMSEModel, texts: list[str], **encode) -> None:
    """
    Give each exit the principal components of its own pooled states on texts, strongest first.

    They are the eigenvectors of the covariance of the states. The mean is not subtracted from what is embedded: an
    exit's projection has no bias.

    Args:
        encoder: is changed in place.
        texts: some thousands.
        **encode: of `TwoDMSEModel.encode_states`.
    """
    encoder.add_exit_projections()
    shape = (encoder.num_layers, encoder.config.hidden_size, encoder.config.hidden_size)
    grams, sums = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape[:2], dtype=torch.float64)
    for start in range(0, len(texts), _PIECE):
        states = encoder.encode_states(texts[start : start + _PIECE], **encode).double().cpu()
        grams += states.mT @ states
        sums += states.sum(dim=1)
    means = sums / len(texts)
    for projection, gram, mean in zip(encoder.exit_projections, grams, means, strict=True):
        covariance = gram / len(texts) - torch.outer(mean, mean)
        directions = torch.linalg.eigh(covariance)[1].flip(1)
        projection.weight.copy_(directions.T @ projection.weight.double().cpu())


def write_start(seed: int, budget: Budget, folder: str) -> None:
    """Write the full model from which `best` starts with a seed: it is fitted, if the recipe has projections.

    If the recipe has gates and another teacher than the start, it has gates as well: see `train_same_recipe`.
    """
    model_args, _, args = _arguments(budget.best_recipe, seed, budget)
    if args.exit_projections:
        method = GATES if args.exit_gates and args.teacher != "start" else PROJECTIONS
        fit(method, budget.best_recipe, seed, budget, folder, budget.unlabeled_file)
    else:
        finetuning.load_model(model_args, args).save_pretrained(folder)


def train_same_recipe(unit: Unit, rate: float, seed: int, budget: Budget, folder: str, start: str) -> None:
    """
    Train one size alone with everything that `best` has.

    The model is `start`, cut to the size: its projection is fitted to the embeddings of the full size. If the recipe's
    teacher is the start, the size learns the similarities of the whole embeddings of `start`, on texts without labels
    too, and if the recipe refines projections or adds gates, the exit of a small size is refined as well. If it is the
    largest size of the step, there is no teacher, and nothing to refine a small size towards. Then a gate of the recipe
    is fitted before training, and trained with the rest.

    Args:
        start: folder of the model that `write_start` writes.
    """
    model_args, _, args = _arguments(budget.best_recipe, seed, budget)
    flags = [budget.best_recipe, *budget.data_flags, *QUIET, *budget.flags, "--learning_rate", str(rate)]
    flags += ["--seed", str(seed), "--objective", "separate", "--sizes", unit.size, "--model_name_or_path", start]
    # Refused: the only exit of this model is its last one.
    flags += ["--refine_projections", "false", "--exit_gates", "false"]
    if args.teacher != "start":
        finetune.main([*flags, "--alignment", "none", "--embedding_weight", "0", "--output_dir", folder])
        return
    if budget.unlabeled_file is not None:
        flags += ["--unlabeled_file", budget.unlabeled_file]

    def make_trainer(**given) -> TwoDMSETrainer:
        full = models.to_device(models.load_encoder(start, trust_remote_code=model_args.trust_remote_code))
        teacher = _teacher(full, given["model"], given["args"], given["train_dataset"], given["unlabeled_texts"])
        return TwoDMSETrainer(**given, teacher_embeddings=teacher)

    finetune.main([*flags, "--teacher", "embeddings", "--output_dir", folder], make_trainer)
    if args.refine_projections or args.exit_gates:
        _refine_separate(folder, start, seed, budget)


def _refine_separate(folder: str, start: str, seed: int, budget: Budget) -> None:
    """Refine the exit of a separate model in its folder towards the start, with a gate if the recipe has gates.

    Without gates, only models of at most a third of the layers: on stsb-dev it does not help deeper ones
    (docs/lab-notes.md). The full size is left as it is.
    """
    model_args, _, args = _arguments(budget.best_recipe, seed, budget)
    trusted = model_args.trust_remote_code
    full, small = (models.to_device(models.load_encoder(path, trust_remote_code=trusted)) for path in (start, folder))
    if small.num_layers == full.num_layers or (3 * small.num_layers > full.num_layers and not args.exit_gates):
        return
    texts = _training_texts(small, budget.best_recipe, seed, budget, budget.unlabeled_file)
    targets = full.encode_states(texts, [full.num_layers], **_encoding(args))[0]
    options = {"gates": args.exit_gates, "seed": seed, "layers": [small.num_layers]}
    refine_exits(small, texts, targets, small.config.ladder, **options, **_encoding(args))
    small.save_pretrained(folder)


def _teacher(
    full: TwoDMSEModel,
    model: TwoDMSEModel,
    args: TwoDMSETrainingArguments,
    tables: list[Dataset],
    unlabeled: list[str] | None,
) -> TeacherEmbeddings:
    """The embeddings of all texts that `model` is trained on, at the full size of the start."""
    set_comparison(model, args)
    columns = text_columns(tables[0])
    prompts = query_document_prompts([*columns, UNLABELED], model.config.prompts)
    pairs = [(name, text) for table in tables for name in text_columns(table) for text in table[name] if text]
    pairs += [(UNLABELED, text) for text in unlabeled or []]
    texts = list(dict.fromkeys(prompts.get(name, "") + text for name, text in pairs))
    options = {"max_length": args.max_length, "dim": full.config.hidden_size, "show_progress_bar": False}
    return TeacherEmbeddings(texts, full.encode(texts, prompt="", **options))


def _arguments(recipe: str, seed: int, budget: Budget):
    """The arguments of finetune.py in a recipe under the shared budget."""
    flags = [recipe, *budget.data_flags, *QUIET, *budget.flags, "--seed", str(seed), "--output_dir", "unused"]
    return cli.Parser(finetune.ARGUMENTS).parse(flags)
