"""What `--help` of a script shows: flags in groups, each with one spelling, its kind of value and its default."""

import argparse
import dataclasses

# The groups of a training script's help and the flags in them. Other flags of the project are in the group of their
# dataclass (`_argument_group_name`). A flag of transformers is shown if it is named here and either has a text below or
# is redefined by the project; --help_all shows the others.
GROUPS = {
    "model": (),
    "data": ("max_length", "max_query_length", "query_prompt", "document_prompt", "batch_sampler", "mixing"),
    "objective": ("loss_weights", "loss_reduction"),
    "recipe": (
        "learning_rate",
        "lr_scheduler_type",
        "warmup_steps",
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "num_train_epochs",
        "max_steps",
        "weight_decay",
        "max_grad_norm",
        "dropout",
        "num_buckets",
        "gradient_cache_chunk_size",
        "bf16",
        "seed",
        "use_cpu",
    ),
    "evaluation": (
        "eval_file",
        "eval_split",
        "max_eval_samples",
        "eval_strategy",
        "eval_steps",
        "per_device_eval_batch_size",
        "load_best_model_at_end",
        "metric_for_best_model",
        "greater_is_better",
    ),
    "output": (
        "output_dir",
        "overwrite",
        "resume_from_checkpoint",
        "save_strategy",
        "save_steps",
        "save_total_limit",
        "logging_steps",
        "report_to",
        "license",
    ),
}
OTHERS = "transformers.TrainingArguments"

# Flags of transformers that every training needs; its own texts are longer, or about another script.
TEXTS = {
    "learning_rate": "Peak learning rate.",
    "lr_scheduler_type": "Schedule of the learning rate: linear, cosine, constant, ...",
    "per_device_train_batch_size": "Examples per step and process.",
    "gradient_accumulation_steps": "Batches per optimizer step and process.",
    "num_train_epochs": "Passes over the training data.",
    "max_steps": "Optimizer steps; overrides num_train_epochs if above 0.",
    "weight_decay": "Weight decay, of all weights but biases and norms.",
    "max_grad_norm": "Norm that gradients are clipped to; 0 for no clipping.",
    "seed": "Seed of everything that is random.",
    "use_cpu": "Train on the CPU even if there is a GPU.",
    "per_device_eval_batch_size": "Examples per batch in evaluations.",
    "output_dir": "Folder of the run: model, checkpoints and results. Default: trainer_output.",
    "resume_from_checkpoint": "Checkpoint to resume from; true: the newest complete one in output_dir.",
    "save_strategy": "When to save a checkpoint: no, steps, epoch or best.",
    "save_total_limit": "Number of checkpoints to keep, the newest ones. Default: all.",
    "logging_steps": "Optimizer steps between lines of the log; below 1, a fraction of all steps.",
    "report_to": "Where the log goes, for example tensorboard or wandb.",
}
# The kind of value, by the type of a flag or by the last word of its name.
_TYPES = {"int": "N", "float": "X", "string_to_bool": "true|false", "dict": "JSON"}
_WORDS = ("checkpoint", "column", "dir", "dirs", "file", "files", "path", "size", "sizes", "split")
# Longest list of choices that is shown as {a,b,...}.
_CHOICES = 40


class Formatter(argparse.HelpFormatter):
    """argparse's own layout; of the spellings of a flag, only the first is shown."""

    def _format_action_invocation(self, action):
        if action.nargs == 0:
            return ", ".join(action.option_strings)
        return f"{action.option_strings[0]} {self._format_args(action, action.dest.upper())}"


def transformers_flags(dataclass_types) -> dict[str, dataclasses.Field]:
    """The flags of TrainingArguments, if a dataclass is a subclass of it. Does not import it."""
    bases = [base for kind in dataclass_types for base in kind.__mro__]
    fields: dict[str, dataclasses.Field] = {}
    for base in bases:
        if base.__module__ == "transformers.training_args" and dataclasses.is_dataclass(base):
            fields |= base.__dataclass_fields__
    return fields


def clean(parser) -> None:
    """Give each flag of a `cli.Parser` a readable kind of value, and its default as it would be typed."""
    fields = {field.name: field for kind in parser.dataclass_types for field in dataclasses.fields(kind)}
    for action in parser._actions:
        if action.const is False:  # --no_flag, which is the same as --flag false
            action.help = argparse.SUPPRESS
        if action.help == argparse.SUPPRESS or action.dest in ("help", "help_all"):
            continue
        redefined = fields[action.dest] is not parser.transformers_flags.get(action.dest)
        text = (None if redefined else TEXTS.get(action.dest)) or action.help or ""
        if action.required:
            text += " (required)"
        elif action.default is not None and "default" not in text.lower():
            text += f" (default: {_typed(action.default)})".replace("%", "%%")
        action.help, action.metavar = text, action.metavar or _metavar(action)


def sections(parser) -> dict[str, list[argparse.Action]]:
    """The flags of a `cli.Parser` that its help shows, under their titles."""
    actions = {action.dest: action for action in parser._actions if action.help != argparse.SUPPRESS}
    helps = [actions.pop(name) for name in ("help", "help_all") if name in actions]
    theirs = parser.transformers_flags
    if not theirs:
        return {"flags": [*actions.values(), *helps]}
    groups = {name: group for group, names in GROUPS.items() for name in names}
    found: dict[str, list[argparse.Action]] = {title: [] for title in (*GROUPS, OTHERS)}
    for kind in parser.dataclass_types:
        for field in dataclasses.fields(kind):
            if field.name not in actions:
                continue
            unnamed = OTHERS if field.name in theirs else getattr(kind, "_argument_group_name", "objective")
            title = groups.get(field.name, unnamed)
            if field is theirs.get(field.name) and field.name not in TEXTS:
                title = OTHERS
            found[title].append(actions[field.name])
    for title, names in GROUPS.items():
        found[title].sort(key=lambda action, names=names: names.index(action.dest) if action.dest in names else -1)
    if not parser.shows_all:
        del found[OTHERS]
    return {title: group for title, group in found.items() if group} | {"help": helps}


def _metavar(action: argparse.Action) -> str:
    if action.choices is not None:
        listed = "{" + ",".join(map(str, action.choices)) + "}"
        return listed if len(listed) <= _CHOICES else "NAME"
    kind, word = getattr(action.type, "__name__", ""), action.dest.rpartition("_")[2]
    if kind in _TYPES:
        return _TYPES[kind]
    return word.removesuffix("s").upper() if word in _WORDS else "NAME" if kind == "str" else "VALUE"


def _typed(value) -> str:
    """A value as it is typed on the command line."""
    if isinstance(value, (list, tuple)):
        return " ".join(map(_typed, value))
    if isinstance(value, bool):
        return str(value).lower()
    return str(getattr(value, "value", value))
