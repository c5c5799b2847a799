// Keyboard shortcuts, and the list of them.

import { chat } from "./chat.js";
import { openDialog } from "./dialogs.js";
import { byId, copyText, el } from "./dom.js";
import { t } from "./i18n.js";
import { searchConversations } from "./sidebar.js";
import { editLast } from "./transcript.js";
import { showView, shownView } from "./views.js";

const MAC = /Mac|iPhone|iPad/.test(navigator.userAgent);
const COMMAND = MAC ? "⌘" : "Ctrl";

// Keys as they are shown, what they do, and how the event is told.
const SHORTCUTS = [
  { keys: "Enter", label: "keySend" },
  { keys: "Escape", label: "keyStop", is: (event) => event.key === "Escape", act: () => chat.stop(), when: () => chat.generation && !document.querySelector("dialog[open]") },
  { keys: `${COMMAND}+Shift+O`, label: "keyNew", is: command("o", true), act: begin },
  { keys: `${COMMAND}+K`, label: "keySearch", is: command("k"), act: searchConversations },
  { keys: "↑", label: "keyEdit", is: (event) => event.key === "ArrowUp", act: editLast, when: (event) => event.target === byId("draft") && !byId("draft").value && !chat.generation },
  { keys: `${COMMAND}+Shift+L`, label: "keyCopy", is: command("l", true), act: copyLast },
  { keys: `${COMMAND}+.`, label: "keyViews", is: command("."), act: () => showView(shownView() === "chat" ? "placement" : "chat") },
  { keys: "?", label: "keyHelp", is: (event) => event.key === "?", act: help, when: (event) => !/^(?:TEXTAREA|INPUT|SELECT)$/.test(event.target.tagName) },
];

export function startShortcuts() {
  document.addEventListener("keydown", (event) => {
    if (event.isComposing) return;
    const found = SHORTCUTS.find(({ is, when }) => is?.(event) && (!when || when(event)));
    if (!found) return;
    event.preventDefault();
    found.act();
  });
}

/** Return a test for a key with Ctrl, or ⌘ on a Mac. */
function command(key, shift = false) {
  return (event) => (MAC ? event.metaKey : event.ctrlKey) && event.shiftKey === shift && !event.altKey && event.key.toLowerCase() === key;
}

function begin() {
  showView("chat");
  chat.begin();
  byId("draft").focus();
}

function copyLast() {
  const answer = chat.messages.findLast((message) => message.role === "assistant");
  if (answer) copyText(answer.text);
}

export function help() {
  if (document.querySelector("dialog[open]")) return;
  const rows = SHORTCUTS.flatMap(({ keys, label }) => [el("dt", {}, ...keys.split("+").map((key) => el("kbd", {}, key))), el("dd", {}, t(label))]);
  openDialog(t("shortcuts"), el("dl", { className: "keys" }, ...rows), el("p", { className: "hint" }, t("enterSends")));
}
