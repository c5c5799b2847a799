// A conversation: a tree of messages, of which one branch is shown. Nothing here draws or stores.
//
// A message is {id, parent, role, text, files, created, state, stats}; the first messages have the
// parent "". `shown` names, for each parent, which of its children is shown.

import { randomId } from "./dom.js";

const TITLE = 60; // characters

export function newConversation(settings) {
  const now = Date.now();
  return { id: randomId(), title: "", created: now, updated: now, settings: { ...settings }, messages: {}, shown: {} };
}

/** Add a message below `parent` and show it. */
export function addMessage(conversation, parent, role, text, files = []) {
  const message = { id: randomId(), parent, role, text, files, created: Date.now(), state: "done" };
  conversation.messages[message.id] = message;
  conversation.shown[parent] = message.id;
  conversation.updated = message.created;
  if (!conversation.title && role === "user") conversation.title = titleOf(text, files);
  return message;
}

function titleOf(text, files) {
  const line = text.trim().split("\n", 1)[0] || files[0]?.name || "";
  const letters = [...line];
  return letters.length > TITLE ? `${letters.slice(0, TITLE).join("")}…` : line;
}

/** Return the messages that are shown, the first one first. */
export function branch(conversation) {
  const found = [];
  for (let id = conversation.shown[""]; id; id = conversation.shown[id]) found.push(conversation.messages[id]);
  return found;
}

/** Return a message and its alternatives, the oldest first. */
export const versions = (conversation, message) =>
  Object.values(conversation.messages)
    .filter((each) => each.parent === message.parent && each.role === message.role)
    .sort((a, b) => a.created - b.created);

/** Return the messages before one that is shown, and that one. */
export function upTo(conversation, id) {
  const found = [];
  for (let each = conversation.messages[id]; each; each = conversation.messages[each.parent]) found.unshift(each);
  return found;
}

/** Return messages as the API takes them; files come before the text that speaks of them. */
export function apiMessages(conversation, messages) {
  const system = conversation.settings.system?.trim();
  const asked = messages
    .filter((each) => each.role === "user" || each.text)
    .map(({ role, text, files }) => ({ role, content: [...(files ?? []).map(quoted), text].join("\n\n") }));
  return system ? [{ role: "system", content: system }, ...asked] : asked;
}

/** Return a file as a code block whose fence is longer than any in the file. */
function quoted({ name, text }) {
  const longest = Math.max(2, ...(text.match(/`{3,}/g) ?? []).map((fence) => fence.length));
  const fence = "`".repeat(longest + 1);
  return `${name}:\n${fence}\n${text.replace(/\n$/, "")}\n${fence}`;
}
