// A line at the top that says what went wrong or what the server is doing.

import { byId } from "./dom.js";

const SECONDS = 6;
let timer;

/** Show a sentence for some seconds. */
export function notify(sentence) {
  hold(sentence);
  timer = setTimeout(release, SECONDS * 1000);
}

/** Show a sentence until `release`. */
export function hold(sentence) {
  clearTimeout(timer);
  byId("notice").textContent = sentence;
  byId("notice").hidden = false;
}

export function release() {
  clearTimeout(timer);
  byId("notice").hidden = true;
}
