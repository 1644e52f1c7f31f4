"""The floors of the house, by reading the source: who imports whom, who names whom, and how long a file is."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "lmzoo"
FLOORS = {
    "config": 0,
    "files": 0,
    "layers": 1,
    "engine": 1,
    "data": 1,
    "checkpoints": 1,
    "generation": 1,
    "models": 2,
    "tasks": 3,
    "export": 3,
    "pipelines": 4,
    "training": 5,
    "serving": 5,
    "cli": 6,
    "__main__": 7,
}
# What the architectures in `models` have in common.
SHARED = {"base", "causal", "describe", "encoder", "generative", "heads", "masked", "seq2seq", "transformer"}
SOURCES = sorted(PACKAGE.rglob("*.py"))
MODULES = {source.relative_to(PACKAGE).with_suffix("").parts: source for source in SOURCES}


def _room(parts: tuple[str, ...]) -> str:
    return parts[0]


def _tree(source: Path) -> ast.Module:
    return ast.parse(source.read_text(encoding="utf-8"), str(source))


def _imports(source: Path) -> Iterator[tuple[int, str]]:
    """(line, full dotted name) of everything imported, at the top or inside a function, absolute or relative."""
    package = ("lmzoo", *source.relative_to(PACKAGE).parent.parts)
    for node in ast.walk(_tree(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*base, *([node.module] if node.module else [])))
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def _where(source: Path, line: int) -> str:
    return f"{source.relative_to(PACKAGE.parent)}:{line}"


def test_there_is_a_floor_for_each_room():
    rooms = {_room(parts) for parts in MODULES} - {"__init__"}
    assert rooms <= set(FLOORS), f"give {sorted(rooms - set(FLOORS))} a floor"


def test_the_page_about_the_house_is_true():
    """ARCHITECTURE.md has a table of floors and rooms: every room is in it, on its floor."""
    page = (PACKAGE / "ARCHITECTURE.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d) \| (`.*?`) \|", page, re.MULTILINE)
    told = {room: int(floor) for floor, rooms in rows for room in re.findall(r"`(\w+)`", rooms)}
    assert told == {room: FLOORS[room] for room in told}
    assert set(told) == {_room(parts) for parts in MODULES} - {"__init__", "__main__"}


def test_imports_go_downwards_only():
    faults = []
    for parts, source in MODULES.items():
        room = _room(parts)
        if room == "__init__":
            continue
        for line, name in _imports(source):
            top, *rest = name.split(".")
            if top != "lmzoo" or not rest or rest[0] in (room, "__version__"):
                continue
            if FLOORS.get(rest[0], 99) >= FLOORS[room]:
                faults.append(f"{_where(source, line)}: {room} imports {name}")
    assert not faults, "\n".join(faults)


def test_architectures_do_not_import_each_other():
    architectures = {parts[1] for parts in MODULES if parts[0] == "models" and len(parts) > 1} - SHARED - {"__init__"}
    assert {"gpt", "bert"} <= architectures
    faults = []
    for name in architectures | SHARED:
        source = MODULES["models", name]
        others = {f"lmzoo.models.{other}" for other in architectures - {name}}
        faults += [
            f"{_where(source, line)}: {imported}"
            for line, imported in _imports(source)
            if any(imported == other or imported.startswith(f"{other}.") for other in others)
        ]
    assert not faults, "\n".join(faults)


def _architecture_names() -> set[str]:
    """Module and class names of the architectures, read from the files themselves."""
    names = set()
    for parts, source in MODULES.items():
        if parts[0] == "models" and parts[-1] not in SHARED | {"__init__"}:
            names.add(f"lmzoo.models.{'.'.join(parts[1:])}")
            names |= {node.name for node in _tree(source).body if isinstance(node, ast.ClassDef)}
    return names


def test_nothing_but_the_table_names_an_architecture():
    names = _architecture_names()
    assert {"GPTModel", "GPTConfig", "lmzoo.models.gpt", "RobertaModel"} <= names
    faults = []
    for parts, source in MODULES.items():
        if parts[0] == "models" or parts == ("__init__",):  # The table, and the lazy public names.
            continue
        for line, imported in _imports(source):
            if any(imported == name or imported.startswith(f"{name}.") for name in names):
                faults.append(f"{_where(source, line)}: imports {imported}")
        for node in ast.walk(_tree(source)):
            word = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else None
            if word in names:
                faults.append(f"{_where(source, node.lineno)}: names {word}")
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("reference", ["torch", "transformers", "keras_hub", "jax"])
def test_reference_implementations_stay_outside(reference):
    """All but one file, which is run as a process of its own: jax brings the TPU's compiler."""
    apart = {"jax": {("engine", "tpu_compiler")}}.get(reference, set())
    faults = [
        _where(source, line)
        for parts, source in MODULES.items()
        for line, name in _imports(source)
        if name.split(".")[0] == reference and parts not in apart
    ]
    assert not faults, "\n".join(faults)


