import type { Message } from "./description";
import type { Asked, Told } from "./messages";

const element = <T extends HTMLElement>(id: string) => document.getElementById(id) as T;
const status = element("status");
const loaded = element<HTMLProgressElement>("loaded");
const answers = element("answers");
const form = element<HTMLFormElement>("ask");
const prompt = element<HTMLTextAreaElement>("prompt");
const adapter = element<HTMLSelectElement>("adapter");
const send = element<HTMLButtonElement>("send");
const stop = element<HTMLButtonElement>("stop");

const BASE = "base, no adapter";
const messages: Message[] = [];
let answer: HTMLElement;
let summary = "";
let isReady = false;

const worker = new Worker(new URL("./worker.ts", import.meta.url), { type: "module" });
const ask = (asked: Asked) => worker.postMessage(asked);

function addArticle(role: "user" | "assistant", text: string, note = ""): HTMLElement {
  const article = document.createElement("article");
  article.className = role;
  if (note) article.append(Object.assign(document.createElement("small"), { textContent: note }));
  article.append(Object.assign(document.createElement("span"), { textContent: text }));
  answers.append(article);
  answers.scrollTop = answers.scrollHeight;
  return article;
}

function setBusy(isBusy: boolean): void {
  send.hidden = isBusy;
  stop.hidden = !isBusy;
  send.disabled = !isReady;
  document.body.dataset.state = isBusy ? "busy" : isReady ? "ready" : "loading";
}

worker.onmessage = ({ data }: MessageEvent<Told>) => {
  switch (data.kind) {
    case "progress":
      loaded.value = data.done / data.total;
      status.textContent = `loading ${(data.done / 1e6).toFixed(0)} of ${(data.total / 1e6).toFixed(0)} MB`;
      break;
    case "ready":
      document.title = element("name").textContent = data.name;
      loaded.hidden = true;
      for (const name of [null, ...data.adapters]) {
        if (data.choosable) adapter.append(new Option(name ?? BASE, name ?? ""));
      }
      if (!data.choosable) adapter.append(new Option("built in", ""));
      adapter.disabled = !data.choosable;
      status.textContent = summary = `onnxruntime-web, ${data.where}; ${(data.bytes / 1e6).toFixed(0)} MB`;
      isReady = true;
      setBusy(false);
      prompt.focus();
      break;
    case "text":
      answer.lastElementChild!.textContent = data.text;
      answers.scrollTop = answers.scrollHeight;
      break;
    case "done": {
      const speed = data.tokensPerSecond === null ? "" : `, ${data.tokensPerSecond.toFixed(1)} tokens/s`;
      const first = `${data.promptTokens} tokens of prompt, first token after ${data.firstToken.toFixed(1)} s`;
      status.textContent = `${summary}; ${first}${speed}`;
      answer.dataset.tokens = data.tokens.join(" ");
      messages.push({ role: "assistant", content: answer.lastElementChild!.textContent ?? "" });
      setBusy(false);
      break;
    }
    case "failed":
      messages.pop(); // what was not answered is no part of the chat
      fail(data.message);
  }
};
worker.onerror = (event) => fail(event.message || "the worker could not start");

function fail(message: string): void {
  status.textContent = message;
  status.className = "failed";
  setBusy(false);
  document.body.dataset.state = "failed";
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  const text = prompt.value.trim();
  if (!isReady || !send.offsetParent || !text) return;
  const chosen = adapter.disabled ? null : adapter.value || null;
  status.className = "";
  messages.push({ role: "user", content: text });
  addArticle("user", text);
  answer = addArticle("assistant", "", adapter.selectedOptions[0].text);
  prompt.value = "";
  setBusy(true);
  ask({
    kind: "generate",
    messages: [...messages],
    adapter: chosen,
    maxNewTokens: Number(element<HTMLInputElement>("tokens").value) || 256,
    temperature: Number(element<HTMLInputElement>("temperature").value) || 0,
  });
});
prompt.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    form.requestSubmit();
  }
});
stop.addEventListener("click", () => ask({ kind: "stop" }));
element("clear").addEventListener("click", () => {
  if (document.body.dataset.state === "busy") return;
  messages.length = 0;
  answers.replaceChildren();
});

setBusy(false);
ask({ kind: "load", folder: new URL("model/", location.href).href });
