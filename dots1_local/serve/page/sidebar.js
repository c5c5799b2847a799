// The list of conversations, which is a drawer where the window is narrow.

import { chat } from "./chat.js";
import { byId, el, iconButton } from "./dom.js";
import { confirmDialog } from "./dialogs.js";
import { date, onLanguage, t } from "./i18n.js";

const NARROW = matchMedia("(max-width: 800px)");

export function startSidebar() {
  byId("new-chat").addEventListener("click", () => {
    chat.begin();
    closeDrawer();
    byId("draft").focus();
  });
  byId("search").addEventListener("input", draw);
  byId("open-sidebar").addEventListener("click", toggle);
  byId("close-sidebar").addEventListener("click", closeDrawer);
  byId("shade").addEventListener("click", closeDrawer);
  byId("sidebar").addEventListener("keydown", (event) => event.key === "Escape" && closeDrawer());
  NARROW.addEventListener("change", arrange);
  chat.addEventListener("list", draw);
  onLanguage(draw);
  arrange();
  draw();
}

/** Show the list and search it. */
export function searchConversations() {
  document.body.classList.remove("folded");
  if (NARROW.matches) setDrawer(true);
  byId("search").focus();
}

function toggle() {
  if (NARROW.matches) setDrawer(true);
  else document.body.classList.toggle("folded");
}

function closeDrawer() {
  if (!NARROW.matches || !document.body.classList.contains("drawer")) return;
  setDrawer(false);
  byId("open-sidebar").focus();
}

function setDrawer(open) {
  document.body.classList.toggle("drawer", open);
  byId("shade").hidden = !open;
  arrange();
  if (open) byId("new-chat").focus();
}

/** What cannot be seen cannot get the focus. */
function arrange() {
  const open = document.body.classList.contains("drawer");
  byId("sidebar").inert = NARROW.matches && !open;
  document.querySelector("main").inert = NARROW.matches && open;
  byId("shade").hidden = !(NARROW.matches && open);
}

function draw() {
  const wanted = byId("search").value.trim().toLowerCase();
  const found = chat.list.filter((conversation) => !wanted || matches(conversation, wanted));
  const empty = el("li", { className: "hint" }, t("noConversations"));
  byId("conversations").replaceChildren(...(found.length ? found.map(entry) : [empty]));
}

function matches(conversation, wanted) {
  return conversation.title.toLowerCase().includes(wanted)
    || Object.values(conversation.messages).some((message) => message.text.toLowerCase().includes(wanted));
}

function entry(conversation) {
  const writing = Object.values(conversation.messages).some((message) => chat.generationOf(message));
  const title = conversation.title || t("untitled");
  const open = el("button", { type: "button", className: "open", onclick: () => {
    chat.open(conversation.id);
    closeDrawer();
  } }, el("span", { className: "name" }, title), el("span", { className: "date" }, writing ? "…" : date(conversation.updated)));
  if (conversation.id === chat.current.id) open.setAttribute("aria-current", "true");
  const item = el("li", {}, open,
    iconButton("edit", `${t("rename")}: ${title}`, () => rename(item, conversation)),
    iconButton("trash", `${t("remove")}: ${title}`, async () => {
      if (await confirmDialog(t("removeAsk", { title }), t("remove"))) chat.remove(conversation);
    }));
  return item;
}

function rename(item, conversation) {
  const input = el("input", { value: conversation.title, maxLength: 200, "aria-label": t("rename") });
  let done = false;
  const end = (keep) => {
    if (done) return;
    done = true;
    if (keep && input.value.trim()) chat.rename(conversation, input.value.trim());
    draw();
  };
  input.addEventListener("keydown", (event) => {
    if (event.key === "Escape") event.stopPropagation();
    if (event.key === "Enter" && !event.isComposing) end(true);
    else if (event.key === "Escape") end(false);
  });
  input.addEventListener("blur", () => end(true));
  item.replaceChildren(input);
  input.select();
}
