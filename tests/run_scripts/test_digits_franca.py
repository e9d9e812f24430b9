"""Nesting on scikit-learn's digits: the parts of the data, the views and the script."""

import json

import pytest
import torch

pytest.importorskip("sklearn", reason="the digits come with scikit-learn (extra vision)")

from run_scripts import digits_franca
from run_scripts.benchmarks.digits import DigitViews, load_parts


def test_the_parts_do_not_overlap():
    whole, parts = load_parts(), load_parts(validation=True)
    assert len(parts.train) + len(parts.test) == len(whole.train)
    rows = {tuple(row) for row in whole.test.flatten(1).tolist()}
    assert not rows & {tuple(row) for row in torch.cat((parts.train, parts.test)).flatten(1).tolist()}


def test_views_depend_on_seed_and_epoch():
    digits = load_parts()
    assert (len(digits.train), len(digits.test)) == (1347, 450)
    examples = [{"pixels": digits.train[i], "index": i} for i in range(8)]
    views = DigitViews(0)
    first = views(examples)
    assert first["global_crops"].shape == first["local_crops"].shape == (8, 2, 1, 8, 8)
    assert torch.equal(views(examples)["local_crops"], first["local_crops"])
    assert not torch.equal(first["global_crops"][:, 0], first["global_crops"][:, 1])
    views.epoch = 1
    assert not torch.equal(views(examples)["global_crops"], first["global_crops"])


def test_the_script(tmp_path, capsys):
    digits_franca.main(["--seeds", "0", "1", "--steps", "1", "--validation", "true", "--output_dir", str(tmp_path)])
    results = json.loads((tmp_path / "results.json").read_text())
    assert [len(runs) for runs in results["runs"].values()] == [2, 2, 2]
    first, second = results["runs"]["flat"]
    assert results["mean"]["flat"]["8"] == pytest.approx((first["8"] + second["8"]) / 2)
    assert f"{results['mean']['slice']['4 and 8']:.4f}" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        digits_franca.main(["--steps", "0"])
    assert "steps: 0 with 3 seeds is nothing to train; use at least 1" in capsys.readouterr().err
