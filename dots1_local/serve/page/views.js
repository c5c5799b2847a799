// The two views, as tabs: the chat, and what is where.

import { byId } from "./dom.js";

const NAMES = ["chat", "placement"];
const listeners = [];

export const shownView = () => NAMES.find((name) => !byId(name).hidden);

/** Call `changed(name)` when another view is shown. */
export const onView = (changed) => listeners.push(changed);

export function showView(shown) {
  for (const name of NAMES) {
    const tab = byId(`tab-${name}`);
    byId(name).hidden = name !== shown;
    tab.setAttribute("aria-selected", String(name === shown));
    tab.tabIndex = name === shown ? 0 : -1;
  }
  document.body.dataset.view = shown;
  history.replaceState(null, "", shown === "chat" ? location.pathname + location.search : `#${shown}`);
  for (const changed of listeners) changed(shown);
}

export function startViews() {
  for (const name of NAMES) {
    byId(`tab-${name}`).addEventListener("click", () => showView(name));
    byId(`tab-${name}`).addEventListener("keydown", (event) => {
      if (event.key !== "ArrowLeft" && event.key !== "ArrowRight") return;
      const other = NAMES.find((each) => each !== name);
      showView(other);
      byId(`tab-${other}`).focus();
    });
  }
  showView(location.hash === "#placement" ? "placement" : "chat");
}
