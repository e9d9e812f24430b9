"""What scripts show on the screen: hints for typing errors, switches, tables, and bars."""

import dataclasses
import importlib
import logging
import pkgutil
import typing
import warnings
from types import SimpleNamespace

import pytest
import torch
from conftest import SENTENCES
from transformers import TrainerState
from transformers.utils import logging as transformers_logging

import run_scripts
from modeling_2dmse import Size, parse_ladder
from retrieval import planning
from run_scripts import encode, export, finetune
from run_scripts.shared import cli, screen
from run_scripts.shared.early import find_kinds, find_options
from run_scripts.shared.output import score_table
from trainer.evaluation import best_for_cost
from trainer.shared.arguments import BaseTrainingArguments
from twodmse import __main__ as console
from twodmse import __version__

SCRIPTS = [module.name for module in pkgutil.iter_modules(run_scripts.__path__) if not module.ispkg]


def refusal(main, argv, capsys) -> str:
    with pytest.raises(SystemExit) as ended:
        main(argv)
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--learnin_rate", "1"], "--learnin_rate is unknown; did you mean --learning_rate?"),
        (["--learning-rat=1"], "--learning-rat is unknown; did you mean --learning_rate?"),
        (["-learning_rate", "1"], "-learning_rate is unknown; did you mean --learning_rate?"),
        (["--model_nam_or_path", "m"], "--model_nam_or_path is unknown; did you mean --model_name_or_path?"),
        (["--model", "m"], "--model is unknown; did you mean --model_name_or_path?"),
        (["--size", "2x64"], "--size is unknown; did you mean --sizes?"),
        (["--lr=1"], "--lr is unknown; did you mean --learning_rate?"),
        (["--device_train_batch", "1"], "--device_train_batch is unknown; did you mean --per_device_train_batch_size?"),
        (["--columnss", "a"], "--columnss is unknown; did you mean --columns?"),
        (["--guide", "a"], "--guide is unknown; did you mean --guide_model_name_or_path?"),
        (
            ["--train", "a"],
            "--train is unknown; did you mean --train_file or --train_split or --train_sampling_strategy?",
        ),
        (["--eval", "a"], "--eval is unknown; --help lists the flags"),
        (["--hepl"], "--hepl is unknown; did you mean --help?"),
        (["--zzz"], "--zzz is unknown; --help lists the flags"),
        (["--overwrite_output_dir"], "--overwrite_output_dir is unknown; --help lists the flags"),
    ],
)
def test_a_typing_error_in_a_flag(argv, message, capsys):
    assert refusal(finetune.main, argv, capsys).endswith(f"error: flags: {message}")


def test_a_flag_is_not_taken_for_its_negation():
    options = find_options(find_kinds("finetune"))
    for flag, message in (("--overwrite_output_dir", "--help lists"), ("--no_bf_16", "did you mean --no_bf16")):
        with pytest.raises(ValueError, match=message):
            cli.refuse_unknown([flag], options)


def test_the_version_and_what_others_call_a_size(capsys, monkeypatch):
    for word in ("--version", "-V"):
        monkeypatch.setattr("sys.argv", ["twodmse", word])
        console.main()
        assert capsys.readouterr().out == f"twodmse {__version__}\n"
    line = refusal(export.main, ["--model_name_or_path", "m", "--size", "1x8"], capsys)
    assert line.endswith("--size is unknown; did you mean --num_layers?")


def test_a_word_that_is_no_flag_and_no_recipe(capsys):
    line = refusal(export.main, ["emb", "idx"], capsys)
    assert line.endswith("emb is not a file; the first word is a recipe (YAML), and everything else is --flag value")


def test_whole_numbers_in_a_table_of_scores():
    assert score_table({"bytes": {"1x8": 32}, "score": {"1x8": 0.5}}, [Size(1, 8)], "size").split()[3:] == [
        *("1x8", "32", "0.5000"),
    ]


def test_a_value_without_a_flag(capsys):
    line = refusal(finetune.main, ["--model_name_or_path", "m", "stray"], capsys)
    assert line.endswith("error: flags: stray belongs to no flag; --help lists the flags")


def test_a_typing_error_in_a_recipe_and_in_a_command(tmp_path, capsys, monkeypatch):
    (tmp_path / "recipe.yaml").write_text("model_name_or_path: m\nlerning_rate: 1\n")
    line = refusal(finetune.main, [str(tmp_path / "recipe.yaml")], capsys)
    assert line.endswith("--lerning_rate is unknown; did you mean --learning_rate?")
    for word, meant in (("finetun", "finetune"), ("--hepl", "--help"), ("help", "--help"), ("mine", "mine_negatives")):
        monkeypatch.setattr("sys.argv", ["twodmse", word])
        assert f"{word} is unknown; did you mean {meant}?" in refusal(lambda _: console.main(), [], capsys)


def argument_classes():
    """Every dataclass of flags that a script defines or uses."""
    for name in SCRIPTS:
        module = importlib.import_module(f"run_scripts.{name}")
        for thing in vars(module).values():
            if isinstance(thing, type) and dataclasses.is_dataclass(thing):
                yield thing


def test_every_switch_works_bare():
    seen = 0
    for kind in set(argument_classes()):
        parser = cli.Parser((kind,))
        required = [word for action in parser._actions if action.required for word in (action.option_strings[0], "1")]
        types = typing.get_type_hints(kind)
        for field in dataclasses.fields(kind):
            if field.init and types[field.name] in (bool, bool | None):
                values, rest = parser.parse_known_args([*required, f"--{field.name}"])
                assert (getattr(values, field.name), rest) == (True, []), field.name
                seen += 1
    assert seen > 30


