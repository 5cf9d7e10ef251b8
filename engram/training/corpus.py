"""The default corpus: the text of the Python environment, which every machine that can train already holds.

Each module of the standard library and of the installed packages gives up to two documents: `code`, its source
without docstrings, and `prose`, its docstrings; documentation files and package descriptions are prose too.
"""

from __future__ import annotations

import ast
import hashlib
import re
import sysconfig
import warnings
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

DOMAINS = ("code", "prose")
HELD_OUT_SHARE = 0.04  # of the bytes, in whole packages, for validation
MIN_BYTES, MAX_BYTES = 256, 256 * 1024  # of a file or document; what is larger is mostly generated or a table
NEAR_COPY_SHARE = 0.6  # of a document's lines found in one earlier document

_PROSE_SUFFIXES = (".md", ".rst", ".txt")
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "node_modules"}
_LEGAL = re.compile(r"licen[cs]e|copying|notice|copyright|authors|third.?party", re.IGNORECASE)
_LEGAL_COMMENT = re.compile(r"licen[cs]e|copyright", re.IGNORECASE)
_TOP_COMMENT = re.compile(r"(?:#[^\n]*\n)+")
_MANY_BLANK_LINES = re.compile(r"\n{4,}")
_DATA_LINE = re.compile(r"""\s*(?:[\d"'\[({\\)\]}]|[a-z]{1,2}["']|-\d)""")
# This project, what it installs beside itself, and its description: a corpus must not change with our own README.
_DEVELOPED_HERE = re.compile(r"engram|eval|_engram_lm_eval|engram_moe-.*\.dist-info")


class Document(NamedTuple):
    """One text of the corpus: its domain and the package it comes from."""

    text: str
    domain: str
    package: str


@dataclass(frozen=True)
class SourceFile:
    """A file that may hold documents; `digest` is the SHA-256 of its content, on which its place in the order rests."""

    path: Path
    package: str
    n_bytes: int
    digest: str

    @property
    def domains(self) -> tuple[str, ...]:
        """The domains of the documents that this file can give."""
        return DOMAINS if self.path.suffix == ".py" else ("prose",)

    def order_key(self, domain: str) -> bytes:
        """Uniform on all documents and a function of their content alone: any prefix of the order is a fair sample."""
        return hashlib.sha256(f"{domain} {self.digest}".encode()).digest()


class PythonEnvironment:
    """The documents under the folders `roots` (default: the running Python's library and its packages).

    `validation()` are the documents of the held-out packages, `training()` those of the others, both in the order
    of their content hash and free of copies and near-copies; no training document is a near-copy of a held-out one.
    """

    domains: tuple[str, ...] = DOMAINS

    def __init__(self, roots: Sequence[Path] | None = None) -> None:
        self.files = sorted(_scan(roots or environment_roots()), key=lambda f: (f.digest, f.package, f.path.name))
        self.held_out = held_out_packages(self.files)

    @property
    def fingerprint(self) -> str:
        """Hex SHA-256 of every file's package and content."""
        whole = hashlib.sha256()
        for file in self.files:
            whole.update(f"{file.digest} {file.package} {file.path.suffix}\n".encode())
        return whole.hexdigest()

    def validation(self) -> Iterator[Document]:
        """Documents of the held-out packages."""
        yield from self._held_out_documents

    def training(self) -> Iterator[Document]:
        """Documents of all other packages."""
        copies = NearCopies()
        for document in self._held_out_documents:
            copies.is_new(document.text)
        yield from self._documents(copies, held_out=False)

    @cached_property
    def _held_out_documents(self) -> list[Document]:
        return list(self._documents(NearCopies(), held_out=True))

    def _documents(self, copies: NearCopies, held_out: bool) -> Iterator[Document]:
        chosen: dict[str, SourceFile] = {}
        for file in self.files:
            if (file.package in self.held_out) == held_out:
                chosen.setdefault(file.digest, file)
        places = [(file.order_key(domain), domain, file) for file in chosen.values() for domain in file.domains]
        for _, domain, file in sorted(places, key=lambda place: place[0]):
            text = _text_of(file, domain)
            if is_natural(text) and copies.is_new(text):
                yield Document(text, domain, file.package)


def environment_roots() -> list[Path]:
    """Folders of the standard library and of the installed packages of the running Python."""
    paths = sysconfig.get_paths()
    return list(dict.fromkeys(Path(paths[name]) for name in ("stdlib", "purelib", "platlib")))


def _scan(roots: Iterable[Path]) -> Iterator[SourceFile]:
    for root in roots:
        packages = _packages_of_distributions(root)
        for path in _walk(root):
            top = path.relative_to(root).parts[0].removesuffix(".py")
            package = packages.get(top, top)
            if _DEVELOPED_HERE.fullmatch(package) or not _holds_documents(path):
                continue
            content = path.read_bytes()
            if MIN_BYTES <= len(content) <= MAX_BYTES:
                yield SourceFile(path, package, len(content), hashlib.sha256(content).hexdigest())


def _walk(folder: Path) -> Iterator[Path]:
    for entry in sorted(folder.iterdir()):
        if entry.is_symlink() or entry.name in _SKIPPED_FOLDERS or entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from _walk(entry)
        else:
            yield entry


def _holds_documents(path: Path) -> bool:
    if path.suffix == ".py" or path.name == "METADATA":
        return True
    return path.suffix in _PROSE_SUFFIXES and not _LEGAL.search(path.name)


