"""Asks a TF Serving for predictions: over REST with the standard library alone, or over gRPC.

python examples/tf_serving_client.py --model books "It was a bright cold day"
python examples/tf_serving_client.py --model books --signature generate --input temperature=0.5 "It was"
python examples/tf_serving_client.py --model books --grpc "It was"    # pip install 'lmzoo[serving]'
python examples/tf_serving_client.py --smoke                          # starts a small server, and asks that
"""

import argparse
import base64
import json
import tempfile
import urllib.error
import urllib.request
from pathlib import Path

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("texts", nargs="*", help="a row each, for the input named by --text")
parser.add_argument("--server", help="default http://127.0.0.1:8501, and 127.0.0.1:8500 for gRPC")
parser.add_argument("--model", default="model", help="its name")
parser.add_argument("--signature", default="serving_default", help="what to run")
parser.add_argument("--text", default="text", help="name of the input that takes the texts")
parser.add_argument("--input", action="append", default=[], metavar="NAME=VALUE", help="another input, for all rows")
parser.add_argument("--grpc", action="store_true", help="use gRPC")
parser.add_argument("--smoke", action="store_true", help="ask a server that is started for it")


def over_rest(server, model, signature, inputs):
    """The outputs by name, from TF Serving's REST API, which wants each input, also one with a default."""

    def ask(suffix, body=None):
        request = urllib.request.Request(f"{server}/v1/models/{model}{suffix}", body and json.dumps(body).encode())
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            raise SystemExit(f"{error.code}: {json.load(error)['error']}") from error

    about = ask("/metadata")["metadata"]["signature_def"]["signature_def"][signature]
    for name, proto in about.get("defaults", {}).items():
        numbers = next(proto[key] for key in ("int_val", "int64_val", "float_val") if proto.get(key))
        inputs.setdefault(name, [json.loads(str(number)) for number in numbers])  # 64 bits come as strings.
    columns = {name: [as_json(value) for value in values] for name, values in inputs.items()}
    outputs = ask(":predict", {"signature_name": signature, "inputs": columns})["outputs"]
    return outputs if len(about["outputs"]) > 1 else {next(iter(about["outputs"])): outputs}


def as_json(value):
    """Bytes in base64, which carries any of them; other values as they are."""
    return {"b64": base64.b64encode(value).decode()} if isinstance(value, bytes) else value


def over_grpc(server, model, signature, inputs):
    """The outputs by name, from TF Serving's gRPC API, which fills in what has a default."""
    import grpc
    import tensorflow as tf
    from tensorflow_serving.apis import get_model_metadata_pb2, predict_pb2, prediction_service_pb2_grpc

    with grpc.insecure_channel(server) as channel:
        stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
        question = get_model_metadata_pb2.GetModelMetadataRequest(metadata_field=["signature_def"])
        question.model_spec.name = model
        request, signatures = predict_pb2.PredictRequest(), get_model_metadata_pb2.SignatureDefMap()
        request.model_spec.name, request.model_spec.signature_name = model, signature
        try:
            stub.GetModelMetadata(question, timeout=60).metadata["signature_def"].Unpack(signatures)
            infos = signatures.signature_def[signature].inputs
            for name, values in inputs.items():
                request.inputs[name].CopyFrom(tf.make_tensor_proto(values, infos[name].dtype))
            response = stub.Predict(request, timeout=60)
        except grpc.RpcError as error:
            raise SystemExit(f"{error.code().name}: {error.details()}") from error
    return {name: tf.make_ndarray(value).tolist() for name, value in response.outputs.items()}


def main(arguments):
    """Asks, and prints a line of JSON for each output."""
    inputs = {arguments.text: [text.encode(errors="surrogateescape") for text in arguments.texts]}
    inputs |= {name: [json.loads(value)] for name, _, value in (each.partition("=") for each in arguments.input)}
    ask, server = (over_grpc, "127.0.0.1:8500") if arguments.grpc else (over_rest, "http://127.0.0.1:8501")
    for name, values in sorted(ask(arguments.server or server, arguments.model, arguments.signature, inputs).items()):
        print(json.dumps({name: values}, default=lambda value: value.decode(errors="replace"), ensure_ascii=False))


arguments = parser.parse_args()
if arguments.smoke:
    from lmzoo import GPTModel, TextGenerator, Tokenizer
    from lmzoo.serving import model_server

    tokenizer = Tokenizer.train(iter(["the cat sat on the mat"] * 9), kind="bpe", vocab_size=260)
    model = GPTModel.from_preset("gpt2-nano", vocab_size=260, context_length=32, num_layers=1)
    with tempfile.TemporaryDirectory() as directory:
        TextGenerator(model, tokenizer, max_new_tokens=8).export(f"{directory}/smoke")
        with model_server([Path(directory, "smoke")]) as addresses:
            words = ["--model=smoke", "--signature=generate", "--input=seed=1", "the cat", "a dog"]
            main(parser.parse_args([f"--server={addresses.rest}", *words]))
            main(parser.parse_args([f"--server={addresses.grpc}", "--grpc", *words]))
else:
    main(arguments)