def test_the_process_that_loads_jax_loads_nothing_of_lmzoo():
    source = MODULES["engine", "tpu_compiler"]
    imported = {name.split(".")[0] for _, name in _imports(source)}
    assert "jax" in imported
    assert not imported & {"lmzoo", "tensorflow", "keras"}
    faults = [
        _where(other, line)
        for other in SOURCES
        for line, name in _imports(other)
        if name.startswith("lmzoo.engine.tpu_compiler")
    ]
    assert not faults, "\n".join(faults)


def test_layers_and_models_use_keras_ops():
    """TensorFlow itself is for the loss, which needs its own gradient, for compiling, and for decoding."""
    decoding = {("models", name) for name in ("causal", "generative", "seq2seq")}
    allowed = {("layers", "losses"), ("models", "base"), *decoding}
    users = {
        parts
        for parts, source in MODULES.items()
        if parts[0] in ("layers", "models") and any(name.split(".")[0] == "tensorflow" for _, name in _imports(source))
    }
    assert users <= allowed


def test_files_are_short_enough_to_read():
    lengths = {parts: len(source.read_text(encoding="utf-8").splitlines()) for parts, source in MODULES.items()}
    limits = {parts: 600 if parts[0] == "models" and parts[-1] not in SHARED else 400 for parts in MODULES}
    long = {"/".join(parts): length for parts, length in lengths.items() if length > limits[parts]}
    assert not long


def test_no_catch_all_modules_and_no_notes_to_self():
    assert not [parts for parts in MODULES if parts[-1] in ("utils", "util", "helpers", "common", "misc")]
    marks = [f"{mark}{rest}" for mark, rest in (("TO", "DO"), ("FIX", "ME"), ("XX", "X"))]
    faults = [
        _where(source, number)
        for source in SOURCES
        for number, line in enumerate(source.read_text(encoding="utf-8").splitlines(), 1)
        if any(mark in line for mark in marks)
    ]
    assert not faults, "\n".join(faults)


def test_every_public_name_is_there():
    import lmzoo

    for name in lmzoo.__all__:
        assert getattr(lmzoo, name) is not None
    assert set(lmzoo.__all__) <= set(dir(lmzoo))
    with pytest.raises(AttributeError, match="no attribute 'GTPModel'"):
        _ = lmzoo.GTPModel


def _modules_after(statement: str) -> set[str]:
    """Names of the modules that a fresh interpreter holds after `statement`."""
    code = f"{statement}\nimport sys\nprint(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    return set(result.stdout.split())


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import lmzoo", {"keras", "tensorflow", "numpy"}),
        ("import lmzoo.config", {"keras", "tensorflow", "numpy"}),
        ("import lmzoo.checkpoints", {"keras", "tensorflow"}),
    ],
)
def test_light_imports_stay_light(statement, absent):
    assert not absent & _modules_after(statement)


def test_every_architecture_has_a_tiny_config():
    from conftest import CAUSAL, TINY

    from lmzoo.models import ARCHITECTURES, CausalLM

    assert set(TINY) == set(ARCHITECTURES)
    assert set(CAUSAL) == {name for name, model_class in ARCHITECTURES.items() if issubclass(model_class, CausalLM)}
    for name, model_class in ARCHITECTURES.items():
        assert model_class.config_class.model_type == name
        model_class.config_class.from_dict(TINY[name])
