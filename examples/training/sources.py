"""Where tokens come from: the datasets hub, local Arrow, Parquet or JSON, text files, and conversations."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

Document = tuple[np.ndarray, np.ndarray | None]
"""Tokens, int32, and which of them are learned (bool); None: all."""

TEXT = {".txt", ".md", ".rst", ".text", ".py", ".tex", ".html"}
TABLES = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".arrow": "arrow"}


class Bytes:
    """A tokenizer for tests and tiny models: UTF-8, one token per byte."""

    eos_token_id: int | None = None
    chat_template: str | None = None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return list(text.encode())

    def save_pretrained(self, folder: Any) -> None:
        """There is nothing to save."""


def tokenizer_of(name: str) -> Any:
    """A transformers tokenizer by name or folder, or "bytes". ValueError if there is none."""
    if name == "bytes":
        return Bytes()
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(f"expected a tokenizer in {name!r} (or --tokenizer), got none: {error}") from error


def documents(dataset: str, split: str, sft: bool, tokenizer: Callable[[], Any]) -> Iterator[Document]:
    """Every document of ``dataset``: a name on the datasets hub, a file or a folder.

    A folder of ``datasets.save_to_disk``; files of Arrow, Parquet or JSON lines with a column ``input_ids`` or
    ``text``; text files, one document each. With ``sft``: rows with ``messages`` (a list of ``role`` and ``content``)
    or with ``prompt`` and ``completion``; only what the assistant says is learned.

    Raises:
        ValueError: nothing of that kind there.
    """
    path = Path(dataset)
    if path.exists() and (files := _text_files(path)):
        if sft:
            raise ValueError(f"expected conversations for --sft, got text files in {dataset}")
        yield from _texts((file.read_text(errors="replace") for file in files), tokenizer())
        return
    rows = _rows(path, dataset, split)
    columns = set(rows.column_names or ())
    if sft:
        yield from _conversations(rows, columns, tokenizer())
    elif "input_ids" in columns:
        for row in rows:
            yield np.asarray(row["input_ids"], dtype=np.int32), None
    elif "text" in columns:
        yield from _texts((row["text"] for row in rows), tokenizer())
    else:
        raise ValueError(f"expected a column input_ids or text in {dataset}, got {sorted(columns)}")


def sizes(dataset: str) -> list[tuple[str, int]]:
    """Names and bytes of a local data set's files, by which one that has changed is told; of others nothing."""
    path = Path(dataset)
    files = [path] if path.is_file() else sorted(x for x in path.rglob("*") if x.is_file()) if path.is_dir() else []
    return [(x.relative_to(path).as_posix(), x.stat().st_size) for x in files]


def _text_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path] if path.suffix not in TABLES else []
    found = sorted(x for x in path.rglob("*") if x.is_file())
    return [] if any(x.suffix in TABLES for x in found) else [x for x in found if x.suffix in TEXT]


def _rows(path: Path, dataset: str, split: str) -> Any:
    import datasets

    if not path.exists() and (path.is_absolute() or dataset.startswith(".")):
        raise ValueError(f"expected a dataset, a file or a folder, got {dataset}, which does not exist")
    try:
        if path.is_dir() and ((path / "state.json").exists() or (path / "dataset_dict.json").exists()):
            found = datasets.load_from_disk(dataset)
        elif path.exists():
            files = [path] if path.is_file() else sorted(x for x in path.rglob("*") if x.suffix in TABLES)
            kinds = {TABLES[x.suffix] for x in files}
            if len(kinds) != 1:
                raise ValueError(
                    f"expected text files, or tables of one kind, in {dataset}, got {sorted(kinds) or 'none'}"
                )
            found = datasets.load_dataset(kinds.pop(), data_files=[os.fspath(x) for x in files], split="train")
        else:
            found = datasets.load_dataset(dataset, split=split)
    except (OSError, datasets.exceptions.DatasetNotFoundError, datasets.exceptions.DatasetGenerationError) as error:
        raise ValueError(f"expected a dataset in {dataset!r}, got {type(error).__name__}: {error}") from error
    if isinstance(found, dict):
        if split not in found:
            raise ValueError(f"expected --split to be one of {sorted(found)}, got {split!r}")
        found = found[split]
    return found


def _texts(texts: Iterator[str], tokenizer: Any) -> Iterator[Document]:
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for text in texts:
        yield np.asarray(tokenizer.encode(text) + end, dtype=np.int32), None


def _conversations(rows: Any, columns: set[str], tokenizer: Any) -> Iterator[Document]:
    for number, row in enumerate(rows):
        if "messages" in columns:
            messages = row["messages"]
        elif {"prompt", "completion"} <= columns:
            messages = [
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": row["completion"]},
            ]
        else:
            raise ValueError(f"expected columns messages, or prompt and completion, for --sft, got {sorted(columns)}")
        try:
            yield conversation(messages, tokenizer)
        except ValueError as error:
            raise ValueError(f"conversation {number}: {error}") from error


def conversation(messages: list[dict[str, str]], tokenizer: Any) -> Document:
    """One conversation in the tokenizer's chat template, and which of its tokens are the assistant's.

    What is learned after a prompt is what the template adds to it: the answer and its end. Without a template,
    ``<|role|>``, a line break, and the content.
    """
    tokens: list[int] = []
    learned: list[bool] = []
    for i, message in enumerate(messages):
        said = message["role"] == "assistant"
        if tokenizer.chat_template is None:
            head = tokenizer.encode(f"<|{message['role']}|>\n", add_special_tokens=not tokens)
            end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
            body = tokenizer.encode(f"{message['content']}\n", add_special_tokens=False) + end
            tokens += head + body
            learned += [False] * len(head) + [said] * len(body)
            continue
        if not said and any(later["role"] == "assistant" for later in messages[i + 1 :]):
            continue  # templates may refuse to end here; the next answer's prompt has it
        before = _templated(tokenizer, messages[:i], True) if said else tokens
        after = _templated(tokenizer, messages[: i + 1], False)
        if after[: len(before)] != before or before[: len(tokens)] != tokens:
            raise ValueError("expected a chat template that only appends, got one that changes what was said before")
        learned += [False] * (len(before) - len(tokens)) + [said] * (len(after) - len(before))
        tokens = after
    if not any(learned[1:]):
        raise ValueError("expected an answer of the assistant, got none")
    return np.asarray(tokens, dtype=np.int32), np.asarray(learned)


def _templated(tokenizer: Any, messages: list[dict[str, str]], prompt: bool) -> list[int]:
    found = tokenizer.apply_chat_template(messages, add_generation_prompt=prompt, tokenize=True, return_dict=False)
    return list(found)
