import type { InferenceSession, OnnxValue, Tensor } from "onnxruntime-web";
import type { Description, File, Input } from "./description";
import { fetchBytes, fetchOnce, forgetOthers } from "./files";
import type { Runtime } from "./runtime";
import { readSafetensors, type StoredTensor } from "./safetensors";

type Feeds = Record<string, OnnxValue>;

/** Tokens of a prompt in one run: each takes a row of logits, as wide as the vocabulary. */
const AT_ONCE = 256;
const ARRAYS = { float32: Float32Array, float16: Uint16Array, int8: Int8Array };

/** An export in this browser: the base is loaded once, adapters go in and out between two runs. */
export class Model {
  private readonly adapters = new Map<string | null, Feeds>();

  private constructor(
    private readonly runtime: Runtime,
    private readonly session: InferenceSession,
    private readonly description: Description,
    private readonly folder: string,
  ) {}

  static async load(
    runtime: Runtime,
    description: Description,
    folder: string,
    onBytes: (bytes: number) => void,
  ): Promise<Model> {
    await forgetOthers(folder, [...description.data, ...description.adapters.flatMap(({ file }) => file ?? [])]);
    const graph = await fetchBytes(folder + description.graph.file, onBytes);
    const externalData = [];
    for (const file of description.data) {
      externalData.push({ path: file.file, data: await fetchOnce(folder, file, onBytes) });
    }
    const onGpu = runtime.provider === "webgpu";
    const session = await runtime.ort.InferenceSession.create(graph, {
      executionProviders: [runtime.provider],
      externalData,
      // The keys and values of a run are read by the next one only.
      preferredOutputLocation: onGpu
        ? Object.fromEntries(description.cache.map(({ name }) => [presentName(name), "gpu-buffer" as const]))
        : undefined,
    });
    return new Model(runtime, session, description, folder);
  }

  /** Generate token by token, up to and including the end token, or to the end of the model's context. */
  async *generate(
    prompt: number[],
    options: { adapter: string | null; maxNewTokens: number; temperature: number; isStopped: () => boolean },
  ): AsyncGenerator<number> {
    const { context_length: context, eos_token_ids: ends } = this.description;
    if (context !== null && prompt.length > context) {
      throw new Error(`The prompt has ${prompt.length} tokens, and the model takes ${context}. Start a new chat.`);
    }
    const adapter = await this.adapter(options.adapter);
    const limit = Math.min(options.maxNewTokens, context === null ? Infinity : context - prompt.length + 1);
    let pending = prompt;
    let past = 0;
    let cache = this.emptyCache();
    try {
      for (let made = 0; made < limit; await breathe()) {
        if (options.isStopped()) return;
        const fresh = pending.slice(0, AT_ONCE);
        pending = pending.slice(AT_ONCE);
        const outputs = await this.session.run({ ...adapter, ...cache, ...this.inputs(fresh, past) });
        dispose(cache);
        cache = {};
        for (const { name } of this.description.cache) cache[name] = outputs[presentName(name)];
        past += fresh.length;
        if (pending.length > 0) continue;
        const token = choose(lastRow(outputs.logits as Tensor), options.temperature);
        made++;
        yield token;
        if (ends.includes(token)) return;
        pending = [token];
      }
    } finally {
      dispose(cache);
    }
  }

  private inputs(fresh: number[], past: number): Feeds {
    const { Tensor } = this.runtime.ort;
    const row = (values: number[]) => BigInt64Array.from(values, BigInt);
    const feeds: Feeds = {
      input_ids: new Tensor("int64", row(fresh), [1, fresh.length]),
      attention_mask: new Tensor("int64", row(Array(past + fresh.length).fill(1)), [1, past + fresh.length]),
    };
    if (this.description.has_position_ids) {
      feeds.position_ids = new Tensor("int64", row(fresh.map((_, place) => past + place)), [1, fresh.length]);
    }
    return feeds;
  }

  private emptyCache(): Feeds {
    return Object.fromEntries(
      this.description.cache.map((input) => [input.name, this.zeros(input, [1, input.dims[1], 0, input.dims[3]])]),
    );
  }

  /** What a run is given for an adapter, or for the bare base; read when it is first asked for. */
  private async adapter(name: string | null): Promise<Feeds> {
    const known = this.adapters.get(name);
    if (known) return known;
    const found = this.description.adapters.findIndex((adapter) => adapter.name === name);
    if (name !== null && found < 0) throw new Error(`There is no adapter ${name}.`);
    let feeds: Feeds = {};
    if (this.description.branch === "pooled") {
      feeds.adapter_ids = new this.runtime.ort.Tensor("int64", BigInt64Array.of(BigInt(found)), [1]);
    } else if (this.description.branch === "hot-swap") {
      const file = name === null ? null : this.description.adapters[found].file;
      feeds = file === null ? this.noAdapter() : await this.fetchAdapter(file);
    }
    this.adapters.set(name, feeds);
    return feeds;
  }

