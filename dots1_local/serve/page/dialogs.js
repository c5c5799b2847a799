// Dialogs, on the browser's own element, which keeps the focus inside and closes with Escape.

import { el, iconButton } from "./dom.js";
import { t } from "./i18n.js";
import { keepKey } from "./server.js";

/** Show a dialog; it is removed when it closes. Return the element. */
export function openDialog(title, ...content) {
  const heading = el("h2", {}, title);
  const dialog = el("dialog", { "aria-label": title }, el("div", { className: "dialog-head" }, heading, iconButton("close", t("close"), () => dialog.close())), ...content);
  dialog.addEventListener("close", () => dialog.remove());
  dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
  document.body.append(dialog);
  dialog.showModal();
  return dialog;
}

/** Ask a question; resolve to whether the user agrees. */
export function confirmDialog(question, action) {
  return new Promise((resolve) => {
    let agreed = false;
    const yes = el("button", { type: "button", className: "primary", onclick: () => {
      agreed = true;
      dialog.close();
    } }, action);
    const no = el("button", { type: "button", onclick: () => dialog.close() }, t("cancel"));
    const dialog = openDialog(question, el("div", { className: "actions" }, no, yes));
    dialog.addEventListener("close", () => resolve(agreed));
  });
}

/** Ask for the API key; resolve when it is kept, reject if the user gives none. */
export function askForKey(wrong) {
  return new Promise((resolve, reject) => {
    const input = el("input", { type: "password", autocomplete: "current-password", required: true, "aria-label": t("key") });
    const remember = el("input", { type: "checkbox" });
    const form = el("form", { method: "dialog" },
      el("p", { role: wrong ? "alert" : "note" }, t(wrong ? "keyWrong" : "keyAsk")),
      el("label", {}, t("key"), input),
      el("label", { className: "check" }, remember, t("keyRemember")),
      el("div", { className: "actions" }, el("button", { className: "primary" }, t("save"))));
    form.addEventListener("submit", () => {
      keepKey(input.value.trim(), remember.checked);
      resolve();
    });
    const dialog = openDialog(t("key"), form);
    dialog.addEventListener("close", () => reject(new Error(t("keyAsk"))));
    input.focus();
  });
}
