import type { Input } from "./description";

type Entry = { dtype: string; shape: number[]; data_offsets: [number, number] };
type Values = Float32Array | Uint16Array | Int8Array;

const TYPES: Record<string, [Input["type"], (bytes: ArrayBuffer) => Values]> = {
  F32: ["float32", (bytes) => new Float32Array(bytes)],
  F16: ["float16", (bytes) => new Uint16Array(bytes)],
  I8: ["int8", (bytes) => new Int8Array(bytes)],
};

export interface StoredTensor {
  type: Input["type"];
  dims: number[];
  values: Values;
}

/** The tensors of a safetensors file, by name. */
export function readSafetensors(bytes: Uint8Array<ArrayBuffer>): Map<string, StoredTensor> {
  const length = Number(new DataView(bytes.buffer, bytes.byteOffset).getBigUint64(0, true));
  const header = JSON.parse(new TextDecoder().decode(bytes.subarray(8, 8 + length))) as Record<string, Entry>;
  const tensors = new Map<string, StoredTensor>();
  for (const [name, entry] of Object.entries(header)) {
    if (name === "__metadata__") continue;
    const [type, view] = TYPES[entry.dtype];
    const [start, end] = entry.data_offsets.map((offset) => 8 + length + offset);
    tensors.set(name, { type, dims: entry.shape, values: view(bytes.slice(start, end).buffer) });
  }
  return tensors;
}