def test_resume_from_checkpoint_works_bare():
    parser = cli.Parser(finetune.ARGUMENTS)
    values, _ = parser.parse_known_args(["--model_name_or_path", "m", "--resume_from_checkpoint", "--seed", "3"])
    assert (values.resume_from_checkpoint, values.seed) == ("true", 3)


def test_the_best_size_for_its_cost():
    ladder = parse_ladder(["1x8", "2x16", "4x32"])
    for scores, best in (((0.9, 0.949, 1.0), 2), ((0.9, 0.951, 1.0), 1), ((1.0, 0.9, 0.9), 0), ((-0.5, -0.9, -1), 0)):
        results = {"sts": {"a": {"spearman": dict(zip(map(str, ladder), scores, strict=True))}}}
        assert best_for_cost(results, ladder) == ladder[best]
    assert best_for_cost({}, ladder) == ladder[1]


class Bar(list):
    """A bar that notes what it is told."""

    n = 0

    def update(self, count=1):
        self.append(count)

    def close(self):
        pass


def test_the_bar_of_encode_moves_with_every_batch(tiny_model, tmp_path, monkeypatch):
    bars = []

    def make_bar(**kwargs):
        bars.append((Bar(), kwargs))
        return bars[-1][0]

    monkeypatch.setattr("accelerate.utils.tqdm", make_bar)
    tiny_model().save_pretrained(tmp_path / "model")
    (tmp_path / "texts.txt").write_text("\n".join(SENTENCES))
    flags = ["--model_name_or_path", str(tmp_path / "model"), "--input", str(tmp_path / "texts.txt")]
    flags += ["--output_dir", str(tmp_path / "out"), "--shard_size", "15", "--batch_size", "4"]
    encode.main(flags)
    encode.main(flags)
    (first, settings), (second, _) = bars
    assert (settings["total"], settings["unit"]) == (20, "text")
    assert sum(first) == 20
    assert len(first) >= 4, "more often than once per shard"
    assert second == [15, 5], "finished shards are counted as a whole"


def test_the_bar_of_plan(tiny_model, monkeypatch):
    bars = []
    monkeypatch.setattr(planning, "tqdm", lambda **kwargs: bars.append((Bar(), kwargs)) or bars[-1][0])
    planning.plan(tiny_model(), [(1, 8), (1, 32), (2, 8)], SENTENCES[:4], runs=1)
    ((bar, settings),) = bars
    assert settings["total"] == sum(bar) == 2 * 2 * 8
    assert settings["disable"] is None


def test_lines_warnings_and_bars_of_other_libraries(capsys, monkeypatch):
    monkeypatch.setattr(transformers_logging, "_tqdm_active", True)  # off for scripts without a terminal
    screen.hide_noise()
    screen.hide_noise()
    records = [
        logging.LogRecord("transformers.trainer_utils", logging.WARNING, "f", 1, text, None, None)
        for text in ("The tokenizer has new PAD/BOS/EOS tokens that differ from the model config and more", "Another")
    ]
    logger = logging.getLogger("transformers.trainer_utils")
    assert [bool(logger.filter(record)) for record in records] == [False, True]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        screen.hide_noise()
        warnings.warn("'pin_memory' argument is set as true but no accelerator is found, then", stacklevel=1)
        warnings.warn("another", stacklevel=1)
    assert [str(warning.message) for warning in caught] == ["another"]
    for items, desc in ((range(1), "Writing model shards"), (range(70), "Loading weights"), (range(2), "Mine")):
        list(transformers_logging.tqdm(items, desc=desc))
    shown = capsys.readouterr().err
    assert "Writing" not in shown
    assert "Loading" not in shown
    assert "Mine" in shown


@pytest.mark.parametrize(
    ("flags", "shown"),
    [
        ({"logging_steps": 500, "eval_steps": 0.25}, False),
        ({"logging_steps": 500, "eval_steps": 5}, True),
        ({"per_device_train_batch_size": 9}, True),
    ],
)
def test_a_resumed_run_with_the_same_flags_is_not_warned_about_them(flags, shown, monkeypatch):
    from transformers import trainer_utils

    screen.hide_noise()
    state = TrainerState(logging_steps=2, eval_steps=4, train_batch_size=8)
    same = {"logging_steps": 2, "eval_steps": 4, "per_device_train_batch_size": 8, "n_gpu": 1}
    args, written = SimpleNamespace(**same | flags), []
    monkeypatch.setattr(trainer_utils.logger, "callHandlers", written.append)
    trainer_utils.compare_trainer_and_checkpoint_args(args, state)
    assert bool(written) == shown


def test_scripts_hide_noise_when_they_have_read_their_flags(monkeypatch):
    calls = []
    monkeypatch.setattr(screen, "hide_noise", lambda: calls.append(1))
    parser = cli.Parser((encode.EncodeArguments,))
    assert calls == []
    parser.parse(["--model_name_or_path", "m", "--input", "x", "--output_dir", "o"])
    assert calls == [1]


def test_memory_is_not_pinned_without_a_gpu(tmp_path):
    for on_cpu in (True, False):
        args = BaseTrainingArguments(str(tmp_path), use_cpu=on_cpu, bf16=False)
        assert args.dataloader_pin_memory == (torch.accelerator.is_available() and not on_cpu)
