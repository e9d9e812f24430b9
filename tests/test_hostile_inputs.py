"""Damaged files, folders and flags: each ends in exit code 2 and one line on stderr, and nothing on disk changes."""

import shutil

import hostile_workspace as h
import numpy as np
import pytest
import torch
from hostile_workspace import TRAINING, Case, array, both, cut, drop, flip, gone, packed, put, tensors, text

from run_scripts import (
    build_index,
    classify,
    elasticize,
    encode,
    evaluate,
    export,
    finetune,
    mine_negatives,
    plan,
    pretrain,
    push_to_hub,
    search,
)

MODEL = "--model_name_or_path"
MINED = ("--output_file", "{out}.csv", "--range_min", "0", "--range_max", "9")
ELASTIC = ("--corpus_file", "{w}/texts.txt", "--output_dir", "{out}", "--effort", "fit", "--bf16", "false")


def bad_model(message, change, run=encode, part="model"):
    name = {
        encode: (MODEL, "{bad}", "--input", "{w}/texts.txt", "--output_dir", "{out}"),
        evaluate: (MODEL, "{bad}", "--sts_files", "{w}/scored.csv", "--output_dir", "{out}"),
        export: (MODEL, "{bad}", "--output_dir", "{out}"),
        plan: (MODEL, "{bad}", "--texts", "{w}/texts.txt"),
        mine_negatives: (MODEL, "{bad}", "--train_file", "{w}/pairs.csv", *MINED),
        search: ("{w}/index", "a query", MODEL, "{bad}"),
        push_to_hub: (MODEL, "{bad}", "--repo_id", "a/b", "--dry_run", "{out}"),
        finetune: (MODEL, "{bad}", "--train_file", "{w}/pairs.csv", "--output_dir", "{out}", *TRAINING),
        elasticize: (MODEL, "{bad}", *ELASTIC),
    }[run]
    return Case(run, name, message, part, change)


def bad_input(message, name, content, *more):
    flags = (MODEL, "{w}/model", "--input", "{bad}/" + name, "--output_dir", "{out}", *more)
    return Case(encode, flags, message, "", text(name, content))


def bad_scores(message, name, content):
    flags = (MODEL, "{w}/model", "--sts_files", "{bad}/" + name, "--output_dir", "{out}")
    return Case(evaluate, flags, message, "", text(name, content))


def bad_table(message, name, content, run=finetune):
    if run is mine_negatives:
        flags = (MODEL, "{w}/model", "--train_file", "{w}/pairs.csv", "--corpus_file", "{bad}/" + name,
                 *MINED)  # fmt: skip
    else:
        flags = (MODEL, "{w}/model", "--train_file", "{bad}/" + name, "--output_dir", "{out}", *TRAINING)
        flags += ("--max_eval_samples", "9") if "all 9" in message else ()
    return Case(run, flags, message, "", text(name, content))


def bad_corpus(message, name, content, *more):
    flags = (MODEL, "{w}/model", "--train_file", "{bad}/" + name, "--output_dir", "{out}", "--max_steps", "1")
    more = (*more, "--bf16", "false", "--use_cpu", "true", "--report_to", "none")
    return Case(pretrain, (*flags, *more), message, "", text(name, content))


def bad_unlabeled(message, name, content):
    flags = (MODEL, "{w}/model", "--train_file", "{w}/pairs.csv", "--unlabeled_file", "{bad}/" + name)
    return Case(finetune, (*flags, "--output_dir", "{out}", *TRAINING), message, "", text(name, content))


def bad_documents(message, name, content, *more):
    flags = (MODEL, "{w}/model", "--corpus_file", "{bad}/" + name, *ELASTIC[2:], *more)
    return Case(elasticize, flags, message, "", text(name, content))


def bad_beir(message, change, run=evaluate):
    more = {evaluate: ("--beir_dirs", "{bad}", "--output_dir", "{out}"),
            encode: ("--input", "{bad}", "--output_dir", "{out}"),
            mine_negatives: ("--beir_dir", "{bad}", "--beir_split", "test", "--output_file", "{out}.csv")}  # fmt: skip
    return Case(run, (MODEL, "{w}/model", *more[run]), message, "beir", change)


