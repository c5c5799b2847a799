// Which layers of the model a device holds: a column for each layer, a row for each class of bytes.
//
// A row is one path, whatever the number of layers, so that many devices stay cheap to draw.

import { el, svg } from "./dom.js";
import { bytes, number, t } from "./i18n.js";
import { className } from "./memory_bars.js";
import { CLASSES, layerCells } from "./placement_data.js";

const ROWS = CLASSES.map(({ name }) => name).filter((name) => name !== "compute");
const GAP = 0.14; // between cells, whose columns and rows are 1 apart
const TICKS = 10; // layers

/** Return the map of a device. Its cells are described where the pointer is, or the arrow keys lead. */
export function layerMap(placement, device) {
  const layers = layerCells(placement, device);
  const drawing = svg("svg", { viewBox: `0 0 ${layers.length} ${ROWS.length}`, preserveAspectRatio: "none", "aria-hidden": "true" },
    svg("path", { class: "absent", d: ROWS.map((_, row) => layers.map((_, layer) => cell(layer, row, 1)).join("")).join("") }),
    ...ROWS.map((name, row) => svg("path", { class: name, d: layers.map((cells, layer) => cell(layer, row, cells[name]?.share ?? 0)).join("") })));
  const mark = svg("rect", { class: "mark", width: 1, height: ROWS.length, visibility: "hidden" });
  drawing.append(mark);
  const map = el("div", { className: "map", tabIndex: 0, role: "group", "aria-label": `${device.name}: ${summary(layers)}` }, drawing);
  describe(map, mark, layers);
  return el("div", { className: "layers" },
    el("div", { className: "row-names", "aria-hidden": "true" }, ...ROWS.map((name) => el("span", {}, className(name)))),
    map, axis(layers.length - 1));
}

/** Return the path of a cell, filled from below by the share of the layer's bytes that it stands for. */
function cell(layer, row, share) {
  if (!share) return "";
  const height = (1 - GAP) * share;
  return `M${layer + GAP / 2} ${row + 1 - GAP / 2}v${-height}h${1 - GAP}v${height}z`;
}

function axis(blocks) {
  const ticks = [];
  for (let layer = 0; layer < blocks; layer += TICKS) {
    const tick = el("span", {}, number(layer));
    tick.style.left = `${(100 * (layer + 0.5)) / (blocks + 1)}%`;
    ticks.push(tick);
  }
  return el("div", { className: "axis", "aria-hidden": "true" }, ...ticks);
}

/** Let pointer and arrow keys choose a layer, whose description becomes the tip. */
function describe(map, mark, layers) {
  let chosen = -1;
  const show = (layer) => {
    chosen = Math.min(layers.length - 1, Math.max(0, layer));
    mark.setAttribute("x", chosen);
    mark.setAttribute("visibility", "visible");
    map.dataset.tip = description(layers[chosen], chosen, layers.length - 1);
    map.dataset.tipAt = (chosen + 0.5) / layers.length;
    map.dispatchEvent(new Event("tip", { bubbles: true }));
  };
  const hide = () => {
    mark.setAttribute("visibility", "hidden");
    delete map.dataset.tip;
    map.dispatchEvent(new Event("tip", { bubbles: true }));
  };
  map.addEventListener("pointermove", (event) => {
    const box = map.getBoundingClientRect();
    show(Math.floor(((event.clientX - box.left) / box.width) * layers.length));
  });
  map.addEventListener("pointerleave", hide);
  map.addEventListener("blur", hide);
  map.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!step) return;
    event.preventDefault();
    show(chosen + step);
  });
}

function description(cells, layer, blocks) {
  const lines = ROWS.filter((name) => cells[name]?.bytes).map((name) => {
    const { bytes: size, share, types } = cells[name];
    const part = share < 1 ? ` (${number(100 * share)}%)` : "";
    return `${className(name)}: ${bytes(size)}${part}, ${types.join(", ")}`;
  });
  return [layer === blocks ? t("outputLayer") : t("layer", { n: layer }), ...(lines.length ? lines : ["–"])].join("\n");
}

/** Say how many layers of each class the device holds. */
const summary = (layers) =>
  ROWS.map((name) => `${className(name)} ${number(layers.filter((cells) => cells[name]?.bytes).length)}`).join(", ");
