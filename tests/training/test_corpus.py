"""The default corpus: what becomes a document, in which domain and split, and in which order."""

import ast
import itertools
import random
import sysconfig
from pathlib import Path

import pytest

from engram.training.corpus import (
    Document,
    NearCopies,
    PythonEnvironment,
    is_natural,
    normalized,
    split_docstrings,
    without_legal_comment,
)

STDLIB = Path(sysconfig.get_paths()["stdlib"])
WORDS = Path(ast.__file__).read_text(encoding="utf-8").split()
WORDS = sorted({word for word in WORDS if word.isalpha() and word.isascii() and len(word) > 2})


def prose(seed: int, n_lines: int = 30) -> str:
    rng = random.Random(seed)
    return "\n".join(" ".join(rng.choices(WORDS, k=8)).capitalize() + "." for _ in range(n_lines)) + "\n"


def module(seed: int, n_functions: int = 12) -> str:
    rng = random.Random(seed)
    parts = [f'"""{prose(seed + 1000, 12)}"""\n']
    for i in range(n_functions):
        one, two, three = (f"{word}_{rng.randrange(1000)}" for word in rng.choices(WORDS, k=3))
        parts.append(
            f"def {one}_{i}({two}, {three}):\n"
            f'    """{" ".join(rng.choices(WORDS, k=12))}"""\n'
            f"    for {one} in {two}:\n        {three} += len({one})\n    return {three}\n"
        )
    return "\n".join(parts)


