// The memory of a device as bars: what was planned, what was allocated, what is free.

import { el } from "./dom.js";
import { bytes, number, t } from "./i18n.js";
import { CLASSES, allocatedBytes, plannedBytes, segments } from "./placement_data.js";

/** Return both bars of a device. */
export function memoryBars(device) {
  const allocated = allocatedBytes(device);
  const rows = [bar(device, t("planned"), plannedBytes(device))];
  if (allocated) rows.push(bar(device, t("allocated"), allocated));
  return el("div", { className: "bars" }, ...rows);
}

function bar(device, label, sizes) {
  const found = segments(device, sizes);
  const whole = Math.max(device.total, found.reduce((all, { bytes: size }) => all + size, 0));
  const text = found.map(({ name, bytes: size }) => `${className(name)} ${bytes(size)}`).join(", ");
  const pieces = found.map(({ name, bytes: size }) => {
    const piece = el("span", { className: `segment ${name}`, data: { tip: `${className(name)}: ${bytes(size)} (${number((100 * size) / whole, 1)}%)` } });
    piece.style.width = `${(100 * size) / whole}%`;
    piece.append(el("b", {}, className(name, true)), el("span", {}, bytes(size)));
    return piece;
  });
  return el("div", { className: "bar-row" }, el("span", { className: "bar-label" }, label),
    el("div", { className: "bar", role: "img", "aria-label": `${label}: ${text}` }, ...pieces));
}

/** Return what a class is called; `short` where there is little room. */
export function className(name, short = false) {
  if (name === "others") return t("otherPrograms");
  return t(short && name === "compute" ? "computeShort" : name);
}

/** Return the legend; choosing a class fades the others in `area`. */
export function legend(area) {
  const buttons = [...CLASSES.map(({ name }) => name), "others", "free"].map((name) => {
    const button = el("button", { type: "button", className: "plain", "aria-pressed": "false" }, el("i", { className: `swatch ${name}` }), className(name, true));
    button.addEventListener("click", () => {
      const chosen = area.dataset.only === name ? "" : name;
      area.dataset.only = chosen;
      for (const each of buttons) each.setAttribute("aria-pressed", String(chosen !== "" && each === button));
    });
    return button;
  });
  return el("div", { className: "legend" }, ...buttons);
}
