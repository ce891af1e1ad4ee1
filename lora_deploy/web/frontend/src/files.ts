import type { File } from "./description";

const CACHE = "lora-deploy";

/** Fetch a file that may change under its name: the server is asked each time. */
export async function fetchBytes(url: string, onBytes = (_: number) => {}): Promise<Uint8Array<ArrayBuffer>> {
  const response = await ask(url, "no-cache");
  const bytes = new Uint8Array(await response.arrayBuffer());
  onBytes(bytes.length);
  return bytes;
}

export async function fetchJson<T>(url: string): Promise<T> {
  return JSON.parse(new TextDecoder().decode(await fetchBytes(url))) as T;
}

/** Fetch a file whose name is its content: once in a browser's life. */
export async function fetchOnce(
  folder: string,
  { file, bytes }: File,
  onBytes = (_: number) => {},
): Promise<Uint8Array<ArrayBuffer>> {
  const url = folder + file;
  const cache = await openCache();
  const kept = await cache?.match(url);
  const response = kept ?? (await ask(url, "default"));
  const content = new Uint8Array(bytes);
  let size = 0;
  for (const reader = response.body!.getReader(); ; ) {
    const { done, value } = await reader.read();
    if (done) break;
    if (size + value.length <= bytes) content.set(value, size);
    size += value.length;
    onBytes(value.length);
  }
  if (size !== bytes) {
    await cache?.delete(url);
    throw new Error(`${url}: ${size} bytes came, of ${bytes}. Load the page again.`);
  }
  // Where there is no room, it is fetched again next time.
  if (!kept) await cache?.put(url, new Response(content)).catch(() => {});
  return content;
}

/** Forget what an older export of this page left. */
export async function forgetOthers(folder: string, files: File[]): Promise<void> {
  const cache = await openCache();
  const known = new Set(files.map(({ file }) => folder + file));
  for (const { url } of (await cache?.keys()) ?? []) {
    if (url.startsWith(folder) && !known.has(url)) await cache!.delete(url);
  }
}

/** Pages that are no secure context have no caches. */
async function openCache(): Promise<Cache | null> {
  return "caches" in self ? caches.open(CACHE).catch(() => null) : null;
}

async function ask(url: string, cache: RequestCache): Promise<Response> {
  const response = await fetch(url, { cache });
  if (!response.ok) throw new Error(`${url}: the server answers ${response.status}`);
  return response;
}
