"""What scripts show on the screen: hints for typing errors, switches, tables, and bars."""

import dataclasses
import importlib
import pkgutil
import typing

import pytest

import run_scripts
from modeling_2dmse import parse_ladder
from run_scripts import finetune
from run_scripts.shared import cli
from trainer.evaluation import best_for_cost
from twodmse import __main__ as console

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
        (["--zzz"], "--zzz is unknown; --help lists the flags"),
    ],
)
def test_a_typing_error_in_a_flag(argv, message, capsys):
    assert refusal(finetune.main, argv, capsys).endswith(f"error: flags: {message}")


def test_a_value_without_a_flag(capsys):
    line = refusal(finetune.main, ["--model_name_or_path", "m", "stray"], capsys)
    assert line.endswith("error: flags: stray belongs to no flag; --help lists the flags")


def test_a_typing_error_in_a_recipe_and_in_a_command(tmp_path, capsys, monkeypatch):
    (tmp_path / "recipe.yaml").write_text("model_name_or_path: m\nlerning_rate: 1\n")
    line = refusal(finetune.main, [str(tmp_path / "recipe.yaml")], capsys)
    assert line.endswith("--lerning_rate is unknown; did you mean --learning_rate?")
    monkeypatch.setattr("sys.argv", ["twodmse", "finetun"])
    assert "finetun is unknown; did you mean finetune?" in refusal(lambda _: console.main(), [], capsys)


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
