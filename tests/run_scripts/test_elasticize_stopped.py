"""elasticize.py stopped by Ctrl-C or SIGTERM: at every moment the last line names what works, and nothing is lost."""

import os
import re
import signal

import pytest
import torch
from test_elasticize import TEXTS, start, stop_in_training, weights  # noqa: F401

from modeling_2dmse import TwoDMSEModel
from run_scripts.shared import output_dir
from run_scripts.training import elasticizing, finetuning

RESUME, OVERWRITE = {"resume_from_checkpoint": "true"}, {"overwrite": "true"}


def half_saved(save):
    """Ctrl-C when half of the weights are written."""

    def stop(model, folder, *args, **more):
        save(model, folder, *args, **more)
        path = os.path.join(folder, "model.safetensors")
        os.truncate(path, os.path.getsize(path) // 2)
        raise KeyboardInterrupt

    return stop


def nth(number):
    """Ctrl-C in the call of this number, from 1."""

    def wrap(function):
        calls = []

        def stop(*args, **more):
            calls.append(None)
            if len(calls) == number:
                raise KeyboardInterrupt
            return function(*args, **more)

        return stop

    return wrap


# What is interrupted, how, and what works afterwards with `fit` and with `short`.
STAGES = {
    "reading": (elasticizing, "read_documents", nth(1), {}, {}),
    "measuring before": (elasticizing.Work, "measure", nth(1), RESUME, RESUME),
    "fitting": (elasticizing, "fit_exit_projections", nth(1), RESUME, RESUME),
    "refining": (elasticizing, "refine_exits", nth(1), RESUME, None),
    "refining again": (elasticizing, "refine_trained", nth(1), None, RESUME),
    "saving": (TwoDMSEModel, "save_pretrained", half_saved, OVERWRITE, None),
    "measuring after": (elasticizing.Work, "measure", nth(2), OVERWRITE, RESUME),
    "pictures": (elasticizing, "save_shares", nth(1), OVERWRITE, None),
    "card": (finetuning, "save_card", nth(1), OVERWRITE, RESUME),
}
CASES = [(name, effort) for name in STAGES for effort, way in zip(("fit", "short"), STAGES[name][3:], strict=True)
         if way is not None]  # fmt: skip


def way_on(line: str) -> dict[str, str]:
    """The flags that a line names."""
    found = re.fullmatch(r"run the same command with --(\w+)( true)? to (resume|start again)", line)
    return {} if line == "nothing was written" else {found[1]: "true"}


def interrupted(run, place, name, wrap, monkeypatch) -> str:
    with monkeypatch.context() as patch:
        patch.setattr(place, name, wrap(getattr(place, name)))
        with pytest.raises(KeyboardInterrupt) as stopped:
            run()
    return str(stopped.value)


@pytest.fixture(scope="module")
def whole():
    """The weights of a run of each effort that was not stopped."""
    return {}


@pytest.mark.parametrize(("stage", "effort"), CASES)
def test_the_way_that_the_last_line_names_works(stage, effort, start, whole, tmp_path, monkeypatch):  # noqa: F811
    if effort not in whole:
        whole[effort] = weights(start.run(effort=effort, output_dir=tmp_path / "whole"))
    place, name, wrap, *ways = STAGES[stage]
    line = interrupted(lambda: start.run(effort=effort), place, name, wrap, monkeypatch)
    assert way_on(line) == ways[effort == "short"]
    assert (tmp_path / "out").exists() == bool(way_on(line))
    found = weights(start.run(effort=effort, **way_on(line)))
    assert found.keys() == whole[effort].keys()
    assert all(torch.equal(value, whole[effort][key]) for key, value in found.items())
    assert {path.name for path in tmp_path.iterdir() if "out" in path.name} == {"out"}


def test_an_earlier_run_survives_every_stop(start, tmp_path, monkeypatch):  # noqa: F811
    folder = start.run(effort="fit", seed=3)
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    place, name, wrap, *_ = STAGES["saving"]
    line = interrupted(lambda: start.run(effort="fit", **OVERWRITE), place, name, wrap, monkeypatch)
    assert line == "run the same command with --overwrite to start again"
    start.run(effort="fit", **OVERWRITE)
    (previous,) = tmp_path.glob("out.previous-*")
    assert {path.name: path.read_bytes() for path in previous.iterdir() if path.is_file()} == before


def test_a_run_that_was_started_again_does_not_name_both_flags(start, monkeypatch):  # noqa: F811
    place, name, wrap, *_ = STAGES["saving"]
    line = interrupted(lambda: start.run(effort="fit", **RESUME), place, name, wrap, monkeypatch)
    assert line == "run the same command with --overwrite instead of --resume_from_checkpoint to start again"
    start.run(effort="fit", **OVERWRITE)


def test_a_run_from_the_checkpoint_of_another_folder_names_it(start, tmp_path, monkeypatch):  # noqa: F811
    checkpoint = next(start.run().glob("checkpoint-*"))
    more = {"resume_from_checkpoint": checkpoint, "output_dir": tmp_path / "other", "save_strategy": "no"}
    place, name, wrap, *_ = STAGES["saving"]
    line = interrupted(lambda: start.run(**more), place, name, wrap, monkeypatch)
    assert line == f"run the same command again to resume from {checkpoint}"
    start.run(**more)


@pytest.mark.parametrize("more", [{}, {"save_strategy": "no"}, {"save_only_model": "true"}])
def test_a_signal_during_training_names_what_works(more, start, monkeypatch, capsys):  # noqa: F811
    stop_in_training(start, signal.SIGTERM, monkeypatch, **more)
    line = capsys.readouterr().out.splitlines()[-1].removeprefix("Stopped by SIGTERM after step 2; ")
    assert way_on(line) == (OVERWRITE if "save_only_model" in more else RESUME)
    start.run(**more, **way_on(line))


@pytest.mark.parametrize("changed", ["a text", "a prompt", "the encoder", "an earlier version"])
def test_a_run_does_not_resume_from_another_start(changed, start, tmp_path, monkeypatch, capsys):  # noqa: F811
    stop_in_training(start, signal.SIGINT, monkeypatch)
    flags, marker = {"resume_from_checkpoint": "true"}, tmp_path / "out" / output_dir.MARKER
    if changed == "a text":
        (tmp_path / "corpus.txt").write_text("\n".join([*TEXTS[1:], "a text that was not there"]))
    elif changed == "a prompt":
        flags["query_prompt"] = "a question: "
    elif changed == "the encoder":
        model = TwoDMSEModel.from_backbone(start.model)
        model.backbone.embeddings.word_embeddings.weight.data[9, 0] += 1
        model.save_pretrained(tmp_path / "moved")
        flags["model_name_or_path"] = tmp_path / "moved"
    else:
        output_dir.mark(str(marker.parent), "elasticize.py")
    before = marker.read_text()
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        start.run(**flags)
    *_, line = capsys.readouterr().err.splitlines()
    assert "error: resume_from_checkpoint: " in line
    assert "is of a run with another encoder or other texts" in line
    assert marker.read_text() == before
    start.run(**flags | {"resume_from_checkpoint": None, "overwrite": "true"})