def _packages_of_distributions(root: Path) -> dict[str, str]:
    """For each `*.dist-info` folder the package that it describes: the one that owns most of the files it lists."""
    packages = {}
    for record in root.glob("*.dist-info/RECORD"):
        lines = record.read_text(encoding="utf-8", errors="replace").splitlines()
        tops = Counter(line.split("/")[0].split(",")[0].removesuffix(".py") for line in lines if ".py," in line)
        if tops:
            packages[record.parent.name] = tops.most_common(1)[0][0]
    return packages


def held_out_packages(files: Iterable[SourceFile], share: float = HELD_OUT_SHARE) -> frozenset[str]:
    """Packages for validation: in the order of their names' hashes, each that still fits in `share` of the bytes."""
    sizes: Counter[str] = Counter()
    for file in files:
        sizes[file.package] += file.n_bytes
    room = share * sizes.total()
    chosen = set()
    for package in sorted(sizes, key=lambda name: hashlib.sha256(name.encode()).digest()):
        if sizes[package] <= room:
            chosen.add(package)
            room -= sizes[package]
    return frozenset(chosen)


def _text_of(file: SourceFile, domain: str) -> str:
    """The document of this domain in a file; empty where there is none."""
    try:
        text = normalized(file.path.read_bytes().decode("utf-8"))
    except UnicodeDecodeError:
        return ""
    if file.path.name == "METADATA":
        return text.partition("\n\n")[2]
    if file.path.suffix != ".py":
        return text
    try:
        code, prose = split_docstrings(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # what other people's files do to a parser
        return ""
    return without_legal_comment(code) if domain == "code" else prose


def normalized(text: str) -> str:
    """Unix line ends, no byte-order mark, no white space at line ends, one newline at the end."""
    text = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    return "\n".join(line.rstrip() for line in text.split("\n")).strip("\n") + "\n"


def split_docstrings(source: str) -> tuple[str, str]:
    """Split Python source in its code without docstrings and its docstrings, each in the order of the source.

    A body that was a docstring alone becomes `...`. Raises what `ast.parse` raises.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the parser, about other people's escapes
        tree = ast.parse(source)
    found = sorted(_docstrings(tree), key=lambda docstring: docstring[0].lineno)
    lines = source.split("\n")
    for statement, _, alone in reversed(found):
        first, last = statement.lineno - 1, (statement.end_lineno or statement.lineno) - 1
        before = lines[first].encode()[: statement.col_offset].decode()
        after = lines[last].encode()[statement.end_col_offset :].decode().lstrip(" ;")
        rest = before + ("..." if alone else "") + after
        lines[first : last + 1] = [rest] if rest.strip() else []
    code = _MANY_BLANK_LINES.sub("\n\n\n", "\n".join(lines))
    return normalized(code), normalized("\n\n".join(text for _, text, _ in found))


def _docstrings(tree: ast.Module) -> Iterator[tuple[ast.stmt, str, bool]]:
    """Each docstring's statement, its text, and whether it is all there is in its body."""
    nodes: list[ast.AST] = [tree]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text is not None:
                yield node.body[0], text, len(node.body) == 1 and not isinstance(node, ast.Module)
        for block in ("body", "orelse", "finalbody", "handlers", "cases"):  # statements alone: expressions hold none
            nodes += [child for child in getattr(node, block, ()) if not isinstance(child, ast.expr)]


def without_legal_comment(code: str) -> str:
    """Drop the comment at the top if it is a licence or copyright note, as thousands of files share it."""
    header = _TOP_COMMENT.match(code)
    return code[header.end() :].lstrip("\n") if header and _LEGAL_COMMENT.search(header[0]) else code


def is_natural(text: str) -> bool:
    """Whether somebody wrote this text to be read: not minified, encoded, a table of data or a generated list."""
    content = text.encode()
    if not MIN_BYTES <= len(content) <= MAX_BYTES:
        return False
    lines = text.split("\n")
    data_lines = sum(1 for line in lines if _DATA_LINE.match(line))
    n_packed = len(zlib.compress(content, 1))
    return (
        max(map(len, lines)) <= 1000
        and data_lines <= 0.5 * len(lines)
        and sum(map(str.isalpha, text)) >= 0.4 * len(text)
        and len(content) <= 1.2 * len(text)
        and 0.08 * len(content) <= n_packed <= 0.65 * len(content) + 100  # 100: a short text has nothing to repeat yet
    )


class NearCopies:
    """Remembers documents by a sample of their lines, and tells which new ones are copies of one of them.

    A document is a copy when its whole text was met before, and a near-copy when more than `NEAR_COPY_SHARE` of its
    sampled lines stand in one earlier document: vendored and forked files with their imports rewritten, not texts
    that share a licence or a few functions.
    """

    def __init__(self) -> None:
        self._owner_of_line: dict[int, int] = {}
        self._texts: set[bytes] = set()

    def is_new(self, text: str) -> bool:
        """Whether `text` is neither copy nor near-copy; if so it is remembered."""
        digest = hashlib.sha256(text.encode()).digest()
        if digest in self._texts:
            return False
        lines = {zlib.crc32(line.strip().encode()) for line in text.split("\n") if len(line) >= 16}
        sample = {line for line in lines if line % 4 == 0} if len(lines) >= 64 else lines
        owners = Counter(owner for line in sample if (owner := self._owner_of_line.get(line)) is not None)
        if owners and max(owners.values()) > NEAR_COPY_SHARE * len(sample):
            return False
        for line in sample:
            self._owner_of_line.setdefault(line, len(self._texts))
        self._texts.add(digest)
        return True