  private async fetchAdapter(file: File): Promise<Feeds> {
    const stored = readSafetensors(await fetchOnce(this.folder, file));
    const device = this.runtime.provider === "webgpu" ? await this.runtime.ort.env.webgpu.device : null;
    return Object.fromEntries(
      this.description.slots.map((input) => {
        const tensor = stored.get(input.name);
        if (tensor?.type !== input.type) throw new Error(`${file.file}: no ${input.type} ${input.name}`);
        return [input.name, device && tensor.type !== "int8" ? this.onGpu(device, tensor) : this.onHost(tensor)];
      }),
    );
  }

  /** One rank of zeros: no runtime need know what a tensor of no elements is. */
  private noAdapter(): Feeds {
    return Object.fromEntries(
      this.description.slots.map((input) => {
        const dims = input.dims.map((size) => size ?? 1);
        return [input.name, this.zeros(input, dims)];
      }),
    );
  }

  private zeros(input: Input, dims: (number | null)[]): Tensor {
    const sizes = dims.map((size) => size ?? 0);
    const values = new ARRAYS[input.type](sizes.reduce((product, size) => product * size, 1));
    return this.onHost({ type: input.type, dims: sizes, values });
  }

  private onHost({ type, dims, values }: StoredTensor): Tensor {
    const { Tensor } = this.runtime.ort;
    return new Tensor(type as "float32", values as Float32Array, dims);
  }

  /** Copied to the GPU once, instead of at every token. */
  private onGpu(device: GPUDevice, { type, dims, values }: StoredTensor): Tensor {
    const usage = GPUBufferUsage.STORAGE | GPUBufferUsage.COPY_SRC | GPUBufferUsage.COPY_DST;
    // WebGPU maps whole words; onnxruntime rounds up to four of them.
    const buffer = device.createBuffer({ size: Math.ceil(values.byteLength / 16) * 16, usage, mappedAtCreation: true });
    const bytes = new Uint8Array(values.buffer, values.byteOffset, values.byteLength);
    new Uint8Array(buffer.getMappedRange()).set(bytes);
    buffer.unmap();
    return this.runtime.ort.Tensor.fromGpuBuffer(buffer, { dataType: type as "float32", dims });
  }
}

/** Let messages in: runs of the CPU are one task after another. */
function breathe(): Promise<void> {
  return new Promise((resolve) => {
    const { port1, port2 } = new MessageChannel();
    port1.onmessage = () => {
      port1.close();
      resolve();
    };
    port2.postMessage(null);
  });
}

function presentName(past: string): string {
  return past.replace("past_key_values.", "present.");
}

/** Give the memory of a GPU back; tensors in this page's own memory need no such thing. */
function dispose(values: Feeds): void {
  for (const value of Object.values(values)) (value as Tensor).dispose();
}

/** The logits after the last token, as 32-bit numbers. */
function lastRow(logits: Tensor): Float32Array {
  const vocabulary = logits.dims[2];
  const row = (logits.data as Float32Array | Uint16Array).slice(-vocabulary);
  if (logits.type !== "float16") return Float32Array.from(row);
  return row instanceof Uint16Array ? Float32Array.from(row, fromHalf) : Float32Array.from(row);
}

function fromHalf(bits: number): number {
  const sign = bits & 0x8000 ? -1 : 1;
  const exponent = (bits >> 10) & 0x1f;
  const fraction = bits & 0x3ff;
  if (exponent === 0) return sign * 2 ** -24 * fraction;
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return sign * 2 ** (exponent - 25) * (1024 + fraction);
}

function choose(logits: Float32Array, temperature: number): number {
  let best = 0;
  for (let token = 1; token < logits.length; token++) if (logits[token] > logits[best]) best = token;
  if (!Number.isFinite(logits[best])) throw new Error("The model gives no numbers.");
  if (temperature <= 0) return best;
  const weights = logits.map((value) => Math.exp((value - logits[best]) / temperature));
  let left = Math.random() * weights.reduce((sum, weight) => sum + weight, 0);
  for (let token = 0; token < weights.length; token++) {
    left -= weights[token];
    if (left < 0) return token;
  }
  return best;
}
