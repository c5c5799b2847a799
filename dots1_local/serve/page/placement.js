// The view of what is where: each device's memory, the layers that it holds, speeds, cache and queue.

import { chat } from "./chat.js";
import { byId, el } from "./dom.js";
import { bytes, number, onLanguage, rate, t } from "./i18n.js";
import { layerMap } from "./layer_map.js";
import { LiveFigures } from "./live.js";
import { className, legend, memoryBars } from "./memory_bars.js";
import { CLASSES, allocatedBytes, plannedBytes, predictedAt } from "./placement_data.js";
import { model, placement as askPlacement } from "./server.js";
import { speedChart } from "./speed_chart.js";
import { startTips } from "./tips.js";
import { onView, shownView } from "./views.js";

const EVERY = 1000; // milliseconds between two samples

const live = new LiveFigures();
let placement;
let figures;
let since = 0; // when the server started: answers before it may be another model's
let timer;

export function startPlacement() {
  startTips(byId("placement"));
  onView((name) => (name === "placement" ? open() : clearTimeout(timer)));
  onLanguage(() => placement && draw());
}

async function open() {
  clearTimeout(timer);
  try {
    if (!placement) {
      [placement, { created: since }] = await Promise.all([askPlacement(), model()]);
      draw();
    }
    showFigures(await live.sample());
  } catch (error) {
    if (!placement) byId("placement").replaceChildren(el("p", { className: "hint", role: "alert" }, error.message));
  }
  if (shownView() === "placement") timer = setTimeout(open, EVERY);
}

function draw() {
  const { model: { file, bytes: size }, machine, context, sequences, kv_type: kv, devices } = placement;
  const tokens = sequences > 1 ? `${sequences} × ${number(context)}` : number(context);
  figures = { cards: el("div", { className: "cards" }), chart: el("div"), slots: el("div", { className: "slots" }) };
  const memory = el("div", { className: "memory" });
  memory.append(legend(memory), ...devices.map(deviceCard));
  byId("placement").replaceChildren(el("div", { className: "placement" },
    el("p", { className: "intro" }, t("whereIntro", { file, size: bytes(size), machine, context: tokens, kv })),
    figures.cards, memory, el("section", { className: "panel" }, el("h2", {}, t("speedBy")), figures.chart),
    el("section", { className: "panel" }, el("h2", {}, t("answers")), figures.slots)));
  showFigures({ slots: [], running: 0, waiting: 0, prompt: 0, cached: 0, ram: 0, disk: 0 });
}

function deviceCard(device) {
  const name = device.name === "CPU" ? "RAM" : device.name;
  const place = device.worker ? ` · ${device.worker}` : "";
  return el("section", { className: "panel", "aria-label": name },
    el("h2", {}, name, el("span", {}, `${device.description}${place}`), el("span", { className: "size" }, bytes(device.total))),
    memoryBars(device), layerMap(placement, device), table(device));
}

/** Return the figures of the bars as a table, for those who cannot see them. */
function table(device) {
  const [planned, allocated] = [plannedBytes(device), allocatedBytes(device)];
  const row = (label, ...sizes) => el("tr", {}, el("th", { scope: "row" }, label), ...sizes.map((size) => el("td", {}, size)));
  const cells = (name) => [bytes(planned[name]), ...(allocated ? [bytes(allocated[name])] : [])];
  const head = el("tr", {}, el("td"), el("th", { scope: "col" }, t("planned")), allocated && el("th", { scope: "col" }, t("allocated")));
  return el("details", {}, el("summary", {}, t("lookup")), el("table", {}, head, ...CLASSES.map(({ name }) => row(className(name), ...cells(name)))));
}

function showFigures(now) {
  const answers = measuredAnswers();
  const { speeds } = placement.predicted;
  const last = answers.at(-1);
  const predicted = speeds.length ? predictedAt(placement.predicted, last?.context ?? 0) : undefined;
  const state = t(now.active ? "now" : "last");
  figures.cards.replaceChildren(
    speedCard(t("decode"), predicted?.decode, now.decode ?? last?.decode, state),
    speedCard(t("prefill"), predicted?.prefill, now.prefill ?? last?.prefill, state),
    cacheCard(now), queueCard(now));
  figures.chart.replaceChildren(speeds.length || answers.length
    ? speedChart(speeds, answers.map(({ context, decode }) => [context, decode]), placement.context)
    : el("p", { className: "hint" }, t("notMeasured")));
  figures.slots.replaceChildren(...now.slots.map(slotRow));
}

/** Return the answers that this server has written in this browser, the oldest first. */
function measuredAnswers() {
  return chat.list.flatMap((conversation) => Object.values(conversation.messages))
    .filter((message) => message.stats?.decode && message.stats.prompt && message.created / 1000 >= since)
    .sort((a, b) => a.created - b.created)
    .map(({ stats }) => ({ context: stats.prompt + stats.completion / 2, decode: stats.decode, prefill: stats.prefill }));
}

function speedCard(title, predicted, measured, state) {
  const figure = (label, value) => el("div", {}, el("dt", {}, label), el("dd", { className: value ? "" : "unknown" }, value ? rate(value) : "–"));
  return card(title, el("dl", {}, figure(t("predicted"), predicted), figure(`${t("measured")}${measured ? ` · ${state}` : ""}`, measured)));
}

function cacheCard({ prompt, cached, ram, disk }) {
  const share = prompt ? cached / prompt : 0;
  const meter = el("meter", { min: 0, max: 1, value: share, "aria-label": t("promptCache") });
  return card(t("promptCache"), el("strong", {}, prompt ? `${number(100 * share)}%` : "–"), meter,
    el("p", { className: "hint" }, prompt ? t("promptCacheHit", { hit: number(cached), all: number(prompt) }) : t("nothingYet")),
    ram || disk ? el("p", { className: "hint" }, t("cacheSizes", { ram: bytes(ram), disk: bytes(disk) })) : "");
}

function queueCard({ running, waiting, slots }) {
  const dots = Array.from({ length: Math.min(64, slots.length + waiting) }, (_, index) =>
    el("i", { className: index < running ? "run" : index < slots.length ? "idle" : "wait" }));
  return card(t("queue"), el("strong", {}, number(running + waiting)), el("div", { className: "queue", "aria-hidden": "true" }, ...dots),
    el("p", { className: "hint" }, t("queueState", { running: number(running), waiting: number(waiting) })));
}

const card = (title, ...content) => el("section", { className: "card" }, el("h2", {}, title), ...content);

function slotRow({ id, cached_tokens: tokens, busy }) {
  const meter = el("meter", { min: 0, max: placement.context, value: tokens, "aria-label": t("slot", { n: id }) });
  return el("div", { className: busy ? "slot busy" : "slot" }, el("span", {}, t("slot", { n: id })), meter,
    el("span", {}, `${number(tokens)} / ${number(placement.context)}`));
}