def bad_index(message, change, *more):
    return Case(search, ("{bad}", "a query", *more), message, "index", change)


def bad_embeddings(message, change, *more):
    return Case(build_index, ("--embeddings", "{bad}", "--output_dir", "{out}", *more), message, "embeddings", change)


def bad_flags(run, message, *flags):
    base = {
        encode: (MODEL, "{w}/model", "--input", "{w}/texts.txt", "--output_dir", "{out}"),
        evaluate: (MODEL, "{w}/model", "--sts_files", "{w}/scored.csv", "--output_dir", "{out}"),
        export: (MODEL, "{w}/model", "--output_dir", "{out}"),
        plan: (MODEL, "{w}/model", "--texts", "{w}/texts.txt"),
        mine_negatives: (MODEL, "{w}/model", "--train_file", "{w}/pairs.csv", *MINED),
        build_index: ("--embeddings", "{w}/embeddings", "--output_dir", "{out}"),
        search: ("{w}/index", "a query"),
        classify: ("train", MODEL, "{w}/plain", "--train_file", "{w}/pairs.csv", "--output_dir", "{out}"),
        pretrain: (MODEL, "{w}/plain", "--train_file", "{w}/texts.txt", "--output_dir", "{out}", "--sizes", "2x16"),
        finetune: (MODEL, "{w}/model", "--train_file", "{w}/pairs.csv", "--output_dir", "{out}", *TRAINING),
        elasticize: (MODEL, "{w}/model", *ELASTIC),
    }[run]
    return Case(run, (*base, *flags), message)


def bad_checkpoint(message, change):
    flags = (MODEL, "{w}/model", "--train_file", "{w}/pairs.csv", "--output_dir", "{bad}", *TRAINING)
    more = ("--max_steps", "6", "--resume_from_checkpoint", "{bad}/checkpoint-4")
    return Case(finetune, (*flags, *more), message, "run", change)


INF, NAN = float("inf"), float("nan")
BACKBONE = ("config.json", "backbone_config")
LAYER = "backbone.encoder.layer.1.output.dense.weight"
DEEP = "[" * 100_000
LONE = '{"text": "half a pair \\ud800"}'