def write(path: Path, text: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """Sixty packages of one module and one page each."""
    for i in range(60):
        write(tmp_path / "site" / f"pack{i}" / "core.py", module(i))
        write(tmp_path / "site" / f"pack{i}" / "guide.md", prose(5000 + i))
    return tmp_path / "site"


def documents(env: PythonEnvironment) -> list[Document]:
    return [*env.training(), *env.validation()]


class WithoutDocstrings(ast.NodeTransformer):
    """An independent statement of what `code` is: the same tree with every docstring gone, `...` where it was alone."""

    def generic_visit(self, node: ast.AST) -> ast.AST:
        super().generic_visit(node)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if ast.get_docstring(node) is not None:
                node.body = node.body[1:]
            if not node.body and not isinstance(node, ast.Module):
                node.body = [ast.Expr(ast.Constant(...))]
        return node


@pytest.mark.parametrize(
    "name", ["argparse", "ast", "typing", "json/decoder", "asyncio/events", "abc", "logging/config"]
)
def test_code_is_the_module_without_its_docstrings_and_prose_is_those(name: str) -> None:
    source = normalized((STDLIB / f"{name}.py").read_text(encoding="utf-8"))
    code, docs = split_docstrings(source)
    assert ast.dump(ast.parse(code)) == ast.dump(WithoutDocstrings().visit(ast.parse(source)))
    nodes = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    holders = [node for node in ast.walk(ast.parse(source)) if isinstance(node, nodes) and ast.get_docstring(node)]
    holders.sort(key=lambda node: node.body[0].lineno)
    assert docs == normalized("\n\n".join(str(ast.get_docstring(node)) for node in holders))


def test_docstrings_on_odd_lines_are_taken_out() -> None:
    source = (
        'def f(): "one"\nclass A:\n    "two"; x = 1\nif f:\n    async def g():\n        """three é\n        end"""\n'
    )
    code, docs = split_docstrings(source)
    assert code == "def f(): ...\nclass A:\n    x = 1\nif f:\n    async def g():\n        ...\n"
    assert docs == "one\n\ntwo\n\nthree é\nend\n"


def test_licence_headers_go_and_other_comments_stay() -> None:
    assert without_legal_comment("# Copyright 2020 X\n# Some rights\n\nimport os\n") == "import os\n"
    assert without_legal_comment("# Reads tables\nimport os\n") == "# Reads tables\nimport os\n"


def test_each_kind_of_file_gives_its_domains(tmp_path: Path) -> None:
    body = prose(3)
    write(tmp_path / "pack" / "core.py", module(1))
    write(tmp_path / "pack" / "readme.rst", prose(2))
    write(tmp_path / "pack-1.0.dist-info" / "METADATA", f"Name: pack\nVersion: 1.0\n\n{body}")
    write(tmp_path / "pack-1.0.dist-info" / "RECORD", "pack/core.py,sha256=x,1\n")
    env = PythonEnvironment([tmp_path])
    found = documents(env)
    assert {document.package for document in found} == {"pack"}  # the description belongs to the package it describes
    assert sorted(document.domain for document in found) == ["code", "prose", "prose", "prose"]
    assert body in {document.text for document in found}
    assert prose(2) in {document.text for document in found}


def test_this_project_and_its_description_are_no_part_of_the_corpus(tmp_path: Path) -> None:
    write(tmp_path / "pack" / "core.py", module(1))
    alone = PythonEnvironment([tmp_path]).fingerprint
    write(tmp_path / "engram" / "core.py", module(2))
    write(tmp_path / "engram_moe-0.2.0.dist-info" / "METADATA", f"Name: engram-moe\n\n{prose(3)}")
    write(tmp_path / "_engram_lm_eval.py", module(4))
    assert PythonEnvironment([tmp_path]).fingerprint == alone
    # An editable installation lists no other file than that one.
    write(tmp_path / "engram_moe-0.2.0.dist-info" / "RECORD", "_engram_lm_eval.py,sha256=x,1\n")
    assert PythonEnvironment([tmp_path]).fingerprint == alone
    write(tmp_path / "engrammar" / "core.py", module(2))
    assert PythonEnvironment([tmp_path]).fingerprint != alone


def test_what_is_not_text_to_read_is_left_out(tmp_path: Path) -> None:
    rng = random.Random(0)
    numbers = "\n".join("    " + ", ".join(str(rng.randrange(10**6)) for _ in range(8)) + "," for _ in range(200))
    hexed = "\n".join(f'data_{i} = "{rng.randbytes(60).hex()}"' for i in range(100))
    words = "\n".join(f"    '{rng.choice(WORDS)}_{i}'," for i in range(300))
    for junk in (
        f"TABLE = [\n{numbers}\n]\n",
        hexed,
        f"NAMES = (\n{words}\n)\n",
        "x = '" + "abc def " * 200 + "'\n",  # one endless line
        "the same line over and over again\n" * 500,
        "\n".join(chr(0x4E00 + rng.randrange(5000)) * 20 for _ in range(100)),
        "too short\n",
        prose(1, 20_000),
    ):
        assert not is_natural(junk)
    assert is_natural(prose(1))
    assert is_natural(split_docstrings(module(1))[0])


def test_files_of_other_places_and_of_this_project_are_left_out(tmp_path: Path) -> None:
    write(tmp_path / "engram" / "core.py", module(1))
    write(tmp_path / "site-packages" / "pack" / "core.py", module(2))
    write(tmp_path / "pack" / "__pycache__" / "core.py", module(3))
    write(tmp_path / "pack" / "LICENSE.txt", prose(4))
    write(tmp_path / "elsewhere.py", module(5))
    (tmp_path / "pack" / "linked.py").symlink_to(tmp_path / "elsewhere.py")
    write(tmp_path / "pack" / "latin.py", module(6).encode() + "# é".encode("latin-1"))
    write(tmp_path / "pack" / "python2.py", module(7) + "print 'no'\n")
    assert {document.package for document in documents(PythonEnvironment([tmp_path]))} == {"elsewhere"}


def test_copies_appear_once(tmp_path: Path) -> None:
    write(tmp_path / "one" / "core.py", module(1))
    write(tmp_path / "two" / "other.py", module(1).replace("\n", "\r\n"))  # equal once normalised
    assert len(documents(PythonEnvironment([tmp_path]))) == 2  # its code and its prose


def test_a_vendored_file_with_rewritten_imports_is_a_near_copy_and_a_related_one_is_not() -> None:
    copies = NearCopies()
    header = "from __future__ import annotations\nfrom package.other import something\n" + prose(99, 4)
    assert copies.is_new(header + module(1))
    assert not copies.is_new(header.replace("package.other", "vendor._package.other") + module(1) + "x = 1\n")
    assert copies.is_new(header + module(2))
    assert copies.is_new("a = 1\n" * 3)
    assert not copies.is_new("a = 1\n" * 3)  # no line is long enough to sample


def test_no_package_gives_documents_to_both_splits(site: Path) -> None:
    env = PythonEnvironment([site])
    training, validation = list(env.training()), list(env.validation())
    assert len(training) + len(validation) == 180
    assert not {d.package for d in training} & {d.package for d in validation}
    share = sum(len(d.text) for d in validation) / sum(len(d.text) for d in training + validation)
    assert 0.015 < share <= 0.045
    assert {d.domain for d in validation} == {"code", "prose"}


def test_near_copies_of_held_out_documents_are_not_trained_on(site: Path) -> None:
    held_out = sorted(PythonEnvironment([site]).held_out)[0]
    vendored = (site / held_out / "core.py").read_text() + "\nVENDORED = True\n"
    receiver = next(p for p in (f"pack{i}" for i in range(60)) if p not in PythonEnvironment([site]).held_out)
    write(site / receiver / "_vendor" / "core.py", vendored)
    env = PythonEnvironment([site])
    assert held_out in env.held_out
    assert receiver not in env.held_out
    lines = {line for line in vendored.splitlines() if len(line) > 20 and "def " in line}
    assert not any(lines & set(document.text.splitlines()) for document in env.training())
    assert any(lines & set(document.text.splitlines()) for document in env.validation())


def test_the_order_depends_on_content_alone(site: Path, tmp_path: Path) -> None:
    first = PythonEnvironment([site])
    site.rename(tmp_path / "moved")
    second = PythonEnvironment([tmp_path / "moved"])
    assert first.fingerprint == second.fingerprint
    assert [d.text for d in second.training()] == [d.text for d in PythonEnvironment([tmp_path / "moved"]).training()]
    before = [d.text for d in second.training()]
    (tmp_path / "moved" / "pack0" / "core.py").rename(tmp_path / "moved" / "pack0" / "renamed.py")
    after = PythonEnvironment([tmp_path / "moved"])
    assert [d.text for d in after.training()] == before


def test_a_change_of_one_file_changes_the_fingerprint_and_moves_no_other_document(site: Path) -> None:
    before = PythonEnvironment([site])
    texts = [d.text for d in before.training()]
    changed = next(path for path in sorted(site.glob("*/guide.md")) if path.parent.name not in before.held_out)
    old = changed.read_text()
    changed.write_text(old.replace(".", ";"))
    after = PythonEnvironment([site])
    assert after.fingerprint != before.fingerprint
    now = [d.text for d in after.training()]
    assert [text for text in now if text in set(texts)] == [text for text in texts if text != old]


def test_any_prefix_is_a_fair_sample_of_packages_and_domains(site: Path) -> None:
    prefix = list(itertools.islice(PythonEnvironment([site]).training(), 60))
    assert len({d.package for d in prefix}) > 30
    assert 10 <= sum(d.domain == "code" for d in prefix) <= 30  # a third of the documents: 20 +- 3.7


def test_the_standard_library_alone_is_a_corpus() -> None:
    env = PythonEnvironment([STDLIB])
    validation = list(env.validation())
    assert {d.domain for d in validation} == {"code", "prose"}
    total = sum(file.n_bytes for file in env.files)
    assert 0.03 < sum(file.n_bytes for file in env.files if file.package in env.held_out) / total <= 0.04
    training = list(itertools.islice(env.training(), 300))
    assert not {d.package for d in training} & env.held_out
    assert sum(len(d.text) for d in training) > 1_000_000
