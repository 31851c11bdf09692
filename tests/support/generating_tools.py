"""How tools outside Python are asked to generate."""

TRANSFORMERS_JS = """
const { AutoModelForCausalLM, Tensor, env } = require('@huggingface/transformers');
const [, , root, name, count, ...ids] = process.argv;
env.allowRemoteModels = false;
env.localModelPath = root;
const tokens = (values) => new Tensor('int64', BigInt64Array.from(values, BigInt), [1, ids.length]);
AutoModelForCausalLM.from_pretrained(name, { dtype: 'fp32', subfolder: '', device: 'cpu' })
    .then((model) => model.generate({
        input_ids: tokens(ids), attention_mask: tokens(ids.map(() => 1)), max_new_tokens: +count, do_sample: false,
    }))
    .then((found) => console.log(found.tolist()[0].join(' ')));
"""
