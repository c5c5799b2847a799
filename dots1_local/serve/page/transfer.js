// Conversations as a JSON file, out and in. A file that comes in is untrusted.

import { el, randomId } from "./dom.js";
import { cleanSettings } from "./sampling.js";

const FORMAT = "dots1-conversations";
const MAX_MESSAGES = 20_000;

/** Offer conversations as a download. */
export function exportConversations(conversations, name) {
  const text = JSON.stringify({ format: FORMAT, version: 1, conversations }, null, 1);
  const url = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  el("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 60_000);
}

/** Return the conversations in the text of an export, with new identifiers; throw an Error if it is none. */
export function readExport(text) {
  const content = JSON.parse(text);
  if (content?.format !== FORMAT || !Array.isArray(content.conversations)) throw new Error(`no "format": "${FORMAT}"`);
  return content.conversations.map(readConversation);
}

function readConversation(raw) {
  const given = Object.values(object(raw.messages));
  if (given.length > MAX_MESSAGES) throw new Error(`more than ${MAX_MESSAGES} messages`);
  const ids = new Map(given.map((message) => [string(message.id), randomId()]));
  const renamed = (id) => (id === "" ? "" : ids.get(id));
  const messages = given.map((message) => readMessage(message, renamed));
  const known = new Set(["", ...messages.map((message) => message.id)]);
  if (messages.some((message) => !known.has(message.parent))) throw new Error("a message without its parent");
  checkTree(messages);
  const shown = {};
  for (const message of messages) shown[message.parent] = message.id;
  for (const [parent, id] of Object.entries(object(raw.shown))) {
    const child = messages.find((message) => message.id === renamed(id));
    if (child && child.parent === renamed(parent)) shown[child.parent] = child.id;
  }
  return {
    id: randomId(), title: string(raw.title).slice(0, 200), created: number(raw.created), updated: number(raw.updated),
    settings: cleanSettings(object(raw.settings)), messages: Object.fromEntries(messages.map((each) => [each.id, each])), shown,
  };
}

function readMessage(raw, renamed) {
  if (raw.role !== "user" && raw.role !== "assistant") throw new Error("a message of another role");
  const files = (raw.files ?? []).map((file) => ({ name: string(file.name), text: string(file.text) }));
  return {
    id: renamed(raw.id), parent: renamed(string(raw.parent)), role: raw.role, text: string(raw.text), files,
    created: number(raw.created), state: "done", stats: readStats(raw.stats),
  };
}

function readStats(raw) {
  if (!raw) return undefined;
  const known = ["prompt", "cached", "completion", "first", "prefill", "decode"];
  return Object.fromEntries(known.filter((name) => Number.isFinite(raw[name])).map((name) => [name, raw[name]]));
}

/** Throw unless every message leads to the beginning. */
function checkTree(messages) {
  const parents = new Map(messages.map((message) => [message.id, message.parent]));
  const checked = new Set([""]);
  for (const { id } of messages) {
    const passed = new Set();
    for (let each = id; !checked.has(each); each = parents.get(each)) {
      if (passed.has(each)) throw new Error("messages in a circle");
      passed.add(each);
    }
    for (const each of passed) checked.add(each);
  }
}

function object(value) {
  if (typeof value !== "object" || value === null || Array.isArray(value)) throw new Error("an object is missing");
  return value;
}

function string(value) {
  if (typeof value !== "string") throw new Error("a text is missing");
  return value;
}

function number(value) {
  if (!Number.isFinite(value)) throw new Error("a time is missing");
  return value;
}
