"""bert-full.yaml, then bert-best.yaml, on a tiny random backbone: stage 1 writes the start and teacher of stage 2."""

import numpy as np
import torch
import yaml
from conftest import SENTENCES

from modeling_2dmse import TwoDMSEModel
from run_scripts import finetune
from trainer import TwoDMSETrainer


def tiny_copy(name: str, folder, **changes) -> tuple[str, dict]:
    """The recipe for two steps on a table, and its contents."""
    recipe = yaml.safe_load((finetune.cli.RECIPES / name).read_text())
    tiny = {key: value for key, value in recipe.items() if not key.startswith("dataset")}
    tiny |= {"train_file": ["t.csv"], "per_device_train_batch_size": 4, "max_steps": 3, "bf16": False, "use_cpu": True}
    tiny |= {"learning_rate": 1e-3, "max_eval_samples": 0, "save_strategy": "no", "report_to": "none"} | changes
    (folder / name).write_text(yaml.safe_dump(tiny))
    return str(folder / name), recipe


def cosines(model: TwoDMSEModel) -> np.ndarray:
    vectors = model.encode(SENTENCES, num_layers=4, dim=32, show_progress_bar=False)
    return vectors @ vectors.T


def test_the_ladder_learns_from_the_full_size_of_stage_one(backbone_path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [f"{a},{b},{c}" for a, b, c in zip(SENTENCES, SENTENCES[1:], SENTENCES[2:], strict=False)]
    (tmp_path / "t.csv").write_text("\n".join(["anchor,positive,negative", *rows]))
    first, stage_one = tiny_copy("bert-full.yaml", tmp_path, model_name_or_path=backbone_path("bert"), sizes=["4x32"])
    second, stage_two = tiny_copy("bert-best.yaml", tmp_path, sizes=["1x8", "2x16", "4x32"], output_dir="out/best")
    assert stage_two["model_name_or_path"] == f"./{stage_one['output_dir']}"
    assert (stage_two["teacher"], stage_two["exit_projections"], stage_one["objective"]) == ("start", True, "separate")
    assert stage_one["sizes"] == stage_two["sizes"][-1:]

    seen = {}

    class Watched(TwoDMSETrainer):
        def _before_training(self):
            super()._before_training()
            seen["start"] = self._start

    finetune.main([first])
    finetune.main([second], Watched)
    full, random = TwoDMSEModel.from_pretrained("out/bert-full"), TwoDMSEModel.from_backbone(backbone_path("bert"))
    assert np.allclose(cosines(seen["start"]), cosines(full), atol=1e-4)
    assert not np.allclose(cosines(full), cosines(random), atol=1e-2), "stage 1 does nothing"
    best = TwoDMSEModel.from_pretrained("out/best")
    assert [str(size) for size in best.config.ladder] == ["1x8", "2x16", "4x32"]
    assert best.exit_projections is not None
    assert not np.allclose(cosines(best), cosines(full), atol=1e-4)
    assert torch.isfinite(torch.from_numpy(best.encode(SENTENCES, num_layers=1, dim=8))).all()
