const CACHE = "lora-deploy";

/** Fetch a file whose name is its content: once in a browser's life. Others are asked for anew each time. */
export async function fetchBytes(
  url: string,
  { isContentNamed = false, onBytes = (_: number) => {} } = {},
): Promise<Uint8Array<ArrayBuffer>> {
  // Pages that are no secure context have no caches.
  const cache = isContentNamed && "caches" in self ? await caches.open(CACHE).catch(() => null) : null;
  const kept = await cache?.match(url);
  const response = kept ?? (await fetch(url, { cache: isContentNamed ? "default" : "no-cache" }));
  if (!response.ok || response.body === null) {
    throw new Error(`${url}: the server answers ${response.status}`);
  }
  const parts: Uint8Array<ArrayBuffer>[] = [];
  let size = 0;
  for (const reader = response.body.getReader(); ; ) {
    const { done, value } = await reader.read();
    if (done) break;
    parts.push(value);
    size += value.length;
    onBytes(value.length);
  }
  const bytes = new Uint8Array(size);
  let place = 0;
  for (const part of parts) {
    bytes.set(part, place);
    place += part.length;
  }
  if (cache && !kept) {
    // What an older export left goes; where there is no room, it is fetched again next time.
    await Promise.all((await cache.keys()).map((older) => inSameFolder(older.url, url) && cache.delete(older)));
    await cache.put(url, new Response(bytes)).catch(() => {});
  }
  return bytes;
}

function inSameFolder(first: string, second: string): boolean {
  const folder = (url: string) => new URL(".", url).href;
  return folder(first) === folder(second);
}

export async function fetchJson<T>(url: string): Promise<T> {
  return JSON.parse(new TextDecoder().decode(await fetchBytes(url))) as T;
}
