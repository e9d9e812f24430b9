"""A damaged picture ends every script that reads pictures in one line that names it, before or during its work."""

import io
import json

import pytest
from PIL import Image
from tiny_vision import SHAPE, draw_picture, tiny_model, write_pictures
from torch.utils.data import DataLoader

from run_scripts import classify, evaluate_franca, evaluate_m3, pretrain_franca, train_m3
from trainer.shared.pictures import PictureError, reading

TRAINING = ("--max_steps", "2", "--per_device_train_batch_size", "2", "--save_strategy", "no", "--eval_strategy", "no",
            "--bf16", "false", "--use_cpu", "true", "--report_to", "none", "--disable_tqdm", "true")  # fmt: skip
CROPS = ("--global_crop_size", "16", "--local_crop_size", "8", "--local_crops_number", "1", "--num_prototypes", "24",
         "--head_hidden_size", "12", "--head_bottleneck_size", "8", "--nesting_sizes", "4", "16")  # fmt: skip
TURNS = [{"role": "user", "content": "what is it"}, {"role": "assistant", "content": "3"}]


def packed(kind: str) -> bytes:
    file = io.BytesIO()
    draw_picture(0, 0, 40).save(file, kind)
    return file.getvalue()


JPEG = packed("JPEG")
# The last two have a header of a picture: what is wrong shows when they are decoded.
DAMAGES = {"nothing": b"", "text": b"no picture", "zeros": bytes(500), "cut JPEG": JPEG[:-150],
           "cut PNG": packed("PNG")[:-900]}  # fmt: skip


@pytest.fixture(scope="module")
def franca_path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("franca")
    tiny_model().save_pretrained(folder)
    return str(folder)


def one_line(run, flags, message: str, capsys) -> None:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        run(flags)
    assert stopped.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert message in lines[0]
    assert "cannot be read as a picture: " in lines[0]


@pytest.mark.parametrize("name", DAMAGES)
def test_conversations(name, llava_path, tmp_path, capsys):
    draw_picture(0, 0).save(tmp_path / "good.png")
    (tmp_path / "bad.jpg").write_bytes(DAMAGES[name])
    good = [json.dumps({"image": "good.png", "messages": TURNS})] * 66  # more than are tried before training
    (tmp_path / "rows.jsonl").write_text("\n".join([*good, json.dumps({"image": "bad.jpg", "messages": TURNS})]))
    model, out = ("--model_name_or_path", llava_path), ("--output_dir", str(tmp_path / "out"))
    whole = ("--visual_token_sizes", "36", "--per_device_train_batch_size", "67")
    flags = [*model, "--train_file", str(tmp_path / "rows.jsonl"), *out, *TRAINING, *whole]
    row = "" if name.startswith("cut") else "row 67: "
    one_line(train_m3.main, flags, f"train_file: {row}bad.jpg", capsys)
    (tmp_path / "rows.jsonl").write_text("\n".join([*good[:2], json.dumps({"image": "bad.jpg", "messages": TURNS})]))
    row = "" if name.startswith("cut") else "row 3: "
    flags = [*model, "--data_file", str(tmp_path / "rows.jsonl"), *out, "--visual_token_sizes", "36"]
    one_line(evaluate_m3.main, flags, f"data_file: {row}bad.jpg", capsys)


@pytest.mark.parametrize("name", DAMAGES)
def test_folders(name, franca_path, tmp_path, capsys):
    write_pictures(tmp_path / "good", 3)
    write_pictures(tmp_path / "bad", 3)
    bad = tmp_path / "bad" / "red" / "9.jpg"
    bad.write_bytes(DAMAGES[name])
    folder, out = str(tmp_path / "bad"), ("--output_dir", str(tmp_path / "out"))
    backbone = ("--backbone_config", json.dumps({"model_type": "dinov2", **SHAPE}))
    flags = [*backbone, "--train_dir", folder, *out, *TRAINING, *CROPS, "--per_device_train_batch_size", "7"]
    one_line(pretrain_franca.main, flags, f"train_dir: {bad}", capsys)
    flags = ["--model_name_or_path", franca_path, "--train_dir", str(tmp_path / "good"), "--test_dir", folder, *out]
    one_line(evaluate_franca.main, flags, f"test_dir: {bad}", capsys)
    flags = ["train", "--model_name_or_path", franca_path, "--train_file", folder, *out, *TRAINING]
    flags += ["--trust_remote_code", "true", "--sizes", "8", "16", "--per_device_train_batch_size", "7"]
    if not name.startswith("cut"):  # its rows are decoded in the same place
        one_line(classify.main, flags, f"train_file: {bad}", capsys)


class Damaged:
    """A table of one row that cannot be read."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, row: int):
        with reading("train_dir: a.jpg"):
            Image.open(io.BytesIO(b"no picture"))


def test_the_line_of_a_worker_process_is_short():
    with pytest.raises(PictureError) as raised:
        next(iter(DataLoader(Damaged(), num_workers=1)))
    assert raised.value.line.startswith("train_dir: a.jpg cannot be read as a picture: cannot identify image file")


def test_content_that_is_neither_text_nor_image(llava_path, tmp_path, capsys):
    draw_picture(0, 0).save(tmp_path / "good.png")
    for turns, message in (
        ("hello", "row 1 has no list of turns, each with its role and content, but 'hello'"),
        (["hello"], "row 1 has no list of turns"),
        ([{"role": "user", "content": 3}, {"role": "assistant", "content": 4}], "row 1 has the content '3'"),
        ([{"role": "user", "content": [{"type": "video"}]}, *TURNS[1:]], "row 1 has the content \"[{'type': 'video'"),
    ):
        (tmp_path / "rows.jsonl").write_text(json.dumps({"image": "good.png", "messages": turns}))
        with pytest.raises(SystemExit, match="2"):
            evaluate_m3.main(["--model_name_or_path", llava_path, "--data_file", str(tmp_path / "rows.jsonl"),
                              "--output_dir", str(tmp_path / "out")])  # fmt: skip
        assert message in capsys.readouterr().err.splitlines()[-1]
