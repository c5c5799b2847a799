// Small helpers that build elements; text never becomes markup.

const SVG = "http://www.w3.org/2000/svg";

const ICONS = {
  branch: "M6 3v12M6 15a3 3 0 1 0 0 6 3 3 0 0 0 0-6ZM18 3a3 3 0 1 0 0 6 3 3 0 0 0 0-6ZM18 9a9 9 0 0 1-9 9",
  check: "M5 12.5 10 17.5 19 7",
  clip: "m20 11-8.5 8.5a5.5 5.5 0 0 1-7.8-7.8L12.5 3a3.7 3.7 0 0 1 5.2 5.2L9 16.800a1.800 1.800 0 0 1-2.600-2.600L14.500 6",
  close: "M6 6 18 18M18 6 6 18",
  copy: "M9 9h11v11H9zM5 15H4V4h11v1",
  down: "M12 5v14M6 13l6 6 6-6",
  edit: "M4 20h4L19 9l-4-4L4 16zM13.500 6.500l4 4",
  left: "m14 6-6 6 6 6",
  menu: "M4 7h16M4 12h16M4 17h16",
  moon: "M20 14.500A8.500 8.500 0 0 1 9.500 4 8.500 8.500 0 1 0 20 14.500Z",
  plus: "M12 5v14M5 12h14",
  redo: "M20 11a8 8 0 1 0-2.300 6.300M20 5v6h-6",
  right: "m10 6 6 6-6 6",
  send: "M12 20V5M5.500 11.500 12 5l6.500 6.500",
  sliders: "M4 7h9M17 7h3M4 17h3M11 17h9M15 5v4M9 15v4",
  stop: "M7 7h10v10H7z",
  sun: "M12 8a4 4 0 1 0 0 8 4 4 0 0 0 0-8ZM12 2v2M12 20v2M2 12h2M20 12h2M5 5l1.500 1.500M17.500 17.500 19 19M19 5l-1.500 1.500M6.500 17.500 5 19",
  trash: "M4 7h16M9 7V4h6v3M6 7l1 13h10l1-13M10 11v5M14 11v5",
};

/** Return an element; `props` are properties, or attributes if their names have a dash or are `role`. */
export function el(tag, props = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (value === undefined) continue;
    if (name === "data") Object.assign(element.dataset, value);
    else if (name.includes("-") || name === "role") element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children.filter((child) => child !== undefined && child !== null && child !== false));
  return element;
}

/** Return an SVG element with these attributes. */
export function svg(tag, attributes = {}, ...children) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

/** Return an icon; the button around it has the label. */
export function icon(name) {
  const path = svg("path", { d: ICONS[name] });
  return svg("svg", { class: "icon", viewBox: "0 0 24 24", "aria-hidden": "true" }, path);
}

/** Return a button with an icon, and a label that is shown as a tooltip. */
export function iconButton(name, label, onclick, props = {}) {
  return el("button", { type: "button", className: "plain", title: label, "aria-label": label, onclick, ...props }, icon(name));
}

/** Replace the icon of a button. */
export function setIcon(button, name) {
  button.querySelector(".icon")?.remove();
  button.prepend(icon(name));
}

export const byId = (id) => document.getElementById(id);

/** Return an identifier; `crypto.randomUUID` does not exist on pages of other machines without TLS. */
export function randomId() {
  const bytes = crypto.getRandomValues(new Uint8Array(12));
  return "i" + Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** Copy a text; the clipboard's interface does not exist on pages of other machines without TLS. */
export async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    const area = el("textarea", { value: text, className: "visually-hidden" });
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
}

/** Return a button that copies what `text()` returns, and says so for a moment. */
export function copyButton(text, label, done) {
  const button = iconButton("copy", label, async () => {
    await copyText(text());
    setIcon(button, "check");
    button.setAttribute("aria-label", done);
    setTimeout(() => {
      setIcon(button, "copy");
      button.setAttribute("aria-label", label);
    }, 1500);
  });
  return button;
}