CASES = {
    # models, by what is damaged
    "config: not JSON": bad_model("bad has a damaged config.json", text("config.json", "{")),
    "config: empty": bad_model("config.json", text("config.json", "")),
    "config: a list": bad_model("model_name_or_path: ", text("config.json", "[]")),
    "config: not UTF-8": bad_model("model_name_or_path: ", text("config.json", b"\xff\xfe{}")),
    "config: nested": bad_model("model_name_or_path: ", text("config.json", DEEP)),
    "config: no type": bad_model("model_name_or_path: ", text("config.json", "{}")),
    "config: unknown type": bad_model("model_name_or_path: ", put("config.json", "model_type", value="novel")),
    "config: backbone 0": bad_model("model_name_or_path: ", put(*BACKBONE, value={})),
    "config: backbone 1": bad_model("model_name_or_path: ", put(*BACKBONE, value="bert")),
    "config: backbone 2": bad_model("model_name_or_path: ", put(*BACKBONE, value={"model_type": "novel"})),
    "config: activation": bad_model("model_name_or_path: ", put(*BACKBONE, "hidden_act", value="novel")),
    "config: heads": bad_model("model_name_or_path: ", put(*BACKBONE, "num_attention_heads", value=5)),
    "config: width": bad_model("model_name_or_path: ", put(*BACKBONE, "hidden_size", value=64)),
    "config: no width": bad_model("model_name_or_path: ", put(*BACKBONE, "hidden_size", value="wide")),
    "config: vocabulary": bad_model("model_name_or_path: ", put(*BACKBONE, "vocab_size", value=7)),
    "config: fewer layers": bad_model("config.json has no place", both(put(*BACKBONE, "num_hidden_layers", value=2),
                                                                         put("config.json", "num_layers", value=2),
                                                                         put("config.json", "sizes", value=["1x8"]))),
    "config: more layers": bad_model("does not load", both(put(*BACKBONE, "num_hidden_layers", value=9),
                                                           put("config.json", "num_layers", value=9))),
    "config: num_layers": bad_model("num_layers: 9", put("config.json", "num_layers", value=9)),
    "config: num_layers text": bad_model("num_layers: ", put("config.json", "num_layers", value="2")),
    "config: dim": bad_model("dim: ", put("config.json", "dim", value=0)),
    "config: dtype": bad_model("model_name_or_path: ", put("config.json", "dtype", value="float99")),
    "config: sizes 0": bad_model("model_name_or_path: ", put("config.json", "sizes", value=5)),
    "config: sizes 1": bad_model("sizes: ", put("config.json", "sizes", value=["9x9"])),
    "config: pooling": bad_model("pooling: 'max' is unknown", put("config.json", "pooling", value="max")),
    "config: stack 0": bad_model("layer_stack: ", put("config.json", "layer_stack", value="encoder.novel")),
    "config: stack 1": bad_model("layer_stack: ", put("config.json", "layer_stack", value=3)),
    "config: norm": bad_model("final_norm: 'novel' is not", put("config.json", "final_norm", value="novel")),
    "config: prompts 0": bad_model("prompts: ", put("config.json", "prompts", value={"query": 3})),
    "config: prompts 1": bad_model("prompts: ", put("config.json", "prompts", value=[1, 2])),
    "config: prompt": bad_model("prompt_name: ", put("config.json", "default_prompt_name", value="novel")),
    "config: projections": bad_model("config.json has no place for 4 of the tensors",
                                     put("config.json", "exit_projections", value=False), part="projected"),
    "config: no projections": bad_model("does not load", put("config.json", "exit_projections", value=True)),
    "weights: none": bad_model("does not load", gone("model.safetensors")),
    "weights: empty": bad_model("does not load", text("model.safetensors", "")),
    "weights: cut": bad_model("does not load", cut("model.safetensors")),
    "weights: header": bad_model("does not load", flip("model.safetensors", 0.0)),
    "weights: pickle": bad_model("does not load", both(gone("model.safetensors"), text("pytorch_model.bin", b"\x80"))),
    "weights: nan": bad_model(f"{LAYER} are not finite", tensors(lambda w: w[LAYER].fill_(NAN))),
    "weights: one inf": bad_model("are not finite", tensors(lambda w: w[LAYER].view(-1)[3:4].fill_(INF))),
    "weights: int8": bad_model("are I8, not", tensors(lambda w: w.update({LAYER: w[LAYER].to(torch.int8)}))),
    "weights: missing": bad_model("the weights lack 1", tensors(lambda w: w.pop(LAYER))),
    "weights: shape": bad_model("does not load", tensors(lambda w: w.update({LAYER: w[LAYER][:5]}))),
    "weights: more": bad_model("no place for 1", tensors(lambda w: w.update(novel=torch.ones(2)))),
    "tokenizer: none": bad_model("does not load", both(gone("tokenizer.json"), gone("tokenizer_config.json"))),
    "tokenizer: a list": bad_model("does not load", text("tokenizer.json", "[]")),
    "tokenizer: cut": bad_model("does not load", cut("tokenizer.json")),
    "tokenizer: config list": bad_model("does not load", text("tokenizer_config.json", "[]")),
    "tokenizer: length": bad_model("model_name_or_path: ", put("tokenizer_config.json", "model_max_length", value="x")),
    "plain: pooling list": bad_model("that is not a JSON object", text("1_Pooling/config.json", "[]"), part="plain"),
    "plain: pooling cut": bad_model("has a broken config.json", text("1_Pooling/config.json", "{"), part="plain"),
    "plain: missing": bad_model("the weights lack 1", tensors(lambda w: w.pop(LAYER[9:])), part="plain"),
    "plain: nan": bad_model("are not finite", tensors(lambda w: w[LAYER[9:]].fill_(NAN)), part="plain"),
    "plain: no layers": bad_model("list of 0 layers", put("config.json", "num_hidden_layers", value=0), part="plain"),
    **{
        f"{run.__name__.rpartition('.')[2]}: {name}": bad_model("bad", change, run)
        for run in (evaluate, export, plan, mine_negatives, search, push_to_hub, finetune, elasticize)
        for name, change in (
            ("weights cut", cut("model.safetensors")),
            ("config list", text("config.json", "[]")),
            ("nan weights", tensors(lambda w: w[LAYER].fill_(NAN))),
        )
    },
    # texts
    "text: gz cut": bad_input("input: the compressed file ends after", "a.txt.gz", packed("a b c\n" * 999, "cut")),
    "text: gz flipped": bad_input("input: the compressed file", "a.jsonl.gz", packed("a b c\n" * 99, "flipped")),
    "text: csv gz flipped": bad_input("input: the compressed file", "a.csv.gz", packed("text\nb c\n" * 99, "flipped")),
    "text: gz of nothing": bad_input("is not compressed by gzip; remove .gz", "a.csv.gz", packed("text\na", "plain")),
    "text: not UTF-8": bad_input("line 2 is malformed: byte 2 is not UTF-8", "a.txt", b"one\nt\xffo\n"),
    "text: UTF-16": bad_input("line 1 is malformed", "a.txt", "one\ntwo".encode("utf-16")),
    "text: csv not UTF-8": bad_input("line 3 is malformed: character 2", "a.csv", b"text\none\nt\xffo\n"),
    "text: csv heading": bad_input("there are 2 columns text", "a.csv", "text,text\na,b\n"),
    "text: csv ids": bad_input("there are 2 columns id", "a.csv", "text,id,id\na,b,c\n"),
    "text: csv ragged": bad_input("line 2 is malformed", "a.csv", "id,text\n1,a,b\n"),
    "text: csv nothing": bad_input("there is no column text among none", "a.csv", ""),
    "text: csv id NUL": bad_input("has a NUL character", "a.csv", "id,text\na\0b,c\n"),
    "text: json id NUL": bad_input("has a NUL character", "a.jsonl", '{"id": "a\\u0000", "text": "b"}'),
    "text: json surrogate": bad_input("line 1 is malformed: character 13 of its text", "a.jsonl", LONE),
    "text: json id half": bad_input("line 1 is malformed", "a.jsonl", '{"id": "\\udfff", "text": "b"}'),
    "text: json nested": bad_input("line 1 is malformed: it is not JSON", "a.jsonl", DEEP),
    "text: json twice": bad_input("the name 'text' appears twice", "a.jsonl", '{"text": "a", "text": "b"}'),
    "text: json id object": bad_input("its id is a dict", "a.jsonl", '{"id": {}, "text": "b"}'),
    "text: json number": bad_input("its text is a int", "a.jsonl", '{"text": 3}'),
    "text: parquet": bad_input("cannot be read as parquet", "a.parquet", b"PAR1" + bytes(90) + b"PAR1"),
    "text: nothing": bad_input("has no texts", "a.txt", ""),
    # tables
    "scores: one row": bad_scores("a.csv has one row", "a.csv", "sentence1,sentence2,score\na,b,1\n"),
    "scores: constant": bad_scores("all have the score 2", "a.csv", "sentence1,sentence2,score\na,b,2\nc,d,2\n"),
    "scores: nan": bad_scores("not a finite", "a.csv", "sentence1,sentence2,score\na,b,nan\nc,d,2\n"),
    "scores: text": bad_scores("score", "a.csv", "sentence1,sentence2,score\na,b,x\nc,d,2\n"),
    "scores: gz cut": bad_scores("sts_files: ", "a.csv.gz", packed("sentence1,sentence2,score\n" * 99, "cut")),
    "scores: gz flipped": bad_scores("sts_files: ", "a.jsonl.gz", packed('{"a": 1}\n' * 99, "flipped")),
    "scores: not UTF-8": bad_scores("sts_files: ", "a.csv", b"sentence1,sentence2,score\n\xff,b,1\nc,d,2\n"),
    "scores: heading": bad_scores("the column score twice", "a.csv", "sentence1,sentence2,score,score\na,b,1,2\n"),
    "scores: nested": bad_scores("sts_files: ", "a.jsonl", DEEP),
    "scores: parquet": bad_scores("sts_files: ", "a.parquet", b"PAR1" + bytes(90) + b"PAR1"),
    "pairs: heading": bad_table("the column anchor twice", "a.csv", "anchor,anchor,positive\na,b,c\n"),
    "pairs: gz cut": bad_table("train_file: ", "a.csv.gz", packed("anchor,positive\n" * 99, "cut")),
    "pairs: not UTF-8": bad_table("train_file: ", "a.csv", b"anchor,positive\n\xff,b\n"),
    "pairs: nested": bad_table("train_file: ", "a.jsonl", '{"anchor": {"a": 1}, "positive": "b"}'),
    "pairs: numbers": bad_table("not texts", "a.jsonl", '{"anchor": 1, "positive": "b"}'),
    "pairs: few": bad_table("one row is fewer than one batch of 4", "a.csv", "anchor,positive\na,b\n"),
    "corpus_file: nested": bad_table("corpus_file: ", "a.jsonl", '{"text": {"a": 1}}', mine_negatives),
    "corpus_file: deep": bad_table("corpus_file: ", "a.jsonl", DEEP, mine_negatives),
    "corpus_file: gz": bad_table("corpus_file: ", "a.jsonl.gz", packed('{"text": "a"}\n' * 99, "cut"), mine_negatives),
    "pretrain: not UTF-8": bad_corpus("train_file: ", "a.txt", b"one two three four\nt\xff b c d e\n"),
    "pretrain: gz cut": bad_corpus("train_file: ", "a.txt.gz", packed("one two three four\n" * 999, "cut")),
    "pretrain: gz flipped": bad_corpus("train_file: ", "a.txt.gz", packed("one two three four\n" * 99, "flipped")),
    "pretrain: stream cut": bad_corpus("train_file: ", "a.txt.gz", packed("a b c\n" * 999, "cut"), "--streaming"),
    "pretrain: stream bytes": bad_corpus("train_file: ", "a.txt", b"t\xff b c d e\n", "--streaming"),
    "unlabeled: not UTF-8": bad_unlabeled("unlabeled_file: ", "a.txt", b"one two three four\nt\xff b c d e\n"),
    "unlabeled: gz cut": bad_unlabeled("unlabeled_file: ", "a.txt.gz", packed("one two three four\n" * 999, "cut")),
    "unlabeled: gz flipped": bad_unlabeled("unlabeled_file: ", "a.csv.gz", packed("text\na b c d\n" * 99, "flipped")),
    "documents: gz cut": bad_documents("corpus_file: the compressed", "a.txt.gz", packed("a b c\n" * 999, "cut")),
    "documents: gz flipped": bad_documents("corpus_file: the comp", "a.csv.gz", packed("text\nb\n" * 99, "flipped")),
    "documents: parquet": bad_documents("corpus_file: ", "a.parquet", b"PAR1" + bytes(90) + b"PAR1"),
    "documents: nested": bad_documents("a.jsonl has no text", "a.jsonl", DEEP),
    "documents: numbers": bad_documents("a.jsonl has no text", "a.jsonl", '{"text": 3}\n' * 30),
    "documents: not UTF-8": bad_documents("a.txt has no text", "a.txt", b"t\xff\n" * 30),
    "documents: csv heading": bad_documents("there are 2 columns text", "a.csv", "text,text\na,b\n"),
    "documents: nothing": bad_documents("a.txt has no text", "a.txt", ""),
    # BEIR folders
    "beir: no _id": bad_beir("line 1 of", text("corpus.jsonl", '{"text": "a"}')),
    "beir: null": bad_beir("line 1 of", text("corpus.jsonl", '{"_id": "d0", "text": null}')),
    "beir: no text": bad_beir("line 1 of", text("queries.jsonl", '{"_id": "q0"}')),
    "beir: empty": bad_beir("has no documents", text("corpus.jsonl", "")),
    "beir: not JSON": bad_beir("is not JSON", text("corpus.jsonl", "{")),
    "beir: a list": bad_beir("is not a JSON object", text("queries.jsonl", "[]")),
    "beir: not UTF-8": bad_beir("is not JSON", text("queries.jsonl", b"\xff\xfe")),
    "beir: surrogate": bad_beir("surrogate pair", text("queries.jsonl", '{"_id": "q0", "text": "\\ud800"}')),
    "beir: deep": bad_beir("is not JSON", text("corpus.jsonl", DEEP)),
    "beir: heading": bad_beir("has no heading", text("qrels/test.tsv", "q0\td0\t1\n")),
    "beir: ragged": bad_beir("line 2 of", text("qrels/test.tsv", "query-id\tcorpus-id\tscore\nq0\td0\n")),
    "beir: score": bad_beir("'high'", text("qrels/test.tsv", "query-id\tcorpus-id\tscore\nq0\td0\thigh\n")),
    "beir: no match": bad_beir("has no query", text("qrels/test.tsv", "query-id\tcorpus-id\tscore\nz\td0\t1\n")),
    "beir: no judgement": bad_beir("has no query", text("qrels/test.tsv", "query-id\tcorpus-id\tscore\n")),
    "beir: mined": bad_beir("beir_dir: ", text("corpus.jsonl", '{"_id": "d0", "text": null}'), mine_negatives),
    "beir: mined, no match": bad_beir(
        "beir_dir: ", text("qrels/test.tsv", "query-id\tcorpus-id\tscore\n"), mine_negatives),
    "beir: encoded": bad_beir("line 1 is malformed", text("corpus.jsonl", '{"_id": "d0", "text": null}'), encode),
    # other files
    "card: head": Case(push_to_hub, (MODEL, "{bad}", "--repo_id", "a/b", "--dry_run", "{out}"), "README.md is not YAML",
                       "model", text("README.md", "---\na: [b\n---\n# x\n")),
    "card: results": Case(push_to_hub, (MODEL, "{bad}", "--repo_id", "a/b", "--dry_run", "{out}"), "README.md is not",
                          "model", text("README.md", "---\nmodel-index: 3\n---\n# x\n")),
    **{f"recipe: {name}": Case(finetune, ("{bad}/a.yaml",), "recipe: ", "", text("a.yaml", content))
       for name, content in (("bytes", b"a: \xff"), ("nested", DEEP), ("date", "a: 2020-99-99"), ("list", "[]"))},
    **{f"results: {name}": Case(plan, (MODEL, "{w}/model", "--results", "{bad}/r.json"), "results: ", "",
                                text("r.json", content))
       for name, content in (("bytes", b"\xff"), ("nested", DEEP), ("list", "[]"), ("sts", '{"sts": {"a": 3}}'))},
    "pairs: one anchor": bad_table("all 9 rows have the same anchor", "a.csv", "anchor,positive\n" + "a,b\n" * 9),
    "query: half a pair": Case(search, ("{w}/index", "a \udc80"), "texts: item 0 has half"),
    # engines
    **{f"engine: {message[:12]}": Case(build_index, ("--embeddings", "{w}/embeddings", *flags.split()), message)
       for flags, message in (
           ("--engine mysql --output_dir {out}", "engine: 'mysql' is unknown"),
           ("--engine qdrant --collection c --engine_url ftp://a", "engine_url: 'ftp://a' is not a URL"),
           ("--engine qdrant --collection c --engine_url http://a --engine_api_key_env NO", "engine_api_key_env: the"),
           ("--engine pgvector --collection c --engine_url_env NO", "engine_url_env: the environment variable 'NO'"))},
    # indexes and embeddings
    **{f"index: no {name}": bad_index("index.json is damaged", drop("index.json", name))
       for name in ("count", "width", "files", "prefixes", "model", "graph")},
    **{f"index: cut {name}": bad_index("bad", cut(name)) for name in ("index.json", "vectors.f32", "ids", "id_offsets",
                                                                      "texts.utf8", "graph.faiss", "prefix-8.float32")},
    **{f"index: flipped {name}": bad_index("checksum", flip(name)) for name in ("vectors.f32", "ids", "graph.faiss")},
    "index: gone": bad_index("vectors.f32 is missing", gone("vectors.f32")),
    "index: model": bad_index("name", put("index.json", "model", "name", value=3)),
    "index: another pooling": bad_index("not have the pooling", put("index.json", "model", "pooling", value="cls")),
    "embeddings: empty npy": bad_embeddings("00000.npy", text("4x32/00000.npy", "")),
    "embeddings: cut npy": bad_embeddings("00001.npy", cut("4x32/00001.npy")),
    "embeddings: flipped npy": bad_embeddings("00001.npy", flip("4x32/00001.npy", 0.9)),
    "embeddings: no marker": bad_embeddings("00000.npy", both(gone("done/00000.json"),
                                            array("4x32/00000.npy", np.ones((8, 7), np.float32)))),
    "embeddings: texts": bad_embeddings("00000.npy", both(gone("done/00000.json"),
                                                          array("4x32/00000.npy", np.full((8, 32), "a")))),
    "embeddings: one axis": bad_embeddings("00000.npy", both(gone("done/00000.json"),
                                                             array("4x32/00000.npy", np.ones(8, np.float32)))),
    "embeddings: no ids": bad_embeddings("ids", both(gone("done/00000.json"), gone("ids/00000.json"))),
    "embeddings: number ids": bad_embeddings("ids", both(gone("done/00000.json"), text("ids/00000.json", "[1, 2]"))),
    "embeddings: deep ids": bad_embeddings("read", both(gone("done/00000.json"), text("ids/00000.json", DEEP))),
    "embeddings: rows": bad_embeddings("20 texts instead of 21", put("embeddings.json", "rows", value=21)),
    "embeddings: no shard": bad_embeddings("00002.npy", gone("4x32/00002.npy")),
    # checkpoints
    **{f"checkpoint: flipped {name}": bad_checkpoint(f"{name} is damaged", flip(f"checkpoint-4/{name}", place))
       for name, place in (("optimizer.pt", 0.5), ("rng_state.pth", 0.5), ("scheduler.pt", 0.1),
                           ("model.safetensors", 0.9), ("training_args.bin", 0.5), ("1_Pooling/config.json", 0.5))},
    **{f"checkpoint: cut {name}": bad_checkpoint(f"{name} is cut off", cut(f"checkpoint-4/{name}"))
       for name in ("optimizer.pt", "model.safetensors", "scheduler.pt")},
    **{f"checkpoint: state {value!r}": bad_checkpoint("trainer_state.json is", put(
        "checkpoint-4/trainer_state.json", "global_step", value=value)) for value in (None, "4", 4.5, [])},
    "checkpoint: tokenizer": bad_checkpoint("tokenizer.json is missing", gone("checkpoint-4/tokenizer.json")),
    **{f"checkpoint: checksums {content!r}": bad_checkpoint(".checksums.json is damaged", text(
        "checkpoint-4/.checksums.json", content)) for content in ("[]", "{", '{"a": 3}', '{"../x": [1, "a"]}')},
    "checkpoint: state bytes": bad_checkpoint("trainer_state.json", text("checkpoint-4/trainer_state.json", b"\xff{")),
    "checkpoint: state list": bad_checkpoint("trainer_state.json is", text("checkpoint-4/trainer_state.json", "[]")),
    # flags
    **{f"flag: finetune {name} {value}": bad_flags(finetune, f"{name}: ", f"--{name}", value) for name, value in (
        ("num_train_epochs", "0"), ("num_train_epochs", "nan"), ("gradient_accumulation_steps", "-1"),
        ("loss_scale", "0"), ("loss_scale", "nan"), ("alignment_weight", "-1"), ("lora_alpha", "0"), ("lora_r", "-1"),
        ("max_eval_samples", "-1"), ("max_train_samples", "0"), ("per_device_eval_batch_size", "0"),
        ("learning_rate", "nan"), ("learning_rate", "-1"), ("learning_rate", "inf"), ("adam_beta2", "2"),
        ("adam_beta1", "-0.1"), ("weight_decay", "-1"), ("max_grad_norm", "nan"), ("warmup_steps", "-2"),
        ("dataloader_num_workers", "-1"), ("max_length", "100000"), ("max_length", "-1"), ("max_steps", "-7"),
        ("save_steps", "-1"), ("seed", "-1"), ("initial_share", "nan"), ("gradient_cache_chunk_size", "0"),
    )},
    **{f"flag: pretrain {name} {value}": bad_flags(pretrain, f"{name}: ", f"--{name}", value) for name, value in (
        ("max_eval_samples", "0"), ("learning_rate", "nan"), ("num_train_epochs", "0"), ("max_length", "100000"),
        ("mlm_probability", "nan"), ("per_device_train_batch_size", "0"))},
    **{f"flag: elasticize {name} {value}": bad_flags(elasticize, f"{name}: ", f"--{name}", value) for name, value in (
        ("num_pairs", "0"), ("held_out", "-1"), ("max_documents", "0"), ("effort", "huge"), ("learning_rate", "nan"),
        ("max_length", "1"), ("embedding_weight", "-1"), ("sizes", "9x99"))},
    **{f"flag: {run.__name__[12:]} {name} {value}": bad_flags(run, f"{name}: ", f"--{name}", value)
       for run, name, value in (
        (encode, "max_length", "100000"), (encode, "max_length", "-1"), (encode, "batch_size", "0"),
        (encode, "shard_size", "-1"), (encode, "sizes", "9x99"), (encode, "sizes", "x"), (encode, "sizes", "1x8x8"),
        (evaluate, "max_length", "100000"), (evaluate, "max_length", "0"), (evaluate, "batch_size", "-1"),
        (evaluate, "sizes", "٣x8"), (plan, "max_ms_per_text", "nan"), (plan, "max_ms_per_text", "-1"),
        (plan, "max_bytes_per_vector", "inf"), (plan, "max_length", "-1"), (plan, "corpus_size", "0"),
        (plan, "precision", "int3"), (mine_negatives, "max_length", "100000"), (mine_negatives, "margin", "nan"),
        (export, "num_layers", "9"), (export, "dim", "0"), (classify, "max_eval_samples", "-1"),
        (classify, "learning_rate", "nan"), (search, "k", "0"), (search, "k", "-3"))},
    **{f"approximate: {spec}": bad_flags(build_index, "approximate: ", "--approximate", f"8:{spec}")
       for spec in ("HNSW0", "HNSW1", "HNSW", "HNSW99999", "IVF0,Flat", "IVF999,Flat", "IVF4", "PQ4", "Flat", "")},
    **{f"approximate: dim {dim}": bad_flags(build_index, "approximate: ", "--approximate", f"{dim}:HNSW8")
       for dim in ("0", "-1", "99", "²", "")},
    **{f"prefix: {prefix}": bad_flags(build_index, "prefixes: ", "--prefixes", prefix)
       for prefix in ("0", "99", "8:int3", "²", "8:", "-1")},
    **{f"stages: {stages}": bad_flags(search, "stages: ", "--stages", stages)
       for stages in ("²:3", "8:3:int3", "8:0", "0:5", "99:5", "8:5,8:9", ",", "8:5,8:3:binary", "9" * 5000 + ":1")},
}  # fmt: skip


