/** What `lora-deploy web` says of the export, in `model/model.json`. */
export interface Description {
  name: string;
  graph: File;
  /** Weights, by the place that the graph names. */
  data: File[];
  /** The type that a GPU must compute in; null where WebGPU would write something else. */
  gpu: "fp32" | "fp16" | null;
  branch: "hot-swap" | "pooled" | "fixed" | null;
  /** Of a hot-swap export a file each; of a pooled one names alone, in the order of their ids. */
  adapters: { name: string; file: File | null }[];
  /** A and B of every slot, which every run is given; null is the rank. */
  slots: Input[];
  /** Keys and values; null is the batch, and the tokens. */
  cache: Input[];
  has_position_ids: boolean;
  eos_token_ids: number[];
  context_length: number | null;
  chat_template: string | null;
  special_tokens: Record<string, string>;
}

export interface File {
  file: string;
  bytes: number;
}

export interface Input {
  name: string;
  type: "float32" | "float16" | "int8";
  dims: (number | null)[];
}

export interface Message {
  role: "system" | "user" | "assistant";
  content: string;
}
