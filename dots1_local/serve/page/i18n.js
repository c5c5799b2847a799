// The language of the page: texts, numbers, sizes and dates.

import { setIcon } from "./dom.js";
import { preferences, setPreference } from "./preferences.js";
import { TEXTS } from "./texts.js";

const changes = new EventTarget();

export const language = () => preferences().language ?? (navigator.language.startsWith("zh") ? "zh" : "en");

/** Return a text with its values filled in. */
export function t(key, values = {}) {
  const text = TEXTS[language()][key] ?? TEXTS.en[key];
  return text.replace(/\{(\w+)\}/g, (_, name) => values[name]);
}

/** Switch the language and write all texts again. */
export function setLanguage(name) {
  setPreference("language", name);
  translate(document);
  changes.dispatchEvent(new Event("change"));
}

/** Call `redraw` whenever the language changes. */
export const onLanguage = (redraw) => changes.addEventListener("change", redraw);

/** Fill in texts, labels and icons of elements that name them. */
export function translate(root) {
  document.documentElement.lang = language() === "zh" ? "zh-CN" : "en";
  for (const each of root.querySelectorAll("[data-icon]")) setIcon(each, each.dataset.icon);
  for (const each of root.querySelectorAll("[data-text]")) each.textContent = t(each.dataset.text);
  for (const each of root.querySelectorAll("[data-placeholder]")) each.placeholder = t(each.dataset.placeholder);
  for (const each of root.querySelectorAll("[data-label]")) {
    each.setAttribute("aria-label", t(each.dataset.label));
    if (each.tagName === "BUTTON") each.title = t(each.dataset.label);
  }
}

export const number = (value, digits = 0) =>
  value.toLocaleString(language(), { minimumFractionDigits: digits, maximumFractionDigits: digits });

/** Return tokens a second, with a decimal below 100. */
export const rate = (value) => `${number(value, value < 100 ? 1 : 0)} tok/s`;

export const seconds = (value) => `${number(value, value < 1 ? 2 : value < 10 ? 1 : 0)} s`;

/** Return for example 72.0 GB, in powers of 1,000 as everywhere in dots1-local. */
export function bytes(value) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let unit = 0;
  while (Math.abs(value) >= 1000 && unit < units.length - 1) {
    value /= 1000;
    unit += 1;
  }
  return `${number(value, unit ? 1 : 0)} ${units[unit]}`;
}

export const date = (time) => new Date(time).toLocaleDateString(language(), { month: "short", day: "numeric" });
