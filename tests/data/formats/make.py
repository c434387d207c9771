"""Make the files of this folder again: `python make.py flax|tensorflow|tf_keras|onnx`, each where its library is.

The libraries are those that write such files, and none of them is needed by the tests: flax; tensorflow-cpu; tf_keras;
onnxruntime and onnxscript. ONNX files take a folder that holds `test_onnx_files.py` on the path.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent


def flax() -> None:
    import jax
    import jax.numpy as jnp
    from flax import linen, serialization

    class Network(linen.Module):
        @linen.compact
        def __call__(self, x: Any, words: Any) -> Any:
            x = linen.BatchNorm(use_running_average=True)(linen.Conv(4, (3, 3))(x))
            x = linen.ConvTranspose(4, (3, 3), padding="VALID")(x)
            x = linen.LayerNorm()(x.reshape((x.shape[0], -1, 4)))
            x = linen.MultiHeadDotProductAttention(2)(x, x) + linen.Embed(11, 4)(words)
            x = linen.RNN(linen.GRUCell(4))(linen.RNN(linen.OptimizedLSTMCell(5))(x))
            return linen.Dense(2)(x[:, -1])

    network, words = Network(), jnp.asarray([[3]])
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 4, 4, 3)), jnp.float32)
    rng = np.random.default_rng(1)
    variables = jax.tree.map(
        lambda a: jnp.asarray(rng.random(a.shape) - 0.3, jnp.float32), network.init(jax.random.key(0), x, words)
    )
    variables["batch_stats"]["BatchNorm_0"]["var"] += 0.5
    serialization.MAX_CHUNK_SIZE = 300  # arrays in pieces
    (HERE / "flax_model.msgpack").write_bytes(serialization.to_bytes(variables))
    np.save(HERE / "flax_output.npy", np.asarray(network.apply(variables, x, words)))
    serialization.MAX_CHUNK_SIZE = 2**30
    dense = jax.tree.map(lambda a: a.astype(jnp.bfloat16), variables["params"]["Dense_0"])
    state = {"step": 3, "params": {"Dense_0": dense}, "opt_state": {"mu": jnp.ones(3)}}
    (HERE / "flax_bfloat16.msgpack").write_bytes(serialization.to_bytes(state))


def tensorflow() -> None:
    import tensorflow as tf

    layers, rng = tf.keras.layers, np.random.default_rng(0)
    model = tf.keras.Sequential(
        [
            layers.Input((8, 8, 3)),
            layers.Conv2D(4, 3, name="first"),
            layers.ReLU(),
            layers.DepthwiseConv2D(3, name="deep"),
            layers.Conv2DTranspose(5, 2, name="up"),
            layers.PReLU(shared_axes=[1, 2], name="act"),
            layers.GlobalAveragePooling2D(),
            layers.Dense(3, name="fc"),
        ]
    )
    for variable in model.variables:
        variable.assign(rng.standard_normal(variable.shape).astype(np.float32))
    for form in ("", "_half", "_full"):
        converter = tf.lite.TFLiteConverter.from_keras_model(model)
        if form:
            converter.optimizations = [tf.lite.Optimize.DEFAULT]
        if form == "_half":
            converter.target_spec.supported_types = [tf.float16]
        elif form == "_full":
            examples = [[rng.standard_normal((1, 8, 8, 3)).astype(np.float32)] for _ in range(8)]
            converter.representative_dataset = lambda examples=examples: iter(examples)
        (HERE / f"model{form}.tflite").write_bytes(converter.convert())
    variables = {variable.path.replace("/", "."): variable.numpy() for variable in model.variables}
    np.savez(HERE / "tflite_variables.npz", **variables)


def tf_keras() -> None:
    os.environ["TF_USE_LEGACY_KERAS"] = "1"
    import tf_keras as keras

    layers, rng = keras.layers, np.random.default_rng(0)
    model = keras.Sequential(
        [
            layers.Input((6, 6, 2)),
            layers.Conv2D(3, 3, name="first"),
            layers.BatchNormalization(name="norm"),
            layers.SeparableConv2D(4, 2, name="apart"),
            layers.Reshape((9, 4)),
            layers.Bidirectional(layers.LSTM(2), name="both"),
            layers.Dense(2, name="last"),
        ]
    )
    model.set_weights([rng.random(w.shape).astype(np.float32) + 0.1 for w in model.get_weights()])
    model.save(HERE / "tf_keras.h5", include_optimizer=False)
    model.save(HERE / "tf_keras.keras")
    x = rng.random((2, 6, 6, 2)).astype(np.float32)
    np.savez(HERE / "tf_keras_example.npz", x=x, y=model(x).numpy())


def onnx() -> None:
    import onnx
    import torch
    from onnxruntime import quantization
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
    from test_onnx_files import Words, random_values
    from torch import nn

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.fc = nn.LSTM(6, 4, batch_first=True), nn.Linear(4, 5)
            self.conv, self.head = nn.Conv1d(5, 3, 3), nn.Linear(3, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x, _ = self.lstm(x)
            return self.head(self.conv(self.fc(x).transpose(1, 2)).mean(2))

    torch.manual_seed(0)
    plain = HERE / "onnx_float.onnx"
    torch.onnx.export(Network().eval(), (torch.zeros(1, 7, 6),), plain, dynamo=False)
    name = onnx.load(plain).graph.input[0].name

    class Examples(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self.left = [{name: np.random.randn(1, 7, 6).astype(np.float32)} for _ in range(4)]

        def get_next(self) -> Any:
            return self.left.pop() if self.left else None

    int8 = quantization.QuantType.QInt8
    quantization.quantize_dynamic(plain, HERE / "onnx_dynamic.onnx", weight_type=int8, per_channel=True)
    for form in ("QDQ", "QOperator"):
        target, format_ = HERE / f"onnx_{form.lower()}.onnx", quantization.QuantFormat[form]
        quantization.quantize_static(plain, target, Examples(), quant_format=format_, per_channel=form == "QDQ")
    pair = nn.Sequential(nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 8))
    torch.onnx.export(pair, (torch.zeros(1, 3, 32),), HERE / "onnx_nbits_float.onnx", dynamo=False)
    blocks = MatMulNBitsQuantizer(onnx.load(HERE / "onnx_nbits_float.onnx"), block_size=32, is_symmetric=False)
    blocks.process()
    blocks.model.save_model_to_file(str(HERE / "onnx_nbits.onnx"), False)

    words, file = random_values(Words()), HERE / "onnx_dynamo.onnx"
    torch.onnx.export(words, (torch.zeros(2, 4, dtype=torch.long),), file, dynamo=True, external_data=False)
    np.savez_compressed(HERE / "onnx_dynamo_state.npz", **{k: v.numpy() for k, v in words.state_dict().items()})
    model = onnx.load(file)
    for node in model.graph.node:  # without traces of the machine
        kept = [entry for entry in node.metadata_props if entry.key == "pkg.torch.onnx.name_scopes"]
        del node.metadata_props[:]
        node.metadata_props.extend(kept)
    onnx.save(model, file)


if __name__ == "__main__":
    {"flax": flax, "tensorflow": tensorflow, "tf_keras": tf_keras, "onnx": onnx}[sys.argv[1]]()