@pytest.fixture(scope="module")
def workspace(backbone_path, tmp_path_factory):
    pytest.importorskip("faiss")
    folder = tmp_path_factory.mktemp("hostile")
    h.make(folder, backbone_path("bert"))
    return folder


def test_the_table_is_long():
    assert len(CASES) >= 150


@pytest.mark.parametrize("name", CASES)
def test_one_line(name, workspace, tmp_path, capfd, monkeypatch):
    case, bad = CASES[name], tmp_path / "bad"
    if case.part is not None:
        shutil.copytree(workspace / case.part, bad) if case.part else bad.mkdir()
        case.change(bad)
    places = {"w": workspace, "bad": bad, "out": tmp_path / "out"}
    flags = [flag.format(**places) if "{" in flag else flag for flag in case.flags]
    before, damaged = h.contents(workspace), h.contents(tmp_path)
    capfd.readouterr()
    monkeypatch.setattr("sys.argv", ["script.py"])
    with pytest.raises(SystemExit) as stopped:
        case.run.main(flags)
    printed = capfd.readouterr()
    assert stopped.value.code == 2, printed.err[-2000:]
    lines = printed.err.splitlines()
    assert len(lines) == 1, printed.err[-2000:]
    assert lines[0].startswith("script.py: error: ")
    assert case.message in lines[0]
    assert h.contents(workspace) == before
    after = h.contents(tmp_path)
    assert {path: content for path, content in after.items() if path in damaged} == damaged
    assert not [path for path in after if path not in damaged and not path.startswith("out/")]
