"""The documents of a corpus, from whatever encode.py reads, a saved dataset or the Hub."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import datasets

from modeling_2dmse import TwoDMSEModel
from retrieval.reading import NO_IDS, Malformed, read_texts, read_title
from run_scripts.shared import output
from trainer.pseudo_pairs import FEWEST, Document, draw_documents, normalize
from trainer.shared.headings import read_names
from trainer.shared.tables import is_saved, load_hub_dataset, open_saved

if TYPE_CHECKING:
    from run_scripts.elasticize import CorpusArguments

# Lines that cannot be read are named one by one up to this many.
_NAMED = 5
# Similarities of fewer texts say nothing.
_FEWEST_HELD = 3
# Documents whose tokens are looked at, and characters of each for a token that the model reads.
_LOOKED_AT, _PER_TOKEN = 500, 20
# The share of unknown tokens, and of documents that begin alike, from which a line says so.
_MANY = 0.1


def find_source(data_args: CorpusArguments) -> tuple[str, str]:
    """The flag that names the corpus, and its value."""
    if data_args.corpus_file is not None:
        return "corpus_file", data_args.corpus_file
    return "dataset_name", str(data_args.dataset_name)


def read_documents(data_args: CorpusArguments, seed: int) -> tuple[list[Document], list[Document]]:
    """Different documents, drawn from the whole corpus: those to learn from, and those that are held out."""
    argument, name = find_source(data_args)
    stream = read_corpus(
        data_args.corpus_file,
        data_args.dataset_name,
        data_args.dataset_config,
        data_args.dataset_split,
        data_args.text_column,
    )
    documents = draw_documents(stream, data_args.max_documents, seed)
    if len(documents) < FEWEST:
        what = "no text" if not documents else f"{len(documents)} different texts, and {FEWEST} are needed"
        raise ValueError(f"{argument}: {name} has {what}")
    held = min(data_args.held_out, len(documents) // 10)
    body = lambda document: normalize(document.text or document.title)
    known = set(map(body, documents[held:]))  # a text may be there again under another title
    learned, unseen = documents[held:], [document for document in documents[:held] if body(document) not in known]
    if len(unseen) < _FEWEST_HELD:
        learned, unseen = documents, []
    too_few = f" (fewer than {_FEWEST_HELD} say nothing)" if data_args.held_out and not unseen else ""
    output.say(f"{len(learned)} documents to learn from, {len(unseen)} held out for the report{too_few}")
    return learned, unseen


def read_corpus(
    path: str | None, name: str | None, config: str | None, split: str, text_column: str
) -> Iterator[Document]:
    """The documents, one after another.

    Args:
        path: a file or folder that `retrieval.reading.read_texts` reads, or a folder of `datasets.save_to_disk`.
        name: a dataset of the Hub, if there is no path; it is streamed.
        config: configuration of the dataset.
        split: split of the dataset, or of a saved folder that has several.
        text_column: column of the texts.

    Raises:
        ValueError: the corpus cannot be read, or does not have the column.
    """
    if path is None:
        rows = load_hub_dataset(str(name), config, split=split, streaming=True)
        return _rows(rows, text_column, "dataset_name")
    if is_saved(path):
        saved: Any = open_saved(path, "corpus_file")
        if isinstance(saved, datasets.DatasetDict):
            if split not in saved:
                raise ValueError(f"dataset_split: {path} has no split {split}; it has {', '.join(saved)}")
            saved = saved[split]
        return _rows(saved, text_column, "corpus_file")
    return _texts(path, text_column)


def _texts(path: str, text_column: str) -> Iterator[Document]:
    malformed, read, untitled, is_beir = 0, 0, 0, os.path.isdir(path)
    try:
        for item in read_texts(path, text_column, NO_IDS):
            if isinstance(item, Malformed):
                malformed += 1
                if malformed <= _NAMED:
                    output.say(f"line {item.line} was left out: {item.reason}")
            else:
                read += 1
                untitled += item.title is None
                title = item.title or ""
                # `read_texts` puts the title of a BEIR document before its text.
                text = item.text.removeprefix(title) if is_beir else item.text
                yield Document(text.strip(), title)
    except ValueError as error:
        message = str(error).replace("input: there is no column", f"text_column: corpus_file {path} has no column", 1)
        raise ValueError(message.replace("input:", "corpus_file:", 1)) from error
    if malformed > _NAMED:
        output.say(f"{malformed} lines were left out")
    _say_untitled(untitled)
    if malformed and not read:
        names = read_names(os.path.join(path, "corpus.jsonl") if is_beir else path)
        if names and text_column not in names:
            found = f"its first line has {', '.join(names)}"
            raise ValueError(f"text_column: no line of corpus_file {path} has the column {text_column}; {found}")
        raise ValueError(f"corpus_file: {path} has no text: none of its {malformed} lines can be used, see above")


def _rows(rows: Iterable[dict], text_column: str, argument: str) -> Iterator[Document]:
    untitled = 0
    for number, row in enumerate(rows, 1):
        if text_column not in row:
            raise ValueError(f"text_column: {argument} has no column {text_column} among {', '.join(row)}")
        text, title = row[text_column], read_title(row.get("title"))
        if text is not None and not isinstance(text, str):
            raise ValueError(f"{argument}: row {number} of {text_column} is a {type(text).__name__}, not a text")
        untitled += title is None
        yield Document((text or "").strip(), title or "")
    _say_untitled(untitled)


def _say_untitled(count: int) -> None:
    if count:
        output.say(f"rows whose title is neither a text nor a number: {count}; they are taken without a title")


def check_read(model: TwoDMSEModel, documents: Sequence[Document], name: str) -> None:
    """Say so if a model cannot tell documents apart: it does not know their tokens, or what it reads of them is alike.

    Args:
        model: the model, with its tokenizer and the number of tokens that it reads.
        documents: different documents, in a random order.
        name: the flag that names them.

    Raises:
        ValueError: all of them are the same to the model.
    """
    tokenizer, longest = model.tokenizer, model.max_length
    texts = [document.whole[: _PER_TOKEN * longest] for document in documents[:_LOOKED_AT]]
    rows = tokenizer(texts, add_special_tokens=False, truncation=True, max_length=longest)["input_ids"]
    tokens = list(itertools.chain.from_iterable(rows))
    unknown = tokens.count(tokenizer.unk_token_id) / max(1, len(tokens))
    language = "take an encoder that was made for this language (--model_name_or_path)"
    if unknown == 1:
        raise ValueError(f"{name}: the encoder knows none of its words or characters; {language}")
    if unknown > _MANY:
        output.say(f"{unknown:.0%} of the tokens of the corpus are unknown to this encoder; {language}")
    different = len(set(map(tuple, rows)))
    if different == 1:
        raise ValueError(
            f"{name}: the encoder reads the first {longest} tokens of a document, and they are the same in all; leave "
            "out what documents begin with"
        )
    alike = 1 - different / len(rows)
    if alike > _MANY:
        output.say(f"{alike:.0%} of the documents are like others in the {longest} tokens that the encoder reads")
