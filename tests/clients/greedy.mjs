// Greedy decoding by onnxruntime-node alone.
//
// node greedy.mjs NODE_MODULES, with jobs as JSON on the standard input:
//   [{model, prompts: [[id]], newTokens, ends: [id], given: {name: ids}, adapter: safetensors}]
// "given" are int64 inputs of one dimension, "adapter" is a file of A and B. Writes [[[id]]], the new tokens of each
// prompt of each job, up to and including the one that ends the answer; {error} for a job that failed.

import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { join } from "node:path";

const ort = createRequire(join(process.argv[2], "/"))("onnxruntime-node");

const int64 = (values, dims) => new ort.Tensor("int64", BigInt64Array.from(values, BigInt), dims);

function readSafetensors(file) {
  const bytes = readFileSync(file);
  const start = 8 + Number(bytes.readBigUInt64LE(0));
  const header = JSON.parse(bytes.subarray(8, start).toString());
  delete header.__metadata__;
  return Object.fromEntries(
    Object.entries(header).map(([name, { dtype, shape, data_offsets: [from, to] }]) => {
      if (dtype !== "F32") throw new Error(`${name} is of type ${dtype}`);
      const values = new Float32Array(bytes.buffer.slice(bytes.byteOffset + start + from, bytes.byteOffset + start + to));
      return [name, new ort.Tensor("float32", values, shape)];
    }),
  );
}

async function decode(session, prompt, { newTokens, ends }, given) {
  let cache = Object.fromEntries(
    session.inputMetadata
      .filter(({ name }) => name.startsWith("past_key_values."))
      .map(({ name, type, shape }) => [name, new ort.Tensor(type, [], [1, shape[1], 0, shape[3]])]),
  );
  const answer = [];
  for (let added = prompt; answer.length < newTokens && !ends.includes(answer.at(-1)); ) {
    const length = prompt.length + answer.length;
    const positions = Array.from(added, (_, place) => length - added.length + place);
    const outputs = await session.run({
      input_ids: int64(added, [1, added.length]),
      attention_mask: int64(Array(length).fill(1), [1, length]),
      position_ids: int64(positions, [1, added.length]),
      ...cache,
      ...given,
    });
    const last = outputs.logits.data.subarray(-outputs.logits.dims[2]);
    added = [last.reduce((best, value, token) => (value > last[best] ? token : best), 0)];
    answer.push(added[0]);
    cache = Object.fromEntries(
      Object.keys(cache).map((name) => [name, outputs[name.replace("past_key_values", "present")]]),
    );
  }
  return answer;
}

async function run(job) {
  const session = await ort.InferenceSession.create(job.model, { logSeverityLevel: 3 });
  const given = job.adapter ? readSafetensors(job.adapter) : {};
  for (const [name, ids] of Object.entries(job.given ?? {})) given[name] = int64(ids, [ids.length]);
  const answers = [];
  for (const prompt of job.prompts) answers.push(await decode(session, prompt, job, given));
  await session.release();
  return answers;
}

const results = [];
for (const job of JSON.parse(readFileSync(0, "utf8"))) {
  results.push(await run(job).catch((error) => ({ error: String(error) })));
}
console.log(JSON.stringify(results));
