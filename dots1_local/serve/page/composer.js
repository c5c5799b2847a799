// The field in which the user writes, and how much of the context the conversation takes.

import { attachedFiles, startAttachments, takeFiles } from "./attachments.js";
import { chat } from "./chat.js";
import { apiMessages } from "./conversation.js";
import { byId, setIcon, svg } from "./dom.js";
import { number, onLanguage, t } from "./i18n.js";
import { countTokens } from "./server.js";

const PAUSE = 600; // milliseconds without typing before tokens are counted
const RING = 2 * Math.PI * 8;

const drafts = new Map(); // what was typed, by conversation
let context; // tokens of the model's context
let counting;
let opened;

/** Let the user write; the context of the model takes `size` tokens. */
export function startComposer() {
  const draft = byId("draft");
  byId("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    if (chat.generation) chat.stop();
    else send();
  });
  draft.addEventListener("keydown", (event) => {
    // While an input method composes, Enter chooses a word.
    if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.keyCode === 229) return;
    event.preventDefault();
    if (!chat.generation) send();
  });
  draft.addEventListener("input", changed);
  startAttachments(byId("chat"), draft, changed);
  chat.addEventListener("open", open);
  chat.addEventListener("message", showButton);
  onLanguage(() => {
    showButton();
    showContext();
  });
  open();
}

export function setContext(tokens) {
  context = tokens;
  showContext();
}

function open() {
  const draft = byId("draft");
  if (opened && opened !== chat.current.id) {
    drafts.set(opened, draft.value);
    draft.value = drafts.get(chat.current.id) ?? "";
  }
  opened = chat.current.id;
  changed();
}

function send() {
  const draft = byId("draft");
  const text = draft.value.trim();
  if (!text && !attachedFiles().length) return;
  draft.value = "";
  chat.send(text, takeFiles());
}

function changed() {
  const draft = byId("draft");
  draft.style.height = "auto";
  draft.style.height = `${draft.scrollHeight}px`;
  showButton();
  showContext();
  clearTimeout(counting?.timer);
  counting?.stop.abort();
  if (!draft.value.trim() && !attachedFiles().length) return;
  const stop = new AbortController();
  counting = { stop, timer: setTimeout(() => count(stop.signal), PAUSE) };
}

/** Count the tokens that the conversation takes with what is being written. */
async function count(signal) {
  const written = { role: "user", text: byId("draft").value, files: attachedFiles() };
  try {
    showContext(await countTokens(apiMessages(chat.current, [...chat.messages, written]), signal));
  } catch {
    // The count is a convenience; sending says what is wrong.
  }
}

function showButton() {
  const button = byId("send");
  const writing = Boolean(chat.generation);
  const label = t(writing ? "stop" : "send");
  if (button.title !== label) {
    setIcon(button, writing ? "stop" : "send");
    button.setAttribute("aria-label", label);
    button.title = label;
    button.classList.toggle("stop", writing);
  }
  button.disabled = !writing && !byId("draft").value.trim() && !attachedFiles().length;
  if (!writing) showContext();
}

/** Show tokens in use: `counted`, or what the last answer said. */
function showContext(counted) {
  const output = byId("context");
  const stats = chat.messages.findLast((message) => message.stats?.prompt)?.stats;
  const used = counted ?? (stats ? stats.prompt + stats.completion : 0);
  output.hidden = !context || !used;
  if (output.hidden) return;
  const share = Math.min(1, used / context);
  const circle = (name, dash) => svg("circle", { class: name, cx: 10, cy: 10, r: 8, "stroke-dasharray": dash });
  const ring = svg("svg", { class: "ring", viewBox: "0 0 20 20", "aria-hidden": "true" }, circle("all", "none"), circle("used", `${share * RING} ${RING}`));
  output.classList.toggle("full", share > 0.9);
  output.title = t("contextUse", { used: number(used), all: number(context) });
  output.replaceChildren(ring, `${number(used)} / ${number(context)}`);
}
