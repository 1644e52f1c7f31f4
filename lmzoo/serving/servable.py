"""One version of a SavedModel, loaded as TF Serving loads it, and its signatures run on NumPy arrays."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.core.protobuf.saved_model_pb2 import SavedModel
from tensorflow.python.framework import op_def_registry

from lmzoo.serving.errors import Code, ServingError, invalid

Arrays = dict[str, np.ndarray]

_TAG = "serve"
DEFAULT_SIGNATURE = "serving_default"
# What `tf.saved_model.save` adds for the Python that loads it: no signature for requests.
_INTERNAL_SIGNATURES = ("__saved_model_init_op",)


class Servable:
    """A SavedModel with the tag "serve" in a session of its own.

    It is loaded by the C++ runtime that TF Serving has too, and nothing of the Python that made it is needed. Runs may
    overlap.

    Args:
        path: of the version.
        max_rows: the most rows, that is, the size of the first axis, of an input.

    Raises:
        OSError, ValueError, tf.errors.OpError: it cannot be loaded.
    """

    def __init__(self, path: Path, max_rows: int = 256) -> None:
        self.path = path
        self.max_rows = max_rows
        load_missing_ops(path)
        self._session = tf.compat.v1.Session(graph=tf.Graph())
        try:
            with self._session.graph.as_default(), _quiet():
                loaded = tf.compat.v1.saved_model.loader.load(self._session, [_TAG], str(path))
        except BaseException:
            self._session.close()
            raise
        self.signatures = {
            name: signature for name, signature in loaded.signature_def.items() if name not in _INTERNAL_SIGNATURES
        }

    def signature(self, name: str) -> Any:
        """The SignatureDef of a name; "" is the default one.

        Raises:
            ServingError: there is none.
        """
        name = name or DEFAULT_SIGNATURE
        if name not in self.signatures:
            known = ", ".join(sorted(self.signatures))
            raise invalid(f'Serving signature name: "{name}" not found in signature def. It has: {known}')
        return self.signatures[name]

    def run(
        self, signature_name: str, inputs: Mapping[str, np.ndarray], outputs: Iterable[str] = (), seconds: float = 60.0
    ) -> Arrays:
        """The outputs of a signature.

        Args:
            signature_name: "" is the default one.
            inputs: by name. Those that the signature has defaults for may be missing.
            outputs: names of the outputs wanted; none means all.
            seconds: the run is given up after so long.

        Raises:
            ServingError: inputs or outputs are not those of the signature, or the graph failed.
        """
        signature = self.signature(signature_name)
        feeds = {
            signature.inputs[name].name: self._checked(name, value, signature)
            for name, value in self._complete(inputs, signature).items()
        }
        names = list(dict.fromkeys(outputs)) or sorted(signature.outputs)
        for name in names:
            if name not in signature.outputs:
                raise invalid(
                    f"output tensor alias not found in signature: {name} Outputs expected to be in the set "
                    f"{{{','.join(sorted(signature.outputs))}}}."
                )
        options = tf.compat.v1.RunOptions(timeout_in_ms=max(1, round(1000 * seconds)))
        fetches = [signature.outputs[name].name for name in names]
        try:
            values = self._session.run(fetches, feeds, options=options)
        except tf.errors.OpError as error:
            raise ServingError(Code(error.error_code), _reason(error.message)) from error
        except (ValueError, TypeError, RuntimeError) as error:
            # What Python's side of a session finds wrong with a feed, or that the version was unloaded.
            raise invalid(str(error)) from error
        return {name: np.asarray(value) for name, value in zip(names, values, strict=True)}

    def close(self) -> None:
        """Frees the session. Nothing may run in it any more."""
        self._session.close()

    def _complete(self, inputs: Mapping[str, np.ndarray], signature: Any) -> Arrays:
        extra = sorted(set(inputs) - set(signature.inputs))
        if extra:
            raise invalid(
                f"input has no tensor alias {', '.join(extra)} in the signature: it takes "
                f"{', '.join(sorted(signature.inputs))}."
            )
        complete = {name: tf.make_ndarray(value) for name, value in signature.defaults.items()}
        complete.update(inputs)
        missing = sorted(set(signature.inputs) - set(complete))
        if missing:
            raise invalid(f"Missing named input: {', '.join(missing)}, which has no default.")
        return complete

    def _checked(self, name: str, value: np.ndarray, signature: Any) -> np.ndarray:
        info = signature.inputs[name]
        expected = tf.dtypes.as_dtype(info.dtype)
        kind = tf.string if value.dtype.kind in "OSU" else tf.dtypes.as_dtype(value.dtype)
        if kind != expected:
            raise invalid(f"input {name} is {kind.name}, but the signature takes {expected.name}.")
        shape = tf.TensorShape(info.tensor_shape)
        if not shape.is_compatible_with(value.shape):
            raise invalid(f"input {name} has the shape {list(value.shape)}, but the signature takes {shape}.")
        if value.ndim and value.shape[0] > self.max_rows:
            raise invalid(f"input {name} has {value.shape[0]} rows, but this server takes {self.max_rows} at a time.")
        return value


def _reason(message: str) -> str:
    """What went wrong, out of what a session in Python writes around it: the places where nodes were made."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    nodes = [number for number, line in enumerate(lines) if line.startswith("Node: ")]
    return (lines[nodes[-1] + 1 :] or lines or ["the graph failed"])[0] if nodes else " ".join(lines[:2])


def load_missing_ops(path: Path) -> None:
    """Registers tensorflow-text's operations, which TF Serving links, if a SavedModel has one TensorFlow lacks.

    Raises:
        OSError, ValueError: there is no SavedModel, or it has operations that neither of them has.
    """
    missing = missing_ops(path)
    if not missing:
        return
    with contextlib.suppress(ImportError):
        import tensorflow_text  # noqa: F401

        missing = missing_ops(path)
    if missing:
        raise ValueError(
            f"{path} has operations that neither TensorFlow nor tensorflow-text has, nor TF Serving: "
            f"{', '.join(sorted(missing))}."
        )


def missing_ops(path: Path) -> set[str]:
    """Names of the operations of a SavedModel, functions included, that are not registered in this process.

    Raises:
        OSError, ValueError: there is no SavedModel, or it cannot be read.
    """
    return {name for name in graph_ops(path) if op_def_registry.get(name) is None}


def graph_ops(path: Path) -> set[str]:
    """Names of all operations of a SavedModel, those inside functions included, but not of its own functions."""
    saved_model = read_saved_model(path)
    names = set()
    for meta_graph in saved_model.meta_graphs:
        library = meta_graph.graph_def.library.function
        functions = {function.signature.name for function in library}
        nodes = [meta_graph.graph_def.node, *(function.node_def for function in library)]
        names |= {node.op for group in nodes for node in group} - functions
    return names


def read_saved_model(path: Path) -> Any:
    """The protocol buffer of a SavedModel.

    Raises:
        OSError, ValueError: there is none, or it cannot be read.
    """
    saved_model = SavedModel()
    try:
        saved_model.ParseFromString((path / "saved_model.pb").read_bytes())
    except OSError:
        raise
    except Exception as error:  # protobuf's DecodeError has no public name that all its versions share.
        raise ValueError(f"{path / 'saved_model.pb'} is no SavedModel: {error}") from error
    return saved_model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the note that the loader, which is the one that feeds sessions, is deprecated in Python."""
    before = tf.compat.v1.logging.get_verbosity()
    tf.compat.v1.logging.set_verbosity(tf.compat.v1.logging.ERROR)
    try:
        yield
    finally:
        tf.compat.v1.logging.set_verbosity(before)
