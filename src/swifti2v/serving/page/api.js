// The HTTP API. Every failure is an ApiError in the server's own words.

const KEY = "swifti2v-key";

export class ApiError extends Error {
  constructor(status, { message, param = null, code = "" }) {
    super(message);
    this.status = status;
    this.param = param;
    this.code = code;
  }

  get isOffline() {
    return this.status === 0;
  }
}

export function setKey(key) {
  if (key) localStorage.setItem(KEY, key);
  else localStorage.removeItem(KEY);
}

export const hasKey = () => Boolean(localStorage.getItem(KEY));

// Resolves to the response, or throws; `ok` names statuses that are answers besides 2xx.
export async function call(path, { headers = {}, ok = [], ...options } = {}) {
  const key = localStorage.getItem(KEY);
  if (key) headers = { Authorization: `Bearer ${key}`, ...headers };
  let response;
  try {
    response = await fetch(path, { cache: "no-store", headers, ...options });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, { message: "The server does not answer." });
  }
  if (response.ok || ok.includes(response.status)) return response;
  const body = await response.json().catch(() => ({}));
  throw new ApiError(response.status, body.error ?? { message: `HTTP ${response.status}` });
}

export const getJson = async (path, options) => (await call(path, options)).json();

export const getVideo = (id) => getJson(`/v1/videos/${id}`);

export const listVideos = (after) =>
  getJson(`/v1/videos?limit=48${after ? `&after=${after}` : ""}`);

export const cancelVideo = (id) => getJson(`/v1/videos/${id}/cancel`, { method: "POST" });

export const deleteVideo = (id) => getJson(`/v1/videos/${id}`, { method: "DELETE" });

export const estimate = (form, signal) =>
  getJson("/v1/videos/estimate", { method: "POST", body: form, signal });

export const createVideo = (form, repeatKey) =>
  getJson("/v1/videos", { method: "POST", body: form, headers: { "Idempotency-Key": repeatKey } });

// A URL for <img> and <video>, which send no API key: with one, the content is fetched first.
export async function mediaUrl(path) {
  if (!hasKey()) return path;
  return URL.createObjectURL(await (await call(path)).blob());
}

// Bytes of a finished video, for readSettings.
export const readRange = (id) => async (start, end) => {
  const headers = { Range: `bytes=${start}-${end - 1}` };
  return (await call(`/v1/videos/${id}/content`, { headers })).arrayBuffer();
};

// Server-Sent Events as { id, event, data }; EventSource could not send an API key.
export async function* events(path, { lastId, signal }) {
  const headers = lastId ? { "Last-Event-ID": lastId } : {};
  const response = await call(path, { headers, signal });
  let rest = "";
  for await (const piece of pieces(response.body.pipeThrough(new TextDecoderStream()))) {
    const blocks = (rest + piece).split(/\r?\n\r?\n/);
    rest = blocks.pop();
    for (const block of blocks) {
      const fields = {};
      for (const line of block.split(/\r?\n/)) {
        const [, name, value] = /^(\w+): ?(.*)$/.exec(line) ?? [];
        if (name) fields[name] = value;
      }
      if (fields.data) yield { id: fields.id, event: fields.event, data: JSON.parse(fields.data) };
    }
  }
}

// What a stream holds; Safari's streams cannot be iterated.
export async function* pieces(stream) {
  const reader = stream.getReader();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      yield value;
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

// Wait, or end at once when the signal aborts.
export const sleep = (seconds, signal) => new Promise((resolve) => {
  const timer = setTimeout(resolve, 1000 * seconds);
  signal?.addEventListener("abort", () => { clearTimeout(timer); resolve(); }, { once: true });
});
