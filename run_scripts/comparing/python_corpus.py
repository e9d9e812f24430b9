"""The Python documentation of this machine as a folder in BEIR layout: a corpus that everyone has, with judgements.

    python -m run_scripts.comparing.python_corpus --output_dir out/python-corpus

Its documents are docstrings of the standard library and of the packages that this project depends on. Some of them,
from modules of their own, are without their summary, which is a query whose one right answer is the rest. What is
installed decides the texts: the same Python and `pip install -c constraints.txt` give the same folder.
"""

import json
import random
from dataclasses import dataclass, field
from pathlib import Path

from run_scripts.shared import cli, output, quickstart

QUERIES, OTHERS = 1000, 4000


@dataclass
class PythonCorpusArguments:
    """Where the folder goes."""

    output_dir: str = field(metadata={"help": "New folder for corpus.jsonl, queries.jsonl and qrels/test.tsv."})


def main(argv=None) -> None:
    """Parse, read the docstrings, write the folder."""
    with cli.user_errors():
        (args,) = cli.Parser(PythonCorpusArguments).parse(argv)
        write(Path(args.output_dir))


def write(folder: Path, queries: int = QUERIES, others: int = OTHERS, seed: int = 0) -> None:
    """Write the three files; ValueError if the folder is there."""
    if folder.exists():
        raise ValueError(f"output_dir: {folder} exists; name a new folder")
    train, held = quickstart.python_docs()
    rng = random.Random(seed)
    asked = rng.sample(list(held), min(queries, len(held)))
    whole = rng.sample(list(train), min(others, len(train)))
    documents = [row["positive"] for row in asked] + [f"{row['anchor']} {row['positive']}" for row in whole]
    corpus = [{"_id": str(i), "title": "", "text": text} for i, text in enumerate(documents)]
    judgements = "".join(f"q{i}\t{i}\t1\n" for i in range(len(asked)))
    with output.new_folder(folder) as partial:
        (partial / "qrels").mkdir()
        _write_lines(partial / "corpus.jsonl", corpus)
        _write_lines(
            partial / "queries.jsonl", [{"_id": f"q{i}", "text": row["anchor"]} for i, row in enumerate(asked)]
        )
        table = partial / "qrels" / "test.tsv"
        table.write_text(f"query-id\tcorpus-id\tscore\n{judgements}", encoding="utf-8")
    output.say(f"{len(documents)} documents and {len(asked)} queries in {folder}")


def _write_lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
