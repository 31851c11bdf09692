#!/usr/bin/env bash
# onnxruntime-genai's own Tokenizer does not apply the TemplateProcessing of a tokenizer.json: the token that Hugging
# Face's tokenizers put in front of a text is missing, without a word.
#
# Versions   onnxruntime-genai 0.18.0, tokenizers 0.22.1, onnx 1.19.1, numpy 2.2.6; Linux, Python 3.11
# Input      a byte-level tokenizer whose post-processor is the template "<s> $A", beside a decoder that is loaded alone
# Behaviour  The ids of a text are those without the template, whether tokenizer_config.json says add_bos_token or not.
# Seen       "abc": tokenizers [1, 67, 68, 69]    onnxruntime-genai [67, 68, 69]
# Meaning    One directory gives transformers and onnxruntime-genai two prompts, and a model that was trained behind that
#            token answers the second one otherwise. Append the ids that tokenizers makes (Generator.append_tokens).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install -qq --disable-pip-version-check \
    onnxruntime-genai==0.18.0 tokenizers==0.22.1 onnx==1.19.1 numpy==2.2.6 \
    || { echo "packages could not be installed"; exit 2; }
cd "$folder"
venv/bin/python - <<'PY'
import json
import pathlib

import onnx
import onnxruntime_genai as genai
from onnx import TensorProto, helper
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

folder = pathlib.Path("model")
folder.mkdir()
names = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
ids = {name: i for i, name in enumerate(names)}
tokenizer = Tokenizer(models.BPE(vocab=ids, merges=[]))
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer.decoder = decoders.ByteLevel()
tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
tokenizer.add_special_tokens(["<pad>", "<s>", "</s>"])
tokenizer.save(str(folder / "tokenizer.json"))
said = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}

# a decoder that is loaded and never run
V, H, D = len(names), 1, 8
value = helper.make_tensor_value_info
past = ["past_key_values.0.key", "past_key_values.0.value"]
inputs = [value("input_ids", TensorProto.INT64, ["batch", "new"]), value("attention_mask", TensorProto.INT64, ["batch", "all"])]
inputs += [value(name, TensorProto.FLOAT, ["batch", H, "past", D]) for name in past]
outputs = [value("logits", TensorProto.FLOAT, ["batch", "new", V])]
outputs += [value(name.replace("past_key_values", "present"), TensorProto.FLOAT, ["batch", H, "all", D]) for name in past]
nodes = [
    helper.make_node("OneHot", ["input_ids", "depth", "values"], ["logits"]),
    *(helper.make_node("Identity", [name], [name.replace("past_key_values", "present")]) for name in past),
]
constants = [helper.make_tensor("depth", TensorProto.INT64, [1], [V]), helper.make_tensor("values", TensorProto.FLOAT, [2], [0.0, 1.0])]
graph = helper.make_graph(nodes, "decoder", inputs, outputs, constants)
onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), folder / "model.onnx")
decoder = {
    "filename": "model.onnx", "head_size": D, "hidden_size": D, "num_attention_heads": H, "num_hidden_layers": 1,
    "num_key_value_heads": H,
    "inputs": {"input_ids": "input_ids", "attention_mask": "attention_mask", "past_key_names": "past_key_values.%d.key", "past_value_names": "past_key_values.%d.value"},
    "outputs": {"logits": "logits", "present_key_names": "present.%d.key", "present_value_names": "present.%d.value"},
}
model = {"type": "llama", "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "context_length": 64, "vocab_size": V, "decoder": decoder}
(folder / "genai_config.json").write_text(json.dumps({"model": model, "search": {"max_length": 64}}))

expected = tokenizer.encode("abc").ids
found = []
for more in ({}, {"add_bos_token": True}):
    (folder / "tokenizer_config.json").write_text(json.dumps(said | more))
    found.append([int(i) for i in genai.Tokenizer(genai.Model(str(folder))).encode("abc")])
print("tokenizers", expected, "onnxruntime-genai", found)
assert expected[0] == 1 and found == [expected[1:]] * 2, "onnxruntime-genai reads the template now"
PY
