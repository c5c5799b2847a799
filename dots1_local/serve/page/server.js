// Requests to the server that this page came from; all addresses are relative to the page's.

const BASE = new URL("./", location.href);
const KEY = `dots1:key:${BASE.pathname}`;

/** An answer of the server that is no success; `status` is 0 if the server cannot be reached. */
export class ServerError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

let askForKey = () => Promise.reject(new ServerError(401, ""));

/** Let `ask(wrong)` return a promise of the key; `wrong` tells that the last one was refused. */
export function onKeyNeeded(ask) {
  let asking;
  askForKey = (wrong) => (asking ??= ask(wrong).finally(() => (asking = undefined)));
}

let held = null; // the key, where the browser lets the page keep nothing

export function key() {
  try {
    return sessionStorage.getItem(KEY) ?? localStorage.getItem(KEY) ?? held;
  } catch {
    return held;
  }
}

/** Keep the key until the tab is closed, or with `remember` in the browser. */
export function keepKey(value, remember) {
  forgetKey();
  held = value;
  try {
    (remember ? localStorage : sessionStorage).setItem(KEY, value);
  } catch {
    // It lasts as long as the page.
  }
}

export function forgetKey() {
  held = null;
  try {
    sessionStorage.removeItem(KEY);
    localStorage.removeItem(KEY);
  } catch {
    // Nothing was kept.
  }
}

/** Return the response to a GET, or to a POST of `body`; a missing key is asked for. */
async function request(path, { body, signal } = {}) {
  for (;;) {
    const used = key();
    const response = await send(path, used, body, signal);
    if (response.ok) return response;
    if (response.status !== 401) throw new ServerError(response.status, await reason(response));
    if (key() === used) await askForKey(Boolean(used));
  }
}

async function send(path, used, body, signal) {
  const headers = body ? { "Content-Type": "application/json" } : {};
  if (used) headers.Authorization = `Bearer ${used}`;
  const method = body ? "POST" : "GET";
  try {
    return await fetch(new URL(path, BASE), { method, headers, body: body && JSON.stringify(body), signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError(0, error.message);
  }
}

async function reason(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `${response.status} ${response.statusText}`;
  }
}

const json = async (path, options) => (await request(path, options)).json();

/** Return the model: its `id`, and `max_model_len`, the tokens of its context. */
export const model = async () => (await json("v1/models")).data[0];

export const placement = () => json("v1/placement");
export const slots = () => json("slots");
export const metrics = async () => (await request("metrics")).text();

/** Return how many tokens a conversation takes. */
export const countTokens = async (messages, signal) =>
  (await json("tokenize", { body: { messages }, signal })).count;

/** Yield the chunks of an answer to `body` as they come. */
export async function* streamChat(body, signal) {
  const asked = { ...body, stream: true, stream_options: { include_usage: true }, return_progress: true };
  const response = await request("v1/chat/completions", { body: asked, signal });
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ServerError(500, chunk.error.message);
    yield chunk;
  }
  throw new ServerError(0, "the stream ended early");
}

/** Yield the data of each server-sent event; the server writes an event's data in one line. */
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) if (line.startsWith("data: ")) yield line.slice(6).trimEnd();
  }
}
