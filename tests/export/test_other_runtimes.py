"""Runtimes that share no code with TensorFlow give the logits of the signature `tokens`. From the extra `runtimes`."""

import numpy as np
import pytest
import tensorflow as tf
from tiny_bundles import export_all

pytestmark = [
    pytest.mark.slow,
    # Converters use what NumPy and protobuf have deprecated.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

LENGTHS = (4, 17)


@pytest.fixture(scope="module", params=["generator", "classifier"])
def signature(request, tmp_path_factory):
    """The function of the signature, which takes its inputs by name, and gives one tensor."""
    directory = export_all(tmp_path_factory.mktemp("bundles"), (request.param,))[request.param]
    loaded = tf.saved_model.load(str(directory / "1"))
    function = loaded.signatures["tokens"]
    specs = dict(sorted(function.structured_input_signature[1].items()))
    (output,) = function.structured_outputs

    class Alone(tf.Module):
        """Nothing but this signature."""

        def __init__(self):
            super().__init__()
            self.bundle = loaded

        @tf.function(input_signature=[tf.TensorSpec(spec.shape, spec.dtype, name) for name, spec in specs.items()])
        def run(self, *values):
            return {output: self.bundle.signatures["tokens"](**dict(zip(specs, values, strict=True)))[output]}

    return Alone(), tuple(specs)


def cases(names):
    """Inputs by name, of several lengths, which the graph must not have been frozen for."""
    random = np.random.default_rng(0)
    for length in LENGTHS:
        shape = (2, length)
        values = {
            "token_ids": random.integers(0, 100, shape).astype(np.int32),
            "padding_mask": np.arange(length)[None] < np.array([[length], [length - 2]]),
            "token_type_ids": random.integers(0, 2, shape).astype(np.int32),
        }
        yield {name: values[name] for name in names}


def compare(run, signature):
    """Runs another runtime beside TensorFlow."""
    module, names = signature
    for inputs in cases(names):
        (expected,) = module.run(*(tf.constant(inputs[name]) for name in names)).values()
        actual = run(inputs)
        print(f"largest difference {np.abs(actual - expected).max():.2g}")
        np.testing.assert_allclose(actual, expected, atol=1e-4)


def test_openvino(signature, tmp_path):
    openvino = pytest.importorskip("openvino", reason="openvino is not installed (the extra runtimes)")
    module, _ = signature
    tf.saved_model.save(module, str(tmp_path), signatures=module.run)
    converted = openvino.convert_model(str(tmp_path))
    # By default it computes in bfloat16 where the processor can.
    compiled = openvino.Core().compile_model(converted, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    compare(lambda inputs: next(iter(compiled(inputs).values())), signature)


def test_onnx_runtime(signature):
    tf2onnx = pytest.importorskip("tf2onnx", reason="tf2onnx is not installed (the extra runtimes)")
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed (the extra runtimes)")

    def erfc(context, node, name, args):
        """1 - erf(x): ONNX has no operation for it, and the converter no rule."""
        one = context.make_const(f"{name}_one", np.array(1, np.float32)).output[0]
        erf = context.make_node("Erf", node.input).output[0]
        (output,) = node.output
        shapes, types = [context.get_shape(output)], [context.get_dtype(output)]
        context.remove_node(name)
        context.make_node("Sub", [one, erf], outputs=[output], name=name, shapes=shapes, dtypes=types)

    module, _ = signature
    model, _ = tf2onnx.convert.from_function(
        module.run, input_signature=module.run.input_signature, opset=17, custom_op_handlers={"Erfc": (erfc, [])}
    )
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    compare(lambda inputs: session.run(None, inputs)[0], signature)
