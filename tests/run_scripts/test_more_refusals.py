"""What a second look at the scripts found: wrong input that ended in a traceback, a wrong name, or no error at all."""

import json
import shutil

import pytest
import torch
from conftest import LADDER, SENTENCES
from datasets import Dataset
from safetensors.torch import load_file, save_file
from tiny_vision import tiny_model as tiny_franca
from tiny_vision import write_pictures

from run_scripts import classify, elasticize, encode, evaluate, evaluate_franca, finetune, push_to_hub, search, try_idea
from run_scripts.shared import peer

TRAINING = ("--max_steps", "1", "--per_device_train_batch_size", "4", "--bf16", "false", "--use_cpu", "true",
            "--report_to", "none", "--disable_tqdm", "true")  # fmt: skip


@pytest.fixture(scope="module")
def start(backbone_path, tmp_path_factory):
    from modeling_2dmse import TwoDMSEModel

    folder = tmp_path_factory.mktemp("start")
    TwoDMSEModel.from_backbone(backbone_path("bert"), sizes=LADDER).save_pretrained(folder / "model")
    shutil.copytree(folder / "model", folder / "broken")
    (folder / "broken" / "model.safetensors").write_bytes(b"")
    Dataset.from_dict({"anchor": SENTENCES[::2], "positive": SENTENCES[1::2]}).to_csv(folder / "pairs.csv")
    Dataset.from_dict({"anchor": SENTENCES[::2], "positive": SENTENCES[1::2]}).save_to_disk(folder / "saved")
    rows = [f"{text},{'²' if index % 2 else 'b'}" for index, text in enumerate(SENTENCES)]
    (folder / "classes.csv").write_text("\n".join(["text,label", *rows]))
    (folder / "texts.txt").write_text("\n".join(SENTENCES))
    return folder


def refused(run, flags, message: str, capsys) -> None:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        run([str(flag) for flag in flags])
    lines = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2, lines
    assert len(lines) == 1
    assert message in lines[0]


FINETUNE = {
    "reporter": (("--report_to", "wandb"), "report_to: the library of wandb is not installed"),
    "unknown reporter": (("--report_to", "x"), "report_to: 'x' is unknown"),
    "guide": (("--guide_model_name_or_path", "{w}/broken"), "guide_model_name_or_path: "),
    "query length": (("--max_query_length", "49"), "max_query_length: 49 is not allowed; this model reads up to 48"),
    "optimizer": (("--optim", "adamw_bnb_8bit"), "optim: adamw_bnb_8bit cannot be used: "),
    "optimizer's arguments": (("--optim_args", "x"), "with the optim_args x cannot be used: "),
    "schedule": (("--lr_scheduler_kwargs", '{"x": 1}'), "lr_scheduler_kwargs: {'x': 1} does not fit linear: "),
}


@pytest.mark.parametrize("name", FINETUNE)
def test_finetune(name, start, tmp_path, capsys):
    flags, message = FINETUNE[name]
    files = (
        "--model_name_or_path",
        start / "model",
        "--train_file",
        start / "pairs.csv",
        "--output_dir",
        tmp_path / "out",
    )
    more = (
        "--sizes",
        *LADDER,
        "--max_eval_samples",
        "0",
        *TRAINING,
        *(flag.replace("{w}", str(start)) for flag in flags),
    )
    refused(finetune.main, [*files, *more], message, capsys)
    assert not list(tmp_path.rglob("*.*"))


TABLES = {
    "joined lines": ('anchor,positive\n"a,b\n' * 8, "line 4 of", "csv"),
    "longer rows": ("anchor,positive\n" + "a,b,c\n" * 8, "has more than the 2 columns of the first line", "csv"),
    "half a pair": ('{"anchor": "\\ud800", "positive": "b"}\n' * 8, "cannot be read as jsonl: ", "jsonl"),
}


@pytest.mark.parametrize("name", TABLES)
def test_tables(name, start, tmp_path, capsys):
    content, message, suffix = TABLES[name]
    (tmp_path / f"a.{suffix}").write_text(content)
    files = ("--model_name_or_path", start / "model", "--train_file", tmp_path / f"a.{suffix}", *TRAINING)
    refused(finetune.main, [*files, "--output_dir", tmp_path / "out"], message, capsys)


@pytest.mark.parametrize("name", ["state.json", "dataset_info.json"])
def test_saved_datasets(name, start, tmp_path, capsys):
    shutil.copytree(start / "saved", tmp_path / "saved")
    (tmp_path / "saved" / name).write_text("[]")
    files = ("--model_name_or_path", start / "model", "--output_dir", tmp_path / "out", "--use_cpu", "--bf16", "false")
    message = f"{tmp_path / 'saved'} cannot be read as a saved dataset: "
    refused(finetune.main, [*files, "--train_file", tmp_path / "saved"], f"train_file: {message}", capsys)
    fit = ("--effort", "fit", "--corpus_file", tmp_path / "saved", "--text_column", "anchor")
    refused(elasticize.main, [*files, *fit], f"corpus_file: {message}", capsys)


