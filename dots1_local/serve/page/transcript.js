// The messages of the open conversation, and where they are scrolled to.

import { chat } from "./chat.js";
import { byId, el, svg } from "./dom.js";
import { onLanguage, t } from "./i18n.js";
import { MessageView } from "./message_view.js";

const NEAR = 80; // pixels from the end that count as being there
const USERS = 500; // milliseconds after an event in which scrolling is the user's

let views = new Map();
let following = true; // whether the end is kept in sight
let served = "dots1";

/** Show conversations from now on. */
export function startTranscript() {
  const scroller = byId("scroller");
  chat.addEventListener("open", draw);
  chat.addEventListener("message", (event) => update(event.detail));
  onLanguage(draw);
  let moved = 0; // when the user last did what may scroll
  for (const event of ["wheel", "touchmove", "pointerdown", "keydown"]) {
    scroller.addEventListener(event, () => (moved = performance.now()), { passive: true });
  }
  scroller.addEventListener("scroll", () => {
    const away = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight >= NEAR;
    // What is laid out late scrolls too, and must not end the following.
    if (!away) following = true;
    else if (performance.now() - moved < USERS) following = false;
    byId("to-end").hidden = following;
  }, { passive: true });
  byId("to-end").addEventListener("click", toEnd);
  new ResizeObserver(() => following && jump()).observe(byId("transcript"));
  draw();
}

/** Call the model by this name. */
export function setServedName(name) {
  served = name;
  if (!chat.messages.length) draw();
}

export function toEnd() {
  following = true;
  jump();
}

/** Let the user change the last question. */
export function editLast() {
  const question = chat.messages.findLast((message) => message.role === "user");
  if (question) views.get(question.id).edit();
}

function draw() {
  const known = views;
  views = new Map(chat.messages.map((message) => [message.id, reusable(known.get(message.id)) ?? new MessageView(message)]));
  const shown = [...views.values()].map((view) => view.element);
  byId("transcript").replaceChildren(...(shown.length ? shown : [welcome()]));
  byId("title").textContent = chat.current.title || t("untitled");
  document.title = chat.current.title ? `${chat.current.title} · ${served}` : served;
  toEnd();
}

/** Return the view of an answer that is being written, which must not be drawn anew. */
function reusable(view) {
  return view && chat.generationOf(view.message) ? view : undefined;
}

function update(message) {
  const view = views.get(message.id);
  if (!view) return;
  view.update();
  if (!chat.generationOf(message)) byId("spoken").textContent = message.text.slice(0, 2000);
}

function jump() {
  const scroller = byId("scroller");
  scroller.scrollTop = scroller.scrollHeight;
}

function welcome() {
  const logo = svg("svg", { class: "logo large", viewBox: "0 0 36 12", "aria-hidden": "true" },
    ...[6, 18, 30].map((x) => svg("circle", { cx: x, cy: 6, r: 4.5 })));
  const tries = ["try1", "try2", "try3", "try4"].map((name) =>
    el("button", { type: "button", onclick: () => chat.send(t(name), []) }, t(name)));
  return el("div", { className: "welcome" }, logo, el("h2", {}, t("greeting")),
    el("p", {}, t("greetingSmall", { model: served })), el("div", { className: "tries" }, ...tries));
}
