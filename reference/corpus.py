"""The text of the reference model: the standard library of the running Python.

Nothing is downloaded. Every Python has its own library on disk, so anyone can rebuild
this corpus; the digests stored beside the model tell whether it is the same one.

Three kinds of documents come out of it:

* source files, whole;
* the language reference that `help()` shows (`pydoc_data.topics`), as prose;
* short chats made from signatures and docstrings, so that the chat template means something.

A fixed list of whole modules is held out. They are never trained on, in no form.
"""

import ast
import hashlib
import json
import random
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

HELD_OUT = (
    "argparse.py",
    "asyncio/queues.py",
    "bisect.py",
    "calendar.py",
    "csv.py",
    "fractions.py",
    "graphlib.py",
    "heapq.py",
    "json/__init__.py",
    "json/decoder.py",
    "json/encoder.py",
    "json/scanner.py",
    "json/tool.py",
    "queue.py",
    "sched.py",
    "statistics.py",
    "textwrap.py",
)
_TOPICS = "pydoc_data/topics.py"
_SKIPPED_FOLDERS = {"site-packages", "test", "tests", "idle_test", "encodings", "ensurepip"}
_SKIPPED_PREFIXES = ("_sysconfigdata", "this.py")
_CHUNK_BYTES = 4096
_MIN_FILE_BYTES = 200


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One library file: path relative to the library, with forward slashes, and its text."""

    path: str
    text: str

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()

    @property
    def module(self) -> str:
        return self.path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


@dataclass(frozen=True, slots=True)
class Turn:
    """One question and its answer, without any markup."""

    question: str
    answer: str


def library_files() -> list[SourceFile]:
    """All usable source files of the running Python's standard library, sorted by path."""
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if _SKIPPED_FOLDERS & set(relative.parts) or path.name.startswith(_SKIPPED_PREFIXES):
            continue
        text = path.read_text(encoding="utf-8", errors="ignore")
        if len(text) >= _MIN_FILE_BYTES:
            found.append(SourceFile(relative.as_posix(), text))
    return found


def split(files: list[SourceFile]) -> tuple[list[SourceFile], list[SourceFile]]:
    """Files to train on, and files held out for evaluation."""
    train = [file for file in files if file.path not in HELD_OUT]
    held_out = [file for file in files if file.path in HELD_OUT]
    return train, held_out


def documents(files: list[SourceFile]) -> Iterator[str]:
    """Plain training documents: source text, and each help topic as its own document."""
    for file in files:
        if file.path == _TOPICS:
            yield from _topics(file)
        else:
            yield file.text


def _topics(file: SourceFile) -> Iterator[str]:
    table = ast.parse(file.text).body[-1]
    if isinstance(table, ast.Assign):
        topics: dict[str, str] = ast.literal_eval(table.value)
        yield from topics.values()


def chats(files: list[SourceFile]) -> Iterator[Turn]:
    """One short chat for each documented public function, class and method."""
    for file in files:
        for name, node in _documented(ast.parse(file.text), file.module):
            docstring = ast.get_docstring(node) or ""
            paragraph = " ".join(docstring.split("\n\n")[0].split())
            if 15 <= len(paragraph) <= 600:
                yield _turn(name, node, paragraph)


_Documented = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def _documented(parent: ast.AST, prefix: str) -> Iterator[tuple[str, _Documented]]:
    for node in ast.iter_child_nodes(parent):
        if isinstance(node, _Documented) and not node.name.startswith("_"):
            name = f"{prefix}.{node.name}"
            yield name, node
            if isinstance(node, ast.ClassDef):
                yield from _documented(node, name)


def _turn(name: str, node: _Documented, paragraph: str) -> Turn:
    is_class = isinstance(node, ast.ClassDef)
    call = name if isinstance(node, ast.ClassDef) else f"{name}({ast.unparse(node.args)})"
    questions = (
        f"What does {call} do?" if not is_class else f"What is {name}?",
        f"Explain {name} in Python.",
        f"What is {name} for?",
        f"Describe {call}.",
    )
    choice = int(hashlib.sha256(name.encode()).hexdigest(), 16) % (len(questions) + 1)
    if choice == len(questions):
        return Turn(f"Which name in the standard library fits this? {paragraph}", name)
    return Turn(questions[choice], paragraph)


def chunks(text: str) -> Iterator[str]:
    """Pieces of at most 4096 bytes, cut at line ends (a longer line is kept whole)."""
    piece, size = "", 0
    for line in text.splitlines(keepends=True):
        length = len(line.encode())
        if piece and size + length > _CHUNK_BYTES:
            yield piece
            piece, size = "", 0
        piece, size = piece + line, size + length
    if piece.strip():
        yield piece


def write_texts(folder: Path, *, seed: int = 0) -> None:
    """Write calibration.jsonl, evaluation.jsonl and next_line_mc.jsonl into `folder`."""
    train, held_out = split(library_files())
    folder.mkdir(parents=True, exist_ok=True)
    calibration = [chunk for text in documents(train) for chunk in chunks(text)]
    random.Random(seed).shuffle(calibration)
    evaluation = [chunk for file in held_out for chunk in chunks(file.text)]
    _write_texts(folder / "calibration.jsonl", calibration, limit=400_000)
    _write_texts(folder / "evaluation.jsonl", evaluation, limit=400_000)
    _write_lines(folder / "next_line_mc.jsonl", next_line_items(held_out, count=200, seed=seed))


def _write_texts(path: Path, texts: list[str], *, limit: int) -> None:
    kept: list[dict[str, object]] = []
    size = 0
    for text in texts:
        size += len(text.encode())
        if size > limit:
            break
        kept.append({"text": text})
    _write_lines(path, kept)


def _write_lines(path: Path, records: list[dict[str, object]]) -> None:
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    path.write_text("".join(lines), encoding="utf-8", newline="\n")


def next_line_items(
    files: list[SourceFile], *, count: int, seed: int, context_lines: int = 12
) -> list[dict[str, object]]:
    """Four-way questions "which line comes next?" from files that were held out.

    Wrong lines come from elsewhere in these files, have about the same length, and are given
    the indentation of the true one, so that only the content can tell. Each choice starts with
    the line break, so the context never ends in white space that a tokenizer would move.
    """
    rng = random.Random(seed)
    lines = [(file.path, file.text.splitlines()) for file in files]
    pool = [line.strip() for _, body in lines for line in body if len(line.strip()) >= 20]
    places = [
        (path, body, row)
        for path, body in lines
        for row in range(context_lines, len(body))
        if len(body[row].strip()) >= 20 and body[row - 1].strip()
    ]
    rng.shuffle(places)
    items: list[dict[str, object]] = []
    for path, body, row in places[: 4 * count]:
        wrong = _wrong_lines(body[row].strip(), pool, rng)
        if len(wrong) == 3 and len(items) < count:
            context = "\n".join(body[row - context_lines : row]).strip("\n").rstrip()
            item = _item(body[row].rstrip(), wrong, rng)
            items.append({"id": f"{path}:{row + 1}", "context": context, **item})
    return items


def _wrong_lines(true: str, pool: list[str], rng: random.Random) -> list[str]:
    near = {line for line in pool if abs(len(line) - len(true)) <= 2 and line != true}
    return rng.sample(sorted(near), 3) if len(near) >= 3 else []


def _item(true: str, wrong: list[str], rng: random.Random) -> dict[str, object]:
    indentation = true[: len(true) - len(true.lstrip())]
    choices = ["\n" + true] + [f"\n{indentation}{line}" for line in wrong]
    rng.shuffle(choices)
    return {"choices": choices, "answer": choices.index("\n" + true)}