def test_lengths_and_teachers(start, tmp_path, backbone_path, capsys):
    files = (
        "--model_name_or_path",
        start / "model",
        "--corpus_file",
        start / "texts.txt",
        "--use_cpu",
        "--bf16",
        "false",
    )
    files = (*files, "--effort", "fit", "--output_dir", tmp_path / "out")
    refused(elasticize.main, [*files, "--max_length", "49"], "max_length: 49 is not allowed; this model reads", capsys)
    teacher = ("--teacher_model_name_or_path", start / "broken")
    refused(elasticize.main, [*files, *teacher], "error: teacher_model_name_or_path: ", capsys)
    files = ("--model_name_or_path", backbone_path("bert"), "--train_file", start / "classes.csv", "--sizes", "4x32")
    files = ("train", *files, "--output_dir", tmp_path / "out", *TRAINING)
    refused(classify.main, [*files, "--max_length", "500"], "max_length: 500 is not allowed; this model reads", capsys)
    classify.main([str(flag) for flag in files])  # whose class is a digit, but no number
    settings = tmp_path / "out" / "classify.json"
    content = json.loads(settings.read_text())
    for columns in ([], ["text"] * 3, [3]):
        settings.write_text(json.dumps(content | {"text_columns": columns}))
        flags = ("fit-cascade", "--model_name_or_path", tmp_path / "out", "--fit_file", start / "classes.csv")
        refused(classify.main, flags, f"text_columns {columns} is not allowed", capsys)


def test_texts_and_judgements(start, tmp_path, capsys):
    files = ("--model_name_or_path", start / "model", "--output_dir", tmp_path / "out")
    for name, content, message in (
        ("a.csv", 'id,text\n1,"abc\n2,d\n', "line 3 is malformed: it is not CSV: unexpected end of data"),
        ("a.csv", 'id,text\n1,"a"b\n', "line 2 is malformed: it is not CSV: "),
        ("a.jsonl", '{"id": true, "text": "b"}', "line 1 is malformed: its id is a bool"),
        ("a.jsonl", '{"id": NaN, "text": "b"}', "line 1 is malformed: its id is nan"),
    ):
        (tmp_path / name).write_text(content)
        refused(encode.main, [*files, "--input", tmp_path / name], message, capsys)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
    refused(encode.main, [*files[:3], start / "texts.txt", "--input", start / "texts.txt"], "is a file; name a", capsys)
    (tmp_path / "beir" / "qrels").mkdir(parents=True)
    (tmp_path / "beir" / "corpus.jsonl").write_text('{"_id": "d", "text": "a"}')
    (tmp_path / "beir" / "queries.jsonl").write_text('{"_id": "q", "text": "a"}')
    (tmp_path / "beir" / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq\tz\t1\n")
    refused(evaluate.main, [*files, "--beir_dirs", tmp_path / "beir"], "beir_dirs: no relevant document of the", capsys)
    refused(evaluate.main, [*files, "--beir_dirs", tmp_path / "beir", "--max_query_length", "49"], "beir_dirs", capsys)


@pytest.mark.parametrize("damage", ["nan", "int8", "missing", "mean"])
def test_weights_of_franca(damage, tmp_path, capsys):
    tiny_franca().save_pretrained(tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    name = "teacher.backbone.embeddings.patch_embeddings.projection.weight"
    value = weights.pop(name)
    if damage == "mean":
        weights[name], path = value, tmp_path / "model" / "preprocessor_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"image_mean": [float("nan")] * 3}))
    elif damage != "missing":
        weights[name] = value * float("nan") if damage == "nan" else value.to(torch.int8)
    save_file(weights, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    pictures = write_pictures(tmp_path / "pictures", 2)
    files = ("--model_name_or_path", tmp_path / "model", "--train_dir", pictures, "--test_dir", pictures)
    refused(evaluate_franca.main, [*files, "--output_dir", tmp_path / "out"], "does not load: ", capsys)


@pytest.mark.parametrize("damage", ["nan", "int8", "missing"])
def test_weights_under_a_classifier(damage, start, tmp_path, backbone_path, capsys):
    shutil.copytree(backbone_path("bert"), tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    name = "encoder.layer.1.output.dense.weight"
    value = weights.pop(name)
    if damage != "missing":
        weights[name] = value * float("nan") if damage == "nan" else value.to(torch.int8)
    save_file(weights, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    files = ("--model_name_or_path", tmp_path / "model", "--train_file", start / "classes.csv", "--sizes", "4x32")
    message = "model_name_or_path: "
    refused(classify.main, ["train", *files, "--output_dir", tmp_path / "out", *TRAINING], message, capsys)
    assert not (tmp_path / "out").exists()


def test_other_flags(start, tmp_path, capsys, monkeypatch):
    refused(try_idea.main, ["--idea", "own_alignment=nan"], "idea: 'own_alignment=nan' is not allowed", capsys)
    elastic = ("--model_name_or_path", start / "model", "--repo_id", "a/b", "--dry_run", start / "saved")
    refused(push_to_hub.main, elastic, f"dry_run: {start / 'saved'} is not empty", capsys)
    sentences = pytest.importorskip("sentence_transformers").SentenceTransformer
    with pytest.raises(ValueError, match="benchmark: the layers of a TwoDMSEModel cannot be cut"):
        peer.cut_layers(sentences(str(start / "model"), device="cpu"), 1)
    monkeypatch.setattr("builtins.input", lambda prompt: b"\xff".decode("utf-8"))
    with pytest.raises(ValueError, match="query: standard input has a line that is not UTF-8"):
        next(search.ask())
