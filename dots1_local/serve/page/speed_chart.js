// Tokens a second by context: the predicted line, and the answers that were measured here.

import { el, svg } from "./dom.js";
import { number, t } from "./i18n.js";

const WIDTH = 880;
const HEIGHT = 200;
const LEFT = 40;
const BOTTOM = 24;
const TOP = 10;

/** Return the chart; `answers` are pairs of a context and its tokens a second. */
export function speedChart(speeds, answers, context) {
  const rates = [...speeds.map(({ decode }) => decode), ...answers.map(([, decode]) => decode)];
  const top = niceTop(Math.max(1, ...rates));
  const x = (tokens) => LEFT + ((WIDTH - LEFT - 10) * tokens) / context;
  const y = (decode) => HEIGHT - BOTTOM - ((HEIGHT - BOTTOM - TOP) * decode) / top;
  const text = (at, down, content, anchor) => svg("text", { x: at, y: down, "text-anchor": anchor }, content);
  const grid = [0, top / 2, top].flatMap((value) => [
    svg("line", { x1: LEFT, x2: WIDTH - 10, y1: y(value), y2: y(value) }),
    text(LEFT - 8, y(value) + 4, number(value, Number.isInteger(value) ? 0 : 1), "end"),
  ]);
  const scale = [0, context / 2, context].map((tokens, index) => text(x(tokens), HEIGHT - 6, number(Math.round(tokens)), ["start", "middle", "end"][index]));
  const line = svg("polyline", { class: "predicted", points: speeds.map((speed) => `${x(speed.context)},${y(speed.decode)}`).join(" ") });
  const dots = answers.map(([tokens, decode]) => svg("circle", { class: "measured", cx: x(Math.min(tokens, context)), cy: y(decode), r: 4 }));
  const label = speeds.map((speed) => `${number(speed.context)}: ${number(speed.decode, 1)}`).join("; ");
  const drawing = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": `${t("speedBy")}: ${label}` }, ...grid, ...scale, line, ...dots);
  const key = el("p", { className: "chart-key" }, el("i", { className: "line" }), t("predicted"), el("i", { className: "dot" }), t("measured"));
  return el("div", { className: "chart" }, drawing, key);
}

/** Return the next of 1, 2, 4, 5, 10 times a power of ten, for an axis that ends evenly. */
function niceTop(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 4, 5, 10].find((step) => step * power >= value) * power;
}
