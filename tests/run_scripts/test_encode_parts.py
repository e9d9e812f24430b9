"""encode.py --part: array jobs write the files of one process, one after another or all at once."""

import io
import sys
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import numpy as np
import pytest
from test_encode_script import TEXTS, flags, start  # noqa: F401 (start is a fixture)

from retrieval import shards
from retrieval.reading import Text
from retrieval.shards import Store, check_settings, encode_shards, finish, read_shards
from run_scripts import encode
from run_scripts.shared import checks


def files(folder) -> dict[str, bytes]:
    """Everything in a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_parts_write_the_files_of_one_process(start, monkeypatch, capsys):  # noqa: F811
    def run(name: str, *more: str) -> str:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\n".join(TEXTS).encode())))
        encode.main([*flags(start, name), "--input", "-", *more])
        return capsys.readouterr().out

    run("whole")
    assert "6 of 9 shards are not in" in (printed := run("parts", "--part", "2/3"))
    assert "of --part 1/3, 3/3; the part that ends last, or any part that is run again, completes it" in printed
    assert "60 texts in 9 shards, 0 lines left out; 21 encoded here" in printed
    assert sorted(path.name for path in (start / "parts" / "2x8").iterdir()) == ["00001.npy", "00004.npy", "00007.npy"]
    with pytest.raises(ValueError, match="is not complete"):
        next(read_shards(start / "parts", "2x8"))
    assert "of --part 1/3;" in run("parts", "--part", "3/3")
    assert "yet" not in run("parts", "--part", "1/3")
    assert files(start / "parts") == files(start / "whole")
    (start / "parts" / "2x8" / "00001.npy").unlink()
    (start / "parts" / "embeddings.json").unlink()
    assert "1 of 9 shards are not in" in run("parts", "--part", "3/3")
    assert "7 encoded here" in run("parts", "--part", "2/3")
    assert "0 encoded here" in run("parts", "--part", "12/12"), "a part without a shard"
    assert files(start / "parts") == files(start / "whole")


SETTINGS = {"sizes": ["1x4"], "format": "npy", "model": "m"}
CORPUS = [Text(str(number), f"text {number}") for number in range(60)]


def lengths(texts: list[str]) -> dict[str, np.ndarray]:
    return {"1x4": np.array([[len(text)] * 4 for text in texts], np.float32)}


def encode_part(folder, part: int, parts: int, wait=lambda: None) -> bool:
    """What encode.py does, with vectors that cost nothing; whether this part has completed the folder."""
    wait()
    check_settings(folder, SETTINGS)
    corpus = encode_shards(CORPUS, lengths, folder, ["1x4"], 1, "npy", part, parts)
    wait()
    is_whole = not Store(folder, ["1x4"], "npy").find_missing(corpus.keys)
    if is_whole:
        finish(folder, SETTINGS, corpus)
    return is_whole


@pytest.mark.parametrize("same", [False, True], ids=["parts", "one part started several times"])
def test_parts_at_the_same_time_write_the_files_of_one_process(same, tmp_path):
    assert encode_part(tmp_path / "whole", 0, 1)
    for name in map(str, range(5)):
        barrier = Barrier(4, timeout=60)
        with ThreadPoolExecutor(4) as threads:
            jobs = [
                threads.submit(encode_part, tmp_path / name, *((0, 1) if same else (part, 4)), barrier.wait)
                for part in range(4)
            ]
            assert all(job.result() for job in jobs)
        assert files(tmp_path / name) == files(tmp_path / "whole")


def test_parts_with_other_settings_are_refused_even_if_they_start_at_once(tmp_path, monkeypatch):
    write = shards._write_first

    def write_after_another(path, content):
        """Between the check and the writing, another part writes its settings."""
        write(path, {**content, "model": "another"})
        write(path, content)

    monkeypatch.setattr(shards, "_write_first", write_after_another)
    with pytest.raises(ValueError, match="has embeddings made with model 'another', not 'm'"):
        check_settings(tmp_path / "out", SETTINGS)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["settings.json"]


def test_a_folder_in_which_another_part_has_just_started_is_no_other_folder(tmp_path):
    (tmp_path / ".settings.json.0123abcd").write_text("{")
    assert shards.is_ours(tmp_path)
    (tmp_path / "thesis.txt").write_text("years")
    assert not shards.is_ours(tmp_path)


def test_a_shard_of_another_part_is_missing_if_its_texts_have_changed(tmp_path):
    encode_part(tmp_path, 0, 1)
    store, keys = Store(tmp_path, ["1x4"], "npy"), [shards.Shard(n, [text]).key for n, text in enumerate(CORPUS)]
    assert store.find_missing(keys) == []
    (tmp_path / "1x4" / "00003.npy").write_bytes(b"short")
    (tmp_path / "done" / "00005.json").write_text('{"crc32": 1, "files": {"ids/00005.json": 3}}')
    keys[7] += 1
    assert store.find_missing(keys) == [3, 5, 7]


@pytest.mark.parametrize("text", ["0/4", "5/4", "x", "1/0", "1", "1/2/3", "-1/4", "1/4 ", "\u0661/4", ""])
def test_other_parts_are_refused(text):
    with pytest.raises(ValueError, match=r"part: .* is not allowed; write NUMBER/PARTS with NUMBER from 1 to PARTS"):
        checks.parse_part(text)
    assert checks.parse_part("4/4") == (3, 4)
