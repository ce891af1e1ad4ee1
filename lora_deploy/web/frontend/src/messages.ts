import type { Message } from "./description";

/** What the page asks of the worker. */
export type Asked =
  | { kind: "load"; folder: string }
  | { kind: "stop" }
  | { kind: "generate"; messages: Message[]; adapter: string | null; maxNewTokens: number; temperature: number };

/** What the worker tells the page. */
export type Told =
  | { kind: "progress"; done: number; total: number }
  | { kind: "ready"; name: string; adapters: string[]; choosable: boolean; where: string; bytes: number }
  | { kind: "text"; text: string }
  | { kind: "done"; tokens: number[]; promptTokens: number; firstToken: number; tokensPerSecond: number | null }
  | { kind: "failed"; message: string };
