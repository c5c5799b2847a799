// The settings: of this conversation, of the page, and what becomes of the conversations.

import { chat } from "./chat.js";
import { confirmDialog, openDialog } from "./dialogs.js";
import { el } from "./dom.js";
import { language, setLanguage, t } from "./i18n.js";
import { notify } from "./notice.js";
import { preferences, setTheme } from "./preferences.js";
import { NUMBERS, setDefaultSettings } from "./sampling.js";
import { forgetKey, key } from "./server.js";
import { exportConversations, readExport } from "./transfer.js";

export function openSettings() {
  const dialog = openDialog(t("settings"), conversationPart(), pagePart(() => dialog.close()), dataPart());
  dialog.classList.add("settings");
}

function conversationPart() {
  const { settings } = chat.current;
  const change = (name, value) => {
    const { [name]: _, ...others } = chat.current.settings;
    chat.setSettings(value === undefined ? others : { ...others, [name]: value });
  };
  const system = el("textarea", { value: settings.system ?? "", rows: 3, placeholder: t("systemHint") });
  system.addEventListener("input", () => change("system", system.value || undefined));
  const asDefaults = el("button", { type: "button", onclick: () => {
    setDefaultSettings(chat.current.settings);
    asDefaults.textContent = `${t("asDefaults")} ✓`;
  } }, t("asDefaults"));
  return part(t("thisConversation"), el("label", {}, t("system"), system),
    el("div", { className: "grid" }, ...NUMBERS.map((each) => numberField(each, settings[each.name], change))), asDefaults);
}

function numberField({ name, label, min, max, step, usual }, value, change) {
  const input = el("input", { type: "number", min, max, step: "any", inputMode: step < 1 ? "decimal" : "numeric", placeholder: usual || t("serverDefault"), value: value ?? "" });
  input.addEventListener("input", () => {
    const valid = input.value === "" || (input.validity.valid && (step < 1 || Number.isInteger(input.valueAsNumber)));
    input.setAttribute("aria-invalid", String(!valid));
    if (valid) change(name, input.value === "" ? undefined : input.valueAsNumber);
  });
  return el("label", {}, t(label), input);
}

function pagePart(close) {
  const theme = select([["auto", t("themeAuto")], ["light", t("themeLight")], ["dark", t("themeDark")]], preferences().theme ?? "auto", setTheme);
  const tongue = select([["en", "English"], ["zh", "中文"]], language(), (name) => {
    setLanguage(name);
    close();
    openSettings();
  });
  const forget = el("button", { type: "button", disabled: !key(), onclick: () => {
    forgetKey();
    forget.disabled = true;
  } }, t("keyForget"));
  return part(t("page"), el("div", { className: "grid" }, el("label", {}, t("theme"), theme), el("label", {}, t("language"), tongue)), forget);
}

function select(choices, value, change) {
  const field = el("select", {}, ...choices.map(([name, label]) => el("option", { value: name, selected: name === value }, label)));
  field.addEventListener("change", () => change(field.value));
  return field;
}

function dataPart() {
  const file = el("input", { type: "file", accept: ".json,application/json", hidden: true, id: "import-file" });
  file.addEventListener("change", () => importFile(file.files[0]));
  const button = (name, onclick, disabled) => el("button", { type: "button", onclick, disabled }, t(name));
  return part(t("conversations"), el("p", { className: "hint" }, t("data")), el("div", { className: "actions start" },
    button("exportOne", () => exportConversations([chat.current], "conversation.json"), !chat.messages.length),
    button("exportAll", () => exportConversations(chat.list, "conversations.json"), !chat.list.length),
    button("importFile", () => file.click()), file,
    button("clearAll", removeAll, !chat.list.length)));
}

async function importFile(file) {
  try {
    const found = readExport(await file.text());
    await chat.add(found);
    notify(t("importDone", { n: found.length }));
  } catch (error) {
    notify(t("importBad", { name: file.name, why: error.message }));
  }
}

async function removeAll() {
  if (!(await confirmDialog(t("clearAllAsk", { n: chat.list.length }), t("remove")))) return;
  for (const conversation of [...chat.list]) await chat.remove(conversation);
}

const part = (title, ...content) => el("section", {}, el("h3", {}, title), ...content);
