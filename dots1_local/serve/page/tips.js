// Tooltips: what `data-tip` of the element under the pointer, or of the focused one, says.

import { el } from "./dom.js";

/** Show the tips of the elements in an area. */
export function startTips(area) {
  const tip = el("div", { className: "tip", role: "status", hidden: true });
  document.body.append(tip);
  const show = (element, x) => {
    const text = element?.dataset.tip;
    tip.hidden = !text;
    if (!text) return;
    tip.textContent = text;
    const box = element.getBoundingClientRect();
    const middle = x ?? box.left + box.width * (element.dataset.tipAt ?? 0.5);
    const half = tip.offsetWidth / 2 + 8;
    tip.style.left = `${Math.min(innerWidth - half, Math.max(half, middle))}px`;
    const below = box.bottom + 8;
    tip.style.top = `${below + tip.offsetHeight < innerHeight ? below : box.top - tip.offsetHeight - 8}px`;
  };
  area.addEventListener("pointermove", (event) => show(event.target.closest("[data-tip]"), event.clientX));
  area.addEventListener("pointerleave", () => show(undefined));
  area.addEventListener("tip", (event) => show(event.target));
  area.addEventListener("scroll", () => show(undefined), { passive: true });
}
