"""The embedded corpus: English about Python that every installation of Python carries."""

import ast
import inspect
import os
import tokenize
from collections.abc import Iterator
from pathlib import Path

_NOT_PROSE = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


def python_help() -> Iterator[str]:
    """Yields `pydoc`'s help topics, then each docstring of the installed standard library.

    The order is that of the names. The library's source files are parsed, never imported, so that nothing is run. A
    docstring that occurs twice is taken once: a document set aside for validation has not been seen in training.
    """
    from pydoc_data.topics import topics

    yield from dict.fromkeys(inspect.cleandoc(topics[topic]) for topic in sorted(topics))
    library = Path(os.__file__).parent
    seen: set[str] = set()
    for file in sorted(path.relative_to(library).as_posix() for path in library.rglob("*.py")):
        if not _NOT_PROSE.intersection(Path(file).parts):
            module = file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
            yield from module_help(library / file, module, seen)


def module_help(path: Path, module: str, seen: set[str]) -> list[str]:
    """Gives a source file's docstrings in their order, each below the name that it belongs to.

    Args:
        path: a Python source file; one that this Python cannot parse (a template, say) has no docstrings.
        module: the name to give it.
        seen: docstrings to leave out; those found are added.
    """
    try:
        with tokenize.open(path) as file:
            tree = ast.parse(file.read())
    except (SyntaxError, UnicodeDecodeError):
        return []
    documents: list[str] = []

    def visit(node: ast.AST, name: str) -> None:
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = (ast.get_docstring(node) or "").strip()
            if text and text not in seen:
                seen.add(text)
                documents.append(f"{name}\n\n{text}")
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                visit(child, f"{name}.{child.name}")
            elif isinstance(child, ast.stmt | ast.excepthandler):  # definitions stand in `if` and `try` blocks too
                visit(child, name)

    visit(tree, module)
    return documents
