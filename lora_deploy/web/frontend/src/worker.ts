import { Chat } from "./chat";
import type { Description } from "./description";
import { fetchJson } from "./files";
import type { Asked, Told } from "./messages";
import { Model } from "./model";
import { loadRuntime, type Runtime } from "./runtime";

let model: Model;
let chat: Chat;
let isStopped = false;

const tell = (told: Told) => self.postMessage(told);

async function load(folder: string): Promise<void> {
  const description = await fetchJson<Description>(`${folder}model.json`);
  const total = [description.graph, ...description.data].reduce((sum, { bytes }) => sum + bytes, 0);
  const open = (runtime: Runtime) => {
    let done = 0;
    const onBytes = (bytes: number) => tell({ kind: "progress", done: (done += bytes), total });
    return Model.load(runtime, description, folder, onBytes);
  };
  let runtime = await loadRuntime(description.gpu);
  try {
    model = await open(runtime);
  } catch (error) {
    if (runtime.provider === "wasm") throw error;
    console.warn("The GPU cannot run this model:", error);
    runtime = await loadRuntime(null);
    model = await open(runtime);
  }
  chat = new Chat(await fetchJson<object>(`${folder}tokenizer.json`), description);
  tell({
    kind: "ready",
    name: description.name,
    adapters: description.adapters.map(({ name }) => name),
    choosable: description.branch === "hot-swap" || description.branch === "pooled",
    where: runtime.where,
    bytes: total,
  });
}

async function generate(asked: Extract<Asked, { kind: "generate" }>): Promise<void> {
  isStopped = false;
  const prompt = chat.encode(asked.messages);
  const tokens: number[] = [];
  const started = performance.now();
  let first = started;
  for await (const token of model.generate(prompt, { ...asked, isStopped: () => isStopped })) {
    if (tokens.length === 0) first = performance.now();
    tokens.push(token);
    tell({ kind: "text", text: chat.decode(tokens, false) });
  }
  tell({ kind: "text", text: chat.decode(tokens, true) });
  tell({
    kind: "done",
    tokens,
    promptTokens: prompt.length,
    firstToken: (first - started) / 1000,
    tokensPerSecond: tokens.length > 1 ? (tokens.length - 1) / ((performance.now() - first) / 1000) : null,
  });
}

self.onmessage = async ({ data }: MessageEvent<Asked>) => {
  try {
    if (data.kind === "stop") isStopped = true;
    else await (data.kind === "load" ? load(data.folder) : generate(data));
  } catch (error) {
    tell({ kind: "failed", message: error instanceof Error ? error.message : String(error) });
  }
};
