#!/usr/bin/env bash
# transformers.js sizes the empty cache of a decoder by the names of the file's free axes: "batch_size" is the batch, and
# any other name, such as "batch", is an axis of size 0. The same graph answers or not by the name of an axis.
#
# Versions   @huggingface/transformers 4.3.2 (npm) with its onnxruntime-node 1.30.0; onnx 1.23.2, numpy 2.4.6; Node 20
# Input      a decoder of one layer as ONNX, which appends to past_key_values [batch, 1, past, 2]; two files that differ
#            in the name of the first axis alone
# Behaviour  Names of free axes are documentation to ONNX and to ONNX Runtime. transformers.js looks them up: "batch_size"
#            (and "batch_size x num_heads") have a value, all others become 0, which is right for the past's length. A
#            past of no text then meets the new tokens of one: ONNX Runtime's Concat passes over it, and what counts
#            texts by the past has none.
# Seen       batch_size: past [1,1,0,2], logits [1,3,8]    batch: past [0,1,0,2], logits [0,3,8]
# Meaning    Whoever writes decoders for transformers.js must call the axis "batch_size", as optimum's exporter does. A
#            file that passes every other runtime gives scores of no text there, or an error deep inside of the graph.
set -euo pipefail
command -v node >/dev/null && command -v npm >/dev/null || { echo "needs node and npm: cannot be shown here"; exit 77; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install -qq --disable-pip-version-check onnx==1.23.2 numpy==2.4.6 ||
    { echo "packages could not be installed"; exit 2; }
cd "$work"
npm init -y >/dev/null
npm install --silent --ignore-scripts --no-audit --no-fund @huggingface/transformers@4.3.2 >/dev/null ||
    { echo "packages could not be installed"; exit 2; }
"$work/venv/bin/python" - <<'PY'
import json
import pathlib

import numpy as np
from onnx import TensorProto, helper, numpy_helper, save

VOCABULARY, WIDTH = 8, 2
for name in ("batch_size", "batch"):
    new, kept = [name, "sequence"], [name, 1, "past_sequence", WIDTH]
    nodes = [
        helper.make_node("ReduceSum", ["past_key_values.0.key", "others"], ["summed"]),  # 0 for each text of the past
        helper.make_node("Squeeze", ["summed", "axis"], ["of_text"]),
        helper.make_node("Gather", ["scores", "input_ids"], ["own"]),
        helper.make_node("Add", ["own", "of_text"], ["logits"]),
        helper.make_node("Gather", ["rows", "input_ids"], ["new"]),
        helper.make_node("Unsqueeze", ["new", "axis"], ["headed"]),
        helper.make_node("Concat", ["past_key_values.0.key", "headed"], ["present.0.key"], axis=2),
        helper.make_node("Concat", ["past_key_values.0.value", "headed"], ["present.0.value"], axis=2),
    ]
    info = helper.make_tensor_value_info
    inputs = [info("input_ids", TensorProto.INT64, new), info("attention_mask", TensorProto.INT64, [name, "total"])]
    inputs += [info(f"past_key_values.0.{k}", TensorProto.FLOAT, kept) for k in ("key", "value")]
    outputs = [info("logits", TensorProto.FLOAT, [*new, VOCABULARY])]
    outputs += [info(f"present.0.{k}", TensorProto.FLOAT, [name, 1, "total", WIDTH]) for k in ("key", "value")]
    constants = {
        "scores": np.eye(VOCABULARY, dtype=np.float32),
        "rows": np.ones((VOCABULARY, WIDTH), np.float32),
        "axis": np.array([1]),
        "others": np.array([1, 2, 3]),
    }
    graph = helper.make_graph(nodes, "g", inputs, outputs, [numpy_helper.from_array(v, n) for n, v in constants.items()])
    folder = pathlib.Path("models", name)
    folder.mkdir(parents=True)
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), folder / "model.onnx")
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": WIDTH, "vocab_size": VOCABULARY,
              "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": WIDTH}
    (folder / "config.json").write_text(json.dumps(config))
PY
cat >run.mjs <<'JS'
import { AutoModelForCausalLM, Tensor, env } from '@huggingface/transformers';
env.allowRemoteModels = false;
env.localModelPath = './models/';
const ids = () => new Tensor('int64', BigInt64Array.from([1n, 2n, 3n]), [1, 3]);
const ones = () => new Tensor('int64', BigInt64Array.from([1n, 1n, 1n]), [1, 3]);

const seen = {};
for (const name of ['batch_size', 'batch']) {
    const model = await AutoModelForCausalLM.from_pretrained(name, { dtype: 'fp32', subfolder: '', device: 'cpu' });
    const { logits } = await model({ input_ids: ids(), attention_mask: ones() });
    seen[name] = logits.dims;
}
console.log(JSON.stringify(seen));
const expected = { batch_size: [1, 3, 8], batch: [0, 3, 8] };
process.exit(JSON.stringify(seen) === JSON.stringify(expected) ? 0 : 1);
JS
node run.mjs 2>/dev/null && echo "as described" || { echo "not as described any more"; exit 1; }
